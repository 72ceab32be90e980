"""Read when requests arrived and how long they were: traces of traffic without any latency.

Understood are the Azure traces of 2023 (``TIMESTAMP,ContextTokens,GeneratedTokens``), Mooncake's JSON lines
(`timestamp` in milliseconds), BLIS TraceV2 (`arrival_time_us`), the JSON lines of LLMServingSim (`arrival_time_ns`) and
a table with `arrival_time` [s] and optional `prompt_tokens` and `output_tokens`. Tables are read column by column,
never row by row.

Traps: Azure's stamps have seven decimals of a second. Mooncake's count milliseconds but move in steps of three seconds,
about ten requests at once: the variability of its gaps is that of the clock, which `read` says. Its prompts share
prefixes (`hash_ids`), which lengths do not tell.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..parquet_size import check_parquet
from ..problems import Problem, repeated
from ..source import Source

COLUMNS = ("arrival_time", "prompt_tokens", "output_tokens")
PEAK_WINDOW = 60.0
"""Length of the window over which the peak rate is counted [s]."""
LATEST, SHORTEST = 1e12, 1e-9
"""No time in seconds is later, and no trace shorter [s]."""
MOST_ROWS = 50_000_000
"""Most arrivals in a Parquet file, whose size says nothing of their number."""


@dataclass(frozen=True)
class _Layout:
    """Names of the time, prompt and output columns, and the seconds in a unit of time (None: a date)."""

    name: str
    columns: tuple[str, str, str]
    unit: float | None


_LAYOUTS = (
    _Layout("Azure LLM inference trace", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), None),
    _Layout("Mooncake trace", ("timestamp", "input_length", "output_length"), 1e-3),
    _Layout("BLIS TraceV2", ("arrival_time_us", "input_tokens", "output_tokens"), 1e-6),
    _Layout("LLMServingSim workload", ("arrival_time_ns", "input_toks", "output_toks"), 1e-9),
    _Layout("arrival times", ("arrival_time", "prompt_tokens", "output_tokens"), 1.0),
)
# Columns that make a table more than arrivals: a request table or operating points.
_MORE = ("first_token_time", "completion_time", "deployment", "ttft_mean", "e2e_mean", "prompt_length")


def recognises(source: Source) -> bool:
    """Whether a file lists arrivals and nothing that was measured afterwards."""
    return _layout(source) is not None


def read(source: Source) -> pd.DataFrame:
    """The arrivals of a file in their order: `arrival_time` [s, the first is 0], `prompt_tokens`, `output_tokens` [tok,
    NaN where unknown]. Notes are in ``frame.attrs["warnings"]``. Raises `TraceError` naming the first row that has no
    time or a negative length: leaving it out would change the rate."""
    layout = _layout(source)
    if layout is None:
        allowed = "columns such as arrival_time, prompt_tokens, output_tokens"
        raise Problem("no list of arrivals", source.file, got=", ".join(source.columns[:6]), allowed=allowed).error()
    table = _json(source, layout) if source.kind == "json" else _table(source, layout)
    times = _times(pd.Series(table[layout.columns[0]]), layout, source)
    lengths = [_lengths(table, name, source) for name in layout.columns[1:]]
    warnings = []
    if np.any(np.diff(times) < 0):
        order = np.argsort(times, kind="stable")
        times, lengths = times[order], [values[order] for values in lengths]
        warnings.append(f"{source.file}: the arrivals are not in the order of time: sorted")
    gaps = np.diff(times)
    if np.sum(gaps == 0) > len(gaps) / 2 and np.any(gaps > 0):
        step = float(np.median(gaps[gaps > 0]))
        warnings.append(
            f"{source.file}: most arrivals share their time: the clock moves in steps of about {step:g} s; "
            "arrival_scv is that of the clock"
        )
    data = dict(zip(COLUMNS, (times - times[0], *lengths), strict=True))
    frame = pd.DataFrame(data)
    frame.attrs["warnings"], frame.attrs["problems"], frame.attrs["format"] = warnings, [], layout.name
    return frame


def summary(frame: pd.DataFrame) -> dict[str, float]:
    """What a model needs of a list of arrivals.

    `n_requests`; `duration` [s], first to last arrival; `arrival_rate` = (n_requests - 1)/duration [req/s];
    `arrival_scv`, variance/mean^2 of the gaps; `peak_rate` [req/s], the most arrivals in any 60 s, per second (of a
    shorter list its rate); `prompt_length`, `output_length` [tok] and `prompt_scv`, `output_scv`, NaN where unknown.

    >>> summary(pd.DataFrame({"arrival_time": [0.0, 1.0, 4.0], "prompt_tokens": [2.0, 4.0, 6.0]}))["arrival_scv"]
    0.25
    """
    times = np.sort(frame["arrival_time"].to_numpy(float))
    duration = float(times[-1] - times[0]) if len(times) else 0.0
    gaps = np.diff(times)
    duration = duration if duration > SHORTEST else 0.0
    rate = (len(times) - 1) / duration if duration > 0 else math.nan
    found = {
        "n_requests": float(len(times)),
        "duration": duration,
        "arrival_rate": rate,
        "arrival_scv": float(gaps.var() / gaps.mean() ** 2) if duration > 0 else math.nan,
        "peak_rate": rate,
    }
    if duration >= PEAK_WINDOW:
        within = np.searchsorted(times, times + PEAK_WINDOW, "left") - np.arange(len(times))
        found["peak_rate"] = float(within.max() / PEAK_WINDOW)
    for name, column in (("prompt", "prompt_tokens"), ("output", "output_tokens")):
        values = frame[column].to_numpy(float) if column in frame.columns else np.zeros(0)
        values = values[~np.isnan(values)]
        mean = float(values.mean()) if len(values) else math.nan
        found[f"{name}_length"] = mean
        found[f"{name}_scv"] = float(values.var() / mean**2) if mean > SHORTEST else math.nan
    return found


def _layout(source: Source) -> _Layout | None:
    if source.kind == "json":
        names = set(source.first) if isinstance(source.first, dict) else set()
    else:
        names = set(source.columns)
    if names & set(_MORE):
        return None
    for layout in _LAYOUTS:
        wanted = layout.columns[:1] if layout.unit == 1.0 else layout.columns
        if set(wanted) <= names:
            return layout
    return None


def _table(source: Source, layout: _Layout) -> pd.DataFrame:
    """The columns of a CSV or Parquet file that are needed, CSV cells as text."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    names = [name for name in layout.columns if name in source.columns]
    twice = repeated(name for name in source.columns if name in names)
    if twice:
        raise Problem("duplicate column names", source.file, 1, twice[0], allowed="each name once").error()
    try:
        if source.kind == "parquet":
            return _parquet(source, names)
        header = source.head.decode("utf-8-sig", "replace").lstrip("\r\n \t").split("\n", 1)[0]
        table = pyarrow.csv.read_csv(
            source.path,
            read_options=pyarrow.csv.ReadOptions(column_names=list(source.columns), skip_rows=_skipped(source)),
            parse_options=pyarrow.csv.ParseOptions(delimiter=max(",\t;", key=header.count)),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=names, column_types={name: pa.string() for name in names}
            ),
        )
        return table.to_pandas()
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).split("\n", 1)[0][:200]
        raise Problem(
            f"the table cannot be read: {reason}", source.file, advice="the file may be cut off"
        ).error() from None


