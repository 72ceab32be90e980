"""A jaxpr made plain: calls inlined, constants folded, equal steps computed once, what no step of a loop changes moved
out of it, what nothing uses dropped.

A :class:`Block` is a straight list of steps over values; loops and branches hold blocks of their own. Only whole
programs of 64-bit floats, integers and booleans are taken; everything is pure, so steps may move.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from diffspec.results import InputError

CALLS = {
    **{name: "jaxpr" for name in ("jit", "pjit", "remat2", "checkpoint")},
    **{name: "call_jaxpr" for name in ("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call")},
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
"""Calls that are inlined, and where each keeps its jaxpr. Rules of differentiation are of no use here."""
SAME = ("stop_gradient", "copy", "copy_p", "optimization_barrier")
RESHAPES = ("reshape", "squeeze", "expand_dims")
LOOPS = ("scan", "while", "cond")
MOST_FOLDED = 4096
"""Largest result [elements] that is computed now rather than in the browser."""


@dataclasses.dataclass(eq=False)
class Value:
    """What a step makes. ``depth``: how many loops and branches its step is in; ``source``: the value whose elements it
    has in another shape."""

    shape: tuple[int, ...]
    kind: str
    depth: int
    source: "Value | None" = None

    @property
    def size(self) -> int:
        """Elements; a value of one element, of whatever shape, is a plain number."""
        return int(np.prod(self.shape, dtype=int))

    @property
    def root(self) -> "Value":
        """The value that is really computed."""
        return self if self.source is None else self.source.root


@dataclasses.dataclass(eq=False)
class Constant:
    """A number or array known now."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        return self.array.shape

    @property
    def size(self) -> int:
        """Elements."""
        return self.array.size

    @property
    def kind(self) -> str:
        """ "b", "i" or "f"."""
        return self.array.dtype.kind

    @property
    def root(self) -> "Constant":
        """Itself."""
        return self


Atom = Value | Constant


@dataclasses.dataclass(eq=False)
class Block:
    """Steps in order, at one ``depth``; ``inputs`` are its own values (the carry and the elements of a loop)."""

    inputs: list[Value]
    steps: "list[Step]"
    outputs: list[Atom]
    depth: int = 0


@dataclasses.dataclass(eq=False)
class Step:
    """One primitive; ``blocks``: those of a loop or branch."""

    name: str
    params: dict[str, Any]
    inputs: list[Atom]
    outputs: list[Value]
    blocks: list[Block] = dataclasses.field(default_factory=list)


class _Scope:
    """The steps that are being collected at one depth; ``loop``: what does not change in it may move out."""

    def __init__(self, parent: "_Scope | None" = None, loop: bool = False):
        self.parent, self.loop = parent, loop
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.steps: list[Step] = []
        self.known: dict[Any, list[Value]] = {}

    def outward(self) -> "Iterator[_Scope]":
        scope: _Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent


def kind_of(dtype) -> str:
    """ "b", "i" or "f"; :class:`InputError` for what JavaScript's numbers do not hold."""
    kind = {"b": "b", "i": "i", "u": "i", "f": "f"}.get(np.dtype(dtype).kind)
    if kind is None or (kind == "f" and np.dtype(dtype).itemsize != 8):
        raise InputError(f"dtype: got {dtype}; allowed: float64, integers and booleans (jax_enable_x64)")
    return kind


def flatten(closed: Any) -> Block:
    """The block of a closed jaxpr.

    Errors: :class:`InputError` for a number that is no 64-bit float, integer or boolean.
    """
    scope, avals = _Scope(), closed.in_avals
    inputs = [Value(tuple(aval.shape), kind_of(aval.dtype), 0) for aval in avals]
    outputs = _inline(closed, inputs, scope)
    block = Block(inputs, scope.steps, outputs)
    prune(block)
    return block


