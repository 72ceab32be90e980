"""Fits of a whole fleet: many traces, each a model of its own, over several processes.

Fits share nothing, so each process takes the next trace and works in its own memory: compiled programs are kept within
a process for every trace of the same padded shape, and on disk between processes. A trace that cannot be fitted is told
and stops nothing; a process that dies ends the run with an error, and what was finished before is not asked again.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from diffspec.fitting.deployment import FittedModel
from diffspec.fitting.fit import fit
from diffspec.results import InputError, NoResultError
from diffspec.traces import Trace

WAITING = 2
"""Traces that wait in line for each process: enough that none idles, few enough that a large fleet is not held in
memory."""


@dataclass(frozen=True)
class FittedTrace:
    """What became of one trace: ``model``, or None and the ``error``; ``seconds`` that the fit took."""

    name: str
    model: FittedModel | None
    error: str | None
    seconds: float


def fit_fleet(
    traces: Mapping[str, Callable[[], Trace]],
    *,
    processes: int = 1,
    prepare: Callable[[], None] | None = None,
    **asked: Any,
) -> Iterator[FittedTrace]:
    """Fit every trace by :func:`diffspec.fitting.fit.fit`, and give each as it is finished, in no certain order.

    * ``traces``: name -> a function without arguments that reads the trace (in the process that fits it)
    * ``processes``: that work side by side, each started anew; 1: in this one
    * ``prepare``: called once in each new process, before anything else
    * ``asked``: arguments of :func:`~diffspec.fitting.fit.fit`, the same for all

    A trace that cannot be read or fitted has an ``error`` and no ``model``. Errors: :class:`InputError` for no traces
    or no process; :class:`NoResultError`, which names the traces that were being fitted, where a process dies: the
    others that were given before are whole.
    """
    if not traces:
        raise InputError("fleet: got no trace; allowed: at least one")
    if processes < 1:
        raise InputError(f"processes: got {processes}; allowed: at least 1")
    if processes == 1:
        for name, read in traces.items():
            yield _fit_one(name, read, asked)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(traces)), context, initializer=prepare) as pool:
        left: list[str] = list(traces)[::-1]
        running: dict[Future, str] = {}
        while left or running:
            try:
                while left and len(running) < WAITING * processes:
                    running[pool.submit(_fit_one, left[-1], traces[left[-1]], asked)] = left[-1]
                    left.pop()
            except BrokenProcessPool:  # what was finished before comes first
                if not running:
                    raise _died(left[-1:]) from None
            finished = wait(running, return_when=FIRST_COMPLETED).done
            for done in sorted(finished, key=lambda future: future.exception() is not None):
                if isinstance(done.exception(), BrokenProcessPool):
                    raise _died(running.values()) from None
                running.pop(done)
                yield done.result()


def _died(names: Iterable[str]) -> NoResultError:
    names = ", ".join(names)
    return NoResultError(
        f"fleet: a process died (killed, or out of memory) while it fitted one of {names}; what was finished is kept: "
        "the same command goes on from there"
    )


def _fit_one(name: str, read: Callable[[], Trace], asked: Mapping[str, Any]) -> FittedTrace:
    start = time.perf_counter()
    try:
        model = fit(read(), **asked)
    except (InputError, NoResultError) as error:
        return FittedTrace(name, None, str(error), time.perf_counter() - start)
    except Exception as error:  # a fault of one trace must not stop the fleet
        return FittedTrace(name, None, f"{type(error).__name__}: {error}", time.perf_counter() - start)
    return FittedTrace(name, model, None, time.perf_counter() - start)
