"""One cell: warm up, measure in a steady window, stop by count, time or confidence, and let nothing leak out of it.

Load goes on until the last measured request is complete, so that every measured request meets the stated load from its
arrival to its end; what is then still in flight is cancelled. A cell that ends before (its mean is known, its time or a
cap is reached) counts the requests up to the first that was still in flight, and its window ends there. Requests
arriving before the window are warm-up, after it cool-down; both are recorded and neither is counted.
"""

import asyncio
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..results import NoResultError
from .client import Sent, send
from .load import Ask
from .plan import Cell, Plan

if TYPE_CHECKING:
    import aiohttp

WARM_UP = 3.0
"""Mean latencies after the start before the measured window may begin."""
SETTLED = 2.0
"""The warm-up is over when the means of the two halves of its latest requests differ by less than this factor."""
STALL = 5.0
"""Seconds by which the client may be late before its cell is ended."""
QUICK = 10.0
"""Seconds after which a scrape of /metrics is given up."""
GIVE_UP = 8
"""Failures without a single success after which a cell is ended."""
BATCHES = 12
T_95 = 2.201
"""Two-sided 95 % quantile of Student's t with 11 degrees of freedom, for 12 batch means."""


@dataclass
class Run:
    """What a cell left: every request that came to an end, the arrivals of those that were cut off, the window [s after
    it began], snapshots of /metrics as (time, text), the client's CPU seconds, and why it ended."""

    sent: list[Sent] = field(default_factory=list)
    cut_off: list[float] = field(default_factory=list)
    window: tuple[float, float] = (math.nan, math.nan)
    scrapes: list[tuple[float, str]] = field(default_factory=list)
    cpu_seconds: float = 0.0
    began_unix: float = 0.0
    ended: str = "requests"

    @property
    def measured(self) -> list[Sent]:
        """Requests that arrived in the window."""
        return [item for item in self.sent if item.phase == "measured"]


def relative_half_width(latencies: list[float]) -> float:
    """Half width of the 95 % confidence interval of the mean over the mean, from 12 means of consecutive batches
    (consecutive requests share the server, so single latencies are not independent); infinite below 24 values.

    >>> relative_half_width([1.0] * 24)
    0.0
    """
    size = len(latencies) // BATCHES
    if size < 2:
        return math.inf
    used = latencies[len(latencies) - size * BATCHES :]
    means = [statistics.fmean(used[index * size : (index + 1) * size]) for index in range(BATCHES)]
    return T_95 * statistics.stdev(means) / math.sqrt(BATCHES) / statistics.fmean(means)


def scrapes_text(began_unix: float, scrapes: list[tuple[float, str]]) -> str:
    """Scrapes as one text: each after a line ``# scrape <unix time>``, which comments keep a valid exposition."""
    return "".join(f"# scrape {began_unix + at:.3f}\n{text.rstrip()}\n" for at, text in scrapes)


@dataclass
class Allowance:
    """Requests that may still be sent in this collection; one is taken at every launch."""

    left: int


