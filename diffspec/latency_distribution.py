"""Means and percentiles of latency under an open loop, as numbers: what :mod:`diffspec.latency_laws` say."""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffspec.latency_laws import LatencyLaws
from diffspec.parameters import Scalar
from diffspec.waiting import RequestsInSystem

PERCENTILES = (50, 90, 95, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2e")
PERCENTILE_METRICS = tuple(f"{name}_p{percent}" for name in LATENCIES for percent in PERCENTILES)
"""Names of percentiles, such as ``ttft_p95``."""


class LatencyDistribution(eqx.Module):
    """Means [s] and percentiles [s] of ttft, tpot, itl and e2e under an open loop, and the chain they come from.

    ``attained[metric]``: P(metric <= t) at the times that were asked for, the share of requests within a limit of t.
    """

    requests: RequestsInSystem
    waiting_time: Scalar
    ttft_mean: Scalar
    e2e_mean: Scalar
    ttft: Float[Array, "percentiles"]
    tpot: Float[Array, "percentiles"]
    itl: Float[Array, "percentiles"]
    e2e: Float[Array, "percentiles"]
    attained: dict[str, Float[Array, "times"]] = eqx.field(default_factory=dict)

    def at_means(self, ttft: Scalar, e2e: Scalar) -> dict[str, Float[Array, "percentiles"]]:
        """Percentiles [s] by metric, those of ttft and e2e scaled to these means [s]."""
        scale = {"ttft": ttft / self.ttft_mean, "e2e": e2e / self.e2e_mean}
        return {name: getattr(self, name) * scale.get(name, 1.0) for name in LATENCIES}


def latency_distribution(
    laws: LatencyLaws,
    *,
    percentiles: tuple[float, ...] = PERCENTILES,
    at: Mapping[str, Float[Array, "times"]] | None = None,
    means: Mapping[str, Scalar] | None = None,
) -> LatencyDistribution:
    """What the ``laws`` say of ``percentiles``. ``at[metric]`` [s]: times whose probability is told in ``attained``,
    each of a law scaled to ``means[metric]`` [s] where that is given (ttft, e2e); cheaper than a percentile.
    """
    wanted, scaled = jnp.asarray(percentiles, dtype=float), laws.at_means(means or {})
    attained = {
        metric: jax.vmap(lambda t, metric=metric: scaled.probability(metric, t))(times)
        for metric, times in (at or {}).items()
    }
    return LatencyDistribution(
        requests=laws.requests,
        waiting_time=laws.waiting_time,
        ttft_mean=laws.ttft_mean,
        e2e_mean=laws.e2e_mean,
        attained=attained,
        **{name: laws.percentiles(name, wanted) for name in LATENCIES},
    )
