"""What each draft length costs at each batch: the table that schedules over the batch are made from.

Rows are draft lengths k = 0..K, columns batches n = 1, 2, ... and the largest that can be kept in service. A draft
length whose own largest batch is smaller (a token budget) keeps its throughput beyond it: n requests then stay

    residence_k(n) = n/most_k * residence_k(most_k),  n > most_k

and the time that this adds to a request passes before its first token, since it waits for a place.

Draft length 0 comes twice: as a server without a drafter, and inside a schedule, where the drafter stays loaded and
reads every prompt (``idle``): its prefill is that of draft length 1.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffspec.configuration import Configuration, batch_cap
from diffspec.optimizing.relaxation import at_draft_length
from diffspec.programs import program
from diffspec.request_cost import RequestCost
from diffspec.serving import MOST_STATES, ServingModel
from diffspec.waiting import queue_scv
from diffspec.workload import Workload

LONGEST_SCHEDULE = MOST_STATES
"""Batches that a schedule covers when no cap is known."""


class BatchTables(NamedTuple):
    """Costs by draft length (rows) and batch (columns).

    * ``sizes`` [req]: 1, 2, ... ``batches`` (the engine's own cap, whole), and the largest that can be kept in service
    * ``most`` [req]: largest batch of each draft length, infinite without a cap
    * ``tokens_per_step`` [tok], ``steps`` [step], ``step_scv`` [1] of the steps of a request, ``prefill`` [s]
    * ``pace`` [s/tok]: step time over tokens per step; ``residence``, ``ttft`` [s]: time in service and its part until
      the first token, beyond a draft length's own largest batch as in the module; ``prompt_service`` [s]: of the token
      budget; ``step`` [s]: the engine step
    * ``idle_residence``, ``idle_ttft`` [n] [s]: those of draft length 0 with the drafter loaded
    * ``first_token_steps`` [step] that a prompt waits at a busy engine, ``interference`` [1] of a prompt with the
      others, ``budgeted``: whether a token budget was asked with
    """

    sizes: np.ndarray
    most: np.ndarray
    tokens_per_step: np.ndarray
    steps: np.ndarray
    step_scv: np.ndarray
    prefill: np.ndarray
    pace: np.ndarray
    step: np.ndarray
    residence: np.ndarray
    ttft: np.ndarray
    prompt_service: np.ndarray
    idle_residence: np.ndarray
    idle_ttft: np.ndarray
    first_token_steps: float
    interference: float
    budgeted: bool

    @property
    def batches(self) -> int:
        """The last whole batch of the table [req]: schedules cover 1..batches."""
        return self.sizes.size - 1

    @property
    def capped(self) -> bool:
        """Whether requests wait for a place at the largest batch."""
        return bool(np.max(self.most) < self.batches + 1)

    @property
    def kept(self) -> np.ndarray:
        """The columns of the batches that can be kept in service: 1, 2, ..., and the largest (fractional) one."""
        if not self.capped:
            return np.arange(self.batches)
        return np.append(np.flatnonzero(self.sizes[:-1] < self.sizes[-1]), self.batches)

    @property
    def allowed(self) -> np.ndarray:
        """[k, n]: whether a draft length can keep the batch in service; where none can, the one that keeps most."""
        allowed = self.sizes <= self.most[:, None] * (1.0 + 1e-9)
        allowed[int(np.argmax(self.most))] |= ~allowed.any(axis=0)
        return allowed

    @property
    def service_scv(self) -> np.ndarray:
        """[k]: squared coefficient of variation of the gaps between departures of the largest batch."""
        last = self.kept[-1]
        share = self.sizes[last] * self.prefill * self.interference / self.residence[:, last]
        pairs = zip(self.step_scv.tolist(), share.tolist(), strict=True)
        return np.asarray([float(queue_scv(scv, fixed)) for scv, fixed in pairs])


@program(0, 1)
def _tables(longest: int, batches: int, serving: ServingModel, workload: Workload, config: Configuration):
    lengths = jnp.arange(longest + 1, dtype=float)

    def largest(length):
        most = serving.within_budget(workload, at_draft_length(config, length))[1]
        return jnp.asarray(jnp.inf if most is None else most, dtype=float)

    most = jax.vmap(largest)(lengths)
    top = jnp.clip(jnp.max(most), 1.0, batches + 1.0)
    sizes = jnp.append(jnp.arange(1, batches + 1, dtype=float), top)

    def times(request, largest):
        def cell(n):
            own = jnp.minimum(n, largest)
            residence, first = serving.times_in_service(workload, request, own)
            waits = residence * (n / own - 1.0)
            return residence + waits, first + waits

        return jax.vmap(cell)(sizes)

    def row(length, largest):
        request = serving.request_cost(workload, at_draft_length(config, length))
        step = jax.vmap(lambda n: request.step_parts(n).total)(sizes)
        prompts = jax.vmap(request.prompt_service)(sizes)
        tokens = jnp.ones(()) if config.acceptance is None else config.acceptance.moments(length)[0]
        emitted = 1.0 + config.draft_probability * (tokens - 1.0)
        scv = (request.spread / jnp.maximum(request.steps, 1e-9)) ** 2
        costs = emitted, request.steps, scv, request.prefill, step / emitted, step
        return *costs, *times(request, largest), prompts

    rows = jax.vmap(row)(lengths, most)
    idle = idle_request(serving, workload, config)
    return sizes, most, *rows, *times(idle, most[0])


def idle_request(serving: ServingModel, workload: Workload, config: Configuration) -> RequestCost:
    """The cost of a request at draft length 0 whose prompt a loaded drafter reads all the same."""
    plain, drafted = (serving.request_cost(workload, at_draft_length(config, jnp.asarray(k))) for k in (0.0, 1.0))
    return eqx.tree_at(lambda request: request.prefill, plain, drafted.prefill)


def batch_tables(
    serving: ServingModel, workload: Workload, config: Configuration, longest: int, batches: int
) -> BatchTables:
    """The table of draft lengths 0..``longest`` at batches 1..``batches`` and at the largest of all, no more than
    batches + 1; ``config`` at any draft length, floats as leaves."""
    found = map(np.asarray, _tables(longest, batches, serving, workload, config))
    columns = dict(zip(BatchTables._fields, found, strict=False))
    return BatchTables(
        **columns,
        first_token_steps=float(serving.first_token_steps),
        interference=float(serving.prefill_interference),
        budgeted=config.max_batched_tokens is not None,
    )


def schedule_length(config: Configuration, workload: Workload) -> int:
    """The batches that a schedule covers: the engine's own cap, or :data:`LONGEST_SCHEDULE`."""
    cap = batch_cap(workload, config)
    return LONGEST_SCHEDULE if cap is None else max(1, int(min(float(cap), LONGEST_SCHEDULE)))
