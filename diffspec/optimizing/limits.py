"""Latency limits (SLOs) and objectives: read from text, measured as a log excess that gradients can reduce."""

import difflib
import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import MAX_DRAFT_LENGTH
from diffspec.analysis.answers import METRICS
from diffspec.latency_distribution import PERCENTILE_METRICS
from diffspec.results import InputError

LOOPS = ("arrival_rate", "concurrency")
LIMITED = ("ttft_mean", "itl_mean", "tpot_mean", "e2e_mean", "throughput", "utilization")
PER_REQUEST = ("ttft", "tpot", "e2e")
"""Limits that a single request keeps or not, which goodput counts."""
SPENT = ("energy", "cost")
"""Per million output tokens: J, and money."""
MEMORY = "memory"
"""GB in use on each of the verifier's devices with the batch at its cap: :class:`diffspec.resources.MemoryUse`."""
ALL_LIMITED = (*LIMITED, *PERCENTILE_METRICS, "goodput", *SPENT, MEMORY, *PER_REQUEST)
"""What `optimize` of one model knows limits on."""
MAXIMISED = ("throughput", "goodput")
EQUAL = 1e-3
"""Goodputs that agree to this, relatively, are equally good."""
OBJECTIVES = ("e2e_mean", "ttft_mean", "tpot_mean", "itl_mean", "throughput")
_PATTERN = re.compile(r"^\s*([A-Za-z0-9_]+)\s*(<=|>=|<|>)\s*([0-9.eE+-]+)\s*$")


class Limit(NamedTuple):
    """``metric`` below (``sign`` = 1) or above (-1) ``bound``; strict or not makes no difference to a mean."""

    metric: str
    sign: int
    bound: float

    @property
    def percentile(self) -> tuple[str, float] | None:
        """(metric, share of requests that must keep it) of a limit on a percentile, None of one on a mean.

        >>> Limit("ttft_p95", 1, 0.5).percentile
        ('ttft', 0.95)
        """
        if self.metric not in PERCENTILE_METRICS:
            return None
        metric, percent = self.metric.split("_p")
        return metric, float(percent) / 100.0

    @property
    def text(self) -> str:
        """As a user writes it, such as ``ttft_mean<0.5``."""
        return f"{self.metric}{'<' if self.sign > 0 else '>'}{self.bound:g}"

    @property
    def of_one(self) -> "Limit":
        """The same limit at a bound of 1: what a program is compiled for, whatever the bound."""
        return self._replace(bound=1.0)

    def excess(self, value):
        """log(value/bound) for an upper limit, its negative for a lower one: > 0 where the limit is broken."""
        return self.sign * (_log(value) - math.log(self.bound))

    def told(self, value: float | None) -> dict[str, float | None]:
        """A ``value`` that breaks it as plain data: beside the ``bound``, and by which share it does (``excess``).

        >>> Limit("ttft_mean", 1, 0.5).told(0.75)["excess"]
        0.5
        """
        share = None if value is None else self.sign * (value / self.bound - 1.0)
        return {"value": value, "bound": self.bound, "excess": share}


def _log(value):
    """Of numpy's arrays without a program for each of their shapes."""
    if isinstance(value, jax.Array):
        return jnp.log(value)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(value)


def parse_limit(text: str, allowed: Sequence[str] = LIMITED, instead: str = "") -> Limit:
    """Read ``metric<bound`` or ``metric>bound`` (s, req/s, GB or a fraction) of one of the ``allowed`` metrics.

    Errors: :class:`InputError` naming what was got and what is allowed; of metrics that only others of
    :data:`ALL_LIMITED` are, what to do ``instead``, where that is given.

    >>> parse_limit("ttft_mean < 0.5")
    Limit(metric='ttft_mean', sign=1, bound=0.5)
    """
    match = _PATTERN.match(text)
    if match is None:
        raise InputError(f"limit: got {text!r}; allowed: METRIC<NUMBER or METRIC>NUMBER, such as 'ttft_mean<0.5'")
    metric, comparison, number = match.groups()
    if instead and metric in ALL_LIMITED and metric not in allowed:
        raise InputError(f"limit {text!r}: here limits are on {', '.join(allowed)}; allowed: {instead}")
    if metric not in allowed:
        near = difflib.get_close_matches(metric, allowed, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"limit {text!r}: unknown metric {metric!r}; allowed: {', '.join(allowed)}{hint}")
    try:
        bound = float(number)
    except ValueError:
        bound = math.nan
    if not (math.isfinite(bound) and bound > 0):
        raise InputError(f"limit {text!r}: got bound {number!r}; allowed: a number above 0")
    if metric in PERCENTILE_METRICS and comparison.startswith(">"):
        raise InputError(f"limit {text!r}: a percentile is limited from above: {metric}<NUMBER")
    if metric == MEMORY and comparison.startswith(">"):
        raise InputError(f"limit {text!r}: memory is limited from above, in GB: memory<NUMBER")
    if metric in MAXIMISED and comparison.startswith("<"):
        raise InputError(f"limit {text!r}: a throughput is limited from below: {metric}>NUMBER")
    return Limit(metric, 1 if comparison.startswith("<") else -1, bound)


