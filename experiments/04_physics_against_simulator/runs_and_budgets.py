"""Finite runs and token budgets of the model against the discrete-event simulator; see README.md.

    python experiments/04_physics_against_simulator/runs_and_budgets.py

Finite runs: three synthetic servers (prefill-heavy, balanced, cache-heavy), from 0.3 to 5 times the capacity, 100 to
1,000 requests, equal and geometric lengths, without a cap and with one of 16. Token budgets: prompts of 2,000 and 300
tokens, budgets of 128 to 2,048, up to 0.9 of capacity. Without a budget: prompts that meet in one step, of 300 to 4,000
tokens, outputs of 8 and 120. Writes runs_and_budgets.json and runs_and_budgets.md.
"""

import json
import sys
import time
from itertools import product
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

from diffspec import Configuration, ConstantAcceptance, DraftCost, RooflineStepTime, ServingModel, Workload  # noqa: E402
from diffspec.lengths import Lengths  # noqa: E402
from diffspec.percentiles import predict_distribution  # noqa: E402
from diffspec.simulating import Engine, simulate  # noqa: E402

HERE = Path(__file__).resolve().parent
SERVERS = {  # step time, prompt and output length
    "prefill-heavy": (
        RooflineStepTime(weight_read=0.02, token_compute=2e-4, kv_read=6e-8, prefill_token=2e-5),
        *(1000.0, 241.0),
    ),
    "balanced": (
        RooflineStepTime(weight_read=0.05, token_compute=1e-3, kv_read=1e-6, prefill_token=1e-4),
        *(300.0, 241.0),
    ),
    "cache-heavy": (
        RooflineStepTime(weight_read=6e-3, token_compute=4e-5, kv_read=2e-7, prefill_token=1e-6),
        *(2000.0, 500.0),
    ),
}
USES, RUNS, CAP = (0.3, 0.9, 1.0, 1.2, 2.3, 5.0), (100, 300, 1000), 16
LAWS = {"fixed": 0.0, "geometric": 1.0}
DRAFTING = RooflineStepTime(
    weight_read=6e-3, token_compute=4e-5, kv_read=6e-8, prefill_token=2e-5, draft=DraftCost(pass_base=5e-4)
)
BUDGETS = (  # prompt length, budget, draft length
    *((2e3, 256, 0), (2e3, 256, 4), (2e3, 512, 0), (2e3, 1024, 4), (2e3, 2048, 0)),
    *((300.0, 128, 0), (300.0, 512, 4)),
)
BUDGET_USES = (0.2, 0.5, 0.7, 0.8, 0.9)
MEETING = ((300.0, 120.0), (1e3, 120.0), (4e3, 120.0), (1e3, 8.0))  # prompt and output length
MEETING_USES = (0.3, 0.6, 0.9)


@jax.jit
def predict(model: ServingModel, load: Workload, config: Configuration):
    """Compiled once for each set of fields that are given."""
    return model.predict(load, config)


@jax.jit
def chain_of(model: ServingModel, load: Workload, config: Configuration):
    return predict_distribution(model, load, config, Lengths.fixed(), states=256)


def error(predicted, estimate) -> float:
    return float(predicted) / estimate.value - 1.0


def finite_runs() -> list[dict]:
    """Mean e2e of finite runs, and what the steady state would say of it."""
    cells = []
    for (server, (step_time, prompt, output)), cap in product(SERVERS.items(), (None, CAP)):
        model = ServingModel(step_time, first_token_steps=1.5)
        config = Configuration(max_batch_size=None if cap is None else float(cap))
        for law, scv in LAWS.items():
            one = Workload(prompt, output, arrival_rate=1.0, output_scv=scv)
            capacity = float(predict(model, one, config).capacity)
            for use, n in product(USES, RUNS):
                load = {"prompt_length": prompt, "output_length": output, "arrival_rate": use * capacity}
                engine = Engine(max_batch_size=cap)
                found = simulate(
                    step_time, Workload(**load), engine, n_requests=n, replications=24, finite=True, output_law=law
                ).mean("e2e")
                run = predict(model, Workload(**load, output_scv=scv, n_requests=float(n)), config)
                steady = predict(model, Workload(**load, output_scv=scv), config)
                cells.append(
                    {"server": server, "cap": cap, "lengths": law, "use": use, "n_requests": n}
                    | {"simulated": found.value, "half_width": found.half_width}
                    | {"error": error(run.e2e_latency, found), "error_of_steady": error(steady.e2e_latency, found)}
                )
            print(f"{server}, cap {cap}, {law}", file=sys.stderr, flush=True)
    return cells


