"""The staircase of captured sizes: by hand, and what it does to a decision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffspec.acceptance import ConstantAcceptance
from diffspec.batch_state import BatchState
from diffspec.configuration import Configuration
from diffspec.lengths import Lengths
from diffspec.percentiles import predict_distribution
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.simulating import Engine, simulate
from diffspec.staircase import CAPTURE_SIZES, StaircaseStepTime
from diffspec.step_time import DraftCost, RooflineStepTime, scaled
from diffspec.workload import Workload

SMOOTH = RooflineStepTime(
    weight_read=6e-3, token_compute=2e-4, kv_read=6e-8, prefill_token=2e-5, draft=DraftCost(pass_base=5e-4)
)
COARSE = StaircaseStepTime(SMOOTH, (8, 32, 128))


def total(step, sequences: float, draft: float = 0.0, prefill: float = 0.0):
    state = BatchState(
        sequences=sequences,
        query_tokens=sequences * (1 + draft),
        kv_tokens=100.0 * sequences,
        prefill_tokens=prefill,
        draft_passes=draft,
        draft_tokens=sequences * draft,
    )
    return float(step(state).total)


@pytest.mark.parametrize(
    ("sequences", "draft", "padded"), [(3, 0, 8), (8, 0, 8), (5, 3, 32), (9, 4, 128), (40, 4, 200)]
)
def test_a_step_runs_at_the_next_captured_size(sequences, draft, padded):
    """The padded step costs what the smooth one does at that size, with the context of the real sequences."""
    factor = padded / (sequences * (1 + draft))
    expected = SMOOTH(
        BatchState(
            sequences=sequences * factor,
            query_tokens=float(padded),
            kv_tokens=100.0 * sequences,
            draft_passes=float(draft),
            draft_tokens=sequences * draft * factor,
        )
    )
    assert total(COARSE, float(sequences), float(draft)) == pytest.approx(float(expected.total), rel=1e-12)


def test_prefill_and_large_batches_are_not_padded():
    assert total(COARSE, 3.0, prefill=50.0) == pytest.approx(total(SMOOTH, 3.0, prefill=50.0), rel=1e-12)
    assert total(COARSE, 200.0) == pytest.approx(total(SMOOTH, 200.0), rel=1e-12)
    rungs = jax.vmap(lambda n: COARSE(BatchState(sequences=n, query_tokens=n)).total)(jnp.linspace(0.5, 128.0, 400))
    assert np.all(np.diff(rungs) >= -1e-15) and len(np.unique(np.round(rungs, 12))) == 3
    assert CAPTURE_SIZES[:5] == (1, 2, 4, 8, 16) and CAPTURE_SIZES[-1] == 512


@pytest.mark.slow
def test_a_decision_is_scored_again_on_the_staircase():
    """The sizes that vLLM captures cost 1 to 5 % here; the chain sees it as the simulator does."""
    step = StaircaseStepTime(SMOOTH)
    load = Workload(300.0, 120.0, arrival_rate=15.0)
    config = Configuration(3.0, ConstantAcceptance(0.8), max_batch_size=32.0)
    chain, judged = {}, {}
    for name, form in (("smooth", SMOOTH), ("staircase", step)):
        model = ServingModel(form, first_token_steps=1.5)
        chain[name] = float(predict_distribution(model, load, config, Lengths.fixed(), states=64).e2e_mean)
        engine = Engine(3, (0.8,) * 3, max_batch_size=32)
        judged[name] = simulate(form, load, engine, n_requests=1000, replications=8).mean("e2e").value
        assert chain[name] == pytest.approx(judged[name], rel=0.03)
    assert 1.0 < chain["staircase"] / chain["smooth"] < 1.1
    assert 1.0 < judged["staircase"] / judged["smooth"] < 1.1


def test_a_model_of_another_size_keeps_its_sizes():
    bigger = scaled(COARSE, verifier=2.0, drafter=3.0)
    assert bigger.capture_sizes == COARSE.capture_sizes
    assert float(bigger.inner.weight_read) == pytest.approx(2 * 6e-3, rel=1e-14)
    assert float(bigger.inner.draft.pass_base) == pytest.approx(3 * 5e-4, rel=1e-14)


def test_sizes_that_do_not_increase():
    with pytest.raises(InputError, match="capture_sizes"):
        StaircaseStepTime(SMOOTH, (8, 8))
