"""Imposed acceptance on vLLM's CPU backend: a vLLM plugin that fills in what its CPU kernels leave out.

vLLM can accept draft tokens at chosen rates (`rejection_sample_method: synthetic`) so that a plan is measured without
a trained drafter. Its GPU kernels do; its CPU kernels refuse ("Synthetic acceptance not supported with CPU sampling",
vLLM 0.32.0, vllm/utils/cpu_triton_utils.py). `register` puts the GPU kernels' walk in their place. Everything else,
standard rejection among it, is left as it is.

vLLM calls `register` in each of its processes, before a worker binds its kernels; serve.py announces it as an entry
point of the group `vllm.general_plugins`. The uniform draws are vLLM's own, from the generator that `--seed` seeds.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def emitted_tokens(
    draft: Sequence[int],
    uniform: Sequence[float],
    acceptance_rate: Sequence[float],
    on_rejection: Sequence[int],
    bonus: int,
) -> Iterator[int]:
    """Tokens that one request emits in one step.

    Walk the draft: keep token i while uniform[i] < acceptance_rate[i], a rate conditional on all tokens before having
    been accepted; else emit on_rejection[i], the target's own token, and stop. A draft accepted to its end is followed
    by the bonus token. A negative draft token is padding and never accepted.
    """
    for token, draw, rate, correction in zip(draft, uniform, acceptance_rate, on_rejection, strict=False):
        if token < 0 or draw >= rate:
            yield correction
            return
        yield token
    yield bonus


def accept_at_imposed_rates(
    output: Any, cumulative_drafts: Any, draft: Any, on_rejection: Any, bonus: Any, uniform: Any, rates: Any, mine: Any
) -> None:
    """Fill `output` [requests, longest draft + 1] in place, for the requests that the flags `mine` select (None: all).

    The tensors are those of vLLM's rejection kernels: the drafts of all requests one after another, with
    `cumulative_drafts` telling where each request's ends. Positions not emitted keep vLLM's placeholder.
    """
    draft, on_rejection, uniform, rates = draft.tolist(), on_rejection.tolist(), uniform.tolist(), rates.tolist()
    bonus, selected = bonus.flatten().tolist(), None if mine is None else mine.tolist()
    start = 0
    for request, end in enumerate(cumulative_drafts.tolist()):
        if selected is None or selected[request]:
            here = slice(start, end)
            tokens = list(emitted_tokens(draft[here], uniform[here], rates, on_rejection[here], bonus[request]))
            output[request, : len(tokens)] = output.new_tensor(tokens)
        start = end


def with_imposed_acceptance(kernel: Callable[..., None]) -> Callable[..., None]:
    """vLLM's CPU rejection kernel, but doing the walk above where it would refuse to accept at given rates."""
    signature = inspect.signature(kernel)

    @functools.wraps(kernel)  # keeps the signature, by which vLLM matches arguments
    def launch(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        if not given.get("SYNTHETIC_MODE"):
            return kernel(*args, **kwargs)
        greedy, samples = given["is_greedy"], "recovered_token_ids" in given  # one kernel for each kind of request
        accept_at_imposed_rates(
            given["output_token_ids"],
            given["cu_num_draft_tokens"],
            given["draft_token_ids"],
            given["recovered_token_ids" if samples else "target_argmax"],
            given["bonus_token_ids"],
            given["uniform_probs"],
            given["synthetic_conditional_rates"],
            ~greedy if samples else greedy,
        )

    return launch


def register() -> None:
    """Replace vLLM's two CPU rejection kernels, that of greedy requests and that of sampled ones, in this process."""
    from vllm.utils import cpu_triton_utils as kernels

    for name in ("_rejection_greedy_sample_kernel_impl", "_rejection_random_sample_kernel_impl"):
        setattr(kernels, name, with_imposed_acceptance(getattr(kernels, name)))
