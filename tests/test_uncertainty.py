"""Fits that can be trusted: minimisers, noise, draws, intervals and what a trace cannot tell."""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from test_fit import QUIET, RATES, SERVER, reference_rows, trace_of

from diffspec import Workload, evaluate, fit
from diffspec.acceptance import ConstantAcceptance
from diffspec.analysis.answers import _compare
from diffspec.analysis.intervals import draw_deployment, intervals, misfit, spread
from diffspec.fitting.deployment import FittedModel
from diffspec.fitting.draws import bootstrap, split_r_hat
from diffspec.fitting.evaluate import interval_summary
from diffspec.fitting.forms import Scales, build_form
from diffspec.fitting.hull import in_words, outside, ranges
from diffspec.fitting.noise import Noise, negative_log_likelihood, repeat_weights
from diffspec.fitting.objective import build_objective, choose_targets
from diffspec.fitting.observations import observations
from diffspec.fitting.profile import profile, profiled_paths
from diffspec.fitting.solve import minimise
from diffspec.fitting.uncertainty import posterior_covariance
from diffspec.parameters import get_parameters, parameter_infos, set_parameters, to_constrained, to_unconstrained
from diffspec.results import InputError
from diffspec.traces import read_trace

SCALES = Scales(0.01, 0.03, 150.0, 100.0)
NOISE = 0.02


def table(tmp_path, draft_lengths, noise=NOISE, seed_rates=RATES):
    return trace_of(reference_rows(SERVER, seed_rates, draft_lengths, 0.8, noise), tmp_path / "rows.csv")


@pytest.fixture(scope="module")
def objective(tmp_path_factory):
    data = observations(table(tmp_path_factory.mktemp("rows"), (0, 2, 6)).frame)
    form = build_form("roofline", SCALES)
    form = dataclasses.replace(
        form, template=dataclasses.replace(form.template, waiting_states=0, finite_runs="trapezoid")
    )
    return build_objective(form, data, choose_targets(data)), data


@pytest.fixture(scope="module")
def solutions(objective):
    made, data = objective
    weights = np.ones((1, len(made.columns), len(data)))
    start = np.zeros((1, made.size))
    return {"gauss-newton": minimise(made, start, weights)}


def test_noise_is_the_t_distribution_of_scipy():
    noise = Noise(jnp.asarray([0.02, 0.05]), jnp.asarray([0.2, 0.4]), jnp.asarray(3.5))
    requests = jnp.asarray([25.0, 400.0, 1e12])
    residuals = jnp.asarray([[0.01, -0.2, 0.03], [0.4, 0.0, -0.1]])
    weights = jnp.asarray([[1.0, 0.5, 1.0], [0.0, 1.0, 1.0]])
    sigma = np.sqrt(np.array([[0.02], [0.05]]) ** 2 + np.array([[0.2], [0.4]]) ** 2 / np.asarray(requests))
    each = scipy.stats.t(3.5).logpdf(np.asarray(residuals) / sigma) - np.log(sigma) + 0.5 * math.log(math.pi)
    assert float(negative_log_likelihood(residuals, noise, requests, weights)) == pytest.approx(
        -float(np.sum(each * np.asarray(weights))), rel=1e-12
    )


def test_repeats_that_agree_count_once_and_repeats_that_scatter_count_each():
    cells, used = np.array([0, 0, 0, 1, 1, 1, 2]), np.ones((1, 7), dtype=bool)
    agreeing = np.array([[0.1, 0.1, 0.1, -0.1, -0.1, -0.1, 0.1]])
    assert repeat_weights(cells, agreeing, used)[0] == pytest.approx([1 / 3] * 6 + [1.0])
    scattered = np.array([[0.1, -0.1, 0.0, 0.1, -0.1, 0.0, 0.0]])
    assert repeat_weights(cells, scattered, used)[0] == pytest.approx(np.ones(7))
    assert (repeat_weights(np.arange(7), agreeing, used) == 1.0).all()


