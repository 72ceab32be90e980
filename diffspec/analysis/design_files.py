"""Runs to make, as files that tools read: plans for `diffspec collect`, parameters for `vllm bench sweep serve`.

A draft length belongs to the server, so there is one plan and one pair of parameter files for each.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from diffspec.collecting.plan import Limits, Measure
from diffspec.fitting.deployment import FittedDeployment

WARMUP = 20
PACE = 2.0
"""A closed loop that serves so many times what was predicted is ended."""
SPARE = 1.5
"""Plans allow this many times the requests that they name, and the time that they take: warm-ups grow with latency."""
_SERVED = ("verifier", "engine", "hardware", "max_batch_size", "kv_capacity_tokens", "max_batched_tokens")
_DRAFTING = ("method", "drafter", "drafter_params", "draft_probability")

Points = Sequence[Mapping[str, Any]]


def by_draft_length(points: Points) -> dict[int, list[Mapping[str, Any]]]:
    """Points of each draft length, shortest first."""
    return {k: [p for p in points if p["draft_length"] == k] for k in sorted({p["draft_length"] for p in points})}


def plans(deployment: FittedDeployment, points: Points, max_rate: float | None = None) -> list[dict[str, Any]]:
    """One plan a draft length, as plain data for YAML (:func:`diffspec.collecting.plan_text.read_plan`): the identity
    is the deployment's. No load passes ``max_rate``, or else the highest rate of the points and PACE times what closed
    loops are predicted to serve."""
    made = []
    for k, chosen in by_draft_length(points).items():
        names = (*_SERVED, *(_DRAFTING if k else ()))
        identity = {"deployment": deployment.name, "draft_length": k} | ({} if k else {"method": "none"})
        identity |= {name: deployment.defaults[name] for name in names if deployment.defaults.get(name) is not None}
        grid = []
        for point in chosen:
            load = {"arrival_rate": point["arrival_rate"]} if "arrival_rate" in point else _whole(point)
            lengths = {name: _plain(point[name]) for name in ("prompt_length", "output_length")}
            grid.append(load | lengths | {"requests": point["requests"]})
        flying = [point["concurrency"] for point in chosen if "concurrency" in point]
        rates = [point.get("arrival_rate") or float(f"{PACE * point['throughput']:.2g}") for point in chosen]
        limits = {
            "max_rate": _plain(max(rates) if max_rate is None else max_rate),
            "max_requests": math.ceil(SPARE * sum(point["requests"] + WARMUP for point in chosen)),
            "max_concurrency": int(max([Limits().max_concurrency, *flying])),
        }
        longest = max((point["requests"] + WARMUP) / point["throughput"] for point in chosen)
        seconds = max(Measure().most_seconds, float(math.ceil(SPARE * longest)))
        measure = {"warmup_requests": WARMUP, "most_seconds": seconds}
        made.append({"identity": identity, "limits": limits, "measure": measure, "grid": grid})
    return made


def plan_files(made: Points, name: str) -> dict[str, str]:
    """File name -> YAML text of :func:`plans`: ``name`` for one draft length, else NAME-k0.yaml, NAME-k4.yaml, ..."""
    stem, dot, ending = name.rpartition(".") if "." in name else (name, "", "")
    return {
        (name if len(made) == 1 else f"{stem}-k{plan['identity']['draft_length']}{dot}{ending}"): (
            "# diffspec collect THIS.yaml --url http://127.0.0.1:8000 --out trace\n"
            f"# with the server started for {plan['identity']['draft_length']} draft tokens a step\n"
            + yaml.safe_dump(plan, sort_keys=False)
        )
        for plan in made
    }


def _whole(point: Mapping[str, Any]) -> dict[str, Any]:
    return {"concurrency": int(point["concurrency"])}


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def sweeps(deployment: FittedDeployment, points: Points) -> list[dict[str, Any]]:
    """One entry a draft length: ``serve_params`` and ``bench_params`` as `vllm bench sweep serve` reads them (each
    bench record a run of random tokens of fixed lengths) and the ``command`` that runs them.

    vLLM multiplies servers by benchmarks, hence a pair of files for each draft length.
    """
    made = []
    for k, chosen in by_draft_length(points).items():
        serve: dict[str, Any] = {"_benchmark_name": f"k{k}"}
        batch = deployment.defaults.get("max_batch_size")
        if batch is not None:
            serve["max_num_seqs"] = int(batch)
        if k:
            method, drafter = (deployment.defaults.get(name) for name in ("method", "drafter"))
            config: dict[str, Any] = {} if method is None else {"method": method}
            if method not in ("ngram", "suffix"):
                config["model"] = drafter or "DRAFTER"
            serve["speculative_config"] = config | {"num_speculative_tokens": k}
        bench = []
        for point in chosen:
            closed = "concurrency" in point
            load = f"c{point['concurrency']:g}" if closed else f"r{point['arrival_rate']:g}"
            record: dict[str, Any] = {
                "_benchmark_name": f"{load}_p{point['prompt_length']:g}_o{point['output_length']:g}"
            }
            record |= _max_concurrency(point) if closed else {"request_rate": point["arrival_rate"]}
            record |= {"num_prompts": point["requests"]}
            record |= {f"random_{end}_len": round(point[f"{name}_length"]) for end, name in _ENDS}
            bench.append(record)
        names = f"serve_params_k{k}.json", f"bench_params_k{k}.json"
        made.append({"draft_length": k, "serve_params": [serve], "bench_params": bench, "command": _command(k, *names)})
    return made


_ENDS = (("input", "prompt"), ("output", "output"))


def _max_concurrency(point: Mapping[str, Any]) -> dict[str, Any]:
    return {"max_concurrency": int(point["concurrency"])}


def _command(k: int, serve: str, bench: str) -> str:
    return (
        'vllm bench sweep serve --serve-cmd "vllm serve $MODEL" --bench-cmd "vllm bench serve --model $MODEL '
        '--dataset-name random --ignore-eos" '
        f"--serve-params {serve} --bench-params {bench} --output-dir results --experiment-name k{k}"
    )


def sweep_files(sweep: Points) -> dict[str, str]:
    """File name -> text: the parameter files of :func:`sweeps`, and `run.sh`, which runs them all."""
    files = {}
    lines = ["#!/bin/sh", "# MODEL=your/verifier sh run.sh; then: diffspec fit results ...", "set -e", ': "${MODEL:?}"']
    lines.append('cd "$(dirname "$0")"')
    for entry in sweep:
        for kind in ("serve_params", "bench_params"):
            files[f"{kind}_k{entry['draft_length']}.json"] = json.dumps(entry[kind], indent=1) + "\n"
        lines.append(entry["command"])
    return files | {"run.sh": "\n".join(lines) + "\n"}
