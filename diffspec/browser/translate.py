"""A JAX function as JavaScript: its jaxpr, translated (ours)."""

import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import jax

from diffspec.browser.blocks import flatten
from diffspec.browser.emit import Emitter


def translate(name: str, function: Callable, *arguments: Any) -> str:
    """JavaScript text of ``function name(a0, a1, ...)``: what ``function`` computes of arguments of these shapes.

    A value of one element is a number (or boolean), any other a flat row-major Float64Array (booleans: Uint8Array); it
    returns the list of the results' leaves, in order. What the function closes over becomes constants. Arithmetic is
    that of 64-bit floats in the same order, sums aside, so results differ from JAX's by rounding; whole numbers are
    exact to 2^53 and do not wrap. Helpers that it calls are those of :func:`runtime`.

    Errors: :class:`InputError` for a primitive that is not translated, by its name, and for 32-bit floats.

    >>> print(translate("double", lambda x: 2.0 * x + 1.0, 3.0))
    function double(a0){
    const v1=(2*a0)+1;
    return [v1];
    }
    """
    closed = jax.make_jaxpr(function)(*arguments)
    block, emitter = flatten(closed), Emitter()
    names = [f"a{index}" for index in range(len(block.inputs))]
    emitter.code |= {id(value): given for value, given in zip(block.inputs, names, strict=True)}
    results = emitter.block(block)
    lines = [f"function {name}({','.join(names)}){{", *emitter.lines, f"return [{','.join(results)}];", "}"]
    if not emitter.constants:
        return "\n".join(lines)
    constants = ",".join(f"{given}={text}" for given, text in emitter.constants.values())
    return "\n".join([f"const {name}=(()=>{{const {constants};", "return " + lines[0], *lines[1:], "})();"])


def runtime(texts: Sequence[str]) -> str:
    """The helper functions that translated ``texts`` call, and those that these call."""
    whole = files("diffspec.browser").joinpath("runtime.js").read_text(encoding="utf-8")
    helpers = {found[1]: found[0] for found in re.finditer(r"^function (\w+)\(.*?^}\n", whole, re.M | re.S)}
    wanted: dict[str, str] = {}
    waiting = list(texts)
    while waiting:
        text = waiting.pop()
        for name, helper in helpers.items():
            if name not in wanted and re.search(rf"\b{name}\(", text):
                wanted[name] = helper
                waiting.append(helper)
    return "".join(wanted.values())
