"""A transformer with random weights at real dimensions, a KV cache of plain rows, and passes over ragged batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .experts import experts_grouped, experts_loop, route
from .ops import Ops, Rotary, Segment
from .shapes import Shape


@dataclass
class Layer:
    """Weights of one layer, [out, in] each; the experts' have a leading axis."""

    norm_in: Tensor
    qkv: Tensor
    out: Tensor
    norm_mlp: Tensor
    inward: Tensor
    outward: Tensor
    router: Tensor | None = None


class Cache:
    """Keys and values of every layer: [rows, kv_heads, head_size] each, filled with random numbers."""

    def __init__(self, shape: Shape, rows: int, device: torch.device, dtype: torch.dtype):
        size = (rows, shape.kv_heads, shape.head_size)
        self.rows = rows
        self.keys, self.values = (
            [torch.empty(size, device=device, dtype=dtype).normal_() for _ in range(shape.layers)] for _ in range(2)
        )


class Model:
    """Random weights of a `Shape` and its forward pass."""

    def __init__(
        self, shape: Shape, device: torch.device, dtype: torch.dtype, ops: Ops, longest: int = 40_000, seed: int = 0
    ):
        self.shape, self.ops, self.device, self.dtype = shape, ops, device, dtype
        self.rotary = Rotary.make(longest, shape.head_size, device)
        self.imposed: Tensor | None = (
            None  # [layers, tokens, experts_per_token]: experts to use, whatever the router says
        )
        self.routed: list[Tensor] | None = None  # where a pass leaves the experts it used, one entry a layer
        generator = torch.Generator(device=device).manual_seed(seed)

        def matrix(*size: int, scale: float = 1.0) -> Tensor:
            deviation = scale * size[-1] ** -0.5
            return torch.empty(size, device=device, dtype=dtype).normal_(0.0, deviation, generator=generator)

        hidden, width = shape.hidden, shape.feed_forward
        stack = (shape.experts,) if shape.experts else ()
        damp = (2 * shape.layers) ** -0.5  # keeps the residual stream of order one
        ones = torch.ones(hidden, device=device, dtype=dtype)
        self.embedding = matrix(shape.vocabulary, hidden, scale=hidden**0.5)
        self.head = self.embedding if shape.tied else matrix(shape.head_vocabulary, hidden)
        self.final_norm = ones
        self.merge = matrix(hidden, 2 * hidden) if shape.reads_hidden else None
        self.layers = [
            Layer(
                ones,
                matrix((shape.heads + 2 * shape.kv_heads) * shape.head_size, hidden),
                matrix(hidden, shape.heads * shape.head_size, scale=damp),
                ones,
                matrix(*stack, 2 * width, hidden),
                matrix(*stack, hidden, width, scale=damp),
                matrix(shape.experts, hidden) if shape.experts else None,
            )
            for _ in range(shape.layers)
        ]

    @property
    def graph_safe(self) -> bool:
        """Whether a CUDA graph can hold a pass: all but the plain loop over experts."""
        return not self.shape.experts or self.ops.grouped

    def forward(
        self,
        tokens: Tensor,
        segments: Sequence[Segment],
        cache: Cache,
        rows: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One pass over the segments, whose tokens [T] follow one another in `tokens`.

        Returns logits and final hidden states of the rows `rows` (all by default). `hidden` [T, hidden]: the verifier's
        states, for a drafter that reads them.
        """
        ops, sizes = self.ops, [each.batch * each.tokens for each in segments]
        residual = F.embedding(tokens, self.embedding)
        if self.merge is not None:
            assert hidden is not None, "an EAGLE-like head needs hidden states"
            residual = F.linear(torch.cat((residual, hidden), dim=-1), self.merge)
        update: Tensor | None = None
        for index, layer in enumerate(self.layers):
            normed = ops.add_norm(residual, update, layer.norm_in)
            mixed = F.linear(normed, layer.qkv)
            keys, values = cache.keys[index], cache.values[index]
            # all new keys are in the cache before any token attends: chunks of one prompt may share a pass
            parts = [
                (ops.rotate_store(part, each, self.rotary, keys, values), each)
                for part, each in zip(mixed.split(sizes), segments, strict=True)
            ]
            attended = [ops.attend(query, each, keys, values) for query, each in parts]
            update = F.linear(attended[0] if len(attended) == 1 else torch.cat(attended), layer.out)
            update = self._mlp(index, layer, ops.add_norm(residual, update, layer.norm_mlp))
        if rows is not None:
            residual, update = residual[rows], update[rows]
        normed = ops.add_norm(residual, update, self.final_norm)
        return F.linear(normed, self.head), residual

    def _mlp(self, index: int, layer: Layer, x: Tensor) -> Tensor:
        if layer.router is None:
            return F.linear(self.ops.gate(F.linear(x, layer.inward)), layer.outward)
        imposed = None if self.imposed is None else self.imposed[index, : x.shape[0]]
        ids, weights = route(F.linear(x, layer.router), self.shape.experts_per_token, imposed)
        if self.routed is not None:
            self.routed.append(ids)
        product = experts_grouped if self.ops.grouped else experts_loop
        return product(x, ids, weights, layer.inward, layer.outward, self.ops.gate)
