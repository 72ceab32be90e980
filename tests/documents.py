"""Documents that run: fenced blocks of Markdown and cells of notebooks, in the process of the test that asks.

Programs compiled for one document serve the next. A line of a shell block that is meant to end with exit code 1 says so
in a comment: ``# exit code 1``. Output may be sent to a file with ``>``.
"""

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffspec
from diffspec.cli import main

REPOSITORY = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(bash|sh|console|python)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d+(?:\.(\d+))?(?:e([-+]\d+))?")


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, source) of each fenced block that is run, in order."""
    return [(found.group(1), found.group(2)) for found in FENCE.finditer(text)]


def commands(source: str) -> list[tuple[list[str], str | None, int]]:
    """(arguments, output file, expected exit code) of each diffspec command of a shell block."""
    found = []
    for line in source.replace("\\\n", " ").splitlines():
        expected = 1 if re.search(r"#.*exit code 1", line) else 0
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            if command[:1] == ["$"]:
                command = command[1:]
            if command[:1] != ["diffspec"]:
                continue
            output = None
            if ">" in command:
                output = command[command.index(">") + 1]
                command = command[: command.index(">")]
            assert not {"|", ";", "<"} & set(command), f"only && and > are understood here: {line}"
            found.append((command[1:], output, expected))
    return found


def run_document(text: str) -> tuple[int, int]:
    """Run a document in the current folder; how many commands and python blocks there were."""
    counted = 0
    shells = [source for language, source in blocks(text) if language != "python"]
    for arguments, output, expected in [command for source in shells for command in commands(source)]:
        counted += 1
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
        assert code == expected, f"diffspec {shlex.join(arguments)}: exit code {code}\n{err.getvalue()}"
        if output is not None:
            Path(output).write_text(out.getvalue(), encoding="utf-8")
    programs = [source for language, source in blocks(text) if language == "python"]
    if programs:
        with contextlib.redirect_stdout(io.StringIO()):
            run_cell("\n".join(programs), {"__name__": "__main__"})
    return counted, len(programs)


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run Python in a namespace; the value of its last line where that is an expression, as in a notebook."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    try:
        exec(compile(tree, "<document>", "exec"), names)
        return None if last is None else eval(compile(ast.Expression(last.value), "<document>", "eval"), names)
    except Exception as error:
        raise AssertionError("".join(traceback.format_exception(error))) from error


def shown(value: Any) -> dict[str, str]:
    """What a notebook shows of a value, by MIME type: what diffspec tells IPython, and a value's own pictures."""
    if value is None:
        return {}
    for module, name, function in diffspec._IN_NOTEBOOKS:
        if isinstance(value, getattr(importlib.import_module(module), name)):
            html = getattr(importlib.import_module("diffspec.report.notebook"), function)(value)
            return {"text/html": html}
    if hasattr(value, "_repr_svg_"):
        return {"image/svg+xml": value._repr_svg_()}
    return {"text/plain": repr(value)}


def told(cell: dict[str, Any]) -> dict[str, str]:
    """What a code cell of a notebook file shows, by MIME type, and ``stdout``; anything else it kept, too."""
    found = {}
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            found[output["name"]] = "".join(output["text"])
        else:
            found |= {kind: "".join(text) for kind, text in output.get("data", {"error": ""}).items()}
    return found


def run_notebook(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Each code cell of a notebook, in order, with what it shows when run now, in the current folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                value = run_cell("".join(cell["source"]), names)
            yield cell, ({"stdout": said.getvalue()} if said.getvalue() else {}) | shown(value)


def unlike(committed: str, now: str, relative: float = 0.0) -> list[str]:
    """Where two texts differ: words that are not the same, and numbers further apart than one unit of the last digit
    that was committed and than ``relative`` of it."""
    words, numbers = NUMBER.split(committed)[::3], list(NUMBER.finditer(committed))
    words_now, numbers_now = NUMBER.split(now)[::3], list(NUMBER.finditer(now))
    if words != words_now:
        pairs = [(a, b) for a, b in zip(words, words_now, strict=False) if a != b] or [(words[-1], words_now[-1])]
        return [f"{a!r} is now {b!r}" for a, b in pairs]
    found = []
    for one, other in zip(numbers, numbers_now, strict=True):
        unit = 10.0 ** (int(one[2] or 0) - len(one[1] or ""))
        allowed = max(unit, relative * abs(float(one[0]))) * (1 + 1e-9)
        if abs(float(one[0]) - float(other[0])) > allowed:
            found.append(f"{one[0]} is now {other[0]}: ...{committed[max(one.start() - 40, 0) : one.end() + 10]}...")
    return found
