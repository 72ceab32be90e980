"""The engines' own form of adaptation: a draft length per batch size, and the equilibrium under it.

At each batch n the best draft length is argmin_k step_time(n, k)/tokens_per_step(k): the schedule maximises the token
rate of the batch at hand and knows nothing of arrivals. Its equilibrium is solved here and compared with the best
static draft length, since a schedule can be worse (or no better) than one number.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.analysis.answers import FAST_COMPILE
from diffspec.configuration import Configuration
from diffspec.optimizing.relaxation import at_draft_length
from diffspec.serving import ServingModel
from diffspec.workload import Workload

LONGEST_SCHEDULE = 1024
"""Batches that a schedule covers when no cap is known."""


@partial(jax.jit, static_argnums=(0, 1), compiler_options=FAST_COMPILE)
def _tables(longest: int, batches: int, serving: ServingModel, workload: Workload, config: Configuration):
    lengths = jnp.arange(longest + 1, dtype=float)
    sizes = jnp.arange(1, batches + 1, dtype=float)

    def row(length):
        chosen = at_draft_length(config, length)

        def cell(n):
            return serving.step_parts(workload, chosen, n).total, serving.residence_time(workload, chosen, n)

        step, residence = jax.vmap(cell)(sizes)
        tokens = jnp.ones(()) if config.acceptance is None else config.acceptance.moments(length)[0]
        return step / (1.0 + config.draft_probability * (tokens - 1.0)), residence

    return jax.vmap(row)(lengths)


def batch_schedule(
    serving: ServingModel, workload: Workload, config: Configuration, longest: int, batches: int
) -> tuple[list[list[int]], np.ndarray]:
    """([[first_batch, last_batch, draft_length], ...], residence time [s] at batch 1..batches under the schedule)."""
    pace, residence = (np.asarray(table) for table in _tables(longest, batches, serving, workload, config))
    best = np.argmin(pace, axis=0)
    edges = [0, *(np.flatnonzero(np.diff(best)) + 1).tolist(), batches]
    ranges = [[first + 1, last, int(best[first])] for first, last in itertools.pairwise(edges)]
    return ranges, residence[best, np.arange(batches)]


def residence_under_schedule(residence: np.ndarray, load: float, loop: str, arrival_scv: float = 1.0) -> float | None:
    """Residence time [s] at the smallest equilibrium under a schedule; None when the load saturates it.

    The table at whole batches is joined linearly; in an open loop B = load*residence(max(1, B + arrival_scv)), in a
    closed one B = min(load, largest batch), waiting above it included.
    """
    sizes = np.arange(1, len(residence) + 1, dtype=float)
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
