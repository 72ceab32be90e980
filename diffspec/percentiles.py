"""Waiting and percentiles of a deployment: :mod:`diffspec.latency_distribution` over what a request costs on it."""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffspec.acceptance import AbstractPositionwise
from diffspec.configuration import Configuration, batch_cap
from diffspec.latency_distribution import PERCENTILES, LatencyDistribution, Pace, latency_distribution
from diffspec.lengths import Lengths
from diffspec.parameters import Scalar
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.steady_state import SATURATION_MARGIN
from diffspec.workload import Workload

STATES = (64, 256, 1024, 2048)
"""Sizes of the chain that are compiled; the smallest that holds the cap, or thrice the batch, is taken."""


def states_for(cap: float | None, batch: float) -> int:
    """How many batches the chain must tell apart for a cap, or for a mean batch where there is none."""
    need = batch + 12.0 * batch**0.5 + 16.0 if cap is None else min(cap, batch + 12.0 * batch**0.5 + 64.0)
    return next((size for size in STATES if size >= need), STATES[-1])


def predict_distribution(
    model: ServingModel,
    workload: Workload,
    config: Configuration,
    lengths: Lengths,
    *,
    states: int = 256,
    percentiles: tuple[float, ...] = PERCENTILES,
    at: Mapping[str, Float[Array, "times"]] | None = None,
    means: Mapping[str, Scalar] | None = None,
) -> LatencyDistribution:
    """Waiting, means and percentiles of ttft, tpot, itl and e2e [s] in an open loop.

    ``lengths``: the law of output lengths (workload.output_scv is not looked at); ``states``: static size of the chain,
    at least the cap (see :func:`states_for`). ``first_token_steps`` counts the step that carries the prompt, during
    which its place is held, and half as much before it begins. Above 0.999 of capacity the numbers are those there.
    ``at``, ``means``: times [s] by metric whose probability is told too, and the means to scale to
    (:func:`diffspec.latency_distribution.latency_distribution`).
    Errors: :class:`InputError` for a closed loop.

    >>> from diffspec.step_time import AffineStepTime
    >>> model = ServingModel(AffineStepTime(verify_base=0.02, prefill_token=1e-6), first_token_steps=1.5)
    >>> load = Workload(prompt_length=10, output_length=101, arrival_rate=3.0)
    >>> found = predict_distribution(model, load, Configuration(max_batch_size=8), Lengths.fixed(), states=64)
    >>> round(float(found.requests.waiting_probability), 2), bool(found.e2e[2] > found.e2e_mean > 2.0)
    (0.37, True)
    """
    if not workload.is_open:
        raise InputError("percentiles are those of an open loop: give arrival_rate instead of concurrency")
    workload = eqx.tree_at(lambda w: w.output_scv, workload, lengths.scv())
    request = model.request_cost(workload, config)
    cap = batch_cap(workload, config)
    number = jnp.arange(1, states + 1, dtype=jnp.result_type(float))
    cap = jnp.asarray(float(states)) if cap is None else jnp.minimum(cap, float(states))
    served = jnp.minimum(number, cap)
    first = jnp.asarray(model.first_token_steps / 1.5, dtype=float)
    busy = jnp.minimum(served - 1.0, 1.0)
    chunks = jax.vmap(request.chunks)(served - 1.0)
    # one of the steps during which a place is held carries the prompt: that many fewer decode at a time
    shared = (first + chunks) * busy
    decoding = served * request.steps / jnp.maximum(request.steps + shared, 1e-9)
    step = jax.vmap(lambda sequences: request.step_parts(sequences).total)(jnp.maximum(decoding, 1e-3))
    foreign = request.prefill * model.prefill_interference * (served - 1.0)
    residence = model.request_overhead + request.prefill + foreign + (request.steps + shared) * step
    m1, m2 = request.moments
    capacity = served[-1] / residence[-1]
    prompt_service = None
    if config.max_batched_tokens is not None:
        prompt_service = jax.vmap(request.prompt_service)(served)
        capacity = jnp.minimum(capacity, 1.0 / request.prompt_service(request.most_decoding))
    rate = jnp.asarray(workload.arrival_rate, dtype=float)
    return latency_distribution(
        Pace(
            residence=residence,
            step=step,
            prefill=request.prefill,
            overhead=jnp.asarray(model.request_overhead, dtype=float),
            steps=request.steps,
            tokens_per_step=m1,
            tokens_square=m2,
            first_steps=first,
            chunk_steps=chunks,
            interference=jnp.asarray(model.prefill_interference, dtype=float),
            prompt_service=prompt_service,
            tokens_pmf=_pmf(config),
        ),
        jnp.minimum(rate, (1.0 - SATURATION_MARGIN) * capacity),
        jnp.asarray(workload.output_length, dtype=float),
        lengths,
        cap=cap,
        arrival_scv=workload.arrival_scv,
        percentiles=percentiles,
        at=at,
        means=means,
    )


def _pmf(config: Configuration):
    """P(tokens = j + 1) of a step; None for an acceptance that knows only its moments."""
    if config.acceptance is None:
        return jnp.ones(1, dtype=float)
    if not isinstance(config.acceptance, AbstractPositionwise):
        return None
    return config.acceptance.pmf(jnp.asarray(config.draft_length, dtype=float), config.draft_probability)
