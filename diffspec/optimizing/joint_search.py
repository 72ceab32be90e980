"""Searching one drafter's points at one load: the relaxed problem, whole points around it, and their neighbours."""

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.analysis.plain import few_sizes, padded_rows
from diffspec.fitting.deployment import FittedDeployment
from diffspec.optimizing.constrained import Solution, minimise_within
from diffspec.optimizing.joint_problem import (
    COST,
    ClassLimit,
    Drafted,
    Objective,
    Shapes,
    cost_of,
    evaluate_points,
    excesses,
    over_all,
    parse_objective,
    predicted,
    unmet,
)
from diffspec.optimizing.limits import EQUAL, beyond
from diffspec.serving import ServingModel
from diffspec.tree_search import RegularTree
from diffspec.tree_shapes import TreeShapes

STARTS = (0.1, 0.45, 0.9)
"""Where the relaxed solver starts, as shares of every range."""
HOPELESS = 50.0
"""Log excess of a point without an objective: it breaks limits more than any other, and less than a saturated one."""
MOST_CORNERS = 2000
"""Whole points around a relaxed one; where there are more, the nearest alone is taken."""


class Arm(NamedTuple):
    """One drafter on one placement of experts: its name, the deployment it is on, size [parameters; 1 where unknown]
    and arrays; ``zero``: whether no speculation is a candidate; ``trees`` of a drafter that draws them, up to
    ``max_nodes``; ``placement``: its name, None without experts; ``models``: draws of what is not known, None where
    nothing tells."""

    name: str
    deployment: FittedDeployment
    size: float
    drafted: Drafted
    zero: bool
    trees: TreeShapes | None = None
    max_nodes: int = 0
    placement: str | None = None
    models: ServingModel | None = None


class Ranges(NamedTuple):
    """What is chosen from: ``lengths`` 0..K, whole ``caps`` in increasing order, and whether k = 0 is a candidate."""

    longest: int
    caps: tuple[float, ...]

    def lengths(self, zero: bool) -> range:
        """The whole draft lengths, 0 among them where that is a candidate."""
        return range(0 if zero else 1, self.longest + 1)

    def points(self, arm: Arm, classes: int) -> int:
        """How many whole points one drafter has."""
        if arm.trees is not None:
            return (len(arm.trees.trees) + arm.zero) * len(self.caps)
        return len(self.lengths(arm.zero)) ** classes * len(self.caps)

    def whole(self, arm: Arm, classes: int) -> np.ndarray:
        """Every whole point (lengths of classes, cap, tree)."""
        if arm.trees is not None:
            return self.alike(arm, classes)
        lengths = [self.lengths(arm.zero)] * classes
        return np.asarray(list(itertools.product(*lengths, self.caps, (0.0,))), dtype=float)

    def alike(self, arm: Arm, classes: int) -> np.ndarray:
        """The whole points at which all classes draft alike: those of engines today, and all of a drafter of trees."""
        shapes = [(k, 0) for k in self.lengths(arm.zero)]
        if arm.trees is not None:
            shapes = [(0, 0)] * arm.zero + [(depth, tree) for tree, depth in enumerate(arm.trees.depth)]
        return np.asarray([(*[k] * classes, cap, tree) for k, tree in shapes for cap in self.caps], dtype=float)


class Relaxed(NamedTuple):
    """A relaxed point as reals: ``lengths`` of each class [tok], ``cap`` [req], ``width`` of a regular tree (1: a
    chain), its ``nodes`` [tok], and the logarithm of the drafter's ``size``, None where it was not free."""

    lengths: np.ndarray
    cap: float
    width: float
    nodes: float
    size: float | None


