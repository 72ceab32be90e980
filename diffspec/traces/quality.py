"""What a trace is good for: which rows are stationary, which identities hold, what is too thin to fit.

Nothing is corrected. Rows that are not stationary are set aside with the reason; the rest is reported as findings.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from . import design
from .renewal import expected_steps
from .trace import Trace

LITTLE = (0.94, 1.06)
RENEWAL_TOLERANCE = 0.02
LONGEST_SHARE = 0.25  # of a run that one request may last in an open loop
KEPT_UP = 0.9  # throughput over arrivals in a steady window, at least; as far above 1 it drains
LOOPS = 4  # requests per place in a closed loop, at least


@dataclass(frozen=True)
class Finding:
    """One check. `severity`: "ok", "warning", or "unchecked" when no row has what the check needs. `rows`: positions
    in the frame (from 0) that the warning is about; `value`: the worst value, `allowed` what is expected of it."""

    check: str
    severity: str
    rows: list[int]
    value: float | None
    allowed: str
    message: str


@dataclass(frozen=True)
class QualityReport:
    """`stationary` and `set_aside` (a reason, or None where the row is used) follow the rows of the frame; `findings`
    has every check; `deployments` summarizes each deployment. All of it is plain data."""

    stationary: list[bool]
    set_aside: list[str | None]
    findings: list[Finding]
    deployments: list[dict[str, Any]]

    @property
    def warnings(self) -> list[Finding]:
        """The findings that are warnings."""
        return [finding for finding in self.findings if finding.severity == "warning"]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and texts, ready for JSON (missing numbers are None)."""
        return asdict(self)


@np.errstate(all="ignore")
def check(trace: Trace) -> QualityReport:
    """Examine the rows of a trace; see `QualityReport`.

    The checks: Little's law, the renewal identity between tpot, itl and tokens per step, acceptance columns that
    contradict each other, drafters that accept nothing, open loops that drain or overload, start bursts in closed
    loops, preemption, missing plain rows, too few draft lengths or loads, and the noise floor shown by repeats.
    """
    frame = trace.frame.reset_index(drop=True)
    reasons = set_aside_reasons(frame)
    findings = [
        _stationarity(reasons),
        _little(frame, reasons),
        _renewal(frame),
        _acceptance(frame),
        _accepts_nothing(frame),
        _overload(frame),
        _start_burst(frame),
        _preemption(frame),
        *design.findings(frame, Finding),
    ]
    return QualityReport([reason is None for reason in reasons], reasons, findings, design.summaries(frame, reasons))


@np.errstate(all="ignore")
def set_aside_reasons(frame: pd.DataFrame) -> list[str | None]:
    """Why a row is not fitted unless asked for, or None.

    Failed requests; an open loop with ``arrival_rate*e2e_mean/n_requests > 0.25`` (one request lasts over a quarter of
    the run); a closed loop with ``n_requests < 4*concurrency``. A steady window has its warm-up behind it: it need only
    be longer than a request, but must neither fill up nor drain: it is set aside when ``throughput/offered_rate`` is
    more than 0.1 from 1 and the difference more than ``3*sqrt(B) + 3`` requests, which a stable system does not show.
    What is unknown is not held against a row; a missing `e2e_mean` is estimated as
    ``ttft_mean + tpot_mean*(output_length - 1)``."""
    e2e = _e2e(frame)
    steady = (frame["window"] == "steady").to_numpy(bool)
    kept_up = (frame["throughput"] / frame["offered_rate"]).to_numpy(float)
    held = np.where(np.isnan(frame["effective_batch_size"]), frame["throughput"] * e2e, frame["effective_batch_size"])
    reasons: list[str | None] = []
    for index in range(len(frame)):
        rate, users, count, failed = (
            float(frame[name].iloc[index]) for name in ("arrival_rate", "concurrency", "n_requests", "failed")
        )
        share = rate * e2e[index] / count if count > 0 else math.nan
        if failed > 0:
            reasons.append(f"{failed:g} requests failed")
        elif steady[index] and abs(1 - kept_up[index]) > max(1 - KEPT_UP, (3 * held[index] ** 0.5 + 3) / count):
            what = "overloaded" if kept_up[index] < 1 else "still draining what came before"
            reasons.append(
                f"{what}: throughput/offered_rate is {kept_up[index]:.2f} in the window; allowed: {KEPT_UP:g} to "
                f"{2 - KEPT_UP:g}"
            )
        elif share > (1.0 if steady[index] else LONGEST_SHARE):
            reasons.append(
                f"not stationary: a request lasts {share:.2f} of the run (arrival_rate*e2e_mean/n_requests); "
                f"allowed: up to {1.0 if steady[index] else LONGEST_SHARE:g}"
            )
        elif count < (1 if steady[index] else LOOPS) * users:
            reasons.append(
                f"too short: {count:g} requests for {users:g} in flight; "
                f"allowed: at least {1 if steady[index] else LOOPS} each"
            )
        else:
            reasons.append(None)
    return reasons


