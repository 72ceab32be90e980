"""Looking for a placement: relaxed by gradients through the equilibrium, rounded, then improved by moves and swaps.

Near a placement the cost of a step depends on it through two numbers: the coverage of the rank that reads most, at the
T that the equilibrium settles at, and the load of the busiest rank. :class:`Pressure` holds how the objective answers
to both (implicit derivatives); the search over swaps and copies minimises that and its results are judged exactly.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import linear_sum_assignment

from diffspec.analysis.answers import METRICS
from diffspec.configuration import Configuration
from diffspec.experts import CoverageTable, ExpertRouting
from diffspec.optimizing.expert_placement import ExpertPlacement
from diffspec.optimizing.limits import Limit, cost
from diffspec.optimizing.relaxation import at_draft_length
from diffspec.programs import program
from diffspec.serving import ServingModel
from diffspec.staircase import StaircaseStepTime
from diffspec.workload import Workload

STEPS, SHARPNESS, RELAXED_NODES, SINKHORN = 120, 32.0, 41, 12
MOST_RELAXED = 20_000
"""Soft assignments (layers x ranks x experts) up to which the relaxation is solved; above, local search starts from
EPLB's placement alone."""
MOST_MOVES, LEAST_GAIN, TIE = 600, 1e-9, 1e-6


class Pressure(NamedTuple):
    """``tokens``: T [tok] at which coverage matters; ``read`` and ``load``: d log objective / d log of the largest
    coverage and of the largest rank load."""

    tokens: float
    read: float
    load: float


def routed(serving: ServingModel, routing: ExpertRouting | CoverageTable) -> ServingModel:
    """The serving model with another routing of its experts, inside a staircase too."""

    def where(model):
        step_time = model.step_time
        step_time = step_time.inner if isinstance(step_time, StaircaseStepTime) else step_time
        return step_time.experts.routing  # type: ignore[attr-defined]

    return eqx.tree_at(where, serving, routing)


def routed_draws(models: ServingModel, table: CoverageTable) -> ServingModel:
    """Draws of a server (a leading axis), each with this routing of its experts."""
    count = jax.tree.leaves(models)[0].shape[0]
    return routed(models, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *np.shape(leaf))), table))


@program(0)
def _answers(value: Callable, serving: ServingModel, table: CoverageTable, data):
    def moved(log_coverage, log_imbalance):
        here = CoverageTable(log_coverage, table.elasticity, jnp.exp(log_imbalance), table.low, table.high)
        return value(routed(serving, here), data)

    return jax.grad(moved, (0, 1))(table.log_coverage, jnp.log(table.imbalance))


def pressure_of(value: Callable, serving: ServingModel, table: CoverageTable, data) -> Pressure:
    """How ``value(serving, data)``, a log objective, answers; pass the same function again to reuse its program."""
    by_node, by_load = (np.asarray(part) for part in _answers(value, serving, table, data))
    weight = np.maximum(by_node, 0.0)
    log_tokens = np.linspace(np.log(table.low), np.log(table.high), weight.size)
    total = weight.sum()
    tokens = float(np.exp((weight * log_tokens).sum() / total)) if total > 0 else 1.0
    return Pressure(tokens, float(total), max(float(by_load), 0.0))


@lru_cache
def _of_workload(objective: str, relief: bool) -> Callable:
    def value(serving, data):
        prediction = serving.predict(*data)
        return jnp.log(prediction.utilization) if relief else cost(prediction, objective)

    return value


def pressure(
    objective: str,
    serving: ServingModel,
    table: CoverageTable,
    workload: Workload,
    config: Configuration,
    length,
    relief,
) -> Pressure:
    """How the objective answers at a draft length; with ``relief`` how utilization does, where the load saturates."""
    config = at_draft_length(config, jnp.asarray(float(length)))
    return pressure_of(_of_workload(objective, relief), serving, table, (workload, config))


