"""What `optimize` is asked: an objective and limits on means, percentiles, goodput, energy and cost.

    goodput [req/s] = throughput * product over the limits on single requests of P(metric <= bound)

The product is the joint probability of independent limits. Load lengthens all latencies of a request, so that they are
positively associated, and then it is a lower bound (Esary, Proschan and Walkup, 1967, eq. 4.1) for the shares it is of.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffspec.optimizing.limits import (
    ALL_LIMITED,
    MEMORY,
    OBJECTIVES,
    PER_REQUEST,
    PERCENTILE_METRICS,
    SPENT,
    Limit,
    check_loads,
    check_throughput,
    parse_limit,
)
from diffspec.results import InputError

ALL_OBJECTIVES = (*OBJECTIVES, *PERCENTILE_METRICS, "goodput", *SPENT)


@dataclass(frozen=True)
class Question:
    """``objective``; ``limits`` on metrics; ``within``: those on single requests, which goodput counts."""

    objective: str
    limits: tuple[Limit, ...]
    within: tuple[Limit, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that is looked at, each once."""
        return tuple(dict.fromkeys([self.objective, *(limit.metric for limit in self.limits)]))

    @property
    def percentiles(self) -> tuple[str, ...]:
        """Those of :attr:`metrics` that are percentiles.

        >>> read_question("e2e_mean", ["ttft_p95<0.5"], "arrival_rate", [1.0], 8).percentiles
        ('ttft_p95',)
        """
        return tuple(name for name in self.metrics if name in PERCENTILE_METRICS)

    @property
    def bounds(self) -> np.ndarray:
        """The bounds [s] of :attr:`within`."""
        return np.asarray([limit.bound for limit in self.within])

    @property
    def of_one(self) -> "Question":
        """The same question with all bounds 1: what a program is compiled for, whatever the bounds."""
        limits, within = (tuple(limit.of_one for limit in part) for part in (self.limits, self.within))
        return Question(self.objective, limits, within)

    @property
    def spread(self) -> bool:
        """Whether it asks for more of latencies than their means."""
        return bool(self.percentiles) or "goodput" in self.metrics

    @property
    def spent(self) -> tuple[str, ...]:
        """Those of energy, cost and memory that are looked at."""
        return tuple(name for name in self.metrics if name in (*SPENT, MEMORY))


def check_within(within: Sequence[tuple[str, Limit]], goodput: bool) -> None:
    """Raise :class:`InputError` unless limits on single requests, each with the words it is told by, are upper ones and
    are there where ``goodput`` is looked at, and only there."""
    for text, limit in within:
        if limit.sign < 0:
            raise InputError(f"limit {text!r}: allowed: an upper limit, {limit.metric}<NUMBER")
    if within and not goodput:
        text, name = within[0][0], within[0][1].metric
        raise InputError(
            f"limit {text!r} is one on each request, which only goodput counts; allowed: {name}_mean<NUMBER, "
            f"{name}_p95<NUMBER, or with it the objective goodput or a limit goodput>NUMBER"
        )
    if goodput and not within:
        raise InputError("goodput: got no limit that a request must keep; allowed: at least one, such as 'ttft<0.5'")


def read_question(objective: str, slo: Sequence[str], loop: str, loads: Sequence[float], longest: int) -> Question:
    """Read and check an objective and limits such as ``"ttft_p95<0.5"`` [s]; ``"ttft<0.5"``: a limit on each request.

    Errors: :class:`InputError` for what is unknown, and for what means nothing: throughput or cost as objectives in an
    open loop, percentiles in a closed one, goodput without limits on single requests and those without goodput.

    >>> read_question("goodput", ["ttft<0.5", "tpot<0.03"], "arrival_rate", [1.0], 8).within[0].text
    'ttft<0.5'
    """
    if objective not in ALL_OBJECTIVES:
        near = difflib.get_close_matches(objective, ALL_OBJECTIVES, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"objective: got {objective!r}; allowed: {', '.join(ALL_OBJECTIVES)}{hint}")
    check_throughput(objective, loop)
    check_loads(loads, loop, longest)
    every = tuple(parse_limit(text, ALL_LIMITED) for text in slo)
    on_requests = [limit for limit in every if limit.metric in PER_REQUEST]
    strictest = {limit.metric: limit for limit in sorted(on_requests, key=lambda limit: -limit.bound)}
    found = Question(
        objective,
        tuple(limit for limit in every if limit.metric not in PER_REQUEST),
        tuple(strictest[name] for name in PER_REQUEST if name in strictest),
    )
    check_within([(limit.text, limit) for limit in found.within], "goodput" in found.metrics)
    if found.spread and loop != "arrival_rate":
        name = (*found.percentiles, "goodput")[0]
        raise InputError(f"{name}: got a closed loop, which has no percentiles here; allowed: loads as arrival_rate")
    if objective == "cost" and loop == "arrival_rate":
        raise InputError(
            "objective: got 'cost' in an open loop, where one server's cost per token is that of its arrival_rate "
            "whatever the draft length; allowed: a closed loop, or `diffspec size` for how many servers to buy"
        )
    return found
