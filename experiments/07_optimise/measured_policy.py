"""What diffspec recommends at a measured load, held against what was measured there at every draft length.

    python experiments/07_optimise/measured_policy.py [--shared FOLDER] [--models FOLDER]

An arm is a deployment with one drafter and acceptance, measured at two or more draft lengths (0 among them) at several
loads: a cell is one load (rate or requests in flight, lengths, arrival process, batch cap). For every cell the model is
fitted twice, to all rows of the deployment and without the rows of that cell, all arms' (leave one load out), and asked
for the mean e2e latency at the cell's draft lengths. The form of the step time is the one that the fit to all rows
chose. Acceptance by position is that of the arm's fitted rows with the longest drafts, as `diffspec acceptance` tells
it. Rules, each a draft length for a cell:

* diffspec: the least predicted e2e among the draft lengths that were measured in the cell; "optimize", "policy": what
  the verbs answer when all draft lengths up to the arm's longest are allowed (policy: risk mean, the draft length that
  it spends most of the time at)
* nearest load: the measured best of the nearest other cell of the arm of the same kind (lengths, loop), in logarithms
* best static: the one draft length with the least mean log e2e over the arm, in hindsight; always 0, always 3
* a draft length that was not measured in a cell counts as the nearest that was, of two as near ones the longer

Regret: measured e2e at the rule's draft length over the least measured one, - 1. The least of several noisy numbers is
low by chance, so no rule would be at 0: "beyond noise" tells in how many cells the best differs from the second by more
than repeats do (1.645 sqrt(2) standard deviations of log e2e; from repeated cells of the deployment, for vllm_h200 from
batch means of the requests; not known where a deployment repeats none). Intervals: 90 %, bootstrap of cells within
arms; arms of one deployment share their rows without speculation, which it does not see. Most cells have two or three
draft lengths, so the question is often whether to speculate at all. Draws are those of `fit --uncertainty laplace`.

instrument_h200 is not here: its loads are shares of each draft length's own capacity, so no load has two of them.
"""

import argparse
import json
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

import diffspec  # noqa: E402
from diffspec.acceptance import PositionAcceptance  # noqa: E402
from diffspec.cli.prepare import prepare_jax  # noqa: E402
from diffspec.fitting.deployment import FittedModel  # noqa: E402
from diffspec.optimizing.load_policy import policy  # noqa: E402
from diffspec.optimizing.optimize import optimize  # noqa: E402
from diffspec.traces import Trace, set_aside_reasons  # noqa: E402
from diffspec.workload import Workload  # noqa: E402

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "data"
SMALL = r"k0__|k0_rep__"
ARMS = [
    ("vllm_h200", "vllm-dummy/llama-8b", "EAGLE, 0.8", r"k0__|eagle"),
    ("vllm_cpu_quiet", "vllm-cpu/llama-29m", "k = 2 at 0.6", r"k0__|a60"),
    ("vllm_cpu_quiet", "vllm-cpu/llama-29m", "k = 4 at 0.9", r"k0__|a90"),
    ("vllm_cpu_noisy", "vllm-cpu/llama-29m", "0.6", SMALL + r"|a60"),
    ("vllm_cpu_noisy", "vllm-cpu/llama-29m", "0.9", SMALL + r"|a90"),
    ("vllm_cpu_noisy", "vllm-cpu/llama-29m", "natural", SMALL + r"|nat80"),
    ("vllm_cpu_noisy", "vllm-cpu/qwen3-moe-66m", "MoE, 0.9", r"moe"),
    ("vllm_cpu_steady", "vllm-cpu-small", "0.95 falling", r"^k\d(?:_cap\d+)?__"),
    ("vllm_cpu_steady", "vllm-cpu-small", "0.6", r"^k0__|low"),
    ("vllm_cpu_steady", "vllm-cpu-moe", "MoE, 0.95 falling", r"moe"),
    ("vllm_cpu_steady", "vllm-cpu-large", "large, 0.95 falling", r"large_k0|large_4m"),
]
CELL = ["arrival_rate", "concurrency", "prompt_length", "output_length", "arrival_process", "max_batch_size"]
RULES = ("diffspec, load held out", "diffspec, all rows", "optimize, load held out", "policy, load held out")
RULES += ("nearest load", "best static (hindsight)", "always 0", "always 3")
DRAWS, LEVEL = 4000, 0.9