class Variables(NamedTuple):
    """Which reals the relaxed problem has, in this order: a length for each class, or one for all where trees are
    drawn, log cap, width, log size; ``low`` and ``high`` are their ranges."""

    classes: int
    tree: bool
    free_cap: bool
    free_size: bool

    @property
    def lengths(self) -> int:
        """How many draft lengths there are."""
        return 1 if self.tree else self.classes

    def ranges(self, arm: Arm, ranges: Ranges, sizes) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of each."""
        caps, low, high = ranges.caps, [1.0] * self.lengths, [float(ranges.longest)] * self.lengths
        if self.free_cap:
            low, high = [*low, math.log(caps[0])], [*high, math.log(caps[-1])]
        if self.tree:
            low, high = [*low, 1.0], [*high, float(arm.drafted.candidates.shape[2])]
        if self.free_size:
            low, high = [*low, sizes[0]], [*high, sizes[1]]
        return np.asarray(low), np.asarray(high)

    def point(self, real, cap, size):
        """(lengths..., cap, tree, size) of the reals, ``cap`` and ``size`` where they are not free."""
        at = self.lengths
        lengths = jnp.broadcast_to(real[:at], (self.classes,))
        cap = jnp.exp(real[at]) if self.free_cap else cap
        width = real[at + self.free_cap] if self.tree else jnp.zeros(())
        return jnp.concatenate([lengths, jnp.stack([cap, width, real[-1] if self.free_size else size])])


def variables_of(arm: Arm, ranges: Ranges, classes: int, sizes=None) -> Variables:
    """The reals of one drafter's relaxed problem."""
    return Variables(classes, arm.trees is not None, len(ranges.caps) > 1, sizes is not None)


def relaxed(arm: Arm, shapes, goal, limits, loads, ranges: Ranges, sizes=None, replicas=None) -> Solution:
    """The relaxed problem of one drafter: lanes are loads times starts; ``replicas`` at each load, by default one."""
    count, starts = len(shapes.share), np.asarray(STARTS)
    variables = variables_of(arm, ranges, count, sizes)
    low, high = variables.ranges(arm, ranges, sizes)
    asked = np.asarray([loads, replicas or [1] * len(loads)], dtype=float).T
    loads, replicas = padded_rows(asked, few_sizes(len(loads))).T
    lanes = len(loads) * len(starts)
    data = {
        "load": np.repeat(loads, len(starts)),
        "low": np.tile(low, (lanes, 1)),
        "high": np.tile(high, (lanes, 1)),
        "cap": np.full(lanes, ranges.caps[0]),
        "size": np.full(lanes, math.log(arm.size)),
        "replicas": np.repeat(replicas, len(starts)),
    }
    function = _Relaxed(relaxable(goal), tuple(entry.of_one for entry in limits), variables)
    at = np.tile(starts[:, None], (len(loads), len(low)))
    bounds = np.asarray([1.0 if entry.limit.percentile else entry.limit.bound for entry in limits])  # tails have theirs
    alike = [range(count)] if variables.lengths > 1 else ()
    drafted = arm.drafted if variables.tree else arm.drafted._replace(candidates=None)
    shared = (drafted, shapes, bounds, float(arm.max_nodes))
    return minimise_within(function, at, data, shared, alike=alike, limits=len(limits) + 1 + variables.tree)


def relaxable(goal: Objective) -> Objective:
    """The objective that reals move: a price alone is that of replicas, whatever they draft, and leaves the mean e2e
    latency to be made small."""
    return parse_objective("e2e_mean") if goal.metrics == (COST,) else goal


class _Relaxed(NamedTuple):
    """(cost, excesses, overload and, of a tree, nodes beyond the most) of a relaxed point; equal for the same question,
    so that its program is compiled once. Bounds are data: ``limits`` have 1."""

    goal: Objective
    limits: tuple[ClassLimit, ...]
    variables: Variables

    def __call__(self, x, data, shared):
        drafted, shapes, bounds, most = shared
        real = data["low"] + (data["high"] - data["low"]) * x
        point = self.variables.point(real, data["cap"], data["size"])
        metrics, overload, _ = predicted(drafted, shapes, data["load"], point)
        broken = excesses(self.limits, metrics, shapes.share, data["replicas"])
        broken = [*beyond(broken, [one.limit for one in self.limits], bounds), overload]
        if self.variables.tree:
            count = self.variables.classes
            nodes = RegularTree(point[count + 1], point[0], drafted.candidates[0]).nodes()
            broken.append(jnp.log(nodes / most))
        return cost_of(self.goal, metrics, shapes), jnp.stack(broken)


