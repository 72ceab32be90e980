"""Drafters: what producing the draft adds to a step, for every way of drafting that engines know.

| drafter                                      | class                | draft time of a step                         |
|----------------------------------------------|----------------------|----------------------------------------------|
| fitted from a trace, whatever its kind       | :class:`DraftCost`   | affine in passes, sequences and cached tokens |
| draft model; autoregressive EAGLE or MTP head | :class:`DraftModel` | draft_passes serial passes, each a roofline  |
| parallel or block (MTP block, DFlash, PARD)  | :class:`BlockDrafter` | one pass over all tokens: nearly flat in k  |
| n-gram, suffix (prompt lookup)               | :class:`NgramDrafter` | a search on the CPU; it may abstain         |
| none                                         | :class:`NoDrafter`   | 0                                            |

Around any of them: :class:`WindowedDrafter` (sliding window or sparse KV cache), :class:`OverlappedDrafter` (drafts
while the verifier verifies), :class:`RemoteDrafter` (other hardware). A drafter of your own: docs/extending.md.
"""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp

from diffspec.batch_state import BatchState, smooth_maximum
from diffspec.parameters import Scalar, parameter
from diffspec.workload import check_range

CORNER = 8.0
"""Sharpness of a drafter's own roofline: within 9 % of the larger of memory and compute time."""


class AbstractDrafter(eqx.Module):
    """Interface of every drafter. For a scale-bounded step, each time may at most double when the batch doubles."""

    @abstractmethod
    def draft(self, state: BatchState, verify: Scalar = 0.0) -> Scalar:
        """Time [s] that drafting adds to the step over ``state`` whose verification takes ``verify`` [s]; 0 where
        ``state.draft_passes`` is 0. Most drafters run before the verifier and ignore ``verify``."""

    @abstractmethod
    def prefill(self, state: BatchState) -> Scalar:
        """Time [s] that the drafter adds to the prefill of ``state.prefill_tokens``; 0 where draft_passes is 0."""

    @abstractmethod
    def scaled(self, ratio: Scalar) -> "AbstractDrafter":
        """The drafter of ``ratio`` times the parameters: draft time is about linear in them within a model family."""


class DraftCost(AbstractDrafter):
    """draft_passes*(pass_base + pass_sequence*sequences + pass_kv*kv_tokens) + block_base + block_sequence*sequences.

    The general form that is fitted. The last two terms count once a step whenever there is a drafter: a block drafter
    (MTP block, DFlash, DSpark, PARD) has them alone, since its time hardly depends on draft_length. ``prefill_token``
    is the drafter's own prefill.
    """

    pass_base: Scalar = parameter(0.0, unit="s", meaning="one draft pass, whatever the batch")
    pass_sequence: Scalar = parameter(0.0, unit="s/req", meaning="one draft pass, for each sequence")
    pass_kv: Scalar = parameter(0.0, unit="s/tok", meaning="one draft pass, for each cached token")
    block_base: Scalar = parameter(0.0, unit="s", meaning="drafting once a step, whatever batch and draft length")
    block_sequence: Scalar = parameter(0.0, unit="s/req", meaning="drafting once a step, for each sequence")
    prefill_token: Scalar = parameter(0.0, unit="s/tok", meaning="drafter prefill, for each prompt token")

    def __check_init__(self):
        _check_costs(self)

    def draft(self, state: BatchState, verify: Scalar = 0.0):
        """Drafting time of one step [s]; zero without a drafter, so k = 0 and k -> 0+ differ by the block terms."""
        per_pass = self.pass_base + self.pass_sequence * state.sequences + self.pass_kv * state.kv_tokens
        once = self.block_base + self.block_sequence * state.sequences
        return state.draft_passes * per_pass + _where_drafting(state, once)

    def prefill(self, state: BatchState):
        """Prefill time of the drafter [s]."""
        return _where_drafting(state, self.prefill_token * state.prefill_tokens)

    def scaled(self, ratio) -> "DraftCost":
        """Every cost times ``ratio``: draft time is about linear in drafter parameters within a model family."""
        return jax.tree.map(lambda cost: cost * ratio, self)


