"""What is measured and in which order, and how long it may take. No torch here.

Every cell has a level; cells of a lower level come first, so that an early stop leaves a coarse grid over the whole
range rather than a fine one over a corner of it.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

BATCH_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
LANE_BUCKETS = (0, 1, 2, 4)

# value: level. Tokens per request are 1 (no speculation) or draft length + 1.
BATCHES = {1: 0, 16: 0, 64: 0, 4: 1, 32: 1, 256: 1, 2: 2, 8: 2, 128: 2}
TOKENS = {1: 0, 4: 0, 8: 0, 2: 1, 6: 1, 17: 1, 3: 2, 5: 2, 12: 2}
CONTEXTS = {1024: 0, 256: 1, 8192: 1, 4096: 2, 32768: 2}
MOE_CONTEXTS = {1024: 0, 256: 1, 4096: 1, 8192: 2}
SKEWS = {0.0: 0, 1.0: 0, 0.5: 1, 1.5: 1}
ROUTING_BATCHES = {1: 0, 16: 0, 64: 0, 4: 1, 256: 1}
ROUTING_TOKENS = {1: 0, 4: 0, 8: 1}


class StepCell(NamedTuple):
    """One step-cost measurement: `batch` requests that feed `tokens` tokens each on `context` cached ones."""

    model: str
    batch: int
    tokens: int
    context: int


class RoutingCell(NamedTuple):
    """One routing measurement: popularity of rank r proportional to r^-skew, context of 1,024 tokens."""

    skew: float
    batch: int
    tokens: int


class TraceCell(NamedTuple):
    """One open-loop run at `fraction` of the estimated capacity of its configuration."""

    draft_length: int
    acceptance: float
    fraction: float
    prompt_length: int
    output_length: int
    drawn: bool = False
    repeat: int = 0

    @property
    def name(self) -> str:
        """Run name: draft length, acceptance in %, mean lengths (d: drawn), fraction of capacity in %."""
        speculation = f"k{self.draft_length}_a{100 * self.acceptance:.0f}" if self.draft_length else "k0"
        lengths = f"p{self.prompt_length}_o{self.output_length}{'d' if self.drawn else ''}"
        return f"{speculation}_{lengths}_f{100 * self.fraction:.0f}" + (f"_rep{self.repeat}" if self.repeat else "")


def leveled(*axes: Mapping) -> Iterator[tuple[int, tuple]]:
    """(level, values) over the product of axes `{value: level}`; a cell's level is the highest among its values."""
    for values in product(*axes):
        yield max(axis[value] for axis, value in zip(axes, values, strict=True)), values


def step_cells(models: tuple[str, ...], contexts: Mapping[int, int], tiny: bool) -> list[StepCell]:
    """Cells of a part, coarse grid first over all models; within a level one captured graph serves several contexts."""
    batches, tokens = (BATCHES, TOKENS)
    if tiny:
        batches, tokens, contexts = {1: 0, 4: 0}, {1: 0, 3: 0}, {16: 0, 64: 1}
    found = sorted(
        (level, models.index(model), batch, fed, context)
        for model in models
        for level, (batch, fed, context) in leveled(batches, tokens, contexts)
    )
    return [StepCell(models[index], batch, fed, context) for _, index, batch, fed, context in found]


def routing_cells(tiny: bool) -> list[RoutingCell]:
    """Cells of the routing study, coarse grid first."""
    axes = (SKEWS, ROUTING_BATCHES, ROUTING_TOKENS)
    if tiny:
        axes = ({0.0: 0, 1.5: 0}, {1: 0, 4: 0}, {1: 0, 3: 0})
    return [RoutingCell(*values) for _, values in sorted(leveled(*axes))]


