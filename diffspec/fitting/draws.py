"""How what a fit leaves open is drawn, by name.

* ``randomised`` (the default), randomised maximum a posteriori: each draw is the best fit to measurements that were
  scattered once more by the fitted noise, under priors whose centres were drawn from the priors. Exact for linear
  models with normal noise, and every draw is a server that the rows allow (Oliver, He, Reynolds 1996).
* ``bootstrap``, parametric: each draw is the best fit to measurements that the fit itself predicts, scattered by its
  noise, under the priors as they are (Efron 1979). The frequentist answer: how far fits to repeats of the same
  benchmark would be apart. Where the rows tell nothing every draw stays at the prior's centre, and is too sure.
* ``nuts``: the posterior itself, by Hamiltonian Monte Carlo with BlackJAX (Hoffman and Gelman 2014); minutes, noise
  drawn too; it starts from ``randomised`` draws, and chains that disagree end in an error. Needs
  ``pip install 'diffspec[posterior]'``.
* ``laplace``: the covariance at the fit, no draws; quick and rough, see :mod:`diffspec.fitting.uncertainty`.

Refits and chains see rows whose noise is widened by the ``inflation`` that held-out rows asked for. Repeats of one
operating point share their misfit.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.fitting.objective import Objective
from diffspec.fitting.solve import LANES, Solution, minimise
from diffspec.fitting.uncertainty import DRAWS, Uncertainty, laplace
from diffspec.results import InputError, NoResultError

DRAW_ITERATIONS, DRAW_TOLERANCE = 30, 0.1
"""A refit need not be exact: most steps, and the gradient [nats] at which it is done."""
CHAINS, WARM_UP, PER_CHAIN = 4, 200, 150
"""Of ``nuts``: chains side by side, steps that adapt and are dropped, and steps that are kept of each."""
MOST_R_HAT = 1.2
"""Chains that differ more than this (split R-hat, largest coordinate) have not found the same posterior."""


def randomised(objective, solution, weights, cells, inflation, count: int = DRAWS, seed: int = 0) -> Uncertainty:
    """Draws by randomised maximum a posteriori; see the module."""
    drawn = _refits(objective, solution, weights, cells, inflation, count, seed, around_the_fit=False)
    return _told("randomised", drawn, objective, solution, weights, cells, inflation)


def bootstrap(objective, solution, weights, cells, inflation, count: int = DRAWS, seed: int = 0) -> Uncertainty:
    """Draws by parametric bootstrap; see the module."""
    drawn = _refits(objective, solution, weights, cells, inflation, count, seed, around_the_fit=True)
    return _told("bootstrap", drawn, objective, solution, weights, cells, inflation)


def _told(method: str, drawn: np.ndarray, objective: Objective, *fitted) -> Uncertainty:
    """The uncertainty with draws of the whole vector [count, size], as deviations from the fit; none where there are
    none."""
    draws = drawn[:, : len(objective.form.paths)] * np.asarray(objective.form.spread)
    return dataclasses.replace(laplace(objective, *fitted), method=method, draws=draws if len(draws) else None)


def _widened(objective: Objective, weights, inflation) -> tuple[np.ndarray, np.ndarray]:
    """(inflation factors [targets, 1], weights of rows whose noise is that much wider)."""
    factors = np.asarray([inflation.get(column, 1.0) for column in objective.columns])[:, None]
    return factors, weights / factors**2


def _refits(
    objective: Objective, solution: Solution, weights, cells, inflation, count, seed, *, around_the_fit: bool
) -> np.ndarray:
    """Deviations [count, size] of best fits to scattered rows; fewer where refits have no finite loss."""
    vector, random = solution.vector[solution.best], np.random.default_rng(seed)
    noise = objective.noise(jnp.asarray(vector))
    factors, tempered = _widened(objective, weights, inflation)
    _, numbers = np.unique(cells, return_inverse=True)
    misfit, spread = np.asarray(noise.misfit)[:, None], np.asarray(noise.request_spread)[:, None]
    sampled = spread / np.sqrt(np.asarray(objective.requests)[np.asarray(objective.real) > 0])
    measured = -solution.residuals[solution.best] if around_the_fit else 0.0
    kept: list[np.ndarray] = []
    while len(kept) < count:
        shape = (LANES, len(objective.columns), len(numbers))
        shared = random.standard_t(float(noise.degrees_of_freedom), shape)[:, :, numbers]
        own = random.standard_t(float(noise.degrees_of_freedom), shape)
        found = minimise(
            objective,
            np.tile(vector, (LANES, 1)),
            np.tile(tempered, (LANES, 1, 1)),
            DRAW_ITERATIONS,
            offsets=measured + factors * (misfit * shared + sampled * own),
            centres=None if around_the_fit else random.standard_normal((LANES, objective.size)),
            tolerance=DRAW_TOLERANCE,
        )
        usable = np.isfinite(found.loss)
        if not usable.any():
            break
        kept.extend(found.vector[usable] - vector)
    return np.asarray(kept[:count]).reshape(-1, objective.size)


def sampler() -> Any:
    """The BlackJAX package. Errors: :class:`InputError` where it is not installed."""
    try:
        import blackjax  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise InputError("uncertainty 'nuts' needs BlackJAX: pip install 'diffspec[posterior]'") from None
    return blackjax


def nuts(objective, solution, weights, cells, inflation, count: int = DRAWS, seed: int = 0) -> Uncertainty:
    """Draws of the posterior by the no-U-turn sampler, thinned to about ``count``; see the module.

    Errors: :class:`InputError` without BlackJAX; :class:`NoResultError` where the chains disagree.
    """
    blackjax = sampler()
    best = jnp.asarray(solution.vector[solution.best])
    real = np.asarray(objective.real) > 0
    padded = np.zeros((len(objective.columns), len(real)))
    padded[:, real] = _widened(objective, weights, inflation)[1]

    near = _refits(objective, solution, weights, cells, inflation, DRAWS, seed, around_the_fit=False)
    if len(near) < DRAWS:
        raise NoResultError(
            "uncertainty 'nuts': refits to scattered rows fail, so there is nowhere to start; take 'laplace'"
        )
    # coordinates in which the posterior is about round, if the refits are near it
    along = np.linalg.cholesky(np.cov(near.T) + 1e-2 * np.diag(near.var(axis=0)))

    def log_density(place):
        value = -objective(best + jnp.asarray(along) @ place, jnp.asarray(padded))
        return jnp.where(jnp.isfinite(value), value, -jnp.inf)

    def chain(key, start):
        adapt_key, run_key = jax.random.split(key)
        adaptation = blackjax.window_adaptation(blackjax.nuts, log_density, max_num_doublings=6)
        (state, tuned), _ = adaptation.run(adapt_key, start, num_steps=WARM_UP)
        kernel = blackjax.nuts(log_density, **tuned)

        def step(state, key):
            state, _ = kernel.step(key, state)
            return state, state.position

        return jax.lax.scan(step, state, jax.random.split(run_key, PER_CHAIN))[1]

    with jax.numpy_dtype_promotion("standard"):
        keys = jax.random.split(jax.random.key(seed), CHAINS)
        starts = jnp.asarray(np.linalg.solve(along, near[:CHAINS].T).T)
        chains = np.asarray(jax.jit(jax.vmap(chain))(keys, starts)) @ along.T
    furthest = split_r_hat(chains[:, :, : len(objective.form.paths)])
    if not furthest <= MOST_R_HAT:
        raise NoResultError(
            f"uncertainty 'nuts': {CHAINS} chains of {PER_CHAIN} draws disagree (split R-hat {furthest:.2f}; allowed: "
            f"up to {MOST_R_HAT:g}); take 'randomised'"
        )
    every = max(1, math.floor(CHAINS * PER_CHAIN / count))
    drawn = chains.reshape(-1, objective.size)[::every]
    return _told("nuts", drawn, objective, solution, weights, cells, inflation)


def split_r_hat(chains: np.ndarray) -> float:
    """Largest split R-hat over the coordinates of ``chains`` [chains, draws, coordinates] (Gelman et al. 2013, BDA3):
    the spread of half chains' means beside the spread within them; 1 when all agree.

    >>> rng = np.random.default_rng(0)
    >>> round(split_r_hat(rng.standard_normal((4, 1000, 2))), 1)
    1.0
    """
    half = chains.shape[1] // 2
    halves = np.concatenate([chains[:, :half], chains[:, half : 2 * half]])
    within = halves.var(axis=1, ddof=1).mean(axis=0)
    between = halves.mean(axis=1).var(axis=0, ddof=1)
    return float(np.sqrt((half - 1) / half + between / np.maximum(within, 1e-300)).max())


UNCERTAINTIES = {"randomised": randomised, "bootstrap": bootstrap, "nuts": nuts, "laplace": laplace}
"""How what a fit leaves open is found, by name."""
