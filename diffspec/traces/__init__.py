"""Traces: benchmark measurements come in, are checked, and leave as one canonical table.

`read_trace` reads files and folders and detects their format by content; `Trace.where` filters rows; `check` reports
what the measurements are good for. Importing this package does not import pandas: names are loaded when first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .problems import Problem, TraceProblems
    from .quality import Finding, QualityReport, check, set_aside_reasons
    from .schema import COLUMNS, Column, template
    from .table import read_table, validate
    from .trace import Trace, read_trace, rows_to_csv, to_csv, to_parquet
    from .where import matches

__all__ = [
    "COLUMNS",
    "Column",
    "Finding",
    "Problem",
    "QualityReport",
    "Trace",
    "TraceProblems",
    "check",
    "matches",
    "read_table",
    "read_trace",
    "rows_to_csv",
    "set_aside_reasons",
    "template",
    "to_csv",
    "to_parquet",
    "validate",
]

_HOMES = {
    "problems": ("Problem", "TraceProblems"),
    "quality": ("Finding", "QualityReport", "check", "set_aside_reasons"),
    "schema": ("COLUMNS", "Column", "template"),
    "table": ("read_table", "validate"),
    "trace": ("Trace", "read_trace", "rows_to_csv", "to_csv", "to_parquet"),
    "where": ("matches",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