class _Cell:
    """State of one cell while it runs."""

    def __init__(
        self,
        plan: Plan,
        cell: Cell,
        http: "aiohttp.ClientSession",
        url: str,
        requests: Iterator[Ask],
        allowance: Allowance,
    ):
        self.plan, self.cell, self.http, self.requests, self.allowance = plan, cell, http, requests, allowance
        self.chat = plan.server.endpoint == "chat"
        self.url = url + ("/v1/chat/completions" if self.chat else "/v1/completions")
        self.least = cell.requests or plan.measure.requests
        self.most = plan.requests(cell)
        self.run = Run()
        self.began = time.perf_counter()
        self.launched: list[tuple[float, asyncio.Task]] = []
        self.in_order: list[asyncio.Task] = []
        self.complete = 0
        self.prefix: list[float] = []
        self.finished: list[Sent] = []
        self.arrivals_measured = 0
        self.opened = self.closed = math.nan
        self.over = asyncio.Event()
        self.exhausted = False

    def now(self) -> float:
        return time.perf_counter() - self.began

    def spent(self) -> bool:
        """Whether the cap on requests is reached; then the cell ends with what is complete."""
        if self.allowance.left <= 0:
            self._end("max_requests")
        return self.over.is_set()

    def launch(self, ask: Ask, arrival: float) -> asyncio.Task:
        phase = self._phase(arrival)
        task = asyncio.ensure_future(self._one(ask, arrival, phase))
        self.allowance.left -= 1
        self.launched.append((arrival, task))
        if phase == "measured":
            self.in_order.append(task)
        return task

    def _phase(self, arrival: float) -> str:
        if math.isnan(self.opened):
            done = [item.latency for item in self.finished if item.ok]
            warm = len(done) >= self.plan.measure.warmup_requests
            if done and warm:
                latest = done[-max(2 * GIVE_UP, self.plan.measure.warmup_requests) :]
                halves = [
                    statistics.fmean(half)
                    for half in (latest[: len(latest) // 2] or latest, latest[-(len(latest) // 2) :])
                ]
                warm = arrival >= WARM_UP * halves[1] and max(halves) < SETTLED * min(halves)
            if not warm and self.plan.measure.warmup_requests > 0:
                return "warmup"
            self.opened = arrival
        if not math.isnan(self.closed):
            return "cooldown"
        if self.arrivals_measured >= self.most:
            self.closed = arrival
            return "cooldown"
        self.arrivals_measured += 1
        return "measured"

    async def _one(self, ask: Ask, arrival: float, phase: str) -> Sent:
        sent = await send(self.http, self.url, self.chat, ask, arrival, self.began)
        sent.phase = phase
        self.finished.append(sent)
        asyncio.get_running_loop().call_soon(self._judge)
        return sent

    def _judge(self) -> None:
        """End the cell when what was asked for is complete."""
        while self.complete < len(self.in_order) and (task := self.in_order[self.complete]).done():
            if not task.cancelled() and task.result().ok:
                self.prefix.append(task.result().latency)
            self.complete += 1
        until = self.plan.measure.until
        if len(self.finished) >= GIVE_UP and not any(item.ok for item in self.finished):
            self._end("failures")
        elif self.arrivals_measured >= self.most and self.complete == len(self.in_order):
            self._end("requests")
        elif self.exhausted and len(self.finished) == len(self.launched):
            self._end("replayed")
        elif until is not None and len(self.prefix) >= self.least and relative_half_width(self.prefix) <= until:
            self._end("confidence")

    def _end(self, why: str) -> None:
        if not self.over.is_set():
            self.run.ended = why
            self.over.set()


async def drive(
    plan: Plan,
    cell: Cell,
    http: "aiohttp.ClientSession",
    url: str,
    requests: Iterator[Ask],
    allowance: Allowance,
    on_progress: Callable[[float], None] | None = None,
    on_sent: Callable[[Sent], None] | None = None,
) -> Run:
    """Measure one cell within `allowance`. `on_progress` gets the share done; `on_sent` every request as
    it completes (or fails)."""
    state = _Cell(plan, cell, http, url, requests, allowance)
    state.run.began_unix = time.time()
    cpu = time.process_time()
    helpers: list[asyncio.Future[None]] = [asyncio.ensure_future(_watch(state, on_progress))]
    if plan.server.metrics:
        helpers.append(asyncio.ensure_future(_scrape(state, http, url)))
    feed = asyncio.ensure_future(_open_loop(state) if cell.concurrency is None else _closed_loop(state))
    over: asyncio.Future[Any] = asyncio.ensure_future(state.over.wait())
    told = 0

    def tell() -> None:
        nonlocal told
        while on_sent is not None and told < len(state.finished):
            on_sent(state.finished[told])
            told += 1

    try:
        while not state.over.is_set():
            await asyncio.wait([over], timeout=0.2)
            tell()
            if feed.done() and feed.exception() is not None:
                raise feed.exception()  # type: ignore[misc]
    finally:
        feed.cancel()
        tasks = [task for _, task in state.launched]
        for task in tasks:
            task.cancel()
        await asyncio.gather(feed, *tasks, return_exceptions=True)
        for task in (*helpers, over):
            task.cancel()
        tell()
        await asyncio.wait([*helpers, over])
    if plan.server.metrics:
        await _scrape_once(state, http, url)
    run = state.run
    run.cpu_seconds = time.process_time() - cpu
    run.sent = sorted(state.finished, key=lambda item: item.arrival)
    _close_window(run, state)
    if run.ended == "failures":
        reason = next((item.error for item in run.sent if item.error), "no answer")
        raise NoResultError(f"cell {cell.name}: the first {len(run.sent)} requests all failed: {reason}")
    return run


def _close_window(run: Run, state: _Cell) -> None:
    """The window runs from the first measured arrival to the first arrival that is not counted: of a cool-down request,
    or of the first measured one that was cut off (those after it are cool-down); where there is none, one mean gap
    after the last, or in a closed loop the last completion, which the next would follow."""
    run.cut_off = [arrival for arrival, task in state.launched if task.cancelled()]
    end = state.closed
    for arrival, task in state.launched:
        if arrival >= state.opened and task.cancelled():
            end = arrival if math.isnan(end) else min(end, arrival)
            break
    for item in run.measured:
        if item.arrival >= end:
            item.phase = "cooldown"
    counted = [item.arrival for item in run.measured]
    if math.isnan(end) and counted and state.cell.concurrency is not None:  # the next would follow a completion
        end = max(item.completion or item.arrival for item in run.measured)
    elif math.isnan(end) and counted:
        end = counted[-1] + (counted[-1] - counted[0]) / max(len(counted) - 1, 1)
    run.window = (state.opened, end)


async def _open_loop(state: _Cell) -> None:
    """Send each request when it is due, whatever the server does."""
    for ask in state.requests:
        due = ask.at or 0.0
        while (wait := due - state.now()) > 0:
            await asyncio.sleep(wait)
        if state.now() - due > STALL:
            state._end("stalled")
        if state.spent():
            return
        state.launch(ask, due)
    state.exhausted = True
    state._judge()


async def _closed_loop(state: _Cell) -> None:
    """Keep `concurrency` requests in flight. A server so fast that this sends more than the cap on the rate (beyond one
    burst of `concurrency`) ends the cell: held back, it would be another load than the one stated."""
    users, rate = state.cell.concurrency or 1, state.plan.limits.max_rate or math.inf

    async def place() -> None:
        for ask in state.requests:
            if len(state.launched) > users + rate * state.now():
                if state.finished and state.finished[-1].ok:
                    state._end("max_rate")
                else:  # a server that refuses at once is no fast one
                    await asyncio.sleep(1.0 / rate)
            if state.spent():
                return
            await asyncio.wait([state.launch(ask, state.now())])

    await asyncio.gather(*(place() for _ in range(users)))


async def _watch(state: _Cell, on_progress: Callable[[float], None] | None) -> None:
    """Report progress and keep the time limit."""
    limit = state.plan.measure.most_seconds
    while True:
        done = state.complete / state.most
        if on_progress is not None:
            on_progress(min(max(done, state.now() / limit if state.now() > limit / 2 else 0.0), 1.0))
        if state.now() > limit:
            state._end("time")
            return
        await asyncio.sleep(0.25)


async def _scrape(state: _Cell, http: "aiohttp.ClientSession", url: str) -> None:
    while True:
        await _scrape_once(state, http, url)
        await asyncio.sleep(state.plan.measure.scrape_seconds)


async def _scrape_once(state: _Cell, http: "aiohttp.ClientSession", url: str) -> None:
    import aiohttp

    try:
        timeout = aiohttp.ClientTimeout(total=QUICK)
        async with http.get(url + "/metrics", allow_redirects=False, timeout=timeout) as response:
            if response.status == 200:
                state.run.scrapes.append((state.now(), await response.text()))
    except (aiohttp.ClientError, OSError, TimeoutError, UnicodeDecodeError):
        pass  # a server without metrics is measured all the same
