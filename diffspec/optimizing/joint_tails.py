"""What a joint question looks at beyond means: tails of latency, goodput and energy of a point.

    tail of a limit on a percentile p = P(metric > bound), kept where it is at most 1 - p/100
    goodput = sum over classes of throughput_c * product over the limits on its requests of P(metric <= bound)
    energy = 1e6 * (joules while it works + idle power that a token waits for), of the mean step of all classes

A tail costs a fiftieth of a percentile, and has a derivative; percentiles themselves are found where one is the
objective, and of the points that are told. The laws are those of :func:`diffspec.percentiles.class_laws`, scaled to the
means of the classes.
"""

import json
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffspec.configuration import Configuration
from diffspec.first_principles import FirstPrinciples
from diffspec.lengths import Lengths
from diffspec.optimizing.every_length import KNOWN_UP_TO
from diffspec.optimizing.servers import MILLION, joules_with_idle
from diffspec.percentiles import class_laws
from diffspec.prediction import Prediction
from diffspec.request_mix import mean_step, request_mix
from diffspec.resources import energy_per_token
from diffspec.serving import ServingModel
from diffspec.step_time import BatchState, scaled
from diffspec.workload import Workload


def tail_name(place: int) -> str:
    """Where metrics keep the tail of the limit on a percentile at this place among all such limits."""
    return f"tail {place}"


def of_all(metric: str) -> str:
    """Where metrics keep a percentile of all requests, beside that of each class."""
    return f"{metric} of all"


def of_objective(metric: str) -> str:
    """Where metrics keep a percentile of all requests, shares times weights."""
    return f"{metric} of the objective"


class Tails(eqx.Module):
    """What is looked at: ``limits`` on percentiles as (class or None for all, metric), and their ``bounds`` [s];
    ``within``: limits on single requests likewise, with bounds ``within_bounds`` [s], where ``goodput`` is asked for;
    ``objective``: percentiles that are made small; ``told``: those to tell of each class and of all; ``pair_json``:
    architecture and hardware for energy, at the mean lengths of the classes. ``lengths``: laws with an axis of classes;
    ``states`` [req]: size of the chain.
    """

    lengths: Lengths
    bounds: Float[Array, "limits"]
    within_bounds: Float[Array, "within"]
    limits: tuple[tuple[int | None, str], ...] = eqx.field(static=True, default=())
    within: tuple[tuple[int | None, str], ...] = eqx.field(static=True, default=())
    objective: tuple[str, ...] = eqx.field(static=True, default=())
    told: tuple[str, ...] = eqx.field(static=True, default=())
    goodput: bool = eqx.field(static=True, default=False)
    states: int = eqx.field(static=True, default=256)
    pair_json: str | None = eqx.field(static=True, default=None)

    @property
    def spread(self) -> bool:
        """Whether more of latencies is asked for than their means."""
        return bool(self.limits or self.objective or self.told or self.goodput)

    def metrics(
        self,
        serving: ServingModel,
        workloads: Sequence[Workload],
        configs: Sequence[Configuration],
        found: Prediction,
        weight: Float[Array, "classes"],
    ) -> dict[str, Any]:
        """What is asked for by name, arrays [classes]; ``weight`` of each class's requests in the objective."""
        values: dict[str, Any] = {}
        batch = jnp.sum(found.effective_batch_size)
        if self.pair_json is not None:
            pair = FirstPrinciples.from_dict(json.loads(self.pair_json))
            joules = mixed_joules(pair, serving, workloads, configs, batch)
            values["energy"] = jnp.full(len(workloads), MILLION * joules)
        if not self.spread:
            return values
        laws = class_laws(serving, workloads, configs, self.lengths, states=self.states)
        laws = laws.at_means({"ttft": found.ttft, "e2e": found.e2e_latency})
        unknown = batch > KNOWN_UP_TO * self.states
        classes = len(workloads)

        def attained(number: int | None, metric: str, bound):
            share = laws.probability(metric, jnp.full(classes, bound))
            if number is None:
                weights = laws.weight[metric]
                return weights @ share / jnp.sum(weights)
            return share[number]

        for place, (number, metric) in enumerate(self.limits):
            tail = 1.0 - attained(number, metric, self.bounds[place])
            values[tail_name(place)] = jnp.full(classes, jnp.where(unknown, 1.0, tail))
        if self.goodput:
            share = jnp.ones(classes)
            for place, (number, metric) in enumerate(self.within):
                kept = laws.probability(metric, jnp.full(classes, self.within_bounds[place]))
                share = share * jnp.where(jnp.asarray([number in (None, c) for c in range(classes)]), kept, 1.0)
            values["goodput"] = found.throughput * jnp.where(unknown, 1e-12, jnp.maximum(share, 1e-12))

        def percentile(name: str, find):
            metric, percent = name.split("_p")
            value = find(metric, jnp.asarray([float(percent)]))[..., 0]
            return jnp.where(unknown, jnp.inf, jnp.broadcast_to(value, classes))

        for name in self.told:
            values[name] = percentile(name, laws.percentiles)
            values[of_all(name)] = percentile(name, laws.percentiles_of_all)
        for name in self.objective:
            values[of_objective(name)] = percentile(
                name, lambda metric, percents: laws.percentiles_of_all(metric, percents, weight)
            )
        return values


def mixed_joules(
    pair: FirstPrinciples,
    serving: ServingModel,
    workloads: Sequence[Workload],
    configs: Sequence[Configuration],
    batch,
):
    """Joules per output token [J] of one server of several classes with a mean ``batch`` [req] in service, idle power
    included: :func:`diffspec.optimizing.servers.joules` of the mean step and the mean request. ``pair``: of the mean
    lengths.
    """
    request = request_mix(serving.step_time, workloads, configs, serving.steps_form)
    step = scaled(serving.step_time, drafter=configs[0].drafter_scale)
    state, tokens = mean_step(request, workloads, configs, batch)
    read = request.mean(request.prompt_tokens)
    prefill = step(BatchState(prefill_tokens=read, draft_passes=state.draft_passes)).prefill
    told: dict[str, Any] = {"drafter_scale": configs[0].drafter_scale, "prefill_tokens": read}
    joules, _ = energy_per_token(pair, step, state, tokens, prefill, **told)
    rate = sum(jnp.asarray(workload.arrival_rate, dtype=float) for workload in workloads)
    output = request.mean(jnp.asarray([workload.output_length for workload in workloads], dtype=float))
    return joules_with_idle(
        pair, joules, output, rate, output / (state.sequences * tokens) * step(state).total + prefill
    )
