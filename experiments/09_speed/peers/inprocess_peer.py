# ruff: noqa: E402
"""Peers in one process with diffspec, given the same code: scipy's brentq and optimistix on the same equilibrium,
scipy's minimize and Optuna on the same relaxed joint decision. In turns, in float64, programs compiled before."""

import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ["EQX_ON_ERROR"] = "nan"  # a generic solve that fails in one system of a batch is counted, not raised for all

import jax

jax.config.update("jax_enable_x64", True)
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]

import json
import statistics

import jax.numpy as jnp
import numpy as np
import optimistix as optx
import optuna
from problems import lanes, relaxed_problem
from scipy.optimize import minimize
from steady_state import brentq_batch, random_systems, residence, solve

from diffspec.optimizing.constrained import minimise_within

CAP, SYSTEMS, FEW, ROUNDS, TRIALS = 256.0, 20_000, 500, 5, 150


def generic(solver, **given):
    """log residence time at the root of B = rate*residence(B), by a generic solver on the same code, its gradient by
    the implicit function theorem (optimistix's default)."""

    def solve_generic(system):
        rate = jax.lax.stop_gradient(system[7] * CAP / residence(system, CAP))

        def gap(log_batch, system):
            batch = jnp.exp(log_batch)
            return 1.0 - rate * residence(system, jnp.minimum(batch + 1.0, CAP)) / batch

        start = jnp.log(rate * residence(system, 1.0))
        found = optx.root_find(gap, solver, start, args=system, throw=False, max_steps=256, **given)
        return found.value - jnp.log(rate), found.result == optx.RESULTS.successful

    return solve_generic


def ours(system):
    value, (_, successful) = solve(system)
    return value, successful


def equilibrium() -> dict:
    """Seconds of one solve, alone and with the gradient, and how right it is."""
    systems = jnp.asarray(random_systems(SYSTEMS))
    few = np.asarray(systems)[:FEW]
    rates = np.asarray(jax.vmap(lambda s: s[7] * CAP / residence(s, CAP))(jnp.asarray(few)))
    bracket = {"options": {"lower": np.log(1e-6), "upper": np.log(CAP)}}
    solvers = {
        "diffspec": ours,
        "optimistix Newton": generic(optx.Newton(rtol=1e-12, atol=1e-12)),
        "optimistix Bisection": generic(optx.Bisection(rtol=1e-12, atol=1e-12), **bracket),
    }
    programs, found = {}, {}
    for name, solver in solvers.items():
        for kind, function in (("value", solver), ("value and gradient", jax.value_and_grad(solver, has_aux=True))):
            start = time.perf_counter()
            programs[name, kind] = jax.jit(jax.vmap(function)).lower(systems).compile()
            compiled = time.perf_counter() - start
            found.setdefault(name, {})[kind] = {"compile_s": compiled, "times": []}
    loop: list[float] = []
    for _ in range(ROUNDS):
        for (name, kind), program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(systems))
            found[name][kind]["times"].append((time.perf_counter() - start) / SYSTEMS)
        start = time.perf_counter()
        batches = [brentq_batch(system) for system in few]
        loop.append((time.perf_counter() - start) / FEW)
    truth = np.log(np.asarray(batches) / rates)
    exact = np.asarray(programs["diffspec", "value and gradient"](systems)[1])
    for name, kinds in found.items():
        logs, successful = programs[name, "value"](systems)
        slopes = np.asarray(programs[name, "value and gradient"](systems)[1])
        for told in kinds.values():
            times = told.pop("times")
            told |= {"min_s": min(times), "median_s": statistics.median(times)}
        error = np.abs(np.asarray(logs)[:FEW] - truth)
        apart = np.abs((slopes - exact) * np.asarray(systems)).max(axis=1)  # of elasticities
        kinds |= {
            "unsuccessful": int(SYSTEMS - np.sum(np.asarray(successful))),
            "largest_error": float(np.nan_to_num(error, nan=1e9).max()),
            "wrong_share": float(np.mean(~(error < 1e-6))),
            "largest_elasticity_difference": float(np.nan_to_num(apart, nan=1e9).max()),
        }
    found["scipy brentq, a Python loop"] = {"value": {"min_s": min(loop), "median_s": statistics.median(loop)}}
    return {"systems": SYSTEMS, "solvers": found}


def decision() -> dict:
    """Best value, evaluations and seconds of each solver on the relaxed problem of four classes and a cap."""
    problem = relaxed_problem(4)
    data = {name: jnp.asarray(value) for name, value in problem.data.items()}
    value = jax.jit(lambda x: problem.function(x, data, problem.shared)[0])
    gradient = jax.jit(jax.value_and_grad(lambda x: problem.function(x, data, problem.shared)[0]))
    start, bounds = np.full(problem.variables, 0.45), [(0.0, 1.0)] * problem.variables

    def three_starts():
        starts = np.tile(np.asarray([0.1, 0.45, 0.9])[:, None], (1, problem.variables))
        groups = [range(problem.variables - 1)]
        found = minimise_within(problem.function, starts, lanes(problem.data, 3), problem.shared, alike=groups)
        return float(found.value.min()), 3 * found.evaluations

    def scipys(method, with_gradient):
        def call(x):
            if not with_gradient:
                return float(value(jnp.asarray(x)))
            cost, slope = gradient(jnp.asarray(x))
            return float(cost), np.asarray(slope)

        def run():
            told = minimize(call, start, jac=with_gradient or None, method=method, bounds=bounds)
            return float(told.fun), int(told.nfev)

        return run

    def tpe():
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
        names = [f"x{i}" for i in range(problem.variables)]
        study.optimize(
            lambda trial: float(value(jnp.asarray([trial.suggest_float(name, 0, 1) for name in names]))),
            n_trials=TRIALS,
        )
        return study.best_value, TRIALS

    solvers = {
        "diffspec, three starts": three_starts,
        "scipy SLSQP, our gradients": scipys("SLSQP", True),
        "scipy L-BFGS-B, our gradients": scipys("L-BFGS-B", True),
        "scipy L-BFGS-B, differences": scipys("L-BFGS-B", False),
        "Optuna TPE": tpe,
    }
    times: dict[str, list[float]] = {name: [] for name in solvers}
    answers = {}
    for turn in range(3):
        for name, run in solvers.items():
            begin = time.perf_counter()
            answers[name] = run()
            if turn:  # the first turn compiles
                times[name].append(time.perf_counter() - begin)
    least = min(cost for cost, _ in answers.values())
    return {
        "variables": problem.variables,
        "solvers": {
            name: {
                "min_s": min(times[name]),
                "median_s": statistics.median(times[name]),
                "evaluations": count,
                "above_best": cost - least,
            }
            for name, (cost, count) in answers.items()
        },
    }


if __name__ == "__main__":
    names = ("optimistix", "optuna", "scipy", "jax")
    told = {"versions": {name: version(name) for name in names}, "equilibrium": equilibrium(), "decision": decision()}
    print("\n" + json.dumps(told))
