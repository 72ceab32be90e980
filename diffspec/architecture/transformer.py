"""Dimensions of a decoder-only transformer: parameters, bytes and FLOP.

A decode step reads every shared weight once and, of a mixture of experts, the experts its tokens route to; each token
costs 2 FLOP per weight it meets; each cached token holds a key and a value in every layer (grouped-query attention), or
one latent vector (multi-head latent attention), or nothing beyond the window of a sliding layer. Biases and the norms
of queries and keys are left out (below 0.1 % of the parameters).
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.core import Tracer

from diffspec.parameters import Scalar
from diffspec.results import InputError


@dataclass(frozen=True)
class Transformer:
    """Dimensions of one model; every count is a property.

    * ``layers``, ``hidden``, ``vocab``, ``heads``, ``kv_heads``, ``head_dim``; ``tied``: the head is the embedding
    * ``intermediate``: width of a dense layer's MLP, of 3 matrices if ``gated``, else 2
    * ``moe_layers`` of the layers have ``num_experts`` experts of width ``expert_intermediate``, ``experts_per_token``
      of them used by a token, and a shared MLP of width ``shared_intermediate``
    * ``kv_lora_rank``, ``q_lora_rank``, ``rope_head_dim``, ``nope_head_dim``, ``v_head_dim``: latent attention
    * ``sliding_layers`` of the layers attend to the last ``sliding_window`` tokens only
    * ``weight_bits``, ``expert_bits``, ``head_bits`` (embedding and head), ``kv_bits``: bits of one number, scales of
      its group included; ``weight_format``, ``expert_format``: the number format their products are computed in
    * ``extra_weights``: further weights that every token meets, such as the projection at the entry of an EAGLE head

    >>> small = Transformer("toy", layers=2, hidden=8, vocab=32, heads=2, kv_heads=1, head_dim=4, intermediate=16)
    >>> small.parameters, small.kv_bytes_per_token()
    (1704, 32.0)
    """

    name: str
    layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated: bool = True
    tied: bool = False
    moe_layers: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    rope_head_dim: int = 0
    nope_head_dim: int = 0
    v_head_dim: int = 0
    sliding_layers: int = 0
    sliding_window: int = 0
    weight_bits: float = 16.0
    expert_bits: float = 16.0
    head_bits: float = 16.0
    kv_bits: float = 16.0
    weight_format: str = "bf16"
    expert_format: str = "bf16"
    extra_weights: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        for field, value in vars(self).items():
            needed = field in ("layers", "hidden", "vocab", "heads", "kv_heads", "head_dim") or field.endswith("_bits")
            if field in ("name", "gated", "tied", "weight_format", "expert_format", "notes"):
                continue
            if not isinstance(value, int | float) or not (value > 0 if needed else value >= 0) or value > 1e12:
                allowed = "a positive number" if needed else "a number of at least 0"
                raise InputError(f"{self.name}: {field}: got {value!r}; allowed: {allowed}")
        if self.sliding_layers > self.layers:
            raise InputError(f"{self.name}: sliding_layers: got {self.sliding_layers}; allowed: 0 to {self.layers}")
        if not 0 <= self.moe_layers <= self.layers or (self.moe_layers and not self.num_experts):
            raise InputError(
                f"{self.name}: moe_layers: got {self.moe_layers}; allowed: 0 to {self.layers} with experts"
            )
        if self.moe_layers and not 0 < self.experts_per_token <= self.num_experts:
            raise InputError(
                f"{self.name}: experts_per_token: got {self.experts_per_token}; allowed: 1 to {self.num_experts}"
            )

    @property
    def is_moe(self) -> bool:
        """True for a mixture of experts."""
        return self.moe_layers > 0

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's attention: its four projections, or the low-rank ones of latent attention."""
        if not self.kv_lora_rank:
            return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        query_key = self.nope_head_dim + self.rope_head_dim
        query = self.hidden * self.heads * query_key
        if self.q_lora_rank:
            query = self.q_lora_rank * (self.hidden + self.heads * query_key)
        latent = self.hidden * (self.kv_lora_rank + self.rope_head_dim)
        expand = self.kv_lora_rank * self.heads * (self.nope_head_dim + self.v_head_dim)
        return query + latent + expand + self.heads * self.v_head_dim * self.hidden

    @property
    def expert_weights(self) -> int:
        """Weights of one expert in one layer."""
        return (3 if self.gated else 2) * self.hidden * self.expert_intermediate

    @property
    def shared_weights(self) -> int:
        """Weights outside embedding, head and experts that every token meets: attention, dense and shared MLPs, norms,
        routers, ``extra_weights``."""
        matrices = 3 if self.gated else 2
        dense = matrices * self.hidden * self.intermediate * (self.layers - self.moe_layers)
        shared = matrices * self.hidden * self.shared_intermediate + self.hidden * self.num_experts
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * self.attention_weights + dense + self.moe_layers * shared + norms + self.extra_weights

    @property
    def embedding_weights(self) -> int:
        """vocab*hidden: the embedding, and as many again in the head unless ``tied``."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, as model cards count them."""
        embeddings = self.embedding_weights * (1 if self.tied else 2)
        return self.shared_weights + embeddings + self.moe_layers * self.num_experts * self.expert_weights

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets, embedding and head included (some cards leave the embedding out)."""
        idle = self.moe_layers * (self.num_experts - self.experts_per_token) * self.expert_weights
        return self.parameters - idle

    @property
    def expert_bytes(self) -> float:
        """Bytes of all routed experts [B]."""
        return self.moe_layers * self.num_experts * self.expert_weights * self.expert_bits / 8.0

    @property
    def read_bytes(self) -> float:
        """Bytes that every step reads whatever its tokens [B]: shared weights and the head; of the embedding only rows
        are read."""
        return (self.shared_weights * self.weight_bits + self.embedding_weights * self.head_bits) / 8.0

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights in memory [B]."""
        embedding = 0.0 if self.tied else self.embedding_weights * self.head_bits / 8.0
        return self.read_bytes + embedding + self.expert_bytes

    def flops_per_token(self, *, head: bool = True) -> dict[str, float]:
        """FLOP of one token's products with weights, by number format; ``head=False`` leaves the head out, which a
        prompt needs for its last token only."""
        routed = 2.0 * self.moe_layers * self.experts_per_token * self.expert_weights
        flops = {self.weight_format: 2.0 * self.shared_weights}
        flops[self.expert_format] = flops.get(self.expert_format, 0.0) + routed
        head_format = "fp32" if self.head_bits > 16 else "bf16"
        flops[head_format] = flops.get(head_format, 0.0) + (2.0 * self.embedding_weights if head else 0.0)
        return {name: value for name, value in flops.items() if value > 0}

    def attention_flops(self, context: Scalar) -> Scalar:
        """FLOP of one token's attention to ``context`` cached tokens: 2*heads*(query-key + value width) for each."""
        width = 2 * self.head_dim
        if self.kv_lora_rank:
            width = self.nope_head_dim + self.rope_head_dim + self.v_head_dim
        return 2.0 * self.heads * width * self._attended_layers(context) * context

    def kv_bytes_per_token(self, context: Scalar | None = None) -> Scalar:
        """Bytes of one cached token [B], in the mean over a sequence of ``context`` tokens: a sliding layer keeps its
        window only. None: as if no layer were sliding."""
        numbers = self.kv_lora_rank + self.rope_head_dim if self.kv_lora_rank else 2 * self.kv_heads * self.head_dim
        return self._attended_layers(context) * numbers * self.kv_bits / 8.0

    def _attended_layers(self, context: Scalar | None) -> Scalar:
        if context is None or not self.sliding_layers:
            return float(self.layers)
        if isinstance(context, Tracer):
            kept = jnp.minimum(1.0, self.sliding_window / jnp.maximum(context, 1.0))
        else:
            kept = min(1.0, self.sliding_window / max(context, 1.0))
        return self.layers - self.sliding_layers * (1.0 - kept)


def eagle_head(verifier: Transformer) -> Transformer:
    """An EAGLE-like or MTP head for ``verifier``: one of its layers, with a dense MLP, a projection of 2*hidden to
    hidden at the entry, and the verifier's own head and embedding: read in every pass, not held again."""
    width = verifier.intermediate or verifier.expert_intermediate * max(verifier.experts_per_token, 1)
    return Transformer(
        name=f"one-layer head for {verifier.name}",
        layers=1,
        hidden=verifier.hidden,
        vocab=verifier.vocab,
        heads=verifier.heads,
        kv_heads=verifier.kv_heads,
        head_dim=verifier.head_dim,
        intermediate=width,
        tied=True,
        q_lora_rank=verifier.q_lora_rank,
        kv_lora_rank=verifier.kv_lora_rank,
        rope_head_dim=verifier.rope_head_dim,
        nope_head_dim=verifier.nope_head_dim,
        v_head_dim=verifier.v_head_dim,
        extra_weights=2 * verifier.hidden * verifier.hidden,
    )
