"""Which schedule over the batch, when the model itself is not sure: candidates, and a score over draws of it.

A candidate takes, at each batch, the draft length with the least cost: by the fitted parameters, by the expectation
over draws, or by a quantile of them; limits add the same with every cap on the draft length, and with those that would
break a limit at that batch put last. Each candidate is then judged whole, at every load, in every draw, by the chain of
:mod:`diffspec.optimizing.under_schedule`:

    score = (loads at which the limits hold; then the mean over loads of log R(latency over draws))

with R the expectation (a saturated draw counts with its latency at 0.999 of capacity, a lower bound), a quantile (a
saturated draw is worse than any other), or the value of the fit itself. Logarithms, so that no load counts for more
because its latency is large: a share of a low latency is worth as much as the same share of a high one.

At given costs no schedule does better at any load than the one with the largest death rate at each batch: a birth-death
chain whose deaths are faster in every state holds fewer requests, in equilibrium and on the way to it. So what is left
to choose between is what the costs are, and how many tiers are worth having.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffspec.optimizing.batch_tables import BatchTables
from diffspec.optimizing.limits import Limit
from diffspec.optimizing.schedule import ranges_of
from diffspec.optimizing.tiers import UNLIKELY, merged_tiers
from diffspec.optimizing.under_schedule import UnderSchedule
from diffspec.results import InputError

BROKEN = 100.0
"""Log cost of each log excess over a limit, in the candidates that keep limits batch by batch."""

FINER = (0.25, 0.0)
"""Shares of the least gain at which tiers are merged for the candidates with finer tiers."""

MOST_SATURATED = 0.5
"""An expectation is no answer where more draws than that saturate."""


class Risk(NamedTuple):
    """``kind``: "point" (the fit itself), "mean" (expectation over draws) or "quantile", which is at ``level``."""

    kind: str
    level: float = 0.5

    @property
    def text(self) -> str:
        """As a user writes it."""
        return f"{self.level:g}" if self.kind == "quantile" else self.kind

    def over(self, values: np.ndarray) -> np.ndarray:
        """R over the first axis (draws) of ``values``, which may be infinite."""
        if self.kind == "quantile":
            return np.quantile(values, self.level, axis=0, method="inverted_cdf")
        return values.mean(axis=0)


def parse_risk(risk: str | float | int) -> Risk:
    """``point``, ``mean``, or a level between 0 and 1.

    >>> parse_risk("mean"), parse_risk(0.9).text
    (Risk(kind='mean', level=0.5), '0.9')
    """
    if risk in ("point", "mean"):
        return Risk(str(risk))
    try:
        level = float(risk)
    except (TypeError, ValueError):
        level = np.nan
    if not 0.0 < level < 1.0:
        raise InputError(f"risk: got {risk!r}; allowed: point, mean, or a quantile between 0 and 1, such as 0.9")
    return Risk("quantile", level)


def log_costs(tables: BatchTables, objective: str) -> np.ndarray:
    """[draft lengths, batches]: log of the objective at each whole batch, at draft length 0 with the drafter loaded;
    throughput is n/residence, so its cost is that of the residence."""
    residence, ttft = tables.residence[:, :-1].copy(), tables.ttft[:, :-1].copy()
    residence[0], ttft[0] = tables.idle_residence[:-1], tables.idle_ttft[:-1]
    return np.where(tables.allowed[:, :-1], _logs(residence, ttft, tables.steps[:, None], objective), UNLIKELY)


def plain_log_costs(tables: BatchTables, objective: str) -> np.ndarray:
    """[batches]: the same of a server without a drafter."""
    return _logs(tables.residence[0, :-1], tables.ttft[0, :-1], tables.steps[0], objective)


def _logs(residence, ttft, steps, objective: str) -> np.ndarray:
    decode = np.maximum(residence - ttft, 1e-30)
    value = {"ttft_mean": ttft, "tpot_mean": decode, "itl_mean": decode / np.maximum(steps, 1e-9)}
    return np.log(value.get(objective, residence))


def limit_excess(tables: BatchTables, limits: Sequence[Limit], output_length: float) -> np.ndarray:
    """[draft lengths, batches]: the worst log excess over the limits on latencies, 0 where they are kept, as if the
    batch stayed what it is."""
    residence, ttft = tables.residence[:, :-1], tables.ttft[:, :-1]
    decode = np.maximum(residence - ttft, 1e-30)
    values = {
        "ttft_mean": ttft,
        "itl_mean": decode / np.maximum(tables.steps[:, None], 1e-9),
        "tpot_mean": decode / max(output_length - 1.0, 1e-9),
        "e2e_mean": residence,
    }
    known = [np.asarray(limit.excess(values[limit.metric])) for limit in limits if limit.metric in values]
    return np.maximum(np.max(known, axis=0), 0.0) if known else np.zeros_like(residence)


def risk_costs(costs: np.ndarray, risk: Risk) -> np.ndarray:
    """:func:`log_costs` of draws [draws, draft lengths, batches] as one table; out of reach in any draw is out of
    reach."""
    away = np.any(costs >= UNLIKELY, axis=0)
    held = np.minimum(costs, 500.0)
    if risk.kind == "quantile":
        found = np.quantile(held, risk.level, axis=0, method="inverted_cdf")
    else:
        top = held.max(axis=0)
        found = top + np.log(np.mean(np.exp(held - top), axis=0))
    return np.where(away & ~away.all(axis=0), UNLIKELY, found)


def candidates(
    tables: Sequence[np.ndarray],
    lengths: Sequence[int],
    *,
    capped: bool,
    weight: np.ndarray,
    min_gain: float,
    min_width: int,
) -> list[np.ndarray]:
    """Draft lengths of batches 1, 2, ... by each of the cost ``tables`` [draft lengths, batches], of the draft lengths
    ``lengths`` alone; with ``capped`` also of those up to each of them. Tiers are merged; and, as another candidate,
    each is then given the draft length with the least cost over its batches by ``weight`` [batches]. Every schedule
    once, no speculation among them."""
    found: dict[bytes, np.ndarray] = {}
    if lengths[0] == 0:  # a server without a drafter
        off = np.zeros(tables[0].shape[1], dtype=int)
        found[off.tobytes()] = off
    for cost in tables:
        for count in range(1 if capped else len(lengths), len(lengths) + 1):
            among = np.asarray(lengths[:count])
            best = among[np.argmin(cost[among], axis=0)]
            merged = merged_tiers(best, cost, min_gain=min_gain, min_width=min_width)
            found.setdefault(merged.tobytes(), merged.copy())
            for first, last, _ in ranges_of(merged):
                within = np.minimum(cost[among, first - 1 : last], UNLIKELY) @ weight[first - 1 : last]
                merged[first - 1 : last] = among[np.argmin(within)]
            merged = merged_tiers(merged, cost, min_gain=min_gain, min_width=min_width)
            found.setdefault(merged.tobytes(), merged)
    return list(found.values())


class Judged(NamedTuple):
    """Schedules judged over draws: ``risk`` of the objective and of each ``limited`` metric, and ``feasible``, all
    [schedules, loads]; ``score`` [schedules, 2], of which the smallest is best."""

    risk: np.ndarray
    limited: dict[str, np.ndarray]
    feasible: np.ndarray
    score: np.ndarray


def over_loads(values: np.ndarray) -> np.ndarray:
    """Geometric mean of ``values`` over the loads, their last axis; infinite ones count as a stand-in.

    >>> float(over_loads(np.array([1.0, 4.0])))
    2.0
    """
    with np.errstate(divide="ignore"):
        return np.asarray(np.exp(np.clip(np.log(values), -500.0, 500.0).mean(axis=-1)))


def judge(found: Sequence[UnderSchedule], limits: Sequence[Limit], objective: str, risk: Risk) -> Judged:
    """Judge schedules by what they give in each of the draws ``found``."""
    saturated = np.stack([each.saturated for each in found])
    sign = -1.0 if objective == "throughput" else 1.0

    def over(name: str) -> np.ndarray:
        values = np.stack([each.metrics[name] for each in found])
        if risk.kind != "quantile":
            return risk.over(values)
        worst = np.where(saturated, -np.inf if name == "throughput" else np.inf, values)
        return -risk.over(-worst) if name == "throughput" else risk.over(worst)

    share = saturated.mean(axis=0)
    allowed = 1.0 - risk.level if risk.kind == "quantile" else MOST_SATURATED
    feasible = share <= allowed
    limited = {limit.metric: over(limit.metric) for limit in limits}
    for limit in limits:
        with np.errstate(divide="ignore"):
            feasible &= np.asarray(limit.excess(limited[limit.metric])) <= 0
    score = np.stack([-feasible.sum(axis=1).astype(float), sign * over_loads(over(objective))], axis=1)
    return Judged(over(objective), limited, feasible, score)


def best(judged: Judged, among: Sequence[int]) -> int:
    """The schedule with the least score of those ``among`` [places]; the first of equals."""
    return min(among, key=lambda place: (judged.score[place, 0], float(judged.score[place, 1])))


def best_worth_having(
    judged: Judged, schedules: np.ndarray, among: Sequence[int], finer: Sequence[int], min_gain: float
) -> int:
    """The best of ``schedules`` [schedules, batches] ``among`` [places], or one of those with ``finer`` tiers, of which
    each that it has more must be worth ``min_gain`` [1] of the objective over the loads: a share of the pace that is
    too small to count at its batches is worth more to those who wait behind them."""
    first = best(judged, among)
    tiers = 1 + np.count_nonzero(np.diff(schedules), axis=1)
    chosen, least = first, (judged.score[first, 0], judged.score[first, 1])
    for place in finer:
        feasible, value = judged.score[place]
        more = max(tiers[place] - tiers[first], 0)
        score = feasible, value * (1.0 + min_gain) ** np.copysign(more, value)
        if score < least:
            chosen, least = place, score
    return chosen
