"""First principles and fits: a serving model before any trace, the start of a fit, its transfer to other hardware."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.first_principles import SPREAD, Efficiency, FirstPrinciples, draws
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.forms import Form, Scales
from diffspec.hardware import Accelerator
from diffspec.parameters import Scalar, get_parameters, set_parameters
from diffspec.resources import MemoryPlan, memory_plan
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.step_time import RooflineStepTime, smooth_maximum

KEY = "first_principles"
"""Where a fitted deployment's ``defaults`` keep the pair, its hardware and the efficiency factors."""
TRANSFER_SPREAD = {"memory": 0.2, "compute": 0.3, "overhead": 0.3}
"""Standard deviation of log(cost on the new hardware / scaled cost), by what bounds the cost. Judgement, not a fit, but
widened (from 0.12 and 0.25) after transfers of gpt-oss-120b between pairs of GPUs (experiments/05_transfer)."""
SERVING_SPREAD = {"prefill_interference": 0.3, "first_token_steps": 0.7, "closed_loop_sync": 1.0, "sync_spread": 1.0}
"""Standard deviation (log, logit) of what first principles do not know of how requests share an engine: judgement."""
CHUNK = 2048.0
"""Prompt tokens that engines read beside decoding requests in a step, by default (vLLM: max_num_batched_tokens)."""
CLOSED_LOOP_SYNC = 0.35
"""Between a fixed-length run on a CPU (1: requests that finish together start together) and two public GPU runs (0.12:
Llama-3.1-70B and gpt-oss-120b, 2x H200, experiments/05_transfer)."""
START_SPREAD = {"memory": 0.4, "compute": 0.7}
"""Prior standard deviation (log) around first principles; overheads keep those of the form."""
_BOUND = {
    "step_time.weight_read": "memory",
    "step_time.experts.weight_read": "memory",
    "step_time.kv_read": "memory",
    "step_time.token_compute": "compute",
    "step_time.prefill_token": "compute",
    "step_time.step_overhead": "overhead",
    "step_time.sequence_overhead": "overhead",
    "step_time.draft.pass_base": "memory",
    "step_time.draft.pass_kv": "memory",
    "step_time.draft.pass_sequence": "compute",
    "step_time.draft.block_base": "memory",
    "step_time.draft.block_sequence": "compute",
    "step_time.draft.prefill_token": "compute",
    "request_overhead": "overhead",
}
_SHARES = {"memory": "step_time.weight_read", "kv": "step_time.kv_read", "compute": "step_time.token_compute"}
_STAND_INS = {  # scale like these where first principles have no such cost
    "step_time.draft.block_base": "step_time.draft.pass_base",
    "step_time.draft.block_sequence": "step_time.draft.pass_sequence",
    "step_time.draft.pass_base": "step_time.draft.block_base",
    "step_time.draft.pass_sequence": "step_time.draft.block_sequence",
}


def at_lengths(pair: FirstPrinciples, scales: Scales) -> FirstPrinciples:
    """The pair at the typical lengths of a trace."""
    output = max(2.0 * (scales.context - scales.prompt), 1.0)
    return replace(pair, prompt_length=scales.prompt, output_length=output)


def known(pair: FirstPrinciples) -> dict[str, Any]:
    """What the pair tells of a deployment's defaults: its hardware and its experts."""
    experts = {"experts": expert_counts(pair)} if pair.verifier.is_moe else {}
    return {"hardware": pair.hardware.name} | experts


def serving_model(pair: FirstPrinciples, efficiency: Efficiency | None = None) -> ServingModel:
    """Serving model of a pair on its hardware, before any trace."""
    step_time = pair.step_time(efficiency)
    return ServingModel(
        step_time,
        request_overhead=pair.request_overhead(efficiency),
        prefill_interference=_interference(step_time, jnp.minimum(pair.prompt_length, CHUNK)),
        closed_loop_sync=CLOSED_LOOP_SYNC,
    )


def _interference(step_time: RooflineStepTime, chunk: Scalar):
    """Share of a prompt's computation that those who decode beside it pay [1]: the step reads the shared weights
    anyway, and a part of the computation hides behind that: (roofline(weights, compute) - weights)/compute, for
    ``chunk`` tokens. An H200 bears it out (tests/test_experiment_03.py)."""
    weights, compute = step_time.weight_read, step_time.prefill_token * chunk
    return (smooth_maximum(weights, compute, step_time.sharpness) - weights) / compute


def prior_draws(pair: FirstPrinciples, count: int) -> ServingModel:
    """``count`` serving models, with efficiencies and the sharing of the engine drawn from their priors: one model with
    a leading axis."""
    models = jax.vmap(lambda efficiency: serving_model(pair, efficiency))(draws(Efficiency(), SPREAD, count))
    shared = get_parameters(draws(serving_model(pair), SERVING_SPREAD, count, seed=1))
    return set_parameters(models, {path: shared[path] for path in SERVING_SPREAD})


def unmeasured_deployment(pair: FirstPrinciples, plan: MemoryPlan) -> FittedDeployment:
    """The pair as a deployment that nothing was fitted to; its KV cache is what the plan leaves."""
    defaults: dict[str, Any] = {KEY: pair.to_dict()} | known(pair)
    defaults["kv_capacity_tokens"] = max(plan.kv_capacity_tokens, 1.0)
    return FittedDeployment(
        name=pair.name,
        form="roofline-moe" if pair.verifier.is_moe else "roofline",
        serving=jax.tree.map(lambda leaf: np.asarray(leaf, dtype=float), serving_model(pair)),
        acceptance=None,
        defaults=defaults,
        measured={"draft_lengths": [0]},
        quality={"rows": 0},
    )


