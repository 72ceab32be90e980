"""An iteration-level discrete-event simulation of a serving engine: the judge of the analytic model.

It shares the step time with the model and nothing else: batches, waiting, chunked prefill, preemption and whole tokens
come about as they do in an engine. Durations are those of the step time's parts; an iteration without decoding
sequences lasts its prefill alone, since a prompt's cost holds the reading of the weights.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.results import InputError
from diffspec.step_time import AbstractStepTime, BatchState

from . import engine
from .requests import Requests
from .schedule import DraftSchedule

UNLIMITED = 2**40


@dataclass(frozen=True)
class Engine:
    """The simulated engine.

    * ``draft_length`` [tok] and ``position_acceptance``: conditional rates a_1..a_k (the last one repeats);
      ``draft_probability`` [1]: chance that a sequence is drafted for in a step (n-gram drafters abstain);
      ``schedule``: a draft length that follows the batch, in place of ``draft_length``
    * ``max_batch_size`` [req], ``kv_capacity_tokens`` [tok], ``max_batched_tokens`` [tok] (token budget of one
      iteration): None for no limit. ``chunked_prefill``: whether a prompt may be split over iterations
    * ``prefix_hit_rate`` [1]: share of every prompt that is found in the prefix cache
    * ``request_overhead`` [s]: added to every request outside the engine (HTTP, tokens)
    """

    draft_length: int = 0
    position_acceptance: Sequence[float] = ()
    draft_probability: float = 1.0
    max_batch_size: int | None = None
    kv_capacity_tokens: int | None = None
    max_batched_tokens: int | None = None
    chunked_prefill: bool = True
    prefix_hit_rate: float = 0.0
    request_overhead: float = 0.0
    schedule: DraftSchedule | None = None

    def __post_init__(self):
        limits = ("max_batch_size", "kv_capacity_tokens", "max_batched_tokens")
        for name in ("draft_length", *limits):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) and not (value is None and name in limits):
                raise InputError(f"{name}: got {value!r}; allowed: a whole number")
        if self.draft_length < 0 or (self.draft_length > 0 and not len(self.position_acceptance)):
            raise InputError(f"draft_length: got {self.draft_length}; allowed: 0, or more with a position_acceptance")
        schedule = self.schedule
        if schedule is not None and self.draft_length > 0:
            raise InputError(f"draft_length: got {self.draft_length} beside a schedule; allowed: one of both")
        told = len(self.position_acceptance) or (schedule is not None and schedule.position_acceptance is not None)
        if schedule is not None and schedule.longest > 0 and not told:
            raise InputError("draft schedule: got no position_acceptance; allowed: the engine's, or the schedule's own")
        rates = np.asarray(self.position_acceptance, dtype=float)
        for name, values in (
            ("position_acceptance", rates),
            ("draft_probability", np.asarray([self.draft_probability])),
            ("prefix_hit_rate", np.asarray([self.prefix_hit_rate])),
        ):
            if not np.all((values >= 0) & (values <= 1)):
                raise InputError(f"{name}: got {values.tolist()}; allowed: 0 to 1")
        for name in limits:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: got {value}; allowed: at least 1, or None for no limit")

    @property
    def longest(self) -> int:
        """The longest draft [tok]."""
        return self.draft_length if self.schedule is None else self.schedule.longest

    def tiers(self) -> tuple[np.ndarray, np.ndarray]:
        """[3, tiers]: the draft length of each tier and the batches below and above which it is left; and [tiers,
        longest]: P(more than j drafted tokens accepted), j = 0..draft length - 1."""
        schedule = DraftSchedule([[1, UNLIMITED, self.draft_length]]) if self.schedule is None else self.schedule
        lengths = [int(k) for *_, k in schedule.ranges]
        survival = np.zeros((len(lengths), max(1, self.longest)))
        for tier, length in enumerate(lengths):
            own = schedule.position_acceptance
            survival[tier, :length] = _survival(
                self.position_acceptance if own is None else own.get(length, ()), length
            )
        return np.asarray([lengths, *schedule.thresholds()], dtype=np.int64), survival


def _survival(position_acceptance: Sequence[float], length: int) -> np.ndarray:
    rates = np.asarray(position_acceptance, dtype=float)[:length]
    return np.cumprod(np.append(rates, np.full(max(length - len(rates), 0), rates[-1] if len(rates) else 0.0)))


@dataclass(frozen=True)
class Lane:
    """One run: requests on an engine, ``concurrency`` of them kept in flight if it is a closed loop.

    Only the requests from ``first_measured`` up to ``end_measured`` count; those before warm the engine up, those
    after keep it loaded until the last measured one is complete. Without both, all count: a finite run that starts
    empty and drains.
    """

    requests: Requests
    engine: Engine
    concurrency: int | None = None
    first_measured: int = 0
    end_measured: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class LaneResult:
    """What one lane did. Arrays hold one entry a measured request; times are seconds from the lane's start.

    ``seconds_at[n]`` [s]: time with n requests in the system during the window (from the first measured arrival to the
    lane's end); ``gaps`` and ``gap_edges``: histogram of the gaps between stream events; ``drained``: the arrivals ran
    out before the last measured request was complete.
    """

    events: dict[str, np.ndarray]
    window: float
    completed: int
    busy_time: float
    request_seconds: float
    running_seconds: float
    iterations: int
    sequence_steps: int
    prefilled_tokens: int
    emitted_tokens: int
    itl_mean: float
    gaps: np.ndarray
    seconds_at: np.ndarray
    drained: bool
    switches: int = 0
    gap_edges: np.ndarray = field(default_factory=lambda: gap_edges())

    @property
    def ttft(self) -> np.ndarray:
        """first token - arrival [s]."""
        return self.events["first_token_time"] - self.events["arrival_time"]

    @property
    def e2e(self) -> np.ndarray:
        """completion - arrival [s]."""
        return self.events["completion_time"] - self.events["arrival_time"]

    @property
    def waiting(self) -> np.ndarray:
        """schedule - arrival [s]."""
        return self.events["schedule_time"] - self.events["arrival_time"]

    @property
    def tpot(self) -> np.ndarray:
        """(completion - first token)/(output tokens - 1) [s]; 0 for requests of a single token."""
        later = np.maximum(self.events["output_tokens"] - 1, 1)
        return (self.events["completion_time"] - self.events["first_token_time"]) / later


_TIMES = {
    "arrival_time": engine.ARRIVAL,
    "schedule_time": engine.SCHEDULE,
    "first_token_time": engine.FIRST_TOKEN,
    "completion_time": engine.COMPLETION,
}
_TOKENS = {
    "prompt_tokens": engine.PROMPT,
    "output_tokens": engine.OUTPUT,
    "drafted_tokens": engine.DRAFTED,
    "accepted_tokens": engine.ACCEPTED,
    "steps": engine.REQUEST_STEPS,
    "preemptions": engine.PREEMPTIONS,
}


def gap_edges() -> np.ndarray:
    """Edges of the histogram of gaps between stream events [s]."""
    return engine.SHORTEST_GAP * 10 ** (np.arange(engine.GAP_BINS + 1) / engine.BINS_PER_DECADE)


def run_lanes(
    step_time: AbstractStepTime, lanes: Sequence[Lane], progress: Callable[[float], Any] | None = None
) -> list[LaneResult]:
    """Run all lanes side by side: one call of the step time gives every lane the duration of its iteration.

    ``progress`` is called with the share of measured requests that are complete, about ten times a second.
    """
    if not lanes:
        raise InputError("no lanes to simulate; allowed: at least one")
    data = _allocate(lanes)
    durations = np.zeros(len(lanes))
    total = int(data.whole[:, engine.MEASURED_LEFT].sum())
    last = time.monotonic()
    evaluate = _evaluator(step_time, bool(data.whole[:, engine.LOADED].any()))
    while engine.advance(data, durations):
        durations = evaluate(data.state)
        if not (durations > 0).all():
            durations = _checked(durations, data)
        if progress is not None and time.monotonic() - last > 0.1:
            last = time.monotonic()
            progress(1.0 - data.whole[:, engine.MEASURED_LEFT].sum() / total)
    return [_result(lane, number, data) for number, lane in enumerate(lanes)]


def _evaluator(step_time: AbstractStepTime, idle: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Durations [s] of a batch state for each lane. One array holds all parameters: a call then costs 15 us, not 80."""
    leaves, structure = jax.tree.flatten(step_time)
    leaves = [np.asarray(leaf, dtype=float) for leaf in leaves]
    durations = _compiled(structure, tuple(leaf.shape for leaf in leaves), idle)
    values = jnp.asarray(np.concatenate([leaf.ravel() for leaf in leaves]))
    return lambda state: np.asarray(durations(values, state))


@lru_cache
def _compiled(structure, shapes, idle: bool) -> Callable:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])

    @jax.jit
    def durations(values, state):
        parts = zip(jnp.split(values, ends[:-1]), shapes, strict=True)
        step_time = jax.tree.unflatten(structure, [part.reshape(shape) for part, shape in parts])

        def one(row):
            parts = step_time(BatchState(*row[:6]))
            duration = jnp.where(row[0] > 0, parts.total, parts.prefill)
            if not idle:
                return duration
            alone, read = (step_time(BatchState(prefill_tokens=row[3], draft_passes=x)).prefill for x in (0.0, 1.0))
            return duration + row[6] * (read - alone)

        return jax.vmap(one)(state)

    return durations


