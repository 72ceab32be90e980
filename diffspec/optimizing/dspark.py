"""Step-cost tables for SGLang's DSpark planner, from a fitted step time: both forms that it reads.

* by tokens: steps/s at M batch tokens, with full drafts of k: M/(1 + k) sequences; made nonincreasing, as steps are
* additive: T(R, M) = bias + alpha(R) + theta(M) over R requests and M tokens (R <= M <= R*(1 + k)), the least squares
  fit of the model's own step time on such a grid
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import ConstantAcceptance
from diffspec.fitting.deployment import FittedDeployment
from diffspec.step_time import BatchState, scaled

MOST_PROBES = 24


def probes(last: int) -> list[int]:
    """Whole numbers from 1 to ``last``, evenly spaced in logarithms, no more than :data:`MOST_PROBES`.

    >>> probes(6), len(probes(1024))
    ([1, 2, 3, 4, 5, 6], 24)
    """
    spaced = np.unique(np.round(np.geomspace(1, last, MOST_PROBES)).astype(int))
    small = np.arange(1, min(last, MOST_PROBES) + 1)
    extra = small[~np.isin(small, spaced)][: MOST_PROBES - spaced.size]
    return [int(probe) for probe in np.sort(np.concatenate([spaced, extra]))][:last]


def export_subject(deployment: FittedDeployment, drafter_params: float | None = None) -> dict[str, Any]:
    """What exports need of a deployment beside the policy: ``method``, ``drafter``, and ``step_time(draft_length,
    sequences, query_tokens, context)`` [s] of arrays, with the drafter of the size asked for."""
    config = deployment.configuration(1.0, acceptance=ConstantAcceptance(0.5), drafter_params=drafter_params)
    own = scaled(deployment.serving.step_time, drafter=float(config.drafter_scale))

    @jax.jit
    def steps(length, sequences, query_tokens, context):
        state = BatchState(
            sequences=sequences,
            query_tokens=query_tokens,
            kv_tokens=sequences * context,
            draft_passes=length,
            draft_tokens=sequences * length,
        )
        return own(state).total

    def step_time(length, sequences, query_tokens, context):
        found = jax.vmap(steps, in_axes=(None, 0, 0, None))
        floats = (jnp.asarray(value, dtype=float) for value in (length, sequences, query_tokens, context))
        return np.asarray(found(*floats))

    names = {name: deployment.defaults.get(name) for name in ("method", "drafter")}
    return names | {"step_time": step_time}


def dspark_tables(
    step_time: Callable[[float, np.ndarray, np.ndarray, float], np.ndarray],
    draft_length: int,
    batches: int,
    context: float,
) -> tuple[dict[str, Any], dict[str, Any], float]:
    """(table by tokens, additive table, largest relative error of the additive one on its grid).

    ``step_time(draft_length, sequences, query_tokens, context)`` [s] for arrays of sequences and query tokens.
    """
    tokens = np.asarray(probes(batches * (1 + draft_length)))
    step = step_time(float(draft_length), tokens / (1.0 + draft_length), tokens.astype(float), context)
    step = np.maximum.accumulate(step)
    diagonal = {
        "sample_batch_tokens": tokens.tolist(),
        "sample_steps_per_sec": (1.0 / step).tolist(),
        "max_batch_tokens": int(tokens[-1]),
    }
    requests = np.asarray(probes(batches))
    pairs = [(r, m) for r in range(requests.size) for m in range(tokens.size) if requests[r] <= tokens[m]]
    pairs = [(r, m) for r, m in pairs if tokens[m] <= requests[r] * (1 + draft_length)]
    row, column = (np.asarray(index) for index in zip(*pairs, strict=True))
    wanted = step_time(float(draft_length), requests[row].astype(float), tokens[column].astype(float), context)
    used = np.unique(column)
    design = np.zeros((len(pairs), 1 + requests.size + used.size))
    places = np.arange(len(pairs))
    design[:, 0] = 1.0
    design[places, 1 + row] = 1.0
    design[places, 1 + requests.size + np.searchsorted(used, column)] = 1.0
    solved = np.linalg.lstsq(design / wanted[:, None], np.ones(len(pairs)), rcond=None)[0]  # relative errors
    alpha, theta = solved[1 : 1 + requests.size], solved[1 + requests.size :]
    additive = {
        "bias_seconds": float(solved[0] + alpha[0] + theta[0]),
        "bs_probes": requests.tolist(),
        "alpha_seconds": (alpha - alpha[0]).tolist(),
        "m_probes": tokens[used].tolist(),
        "theta_seconds": (theta - theta[0]).tolist(),
    }
    return diagonal, additive, float(np.max(np.abs(design @ solved / wanted - 1.0)))
