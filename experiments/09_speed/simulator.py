"""How fast the simulator is: sequence-steps per second, and time per customer beside a general queueing simulator.

    python experiments/09_speed/simulator.py [--out FILE]

Sequence-steps: a roofline server with draft length 4 at two loads, 32 replications side by side, CPU time of the whole
process (threads included) against the sequence-steps done. Time per customer: the same M/M/4 queue at load 0.9, in
turns, with `ciw` (Palmer et al., 2019) where it is installed (`pip install ciw`); the mean waits are printed too.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

from diffspec import AffineStepTime, DraftCost, RooflineStepTime, Workload  # noqa: E402
from diffspec.simulating import Engine, simulate  # noqa: E402

SERVER = RooflineStepTime(
    weight_read=6e-3, token_compute=4e-5, kv_read=6e-8, prefill_token=2e-5, draft=DraftCost(pass_base=5e-4)
)
QUEUE = AffineStepTime(verify_base=0.01, prefill_token=1e-9)
REPEATS, STEPS, CUSTOMERS, LOAD = 3, 51, 20000, 0.9


def sequence_steps(rate: float) -> dict[str, float]:
    """Sequence-steps per second of CPU time at an arrival rate, best of three."""
    engine = Engine(4, (0.8,) * 4, max_batch_size=256, max_batched_tokens=8192)
    load = Workload(500.0, 200.0, arrival_rate=rate)
    simulate(SERVER, load, engine, n_requests=20, replications=32)  # compiles
    best, found = np.inf, None
    for _ in range(REPEATS):
        start = time.process_time()
        found = simulate(SERVER, load, engine, n_requests=2000, replications=32)
        best = min(best, time.process_time() - start)
    assert found is not None
    told = found.summary()
    steps = 1.4 * told["sequence_steps"]  # warm-up and cool-down are simulated too, and not counted in the summary
    return {
        "arrival_rate": rate,
        "mean_batch": told["effective_batch_size"]["value"],
        "sequence_steps_per_second": steps / best,
        "microseconds_per_request": 1e6 * best / (1.4 * told["requests"]),
    }


def ours() -> tuple[float, float]:
    """(seconds per customer, mean wait [s]) of M/M/4 here."""
    service = 0.01 * STEPS
    load = Workload(1.0, float(STEPS), arrival_rate=LOAD * 4 / service)
    start = time.process_time()
    found = simulate(
        QUEUE, load, Engine(max_batch_size=4), n_requests=CUSTOMERS // 10, replications=10, output_law="geometric"
    )
    return (time.process_time() - start) / (1.4 * CUSTOMERS), found.mean("waiting").value


def theirs() -> tuple[float, float]:
    """The same of ciw."""
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    from ciw_peer import mm4

    start = time.process_time()
    customers, wait = mm4(0)
    return (time.process_time() - start) / customers, wait


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    results: dict = {"sequence_steps": [sequence_steps(rate) for rate in (4.0, 20.0)]}
    ours()  # compiles
    turns = []
    for _ in range(REPEATS):
        turn = {"diffspec": ours()}
        try:
            turn["ciw"] = theirs()
        except ImportError:
            print("ciw is not installed: no comparison")
        turns.append(turn)
    for name in turns[0]:
        best = min(turns, key=lambda turn, name=name: turn[name][0])[name]
        results[name] = {"microseconds_per_customer": 1e6 * best[0], "mean_wait": best[1]}
    if "ciw" in results:
        results["ratio"] = (
            results["ciw"]["microseconds_per_customer"] / results["diffspec"]["microseconds_per_customer"]
        )
    print(json.dumps(results, indent=1))
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
