"""Placements of experts that are looked for where a joint decision was found.

How many tokens a step verifies, and so which experts are read, follows from the drafter, the draft length of every
class, the batch cap and the load of a replica: all of them decided here. A placement chosen before, for the mean
request, is then one for another number of tokens. So

    decide among the placements that are there  ->  (drafter, draft lengths or tree, cap, replicas)
    look for a placement whose best point near that one is better  ->  offer it as one more
    decide again, until no better placement is found, :data:`ROUNDS` times at most

What was there stays there: by the model as it is the answer is never worse than without the search (a risk is
compared on a shortlist, which further placements share), and no rank carries more than the caps. A price and a goodput
are often equal on many placements: there it is the latency by which one is looked for. Where placements times whole
points are few, all of them are compared, and the placement is the best of all for the drafter that was decided on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.analysis.plain import finite
from diffspec.optimizing.expert_placement import ExpertPlacement, Placing, all_placements
from diffspec.optimizing.expert_problem import (
    CHUNK,
    SMALL_SPACE,
    AbstractProblem,
    Point,
    chunks_of,
    merit_of,
    placement_told,
)
from diffspec.optimizing.expert_search import Pressure, pressure_of, routed
from diffspec.optimizing.joint_answer import value_of
from diffspec.optimizing.joint_arms import on_placement
from diffspec.optimizing.joint_choice import Compared, compared, foremost
from diffspec.optimizing.joint_draws import Contender
from diffspec.optimizing.joint_problem import FEW, Objective, cost_of, evaluate_draws, excesses, over_all, predicted
from diffspec.optimizing.joint_question import Question
from diffspec.optimizing.joint_search import HOPELESS, Arm, point_neighbours, relaxable, relaxed, scored
from diffspec.optimizing.limits import EQUAL, beyond

ROUNDS = 3
MOST_DECISIONS = 4 * FEW
"""Whole points of a drafter up to which all are looked at with every placement; above it the best and those beside."""
STARTS = 3
"""Placements that the local search starts from, the best ones: it is within some parts in a thousand of the best of all
where that was looked for (tests/test_joint_wide.py)."""
BETTER = 1e-7
"""By how much, relatively, a placement must better the objective to be offered."""
TIE = 1e-9
"""Of equal points: the weight of log e2e latency beside the log objective; :data:`EQUAL` where many are equal."""
PRESSED = 3
"""Decisions of a placement, the best ones, under whose pressure the search descends."""
_BROKEN = 1e6


@dataclass(frozen=True)
class JointProblem(AbstractProblem):
    """Placements under the ``decisions`` of one drafter at one load: (replicas, whole points [n, C + 2])."""

    popularity: np.ndarray
    asked: Question
    load: float
    arm: Arm
    decisions: tuple[tuple[int, np.ndarray], ...]

    def points(self, placements: Sequence[ExpertPlacement]) -> list[Point]:
        """The placements at every decision: the rank of the points, of equal ones the mean e2e latency."""
        asked, drafted = self.asked, self.arm.drafted._replace(candidates=None)
        tie = _tie(asked.goal)
        servers = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (CHUNK, *np.shape(leaf))), drafted.serving)
        found = []
        for chunk, tables in chunks_of(placements, self.popularity):
            merits: list[list[np.ndarray]] = [[] for _ in chunk]
            for replicas, points in self.decisions:
                points = self._with_size(points)
                each = evaluate_draws(drafted, routed(servers, tables), asked.shapes, self.load / replicas, points)
                for number, merit in enumerate(merits):
                    metrics, saturated = jax.tree.map(lambda leaf, at=number: leaf[at], each)
                    one = scored(points, metrics, saturated, asked.shapes, asked.goal, asked.limits, replicas)
                    merit.append(one.rank + tie * np.where(saturated, 0.0, one.e2e))
            found += [Point(one, np.concatenate(merit), {}) for one, merit in zip(chunk, merits, strict=True)]
        return found

    def pressures(self, point: Point) -> list[Pressure]:
        """At the best decisions, of what :func:`aim_of` tells."""
        table, asked = point.placement.table(self.popularity), self.asked
        limits = tuple(entry.of_one for entry in asked.limits)
        bounds = np.asarray([1.0 if entry.limit.percentile else entry.limit.bound for entry in asked.limits])
        every = [(replicas, row) for replicas, rows in self.decisions for row in self._with_size(rows)]
        found = []
        for number in np.argsort(point.merit, kind="stable")[:PRESSED]:
            merit, (replicas, row) = point.merit[number], every[number]
            data = (self.arm.drafted._replace(candidates=None), asked.shapes, self.load / replicas, row)
            data = (*data, bounds, float(replicas))
            value = _value(relaxable(asked.goal), limits, aim_of(float(merit), bool(limits)))
            found.append(pressure_of(value, self.arm.drafted.serving, table, data))
        return found

    def _with_size(self, points: np.ndarray) -> np.ndarray:
        return np.column_stack([points, np.full(len(points), math.log(self.arm.size))])


def aim_of(merit: float, limited: bool) -> str:
    """What a placement is to better at a decision of this ``merit``: the ``cost``; where ``limited`` and limits are
    broken, their worst excess (``limits``); where there is no objective the ``latency``, which it lacks; the ``load``
    where that is not served."""
    if merit < _BROKEN:
        return "cost"
    if merit >= _BROKEN**2:
        return "load"
    without = abs(merit - _BROKEN * (1.0 + HOPELESS)) < 1.0
    return "limits" if limited and not without else "latency"


def _tie(goal: Objective) -> float:
    """The weight of log e2e latency in the merit of a placement."""
    return EQUAL if goal.flat or relaxable(goal) is not goal else TIE


@lru_cache
def _value(goal, limits, aim: str) -> Callable:
    """What a placement is to make small at a point; the same function for the same question."""

    def value(serving, data):
        drafted, shapes, load, point, bounds, replicas = data
        metrics, overload, _ = predicted(drafted._replace(serving=serving), shapes, load, point)
        if aim == "load":
            return overload
        latency = jnp.log(over_all("e2e_mean", metrics, shapes.share))
        if aim == "latency":
            return latency
        if aim == "cost":
            return cost_of(goal, metrics, shapes) + _tie(goal) * latency
        broken = excesses(limits, metrics, shapes.share, replicas)
        return jnp.max(jnp.stack(beyond(broken, [entry.limit for entry in limits], bounds)))

    return value


class Searched(NamedTuple):
    """What is ``asked`` of all ``arms``, with their ``solved`` relaxed problems and the points ``found`` at each load;
    all ``placements`` by name, and the objective at each load ``before`` any was looked for (None where none kept the
    limits)."""

    asked: Question
    arms: list[Arm]
    solved: list[Any]
    found: list[Compared]
    placements: dict[str, ExpertPlacement]
    before: list[float | None]

    def told(self, i: int, placement: str, placing: Placing) -> dict[str, Any]:
        """The placement that was chosen at load number ``i``: whether it was ``searched`` at the decision, the
        objective without the search, its rank load and which expert lies in each slot."""
        return {
            "searched": placement not in placing.placements,
            "objective_before": self.before[i],
            **placement_told(self.placements[placement], placing.popularity),
        }


def search_placements(
    asked: Question,
    arms: list[Arm],
    solved: list[Any],
    found: list[Compared],
    placing: Placing,
    sure: bool,
    report: Callable[[str], None],
) -> Searched:
    """Further placements, each found at a decision of these ``arms`` and offered to every drafter at every load."""
    arms, solved, known = list(arms), list(solved), dict(placing.placements)
    best = [one.foremost.point for one in found]
    before = [None if one.rank[0] >= _BROKEN else finite(value_of(asked.goal, float(one.cost[0]))) for one in best]
    if placing.caps is None:
        return Searched(asked, arms, solved, found, known, before)
    layers, experts = placing.popularity.shape
    one = next(iter(known.values()))
    every = None
    if layers == 1:
        every = all_placements(experts, one.ranks, one.slots.shape[1] - experts, SMALL_SPACE // MOST_DECISIONS)
    drafters = list({arm.name: arm for arm in arms}.values())
    seen: set[tuple] = set()
    for number in range(ROUNDS):
        new: dict[str, ExpertPlacement] = {}
        for i, load in enumerate(asked.loads):
            chosen = found[i].foremost
            at = (i, arms[chosen.arm].name, *chosen.same[1:])
            if at in seen:
                continue
            seen.add(at)
            report(f"{load:g} req/s: placement of experts at the decision")
            problem = JointProblem(
                placing.popularity, asked, load, arms[chosen.arm], _decisions(asked, arms, chosen, found[i].best)
            )
            better = _better(problem, [*known.values(), *new.values()], every, placing.caps)
            if better is not None:
                again = f" ({number + 1})" if number else ""
                new[f"searched at {load:g} req/s{again}"] = better
        if not new:
            break
        start, known = len(arms), known | new
        for name, placement in new.items():
            table = placement.table(placing.popularity)
            arms += [on_placement(arm, name, table) for arm in drafters]
        asked = asked.counting(arms)
        solved += [
            relaxed(arm, asked.shapes, asked.goal, asked.limits, asked.each, asked.ranges, replicas=asked.sharing)
            for arm in arms[start:]
        ]
        found = [one.with_more(compared(asked, i, arms, solved, sure, start)) for i, one in enumerate(found)]
    return Searched(asked, arms, solved, found, known, before)


def _decisions(
    asked: Question, arms: list[Arm], chosen: Contender, best: list[Contender]
) -> tuple[tuple[int, np.ndarray], ...]:
    """Whole points of the chosen drafter: all, where they are few; else the chosen one, those beside it, and the best
    at other numbers of replicas."""
    arm, count = arms[chosen.arm], len(asked.classes)
    few = FEW if asked.percentiles or asked.within else MOST_DECISIONS
    if asked.ranges.points(arm, count) * len(asked.replicas) <= few:
        return tuple((replicas, asked.ranges.whole(arm, count)) for replicas in asked.replicas)
    found, own = [], int(chosen.point.replicas[0])
    for replicas in asked.replicas:
        here = [one for one in best if arms[one.arm].name == arm.name and int(one.point.replicas[0]) == replicas]
        point = (chosen if replicas == own else foremost(here)).point.points[0, :-1]
        beside = point_neighbours(arm, asked.ranges, point, count) if replicas == own else []
        found.append((replicas, np.asarray([point, *beside], dtype=float)))
    return tuple(found)


def _better(
    problem: JointProblem, known: list[ExpertPlacement], every: list[np.ndarray] | None, caps: np.ndarray
) -> ExpertPlacement | None:
    """A placement within the caps that is better than all that are known; None where none was found."""
    points = problem.points(known)
    start = min(points, key=merit_of)
    if every is not None:
        found = problem.best_of_all(every, start.placement.ranks, caps)
    else:
        within = [point for point in points if problem.keeps(point.placement, caps)]
        starts = sorted(within or points, key=merit_of)[:STARTS]
        found = min([problem.search(one, caps) for one in starts], key=merit_of)
    kept = problem.keeps(found.placement, caps)
    return found.placement if kept and found.best < start.best - BETTER * max(1.0, abs(start.best)) else None
