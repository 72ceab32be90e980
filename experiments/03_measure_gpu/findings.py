"""What the H200 says of diffspec's step times, and of its predictions before any trace.

    python experiments/03_measure_gpu/findings.py

reads results/ and the tables *_h200.csv of data/, writes findings.json and findings.md. See README.md.
"""

import argparse
import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from scipy.optimize import least_squares  # noqa: E402

import diffspec  # noqa: E402
from diffspec.acceptance import acceptance_from_tokens_per_step  # noqa: E402
from diffspec.analysis.intervals import intervals  # noqa: E402
from diffspec.architecture import eagle_head, read_architecture  # noqa: E402
from diffspec.first_principles import SPREAD, Efficiency, FirstPrinciples, draws  # noqa: E402
from diffspec.fitting.principles import prior_draws, unmeasured_deployment  # noqa: E402
from diffspec.hardware import accelerator  # noqa: E402
from diffspec.parameters import parameter_infos, set_parameters, to_constrained, to_unconstrained  # noqa: E402
from diffspec.resources import memory_plan  # noqa: E402
from diffspec.step_time import AffineStepTime, BatchState, RooflineStepTime  # noqa: E402
from diffspec.workload import Workload, batched  # noqa: E402

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "data"
LLAMA_8B, LLAMA_1B = (read_architecture(DATA / "configs" / f"llama-3.{name}.json") for name in ("1-8b", "2-1b"))
QWEN_HALF_B = read_architecture(
    {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
     "num_hidden_layers": 24, "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936}
)  # fmt: skip
DRAFTERS = {
    "draft-1b": LLAMA_1B,
    "eagle-8b": replace(eagle_head(LLAMA_8B), vocab=32000),  # its own head over 32,000 drafted tokens
    "draft-0.5b": QWEN_HALF_B,
}
BARE = Efficiency(step_overhead=0.0, draft_overhead=0.0)
"""A captured pass alone: nothing is scheduled, nothing sampled but the argmax."""
FORMS = {
    "affine": (AffineStepTime, {"verify_base": 5e-3, "verify_sequence": 2e-5, "verify_query": 3e-5, "verify_kv": 3e-8}),
    "roofline": (
        RooflineStepTime,
        {"weight_read": 4e-3, "token_compute": 3e-5, "kv_read": 3e-8, "inefficiency": 1e-4, "sharpness": 2.0,
         "step_overhead": 5e-4, "sequence_overhead": 1e-5},
    ),
}  # fmt: skip


class Cells(NamedTuple):
    """Step costs of one model: requests, tokens per request, cached tokens per request [1], seconds."""

    batch: np.ndarray
    tokens: np.ndarray
    context: np.ndarray
    seconds: np.ndarray

    def where(self, rows: np.ndarray) -> "Cells":
        return Cells(*(column[rows] for column in self))

    @property
    def state(self) -> BatchState:
        """One engine step a cell: what is fed is verified."""
        return batched(
            BatchState,
            sequences=self.batch,
            query_tokens=self.batch * self.tokens,
            kv_tokens=self.batch * (self.context + self.tokens),
        )


def cells(model: str) -> Cells:
    with (HERE / "results" / "part1_step_cost.csv").open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["model"] == model]
    names = ("batch", "tokens_per_request", "context", "step_time_s")
    return Cells(*(np.asarray([float(line[name]) for line in lines]) for name in names))


def error(predicted, measured) -> float:
    return float(np.mean(np.abs(np.asarray(predicted) / measured - 1.0)))


# --- one engine step --------------------------------------------------------------------------------------------------


def before_any_trace() -> dict:
    """Step costs from dimensions and data sheet alone."""
    device, found = accelerator("h200"), {}
    measured = cells("dense-8b")
    pair = FirstPrinciples(LLAMA_8B, device)

    def verifier(efficiency):
        return jax.vmap(lambda state: pair.step_time(efficiency)(state).total)(measured.state)

    found["dense-8b, verifying"] = _told(verifier, measured) | {
        "by region": {
            name: error(np.asarray(verifier(BARE))[rows], measured.seconds[rows])
            for name, rows in {
                "at most 64 tokens in the step": measured.batch * measured.tokens <= 64,
                "65 to 512 tokens": (measured.batch * measured.tokens > 64) & (measured.batch * measured.tokens <= 512),
                "more": measured.batch * measured.tokens > 512,
            }.items()
        }
    }
    for name, architecture in DRAFTERS.items():
        all_cells = cells(name)
        alone = all_cells.where(all_cells.tokens == 1)  # a draft pass feeds one token a request
        kind = "head" if name == "eagle-8b" else "model"
        drafting = FirstPrinciples(LLAMA_8B, device, architecture, kind)

        def drafter(efficiency, drafting=drafting, alone=alone):
            cost = drafting.step_time(efficiency).draft
            return cost.pass_base + cost.pass_sequence * alone.batch + cost.pass_kv * alone.batch * alone.context

        found[f"{name}, one draft pass"] = _told(drafter, alone)
    return found


