"""The points of all arms at one load, and which of them is chosen: the best, or where nothing keeps the limits the
nearest.

A limit on a percentile is searched by its tail, log(P(metric > bound)/(1 - p)), which asks the law once. Far beyond a
limit nearly every request breaks it, whatever the point, and a tail no longer tells which point is nearer: so where no
point keeps the limits the percentiles themselves are found, of up to :data:`NEAREST` points of every arm, and the
nearest is the one with the least

    largest over the limits of log(value/bound)

With a risk, where none keeps the limits in enough draws, it is the one that keeps them in most (:func:`least_risky`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from diffspec.optimizing.choice import cost_at_risk
from diffspec.optimizing.joint_arms import with_percentiles
from diffspec.optimizing.joint_draws import (
    Contender,
    Drawn,
    contenders,
    draw_shortlist,
    interval_of,
    roomiest,
    shortlist,
)
from diffspec.optimizing.joint_problem import excesses
from diffspec.optimizing.joint_question import Question
from diffspec.optimizing.joint_search import Arm, Scored, as_reals, first, joined, rounded, rows, score
from diffspec.optimizing.limits import EQUAL

NEAREST = 512
"""Points of an arm that are looked at by their percentiles where none keeps the limits."""


class Compared(NamedTuple):
    """Points of all arms at one load: the best ``attempt`` of rounding, the best ``alike`` for all classes, the best of
    each arm (``best``), of a goodput those that may count as equal to it (``ties``), others that come close, and those
    with ``room`` below the limits; ``broken``: (number of the arm, points) of arms without a point that keeps limits on
    percentiles; ``evaluated``: how many."""

    attempt: Contender
    alike: Contender
    best: list[Contender]
    ties: list[Contender]
    others: list[Contender]
    room: list[Contender]
    broken: list[tuple[int, Scored]]
    evaluated: int

    def with_more(self, more: "Compared") -> "Compared":
        """These points and those of further arms."""
        return Compared(
            foremost([self.attempt, more.attempt]),
            foremost([self.alike, more.alike]),
            self.best + more.best,
            self.ties + more.ties,
            self.others + more.others,
            self.room + more.room,
            self.broken + more.broken,
            self.evaluated + more.evaluated,
        )

    @property
    def foremost(self) -> Contender:
        """The best of all by the model as it is."""
        return foremost([*self.best, *self.ties])


def foremost(listed: Sequence[Contender]) -> Contender:
    """The best: of costs that count as equal to the least the smallest mean e2e latency, then the fewest replicas."""
    least = min(listed, key=lambda one: one.key)
    if least.broken or least.point.saturated[0]:
        return least
    most = float(least.point.cost[0] + least.point.equal[0])
    near = [one for one in listed if one is least or (one.keeps and one.point.cost[0] <= most)]
    return min(near, key=lambda one: (*(one.key[1:] if least.point.equal[0] else ()), one.key))


def compared(asked: Question, i: int, arms: list[Arm], solved, sure: bool, start: int = 0) -> Compared:
    """Every arm from number ``start`` on at every number of replicas at one load."""
    count, evaluated, load = len(asked.classes), 0, asked.loads[i]
    question = (asked.shapes, asked.goal, asked.limits)
    attempts, common, best, ties, others, room, broken = [], [], [], [], [], [], []
    for place, replicas in enumerate(asked.replicas):
        for number in range(start, len(arms)):
            arm, solution = arms[number], solved[number]
            real = as_reals(arm, asked.ranges, solution.x[asked.lane(solution, i, place)], count)
            found = rounded(arm, *question, load / replicas, asked.ranges, real, replicas)
            alike = score(arm, *question, load / replicas, asked.ranges.alike(arm, count), replicas)
            attempts.append(Contender(number, first(found)))
            common.append(Contender(number, first(alike)))
            evaluated += len(found.points) + len(alike.points)
            found = joined(found, alike)
            if asked.exhaustive and count > 1 and arm.trees is None:
                found = score(arm, *question, load / replicas, asked.ranges.whole(arm, count), replicas)
                evaluated += len(found.points)
            best.append(Contender(number, first(found)))
            ties += contenders(number, found) if asked.goal.flat else []
            others += contenders(number, found) if sure else []
            room += roomiest(number, found) + contenders(number, alike) if asked.risk is not None else []
            if asked.tailed and best[-1].broken:
                broken.append((number, rows(found, found.order[:NEAREST])))
    return Compared(foremost(attempts), foremost(common), best, ties, others, room, broken, evaluated)


def best_of(asked: Question, load: float, arms: list[Arm], found: Compared) -> Contender:
    """The best point by the model as it is; the nearest where none keeps the limits."""
    best = found.foremost
    if not (asked.tailed and best.broken):
        return best
    near = []
    for number, points in found.broken:
        replicas = int(points.replicas[0])
        told = with_percentiles(arms[number], points, load / replicas, asked)
        beyond = np.asarray([excesses(asked.limits, told.metrics, asked.shapes.share, replicas)]).max(axis=(0, 1))
        beyond = np.where(told.saturated, np.inf, beyond)
        row = int(np.lexsort((told.e2e, beyond))[0])
        near.append((float(beyond[row]), Contender(number, rows(told, [row]))))
    return min(near, key=lambda one: (one[0], one[1].key))[1]


class Sure(NamedTuple):
    """The ``winner``, its ``interval`` over draws ({} where there are none), and with a risk the log cost ``at_risk``,
    infinite where too few draws keep the limits."""

    winner: Contender
    interval: dict[str, Any]
    at_risk: float | None


def surely(
    asked: Question, load: float, arms: list[Arm], own: Arm | None, found: Compared, plain: list[Contender] | None
) -> Sure:
    """The choice among the points at one load, over the draws of what is not known; ``plain``: no speculation, of
    ``own``, which is the last arm."""
    best = best_of(asked, load, arms, found)
    known = plain is not None and own is not None and own.models is not None
    baseline: list[Contender] = plain if known else []  # type: ignore[assignment]
    listed = shortlist([best, *found.best, found.alike, *baseline, *found.room], found.others)
    all_arms = [*arms, *([] if own is None else [own])]
    drawn = draw_shortlist(all_arms, listed, asked.shapes, asked.goal, asked.limits, load)
    names, candidates = [one.same for one in listed], [n for n, one in enumerate(listed) if one.arm >= 0]
    chosen, at_risk = names.index(best.same), None
    if asked.risk is not None:
        equal = EQUAL if asked.goal.flat else 0.0
        chosen, at_risk = least_risky(drawn, listed, candidates, chosen, asked.risk, equal)
    winner = listed[chosen]
    placed = asked.replicas.index(int(winner.point.replicas[0]))
    base = names.index(baseline[placed].same) if baseline else None
    interval = interval_of(drawn, candidates, chosen, base, asked.goal)
    return Sure(winner, interval, at_risk)


def least_risky(
    drawn: Drawn, listed: Sequence[Contender], candidates: Sequence[int], best: int, risk: float, equal: float
) -> tuple[int, float]:
    """(number of the candidate whose cost the share ``risk`` of draws does not exceed is least, that cost): of those
    within ``equal`` of the least the quickest by the model as it is. Where none keeps the limits in so many draws, and
    the cost is infinite, the one that keeps them in most; where none of them does in any more than the ``best``,
    that."""
    at_risk = cost_at_risk(drawn.cost, drawn.feasible, risk)
    least = float(at_risk[candidates].min())
    if not np.isfinite(least):
        share = drawn.feasible.mean(axis=0)
        return max(candidates, key=lambda n: (share[n], n == best)), least
    level = np.where(at_risk <= least + equal, -np.inf, at_risk)
    chosen = min(candidates, key=lambda n: (level[n], *(listed[n].key[1:] if equal else ()), listed[n].key))
    return chosen, float(at_risk[chosen])
