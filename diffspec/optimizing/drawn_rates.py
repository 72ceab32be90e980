"""How sure a replica's largest rate is: the search repeated for draws of what is not known."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from scipy.special import stdtrit

from diffspec.analysis.intervals import misfit, spread
from diffspec.fitting.uncertainty import DRAWS, LEVEL
from diffspec.optimizing.candidates import Candidates, replicas_of
from diffspec.optimizing.lanes import evaluate, largest_rates, over_draws
from diffspec.optimizing.limits import Limit


def drawn_rates(pool: Candidates, places: Sequence[int], limits: Sequence[Limit]) -> dict[int, np.ndarray]:
    """The largest rate of each of the candidates at ``places`` by each draw of what is not known, none where nothing
    tells; all are searched together. What a fit misses scatters the limited metrics of each draw: one quantile of its
    noise a draw, the same order for all of a latency."""
    found = dict.fromkeys(places, np.zeros(0))
    drawn = {number: pool.servers[number].draws(DRAWS) for number in {pool.server[place] for place in places}}
    known = [(place, drawn[pool.server[place]]) for place in places]
    asked = [(place, models) for place, models in known if models is not None]
    if not asked:
        return found
    each = [over_draws(pool.lanes.take([place]), models) for place, models in asked]
    parts = [(one.models, one.workloads, one.configs) for one in each]
    models, workloads, configs = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    lanes = each[0]._replace(models=models, workloads=workloads, configs=configs)
    shifts = [_misses(pool, place, limits, one.count) for (place, _), one in zip(asked, each, strict=True)]
    rates = largest_rates(lanes, limits, np.concatenate(shifts), beyond=False).rate
    ends = np.cumsum([one.count for one in each])[:-1]
    return found | dict(zip([place for place, _ in asked], np.split(rates, ends), strict=True))


def _misses(pool: Candidates, place: int, limits: Sequence[Limit], count: int) -> np.ndarray:
    """What a fit misses of each limited metric, in log units [draws, limits]; zeros where nothing was fitted."""
    server, shift = pool.servers[pool.server[place]], np.zeros((count, len(limits)))
    known = server.deployment.uncertainty if server.subject is None else None
    if known is None:
        return shift
    values, _ = evaluate(pool.lanes.take([place]), np.asarray([1e-9]))
    share = float(values["ttft_mean"][0] / values["e2e_mean"][0])
    scales = misfit(known, is_open=True, ttft_share=share)
    points = stdtrit(known.degrees_of_freedom, (np.arange(count) + 0.5) / count)
    for number, name in enumerate(dict.fromkeys(limit.metric.split("_")[0] for limit in limits)):
        order = np.random.default_rng(number).permutation(points)
        scale = scales["e2e_latency" if name == "e2e" else name] or 0.0
        for index, limit in enumerate(limits):
            if limit.metric.split("_")[0] == name:
                shift[:, index] = scale * order
    return shift


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
