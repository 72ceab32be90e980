"""How sure a replica's largest rate is: the search repeated for draws of what is not known."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from diffspec.analysis.intervals import misfit, spread
from diffspec.fitting.uncertainty import DRAWS, LEVEL
from diffspec.optimizing.candidates import Candidates, replicas_of
from diffspec.optimizing.lanes import evaluate, largest_rates, over_draws
from diffspec.optimizing.limits import Limit


def drawn_rates(pool: Candidates, place: int, limits: Sequence[Limit]) -> np.ndarray:
    """The largest rate of one candidate by each draw of what is not known, none where nothing tells. What a fit misses
    scatters the limited metrics of each draw: one quantile of its noise a draw, the same order for all of a latency."""
    server = pool.servers[pool.server[place]]
    models = server.draws(DRAWS)
    if models is None:
        return np.zeros(0)
    lanes = over_draws(pool.lanes.take([place]), models)
    known = server.deployment.uncertainty if server.subject is None else None
    shift = np.zeros((lanes.count, len(limits)))
    if known is not None:
        values, _ = evaluate(pool.lanes.take([place]), np.asarray([1e-9]))
        share = float(values["ttft_mean"][0] / values["e2e_mean"][0])
        scales = misfit(known, is_open=True, ttft_share=share)
        points = stdtrit(known.degrees_of_freedom, (np.arange(lanes.count) + 0.5) / lanes.count)
        for number, name in enumerate(dict.fromkeys(limit.metric.split("_")[0] for limit in limits)):
            order = np.random.default_rng(number).permutation(points)
            scale = scales["e2e_latency" if name == "e2e" else name] or 0.0
            for index, limit in enumerate(limits):
                if limit.metric.split("_")[0] == name:
                    shift[:, index] = scale * order
    return largest_rates(lanes, limits, shift).rate


def rate_intervals(rates: np.ndarray, target: float, headroom: float) -> dict[str, Any] | None:
    """Intervals of the rate per replica [req/s] and of the replicas for a target over draws; None without draws."""
    if not len(rates):
        return None
    replicas = [replicas_of(rate, target, headroom) for rate in rates]
    return {
        "level": LEVEL,
        "draws": len(rates),
        "feasible_share": float((rates > 0).mean()),
        "rate_per_replica": spread(rates),
        "replicas": spread(replicas),
    }
