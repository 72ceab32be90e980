"""Experiment 06: the pooling of held-out intervals, and that its table is that of experiment 01's folds."""

import json

import pytest
from helpers import EXPERIMENTS, experiment


@pytest.fixture(scope="module")
def coverage():
    return experiment("06_fit", "interval_coverage")


def fold(coverage, number, rows, inside, width=0.5):
    return coverage.Held("table", "split", number, "e2e_mean", rows, inside, width, 2 * width)


def test_values_are_pooled_and_folds_resampled(coverage):
    found = coverage.pooled([fold(coverage, 0, 30, 30, 0.2), fold(coverage, 1, 10, 0, 1.0)])
    assert (found["values"], found["folds"], found["coverage"]) == (40, 2, 0.75)
    assert found["width"] == pytest.approx(0.4) and found["score"] == pytest.approx(0.8)
    assert (found["low"], found["high"]) == (0.0, 1.0)  # a quarter of the resamples have one fold twice, each
    alike = coverage.pooled([fold(coverage, number, 10, 9) for number in range(50)])
    assert alike["low"] == alike["high"] == pytest.approx(0.9)


def test_observables_of_one_fold_stand_together(coverage):
    held = [fold(coverage, 0, 10, 10), fold(coverage, 0, 10, 0)._replace(observable="ttft_mean")]
    assert coverage.pooled(held)["folds"] == 1


def test_rows_set_aside_and_in_sample_folds_are_left_out(coverage):
    told = {"e2e_mean": {"rows": 3, "coverage": 1.0, "interval_width": 0.1, "interval_score": 0.1}}
    entry = {"split": "load", "folds": [{"held_out": "a", "scores": {"roofline": told}}]}
    studies = {"one": [entry, entry | {"split": "in sample"}], "one, with rows set aside": [entry]}
    assert [(each.table, each.split, each.rows) for each in coverage.held_out(studies)] == [("one", "load", 3)]


def test_the_table_is_that_of_the_folds(coverage):
    results = coverage.study(json.loads(coverage.FOLDS.read_text(encoding="utf-8"))["studies"])
    assert results["all"]["values"] >= 300
    assert (EXPERIMENTS / "06_fit" / "interval_coverage.md").read_text(encoding="utf-8") == coverage.report(results)
