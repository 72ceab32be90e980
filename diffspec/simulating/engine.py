"""The compiled part of the simulator: one call moves every lane by one engine iteration.

A lane is one independent run. Its engine works as continuous batching does: an iteration takes what runs, oldest first
(a decoding sequence takes one token plus its draft, a prompt takes a chunk of what is left of the token budget), then
what waits, first come first served; where the KV memory runs out, the youngest running request gives its cache back and
is computed again later. How long the iteration lasts is asked of the step time, outside; so this file knows nothing of
seconds but to add them up. Arrays and not objects, since numba compiles it; a request's numbers lie side by side.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit

STATE = ("sequences", "query_tokens", "kv_tokens", "prefill_tokens", "draft_passes", "draft_tokens", "idle_drafter")
"""Columns of `Lanes.state`: the fields of :class:`diffspec.step_time.BatchState`, and whether a drafter that drafts
nothing now reads the prompts all the same."""

GAP_BINS, BINS_PER_DECADE, SHORTEST_GAP = 640, 40.0, 1e-6
"""Histogram of the gaps between stream events: bins 6 % wide from 1e-6 s on."""

# Places in Lanes.whole, one row a lane: sizes and settings, counters, and sums over the window of measurement.
N, CONCURRENCY, CAP, KV_CAPACITY, TOKEN_BUDGET, CHUNKED, TIERS, FIRST_MEASURED, END_MEASURED = range(9)
FRESH, ARRIVED, RUNNING, PREEMPTED, COMPLETED, COMPLETED_BEFORE, MEASURED_LEFT, KV_USED, TIER = range(9, 18)
LOADED = 18
STEPS, PREFILLED, EMITTED, SEQUENCE_STEPS, GAPS, SWITCHES = range(19, 25)
WHOLE = 25
# Rows of Lanes.tiers: draft length of each tier, and the batches below and above which it is left.
LENGTH, LEFT_BELOW, LEFT_ABOVE = range(3)
# Places in Lanes.real.
NOW, LAST_EVENT, WINDOW_START, DRAFT_PROBABILITY = range(4)
BUSY, REQUEST_SECONDS, RUNNING_SECONDS, GAP_SECONDS = range(4, 8)
REAL = 8
# Places in Lanes.tokens, one row a request. TARGET: tokens to compute before the next one is emitted (the prompt, or
# all there was before a preemption); CONTEXT: tokens in the KV cache; PLANNED: those of this iteration, 0 if left out.
PROMPT, OUTPUT, CACHED, TARGET, CONTEXT, EMITTED_TOKENS, PLANNED = range(7)
DRAFTED, ACCEPTED, REQUEST_STEPS, PREEMPTIONS = range(7, 11)
LONGEST_DRAFT = 11  # the request's own limit of the draft length
TOKENS = 12
# Places in Lanes.times.
ARRIVAL, SCHEDULE, FIRST_TOKEN, COMPLETION, LAST_TOKEN, LENIENCY = range(6)
TIMES = 6


class Lanes(NamedTuple):
    """Everything that the lanes hold; the first axis is the lane."""

    whole: np.ndarray  # (lanes, WHOLE)
    real: np.ndarray  # (lanes, REAL)
    random: np.ndarray  # (lanes,) state of each lane's generator
    state: np.ndarray  # (lanes, 7): the batch of the iteration under way
    tiers: np.ndarray  # (lanes, 3, tiers): the draft length and where it changes
    survival: np.ndarray  # (lanes, tiers, longest draft): P(more than j drafted tokens accepted)
    tokens: np.ndarray  # (lanes, requests, TOKENS)
    times: np.ndarray  # (lanes, requests, TIMES)
    running: np.ndarray  # (lanes, slots): requests in service, oldest first
    stack: np.ndarray  # (lanes, slots): preempted requests, the oldest on top
    seconds_at: np.ndarray  # (lanes, most): time with so many requests in the system
    gaps: np.ndarray  # (lanes, GAP_BINS)


def compiled(function: Callable) -> Callable:
    """Compiled by numba, and kept for the next process where a folder for that can be written."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:
        return njit(function)


