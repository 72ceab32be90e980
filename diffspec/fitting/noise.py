"""How measured values scatter around a fitted model: the likelihood of log residuals.

A row's mean over n requests differs from the model's by what the model misses (misfit, one scale per observable) and by
what n random requests leave (request spread / sqrt(n)):

    r = log(predicted) - log(measured) ~ Student t with nu degrees of freedom and scale sigma,
    sigma^2 = misfit^2 + request_spread^2 / n_requests

misfit, request_spread and nu are fitted with the costs, under log-normal priors: the data choose between a Gaussian
(large nu) and heavy tails (nu near 2), and rows of few requests weigh less. Repeats of one operating point share the
misfit; a row that was measured m times weighs 1/(1 + (m-1)*rho) each time (:func:`repeat_weights`).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln

MISFIT_FLOOR, MISFIT, REQUEST_SPREAD, SPREAD = 0.003, 0.03, 0.2, 0.7
"""Least misfit; prior centres [log units] of misfit and of the spread of one request; prior sd of their logarithms."""
LEAST_TAIL, TAIL = 2.0, 2.0
"""nu = LEAST_TAIL + TAIL*exp(coordinate): 4 at the prior centre."""
TYPICAL_REQUESTS = 100.0
"""Requests behind a row that does not tell how many [req]."""


class Noise(NamedTuple):
    """Scales in log units, [targets] each, and the degrees of freedom of the t distribution."""

    misfit: jnp.ndarray
    request_spread: jnp.ndarray
    degrees_of_freedom: jnp.ndarray

    def scale(self, requests):
        """sigma [targets, rows] of rows that are means over ``requests`` requests."""
        return jnp.sqrt(self.misfit[:, None] ** 2 + self.request_spread[:, None] ** 2 / requests)


def coordinates(targets: int) -> int:
    """How many standardised coordinates :func:`noise_at` takes."""
    return 2 * targets + 1


def noise_at(vector) -> Noise:
    """The noise at standardised coordinates (prior N(0, 1) each): misfits, request spreads, tail."""
    targets = (vector.shape[0] - 1) // 2
    misfit = MISFIT_FLOOR + MISFIT * jnp.exp(SPREAD * vector[:targets])
    spread = REQUEST_SPREAD * jnp.exp(SPREAD * vector[targets : 2 * targets])
    return Noise(misfit, spread, LEAST_TAIL + TAIL * jnp.exp(vector[-1]))


def negative_log_likelihood(residuals, noise: Noise, requests, weights):
    """-log p of the residuals [targets, rows]; ``weights`` likewise, 0 where unused."""
    nu, sigma = noise.degrees_of_freedom, noise.scale(requests)
    constant = gammaln(0.5 * nu) - gammaln(0.5 * (nu + 1.0)) + 0.5 * jnp.log(nu)
    each = 0.5 * (nu + 1.0) * jnp.log1p(residuals**2 / (nu * sigma**2)) + jnp.log(sigma) + constant
    return jnp.sum(each * weights)


def curvature(residuals, noise: Noise, requests, weights):
    """Weights (nu+1)/(nu*sigma^2 + r^2) of the least squares that touch -log p from above at these residuals."""
    nu, sigma = noise.degrees_of_freedom, noise.scale(requests)
    return weights * (nu + 1.0) / (nu * sigma**2 + residuals**2)


def information(noise: Noise, requests, weights):
    """Expected curvature of -log p in the residuals: (nu+1)/(nu+3)/sigma^2."""
    nu = noise.degrees_of_freedom
    return weights * (nu + 1.0) / (nu + 3.0) / noise.scale(requests) ** 2


def repeat_weights(cells: np.ndarray, residuals: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Weights [targets, rows] of rows of which some repeat the same operating point.

    ``cells`` [rows] numbers the operating points. rho, the share of the variance of residuals that repeats have in
    common, is one less the variance within cells over the whole, per target; with it m repeats of a cell weigh
    m/(1+(m-1)*rho) rows together. All ones where nothing repeats.

    >>> repeat_weights(np.array([0, 0, 1]), np.array([[0.1, 0.1, -0.1]]), np.ones((1, 3), dtype=bool))
    array([[0.5, 0.5, 1. ]])
    """
    weights = np.ones(residuals.shape)
    for target, rows in enumerate(used):
        values, members = residuals[target], cells[rows]
        _, numbers, counts = np.unique(members, return_inverse=True, return_counts=True)
        if rows.sum() == 0 or counts.max() < 2:
            continue
        kept = values[rows]
        means = np.bincount(numbers, kept) / counts
        within = np.sum((kept - means[numbers]) ** 2) / np.sum(counts - 1)
        whole = max(float(np.mean(kept**2)), 1e-300)
        share = float(np.clip(1.0 - within / whole, 0.0, 1.0))
        weights[target, rows] = 1.0 / (1.0 + (counts[numbers] - 1.0) * share)
    return weights
