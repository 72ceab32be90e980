"""What moves a metric: derivatives against differences and the simulator, Sobol' indices against closed forms."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, finite_difference, predict
from scipy.optimize import brentq
from scipy.special import ndtr
from test_cli_main import run, toy_deployment, toy_model
from test_compilations import compilations

from diffspec.acceptance import ConstantAcceptance, PositionAcceptance
from diffspec.analysis.answers import percentiles
from diffspec.analysis.bottleneck import explanation, halved, spider
from diffspec.analysis.explaining import explain
from diffspec.analysis.metrics import values_at
from diffspec.analysis.second_order import second_order
from diffspec.analysis.sensitivity import explained, find_slopes
from diffspec.analysis.sobol import sobol_indices
from diffspec.analysis.spread_of_metric import global_indices, linear_shares, overstated, unknown_of
from diffspec.configuration import Configuration
from diffspec.drafters import DraftCost
from diffspec.fitting.uncertainty import Uncertainty
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.simulating.requests import draw_requests
from diffspec.simulating.run import Engine, Lane, run_lanes
from diffspec.step_time import AffineStepTime
from diffspec.workload import Workload

STEP = AffineStepTime(
    verify_base=0.02, verify_sequence=2e-4, verify_query=4e-4, prefill_token=1e-4, draft=DraftCost(pass_base=1.5e-3)
)
"""A synthetic server's step: speculation wins while it is idle and loses when it is full."""
SERVING = ServingModel(STEP, request_overhead=0.01, waiting_states=0)
LOAD = Workload(64.0, 65.0, arrival_rate=5.0)
CONFIG = Configuration(draft_length=4.0, acceptance=ConstantAcceptance(0.7))


@pytest.fixture(scope="module")
def slopes():
    return find_slopes(SERVING, LOAD, CONFIG, "e2e_mean")


def e2e_at(found, values) -> float:
    """e2e of a model built by hand at input values."""
    by = dict(zip(found.inputs.names, map(float, values), strict=True))
    step = AffineStepTime(
        **{name: by[name] for name in ("verify_base", "verify_sequence", "verify_query", "verify_kv", "prefill_token")},
        draft=DraftCost(**{name.removeprefix("draft."): by[name] for name in by if name.startswith("draft.")}),
    )
    names = ("request_overhead", "prefill_interference", "first_token_steps", "closed_loop_sync", "sync_spread")
    serving = ServingModel(step, **{name: by[name] for name in names}, waiting_states=0)
    names = ("prompt_length", "output_length", "arrival_rate", "arrival_scv", "output_scv", "prefix_hit_rate")
    names_of_config = ("draft_length", "draft_probability", "verifier_scale", "drafter_scale")
    config = {name: by[name] for name in names_of_config}
    acceptance = ConstantAcceptance(by["acceptance_rate"])
    load = Workload(**{name: by[name] for name in names})
    return float(predict(serving, load, Configuration(acceptance=acceptance, **config)).e2e_latency)


def test_every_input_has_its_derivative(slopes):
    """Against differences of a model that is built by hand at each point; inputs at a bound are moved inwards."""
    assert_close(slopes.value, e2e_at(slopes, slopes.at), rtol=1e-12)
    inputs = dict(zip(slopes.inputs.names, slopes.inputs.kinds, strict=True))
    assert {inputs[name] for name in ("verify_query", "arrival_scv", "drafter_scale")} == {
        "parameter",
        "workload",
        "configuration",
    }
    assert {"acceptance_rate", "draft_length", "prefix_hit_rate", "output_scv"} <= set(inputs)
    for place, name in enumerate(slopes.inputs.names):
        at = slopes.at[place]
        scale = at if at > 0 else {"prefix_hit_rate": 1.0, "output_scv": 1.0}.get(name, 1e-5)
        inwards = -1.0 if name == "draft_probability" else 1.0  # a share of at most 1; the rest may grow
        weights = np.array([-25.0, 48.0, -36.0, 16.0, -3.0]) / 12.0
        step = 1e-3 * scale * inwards
        rows = np.tile(slopes.at, (5, 1))
        rows[:, place] += step * np.arange(5)
        numeric = float(weights @ [e2e_at(slopes, row) for row in rows]) / step
        assert_close(slopes.derivative[place], numeric, rtol=1e-6, atol=1e-7 * slopes.value / scale)


