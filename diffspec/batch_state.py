"""What one engine step works on and where its time goes: the words that step times and drafters speak."""

import equinox as eqx
import jax.numpy as jnp

from diffspec.parameters import Scalar


class BatchState(eqx.Module):
    """What one engine step works on; real-valued.

    * ``sequences``: sequences that decode in this step [req]
    * ``query_tokens``: tokens the verifier processes for them [tok]; sequences*(draft_length+1) for a chain
    * ``kv_tokens``: cached tokens that they attend to [tok]
    * ``prefill_tokens``: prompt tokens processed in this step [tok]
    * ``draft_passes``: sequential passes of the drafter [1]; 0 without a drafter
    * ``draft_tokens``: tokens the drafter emits [tok]
    """

    sequences: Scalar = 0.0
    query_tokens: Scalar = 0.0
    kv_tokens: Scalar = 0.0
    prefill_tokens: Scalar = 0.0
    draft_passes: Scalar = 0.0
    draft_tokens: Scalar = 0.0

    @classmethod
    def decoding(cls, sequences, drafted, context, draft_passes) -> "BatchState":
        """A step in which ``sequences`` [req] decode and no prompt is read: each has ``drafted`` tokens [tok] and the
        one after them verified, and attends to ``context`` tokens [tok].

        >>> state = BatchState.decoding(8.0, 3.0, 500.0, draft_passes=3.0)
        >>> state.query_tokens, state.kv_tokens, state.draft_tokens
        (32.0, 4000.0, 24.0)
        """
        return cls(
            sequences=sequences,
            query_tokens=sequences * (1.0 + drafted),
            kv_tokens=sequences * context,
            draft_passes=draft_passes,
            draft_tokens=sequences * drafted,
        )


class StepParts(eqx.Module):
    """Where the time of one step goes [s]; the step lasts their sum, :attr:`total`."""

    overhead: Scalar
    prefill: Scalar
    draft: Scalar
    verify: Scalar

    @property
    def total(self):
        """overhead + prefill + draft + verify [s]."""
        return self.overhead + self.prefill + self.draft + self.verify


def smooth_maximum(a, b, sharpness):
    """(a^s + b^s)^(1/s) for a > 0, b >= 0, computed relative to the larger, so that nothing over- or underflows."""
    high, low = jnp.maximum(a, b), jnp.minimum(a, b)
    ratio = jnp.maximum(low / high, jnp.finfo(jnp.result_type(float)).tiny)
    return high * jnp.exp(jnp.log1p(jnp.exp(sharpness * jnp.log(ratio))) / sharpness)
