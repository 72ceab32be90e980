"""The request table, one row a request (CSV, JSON lines or Parquet), summarised into operating points.

The table is streamed twice, first for the extent of each run, then for its windows, so that ten million requests need
neither ten million rows of memory nor a database. Rows of one run share the values of the identity, load and
speculation columns they carry (`deployment`, `run`, `arrival_rate`, ...).

A run that states its load becomes one operating point: over the requests marked `measured` where that column exists,
else from three mean latencies after its first arrival until its last (`window` "steady"), or, where that would leave
less than half of it, over all of it (`window` "run"). A log that states no load is cut into windows, each an operating
point at the rate and variability measured in it; windows in which the load drifts are set aside.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from .problems import Problem
from .request_rows import NEEDED, TIMES, RequestRows
from .schema import COLUMNS
from .source import Source
from .windows import Windows

WARM_UP = 3.0
"""Mean latencies after the first arrival before a run counts as steady."""
MOST_RUNS = 10_000


def recognises(source: Source) -> bool:
    """Whether a file is a request table: it has arrival and completion times and token counts by their names."""
    names = set(source.columns) or (set(source.first) if isinstance(source.first, dict) else set())
    return set(NEEDED) <= names


def read(source: Source, window: float | None = None) -> pd.DataFrame:
    """The operating points of a request table as a raw frame (see `formats.Format`); `window` [s] sets the length of
    the windows that a log is cut into (chosen by itself: at least a minute, 50 mean latencies and 300 requests).

    Raises `TraceError` when columns are missing, cells cannot be read, or more than 1 % of the rows contradict
    themselves (completion before arrival, negative tokens, ...)."""
    reader = RequestRows(source)
    runs: dict[tuple, _Run] = {}
    for key, requests in reader.batches():
        runs.setdefault(key, _Run()).see(requests)
        if len(runs) > MOST_RUNS:
            advice = "its runs are told apart by the columns " + ", ".join(reader.keys)
            raise Problem("too many runs in one table", source.file, allowed=f"{MOST_RUNS}", advice=advice).error()
    warnings = reader.warnings()
    if not any(run.ok for run in runs.values()):
        raise Problem("no completed request in the table", source.file, allowed="at least one").error()
    origin = min(run.first for run in runs.values())
    windows = {
        key: Windows(_shifted(_windows_of(run, _is_log(reader, key), window), origin)) for key, run in runs.items()
    }
    for key, requests in reader.batches():
        windows[key].add(requests | {name: requests[name] - origin for name in TIMES})
    rows = []
    for key, run in runs.items():
        rows += _rows(dict(zip(reader.keys, key, strict=True)), run, windows[key], _is_log(reader, key), warnings)
    frame = pd.DataFrame({name: pd.Series([row.get(name) for row in rows], dtype=object) for name in _names(rows)})
    frame["source_file"] = pd.Series([source.file] * len(rows), dtype=object)
    frame["source_row"] = pd.Series(range(1, len(rows) + 1), dtype="int64")
    frame.attrs["warnings"] = [f"{source.file}: {text}" for text in warnings]
    return frame


def _names(rows: list[dict[str, Any]]) -> list[str]:
    given = {name for row in rows for name in row}
    return [item.name for item in COLUMNS if item.name in given]


@dataclass
class _Run:
    """Extent of one run: what the first reading learns."""

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

    @property
    def mean_latency(self) -> float:
        return self.latency / max(self.ok, 1)


def _is_log(reader: RequestRows, key: tuple) -> bool:
    given = dict(zip(reader.keys, key, strict=True))
    return given.get("arrival_rate") is None and given.get("concurrency") is None


def _windows_of(run: _Run, is_log: bool, length: float | None) -> list[tuple[float, float]]:
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
    identity: dict[str, Any], run: _Run, windows: Windows, is_log: bool, warnings: list[str]
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
        given = {key: value for key, value in identity.items() if value is not None}
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
