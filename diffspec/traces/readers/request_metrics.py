"""Read what an engine says of single requests: vLLM's per-request metrics and SGLang's `meta_info`, one row a request.

Understood are JSON, a JSON list, JSON lines and transcripts of server-sent events (``data: {...}``) that hold
responses of the OpenAI interface with `metrics` (vLLM, ``--per-request-spec-decode-metrics summary|detailed``), the
metrics alone, GuideLLM's `response_metrics` (single ones or a whole report), batch output (`response.body`), the older
`speculative_decoding_stats` of a choice, and SGLang's responses or `meta_info`. Times become seconds.

Traps: `acceptance_histogram[j]` counts the steps that accepted exactly j drafts, so the steps that accepted position i
are its sum from i on. A step that drafted fewer than i tokens never tried position i: only the per-step arrays
("detailed") tell. Without them every step counts as having drafted the most it may, which is said where the totals show
it to be wrong. The last step accepts drafts beyond `max_tokens`, which nobody receives. `mean_itl_ms` is generation
time / (output tokens - 1), a time per token: TPOT here; the time per step is generation time / steps. Drafts that a
grammar made invalid are in no count. Requests with ``n > 1`` have no metrics.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ...results import TraceError
from ..json_text import parse_json
from ..problems import Problem
from ..source import Source
from ..table import decode

COLUMNS = (
    "request_id",
    "drafts",
    "drafted_tokens",
    "accepted_tokens",
    "draft_length",
    "accepted_at",
    "drafted_at",
    "reached_at",
    "step_drafted",
    "step_accepted",
    "step_position",
    "ttft",
    "queue_time",
    "generation_time",
    "tpot",
    "e2e_latency",
    "prompt_tokens",
    "output_tokens",
    "workload",
    "task",
    "temperature",
)
_OBJECTS = (*COLUMNS[5:11], "request_id", "workload", "task", "source_file")
_TIMES = {
    "time_to_first_token_ms": "ttft",
    "queue_time_ms": "queue_time",
    "generation_time_ms": "generation_time",
    "mean_itl_ms": "tpot",
}
_EVENT = re.compile(rb"(?m)^data: ?\{")
_DEEPEST = 4  # response > body > choices > meta_info
_LONGEST = 1000  # draft positions
_MOST = 2**53
MOST_REQUESTS = 1_000_000
"""Most requests read: about two gigabytes of memory."""


def recognises(source: Source) -> bool:
    """Whether a file holds single requests: their metrics, or a transcript of server-sent events."""
    if source.kind == "text":
        head = source.head.lstrip(b"\xef\xbb\xbf \t\r\n")
        return head.startswith((b"data:", b"event:", b"id:", b":", b"HTTP/")) and bool(_EVENT.search(head))
    return source.kind == "json" and bool(_find(source.first))


def read(source: Source) -> pd.DataFrame:
    """The requests of a file, one row each, with the columns `COLUMNS`, `source_file` and `source_row` (the line).

    `drafts`, steps that drafted; `drafted_tokens`, `accepted_tokens`; `draft_length`, the most a step may draft;
    `accepted_at`, `drafted_at`, `reached_at`, tuples over draft positions 1, 2, ...: steps that accepted the position,
    that drafted it, and that drafted it with all positions before it accepted (see `position_acceptance`);
    `step_drafted`, `step_accepted`, `step_position`, tuples over the steps that drafted, the last the number of output
    tokens before the step, all None without per-step arrays, the last also when steps without drafts lie in between;
    `ttft`, `queue_time`, `generation_time` (after the first token), `tpot`, `e2e_latency` [s], NaN where unknown. What
    cannot be used is left out and counted in ``frame.attrs["warnings"]``. Raises `TraceError` when nothing can.
    """
    rows: list[dict[str, Any]] = []
    bad: list[Problem] = []
    silent = 0
    for line, record in _records(source):
        found = _find(record)
        silent += not found
        if len(rows) + len(bad) + len(found) > MOST_REQUESTS:
            advice = "split the file"
            raise Problem("too many requests", source.file, allowed=f"up to {MOST_REQUESTS}", advice=advice).error()
        for item in found:
            try:
                rows.append({**_row(item), "source_file": source.file, "source_row": line})
            except _Unusable as error:
                bad.append(Problem(str(error), source.file, line, error.key, error.got))
    if not rows:
        if bad:
            raise bad[0].error()
        advice = "start vLLM with --per-request-spec-decode-metrics detailed, or ask SGLang for meta_info"
        raise Problem("no request of this file has metrics", source.file, advice=advice).error()
    frame = pd.DataFrame(rows, columns=[*COLUMNS, "source_file", "source_row"])
    for name in _OBJECTS:  # None where missing
        frame[name] = pd.Series([row[name] for row in rows], dtype=object)
    frame.attrs["warnings"] = _warnings(source.file, frame, bad, silent)
    frame.attrs["problems"] = []
    return frame


def position_acceptance(frame: pd.DataFrame) -> tuple[float, ...]:
    """Conditional acceptance ``a_i = sum of accepted_at[i] / sum of reached_at[i]`` over the requests of `frame`; it
    ends before the first position that no step reached.

    >>> position_acceptance(pd.DataFrame({"accepted_at": [(6, 3), (2,)], "reached_at": [(8, 6), (2,)]}))
    (0.8, 0.5)
    """
    accepted, reached = _pooled(frame["accepted_at"]), _pooled(frame["reached_at"])
    known = np.cumprod(reached > 0).astype(bool)
    return tuple(float(value) for value in accepted[known] / reached[known])


def steps(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a drafting step of the requests with per-step arrays: `request` (its place in `frame`), `step` (from 1),
    `position` (output tokens before it, NaN when unknown), `drafted`, `accepted` [tok].

    >>> one = {"step_drafted": [(2, 2)], "step_accepted": [(2, 0)], "step_position": [(1, 4)]}
    >>> steps(pd.DataFrame(one)).to_numpy().tolist()
    [[0.0, 1.0, 1.0, 2.0, 2.0], [0.0, 2.0, 4.0, 2.0, 0.0]]
    """
    parts = []
    for request, (drafted, accepted, position) in enumerate(
        zip(frame["step_drafted"], frame["step_accepted"], frame["step_position"], strict=True)
    ):
        if isinstance(drafted, tuple) and drafted:
            where = position if isinstance(position, tuple) else [math.nan] * len(drafted)
            columns = [np.full(len(drafted), request), np.arange(1, len(drafted) + 1), where, drafted, accepted]
            parts.append(np.array(columns, float).T)
    values = np.concatenate(parts) if parts else np.zeros((0, 5))
    return pd.DataFrame(values, columns=["request", "step", "position", "drafted", "accepted"])


