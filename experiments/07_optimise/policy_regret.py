"""Draft length by batch on loads that change, played in the simulator: regret of `diffspec policy` and of its rivals.

    python experiments/07_optimise/policy_regret.py [--shared FOLDER] [--models FOLDER] [--seeds 2] [--held-out]

Three models, whose truth the policy does not know: fits to vLLM on an H200 and to our serving loop on it (the engine
that is played is one of the draws that the fit allows; six of them), and a synthetic server that was fitted to 20
simulated runs (the engine is the planted one). A fit's prefill_interference, which the simulator does not know, scales
the prompts of the engine that is played, so that they take as much from others. Loads: a ramp from a tenth of the
capacity to 0.95 and back, bursts (0.3 of the capacity, every 8 s for 2 s 1.2 of it), and with --shared the arrivals of
two Azure services (2023), sped up to a mean of 0.55 (conversations) and 0.3 (code, far burstier) of the capacity, in
pieces. Lengths are those of the model.

How the policy is chosen was settled on these and more that was looked at meanwhile (twelve draws; two more questions;
six more planted servers of experiment 06, seeds 1 to 3 and 11 to 13; daily waves, steps, a flash crowd). --held-out
plays what was not: other draws, questions (acceptance and lengths), planted servers (seeds 21 to 24), seeds, loads
(saw: a climb from 0.2 to 1.05 of the capacity in 6 s, three times; on-off: 0.9 and 0.15 of it, for times that are
exponential with means of 3 and 5 s; peaks: 0.15 and, twice for 3 s, 0.8 of it; the Azure services at other means, 0.5
and 0.35, and pieces, of the code service partly others); results in policy_regret_held_out.

* policy: the schedule of `diffspec policy` by risk (mean, point, 0.9); "bands": with its hysteresis, as the Python
  look-up plays it; "tiers by pace": without the finer tiers that are worth it over the loads, though not at their
  batches
* policy, costs known: the same asked of the engine that is played: what is left is not ignorance of the costs
* best static: one draft length for all batches, the best on this load and this engine, in hindsight
* model static: the one that the policy calls best over its loads, in advance
* vLLM-like: batch thresholds set by hand, [[1,16,5],[17,32,4],[33,64,3],[65,128,1],[129,512,0]]
* SGLang table: its default candidates, at the draft length where its rule comes to rest at this acceptance
* oracle: direct search in the simulator on the very arrivals, engine and seeds that are scored: from the best of all
  the above, the draft length of each of 9 ranges of batches is moved by one or to 0, while the mean e2e over the seeds
  falls. It knows the true costs, the acceptance and the load to come; the others are worse than it by their regret

Regret: mean (or p95) e2e of a run over the oracle's, - 1; for p95 the oracle is the schedule with the least p95 that
the search met. Intervals: Student's t over the runs (seeds of all engines), 95 %.
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from unittest.mock import patch

import jax

jax.config.update("jax_enable_x64", True)
import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from scipy.special import stdtrit  # noqa: E402

import diffspec  # noqa: E402
from diffspec.acceptance import AbstractPositionwise, ConstantAcceptance, PositionAcceptance  # noqa: E402
from diffspec.analysis.intervals import each  # noqa: E402
from diffspec.cli.options import read_model  # noqa: E402
from diffspec.cli.prepare import prepare_jax  # noqa: E402
from diffspec.fitting.deployment import FittedDeployment  # noqa: E402
from diffspec.optimizing.batch_tables import batch_tables  # noqa: E402
from diffspec.optimizing.engine_rules import sglang_steps, vllm_draft_lengths  # noqa: E402
from diffspec.optimizing.load_policy import policy  # noqa: E402
from diffspec.optimizing.schedule import ranges_of  # noqa: E402
from diffspec.serving import ServingModel  # noqa: E402
from diffspec.simulating import DraftSchedule, Engine, Lane, draw_arrivals, from_arrivals, run_lanes  # noqa: E402
from diffspec.workload import Workload  # noqa: E402

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "data"
LONGEST = 7
KNOTS = (1, 4, 8, 16, 24, 32, 48, 64, 96)
VLLM_LIKE = [[1, 16, 5], [17, 32, 4], [33, 64, 3], [65, 128, 1], [129, 512, 0]]
SGLANG = {
    "1": {"candidate_steps": [1, 3, 5, 7], "up_hysteresis": 0.0, "down_hysteresis": -0.25},
    "8": {"candidate_steps": [0, 1, 3], "up_hysteresis": 0.0, "down_hysteresis": 0.0},
    "32": {"candidate_steps": [0, 1], "up_hysteresis": 0.0, "down_hysteresis": 0.0},
    "64": {"candidate_steps": [0], "up_hysteresis": 0.0, "down_hysteresis": 0.0},
}
RISKS = ("mean", "point", "0.9")
DRAWS = (5, 15, 25, 35, 45, 55)
HELD_OUT_DRAWS = (2, 13, 24, 36, 47, 58)
HELD_OUT_PLANTED = (21, 22, 23, 24)
FIRST_SEED = 100
"""Of held-out runs."""
OF_ONE = 3
"""Times as many runs where there is one engine."""
PIECE = 500
"""Requests of one run of Azure arrivals."""


class Case:
    """A model to choose by, the acceptance and lengths it is asked with, and the engines that may be the true one."""

    def __init__(self, name, deployment: FittedDeployment, acceptance: AbstractPositionwise, truths, prompt, output):
        self.name, self.deployment, self.acceptance, self.truths = name, deployment, acceptance, truths
        self.prompt, self.output = prompt, output
        self.batches = int(deployment.defaults["max_batch_size"])
        self.answers = {risk: self.ask(deployment, risk) for risk in RISKS}

    def by_pace(self) -> dict:
        """The answer by risk mean without the finer tiers."""
        with patch("diffspec.optimizing.load_policy.FINER", ()):
            return self.ask(self.deployment, "mean")

    def ask(self, deployment: FittedDeployment, risk: str) -> dict:
        """What the policy answers without a load: over 0.1 to 0.9 of the capacity."""
        lengths = {"prompt_length": self.prompt, "output_length": self.output, "max_draft_length": LONGEST}
        return policy(deployment, **lengths, acceptance=self.acceptance, risk=risk)["contexts"][0]

    def capacity(self, truth: ServingModel) -> float:
        """Largest sustainable arrival rate [req/s] of an engine, over the draft lengths."""
        config = self.deployment.configuration(float(LONGEST), acceptance=self.acceptance)
        load = Workload(self.prompt, self.output, arrival_rate=1.0)
        floats = (jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=float), part) for part in (load, config))
        tables = batch_tables(truth, *floats, LONGEST, self.batches)
        last = tables.kept[-1]
        return float(np.max(tables.sizes[last] / tables.residence[:, last]))

    def rates(self, length: int) -> list[float]:
        return [float(rate) for rate in self.acceptance.conditional_rates(float(length))[:length]]

    def engine(self, truth: ServingModel, lengths: np.ndarray, bands=()) -> Engine:
        ranges = ranges_of(lengths)
        own = {k: self.rates(k) for *_, k in ranges if k > 0}
        schedule = DraftSchedule(ranges, bands, own | {0: ()})
        overhead = float(truth.request_overhead)
        return Engine(max_batch_size=self.batches, request_overhead=overhead, schedule=schedule)


def lengths_of(schedule, batches: int) -> np.ndarray:
    config = {"num_speculative_tokens": LONGEST, "num_speculative_tokens_per_batch_size": [list(e) for e in schedule]}
    return np.asarray(vllm_draft_lengths(config, batches))


def sglang_lengths(case: Case) -> np.ndarray:
    """Where SGLang's rule comes to rest in each slot: played 50 times with the accepted drafts of this acceptance."""
    accepted = [float(case.acceptance.moments(float(steps))[0]) - 1.0 for steps in range(LONGEST + 1)]
    found = []
    for batch in range(1, case.batches + 1):
        steps = 1
        for _ in range(50):
            steps = sglang_steps(SGLANG, batch, accepted[steps], steps)
        found.append(steps)
    return np.asarray(found)


