"""Latency under a schedule over the batch: the equilibrium of a server whose draft length follows its batch.

In an open loop the number in the system is a birth-death chain (:mod:`diffspec.waiting`), with births at the load and
deaths at n/residence_k(n)(n), k(n) the schedule. So the batch is not one number but a distribution P(n), which reaches
over the thresholds of the schedule, and Little's law holds exactly:

    e2e = waiting + sum n P(n)/load,      ttft = waiting + sum P(n) ttft_k(n+1) (an arrival finds n others)
    itl = sum n P(n) decode/residence / sum n P(n) steps/residence,      tpot = (e2e - ttft)/(output_length - 1)

The steps that a prompt waits for at a busy engine count as in :mod:`diffspec.serving`, B/(1 + B) of them at the mean
batch B: that is how they are fitted. One draft length for all batches is the schedule of one tier, so both are compared
on equal terms. In a closed loop the batch is min(concurrency, largest). Everything here is for many schedules and loads
at once.
"""

from typing import NamedTuple

import jax
import numpy as np

from diffspec.optimizing.batch_tables import BatchTables
from diffspec.steady_state import SATURATION_MARGIN
from diffspec.waiting import prompt_wait, waiting_factor


class UnderSchedule(NamedTuple):
    """What schedules give at loads; every array is [schedules, loads] but for ``probability``.

    * ``metrics``: means of ttft, itl, tpot, e2e [s], ``throughput`` [req/s] and ``utilization`` [1]; where
      ``saturated``, those at 0.999 of capacity: a lower bound of the latency
    * ``batch_mean``, ``batch_deviation`` [req] of the requests in service; ``capacity`` [req/s]
    * ``probability`` [schedules, loads, n]: share of time with n = 0, 1, ... and at least the largest in service
    """

    metrics: dict[str, np.ndarray]
    saturated: np.ndarray
    batch_mean: np.ndarray
    batch_deviation: np.ndarray
    capacity: np.ndarray
    probability: np.ndarray


class Chain(NamedTuple):
    """Stationary birth-death chains; ``probability`` [..., n] of n = 0..N in the system, ``tail`` of more than N;
    ``in_service`` and ``queue`` [req]; ``load`` [1]: births over the largest death rate."""

    probability: np.ndarray
    tail: np.ndarray
    in_service: np.ndarray
    queue: np.ndarray
    load: np.ndarray


def chains(residence: np.ndarray, sizes: np.ndarray, rate: np.ndarray) -> Chain:
    """:func:`diffspec.waiting.requests_in_system` for many ``residence`` [..., n] [s] at batches ``sizes`` [n] and
    arrival rates ``rate`` [...] [req/s], each below sizes/residence at the last batch.

    >>> found = chains(np.full((1, 4), 0.5), np.arange(1.0, 5.0), np.array([6.0]))  # M/M/4 at load 0.75
    >>> round(float(found.queue[0]), 4)
    1.5283
    """
    log_weight = np.cumsum(np.log(rate[..., None] * residence / sizes), axis=-1)
    log_weight = np.concatenate([np.zeros_like(log_weight[..., :1]), log_weight], axis=-1)
    weight = np.exp(log_weight - log_weight.max(axis=-1, keepdims=True))
    load = rate * residence[..., -1] / sizes[-1]
    beyond = load / (1.0 - load)
    probability = weight / (weight.sum(axis=-1) + weight[..., -1] * beyond)[..., None]
    last = probability[..., -1]
    excess = sizes.size - sizes[-1]  # a fractional last place: so much of a request waits there
    return Chain(
        probability,
        last * beyond,
        probability[..., 1:] @ sizes + last * beyond * sizes[-1],
        last * (excess + beyond * (1.0 + excess) + beyond**2),
        load,
    )


def full_choice(tables: BatchTables, draft_lengths: np.ndarray) -> np.ndarray:
    """Draft lengths of whole batches 1..batches [..., n] for every column of the table: the largest batch, where it is
    no whole number, has that of the whole batch below it."""
    last = min(int(tables.sizes[-1]), tables.batches) - 1
    return np.concatenate([draft_lengths, draft_lengths[..., last : last + 1]], axis=-1)