def test_an_input_at_zero_has_a_gradient_and_no_elasticity_to_speak_of(slopes):
    answer = explained(slopes, toy_deployment())
    rows = {row["name"]: row for row in answer["elasticities"]}
    assert rows["prefix_hit_rate"]["elasticity"] == 0.0 and rows["prefix_hit_rate"]["gradient"] < 0
    rate = rows["arrival_rate"]
    assert_close(rate["elasticity"], rate["gradient"] * rate["value"] / answer["value"], rtol=1e-12)


def test_one_program_serves_every_mean(slopes):
    with compilations() as compiled:
        for metric in ("capacity", "ttft_mean", "utilization"):
            find_slopes(SERVING, LOAD, CONFIG, metric)
    assert not compiled


@pytest.mark.slow
def test_percentiles_move_as_those_that_predict_tells():
    load = replace(LOAD, output_scv=0.5)
    config = replace(CONFIG, max_batch_size=12.0)
    found = find_slopes(SERVING, load, config, "e2e_p95")

    def told(shift):
        moved = replace(load, arrival_rate=5.0 * np.exp(shift[0]), output_scv=0.5 * np.exp(shift[1]))
        serving = replace(SERVING, step_time=replace(STEP, verify_base=0.02 * np.exp(shift[2])))
        answer = percentiles(serving, moved, config, predict(serving, moved, config))
        return np.log(answer["e2e"]["p95"])

    assert_close(np.log(found.value), told(np.zeros(3)), rtol=1e-9)
    numeric = finite_difference(lambda rows: [told(row) for row in rows], np.zeros(3), 5e-3)
    by_name = dict(zip(found.inputs.names, found.elasticities, strict=True))
    assert_close(by_name["arrival_rate"], numeric[0], rtol=1e-4)
    assert_close(by_name["verify_base"], numeric[2], rtol=1e-4)
    assert_close(by_name["output_scv"], numeric[1], rtol=0.03)  # a law of 99 bins, not its quantiles, is stretched


def test_the_breakeven_rate_moves_by_its_implicit_derivative():
    found = find_slopes(SERVING, LOAD, CONFIG, "breakeven_rate")
    assert "arrival_rate" not in found.inputs.names

    def gap(rate, base, alpha):
        serving = replace(SERVING, step_time=replace(STEP, verify_base=base))
        load, fast = replace(LOAD, arrival_rate=rate), replace(CONFIG, acceptance=ConstantAcceptance(alpha))
        arms = [predict(serving, load, config).e2e_latency for config in (fast, replace(fast, draft_length=0.0))]
        return float(jnp.log(arms[0] / arms[1]))

    def root(shift):
        return np.log(brentq(gap, 1.0, 14.0, args=(0.02 * np.exp(shift[0]), 0.7 * np.exp(shift[1])), xtol=1e-13))

    assert_close(found.value, np.exp(root(np.zeros(2))), rtol=1e-9)
    numeric = finite_difference(lambda rows: [root(row) for row in rows], np.zeros(2), 2e-3)
    by_name = dict(zip(found.inputs.names, found.elasticities, strict=True))
    assert_close([by_name["verify_base"], by_name["acceptance_rate"]], numeric, rtol=1e-6)
    easy = find_slopes(SERVING, LOAD, replace(CONFIG, acceptance=ConstantAcceptance(0.01)), "breakeven_rate")
    answer = explained(easy, toy_deployment())
    assert answer["value"] is None and all(row["elasticity"] is None for row in answer["elasticities"])
    assert any("breakeven_rate is no rate here" in line for line in answer["warnings"])


