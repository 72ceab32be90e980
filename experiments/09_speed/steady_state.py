"""Speed of the equilibrium: 1e6 random systems by vmap, value alone and with gradients, beside a scipy brentq loop.

Run `python experiments/09_speed/steady_state.py`. Everything runs in one process; compile time, first call and
steady state are told apart; times are the minimum and the median of alternating repeats.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)

from scipy.optimize import brentq  # noqa: E402

from diffspec.results import RESULTS  # noqa: E402
from diffspec.steady_state import solve_open_loop  # noqa: E402
from diffspec.step_time import BatchState, RooflineStepTime  # noqa: E402

HERE = Path(__file__).resolve().parent


def random_systems(count: int, seed: int = 0) -> np.ndarray:
    """Columns: weight_read, token_compute, kv_read, sharpness, tokens per sequence, steps, prefill, utilization."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [
            10 ** rng.uniform(-3, -1, count),
            10 ** rng.uniform(-5, -3, count),
            10 ** rng.uniform(-8, -6, count),
            rng.uniform(1, 8, count),
            rng.integers(1, 9, count).astype(float),
            rng.uniform(20, 400, count),
            10 ** rng.uniform(-3, -1, count),
            rng.uniform(0.05, 0.99, count),
        ],
        axis=1,
    )


def residence(system, n):
    """Residence time of a roofline deployment over n requests, 1,000 tokens of context each."""
    weight, compute, kv, sharpness, query, steps, prefill, _ = system
    step = RooflineStepTime(weight_read=weight, token_compute=compute, kv_read=kv, sharpness=sharpness)
    return prefill * n + steps * step(BatchState(sequences=n, query_tokens=n * query, kv_tokens=1000.0 * n)).total


def solve(system, cap=256.0):
    """log residence time at the system's utilization, and whether it converged."""
    rate = jax.lax.stop_gradient(system[7] * cap / residence(system, cap))
    state = solve_open_loop(lambda n: residence(system, n), rate, max_batch_size=cap)
    return jnp.log(state.residence_time), (state.residual, state.result == RESULTS.successful)


def brentq_batch(system, cap=256.0) -> float:
    """The same equilibrium by scipy on plain floats."""
    weight, compute, kv, sharpness, query, steps, prefill, utilization = (float(x) for x in system)

    def time_in_service(n):
        memory, work = weight + kv * 1000.0 * n, compute * n * query
        return prefill * n + steps * (memory**sharpness + work**sharpness) ** (1.0 / sharpness)

    rate = utilization * cap / time_in_service(cap)
    return brentq(lambda b: b - rate * time_in_service(min(b + 1.0, cap)), 0.0, cap, xtol=1e-12, rtol=1e-13)


def timed(function, *arguments) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    systems = jnp.asarray(random_systems(options.systems))
    programs = {
        "value": lambda s: jax.vmap(solve)(s)[0],
        "value and gradient": lambda s: jax.vmap(jax.value_and_grad(lambda x: solve(x)[0]))(s),
    }
    report: dict = {"systems": options.systems, "machine": f"{platform.machine()}, {jax.devices()[0].platform}"}
    compiled = {}
    for name, program in programs.items():
        start = time.perf_counter()
        compiled[name] = jax.jit(program).lower(systems).compile()
        report[name] = {"compile_s": time.perf_counter() - start, "first_call_s": timed(compiled[name], systems)}
    times: dict[str, list[float]] = {name: [] for name in programs}
    loop: list[float] = []
    few = np.asarray(systems)[:: max(1, options.systems // 2000)][:2000]
    for _ in range(options.repeats):
        for name, program in compiled.items():
            times[name].append(timed(program, systems))
        start = time.perf_counter()
        batches = [brentq_batch(system) for system in few]
        loop.append((time.perf_counter() - start) / len(few))
    for name, values in times.items():
        report[name] |= {"min_s": min(values), "median_s": statistics.median(values)}
        report[name]["solves_per_s"] = options.systems / statistics.median(values)
    report["brentq_loop"] = {"min_s_per_solve": min(loop), "median_s_per_solve": statistics.median(loop)}
    value, gradient = (report[name]["median_s"] for name in programs)
    report["gradient_over_value"] = gradient / value
    report["speedup_over_brentq"] = report["brentq_loop"]["median_s_per_solve"] / (value / options.systems)
    residual, successful = jax.jit(lambda s: jax.vmap(solve)(s)[1])(systems)
    report["largest_residual"] = float(jnp.max(residual))
    report["successful"] = int(jnp.sum(successful))
    logs = np.asarray(jax.jit(jax.vmap(lambda s: solve(s)[0]))(jnp.asarray(few)))
    cap = 256.0
    rates = np.asarray(jax.vmap(lambda s: s[7] * cap / residence(s, cap))(jnp.asarray(few)))
    report["largest_difference_to_brentq"] = float(np.max(np.abs(np.exp(logs) * rates / np.asarray(batches) - 1.0)))
    print(json.dumps(report, indent=1))
    (options.out / "steady_state.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