def under_schedules(
    tables: BatchTables, draft_lengths: np.ndarray, loads: np.ndarray, loop: str, output_length: float
) -> UnderSchedule:
    """Means under each of the schedules ``draft_lengths`` [schedules, batches] at each of ``loads`` [req/s, or req in a
    closed loop]; Poisson arrivals in open loops."""
    kept = tables.kept
    chosen = full_choice(tables, draft_lengths)[:, kept]
    sizes = tables.sizes[kept]
    idle = (chosen == 0) & (draft_lengths.max(axis=1) > 0)[:, None]  # without drafts, with the drafter loaded
    residence = np.where(idle, tables.idle_residence[kept], tables.residence[chosen, kept])
    ttft = np.where(idle, tables.idle_ttft[kept], tables.ttft[chosen, kept])
    steps = tables.steps[chosen]
    largest = sizes[-1] / residence[:, -1]
    if loop == "concurrency":
        return _closed(sizes, residence, ttft, steps, loads, output_length)
    saturated = loads > (1.0 - SATURATION_MARGIN) * largest[:, None]
    rate = np.minimum(loads, (1.0 - SATURATION_MARGIN) * largest[:, None])
    chain = chains(residence[:, None], sizes, rate)
    share = chain.probability.copy()
    share[..., -1] += chain.tail
    in_service, waiting = chain.in_service / rate, np.zeros_like(rate)
    if tables.capped:
        scv = tables.service_scv[chosen[:, -1]]
        waiting = chain.queue / rate * _factors(chain.load, float(sizes[-1]), scv)
    else:  # no place to wait for: whoever is beyond the table is in service, too
        in_service = in_service + chain.queue / rate
    if tables.budgeted:
        prompts = tables.prompt_service[chosen, kept]
        waiting = waiting + _prompt_waits(sizes, prompts, rate, in_service)
    mean = share[..., 1:] @ sizes
    joining = tables.first_token_steps * tables.step[chosen, kept]
    own = _seen_by_arrivals(share, ttft - joining * (sizes - 1.0) / sizes)  # the steps are those of the mean batch
    first = np.minimum(own + mean / (1.0 + mean) * _seen_by_arrivals(share, joining), in_service)
    decode, flow = residence - ttft, share[..., 1:] * sizes / residence[:, None]
    event = np.einsum("slm,sm->sl", flow, decode) / np.maximum(np.einsum("slm,sm->sl", flow, steps), 1e-30)
    square = share[..., 1:] @ sizes**2
    return UnderSchedule(
        _metrics(waiting + first, event, waiting + in_service, rate, output_length)
        | {"utilization": np.broadcast_to(loads, rate.shape) / largest[:, None]},
        saturated,
        mean,
        np.sqrt(np.maximum(square - mean**2, 0.0)),
        np.broadcast_to(largest[:, None], rate.shape),
        share,
    )


def _seen_by_arrivals(share: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Mean of ``table`` [schedules, batches] as arrivals see it, with one more in service than there was before."""
    return np.einsum("slm,sm->sl", share[..., :-1], table) + share[..., -1] * table[:, -1:]


def _closed(sizes, residence, ttft, steps, loads, output_length) -> UnderSchedule:
    batch = np.minimum(loads, sizes[-1])

    def at_batch(table):
        return np.stack([np.interp(batch, sizes, row) for row in table])

    time, first, event = at_batch(residence), at_batch(ttft), at_batch((residence - ttft) / np.maximum(steps, 1e-9))
    rate = batch / time
    waiting = np.maximum(loads - batch, 0.0) / rate
    capacity = np.maximum((sizes[-1] / residence[:, -1])[:, None], rate)
    share = np.zeros((*rate.shape, sizes.size + 1))
    low = np.clip(np.searchsorted(sizes, batch, side="right") - 1, 0, sizes.size - 1)
    high = np.minimum(low + 1, sizes.size - 1)
    part = (batch - sizes[low]) / np.where(high > low, sizes[high] - sizes[low], 1.0)
    places = np.arange(batch.size)
    share[:, places, low + 1] += 1.0 - part
    share[:, places, high + 1] += part
    return UnderSchedule(
        _metrics(waiting + first, event, waiting + time, rate, output_length) | {"utilization": rate / capacity},
        np.zeros(rate.shape, dtype=bool),
        np.broadcast_to(batch, rate.shape).copy(),
        np.zeros_like(rate),
        capacity,
        share,
    )


def _metrics(ttft, itl, e2e, throughput, output_length: float) -> dict[str, np.ndarray]:
    after = max(output_length - 1.0, 1e-9)
    return {
        "ttft_mean": ttft,
        "itl_mean": itl,
        "tpot_mean": (e2e - ttft) / after,
        "e2e_mean": e2e,
        "throughput": throughput,
    }


_factor = jax.jit(jax.vmap(waiting_factor, in_axes=(0, None, 0)))
_prompt_wait = jax.jit(jax.vmap(prompt_wait))


def _factors(load: np.ndarray, places: float, service_scv: np.ndarray) -> np.ndarray:
    scv = np.broadcast_to(service_scv[:, None], load.shape)
    return np.asarray(_factor(load.ravel(), places, scv.ravel())).reshape(load.shape)


def _prompt_waits(sizes, prompts, rate, in_service) -> np.ndarray:
    """Mean wait [s] of a prompt for the token budget, [schedules, loads]."""
    seen = np.minimum(rate * in_service + 1.0, sizes[-1])
    service = np.stack([np.interp(row, sizes, table) for row, table in zip(seen, prompts, strict=True)])
    return np.asarray(_prompt_wait(service.ravel(), rate.ravel())).reshape(rate.shape)