@pytest.mark.slow
def test_the_best_draft_length_moves_by_its_implicit_derivative():
    found = find_slopes(SERVING, LOAD, CONFIG, "best_draft_length")
    assert 1.0 < found.value < 16.0 and "draft_length" not in found.inputs.names

    def stationary(shift):
        serving = replace(SERVING, step_time=replace(STEP, verify_query=4e-4 * np.exp(shift[0])))
        load = replace(LOAD, arrival_rate=5.0 * np.exp(shift[1]))

        def slope(k, step=1e-3):
            ends = [predict(serving, load, replace(CONFIG, draft_length=k + s)).e2e_latency for s in (-step, step)]
            return float(ends[1] - ends[0])

        return np.log(brentq(slope, found.value - 0.3, found.value + 0.3, xtol=1e-12))

    assert_close(np.log(found.value), stationary(np.zeros(2)), rtol=1e-5)
    numeric = finite_difference(lambda rows: [stationary(row) for row in rows], np.zeros(2), 1e-2)
    by_name = dict(zip(found.inputs.names, found.elasticities, strict=True))
    assert_close([by_name["verify_query"], by_name["arrival_rate"]], numeric, rtol=1e-3)
    at_a_bound = found.moved(np.where(np.array(found.inputs.names) == "acceptance_rate", 0.05, found.at))
    assert np.isnan(at_a_bound.value) and not at_a_bound.moves


def test_second_order_is_the_second_difference(slopes):
    found = second_order(slopes)
    names, hessian = found["names"], np.array(found["hessian"])
    assert found["asymmetry"] < 1e-6
    step = 2e-3
    for first, second in (("arrival_rate", "verify_query"), ("prompt_length", "arrival_rate"), ("verify_base",) * 2):
        i, j = names.index(first), names.index(second)
        places = [slopes.inputs.names.index(name) for name in (first, second)]
        total = 0.0
        for a in (-1, 1):
            for b in (-1, 1):
                values = slopes.at.copy()
                values[places[0]] *= np.exp(a * step)
                values[places[1]] *= np.exp(b * step)
                total += a * b * np.log(e2e_at(slopes, values))
        assert_close(hessian[i, j], total / (4 * step**2), rtol=1e-4, atol=1e-5)
    sizes = [abs(row["value"]) for row in found["interactions"]]
    assert sizes == sorted(sizes, reverse=True) and all(row["first"] != row["second"] for row in found["interactions"])


def test_words_and_savings_are_those_of_the_halved_server(slopes):
    rows = halved(slopes)
    by_name = {row["name"]: row for row in rows}
    half = replace(SERVING, step_time=replace(STEP, verify_base=0.01))
    expected = float(predict(half, LOAD, CONFIG).e2e_latency)
    assert_close(by_name["verify_base"]["value"], expected, rtol=1e-12)
    told = explanation(slopes, rows)
    saved = f"{100 * (1 - expected / slopes.value):.0f} %"
    assert f"halving verify_base lowers e2e_mean by {saved}" in told
    parts = predict(SERVING, LOAD, CONFIG).decomposition
    most = max(float(part) for stage in parts.values() for part in (stage.load_dependent, stage.load_independent))
    assert told[0].startswith(f"at 5 req/s {100 * most / slopes.value:.0f} % of end-to-end latency")
    over = find_slopes(SERVING, replace(LOAD, arrival_rate=500.0), CONFIG, "e2e_mean")
    assert "saturated" in explanation(over, halved(over))[0]


