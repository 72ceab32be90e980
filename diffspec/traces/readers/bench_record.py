"""One result object of `vllm bench serve` as one row of the operating-point table."""

import json
import math
import re
from typing import Any

import numpy as np

from ..problems import Problem
from ..schema import COLUMNS, METRICS, PERCENTILES

_LATENCY_KEY = re.compile(r"(mean|median|p\d+(_\d+)?)_(ttft|tpot|itl|e2el)_ms")
# The load is taken from what the client did, never from metadata.
_METADATA = {item.name for item in COLUMNS if item.kind != "observed"} - {"arrival_rate", "concurrency"}
_ALIASES = {"max_num_seqs": "max_batch_size", "max_num_batched_tokens": "max_batched_tokens"}


def is_bench_record(value: Any) -> bool:
    """Whether a JSON value is a result of `vllm bench serve`: run counts and a latency in milliseconds."""
    if not isinstance(value, dict) or not ({"num_prompts", "completed"} & set(value)):
        return False
    if {"accept_length", "mean_e2e_latency_ms", "total_output_tokens_retokenized"} & set(value):
        return False
    return any(_LATENCY_KEY.fullmatch(key) for key in value)


class _Record:
    """Typed access to the keys of one result; what has the wrong type becomes a problem and reads as missing."""

    def __init__(self, record: dict[str, Any]):
        self.record, self.problems = record, []

    def complain(self, key: str | None, message: str = "", allowed: str | None = None, advice: str | None = None):
        self.problems.append(Problem(message, None, None, key, self.record.get(key or ""), allowed, advice))

    def number(self, key: str, low: float = 0.0) -> float:
        """A finite number >= `low`, NaN when the key is absent or null."""
        value = self.record.get(key)
        if value is None:
            return math.nan
        try:
            if isinstance(value, (bool, str, list, dict)):
                raise TypeError
            number = float(value)
        except (TypeError, OverflowError):
            number = math.inf
        if math.isfinite(number) and number >= low:
            return number
        self.complain(key, allowed=f"a finite number, at least {low:g}")
        return math.nan

    def numbers(self, key: str) -> list[float] | None:
        """A list of finite numbers >= 0, None when the key is absent or null."""
        value = self.record.get(key)
        if value is None:
            return None
        numeric = isinstance(value, list) and all(type(item) in (int, float) for item in value)
        try:
            if numeric and all(math.isfinite(item) and item >= 0 for item in value):
                return [float(item) for item in value]
        except OverflowError:
            pass
        self.problems.append(Problem("", None, None, key, str(value)[:60], "a list of finite numbers, at least 0"))
        return None


def read_record(record: dict[str, Any], run: str) -> tuple[dict[str, Any], list[str], list[Problem]]:
    """One result as a row [s, tok, req/s], with notes for the reader and what is wrong with it.

    >>> result = {"num_prompts": 8, "completed": 8, "request_rate": "inf", "max_concurrency": 2, "duration": 4.0,
    ...           "total_input_tokens": 512, "total_output_tokens": 256, "mean_ttft_ms": 50.0}
    >>> row, notes, problems = read_record(result, "a run")
    >>> row["concurrency"], row["prompt_length"], row["ttft_mean"], row["throughput"]
    (2.0, 64.0, 0.05, 2.0)
    """
    source, notes = _Record(record), []
    row: dict[str, Any] = {"run": run, "method": None, "verifier": _string(record.get("model_id"))}
    if _string(record.get("label")):
        row["workload"] = record["label"]
    completed = source.number("completed")
    if record.get("completed") is None:
        source.complain("completed", "the key is missing", "requests completed")
    prompts = source.number("num_prompts")
    failed = source.number("failed")
    if completed == 0:
        source.complain("completed", "no request completed", "at least 1", "look at the server's log and run it again")
        return row, notes, source.problems
    if math.isnan(failed) and prompts >= completed:
        failed = prompts - completed
    duration, throughput = source.number("duration"), source.number("request_throughput")
    row["throughput"] = completed / duration if math.isnan(throughput) and duration > 0 else throughput
    row["n_requests"], row["failed"] = completed, failed
    for key, name in (("total_input_tokens", "prompt_length"), ("total_output_tokens", "output_length")):
        row[name] = source.number(key) / completed
        if record.get(key) is None:
            source.complain(key, "the key is missing", advice="written by an older client, which cannot be used")
    _load(source, row, notes)
    _latencies(source, row)
    _details(source, row, duration)
    _speculation(source, row, notes)
    for key, value in record.items():
        name = _ALIASES.get(key, key)
        if key in _ALIASES and name in record:
            continue
        if name in _METADATA and value is not None and not isinstance(value, (dict, list)):
            row[name] = value
    row.setdefault("deployment", row["verifier"])
    return row, notes, source.problems


