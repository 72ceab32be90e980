"""Draft length as a real number: the relaxed problem of one draft length at each load.

For each load, minimise cost(k) over k in [1, K] subject to excess_j(k) <= 0 and no overload, with gradients through the
equilibrium, from several starts side by side: :mod:`diffspec.optimizing.constrained`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffspec.analysis.plain import few_sizes, padded_rows
from diffspec.configuration import Configuration
from diffspec.optimizing.constrained import ROUNDS, minimise_within
from diffspec.optimizing.limits import Limit, beyond, log_cost
from diffspec.serving import ServingModel
from diffspec.workload import Workload

STARTS = (0.0, 0.25, 1.0)
"""Where each load's search starts, as shares of the range from 1 to the longest draft."""


def at_draft_length(config: Configuration, draft_length) -> Configuration:
    """The configuration at another draft length."""
    return eqx.tree_at(lambda c: c.draft_length, config, draft_length)


def relaxed_draft_lengths(
    objective: str,
    limits: tuple[Limit, ...],
    longest: int,
    serving: ServingModel,
    workloads: Workload,
    config: Configuration,
    values: Callable,
    data: Any = (),
    starts: Float[np.ndarray, "loads starts"] | None = None,
    rounds: int = ROUNDS,
) -> np.ndarray:
    """Best real draft length in [1, longest] of each load, the best of all starts. ``workloads`` has a leading axis.

    ``values(serving, workload, config, prediction, data)``: every metric that is looked at, by its name; pass the same
    function again to reuse its program. ``starts`` [1]: as shares of the range, by default :data:`STARTS` of each load.
    """
    loads = jax.tree.leaves(workloads)[0].shape[0]
    starts = np.tile(np.asarray(STARTS), (loads, 1)) if starts is None else starts
    count = starts.shape[1]
    starts = np.asarray(padded_rows(starts, few_sizes(loads)))
    padded = padded_rows(workloads, few_sizes(loads))
    lanes = jax.tree.map(lambda leaf: np.repeat(leaf, count, axis=0), padded)
    shared = (serving, config, np.asarray([limit.bound for limit in limits]), float(longest), data)
    function = _Relaxed(objective, tuple(limit.of_one for limit in limits), values)
    found = minimise_within(function, starts.reshape(-1, 1), lanes, shared, rounds=rounds, limits=len(limits) + 1)
    best = [found.best(slice(first, first + count)) for first in range(0, loads * count, count)]
    return 1.0 + (longest - 1.0) * found.x[best, 0]


class _Relaxed(NamedTuple):
    """(cost, excesses and overload) of a relaxed draft length; equal for the same question, so that its program is
    compiled once. Bounds are data: ``limits`` have 1."""

    objective: str
    limits: tuple[Limit, ...]
    values: Callable

    def __call__(self, x, workload, shared):
        serving, config, bounds, longest, data = shared
        at = at_draft_length(config, 1.0 + (longest - 1.0) * x[0])
        prediction = serving.predict(workload, at)
        found = self.values(serving, workload, at, prediction, data)
        broken = [limit.excess(found[limit.metric]) for limit in self.limits]
        excesses = [*beyond(broken, self.limits, bounds), prediction.overload]
        return log_cost(found[self.objective], self.objective), jnp.stack(excesses)
