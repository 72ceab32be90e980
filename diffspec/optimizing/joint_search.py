"""Searching one drafter's points at one load: the relaxed problem, whole points around it, and their neighbours."""

import itertools
import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.fitting.deployment import FittedDeployment
from diffspec.optimizing.constrained import Solution, minimise_within
from diffspec.optimizing.joint_problem import (
    Drafted,
    Objective,
    Shapes,
    cost_of,
    evaluate_points,
    excesses,
    predicted,
)
from diffspec.optimizing.limits import beyond

NO_CAP = 1e9
"""Stands for no batch cap [req]."""
STARTS = (0.1, 0.45, 0.9)
"""Where the relaxed solver starts, as shares of every range."""
MOST_CORNERS = 2000
"""Whole points around a relaxed one; where there are more, the nearest alone is taken."""


class Arm(NamedTuple):
    """One drafter: its name, the deployment it is on, size [parameters; 1 where unknown] and arrays."""

    name: str
    deployment: FittedDeployment
    size: float
    drafted: Drafted
    zero: bool


class Ranges(NamedTuple):
    """What is chosen from: ``lengths`` 0..K, whole ``caps`` in increasing order, and whether k = 0 is a candidate."""

    longest: int
    caps: tuple[float, ...]

    def lengths(self, zero: bool) -> range:
        """The whole draft lengths, 0 among them where that is a candidate."""
        return range(0 if zero else 1, self.longest + 1)

    def points(self, classes: int, zero: bool) -> int:
        """How many whole points one drafter has."""
        return len(self.lengths(zero)) ** classes * len(self.caps)


def relaxed(arm: Arm, shapes, goal, limits, loads, ranges: Ranges, sizes=None) -> Solution:
    """The relaxed problem of one drafter: lanes are loads times starts; variables: lengths, log cap, log size."""
    count, caps = len(shapes.share), ranges.caps
    free_cap, starts = len(caps) > 1, np.asarray(STARTS)
    low = [1.0] * count + ([math.log(caps[0])] if free_cap else []) + ([] if sizes is None else [sizes[0]])
    high = [float(ranges.longest)] * count + ([math.log(caps[-1])] if free_cap else [])
    high += [] if sizes is None else [sizes[1]]
    loads = [*loads, *[loads[-1]] * (2 ** max(1, math.ceil(math.log2(len(loads)))) - len(loads))]  # few programs
    lanes = len(loads) * len(starts)
    data = {
        "load": np.repeat(np.asarray(loads, dtype=float), len(starts)),
        "low": np.tile(low, (lanes, 1)),
        "high": np.tile(high, (lanes, 1)),
        "cap": np.full(lanes, caps[0]),
        "size": np.full(lanes, math.log(arm.size)),
    }
    function = relaxed_function(goal, tuple(entry.of_one for entry in limits), count, free_cap, sizes is not None)
    at = np.tile(starts[:, None], (len(loads), len(low)))
    bounds = np.asarray([entry.limit.bound for entry in limits])
    alike = [range(count)] if count > 1 else ()
    return minimise_within(function, at, data, (arm.drafted, shapes, bounds), alike=alike)


@lru_cache
def relaxed_function(goal: Objective, limits, count: int, free_cap: bool, free_size: bool) -> Callable:
    """(cost, excesses and overload) of a relaxed point; the same function for the same question, so that its program is
    compiled once. Bounds are data: ``limits`` have 1."""

    def function(x, data, shared):
        drafted, shapes, bounds = shared
        real = data["low"] + (data["high"] - data["low"]) * x
        cap = jnp.exp(real[count]) if free_cap else data["cap"]
        size = real[-1] if free_size else data["size"]
        point = jnp.concatenate([real[:count], cap[None], size[None]])
        metrics, overload, _ = predicted(drafted, shapes, data["load"], point)
        broken = excesses(limits, metrics, shapes.share)
        broken = beyond(broken, [one.limit for one in limits], bounds)
        return cost_of(goal, metrics, shapes), jnp.stack([*broken, overload])

    return function


class Scored(NamedTuple):
    """Whole points of one drafter, evaluated: points [n, C + 2], cost [n], worst log excess [n], saturated [n]."""

    points: np.ndarray
    metrics: dict[str, np.ndarray]
    cost: np.ndarray
    worst: np.ndarray
    saturated: np.ndarray

    @property
    def rank(self) -> np.ndarray:
        """What is made small: the cost of feasible points, then the worst excess, then the overload."""
        beyond = 1e6 + np.maximum(self.metrics["utilization"][:, 0] - 1.0, 0.0)
        return np.where(self.saturated, 1e6 * beyond, np.where(self.worst > 0, 1e6 * (1.0 + self.worst), self.cost))


def score(arm: Arm, shapes: Shapes, goal, limits, load, points) -> Scored:
    points = np.column_stack([points, np.full(len(points), math.log(arm.size))])
    metrics, saturated = evaluate_points(arm.drafted, shapes, load, points)
    found = [np.asarray(values) for values in excesses(limits, metrics, shapes.share)]
    worst = np.max(found, axis=0) if found else np.full(len(points), -1.0)
    return Scored(points, metrics, np.asarray(cost_of(goal, metrics, shapes)), worst, saturated)


def rounded(arm, shapes, goal, limits, load, ranges: Ranges, x, count: int) -> Scored:
    """Whole points around a relaxed one, then the neighbours of the best until none is better."""
    real = 1.0 + (ranges.longest - 1.0) * x[:count]
    caps = np.asarray(ranges.caps)
    cap = caps[0] if len(caps) == 1 else np.exp(math.log(caps[0]) + (math.log(caps[-1] / caps[0])) * x[count])
    place = int(np.searchsorted(caps, cap))
    near_caps = sorted({caps[min(max(place + move, 0), len(caps) - 1)] for move in (-1, 0)})
    near = [sorted({math.floor(k + 1e-9), math.ceil(k - 1e-9), *([0] if arm.zero else [])}) for k in real]
    if math.prod(len(values) for values in near) > MOST_CORNERS:
        near = [[round(float(k))] for k in real]
    found = score(arm, shapes, goal, limits, load, np.asarray(list(itertools.product(*near, near_caps)), dtype=float))
    while True:
        best = found.points[int(np.argmin(found.rank))]
        around = []
        for number in range(count):
            for move in (-1, 1):
                k = best[number] + move
                if k in ranges.lengths(arm.zero):
                    around.append([*best[:number], k, *best[number + 1 : count + 1]])
        at = int(np.searchsorted(caps, best[count]))
        around += [[*best[:count], caps[j]] for j in (at - 1, at + 1) if 0 <= j < len(caps)]
        further = score(arm, shapes, goal, limits, load, np.asarray(around, dtype=float))
        better = further.rank.min() < found.rank.min() - 1e-12
        found = joined(found, further)
        if not better:
            return found


def joined(one: Scored, other: Scored) -> Scored:
    """The points of both."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), one, other)


def only(found: Scored, row: int) -> Scored:
    """One point alone."""
    return jax.tree.map(lambda part: part[row : row + 1], found)


def first(found: Scored) -> Scored:
    """The best point alone; of equal ones (a cap that never fills changes no mean) the largest cap."""
    order = np.lexsort((-found.points[:, -2], np.round(found.rank, 10)))
    return only(found, int(order[0]))
