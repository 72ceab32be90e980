"""Pooling: siblings' knowledge becomes a prior, by an exact small case and by servers whose truth is known."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import assert_close
from test_cli_main import run, toy_deployment, toy_model
from test_fit import SERVER, reference_rows, trace_of

from diffspec.fitting.evaluate import evaluate
from diffspec.fitting.fit import fit
from diffspec.fitting.forms import Scales, build_form
from diffspec.fitting.pooling import KEY, SHARE, Siblings, common_prior, fit_in_turn, informed, siblings_of
from diffspec.fitting.uncertainty import Uncertainty
from diffspec.parameters import get_parameters
from diffspec.results import InputError

HEAVY = dataclasses.replace(SERVER, pass_base=0.004, weight_read=0.004, token_compute=1.2e-4)
"""Servers whose draft passes cost half of a step: no trace of one draft length can tell that."""


def varied(seed: int, deviation: float = 0.15):
    """A sibling of HEAVY: every cost differs by a factor of its own."""
    random = np.random.default_rng(seed)
    names = ("weight_read", "token_compute", "kv_read", "step_overhead", "pass_base", "prefill_token")
    factors = {name: float(np.exp(deviation * random.normal())) for name in (*names, "request_overhead")}
    return dataclasses.replace(HEAVY, **{name: getattr(HEAVY, name) * by for name, by in factors.items()})


def rows_of(server, name, rates, lengths, noise, seed, **facts):
    facts = {"deployment": name, "hardware": "h100", "verifier": "v"} | facts
    return [row | facts for row in reference_rows(server, rates, lengths, 0.8, noise, seed)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pooling")


@pytest.fixture(scope="module")
def siblings(folder):
    rows = []
    for seed in range(3):
        rows += rows_of(varied(seed), f"old{seed}", (0.5, 1.0, 2.0, 4.0, 6.0), (0, 2, 4, 6), 0.02, seed)
    model = fit(trace_of(rows, folder / "old.csv"), step_time="roofline", uncertainty="laplace")
    (folder / "old.json").write_text(model.to_json(), encoding="utf-8")
    return model


@pytest.mark.slow
def test_five_rows_and_their_siblings_beat_five_rows(siblings, folder):
    """Held out: other rates and draft lengths 0, 1 and 5, where five rows of draft length 3 know nothing."""
    new = varied(11)
    few = trace_of(rows_of(new, "new", (0.5, 1.0, 1.5, 2.0, 3.0), (3,), 0.02, 9), folder / "few.csv")
    unseen = trace_of(rows_of(new, "new", (1.0, 4.0, 5.0), (0, 1, 5), 0.0, 0), folder / "unseen.csv")
    alone = fit(few, step_time="roofline", uncertainty="laplace")
    pooled = fit(few, step_time="roofline", uncertainty="laplace", prior=siblings)
    assert pooled.deployment().quality[KEY] == {"by": "all", "deployments": ["old0", "old1", "old2"], "rows": 60}
    assert KEY not in alone.deployment().quality
    for column in ("ttft_mean", "itl_mean"):
        errors = [evaluate(model, unseen)["metrics"][column]["mape"] for model in (alone, pooled)]
        assert errors[1] < 0.05 and errors[1] < 0.4 * errors[0], (column, errors)
    again = evaluate(pooled, few)["metrics"]
    assert again["itl_mean"]["mape"] < 0.03  # the rows themselves are still met


def test_a_pool_fits_what_was_too_few_and_scales_siblings_of_another_size(siblings, folder):
    """Two rows of a server on other hardware, everything three times as slow: as they are, its siblings mislead."""
    slow = varied(0)
    times = [field.name for field in dataclasses.fields(slow) if field.name not in ("sharpness", "first_token_steps")]
    slow = dataclasses.replace(slow, **{name: 3.0 * getattr(slow, name) for name in times})
    few = rows_of(slow, "slow", (0.2, 0.6), (2,), 0.0, 0, hardware="a10")
    unseen = trace_of(rows_of(slow, "slow", (0.3, 1.0), (0, 4), 0.0, 0, hardware="a10"), folder / "unseen.csv")
    model = fit(trace_of(few, folder / "slow.csv"), step_time="roofline", uncertainty="laplace", prior=siblings)
    assert evaluate(model, unseen)["metrics"]["itl_mean"]["mape"] < 0.15
    with pytest.raises(InputError, match="got 2 usable rows; allowed: at least 4"):
        fit(trace_of(few, folder / "slow.csv"), step_time="roofline")


def test_the_common_prior_is_the_closed_form_where_there_is_one():
    """Known siblings, one coordinate: with tau fixed by its own equation, mu is their mean shrunk to the weak prior."""
    means, spread = np.array([[0.1], [0.5], [0.6]]), np.ones(1)
    mu, deviation = common_prior(means, np.full((3, 1, 1), 1e12), np.zeros(1), spread)
    between = (2.0 * SHARE**2 + np.sum((means - mu) ** 2)) / 5.0
    assert_close(mu[0], means.sum() / between / (1.0 + 3.0 / between), rtol=1e-5)
    assert_close(deviation[0] ** 2, between + 1.0 / (1.0 + 3.0 / between), rtol=1e-5)


def test_what_no_sibling_can_tell_stays_where_it_was():
    means, precisions = np.array([[1.0, 7.0], [1.0, -7.0]]), np.tile(np.diag([1e9, 0.0]), (2, 1, 1))
    mu, deviation = common_prior(means, precisions, np.zeros(2), np.array([1.0, 2.0]))
    assert_close(mu[1], 0.0, rtol=0, atol=1e-9)
    assert deviation[1] >= 2.0 and deviation[0] < 0.3 and mu[0] > 0.9


def known(name, precision=100.0, **changes):
    """A toy deployment that is equally sure of every parameter."""
    deployment = toy_deployment(name)
    form = build_form("affine", Scales(0.02, 0.08, 96.0, 64.0))
    prior = np.asarray(form.spread)
    covariance = np.diag(1.0 / (prior**-2.0 + precision))
    sure = Uncertainty("laplace", form.paths, covariance, prior, {}, {}, 4.0, {})
    return dataclasses.replace(deployment, uncertainty=sure, **changes)


def test_siblings_share_a_column_and_a_form(folder):
    few = trace_of(rows_of(HEAVY, "new", (1.0,), (0,), 0.0, 0), folder / "one.csv").frame
    others = [known("a", defaults={"hardware": "h100"}), known("b", defaults={"hardware": "a10"}), toy_deployment("c")]
    found = siblings_of(few, others, "hardware", "auto")
    assert found is not None and [sibling.name for sibling in found.deployments] == ["a"]
    found = siblings_of(few, others, "all", "auto")
    assert found is not None and [sibling.name for sibling in found.deployments] == ["a", "b"]
    assert siblings_of(few, others, "all", "roofline") is None and siblings_of(few, others, "engine", "auto") is None


def test_siblings_of_another_form_or_size_move_the_prior_as_they_should(folder):
    few = trace_of(rows_of(HEAVY, "new", (1.0, 2.0), (0,), 0.0, 0), folder / "two.csv").frame
    form = build_form("affine", Scales(0.5, 0.5, 96.0, 64.0))
    alike = known("a", 1e6, defaults={"hardware": "h100", "verifier": "v"})
    informed_by = informed(form, Siblings("all", (alike,)), few)
    base = "step_time.verify_base"
    told, started = (get_parameters(part)[base] for part in (informed_by.template, form.template))
    assert float(started) == 0.35 and 0.014 < float(told) < 0.02  # the sibling's is 0.014, as it is
    assert np.all(np.asarray(informed_by.spread) <= np.asarray(form.spread))
    other = dataclasses.replace(alike, defaults={"hardware": "a10", "verifier": "v"})
    scaled = float(get_parameters(informed(form, Siblings("all", (other,)), few).template)[base])
    assert scaled != pytest.approx(float(told), rel=0.05)


def test_those_with_enough_rows_are_fitted_once_and_those_with_few_again(folder):
    rows = rows_of(HEAVY, "many", (1.0, 2.0, 3.0, 4.0), (0, 2, 4, 6), 0.0, 0)
    rows += rows_of(HEAVY, "some", (1.0, 2.0, 3.0, 4.0, 5.0), (0,), 0.0, 0) + rows_of(
        HEAVY, "two", (1.0, 2.0), (0,), 0, 0
    )
    groups = list(trace_of(rows, folder / "groups.csv").frame.groupby("deployment", sort=False))
    usable, asked = {name: len(frame) for name, frame in groups}, []

    def fit_one(name, frame, siblings):
        asked.append((name, None if siblings is None else [sibling.name for sibling in siblings.deployments]))
        return known(name, defaults={"hardware": "h100"})

    fitted, left_out = fit_in_turn(groups, usable, fit_one, 4, "auto", pool="hardware")
    assert [deployment.name for deployment in fitted] == ["many", "some", "two"] and left_out == []
    assert asked == [("many", None), ("some", None), ("some", ["many"]), ("two", ["many", "some"])]
    asked.clear()
    fitted, left_out = fit_in_turn(groups, usable, fit_one, 4, "auto")
    assert asked == [("many", None), ("some", None)] and left_out == ["two"]
    with pytest.raises(InputError, match="pool: got 'engine', but no row names its engine"):
        fit_in_turn(groups, usable, fit_one, 4, "auto", pool="engine")
    with pytest.raises(InputError, match="pool: got 'colour'; allowed: hardware, verifier, engine, all"):
        fit_in_turn(groups, usable, fit_one, 4, "auto", pool="colour")


def test_a_prior_from_the_command_line(siblings, folder, tmp_path):
    few = trace_of(rows_of(varied(12), "new", (0.5, 1.0, 2.0), (3,), 0.02, 1), tmp_path / "few.csv")
    base = ("fit", tmp_path / "few.csv", "--out", tmp_path / "m.json", "--no-plot", "--json")
    ran = run(*base, "--prior", folder / "old.json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["deployments"][0]["quality"][KEY]["rows"] == 60
    ran = run(*base, "--prior", folder / "old.json", "--step-time", "affine")
    assert ran.code == 2 and "none of its deployments" in ran.err and "--step-time affine" in ran.err
    ran = run(*base, "--prior", toy_model(tmp_path / "toy.json"))
    assert ran.code == 2 and "can tell of 'new'" in ran.err
    same = dataclasses.replace(siblings, rows_sha256=few.digest())
    with pytest.raises(InputError, match="fitted to these same rows"):
        fit(few, prior=same)
