"""How sure a joint decision is: the points in question at one load, compared again in draws of what is not known.

All whole points in all draws would be many, so the shortlist is compared: the best by the model as it is, the best of
each drafter at each number of replicas, the best that drafts alike for all classes, and no speculation. A probability
is that of being the best of these. Draws are of parameters alone; what a fit misses beyond them moves no choice as far
as all points share it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffspec.analysis.intervals import NO_INTERVALS, spread
from diffspec.fitting.uncertainty import LEVEL
from diffspec.optimizing.every_length import SPREAD_DRAWS
from diffspec.optimizing.joint_problem import (
    FEW,
    ClassLimit,
    Objective,
    Shapes,
    cost_of,
    evaluate_draws,
    excesses,
    over_all,
    unmet,
)
from diffspec.optimizing.joint_search import Arm, Scored, rows
from diffspec.optimizing.limits import EQUAL


class Contender(NamedTuple):
    """One whole point: the number of its arm, and the point alone, evaluated."""

    arm: int
    point: Scored

    @property
    def key(self) -> tuple[float, float, float]:
        """What is made small: the rank; of equal ones the mean e2e latency, then the replicas."""
        return *self.point.key, float(self.point.replicas[0])

    @property
    def keeps(self) -> bool:
        """Whether the load is served within the limits."""
        return not (self.point.saturated[0] or self.point.worst[0] > 0)

    @property
    def broken(self) -> bool:
        """Whether the load is served, but not within the limits."""
        return bool(self.point.worst[0] > 0 and not self.point.saturated[0])

    @property
    def same(self) -> tuple:
        """What tells it from others."""
        return (self.arm, int(self.point.replicas[0]), *self.point.points[0].tolist())


def contenders(arm: int, found: Scored, most: int = FEW) -> list[Contender]:
    """The best ``most`` different points of one arm."""
    kept: dict[tuple, Contender] = {}
    for row in found.order:
        one = Contender(arm, rows(found, [row]))
        kept.setdefault(one.same, one)
        if len(kept) == most:
            break
    return list(kept.values())


def roomiest(arm: int, found: Scored, most: int = FEW // 4) -> list[Contender]:
    """The points of one arm that are farthest from breaking a limit: what may keep it in more draws than the best."""
    return [Contender(arm, rows(found, [row])) for row in np.argsort(found.worst, kind="stable")[:most]]


def shortlist(must: Sequence[Contender], others: Sequence[Contender]) -> list[Contender]:
    """Different ones: all that ``must`` be there, then the best of the ``others`` up to :data:`FEW`."""
    chosen = {one.same: one for one in sorted(must, key=lambda one: one.key)}
    for one in sorted(others, key=lambda one: one.key):
        if len(chosen) >= FEW:
            break
        chosen.setdefault(one.same, one)
    return list(chosen.values())


class Drawn(NamedTuple):
    """The shortlist in every draw: log ``cost`` [draws, points], whether the limits are kept, and ``e2e`` [s], infinite
    where saturated."""

    cost: np.ndarray
    feasible: np.ndarray
    e2e: np.ndarray


def draw_shortlist(
    arms: Sequence[Arm],
    listed: Sequence[Contender],
    shapes: Shapes,
    goal: Objective,
    limits: Sequence[ClassLimit],
    load: float,
) -> Drawn:
    """Every point of the shortlist in every draw of its arm's models."""
    parts: dict[int, tuple[np.ndarray, ...]] = {}
    groups: dict[tuple[int, int], list[int]] = {}
    for number, one in enumerate(listed):
        groups.setdefault((one.arm, int(one.point.replicas[0])), []).append(number)
    for (arm, replicas), numbers in groups.items():
        points = np.concatenate([listed[number].point.points for number in numbers])
        models, drafted = arms[arm].models, arms[arm].drafted._replace(candidates=None)
        if drafted.tails is not None and drafted.tails.spread:
            models = jax.tree.map(lambda leaf: leaf[:SPREAD_DRAWS], models)
        metrics, saturated = evaluate_draws(drafted, models, shapes, load / replicas, points)  # type: ignore[arg-type]
        kept = ~saturated
        for excess in excesses(limits, metrics, shapes.share, replicas):
            kept &= np.asarray(excess) <= 0
        cost = np.asarray(cost_of(goal, metrics, shapes)) - (np.log(replicas) if goal.made_large else 0.0)
        e2e = np.where(saturated, np.inf, over_all("e2e_mean", metrics, shapes.share))
        kept &= ~unmet(goal, metrics, cost)
        for column, number in enumerate(numbers):
            parts[number] = (cost[:, column], kept[:, column], e2e[:, column])
    return Drawn(*(np.stack(column, axis=1) for column in zip(*(parts[n] for n in range(len(listed))), strict=True)))


def interval_of(
    drawn: Drawn, candidates: Sequence[int], chosen: int, plain: int | None, goal: Objective
) -> dict[str, Any]:
    """How the choice at one load varies over draws: how many ``candidates`` of the shortlist were ``compared``; the
    ``objective`` and the ``speedup`` over no speculation, low, median and high; the chosen one's ``probability_best``
    and ``chosen_feasible_share``; the ``feasible_share`` of draws in which any keeps the limits; ``expected_regret``
    [1] against each draw's best."""
    kept = np.where(drawn.feasible, drawn.cost, np.inf)[:, candidates]
    any_kept, keeps = np.isfinite(kept).any(axis=1), drawn.feasible[:, chosen]
    equal = EQUAL if goal.flat else 1e-10  # of equally good ones the smaller latency, as chosen
    level = kept <= kept.min(axis=1, keepdims=True) + equal
    least = np.where(level, drawn.e2e[:, candidates], np.inf).argmin(axis=1)
    best = np.where(any_kept, np.asarray(candidates)[least], -1)
    regret = np.expm1(drawn.cost[keeps, chosen] - kept[keeps].min(axis=1))
    sign = -1.0 if goal.made_large else 1.0
    values = np.where(np.isfinite(drawn.e2e[:, chosen]), np.exp(sign * drawn.cost[:, chosen]), np.nan)
    told: dict[str, Any] = {
        "compared": int(kept.shape[1]),
        "objective": spread(values),
        "probability_best": float((best == chosen).mean()),
        "feasible_share": float(any_kept.mean()),
        "chosen_feasible_share": float(keeps.mean()),
        "expected_regret": float(regret.mean()) if keeps.any() else None,
        "speedup": None,
    }
    if plain is not None:
        with np.errstate(invalid="ignore"):
            told["speedup"] = spread(drawn.e2e[:, plain] / drawn.e2e[:, chosen])
    return told


def intervals_told(entries: list[dict[str, Any]], arms: Sequence[Arm]) -> dict[str, Any]:
    """``intervals`` and ``intervals_reason`` of the whole answer."""
    without = [arm.name for arm in arms if arm.models is None]
    if without:
        return {"intervals": None, "intervals_reason": f"{', '.join(dict.fromkeys(without))}: {NO_INTERVALS}"}
    draws, tails = int(np.shape(jax.tree.leaves(arms[0].models)[0])[0]), arms[0].drafted.tails
    draws = min(draws, SPREAD_DRAWS) if tails is not None and tails.spread else draws
    told = {"level": LEVEL, "draws": draws, "includes": ["parameters"], "loads": entries}
    return {"intervals": told, "intervals_reason": None}
