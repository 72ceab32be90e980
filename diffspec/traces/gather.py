"""Files and folders, recognised, read and sorted by what they give, before any of it becomes a trace."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..results import InputError
from .folders import traces_in
from .formats import Format, read_source
from .join import join, points
from .problems import Problem
from .readers import arrivals
from .schema import RESERVED
from .source import Source

_NOT_TRACES = {
    "acceptance": "acceptance, not a benchmark: diffspec acceptance reads it",
    "arrivals": "arrivals without latencies: diffspec import summarises it, a plan of diffspec collect replays it",
}


@dataclass
class Gathered:
    """What was found. `points`, raw frames of operating points with the file each came from; `others`, what is no
    operating point, as (format, file, what the reader gave); `recognised`, of every file its "file" (name), "format",
    what it "gives" and how its units are "handled"; `warnings`, one line each."""

    points: list[tuple[str, pd.DataFrame]] = field(default_factory=list)
    others: list[tuple[Format, str, Any]] = field(default_factory=list)
    recognised: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def of(self, gives: str) -> list[Any]:
        """What readers gave of one kind that is no operating point."""
        return [value for found, _, value in self.others if found.gives == gives]


def gather(paths: Sequence[str | Path]) -> Gathered:
    """Read every file of `paths`; in folders what is no trace is skipped with a warning. Counters are joined to the
    benchmark results they belong to, or become operating points where there are none; request tables are summarised;
    forward passes become closed loops (see `step_points`). Raises `TraceError` for what cannot be read."""
    gathered = Gathered()
    snapshots = []
    for path in paths:
        for found, file, value in _read(Path(path), gathered):
            gathered.recognised.append(
                {"file": file, "format": found.name, "gives": found.gives, "handled": found.handled}
            )
            if found.gives in ("operating points", "requests"):
                gathered.points.append((file, value))
            elif found.gives == "counters":
                snapshots += value
            elif found.gives == "step times":
                gathered.points.append((file, step_points(value, file)))
            else:
                gathered.others.append((found, file, value))
    if snapshots and gathered.points:
        _join(gathered, snapshots)
    elif snapshots:
        gathered.points.append((snapshots[-1].file, points(snapshots)))
    return gathered


def refuse_others(gathered: Gathered) -> None:
    """Raise `TraceError` for the first file that holds no operating points."""
    for found, file, _ in gathered.others:
        raise Problem(f"{found.name}: {_NOT_TRACES[found.gives]}", file).error()


def set_identity(frame: pd.DataFrame, identity: dict[str, Any]) -> list[str]:
    """Write the columns of `identity` into a raw frame, in place; a line for each that replaced another value."""
    notes = []
    for name, value in identity.items():
        if name in frame.columns:
            given = [str(cell) for cell in frame[name] if cell is not None and cell == cell and str(cell).strip()]
            other = sorted({cell for cell in given if cell != str(value)})
            if other:
                notes.append(f"{name} set to {value}, in place of {', '.join(other[:3])}")
        frame[name] = pd.Series([value] * len(frame), dtype=object, index=frame.index)
    return notes


def step_points(samples: pd.DataFrame, file: str) -> pd.DataFrame:
    """Forward passes as closed loops: ``concurrency`` requests whose context is ``kv_length_mean`` on average, each
    step ``step_time_median`` of its slowest rank long, all drafts accepted (as `vllm bench forward` does), nothing to
    prefill. They say what a step of the model costs, without the engine's sampling and scheduling: a deployment of
    their own."""
    usable = samples.loc[(samples["prefill_requests"] == 0) & samples["step_time_median"].notna()]
    slowest = usable.groupby("source_row", sort=False)["step_time_median"].idxmax()  # of its ranks sets the pace
    decode = usable.loc[slowest]
    lengths = (decode["draft_tokens"] / decode["requests"]).round()
    frame = pd.DataFrame(
        {
            "deployment": "forward passes",
            "run": decode["case"].astype(str),
            "concurrency": decode["requests"],
            "prompt_length": 1.0,
            "output_length": np.maximum(2 * (np.asarray(decode["kv_length_mean"], float) - 1), 2.0),
            "draft_length": lengths,
            "method": ["draft_model" if length > 0 else "none" for length in lengths],
            "tokens_per_step": [length + 1 if length > 0 else None for length in lengths],
            "itl_mean": decode["step_time_median"],
            "source_file": file,
            "source_row": decode["source_row"],
        }
    )
    frame.attrs = dict(samples.attrs)
    skipped = len(set(samples["source_row"])) - len(decode)
    notes = [f"{file}: {skipped} cases with prefill left out: a closed loop cannot stand for them"] if skipped else []
    notes.append(f"{file}: forward passes alone, without sampling and scheduling: a deployment of their own")
    frame.attrs["warnings"] = [*samples.attrs.get("warnings", ()), *notes]
    if not len(frame):
        raise Problem("no decoding or verifying case in the file", file, allowed="cases without prefill").error()
    return frame


def _read(path: Path, gathered: Gathered) -> list[tuple[Format, str, Any]]:
    if os.path.isdir(path):  # no exception, whatever the name
        read = []
        for found, source in traces_in(path, gathered.warnings):
            read.append((found, source.file, found.read(source)))
            source.forget()
        return read
    source = Source(path)
    found, value = read_source(source)
    return [(found, source.file, value)]


def _join(gathered: Gathered, snapshots: list[Any]) -> None:
    """Fill the benchmark rows of all files from the counters, and put them back where they came from."""
    frames = [frame for _, frame in gathered.points]
    whole = pd.concat([frame.astype(object) for frame in frames], ignore_index=True)
    filled, notes = join(whole, snapshots)
    gathered.warnings += notes
    start = 0
    for index, frame in enumerate(frames):
        part = filled.iloc[start : start + len(frame)].reset_index(drop=True)
        part["source_row"] = part["source_row"].astype("int64")
        names = [name for name in part.columns if name in frame.columns or part[name].notna().any()]
        part = part[[*(name for name in names if name not in RESERVED), *(n for n in names if n in RESERVED)]]
        part.attrs = dict(frame.attrs)
        gathered.points[index] = (gathered.points[index][0], part)
        start += len(frame)


def read_identity(text: str | None, assignments: Sequence[str]) -> dict[str, Any]:
    """Columns for every row from a YAML mapping and from ``key=value`` texts, which win.

    >>> read_identity("{hardware: H200, draft_length: 4}", ["draft_length=3"])
    {'hardware': 'H200', 'draft_length': 3}
    """
    import yaml

    try:
        columns = {} if text is None else yaml.safe_load(text)
        values = {
            item.split("=", 1)[0].strip(): yaml.safe_load(item.split("=", 1)[1]) for item in assignments if "=" in item
        }
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"identity: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(columns, dict):
        raise InputError(f"identity: got {type(columns).__name__}; allowed: a mapping of columns to values")
    for item in assignments:
        if "=" not in item:
            raise InputError(f"--set: got {item!r}; allowed: KEY=VALUE, such as hardware=H200")
    for name, value in (columns | values).items():
        if isinstance(value, (dict, set)) or (
            isinstance(value, list) and not all(isinstance(v, float | int) for v in value)
        ):
            raise InputError(f"identity: {name}: got {value!r:.60}; allowed: a number or a text")
    return {str(name): value for name, value in (columns | values).items()}


def import_answer(gathered: Gathered, trace: Any, report: Any) -> dict[str, Any]:
    """The answer of `diffspec import` as plain data: files recognised, rows, checks, summaries of arrivals."""
    listed = [found for found, _, _ in gathered.others if found.gives == "arrivals"]
    logs = [(file, value) for found, file, value in gathered.others if found in listed]
    answer: dict[str, Any] = {
        "files": gathered.recognised,
        "rows": 0 if trace is None else len(trace),
        "table": [] if trace is None else rows_of(trace.frame),
        "arrivals": [{"file": file, **arrivals.summary(value)} for file, value in logs],
        "warnings": list(gathered.warnings) if trace is None else trace.warnings,
    }
    return answer | ({} if report is None else report.to_dict())


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a canonical frame as plain dicts, without what is missing."""
    return [
        {
            str(name): list(value) if isinstance(value, tuple) else value
            for name, value in row.items()
            if value is not None and value == value
        }
        for row in frame.to_dict("records")
    ]
