"""Placement of experts and draft length together, beside round robin and EPLB: rank load, latency, draft length.

The server is known from its dimensions alone (Qwen3-30B-A3B's with 64, 128 or 256 experts, 8 a token, on eight H100, an
EAGLE-like head); routing is synthetic: Zipf's law with log-normal noise, and the power laws that AIConfigurator says it
saw of DeepSeek-V3/R1 (exponent 1.01) and Qwen3-235B (1.2). No measured histogram is at hand. What is measured is how
long the experts of a layer take on an H200 under these power laws (AIConfigurator, Apache-2.0): the second part
compares it with the experts read and with the load of the busiest rank. Where all placements can be compared, the
search is.

    python experiments/07_optimise/expert_balance.py [--seeds 3] [--traces FOLDER] [--parts rows,tiny,measured]
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from diffspec.cli.prepare import prepare_jax

prepare_jax()

from diffspec.acceptance import ConstantAcceptance  # noqa: E402
from diffspec.analysis.before_traces import before_traces  # noqa: E402
from diffspec.architecture import Transformer  # noqa: E402
from diffspec.first_principles import FirstPrinciples  # noqa: E402
from diffspec.hardware import accelerator  # noqa: E402
from diffspec.optimizing.expert_balance import place_experts  # noqa: E402
from diffspec.optimizing.expert_placement import ExpertPlacement  # noqa: E402
from diffspec.traces.routing import RoutingCounts  # noqa: E402

HERE = Path(__file__).parent
RANKS, PER_TOKEN, LOADS, LONGEST = 8, 8, (4.0, 32.0, 256.0), 7
PROMPT, OUTPUT, ACCEPTANCE = 512.0, 256.0, 0.7
SKEWS = ("zipf 0.4", "zipf 0.8", "zipf 1.2", "power law 1.01", "power law 1.2")
NAMES = ("round_robin", "eplb", "chosen", "latency_only")


def capped(weights: np.ndarray, per_token: int = PER_TOKEN) -> np.ndarray:
    """Popularity in proportion to weights, summing to per_token, none above 1."""
    scale = per_token / weights.sum()
    for _ in range(200):
        scale *= per_token / np.minimum(scale * weights, 1.0).sum()
    return np.minimum(scale * weights, 1.0)


def power_law(random: np.random.Generator, size: int, exponent: float, low: float, high: float) -> np.ndarray:
    """Draws of density x^-exponent on [low, high]."""
    ends = np.array([low, high]) ** (1 - exponent)
    return (ends[0] + (ends[1] - ends[0]) * random.random(size)) ** (1 / (1 - exponent))


def popularity(skew: str, experts: int, seed: int, per_token: int = PER_TOKEN) -> np.ndarray:
    random, (kind, exponent) = np.random.default_rng(seed), skew.rsplit(" ", 1)
    if kind == "zipf":
        weights = np.arange(1, experts + 1.0) ** -float(exponent) * np.exp(0.3 * random.standard_normal(experts))
        return capped(random.permutation(weights), per_token)
    return capped(power_law(random, experts, float(exponent), 1.0, 0.8 * 1024), per_token)


def server(experts: int, per_token: int = PER_TOKEN, ranks: int = RANKS):
    """Qwen3-30B-A3B with another number of experts, before any trace."""
    verifier = Transformer(
        **{"name": f"{experts} experts", "layers": 48, "hidden": 2048, "vocab": 151936, "heads": 32, "kv_heads": 4},
        **{"head_dim": 128, "intermediate": 0, "moe_layers": 48, "num_experts": experts},
        **{"experts_per_token": per_token, "expert_intermediate": 768},
    )
    device = {"hardware": accelerator("h100"), "tensor_parallel": ranks, "drafter_kind": "head"}
    return before_traces(FirstPrinciples(verifier, **device, prompt_length=PROMPT, output_length=OUTPUT)).deployment


def slowest_of_steps(slots, shares: np.ndarray, tokens: float, steps: int = 4000) -> tuple[float, float]:
    """Copies read by the rank that reads most in a step, mean over simulated steps; and the largest mean of a rank."""
    placement = ExpertPlacement(np.array(slots), RANKS, shares.size)
    each = (shares[None] / placement.copies)[0][placement.slots[0]]
    hit = np.random.default_rng(0).random((steps, each.size)) < 1 - (1 - np.minimum(each, 1 - 1e-12)) ** tokens
    read = hit.reshape(steps, RANKS, -1).sum(axis=2)
    return float(read.max(axis=1).mean()), float(read.mean(axis=0).max())


def placed(deployment, shares: np.ndarray, redundant: int) -> dict:
    asked = {"loads": LOADS, "loop": "concurrency", "prompt_length": PROMPT, "output_length": OUTPUT}
    asked |= {"max_draft_length": LONGEST, "acceptance": ConstantAcceptance(ACCEPTANCE)}
    routes = RoutingCounts("synthetic", shares[None])
    return place_experts(deployment, routes, redundant_experts=redundant, **asked)[1]


def tiny(seeds: int) -> list[dict]:
    """How far the search stays above the best of all placements and draft lengths, where all can be compared."""
    rows = []
    for experts, ranks, redundant in ((6, 2, 2), (8, 2, 2), (12, 4, 0)):
        deployment = server(experts, 2, ranks)
        gaps, points = [], 0
        for skew in SKEWS:
            for seed in range(seeds):
                table = placed(deployment, popularity(skew, experts, seed, 2), redundant)["table"]
                gaps += [entry["optimality_gap"] for entry in table]
                points = table[0]["points"]
        rows.append(
            {
                "experts": experts,
                "ranks": ranks,
                "redundant": redundant,
                "points": points,
                "problems": len(gaps),
                "at_the_optimum": int(sum(gap == 0.0 for gap in gaps)),
                "mean_gap": float(np.mean(gaps)),
                "largest_gap": float(np.max(gaps)),
            }
        )
        print(rows[-1], flush=True)
    return rows


def compare(seeds: int) -> list[dict]:
    rows = []
    for experts in (64, 128, 256):
        deployment = server(experts)
        for redundant in (0, 16):
            for skew in SKEWS:
                for seed in range(seeds):
                    shares = popularity(skew, experts, seed)
                    start = time.perf_counter()
                    answer = placed(deployment, shares, redundant)
                    seconds = (time.perf_counter() - start) / len(LOADS)
                    for entry in answer["table"]:
                        row = {"experts": experts, "redundant": redundant, "skew": skew, "seed": seed}
                        row |= {"load": entry["load"], "seconds": seconds, "relaxed": entry["relaxed"]}
                        for name in NAMES:
                            told = entry[name]
                            slots = told.pop("physical_to_logical_map")
                            tokens = entry["load"] * (1.0 + 0.8 * told["draft_length"])  # token_share: 0.8
                            simulated, of_means = slowest_of_steps(slots, shares, tokens)
                            row[name] = told | {"slowest_read": simulated, "largest_mean_read": of_means}
                        rows.append(row)
                print(experts, redundant, skew, f"{seconds:.1f} s a load", flush=True)
    return rows


def slim(row: dict) -> dict:
    """What is kept of a point: draft length, latency, rank load and reads of each placement, to nine digits."""
    kept = ("draft_length", "e2e_mean", "max_rank_load", "slowest_read", "largest_mean_read")
    told = {name: {key: float(f"{row[name][key]:.9g}") for key in kept} for name in NAMES}
    for name in NAMES:
        told[name]["draft_length"] = int(told[name]["draft_length"])
    return row | told


def summary(rows: list[dict]) -> list[dict]:
    """Means over seeds with their range, by experts, copies, skew and load."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["experts"], row["redundant"], row["skew"], row["load"]), []).append(row)
    made = []
    for key, members in groups.items():
        entry = dict(zip(("experts", "redundant", "skew", "load"), key, strict=True))
        for name in NAMES:
            entry[name] = {
                "max_rank_load": float(np.mean([m[name]["max_rank_load"] for m in members])),
                "e2e_mean": float(np.mean([m[name]["e2e_mean"] for m in members])),
                "draft_lengths": sorted({m[name]["draft_length"] for m in members}),
            }
            gain = [1 - m[name]["e2e_mean"] / m["eplb"]["e2e_mean"] for m in members]
            entry[name]["against_eplb"] = [min(gain), float(np.mean(gain)), max(gain)]
        made.append(entry)
    return made


