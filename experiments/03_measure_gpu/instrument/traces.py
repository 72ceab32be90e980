"""Open-loop runs of the serving loop: pace the engine, choose rates, run the cells, write requests and points."""

import math
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from .engine import TorchEngine
from .grid import Budget, Pace, TraceCell
from .loop import Lane, Load, Settings, WallClock, serve
from .session import Session
from .tables import POINT_COLUMNS, REQUEST_COLUMNS, STEP_COLUMNS, Table, operating_point, request_rows, step_rows

PACE_COLUMNS = (
    *("deployment", "draft_length", "acceptance", "prompt_length", "output_length", "capacity", "decoding", "lanes"),
    "step_time_s",
)
LEAST_SECONDS = 5.0
"""No cell of a campaign is shorter."""


def pace(session: Session, engine: TorchEngine, prompt: int, output: int, k: int, repeats: int = 5) -> dict:
    """Measured wall time [s] of whole steps, {(decoding, lanes): median}, at the mean context of a request."""
    most, cached = engine.limits.requests, prompt + output // 2
    small = sorted({1, max(1, most // 16), max(1, most // 4), most})
    times = {}
    for decoding, lanes in [(each, 0) for each in small] + [(most, each) for each in (1, 2, 4)]:
        requests = [(slot, cached) for slot in range(decoding)]
        chunks = [Lane(most - 1, 0, engine.chunk)] * lanes
        engine.prepare(decoding, lanes, k)
        taken = []
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            engine.step(requests, chunks, k)
            taken.append(time.perf_counter() - begun)
        times[decoding, lanes] = float(np.median(taken[1:]))
    session.tell(f"k = {k}: step {1e3 * times[small[0], 0]:.2f} ms for 1, {1e3 * times[most, 0]:.2f} ms for {most}")
    return times


class Campaign:
    """The open-loop runs of one verifier and drafter."""

    def __init__(self, session: Session, engine: TorchEngine, hardware: str, batched_tokens: int, window: float):
        self.session, self.engine, self.window, self.batched_tokens = session, engine, window, batched_tokens
        verifier, drafter = engine.verifier.shape, engine.drafter.shape
        self.verifier, self.drafter = verifier, drafter
        self.identity: dict[str, Any] = {
            "deployment": f"instrument/{session.name}/{verifier.name}+{drafter.name}".replace(" ", "-"),
            "engine": "diffspec instrument",
            "hardware": hardware,
            "verifier": verifier.name,
            "workload": "random tokens",
            "verifier_params": verifier.params,
            "num_experts": verifier.experts or None,
            "experts_per_token": verifier.experts_per_token or None,
            "kv_bytes_per_token": verifier.kv_bytes_per_token(engine.verifier.dtype.itemsize),
            "kv_capacity_tokens": engine.limits.requests * engine.limits.rows,
        }
        self.points = session.table("operating_points", POINT_COLUMNS, ("run",))
        # rows of a run that was cut off before its point was written
        finished = {row["run"] for row in self.points.rows}
        self.requests = session.table("requests", REQUEST_COLUMNS).keep(lambda row: row["run"] in finished)
        self.steps = session.table("steps", STEP_COLUMNS).keep(lambda row: row["run"] in finished)
        self.paces = session.table("pace", PACE_COLUMNS)
        self.times: dict[tuple[int, int, int], dict[tuple[int, int], float]] = {}

    def run(self, cells: Iterable[TraceCell], budget: Budget) -> None:
        """Run the cells that the table has not yet, as far as the budget goes."""
        for number, cell in enumerate(cells):
            if self.points.has(run=cell.name):
                continue
            if not budget.allows(LEAST_SECONDS):
                self.session.skip(cell.name, "budget", f"{budget.left():.1f} s left")
                continue
            try:
                pace = self._pace(cell)
            except Exception as error:
                self.session.failed(cell.name, error)
                continue
            capacity = pace.capacity(cell.prompt_length, cell.output_length)
            rate = cell.fraction * capacity
            latency = pace.latency(rate, cell.prompt_length, cell.output_length)
            load = plan(cell, rate, latency, self.window)
            busy = 1.0 - math.exp(-rate * latency)  # idle spells are skipped
            estimate = busy * ((load.warm_up + load.requests) / rate + 2 * latency) + 1.0
            run = partial(self._measure, cell, load, number, budget)
            self.session.attempt(cell.name, budget, estimate, run)

    def _pace(self, cell: TraceCell) -> Pace:
        k, most = cell.draft_length, self.engine.limits.requests
        key = (k, cell.prompt_length, cell.output_length)
        fresh = key not in self.times
        if fresh:
            self.times[key] = pace(self.session, self.engine, cell.prompt_length, cell.output_length, k)
        times = self.times[key]
        alone = {decoding: seconds for (decoding, lanes), seconds in times.items() if not lanes}
        full = {lanes: seconds for (decoding, lanes), seconds in times.items() if decoding == most}
        found = Pace(alone, full, self.engine.chunk, k, cell.acceptance)
        if fresh:
            head = {"deployment": self.identity["deployment"], "draft_length": k, "acceptance": cell.acceptance}
            head |= {"prompt_length": cell.prompt_length, "output_length": cell.output_length}
            head["capacity"] = found.capacity(cell.prompt_length, cell.output_length)
            self.paces.add(*(dict(head, decoding=d, lanes=n, step_time_s=seconds) for (d, n), seconds in times.items()))
        return found

    def _measure(self, cell: TraceCell, load: Load, number: int, budget: Budget) -> None:
        settings = Settings(self.engine.limits.requests, self.batched_tokens, (cell.acceptance,) * cell.draft_length)
        seed = 1000 * (cell.repeat + 1) + number
        # an overloaded run goes on for four times as long as its arrivals should take, and then counts what failed
        longest, left = 4.0 * (load.warm_up + load.requests) / load.arrival_rate + 1.0, max(budget.left(), 1.0)
        run = serve(self.engine, WallClock(), load, settings, seed, min(longest, left))
        if not run.complete and left < longest:
            self.session.skip(cell.name, "budget", f"cut off after {run.seconds:.1f} s")
            return
        row = self.identity | {"run": cell.name, "load_fraction": cell.fraction, "seed": seed}
        if cell.draft_length:
            row |= {"drafter": self.drafter.name, "drafter_params": self.drafter.params}
            row["drafter_layers"] = self.drafter.layers
        row |= operating_point(run, load, settings)
        # the point comes last: with it in the table the cell counts as done
        self.requests.add(*request_rows(run, row))
        self.steps.add(*step_rows(run, cell.name))
        self.points.add(row)
        self.session.tell(
            f"{cell.name}: {load.arrival_rate:.2f} req/s, {row['n_requests']} of {load.requests} requests, batch "
            f"{row.get('effective_batch_size', float('nan')):.1f}, e2e {row.get('e2e_mean', float('nan')):.3f} s"
        )


def plan(cell: TraceCell, rate: float, latency: float, window: float) -> Load:
    """Warm up for about two mean latencies, then measure the requests of about `window` seconds: at least 40, and at
    least five latencies' worth, so that the run counts as stationary (rate * e2e / requests <= 0.25)."""
    warm_up = max(5, round(2 * rate * latency))
    requests = max(40, round(rate * max(window, 5 * latency)))
    return Load(rate, warm_up, requests, cell.prompt_length, cell.output_length, cell.drawn)


def summary(table: Table) -> list[str]:
    """A short table of the operating points, times in milliseconds."""
    lines = [f"{'run':<26}{'req/s':>8}{'batch':>7}{'tok/step':>9}{'ttft':>9}{'itl':>8}{'tpot':>8}{'e2e':>9}{'fail':>5}"]
    for row in table.rows:
        shown = [f"{1e3 * float(row[f'{metric}_mean'] or 'nan'):.1f}" for metric in ("ttft", "itl", "tpot", "e2e")]
        widths = zip(shown, (9, 8, 8, 9), strict=True)
        lines.append(
            f"{row['run']:<26}{float(row['arrival_rate']):>8.2f}{float(row['effective_batch_size'] or 'nan'):>7.1f}"
            f"{float(row['tokens_per_step'] or 1):>9.2f}"
            + "".join(f"{text:>{w}}" for text, w in widths)
            + f"{row['failed']:>5}"
        )
    return lines
