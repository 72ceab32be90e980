"""Multi-start L-BFGS (directions by Optax) with Armijo backtracking, all starts in one compiled, vmapped program.

The loop runs in Python: one value-and-gradient program is compiled per objective shape (a line search inside the
program would compile several copies), and each iteration can report progress. Lanes are always LANES wide, so that
starts and hold-out folds share one compilation.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffspec.fitting.objective import Objective

LANES = 8
GRADIENT_TOLERANCE = 1e-2
"""Largest gradient component (nats per standardised coordinate) at which a lane has converged: priors curve the loss by
at least 1, so the loss is then within 1e-4 nats of its minimum in each direction."""


class Solution(NamedTuple):
    """Per lane: vector, loss, largest gradient component, residuals [targets, rows] in log units."""

    vector: np.ndarray
    loss: np.ndarray
    gradient: np.ndarray
    residuals: np.ndarray

    @property
    def best(self) -> int:
        """Lane with the smallest finite loss."""
        return int(np.argmin(np.where(np.isfinite(self.loss), self.loss, np.inf)))


@partial(jax.jit, static_argnums=0)
def _value_and_gradient(structure, leaves, vectors, weights):
    objective = jax.tree.unflatten(structure, leaves)
    return jax.vmap(jax.value_and_grad(objective.__call__, has_aux=True))(vectors, weights)


_MEMORY = optax.scale_by_lbfgs(memory_size=20)


@jax.jit
def _directions(gradients, state, vectors):
    def one(gradient, state, vector):
        with jax.numpy_dtype_promotion("standard"):
            update, state = _MEMORY.update(gradient, state, vector)
        scaled = jnp.asarray(update)
        downhill = jnp.vdot(scaled, gradient) > 0
        return jnp.where(downhill, -scaled, -gradient), state

    return jax.vmap(one)(gradients, state, vectors)


def minimise(
    objective: Objective, starts, weights, max_iterations: int = 300, progress: Callable[[float], None] | None = None
) -> Solution:
    """Minimise from each start (at most LANES) under its own row weights; ``progress`` gets the share done."""
    count = len(starts)
    assert count <= LANES
    fill = np.arange(LANES) % count
    real = np.asarray(objective.real) > 0
    leaves, structure = jax.tree.flatten(objective)  # once: it takes longer than an evaluation
    x, row_weights = np.asarray(starts)[fill], np.zeros((LANES, len(real)))
    row_weights[:, real] = np.asarray(weights)[fill]
    state = jax.vmap(_MEMORY.init)(jnp.asarray(x))

    def evaluate(vectors):
        (value, residuals), gradient = _value_and_gradient(structure, leaves, vectors, row_weights)
        value, gradient = np.array(value), np.array(gradient)
        value[~np.isfinite(gradient).all(axis=1)] = np.inf
        return value, gradient, np.array(residuals)

    value, gradient, residuals = evaluate(x)
    stalled = np.zeros(LANES, dtype=int)
    for iteration in range(max_iterations):
        active = np.isfinite(value) & (np.abs(gradient).max(axis=1) > GRADIENT_TOLERANCE) & (stalled < 5)
        if not active.any():
            break
        if progress is not None:
            progress(iteration / max_iterations)
        direction, state = _directions(gradient, state, x)
        direction = np.array(direction)
        longest = np.abs(direction).max(axis=1)  # standardised coordinates: never move by more than one sd at once
        direction *= np.minimum(1.0, 1.0 / np.maximum(longest, 1e-300))[:, None]
        slope = np.sum(direction * gradient, axis=1)
        step, pending = np.ones(LANES), active.copy()
        new_x, new_value, new_gradient, new_residuals = x.copy(), value.copy(), gradient.copy(), residuals.copy()
        for _ in range(8):
            trial = x + (step * pending)[:, None] * direction
            trial_value, trial_gradient, trial_residuals = evaluate(trial)
            good = pending & (trial_value <= value + 1e-4 * step * slope)
            new_x[good], new_value[good] = trial[good], trial_value[good]
            new_gradient[good], new_residuals[good] = trial_gradient[good], trial_residuals[good]
            pending &= ~good
            if not pending.any():
                break
            bend = trial_value - value - step * slope  # minimum of the parabola through both values and the slope
            with np.errstate(all="ignore"):
                shorter = -slope * step / (2.0 * bend)
            step = np.where(pending, step * np.clip(np.nan_to_num(shorter, nan=0.1), 0.1, 0.5), step)
        gain = value - new_value
        small = gain < 1e-5
        stalled = np.where(active, np.where(small, stalled + 1, 0), stalled)
        stalled[pending] = 5  # no step goes downhill: at rounding error
        x, value, gradient, residuals = new_x, new_value, new_gradient, new_residuals
    if progress is not None:
        progress(1.0)
    return Solution(x[:count], value[:count], np.abs(gradient[:count]).max(axis=1), residuals[:count][:, :, real])


def random_starts(size: int, count: int = LANES, seed: int = 0) -> np.ndarray:
    """The prior centre and ``count - 1`` draws around it (standard deviation 0.7), by a fixed seed."""
    draws = np.random.default_rng(seed).normal(0.0, 0.7, (count, size))
    draws[0] = 0.0
    return draws


def refit_without(objective: Objective, folds: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each fold (True = held out; at most LANES) the residuals [targets, rows] of the best fit to the other rows,
    from the prior centre and from one draw: a poor local minimum must not decide between forms."""
    weights = [(~fold).astype(float) for fold in folds]
    tries = [
        minimise(objective, np.tile(start, (len(folds), 1)), weights, 150)
        for start in random_starts(objective.size, 2, seed=1)
    ]
    better = tries[1].loss < tries[0].loss
    return list(np.where(better[:, None, None], tries[1].residuals, tries[0].residuals))