def excess_slopes(arm: Arm, shapes, limits, load, x: np.ndarray, ranges: Ranges, replicas: int = 1) -> np.ndarray:
    """[limits] by how much the log excess falls where the log of the bound rises, at a relaxed solution ``x``: 1 of a
    mean; of a percentile, whose excess is that of a tail, by differences."""
    slopes, tails = np.ones(len(limits)), arm.drafted.tails
    tailed = [place for place, entry in enumerate(limits) if entry.limit.percentile is not None]
    if not tailed or tails is None:
        return slopes
    variables = variables_of(arm, ranges, len(shapes.share))
    low, high = variables.ranges(arm, ranges, None)
    point = variables.point(jnp.asarray(low + (high - low) * x), ranges.caps[0], math.log(arm.size))
    drafted = arm.drafted if variables.tree else arm.drafted._replace(candidates=None)
    step = 1e-3
    wider = drafted._replace(tails=replace(tails, bounds=tails.bounds * math.exp(step)))
    found = [
        np.stack(
            excesses(limits, evaluate_points(one, shapes, load, np.asarray(point)[None])[0], shapes.share, replicas)
        )
        for one in (drafted, wider)
    ]
    slopes[tailed] = -(found[1] - found[0])[tailed, 0] / step
    return slopes


def as_reals(arm: Arm, ranges: Ranges, x: np.ndarray, classes: int, sizes=None) -> Relaxed:
    """A relaxed solution ``x`` in units."""
    variables = variables_of(arm, ranges, classes, sizes)
    low, high = variables.ranges(arm, ranges, sizes)
    point = np.asarray(variables.point(jnp.asarray(low + (high - low) * x), ranges.caps[0], math.log(arm.size)))
    lengths, (cap, width, size) = point[:classes], point[classes:]
    nodes = float(lengths[0])
    if variables.tree:
        nodes = float(RegularTree(float(width), float(lengths[0]), jnp.asarray(arm.drafted.candidates[0])).nodes())
    return Relaxed(lengths, float(cap), float(width) or 1.0, nodes, float(size) if variables.free_size else None)


class Scored(NamedTuple):
    """Whole points of one drafter, evaluated: points [n, C + 3], metrics [n, C], log cost [n] and up to which distance
    from the least it counts as ``equal`` [n], worst log excess [n], saturated [n], log of the mean e2e latency [n], and
    the replicas that share the load [n]."""

    points: np.ndarray
    metrics: dict[str, np.ndarray]
    cost: np.ndarray
    equal: np.ndarray
    worst: np.ndarray
    saturated: np.ndarray
    e2e: np.ndarray
    replicas: np.ndarray

    @property
    def rank(self) -> np.ndarray:
        """What is made small: the cost of feasible points, the same of those that count as equal to the least, then the
        worst excess, then the overload."""
        beyond = 1e6 + np.maximum(self.metrics["utilization"][:, 0] - 1.0, 0.0)
        kept = ~self.saturated & (self.worst <= 0)
        least = np.min(self.cost, where=kept, initial=np.inf)
        level = np.where(self.cost <= least + self.equal, least, self.cost)
        return np.where(self.saturated, 1e6 * beyond, np.where(self.worst > 0, 1e6 * (1.0 + self.worst), level))

    @property
    def key(self) -> tuple[float, float]:
        """What the best point has least of: the rank; of equal ones the mean e2e latency."""
        best = self.order[0]
        return round(float(self.rank[best]), 10), round(float(self.e2e[best]), 10)

    @property
    def order(self) -> np.ndarray:
        """Rows from the best on; of equally good ones the smallest mean e2e latency, then the largest cap (one that
        never fills changes no mean)."""
        return np.lexsort((-self.points[:, -3], np.round(self.e2e, 10), np.round(self.rank, 10)))


def score(arm: Arm, shapes: Shapes, goal, limits, load, points, replicas: int = 1) -> Scored:
    """Points (lengths, cap, tree) at a ``load`` [req/s] of one of ``replicas``, evaluated."""
    points = np.column_stack([points, np.full(len(points), math.log(arm.size))])
    metrics, saturated = evaluate_points(arm.drafted._replace(candidates=None), shapes, load, points)
    return scored(points, metrics, saturated, shapes, goal, limits, replicas)