def _inline(closed: Any, inputs: Sequence[Atom], scope: _Scope) -> list[Atom]:
    jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
    known: dict[Any, Atom] = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {var: Constant(np.asarray(value)) for var, value in zip(jaxpr.constvars, consts, strict=True)}

    def read(atom: Any) -> Atom:
        if not isinstance(atom, Literal):
            return known[atom]
        aval: Any = atom.aval
        return Constant(np.asarray(atom.val, dtype=aval.dtype))

    for equation in jaxpr.eqns:
        found = _equation(equation, [read(atom) for atom in equation.invars], scope)
        known |= zip(equation.outvars, found, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _equation(equation: Any, inputs: list[Atom], scope: _Scope) -> Sequence[Atom]:
    name, params = equation.primitive.name, equation.params
    if name in CALLS:
        return _inline(params[CALLS[name]], inputs, scope)
    if name in SAME:
        return inputs
    for var in equation.outvars:
        kind_of(var.aval.dtype)
    made = sum(int(np.prod(var.aval.shape, dtype=int)) for var in equation.outvars)
    if name not in (*LOOPS, "iota") and made <= MOST_FOLDED and all(isinstance(value, Constant) for value in inputs):
        return _fold(equation, inputs)
    if name in RESHAPES or (name == "broadcast_in_dim" and inputs[0].size == np.prod(params["shape"], dtype=int)):
        return [_reshaped(inputs[0], tuple(equation.outvars[0].aval.shape))]
    if (same := _neutral(name, inputs, equation)) is not None:
        return [same]
    blocks: list[Block] = []
    if name in LOOPS:
        inputs, blocks = _control(name, params, inputs, scope)
    return _place(Step(name, params, inputs, [], blocks), [var.aval for var in equation.outvars], scope)


def _fold(equation: Any, inputs: list[Atom]) -> list[Atom]:
    with jax.ensure_compile_time_eval():
        found = equation.primitive.bind(*(value.array for value in inputs), **equation.params)  # type: ignore[union-attr]
    return [Constant(np.asarray(value)) for value in (found if equation.primitive.multiple_results else [found])]


def _reshaped(value: Atom, shape: tuple[int, ...]) -> Atom:
    if isinstance(value, Constant):
        return Constant(value.array.reshape(shape))
    return Value(shape, value.kind, value.depth, value)


def _neutral(name: str, inputs: list[Atom], equation: Any) -> Atom | None:
    """The operand that a step leaves as it is: x*1, 1*x, x/1, x-0, a conversion that changes nothing."""
    shape = tuple(equation.outvars[0].aval.shape) if equation.outvars else ()

    def is_all(value: Atom, number: float) -> bool:
        return isinstance(value, Constant) and value.kind == "f" and bool(np.all(value.array == number))

    kept = None
    to_real = name == "convert_element_type" and kind_of(equation.params["new_dtype"]) == "f"
    if (
        (to_real and inputs[0].kind in "if")
        or (name in ("mul", "div") and is_all(inputs[1], 1.0))
        or (name == "sub" and is_all(inputs[1], 0.0))
    ):
        kept = inputs[0]
    elif name == "mul" and is_all(inputs[0], 1.0):
        kept = inputs[1]
    if not isinstance(kept, Value) or kept.shape != shape:
        return None
    return kept if kept.kind == "f" else Value(shape, "f", kept.depth, kept)


def _place(step: Step, avals: Sequence[Any], scope: _Scope) -> list[Value]:
    """Put a step where it is needed: out of loops that it does not depend on, and nowhere if it is there already."""
    deepest = max([value.depth for value in _outside(step) if isinstance(value, Value)], default=0)
    while scope.loop and scope.parent is not None and deepest < scope.depth:
        scope = scope.parent
    key = None
    if not step.blocks:
        key = (step.name, repr(sorted(step.params.items())), tuple(_key(value) for value in step.inputs))
        for place in scope.outward():
            if key in place.known:
                return place.known[key]
    step.outputs = [Value(tuple(aval.shape), kind_of(aval.dtype), scope.depth) for aval in avals]
    scope.steps.append(step)
    if key is not None:
        scope.known[key] = step.outputs
    return step.outputs


def _key(value: Atom):
    if isinstance(value, Constant):
        return value.shape, value.array.dtype.str, value.array.tobytes()
    return id(value.root), value.shape


def _control(name: str, params: dict[str, Any], inputs: list[Atom], scope: _Scope) -> tuple[list[Atom], list[Block]]:
    """Inputs and blocks of a loop or branch: what is constant in it is bound to the values outside."""
    if name == "cond":
        return inputs[:1], [_inner(branch, [], inputs[1:], scope, loop=False) for branch in params["branches"]]
    if name == "while":
        heads, rest = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        carry = [value for value in inputs[rest:]]
        condition = _inner(params["cond_jaxpr"], carry, inputs[:heads], scope, loop=True)
        return carry, [condition, _inner(params["body_jaxpr"], carry, inputs[heads:rest], scope, loop=True)]
    consts, carried = params["num_consts"], params["num_consts"] + params["num_carry"]
    elements = [Value(value.shape[1:], value.kind, 0) for value in inputs[carried:]]
    fresh = [*inputs[consts:carried], *elements]
    return inputs[consts:], [_inner(params["jaxpr"], fresh, inputs[:consts], scope, loop=True)]


def _inner(closed: Any, fresh: Sequence[Atom], bound: Sequence[Atom], scope: _Scope, *, loop: bool) -> Block:
    """The block of a jaxpr whose first inputs are ``bound`` outside, and whose others are its own."""
    inside = _Scope(scope, loop)
    own = [Value(value.shape, value.kind, inside.depth) for value in fresh]
    outputs = _inline(closed, [*bound, *own], inside)
    return Block(own, inside.steps, outputs, inside.depth)


def _outside(step: Step) -> Iterator[Atom]:
    """Everything that a step and its blocks refer to."""
    yield from step.inputs
    for block in step.blocks:
        yield from references(block)


def references(block: Block) -> Iterator[Atom]:
    """Everything that the steps and outputs of a block refer to, its own values too."""
    for step in block.steps:
        yield from _outside(step)
    yield from block.outputs


def prune(block: Block) -> None:
    """Drop the steps that nothing uses."""
    wanted = {id(value.root) for value in block.outputs}
    kept = []
    for step in reversed(block.steps):
        if any(id(value.root) in wanted for value in step.outputs):
            for inner in step.blocks:
                prune(inner)
            wanted |= {id(value.root) for value in _outside(step)}
            kept.append(step)
    block.steps = kept[::-1]
