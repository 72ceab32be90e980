"""A decision as engine flags, ready to paste."""

import json
from typing import Any

VLLM_METHODS = ("ngram", "draft_model", "suffix", "eagle", "eagle3", "mtp", "dflash", "dspark")
"""Methods of vLLM's --speculative-config (0.33.0) that our method names or drafters can be told as."""


def vllm_flags(
    draft_length: int, schedule: list[list[int]], method: str | None, drafter: str | None
) -> dict[str, str | None]:
    """``vllm_static``: one draft length for all loads; ``vllm_dynamic``: the schedule over the batch (vLLM >= 0.33,
    ``num_speculative_tokens_per_batch_size``). None where speculation is best left off: serve without the flag."""
    base = speculative_config(method, drafter)
    static = None
    if draft_length > 0:
        static = speculative_flag(base | {"num_speculative_tokens": draft_length})
    longest = max(k for _, _, k in schedule)
    dynamic = None
    if longest > 0:
        tiers = {"num_speculative_tokens": longest, "num_speculative_tokens_per_batch_size": schedule}
        dynamic = speculative_flag(base | tiers)
    return {"vllm_static": static, "vllm_dynamic": dynamic}


def speculative_config(method: str | None, drafter: str | None) -> dict[str, Any]:
    """Method and drafter as vLLM's ``--speculative-config`` names them; DRAFTER where none is known."""
    base: dict[str, Any] = {}
    if method in VLLM_METHODS:
        base["method"] = method
    if method not in ("ngram", "suffix"):
        base["model"] = drafter or "DRAFTER"
    return base


def speculative_flag(config: dict[str, Any]) -> str:
    """The flag with its JSON, in shell quotes; a quote inside is written as the shell wants it."""
    text = json.dumps(config, separators=(",", ":")).replace("'", "'\\''")
    return f"--speculative-config '{text}'"