@compiled
def advance(lanes, durations):
    """End the iteration under way, which lasts ``durations[lane]``, and plan the next one; how many lanes go on."""
    active = 0
    for lane in range(lanes.whole.shape[0]):
        whole = lanes.whole[lane]
        if whole[MEASURED_LEFT] == 0:
            continue
        real, tokens, times = lanes.real[lane], lanes.tokens[lane], lanes.times[lane]
        seconds_at, gaps, running, state = (
            lanes.seconds_at[lane],
            lanes.gaps[lane],
            lanes.running[lane],
            lanes.state[lane],
        )
        if whole[RUNNING] > 0:
            now = real[NOW] + durations[lane]
            if whole[CONCURRENCY] == 0:
                _arrivals_until(now, whole, real, times, seconds_at, gaps)
            random, survival = lanes.random[lane : lane + 1], lanes.survival[lane, whole[TIER]]
            _end_step(now, whole, real, random, survival, tokens, times, running, seconds_at, gaps)
        if whole[CONCURRENCY] > 0:  # a closed loop: requests come with completions, the first ones together
            while whole[ARRIVED] < whole[N] and whole[ARRIVED] - whole[COMPLETED] < whole[CONCURRENCY]:
                times[whole[ARRIVED], ARRIVAL] = real[NOW]
                _arrive(real[NOW], whole, real, seconds_at, gaps)
        elif whole[ARRIVED] == whole[COMPLETED] and whole[ARRIVED] < whole[N]:  # idle: sleep until the next arrival
            real[NOW] = max(real[NOW], times[whole[ARRIVED], ARRIVAL])
            _arrivals_until(real[NOW], whole, real, times, seconds_at, gaps)
        state[:] = 0.0
        if whole[MEASURED_LEFT] > 0:
            length = _draft_length(whole, lanes.tiers[lane], tokens, running)
            _plan(length, whole, real, lanes.random[lane : lane + 1], state, tokens, times, running, lanes.stack[lane])
            active += 1
    return active


