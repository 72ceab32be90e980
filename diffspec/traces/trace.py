"""A trace: the operating points of one or more files as one canonical frame."""

import hashlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..acceptance_curves import conditional_to_tokens_per_step
from ..results import InputError
from .gather import Gathered, gather, refuse_others, set_identity
from .problems import Problem, error_from
from .schema import COLUMNS, NAMES, RESERVED, TEXT_NAMES
from .sheet import check_identity
from .validation import validate
from .where import matches

_LISTS = tuple(item.name for item in COLUMNS if item.dtype == "list")


@dataclass(frozen=True)
class Trace:
    """Operating points that passed validation.

    `frame`, the canonical frame (see `validate`); `warnings`, one line each; `bad_rows`, the rows set aside while
    reading, as they were found, with a column `problem` (None unless asked for); `sources`, the files read;
    `recognised`, the format of each file named, as {"file", "format", "gives", "handled"}.
    """

    frame: pd.DataFrame
    warnings: list[str] = field(default_factory=list)
    bad_rows: pd.DataFrame | None = None
    sources: list[str] = field(default_factory=list)
    recognised: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.frame)

    def by_deployment(self) -> dict[str, "Trace"]:
        """A trace for each deployment, with its rows alone."""
        groups = self.frame.groupby("deployment", sort=False)
        return {str(name): replace(self, frame=rows.reset_index(drop=True), bad_rows=None) for name, rows in groups}

    def digest(self) -> str:
        """SHA-256 over the canonical columns as text, in hex. It does not change with the order of rows or columns,
        the file format, the name of the file, or unknown columns."""
        text = "\x1e".join([",".join(NAMES), *sorted(_row_texts(self.frame))])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def with_acceptance(self, conditional: Sequence[float]) -> "Trace":
        """The trace with the acceptance curve a_1, a_2, ... in the speculative rows that tell no acceptance at all;
        positions beyond the curve repeat its last rate."""
        frame = self.frame.copy()
        lengths = frame["draft_length"].to_numpy(float)
        silent = (lengths > 0) & np.array([cell is None for cell in frame["position_acceptance"]], bool)
        for name in ("tokens_per_step", "acceptance_rate"):
            silent &= np.isnan(frame[name].to_numpy(float))
        rates = tuple(float(rate) for rate in conditional)
        curves, steps = list(frame["position_acceptance"]), frame["tokens_per_step"].to_numpy(float).copy()
        for index in np.flatnonzero(silent):
            length = int(lengths[index])
            curves[index] = (rates + rates[-1:] * length)[:length]
            steps[index] = conditional_to_tokens_per_step(list(curves[index]))
        frame["position_acceptance"], frame["tokens_per_step"] = pd.Series(curves, dtype=object), steps
        text = f"acceptance of {int(silent.sum())} rows that told none taken from the curve"
        return replace(self, frame=frame, warnings=[*self.warnings, text] if silent.any() else self.warnings)

    def where(self, expression: str) -> "Trace":
        """The rows that satisfy an expression such as ``draft_length == 4 and arrival_rate <= 3`` (see `matches`).
        Raises `InputError` when it cannot be read, names no column of the trace, or leaves no row."""
        kept = self.frame.loc[matches(self.frame, expression)].reset_index(drop=True)
        if not len(kept):
            raise InputError(f"filter {expression!r}: none of {len(self.frame)} rows matches")
        return replace(self, frame=kept)


