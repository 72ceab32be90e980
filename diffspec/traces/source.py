"""A file being read: its bytes once, and from them, on demand, text, JSON records, or the names of its columns.

Formats are recognised by content (see `formats`): a recogniser asks a `Source` what it starts with, and a reader takes
the whole. Large tables are never loaded for recognition: Parquet shows its schema, CSV its first line.
"""

import csv
import io
from functools import cached_property
from pathlib import Path
from typing import Any

from ..results import TraceError
from .json_text import parse_json
from .problems import Problem
from .table import decode, file_name, read_bytes

HEAD = 1 << 16
MOST_BYTES = 1 << 30
"""Largest file read whole [B]: text is held once, JSON about five times over."""


class Source:
    """One file. `path`, and `file`, the name used in messages. Raises `TraceError` when it is missing, a folder, empty,
    unreadable, or (read whole) larger than 1 GiB. `filesystem`: where the file is, as `fsspec` gives it, if not here;
    `path` is then the path there."""

    def __init__(self, path: str | Path, filesystem: Any = None, file: str | None = None):
        self.path: Any = Path(path) if filesystem is None else str(path)
        self.filesystem, self.file = filesystem, file_name(path) if file is None else file

    @cached_property
    def head(self) -> bytes:
        """The first 64 KiB."""
        return self._bytes(HEAD)

    @property
    def arrow_filesystem(self) -> Any:
        """Where the file is, for pyarrow; None for here."""
        if self.filesystem is None:
            return None
        import pyarrow.fs

        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self.filesystem))

    @cached_property
    def size(self) -> int:
        """Its length [B]."""
        return self.path.stat().st_size if self.filesystem is None else int(self.filesystem.size(self.path))

    def open(self) -> Any:
        """The file, opened to be read as bytes."""
        return self.path.open("rb") if self.filesystem is None else self.filesystem.open(self.path, "rb")

    def _bytes(self, at_most: int = -1) -> bytes:
        if self.filesystem is None:
            return read_bytes(self.path, at_most)
        try:
            with self.open() as opened:
                data = opened.read(at_most)
        except Exception as error:  # each storage raises its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise Problem(f"cannot be read: {reason}", file=self.file).error() from None
        if not data.strip():
            raise Problem("the file is empty", file=self.file, allowed="a header line and at least one row").error()
        return data

    @cached_property
    def data(self) -> bytes:
        """The whole file."""
        if len(self.head) < HEAD:
            return self.head
        if self.size > MOST_BYTES:
            advice = "write the requests as Parquet or CSV, which are streamed, or split the file"
            raise Problem(
                "the file is too large", self.file, None, None, f"{self.size} bytes", "up to 1 GiB", advice
            ).error()
        return self._bytes()

    @cached_property
    def text(self) -> str:
        """The whole file as UTF-8 text."""
        return decode(self.data, self.file)

    @cached_property
    def kind(self) -> str:
        """ "parquet", "json" (an object, a list, or JSON lines), or "text" (CSV, an exposition, anything else)."""
        if self.head.startswith(b"PAR1"):
            return "parquet"
        return "json" if self.head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[") else "text"

    @cached_property
    def records(self) -> list[tuple[int, Any]]:
        """The values of a JSON file, each with its line (JSON lines), its place in the list (from 1), or 1."""
        return parse_json(self.text, self.file)

    @cached_property
    def first(self) -> Any:
        """The first JSON value: the object, the first of a list, or the first line; None where there is none. Of JSON
        lines only the first is parsed."""
        if self.kind != "json":
            return None
        line = self.head.lstrip(b"\xef\xbb\xbf \t\r\n").split(b"\n", 1)[0].strip()
        if line.startswith(b"{") and line.endswith(b"}"):
            try:
                return parse_json(decode(line, self.file), self.file)[0][1]
            except TraceError:  # the first line of a file that is one indented object
                pass
        return self.records[0][1] if self.records else None

    def forget(self) -> None:
        """Let go of what was read beyond the head: in a folder with many files it adds up."""
        for name in ("data", "text", "records", "first"):
            self.__dict__.pop(name, None)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns: of a Parquet schema or a CSV header (comma, tab or semicolon); () for anything else."""
        if self.kind == "parquet":
            return parquet_columns(self.path, self.file, self.arrow_filesystem)
        if self.kind == "json":
            return ()
        line = self.head.decode("utf-8-sig", "replace").lstrip("\r\n \t").split("\n", 1)[0].rstrip("\r")
        delimiter = max(",\t;", key=line.count)
        try:
            return tuple(cell.strip() for cell in next(csv.reader(io.StringIO(line), delimiter=delimiter), ()))
        except csv.Error:
            return ()


def parquet_columns(path: str | Path, file: str, filesystem: Any = None) -> tuple[str, ...]:
    """Names in the schema of a Parquet file, without reading its rows."""
    import pyarrow.parquet

    try:
        return tuple(str(name).strip() for name in pyarrow.parquet.read_schema(path, filesystem=filesystem).names)
    except Exception as error:  # pyarrow raises many kinds, some of them OSError
        raise Problem(
            f"the Parquet file cannot be read: {str(error)[:200]}", file, advice="the file may be cut off"
        ).error() from None
