"""One acceptance curve in its five conventions: numpy only, exact both ways.

| name        | symbol                   | meaning                                                      |
|-------------|--------------------------|--------------------------------------------------------------|
| conditional | a_1..a_k                 | P(draft i accepted given 1..i-1 were): position_acceptance here |
| marginal    | S_i = a_1*...*a_i        | P(drafts 1..i accepted): per-position rates as vLLM logs them |
| histogram   | h_j = S_j - S_(j+1)      | P(exactly j drafts accepted), j = 0..k; counts of steps serve as well |
| tokens_per_step | E = 1 + S_1 + ... + S_k | mean emitted per step, bonus token included [tok]          |
| draft_acceptance_rate | (E - 1)/k      | accepted over drafted, as engines log it                      |

The first three hold the same knowledge; the last two are means of it, and go back to a constant acceptance only. How
acceptance depends on load, temperature or position in the answer is left to data: measure a curve for each.
"""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from diffspec.results import InputError
from diffspec.workload import as_numbers, check_range

_ROUNDED = 1e-9


def conditional_to_marginal(conditional: ArrayLike) -> Float[np.ndarray, "positions"]:
    """S_i = a_1*...*a_i [1], shape (k,). Errors: :class:`InputError` for a rate outside [0, 1].

    >>> conditional_to_marginal([0.8, 0.5]).tolist()
    [0.8, 0.4]
    """
    return np.cumprod(_fractions("conditional", conditional))


def marginal_to_conditional(marginal: ArrayLike) -> Float[np.ndarray, "positions"]:
    """a_i = S_i/S_(i-1) [1], shape (k,); 0 after a position that is never reached.

    Errors: :class:`InputError` for a rate outside [0, 1] or one above that of the position before it: such rates are
    perhaps conditional already.

    >>> marginal_to_conditional([0.8, 0.4, 0.0, 0.0]).tolist()
    [0.8, 0.5, 0.0, 0.0]
    """
    marginal = _fractions("marginal", marginal)
    before = np.concatenate([[1.0], marginal[:-1]])
    rising = np.flatnonzero(marginal > before + _ROUNDED)
    if rising.size:
        i = int(rising[0])
        raise InputError(
            f"marginal: got {marginal[i]:g} at position {i + 1}; allowed: at most {before[i]:g}, the rate before it; "
            "perhaps these are conditional rates"
        )
    return np.where(before > 0, np.minimum(marginal / np.where(before > 0, before, 1.0), 1.0), 0.0)


def conditional_to_histogram(conditional: ArrayLike) -> Float[np.ndarray, "outcomes"]:
    """P(exactly j drafts accepted) for j = 0..k [1], shape (k+1,); sums to 1.

    >>> conditional_to_histogram([0.5, 0.5]).tolist()
    [0.5, 0.25, 0.25]
    """
    survival = np.concatenate([[1.0], conditional_to_marginal(conditional), [0.0]])
    return survival[:-1] - survival[1:]


def histogram_to_conditional(histogram: ArrayLike) -> Float[np.ndarray, "positions"]:
    """a_i = P(at least i accepted)/P(at least i-1 accepted) [1] from probabilities or counts of j = 0..k accepted.

    Every step must have drafted k tokens: where drafts vary in length, count reached positions instead. 0 after a
    position that is never reached. Errors: :class:`InputError` for a negative entry, or none above 0.

    >>> histogram_to_conditional([10, 5, 5]).tolist()
    [0.5, 0.5]
    """
    counts = as_numbers("histogram", histogram)
    if counts.ndim != 1 or counts.size < 2 or not np.all(np.isfinite(counts) & (counts >= 0)) or counts.sum() <= 0:
        raise InputError("histogram: allowed: finite numbers >= 0 for 0, 1, ..., k accepted drafts, not all of them 0")
    at_least = np.cumsum(counts[::-1])[::-1]
    return np.where(at_least[:-1] > 0, at_least[1:] / np.where(at_least[:-1] > 0, at_least[:-1], 1.0), 0.0)


def conditional_to_tokens_per_step(conditional: ArrayLike) -> float:
    """E = 1 + sum of S_i [tok], the bonus token included.

    >>> conditional_to_tokens_per_step([0.8, 0.5])
    2.2
    """
    return float(1.0 + conditional_to_marginal(conditional).sum())


def conditional_to_draft_acceptance_rate(conditional: ArrayLike) -> float:
    """Accepted over drafted, (E - 1)/k [1]: the mean of the marginal rates, below the conditional ones.

    >>> round(conditional_to_draft_acceptance_rate([0.8, 0.5]), 6)
    0.6
    """
    return float(conditional_to_marginal(conditional).mean())


def draft_acceptance_rate_to_tokens_per_step(draft_acceptance_rate: float | int, draft_length: float | int) -> float:
    """E = 1 + draft_length*draft_acceptance_rate [tok], whatever the curve; the rate in [0, 1].

    >>> draft_acceptance_rate_to_tokens_per_step(0.6, 2)
    2.2
    """
    check_range("draft_length", draft_length, 0, 1e6, low_open=False, unit="tok")
    return float(1.0 + draft_length * _fractions("draft_acceptance_rate", [draft_acceptance_rate])[0])


def tokens_per_step_to_constant(tokens_per_step: float | int, draft_length: float | int) -> float:
    """The constant rate alpha with 1 + alpha + ... + alpha^k = E [1], by bisection on [0, 1]; k = draft_length may lie
    between whole positions, the last of which then counts (1 - alpha^fraction)/(1 - alpha).

    >>> round(tokens_per_step_to_constant(1.75, 2), 6)
    0.5
    """
    check_range("draft_length", draft_length, 0, 1e6, low_open=True, unit="tok")
    check_range("tokens_per_step", tokens_per_step, 1, draft_length + 1, low_open=False, unit="tok")
    whole = int(draft_length)
    fraction = draft_length - whole
    low, high = 0.0, 1.0
    for _ in range(50):  # more would round the rate to 1
        rate = 0.5 * (low + high)
        last = rate ** (whole + 1) * (1.0 - rate**fraction) / (1.0 - rate)
        tokens = 1.0 + np.sum(rate ** np.arange(1, whole + 1)) + last
        low, high = (rate, high) if tokens < tokens_per_step else (low, rate)
    return 0.5 * (low + high)


def _fractions(name: str, rates: ArrayLike) -> np.ndarray:
    values = as_numbers(name, rates)
    if values.ndim != 1 or not values.size or not np.all((values >= 0) & (values <= 1)):
        raise InputError(f"{name}: got {values.tolist()}; allowed: [0, 1] each; divide percentages by 100")
    return values
