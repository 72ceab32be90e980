"""One result object of `vllm bench serve` as one row of the operating-point table.

Read: the client of vLLM 0.7 to 0.33, `benchmark_serving.py` before it, results of `vllm bench sweep` with their
overrides, and the variant of InferenceX, whose latencies are in seconds under keys without ``_ms``.

Traps: `spec_decode_acceptance_rate` is in percent; acceptance per position is marginal; `request_rate` is a number or
"inf"; 0 stands for a latency without a sample; `max_concurrent_requests` counts whole seconds that a request touches;
`latencies` and `queue_times` hold failed requests too, as 0.
"""

import math
import re
from typing import Any

import numpy as np

from ..problems import Problem
from ..schema import COLUMNS, PERCENTILES
from .json_record import (
    MILLISECONDS,
    SECONDS,
    Record,
    Unit,
    json_object,
    note_several_tokens,
    note_waiting,
    read_latencies,
    read_load,
    spread,
    text,
)

_LATENCY = re.compile(r"(mean|median|p\d+(_\d+)?)_(ttft|tpot|itl|e2el)(_ms)?")
SGLANG_MARKS = frozenset({"accept_length", "mean_e2e_latency_ms", "total_output_tokens_retokenized"})
# The load is taken from what the client did, never from metadata.
_METADATA = {item.name for item in COLUMNS if item.kind != "observed"} - {"arrival_rate", "concurrency"}
_ALIASES = {"max_num_seqs": "max_batch_size", "max_num_batched_tokens": "max_batched_tokens"}


def is_bench_record(value: Any) -> bool:
    """Whether a JSON value is a result of `vllm bench serve`: run counts and a latency in milliseconds."""
    return _is_result(value) and any(key.endswith("_ms") for key in value if _LATENCY.fullmatch(key))


def is_seconds_record(value: Any) -> bool:
    """Whether a JSON value is a result of InferenceX's variant of the client: its latencies are named without unit."""
    return _is_result(value) and not is_bench_record(value)


def _is_result(value: Any) -> bool:
    if not isinstance(value, dict) or not ({"num_prompts", "completed"} & set(value)) or SGLANG_MARKS & set(value):
        return False
    return any(_LATENCY.fullmatch(key) for key in value)


def read_seconds_record(record: dict[str, Any], run: str) -> tuple[dict[str, Any], list[str], list[Problem]]:
    """`read_record` for latencies in seconds. One longer than the whole run is a problem: perhaps milliseconds."""
    row, notes, problems = read_record(record, run, SECONDS)
    source = Record(record, problems=problems)
    duration = source.number("duration")
    for key in record:
        if _LATENCY.fullmatch(key) and source.number(key) > 1.05 * duration:
            allowed = f"seconds, at most the duration of {duration:g}"
            source.complain(key, "longer than the whole run", allowed, "perhaps milliseconds: divide by 1000")
            break
    notes.append("latencies are named without a unit and read as seconds")
    if row.get("method") == "none" and record.get("method") is None:
        del row["method"], row["draft_length"]
        notes.append("the file does not say whether tokens were drafted: give method and draft_length if they were")
    return row, notes, problems


