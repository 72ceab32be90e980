"""A joint problem of over 200 real variables: diffspec's gradients against gradient-free peers and SciPy, one process.

    pip install optuna cma
    python experiments/07_optimise/search_scale.py [--seconds 600]

The problem (synthetic server): 4 classes of requests at 16 loads, each load with its own draft length of every class
and its own batch cap, all of them with one placement of 32 unevenly popular experts on 4 ranks (a soft assignment) and
one drafter size, along which acceptance and cost rise: 64 + 16 + 128 + 1 variables in [0, 1], none separable from the
placement. Minimised: the mean over loads of log mean e2e latency, plus 20 times the squares of the log excess of three
limits at every load and of the overload. Every solver gets the same compiled objective, and those that take gradients
the same compiled gradient; a gradient counts as one evaluation. Gradient-free peers run until --seconds are spent and
are asked what they reached; diffspec is asked how many evaluations and seconds it needs to reach the best of them.
Writes search_scale.json, search_scale.md and search_scale.png (best so far).
"""

import argparse
import contextlib
import json
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

from diffspec.acceptance import ConstantAcceptance  # noqa: E402
from diffspec.configuration import Configuration  # noqa: E402
from diffspec.drafters import DraftCost  # noqa: E402
from diffspec.experts import ExpertRouting  # noqa: E402
from diffspec.optimizing.constrained import minimise_within  # noqa: E402
from diffspec.serving import ServingModel  # noqa: E402
from diffspec.step_time import ExpertCost, RooflineStepTime  # noqa: E402
from diffspec.workload import Workload  # noqa: E402

HERE = Path(__file__).resolve().parent
RATES = np.asarray([0.4, 0.3, 0.2, 0.1])
PROMPTS, OUTPUTS, EASE = (300.0, 800.0, 2000.0, 100.0), (200.0, 120.0, 60.0, 400.0), (0.0, 0.9, 0.4, -0.4)
LOADS = np.linspace(2.0, 17.0, 16)
EXPERTS, RANKS, ACTIVE, LONGEST, CAPS = 32, 4, 4, 10.0, (4.0, 64.0)
POPULARITY = (np.arange(1, EXPERTS + 1) ** -0.8) / np.sum(np.arange(1, EXPERTS + 1) ** -0.8) * ACTIVE
POPULARITY = np.minimum(POPULARITY, 1.0)
LENGTHS, CAPPED, SIZE = slice(0, 64), slice(64, 80), 80
CLASSES_OF_A_LOAD = [range(4 * load, 4 * load + 4) for load in range(16)]
VARIABLES = 81 + EXPERTS * RANKS
LIMITS = (("ttft", 0.25), ("tpot", 0.02), ("e2e_latency", 4.0))


def server(placement) -> ServingModel:
    routing = ExpertRouting(jnp.asarray(POPULARITY), placement, sharpness=24.0)
    step = RooflineStepTime(
        weight_read=3e-3,
        token_compute=3e-5,
        kv_read=6e-8,
        step_overhead=1e-3,
        prefill_token=1.5e-5,
        draft=DraftCost(pass_base=6e-4, pass_sequence=1e-5),
        experts=ExpertCost(routing, weight_read=6e-3),
    )
    return ServingModel(step, first_token_steps=1.5, waiting_states=64)