def cell_of(row) -> tuple:
    """What makes a load of a row."""
    return tuple(None if row[name] is None or row[name] != row[name] else row[name] for name in CELL)


def named(cell: tuple) -> str:
    rate, flight, prompt, output, process, cap = cell
    load = f"{rate:g} req/s" if rate is not None else f"{flight:g} in flight"
    kind = "" if process in (None, "poisson") else f", {process}"
    return f"{load}, {prompt:g} + {output:g} tok{kind}, cap {cap:g}"


def cells_of(frame: pd.DataFrame) -> dict[tuple, dict[int, dict]]:
    """Cell -> draft length -> log e2e (mean over repeats), its number of runs; cells with two or more draft lengths."""
    found: dict[tuple, dict[int, dict]] = {}
    for row in frame.to_dict("records"):
        entry = found.setdefault(cell_of(row), {}).setdefault(int(row["draft_length"]), {"values": [], "runs": []})
        entry["values"].append(float(np.log(row["e2e_mean"])))
        entry["runs"].append(row["run"])
    return {cell: lengths for cell, lengths in found.items() if len(lengths) > 1}


def nearest(length: int, measured) -> int:
    """The measured draft length nearest to one; of two as near ones the longer."""
    return min(measured, key=lambda k: (abs(k - length), -k))


def log_measured(lengths: dict[int, dict]) -> dict[int, float]:
    return {k: float(np.mean(entry["values"])) for k, entry in sorted(lengths.items())}


def repeat_noise(frame: pd.DataFrame) -> dict[str, float]:
    """Standard deviation of log e2e of one run, by loop, pooled over cells that were run more than once."""
    spreads: dict[str, list[tuple[float, int]]] = {}
    for row in (pd.DataFrame(part) for _, part in frame.assign(cell=frame.apply(cell_of, axis=1)).groupby(
        ["cell", "draft_length", frame["run"].str.replace(r"_rep\d*|k\d_cap\d+", "", regex=True)]
    )):  # fmt: skip
        if len(row) > 1:
            loop = "open" if row["arrival_rate"].notna().iloc[0] else "closed"
            spreads.setdefault(loop, []).append((float(np.log(row["e2e_mean"]).var(ddof=1)), len(row) - 1))
    return {
        loop: float(np.sqrt(sum(v * n for v, n in parts) / sum(n for _, n in parts))) for loop, parts in spreads.items()
    }


def request_noise(path: Path, runs, batches: int = 6) -> float:
    """Standard deviation of log mean e2e by batch means of the measured requests, pooled over runs."""
    table = pd.read_parquet(path)
    found = []
    for _, part in table[table["run"].isin(runs) & table["measured"]].groupby("run"):
        part = part.sort_values("arrival_time")
        e2e = (part["completion_time"] - part["arrival_time"]).to_numpy()
        means = np.asarray([batch.mean() for batch in np.array_split(e2e, batches)])
        found.append(means.var(ddof=1) / batches / means.mean() ** 2)
    return float(np.sqrt(np.mean(found)))


def noise_of(table: str, frame: pd.DataFrame) -> dict[str, float] | None:
    if table == "vllm_h200":
        noise = request_noise(DATA / "vllm_h200_requests.parquet", set(frame["run"]))
        return {"open": noise, "closed": noise}
    return repeat_noise(frame) or None


def fitted(trace: Trace, frame: pd.DataFrame, form: str, path: Path):
    """The deployment fitted to some rows, kept in a file."""
    if not path.exists():
        used = replace(trace, frame=frame.reset_index(drop=True))
        path.write_text(diffspec.fit(used, step_time=form, uncertainty="laplace").to_json(), encoding="utf-8")
    return FittedModel.from_json(path.read_text(encoding="utf-8")).deployment()


def arm_acceptance(rows: pd.DataFrame) -> PositionAcceptance:
    """Mean conditional acceptance by position of the rows with the longest drafts."""
    longest = rows[rows["draft_length"] == rows["draft_length"].max()]
    curves = [value for value in longest["position_acceptance"] if value is not None]
    return PositionAcceptance(jnp.asarray(np.mean([np.asarray(curve, dtype=float) for curve in curves], axis=0)))


def workload_of(cell: tuple) -> Workload:
    rate, flight, prompt, output, process, _ = cell
    scv = {"constant": 0.0, "gamma": 4.0}.get(process, 1.0)
    load = {"concurrency": float(flight)} if rate is None else {"arrival_rate": float(rate), "arrival_scv": scv}
    return Workload(float(prompt), float(output), **load)


