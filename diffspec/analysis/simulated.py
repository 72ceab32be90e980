"""A deployment simulated: what `diffspec simulate` answers, with the analytic model's numbers beside it."""

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from diffspec.acceptance import AbstractPositionwise
from diffspec.analysis.answers import predict_answer
from diffspec.configuration import Configuration
from diffspec.fitting.deployment import FittedDeployment
from diffspec.results import InputError
from diffspec.simulating import Engine, Simulation, simulate
from diffspec.workload import Workload

LAWS = ("fixed", "geometric", "lognormal")


def simulate_answer(
    deployment: FittedDeployment,
    workload: Workload,
    config: Configuration,
    *,
    output_law: str = "fixed",
    n_requests: int = 2000,
    replications: int = 8,
    seed: int = 0,
    finite: bool = False,
    progress: Callable[[float], Any] | None = None,
) -> tuple[dict[str, Any], Simulation]:
    """Simulate ``config`` under ``workload``: ``metrics`` maps ttft, tpot, e2e, waiting and itl to mean, p50, p90, p95
    and p99, each with ``value`` [s] and ``half_width`` (95 %); ``predicted`` holds what the model says of the same.

    Errors: :class:`InputError` for a draft length that is not whole, or an acceptance without positions (a tree).
    """
    if output_law not in LAWS:
        raise InputError(f"output_law: got {output_law!r}; allowed: {', '.join(LAWS)}")
    if output_law == "lognormal" and not float(workload.output_scv) > 0:
        raise InputError("output_law lognormal needs an output_scv above 0")
    engine = engine_of(deployment, workload, config)
    found = simulate(
        deployment.serving.step_time,
        workload,
        engine,
        n_requests=n_requests,
        replications=replications,
        seed=seed,
        output_law=output_law,  # type: ignore[arg-type]
        finite=finite,
        progress=progress,
    )
    run = replace(workload, n_requests=float(n_requests)) if finite and workload.is_open else workload
    model = predict_answer(deployment, run, config, with_intervals=False)
    predicted = {
        metric: {"mean": model[name]} | ((model["percentiles"] or {}).get(metric) or {})
        for metric, name in (("ttft", "ttft"), ("tpot", "tpot"), ("e2e", "e2e_latency"), ("itl", "itl"))
    }
    notes = list(model["warnings"])
    measured = deployment.defaults.get("max_batched_tokens")
    if measured is not None and config.max_batched_tokens is None:
        notes.append(
            f"measured with a token budget of {measured:g}, which neither the simulation nor the model was asked with: "
            f"--max-batched-tokens {measured:g} asks both"
        )
    if output_law == "geometric":
        notes.append("the model's percentiles take output_scv for a lognormal law; the simulated lengths are geometric")
    answer = found.summary() | {
        "outcome": "saturated" if found.saturated else "successful",
        "predicted": predicted | {"outcome": model["outcome"]},
        "deployment": deployment.name,
        "draft_length": float(config.draft_length),
        "seed": seed,
        "warnings": notes,
    }
    return answer, found


def engine_of(deployment: FittedDeployment, workload: Workload, config: Configuration) -> Engine:
    """The simulated engine of a configuration: the same caps and token budget that the model is asked with."""
    length = float(config.draft_length)
    if length != round(length):
        raise InputError(f"draft_length: got {length:g}; allowed: a whole number, an engine drafts whole tokens")
    rates: tuple[float, ...] = ()
    if length > 0:
        if (
            not isinstance(config.acceptance, AbstractPositionwise)
            or float(config.acceptance.drafted_tokens(length)) != length
        ):
            raise InputError("simulate needs the acceptance of each draft position; allowed: a chain, not a tree")
        rates = tuple(float(rate) for rate in config.acceptance.conditional_rates(length)[: round(length)])
    return Engine(
        round(length),
        rates,
        float(config.draft_probability),
        max_batch_size=_whole(config.max_batch_size),
        kv_capacity_tokens=_whole(config.kv_capacity_tokens),
        max_batched_tokens=_whole(config.max_batched_tokens),
        prefix_hit_rate=float(workload.prefix_hit_rate),
        request_overhead=float(deployment.serving.request_overhead),
    )


def _whole(value) -> int | None:
    return None if value is None else round(float(value))


def request_table(found: Simulation) -> str:
    """The measured requests as CSV: one row each, ``run`` is the replication, times in seconds from its start."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = list(found.lanes[0].events)
    writer.writerow(["run", *names])
    for number, lane in enumerate(found.lanes):
        columns = [np.asarray(lane.events[name]).tolist() for name in names]
        writer.writerows([number, *row] for row in zip(*columns, strict=True))
    return out.getvalue()
