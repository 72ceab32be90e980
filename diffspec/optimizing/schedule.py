"""The engines' own form of adaptation: a draft length per batch size, and the equilibrium under it.

At each batch n the best draft length is argmin_k step_time(n, k)/tokens_per_step(k): the schedule maximises the token
rate of the batch at hand and knows nothing of arrivals. Under a token budget only draft lengths that leave room for the
prompts that keep the batch as large are compared. Its equilibrium is solved here and compared with the best static
draft length, since a schedule can be worse (or no better) than one number.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.analysis.plain import FAST_COMPILE
from diffspec.configuration import Configuration
from diffspec.optimizing.relaxation import at_draft_length
from diffspec.serving import MOST_STATES, ServingModel
from diffspec.steady_state import SATURATION_MARGIN
from diffspec.waiting import prompt_wait, queue_scv, requests_in_system, waiting_factor
from diffspec.workload import Workload

LONGEST_SCHEDULE = MOST_STATES
"""Batches that a schedule covers when no cap is known."""


class BatchSchedule(NamedTuple):
    """A draft length per batch, and what a request costs under it.

    * ``ranges``: [[first_batch, last_batch, draft_length], ...], up to the engine's own cap
    * ``sizes`` [req]: the batches that can be kept in service, 1, 2, ... and the largest; ``residence`` [s]: time in
      service at each; ``prompt_service`` [s]: what a prompt takes of the token budget at each, None without a budget
    * ``service_scv`` [1]: of the gaps between departures of the largest batch; ``capped``: whether requests wait there
    """

    ranges: list[list[int]]
    sizes: np.ndarray
    residence: np.ndarray
    prompt_service: np.ndarray | None
    service_scv: float
    capped: bool


@partial(jax.jit, static_argnums=(0, 1), compiler_options=FAST_COMPILE)
def _tables(longest: int, batches: int, serving: ServingModel, workload: Workload, config: Configuration):
    """The largest batch of each draft length 0..longest [req], the scv of its steps and its prefill [s]; and at batches
    1, 2, ... and at the largest of all, no more than batches + 1: seconds per token, residence and prompt service."""
    lengths = jnp.arange(longest + 1, dtype=float)

    def largest(length):
        most = serving.within_budget(workload, at_draft_length(config, length))[1]
        return jnp.asarray(jnp.inf if most is None else most, dtype=float)

    most = jax.vmap(largest)(lengths)
    top = jnp.clip(jnp.max(most), 1.0, batches + 1.0)
    sizes = jnp.append(jnp.arange(1, batches + 1, dtype=float), top)

    def row(length):
        chosen = at_draft_length(config, length)
        request, _ = serving.within_budget(workload, chosen)

        def cell(n):
            return request.step_parts(n).total, serving.residence_time(workload, chosen, n), request.prompt_service(n)

        step, residence, prompts = jax.vmap(cell)(sizes)
        tokens = jnp.ones(()) if config.acceptance is None else config.acceptance.moments(length)[0]
        pace = step / (1.0 + config.draft_probability * (tokens - 1.0))
        return (request.spread / jnp.maximum(request.steps, 1e-9)) ** 2, request.prefill, pace, residence, prompts

    return sizes, most, *jax.vmap(row)(lengths)


def batch_schedule(
    serving: ServingModel, workload: Workload, config: Configuration, longest: int, batches: int
) -> BatchSchedule:
    """The schedule over batches 1..``batches`` with draft lengths 0..``longest``.

    A draft length is taken at batches up to its largest one (:meth:`ServingModel.within_budget`); a batch that none can
    keep in service gets the one whose largest is largest.
    """
    tables = _tables(longest, batches, serving, workload, config)
    sizes, most, scv, prefill, pace, residence, prompts = (np.asarray(table) for table in tables)
    allowed = sizes <= most[:, None] * (1.0 + 1e-9)
    allowed[int(np.argmax(most))] |= ~allowed.any(axis=0)
    best = np.argmin(np.where(allowed, pace, np.inf), axis=0)
    edges = [0, *(np.flatnonzero(np.diff(best[:-1])) + 1).tolist(), batches]
    ranges = [[first + 1, last, int(best[first])] for first, last in itertools.pairwise(edges)]
    capped = float(np.max(most)) < batches + 1
    kept = np.append(np.flatnonzero(sizes[:-1] < sizes[-1]), batches) if capped else np.arange(batches)
    last = best[kept[-1]]
    residence = residence[best[kept], kept]
    prompt_share = sizes[kept[-1]] * prefill[last] * float(serving.prefill_interference) / residence[-1]
    return BatchSchedule(
        ranges,
        sizes[kept],
        residence,
        None if config.max_batched_tokens is None else prompts[best[kept], kept],
        float(queue_scv(scv[last], prompt_share)),
        capped,
    )


def latency_under_schedule(schedule: BatchSchedule, load: float, loop: str) -> float | None:
    """Mean end-to-end latency [s] at the equilibrium under a schedule, waiting for a place and for the token budget
    included (as :meth:`ServingModel.predict` does); None when the load saturates it. Poisson arrivals in open loops."""
    sizes, residence = schedule.sizes, schedule.residence
    in_service = residence_under_schedule(sizes, residence, load, loop)
    if in_service is None or loop == "concurrency":
        return in_service
    waiting: Any = 0.0
    if schedule.capped:
        if load > (1.0 - SATURATION_MARGIN) * sizes[-1] / residence[-1]:
            return None
        chain = requests_in_system(jnp.asarray(residence), jnp.asarray(load), jnp.asarray(sizes[-1]))
        waiting = chain.waiting_time * waiting_factor(chain.load, sizes[-1], schedule.service_scv)
    if schedule.prompt_service is not None:
        seen = min(load * in_service + 1.0, sizes[-1])
        waiting = waiting + prompt_wait(np.interp(seen, sizes, schedule.prompt_service), load)
    return float(waiting) + in_service


def residence_under_schedule(
    sizes: np.ndarray, residence: np.ndarray, load: float, loop: str, arrival_scv: float = 1.0
) -> float | None:
    """Residence time [s] at the smallest equilibrium under a schedule; None when the load saturates it.

    The table at ``sizes`` = 1, 2, ... [req] is joined linearly; in an open loop B = load*residence(max(1, B +
    arrival_scv)), in a closed one B = min(load, largest batch), waiting above it included.
    """
    if loop == "concurrency":
        batch = min(load, sizes[-1])
        return float(np.interp(batch, sizes, residence) * load / batch)
    grid = np.unique(np.concatenate([np.linspace(0.0, 1.0, 33)[:-1], sizes]))
    seen = np.minimum(np.maximum(grid + arrival_scv, 1.0), sizes[-1])
    gap = grid - load * np.interp(seen, sizes, residence)
    crossing = np.flatnonzero(gap >= 0)
    if not crossing.size:
        return None
    last = crossing[0]
    low, high = grid[last - 1], grid[last]
    share = gap[last - 1] / (gap[last - 1] - gap[last])
    return float((low + share * (high - low)) / load)
