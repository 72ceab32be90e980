"""How each elementwise primitive reads in JavaScript: one expression of its operands' expressions.

Operands come as numbers (booleans of arrays as 0 or 1), already in parentheses where they need them. Whole numbers are
kept in floats, exact to 2^53. NaN passes through as in JAX.
"""

from collections.abc import Callable
from typing import Any

from diffspec.results import InputError

Rule = Callable[[list[str], dict[str, Any], list[str]], str]
"""(operands, parameters, kinds of the operands: "b", "i" or "f") -> expression."""


def _operator(text: str) -> Rule:
    return lambda x, params, kinds: f"{x[0]}{text}{x[1]}"


def _call(name: str) -> Rule:
    return lambda x, params, kinds: f"{name}({','.join(y[1:-1] if y.startswith('(') else y for y in x)})"


def _divide(x: list[str], params: dict[str, Any], kinds: list[str]) -> str:
    return f"Math.trunc({x[0]}/{x[1]})" if kinds[0] == "i" else f"{x[0]}/{x[1]}"


def _logical(text: str, other: str) -> Rule:
    def rule(x: list[str], params: dict[str, Any], kinds: list[str]) -> str:
        if kinds[0] != "b":
            raise InputError(f"primitive: got {other!r} of whole numbers; allowed: of booleans")
        return f"{x[0]}{text}{x[1]}"

    return rule


def _not(x: list[str], params: dict[str, Any], kinds: list[str]) -> str:
    return f"!{x[0]}" if kinds[0] == "b" else f"-1-{x[0]}"


def _select(x: list[str], params: dict[str, Any], kinds: list[str]) -> str:
    if kinds[0] == "b":
        return f"{x[0]}?{x[2]}:{x[1]}"
    tests = [f"{x[0]}<{case + 1}?{value}:" for case, value in enumerate(x[1:-1])]
    return "".join(tests) + x[-1]


def _integer_power(x: list[str], params: dict[str, Any], kinds: list[str]) -> str:
    return {2: f"{x[0]}*{x[0]}", -1: f"1/{x[0]}", -2: f"1/({x[0]}*{x[0]})"}.get(
        params["y"], f"Math.pow({x[0]},{params['y']})"
    )


def _convert(x: list[str], params: dict[str, Any], kinds: list[str]) -> str:
    target = {"f": "f", "i": "i", "u": "i", "b": "b"}[params["new_dtype"].kind]
    if target == "b":
        return f"{x[0]}!=0"
    if kinds[0] == "f" and target == "i":
        return f"Math.trunc({x[0]})"
    return f"+{x[0]}" if kinds[0] == "b" else x[0]


def _round(x: list[str], params: dict[str, Any], kinds: list[str]) -> str:
    even = int(params["rounding_method"]) == 1  # lax.RoundingMethod.TO_NEAREST_EVEN
    return f"roundEven({x[0]})" if even else f"Math.sign({x[0]})*Math.floor(Math.abs({x[0]})+0.5)"


ELEMENTWISE: dict[str, Rule] = {
    "add": _operator("+"),
    "add_any": _operator("+"),
    "sub": _operator("-"),
    "mul": _operator("*"),
    "div": _divide,
    "rem": _operator("%"),
    "max": _call("Math.max"),
    "min": _call("Math.min"),
    "neg": lambda x, params, kinds: f"-{x[0]}",
    "sign": _call("Math.sign"),
    "abs": _call("Math.abs"),
    "floor": _call("Math.floor"),
    "ceil": _call("Math.ceil"),
    "round": _round,
    "exp": _call("Math.exp"),
    "exp2": lambda x, params, kinds: f"Math.pow(2,{x[0]})",
    "expm1": _call("Math.expm1"),
    "log": _call("Math.log"),
    "log1p": _call("Math.log1p"),
    "sqrt": _call("Math.sqrt"),
    "rsqrt": lambda x, params, kinds: f"1/Math.sqrt({x[0]})",
    "cbrt": _call("Math.cbrt"),
    "square": lambda x, params, kinds: f"{x[0]}*{x[0]}",
    "pow": _call("Math.pow"),
    "integer_pow": _integer_power,
    "sin": _call("Math.sin"),
    "cos": _call("Math.cos"),
    "tan": _call("Math.tan"),
    "asin": _call("Math.asin"),
    "acos": _call("Math.acos"),
    "atan": _call("Math.atan"),
    "atan2": _call("Math.atan2"),
    "sinh": _call("Math.sinh"),
    "cosh": _call("Math.cosh"),
    "tanh": _call("Math.tanh"),
    "logistic": lambda x, params, kinds: f"1/(1+Math.exp(-{x[0]}))",
    "erf": _call("erf"),
    "erfc": _call("erfc"),
    "is_finite": _call("Number.isFinite"),
    "eq": _operator("=="),
    "ne": _operator("!="),
    "lt": _operator("<"),
    "le": _operator("<="),
    "gt": _operator(">"),
    "ge": _operator(">="),
    "and": _logical("&&", "and"),
    "or": _logical("||", "or"),
    "xor": _logical("!=", "xor"),
    "not": _not,
    "select_n": _select,
    "clamp": lambda x, params, kinds: f"Math.min(Math.max({x[1]},{x[0]}),{x[2]})",
    "convert_element_type": _convert,
}


def expression(name: str, operands: list[str], params: dict[str, Any], kinds: list[str]) -> str:
    """The expression of one elementwise primitive.

    >>> expression("max", ["a", "2"], {}, ["f", "f"])
    'Math.max(a,2)'
    """
    return ELEMENTWISE[name](operands, params, kinds)
