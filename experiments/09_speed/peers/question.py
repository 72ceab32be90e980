"""What every peer is asked, and how each is timed: the standard library alone, for it runs in every environment.

The question: how long does one decode step of a Llama-like 8B model in bf16 on one H100 take, over ``batch`` sequences
that hold ``context`` cached tokens each; and how long its prefill of one prompt. Peers that have an efficiency get 1,
the data sheet. Prints one JSON object, on the last line.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence

MODEL = {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_size": 128, "ffn": 14336, "vocabulary": 128256}
"""meta-llama/Llama-3.1-8B."""
BANDWIDTH, FLOPS = 3.35e12, 989e12
"""NVIDIA H100 SXM, bf16, dense."""
BATCHES, CONTEXTS = (1, 8, 32, 64), (512, 2048, 4096)
DECODE = [(batch, context) for batch in BATCHES for context in CONTEXTS]
PREFILL = list(CONTEXTS)
LEAST_CALLS = 12
"""Timed calls at least, one of each decode step, however long they take."""


def since_start() -> float:
    """Seconds since this process was started, by whoever set STARTED."""
    return time.time() - float(os.environ.get("STARTED", "nan"))


def calls(decode: Callable[[int, int], float], seconds: float) -> dict[str, float]:
    """Seconds of one call of ``decode``, over all configurations in turn, one token longer every time: a peer that
    remembers its answers has to compute them."""
    times: list[float] = []
    until, passes = time.perf_counter() + seconds, 0
    while len(times) < LEAST_CALLS or time.perf_counter() < until:
        passes += 1
        for batch, context in DECODE:
            start = time.perf_counter()
            decode(batch, context + passes)
            times.append(time.perf_counter() - start)
    return {"min_s": min(times), "median_s": statistics.median(times), "calls": len(times)}


def repeated(call: Callable[[], object], seconds: float, least: int = 3) -> list[float]:
    """Seconds of each of as many calls as fit in ``seconds``."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def tell(
    version: str,
    imported_s: float,
    decode: Callable[[int, int], float],
    prefill: Callable[[int], float] | None,
    *,
    batched: Callable[[int], float] | None = None,
    sizes: Sequence[int] = (100_000,),
    seconds: float = 1.5,
    **more: Callable[[], object],
) -> None:
    """Time ``decode(batch, context)`` [s] and print all: cold (from the start of the process to the first answer,
    imports among it), warm, and ``batched(count)`` [s of one evaluation of so many configurations], where a peer can;
    ``more`` is asked last."""
    first_at = time.perf_counter()
    decode(*DECODE[0])
    found: dict[str, object] = {"version": version, "cold_s": since_start(), "import_s": imported_s}
    found["first_call_s"] = time.perf_counter() - first_at
    found["warm"] = calls(decode, seconds)
    found["batched"] = None
    if batched is not None:
        found["batched"] = [{"count": count, "s_per_configuration": batched(count) / count} for count in sizes]
    found["decode_s"] = [decode(*at) for at in DECODE]
    found["prefill_s"] = None if prefill is None else [prefill(prompt) for prompt in PREFILL]
    print("\n" + json.dumps(found | {name: ask() for name, ask in more.items()}))
