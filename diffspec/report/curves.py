"""Predictions over a grid of draft lengths and loads: one compiled call for a whole figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np

from diffspec.acceptance import AbstractAcceptance, KnownMoments
from diffspec.analysis.plain import as_floats
from diffspec.configuration import Configuration
from diffspec.fitting.deployment import FittedDeployment
from diffspec.prediction import STAGES, Prediction
from diffspec.programs import program
from diffspec.results import RESULTS
from diffspec.serving import ServingModel
from diffspec.workload import Workload


@dataclass(frozen=True)
class Curves:
    """Steady-state predictions of one loop kind. ``values[metric]`` has a row per draft length and a column per load
    (s, NaN where saturated); ``stages[stage]`` the same for the parts of e2e_latency; ``capacity`` per draft length."""

    loop: str
    draft_lengths: tuple[int, ...]
    loads: np.ndarray
    values: dict[str, np.ndarray]
    stages: dict[str, np.ndarray]
    capacity: np.ndarray

    def of(self, metric: str, draft_length: int) -> np.ndarray:
        """One curve."""
        return self.values[metric][self.draft_lengths.index(draft_length)]

    def speedup(self, draft_length: int) -> np.ndarray:
        """e2e_latency without speculation over that with it; needs draft length 0 among the curves."""
        return self.of("e2e_latency", 0) / self.of("e2e_latency", draft_length)

    def breakeven(self, draft_length: int) -> float | None:
        """Load at which the speedup falls through 1, between the grid's loads by interpolation; None if it does not."""
        gain = np.log(self.speedup(draft_length))
        crossing = np.flatnonzero((gain[:-1] > 0) & (gain[1:] <= 0))
        if not len(crossing):
            return None
        left = int(crossing[0])
        share = gain[left] / (gain[left] - gain[left + 1])
        return float(self.loads[left] + share * (self.loads[left + 1] - self.loads[left]))


@program()
def _grid(serving: ServingModel, config: Configuration, lengths: Any, draft_lengths: Any, loads: dict[str, Any]):
    prompt, output = lengths

    def point(loop, draft_length, load):
        workload = Workload(prompt_length=prompt, output_length=output, **{loop: load})
        return serving.predict(workload, eqx.tree_at(lambda c: c.draft_length, config, draft_length))

    def over_loads(loop, values):
        return jax.vmap(lambda k: jax.vmap(lambda load: point(loop, k, load))(values))(draft_lengths)

    return {loop: over_loads(loop, values) for loop, values in loads.items()}


def draw_curves(
    deployment: FittedDeployment,
    draft_lengths: Sequence[int],
    *,
    prompt_length: float,
    output_length: float,
    arrival_rates: np.ndarray | None = None,
    concurrencies: np.ndarray | None = None,
    acceptance: AbstractAcceptance | None = None,
) -> dict[str, Curves]:
    """Curves by loop kind ("arrival_rate", "concurrency"), with the deployment's own acceptance unless one is given."""
    given = {"arrival_rate": arrival_rates, "concurrency": concurrencies}
    loads = {loop: np.asarray(values, dtype=float) for loop, values in given.items() if values is not None}
    known = acceptance or deployment.acceptance or KnownMoments(1.0, 1.0)
    config = deployment.configuration(float(max(draft_lengths)), acceptance=known)
    if config.acceptance is None:  # only draft length 0 is asked for
        config = Configuration(
            acceptance=known, max_batch_size=config.max_batch_size, kv_capacity_tokens=config.kv_capacity_tokens
        )
    config, serving = as_floats(config), as_floats(deployment.serving)
    shape = (np.asarray(prompt_length, dtype=float), np.asarray(output_length, dtype=float))
    predictions = _grid(serving, config, shape, np.asarray(draft_lengths, dtype=float), loads)
    return {loop: _curves(loop, tuple(draft_lengths), values, predictions[loop]) for loop, values in loads.items()}


def _curves(loop: str, draft_lengths: tuple[int, ...], loads: np.ndarray, prediction: Prediction) -> Curves:
    saturated = np.asarray(prediction.result == RESULTS.saturated)

    def values(array):
        return np.where(saturated, np.nan, np.asarray(array, dtype=float))

    names = ("ttft", "itl", "tpot", "e2e_latency", "throughput")
    return Curves(
        loop=loop,
        draft_lengths=draft_lengths,
        loads=loads,
        values={name: values(getattr(prediction, name)) for name in names},
        stages={
            stage: values(prediction.decomposition[stage].load_independent)
            + values(prediction.decomposition[stage].load_dependent)
            for stage in STAGES
        },
        capacity=np.asarray(prediction.capacity)[:, 0],
    )
