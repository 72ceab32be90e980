"""The operations of `ops` as Triton kernels. Importing this module needs triton; nothing else does.

Attention is split over the keys (flash decoding): a few requests with long contexts would otherwise leave most of the
GPU idle. Each program takes one block of (token, head of the group) rows of one request and one KV head, and one share
of that request's keys; a second kernel joins the shares. The lengths are read on the device, so one captured graph
serves every context. `TRITON_INTERPRET=1` runs all of this on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ops import EPSILON, Rotary, Segment

BLOCK_KEYS = 64
FEW_ROWS, MANY_ROWS = 16, 64  # rows of a block of queries: few variants, since compiling each takes a second
PROGRAMS = 528  # four for each multiprocessor of an H100 or H200
MOST_SPLITS = 64  # a power of two
LOG2_E = 1.4426950408889634


@triton.jit
def _add_norm(residual, update, weight, out, width, eps, HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    live = column < width
    wide = tl.load(residual + row + column, mask=live, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        wide += tl.load(update + row + column, mask=live, other=0.0).to(tl.float32)
        value = wide.to(residual.dtype.element_ty)
        tl.store(residual + row + column, value, mask=live)
        wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    factor = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row + column, (wide * scale * factor).to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["tokens"])
def _rotate_store(
    qkv, base, start, cos, sin, query, keys, values, tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1)
    request = row // tokens
    position = tl.load(start + request) + row % tokens
    slot = tl.load(base + request) + position
    half = tl.arange(0, SIZE // 2)
    source = qkv + (row.to(tl.int64) * (HEADS + 2 * KV_HEADS) + head) * SIZE + half
    first = tl.load(source)
    second = tl.load(source + SIZE // 2)
    if head < HEADS + KV_HEADS:
        c = tl.load(cos + position * (SIZE // 2) + half)
        s = tl.load(sin + position * (SIZE // 2) + half)
        x = first.to(tl.float32)
        y = second.to(tl.float32)
        first = (x * c - y * s).to(qkv.dtype.element_ty)
        second = (y * c + x * s).to(qkv.dtype.element_ty)
    if head < HEADS:
        target = query + (row.to(tl.int64) * HEADS + head) * SIZE + half
        tl.store(target, first)
        tl.store(target + SIZE // 2, second)
    elif head < HEADS + KV_HEADS:
        target = keys + (slot * KV_HEADS + head - HEADS) * SIZE + half
        tl.store(target, first)
        tl.store(target + SIZE // 2, second)
    else:
        target = values + (slot * KV_HEADS + head - HEADS - KV_HEADS) * SIZE + half
        tl.store(target, first)
        tl.store(target + SIZE // 2, second)


@triton.jit(do_not_specialize=["tokens", "splits"])
def _attend(
    query, keys, values, base, start, out, part, weight, tokens, splits, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    block = tl.program_id(0)
    request = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    split = tl.program_id(2)
    rows = block * ROWS + tl.arange(0, ROWS)
    token = rows // GROUP
    live = token < tokens
    known = tl.load(start + request)
    first_row = tl.load(base + request)
    column = tl.arange(0, SIZE)
    place = (request * tokens + token).to(tl.int64) * HEADS + kv_head * GROUP + rows % GROUP
    q = tl.load(query + place[:, None] * SIZE + column[None, :], mask=live[:, None], other=0.0)
    # this split's share of the keys, and none that the block's last token cannot see
    length = known + tokens
    share = (length + splits * KEYS - 1) // (splits * KEYS) * KEYS
    last = tl.minimum((block * ROWS + ROWS - 1) // GROUP, tokens - 1)
    low = split * share
    high = tl.minimum(low + share, known + last + 1)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, SIZE], tl.float32)
    for at in range(low, high, KEYS):
        key = at + tl.arange(0, KEYS)
        inside = key < high
        row = ((first_row + key) * KV_HEADS + kv_head) * SIZE
        k = tl.load(keys + row[None, :] + column[:, None], mask=inside[None, :], other=0.0)
        score = tl.dot(q, k) * scale
        seen = inside[None, :] & (key[None, :] <= known + token[:, None])
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        chance = tl.exp2(score - safe[:, None])
        fade = tl.exp2(top - safe)
        v = tl.load(values + row[:, None] + column[None, :], mask=inside[:, None], other=0.0)
        sums = sums * fade[:, None] + tl.dot(chance.to(v.dtype), v)
        total = total * fade + tl.sum(chance, axis=1)
        top = higher
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    if SPLIT:
        share_of_row = place * splits + split
        tl.store(part + share_of_row[:, None] * SIZE + column[None, :], result, mask=live[:, None])
        # a share without keys has weight zero: its logarithm is -inf
        log = tl.where(total == 0.0, float("-inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total)))
        tl.store(weight + share_of_row, log, mask=live)
    else:
        tl.store(out + place[:, None] * SIZE + column[None, :], result.to(out.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["splits"])
def _join(part, weight, out, splits, SIZE: tl.constexpr, MOST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, MOST)
    column = tl.arange(0, SIZE)
    there = split < splits
    log = tl.load(weight + row * splits + split, mask=there, other=float("-inf"))
    share = tl.exp2(log - tl.max(log, axis=0))
    place = (row * splits + split)[:, None] * SIZE + column[None, :]
    parts = tl.load(part + place, mask=there[:, None], other=0.0)
    mean = tl.sum(parts * share[:, None], axis=0) / tl.sum(share, axis=0)
    tl.store(out + row * SIZE + column, mean.to(out.dtype.element_ty))


@triton.jit
def _gate(both, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < width
    first = tl.load(both + row * 2 * width + column, mask=live, other=0.0).to(tl.float32)
    second = tl.load(both + row * 2 * width + width + column, mask=live, other=0.0).to(tl.float32)
    value = first / (1.0 + tl.exp(-first)) * second
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=live)


def add_norm(residual: Tensor, update: Tensor | None, weight: Tensor) -> Tensor:
    """As `ops.add_norm`."""
    out = torch.empty_like(residual)
    rows, width = residual.shape
    block = triton.next_power_of_2(width)
    given = residual if update is None else update
    _add_norm[(rows,)](
        residual, given, weight, out, width, EPSILON, HAS_UPDATE=update is not None, BLOCK=block, num_warps=8
    )
    return out


def rotate_store(qkv: Tensor, segment: Segment, rotary: Rotary, keys: Tensor, values: Tensor) -> Tensor:
    """As `ops.rotate_store`."""
    kv_heads, size = keys.shape[1:]
    heads = qkv.shape[1] // size - 2 * kv_heads
    query = torch.empty(segment.batch, segment.tokens, heads, size, dtype=qkv.dtype, device=qkv.device)
    _rotate_store[(qkv.shape[0], heads + 2 * kv_heads)](
        qkv, segment.base, segment.start, rotary.cos, rotary.sin, query, keys, values, segment.tokens,
        HEADS=heads, KV_HEADS=kv_heads, SIZE=size, num_warps=1,
    )  # fmt: skip
    return query


def attend(query: Tensor, segment: Segment, keys: Tensor, values: Tensor, splits: int | None = None) -> Tensor:
    """As `ops.attend`; `splits`, at most `MOST_SPLITS`, is chosen to fill the GPU unless given."""
    batch, tokens, heads, size = query.shape
    kv_heads = keys.shape[1]
    rows = FEW_ROWS if tokens * heads // kv_heads <= FEW_ROWS else MANY_ROWS
    blocks = triton.cdiv(tokens * heads // kv_heads, rows)
    if splits is None:
        splits = min(MOST_SPLITS, triton.cdiv(PROGRAMS, blocks * batch * kv_heads))
    out = torch.empty_like(query)
    shape = (batch * tokens * heads, splits) if splits > 1 else (1, 1)
    part = torch.empty(*shape, size, dtype=torch.float32, device=query.device)
    weight = torch.empty(*shape, dtype=torch.float32, device=query.device)
    _attend[(blocks, batch * kv_heads, splits)](
        query, keys, values, segment.base, segment.start, out, part, weight, tokens, splits, size**-0.5 * LOG2_E,
        HEADS=heads, KV_HEADS=kv_heads, SIZE=size, ROWS=rows, KEYS=BLOCK_KEYS, SPLIT=splits > 1,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _join[(batch * tokens * heads,)](part, weight, out, splits, SIZE=size, MOST=MOST_SPLITS, num_warps=2)
    return out.view(batch * tokens, heads * size)


def gate(both: Tensor) -> Tensor:
    """As `ops.gate`."""
    rows, width = both.shape[0], both.shape[1] // 2
    out = torch.empty(rows, width, dtype=both.dtype, device=both.device)
    _gate[(rows, triton.cdiv(width, 1024))](both, out, width, BLOCK=1024, num_warps=4)
    return out