def objective(x):
    """What is minimised over x [209] in [0, 1]."""
    lengths, size = 1.0 + (LONGEST - 1.0) * x[LENGTHS].reshape(16, 4), jnp.exp(jnp.log(16.0) * (x[SIZE] - 0.5))
    caps = jnp.exp(np.log(CAPS[0]) + np.log(CAPS[1] / CAPS[0]) * x[CAPPED])
    model = server(jax.nn.softmax(8.0 * x[81:].reshape(RANKS, EXPERTS), axis=0))
    ease = jnp.asarray(EASE) + 0.6 + 0.5 * jnp.log(size)
    rates = jax.nn.sigmoid(ease)

    def at(load, lengths, cap):
        workloads = [Workload(PROMPTS[c], OUTPUTS[c], arrival_rate=load * RATES[c]) for c in range(4)]
        configs = [
            Configuration(lengths[c], ConstantAcceptance(rates[c]), max_batch_size=cap, drafter_scale=size)
            for c in range(4)
        ]
        found = model.predict_classes(workloads, configs)
        excess = [jnp.log(RATES @ getattr(found, name) / bound) for name, bound in LIMITS]
        beyond = jnp.maximum(jnp.stack([*excess, found.overload[0]]), 0.0)
        return jnp.log(RATES @ found.e2e_latency) + 20.0 * jnp.sum(beyond**2)

    return jnp.mean(jax.vmap(at)(jnp.asarray(LOADS), lengths, caps))


VALUE = jax.jit(objective)
GRADIENT = jax.jit(jax.value_and_grad(objective))


class Recorder:
    """Counts what a solver asks, and keeps the best so far: [(evaluations, seconds, value)]."""

    def __init__(self, seconds: float):
        self.begin, self.limit, self.count, self.best, self.curve = time.perf_counter(), seconds, 0, np.inf, []

    def took(self, value: float, evaluations: int = 1) -> float:
        self.count += evaluations
        if value < self.best:
            self.best = float(value)
            self.curve.append((self.count, time.perf_counter() - self.begin, self.best))
        if time.perf_counter() - self.begin > self.limit:
            raise TimeoutError
        return float(value)

    def value(self, x) -> float:
        return self.took(float(VALUE(jnp.asarray(np.clip(x, 0.0, 1.0)))))

    def gradient(self, x):
        value, slope = GRADIENT(jnp.asarray(np.clip(x, 0.0, 1.0)))
        self.took(float(value))
        return float(value), np.asarray(slope)


def without_limits(x, *_):
    return objective(x), jnp.zeros(1)


def diffspec(record: Recorder, start) -> None:
    """Four starts side by side; a call that evaluates all of them counts as four evaluations."""
    import diffspec.optimizing.constrained as solver

    random = np.random.default_rng(1).random(VARIABLES)
    starts = np.asarray([start, 0.6 * start, np.clip(1.4 * start, 0.0, 1.0), random])
    compiled = solver._evaluate

    def counted(*asked):
        found = compiled(*asked)
        record.took(float(jnp.min(found[1])), len(starts))
        return found

    solver._evaluate = counted
    try:
        minimise_within(without_limits, starts, None, rounds=1, steps=1000, tolerance=1e-7, alike=CLASSES_OF_A_LOAD)
    finally:
        solver._evaluate = compiled


def scipys(method: str, gradients: bool):
    def run(record: Recorder, start) -> None:
        bounds = [(0.0, 1.0)] * VARIABLES
        options = {"maxiter": 2000, "ftol": 1e-10} if method == "SLSQP" else {"maxiter": 2000, "maxfun": 10**7}
        function = record.gradient if gradients else record.value
        optimize.minimize(function, start, jac=gradients or None, method=method, bounds=bounds, options=options)

    return run


def optuna(record: Recorder, start) -> None:
    import optuna as peer

    peer.logging.set_verbosity(peer.logging.ERROR)
    study = peer.create_study(sampler=peer.samplers.TPESampler(seed=0, multivariate=False))
    study.enqueue_trial({f"x{i}": float(value) for i, value in enumerate(start)})
    study.optimize(
        lambda trial: record.value(np.asarray([trial.suggest_float(f"x{i}", 0, 1) for i in range(VARIABLES)])),
        timeout=record.limit,
    )


def cma_es(record: Recorder, start) -> None:
    import cma

    options = {"bounds": [0.0, 1.0], "seed": 1, "verbose": -9, "maxfevals": 10**7, "tolfun": 1e-12}
    while True:
        cma.fmin2(record.value, start, 0.25, options, restarts=0)


