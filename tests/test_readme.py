"""README.md is run in one folder: its diffspec commands in order, then its python blocks as one program.

The folder has a copy of data/, as the repository does, so that commands may name data/vllm_cpu_quiet.csv. A line that
is meant to end with exit code 1 says so in a comment: ``# exit code 1``. Output may be sent to a file with ``>``.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffspec.cli import demo, main

REPOSITORY = Path(__file__).resolve().parents[1]
FIRST_SCREEN = ("pip install . && diffspec demo", "pip install -e '.[test]' && pytest")
FENCE = re.compile(r"^```(bash|sh|console|python)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


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
    if programs:  # in a process of its own, without the strictness of these tests, as a reader runs it
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        program = [sys.executable, "-c", "\n".join(programs)]
        ran = subprocess.run(program, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    return counted, len(programs)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DIFFSPEC_CACHE_DIR", "")
    monkeypatch.setattr(demo, "STEP_TIME", "affine")  # the cheaper half; .ci/run does the whole demonstration
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_runs(folder):
    shutil.copytree(REPOSITORY / "data", folder / "data")
    shells, _ = run_document((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    assert shells > 0


@pytest.mark.parametrize("command", FIRST_SCREEN)
def test_the_first_screen_has_both_commands(command):
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert command in [line.strip() for line in lines[:45]]


GOOD = """
```bash
pip install . && diffspec fit --template > trace.csv
diffspec check trace.csv \\
    --json  # a comment
diffspec check other.csv && diffspec check trace.csv
```
"""


def test_commands_are_found():
    ((language, source),) = blocks(GOOD)
    assert language == "bash"
    assert commands(source) == [
        (["fit", "--template"], "trace.csv", 0),
        (["check", "trace.csv", "--json"], None, 0),
        (["check", "other.csv"], None, 0),
        (["check", "trace.csv"], None, 0),
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD, "other.csv: no such file"),
        ("```bash\ndiffspec nonsense\n```\n", "exit code 2"),
        ("```bash\ndiffspec check trace.csv | head\n```\n", "only && and >"),
        ("```python\nimport diffspec\ndiffspec.no_such_name\n```\n", "AttributeError"),
        ("```python\nx = 1\n```\n```python\nassert x == 2\n```\n", "AssertionError"),
    ],
)
def test_a_wrong_document_fails(folder, text, told):
    with pytest.raises(AssertionError, match=re.escape(told)):
        run_document(text)


def test_a_right_document_passes(folder):
    text = GOOD.replace("diffspec check other.csv && ", "") + "```python\nfrom diffspec import read_trace\n"
    text += "assert len(read_trace('trace.csv')) == 4\n```\n"
    assert run_document(text) == (3, 1)