def _pooled(counts: Iterable) -> np.ndarray:
    known = [item for item in counts if isinstance(item, tuple)]
    total = np.zeros(max(map(len, known), default=0))
    for item in known:
        total[: len(item)] += item
    return total


class _Unusable(Exception):
    """A request whose numbers cannot be used."""

    def __init__(self, message: str, key: str | None = None, got: Any = None):
        super().__init__(message)
        self.key, self.got = key, got


def _records(source: Source) -> Iterator[tuple[int, Any]]:
    """JSON values with their lines. Of a transcript: the last event of each response that has metrics, with the usage
    of its other events."""
    if source.kind == "json":
        for line, record in source.records:
            yield from ((line, request) for request in _requests(record))
        return
    responses: dict[Any, tuple[int, dict[str, Any]]] = {}
    for line, text in enumerate(decode(source.data, source.file).split("\n"), start=1):
        content = text.removeprefix("data:").strip() if text.startswith("data:") else ""
        if not content.startswith("{"):  # [DONE], comments, names of events
            continue
        try:
            event = parse_json(content, source.file)[0][1]
        except TraceError as error:
            raise Problem(str(error), source.file, line, advice="the transcript may be cut off").error() from None
        name = event.get("id") if isinstance(event.get("id"), str) else None
        before = responses.get(name, (line, {}))[1]
        found = bool(_find(event))
        merged = {**before, **event} if found or not _find(before) else {**event, **before}
        if isinstance(event.get("usage"), dict):
            merged["usage"] = event["usage"]
        responses[name] = (line if found else responses.get(name, (line, {}))[0], merged)
    yield from responses.values()


def _requests(record: Any) -> list[Any]:
    """The successful requests of a GuideLLM report; of anything else the record itself."""
    benchmarks = record.get("benchmarks") if isinstance(record, dict) else None
    if not isinstance(benchmarks, list):
        return [record]
    held = [item.get("requests") for item in benchmarks if isinstance(item, dict)]
    lists = [item.get("successful") if isinstance(item, dict) else item for item in held]
    return [request for requests in lists if isinstance(requests, list) for request in requests]


