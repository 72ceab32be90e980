"""What one request costs on a configuration whatever the load, and what the engine's token budget makes of it.

A step works on at most ``budget`` tokens: first those of decoding sequences, ``query_tokens`` each, then prompts, in
chunks. When prompts never cease, a request takes prompt_tokens + steps*query_tokens of the budgets, one step holds d of
them decoding, and the engine completes one request every prompt_service(d) seconds:

    d = steps*budget/(prompt_tokens + steps*query_tokens)
    prompt_steps(n) = prompt_tokens/(budget - n*query_tokens),  n <= d
    prompt_service(n) = prefill + prompt_steps(n)*min(d, 1)*step(max(n, 1))

A d below 1 is the share of chunks beside which anybody decodes: the others last their prefill alone. Derivation: ours;
judged by the simulator in tests/test_waiting.py and experiments/04.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffspec.acceptance import StepsForm, steps_per_request
from diffspec.configuration import Configuration
from diffspec.parameters import Scalar
from diffspec.step_time import AbstractStepTime, BatchState, scaled
from diffspec.workload import Workload, held_tokens

EachClass = Scalar | Float[Array, "classes"]
"""One number, or one for each class of requests."""


class RequestCost(eqx.Module):
    """What one request costs: ``prefill`` [s], ``steps`` [step] and their standard deviation ``spread``,
    ``tokens_per_step`` [tok], both ``moments``, ``step_parts(sequences)`` [s] (of sequences that hold another
    ``context`` [tok]: step_parts(sequences, context)), ``prompt_tokens`` [tok] to prefill, ``query_tokens`` [tok] that
    a sequence takes of a step, and ``budget`` [tok], None without one.

    Of several classes that share a server every number has an axis of classes, and ``share`` [classes] is each one's
    share of the requests (:mod:`diffspec.request_mix`); None where all requests are alike.
    """

    prefill: EachClass
    steps: EachClass
    tokens_per_step: EachClass
    spread: EachClass
    moments: tuple[EachClass, EachClass]
    step_parts: Callable = eqx.field(static=True)
    prompt_tokens: EachClass
    query_tokens: EachClass
    budget: Scalar | None = None
    share: Float[Array, "classes"] | None = None

    def mean(self, values):
        """Mean over all requests of a number of each class."""
        return values if self.share is None else self.share @ values

    @property
    def mix(self):
        """[classes] by Little's law, counted in steps: of the sequences in a step, the share of each class."""
        share: Any = self.share
        return share * self.steps / self.mean(self.steps)

    @property
    def met_prompt(self):
        """Prefill [s] of a prompt under way when a request comes: a long one is met more often, and of one in chunks
        only a chunk is."""
        if self.share is None:
            return self.prefill
        chunks = 1.0 if self.budget is None else jnp.maximum(self.prompt_tokens / self.budget, 1.0)
        return self.mean(self.prefill**2 / chunks) / jnp.maximum(self.mean(self.prefill), 1e-30)

    def foreign_prefill(self, own, others):
        """Prefill [s] of others' prompts that a request pays which is in service for ``own`` [s] without it and meets
        ``others`` [req].

        Prompts come evenly in time, so with rho the share of time that they take it is rho/(1-rho)*own; a request
        comes in the middle of a step, and what it pays there is the prompts met, not such as its own:
        own + (met_prompt - prefill)*(1/2 + rho)/(1 + rho) in place of own.
        """
        prompts = others * self.mean(self.prefill)
        if self.share is None:
            return prompts
        mean, odd = self.mean(own), self.met_prompt - self.prefill
        load = prompts / (prompts + mean)
        for _ in range(4):  # load = prompts/(prompts + mean + load*further), from above
            further = odd * (0.5 + load) / (1.0 + load)
            load = prompts / (prompts + mean + load * self.mean(further))
        return prompts * (own + further) / (mean + load * self.mean(further))

    @property
    def most_decoding(self):
        """Sequences [req] that decode in a step when prompts never cease; infinite without a budget."""
        steps = self.mean(self.steps)
        if self.budget is None:
            return jnp.full_like(steps, jnp.inf)
        tokens = self.mean(self.prompt_tokens + self.steps * self.query_tokens)
        return steps * self.budget / jnp.maximum(tokens, 1e-9)

    def prompt_steps(self, sequences):
        """Token budgets [step] that a prompt takes beside so many decoding sequences; 0 without a budget."""
        if self.budget is None:
            return jnp.zeros_like(sequences)
        query = self.mean(self.steps * self.query_tokens) / jnp.maximum(self.mean(self.steps), 1e-9)
        left = self.budget - jnp.minimum(sequences, self.most_decoding) * query
        return self.prompt_tokens / jnp.maximum(left, 1e-9 * self.budget)

    def chunks(self, sequences):
        """Steps [step] of others that a prompt shares beyond the first; the last one is hardly ever full."""
        further = jnp.maximum(self.prompt_steps(sequences) - 1.0, 0.0)
        return (further + jnp.minimum(further, 0.5)) * jnp.minimum(self.most_decoding, 1.0)

    def decoding(self, sequences, shared_chunks):
        """Sequences [req] that decode of those in service, which spend ``shared_chunks`` [step] in their chunks."""
        if self.budget is None:
            return sequences
        share = self.steps / jnp.maximum(self.steps + shared_chunks, 1e-9)
        return jnp.maximum(jnp.minimum(sequences * share, self.most_decoding), jnp.minimum(sequences, 1.0))

    def prompt_service(self, sequences):
        """Time [s] that a prompt takes of the engine's token budget beside so many decoding sequences."""
        beside = jnp.maximum(jnp.minimum(sequences, self.most_decoding), 1.0)
        shared = self.prompt_steps(sequences) * jnp.minimum(self.most_decoding, 1.0)
        return self.prefill + shared * self.step_parts(beside).total


def request_cost(
    step_time: AbstractStepTime, workload: Workload, config: Configuration, steps_form: StepsForm
) -> RequestCost:
    """Prefill, steps and step parts of one request of ``workload`` on ``config``."""
    step_time = scaled(step_time, verifier=config.verifier_scale, drafter=config.drafter_scale)
    length = jnp.asarray(config.draft_length, dtype=float)
    passes = drafted = length * config.draft_probability
    if config.acceptance is None:
        m1 = m2 = jnp.ones_like(length)
    else:
        m1, m2 = config.acceptance.moments(length, config.draft_probability)
        drafted = config.acceptance.drafted_tokens(length) * config.draft_probability
    prompt = jnp.asarray(workload.prompt_length, dtype=float)
    output = jnp.asarray(workload.output_length, dtype=float)
    held = held_tokens(prompt, output, workload.output_scv)

    def step_parts(sequences, context=held):
        return step_time(BatchState.decoding(sequences, drafted, context, passes))

    prefilled = prompt * (1.0 - workload.prefix_hit_rate)
    steps = steps_per_request(m1, m2, output, steps_form)
    variance = steps * (m2 - m1**2) / m1**2 + workload.output_scv * (output / m1) ** 2
    budget = config.max_batched_tokens
    return RequestCost(
        prefill=step_time(BatchState(prefill_tokens=prefilled, draft_passes=passes)).prefill,
        steps=steps,
        tokens_per_step=m1,
        spread=jnp.sqrt(variance + 1e-12),
        moments=(m1, m2),
        step_parts=step_parts,
        prompt_tokens=prefilled,
        query_tokens=1.0 + drafted,
        budget=None if budget is None else jnp.asarray(budget, dtype=float),
    )
