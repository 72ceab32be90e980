"""Experiment 05: its fits recover what is put in, and, where the measurements are, first principles meet them."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import experiment

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "05_transfer"


@pytest.fixture(scope="module")
def run():
    return experiment("05_transfer", "run")


def test_two_parameters_are_recovered(run):
    tokens = 2.0 ** np.arange(10)
    memory, compute = (1 - (1 - 8 / 128) ** tokens) * 2.5e-4, tokens * 1e-7
    measured = 2e-5 + np.hypot(memory / 0.8, compute)
    error, share = run._two_parameters(memory, compute, measured, np.arange(10) % 2 == 0)
    assert error < 1e-6 and share == pytest.approx(0.8, rel=1e-6)


def test_the_tables_are_the_results(run):
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    assert run.told(results) in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_step_cost_of_an_h100(run, shared):
    """Qwen3-1.7B (adixg/vllm-specdecode-cost-model): 77 decode steps of 1 to 64 requests, contexts up to 8,192."""
    found = run.step_cost(shared / "traces")
    assert found["rows"] == 77
    assert found["no fit"] < 0.08 and found["inside"] > 0.9
    alternate, extrapolated = found["splits"].values()
    assert alternate["held out"] < 0.012, "a linear fit of three terms leaves 0.8 % in sample"
    assert extrapolated["held out"] < 0.05, "from 16 requests and 1,024 tokens to 64 requests and 8,192"


def test_rows_of_other_hardware(run, shared):
    rows = run.silicon(shared / "traces", "meta-llama/Llama-3.1-70B", 2)
    assert {gpu: len(found) for gpu, found in rows.items()} == {"h100": 15, "h200": 15, "b200": 30}
    assert rows["h200"][0].keys() == {"prompt", "output", "concurrency", "ttft", "tpot"}
    assert all(0.005 < row["tpot"] < 0.1 for found in rows.values() for row in found)
