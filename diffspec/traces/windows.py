"""Requests become operating points: accumulate request events over stationary windows of time.

Over a window [s, e) the means are those of the requests that arrive in it; the throughput counts completions in it; the
mean number in the system is the integral of requests in flight over it, not a product of the other two, so that
Little's law remains a check. Batches of any size are added one after another: memory is bounded by the number of
windows and the latencies kept for percentiles, `SAMPLE` a window (beyond that a uniform sample; means stay exact).

Parts of a table can be summarised apart, in any order: what each added is taken out (`Windows.packed`), sent, and put
together (`Windows.merge`). Counts and sums add up; gaps between arrivals need those of the others only where parts
overlap in time (`Gaps`); percentiles need latencies kept in a form that can be merged (`sketch.LatencySketch`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .schema import PERCENTILES

SAMPLE = 200_000
_METRICS = ("ttft", "tpot", "itl", "e2e")
_SHARES = [int(name[1:]) / 100 for name in PERCENTILES]
_SUMMED = (
    *("prompt", "prompt_squared", "output", "output_squared", "drafted", "accepted", "wait", "waits", "failed"),
    *(f"{metric}_sum" for metric in _METRICS),
    *(f"{metric}_weight" for metric in _METRICS),
)


@dataclass
class Packed:
    """What was added to some `Windows`: the places and values of what is not zero, the latencies and gaps by window."""

    totals: tuple[np.ndarray, np.ndarray]
    flight: tuple[np.ndarray, np.ndarray]
    samples: dict[tuple[int, str], Any]
    gaps: dict[int, "Gaps"]


class Windows:
    """Accumulator of disjoint windows ``[(start, end), ...]`` [s], in order of time. `keep(window, metric)` makes what
    keeps the latencies [s] of one metric (its number) in one window for percentiles: `add(values)`,
    `percentiles(shares)`, and `merge(other)` where parts are put together."""

    def __init__(self, windows: Sequence[tuple[float, float]], keep: Callable[[int, int], Any] | None = None):
        self.windows = list(windows)
        size = len(self.windows)
        self.edges = np.array([edge for window in self.windows for edge in window], float)
        self.totals = np.zeros((3 + len(_SUMMED), size))
        self.arrived, self.completed, self.early = self.totals[:3]
        self.sums = dict(zip(_SUMMED, self.totals[3:], strict=True))
        # In flight at time t: sum over arrivals before t of (t - a) less that over completions before t of (t - c).
        self.flight = np.zeros((4, 2 * size + 1))
        self.begun, self.begun_at, self.ended, self.ended_at = self.flight
        self.keep = keep or _Sample
        self.samples: dict[tuple[int, str], Any] = {}
        self.gaps: dict[int, Gaps] = {}

    def packed(self) -> Packed:
        """What was added, small: windows that nothing fell into are left out."""
        return Packed(_not_zero(self.totals), _not_zero(self.flight), self.samples, self.gaps)

    def merge(self, packed: Packed) -> None:
        """Add what was added to the same windows elsewhere."""
        for table, (places, values) in ((self.totals, packed.totals), (self.flight, packed.flight)):
            table[:, places] += values
        _merge(self.samples, packed.samples)
        _merge(self.gaps, packed.gaps)

    def add(self, requests: dict[str, np.ndarray]) -> None:
        """Add a batch: equally long float arrays `arrival_time`, `first_token_time`, `completion_time` [s, one clock],
        `prompt_tokens`, `output_tokens`, `drafted_tokens`, `accepted_tokens`, `schedule_time`, `stream_events` (NaN
        where unknown), and `ok` (1 or 0; of a failed request only the arrival counts)."""
        ok = requests["ok"] > 0
        arrival, completion = requests["arrival_time"], requests["completion_time"]
        place = self._place(arrival)
        counted = place >= 0
        size = len(self.windows)
        self.sums["failed"] += np.bincount(place[counted & ~ok], minlength=size)
        for (count, at), value in ((self.flight[:2], arrival[ok]), (self.flight[2:], completion[ok])):
            slot = np.searchsorted(self.edges, value, side="right")
            count += np.bincount(slot, minlength=2 * size + 1)
            at += np.bincount(slot, weights=value, minlength=2 * size + 1)
        finished = self._place(completion[ok])
        self.completed += np.bincount(finished[finished >= 0], minlength=size)
        kept = counted & ok
        place = place[kept]
        self.arrived += np.bincount(place, minlength=size)
        middle = (self.edges[::2] + self.edges[1::2]) / 2
        self.early += np.bincount(place[arrival[kept] < middle[place]], minlength=size)
        self._add_means({name: value[kept] for name, value in requests.items()}, place)
        by_window = np.argsort(place, kind="stable")
        bounds = np.searchsorted(place[by_window], np.arange(size + 1))
        latencies = _latencies({name: value[kept][by_window] for name, value in requests.items()})
        arrivals = arrival[kept][by_window]
        for index in np.flatnonzero(np.diff(bounds)):
            part = slice(bounds[index], bounds[index + 1])
            self.gaps.setdefault(int(index), Gaps()).add(arrivals[part])
            for number, metric in enumerate(_METRICS):
                values = latencies[metric][0][part]
                if metric == "itl" or not np.isfinite(values).any():  # a request's mean gap is no sample of gaps
                    continue
                if (int(index), metric) not in self.samples:
                    self.samples[int(index), metric] = self.keep(int(index), number)
                self.samples[int(index), metric].add(values)

    def arrivals(self, requests: dict[str, np.ndarray], wanted: Sequence[int]) -> dict[int, np.ndarray]:
        """When the completed requests of a batch arrived in each of the windows `wanted` that any arrived in."""
        arrival = requests["arrival_time"][requests["ok"] > 0]
        place = self._place(arrival)
        return {index: arrival[place == index] for index in set(wanted) & set(np.unique(place).tolist())}

    def _place(self, times: np.ndarray) -> np.ndarray:
        """Index of the window that holds each time, -1 for none."""
        slot = np.searchsorted(self.edges, times, side="right")
        return np.where(slot % 2 == 1, slot // 2, -1)

    def _add_means(self, requests: dict[str, np.ndarray], place: np.ndarray) -> None:
        def total(name: str, values: np.ndarray) -> None:
            self.sums[name] += np.bincount(place, weights=np.nan_to_num(values), minlength=len(self.windows))

        for name, tokens in (("prompt", requests["prompt_tokens"]), ("output", requests["output_tokens"])):
            total(name, tokens)
            total(f"{name}_squared", tokens**2)
        total("drafted", requests["drafted_tokens"])
        total("accepted", requests["accepted_tokens"])
        wait = requests["schedule_time"] - requests["arrival_time"]
        total("wait", wait)
        total("waits", (~np.isnan(wait)).astype(float))
        for metric, (values, weight) in _latencies(requests).items():
            known = np.isfinite(values)
            total(f"{metric}_sum", np.where(known, values * weight, 0.0))
            total(f"{metric}_weight", np.where(known, weight, 0.0))

    def in_flight(self) -> np.ndarray:
        """Mean requests in the system over each window: the integral of requests in flight over its length."""

        def integral(count: np.ndarray, at: np.ndarray) -> np.ndarray:
            return np.cumsum(count)[:-1] * self.edges - np.cumsum(at)[:-1]

        area = integral(self.begun, self.begun_at) - integral(self.ended, self.ended_at)
        return (area[1::2] - area[::2]) / (self.edges[1::2] - self.edges[::2])

    def row(self, index: int) -> dict[str, Any]:
        """One window as observed columns and lengths of the operating-point table; {} when nothing arrived in it."""
        count, sums = self.arrived[index], {name: values[index] for name, values in self.sums.items()}
        if count == 0:
            return {}
        start, end = self.windows[index]
        row: dict[str, Any] = {
            "n_requests": float(count),
            "failed": float(sums["failed"]),
            "throughput": float(self.completed[index] / (end - start)),
            "effective_batch_size": float(self.in_flight()[index]),
        }
        for name in ("prompt", "output"):
            mean = sums[name] / count
            row[f"{name}_length"] = float(mean)
            row[f"{name}_scv"] = float(max(sums[f"{name}_squared"] / count / mean**2 - 1.0, 0.0)) if mean else math.nan
        if sums["drafted"] > 0:
            row["draft_acceptance_rate"] = float(sums["accepted"] / sums["drafted"])
        if sums["waits"] == count:  # mean requests waiting, by Little's law
            row["waiting_mean"] = float(sums["wait"] / (end - start))
        for metric in _METRICS:
            if sums[f"{metric}_weight"] == 0:
                continue
            row[f"{metric}_mean"] = float(sums[f"{metric}_sum"] / sums[f"{metric}_weight"])
            if metric != "itl":
                found = self.samples[index, metric].percentiles(_SHARES)
                row |= {f"{metric}_{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}
        return {name: value for name, value in row.items() if not math.isnan(value)}

    def steady(self, index: int) -> bool:
        """Whether the arrivals of the two halves differ by no more than four standard deviations of a renewal count,
        ``sqrt(n * max(scv, 1))``."""
        count, (_, scv) = self.arrived[index], self.offered(index)
        return bool(abs(2 * self.early[index] - count) <= 4 * math.sqrt(count * (max(scv, 1.0) if scv > 0 else 1.0)))

    def offered(self, index: int) -> tuple[float, float]:
        """Measured arrivals per second in a window, failed ones too, and the scv of their gaps (NaN below 3)."""
        start, end = self.windows[index]
        scv = self.gaps[index].scv() if index in self.gaps else math.nan
        return float((self.arrived[index] + self.sums["failed"][index]) / (end - start)), scv


def _latencies(requests: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each latency [s] and its weight in the mean: gaps between stream events weigh by their number."""
    first, done, arrival = requests["first_token_time"], requests["completion_time"], requests["arrival_time"]
    one = np.ones_like(arrival)
    with np.errstate(all="ignore"):
        more = np.where(requests["output_tokens"] > 1, requests["output_tokens"] - 1, np.nan)
        gaps = np.where(requests["stream_events"] > 1, requests["stream_events"] - 1, np.nan)
        return {
            "ttft": (first - arrival, one),
            "tpot": ((done - first) / more, one),
            "itl": ((done - first) / gaps, np.nan_to_num(gaps)),
            "e2e": (done - arrival, one),
        }


