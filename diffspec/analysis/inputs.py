"""What may move a metric: every parameter, workload field and configuration field, as one vector of numbers.

An acceptance is moved as a whole: every conditional rate is multiplied by the same factor, and the number told is the
rate of the first position.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffspec.acceptance import AbstractPositionwise
from diffspec.configuration import Configuration
from diffspec.parameters import get_parameters, parameter_infos, set_parameters
from diffspec.serving import ServingModel
from diffspec.workload import Workload

WORKLOAD_UNITS = {
    "arrival_rate": "req/s",
    "concurrency": "req",
    "prompt_length": "tok",
    "output_length": "tok",
    "arrival_scv": "1",
    "output_scv": "1",
    "n_requests": "req",
    "prefix_hit_rate": "1",
}
CONFIGURATION_UNITS = {
    "draft_length": "tok",
    "acceptance_rate": "1",
    "max_batch_size": "req",
    "kv_capacity_tokens": "tok",
    "max_batched_tokens": "tok",
    "draft_probability": "1",
    "verifier_scale": "1",
    "drafter_scale": "1",
}
_HIGHEST = {"acceptance_rate": 1.0, "prefix_hit_rate": 1.0, "draft_probability": 1.0, "draft_length": 32.0}
_LOWEST = {"output_length": 1.0, "concurrency": 1.0, "n_requests": 1.0, "max_batch_size": 1.0}
_LOWEST |= {"max_batched_tokens": 1.0}


class Point(NamedTuple):
    """An operating point: the server, its load, its configuration."""

    serving: ServingModel
    workload: Workload
    config: Configuration


class Inputs(NamedTuple):
    """The inputs of a point, in order: ``kinds`` ("parameter", "workload", "configuration") and ``paths``; hashable.

    >>> from diffspec.step_time import AffineStepTime
    >>> point = Point(ServingModel(AffineStepTime(0.02)), Workload(64, 65, arrival_rate=2.0), Configuration())
    >>> inputs = inputs_of(point)
    >>> moved = inputs.placed(point, inputs.values(point) * 2.0)
    >>> float(moved.workload.arrival_rate), float(moved.serving.step_time.verify_base)
    (4.0, 0.04)
    """

    kinds: tuple[str, ...]
    paths: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names as they are told."""
        return tuple(path.removeprefix("step_time.") for path in self.paths)

    def units(self, point: Point) -> list[str]:
        """The unit of each input."""
        infos = parameter_infos(point.serving)
        fields = WORKLOAD_UNITS | CONFIGURATION_UNITS
        return [
            infos[path].unit if kind == "parameter" else fields[path]
            for kind, path in zip(self.kinds, self.paths, strict=True)
        ]

    def values(self, point: Point) -> Float[np.ndarray, "inputs"]:
        """The numbers of a point; their units are :meth:`units`."""
        parameters = get_parameters(point.serving)
        found = []
        for kind, path in zip(self.kinds, self.paths, strict=True):
            if kind == "parameter":
                found.append(parameters[path])
            elif path == "acceptance_rate":
                found.append(_first_rate(point.config))
            else:
                found.append(getattr(point.workload if kind == "workload" else point.config, path))
        return np.asarray([float(value) for value in found])

    def placed(self, point: Point, values) -> Point:
        """The point with its inputs at ``values`` [inputs]; traceable."""
        by_kind: dict[str, dict[str, Any]] = {"parameter": {}, "workload": {}, "configuration": {}}
        for index, (kind, path) in enumerate(zip(self.kinds, self.paths, strict=True)):
            by_kind[kind][path] = values[index]
        fields = by_kind["configuration"]
        if "acceptance_rate" in fields:
            factor = fields.pop("acceptance_rate") / _first_rate(point.config)
            fields["acceptance"] = jax.tree.map(lambda rate: rate * factor, point.config.acceptance)
        return Point(
            set_parameters(point.serving, by_kind["parameter"]),
            replace(point.workload, **by_kind["workload"]),
            replace(point.config, **fields),
        )

    def allowed(self, point: Point) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest value of each input that means something."""
        infos, values = parameter_infos(point.serving), self.values(point)
        low, high = np.zeros(len(values)), np.full(len(values), np.inf)
        for index, (kind, path) in enumerate(zip(self.kinds, self.paths, strict=True)):
            if kind == "parameter":
                low[index], high[index] = infos[path].low, infos[path].high
            else:
                low[index], high[index] = _LOWEST.get(path, 0.0), _HIGHEST.get(path, np.inf)
            if path == "acceptance_rate":
                rates = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(point.config.acceptance)])
                high[index] = values[index] / max(float(rates.max()), 1e-300)
        return low, high


def inputs_of(point: Point, without: tuple[str, ...] = ()) -> Inputs:
    """Every input of a point that is given, but those named ``without``: parameters, then the workload, then the
    configuration. Without speculation the drafter's own fields are left out."""
    found = [("parameter", path) for path in get_parameters(point.serving)]
    found += [("workload", name) for name in WORKLOAD_UNITS if getattr(point.workload, name) is not None]
    speculative = point.config.acceptance is not None and float(point.config.draft_length) > 0
    for name in CONFIGURATION_UNITS:
        if name == "acceptance_rate":
            given = speculative and isinstance(point.config.acceptance, AbstractPositionwise)
            given = given and float(_first_rate(point.config)) > 0
        elif name in ("draft_length", "draft_probability", "drafter_scale"):
            given = speculative
        else:
            given = getattr(point.config, name) is not None
        found += [("configuration", name)] if given else []
    kept = [(kind, path) for kind, path in found if path not in without]
    return Inputs(tuple(kind for kind, _ in kept), tuple(path for _, path in kept))


def _first_rate(config: Configuration):
    assert isinstance(config.acceptance, AbstractPositionwise)
    return config.acceptance.conditional_rates(jnp.asarray(config.draft_length, dtype=float))[0]