def test_linearisation_is_the_gradient_and_the_derivatives(objective):
    made, _ = objective
    vector = jnp.asarray(np.random.default_rng(0).normal(0, 0.3, made.size))
    weights, none = jnp.ones(made.used.shape), jnp.zeros(made.used.shape)
    found = jax.jit(lambda *given: made.linearise(*given))(vector, weights, none, jnp.zeros(made.size))
    value, gradient = jax.jit(jax.value_and_grad(lambda x, w: made(x, w)))(vector, weights)
    assert float(found.loss) == pytest.approx(float(value), rel=1e-12)
    np.testing.assert_allclose(found.gradient, gradient, rtol=1e-7, atol=1e-8)
    assert np.linalg.eigvalsh(np.asarray(found.curvature)[: made.places, : made.places]).min() >= 1.0 - 1e-9
    # the problem whose logs are less by an offset and whose priors sit elsewhere
    offset, centre = 0.1 * jnp.ones(made.used.shape), jnp.full(made.size, 0.2)
    moved = jax.jit(lambda *given: made.linearise(*given))(vector, weights, offset, centre)
    np.testing.assert_allclose(moved.residuals - found.residuals, 0.1 * made.used, atol=1e-12)


def test_gauss_newton_ends_where_scipy_does(objective, solutions):
    made, _ = objective
    weights = jnp.ones(made.used.shape)
    judged = jax.jit(jax.value_and_grad(lambda x, w: made(x, w)))
    found = scipy.optimize.minimize(
        lambda x: tuple(np.asarray(part) for part in judged(jnp.asarray(x), weights)),
        np.zeros(made.size),
        jac=True,
        method="BFGS",
        options={"gtol": 1e-5, "maxiter": 2000},
    )
    best = solutions["gauss-newton"]
    assert best.loss[0] <= found.fun + 1e-4 and best.gradient[0] < 0.05


def test_optax_solvers_go_downhill(objective, monkeypatch):
    made, data = objective
    monkeypatch.setattr("diffspec.fitting.solve.ADAM_STEPS", 60)
    weights, start = np.ones((1, len(made.columns), len(data))), np.zeros((1, made.size))
    first, *later = (minimise(made, start, weights, most, solver=solver) for most, solver in _SHORT)
    assert all(found.loss[0] < first.loss[0] - 1.0 for found in later)


_SHORT = ((0, "gauss-newton"), (25, "lbfgs"), (60, "adam"))


@pytest.mark.slow
def test_optax_comes_near_gauss_newton(objective, solutions):
    made, data = objective
    weights, start = np.ones((1, len(made.columns), len(data))), np.zeros((1, made.size))
    lbfgs, adam = (minimise(made, start, weights, solver=solver) for solver in ("lbfgs", "adam"))
    best = solutions["gauss-newton"]
    assert lbfgs.loss[0] <= best.loss[0] + 0.1 and adam.loss[0] <= best.loss[0] + 2.0
    assert best.evaluations < lbfgs.evaluations < adam.evaluations


def test_information_is_the_curvature_that_the_noise_expects(objective, solutions):
    """Monte Carlo oracle: the mean Hessian over residuals drawn from the noise is the Fisher information."""
    made, data = objective
    solution = solutions["gauss-newton"]
    vector, weights = solution.vector[0], np.ones((len(made.columns), len(data)))
    information = made.fisher_information(vector, weights, solution.jacobian[0])
    noise = made.noise(jnp.asarray(vector))
    scale = np.asarray(noise.scale(made.requests))[:, : len(data)]
    random, nu = np.random.default_rng(1), float(noise.degrees_of_freedom)
    r = scale * random.standard_t(nu, (4000, *scale.shape))
    second = (nu + 1) * (nu * scale**2 - r**2) / (nu * scale**2 + r**2) ** 2  # of -log p by the residual
    used = np.asarray(made.used)[:, : len(data)]
    expected = np.einsum("trp,tr,trq->pq", solution.jacobian[0], second.mean(axis=0) * used, solution.jacobian[0])
    np.testing.assert_allclose(np.diag(expected), np.diag(information), rtol=0.1, atol=1e-6)
    covariance = posterior_covariance(made, vector, weights, solution.jacobian[0])
    assert (np.diag(covariance) <= 1.0 + 1e-9).all()  # no wider than the prior


