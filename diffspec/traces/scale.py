"""Request logs in many files, here or in object storage, read part by part as one table.

A part is some row groups of a Parquet file, some lines of a CSV file, or one JSON lines file; small ones share a
partition. A CSV file with empty lines or line ends within quotes is one part. Workers read
partitions and send back what `requests` merges: extents of runs, then sums, sketches and gaps by window. Rows of one
run may lie in any files, in any order. Who works is a `Runner`: this process (`in_turn`), or a cluster (`dask_runner`).
"""

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..results import InputError, TraceError
from .formats import FORMATS, recognise, unrecognised
from .gather import Gathered
from .problems import LISTED, Problem, error_from
from .request_rows import RequestRows
from .requests import arrivals_of, extents_of, summarise, windows_of
from .source import Source
from .table import file_name

PART_ROWS = 1 << 20
"""Rows of a partition, about: a few seconds of work."""
MOST_FILES = 64
"""Files of a partition."""
_ROW_BYTES = 100
"""Of a row of JSON, at least: it does not tell how many it has."""
_PIECE = 1 << 22
"""Bytes of CSV in which lines are counted at a time."""
_STAGES = {extents_of: "extents of runs", windows_of: "windows", arrivals_of: "order of arrivals"}
_FORMAT = next(item for item in FORMATS if item.gives == "requests")

Runner = Callable[..., Iterator[tuple[int, Any]]]
"""``run(function, items, *shared)`` gives (place of the item, ``function(item, *shared)``) of all items, in any order.
Functions and arguments can be pickled."""


def in_turn(function: Callable[..., Any], items: Sequence[Any], *shared: Any) -> Iterator[tuple[int, Any]]:
    """The `Runner` that works in this process, one item after another.

    >>> list(in_turn(pow, [2, 3], 2))
    [(0, 4), (1, 9)]
    """
    for place, item in enumerate(items):
        yield place, function(item, *shared)