def _e2e(frame: pd.DataFrame) -> np.ndarray:
    """Mean end-to-end latency [s], measured or put together from its parts."""
    measured = frame["e2e_mean"].to_numpy(float)
    built = (frame["ttft_mean"] + frame["tpot_mean"] * (frame["output_length"] - 1)).to_numpy(float)
    return np.where(np.isnan(measured), built, measured)


def _judge(
    check: str,
    frame: pd.DataFrame,
    values: np.ndarray,
    wrong: np.ndarray,
    allowed: str,
    warning: str,
    badness: Callable[[np.ndarray], np.ndarray] = np.abs,
) -> Finding:
    """A finding from one value a row (NaN: cannot be checked); `wrong` marks rows to warn about."""
    known = ~np.isnan(values)
    if not known.any():
        return Finding(check, "unchecked", [], None, allowed, "no row has what this check needs")
    rows = np.flatnonzero(wrong & known)
    among = rows if len(rows) else np.flatnonzero(known)
    worst = float(np.nan_to_num(values[among[int(np.argmax(badness(values[among])))]]))
    if not len(rows):
        return Finding(check, "ok", [], worst, allowed, f"holds in {int(known.sum())} rows")
    message = f"{warning}: {len(rows)} of {int(known.sum())} rows ({_places(frame, rows)})"
    return Finding(check, "warning", [int(row) for row in rows], worst, allowed, message)


def _places(frame: pd.DataFrame, rows: np.ndarray) -> str:
    several = len(set(frame["source_file"])) > 1
    named = []
    for row in rows[:3]:
        file = str(frame["source_file"].iloc[row]).replace("\\", "/").rsplit("/", 1)[-1]
        place = f"row {frame['source_row'].iloc[row]}"
        named.append(f"{file} {place}" if several else place)
    return ", ".join(named) + (", ..." if len(rows) > 3 else "")


def _stationarity(reasons: list[str | None]) -> Finding:
    rows = [index for index, reason in enumerate(reasons) if reason is not None]
    allowed = f"up to {LONGEST_SHARE:g} of the run per request, {LOOPS} requests per place, no failure"
    if not rows:
        return Finding("stationarity", "ok", [], 0.0, allowed, "no row is set aside")
    message = f"{len(rows)} of {len(reasons)} rows are set aside, first because: {reasons[rows[0]]}"
    return Finding("stationarity", "warning", rows, float(len(rows)), allowed, message)


def _little(frame: pd.DataFrame, reasons: list[str | None]) -> Finding:
    in_flight = frame["concurrency"].fillna(frame["effective_batch_size"]).to_numpy(float)
    used = np.array([reason is None for reason in reasons], bool)
    ratio = np.where(used, frame["throughput"].to_numpy(float) * _e2e(frame) / in_flight, math.nan)
    wrong = (ratio < LITTLE[0]) | (ratio > LITTLE[1])
    return _judge(
        "little's law",
        frame,
        ratio,
        wrong,
        f"{LITTLE[0]:g} to {LITTLE[1]:g}",
        "throughput*e2e_mean differs from the requests in flight (start, drain, or clients that wait)",
        lambda values: np.abs(np.log(values)),
    )


