"""Read the report that GuideLLM writes as JSON (0.5 to 0.8; the shape of 0.3 and 0.4 by their source): one row a
benchmark, so a sweep gives several.

GuideLLM's `inter_token_latency_ms` is (last token - first token)/(output tokens - 1), our tpot; its
`time_per_output_token_ms` holds the first token too and is not used. Our itl, the gap between stream events, is its
mean times `iter_tokens_per_iteration`, the tokens of an event after the first: the mean only. Only successful requests
count; errors are `failed`. Milliseconds become seconds, `request_latency` is in seconds already.

Traps: tpot and its percentiles are weighted by tokens, not by requests. A missing latency is counted as 0. With a
warm-up or cool-down the measured window can outlast the run (a limit in requests reached before the one in seconds):
rates and concurrency are then averages over idle time, and are mended by the share of the window in which the run still
ran. Without them, requests that end with the window are missing in the rate, which is then taken anew. A report says
nothing of drafts unless vLLM sent metrics for each request (0.8): where stream events hold several tokens, their mean
is taken for `tokens_per_step`, and `draft_length` has to be given. It is a proxy: an answer's last step is cut short,
events without text are not counted, and a slow client merges events.
"""

import math
from typing import Any

import numpy as np
import pandas as pd

from ...results import TraceError
from ..problems import Problem
from ..schema import PERCENTILES
from ..source import Source
from . import request_metrics
from .json_record import SEVERAL, Record, text
from .rows import Rows, read_all

WHAT = "GuideLLM"
_LATENCIES = {
    "ttft": ("time_to_first_token_ms", 1000.0),
    "tpot": ("inter_token_latency_ms", 1000.0),
    "e2e": ("request_latency", 1.0),
}
_SLACK = 0.01
"""Share of the measured window by which its ends may differ from those of the run, and its completions from all."""


def is_benchmark(value: Any) -> bool:
    """Whether a JSON value is one benchmark of a GuideLLM report."""
    metrics = value.get("metrics") if isinstance(value, dict) else None
    return isinstance(metrics, dict) and {"request_latency", "output_token_count"} <= set(metrics)


def is_report(value: Any) -> bool:
    """Whether a JSON value is a GuideLLM report with at least one benchmark."""
    benchmarks = value.get("benchmarks") if isinstance(value, dict) else None
    return isinstance(benchmarks, list) and any(is_benchmark(item) for item in benchmarks)


def read_guidellm(source: Source) -> pd.DataFrame:
    """The benchmarks of a report as a raw frame (see `formats.Format`); `source_row` is their place in it, from 1."""
    reports = [value["benchmarks"] if is_report(value) else [value] for _, value in source.records]
    records = list(enumerate((item for items in reports for item in items), start=1))
    rows = Rows()
    rows.add(source.file, read_all(records, source.file, is_benchmark, read_benchmark, WHAT))
    return rows.frame()


