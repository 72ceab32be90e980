"""The formats that traces come in, recognised by content, never by a file's name.

`FORMATS` is the list: the first whose `recognises` says yes reads the file. What a file gives differs: operating points
(a row a benchmark run), requests (summarised into operating points), counters of an engine (snapshots, differenced over
a run), acceptance, step times, or arrivals.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .problems import Problem
from .readers import vllm_bench
from .readers.bench_record import is_bench_record
from .schema import NAMES
from .source import Source
from .table import table_from_bytes

GIVES = ("operating points", "requests", "counters", "acceptance", "step times", "arrivals")


@dataclass(frozen=True)
class Format:
    """One format. `name`, as users call it; `gives`, one of `GIVES`; `recognises(source)` by content; `read(source)`:
    for operating points the raw frame that `validate` takes (cells as found, `source_file`, `source_row`, and
    ``frame.attrs["warnings"]`` and ``["problems"]``), for the others what the reader's module says."""

    name: str
    gives: str
    recognises: Callable[[Source], bool]
    read: Callable[[Source], Any]


def _is_table(source: Source) -> bool:
    return bool(set(source.columns) & set(NAMES))


FORMATS: tuple[Format, ...] = (
    Format(
        "vllm bench serve JSON",
        "operating points",
        lambda source: is_bench_record(source.first),
        lambda source: vllm_bench.bench_from_text(source.text, source.file),
    ),
    Format(
        "operating-point table",
        "operating points",
        _is_table,
        lambda source: table_from_bytes(source.data, source.file),
    ),
)


def recognise(source: Source) -> Format | None:
    """The format of a file; None when it is none of `FORMATS`."""
    return next((item for item in FORMATS if item.recognises(source)), None)


def read_source(source: Source) -> tuple[Format, Any]:
    """The format of a file and what its reader makes of it. Raises `TraceError` when no format fits."""
    found = recognise(source)
    if found is None:
        raise unrecognised(source)
    return found, found.read(source)


def unrecognised(source: Source):
    """The error for a file of no known format: what it looks like, and what is understood."""
    if source.kind == "json":
        return vllm_bench.not_a_result(source.records, source.file)
    table_from_bytes(source.data, source.file)  # raises the error that names the likely mistake
    return Problem("a table of no known format", source.file, allowed=_understood()).error()


def _understood() -> str:
    return "one of: " + ", ".join(item.name for item in FORMATS)
