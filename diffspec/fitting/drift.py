"""Whether a server changed: cumulative sums of normalised innovations, with a stated rate of false alarms.

A row's error against the model as it was before the new rows (or after the last change), less SURE standard deviations
of what that model was unsure of, over the scale of the noise, passed through the Student t distribution, is at most a
standard normal score u while nothing changes. Two one-sided sums per observable (Page 1954) grow where it does:

    up <- max(0, up + u - 1),  down <- max(0, down - u - 1),  alarm above h,

which is quickest for changes of two standard deviations a row; what the model misses at an operating point that is
measured again and again stays below one. The mean number of rows between false alarms of one sum is (exp(2*b) - 2*b -
1)/2 with b = h + 1.166 (Siegmund 1985); h is set so that all sums of a deployment together give at most one in
FALSE_ALARM_ROWS rows. A change is dated to the row after the sum was last zero. A fit may be too sure of its noise, so
the scale is learned from the stream as well: it is multiplied by the root of (PRIOR_ROWS + sum of squares so
far)/(PRIOR_ROWS + rows so far), at least 1.
"""

import dataclasses
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri, stdtr

FALSE_ALARM_ROWS = 1000
"""Mean number of rows of a deployment between false alarms, for latencies and for the acceptance of each draft
length."""
REFERENCE = 1.0
"""Half of the change, in standard deviations of a row, that is found quickest."""
SURE = 2.0
"""Standard deviations of what the model was unsure of that are no change."""
MOST = 3.0
"""Largest score that counts: one strange row is no change, two in a row may be."""
PRIOR_ROWS, MOST_SCALE = 20.0, 2.0
"""Rows that the fitted noise counts as against those of the stream, and the largest error over its scale that counts
there: a change must not pass for noise."""
ROW_SPREAD = 0.02
"""Standard deviation of log tokens_per_step between rows of one drafter and workload beyond chance: judgement, twice
what imposed acceptance shows in data/vllm_cpu_steady.csv."""
REQUEST_STEPS = 4.0
"""Steps of a request that agree as one: prompts differ in how well they are drafted. Judgement."""


def threshold(sums: int, rows: float = FALSE_ALARM_ROWS) -> float:
    """h of each of ``sums`` one-sided sums that together give one false alarm in ``rows`` rows.

    >>> round(threshold(4), 2)
    3.33
    """
    doubled = brentq(lambda x: 0.5 * (np.exp(x) - x - 1.0) - rows * sums, 1e-6, 60.0)
    return 0.5 * float(doubled) - 1.166  # type: ignore[arg-type]


def score(error: float, scale: float, degrees_of_freedom: float) -> float:
    """Standard normal score of an error with a t distribution of that scale, at most MOST in size."""
    share = float(stdtr(degrees_of_freedom, error / scale))
    return float(np.clip(ndtri(np.clip(share, 1e-12, 1.0 - 1e-12)), -MOST, MOST))


@dataclasses.dataclass
class Side:
    """A one-sided sum: its ``total``, how many ``rows`` it has grown for, and over these the sum of the ``errors`` [log
    units] and of the squares of errors over their scales."""

    total: float = 0.0
    rows: int = 0
    errors: float = 0.0
    squares: float = 0.0

    def grown(self, value: float, error: float, square: float) -> "Side":
        """The sum after one more row."""
        total = self.total + value - REFERENCE
        return Side(total, self.rows + 1, self.errors + error, self.squares + square) if total > 0.0 else Side()


@dataclasses.dataclass
class Watch:
    """Both sums of one observable, and the ``rows`` and ``squares`` (of errors over their fitted scales) so far."""

    up: Side = dataclasses.field(default_factory=Side)
    down: Side = dataclasses.field(default_factory=Side)
    rows: int = 0
    squares: float = 0.0

    def add(self, error: float, unsure: float, noise: float, degrees_of_freedom: float) -> None:
        """Take in a row's error, how unsure its expectation was, and the scale of its noise [log units]."""
        learned, scale = self.learned, float(np.hypot(unsure, noise))
        beyond = error - float(np.clip(error, -SURE * unsure, SURE * unsure))
        value = score(beyond, learned * noise, degrees_of_freedom)
        square = float(min((error / scale) ** 2, (MOST_SCALE * learned) ** 2))
        self.rows, self.squares = self.rows + 1, self.squares + square
        self.up, self.down = self.up.grown(value, error, square), self.down.grown(-value, error, square)

    @property
    def learned(self) -> float:
        """The factor, at least 1, by which rows scatter more than the fit says."""
        return float(np.sqrt(max(1.0, (PRIOR_ROWS + self.squares) / (PRIOR_ROWS + self.rows))))

    @property
    def longest(self) -> int:
        """Rows since the older of the two sums was last zero."""
        return max(self.up.rows, self.down.rows)

    def alarm(self, limit: float) -> tuple[int, float] | None:
        """(rows since the change, mean error [log units] since), or None while both sums are below ``limit``."""
        side = max(self.up, self.down, key=lambda side: side.total)
        return None if side.total <= limit else (side.rows, side.errors / side.rows)

    def again(self, limit: float) -> "Watch":
        """The watch after a change was told: sums at zero, the scale as it was before the change."""
        side = max(self.up, self.down, key=lambda side: side.total)
        return (
            Watch(rows=self.rows - side.rows, squares=self.squares - side.squares)
            if side.total > limit
            else (Watch(rows=self.rows, squares=self.squares))
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Watch":
        """Rebuild from :meth:`to_dict`'s plain data; {} is a fresh one."""
        up, down = (Side(**data.get(side, {})) for side in ("up", "down"))
        return cls(up, down, data.get("rows", 0), data.get("squares", 0.0))


def sentence(what: str, change: float, since: str, rows: int) -> str:
    """A change in words; ``change`` as a fraction.

    >>> sentence("itl_mean", 0.281, "new.csv row 7", 12)
    'itl_mean is 28 % higher than the model expected, since new.csv row 7 (12 rows)'
    """
    side = "higher" if change >= 0 else "lower"
    return f"{what} is {100.0 * abs(change):.0f} % {side} than the model expected, since {since} ({rows} rows)"


def change_of(what: str, change: float, frame, row: int, count: int) -> dict[str, Any]:
    """A change of ``what`` over the ``count`` rows up to ``row``."""
    first = row + 1 - count
    line = frame.iloc[max(first, 0)]
    place = f"{line['source_file']} row {line['source_row']}"
    since = place if first >= 0 else f"{-first} rows before {place}"
    entry = {"what": what, "change": float(change), "since": since, "rows": int(count)}
    return entry | {"text": sentence(what, float(change), since, int(count))}


def tokens_scale(rates: np.ndarray, requests: float, output_length: float) -> tuple[float, float]:
    """(E, relative standard deviation of a row's tokens per step around it) for conditional ``rates`` [k] measured over
    ``requests`` requests of ``output_length`` tokens."""
    survival = np.cumprod(rates)
    mean = 1.0 + float(survival.sum())
    square = 1.0 + float(np.sum((2.0 * np.arange(1, len(rates) + 1) + 1.0) * survival))
    steps = max(requests * max(output_length - 1.0, 1.0) / mean, 1.0)
    independent = steps / np.clip(steps / requests, 1.0, REQUEST_STEPS)
    return mean, float(np.hypot(ROW_SPREAD, np.sqrt(max(square / mean**2 - 1.0, 0.0) / independent)))
