"""Wall-clock time of the commands, cold (empty compilation cache) and with a warm cache.

Run `python experiments/09_speed/command_times.py`. The 200-row trace is *synthetic*: the packaged rows repeated with
2 % noise on each latency. Every command is a fresh process; the times include starting Python.
"""

import argparse
import csv
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRACE = HERE.parents[1] / "data" / "vllm_cpu_quiet.csv"
LATENCIES = ("ttft_mean", "itl_mean", "tpot_mean", "e2e_mean")


def synthetic_trace(path: Path, rows: int = 200) -> Path:
    """The packaged rows, repeated to ``rows`` with 2 % log-normal noise: a size, nothing to learn from."""
    source = list(csv.DictReader(TRACE.open(newline="")))
    left_out = ("effective_batch_size", "throughput", "run")
    names = [name for name in source[0] if not name.endswith(("_p50", "_p90", "_p99")) and name not in left_out]
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        for index in range(rows):
            row = dict(source[index % len(source)])
            scale = draw.lognormvariate(0.0, 0.02)
            for name in LATENCIES:
                row[name] = float(row[name]) * scale
            writer.writerow(row)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = synthetic_trace(Path(folder) / "trace200.csv")
        workload = ["--arrival-rate", "3", "--prompt-length", "64", "--output-length", "64", "--draft-length", "4"]
        commands = {
            "--help": ["--help"],
            "check": ["check", str(TRACE)],
            "fit, 27 rows": ["fit", str(TRACE), "--out", "model.json"],
            "fit, 200 rows": ["fit", str(trace), "--out", "model200.json"],
            "evaluate": ["evaluate", "model.json", str(TRACE)],
            "predict": ["predict", "model.json", *workload],
            "optimize, 8 loads": ["optimize", "model.json", "--arrival-rate", "0.5:4:0.5", "--max-draft-length", "8"],
            "sensitivity": ["sensitivity", "model.json", *workload],
            "demo": ["demo", "--out", "demo"],
        }
        report = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version()}
        report["seconds"] = {}
        for name, arguments in commands.items():
            caches = [
                Path(folder) / f"cache-{name.replace(' ', '-').replace(',', '')}-{i}" for i in range(options.repeats)
            ]
            cold = [run(arguments, folder, cache) for cache in caches]
            warm = [run(arguments, folder, caches[0]) for _ in caches]
            report["seconds"][name] = {"cold": round(min(cold), 2), "warm": round(min(warm), 2)}
            print(name, report["seconds"][name], file=sys.stderr, flush=True)
    print(json.dumps(report, indent=1))
    (options.out / "command_times.json").write_text(json.dumps(report, indent=1) + "\n")


def run(arguments: list[str], folder: str, cache: Path) -> float:
    environment = os.environ | {"DIFFSPEC_CACHE_DIR": str(cache), "COLUMNS": "100"}
    program = "import sys; from diffspec.cli import main; sys.exit(main())"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=folder, env=environment, capture_output=True)
    if done.returncode:
        raise SystemExit(f"diffspec {' '.join(arguments)}: exit code {done.returncode}\n{done.stderr.decode()}")
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
