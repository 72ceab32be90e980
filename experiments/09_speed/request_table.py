"""Ten million requests in Parquet become operating points: seconds, rows a second, and peak memory.

Run `python experiments/09_speed/request_table.py` (`--rows` for another size). The requests are *synthetic*: Poisson
arrivals to a server with room for everybody, so that every mean is known. Reading runs in a process of its own, whose
peak memory includes Python, pandas and pyarrow.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
PART = 500_000
RATE, SERVICE = 200.0, 2.0


def write_requests(path: Path, rows: int, stated_load: bool) -> None:
    """`rows` requests in row groups of half a million, arrivals in order."""
    random = np.random.default_rng(1)
    writer, start = None, 0.0
    for first in range(0, rows, PART):
        count = min(PART, rows - first)
        arrival = start + np.cumsum(random.exponential(1 / RATE, count))
        start = float(arrival[-1])
        service = random.gamma(4.0, SERVICE / 4.0, count)
        columns = {
            "arrival_time": arrival,
            "first_token_time": arrival + 0.1 * service,
            "completion_time": arrival + service,
            "prompt_tokens": random.integers(50, 2000, count),
            "output_tokens": random.integers(2, 500, count),
            "drafted_tokens": random.integers(100, 400, count),
            "accepted_tokens": random.integers(50, 100, count),
            "deployment": np.full(count, "synthetic"),
            "draft_length": np.full(count, 4),
        }
        if stated_load:
            columns["arrival_rate"] = np.full(count, RATE)
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def summarise(path: Path) -> dict[str, float]:
    """Read the table in this process; time and peak memory of all of it."""
    start = time.perf_counter()
    from diffspec.traces import read_trace

    imported = time.perf_counter()
    frame = read_trace(path).frame
    done = time.perf_counter()
    return {
        "import_s": imported - start,
        "summarise_s": done - imported,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "operating_points": len(frame),
        "e2e_mean": float(np.average(frame["e2e_mean"], weights=frame["n_requests"])),
        "effective_batch_size": float(frame["effective_batch_size"].mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--summarise", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.summarise is not None:
        print(json.dumps(summarise(options.summarise)))
        return
    report: dict[str, object] = {
        "rows": options.rows,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, stated in (("one_run", True), ("log", False)):
            path = Path(folder) / f"{name}.parquet"
            write_requests(path, options.rows, stated)
            command = [sys.executable, __file__, "--summarise", str(path)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            found["rows_per_s"] = options.rows / found["summarise_s"]
            found["file_mb"] = path.stat().st_size / 1e6
            report[name] = found
            path.unlink()
            print(
                f"{name}: {options.rows} requests in {found['summarise_s']:.1f} s ({found['rows_per_s']:.3g} rows/s), "
                f"peak {found['peak_memory_gb']:.2f} GB, {found['operating_points']} operating points; mean latency "
                f"{found['e2e_mean']:.4f} s (true {SERVICE:g}), in flight {found['effective_batch_size']:.1f} (true "
                f"{RATE * SERVICE:g})"
            )
    (options.out / "request_table.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
