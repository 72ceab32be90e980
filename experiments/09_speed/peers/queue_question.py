"""The two queues that simulators are asked about, and how each is timed; the standard library alone.

*M/M/4* at load 0.9: seconds of CPU time per customer, and the mean wait. *Batch server*: an engine that gives all
decoding sequences one step at a time (draft length 4, acceptance 0.8), at 20 req/s, prompts of 500 and outputs of 200
tokens: sequence-steps per second of CPU time, and the mean latency. Both with Poisson arrivals.
"""

import json
import random
import time
from collections.abc import Callable

SERVERS, LOAD, SERVICE, CUSTOMERS = 4, 0.9, 0.51, 20_000
RATE, PROMPT, OUTPUT, DRAFT, ACCEPTANCE, PLACES, REQUESTS = 20.0, 500, 200, 4, 0.8, 256, 2000
ARRIVALS = LOAD * SERVERS / SERVICE
REPEATS = 3


def step_time(sequences: int, cached: int, prefill: int) -> float:
    """Seconds of one engine step: the roofline of ../simulator.py, written out."""
    memory, compute = 6e-3 + 6e-8 * cached, 4e-5 * sequences * (1 + DRAFT)
    verify = (memory**2 + compute**2) ** 0.5 if sequences else 6e-3
    return verify + DRAFT * 5e-4 + 2e-5 * prefill


def accepted() -> int:
    """Drafted tokens accepted by one sequence in one step."""
    count = 0
    while count < DRAFT and random.random() < ACCEPTANCE:
        count += 1
    return count


def least(call: Callable[[int], tuple[float, float]], work: float) -> dict[str, float]:
    """CPU seconds per unit of ``work``, least of the repeats, and the mean over them of what was measured."""
    times, values = [], []
    for seed in range(REPEATS):
        start = time.process_time()
        done, value = call(seed)
        times.append((time.process_time() - start) / (done or work))
        values.append(value)
    return {"s_each": min(times), "mean": sum(values) / len(values)}


def tell(version: str, **asked: dict[str, float]) -> None:
    print("\n" + json.dumps({"version": version} | asked))
