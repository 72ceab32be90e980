"""What the operating points of a trace span: loads, draft lengths, repeats; deployment by deployment."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd

from .schema import COLUMNS, METRICS, OBSERVABLES

# What was set, not measured: rows alike in these (lengths to two digits) and in acceptance are repeats.
_SETTINGS = tuple(
    item.name
    for item in COLUMNS
    if (item.kind in ("identity", "architecture", "load") and item.name != "run")
    or item.name in ("method", "draft_length", "rejection", "temperature", "task")
)
_SAME_ACCEPTANCE = 0.05


def findings(frame: pd.DataFrame, finding: Callable[..., Any]) -> list[Any]:
    """Findings about the choice of operating points; `finding` is the class to make."""
    made = []
    for deployment, group in frame.groupby("deployment", sort=False):
        made += _of_deployment(str(deployment), group, finding)
    made.append(_repeats(frame, finding))
    return made


def _of_deployment(deployment: str, group: pd.DataFrame, finding: Callable[..., Any]) -> list[Any]:
    rows = [int(row) for row in group.index]
    lengths = sorted({float(length) for length in group["draft_length"]})
    plain = 0.0 in lengths
    drafting = len([length for length in lengths if length > 0])
    loads = max(_distinct(group["arrival_rate"]), _distinct(group["concurrency"]))

    def judge(check: str, good: bool, value: float | int, allowed: str, warning: str) -> Any:
        message = f"deployment '{deployment}': " + ("holds" if good else warning)
        return finding(check, "ok" if good else "warning", [] if good else rows, float(value), allowed, message)

    return [
        judge(
            "plain rows",
            plain,
            sum(length == 0 for length in group["draft_length"]),
            "at least one row with draft_length 0",
            "no row without speculation: the cost of a plain engine is extrapolated",
        ),
        judge(
            "draft lengths",
            drafting >= 2 or lengths == [0.0],
            drafting,
            "at least 2 above 0, where anything is drafted",
            "one draft length only: draft and verify time cannot be told apart",
        ),
        judge(
            "loads",
            loads >= 3,
            loads,
            "at least 3 arrival rates or concurrencies",
            "too few loads: what batching costs is poorly known",
        ),
    ]


def _distinct(values: Iterable[float]) -> int:
    return len({round(value, 6) for value in values if not math.isnan(value)})


def repeats(frame: pd.DataFrame) -> list[list[int]]:
    """Groups of rows (positions) that measure the same operating point, each with two rows or more."""
    keys = frame[list(_SETTINGS)].copy()
    for name in ("prompt_length", "output_length"):
        keys[name] = [f"{value:.2g}" for value in frame[name]]
    keys = keys.astype(object).where(keys.notna(), None)
    buckets: dict[tuple, list[int]] = {}
    for index, key in enumerate(keys.itertuples(index=False, name=None)):
        buckets.setdefault(key, []).append(index)
    groups = []
    emitted = frame["tokens_per_step"].fillna(1.0).to_numpy(float)
    for rows in buckets.values():
        rows.sort(key=lambda row: emitted[row])
        current = rows[:1]
        for row in rows[1:]:
            if emitted[row] > emitted[current[0]] * (1 + _SAME_ACCEPTANCE):
                groups.append(current)
                current = []
            current.append(row)
        groups.append(current)
    return [sorted(rows) for rows in groups if len(rows) > 1]


def _repeats(frame: pd.DataFrame, finding: Callable[..., Any]) -> Any:
    allowed = "up to 0.05"
    e2e = frame["e2e_mean"].to_numpy(float)
    spreads, rows = [], []
    for group in repeats(frame):
        values = e2e[group]
        if not np.isnan(values).any():
            spreads.append(float((values.max() - values.min()) / (values.max() + values.min())))
            rows += group
    if not spreads:
        return finding("repeats", "unchecked", [], None, allowed, "no operating point is measured twice")
    noise = float(np.median(spreads))
    message = f"{len(spreads)} operating points are repeated; e2e_mean comes back within {noise:.1%} (median)"
    return finding("repeats", "ok" if noise <= 0.05 else "warning", rows, noise, allowed, message)


def summaries(frame: pd.DataFrame, reasons: list[str | None]) -> list[dict[str, Any]]:
    """For each deployment: rows, rows set aside, the ranges that were measured, and the observables present."""
    aside = np.array([reason is not None for reason in reasons], bool)
    made = []
    for deployment, group in frame.groupby("deployment", sort=False):
        made.append(
            {
                "deployment": str(deployment),
                "rows": len(group),
                "set_aside": int(aside[group.index].sum()),
                "arrival_rate": _range(group["arrival_rate"]),
                "concurrency": _range(group["concurrency"]),
                "prompt_length": _range(group["prompt_length"]),
                "output_length": _range(group["output_length"]),
                "methods": sorted(set(group["method"].dropna())),
                "draft_lengths": sorted(int(length) for length in group["draft_length"].unique()),
                "tokens_per_step": _range(group["tokens_per_step"]),
                "acceptance": _range(_acceptances(group)),
                "observables": [name for name in OBSERVABLES if _range(group[name])],
                "metrics": [metric for metric in METRICS if _range(group[f"{metric}_mean"])],
            }
        )
    return made


def _acceptances(group: pd.DataFrame) -> list[float]:
    entries = [entry for cell in group["position_acceptance"] if isinstance(cell, tuple) for entry in cell]
    return [*group["acceptance_rate"], *entries]


def _range(values: Any) -> list[float] | None:
    """Smallest and largest given value, None when there is none."""
    given = np.asarray(values, float)
    given = given[~np.isnan(given)]
    return [float(given.min()), float(given.max())] if len(given) else None
