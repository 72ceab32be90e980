"""Read an operating-point table, CSV or Parquet, told apart by content.

Nothing is interpreted here: cells stay as they were found (CSV cells are text), and `validate` turns them into the
canonical frame. What is wrong with single rows while reading (too few or too many cells) travels in
``frame.attrs["problems"]`` so that `validate` reports it with the rest.
"""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from ..results import TraceError
from .parquet_size import check_parquet
from .problems import Problem, repeated
from .schema import NAMES, RESERVED
from .validation import validate

__all__ = ["file_name", "read_bytes", "read_table", "table_from_bytes", "validate"]

_MAGIC = (
    (b"PK\x03\x04", "a zip archive or Excel workbook", "export the sheet as CSV (UTF-8)"),
    (b"\x1f\x8b", "a gzip file", "unpack it first"),
    (b"BZh", "a bzip2 file", "unpack it first"),
    (b"\xfd7zXZ", "an xz file", "unpack it first"),
    (b"%PDF", "a PDF document", "export the table as CSV"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "run: git lfs pull"),
)
MOST_CELLS, MOST_COLUMNS = 5_000_000, 1000
"""Largest table of operating points, a row counting as all columns of the table at least."""


def file_name(path: str | Path) -> str:
    """The name of a file as text that can be written and printed: what is no Unicode in it becomes a question mark.

    >>> file_name(Path("run\\udcff.json"))
    'run?.json'
    """
    return str(path).encode("utf-8", "replace").decode("utf-8")


def read_bytes(path: str | Path, at_most: int = -1) -> bytes:
    """The bytes of a file, or the first `at_most`. Raises `TraceError` when it is missing, empty, a folder or
    unreadable."""
    file = file_name(path)
    try:
        if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
            advice = "write it to a file first: it is read more than once"
            raise Problem("no regular file but a pipe or a device", file=file, advice=advice).error()
        with Path(path).open("rb") as opened:
            data = opened.read(at_most)
    except FileNotFoundError:
        raise Problem("no such file", file=file, advice="check the path").error() from None
    except IsADirectoryError:
        raise Problem("a folder where a file is needed", file=file).error() from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Problem(f"cannot be read: {reason}", file=file).error() from None
    if not data.strip():
        raise Problem("the file is empty", file=file, allowed="a header line and at least one row").error()
    return data


def read_table(path: str | Path) -> pd.DataFrame:
    """Read one CSV or Parquet file of operating points, without interpreting its cells.

    Adds `source_file` and `source_row` (the header is row 1). Hand the frame to `validate` for the canonical one.
    CSV may be separated by commas, tabs or semicolons and must be UTF-8. Raises `TraceError` for a file that is
    missing, empty, cut off or no table (binary, HTML, JSON, duplicate column names).
    """
    return table_from_bytes(read_bytes(path), file_name(path))


def table_from_bytes(data: bytes, file: str) -> pd.DataFrame:
    """`read_table` for bytes already in memory; `file` is the name used in errors."""
    for magic, what, advice in _MAGIC:
        if data.startswith(magic):
            raise Problem(f"this is {what}, not a table", file=file, advice=advice).error()
    if data.startswith(b"PAR1"):
        return _parquet(data, file)
    return _csv(decode(data, file), file)


