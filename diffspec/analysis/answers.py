"""One operating point as plain data: what `diffspec predict` answers."""

import math
from functools import partial
from typing import Any

import jax
import numpy as np

from diffspec.fitting.deployment import FittedDeployment
from diffspec.results import outcome_name
from diffspec.serving import STAGES, Comparison, Configuration, Prediction, ServingModel
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

FAST_COMPILE = {"xla_backend_optimization_level": 0}
"""For programs that run a few times: compiling them is what takes time."""


@partial(jax.jit, compiler_options=FAST_COMPILE)
def _compare(serving: ServingModel, workload: Workload, config: Configuration) -> Comparison:
    return serving.compare(workload, config)


def finite(value) -> float | None:
    """A float for JSON; None for infinite or missing numbers and for stand-ins of infinity (above 1e12)."""
    value = float(value)
    return value if math.isfinite(value) and abs(value) < 1e12 else None


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


def predict_answer(deployment: FittedDeployment, workload: Workload, config: Configuration) -> dict[str, Any]:
    """Prediction of ``config`` under ``workload`` with speedup over no speculation, break-even rate and caveats.

    Returns the fields of :class:`diffspec.serving.Prediction` as plain numbers (None where there is none: latencies at
    saturation, an unbounded capacity), ``speedup`` and ``breakeven_rate`` with ``speedup_reason`` where they are None,
    ``plain`` (outcome, e2e_latency and capacity without speculation) and ``warnings``.
    """
    workload, config = (jax.tree.map(np.asarray, part) for part in (workload, config))
    comparison = _compare(deployment.serving, workload, config)
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
    breakeven_known = deployment.plain_measured and config.acceptance is not None and float(config.draft_length) > 0
    fields = {
        name: float(value)
        for name in ("arrival_rate", "concurrency", "prompt_length", "output_length")
        if (value := getattr(workload, name)) is not None
    }
    return answer | {
        "speedup": finite(comparison.speedup) if reason is None else None,
        "speedup_reason": reason,
        "breakeven_rate": finite(comparison.breakeven_rate) if breakeven_known else None,
        "plain": {name: plain[name] for name in ("outcome", "e2e_latency", "ttft", "tpot", "capacity")},
        "deployment": deployment.name,
        "draft_length": float(config.draft_length),
        "warnings": deployment.caveats(float(config.draft_length), fields),
    }
