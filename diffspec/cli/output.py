"""Where things are said: answers on stdout, notes, progress and errors on stderr."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

PIPE_WIDTH = 120


def _console() -> Console:
    """A console on stdout; where nobody looks (a pipe, a file) it is wide enough for every table."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False)


def note(lines: Iterable[str], label: str = "note") -> None:
    """Notes on stderr, one line each, as plain text."""
    for line in lines:
        sys.stderr.write(f"{label}: {line}\n")
    sys.stderr.flush()


def deliver(
    data: dict[str, Any],
    show: Callable[[dict[str, Any]], Iterable[Any]],
    *,
    as_json: bool,
    out: Path | None = None,
    files: Mapping[Path, str | bytes] | None = None,
    inputs: tuple[Path, ...] = (),
) -> None:
    """Write the files (with ``--out`` the answer as JSON among them), then say the answer: JSON or tables.

    Nothing is written and nothing said on stdout when one of the files cannot be written.
    """
    from diffspec.report.files import check_target, json_text, write_files

    contents = dict(files or {})
    if out is not None:
        contents[out] = json_text(data) + "\n"
    for path in contents:
        check_target(path, inputs)
    write_files(contents)
    if as_json:
        sys.stdout.write(json_text(data) + "\n")
    else:
        console = _console()
        for part in show(data):
            if isinstance(part, str | Text):
                console.print(part, soft_wrap=True, markup=False)  # flags are there to be copied whole
            else:
                console.print(part)
    sys.stdout.flush()
    if not as_json:
        note((str(path) for path in contents), "wrote")


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr that vanishes when done; nothing where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda label, share: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(what, total=1.0)

        def report(label: str, share: float) -> None:
            bar.update(task, description=label, completed=share)

        yield report
