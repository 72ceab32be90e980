"""The request table, one row a request (CSV, JSON lines or Parquet), summarised into operating points.

The table is streamed twice, first for the extent of each run, then for its windows, so that ten million requests need
neither ten million rows of memory nor a database. Rows of one run share the values of the identity, load and
speculation columns they carry (`deployment`, `run`, `arrival_rate`, ...). They may come in any order: windows in which
batches of rows overlap in time are read once more, for the gaps between arrivals.

A run that states its load becomes one operating point: over the requests marked `measured` where that column exists,
else from three mean latencies after its first arrival until its last (`window` "steady"), or, where that would leave
less than half of it, over all of it (`window` "run"). A log that states no load is cut into windows, each an operating
point at the rate and variability measured in it; windows in which the load drifts are set aside.

What each reading learns of a part of the rows can be merged with what it learns of the others (`Parts`): one file read
here is one part, and many files read by many workers are many (`scale`); the reduction is the same.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from ..results import TraceError
from .problems import LISTED, Problem, error_from
from .request_rows import NEEDED, TIMES, Identity, RequestRows, SetAside
from .schema import COLUMNS
from .sketch import LatencySketch
from .source import Source
from .windows import Gaps, Packed, Windows

WARM_UP = 3.0
"""Mean latencies after the first arrival before a run counts as steady."""
MOST_RUNS = 10_000
MOST_SORTED = 1 << 24
"""Arrivals put in order at once, where batches or files overlap in time (eight bytes each)."""
MOST_READINGS = 4
"""More readings of all rows are not made for the gaps between arrivals."""

Plan = tuple[float, dict[Identity, list[tuple[float, float]]]]
"""When the clock starts [s], and the windows of each run on it."""


@runtime_checkable
class Parts(Protocol):
    """A request table in parts that are read apart. `apply` gives (number of the part, ``function(readers of its rows,
    *shared)``) of every part or of those in `only`, in any order; `count`, how many there are; `mergeable`: latencies
    are kept so that those of parts can be put together (see `sketch`), not as a sample."""

    @property
    def count(self) -> int: ...

    @property
    def mergeable(self) -> bool: ...

    def apply(
        self, function: Callable[..., Any], *shared: Any, only: Sequence[int] | None = None
    ) -> Iterable[tuple[int, Any]]: ...


@dataclass(frozen=True)
class _Whole:
    """A table in one part."""

    reader: RequestRows
    count: int = 1
    mergeable: bool = False

    def apply(
        self, function: Callable[..., Any], *shared: Any, only: Sequence[int] | None = None
    ) -> Iterable[tuple[int, Any]]:
        yield 0, function([self.reader], *shared)


def recognises(source: Source) -> bool:
    """Whether a file is a request table: it has arrival and completion times and token counts by their names."""
    names = set(source.columns) or (set(source.first) if isinstance(source.first, dict) else set())
    return set(NEEDED) <= names


def read(source: Source, window: float | None = None) -> pd.DataFrame:
    """The operating points of a request table as a raw frame (see `formats.Format`); `window` [s] sets the length of
    the windows that a log is cut into (chosen by itself: at least a minute, 50 mean latencies and 300 requests).

    Raises `TraceError` when columns are missing, cells cannot be read, or more than 1 % of the rows contradict
    themselves (completion before arrival, negative tokens, ...)."""
    return summarise(_Whole(RequestRows(source)), source.file, window)


def summarise(parts: Parts, name: str, window: float | None = None) -> pd.DataFrame:
    """The operating points of a request table called `name`, read part by part; see `read`."""
    extents, order = Extents(), {}
    for part, found in parts.apply(extents_of):
        for place, key in enumerate(found.runs):
            order[key] = min(order.get(key, (part, place)), (part, place))
        extents.merge(found)
        _check_number(extents.runs, name)
    warnings = _set_aside(extents.files, name)
    runs = {key: extents.runs[key] for key in sorted(extents.runs, key=order.__getitem__)}
    if not any(run.ok for run in runs.values()):
        raise Problem("no completed request in the table", name, allowed="at least one").error()
    origin = min(run.first for run in runs.values())
    plan = origin, {key: _shifted(_windows_of(run, _is_log(key), window), origin) for key, run in runs.items()}
    windows = {key: Windows(spans) for key, spans in plan[1].items()}
    holding: dict[tuple[Identity, int], list[int]] = {}
    for part, packed in parts.apply(windows_of, plan, parts.mergeable):
        for key, added in packed.items():
            windows[key].merge(added)
            for index in added.gaps if _is_log(key) else ():
                holding.setdefault((key, index), []).append(part)
    told = _put_in_order(parts, plan, windows, holding)
    rows = []
    for key, run in runs.items():
        rows += _rows(dict(key), run, windows[key], _is_log(key), told)
    frame = pd.DataFrame({name: pd.Series([row.get(name) for row in rows], dtype=object) for name in _names(rows)})
    frame["source_file"] = pd.Series([name] * len(rows), dtype=object)
    frame["source_row"] = pd.Series(range(1, len(rows) + 1), dtype="int64")
    frame.attrs["warnings"] = [*warnings, *(f"{name}: {text}" for text in told)]
    return frame


def _check_number(runs: Mapping[Identity, Any], name: str) -> None:
    if len(runs) > MOST_RUNS:
        columns = dict.fromkeys(column for key in runs for column, _ in key)
        advice = "its runs are told apart by the columns " + ", ".join(columns)
        raise Problem("too many runs in one table", name, allowed=f"{MOST_RUNS}", advice=advice).error()


def _set_aside(files: Mapping[str, SetAside], name: str) -> list[str]:
    """Lines about rows that were set aside. Raises `TraceError` for files with too many of them."""
    lines, errors = [], []
    if not any(aside.rows for aside in files.values()):
        raise Problem("the table has no rows", name, allowed="at least one row").error()
    for file, aside in files.items():
        try:
            lines += [f"{file}: {text}" for text in aside.warnings(file) or ([] if aside.rows else ["no rows"])]
        except TraceError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else error_from([Problem(str(error)) for error in errors])
    return lines if len(lines) <= 2 * LISTED else [*lines[:LISTED], f"... and {len(lines) - LISTED} more such lines"]


@dataclass
class Extents:
    """What the first reading learns: the extent of each run, and what was set aside in each file."""

    runs: dict[Identity, "Run"] = field(default_factory=dict)
    files: dict[str, SetAside] = field(default_factory=dict)

    def merge(self, other: "Extents") -> None:
        """Add what was learned of other rows."""
        for key, run in other.runs.items():
            self.runs.setdefault(key, Run()).merge(run)
        for file, aside in other.files.items():
            self.files.setdefault(file, SetAside()).merge(aside)


def extents_of(readers: Iterable[RequestRows]) -> Extents:
    """The first reading of some rows."""
    found = Extents()
    for reader in readers:
        for key, requests in reader.batches():
            found.runs.setdefault(key, Run()).see(requests)
            _check_number(found.runs, reader.source.file)
        found.files.setdefault(reader.source.file, SetAside()).merge(reader.aside)
    return found


def windows_of(readers: Iterable[RequestRows], plan: Plan, mergeable: bool) -> dict[Identity, Packed]:
    """The second reading of some rows: what they add to the windows of each run."""
    windows: dict[Identity, Windows] = {}
    for key, requests in _on_clock(readers, plan[0]):
        if key not in windows:
            windows[key] = Windows(plan[1][key], (lambda *_: LatencySketch()) if mergeable else None)
        windows[key].add(requests)
    return {key: found.packed() for key, found in windows.items()}


def arrivals_of(
    readers: Iterable[RequestRows], plan: Plan, wanted: Mapping[Identity, Sequence[int]]
) -> dict[tuple[Identity, int], np.ndarray]:
    """The third reading of some rows: when the requests in the windows `wanted` of each run arrived."""
    windows = {key: Windows(plan[1][key]) for key in wanted}
    found: dict[tuple[Identity, int], list[np.ndarray]] = {}
    for key, requests in _on_clock(readers, plan[0]):
        if key in windows:
            for index, arrival in windows[key].arrivals(requests, wanted[key]).items():
                found.setdefault((key, index), []).append(arrival)
    return {place: np.concatenate(arrays) for place, arrays in found.items()}


def _on_clock(readers: Iterable[RequestRows], origin: float) -> Iterator[tuple[Identity, dict[str, np.ndarray]]]:
    for reader in readers:
        for key, requests in reader.batches():
            yield key, requests | {name: requests[name] - origin for name in TIMES}


def _put_in_order(
    parts: Parts,
    plan: Plan,
    windows: Mapping[Identity, Windows],
    holding: Mapping[tuple[Identity, int], Sequence[int]],
) -> list[str]:
    """Read the arrivals of windows whose gaps are not known because rows of several batches overlap in time, some
    windows at once, until all are known or `MOST_READINGS` are made; lines about what is left. `holding`: the parts
    that hold requests of each window."""
    unknown = [(key, index) for key, index in holding if windows[key].gaps[index].overlap()]
    readings = 0
    while unknown and readings < MOST_READINGS * parts.count:
        size, chosen = 0, []
        while unknown and (not chosen or size + windows[unknown[0][0]].arrived[unknown[0][1]] <= MOST_SORTED):
            chosen.append(unknown.pop(0))
            size += windows[chosen[-1][0]].arrived[chosen[-1][1]]
        wanted: dict[Identity, list[int]] = {}
        for key, index in chosen:
            wanted.setdefault(key, []).append(index)
        only = sorted({part for place in chosen for part in holding[place]})
        readings += len(only)
        found: dict[tuple[Identity, int], list[np.ndarray]] = {}
        for _, arrivals in parts.apply(arrivals_of, plan, wanted, only=only):
            for place, array in arrivals.items():
                found.setdefault(place, []).append(array)
        for (key, index), arrays in found.items():
            windows[key].gaps[index] = Gaps()
            windows[key].gaps[index].add(np.concatenate(arrays))
    if not unknown:
        return []
    return [f"arrival_scv left out of {len(unknown)} windows: their rows lie in no order in too many places"]


def _names(rows: list[dict[str, Any]]) -> list[str]:
    given = {name for row in rows for name in row}
    return [item.name for item in COLUMNS if item.name in given]


@dataclass
class Run:
    """Extent of one run."""

    count: int = 0
    ok: int = 0
    first: float = math.inf
    last: float = -math.inf
    end: float = -math.inf
    latency: float = 0.0
    measured: list[float] = field(default_factory=lambda: [math.inf, -math.inf])

    def see(self, requests: dict[str, np.ndarray]) -> None:
        ok, arrival = requests["ok"] > 0, requests["arrival_time"]
        self.count += len(ok)
        self.ok += int(ok.sum())
        self.first, self.last = min(self.first, float(arrival.min())), max(self.last, float(arrival.max()))
        marked = arrival[requests["measured"] > 0]
        if len(marked):
            self.measured = [min(self.measured[0], float(marked.min())), max(self.measured[1], float(marked.max()))]
        if ok.any():
            self.latency += float((requests["completion_time"] - arrival)[ok].sum())
            self.end = max(self.end, float(requests["completion_time"][ok].max()))

    def merge(self, other: "Run") -> None:
        """Add the rows of another part of the run."""
        self.count, self.ok, self.latency = self.count + other.count, self.ok + other.ok, self.latency + other.latency
        self.first, self.last, self.end = (
            min(self.first, other.first),
            max(self.last, other.last),
            max(self.end, other.end),
        )
        self.measured = [min(self.measured[0], other.measured[0]), max(self.measured[1], other.measured[1])]

    @property
    def mean_latency(self) -> float:
        return self.latency / max(self.ok, 1)


def _is_log(key: Identity) -> bool:
    return not {"arrival_rate", "concurrency"} & set(dict(key))


def _windows_of(run: Run, is_log: bool, length: float | None) -> list[tuple[float, float]]:
    """Windows to summarise, from their first moment to their last."""
    if run.measured[1] > run.measured[0]:
        return [(run.measured[0], run.measured[1])]
    whole = [(run.first, max(run.end, run.last))]
    start = run.first + WARM_UP * run.mean_latency
    span = run.last - start
    if not is_log:
        return [(start, run.last)] if span >= 0.5 * (run.end - run.first) else whole
    rate = run.count / max(run.last - run.first, 1e-9)
    wanted = length or max(60.0, 50 * run.mean_latency, 300 / rate, (run.last - run.first) / 1000)
    if span < wanted:
        return [(start, run.last)] if span > 0.5 * (run.end - run.first) else whole
    return [(start + index * wanted, start + (index + 1) * wanted) for index in range(int(span // wanted))]


def _shifted(windows: list[tuple[float, float]], origin: float) -> list[tuple[float, float]]:
    """Half-open windows on a clock that starts at `origin`; the last holds its own end."""
    shifted = [(start - origin, end - origin) for start, end in windows]
    return [*shifted[:-1], (shifted[-1][0], float(np.nextafter(shifted[-1][1], math.inf)))]


def _rows(
    identity: dict[str, Any], run: Run, windows: Windows, is_log: bool, warnings: list[str]
) -> Iterator[dict[str, Any]]:
    name = identity.get("run") or identity.get("deployment") or "requests"
    drifting = 0
    for index, (start, end) in enumerate(windows.windows):
        row = windows.row(index)
        if not row:
            continue
        if is_log and len(windows.windows) > 1 and not windows.steady(index):
            drifting += 1
            continue
        given = dict(identity)
        offered, scv = windows.offered(index)
        if identity.get("arrival_rate") is not None:
            row["offered_rate"] = offered
        if is_log:
            row["arrival_rate"] = offered
            if not math.isnan(scv):
                row["arrival_scv"] = scv
            if len(windows.windows) > 1:
                given["run"] = f"{name} window {index + 1}"
        whole_run = end - start >= (1 - 1e-9) * (run.end - run.first) and run.end > run.last
        if identity.get("concurrency") is not None and not whole_run:
            row["throughput"] = offered  # each launch follows a completion; no waves that cross the edges of the window
        yield {**row, "window": "run" if whole_run else "steady", **given}
    if drifting:
        warnings.append(f"{name}: {drifting} of {len(windows.windows)} windows set aside, the load changes within them")
