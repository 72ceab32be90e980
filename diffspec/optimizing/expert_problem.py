"""Placements of experts at one load: exact answers, and the search that uses them.

What else is decided there, draft lengths say, are the decisions of a problem; a placement is worth what the best of
them is. :class:`AbstractProblem` searches; :class:`Problem` is that of one workload with a draft length, and
:class:`diffspec.optimizing.joint_experts.JointProblem` that of a joint decision.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.analysis.answers import metric_values
from diffspec.analysis.plain import finite
from diffspec.configuration import Configuration
from diffspec.experts import CoverageTable, log_nodes
from diffspec.optimizing.expert_placement import ExpertPlacement
from diffspec.optimizing.expert_search import Pressure, descend, kicked, neighbours, pressure, routed
from diffspec.optimizing.limits import Limit, costs
from diffspec.optimizing.relaxation import at_draft_length
from diffspec.programs import program
from diffspec.results import RESULTS
from diffspec.serving import ServingModel
from diffspec.workload import Workload

TABLE = jax.tree.structure(CoverageTable(jnp.zeros(1), jnp.zeros(1), jnp.zeros(())))
CHUNK, KICKS, POLISHED = 8, 8, 24
"""Placements evaluated in one call; random restarts near the best, and neighbours judged exactly, before a search
ends."""
INFEASIBLE = 1e3
SMALL_SPACE = 1_000_000
"""Points (placements times decisions) below which every one is compared."""
SHOWN = ("e2e_mean", "ttft_mean", "tpot_mean", "throughput", "utilization")


@program(0)
def _evaluate(longest: int, serving: ServingModel, tables: CoverageTable, workload: Workload, config: Configuration):
    """Metrics [tables, draft lengths 0..longest] and whether the load saturates there."""
    lengths = jnp.arange(longest + 1, dtype=float)

    def point(table, length):
        prediction = routed(serving, table).predict(workload, at_draft_length(config, length))
        values = metric_values(prediction)
        return values, prediction.result == RESULTS.saturated

    return jax.vmap(lambda table: jax.vmap(lambda length: point(table, length))(lengths))(tables)


class Point(NamedTuple):
    """A placement at one load: the ``merit`` of every decision (log objective, or more than :data:`INFEASIBLE` where
    limits or capacity are broken) and its metrics."""

    placement: ExpertPlacement
    merit: np.ndarray
    metrics: dict[str, np.ndarray]

    @property
    def choice(self) -> int:
        """The number of the best decision; of a problem of one workload its draft length [tok]."""
        return int(np.argmin(self.merit))

    @property
    def best(self) -> float:
        """The merit there."""
        return float(self.merit.min())


class AbstractProblem(abc.ABC):
    """What is asked at one load: ``popularity`` [layers, experts] on a server, and what a placement is worth."""

    popularity: np.ndarray

    @abc.abstractmethod
    def points(self, placements: Sequence[ExpertPlacement]) -> list[Point]:
        """The placements, by the whole model."""

    @abc.abstractmethod
    def pressures(self, point: Point) -> list[Pressure]:
        """How the objective answers to coverage and rank load, at the best decision and at those beside it."""

    def search(self, start: Point, caps: np.ndarray) -> Point:
        """Local search from a placement: descents under the pressure at its best decision and the ones beside it, as
        long as the exact objective falls; then, for one layer, from kicked copies of what was found, and through its
        best neighbours one by one. ``caps`` [layers]: of the busiest rank."""
        best = start
        if not self.keeps(start.placement, caps):
            within = descend(self.popularity, start.placement, self.pressures(start)[0], caps)
            (best,) = self.points([within])
        for _ in range(6):
            pressed = self.pressures(best)
            found = self._best([descend(self.popularity, best.placement, p, caps) for p in pressed], caps, best)
            if found is best:
                break
            best = found
        if len(self.popularity) > 1:
            return best
        random = np.random.default_rng(0)
        for _ in range(KICKS // CHUNK):
            pressed = self.pressures(best)[:1] * CHUNK
            kicks = [kicked(best.placement, random) for _ in pressed]
            tried = [descend(self.popularity, k, p, caps) for k, p in zip(kicks, pressed, strict=True)]
            best = self._best(tried, caps, best)
        for _ in range(12):
            here = self.pressures(best)[0]
            beside = neighbours(self.popularity, best.placement, here, float(caps[0]), POLISHED)
            found = self._best(beside, caps, best)
            if found is best:
                break
            best = found
        return best

    def best_of_all(self, every: list[np.ndarray], ranks: int, caps: np.ndarray) -> Point:
        """The best of ``every`` placement of one layer within the cap."""
        return min(self.points(undominated(self.popularity, every, ranks, float(caps[0]))), key=merit_of)

    def _best(self, tried: list[ExpertPlacement], caps: np.ndarray, best: Point) -> Point:
        """The best of the placements that keep the caps where it is better than ``best``, else ``best`` itself."""
        allowed = list({p.slots.tobytes(): p for p in tried if self.keeps(p, caps)}.values())
        found = min(self.points(allowed), key=merit_of, default=best)
        return found if found.best < best.best - 1e-12 else best

    def keeps(self, placement: ExpertPlacement, caps: np.ndarray) -> bool:
        """Whether no layer's busiest rank carries more than its cap."""
        return bool(np.all(placement.loads(self.popularity).max(axis=1) <= caps * (1.0 + 1e-9)))


