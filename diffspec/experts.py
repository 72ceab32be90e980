"""Mixture of experts: which share of the expert weights a step reads, and how uneven the ranks are.

With p_e = P(a token routes to expert e), sum p_e = m, a step over T tokens reads expert e with probability
phi_e(T) = 1-(1-p_e)^T. Uniform routing on one rank gives the published coverage 1-(1-m/M)^T (arXiv 2605.15051, Eq 4);
uneven popularity gives less (Jensen). With experts spread over ranks, the slowest rank sets the step. An expert with
several copies has its tokens split between them: a copy with the share q of them is read with probability
1-(1-p_e*q)^T, and the weights of every copy are read, so that copies balance ranks and widen coverage (ours).
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffspec.parameters import Scalar
from diffspec.results import InputError

TABLE_NODES, TABLE_LOW, TABLE_HIGH = 257, 0.1, 1e6
"""Nodes of a :class:`CoverageTable`, evenly spaced in log T from the lowest to the highest T [tok]."""


class ExpertRouting(eqx.Module):
    """Popularity of experts and their placement on ranks.

    * ``popularity[g]``: P(a token routes to one expert of group g), in (0, 1].
    * ``placement[r, g]``: how many experts (copies of experts) of group g live on rank r; real-valued: a soft placement
      is allowed.
    * ``share[r, g]``: which share of its expert's tokens a copy on rank r gets; None: all, every expert has one copy.
    * ``sharpness``: None for the slowest rank itself; else the norm that stands for it, (sum_r x_r^s)^(1/s) >= max,
      smooth for optimisers.

    All three arrays may have a leading axis of layers. Ranks wait for each other in every layer, so layers are averaged
    after the maximum over ranks. Build it with :meth:`uniform`, :meth:`from_popularity` or :meth:`from_slots`.
    """

    popularity: Float[Array, "*layers groups"]
    placement: Float[Array, "*layers ranks groups"]
    share: Float[Array, "*layers ranks groups"] | None = None
    sharpness: float | None = eqx.field(static=True, default=None)

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

    @classmethod
    def from_slots(cls, popularity, expert_of_slot, expert_ranks: int) -> "ExpertRouting":
        """Experts with copies: ``expert_of_slot[..., s]`` is the expert whose copy lies in slot s; rank r has the slots
        from r*S/R on, S/R of them. The c_e copies of an expert share its tokens equally.

        Errors: :class:`InputError` for slots that the ranks cannot share equally, or an expert without a copy.

        >>> halves = ExpertRouting.from_slots([1.0, 0.5, 0.5], [0, 1, 0, 2], 2)  # expert 0 on both ranks
        >>> float(halves.load_imbalance()), float(halves.coverage(1.0))  # 3 experts are read as 2 times 1: 2 of 3
        (1.0, 0.6666666666666666)
        """
        popularity, slots = np.asarray(popularity, dtype=float), np.asarray(expert_of_slot)
        experts, size = popularity.shape[-1], slots.shape[-1]
        if not np.all((popularity >= 0) & (popularity <= 1)):
            raise InputError("popularity: allowed: one probability in [0, 1] for each expert")
        if size % expert_ranks or slots.shape[:-1] != popularity.shape[:-1]:
            raise InputError(f"expert_of_slot: got shape {slots.shape} for {expert_ranks} ranks; allowed: equal slots")
        of = slots.reshape(*slots.shape[:-1], expert_ranks, size // expert_ranks)
        placement = (of[..., None] == np.arange(experts)).sum(axis=-2).astype(float)
        copies = placement.sum(axis=-2, keepdims=True)
        if copies.min() < 1 or copies.sum() != slots.size:
            raise InputError(f"expert_of_slot: allowed: every expert from 0 to {experts - 1} at least once, no other")
        share = np.broadcast_to(1.0 / copies, placement.shape)
        return cls(jnp.asarray(popularity), jnp.asarray(placement), jnp.asarray(share))

    def coverage(self, tokens: Scalar) -> Float[Array, ""]:
        """Share of a rank's expert weights read by a step over T tokens, on the rank that reads most, relative to the
        mean number of experts per rank: max_r sum_e placement[r,e]*(1-(1-p_e*share[r,e])^T) / (M/R).

        M counts experts, not copies: above 1 where more copies are read than a rank would have experts."""
        log_miss = jnp.log(jnp.maximum(1.0 - self._routed(), jnp.finfo(self.popularity.dtype).tiny))
        read = jnp.sum(self.placement * -jnp.expm1(tokens * log_miss), axis=-1)
        experts = self.placement if self.share is None else self.placement * self.share
        return jnp.mean(self._slowest(read) / jnp.mean(jnp.sum(experts, axis=-1), axis=-1))

    def load_imbalance(self) -> Float[Array, ""]:
        """Largest over mean routed load of a rank, >= 1: max_r sum_e placement[r,e]*p_e*share[r,e] / mean of ranks."""
        load = jnp.sum(self.placement * self._routed(), axis=-1)
        return jnp.mean(self._slowest(load) / jnp.mean(load, axis=-1))

    def _routed(self):
        """P(a token routes to one copy of group g on rank r)."""
        popularity = self.popularity[..., None, :]
        return popularity if self.share is None else popularity * self.share

    def _slowest(self, of_rank):
        if self.sharpness is None:
            return jnp.max(of_rank, axis=-1)
        largest = jax.lax.stop_gradient(jnp.max(of_rank, axis=-1, keepdims=True))
        norm = jnp.sum((of_rank / largest) ** self.sharpness, axis=-1) ** (1.0 / self.sharpness)
        return largest[..., 0] * norm


class CoverageTable(eqx.Module):
    """An :class:`ExpertRouting` read off at :data:`TABLE_NODES` values of T: as good as exact, and as cheap for a
    thousand experts in sixty layers as for one.

    log coverage is a cubic Hermite polynomial in log T between nodes, with exact elasticities at the nodes; below the
    lowest T coverage is linear in T, above the highest it keeps its elasticity. ``imbalance`` is load_imbalance.

    >>> routing = ExpertRouting.from_popularity([0.9, 0.6, 0.3, 0.2], [0, 1, 1, 0])
    >>> table = CoverageTable.of(routing)
    >>> bool(abs(table.coverage(7.3) / routing.coverage(7.3) - 1) < 1e-7)
    True
    """

    log_coverage: Float[Array, "nodes"]
    elasticity: Float[Array, "nodes"]
    imbalance: Float[Array, ""]
    low: float = eqx.field(static=True, default=TABLE_LOW)
    high: float = eqx.field(static=True, default=TABLE_HIGH)

    @classmethod
    def of(cls, routing: ExpertRouting, nodes: int = TABLE_NODES) -> "CoverageTable":
        """The table of a routing; differentiable in its popularity and placement."""

        def at(log_tokens):
            return jax.jvp(lambda x: jnp.log(routing.coverage(jnp.exp(x))), (log_tokens,), (jnp.ones_like(log_tokens),))

        log_coverage, elasticity = jax.lax.map(at, jnp.asarray(log_nodes(nodes)))
        return cls(log_coverage, elasticity, routing.load_imbalance())

    def coverage(self, tokens: Scalar) -> Float[Array, ""]:
        """As :meth:`ExpertRouting.coverage`."""
        count = self.log_coverage.shape[-1]
        step = math.log(self.high / self.low) / (count - 1)
        tokens = jnp.asarray(tokens, dtype=float)
        x = (jnp.log(jnp.maximum(tokens, self.low)) - math.log(self.low)) / step
        left = jnp.clip(jnp.floor(x), 0.0, count - 2.0)
        beyond = jnp.maximum(x - (count - 1.0), 0.0)
        t = jnp.minimum(x - left, 1.0)
        node = left.astype(int)
        here, there = self.log_coverage[node], self.log_coverage[node + 1]
        rise, end = step * self.elasticity[node], step * self.elasticity[node + 1]
        bend = (1.0 - t) * (rise - (there - here)) + t * ((there - here) - end)
        log_coverage = (1.0 - t) * here + t * there + t * (1.0 - t) * bend + beyond * end
        return jnp.exp(log_coverage) * jnp.minimum(tokens / self.low, 1.0)

    def load_imbalance(self) -> Float[Array, ""]:
        """As :meth:`ExpertRouting.load_imbalance`."""
        return self.imbalance


def log_nodes(nodes: int = TABLE_NODES) -> np.ndarray:
    """log T [log tok] at the nodes of a table."""
    return np.linspace(math.log(TABLE_LOW), math.log(TABLE_HIGH), nodes)
