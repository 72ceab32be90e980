"""One operating point as plain data: what `diffspec predict` answers."""

import itertools
from typing import Any

import jax
import numpy as np

from diffspec.analysis.intervals import NO_INTERVALS, Draws, draw_deployment, each, spread
from diffspec.analysis.plain import enough_states, finite
from diffspec.configuration import Configuration, batch_cap
from diffspec.fitting.deployment import FittedDeployment
from diffspec.lengths import Lengths
from diffspec.percentiles import PERCENTILES, known_up_to, predict_distribution, states_for
from diffspec.prediction import STAGES, Comparison, Prediction
from diffspec.programs import program
from diffspec.results import outcome_name
from diffspec.serving import MOST_STATES, ServingModel
from diffspec.workload import Workload

METRICS = {
    "ttft_mean": "ttft",
    "itl_mean": "itl",
    "tpot_mean": "tpot",
    "e2e_mean": "e2e_latency",
    "throughput": "throughput",
    "utilization": "utilization",
    "capacity": "capacity",
}
"""Metric names of limits, objectives and sensitivities -> field of :class:`diffspec.serving.Prediction`."""


def metric_values(prediction: Prediction) -> dict[str, Any]:
    """The metrics of a prediction by their names in :data:`METRICS`; traceable."""
    return {name: getattr(prediction, field) for name, field in METRICS.items()}


PERCENTILE_DRAWS = 32
"""Draws behind the intervals of percentiles, which take their time one by one."""
_NAMES = tuple(f"p{percent}" for percent in PERCENTILES)


@program()
def _compare(serving: ServingModel, workload: Workload, config: Configuration) -> Comparison:
    return serving.compare(workload, config)


def prediction_dict(prediction: Prediction) -> dict[str, Any]:
    """Plain data of one prediction. Latencies are None at saturation, where none is finite."""
    outcome = outcome_name(prediction.result)
    latency = (lambda value: None) if outcome == "saturated" else finite
    return {
        "outcome": outcome,
        "ttft": latency(prediction.ttft),
        "itl": latency(prediction.itl),
        "tpot": latency(prediction.tpot),
        "e2e_latency": latency(prediction.e2e_latency),
        "waiting_time": latency(prediction.waiting_time),
        "throughput": finite(prediction.throughput),
        "effective_batch_size": latency(prediction.effective_batch_size),
        "utilization": finite(prediction.utilization),
        "capacity": finite(prediction.capacity),
        "shortfall": finite(max(float(prediction.utilization) - 1.0, 0.0) * float(prediction.capacity)),
        "tokens_per_step": finite(prediction.tokens_per_step),
        "steps_per_request": finite(prediction.steps_per_request),
        "residual": finite(prediction.residual),
        "decomposition": {
            stage: {
                "load_independent": latency(prediction.decomposition[stage].load_independent),
                "load_dependent": latency(prediction.decomposition[stage].load_dependent),
            }
            for stage in STAGES
        },
    }


def predict_answer(
    deployment: FittedDeployment,
    workload: Workload,
    config: Configuration,
    *,
    with_intervals: bool = True,
    percentile_intervals: bool = False,
    draws: ServingModel | None = None,
) -> dict[str, Any]:
    """Prediction of ``config`` under ``workload`` with speedup over no speculation, break-even rate and caveats.

    Returns the fields of :class:`diffspec.serving.Prediction` as plain numbers (None where there is none: latencies at
    saturation, an unbounded capacity), ``speedup`` and ``breakeven_rate`` with ``speedup_reason`` where they are None,
    ``breakeven_reason`` where there is no break-even rate, ``percentiles`` (open loops: of ttft, tpot and e2e, and the
    probability to wait for a place), ``plain`` (outcome, latencies and capacity without
    speculation), ``inside_measured`` and ``outside_measured`` (:mod:`diffspec.fitting.hull`), ``intervals``
    (:mod:`diffspec.analysis.intervals`, over ``draws`` of the serving model, by default of what the fit leaves open;
    where ``percentile_intervals`` those of percentiles too, which take longer), ``intervals_reason`` where there are
    none, and ``warnings``.
    """
    workload, config = (jax.tree.map(np.asarray, part) for part in (workload, config))
    serving = enough_states(deployment.serving, workload, config)
    comparison = _compare(serving, workload, config)
    answer = prediction_dict(comparison.speculative)
    plain = prediction_dict(comparison.plain)
    reason = None
    if config.acceptance is None or float(config.draft_length) == 0:
        reason = "draft_length is 0: there is no speculation to compare"
    elif not deployment.plain_measured:
        reason = "no k = 0 row was fitted: latency without speculation is not known"
    elif answer["outcome"] == "saturated":
        reason = "saturated with speculation" + (" and without" if plain["outcome"] == "saturated" else "")
    elif plain["outcome"] == "saturated":
        reason = "saturated without speculation: speculation serves a load that plain decoding cannot"
    speculative = config.acceptance is not None and float(config.draft_length) > 0
    breakeven = finite(comparison.breakeven_rate) if speculative and deployment.plain_measured else None
    breakeven_reason = None
    if breakeven is None:
        wins = float(comparison.speedup) > 1.0
        breakeven_reason = (
            reason if not (speculative and deployment.plain_measured) else None
        ) or f"speculation is {'faster' if wins else 'slower'} at every arrival rate that both servers sustain"
    fields = {
        name: float(value)
        for name in ("arrival_rate", "concurrency", "prompt_length", "output_length")
        if (value := getattr(workload, name)) is not None
    }
    drawn = draw_deployment(deployment, workload, config, draws) if with_intervals else None
    told = None if drawn is None else drawn.told()
    if told is not None and drawn is not None and percentile_intervals:
        told["percentiles"] = percentile_spreads(drawn, workload, config, comparison.speculative)
    return answer | {
        "speedup": finite(comparison.speedup) if reason is None else None,
        "speedup_reason": reason,
        "breakeven_rate": breakeven,
        "breakeven_reason": breakeven_reason,
        "percentiles": None
        if answer["outcome"] == "saturated"
        else percentiles(serving, workload, config, comparison.speculative),
        "plain": {name: plain[name] for name in ("outcome", "e2e_latency", "ttft", "tpot", "capacity")},
        "deployment": deployment.name,
        "draft_length": float(config.draft_length),
        "intervals": told,
        "intervals_reason": NO_INTERVALS if with_intervals and told is None else None,
        **deployment.hull(float(config.draft_length), fields),
        "warnings": [
            *deployment.caveats(float(config.draft_length), fields),
            *configuration_notes(deployment, config),
            *([QUEUEING] if near_the_cap(workload, config, comparison.speculative) else []),
        ],
    }


