"""Predictions that no measurement of their own stands behind: before any trace, or on other hardware than the fit's.

Both come with intervals: the whole prediction is repeated for draws of what is not known (efficiencies, or how well a
fit transfers), and the central 90 % of each metric are told. They say nothing of acceptance, which is as given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from diffspec.acceptance import AbstractAcceptance
from diffspec.analysis.answers import predict_answer
from diffspec.analysis.intervals import spread
from diffspec.analysis.plain import finite
from diffspec.configuration import Configuration
from diffspec.first_principles import SPREAD, Efficiency, FirstPrinciples, draws
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.principles import KEY, prior_draws, transfer, unmeasured_deployment
from diffspec.fitting.uncertainty import LEVEL
from diffspec.hardware import Accelerator
from diffspec.parameters import parameter_infos
from diffspec.resources import BATCHED_TOKENS, MEMORY_SHARE, RESERVE_BYTES, MemoryPlan, energy_per_token, memory_plan
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.step_time import AbstractStepTime, BatchState, scaled
from diffspec.workload import Workload

DRAWS = 128
VLLM_METHODS = {"model": "draft_model", "ngram": "ngram"}
"""Drafter kind -> method of vLLM's --speculative-config, where the kind tells it."""
DOES_NOT_FIT = "does_not_fit"
"""Outcome of a pair whose weights and activations leave no room for one request."""


@dataclass(frozen=True)
class Unmeasured:
    """A deployment that nothing was measured of: from first principles, or a fitted one moved to other hardware.

    ``deployment``: at the centre of what is not known; ``models()``: :data:`DRAWS` serving models drawn from it, one
    with a leading axis; ``plan``: what its memory holds; ``assumptions``: one line each
    """

    deployment: FittedDeployment
    pair: FirstPrinciples
    plan: MemoryPlan
    models: Callable[[], ServingModel]
    assumptions: list[str]

    def told(self) -> dict[str, Any]:
        """What every answer about it tells beside its own: ``memory`` and ``assumptions``."""
        return {"memory": self.plan.to_dict(), "assumptions": self.assumptions}


def before_traces(pair: FirstPrinciples, max_batched_tokens: float | None = None) -> Unmeasured:
    """The pair before any trace; ``max_batched_tokens`` [tok], where given, also bounds its activations."""
    tokens = BATCHED_TOKENS if max_batched_tokens is None else max_batched_tokens
    plan = memory_plan(pair, batched_tokens=tokens)
    deployment = unmeasured_deployment(pair, plan)
    deployment.defaults["method"] = VLLM_METHODS.get(pair.drafter_kind)
    deployment.defaults["draft_probability"] = pair.draft_probability
    return Unmeasured(deployment, pair, plan, partial(prior_draws, pair, DRAWS), _assumptions(pair, tokens))


def moved(
    deployment: FittedDeployment,
    hardware: Accelerator,
    tensor_parallel: int | None = None,
    max_batched_tokens: float | None = None,
) -> Unmeasured:
    """A fitted deployment on other hardware (:func:`diffspec.fitting.principles.transfer`)."""
    there, errors = transfer(deployment, hardware, tensor_parallel)
    pair = FirstPrinciples.from_dict(there.defaults[KEY])
    tokens = BATCHED_TOKENS if max_batched_tokens is None else max_batched_tokens
    sizes = ", ".join(sorted({f"{sd:g}" for sd in errors.values()}))
    assumptions = [
        there.warnings[-1],
        f"log-normal errors of the ratios: {sizes} (bandwidth, peak, overheads)",
        *_assumptions(pair, tokens)[1:2],
    ]
    models = partial(draws, there.serving, errors, DRAWS)
    return Unmeasured(there, pair, memory_plan(pair, batched_tokens=tokens), models, assumptions)


def check_drafting(pair: FirstPrinciples, draft_length: float, acceptance: AbstractAcceptance | None) -> None:
    """Raise :class:`InputError` for drafting without a drafter or an acceptance."""
    if draft_length > 0 and not pair.drafter_kind:
        raise InputError(
            f"draft_length {draft_length:g} needs a drafter: give --drafter config.json, or --drafter-kind head, mtp, "
            "block or ngram"
        )
    if draft_length > 0 and acceptance is None:
        raise InputError(
            f"draft_length {draft_length:g} needs an acceptance, which no architecture tells: give --acceptance-rate, "
            "--tokens-per-step or --position-acceptance"
        )


def predict_unmeasured(
    subject: Unmeasured, workload: Workload, config: Configuration, *, percentile_intervals: bool = False
) -> dict[str, Any]:
    """:func:`diffspec.analysis.answers.predict_answer` over the draws of what is not known, with ``memory``,
    ``energy_per_token`` and ``assumptions``. Outcome ``does_not_fit`` where the memory of a device does not hold the
    weights and one request."""
    models, fits = subject.models(), subject.plan.fits
    asked = {"draws": models, "with_intervals": fits, "percentile_intervals": percentile_intervals}
    answer = predict_answer(subject.deployment, workload, config, **asked)
    if not fits:
        nothing = {"outcome": DOES_NOT_FIT, "intervals": None, "energy_per_token": None}
        return _nothing(answer) | nothing | subject.told()
    return answer | {
        "energy_per_token": _energy(subject.pair, subject.deployment.serving, workload, config, answer),
        **subject.told(),
    }


def predict_before_traces(
    pair: FirstPrinciples,
    workload: Workload,
    draft_length: float,
    *,
    acceptance: AbstractAcceptance | None = None,
    max_batch_size: float | None = None,
    max_batched_tokens: float | None = None,
) -> dict[str, Any]:
    """:func:`predict_unmeasured` from first principles alone. The numbers themselves are those at the centre of the
    priors. Errors: :class:`InputError` for drafting without drafter or acceptance.
    """
    check_drafting(pair, draft_length, acceptance)
    subject = before_traces(pair, max_batched_tokens)
    caps = {"max_batch_size": max_batch_size, "max_batched_tokens": max_batched_tokens}
    config = subject.deployment.configuration(float(draft_length), acceptance=acceptance, **caps)
    return predict_unmeasured(subject, workload, config)


