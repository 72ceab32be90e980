"""Read the JSON lines that `sglang.bench_serving` appends: one result a line, of the clients of Dec 2024 to 0.5.23.

Milliseconds become seconds; bare `Infinity` as rate with a cap is a closed loop; `concurrency` is the mean number in
the system. Clients of Dec 2024 write only medians of TTFT and ITL.

Traps: `accept_length` counts the bonus token, but is the server's average since its start, over all earlier traffic,
and of its first data-parallel rank: it is never differenced. Clients of 0.4.10 and later (not 0.4.0) divide each gap
between stream events by the tokens that came with it (backends `sglang` and `sglang-native`; from 0.5.6 on, with an
`accept_length`, also `sglang-oai`), so their ITL is no step time: while drafting it is left out, unless
`--output-details` lets the events be put together again. `speculative_num_draft_tokens` counts the verified root.
Of another server than SGLang (`--backend vllm`) the client knows no drafts: where stream events hold several tokens,
their mean stands for `tokens_per_step`, and `draft_length` has to be given. Failed requests are told only by
`--output-details`. Without streaming TTFT, TPOT and ITL mean nothing: TTFT is 0.
"""

import math
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from ..problems import Problem
from ..schema import METHODS, PERCENTILES
from ..source import Source
from .bench_record import SGLANG_MARKS
from .json_record import (
    MILLISECONDS,
    Record,
    finite,
    note_several_tokens,
    note_waiting,
    read_latencies,
    read_load,
    spread,
)
from .rows import Rows, read_all

WHAT = "sglang.bench_serving"
_METHODS = {"eagle": "eagle", "eagle3": "eagle3", "nextn": "mtp", "standalone": "draft_model", "ngram": "ngram"}
_METHODS |= {"dflash": "block", "dspark": "block", "frozen_kv_mtp": "mtp"}


def is_sglang_record(value: Any) -> bool:
    """Whether a JSON value is a result of `sglang.bench_serving`: counts, and keys that only this client writes."""
    return isinstance(value, dict) and "completed" in value and bool(SGLANG_MARKS & set(value))


def read_sglang_bench(source: Source) -> pd.DataFrame:
    """The results of a file, one row each, as a raw frame (see `formats.Format`)."""
    rows = Rows()
    rows.add(source.file, read_all(source.records, source.file, is_sglang_record, read_record, WHAT))
    return rows.frame()


def read_record(record: dict[str, Any], run: str) -> tuple[dict[str, Any], list[str], list[Problem]]:
    """One result as a row [s, tok, req/s], with notes for the reader and what is wrong with it.

    >>> result = {"backend": "sglang", "completed": 8, "request_rate": float("inf"), "max_concurrency": 2,
    ...           "duration": 4.0, "total_input_tokens": 512, "total_output_tokens": 256, "median_ttft_ms": 50.0,
    ...           "mean_e2e_latency_ms": 900.0}
    >>> row, notes, problems = read_record(result, "a run")
    >>> row["concurrency"], row["prompt_length"], row["ttft_p50"], row["effective_batch_size"]
    (2.0, 64.0, 0.05, 1.8)
    """
    source, notes = Record(record), []
    server = _server(source)
    row: dict[str, Any] = {"run": run, "workload": source.text("dataset_name"), "verifier": server.text("model_path")}
    backend = source.text("backend") or ""
    version = server.text("version")
    if backend:
        row["engine"] = f"sglang {version}" if version and backend.startswith("sglang") else backend
    completed, duration = source.number("completed"), source.number("duration")
    if not completed > 0:
        source.complain("completed", "no request completed", "at least 1", "look at the server's log and run it again")
        return row, notes, source.problems
    throughput = source.number("request_throughput")
    row["throughput"] = completed / duration if math.isnan(throughput) and duration > 0 else throughput
    row["n_requests"] = completed
    for key, name in (("total_input_tokens", "prompt_length"), ("total_output_tokens", "output_length")):
        row[name] = source.number(key) / completed
    if row["prompt_length"] == 0:
        notes.append("input tokens are not counted (a workload of several turns): give prompt_length")
        row["prompt_length"] = None
    read_load(source, row, notes)
    read_latencies(source, row, MILLISECONDS, {"e2e": "e2e_latency"})
    _drop_unstreamed(row, notes)
    held = source.number("concurrency")
    if math.isnan(held) and duration > 0:
        held = row.get("e2e_mean", math.nan) * completed / duration
    row["effective_batch_size"] = held
    note_waiting(source, row, notes)
    _speculation(source, server, row, notes)
    _details(source, row, notes)
    _gaps(source, row, notes, backend)
    note_several_tokens(row, notes, told="draft_length" in row)
    one_rank = server.record["ranks"] <= 1
    capacity = server.record.get("effective_max_running_requests_per_dp") if one_rank else None
    row["max_batch_size"] = server.record.get("max_running_requests") or capacity
    row["kv_capacity_tokens"] = server.record.get("max_total_num_tokens")
    row["expert_ranks"] = server.record.get("ep_size")
    row["deployment"] = row["verifier"]
    return row, notes, source.problems