def facts(rows: list[dict]) -> dict:
    gain = np.array([1 - r["chosen"]["e2e_mean"] / r["eplb"]["e2e_mean"] for r in rows])
    free = np.array([1 - r["latency_only"]["e2e_mean"] / r["eplb"]["e2e_mean"] for r in rows])
    robin = np.array([1 - r["chosen"]["e2e_mean"] / r["round_robin"]["e2e_mean"] for r in rows])
    load = np.array([r["chosen"]["max_rank_load"] / r["eplb"]["max_rank_load"] for r in rows])
    alone = np.array([r["redundant"] == 0 for r in rows])
    excess = {n: float(np.mean([r[n]["slowest_read"] / r[n]["largest_mean_read"] for r in rows])) for n in NAMES}
    read = np.array([r["chosen"]["slowest_read"] / r["eplb"]["slowest_read"] for r in rows])
    random = np.random.default_rng(0)

    def mean(values):
        means = values[random.integers(len(values), size=(4000, len(values)))].mean(axis=1)
        return [float(np.mean(values)), *(float(v) for v in np.quantile(means, [0.05, 0.95]))]

    return {
        "points": len(rows),
        "rank_load_above_eplb": int((load > 1 + 1e-9).sum()),
        "latency_above_eplb": int((gain < 0).sum()),
        "latency_better_by_over_0.1_percent": int((gain > 1e-3).sum()),
        "gain_over_eplb": mean(gain),
        "largest_gain_over_eplb": float(gain.max()),
        "gain_over_eplb_without_copies": mean(gain[alone]),
        "gain_over_eplb_with_copies": mean(gain[~alone]),
        "gain_over_round_robin": mean(robin),
        "gain_over_eplb_at_any_rank_load": mean(free),
        "largest_gain_at_any_rank_load": float(free.max()),
        "round_robin_faster_than_eplb": int(
            sum(r["round_robin"]["e2e_mean"] < r["eplb"]["e2e_mean"] * (1 - 1e-9) for r in rows)
        ),
        "draft_length_differs": {
            other: int(sum(r["chosen"]["draft_length"] != r[other]["draft_length"] for r in rows))
            for other in ("round_robin", "eplb")
        },
        "relaxation_led_to_choice": int(sum(bool(r["relaxed"] and r["relaxed"]["led_to_choice"]) for r in rows)),
        "slowest_rank_reads_over_largest_mean": excess,
        "simulated_slowest_read_over_eplb": mean(read),
        "median_seconds_a_load": float(np.median([r["seconds"] for r in rows])),
    }


