"""First principles and transfer against public GPU measurements; see README.md.

    python experiments/05_transfer/run.py --traces FOLDER

FOLDER holds the data sets named in README.md. Writes results.json and the tables of README.md.
"""

import argparse
import csv
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from scipy.optimize import least_squares  # noqa: E402

import diffspec  # noqa: E402
from diffspec.acceptance import acceptance_from_tokens_per_step  # noqa: E402
from diffspec.analysis.intervals import intervals  # noqa: E402
from diffspec.architecture import read_architecture  # noqa: E402
from diffspec.first_principles import SPREAD, Efficiency, FirstPrinciples, draws  # noqa: E402
from diffspec.fitting.fit import fit  # noqa: E402
from diffspec.fitting.principles import prior_draws, transfer, unmeasured_deployment  # noqa: E402
from diffspec.hardware import accelerator  # noqa: E402
from diffspec.parameters import parameter_infos, set_parameters, to_constrained, to_unconstrained  # noqa: E402
from diffspec.resources import memory_plan  # noqa: E402
from diffspec.step_time import BatchState  # noqa: E402
from diffspec.workload import Workload, batched  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from shared_traces import APERTUS_KV_TOKENS, APERTUS_LENGTHS  # noqa: E402

CONFIGS = json.loads((HERE / "configs.json").read_text(encoding="utf-8"))
MARK = "<!-- results: written by run.py -->"
FITTED = ("memory", "kv", "compute", "layer_overhead", "sequence_overhead", "sharpness")
TRACE_COLUMNS = (
    *("deployment", "method", "draft_length", "concurrency", "prompt_length", "output_length"),
    *("ttft_mean", "tpot_mean"),
)
TRANSFER_COLUMNS = (
    *("model", "GPUs", "from", "to", "rows", "tpot: first principles", "inside", "transferred", "inside"),
    *("left as it is", "ttft: first principles", "transferred", "left as it is"),
)
METRICS = {"tpot": "tpot", "ttft": "ttft", "throughput": "throughput"}


def model(name: str):
    return read_architecture(CONFIGS[name])


# --- one engine step --------------------------------------------------------------------------------------------------


