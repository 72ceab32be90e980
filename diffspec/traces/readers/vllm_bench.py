"""Read the JSON that `vllm bench serve` writes: one object, JSON lines (`--append-result`), or a list.

Milliseconds become seconds, the engine's marginal acceptance per position becomes conditional acceptance, and an
infinite request rate with a cap on concurrency becomes a closed loop. Metadata (`--metadata KEY=VALUE`) and sweep
overrides with the name of a column of the operating-point table fill that column.
"""

from typing import Any

import pandas as pd

from ..source import Source
from .bench_record import is_bench_record, is_seconds_record, read_record, read_seconds_record
from .rows import Rows, read_all

WHAT = "vllm bench serve"


def read_bench(source: Source) -> pd.DataFrame:
    """The results of `vllm bench serve` in a file as a raw frame (see `formats.Format`)."""
    return _frame(source.records, source.file, is_bench_record, read_record)


def read_seconds(source: Source) -> pd.DataFrame:
    """The same for results whose latencies are in seconds (InferenceX)."""
    return _frame(source.records, source.file, is_seconds_record, read_seconds_record)


def _frame(records: list[tuple[int, Any]], file: str, recognises: Any, read: Any) -> pd.DataFrame:
    rows = Rows()
    rows.add(file, read_all(records, file, recognises, read, WHAT))
    return rows.frame()
