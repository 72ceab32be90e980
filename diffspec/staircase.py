"""CUDA-graph padding: below the capture limit an engine runs a step at the next captured size.

A smooth step time is right on average and in optimisation; what an engine does is a staircase in the batch. Decisions
found on the smooth form are re-scored on this one, by the simulator or the chain of :mod:`diffspec.waiting`, which take
any step time.
"""

from itertools import pairwise

import equinox as eqx
import jax.numpy as jnp

from diffspec.batch_state import BatchState, StepParts
from diffspec.results import InputError
from diffspec.step_time import AbstractStepTime

CAPTURE_SIZES = (1, 2, 4, *range(8, 513, 8))
"""Sizes that vLLM captures by default [tok]; yours are in its log (`cudagraph_capture_sizes`)."""


class StaircaseStepTime(AbstractStepTime):
    """``inner`` at the next captured number of query tokens: t(T) = inner(min{c in sizes: c >= T}), T <= max(sizes).

    Padding adds computed tokens, no context: sequences (launch and sampling) are padded in the same proportion, cached
    tokens are not. Steps that carry prefill, and those above the largest size, run as they are. ``capture_sizes``
    [tok]: whole and increasing. A staircase jumps, so the scale bound does not hold and the smallest equilibrium is
    searched.
    Source: vLLM's piecewise and full CUDA graphs.

    >>> from diffspec.step_time import AffineStepTime
    >>> step = StaircaseStepTime(AffineStepTime(verify_base=0.01, verify_query=1e-4), (8, 16))
    >>> [round(float(step(BatchState(sequences=n, query_tokens=n)).total), 6) for n in (3.0, 8.0, 9.0, 20.0)]
    [0.0108, 0.0108, 0.0116, 0.012]
    """

    inner: AbstractStepTime
    capture_sizes: tuple[int, ...] = eqx.field(static=True, default=CAPTURE_SIZES)
    scale_bounded: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        sizes = self.capture_sizes
        if not sizes or sizes[0] < 1 or any(b <= a for a, b in pairwise(sizes)):
            raise InputError(f"capture_sizes: got {sizes}; allowed: whole numbers of at least 1, increasing")

    def __call__(self, state: BatchState) -> StepParts:
        tokens = jnp.asarray(state.query_tokens, dtype=float)
        sizes = jnp.asarray(self.capture_sizes, dtype=float)
        place = jnp.minimum(jnp.searchsorted(sizes, tokens - 1e-9), len(self.capture_sizes) - 1)
        graph = (tokens > 0) & (tokens <= sizes[-1]) & (jnp.asarray(state.prefill_tokens) <= 0)
        factor = jnp.where(graph, sizes[place] / jnp.where(graph, tokens, 1.0), 1.0)
        return self.inner(
            BatchState(
                sequences=state.sequences * factor,
                query_tokens=state.query_tokens * factor,
                kv_tokens=state.kv_tokens,
                prefill_tokens=state.prefill_tokens,
                draft_passes=state.draft_passes,
                draft_tokens=state.draft_tokens * factor,
            )
        )
