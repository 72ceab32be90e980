"""One row's worth of learning: an iterated extended Kalman filter with Student t noise and directional forgetting.

State: standardised coordinates x with x ~ N(mean, P), whose priors before any data are N(., I). A row measures
y = h(x) + sigma*t_nu. Before a row is met, what is known of the directions it measures fades by ``factor`` <= 1:

    P <- P + (1/factor - 1) * P H' (H P H')^-1 H P,        no eigenvalue above 1

so that the variance of what the row measures grows by 1/factor, what it does not measure stays as it is, and nothing is
ever less known than before any data (directional forgetting, Kulhavy and Karny 1984, in its covariance form). Then

    mean <- argmin (x - mean)' P^-1 (x - mean)/2 - log t_nu((y - h(x))/sigma)    by iterated, reweighted gains
    P <- (P^-1 + H' diag(min(w, 1)*(nu+1)/(nu+3)/sigma^2) H)^-1

with the weight w = (nu+1)/(nu + r^2/sigma^2) of its residual r, or that of what it brought over what was expected where
that is less: one row far from all that was known is not believed until the next ones agree (Agamennoni et al. 2012).
For a linear h, factor 1 and large nu this is recursive least squares: the batch fit of old and new rows. Draws are an
ensemble: each is moved by the same gain towards the measurement, scattered once more (Burgers et al. 1998).
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from diffspec.results import InputError

ITERATIONS, TOLERANCE = 6, 1e-4
"""Gains taken for one row at most, and the move [prior standard deviations] at which the row is done."""
FARTHEST = 2.0
"""Longest move of a coordinate in one gain [prior standard deviations]."""
LEAST_FORGETTING = 0.5

Measure = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class State:
    """``mean`` [n], ``covariance`` [n, n] and ``draws`` [d, n] (deviations from the mean; none: [0, n])."""

    mean: np.ndarray
    covariance: np.ndarray
    draws: np.ndarray


@dataclasses.dataclass(frozen=True)
class Innovation:
    """What a row brought: ``error`` [m] = measured - expected before the row, and the ``variance`` [m] of what was
    expected (of h alone, without noise); log units."""

    error: np.ndarray
    variance: np.ndarray


def check_forgetting(factor: float) -> None:
    """Raise :class:`InputError` unless LEAST_FORGETTING <= factor <= 1."""
    if not LEAST_FORGETTING <= factor <= 1.0:
        raise InputError(
            f"forgetting: got {factor:g}; allowed: {LEAST_FORGETTING:g} to 1 a row (1: old rows count for ever, 0.98: "
            "50 rows or so count)"
        )


def within_prior(state: State) -> State:
    """The state with no direction less known than N(0, 1)."""
    values, vectors = np.linalg.eigh(0.5 * (state.covariance + state.covariance.T))
    if values[-1] <= 1.0:
        return state
    shrink = (vectors * np.sqrt(np.minimum(1.0, 1.0 / np.maximum(values, 1e-300)))) @ vectors.T
    return State(state.mean, shrink @ state.covariance @ shrink, state.draws @ shrink)


def forget(state: State, jacobian: np.ndarray, factor: float) -> State:
    """The state before a row with ``jacobian`` [m, n] is met; see the module.

    >>> state = State(np.zeros(2), np.diag([0.1, 0.1]), np.zeros((0, 2)))
    >>> np.round(np.diag(forget(state, np.array([[1.0, 0.0]]), 0.5).covariance), 9).tolist()
    [0.2, 0.1]
    """
    if factor == 1.0:
        return state
    along = state.covariance @ jacobian.T
    back = np.linalg.pinv(jacobian @ along, hermitian=True) @ along.T
    covariance = state.covariance + (1.0 / factor - 1.0) * along @ back
    draws = state.draws + (factor**-0.5 - 1.0) * state.draws @ jacobian.T @ back
    return within_prior(State(state.mean, covariance, draws))


def widen(state: State, deviation: np.ndarray, random: np.random.Generator) -> State:
    """The state after a change of unknown direction: each coordinate moved by N(0, deviation^2)."""
    moved = state.draws + random.standard_normal(state.draws.shape) * deviation
    return within_prior(State(state.mean, state.covariance + np.diag(deviation**2), moved))


def innovation(state: State, measure: Measure, values: np.ndarray) -> Innovation:
    """What a row brings to a state. Errors: ValueError where h is not finite at the mean."""
    expected, jacobian = measure(state.mean)
    if not (np.isfinite(expected).all() and np.isfinite(jacobian).all()):
        raise ValueError("nothing is expected of this row")
    return Innovation(values - expected, np.einsum("mi,ij,mj->m", jacobian, state.covariance, jacobian))


def correct(
    state: State,
    measure: Measure,
    values: np.ndarray,
    scale: np.ndarray,
    degrees_of_freedom: float,
    *,
    forgetting: float = 1.0,
    draw_scale: np.ndarray | float = 1.0,
    random: np.random.Generator | None = None,
) -> tuple[State, Innovation]:
    """The state after a row of ``values`` [m] with noise ``scale`` [m]; ``measure(x)`` gives h [m] and its jacobian
    [m, n]. Draws meet the values scattered by ``draw_scale`` times the noise. Errors: ValueError where h is not finite
    at the mean: nothing is expected of such a row."""
    brought = innovation(state, measure, values)
    expected, jacobian = measure(state.mean)
    state = forget(state, jacobian, forgetting)
    nu, x = degrees_of_freedom, state.mean
    surprise = brought.error**2 / (brought.variance + scale**2)
    weight = believed = (nu + 1.0) / (nu + surprise)
    for _ in range(ITERATIONS):
        gain = _gain(state.covariance, jacobian, scale**2 / weight)
        step = state.mean + gain @ (values - expected - jacobian @ (state.mean - x)) - x
        step *= min(1.0, FARTHEST / max(np.abs(step).max(), 1e-300))
        for _ in range(8):
            found, slope = measure(x + step)
            if np.isfinite(found).all() and np.isfinite(slope).all():
                break
            step = 0.5 * step
        else:
            break
        x, expected, jacobian = x + step, found, slope
        weight = np.minimum(believed, (nu + 1.0) / (nu + ((values - expected) / scale) ** 2))
        if np.abs(step).max() < TOLERANCE:
            break
    noise = scale**2 * (nu + 3.0) / (nu + 1.0) / np.minimum(weight, 1.0)
    gain = _gain(state.covariance, jacobian, noise)
    kept = np.eye(len(x)) - gain @ jacobian
    covariance = kept @ state.covariance @ kept.T + (gain * noise) @ gain.T
    draws = state.draws
    if len(draws):
        assert random is not None, "draws need a generator"
        scatter = random.standard_normal((len(draws), len(values)))
        draws = draws @ kept.T + (scatter - scatter.mean(axis=0)) * draw_scale * np.sqrt(noise) @ gain.T
    return State(x, covariance, draws), brought


def _gain(covariance: np.ndarray, jacobian: np.ndarray, noise: np.ndarray) -> np.ndarray:
    along = jacobian @ covariance
    return np.linalg.solve(along @ jacobian.T + np.diag(noise), along).T