def read_trace(
    paths: Sequence[str | Path] | str | Path,
    *,
    skip_bad_rows: bool = False,
    identity: Mapping[str, Any] | None = None,
) -> Trace:
    """Read operating points from files and folders and join them; formats are detected by content (see `formats`).

    Benchmark results of several tools, tables, request tables (summarised over stationary windows), and scrapes of
    `/metrics` (joined to the benchmark they belong to) are understood. `identity` maps columns of identity, load,
    shape or speculation to values that every row gets. All problems of all files are gathered and raised as one
    `TraceError` (`TraceProblems` when there are several) whose `file`, `row`, `column`, `got`, `allowed` and `advice`
    are those of the first. With `skip_bad_rows`, rows with a problem move to `Trace.bad_rows` instead; problems of a
    whole file, and a trace without a good row, still raise.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given:
        raise InputError("no trace given; name at least one file or folder")
    gathered = gather(given)
    refuse_others(gathered)
    return trace_of(gathered, skip_bad_rows=skip_bad_rows, identity=identity)


def trace_of(gathered: Gathered, *, skip_bad_rows: bool = False, identity: Mapping[str, Any] | None = None) -> Trace:
    """The operating points of what was gathered, validated; see `read_trace`."""
    check_identity(identity or {})
    frames, bad, warnings, sources, problems, refused = [], [], list(gathered.warnings), [], [], []
    for file, raw in gathered.points:
        warnings += set_identity(raw, dict(identity or {}))
        frame, notes, found = validate(raw, file)
        warnings += notes
        sources += list(dict.fromkeys(raw["source_file"])) if len(raw) else [file]
        if skip_bad_rows and all(problem.row is not None for problem in found):
            refused += found
            frame, spoilt = _part(frame, raw, found)
            bad.append(spoilt)
        else:
            problems += found
        frames.append(frame)
    if not any(len(frame) for frame in frames):
        problems = problems or refused
    if problems:
        raise error_from(problems)
    frames = [frame for frame in frames if len(frame)]
    frame = pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0].reset_index(drop=True)
    frame = frame.loc[:, [*(name for name in frame.columns if name not in RESERVED), "source_file", "source_row"]]
    warnings += _twice(frame)
    bad_rows = pd.concat(bad, ignore_index=True) if skip_bad_rows else None
    return Trace(frame, list(dict.fromkeys(warnings)), bad_rows, sources, gathered.recognised)


def _part(frame: pd.DataFrame, raw: pd.DataFrame, problems: list[Problem]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Good rows of the canonical frame, and bad rows as they were found with what is wrong with them."""
    told: dict[tuple, list[str]] = {}
    for problem in problems:
        told.setdefault((problem.file, problem.row), []).append(problem.line(with_file=False))
    places = list(zip(raw["source_file"], raw["source_row"], strict=True))
    good = np.array([place not in told for place in places], bool)
    spoilt = raw.loc[~good].reset_index(drop=True)
    spoilt.attrs = {}
    reasons = ["; ".join(told[place]) for place in places if place in told]
    return frame.loc[good].reset_index(drop=True), spoilt.assign(problem=pd.Series(reasons, dtype=object))


def _twice(frame: pd.DataFrame) -> list[str]:
    """Rows alike in every canonical column are one run read twice."""
    seen: dict[str, int] = {}
    warnings = []
    for index, line in enumerate(_row_texts(frame)):
        first = seen.setdefault(line, index)
        if first != index:
            pair = [f"{frame['source_file'][i]} row {frame['source_row'][i]}" for i in (index, first)]
            warnings.append(f"{pair[0]} repeats {pair[1]} exactly; both are kept")
    return warnings if len(warnings) <= 5 else [*warnings[:5], f"... and {len(warnings) - 5} more repeated rows"]


def to_csv(frame: pd.DataFrame) -> str:
    """A canonical frame as CSV text that `read_table` and `validate` turn back into the same rows.

    Numbers are written so that they come back exactly; columns without any value, `source_file` and
    `source_row` are left out.
    """
    names = [name for name in frame.columns if name not in RESERVED and not _empty(frame[name])]
    return pd.DataFrame({_cell(name): [_cell(cell) for cell in frame[name]] for name in names}, dtype=object).to_csv(
        index=False, lineterminator="\n"
    )


def rows_to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as dicts of columns of the operating-point table as CSV text, in the order of the table; see `to_csv`.

    >>> rows_to_csv([{"concurrency": 4, "position_acceptance": [0.8, 0.7]}])
    'concurrency,position_acceptance\\n4,0.8;0.7\\n'
    """
    names = [name for name in NAMES if any(row.get(name) is not None for row in rows)]
    cells = {name: [tuple(v) if isinstance(v := row.get(name), list) else v for row in rows] for name in names}
    return to_csv(pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in cells.items()}))


def to_parquet(frame: pd.DataFrame) -> bytes:
    """A canonical frame as Parquet that `read_trace` turns back into the same rows; see `to_csv`."""
    texts: Any = {name: str for name in (*TEXT_NAMES, *_LISTS)}  # a run may be called NA
    written = pd.read_csv(io.StringIO(to_csv(frame)), dtype=texts, keep_default_na=False, na_values=[""])
    target = io.BytesIO()
    written.to_parquet(target, index=False)
    return target.getvalue()


def _empty(cells: Iterable) -> bool:
    return all(_cell(cell) == "" for cell in cells)


def _row_texts(frame: pd.DataFrame) -> list[str]:
    columns = [[_cell(cell) for cell in frame[name]] for name in NAMES]
    return ["\x1f".join(cells) for cells in zip(*columns, strict=True)]


def _cell(cell) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, tuple):
        return ";".join(_cell(entry) for entry in cell)
    if isinstance(cell, float):
        cell = float(cell)
        return str(int(cell)) if cell.is_integer() and abs(cell) < 2**53 else repr(cell)
    # What CSV cannot hold, with or without quotes.
    return str(cell).replace("\x00", "").replace("\r\n", "\n").replace("\r", "\n")
