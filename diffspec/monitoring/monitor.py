"""A server watched through its /metrics: scrapes in, events out, one for each window between two of them."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffspec.acceptance import MAX_DRAFT_LENGTH
from diffspec.fitting.deployment import FittedDeployment
from diffspec.monitoring.asking import Expected, expected
from diffspec.monitoring.scrapes import Scrape
from diffspec.monitoring.watching import AVERAGE_RUN_LENGTH, FEWEST, NORMAL, AcceptanceMemory, Watchman
from diffspec.monitoring.windows import LATENCIES, Window, window
from diffspec.results import InputError, TraceError
from diffspec.traces.readers.prometheus import Snapshot
from diffspec.workload import check_range

EVENTS = ("start", "window", "idle", "restart", "disorder", "unreachable")
GAP = 3.0
"""Times the usual distance between scrapes from which on a window is told to span a gap."""
KEPT = 10_000
"""Events that a monitor remembers."""
_ROW = ("arrival_rate", "throughput", "effective_batch_size", "prompt_length", "output_length", "tokens_per_step")


@dataclass
class Monitor:
    """Compares what a server does with what its fitted ``deployment`` says, scrape by scrape.

    ``draft_length``: where the engine does not tell it (SGLang), else None; ``max_draft_length``: the longest that is
    advised; ``closed_loop``: ask the model at the measured number in the system instead of the arrival rate;
    ``average_run_length``: windows between false alarms (:mod:`diffspec.monitoring.watching`).
    """

    deployment: FittedDeployment
    draft_length: float | None = None
    max_draft_length: int = 8
    closed_loop: bool = False
    average_run_length: float = AVERAGE_RUN_LENGTH
    events: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(EVENTS, 0))
    anomalies: list[dict[str, Any]] = field(default_factory=list)
    compared: int = 0
    _last: tuple[float, Snapshot] | None = None
    _missed: int = 0
    _usual: float = math.inf
    _memories: dict[int, AcceptanceMemory] = field(default_factory=dict)
    _watchman: Watchman = field(default_factory=Watchman)

    def __post_init__(self):
        check_range("draft_length", self.draft_length, 0, MAX_DRAFT_LENGTH, low_open=False, unit="tok")
        if self.draft_length is not None and float(self.draft_length) != round(self.draft_length):
            raise InputError(f"draft_length: got {self.draft_length:g}; allowed: a whole number")
        check_range("max_draft_length", self.max_draft_length, 1, MAX_DRAFT_LENGTH, low_open=False, unit="tok")
        check_range("average_run_length", self.average_run_length, 10, 1e9, low_open=False, unit="windows")
        self._watchman = Watchman(self.average_run_length)

    def watch(self, scrapes: Iterable[Scrape]) -> Iterator[dict[str, Any]]:
        """One event for each scrape, as they come."""
        for scrape in scrapes:
            yield self.take(scrape)

    def take(self, scrape: Scrape) -> dict[str, Any]:
        """The event of one more scrape, as plain data: ``event`` (one of EVENTS), ``time`` [unix s], ``duration`` [s],
        ``measured``, ``predicted``, ``residuals``, ``acceptance``, ``anomalies``, ``standing``, ``notes``; all keys are
        always there, null where there is nothing to say."""
        event = self._event(scrape)
        self.counts[event["event"]] += 1
        self.anomalies += event["anomalies"]
        self.events = [*self.events[-(KEPT - 1) :], event]
        return event

    def summary(self) -> dict[str, Any]:
        """What the whole watch saw: counts of events, windows compared with the model, all anomalies and those that
        stand, the bias of each latency, and h with its average run length."""
        ratios: dict[str, list[float]] = {}
        for event in self.events:
            for metric, residual in (event["residuals"] or {}).items():
                ratios.setdefault(metric, []).append(residual["log_ratio"])
        return {
            "event": "summary",
            "deployment": self.deployment.name,
            "scrapes": sum(self.counts.values()),
            "events": dict(self.counts),
            "compared": self.compared,
            "bias": {metric: float(np.expm1(np.mean(values))) for metric, values in ratios.items()},
            "anomalies": self.anomalies,
            "standing": self._standing(),
            "threshold": self._watchman.limit,
            "average_run_length": float(self.average_run_length),
        }

    def _event(self, scrape: Scrape) -> dict[str, Any]:
        if scrape.snapshot is None:
            self._missed += 1
            return self._plain("unreachable", scrape.time, notes=[scrape.failure])
        before, self._last = self._last, (scrape.time, scrape.snapshot)
        missed, self._missed = self._missed, 0
        if before is None:
            return self._plain("start", scrape.time, notes=list(scrape.snapshot.warnings))
        seen = window(before[1], before[0], scrape.snapshot, scrape.time)
        notes = [f"{missed} scrapes before this one failed"] if missed else []
        if seen.kind == "disorder":
            self._last = before
            return self._plain(seen.kind, scrape.time, notes=[seen.why])
        if seen.duration > GAP * self._usual:
            notes.append(f"a gap: {seen.duration:.3g} s since the scrape before, {self._usual:.3g} s are usual")
        elif not missed:
            self._usual = seen.duration if math.isinf(self._usual) else 0.5 * (self._usual + seen.duration)
        if seen.kind != "window":
            return self._plain(seen.kind, scrape.time, seen, notes=[*notes, seen.why])
        return self._compared(seen, notes)

    def _compared(self, seen: Window, notes: list[str]) -> dict[str, Any]:
        k = self.draft_length if seen.draft_length is None else seen.draft_length
        missing = [name for name in ("prompt_length", "output_length") if name not in seen.row]
        if k is None or missing:
            lacks = f"the engine does not tell {' or '.join(missing)}" if missing else "draft length unknown"
            advice = "" if missing else ": give --draft-length"
            return self._plain("window", seen.ended, seen, notes=[*notes, f"not compared: {lacks}{advice}"])
        rates = seen.acceptance(k)
        memory = self._memory(int(k)) if k > 0 else None
        surprise = None
        if memory is not None and rates is not None:
            surprise = memory.error(rates, seen.requests, float(seen.row["output_length"]))
            memory.add(rates, seen.requests)
        if k > 0 and rates is None and (memory is None or memory.rates is None):
            return self._plain("window", seen.ended, seen, notes=[*notes, "not compared: acceptance unknown"])
        pooled = memory.rates if memory is not None else self._idle_rates()
        own = rates if rates is not None else pooled
        try:
            asked = (self.deployment, seen, float(k), own, pooled, self.max_draft_length)
            found = expected(*asked, closed_loop=self.closed_loop)
        except (InputError, TraceError) as error:
            return self._plain("window", seen.ended, seen, notes=[*notes, f"not compared: {error}"])
        self.compared += 1
        anomalies, residuals = self._watched(seen, found, surprise, notes)
        if memory is not None and rates is not None and any(a["what"] == "tokens_per_step" for a in anomalies):
            memory.forget(rates, seen.requests)
        event = self._plain("window", seen.ended, seen, notes=notes)
        event |= {"predicted": found.answer, "residuals": residuals, "anomalies": anomalies}
        if memory is not None and memory.rates is not None:
            reference = memory.fitted if memory.fitted is not None else memory.rates
            event["acceptance"] = {
                "draft_length": int(k),
                "position_acceptance": None if rates is None else list(rates),
                "tokens_per_step": seen.row.get("tokens_per_step"),
                "expected_tokens_per_step": 1.0 + float(np.cumprod(reference).sum()),
                "known": list(memory.rates),
            }
        return event | {"standing": self._standing()}

    def _watched(self, seen: Window, found: Expected, surprise, notes: list[str]):
        """(new anomalies, residuals by metric); too few requests are shown, not watched."""
        ratios = dict(found.log_ratio)
        if "itl" in ratios:
            ratios.pop("tpot", None)
        unsure, noise = dict(found.unsure), dict(found.noise)
        told: dict[str, Any] = {
            metric: {"log_ratio": value, "scale": float(np.hypot(unsure[metric], noise[metric])), "score": None}
            for metric, value in found.log_ratio.items()
        }
        if seen.requests < FEWEST:
            notes.append(f"{seen.requests:g} requests finished: too few to be watched")
            return [], told
        if found.answer["outcome"] == "saturated":
            notes.append("the model says that this load saturates the server: no latency to compare")
        anomalies, scores = self._watchman.take(seen.began, ratios, unsure, noise, found.degrees_of_freedom)
        if surprise is not None:
            error, scale = surprise
            what = "tokens_per_step"
            more, own = self._watchman.take(seen.began, {what: error}, {what: 0.0}, {what: scale}, NORMAL)
            anomalies, scores = [*anomalies, *more], scores | own
            told[what] = {"log_ratio": error, "scale": scale, "score": None}
        for metric, value in scores.items():
            told[metric]["score"] = value
        return anomalies, told

    def _memory(self, k: int) -> AcceptanceMemory:
        if k not in self._memories:
            known = self.deployment.acceptance
            curve = None
            if known is not None and k in known.draft_lengths:
                curve = tuple(float(rate) for rate in known.curves[known.draft_lengths.index(k)][:k])
            self._memories[k] = AcceptanceMemory(k, curve)
        return self._memories[k]

    def _idle_rates(self) -> tuple[float, ...] | None:
        """Acceptance while nothing is drafted: what was learned last, else the fit's at its longest draft length."""
        learned = [memory.rates for memory in self._memories.values() if memory.rates is not None]
        if learned:
            return learned[-1]
        known = self.deployment.acceptance
        return None if known is None else tuple(float(rate) for rate in known.curves[-1])

    def _standing(self) -> list[dict[str, Any]]:
        changes = self._watchman.standing.items()
        return [{"what": what, "change": math.expm1(one.size), "since": one.since} for what, one in changes]

    def _plain(self, kind: str, time: float, seen: Window | None = None, notes=()) -> dict[str, Any]:
        measured = None
        if seen is not None:
            row = seen.row
            measured = {metric: row.get(column) for metric, column in LATENCIES.items()}
            measured |= {name: row.get(name) for name in _ROW} | {"requests": seen.requests}
            measured |= {"draft_length": seen.draft_length, "running": seen.running, "waiting": seen.waiting}
            measured |= {"draft_acceptance_rate": row.get("draft_acceptance_rate")}
        return {
            "event": kind,
            "time": time,
            "duration": None if seen is None else seen.duration,
            "deployment": self.deployment.name,
            "measured": measured,
            "predicted": None,
            "residuals": None,
            "acceptance": None,
            "anomalies": [],
            "standing": self._standing(),
            "notes": list(notes),
        }
