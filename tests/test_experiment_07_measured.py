"""Experiment 07, measured policy: its table is that of its results, these are those of data/, its rules are told."""

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import experiment

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "experiments" / "07_optimise"


@pytest.fixture(scope="module")
def measured():
    return experiment("07_optimise", "measured_policy")


@pytest.fixture(scope="module")
def results():
    return json.loads((FOLDER / "measured_policy.json").read_text(encoding="utf-8"))


def test_the_table_is_that_of_the_results(measured, results):
    assert (FOLDER / "measured_policy.md").read_text(encoding="utf-8") == measured.report(results)
    assert results["summary"] == measured.summary(results["arms"])
    assert [(arm["table"], arm["deployment"], arm["arm"]) for arm in results["arms"]] == [
        arm[:3] for arm in measured.ARMS
    ]


def test_the_latencies_are_those_of_data(measured, results):
    """Every measured number is in the table it is said to be from, and regrets are ratios of them."""
    for arm in results["arms"]:
        with (REPOSITORY / "data" / f"{arm['table']}.csv").open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["deployment"] == arm["deployment"]]
        known = {(int(float(row["draft_length"])), float(row["e2e_mean"])) for row in rows}
        for entry in arm["cells"]:
            latency = {int(k): value for k, value in entry["measured"].items()}
            assert len(latency) > 1 and min(latency, key=lambda k: latency[k]) == entry["best"]
            for k, value in latency.items():  # the geometric mean of repeats lies between them
                near = [e2e for length, e2e in known if length == k and abs(np.log(e2e / value)) < 0.25]
                assert near and min(near) * (1 - 1e-9) <= value <= max(near) * (1 + 1e-9)
            for rule, k in entry["taken"].items():
                regret = entry["regret"][rule]
                assert (regret is None) == (k is None)
                assert k is None or regret == pytest.approx(latency[k] / latency[entry["best"]] - 1.0, abs=1e-12)
            assert entry["taken"]["always 0"] == 0


def test_rules_by_hand(measured):
    assert [measured.nearest(3, lengths) for lengths in ([0, 2, 4], [0, 4], [0, 1, 6], [2])] == [4, 4, 1, 2]
    row = {"prompt_length": 64.0, "output_length": 64.0, "arrival_process": "poisson", "max_batch_size": 64.0}
    rows = [
        row | {"arrival_rate": rate, "concurrency": None, "draft_length": k, "e2e_mean": e2e, "run": f"{k}{rate}{tail}"}
        for rate, k, e2e, tail in (
            (1.0, 0, 2.0, ""),
            (1.0, 4, 1.0, ""),
            (4.0, 0, 2.0, ""),
            (4.0, 4, 2.5, ""),
            (4.0, 4, 2.5 * 1.2**2, "_rep2"),
            (5.0, 0, 9.0, ""),
        )
    ]
    frame = pd.DataFrame(rows)
    cells = measured.cells_of(frame)
    assert len(cells) == 2, "a load with one draft length decides nothing"
    first, second = cells
    assert measured.log_measured(cells[second])[4] == pytest.approx(np.log(3.0))
    assert (measured.nearest_load(first, cells), measured.nearest_load(second, cells)) == (0, 4)
    noise = measured.repeat_noise(frame)
    assert noise == {"open": pytest.approx(np.sqrt(2) * np.log(1.2))}, "of two values: their distance over sqrt(2)"
