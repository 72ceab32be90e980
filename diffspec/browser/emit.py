"""Blocks written as JavaScript: numbers as constants, arrays as flat typed arrays, loops as loops.

Elementwise steps over arrays of one size share one loop, and what only they use is never stored; slices, transposes and
broadcasts are read in place. A number that one expression alone uses is written into it.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffspec.browser.affine import flat_index, strides_of, view_of
from diffspec.browser.blocks import LOOPS, Atom, Block, Constant, Step, Value, references
from diffspec.browser.elementwise import ELEMENTWISE, expression
from diffspec.browser.shaped import SHAPED
from diffspec.results import InputError

VIEWS = ("broadcast_in_dim", "slice", "transpose", "rev")
NAMED = 2
"""Uses that one reader counts for which needs a name, not an expression."""
LONGEST = 120
"""Longest expression [characters] that is written into another one."""
_ATOM = re.compile(r"^[\w.$]+$|^[\w.$]+\[[\w+*]+\]$|^Math\.\w+\([^()]*\)$|^\([^()]*\)$")


def wrapped(text: str) -> str:
    """An expression as an operand."""
    return text if _ATOM.match(text) else f"({text})"


def number(value: Any) -> str:
    """A number as JavaScript reads it back exactly.

    >>> number(np.float64(0.1)), number(np.inf), number(np.bool_(True)), number(-2)
    ('0.1', 'Infinity', 'true', '(-2)')
    """
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    value = float(value)
    if not np.isfinite(value):
        return "NaN" if np.isnan(value) else "Infinity" if value > 0 else "(-Infinity)"
    text = repr(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
    text = "0" if text == "-0" else text
    return f"({text})" if text.startswith("-") or (np.signbit(value) and value == 0) else text


class Fused:
    """An open loop over ``size`` elements: its statements, what its members' elements are called in it, and how often
    they are read in it."""

    def __init__(self, size: int):
        self.size = size
        self.lines: list[tuple[Value, str]] = []
        self.elements: dict[int, str] = {}
        self.reads: Counter[int] = Counter()


class Emitter:
    """JavaScript of one function, line by line; ``constants``: arrays that stand outside of it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: dict[bytes, tuple[str, str]] = {}
        self.code: dict[int, str] = {}
        self.fused: Fused | None = None
        self.uses: Counter[int] = Counter()
        self.count = 0

    # --- names and operands -------------------------------------------------------------------------------------------

    def fresh(self) -> str:
        """A name that is not taken."""
        self.count += 1
        return f"v{self.count}"

    def line(self, text: str) -> None:
        """One more statement, before the loop that is open."""
        self.lines.append(text)

    def operand(self, atom: Atom) -> str:
        """A scalar, or the name of an array that is complete."""
        root = atom.root
        if isinstance(root, Constant):
            return number(root.array.reshape(-1)[0]) if root.size == 1 else self.constant(root.array)
        if self.fused is not None and id(root) in self.fused.elements:
            self.close()
        return self.code[id(root)]

    def constant(self, array: np.ndarray) -> str:
        """The name of an array of constants."""
        key = array.dtype.str.encode() + array.tobytes()
        if key not in self.constants:
            kind = "Uint8Array" if array.dtype.kind == "b" else "Float64Array"
            values = ",".join(number(value).strip("()") for value in array.reshape(-1).astype(float))
            self.constants[key] = (f"c{len(self.constants)}", f"{kind}.of({values})")
        return self.constants[key][0]

    def element(self, atom: Atom, index: str = "i") -> str:
        """Element ``index`` of an operand of a fused loop; the number itself of a scalar."""
        root = atom.root
        if isinstance(root, Constant):
            if np.all(root.array == root.array.reshape(-1)[0]):
                return number(root.array.reshape(-1)[0])
            return f"{self.constant(root.array)}[{index}]"
        if self.fused is not None and index == "i" and id(root) in self.fused.elements:
            self.fused.reads[id(root)] += 1
            return self.fused.elements[id(root)]
        name = self.operand(root)
        return name if root.size == 1 else f"{name}[{index}]"

    # --- blocks -------------------------------------------------------------------------------------------------------

    def block(self, block: Block) -> list[str]:
        """Write the steps of a block; the expressions of its outputs."""
        self.count_uses(block)
        for step in block.steps:
            self.step(step)
        self.close()
        return [self.operand(value) for value in block.outputs]

    def count_uses(self, block: Block) -> None:
        """How often each value is read; what loops, arrays or outputs read counts as NAMED, for it needs a name."""
        for step in block.steps:
            named = bool(step.blocks) or not self.is_elementwise(step) or step.outputs[0].size != 1
            for value in step.inputs:
                self.uses[id(value.root)] += NAMED if named else 1
            for inner in step.blocks:
                for value in references(inner):
                    if isinstance(value, Value) and value.depth <= block.depth:
                        self.uses[id(value.root)] += NAMED
        for value in block.outputs:
            self.uses[id(value.root)] += NAMED

    @staticmethod
    def is_elementwise(step: Step) -> bool:
        """Whether a fused loop can hold a step."""
        return step.name in ELEMENTWISE or step.name in VIEWS or step.name == "iota"

    def step(self, step: Step) -> None:
        """Write one step."""
        if step.name in LOOPS:
            self.close()
            getattr(self, f"_{step.name}")(step)
        elif self.is_elementwise(step):
            self._fuse(step) if step.outputs[0].size != 1 else self._scalar(step)
        elif step.name in SHAPED:
            SHAPED[step.name](self, step)
        else:
            known = sorted({*ELEMENTWISE, *VIEWS, *LOOPS, *SHAPED, "iota"})
            raise InputError(f"primitive: got {step.name!r}; allowed in a browser: {', '.join(known)}")

    def define(self, value: Value, text: str) -> None:
        """Give a value its name."""
        name = self.fresh()
        self.line(f"const {name}={text};")
        self.code[id(value)] = name

    def array(self, value: Value) -> str:
        """A new empty array for a value."""
        name = self.fresh()
        kind = "Uint8Array" if value.kind == "b" else "Float64Array"
        self.line(f"const {name}=new {kind}({value.size});")
        self.code[id(value)] = name
        return name

    def _scalar(self, step: Step) -> None:
        value = step.outputs[0]
        if step.name == "iota":
            text = "0"
        elif step.name in VIEWS:
            text = self._read(step, "0")
        else:
            operands = [wrapped(self.operand(atom)) for atom in step.inputs]
            text = expression(step.name, operands, step.params, [atom.kind for atom in step.inputs])
        if self.uses[id(value)] == 1 and len(text) <= LONGEST:
            self.code[id(value)] = text
        else:
            self.define(value, text)

    def _read(self, step: Step, index: str) -> str:
        """The element of a slice, transpose or broadcast, read where it lies."""
        operand = step.inputs[0]
        if operand.size == 1:
            return self.element(operand)
        offset, steps = view_of(step.name, operand.shape, step.outputs[0].shape, step.params)
        return self.element(operand, flat_index(index, step.outputs[0].shape, steps, offset))

    # --- loops over elements ------------------------------------------------------------------------------------------

    def _fuse(self, step: Step) -> None:
        value = step.outputs[0]
        for atom in step.inputs:
            if step.name in VIEWS or atom.size != value.size:  # not read element by element: it must be complete
                self.operand(atom)
        if self.fused is not None and self.fused.size != value.size:
            self.close()
        self.fused = self.fused or Fused(value.size)
        if step.name == "iota":
            steps = [int(dim == step.params["dimension"]) for dim in range(len(value.shape))]
            text = flat_index("i", value.shape, steps, 0)
        elif step.name in VIEWS:
            text = self._read(step, "i")
        else:
            operands = [wrapped(self._broadcast(atom, value)) for atom in step.inputs]
            text = expression(step.name, operands, step.params, [atom.kind for atom in step.inputs])
        single = self.uses[id(value)] == NAMED and len(text) <= LONGEST
        name = text if single or _ATOM.match(text) else self.fresh()
        self.fused.lines.append((value, "" if name == text else f"const {name}={text};"))
        self.fused.elements[id(value)] = name

    def _broadcast(self, atom: Atom, value: Value) -> str:
        """The element of an operand whose dimensions are those of the result, or 1."""
        if atom.size in (1, value.size):
            return self.element(atom)
        steps = [step if dim > 1 else 0 for dim, step in zip(atom.shape, strides_of(atom.shape), strict=True)]
        return self.element(atom, flat_index("i", value.shape, steps))

    def close(self) -> None:
        """Write the loop that is open: its statements, and stores of what others read."""
        fused, self.fused = self.fused, None
        if fused is None:
            return
        body = []
        for value, text in fused.lines:
            body += [text] if text else []
            if self.uses[id(value)] > NAMED * fused.reads[id(value)]:
                body.append(f"{self.array(value)}[i]={fused.elements[id(value)]};")
        self.lines += [f"for(let i=0;i<{fused.size};i++){{", *body, "}"]

    # --- loops and branches -------------------------------------------------------------------------------------------

    def _carry(self, starts: Sequence[Atom], *inside: Sequence[Value]) -> list[str]:
        """Variables for what a loop carries, known to its blocks by their own inputs."""
        names = []
        for start, *own in zip(starts, *inside, strict=True):
            names.append(self.fresh())
            self.line(f"let {names[-1]}={self.operand(start)};")
            for value in own:
                self.code[id(value)] = names[-1]
        return names

    def _move(self, names: Sequence[str], values: Sequence[str]) -> None:
        moves = [(name, value) for name, value in zip(names, values, strict=True) if name != value]
        if len(moves) == 1:
            self.line(f"{moves[0][0]}={moves[0][1]};")
            return
        held = [self.fresh() for _ in moves]
        for name, (_, value) in zip(held, moves, strict=True):
            self.line(f"const {name}={value};")
        self.lines += [f"{name}={temporary};" for (name, _), temporary in zip(moves, held, strict=True)]

    def _scan(self, step: Step) -> None:
        block, carried, length = step.blocks[0], step.params["num_carry"], step.params["length"]
        names = self._carry(step.inputs[:carried], block.inputs[:carried])
        lists = [self.operand(atom) for atom in step.inputs[carried:]]
        made = []
        for value in step.outputs[carried:]:
            if value.size == 1:
                made.append(self.fresh())
                self.line(f"let {made[-1]};")
                self.code[id(value)] = made[-1]
            else:
                made.append(self.array(value))
        t = self.fresh()
        backward = step.params["reverse"]
        head = f"let {t}={length - 1};{t}>=0;{t}--" if backward else f"let {t}=0;{t}<{length};{t}++"
        self.line(f"for({head}){{")
        for value, atom, name in zip(block.inputs[carried:], step.inputs[carried:], lists, strict=True):
            part = f"{name}[{t}]" if value.size == 1 else f"{name}.subarray({t}*{value.size},({t}+1)*{value.size})"
            self.code[id(value)] = name if atom.size == value.size else part
        outputs = self.block(block)
        for value, atom, name, text in zip(
            step.outputs[carried:], block.outputs[carried:], made, outputs[carried:], strict=True
        ):
            if value.size == atom.size:
                self.line(f"{name}={text};" if value.size == 1 else f"{name}.set({text});")
            else:
                self.line(f"{name}[{t}]={text};" if atom.size == 1 else f"{name}.set({text},{t}*{atom.size});")
        self._move(names, outputs[:carried])
        self.line("}")
        self.code |= {id(value): name for value, name in zip(step.outputs[:carried], names, strict=True)}

    def _while(self, step: Step) -> None:
        condition, body = step.blocks
        names = self._carry(step.inputs, condition.inputs, body.inputs)
        self.line("while(true){")
        self.line(f"if(!({self.block(condition)[0]}))break;")
        self._move(names, self.block(body))
        self.line("}")
        self.code |= {id(value): name for value, name in zip(step.outputs, names, strict=True)}

    def _cond(self, step: Step) -> None:
        index = self.operand(step.inputs[0])
        names = [self.fresh() for _ in step.outputs]
        if names:
            self.line(f"let {','.join(names)};")
        for place, block in enumerate(step.blocks):
            last = place == len(step.blocks) - 1
            self.line(("}else " if place else "") + ("{" if last else f"if({wrapped(index)}<{place + 1}){{"))
            self.lines += [f"{name}={text};" for name, text in zip(names, self.block(block), strict=True)]
        self.line("}")
        self.code |= {id(value): name for value, name in zip(step.outputs, names, strict=True)}
