"""Rows of a request table, streamed in batches and checked: what cannot have happened is set aside and counted."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..results import TraceError
from .json_text import parse_json
from .parquet_size import check_parquet
from .problems import Problem
from .schema import COLUMNS, NUMBER_NAMES
from .source import Source

TIMES = ("arrival_time", "schedule_time", "first_token_time", "completion_time")
TOKENS = ("prompt_tokens", "output_tokens", "drafted_tokens", "accepted_tokens", "stream_events")
NEEDED = ("arrival_time", "completion_time", "prompt_tokens", "output_tokens")
KEYS = tuple(item.name for item in COLUMNS if item.kind in ("identity", "architecture", "load", "speculation"))
BAD_SHARE = 0.01
"""Share of unusable rows that is set aside and reported; more is an error."""
CLOCK_SLACK = 1e-3
"""Events of two processes may be stamped this much [s] out of order."""
BATCH_ROWS = 1 << 18
LATEST = 1e12
"""No time in seconds is later."""
_MOST_NESTED = 1000
_DECIMAL = re.compile(r"\d{1,15}(\.\d{1,15})?")

Identity = tuple[tuple[str, Any], ...]
"""What tells a run from others: the columns of `KEYS` that it has a value in, with the values."""


@dataclass
class SetAside:
    """Of `rows` read, those unusable: what is wrong with them -> how many, and the first one's row."""

    rows: int = 0
    bad: dict[str, tuple[int, int]] = field(default_factory=dict)

    def merge(self, other: "SetAside") -> None:
        """Add those of another part of the same table."""
        self.rows += other.rows
        for what, (count, row) in other.bad.items():
            known, first = self.bad.get(what, (0, row))
            self.bad[what] = (known + count, min(first, row))

    def warnings(self, file: str) -> list[str]:
        """One line each. Raises `TraceError` beyond 1 % of the rows."""
        if sum(count for count, _ in self.bad.values()) > BAD_SHARE * self.rows:
            what, (count, row) = max(self.bad.items(), key=lambda item: item[1][0])
            allowed = f"up to {BAD_SHARE:.0%} of the rows"
            raise Problem(f"unusable requests: {what}", file, row, None, f"{count} of {self.rows}", allowed).error()
        return [
            f"{count} of {self.rows} requests set aside: {what} (first: row {row})"
            for what, (count, row) in self.bad.items()
        ]


