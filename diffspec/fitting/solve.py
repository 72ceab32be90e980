"""Minimisers of an objective, all starts in one compiled, vmapped program.

The loop runs in Python: one program is compiled per objective shape (a line search inside the program would compile
several copies), and each iteration can report progress. Lanes are always LANES wide, so that starts and hold-out folds
share one compilation, whichever the solver:

* ``gauss-newton``: Levenberg-Marquardt on the reweighted least squares that touch the loss from above
* ``lbfgs``: directions by Optax, Armijo backtracking; ``adam``: Optax, for losses that are far from quadratic
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffspec.fitting.objective import Linearised, Objective
from diffspec.programs import program

LANES = 8
SOLVERS = ("gauss-newton", "lbfgs", "adam")
GRADIENT_TOLERANCE = 1e-3
"""Largest gradient component (nats per standardised coordinate) at which a lane has converged: priors curve the loss by
at least 1, so the loss is then within 1e-6 nats of its minimum in each direction."""
SMALL_GAIN, PATIENCE = 1e-6, 5
"""A lane whose loss [nats] fell by less than this so many times in a row has stalled."""
FARTHEST = 2.0
"""Longest move of a coordinate in one step [prior standard deviations]."""
ADAM_RATE, ADAM_STEPS = 0.05, 2000


class Solution(NamedTuple):
    """Per lane: vector, loss, largest gradient component, residuals [targets, rows] in log units, their jacobian
    [targets, rows, places], and how many times the program was evaluated."""

    vector: np.ndarray
    loss: np.ndarray
    gradient: np.ndarray
    residuals: np.ndarray
    jacobian: np.ndarray
    evaluations: int

    @property
    def best(self) -> int:
        """Lane with the smallest finite loss."""
        return int(np.argmin(np.where(np.isfinite(self.loss), self.loss, np.inf)))


@program(0, compiler_options={})
def _linearise(structure, leaves, *of_lanes):
    objective = jax.tree.unflatten(structure, leaves)
    return jax.vmap(objective.linearise)(*of_lanes)


class Lanes:
    """Where the lanes stand: ``x`` and everything known there. Moves that do not lower the loss are not taken."""

    def __init__(self, objective: Objective, starts, weights, offsets, centres, tolerance):
        self.tolerance = tolerance
        fill = np.arange(LANES) % len(starts)
        real = np.asarray(objective.real) > 0
        self._leaves, self._structure = jax.tree.flatten(objective)  # once: it takes longer than an evaluation
        self._weights, self._offsets = np.zeros((2, LANES, len(objective.columns), len(real)))
        self._weights[:, :, real] = np.asarray(weights)[fill]
        self._offsets[:, :, real] = 0.0 if offsets is None else np.asarray(offsets)[fill]
        self._centres = np.zeros((LANES, objective.size)) if centres is None else np.asarray(centres)[fill]
        self.evaluations = 0
        self.x = np.asarray(starts)[fill]
        self.at = self.evaluate(self.x)
        self.stalled = np.zeros(LANES, dtype=int)

    def evaluate(self, vectors) -> Linearised:
        self.evaluations += 1
        problem = (self._weights, self._offsets, self._centres)
        found = _linearise(self._structure, self._leaves, vectors, *problem)
        found = Linearised(*(np.array(part) for part in found))
        found.loss[~np.isfinite(found.gradient).all(axis=1)] = np.inf
        return found

    @property
    def active(self) -> np.ndarray:
        """Lanes that have neither converged nor stalled."""
        moving = np.abs(self.at.gradient).max(axis=1) > self.tolerance
        return np.isfinite(self.at.loss) & moving & (self.stalled < PATIENCE)

    def take(self, lanes, vectors, found: Linearised) -> None:
        """Move ``lanes`` to ``vectors``; small gains are counted."""
        gain = self.at.loss - found.loss
        self.stalled = np.where(lanes, np.where(gain < SMALL_GAIN, self.stalled + 1, 0), self.stalled)
        self.x = np.where(lanes[:, None], vectors, self.x)
        for name, part in zip(Linearised._fields, found, strict=True):
            chosen = lanes.reshape(-1, *[1] * (part.ndim - 1))
            self.at = self.at._replace(**{name: np.where(chosen, part, getattr(self.at, name))})


def minimise(
    objective: Objective,
    starts,
    weights,
    max_iterations: int = 300,
    progress: Callable[[float], None] | None = None,
    solver: str = "gauss-newton",
    *,
    offsets=None,
    centres=None,
    tolerance: float = GRADIENT_TOLERANCE,
) -> Solution:
    """Minimise from each start (at most LANES) under its own ``weights`` [starts, targets, rows]; ``progress`` gets the
    share done. ``offsets`` and ``centres``: see :meth:`Objective.linearise`, by default none. ``tolerance`` of the
    gradient [nats]."""
    count = len(starts)
    assert count <= LANES and solver in SOLVERS
    lanes = Lanes(objective, starts, weights, offsets, centres, tolerance)
    move = {"gauss-newton": _gauss_newton, "lbfgs": _lbfgs, "adam": _adam}[solver](lanes)
    most = ADAM_STEPS if solver == "adam" else max_iterations
    for iteration in range(most):
        if not lanes.active.any():
            break
        if progress is not None:
            progress(iteration / most)
        move()
    if progress is not None:
        progress(1.0)
    real = np.asarray(objective.real) > 0
    at = lanes.at
    return Solution(
        vector=lanes.x[:count],
        loss=at.loss[:count],
        gradient=np.abs(at.gradient[:count]).max(axis=1),
        residuals=at.residuals[:count][:, :, real],
        jacobian=at.jacobian[:count][:, :, real],
        evaluations=lanes.evaluations,
    )


def _shortened(direction: np.ndarray) -> np.ndarray:
    longest = np.abs(direction).max(axis=1)
    return direction * np.minimum(1.0, FARTHEST / np.maximum(longest, 1e-300))[:, None]


def _gauss_newton(lanes: Lanes) -> Callable[[], None]:
    damping = np.full(LANES, 1e-3)

    def move() -> None:
        nonlocal damping
        active = lanes.active
        values, vectors = np.linalg.eigh(np.where(active[:, None, None], lanes.at.curvature, np.eye(lanes.x.shape[1])))
        # the priors curve every direction by 1; where the noise's exact curvature is negative, its size is used
        curved = np.maximum(np.abs(values), 1e-3) + damping[:, None] * np.maximum(np.abs(values), 1.0)
        along = np.einsum("lij,li->lj", vectors, np.where(active[:, None], lanes.at.gradient, 0.0))
        direction = _shortened(-np.einsum("lij,lj->li", vectors, along / curved))
        trial = lanes.x + direction
        found = lanes.evaluate(trial)
        better = active & (found.loss < lanes.at.loss)
        worse = active & ~better
        lanes.stalled[worse & (damping > 1e10)] = PATIENCE  # no step goes downhill: at rounding error
        damping = np.where(better, np.maximum(damping / 5.0, 1e-9), np.where(worse, damping * 8.0, damping))
        lanes.take(better, trial, found)

    return move


_MEMORY = optax.scale_by_lbfgs(memory_size=20)


def lbfgs_memory(vector):
    """Optax's L-BFGS state of one lane that has not moved yet."""
    return _MEMORY.init(vector)


