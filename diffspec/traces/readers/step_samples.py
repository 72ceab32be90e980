"""Read `vllm bench forward`: times of single forward passes over chosen batches, one row a case and rank.

A case is a batch: some requests, each with `query_len` tokens to compute over `kv_len` tokens of context, of which
`num_draft_tokens` are drafts to verify. Microseconds become seconds.

Traps: a sample is the forward pass of the verifier (and, unless ``--exclude-drafter``, of the drafter); sampling,
rejection and the engine's work on the CPU are not in it, so a served step takes longer. Accepted drafts are all drafts
("acceptance": "all"). ``median_us`` of a case is over ranks; rows here are single ranks.
"""

import math
from typing import Any

import pandas as pd

from ..problems import Problem
from ..schema import NAMES
from ..source import Source
from ..table import check_size

COLUMNS = (
    "case",
    "rank",
    "requests",
    "query_tokens",
    "query_length_mean",
    "kv_length_mean",
    "kv_tokens",
    "draft_tokens",
    "prefill_requests",
    "step_time_median",
    "step_time_mean",
    "step_time_min",
    "step_time_p90",
    "step_time_std",
    "samples",
    "drafter",
    "drafter_draft_tokens",
    "drafter_time",
    "timer",
    "routing",
)
_STATISTICS = {"median": "median", "mean": "mean", "min": "min", "p90": "p90", "std": "std"}
_TEXTS = ("case", "drafter", "timer", "routing", "source_file")
_MOST = 2**53


def recognises(source: Source) -> bool:
    """Whether a file is the output of `vllm bench forward`."""
    first = source.first
    return isinstance(first, dict) and {"case", "requests", "ranks"} <= set(first)


def read(source: Source) -> pd.DataFrame:
    """The cases of a file, one row for each rank, with the columns `COLUMNS`, `source_file` and `source_row`.

    `requests`, how many; `query_tokens` and `kv_tokens`, their sums, and the means per request [tok]; `draft_tokens`,
    drafts to verify in the batch [tok]; `prefill_requests`, those that are chunks of a prompt; `step_time_*` [s] over
    `samples` repetitions; `drafter`, its method, None where it was left out; `drafter_time` [s], its median where it is
    told apart. A rank that cannot be used is left out and told in ``frame.attrs["warnings"]``. Raises `TraceError` when
    none can.
    """
    rows: list[dict[str, Any]] = []
    bad: list[Problem] = []
    for line, record in source.records:
        try:
            rows += [{**row, "source_file": source.file, "source_row": line} for row in rows_of(record)]
            check_size(len(rows) * len(NAMES), source.file)
        except _Unusable as error:
            bad.append(Problem(str(error), source.file, line, error.key, error.got))
    if not rows:
        raise (bad[0] if bad else Problem("no case has a measured rank", source.file)).error()
    frame = pd.DataFrame(rows, columns=[*COLUMNS, "source_file", "source_row"])
    for name in _TEXTS:  # None where missing
        frame[name] = pd.Series([row[name] for row in rows], dtype=object)
    told = [f"{source.file}: times of forward passes only: no sampling, no rejection, no work on the CPU"]
    if bad:
        told.append(f"{len(bad)} cases left out, the first: {bad[0].line()}")
    frame.attrs["warnings"], frame.attrs["problems"] = told, []
    return frame


def rows_of(record: Any) -> list[dict[str, Any]]:
    """The ranks of one case as rows.

    >>> mix = [{"query_len": 4, "kv_len": 100, "num_draft_tokens": 3, "chunked": False, "count": 2}]
    >>> ranks = [{"num_tokens": 8, "latency_us": {"median": 5000.0, "count": 20}}]
    >>> row = rows_of({"case": "verify", "requests": mix, "ranks": ranks})[0]
    >>> row["requests"], row["kv_tokens"], row["draft_tokens"], row["step_time_median"], row["samples"]
    (2.0, 200.0, 6.0, 0.005, 20.0)
    """
    if not isinstance(record, dict):
        raise _Unusable("a case is an object", None, record)
    batch = _batch(record.get("requests"))
    ranks = record.get("ranks")
    if not isinstance(ranks, list) or not ranks:
        raise _Unusable("a list of ranks is needed", "ranks", ranks)
    rows = []
    for rank, item in enumerate(ranks):
        if not isinstance(item, dict) or not isinstance(item.get("latency_us"), dict):
            raise _Unusable("a rank has latency_us", "ranks", item)
        times = item["latency_us"]
        given = item.get("drafter")
        drafter: dict[str, Any] = given if isinstance(given, dict) else {}
        row: dict[str, Any] = {
            "case": record.get("case") if isinstance(record.get("case"), str) else None,
            "rank": rank,
        }
        row |= batch
        row |= {f"step_time_{name}": _number(times, key) * 1e-6 for key, name in _STATISTICS.items()}
        if math.isnan(row["step_time_median"]) and math.isnan(row["step_time_mean"]):
            raise _Unusable("neither a median nor a mean", "latency_us", times)
        row["samples"] = _number(times, "count")
        row["timer"], row["routing"] = _text(times, "timer"), _text(item, "routing")
        row["drafter"] = _text(drafter, "method")
        row["drafter_draft_tokens"] = _number(drafter, "num_draft_tokens")
        own = drafter.get("latency_us")
        row["drafter_time"] = (
            _number(own, "median") if isinstance(own, dict) else _number(drafter, "latency_us")
        ) * 1e-6
        rows.append(row)
    return rows


class _Unusable(Exception):
    """A case whose numbers cannot be used."""

    def __init__(self, message: str, key: str | None = None, got: Any = None):
        super().__init__(message)
        self.key, self.got = key, got


def _batch(requests: Any) -> dict[str, float]:
    if not isinstance(requests, list) or not requests:
        raise _Unusable("a list of requests is needed", "requests", requests)
    size = query = context = drafts = chunks = 0.0
    for item in requests:
        if not isinstance(item, dict):
            raise _Unusable("a request is an object", "requests", item)
        count = _number(item, "count") if item.get("count") is not None else 1.0
        size += count
        query += count * _number(item, "query_len")
        context += count * (_number(item, "kv_len") if item.get("kv_len") is not None else 0.0)
        drafts += count * (_number(item, "num_draft_tokens") if item.get("num_draft_tokens") is not None else 0.0)
        chunks += count * (item.get("chunked") is True)
    if not size > 0 or math.isnan(query):
        raise _Unusable("requests need a query_len", "requests", requests)
    return {
        "requests": size,
        "query_tokens": query,
        "query_length_mean": query / size,
        "kv_length_mean": context / size,
        "kv_tokens": context,
        "draft_tokens": drafts,
        "prefill_requests": chunks,
    }


def _number(record: dict[str, Any], key: str) -> float:
    value = record.get(key)
    if value is None:
        return math.nan
    if type(value) not in (int, float) or not 0 <= value < _MOST:
        raise _Unusable("a number, at least 0, is needed", key, value)
    return float(value)


def _text(record: dict[str, Any], key: str) -> str | None:
    return record.get(key) if isinstance(record.get(key), str) else None
