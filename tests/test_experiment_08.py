"""Experiment 08, claims about where speculation pays: its table is that of its results, and its numbers are what they
are called."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import EXPERIMENTS, experiment
from scipy.optimize import brentq

FOLDER = EXPERIMENTS / "08_boundaries"
VERDICTS = ("holds", "in part", "fails", "not a law")


@pytest.fixture(scope="module")
def claims():
    return experiment("08_boundaries", "claims")


@pytest.fixture(scope="module")
def results():
    return json.loads((FOLDER / "claims.json").read_text(encoding="utf-8"))


def test_the_table_is_that_of_the_results(claims, results):
    assert (FOLDER / "claims.md").read_text(encoding="utf-8") == claims.report(results)
    assert list(results) == list(claims.CLAIMS)
    for entry in results.values():
        assert entry["verdict"].startswith(VERDICTS) and entry["data"]
        assert any(letter.isdigit() for letter in entry["holds"] + entry["fails"]), "a claim without a number"


def test_a_claim_without_a_map_is_found_again(claims, results):
    found = claims.longer_drafts()
    assert found["holds"] == results["longer_drafts"]["holds"] and found["fails"] == results["longer_drafts"]["fails"]


def test_a_reduced_grid_finds_the_same_break_evens(claims, results):
    """Roots do not depend on the grid that brackets them."""
    found = claims.acceptance(claims.Grid(points=3, batches=(1.0, 64.0)))["data"]
    told = results["acceptance"]["data"]["first_principles_break_even_by_concurrency"]
    for name, edges in found["first_principles_break_even_by_concurrency"].items():
        assert set(edges) == {"1", "64"}
        for load, edge in edges.items():
            assert edge == pytest.approx(told[name][load], rel=1e-7)


def test_cells_are_the_measured_step_times(claims):
    table = EXPERIMENTS / "03_measure_gpu" / "results" / "part1_step_cost.csv"
    with table.open(newline="") as file:
        times = {
            (row["model"], row["batch"], row["tokens_per_request"], row["context"]): float(row["step_time_s"])
            for row in csv.DictReader(file)
        }
    found = {(cell["drafter"], cell["batch"], cell["context"]): cell for cell in claims.cells()}
    assert len(found) == 51
    cell = found["draft-1b", 64, 8192]
    verify, one, plain = (
        times[key]
        for key in (("dense-8b", "64", "4", "8192"), ("draft-1b", "64", "1", "8192"), ("dense-8b", "64", "1", "8192"))
    )
    assert cell["cost"][3] == pytest.approx((verify + 3 * one) / plain, rel=1e-12)
    gain, length = claims.cell_gain(cell, 0.8, (3,))
    assert length == 3 and gain == pytest.approx((1 + 0.8 + 0.64 + 0.512) * plain / (verify + 3 * one), rel=1e-12)


def test_break_even_acceptance_of_every_cell(claims):
    """The least over draft lengths of the root of 1 + a + ... + a^k = cost, by numpy's polynomial roots."""
    for cell in claims.cells():
        roots = []
        for k, cost in cell["cost"].items():
            found = np.roots([*[1.0] * k, 1.0 - cost])
            real = found[np.abs(found.imag) < 1e-9].real
            roots += [root for root in real if 0 <= root <= 1]
        assert claims.cell_break_even(cell) == pytest.approx(min(roots, default=1.0), abs=1e-8)


def test_the_verdicts_follow_from_the_numbers(results):
    data = {name: entry["data"] for name, entry in results.items()}
    assert data["acceptance"]["share_gaining_at_07"] > 0.9 and data["acceptance"]["share_losing_at_04"] < 0.5
    served = data["acceptance"]["served"]["speedup"]
    assert served["c1"] > 1 > served["c8"], "load decides on both sides of 1 at one acceptance"
    decoding = data["context"]["decoding_before_any_trace"]
    assert decoding["8B + 1B, window of 512, batch 64"]["65536"] > decoding["8B + 1B, window of 512, batch 64"]["1024"]
    whole = data["context"]["end_to_end_before_any_trace_at_512_and_64k"]["8B + 1B"]
    assert all(last < first for first, last in whole.values()), "prompts dilute the gain end to end"
    equal = list(data["drafter_size"]["gain_at_equal_acceptance"].values())
    assert equal == sorted(equal), "at equal acceptance the smaller drafter gains more"
    moves = data["draft_length"]["mean_move_of_the_best_length"]
    assert moves["acceptance, 0.6 to 0.9"] > moves["batch, 1 to 64"] > moves["context, 256 to 8192 tok"]
    assert data["draft_length"]["share_inside_the_windows"] < 0.6
    cpu = list(data["load"]["vllm_cpu"].values())
    assert cpu == sorted(cpu, reverse=True) and cpu[-1] < 1 < cpu[0] and data["load"]["cells_that_rise"]
    change = list(data["longer_drafts"]["change_from_3_to_7_by_batch"].values())
    assert change == sorted(change, reverse=True)
    uneven = [value for entry in data["experts"]["change"].values() for value in entry.values()]
    assert min(uneven) < -0.05 and max(uneven) > 0.05
    assert (
        max(data["bandwidth"]["change"].values())
        < 0
        < min(data["bandwidth"]["step_without_speculation_faster"].values()) - 1
    )
    assert data["hardware"]["rank_correlation_at_16"] > 0.9 and "rtx-4090" not in data["hardware"]["fits"]["8B + 1B"]


def test_the_speedups_of_a_real_engine_are_those_of_its_table(results):
    path = Path(__file__).resolve().parents[1] / "data" / "vllm_h200.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = {row["run"]: float(row["e2e_mean"]) for row in csv.DictReader(file)}
    told = results["load"]["data"]["vllm_h200"]["3"]
    assert told["27"] == pytest.approx(rows["k0__p512_o128_r27"] / rows["eagle_k3_a80__p512_o128_r27"])


def test_a_map_on_a_reduced_grid_is_that_of_the_step_times(claims):
    """Break-even acceptance before any trace at k = 1 and long outputs: E(1) = step(1)/step(0), by brentq."""
    pair = claims.pairs()["8B + EAGLE head"]
    axes = {"concurrency": [1.0, 64.0], "acceptance_rate": [0.01, 0.5, 0.95]}
    asked = {"draft_length": 1, "quantity": "tpot", "output_length": 5e4, "prompt_length": 1.0}
    found = claims.map_of(pair, axes, **asked)
    told = {e["at"]: e["value"] for e in found["crossings"] if e["along"] == "acceptance_rate"}
    there = dataclasses.replace(pair, prompt_length=1.0, output_length=5e4)
    gain = experiment("08_boundaries", "evidence").step_gain
    judged = brentq(lambda alpha: gain(there, 1.0, alpha, 1) - 1.0, 0.001, 0.9)
    assert told[1.0] == pytest.approx(judged, rel=1e-3)
