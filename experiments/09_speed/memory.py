"""Memory and time of many equilibria at once, whole and in chunks, each in a process of its own.

    python experiments/09_speed/memory.py

Whole: `jax.vmap`. In chunks: `diffspec.chunked_vmap`, one program over 2,048 systems after another; `--one 1000000
"value and gradient" "chunks, donated"` lets the answer take the argument's place. `temporary` is what XLA reserves for
the program beside its argument and its answer; `peak` is by how much the resident memory of the process, which holds
the argument by then, rises at most while it runs (Linux: VmHWM, reset before). Writes memory.json beside itself.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MIB = 2**20


def resident(which: str) -> float:
    """Resident memory [MiB] of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(which))


def measure(systems: int, program: str, way: str) -> dict:
    """In this process."""
    import jax
    from steady_state import random_systems, solve, timed

    from diffspec.chunks import chunked_vmap

    def value(system):
        return solve(system)[0]

    one = value if program == "value" else jax.value_and_grad(value)
    many = jax.vmap(one) if way == "whole" else chunked_vmap(one)
    given = (0,) if way == "chunks, donated" else ()
    data = jax.block_until_ready(jax.device_put(random_systems(systems)))
    compiled = jax.jit(many, donate_argnums=given).lower(data).compile()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    seconds = timed(compiled, data)
    peak = resident("VmHWM") - before
    told = compiled.memory_analysis()
    return {
        "systems": systems,
        "program": program,
        "way": way,
        "argument_mib": told.argument_size_in_bytes / MIB,
        "answer_mib": told.output_size_in_bytes / MIB,
        "temporary_mib": told.temp_size_in_bytes / MIB,
        "peak_mib": peak,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--one", nargs=3, metavar=("SYSTEMS", "PROGRAM", "WAY"))
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(int(asked.one[0]), *asked.one[1:])))
        return
    rows = []
    for systems in asked.systems:
        for program in ("value", "value and gradient"):
            for way in ("whole", "chunks"):
                command = [sys.executable, str(HERE / "memory.py"), "--one", str(systems), program, way]
                rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
                print(json.dumps(rows[-1]), flush=True)
    machine = f"{len(os.sched_getaffinity(0))} virtual CPU cores, {platform.machine()}"
    told = {"machine": machine, "load_after": os.getloadavg()[0], "rows": rows}
    (HERE / "memory.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