def _renewal(frame: pd.DataFrame) -> Finding:
    values = np.full(len(frame), math.nan)
    probability = frame["draft_probability"].fillna(1.0)
    for index in range(len(frame)):
        length, drafted = float(frame["output_length"].iloc[index]), int(frame["draft_length"].iloc[index])
        steps = expected_steps(
            length,
            drafted,
            float(frame["tokens_per_step"].iloc[index]),
            _shape(frame, index),
            float(probability.iloc[index]),
        )
        tpot, itl = float(frame["tpot_mean"].iloc[index]), float(frame["itl_mean"].iloc[index])
        if length > 2 and itl > 0 and steps > 0:
            values[index] = tpot * (length - 1) / itl / steps
    low, high = 1 - RENEWAL_TOLERANCE, 1 + RENEWAL_TOLERANCE
    return _judge(
        "renewal identity",
        frame,
        values,
        (values < low) | (values > high),
        f"{low:g} to {high:g}",
        "steps by tpot*(output_length - 1)/itl differ from those by acceptance (itl may not be one step, or counters "
        "hold other traffic)",
        lambda values: np.abs(values - 1),
    )


def _shape(frame: pd.DataFrame, index: int) -> list[float] | None:
    positions, drafted = frame["position_acceptance"].iloc[index], int(frame["draft_length"].iloc[index])
    if isinstance(positions, tuple) and frame["method"].iloc[index] != "tree":
        return list(positions)
    alpha = float(frame["acceptance_rate"].iloc[index])
    return None if math.isnan(alpha) else [alpha] * drafted


def _acceptance(frame: pd.DataFrame) -> Finding:
    """tokens_per_step against 1 + a_1 + a_1*a_2 + ..."""
    values = np.full(len(frame), math.nan)
    for index in range(len(frame)):
        shape = _shape(frame, index)
        if shape and frame["method"].iloc[index] != "tree":
            values[index] = float(frame["tokens_per_step"].iloc[index]) / (1 + float(np.cumprod(shape).sum()))
    return _judge(
        "acceptance",
        frame,
        values,
        np.abs(values - 1) > 0.05,
        "0.95 to 1.05",
        "tokens_per_step differs from 1 + the products of the acceptances (acceptance is P(next accepted | all before "
        "were); accepted/drafted belongs in draft_acceptance_rate)",
        lambda values: np.abs(values - 1),
    )


def _accepts_nothing(frame: pd.DataFrame) -> Finding:
    values = frame["tokens_per_step"].where(frame["draft_length"] > 0).to_numpy(float)
    warning = "the drafter accepts next to nothing: it costs and gives nothing"
    return _judge("useful drafter", frame, values, values < 1.05, "at least 1.05", warning, np.negative)


def _overload(frame: pd.DataFrame) -> Finding:
    values = (frame["throughput"] / frame["offered_rate"].fillna(frame["arrival_rate"])).to_numpy(float)
    warning = "throughput below 0.9 of the arrivals: the run drained after the last arrival, or was overloaded"
    return _judge("open loops keep up", frame, values, values < 0.9, "at least 0.9", warning, np.negative)


def _start_burst(frame: pd.DataFrame) -> Finding:
    told = frame["ttft_p99"].notna() & (frame["window"] != "steady")
    burst = (frame["concurrency"] / frame["n_requests"]).where(told).to_numpy(float)
    warning = "ttft_p99 of a closed loop is the burst at its start, not steady state; do not fit or limit it"
    return _judge("start burst", frame, burst, burst >= 0.01, "below 0.01 of the requests", warning)


def _preemption(frame: pd.DataFrame) -> Finding:
    preemptions, usage = frame["preemptions"].to_numpy(float), frame["kv_usage_mean"].to_numpy(float)
    values = np.where(np.isnan(preemptions), usage, preemptions)
    warning = "requests were preempted or the KV cache was nearly full: latency holds redone work"
    allowed = "no preemption, kv_usage_mean below 0.9"
    return _judge("kv cache", frame, values, (preemptions > 0) | (usage >= 0.9), allowed, warning)