def predict_transferred(
    deployment: FittedDeployment,
    workload: Workload,
    draft_length: float,
    hardware: Accelerator,
    *,
    tensor_parallel: int | None = None,
    acceptance: AbstractAcceptance | None = None,
    max_batch_size: float | None = None,
    max_batched_tokens: float | None = None,
) -> dict[str, Any]:
    """:func:`predict_unmeasured` of a fitted deployment on other hardware."""
    subject = moved(deployment, hardware, tensor_parallel, max_batched_tokens)
    caps = {"max_batch_size": max_batch_size, "max_batched_tokens": max_batched_tokens}
    config = subject.deployment.configuration(float(draft_length), acceptance=acceptance, **caps)
    return predict_unmeasured(subject, workload, config)


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


class Working(NamedTuple):
    """A server that works on ``n`` sequences: ``joules`` per output token [J], ``power`` of a decode step [W],
    ``tokens`` per step and sequence, and seconds of a ``step`` and of a ``prefill``."""

    joules: Any
    power: Any
    tokens: Any
    step: Any
    prefill: Any


def working(
    pair: FirstPrinciples, step_time: AbstractStepTime, workload: Workload, config: Configuration, n
) -> Working:
    """:func:`working_at` the step of one server with ``n`` [req] in service."""
    passes = drafted = config.draft_length * config.draft_probability
    tokens = jnp.ones_like(jnp.asarray(n, dtype=float))
    if config.acceptance is not None:
        tokens = config.acceptance.moments(config.draft_length, config.draft_probability)[0]
        drafted = config.acceptance.drafted_tokens(config.draft_length) * config.draft_probability
    state = BatchState.decoding(n, drafted, pair.context, passes)
    return working_at(
        pair, step_time, state, tokens, workload.prompt_length * (1.0 - workload.prefix_hit_rate), config.drafter_scale
    )


def working_at(
    pair: FirstPrinciples, step_time: AbstractStepTime, state: BatchState, tokens, prompt_tokens, drafter_scale
) -> Working:
    """:func:`diffspec.resources.energy_per_token` of a decode step of this ``state`` in which a sequence gains
    ``tokens`` [tok], and of a prompt of which ``prompt_tokens`` [tok] are read; traced or not."""
    step, read = scaled(step_time, drafter=drafter_scale), jnp.asarray(prompt_tokens, dtype=float)
    prefill = step(BatchState(prefill_tokens=read, draft_passes=state.draft_passes)).prefill
    told = {"drafter_scale": drafter_scale, "prefill_tokens": read}
    return Working(*energy_per_token(pair, step, state, tokens, prefill, **told), tokens, step(state).total, prefill)


def _energy(
    pair: FirstPrinciples, serving: ServingModel, workload: Workload, config: Configuration, answer
) -> dict[str, Any]:
    """Energy of an output token and power of a step at the predicted batch (at least one sequence)."""
    sequences = max(answer["effective_batch_size"] or 1.0, 1.0)
    found = working(pair, serving.step_time, workload, config, sequences)
    return {"joules": finite(found.joules), "power": finite(found.power), "sequences": sequences}


def _how_it_drafts(pair: FirstPrinciples) -> list[str]:
    lines = []
    if pair.draft_probability < 1 or pair.drafter is None:
        lines.append(f"share of steps that are drafted for: {pair.draft_probability:g}")
    if pair.drafter_window is not None:
        lines.append(f"the drafter attends to {pair.drafter_window:g} tok of each sequence")
    if pair.drafter_hardware is not None:
        lines.append(
            f"the drafter runs on {pair.drafter_hardware.name}, {pair.transfer_latency * 1e3:g} ms there and back each "
            "step; its prefill is hidden, its energy not counted"
        )
    if pair.draft_overlap > 0:
        lines.append(f"share of drafts that are made while the verifier verifies: {pair.draft_overlap:g}")
    return lines


def _assumptions(pair: FirstPrinciples, batched_tokens: float) -> list[str]:
    """What the prediction takes for granted, one line each."""
    infos = parameter_infos(Efficiency())
    drawn = draws(Efficiency(), SPREAD, DRAWS)
    device = pair.hardware
    lines = [
        f"no trace: what an engine reaches of the data sheet is a prior; intervals hold {LEVEL:.0%} of {DRAWS} draws",
        f"{device.name}: {device.memory_bandwidth / 1e12:g} TB/s, {device.flops('bf16') / 1e12:g} TFLOP/s (bf16, "
        f"dense), {device.power_limit:g} W ({device.source})",
        f"memory: {MEMORY_SHARE:.0%} of the device, of it {RESERVE_BYTES / 1e9:g} GB for the runtime, and activations "
        f"of {batched_tokens:g} tokens",
    ]
    for path, info in infos.items():
        told = spread(getattr(drawn, path))
        unit = "" if info.unit == "1" else f" {info.unit}"
        lines.append(f"{info.meaning}: {told['median']:.3g}{unit} ({told['low']:.3g} to {told['high']:.3g})")
    lines.append("how requests share prefill and first steps is a prior too")
    if pair.drafter_kind:
        lines.append(
            f"drafter: {pair.drafter_kind}, {pair.drafter.name if pair.drafter else 'no weights'}; "
            "acceptance is as given and in no interval"
        )
        lines += _how_it_drafts(pair)
    return [*lines, *pair.verifier.notes]