class _Layer:
    """One layer's placement under a pressure: reads and loads of its ranks, and what moves would make of them."""

    def __init__(self, popularity: np.ndarray, slots: np.ndarray, ranks: int, pressed: Pressure, cap: float):
        self.popularity, self.slots, self.ranks, self.pressed = popularity, slots.copy(), ranks, pressed
        self.rank_of = np.repeat(np.arange(ranks), slots.size // ranks)
        self.experts, self.cap, self.units = popularity.size, cap, (1.0, 1.0)
        reads, loads = self._sums()
        self.units = max(reads.max(), 1e-300), max(loads.max(), 1e-300)

    def _costs(self, copies, experts=slice(None)):
        each = self.popularity[experts] / np.maximum(copies, 1)
        return -np.expm1(self.pressed.tokens * np.log(np.maximum(1.0 - each, 1e-300))), each

    def _sums(self):
        copies = np.bincount(self.slots, minlength=self.experts)
        return tuple(
            np.bincount(self.rank_of, weights=each[self.slots], minlength=self.ranks) for each in self._costs(copies)
        )

    def score(self, most_read, most_load, squares):
        """Log objective up to a constant, the cap on the busiest rank as a penalty, evenness for ties."""
        told = self.pressed.read * most_read / self.units[0] + self.pressed.load * most_load / self.units[1]
        return told + TIE * squares + 1e3 * np.maximum(most_load / self.cap - 1.0 - 1e-12, 0.0)

    def now(self) -> float:
        """Score of the placement as it is."""
        reads, loads = self._sums()
        return float(self.score(reads.max(), loads.max(), self._squares(reads, loads)))

    def _squares(self, reads, loads):
        return ((reads / self.units[0]) ** 2).sum(-1) + ((loads / self.units[1]) ** 2).sum(-1)

    def swaps(self, rank: int):
        """Scores [own, others] of exchanging a slot of ``rank`` for another rank's, and both lists of slots."""
        own, others = np.flatnonzero(self.rank_of == rank), np.flatnonzero(self.rank_of != rank)
        copies = np.bincount(self.slots, minlength=self.experts)
        most, squares = [], 0.0
        for each, sums, unit in zip(self._costs(copies), self._sums(), self.units, strict=True):
            held = each[self.slots]
            change = held[others][None, :] - held[own][:, None]
            there = self.rank_of[others]
            rest = np.where(np.eye(self.ranks, dtype=bool), 0.0, sums)
            rest[:, rank] = 0.0
            beside = rest.max(axis=1)[there]
            mine, theirs = sums[rank] + change, sums[there] - change
            most.append(np.maximum(np.maximum(mine, theirs), beside))
            squares = squares + (mine**2 + theirs**2 + ((sums**2).sum() - sums[rank] ** 2 - sums[there] ** 2)) / unit**2
        return self.score(most[0], most[1], squares), own, others

    def recopies(self):
        """Scores [slots, experts] of giving a slot whose expert has other copies to another expert, and the slots."""
        copies = np.bincount(self.slots, minlength=self.experts)
        free = np.flatnonzero(copies[self.slots] > 1)
        if not free.size:
            return np.empty((0, self.experts)), free
        on_rank = np.zeros((self.ranks, self.experts))
        np.add.at(on_rank, (self.rank_of, self.slots), 1.0)
        leaving, here = self.slots[free], np.eye(self.ranks)[self.rank_of[free]]
        sums = []
        for now, less, more, total in zip(
            self._costs(copies), self._costs(copies - 1), self._costs(copies + 1), self._sums(), strict=True
        ):
            without = on_rank.T[leaving] * (less - now)[leaving][:, None] - here * less[leaving][:, None]
            with_it = (on_rank * (more - now)).T[None] + here[:, None, :] * more[None, :, None]
            sums.append(total + without[:, None, :] + with_it)
        scores = self.score(sums[0].max(-1), sums[1].max(-1), self._squares(*sums))
        scores[np.arange(free.size), leaving] = np.inf
        return scores, free

    def step(self) -> bool:
        """Make the best move of the ranks that are slowest; False where none helps."""
        before = self.now()
        reads, loads = self._sums()
        for rank in {int(reads.argmax()), int(loads.argmax())}:
            scores, own, others = self.swaps(rank)
            if scores.size and scores.min() < before - LEAST_GAIN:
                i, j = np.unravel_index(int(scores.argmin()), scores.shape)
                a, b = own[i], others[j]
                self.slots[a], self.slots[b] = self.slots[b], self.slots[a]
                return True
        scores, free = self.recopies()
        if scores.size and scores.min() < before - LEAST_GAIN:
            i, expert = np.unravel_index(int(scores.argmin()), scores.shape)
            self.slots[free[i]] = expert
            return True
        return False


def descend(popularity: np.ndarray, placement: ExpertPlacement, pressed: Pressure, caps: np.ndarray) -> ExpertPlacement:
    """Local search from a placement, layer by layer; ``caps`` [layers] bound the load of the busiest rank."""
    improved = []
    for own, slots, cap in zip(popularity, placement.slots, caps, strict=True):
        layer = _Layer(own, slots, placement.ranks, pressed, float(cap))
        moves = 0
        while moves < MOST_MOVES and layer.step():
            moves += 1
        improved.append(layer.slots)
    return ExpertPlacement(np.stack(improved), placement.ranks, placement.experts)


def kicked(placement: ExpertPlacement, random: np.random.Generator, moves: int = 3) -> ExpertPlacement:
    """The placement after a few random exchanges of slots, and of copies where there are any: another start."""
    slots = placement.slots.copy()
    for layer in slots:
        for _ in range(moves):
            a, b = random.integers(layer.size, size=2)
            layer[a], layer[b] = layer[b], layer[a]
            copied = np.flatnonzero(np.bincount(layer, minlength=placement.experts)[layer] > 1)
            if copied.size:
                layer[random.choice(copied)] = random.integers(placement.experts)
    return ExpertPlacement(slots, placement.ranks, placement.experts)


def neighbours(
    popularity: np.ndarray, placement: ExpertPlacement, pressed: Pressure, cap: float, most: int
) -> list[ExpertPlacement]:
    """The ``most`` most promising placements of one layer, one swap or copy away."""
    layer = _Layer(popularity[0], placement.slots[0], placement.ranks, pressed, cap)
    found: list[tuple[float, tuple[int, ...]]] = []
    for rank in range(placement.ranks):
        scores, own, others = layer.swaps(rank)
        for index in np.argsort(scores, axis=None)[:most]:
            i, j = np.unravel_index(int(index), scores.shape)
            slots = layer.slots.copy()
            slots[own[i]], slots[others[j]] = slots[others[j]], slots[own[i]]
            found.append((float(scores[i, j]), tuple(slots)))
    scores, free = layer.recopies()
    for index in np.argsort(scores, axis=None)[:most]:
        i, expert = np.unravel_index(int(index), scores.shape)
        slots = layer.slots.copy()
        slots[free[i]] = expert
        found.append((float(scores[i, expert]), tuple(slots)))
    ranked = dict.fromkeys(slots for _, slots in sorted(found))
    chosen = [np.asarray(slots)[None] for slots in list(ranked)[:most]]
    return [ExpertPlacement(slots, placement.ranks, placement.experts) for slots in chosen]


def soft_routing(logits, extra, popularity, slots_per_rank: float, redundant: float) -> ExpertRouting:
    """Expert e has c_e = 1 + N*softmax(extra)_e copies, x[r, e] of them on rank r: exp(logits) scaled by Sinkhorn's
    iteration until experts have c_e copies and ranks S/R slots; the slowest rank is a norm over ranks."""
    copies = 1.0 + redundant * jax.nn.softmax(extra, axis=-1)

    def balance(_, x):
        x = x * (slots_per_rank / jnp.sum(x, axis=-1, keepdims=True))
        return x * (copies / jnp.sum(x, axis=-2))[..., None, :]

    placed = jnp.exp(logits - jnp.max(logits, axis=-2, keepdims=True))
    placed = jax.lax.fori_loop(0, SINKHORN, balance, placed)
    share = jnp.broadcast_to(1.0 / copies[..., None, :], placed.shape)
    return ExpertRouting(popularity, placed, share, SHARPNESS)


@program(0, 1, 2, 3, 4)
def _relax(
    objective,
    limits: tuple[Limit, ...],
    longest,
    size,
    redundant,
    serving,
    workload,
    config,
    popularity,
    starts,
    caps,
    drafts,
):
    def merit(point):
        logits, extra, length = point
        routing = soft_routing(logits, extra, popularity, float(size), float(redundant))
        table = CoverageTable.of(routing, RELAXED_NODES)
        prediction = routed(serving, table).predict(workload, at_draft_length(config, length))
        over = [limit.excess(getattr(prediction, METRICS[limit.metric])) for limit in limits]
        load = routing.load_imbalance() * jnp.sum(popularity[0]) / logits.shape[-2]
        over += [jnp.log(prediction.utilization), jnp.log(load) - jnp.log(jnp.mean(caps))]
        broken = jnp.maximum(jnp.stack(over), 0.0)
        return cost(prediction, objective) + jnp.sum(10.0 * broken**2 + broken)

    optimiser = optax.adam(optax.cosine_decay_schedule(0.25, STEPS, 0.02))
    low = jnp.where(drafts, 1.0, 0.0)

    def solve(start):
        def step(_, carry):
            point, state = carry
            slope = jax.grad(merit)(point)
            with jax.numpy_dtype_promotion("standard"):
                update, state = optimiser.update(slope, state)
            logits, extra, length = jax.tree.map(jnp.add, point, update)
            return (logits, extra, jnp.clip(jnp.where(drafts, length, 0.0), low, float(longest))), state

        point, _ = jax.lax.fori_loop(0, STEPS, step, (start, optimiser.init(start)))
        return point, merit(point)

    points, merits = jax.vmap(solve)(starts)
    logits, extra, length = jax.tree.map(lambda leaf: leaf[jnp.argmin(merits)], points)
    return soft_routing(logits, extra, popularity, float(size), float(redundant)), length


def relaxed_placement(
    objective: str,
    limits: tuple[Limit, ...],
    longest: int,
    serving: ServingModel,
    workload: Workload,
    config: Configuration,
    popularity: np.ndarray,
    start: ExpertPlacement,
    length: float,
    caps: np.ndarray,
) -> tuple[ExpertPlacement, float] | None:
    """Soft assignment, copies and draft length by Adam, all at once, through the equilibrium; rounded. None where the
    problem is larger than :data:`MOST_RELAXED`. Starts: ``start`` softened, and an even assignment."""
    layers, experts = popularity.shape
    if layers * start.ranks * experts > MOST_RELAXED:
        return None
    size = start.slots.shape[1] // start.ranks
    redundant = start.slots.shape[1] - experts
    near = np.log(start.on_rank + 0.3)
    even = 0.1 * np.random.default_rng(0).standard_normal(near.shape)
    copied = np.log(start.copies - 1 + 0.1)
    popular = np.log(popularity + 1e-3)
    starts = (np.stack([near, even]), np.stack([copied, popular]), np.full(2, float(length)))
    drafts = np.asarray(length > 0)
    soft, drafted = _relax(
        objective, limits, longest, size, redundant, serving, workload, config, popularity, starts, caps, drafts
    )
    slots = [
        rounded(np.asarray(placed), np.asarray(1.0 / share[0]), redundant)
        for placed, share in zip(soft.placement, soft.share, strict=True)  # type: ignore[arg-type]
    ]
    return ExpertPlacement(np.stack(slots), start.ranks, experts), float(drafted)


def rounded(placed: np.ndarray, copies: np.ndarray, redundant: int) -> np.ndarray:
    """Slots of one layer from a soft assignment [ranks, experts]: whole copies where the soft ones exceed them most,
    then the assignment of copies to slots with the largest sum of shares.

    >>> rounded(np.array([[0.9, 0.6, 0.5], [0.1, 0.9, 1.0]]), np.array([1.0, 1.5, 1.5]), 1)
    array([0, 1, 1, 2])
    """
    whole = np.ones(copies.size, int)
    for _ in range(redundant):
        whole[int(np.argmax(copies - whole))] += 1
    items = np.repeat(np.arange(copies.size), whole)
    rank_of = np.repeat(np.arange(len(placed)), items.size // len(placed))
    item, slot = linear_sum_assignment(-(placed / copies)[rank_of][:, items].T)
    slots = np.empty(items.size, int)
    slots[slot] = items[item]
    return slots
