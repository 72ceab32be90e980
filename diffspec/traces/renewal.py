"""How many engine steps a request takes, from measured acceptance: numpy only, for checking measurements.

With survival S_j = P(at least j drafts accepted), a step emits T tokens with ``P(T >= j+1) = S_j`` (S_0 = 1), so
``m1 = sum_j S_j`` and ``m2 = sum_j (2j+1) S_j``. Reaching n further tokens takes about
``(n + (m2/m1 - 1)/2) / m1`` steps.
"""

import math
from collections.abc import Sequence

import numpy as np

from ..acceptance_curves import tokens_per_step_to_constant


def moments(acceptance: Sequence[float]) -> tuple[float, float]:
    """First and second moment of the tokens emitted per step, from conditional acceptance a_1..a_k.

    >>> moments([1.0, 1.0])
    (3.0, 9.0)
    """
    survival = np.concatenate([[1.0], np.cumprod(np.asarray(acceptance, float))])
    return float(survival.sum()), float(((2 * np.arange(len(survival)) + 1) * survival).sum())


def expected_steps(
    output_length: float | int,
    draft_length: int,
    tokens_per_step: float | int = math.nan,
    acceptance: Sequence[float] | None = None,
    draft_probability: float = 1.0,
) -> float:
    """Steps that emit the ``output_length - 1`` tokens after the first; NaN when acceptance is unknown.

    `tokens_per_step` sets the mean where it is known and `acceptance` the shape; without `acceptance` a constant one
    that gives `tokens_per_step` is taken. In a share ``1 - draft_probability`` of steps nothing is drafted.
    """
    if draft_length == 0:
        return output_length - 1
    if acceptance is None:
        if math.isnan(tokens_per_step):
            return math.nan
        acceptance = [tokens_per_step_to_constant(tokens_per_step, draft_length)] * draft_length
    first, second = moments(acceptance)
    mean = first if math.isnan(tokens_per_step) else tokens_per_step
    excess = second / first
    if draft_probability < 1:
        first_all = 1 + draft_probability * (first - 1)
        excess = (1 + draft_probability * (second - 1)) / first_all
        mean = 1 + draft_probability * (mean - 1)
    return (output_length - 1 + (excess - 1) / 2) / mean