def _parquet(source: Source, names: list[str]) -> pd.DataFrame:
    """Columns of a Parquet file: numbers, text or times, and nothing else."""
    import pyarrow as pa
    import pyarrow.parquet

    opened = pyarrow.parquet.ParquetFile(source.path)
    rows, size = opened.metadata.num_rows, source.path.stat().st_size
    if rows > MOST_ROWS:
        raise ValueError(f"{rows} rows in {size} bytes; up to {MOST_ROWS} can be held")
    check_parquet(opened.metadata, source.file, size, names)
    found = {str(name).strip(): str(name) for name in opened.schema_arrow.names}
    table = opened.read(columns=[found[name] for name in names])
    columns = {}
    for name in names:
        kind = table.schema.field(found[name]).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        checks = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
        checks += (pa.types.is_string, pa.types.is_large_string, pa.types.is_timestamp, pa.types.is_date)
        if not any(check(kind) for check in checks):
            raise ValueError(f"column {name} holds {kind}, not numbers")
        if pa.types.is_decimal(kind):
            kind = pa.float64()
        columns[name] = table[found[name]].cast(kind)
    return pa.table(columns).to_pandas()


def _skipped(source: Source) -> int:
    """Lines up to and with the header."""
    text = source.head.decode("utf-8-sig", "replace")
    return text[: len(text) - len(text.lstrip("\r\n \t"))].count("\n") + 1


def _json(source: Source, layout: _Layout) -> pd.DataFrame:
    records = [record if isinstance(record, dict) else {} for _, record in source.records]
    return pd.DataFrame({name: [record.get(name) for record in records] for name in layout.columns}, dtype=object)


def _row(source: Source, at: int) -> int:
    if source.kind == "json":
        return source.records[at][0]
    return at + 1 + (1 if source.kind == "parquet" else _skipped(source))


def _times(cells: pd.Series, layout: _Layout, source: Source) -> np.ndarray:
    name, allowed = layout.columns[0], "a time"
    if layout.unit is None:
        if source.kind == "json":
            cells = cells.map(lambda cell: cell if isinstance(cell, str) else None)
        stamps = pd.to_datetime(cells, errors="coerce", format="ISO8601", utc=True)
        bad = stamps.isna().to_numpy(bool)
        allowed = "a date and time such as 2023-11-16 18:17:03.9799600"
        seconds = (stamps - stamps.min()).dt.total_seconds().to_numpy(float)
    else:
        seconds = _numbers(cells) * layout.unit
        bad = ~(np.abs(seconds) <= LATEST)
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise Problem(
            "", source.file, _row(source, at), name, cells.iloc[at], allowed, "the file may be cut off"
        ).error()
    if not len(seconds):
        raise Problem("no arrivals below the header", source.file).error()
    return seconds


def _lengths(table: pd.DataFrame, name: str, source: Source) -> np.ndarray:
    if name not in table.columns:
        return np.full(len(table), math.nan)
    cells = pd.Series(table[name])
    values = _numbers(cells)
    empty = cells.isna().to_numpy(bool) | (cells.astype(str).str.strip() == "").to_numpy(bool)
    bad = ~empty & ~((values >= 0) & (values < 1e9))
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise Problem("", source.file, _row(source, at), name, cells.iloc[at], "tokens, at least 0").error()
    return values


def _numbers(cells: pd.Series) -> np.ndarray:
    """Cells as floats, NaN where they are none: numbers, or text that is one; no booleans, no dates."""
    if cells.dtype == object:
        cells = pd.Series([_plain(cell) for cell in cells], dtype=float)
    elif pd.api.types.is_datetime64_any_dtype(cells.dtype):
        return np.full(len(cells), math.nan)
    return np.asarray(pd.to_numeric(cells, errors="coerce"), float)


def _plain(cell: Any) -> float:
    if isinstance(cell, bool) or not isinstance(cell, (int, float)) or abs(cell) >= 2**63:
        return math.nan
    return float(cell)
