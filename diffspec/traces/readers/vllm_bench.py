"""Read the JSON that `vllm bench serve` writes: one file, JSON lines (`--append-result`), a list, or a folder of them.

Milliseconds become seconds, the engine's marginal acceptance per position becomes conditional acceptance, and an
infinite request rate with a cap on concurrency becomes a closed loop. Metadata (`--metadata KEY=VALUE`) and sweep
overrides with the name of a column of the operating-point table fill that column.

A folder may be one that `vllm bench sweep` wrote: its runs are read, and `summary.json` or `summary.csv`, which repeat
them, only where the runs themselves are gone. Warm-ups and failures are skipped aloud.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from ..json_text import parse_json
from ..problems import Problem
from ..source import Source
from ..table import decode, read_bytes
from . import sweep_summary
from .bench_record import is_bench_record, is_seconds_record, read_record, read_seconds_record
from .rows import Rows, read_all

WHAT = "vllm bench serve"
# Written beside the runs by `vllm bench sweep`; reading them too would count runs twice, or count the warm-up.
_REPEATS = ("summary.json", "summary.csv")


def read_vllm_bench(path: str | Path) -> pd.DataFrame:
    """Read the benchmark results at `path`, one row each, with columns of the operating-point table.

    Seconds and fractions throughout; `source_row` is the line of a JSON-lines file, the place in a list (from 1), or 1.
    Warnings and the problems of single results are in ``frame.attrs``; hand the frame to `validate` for the canonical
    one. In a folder, *.json and *.jsonl are read recursively and JSON that is no result is skipped with a warning.
    Raises `TraceError` for a file that is missing, no JSON, cut off, or holds no benchmark result.
    """
    if not Path(path).is_dir():
        return bench_from_text(decode(read_bytes(path), str(path)), str(path))
    rows, skipped = Rows(), []
    found = [item for item in Path(path).rglob("*") if item.is_file()]
    runs = sorted(item for item in found if item.suffix.lower() in (".json", ".jsonl") and item.name not in _REPEATS)
    read: list[Path] = []
    for item in runs:
        if item.name == "warmup.json" or item.name.endswith("failure.json") or not _read_into(rows, item):
            skipped.append(item)
        else:
            read.append(item)
    # The deepest first: a summary.csv repeats the summary.json of each folder below it.
    for item in sorted((item for item in found if item.name in _REPEATS), key=lambda item: (-len(item.parts), item)):
        if any(item.parent in other.parents for other in read) or not _read_into(rows, item):
            skipped.append(item)
        else:
            read.append(item)
    if skipped:
        names = [str(item.relative_to(path)) for item in sorted(skipped)]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        rows.warnings.append(f"{path}: skipped, no results of single runs: {', '.join(names[:8])}{more}")
    if not rows.rows:
        advice = "name CSV or Parquet tables one by one; a folder is searched for *.json and *.jsonl"
        raise Problem(f"no result of {WHAT} in this folder", file=str(path), advice=advice).error()
    return rows.frame()


def _read_into(rows: Rows, item: Path) -> bool:
    """Read the results of a file; False when it holds none."""
    if item.suffix.lower() == ".csv":
        source = Source(item)
        if not sweep_summary.recognises(source):
            return False
        rows.add(str(item), sweep_summary.results(source))
        return True
    records = parse_json(decode(read_bytes(item), str(item)), str(item))
    for recognises, read in ((is_bench_record, read_record), (is_seconds_record, read_seconds_record)):
        if any(recognises(record) for _, record in records):
            rows.add(str(item), read_all(records, str(item), recognises, read, WHAT))
            return True
    return False


def bench_from_text(text: str, file: str) -> pd.DataFrame:
    """`read_vllm_bench` for text already in memory; `file` is the name used in messages."""
    records = parse_json(text, file)
    if not any(is_bench_record(record) for _, record in records):
        first = records[0][1] if records else None
        got = ", ".join(sorted(map(str, first))[:6]) if isinstance(first, dict) else type(first).__name__
        allowed = "num_prompts or completed with latencies such as mean_ttft_ms"
        raise Problem(f"no result of {WHAT}", file, got=got, allowed=allowed).error()
    return _frame(records, file, is_bench_record, read_record)


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
