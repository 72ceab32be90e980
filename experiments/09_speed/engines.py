"""The same reduction on Dask and on Ray, on one machine: seconds to start, to summarise, and peak memory.

Run `python experiments/09_speed/engines.py` where diffspec[scale] and `ray[data]` are installed (Ray is no dependency;
without it Dask alone is measured). The requests are *synthetic*, a log without a stated load in files of a million
rows. Each engine works in a process of its own with two workers, in turns. Of the repeats the least time is kept, and
the most memory: the largest sum of the resident memory of that process and all its children (pages they share count
for each).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
ENGINES = ("dask", "ray tasks", "ray data")
WORKERS = 2


class Memory:
    """Largest sum of resident memory of a process and its children [B], looked at every 50 ms, and the CPU time of
    all of them [s]."""

    def __init__(self, pid: int):
        self.root, self.peak, self.ended = psutil.Process(pid), 0, threading.Event()
        self.cpu: dict[int, float] = {}
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.ended.wait(0.05):
            total = 0
            try:
                for process in (self.root, *self.root.children(recursive=True)):
                    try:
                        total += process.memory_info().rss
                        self.cpu[process.pid] = sum(process.cpu_times()[:2])
                    except psutil.Error:  # it has just ended
                        continue
            except psutil.Error:
                return
            self.peak = max(self.peak, total)

    def stop(self) -> int:
        """End looking; the peak."""
        self.ended.set()
        self.thread.join()
        return self.peak


@contextmanager
def ray_tasks() -> Iterator[Callable[..., Any]]:
    """A `scale.Runner` of Ray tasks, as many at once as Dask gets."""
    import ray

    ray.init(num_cpus=WORKERS, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    remote = ray.remote(max_retries=3)(lambda function, item, *shared: function(item, *shared))

    def run(function: Callable[..., Any], items: Sequence[Any], *shared: Any) -> Iterator[tuple[int, Any]]:
        given = [ray.put(value) for value in shared]
        waiting, running = list(enumerate(items))[::-1], {}
        while waiting or running:
            while waiting and len(running) < 3 * WORKERS:
                place, item = waiting.pop()
                running[remote.remote(function, item, *given)] = place
            done, _ = ray.wait(list(running), num_returns=1)
            for task in done:
                yield running.pop(task), ray.get(task)

    try:
        yield run
    finally:
        ray.shutdown()


@contextmanager
def ray_data() -> Iterator[Callable[..., Any]]:
    """A `scale.Runner` of a Ray Data set whose rows are the partitions."""
    import ray

    ray.init(num_cpus=WORKERS, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False

    def run(function: Callable[..., Any], items: Sequence[Any], *shared: Any) -> Iterator[tuple[int, Any]]:
        import pickle

        given = ray.put(shared)

        def work(row: dict[str, Any]) -> dict[str, Any]:
            found = function(pickle.loads(row["item"]), *ray.get(given))
            return {"place": row["place"], "found": pickle.dumps(found)}

        rows = [{"place": place, "item": pickle.dumps(item)} for place, item in enumerate(items)]
        table = ray.data.from_items(rows, override_num_blocks=len(rows)).map(work)
        for row in table.iter_rows():
            yield row["place"], pickle.loads(row["found"])

    try:
        yield run
    finally:
        ray.shutdown()


def summarise(engine: str, folder: str) -> dict[str, Any]:
    """Summarise the logs of a folder twice on a fresh engine; seconds."""
    from diffspec.traces.dask_runner import dask_runner
    from diffspec.traces.scale import gather_logs

    contexts = {"dask": lambda: dask_runner(workers=WORKERS), "ray tasks": ray_tasks, "ray data": ray_data}
    start = time.perf_counter()
    with contexts[engine]() as run:
        marks = [time.perf_counter() - start]
        for _ in range(2):
            gathered, partitions = gather_logs([folder], run)
            marks.append(time.perf_counter() - start)
    ended = time.perf_counter() - start
    return {
        "start_s": marks[0],
        "first_s": marks[1] - marks[0],
        "second_s": marks[2] - marks[1],
        "all_s": ended,
        "partitions": partitions,
        "points": len(gathered.points[0][1]),
        "e2e_mean": float(gathered.points[0][1]["e2e_mean"].astype(float).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--summarise", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.summarise:
        print(json.dumps(summarise(*options.summarise)))
        return
    sys.path.insert(0, str(HERE))
    from log_scale import write_log

    engines = [engine for engine in ENGINES if engine == "dask" or find_spec("ray") is not None]
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder), options.files, 1_000_000)
        loads = [os.getloadavg()[0]]
        for _ in range(options.repeats):
            for engine in engines:
                command = [sys.executable, __file__, "--summarise", engine, folder]
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                memory = Memory(process.pid)
                out, err = process.communicate()
                peak = memory.stop()
                if process.returncode:
                    raise SystemExit(err)
                found[engine].append(
                    json.loads(out.strip().splitlines()[-1])
                    | {"peak_memory_gb": peak / 1e9, "cpu_s": sum(memory.cpu.values())}
                )
                print(engine, found[engine][-1], flush=True)
            loads.append(os.getloadavg()[0])
    report: dict[str, Any] = {"rows": options.files * 1_000_000, "workers": WORKERS, "load_average": loads}
    for engine, runs in found.items():
        report[engine] = {
            name: min(run[name] for run in runs) for name in ("start_s", "first_s", "second_s", "all_s", "cpu_s")
        } | {"peak_memory_gb": max(run["peak_memory_gb"] for run in runs), "runs": runs}
    (options.out / "engines.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
