"""Experiment 07, regret of the policy: its table is that of its results, and its rivals are what they are called."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import experiment

from diffspec.acceptance import ConstantAcceptance
from diffspec.simulating import draw_arrivals

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "07_optimise"


@pytest.fixture(scope="module")
def regret():
    return experiment("07_optimise", "policy_regret")


@pytest.mark.parametrize("name", ["policy_regret", "policy_regret_held_out"])
def test_the_table_is_that_of_the_results(regret, name):
    results = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert (FOLDER / f"{name}.md").read_text(encoding="utf-8") == regret.report(results)
    assert results["held_out"] == name.endswith("held_out")
    for entry in results["contests"]:
        assert all(told["mean_e2e"]["half_width"] >= 0 for told in entry["regret"].values())


def test_the_interval_is_students(regret):
    told = regret.interval(np.array([1.0, 2.0, 3.0, 4.0]))
    assert told["mean"] == 2.5 and told["half_width"] == pytest.approx(3.182446 * np.sqrt(5 / 3) / 2, rel=1e-6)


def test_nothing_that_is_held_out_was_looked_at(regret):
    assert not set(regret.DRAWS) & set(regret.HELD_OUT_DRAWS)
    seen, held_out = (
        {(entry["model"], entry["load"]) for entry in json.loads((FOLDER / f"{name}.json").read_text())["contests"]}
        for name in ("policy_regret", "policy_regret_held_out")
    )
    assert not {model for model, _ in seen} & {model for model, _ in held_out}
    assert not {load for _, load in seen if "azure" not in load} & {load for _, load in held_out}


@pytest.mark.parametrize("name", ["ramp", "bursts", "saw", "on-off", "peaks"])
def test_loads_are_shapes_in_time(regret, name):
    """Times never fall, shares are of the capacity, and requests arrive as the shape says."""
    shape = np.asarray(regret.shape_of(name, np.random.default_rng(1)))
    times, shares = shape.T
    assert times[0] == 0 and np.all(np.diff(times) >= 0) and np.all((shares > 0) & (shares <= 1.2))
    expected = 500.0 * np.trapezoid(shares, times)
    drawn = draw_arrivals([(time, 500.0 * share) for time, share in shape.tolist()], np.random.default_rng(2))
    assert len(drawn) == pytest.approx(expected, abs=5 * np.sqrt(expected))


def test_sglang_comes_to_rest_where_its_rule_says(regret):
    """At 0.8 a draft of 3 has 1.95 accepted: no reason to leave 3 of [1, 3, 5, 7] or of [0, 1, 3]."""
    case = SimpleNamespace(batches=80, acceptance=ConstantAcceptance(0.8))
    found = regret.sglang_lengths(case)
    assert found[[0, 6, 7, 30, 31, 62, 63, 79]].tolist() == [3, 3, 3, 3, 1, 1, 0, 0]
    assert regret.lengths_of(regret.VLLM_LIKE, 130)[[0, 16, 32, 64, 128]].tolist() == [5, 4, 3, 1, 0]
