"""A decision as engine flags, ready to paste."""

import json

VLLM_METHODS = ("ngram", "draft_model", "suffix", "eagle", "eagle3", "mtp", "dflash", "dspark")
"""Methods of vLLM's --speculative-config (0.33.0) that our method names or drafters can be told as."""


def vllm_flags(
    draft_length: int, schedule: list[list[int]], method: str | None, drafter: str | None
) -> dict[str, str | None]:
    """``vllm_static``: one draft length for all loads; ``vllm_dynamic``: the schedule over the batch (vLLM >= 0.33,
    ``num_speculative_tokens_per_batch_size``). None where speculation is best left off: serve without the flag."""
    base: dict[str, object] = {}
    if method in VLLM_METHODS:
        base["method"] = method
    if method not in ("ngram", "suffix"):
        base["model"] = drafter or "DRAFTER"
    static = None
    if draft_length > 0:
        static = _flag(base | {"num_speculative_tokens": draft_length})
    longest = max(k for _, _, k in schedule)
    dynamic = None
    if longest > 0:
        dynamic = _flag(base | {"num_speculative_tokens": longest, "num_speculative_tokens_per_batch_size": schedule})
    return {"vllm_static": static, "vllm_dynamic": dynamic}


def _flag(config: dict[str, object]) -> str:
    return f"--speculative-config '{json.dumps(config, separators=(',', ':'))}'"
