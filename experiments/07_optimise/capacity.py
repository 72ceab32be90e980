"""What `diffspec size` says, against held-out measurements and against the simulator, and how long it takes.

Run `python experiments/07_optimise/capacity.py` (some minutes on two CPU cores). Four parts:

* **measured**: a load level is left out of the fit. Each of its rows is then turned around: with the measured value of
  a latency as its limit, the largest rate within it should be the rate that was offered. Rows of the lowest load are
  not asked, since latency hardly depends on the rate there. A latency that grows by g % when the rate grows by 1 %
  turns an error of g % into 1 % of the rate: flat latencies are hard to turn around, for noise of measurements too.
* **sized**: 200 req/s on an H200 as vLLM was measured there, with and without speculation.
* **simulator**: synthetic servers; the analytic largest rate of a limit against the simulated one.
* **speed**: the whole search, warm.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from diffspec.cli.prepare import prepare_jax

prepare_jax()

import diffspec  # noqa: E402
from diffspec.acceptance import ConstantAcceptance, acceptance_from_tokens_per_step  # noqa: E402
from diffspec.analysis.intervals import misfit  # noqa: E402
from diffspec.fitting.uncertainty import DRAWS  # noqa: E402
from diffspec.lengths import Lengths  # noqa: E402
from diffspec.optimizing.lanes import asked_of, join, largest_rates, limited_values, over_draws  # noqa: E402
from diffspec.optimizing.limits import Limit  # noqa: E402
from diffspec.optimizing.servers import server_of  # noqa: E402
from diffspec.optimizing.size import size  # noqa: E402
from diffspec.simulating import Engine, simulate  # noqa: E402

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "data"
LLAMA = [diffspec.read_architecture(DATA / "configs" / f"llama-3.{name}.json") for name in ("1-8b", "2-1b")]
METRICS = ("ttft_mean", "ttft_p95", "tpot_mean", "tpot_p95", "e2e_mean", "e2e_p90")
H200 = diffspec.accelerator("h200")
SOURCES = {
    "vLLM on an H200, EAGLE head": ("vllm_h200.csv", diffspec.FirstPrinciples(LLAMA[0], H200, None, "head")),
    "serving loop on an H200, 1B drafter": (
        "instrument_h200.csv",
        diffspec.FirstPrinciples(LLAMA[0], H200, LLAMA[1], "model"),
    ),
    "vLLM on a CPU": ("vllm_cpu_steady.csv", None),
}
PROGRAM = asked_of(METRICS)


def rows_of(name: str, frame):
    """The rows that are asked about, and the name of each one's load level (None: the lowest load)."""
    if name == "vllm_cpu_steady.csv":
        kept = frame["run"].str.match(r"k\d__p64_o64_r\d+$") & (frame["deployment"] == "vllm-cpu-small")
        frame = frame[kept]
        return frame, frame["arrival_rate"].map(lambda rate: f"r{rate:g}" if rate >= 3 else None)
    levels = frame["run"].str.rsplit("_", n=1).str[-1]
    return frame, levels.where(~levels.isin(["f10", "r6"]), None)


def acceptance_of(row):
    """Of a row as it was measured, at its own draft length."""
    length = int(row["draft_length"])
    return acceptance_from_tokens_per_step(float(row["tokens_per_step"]), length) if length else ConstantAcceptance(0.5)


def turned_around(deployment, rows: list[dict]) -> list[dict]:
    """For each row and metric: the largest rate within the measured value, its 90 % interval, and the offered rate."""
    server = server_of(deployment)
    loads, configs = [], []
    for row in rows:
        lengths = {name: float(row[name]) for name in ("prompt_length", "output_length")}
        loads.append(diffspec.Workload(**lengths, arrival_rate=1.0))
        ask = {"max_batched_tokens": None, "drafter_params": None, "longest": 8}
        length, cap = int(row["draft_length"]), float(row["max_batch_size"])
        configs.append(server.configuration(length, cap, acceptance=acceptance_of(row), **ask))
    lanes = join([deployment.serving] * len(rows), loads, configs, Lengths.fixed(), 256, PROGRAM)
    known = deployment.uncertainty
    models = known.models(deployment.serving, DRAWS)
    found = []
    for metric in METRICS:
        limit = [Limit(metric, 1, 1.0)]
        bounds = np.asarray([[float(row[metric])] for row in rows])
        rates = largest_rates(lanes, limit, -np.log(bounds))
        kind = metric.split("_")[0]
        scale = misfit(known, is_open=True, ttft_share=0.1)["e2e_latency" if kind == "e2e" else kind] or 0.0
        noise = scale * np.random.default_rng(0).standard_t(known.degrees_of_freedom, (len(rows), DRAWS))
        drawn = largest_rates(over_draws(lanes, models), limit, (noise - np.log(bounds)).reshape(-1, 1))
        spread = np.quantile(drawn.rate.reshape(len(rows), DRAWS), (0.05, 0.95), axis=1)
        for place, row in enumerate(rows):
            offered = float(row["offered_rate"]) if np.isfinite(row["offered_rate"]) else float(row["arrival_rate"])
            low, high = float(spread[0, place]), float(spread[1, place])
            found.append(
                {"run": row["run"], "metric": metric, "draft_length": int(row["draft_length"]), "offered_rate": offered}
                | {"limit": float(row[metric]), "rate": float(rates.rate[place]), "low": low, "high": high}
                | {"capacity": float(rates.capacity[place]), "inside": low <= offered <= high}
            )
    return found