def expert_counts(pair: FirstPrinciples) -> tuple[float, float, float]:
    """(num_experts, experts_per_token, expert_ranks) as forms take them."""
    return float(pair.verifier.num_experts), float(pair.verifier.experts_per_token), 1.0


def started(form: Form, pair: FirstPrinciples) -> Form:
    """``form`` with its priors centred at first principles, where they tell the cost; others keep their centre."""
    told = known_costs(pair)
    known = {path: value for path, value in told.items() if path in form.paths}
    known["step_time.inefficiency"] = 1e-4  # first principles know the cost of many tokens
    known["prefill_interference"] = float(serving_model(pair).prefill_interference)
    centres = {path: jnp.asarray(float(value)) for path, value in known.items()}
    spread = [
        START_SPREAD.get(_BOUND.get(path, ""), float(sd)) if path in told else float(sd)
        for path, sd in zip(form.paths, form.spread, strict=True)
    ]
    return Form(form.name, form.paths, set_parameters(form.template, centres), jnp.asarray(spread))


def known_costs(pair: FirstPrinciples) -> dict[str, float]:
    """Costs that first principles know, by dotted path of a ServingModel."""
    values = get_parameters(serving_model(pair))
    return {path: float(values[path]) for path in _BOUND if path in values and float(values[path]) > 0}


def remember(pair: FirstPrinciples, serving: ServingModel) -> dict[str, Any]:
    """What a fitted deployment keeps: the pair, ``ratios`` (fitted over first principles, by parameter) and the
    ``efficiency`` that they mean: shares of peak bandwidth (memory, kv) and of the dense peak (compute)."""
    fitted, told = get_parameters(serving), known_costs(pair)
    ratios = {path: float(fitted[path]) / value for path, value in told.items()}
    prior = get_parameters(Efficiency())
    shares = {name: float(prior[name]) / ratios[path] for name, path in _SHARES.items() if path in ratios}
    return pair.to_dict() | {"ratios": ratios, "efficiency": shares}


def transfer(
    deployment: FittedDeployment, hardware: Accelerator, tensor_parallel: int | None = None
) -> tuple[FittedDeployment, dict[str, float]]:
    """A fitted deployment on other hardware, and the spread (log) of each of its parameters.

    Every cost is multiplied by first principles on the new hardware over those on the old: weights and cache by
    bandwidth, tokens by dense peak, overheads not at all; what tensor parallelism adds or saves likewise. The KV
    cache grows or shrinks as the memory plans do. What the fit found beyond first principles (its efficiency factors)
    is kept. Errors: :class:`InputError` for a model fitted without ``--verifier`` and ``--hardware``.
    """
    kept = deployment.defaults.get(KEY)
    if kept is None:
        raise InputError(
            f"deployment {deployment.name!r} does not know its architecture and hardware, so it cannot be transferred; "
            "fit again with --verifier config.json --hardware NAME"
        )
    old = FirstPrinciples.from_dict(kept)
    devices = old.tensor_parallel if tensor_parallel is None else tensor_parallel
    new = replace(old, hardware=hardware, tensor_parallel=devices)
    before, after = known_costs(old), known_costs(new)
    values = get_parameters(deployment.serving)
    scaled, spread = {}, {}
    for path, bound in _BOUND.items():
        if path not in values:
            continue
        source = path if path in before else _STAND_INS.get(path, path)
        ratio = after[source] / before[source] if source in before and source in after else 1.0
        scaled[path] = np.asarray(float(values[path]) * ratio)
        spread[path] = TRANSFER_SPREAD[bound]
    serving = set_parameters(deployment.serving, scaled)
    plans = memory_plan(old), memory_plan(new)
    defaults = deployment.defaults | {"hardware": hardware.name, KEY: kept | new.to_dict()}
    if plans[1].fits:
        measured = defaults.get("kv_capacity_tokens") or plans[0].kv_capacity_tokens
        scale = measured / plans[0].kv_capacity_tokens if plans[0].kv_capacity_tokens else 1.0
        defaults["kv_capacity_tokens"] = scale * plans[1].kv_capacity_tokens
    moved = f"{old.name} was measured; {new.name} is predicted from it by ratios of bandwidth and peak"
    told = replace(
        deployment,
        serving=serving,
        defaults=defaults,
        measured=_elsewhere(deployment.measured, old, new),
        warnings=[*deployment.warnings, moved],
        uncertainty=None,  # its errors are those of the ratios
    )
    return told, spread


def _elsewhere(measured: dict[str, Any], old: FirstPrinciples, new: FirstPrinciples) -> dict[str, Any]:
    """What was measured, with the ``hardware`` asked for and the one measured where they differ."""
    then, now = (f"{pair.tensor_parallel} x {pair.hardware.name}" for pair in (old, new))
    then = measured.get("hardware", {}).get("measured", then)
    kept = {name: span for name, span in measured.items() if name != "hardware"}
    return kept if then == now else kept | {"hardware": {"asked": now, "measured": then}}
