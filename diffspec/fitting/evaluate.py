"""Errors of a fitted model on measured rows."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffspec.fitting.deployment import FittedDeployment, FittedModel
from diffspec.fitting.hull import FIELDS
from diffspec.fitting.objective import predict_blocks, predict_draws
from diffspec.fitting.observations import PREDICTED, is_endless, observations, padded, waiting_states
from diffspec.fitting.uncertainty import LEVEL
from diffspec.results import InputError
from diffspec.traces import Trace, set_aside_reasons

MEANS = ("ttft_mean", "itl_mean", "tpot_mean", "e2e_mean")
SPLIT_UTILIZATION = 0.5
DRAWS = 64
"""Draws of the parameters behind the intervals of a row."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """Measured and predicted values of one deployment's rows, in trace order: ``measured[name][row]`` (NaN where
    missing), ``predicted[name][row]``, and per row its utilization and whether it is ``saturated``: an open loop above
    capacity whose number of requests is not known, so that nothing can be predicted. ``low`` and ``high``: edges of the
    central 90 % of what would be measured, of the columns for which a fit knows them."""

    frame: Any
    measured: dict[str, np.ndarray]
    predicted: dict[str, np.ndarray]
    saturated: np.ndarray
    utilization: np.ndarray
    low: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    high: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def predict_trace(deployment: FittedDeployment, frame, *, with_intervals: bool = True) -> Scored:
    """Predict every row of one deployment's frame, each as the finite run it was."""
    data = observations(frame, deployment.acceptance)
    serving = dataclasses.replace(deployment.serving, waiting_states=waiting_states(data))
    blocks, known = tuple(padded(block) for block in data.blocks), deployment.uncertainty
    back = np.argsort(data.order)
    ratios = deployment.quality.get("stand_in_ratios", {})

    def gather(predictions, field):
        parts = zip(predictions, data.blocks, strict=True)
        values = [np.asarray(getattr(prediction, field))[..., : len(block)] for prediction, block in parts]
        return np.concatenate(values, axis=-1)[..., back]

    predictions = predict_blocks(serving, blocks)
    measured = {name: value[back] for name, value in data.observed.items()}
    fields = {name: PREDICTED.get(name.split("_")[0], "throughput") for name in measured}
    utilization = gather(predictions, "utilization")
    scored = Scored(
        frame=frame,
        measured=measured,
        predicted={name: gather(predictions, field) * ratios.get(name, 1.0) for name, field in fields.items()},
        saturated=(utilization >= 1.0) & is_endless(data)[back],
        utilization=utilization,
    )
    if known is None or not with_intervals:
        return scored
    drawn = predict_draws(known.models(serving, DRAWS), blocks)
    share = np.clip(gather(predictions, "ttft") / gather(predictions, "e2e_latency"), 0.0, 1.0)
    for name in measured:
        noise = known.noise_of(name, share, data.requests[back])
        if noise is not None:
            values = gather(drawn, fields[name]) * ratios.get(name, 1.0)
            scored.low[name], scored.high[name] = known.edges(values, noise)
    return scored


def scored_columns(scored: Scored) -> dict[str, np.ndarray]:
    """Observables that are scored -> rows that count: every mean; medians where the mean is missing from the whole
    column; throughput in closed loops."""
    columns = {}
    for name, values in scored.measured.items():
        rows = np.isfinite(values)
        metric = name.split("_")[0]
        if name == "throughput":
            rows = rows & scored.frame["concurrency"].notna().to_numpy()
        elif name.endswith("_p50"):
            if f"{metric}_mean" in scored.measured:
                continue
        elif not name.endswith("_mean"):
            continue
        if rows.any():
            columns[name] = rows
    return columns


def error_summary(measured: np.ndarray, predicted: np.ndarray, saturated: np.ndarray) -> dict[str, Any]:
    """rows, mape, max_ape, r2 (None for fewer than two different values), bias; errors as fractions. A saturated
    prediction counts as an error of 1.0 in mape and max_ape."""
    relative = predicted / measured - 1.0
    absolute = np.where(saturated, 1.0, np.abs(relative))
    total = float(np.sum((measured - measured.mean()) ** 2))
    r2 = None if len(measured) < 2 or total == 0 else 1.0 - float(np.sum((measured - predicted) ** 2)) / total
    return {
        "rows": len(measured),
        "mape": float(absolute.mean()),
        "max_ape": float(absolute.max()),
        "r2": r2,
        "bias": float(relative[~saturated].mean()) if (~saturated).any() else None,
    }