def _string(value: Any) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _load(source: _Record, row: dict, notes: list[str]) -> None:
    rate, cap = source.record.get("request_rate"), source.number("max_concurrency")
    if (isinstance(rate, str) and rate.strip().lower() == "inf") or rate == math.inf:
        if math.isnan(cap):
            source.complain(
                "max_concurrency",
                "an infinite request_rate without max_concurrency is one burst: neither an open nor a closed loop",
                "a finite request_rate, or max_concurrency",
                "run again with --request-rate R or --max-concurrency N",
            )
        row["concurrency"] = cap
        return
    if isinstance(rate, str):
        try:
            source.record = {**source.record, "request_rate": float(rate)}
        except ValueError:
            source.complain("request_rate", allowed='a number or "inf"')
            return
    if rate is None:
        source.complain("request_rate", "the key is missing", 'a number or "inf"')
        return
    row["arrival_rate"] = source.number("request_rate")
    burstiness = source.record.get("burstiness")
    shape = 1.0 if burstiness is None else math.inf if burstiness in ("inf", math.inf) else source.number("burstiness")
    if shape == 0:
        source.complain("burstiness", allowed="above 0")
    elif not math.isnan(shape):
        row["arrival_scv"] = 1.0 / shape
        row["arrival_process"] = "poisson" if shape == 1 else "constant" if math.isinf(shape) else "gamma"
    if source.record.get("ramp_up_strategy"):
        notes.append("the request rate was ramped up: request_rate is no steady arrival rate")
    if source.number("max_concurrent_requests") >= cap:
        notes.append(
            f"arrivals at {row['arrival_rate']:g} req/s ran into max_concurrency {cap:g}: requests waited in the "
            "client, so the loop was neither open nor closed; read as open"
        )


def _latencies(source: _Record, row: dict) -> None:
    single = row["output_length"] == 1
    for metric in METRICS:
        key = "e2el" if metric == "e2e" else metric
        names = {f"mean_{key}_ms": "mean", f"median_{key}_ms": "p50"} | {f"p{p[1:]}_{key}_ms": p for p in PERCENTILES}
        for name, statistic in names.items():
            value = source.number(name) / 1000
            # One output token has no gap, and the client writes 0 for "no such sample".
            if not math.isnan(value) and not (metric in ("itl", "tpot") and value == 0 and (single or "mean" in name)):
                row[f"{metric}_{statistic}"] = value


def _details(source: _Record, row: dict, duration: float) -> None:
    """What only the per-request arrays tell: spread of lengths, the mean number in the system, missing e2e."""
    errors = source.record.get("errors")
    errors = errors if isinstance(errors, list) else []

    def done(key: str) -> np.ndarray | None:
        values = source.numbers(key)
        if not values:
            return None
        kept = [value for index, value in enumerate(values) if index >= len(errors) or not errors[index]]
        return np.array(kept) if kept else None

    for key, name in (("input_lens", "prompt_scv"), ("output_lens", "output_scv")):
        lengths = done(key)
        if lengths is not None and lengths.mean() > 0:
            row[name] = float(lengths.var() / lengths.mean() ** 2)
    latencies = done("latencies")
    if latencies is None:
        return
    if duration > 0 and latencies.sum() > 0:
        row["effective_batch_size"] = float(latencies.sum() / duration)
    if "e2e_mean" not in row and latencies.mean() > 0:
        row["e2e_mean"] = float(latencies.mean())
        for percentile in PERCENTILES:
            row[f"e2e_{percentile}"] = float(np.percentile(latencies, int(percentile[1:])))


def _speculation(source: _Record, row: dict, notes: list[str]) -> None:
    record, config = source.record, _config(source)
    row["method"] = _string(config.get("method"))
    row["drafter"] = _string(config.get("model"))
    row["rejection"] = _string(config.get("rejection_sample_method"))
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
        row["position_acceptance"] = _conditional(source, marginal, row["draft_length"])
        _compare(row["tokens_per_step"], marginal, notes)
    _account(source, row, drafts, notes)


def _config(source: _Record) -> dict[str, Any]:
    """The speculative configuration, from metadata or sweep overrides: an object, its JSON text, or dotted keys."""
    config = source.record.get("speculative_config")
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except (ValueError, RecursionError):
            source.complain("speculative_config", "not valid JSON", "a JSON object")
    found = dict(config) if isinstance(config, dict) else {}
    for key, value in source.record.items():
        if key.startswith("speculative_config."):
            found[key.split(".", 1)[1]] = value
    return found


def _conditional(source: _Record, marginal: list[float], draft_length: Any) -> tuple[float, ...] | None:
    """P(position i accepted | all before it) from P(positions 1..i accepted); 0 after a position never reached."""
    key = "spec_decode_per_position_acceptance_rates"
    if any(later > earlier * (1 + 1e-9) for earlier, later in zip([1.0, *marginal], marginal, strict=False)):
        source.complain(key, allowed="fractions from 0 to 1 that do not increase (accepted at a position / drafts)")
        return None
    kept = list(marginal)
    if isinstance(draft_length, int):  # a schedule may never have used the last positions
        while len(kept) > draft_length and kept[-1] == 0:
            kept.pop()
    return tuple(b / a if a > 0 else 0.0 for a, b in zip([1.0, *kept], kept, strict=False)) or None


def _compare(tokens_per_step: float, marginal: list[float], notes: list[str]) -> None:
    expected = 1 + sum(marginal)
    if abs(tokens_per_step - expected) > 0.02 * expected:
        notes.append(f"acceptance length {tokens_per_step:.3f} but its positions add up to {expected:.3f}")


def _account(source: _Record, row: dict, drafts: float, notes: list[str]) -> None:
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
