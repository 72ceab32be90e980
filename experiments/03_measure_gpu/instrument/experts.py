"""A mixture-of-experts block: routing, and the experts' products as one grouped product or as a plain loop."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def route(logits: Tensor, experts_per_token: int, imposed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Experts [tokens, experts_per_token] of each token and their weights, a softmax over the chosen.

    The experts with the largest logits, or those `imposed`.
    """
    if imposed is None:
        chosen, ids = logits.topk(experts_per_token, dim=-1)
    else:
        chosen, ids = logits.gather(1, imposed), imposed
    return ids, F.softmax(chosen.float(), dim=-1).to(logits.dtype)


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows x[ends[e-1]:ends[e]] times weight[e] transposed; `weight` [experts, out, in], `ends` int32 [experts]."""
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return product(x, weight.transpose(-2, -1), offs=ends)


def experts_grouped(
    x: Tensor, ids: Tensor, weights: Tensor, inward: Tensor, outward: Tensor, gate: Callable[[Tensor], Tensor]
) -> Tensor:
    """Sum over each token's experts of weight * outward @ gate(inward @ x): tokens sorted by expert, two grouped
    products, no count ever read back, so a CUDA graph can hold it."""
    tokens, each = ids.shape
    sorted_ids, order = ids.flatten().to(torch.int16).sort()  # few bits sort faster
    experts = torch.arange(inward.shape[0], device=x.device, dtype=torch.int16)
    ends = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
    hidden = gate(grouped_product(x[order // each], inward, ends))
    result = grouped_product(hidden, outward, ends)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=x.device)
    return torch.bmm(weights[:, None, :], result[back].view(tokens, each, -1)).squeeze(1)


def experts_loop(
    x: Tensor, ids: Tensor, weights: Tensor, inward: Tensor, outward: Tensor, gate: Callable[[Tensor], Tensor]
) -> Tensor:
    """The same, one expert after another: plainly right, but it reads back which experts are hit: no graph holds it."""
    result = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, rank = (ids == expert).nonzero(as_tuple=True)
        out = F.linear(gate(F.linear(x[token], inward[expert])), outward[expert])
        result.index_add_(0, token, out * weights[token, rank, None])
    return result


def popularity(experts: int, skew: float) -> Tensor:
    """Zipf-like shares r^-skew of ranks r = 1..experts, summing to one."""
    share = torch.arange(1, experts + 1, dtype=torch.float32) ** -skew
    return share / share.sum()


def draw_experts(tokens: int, experts_per_token: int, share: Tensor, generator: torch.Generator) -> Tensor:
    """Distinct experts [tokens, experts_per_token] drawn one after another in proportion to `share` (Gumbel top-k)."""
    uniform = torch.rand(tokens, len(share), device=share.device, generator=generator)
    return (share.log() - (-uniform.clamp_min(1e-12).log()).log()).topk(experts_per_token, dim=-1).indices


def expected_coverage(hit_probability: Tensor, tokens: int) -> float:
    """Mean over experts of 1-(1-p_e)^T, with p_e the probability that a token is routed to expert e."""
    return float((1.0 - (1.0 - hit_probability) ** tokens).mean())
