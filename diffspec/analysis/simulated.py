"""A deployment simulated: what `diffspec simulate` answers, with the analytic model's numbers beside it."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import numpy as np

from diffspec.acceptance import AbstractPositionwise
from diffspec.analysis.answers import configuration_notes, predict_answer
from diffspec.configuration import Configuration
from diffspec.fitting.deployment import FittedDeployment
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.simulating import DraftSchedule, Engine, Requests, Simulation, replay, simulate
from diffspec.step_time import AbstractStepTime, AffineStepTime, RooflineStepTime
from diffspec.workload import Workload

LAWS = ("fixed", "geometric", "lognormal")
BEHIND = 0.9
"""Given arrivals are too many where, by the last of them, less than this share is complete and waits have grown."""


@dataclass(frozen=True)
class Replayed:
    """Given requests, one list for each replication, of which those from ``first_measured`` up to ``end_measured``
    count."""

    runs: Sequence[Requests]
    first_measured: int
    end_measured: int


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
    schedule: DraftSchedule | None = None,
    replayed: Replayed | None = None,
    progress: Callable[[float], Any] | None = None,
) -> tuple[dict[str, Any], Simulation]:
    """Simulate ``config`` under ``workload``: ``metrics`` maps ttft, tpot, e2e, waiting and itl to mean, p50, p90, p95
    and p99, each with ``value`` [s] and ``half_width`` (95 %); ``predicted`` holds what the model says of the same.

    * ``schedule``: a draft length that follows the batch, in place of the one of ``config``, which says the longest;
      ``draft_length`` is then None, and ``switches`` counts changes of the tier in a replication. ``predicted`` is left
      empty: :func:`diffspec.optimizing.schedule_files.predict_under_schedule` says it
    * ``replayed``: given requests in place of drawn ones, ``workload`` their means; each run starts empty and drains,
      and ``saturated`` where it falls behind: of the requests less than :data:`BEHIND` is complete by the last arrival,
      and the later ones wait longer

    Errors: :class:`InputError` for a draft length that is not whole, or an acceptance without positions (a tree).
    """
    if output_law not in LAWS:
        raise InputError(f"output_law: got {output_law!r}; allowed: {', '.join(LAWS)}")
    if output_law == "lognormal" and not float(workload.output_scv) > 0:
        raise InputError("output_law lognormal needs an output_scv above 0")
    engine = engine_of(deployment, workload, config, schedule)
    step_time = played_step_time(deployment.serving)
    if replayed is None:
        found = simulate(
            step_time,
            workload,
            engine,
            n_requests=n_requests,
            replications=replications,
            seed=seed,
            output_law=output_law,  # type: ignore[arg-type]
            finite=finite,
            progress=progress,
        )
        saturated = found.saturated
    else:
        found = replay(
            step_time,
            replayed.runs,
            engine,
            measured=(replayed.first_measured, replayed.end_measured),
            seed=seed,
            progress=progress,
        )
        saturated = found.saturated and _behind(found)
    predicted = {}
    if schedule is not None:
        load = "arrival_rate" if workload.is_open else "concurrency"
        asked = {name: float(getattr(workload, name)) for name in (load, "prompt_length", "output_length")}
        lengths = sorted({int(k) for *_, k in schedule.ranges})
        notes = list(dict.fromkeys(note for k in lengths for note in deployment.caveats(float(k), asked)))
        notes += configuration_notes(deployment, config)
    else:
        run = replace(workload, n_requests=float(n_requests)) if finite and workload.is_open else workload
        model = predict_answer(deployment, run, config, with_intervals=False)
        notes = list(model["warnings"])
        predicted = {
            metric: {"mean": model[name]} | ((model["percentiles"] or {}).get(metric) or {})
            for metric, name in (("ttft", "ttft"), ("tpot", "tpot"), ("e2e", "e2e_latency"), ("itl", "itl"))
        } | {"outcome": model["outcome"]}
    measured = deployment.defaults.get("max_batched_tokens")
    if measured is not None and config.max_batched_tokens is None:
        notes.append(
            f"measured with a token budget of {measured:g}, which neither the simulation nor the model was asked with: "
            f"--max-batched-tokens {measured:g} asks both"
        )
    if output_law == "geometric":
        notes.append("the model's percentiles take output_scv for a lognormal law; the simulated lengths are geometric")
    answer = found.summary() | {
        "outcome": "saturated" if saturated else "successful",
        "saturated": saturated,
        "predicted": predicted,
        "deployment": deployment.name,
        "draft_length": float(config.draft_length) if schedule is None else None,
        "seed": seed,
        "warnings": notes,
    }
    return answer, found


def _behind(found: Simulation) -> bool:
    """Whether less than :data:`BEHIND` of the requests, over all runs, is complete by the last arrival of their run."""
    done = [lane.events["completion_time"] <= lane.events["arrival_time"][-1] for lane in found.lanes]
    return float(np.mean(np.concatenate(done))) < BEHIND


def played_step_time(serving: ServingModel) -> AbstractStepTime:
    """The step time with prompts that last as long as others pay for them, prefill_interference times their own time:
    the simulator knows no such share, its engine is busy with a prompt as long as it lasts. What is left of a prompt's
    own time is added to the request by :func:`engine_of`."""
    step_time, share = serving.step_time, float(serving.prefill_interference)
    if share == 1.0 or not isinstance(step_time, AffineStepTime | RooflineStepTime):
        return step_time
    places = lambda step: (step.prefill_token, step.draft.prefill_token)  # noqa: E731
    return eqx.tree_at(places, step_time, tuple(share * cost for cost in places(step_time)))


def _own_prefill(serving: ServingModel, workload: Workload, config: Configuration) -> float:
    """The part of a mean prompt's own time [s] that :func:`played_step_time` leaves out: (1 - share) * prefill."""
    if played_step_time(serving) is serving.step_time:
        return 0.0
    own = float(serving.request_cost(workload, config).prefill)
    return (1.0 - float(serving.prefill_interference)) * own


