"""Requests of several classes that share a server: what a step works on, and what a request of each class costs.

Class c arrives at rate_c and takes steps_c engine steps. All classes share every step, so by Little's law, counted in
steps, a random sequence in a step is of class c with probability

    mix_c = rate_c*steps_c / sum over classes of rate*steps

and a request of class c that meets o others sees a step over o random sequences and itself. A drafter makes as many
passes as the longest draft among the sequences that are there, Poisson in number:

    passes_c(o) = integral over x of P(anybody drafts beyond x)
    P = 1 where draft_length_c > x, else 1 - exp(-o * sum of mix over the classes that do)

Other classes' prompts come evenly in time: of the o others each stands for the mean prompt, times this request's time
in service over the mean one (:meth:`diffspec.request_cost.RequestCost.foreign_prefill`). One class alone is the case of
:func:`diffspec.request_cost.request_cost`, to rounding. Derivation: ours; judged by the simulator in
tests/test_request_mix.py.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffspec.acceptance import StepsForm
from diffspec.configuration import Configuration
from diffspec.parameters import Scalar
from diffspec.request_cost import RequestCost, request_cost
from diffspec.results import InputError
from diffspec.step_time import AbstractStepTime, BatchState, scaled
from diffspec.workload import Workload

SERVER_WIDE = ("max_batch_size", "kv_capacity_tokens", "max_batched_tokens", "verifier_scale", "drafter_scale")
"""Fields of a configuration that all classes share; those of the first class are taken."""


def request_mix(
    step_time: AbstractStepTime, workloads: Sequence[Workload], configs: Sequence[Configuration], steps_form: StepsForm
) -> RequestCost:
    """The cost of a request of each class, with an axis of classes, in the company of all.

    Each class has its own lengths, arrival rate, draft length and acceptance; what :data:`SERVER_WIDE` names is the
    server's. Errors: :class:`InputError` for no class, another number of configurations, or a closed loop.
    """
    if not workloads or len(workloads) != len(configs):
        raise InputError(
            f"classes: got {len(workloads)} workloads and {len(configs)} configurations; allowed: one each"
        )
    if not all(workload.is_open for workload in workloads):
        raise InputError("classes: got a closed loop (concurrency); allowed: an arrival_rate for each class")
    if any(workload.n_requests is not None for workload in workloads):
        raise InputError("classes: got a finite run (n_requests); allowed: a steady state, n_requests None")
    each = [
        request_cost(step_time, workload, config, steps_form)
        for workload, config in zip(workloads, configs, strict=True)
    ]

    rates = _column([workload.arrival_rate for workload in workloads])
    steps, query = _column([cost.steps for cost in each]), _column([cost.query_tokens for cost in each])
    context = _contexts(workloads)
    mix = rates * steps / jnp.maximum(jnp.sum(rates * steps), 1e-30)
    shared = scaled(step_time, verifier=configs[0].verifier_scale, drafter=configs[0].drafter_scale)
    ordered, beyond = _drafts(configs)

    def passes(others):
        """[classes] draft passes of a step over so many others and one of the class."""
        anybody = -jnp.expm1(-others[:, None] * jnp.sum(jnp.where(beyond, mix, 0.0), axis=1))
        return jnp.where(beyond.T, 1.0, anybody) @ jnp.diff(ordered, prepend=0.0)

    def step_parts(sequences):
        """[classes] parts of a step over so many decoding sequences, one of them of the class."""
        sequences = jnp.broadcast_to(sequences, rates.shape)
        others = jnp.maximum(sequences - 1.0, 0.0)
        own = sequences - others

        def of_class(others, own, query_tokens, held, passes):
            return shared(
                BatchState(
                    sequences=others + own,
                    query_tokens=others * (mix @ query) + own * query_tokens,
                    kv_tokens=others * (mix @ context) + own * held,
                    draft_passes=passes,
                    draft_tokens=others * (mix @ (query - 1.0)) + own * (query_tokens - 1.0),
                )
            )

        return jax.vmap(of_class)(others, own, query, context, passes(others))

    return RequestCost(
        prefill=_column([cost.prefill for cost in each]),
        steps=steps,
        tokens_per_step=_column([cost.tokens_per_step for cost in each]),
        spread=_column([cost.spread for cost in each]),
        moments=(_column([cost.moments[0] for cost in each]), _column([cost.moments[1] for cost in each])),
        step_parts=step_parts,
        prompt_tokens=_column([cost.prompt_tokens for cost in each]),
        query_tokens=query,
        budget=each[0].budget,
        share=rates / jnp.sum(rates),
    )


def mean_step(
    request: RequestCost, workloads: Sequence[Workload], configs: Sequence[Configuration], batch
) -> tuple[BatchState, Scalar]:
    """(the mean step while anybody is there, tokens [tok] that a sequence gains in it) of the cost of
    :func:`request_mix`, with ``batch`` [req] decoding on average, Poisson in number and of random classes.

    sequences = batch/(1 - exp(-batch)), and the drafter goes beyond x where anybody drafts that far:
    P = (1 - exp(-batch*share of those that do))/(1 - exp(-batch)).
    """
    mix = request.mix
    ordered, beyond = _drafts(configs)
    batch = jnp.maximum(batch, 1e-9)
    busy = -jnp.expm1(-batch)
    anybody = -jnp.expm1(-batch * jnp.sum(jnp.where(beyond, mix, 0.0), axis=1)) / busy
    sequences, query = batch / busy, mix @ request.query_tokens
    state = BatchState(
        sequences=sequences,
        query_tokens=sequences * query,
        kv_tokens=sequences * (mix @ _contexts(workloads)),
        draft_passes=anybody @ jnp.diff(ordered, prepend=0.0),
        draft_tokens=sequences * (query - 1.0),
    )
    return state, mix @ request.tokens_per_step


def _column(values):
    return jnp.stack([jnp.asarray(value, dtype=float) for value in values])


def _contexts(workloads: Sequence[Workload]):
    """[classes] cached tokens of a decoding sequence."""
    return _column([workload.held_tokens for workload in workloads])


def _drafts(configs: Sequence[Configuration]):
    """(the classes' draft passes in increasing order, [draft length, class] which of them drafts that far)."""
    longest = _column([jnp.asarray(c.draft_length, dtype=float) * c.draft_probability for c in configs])
    ordered = jnp.sort(longest)
    return ordered, longest[None, :] >= ordered[:, None]


def mean_workload(workloads: Sequence[Workload], mix) -> Workload:
    """One workload of the means over a random sequence in service: ``mix`` [classes] of each class."""

    def mean(name):
        values = jnp.stack([jnp.asarray(getattr(workload, name), dtype=float) for workload in workloads])
        return mix @ values

    names = ("prompt_length", "output_length", "output_scv", "prefix_hit_rate")
    rate = sum(jnp.asarray(workload.arrival_rate, dtype=float) for workload in workloads)
    return Workload(**{name: mean(name) for name in names}, arrival_rate=rate)
