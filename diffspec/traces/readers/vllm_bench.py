"""Read the JSON that `vllm bench serve` writes: one file, JSON lines (`--append-result`), a list, or a folder of them.

Milliseconds become seconds, the engine's marginal acceptance per position becomes conditional acceptance, and an
infinite request rate with a cap on concurrency becomes a closed loop. Metadata (`--metadata KEY=VALUE`) and sweep
overrides with the name of a column of the operating-point table fill that column.
"""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from ..json_text import parse_json
from ..problems import Problem
from ..schema import NAMES
from ..table import decode, read_bytes
from .bench_record import is_bench_record, read_record

# Written beside the runs by `vllm bench sweep`; reading them too would count runs twice, or count the warm-up.
_NOT_RUNS = ("summary.json", "warmup.json")


def read_vllm_bench(path: str | Path) -> pd.DataFrame:
    """Read the benchmark results at `path`, one row each, with columns of the operating-point table.

    Seconds and fractions throughout; `source_row` is the line of a JSON-lines file, the place in a list (from 1), or 1.
    Warnings and the problems of single results are in ``frame.attrs``; hand the frame to `validate` for the canonical
    one. In a folder, *.json and *.jsonl are read recursively and JSON that is no result is skipped with a warning.
    Raises `TraceError` for a file that is missing, no JSON, cut off, or holds no benchmark result.
    """
    if not Path(path).is_dir():
        return bench_from_text(decode(read_bytes(path), str(path)), str(path))
    files = sorted(item for item in Path(path).rglob("*") if item.suffix.lower() in (".json", ".jsonl"))
    rows, warnings, problems, skipped = [], [], [], []
    for item in files:
        name = str(item)
        if not item.is_file():
            continue
        if item.name in _NOT_RUNS or item.name.endswith("failure.json"):
            skipped.append(str(item.relative_to(path)))
            continue
        records = parse_json(decode(read_bytes(item), name), name)
        if not any(is_bench_record(record) for _, record in records):
            skipped.append(str(item.relative_to(path)))
            continue
        _convert(records, name, rows, warnings, problems)
    if skipped:
        more = f" and {len(skipped) - 8} more" if len(skipped) > 8 else ""
        warnings.append(f"{path}: skipped, no results of single runs: {', '.join(skipped[:8])}{more}")
    if not rows:
        advice = "name CSV or Parquet tables one by one; a folder is searched for *.json and *.jsonl"
        raise Problem("no result of vllm bench serve in this folder", file=str(path), advice=advice).error()
    return _frame(rows, warnings, problems)


def bench_from_text(text: str, file: str) -> pd.DataFrame:
    """`read_vllm_bench` for text already in memory; `file` is the name used in messages."""
    records = parse_json(text, file)
    if not any(is_bench_record(record) for _, record in records):
        raise not_a_result(records, file)
    rows, warnings, problems = [], [], []
    _convert(records, file, rows, warnings, problems)
    return _frame(rows, warnings, problems)


def not_a_result(records: list[tuple[int, Any]], file: str):
    first = records[0][1] if records else None
    keys = set(first) if isinstance(first, dict) else set()
    advice = None
    if keys & {"accept_length", "mean_e2e_latency_ms", "total_output_tokens_retokenized"}:
        advice = "this looks like SGLang's benchmark, another format"
    elif "benchmarks" in keys:
        advice = "this looks like GuideLLM's report, another format"
    elif any(key.startswith(("median_ttft", "mean_ttft")) for key in keys):
        advice = "its latencies carry no '_ms': this is another tool's variant of the format"
    allowed = "num_prompts or completed with latencies such as mean_ttft_ms"
    got = ", ".join(sorted(map(str, keys))[:6]) or ("an empty list" if first is None else type(first).__name__)
    return Problem("no result of vllm bench serve", file, got=got, allowed=allowed, advice=advice).error()


def _convert(records: list, file: str, rows: list, warnings: list[str], problems: list[Problem]) -> None:
    for number, record in records:
        if is_bench_record(record):
            name = Path(file).stem if len(records) == 1 else f"{Path(file).stem}#{number}"
            row, notes, faults = read_record(record, name)
        else:
            row, notes, faults = {}, [], [Problem("no result of vllm bench serve", got=type(record).__name__)]
        rows.append({**row, "source_file": file, "source_row": number})
        place = file if len(records) == 1 else f"{file}, row {number}"
        warnings += [f"{place}: {note}" for note in notes]
        problems += [Problem(**{**fault.__dict__, "file": file, "row": number}) for fault in faults]


def _frame(rows: list[dict], warnings: list[str], problems: list[Problem]) -> pd.DataFrame:
    used = [name for name in NAMES if any(name in row for row in rows)]
    data = {name: pd.Series([_plain(row.get(name)) for row in rows], dtype=object) for name in used}
    data["source_file"] = pd.Series([row["source_file"] for row in rows], dtype=object)
    data["source_row"] = pd.Series([row["source_row"] for row in rows], dtype="int64")
    frame = pd.DataFrame(data)
    frame.attrs["warnings"], frame.attrs["problems"] = warnings, problems
    return frame


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