def scored(points, metrics, saturated, shapes: Shapes, goal, limits, replicas: int) -> Scored:
    """Points with their ``metrics`` [n, C] as :class:`Scored`."""
    found = [np.asarray(values) for values in excesses(limits, metrics, shapes.share, float(replicas))]
    worst = np.max(found, axis=0) if found else np.full(len(points), -1.0)
    cost = np.asarray(cost_of(goal, metrics, shapes))
    if goal.made_large:
        cost = cost - math.log(replicas)
    worst = np.where(unmet(goal, metrics, cost), np.maximum(worst, HOPELESS), worst)
    equal = np.full(len(points), EQUAL if goal.flat else 0.0)  # of those that agree the least latency
    e2e = np.log(over_all("e2e_mean", metrics, shapes.share))
    return Scored(points, metrics, cost, equal, worst, saturated, e2e, np.full(len(points), replicas))


def rounded(arm, shapes, goal, limits, load, ranges: Ranges, real: Relaxed, replicas: int = 1) -> Scored:
    """Whole points around a relaxed one, then the neighbours of the best until none is better."""
    caps, count = np.asarray(ranges.caps), len(shapes.share)
    place = int(np.searchsorted(caps, real.cap * (1.0 - 1e-9)))
    near_caps = sorted({caps[min(max(place + move, 0), len(caps) - 1)] for move in (-1, 0)})
    if arm.trees is not None:
        depths = {math.floor(real.lengths[0] + 1e-9), math.ceil(real.lengths[0] - 1e-9)}
        near = [_nearest(arm.trees, depth, real.nodes) for depth in depths]
        points = [[*[k] * count, cap, tree] for k, tree in [*near, *[(0.0, 0)] * arm.zero] for cap in near_caps]
    else:
        around = [sorted({math.floor(k + 1e-9), math.ceil(k - 1e-9), *([0] if arm.zero else [])}) for k in real.lengths]
        if math.prod(len(values) for values in around) > MOST_CORNERS:
            around = [[round(float(k))] for k in real.lengths]
        points = list(itertools.product(*around, near_caps, (0.0,)))
    found = score(arm, shapes, goal, limits, load, np.asarray(points, dtype=float), replicas)
    while True:
        best = found.points[found.order[0]]
        around = point_neighbours(arm, ranges, best, count)
        if not around:
            return found
        further = score(arm, shapes, goal, limits, load, np.asarray(around, dtype=float), replicas)
        found = joined(found, further)
        if np.array_equal(found.points[found.order[0]], best):
            return found


def point_neighbours(arm: Arm, ranges: Ranges, best: np.ndarray, count: int) -> list[list[float]]:
    """One step in the length of one class, in the depth or the nodes of a tree, or in the cap."""
    caps, (cap, tree) = np.asarray(ranges.caps), best[count : count + 2]
    at = int(np.searchsorted(caps, cap))
    around = [[*best[:count], caps[j], tree] for j in (at - 1, at + 1) if 0 <= j < len(caps)]
    if arm.trees is None:
        for number, move in itertools.product(range(count), (-1, 1)):
            if best[number] + move in ranges.lengths(arm.zero):
                around.append([*best[:number], best[number] + move, *best[number + 1 : count], cap, 0.0])
        return around
    depth, nodes = best[0], arm.trees.nodes[int(tree)] if best[0] > 0 else 0.0
    same = np.unique(arm.trees.nodes[arm.trees.depth == depth])
    larger, smaller = same[same > nodes][:1], same[same < nodes][-1:]
    moves = [_nearest(arm.trees, depth, float(size)) for size in (*larger, *smaller)]
    moves += [_nearest(arm.trees, near, max(nodes, near)) for near in (depth - 1, depth + 1) if near >= 1]
    return around + [[*[k] * count, cap, shape] for k, shape in [*moves, *[(0.0, 0)] * arm.zero]]


def _nearest(trees: TreeShapes, depth: float, nodes: float) -> tuple[float, int]:
    """(depth, number) of the shape of this depth, or the nearest there is, whose nodes are nearest."""
    depths = np.unique(trees.depth)
    depth = depths[np.argmin(np.abs(depths - depth))]
    of_depth = np.flatnonzero(trees.depth == depth)
    return float(depth), int(of_depth[np.argmin(np.abs(np.log(trees.nodes[of_depth] / nodes)))])


def joined(*parts: Scored) -> Scored:
    """The points of all."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def rows(found: Scored, which) -> Scored:
    """Some points alone."""
    return jax.tree.map(lambda part: part[which], found)


def first(found: Scored) -> Scored:
    """The best point alone."""
    return rows(found, found.order[:1])