def measured() -> dict:
    """Every load level of every source held out once."""
    told = {}
    for title, (name, pair) in SOURCES.items():
        trace = diffspec.read_trace(DATA / name)
        frame, levels = rows_of(name, trace.frame)
        entries = []
        for level in dict.fromkeys(levels.dropna()):
            out = frame.loc[levels == level]
            rest = replace(trace, frame=trace.frame.drop(out.index).reset_index(drop=True))
            if name == "vllm_cpu_steady.csv":
                rest = rest.where("deployment == vllm-cpu-small")
            form = {"step_time": "roofline"} if pair is None else {"step_time": "roofline", "start": pair}
            model = diffspec.fit(rest, **form).deployment()
            entries += [entry | {"held_out": level} for entry in turned_around(model, out.to_dict("records"))]
            print(f"{title}: {level} held out", flush=True)
        told[title] = entries
    return told


def summary(entries: list[dict]) -> dict:
    """By metric: rows, those whose limit is broken without load, median and mean |log(rate/offered)|, share inside."""
    told = {}
    for metric in METRICS:
        rows = [entry for entry in entries if entry["metric"] == metric]
        served = [entry for entry in rows if entry["rate"] > 0]
        errors = [math.log(entry["rate"] / entry["offered_rate"]) for entry in served]
        told[metric] = {
            "rows": len(rows),
            "broken without load": len(rows) - len(served),
            "median error": float(np.median(np.abs(errors))),
            "bias": float(np.mean(errors)),
            "inside 90 %": float(np.mean([entry["inside"] for entry in rows])),
        }
    return told


def sized() -> dict:
    """200 req/s of 512+128 tokens on H200s, fitted to vLLM there; acceptance 0.8 as imposed."""
    trace = diffspec.read_trace(DATA / "vllm_h200.csv")
    model = diffspec.fit(trace, step_time="roofline", start=SOURCES["vLLM on an H200, EAGLE head"][1]).deployment()
    asked = {"target_rate": 200.0, "prompt_length": 512.0, "output_length": 128.0, "max_draft_length": 3}
    asked |= {"acceptance": ConstantAcceptance(0.8), "headroom": 0.2}
    told = {}
    for slo in (["ttft_p95<0.15", "tpot_mean<0.008"], ["ttft_p95<0.15", "tpot_mean<0.005"], ["e2e_p90<0.5"]):
        answer = size(model, slo=slo, **asked)
        kept = ("outcome", "recommended", "plain", "gain", "intervals", "infeasible", "warnings", "outside_measured")
        told[", ".join(slo)] = {name: answer[name] for name in kept}
        told[", ".join(slo)]["front"] = len(answer["pareto"]["front"]) if answer["pareto"] else 0
    frame = trace.frame
    bounds = {"tpot_mean": 0.005, "ttft_p95": 0.1}
    told["measured within ttft_p95<0.1, tpot_mean<0.005"] = {
        str(length): [
            float(row["offered_rate"])
            for _, row in frame[frame["draft_length"] == length].iterrows()
            if all(row[name] <= bound for name, bound in bounds.items())
        ]
        for length in (0, 1, 3)
    }
    within = size(model, slo=[f"{name}<{bound:g}" for name, bound in bounds.items()], max_batch_size=64.0, **asked)
    told["predicted within the same"] = {
        str(entry["draft_length"]): entry["rate_per_replica"] for entry in within["candidates"]
    }
    return told


# --- the simulator ----------------------------------------------------------------------------------------------------

SERVERS = {
    "launch-bound": {"weight_read": 6e-3, "token_compute": 2e-5, "kv_read": 6e-8, "prefill_token": 1e-5},
    "compute-bound": {"weight_read": 2e-3, "token_compute": 2e-4, "kv_read": 6e-8, "prefill_token": 5e-5},
}


SHARES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
"""Rates that are simulated, relative to the model's largest rate."""


