"""Duration of one engine step: BatchState -> StepParts. Knows nothing of arrival rates, lengths or acceptance.

The simulator, mixed workloads, trees and calibration samples all speak this one interface. A step time is *scale
bounded* when its elasticity in the batch is at most 1 (doubling the batch at most doubles the step): then the
equilibrium is unique and saturation is decided exactly (see :mod:`diffspec.steady_state`).
"""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp

from diffspec.batch_state import BatchState, StepParts, smooth_maximum
from diffspec.drafters import AbstractDrafter, DraftCost
from diffspec.experts import CoverageTable, ExpertRouting
from diffspec.parameters import Scalar, parameter

__all__ = [
    "AbstractStepTime",
    "AffineStepTime",
    "BatchState",
    "DraftCost",
    "ExpertCost",
    "RooflineStepTime",
    "StepParts",
    "scaled",
    "smooth_maximum",
]


class AbstractStepTime(eqx.Module):
    """Interface of every step time. Implement ``__call__`` and say whether it is scale bounded.

    A form of your own with ``scale_bounded = False`` is scanned for its smallest equilibrium instead of bracketed.
    """

    scale_bounded: eqx.AbstractVar[bool]

    @abstractmethod
    def __call__(self, state: BatchState) -> StepParts:
        """Duration of the step that works on ``state``, by part [s]."""


class ExpertCost(eqx.Module):
    """Extra verification of a mixture of experts: weight_read*coverage(T) + sequence*coverage(T)*sequences.

    T = sequences + token_share*(query_tokens - sequences) + token_share*prefill_tokens: neighbouring draft tokens share
    experts, so they count less than independent ones (token_share = 1). ``sequence`` is the published load-dependent
    coverage term (arXiv 2605.15051, Eq 4: C2s); it breaks the scale bound and is off (0) in fits.
    """

    routing: ExpertRouting | CoverageTable
    weight_read: Scalar = parameter(0.0, unit="s", meaning="reading every expert's weights once")
    token_share: Scalar = parameter(
        0.8, unit="1", low=0.0, high=1.0, meaning="independent tokens that one more token of a sequence counts as"
    )
    sequence: Scalar = 0.0

    def effective_tokens(self, state: BatchState):
        """T [tok], the number of independently routed tokens in the step."""
        return state.sequences + self.token_share * (state.query_tokens - state.sequences + state.prefill_tokens)

    def verify(self, state: BatchState):
        """Expert part of verification [s]."""
        coverage = self.routing.coverage(self.effective_tokens(state))
        return coverage * (self.weight_read + self.sequence * state.sequences)


class AffineStepTime(AbstractStepTime):
    """Linear in every load: verify = base + sequence*n + query*query_tokens + kv*kv_tokens (+ experts).

    Contains the published model (arXiv 2605.15051, Eq 3): ci_verify = (verify_base, verify_sequence), ci_draft =
    (draft.pass_base, draft.pass_sequence). Times in s, tokens in tok. Launch overhead and weight reads are one number
    here (verify_base): an affine form cannot tell them apart.

    >>> step = AffineStepTime(verify_base=0.01, verify_query=1e-4)
    >>> round(float(step(BatchState(sequences=8.0, query_tokens=40.0)).total), 6)
    0.014
    """

    verify_base: Scalar = parameter(unit="s", meaning="one verification, whatever the batch (weights, launches)")
    verify_sequence: Scalar = parameter(0.0, unit="s/req", meaning="verification, for each sequence")
    verify_query: Scalar = parameter(0.0, unit="s/tok", meaning="verification, for each verified token")
    verify_kv: Scalar = parameter(0.0, unit="s/tok", meaning="verification, for each cached token")
    prefill_token: Scalar = parameter(0.0, unit="s/tok", meaning="verifier prefill, for each prompt token")
    draft: AbstractDrafter = DraftCost()
    experts: ExpertCost | None = None
    scale_bounded: bool = eqx.field(static=True, default=True)

    def __call__(self, state: BatchState) -> StepParts:
        imbalance = 1.0 if self.experts is None else self.experts.routing.load_imbalance()
        verify = (
            self.verify_base
            + self.verify_sequence * state.sequences
            + self.verify_query * imbalance * state.query_tokens
            + self.verify_kv * state.kv_tokens
        )
        if self.experts is not None:
            verify = verify + self.experts.verify(state)
        return StepParts(
            overhead=jnp.zeros_like(verify),
            prefill=self.prefill_token * state.prefill_tokens + self.draft.prefill(state),
            draft=self.draft.draft(state, verify),
            verify=verify,
        )


