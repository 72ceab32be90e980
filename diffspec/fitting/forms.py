"""The step-time forms that can be fitted: where each starts, what is known before any data, and what is fitted.

Priors are log-normal (logit-normal for bounded parameters) around scales read from the trace itself (its shortest step
and its shortest first token), and wide: they hold what the trace cannot tell at a plausible size, and yield to data.
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffspec.experts import ExpertRouting
from diffspec.parameters import get_parameters, parameter_infos, set_parameters, to_constrained, to_unconstrained
from diffspec.serving import ServingModel
from diffspec.step_time import AffineStepTime, DraftCost, ExpertCost, RooflineStepTime

FORMS = ("affine", "roofline", "affine-moe", "roofline-moe")
"""Names of the forms; the mixture-of-experts ones need num_experts and experts_per_token in the trace."""


class Scales(NamedTuple):
    """Sizes read off a trace: its shortest step [s], shortest first token [s], a typical context and prompt [tok]."""

    step: float
    ttft: float
    context: float
    prompt: float


class Form(eqx.Module):
    """A serving model to fit: the ``template`` (parameters at their prior centre), the dotted ``paths`` of the fitted
    parameters, and the ``spread`` (standard deviation) of each one's prior in unconstrained coordinates."""

    name: str = eqx.field(static=True)
    paths: tuple[str, ...] = eqx.field(static=True)
    template: ServingModel
    spread: Float[Array, "parameters"]

    def model(self, z):
        """Serving model at standardised coordinates z (z = 0 is the prior centre, prior N(0, 1))."""
        infos, centres = parameter_infos(self.template), get_parameters(self.template)
        values = {}
        for index, path in enumerate(self.paths):
            centre = to_unconstrained(centres[path], infos[path])
            values[path] = to_constrained(centre + self.spread[index] * z[index], infos[path])
        return set_parameters(self.template, values)


def read_scales(observed: dict[str, np.ndarray], prompt, context, tokens_per_step, output) -> Scales:
    """Scales of a deployment's rows; see :class:`Scales`."""

    def smallest(*names, factor=1.0):
        for name in names:
            if name in observed:
                values = observed[name] * factor
                values = values[np.isfinite(values)]
                if values.size:
                    return float(np.quantile(values, 0.1))
        return math.nan

    step = smallest("itl_mean", "itl_p50")
    if math.isnan(step):
        step = smallest("tpot_mean", "tpot_p50", factor=tokens_per_step)
    if math.isnan(step):
        step = smallest("e2e_mean", "e2e_p50", factor=tokens_per_step / np.maximum(output, 1.0))
    if math.isnan(step):
        step = 0.02
    ttft = smallest("ttft_mean", "ttft_p50")
    return Scales(step, 2 * step if math.isnan(ttft) else ttft, float(np.median(context)), float(np.median(prompt)))


def build_form(name: str, scales: Scales, experts: tuple[float, float, float] | None = None) -> Form:
    """Template and priors of a form. ``experts`` = (num_experts, experts_per_token, expert_ranks)."""
    step, per_token = scales.step, 0.01 * scales.step
    per_kv = per_token / 500  # order of magnitude only: a verified token costs far more than a cached one
    moe = name.endswith("-moe")
    expert_cost = None
    if moe:
        assert experts is not None
        expert_cost = ExpertCost(ExpertRouting.uniform(*experts[:2], int(experts[2])), weight_read=0.5 * step)
    draft = DraftCost(
        pass_base=0.1 * step,
        pass_sequence=0.001 * step,
        pass_kv=0.1 * per_kv,
        block_base=0.05 * step,
        block_sequence=0.002 * step,
        prefill_token=0.05 * per_token,
    )
    shared = {"prefill_token": 0.5 * per_token, "draft": draft, "experts": expert_cost}
    weights = (0.4 if moe else 0.7) * step
    if name.startswith("affine"):
        step_time = AffineStepTime(
            verify_base=weights, verify_sequence=0.005 * step, verify_query=per_token, verify_kv=per_kv, **shared
        )
        spread = {"verify_base": 1.0, "verify_sequence": 2.0, "verify_query": 2.0, "verify_kv": 1.5}
    else:
        step_time = RooflineStepTime(
            weight_read=weights,
            token_compute=per_token,
            kv_read=per_kv,
            inefficiency=0.03,
            sharpness=3.0,
            step_overhead=0.1 * step,
            sequence_overhead=0.005 * step,
            **shared,
        )
        spread = {
            "weight_read": 1.0,
            "token_compute": 2.0,
            "kv_read": 1.5,
            "inefficiency": 2.0,
            "sharpness": 1.5,
            "step_overhead": 1.5,
            "sequence_overhead": 2.0,
        }
    spread |= {"prefill_token": 1.5}
    spread |= {f"draft.{part}": 1.5 for part in ("pass_base", "pass_kv", "block_base", "prefill_token")}
    spread |= {f"draft.{part}": 2.0 for part in ("pass_sequence", "block_sequence")}
    if moe:
        spread |= {"experts.weight_read": 1.0, "experts.token_share": 1.0}
    template = ServingModel(step_time, request_overhead=0.5 * scales.ttft)
    serving = {
        "request_overhead": 1.0,
        "prefill_interference": 0.5,
        "first_token_steps": 1.0,
        "closed_loop_sync": 1.5,
        "sync_spread": 1.0,
    }
    spread = {f"step_time.{path}": sd for path, sd in spread.items()} | serving
    # arrays, not Python floats: then traces of one shape share one compiled program, whatever their scales
    centres = {path: jnp.asarray(float(value)) for path, value in get_parameters(template).items() if path in spread}
    return Form(
        name, tuple(centres), set_parameters(template, centres), jnp.asarray([spread[path] for path in centres])
    )