def simulator() -> list[dict]:
    """Limits that bind at 60 and 85 % of capacity, with a draft length of 3 at acceptance 0.7, batch caps 16 and 64.

    ``simulated_rate``: where the simulated value crosses the limit, by interpolation of its logarithm; None where it
    does not between 0.7 and 1.3 times the model's rate (a full batch has no longer steps).
    """
    entries = []
    config = diffspec.Configuration(3.0, ConstantAcceptance(0.7))
    for name, costs in SERVERS.items():
        step = diffspec.RooflineStepTime(**costs, draft=diffspec.DraftCost(pass_base=5e-4))
        server = diffspec.ServingModel(step, first_token_steps=1.5)  # of the simulated engine, as in experiment 04
        load = diffspec.Workload(512.0, 128.0, arrival_rate=1.0)
        for cap in (16.0, 64.0):
            lanes = join([server], [load], [replace(config, max_batch_size=cap)], Lengths.fixed(), 64, PROGRAM)
            capacity = float(largest_rates(lanes, []).capacity[0])
            engine = Engine(3, (0.7,) * 3, max_batch_size=int(cap))
            for share in (0.6, 0.85):
                bounds = limited_values(lanes, METRICS, [share * capacity])
                rates = np.asarray(SHARES) * share * capacity
                runs = [
                    simulate(step, replace(load, arrival_rate=rate), engine, n_requests=3000, replications=8)
                    for rate in rates
                ]
                for metric in METRICS:
                    bound = float(bounds[metric][0])
                    rate = float(largest_rates(lanes, [Limit(metric, 1, bound)]).rate[0])
                    kind, statistic = metric.split("_")
                    found = [
                        run.mean(kind) if statistic == "mean" else run.percentile(kind, float(statistic[1:]))
                        for run in runs
                    ]
                    gap = np.log([value.value / bound for value in found])
                    crossing = np.flatnonzero((gap[:-1] <= 0) & (gap[1:] > 0))
                    at = None
                    if crossing.size:
                        left = int(crossing[0])
                        at = float(np.interp(0.0, gap[left : left + 2], rates[left : left + 2]))
                    here = found[SHARES.index(1.0)]
                    entries.append(
                        {"server": name, "cap": cap, "share": share, "metric": metric, "bound": bound, "rate": rate}
                        | {"simulated_rate": at, "simulated_value": here.value, "half_width": here.half_width}
                    )
            print(f"simulator: {name}, cap {cap:g}", flush=True)
    return entries


def speed() -> dict:
    """Seconds of a warm `size`, the best of five: one fitted deployment, 45 candidates (9 draft lengths, 5 caps)."""
    trace = diffspec.read_trace(DATA / "vllm_h200.csv")
    model = diffspec.fit(trace, step_time="roofline", start=SOURCES["vLLM on an H200, EAGLE head"][1]).deployment()
    asked = {"target_rate": 200.0, "prompt_length": 512.0, "output_length": 128.0}
    told = {}
    for slo in (["ttft_mean<0.1", "tpot_mean<0.008"], ["ttft_p95<0.15", "tpot_mean<0.008"]):
        for risk in (None, 0.9):
            start = time.perf_counter()
            size(model, slo=slo, acceptance=ConstantAcceptance(0.8), risk=risk, **asked)
            cold = time.perf_counter() - start
            times = []
            for _ in range(5):
                start = time.perf_counter()
                answer = size(model, slo=slo, acceptance=ConstantAcceptance(0.8), risk=risk, **asked)
                times.append(time.perf_counter() - start)
            name = ", ".join(slo) + ("" if risk is None else f", risk {risk:g}")
            told[name] = {"first": cold, "warm": min(times), "candidates": len(answer["candidates"])}
    server = server_of(model)
    ask = {"max_batched_tokens": None, "drafter_params": None, "longest": 8, "acceptance": ConstantAcceptance(0.8)}
    load = diffspec.Workload(512.0, 128.0, arrival_rate=1.0)
    for count in (1, 45):
        config = [server.configuration(place % 9, 64.0, **ask) for place in range(count)]
        for metric in ("tpot_mean", "ttft_p95"):
            lanes = join([model.serving] * count, [load] * count, config, Lengths.fixed(), 64, asked_of([metric]))
            times = []
            for _ in range(8):
                start = time.perf_counter()
                largest_rates(lanes, [Limit(metric, 1, 0.008 if metric == "tpot_mean" else 0.15)])
                times.append(time.perf_counter() - start)
            told[f"largest rate of {count} configurations, {metric}"] = {"warm": min(times)}
    return told


# --- the report -------------------------------------------------------------------------------------------------------


