"""Which of many runs to make: Bayesian optimal design of a linear model, greedily and then by exchange.

With the precision P of the parameters before any new run and the information I_i = J_i' J_i / sigma_i^2 of candidate i,
a design d leaves the covariance C(d) = (P + sum_(i in d) I_i)^-1. What is made small is

    trace criteria: tr(Q C), the mean variance of the linear questions g_j'theta with Q = mean g_j g_j'
    D criterion (no Q): log det C

(Chaloner and Verdinelli 1995; exchange: Fedorov 1972). Both are monotone: no run does harm.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

MOST_PASSES = 10
BETTER = 1e-9
"""An exchange must lower the criterion by this share (D: so many nats), so that ties end."""


def criterion(precision, questions=None, algebra: Any = np):
    """tr(Q C) of ``questions`` Q [n, n], or log det C where there are none, of ``precision`` = C^-1 [..., n, n];
    ``algebra``: numpy, or jax.numpy where a gradient is wanted.

    >>> float(criterion(np.diag([4.0, 1.0]), np.eye(2)))
    1.25
    """
    if questions is None:
        return -algebra.linalg.slogdet(precision)[1]
    return algebra.sum(questions * algebra.linalg.inv(precision), axis=(-2, -1))


def typical_deviation(value: float, parameters: int, questions=None) -> float:
    """A criterion as a standard deviation: of the typical question, or the geometric mean over ``parameters``."""
    return float(np.sqrt(value)) if questions is not None else float(np.exp(0.5 * value / parameters))


def choose(
    precision: np.ndarray,
    informations: np.ndarray,
    budget: int,
    questions: np.ndarray | None = None,
    alike: np.ndarray | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[int]:
    """Indices of at most ``budget`` candidates by their ``informations`` [candidates, n, n].

    ``alike`` [candidates, candidates], True where two candidates are too near to be chosen together, by default each to
    itself only. Fewer than ``budget`` are returned where no other candidate is left.
    """
    alike = np.eye(len(informations), dtype=bool) if alike is None else alike
    chosen: list[int] = []

    def best(others: Sequence[int]) -> tuple[int, float] | None:
        free = ~alike[list(others)].any(axis=0) if others else np.ones(len(alike), dtype=bool)
        if not free.any():
            return None
        values = criterion(precision + informations[list(others)].sum(axis=0) + informations, questions)
        index = int(np.argmin(np.where(free, values, np.inf)))
        return index, float(values[index])

    for number in range(budget):
        found = best(chosen)
        if found is None:
            break
        chosen.append(found[0])
        if progress is not None:
            progress(0.5 * (number + 1) / budget)
    for number in range(MOST_PASSES):
        before = list(chosen)
        for place in range(len(chosen)):
            now = float(criterion(precision + informations[chosen].sum(axis=0), questions))
            found = best(chosen[:place] + chosen[place + 1 :])
            least = BETTER * (abs(now) if questions is not None else 1.0)
            if found is not None and found[1] < now - least:
                chosen[place] = found[0]
        if chosen == before:
            break
        if progress is not None:
            progress(0.5 + 0.5 * (number + 1) / MOST_PASSES)
    return chosen


def in_order(
    precision: np.ndarray, informations: np.ndarray, questions: np.ndarray | None = None
) -> tuple[list[int], list[float]]:
    """Runs of a design, the one that tells most first, and the criterion after each: to stop early costs least."""
    left, order, values = list(range(len(informations))), [], []
    while left:
        found = criterion(precision + informations[left], questions)
        index = int(np.argmin(found))
        values.append(float(found[index]))
        order.append(left.pop(index))
        precision = precision + informations[order[-1]]
    return order, values
