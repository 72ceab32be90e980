"""What a joint question looks at beyond means: tails of latency, goodput and energy of a point.

    tail of a limit on a percentile p = P(metric > bound), kept where it is at most 1 - p/100
    goodput = sum over classes of throughput_c * product over the limits on its requests of P(metric <= bound)
    energy = 1e6 * (joules while it works + idle power that a token waits for), of the mean step of all classes

A tail asks the law once, a percentile 45 times (bisection); percentiles themselves are found where one is the
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
from diffspec.optimizing.servers import MILLION, joules_of_classes
from diffspec.percentiles import class_laws, known_up_to
from diffspec.prediction import Prediction
from diffspec.serving import ServingModel
from diffspec.workload import Workload


def tail_name(place: int) -> str:
    """Where metrics keep the tail of the limit on a percentile at this place among all such limits."""
    return f"tail {place}"


UNKNOWN = "whether unknown"
"""Where metrics keep whether a mean batch is beyond what percentiles are computed for."""


def of_all(metric: str) -> str:
    """Where metrics keep a percentile of all requests, beside that of each class."""
    return f"{metric} of all"


def of_objective(metric: str) -> str:
    """Where metrics keep a percentile of all requests, shares times weights."""
    return f"{metric} of the objective"


class Tails(eqx.Module):
    """What is looked at: ``limits`` on percentiles as (class or None for all, metric), and their ``bounds`` [s];
    ``within``: the metrics of limits on single requests, which goodput counts, with bounds ``within_bounds`` [s] for
    each class, infinite where it has none; ``objective``: percentiles that are made small; ``told``: those to tell of
    each class and of all; ``pair_json``: architecture and hardware for energy, at the mean lengths of the classes.
    ``lengths``: laws with an axis of classes; ``states`` [req]: size of the chain.
    """

    lengths: Lengths
    bounds: Float[Array, "limits"]
    within_bounds: Float[Array, "within classes"]
    limits: tuple[tuple[int | None, str], ...] = eqx.field(static=True, default=())
    within: tuple[str, ...] = eqx.field(static=True, default=())
    objective: tuple[str, ...] = eqx.field(static=True, default=())
    told: tuple[str, ...] = eqx.field(static=True, default=())
    states: int = eqx.field(static=True, default=256)
    pair_json: str | None = eqx.field(static=True, default=None)

    @property
    def spread(self) -> bool:
        """Whether more of latencies is asked for than their means."""
        return bool(self.limits or self.objective or self.told or self.within)

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
            joules = joules_of_classes(pair, serving, workloads, configs, batch)
            values["energy"] = jnp.full(len(workloads), MILLION * joules)
        if not self.spread:
            return values
        laws = class_laws(serving, workloads, configs, self.lengths, states=self.states)
        laws = laws.at_means({"ttft": found.ttft, "e2e": found.e2e_latency})
        classes = len(workloads)
        unknown = batch > known_up_to(self.states, configs[0].max_batch_size)
        values[UNKNOWN] = jnp.full(classes, jnp.where(unknown, 1.0, 0.0))
        means = {"ttft": found.ttft, "tpot": found.tpot, "itl": found.itl, "e2e": found.e2e_latency}

        def over(number: int | None, metric: str, shares):
            weights = laws.weight[metric] if number is None else jnp.where(jnp.arange(classes) == number, 1.0, 0.0)
            return weights @ shares / jnp.sum(weights)

        for place, (number, metric) in enumerate(self.limits):
            bound = self.bounds[place]
            tail = 1.0 - over(number, metric, laws.probability(metric, jnp.full(classes, bound)))
            far = jnp.maximum(over(number, metric, means[metric]) / bound, 1.0)  # where hardly anything is within
            values[tail_name(place)] = jnp.full(classes, jnp.where(tail > 0.999, tail * far, tail))
        if self.within:
            share = jnp.ones(classes)
            for place, metric in enumerate(self.within):
                bounds = self.within_bounds[place]
                none = jnp.isinf(bounds)
                share = share * jnp.where(none, 1.0, laws.probability(metric, jnp.where(none, 1.0, bounds)))
            values["goodput"] = found.throughput * jnp.maximum(share, 1e-12)  # for its logarithm

        def percentile(name: str, find):
            metric, percent = name.split("_p")
            value = find(metric, jnp.asarray([float(percent)]))[..., 0]
            return jnp.broadcast_to(value, classes)

        for name in self.told:
            for key, find in ((name, laws.percentiles), (of_all(name), laws.percentiles_of_all)):
                values[key] = jnp.where(unknown, jnp.inf, percentile(name, find))
        for name in self.objective:
            values[of_objective(name)] = percentile(
                name, lambda metric, percents: laws.percentiles_of_all(metric, percents, weight)
            )
        return values
