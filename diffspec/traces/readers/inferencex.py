"""Read InferenceX's aggregated results: an object, a list or JSON lines, a row a concurrency; latencies in seconds.

The load is closed (`conc` requests in flight), `isl` and `osl` are nominal lengths, `spec_decoding` names the method
but not the draft length, and throughput is told in tokens per second and GPU, which is no rate of requests: it is left
out. Latencies may stand under `metrics`. Seen in its documentation and tests, not in a file that InferenceX published.
"""

import math
from typing import Any

import pandas as pd

from ..problems import Problem
from ..source import Source
from .json_record import SECONDS, Record, note_several_tokens, read_latencies
from .rows import Rows, read_all

WHAT = "InferenceX"
_MARKS = {"conc", "isl", "osl", "framework"}


def is_aggregate(value: Any) -> bool:
    """Whether a JSON value is an aggregated result of InferenceX with latencies."""
    if not isinstance(value, dict) or not set(value) >= _MARKS:
        return False
    return any(key.endswith(("_ttft", "_tpot", "_itl")) for key in {**value, **_metrics(value)})


def _metrics(record: dict[str, Any]) -> dict[str, Any]:
    inner = record.get("metrics")
    return inner if isinstance(inner, dict) else {}


def read_inferencex(source: Source) -> pd.DataFrame:
    """The results of a file as a raw frame (see `formats.Format`)."""
    rows = Rows()
    rows.add(source.file, read_all(source.records, source.file, is_aggregate, read_aggregate, WHAT))
    return rows.frame()


def read_aggregate(record: dict[str, Any], run: str) -> tuple[dict[str, Any], list[str], list[Problem]]:
    """One result as a row [s, tok, req], with notes for the reader and what is wrong with it.

    >>> result = {"hw": "b200", "framework": "vllm", "model": "org/model", "conc": 8, "isl": 1024, "osl": 256, "ep": 4,
    ...           "spec_decoding": "none", "mean_ttft": 0.2, "mean_tpot": 0.01}
    >>> row, notes, problems = read_aggregate(result, "a run")
    >>> row["concurrency"], row["prompt_length"], row["tpot_mean"], row["expert_ranks"], row["method"]
    (8.0, 1024.0, 0.01, 4, 'none')
    """
    source, notes = Record({**record, **_metrics(record)}), []
    row: dict[str, Any] = {"run": run, "verifier": source.text("model"), "hardware": source.text("hw")}
    row["engine"] = source.text("image") or source.text("framework")
    parts = [row["verifier"], row["hardware"], row["engine"], source.text("precision")]
    row["deployment"] = " ".join(part for part in parts if part) or None
    row["concurrency"] = source.number("conc")
    row["prompt_length"], row["output_length"] = source.number("isl"), source.number("osl")
    notes.append("isl and osl are nominal lengths: the requests may have been shorter")
    read_latencies(source, row, SECONDS, {"e2e": "e2el"})
    for metric, token in (("itl", row.get("itl_mean", math.nan)), ("tpot", row.get("tpot_mean", math.nan))):
        if token > 5:
            source.complain(f"mean_{metric}", allowed="seconds", advice="perhaps milliseconds: divide by 1000")
    method = source.text("spec_decoding")
    if method == "none":
        row["method"], row["draft_length"] = "none", 0
    elif method is not None:
        row["method"] = method
        notes.append(f"spec_decoding is {method[:40]!r} without a draft length: give draft_length")
    row["expert_ranks"] = source.record.get("ep")
    note_several_tokens(row, notes)
    return row, notes, source.problems
