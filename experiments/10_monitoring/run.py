"""How soon `diffspec monitor` tells planted faults, how often it cries wolf, and what it says of a real vLLM.

    python experiments/10_monitoring/run.py

Simulated servers (synthetic, planted.py) are scraped every 20 s; a fault begins half-way or not at all. The real part
fits data/vllm_h200.csv without its rows at 14 req/s and replays the scrapes that were made while these were measured.
"""

import json
import sys
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)
import numpy as np  # noqa: E402
import planted  # noqa: E402
from planted import Segment  # noqa: E402

from diffspec.fitting.fit import fit  # noqa: E402
from diffspec.monitoring.monitor import Monitor  # noqa: E402
from diffspec.monitoring.scrapes import Scrape, recorded  # noqa: E402
from diffspec.traces import read_trace  # noqa: E402
from diffspec.traces.readers.prometheus import parse  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EVERY, RUN_LENGTH = 20.0, 1000.0
BEFORE, AFTER, RUNS, STEADY, STEADY_SECONDS = 200.0, 400.0, 4, 12, 2000.0
FAULTS = {
    "steps 10 % longer": {"slow": 1.1},
    "steps 20 % longer": {"slow": 1.2},
    "steps 30 % longer": {"slow": 1.3},
    "acceptance 0.70": {"acceptance": 0.70},
    "acceptance 0.65": {"acceptance": 0.65},
    "acceptance 0.50": {"acceptance": 0.50},
}


def watch(deployment, events, seconds: float) -> Monitor:
    monitor = Monitor(deployment, average_run_length=RUN_LENGTH)
    for snapshot in parse(planted.recording(events, EVERY, seconds)):
        monitor.take(Scrape(snapshot.time, snapshot=snapshot))
    return monitor


def delay(monitor: Monitor, wanted: set[str]) -> float | None:
    """Windows from the beginning of the fault to the end of the one in which it was told."""
    for event in monitor.events:
        since = event["time"] - planted.START - BEFORE
        if since > 0 and any(anomaly["what"] in wanted for anomaly in event["anomalies"]):
            return since / EVERY
    return None


def simulated() -> dict:
    server = planted.server()
    runs = [[Segment(STEADY_SECONDS, rate=2.0 + index % 4)] for index in range(STEADY)]
    places = [("steady", None)] * STEADY
    for name, fault in FAULTS.items():
        runs += [[Segment(BEFORE), Segment(AFTER, **fault)]] * RUNS
        places += [(name, fault)] * RUNS
    told: dict = {"windows": 0, "false_alarms": 0, "bias": [], "faults": {name: [] for name in FAULTS}, "strange": 0}
    lives = planted.lives(server, runs, seed=11)
    for (name, fault), segments, events in zip(places, runs, lives, strict=True):
        monitor = watch(server, events, sum(segment.seconds for segment in segments))
        if fault is None:
            summary = monitor.summary()
            told["windows"] += summary["compared"]
            told["false_alarms"] += len(monitor.anomalies)
            told["bias"].append(summary["bias"])
            continue
        wanted = {"tokens_per_step"} if "acceptance" in fault else {"ttft", "itl", "e2e_latency"}
        told["faults"][name].append(delay(monitor, wanted))
        told["strange"] += sum(anomaly["what"] not in wanted for anomaly in monitor.anomalies)
        print(name, told["faults"][name], file=sys.stderr)
    told["bias"] = {metric: float(np.mean([bias[metric] for bias in told["bias"]])) for metric in told["bias"][0]}
    told["false_alarms_per_day"] = told["false_alarms"] / told["windows"] * 86400.0 / EVERY
    told["promised_per_day"] = 86400.0 / EVERY / RUN_LENGTH
    return told


def real() -> list[dict]:
    trace = read_trace(ROOT / "data" / "vllm_h200.csv")
    deployment = fit(trace, step_time="affine", holdout="arrival_rate==14").deployment()
    rows = []
    for name in ("k0", "eagle_k1_a80", "eagle_k3_a80"):
        monitor = Monitor(deployment, average_run_length=RUN_LENGTH)
        path = ROOT / "tests" / "fixtures" / "vllm" / f"h200_{name}_r14_scrapes.txt"
        for event in monitor.watch(recorded([path])):
            if event["predicted"] is None:
                continue
            row = {"run": name, "seconds": event["duration"], "requests": event["measured"]["requests"]}
            row["arrival_rate"] = event["measured"]["arrival_rate"]
            for metric in ("ttft", "itl", "tpot", "e2e_latency"):
                row[metric] = {"measured": event["measured"][metric]} | event["predicted"][metric]
            rows.append(row | {"anomalies": [anomaly["text"] for anomaly in event["anomalies"]]})
    return rows


def table(found: dict) -> str:
    told, lines = found["simulated"], ["# Monitoring", ""]
    lines += [
        f"Simulated (synthetic) servers, windows of {EVERY:g} s, average run length {RUN_LENGTH:g} windows. Without a "
        f"fault: {told['false_alarms']} alarms in {told['windows']} windows, {told['false_alarms_per_day']:.1f} a day "
        f"(promised: at most {told['promised_per_day']:.1f}); alarms of something else than what was planted: "
        f"{told['strange']}.",
        "",
        "| fault | runs | told | windows until told, mean (worst) |",
        "|---|---|---|---|",
    ]
    for name, delays in told["faults"].items():
        known = [value for value in delays if value is not None]
        shown = f"{np.mean(known):.1f} ({max(known):.0f})" if known else "-"
        lines.append(f"| {name} | {len(delays)} | {len(known)} | {shown} |")
    lines += ["", "vLLM 0.25.1 on an H200, 14 req/s, fitted to the other rates:", ""]
    lines += ["| run | window | metric | measured | predicted | 90 % | error |", "|---|---|---|---|---|---|---|"]
    for row in found["real"]:
        for metric in ("ttft", "itl", "tpot", "e2e_latency"):
            one = row[metric]
            measured, value, low, high = (1000 * one[key] for key in ("measured", "value", "low", "high"))
            lines.append(
                f"| {row['run']} | {row['seconds']:.1f} s, {row['requests']:g} requests | {metric} "
                f"| {measured:.3g} ms | {value:.3g} ms | {low:.3g} to {high:.3g} "
                f"| {100 * (value / measured - 1):+.0f} % |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    found = {"every": EVERY, "average_run_length": RUN_LENGTH, "simulated": simulated(), "real": real()}
    (HERE / "monitoring.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (HERE / "monitoring.md").write_text(table(found), encoding="utf-8")
    print(table(found))
