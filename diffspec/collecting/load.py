"""When requests arrive and what they ask: arrival gaps, lengths and bodies, drawn from one seed a cell."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..results import InputError
from .plan import Cell, Plan


@dataclass(frozen=True)
class Ask:
    """One request to send: `at` [s] after the cell began (None in closed loops: at once), lengths [tok], its body, and
    the `task` that a file of prompts names."""

    at: float | None
    prompt_length: int
    output_length: int
    body: dict[str, Any]
    task: str | None = None


def gaps(process: str, rate: float, scv: float | None, random: np.random.Generator) -> Iterator[float]:
    """Times between arrivals [s] of mean ``1/rate``: exponential (poisson), equal (constant), or gamma with squared
    coefficient of variation `scv` (shape ``1/scv``, scale ``scv/rate``).

    >>> next(gaps("constant", 4.0, None, np.random.default_rng(0)))
    0.25
    """
    shape = 1.0 / scv if scv else 1.0
    while True:
        yield 1.0 / rate if process == "constant" else float(random.gamma(shape, 1.0 / (shape * rate)))


def lengths(mean: float, scv: float, random: np.random.Generator) -> Iterator[int]:
    """Lengths [tok], at least 1, of this mean: all alike for scv 0, else gamma with this squared coefficient of
    variation, rounded."""
    while True:
        drawn = mean if scv == 0 else float(random.gamma(1.0 / scv, mean * scv))
        yield max(1, round(drawn))


def asks(plan: Plan, cell: Cell, model: str, folder: Path) -> Iterator[Ask]:
    """The requests of a cell, without end (a replay ends with its file, texts of a file are taken round and round)."""
    random = np.random.default_rng([plan.measure.seed, cell.repeat, sum(cell.load_name.encode())])
    prompt_lengths = lengths(cell.prompt_length, cell.prompt_scv, random)
    output_lengths = lengths(cell.output_length, cell.output_scv, random)
    texts = _texts(folder / plan.prompts.file) if plan.prompts.file and plan.prompts.kind == "file" else None
    replay = _replay(folder / cell.replay, cell.speedup, plan.limits.max_rate) if cell.replay else None
    between = gaps(cell.arrival_process, cell.arrival_rate, cell.arrival_scv, random) if cell.arrival_rate else None
    at, index = 0.0, 0
    while True:
        prompt, output = next(prompt_lengths), next(output_lengths)
        if replay is not None:
            if index >= len(replay):
                return
            at, prompt, output = (
                float(replay[index][0]),
                int(replay[index][1]) or prompt,
                int(replay[index][2]) or output,
            )
        elif between is not None:
            at += next(between)
        entry = texts[index % len(texts)] if texts else {}
        output = int(entry.get("output_length") or output)
        timed = None if cell.concurrency is not None else at
        body = _body(plan, cell, model, _prompt(plan, entry, prompt, random), output)
        yield Ask(timed, prompt, output, body, str(entry["task"]) if entry.get("task") else None)
        index += 1


def _prompt(plan: Plan, entry: dict[str, Any], length: int, random: np.random.Generator) -> Any:
    if entry:
        return entry["prompt"]
    if plan.prompts.kind == "token_ids":
        low = min(10, plan.prompts.vocabulary - 1)
        return random.integers(low, plan.prompts.vocabulary, length).tolist()
    return " ".join(plan.prompts.words[i] for i in random.integers(0, len(plan.prompts.words), length))


def _body(plan: Plan, cell: Cell, model: str, prompt: Any, output: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": output,
        "temperature": dict(cell.identity).get("temperature", plan.prompts.temperature),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if plan.prompts.ignore_eos:
        body["ignore_eos"] = True
    if plan.server.endpoint == "chat":
        body["messages"] = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    return body | plan.server.extra


def _texts(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"prompts: file {path}: cannot be read as JSON lines: {error}") from None
    for line in lines:
        length = line.get("output_length", 1) if isinstance(line, dict) else None
        if not isinstance(line, dict) or not line.get("prompt") or not isinstance(length, int) or length < 1:
            allowed = "JSON lines, each with a 'prompt', and an 'output_length' that is a whole number, where given"
            raise InputError(f"prompts: file {path}: got {line!r:.60}; allowed: {allowed}")
    if not lines:
        raise InputError(f"prompts: file {path}: it is empty")
    return lines


def _replay(path: Path, speedup: float, max_rate: float | None) -> list[tuple[float, float, float]]:
    from ..traces.readers.arrivals import read, summary
    from ..traces.source import Source

    frame = read(Source(path))
    peak = summary(frame)["peak_rate"] * speedup
    if max_rate is not None and not peak <= max_rate:
        raise InputError(
            f"replay {path}: peaks at {peak:.3g} req/s, above limits: max_rate {max_rate:g}; lower speedup"
        )
    columns = [frame[name].to_numpy(float) for name in ("arrival_time", "prompt_tokens", "output_tokens")]
    times = (columns[0] - columns[0][0]) / speedup
    known = [np.where(np.isnan(values), 0.0, values) for values in columns[1:]]
    if not all(math.isfinite(value) for value in times):
        raise InputError(f"replay {path}: an arrival has no finite time")
    return list(zip(times.tolist(), known[0].tolist(), known[1].tolist(), strict=True))
