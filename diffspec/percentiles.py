"""Waiting and percentiles of a deployment: :mod:`diffspec.latency_distribution` over what a request costs on it."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffspec.acceptance import AbstractPositionwise
from diffspec.company import Company, Pace, steps_law
from diffspec.configuration import Configuration, batch_cap
from diffspec.latency_distribution import PERCENTILES, LatencyDistribution, latency_distribution
from diffspec.latency_laws import ClassLaws, latency_laws
from diffspec.lengths import Lengths
from diffspec.parameters import Scalar
from diffspec.request_cost import RequestCost
from diffspec.request_mix import mean_workload, request_mix
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


def known_up_to(states: int, cap: Scalar | None) -> Scalar:
    """Mean batch [req] up to which a chain of so many states has percentiles: any where it is as long as the ``cap``
    on the batch [req], else 0.9 of the chain, of which a part is cut off.

    >>> [float(known_up_to(64, cap)) for cap in (None, 64.0, 1e6)]
    [57.6, inf, 57.6]
    """
    most = 0.9 * states
    return most if cap is None else jnp.where(jnp.asarray(cap, dtype=float) <= states, jnp.inf, most)


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
    cap = _places(batch_cap(workload, config), states)
    rate = jnp.asarray(workload.arrival_rate, dtype=float)
    own, company = _met(model, request, rate, cap, states)
    pace = Pace(**own, tokens_pmf=_pmf(config))
    law = steps_law(pace, jnp.asarray(workload.output_length, dtype=float), lengths)
    scv = law.square / jnp.maximum(pace.steps, 1e-12) ** 2 - 1.0
    company = company(steps=law.steps, share=law.share, service_scv=scv)
    laws = latency_laws(pace, law, company, cap=cap, arrival_scv=workload.arrival_scv)
    return latency_distribution(laws, percentiles=percentiles, at=at, means=means)


def class_laws(
    model: ServingModel,
    workloads: Sequence[Workload],
    configs: Sequence[Configuration],
    lengths: Lengths,
    *,
    states: int = 256,
) -> ClassLaws:
    """The laws of latency of several classes that share the server in open loops (:mod:`diffspec.request_mix`).

    ``lengths``: the laws of output lengths, with a leading axis of classes (:meth:`diffspec.lengths.Lengths.stacked`);
    ``states`` as in :func:`predict_distribution`. A request of a class is in the company of all: the chain is that of
    the mean time in service, its own pace that of its class, and others' prompts count by their mean and spread. Scale
    the laws to the means of :meth:`diffspec.serving.ServingModel.predict_classes` with
    :meth:`diffspec.latency_laws.ClassLaws.at_means`. Derivation: ours; judged by the simulator in
    tests/test_request_mix.py.

    >>> from diffspec.step_time import AffineStepTime
    >>> model = ServingModel(AffineStepTime(verify_base=0.02, verify_sequence=1e-3, prefill_token=1e-4))
    >>> both = [Workload(100, 51, arrival_rate=1.0), Workload(2000, 21, arrival_rate=0.5)]  # chat, summaries
    >>> def in_time(model):
    ...     laws = class_laws(model, both, [Configuration()] * 2, Lengths.stacked([0.0, 0.0]), states=64)
    ...     return laws.probability("e2e", jnp.full(2, 1.5))
    >>> [round(float(share), 2) for share in jax.jit(in_time)(model)]
    [0.78, 1.0]
    """
    own = [
        eqx.tree_at(lambda w: w.output_scv, workload, lengths.of(place).scv())
        for place, workload in enumerate(workloads)
    ]
    request = request_mix(model.step_time, own, configs, model.steps_form)
    share: Any = request.share
    cap = _places(batch_cap(mean_workload(own, request.mix), configs[0]), states)
    rate = sum(jnp.asarray(workload.arrival_rate, dtype=float) for workload in workloads)
    found = [_pmf(config) for config in configs]
    longest = max(0 if one is None else len(one) for one in found)
    pmf = None
    if not any(one is None for one in found):
        pmf = jnp.stack([jnp.pad(one, (0, longest - len(one))) for one in found])  # type: ignore[arg-type]
    pace, company = _met(model, request, rate, cap, states)
    pace = {name: jnp.broadcast_to(value, (*value.shape[:-1], *share.shape)).T for name, value in pace.items()}
    pace |= {} if pmf is None else {"tokens_pmf": pmf}
    output = jnp.asarray([workload.output_length for workload in workloads], dtype=float)
    law = jax.vmap(lambda pace, output, lengths: steps_law(Pace(**pace), output, lengths))(pace, output, lengths)
    full = pace["residence"][:, -1]
    steps = jnp.where(request.steps > 0, request.steps, 1.0)
    squares = full**2 * jnp.where(request.steps > 0, jax.vmap(lambda law: law.square)(law) / steps**2, 1.0)
    company = company(
        steps=law.steps.ravel(),
        share=(share[:, None] * law.share).ravel(),
        service_scv=request.mean(squares) / request.mean(full) ** 2 - 1.0,
    )
    each = jax.vmap(lambda pace, law: latency_laws(Pace(**pace), law, company, cap=cap))(pace, law)
    decoding = share * jnp.sum(jnp.where(law.tokens > 1.5, law.share, 0.0), axis=1)
    weights = {"ttft": share, "tpot": decoding, "itl": share * request.steps, "e2e": share}
    return ClassLaws(each, weights)


def _places(cap: Scalar | None, states: int) -> Scalar:
    """The batch cap [req] that the chain has, its size at most."""
    return jnp.asarray(float(states)) if cap is None else jnp.minimum(cap, float(states))


def _met(model: ServingModel, request: RequestCost, rate: Scalar, cap: Scalar, states: int):
    """(fields of the pace of a request, the company that it is in) by the number in service, of one class or with an
    axis of classes behind that of the number; the company wants ``steps``, their ``share`` and ``service_scv`` yet."""
    first = jnp.asarray(model.first_token_steps / 1.5, dtype=float)
    overhead = jnp.asarray(model.request_overhead, dtype=float)
    interference = jnp.asarray(model.prefill_interference, dtype=float)
    prompts = request.mean(request.prefill)
    size = request.mean(request.prefill**2) / jnp.maximum(prompts, 1e-30)

    def at(n):
        """What is met with n in service. One of the steps during which a place is held carries the prompt: that many
        fewer decode at a time."""
        chunks = request.chunks(n - 1.0) * jnp.ones_like(request.steps)
        shared = (first + chunks) * jnp.minimum(n - 1.0, 1.0)
        decoding = n * request.steps / jnp.maximum(request.steps + shared, 1e-9)
        step = request.step_parts(jnp.maximum(decoding, 1e-3)).total
        own = overhead + request.prefill + (request.steps + shared) * step
        residence = own + request.foreign_prefill(own, interference * (n - 1.0))
        of_all = (
            request.mean(residence),
            request.mean(request.steps * step) / jnp.maximum(request.mean(request.steps), 1e-12),
            request.mean(request.prefill * chunks) / jnp.maximum(prompts, 1e-30),
        )
        if request.budget is None:
            return (residence, step, chunks), of_all, None
        service = request.prompt_service(n)
        return (residence, step, chunks), of_all, (request.mean(service), request.mean(service**2))

    served = jnp.minimum(jnp.arange(1, states + 1, dtype=jnp.result_type(float)), cap)
    (residence, step, chunks), (mean_residence, mean_step, mean_chunks), service = jax.vmap(at)(served)
    capacity, budget = served[-1] / mean_residence[-1], {}
    if service is not None:
        budget = {"prompt_service": service[0], "prompt_service_square": service[1][-1] / service[0][-1] ** 2}
        capacity = jnp.minimum(capacity, 1.0 / request.mean(request.prompt_service(request.most_decoding)))
    rate = jnp.minimum(rate, (1.0 - SATURATION_MARGIN) * capacity)
    pace: dict[str, Any] = {
        "residence": residence,
        "step": step,
        "prefill": request.prefill,
        "overhead": overhead,
        "steps": request.steps,
        "tokens_per_step": request.moments[0],
        "tokens_square": request.moments[1],
        "first_steps": first,
        "chunk_steps": chunks,
    }
    company = partial(
        Company,
        residence=mean_residence,
        step=mean_step,
        arrival_rate=rate,
        foreign=size * interference,
        prompt_rate=rate * prompts / jnp.maximum(size, 1e-30),
        chunk_steps=mean_chunks,
        prefill=prompts,
        **budget,
    )
    return pace, company


def _pmf(config: Configuration):
    """P(tokens = j + 1) of a step; None for an acceptance that knows only its moments."""
    if config.acceptance is None:
        return jnp.ones(1, dtype=float)
    if not isinstance(config.acceptance, AbstractPositionwise):
        return None
    return config.acceptance.pmf(jnp.asarray(config.draft_length, dtype=float), config.draft_probability)
