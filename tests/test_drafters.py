"""Drafters by hand, their limits, the scale bound, composition, and the page that shows how to write one."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from diffspec.acceptance import ConstantAcceptance
from diffspec.batch_state import BatchState
from diffspec.configuration import Configuration
from diffspec.drafters import (
    BlockDrafter,
    DraftCost,
    DraftModel,
    NgramDrafter,
    NoDrafter,
    OverlappedDrafter,
    RemoteDrafter,
    WindowedDrafter,
)
from diffspec.parameters import get_parameters, parameter_infos, set_parameters
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.step_time import AffineStepTime, RooflineStepTime, scaled
from diffspec.workload import Workload

STATE = BatchState(
    sequences=4.0, query_tokens=16.0, kv_tokens=1000.0, prefill_tokens=100.0, draft_passes=3.0, draft_tokens=12.0
)
IDLE = BatchState(sequences=4.0, query_tokens=4.0, kv_tokens=1000.0, prefill_tokens=100.0)
MODEL = DraftModel(pass_overhead=1e-4, weight_read=2e-3, token_compute=1e-5, kv_read=1e-6, prefill_token=1e-5)
BLOCK = BlockDrafter(overhead=2e-4, weight_read=1e-3, token_compute=1e-6, kv_read=1e-7, prefill_token=2e-6)
COST = DraftCost(pass_base=1e-3, pass_sequence=1e-4, pass_kv=1e-6, block_base=5e-4, block_sequence=2e-5)
ALL = {
    "cost": COST,
    "model": MODEL,
    "block": BLOCK,
    "ngram": NgramDrafter(5e-5, 1e-5),
    "none": NoDrafter(),
    "windowed": WindowedDrafter(MODEL, 100.0),
    "overlapped": OverlappedDrafter(MODEL, 0.6),
    "remote": RemoteDrafter(MODEL, 5e-4, 1e-6),
    "all three": OverlappedDrafter(RemoteDrafter(WindowedDrafter(BLOCK, 100.0), 5e-4, 1e-6), 0.7),
}


def p_norm(a, b):
    return (a**8 + b**8) ** (1 / 8)


def test_by_hand():
    one_pass = 1e-4 + p_norm(2e-3 + 1e-3, 4e-5)
    assert_close(MODEL.draft(STATE), 3 * one_pass, rtol=1e-13)
    assert_close(MODEL.prefill(STATE), 1e-3, rtol=1e-14)
    assert_close(BLOCK.draft(STATE), 2e-4 + p_norm(1e-3 + 1e-4, 12e-6), rtol=1e-13)
    assert_close(ALL["ngram"].draft(STATE), 5e-5 + 4e-5, rtol=1e-14)
    assert_close(ALL["windowed"].draft(STATE), 3 * (1e-4 + p_norm(2e-3 + 4e-4, 4e-5)), rtol=1e-13)
    assert_close(ALL["remote"].draft(STATE), 3 * one_pass + 5e-4 + 16e-6, rtol=1e-13)
    assert float(ALL["remote"].prefill(STATE)) == 0.0  # beside the verifier's
    wide = BatchState(sequences=1.0, draft_passes=2.0, draft_tokens=800.0)  # a tree level of 400 candidates
    assert_close(MODEL.draft(wide), 2 * (1e-4 + p_norm(2e-3, 4e-3)), rtol=1e-13)


@pytest.mark.parametrize("name", ALL)
def test_nothing_where_nothing_is_drafted(name):
    assert float(ALL[name].draft(IDLE, 1e-3)) == 0.0
    assert float(ALL[name].prefill(IDLE)) == 0.0
    step = AffineStepTime(verify_base=0.01, prefill_token=1e-5, draft=ALL[name])
    assert_close(step(IDLE).total, 0.011, rtol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_twice_the_parameters(name):
    twice = ALL[name].scaled(2.0)
    assert type(twice) is type(ALL[name])
    ratio = {"ngram": 1.0, "none": 1.0}.get(name, 2.0)
    if name in ("remote", "overlapped", "all three"):
        return  # transfers do not scale, hidden parts do not: below
    assert_close(twice.draft(STATE), ratio * ALL[name].draft(STATE), rtol=1e-13)
    assert_close(twice.prefill(STATE), ratio * ALL[name].prefill(STATE), rtol=1e-13)
    step = scaled(RooflineStepTime(weight_read=0.01, token_compute=1e-4, draft=ALL[name]), drafter=2.0)
    assert_close(step(STATE).draft, ratio * ALL[name].draft(STATE), rtol=1e-13)


def test_wrappers_scale_what_they_hold():
    trip = 5e-4 + 16e-6
    assert_close(ALL["remote"].scaled(3.0).draft(STATE), 3 * MODEL.draft(STATE) + trip, rtol=1e-13)
    assert_close(ALL["overlapped"].scaled(3.0).draft(STATE, 1e9), 0.4 * 3 * MODEL.draft(STATE), rtol=1e-13)
    nested = scaled(AffineStepTime(verify_base=1e-2, draft=ALL["all three"]), drafter=2.0).draft
    assert_close(nested.inner.inner.inner.weight_read, 2e-3, rtol=1e-14)
    assert_close(nested.inner.inner.kv_window, 100.0, rtol=0)


def test_time_over_draft_length():
    k = np.arange(1.0, 9.0)

    def times(drafter):
        return np.array([float(drafter.draft(BatchState(2.0, 2 * (x + 1), 500.0, 0.0, x, 2 * x))) for x in k])

    assert_close(times(MODEL), k * times(MODEL)[0], rtol=1e-13)  # serial
    assert_close(times(BLOCK), times(BLOCK)[0], rtol=1e-6)  # flat while its weights are read
    assert times(BlockDrafter(weight_read=1e-5, token_compute=1e-5))[-1] == pytest.approx(16e-5, rel=1e-3)


def test_overlap_is_the_mean_over_both_kinds_of_step():
    # simulated: in a share of steps the draft was ready, such a step lasts max(verify, draft); else their sum
    rng = np.random.default_rng(0)
    alone = float(COST.draft(STATE))
    for verify in (0.5 * alone, 3.0 * alone):
        ready = rng.random(200_000) < 0.35
        steps = np.where(ready, max(verify, alone), verify + alone)
        added = float(OverlappedDrafter(COST, 0.35).draft(STATE, verify))
        assert abs(verify + added - steps.mean()) < 4 * steps.std() / np.sqrt(steps.size)
    assert_close(OverlappedDrafter(COST, 0.0).draft(STATE, 1.0), alone, rtol=1e-14)
    assert_close(OverlappedDrafter(COST, 1.0).draft(STATE, 2 * alone), 0.0, rtol=0, atol=1e-18)
    assert_close(OverlappedDrafter(COST, 1.0).draft(STATE, 0.25 * alone), 0.75 * alone, rtol=1e-14)


def test_step_times_hand_their_verification_to_the_drafter():
    hidden = OverlappedDrafter(COST, 1.0)
    alone = float(COST.draft(STATE))
    for step in (
        AffineStepTime(verify_base=2e-3, draft=hidden),
        RooflineStepTime(weight_read=2e-3, token_compute=0.0, draft=hidden),
    ):
        assert_close(step(STATE).total, max(2e-3, alone), rtol=1e-13)


def test_parameters_of_nested_drafters_are_found():
    step = AffineStepTime(verify_base=1e-2, draft=ALL["all three"])
    infos = parameter_infos(step)
    assert infos["draft.inner.transfer_latency"].unit == "s"
    assert infos["draft.overlap"].high == 1.0
    values = get_parameters(step)
    assert values["draft.inner.inner.inner.weight_read"] == 1e-3
    changed = set_parameters(step, {"draft.inner.inner.inner.weight_read": 2e-3})
    assert changed.draft.inner.inner.inner.weight_read == 2e-3


# --- the promise of scale_bounded: d log step / d log n <= 1 -------------------------------------------------------


def drafters(p, share):
    model = DraftModel(p[0], p[1], p[2], p[3], p[4])
    block = BlockDrafter(p[0], p[1], p[2], p[3], p[4])
    return [
        model,
        block,
        NgramDrafter(p[0], p[1]),
        NoDrafter(),
        WindowedDrafter(model, 1e4 * p[5]),
        OverlappedDrafter(model, share),
        RemoteDrafter(block, p[6], p[7]),
        OverlappedDrafter(RemoteDrafter(WindowedDrafter(model, 1e4 * p[5]), p[6], p[7]), share),
    ]


def log_steps(log_n, p, share, k, context):
    n = jnp.exp(log_n)
    state = BatchState(n, n * (k + 1), n * context, 0.0, k, n * k)
    steps = [
        RooflineStepTime(weight_read=p[8], token_compute=p[9], kv_read=p[10], sharpness=4.0, draft=drafter)
        for drafter in drafters(p, share)
    ]
    return jnp.stack([jnp.log(step(state).total) for step in steps])


elasticities = jax.jit(jax.vmap(jax.jacfwd(log_steps), (0, None, None, None, None)))
LOG_N = np.log(np.array([1e-2, 1.0, 2.0, 7.0, 32.0, 256.0, 1e4, 1e7]))
costs = st.lists(st.floats(-9.0, 0.0).map(lambda x: 10.0**x), min_size=11, max_size=11)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(costs, st.floats(0.0, 1.0), st.sampled_from([0.0, 1.0, 3.5, 8.0]), st.floats(1.0, 1e5))
def test_doubling_the_batch_at_most_doubles_the_step(p, share, k, context):
    elasticity = np.asarray(elasticities(LOG_N, np.array(p), share, k, context))
    assert np.all(elasticity <= 1 + 1e-9)
    assert np.all(elasticity >= -1e-9)


def test_gradients_reach_every_cost():
    def step(p):
        return jnp.exp(log_steps(jnp.log(6.0), p, 0.4, 3.0, 700.0))

    p = np.array([1e-3, 2e-3, 3e-4, 1e-6, 1e-5, 0.02, 5e-4, 1e-5, 1e-3, 1e-4, 1e-6])
    slopes = np.asarray(jax.jit(jax.jacfwd(step))(p))
    compiled = jax.jit(step)
    for i in range(len(p)):
        h = 1e-5 * p[i]
        shift = np.eye(len(p))[i] * h
        numeric = (np.asarray(compiled(p + shift)) - np.asarray(compiled(p - shift))) / (2 * h)
        assert_close(slopes[:, i], numeric, rtol=1e-5, atol=1e-8)


# --- in predictions ------------------------------------------------------------------------------------------------


def test_a_predictor_that_abstains_pays_its_search_all_the_same():
    step = AffineStepTime(verify_base=0.02, draft=NgramDrafter(1e-4, 1e-5))
    workload = Workload(prompt_length=64, output_length=65, concurrency=1)
    config = Configuration(draft_length=4.0, acceptance=ConstantAcceptance(0.8), draft_probability=0.25)
    prediction = ServingModel(step, first_token_steps=0.0).predict(workload, config)
    assert_close(prediction.itl, 0.02 + 1.1e-4, rtol=1e-12)
    assert_close(prediction.tokens_per_step, 1 + 0.25 * (0.8 + 0.64 + 0.512 + 0.4096), rtol=1e-12)


def long_context(window):
    # an 8B model on eight A100 sharing it: weights 1 ms, 16 KiB of cache a token and GPU at 2 TB/s, self-speculation
    drafter = DraftModel(pass_overhead=2e-3, weight_read=1e-3, kv_read=8e-9, token_compute=6e-6)
    return RooflineStepTime(
        weight_read=1e-3,
        kv_read=8e-9,
        token_compute=6e-6,
        step_overhead=2e-3,
        sharpness=4.0,
        draft=drafter if window is None else WindowedDrafter(drafter, window),
    )


@pytest.mark.parametrize(
    ("context", "window", "rises"), [(32_000, 512.0, True), (32_000, None, False), (200, 512.0, False)]
)
def test_speedup_rises_with_the_batch_where_the_cache_dominates(context, window, rises):
    model = ServingModel(long_context(window))
    config = Configuration(draft_length=3.0, acceptance=ConstantAcceptance(0.8))

    def speedup(concurrency):
        load = Workload(prompt_length=context, output_length=256, concurrency=concurrency)
        plain = model.predict(load, config.plain())
        return plain.tpot / model.predict(load, config).tpot

    ratios = np.asarray(jax.jit(jax.vmap(speedup))(np.array([8.0, 32.0, 128.0, 512.0])))
    assert np.all(np.diff(ratios) > 0) if rises else np.all(np.diff(ratios) < 0), ratios


@pytest.mark.parametrize(
    "make",
    [
        lambda: DraftModel(weight_read=-1e-3),
        lambda: DraftModel(weight_read=jnp.asarray(-1e-3)),
        lambda: DraftCost(pass_base=-1e-3),
        lambda: DraftCost(block_sequence=float("nan")),
        lambda: BlockDrafter(overhead=float("nan")),
        lambda: NgramDrafter(-1.0),
        lambda: WindowedDrafter(MODEL, 0.0),
        lambda: OverlappedDrafter(MODEL, 1.5),
        lambda: RemoteDrafter(MODEL, -1e-3),
    ],
)
def test_bad_input_is_named(make):
    with pytest.raises(InputError, match="allowed"):
        make()


def test_the_page_on_extending_runs():
    page = (Path(__file__).resolve().parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 3
    names: dict = {"__name__": "extending"}
    for block in blocks:
        exec(compile(block, "docs/extending.md", "exec"), names)
    heads = names["step_time"].draft
    assert_close(heads.scaled(2.0).draft(STATE), 3 * 1.2e-4 + 12e-7, rtol=1e-12)
    assert_close(scaled(names["captured"], drafter=2.0).draft.head_read, 1.2e-4, rtol=1e-14)
