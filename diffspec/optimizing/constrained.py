"""Minimise under limits within bounds: an augmented Lagrangian with Optax's L-BFGS directions, all lanes side by side.

    minimise f(x) subject to c_j(x) <= 0 and 0 <= x <= 1
    L(x) = f(x) + sum_j ( max(0, multiplier_j + weight*c_j(x))^2 - multiplier_j^2 ) / (2*weight)

Each round lowers L by projected quasi-Newton steps (coordinates that are held at a bound by the gradient rest, the
others move along the L-BFGS direction and are clipped; Armijo's rule, backtracking), then raises the multipliers to
max(0, multiplier + weight*c) and, where the violation has not shrunk to a quarter, the weight (Powell, Hestenes,
Rockafellar; Nocedal and Wright, Numerical Optimization, ch. 17). At a solution the Karush-Kuhn-Tucker conditions hold:

    stationarity     largest |x - clip(x - gradient of f + sum_j multiplier_j*c_j, 0, 1)|
    complementarity  largest |multiplier_j*c_j|
    violation        largest max(0, c_j)

Coordinates that are ``alike`` (groups of them) may enter f by the largest of a group, which has a kink where they meet:
there no step along the gradient goes downhill though moving them together does, so that is tried next, and stationarity
is that of moving them together.

And -multiplier_j is the derivative of the least f by the bound of limit j (its shadow price). A lane is one start, or
one load, or both; every lane has its own ``data``. The loop runs in Python: one program is compiled, for the value, the
limits and their gradient, and every evaluation of it is counted.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffspec.fitting.solve import lbfgs_directions, lbfgs_memory
from diffspec.programs import program

ROUNDS, STEPS, WEIGHT, MOST_WEIGHT = 12, 30, 10.0, 1e6
TOLERANCE = 1e-5
"""Stationarity, complementarity and violation at which a lane is done."""
BACKTRACKS = 8
PATIENCE = 4
"""Moves in a row that hardly lower the Lagrangian, after which a lane has stalled."""
TIED = 1e-3
"""Coordinates that are alike and closer than this meet."""
HOPELESS = 3
"""Rounds in a row that leave the violation within a tenth of the least: no point near keeps the limits."""


class Solution(NamedTuple):
    """Where the lanes ended: ``x`` [lanes, variables] in [0, 1], ``value`` of f and ``excess`` [lanes, limits] there,
    ``multipliers`` [lanes, limits], the conditions' residuals [lanes], and ``evaluations`` of all lanes at once."""

    x: Float[np.ndarray, "lanes variables"]
    value: Float[np.ndarray, "lanes"]
    excess: Float[np.ndarray, "lanes limits"]
    multipliers: Float[np.ndarray, "lanes limits"]
    stationarity: Float[np.ndarray, "lanes"]
    complementarity: Float[np.ndarray, "lanes"]
    violation: Float[np.ndarray, "lanes"]
    evaluations: int

    def best(self, lanes: np.ndarray | slice = slice(None)) -> int:
        """Of these lanes the feasible one (violation up to 1e-4) with the smallest value, else the least violated."""
        numbers = np.arange(len(self.x))[lanes]
        feasible = self.violation[numbers] <= 1e-4
        rank = np.where(feasible, self.value[numbers], 1e12 * (1.0 + self.violation[numbers]))
        return int(numbers[np.argmin(rank)])


