"""Are posterior draws calibrated? Simulation-based calibration (Talts et al. 2018, arXiv 1804.06788) of each method.

    python experiments/06_fit/simulation_based_calibration.py [--replicates 400]

Each replicate draws every cost and the noise from the priors that a fit states, predicts the runs of one fixed table
(closed loops, which never saturate), scatters their ttft and itl by the drawn noise, fits the roofline form and draws
from what the fit leaves open. If the draws were the posterior's, the drawn cost would have a uniform rank among them:
the share of replicates inside the central 90 and 50 % would be 90 and 50 %, and a chi-squared test over ten bins would
find nothing. Told beside each cost: the share of its prior's variance that the table takes away (a cost that nothing is
told of is calibrated by its prior alone). The last two rows are predictions of a run that was not measured. All of it
is synthetic, and the model is true here; where it is not, interval_coverage.py judges. Goes on from its JSON.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np

from diffspec.cli.prepare import prepare_jax

prepare_jax()

import design as shared  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from scipy import stats  # noqa: E402

from diffspec.fitting.draws import UNCERTAINTIES  # noqa: E402
from diffspec.fitting.forms import Scales, build_form  # noqa: E402
from diffspec.fitting.objective import build_objective, choose_targets  # noqa: E402
from diffspec.fitting.observations import observations  # noqa: E402
from diffspec.fitting.solve import LANES, minimise, random_starts  # noqa: E402

HERE = Path(__file__).parent
METHODS = ("randomised", "laplace")
SCALES, REQUESTS, BINS = Scales(0.01, 0.05, 512.0, 512.0), 400, 10
CELLS = [
    (k, concurrency, *((256.0, 128.0) if number % 2 else (1024.0, 64.0)))
    for k in (0, 1, 3, 5)
    for number, concurrency in enumerate((1, 4, 12, 32, 64))
]
UNSEEN = (4, 24, 512.0, 100.0)


def problem():
    """The objective of the table, with the run that was not measured as its last row in trace order, and where each
    row stands."""
    rows = [
        {"deployment": "synthetic", "concurrency": concurrency, "draft_length": k, "prompt_length": prompt}
        | {
            "output_length": output,
            "method": "draft_model" if k else "none",
            "n_requests": REQUESTS,
            "window": "steady",
        }
        | {"position_acceptance": ";".join(map(str, shared.RATES[:k])), "ttft_mean": 0.05, "itl_mean": 0.01}
        for k, concurrency, prompt, output in (*CELLS, UNSEEN)
    ]
    data = observations(shared.table(rows).frame)
    form = build_form("roofline", SCALES)
    template = dataclasses.replace(form.template, waiting_states=0, finite_runs="trapezoid")
    objective = build_objective(dataclasses.replace(form, template=template), data, choose_targets(data))
    return objective, np.asarray(data.order) == len(CELLS)


def replicate(objective, unseen: np.ndarray, residuals, seed: int) -> dict:
    """Per method, cost and prediction: share of draws below the planted value, and by how much the deviation shrank."""
    random = np.random.default_rng(seed)
    planted = random.standard_normal(objective.size)
    noise, real = objective.noise(jnp.asarray(planted)), np.asarray(objective.real) > 0
    scale = np.asarray(noise.scale(objective.requests))
    scatter = scale * random.standard_t(float(noise.degrees_of_freedom), scale.shape)
    truth = np.asarray(residuals(jnp.asarray(planted)[None]))[0]
    objective = dataclasses.replace(objective, log_values=objective.log_values + jnp.asarray(truth + scatter))
    weights = np.tile(~unseen * 1.0, (len(objective.columns), 1))
    solution = minimise(objective, random_starts(objective.size), np.tile(weights, (LANES, 1, 1)))
    fitted, count = solution.vector[solution.best], len(objective.form.paths)
    cells, spread = np.arange(len(unseen)), np.asarray(objective.form.spread)
    place = np.flatnonzero(real)[unseen][0]
    found = {}
    for method in METHODS:
        sure = UNCERTAINTIES[method](objective, solution, weights, cells, {})
        moved = sure.deviations(64) / spread
        vectors = np.tile(fitted, (len(moved), 1))
        vectors[:, :count] += moved
        predicted = np.asarray(residuals(jnp.asarray(vectors)))[:, :, place]
        ranks = [*np.mean(vectors[:, :count] < planted[:count], axis=0)]
        ranks += [*np.mean(predicted < truth[:, place], axis=0)]
        told = [*(1.0 - np.minimum(sure.deviation / spread, 1.0) ** 2), *[1.0] * len(objective.columns)]
        found[method] = {"rank": [float(value) for value in ranks], "told": [float(value) for value in told]}
    return {"seed": seed} | found


def summary(names: list[str], done: list[dict]) -> dict:
    """By method and name: shares inside, how much is told (median), and the p value of uniform ranks."""
    random, found = np.random.default_rng(0), {}
    for method in METHODS:
        ranks, told = (np.asarray([entry[method][key] for entry in done]) for key in ("rank", "told"))
        places = (ranks * 64 + random.random(ranks.shape)) / 65  # ties of whole ranks, spread evenly
        found[method] = {}
        for index, name in enumerate(names):
            column = places[:, index]
            counts, _ = np.histogram(column, BINS, (0.0, 1.0))
            found[method][name] = {
                "inside 90 %": float(np.mean(np.abs(column - 0.5) <= 0.45)),
                "inside 50 %": float(np.mean(np.abs(column - 0.5) <= 0.25)),
                "below the median": float(np.mean(column < 0.5)),
                "told": float(np.median(told[:, index])),
                "p of uniform ranks": float(stats.chisquare(counts).pvalue),
            }
    return found


def report(found: dict, replicates: int) -> str:
    """The table of each method."""
    wide = 1.645 * np.sqrt(np.asarray([0.09, 0.25]) / replicates)
    lines = [
        f"# Simulation-based calibration, {replicates} synthetic tables",
        "",
        "`python experiments/06_fit/simulation_based_calibration.py`. Calibrated draws have 90 and 50 % inside "
        f"(nine of ten times within {100 * wide[0]:.0f} and {100 * wide[1]:.0f} points of that), and half below the "
        "median.",
    ]
    for method, rows in found.items():
        lines += [
            "",
            f"## {method}",
            "",
            "| | told (median) | inside 90 % | inside 50 % | planted above the median | p |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for name, row in rows.items():
            shares = (f"{100 * row[key]:.0f} %" for key in ("told", "inside 90 %", "inside 50 %"))
            above, chance = 100 * (1.0 - row["below the median"]), row["p of uniform ranks"]
            lines.append(f"| {name} | {' | '.join(shares)} | {above:.0f} % | {chance:.1g} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=400)
    wanted, path, begun = parser.parse_args().replicates, HERE / "simulation_based_calibration.json", time.monotonic()
    objective, unseen = problem()
    residuals = jax.jit(jax.vmap(lambda vector: objective.residuals(vector)))
    names = [path.removeprefix("step_time.") for path in objective.form.paths]
    names += [f"{column} of a run not measured" for column in objective.columns]
    done = json.loads(path.read_text(encoding="utf-8"))["replicates"] if path.exists() else []
    for seed in range(len(done), wanted):
        done.append(replicate(objective, unseen, residuals, seed))
        if len(done) % 20 == 0 or len(done) == wanted:
            found = summary(names, done)
            path.write_text(json.dumps({"summary": found, "replicates": done}) + "\n", encoding="utf-8")
            text = report(found, len(done))
            path.with_suffix(".md").write_text(text, encoding="utf-8")
            print(f"{len(done)} of {wanted} tables, {time.monotonic() - begun:.0f} s", flush=True)
    print(report(summary(names, done), len(done)))


if __name__ == "__main__":
    main()