@pytest.mark.slow
def test_bootstrap_draws_spread_as_linear_theory_has_it(objective, solutions):
    """Refits to what the fit predicts, scattered by its noise: covariance (F + 1)^-1 F (F + 1)^-1 where the rows tell
    much; where they tell nothing the draws stay at the prior's centre, as said."""
    made, data = objective
    solution, weights = solutions["gauss-newton"], np.ones((len(made.columns), len(data)))
    none = {column: 1.0 for column in made.columns}
    found = bootstrap(made, solution, weights, np.arange(len(data)), none, count=96)
    assert found.method == "bootstrap" and found.draws is not None and found.draws.shape == (96, len(made.form.paths))
    information = made.fisher_information(solution.vector[0], weights, solution.jacobian[0])
    inverse = np.linalg.inv(information + np.eye(len(information)))
    theory = np.sqrt(np.diag(inverse @ information @ inverse))[: len(made.form.paths)] * np.asarray(made.form.spread)
    told = np.diag(inverse)[: len(theory)] < 0.1
    assert told.sum() >= 3
    ratio = found.deviation[told] / theory[told]
    # noise is refitted, too, and has tails: the spread is that of the theory to a third
    assert np.exp(np.log(ratio).mean()) == pytest.approx(1.0, abs=0.33), ratio
    untold = np.diag(inverse)[: len(theory)] > 0.9
    assert (found.deviation[untold] < 0.35 * np.asarray(made.form.spread)[untold]).all()


def test_the_sampler_is_an_option_and_says_before_the_fit_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "blackjax", None)
    monkeypatch.setattr("diffspec.fitting.fit._fit_deployment", lambda *_: pytest.fail("fitted first"))
    with pytest.raises(InputError, match=r"BlackJAX: pip install 'diffspec\[posterior\]'"):
        fit(table(tmp_path, (0, 2, 6)), uncertainty="nuts")


def test_chains_that_found_different_places_are_told():
    chains = np.random.default_rng(0).standard_normal((4, 200, 3))
    assert split_r_hat(chains) < 1.05
    chains[0, :, 1] += 2.0
    assert split_r_hat(chains) > 1.2


@pytest.mark.slow
def test_randomised_draws_are_those_of_the_posterior():
    """BlackJAX's no-U-turn sampler, an independent implementation, as judge of the default draws on measured rows."""
    pytest.importorskip("blackjax", reason="BlackJAX is not installed: pip install 'diffspec[posterior]'")
    given = {"trace": read_trace(QUIET), "step_time": "affine"}
    quick, sampled = (fit(**given, uncertainty=name).deployment().uncertainty for name in ("randomised", "nuts"))
    assert quick is not None and sampled is not None and sampled.method == "nuts"
    ratio = np.log(quick.deviation / sampled.deviation)
    assert abs(ratio.mean()) < 0.25 and np.abs(ratio).max() < 0.8, ratio


@pytest.mark.slow
def test_a_profile_is_what_scipy_finds_with_the_parameter_held(objective, solutions):
    made, data = objective
    weights = np.ones((len(made.columns), len(data)))
    path = "step_time.token_compute"
    found = profile(made, solutions["gauss-newton"], weights, path)
    index, info = made.form.paths.index(path), parameter_infos(made.form.template)[path]
    judged = jax.jit(jax.value_and_grad(lambda x, w: made(x, w) - 0.5 * x[index] ** 2))  # its own prior is left out
    free = np.arange(made.size) != index

    def held(value):
        centre = to_unconstrained(get_parameters(made.form.template)[path], info)
        place = float((to_unconstrained(jnp.asarray(value), info) - centre) / made.form.spread[index])

        def loss(others):
            vector = np.insert(others, index, place)
            total, gradient = judged(jnp.asarray(vector), jnp.asarray(np.ones(made.used.shape)))
            return float(total), np.asarray(gradient)[free]

        start = solutions["gauss-newton"].vector[0][free]
        return scipy.optimize.minimize(loss, start, jac=True, method="BFGS", options={"maxiter": 500}).fun

    rises = np.asarray(found["loss_rise"])
    chosen = [int(np.argmin(np.abs(rises - wanted))) for wanted in (0.0, 1.0, 3.0)]
    lowest, *others = (held(found["values"][number]) for number in chosen)
    assert np.asarray(others) - lowest == pytest.approx(rises[chosen[1:]] - rises[chosen[0]], abs=0.02)
    assert found["low"] is None or found["low"] < found["values"][chosen[0]]
    assert found["high"] > found["values"][chosen[0]]


