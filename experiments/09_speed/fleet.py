"""How fast fleets are fitted, by the number of processes, and optimised, by the number of deployments.

    python experiments/09_speed/fleet.py [--traces 16]

Traces: the quiet table of vLLM on a CPU, all latencies of a row scattered by 2 % (log normal, a seed a trace), so that
each fit is another one. Weak scaling: as many traces for each process, alternating runs of 1 and all processes; the
first fit of each process, which compiles or reads compiled programs, is told apart from those that follow. Optimising:
copies of the fitted models, at three loads and five draft lengths. Writes fleet.json beside itself.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from diffspec.cli.prepare import prepare_jax

HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "data" / "vllm_cpu_quiet.csv"
LATENCIES = ("ttft_", "itl_", "tpot_", "e2e_")


def scattered(folder: Path, count: int) -> None:
    """``count`` tables in ``folder``, each the measured one with latencies scattered anew."""
    import pandas as pd

    frame = pd.read_csv(TABLE)
    columns = [name for name in frame if name.startswith(LATENCIES)]
    for number in range(count):
        factors = np.exp(0.02 * np.random.default_rng(number).standard_normal(len(frame)))
        moved = frame[columns].mul(factors, axis=0)
        frame.assign(**{name: moved[name] for name in columns}).to_csv(folder / f"{number:04d}.csv", index=False)


def fitted(folder: Path, processes: int, each: int) -> dict:
    """Fits of ``processes*each`` traces: wall-clock seconds, and those of single fits."""
    from diffspec.fitting.fleet import fit_fleet
    from diffspec.traces import read_trace

    paths = sorted(folder.iterdir())[: processes * each]
    start = time.perf_counter()
    reads = {path.name: partial(read_trace, [path]) for path in paths}
    done = list(fit_fleet(reads, processes=processes, prepare=prepare_jax))
    wall = time.perf_counter() - start
    failed = [one.error for one in done if one.model is None]
    assert not failed, failed[0]
    seconds = sorted(one.seconds for one in done)
    return {"processes": processes, "traces": len(done), "wall": wall, "median_fit": statistics.median(seconds)} | {
        "first_fits": seconds[-processes:],
        "models": [one.model for one in done],
    }


def optimised(models: list, counts: tuple[int, ...]) -> list[dict]:
    """Seconds of ``optimize_fleet`` by deployments, second call of each size; the smallest of three."""
    from diffspec.optimizing.fleet import optimize_fleet

    asked = {"loads": [1.0, 2.0, 4.0], "prompt_length": 64.0, "output_length": 64.0, "max_draft_length": 4}
    rows = []
    for count in counts:
        fleet = {str(number): models[number % len(models)].deployment() for number in range(count)}
        times = []
        for _ in range(4):
            start = time.perf_counter()
            optimize_fleet(fleet, **asked)
            times.append(time.perf_counter() - start)
        rows.append({"deployments": count, "first_call": times[0], "seconds": min(times[1:])})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=16, help="traces for each process")
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    prepare_jax()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scattered(folder, asked.traces * cores)
        runs = []
        for _ in range(asked.rounds):
            for processes in (1, cores):
                runs.append(fitted(folder, processes, asked.traces))
                print({key: value for key, value in runs[-1].items() if key != "models"}, flush=True)
    models = runs[0]["models"]
    table = optimised(models, (16, 256, 1024, 4096))
    for run in runs:
        run.pop("models")
        run["fits_per_hour"] = 3600.0 * run["traces"] / run["wall"]
    alone, all_of = (
        statistics.median([run["wall"] for run in runs if run["processes"] == count]) for count in (1, cores)
    )
    answer = {
        "machine": f"{cores} virtual CPU cores, {platform.machine()}, Python {platform.python_version()}",
        "load_before": os.getloadavg()[0],
        "rows_of_a_trace": 27,
        "fits": runs,
        "weak_scaling": alone / all_of,
        "optimised": table,
    }
    (HERE / "fleet.json").write_text(json.dumps(answer, indent=1) + "\n")
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
