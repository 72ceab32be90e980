"""How many runs `diffspec design` saves: held-out errors against the number of runs, chosen by design and otherwise.

Every arm starts from the same few runs of a regular choice and fits after each batch of runs. Held-out rows are scored
and never seen by a choice. Two sources of runs:

* simulated: the discrete-event engine (200 requests a run) on a grid of loads, draft lengths and lengths; held out are
  longer runs at other loads, draft lengths and lengths, drawn anew for each seed
* measured: the cells of data/vllm_cpu_steady.csv of one verifier; for each seed a random third of the cells is held out

Arms: ``design`` (I-optimal, from the cells left), ``regular`` (every m-th cell, ordered by draft length, lengths, load)
and ``random``. The target: design reaches the error of n regular runs with n/2 runs.

    python experiments/06_fit/design.py [--seeds 8] [--part simulated|measured]
"""

import argparse
import io
import json
import time
from dataclasses import replace
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)
import numpy as np  # noqa: E402

from diffspec.acceptance import PositionAcceptance  # noqa: E402
from diffspec.analysis.design import design  # noqa: E402
from diffspec.cli.prepare import prepare_jax  # noqa: E402
from diffspec.configuration import Configuration  # noqa: E402
from diffspec.drafters import DraftCost  # noqa: E402
from diffspec.fitting.evaluate import evaluate  # noqa: E402
from diffspec.fitting.fit import fit  # noqa: E402
from diffspec.report.files import json_text  # noqa: E402
from diffspec.serving import ServingModel  # noqa: E402
from diffspec.simulating import Engine, simulate  # noqa: E402
from diffspec.step_time import RooflineStepTime  # noqa: E402
from diffspec.traces import Trace, read_trace  # noqa: E402
from diffspec.workload import Workload  # noqa: E402

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "data" / "vllm_cpu_steady.csv"
START = 6
NEVER = 99.0
"""Stands for an error that was never reached."""
SIZES = {"simulated": (6, 9, 12, 18, 24), "measured": (6, 9, 12, 15, 18)}
METRICS = ("ttft_mean", "itl_mean", "e2e_mean")
RATES = (0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
COSTS = RooflineStepTime(
    weight_read=6e-3,
    token_compute=4e-5,
    kv_read=6e-8,
    step_overhead=1e-3,
    prefill_token=2e-5,
    draft=DraftCost(pass_base=8e-4, pass_sequence=1e-5),
)
OVERHEAD = 0.015


@jax.jit
def capacity(k, prompt, output):
    """Capacity of the simulated server [req/s]."""
    config = Configuration(k, PositionAcceptance(jax.numpy.asarray(RATES)), max_batch_size=256.0)
    model = ServingModel(COSTS, request_overhead=OVERHEAD, waiting_states=0)
    return model.predict(Workload(prompt, output, arrival_rate=0.01), config).capacity


def rate_at(share, k, prompt, output) -> float:
    """Arrival rate [req/s] at a share of capacity, rounded to two digits."""
    return float(f"{share * float(capacity(float(k), prompt, output)):.2g}")


def simulated_row(rate, k, prompt, output, requests, seed) -> dict:
    """A simulated run as a row of the table."""
    workload = Workload(prompt, output, arrival_rate=rate)
    engine = Engine(k, RATES[:k], max_batch_size=256, request_overhead=OVERHEAD)
    found = simulate(COSTS, workload, engine, n_requests=requests, replications=1, seed=seed)
    times = {f"{name}_mean": found.mean(name).value for name in ("ttft", "tpot", "e2e")} | {
        "itl_mean": found.itl().value
    }
    row = {"deployment": "simulated", "arrival_rate": workload.arrival_rate, "arrival_process": "poisson"}
    row |= {"draft_length": k, "method": "draft_model" if k else "none", "max_batch_size": 256, "window": "steady"}
    positions = ";".join(map(str, RATES[:k])) if k else ""
    return (
        row
        | {"position_acceptance": positions, "prompt_length": prompt, "output_length": output}
        | (times | {"n_requests": requests, "offered_rate": workload.arrival_rate})
    )


def table(rows: list[dict]) -> Trace:
    """Rows as a trace."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
    path = HERE / f".rows-{np.random.default_rng().integers(1 << 60)}.csv"
    try:
        path.write_text("\n".join(lines) + "\n")
        return read_trace(path)
    finally:
        path.unlink()


class Simulated:
    """Cells of the simulated grid, measured when they are chosen."""

    requests = 200

    def __init__(self, seed: int):
        self.seed, random = seed, np.random.default_rng(seed)
        grid = [
            (share, k, prompt, output)
            for k in (0, 1, 2, 4, 6)
            for prompt in (128.0, 1024.0)
            for output in (64.0, 256.0)
            for share in (0.1, 0.3, 0.5, 0.7, 0.85)
        ]
        self.cells = [(rate_at(*cell), *cell[1:]) for cell in grid]
        names = ("arrival_rate", "draft_length", "prompt_length", "output_length")
        self.rows = [dict(zip(names, cell, strict=True)) for cell in self.cells]
        self.measured: dict[int, dict] = {}
        held = []
        for number in range(30):
            share, k = random.uniform(0.1, 0.85), int(random.choice((0, 1, 2, 3, 4, 5, 6)))
            lengths = [float(round(np.exp(random.uniform(*np.log(span))))) for span in ((128, 1024), (64, 256))]
            cell = (rate_at(share, k, *lengths), k, *lengths)
            held.append(simulated_row(*cell, 1000, 100_000 + 1000 * seed + number))
        self.held_out = table(held)

    def trace(self, chosen) -> Trace:
        for index in chosen:
            if index not in self.measured:
                self.measured[index] = simulated_row(*self.cells[index], self.requests, 1000 * self.seed + index)
        return table([self.measured[index] for index in chosen])


class Measured:
    """Cells of the measured table, a third held out."""

    requests = 100

    def __init__(self, seed: int):
        trace = read_trace(DATA).where(
            "deployment=='vllm-cpu-small' and max_batch_size==64 and arrival_process!='gamma' and "
            "arrival_process!='constant'"
        )
        frame = trace.frame
        frame = frame[~frame["run"].str.contains("low")].reset_index(drop=True)
        keys = ["draft_length", "prompt_length", "output_length", "arrival_rate", "concurrency"]
        groups = frame.groupby(keys, dropna=False, sort=True).groups
        order = [list(rows) for rows in groups.values()]
        random = np.random.default_rng(seed)
        held = set(random.choice(len(order), len(order) // 3, replace=False).tolist())
        self.whole, self.frame = trace, frame
        self.cells = [rows for index, rows in enumerate(order) if index not in held]
        self.rows = [frame.loc[rows[0], keys].to_dict() for rows in self.cells]
        self.held_out = self._of([row for index in sorted(held) for row in order[index]])

    def _of(self, rows) -> Trace:
        return replace(self.whole, frame=self.frame.loc[rows].reset_index(drop=True))

    def trace(self, chosen) -> Trace:
        return self._of([self.cells[index][0] for index in chosen])  # one run a cell, as it is counted


def error(model, held_out: Trace) -> float:
    """Mean over ttft, itl and e2e of the mean relative error on the held-out rows."""
    metrics = evaluate(model, held_out)["metrics"]
    return float(np.mean([metrics[name]["mape"] for name in METRICS]))


def fitted(source, chosen):
    return fit(source.trace(chosen), step_time="roofline", uncertainty="laplace")


def regular(count: int, among: int) -> list[int]:
    """Every m-th of ``among`` ordered cells."""
    return [round(index) for index in np.linspace(0, among - 1, count)]


def curves(source, sizes, seed: int) -> dict[str, dict[int, float]]:
    """Held-out error by number of runs, of each arm."""
    among = len(source.cells)
    start = regular(START, among)
    model = fitted(source, start)
    first = error(model, source.held_out)
    found = {arm: {START: first} for arm in ("design", "regular", "random")}
    chosen = list(start)
    shuffled = [index for index in np.random.default_rng(seed).permutation(among).tolist() if index not in start]
    for size in sizes[1:]:
        left = [index for index in range(among) if index not in chosen]
        points = [source.rows[index] for index in left]
        answer = design(model.deployment(), size - len(chosen), candidates=points, requests=source.requests)
        for point in answer["points"]:
            same = [index for index in left if index not in chosen and matches(point, source.rows[index])]
            chosen.append(same[0])
        model = fitted(source, chosen)
        found["design"][size] = error(model, source.held_out)
        found["regular"][size] = error(fitted(source, regular(size, among)), source.held_out)
        found["random"][size] = error(fitted(source, start + shuffled[: size - START]), source.held_out)
    if isinstance(source, Measured):
        found["all"] = {among: error(fitted(source, range(among)), source.held_out)}
    return found


def matches(point: dict, row: dict) -> bool:
    """Whether a point of a design is this row."""
    names = ("draft_length", "prompt_length", "output_length", "arrival_rate", "concurrency")
    return all(point[name] == row[name] for name in names if name in point)


def runs_for(curve: dict[int, float], wanted: float) -> float:
    """Runs at which a curve first is at or below ``wanted``, between sizes by interpolation; infinite where never."""
    sizes = sorted(curve)
    for before, size in zip([None, *sizes], sizes, strict=False):
        if curve[size] <= wanted:
            if before is None:
                return float(size)
            part = (curve[before] - wanted) / (curve[before] - curve[size])
            return float(before + part * (size - before))
    return float("inf")


def interval(values, random) -> list[float]:
    """90 % bootstrap interval of the median."""
    drawn = np.median(random.choice(values, (4000, len(values))), axis=1)
    return [float(edge) for edge in np.quantile(drawn, (0.05, 0.95), method="nearest")]


def summary(per_seed: list[dict]) -> dict:
    """Median error by arm and size, and the runs that design and random need for the error of n regular runs."""
    random, result = np.random.default_rng(0), {"errors": {}, "runs": {}}
    for arm in per_seed[0]:
        result["errors"][arm] = {}
        for size in per_seed[0][arm]:
            values = [curves[arm][size] for curves in per_seed if size in curves[arm]]
            result["errors"][arm][size] = {"median": float(np.median(values)), "interval": interval(values, random)}
    typical = {arm: {size: told["median"] for size, told in sizes.items()} for arm, sizes in result["errors"].items()}
    for size in sorted(typical["regular"])[1:]:
        entry = {}
        for arm in ("design", "random"):
            ratios = [runs_for(curves[arm], curves["regular"][size]) / size for curves in per_seed]
            entry[arm] = {
                "share_of_medians": runs_for(typical[arm], typical["regular"][size]) / size,
                "median_share": float(np.median(ratios)),
                "interval": interval(np.minimum(ratios, NEVER), random),
            }
        result["runs"][size] = entry
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--part", choices=("simulated", "measured"), action="append")
    asked = parser.parse_args()
    prepare_jax()
    out = HERE / "design.json"
    for part in asked.part or ("simulated", "measured"):
        per_seed, began = [], time.time()
        for seed in range(asked.seeds):
            source = {"simulated": Simulated, "measured": Measured}[part](seed)
            per_seed.append(curves(source, SIZES[part], seed))
            print(f"{part} seed {seed}: {time.time() - began:.0f} s", json.dumps(per_seed[-1]), flush=True)
            results = json.loads(out.read_text()) if out.exists() else {}  # the other part may be running too
            results[part] = {"seeds": seed + 1, "held_out_rows": len(source.held_out)} | summary(per_seed)
            results[part]["per_seed"] = per_seed
            out.write_text(json_text(results) + "\n")
    print(report(json.loads(out.read_text())))


def told_share(entry: dict) -> str:
    """A share with its interval; None (infinite) and NEVER: the error was not reached."""
    median, *edges = entry["median_share"], *entry["interval"]
    words = ["never" if x is None or x >= NEVER else f"{x:.2f}" for x in (median, *edges)]
    return f"{words[0]} [{words[1]}, {words[2]}]"


def report(results: dict) -> str:
    """The table of README.md."""
    text = io.StringIO()
    for part, found in results.items():
        text.write(f"\n{part}: {found['seeds']} seeds, median held-out error [90 % interval]\n\n")
        text.write("| runs | design | regular | random | runs of design for the error of regular / runs |\n")
        text.write("|---|---|---|---|---|\n")
        for size in found["errors"]["design"]:
            cells = [found["errors"][arm][size] for arm in ("design", "regular", "random")]
            told = [f"{c['median']:.1%} [{c['interval'][0]:.1%}, {c['interval'][1]:.1%}]" for c in cells]
            ratio = found["runs"].get(size)
            share = "" if ratio is None else told_share(ratio["design"])
            text.write(f"| {size} | {' | '.join(told)} | {share} |\n")
        for size, told in found["errors"].get("all", {}).items():
            text.write(f"| all {size} | {told['median']:.1%} | | | |\n")
    return text.getvalue()


if __name__ == "__main__":
    main()