def _told(predict, measured: Cells) -> dict:
    drawn = np.asarray(jax.vmap(predict)(draws(BARE, {k: v for k, v in SPREAD.items() if k in _STEP}, 128)))
    low, high = np.quantile(drawn, (0.05, 0.95), axis=0)
    central = np.asarray(predict(BARE))
    return {
        "cells": len(measured.seconds),
        "error": error(central, measured.seconds),
        "bias": float(np.mean(central / measured.seconds - 1.0)),
        "inside 90 %": float(((low <= measured.seconds) & (measured.seconds <= high)).mean()),
    }


_STEP = ("memory", "kv", "compute", "layer_overhead", "sequence_overhead", "sharpness")


def fitted_forms() -> dict:
    """The two forms fitted to a part of the verifier's cells (log error), scored on the rest."""
    measured = cells("dense-8b")
    total = measured.batch * measured.tokens
    splits = {
        "every other cell": np.arange(len(total)) % 2 == 0,
        "context up to 1,024": measured.context <= 1024,
        "up to 64 requests": measured.batch <= 64,
        "up to 8 tokens a request": measured.tokens <= 8,
        "up to 128 tokens in the step": total <= 128,
    }
    found = {}
    for split, train in splits.items():
        rows = {"cells fitted": int(train.sum()), "cells held out": int((~train).sum())}
        for name in FORMS:
            form = fit_form(name, measured.where(train))
            relative = np.asarray(step_times(form, measured)) / measured.seconds - 1.0
            rows[name] = {
                "in sample": float(np.abs(relative[train]).mean()),
                "held out": float(np.abs(relative[~train]).mean()),
                "worst": float(np.abs(relative[~train]).max()),
            }
        found[split] = rows
    return found


def step_times(form, measured: Cells):
    return jax.vmap(lambda state: form(state).total)(measured.state)


def fit_form(name: str, measured: Cells):
    """The form with the smallest squared log error, of several starts; 10 % noise and weak priors (a factor of 20)."""
    make, start = FORMS[name]
    begin = make(**start)
    infos = parameter_infos(begin)
    centre = jnp.asarray([to_unconstrained(jnp.asarray(value), infos[path]) for path, value in start.items()])

    def at(z):
        return set_parameters(
            begin, {path: to_constrained(centre[i] + 3.0 * z[i], infos[path]) for i, path in enumerate(start)}
        )

    @jax.jit
    def residuals(z):
        return jnp.concatenate([(jnp.log(step_times(at(z), measured)) - np.log(measured.seconds)) / 0.1, 0.1 * z])

    jacobian = jax.jit(jax.jacfwd(residuals))
    random = np.random.default_rng(0)
    starts = [np.zeros(len(start)), *(0.4 * random.standard_normal((7, len(start))))]
    return at(min((least_squares(residuals, z, jacobian) for z in starts), key=lambda found: found.cost).x)


# --- whole servers ----------------------------------------------------------------------------------------------------


def servers() -> dict:
    """Latencies of the two H200 tables before any trace; acceptance is taken as measured."""
    tables = {
        "vLLM 0.25.1, EAGLE head": ("vllm_h200.csv", replace(eagle_head(LLAMA_8B)), "head"),
        "our serving loop, 1B drafter": ("instrument_h200.csv", LLAMA_1B, "model"),
    }
    found = {}
    for title, (name, drafter, kind) in tables.items():
        trace = diffspec.read_trace(DATA / name)
        kept = np.asarray(diffspec.check(trace).stationary)
        rows = [row for row, fine in zip(trace.frame.to_dict("records"), kept, strict=True) if fine]
        found[title] = {"rows": len(rows), "without speculation": {}, "with speculation": {}}
        for arm, wanted in (("without speculation", False), ("with speculation", True)):
            scored: dict[str, list[tuple[float, bool]]] = {}
            for row in rows:
                if (row["draft_length"] > 0) == wanted:
                    for metric, pair in _before(row, drafter, kind).items():
                        scored.setdefault(metric, []).append(pair)
            found[title][arm] = {
                metric: {
                    "rows": len(pairs),
                    "error": float(np.mean([abs(ratio - 1.0) for ratio, _ in pairs])),
                    "bias": float(np.mean([ratio - 1.0 for ratio, _ in pairs])),
                    "inside 90 %": float(np.mean([inside for _, inside in pairs])),
                }
                for metric, pairs in scored.items()
            }
    return found


