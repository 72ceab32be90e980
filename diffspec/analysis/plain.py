"""What every answer shares: numbers for JSON, and arguments by which few programs are compiled."""

import dataclasses
import math
from functools import partial

import jax
import numpy as np

from diffspec.configuration import Configuration, batch_cap
from diffspec.fitting.observations import states_of
from diffspec.serving import ServingModel
from diffspec.workload import Workload


def finite(value) -> float | None:
    """A float for JSON; None for infinite or missing numbers and for stand-ins of infinity (above 1e12).

    >>> finite(2), finite(float("inf")), finite(1e13)
    (2.0, None, None)
    """
    value = float(value)
    return value if math.isfinite(value) and abs(value) < 1e12 else None


def as_floats(module):
    """The module with numpy arrays of floats as leaves, so that programs are compiled once for all numbers."""
    return jax.tree.map(partial(np.asarray, dtype=float), module)


def few_sizes(count: int) -> int:
    """The next power of two, at least 2: rows padded to so many share few compiled programs.

    >>> [few_sizes(count) for count in (1, 2, 3, 8, 9)]
    [2, 2, 4, 8, 16]
    """
    return 2 ** max(1, math.ceil(math.log2(count)))


def padded_rows(tree, size: int):
    """Arrays with the last row of the first axis repeated up to ``size`` rows.

    >>> padded_rows(np.array([1.0, 2.0]), 4).tolist()
    [1.0, 2.0, 2.0, 2.0]
    """

    def one(leaf):
        return np.asarray(leaf)[np.minimum(np.arange(size), len(leaf) - 1)]

    return jax.tree.map(one, tree)


def enough_states(serving: ServingModel, workload: Workload, config: Configuration) -> ServingModel:
    """The model with no more states for waiting than the cap of this configuration needs: the same predictions, in a
    fraction of the time. ``workload`` may have a leading axis, over which the cap is the same."""
    cap = batch_cap(workload, config)
    needed = states_of(None if cap is None else float(np.max(np.asarray(cap))))
    return dataclasses.replace(serving, waiting_states=min(serving.waiting_states, needed))