def step_cost(traces: Path) -> dict:
    """Qwen3-1.7B on an H100: forward time of a step with CUDA graphs, by tokens and context; the mixed batches of the
    same file (E1) are bound by launches, eager above 16 tokens, and left out."""
    with open(traces / "adixg_stepcost_h100" / "h100_qwen3_1p7b_step_ms.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["experiment"] == "E5"]
    columns = ("num_reqs", "num_tokens", "kv_tokens", "context_len")
    sequences, tokens, kv, context = (np.asarray([float(line[name]) for line in lines]) for name in columns)
    measured = np.asarray([float(line["forward_ms_median"]) for line in lines]) / 1e3
    pair = FirstPrinciples(model("Qwen3-1.7B"), accelerator("h100"))
    state = batched(BatchState, sequences=sequences, query_tokens=tokens, kv_tokens=kv)

    @jax.jit
    def predict(efficiency):  # a bare forward pass: nothing is scheduled or sampled
        step = pair.step_time(replace(efficiency, step_overhead=0.0))
        return jax.vmap(lambda row: step(row).total)(state)

    centre = Efficiency()
    drawn = np.asarray(jax.vmap(predict)(draws(centre, SPREAD, 128)))
    low, high = np.quantile(drawn, (0.05, 0.95), axis=0)
    splits = {
        "every other row": np.arange(len(measured)) % 2 == 0,
        "16 requests and 1,024 tokens at most": (sequences <= 16) & (context <= 1024),
    }
    found = {
        "rows": len(measured),
        "no fit": _mape(predict(centre), measured),
        "inside": float(((low <= measured) & (measured <= high)).mean()),
        "splits": {},
    }
    for name, train in splits.items():
        fitted = _fit_efficiency(predict, centre, measured, train)
        error = np.abs(np.asarray(predict(fitted)) / measured - 1.0)
        found["splits"][name] = {
            "rows fitted": int(train.sum()),
            "in sample": float(error[train].mean()),
            "held out": float(error[~train].mean()),
            "efficiency": {path: float(getattr(fitted, path)) for path in FITTED},
        }
    return found


def _fit_efficiency(predict, centre: Efficiency, measured, rows) -> Efficiency:
    """Efficiency factors with the smallest squared log error (3 % noise) plus their priors."""
    infos = parameter_infos(centre)

    def at(z):
        values = {
            path: to_constrained(
                to_unconstrained(getattr(centre, path), infos[path]) + SPREAD[path] * z[i], infos[path]
            )
            for i, path in enumerate(FITTED)
        }
        return set_parameters(centre, values)

    @jax.jit
    def residuals(z):
        return jnp.concatenate(
            [jnp.asarray(rows, dtype=float) * (jnp.log(predict(at(z))) - np.log(measured)) / 0.03, z]
        )

    return at(least_squares(residuals, np.zeros(len(FITTED)), jax.jacfwd(residuals)).x)


# --- mixture of experts -----------------------------------------------------------------------------------------------


def experts(traces: Path) -> dict:
    """Fused mixture-of-experts kernels on an H200: does time follow coverage * expert bytes / bandwidth?

    Per shape, number format and routing two parameters, base and share of bandwidth, fitted to every other token count
    up to 512 in log error and scored on the others; beside it the same with all experts read always (no coverage).
    """
    import pandas as pd

    path = traces / "aiconfigurator_silicon" / "h200_sxm_moe_vllm_0.22.0_moe_perf.parquet"
    frame = pd.read_parquet(path)
    whole = (frame["moe_tp_size"] == 1) & (frame["moe_ep_size"] == 1) & (frame["num_tokens"] <= 512)
    frame = frame[whole & frame["moe_dtype"].isin(["bfloat16", "fp8"])]
    device = accelerator("h200")
    keys = ["hidden_size", "inter_size", "topk", "num_experts", "moe_dtype", "distribution"]
    errors: dict = {}
    shares: dict = {}
    for (hidden, inter, topk, count, dtype, routing), group in frame.groupby(keys):
        group = group.sort_values("num_tokens")
        tokens, measured = group["num_tokens"].to_numpy(float), group["latency"].to_numpy(float) / 1e3
        bytes_each, number_format = (2.0, "bf16") if dtype == "bfloat16" else (1.0, "fp8")
        weights = 3.0 * hidden * inter
        read = weights * count * bytes_each / device.memory_bandwidth
        compute = tokens * topk * 2.0 * weights / device.flops(number_format) / Efficiency().compute
        probability = topk / count
        forms = {
            "uniform coverage": 1.0 - (1.0 - probability) ** tokens,
            "balanced coverage": np.minimum(tokens * probability, 1.0),
            "all experts": np.ones_like(tokens),
        }
        train = np.arange(len(tokens)) % 2 == 0
        for form, coverage in forms.items():
            error, share = _two_parameters(coverage * read, compute, measured, train)
            errors.setdefault((routing, form), []).append(error)
            shares.setdefault((routing, form), []).append(share)
    return {
        routing: {
            form: {
                "held out": float(np.mean(errors[routing, form])),
                "median share of bandwidth": float(np.median(shares[routing, form])),
                "shapes": len(errors[routing, form]),
            }
            for name, form in errors
            if name == routing
        }
        for routing in sorted({name for name, _ in errors})
    }


def _two_parameters(memory, compute, measured, train) -> tuple[float, float]:
    """(held-out error, share of bandwidth) of base + sqrt((memory/share)^2 + compute^2)."""

    def predict(z):
        return np.exp(z[0]) + np.hypot(memory / np.exp(z[1]), compute)

    start = np.log([0.5 * measured.min(), 0.75])
    z = least_squares(lambda z: (np.log(predict(z)) - np.log(measured))[train], start).x
    return _mape(predict(z)[~train], measured[~train]), float(np.exp(z[1]))


# --- whole servers ----------------------------------------------------------------------------------------------------


def apertus(traces: Path) -> dict:
    """Apertus-8B on a GH200, plain and with an EAGLE head, before any trace; its acceptance is taken as measured."""
    found = {}
    with open(traces / "swissai_apertus_gh200" / "apertus8b_kgrid.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["workload"] in APERTUS_LENGTHS]
    for arm, kind in (("plain", ""), ("eagle", "head")):
        rows = []
        for line in lines:
            if line["arm"].split("-")[0] == arm:
                prompt, output = APERTUS_LENGTHS[line["workload"]]
                length = int(line["k"])
                rows.append(
                    {
                        "prompt": prompt,
                        "output": output,
                        "concurrency": float(line["concurrency"]),
                        "draft_length": length,
                        "tokens_per_step": float(line["mean_acceptance_length"]) if length else None,
                        "tpot": float(line["tpot_p50_ms"]) / 1e3,
                        "ttft": float(line["ttft_p50_ms"]) / 1e3,
                        "throughput": float(line["out_tok_s"]) / output,
                    }
                )
        pair = FirstPrinciples(model("Apertus-8B"), accelerator("gh200"), drafter_kind=kind)
        scored = score(rows, lambda row, pair=pair: _unmeasured(pair, row))
        planned = memory_plan(pair).kv_capacity_tokens
        found[arm] = scored | {"kv tokens planned": planned, "kv tokens measured": APERTUS_KV_TOKENS[arm]}
    return found


def _unmeasured(pair: FirstPrinciples, row):
    pair = replace(pair, prompt_length=float(row["prompt"]), output_length=float(row["output"]))
    return unmeasured_deployment(pair, memory_plan(pair)), prior_draws(pair, 128)


def score(rows, answer) -> dict:
    """Median prediction against measurement, and how often the 90 % interval holds it, by metric.
    ``answer(row)`` gives a deployment and a batch of models; rows that saturate count as misses."""
    collected: dict = {}
    for row in rows:
        deployment, models = answer(row)
        length = row.get("draft_length", 0)
        acceptance = acceptance_from_tokens_per_step(row["tokens_per_step"], length) if length else None
        config = deployment.configuration(float(length), acceptance=acceptance)
        workload = Workload(float(row["prompt"]), float(row["output"]), concurrency=float(row["concurrency"]))
        told = intervals(models, workload, config)["metrics"]
        for name, field in METRICS.items():
            if name in row:
                edges = told[field]
                inside = edges["low"] <= row[name] <= (edges["high"] or np.inf)
                collected.setdefault(name, []).append((edges["median"] / row[name], inside))
    return {
        name: {
            "rows": len(pairs),
            "error": float(np.mean([abs(ratio - 1.0) for ratio, _ in pairs])),
            "bias": float(np.mean([ratio - 1.0 for ratio, _ in pairs])),
            "inside": float(np.mean([inside for _, inside in pairs])),
        }
        for name, pairs in collected.items()
    }


def silicon(traces: Path, name: str, tensor_parallel: int) -> dict[str, list[dict]]:
    """Closed loops of one model under vLLM without speculation, by GPU; at most 64 in flight (larger ones queue)."""
    rows: dict[str, list[dict]] = {}
    seen = set()
    with open(traces / "aiconfigurator_silicon" / "silicon_sample.csv", newline="") as file:
        for line in csv.DictReader(file):
            source = dict(part.strip().split("=", 1) for part in line["silicon_data_source"].split(";") if "=" in part)
            concurrency = float(source.get("silicon_concurrency", "nan"))
            wanted = (line["model_path"], line["backend"], line["mode"]) == (name, "vllm", "agg")
            if not wanted or float(line["tp_size"]) != tensor_parallel or not concurrency <= 64:
                continue
            row = {
                "prompt": float(line["isl"]),
                "output": float(line["osl"]),
                "concurrency": concurrency,
                "ttft": float(line["silicon_ttft_ms"]) / 1e3,
                "tpot": float(line["silicon_tpot_ms"]) / 1e3,
            }
            device = line["system"].removesuffix("_sxm")
            key = (device, *row.values())
            if device in ("h100", "h200", "b200") and key not in seen:
                seen.add(key)
                rows.setdefault(device, []).append(row)
    return rows


def transfers(traces: Path) -> list[dict]:
    """Fitted on one GPU, predicting another: first principles alone, transferred, and the fit left as it is."""
    found = []
    for name, path in (("Llama-3.1-70B FP8", "meta-llama/Llama-3.1-70B"), ("gpt-oss-120b", "openai/gpt-oss-120b")):
        for devices in (2, 4):
            rows = silicon(traces, path, devices)
            pairs = {
                gpu: FirstPrinciples(model(name), accelerator(gpu), tensor_parallel=devices)
                for gpu in ("h100", "h200", "b200")
            }
            before = {gpu: score(rows[gpu], lambda row, p=pairs[gpu]: _unmeasured(p, row)) for gpu in rows}
            for source in rows:
                fitted = fit(_trace(rows[source]), start=pairs[source]).deployment()
                for target in rows:
                    moved, spread = transfer(fitted, accelerator(target))
                    models = draws(moved.serving, spread, 128)
                    as_it_is = draws(fitted.serving, dict.fromkeys(spread, 0.0), 128)
                    found.append(
                        {
                            "model": name,
                            "devices": devices,
                            "from": source,
                            "to": target,
                            "first principles": before[target],
                            "transferred": score(rows[target], lambda row, a=(moved, models): a),
                            "left as it is": score(rows[target], lambda row, a=(moved, as_it_is): a),
                        }
                    )
    return found


def _trace(rows: list[dict]) -> diffspec.Trace:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                (
                    "deployment",
                    "method",
                    "draft_length",
                    "concurrency",
                    "prompt_length",
                    "output_length",
                    "ttft_mean",
                    "tpot_mean",
                )
            )
            for row in rows:
                numbers = (row[key] for key in ("concurrency", "prompt", "output", "ttft", "tpot"))
                writer.writerow(("rows", "none", 0, *numbers))
        return diffspec.read_trace(path)


def _mape(predicted, measured) -> float:
    return float(np.mean(np.abs(np.asarray(predicted) / measured - 1.0)))


# --- tables -----------------------------------------------------------------------------------------------------------


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def table(columns, rows) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)] + [""]


