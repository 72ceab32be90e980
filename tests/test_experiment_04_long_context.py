"""MagicDec's published speedups, from first principles and the engine's latencies without speculation."""

from pathlib import Path

import numpy as np
import pytest
from helpers import experiment

script = experiment("04_physics_against_simulator", "long_context")

ENGINE = script.calibrate()


def test_model_sizes():
    embedding = script.LLAMA2.hidden * script.LLAMA2.vocabulary
    assert script.LLAMA2.block_weights + 2 * embedding == pytest.approx(6.738e9, rel=1e-3)
    embedding = script.LLAMA31.hidden * script.LLAMA31.vocabulary
    assert script.LLAMA31.block_weights + 2 * embedding == pytest.approx(8.030e9, rel=1e-3)
    assert 8 * script.LLAMA31.kv_bytes == 128 * 1024


@pytest.mark.parametrize("row", script.ROWS, ids=lambda row: f"{row.name} {row.prefill} x {row.batch}")
def test_within_15_percent_of_the_published_speedup(row):
    assert script.speedup(row, ENGINE) == pytest.approx(row.speedup, rel=0.15)


def ratios(row, batches, **options):
    return np.array([script.speedup(row._replace(batch=batch), ENGINE, **options) for batch in batches])


def test_speedup_rises_with_the_batch_only_with_long_contexts_and_a_window():
    row = script.ROWS[0]
    batches = (8, 32, 64, 128, 256)
    assert np.all(np.diff(ratios(row, batches)) > 0)
    assert np.all(np.diff(ratios(row, batches, window=None)) < 0)
    assert np.all(np.diff(ratios(row._replace(prefill=500), batches)) < 0)
    longer = [script.speedup(row._replace(prefill=prefill), ENGINE) for prefill in (1000, 8000, 32000, 100_000)]
    assert np.all(np.diff(longer) > 0)


def test_the_table_is_that_of_the_script():
    assert Path(script.__file__).with_suffix(".md").read_text(encoding="utf-8") == script.text()
