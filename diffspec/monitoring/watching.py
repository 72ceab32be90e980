"""Whether the server still is the one that was fitted: cumulative sums of standardised residuals, window by window.

The sums are those of :mod:`diffspec.fitting.drift`: with u the standardised residual of a window, at most standard
normal while nothing changes (log(measured/predicted), less twice what the model itself is unsure of, over the scale of
its noise),

    up <- max(0, up + u - 1),  down <- max(0, down - u - 1),  alarm above h,

two-sided, with the reference (drift) of 1 standard deviation: quickest for changes of two, and deaf to the persistent
error below one that any model has at an operating point. The average run length of one sum without a change is, by
Siegmund's approximation (1985), (exp(2b) - 2b - 1)/2 with b = h + 1.166; for a run length of ``average_run_length``
windows of all sums together, each of m sums gets m times as long (:func:`diffspec.fitting.drift.threshold`). After a
change of d standard deviations an alarm comes after about h/(min(d, 3) - 1) windows.

An alarm is given once: what changed becomes the expectation ("standing"), until it changes again or goes back.
Residuals of neighbouring windows are taken as independent; near saturation, or where a window is shorter than a few
end-to-end latencies, they are not, and false alarms come sooner.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from diffspec.fitting.drift import Watch, score, sentence, threshold, tokens_scale

WATCHED = ("ttft", "itl", "e2e_latency", "tokens_per_step")
"""What is watched, each by two sums; tpot stands in for itl where an engine does not tell it."""
SUMS = 2 * len(WATCHED)
AVERAGE_RUN_LENGTH = 10_000.0
"""Windows between false alarms, by default: a day and a bit at ten seconds each."""
FEWEST = 5
"""Requests in a window below which it is shown, but not watched."""
LEARNING_REQUESTS = 50.0
"""Requests after which acceptance that no fit told is known well enough to be watched."""
MEMORY = 0.99
"""Share of what earlier windows told about acceptance that each new one leaves, where nothing changed."""
NORMAL = 1e9


@dataclass
class Standing:
    """A change that was told and lasts: its size [log units] and since when [unix s]."""

    size: float
    since: float


@dataclass
class Watchman:
    """The sums of all that is watched, and the acceptance learned along the way.

    ``take`` is given the residuals of one window and returns its new anomalies: ``what``, ``change`` (a fraction,
    against the model), ``since`` [unix s], ``windows``, ``text``.
    """

    average_run_length: float = AVERAGE_RUN_LENGTH
    watches: dict[str, Watch] = field(default_factory=dict)
    standing: dict[str, Standing] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)

    @property
    def limit(self) -> float:
        """The threshold h of each sum.

        >>> round(Watchman(1000.0).limit, 2)
        3.67
        """
        return threshold(SUMS, self.average_run_length)

    def take(
        self,
        began: float,
        residual: dict[str, float],
        unsure: dict[str, float],
        noise: dict[str, float],
        freedom: float,
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """(new anomalies, the standardised residual of each metric) of the window that began at ``began`` [unix s]."""
        self.times = [*self.times[-9999:], began]
        told, scores = [], {}
        for what, error in residual.items():
            watch = self.watches.setdefault(what, Watch())
            change = self.standing.get(what)
            against = error - (0.0 if change is None else change.size)
            margin = unsure[what] if change is None else 0.0  # what stands was measured
            beyond = against - float(np.clip(against, -2.0 * margin, 2.0 * margin))
            scores[what] = score(beyond, watch.learned * noise[what], freedom)
            watch.add(against, margin, noise[what], freedom)
            alarm = watch.alarm(self.limit)
            if alarm is None:
                continue
            count, size = alarm
            self.watches[what] = watch.again(self.limit)
            told.append(self._changed(what, size, count, noise[what]))
        return told, scores

    def _changed(self, what: str, size: float, count: int, noise: float) -> dict[str, Any]:
        since = self.times[-min(count, len(self.times))]
        before = self.standing.pop(what, None)
        total = size + (0.0 if before is None else before.size)
        back = before is not None and abs(total) < max(noise, 0.5 * abs(before.size))
        if not back:
            self.standing[what] = Standing(total, since)
        stamp = datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        change = float(np.expm1(total))
        text = sentence(what, change, stamp, count).replace(" rows)", " windows)")
        if back:
            text = f"{what} is back to what the model expects, since {stamp} ({count} windows)"
        return {"what": what, "change": change, "since": since, "windows": count, "back": back, "text": text}


@dataclass
class AcceptanceMemory:
    """Acceptance by position at one draft length: what the fit told, carried on by the windows.

    A curve of the fit counts as ``requests`` requests; each window adds its own, and what is known fades by MEMORY, as
    :mod:`diffspec.fitting.online_acceptance` does row by row. What is watched is log tokens_per_step, against the curve
    of the fit where it has one (a drop stays a drop, however slowly it came), else against what is learned.
    """

    draft_length: int
    fitted: tuple[float, ...] | None = None
    rates: tuple[float, ...] | None = None
    requests: float = 0.0

    def error(self, rates: tuple[float, ...], requests: float, output_length: float) -> tuple[float, float] | None:
        """(log of tokens per step over the expected, its scale by chance) of a window; None while nothing is known."""
        reference = self.fitted if self.fitted is not None else self.rates
        if reference is None or (self.fitted is None and self.requests < LEARNING_REQUESTS):
            return None
        wanted, scale = tokens_scale(np.asarray(reference), requests, output_length)
        behind = np.inf if self.fitted is not None else self.requests
        tokens = 1.0 + float(np.cumprod(rates).sum())
        return float(np.log(tokens / wanted)), float(scale * np.sqrt(1.0 + requests / behind))

    def add(self, rates: tuple[float, ...], requests: float) -> None:
        """Take in a window's curve."""
        if self.rates is None:
            self.rates, self.requests = rates, requests
            return
        old = MEMORY * self.requests
        both = zip(self.rates, rates, strict=True)
        self.rates = tuple((old * known + requests * new) / (old + requests) for known, new in both)
        self.requests = old + requests

    def forget(self, rates: tuple[float, ...], requests: float) -> None:
        """Start again from a window, after a change was told."""
        self.rates, self.requests = rates, requests
