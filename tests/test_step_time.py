"""Step times: hand-calculated steps, the limits of the roofline, and the elasticity that shipped forms promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from diffspec.experts import ExpertRouting
from diffspec.step_time import (
    AffineStepTime,
    BatchState,
    DraftCost,
    ExpertCost,
    RooflineStepTime,
    scaled,
    smooth_maximum,
)

STATE = BatchState(
    sequences=4.0, query_tokens=16.0, kv_tokens=1000.0, prefill_tokens=100.0, draft_passes=3.0, draft_tokens=12.0
)
DRAFT = DraftCost(
    pass_base=1e-3, pass_sequence=1e-4, pass_kv=1e-6, block_base=5e-4, block_sequence=2e-5, prefill_token=1e-5
)


def test_affine_by_hand():
    step = AffineStepTime(
        verify_base=0.01, verify_sequence=1e-3, verify_query=1e-4, verify_kv=2e-6, prefill_token=3e-5, draft=DRAFT
    )
    parts = step(STATE)
    assert_close(parts.verify, 0.01 + 4e-3 + 16e-4 + 2e-3, rtol=1e-14)
    assert_close(parts.draft, 3 * (1e-3 + 4e-4 + 1e-3) + 5e-4 + 8e-5, rtol=1e-14)
    assert_close(parts.prefill, 3e-3 + 1e-3, rtol=1e-14)
    assert_close(parts.overhead, 0.0, rtol=0)
    assert_close(parts.total, 0.0176 + 0.00778 + 0.004, rtol=1e-14)


def test_experts_by_hand():
    routing = ExpertRouting.from_popularity([1.0, 0.5, 0.5, 0.0], [0, 0, 1, 1])  # imbalance 1.5
    experts = ExpertCost(routing, weight_read=0.02, token_share=0.5)
    state = BatchState(sequences=1.0, query_tokens=3.0, prefill_tokens=0.0)  # T = 1 + 0.5*2 = 2: coverage 0.875
    affine = AffineStepTime(verify_base=0.01, verify_query=1e-3, experts=experts)
    assert_close(affine(state).verify, 0.01 + 1.5 * 3e-3 + 0.875 * 0.02, rtol=1e-14)
    roofline = RooflineStepTime(weight_read=0.01, token_compute=1e-3, sharpness=1.0, experts=experts)
    assert_close(roofline(state).verify, 0.01 + 1.5 * 3e-3 + 0.875 * 0.02, rtol=1e-13)
    with_prompt = BatchState(sequences=1.0, query_tokens=3.0, prefill_tokens=10.0)
    assert_close(experts.effective_tokens(with_prompt), 1 + 0.5 * 12, rtol=1e-14)
    published = ExpertCost(routing, weight_read=0.02, token_share=0.5, sequence=1e-3)
    assert_close(published.verify(state), 0.875 * (0.02 + 1e-3), rtol=1e-14)


def test_drafting_jumps_where_a_drafter_appears():
    def draft(passes):
        return DRAFT.draft(BatchState(sequences=4.0, kv_tokens=1000.0, draft_passes=passes))

    assert float(draft(0.0)) == 0.0
    assert_close(draft(1e-12), 5e-4 + 8e-5, rtol=1e-8)  # the block terms alone
    block = DraftCost(block_base=2e-3, prefill_token=1e-5)
    times = [float(block.draft(BatchState(sequences=2.0, draft_passes=k))) for k in (1.0, 4.0, 8.0)]
    assert times == [2e-3] * 3  # a block drafter's time does not depend on draft length
    assert float(block.prefill(BatchState(prefill_tokens=100.0, draft_passes=0.0))) == 0.0
    assert_close(block.prefill(BatchState(prefill_tokens=100.0, draft_passes=1.0)), 1e-3, rtol=1e-14)


def roofline(sharpness, **costs):
    return RooflineStepTime(weight_read=0.01, token_compute=5e-4, kv_read=1e-6, sharpness=sharpness, **costs)


def test_roofline_between_sum_and_maximum():
    memory, compute = 0.011, 0.008
    assert_close(roofline(1.0)(STATE).verify, memory + compute, rtol=1e-14)
    assert_close(roofline(2.0)(STATE).verify, np.hypot(memory, compute), rtol=1e-14)
    assert_close(roofline(200.0)(STATE).verify, memory, rtol=1e-13)
    values = [float(roofline(s)(STATE).verify) for s in (1.0, 1.5, 2.0, 4.0, 8.0, 12.0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] >= memory


def test_roofline_parts_by_hand():
    step = roofline(
        1.0, inefficiency=0.1875, step_overhead=2e-3, sequence_overhead=1e-4, prefill_token=3e-5, draft=DRAFT
    )
    parts = step(STATE)
    assert_close(parts.verify, 0.011 + 5e-4 * 16 / 2, rtol=1e-14)  # sqrt(1 + 0.1875*16) = 2
    assert_close(parts.overhead, 2.4e-3, rtol=1e-14)
    assert_close(parts.prefill, 4e-3, rtol=1e-14)
    assert_close(parts.draft, 0.00778, rtol=1e-14)


@pytest.mark.parametrize("sharpness", [1.0, 2.0, 12.0])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_smooth_maximum_is_free_of_scale(sharpness, scale):
    a = np.array([1.0, 1.0, 3.0, 1e-3, 1.0, 1.0])
    b = np.array([2.0, 1.0, 1.0, 1.0, 1e-30, 0.0])
    value = smooth_maximum(a * scale, b * scale, sharpness)
    assert_close(value, scale * (a**sharpness + b**sharpness) ** (1 / sharpness), rtol=1e-13)
    slope = jax.vmap(jax.grad(smooth_maximum, (0, 1)), (0, 0, None))(a * scale, b * scale, sharpness)
    norm = (a**sharpness + b**sharpness) ** (1 / sharpness)
    positive = b > 1e-20
    for got, side in zip(slope, (a, b), strict=True):
        assert np.all(np.isfinite(got))
        assert_close(np.asarray(got)[positive], (side / norm)[positive] ** (sharpness - 1), rtol=1e-11)


def test_roofline_doubles_with_its_times():
    once = roofline(3.0, step_overhead=1e-3)
    twice = RooflineStepTime(weight_read=0.02, token_compute=1e-3, kv_read=2e-6, sharpness=3.0, step_overhead=2e-3)
    assert_close(twice(STATE).total, 2 * once(STATE).total, rtol=1e-14)


def test_scaled_by_model_size():
    step = roofline(2.0, step_overhead=2e-3, prefill_token=3e-5, draft=DRAFT)
    bigger = scaled(step, verifier=2.0, drafter=3.0)
    before, after = step(STATE), bigger(STATE)
    assert_close(after.draft, 3 * before.draft, rtol=1e-14)
    assert_close(after.prefill, 2 * 3e-3 + 3 * 1e-3, rtol=1e-14)
    assert_close(after.overhead, before.overhead, rtol=0)  # overheads do not scale
    assert_close(after.verify, np.hypot(2 * 0.01 + 1e-3, 2 * 0.008), rtol=1e-13)  # KV reads follow the cache
    affine = scaled(AffineStepTime(verify_base=0.01, verify_query=1e-4, verify_kv=1e-6, draft=DRAFT), verifier=2.0)
    assert_close(affine(STATE).verify, 2 * (0.01 + 16e-4) + 1e-3, rtol=1e-14)
    assert_close(affine(STATE).draft, before.draft, rtol=1e-14)


# --- the promise of scale_bounded: d log step / d log n <= 1 along the batch ---------------------------------------


def routing(skew):
    popularity = np.array([1.0, 0.5, 0.3, 0.2]) ** skew
    return ExpertRouting(jnp.asarray(popularity * 0.9), jnp.asarray(np.eye(2)[[0, 1, 1, 0]].T))


def drafter(p):
    return DraftCost(
        pass_base=p[0], pass_sequence=p[1], pass_kv=p[2], block_base=p[3], block_sequence=p[4], prefill_token=p[5]
    )


def affine_form(p, experts):
    return AffineStepTime(
        verify_base=p[6], verify_sequence=p[7], verify_query=p[8], verify_kv=p[9], draft=drafter(p), experts=experts
    )


def roofline_form(p, experts):
    return RooflineStepTime(
        weight_read=p[6],
        token_compute=p[7],
        kv_read=p[8],
        inefficiency=1e4 * p[9],
        sharpness=1 + 11 * p[13],
        step_overhead=p[10],
        sequence_overhead=p[11],
        draft=drafter(p),
        experts=experts,
    )


def elasticities(form, with_experts):
    def log_step(log_n, p, k, context):
        n = jnp.exp(log_n)
        experts = ExpertCost(routing(1.5), weight_read=p[12], token_share=p[13]) if with_experts else None
        state = BatchState(
            sequences=n, query_tokens=n * (k + 1), kv_tokens=n * context, draft_passes=k, draft_tokens=n * k
        )
        return jnp.log(form(p, experts)(state).total)

    return jax.jit(jax.vmap(jax.grad(log_step), (0, None, None, None)))


FORMS = {
    (form.__name__, with_experts): elasticities(form, with_experts)
    for form in (affine_form, roofline_form)
    for with_experts in (False, True)
}
LOG_N = np.log(np.array([1e-3, 0.1, 1.0, 2.0, 7.0, 32.0, 256.0, 1e4, 1e7]))
costs = st.lists(st.floats(-9.0, 0.0).map(lambda x: 10.0**x), min_size=13, max_size=13)


@pytest.mark.parametrize("form", FORMS, ids=str)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(costs, st.floats(0.0, 1.0), st.sampled_from([0.0, 1.0, 3.5, 8.0]), st.floats(1.0, 1e5))
def test_doubling_the_batch_at_most_doubles_the_step(form, p, unit, k, context):
    elasticity = np.asarray(FORMS[form](LOG_N, np.array([*p, unit]), k, context))
    assert np.all(elasticity <= 1 + 1e-9)
    assert np.all(elasticity >= -1e-9)


def test_the_published_expert_term_breaks_the_promise():
    # so it needs scale_bounded=False: coverage*sequences grows like T^2 while few experts are covered
    experts = ExpertCost(ExpertRouting.uniform(128, 8), weight_read=0.0, token_share=1.0, sequence=1e-2)
    step = AffineStepTime(verify_base=1e-6, experts=experts, scale_bounded=False)
    short, long = (float(step(BatchState(sequences=n, query_tokens=n)).total) for n in (1.0, 2.0))
    assert long > 3 * short