def recipe(random: np.random.Generator, tokens: int, experts: int, exponent: float) -> np.ndarray:
    """Tokens of each expert as AIConfigurator's collector draws them (collector/helper.py, in our words): a power law
    on [1, 0.8 T], or on [0.01, 2] where tokens are few, scaled to T*m and rounded, what is left to the largest."""
    many = tokens * PER_TOKEN > experts
    drawn = power_law(random, experts, exponent, *((1.0, 0.8 * tokens) if many else (0.01, 2.0)))
    counts = np.round(drawn / drawn.sum() * tokens * PER_TOKEN).astype(int)
    order = np.argsort(-counts)
    for i in range(abs(tokens * PER_TOKEN - counts.sum())):
        counts[order[i % experts]] += np.sign(tokens * PER_TOKEN - counts.sum())
    return counts


def measured(traces: Path) -> list[dict]:
    """Latency of the experts of a layer under a power law over that when balanced, beside what the model's two sides
    say of it: experts read (one rank, few tokens), load of the busiest of eight ranks (many tokens)."""
    import pandas as pd

    frame = pd.read_parquet(traces / "aiconfigurator_silicon" / "h200_sxm_moe_vllm_0.22.0_moe_perf.parquet")
    frame = frame[
        (frame.moe_dtype == "bfloat16") & (frame.moe_tp_size == 1) & (frame.kernel_source == "vllm_fused_moe")
    ]
    frame = frame[(frame.num_experts == 128) & (frame.topk == PER_TOKEN)]
    told = []
    for ranks, tokens in ((1, 8), (1, 16), (1, 32), (1, 64), (8, 8192), (8, 16384)):
        part = frame[(frame.moe_ep_size == ranks) & (frame.num_tokens == tokens)]
        times = part.groupby(["hidden_size", "distribution"]).latency.mean().unstack()
        for exponent in (1.01, 1.2):
            random = np.random.default_rng(0)
            draws = [recipe(random, tokens, 128, exponent) for _ in range(400)]
            if ranks == 1:
                ratio = [(counts > 0).sum() / min(tokens * PER_TOKEN, 128) for counts in draws]
            else:
                ratio = [counts.reshape(ranks, -1).sum(axis=1).max() * ranks / counts.sum() for counts in draws]
            shown = times[f"power_law_{exponent:g}"] / times["balanced"]
            told.append(
                {
                    "ranks": ranks,
                    "tokens": tokens,
                    "exponent": exponent,
                    "measured": {str(hidden): float(value) for hidden, value in shown.items()},
                    "model": float(np.mean(ratio)),
                    "model_90": [float(v) for v in np.quantile(ratio, [0.05, 0.95])],
                }
            )
    return told


