"""Rows that readers of benchmark results make, with their notes and problems, on the way to a raw frame."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from ..problems import Problem
from ..schema import NAMES
from ..table import check_size

Result = tuple[int, dict[str, Any], list[str], list[Problem]]
"""A row's place in its file, its cells, notes for the reader, and what is wrong with it."""


class Rows:
    """Rows of one reading, with the notes and problems of each, on their way to a raw frame (see `formats.Format`)."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.problems: list[Problem] = []

    def add(self, file: str, results: Iterable[Result]) -> None:
        """The rows of one file, each with its place in it, its notes, and its problems. A note that several rows share
        is said once."""
        told: dict[str, list[int]] = {}
        before = len(self.rows)
        for number, row, notes, faults in results:
            self.rows.append({**row, "source_file": file, "source_row": number})
            check_size(len(self.rows) * len(NAMES), file)
            for note in dict.fromkeys(notes):
                told.setdefault(note, []).append(number)
            self.problems += [Problem(**{**fault.__dict__, "file": file, "row": number}) for fault in faults]
        for note, numbers in told.items():
            place = f", row {numbers[0]}" if len(numbers) == 1 else f", {_span(numbers)}"
            place = "" if len(self.rows) == before + 1 else place
            self.warnings.append(f"{file}{place}: {note}")

    def frame(self) -> pd.DataFrame:
        """The raw frame: columns of the table that any row fills, `source_file` and `source_row`."""
        rows = self.rows
        used = [name for name in NAMES if any(name in row for row in rows)]
        data = {name: pd.Series([_plain(row.get(name)) for row in rows], dtype=object) for name in used}
        data["source_file"] = pd.Series([row["source_file"] for row in rows], dtype=object)
        data["source_row"] = pd.Series([row["source_row"] for row in rows], dtype="int64")
        frame = pd.DataFrame(data)
        frame.attrs["warnings"], frame.attrs["problems"] = self.warnings, self.problems
        return frame


def _span(numbers: list[int]) -> str:
    named = ", ".join(map(str, numbers[:8]))
    return f"rows {named}" + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def read_all(
    records: list[tuple[int, Any]],
    file: str,
    recognises: Callable[[Any], bool],
    read: Callable[[dict[str, Any], str], tuple[dict[str, Any], list[str], list[Problem]]],
    what: str,
) -> Iterable[Result]:
    """The rows of a list of records for `Rows.add`; a record that is not one of `what` becomes a problem. A run is
    named after its file and, where that has several, its place in it."""
    stem = run_name(file)
    for number, record in records:
        if recognises(record):
            run = stem if len(records) == 1 else f"{stem}#{number}"
            yield number, *read(record, run)
        else:
            yield number, {}, [], [Problem(f"no result of {what}", got=type(record).__name__)]


def run_name(file: str) -> str:
    """What a run is called after its file; `vllm bench sweep` calls every file run=N, so its folder is named too.

    >>> run_name("runs/k4_r2.json"), run_name("tiny/SERVE--plain-BENCH--c2/run=0.json")
    ('k4_r2', 'SERVE--plain-BENCH--c2/run=0')
    """
    path = Path(file)
    return f"{path.parent.name}/{path.stem}" if path.stem.startswith("run=") and path.parent.name else path.stem
