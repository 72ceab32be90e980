# ruff: noqa: E402
"""Every command in a fresh process: with an empty compilation cache (cold), with the one it left (warm), and where its
imports go (`python -X importtime`).

    python experiments/09_speed/commands.py FOLDER [--quick]

prints one JSON object; `run.py` calls it. FOLDER holds the fitted model. The warm run is the one that is profiled,
which costs it some hundredths of a second.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE), str(HERE.parent / "10_monitoring")]
from command_times import TRACE
from measure import say

PROGRAM = "import sys; from diffspec.cli import main; sys.exit(main())"
TOP = 6


def recording(folder: Path) -> None:
    """A planted model and three minutes of its server's /metrics (synthetic), for `monitor --replay`."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import planted

    from diffspec.fitting.deployment import FittedModel

    server = planted.server()
    (folder / "planted.json").write_text(FittedModel({server.name: server}, "0" * 64, {}).to_json(), encoding="utf-8")
    (events,) = planted.lives(server, [[planted.Segment(180.0)]], 0)
    (folder / "recorded.txt").write_text(planted.recording(events, 20.0, 180.0), encoding="utf-8")


def commands(folder: Path) -> dict[str, list[str]]:
    """Arguments of every command, as README.md shows them, but for `fit` and `demo`, minutes long where other work
    runs: `command_times.py` has theirs."""
    load = ["--arrival-rate", "3", "--draft-length", "4"]
    loads = ["--arrival-rate", "1:4:1", "--acceptance-rate", "0.8", "--max-draft-length", "6"]
    axes = ["--x", "arrival_rate=0.5:4", "--y", "acceptance_rate=0.3:0.95"]
    plan = subprocess.run([sys.executable, "-c", PROGRAM, "collect", "--template"], capture_output=True, check=True)
    (folder / "plan.yaml").write_bytes(plan.stdout)
    return {
        "--help": ["--help"],
        "collect": ["collect", "plan.yaml", "--dry-run"],
        "import": ["import", str(TRACE), "--out", "imported.parquet"],
        "check": ["check", str(TRACE)],
        "acceptance": ["acceptance", str(TRACE), "--by", "draft_length"],
        "predict": ["predict", "model.json", *load],
        "evaluate": ["evaluate", "model.json", str(TRACE)],
        "sensitivity": ["sensitivity", "model.json", *load],
        "optimize": ["optimize", "model.json", *loads],
        "policy": ["policy", "model.json", *loads],
        "size": ["size", "model.json", "--target-rate", "20", "--acceptance-rate", "0.8", "--max-draft-length", "4"],
        "boundary": ["boundary", "model.json", *axes, "--draft-length", "4"],
        "simulate": ["simulate", "model.json", *load, "--max-batch-size", "8", "--requests", "500"],
        "design": ["design", "model.json", "--budget", "6", "--max-draft-length", "6"],
        "report": ["report", "model.json", str(TRACE), "--out", "report.html"],
        "monitor": ["monitor", "planted.json", "--replay", "recorded.txt", "--json"],
    }


QUICK = ("--help", "check", "predict")


def profile(text: str) -> dict[str, float]:
    """Own time of all imports by top-level package [s], the largest first; Python's own modules together."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("import time:") or "[us]" in line:
            continue
        own, _, name = line.removeprefix("import time:").split("|")
        top = name.strip().split(".")[0]
        top = "Python's own" if top in sys.stdlib_module_names or top.startswith(("_", "encodings")) else top
        found[top] = found.get(top, 0.0) + int(own) / 1e6
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def ran(arguments: list[str], folder: Path, cache: Path, profiled: bool) -> dict[str, Any]:
    """Seconds of one run in a fresh process, of CPU too, and its import profile where asked."""
    environment = os.environ | {"DIFFSPEC_CACHE_DIR": str(cache), "COLUMNS": "100"}
    command = [sys.executable, *(["-X", "importtime"] if profiled else []), "-c", PROGRAM, *arguments]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"diffspec {' '.join(arguments)}: exit code {done.returncode}: {done.stderr[-300:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if not profiled:
        return {"cold_s": wall, "cold_cpu_s": cpu}
    imports = profile(done.stderr)
    total, top = sum(imports.values()), dict(list(imports.items())[:TOP])
    told = {"warm_s": wall, "warm_cpu_s": cpu, "imports_s": total}
    return told | {"imports_share": total / wall, "top_imports_s": top}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    recording(folder)
    chosen = {name: call for name, call in commands(folder).items() if not asked.quick or name in QUICK}
    rows = []
    for number, (name, arguments) in enumerate(chosen.items()):
        say(f"diffspec {name}", number / len(chosen))
        cache = folder / f"cache-{name.strip('-')}"
        shutil.rmtree(cache, ignore_errors=True)
        cold = ran(arguments, folder, cache, profiled=False)
        rows.append({"command": name} | cold | ran(arguments, folder, cache, profiled=True))
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