def markdown(result: dict) -> str:
    told = result["facts"]
    percent = lambda three: f"{three[0]:.2%} ({three[1]:.2%} to {three[2]:.2%})"  # noqa: E731
    excess, of_eplb = told["slowest_rank_reads_over_largest_mean"], told["simulated_slowest_read_over_eplb"]
    slower = ", ".join(f"{ratio - 1:.0%} more ({name})" for name, ratio in excess.items())
    lines = [
        "# Expert balance: placement and draft length together",
        "",
        "`python experiments/07_optimise/expert_balance.py`. Synthetic routing (no measured histogram is at hand), a "
        "server known from its dimensions: Qwen3-30B-A3B's with 64, 128 or 256 experts, 8 a token, on 8 H100 ranks, "
        f"EAGLE-like head, acceptance {ACCEPTANCE}, prompts of {PROMPT:g} and outputs of {OUTPUT:g} tokens, closed "
        f"loops of {', '.join(f'{load:g}' for load in LOADS)}. `chosen`: smallest e2e of all placements and draft "
        "lengths whose busiest rank carries no more than EPLB's. Means over points with 90 % bootstrap intervals.",
        "",
        f"* {told['points']} points (experts x copies x skew x seed x load): rank load above EPLB's in "
        f"{told['rank_load_above_eplb']}, latency above EPLB's in {told['latency_above_eplb']}, better by over 0.1 % "
        f"in {told['latency_better_by_over_0.1_percent']}.",
        f"* e2e below EPLB's by {percent(told['gain_over_eplb'])}, at most {told['largest_gain_over_eplb']:.2%}; "
        f"without copies {percent(told['gain_over_eplb_without_copies'])}, with 16 copies "
        f"{percent(told['gain_over_eplb_with_copies'])}. Below round robin's by "
        f"{percent(told['gain_over_round_robin'])}.",
        f"* At any rank load: {percent(told['gain_over_eplb_at_any_rank_load'])}, at most "
        f"{told['largest_gain_at_any_rank_load']:.2%}. Round robin is faster than EPLB at "
        f"{told['round_robin_faster_than_eplb']} points: at small batches a step is weight reading, which even loads "
        "(and copies) do not lessen.",
        f"* The best draft length differs from that under round robin at {told['draft_length_differs']['round_robin']} "
        f"points, from that under EPLB at {told['draft_length_differs']['eplb']}. The relaxation led to the choice at "
        f"{told['relaxation_led_to_choice']}; local search from EPLB did elsewhere. Median time "
        f"{told['median_seconds_a_load']:.1f} s a load, compilation included.",
        "* The model takes the rank whose mean is largest; in simulated steps the slowest rank of each reads "
        f"{slower}. In these steps the slowest rank of the chosen placement reads {of_eplb[0]:.3f} times what EPLB's "
        f"does ({of_eplb[1]:.3f} to {of_eplb[2]:.3f}).",
        "",
        "Mean over seeds; busiest rank in experts a token (1 is even); e2e in ms; k: draft lengths; gain of e2e over "
        "EPLB with the range over seeds.",
        "",
        "| experts | copies | skew | load | round robin: rank, e2e, k | EPLB: rank, e2e, k | chosen: rank, e2e, k | "
        "gain | any rank load: rank, e2e, k |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["summary"]:
        shown = [row[name] for name in NAMES]
        drafts = ["/".join(map(str, told["draft_lengths"])) for told in shown]
        cells = [
            f"{told['max_rank_load']:.3f}, {told['e2e_mean'] * 1e3:.0f}, {drafted}"
            for told, drafted in zip(shown, drafts, strict=True)
        ]
        low, mean, high = row["chosen"]["against_eplb"]
        gain = f"{mean:.2%} ({low:.2%} to {high:.2%})"
        head = f"{row['experts']} | {row['redundant']} | {row['skew']} | {row['load']:g}"
        lines.append(f"| {head} | {cells[0]} | {cells[1]} | {cells[2]} | {gain} | {cells[3]} |")
    lines += [
        "",
        "## Where everything can be compared",
        "",
        "All placements and draft lengths within EPLB's rank load against the search, before the best of all is taken.",
        "",
        "| experts | ranks | copies | points | problems | at the optimum | mean gap | largest gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["tiny"]:
        cells = [str(row[name]) for name in ("experts", "ranks", "redundant", "points", "problems", "at_the_optimum")]
        lines.append(f"| {' | '.join(cells)} | {row['mean_gap']:.3%} | {row['largest_gap']:.3%} |")
    if result["measured"]:
        lines += [
            "",
            "## Skew on measured experts (H200, vLLM 0.22, bf16, 128 experts, 8 a token)",
            "",
            "Latency of a layer's experts under AIConfigurator's power laws over that when balanced, three sizes, "
            "beside the model's: the share of experts read on one rank (few tokens), the load of the busiest of eight "
            "ranks over the mean (many tokens); mean and 90 % of 400 draws of its recipe (measured: one draw).",
            "",
            "| ranks | tokens | exponent | measured | model |",
            "|---|---|---|---|---|",
        ]
        for row in result["measured"]:
            shown = ", ".join(f"{value:.2f}" for value in row["measured"].values())
            low, high = row["model_90"]
            lines.append(
                f"| {row['ranks']} | {row['tokens']} | {row['exponent']} | {shown} | {row['model']:.2f} "
                f"({low:.2f} to {high:.2f}) |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--traces", type=Path, default=HERE.parents[2] / "shared" / "traces")
    parser.add_argument("--parts", default="rows,tiny,measured", help="what to renew; the rest is that of the file")
    options = parser.parse_args()
    path, parts = HERE / "expert_balance.json", options.parts.split(",")
    former = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = [slim(row) for row in (compare(options.seeds) if "rows" in parts else former["rows"])]
    small = tiny(options.seeds) if "tiny" in parts else former["tiny"]
    found = former.get("measured", [])
    if "measured" in parts and options.traces.is_dir():
        found = measured(options.traces)
    result = {"facts": facts(rows), "summary": summary(rows), "tiny": small, "measured": found, "rows": rows}
    lines = ",\n  ".join(json.dumps(row) for row in result.pop("rows"))
    path.write_text(json.dumps(result, indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
    (HERE / "expert_balance.md").write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
