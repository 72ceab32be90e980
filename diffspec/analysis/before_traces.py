"""Predictions that no measurement of their own stands behind: before any trace, or on other hardware than the fit's.

Both come with intervals: the whole prediction is repeated for draws of what is not known (efficiencies, or how well a
fit transfers), and the central 90 % of each metric are told. They say nothing of acceptance, which is as given.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import AbstractAcceptance
from diffspec.analysis.answers import FAST_COMPILE, finite, predict_answer
from diffspec.configuration import Configuration
from diffspec.first_principles import SPREAD, Efficiency, FirstPrinciples, draws
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.principles import KEY, prior_draws, transfer, unmeasured_deployment
from diffspec.hardware import Accelerator
from diffspec.parameters import parameter_infos
from diffspec.resources import BATCHED_TOKENS, MEMORY_SHARE, RESERVE_BYTES, energy_per_token, memory_plan
from diffspec.results import RESULTS, InputError
from diffspec.serving import ServingModel
from diffspec.step_time import BatchState
from diffspec.workload import Workload

DRAWS, LEVEL = 128, 0.9
_LATENCIES = ("ttft", "itl", "tpot", "e2e_latency")
METRICS = (*_LATENCIES, "throughput", "capacity", "utilization", "effective_batch_size", "speedup")
"""Metrics that come with an interval."""
DOES_NOT_FIT = "does_not_fit"
"""Outcome of a pair whose weights and activations leave no room for one request."""


@partial(jax.jit, compiler_options=FAST_COMPILE)
def _predict_draws(models: ServingModel, workload: Workload, config: Configuration):
    plain = eqx.tree_at(lambda c: c.draft_length, config, jnp.zeros_like(jnp.asarray(config.draft_length)))

    def one(model):
        fast, slow = model.predict(workload, config), model.predict(workload, plain)
        saturated = fast.result == RESULTS.saturated
        found = {name: getattr(fast, name) for name in METRICS if name != "speedup"}
        found |= {name: jnp.where(saturated, jnp.inf, found[name]) for name in _LATENCIES}
        return found | {"speedup": slow.e2e_latency / fast.e2e_latency, "saturated": saturated}

    return jax.vmap(one)(models)


def intervals(models: ServingModel, workload: Workload, config: Configuration) -> dict[str, Any]:
    """The central :data:`LEVEL` of each metric over a batch of models: ``metrics[name]`` = low, median, high (None
    where infinite: a saturated draw has no finite latency), and the share of draws that saturate."""
    as_float = partial(np.asarray, dtype=float)  # one compiled program for models of one structure
    models, workload, config = (jax.tree.map(as_float, part) for part in (models, workload, config))
    found = {name: np.asarray(values) for name, values in _predict_draws(models, workload, config).items()}
    saturated = found.pop("saturated")
    if float(config.draft_length) == 0:
        del found["speedup"]
    return {
        "level": LEVEL,
        "draws": int(saturated.size),
        "saturated_share": float(saturated.mean()),
        "metrics": {name: _spread(values) for name, values in found.items()},
    }


def _spread(values) -> dict[str, float | None]:
    edges = (0.5 - LEVEL / 2, 0.5, 0.5 + LEVEL / 2)
    low, median, high = np.quantile(np.asarray(values), edges, method="nearest")  # infinite ones cannot be averaged
    return {"low": finite(low), "median": finite(median), "high": finite(high)}


def predict_before_traces(
    pair: FirstPrinciples,
    workload: Workload,
    draft_length: float,
    *,
    acceptance: AbstractAcceptance | None = None,
    max_batch_size: float | None = None,
) -> dict[str, Any]:
    """:func:`diffspec.analysis.answers.predict_answer` from first principles alone, with ``intervals``, the ``memory``
    plan, ``energy_per_token`` and ``assumptions``.

    The numbers themselves are those at the centre of the priors. Outcome ``does_not_fit`` where the memory of a device
    does not hold the weights and one request. Errors: :class:`InputError` for drafting without drafter or acceptance.
    """
    if draft_length > 0 and not pair.drafter_kind:
        raise InputError(
            f"draft_length {draft_length:g} needs a drafter: give --drafter config.json, or --drafter-kind head, block "
            "or ngram"
        )
    if draft_length > 0 and acceptance is None:
        raise InputError(
            f"draft_length {draft_length:g} needs an acceptance, which no architecture tells: give --acceptance-rate, "
            "--tokens-per-step or --position-acceptance"
        )
    plan = memory_plan(pair)
    deployment = unmeasured_deployment(pair, plan)
    config = deployment.configuration(float(draft_length), acceptance=acceptance, max_batch_size=max_batch_size)
    told = {"memory": plan.to_dict(), "assumptions": _assumptions(pair)}
    answer = predict_answer(deployment, workload, config)
    if not plan.fits:
        return _nothing(answer) | {"outcome": DOES_NOT_FIT, "intervals": None, "energy_per_token": None} | told
    return answer | {
        "intervals": intervals(prior_draws(pair, DRAWS), workload, config),
        "energy_per_token": _energy(pair, deployment.serving, config, answer),
        **told,
    }


def predict_transferred(
    deployment: FittedDeployment,
    workload: Workload,
    draft_length: float,
    hardware: Accelerator,
    *,
    tensor_parallel: int | None = None,
    acceptance: AbstractAcceptance | None = None,
    max_batch_size: float | None = None,
) -> dict[str, Any]:
    """:func:`predict_answer` of a fitted deployment on other hardware; keys as :func:`predict_before_traces`."""
    moved, spread = transfer(deployment, hardware, tensor_parallel)
    pair = FirstPrinciples.from_dict(moved.defaults[KEY])
    plan = memory_plan(pair)
    config = moved.configuration(float(draft_length), acceptance=acceptance, max_batch_size=max_batch_size)
    answer = predict_answer(moved, workload, config)
    told = {
        "memory": plan.to_dict(),
        "assumptions": [
            moved.warnings[-1],
            f"log-normal errors of the ratios: {', '.join(sorted({f'{sd:g}' for sd in spread.values()}))} "
            "(bandwidth, peak, overheads)",
            *_assumptions(pair)[1:2],
        ],
    }
    if not plan.fits:
        return _nothing(answer) | {"outcome": DOES_NOT_FIT, "intervals": None, "energy_per_token": None} | told
    return answer | {
        "intervals": intervals(draws(moved.serving, spread, DRAWS), workload, config),
        "energy_per_token": _energy(pair, moved.serving, config, answer),
        **told,
    }


def _nothing(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer with every number taken away."""
    empty = {name: None for name, value in answer.items() if isinstance(value, float) and name != "draft_length"}
    stages = {stage: dict.fromkeys(parts) for stage, parts in answer["decomposition"].items()}
    reason = "verifier and drafter do not fit into the memory of the device"
    plain = dict.fromkeys(answer["plain"]) | {"outcome": DOES_NOT_FIT}
    return (
        answer
        | empty
        | {
            "decomposition": stages,
            "percentiles": None,
            "plain": plain,
            "speedup_reason": reason,
            "breakeven_reason": reason,
            "warnings": [],
        }
    )