def test_a_profile_is_asked_for_by_name():
    paths = ["step_time.verify_kv", "request_overhead"]
    assert profiled_paths(["verify_kv"], paths) == profiled_paths(["step_time.verify_kv"], paths) == paths[:1]
    assert profiled_paths(["all"], paths) == paths
    with pytest.raises(InputError, match="'kv'; allowed: all, verify_kv, request_overhead"):
        profiled_paths(["kv"], paths)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fit(table(tmp_path_factory.mktemp("fit"), (0, 2, 6)), step_time="roofline")


@pytest.mark.slow
def test_a_side_that_the_rows_do_not_bound_is_open(tmp_path):
    """No closed loop was measured, so nothing is told of one; reading the weights takes no longer than steps do, but
    could be launches instead, which also take the same time in every step."""
    profiled = ("weight_read", "closed_loop_sync")
    deployment = fit(table(tmp_path, (0, 2, 6)), step_time="roofline", profile=profiled).deployment()
    profiles = deployment.quality["profiles"]
    assert set(profiles) == {"step_time.weight_read", "closed_loop_sync"}
    untold, told = profiles["closed_loop_sync"], profiles["step_time.weight_read"]
    assert untold["low"] is None and untold["high"] is None and max(untold["loss_rise"]) < 0.1
    launches_too = SERVER.weight_read + SERVER.step_overhead
    assert told["low"] is None
    assert float(deployment.serving.step_time.weight_read) < told["high"] < 1.5 * launches_too


@pytest.mark.slow
def test_intervals_hold_what_is_measured_at_unseen_loads_and_draft_lengths(model, tmp_path):
    rows = reference_rows(SERVER, (2.0, 3.0, 6.0, 10.0, 14.0, 18.0), (0, 1, 3, 4, 5), 0.8, NOISE)
    metrics = evaluate(model, trace_of(rows, tmp_path / "unseen.csv"))["metrics"]
    inside = sum(metrics[name]["coverage"] * metrics[name]["rows"] for name in ("ttft_mean", "itl_mean"))
    assert 0.8 <= inside / 60 <= 1.0
    for name in ("ttft_mean", "itl_mean"):  # and are not wide for nothing: the noise alone has 0.066
        assert 0.05 < metrics[name]["interval_width"] < 0.2, metrics[name]


def test_draws_fit_the_rows_and_are_as_wide_as_the_covariance_where_rows_tell_much(model):
    known = model.deployment().uncertainty
    told = np.flatnonzero(np.sqrt(np.diag(known.covariance)) < 0.15 * known.prior)
    assert len(told) >= 2
    ratio = known.draws.std(axis=0)[told] / np.sqrt(np.diag(known.covariance))[told] / known.parameter_inflation
    assert (ratio > 0.5).all() and (ratio < 2.0).all(), ratio


def test_interval_summary_by_hand():
    value, low, high = np.array([1.0, 4.0]), np.array([0.5, 1.0]), np.array([2.0, 2.0])
    found = interval_summary(value, low, high)
    assert found["coverage"] == 0.5
    assert found["interval_width"] == pytest.approx((math.log(4) + math.log(2)) / 2)
    assert found["interval_score"] == pytest.approx((math.log(4) + math.log(2) + 20 * math.log(2)) / 2)


