"""Primitives that are no loop over equal elements: reductions, running sums, products of arrays, gathers.

Each writer has the emitter (:class:`diffspec.browser.emit.Emitter`) and the step; operands are complete flat arrays.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffspec.browser.affine import flat_index, strides_of
from diffspec.browser.blocks import Step
from diffspec.results import InputError

REDUCTIONS = {
    "sum": ("0", "{s}+{x}"),
    "prod": ("1", "{s}*{x}"),
    "max": ("-Infinity", "Math.max({s},{x})"),
    "min": ("Infinity", "Math.min({s},{x})"),
    "and": ("true", "{s}&&{x}"),
    "or": ("false", "{s}||{x}"),
    "logsumexp": ("-Infinity", "Math.max({s},{x})+Math.log1p(Math.exp(-Math.abs({s}-{x})))"),
}
"""Neutral element, and a step of the running value s by an element x."""


def _picked(shape: Sequence[int], dims: Sequence[int]) -> tuple[list[int], list[int], int]:
    """Dimensions, steps and size of some dimensions of a row-major array."""
    steps = strides_of(shape)
    chosen = [shape[dim] for dim in dims]
    return chosen, [steps[dim] for dim in dims], int(np.prod(chosen, dtype=int))


def _along(step: Step, axes: Sequence[int]) -> tuple[str, str, int, int]:
    """Where rows along ``axes`` start (by o) and go on (by r), how many they are and how long."""
    shape = step.inputs[0].shape
    rest = [dim for dim in range(len(shape)) if dim not in axes]
    outer, outer_steps, many = _picked(shape, rest)
    inner, inner_steps, long = _picked(shape, axes)
    return flat_index("o", outer, outer_steps), flat_index("r", inner, inner_steps), many, long


def _reduce(emitter: Any, step: Step) -> None:
    start, update = REDUCTIONS[step.name.removeprefix("reduce_")]
    source, value = emitter.operand(step.inputs[0]), step.outputs[0]
    first, following, many, long = _along(step, [int(axis) for axis in step.params["axes"]])
    single = step.inputs[0].size == 1
    if many == 1:
        running = emitter.fresh()
        emitter.line(f"let {running}={start};")
        element = source if single else f"{source}[{following}]"
        emitter.line(f"for(let r=0;r<{long};r++){running}={update.format(s=running, x=element)};")
        emitter.code[id(value)] = running
        return
    target = emitter.array(value)
    emitter.line(f"for(let o=0;o<{many};o++){{let s={start};const b={first};")
    emitter.line(f"for(let r=0;r<{long};r++)s={update.format(s='s', x=f'{source}[b+{following}]')};")
    emitter.line(f"{target}[o]=s;}}")


def _argument(emitter: Any, step: Step) -> None:
    source, value = emitter.operand(step.inputs[0]), step.outputs[0]
    if step.inputs[0].size == 1:
        emitter.define(value, "0")
        return
    first, following, many, long = _along(step, [int(axis) for axis in step.params["axes"]])
    better = ">" if step.name == "argmax" else "<"
    target = emitter.array(value) if value.size > 1 else emitter.fresh()
    if value.size == 1:
        emitter.line(f"let {target};")
        emitter.code[id(value)] = target
    emitter.line(f"for(let o=0;o<{many};o++){{let w=0;const b={first};let m={source}[b];")
    emitter.line(f"for(let r=1;r<{long};r++){{const x={source}[b+{following}];")
    emitter.line(f"if(x{better}m||(x!==x&&m===m)){{m=x;w=r;}}}}")
    emitter.line(f"{target}[o]=w;}}" if value.size > 1 else f"{target}=w;}}")


def _cumulative(emitter: Any, step: Step) -> None:
    start, update = REDUCTIONS[step.name.removeprefix("cum")]
    source, value = emitter.operand(step.inputs[0]), step.outputs[0]
    if value.size == 1:
        emitter.code[id(value)] = source
        return
    first, following, many, long = _along(step, [step.params["axis"]])
    target = emitter.array(value)
    head = f"let r={long - 1};r>=0;r--" if step.params["reverse"] else f"let r=0;r<{long};r++"
    emitter.line(f"for(let o=0;o<{many};o++){{let s={start};const b={first};")
    emitter.line(f"for({head}){{const p=b+{following};s={update.format(s='s', x=f'{source}[p]')};{target}[p]=s;}}}}")


def _concatenate(emitter: Any, step: Step) -> None:
    """Operands side by side along a dimension, or (stack) along a new one."""
    value, stacked = step.outputs[0], step.name == "stack"
    axis = step.params["axis" if stacked else "dimension"]
    if value.size == 1:
        emitter.code[id(value)] = emitter.operand(next(atom for atom in step.inputs if atom.size))
        return
    target, at = emitter.array(value), 0
    steps = strides_of(value.shape)
    for atom in step.inputs:
        source = emitter.operand(atom)
        own = [step for dim, step in enumerate(steps) if not stacked or dim != axis]
        if atom.size == 1:
            emitter.line(f"{target}[{at * steps[axis]}]={source};")
        elif atom.size:
            place = flat_index("i", atom.shape, own, at * steps[axis])
            emitter.line(f"for(let i=0;i<{atom.size};i++){target}[{place}]={source}[i];")
        at += 1 if stacked else atom.shape[axis]


def _product(emitter: Any, step: Step) -> None:
    """dot_general: the result has the batch dimensions, then the free ones of the left, then those of the right."""
    left, right = step.inputs
    (sum_left, sum_right), (batch_left, batch_right) = step.params["dimension_numbers"]
    value = step.outputs[0]
    steps_left, steps_right = strides_of(left.shape), strides_of(right.shape)
    free_left = [dim for dim in range(len(left.shape)) if dim not in (*sum_left, *batch_left)]
    free_right = [dim for dim in range(len(right.shape)) if dim not in (*sum_right, *batch_right)]
    zeros_left, zeros_right = [0] * len(free_left), [0] * len(free_right)
    by_left = [steps_left[d] for d in (*batch_left, *free_left)] + zeros_right
    by_right = [steps_right[d] for d in batch_right] + zeros_left + [steps_right[d] for d in free_right]
    summed, inner_left, long = _picked(left.shape, list(sum_left))
    inner_right = [steps_right[dim] for dim in sum_right]
    names = [emitter.operand(atom) for atom in step.inputs]

    def element(name: str, atom: Any, base: str, inner: list[int]) -> str:
        return name if atom.size == 1 else f"{name}[{base}+{flat_index('r', summed, inner)}]"

    target = emitter.array(value) if value.size > 1 else emitter.fresh()
    if value.size == 1:
        emitter.line(f"let {target};")
        emitter.code[id(value)] = target
    emitter.line(
        f"for(let o=0;o<{value.size};o++){{let s=0;const a={flat_index('o', value.shape, by_left)},"
        f"b={flat_index('o', value.shape, by_right)};"
    )
    both = f"{element(names[0], left, 'a', inner_left)}*{element(names[1], right, 'b', inner_right)}"
    emitter.line(f"for(let r=0;r<{long};r++)s+={both};")
    emitter.line(f"{target}[o]=s;}}" if value.size > 1 else f"{target}=s;}}")


def _numbers(values: Any) -> str:
    return f"[{','.join(str(int(value)) for value in values)}]"


def _called(emitter: Any, step: Step, call: str) -> None:
    """The result of a function of the runtime, which returns an array."""
    value = step.outputs[0]
    emitter.define(value, f"{call}[0]" if value.size == 1 else call)


def _as_array(emitter: Any, atom: Any) -> str:
    name = emitter.operand(atom)
    return f"[{name}]" if atom.size == 1 else name


def _gather(emitter: Any, step: Step) -> None:
    source, starts = step.inputs
    numbers, value = step.params["dimension_numbers"], step.outputs[0]
    if numbers.operand_batching_dims:
        raise InputError("primitive: got 'gather' with batching dimensions; allowed in a browser: without")
    batch = [dim for dim in range(len(value.shape)) if dim not in numbers.offset_dims]
    kept = [dim for dim in range(len(source.shape)) if dim not in numbers.collapsed_slice_dims]
    parts = (
        *(_as_array(emitter, source), _numbers(source.shape), emitter.operand(starts), _numbers(starts.shape[:-1])),
        *(str(starts.shape[-1]), _numbers(numbers.start_index_map), _numbers(step.params["slice_sizes"])),
        *(_numbers(kept), _numbers(numbers.offset_dims), _numbers(batch), _numbers(value.shape)),
        "true" if "FILL" in str(step.params["mode"]) else "false",
    )
    _called(emitter, step, f"gather({','.join(parts)})")


def _dynamic_slice(emitter: Any, step: Step) -> None:
    source, *corner = step.inputs
    where = ",".join(emitter.operand(atom) for atom in corner)
    sizes = _numbers(step.params["slice_sizes"])
    _called(emitter, step, f"dynamicSlice({_as_array(emitter, source)},{_numbers(source.shape)},[{where}],{sizes})")


def _dynamic_update_slice(emitter: Any, step: Step) -> None:
    source, update, *corner = step.inputs
    where = ",".join(emitter.operand(atom) for atom in corner)
    shapes = f"{_numbers(source.shape)},[{where}],{_numbers(update.shape)}"
    _called(emitter, step, f"dynamicSlice({_as_array(emitter, source)},{shapes},{emitter.operand(update)})")


SHAPED: dict[str, Callable[[Any, Step], None]] = {
    **{f"reduce_{name}": _reduce for name in ("sum", "prod", "max", "min", "and", "or")},
    **{f"cum{name}": _cumulative for name in ("sum", "prod", "max", "min", "logsumexp")},
    **{name: _argument for name in ("argmax", "argmin")},
    **{name: _concatenate for name in ("concatenate", "stack")},
    "dot_general": _product,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
}
"""Writers by primitive."""