@dataclasses.dataclass
class Problem(AbstractProblem):
    """One workload: the decisions are draft lengths up to ``longest``, without 0 unless ``plain_known``."""

    serving: ServingModel
    popularity: np.ndarray
    config: Configuration
    workload: Workload
    longest: int
    limits: tuple[Limit, ...]
    objective: str
    plain_known: bool

    def points(self, placements: Sequence[ExpertPlacement]) -> list[Point]:
        """The placements at the load, by the whole model."""
        found = []
        for chunk, tables in chunks_of(placements, self.popularity):
            made = _evaluate(self.longest, self.serving, tables, self.workload, self.config)
            metrics, saturated = jax.tree.map(np.asarray, made)
            if not self.plain_known:
                saturated = saturated | (np.arange(self.longest + 1) == 0)
            cost, worst, feasible = costs(metrics, saturated, self.limits, self.objective)
            missed = INFEASIBLE + np.where(saturated, 100.0 + np.log(metrics["utilization"]), worst)
            merit = np.where(feasible, cost, missed)
            found += [Point(p, merit[i], {k: v[i] for k, v in metrics.items()}) for i, p in enumerate(chunk)]
        return found

    def pressures(self, point: Point) -> list[Pressure]:
        """At the best draft length, and one token more and less."""
        table, best = point.placement.table(self.popularity), point.choice
        near = [best, *(k for k in (best - 1, best + 1) if 0 <= k <= self.longest)]
        asked = (self.objective, self.serving, table, self.workload, self.config)
        return [pressure(*asked, k, bool(point.merit[k] > INFEASIBLE + 50.0)) for k in near]

    def told(self, point: Point) -> dict[str, Any]:
        """A placement in numbers, at its best draft length."""
        k, served = point.choice, point.best < INFEASIBLE
        return {
            "draft_length": k if served else None,
            **{name: finite(point.metrics[name][k]) if served else None for name in SHOWN},
            **placement_told(point.placement, self.popularity),
        }


def chunks_of(placements: Sequence[ExpertPlacement], popularity: np.ndarray):
    """The placements by :data:`CHUNK`, each with its tables, which have a leading axis of so many."""
    for first in range(0, len(placements), CHUNK):
        chunk = list(placements[first : first + CHUNK])
        curves = [placement.curves(popularity) for placement in chunk]
        curves += curves[-1:] * (CHUNK - len(curves))
        yield chunk, jax.tree.unflatten(TABLE, [np.stack(leaves) for leaves in zip(*curves, strict=True)])


def placement_told(placement: ExpertPlacement, popularity: np.ndarray) -> dict[str, Any]:
    """A placement as plain data."""
    return {
        "max_rank_load": placement.max_rank_load(popularity),
        "load_imbalance": placement.load_imbalance(popularity),
        "physical_to_logical_map": placement.slots.tolist(),
    }


def merit_of(point: Point) -> float:
    """:attr:`Point.best`, as a key to compare by."""
    return point.best


def undominated(popularity: np.ndarray, every: list[np.ndarray], ranks: int, cap: float) -> list[ExpertPlacement]:
    """Of all placements of one layer within the cap those that no other beats in coverage at every T and in rank load
    together: a step is longer where either is larger, so that one of them is the best."""
    own, slots = popularity[0], np.stack(every)
    tokens = np.exp(log_nodes())
    copies = np.stack([np.bincount(row, minlength=own.size) for row in slots])
    counts = np.arange(1, int(copies.max()) + 1)
    each = own / counts[:, None]
    log_miss = np.log(np.maximum(1.0 - each, np.finfo(float).tiny))[..., None]
    curves = -np.expm1(log_miss * tokens)
    shape = (-1, ranks, slots.shape[1] // ranks)
    load = each[copies - 1, np.arange(own.size)]
    load = np.take_along_axis(load, slots, axis=1).reshape(shape).sum(axis=2).max(axis=1)
    within = np.flatnonzero(load <= cap * (1.0 + 1e-9))
    found: list[np.ndarray] = []
    for part in np.array_split(within, max(1, len(within) // 256)):
        of = np.take_along_axis(copies[part], slots[part], axis=1) - 1
        read = curves[of, slots[part]].reshape(len(part), *shape[1:], tokens.size).sum(axis=2).max(axis=1)
        found.append(np.concatenate([read, load[part][:, None]], axis=1))
    values = np.concatenate(found)
    kept: list[int] = []
    best = np.empty((0, values.shape[1]))
    for index in np.argsort(values.sum(axis=1), kind="stable"):
        if not np.any(np.all(best <= values[index] * (1.0 + 1e-12), axis=1)):
            kept.append(int(index))
            best = values[kept]
    return [ExpertPlacement(slots[within[index]][None], ranks, own.size) for index in kept]
