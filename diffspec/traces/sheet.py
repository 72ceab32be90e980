"""A table under examination: its cells as arrays, what is wrong with each, and where."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..results import InputError
from .problems import Problem, near
from .schema import COLUMNS, METHOD_ALIASES, Column

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
Advice = str | Callable[[Any], str | None] | None
LONGEST_TEXT = 100_000
"""Longest text of a cell [characters]: a longer one cannot be read back from CSV."""


class Sheet:
    """Cells of the canonical columns, as float arrays (NaN: missing), text lists or lists of tuples.

    `given[name]` marks the cells that were not empty, `bad[name]` those that carry a problem: later checks skip them.
    `live` marks the rows still examined (rows with a problem from reading are not examined further).
    """

    def __init__(self, frame: pd.DataFrame, file: str | None, live: np.ndarray):
        size = len(frame)
        self.size, self.live = size, live
        self.files = list(frame["source_file"]) if "source_file" in frame.columns else [file] * size
        self.rows = list(frame["source_row"]) if "source_row" in frame.columns else list(range(2, size + 2))
        self.problems: list[Problem] = []
        self.numbers: dict[str, np.ndarray] = {}
        self.texts: dict[str, list[str | None]] = {}
        self.lists: dict[str, list[tuple[float, ...] | None]] = {}
        self.given: dict[str, np.ndarray] = {}
        self.bad = {item.name: np.zeros(size, bool) for item in COLUMNS}
        for item in COLUMNS:
            cells = list(frame[item.name]) if item.name in frame.columns else [None] * size
            self._load(item, cells)

    def _load(self, item: Column, cells: list) -> None:
        name = item.name
        if item.dtype == "text":
            self.texts[name] = [_text(cell) for cell in cells]
            for index, text in enumerate(self.texts[name]):
                if text is not None and len(text) > LONGEST_TEXT:
                    self.flag_one(index, name, "the text is too long", text, f"up to {LONGEST_TEXT} characters")
                    self.texts[name][index] = None
            self.given[name] = np.array([text is not None for text in self.texts[name]], bool)
            if item.choices:
                self._choose(item)
        elif item.dtype == "list":
            self.lists[name] = [self._parse(item, index, cell, parse_list) for index, cell in enumerate(cells)]
            self.given[name] = np.array([value is not None for value in self.lists[name]], bool) | self.bad[name]
        else:
            values = [self._parse(item, index, cell, parse_number) for index, cell in enumerate(cells)]
            self.numbers[name] = np.array([math.nan if value is None else value for value in values], float)
            self.given[name] = ~np.isnan(self.numbers[name]) | self.bad[name]
            self._range(item)

    def _parse(self, item: Column, index: int, cell: Any, parse: Callable) -> Any:
        try:
            value = parse(cell)
        except ValueError as error:
            self.flag_one(index, item.name, got=cell, allowed=item.allowed, advice=str(error) or None)
            return None
        if item.dtype == "list" and value is not None:
            outside = [entry for entry in value if not item.low <= entry <= item.high]
            if outside:
                self.flag_one(index, item.name, got=outside[0], allowed=item.allowed, advice=_advice(item, outside[0]))
                return None
        return value

    def _choose(self, item: Column) -> None:
        for index, text in enumerate(self.texts[item.name]):
            if text is None:
                continue
            word = re.sub(r"[\s\-]+", "_", text.lower())
            word = METHOD_ALIASES.get(word, word) if item.name == "method" else word
            word = "mtp" if item.name == "method" and word.endswith("_mtp") else word
            if word not in item.choices:
                self.flag_one(index, item.name, got=text, allowed=item.allowed, advice=near(word, item.choices))
                word = None
            self.texts[item.name][index] = word

    def _range(self, item: Column) -> None:
        values = self.numbers[item.name]
        low = values <= item.low if item.low_open else values < item.low
        outside = low | (values > item.high)
        self.flag(outside, item.name, allowed=item.allowed, advice=lambda got: _advice(item, got))
        if item.dtype == "integer":
            whole = ~np.isnan(values) & ~outside & (values != np.floor(values))
            self.flag(whole, item.name, allowed=item.allowed, advice="give a whole number")

    def flag(
        self, mask: np.ndarray, name: str, message: str = "", allowed: str | None = None, advice: Advice = None
    ) -> None:
        """A problem in column `name` for every row of `mask`; `got` is the cell, and the cell becomes bad."""
        for index in np.flatnonzero(mask & self.live):
            store = self.numbers.get(name, self.lists.get(name, self.texts.get(name)))
            got = None if store is None else store[index]
            self.flag_one(int(index), name, message, got, allowed, advice(got) if callable(advice) else advice)

    def flag_one(
        self,
        index: int,
        name: str,
        message: str = "",
        got: Any = None,
        allowed: str | None = None,
        advice: str | None = None,
    ) -> None:
        """A problem with one cell."""
        self.bad[name][index] = True
        if self.live[index]:
            place = self.files[index], int(self.rows[index])
            self.problems.append(Problem(message, *place, name, got, allowed, advice))

    def usable(self, *names: str) -> np.ndarray:
        """Rows in which every named cell is given and not bad."""
        mask = self.live.copy()
        for name in names:
            mask &= self.given[name] & ~self.bad[name]
        return mask

    def typical(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """The mean of a latency, else its median [s], and for each row whether it came from the median."""
        mean, median = self.numbers[f"{metric}_mean"].copy(), self.numbers[f"{metric}_p50"].copy()
        mean[self.bad[f"{metric}_mean"]] = math.nan
        median[self.bad[f"{metric}_p50"]] = math.nan
        return np.where(np.isnan(mean), median, mean), np.isnan(mean)


def check_identity(identity: Mapping[str, Any]) -> None:
    """Raise `InputError` unless every name is a column that is set, not measured, and every value one it may hold."""
    allowed = {item.name: item for item in COLUMNS if item.kind != "observed"}
    for name, value in identity.items():
        if name not in allowed:
            hint = near(str(name), allowed) or f"allowed: {', '.join(list(allowed)[:8])}, ..."
            raise InputError(f"identity: unknown column {name!r}; {hint}")
        item = allowed[name]
        good = isinstance(value, (str, int, float)) and not isinstance(value, bool)
        if item.dtype == "text":
            good = good or value is None
        else:
            try:
                parsed = parse_list(value) if item.dtype == "list" else parse_number(value)
            except ValueError:
                parsed, good = None, False
            entries = parsed if isinstance(parsed, tuple) else () if parsed is None else (parsed,)
            good = (good or isinstance(value, list) or value is None) and all(
                item.low <= entry <= item.high for entry in entries
            )
        if not good:
            raise InputError(f"identity: {name}: got {value!r:.60}; allowed: {item.allowed}")


def is_missing(cell: Any) -> bool:
    """Whether a cell is empty: None, NaN, NaT, or blank text. The text "NaN" is not empty."""
    if cell is None or cell is pd.NA or cell is pd.NaT:
        return True
    if isinstance(cell, str):
        return not cell.strip()
    return isinstance(cell, (float, np.floating)) and math.isnan(cell)


def parse_number(cell: Any) -> float | None:
    """A cell as a finite number, None when empty. Raises `ValueError`, whose text is advice, for anything else.

    >>> parse_number(" 1.5e-3 ")
    0.0015
    """
    if is_missing(cell):
        return None
    if isinstance(cell, (bool, np.bool_)):
        raise ValueError("a number is needed, not true or false")
    if not isinstance(cell, str):
        try:
            value = float(cell)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("a finite number is needed") from None
        if not math.isfinite(value):
            raise ValueError("leave the cell empty when the value is missing")
        return value
    text = cell.strip()
    if _NUMBER.fullmatch(text):
        value = float(text)
        if math.isfinite(value):
            return value
        raise ValueError("the number is too large")
    if text.endswith("%"):
        raise ValueError("a fraction is needed: divide the percentage by 100")
    if re.fullmatch(r"[+-]?\d+,\d+", text):
        raise ValueError("write the decimal point as '.', without separators of thousands")
    if re.fullmatch(r"[+-]?[\d.]+\s*[a-zA-Z/]+", text):
        raise ValueError("give the number alone, in the unit of the column")
    raise ValueError("leave the cell empty when the value is missing")


def parse_list(cell: Any) -> tuple[float, ...] | None:
    """A cell such as "0.81;0.74" as a tuple of numbers, None when empty. Raises `ValueError` like `parse_number`.

    >>> parse_list("0.81;0.74")
    (0.81, 0.74)
    """
    if is_missing(cell):
        return None
    if isinstance(cell, str):
        entries: Sequence[Any] = cell.strip().strip("[]()").replace(",", ";").split(";")
    elif isinstance(cell, (list, tuple, np.ndarray)):
        entries = list(cell)
    else:
        entries = [cell]
    values = [parse_number(entry) for entry in entries]
    if any(value is None for value in values):
        raise ValueError("give one number for each position, joined by semicolons")
    return tuple(value for value in values if value is not None) or None


def _text(cell: Any) -> str | None:
    if is_missing(cell):
        return None
    if isinstance(cell, (float, np.floating)) and float(cell).is_integer():
        cell = int(cell)
    return str(cell).strip() or None


def _advice(item: Column, got: Any) -> str | None:
    """What a value outside the range of a column most likely is."""
    if got is None or got <= 0:
        return None
    if item.unit == "1" and item.high == 1.0 and got <= 100:
        return "perhaps a percentage: divide by 100"
    if item.unit == "s" and got > item.high:
        return "perhaps milliseconds: divide by 1000"
    if item.name == "tokens_per_step" and got < 1:
        return "the bonus token counts: add 1 to accepted / drafts"
    return None