def play(case: Case, truth: ServingModel, runs, plans, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean e2e, p95 e2e [s], changes of draft length per run) of each plan (draft lengths, bands) in each run, whose
    accepted tokens are drawn by seeds from ``first`` on."""
    engines = [case.engine(truth, *plan) for plan in plans]
    lanes = [Lane(run, engine, seed=number) for engine in engines for number, run in enumerate(runs, first)]
    found = run_lanes(truth.step_time, lanes)
    shape = (len(plans), len(runs))
    mean, tail = (
        np.asarray([statistic(lane.e2e) for lane in found]).reshape(shape)
        for statistic in (np.mean, lambda values: np.percentile(values, 95))
    )
    return mean, tail, np.asarray([lane.switches for lane in found]).reshape(shape)


def search(
    case: Case, truth: ServingModel, runs, start: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Direct search: (draft lengths, their mean e2e by run, the p95 by run of the plan with the least mean p95, plans
    played)."""
    knots = [knot for knot in KNOTS if knot <= case.batches]
    edges = [*knots[1:], case.batches + 1]
    now, played = start, 1
    mean, tail, _ = play(case, truth, runs, [(now, ())], first)
    mean, tail = mean[0], tail[0]

    def moved(plan: np.ndarray, place: int, length: int) -> np.ndarray:
        other = plan.copy()
        other[knots[place] - 1 : edges[place] - 1] = length
        return other

    while True:
        moves = [
            (place, length)
            for place, knot in enumerate(knots)
            for length in {now[knot - 1] - 1, now[knot - 1] + 1, 0} - {now[knot - 1]}
            if 0 <= length <= LONGEST
        ]
        plans = [moved(now, *move) for move in moves]
        means, tails, _ = play(case, truth, runs, [(plan, ()) for plan in plans], first)
        gains = means.mean(axis=1) / mean.mean() - 1.0
        together = now
        for place in range(len(knots)):
            here = [index for index, move in enumerate(moves) if move[0] == place]
            least = min(here, key=lambda index: gains[index])
            if gains[least] < 0:
                together = moved(together, *moves[least])
        plans.append(together)
        joint = play(case, truth, runs, [(together, ())], first)
        means, tails = np.concatenate([means, joint[0]]), np.concatenate([tails, joint[1]])
        played += len(plans)
        least = int(np.argmin(tails.mean(axis=1)))
        if tails[least].mean() < tail.mean():
            tail = tails[least]
        least = int(np.argmin(means.mean(axis=1)))
        if means[least].mean() > mean.mean() * (1.0 - 1e-3):
            return now, mean, tail, played
        now, mean = plans[least], means[least]