def decode(data: bytes, file: str) -> str:
    """Text of a UTF-8 file, with or without a byte-order mark. Raises `TraceError` for anything else."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Problem("the text is UTF-16", file=file, allowed="UTF-8", advice="save it again as UTF-8").error()
    if b"\x00" in data:
        raise Problem("binary data, not a table", file=file, allowed="CSV, Parquet or benchmark JSON").error()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Problem(
            f"line {line} is not UTF-8 text (byte 0x{data[error.start]:02x})",
            file=file,
            allowed="CSV in UTF-8, Parquet or benchmark JSON",
            advice="save it again as UTF-8",
        ).error() from None


def _parquet(data: bytes, file: str) -> pd.DataFrame:
    import pyarrow
    import pyarrow.parquet

    if len(data) < 12 or not data.endswith(b"PAR1"):
        raise Problem("the Parquet file is cut off", file=file, advice="copy or write it again").error()
    try:
        opened, held, batches = pyarrow.parquet.ParquetFile(io.BytesIO(data)), 0, []
        check_size(opened.metadata.num_rows * max(opened.metadata.num_columns, len(NAMES)), file)
        check_size(check_parquet(opened.metadata, file, len(data)), file)
        _check_header([str(name).strip() for name in opened.schema_arrow.names], file)
        for batch in opened.iter_batches(batch_size=64):  # a small file may hold very much
            plain = [_decoded(column) for column in batch.columns]
            held += sum(column.nbytes for column in plain)
            check_size(held // 40, file)
            batches.append(pyarrow.record_batch(plain, names=batch.schema.names))
        empty = [_decoded(pyarrow.array([], field.type)) for field in opened.schema_arrow]
        batches.append(pyarrow.record_batch(empty, names=opened.schema_arrow.names))
        frame = pyarrow.Table.from_batches(batches).to_pandas()
        frame = frame.loc[:, [not str(name).startswith("__index_level_") for name in frame.columns]]
    except TraceError:
        raise
    except Exception as error:  # pyarrow raises many kinds, some of them OSError
        raise Problem(f"the Parquet file cannot be read: {str(error)[:200]}", file=file).error() from None
    frame = frame.reset_index(drop=True)
    names = [str(name).replace("\x00", "").strip() for name in frame.columns]
    frame.columns = [name or f"unnamed_{place}" for place, name in enumerate(names, start=1)]
    _check_header(list(frame.columns), file)
    return _sourced(frame, file, [position + 2 for position in range(len(frame))], [])


def _decoded(column: Any) -> Any:
    """A column without its dictionary. Raises `ValueError` when it holds a text longer than a cell of CSV may be."""
    import pyarrow
    import pyarrow.compute

    values = column.dictionary if pyarrow.types.is_dictionary(column.type) else column
    if pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type):
        longest = pyarrow.compute.call_function("max", [pyarrow.compute.call_function("binary_length", [values])])
        if (longest.as_py() or 0) > csv.field_size_limit():
            raise ValueError(f"a text of {longest} bytes; up to {csv.field_size_limit()} are read")
    return column.dictionary_decode() if values is not column else column


def _csv(text: str, file: str) -> pd.DataFrame:
    head = text[: 1 << 16].lstrip("\r\n")
    start = head.lstrip()[:200].lower()
    if start.startswith("<"):
        raise Problem("this is a web page or XML, not a table", file=file, advice="download the raw file").error()
    if start.startswith(("{", "[")):
        raise Problem("this is JSON, not a table", file=file, advice="read_trace detects benchmark JSON").error()
    delimiter = max(",\t;", key=head.split("\n", 1)[0].count)
    header: list[str] = []
    numbered: list[tuple[int, list[str]]] = []
    held = 0
    try:
        for row, cells in enumerate(csv.reader(csv_lines(text), delimiter=delimiter, strict=True), start=1):
            if not any(cell.strip() for cell in cells):
                continue
            if not numbered:
                header = _header(cells, file)
            numbered.append((row, cells))
            held += max(len(cells), len(NAMES))
            check_size(held, file)
    except csv.Error as error:
        reason = "a quoted cell is never closed" if "unexpected end" in str(error) else str(error)
        raise Problem(f"not valid CSV: {reason}", file=file, advice="the file may be cut off").error() from None
    if not numbered:
        raise Problem("the file is empty", file=file, allowed="a header line and at least one row").error()
    width, rows, body, problems = len(header), [], [], []
    for row, cells in numbered[1:]:
        spare = [cell for cell in cells[width:] if cell.strip()]
        if len(cells) < width or spare:
            last = row == numbered[-1][0]
            advice = "the file may be cut off" if last and not spare else "quote cells that contain the separator"
            problems.append(
                Problem("wrong number of cells", file, row, None, len(cells), f"{width}, as in the header", advice)
            )
        rows.append(row)
        body.append((cells + [""] * width)[:width])
    names = [name or f"unnamed_{position}" for position, name in enumerate(header, start=1)]
    return _sourced(pd.DataFrame(body, columns=names, dtype=object), file, rows, problems)


def csv_lines(text: str) -> Iterator[str]:
    """The lines of a text with their ends, as `csv.reader` takes them, one at a time: `io.StringIO` holds a text in
    four bytes a character."""
    return (found.group() for found in re.finditer(r"[^\r\n]*+(?:\r\n?|\n)|[^\r\n]++", text))


def check_size(cells: int, file: str) -> None:
    """Raise `TraceError` when a table of operating points has too many cells."""
    if cells > MOST_CELLS:
        advice = "is every row a run? Of requests give arrival_time and completion_time, and they are streamed"
        raise Problem("too large for operating points", file, allowed=f"{MOST_CELLS} cells", advice=advice).error()


def _header(cells: list[str], file: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    while header and not header[-1]:
        header.pop()
    _check_header(header, file)
    return header


def _check_header(header: list[str], file: str) -> None:
    named = [name for name in header if name]
    if len(named) > MOST_COLUMNS:
        raise Problem("too many columns", file, 1, None, len(named), f"up to {MOST_COLUMNS}").error()
    twice = repeated(named)
    if twice:
        raise Problem(
            "duplicate column names", file=file, row=1, column=twice[0], got=", ".join(twice), allowed="each name once"
        ).error()
    if set(named) & set(NAMES):
        return
    if {"arrival_time", "first_token_time", "completion_time"} & set(named):
        raise Problem(
            "this is a request table (one row a request) without all of its columns",
            file=file,
            row=1,
            got=", ".join(named[:6]),
            allowed="arrival_time, completion_time [s], prompt_tokens, output_tokens",
        ).error()
    raise Problem(
        "no column of the operating-point table in the header",
        file=file,
        row=1,
        got=", ".join(named[:6]),
        allowed="names such as arrival_rate, prompt_length, output_length, draft_length, ttft_mean, itl_mean",
        advice="start from the template; the first line must hold the column names",
    ).error()


def _sourced(frame: pd.DataFrame, file: str, rows: list[int], problems: list[Problem]) -> pd.DataFrame:
    frame = frame.drop(columns=[name for name in RESERVED if name in frame.columns])
    frame["source_file"] = pd.Series([file] * len(frame), dtype=object, index=frame.index)
    frame["source_row"] = pd.Series(rows, dtype="int64", index=frame.index)
    frame.attrs["problems"] = problems
    return frame