@pytest.mark.slow
def test_one_draft_length_cannot_tell_drafting_from_verifying(model, tmp_path):
    narrow = fit(table(tmp_path, (0, 3)), step_time="roofline").deployment()
    words = [entry["words"] for entry in narrow.quality["untold"] if any("draft" in p for p in entry["parameters"])]
    assert words and all("only k=3 was measured" in each for each in words)
    untold = {path for entry in narrow.quality["untold"] for path in entry["parameters"]}
    assert {"step_time.draft.pass_base", "step_time.draft.block_base"} & untold
    wide = model.deployment().quality["untold"]
    assert not any("was measured" in entry["words"] and "draft" in entry["words"] for entry in wide)
    parameters = narrow.to_dict()["parameters"]
    assert parameters["step_time.weight_read"]["told"] > 0.7 > parameters["step_time.kv_read"]["told"]


@pytest.mark.slow
def test_the_choice_of_a_form_is_told(tmp_path):
    deployment = fit(table(tmp_path, (0, 2, 6))).deployment()
    quality = deployment.quality
    assert set(quality["forms"]) == {"affine", "roofline"} and "held-out rows" in quality["chosen"]
    assert quality["chosen"].startswith(deployment.form)


def test_models_keep_their_uncertainty_and_refuse_a_damaged_one(model):
    text = model.to_json()
    again = FittedModel.from_json(text).deployment().uncertainty
    known = model.deployment().uncertainty
    np.testing.assert_array_equal(again.draws, known.draws)
    assert again.to_dict() == known.to_dict()
    damaged = json.loads(text)
    damaged["deployments"][0]["uncertainty"]["covariance"] = [[1.0]]
    with pytest.raises(InputError, match="covariance"):
        FittedModel.from_json(json.dumps(damaged))
    old = json.loads(text)
    del old["deployments"][0]["uncertainty"]
    assert FittedModel.from_json(json.dumps(old)).deployment().uncertainty is None


@pytest.mark.parametrize("options", [{"solver": "newton"}, {"uncertainty": "exact"}])
def test_unknown_names_are_refused(options, tmp_path):
    with pytest.raises(InputError, match="allowed"):
        fit(table(tmp_path, (0, 2)), **options)


@pytest.mark.slow
def test_the_quick_covariance_is_there_too(tmp_path):
    known = fit(table(tmp_path, (0, 2, 6)), step_time="roofline", uncertainty="laplace").deployment().uncertainty
    assert known.draws is None and known.deviations(16).shape == (16, len(known.paths))
    assert np.abs(known.deviations(256).mean(axis=0)).max() < 0.1
    assert known.noise("tpot_mean") == known.noise("itl_mean") and known.noise("throughput") is None


@pytest.mark.slow
def test_measured_rows_of_the_quiet_table_lie_inside():
    trace = read_trace(QUIET)
    model = fit(trace, step_time="roofline", holdout="draft_length==4")
    metrics = model.deployment().quality["holdout"]["metrics"]
    inside = np.mean([metrics[name]["coverage"] for name in ("ttft_mean", "itl_mean", "e2e_mean")])
    assert inside >= 0.7  # nine rows of a draft length never seen


# --- intervals of predictions ----------------------------------------------------------------------

REFERENCE_LOAD = {"prompt_length": 300.0, "output_length": 120.0}


@pytest.fixture(scope="module")
def asked(model):
    """(deployment, workload, configuration, its draws) of one question inside what was measured."""
    deployment = model.deployment()
    workload = Workload(**REFERENCE_LOAD, arrival_rate=9.0)
    config = deployment.configuration(4.0, acceptance=ConstantAcceptance(0.8))
    return deployment, workload, config, draw_deployment(deployment, workload, config)