def trace_cells(draft_lengths: tuple[int, ...], prompt: int, output: int, tiny: bool) -> list[TraceCell]:
    """Open-loop runs: first without speculation and one good configuration, then the other configurations, then more
    loads, repeats (the noise floor) and other lengths."""
    if tiny:
        return [TraceCell(k, 0.8 if k else 0.0, f, prompt, output) for k in (0, 2) for f in (0.2, 0.7)]
    middle = 3 if 3 in draft_lengths else draft_lengths[-1]
    pairs = [(k, a) for k in draft_lengths if k for a in (0.8, 0.6)]
    first = [(0, 0.0), (middle, 0.8)]
    # the best and worst bargains for speculation come before those between them
    rest = sorted((pair for pair in pairs if pair not in first), key=lambda pair: (pair[0] in (1, 5), pair))
    coarse, fine = (0.1, 0.5, 0.85), (0.3, 0.7, 0.95)
    lone = (0.03,)  # most requests are alone
    cells = [TraceCell(k, a, f, prompt, output) for k, a in first for f in coarse]
    cells += [TraceCell(k, a, f, prompt, output) for k, a in rest for f in coarse]
    cells += [TraceCell(k, a, f, prompt, output) for k, a in first for f in (*fine, *lone)]
    cells += [TraceCell(k, a, f, prompt, output, repeat=1) for k, a in first for f in (0.5, 0.85)]
    cells += [TraceCell(k, a, f, prompt, output, drawn=True) for k, a in first for f in (0.5,)]
    cells += [TraceCell(k, a, f, 4 * prompt, output) for k, a in first for f in (0.5,)]
    return cells + [TraceCell(k, a, f, prompt, output) for k, a in rest for f in fine]


def bucket(buckets: tuple[int, ...], size: int) -> int:
    """The smallest bucket that holds `size`.

    >>> bucket(BATCH_BUCKETS, 17)
    24
    """
    return next(each for each in buckets if each >= size)


@dataclass
class Budget:
    """Wall-clock budget of a part [s], started when made. `slowness` corrects estimates by how they turned out."""

    seconds: float
    now: Callable[[], float] = time.monotonic
    slowness: float = 1.0

    def __post_init__(self):
        self.begun = self.now()

    def left(self) -> float:
        return self.seconds - (self.now() - self.begun)

    def allows(self, estimate: float) -> bool:
        """Whether something estimated to take this long still fits."""
        return estimate * self.slowness <= self.left()

    def learn(self, estimate: float, took: float) -> None:
        """Remember how far off an estimate was (a running mean of ratios, within [0.5, 4])."""
        self.slowness = min(4.0, max(0.5, 0.8 * self.slowness + 0.2 * took / max(estimate, 1e-3)))


@dataclass(frozen=True)
class Pace:
    """Measured step times [s] of one configuration: `alone` {batch: time without prompts}, `full` {lanes: time at the
    largest batch}, both with `draft_length` drafts. For planning only."""

    alone: Mapping[int, float]
    full: Mapping[int, float]
    chunk: int
    draft_length: int
    acceptance: float

    @property
    def most(self) -> int:
        return max(self.alone)

    @property
    def tokens_per_step(self) -> float:
        """E = sum over j = 0..k of acceptance^j."""
        return sum(self.acceptance**j for j in range(self.draft_length + 1))

    def steps(self, output: int) -> float:
        """Decode steps of a request: (output - 1)/E, at least one where anything is left to decode."""
        return max((output - 1) / self.tokens_per_step, min(output - 1, 1))

    def step_time(self, batch: float, lanes: float) -> float:
        """Linear between the measured batches, plus what `lanes` lanes cost at the largest batch."""
        return _between(self.alone, batch) + _between(self.full, lanes) - self.full[0]

    def capacity(self, prompt: int, output: int) -> float:
        """Requests per second with the batch full: in each step most/steps requests leave and as many prompts enter, or
        as many as the lanes hold."""
        chunks = -(-prompt // self.chunk)
        entering = min(self.most / max(self.steps(output), 1.0), max(self.full) / chunks)
        return entering / self.step_time(self.most, entering * chunks)

    def latency(self, rate: float, prompt: int, output: int) -> float:
        """Rough mean latency [s] at `rate` req/s: iterate B = rate*latency(B), with B at most the largest batch."""
        chunks, batch = -(-prompt // self.chunk), 1.0
        for _ in range(60):
            step = self.step_time(batch, 0.0)
            step = self.step_time(batch, min(rate * step * chunks, max(self.full)))
            latency = (self.steps(output) + chunks / max(self.full) + 0.5) * step
            batch = 0.5 * batch + 0.5 * min(max(rate * latency, 1.0), float(self.most))
        return latency


def _between(points: Mapping[int, float], at: float) -> float:
    """Linear interpolation, held constant outside."""
    known = sorted(points)
    at = min(max(at, known[0]), known[-1])
    for low, high in pairwise(known):
        if at <= high:
            return points[low] + (points[high] - points[low]) * (at - low) / (high - low)
    return points[known[-1]]