SOLVERS = {
    "diffspec": diffspec,
    "SLSQP, our gradients": scipys("SLSQP", True),
    "L-BFGS-B, our gradients": scipys("L-BFGS-B", True),
    "SLSQP, differences": scipys("SLSQP", False),
    "L-BFGS-B, differences": scipys("L-BFGS-B", False),
    "CMA-ES": cma_es,
    "Optuna TPE": optuna,
}
GRADIENT_FREE = ("CMA-ES", "Optuna TPE")


def summary(curves: dict) -> dict:
    """Final values, and what each solver took to reach the best gradient-free peer's."""
    target = min(curves[name][-1][2] for name in GRADIENT_FREE)
    slowest = min((curve for name, curve in curves.items() if name in GRADIENT_FREE), key=lambda curve: curve[-1][2])
    rows = {}
    for name, curve in curves.items():
        reached = next(((count, seconds) for count, seconds, value in curve if value <= target), (None, None))
        rows[name] = {
            "best": curve[-1][2],
            "evaluations": curve[-1][0],
            "seconds": curve[-1][1],
            "evaluations to the best gradient-free value": reached[0],
            "seconds to it": reached[1],
        }
    return {"target": target, "target_evaluations": slowest[-1][0], "target_seconds": slowest[-1][1], "solvers": rows}


def report(found: dict) -> str:
    lines = [
        f"# A joint problem of {VARIABLES} real variables",
        "",
        "`python experiments/07_optimise/search_scale.py`, one process, CPU. Times without compilation. *Target*: "
        f"the best value of a gradient-free peer ({found['target']:.4f}).",
        "",
        "| solver | best value | evaluations | seconds | evaluations to the target | seconds to the target |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["solvers"].items():
        count, seconds = row["evaluations to the best gradient-free value"], row["seconds to it"]
        reached = ("never", "never") if count is None else (str(count), f"{seconds:.2f}")
        numbers = (f"{row['best']:.4f}", str(row["evaluations"]), f"{row['seconds']:.1f}", *reached)
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def draw(curves: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, place, label in zip(figure.subplots(1, 2), (0, 1), ("evaluations", "seconds"), strict=True):
        for name, curve in curves.items():
            axes.step([entry[place] for entry in curve], [entry[2] for entry in curve], where="post", label=name)
        axes.set(xscale="log", xlabel=label, ylabel="best objective so far")
    figure.axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    seconds = parser.parse_args().seconds
    start = np.full(VARIABLES, 0.5) + 0.02 * np.random.default_rng(0).standard_normal(VARIABLES)
    begin = time.perf_counter()
    VALUE(jnp.asarray(start)), GRADIENT(jnp.asarray(start))
    with contextlib.suppress(TimeoutError):
        diffspec(Recorder(0.0), start)  # compiles its program
    compiled = time.perf_counter() - begin
    curves = {}
    for name, solver in SOLVERS.items():
        record = Recorder(seconds if name in GRADIENT_FREE or "differences" in name else np.inf)
        with contextlib.suppress(TimeoutError):
            solver(record, start)
        record.curve.append((record.count, time.perf_counter() - record.begin, record.best))
        curves[name] = record.curve
        print(f"{name}: {record.curve[-1]}", file=sys.stderr, flush=True)
    found = summary(curves) | {
        "compilation_seconds": compiled,
        "gradient_free_seconds": seconds,
        "variables": VARIABLES,
    }
    found["versions"] = {name: version(name) for name in ("jax", "scipy", "numpy", "optuna", "cma")}
    text = json.dumps(found | {"curves": curves}, indent=1)
    (HERE / "search_scale.json").write_text(text + "\n", encoding="utf-8")
    (HERE / "search_scale.md").write_text(report(found), encoding="utf-8")
    draw(curves, HERE / "search_scale.png")
    print(report(found))


if __name__ == "__main__":
    main()
