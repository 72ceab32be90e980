"""The four operations of a layer that are not matrix products, in plain PyTorch: slow and plainly right.

`kernels` has the same four for a GPU; `checks` compares them and chooses.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-5


@dataclass
class Segment:
    """`batch` requests that feed `tokens` tokens each.

    The cache rows of request b begin at `base[b]`, `start[b]` tokens are in them, and its new tokens take the next
    rows: positions start[b] .. start[b]+tokens-1. `longest` bounds start + tokens, so that nothing is read back.
    """

    base: Tensor  # [batch] int64
    start: Tensor  # [batch] int64
    tokens: int
    longest: int | None = None

    @property
    def batch(self) -> int:
        return self.base.shape[0]

    def positions(self) -> Tensor:
        """[batch, tokens] position of each new token in its request."""
        return self.start[:, None] + torch.arange(self.tokens, device=self.start.device)


@dataclass
class Rotary:
    """Cosines and sines [positions, head_size/2] of rotary positions, float32."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def make(cls, positions: int, head_size: int, device: torch.device, base: float = 500_000.0) -> "Rotary":
        wave = base ** (-torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)
        angle = torch.arange(positions, device=device, dtype=torch.float32)[:, None] * wave
        return cls(angle.cos(), angle.sin())


def add_norm(residual: Tensor, update: Tensor | None, weight: Tensor) -> Tensor:
    """residual += update, in place; returns the RMS-normalised residual [rows, hidden] times `weight` [hidden]."""
    if update is not None:
        residual.add_(update)
    wide = residual.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON) * weight.float()).to(residual.dtype)


def rotate_store(qkv: Tensor, segment: Segment, rotary: Rotary, keys: Tensor, values: Tensor) -> Tensor:
    """Rotate queries and keys, write keys and values into the cache; returns the queries [batch, tokens, heads, size].

    `qkv` [batch*tokens, (heads + 2*kv_heads)*size]; `keys`, `values` [cache rows, kv_heads, size].
    """
    kv_heads, size = keys.shape[1:]
    parts = qkv.view(segment.batch, segment.tokens, -1, size)
    positions = segment.positions()
    cos, sin = (table[positions][:, :, None, :] for table in (rotary.cos, rotary.sin))
    first, second = parts[:, :, :-kv_heads].float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(qkv.dtype)
    rows = segment.base[:, None] + positions
    keys[rows] = turned[:, :, -kv_heads:]
    values[rows] = parts[:, :, -kv_heads:]
    return turned[:, :, :-kv_heads].contiguous()


def attend(query: Tensor, segment: Segment, keys: Tensor, values: Tensor) -> Tensor:
    """Each new token attends to all of its request's tokens up to itself; [batch*tokens, heads*size].

    Gathers the cache rows and masks them: PyTorch's attention has no ragged cache.
    """
    longest = segment.longest or int(segment.start.max()) + segment.tokens
    place = torch.arange(longest, device=query.device)
    # rows beyond a request's length are masked; keep them inside the cache
    rows = (segment.base[:, None] + place).clamp_(max=keys.shape[0] - 1)
    visible = place <= segment.positions()[:, :, None]
    gathered = [cache[rows].transpose(1, 2) for cache in (keys, values)]
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), *gathered, attn_mask=visible[:, None], enable_gqa=query.shape[2] != keys.shape[1]
    )
    return out.transpose(1, 2).reshape(segment.batch * segment.tokens, -1)


def gate(both: Tensor) -> Tensor:
    """SwiGLU: silu(first half) * second half of [rows, 2*width]."""
    first, second = both.chunk(2, dim=-1)
    return F.silu(first) * second


@dataclass(frozen=True)
class Ops:
    """Which implementation of each operation a model uses; `names` says so for the tables."""

    add_norm: Callable[[Tensor, Tensor | None, Tensor], Tensor] = add_norm
    rotate_store: Callable[[Tensor, Segment, Rotary, Tensor, Tensor], Tensor] = rotate_store
    attend: Callable[[Tensor, Segment, Tensor, Tensor], Tensor] = attend
    gate: Callable[[Tensor], Tensor] = gate
    grouped: bool = False
    names: dict[str, str] = field(default_factory=lambda: dict.fromkeys(OPERATIONS, "torch"))


OPERATIONS = ("add_norm", "rotate_store", "attend", "gate")
