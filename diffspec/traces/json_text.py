"""JSON, a JSON list, or JSON lines as records; what cannot be read is a `TraceError` that says where."""

import json
from typing import Any

from .problems import Problem


def parse_json(text: str, file: str) -> list[tuple[int, Any]]:
    """The records of JSON, a JSON list or JSON lines, each with its line or place. Raises `TraceError`."""
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


def _loads(text: str, file: str, row: int | None) -> Any:
    try:
        return json.loads(text)
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
