"""Tables of where experts lie and what that does to latency."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from diffspec.report.numbers import NONE, metric_value, percent, significant
from diffspec.report.tables import table

NAMES = {
    "round_robin": "round robin",
    "eplb": "EPLB",
    "chosen": "chosen",
    "latency_only": "any rank load",
}


def placement(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `diffspec optimize --experts` says of placements: each heuristic's and ours, with the best draft length."""
    layers = f"{answer['layers']} layers of " if answer["layers"] > 1 else ""
    title = (
        f"{layers}{answer['experts']} experts, {answer['experts_per_token']:g} a token, on {answer['expert_ranks']} "
        f"ranks with {answer['slots_per_rank']} slots each ({answer['redundant_experts']} more copies): "
        f"{answer['outcome']}"
    )
    rows = []
    for entry in answer["table"]:
        for name, shown in NAMES.items():
            told = entry[name]
            length = told["draft_length"]
            rows.append(
                (
                    f"{entry['load']:g}" if name == "round_robin" else "",
                    shown,
                    significant(told["max_rank_load"], 4),
                    significant(told["load_imbalance"], 4),
                    "none will do" if length is None else f"{length:g}",
                    *(metric_value(metric, told[metric]) for metric in ("e2e_mean", "tpot_mean", "throughput")),
                    percent(entry["optimality_gap"]) if name == "chosen" else NONE,
                )
            )
    columns = ("load", "placement", "busiest rank", "imbalance", "draft length", "e2e_mean", "tpot_mean")
    yield table(title, (*columns, "throughput", "search above optimum"), rows, left=2)
    for entry in answer["table"]:
        yield Text(f"load {entry['load']:g}: {entry['words']}")
    memory = answer["memory"]
    if memory:
        yield Text(
            f"the copies take {memory['copies_bytes'] / 1e9:.3g} GB of each device; the KV cache holds "
            f"{memory['kv_capacity_tokens']:.4g} instead of {memory['kv_capacity_tokens_without']:.4g} tok"
        )
    if answer["placement"]:
        told = ", ".join(
            f"{entry['load']:g}: {NONE if entry['draft_length'] is None else entry['draft_length']}"
            for entry in answer["placement"]["at_loads"]
        )
        yield Text(f"one placement for all loads, draft length at each: {told} (JSON: experts.placement)")
        told = answer["exports"]["sglang"]
        yield Text(f"SGLang: {told['flags']} ({told['note']})")
