"""The verb `collect`: a plan is carried out against a server, cell by cell, and becomes a trace."""

import asyncio
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ..results import InputError, NoResultError, TraceError
from ..traces.schema import PERCENTILES
from ..traces.windows import Windows
from .client import Sent, session
from .drive import QUICK, Allowance, Run, drive, relative_half_width, scrapes_text
from .load import asks
from .plan import Cell, Plan
from .record import Recorder

Progress = Callable[[str, float], None]
MOST_LOST = 0.05
"""Share of failed requests among the measured above which a cell counts as failed."""
LATE = 0.005
"""Send lag [s] at the 99th percentile beyond which the client itself is called slow."""


@dataclass(frozen=True)
class Collected:
    """What `collect` did: `rows` of all finished cells by name, those `measured` now, those `kept` from before, the
    `failed` cells with the reason, `warnings`, and the client's own cost: CPU seconds and send lag a request."""

    out: Path
    rows: dict[str, dict[str, Any]]
    measured: list[str]
    kept: list[str]
    failed: dict[str, str]
    warnings: list[str]
    client: dict[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; `cells` are the rows in the order they were finished."""
        return {
            "out": str(self.out),
            "table": str(self.out / "operating_points.csv"),
            "cells": list(self.rows.values()),
            "measured": self.measured,
            "kept": self.kept,
            "failed": self.failed,
            "client": self.client,
            "warnings": self.warnings,
        }


def check_url(url: str | None) -> str:
    """The server's address without a trailing slash or /v1. Raises `InputError` unless it is http(s) with a host."""
    parts = urlsplit(url or "")
    try:
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise InputError(f"url: got {url!r}; allowed: the address of the server, such as http://127.0.0.1:8000")
    return (url or "").rstrip("/").removesuffix("/v1").rstrip("/")


def check_files(plan: Plan, beside: Path) -> None:
    """Read the files that the plan names (arrivals, prompts), before anything is sent. Raises `InputError`."""
    for cell in plan.cells():
        next(asks(plan, cell, "", beside), None)


def collect(plan: Plan, out: Path, *, beside: Path = Path(), progress: Progress | None = None) -> Collected:
    """Carry out `plan` against its server and write the trace under `out` (see `record`); cells finished before are not
    measured again. `beside` is the folder in which files that the plan names are looked for.

    Raises `InputError` for an address or folder that cannot be used, and `NoResultError` when the server does not
    answer. A cell that fails is reported and the rest is measured."""
    url = check_url(plan.server.url)
    check_files(plan, beside)
    recorder = Recorder(out, plan)
    recorder.open()
    return asyncio.run(_collect(plan, url, recorder, beside, progress or (lambda what, share: None)))


async def _collect(plan: Plan, url: str, recorder: Recorder, beside: Path, progress: Progress) -> Collected:
    rows = recorder.rows()
    cells = plan.cells()
    kept = [cell.name for cell in cells if cell.name in rows]
    todo = [cell for cell in cells if cell.name not in rows]
    measured, failed, warnings, costs = [], {}, [], []
    length = sum(plan.seconds(cell) for cell in todo) or 1.0
    spent, allowance = 0.0, Allowance(plan.limits.max_requests or 0)
    async with session(plan.server, dict(os.environ)) as http:
        model, engine = await _ask_server(http, url, plan) if todo else ("", None)
        for cell in todo:
            share, weight = spent / length, plan.seconds(cell) / length
            recorder.start(cell, {"url": url, "model": model, "began_unix": time.time(), "engine": engine})

            def tell(done: float, share=share, weight=weight, name=cell.name) -> None:
                progress(name, share + weight * done)

            try:
                run = await drive(
                    plan,
                    cell,
                    http,
                    url,
                    asks(plan, cell, model, beside),
                    allowance,
                    tell,
                    lambda done, cell=cell: recorder.add(cell, done),
                )
                row, notes, cost = operating_point(plan, cell, run, {"verifier": model, "engine": engine})
            except NoResultError as error:
                failed[cell.name] = str(error)
                continue
            recorder.finish(cell, run, row)
            rows[cell.name] = row
            measured.append(cell.name)
            warnings += [f"{cell.name}: {note}" for note in notes]
            costs.append(cost)
            spent += plan.seconds(cell)
            await asyncio.sleep(plan.measure.settle_seconds if cell is not todo[-1] else 0)
    if failed and not rows:
        raise NoResultError("; ".join(failed.values()))
    recorder.write_tables()
    return Collected(recorder.out, rows, measured, kept, failed, warnings, _client(costs))


async def _ask_server(http, url: str, plan: Plan) -> tuple[str, str | None]:
    """The model to ask for and the engine's version, as the server tells them."""
    listed = await _json(http, url + "/v1/models")
    told = await _json(http, url + "/version")
    engine = f"vLLM {told['version']}" if isinstance(told, dict) and told.get("version") else None
    if plan.server.model is not None:
        return plan.server.model, engine
    data = listed.get("data") if isinstance(listed, dict) else None
    names = [entry["id"] for entry in data or [] if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    if len(names) != 1:
        raise InputError(f"server: model: the server lists {', '.join(names) or 'no model'}; name one in the plan")
    return names[0], engine


async def _json(http, url: str) -> Any:
    """What an address answers, {} where it has nothing to say. Raises `NoResultError` when nobody answers, or the key
    is refused."""
    import aiohttp

    try:
        async with http.get(url, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=QUICK)) as response:
            if response.status in (401, 403):
                raise NoResultError(f"{url}: HTTP {response.status}; name the key's variable in the plan: api_key_env")
            return await response.json(content_type=None) if response.status == 200 else {}
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise NoResultError(f"{url} does not answer: {error or type(error).__name__}; is the server running?") from None
    except ValueError:
        return {}


def operating_point(
    plan: Plan, cell: Cell, run: Run, server: dict[str, Any]
) -> tuple[dict[str, Any], list[str], dict[str, float]]:
    """The row of one cell [s, tok, req/s], notes for the reader, and the client's own cost.

    Means are over the requests of the window, throughput and the mean number in the system over its time; gaps between
    chunks come from the stream itself; acceptance comes from the engine's counters over the window, where it has them.
    Raises `NoResultError` when no measured request was completed."""
    good = [sent for sent in run.measured if sent.ok]
    if run.ended in ("max_rate", "stalled"):
        raise NoResultError(f"cell {cell.name}: ended by {_ends(plan)[run.ended]}")
    if not good:
        reason = next((sent.error for sent in run.sent if sent.error), _ends(plan).get(run.ended, "none arrived"))
        done = [sent.completion for sent in run.sent if sent.ok and sent.completion is not None]
        if done and not run.measured:
            reason += (
                f"; latencies had not settled after {len(done)} of {len(run.sent) + len(run.cut_off)} requests, "
                f"{len(done) / max(done):.3g} completed per second: overloaded?"
            )
        raise NoResultError(f"cell {cell.name}: no measured request was completed: {reason}")
    lost = len(run.measured) - len(good)
    if lost > MOST_LOST * len(run.measured):
        reason = next((sent.error for sent in run.measured if sent.error), "no answer")
        raise NoResultError(f"cell {cell.name}: {lost} of {len(run.measured)} measured requests failed: {reason}")
    start, end = run.window[0], max(run.window[1], run.window[0] + 1e-6)
    windows = Windows([(start, end)])
    windows.add(_arrays(run.sent))
    observed = windows.row(0)
    observed["effective_batch_size"] += sum(max(end - max(at, start), 0.0) for at in run.cut_off) / (end - start)
    gaps = np.concatenate([np.diff(sent.events) for sent in good])
    notes = [f"{lost} of {len(run.measured)} measured requests failed"] if lost else []
    if any(sent.prompt_tokens is None for sent in good):
        notes.append("the server sends no usage.prompt_tokens: prompt_length is what was asked for, not counted")
    if cell.output_length > 1 and not gaps.sum() > 0:
        notes.append("the answers came all at once, not streamed: ttft, itl and tpot are left out")
        observed = {name: value for name, value in observed.items() if not name.startswith(("ttft_", "tpot_"))}
    elif len(gaps):
        observed["itl_mean"] = float(gaps.mean())
        observed |= {f"itl_{p}": float(np.percentile(gaps, int(p[1:]))) for p in PERCENTILES}
    row: dict[str, Any] = {"run": cell.name, "deployment": plan.identity.get("verifier") or server["verifier"]}
    row |= {name: value for name, value in server.items() if value is not None}
    row |= _engine_side(run, notes)
    if cell.concurrency is not None:
        row["concurrency"] = cell.concurrency
        # Each launch follows a completion, so launches count completions without the waves that cross the edges.
        observed["throughput"] = windows.offered(0)[0]
    else:
        offered, scv = windows.offered(0)
        row["arrival_rate"] = cell.arrival_rate if cell.arrival_rate is not None else offered
        row["offered_rate"] = offered
        row["arrival_process"] = None if cell.replay else cell.arrival_process
        row["arrival_scv"] = _scv(cell, scv)
    row |= {**observed, "window": "steady"}
    row |= {"failed": lost, "temperature": plan.prompts.temperature}
    _agree(plan, row)
    notes += _replaced(plan, row)
    row |= plan.identity
    row |= dict(cell.identity)
    row["run"] = f"{plan.identity['run']}__{cell.name}" if plan.identity.get("run") else cell.name
    if row.get("draft_length") == 0:
        row.setdefault("method", "none")
    if run.ended in _ends(plan):
        notes.append(f"ended by {_ends(plan)[run.ended]} after {len(good)} measured requests")
    width = relative_half_width([sent.latency for sent in good])
    if plan.measure.until is not None and not width <= plan.measure.until:
        known = f"known to {width:.1%} only" if math.isfinite(width) else "from too few requests to say how well known"
        notes.append(f"the mean latency is {known}, not to {plan.measure.until:.1%}")
    lag = np.array([sent.sent - sent.arrival for sent in run.sent])
    cost = {
        "cpu_seconds_per_request": run.cpu_seconds / max(len(run.sent), 1),
        "send_lag_p99": float(np.percentile(lag, 99)),
    }
    if cost["send_lag_p99"] > LATE:
        notes.append(
            f"the client was late: 1 % of requests left {cost['send_lag_p99'] * 1000:.0f} ms or more after their time"
        )
    return {name: value for name, value in row.items() if not _missing(value)}, notes, cost


def _agree(plan: Plan, row: dict[str, Any]) -> None:
    """Raise `NoResultError` when the engine counted drafts of another length than the plan states."""
    stated, counted = plan.identity.get("draft_length"), row.get("draft_length")
    if stated is not None and counted is not None and stated != counted:
        raise NoResultError(
            f"the plan says draft_length {stated}, the engine's counters {counted}; mend the plan's identity, or leave "
            "draft_length out"
        )


def _replaced(plan: Plan, row: dict[str, Any]) -> list[str]:
    """A line for every value that the server told and the plan's identity replaces; names are the plan's to give.
    Raises `NoResultError` for what was measured, and for a method that contradicts the drafts counted."""
    names = ("deployment", "run", "verifier")
    stated = {name: value for name, value in plan.identity.items() if name not in names and value is not None}
    measured = [name for name in stated if name in ("tokens_per_step", "position_acceptance") and name in row]
    if measured:
        raise NoResultError(f"the plan's identity states {', '.join(measured)}, which the engine counts; leave it out")
    if stated.get("method") == "none" and row.get("draft_length"):
        raise NoResultError(
            f"the plan says method none, the engine drafts {row['draft_length']} tokens a step; mend the identity"
        )
    return [
        f"{name} is {value} by the plan, {row[name]} by the server; the plan's is kept"
        for name, value in stated.items()
        if name in row and str(row[name]) != str(value)
    ]


def _ends(plan: Plan) -> dict[str, str]:
    """What may end a cell before it is complete, in words."""
    return {
        "time": f"most_seconds {plan.measure.most_seconds:g}",
        "max_requests": f"limits: max_requests {plan.limits.max_requests}",
        "max_rate": f"limits: max_rate {plan.limits.max_rate}, which the server outpaces in this closed loop",
        "stalled": "a client that fell behind its arrivals",
    }


def _scv(cell: Cell, measured: float) -> float | None:
    fixed = {"poisson": 1.0, "constant": 0.0, "gamma": cell.arrival_scv}
    return measured if cell.replay else fixed[cell.arrival_process]


def _engine_side(run: Run, notes: list[str]) -> dict[str, Any]:
    """Acceptance, waiting, KV use and preemptions over the window, from the scrapes around it."""
    if len(run.scrapes) < 2:
        return {}
    from ..traces.readers import counters, prometheus

    start, end = run.window
    before = max((i for i, (at, _) in enumerate(run.scrapes) if at <= start), default=0)
    after = min((i for i, (at, _) in enumerate(run.scrapes) if at >= end), default=len(run.scrapes) - 1)
    if after <= before:
        return {}
    try:
        shots = prometheus.parse(scrapes_text(run.began_unix, run.scrapes[before : after + 1]), "/metrics")
        row, _ = counters.operating_point(shots[0], shots[-1], between=shots[1:-1])
    except TraceError as error:
        notes.append(f"/metrics cannot be used: {error}")
        return {}
    names = ("tokens_per_step", "draft_acceptance_rate", "position_acceptance", "draft_length", "waiting_mean")
    return {name: row[name] for name in (*names, "kv_usage_mean", "preemptions") if row.get(name) is not None}


def _arrays(sent: list[Sent]) -> dict[str, np.ndarray]:
    def column(value: Callable[[Sent], float | int | None]) -> np.ndarray:
        return np.array([math.nan if (got := value(item)) is None else got for item in sent], float)

    return {
        "arrival_time": column(lambda item: item.arrival),
        "schedule_time": np.full(len(sent), math.nan),
        "first_token_time": column(lambda item: item.events[0] if item.events else None),
        "completion_time": column(lambda item: item.completion),
        "prompt_tokens": column(
            lambda item: item.prompt_tokens if item.prompt_tokens is not None else item.asked_prompt
        ),
        "output_tokens": column(lambda item: item.output_tokens),
        "drafted_tokens": np.full(len(sent), math.nan),
        "accepted_tokens": np.full(len(sent), math.nan),
        "stream_events": np.full(len(sent), math.nan),
        "ok": np.array([float(item.ok) for item in sent]),
    }


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _client(costs: list[dict[str, float]]) -> dict[str, float | None]:
    if not costs:
        return {"cpu_seconds_per_request": None, "send_lag_p99": None}
    return {
        "cpu_seconds_per_request": float(np.mean([cost["cpu_seconds_per_request"] for cost in costs])),
        "send_lag_p99": float(max(cost["send_lag_p99"] for cost in costs)),
    }