@program(compiler_options={})
def lbfgs_directions(gradients, state, vectors):
    """Optax's L-BFGS direction of every lane [lanes, variables], downhill in any case, and the states after it."""

    def one(gradient, state, vector):
        with jax.numpy_dtype_promotion("standard"):
            update, state = _MEMORY.update(gradient, state, vector)
        scaled = jnp.asarray(update)
        downhill = jnp.vdot(scaled, gradient) > 0
        return jnp.where(downhill, -scaled, -gradient), state

    return jax.vmap(one)(gradients, state, vectors)


def _lbfgs(lanes: Lanes) -> Callable[[], None]:
    state = jax.vmap(lbfgs_memory)(jnp.asarray(lanes.x))

    def move() -> None:
        nonlocal state
        direction, state = lbfgs_directions(lanes.at.gradient, state, lanes.x)
        direction = _shortened(np.array(direction))
        pending, step = lanes.active, np.ones(LANES)
        slope = np.sum(direction * lanes.at.gradient, axis=1)
        for _ in range(8):
            trial = lanes.x + (step * pending)[:, None] * direction
            found = lanes.evaluate(trial)
            rise = found.loss - lanes.at.loss
            good = pending & (rise <= 1e-4 * step * slope)
            with np.errstate(all="ignore"):  # minimum of the parabola through both values and the slope
                shorter = np.nan_to_num(-slope * step / (2.0 * (rise - step * slope)), nan=0.1)
            lanes.take(good, trial, found)
            pending = pending & ~good
            if not pending.any():
                return
            step = np.where(pending, step * np.clip(shorter, 0.1, 0.5), step)
        lanes.stalled[pending] = PATIENCE  # no step goes downhill: at rounding error

    return move


def _adam(lanes: Lanes) -> Callable[[], None]:
    rule = optax.adam(ADAM_RATE)
    state, x, at = rule.init(jnp.asarray(lanes.x)), lanes.x, lanes.at

    def move() -> None:
        nonlocal state, x, at
        with jax.numpy_dtype_promotion("standard"):
            update, state = rule.update(jnp.asarray(np.nan_to_num(at.gradient)), state)
        x = x + np.asarray(update)
        at = lanes.evaluate(x)
        lanes.take(lanes.active & (at.loss < lanes.at.loss), x, at)  # it need not go downhill every time

    return move


def random_starts(size: int, count: int = LANES, seed: int = 0) -> np.ndarray:
    """The prior centre and ``count - 1`` draws around it (standard deviation 0.7), by a fixed seed."""
    draws = np.random.default_rng(seed).normal(0.0, 0.7, (count, size))
    draws[0] = 0.0
    return draws


def refit_without(objective: Objective, folds: Sequence[np.ndarray], weights: np.ndarray) -> Solution:
    """The best fit to the rows outside each fold (True = held out; at most LANES), one a lane, from the prior centre
    and from one draw: a poor local minimum must not decide between forms."""
    kept = [weights * ~fold for fold in folds]
    first, second = (
        minimise(objective, np.tile(start, (len(folds), 1)), kept, 150)
        for start in random_starts(objective.size, 2, seed=1)
    )
    better = second.loss < first.loss

    def chosen(one, other):
        return np.where(better.reshape(-1, *[1] * (one.ndim - 1)), other, one)

    parts = [chosen(*pair) for pair in zip(first[:-1], second[:-1], strict=True)]
    return Solution(*parts, evaluations=first.evaluations + second.evaluations)
