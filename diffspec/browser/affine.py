"""Where an element of one array lies in another: offset + sum of step*index over dimensions, as JavaScript."""

from collections.abc import Sequence
from typing import Any


def strides_of(shape: Sequence[int]) -> list[int]:
    """Steps [elements] of a row-major array from one index to the next.

    >>> strides_of((2, 3, 4))
    [12, 4, 1]
    """
    steps, step = [], 1
    for dim in reversed(shape):
        steps.append(step)
        step *= dim
    return steps[::-1]


def view_of(name: str, shape: Sequence[int], out: Sequence[int], params: dict[str, Any]) -> tuple[int, list[int]]:
    """Offset and steps by which the elements of a broadcast, slice, transpose or reversal, of shape ``out``, are read
    from its operand of ``shape``.

    >>> view_of("transpose", (2, 3), (3, 2), {"permutation": (1, 0)})
    (0, [1, 3])
    """
    own = strides_of(shape)
    if name == "broadcast_in_dim":
        steps = [0] * len(out)
        for dim, target in enumerate(params["broadcast_dimensions"]):
            steps[target] = own[dim] if shape[dim] > 1 else 0
        return 0, steps
    if name == "transpose":
        return 0, [own[dim] for dim in params["permutation"]]
    if name == "rev":
        turned = params["dimensions"]
        offset = sum((shape[dim] - 1) * own[dim] for dim in turned)
        return offset, [-step if dim in turned else step for dim, step in enumerate(own)]
    stride = params["strides"] or (1,) * len(shape)
    offset = sum(start * step for start, step in zip(params["start_indices"], own, strict=True))
    return offset, [step * by for step, by in zip(own, stride, strict=True)]


def flat_index(index: str, shape: Sequence[int], steps: Sequence[int], offset: int | str = 0) -> str:
    """offset + sum of steps[d]*index_d, where index_d are the indices of the flat ``index`` into ``shape``.

    >>> flat_index("i", (2, 3), (1, 2)), flat_index("i", (6,), (1,), 4), flat_index("0", (6,), (1,), 4)
    ('(i/3|0)+2*(i%3)', 'i+4', '4')
    """
    inner, terms = strides_of(shape), []
    merged: list[list[int]] = []  # [dimension, inner stride, step], neighbours that lie like one dimension joined
    for dim, stride, step in zip(shape, inner, steps, strict=True):
        if dim == 1:
            continue
        if merged and merged[-1][2] == step * dim:
            merged[-1] = [merged[-1][0] * dim, stride, step]
        else:
            merged.append([dim, stride, step])
    for place, (dim, stride, step) in enumerate(merged):
        if step == 0 or index == "0":
            continue
        part = f"({index}/{stride}|0)" if stride > 1 else index
        part = part if place == 0 else f"({part}%{dim})"
        terms.append(part if step == 1 else f"{step}*{part}")
    if offset not in (0, "0") or not terms:
        terms.append(str(offset))
    return "+".join(terms).replace("+-", "-")
