"""Waiting and percentiles of the model against the discrete-event simulator.

    python experiments/04_physics_against_simulator/run.py [--quick] [--stored] [--out FOLDER]

Every cell is a cap on the batch, a draft length, a law of output lengths and a load as a share of capacity. Both sides
have the same step time and nothing else in common. A statistic is `undecided` where the simulator's own half width is
above a third of the tolerance (mean 3 %, p50 to p95 8 %, p99 12 %); 0.98 of capacity is reported and not judged. The
server is synthetic: its step time is stated below, not measured. After a change of the model alone, `--stored` takes
the simulator's side, which has not changed, from results.json: seconds in place of half an hour.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

from diffspec import (  # noqa: E402
    Configuration,
    ConstantAcceptance,
    DraftCost,
    RooflineStepTime,
    ServingModel,
    Workload,
)
from diffspec.lengths import Lengths  # noqa: E402
from diffspec.percentiles import predict_distribution  # noqa: E402
from diffspec.simulating import Engine, Estimate, Requests, draw_requests, replay  # noqa: E402

SERVER = RooflineStepTime(
    weight_read=6e-3, token_compute=4e-5, kv_read=6e-8, prefill_token=2e-5, draft=DraftCost(pass_base=5e-4)
)
MODEL = ServingModel(SERVER, first_token_steps=1.5)
PROMPT, OUTPUT, ALPHA, SPREAD = 300.0, 120.0, 0.8, 1.5
CAPS, DRAFTS, LOADS = (16, 64), (0, 4), (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
TOLERANCE = {"mean": 0.03, "p50": 0.08, "p90": 0.08, "p95": 0.08, "p99": 0.12}
REPLICATIONS = 32


def sample_of_lengths() -> np.ndarray:
    """A sample of 5,000 lengths, half short chats and half long answers: two humps, drawn once and then given."""
    random = np.random.default_rng(0)
    return np.round(np.concatenate([random.gamma(2.0, 20.0, 2500), random.normal(200.0, 25.0, 2500)]).clip(1, None))


LAWS = {
    "fixed": (Lengths.fixed(), None),
    "geometric": (Lengths.geometric(), None),
    "lognormal": (Lengths.lognormal(SPREAD), None),
    "sample": (Lengths.measured(sample_of_lengths()), sample_of_lengths()),
}


@jax.jit
def model_of(rate, cap, k, lengths):
    config = Configuration(k, ConstantAcceptance(ALPHA), max_batch_size=cap)
    return predict_distribution(MODEL, Workload(PROMPT, OUTPUT, arrival_rate=rate), config, lengths, states=64)


def simulated(rate: float, cap: int, k: int, law: str, n_requests: int):
    """Replications of one cell; a given sample is drawn from with replacement, scaled to the same mean."""
    margin = n_requests // 5
    runs = []
    for number in range(REPLICATIONS):
        random = np.random.default_rng([7, number])
        load = Workload(PROMPT, OUTPUT, arrival_rate=rate, output_scv=SPREAD if law == "lognormal" else 0.0)
        drawn = draw_requests(load, n_requests + 2 * margin, random, output_law="fixed" if law == "sample" else law)
        if law == "sample":
            values = LAWS[law][1]
            lengths = random.choice(values, len(drawn)) * OUTPUT / values.mean()
            whole = np.maximum(np.floor(lengths + random.random(len(drawn))), 1).astype(np.int64)
            drawn = Requests(drawn.prompt_tokens, whole, drawn.arrival_time)
        runs.append(drawn)
    return replay(SERVER, runs, Engine(k, (ALPHA,) * k, max_batch_size=cap), margin=margin, seed=1)


def judge(cap: int, k: int, law: str, load: float, n_requests: int, stored: dict | None = None) -> dict:
    """One cell: error of every statistic, the simulator's half width, and the verdict; ``stored``: the same cell with
    the simulator's numbers."""
    config = Configuration(float(k), ConstantAcceptance(ALPHA), max_batch_size=float(cap))
    rate = load * float(MODEL.predict(Workload(PROMPT, OUTPUT, arrival_rate=1.0), config).capacity)
    model = model_of(rate, float(cap), float(k), LAWS[law][0])
    found = None if stored else simulated(rate, cap, k, law, n_requests)
    cell: dict = {"cap": cap, "draft_length": k, "lengths": law, "load": load, "statistics": {}}
    for metric in ("ttft", "tpot", "e2e"):
        for name, tolerance in TOLERANCE.items():
            if metric == "tpot" and name == "mean":
                continue
            place = list(TOLERANCE).index(name) - 1
            if found is None:
                known = stored["statistics"][f"{metric} {name}"]
                estimate = Estimate(known["simulated"], known["half_width"])
            else:
                estimate = found.mean(metric) if name == "mean" else found.percentile(metric, float(name[1:]))
            predicted = getattr(model, f"{metric}_mean") if name == "mean" else getattr(model, metric)[place]
            error = float(predicted) / estimate.value - 1.0
            verdict = "within" if abs(error) <= tolerance else "beyond"
            verdict = "undecided" if estimate.relative > tolerance / 3 else verdict
            cell["statistics"][f"{metric} {name}"] = {
                "simulated": estimate.value,
                "half_width": estimate.half_width,
                "error": error,
                "verdict": verdict if load <= 0.95 else "reported",
            }
    return cell