def _find(record: Any, depth: int = 0) -> list[dict[str, Any]]:
    """The metrics in a record, each ``{"kind", "metrics", "record"}`` with the response it came with."""
    if not isinstance(record, dict) or depth > _DEEPEST:
        return []
    if any(key in record for key in ("spec_verify_ct", "spec_accept_length")) or (
        "completion_tokens" in record and "e2e_latency" in record
    ):
        return [{"kind": "sglang", "metrics": record, "record": record}]
    if "acceptance_histogram" in record or "num_spec_steps" in record:
        return [{"kind": "vllm", "metrics": {"speculative_decoding": record}, "record": {}}]
    if "speculative_decoding" in record or len(set(_TIMES) & set(record)) >= 2:
        return [{"kind": "vllm", "metrics": record, "record": {}}]
    found: list[dict[str, Any]] = []
    for key in ("metrics", "response_metrics", "meta_info", "speculative_decoding_stats", "response", "body"):
        found += _find(record.get(key), depth + 1)
    if not found and isinstance(record.get("choices"), list):
        for choice in record["choices"][:_LONGEST]:
            found += _find(choice, depth + 1)
    if len(found) == 1:  # the fields of the outer record count where the inner one lacks them
        outer = {key: value for key, value in record.items() if key not in ("choices", "metrics", "response_metrics")}
        found[0]["record"] = {**outer, **found[0]["record"]}
    return found


def _row(found: dict[str, Any]) -> dict[str, Any]:
    metrics, record = found["metrics"], found["record"]
    usage = record.get("usage") if isinstance(record.get("usage"), dict) else {}
    request = record.get("request") if isinstance(record.get("request"), dict) else {}
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    for name, value in (
        ("request_id", record.get("id", record.get("request_id"))),
        ("workload", record.get("workload")),
        ("task", record.get("task")),
    ):
        row[name] = value if isinstance(value, str) else None
    row["temperature"] = _number(record if "temperature" in record else request, "temperature", 1.0)
    source = metrics if found["kind"] == "sglang" else usage
    if not source and "output_tokens" in record:  # GuideLLM
        source = {"prompt_tokens": record.get("prompt_tokens"), "completion_tokens": record["output_tokens"]}
    row["prompt_tokens"] = _number(source, "prompt_tokens", 1.0)
    row["output_tokens"] = _number(source, "completion_tokens", 1.0)
    for key, name in _TIMES.items():
        row[name] = _number(metrics, key, 1e-3)
    row["e2e_latency"] = row["ttft"] + row["generation_time"]
    if found["kind"] == "sglang":
        row["e2e_latency"] = _number(metrics, "e2e_latency", 1.0)
        row["queue_time"] = _number(metrics, "queue_time", 1.0)
        names = (
            "spec_verify_ct",
            "spec_num_proposed_drafts",
            "spec_num_correct_drafts",
            "spec_correct_drafts_histogram",
        )
        _speculation(row, metrics, names, math.nan)
    elif metrics.get("speculative_decoding") is not None:
        spec = metrics["speculative_decoding"]
        if not isinstance(spec, dict):
            raise _Unusable("an object is needed", "speculative_decoding", spec)
        names = ("num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens", "acceptance_histogram")
        _speculation(row, spec, names, _number(spec, "num_spec_tokens", 1.0))
    else:
        for name in ("drafts", "drafted_tokens", "accepted_tokens", "draft_length"):
            row[name] = math.nan
    return row


