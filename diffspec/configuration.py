"""What an engineer chooses: draft length, the acceptance it meets, and the engine's caps."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from diffspec.acceptance import MAX_DRAFT_LENGTH, AbstractAcceptance
from diffspec.parameters import Scalar
from diffspec.results import InputError
from diffspec.workload import Workload, check_range


class Configuration(eqx.Module):
    """What an engineer chooses: ``draft_length`` [tok] (0: no speculation), the acceptance it meets, and the caps.

    * ``acceptance``: needed when draft_length > 0; ``draft_probability`` [1]: share of steps that draft
    * ``max_batch_size`` [req]: None for no cap; ``kv_capacity_tokens`` [tok]: caps the batch at
      kv_capacity_tokens/(prompt_length + output_length*(1 + output_scv)/2), the mean tokens of a running request
    * ``max_batched_tokens`` [tok]: token budget of one step; longer prompts are prefilled in chunks, each in a step
    * ``verifier_scale``, ``drafter_scale`` [1]: parameter counts relative to the fitted deployment
    """

    draft_length: Scalar = 0.0
    acceptance: AbstractAcceptance | None = None
    max_batch_size: Scalar | None = None
    kv_capacity_tokens: Scalar | None = None
    max_batched_tokens: Scalar | None = None
    draft_probability: Scalar = 1.0
    verifier_scale: Scalar = 1.0
    drafter_scale: Scalar = 1.0

    def __check_init__(self):
        check_range("draft_length", self.draft_length, 0, MAX_DRAFT_LENGTH, low_open=False, unit="tok")
        check_range("max_batch_size", self.max_batch_size, 1, 1e9, low_open=False, unit="req")
        check_range("kv_capacity_tokens", self.kv_capacity_tokens, 0, 1e15, low_open=True, unit="tok")
        check_range("max_batched_tokens", self.max_batched_tokens, 1, 1e12, low_open=False, unit="tok")
        check_range("draft_probability", self.draft_probability, 0, 1, low_open=False, unit="")
        check_range("drafter_scale", self.drafter_scale, 0, 1e6, low_open=True, unit="(ratio of parameter counts)")
        check_range("verifier_scale", self.verifier_scale, 0, 1e6, low_open=True, unit="(ratio of parameter counts)")
        if isinstance(self.acceptance, int | float):
            wanted = f"ConstantAcceptance({self.acceptance!r})"
            raise InputError(f"acceptance: got {self.acceptance!r}; allowed: an acceptance, such as {wanted}")
        if self.acceptance is None and not (isinstance(self.draft_length, (int, float)) and self.draft_length == 0):
            raise InputError("draft_length > 0 needs an acceptance: ConstantAcceptance or PositionAcceptance, say")

    def plain(self) -> "Configuration":
        """The same server without speculation (draft_length 0)."""
        return Configuration(
            max_batch_size=self.max_batch_size,
            kv_capacity_tokens=self.kv_capacity_tokens,
            max_batched_tokens=self.max_batched_tokens,
            verifier_scale=self.verifier_scale,
        )


def batch_cap(workload: Workload, config: Configuration):
    """Largest batch in service [req]: the smaller of max_batch_size and the KV cache over a request's mean tokens
    (never below 1); None without caps."""
    caps: list[Any] = []
    if config.max_batch_size is not None:
        caps.append(jnp.asarray(config.max_batch_size, dtype=float))
    if config.kv_capacity_tokens is not None:
        caps.append(jnp.maximum(config.kv_capacity_tokens / workload.held_tokens, 1.0))
    return None if not caps else caps[0] if len(caps) == 1 else jnp.minimum(caps[0], caps[1])