@compiled
def _uniform(random):
    """A number in [0, 1): xorshift64* (Vigna, 2016)."""
    x = random[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    random[0] = x
    return np.float64((x * np.uint64(2685821657736338717)) >> np.uint64(11)) / 9007199254740992.0


@compiled
def _pass_time(time, whole, real, seconds_at):
    """Move the clock of events; the requests in the system stay what they are meanwhile."""
    inside = whole[ARRIVED] - whole[COMPLETED]
    span = time - real[LAST_EVENT]
    real[REQUEST_SECONDS] += inside * span
    seconds_at[min(inside, seconds_at.shape[0] - 1)] += span
    real[LAST_EVENT] = time


@compiled
def _arrive(time, whole, real, seconds_at, gaps):
    """One more request; with the first measured one the sums start anew."""
    _pass_time(time, whole, real, seconds_at)
    if whole[ARRIVED] == whole[FIRST_MEASURED]:
        real[WINDOW_START] = time
        real[BUSY:REAL] = 0.0
        whole[STEPS:WHOLE] = 0
        whole[COMPLETED_BEFORE] = whole[COMPLETED]
        seconds_at[:] = 0.0
        gaps[:] = 0
    whole[ARRIVED] += 1


@compiled
def _arrivals_until(now, whole, real, times, seconds_at, gaps):
    while whole[ARRIVED] < whole[N] and times[whole[ARRIVED], ARRIVAL] <= now:
        _arrive(times[whole[ARRIVED], ARRIVAL], whole, real, seconds_at, gaps)


@compiled
def _end_step(now, whole, real, random, survival, tokens, times, running, seconds_at, gaps):
    """Give out the tokens of the iteration that ends ``now``, and take out what is complete."""
    start = real[NOW]
    duration = now - start
    real[NOW] = now
    real[BUSY] += duration
    real[RUNNING_SECONDS] += whole[RUNNING] * duration
    whole[STEPS] += 1
    kept = 0
    usual_gaps = 0
    for place in range(whole[RUNNING]):
        request = running[place]
        running[kept] = request
        kept += 1
        row = tokens[request]
        planned = row[PLANNED]
        if planned == 0:
            continue
        if row[CONTEXT] < row[TARGET]:
            row[CONTEXT] += planned
            whole[PREFILLED] += planned
            if row[CONTEXT] < row[TARGET]:
                continue
            emitted = 1
        else:
            accepted = 0
            if planned > 1:
                accepted = _accepted(_uniform(random), planned - 1, survival, times[request, LENIENCY])
                row[DRAFTED] += planned - 1
                row[ACCEPTED] += accepted
                whole[KV_USED] -= planned - 1 - accepted
            row[REQUEST_STEPS] += 1
            row[CONTEXT] += 1 + accepted
            whole[SEQUENCE_STEPS] += 1
            emitted = 1 + accepted
        emitted = min(emitted, row[OUTPUT] - row[EMITTED_TOKENS])
        whole[EMITTED] += emitted
        if row[EMITTED_TOKENS] == 0:
            times[request, FIRST_TOKEN] = now
        elif times[request, LAST_TOKEN] == start:
            usual_gaps += 1
        else:
            _count_gap(now - times[request, LAST_TOKEN], 1, whole, real, gaps)
        times[request, LAST_TOKEN] = now
        row[EMITTED_TOKENS] += emitted
        if row[EMITTED_TOKENS] == row[OUTPUT]:
            kept -= 1
            _pass_time(now, whole, real, seconds_at)
            whole[COMPLETED] += 1
            whole[KV_USED] -= row[CONTEXT]
            times[request, COMPLETION] = now
            if whole[FIRST_MEASURED] <= request < whole[END_MEASURED]:
                whole[MEASURED_LEFT] -= 1
    whole[RUNNING] = kept
    if usual_gaps > 0:
        _count_gap(duration, usual_gaps, whole, real, gaps)


@compiled
def _accepted(u, drafted, survival, leniency):
    """How many of the drafted tokens are accepted: one uniform number against the survival of each position."""
    count = 0
    marginal, before = 1.0, 1.0
    while count < drafted and before > 0.0:
        marginal *= min(1.0, leniency * survival[count] / before)
        if u >= marginal:
            break
        before = survival[count]
        count += 1
    return count


@compiled
def _count_gap(gap, times, whole, real, gaps):
    place = int(BINS_PER_DECADE * np.log10(max(gap, SHORTEST_GAP) / SHORTEST_GAP))
    gaps[min(place, GAP_BINS - 1)] += times
    whole[GAPS] += times
    real[GAP_SECONDS] += gap * times


@compiled
def _preempt_youngest(whole, tokens, running, stack):
    whole[RUNNING] -= 1
    request = running[whole[RUNNING]]
    row = tokens[request]
    whole[KV_USED] -= row[CONTEXT]
    row[TARGET] = row[PROMPT] + row[EMITTED_TOKENS]
    row[CONTEXT] = 0
    row[PREEMPTIONS] += 1
    stack[whole[PREEMPTED]] = request
    whole[PREEMPTED] += 1


@compiled
def _draft_length(whole, tiers, tokens, running):
    """The draft length of the next iteration, one for all: that of the tier which the decoding sequences lead to."""
    if whole[TIERS] > 1:
        decoding = 0
        for place in range(whole[RUNNING]):
            row = tokens[running[place]]
            if row[CONTEXT] >= row[TARGET]:
                decoding += 1
        before = whole[TIER]
        while decoding > tiers[LEFT_ABOVE, whole[TIER]]:
            whole[TIER] += 1
        while decoding < tiers[LEFT_BELOW, whole[TIER]]:
            whole[TIER] -= 1
        if whole[TIER] != before:
            whole[SWITCHES] += 1
    return tiers[LENGTH, whole[TIER]]


@compiled
def _plan(length, whole, real, random, state, tokens, times, running, stack):
    """What the next iteration works on: planned tokens of each running request, and the lane's batch state."""
    budget = whole[TOKEN_BUDGET]
    passes = 0
    abstains = real[DRAFT_PROBABILITY] < 1.0
    preempted = False
    place = 0
    while place < whole[RUNNING]:
        row = tokens[running[place]]
        left = row[TARGET] - row[CONTEXT]
        own = min(length, row[LONGEST_DRAFT])
        drafts = left <= 0 and own > 0 and (not abstains or _uniform(random) < real[DRAFT_PROBABILITY])
        need = min(left if left > 0 else 1 + own if drafts else 1, budget)
        while whole[KV_USED] + need > whole[KV_CAPACITY] and place < whole[RUNNING]:
            _preempt_youngest(whole, tokens, running, stack)
            preempted = True
        if place == whole[RUNNING]:
            break
        row[PLANNED] = need
        whole[KV_USED] += need
        budget -= need
        if left > 0:
            state[3] += need
        elif need > 0:
            state[0] += 1.0
            state[1] += need
            state[2] += row[CONTEXT]
            state[5] += need - 1
        if own > passes and (need > 1 or left > 0):
            passes = own
        place += 1
    while not preempted and budget > 0 and whole[RUNNING] < whole[CAP]:
        if whole[PREEMPTED] > 0:
            request = stack[whole[PREEMPTED] - 1]
        elif whole[FRESH] < whole[ARRIVED]:
            request = whole[FRESH]
        else:
            break
        row = tokens[request]
        left = row[TARGET] - row[CACHED]
        need = min(left, budget)
        if need < left and whole[CHUNKED] == 0 and left <= whole[TOKEN_BUDGET]:
            break
        if whole[KV_USED] + row[CACHED] + need > whole[KV_CAPACITY]:
            break
        if whole[PREEMPTED] > 0:
            whole[PREEMPTED] -= 1
        else:
            whole[FRESH] += 1
            times[request, SCHEDULE] = real[NOW]
        row[CONTEXT] = row[CACHED]
        row[PLANNED] = need
        whole[KV_USED] += row[CACHED] + need
        running[whole[RUNNING]] = request
        whole[RUNNING] += 1
        budget -= need
        state[3] += need
        passes = max(passes, min(length, row[LONGEST_DRAFT]))
    if passes > 0 and (state[5] > 0.0 or state[3] > 0.0):
        state[4] = passes
    elif whole[LOADED] > 0 and state[3] > 0.0:
        state[6] = 1.0
