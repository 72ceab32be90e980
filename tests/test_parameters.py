"""Declared parameters: paths, ranges, and the way to unconstrained coordinates and back."""

import equinox as eqx
import jax
import numpy as np
import pytest
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from diffspec.experts import ExpertRouting
from diffspec.parameters import (
    ParameterInfo,
    get_parameters,
    parameter,
    parameter_infos,
    set_parameters,
    to_constrained,
    to_unconstrained,
)
from diffspec.serving import ServingModel
from diffspec.step_time import AffineStepTime, BatchState, DraftCost, ExpertCost

POSITIVE = ParameterInfo("base", "s", 0.0, float("inf"), "a positive time")
SHIFTED = ParameterInfo("factor", "1", 1.0, float("inf"), "at least one")
INTERVAL = ParameterInfo("sharpness", "1", 1.0, 12.0, "an interval")
UNIT = ParameterInfo("share", "1", 0.0, 1.0, "a fraction")
every_range = pytest.mark.parametrize("info", [POSITIVE, SHIFTED, INTERVAL, UNIT], ids=lambda info: info.name)
quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@every_range
@quick
@given(coordinate=st.floats(-12, 12))
def test_round_trip(info, coordinate):
    value = float(to_constrained(coordinate, info))
    assert info.low < value < info.high
    lost = 1e-15 * np.exp(abs(coordinate))  # rounding of value near a finite end
    assert_close(to_unconstrained(value, info), coordinate, rtol=1e-14, atol=20 * lost + 1e-14)


@every_range
def test_the_coordinates_of_the_table(info):
    z = np.array([-3.0, 0.0, 2.0])
    wide = np.isinf(info.high)
    expected = info.low + (np.exp(z) if wide else (info.high - info.low) / (1 + np.exp(-z)))
    assert_close(to_constrained(z, info), expected, rtol=1e-14)
    slope = jax.vmap(jax.grad(to_constrained), (0, None))(z, info)
    inside = expected - info.low if wide else (expected - info.low) * (info.high - expected) / (info.high - info.low)
    assert_close(slope, inside, rtol=1e-12)
    assert np.all(np.isfinite(to_constrained(np.array([-500.0, 500.0]), info)))


def model():
    step = AffineStepTime(
        verify_base=0.02,
        prefill_token=1e-4,
        draft=DraftCost(pass_base=1e-3),
        experts=ExpertCost(ExpertRouting.uniform(8, 2), weight_read=5e-3),
    )
    return ServingModel(step)


PATHS = [
    "step_time.verify_base",
    "step_time.verify_sequence",
    "step_time.verify_query",
    "step_time.verify_kv",
    "step_time.prefill_token",
    "step_time.draft.pass_base",
    "step_time.draft.pass_sequence",
    "step_time.draft.pass_kv",
    "step_time.draft.block_base",
    "step_time.draft.block_sequence",
    "step_time.draft.prefill_token",
    "step_time.experts.weight_read",
    "step_time.experts.token_share",
    "request_overhead",
    "prefill_interference",
    "first_token_steps",
    "closed_loop_sync",
    "sync_spread",
]


def test_infos_by_dotted_path_in_declaration_order():
    infos = parameter_infos(model())
    assert list(infos) == PATHS
    assert infos["step_time.draft.pass_kv"] == ParameterInfo(
        "pass_kv", "s/tok", 0.0, float("inf"), infos["step_time.draft.pass_kv"].meaning
    )
    assert infos["step_time.experts.token_share"][:4] == ("token_share", "1", 0.0, 1.0)
    assert infos["first_token_steps"][:4] == ("first_token_steps", "step", 0.0, 3.0)
    assert all(info.unit and info.meaning for info in infos.values())


def test_get_and_set():
    old = model()
    values = get_parameters(old)
    assert list(values) == PATHS
    assert values["step_time.draft.pass_base"] == 1e-3
    new = set_parameters(old, {"step_time.draft.pass_base": 7e-3, "request_overhead": 0.5})
    assert get_parameters(new) == values | {"step_time.draft.pass_base": 7e-3, "request_overhead": 0.5}
    assert get_parameters(old) == values  # a copy
    state = BatchState(sequences=1.0, draft_passes=2.0)
    assert_close(new.step_time(state).draft - old.step_time(state).draft, 2 * 6e-3, rtol=1e-12)
    assert set_parameters(old, {}) is old
    assert get_parameters(set_parameters(old, values)) == values
    with pytest.raises(AttributeError):
        set_parameters(old, {"step_time.no_such": 1.0})


def test_setting_is_differentiable():
    def total(value):
        step = set_parameters(model(), {"step_time.draft.pass_base": value}).step_time
        return step(BatchState(sequences=1.0, draft_passes=3.0)).total

    assert_close(jax.grad(total)(2e-3), 3.0, rtol=1e-13)


def test_a_declaration_keeps_unit_range_and_meaning():
    class Own(eqx.Module):
        needed: float = parameter(unit="s", meaning="no default")
        share: float = parameter(0.5, unit="1", low=0.1, high=0.9, meaning="an own interval")
        plain: float = 3.0

    assert parameter_infos(Own(1.0)) == {
        "needed": ParameterInfo("needed", "s", 0.0, float("inf"), "no default"),
        "share": ParameterInfo("share", "1", 0.1, 0.9, "an own interval"),
    }
    with pytest.raises(TypeError):
        Own()
