"""Queueing against a GPU: means and p95 of ttft and e2e at arrival rates that were not fitted; see README.md.

    python experiments/04_physics_against_simulator/open_loop_h200.py --shared FOLDER

FOLDER/traces/do_llama70b_h200_openloop/summary.csv: Llama-70B FP8 on one H200 under vLLM 0.14.1, Poisson arrivals, 300
requests a run, no speculation; no row of it is in the project. One rate is held out at a time, within one engine
setting. The means of the other rates are fitted, never a percentile. p95 is predicted twice: by the chain of
`diffspec.waiting` at the stationary load that gives the run's mean batch, and by simulating the finite run with the
fitted step time. The law of lengths is not in the table: it is read off the percentiles of e2e at the lowest rate that
was fitted, where the time per token hardly varies. Writes open_loop_h200.json and open_loop_h200.md.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from scipy.optimize import brentq

jax.config.update("jax_enable_x64", True)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from shared_traces import digitalocean_rows, write_table  # noqa: E402

import diffspec  # noqa: E402
from diffspec import Configuration, Workload  # noqa: E402
from diffspec.lengths import Lengths  # noqa: E402
from diffspec.percentiles import predict_distribution, states_for  # noqa: E402
from diffspec.simulating import Engine, Requests, replay  # noqa: E402

STATISTICS = ("ttft_mean", "e2e_mean", "ttft_p95", "e2e_p95")
REPLICATIONS = 24
PERCENTS = np.array([0.0, 50.0, 95.0, 99.0, 100.0])


def lengths_from(row: dict) -> np.ndarray:
    """4,096 output lengths [tok] with the shape of e2e's percentiles in one run: p50, p95 and p99 over the mean.

    Between the percentiles the law is a power mean of its ends, the power such that its mean is the run's.
    """
    mean = row["e2e_mean"] - row["ttft_mean"]
    knots = np.array([row[f"e2e_p{q}"] - row["ttft_mean"] for q in (50, 95, 99)]) / mean
    knots = np.concatenate([[1.0 / float(row["output_length"])], knots, knots[-1:]])

    def law(power: float) -> np.ndarray:
        return np.interp((np.arange(4096) + 0.5) / 40.96, PERCENTS, knots**power) ** (1.0 / power)

    power = brentq(lambda power: law(power).mean() - 1.0, 0.01, 20.0) if law(0.01).mean() < 1.0 else 0.01
    return law(power) * float(row["output_length"]) / law(power).mean()  # type: ignore[arg-type]


def by_simulation(serving, load: Workload, config: Configuration, lengths: np.ndarray, n: int) -> dict[str, float]:
    """Statistics of runs of ``n`` requests on the fitted step time, means over replications."""
    runs = []
    for number in range(REPLICATIONS):
        random = np.random.default_rng([11, number])
        arrivals = np.cumsum(random.exponential(1.0 / float(load.arrival_rate), n))
        prompts = np.full(n, round(float(load.prompt_length)))
        runs.append(Requests(prompts, np.maximum(np.round(random.choice(lengths, n)), 1).astype(np.int64), arrivals))
    cap = None if config.max_batch_size is None else int(config.max_batch_size)
    engine = Engine(max_batch_size=cap, request_overhead=float(serving.request_overhead))
    found = replay(serving.step_time, runs, engine, seed=3)
    return {
        name: (found.mean(metric) if which == "mean" else found.percentile(metric, 95.0)).value
        for name in STATISTICS
        for metric, which in [name.split("_")]
    }


def by_chain(serving, load: Workload, config: Configuration, lengths: np.ndarray, found) -> dict[str, float]:
    """p95 by the stationary chain, at the rate whose batch is the mean batch of the finite run."""
    rate = float(found.batch_seen) / float(serving.residence_time(load, config, found.batch_seen))
    steady = replace(load, arrival_rate=rate, n_requests=None)
    cap = None if config.max_batch_size is None else float(config.max_batch_size)
    states = states_for(cap, float(found.batch_seen))
    law = predict_distribution(serving, steady, config, Lengths.measured(lengths), states=states, percentiles=(95.0,))
    return {"ttft_p95": float(law.ttft[0]), "e2e_p95": float(law.e2e[0])}


def one_setting(name: str, rows: list[dict]) -> list[dict]:
    """Every rate of one engine setting held out in turn."""
    cells = []
    for held_out in rows:
        kept = [row for row in rows if row is not held_out]
        lengths = lengths_from(min(kept, key=lambda row: float(row["arrival_rate"])))
        spread = float(Lengths.measured(lengths).scv())
        with tempfile.TemporaryDirectory() as folder:
            table = write_table([row | {"output_scv": spread} for row in kept], Path(folder) / "kept.csv")
            trace = diffspec.read_trace(table)
        deployment = diffspec.fit(trace, all_rows=True).deployment()
        n = int(held_out["n_requests"])
        load = Workload(
            float(held_out["prompt_length"]),
            float(held_out["output_length"]),
            arrival_rate=float(held_out["arrival_rate"]),
            output_scv=spread,
            n_requests=float(n),
        )
        config = Configuration(max_batch_size=float(held_out["max_batch_size"]) if held_out["max_batch_size"] else None)
        found = deployment.serving.predict(load, config)
        scaled = lengths * float(held_out["output_length"]) / lengths.mean()
        analytic = {"ttft_mean": float(found.ttft), "e2e_mean": float(found.e2e_latency)}
        analytic |= by_chain(deployment.serving, load, config, scaled, found)
        simulated = by_simulation(deployment.serving, load, config, scaled, n)
        cells.append(
            {
                "setting": name,
                "rate": float(held_out["arrival_rate"]),
                "form": deployment.form,
                "extrapolated": held_out in (rows[0], rows[-1]),
                "utilization": float(found.utilization),
                "measured": {s: held_out[s] for s in STATISTICS},
                "analytic": {s: analytic[s] / held_out[s] - 1.0 for s in STATISTICS},
                "simulated": {s: simulated[s] / held_out[s] - 1.0 for s in STATISTICS},
            }
        )
        told = ", ".join(f"{s} {cells[-1]['analytic'][s]:+.0%}/{cells[-1]['simulated'][s]:+.0%}" for s in STATISTICS)
        print(f"{name}, {held_out['arrival_rate']} req/s: {told}", file=sys.stderr, flush=True)
    return cells


def error_table(cells: list[dict]) -> str:
    """Mean and largest absolute error by setting and statistic, the model's first, the simulated run's second."""
    lines = ["| setting | rates | " + " | ".join(STATISTICS) + " |", "|---|---|" + "---|" * len(STATISTICS)]
    for name in dict.fromkeys(cell["setting"] for cell in cells):
        own = [cell for cell in cells if cell["setting"] == name]
        entries = []
        for statistic in STATISTICS:
            parts = []
            for by in ("analytic", "simulated"):
                errors = np.abs([cell[by][statistic] for cell in own])
                parts.append(f"{errors.mean():.1%} ({errors.max():.0%})")
            entries.append("; ".join(parts))
        lines.append(f"| {name} | {len(own)} | " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=HERE.parents[2] / "shared")
    options = parser.parse_args(argv)
    start = time.monotonic()
    settings: dict[str, list[dict]] = {}
    for row in digitalocean_rows(options.shared):
        label = row["deployment"].split("/")[1]
        settings.setdefault(f"{label}, prompts of {float(row['prompt_length']):.0f}", []).append(row)
    cells = [cell for name, rows in settings.items() for cell in one_setting(name, rows)]
    (HERE / "open_loop_h200.json").write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    (HERE / "open_loop_h200.md").write_text(error_table(cells), encoding="utf-8")
    print(error_table(cells))
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
