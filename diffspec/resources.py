"""Memory and energy of a verifier and its drafter: does the pair fit, how many sequences, how many joules a token."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from diffspec.architecture import Transformer
from diffspec.first_principles import IDEAL, FirstPrinciples
from diffspec.parameters import Scalar
from diffspec.step_time import AbstractStepTime, BatchState, scaled
from diffspec.workload import check_range

MEMORY_SHARE = 0.9
"""Share of device memory that an engine may use (vLLM: gpu_memory_utilization)."""
RESERVE_BYTES = 2e9
"""Device memory of the runtime, captured graphs and communication buffers [B]: a usual size, not a measurement."""
BATCHED_TOKENS = 8192
"""Tokens of the largest step, for which activations are held (vLLM: max_num_batched_tokens)."""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one device [B], and what is left for the KV cache.

    ``kv_capacity_tokens`` [tok] = free / bytes of a token of both, or what a drafter's own device holds, if that is
    less (``drafter_bytes`` and its cache are 0 here then); ``sequences`` [req]: how many requests of prompt_length +
    output_length tokens that is; ``missing_bytes``: by how much the weights and activations do not fit, else 0.
    """

    memory_bytes: float
    usable_bytes: float
    verifier_bytes: float
    drafter_bytes: float
    activation_bytes: float
    reserve_bytes: float
    kv_bytes_per_token: float
    drafter_kv_bytes_per_token: float
    free_bytes: float
    missing_bytes: float
    kv_capacity_tokens: float
    sequences: float
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class MemoryUse(NamedTuple):
    """What lies in the memory of one of the verifier's devices while it serves:

        memory [GB] = (weights + activations + runtime + tokens*kv bytes
                       + where it drafts: drafter weights*drafter_scale + tokens*drafter kv bytes) / 1e9
        tokens = min(tokens of the requests in flight, what the KV cache holds)

    ``fixed`` [B]: weights of the verifier, copies of experts among them, activations and the runtime; ``drafter`` [B];
    ``token``, ``drafter_token`` [B/tok]: of a cached token; ``most_tokens`` [tok]: what the cache holds. A full cache
    is :attr:`MemoryPlan.usable_bytes`; a drafter on a device of its own takes nothing here.
    """

    fixed: Scalar
    drafter: Scalar
    token: Scalar
    drafter_token: Scalar
    most_tokens: Scalar

    def gigabytes(self, tokens: Scalar, drafts: Any, drafter_scale: Scalar = 1.0):
        """Memory in use [GB, of 1e9 B] with so many ``tokens`` [tok] in flight; ``drafts``: whether any request does.

        >>> float(MemoryUse(17e9, 2e9, 1e5, 3e4, 4e5).gigabytes(1e5, True))
        32.0
        """
        drafting = jnp.where(drafts, 1.0, 0.0)
        held = jnp.minimum(tokens, self.most_tokens) * (self.token + drafting * self.drafter_token)
        return (self.fixed + drafting * self.drafter * drafter_scale + held) / 1e9


def activation_bytes(model: Transformer, batched_tokens: float, devices: int = 1) -> float:
    """Largest intermediate results of a step over ``batched_tokens`` [B], an estimate: 4 copies of the hidden state,
    the 3 of the widest MLP, queries, keys and values, all in 2 B numbers, and logits of 256 sequences in 4 B."""
    mlp = max(model.intermediate, model.experts_per_token * model.expert_intermediate + model.shared_intermediate, 1)
    attention = (model.heads + 2 * model.kv_heads) * model.head_dim
    per_token = 2.0 * (4 * model.hidden + (3 * mlp + attention) / devices)
    return batched_tokens * per_token + 256 * 4.0 * model.vocab / devices