class DraftModel(AbstractDrafter):
    """A drafter that proposes one token a pass: draft_passes*(pass_overhead + max(memory, compute)), smoothly.

    * memory = weight_read + kv_read*kv_tokens: the drafter's own weights and its own KV cache, read in every pass
    * compute = token_compute*draft_tokens/draft_passes, the tokens that one pass emits (one for each sequence in a
      chain, a level of candidates in a tree)

    A draft model of its own has a prefill_token; for an EAGLE-like or MTP head, weight_read is that of its layer and
    the vocabulary projection, kv_read that of one layer. ``scaled`` scales everything: KV and launches follow depth.

    >>> head = DraftModel(pass_overhead=1e-4, weight_read=4e-4)
    >>> round(float(head.draft(BatchState(sequences=8.0, draft_passes=3.0, draft_tokens=24.0))), 6)
    0.0015
    """

    pass_overhead: Scalar = parameter(0.0, unit="s", meaning="one draft pass's launches and sampling")
    weight_read: Scalar = parameter(0.0, unit="s", meaning="reading the drafter's weights, each pass")
    token_compute: Scalar = parameter(0.0, unit="s/tok", meaning="computing one drafted token")
    kv_read: Scalar = parameter(0.0, unit="s/tok", meaning="reading one cached token of the drafter, each pass")
    prefill_token: Scalar = parameter(0.0, unit="s/tok", meaning="drafter prefill, for each prompt token")

    def __check_init__(self):
        _check_costs(self)

    def draft(self, state: BatchState, verify: Scalar = 0.0):
        passes = jnp.asarray(state.draft_passes, dtype=float)
        width = state.draft_tokens / jnp.where(passes > 0, passes, 1.0)
        memory = self.weight_read + self.kv_read * state.kv_tokens
        return passes * (self.pass_overhead + _roofline(memory, self.token_compute * width))

    def prefill(self, state: BatchState):
        return _where_drafting(state, self.prefill_token * state.prefill_tokens)

    def scaled(self, ratio) -> "DraftModel":
        return jax.tree.map(lambda cost: cost * ratio, self)


class BlockDrafter(AbstractDrafter):
    """A drafter that proposes all tokens in one pass: overhead + max(weight_read + kv_read*kv_tokens, token_compute*
    draft_tokens), smoothly; nearly flat in draft length until the pass is compute-bound.

    >>> block = BlockDrafter(overhead=2e-4, weight_read=1e-3, token_compute=1e-6)
    >>> [round(float(block.draft(BatchState(draft_passes=k, draft_tokens=k))), 6) for k in (1.0, 8.0)]
    [0.0012, 0.0012]
    """

    overhead: Scalar = parameter(0.0, unit="s", meaning="one block's launches and sampling")
    weight_read: Scalar = parameter(0.0, unit="s", meaning="reading the drafter's weights, once a step")
    token_compute: Scalar = parameter(0.0, unit="s/tok", meaning="computing one drafted token")
    kv_read: Scalar = parameter(0.0, unit="s/tok", meaning="reading one cached token of the drafter, once a step")
    prefill_token: Scalar = parameter(0.0, unit="s/tok", meaning="drafter prefill, for each prompt token")

    def __check_init__(self):
        _check_costs(self)

    def draft(self, state: BatchState, verify: Scalar = 0.0):
        memory = self.weight_read + self.kv_read * state.kv_tokens
        return _where_drafting(state, self.overhead + _roofline(memory, self.token_compute * state.draft_tokens))

    def prefill(self, state: BatchState):
        return _where_drafting(state, self.prefill_token * state.prefill_tokens)

    def scaled(self, ratio) -> "BlockDrafter":
        return jax.tree.map(lambda cost: cost * ratio, self)


class NgramDrafter(AbstractDrafter):
    """A search for the last tokens in prompt and answer: lookup_base + lookup_sequence*sequences, once a step, on the
    CPU. No weights, cache or prefill. It finds nothing in a share of steps: set ``Configuration.draft_probability``;
    the search is paid all the same.

    >>> round(float(NgramDrafter(5e-5, 1e-5).draft(BatchState(sequences=16.0, draft_passes=0.7))), 6)
    0.00021
    """

    lookup_base: Scalar = parameter(0.0, unit="s", meaning="one search over the batch, whatever its size")
    lookup_sequence: Scalar = parameter(0.0, unit="s/req", meaning="the search for one sequence")

    def __check_init__(self):
        _check_costs(self)

    def draft(self, state: BatchState, verify: Scalar = 0.0):
        return _where_drafting(state, self.lookup_base + self.lookup_sequence * state.sequences)

    def prefill(self, state: BatchState):
        return jnp.zeros_like(jnp.asarray(state.prefill_tokens, dtype=float))

    def scaled(self, ratio) -> "NgramDrafter":
        """Unchanged: it has no parameters."""
        return self


class NoDrafter(AbstractDrafter):
    """No drafter: no time. Use it with draft_length 0, or for drafts that come from elsewhere for nothing."""

    def draft(self, state: BatchState, verify: Scalar = 0.0):
        return jnp.zeros_like(jnp.asarray(state.draft_passes, dtype=float))

    def prefill(self, state: BatchState):
        return jnp.zeros_like(jnp.asarray(state.prefill_tokens, dtype=float))

    def scaled(self, ratio) -> "NoDrafter":
        return self