class RooflineStepTime(AbstractStepTime):
    """Verification as a smooth roofline: verify = (memory^s + compute^s)^(1/s), sharpness s >= 1.

    * memory = weight_read + expert reads (coverage) + kv_read*kv_tokens
    * compute = token_compute*T/sqrt(1 + T*inefficiency), T = query_tokens: inefficiency > 0 says that few tokens cost
      more each than many (small matrices run inefficiently); load imbalance over expert ranks multiplies T's cost
    * overhead = step_overhead + sequence_overhead*sequences, outside the roofline (launches, scheduling, sampling)

    s = 1 is the sum of both sides, s -> inf their maximum; the p-norm is scale-free (doubling all times doubles it).
    Elasticity in the batch <= 1: each side's is, and the p-norm averages them.

    >>> step = RooflineStepTime(weight_read=0.01, token_compute=1e-4, sharpness=8.0)
    >>> round(float(step(BatchState(sequences=1.0, query_tokens=1.0)).total), 4)
    0.01
    """

    weight_read: Scalar = parameter(unit="s", meaning="reading the verifier's shared weights")
    token_compute: Scalar = parameter(unit="s/tok", meaning="computing one verified token")
    kv_read: Scalar = parameter(0.0, unit="s/tok", meaning="reading one cached token")
    inefficiency: Scalar = parameter(0.0, unit="1/tok", meaning="how much more the first tokens cost")
    sharpness: Scalar = parameter(2.0, unit="1", low=1.0, high=12.0, meaning="roofline corner: 1 sum, large maximum")
    step_overhead: Scalar = parameter(0.0, unit="s", meaning="one step's launch, scheduling and sampling")
    sequence_overhead: Scalar = parameter(0.0, unit="s/req", meaning="the same, for each sequence")
    prefill_token: Scalar = parameter(0.0, unit="s/tok", meaning="verifier prefill, for each prompt token")
    draft: AbstractDrafter = DraftCost()
    experts: ExpertCost | None = None
    scale_bounded: bool = eqx.field(static=True, default=True)

    def __call__(self, state: BatchState) -> StepParts:
        memory = self.weight_read + self.kv_read * state.kv_tokens
        compute = self.token_compute * state.query_tokens / jnp.sqrt(1.0 + self.inefficiency * state.query_tokens)
        if self.experts is not None:
            memory = memory + self.experts.verify(state)
            compute = compute * self.experts.routing.load_imbalance()
        verify = smooth_maximum(memory, compute, self.sharpness)
        return StepParts(
            overhead=self.step_overhead + self.sequence_overhead * state.sequences,
            prefill=self.prefill_token * state.prefill_tokens + self.draft.prefill(state),
            draft=self.draft.draft(state, verify),
            verify=verify,
        )


def scaled(step_time, *, verifier: Scalar = 1.0, drafter: Scalar = 1.0):
    """A step time for models of other sizes: verifier costs times ``verifier``, drafter costs times ``drafter``.

    The ratios are parameter counts over those of the fitted deployment. About linear within one model family only
    (arXiv 2605.15051): drafting latency follows depth, and overheads that do not scale are not scaled. In a form of
    your own, attributes of the same names scale: verify_base, verify_query, weight_read, token_compute, prefill_token,
    and a drafter in ``draft``; a form that wraps another one in ``inner`` scales that.
    """
    if hasattr(step_time, "inner"):
        inner = scaled(step_time.inner, verifier=verifier, drafter=drafter)
        return eqx.tree_at(lambda s: s.inner, step_time, inner)
    per_weight = ("verify_base", "verify_query", "weight_read", "token_compute", "prefill_token")
    names = [name for name in per_weight if hasattr(step_time, name)]
    if hasattr(step_time, "draft"):
        step_time = eqx.tree_at(lambda s: s.draft, step_time, step_time.draft.scaled(drafter))
    if not names:
        return step_time
    values = [getattr(step_time, name) * verifier for name in names]
    return eqx.tree_at(lambda s: [getattr(s, name) for name in names], step_time, values)
