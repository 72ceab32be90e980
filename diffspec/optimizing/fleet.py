"""The draft length of every deployment of a fleet at every load, in one call: deployments are lanes of one program.

Deployments of one structure (form of the step time, chain of waiting) are stacked and padded to whole chunks, so that
few programs serve any fleet, and laid over all devices by :mod:`jax.sharding`; after ``jax.distributed.initialize``
over those of all processes, each of which calls this with the same fleet and gets the whole answer. Lanes share
nothing, so that numbers do not depend on how many devices there are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffspec.acceptance import AbstractAcceptance, KnownMoments
from diffspec.analysis.answers import metric_values
from diffspec.analysis.plain import as_floats, enough_states, finite
from diffspec.configuration import Configuration
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.observations import UNCAPPED
from diffspec.optimizing.limits import check_question, costs, parse_limit
from diffspec.optimizing.servers import UNFILLED
from diffspec.programs import program
from diffspec.results import RESULTS, InputError
from diffspec.serving import ServingModel
from diffspec.workload import Workload

CHUNK = 256
"""Deployments of one call on one device."""


def optimize_fleet(
    deployments: Mapping[str, FittedDeployment],
    *,
    loads: Sequence[float],
    loop: str = "arrival_rate",
    prompt_length: float,
    output_length: float,
    max_draft_length: int = 8,
    slo: Sequence[str] = (),
    objective: str = "e2e_mean",
    acceptance: AbstractAcceptance | None = None,
    output_scv: float = 0.0,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """The best whole draft length of each of ``deployments`` (name -> deployment) at each load, by exact evaluation of
    all of them; as :func:`diffspec.optimizing.optimize.optimize`, of means, without intervals.

    Returns plain data: ``loads``, ``devices`` and ``programs`` (structures that were compiled), and ``deployments``:
    for each ``deployment`` its ``table`` with, for each load, ``load``, ``feasible``, ``draft_length`` (None: none),
    ``metrics`` and ``speedup``, or the ``error`` of one that cannot be asked.

    Errors: :class:`InputError` for unknown metrics, loads that do not increase, or ranges.
    """
    check_question(objective, loop, loads, max_draft_length)
    limits = [parse_limit(text, instead="a limit on any of them of one model at a time") for text in slo]
    if not deployments:
        raise InputError("fleet: got no deployment; allowed: at least one")
    shape = {"prompt_length": float(prompt_length), "output_length": float(output_length), "output_scv": output_scv}
    workload = as_floats(Workload(**shape, arrival_scv=1.0, **{loop: 1.0}))
    groups: dict[Any, list[tuple[str, Any]]] = {}
    told: dict[str, dict[str, Any]] = {}
    for name, deployment in deployments.items():
        try:
            lane = _lane(deployment, workload, max_draft_length, acceptance)
        except InputError as error:
            told[name] = {"error": str(error), "table": []}
            continue
        groups.setdefault(jax.tree.structure(lane), []).append((name, lane))
    devices, done = jax.devices(), 0
    for members in groups.values():
        step = CHUNK * len(devices)
        for first in range(0, len(members), step):
            part = members[first : first + step]
            if progress is not None:
                progress(f"{done + first} of {len(deployments)} deployments", (done + first) / len(deployments))
            found, saturated = _evaluated([lane for _, lane in part], workload, loop, loads, devices)
            for row, (name, _) in enumerate(part):
                values = {metric: column[row] for metric, column in found.items()}
                known = deployments[name].plain_measured
                told[name] = {"error": None}
                told[name] |= {"table": _chosen(values, saturated[row], known, limits, objective, loads)}
        done += len(members)
    return {
        "objective": objective,
        "limits": [limit.text for limit in limits],
        "loop": loop,
        "loads": [float(load) for load in loads],
        "devices": len(devices),
        "programs": len(groups),
        "deployments": [{"deployment": name, **told[name]} for name in deployments],
    }


def _lane(deployment: FittedDeployment, workload: Workload, longest: int, acceptance: AbstractAcceptance | None):
    """(serving model, configuration without acceptance, moments [lengths, 2]) as arrays of one structure for all that
    can share a program."""
    config = deployment.configuration(float(longest), acceptance=acceptance)
    serving = as_floats(enough_states(jax.tree.map(np.asarray, deployment.serving), workload, config))
    moments = np.asarray(_moments(longest, as_floats(config.acceptance), np.asarray(float(config.draft_probability))))
    bare = replace(
        config,
        draft_length=0.0,
        acceptance=None,
        max_batch_size=UNCAPPED if config.max_batch_size is None else config.max_batch_size,
        kv_capacity_tokens=UNFILLED if config.kv_capacity_tokens is None else config.kv_capacity_tokens,
    )
    return serving, as_floats(bare), moments


@program(0)
def _moments(longest: int, acceptance: AbstractAcceptance, probability):
    """(m1, m2) at draft lengths 0..longest [lengths, 2]."""
    lengths = jnp.arange(longest + 1, dtype=float)
    return jax.vmap(lambda length: jnp.stack(acceptance.moments(length, probability)))(lengths)


def _evaluated(lanes: list, workload: Workload, loop: str, loads: Sequence[float], devices):
    """(means by name, saturated), [lanes, loads, draft lengths], of one chunk: lanes laid over the devices, the last
    one repeated to fill them; few sizes, powers of two, so that few programs are compiled."""
    each = 2 ** max(3, math.ceil(math.log2(len(lanes) / len(devices))))
    count = each * len(devices)
    filled = [*lanes, *[lanes[-1]] * (count - len(lanes))]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *filled)
    over = NamedSharding(Mesh(np.asarray(devices), ("fleet",)), PartitionSpec("fleet"))
    laid = jax.tree.map(
        lambda leaf: jax.make_array_from_callback(leaf.shape, over, lambda index, leaf=leaf: leaf[index]), stacked
    )
    found = _evaluate(loop, *laid, workload, np.asarray(loads, dtype=float))
    if jax.process_count() > 1:
        found = multihost_utils.process_allgather(found, tiled=True)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(lanes)], found)


@program(0)
def _evaluate(loop: str, servings: ServingModel, configs: Configuration, moments, workload: Workload, loads):
    lengths = jnp.arange(moments.shape[1], dtype=float)

    def one(serving, config, moments):
        def at(load, length, pair):
            here = replace(config, draft_length=length, acceptance=KnownMoments(pair[0], pair[1]))
            prediction = serving.predict(replace(workload, **{loop: load}), here)
            return metric_values(prediction), prediction.result == RESULTS.saturated

        return jax.vmap(lambda load: jax.vmap(partial(at, load))(lengths, moments))(loads)

    return jax.vmap(one)(servings, configs, moments)


def _chosen(values, saturated, plain_known: bool, limits, objective: str, loads) -> list[dict[str, Any]]:
    """The decision of one deployment at each load."""
    unknown = (np.arange(saturated.shape[-1]) == 0) & (not plain_known)
    cost, _, feasible = costs(values, saturated | unknown, limits, objective)
    table = []
    for i, load in enumerate(loads):
        kept = np.where(feasible[i], cost[i], np.inf)
        best, any_kept = int(np.argmin(kept)), bool(feasible[i].any())
        base = values["e2e_mean"][i, 0] if plain_known and not saturated[i, 0] else np.nan
        table.append(
            {
                "load": float(load),
                "feasible": any_kept,
                "draft_length": best if any_kept else None,
                "metrics": {name: finite(column[i, best]) for name, column in values.items()} if any_kept else {},
                "speedup": finite(base / values["e2e_mean"][i, best]) if any_kept else None,
            }
        )
    return table
