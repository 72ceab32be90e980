# ruff: noqa: E402
"""GenZ (`genz-llm`): `decode_moddeling` and `prefill_moddeling`, its own Llama-3.1-8B and H100."""

import time

start = time.perf_counter()
from importlib.metadata import version

import question
from GenZ import decode_moddeling, prefill_moddeling

imported = time.perf_counter() - start
ASKED = {"model": "llama3_8b", "system_name": "H100_GPU", "bits": "bf16", "system_eff": 1.0}


def decode(batch: int, context: int) -> float:
    found = decode_moddeling(batch_size=batch, input_tokens=context, output_tokens=0, Bb=1, **ASKED)
    return float(found["Latency"]) / 1e3


def prefill(prompt: int) -> float:
    return float(prefill_moddeling(batch_size=1, input_tokens=prompt, **ASKED)["Latency"]) / 1e3


if __name__ == "__main__":
    question.tell(version("genz-llm"), imported, decode, prefill)
