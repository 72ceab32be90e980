"""Dimensions of the models, and the fewest bytes and operations that one pass over them needs. No torch here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    `feed_forward` is the width of the SwiGLU, of one expert where `experts` > 0. `tied`: the output head is the
    embedding. `head_vocabulary` is the width of the output head. `reads_hidden`: an EAGLE-like head that takes the
    verifier's hidden state beside the token (2*hidden -> hidden) and borrows the verifier's embedding.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    head_vocabulary: int
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 0
    reads_hidden: bool = False

    @property
    def attention_params(self) -> int:
        """Parameters of the four attention projections of one layer."""
        return self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)

    @property
    def expert_params(self) -> int:
        """Parameters of one expert, or of the dense feed-forward block."""
        return 3 * self.hidden * self.feed_forward

    @property
    def always_read_params(self) -> int:
        """Parameters that every pass reads, whatever it routes to: all but embedding and experts."""
        mlp = self.hidden * self.experts if self.experts else self.expert_params
        extra = 2 * self.hidden * self.hidden if self.reads_hidden else 0
        return self.layers * (self.attention_params + mlp) + extra + self.head_vocabulary * self.hidden

    @property
    def params(self) -> int:
        """All parameters that are the model's own; norms, a few hundred thousand, are left out."""
        embedding = 0 if self.tied or self.reads_hidden else self.vocabulary * self.hidden
        return self.always_read_params + embedding + self.layers * self.experts * self.expert_params

    def kv_bytes_per_token(self, value_bytes: int) -> int:
        """KV-cache bytes that one token of context takes."""
        return 2 * self.layers * self.kv_heads * self.head_size * value_bytes


def uniform_coverage(experts: int, experts_per_token: int, tokens: float) -> float:
    """Expected share of a layer's experts that `tokens` tokens reach under uniform routing, 1-(1-m/M)^T.

    >>> round(uniform_coverage(128, 8, 1), 4)
    0.0625
    """
    return 1.0 - (1.0 - experts_per_token / experts) ** tokens


@dataclass(frozen=True)
class Work:
    """The fewest bytes moved and floating-point operations done by one pass."""

    bytes: float
    flops: float

    def seconds(self, bandwidth: float, matmul_rate: float) -> float:
        """The roofline: the longer of bytes/bandwidth [B/s] and flops/matmul_rate [1/s]."""
        return max(self.bytes / bandwidth, self.flops / matmul_rate)


def work(
    shape: Shape,
    batch: int,
    tokens: int,
    context: float,
    value_bytes: int,
    logit_rows: int | None = None,
    coverage: float | None = None,
) -> Work:
    """Work of a pass in which `batch` requests feed `tokens` tokens each, on `context` tokens already cached.

    Bytes: weights read once (experts: the share `coverage` of them, by default the uniform one), the cache read once
    and the new rows written. Activations and logits are left out, so this is a lower bound. `logit_rows` (default:
    every token) rows pass through the output head.
    """
    total = batch * tokens
    rows = total if logit_rows is None else logit_rows
    weights = float(shape.always_read_params)
    per_token = shape.always_read_params - shape.head_vocabulary * shape.hidden
    if shape.experts:
        share = uniform_coverage(shape.experts, shape.experts_per_token, total) if coverage is None else coverage
        weights += share * shape.layers * shape.experts * shape.expert_params
        per_token += shape.layers * shape.experts_per_token * shape.expert_params
    cache = batch * (context + 2 * tokens) * shape.kv_bytes_per_token(value_bytes)
    seen = context + (tokens + 1) / 2  # mean number of keys a fed token attends to
    attention = 4.0 * total * shape.layers * shape.heads * shape.head_size * seen
    flops = 2.0 * total * per_token + 2.0 * rows * shape.head_vocabulary * shape.hidden + attention
    return Work(weights * value_bytes + cache, flops)


SHAPES = {
    # The dimensions of Llama-3.1-8B, Qwen3-30B-A3B, Qwen2.5-0.5B, Qwen3-0.6B and Llama-3.2-1B.
    "dense-8b": Shape("dense-8b", 32, 4096, 32, 8, 128, 14336, 128256, 128256),
    "moe-30b-a3b": Shape("moe-30b-a3b", 48, 2048, 32, 4, 128, 768, 151936, 151936, experts=128, experts_per_token=8),
    "draft-0.5b": Shape("draft-0.5b", 24, 896, 14, 2, 64, 4864, 151936, 151936, tied=True),
    "draft-0.6b": Shape("draft-0.6b", 28, 1024, 16, 8, 128, 3072, 151936, 151936, tied=True),
    "draft-1b": Shape("draft-1b", 16, 2048, 32, 8, 64, 8192, 128256, 128256, tied=True),
    # One layer of the 8B model and a head over 32,000 drafted tokens, as EAGLE-3 has it.
    "eagle-8b": Shape("eagle-8b", 1, 4096, 32, 8, 128, 14336, 128256, 32000, reads_hidden=True),
}

TINY = {
    "dense-8b": Shape("tiny-dense", 2, 64, 4, 2, 16, 128, 256, 256),
    "moe-30b-a3b": Shape("tiny-moe", 2, 64, 4, 2, 16, 32, 256, 256, experts=8, experts_per_token=2),
    "draft-0.5b": Shape("tiny-draft-a", 1, 48, 3, 1, 16, 64, 256, 256, tied=True),
    "draft-0.6b": Shape("tiny-draft-b", 1, 32, 2, 1, 16, 64, 256, 256, tied=True),
    "draft-1b": Shape("tiny-draft-c", 1, 32, 2, 2, 16, 64, 256, 256, tied=True),
    "eagle-8b": Shape("tiny-eagle", 1, 64, 4, 2, 16, 128, 256, 128, reads_hidden=True),
}
