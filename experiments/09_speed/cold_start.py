"""Where the time of one `diffspec predict` goes: imports, tracing and lowering, compiling or reading compiled programs.

    python experiments/09_speed/cold_start.py

Fresh processes in turns, with an empty compilation cache (cold) and with the one it left (warm); medians. Tracing and
lowering is what programs exported ahead of time (jax.export) would save beside a warm cache. Spans are jax's own
events, overlapping ones counted once; imports are timed first, so what is left is work in numpy, reading and printing.
Writes cold_start.json beside itself.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRACE = HERE.parents[1] / "data" / "vllm_cpu_quiet.csv"
WORKLOAD = ("--arrival-rate", "3", "--prompt-length", "64", "--output-length", "64", "--draft-length", "4")
KINDS = {"jaxpr_trace_duration": "trace", "jaxpr_to_mlir_module_duration": "trace", "backend_compile_duration": "xla"}


def measure(arguments: list[str]) -> dict[str, float]:
    """The command line in this process, by part [s]."""
    start = time.perf_counter()
    import jax.monitoring

    import diffspec.analysis.answers
    import diffspec.cli.predict
    import diffspec.fitting.deployment
    import diffspec.report.tables  # noqa: F401
    from diffspec.cli import main

    imported = time.perf_counter()
    spans: dict[str, list[tuple[float, float]]] = {"trace": [], "xla": []}

    def told(event: str, seconds: float, **_) -> None:
        kind = KINDS.get(event.split("/")[-1])
        if kind is not None:
            now = time.perf_counter()
            spans[kind].append((now - seconds, now))

    jax.monitoring.register_event_duration_secs_listener(told)
    code = main(arguments)
    assert code == 0
    end = time.perf_counter()
    both = union(spans["trace"] + spans["xla"])
    xla = union(spans["xla"])
    return {"imports": imported - start, "trace_and_lower": both - xla, "xla": xla, "other": end - imported - both}


def union(spans: list[tuple[float, float]]) -> float:
    """Length of what the spans cover."""
    covered, last = 0.0, -float("inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, last))
        last = max(last, end)
    return covered


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        found = measure(sys.argv[3:])
        Path(sys.argv[2]).write_text(json.dumps(found))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    runs: dict[str, list[dict]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "cold_start.py"), "--child", "found.json"]

        def run(cache: str, *arguments: str) -> dict:
            environment = os.environ | {"DIFFSPEC_CACHE_DIR": str(Path(folder) / cache)}
            start = time.perf_counter()
            subprocess.run([*command, *arguments], cwd=folder, env=environment, check=True, capture_output=True)
            whole = time.perf_counter() - start
            return {"whole": whole} | json.loads((Path(folder) / "found.json").read_text())

        run("of_fit", "fit", str(TRACE), "--step-time", "affine", "--out", "model.json")
        for number in range(asked.repeats):
            for kind in runs:
                runs[kind].append(run(f"cache{number}", "predict", "model.json", *WORKLOAD))
    seconds = {
        kind: {part: statistics.median(one[part] for one in found) for part in found[0]} for kind, found in runs.items()
    }
    answer = {
        "machine": f"{len(os.sched_getaffinity(0))} virtual CPU cores, {platform.machine()}",
        "load_after": os.getloadavg()[0],
        "seconds": seconds,
        "trace_share_warm": seconds["warm"]["trace_and_lower"] / seconds["warm"]["whole"],
    }
    print(json.dumps(answer, indent=1))
    (HERE / "cold_start.json").write_text(json.dumps(answer, indent=1) + "\n")


if __name__ == "__main__":
    main()