def _server(source: Record) -> Record:
    """`server_info`: the server's arguments and, over them, its first internal state; of disaggregated servers the
    decoding one's. Older servers keep their arguments in the state."""
    info = source.sub("server_info").record
    decode = info.get("decode")
    if isinstance(decode, list) and decode and isinstance(decode[0], dict):
        info = decode[0]
    states = info.get("internal_states")
    states = [state for state in states if isinstance(state, dict)] if isinstance(states, list) else []
    known = {key: value for key, value in info.items() if value is not None}
    return Record({**(states[0] if states else {}), **known, "ranks": len(states)}, "server_info.", source.problems)


def _drop_unstreamed(row: dict, notes: list[str]) -> None:
    if row.get("ttft_mean", row.get("ttft_p50")) == 0:
        notes.append("TTFT is 0: the answers were not streamed, so TTFT, TPOT and ITL are left out")
        for name in [name for name in row if name.startswith(("ttft_", "tpot_", "itl_"))]:
            del row[name]


def _speculation(source: Record, server: Record, row: dict, notes: list[str]) -> None:
    accepted = source.number("accept_length")
    algorithm = (server.text("speculative_algorithm") or "none").lower()
    if algorithm == "none" and math.isnan(accepted):
        if server.record.get("tp_size") is not None:  # the server's arguments are there, and name no algorithm
            row["method"], row["draft_length"] = "none", 0
        return
    if not math.isnan(accepted):
        row["tokens_per_step"] = accepted
        ranks = server.record["ranks"]
        rank = f", and of the first of {ranks} ranks" if ranks > 1 else ""
        notes.append(
            "tokens_per_step is accept_length, the server's average since its start, which holds all earlier traffic"
            f"{rank}: restart or flush the server before each run"
        )
    steps, nodes, topk = (
        server.number(f"speculative_{key}") for key in ("num_steps", "num_draft_tokens", "eagle_topk")
    )
    row["drafter"] = server.text("speculative_draft_model_path")
    tree = topk > 1 and algorithm != "ngram"
    method = "tree" if tree else _METHODS.get(algorithm)
    if method in METHODS:
        row["method"] = method
    elif algorithm != "none":
        notes.append(f"speculative_algorithm {algorithm[:40]!r} is not known: give method")
    if topk == 1 and steps > 0 and algorithm != "ngram":
        row["draft_length"] = steps
    elif nodes >= 1:
        row["draft_length"] = nodes - 1  # the root of the verified tree is the last token, not a draft
    else:
        notes.append("the file does not say how many tokens are drafted: give draft_length (--speculative-num-steps)")
    if server.record.get("speculative_adaptive") is True:
        notes.append("the draft length adapts to the load: draft_length is where it starts")


def _details(source: Record, row: dict, notes: list[str]) -> None:
    """What only `--output-details` tells: failures and the spread of lengths."""
    lengths = finite(source.record.get("output_lens"))
    if lengths and len(lengths) >= row["n_requests"]:
        row["failed"] = len(lengths) - row["n_requests"]
    for key, name in (("input_lens", "prompt_scv"), ("output_lens", "output_scv")):
        values = source.of_successes(key)
        scv = spread(values if values is None else values[values > 0])
        if not math.isnan(scv):
            row[name] = scv


def _gaps(source: Record, row: dict, notes: list[str], backend: str) -> None:
    """ITL as the gap between stream events: put together again from `itls`, or left out where it is one per token."""
    drafting = bool(row.get("draft_length")) or "tokens_per_step" in row
    itls, errors = source.record.get("itls"), source.record.get("errors")
    errors = errors if isinstance(errors, list) else []
    gaps: list[float] = []
    if isinstance(itls, list):
        for index, values in enumerate(itls):
            found = [] if index < len(errors) and errors[index] else finite(values)
            if found is None:
                source.complain("itls", allowed="a list of lists of finite numbers, at least 0")
                return
            # A gap of n tokens was written as n equal parts.
            gaps += [math.fsum(parts) for parts in (list(run) for _, run in groupby(found))]
    if gaps and sum(gaps) > 0:
        row["itl_mean"] = float(np.mean(gaps))
        for percentile in PERCENTILES:
            row[f"itl_{percentile}"] = float(np.percentile(gaps, int(percentile[1:])))
    elif drafting and backend.startswith("sglang"):
        for name in [name for name in row if name.startswith("itl_")]:
            del row[name]
        notes.append(
            "ITL is left out: this client divides a gap between stream events by its tokens; with --output-details it "
            "can be put together again"
        )
