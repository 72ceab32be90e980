"""Ten claims about where speculation pays, examined one by one: where each holds, where it fails, and the number.

    python experiments/08_boundaries/claims.py

writes claims.json, claims.md and claims.png beside this file (about two minutes). The claims are those of two public
summaries of studies of speculative decoding. Evidence, in this order of weight:

* *cells*: step times measured on an H200 (experiments/03_measure_gpu/results/part1_step_cost.csv; 8B verifier, drafters
  of 1.2B and 0.5B and an EAGLE head, random weights): 17 cells of batch and context each, drafts of 1, 3, 5, 7 tokens.
  Gain of a cell = E(k)*verify(1)/(verify(k+1) + k*draft(1)), E(k) at a stated acceptance; an engine's own overhead of a
  step (scheduling, sampling) is in none of them.
* *served*: operating points of a real vLLM on a CPU (data/vllm_cpu_steady.csv) and on an H200 (data/vllm_h200.csv).
* *first principles*: no measurement; `diffspec.boundary` over named models and hardware, where nothing was measured.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)
HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(REPOSITORY), str(HERE)]

import numpy as np  # noqa: E402
from evidence import (  # noqa: E402
    CELL_LENGTHS,
    DATA_CENTRE,
    DRAFTERS,
    FULL,
    LENGTHS,
    LLAMA_1B,
    LLAMA_3B,
    MOE,
    OTHERS,
    Grid,
    best_step_gain,
    cell_break_even,
    cell_gain,
    cells,
    family,
    map_of,
    pairs,
    scaled_bandwidth,
    served,
    span,
    speedup,
    told,
)
from scipy.optimize import brentq  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

from diffspec.acceptance import ConstantAcceptance, acceptance_from_tokens_per_step  # noqa: E402
from diffspec.batch_state import BatchState  # noqa: E402
from diffspec.experts import ExpertRouting  # noqa: E402
from diffspec.first_principles import FirstPrinciples  # noqa: E402
from diffspec.hardware import accelerator  # noqa: E402

# --- the claims -----------------------------------------------------------------------------------------------------


def acceptance(grid: Grid = FULL) -> dict[str, Any]:
    """Gain above 70 % and loss below 40 % acceptance."""
    measured = cells()
    edges = [cell_break_even(cell) for cell in measured]
    gaining = float(np.mean([cell_gain(cell, 0.7)[0] > 1 for cell in measured]))
    losing = float(np.mean([cell_gain(cell, 0.4)[0] <= 1 for cell in measured]))
    fixed = {k: float(np.mean([cell_gain(cell, 0.7, (k,))[0] > 1 for cell in measured])) for k in CELL_LENGTHS}
    by_batch = {
        batch: span([edge for edge, cell in zip(edges, measured, strict=True) if cell["batch"] == batch])
        for batch in sorted({cell["batch"] for cell in measured})
    }
    before: dict[str, dict[str, float]] = {}
    for name, pair in pairs().items():
        axes = {"concurrency": grid.batches, "acceptance_rate": np.linspace(0.02, 0.98, grid.points).tolist()}
        found = map_of(pair, axes)["crossings"]
        before[name] = {f"{e['at']:g}": e["value"] for e in found if e["along"] == "acceptance_rate"}
    alone, many = (
        span([edge[f"{load:g}"] for edge in before.values()]) for load in (grid.batches[0], grid.batches[-1])
    )
    rows = served("vllm_cpu_steady")
    low = {load: speedup(rows, f"k4_low__p64_o64_{load}", f"k0__p64_o64_{load}") for load in ("c1", "r3", "c8")}
    tokens = float(rows["k4_low__p64_o64_c1"]["tokens_per_step"])
    rate = float(acceptance_from_tokens_per_step(tokens, 4).acceptance_rate)
    return told(
        "acceptance above 70 % gains, below 40 % loses",
        "in part",
        f"at 0.7 with the best draft length {gaining:.0%} of {len(measured)} cells gain",
        f"at 0.4 only {losing:.0%} of the cells lose. Break-even lies at {min(edges):.2f} to {max(edges):.2f} (median "
        f"{np.median(edges):.2f}): {by_batch[1]} for one request, {by_batch[256]} at batch 256; before any trace "
        f"{alone} alone and {many} with {grid.batches[-1]:g} in flight. Draft length counts too: at 0.7, k = 7 gains "
        f"in "
        f"{fixed[7]:.0%} of the cells. At a measured {rate:.2f}, k = 4, vLLM on a CPU is {low['c1']:.2f} times as fast "
        f"alone and {low['c8']:.2f} times with 8 in flight",
        "cells, served, first principles",
        break_even={"median": float(np.median(edges)), "lowest": min(edges), "highest": max(edges)},
        break_even_by_batch=by_batch,
        share_gaining_at_07=gaining,
        share_losing_at_04=losing,
        share_gaining_at_07_by_draft_length=fixed,
        first_principles_break_even_by_concurrency=before,
        served={"acceptance_rate": rate, "speedup": low},
    )


def context(grid: Grid = FULL) -> dict[str, Any]:
    """1-4k contexts good, above 8k bad."""
    measured = cells()

    def at(length, batches):
        gains = [cell_gain(c, 0.8)[0] for c in measured if c["context"] == length and c["batch"] in batches]
        return span(gains)

    named = pairs("h200")
    kinds = {"8B + 1B": named["8B + 1B"], "8B + EAGLE head": named["8B + EAGLE head"]}
    kinds["8B + 1B, window of 512"] = dataclasses.replace(named["8B + 1B"], drafter_window=512.0)
    decoding: dict[str, dict[str, float]] = {}
    for name, pair in kinds.items():
        for length in (1024.0, 8192.0, 65536.0):
            there = dataclasses.replace(pair, prompt_length=length)
            for batch in (1.0, 64.0):
                decoding.setdefault(f"{name}, batch {batch:g}", {})[f"{length:g}"] = best_step_gain(there, batch, 0.8)[
                    0
                ]
    whole: dict[str, dict[str, list[float | None]]] = {}
    edges: dict[str, dict[str, float]] = {}
    prompts = np.geomspace(512, 65536, grid.points).tolist()
    for name in ("8B + 1B", "8B + EAGLE head"):
        axes = {"prompt_length": prompts, "concurrency": grid.batches}
        found = map_of(kinds[name], axes, acceptance=ConstantAcceptance(0.8))
        rows = zip(grid.batches, found["gain"], strict=True)
        whole[name] = {f"{load:g}": [row[0], row[-1]] for load, row in rows}
        edges[name] = {f"{e['at']:g}": e["value"] for e in found["crossings"] if e["along"] == "prompt_length"}
    small, large = whole["8B + 1B"][f"{grid.batches[0]:g}"], whole["8B + 1B"][f"{grid.batches[-1]:g}"]
    loses = edges["8B + 1B"].get(f"{grid.batches[-1]:g}")
    with_cache, windowed = (decoding[f"{name}, batch 64"] for name in ("8B + 1B", "8B + 1B, window of 512"))
    ones = {
        cell["batch"]: cell_gain(cell, 0.8)[0]
        for cell in measured
        if (cell["drafter"], cell["context"]) == ("draft-1b", 8192)
    }
    return told(
        "contexts of 1k to 4k are good, above 8k speculation degrades",
        "fails as a rule of length alone",
        f"end to end, prompts dilute it: 256 tokens out, 8B + 1B on an H200, acceptance 0.8, {grid.batches[-1]:g} in "
        f"flight: "
        f"{large[0]:.2f} times at 512 tokens, {large[1]:.2f} at 64k (alone {small[0]:.2f} and {small[1]:.2f})"
        + (f", break-even at {loses:.0f} tokens" if loses else "")
        + f". A drafter that reads a whole cache of its own loses in a batch: 1.2B at 8k {ones[4]:.2f} times at batch "
        f"4, "
        f"{ones[64]:.2f} at 64 (cells)",
        f"decoding itself: at 8k the cells gain {at(8192, (1, 4))} times at batch 1 to 4 (at 1k {at(1024, (1, 4))}) "
        f"and "
        f"{at(8192, (16, 32, 64))} at 16 to 64 (at 1k {at(1024, (16, 32, 64))}). Before any trace at batch 64, from "
        f"1k to 64k: "
        f"{with_cache['1024']:.2f} to {with_cache['65536']:.2f} times with a 1B drafter, {windowed['1024']:.2f} to "
        f"{windowed['65536']:.2f} when it attends to 512 tokens only. MagicDec measured 1.2 to 2.0 times at 8k to 32k "
        "(experiments/04, all within 14 % of the model)",
        "cells, first principles, published",
        decoding_before_any_trace=decoding,
        end_to_end_before_any_trace_at_512_and_64k=whole,
        break_even_prompt_length=edges,
        cells_1b_at_8k_by_batch=ones,
    )


def drafter_size(grid: Grid = FULL) -> dict[str, Any]:
    """Drafters of a tenth to a twentieth of the target."""
    rows = served("vllm_cpu_steady")
    natural = {}
    for verifier, size in (("small", 29.37e6), ("large", 82e6)):
        plain = "k0__p64_o64_c1" if verifier == "small" else "large_k0__p64_o64_c1"
        for layers in (1, 2, 4):
            run = f"{verifier}_first_{layers}__p64_o64_c1"
            params = float(rows[run]["drafter_params"])
            natural[f"{verifier}, {layers} layers"] = {
                "ratio": params / float(rows[run]["verifier_params"] or size),
                "speedup": speedup(rows, run, plain),
                "tokens_per_step": float(rows[run]["tokens_per_step"]),
            }
    best = {
        v: max((n for n in natural if n.startswith(v)), key=lambda n: natural[n]["speedup"]) for v in ("small", "large")
    }
    imposed = {size: speedup(rows, f"large_{size}__p64_o64_c1", "large_k0__p64_o64_c1") for size in ("1m", "4m", "17m")}
    pool = family()
    reached = best_step_gain(pool[1 / 20], 1.0, 0.7)[0]
    needed = {}
    for ratio, pair in pool.items():
        step = pair.step_time()
        top = best_step_gain(pair, 1.0, 0.999, step)[0]
        gap = lambda alpha, pair=pair, step=step: best_step_gain(pair, 1.0, alpha, step)[0] - reached  # noqa: E731
        needed[f"1/{round(1 / ratio)}"] = float(brentq(gap, 0.05, 0.999, xtol=1e-4)) if top > reached else 1.0
    equal = {f"1/{round(1 / ratio)}": best_step_gain(pair, 1.0, 0.7)[0] for ratio, pair in pool.items()}
    heads = {name: np.median([cell["draft"] for cell in cells() if cell["drafter"] == name]) for name in DRAFTERS}
    return told(
        "the drafter should have 1/10 to 1/20 of the target's parameters",
        "not a law: acceptance a parameter decides",
        f"as a middle that cost alone cannot refute: to equal 1/20 of a 70B target at an acceptance of 0.70, 1/10 "
        f"needs {needed['1/10']:.2f}, "
        f"1/4 needs {needed['1/4']:.2f} and 1/80 only {needed['1/80']:.2f}",
        f"at equal acceptance smaller is always better (70B: {equal['1/4']:.2f} times at 1/4, {equal['1/20']:.2f} at "
        f"1/20, "
        f"{equal['1/80']:.2f} at 1/80; vLLM on a CPU: {imposed['17m']:.2f}, {imposed['4m']:.2f}, {imposed['1m']:.2f} "
        f"from 1/5 to 1/63). "
        f"Drafters made of a verifier's first layers were best at 1/{1 / natural[best['small']]['ratio']:.1f} and "
        f"1/{1 / natural[best['large']]['ratio']:.1f} of it. Depth counts more than size: a 0.5B drafter of 24 layers "
        f"takes "
        f"{heads['draft-0.5b'] / heads['draft-1b']:.0%} of the time of a 1.2B one of 16 layers on an H200, the "
        f"one-layer head "
        f"{heads['eagle-8b'] / heads['draft-1b']:.0%}",
        "served, cells, first principles",
        natural=natural,
        imposed_acceptance_09=imposed,
        gain_at_equal_acceptance=equal,
        acceptance_needed_to_equal_a_twentieth_at_07=needed,
        draft_pass_over_verification={name: float(value) for name, value in heads.items()},
    )


WINDOWS = {256: (4, 8), 1024: (4, 8), 4096: (3, 5), 8192: (3, 5), 16384: (2, 3)}
"""Draft lengths that the claim recommends, by context [tok]; above 8k also none."""


def draft_length(grid: Grid = FULL) -> dict[str, Any]:
    """Draft length 4-8, 3-5, 2-3 by context."""
    best: dict[str, dict[str, int]] = {}
    inside = []
    for name in ("8B + 1B", "8B + EAGLE head"):
        for length, (low, high) in WINDOWS.items():
            pair = dataclasses.replace(pairs("h200")[name], prompt_length=float(length), output_length=256.0)
            step = pair.step_time()
            for batch in (1.0, 16.0, 64.0):
                for alpha in (0.6, 0.8, 0.9):
                    gain, k = best_step_gain(pair, batch, alpha, step)
                    k = k if gain > 1 else 0
                    best.setdefault(f"{name}, {length} tok", {})[f"batch {batch:g}, acceptance {alpha}"] = k
                    inside.append(low <= k <= high or (length > 8192 and k == 0))
    measured = cells()
    chosen = {
        f"{cell['drafter']}, {cell['context']} tok, batch {cell['batch']}": {
            f"{alpha}": cell_gain(cell, alpha, (*CELL_LENGTHS,))[1] if cell_gain(cell, alpha)[0] > 1 else 0
            for alpha in (0.6, 0.8, 0.9)
        }
        for cell in measured
    }
    lengths = {
        (drafter, length, batch, alpha): chosen[f"{drafter}, {length} tok, batch {batch}"][alpha]
        for drafter in DRAFTERS
        for length in (256, 1024, 8192)
        for batch in (1, 16, 64)
        for alpha in ("0.6", "0.8", "0.9")
    }
    moved = {
        "context, 256 to 8192 tok": np.mean(
            [
                abs(lengths[d, 8192, b, a] - lengths[d, 256, b, a])
                for d in DRAFTERS
                for b in (1, 16, 64)
                for a in ("0.6", "0.8", "0.9")
            ]
        ),
        "batch, 1 to 64": np.mean(
            [
                abs(lengths[d, c, 64, a] - lengths[d, c, 1, a])
                for d in DRAFTERS
                for c in (256, 1024, 8192)
                for a in ("0.6", "0.8", "0.9")
            ]
        ),
        "acceptance, 0.6 to 0.9": np.mean(
            [
                abs(lengths[d, c, b, "0.9"] - lengths[d, c, b, "0.6"])
                for d in DRAFTERS
                for c in (256, 1024, 8192)
                for b in (1, 16, 64)
            ]
        ),
    }
    alone = [lengths["draft-1b", c, 1, "0.8"] for c in (256, 1024, 8192)]
    return told(
        "draft 4 to 8 tokens below 2k of context, 3 to 5 up to 8k, 2 to 3 or none above",
        "fails: context is the wrong dial",
        f"before any trace the best length is inside the recommended window in {np.mean(inside):.0%} of {len(inside)} "
        f"cases; a 1.2B "
        f"drafter alone at acceptance 0.8 (cells): {', '.join(map(str, alone))} at 256, 1k and 8k",
        "the best length moves with acceptance and load: over the cells by "
        + ", ".join(f"{value:.1f} tokens with {name}" for name, value in moved.items()),
        "cells (k of 1, 3, 5, 7), first principles (k of 1 to 10)",
        share_inside_the_windows=float(np.mean(inside)),
        mean_move_of_the_best_length={name: float(value) for name, value in moved.items()},
        best_of_cells=chosen,
        best_before_any_trace=best,
    )


def size_by_load(grid: Grid = FULL) -> dict[str, Any]:
    """Small drafters under light load, a conservative ratio under heavy load."""
    pool = family()
    steps = {ratio: pair.step_time() for ratio, pair in pool.items()}
    best: dict[str, dict[str, str]] = {}
    for slope in (0.0, 0.02, 0.05, 0.1):
        for batch in (1.0, 16.0, 64.0, 256.0):
            gains = {}
            for ratio, pair in pool.items():
                alpha = float(np.clip(0.75 + slope * math.log2(20 * ratio), 0.0, 0.98))
                gains[ratio] = best_step_gain(pair, batch, alpha, steps[ratio])[0]
            ratio = max(gains, key=lambda r: gains[r])
            shown = f"1/{round(1 / ratio)} ({gains[ratio]:.2f})" if gains[ratio] > 1 else "none"
            best.setdefault(f"{slope:g} a doubling", {})[f"batch {batch:g}"] = shown
    rows = served("vllm_cpu_steady")
    loads = {
        name: {load: speedup(rows, f"small_{name}__p64_o64_{load}", f"k0__p64_o64_{load}") for load in ("c1", "c4")}
        for name in ("first_1", "first_2", "first_4")
    }
    five = best["0.05 a doubling"]
    ten = best["0.1 a doubling"]
    return told(
        "small drafters under light load, a conservative ratio under heavy load",
        "in part",
        f"if acceptance rises by 0.05 with each doubling of the drafter (assumed; 0.75 at 1/20), the best drafter of "
        f"a 70B target "
        f"is {five['batch 1']} alone, {five['batch 64']} at batch 64 and {five['batch 256']} at 256 (gain in "
        f"brackets); with 0.1 "
        f"{ten['batch 1']}, {ten['batch 64']}, {ten['batch 256']}",
        "at equal acceptance the smallest is the best at every load, and in vLLM on a CPU load turns all drafters off "
        "before "
        f"it changes their order: first layer {loads['first_1']['c1']:.2f} and {loads['first_1']['c4']:.2f} times "
        f"alone and with 4 "
        f"in flight, two {loads['first_2']['c1']:.2f} and {loads['first_2']['c4']:.2f}, four "
        f"{loads['first_4']['c1']:.2f} and "
        f"{loads['first_4']['c4']:.2f}",
        "served, first principles",
        best_ratio_by_assumed_acceptance=best,
        served=loads,
    )


def load(grid: Grid = FULL) -> dict[str, Any]:
    """Speedup fades with load."""
    gpu, cpu = served("vllm_h200"), served("vllm_cpu_steady")
    rates = (6, 14, 22, 27)
    on_gpu = {
        k: {f"{r}": speedup(gpu, f"eagle_k{k}_a80__p512_o128_r{r}", f"k0__p512_o128_r{r}") for r in rates}
        for k in (1, 3)
    }
    on_cpu = {r: speedup(cpu, f"k4__p64_o64_r{r}", f"k0__p64_o64_r{r}") for r in (1, 3, 6, 8)}
    measured = cells()

    def path(drafter, length, alpha):
        return {
            c["batch"]: cell_gain(c, alpha)[0] for c in measured if (c["drafter"], c["context"]) == (drafter, length)
        }

    ways = {f"{d}, {c} tok, {a}": path(d, c, a) for d in DRAFTERS for c in (256, 1024, 8192) for a in (0.6, 0.8, 0.95)}
    falls = float(np.mean([list(way.values())[-1] < next(iter(way.values())) for way in ways.values()]))
    rises = {name: f"{way[1]:.2f} to {way[64]:.2f}" for name, way in ways.items() if way[64] > 1.02 * way[1]}
    before = {}
    for name, pair in pairs().items():
        axes = {"arrival_rate": None, "acceptance_rate": [0.6, 0.8, 0.95]}
        found = map_of(pair, axes, max_batch_size=128.0, points=grid.points)
        for alpha, row in zip((0.6, 0.8, 0.95), found["gain"], strict=True):
            shown = [gain for gain in row if gain is not None]
            before[f"{name}, {alpha}"] = [shown[0], shown[-1]]
    fades = float(np.mean([last < first for first, last in before.values()]))
    return told(
        "the speedup fades as load grows",
        "holds, with exceptions",
        f"vLLM on an H200, EAGLE head, k = 3: {on_gpu[3]['6']:.2f} times at 6 req/s, {on_gpu[3]['27']:.2f} at 27; "
        f"vLLM on a CPU, "
        f"k = 4: {', '.join(f'{v:.2f} at {r}' for r, v in on_cpu.items())} req/s. Over the cells the gain at the "
        f"largest batch is "
        f"below that of one request in {falls:.0%} of {len(ways)} cases (drafter, context, acceptance)",
        f"long contexts with a drafter whose cache is small: {len(rises)} of {len(ways)} rise from batch 1 to 64, "
        f"such as "
        + "; ".join(f"{name}: {shown}" for name, shown in list(rises.items())[:2])
        + f". Near capacity the sign of the capacity gain decides: before any trace, the best k at acceptance 0.6 to "
        f"0.95, e2e "
        f"gains more near the capacity of the server without speculation than alone in {1 - fades:.0%} of "
        f"{len(before)} cases" + f". k = 1 on the H200 does not fade ({on_gpu[1]['6']:.2f} to {on_gpu[1]['27']:.2f})",
        "served, cells, first principles",
        vllm_h200=on_gpu,
        vllm_cpu=on_cpu,
        cells_that_rise=rises,
        cells={name: way for name, way in ways.items() if "0.8" in name},
        first_principles_light_and_near_capacity=before,
    )


def longer_drafts(grid: Grid = FULL) -> dict[str, Any]:
    """Diminishing returns of draft length under load."""
    rows = served("vllm_cpu_steady")
    by_load = {
        name: {k: speedup(rows, f"k{k}__p64_o64_{name}", f"k0__p64_o64_{name}") for k in (2, 4, 6)}
        for name in ("c1", "r3", "r6", "c8")
    }
    measured = cells()
    batches = (1, 16, 64, 256)
    longer = {
        batch: float(
            np.mean(
                [cell_gain(c, 0.8, (7,))[0] / cell_gain(c, 0.8, (3,))[0] - 1 for c in measured if c["batch"] == batch]
            )
        )
        for batch in batches
    }
    best = {
        batch: float(
            np.mean([cell_gain(c, 0.8)[1] if cell_gain(c, 0.8)[0] > 1 else 0 for c in measured if c["batch"] == batch])
        )
        for batch in batches
    }
    kept = {name: max(gains, key=lambda k, gains=gains: gains[k]) for name, gains in by_load.items()}
    head = {c["batch"]: cell_gain(c, 0.95)[1] for c in measured if (c["drafter"], c["context"]) == ("eagle-8b", 1024)}
    return told(
        "a longer draft gains less and less under load",
        "holds",
        f"from k = 3 to 7 at acceptance 0.8 the gain changes by {longer[1]:+.0%} alone, {longer[16]:+.0%} at batch 16, "
        f"{longer[64]:+.0%} at 64 and {longer[256]:+.0%} at 256 (mean of the cells); the best length falls from "
        f"{best[1]:.1f} to "
        f"{best[256]:.1f}. vLLM on a CPU (k of 2, 4, 6): best {kept['c1']} alone, {kept['r3']} at 3, {kept['r6']} at "
        f"6 req/s",
        "nowhere in what was measured, but it comes late where acceptance is high and drafting cheap: EAGLE head at "
        "0.95 and 1k, "
        "best k " + ", ".join(f"{k} at batch {batch}" for batch, k in head.items()),
        "served, cells",
        change_from_3_to_7_by_batch=longer,
        mean_best_length_by_batch=best,
        vllm_cpu_speedup_by_draft_length=by_load,
    )


def experts(grid: Grid = FULL) -> dict[str, Any]:
    """Uneven experts reduce the gain."""
    pair = FirstPrinciples(MOE, accelerator("h100"), LLAMA_1B, **LENGTHS)
    base = pair.step_time()
    share = 1.0 / np.arange(1, 129)
    for _ in range(50):  # 8 of 128 a token, none above 1
        share = np.minimum(share * 8.0 / share.sum(), 1.0)
    order = np.random.default_rng(0).permutation(128)
    ranks = {1: np.zeros(128, int), 8: np.arange(128) // 16}
    gains: dict[str, dict[str, float]] = {}
    for count, place in ranks.items():
        for kind, popularity in (("even", np.full(128, 8 / 128)), ("uneven", share[order])):
            routing = ExpertRouting.from_popularity(popularity, place)
            assert base.experts is not None
            read = base.experts.weight_read / count
            cost = dataclasses.replace(base.experts, routing=routing, weight_read=read)
            step = dataclasses.replace(base, experts=cost)
            for batch in (1.0, 4.0, 16.0, 64.0, 256.0):
                gain, _ = best_step_gain(pair, batch, 0.8, step)
                gains.setdefault(f"{kind}, {count} ranks", {})[f"{batch:g}"] = gain
    change = {
        f"{count} ranks".replace("1 ranks", "one rank"): {
            b: gains[f"uneven, {count} ranks"][b] / gains[f"even, {count} ranks"][b] - 1 for b in gains["even, 1 ranks"]
        }
        for count in ranks
    }
    every = {f"{ranks}, batch {b}": value for ranks, entry in change.items() for b, value in entry.items()}
    less, more = ({name: v for name, v in every.items() if sign * v > 0.005} for sign in (-1, 1))
    words = [", ".join(f"{v:+.0%} ({name})" for name, v in part.items()) for part in (less, more)]
    rows = served("vllm_cpu_steady")
    cpu = {
        load_: speedup(rows, f"moe_k4__p64_o64_{load_}", f"moe_k0__p64_o64_{load_}") for load_ in ("c1", "c4", "c16")
    }
    return told(
        "uneven experts reduce the gain",
        "in part",
        f"in {len(less)} of {len(every)} cases (a 30B mixture, 8 of 128 experts a token, popularity falling as "
        f"1/rank, best k at "
        f"acceptance 0.8; synthetic routing): {words[0]}. Measured expert kernels: skew over eight ranks makes a "
        f"layer of 8,192 "
        "to 16,384 tokens take 1.25 to 1.77 times as long (experiments/07)",
        f"{words[1] or 'nowhere'}: popular experts are shared by the tokens of a draft, so that verification reads "
        f"fewer; from batch 16 on nearly all are read in verifying anyway, and plain decoding is what reads fewer. "
        "Measured kernels on one rank, 8 to 64 tokens, take 0.45 to 0.93 of the time of even routing "
        "(experiments/07). vLLM on "
        "a CPU (2 of 16 experts) gains "
        + ", ".join(f"{value:.2f} ({name})" for name, value in cpu.items())
        + " times; its routing was not varied",
        "first principles with synthetic routing, published kernels, served",
        gains=gains,
        change=change,
        served=cpu,
    )


def bandwidth(grid: Grid = FULL) -> dict[str, Any]:
    """High bandwidth helps long contexts."""
    gains: dict[str, dict[str, float]] = {}
    faster: dict[str, float] = {}
    for name in ("8B + 1B", "8B + EAGLE head"):
        pair = pairs("h100")[name]
        for length in (1024.0, 8192.0, 32768.0):
            for batch in (1.0, 16.0):
                times = {}
                for factor in (1.0, 2.0):
                    there = dataclasses.replace(
                        pair, hardware=scaled_bandwidth(pair.hardware, factor), prompt_length=length
                    )
                    step = there.step_time()
                    gains.setdefault(f"{name}, {length:g} tok, batch {batch:g}", {})[f"{factor:g}"] = best_step_gain(
                        there, batch, 0.8, step
                    )[0]
                    state = BatchState(sequences=batch, query_tokens=batch, kv_tokens=batch * there.context)
                    times[factor] = float(step(state).total)
                faster[f"{name}, {length:g} tok, batch {batch:g}"] = times[1.0] / times[2.0]
    change = {name: entry["2"] / entry["1"] - 1 for name, entry in gains.items()}
    head = [faster[f"8B + EAGLE head, {length} tok, batch 16"] for length in (1024, 8192, 32768)]
    return told(
        "high memory bandwidth matters for long contexts",
        "holds for latency, not for the gain",
        f"twice an H100's bandwidth makes a step without speculation {head[0]:.2f}, {head[1]:.2f} and {head[2]:.2f} "
        f"times as fast at 1k, 8k and "
        "32k of context (batch 16)",
        f"the gain of speculation falls when bandwidth grows in "
        f"{np.mean([value < 0 for value in change.values()]):.0%} of {len(change)} "
        f"cases, by up to {-min(change.values()):.0%}: it lives on reading weights and cache once for several tokens, "
        f"which matters "
        f"less where reading is cheap. At 32k, batch 16: {change['8B + 1B, 32768 tok, batch 16']:+.1%} (1B), "
        f"{change['8B + EAGLE head, 32768 tok, batch 16']:+.1%} (head)",
        "first principles",
        gains_by_bandwidth=gains,
        change=change,
        step_without_speculation_faster=faster,
    )


def hardware(grid: Grid = FULL) -> dict[str, Any]:
    """Consumer against data-centre GPUs."""
    names = (*DATA_CENTRE, *OTHERS)
    asked = {"axes": {"hardware": names, "acceptance_rate": np.linspace(0.1, 0.98, grid.points).tolist()}}
    kinds = {
        "3B + EAGLE head": FirstPrinciples(LLAMA_3B, accelerator("h100"), drafter_kind="head", **LENGTHS),
        "3B + 1B": FirstPrinciples(LLAMA_3B, accelerator("h100"), LLAMA_1B, **LENGTHS),
        "8B + 1B": pairs()["8B + 1B"],
    }
    edges: dict[str, dict[str, dict[str, float]]] = {}
    fits: dict[str, list[str]] = {}
    for name, pair in kinds.items():
        for concurrency in (1.0, 16.0):
            found = map_of(pair, asked["axes"], concurrency=concurrency)
            edges.setdefault(name, {})[f"{concurrency:g}"] = {
                e["at"]: e["value"] for e in found["crossings"] if e["along"] == "acceptance_rate"
            }
            out = found["zones"].get("does_not_fit", {}).get("hardware", [])
            fits[name] = [device for device in names if device not in out]
    gains: dict[str, dict[str, float]] = {}
    for device in names:
        for concurrency in (1.0, 16.0):
            there = dataclasses.replace(kinds["3B + EAGLE head"], hardware=accelerator(device))
            gains.setdefault(device, {})[f"{concurrency:g}"] = best_step_gain(there, concurrency, 0.7)[0]
    of = lambda group, load_: [gains[device][load_] for device in group]  # noqa: E731
    lacking = [device for device in OTHERS if device not in fits["8B + 1B"]]
    density = {name: accelerator(name).flops("bf16") / accelerator(name).memory_bandwidth for name in names}
    ranks = float(spearmanr([density[name] for name in names], of(names, "16")).statistic)
    each = ", ".join(f"{name} {gain:.2f}" for name, gain in zip(OTHERS, of(OTHERS, "16"), strict=True))
    return told(
        "speculation does differently on consumer and on data-centre GPUs",
        "in part: memory and compute per byte, not the class",
        f"memory: 8B + 1B in bf16 does not fit on {', '.join(lacking) or 'none of them'}. At batch 16 some gain less: "
        f"3B + "
        f"EAGLE head at acceptance 0.7: {each}, against {span(of(DATA_CENTRE, '16'))} on {', '.join(DATA_CENTRE)}",
        f"alone there is no difference ({span(of(OTHERS, '1'))} against {span(of(DATA_CENTRE, '1'))} times). What "
        f"orders the "
        f"cards at batch 16 is peak FLOP per byte of bandwidth (rank correlation {ranks:.2f}), not their class: the "
        f"L4 has more "
        "than an H100. Break-even acceptance, 16 in flight: "
        + ", ".join(f"{name} {value:.2f}" for name, value in edges["3B + EAGLE head"]["16"].items()),
        "first principles",
        flop_per_byte=density,
        rank_correlation_at_16=ranks,
        break_even_acceptance_by_concurrency=edges,
        fits=fits,
        gain_at_07=gains,
    )


CLAIMS = {
    "acceptance": acceptance,
    "context": context,
    "drafter_size": drafter_size,
    "draft_length": draft_length,
    "size_by_load": size_by_load,
    "load": load,
    "longer_drafts": longer_drafts,
    "experts": experts,
    "bandwidth": bandwidth,
    "hardware": hardware,
}

# --- what is written ------------------------------------------------------------------------------------------------

HEAD = """# Claims about where speculation pays

