"""What is wrong with a trace: problems as values, gathered, and raised once as one error."""

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..results import TraceError

LISTED = 10  # problems spelled out in one message; the rest are counted


@dataclass(frozen=True)
class Problem:
    """One thing wrong at one place. `row` counts as a spreadsheet does (the header is row 1); it is None when the
    whole table is at fault. `got` is the value as found, shortened, `allowed` what would have been right, `advice` the
    mend."""

    message: str = ""
    file: str | None = None
    row: int | None = None
    column: str | None = None
    got: Any = None
    allowed: str | None = None
    advice: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "got", shorten(self.got))

    def __deepcopy__(self, memo: Any) -> "Problem":
        """Itself: pandas copies the problems of a frame with each of its columns."""
        return self

    def error(self) -> TraceError:
        """The problem as a `TraceError`."""
        return TraceError(
            self.message,
            file=self.file,
            row=self.row,
            column=self.column,
            got=self.got,
            allowed=self.allowed,
            advice=self.advice,
        )

    def line(self, with_file: bool = True) -> str:
        """The problem in one line, as in the error's message."""
        return str((self if with_file else Problem(**{**self.__dict__, "file": None})).error())


class TraceProblems(TraceError):
    """Several problems of one reading. `problems` has all of them; file, row, column, got, allowed and advice are
    those of the first."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        first = self.problems[0]
        files = {problem.file for problem in self.problems}
        one_file = len(files) == 1
        lines = [f"  {problem.line(with_file=not one_file)}" for problem in self.problems[:LISTED]]
        if len(self.problems) > LISTED:
            lines.append(f"  ... and {len(self.problems) - LISTED} more")
        head = f"{first.file}: " if one_file and first.file is not None else ""
        super().__init__("\n".join([f"{head}{len(self.problems)} problems", *lines]))
        self.file, self.row, self.column = first.file, first.row, first.column
        self.got, self.allowed, self.advice = first.got, first.allowed, first.advice


def error_from(problems: Sequence[Problem]) -> TraceError:
    """The error to raise: the one problem as itself, or all of them in one message."""
    return problems[0].error() if len(problems) == 1 else TraceProblems(problems)


def shorten(value: Any) -> Any:
    """A value fit for a message: plain numbers stay, long texts are cut."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return value if len(value) <= 60 else value[:57] + "..."
    if value is None or isinstance(value, (bool, int, float)):
        return value if not isinstance(value, int) or abs(value) < 10**30 else "an integer of more than 30 digits"
    try:
        text = str(value)
    except (RecursionError, ValueError):  # nested deeply, or an integer of thousands of digits
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 60 else text[:57] + "..."


def repeated(names: Iterable[str]) -> list[str]:
    """The names that come more than once, sorted.

    >>> repeated(["b", "a", "c", "b", "a"])
    ['a', 'b']
    """
    return sorted(name for name, count in Counter(names).items() if count > 1)


def near(name: str, among: Iterable[str]) -> str | None:
    """``did you mean 'ttft_mean'?`` when `among` has something close to `name`, else None.

    >>> near("ttft_avg", ["ttft_mean", "e2e_mean"])
    "did you mean 'ttft_mean'?"
    """
    found = difflib.get_close_matches(str(name).strip().lower()[:80], list(among), n=1, cutoff=0.6)
    return f"did you mean '{found[0]}'?" if found else None