def told(results: dict) -> str:
    step = results["step_cost"]
    lines = [
        f"Written by `python experiments/05_transfer/run.py --traces FOLDER` in {results['seconds']:.0f} s. "
        "Mean absolute errors in percent; *inside*: measurements inside the 90 % interval, in percent.",
        "",
        f"### One step: Qwen3-1.7B on an H100, {step['rows']} decode steps with CUDA graphs",
        "",
        f"First principles without any fit: {percent(step['no fit'])} %; inside: {percent(step['inside'])} %. With six "
        "efficiency factors fitted:",
        "",
        *table(
            ("fitted on", "rows", "in sample", "held out", "memory", "kv", "compute", "us a layer"),
            [
                (
                    name,
                    str(entry["rows fitted"]),
                    percent(entry["in sample"]),
                    percent(entry["held out"]),
                    *(f"{entry['efficiency'][path]:.2f}" for path in ("memory", "kv", "compute")),
                    f"{1e6 * entry['efficiency']['layer_overhead']:.0f}",
                )
                for name, entry in step["splits"].items()
            ],
        ),
        "### Experts: fused kernels on an H200, up to 512 tokens, held-out token counts",
        "",
        *table(
            ("routing", "shapes", "uniform coverage", "balanced coverage", "all experts read", "share of bandwidth"),
            [
                (
                    routing,
                    str(entry["all experts"]["shapes"]),
                    *(percent(entry[f]["held out"]) for f in ("uniform coverage", "balanced coverage", "all experts")),
                    f"{min(entry.values(), key=lambda e: e['held out'])['median share of bandwidth']:.2f}",
                )
                for routing, entry in results["experts"].items()
            ],
        ),
        "### Before any trace: Apertus-8B on a GH200",
        "",
        *table(
            ("arm", "rows", "tpot", "inside", "ttft", "inside", "throughput", "inside", "KV tokens planned / reported"),
            [
                (
                    arm,
                    str(entry["tpot"]["rows"]),
                    *(percent(entry[m][part]) for m in METRICS for part in ("error", "inside")),
                    f"{entry['kv tokens planned']:,.0f} / {entry['kv tokens measured']:,}",
                )
                for arm, entry in results["apertus"].items()
            ],
        ),
        "### Fitted on one GPU, predicting another: vLLM, closed loops of 4 to 64 requests",
        "",
        "![errors of tpot](transfer.png)",
        "",
        *table(
            TRANSFER_COLUMNS,
            [
                (
                    entry["model"],
                    str(entry["devices"]),
                    entry["from"],
                    entry["to"],
                    str(entry["transferred"]["tpot"]["rows"]),
                    percent(entry["first principles"]["tpot"]["error"]),
                    percent(entry["first principles"]["tpot"]["inside"]),
                    percent(entry["transferred"]["tpot"]["error"]),
                    percent(entry["transferred"]["tpot"]["inside"]),
                    percent(entry["left as it is"]["tpot"]["error"]),
                    *(percent(entry[w]["ttft"]["error"]) for w in ("first principles", "transferred", "left as it is")),
                )
                for entry in results["transfers"]
                if entry["from"] != entry["to"]
            ],
        ),
    ]
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Error of tpot on the other GPU: first principles, transferred, left as it is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [entry for entry in results["transfers"] if entry["from"] != entry["to"]]
    figure, axis = plt.subplots(figsize=(7, 0.32 * len(entries) + 1), layout="constrained")
    ways = ("first principles", "transferred", "left as it is")
    for number, way in enumerate(ways):
        errors = [100 * entry[way]["tpot"]["error"] for entry in entries]
        axis.barh(np.arange(len(entries)) + 0.27 * (number - 1), errors, height=0.25, label=way)
    labels = [f"{entry['model']}, {entry['devices']}x {entry['from']} to {entry['to']}" for entry in entries]
    axis.set_yticks(np.arange(len(entries)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("mean absolute error of tpot on the other GPU [%]")
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, help="folder with the data sets that README.md names")
    traces = parser.parse_args().traces
    begun = time.perf_counter()
    results = {
        "step_cost": step_cost(traces),
        "experts": experts(traces),
        "apertus": apertus(traces),
        "transfers": transfers(traces),
    }
    results["seconds"] = time.perf_counter() - begun
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, HERE / "transfer.png")
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text.split(MARK)[0] + MARK + "\n\n" + told(results), encoding="utf-8")
    print(told(results))


if __name__ == "__main__":
    main()