Made by `python experiments/08_boundaries/claims.py`, which says what each source is; every number is in claims.json.

| claim | verdict | holds | fails | source |
|---|---|---|---|---|
"""
TAIL = """
*Cells* are step times of an 8B verifier with random weights on one H200, without an engine around them; acceptance is
stated, not measured. *Served* rows are a real vLLM, on a CPU with small models, on the H200 with dummy weights and
imposed acceptance. *First principles* are predictions that no measurement here stands behind (verification steps: 4.6 %
off on the H200, end-to-end latencies 14 to 51 %, experiments/03). What a domain, a temperature or an alignment does to
acceptance is not examined: no trained model was measured.
"""


def report(results: dict[str, dict[str, Any]]) -> str:
    """The table of claims."""
    rows = [
        "| " + " | ".join(entry[name] for name in ("claim", "verdict", "holds", "fails", "source")) + " |"
        for entry in results.values()
    ]
    return HEAD + "\n".join(rows) + "\n" + TAIL


def figure(results: dict[str, dict[str, Any]]) -> bytes:
    """Break-even acceptance by batch and context over the measured cells, and the gain by batch at acceptance 0.8."""
    from diffspec.report.figures import COLORS, MARKERS, new_figure, png

    drawn, axes = new_figure(1, 2, "measured step times, H200, 8B verifier", width=5.5)
    left, right = axes[0]
    styles = {256: ":", 1024: "--", 8192: "-"}
    for number, (drafter, name) in enumerate(DRAFTERS.items()):
        for length, style in styles.items():
            mine = [cell for cell in cells() if (cell["drafter"], cell["context"]) == (drafter, length)]
            batches = [cell["batch"] for cell in mine]
            look = {"color": COLORS[number], "marker": MARKERS[number], "linestyle": style, "markersize": 4}
            left.plot(batches, [cell_break_even(cell) for cell in mine], **look, label=f"{name}, {length} tok")
            right.plot(batches, [cell_gain(cell, 0.8)[0] for cell in mine], **look)
    left.axhspan(0.4, 0.7, color="#BBBBBB", alpha=0.3, linewidth=0)
    left.set(xscale="log", xlabel="batch [req]", ylabel="break-even acceptance (grey: claimed)")
    right.axhline(1.0, color="#555555", linewidth=1)
    right.set(xscale="log", xlabel="batch [req]", ylabel="gain of the best k, acceptance 0.8")
    left.legend(frameon=False, fontsize=7)
    return png(drawn)


def main() -> None:
    """Examine every claim and write what was found."""
    results = {}
    for name, claim in CLAIMS.items():
        results[name] = claim()
        print(
            f"{name}: {results[name]['verdict']}\n  holds: {results[name]['holds']}\n  fails: {results[name]['fails']}",
            flush=True,
        )
    results = json.loads(json.dumps(results))
    (HERE / "claims.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (HERE / "claims.md").write_text(report(results), encoding="utf-8")
    (HERE / "claims.png").write_bytes(figure(results))


if __name__ == "__main__":
    main()