def budgets() -> list[dict]:
    """Means of ttft and e2e, and p95 of both by the chain, under a token budget."""
    model = ServingModel(DRAFTING, first_token_steps=1.5)
    cells = []
    for (prompt, budget, k), use in product(BUDGETS, BUDGET_USES):
        config = Configuration(float(k), ConstantAcceptance(0.8), max_batched_tokens=float(budget))
        rate = use * float(predict(model, Workload(prompt, 120.0, arrival_rate=1.0), config).capacity)
        load = Workload(prompt, 120.0, arrival_rate=rate)
        engine = Engine(k, (0.8,) * k, max_batched_tokens=budget)
        found = simulate(DRAFTING, load, engine, n_requests=3000, replications=8)
        mean, chain = (
            predict(model, load, config),
            chain_of(model, load, config),
        )
        cells.append(
            {"prompt_length": prompt, "budget": budget, "draft_length": k, "use": use, "arrival_rate": rate}
            | {"ttft": error(mean.ttft, found.mean("ttft")), "e2e": error(mean.e2e_latency, found.mean("e2e"))}
            | {"ttft by the chain": error(chain.ttft_mean, found.mean("ttft"))}
            | {"e2e by the chain": error(chain.e2e_mean, found.mean("e2e"))}
            | {"p95 of ttft": error(chain.ttft[2], found.percentile("ttft", 95.0))}
            | {"p95 of e2e": error(chain.e2e[2], found.percentile("e2e", 95.0))}
            | {"half width of ttft": found.mean("ttft").relative}
        )
        print(f"prompts of {prompt:g}, budget {budget}, k = {k}, {use}", file=sys.stderr, flush=True)
    return cells


def meeting() -> list[dict]:
    """Means of ttft and e2e without a token budget, where prompts share steps."""
    model = ServingModel(DRAFTING, first_token_steps=1.5)
    cells = []
    for (prompt, output), use in product(MEETING, MEETING_USES):
        rate = use * float(predict(model, Workload(prompt, output, arrival_rate=1.0), Configuration()).capacity)
        load = Workload(prompt, output, arrival_rate=rate)
        found = simulate(DRAFTING, load, Engine(), n_requests=3000, replications=8)
        mean = predict(model, load, Configuration())
        cells.append(
            {"prompt_length": prompt, "output_length": output, "use": use, "arrival_rate": rate}
            | {"ttft": error(mean.ttft, found.mean("ttft")), "e2e": error(mean.e2e_latency, found.mean("e2e"))}
            | {f"half width of {name}": found.mean(name).relative for name in ("ttft", "e2e")}
        )
        print(f"prompts of {prompt:g}, outputs of {output:g}, {use}", file=sys.stderr, flush=True)
    return cells


def run_table(cells: list[dict]) -> str:
    """Mean and largest absolute error of e2e by load."""
    lines = ["| load | cap | lengths | runs | finite run | steady state | simulator's half width |", "|" + "---|" * 7]
    for use, cap, law in product(USES, (None, CAP), LAWS):
        own = [c for c in cells if (c["use"], c["cap"], c["lengths"]) == (use, cap, law)]
        told = [np.abs([c[name] for c in own]) for name in ("error", "error_of_steady")]
        parts = [f"{errors.mean():.1%} ({errors.max():.0%})" for errors in told]
        if use >= 1.0:
            parts[1] = "none: saturated"
        width = np.mean([c["half_width"] / c["simulated"] for c in own])
        lines.append(f"| {use} | {cap or 'none'} | {law} | {len(own)} | {' | '.join(parts)} | {width:.1%} |")
    return "\n".join(lines) + "\n"


def budget_table(cells: list[dict]) -> str:
    """Errors by load: mean and largest absolute one over the budgets."""
    names = ("ttft", "e2e", "ttft by the chain", "e2e by the chain", "p95 of ttft", "p95 of e2e")
    lines = ["| load | " + " | ".join(names) + " | half width of ttft |", "|" + "---|" * (len(names) + 2)]
    for use in BUDGET_USES:
        own = [c for c in cells if c["use"] == use]
        errors = [np.abs([c[name] for c in own]) for name in names]
        width = np.mean([c["half width of ttft"] for c in own])
        parts = " | ".join(f"{e.mean():.1%} ({e.max():.0%})" for e in errors)
        lines.append(f"| {use} | {parts} | {width:.1%} |")
    return "\n".join(lines) + "\n"


def meeting_table(cells: list[dict]) -> str:
    """Errors of both means, with the simulator's half width."""
    lines = ["| prompt | output | load | ttft | e2e |", "|" + "---|" * 5]
    for c in cells:
        told = (f"{c[name]:+.1%} (±{c[f'half width of {name}']:.1%})" for name in ("ttft", "e2e"))
        lines.append(f"| {c['prompt_length']:g} | {c['output_length']:g} | {c['use']} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    start = time.monotonic()
    found = {"finite_runs": finite_runs(), "budgets": budgets(), "meeting": meeting()}
    text = (
        "## Finite runs\n\n"
        + run_table(found["finite_runs"])
        + "\n## Token budgets\n\n"
        + budget_table(found["budgets"])
        + "\n## Prompts that meet, without a budget\n\n"
        + meeting_table(found["meeting"])
    )
    (HERE / "runs_and_budgets.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (HERE / "runs_and_budgets.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
