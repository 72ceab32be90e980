"""How far the batched equilibrium is from this machine's limit: a fused elementwise loop that evaluates as many
transcendental functions and does nothing else.

    python experiments/09_speed/limit.py

The limit is measured, not looked up: one program that reads one number a system, applies exp and log in turn (of values
that stay near 1) as often as the equilibrium's own program does, and writes one number. Functions are counted in the
traced program, loops as often as they run (XLA's cost analysis counts the body of a loop once); a power counts as one
exp and one log. All are compiled alike and run in turns, in float64 and in float32 (in jax without 64-bit types: with
them, plain numbers in the model make everything float64), the equilibrium three ways: whole (`jax.vmap`), in chunks
that stay in a cache (`chunked_vmap` on one device: one core), and in chunks on as many devices as there are cores.
Writes limit.json beside itself.
"""

import argparse
import json
import os
import platform
import statistics
from pathlib import Path

import jax

CORES = len(os.sched_getaffinity(0))
jax.config.update("jax_num_cpu_devices", CORES)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from steady_state import random_systems, solve, timed  # noqa: E402

from diffspec.chunks import chunked_vmap  # noqa: E402

HERE = Path(__file__).resolve().parent
ONE = {"value": lambda x: solve(x)[0], "value and gradient": jax.value_and_grad(lambda x: solve(x)[0])}
PROGRAMS = {name: jax.vmap(one) for name, one in ONE.items()}


COUNTED = {"exp": 1, "log": 1, "log1p": 1, "expm1": 1, "exp2": 1, "tanh": 1, "logistic": 1, "pow": 2}


def counted(jaxpr) -> int:
    """Transcendental functions of one system in a traced program."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += COUNTED.get(equation.primitive.name, 0)
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda part: hasattr(part, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * counted(inner)
    return total


def transcendentals(count: int):
    """A program of ``count`` exps and logs a system, in turn; each keeps values between 1 and 3."""

    def program(x):
        def pair(_, x):
            return jnp.log(jnp.exp(x) + 0.5)

        return jax.lax.fori_loop(0, count // 2, pair, x)

    return program


def measured(numbers: np.ndarray, repeats: int) -> list[dict]:
    """Each program on systems of one type, in turns with the limit."""
    systems, found = jnp.asarray(numbers), []
    for name, program in PROGRAMS.items():
        ways = {
            "whole": program,
            "chunks": chunked_vmap(ONE[name], devices=jax.devices()[:1]),
            "devices": chunked_vmap(ONE[name]),
        }
        calls = {way: jax.jit(many).lower(systems).compile() for way, many in ways.items()}
        functions = counted(jax.make_jaxpr(program)(systems).jaxpr)
        least = jax.jit(transcendentals(2 * round(functions / 2))).lower(systems[:, 0]).compile()
        turns = []
        for _ in range(repeats + 1):
            turns.append([timed(least, 1.0 + systems[:, 7]), *(timed(call, systems) for call in calls.values())])
        limit, *seconds = (statistics.median(column) for column in zip(*turns[1:], strict=True))
        entry = {"program": name, "dtype": numbers.dtype.name, "transcendentals": functions, "limit_s": limit}
        for way, taken in zip(ways, seconds, strict=True):
            entry[way] = {"seconds": taken, "solves_per_s": len(systems) / taken, "times_the_limit": taken / limit}
        found.append(entry)
        print(json.dumps(entry), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    answer: dict = {
        "machine": f"{CORES} virtual CPU cores, {platform.machine()}",
        "load_before": os.getloadavg()[0],
        "systems": asked.systems,
        "programs": [],
    }
    for kind in (np.float64, np.float32):
        with jax.enable_x64(kind is np.float64):
            answer["programs"] += measured(random_systems(asked.systems).astype(kind), asked.repeats)
    exact = jax.jit(PROGRAMS["value"])(jnp.asarray(random_systems(asked.systems)))
    with jax.enable_x64(False):
        single = jax.jit(PROGRAMS["value"])(random_systems(asked.systems).astype(np.float32))
    off = np.abs(np.expm1(np.asarray(single, dtype=float) - np.asarray(exact)))
    answer["float32_error"] = {"median": float(np.median(off)), "largest": float(off.max())}
    (HERE / "limit.json").write_text(json.dumps(answer, indent=1) + "\n")
    print(json.dumps(answer["float32_error"]))


if __name__ == "__main__":
    main()
