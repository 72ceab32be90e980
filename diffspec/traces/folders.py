"""Which files of a folder hold its measurements, each once.

A folder that `diffspec collect` wrote, also one among others, is its table. One that `vllm bench sweep` wrote is its
runs; `summary.json` and `summary.csv`, which repeat them, stand in only where the runs themselves are gone. Request
tables beside benchmark results repeat them too. Warm-ups, failures and files that are no trace are left out.
"""

from pathlib import Path

from ..results import TraceError
from .formats import Format, recognise
from .problems import Problem
from .source import HEAD, Source
from .table import file_name

COLLECTED = "operating_points.csv"
SCRAPES = ".metrics.txt"
_REPEATS = ("summary.json", "summary.csv")
_NOT_RUNS = ("warmup.json", "failure.json")


def traces_in(folder: Path, warnings: list[str]) -> list[tuple[Format, Source]]:
    """Format and source of every file to read, in order of name; what is left out is told in `warnings`. Raises
    `TraceError` for JSON that cannot be read, and when nothing is left."""
    files = [item for item in sorted(folder.rglob("*")) if item.is_file() and not _hidden(item.relative_to(folder))]
    collections = [item.parent for item in files if item.name == COLLECTED]
    if collections:  # of what a collection wrote only its table counts
        files = [item for item in files if item.name == COLLECTED or not set(collections) & set(item.parents)]
    read: list[tuple[Format, Source]] = []
    for item in files:
        if item.name not in _REPEATS and not item.name.endswith(_NOT_RUNS) and not _beside_requests(item):
            read += _recognised(item, warnings)
    # The deepest first: a summary.csv repeats the summary.json of each folder below it.
    for item in sorted((item for item in files if item.name in _REPEATS), key=lambda item: (-len(item.parts), item)):
        if not any(item.parent in source.path.parents for _, source in read):
            read += _recognised(item, warnings)
    if any(found.gives == "operating points" for found, _ in read):
        read = [(found, source) for found, source in read if found.gives != "requests"]
    taken = {source.path for _, source in read}
    left = [file_name(item.relative_to(folder)) for item in files if item not in taken]
    if left:
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        warnings.append(f"{file_name(folder)}: skipped, no results of single runs: {', '.join(left[:8])}{more}")
    if not read:
        raise Problem("no trace in this folder", file=file_name(folder), advice="name its files one by one").error()
    return read


def _beside_requests(item: Path) -> bool:
    """Whether these are the scrapes of a collected cell, whose requests lie beside them and say the same."""
    name = item.name.removesuffix(SCRAPES)
    return name != item.name and item.with_name(f"{name}.jsonl").exists()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _recognised(item: Path, warnings: list[str]) -> list[tuple[Format, Source]]:
    source = Source(item)
    try:
        found = recognise(source)
    except TraceError as error:
        if item.suffix.lower() in (".json", ".jsonl"):
            raise
        warnings.append(str(error))
        return []
    if len(source.head) == HEAD:
        source.forget()
    return [] if found is None else [(found, source)]
