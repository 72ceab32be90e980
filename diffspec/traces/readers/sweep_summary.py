"""Read `summary.csv` of `vllm bench sweep`: pandas' table of all runs, a row a run, with the keys of their JSON.

Every row becomes a record again and goes through the reader of `vllm bench serve`, overrides and all. Traps: a column
that some runs have not makes whole numbers into 8.0 in all of them; empty cells are absent keys; lists and objects are
written as Python prints them, not as JSON.
"""

import ast
import csv
import io
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from ..json_text import loads
from ..problems import Problem, repeated
from ..schema import TEXT_NAMES
from ..source import Source
from .bench_record import is_bench_record, read_record
from .rows import Result, Rows

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_TEXTS = {*TEXT_NAMES, "date", "label", "model_id", "tokenizer_id", "backend", "endpoint_type"}
_LONGEST_CELL = 10_000_000
"""Longest cell [characters]: a list with a latency of every request."""
_LONGEST_LITERAL = 1_000_000
"""Longest cell [characters] of anything else: Python's own parser takes several hundred bytes for each."""


def recognises(source: Source) -> bool:
    """Whether a file is a table of results: named by the keys that the client writes, `request_rate` among them."""
    return "request_rate" in source.columns and is_bench_record(dict.fromkeys(source.columns))


def read_sweep_summary(source: Source) -> pd.DataFrame:
    """The runs as a raw frame (see `formats.Format`); `source_row` is the line, the header being 1."""
    rows = Rows()
    rows.add(source.file, results(source))
    if not rows.rows:
        raise Problem("the table has no rows", source.file, allowed="at least one run").error()
    return rows.frame()


def results(source: Source) -> Iterable[Result]:
    """The runs for `Rows.add`. Raises `TraceError` for what is no CSV or has a column twice."""
    text = source.text
    usual = csv.field_size_limit(_LONGEST_CELL)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise Problem(f"not valid CSV: {error}", source.file, advice="the file may be cut off").error() from None
    finally:
        csv.field_size_limit(usual)
    header = [cell.strip() for cell in lines[0]]
    twice = repeated(name for name in header if name)
    if twice:
        raise Problem("duplicate column names", source.file, 1, twice[0], ", ".join(twice), "each name once").error()
    stem = Path(source.file).stem
    for number, cells in enumerate(lines[1:], start=2):
        if len(cells) != len(header):
            if any(cell.strip() for cell in cells):
                got, allowed = len(cells), f"{len(header)}, as in the header"
                advice = "the file may be cut off"
                yield number, {}, [], [Problem("wrong number of cells", got=got, allowed=allowed, advice=advice)]
            continue
        record = {name: value(name, cell) for name, cell in zip(header, cells, strict=True) if name and cell.strip()}
        yield number, *read_record(record, f"{stem}#{number - 1}")


def value(name: str, cell: str) -> Any:
    """What a cell of the table was before pandas wrote it.

    >>> value("completed", "8.0"), value("request_rate", "inf"), value("label", "8"), value("x", "{'k': [1, None]}")
    (8, 'inf', '8', {'k': [1, None]})
    """
    cell = cell.strip()
    if name in _TEXTS:
        return cell
    if _NUMBER.fullmatch(cell):
        number = float(cell)
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    if cell.lower() in ("inf", "nan", "true", "false"):
        return {"inf": "inf", "nan": math.nan, "true": True, "false": False}[cell.lower()]
    if cell.startswith(("[", "{", "(")) and "\\u" not in cell.lower():  # no half of a surrogate pair
        try:
            return loads(cell)  # lists of numbers, above all
        except (ValueError, RecursionError):
            pass
        try:
            with warnings.catch_warnings(action="ignore"):  # of the parser, about odd literals
                return ast.literal_eval(cell) if len(cell) <= _LONGEST_LITERAL else cell
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            return cell
    return cell
