"""What a joint decision is asked: classes, objective, limits, and what it chooses from."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from diffspec.latency_distribution import PERCENTILE_METRICS
from diffspec.lengths import Lengths
from diffspec.optimizing.catalogue import RequestClass
from diffspec.optimizing.constrained import Solution
from diffspec.optimizing.joint_problem import ClassLimit, Objective, Shapes, parse_objective, shapes_of
from diffspec.optimizing.joint_search import STARTS, Arm, Ranges
from diffspec.optimizing.joint_tails import Tails
from diffspec.optimizing.limits import ALL_LIMITED, PER_REQUEST, check_loads, parse_limit
from diffspec.optimizing.question import check_within
from diffspec.percentiles import states_for
from diffspec.results import InputError
from diffspec.serving import MOST_STATES
from diffspec.workload import check_range

MOST_POINTS, MOST_TAILS, MOST_PERCENTILES = 1_000_000, 100_000, 10_000
"""Whole points of all loads that are evaluated one by one: by their means, by tails of latency too, and by a percentile
as the objective; above it the relaxed and rounded answer stands alone."""


class Question(NamedTuple):
    """What is asked of every arm (:func:`diffspec.optimizing.joint.optimize_jointly`); ``within``: the limits on single
    requests, which goodput counts."""

    classes: Sequence[RequestClass]
    shapes: Shapes
    goal: Objective
    limits: tuple[ClassLimit, ...]
    within: tuple[ClassLimit, ...]
    ranges: Ranges
    loads: Sequence[float]
    replicas: Sequence[int]
    risk: float | None
    exhaustive: bool = True

    @property
    def sharing(self) -> list[int]:
        """How many replicas share each load of :attr:`each`."""
        return [*self.replicas] * len(self.loads)

    @property
    def each(self) -> list[float]:
        """Loads [req/s] of one replica: by load, then by replicas."""
        return [load / replicas for load in self.loads for replicas in self.replicas]

    def lane(self, solution: Solution, load: int, replicas: int) -> int:
        """The best start of a relaxed problem at a load and a number of replicas, by their places."""
        start = (load * len(self.replicas) + replicas) * len(STARTS)
        return solution.best(slice(start, start + len(STARTS)))

    @property
    def looked_at(self) -> set[str]:
        """The names of all metrics of the objective and of limits."""
        return {*self.goal.metrics, *(entry.limit.metric for entry in self.limits)}

    @property
    def percentiles(self) -> tuple[str, ...]:
        """The percentiles of the objective and of limits, each once."""
        return tuple(name for name in PERCENTILE_METRICS if name in self.looked_at)

    @property
    def tailed(self) -> bool:
        """Whether there are limits on percentiles."""
        return any(entry.limit.percentile is not None for entry in self.limits)

    @property
    def most_points(self) -> int:
        """Whole points that are evaluated one by one."""
        if any(name in PERCENTILE_METRICS for name in self.goal.metrics):
            return MOST_PERCENTILES
        return MOST_TAILS if self.percentiles or self.within else MOST_POINTS

    def counting(self, arms: Sequence[Arm]) -> "Question":
        """The same question; ``exhaustive`` where all whole points of these ``arms`` are few enough."""
        points = sum(self.ranges.points(arm, len(self.classes)) for arm in arms) * len(self.each)
        return self._replace(exhaustive=points <= self.most_points)

    def tails(self, batch: float) -> Tails | None:
        """What is looked at beyond means, with a chain for the largest mean ``batch`` [req]; None for nothing."""
        if not (self.percentiles or self.within or "energy" in self.looked_at):
            return None
        most = max(self.ranges.caps)
        states = states_for(most, most) if most <= MOST_STATES else states_for(None, batch)
        names = tuple(dict.fromkeys(entry.limit.metric for entry in self.within))
        tailed = [entry for entry in self.limits if entry.limit.percentile is not None]
        return Tails(
            lengths=Lengths.stacked([one.output_scv for one in self.classes]),
            bounds=_bounds(tailed),
            within_bounds=jnp.asarray([self._within(metric) for metric in names], dtype=float).reshape(
                len(names), len(self.classes)
            ),
            limits=tuple((entry.number, entry.limit.metric.split("_p")[0]) for entry in tailed),
            within=names,
            objective=tuple(name for name in self.goal.metrics if name in PERCENTILE_METRICS),
            states=states,
        )

    def _within(self, metric: str) -> list[float]:
        """The strictest bound [s] of this limit on single requests for each class, infinite where it has none."""
        bounds = [(entry.number, entry.limit.bound) for entry in self.within if entry.limit.metric == metric]
        return [
            min([bound for number, bound in bounds if number in (None, place)], default=math.inf)
            for place in range(len(self.classes))
        ]


def read_joint_question(
    classes: Sequence[RequestClass],
    objective: str,
    slo: Sequence[str],
    ranges: Ranges,
    loads: Sequence[float],
    replicas: Sequence[int],
    risk: float | None,
) -> Question:
    """Read and check what is asked; see :func:`diffspec.optimizing.joint.optimize_jointly`.

    Errors: :class:`InputError` for unknown names, ranges, limits on single requests without goodput, and the reverse.
    """
    goal = parse_objective(objective)
    check_loads(loads, "arrival_rate", ranges.longest)
    if not classes:
        raise InputError("classes: got none; allowed: at least one")
    names = [one.name for one in classes]
    if len(names) > len(set(names)) or (len(names) > 1 and "all" in names):
        raise InputError(f"classes: got the names {', '.join(names)}; allowed: each once, and none called 'all'")
    if abs(sum(one.share for one in classes) - 1.0) > 1e-6:
        raise InputError(f"classes: got shares that sum to {sum(one.share for one in classes):g}; allowed: to 1")
    if not replicas or any(number != int(number) or not 1 <= number <= 1e6 for number in replicas):
        raise InputError(f"replicas: got {list(replicas)}; allowed: whole numbers, 1 to 1000000")
    check_range("risk", risk, 0, 1, low_open=True, unit="(share of the draws)")
    every = [ClassLimit(None, parse_limit(text, ALL_LIMITED)) for text in slo]
    every += [ClassLimit(number, limit) for number, one in enumerate(classes) for limit in one.limits]
    within = tuple(entry for entry in every if entry.limit.metric in PER_REQUEST)
    asked = Question(
        classes=classes,
        shapes=shapes_of(classes),
        goal=goal,
        limits=tuple(entry for entry in every if entry.limit.metric not in PER_REQUEST),
        within=within,
        ranges=ranges,
        loads=loads,
        replicas=sorted(set(replicas)),
        risk=risk,
    )
    check_within([(entry.text(classes), entry.limit) for entry in within], "goodput" in asked.looked_at)
    short = [one.output_length <= 1 for one in classes]
    for number, name in [*((None, name) for name in goal.metrics), *((e.number, e.limit.metric) for e in every)]:
        if name.startswith(("tpot", "itl")) and (all(short) if number is None else short[number]):
            raise InputError(
                f"{name}: got output_length 1 of class {classes[number or 0].name!r}, whose requests have no time per "
                "token after the first; allowed: more than 1 tok"
            )
    return asked


def _bounds(limits: Sequence[ClassLimit]):
    return jnp.asarray([entry.limit.bound for entry in limits], dtype=float)
