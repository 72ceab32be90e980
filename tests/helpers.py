"""What several tests share: relative closeness, finite differences in log coordinates, outcome names, predictions."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.drafters import DraftCost
from diffspec.results import RESULTS
from diffspec.step_time import RooflineStepTime

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
SERVER_STEP = RooflineStepTime(
    weight_read=6e-3,
    token_compute=4e-5,
    kv_read=6e-8,
    step_overhead=1e-3,
    prefill_token=2e-5,
    draft=DraftCost(pass_base=8e-4, pass_sequence=1e-5),
)
"""A synthetic server's step."""

AS_USERS_COMPILE = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
"""XLA's defaults, for what must hold to rounding; conftest.py has everything else compiled faster."""

# fourth-order central differences: offsets in steps, weights over the step
_OFFSETS = np.array([-2.0, -1.0, 1.0, 2.0])
_WEIGHTS = np.array([1.0, -8.0, 8.0, -1.0]) / 12.0


def experiment(folder: str, script: str):
    """A script of experiments/ as a module."""
    spec = importlib.util.spec_from_file_location(f"{script}_of_{folder}", EXPERIMENTS / folder / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_close(actual, expected, rtol: float, atol: float = 0.0) -> None:
    """|actual - expected| <= atol + rtol*|expected|, NaN never equal, shapes alike after broadcasting."""
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol, equal_nan=False)


def finite_difference(rows: Callable, point, step: float) -> np.ndarray:
    """d rows/d point by fourth-order central differences; `rows` maps (m, d) points to (m, ...) values in one call.

    Result (d, ...). `point` is in log coordinates where values are positive: then one step fits every scale.
    """
    point = np.asarray(point, dtype=float)
    d = point.size
    shifts = (np.eye(d)[:, None, :] * _OFFSETS[None, :, None] * step).reshape(4 * d, d)
    values = np.asarray(rows(point[None, :] + shifts))
    return np.tensordot(_WEIGHTS / step, values.reshape(d, 4, *values.shape[1:]), axes=([0], [1]))


def names(result, size: int) -> list[str]:
    """Outcome names of a batch of `size` outcomes."""
    outcomes = ("successful", "saturated", "metastable", "unconverged")
    lanes = np.stack([np.broadcast_to(np.asarray(result == getattr(RESULTS, name)), size) for name in outcomes])
    assert np.all(lanes.sum(axis=0) == 1)
    return [outcomes[i] for i in lanes.argmax(axis=0)]


@jax.jit
def _predict(model, workload, config):
    return model.predict(workload, config)


def predict(model, workload, config):
    """A prediction, compiled once for each structure; operation by operation it takes a second or more every time."""
    return _predict(*jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=float), (model, workload, config)))