def test_the_spider_is_the_metric_at_scaled_parameters(slopes):
    found = spider(slopes)
    (base,) = [line for line in found["lines"] if line["name"] == "verify_base"]
    assert found["factors"][0] == 0.5 and found["factors"][-1] == 2.0 and len(found["lines"]) == 6
    for factor, value in zip(found["factors"], base["values"], strict=True):
        scaled = replace(SERVING, step_time=replace(STEP, verify_base=0.02 * factor))
        prediction = predict(scaled, LOAD, CONFIG)
        assert (
            value is None
            if float(prediction.utilization) >= 1
            else value == pytest.approx(float(prediction.e2e_latency), rel=1e-12)
        )
    crowded = find_slopes(
        SERVING, replace(LOAD, arrival_rate=0.9 * float(slopes.prediction.capacity)), CONFIG, "e2e_mean"
    )
    assert any(line["values"][-1] is None for line in spider(crowded)["lines"]), "saturated, so no number"


def test_the_simulator_moves_as_the_elasticities_say(slopes):
    """Common random numbers: the same arrivals and acceptances on a server whose one cost is 10 % up or down."""
    requests = draw_requests(LOAD, 3000, np.random.default_rng(3))
    engine = Engine(draft_length=4, position_acceptance=(0.7,), request_overhead=0.01)
    lanes = [Lane(requests, engine, first_measured=100, end_measured=2900)]
    by_name = dict(zip(slopes.inputs.names, slopes.elasticities, strict=True))
    for name in ("verify_base", "verify_query"):
        means = []
        for factor in (1 / 1.1, 1.1):
            step = replace(STEP, **{name: getattr(STEP, name) * factor})
            means.append(np.mean([lane.e2e.mean() for lane in run_lanes(step, lanes)]))
        simulated = np.log(means[1] / means[0]) / (2 * np.log(1.1))
        assert by_name[name] == pytest.approx(simulated, rel=0.1), name


# --- Sobol' indices ----------------------------------------------------------------------


def test_indices_of_ishigami():
    """sin x1 + 7 sin^2 x2 + 0.1 x3^4 sin x1 on [-pi, pi]^3, whose indices are known (Ishigami and Homma 1990)."""

    def ishigami(normal):
        x = np.pi * (2.0 * ndtr(normal) - 1.0)
        return np.sin(x[:, 0]) + 7.0 * np.sin(x[:, 1]) ** 2 + 0.1 * x[:, 2] ** 4 * np.sin(x[:, 0])

    found = sobol_indices(ishigami, np.eye(3), 4096)
    variance = 7.0**2 / 8 + 0.1 * np.pi**4 / 5 + 0.01 * np.pi**8 / 18 + 0.5
    alone = 0.5 * (1 + 0.1 * np.pi**4 / 5) ** 2 / variance
    third = 8.0 * 0.01 * np.pi**8 / 225 / variance
    assert_close(found.deviation**2, variance, rtol=0.01)
    assert_close(found.first, [alone, 49.0 / 8 / variance, 0.0], rtol=0.0, atol=0.02)
    assert_close(found.total, [alone + third, 49.0 / 8 / variance, third], rtol=0.0, atol=0.02)
    assert np.all(found.total_edges[0] < found.total) and np.all(found.total < found.total_edges[1])


def test_indices_of_dependent_inputs():
    """Y = a'X of a normal X: first_i = Cov[Y, X_i]^2/(C_ii V), total_i = a_i^2/((C^-1)_ii V)."""
    slope = np.array([1.0, 2.0, -1.0])
    covariance = np.array([[1.0, 0.6, 0.0], [0.6, 2.0, -0.5], [0.0, -0.5, 0.5]])
    found = sobol_indices(lambda x: x @ slope, covariance, 2048)
    along = covariance @ slope
    variance = slope @ along
    assert_close(found.first, along**2 / np.diag(covariance) / variance, rtol=0.0, atol=0.02)
    assert_close(found.total, slope**2 / np.diag(np.linalg.inv(covariance)) / variance, rtol=0.0, atol=0.02)
    nothing = sobol_indices(lambda x: np.full(len(x), 3.0), covariance, 64)
    assert nothing.deviation == 0.0 and not nothing.first.any() and not nothing.total.any()