def of_rate(limits: Sequence[Limit]) -> tuple[tuple[Limit, ...], float]:
    """(the limits that a lower rate may keep, the least bound on memory [GB], which it does not; infinite for none).

    >>> of_rate([Limit("memory", 1, 72.0), Limit("ttft_mean", 1, 0.5)])
    ((Limit(metric='ttft_mean', sign=1, bound=0.5),), 72.0)
    """
    held = [limit.bound for limit in limits if limit.metric == MEMORY]
    return tuple(limit for limit in limits if limit.metric != MEMORY), min(held, default=math.inf)


def beyond(excesses: Sequence, limits: Sequence[Limit], bounds) -> list:
    """Log excesses over ``bounds`` [limits] from those at a bound of 1 (:attr:`Limit.of_one`)."""
    return [found - one.sign * jnp.log(bound) for found, one, bound in zip(excesses, limits, bounds, strict=True)]


def check_question(objective: str, loop: str, loads: Sequence[float], longest: int) -> None:
    """Raise :class:`InputError` unless the objective is known and means something in this loop, loads are positive and
    increase, and the longest draft length is in range."""
    check_objective(objective)
    check_throughput(objective, loop)
    check_loads(loads, loop, longest)


def check_throughput(objective: str, loop: str) -> None:
    """Raise :class:`InputError` for throughput as the objective of an open loop."""
    if objective == "throughput" and loop == "arrival_rate":
        raise InputError(
            "objective: got 'throughput' in an open loop, where it equals arrival_rate whatever the draft length; "
            "allowed: a latency, or a closed loop (concurrency)"
        )


def check_loads(loads: Sequence[float], loop: str, longest: int) -> None:
    """Raise :class:`InputError` unless loads are positive and increase, and the longest draft length is in range."""
    if loop not in LOOPS:
        raise InputError(f"loop: got {loop!r}; allowed: {', '.join(LOOPS)}")
    if not loads or any(not (math.isfinite(load) and load > 0) for load in loads):
        raise InputError(f"{loop}: got {list(loads)!r}; allowed: at least one load, each above 0")
    if any(later <= earlier for earlier, later in itertools.pairwise(loads)):
        raise InputError(f"{loop}: got {list(loads)!r}; allowed: increasing loads")
    if loop == "concurrency" and loads[0] < 1:
        raise InputError(f"concurrency: got {loads[0]!r}; allowed: at least 1 req")
    if not (isinstance(longest, int) and 1 <= longest <= MAX_DRAFT_LENGTH):
        raise InputError(f"max_draft_length: got {longest!r}; allowed: whole numbers from 1 to {MAX_DRAFT_LENGTH}")


def check_objective(objective: str) -> None:
    """Raise :class:`InputError` unless the objective is known."""
    if objective not in OBJECTIVES:
        near = difflib.get_close_matches(objective, OBJECTIVES, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"objective: got {objective!r}; allowed: {', '.join(OBJECTIVES)}{hint}")


def cost(prediction, objective: str):
    """What is minimised: log of the metric, or minus log throughput."""
    return log_cost(getattr(prediction, METRICS[objective]), objective)


def log_cost(value, objective: str):
    """log of the objective's value; minus that of what is made large."""
    return (-1.0 if objective in MAXIMISED else 1.0) * _log(value)


def least(cost, e2e, objective: str):
    """Place of the least cost along the last axis. Where nearly every request keeps its limits, goodput is the load
    itself at many draft lengths: of those that agree to :data:`EQUAL`, the one with the smallest ``e2e`` [s].

    >>> int(least(np.asarray([-1.0, -1.00001]), np.asarray([1.0, 3.0]), "goodput"))
    0
    """
    if objective != "goodput":
        return np.argmin(cost, axis=-1)
    equal = cost <= np.min(cost, axis=-1, keepdims=True) + EQUAL
    return np.argmin(np.where(equal, e2e, np.inf), axis=-1)


def costs(metrics, saturated, limits: Sequence[Limit], objective: str):
    """(cost, worst log excess, feasible) of every draft length; saturated ones, and those whose objective is not known
    (infinite), are never feasible."""
    with np.errstate(divide="ignore"):
        cost = np.log(metrics[objective]) * (-1.0 if objective in MAXIMISED else 1.0)
    excess = np.stack(
        [np.asarray(limit.excess(metrics[limit.metric])) for limit in limits] or [np.full_like(cost, -1.0)]
    )
    worst = excess.max(axis=0)
    return cost, worst, (worst <= 0) & ~saturated & np.isfinite(cost)