def table(cells: list[dict]) -> str:
    """Counts by statistic, the worst decided errors, and the cells beyond tolerance."""
    lines = [
        "| statistic | tolerance | within | beyond | undecided | worst decided error |",
        "|---|---|---|---|---|---|",
    ]
    names = list(cells[0]["statistics"])
    for name in names:
        found = [cell["statistics"][name] for cell in cells if cell["load"] <= 0.95]
        counts = {verdict: sum(s["verdict"] == verdict for s in found) for verdict in ("within", "beyond", "undecided")}
        decided = [s["error"] for s in found if s["verdict"] != "undecided"]
        worst = max(decided, key=abs, default=float("nan"))
        tolerance = TOLERANCE[name.split()[1]]
        numbers = " | ".join(str(count) for count in counts.values())
        lines.append(f"| {name} | {tolerance:.0%} | {numbers} | {worst:+.1%} |")
    lines += ["", "Beyond tolerance:", ""]
    beyond = [
        f"* cap {cell['cap']}, k = {cell['draft_length']}, {cell['lengths']}, load {cell['load']}: "
        f"{name} {s['error']:+.1%}"
        for cell in cells
        for name, s in cell["statistics"].items()
        if s["verdict"] == "beyond"
    ]
    return "\n".join(lines + (beyond or ["none"])) + "\n"


def draw(cells: list[dict], path: Path) -> None:
    """Error of e2e's mean, p95 and p99 over the load, one panel a law of lengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(LAWS), figsize=(4 * len(LAWS), 3.4), sharey=True)
    for panel, law in zip(panels, LAWS, strict=True):
        for name, colour in (("mean", "tab:blue"), ("p95", "tab:orange"), ("p99", "tab:red")):
            for cap, k in product(CAPS, DRAFTS):
                chosen = [c for c in cells if (c["cap"], c["draft_length"], c["lengths"]) == (cap, k, law)]
                loads = [c["load"] for c in chosen]
                stats = [c["statistics"][f"e2e {name}"] for c in chosen]
                bars = [100 * s["half_width"] / s["simulated"] for s in stats]
                label = name if (cap, k) == (CAPS[0], DRAFTS[0]) else None
                panel.errorbar(loads, [100 * s["error"] for s in stats], bars, color=colour, lw=0.8, label=label)
        panel.axhspan(-3, 3, color="0.9")
        panel.set(title=law, xlabel="load (share of capacity)", ylim=(-25, 40))
    panels[0].set_ylabel("error of e2e (%), bars: simulator's 95 %")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few requests: most cells stay undecided")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--stored", action="store_true", help="take the simulator's side from results.json in --out")
    options = parser.parse_args()
    start, cells, stored = time.monotonic(), [], {}
    if options.stored:
        known = json.loads((options.out / "results.json").read_text())
        stored = {tuple(cell[name] for name in ("cap", "draft_length", "lengths", "load")): cell for cell in known}
    for cap, k, law, load in product(CAPS, DRAFTS, LAWS, LOADS):
        many = 300 if options.quick else 3000 if load < 0.8 else 12000
        cells.append(judge(cap, k, law, load, many, stored.get((cap, k, law, load))))
        e2e = cells[-1]["statistics"]["e2e mean"]
        print(
            f"cap {cap:3d} k {k} {law:9s} load {load:.2f}: e2e mean {e2e['error']:+.1%}, {e2e['verdict']}", flush=True
        )
    text = table(cells)
    print(text, f"{time.monotonic() - start:.0f} s")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(cells, indent=1) + "\n")
    (options.out / "results.md").write_text(text)
    draw(cells, options.out / "percentiles.png")


if __name__ == "__main__":
    main()
