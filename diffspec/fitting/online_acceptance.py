"""Acceptance of a deployment, updated row by row, and whether it changed.

A weighted mean per draft length and position: a row counts as its requests n, and what is known of its draft length
fades by the factor of the filter first,

    W <- factor*W,  a_i <- (W*a_i + n*r_i)/(W + n),  W <- W + n

which for factor 1 is the mean over all rows that a fit takes. The sums that tell a change
(:mod:`diffspec.fitting.drift`) look at tokens per step; where one rings, the curve starts again from the rows since.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import MeasuredAcceptance
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.drift import Watch, change_of, threshold, tokens_scale
from diffspec.fitting.noise import TYPICAL_REQUESTS
from diffspec.fitting.observations import row_acceptance
from diffspec.results import TraceError

NORMAL = 1e9
"""Degrees of freedom of a t distribution that is normal."""
KEY = "online"
"""Where a deployment's ``quality`` keeps what its updates did."""


def update_acceptance(deployment: FittedDeployment, frame, forgetting: float, before: dict[str, Any]):
    """The acceptance after the rows, what happened (``curves``, ``drift``, ``watches``) and the requests behind each
    draft length. A fit does not say how many requests told each curve: its rows are taken as shared evenly, with
    TYPICAL_REQUESTS each."""
    known = deployment.acceptance
    lengths = [] if known is None else list(known.draft_lengths)
    curves = {k: np.asarray(known.curves[i], dtype=float) for i, k in enumerate(lengths)} if known is not None else {}
    first = {k: curve.copy() for k, curve in curves.items()}
    assumed = TYPICAL_REQUESTS * deployment.quality["rows"] / max(len(deployment.measured["draft_lengths"]), 1)
    stored = before.get("acceptance_requests", {})
    counts = {k: float(stored.get(str(k), assumed)) for k in curves}
    kept = before.get("watches", {})
    watches = {k: Watch.from_dict(kept.get(f"acceptance {k}", {})) for k in curves}
    since: dict[int, list[tuple[float, np.ndarray]]] = {}
    limit, changes = threshold(2), []
    for row in range(len(frame)):
        line = frame.iloc[row]
        if not line["draft_length"] > 0:
            continue
        try:
            rates = row_acceptance(frame, row, None)
        except TraceError:
            if known is None:
                raise
            continue
        k = int(line["draft_length"])
        requests = float(line["n_requests"]) if line["n_requests"] > 0 else TYPICAL_REQUESTS
        if k not in curves:
            curves[k], counts[k], watches[k] = rates, requests, Watch()
            continue
        expected, scale = tokens_scale(curves[k][:k], requests, float(line["output_length"]))
        error = float(np.log(1.0 + np.cumprod(rates[:k]).sum()) - np.log(expected))
        watches[k].add(error, 0.0, scale * np.sqrt(1.0 + requests / counts[k]), NORMAL)
        recent = [*since.get(k, []), (requests, rates)]
        since[k] = recent[len(recent) - min(watches[k].longest, len(recent)) :]
        old = forgetting * counts[k]
        curves[k] = (old * curves[k] + requests * rates) / (old + requests)
        counts[k] = old + requests
        alarm = watches[k].alarm(limit)
        if alarm is not None:
            count, size = alarm
            rows = [r for r in range(row + 1) if frame["draft_length"].iloc[r] == k]
            entry = change_of(
                f"tokens per step at draft length {k}", np.expm1(size), frame.iloc[rows], len(rows) - 1, count
            )
            changes.append(entry)
            weights, recent = zip(*since[k][-count:], strict=True)
            curves[k], counts[k] = np.average(recent, axis=0, weights=weights), float(sum(weights))
            watches[k], since[k] = watches[k].again(limit), []
    told = {
        str(k): {"requests": counts[k], "tokens_per_step_before": _tokens(first.get(k), k)}
        | {"tokens_per_step_after": _tokens(curves[k], k)}
        for k in sorted(curves)
    }
    after = None
    if curves:
        after = MeasuredAcceptance(tuple(sorted(curves)), jnp.asarray(np.stack([curves[k] for k in sorted(curves)])))
    happened = {"curves": told, "drift": changes}
    happened["watches"] = {f"acceptance {k}": watch.to_dict() for k, watch in watches.items()}
    return after, happened, {str(k): count for k, count in counts.items()}


def _tokens(rates: np.ndarray | None, k: int) -> float | None:
    return None if rates is None else float(1.0 + np.cumprod(rates[:k]).sum())