QUEUEING = (
    f"the batch is near its cap, which is above {MOST_STATES}: waiting for a place is not computed there; "
    "ttft and e2e_latency are lower bounds"
)


def near_the_cap(workload: Workload, config: Configuration, prediction: Prediction) -> bool:
    """True in an open loop whose batch, two standard deviations up (Poisson: variance = mean), reaches a cap for which
    waiting is not computed."""
    cap = batch_cap(workload, config)
    batch = float(prediction.effective_batch_size)
    return workload.is_open and cap is not None and MOST_STATES < float(cap) <= batch + 2.0 * batch**0.5


def percentiles(
    serving: ServingModel, workload: Workload, config: Configuration, prediction: Prediction
) -> dict[str, Any] | None:
    """Percentiles [s] of ttft, tpot, itl and e2e in an open loop, ``{"ttft": {"p50": ...}, ...}``, and how likely a
    request waits for a place; None in a closed loop, of a finite run, and where the chain would need more than its
    largest size.

    The distribution is :func:`diffspec.percentiles.predict_distribution`'s for lognormal lengths with
    workload.output_scv; ttft and e2e are scaled to the means of ``prediction``, which is what was fitted.
    """
    states = _states(workload, config, prediction)
    if states is None:
        return None
    found = _percentiles(serving, workload, config, states, prediction.ttft, prediction.e2e_latency)
    waiting = {"waiting_probability": finite(found.pop("waiting_probability"))}
    return {metric: dict(zip(_NAMES, map(finite, values), strict=True)) for metric, values in found.items()} | waiting


def percentile_spreads(
    drawn: Draws, workload: Workload, config: Configuration, prediction: Prediction
) -> dict[str, Any] | None:
    """Intervals of :func:`percentiles` over the first :data:`PERCENTILE_DRAWS` draws, with the misfit of the means."""
    states = _states(workload, config, prediction)
    if states is None:
        return None
    models = (enough_states(model, workload, config) for model in each(drawn.models))
    models = itertools.islice(models, PERCENTILE_DRAWS)
    means = zip(drawn.values["ttft"], drawn.values["e2e_latency"], strict=True)
    rows = [_percentiles(model, workload, config, states, *mean) for model, mean in zip(models, means, strict=False)]
    ends = ~drawn.saturated[: len(rows)]
    found = {metric: np.stack([row[metric] for row in rows]) for metric in rows[0]}
    waiting = {"waiting_probability": spread(np.where(ends, found.pop("waiting_probability"), 1.0))}
    named = {}
    for metric, values in found.items():
        columns = np.where(ends[:, None], values, np.inf).T
        source = {"e2e": "e2e_latency"}.get(metric, metric)
        named[metric] = {name: drawn.spread(source, column) for name, column in zip(_NAMES, columns, strict=True)}
    return named | waiting


def _states(workload: Workload, config: Configuration, prediction: Prediction) -> int | None:
    """Size of the chain that percentiles need; None where there are none."""
    cap, batch = batch_cap(workload, config), float(prediction.effective_batch_size)
    states = states_for(None if cap is None else float(cap), batch)
    ends = not workload.is_open or workload.n_requests is not None
    return None if ends or batch > known_up_to(states, cap) else states


def _percentiles(serving, workload, config, states: int, ttft, e2e_latency) -> dict[str, np.ndarray]:
    """Percentiles by metric, scaled to the means given, and the probability to wait."""
    found = _distribution(serving, workload, config, Lengths.lognormal(float(workload.output_scv)), states)
    values = {name: np.asarray(value) for name, value in found.at_means(float(ttft), float(e2e_latency)).items()}
    return values | {"waiting_probability": np.asarray(found.requests.waiting_probability)}


@program(4)
def _distribution(serving, workload, config, lengths, states):
    return predict_distribution(serving, workload, config, lengths, states=states)


def configuration_notes(deployment: FittedDeployment, config: Configuration) -> list[str]:
    """What a configuration assumes that was not measured: a drafter of another size, a mixed acceptance curve."""
    notes = []
    if float(config.drafter_scale) != 1.0:
        notes.append(
            f"drafting times are scaled by {float(config.drafter_scale):.3g}, as published within a model family; "
            "acceptance is left as it is, though a drafter of another size has another one"
        )
    if float(config.draft_length) > 0 and config.acceptance is not None and deployment.mixed_acceptance:
        same = jax.tree.structure(config.acceptance) == jax.tree.structure(deployment.acceptance)
        notes += [deployment.mixed_acceptance] if same else []
    return notes