def _energy(pair: FirstPrinciples, serving: ServingModel, config: Configuration, answer) -> dict[str, Any]:
    """Energy of an output token and power of a step at the predicted batch (at least one sequence)."""
    sequences = max(answer["effective_batch_size"] or 1.0, 1.0)
    drafted = float(config.draft_length) * float(config.draft_probability)
    state = BatchState(
        sequences=sequences,
        query_tokens=sequences * (1.0 + drafted),
        kv_tokens=sequences * pair.context,
        draft_passes=drafted,
        draft_tokens=sequences * drafted,
    )
    prompt = BatchState(prefill_tokens=pair.prompt_length, draft_passes=drafted)
    step = serving.step_time
    joules, power = energy_per_token(pair, step, state, answer["tokens_per_step"], step(prompt).prefill)  # type: ignore[arg-type]
    return {"joules": finite(joules), "power": finite(power), "sequences": sequences}


def _assumptions(pair: FirstPrinciples) -> list[str]:
    """What the prediction takes for granted, one line each."""
    infos = parameter_infos(Efficiency())
    drawn = draws(Efficiency(), SPREAD, DRAWS)
    device = pair.hardware
    lines = [
        f"no trace: what an engine reaches of the data sheet is a prior; intervals hold {LEVEL:.0%} of {DRAWS} draws",
        f"{device.name}: {device.memory_bandwidth / 1e12:g} TB/s, {device.flops('bf16') / 1e12:g} TFLOP/s (bf16, "
        f"dense), {device.power_limit:g} W ({device.source})",
        f"memory: {MEMORY_SHARE:.0%} of the device, of it {RESERVE_BYTES / 1e9:g} GB for the runtime, and activations "
        f"of {BATCHED_TOKENS} tokens",
    ]
    for path, info in infos.items():
        spread = _spread(getattr(drawn, path))
        unit = "" if info.unit == "1" else f" {info.unit}"
        lines.append(f"{info.meaning}: {spread['median']:.3g}{unit} ({spread['low']:.3g} to {spread['high']:.3g})")
    lines.append("how requests share prefill and first steps is a prior too")
    if pair.drafter_kind:
        lines.append(
            f"drafter: {pair.drafter_kind}, {pair.drafter.name if pair.drafter else 'no weights'}; "
            "acceptance is as given and in no interval"
        )
    return [*lines, *pair.verifier.notes]