def gather_logs(
    paths: Sequence[str | Path], run: Runner = in_turn, report: Callable[[str, float], None] | None = None
) -> tuple[Gathered, int]:
    """One request table from files, folders, patterns (``logs/*.parquet``) and addresses that `fsspec` knows
    (``s3://bucket/logs``), summarised, and the number of its partitions. `report(what, share)` hears of progress.

    The same operating points as one file of all rows in order of arrival would give, to rounding; percentiles of more
    than `sketch.EXACT` requests within `sketch.RELATIVE_ERROR`. In folders, files that are no request table are left
    out with a warning; any other that cannot be read is named in the `TraceError` that is raised."""
    heard = report or (lambda what, share: None)
    gathered = Gathered()
    files = locate(paths)
    parts, problems, skipped = [], [], []
    batches = [files[start : start + MOST_FILES] for start in range(0, len(files), MOST_FILES)]
    told: dict[int, list[Any]] = {}
    for done, (place, found) in enumerate(run(_looked_into, batches), start=1):
        told[place] = found
        heard("recognising files", done / len(batches))
    for file, found in zip(files, (found for place in sorted(told) for found in told[place]), strict=True):
        if isinstance(found, Problem):
            problems.append(found)
        elif isinstance(found, str):
            skipped.append(found)
        else:
            parts += found
            gathered.recognised.append(
                {"file": file.file, "format": _FORMAT.name, "gives": _FORMAT.gives, "handled": _FORMAT.handled}
            )
    if problems:
        raise error_from(problems)
    name = file_name(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    if not parts:
        raise Problem(
            "no request table among these files", name, got=", ".join(Path(file).name for file in skipped) or None
        ).error()
    if skipped:
        more = f" and {len(skipped) - LISTED} more" if len(skipped) > LISTED else ""
        gathered.warnings.append(f"skipped, no request tables: {', '.join(skipped[:LISTED])}{more}")
    partitions = _partitions(parts)
    gathered.points.append((name, summarise(_Partitions(partitions, run, heard), name)))
    return gathered, len(partitions)


@dataclass(frozen=True)
class Located:
    """One file: its `path` on `filesystem` (None: here), the name `file` in messages, and whether it was `listed` in a
    folder and not asked for itself."""

    path: str
    filesystem: Any
    file: str
    listed: bool = False

    def source(self) -> Source:
        """The file, to be read."""
        return Source(self.path, self.filesystem, self.file)


def locate(paths: Sequence[str | Path]) -> list[Located]:
    """The files that names, folders, patterns and addresses stand for, each once. Raises `InputError` for an address
    of an unknown kind, and `TraceError` for a pattern or folder without any."""
    found: dict[str, Located] = {}
    for text in map(str, paths):
        listed = _stored(text) if "://" in text else _here(text)
        if not listed:
            raise Problem("no file there", file_name(text), advice="check the path").error()
        for item in listed:
            found.setdefault(item.file, item)
    return list(found.values())


def _here(text: str) -> list[Located]:
    if Path(text).is_dir():
        names = [path for path in sorted(Path(text).rglob("*")) if path.is_file()]
        hidden = [any(part.startswith(".") for part in path.relative_to(text).parts) for path in names]
        return [
            Located(str(path), None, file_name(path), True) for path, no in zip(names, hidden, strict=True) if not no
        ]
    if glob.has_magic(text) and not Path(text).exists():
        return [Located(path, None, file_name(path)) for path in sorted(glob.glob(text, recursive=True)) if _file(path)]
    return [Located(text, None, file_name(text))]


def _file(path: str) -> bool:
    return not Path(path).is_dir()


def _stored(text: str) -> list[Located]:
    from fsspec.core import url_to_fs

    def located(path: str, listed: bool = False) -> Located:
        return Located(path, filesystem, file_name(filesystem.unstrip_protocol(path)), listed)

    try:
        filesystem, path = url_to_fs(text)
        if glob.has_magic(path) and not filesystem.exists(path):
            return [located(name) for name in sorted(filesystem.glob(path)) if not filesystem.isdir(name)]
        if filesystem.isdir(path):
            names = [name for name in sorted(filesystem.find(path)) if not Path(name).name.startswith(".")]
            return [located(name, True) for name in names]
        return [located(path)]
    except ImportError as error:  # the storage's own package
        raise InputError(f"{text}: {error}") from None
    except Exception as error:  # an unknown protocol, or no access: each storage raises its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{text}: cannot be opened: {reason}") from None


@dataclass(frozen=True)
class Part:
    """Rows that are read together: of `file` the row `groups` or the bytes of `span` (both None: all), the first of
    them row `first_row` (from 0), about `rows` in all."""

    file: Located
    groups: tuple[int, ...] | None
    first_row: int
    rows: int
    span: tuple[int, int] | None = None

    def reader(self) -> RequestRows:
        """Reads them."""
        return RequestRows(self.file.source(), self.groups, self.first_row, checked=True, span=self.span)


def _looked_into(files: Sequence[Located]) -> list[list[Part] | Problem | str]:
    """Of each file its parts, what is wrong with it, or, listed in a folder and no request table, its name."""
    return [_parts_of(file) for file in files]


def _parts_of(file: Located) -> list[Part] | Problem | str:
    source = file.source()
    try:
        found = recognise(source)
    except TraceError as error:
        kept = file.listed and not file.path.lower().endswith((".json", ".jsonl"))
        return str(error) if kept else Problem(str(error))
    if found is not None and found.gives != "requests":
        advice = "a cluster reads request tables; diffspec import without --engine reads the others"
        return file.file if file.listed else Problem(f"{found.name}, no request table", file.file, advice=advice)
    if found is None:
        return file.file if file.listed else Problem(str(unrecognised(source)))
    try:
        RequestRows(source)
        if source.kind == "parquet":
            return _row_groups(file, source)
        lines = _lines(file, source) if source.kind == "text" else None
        return lines or [Part(file, None, 0, source.size // _ROW_BYTES)]
    except TraceError as error:
        return Problem(str(error))


def _lines(file: Located, source: Source) -> list[Part] | None:
    """Parts of a CSV file that end where lines end; None where a line may be no row: for a line with an odd number of
    quotes, as where a cell holds a line end, empty lines, other line ends and very long lines."""
    with source.open() as opened:
        header = opened.readline(_PIECE)
        if header.count(b'"') % 2 or not header.lstrip(b"\xef\xbb\xbf").strip():
            return None
        parts: list[Part] = []
        start = at = len(header)
        first, rows, last = 0, 0, header
        while piece := opened.read(_PIECE):
            piece += b"" if piece.endswith(b"\n") else opened.readline(_PIECE)
            found = _rows_in(piece) if last.endswith(b"\n") else None
            if found is None:
                return None
            at, rows, last = at + len(piece), rows + found, piece
            if rows >= PART_ROWS:
                parts.append(Part(file, None, first, rows, (start, at)))
                start, first, rows = at, first + rows, 0
    if rows:
        parts.append(Part(file, None, first, rows, (start, at)))
    return parts


def _rows_in(lines: bytes) -> int | None:
    """How many rows some lines of CSV are; None where a line may be none (`_lines`)."""
    signs = np.frombuffer(lines, np.uint8)
    ends, returns = signs == ord("\n"), signs == ord("\r")
    starts = np.append(True, ends[:-1])
    if (starts & (ends | returns)).any() or returns[-1] or (returns[:-1] & ~ends[1:]).any():
        return None
    if b'"' in lines:
        quotes = np.flatnonzero(signs == ord('"'))
        if (np.append(np.searchsorted(quotes, np.flatnonzero(ends)), quotes.size) % 2).any():
            return None
    return int(np.count_nonzero(ends)) + (not ends[-1])


def _row_groups(file: Located, source: Source) -> list[Part]:
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(source.path, filesystem=source.arrow_filesystem)
    parts: list[Part] = []
    groups: list[int] = []
    first, rows = 0, 0
    for number in range(metadata.num_row_groups):
        size = metadata.row_group(number).num_rows
        if groups and rows + size > PART_ROWS:
            parts.append(Part(file, tuple(groups), first, rows))
            groups, first, rows = [], first + rows, 0
        groups.append(number)
        rows += size
    return [*parts, Part(file, tuple(groups), first, rows)]


def _partitions(parts: Iterable[Part]) -> list[tuple[Part, ...]]:
    """Parts in their order, small ones together."""
    partitions: list[list[Part]] = []
    rows = 0
    for part in parts:
        if not partitions or rows + part.rows > PART_ROWS or len(partitions[-1]) >= MOST_FILES:
            partitions.append([])
            rows = 0
        partitions[-1].append(part)
        rows += part.rows
    return [tuple(partition) for partition in partitions]


@dataclass(frozen=True)
class _Partitions:
    """A table in partitions, read by a runner; the `requests.Parts` of many files."""

    partitions: list[tuple[Part, ...]]
    run: Runner
    report: Callable[[str, float], None]
    mergeable: bool = True

    @property
    def count(self) -> int:
        return len(self.partitions)

    def apply(
        self, function: Callable[..., Any], *shared: Any, only: Sequence[int] | None = None
    ) -> Iterable[tuple[int, Any]]:
        chosen = range(self.count) if only is None else only
        items = [self.partitions[place] for place in chosen]
        problems: list[Problem] = []
        for done, (place, found) in enumerate(self.run(partial(_read, function), items, *shared), start=1):
            self.report(f"{_STAGES[function]}: {done} of {len(items)} partitions", done / len(items))
            if isinstance(found, _Failed):
                problems += found.problems
            else:
                yield chosen[place], found
        if problems:
            raise error_from(problems)


@dataclass(frozen=True)
class _Failed:
    """What is wrong with the files of a partition."""

    problems: list[Problem]


def _read(function: Callable[..., Any], partition: Sequence[Part], *shared: Any) -> Any:
    """``function(readers, *shared)``, or what is wrong with each file of the partition."""
    try:
        return function((part.reader() for part in partition), *shared)
    except TraceError as error:
        problems = []
        for part in partition:
            try:
                for _ in part.reader().batches():
                    pass
            except TraceError as found:
                problems.append(Problem(str(found)))
        return _Failed(problems or [Problem(str(error))])