def test_intervals_are_those_of_a_loop_over_the_draws(asked):
    """Each draw by itself, as the scalar model predicts it, and a scatter of random numbers."""
    deployment, workload, config, drawn = asked
    known, serving = deployment.uncertainty, deployment.serving
    infos, values = parameter_infos(serving), get_parameters(serving)
    workload, config = (jax.tree.map(lambda leaf: np.asarray(leaf, dtype=float), part) for part in (workload, config))
    found = []
    for deviations in known.draws[:64]:
        moved = {
            path: np.asarray(to_constrained(to_unconstrained(values[path], infos[path]) + deviation, infos[path]))
            for path, deviation in zip(known.paths, deviations, strict=True)
        }
        whole = {path: np.asarray(value, dtype=float) for path, value in values.items()} | moved
        trimmed = dataclasses.replace(serving, waiting_states=0)  # there is no cap
        found.append(_compare(set_parameters(trimmed, whole), workload, config))
    told = drawn.told()
    assert told["level"] == 0.9 and told["draws"] == 64 and told["includes"] == ["parameters", "misfit"]
    assert told["saturated_share"] == 0.0 and "percentiles" not in told
    names = ("ttft", "itl", "tpot", "e2e_latency", "throughput", "capacity", "utilization", "effective_batch_size")
    by_hand = {name: np.array([float(getattr(each.speculative, name)) for each in found]) for name in names}
    by_hand["speedup"] = np.array([float(each.speedup) for each in found])
    share = float(np.median(by_hand["ttft"] / by_hand["e2e_latency"]))
    scales = misfit(known, is_open=True, ttft_share=share)
    assert scales["ttft"] == pytest.approx(known.misfit["ttft_mean"] * known.inflation["ttft_mean"])
    assert scales["speedup"] == pytest.approx(math.sqrt(2) * scales["e2e_latency"]) and scales["throughput"] == 0.0
    scatter = scipy.stats.t(known.degrees_of_freedom).rvs((64, 2000), random_state=0)
    for name, values in by_hand.items():
        np.testing.assert_allclose(drawn.values[name], values, rtol=1e-9)
        low, high = np.quantile(values[:, None] * np.exp(scales[name] * scatter), (0.05, 0.95))
        edges = told["metrics"][name]
        assert edges["low"] == pytest.approx(low, rel=0.01) and edges["high"] == pytest.approx(high, rel=0.01), name
        assert edges["low"] <= edges["median"] <= edges["high"]
    crossings = np.array([float(each.breakeven_rate) for each in found])
    assert (np.isfinite(crossings) == np.isfinite(drawn.values["breakeven_rate"])).all()
    finite = np.isfinite(crossings)
    assert told["breakeven_share"] == pytest.approx(finite.mean())
    np.testing.assert_allclose(drawn.values["breakeven_rate"][finite], crossings[finite], rtol=2e-3)


def test_predicted_intervals_hold_the_means_of_the_planted_server(asked):
    """The truth without noise, at loads and draft lengths that were not fitted."""
    deployment, _, config, _ = asked
    inside, widths = [], []
    for row in reference_rows(SERVER, (2.0, 6.0, 10.0, 14.0, 18.0), (3, 4, 5), 0.8, 0.0):
        load = Workload(**REFERENCE_LOAD, arrival_rate=row["arrival_rate"])
        config = deployment.configuration(float(row["draft_length"]), acceptance=ConstantAcceptance(0.8))
        told = draw_deployment(deployment, load, config).told()["metrics"]
        for metric in ("ttft", "itl"):
            inside.append(told[metric]["low"] <= row[f"{metric}_mean"] <= told[metric]["high"])
            widths.append(math.log(told[metric]["high"] / told[metric]["low"]))
    assert np.mean(inside) >= 0.85 and 0.02 < np.median(widths) < 0.2, (inside, widths)


def test_intervals_of_finite_runs_hold_what_few_requests_leave(asked):
    deployment = asked[0]
    known = deployment.uncertainty
    few, many = (misfit(known, is_open=True, ttft_share=0.2, requests=n)["itl"] for n in (10.0, np.inf))
    assert few > many
    closed = misfit(known, is_open=False, ttft_share=0.2)
    assert closed["effective_batch_size"] == 0.0 and closed["throughput"] == closed["e2e_latency"] > 0.0


def test_draws_that_are_nowhere_and_everywhere():
    assert spread([np.nan]) == {"low": None, "median": None, "high": None}
    assert spread([1.0, 2.0, np.inf, np.nan]) == {"low": 1.0, "median": 2.0, "high": None}


