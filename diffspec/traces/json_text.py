"""JSON, a JSON list, or JSON lines as records; what cannot be read is a `TraceError` that says where."""

import json
import re
from typing import Any

from .problems import Problem

MOST_MEMORY = 2 << 30
"""Memory [B] that the values of one JSON text may take; objects and lists take several times their text."""
_VALUE, _CONTAINER = 40, 150
# An escaped backslash, a pair of surrogates, or (1) half of one, which no file or terminal can hold.
_HALF = re.compile(r"\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})")


def parse_json(text: str, file: str) -> list[tuple[int, Any]]:
    """The records of JSON, a JSON list or JSON lines, each with its line or place. Raises `TraceError`."""
    values, containers = text.count(","), text.count("{") + text.count("[")
    if _VALUE * values + _CONTAINER * containers > MOST_MEMORY:
        advice = "split the file, or write it without the details of single requests"
        allowed = f"about {MOST_MEMORY // _VALUE} numbers, or {MOST_MEMORY // _CONTAINER} objects"
        raise Problem("the JSON holds too much", file, None, None, values + containers, allowed, advice).error()
    try:
        value = _loads(text, file, None)
        return list(enumerate(value, start=1)) if isinstance(value, list) else [(1, value)]
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise _broken(error, file, error.lineno, len(text)) from None
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append((number, _loads(line, file, number)))
            except json.JSONDecodeError as error:
                raise _broken(error, file, number, len(line)) from None
    return records


def loads(text: str) -> Any:
    """`json.loads`, with half surrogates replaced: other text can be written and printed.

    >>> loads('["\\\\ud83d\\\\ude00", "\\\\ud83d"]') == ["\\U0001f600", "\\ufffd"]
    True
    """
    if "\\ud" in text or "\\uD" in text:
        text = _HALF.sub(lambda found: "\\ufffd" if found[1] else found[0], text)
    return json.loads(text)


def _loads(text: str, file: str, row: int | None) -> Any:
    try:
        return loads(text)
    except RecursionError:
        raise Problem("the JSON is nested too deeply", file, row).error() from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise Problem(f"the JSON holds a number that cannot be read: {str(error)[:120]}", file, row).error() from None


def _broken(error: json.JSONDecodeError, file: str, row: int, length: int):
    at_end = error.pos >= length - 1 or error.msg.startswith("Unterminated string")
    advice = "the file may be cut off" if at_end else None
    return Problem(f"not valid JSON: {error.msg} at line {row}, column {error.colno}", file, advice=advice).error()
