"""What to measure, as data: a plan with its server, caps and prompts, and its cells, each one load at one shape."""

import itertools
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..results import InputError

PROCESSES = ("poisson", "constant", "gamma")
PROMPT_KINDS = ("token_ids", "text", "file")
ENDPOINTS = ("completions", "chat")


@dataclass(frozen=True)
class Server:
    """Where the load goes, and nowhere else. `url`, such as http://127.0.0.1:8000; `model`, by default the only one the
    server lists; `endpoint`, completions or chat; `metrics`, whether /metrics is scraped; `api_key_env`, the
    environment's variable that holds the key; `extra`, fields added to every request's body; `timeout` [s] of one."""

    url: str | None = None
    model: str | None = None
    endpoint: str = "completions"
    metrics: bool = True
    api_key_env: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    timeout: float = 600.0


@dataclass(frozen=True)
class Limits:
    """Caps that no plan may pass: `max_rate` [req/s] (the mean of an open loop, any minute of a replay; a closed loop
    that passes it is ended), `max_requests` in one collection, with warm-up and cool-down, `max_concurrency` [req]."""

    max_rate: float | None = None
    max_requests: int | None = None
    max_concurrency: int = 256


@dataclass(frozen=True)
class Measure:
    """How long each cell is. `requests` are measured after a warm-up of `warmup_requests` and at least three mean
    latencies, until latencies have settled (0: no warm-up). With `until` (such as 0.05) measuring goes on, up to
    `most_requests`, until the 95 % confidence interval of the mean end-to-end latency (batch means) is within that
    share of it. `most_seconds` ends a cell in any case; `scrape_seconds` lies between scrapes of /metrics,
    `settle_seconds` between cells. `seed` fixes what is drawn."""

    requests: int = 100
    warmup_requests: int = 10
    until: float | None = None
    most_requests: int | None = None
    most_seconds: float = 600.0
    scrape_seconds: float = 5.0
    settle_seconds: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Prompts:
    """What is sent. `kind` token_ids: random ids below `vocabulary` (exact lengths; completions only); text: random
    `words` (about one token a word); file: JSON lines with `prompt` and, optionally, `output_length` and `task`."""

    kind: str = "token_ids"
    vocabulary: int = 1000
    words: tuple[str, ...] = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world")
    file: str | None = None
    temperature: float = 0.0
    ignore_eos: bool = True


@dataclass(frozen=True)
class Cell:
    """One operating point to measure: exactly one of `arrival_rate` [req/s] and `concurrency` [req] (a replay takes its
    own rate from `replay`, a file of arrivals, times `speedup`), mean lengths [tok] and their scv (0: fixed)."""

    prompt_length: float = 64
    output_length: float = 64
    arrival_rate: float | None = None
    concurrency: int | None = None
    arrival_process: str = "poisson"
    arrival_scv: float | None = None
    prompt_scv: float = 0.0
    output_scv: float = 0.0
    replay: str | None = None
    speedup: float = 1.0
    requests: int | None = None
    repeat: int = 1
    identity: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """A name for files: the load and the columns that are the cell's own."""
        return _for_files([self.load_name, *(str(value) for _, value in self.identity)])

    @property
    def load_name(self) -> str:
        """Lengths, load, and what differs from Poisson arrivals and fixed lengths; cells alike in it share draws."""
        load = (
            f"c{self.concurrency}" if self.concurrency else f"r{self.arrival_rate:g}" if self.arrival_rate else "replay"
        )
        parts = [f"p{self.prompt_length:g}", f"o{self.output_length:g}", load]
        if self.concurrency is None and self.arrival_process != "poisson":
            parts.append(self.arrival_process + (f"{self.arrival_scv:g}" if self.arrival_process == "gamma" else ""))
        if self.prompt_scv or self.output_scv:
            parts.append(f"scv{self.prompt_scv:g}-{self.output_scv:g}")
        if self.replay:
            parts += [Path(self.replay).stem, f"x{self.speedup:g}"]
        if self.repeat > 1:
            parts.append(f"rep{self.repeat}")
        return _for_files(parts)


@dataclass(frozen=True)
class Plan:
    """A whole plan. `identity` holds columns of the operating-point table that are the same in every cell."""

    grid: tuple[dict[str, Any], ...]
    identity: dict[str, Any] = field(default_factory=dict)
    server: Server = Server()
    limits: Limits = Limits()
    measure: Measure = Measure()
    prompts: Prompts = Prompts()

    def cells(self) -> list[Cell]:
        """The cells in the order they are measured: the whole grid once, then the repeats, so that drift shows."""
        found = [cell for entry in self.grid for cell in _multiplied(entry)]
        found.sort(key=lambda cell: cell.repeat)
        names: dict[str, Cell] = {}
        for cell in found:
            if cell.name in names:
                raise InputError(f"grid: cell {cell.name} appears twice; for repeated measurements give 'repeats: 2'")
            names[cell.name] = cell
        return found

    def requests(self, cell: Cell) -> int:
        """Requests measured in a cell, at most (with `until`, the most it may take)."""
        least = cell.requests or self.measure.requests
        return max(least, self.measure.most_requests or 10 * least) if self.measure.until else least

    def seconds(self, cell: Cell) -> float:
        """How long a cell lasts, about, for an open loop; its upper bound `most_seconds` for closed loops and replays,
        whose pace is the server's or the file's."""
        if cell.arrival_rate is None:
            return self.measure.most_seconds
        count = (cell.requests or self.measure.requests) + self.measure.warmup_requests
        return min(count / cell.arrival_rate, self.measure.most_seconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a plan file would hold it."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """What would be measured and how long it takes [s]: open loops about, closed loops and replays at most."""
        cells = [
            {
                "name": cell.name,
                "arrival_rate": cell.arrival_rate,
                "concurrency": cell.concurrency,
                "prompt_length": cell.prompt_length,
                "output_length": cell.output_length,
                "requests": self.requests(cell) + self.measure.warmup_requests,
                "seconds": self.seconds(cell),
                "seconds_at_most": self.measure.most_seconds,
            }
            for cell in self.cells()
        ]
        return {
            "url": self.server.url,
            "cells": cells,
            "requests": sum(cell["requests"] for cell in cells),
            "seconds": sum(cell["seconds"] for cell in cells),
            "seconds_at_most": sum(cell["seconds_at_most"] for cell in cells),
            "limits": asdict(self.limits),
        }


def _for_files(parts: list[str]) -> str:
    return re.sub(r"[^\w.+-]+", "-", "_".join(parts))


def cell_fields() -> list[str]:
    """Keys of a grid entry that are the cell's own; others are columns of the operating-point table."""
    return [item.name for item in fields(Cell) if item.name not in ("repeat", "identity")]


def axes(entry: dict[str, Any]) -> dict[str, list[Any]]:
    """A grid entry with every value as a list; `repeats` apart."""
    return {name: value if isinstance(value, list) else [value] for name, value in entry.items() if name != "repeats"}


def _multiplied(entry: dict[str, Any]) -> list[Cell]:
    lists, own = axes(entry), cell_fields()
    cells = []
    for values in itertools.product(*lists.values()):
        given = dict(zip(lists, values, strict=True))
        identity = tuple((name, given.pop(name)) for name in list(given) if name not in own)
        cells += [Cell(**given, repeat=repeat, identity=identity) for repeat in range(1, entry.get("repeats", 1) + 1)]
    return cells
