"""Acceptance that decays along the draft, a_i = first_rate*decay^(i-1): two numbers for a whole curve.

A prior where few steps reached a position, and a fallback where a trace tells tokens per step only: over eight public
curves of draft lengths 1 to 8 it halves the worst error of the best constant acceptance (tests/test_acceptance.py).
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from diffspec.acceptance import MAX_DRAFT_LENGTH, AbstractPositionwise, PositionAcceptance, monotone_weights
from diffspec.parameters import Scalar
from diffspec.results import InputError
from diffspec.workload import as_numbers, check_range


class DecayingAcceptance(AbstractPositionwise):
    """Conditional acceptance a_i = min(first_rate*decay^(i-1), 1), i = 1, 2, ...

    * ``first_rate`` [1]: acceptance of the first draft token, in [0, 1]
    * ``decay`` [1]: factor from one position to the next, in (0, 10]; above 1 for n-gram and suffix drafters, whose
      matches grow more certain. 1 is :class:`diffspec.acceptance.ConstantAcceptance` at whole draft lengths.

    Real-valued draft lengths as in :class:`diffspec.acceptance.PositionAcceptance`. Errors: :class:`InputError`.

    >>> acceptance = DecayingAcceptance(0.8, 0.9)
    >>> round(float(acceptance.tokens_per_step(2)), 6)
    2.376
    """

    first_rate: Scalar
    decay: Scalar = 1.0

    def __check_init__(self):
        advice = "acceptance is a fraction: divide a percentage by 100"
        check_range("first_rate", self.first_rate, 0, 1, low_open=False, unit="", advice=advice)
        check_range("decay", self.decay, 0, 10, low_open=True, unit="(factor from one draft position to the next)")

    def conditional_rates(self, draft_length: Scalar) -> Float[Array, "32"]:
        power = jnp.asarray(self.decay, dtype=float) ** jnp.arange(MAX_DRAFT_LENGTH, dtype=jnp.result_type(float))
        rates = self.first_rate * power
        return jnp.where(rates <= 1.0, rates, 1.0)  # not minimum: it halves the slope at a rate of exactly 1

    def position_weights(self, draft_length: Scalar) -> Float[Array, "32"]:
        return monotone_weights(self.conditional_rates(draft_length), draft_length)


def fit_decay(position_acceptance: ArrayLike, reached: ArrayLike | None = None) -> DecayingAcceptance:
    """Decay of greatest likelihood: the maximum of sum_i reached_i*(a_i log p_i + (1-a_i) log(1-p_i)).

    p_i = first_rate*decay^(i-1); a_i the given conditional rates.

    ``reached``: steps that tried position i (any scale); by default in proportion to a_1*...*a_(i-1), as drafts of one
    length deliver them. The likelihood is concave, so the maximum is the only one. With one position decay is 1.

    >>> found = fit_decay([0.8, 0.72, 0.648])
    >>> round(float(found.first_rate), 6), round(float(found.decay), 6)
    (0.8, 0.9)
    """
    rates = as_numbers("position_acceptance", position_acceptance)
    reach = np.concatenate([[1.0], np.cumprod(rates)[:-1]])
    weights = reach if reached is None else as_numbers("reached", reached)
    if rates.ndim != 1 or not rates.size or not np.all((rates >= 0) & (rates <= 1)):
        raise InputError(f"position_acceptance: got {rates.tolist()}; allowed: [0, 1] each")
    if weights.shape != rates.shape or not np.all(np.isfinite(weights) & (weights >= 0)) or weights[0] <= 0:
        raise InputError("reached: allowed: one finite number >= 0 for each position, that of the first above 0")
    weights = weights / weights[0]
    columns = np.stack([np.ones(rates.size), np.arange(rates.size)])
    columns = columns[: 1 if np.count_nonzero(weights) == 1 else 2]
    target = np.clip(rates, 1e-9, 1 - 1e-9)  # where all or none were accepted the maximum would lie at infinity

    def likelihood(theta):
        with np.errstate(divide="ignore", invalid="ignore"):
            log_rate = theta @ columns
            value = weights @ (target * log_rate + (1 - target) * np.log(-np.expm1(log_rate)))
        return value if np.all(log_rate < 0) else -np.inf

    def ascent(theta):  # Fisher scoring
        rate = np.exp(theta @ columns)
        information = (columns * weights * rate / (1 - rate)) @ columns.T
        return np.linalg.solve(information, (columns * weights) @ ((target - rate) / (1 - rate)))

    theta = _climb(likelihood, ascent, np.array([np.log(0.5), 0.0])[: len(columns)])
    return _decaying(*theta)


def decay_from_tokens_per_step(draft_lengths: ArrayLike, tokens_per_step: ArrayLike) -> DecayingAcceptance:
    """Decay whose E(k) comes nearest to measured tokens per step at several whole draft lengths, in relative error.

    ``draft_lengths`` [tok], 1 to 32; ``tokens_per_step`` [tok], the bonus token included, in [1, k+1]. With a single
    draft length, decay is 1: the constant acceptance.

    >>> curve = [1.8, 2.376, 2.749248]
    >>> found = decay_from_tokens_per_step([1, 2, 3], curve)
    >>> round(float(found.first_rate), 4), round(float(found.decay), 4)
    (0.8, 0.9)
    """
    lengths, measured = as_numbers("draft_lengths", draft_lengths), as_numbers("tokens_per_step", tokens_per_step)
    if lengths.ndim != 1 or not lengths.size or lengths.shape != measured.shape:
        raise InputError(f"tokens_per_step: got {measured.size} values for {lengths.size} draft lengths")
    for k, tokens in zip(lengths.tolist(), measured.tolist(), strict=True):
        check_range("draft_length", k, 1, MAX_DRAFT_LENGTH, low_open=False, unit="tok")
        if k != round(k):
            raise InputError(f"draft_lengths: got {k:g}; allowed: whole numbers")
        check_range("tokens_per_step", tokens, 1, k + 1, low_open=False, unit="tok")
    j = np.arange(1, MAX_DRAFT_LENGTH + 1)
    within = j <= lengths[:, None]
    free = 1 if len(set(lengths.tolist())) == 1 else 2

    def parts(theta):
        log_rates = theta[0] + (theta[1] if free == 2 else 0.0) * (j - 1)
        open_ = log_rates < 0  # where a_i = 1 it does not move
        survival = np.exp(np.cumsum(np.minimum(log_rates, 0.0))) * within
        tokens = 1 + survival.sum(axis=1)
        slopes = np.stack([survival @ np.cumsum(open_), survival @ np.cumsum((j - 1) * open_)])[:free]
        return np.log(tokens / measured), slopes / tokens

    def badness(theta):
        return -float(np.sum(parts(theta)[0] ** 2)) if theta[0] <= 0 else -np.inf

    def ascent(theta):  # Gauss-Newton, lightly damped
        gap, slopes = parts(theta)
        normal = slopes @ slopes.T
        return -np.linalg.solve(normal + 1e-9 * np.eye(free) * (np.trace(normal) + 1e-12), slopes @ gap)

    start = min(max((measured.max() - 1) / measured.max(), 0.05), 0.95)
    theta = _climb(badness, ascent, np.array([np.log(start), 0.0])[:free])
    return _decaying(*theta)


def shrink_to_decay(accepted: ArrayLike, reached: ArrayLike, prior_steps: float | int = 20.0) -> PositionAcceptance:
    """A curve from counts, their own fitted decay p_i its prior: a_i = (accepted_i + m*p_i)/(reached_i + m).

    m = ``prior_steps`` says how many steps the prior weighs.

    Positions that many steps reached keep their measured rate; those that few or none reached lean on the decay, which
    also continues the curve to 32 positions. ``accepted``, ``reached`` [steps], one per position, accepted <= reached.

    >>> curve = shrink_to_decay([800, 576, 1], [1000, 800, 2]).position_acceptance
    >>> [round(float(rate), 2) for rate in curve[:4]]
    [0.8, 0.72, 0.63, 0.58]
    """
    took, tried = as_numbers("accepted", accepted), as_numbers("reached", reached)
    counts = took.shape == tried.shape and 1 <= took.size <= MAX_DRAFT_LENGTH and took.ndim == 1
    if not counts or not np.all((took >= 0) & (took <= tried) & np.isfinite(tried)):
        raise InputError("accepted: allowed: 0 to reached (finite) at each of 1 to 32 positions")
    check_range("prior_steps", prior_steps, 0, 1e9, low_open=True, unit="steps")
    decay = fit_decay(took / np.maximum(tried, 1e-12), tried)
    prior = np.asarray(decay.conditional_rates(MAX_DRAFT_LENGTH))
    took, tried = (np.pad(values, (0, MAX_DRAFT_LENGTH - values.size)) for values in (took, tried))
    return PositionAcceptance(jnp.asarray((took + prior_steps * prior) / (tried + prior_steps)))


def _climb(value: Callable, ascent: Callable, theta: np.ndarray) -> np.ndarray:
    """Ascend a function with one maximum: full steps, halved until they gain."""
    best = value(theta)
    for _ in range(500):
        step = ascent(theta)
        while (after := value(theta + step)) < best and np.max(np.abs(step)) > 1e-14:
            step = 0.5 * step
        if after < best:
            break
        theta, best = theta + step, after
        if np.max(np.abs(step)) < 1e-13:
            break
    return theta


def _decaying(log_first: float, log_decay: float = 0.0) -> DecayingAcceptance:
    return DecayingAcceptance(float(min(np.exp(log_first), 1.0)), float(np.clip(np.exp(log_decay), 1e-12, 10.0)))