@jax.jit
def _predict(serving, workload, config):
    found = serving.predict(workload, config)
    return found.e2e_latency, found.capacity, found.utilization


def predicted(deployment, cell: tuple, lengths, acceptance) -> dict[int, float]:
    """log e2e at each draft length; saturated ones above all others, in the order of their utilization."""
    told = {}
    for k in lengths:
        config = deployment.configuration(float(k), acceptance=acceptance, max_batch_size=cell[-1])
        load, config = (
            jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=float), part) for part in (workload_of(cell), config)
        )
        e2e, _, utilization = (float(value) for value in _predict(deployment.serving, load, config))
        told[k] = float(np.log(e2e)) if utilization < 1.0 and np.isfinite(e2e) else 50.0 + utilization
    return told


def asked_verbs(deployment, cell: tuple, longest: int, acceptance) -> tuple[int, int]:
    """(optimize, policy): the draft length that each verb recommends at the cell's load."""
    rate, flight, prompt, output, _, cap = cell
    loop, load = ("concurrency", flight) if rate is None else ("arrival_rate", rate)
    asked = {"prompt_length": float(prompt), "output_length": float(output), "max_draft_length": longest}
    asked |= {"loads": [float(load)], "loop": loop, "acceptance": acceptance, "max_batch_size": float(cap)}
    entry = optimize(deployment, **asked)["table"][0]
    one = entry["draft_length"]
    (context,) = policy(deployment, **asked)["contexts"]
    return longest if one is None else int(one), int(context["loads"][0]["draft_length"])


def nearest_load(cell: tuple, cells: dict[tuple, dict[int, dict]]) -> int | None:
    """The measured best of the nearest other cell of the same lengths, loop, process and cap; None without any."""
    kind = 0 if cell[0] is not None else 1
    alike = [other for other in cells if other != cell and other[2:] == cell[2:] and other[kind] is not None]
    if not alike:
        return None
    other = min(alike, key=lambda each: (abs(np.log(each[kind] / cell[kind])), each[kind]))
    measured = log_measured(cells[other])
    return min(measured, key=lambda k: measured[k])


def judge(arm: tuple[str, str, str, str], folder: Path) -> dict:
    """Every cell of one arm: what was measured, what each rule takes, its regret."""
    table, name, label, pattern = arm
    trace = diffspec.read_trace(DATA / f"{table}.csv")
    every = trace.frame[trace.frame["deployment"] == name].reset_index(drop=True)
    own = every[every["run"].str.contains(pattern, regex=True)]
    cells = cells_of(own)
    stem = re.sub(r"\W+", "_", f"{table}_{name}")
    whole = fitted(trace, every, "auto", folder / f"{stem}.json")
    form = "auto" if "moe" in whole.form or "experts" in whole.defaults else whole.form
    noise, longest = noise_of(table, every), int(own["draft_length"].max())
    reasons = dict(zip(every["run"], set_aside_reasons(every), strict=True))
    statics = {
        k: np.mean([log_measured(c)[nearest(k, c)] for c in cells.values()]) for k in sorted(set(own["draft_length"]))
    }
    static = int(min(statics, key=lambda k: statics[k]))
    entries = []
    for cell, lengths in cells.items():
        apart = every.apply(lambda row, cell=cell: cell_of(row) == cell, axis=1)
        held = fitted(trace, every[~apart], form, folder / f"{stem}_{re.sub(r'[^0-9a-z.]+', '_', named(cell))}.json")
        measured = log_measured(lengths)
        best = min(measured, key=lambda k: measured[k])
        choices = {}
        for rule, model, rows in (
            ("diffspec, load held out", held, own[~apart.loc[own.index]]),
            ("diffspec, all rows", whole, own),
        ):
            told = predicted(model, cell, sorted(lengths), arm_acceptance(rows))
            choices[rule] = min(told, key=lambda k: told[k])
        one, two = asked_verbs(held, cell, longest, arm_acceptance(own[~apart.loc[own.index]]))
        choices |= {"optimize, load held out": one, "policy, load held out": two}
        choices |= {"nearest load": nearest_load(cell, cells), "best static (hindsight)": static}
        choices |= {"always 0": 0, "always 3": 3}
        taken = {rule: None if k is None else nearest(k, measured) for rule, k in choices.items()}
        ordered = sorted(measured.values())
        loop = "open" if cell[0] is not None else "closed"
        spread = None if noise is None or loop not in noise else noise[loop]
        runs = [len(lengths[k]["values"]) for k in sorted(measured, key=lambda k: measured[k])[:2]]
        least = None if spread is None else 1.645 * spread * float(np.sqrt(sum(1 / n for n in runs)))
        entries.append(
            {
                "cell": named(cell),
                "measured": {str(k): float(np.exp(value)) for k, value in measured.items()},
                "not_stationary": [run for entry in lengths.values() for run in entry["runs"] if reasons[run]],
                "best": best,
                "second_over_best": float(np.exp(ordered[1] - ordered[0]) - 1.0),
                "beyond_noise": None if least is None else bool(ordered[1] - ordered[0] > least),
                "recommended": {rule: None if k is None else int(k) for rule, k in choices.items()},
                "taken": taken,
                "regret": {
                    rule: None if k is None else float(np.exp(measured[k] - measured[best]) - 1.0)
                    for rule, k in taken.items()
                },
            }
        )
        last = entries[-1]
        print(table, label, last["cell"], "best", best, {r: k for r, k in taken.items() if k != best}, flush=True)
    told = {"table": table, "deployment": name, "arm": label, "form": whole.form, "static": static}
    return told | {"noise": noise, "cells": entries}


