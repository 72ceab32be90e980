"""Measured rows beside their predictions, ready to draw."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffspec.fitting.deployment import FittedDeployment, FittedModel
from diffspec.fitting.evaluate import Scored, predict_trace
from diffspec.traces import Trace, matches, set_aside_reasons


@dataclass(frozen=True)
class ScoredPart:
    """Rows of one deployment that were treated alike: ``label`` is "fitted", "held out" or "scored"."""

    label: str
    deployment: str
    scored: Scored

    def column(self, name: str) -> np.ndarray:
        """A column of the rows as floats, NaN where missing."""
        return self.scored.frame[name].to_numpy(float)


def _kept(frame: Any, all_rows: bool) -> Any:
    kept = np.asarray([all_rows or reason is None for reason in set_aside_reasons(frame)], dtype=bool)
    return frame[kept].reset_index(drop=True)


def scored_by_deployment(model: FittedModel, trace: Trace, *, all_rows: bool = False) -> list[ScoredPart]:
    """Every row of ``trace`` that an evaluation scores, predicted by the model of its deployment."""
    parts = []
    for name, frame in trace.frame.groupby("deployment", sort=False):
        known = name in model.deployments or len(model.deployments) > 1
        frame = _kept(frame, all_rows)
        if len(frame):
            deployment = model.deployment(str(name) if known else None)
            parts.append(ScoredPart("scored", deployment.name, predict_trace(deployment, frame)))
    return parts


def fitted_and_held_out(
    deployment: FittedDeployment, trace: Trace, holdout: str | None, *, all_rows: bool = False
) -> list[ScoredPart]:
    """The rows of one deployment that a fit used, and those it held out."""
    apart = np.zeros(len(trace), dtype=bool) if holdout is None else np.asarray(matches(trace.frame, holdout), bool)
    mine = (trace.frame["deployment"] == deployment.name).to_numpy(bool)
    parts = []
    for label, rows in (("fitted", mine & ~apart), ("held out", mine & apart)):
        frame = _kept(trace.frame[rows], all_rows)
        if len(frame):
            parts.append(ScoredPart(label, deployment.name, predict_trace(deployment, frame)))
    return parts
