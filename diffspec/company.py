"""What a request meets along its service: its own pace by the number in service, and the company of all requests."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffspec.acceptance import steps_per_request
from diffspec.lengths import Lengths
from diffspec.parameters import Scalar

_SMALL = 1e-12


class Pace(eqx.Module):
    """What one request costs, by the number n = 1..states in service, itself included.

    * ``residence[n-1]`` [s]: time in service; ``step[n-1]`` [s]: the engine step
    * ``prefill`` [s]: of its own prompt; ``overhead`` [s]: outside the engine
    * ``steps`` [step] of a request of mean length; ``tokens_per_step`` [tok] and its second moment ``tokens_square``;
      ``tokens_pmf[j]``: P(j + 1 tokens in a step), None where only the moments are known
    * ``first_steps`` [step]: others' steps that a prompt shares in a busy engine; half as many pass before it begins;
      ``chunk_steps[n-1]`` [step]: further steps that a prompt of several chunks shares
    """

    residence: Float[Array, "states"]
    step: Float[Array, "states"]
    prefill: Scalar
    overhead: Scalar
    steps: Scalar
    tokens_per_step: Scalar
    tokens_square: Scalar
    first_steps: Scalar
    chunk_steps: Float[Array, "states"]
    tokens_pmf: Float[Array, "tokens"] | None = None


class StepsLaw(eqx.Module):
    """``steps`` [step] of each representative length of ``tokens`` [tok], with its ``share`` of the requests, and the
    variance ``by_acceptance`` [step^2] around it."""

    tokens: Float[Array, "bins"]
    steps: Float[Array, "bins"]
    by_acceptance: Float[Array, "bins"]
    share: Float[Array, "bins"]

    @property
    def square(self) -> Scalar:
        """Second moment [step^2] of the steps of a request."""
        return self.share @ (self.steps**2 + self.by_acceptance)


class Company(eqx.Module):
    """All requests together, by the number n = 1..states in service.

    * ``residence[n-1]`` [s]: mean time in service; ``step[n-1]`` [s]: a step that an arrival meets
    * ``arrival_rate`` [req/s] of all; ``foreign`` [s]: what others pay for a prompt, E[f^2]/E[f]; ``prompt_rate``
      [1/s]: of such prompts; ``chunk_steps[n-1]`` [step]: further steps of such a prompt
    * ``steps`` [step] of all with their ``share``; ``service_scv``: of the time in service at the cap
    * ``prefill`` [s]: mean; ``prompt_service[n-1]`` [s]: mean, of what a prompt takes of the token budget (None without
      a budget), and its ``prompt_service_square``: the second moment over the mean squared
    """

    residence: Float[Array, "states"]
    step: Float[Array, "states"]
    arrival_rate: Scalar
    foreign: Scalar
    prompt_rate: Scalar
    chunk_steps: Float[Array, "states"]
    steps: Float[Array, "bins"]
    share: Float[Array, "bins"]
    service_scv: Scalar
    prefill: Scalar
    prompt_service: Float[Array, "states"] | None = None
    prompt_service_square: Scalar = 1.0


def steps_law(pace: Pace, output_length: Scalar, lengths: Lengths) -> StepsLaw:
    """How many steps a request takes whose output length is drawn from ``lengths`` around ``output_length`` [tok]."""
    tokens = jnp.maximum(output_length * lengths.relative, 1.0)
    m1, m2 = pace.tokens_per_step, pace.tokens_square
    count = jax.vmap(lambda length: steps_per_request(m1, m2, length))(tokens)
    count = jnp.maximum(count, jnp.minimum(tokens - 1.0, 1.0))  # whole steps: a second token takes one
    steps = count * pace.steps / jnp.maximum(lengths.share @ count, _SMALL)
    by_acceptance = jnp.maximum(tokens - 2.0, 0.0) * (m2 - m1**2) / m1**3
    return StepsLaw(tokens, steps, by_acceptance, lengths.share)