class _Sample:
    """A uniform sample of at most `SAMPLE` values: those with the smallest random keys are kept."""

    def __init__(self, *seed: int):
        self.random = np.random.default_rng([12345, *seed])
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []
        self.held = 0

    def add(self, values: np.ndarray) -> None:
        values = values[np.isfinite(values)].astype(np.float32)
        self.parts.append((self.random.random(len(values), np.float32), values))
        self.held += len(values)
        if self.held > 2 * SAMPLE:
            self._thin()

    def _thin(self) -> None:
        keys, values = (np.concatenate(part) for part in zip(*self.parts, strict=True))
        if len(keys) > SAMPLE:
            least = np.argpartition(keys, SAMPLE)[:SAMPLE]
            keys, values = keys[least], values[least]
        self.parts, self.held = [(keys, values)], len(keys)

    def percentiles(self, shares: Sequence[float]) -> np.ndarray:
        self._thin()
        return np.quantile(self.parts[0][1].astype(float), shares)


class Gaps:
    """Gaps between arrivals [s], as stretches of time: (first arrival, last, arrivals, sum of squared gaps).

    Arrivals of a stretch may come in any order. Stretches that follow each other in time are joined exactly; where
    they overlap, the gaps are not known until the arrivals are put in one order (`add` all of them to new `Gaps`)."""

    def __init__(self) -> None:
        self.stretches: list[tuple[float, float, int, float]] = []

    def add(self, arrivals: np.ndarray) -> None:
        """A stretch, from its arrivals (at least one)."""
        arrivals = np.sort(arrivals, kind="stable")
        squares = float((np.diff(arrivals) ** 2).sum())
        self.stretches.append((float(arrivals[0]), float(arrivals[-1]), len(arrivals), squares))

    def merge(self, other: "Gaps") -> None:
        self.stretches += other.stretches

    def overlap(self) -> bool:
        """Whether stretches overlap in time."""
        self.stretches.sort()
        return any(one[1] > two[0] for one, two in zip(self.stretches, self.stretches[1:], strict=False))

    def scv(self) -> float:
        """Squared coefficient of variation of the gaps, ``n * sum(g^2) / sum(g)^2 - 1``; NaN below 3 gaps, and where
        stretches overlap."""
        if not self.stretches or self.overlap():
            return math.nan
        count = sum(stretch[2] for stretch in self.stretches) - 1
        total = self.stretches[-1][1] - self.stretches[0][0]
        if count < 3 or total == 0:
            return math.nan
        between = sum((two[0] - one[1]) ** 2 for one, two in zip(self.stretches, self.stretches[1:], strict=False))
        squares = between + sum(stretch[3] for stretch in self.stretches)
        return max(count * squares / total**2 - 1.0, 0.0)


def _merge(mine: dict[Any, Any], theirs: dict[Any, Any]) -> None:
    for place, found in theirs.items():
        if place in mine:
            mine[place].merge(found)
        else:
            mine[place] = found


def _not_zero(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    places = np.flatnonzero(table.any(axis=0))
    return places, table[:, places]
