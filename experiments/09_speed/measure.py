"""Clocks of the suite: what XLA compiles is counted and timed apart, comparisons run in turns, sizes too."""

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class Compiles:
    """Programs that XLA has compiled in this process, and their seconds (without tracing and lowering)."""

    def __init__(self) -> None:
        from jax import monitoring

        self.count, self.seconds = 0, 0.0
        monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, seconds: float, **_: Any) -> None:
        if event == COMPILE_EVENT:
            self.count += 1
            self.seconds += seconds


def summary(times: list[tuple[float, float]]) -> dict[str, Any]:
    """Of repeats (seconds, seconds of CPU time of all threads): other work on the machine moves the second less."""
    wall, cpu = zip(*times, strict=True)
    return {"min_s": min(wall), "median_s": statistics.median(wall), "cpu_s": min(cpu), "repeats": len(times)}


def in_turns(calls: Mapping[Any, Callable[[], Any]], seconds: float, least: int = 3) -> dict[Any, dict[str, Any]]:
    """All ``calls`` one after the other, again and again until ``seconds`` are spent: least and median of each. A call
    that has answered is done: it waits for its arrays itself."""
    times: dict[Any, list[tuple[float, float]]] = {name: [] for name in calls}
    begin, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - begin < seconds:
        for name, call in calls.items():
            start, cpu = time.perf_counter(), time.process_time()
            call()
            times[name].append((time.perf_counter() - start, time.process_time() - cpu))
        rounds += 1
    return {name: summary(values) for name, values in times.items()}


def first_and_later(call: Callable[[], Any], compiles: Compiles, seconds: float, least: int = 3) -> dict[str, Any]:
    """A first call, what of it was XLA's compiling, and later calls, which should compile nothing."""
    count, compiled, start, cpu = compiles.count, compiles.seconds, time.perf_counter(), time.process_time()
    call()
    told = {"first_call_s": time.perf_counter() - start, "first_call_cpu_s": time.process_time() - cpu}
    told["compile_s"] = compiles.seconds - compiled
    told["programs"] = compiles.count - count
    count = compiles.count
    return told | in_turns({None: call}, seconds, least)[None] | {"programs_later": compiles.count - count}


def peak_memory_gb() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def machine() -> str:
    """Cores, architecture and Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} virtual CPU cores, {platform.machine()}, Python {platform.python_version()}"


def last_change(*paths: Path) -> dict[str, str]:
    """Date and commit that last changed ``paths``, or the whole repository."""
    command = ["git", "-C", str(HERE), "log", "-1", "--format=%cs %h", "--", *map(str, paths)]
    told = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return dict(zip(("date", "commit"), told, strict=False)) or {"date": "unknown", "commit": "unknown"}


def say(label: str, share: float) -> None:
    """Tell the parent process, which draws the bar, how far this part is."""
    sys.stderr.write(f"PROGRESS {share:.3f} {label}\n")
    sys.stderr.flush()


def exponent(sizes: Iterable[float], seconds: Iterable[float], upper: int) -> dict[str, Any]:
    """Slope of log(seconds) by log(size) over the ``upper`` largest sizes, by least squares, with its standard error:
    that of the residuals, n - 2 degrees of freedom. ``linear``: *yes* where two standard errors above the slope are at
    most 1.1, *no* where two below it are above 1, else *undecided*."""
    import numpy as np

    x, y = np.log(np.asarray([*sizes][-upper:])), np.log(np.asarray([*seconds][-upper:]))
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    residual = y - y.mean() - slope * x
    error = float(np.sqrt(residual @ residual / (len(x) - 2) / (x @ x)))
    linear = "yes" if slope + 2 * error <= 1.1 else "no" if slope - 2 * error > 1.0 else "undecided"
    return {"exponent": slope, "standard_error": error, "points_fitted": len(x), "at_most_linear": linear}
