"""Put what an engine counted beside what a client measured: scrapes of `/metrics` joined to rows of benchmark results.

A run is found among the scrapes by content: two scrapes of one server between which as many requests finished and as
many tokens were generated as the row received. Acceptance, waiting, KV use and preemptions come from the counters where
the row lacks them; what the client measured (latencies, throughput) is never replaced.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .problems import Problem
from .readers.counters import operating_point
from .readers.prometheus import Snapshot
from .sheet import is_missing, parse_number

NEAR = 0.02
"""Relative difference up to which counted and received requests and tokens are the same."""
FILLED = ("draft_length", "tokens_per_step", "draft_acceptance_rate", "position_acceptance", "draft_probability")
OBSERVED = ("effective_batch_size", "waiting_mean", "kv_usage_mean", "preemptions")
ROWS = 256
"""Scrapes compared with all others at a time."""
MOST_WINDOWS = 1_000_000
"""Most windows between scrapes that are compared for one run."""
_MARKS = (".metrics_before", ".metrics_after", ".metrics", "_metrics_before", "_metrics_after", "_before", "_after")


@dataclass(frozen=True)
class _Window:
    """Scrapes of one server from the one before a run to the one after it."""

    scrapes: tuple[Snapshot, ...]
    error: float

    @property
    def names(self) -> set[str]:
        return {run_name(scrape.file) for scrape in (self.scrapes[0], self.scrapes[-1])}

    def overlaps(self, other: "_Window") -> bool:
        """Whether some time between scrapes is in both."""
        return bool(set(map(id, self.scrapes[1:])) & set(map(id, other.scrapes[1:])))


def run_name(file: str) -> str:
    """The run that a file is named after: ``X`` of ``X.metrics_before.txt``, ``X.metrics_after.txt`` and ``X.json``.

    >>> run_name("runs/k4_r2.metrics_after.txt"), run_name("k4_r2.json")
    ('k4_r2', 'k4_r2')
    """
    stem = Path(file).stem
    return next((stem.removesuffix(mark) for mark in _MARKS if stem.endswith(mark)), stem)


def join(bench: pd.DataFrame, snapshots: Sequence[Snapshot]) -> tuple[pd.DataFrame, list[str]]:
    """`bench` with cells filled from the counters between two scrapes, and notes.

    `bench` is a raw frame of benchmark results: `n_requests` and `output_length` say what a row received (rows without
    them are left as they are), `source_file` its name. `snapshots` come in any order, of any servers and runs.
    A row and a window belong together when requests and tokens agree within 2 %; when no window does, one whose
    counters hold somewhat more (a warm-up, other traffic) is taken and named. Names of files (`run_name`), then mean
    latencies, decide between windows that agree. Raises `TraceError` when they do not decide.

    >>> from .readers.prometheus import parse
    >>> text = "vllm:generation_tokens_total {}\\nvllm:request_success_total {}\\nvllm:num_preemptions_total {}\\n"
    >>> scrapes = [parse(text.format(*counts))[0] for counts in ((700, 10, 0), (1340, 20, 3))]
    >>> frame, notes = join(pd.DataFrame({"n_requests": [10], "output_length": [64.0]}), scrapes)
    >>> frame["preemptions"].tolist()
    [3.0]
    """
    frame, notes = bench.copy(), []
    if not len(frame) or not snapshots:
        return frame, notes
    servers = _servers(snapshots)
    received = [(_number(row, "n_requests"), _number(row, "output_length")) for _, row in frame.iterrows()]
    options: dict[int, list[_Window]] = {}
    for index, (requests, length) in enumerate(received):
        place = _place(frame, index)
        if requests is None or length is None or requests * length <= 0:
            notes.append(f"{place}: n_requests or output_length is missing: no counters can be found for it")
            continue
        found = [window for server in servers for window in _windows(server, requests, requests * length)]
        options[index] = found
        if not found:
            notes.append(f"{place}: {_no_window(servers, requests, requests * length)}")
    for index, window in _assign(frame, options).items():
        requests, length = received[index]
        assert requests is not None and length is not None
        _fill(frame, index, window, requests, requests * length, notes)
    return frame, notes


def points(snapshots: Sequence[Snapshot], open_loop: bool = False) -> pd.DataFrame:
    """Operating points from scrapes alone, as a raw frame for `validate`: the scrapes of one server are one run.

    When `run_name` puts several scrapes of a server together, each name is a run of its own. The load is not in the
    counters: see `operating_point`. Raises `TraceError` for a run scraped only once.
    """
    rows: list[dict[str, Any]] = []
    warnings: list[str] = []
    for server in _servers(snapshots):
        runs: dict[str, list[Snapshot]] = {}
        for scrape in server:
            runs.setdefault(run_name(scrape.file), []).append(scrape)
        if all(len(run) == 1 for run in runs.values()):
            runs = {run_name(server[-1].file): server}
        for name, run in runs.items():
            if len(run) < 2:
                advice = "scrape /metrics before and after the run, and give both"
                raise Problem("one scrape tells nothing about a run", run[0].file, run[0].row, advice=advice).error()
            row, notes = operating_point(run[0], run[-1], run[1:-1], open_loop=open_loop)
            rows.append({"run": name, **row, "source_file": run[-1].file, "source_row": run[-1].row})
            warnings += [f"{run[-1].file}: {note}" for note in notes]
    if not rows:
        raise Problem("no scrape of /metrics was given").error()
    frame = pd.DataFrame(rows).astype(object)
    frame["source_row"] = frame["source_row"].astype("int64")
    frame.attrs["warnings"], frame.attrs["problems"] = warnings, []
    return frame


def _servers(snapshots: Sequence[Snapshot]) -> list[list[Snapshot]]:
    """Scrapes by server process, each in the order of its counters (then of time)."""
    servers: dict[tuple, list[Snapshot]] = {}
    for scrape in snapshots:
        process = scrape.models if scrape.started is None else round(scrape.started)
        servers.setdefault((scrape.engine, process), []).append(scrape)
    return [sorted(server, key=_progress) for server in servers.values()]


def _progress(scrape: Snapshot) -> tuple:
    return (_generated(scrape), _completed(scrape), sum(scrape.totals().values()), scrape.time or 0.0)


def _windows(server: list[Snapshot], requests: float, tokens: float) -> list[_Window]:
    """Disjoint windows that hold a run, the best fitting first: within 2 %, else those that hold a little more."""
    counts = np.array([(_generated(scrape), _completed(scrape)) for scrape in server])
    for more in (False, True):
        kept: list[tuple[int, int, float]] = []
        for miss, _, first, last in sorted(_fitting(counts, requests, tokens, more, server[-1].file)):
            if all(last <= other[0] or first >= other[1] for other in kept):
                kept.append((first, last, miss))
        if kept:
            return [_Window(tuple(server[first : last + 1]), miss) for first, last, miss in kept]
    return []


def _fitting(
    counts: np.ndarray, requests: float, tokens: float, more: bool, file: str
) -> list[tuple[float, int, int, int]]:
    """(error, length, first, last) of the windows between scrapes with these counts that hold a run, or a little more.

    Of windows that hold the same the shortest: idle scrapes at its ends say nothing."""
    changed = np.flatnonzero(np.append(True, (np.diff(counts, axis=0) != 0).any(axis=1)))
    starts, ends = np.append(changed[1:], len(counts)) - 1, changed
    generated, finished = counts[changed].T
    found: list[tuple[float, int, int, int]] = []
    for top in range(0, len(changed), ROWS):  # some scrapes at a time: a long series fits in memory
        rows = slice(top, top + ROWS)
        low, high = generated[rows][0] + (1 - NEAR) * tokens, generated[rows][-1] + 1.5 * tokens
        columns = slice(*np.searchsorted(generated, [low * (1 - 1e-9), high * (1 + 1e-9)]))
        tokens_off = np.nan_to_num((generated[None, columns] - generated[rows, None]) / tokens - 1, nan=9.0)
        requests_off = np.nan_to_num((finished[None, columns] - finished[rows, None]) / requests - 1, nan=9.0)
        if more:
            allowed = (tokens_off >= -NEAR) & (tokens_off <= 0.5)
            allowed &= (requests_off >= 0) & (requests_off <= max(0.25, 2 / requests))
        else:
            allowed = (np.abs(tokens_off) <= NEAR) & (np.abs(requests_off) <= NEAR)
        before, after = np.nonzero(allowed)
        error = (np.abs(tokens_off) + np.abs(requests_off))[before, after]
        first, last = starts[rows][before], ends[columns][after]
        later = last > first
        found += zip(*(values[later].tolist() for values in (error, last - first, first, last)), strict=True)
        if len(found) > MOST_WINDOWS:
            advice = "give the scrapes of one run at a time"
            raise Problem("too many scrapes hold as much as the run", file, advice=advice).error()
    return found


def _completed(scrape: Snapshot) -> float:
    if scrape.finished:
        return sum(value for reason, value in scrape.finished.items() if reason not in ("abort", "error"))
    return scrape.histograms["e2e"].count if "e2e" in scrape.histograms else 0.0


def _generated(scrape: Snapshot) -> float:
    """Tokens of the finished requests; vLLM's V0 engine counts `generation_tokens` by steps, not tokens."""
    if "output_length" in scrape.histograms:
        return scrape.histograms["output_length"].sum
    return scrape.counters.get("generation_tokens", 0.0)


