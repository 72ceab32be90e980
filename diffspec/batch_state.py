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
