"""How sure the choice of a draft length is: the whole choice repeated for draws of what is not known.

Each draw is a server of its own, with its own best draft length; the share of draws in which one is best is the
probability that it is (:mod:`diffspec.analysis.intervals` tells what draws are). What a fit misses beyond its
parameters (misfit) is in the interval of the speedup only: as far as all draft lengths share it, it moves no choice,
and how far they do is not known.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffspec.analysis.intervals import misfit, spread
from diffspec.fitting.uncertainty import LEVEL, Uncertainty
from diffspec.optimizing.limits import Limit, costs, least


def best_static(metrics, saturated, limits: Sequence[Limit], objective: str) -> int | None:
    """The one draft length for all loads: feasible at most of them, then the smallest mean log cost there."""
    cost, _, feasible = costs(metrics, saturated, limits, objective)
    if not feasible.any():
        return None
    served = feasible.sum(axis=0)
    among = np.flatnonzero(served == served.max())
    common = feasible[:, among].all(axis=1)
    rows = common if common.any() else feasible[:, among].any(axis=1)
    return int(among[np.argmin(cost[rows][:, among].mean(axis=0))])


def cost_at_risk(cost: np.ndarray, feasible: np.ndarray, risk: float) -> np.ndarray:
    """The cost that the share ``risk`` of draws, the first axis, does not exceed; infinite where fewer keep the limits.

    >>> float(cost_at_risk(np.array([1.0, 2.0, 3.0, 0.5]), np.array([True, True, True, False]), 0.5))
    2.0
    """
    return np.asarray(np.quantile(np.where(feasible, cost, np.inf), risk, axis=0, method="inverted_cdf"))


class Drawn(NamedTuple):
    """Every draft length at every load in every draw, [draws, loads, draft lengths]: log ``cost``, ``feasible``,
    ``e2e`` [s] (infinite where saturated), ``ttft`` [s]; and the best one draft length of each draw (None: none)."""

    cost: np.ndarray
    feasible: np.ndarray
    e2e: np.ndarray
    ttft: np.ndarray
    static: list[int | None]

    def at_risk(self, risk: float) -> tuple[np.ndarray, np.ndarray]:
        """(log cost that the share ``risk`` of draws does not exceed, infinite where fewer keep the limits; share of
        draws that keep them), [loads, draft lengths]."""
        return cost_at_risk(self.cost, self.feasible, risk), self.feasible.mean(axis=0)


def drawn_costs(drawn: Iterable[Any], limits: Sequence[Limit], objective: str, *, plain_known: bool) -> Drawn:
    """:class:`Drawn` from the metrics and saturation of each draw."""
    parts = []
    for metrics, saturated in drawn:
        saturated = np.asarray(saturated)
        unknown = (np.arange(saturated.shape[-1]) == 0) & (not plain_known)
        metrics, saturated = {name: np.asarray(values) for name, values in metrics.items()}, saturated | unknown
        cost, _, feasible = costs(metrics, saturated, limits, objective)
        e2e = np.where(saturated, np.inf, metrics["e2e_mean"])
        parts.append((cost, feasible, e2e, metrics["ttft_mean"], best_static(metrics, saturated, limits, objective)))
    cost, feasible, e2e, ttft, static = zip(*parts, strict=True)
    return Drawn(np.stack(cost), np.stack(feasible), np.stack(e2e), np.stack(ttft), list(static))


def choice_intervals(
    loads: Sequence[float],
    chosen: Sequence[int | None],
    drawn: Drawn,
    *,
    is_open: bool,
    plain_known: bool,
    known: Uncertainty | None,
    objective: str,
) -> dict[str, Any]:
    """How the choice at each load varies over draws.

    ``chosen``: the draft length decided on at each load. Each of ``loads`` has

    * ``draft_length``: low, median and high of the best one, over the ``feasible_share`` of draws that have any
    * ``probability_best``: draft length -> share of all draws in which it is the best; they sum to ``feasible_share``
    * ``chosen_feasible_share``: of the draws in which the chosen one keeps every limit
    * ``expected_regret`` [1]: by how much the chosen one's objective is worse than the best's, mean over these draws
    * ``speedup``: of the chosen one over no speculation, with the misfit of a fit where ``known``

    ``static_draft_length`` has the ``probability_best`` of one draft length for all loads.
    """
    cost, feasible, e2e, ttft = drawn[:4]
    lengths = range(cost.shape[-1])
    kept = np.where(feasible, cost, np.inf)
    best = np.where(feasible.any(axis=-1), least(kept, e2e, objective), -1)  # [draws, loads]
    entries = []
    for i, (load, k) in enumerate(zip(loads, chosen, strict=True)):
        entry: dict[str, Any] = {
            "load": float(load),
            "draft_length": spread(best[best[:, i] >= 0, i]),
            "feasible_share": float((best[:, i] >= 0).mean()),
            "probability_best": {str(length): float((best[:, i] == length).mean()) for length in lengths},
        }
        entry |= dict.fromkeys(("chosen_feasible_share", "expected_regret", "speedup"))
        if k is not None:
            keeps = feasible[:, i, k]
            regret = np.expm1(cost[keeps, i, k] - kept[keeps, i].min(axis=-1))
            entry["chosen_feasible_share"] = float(keeps.mean())
            entry["expected_regret"] = float(regret.mean()) if keeps.any() else None
            if plain_known:
                entry["speedup"] = _speedup(e2e[:, i], ttft[:, i, k], k, is_open, known)
        entries.append(entry)
    static = np.asarray([-1 if length is None else length for length in drawn.static])
    shares = {str(length): float((static == length).mean()) for length in lengths}
    told = {"level": LEVEL, "draws": len(cost), "loads": entries}
    return told | {"static_draft_length": {"probability_best": shares}}


def _speedup(e2e, ttft, k: int, is_open: bool, known: Uncertainty | None) -> dict[str, float | None] | None:
    """Interval of the speedup of draft length ``k`` from e2e [draws, draft lengths], infinite where saturated; none at
    k = 0, where it is 1."""
    if k == 0:
        return None
    with np.errstate(invalid="ignore"):
        ratios = e2e[:, 0] / e2e[:, k]  # neither has a speedup where both saturate: not a number
        share = float(np.median(np.clip(ttft / e2e[:, k], 0.0, 1.0)))
    scale = 0.0 if known is None else misfit(known, is_open=is_open, ttft_share=share)["speedup"]
    return None if scale is None else spread(ratios, known, scale)