def interval_summary(measured: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    """How well 90 % intervals do: ``coverage`` (share of values inside), ``interval_width`` (mean of log(high/low)) and
    ``interval_score`` (Gneiting and Raftery 2007, in log units, smaller is better: the width, and 2/0.1 times what a
    value lies outside)."""
    value, low, high = (np.log(part) for part in (measured, low, high))
    outside = np.maximum(low - value, 0.0) + np.maximum(value - high, 0.0)
    return {
        "coverage": float(np.mean(outside == 0.0)),
        "interval_width": float(np.mean(high - low)),
        "interval_score": float(np.mean(high - low + 2.0 / (1.0 - LEVEL) * outside)),
    }


NO_INTERVALS = {"coverage": None, "interval_width": None, "interval_score": None}


def summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    """Error summary per observable over several deployments, with bias below and above utilization 0.5, and how well
    the intervals did (None where a model has none)."""
    gathered: dict[str, list[tuple[np.ndarray, ...]]] = {}
    for part in scored:
        for name, rows in scored_columns(part).items():
            missing = np.full(len(part.frame), np.nan)
            edges = (part.low.get(name, missing)[rows], part.high.get(name, missing)[rows])
            values = (part.measured[name], part.predicted[name], part.saturated, part.utilization)
            gathered.setdefault(name, []).append((*(column[rows] for column in values), *edges))
    metrics = {}
    for name, parts in gathered.items():
        measured, predicted, saturated, utilization, low, high = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        metrics[name] = error_summary(measured, predicted, saturated)
        relative = predicted / measured - 1.0
        for side, chosen in (
            ("bias_low_load", utilization < SPLIT_UTILIZATION),
            ("bias_high_load", utilization >= SPLIT_UTILIZATION),
        ):
            chosen = chosen & ~saturated
            metrics[name][side] = float(relative[chosen].mean()) if chosen.any() else None
        told = np.isfinite(low) & np.isfinite(high) & ~saturated
        metrics[name] |= interval_summary(measured[told], low[told], high[told]) if told.any() else NO_INTERVALS
        if name.endswith("_p50"):
            metrics[name]["stands_in_for"] = name.replace("_p50", "_mean")
    return metrics


def not_predicted(frame) -> list[str]:
    """Observed columns of the table that this version cannot predict (percentiles, and medians beside a mean)."""
    return [
        name
        for name in frame.columns
        if name.startswith(("ttft_", "itl_", "tpot_", "e2e_"))
        and frame[name].notna().any()
        and not name.endswith("_mean")
        and not (name.endswith("_p50") and not frame[name.replace("_p50", "_mean")].notna().any())
    ]


def row_predictions(deployment: FittedDeployment, scored: Scored) -> list[dict[str, Any]]:
    """Each row as plain data: where it is from, what was asked, whether that lies inside what the fit was measured on
    (:mod:`diffspec.fitting.hull`), and by metric ``measured``, ``predicted``, ``low`` and ``high`` (None where there is
    none)."""
    columns, told = scored_columns(scored), []

    def number(values, row):
        return None if values is None or not np.isfinite(values[row]) else float(values[row])

    for row, line in enumerate(scored.frame.to_dict("records")):
        asked = {name: None if np.isnan(line[name]) else float(line[name]) for name in (*FIELDS, "draft_length")}
        saturated = bool(scored.saturated[row])
        metrics = {
            name: {
                "measured": number(scored.measured[name], row),
                "predicted": None if saturated else number(scored.predicted[name], row),
                "low": None if saturated else number(scored.low.get(name), row),
                "high": None if saturated else number(scored.high.get(name), row),
            }
            for name, rows in columns.items()
            if rows[row]
        }
        place = {
            "deployment": deployment.name,
            "source_file": line["source_file"],
            "source_row": int(line["source_row"]),
        }
        hull = deployment.hull(asked["draft_length"], asked)
        told.append(place | asked | {"saturated": saturated} | hull | {"metrics": metrics})
    return told


def evaluate(model: FittedModel, trace: Trace, *, all_rows: bool = False) -> dict[str, Any]:
    """Score ``model`` on the rows of ``trace``; deployments are matched by name.

    Rows that are not stationary are set aside and counted by reason unless ``all_rows``. Returns ``{"rows",
    "deployments", "metrics": {observable: {"rows", "mape", "max_ape", "r2", "bias", ...}}, "set_aside": {reason: n},
    "saturated_rows", "outside_rows", "predictions" (:func:`row_predictions`), "not_predicted", "warnings"}``, errors as
    fractions.

    Errors: :class:`InputError` when the trace names a deployment that the model lacks (a model with one deployment
    scores a trace with one deployment whatever their names, with a warning) or when no row is left.
    """
    scored, names, reasons, warnings = [], [], {}, list(trace.warnings)
    told: list[dict[str, Any]] = []
    groups = list(trace.frame.groupby("deployment", sort=False))
    for name, frame in groups:
        if name not in model.deployments and len(groups) == 1 and len(model.deployments) == 1:
            only = next(iter(model.deployments))
            warnings.append(f"deployment {name!r} of the trace scored with the model's only deployment {only!r}")
            deployment = model.deployments[only]
        else:
            deployment = model.deployment(str(name))
        asides = set_aside_reasons(frame)
        kept = np.asarray([all_rows or reason is None for reason in asides])
        for reason in asides:
            if reason is not None and not all_rows:
                reasons[reason_kind(reason)] = reasons.get(reason_kind(reason), 0) + 1
        names.append(str(name))
        if kept.any():
            scored.append(predict_trace(deployment, frame[kept].reset_index(drop=True)))
            told += row_predictions(deployment, scored[-1])
    if not scored:
        raise InputError(f"no row left to score: {reasons}; score them all the same with --all-rows")
    return {
        "rows": int(sum(len(part.frame) for part in scored)),
        "deployments": names,
        "metrics": summarise(scored),
        "set_aside": reasons,
        "saturated_rows": int(sum(part.saturated.sum() for part in scored)),
        "outside_rows": sum(not row["inside_measured"] for row in told),
        "predictions": told,
        "not_predicted": not_predicted(trace.frame),
        "warnings": warnings,
    }


def reason_kind(reason: str) -> str:
    """A set-aside reason without its numbers, so that alike rows are counted together."""
    return re.sub(r"^[\d.e+]+ ", "", reason.split(":")[0])