def uncertain(widths: dict[str, float], draws: np.ndarray | None = None, correlation: float = 0.0) -> Uncertainty:
    scale = np.array(list(widths.values()))
    covariance = np.outer(scale, scale) * np.where(np.eye(len(scale)) > 0, 1.0, correlation)
    zero = dict.fromkeys(("e2e_mean",), 0.0)
    return Uncertainty("laplace", tuple(widths), covariance, np.ones(len(scale)), zero, zero, 10.0, {}, draws)


def test_small_uncertainty_is_linear(slopes):
    """Of small normal deviations: shares g_i^2 C_ii/V, which Sobol' indices agree with, and V that of the draws."""
    widths = {"step_time.verify_base": 0.01, "step_time.verify_query": 0.03}
    deployment = replace(toy_deployment(), serving=SERVING, uncertainty=uncertain(widths))
    unknown = unknown_of(slopes, deployment)
    found = global_indices(unknown, 256)
    by_name = dict(zip(slopes.inputs.names, slopes.elasticities, strict=True))
    parts = np.array([(by_name[path.removeprefix("step_time.")] * width) ** 2 for path, width in widths.items()])
    shares = dict(zip(("verify_base", "verify_query"), parts / parts.sum(), strict=True))
    assert_close(found["deviation"], parts.sum() ** 0.5, rtol=0.02)
    assert_close(found["linear"]["deviation"], parts.sum() ** 0.5, rtol=0.1)  # of 64 draws
    assert_close(found["linear"]["deviation_of_draws"], found["linear"]["deviation"], rtol=0.02)
    for row in found["indices"]:
        assert_close([row["first"], row["total"]], shares[row["name"]], rtol=0.0, atol=0.03)
    told = {row["name"]: row for row in found["linear"]["shares"]}
    assert_close(sum(row["share"] for row in told.values()), 1.0, rtol=1e-9)
    assert told["verify_base"]["alone"] == pytest.approx(shares["verify_base"], abs=0.1)
    assert overstated(found["deviation"], found["linear"]["deviation_of_draws"], "x") == []


def test_parameters_known_only_together_are_told_as_such(slopes):
    """A ridge verify_base*verify_query = const in the draws: the linear terms cancel in part."""
    along = np.linspace(-0.5, 0.5, 64)
    draws = np.stack([along, -along], axis=1)
    names = ("step_time.verify_base", "step_time.verify_query")
    deployment = replace(toy_deployment(), serving=SERVING, uncertainty=uncertain(dict.fromkeys(names, 0.3), draws))
    told = linear_shares(unknown_of(slopes, deployment))
    assert sum(row["alone"] for row in told["shares"]) > 1.5 and min(row["share"] for row in told["shares"]) < 0
    direct = []
    for d in along:
        step = replace(STEP, verify_base=0.02 * np.exp(d), verify_query=4e-4 * np.exp(-d))
        direct.append(np.log(float(predict(replace(SERVING, step_time=step), LOAD, CONFIG).e2e_latency)))
    assert_close(told["deviation_of_draws"], np.std(direct), rtol=1e-9)


def test_a_span_is_a_lognormal_field(slopes):
    deployment = replace(toy_deployment(), serving=SERVING)
    unknown = unknown_of(slopes, deployment, {"arrival_rate": 2.0})
    found = global_indices(unknown, 64)
    slope = dict(zip(slopes.inputs.names, slopes.elasticities, strict=True))["arrival_rate"]
    assert_close(found["deviation"], slope * np.log(1.02) / 1.6448536, rtol=0.05)
    assert found["indices"][0]["total"] == pytest.approx(1.0, abs=0.05) and found["saturated_share"] == 0.0
    wide = unknown.values(np.array([[-1.6448536 * np.log(1.02) / 1.6448536]]))
    assert_close(wide[0, slopes.inputs.names.index("arrival_rate")], 5.0 / 1.02, rtol=1e-6)
    for spans, said in (
        ({"joy": 5.0}, "span: got 'joy'"),
        ({"arrival_rate": -1.0}, r"allowed: \(0, 1000\]"),
        ({"prefix_hit_rate": 5.0}, "got a field at 0"),
        ({}, "does not tell how sure"),
    ):
        with pytest.raises(InputError, match=said):
            unknown_of(slopes, deployment, spans)
    with pytest.raises(InputError, match="a power of two"):
        global_indices(unknown, 100)


