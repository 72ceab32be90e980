"""What happened between two scrapes: an operating point as the server lived it, or why there is none."""

import math
from dataclasses import dataclass, field
from typing import Any

from diffspec.acceptance import MAX_DRAFT_LENGTH, acceptance_from_tokens_per_step
from diffspec.results import TraceError
from diffspec.traces.readers.counters import difference, operating_point
from diffspec.traces.readers.prometheus import Snapshot

LATENCIES = {"ttft": "ttft_mean", "itl": "itl_mean", "tpot": "tpot_mean", "e2e_latency": "e2e_mean"}
"""Latencies of a prediction -> columns of an operating point."""


@dataclass(frozen=True)
class Window:
    """The time between two scrapes.

    ``kind``: ``window`` (requests finished), ``idle`` (none did), ``restart`` (counters fell or another process
    answers; nothing can be differenced) or ``disorder`` (the second is not later); ``began`` and ``ended`` [unix s];
    ``row``: the operating point in the columns of a trace [s, tok, req/s]; ``running``, ``waiting`` [req]: the mean of
    the gauges at both ends, None where the engine tells none; ``why``: the reason where there is no point.
    """

    kind: str
    began: float
    ended: float
    row: dict[str, Any] = field(default_factory=dict)
    running: float | None = None
    waiting: float | None = None
    why: str = ""

    @property
    def duration(self) -> float:
        """Seconds between the scrapes."""
        return self.ended - self.began

    @property
    def requests(self) -> float:
        """Requests that finished in the window."""
        return float(self.row.get("n_requests", 0.0))

    @property
    def draft_length(self) -> float | None:
        """Drafted tokens a step [tok]; 0 without speculation, None where the engine does not tell."""
        known = self.row.get("draft_length")
        return None if known is None else float(known)

    def acceptance(self, draft_length: float) -> tuple[float, ...] | None:
        """Conditional acceptance a_1..a_k of the window at the whole ``draft_length``: as counted by position, else the
        constant one with its tokens per step; None where nothing was drafted."""
        k = int(draft_length)
        rates = tuple(float(rate) for rate in self.row.get("position_acceptance", ()))[:k]
        if k < 1 or "tokens_per_step" not in self.row:
            return None
        if len(rates) == k:
            return rates
        tokens = min(max(float(self.row["tokens_per_step"]), 1.0), k + 1.0)
        return (float(acceptance_from_tokens_per_step(tokens, k).acceptance_rate),) * k


def window(before: Snapshot, began: float, after: Snapshot, ended: float) -> Window:
    """The window between two scrapes at ``began`` and ``ended`` [unix s].

    arrival_rate = (requests finished + growth of the number in the system) / duration

    Latencies are those of the tokens and requests that came to an end in it (sums and counts of the engine's
    histograms, differenced), ``effective_batch_size`` the time that finished requests spent in the system over the
    duration (Little's law), so a window should be several end-to-end latencies long.

    >>> from diffspec.traces.readers.prometheus import parse
    >>> text = "vllm:request_success_total {0}\\nvllm:e2e_request_latency_seconds_sum {1}\\n"
    >>> text += "vllm:e2e_request_latency_seconds_count {0}\\n"
    >>> one, two = (parse(text.format(*pair))[0] for pair in ((10, 5.0), (30, 25.0)))
    >>> seen = window(one, 0.0, two, 10.0)
    >>> seen.kind, seen.row["arrival_rate"], seen.row["e2e_mean"], seen.row["effective_batch_size"]
    ('window', 2.0, 1.0, 2.0)
    >>> window(two, 10.0, one, 20.0).kind
    'restart'
    """
    running, waiting = (_mean(before.gauges.get(name), after.gauges.get(name)) for name in ("running", "waiting"))

    def without(kind: str, why: str) -> Window:
        return Window(kind, began, ended, {}, running, waiting, why)

    if ended <= began:
        return without("disorder", "the scrape is not later than the one before it")
    if _restarted(before, after):
        return without("restart", "its counters fell: the server was restarted")
    try:
        counts = difference(before, after)
    except TraceError as error:
        return without("restart", str(error))
    if not counts.completed > 0:
        return without("idle", "no request finished")
    row, _ = operating_point(before, after, duration=ended - began, open_loop=True)
    if not row["arrival_rate"] > 0 or not math.isfinite(row["arrival_rate"]):
        row["arrival_rate"] = row["throughput"]
    if float(row.get("draft_length") or 0) > MAX_DRAFT_LENGTH:
        row.pop("draft_length")
    return Window("window", began, ended, row, running, waiting)


def _restarted(before: Snapshot, after: Snapshot) -> bool:
    """Counters that fall while time goes on: the reader of files may turn scrapes round, a clock may not."""
    last = after.totals()
    return any(last.get(name, 0.0) < value for name, value in before.totals().items())


def _mean(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