def read_record(
    record: dict[str, Any], run: str, unit: Unit = MILLISECONDS
) -> tuple[dict[str, Any], list[str], list[Problem]]:
    """One result as a row [s, tok, req/s], with notes for the reader and what is wrong with it.

    >>> result = {"num_prompts": 8, "completed": 8, "request_rate": "inf", "max_concurrency": 2, "duration": 4.0,
    ...           "total_input_tokens": 512, "total_output_tokens": 256, "mean_ttft_ms": 50.0}
    >>> row, notes, problems = read_record(result, "a run")
    >>> row["concurrency"], row["prompt_length"], row["ttft_mean"], row["throughput"]
    (2.0, 64.0, 0.05, 2.0)
    """
    record = _with_metadata(record)
    source, notes = Record(record), []
    row: dict[str, Any] = {"run": run, "method": None, "verifier": source.text("model_id")}
    if source.text("label"):
        row["workload"] = record["label"]
    completed, failed, prompts = (source.number(key) for key in ("completed", "failed", "num_prompts"))
    if completed == 0:
        source.complain("completed", "no request completed", "at least 1", "look at the server's log and run it again")
        return row, notes, source.problems
    if record.get("completed") is None:
        completed = prompts - (0.0 if math.isnan(failed) else failed)
        notes.append("the key completed is missing: num_prompts is taken for it")
    elif math.isnan(failed) and prompts >= completed:
        failed = prompts - completed
    duration, throughput = source.number("duration"), source.number("request_throughput")
    row["throughput"] = completed / duration if math.isnan(throughput) and duration > 0 else throughput
    row["n_requests"], row["failed"] = completed, failed
    for key, name in (("total_input_tokens", "prompt_length"), ("total_output_tokens", "output_length")):
        if record.get(key) is not None and completed > 0:
            row[name] = source.number(key) / completed
        elif record.get(name) is None:
            notes.append(f"written by an older client: {key} is missing, so give {name} beside it")
    read_load(source, row, notes)
    read_latencies(source, row, unit, {"e2e": "e2el"})
    _details(source, row, duration)
    note_waiting(source, row, notes)
    _speculation(source, row, notes)
    note_several_tokens(row, notes)
    for key, value in record.items():
        name = _ALIASES.get(key, key)
        if key in _ALIASES and name in record:
            continue
        if name in _METADATA and value is not None and not isinstance(value, (dict, list)):
            row[name] = value
    row.setdefault("deployment", row["verifier"])
    return row, notes, source.problems


def _with_metadata(record: dict[str, Any]) -> dict[str, Any]:
    """The record with overrides named by flags (``max-num-seqs``) under their Python names, and with what an object
    `metadata`, or its JSON text, says about columns of the table; keys of the record itself win."""
    named = {key.replace("-", "_"): value for key, value in record.items() if "-" in key}
    inner = json_object(record.get("metadata")) or {}
    inner = {key.replace("-", "_"): value for key, value in inner.items()}
    known = _METADATA | set(_ALIASES)
    inner = {key: value for key, value in inner.items() if key in known or key.startswith("speculative_config")}
    return {**inner, **named, **record}


def _details(source: Record, row: dict, duration: float) -> None:
    """What only the per-request arrays tell: spread of lengths, the mean number in the system, missing e2e."""
    for key, name in (("input_lens", "prompt_scv"), ("output_lens", "output_scv")):
        scv = spread(source.of_successes(key))
        if not math.isnan(scv):
            row[name] = scv
    latencies = source.of_successes("latencies")
    if latencies is None or not (latencies > 0).any():
        return
    latencies = latencies[latencies > 0]
    if duration > 0:
        row["effective_batch_size"] = float(latencies.sum() / duration)
    if "e2e_mean" not in row:
        row["e2e_mean"] = float(latencies.mean())
        for percentile in PERCENTILES:
            row[f"e2e_{percentile}"] = float(np.percentile(latencies, int(percentile[1:])))