def _checked(durations, data):
    working = data.state.sum(axis=1) > 0
    if not np.all(np.isfinite(durations[working])) or np.any(durations[working] < 0):
        raise InputError("step time: got a negative, infinite or NaN duration; allowed: finite seconds, 0 or more")
    if np.any(working & (durations == 0.0) & (data.state[:, 0] > 0)):
        raise InputError("step time: got 0 s for a decoding batch; allowed: more than 0 s")
    return np.where(working, durations, 0.0)


def _allocate(lanes: Sequence[Lane]) -> engine.Lanes:
    count, most = len(lanes), max(len(lane.requests) for lane in lanes)
    whole = np.zeros((count, engine.WHOLE), dtype=np.int64)
    real = np.zeros((count, engine.REAL))
    drafts = [lane.engine.tiers() for lane in lanes]
    shape = [max(survival.shape[axis] for _, survival in drafts) for axis in range(2)]
    tiers, survival = np.zeros((count, 3, shape[0]), dtype=np.int64), np.zeros((count, *shape))
    tokens = np.zeros((count, most, engine.TOKENS), dtype=np.int64)
    times = np.full((count, most, engine.TIMES), np.nan)
    times[:, :, engine.LENIENCY] = 1.0
    for number, lane in enumerate(lanes):
        settings, n = lane.engine, len(lane.requests)
        if (lane.requests.arrival_time is None) == (lane.concurrency is None):
            raise InputError("a lane needs arrival times or a concurrency: got neither or both; allowed: one of them")
        end = n if lane.end_measured is None else lane.end_measured
        if not 0 <= lane.first_measured < end <= n:
            raise InputError(f"measured requests: got {lane.first_measured} to {end} of {n}; allowed: a range of them")
        longest = int(np.max(lane.requests.prompt_tokens + lane.requests.output_tokens)) + settings.longest
        capacity = UNLIMITED if settings.kv_capacity_tokens is None else settings.kv_capacity_tokens
        if longest > capacity:
            raise InputError(
                f"kv_capacity_tokens: got {capacity}; allowed: at least {longest}, which the longest request needs"
            )
        own, accepted = drafts[number]
        tiers[number, :, : own.shape[1]] = own
        survival[number, : accepted.shape[0], : accepted.shape[1]] = accepted
        prompt = lane.requests.prompt_tokens
        tokens[number, :n, engine.PROMPT] = tokens[number, :n, engine.TARGET] = prompt
        tokens[number, :n, engine.OUTPUT] = lane.requests.output_tokens
        tokens[number, :n, engine.CACHED] = np.minimum(np.floor(prompt * settings.prefix_hit_rate), prompt - 1)
        longest = lane.requests.longest_draft
        tokens[number, :n, engine.LONGEST_DRAFT] = UNLIMITED if longest is None else longest
        if lane.requests.leniency is not None:
            times[number, :n, engine.LENIENCY] = lane.requests.leniency
        if lane.requests.arrival_time is not None:
            times[number, :n, engine.ARRIVAL] = lane.requests.arrival_time
        cap = min(n, UNLIMITED if settings.max_batch_size is None else settings.max_batch_size)
        for place, value in (
            (engine.N, n),
            (engine.FIRST_MEASURED, lane.first_measured),
            (engine.END_MEASURED, end),
            (engine.MEASURED_LEFT, end - lane.first_measured),
            (engine.CONCURRENCY, lane.concurrency or 0),
            (engine.CAP, cap),
            (engine.KV_CAPACITY, capacity),
            (engine.TOKEN_BUDGET, UNLIMITED if settings.max_batched_tokens is None else settings.max_batched_tokens),
            (engine.CHUNKED, settings.chunked_prefill),
            (engine.TIERS, own.shape[1]),
            (engine.LOADED, settings.schedule is not None and settings.longest > 0),
        ):
            whole[number, place] = value
        real[number, engine.DRAFT_PROBABILITY] = settings.draft_probability
    slots = int(whole[:, engine.CAP].max())
    seeds = np.random.SeedSequence([lane.seed for lane in lanes]).generate_state(count, np.uint64)

    return engine.Lanes(
        whole=whole,
        real=real,
        random=seeds | np.uint64(1),
        state=np.zeros((count, len(engine.STATE))),
        tiers=tiers,
        survival=survival,
        tokens=tokens,
        times=times,
        running=np.zeros((count, slots), dtype=np.int64),
        stack=np.zeros((count, slots), dtype=np.int64),
        seconds_at=np.zeros((count, min(most, 4096) + 1)),
        gaps=np.zeros((count, engine.GAP_BINS), dtype=np.int64),
    )


