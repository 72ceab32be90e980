"""Filter rows by a small expression: ``draft_length == 4 and arrival_rate <= 3``.

    expression  = term { "or" term }
    term        = factor { ("and" | ",") factor }
    factor      = "(" expression ")" | column op value | column "in" "(" value { ("," | ";") value } ")"
    op          = "==" | "=" | "!=" | "<" | "<=" | ">" | ">="

A value is a number, a quoted text or a bare word; "" stands for a missing value. Nothing is evaluated as code.
"""

import math
import re
from collections.abc import Callable

import numpy as np
import pandas as pd

from ..results import InputError
from .problems import near

_TOKEN = re.compile(r"""\s*(?:(==|!=|<=|>=|=|<|>)|([(){},;])|"([^"]*)"|'([^']*)'|([^\s"'(){},;=!<>]+))""")
_ORDER: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
}
_LONGEST, _DEEPEST = 4000, 50


def matches(frame: pd.DataFrame, expression: str) -> np.ndarray:
    """Which rows of `frame` satisfy `expression`, as a boolean array.

    `!=` is exactly the opposite of `==`; a missing value satisfies no order. Texts are compared as they are written.
    Raises `InputError` for an expression outside the grammar, a column the frame has not, and an order between texts.

    >>> frame = pd.DataFrame({"draft_length": [0.0, 2.0, 4.0], "method": ["none", "eagle3", "eagle3"]})
    >>> matches(frame, "method == eagle3 and draft_length in (2, 3)").tolist()
    [False, True, False]
    """
    if len(expression) > _LONGEST:
        raise InputError(f"the filter is {len(expression)} characters long; allowed: up to {_LONGEST}")
    parser = _Parser(frame, expression)
    result = parser.expression(0)
    if parser.peek() is not None:
        raise parser.error("and, or, ',' or the end")
    return result


class _Parser:
    def __init__(self, frame: pd.DataFrame, text: str):
        self.frame, self.text, self.position = frame, text, 0
        self.tokens: list[tuple[str, str, int]] = []
        at = 0
        while text[at:].strip():
            found = _TOKEN.match(text, at)
            if not found:
                raise InputError(f"filter {text!r}: cannot be read from {text[at : at + 20].strip()!r} on")
            kind = ("op", "mark", "quoted", "quoted", "word")[found.lastindex - 1 if found.lastindex else 0]
            self.tokens.append((kind, found.group(found.lastindex or 0), found.start()))
            at = found.end()

    def peek(self) -> tuple[str, str] | None:
        return self.tokens[self.position][:2] if self.position < len(self.tokens) else None

    def error(self, allowed: str) -> InputError:
        token = self.peek()
        got = "the end" if token is None else repr(token[1])
        return InputError(f"filter {self.text!r}: got {got} where {allowed} is needed")

    def accept(self, *allowed: str) -> bool:
        token = self.peek()
        hit = token is not None and token[0] != "quoted" and token[1].lower() in allowed
        self.position += hit
        return hit

    def expression(self, depth: int) -> np.ndarray:
        result = self.term(depth)
        while self.accept("or"):
            result = result | self.term(depth)
        return result

    def term(self, depth: int) -> np.ndarray:
        result = self.factor(depth)
        while self.accept("and", ","):
            result = result & self.factor(depth)
        return result

    def factor(self, depth: int) -> np.ndarray:
        if self.accept("("):
            if depth >= _DEEPEST:
                raise InputError(f"filter: more than {_DEEPEST} nested parentheses")
            result = self.expression(depth + 1)
            if not self.accept(")"):
                raise self.error("')'")
            return result
        token = self.peek()
        if token is None or token[0] not in ("word", "quoted"):
            raise self.error("a column")
        self.position += 1
        column = self.column(token[1])
        if self.accept("in"):
            return self.member(column)
        token = self.peek()
        if token is None or token[0] != "op":
            raise self.error("one of == != < <= > >= in")
        self.position += 1
        value = self.value()
        if token[1] in _ORDER:
            return self.ordered(column, token[1], value)
        equal = self.equal(column, value)
        return ~equal if token[1] == "!=" else equal

    def column(self, name: str) -> str:
        if name in self.frame.columns:
            return name
        hint = near(name, [str(column) for column in self.frame.columns])
        raise InputError(f"filter {self.text!r}: no column '{name}'" + (f"; {hint}" if hint else ""))

    def value(self) -> str:
        token = self.peek()
        if token is None or token[0] not in ("word", "quoted"):
            raise self.error("a value")
        self.position += 1
        return token[1]

    def member(self, column: str) -> np.ndarray:
        if not self.accept("(", "{"):
            raise self.error("'('")
        result = self.equal(column, self.value())
        while self.accept(",", ";"):
            result = result | self.equal(column, self.value())
        if not self.accept(")", "}"):
            raise self.error("')' or ','")
        return result

    def number(self, column: str, value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isnan(number):
            raise InputError(f"filter {self.text!r}: column '{column}' holds numbers; got {value!r}")
        return number

    def equal(self, column: str, value: str) -> np.ndarray:
        cells = self.frame[column]
        if value == "":
            return cells.isna().to_numpy(bool)
        if pd.api.types.is_numeric_dtype(cells.dtype):
            return cells.to_numpy(float) == self.number(column, value)
        if any(isinstance(cell, tuple) for cell in cells):
            raise InputError(f"filter {self.text!r}: column '{column}' holds lists and cannot be compared")
        return np.array([cell is not None and str(cell) == value for cell in cells], bool)

    def ordered(self, column: str, op: str, value: str) -> np.ndarray:
        cells = self.frame[column]
        if not pd.api.types.is_numeric_dtype(cells.dtype):
            raise InputError(f"filter {self.text!r}: column '{column}' holds texts; use == or !=, not {op}")
        return _ORDER[op](cells.to_numpy(float), self.number(column, value))