def memory_plan(
    pair: FirstPrinciples,
    *,
    memory_share: float = MEMORY_SHARE,
    batched_tokens: float = BATCHED_TOKENS,
    copies_bytes: float = 0.0,
) -> MemoryPlan:
    """What fits on each of the pair's devices, with ``copies_bytes`` [B] of further copies of experts on each of the
    verifier's. A pair that does not fit is an answer: ``fits`` False, with numbers.

    Errors: :class:`InputError` for a share outside (0, 1] or tokens outside [1, 1e7].
    """
    check_range("memory_share", memory_share, 0, 1, low_open=True, unit="")
    check_range("batched_tokens", batched_tokens, 1, 1e7, low_open=False, unit="tok")
    devices = pair.tensor_parallel
    own = 0.0
    aside = pair.drafter_hardware is not None
    if pair.drafter is not None:
        own = pair.drafter.weight_bytes
        shared = pair.drafter.extra_weights and pair.drafter.vocab == pair.verifier.vocab
        if shared:  # a head that uses the verifier's embedding and head
            own -= pair.drafter.embedding_weights * pair.drafter.head_bits / 8.0
    usable = memory_share * pair.hardware.memory_bytes
    verifier = pair.verifier.weight_bytes / devices + copies_bytes
    active = activation_bytes(pair.verifier, batched_tokens, devices)
    per_token = pair.kv_bytes(pair.verifier)
    longest = pair.prompt_length + pair.output_length
    drafter_kv = 0.0
    if pair.drafter is not None:
        kept = 1.0 if pair.drafter_window is None else min(1.0, pair.drafter_window / longest)
        drafter_kv = kept * pair.drafter_host().kv_bytes(pair.drafter)
    beside = 0.0 if aside else own / devices
    free = usable - verifier - beside - active - RESERVE_BYTES
    tokens = max(free, 0.0) / (per_token + (0.0 if aside else drafter_kv))
    if pair.drafter is not None and pair.drafter_hardware is not None:
        there = memory_share * pair.drafter_hardware.memory_bytes - pair.drafter.weight_bytes
        there -= activation_bytes(pair.drafter, batched_tokens) + RESERVE_BYTES
        tokens = min(tokens, max(there, 0.0) / drafter_kv)
        free = free if there > 0 else min(free, there)
    return MemoryPlan(
        memory_bytes=pair.hardware.memory_bytes,
        usable_bytes=usable,
        verifier_bytes=verifier,
        drafter_bytes=beside,
        activation_bytes=active,
        reserve_bytes=RESERVE_BYTES,
        kv_bytes_per_token=per_token,
        drafter_kv_bytes_per_token=0.0 if aside else drafter_kv,
        free_bytes=max(free, 0.0),
        missing_bytes=max(-free, 0.0),
        kv_capacity_tokens=tokens,
        sequences=tokens / longest,
        fits=tokens >= longest,
    )


def energy_per_token(
    pair: FirstPrinciples,
    step: AbstractStepTime,
    state: BatchState,
    tokens_per_step,
    prefill_time,
    *,
    drafter_scale: Scalar = 1.0,
    prefill_tokens: Scalar | None = None,
):
    """(joules per output token [J], power of a decode step [W]) of all the pair's devices while they work.

        power  = idle + (limit - idle) * activity
        joules = devices * (power*step_time/(sequences*tokens_per_step) + prefill power*prefill_time/output_length)

    activity = time that the step would take at the data sheet's peaks (the longer of memory and compute, and drafting),
    over the time that it takes: a device that waits for launches draws idle power. Idle time between steps, and a
    device of the drafter's own, are not counted. ``drafter_scale`` [1]: what ``step`` has its drafter scaled by;
    ``prefill_tokens`` [tok]: of a prompt that are read in ``prefill_time`` [s], by default all. A stated model, not a
    measurement: expect errors of tens of percent.
    """
    ideal = scaled(pair.step_time(IDEAL), drafter=drafter_scale)
    memory = ideal.weight_read + ideal.kv_read * state.kv_tokens
    if ideal.experts is not None:
        memory = memory + ideal.experts.verify(state)
    busy = jnp.maximum(memory, ideal.token_compute * state.query_tokens)
    if pair.drafter_hardware is None:
        busy = busy + ideal(state).draft
    time = step(state).total
    low, span = pair.hardware.idle_power, pair.hardware.power_limit - pair.hardware.idle_power
    power = low + span * jnp.minimum(busy / time, 1.0)
    read = pair.prompt_length if prefill_tokens is None else prefill_tokens
    prompt = BatchState(prefill_tokens=read, draft_passes=state.draft_passes)
    prefill_power = low + span * jnp.minimum(ideal(prompt).prefill / prefill_time, 1.0)
    decode = power * time / (state.sequences * tokens_per_step)
    joules = pair.tensor_parallel * (decode + prefill_power * prefill_time / pair.output_length)
    return joules, pair.tensor_parallel * power
