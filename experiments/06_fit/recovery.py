"""Are planted costs found again, and do 90 % intervals hold them? Simulated traces, each of another server.

    python experiments/06_fit/recovery.py [--traces 500]

Every server has the costs of design.py, each multiplied by exp(0.5*N(0, 1)), and an acceptance drawn from 0.5 to 0.9.
The discrete-event engine, which shares the step time with the fit and nothing else, runs 20 cells of 200 requests
(draft lengths 0, 1, 3 and 5; 10 to 80 % of capacity; two prompt and output lengths); `fit` with its defaults (roofline)
sees their means. Scored are the planted costs, and latencies at a load, a draft length (4) and lengths that were not
run, against the engine's own means over 20,000 requests. Results are written after every ten traces, and --traces goes
on from there.
"""

import argparse
import json
import time
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)
import design as shared  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import diffspec  # noqa: E402
from diffspec.acceptance import ConstantAcceptance  # noqa: E402
from diffspec.cli.prepare import prepare_jax  # noqa: E402
from diffspec.configuration import Configuration  # noqa: E402
from diffspec.fitting.evaluate import predict_trace  # noqa: E402
from diffspec.parameters import get_parameters, parameter_infos, to_unconstrained  # noqa: E402
from diffspec.serving import ServingModel  # noqa: E402
from diffspec.simulating import Engine, simulate  # noqa: E402
from diffspec.workload import Workload  # noqa: E402

HERE = Path(__file__).parent
PLANTED = (
    *("weight_read", "token_compute", "kv_read", "step_overhead", "prefill_token"),
    *("draft.pass_base", "draft.pass_sequence"),
)
OBSERVED = ("ttft_mean", "itl_mean", "e2e_mean")
CELLS = [
    (share, k, *((256.0, 128.0) if number % 2 else (1024.0, 64.0)))
    for k in (0, 1, 3, 5)
    for number, share in enumerate((0.1, 0.3, 0.5, 0.65, 0.8))
]
UNSEEN = (0.6, 4, 512.0, 100.0)
LEVEL = 0.9


def server(random) -> tuple[ServingModel, float]:
    """A planted server and its acceptance."""
    costs = jax.tree.map(jnp.asarray, shared.COSTS)
    leaves = {f"step_time.{path}" for path in PLANTED}
    model = ServingModel(costs, request_overhead=shared.OVERHEAD, waiting_states=0)
    values = {
        path: float(value) * np.exp(0.5 * random.standard_normal())
        for path, value in get_parameters(model).items()
        if path in leaves
    }
    return diffspec.parameters.set_parameters(model, {p: jnp.asarray(v) for p, v in values.items()}), random.uniform(
        0.5, 0.9
    )


@jax.jit
def capacity(model, acceptance, k, prompt, output):
    config = Configuration(k, ConstantAcceptance(acceptance), max_batch_size=256.0)
    return model.predict(Workload(prompt, output, arrival_rate=0.01), config).capacity


def measured(model, acceptance: float, cell, requests: int, seed: int) -> dict:
    """A simulated run as a row of the table."""
    share, k, prompt, output = cell
    rate = share * float(capacity(model, acceptance, float(k), prompt, output))
    engine = Engine(k, (acceptance,) * k, max_batch_size=256, request_overhead=shared.OVERHEAD)
    found = simulate(
        model.step_time,
        Workload(prompt, output, arrival_rate=rate),
        engine,
        n_requests=requests,
        replications=1,
        seed=seed,
    )
    row = {f"{name}_mean": found.mean(name).value for name in ("ttft", "e2e")} | {"itl_mean": found.itl().value}
    row |= {"deployment": "planted", "arrival_rate": rate, "arrival_process": "poisson", "draft_length": k}
    row |= {"method": "draft_model" if k else "none", "max_batch_size": 256, "window": "steady", "offered_rate": rate}
    row |= {"position_acceptance": ";".join([str(acceptance)] * k), "prompt_length": prompt, "output_length": output}
    return row | {"n_requests": requests}