def _before(row: dict, drafter, kind: str) -> dict[str, tuple[float, bool]]:
    """metric -> (predicted/measured, measured inside the 90 % interval)."""
    length = int(row["draft_length"])
    pair = FirstPrinciples(
        LLAMA_8B, accelerator("h200"), drafter if length else None, kind if length else "",
        prompt_length=row["prompt_length"], output_length=row["output_length"],
    )  # fmt: skip
    deployment = unmeasured_deployment(pair, memory_plan(pair))
    acceptance = acceptance_from_tokens_per_step(row["tokens_per_step"], length) if length else None
    config = replace(
        deployment.configuration(float(length), acceptance=acceptance),
        max_batch_size=float(row["max_batch_size"]),
        max_batched_tokens=float(row["max_batched_tokens"]),
    )
    workload = Workload(row["prompt_length"], row["output_length"], arrival_rate=float(row["offered_rate"]))
    told = intervals(prior_draws(pair, 128), workload, config)["metrics"]
    names = {"ttft": "ttft_mean", "itl": "itl_mean", "tpot": "tpot_mean", "e2e_latency": "e2e_mean"}
    pairs = {}
    for metric, column in names.items():
        edges = told[metric]
        inside = (edges["low"] or np.inf) <= row[column] <= (edges["high"] or np.inf)
        # a server that is predicted to be overloaded has no latency: an error of 100 %
        pairs[column] = (edges["median"] / row[column] if edges["median"] else 2.0, bool(inside))
    return pairs


# --- report -----------------------------------------------------------------------------------------------------------


def report(results: dict) -> str:
    def percent(value):
        return f"{100 * value:.1f}"

    lines = [
        "Written by `python experiments/03_measure_gpu/findings.py`. Errors are means of |predicted/measured - 1|, in "
        "percent. NVIDIA H200, bfloat16; the numbers of an instrument with random weights (README.md).",
        "",
        "### One step before any trace (data sheet and dimensions, nothing fitted)",
        "",
        "| | cells | error | bias | inside the 90 % interval |",
        "|---|---|---|---|---|",
    ]
    for name, row in results["before any trace"].items():
        inside = f"{100 * row['inside 90 %']:.0f} %"
        lines.append(f"| {name} | {row['cells']} | {percent(row['error'])} | {100 * row['bias']:+.1f} | {inside} |")
    regions = results["before any trace"]["dense-8b, verifying"]["by region"]
    lines += [
        "",
        "Verifying, by size: " + ", ".join(f"{name} {percent(value)}" for name, value in regions.items()) + ".",
    ]
    lines += [
        "",
        "### Forms fitted to a part of the verifier's cells",
        "",
        "| fitted to | cells | held out | affine: in sample | held out | worst "
        "| roofline: in sample | held out | worst |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["forms"].items():
        numbers = [percent(row[form][key]) for form in FORMS for key in ("in sample", "held out", "worst")]
        lines.append(f"| {name} | {row['cells fitted']} | {row['cells held out']} | {' | '.join(numbers)} |")
    lines += [
        "",
        "### Servers before any trace (acceptance as measured; rows that diffspec sets aside left out; overload "
        "predicted counts as an error of 100 %)",
        "",
        "| | rows | ttft | itl | tpot | e2e | e2e inside the 90 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, table in results["servers"].items():
        for arm in ("without speculation", "with speculation"):
            row = table[arm]
            numbers = [percent(row[f"{metric}_mean"]["error"]) for metric in ("ttft", "itl", "tpot", "e2e")]
            inside = f"{100 * row['e2e_mean']['inside 90 %']:.0f} %"
            lines.append(f"| {title}, {arm} | {row['e2e_mean']['rows']} | {' | '.join(numbers)} | {inside} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args(arguments)
    results = {}
    for name, study in (("before any trace", before_any_trace), ("forms", fitted_forms), ("servers", servers)):
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = study()
    (options.out / "findings.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.out / "findings.md").write_text(report(results), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