def _speculation(row: dict[str, Any], spec: dict[str, Any], names: Sequence[str], longest: float) -> None:
    drafts, drafted, accepted = (_number(spec, name, 1.0) for name in names[:3])
    histogram = _histogram(spec, names[3])
    tried, kept = _counts(spec, "per_step_drafted"), _counts(spec, "per_step_accepted")
    if (tried is None) != (kept is None) or (tried is not None and kept is not None and len(tried) != len(kept)):
        raise _Unusable("the per-step arrays differ in length", "per_step_drafted", spec.get("per_step_drafted"))
    if tried is not None and kept is not None and any(b > a for a, b in zip(tried, kept, strict=True)):
        raise _Unusable("a step accepted more than it drafted", "per_step_accepted", spec.get("per_step_accepted"))
    shown = drafted / drafts if drafts > 0 and not math.isnan(drafted) else 0.0
    length = (
        int(longest) if not math.isnan(longest) else max(len(histogram or ()) - 1, *(tried or (0,)), math.ceil(shown))
    )
    if length > _LONGEST:
        raise _Unusable(f"at most {_LONGEST} drafted tokens a step can be read", None, length)
    if tried is not None and kept is not None:
        emitted = np.cumsum([1, *(np.array(kept) + 1)])[:-1] if kept else np.zeros(0, int)
        speculative = [at for at, count in enumerate(tried) if count > 0]
        steps_tried, steps_kept = [tried[at] for at in speculative], [kept[at] for at in speculative]
        row["step_drafted"], row["step_accepted"] = tuple(steps_tried), tuple(steps_kept)
        spare = row["output_tokens"] - 1 - sum(count + 1 for count in kept)
        if not spare > 0:  # else steps without drafts, which are not listed, lie in between
            row["step_position"] = tuple(int(emitted[at]) for at in speculative)
        positions = range(1, max([length, *steps_tried]) + 1)
        row["accepted_at"] = tuple(sum(b >= i for b in steps_kept) for i in positions)
        row["drafted_at"] = tuple(sum(a >= i for a in steps_tried) for i in positions)
        pairs = list(zip(steps_tried, steps_kept, strict=True))
        row["reached_at"] = tuple(sum(a >= i and b >= i - 1 for a, b in pairs) for i in positions)
        if not math.isnan(drafts) and drafts not in (len(tried), len(steps_tried)):
            raise _Unusable("the per-step arrays do not add up to the steps", names[0], spec.get(names[0]))
        drafts, drafted, accepted = len(steps_tried), sum(steps_tried), sum(steps_kept)
    elif histogram is not None:
        counted, gained = sum(histogram), sum(j * count for j, count in enumerate(histogram))
        if (not math.isnan(drafts) and counted != drafts) or (not math.isnan(accepted) and gained != accepted):
            raise _Unusable(
                "the histogram does not add up to the steps and accepted tokens", names[3], spec.get(names[3])
            )
        drafts, accepted = counted, gained
        survivors = [sum(histogram[i:]) for i in range(max(length, len(histogram) - 1) + 1)]
        row["accepted_at"], row["reached_at"] = tuple(survivors[1:]), tuple(survivors[:-1])
        row["drafted_at"] = (counted,) * len(survivors[1:])
    if not math.isnan(drafted) and not math.isnan(accepted) and accepted > drafted:
        raise _Unusable("more tokens were accepted than drafted", names[2], spec.get(names[2]))
    row["drafts"], row["drafted_tokens"], row["accepted_tokens"] = float(drafts), float(drafted), float(accepted)
    row["draft_length"] = float(length) if length else math.nan


def _number(record: dict[str, Any], key: str, factor: float) -> float:
    value = record.get(key)
    if value is None:
        return math.nan
    if type(value) not in (int, float) or not -_MOST < value < _MOST or value < 0:
        raise _Unusable("a number, at least 0, is needed", key, value)
    return float(value) * factor


def _counts(record: dict[str, Any], key: str) -> list[int] | None:
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= _LONGEST for item in value):
        raise _Unusable(f"a list of whole numbers from 0 to {_LONGEST} is needed", key, value)
    return value


def _histogram(record: dict[str, Any], key: str) -> list[int] | None:
    """A dense list of counts; the sparse map of earlier versions becomes one."""
    value = record.get(key)
    if isinstance(value, dict):
        try:
            pairs = {int(j): count for j, count in value.items()}
        except ValueError:
            pairs = {-1: 0}
        if not all(0 <= j <= _LONGEST for j in pairs):
            raise _Unusable("a map from accepted tokens to steps is needed", key, value)
        value = [pairs.get(j, 0) for j in range(max(pairs, default=0) + 1)]
    if value is None or value == []:
        return None
    if not isinstance(value, list) or len(value) > _LONGEST + 1:
        raise _Unusable("a list of counts is needed", key, value)
    if not all(type(item) is int and 0 <= item < _MOST for item in value):
        raise _Unusable("a list of whole numbers, at least 0, is needed", key, value)
    return value


def _warnings(file: str, frame: pd.DataFrame, bad: list[Problem], silent: int) -> list[str]:
    told = [f"{len(bad)} of {len(bad) + len(frame)} requests left out, the first: {bad[0].line()}"] if bad else []
    if silent:
        told.append(f"{file}: {silent} records have no metrics and are left out")
    columns = [frame[name] for name in ("accepted_at", "step_drafted", "drafts", "draft_length", "drafted_tokens")]
    summed = [
        drafts * length - drafted
        for at, tried, drafts, length, drafted in zip(*columns, strict=True)
        if isinstance(at, tuple) and not isinstance(tried, tuple)
    ]
    short = sum(missing > 0.5 for missing in summed)
    if short:
        told.append(
            f"{file}: in {short} of {len(summed)} requests drafts vary in length and no per-step arrays say how: their "
            "later positions count as tried in every step, so acceptance there is a lower bound"
        )
    lost = sum(
        isinstance(tried, tuple) and len(tried) > 0 and not isinstance(position, tuple)
        for tried, position in zip(frame["step_drafted"], frame["step_position"], strict=True)
    )
    if lost:
        told.append(f"{file}: in {lost} requests steps without drafts lie between the others: no output positions")
    return told