def _result(lane: Lane, number: int, data: engine.Lanes) -> LaneResult:
    whole, real = data.whole[number], data.real[number]
    first, end = int(whole[engine.FIRST_MEASURED]), int(whole[engine.END_MEASURED])
    events = {name: data.times[number, first:end, place].copy() for name, place in _TIMES.items()}
    events |= {name: data.tokens[number, first:end, place].copy() for name, place in _TOKENS.items()}
    overhead = lane.engine.request_overhead
    events["first_token_time"] += overhead
    events["completion_time"] += overhead
    gaps = int(whole[engine.GAPS])
    seconds = data.seconds_at[number]
    return LaneResult(
        events=events,
        window=float(real[engine.NOW] - real[engine.WINDOW_START]),
        completed=int(whole[engine.COMPLETED] - whole[engine.COMPLETED_BEFORE]),
        busy_time=float(real[engine.BUSY]),
        request_seconds=float(real[engine.REQUEST_SECONDS]),
        running_seconds=float(real[engine.RUNNING_SECONDS]),
        iterations=int(whole[engine.STEPS]),
        sequence_steps=int(whole[engine.SEQUENCE_STEPS]),
        prefilled_tokens=int(whole[engine.PREFILLED]),
        emitted_tokens=int(whole[engine.EMITTED]),
        itl_mean=float(real[engine.GAP_SECONDS] / gaps) if gaps else float("nan"),
        gaps=data.gaps[number].copy(),
        seconds_at=seconds[: int(np.max(np.flatnonzero(seconds > 0), initial=0)) + 1].copy(),
        drained=bool(whole[engine.ARRIVED] == whole[engine.N]),
        switches=int(whole[engine.SWITCHES]),
    )
