"""Which draft positions were reached and which accepted: counts by request, or by benchmark run, from any source.

Conditional acceptance of position i is ``accepted_i / reached_i``, where a position is reached when it was drafted and
all before it were accepted. Requests (per-request metrics) are independent; the steps of one request are not, which is
why counts are kept apart by request. Benchmark runs give totals only: ``reached_1 = requests * (output_length - 1) /
tokens_per_step`` steps, and ``reached_(i+1) = reached_i * acceptance_i``.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from .gather import Gathered
from .readers import request_metrics
from .readers.speculation_profile import SpeculationProfile
from .trace import trace_of

LABELS = ("deployment", "run", "workload", "task", "temperature", "draft_length", "output_position")
_NEEDED = ("n_requests", "output_length", "tokens_per_step", "position_acceptance")
"""Columns that tell the counts of a run; scrapes alone name no load, and acceptance needs none."""
OUTPUT_POSITIONS = (0, 16, 64, 256, 1024)
"""Where bins of the output position begin [tok]."""


@dataclass(frozen=True)
class AcceptanceCounts:
    """`accepted` and `reached`, one row a unit (a request, or a benchmark run), one column a draft position; `labels`,
    for each of `LABELS` that is known the value of every unit; `unit`, "request" or "run"."""

    accepted: np.ndarray
    reached: np.ndarray
    labels: dict[str, list[Any]]
    unit: str

    def where(self, mask: np.ndarray) -> "AcceptanceCounts":
        """The units that `mask` marks."""
        kept = np.flatnonzero(mask)
        labels = {name: [values[i] for i in kept] for name, values in self.labels.items()}
        return AcceptanceCounts(self.accepted[kept], self.reached[kept], labels, self.unit)


def acceptance_counts(gathered: Gathered, by_output_position: bool = False) -> list[AcceptanceCounts]:
    """The counts in what was gathered: per-request metrics first, then benchmark rows that tell acceptance by position.
    With `by_output_position`, requests with per-step arrays are split by the output position of the step."""
    found = []
    for value in gathered.of("acceptance"):
        if isinstance(value, SpeculationProfile):
            continue
        found.append(_by_output_position(value) if by_output_position else _by_request(value))
    if gathered.points and not by_output_position:
        scraped = [raw for _, raw in gathered.points if not {"arrival_rate", "concurrency"} & set(raw.columns)]
        loaded = [(file, raw) for file, raw in gathered.points if not any(raw is other for other in scraped)]
        frames = [raw.reindex(columns=list(dict.fromkeys([*raw.columns, *_NEEDED]))) for raw in scraped]
        if loaded:
            trace = trace_of(replace(gathered, points=loaded))
            gathered.warnings += [line for line in trace.warnings if line not in gathered.warnings]
            frames.append(trace.frame)
        found += [counts for frame in frames if (counts := _by_run(frame)) is not None]
    return [counts for counts in found if len(counts.accepted)]


def profiles(gathered: Gathered) -> list[SpeculationProfile]:
    """The speculation profiles in what was gathered: rates without counts."""
    return [value for value in gathered.of("acceptance") if isinstance(value, SpeculationProfile)]


def _by_request(frame: pd.DataFrame) -> AcceptanceCounts:
    known = [index for index, counts in enumerate(frame["reached_at"]) if isinstance(counts, tuple) and sum(counts)]
    labels = {name: [_label(frame[name].iloc[i]) for i in known] for name in LABELS if name in frame.columns}
    accepted = _matrix([frame["accepted_at"].iloc[i] for i in known])
    reached = _matrix([frame["reached_at"].iloc[i] for i in known])
    return AcceptanceCounts(accepted, reached, _told(labels), "request")


def _by_output_position(frame: pd.DataFrame) -> AcceptanceCounts:
    steps = request_metrics.steps(frame)
    request, _, position, drafted, accepted = steps.loc[steps["position"].notna()].to_numpy(float).T
    longest = int(drafted.max()) if len(drafted) else 0
    bins = np.searchsorted(OUTPUT_POSITIONS, position, side="right") - 1
    unit = request.astype(int) * len(OUTPUT_POSITIONS) + bins
    units, place = np.unique(unit, return_inverse=True)
    took, reached = np.zeros((len(units), longest)), np.zeros((len(units), longest))
    for index in range(longest):
        tried = (drafted > index) & (accepted >= index)
        reached[:, index] = np.bincount(place[tried], minlength=len(units))
        took[:, index] = np.bincount(place[tried & (accepted > index)], minlength=len(units))
    names = [_bin_name(int(entry) % len(OUTPUT_POSITIONS)) for entry in units]
    labels = {"output_position": names}
    for name in LABELS:
        if name in frame.columns:
            labels[name] = [_label(frame[name].iloc[int(entry) // len(OUTPUT_POSITIONS)]) for entry in units]
    return AcceptanceCounts(took, reached, _told(labels), "request")


def _by_run(frame: pd.DataFrame) -> AcceptanceCounts | None:
    accepted, reached, kept = [], [], []
    for index, rates in enumerate(frame["position_acceptance"]):
        row = frame.iloc[index]
        steps = row["n_requests"] * max(row["output_length"] - 1, 1) / row["tokens_per_step"]
        if not isinstance(rates, tuple) or not rates or not math.isfinite(steps):
            continue
        tried = steps * np.cumprod([1.0, *rates[:-1]])
        reached.append(tuple(tried))
        accepted.append(tuple(tried * np.asarray(rates)))
        kept.append(index)
    if not kept:
        return None
    labels = {name: [_label(frame[name].iloc[i]) for i in kept] for name in LABELS if name in frame.columns}
    return AcceptanceCounts(_matrix(accepted), _matrix(reached), _told(labels), "run")


def _matrix(rows: list[tuple[float, ...]]) -> np.ndarray:
    values = np.zeros((len(rows), max(map(len, rows), default=0)))
    for index, row in enumerate(rows):
        values[index, : len(row)] = row
    return values


def _told(labels: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: values for name, values in labels.items() if any(value is not None for value in values)}


def _label(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return f"{value:g}" if isinstance(value, (int, float, np.number)) else str(value)


def _bin_name(index: int) -> str:
    first = OUTPUT_POSITIONS[index]
    return f"{first}+" if index + 1 == len(OUTPUT_POSITIONS) else f"{first}-{OUTPUT_POSITIONS[index + 1] - 1}"