def read_benchmark(record: dict[str, Any], run: str) -> tuple[dict[str, Any], list[str], list[Problem]]:
    """One benchmark as a row [s, tok, req/s], with notes for the reader and what is wrong with it.

    >>> def of(mean): return {"successful": {"mean": mean, "median": mean, "variance": 0.0}}
    >>> metrics = {"request_totals": {"successful": 8, "errored": 0, "incomplete": 0}, "requests_per_second": of(2.0),
    ...            "request_latency": of(1.9), "prompt_token_count": of(64.0), "output_token_count": of(32.0),
    ...            "time_to_first_token_ms": of(40.0), "inter_token_latency_ms": of(60.0)}
    >>> strategy = {"type_": "concurrent", "streams": 4}
    >>> row, notes, problems = read_benchmark({"config": {"strategy": strategy}, "metrics": metrics}, "a run")
    >>> row["concurrency"], row["ttft_mean"], row["tpot_mean"], row["e2e_mean"], row["throughput"]
    (4.0, 0.04, 0.06, 1.9, 2.0)
    """
    source, notes = Record(record), []
    metrics, config = source.sub("metrics"), source.sub("config" if "config" in record else "args")
    totals = metrics.sub("request_totals") if "request_totals" in metrics.record else source.sub("request_totals")
    model = config.sub("backend").text("model") or text(source.sub("benchmarker").sub("backend").record.get("model"))
    row: dict[str, Any] = {"run": run, "verifier": model, "workload": _workload(config), "deployment": model}
    done, failed, cut = (totals.number(key) for key in ("successful", "errored", "incomplete"))
    if done == 0:
        totals.complain("successful", "no request completed", "at least 1", "look at the server's log and run it again")
        return row, notes, source.problems
    row["n_requests"], row["failed"] = done, failed
    if cut > 0.05 * done:
        notes.append(f"{cut:.0f} requests were cut off at the end and are not counted")
    for key, name in (("prompt_token_count", "prompt"), ("output_token_count", "output")):
        counts = _successes(metrics, key)
        mean = counts.number("mean")
        row[f"{name}_length"] = mean
        if mean > 0:
            row[f"{name}_scv"] = counts.number("variance") / mean**2
    _latencies(metrics, row, notes)
    rate, held = metrics.sub("requests_per_second"), metrics.sub("request_concurrency")
    row["throughput"] = rate.sub("successful").number("mean")
    statuses = ("total",) if isinstance(held.record.get("total"), dict) else ("successful", "incomplete", "errored")
    held_means = [held.sub(status).number("mean") for status in statuses]
    row["effective_batch_size"] = math.fsum(mean for mean in held_means if not math.isnan(mean)) or None
    _mend_window(source, row, notes)
    _strategy(config.sub("strategy"), held, row, notes)
    _speculation(source, metrics, row, notes)
    warned = source.record.get("warnings")
    warned = warned if isinstance(warned, list) else []
    messages = [text(item.get("message")) for item in warned if isinstance(item, dict)]
    notes += [f"GuideLLM warns: {message[:200]}" for message in messages if message]
    return row, notes, source.problems


def _successes(metrics: Record, key: str) -> Record:
    return metrics.sub(key).sub("successful")


def _workload(config: Record) -> str | None:
    requests = config.sub("requests")
    return (requests.text("data") or "")[:120] or None


def _latencies(metrics: Record, row: dict, notes: list[str]) -> None:
    for metric, (key, per_second) in _LATENCIES.items():
        summary = _successes(metrics, key)
        mean = summary.number("mean")
        if math.isnan(mean) or mean == 0:  # no stream, or one token: GuideLLM counts what is missing as 0
            continue
        percentiles = summary.sub("percentiles")
        row[f"{metric}_mean"] = mean / per_second
        median = percentiles.number("p50")
        row[f"{metric}_p50"] = (summary.number("median") if math.isnan(median) else median) / per_second
        for name in PERCENTILES[1:]:
            row[f"{metric}_{name}"] = percentiles.number(name) / per_second
        if summary.number("min") == 0:
            notes.append(f"{key} counts 0 for requests without one (no token came): its mean is too low")
    tokens = _successes(metrics, "iter_tokens_per_iteration").number("mean")
    if "tpot_mean" in row and tokens > 0:
        row["itl_mean"] = row["tpot_mean"] * tokens
    if "tpot_mean" in row and row.get("output_scv", 0.0) > 0.01:
        notes.append(
            "tpot is weighted by tokens, as GuideLLM does: long answers count more in its mean and percentiles"
        )


def _mend_window(source: Record, row: dict, notes: list[str]) -> None:
    """Rates and concurrency over the part of the measured window in which requests ran, and all of its completions."""
    duration, warm = source.number("duration"), source.number("warmup_duration", -math.inf)
    cool = source.number("cooldown_duration", -math.inf)  # negative: the window ends after the last request
    running = duration + min(cool, 0.0)
    if cool < -_SLACK * duration and running > 0:
        notes.append(
            f"the measured window of {duration:.4g} s outlasts the run by {-cool:.4g} s: throughput and "
            f"effective_batch_size are over the {running:.4g} s in which it ran, not GuideLLM's averages"
        )
        for name in ("throughput", "effective_batch_size"):
            if row.get(name):
                row[name] *= duration / running
        return
    times = source.sub("scheduler_metrics")
    late = times.number("end_time") - times.number("request_end_time")
    if not (abs(warm) + abs(cool) < _SLACK * duration and late < max(_SLACK * duration, 1.0)):
        return
    told, completed = row["throughput"], row["n_requests"] / duration
    if completed > (1 + _SLACK) * told:
        notes.append(
            f"throughput is {row['n_requests']:.0f} requests over {duration:.4g} s: GuideLLM's {told:.4g} req/s leaves "
            "out those that end with the window"
        )
        row["throughput"] = completed


