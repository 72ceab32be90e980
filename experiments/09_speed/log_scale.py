"""A hundred million requests in Parquet files become operating points on two workers: seconds and peak memory.

Run `python experiments/09_speed/log_scale.py` (`--rows` for another size); it needs diffspec[scale] and about 3 GB of
disk for a hundred million rows. The requests are *synthetic*, a log without a stated load: Poisson arrivals to a server
with room for everybody, so that every mean is known, in files of five million rows. `diffspec import --engine dask`
reads all of them, `diffspec import` a tenth of them as one file, each in a process of its own; memory is the largest
sum of the resident memory of that process and all its children (pages they share count for each).

What one partition sends and what one task costs whatever it does are measured too: docs/at-scale.md needs them.
"""

import argparse
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
GROUP = 500_000
FILE_ROWS = 5_000_000
RATE, SERVICE = 200.0, 2.0


def write_log(folder: Path, files: int, rows: int, seed: int = 1) -> list[Path]:
    """`files` files of `rows` requests each, in order of arrival."""
    random = np.random.default_rng(seed)
    start, written = 1.7e9, []
    for number in range(files):
        written.append(folder / f"{number:04d}.parquet")
        writer = None
        for first in range(0, rows, GROUP):
            count = min(GROUP, rows - first)
            arrival = start + np.cumsum(random.standard_exponential(count) / RATE)
            start = float(arrival[-1])
            service = random.standard_gamma(4.0, count) * (SERVICE / 4.0)
            table = pa.table(
                {
                    "arrival_time": arrival,
                    "first_token_time": arrival + 0.1 * service,
                    "completion_time": arrival + service,
                    "prompt_tokens": random.integers(50, 2000, count, np.int32),
                    "output_tokens": random.integers(2, 500, count, np.int32),
                    "drafted_tokens": random.integers(100, 400, count, np.int32),
                    "accepted_tokens": random.integers(50, 100, count, np.int32),
                    "deployment": pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), ["synthetic"]),
                    "draft_length": np.full(count, 4, np.int32),
                }
            )
            writer = writer or pq.ParquetWriter(written[-1], table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()
    return written


def imported(*arguments: str) -> dict[str, Any]:
    """`diffspec import` in a process of its own: seconds, memory, and what its operating points say."""
    sys.path.insert(0, str(HERE))
    from engines import Memory

    program = "from diffspec.cli import main; raise SystemExit(main())"
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", program, "import", *arguments, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    memory = Memory(process.pid)
    out, err = process.communicate()
    peak, seconds = memory.stop(), time.perf_counter() - start
    if process.returncode:
        raise SystemExit(err)
    answer = json.loads(out)
    points = answer["table"]
    requests = np.array([point["n_requests"] for point in points])
    return {
        "seconds": seconds,
        "cpu_s": sum(memory.cpu.values()),
        "peak_memory_gb": peak / 1e9,
        "partitions": answer["partitions"],
        "operating_points": len(points),
        "e2e_mean": float(np.average([point["e2e_mean"] for point in points], weights=requests)),
        "e2e_p99": float(np.median([point["e2e_p99"] for point in points])),
        "arrival_scv": float(np.mean([point["arrival_scv"] for point in points])),
        "effective_batch_size": float(np.mean([point["effective_batch_size"] for point in points])),
    }


def one_partition(path: Path) -> dict[str, Any]:
    """What one partition of about a million rows sends in each reading [B], and its seconds of work in this process."""
    from diffspec.traces import requests, scale

    parts = scale._partitions(scale._parts_of(scale.locate([str(path)])[0]))
    start = time.process_time()
    extents = requests.extents_of(part.reader() for part in parts[0])
    first = time.process_time()
    (key, run), origin = next(iter(extents.runs.items())), min(run.first for run in extents.runs.values())
    spans = [(600.0 * number, 600.0 * (number + 1)) for number in range(1000)]
    added = requests.windows_of((part.reader() for part in parts[0]), (origin, {key: spans}), True)
    return {
        "rows": run.count,
        "extents_bytes": len(pickle.dumps(extents)),
        "windows_bytes": len(pickle.dumps(added)),
        "extents_cpu_s": first - start,
        "windows_cpu_s": time.process_time() - first,
    }


def nothing(item: int) -> int:
    return item


def task_overhead(tasks: int = 1000) -> float:
    """Seconds for each task that does nothing, on two workers."""
    from diffspec.traces.dask_runner import dask_runner

    with dask_runner(workers=2) as run:
        list(run(nothing, range(10)))
        start = time.perf_counter()
        assert sorted(value for _, value in run(nothing, range(tasks))) == list(range(tasks))
        return (time.perf_counter() - start) / tasks


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    files = max(options.rows // FILE_ROWS, 1)
    report: dict[str, Any] = {
        "rows": files * FILE_ROWS,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_before": os.getloadavg(),
        "task_overhead_s": task_overhead(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        written = write_log(folder, files, FILE_ROWS)
        report["written_s"] = time.perf_counter() - start
        report["bytes_per_row"] = sum(path.stat().st_size for path in written) / report["rows"]
        report["partition"] = one_partition(written[0])
        print(report, flush=True)
        report["dask"] = imported(str(folder / "*.parquet"), "--engine", "dask")
        report["load_average_between"] = os.getloadavg()
        print(report["dask"], flush=True)
        for path in written:
            path.unlink()
        (single,) = write_log(folder, 1, report["rows"] // 10)
        report["process"] = imported(str(single))
        report["load_average_after"] = os.getloadavg()
    for name, rows in (("dask", report["rows"]), ("process", report["rows"] // 10)):
        report[name] |= {"rows": rows, "rows_per_s": rows / report[name]["seconds"]}
        report[name]["rows_per_cpu_s"] = rows / report[name]["cpu_s"]
    report["ratio"] = report["dask"]["rows_per_s"] / report["process"]["rows_per_s"]
    (options.out / "log_scale.json").write_text(json.dumps(report, indent=1) + "\n")
    for name in ("dask", "process"):
        found = report[name]
        print(
            f"{name}: {found['rows']:.3g} requests in {found['seconds']:.0f} s ({found['rows_per_s']:.3g} rows/s), "
            f"peak {found['peak_memory_gb']:.2f} GB, {found['operating_points']} operating points; mean latency "
            f"{found['e2e_mean']:.4f} s (true {SERVICE:g}), scv {found['arrival_scv']:.3f} (true 1)"
        )
    print(f"ratio of rates {report['ratio']:.2f}; load average {report['load_average_between'][0]:.1f}")


if __name__ == "__main__":
    main()
