"""`simulate`: replications of one workload on one engine, and their means and percentiles with intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

from diffspec.results import InputError
from diffspec.step_time import AbstractStepTime
from diffspec.workload import Workload

from .requests import LengthLaw, Requests, draw_requests
from .run import Engine, Lane, LaneResult, run_lanes

PERCENTILES = (50, 90, 95, 99)
METRICS = ("ttft", "tpot", "e2e", "waiting")
BATCHES = 20
"""Batch means come from at least so many batches, spread evenly over the replications."""


@dataclass(frozen=True)
class Estimate:
    """``value`` and the half width of its 95 % confidence interval (batch means, Student's t)."""

    value: float
    half_width: float

    @property
    def relative(self) -> float:
        """half_width / value; infinite for a value of 0."""
        return self.half_width / abs(self.value) if self.value else math.inf


@dataclass(frozen=True)
class Simulation:
    """Replications of one workload on one engine; seconds, requests and tokens.

    ``saturated``: in most replications the requests that came later waited longer, beyond chance: no steady state.
    """

    lanes: list[LaneResult]

    def mean(self, metric: str) -> Estimate:
        """Mean of "ttft", "tpot", "e2e" or "waiting" [s]."""
        return self.estimate(metric, np.mean)

    def percentile(self, metric: str, percent: float) -> Estimate:
        """Percentile of "ttft", "tpot", "e2e" or "waiting" [s]."""
        return self.estimate(metric, lambda values: np.percentile(values, percent))

    def estimate(self, metric: str, statistic: Callable[[np.ndarray], Any]) -> Estimate:
        """A statistic of all measured requests, with the interval from its values in contiguous batches."""
        if metric not in METRICS:
            raise InputError(f"metric: got {metric!r}; allowed: {', '.join(METRICS)}")
        per_lane = max(1, math.ceil(BATCHES / len(self.lanes)))
        values = [getattr(lane, metric) for lane in self.lanes]
        batches = [part for lane in values for part in np.array_split(lane, min(per_lane, len(lane)))]
        return _with_interval(float(statistic(np.concatenate(values))), [float(statistic(part)) for part in batches])

    def itl(self, percent: float | None = None) -> Estimate:
        """Mean or percentile of the gap between stream events [s], all requests' gaps together."""
        if percent is None:
            values = [lane.itl_mean for lane in self.lanes]
            return _with_interval(float(np.mean(values)), values)
        values = [_of_histogram(lane.gaps, lane.gap_edges, percent) for lane in self.lanes]
        return _with_interval(
            _of_histogram(np.sum([lane.gaps for lane in self.lanes], axis=0), self.lanes[0].gap_edges, percent), values
        )

    def rate(self, of: Callable[[LaneResult], float]) -> Estimate:
        """A lane's number over its window, say completed requests [req/s] or time in the system [req]."""
        values = [of(lane) / lane.window for lane in self.lanes]
        return _with_interval(float(np.mean(values)), values)

    @property
    def throughput(self) -> Estimate:
        """Requests completed per second of the window [req/s]."""
        return self.rate(lambda lane: lane.completed)

    @property
    def requests_in_system(self) -> Estimate:
        """Time average of requests in the system, waiting ones included [req]."""
        return self.rate(lambda lane: lane.request_seconds)

    @property
    def effective_batch_size(self) -> Estimate:
        """Time average of requests in service [req]."""
        return self.rate(lambda lane: lane.running_seconds)

    @property
    def distribution(self) -> Float[np.ndarray, "n"]:
        """Share of time with n = 0, 1, 2, ... requests in the system."""
        most = max(len(lane.seconds_at) for lane in self.lanes)
        seconds = np.sum([np.pad(lane.seconds_at, (0, most - len(lane.seconds_at))) for lane in self.lanes], axis=0)
        return seconds / seconds.sum()

    @property
    def saturated(self) -> bool:
        """Whether the last third of the requests waited more than twice as long as the first, in most replications."""
        grows = []
        for lane in self.lanes:
            third = max(len(lane.waiting) // 3, 1)
            early, late = lane.waiting[:third].mean(), lane.waiting[-third:].mean()
            grows.append(late > 2.0 * early and late > 0.25 * lane.e2e.mean())
        return bool(np.mean(grows) > 0.5)

    def summary(self) -> dict[str, Any]:
        """Everything as plain numbers: metric -> mean, p50, ..., each with ``value`` and ``half_width``."""
        metrics: dict[str, Any] = {}
        for metric in METRICS:
            metrics[metric] = {"mean": self.mean(metric)} | {f"p{p}": self.percentile(metric, p) for p in PERCENTILES}
        metrics["itl"] = {"mean": self.itl()} | {f"p{p}": self.itl(p) for p in PERCENTILES}
        plain = {metric: {name: vars(value) for name, value in found.items()} for metric, found in metrics.items()}
        rates = {
            name: vars(getattr(self, name)) for name in ("throughput", "effective_batch_size", "requests_in_system")
        }
        return {
            "saturated": self.saturated,
            "metrics": plain,
            **rates,
            "busy": vars(self.rate(lambda lane: lane.busy_time)),
            "requests": int(sum(len(lane.e2e) for lane in self.lanes)),
            "replications": len(self.lanes),
            "iterations": int(sum(lane.iterations for lane in self.lanes)),
            "sequence_steps": int(sum(lane.sequence_steps for lane in self.lanes)),
            "preemptions": int(sum(lane.events["preemptions"].sum() for lane in self.lanes)),
        }


def simulate(
    step_time: AbstractStepTime,
    workload: Workload,
    engine: Engine,
    *,
    n_requests: int = 4000,
    replications: int = 8,
    seed: int = 0,
    output_law: LengthLaw = "fixed",
    prompt_law: LengthLaw = "fixed",
    prompt_scv: float = 0.0,
    leniency_scv: float = 0.0,
    finite: bool = False,
    progress: Callable[[float], Any] | None = None,
) -> Simulation:
    """``replications`` independent runs of ``workload``, each of ``n_requests`` measured requests.

    Each run is warmed up by a fifth of that number and kept loaded by as many after it; ``finite`` measures the run
    that starts empty and drains instead, as a benchmark does. The same seed gives the same numbers. Errors:
    :class:`InputError` for ranges, and for requests that the KV memory cannot hold.

    >>> from diffspec.step_time import AffineStepTime
    >>> server = AffineStepTime(verify_base=0.01, prefill_token=1e-5)
    >>> found = simulate(server, Workload(10.0, 101.0, arrival_rate=0.1), Engine(), n_requests=200, replications=2)
    >>> abs(found.mean("e2e").value - 1.0) < 0.01  # 100 steps of 0.01 s, seldom two at a time
    True
    """
    if n_requests < 1 or replications < 1:
        raise InputError(f"n_requests, replications: got {n_requests}, {replications}; allowed: at least 1")
    margin = 0 if finite else max(n_requests // 5, 1)
    laws = {"output_law": output_law, "prompt_law": prompt_law, "prompt_scv": prompt_scv, "leniency_scv": leniency_scv}
    requests = [
        draw_requests(workload, n_requests + 2 * margin, np.random.default_rng([seed, number]), **laws)
        for number in range(replications)
    ]
    return replay(step_time, requests, engine, workload.concurrency, margin=margin, seed=seed, progress=progress)  # type: ignore[arg-type]


def replay(
    step_time: AbstractStepTime,
    runs: Sequence[Requests],
    engine: Engine,
    concurrency: float | None = None,
    *,
    margin: int = 0,
    measured: tuple[int, int] | None = None,
    seed: int = 0,
    progress: Callable[[float], Any] | None = None,
) -> Simulation:
    """Simulate given requests, a recorded trace, say; ``margin`` requests at both ends of each run are not measured, or
    only those from ``measured[0]`` up to ``measured[1]`` are."""
    lanes = [
        Lane(
            requests=run,
            engine=engine,
            concurrency=None if concurrency is None else round(concurrency),
            first_measured=margin if measured is None else measured[0],
            end_measured=len(run) - margin if measured is None else measured[1],
            seed=seed + 1000 * number,
        )
        for number, run in enumerate(runs)
    ]
    return Simulation(run_lanes(step_time, lanes, progress))


def _with_interval(value: float, batches: Sequence[float]) -> Estimate:
    if len(batches) < 2:
        return Estimate(value, math.inf)
    spread = float(np.std(batches, ddof=1)) / math.sqrt(len(batches))
    return Estimate(value, float(stdtrit(len(batches) - 1, 0.975)) * spread)


def _of_histogram(counts: np.ndarray, edges: np.ndarray, percent: float) -> float:
    """Percentile of a histogram, log-linear within its bin."""
    total = counts.sum()
    if total == 0:
        return math.nan
    cumulated = np.cumsum(counts)
    place = int(np.searchsorted(cumulated, percent / 100 * total))
    before = cumulated[place - 1] if place else 0
    part = (percent / 100 * total - before) / max(counts[place], 1)
    return float(edges[place] * (edges[place + 1] / edges[place]) ** part)