def minimise_within(
    function: Callable,
    starts: Float[np.ndarray, "lanes variables"],
    data: Any = None,
    shared: Any = None,
    *,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    tolerance: float = TOLERANCE,
    alike: Sequence[Sequence[int]] = (),
    limits: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Solution:
    """Minimise ``function(x, data, shared)`` -> (f, c [limits]) from each start; ``data``: a pytree with an axis of
    lanes; ``shared``: one that all lanes have in common.

    ``function`` must be differentiable and finite, saturated or not; pass the same function again to reuse its
    compiled program. ``rounds`` of multipliers, each of up to ``steps`` moves; ``limits``: how many, where that is
    known without tracing the function; ``progress`` gets the share done.

    >>> found = minimise_within(lambda x, *_: ((x[0] - 1.0) ** 2 + x[1], x[:1] - 0.25), np.full((1, 2), 0.5))
    >>> found.x[0].round(4).tolist(), found.multipliers[0].round(3).tolist()
    ([0.25, 0.0], [1.5])
    """
    x = np.clip(np.asarray(starts, dtype=float), 0.0, 1.0)
    lanes = len(x)
    evaluations = 0

    def evaluate(at, multipliers, weight):
        nonlocal evaluations
        evaluations += 1
        found = _evaluate(function, at, data, multipliers, weight, shared)
        return tuple(np.array(part) for part in found)

    weight = np.full(lanes, WEIGHT)
    if limits is None:
        limits = int(jax.eval_shape(function, *jax.tree.map(lambda leaf: leaf[0], (x, data)), shared)[1].shape[0])
    multipliers = np.zeros((lanes, limits))
    worst, least, hopeless = np.full(lanes, np.inf), np.full(lanes, np.inf), np.zeros(lanes, dtype=int)
    done = np.zeros(lanes, dtype=bool)
    for number in range(rounds):
        at = evaluate(x, multipliers, weight)
        lagrangian = partial(evaluate, multipliers=multipliers, weight=weight)
        x, at, stuck = _descend(x, at, done, lagrangian, steps, tolerance, alike)
        value, excess = at[1], at[2]
        raised = np.maximum(multipliers + weight[:, None] * excess, 0.0)
        multipliers = np.where(done[:, None], multipliers, raised)
        violation = np.max(np.maximum(excess, 0.0), axis=1, initial=0.0)
        complementarity = np.max(np.abs(np.where(multipliers > 0, multipliers * excess, 0.0)), axis=1, initial=0.0)
        # the gradient of the augmented Lagrangian is that of the Lagrangian at the raised multipliers
        stationarity = np.abs(x - np.clip(x - _together(x, at[3], alike)[1], 0.0, 1.0)).max(axis=1)
        # at a kink of f no step goes downhill though the gradient is not 0: that is an end too
        ended = (stationarity <= 10.0 * tolerance) | stuck
        done |= (violation <= tolerance) & (complementarity <= tolerance) & ended
        hopeless = np.where(violation > np.maximum(0.9 * least, tolerance), hopeless + 1, 0)
        least = np.minimum(least, violation)
        done |= hopeless >= HOPELESS
        slow = ~done & (np.maximum(violation, complementarity) > 0.25 * worst)
        weight = np.where(slow, np.minimum(5.0 * weight, MOST_WEIGHT), weight)
        worst = np.maximum(violation, complementarity)
        if progress is not None:
            progress((number + 1) / rounds)
        if done.all():
            break
    return Solution(x, value, excess, multipliers, stationarity, complementarity, violation, evaluations)


@program(0)
def _evaluate(function, x, data, multipliers, weight, shared):
    """(augmented Lagrangian, f, c, gradient) of every lane."""

    def lagrangian(x, data, multipliers, weight):
        value, excess = function(x, data, shared)
        penalty = (jnp.maximum(multipliers + weight * excess, 0.0) ** 2 - multipliers**2) / (2.0 * weight)
        return value + jnp.sum(penalty), (value, excess)

    def one(*lane):
        (merit, (value, excess)), gradient = jax.value_and_grad(lagrangian, has_aux=True)(*lane)
        return merit, value, excess, gradient

    return jax.vmap(one)(x, data, multipliers, weight)


def tied_groups(x: np.ndarray, alike: Sequence[int]) -> list[list[int]]:
    """The coordinates ``alike`` of one x, in groups that lie within :data:`TIED` of each other."""
    groups: list[list[int]] = []
    for number in sorted(alike, key=lambda number: x[number]):
        if groups and x[number] - x[groups[-1][-1]] < TIED:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _together(x, gradient, alike: Sequence[Sequence[int]]):
    """x with coordinates that meet put to their mean, and the gradient of moving them together, shared by each."""
    x, gradient = x.copy(), gradient.copy()
    for lane in range(len(x)):
        for group in [group for each in alike for group in tied_groups(x[lane], each)]:
            x[lane, group] = x[lane, group].mean()
            gradient[lane, group] = gradient[lane, group].sum()
    return x, gradient


def _descend(x, at, done, evaluate, steps: int, tolerance: float, alike: Sequence[Sequence[int]]):
    """Lower the augmented Lagrangian of the lanes that are not ``done``: (x, what is known there, lanes in which no
    step goes downhill any more)."""
    memories = [jax.vmap(lbfgs_memory)(jnp.asarray(x)) for _ in range(2)]
    still = np.zeros(len(x), dtype=int)
    for _ in range(steps):
        active = ~done & (still < PATIENCE) & (np.abs(x - np.clip(x - at[3], 0.0, 1.0)).max(axis=1) > tolerance)
        if not active.any():
            break
        before, pending, met = at[0], active, _together(x, at[3], alike)
        for number, (start, gradient) in enumerate([(x, at[3]), met, met]):
            held = ((start <= 0.0) & (gradient > 0)) | ((start >= 1.0) & (gradient < 0))
            free = np.where(held, 0.0, gradient)
            direction = -free
            if number < 2:
                found, memories[number] = lbfgs_directions(jnp.asarray(free), memories[number], jnp.asarray(start))
                direction = np.where(held, 0.0, np.array(found))
            longest = np.abs(direction).max(axis=1, keepdims=True)
            direction = direction * np.minimum(1.0, 0.5 / np.maximum(longest, 1e-300))
            if pending.any():
                x, at, pending = _search(x, at, start, direction, pending, evaluate)
        still[pending] = PATIENCE
        with np.errstate(invalid="ignore"):  # lanes whose start has no finite value stay there
            small = ~(np.abs(before - at[0]) >= 1e-9 * (1.0 + np.abs(before)))
        still = np.where(active & small, still + 1, np.where(active, 0, still))
    return x, at, still >= PATIENCE


def _search(x, at, start, direction, pending, evaluate):
    """Backtrack from ``start`` along ``direction`` in the ``pending`` lanes: (x, what is known there, lanes in which
    every step was too poor)."""
    step, pending = np.ones(len(x)), pending.copy()
    moved, reached = x.copy(), tuple(part.copy() for part in at)
    for _ in range(BACKTRACKS):
        trial = np.where(pending[:, None], np.clip(start + step[:, None] * direction, 0.0, 1.0), moved)
        found = evaluate(trial)
        gain = np.minimum(np.sum(at[3] * (trial - x), axis=1), 0.0)
        better = pending & np.isfinite(found[0]) & (found[0] < at[0] + 1e-4 * gain)
        moved[better] = trial[better]
        for old, new in zip(reached, found, strict=True):
            old[better] = new[better]
        pending &= ~better
        if not pending.any():
            break
        step = np.where(pending, 0.35 * step, step)
    return moved, reached, pending