class RequestRows:
    """Batches of a request table as float arrays by run (rows alike in the columns `keys`), with what was set aside.

    `groups`, the row groups to read of a Parquet file, or `span`, the bytes from and to of whole lines below the header
    of a CSV file (None: all), whose first row is `first_row` (from 0); `checked`: an earlier reader of the same file
    found nothing in it that could exhaust the memory."""

    def __init__(
        self,
        source: Source,
        groups: Sequence[int] | None = None,
        first_row: int = 0,
        checked: bool = False,
        span: tuple[int, int] | None = None,
    ):
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.dataset
        import pyarrow.json

        self.source = source
        types = {name: pa.float64() for name in (*TIMES, *TOKENS)} | {name: pa.string() for name in ("ok", "measured")}
        types |= {item.name: pa.string() for item in COLUMNS if item.name in KEYS}
        kind: Any = source.kind
        if kind == "text":
            line = source.head.decode("utf-8-sig", "replace").split("\n", 1)[0]
            kind = pyarrow.dataset.CsvFileFormat(
                parse_options=pyarrow.csv.ParseOptions(delimiter=max(",\t;", key=line.count)),
                convert_options=pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=True),
            )
        if kind == "json":
            if source.head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                advice = "write one object a line (JSON lines), or CSV or Parquet: they are streamed"
                raise Problem("the requests are one JSON list", source.file, advice=advice).error()
            if not checked:
                _check_nesting(source)
        elif kind == "parquet":
            kind = _parquet_format(source, checked)
        with _AsTraceError(source):
            self.dataset = pyarrow.dataset.dataset(str(source.path), format=kind, filesystem=source.arrow_filesystem)
            names = self.dataset.schema.names
            if groups is not None:
                part = next(iter(self.dataset.get_fragments())).subset(row_group_ids=list(groups))
                self.dataset = pyarrow.dataset.FileSystemDataset(
                    [part], self.dataset.schema, kind, filesystem=source.arrow_filesystem
                )
        missing = [name for name in NEEDED if name not in names]
        if missing:
            raise Problem(
                "columns are missing", source.file, 1, missing[0], ", ".join(names[:8]), ", ".join(NEEDED)
            ).error()
        self.keys = tuple(name for name in KEYS if name in names)
        self.columns = [name for name in (*TIMES, *TOKENS, "ok", "measured") if name in names]
        self.first_row, self.aside, self.span = first_row, SetAside(), span

    def batches(self) -> Iterator[tuple[Identity, dict[str, np.ndarray]]]:
        """(identity, requests) for every run in every batch; unusable rows are left out, counted."""
        self.aside = SetAside()
        with _AsTraceError(self.source):
            columns = [*self.keys, *self.columns]
            whole = self.span is None
            for batch in self.dataset.to_batches(columns, batch_size=BATCH_ROWS) if whole else self._lines(columns):
                if batch.num_rows:
                    yield from self._split(batch)

    def _lines(self, columns: list[str]) -> Iterator[Any]:
        """Batches of the lines of `span`."""
        import pyarrow.csv
        import pyarrow.fs

        assert self.span is not None
        csv = self.dataset.format
        options = pyarrow.csv.ConvertOptions(
            column_types=csv.default_fragment_scan_options.convert_options.column_types,
            strings_can_be_null=True,
            include_columns=columns,
        )
        names = pyarrow.csv.ReadOptions(column_names=self.dataset.schema.names)
        files = self.source.arrow_filesystem or pyarrow.fs.LocalFileSystem()
        with files.open_input_file(str(self.source.path)) as file:
            lines = file.get_stream(self.span[0], self.span[1] - self.span[0])
            yield from pyarrow.csv.open_csv(lines, names, csv.parse_options, options)

    def _split(self, batch) -> Iterator[tuple[Identity, dict[str, np.ndarray]]]:
        import pyarrow as pa

        size = batch.num_rows
        requests = {name: self._numbers(batch, name) for name in (*TIMES, *TOKENS)}
        requests["ok"] = self._flags(batch, "ok", 1.0)
        requests["measured"] = self._flags(batch, "measured", 0.0)
        good = self._good(requests)
        self.aside.rows += size
        code, values = np.zeros(size, np.int64), [()]
        for name in self.keys:
            encoded = batch.column(name)
            if not pa.types.is_dictionary(encoded.type):
                encoded = encoded.dictionary_encode()
            entries = [*encoded.dictionary.to_pylist(), None]
            code = code * len(entries) + encoded.indices.fill_null(len(entries) - 1).to_numpy(zero_copy_only=False)
            code, used = _renumber(code)
            values = [(*values[old // len(entries)], _plain(name, entries[old % len(entries)])) for old in used]
        for index, key in enumerate(values):
            mine = good & (code == index) if len(values) > 1 else good
            if mine.any():
                given = zip(self.keys, key, strict=True)
                identity = tuple((name, value) for name, value in given if value is not None)
                yield identity, {name: array[mine] for name, array in requests.items()}

    def _numbers(self, batch, name: str) -> np.ndarray:
        import pyarrow as pa

        if name not in batch.schema.names:
            return np.full(batch.num_rows, math.nan)
        column = batch.column(name)
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
            allowed = "numbers, times in seconds"
            raise Problem("not a column of numbers", self.source.file, 1, name, str(column.type), allowed).error()
        return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)

    def _flags(self, batch, name: str, default: float) -> np.ndarray:
        import pyarrow as pa

        if name not in batch.schema.names:
            return np.full(batch.num_rows, default)
        column = batch.column(name)
        if pa.types.is_boolean(column.type) or pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
            return np.where(np.isnan(values), default, values)
        encoded = column.cast(pa.string()).dictionary_encode(null_encoding="encode")
        words = [str(word).strip().lower() for word in encoded.dictionary.to_pylist()]
        told = np.array(
            [default if word in ("none", "") else float(word in ("true", "1", "yes", "ok")) for word in words]
        )
        return told[encoded.indices.to_numpy(zero_copy_only=False)]

    def _good(self, requests: dict[str, np.ndarray]) -> np.ndarray:
        """Rows whose events can have happened; the others are counted by what is wrong with them."""
        arrival, first, done = (requests[name] for name in ("arrival_time", "first_token_time", "completion_time"))
        ok = requests["ok"] > 0
        with np.errstate(all="ignore"):
            tokens_bad = np.zeros(len(ok), bool)
            for name in TOKENS:
                tokens_bad |= (requests[name] < 0) | np.isinf(requests[name]) | (requests[name] > 1e9)
            span = done - arrival
            checks = {
                "no finite arrival_time in seconds": ~(np.abs(arrival) <= LATEST),
                "no finite completion_time in seconds": ok & ~(np.abs(done) <= LATEST),
                "completion before arrival": ok & (span < -CLOCK_SLACK),
                "a request longer than a day (times are in seconds)": ok & (span > 86400.0),
                "first token before arrival or after completion": ok
                & ((first < arrival - CLOCK_SLACK) | (first > done + CLOCK_SLACK) | np.isinf(first)),
                "no prompt_tokens or output_tokens": ok
                & (np.isnan(requests["prompt_tokens"]) | ~(requests["output_tokens"] > 0)),
                "token counts below 0 or above 1e9": tokens_bad,
            }
        good = np.ones(len(ok), bool)
        for what, wrong in checks.items():
            wrong = wrong & good
            if wrong.any():
                row = self.first_row + self.aside.rows + int(np.argmax(wrong)) + 1
                self.aside.merge(SetAside(0, {what: (int(wrong.sum()), row)}))
                good &= ~wrong
        return good

    def warnings(self) -> list[str]:
        """What the last reading set aside, one line each. Raises `TraceError` beyond 1 % of the rows."""
        if self.aside.rows == 0:
            raise Problem("the table has no rows", self.source.file, allowed="at least one row").error()
        return self.aside.warnings(self.source.file)


def _renumber(code: np.ndarray) -> tuple[np.ndarray, list[int]]:
    used, code = np.unique(code, return_inverse=True)
    return code, [int(entry) for entry in used]


def _plain(name: str, value: Any) -> Any:
    """A value of a key column: what is empty is None, and a number written as text, as in CSV, is a number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        return value
    text = value.strip()
    return float(text) if name in NUMBER_NAMES and _DECIMAL.fullmatch(text) else text or None


def _parquet_format(source: Source, checked: bool) -> Any:
    """Parquet whose texts stay in dictionaries: a small file may repeat a long text very often."""
    import pyarrow as pa
    import pyarrow.dataset
    import pyarrow.parquet

    with _AsTraceError(source):
        schema = pyarrow.parquet.read_schema(source.path, filesystem=source.arrow_filesystem)
        if not checked:
            metadata = pyarrow.parquet.read_metadata(source.path, filesystem=source.arrow_filesystem)
            check_parquet(metadata, source.file, source.size, {*TIMES, *TOKENS, *KEYS, "ok", "measured"})
        texts = {
            field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
        }
        return pyarrow.dataset.ParquetFileFormat(dictionary_columns=texts & set(KEYS))


def _check_nesting(source: Source) -> None:
    """Raise `TraceError` for JSON lines nested so deeply that the table library would overrun its stack."""
    with source.open() as lines:
        for row, line in enumerate(lines, start=1):
            if line.count(b"[") + line.count(b"{") > _MOST_NESTED:
                try:
                    parse_json(line.decode("utf-8", "replace"), source.file)
                except TraceError as error:
                    raise Problem(str(error).removeprefix(f"{source.file}: "), source.file, row).error() from None


class _AsTraceError:
    """Errors of the table library as `TraceError`."""

    def __init__(self, source: Source):
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        import pyarrow as pa

        if isinstance(error, (pa.ArrowException, UnicodeDecodeError, OSError)) and not isinstance(error, TraceError):
            text = " ".join(str(error).split())[:200]
            raise Problem(f"the request table cannot be read: {text}", self.source.file).error() from None