def _speculation(source: Record, row: dict, notes: list[str]) -> None:
    record, config = source.record, _config(source)
    row["method"] = text(config.get("method"))
    row["drafter"] = text(config.get("model"))
    row["rejection"] = text(config.get("rejection_sample_method"))
    planned = config.get("num_speculative_tokens", record.get("draft_length"))
    counted = any(key.startswith("spec_decode_") and value is not None for key, value in record.items())
    if not counted and planned is None:
        row["draft_length"], row["method"] = 0, row["method"] or "none"
        return
    drafts, drafted = source.number("spec_decode_num_drafts"), source.number("spec_decode_draft_tokens")
    marginal = source.numbers("spec_decode_per_position_acceptance_rates") or None
    ratio = drafted / drafts if drafts > 0 else math.nan
    whole = abs(ratio - round(ratio)) < 1e-6 if not math.isnan(ratio) else False
    if planned is not None:
        row["draft_length"] = planned
    elif whole:
        row["draft_length"] = round(ratio)
    elif marginal is not None:
        row["draft_length"] = len(marginal)
    elif not math.isnan(ratio):
        row["draft_length"] = math.ceil(ratio)
    else:
        source.complain(None, "tokens are drafted, but how many is not said", advice="add --metadata draft_length=K")
        return
    if counted and not whole and not math.isnan(ratio):
        notes.append(f"drafts vary in length, {ratio:.3g} tokens on average; draft_length {row['draft_length']}")
    if drafts == 0:
        notes.append("the drafter never drafted: no acceptance is known")
        return
    length, percent = source.number("spec_decode_acceptance_length"), source.number("spec_decode_acceptance_rate")
    accepted = source.number("spec_decode_accepted_tokens")
    row["tokens_per_step"] = length if not math.isnan(length) else 1 + accepted / drafts
    row["draft_acceptance_rate"] = percent / 100 if not math.isnan(percent) else accepted / drafted if drafted else None
    if percent > 100:
        source.complain("spec_decode_acceptance_rate", allowed="0 to 100 percent")
    if marginal is not None:
        row["position_acceptance"] = _positions(source, marginal, row["draft_length"])
        _compare(row["tokens_per_step"], marginal, notes)
    _account(source, row, drafts, notes)


def _config(source: Record) -> dict[str, Any]:
    """The speculative configuration, from metadata or sweep overrides: an object, its JSON text, or dotted keys."""
    config = source.record.get("speculative_config")
    if isinstance(config, str) and json_object(config) is None:
        source.complain("speculative_config", "not valid JSON", "a JSON object")
    found = dict(json_object(config) or {})
    for key, value in source.record.items():
        if key.startswith("speculative_config."):
            found[key.split(".", 1)[1]] = value
    return found


def _positions(source: Record, marginal: list[float], draft_length: Any) -> tuple[float, ...] | None:
    key = "spec_decode_per_position_acceptance_rates"
    if any(later > earlier * (1 + 1e-9) for earlier, later in zip([1.0, *marginal], marginal, strict=False)):
        source.complain(key, allowed="fractions from 0 to 1 that do not increase (accepted at a position / drafts)")
        return None
    kept = list(marginal)
    if isinstance(draft_length, (int, float)):  # a schedule may never have used the last positions
        while len(kept) > draft_length and kept[-1] == 0:
            kept.pop()
    return conditional(kept)


def conditional(marginal: list[float]) -> tuple[float, ...] | None:
    """P(position i accepted | all before it) from P(positions 1..i accepted); 0 after a position never reached.

    >>> conditional([0.8, 0.4, 0.0, 0.0])
    (0.8, 0.5, 0.0, 0.0)
    """
    return tuple(b / a if a > 0 else 0.0 for a, b in zip([1.0, *marginal], marginal, strict=False)) or None


def _compare(tokens_per_step: float, marginal: list[float], notes: list[str]) -> None:
    expected = 1 + sum(marginal)
    if abs(tokens_per_step - expected) > 0.02 * expected:
        notes.append(f"acceptance length {tokens_per_step:.3f} but its positions add up to {expected:.3f}")


def _account(source: Record, row: dict, drafts: float, notes: list[str]) -> None:
    """Tokens emitted by drafting steps against tokens received: more means other traffic inside the counters."""
    received = source.number("total_output_tokens")
    emitted = drafts * row["tokens_per_step"]
    if emitted > 1.1 * received:
        notes.append(
            f"the counters hold {emitted:.0f} tokens but {received:.0f} were received: warm-up or other traffic inside"
        )
    elif emitted < 0.8 * (received - row["n_requests"]):
        others = received - row["n_requests"] - emitted
        notes.append(f"only {drafts / (drafts + others):.0%} of the steps drafted, by the counters")