def test_metrics_that_are_not_there_are_refused():
    closed = Workload(64.0, 65.0, concurrency=4.0)
    for load, config, metric, said in (
        (LOAD, CONFIG, "joy", "metric: got 'joy'; allowed: ttft_mean"),
        (closed, CONFIG, "ttft_p95", "allowed: percentiles in a steady open loop"),
        (LOAD, Configuration(), "breakeven_rate", "without speculation"),
        (LOAD, Configuration(), "best_draft_length", "without speculation"),
    ):
        with pytest.raises(InputError, match=said):
            find_slopes(SERVING, load, config, metric)
    with pytest.raises(InputError, match="allowed: with --global"):
        explain(toy_deployment(), LOAD, CONFIG, spans={"arrival_rate": 5.0})


def test_acceptance_by_position_moves_as_a_whole(slopes):
    config = replace(CONFIG, acceptance=PositionAcceptance(jnp.array([0.8, 0.7, 0.6])))
    found = find_slopes(SERVING, LOAD, config, "e2e_mean")
    place = found.inputs.names.index("acceptance_rate")
    assert_close(found.at[place], 0.8, rtol=1e-12)
    assert_close(found.inputs.allowed(found.point)[1][place], 1.0, rtol=1e-12)

    def at(shift):
        moved = PositionAcceptance(jnp.array([0.8, 0.7, 0.6]) * np.exp(shift))
        return float(jnp.log(predict(SERVING, LOAD, replace(CONFIG, acceptance=moved)).e2e_latency))

    numeric = finite_difference(lambda rows: [at(row[0]) for row in rows], np.zeros(1), 1e-3)
    assert_close(found.elasticities[place], numeric[0], rtol=1e-7)
    values, used = values_at(found.metric, found.inputs, found.point, found.at[None])
    assert_close([values[0], used[0]], [found.value, float(found.prediction.utilization)], rtol=1e-12)


def test_intervals_are_those_of_every_draw(slopes):
    """Value, elasticity, gradient and saving of each of 64 servers that are built and moved by hand."""
    along = np.linspace(-0.4, 0.4, 64)
    names = ("step_time.verify_base", "step_time.verify_query")
    known = uncertain(dict.fromkeys(names, 0.3), np.stack([along, 0.5 * along**2], axis=1))
    deployment = replace(toy_deployment(), serving=SERVING, uncertainty=known)
    shares = []
    answer = explain(
        deployment, LOAD, CONFIG, indices=True, points=8, progress=lambda label, share: shares.append((label, share))
    )

    def at(base, query):
        return float(
            predict(
                replace(SERVING, step_time=replace(STEP, verify_base=base, verify_query=query)), LOAD, CONFIG
            ).e2e_latency
        )

    base, query = 0.02 * np.exp(along), 4e-4 * np.exp(0.5 * along**2)
    value = np.array([at(b, q) for b, q in zip(base, query, strict=True)])
    step = 1e-4
    moved = np.array([[at(b * np.exp(s), q) for s in (-step, step)] for b, q in zip(base, query, strict=True)])
    slope = np.log(moved[:, 1] / moved[:, 0]) / (2 * step)
    told = {"value": value, "elasticities": slope, "gradients": slope * value / base}
    saved = np.array([at(b / 2, q) for b, q in zip(base, query, strict=True)]) / value - 1.0
    edges = {name: np.quantile(values, (0.05, 0.5, 0.95), method="nearest") for name, values in told.items()}
    found = answer["intervals"]
    assert found["draws"] == 64 and found["level"] == 0.9
    assert_close(list(found["value"].values()), edges["value"], rtol=1e-9)
    for of in ("elasticities", "gradients"):
        assert_close(list(found[of]["verify_base"].values()), edges[of], rtol=1e-6)
        assert set(found[of]) == {row["name"] for row in answer["elasticities"]}
    (row,) = [row for row in answer["halved"] if row["name"] == "verify_base"]
    assert_close(list(row["interval"].values()), np.quantile(saved, (0.05, 0.5, 0.95), method="nearest"), rtol=1e-9)
    low, high = sorted(f"{100 * abs(row['interval'][end]):.0f} %" for end in ("low", "high"))
    assert any(line.endswith(f"({low} to {high} over the draws)") for line in answer["explanation"])
    assert [share for label, share in shares if label == "Sobol' indices"][-1] == 1.0
    assert [share for label, share in shares if label == "intervals"] == [(n + 1) / 64 for n in range(64)]