def _no_window(servers: list[list[Snapshot]], requests: float, tokens: float) -> str:
    held = [
        f"{_completed(server[-1]) - _completed(server[0]):g} requests and "
        f"{_generated(server[-1]) - _generated(server[0]):g} tokens"
        for server in servers
    ]
    return f"no two scrapes hold its {requests:g} requests and {tokens:g} tokens (first to last: {'; '.join(held)})"


def _assign(frame: pd.DataFrame, options: dict[int, list[_Window]]) -> dict[int, _Window]:
    """A window for every row that has one to itself, or one of its name, or one whose latencies are clearly its own."""
    pairs = [(index, window) for index, windows in options.items() for window in windows]
    chosen: dict[int, _Window] = {}

    def rivals(pair: tuple[int, _Window]) -> list[tuple[int, _Window]]:
        return [other for other in pairs if other is not pair and (other[0] == pair[0] or pair[1].overlaps(other[1]))]

    def choose(pair: tuple[int, _Window]) -> None:
        chosen[pair[0]] = pair[1]
        gone = {id(item) for item in (pair, *rivals(pair))}
        pairs[:] = [other for other in pairs if id(other) not in gone]

    for index in options:
        named = [pair for pair in pairs if pair[0] == index and pair[1].names == {run_name(_file(frame, index))}]
        if len(named) == 1:
            choose(named[0])
    distance: dict[int, float] = {}
    while pairs:
        left = Counter(index for index, _ in pairs)
        alone = next((pair for pair in pairs if left[pair[0]] == 1 and not rivals(pair)), None)
        if alone is None:
            distance = distance or {id(pair): _distance(frame, *pair) for pair in pairs}
            alone = min(pairs, key=lambda pair: distance[id(pair)])
            nearest, second = distance[id(alone)], min(distance[id(pair)] for pair in rivals(alone))
            if not (nearest < 0.1 and second > max(0.1, 3 * nearest)):
                raise _ambiguous(frame, *alone)
        choose(alone)
    return chosen


