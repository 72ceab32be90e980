"""A minimal continuous-batching loop with chunked prefill, speculation and imposed acceptance. No torch here.

One step feeds the last token and the `draft_length` drafted tokens of every decoding request, and chunks of prompts as
far as the token budget goes: decoding requests first, then prompts in order of arrival. Tokens leave at the end of the
step. A prompt's last chunk yields the request's first token. Requests wait, first come first served, while
`max_batch_size` are in the batch; nothing is ever pushed out.

The engine really drafts and verifies; only the verdict is drawn: each drafted token is kept with the conditional
probability of its position, and a step emits the kept tokens and one more.
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np


class Lane(NamedTuple):
    """A chunk of one prompt: `tokens` tokens of the request in `slot`, after `start` that are cached already."""

    slot: int
    start: int
    tokens: int


class Engine(Protocol):
    """What computes a step. `chunk` is the most tokens in one lane and `max_lanes` the most lanes in one step."""

    chunk: int
    max_lanes: int

    def prepare(self, requests: int, lanes: int, draft_length: int) -> None:
        """Whatever must be set up (graphs captured) before a step of this size; its time does not count."""

    def step(self, decoding: Sequence[tuple[int, int]], lanes: Sequence[Lane], draft_length: int) -> None:
        """One step; returns when it is done. `decoding`: (slot, tokens cached) of each decoding request."""


class Clock(Protocol):
    """Seconds since the start of a run."""

    def now(self) -> float: ...

    def skip_to(self, moment: float) -> None:
        """Move on to `moment` at once: nothing would happen until then."""

    def paused(self): ...


class WallClock:
    """Real time, except that idle spells are skipped and set-up in `paused` does not count."""

    def __init__(self):
        self.origin = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.origin

    def skip_to(self, moment: float) -> None:
        self.origin -= max(0.0, moment - self.now())

    @contextmanager
    def paused(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.origin += time.perf_counter() - begun


@dataclass(frozen=True)
class Load:
    """An open loop: `arrival_rate` [req/s], Poisson or constant; `warm_up` requests, then `requests` measured ones.

    Lengths [tok] are fixed, or geometric with these means and at most `LONGEST` times as long where `drawn`.
    """

    arrival_rate: float
    warm_up: int
    requests: int
    prompt_length: int
    output_length: int
    drawn: bool = False
    process: str = "poisson"

    LONGEST = 4


@dataclass(frozen=True)
class Settings:
    """Limits of the engine, and the speculation: conditional acceptance per position, empty for none."""

    max_batch_size: int
    max_batched_tokens: int
    acceptance: tuple[float, ...] = ()

    def __post_init__(self):
        if self.max_batched_tokens < self.max_batch_size * (self.draft_length + 1):
            raise ValueError("max_batched_tokens must hold draft_length + 1 tokens of max_batch_size requests")

    @property
    def draft_length(self) -> int:
        return len(self.acceptance)


@dataclass(slots=True)
class Request:
    """One request and its events [s]; not a number where an event has not happened."""

    arrival_time: float
    prompt_tokens: int
    output_tokens: int
    counted: bool  # warm-up or measured: the run lasts until it is complete
    measured: bool
    schedule_time: float = math.nan
    first_token_time: float = math.nan
    completion_time: float = math.nan
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    stream_events: int = 0
    prefilled: int = 0
    emitted: int = 0
    slot: int = -1
    last_event: float = math.nan

    @property
    def cached(self) -> int:
        """Tokens in the cache while decoding: all but the newest."""
        return self.prompt_tokens + self.emitted - 1


@dataclass
class Run:
    """What a run leaves behind: every request that came before its end, gaps between stream events of the measured
    ones [s], how often each draft position was reached and accepted, and the steps by what they did."""

    requests: list[Request]
    gaps: np.ndarray
    reached: np.ndarray
    accepted: np.ndarray
    steps: dict[tuple[int, int], list[float]]  # (decoding, prompt tokens): [steps, seconds, cached tokens]
    seconds: float
    complete: bool


def arrivals(load: Load, seed: int) -> Iterator[Request]:
    """An endless stream of requests in order of arrival. The same seed gives the same requests at any rate, sooner."""
    gaps, lengths = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
    moment, number, last = 0.0, 0, load.warm_up + load.requests
    while True:
        moment += (gaps.exponential() if load.process == "poisson" else 1.0) / load.arrival_rate
        prompt, output = (_length(mean, load, lengths) for mean in (load.prompt_length, load.output_length))
        yield Request(moment, prompt, output, number < last, load.warm_up <= number < last)
        number += 1


def _length(mean: int, load: Load, random: np.random.Generator) -> int:
    return int(min(random.geometric(1.0 / mean), Load.LONGEST * mean)) if load.drawn else mean


def serve(
    engine: Engine, clock: Clock, load: Load, settings: Settings, seed: int = 0, most_seconds: float = math.inf
) -> Run:
    """Run the loop until every warm-up and measured request is complete, requests still coming all the while, or
    until `most_seconds` on the clock."""
    return _Loop(engine, clock, load, settings, seed).run(most_seconds)


@dataclass
class _Loop:
    engine: Engine
    clock: Clock
    load: Load
    settings: Settings
    seed: int
    waiting: deque[Request] = field(default_factory=deque)
    prefilling: list[Request] = field(default_factory=list)
    decoding: list[Request] = field(default_factory=list)

    def run(self, most_seconds: float) -> Run:
        k = self.settings.draft_length
        self.free = list(range(self.settings.max_batch_size))[::-1]
        self.left = self.load.warm_up + self.load.requests
        self.gaps: list[float] = []
        self.verdicts = np.random.default_rng(np.random.SeedSequence(self.seed).spawn(3)[2])
        self.rates = np.array(self.settings.acceptance)
        self.reached, self.accepted = np.zeros(k, np.int64), np.zeros(k, np.int64)
        steps: dict[tuple[int, int], list[float]] = {}
        seen: list[Request] = []
        stream = arrivals(self.load, self.seed)
        upcoming = next(stream)
        while self.left and (now := self.clock.now()) < most_seconds:
            while upcoming.arrival_time <= now:
                self.waiting.append(upcoming)
                seen.append(upcoming)
                upcoming = next(stream)
            if not (self.waiting or self.prefilling or self.decoding):
                self.clock.skip_to(upcoming.arrival_time)
                continue
            # what is waiting now is scheduled at the start of this step
            lanes = self._lanes(now)
            decoding, cached = list(self.decoding), [(each.slot, each.cached) for each in self.decoding]
            with self.clock.paused():
                self.engine.prepare(len(decoding), len(lanes), k)
            begun = self.clock.now()
            self.engine.step(cached, [lane for _, lane in lanes], k)
            now = self.clock.now()
            self._prompts(lanes, now)
            self._tokens(decoding, now)
            kind = len(decoding), sum(lane.tokens for _, lane in lanes)
            tally = steps.setdefault(kind, [0, 0.0, 0.0])
            for index, amount in enumerate((1, now - begun, sum(tokens for _, tokens in cached))):
                tally[index] += amount
        finished = [each for each in seen if each.counted or not math.isnan(each.completion_time)]
        gaps = np.array(self.gaps)
        return Run(finished, gaps, self.reached, self.accepted, steps, self.clock.now(), self.left == 0)

    def _lanes(self, now: float) -> list[tuple[Request, Lane]]:
        """Chunks of prompts for this step; admits requests from the queue while there is room for them."""
        room = self.settings.max_batched_tokens - len(self.decoding) * (self.settings.draft_length + 1)
        lanes: list[tuple[Request, Lane]] = []
        queue = iter(list(self.prefilling))
        while room > 0 and len(lanes) < self.engine.max_lanes:
            request = next(queue, None)
            if request is None:
                if not (self.waiting and self.free):
                    break
                request = self.waiting.popleft()
                request.slot, request.schedule_time = self.free.pop(), now
                self.prefilling.append(request)
            start = request.prefilled
            while start < request.prompt_tokens and room > 0 and len(lanes) < self.engine.max_lanes:
                tokens = min(self.engine.chunk, request.prompt_tokens - start, room)
                lanes.append((request, Lane(request.slot, start, tokens)))
                start, room = start + tokens, room - tokens
        return lanes

    def _prompts(self, lanes: list[tuple[Request, Lane]], now: float) -> None:
        for request, lane in lanes:
            request.prefilled += lane.tokens
            if request.prefilled == request.prompt_tokens:
                self.prefilling.remove(request)
                request.first_token_time = now
                self._emit(request, 1, now)
                if request.emitted < request.output_tokens:
                    self.decoding.append(request)

    def _tokens(self, decoding: list[Request], now: float) -> None:
        """Draw the verdicts and hand out the tokens of a step. Accepted tokens count as the engine verifies them, also
        beyond a request's last token."""
        if not decoding:
            return
        k = len(self.rates)
        kept = np.cumprod(self.verdicts.random((len(decoding), k)) < self.rates, axis=1)
        self.accepted += kept.sum(axis=0)
        self.reached += len(decoding)
        self.reached[1:] += kept[:, :-1].sum(axis=0) - len(decoding)
        for request, accepted in zip(decoding, kept.sum(axis=1).tolist(), strict=True):
            request.drafted_tokens += k
            request.accepted_tokens += accepted
            if request.measured:
                self.gaps.append(now - request.last_event)
            self._emit(request, accepted + 1, now)
        self.decoding = [each for each in self.decoding if each.emitted < each.output_tokens]

    def _emit(self, request: Request, tokens: int, now: float) -> None:
        request.emitted = min(request.emitted + tokens, request.output_tokens)
        request.stream_events += 1
        request.last_event = now
        if request.emitted == request.output_tokens:
            request.completion_time = now
            self.free.append(request.slot)
            self.left -= request.counted