def _strategy(strategy: Record, held: Record, row: dict, notes: list[str]) -> None:
    kind = strategy.text("type_") or ""
    cap = strategy.number("max_concurrency")
    if kind == "synchronous":
        row["concurrency"] = 1.0
    elif kind == "concurrent":
        streams = strategy.number("streams")
        row["concurrency"] = cap if math.isnan(streams) else streams
    elif kind == "throughput":
        if math.isnan(cap):
            strategy.complain(
                "max_concurrency",
                "a throughput benchmark without a limit is one burst: neither an open nor a closed loop",
                "the most requests in flight",
                "run the profile concurrent, or throughput with a rate (its limit)",
            )
        row["concurrency"] = cap
    elif kind in ("constant", "poisson"):
        row["arrival_rate"], row["arrival_process"] = strategy.number("rate"), kind
        if strategy.record.get("rate") is None:
            strategy.complain("rate", "the key is missing", "requests per second")
        if held.sub("total").number("max") >= cap or held.sub("successful").number("max") >= cap:
            notes.append(
                f"arrivals ran into max_concurrency {cap:g}: requests waited in the client, so the loop was neither "
                "open nor closed; read as open"
            )
    else:
        allowed = "synchronous, concurrent, throughput, constant or poisson"
        strategy.complain("type_", "a strategy without a steady load", allowed)
    if strategy.number("rampup_duration") > 0:
        notes.append(f"the load was ramped up over {strategy.number('rampup_duration'):g} s")


def _speculation(source: Record, metrics: Record, row: dict, notes: list[str]) -> None:
    """Acceptance from the metrics that vLLM sends with each answer; else what the stream tells."""
    told = _request_metrics(source)
    if told is not None:
        names = ("drafts", "drafted_tokens", "accepted_tokens")
        steps, drafted, accepted = (float(np.nansum(told[name].to_numpy(float))) for name in names)
        lengths = told["draft_length"].to_numpy(float)
        row["draft_length"] = float(lengths.max()) if not np.isnan(lengths).any() else math.ceil(drafted / steps)
        row["tokens_per_step"] = 1 + accepted / steps
        if drafted > 0:
            row["draft_acceptance_rate"] = accepted / drafted
        positions = request_metrics.position_acceptance(told)
        if positions and len(positions) <= row["draft_length"]:  # positions that no step reached are missing
            row["position_acceptance"] = positions + (0.0,) * (int(row["draft_length"]) - len(positions))
        if len(told) < row["n_requests"]:
            notes.append(f"acceptance is of {len(told)} of {row['n_requests']:.0f} requests, those kept in the report")
        return
    tokens = _successes(metrics, "iter_tokens_per_iteration").number("mean")
    if tokens >= SEVERAL:
        row["tokens_per_step"] = tokens
        notes.append(
            f"stream events hold {tokens:.3g} tokens on average, taken for tokens_per_step: the report does not say "
            "how many tokens are drafted, so give method and draft_length"
        )


def _request_metrics(source: Record) -> pd.DataFrame | None:
    """What vLLM said of the successful requests kept in the report, read by `request_metrics`; None when nothing."""
    requests = source.sub("requests").record.get("successful")
    if not isinstance(requests, list):
        return None
    known = [item for item in requests if isinstance(item, dict) and isinstance(item.get("response_metrics"), dict)]
    answers = Source("requests")
    answers.__dict__.update(kind="json", records=[(1, {"metrics": item["response_metrics"]}) for item in known])
    if not known:
        return None
    try:
        frame = request_metrics.read(answers)
    except TraceError:
        return None
    drafting = frame["drafts"].to_numpy(float) > 0
    return frame.loc[drafting] if drafting.any() else None
