"""When requests came and how long they were, of a list of arrivals or of one run of a request table: what a simulation
replays."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ..results import InputError
from . import requests
from .formats import unrecognised
from .readers import arrivals
from .request_rows import RequestRows
from .source import Source

_SHOWN = 4


@dataclass(frozen=True)
class ArrivalList:
    """Requests in the order of their arrival.

    * ``arrival_time`` [s], the first at 0; ``prompt_tokens``, ``output_tokens`` [tok], NaN where the file does not tell
    * ``first_measured``, ``end_measured``: the requests that the file marks as measured, all where it marks none
    * ``file``, ``format``, ``run`` (of a request table) and ``warnings``: where they are from
    """

    arrival_time: Float[np.ndarray, "n"]
    prompt_tokens: Float[np.ndarray, "n"]
    output_tokens: Float[np.ndarray, "n"]
    file: str
    format: str
    run: str | None = None
    first_measured: int = 0
    end_measured: int = 0
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.arrival_time)

    def first(self, count: int) -> "ArrivalList":
        """The first ``count`` requests of the list; all of them where it has fewer."""
        end = min(self.end_measured, count)
        start = 0 if self.first_measured >= end else self.first_measured
        kept: dict[str, Any] = {name: getattr(self, name)[:count] for name in arrivals.COLUMNS}
        return replace(self, **kept, first_measured=start, end_measured=end)

    def summary(self) -> dict[str, Any]:
        """:func:`diffspec.traces.readers.arrivals.summary`: rate, variability and mean lengths, NaN where unknown."""
        columns = {name: getattr(self, name) for name in arrivals.COLUMNS}
        return arrivals.summary(pd.DataFrame(columns))


def read_arrivals(path: str | Path, run: str | None = None) -> ArrivalList:
    """The arrivals in a file: a list of arrivals (Azure, Mooncake, a table with `arrival_time`) or a request table, of
    which ``run`` names one run where it has several.

    Raises `TraceError` for what cannot be read, and :class:`InputError` where it is not clear which run is meant.
    """
    source = Source(path)
    if requests.recognises(source):
        return _of_requests(source, run)
    if not arrivals.recognises(source):
        raise unrecognised(source)
    if run is not None:
        raise InputError(f"run: got {run!r}; allowed: none, {source.file} is a list of arrivals without runs")
    frame = arrivals.read(source)
    columns = {name: frame[name].to_numpy(float) for name in arrivals.COLUMNS}
    told = {"end_measured": len(frame), "warnings": tuple(frame.attrs["warnings"])}
    return ArrivalList(**columns, file=source.file, format=frame.attrs["format"], **told)


def _of_requests(source: Source, run: str | None) -> ArrivalList:
    reader = RequestRows(source)
    parts: dict[tuple, list[dict[str, np.ndarray]]] = {}
    for key, found in reader.batches():
        parts.setdefault(key, []).append(found)
    names = {key: _name(dict(key)) for key in parts}
    chosen = [key for key, name in names.items() if run is None or name == run]
    if len(chosen) != 1:
        listed = sorted(set(names.values()))
        shown = ", ".join(listed[:_SHOWN]) + (", ..." if len(listed) > _SHOWN else "")
        got = "none" if run is None else repr(run)
        raise InputError(f"run: got {got}, and {source.file} has {len(names)} runs; allowed: one of {shown}")
    joined = {name: np.concatenate([part[name] for part in parts[chosen[0]]]) for name in parts[chosen[0]][0]}
    order = np.argsort(joined["arrival_time"], kind="stable")
    times, prompts, outputs, ok = (joined[name][order] for name in (*arrivals.COLUMNS, "ok"))
    marked = np.flatnonzero(joined["measured"][order] > 0)
    edges = (int(marked[0]), int(marked[-1]) + 1) if len(marked) else (0, len(times))
    return ArrivalList(
        arrival_time=times - times[0],
        prompt_tokens=prompts,
        output_tokens=np.where((ok > 0) & (outputs >= 1), outputs, math.nan),
        file=source.file,
        format="request table",
        run=names[chosen[0]],
        first_measured=edges[0],
        end_measured=edges[1],
        warnings=tuple(f"{source.file}: {text}" for text in reader.warnings()),
    )


def _name(identity: dict[str, Any]) -> str:
    return str(identity.get("run") or identity.get("deployment") or "requests")