def test_a_draw_that_saturates_has_no_latency_and_a_capacity(slopes):
    names = ("step_time.verify_query",)
    known = uncertain({names[0]: 1.0}, np.linspace(-1.0, 3.0, 64)[:, None])
    deployment = replace(toy_deployment(), serving=SERVING, uncertainty=known)
    value = explained(slopes, deployment)["intervals"]["value"]
    assert value["low"] is not None and value["high"] is None
    capacity = explained(find_slopes(SERVING, LOAD, CONFIG, "capacity"), deployment)
    assert 0 < capacity["intervals"]["value"]["low"] < 5.0 < capacity["intervals"]["value"]["high"]
    over = explained(find_slopes(SERVING, replace(LOAD, arrival_rate=500.0), CONFIG, "capacity"), deployment)
    assert over["outcome"] == "saturated" and over["value"] == pytest.approx(capacity["value"], rel=1e-9)


# --- the command ----------------------------------------------------------------------


def test_the_command_tells_what_it_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSPEC_CACHE_DIR", "")
    widths = {"step_time.verify_base": 0.1, "step_time.prefill_token": 0.1}
    deployment = replace(toy_deployment(), uncertainty=uncertain(widths))
    model = toy_model(tmp_path / "m.json", deployment)
    base = ("sensitivity", model, "--arrival-rate", "2", "--draft-length", "2")
    asked = ("--explain", "--second-order", "--global", "--span", "output_length=20", "--points", "16")
    files = ("--plot", tmp_path / "a.svg", "--plot-spider", tmp_path / "b.png", "--out", tmp_path / "o.json")
    ran = run(*base, *asked, *files, "--json")
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    assert json.loads((tmp_path / "o.json").read_text(encoding="utf-8")) == answer
    extra = {"explanation", "halved", "uncertainty", "second_order", "global", "spider"}
    plain = json.loads(run(*base, "--json").out)
    assert set(answer) == set(plain) | extra and not extra & set(plain)
    assert {row["name"] for row in answer["global"]["indices"]} == {"verify_base", "prefill_token", "output_length"}
    assert answer["global"]["evaluations"] == 16 * 7
    assert (tmp_path / "a.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    shown = run(*base, *asked)
    assert shown.code == 0
    for said in (
        "second order",
        ", 90% of draws ",
        "Sobol' indices over 16 points",
        "told by draws",
        *answer["explanation"],
    ):
        assert said in shown.out
    wrong = run(*base, "--global", "--span", "output_length")
    assert wrong.code == 2 and "allowed: FIELD=PERCENT" in wrong.err
    wrong = run(*base, "--span", "output_length=20")
    assert wrong.code == 2 and "allowed: with --global" in wrong.err
