"""What happened between two scrapes of `/metrics`: counters differenced, and from them an operating point.

Means are exact, ``(sum after - sum before) / (count after - count before)``; percentiles are read off the buckets of a
histogram by linear interpolation, as Prometheus does, and are only as fine as the buckets. Everything in a window
counts: warm-up, other clients, requests that began before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..problems import Problem
from ..schema import PERCENTILES
from .prometheus import Histogram, Snapshot

_FAILED = ("abort", "error")
FEWEST_SCRAPES = 3
"""Scrapes during the load below which the gauges say too little to be averaged."""


@dataclass(frozen=True)
class Counters:
    """Counts over a window, named as in `Snapshot`. `duration` [s] between the two scrapes, None where unknown."""

    engine: str
    duration: float | None
    counters: dict[str, float]
    accepted_at: tuple[float, ...]
    finished: dict[str, float]
    histograms: dict[str, Histogram]
    notes: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    file: str = ""

    @property
    def failed(self) -> float:
        """Requests that were aborted or ended in an error."""
        return sum(self.finished.get(reason, 0.0) for reason in _FAILED)

    @property
    def completed(self) -> float:
        """Requests that finished as they should; where the engine counts none, those with an end-to-end latency."""
        if self.finished:
            return sum(value for reason, value in self.finished.items() if reason not in _FAILED)
        return self.histograms["e2e"].count if "e2e" in self.histograms else math.nan


def difference(before: Snapshot, after: Snapshot) -> Counters:
    """The counts from `before` to `after`. What `before` lacks starts at zero: engines add labels when first used.

    Scrapes in the wrong order are turned round with a note. Raises `TraceError` when the server restarted in between
    (counters fell, or its process started at another time), or when the two are not of one server.

    >>> from .prometheus import parse
    >>> first, last = (parse(f"vllm:generation_tokens_total {n}\\n")[0] for n in (100, 164))
    >>> difference(first, last).counters
    {'generation_tokens': 64.0}
    >>> difference(last, first).notes
    ('counters fell: the scrapes are taken to be in the wrong order',)
    """
    notes: list[str] = []
    if before.engine != after.engine or (before.models and after.models and before.models != after.models):
        got = f"{before.engine} {', '.join(before.models)} and {after.engine} {', '.join(after.models)}"
        raise Problem("the two scrapes are not of one server", after.file, after.row, got=got).error()
    first, last = before.totals(), after.totals()
    fell = sorted(name for name, value in first.items() if last.get(name, 0.0) < value)
    grew = any(value > first.get(name, 0.0) for name, value in last.items())
    times = (before.time, after.time)
    backwards = times[0] is not None and times[1] is not None and times[1] < times[0]
    same = before.started is None or after.started is None or abs(before.started - after.started) < 1.0
    if not same or (fell and grew) or (fell and times[0] is not None and times[1] is not None and not backwards):
        what = f"{fell[0]} fell from {first[fell[0]]:g} to {last.get(fell[0], 0.0):g}" if fell else None
        advice = "scrape before and after a run of one server process"
        raise Problem(
            "the server was restarted between the scrapes", after.file, after.row, None, what, None, advice
        ).error()
    if fell or (backwards and not grew):
        sure = backwards or (before.started is not None and after.started is not None)
        told = "the scrapes are in the wrong order: turned round"
        notes.append(told if sure else "counters fell: the scrapes are taken to be in the wrong order")
        before, after = after, before
    elif backwards:
        raise Problem("the counters grew while the time of the scrapes ran backwards", after.file, after.row).error()
    return Counters(
        engine=after.engine,
        duration=after.time - before.time if before.time is not None and after.time is not None else None,
        counters={name: value - before.counters.get(name, 0.0) for name, value in after.counters.items()},
        accepted_at=tuple(
            value - (before.accepted_at[index] if index < len(before.accepted_at) else 0.0)
            for index, value in enumerate(after.accepted_at)
        ),
        finished={reason: value - before.finished.get(reason, 0.0) for reason, value in after.finished.items()},
        histograms={name: _subtract(item, before.histograms.get(name)) for name, item in after.histograms.items()},
        notes=tuple(notes),
        models=after.models,
        file=after.file,
    )


def _subtract(after: Histogram, before: Histogram | None) -> Histogram:
    if before is None:
        return after
    earlier = dict(before.buckets)
    buckets = tuple((bound, max(0.0, count - earlier.get(bound, 0.0))) for bound, count in after.buckets)
    return Histogram(max(0.0, after.sum - before.sum), after.count - before.count, buckets)


def percentile(histogram: Histogram, share: float) -> float | None:
    """The value that a `share` of the observations does not exceed, interpolated in its bucket; None without
    observations, and when it lies above the last finite bound.

    >>> percentile(Histogram(3.0, 4, ((1.0, 2), (2.0, 4), (math.inf, 4))), 0.75)
    1.5
    """
    low, high, part = _bucket(histogram, share)
    return None if math.isinf(high) else low + (high - low) * part


def _bucket(histogram: Histogram, share: float) -> tuple[float, float, float]:
    """Bounds of the bucket in which a percentile lies, and how far into its observations; infinite when unknown."""
    wanted, below, bound = share * histogram.count, 0.0, 0.0
    for upper, count in histogram.buckets if histogram.count > 0 else ():
        if count >= wanted and count > below:
            return bound, upper, (wanted - below) / (count - below)
        below, bound = max(below, count), upper
    return bound, math.inf, 0.0


def operating_point(
    before: Snapshot,
    after: Snapshot,
    between: Sequence[Snapshot] = (),
    duration: float | int | None = None,
    open_loop: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """A row of the operating-point table [s, tok, req/s] from two scrapes and those `between` them, with notes.

    ``tokens_per_step = 1 + accepted/drafts``; ``position_acceptance[i] = accepted_at[i]/accepted_at[i-1]``, with
    all drafts for position 0: an engine counts no drafts per position, so where drafts vary in length a position that
    was not drafted counts as rejected. `duration` [s] is that between the scrapes unless given; idle scrapes at both
    ends are cut off first. Counters cannot tell an open loop from a closed one: `arrival_rate` and `concurrency` stay
    empty, unless `open_loop` says that requests came by themselves; then ``arrival_rate = (finished + growth of the
    number in the system) / duration``. Raises `TraceError` like `difference`, and when nothing happened.

    >>> from .prometheus import parse
    >>> text = "vllm:spec_decode_num_drafts_total {}\\nvllm:spec_decode_num_accepted_tokens_total {}\\n"
    >>> first, last = (parse(text.format(*counts))[0] for counts in ((10, 20), (110, 180)))
    >>> operating_point(first, last)[0]["tokens_per_step"]
    2.6
    """
    before, after, between = _trim(before, after, between)
    run = difference(before, after)
    notes = [*run.notes, *before.warnings, *(line for line in after.warnings if line not in before.warnings)]
    if not any(value > 0 for value in (*run.counters.values(), *run.finished.values())):
        raise Problem(
            "nothing happened between the scrapes", run.file, advice="scrape before and after the load"
        ).error()
    if duration is None:
        duration = run.duration
    row: dict[str, Any] = {"method": None}
    if len(run.models) == 1:
        row["verifier"] = row["deployment"] = run.models[0]
    _shape(row, run, notes)
    _latencies(row, run, notes)
    _speculation(row, run, after, notes)
    if run.counters.get("preemptions") is not None:
        row["preemptions"] = run.counters["preemptions"]
    _gauges(row, [before, *between, after], notes)
    if duration is None or not (math.isfinite(duration) and duration > 0):
        notes.append("the time between the scrapes is unknown: no throughput")
        return row, notes
    row["throughput"] = run.completed / duration
    for name, of, what in (("effective_batch_size", "e2e", "in the system"), ("waiting_mean", "queue", "waiting")):
        if name not in row and of in run.histograms and run.histograms[of].sum > 0:
            row[name] = run.histograms[of].sum / duration
            notes.append(f"{name} is the time that finished requests spent {what} / duration (Little's law), no gauge")
    if open_loop:
        growth = sum(after.gauges.get(name, 0.0) - before.gauges.get(name, 0.0) for name in ("running", "waiting"))
        row["arrival_rate"] = (run.completed + run.failed + growth) / duration
    else:
        notes.append("counters do not tell an open loop from a closed one: give arrival_rate or concurrency")
    return row, notes


def _trim(before: Snapshot, after: Snapshot, between: Sequence[Snapshot]) -> tuple[Snapshot, Snapshot, list[Snapshot]]:
    """Without the scrapes of the idle time before the load began and after it ended."""

    def idle_as(scrape: Snapshot, edge: Snapshot) -> bool:
        return scrape.totals() == edge.totals() and not any(scrape.gauges.get(key) for key in ("running", "waiting"))

    inner = list(between)
    while inner and idle_as(inner[0], before):
        before = inner.pop(0)
    while inner and idle_as(inner[-1], after):
        after = inner.pop()
    return before, after, inner


def _shape(row: dict[str, Any], run: Counters, notes: list[str]) -> None:
    completed = run.completed
    if not math.isnan(completed):
        row["n_requests"], row["failed"] = completed, run.failed
        if run.failed:
            notes.append(f"{run.failed:g} requests failed, and the engine's histograms hold them too")
    for name, counter in (("prompt_length", "prompt_tokens"), ("output_length", "generation_tokens")):
        seen = run.histograms.get(name)
        if seen is not None and seen.count > 0:
            row[name] = seen.sum / seen.count
        elif counter in run.counters and completed > 0:
            row[name] = run.counters[counter] / completed


def _latencies(row: dict[str, Any], run: Counters, notes: list[str]) -> None:
    widest = (0.0, "")
    for metric in ("ttft", "itl", "tpot", "e2e"):
        seen = run.histograms.get(metric)
        if seen is None or seen.count <= 0:
            continue
        row[f"{metric}_mean"] = seen.sum / seen.count
        for name in PERCENTILES:
            value = percentile(seen, int(name[1:]) / 100)
            if value is not None:
                row[f"{metric}_{name}"] = value
                low, high, _ = _bucket(seen, int(name[1:]) / 100)
                widest = max(widest, ((high - low) / high, f"{metric}_{name} lies between {low:g} and {high:g} s"))
    if widest[1]:
        notes.append(f"percentiles are interpolated in the buckets of the engine's histograms, at worst: {widest[1]}")
    gap = run.histograms.get("token_gap")
    if gap is not None and gap.count > 0:
        row["tpot_mean"] = gap.sum / gap.count
        notes.append("SGLang counts one gap a token: tpot_mean is over tokens, not requests")
        if run.counters.get("drafts", 0.0) > 0:
            row["itl_mean"] = gap.sum / run.counters["drafts"]


def _speculation(row: dict[str, Any], run: Counters, after: Snapshot, notes: list[str]) -> None:
    counts = run.counters
    if "emitted_v0" in counts:
        # Its acceptance counters are running totals added up again at each log, and count tokens after a rejection too.
        notes.append(
            "vLLM's V0 engine counts no drafts: tokens_per_step is output tokens / stream events, no acceptance"
        )
        tokens, events = run.histograms.get("output_length"), run.histograms.get("itl")
        if tokens is not None and events is not None and events.count > 0:
            row["tokens_per_step"] = max(1.0, (tokens.sum - tokens.count) / events.count)
        return
    if "drafts" not in counts:
        if run.engine == "vllm":
            row["method"], row["draft_length"] = "none", 0
        return
    drafts = counts["drafts"]
    if drafts <= 0:
        notes.append("the drafter never drafted: no acceptance is known")
        return
    if run.engine == "sglang":
        if "generation_tokens" in counts and not math.isnan(run.completed):
            row["tokens_per_step"] = max(1.0, (counts["generation_tokens"] - run.completed) / drafts)
        if after.gauges.get("draft_steps", 0.0) > 0:
            row["draft_length"] = round(after.gauges["draft_steps"])
        else:
            notes.append("SGLang does not say how many tokens it drafts: give draft_length")
        return
    drafted, accepted = counts.get("draft_tokens", 0.0), counts.get("accepted")
    if accepted is None:
        notes.append("drafts are counted, accepted tokens are not: no acceptance is known")
        return
    row["tokens_per_step"] = 1 + accepted / drafts
    if drafted > 0:
        row["draft_acceptance_rate"] = accepted / drafted
        ratio = drafted / drafts
        whole = abs(ratio - round(ratio)) < 1e-6
        row["draft_length"] = round(ratio) if whole else max(len(run.accepted_at), math.ceil(ratio))
        if not whole:
            notes.append(f"drafts vary in length, {ratio:.3g} tokens on average; draft_length {row['draft_length']}")
    reached = (drafts, *run.accepted_at)
    if run.accepted_at:
        kept = range(min(len(run.accepted_at), row.get("draft_length", len(run.accepted_at))))
        row["position_acceptance"] = tuple(
            min(1.0, reached[i + 1] / reached[i]) if reached[i] > 0 else 0.0 for i in kept
        )
        if accepted > 0 and abs(sum(run.accepted_at) - accepted) > 0.02 * accepted:
            notes.append(f"{accepted:g} tokens were accepted, but {sum(run.accepted_at):g} over the positions")
    events = run.histograms["itl"].count if "itl" in run.histograms else 0.0
    if drafts < 0.995 * events:
        row["draft_probability"] = drafts / events


def _gauges(row: dict[str, Any], scrapes: list[Snapshot], notes: list[str]) -> None:
    """Means over time of the gauges: by trapezoids where the times are known, else of the scrapes inside."""
    inside = scrapes[1:-1]
    if len(inside) < FEWEST_SCRAPES:
        if inside:
            notes.append(f"{len(inside)} scrapes during the load are too few to average the gauges")
        return
    times = np.array([math.nan if scrape.time is None else scrape.time for scrape in scrapes])
    timed = not np.isnan(times).any() and times[-1] > times[0]

    def mean(*names: str) -> float | None:
        if not all(name in scrape.gauges for scrape in scrapes for name in names):
            return None
        values = np.array([sum(scrape.gauges[name] for name in names) for scrape in scrapes])
        if timed:
            return float(np.trapezoid(values, times) / (times[-1] - times[0]))
        return float(values[1:-1].mean())

    for name, gauges in (
        ("effective_batch_size", ("running", "waiting")),
        ("waiting_mean", ("waiting",)),
        ("kv_usage_mean", ("kv_usage",)),
    ):
        value = mean(*gauges)
        if value is not None:
            row[name] = min(1.0, value) if name == "kv_usage_mean" else value
    notes.append(f"gauges averaged over {len(inside)} scrapes during the load")
