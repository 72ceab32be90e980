"""Where the time of short commands goes: imports, tracing and lowering, XLA; and what kept programs save of it.

    python experiments/09_speed/cold_start.py

Fresh processes in turns; medians. `cold`: nothing is cached. `traced`: JAX's compilation cache is warm and nothing else
(DIFFSPEC_KEEP_PROGRAMS=0). `kept`: so are the programs of `diffspec.programs`, which are not traced. Spans are jax's
own events, overlapping ones counted once; imports are timed first, so what is left (`other`) is work in numpy, reading
kept programs and printing. The answers of `traced` and `kept` must be equal. Writes cold_start.json beside itself.
"""

import argparse
import importlib
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
LENGTHS = ("--prompt-length", "64", "--output-length", "64")
COMMANDS = {
    "predict": ("predict", "model.json", "--arrival-rate", "3", "--draft-length", "4", *LENGTHS, "--json"),
    "optimize": ("optimize", "model.json", "--arrival-rate", "1:4:1", "--acceptance-rate", "0.8", *LENGTHS, "--json"),
    "fit": ("fit", str(TRACE), "--step-time", "affine", "--out", "model.json", "--json"),
}
MODULES = {
    "predict": ("diffspec.analysis.answers", "diffspec.report.tables"),
    "optimize": ("diffspec.optimizing.optimize", "diffspec.report.expert_tables", "diffspec.report.tables"),
    "fit": ("diffspec.fitting.fit", "diffspec.report.fitting_tables", "diffspec.report.figures", "diffspec.traces"),
}
KINDS_OF_RUNS = {"cold": {}, "traced": {"DIFFSPEC_KEEP_PROGRAMS": "0"}, "kept": {}}
KINDS = {"jaxpr_trace_duration": "trace", "jaxpr_to_mlir_module_duration": "trace", "backend_compile_duration": "xla"}


def measure(arguments: list[str]) -> dict[str, float]:
    """The command line in this process, by part [s]."""
    start = time.perf_counter()
    import jax.monitoring

    import diffspec.cli.app  # noqa: F401
    from diffspec.cli import main

    for module in ("diffspec.fitting.deployment", *MODULES[arguments[0]]):
        importlib.import_module(module)
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
    runs: dict[str, dict[str, list[dict]]] = {name: {kind: [] for kind in KINDS_OF_RUNS} for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, cache: str, settings: dict[str, str]) -> tuple[dict, str]:
            environment = os.environ | {"DIFFSPEC_CACHE_DIR": str(Path(folder) / cache)} | settings
            command = [sys.executable, str(HERE / "cold_start.py"), "--child", "found.json", *COMMANDS[name]]
            start = time.perf_counter()
            done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
            whole = time.perf_counter() - start
            return {"whole": whole} | json.loads((Path(folder) / "found.json").read_text()), done.stdout

        for name in reversed(COMMANDS):  # fit first: the others ask what it fitted
            for number in range(asked.repeats):
                runs[name]["cold"].append(run(name, f"{name}{number}", KINDS_OF_RUNS["cold"])[0])
            warm = f"{name}0"
            run(name, warm, KINDS_OF_RUNS["traced"])  # JAX's cache lacks what was kept
            for _ in range(asked.repeats):
                found = {kind: run(name, warm, KINDS_OF_RUNS[kind]) for kind in ("traced", "kept")}
                assert found["traced"][1] == found["kept"][1], name
                for kind, (seconds, _) in found.items():
                    runs[name][kind].append(seconds)
    seconds = {
        name: {
            kind: {part: statistics.median(one[part] for one in found) for part in found[0]}
            for kind, found in kinds.items()
        }
        for name, kinds in runs.items()
    }
    answer = {
        "machine": f"{len(os.sched_getaffinity(0))} virtual CPU cores, {platform.machine()}",
        "load_after": os.getloadavg()[0],
        "seconds": seconds,
        "kept_over_traced": {
            name: found["kept"]["whole"] / found["traced"]["whole"] for name, found in seconds.items()
        },
    }
    print(json.dumps(answer, indent=1))
    (HERE / "cold_start.json").write_text(json.dumps(answer, indent=1) + "\n")


if __name__ == "__main__":
    main()