def one(seed: int) -> dict:
    """Per planted cost: log(fitted/planted), rank of the planted value among the draws [0, 1], share told; per latency
    of the unseen cell: log(predicted/simulated), inside the interval."""
    random = np.random.default_rng(seed)
    model, acceptance = server(random)
    rows = [measured(model, acceptance, cell, 200, 1000 * seed + number) for number, cell in enumerate(CELLS)]
    deployment = diffspec.fit(shared.table(rows), step_time="roofline", all_rows=True).deployment()
    sure = deployment.uncertainty
    assert sure is not None
    true, fitted, infos = get_parameters(model), get_parameters(deployment.serving), parameter_infos(deployment.serving)
    costs = {}
    for path in (f"step_time.{name}" for name in PLANTED):
        index = sure.paths.index(path)
        where, fit_at = (float(to_unconstrained(jnp.asarray(values[path]), infos[path])) for values in (true, fitted))
        rank = float(np.mean(sure.deviations(64)[:, index] + fit_at < where))
        told = 1.0 - min(float(sure.deviation[index] / sure.prior[index]), 1.0) ** 2
        costs[path.removeprefix("step_time.")] = {"error": fit_at - where, "rank": rank, "told": told}
    long = shared.table([measured(model, acceptance, UNSEEN, 20_000, 1000 * seed + 999)])
    scored = predict_trace(deployment, long.frame)
    latencies = {}
    for name in OBSERVED:
        value, told = float(scored.measured[name][0]), float(scored.predicted[name][0])
        inside = float(scored.low[name][0]) <= value <= float(scored.high[name][0])
        latencies[name] = {"error": float(np.log(told / value)), "inside": bool(inside)}
    return {"seed": seed, "costs": costs, "latencies": latencies}


def summary(traces: list[dict]) -> dict:
    costs = {}
    for name in traces[0]["costs"]:
        error, rank, told = (
            np.asarray([trace["costs"][name][key] for trace in traces]) for key in ("error", "rank", "told")
        )
        costs[name] = {
            "median error": float(np.median(error)),
            "median |error|": float(np.median(np.abs(error))),
            "told": float(np.median(told)),
            "inside 90 %": float(np.mean(np.abs(rank - 0.5) <= LEVEL / 2)),
            "inside 50 %": float(np.mean(np.abs(rank - 0.5) <= 0.25)),
        }
    latencies = {
        name: {
            "median error": float(np.median([trace["latencies"][name]["error"] for trace in traces])),
            "mean |error|": float(np.mean([abs(trace["latencies"][name]["error"]) for trace in traces])),
            "inside 90 %": float(np.mean([trace["latencies"][name]["inside"] for trace in traces])),
        }
        for name in OBSERVED
    }
    return {"traces": len(traces), "costs": costs, "latencies": latencies}


def report(found: dict) -> str:
    lines = [
        f"# Planted costs found again, {found['traces']} simulated traces",
        "",
        "`python experiments/06_fit/recovery.py`. Errors are log(fitted/planted); *told*: share of the prior's "
        "variance that the trace takes away.",
        "",
        "| cost | median error | median size of the error | told (median) | inside 90 % | inside 50 % |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["costs"].items():
        numbers = (f"{row['median error']:+.2f}", f"{row['median |error|']:.2f}", f"{100 * row['told']:.0f} %")
        inside = (f"{100 * row[key]:.0f} %" for key in ("inside 90 %", "inside 50 %"))
        lines.append(f"| {name} | {' | '.join((*numbers, *inside))} |")
    lines += [
        "",
        "Latencies at a load, draft length and lengths that were not run, against 20,000 simulated requests:",
        "",
        "| | median error | mean size of the error | inside 90 % |",
        "|---|---|---|---|",
    ]
    for name, row in found["latencies"].items():
        numbers = (
            f"{100 * row['median error']:+.1f} %",
            f"{100 * row['mean |error|']:.1f} %",
            f"{100 * row['inside 90 %']:.0f} %",
        )
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=500)
    wanted, path, begun = parser.parse_args().traces, HERE / "recovery.json", time.monotonic()
    prepare_jax()
    traces = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for seed in range(len(traces), wanted):
        traces.append(one(seed))
        if len(traces) % 10 == 0 or len(traces) == wanted:
            path.write_text(json.dumps(traces) + "\n", encoding="utf-8")
            (HERE / "recovery.md").write_text(report(summary(traces)), encoding="utf-8")
            print(f"{len(traces)} of {wanted} traces, {time.monotonic() - begun:.0f} s", flush=True)
    print(report(summary(traces)))


if __name__ == "__main__":
    main()
