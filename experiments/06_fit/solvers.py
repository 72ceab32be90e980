"""The solver of diffspec's fits against scipy's with finite differences, in one process.

    python experiments/06_fit/solvers.py

The problem: rows of a table of data/ and one form, a Student t log likelihood plus the priors. diffspec fits costs and
noise together from eight starts side by side, with derivatives by forward sweeps. scipy gets the same compiled model,
one start after the other, with two-point differences: `minimize` (BFGS) the same problem; `least_squares` and
`curve_fit` (Levenberg-Marquardt) an easier one, the costs alone with the noise held where diffspec found it, as
pseudo-residuals whose half sum of squares is the loss. Times are without compilation, which is told apart; medians of
alternating runs. Writes solvers.json and solvers.md.
"""

import dataclasses
import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from diffspec.cli.prepare import prepare_jax

prepare_jax()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from scipy import optimize  # noqa: E402

from diffspec import read_trace  # noqa: E402
from diffspec.fitting.forms import Scales, build_form  # noqa: E402
from diffspec.fitting.noise import noise_at  # noqa: E402
from diffspec.fitting.objective import build_objective, choose_targets  # noqa: E402
from diffspec.fitting.observations import observations  # noqa: E402
from diffspec.fitting.solve import LANES, minimise, random_starts  # noqa: E402

HERE = Path(__file__).resolve().parent
TABLE, REPEATS, SCALES = "vllm_cpu_quiet.csv", 3, Scales(0.024, 0.09, 96.0, 64.0)
PEERS = ("least_squares", "curve_fit", "BFGS")


def problem(form: str):
    """The objective of one form over the table's rows."""
    data = observations(read_trace(HERE.parents[1] / "data" / TABLE).frame)
    built = build_form(form, SCALES)
    template = dataclasses.replace(built.template, waiting_states=0, finite_runs="trapezoid")
    return build_objective(dataclasses.replace(built, template=template), data, choose_targets(data)), len(data)


def measure(form: str) -> dict:
    """Times [s], compilation [s] and losses [nats] of diffspec and of each peer."""
    objective, rows = problem(form)
    places, ones = objective.places, np.ones((len(objective.columns), rows))
    starts = random_starts(objective.size)

    def ours():
        return minimise(objective, starts, np.tile(ones, (LANES, 1, 1)))

    begin = time.perf_counter()
    found = ours()
    first = time.perf_counter() - begin
    held = found.vector[found.best, places:]
    weights = jnp.ones(objective.used.shape)
    loss = jax.jit(lambda vector: objective(vector, weights))
    noise = noise_at(jnp.asarray(held))
    nu, sigma = noise.degrees_of_freedom, noise.scale(objective.requests)

    @jax.jit
    def pseudo(costs):
        """Residuals whose half sum of squares is the loss at the held noise, up to a constant."""
        r = objective.residuals(jnp.concatenate([costs, jnp.asarray(held)]))
        each = jnp.sign(r) * jnp.sqrt((nu + 1.0) * jnp.log1p(r**2 / (nu * sigma**2)) + 1e-30)
        return jnp.concatenate([(objective.used * each).ravel(), costs])

    def residuals(costs):
        return np.asarray(pseudo(costs))

    count = residuals(starts[0, :places]).size
    float(loss(starts[0]))

    def least_squares(start):
        return np.append(optimize.least_squares(residuals, start[:places]).x, held)

    def curve_fit(start):
        answer, _ = optimize.curve_fit(
            lambda _, *costs: residuals(np.asarray(costs)), np.arange(count), np.zeros(count), start[:places]
        )
        return np.append(answer, held)

    def bfgs(start):
        return optimize.minimize(lambda vector: float(loss(vector)), start, method="BFGS").x

    peers = dict(zip(PEERS, (least_squares, curve_fit, bfgs), strict=True))
    times: dict[str, list[float]] = {name: [] for name in ("diffspec", *PEERS)}
    losses: dict[str, float] = {}
    for _ in range(REPEATS):
        begin = time.perf_counter()
        found = ours()
        times["diffspec"].append(time.perf_counter() - begin)
        losses["diffspec"] = float(loss(found.vector[found.best]))
        for name, peer in peers.items():
            begin = time.perf_counter()
            answers = []
            for start in starts:
                try:
                    answers.append(peer(start))
                except RuntimeError:  # curve_fit that reached its limit of evaluations
                    continue
            times[name].append(time.perf_counter() - begin)
            losses[name] = min((float(loss(answer)) for answer in answers), default=float("inf"))
    print(f"{form}: {times}", file=sys.stderr, flush=True)
    return {
        "form": form,
        "rows": rows,
        "coordinates": objective.size,
        "seconds": {name: statistics.median(taken) for name, taken in times.items()},
        "first_call_seconds": first,
        "loss": losses,
    }


def table(found: list[dict]) -> str:
    """Times of eight starts, ratios to diffspec's, and how much higher the best loss is."""
    lines = ["| form | solver | seconds | over diffspec's | loss above diffspec's [nats] |", "|" + "---|" * 5]
    for entry in found:
        for name, seconds in entry["seconds"].items():
            ratio, above = seconds / entry["seconds"]["diffspec"], entry["loss"][name] - entry["loss"]["diffspec"]
            lines.append(f"| {entry['form']} | {name} | {seconds:.2f} | {ratio:.1f} | {above:+.4f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    found = [measure(form) for form in ("affine", "roofline")]
    versions = {name: version(name) for name in ("jax", "scipy", "numpy")}
    (HERE / "solvers.json").write_text(
        json.dumps({"table": TABLE, "repeats": REPEATS, "versions": versions, "forms": found}, indent=1) + "\n",
        encoding="utf-8",
    )
    (HERE / "solvers.md").write_text(table(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
