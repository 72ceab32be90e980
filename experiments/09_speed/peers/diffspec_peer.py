# ruff: noqa: E402
"""diffspec before any trace: `FirstPrinciples` of the same model on the same device, with every peak reached (IDEAL),
as the peers have it; the answers at its own priors beside. And what no peer answers: the whole prediction under load
(the equilibrium, the wait for a place) of the same server with speculation, with its gradient by every cost."""

import time

start = time.perf_counter()
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax

jax.config.update("jax_enable_x64", True)
import dataclasses
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import question

from diffspec.acceptance import ConstantAcceptance
from diffspec.architecture import read_architecture
from diffspec.batch_state import BatchState
from diffspec.configuration import Configuration
from diffspec.first_principles import IDEAL, FirstPrinciples
from diffspec.hardware import accelerator
from diffspec.serving import ServingModel
from diffspec.workload import Workload

imported = time.perf_counter() - start
CONFIGS = Path(__file__).resolve().parents[3] / "data" / "configs"
VERIFIER, DRAFTER = (read_architecture(CONFIGS / name) for name in ("llama-3.1-8b.json", "llama-3.2-1b.json"))


def pair(prompt, drafter=None) -> FirstPrinciples:
    return FirstPrinciples(VERIFIER, accelerator("h100"), drafter, prompt_length=prompt, output_length=1.0)


def step(efficiency):
    costs = jax.tree.map(jnp.asarray, pair(1024.0).step_time(efficiency))

    @jax.jit
    def decode(batch, context):
        return costs(BatchState.decoding(batch, 0.0, context, draft_passes=0.0)).total

    return decode


def prompt_time(prompt: float, efficiency=None) -> float:
    """The step that carries one prompt, on an idle server: without the front end."""
    at = pair(float(prompt))
    costs = at.step_time(efficiency)
    return float(costs.step_overhead + costs.weight_read + costs.prefill_token * prompt)


IDEAL_STEP = step(IDEAL)


def decode(batch: int, context: int) -> float:
    return float(IDEAL_STEP(float(batch), float(context)))


def configurations(count: int):
    random = np.random.default_rng(0)
    return jnp.asarray(random.uniform(1, 64, count)), jnp.asarray(random.uniform(512, 4096, count))


def batched(count: int) -> float:
    asked, many = configurations(count), jax.jit(jax.vmap(IDEAL_STEP))
    many(*asked).block_until_ready()
    return min(question.repeated(lambda: many(*asked).block_until_ready(), 1.0))


def at_priors() -> dict:
    """The same answers at the efficiencies that engines usually reach."""
    priors = step(None)
    decode_s = [float(priors(float(batch), float(context))) for batch, context in question.DECODE]
    return {"decode_s": decode_s, "prefill_s": [prompt_time(prompt) for prompt in question.PREFILL]}


def under_load() -> dict:
    """Seconds of a whole prediction (8B and 1B, draft length 4, 64 places, a load that is served) and of its gradient
    by all costs, one at a time and 10,000 side by side."""
    costs = jax.tree.map(jnp.asarray, pair(1024.0, DRAFTER).step_time())
    serving = dataclasses.replace(ServingModel(costs), waiting_states=64)

    def e2e(serving, rate):
        load = Workload(1024.0, 256.0, arrival_rate=rate)
        config = Configuration(4.0, ConstantAcceptance(0.7), max_batch_size=64.0)
        return jnp.log(serving.predict(load, config).e2e_latency)

    rates, found = jnp.linspace(1.0, 15.0, 10_000), {}
    for name, function in (("value", e2e), ("value and gradient", jax.value_and_grad(e2e))):
        one, many = jax.jit(function), jax.jit(jax.vmap(function, (None, 0)))
        for program, argument in ((one, rates[0]), (many, rates)):
            jax.block_until_ready(program(serving, argument))
        alone = min(question.repeated(lambda one=one: jax.block_until_ready(one(serving, rates[0])), 0.5))
        together = min(question.repeated(lambda many=many: jax.block_until_ready(many(serving, rates)), 0.5))
        found[name] = {"min_s": alone, "s_per_configuration_of_10000": together / rates.size}
    return found


if __name__ == "__main__":
    question.tell(
        version("diffspec"),
        imported,
        decode,
        lambda prompt: prompt_time(prompt, IDEAL),
        batched=batched,
        sizes=(1000, 100_000, 1_000_000),
        at_priors=at_priors,
        under_load=under_load,
    )