def summary(arms: list[dict]) -> dict:
    """Mean regret and agreement of each rule over cells, with the interval of a bootstrap of cells within arms."""
    random = np.random.default_rng(0)
    told = {}
    for rule in RULES:
        parts, agree, clear = [], [], []
        for arm in arms:
            known = [entry for entry in arm["cells"] if entry["regret"][rule] is not None]
            parts.append(np.asarray([entry["regret"][rule] for entry in known]))
            agree += [entry["taken"][rule] == entry["best"] for entry in known]
            clear += [entry["taken"][rule] == entry["best"] for entry in known if entry["beyond_noise"]]
        parts = [part for part in parts if part.size]
        means = [
            np.concatenate([part[random.integers(part.size, size=part.size)] for part in parts]).mean()
            for _ in range(DRAWS)
        ]
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        every = np.concatenate(parts)
        told[rule] = {"mean": float(every.mean()), "low": float(low), "high": float(high), "cells": int(every.size)}
        told[rule] |= {"worst": float(every.max()), "agree": int(sum(agree))}
        told[rule] |= {"clear": len(clear), "agree_clear": int(sum(clear))}
    return told


def against(arms: list[dict], other: str, rule: str = RULES[0]) -> dict:
    """Mean of the other rule's regret minus the rule's over cells that have both, with its bootstrap interval."""
    random = np.random.default_rng(0)
    parts = []
    for arm in arms:
        both = [entry["regret"] for entry in arm["cells"] if entry["regret"][other] is not None]
        parts.append(np.asarray([regret[other] - regret[rule] for regret in both]))
    parts = [part for part in parts if part.size]
    means = [
        np.concatenate([part[random.integers(part.size, size=part.size)] for part in parts]).mean()
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    every = np.concatenate(parts)
    return {"mean": float(every.mean()), "low": float(low), "high": float(high), "cells": int(every.size)}


def report(results: dict) -> str:
    arms = results["arms"]
    lines = [
        "# The recommended draft length against the measured best, load by load",
        "",
        "Made by `measured_policy.py`, which says what the rules are. Regret: measured mean e2e at the rule's draft",
        "length over the least measured one, in %; intervals 90 %, bootstrap of loads within arms. The last column",
        "counts only loads where the best differs from the second by more than repeats do.",
        "",
        "| rule | mean regret | worst | the measured best | the best, where beyond noise |",
        "|---|---|---|---|---|",
    ]
    for rule, told in results["summary"].items():
        lines.append(
            f"| {rule} | {100 * told['mean']:.1f} ({100 * told['low']:.1f} to {100 * told['high']:.1f}) | "
            f"{100 * told['worst']:.0f} | {told['agree']} of {told['cells']} | "
            f"{told['agree_clear']} of {told['clear']} |"
        )
    lines += ["", "Cell by cell, the other's regret minus that of diffspec with the load held out, in points:", ""]
    for other in ("nearest load", "best static (hindsight)", "always 3"):
        told = against(arms, other)
        span = f"{100 * told['low']:.1f} to {100 * told['high']:.1f}"
        lines.append(f"* {other}: {100 * told['mean']:.1f} ({span}), {told['cells']} loads")
    lines += ["", "## By arm: mean regret in %", "", f"| table, arm (loads) | {' | '.join(RULES)} |"]
    lines.append("|---" * (len(RULES) + 1) + "|")
    for arm in arms:
        cells = []
        for rule in RULES:
            known = [entry["regret"][rule] for entry in arm["cells"] if entry["regret"][rule] is not None]
            cells.append("" if not known else f"{100 * np.mean(known):.1f}")
        lines.append(f"| {arm['table']}, {arm['arm']} ({len(arm['cells'])}) | {' | '.join(cells)} |")
    lines += ["", "## Every load: measured mean e2e in s by draft length, and what was recommended", ""]
    lines += ["| table, arm | load | measured | best | second | beyond noise | diffspec held out | all rows | policy |"]
    lines.append("|---" * 9 + "|")
    for arm in arms:
        for entry in arm["cells"]:
            measured = ", ".join(f"{k}: {value:.3g}" for k, value in entry["measured"].items())
            beyond = {None: "not known", True: "yes", False: "no"}[entry["beyond_noise"]]
            taken = [entry["taken"][rule] for rule in (*RULES[:2], RULES[3])]
            lines.append(
                f"| {arm['table']}, {arm['arm']} | {entry['cell']} | {measured} | {entry['best']} | "
                f"+{100 * entry['second_over_best']:.1f} % | {beyond} | {' | '.join(map(str, taken))} |"
            )
    return "\n".join(lines) + "\n"


def private(shared: Path, folder: Path) -> None:
    """Apertus-8B on a GH200 at 6 draft lengths: printed, for validation, and written nowhere."""
    sys.path.insert(0, str(HERE.parent))
    import shared_traces

    if not (shared / "traces" / "swissai_apertus_gh200").is_dir():
        print("without the GH200 measurements: their folder is not here (--shared)")
        return
    rows = shared_traces.apertus_rows(shared, "dspark")
    frame = pd.DataFrame(rows)
    frame["e2e_mean"] = frame["ttft_p50"] + frame["tpot_p50"] * (frame["output_length"] - 1)
    trace = diffspec.read_trace(shared_traces.write_table(rows, folder / "apertus.csv"))
    regrets: dict[str, list[float]] = {}
    loads = sorted({(row["workload"], float(row["concurrency"])) for row in rows})
    for workload, flight in loads:
        here = frame[(frame["workload"] == workload) & (frame["concurrency"].astype(float) == flight)]
        measured = here.groupby("draft_length")["e2e_mean"].mean().map(np.log).to_dict()
        if len(measured) < 3:
            continue
        apart = trace.frame["concurrency"] == flight
        model = fitted(trace, trace.frame[~apart], "roofline", folder / f"apertus_{flight:g}.json")
        prompt, output = shared_traces.APERTUS_LENGTHS[workload]
        cell = (None, flight, prompt, output, None, 256.0)
        own = frame[(frame["workload"] == workload) & (frame["concurrency"].astype(float) != flight)]
        tokens = own[own["draft_length"] > 0].groupby("draft_length")["tokens_per_step"]
        emitted = {k: float(np.mean([float(v) for v in values])) for k, values in tokens}
        told = {
            k: predicted(model, cell, [k], None if k == 0 else diffspec.acceptance_from_tokens_per_step(emitted[k], k))[
                k
            ]
            for k in measured
            if k == 0 or k in emitted
        }
        least = min(measured.values())
        for rule, k in (
            ("diffspec, load held out", min(told, key=lambda k: told[k])),
            ("always 0", 0),
            ("always 3", nearest(3, measured)),
        ):
            regrets.setdefault(rule, []).append(float(np.exp(measured[k] - least) - 1))
        best, taken = (min(table, key=lambda k, table=table: table[k]) for table in (measured, told))
        print("apertus", workload, flight, "best", best, "takes", taken, flush=True)
    print({rule: (round(100 * float(np.mean(values)), 2), len(values)) for rule, values in regrets.items()})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shared", type=Path, help="folder with traces/swissai_apertus_gh200; only printed")
    parser.add_argument("--models", type=Path, help="folder where fitted models are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    prepare_jax()
    folder = options.models or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    arms = [judge(arm, folder) for arm in ARMS]
    results = {"summary": summary(arms), "arms": arms}
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(report(results), encoding="utf-8")
    if options.shared is not None:
        private(options.shared, folder)


if __name__ == "__main__":
    main()