def test_intervals_without_a_fit_have_no_misfit(asked):
    _, workload, config, drawn = asked
    told = intervals(drawn.models, workload, config)
    assert told["includes"] == ["parameters"]
    low, median, high = np.quantile(drawn.values["ttft"], (0.05, 0.5, 0.95), method="nearest")
    assert told["metrics"]["ttft"] == {"low": low, "median": median, "high": high}


# --- what was measured ----------------------------------------------------------------------


def test_the_hull_is_that_of_the_rows_of_each_draft_length(tmp_path):
    rows = reference_rows(SERVER, (2.0, 6.0), (0, 2), 0.8, 0.0) + reference_rows(SERVER, (4.0, 8.0), (6,), 0.8, 0.0)
    measured = ranges(trace_of(rows, tmp_path / "rows.csv").frame)
    assert measured["draft_lengths"] == [0, 2, 6] and measured["arrival_rate"] == [2.0, 8.0]
    assert measured["by_draft_length"]["6"]["arrival_rate"] == [4.0, 8.0]
    assert measured["by_draft_length"]["0"]["concurrency"] is None and measured["concurrency"] is None

    def fields(draft_length, **load):
        return [(entry["field"], entry.get("at_draft_length")) for entry in outside(measured, draft_length, load)]

    assert fields(2, arrival_rate=6.0, prompt_length=300.0, output_length=120.0) == []
    assert fields(4, arrival_rate=5.0) == []  # between two that both hold it
    assert fields(4, arrival_rate=3.0) == [("arrival_rate", 6)]
    assert fields(0, arrival_rate=8.0) == [("arrival_rate", 0)]
    assert fields(6, arrival_rate=9.0, prompt_length=64.0) == [("arrival_rate", None), ("prompt_length", None)]
    assert fields(1, arrival_rate=2.0) == fields(8, arrival_rate=2.0) == [("draft_length", None)]
    assert fields(2, concurrency=4.0) == [("concurrency", None)]
    words = [in_words(entry) for k in (1, 8, 4) for entry in outside(measured, k, {"arrival_rate": 3.0})]
    assert words[0].endswith("below the shortest measured one, 2") and words[1].endswith("the longest measured one, 6")
    assert words[2] == "arrival_rate 3 is outside the range measured with draft_length 6, 4 to 8"
    older = {name: span for name, span in measured.items() if name != "by_draft_length"}
    assert outside(older, 0, {"arrival_rate": 8.0}) == []  # a model of an older version knows no more
    assert "by_draft_length" not in ranges(trace_of(rows, tmp_path / "rows.csv").frame, older)
    wider = ranges(trace_of(rows[:2], tmp_path / "more.csv").frame.assign(arrival_rate=20.0), measured)
    assert wider["by_draft_length"]["0"]["arrival_rate"] == [2.0, 20.0]
    assert wider["by_draft_length"]["6"] == measured["by_draft_length"]["6"]


def test_evaluated_rows_say_whether_they_were_measured(model, tmp_path):
    rows = reference_rows(SERVER, (4.0, 8.0, 12.0, 40.0), (0, 2, 4, 6, 8), 0.8, 0.0)
    answer = evaluate(model, trace_of(rows, tmp_path / "rows.csv"))
    told = answer["predictions"]
    assert len(told) == answer["rows"] == 20 and answer["outside_rows"] == 8
    for row, source in zip(told, rows, strict=True):
        assert row["arrival_rate"] == source["arrival_rate"] and row["draft_length"] == source["draft_length"]
        asked = {entry["field"] for entry in row["outside_measured"]}
        far = {"arrival_rate": source["arrival_rate"] > 20.0, "draft_length": source["draft_length"] > 6}
        assert asked == {name for name, beyond in far.items() if beyond}
        assert row["inside_measured"] == (not asked)
        edges = row["metrics"]["itl_mean"]
        assert edges["measured"] == pytest.approx(source["itl_mean"])
        assert row["saturated"] or edges["low"] < edges["predicted"] < edges["high"]
    assert (told[0]["source_row"], told[0]["concurrency"], told[0]["deployment"]) == (2, None, "reference")
    json.dumps(answer, allow_nan=False)
