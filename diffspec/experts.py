"""Mixture of experts: which share of the expert weights a step reads, and how uneven the ranks are.

With p_e = P(a token routes to expert e), sum p_e = m, a step over T tokens reads expert e with probability
phi_e(T) = 1-(1-p_e)^T. Uniform routing on one rank gives the published coverage 1-(1-m/M)^T (arXiv 2605.15051, Eq 4);
uneven popularity gives less (Jensen). With experts spread over ranks, the slowest rank sets the step.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffspec.parameters import Scalar
from diffspec.results import InputError


class ExpertRouting(eqx.Module):
    """Popularity of experts and their placement on ranks.

    * ``popularity[g]``: P(a token routes to one expert of group g), in (0, 1].
    * ``placement[r, g]``: how many experts of group g live on rank r (real-valued: a soft placement is allowed).

    Build it with :meth:`uniform` or :meth:`from_popularity`.
    """

    popularity: Float[Array, "groups"]
    placement: Float[Array, "ranks groups"]

    @classmethod
    def uniform(
        cls, num_experts: float | int, experts_per_token: float | int, expert_ranks: int = 1
    ) -> "ExpertRouting":
        """Every expert equally likely, spread evenly: coverage is 1-(1-m/M)^T.

        >>> routing = ExpertRouting.uniform(16, 2)
        >>> round(float(routing.coverage(8.0)), 4)
        0.6564
        """
        if not 0 < experts_per_token <= num_experts:
            raise InputError(f"experts_per_token: got {experts_per_token!r}; allowed: (0, num_experts={num_experts!r}]")
        share = jnp.full((1,), experts_per_token / num_experts, dtype=float)
        return cls(share, jnp.full((expert_ranks, 1), num_experts / expert_ranks, dtype=float))

    @classmethod
    def from_popularity(cls, popularity, rank_of_expert=None) -> "ExpertRouting":
        """From a routing histogram: ``popularity[e]`` = share of tokens that route to expert e (sums to m);
        ``rank_of_expert[e]`` = its rank, all on one rank by default."""
        popularity = np.asarray(popularity, dtype=float)
        if popularity.ndim != 1 or not popularity.size or not np.all((popularity >= 0) & (popularity <= 1)):
            raise InputError("popularity: allowed: one probability in [0, 1] for each expert")
        ranks = np.zeros(popularity.size, int) if rank_of_expert is None else np.asarray(rank_of_expert, int)
        if ranks.shape != popularity.shape or ranks.min() < 0:
            raise InputError(f"rank_of_expert: got {ranks.size} ranks for {popularity.size} experts")
        placement = (np.arange(ranks.max() + 1)[:, None] == ranks[None, :]).astype(float)
        return cls(jnp.asarray(popularity), jnp.asarray(placement))

    def coverage(self, tokens: Scalar) -> Float[Array, ""]:
        """Share of a rank's expert weights read by a step over T tokens, on the rank that reads most, relative to the
        mean number of experts per rank: max_r sum_e placement[r,e]*(1-(1-p_e)^T) / (M/R)."""
        log_miss = jnp.log(jnp.maximum(1.0 - self.popularity, jnp.finfo(self.popularity.dtype).tiny))
        read = self.placement @ -jnp.expm1(tokens * log_miss)
        return jnp.max(read) / jnp.mean(jnp.sum(self.placement, axis=1))

    def load_imbalance(self) -> Float[Array, ""]:
        """Largest over mean routed load of a rank, >= 1: max_r sum_e placement[r,e]*p_e / mean over ranks."""
        load = self.placement @ self.popularity
        return jnp.max(load) / jnp.mean(load)
