# ruff: noqa: E402
"""A plain roofline loop in numpy: what LLM-Viewer computes (it is no package), operator by operator, one layer at a
time.

Each operator takes max(FLOP/peak, bytes/bandwidth), activations are not counted; one layer is summed and multiplied.
"""

import time

start = time.perf_counter()
import numpy as np
import question

imported = time.perf_counter() - start
m, BYTES = question.MODEL, 2.0
HEADS, KV = m["heads"] * m["head_size"], m["kv_heads"] * m["head_size"]
LINEAR = [(m["hidden"], HEADS), (m["hidden"], 2 * KV), (HEADS, m["hidden"]), (m["hidden"], 2 * m["ffn"])]
LINEAR += [(m["ffn"], m["hidden"])]


def operator(flops, moved):
    return np.maximum(flops / question.FLOPS, moved / question.BANDWIDTH)


def step(batch, context, queries, seen):
    """Seconds of one pass of ``queries`` tokens of each of ``batch`` sequences, each over ``seen`` of ``context``
    cached tokens; scalars or arrays."""
    tokens = batch * queries
    layer = sum(operator(2.0 * tokens * rows * columns, BYTES * rows * columns) for rows, columns in LINEAR)
    layer = layer + operator(4.0 * tokens * seen * HEADS, BYTES * batch * context * 2.0 * KV)
    head = operator(2.0 * batch * m["hidden"] * m["vocabulary"], BYTES * m["hidden"] * m["vocabulary"])
    return m["layers"] * layer + head


def decode(batch: int, context: int) -> float:
    return float(step(batch, context, 1.0, context))


def prefill(prompt: int) -> float:
    return float(step(1.0, prompt, prompt, 0.5 * prompt))


def batched(count: int) -> float:
    random = np.random.default_rng(0)
    batches, contexts = random.uniform(1, 64, count), random.uniform(512, 4096, count)
    return min(question.repeated(lambda: step(batches, contexts, 1.0, contexts), 1.0))


if __name__ == "__main__":
    question.tell(np.__version__, imported, decode, prefill, batched=batched, sizes=(1000, 100_000, 1_000_000))