def scenarios(case: Case, truth: ServingModel, seeds: int, shared: Path | None, held_out: bool = False) -> dict:
    """Runs of each load, one a seed, at shares of the engine's capacity."""
    top, first = case.capacity(truth), FIRST_SEED if held_out else 0
    made: dict[str, list] = {}
    for place, name in enumerate(("saw", "on-off", "peaks") if held_out else ("ramp", "bursts")):
        made[name] = []
        for seed in range(first, first + seeds):
            random = np.random.default_rng([seed, place])
            shape = [(time, share * top) for time, share in shape_of(name, random)]
            made[name].append(from_arrivals(draw_arrivals(shape, random), case.prompt, case.output))
    means = (("conv", 0.5), ("code", 0.35)) if held_out else (("conv", 0.55), ("code", 0.3))
    for name, share in means if shared is not None else ():
        times = azure(shared / "traces" / "arrivals_azure2023" / f"AzureLLMInferenceTrace_{name}.csv")
        times = times * (len(times) / times[-1]) / (share * top)
        every = len(times) // PIECE // seeds
        pieces = np.array_split(times, len(times) // PIECE)[every // 3 + 1 if held_out else 0 :: every][:seeds]
        made[f"azure {name}"] = [from_arrivals(piece - piece[0], case.prompt, case.output) for piece in pieces]
    return made


def shape_of(name: str, random) -> list[tuple[float, float]]:
    """(time [s], share of the capacity), joined by straight lines."""
    if name == "ramp":
        return [(0.0, 0.1), (10.0, 0.95), (20.0, 0.1)]
    if name == "bursts":
        corners = ((0, 0.3), (5, 0.3), (5, 1.2), (7, 1.2), (7, 0.3), (8, 0.3))
        return [(8.0 * number + time, share) for number in range(3) for time, share in corners]
    if name == "saw":
        return [(6.0 * number + time, share) for number in range(3) for time, share in ((0.0, 0.2), (6.0, 1.05))]
    if name == "peaks":
        corners = ((0, 0.15), (6, 0.15), (6, 0.8), (9, 0.8), (9, 0.15), (12, 0.15))
        return [(12.0 * number + time, share) for number in range(2) for time, share in corners]
    ends = np.cumsum(random.exponential([3.0, 5.0] * 3)).tolist()
    spans = zip([0.0, *ends], ends, (0.9, 0.15) * 3, strict=False)
    return [(time, share) for start, end, share in spans for time in (start, end)]


def azure(path: Path) -> np.ndarray:
    """Arrival times [s] from the first."""
    with open(path, newline="") as file:
        stamps = [row["TIMESTAMP"] for row in csv.DictReader(file)]
    times = np.asarray([datetime.fromisoformat(stamp[:26]).timestamp() for stamp in stamps])
    return times - times[0]


def fitted(table: str, folder: Path) -> FittedDeployment:
    """The model of a table, fitted once and kept in a folder."""
    path = folder / f"{table}.json"
    if not path.exists():
        path.write_text(diffspec.fit(diffspec.read_trace(DATA / f"{table}.csv")).to_json(), encoding="utf-8")
    return read_model(path).deployment()


def synthetic(folder: Path) -> tuple[FittedDeployment, ServingModel, AbstractPositionwise]:
    """A planted server of experiment 06, and the fit of 20 simulated runs of it."""
    import design

    acceptance = PositionAcceptance(jnp.asarray([0.85, 0.78, 0.7, 0.62, 0.55, 0.5, 0.45]))
    planted = ServingModel(jax.tree.map(jnp.asarray, design.COSTS), request_overhead=design.OVERHEAD)
    return fit_to_runs(folder / "synthetic.json", planted, 0.75, 0), planted, acceptance


def fit_to_runs(path: Path, planted: ServingModel, rate: float, seed: int) -> FittedDeployment:
    """The model of the 20 runs, fitted once and kept in a folder."""
    import design
    import recovery

    if not path.exists():
        rows = [
            recovery.measured(planted, rate, cell, 200 if seed else 300, 1000 * seed + number)
            for number, cell in enumerate(recovery.CELLS)
        ]
        path.write_text(
            diffspec.fit(design.table(rows), step_time="roofline", all_rows=True).to_json(), encoding="utf-8"
        )
    return read_model(path).deployment()


def playable(model: ServingModel) -> ServingModel:
    """The model with prompts that last as long as others pay for them, and prefill_interference 1."""
    where = lambda m: (m.step_time.prefill_token, m.step_time.draft.prefill_token, m.prefill_interference)  # noqa: E731
    share = float(model.prefill_interference)
    return eqx.tree_at(where, model, (share * where(model)[0], share * where(model)[1], np.asarray(1.0)))


def cases(folder: Path, held_out: bool = False) -> list[Case]:
    sys.path.insert(0, str(HERE.parent / "06_fit"))
    import recovery

    asked = [("vllm_h200", 0.8, 512.0, 128.0), ("instrument_h200", 0.7, 256.0, 128.0)]
    if held_out:
        asked = [("vllm_h200", 0.72, 256.0, 256.0), ("instrument_h200", 0.78, 512.0, 128.0)]
    made = []
    for table, alpha, prompt, output in asked:
        deployment = fitted(table, folder)
        assert deployment.uncertainty is not None
        drawn = list(each(deployment.uncertainty.models(deployment.serving, 64)))
        truths = [playable(drawn[place]) for place in (HELD_OUT_DRAWS if held_out else DRAWS)]
        name = f"{table} ({alpha:g}, {prompt:g}+{output:g})" if held_out else table
        made.append(Case(name, deployment, ConstantAcceptance(alpha), truths, prompt, output))
    if not held_out:
        deployment, planted, acceptance = synthetic(folder)
        return [*made, Case("synthetic", deployment, acceptance, [planted], 256.0, 128.0)]
    for seed in HELD_OUT_PLANTED:
        planted, alpha = recovery.server(np.random.default_rng(seed))
        deployment = fit_to_runs(folder / f"plant{seed}.json", planted, alpha, seed)
        made.append(Case(f"synthetic {seed}", deployment, ConstantAcceptance(alpha), [planted], 256.0, 128.0))
    return made


def interval(values: np.ndarray) -> dict[str, float]:
    half = float(stdtrit(values.size - 1, 0.975) * values.std(ddof=1) / np.sqrt(values.size))
    return {"mean": float(values.mean()), "half_width": half}


def contest(case: Case, load: str, runs_of, first: int) -> dict:
    """Everybody on one load; ``runs_of``: the runs of each engine that may be the true one;
    ``first``: seed of the first engine's runs."""
    regrets: dict[str, list] = {}
    told = {
        "requests": int(np.mean([len(run) for runs in runs_of for run in runs])),
        "oracle": [],
        "best_static": [],
        "plans": 0,
    }
    for place, (truth, runs) in enumerate(zip(case.truths, runs_of, strict=True)):
        plans, seed = {}, first + 1000 * place
        for risk, answer in case.answers.items():
            plans[f"policy, {risk}"] = (lengths_of(answer["schedule"], case.batches), ())
        plans["policy, mean, tiers by pace"] = (lengths_of(case.by_pace()["schedule"], case.batches), ())
        known = replace(case.deployment, serving=truth, uncertainty=None)
        plans["policy, costs known"] = (lengths_of(case.ask(known, "point")["schedule"], case.batches), ())
        bands = [(band["down"], band["up"]) for band in case.answers["mean"]["bands"]]
        plans["policy, mean, bands"] = (plans["policy, mean"][0], bands)
        plans["model static"] = (np.full(case.batches, case.answers["mean"]["static_draft_length"]), ())
        plans["no speculation"] = (np.zeros(case.batches, dtype=int), ())
        plans["vLLM-like thresholds"] = (lengths_of(VLLM_LIKE, case.batches), ())
        plans["SGLang default table"] = (sglang_lengths(case), ())
        statics = {f"k={k}": (np.full(case.batches, k), ()) for k in range(LONGEST + 1)}
        names = [*plans, *statics]
        mean, tail, switches = play(case, truth, runs, [*plans.values(), *statics.values()], seed)
        best = int(np.argmin(mean[len(plans) :].mean(axis=1)))
        start = int(np.argmin(mean.mean(axis=1)))
        everything = {**plans, **statics}
        oracle, least, least_tail, played = search(case, truth, runs, everything[names[start]][0], seed)
        lowest = tail[int(np.argmin(tail.mean(axis=1)))]
        least_tail = least_tail if least_tail.mean() < lowest.mean() else lowest
        rows = dict(zip(plans, range(len(plans)), strict=True)) | {"best static (hindsight)": len(plans) + best}
        for name, row in rows.items():
            entry = regrets.setdefault(name, [[], [], []])
            entry[0].append(mean[row] / least - 1.0)
            entry[1].append(tail[row] / least_tail - 1.0)
            entry[2].append(switches[row])
        told["oracle"].append(ranges_of(oracle))
        told["best_static"].append(best)
        told["plans"] += played + len(names)
    told["regret"] = {
        name: {
            "mean_e2e": interval(np.concatenate(means)),
            "p95_e2e": interval(np.concatenate(tails)),
            "switches": float(np.mean(np.concatenate(counts))),
        }
        for name, (means, tails, counts) in regrets.items()
    }
    return told | {"model": case.name, "load": load}


def report(results: dict) -> str:
    names = list(results["contests"][0]["regret"])
    lines = [
        f"# Regret on loads that change{', held out' if results.get('held_out') else ''}",
        "",
        f"Mean regret in % (± half width of its 95 % interval) over {results['seeds']} runs an engine, thrice as many",
        "of one engine alone, against a direct search in the simulator on the same runs; made by",
        "`policy_regret.py`, which says what each row is.",
    ]
    for key, title in (("mean_e2e", "Mean end-to-end latency"), ("p95_e2e", "p95 of the end-to-end latency")):
        columns = [f"{entry['model']}, {entry['load']}" for entry in results["contests"]]
        lines += ["", f"## {title}", "", f"| | {' | '.join(columns)} | all |", "|---" * (len(columns) + 2) + "|"]
        for name in names:
            cells = [entry["regret"][name][key] for entry in results["contests"]]
            shown = [f"{100 * cell['mean']:.1f} ± {100 * cell['half_width']:.1f}" for cell in cells]
            every = 100 * np.mean([cell["mean"] for cell in cells])
            lines.append(f"| {name} | {' | '.join(shown)} | {every:.1f} |")
    lines += [
        "",
        "## Schedules, and changes of the draft length in a run",
        "",
        "| model | policy (mean) | bands |",
        "|---|---|---|",
    ]
    for name, told in results["schedules"].items():
        lines.append(f"| {name} | {told['schedule']} | {told['bands']} |")
    lines += ["", "| | " + " | ".join(f"{e['model']}, {e['load']}" for e in results["contests"]) + " |"]
    lines.append("|---" * (len(results["contests"]) + 1) + "|")
    for name in ("policy, mean", "policy, mean, bands"):
        lines.append(
            f"| {name} | " + " | ".join(f"{e['regret'][name]['switches']:.0f}" for e in results["contests"]) + " |"
        )
    if results["without"]:
        lines += ["", results["without"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shared", type=Path, help="folder with traces/arrivals_azure2023")
    parser.add_argument("--models", type=Path, help="folder where fitted models are kept")
    parser.add_argument("--seeds", type=int, default=2, help="runs of an engine; of a planted one thrice as many")
    parser.add_argument("--held-out", action="store_true", help="what was not looked at while the policy was built")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or HERE / f"policy_regret{'_held_out' if options.held_out else ''}.json"
    prepare_jax()
    shared = options.shared
    without = ""
    if shared is None or not (shared / "traces" / "arrivals_azure2023").is_dir():
        shared, without = None, "Without the Azure arrivals: their folder is not here (--shared)."
        print(without)
    folder = options.models or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    contests, schedules = [], {}
    for case in cases(folder, options.held_out):
        schedules[case.name] = {name: case.answers["mean"][name] for name in ("schedule", "off_above")}
        schedules[case.name]["bands"] = [[band["down"], band["up"]] for band in case.answers["mean"]["bands"]]
        seeds = options.seeds if len(case.truths) > 1 else OF_ONE * options.seeds
        runs_of = [scenarios(case, truth, seeds, shared, options.held_out) for truth in case.truths]
        for load in runs_of[0]:
            start, first = time.monotonic(), 10_000 * len(contests) + FIRST_SEED * options.held_out
            found = contest(case, load, [runs[load] for runs in runs_of], first)
            contests.append(found | {"seconds": time.monotonic() - start})
            shown = {name: round(100 * told["mean_e2e"]["mean"], 2) for name, told in contests[-1]["regret"].items()}
            print(case.name, load, contests[-1]["requests"], f"{contests[-1]['seconds']:.0f} s", shown, flush=True)
    results = {"seeds": options.seeds, "held_out": options.held_out, "without": without}
    results |= {"schedules": schedules, "contests": contests}
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(report(results), encoding="utf-8")


if __name__ == "__main__":
    main()