def markdown(found: dict) -> str:
    """The tables."""
    lines = ["# Capacity: what `diffspec size` says against measurements and the simulator", ""]
    lines += ["`python experiments/07_optimise/capacity.py`; numbers in [capacity.json](capacity.json).", ""]
    lines += ["## Held-out rows turned around", ""]
    lines += [
        "The measured latency of a row that was not fitted (nor any other row of its load level) as the limit: how far",
        "the largest rate within it is from the rate that was offered. Rows are noisy (36 to 370 requests).",
        "Errors are |log(rate/offered rate)|; intervals are those of draws and misfit.",
        "",
        "| source | limit on | rows | broken without load | median error | bias | inside 90 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, entries in found["measured"].items():
        for metric, told in summary(entries).items():
            error, bias, inside = (100 * told[name] for name in ("median error", "bias", "inside 90 %"))
            lines.append(
                f"| {title} | `{metric}` | {told['rows']} | {told['broken without load']} | {error:.1f} % | "
                f"{bias:+.1f} % | {inside:.0f} % |"
            )
    lines += ["", "## 200 req/s of 512+128 tokens on H200s", ""]
    lines += [
        "Fitted to vLLM 0.25.1 with an EAGLE head, acceptance 0.8, a fifth of the rate unused, batch cap up to 64.",
        "",
    ]
    lines += [
        "| limits | replicas, draft length, cap | without speculation | rate of a replica, 90 % | kWh per M tokens |"
    ]
    lines += ["|---|---|---|---|---|"]
    for slo, told in found["sized"].items():
        if "recommended" not in told:
            continue
        best, plain, sure = told["recommended"], told["plain"], told["intervals"]
        if best is None:
            lines.append(f"| {slo} | {told['outcome']} | | | |")
            continue
        spread = sure["rate_per_replica"]
        without = "none will do" if plain is None else f"{plain['replicas']} (cap {plain['max_batch_size']:g})"
        lines.append(
            f"| {slo} | {best['replicas']}, k = {best['draft_length']}, {best['max_batch_size']:g} | {without} | "
            f"{best['rate_per_replica']:.1f} ({spread['low']:.1f} to {spread['high']:.1f}) req/s, by {best['binding']} "
            f"| {best['energy'] / 3.6e6:.3f} |"
        )
    kept = found["sized"]["measured within ttft_p95<0.1, tpot_mean<0.005"]
    predicted = found["sized"]["predicted within the same"]
    lines += [
        "",
        "Within ttft_p95 < 0.1 s and tpot_mean < 5 ms, offered rates of the measured rows that kept both, by draft",
    ]
    lines += ["length, and the largest rate that the model (fitted to these rows) says:", ""]
    lines += ["| draft length | measured within | predicted largest |", "|---|---|---|"]
    for length, rates in kept.items():
        largest = predicted.get(length)
        said = "none" if largest is None else f"{largest:.1f} req/s"
        lines.append(f"| {length} | {', '.join(f'{rate:.1f}' for rate in sorted(rates)) or 'none'} | {said} |")
    lines += ["", "## Against the simulator", ""]
    lines += [
        "Two synthetic servers, draft length 3 at acceptance 0.7, 512+128 tokens, 24,000 requests a point. The limit",
        "is what the model says at 60 or 85 % of capacity; beside it the rate at which the simulator reaches it.",
        "Above 0: the model promises more than the simulator keeps.",
        "",
        "| limit on | rows | not reached | mean | worst | simulated value at the model's rate over the limit |",
        "|---|---|---|---|---|---|",
    ]
    for metric in METRICS:
        rows = [entry for entry in found["simulator"] if entry["metric"] == metric]
        crossed = [entry for entry in rows if entry["simulated_rate"] is not None]
        errors = [entry["rate"] / entry["simulated_rate"] - 1.0 for entry in crossed]
        values = [entry["simulated_value"] / entry["bound"] for entry in rows]
        lines.append(
            f"| `{metric}` | {len(rows)} | {len(rows) - len(crossed)} | {100 * np.mean(errors):+.1f} % | "
            f"{100 * max(errors, key=abs):+.1f} % | {min(values):.2f} to {max(values):.2f} |"
        )
    lines += ["", "## Speed", "", "| what | first call | warm |", "|---|---|---|"]
    for name, told in found["speed"].items():
        first = f"{told['first']:.1f} s" if "first" in told else ""
        what = f"`size`, {told['candidates']} candidates: {name}" if "candidates" in told else name
        lines.append(f"| {what} | {first} | {1e3 * told['warm']:.1f} ms |")
    return "\n".join(lines).replace(" of 1 configurations", " of one configuration") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="parts to run again: measured sized simulator speed")
    asked = parser.parse_args().only
    target = HERE / "capacity.json"
    found = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    for part in (measured, sized, simulator, speed):
        if asked is None or part.__name__ in asked:
            found[part.__name__] = part()
            target.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if found.keys() >= {"measured", "sized", "simulator", "speed"}:
        (HERE / "capacity.md").write_text(markdown(found), encoding="utf-8")


if __name__ == "__main__":
    main()