class WindowedDrafter(AbstractDrafter):
    """``inner`` with a KV budget: it attends to min(context, kv_window) tokens of each sequence (StreamingLLM, SnapKV).

    kv_tokens becomes min(kv_tokens, sequences*kv_window), context being the mean. With a long context the drafter then
    gets cheap beside the verifier as the batch grows: speedup rises with load (MagicDec, arXiv 2408.11049).

    >>> inner = DraftModel(kv_read=1e-9)
    >>> state = BatchState(sequences=32.0, kv_tokens=32 * 32000.0, draft_passes=1.0, draft_tokens=32.0)
    >>> round(float(inner.draft(state) / WindowedDrafter(inner, 512.0).draft(state)), 6)
    62.5
    """

    inner: AbstractDrafter
    kv_window: Scalar

    def __check_init__(self):
        check_range("kv_window", self.kv_window, 0, 1e9, low_open=True, unit="tok")

    def draft(self, state: BatchState, verify: Scalar = 0.0):
        kept = jnp.minimum(state.kv_tokens, state.sequences * self.kv_window)
        return self.inner.draft(eqx.tree_at(lambda s: s.kv_tokens, state, kept), verify)

    def prefill(self, state: BatchState):
        return self.inner.prefill(state)

    def scaled(self, ratio) -> "WindowedDrafter":
        return WindowedDrafter(self.inner.scaled(ratio), self.kv_window)


class OverlappedDrafter(AbstractDrafter):
    """``inner`` drafts while the verifier works on the draft before (PEARL, arXiv 2408.11850; asynchronous drafting).

    In a share ``overlap`` of steps the draft was made during verification and is still right: such a step lasts
    max(verify, draft). In the others the verifier emitted something else than the drafter went on from; the draft is
    made again, in view: verify + draft. So the mean added time is overlap*max(draft - verify, 0) + (1-overlap)*draft.
    A drafter that goes on from its own draft is right only where all of it was accepted: overlap <= S_k (marginal
    acceptance of the last position), times the chance that it also guessed the bonus token; one that prepares a draft
    for several outcomes hides more. Assumes hardware of its own (:class:`RemoteDrafter`) or idle units beside the
    verifier: no slowing of the verifier is charged. Prefill is not hidden.

    >>> drafter = OverlappedDrafter(DraftCost(pass_base=1e-3), overlap=0.5)
    >>> round(float(drafter.draft(BatchState(draft_passes=4.0), verify=3e-3)), 6)
    0.0025
    """

    inner: AbstractDrafter
    overlap: Scalar = parameter(0.5, unit="1", low=0.0, high=1.0, meaning="share of steps whose draft was ready")

    def __check_init__(self):
        check_range("overlap", self.overlap, 0, 1, low_open=False, unit="(share of steps)")

    def draft(self, state: BatchState, verify: Scalar = 0.0):
        alone = self.inner.draft(state, 0.0)
        return self.overlap * jnp.maximum(alone - verify, 0.0) + (1.0 - self.overlap) * alone

    def prefill(self, state: BatchState):
        return self.inner.prefill(state)

    def scaled(self, ratio) -> "OverlappedDrafter":
        return OverlappedDrafter(self.inner.scaled(ratio), self.overlap)


class RemoteDrafter(AbstractDrafter):
    """``inner`` on other hardware: every step also pays transfer_latency + transfer_token*(draft_tokens + sequences).

    ``transfer_latency``: there and back; the drafts come over and one verified token for each sequence goes back.
    Where the verifier samples, the drafter's probabilities travel too: then transfer_token is a vocabulary's worth of
    bytes over the bandwidth. The drafter's prefill runs beside the verifier's and is assumed shorter: no time.

    >>> remote = RemoteDrafter(DraftCost(pass_base=1e-3), transfer_latency=5e-4)
    >>> round(float(remote.draft(BatchState(sequences=8.0, draft_passes=4.0, draft_tokens=32.0))), 6)
    0.0045
    """

    inner: AbstractDrafter
    transfer_latency: Scalar = parameter(0.0, unit="s", meaning="one round trip between drafter and verifier")
    transfer_token: Scalar = parameter(0.0, unit="s/tok", meaning="sending one token, with what verification needs")

    def __check_init__(self):
        _check_costs(self)

    def draft(self, state: BatchState, verify: Scalar = 0.0):
        trip = self.transfer_latency + self.transfer_token * (state.draft_tokens + state.sequences)
        return self.inner.draft(state, verify) + _where_drafting(state, trip)

    def prefill(self, state: BatchState):
        return jnp.zeros_like(jnp.asarray(state.prefill_tokens, dtype=float))

    def scaled(self, ratio) -> "RemoteDrafter":
        return RemoteDrafter(self.inner.scaled(ratio), self.transfer_latency, self.transfer_token)


def _where_drafting(state: BatchState, time):
    return jnp.where(jnp.asarray(state.draft_passes) > 0, time, 0.0)


def _roofline(memory, compute):
    """The larger of both times, smoothly; 0 where both are."""
    memory, compute = jnp.asarray(memory, dtype=float), jnp.asarray(compute, dtype=float)
    idle = jnp.maximum(memory, compute) <= 0
    return jnp.where(idle, 0.0, smooth_maximum(jnp.where(idle, 1.0, memory), jnp.where(idle, 1.0, compute), CORNER))


def _check_costs(drafter: AbstractDrafter) -> None:
    for name, value in vars(drafter).items():
        if isinstance(value, AbstractDrafter):
            continue
        unit = "s/tok" if name.endswith(("_token", "_compute", "kv_read")) else "s"
        check_range(name, value, 0, 1e6, low_open=False, unit=unit)
