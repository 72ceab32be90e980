"""Measure the campaign: start each server, drive it with `diffspec collect`, and join the tables.

    python models.py MODELS                      (with vLLM's Python)
    python run.py MODELS OUT                     (with vLLM's Python; --diffspec names the command if not on the path)
    python run.py MODELS OUT --table             (write OUT/operating_points.csv from what is there)

Arms that are finished are skipped, so an interrupted campaign goes on. The client shares a core with the engine's
scheduler; the worker that computes the models has the other to itself.
"""

import argparse
import csv
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from campaign import ARMS, USUAL, Arm
from serve import FRONT_CORE, running_server

MEASURE = {"warmup_requests": 8, "scrape_seconds": 4.0, "settle_seconds": 1.0, "most_seconds": 90.0, "seed": 1}


def described(models: Path, name: str) -> dict[str, Any]:
    """What models.py wrote beside a model about its size."""
    return yaml.safe_load((models / name / "diffspec.yaml").read_text())


def cpu() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else ():
        if line.startswith("model name"):
            return f"{os.cpu_count()} vCPU {line.split(':', 1)[1].strip()}"
    return f"{os.cpu_count()} vCPU {platform.machine()}"


def plan(arm: Arm, models: Path) -> dict[str, Any]:
    """The `diffspec collect` plan of one arm."""
    verifier = described(models, arm.verifier)
    identity: dict[str, Any] = {
        "deployment": f"vllm-cpu-{arm.verifier}" + (f"-{arm.drafter}" if arm.drafter not in (None, USUAL) else ""),
        "run": arm.name,
        "workload": "random tokens",
        "hardware": cpu(),
        "verifier": arm.verifier,
        "verifier_params": verifier["parameters"],
        "kv_bytes_per_token": verifier["kv_bytes_per_token"],
        "max_batch_size": arm.max_num_seqs,
        "max_batched_tokens": 2048,
        "draft_length": arm.draft_length,
        "method": "draft_model" if arm.drafter else "none",
        "rejection": "none" if not arm.drafter else "synthetic" if arm.acceptance else "standard",
    }
    identity |= {name: verifier[name] for name in ("num_experts", "experts_per_token") if name in verifier}
    if arm.drafter:
        drafter = described(models, arm.drafter)
        identity |= {
            "drafter": arm.drafter,
            "drafter_params": drafter["parameters"],
            "drafter_layers": drafter["layers"],
        }
    cells = sum(cell.get("requests", 100) * cell.get("repeats", 1) * 2 + 200 for cell in arm.grid)
    return {
        "identity": identity,
        "limits": {"max_rate": 12, "max_requests": cells, "max_concurrency": 64},
        "measure": MEASURE,
        "prompts": {"kind": "token_ids", "vocabulary": 4000},
        "grid": arm.grid,
    }


def measure(arm: Arm, models: Path, out: Path, diffspec: str, port: int) -> None:
    """One arm: its server up, its cells measured, its server down."""
    folder = out / arm.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "collect.yaml").write_text(yaml.safe_dump(plan(arm, models), sort_keys=False))
    drafter = models / arm.drafter if arm.drafter else None
    with running_server(
        models / arm.verifier,
        drafter,
        arm.draft_length,
        arm.marginal(),
        max_num_seqs=arm.max_num_seqs,
        port=port,
        log=folder / "server.log",
    ) as url:
        command = [diffspec, "collect", str(folder / "collect.yaml"), "--url", url, "--out", str(folder), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=on_front_core)
    (folder / "collect.json").write_text(done.stdout)
    if done.returncode != 0:
        raise RuntimeError(f"{arm.name}: diffspec collect ended with {done.returncode}: {done.stderr[-500:]}")
    (folder / "done").touch()
    for line in done.stderr.splitlines():
        print(f"  {line}", flush=True)


def on_front_core() -> None:
    """Keep the client beside the scheduler, off the worker's core."""
    os.sched_setaffinity(0, {FRONT_CORE})


def join(out: Path) -> tuple[int, int]:
    """One table of operating points and one of requests, of all arms that are finished; how many rows they have."""
    import pandas as pd

    folders = [out / arm.name for arm in ARMS if (out / arm.name / "done").exists()]
    rows, names = [], []
    for folder in folders:
        with (folder / "operating_points.csv").open(newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
        rows += found
        names += [name for name in (found[0] if found else ()) if name not in names]
    with (out / "operating_points.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    requests = pd.concat([pd.read_csv(folder / "requests.csv") for folder in folders], ignore_index=True)
    requests.to_parquet(out / "requests.parquet", index=False, compression="zstd")
    return len(rows), len(requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("models", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--diffspec", default="diffspec", help="the diffspec command")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--only", help="names of arms, joined by commas")
    parser.add_argument("--table", action="store_true", help="only join the tables")
    options = parser.parse_args()
    for sign in (signal.SIGTERM, signal.SIGINT):  # either stops the server too, also where a shell ignores interrupts
        signal.signal(sign, signal.default_int_handler)
    wanted = options.only.split(",") if options.only else [arm.name for arm in ARMS]
    for arm in () if options.table else ARMS:
        if arm.name not in wanted or (options.out / arm.name / "done").exists():
            continue
        start = time.monotonic()
        print(f"{arm.name}: {len(arm.grid)} entries", flush=True)
        try:
            measure(arm, options.models, options.out, options.diffspec, options.port)
        except RuntimeError as error:
            print(f"  failed: {error}", flush=True)
            continue
        cells = json.loads((options.out / arm.name / "collect.json").read_text())["cells"]
        print(f"  {len(cells)} cells in {time.monotonic() - start:.0f} s", flush=True)
    rows, requests = join(options.out)
    print(f"{rows} operating points and {requests} requests in {options.out}")


if __name__ == "__main__":
    main()
