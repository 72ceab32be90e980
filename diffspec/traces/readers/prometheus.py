"""Read the text that `/metrics` of vLLM or SGLang answers: one scrape, or several one after another, as `Snapshot`s.

A scrape alone says little: counters run since the server started. `counters` differences two of them over a run.
Several scrapes in one file are a series; a line ``# scrape <unix time>`` stands before each. Known names: vLLM 0.9 to
0.33 (the V0 engine's too) and SGLang 0.5; other families are passed over, so a file may hold anything besides.

Traps: `*_created` gauges share the prefix of a counter and are no counts. SGLang repeats the numbers of a scheduler for
each tensor, pipeline and expert rank: they count once. Counters add up over engines and models (said when there are
several models), `kv_usage` is their mean. `vllm:iteration_tokens_total` is a histogram in spite of its name, and
`vllm:time_per_output_token_seconds` (before 0.11) is the gap between stream events: ITL, not TPOT.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from ..problems import Problem
from ..source import Source
from .json_record import LARGEST

MARK = re.compile(r"#\s*scrape\b\s*(\S*)")
_HEAD = re.compile(rb"(?m)^(# (HELP|TYPE) )?(vllm|sglang):\w")
_RANKS = ("tp_rank", "pp_rank", "moe_ep_rank")
_SUMMED = ("le", "position", "finished_reason", *_RANKS)

COUNTERS = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted_at",
    "vllm:spec_decode_num_emitted_tokens": "emitted_v0",
    "vllm:prompt_tokens": "prompt_tokens",
    "vllm:generation_tokens": "generation_tokens",
    "vllm:num_preemptions": "preemptions",
    "vllm:prefix_cache_queries": "prefix_queries",
    "vllm:prefix_cache_hits": "prefix_hits",
    "vllm:gpu_prefix_cache_queries": "prefix_queries",
    "vllm:gpu_prefix_cache_hits": "prefix_hits",
    "vllm:request_success": "finished",
    "sglang:spec_verify_calls": "drafts",
    "sglang:prompt_tokens": "prompt_tokens",
    "sglang:generation_tokens": "generation_tokens",
    "sglang:num_retracted_requests": "preemptions",
    "sglang:cached_tokens": "prefix_hits",
    "sglang:num_requests": "finished",
    "sglang:num_aborted_requests": "aborted",
}
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": "ttft",
    "vllm:inter_token_latency_seconds": "itl",
    "vllm:time_per_output_token_seconds": "itl",
    "vllm:request_time_per_output_token_seconds": "tpot",
    "vllm:e2e_request_latency_seconds": "e2e",
    "vllm:request_queue_time_seconds": "queue",
    "vllm:request_prefill_time_seconds": "prefill",
    "vllm:request_decode_time_seconds": "decode",
    "vllm:request_inference_time_seconds": "inference",
    "vllm:request_prompt_tokens": "prompt_length",
    "vllm:request_generation_tokens": "output_length",
    "vllm:iteration_tokens_total": "iteration_tokens",
    "sglang:time_to_first_token_seconds": "ttft",
    "sglang:inter_token_latency_seconds": "token_gap",
    "sglang:e2e_request_latency_seconds": "e2e",
    "sglang:queue_time_seconds": "queue",
    "sglang:prompt_tokens_histogram": "prompt_length",
    "sglang:generation_tokens_histogram": "output_length",
}
GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:gpu_cache_usage_perc": "kv_usage",
    "sglang:num_running_reqs": "running",
    "sglang:num_queue_reqs": "waiting",
    "sglang:token_usage": "kv_usage",
    "sglang:spec_num_steps": "draft_steps",
    "process_start_time_seconds": "started",
}
_NOT_SUMMED = {"kv_usage", "draft_steps"}
# What a name on the wire is. Engines in transition give a number under an old and a new name: the first here counts.
_ORDER = {name: order for order, name in enumerate((*COUNTERS, *HISTOGRAMS, *GAUGES))}
_WIRE = {f"{n}{tail}": ("counter", key, "", n) for n, key in COUNTERS.items() for tail in ("", "_total")}
_WIRE |= {n: ("gauge", key, "", n) for n, key in GAUGES.items()}
_WIRE |= {
    f"{n}_{part}": ("histogram", key, part, n) for n, key in HISTOGRAMS.items() for part in ("bucket", "sum", "count")
}


@dataclass(frozen=True)
class Histogram:
    """Observations: their `sum` [s or tok], their `count`, and `buckets`, pairs (upper bound, how many at or below)."""

    sum: float
    count: float
    buckets: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """One scrape. `engine`, "vllm" or "sglang"; `time` and `started`, of the scrape and of the server process [unix s],
    None where unknown; `counters` (`drafts`, `draft_tokens`, `accepted`, `prompt_tokens`, `generation_tokens`,
    `preemptions`, `prefix_queries`, `prefix_hits`), only those the engine has; `accepted_at`, accepted tokens at each
    draft position; `finished`, requests by reason ("stop", "length", "abort", "error", ...; of SGLang "finished" and
    "abort"); `histograms` (`ttft`, `itl`, `tpot`, `e2e`, `queue`, `prefill`, `decode`, `inference` [s],
    `prompt_length`, `output_length`, `iteration_tokens` [tok]; of SGLang `token_gap` [s], one entry a token);
    `gauges` (`running`, `waiting` [req], `kv_usage` [1]); `models`, their names; `file` and `row`, where it starts.
    """

    engine: str
    time: float | None = None
    started: float | None = None
    counters: dict[str, float] = field(default_factory=dict)
    accepted_at: tuple[float, ...] = ()
    finished: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    file: str = ""
    row: int = 1
    warnings: tuple[str, ...] = ()

    def totals(self) -> dict[str, float]:
        """Everything that only grows while the server lives."""
        counts = {f"{name} histogram": item.count for name, item in self.histograms.items()}
        reasons = {f"requests finished ({name})": value for name, value in self.finished.items()}
        at = {f"accepted at position {index}": value for index, value in enumerate(self.accepted_at, start=1)}
        return {**self.counters, **reasons, **at, **counts}


def recognises(source: Source) -> bool:
    """Whether a file is an exposition of vLLM or SGLang."""
    return source.kind == "text" and bool(_HEAD.search(source.head))


def read(source: Source) -> list[Snapshot]:
    """The scrapes of a file, in its order. Raises `TraceError` when it holds none, or a line cannot be read."""
    return parse(source.text, source.file)


def parse(text: str, file: str = "the text") -> list[Snapshot]:
    """The scrapes in `text`; `file` names it in messages. A last line without its end is left out with a warning.

    >>> first, second = parse('''# scrape 100
    ... vllm:generation_tokens_total{engine="0"} 7
    ... vllm:generation_tokens_total{engine="1"} 5
    ... # scrape 101.5
    ... vllm:generation_tokens_total{engine="0"} 9
    ... vllm:generation_tokens_total{engine="1"} 8
    ... ''')
    >>> first.counters, second.time, second.counters
    ({'generation_tokens': 12.0}, 101.5, {'generation_tokens': 17.0})
    """
    lines = text.replace("\r\n", "\n").split("\n")
    cut = lines.pop()
    warnings = []
    if cut.strip():
        warnings.append(f"{file}: the last line has no end and is left out: the file may be cut off")
    block, found = _Block(1, None), []
    places: dict[str, _Place] = {}  # the same names come again in every scrape
    for row, line in enumerate(lines, start=1):
        if line.startswith("#"):
            mark = MARK.match(line)
            if mark:
                found += block.snapshots(file, tuple(warnings))
                block = _Block(row, _time(mark[1], file, row))
            continue
        words = line.split("{", 1)[0].split(None, 1)
        wire = _WIRE.get(words[0]) if words else None
        if wire is None:
            continue
        try:
            name, value, stamp = _split(line)
            if name not in places:
                places[name] = _place(wire, name)
            block.engines.add(line.split(":", 1)[0])
            block.add(name, places[name], value, stamp)
        except _Twice:
            advice = "put a line '# scrape <unix time>' before each scrape, or give one file for each"
            raise Problem(
                "the same number comes twice in one scrape", file, row, got=line, advice=advice
            ).error() from None
        except (ValueError, IndexError, OverflowError, RecursionError, StopIteration):
            raise Problem("not a line of a Prometheus exposition", file, row, got=line).error() from None
    found += block.snapshots(file, tuple(warnings))
    if not found:
        advice = "scrape http://SERVER/metrics of vLLM, or of SGLang started with --enable-metrics"
        raise Problem("no counter of vLLM or SGLang has a value", file, advice=advice).error()
    return found


def _split(line: str) -> tuple[str, float, float | None]:
    """A line as its name with labels, its value, and its time [unix s] where it has one."""
    end = line.rfind("}") + 1 or len(line.split(None, 1)[0])
    value, *stamps = line[end:].split()
    if len(stamps) > 1 or "_" in value:
        raise ValueError(line)
    return line[:end], float(value), float(stamps[0]) / 1000 if stamps else None


@dataclass(frozen=True)
class _Place:
    """Where the value of a name with its labels belongs: a cell, and within it the labels that are added up."""

    cell: tuple[str, str, str, Any, str]
    group: tuple
    model: str | None


def _place(wire: tuple[str, str, str, str], text: str) -> _Place:
    from prometheus_client.parser import text_string_to_metric_families

    kind, key, part, name = wire
    labels = next(item for family in text_string_to_metric_families(f"{text} 0") for item in family.samples).labels
    place: Any = None
    if part == "bucket":
        place = float(labels.get("le", "nan"))
        if math.isnan(place):
            raise ValueError(text)
    elif key == "accepted_at":
        place = int(labels.get("position", "x"))
        if not 0 <= place < 1000:
            raise ValueError(text)
    elif key == "finished":
        place = labels.get("finished_reason", "finished")
    group = tuple(sorted(item for item in labels.items() if item[0] not in _SUMMED))
    return _Place((kind, key, part, place, name), group, labels.get("model_name"))


class _Twice(Exception):
    """One number, with the same labels, twice in a scrape."""


def _time(text: str, file: str, row: int) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= LARGEST:
        raise Problem("the time of the scrape", file, row, got=text, allowed="unix seconds").error()
    return value


class _Block:
    """The samples of one scrape, gathered by what they are, then by labels."""

    def __init__(self, row: int, time: float | None):
        self.row, self.time = row, time
        self.stamp: float | None = None
        self.cells: dict[tuple[str, str, str, Any, str], dict[tuple, float]] = {}
        self.seen: set[str] = set()
        self.models: set[str] = set()
        self.engines: set[str] = set()

    def add(self, text: str, place: _Place, value: float, stamp: float | None) -> None:
        if place.cell[0] == "gauge" and math.isnan(value):
            return
        if not 0 <= value <= LARGEST or not 0 <= (stamp or 0.0) <= LARGEST:
            raise ValueError(value)
        value = value if value * LARGEST >= 1 else 0.0
        if text in self.seen:
            raise _Twice
        self.seen.add(text)
        cell = self.cells.setdefault(place.cell, {})
        cell[place.group] = max(cell.get(place.group, 0.0), value)  # ranks repeat what their scheduler counted
        self.stamp = self.stamp if stamp is None else stamp
        if place.model:
            self.models.add(place.model)

    def snapshots(self, file: str, warnings: tuple[str, ...]) -> list[Snapshot]:
        """The scrape, or nothing where no engine has a value in it."""
        return [self._snapshot(file, warnings)] if self.engines & {"vllm", "sglang"} else []

    def _snapshot(self, file: str, warnings: tuple[str, ...]) -> Snapshot:
        totals: dict[tuple, float] = {}
        first: dict[str, str] = {}
        for _, key, _, _, name in self.cells:
            first[key] = min(first.get(key, name), name, key=lambda item: _ORDER[item])
        for (*what, name), cell in self.cells.items():
            if name != first[what[1]]:
                continue
            mean = what[1] in _NOT_SUMMED
            totals[tuple(what)] = sum(cell.values()) / len(cell) if mean else sum(cell.values())
        plain = {what[1]: value for what, value in totals.items() if what[0] == "counter" and what[3] is None}
        gauges = {what[1]: value for what, value in totals.items() if what[0] == "gauge"}
        at = {what[3]: value for what, value in totals.items() if what[1] == "accepted_at"}
        finished = {what[3]: value for what, value in totals.items() if what[1] == "finished"}
        if "aborted" in plain:
            finished["abort"] = plain.pop("aborted")
        names = sorted({what[1] for what in totals if what[0] == "histogram"})
        if len(self.models) > 1:
            told = f"{file}, row {self.row}: the counters of {len(self.models)} models are added up"
            warnings = (*warnings, told)
        engines = sorted(self.engines & {"vllm", "sglang"})
        if len(engines) > 1:
            raise Problem("counters of vLLM and of SGLang in one scrape", file, self.row, allowed="one engine").error()
        return Snapshot(
            engine=engines[0],
            time=self.time if self.time is not None else self.stamp,
            started=gauges.pop("started", None),
            counters=plain,
            accepted_at=tuple(at.get(index, 0.0) for index in range(max(at, default=-1) + 1)),
            finished=finished,
            histograms={name: made for name in names if (made := _histogram(totals, name)) is not None},
            gauges=gauges,
            models=tuple(sorted(self.models)),
            file=file,
            row=self.row,
            warnings=warnings,
        )


def _histogram(totals: dict[tuple, float], name: str) -> Histogram | None:
    total, count = totals.get(("histogram", name, "sum", None)), totals.get(("histogram", name, "count", None))
    if total is None or count is None:
        return None
    bounds = sorted((what[3], value) for what, value in totals.items() if what[:3] == ("histogram", name, "bucket"))
    return Histogram(total, count, tuple(bounds))
