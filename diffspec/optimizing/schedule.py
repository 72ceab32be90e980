"""The engines' own form of adaptation: a draft length per batch size, and the equilibrium under it.

At each batch n the best draft length is argmin_k step_time(n, k)/tokens_per_step(k): the schedule maximises the token
rate of the batch at hand and knows nothing of arrivals. Under a token budget only draft lengths that leave room for the
prompts that keep the batch as large are compared. Its equilibrium is solved here and compared with the best static
draft length, since a schedule can be worse (or no better) than one number.
"""

import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffspec.configuration import Configuration
from diffspec.optimizing.batch_tables import batch_tables
from diffspec.serving import ServingModel
from diffspec.steady_state import SATURATION_MARGIN
from diffspec.waiting import prompt_wait, requests_in_system, waiting_factor
from diffspec.workload import Workload


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


def batch_schedule(
    serving: ServingModel, workload: Workload, config: Configuration, longest: int, batches: int
) -> BatchSchedule:
    """The schedule over batches 1..``batches`` with draft lengths 0..``longest``.

    A draft length is taken at batches up to its largest one (:meth:`ServingModel.within_budget`); a batch that none can
    keep in service gets the one whose largest is largest.
    """
    tables = batch_tables(serving, workload, config, longest, batches)
    best = np.argmin(np.where(tables.allowed, tables.pace, np.inf), axis=0)
    kept = tables.kept
    return BatchSchedule(
        ranges_of(best[:-1]),
        tables.sizes[kept],
        tables.residence[best[kept], kept],
        tables.prompt_service[best[kept], kept] if tables.budgeted else None,
        float(tables.service_scv[best[kept[-1]]]),
        tables.capped,
    )


def ranges_of(draft_lengths: np.ndarray) -> list[list[int]]:
    """Draft lengths of batches 1, 2, ... as [[first_batch, last_batch, draft_length], ...].

    >>> ranges_of(np.array([3, 3, 1]))
    [[1, 2, 3], [3, 3, 1]]
    """
    edges = [0, *(np.flatnonzero(np.diff(draft_lengths)) + 1).tolist(), len(draft_lengths)]
    return [[first + 1, last, int(draft_lengths[first])] for first, last in itertools.pairwise(edges)]


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