def _distance(frame: pd.DataFrame, index: int, window: _Window) -> float:
    """Largest difference in log between mean latencies of the client and the engine; infinite without a common one."""
    counted, _ = operating_point(window.scrapes[0], window.scrapes[-1])
    row = frame.iloc[index]
    pairs = [(_number(row, f"{metric}_mean"), counted.get(f"{metric}_mean")) for metric in ("e2e", "ttft", "itl")]
    known = [abs(math.log(a / b)) for a, b in pairs if a is not None and b is not None and a > 0 and b > 0]
    return max(known, default=math.inf)


def _ambiguous(frame: pd.DataFrame, index: int, window: _Window):
    files = ", ".join(sorted({window.scrapes[0].file, window.scrapes[-1].file}))
    advice = (
        "name the files of a run alike: X.json, X.metrics_before.txt, X.metrics_after.txt; or read one run at a time"
    )
    message = f"several runs and scrapes ({files} among them) hold as many requests and tokens"
    return Problem(message, _file(frame, index) or None, _row(frame, index), advice=advice).error()


def _fill(frame: pd.DataFrame, index: int, window: _Window, requests: float, tokens: float, notes: list[str]) -> None:
    place, first, last = _place(frame, index), window.scrapes[0], window.scrapes[-1]
    rate = _number(frame.iloc[index], "throughput")
    duration = requests / rate if rate else None
    counted, told = operating_point(first, last, window.scrapes[1:-1], duration=duration)
    if counted.get("draft_length") == 0 and (drafted := _number(frame.iloc[index], "draft_length")):
        text = f"{drafted:g} tokens a step were drafted, none between {first.file} and {last.file}: another server's?"
        notes.append(f"{place}: {text} Not joined")
        return
    completed, generated = _completed(last) - _completed(first), _generated(last) - _generated(first)
    notes += [f"{place}: {line}" for line in told if "acceptance is known" in line or line in last.warnings]
    if generated > (1 + NEAR) * tokens or completed > (1 + NEAR) * requests:
        notes.append(
            f"{place}: the counters hold {completed:g} requests and {generated:g} tokens but {requests:g} and "
            f"{tokens:g} were received: warm-up or other traffic inside"
        )
    ours, theirs = _number(frame.iloc[index], "tokens_per_step"), counted.get("tokens_per_step")
    if ours is not None and theirs is not None and abs(theirs - ours) > 0.01 * ours:
        notes.append(
            f"{place}: tokens_per_step {ours:.4g} in the result, {theirs:.4g} in the counters; the first is kept"
        )
    if theirs is not None and _number(frame.iloc[index], "draft_length") == 0:
        notes.append(f"{place}: the result speaks of no speculation, but the engine drafted: taken from the counters")
        _set(frame, index, "draft_length", None)
        _set(frame, index, "method", None)
    filled = []
    for name in (*FILLED, *OBSERVED):
        value = counted.get(name)
        empty = name not in frame.columns or is_missing(frame[name].iloc[index])
        if value is not None and empty:
            _set(frame, index, name, value)
            filled.append(name)
    if filled:
        notes.append(f"{place}: from the counters between {first.file} and {last.file}: {', '.join(filled)}")


def _set(frame: pd.DataFrame, index: int, name: str, value: Any) -> None:
    cells = list(frame[name]) if name in frame.columns else [None] * len(frame)
    cells[index] = value
    frame[name] = pd.Series(cells, dtype=object, index=frame.index)


def _number(row: pd.Series, name: str) -> float | None:
    try:
        return parse_number(row.get(name))
    except ValueError:
        return None


def _file(frame: pd.DataFrame, index: int) -> str:
    return str(frame["source_file"].iloc[index]) if "source_file" in frame.columns else ""


def _row(frame: pd.DataFrame, index: int) -> int:
    return int(frame["source_row"].iloc[index]) if "source_row" in frame.columns else index + 1


def _place(frame: pd.DataFrame, index: int) -> str:
    file = _file(frame, index)
    return f"{file}, row {_row(frame, index)}" if file else f"row {_row(frame, index)}"