def engine_of(
    deployment: FittedDeployment, workload: Workload, config: Configuration, schedule: DraftSchedule | None = None
) -> Engine:
    """The simulated engine of a configuration: the same caps and token budget that the model is asked with. A
    ``schedule`` takes the place of its draft length, each draft length with the acceptance it has there."""
    length = float(config.draft_length)
    if length != round(length):
        raise InputError(f"draft_length: got {length:g}; allowed: a whole number, an engine drafts whole tokens")
    lengths = [round(length)] if schedule is None else sorted({int(k) for *_, k in schedule.ranges})
    rates = {k: () if k == 0 else _rates(config, k) for k in lengths}
    if schedule is not None:
        schedule = replace(schedule, position_acceptance=rates | {0: ()})
    return Engine(
        round(length) if schedule is None else 0,
        rates[lengths[-1]],
        float(config.draft_probability),
        max_batch_size=_whole(config.max_batch_size),
        kv_capacity_tokens=_whole(config.kv_capacity_tokens),
        max_batched_tokens=_whole(config.max_batched_tokens),
        prefix_hit_rate=float(workload.prefix_hit_rate),
        request_overhead=max(
            float(deployment.serving.request_overhead) + _own_prefill(deployment.serving, workload, config), 0.0
        ),
        schedule=schedule,
    )


def _rates(config: Configuration, length: int) -> tuple[float, ...]:
    """Conditional acceptance of each of ``length`` draft positions."""
    if (
        not isinstance(config.acceptance, AbstractPositionwise)
        or float(config.acceptance.drafted_tokens(float(length))) != length
    ):
        raise InputError("simulate needs the acceptance of each draft position; allowed: a chain, not a tree")
    return tuple(float(rate) for rate in config.acceptance.conditional_rates(float(length))[:length])


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
