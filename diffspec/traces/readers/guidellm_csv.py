"""Read the CSV that GuideLLM writes (0.5 to 0.8): three header rows (group, name with unit, statistic), one row a
benchmark. Each row becomes the report's benchmark again and goes through `guidellm.read_benchmark`.

Traps: before 0.7 the header is that of the first benchmark only, so the cells of another with more or fewer columns
(errors, say) stand under wrong names: such a row is a problem, the JSON is whole. Percentiles are one cell, a list of
eleven numbers without the median. `Strategy` holds no rate (0.5) or one rounded to 0.01; the profile has it in full,
but for a sweep of 0.8. Times are whole seconds. What vLLM says of single requests is not in the table.
"""

import csv
import io
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from ..problems import Problem
from ..source import Source
from .guidellm import read_benchmark
from .json_record import finite, json_object
from .rows import Result, Rows
from .sweep_summary import value

# group and name in the table -> the metric in the report; names are "<status> <this>".
_METRICS = {
    ("Request Latency", "Sec"): "request_latency",
    ("Time to First Token", "ms"): "time_to_first_token_ms",
    ("Inter Token Latency", "ms"): "inter_token_latency_ms",
    ("Server Throughput", "Requests/Sec"): "requests_per_second",
    ("Server Throughput", "Concurrency"): "request_concurrency",
    ("Token Metrics", "Input Tokens"): "prompt_token_count",
    ("Token Metrics", "Output Tokens"): "output_token_count",
    ("Token Streaming", "Iter Tokens/Iter"): "iter_tokens_per_iteration",
}
_STATUSES = ("Successful", "Incomplete", "Errored")
_PERCENTILES = ("min", "p001", "p01", "p05", "p10", "p25", "p75", "p90", "p95", "p99", "max")
_TIMES = {"Request End Time": "request_end_time", "End Time": "end_time"}
_DURATIONS = {"Duration": "duration", "Warmup": "warmup_duration", "Cooldown": "cooldown_duration"}


def recognises(source: Source) -> bool:
    """Whether a file is GuideLLM's CSV: its first line holds the groups, not names."""
    groups = set(source.columns)
    return {"Run Info", "Benchmark", "Request Counts"} <= groups and "Timings" in groups


def read_guidellm_csv(source: Source) -> pd.DataFrame:
    """The benchmarks as a raw frame (see `formats.Format`); `source_row` is the line (the header takes three)."""
    rows = Rows()
    rows.add(source.file, _results(source))
    if not rows.rows:
        raise Problem("the table has no rows", source.file, allowed="at least one benchmark").error()
    return rows.frame()


def _results(source: Source) -> Iterator[Result]:
    usual = csv.field_size_limit(1 << 27)
    try:
        lines = list(csv.reader(io.StringIO(source.text, newline=""), strict=True))
    except csv.Error as error:
        raise Problem(f"not valid CSV: {error}", source.file, advice="the file may be cut off").error() from None
    finally:
        csv.field_size_limit(usual)
    header = lines[:3]
    if len(header) < 3 or len({len(line) for line in header}) > 1:
        allowed = "three header rows of one length: group, name, statistic"
        raise Problem("the header is incomplete", source.file, 1, allowed=allowed).error()
    places = list(zip(*([cell.strip() for cell in line] for line in header), strict=True))
    filled = [(number, cells) for number, cells in enumerate(lines[3:], start=4) if any(map(str.strip, cells))]
    stem = Path(source.file).stem
    for index, (number, cells) in enumerate(filled, start=1):
        run = stem if len(filled) == 1 else f"{stem}#{index}"
        table = dict(zip(places, (cell.strip() for cell in cells), strict=False))
        shifted = len(cells) != len(places) or json_object(table.get(("Runtime Info", "Metadata", ""))) is None
        if shifted:
            advice = "GuideLLM before 0.7 names only the columns of its first benchmark: read its JSON instead"
            message = "the cells do not stand under the columns they belong to"
            yield number, {}, [], [Problem(message, got=f"{len(cells)} cells for {len(places)}", advice=advice)]
            continue
        notes, problems = [], []
        benchmark = _benchmark(table, notes, problems)
        row, more, faults = read_benchmark(benchmark, run)
        yield number, row, notes + more, problems + faults


def _benchmark(table: dict[tuple[str, ...], str], notes: list[str], problems: list[Problem]) -> dict[str, Any]:
    """A row as the benchmark of a report: what `read_benchmark` asks of it."""

    def cell(group: str, name: str, statistic: str = "") -> Any:
        found = table.get((group, name, statistic), "")
        return value(name, found) if found else None

    metrics: dict[str, Any] = {}
    for (group, unit), key in _METRICS.items():
        metrics[key] = {}
        for status in _STATUSES:
            name = f"{status} {unit}"
            summary = {statistic.lower(): cell(group, name, statistic) for statistic in ("Mean", "Median")}
            if summary["mean"] is None:
                continue
            deviation = cell(group, name, "Std Dev")
            summary["variance"] = deviation * deviation if isinstance(deviation, (int, float)) else None
            listed = cell(group, name, "Percentiles")
            found = finite(listed)
            if found is not None and len(found) == len(_PERCENTILES):
                summary["percentiles"] = dict(zip(_PERCENTILES, found, strict=True))
                summary["min"], summary["max"] = found[0], found[-1]
            elif listed is not None:
                allowed = f"{len(_PERCENTILES)} numbers: {', '.join(_PERCENTILES)}"
                problems.append(Problem("", None, None, f"{group}, {name}, Percentiles", str(listed), allowed))
            metrics[key][status.lower()] = summary
    metrics["request_totals"] = {
        status: cell("Request Counts", status.capitalize()) for status in ("successful", "incomplete", "errored")
    }
    profile = json_object(table.get(("Run Info", "Profile", ""))) or {}
    config = {
        "strategy": _strategy(str(cell("Benchmark", "Strategy")), cell("Run Info", "Run Index"), profile, notes),
        "backend": json_object(table.get(("Run Info", "Backend", ""))) or {},
        "requests": json_object(table.get(("Run Info", "Requests", ""))) or {},
    }
    told = {key: _seconds(cell("Timings", name)) for name, key in _TIMES.items()}
    times = {key: time for key, time in told.items() if time is not None}
    durations = {key: cell("Timings", name, "Sec") for name, key in _DURATIONS.items()}
    return {"config": config, "metrics": metrics, "scheduler_metrics": times, **durations}


def _strategy(told: str, index: Any, profile: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """``constant@5.00`` (before 0.7 only ``constant``) as the strategy of the report, in full where the profile has it:
    the strategies it ran, of which this is number `index`, or a list of rates or streams."""
    kind, _, amount = told.partition("@")
    ran = profile.get("completed_strategies")
    if isinstance(ran, list) and isinstance(index, int) and 0 <= index < len(ran):
        item = ran[index]
        if isinstance(item, dict) and item.get("type_") == kind:
            return item
    found: dict[str, Any] = {"type_": kind}
    name = "rate" if kind in ("constant", "poisson") else "streams" if kind == "concurrent" else "max_concurrency"
    listed = finite(profile.get(name)) or []
    same = {number for number in listed if f"{number:.2f}" == amount}
    try:
        found[name] = same.pop() if len(same) == 1 else float(amount)
    except ValueError:  # "throughput@unlimited", or no number at all
        return found
    if name == "rate" and not listed:
        notes.append("the rate is rounded to 0.01 requests per second in this table")
    return found


def _seconds(told: Any) -> float | None:
    try:
        return datetime.strptime(str(told), "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None
