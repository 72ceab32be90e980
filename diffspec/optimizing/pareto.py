"""The exact set of points that no other point beats: at least as good in every objective and better in one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffspec.optimizing.candidates import Candidates
from diffspec.optimizing.lanes import limited_values

MORE_REPLICAS = (1.0, 1.25, 1.5, 2.0)
"""Multiples of the replicas needed that are points of the front."""


def non_dominated(points: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """Places of the points [n, objectives] that none dominates, all objectives to be minimised, in lexicographic order.

    In that order no point dominates an earlier one, so each is compared with those kept before it: n*kept*objectives
    comparisons, exact. Points alike in every objective are all kept or all left out.

    >>> non_dominated([[1.0, 5.0], [2.0, 2.0], [3.0, 3.0], [4.0, 1.0], [2.0, 2.0]]).tolist()
    [0, 1, 4, 3]
    """
    values = np.asarray(points, dtype=float)
    if not values.size:
        return np.zeros(0, dtype=int)
    kept = np.empty_like(values)
    front: list[int] = []
    for place in np.lexsort(values.T[::-1]):
        before, point = kept[: len(front)], values[place]
        if not ((before <= point).all(axis=1) & (before < point).any(axis=1)).any():
            kept[len(front)] = point
            front.append(int(place))
    return np.asarray(front, dtype=int)


def pareto(
    pool: Candidates, sized: Sequence[Mapping[str, Any]], ranked: Sequence[int], target: float, latency: str, aim: str
) -> dict[str, Any]:
    """The exact Pareto front in latency [s] (small), rate per device [req/s] (large) and spend (small) of every
    candidate with 1, 1.25, 1.5 and 2 times the replicas that it needs.

    ``objectives``: their names; ``front``: the points that no other beats, quickest first; ``dominated``: how many
    others there are; ``points``: all of them, front included.
    """
    spend = "cost" if aim == "cost" else "device_hours"
    points = []
    for place in ranked:
        needed = sized[place]["replicas"]
        points += [(place, count) for count in dict.fromkeys(math.ceil(needed * more - 1e-9) for more in MORE_REPLICAS)]
    rates = np.asarray([target / count for _, count in points])
    values = limited_values(pool.lanes.take([place for place, _ in points]), [latency], rates)[latency]
    entries = []
    for (place, count), value in zip(points, values, strict=True):
        if not math.isfinite(value):
            continue
        entry = sized[place]
        devices = count * entry["devices"] // entry["replicas"]
        shown = pool.told(place) | {"replicas": count, "devices": devices, latency: float(value)}
        spent = entry[spend] * count / entry["replicas"]
        entries.append(shown | {"rate_per_device": target / devices, spend: spent})
    front = non_dominated([(entry[latency], -entry["rate_per_device"], entry[spend]) for entry in entries])
    names = ("hardware", "draft_length", latency, "rate_per_device", spend)
    return {
        "objectives": [latency, "rate_per_device", spend],
        "front": [entries[place] for place in front],
        "dominated": len(entries) - len(front),
        "points": [{name: entry[name] for name in names} for entry in entries],
    }
