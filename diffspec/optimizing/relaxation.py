"""Draft length as a real number: the relaxed problem of one draft length at each load.

For each load, minimise cost(k) over k in [1, K] subject to excess_j(k) <= 0 and no overload, with gradients through the
equilibrium, from several starts side by side: :mod:`diffspec.optimizing.constrained`.
"""

from collections.abc import Callable
from functools import lru_cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffspec.analysis.answers import METRICS
from diffspec.configuration import Configuration
from diffspec.optimizing.constrained import minimise_within
from diffspec.optimizing.limits import Limit, beyond, cost
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
) -> np.ndarray:
    """Best real draft length in [1, longest] of each load, the best of all starts. ``workloads`` has a leading axis."""
    loads, starts = jax.tree.leaves(workloads)[0].shape[0], len(STARTS)
    lanes = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), starts, axis=0), workloads)
    shared = (serving, config, np.asarray([limit.bound for limit in limits]), float(longest))
    function = _relaxed(objective, tuple(limit.of_one for limit in limits))
    found = minimise_within(function, np.tile(np.asarray(STARTS)[:, None], (loads, 1)), lanes, shared)
    best = [found.best(slice(first, first + starts)) for first in range(0, loads * starts, starts)]
    return 1.0 + (longest - 1.0) * found.x[best, 0]


@lru_cache
def _relaxed(objective: str, limits: tuple[Limit, ...]) -> Callable:
    """(cost, excesses and overload) of a relaxed draft length; the same function for the same question, so that its
    program is compiled once. Bounds are data: ``limits`` have 1."""

    def function(x, workload, shared):
        serving, config, bounds, longest = shared
        prediction = serving.predict(workload, at_draft_length(config, 1.0 + (longest - 1.0) * x[0]))
        broken = [limit.excess(getattr(prediction, METRICS[limit.metric])) for limit in limits]
        return cost(prediction, objective), jnp.stack([*beyond(broken, limits, bounds), prediction.overload])

    return function
