"""What engines accept as a schedule over the batch, and which draft length they then take: validators of exports.

Written from the engines' sources (no code of theirs): vLLM ``vllm/v1/spec_decode/dynamic/utils.py``
(``num_speculative_tokens_per_batch_size``, PR #32374), SGLang ``srt/speculative/adaptive_spec_params.py``,
``adaptive_step_router.py`` and ``dspark_components/dspark_sps.py``, TensorRT-LLM ``llmapi/llm_args.py`` and
``_torch/speculative`` (``draft_len_schedule``, PR #8194; the other way round since PR #10860). Each raises
:class:`InputError` for what its engine refuses.
"""

import bisect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from diffspec.results import InputError

CANDIDATE_KEYS = ("candidate_steps", "ema_alpha", "update_interval", "warmup_batches", "up_hysteresis")
CANDIDATE_KEYS += ("down_hysteresis", "ceiling_coeff")


def _refuse(what: str, got: Any, allowed: str) -> None:
    raise InputError(f"{what}: got {got}; allowed: {allowed}")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def vllm_draft_lengths(config: Mapping[str, Any], max_num_seqs: int) -> list[int]:
    """Draft lengths at batches 1..``max_num_seqs`` by vLLM's ``--speculative-config``.

    ``num_speculative_tokens`` >= 1; entries [first, last, K] with 1 <= first <= last and K >= 0, not overlapping, the
    first from batch 1; gaps and batches beyond the last entry have the K before them; K is at most
    num_speculative_tokens.

    >>> config = {"num_speculative_tokens": 3, "num_speculative_tokens_per_batch_size": [[1, 2, 5], [4, 5, 0]]}
    >>> vllm_draft_lengths(config, 6)
    [3, 3, 3, 0, 0, 0]
    """
    most = config.get("num_speculative_tokens")
    if not _whole(most, 1):
        _refuse("num_speculative_tokens", most, "a whole number from 1")
    assert isinstance(most, int)
    entries = config.get("num_speculative_tokens_per_batch_size", [[1, 1, most]])
    name = "num_speculative_tokens_per_batch_size"
    if not isinstance(entries, list) or not entries:
        _refuse(name, entries, "a list of [first, last, K]")
    for entry in entries:
        if len(entry) != 3 or not (_whole(entry[0], 1) and _whole(entry[1], entry[0]) and _whole(entry[2], 0)):
            _refuse(name, entry, "[first, last, K] with 1 <= first <= last and K >= 0, whole numbers")
    ordered = sorted(entries)
    if ordered[0][0] != 1 or any(after[0] <= before[1] for before, after in pairwise(ordered)):
        _refuse(name, entries, "entries that do not overlap, the first from batch 1")
    starts = [first for first, _, _ in ordered]
    at = (ordered[bisect.bisect_right(starts, batch) - 1][2] for batch in range(1, max_num_seqs + 1))
    return [min(most, length) for length in at]


def sglang_slots(config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The slots of SGLang's ``--speculative-adaptive-config``, by their smallest batch.

    Keys of digits are batches, others settings for all slots; ``candidate_steps`` is a list of whole numbers >= 0.

    >>> sglang_slots({"1": {"candidate_steps": [0, 3]}, "ema_alpha": 0.2})[1]["candidate_steps"]
    [0, 3]
    """
    slots = {}
    for key, entry in config.items():
        if not str(key).isdigit():
            if key not in (*CANDIDATE_KEYS, "strategy"):
                _refuse("speculative_adaptive_config", repr(key), f"a batch, or {', '.join(CANDIDATE_KEYS)}")
            continue
        steps = entry.get("candidate_steps") if isinstance(entry, Mapping) else None
        if not isinstance(steps, list) or not steps or not all(_whole(step, 0) for step in steps):
            _refuse(f"batch {key}: candidate_steps", steps, "a list of whole numbers from 0")
        unknown = set(entry) - set(CANDIDATE_KEYS)
        if unknown:
            _refuse(f"batch {key}", sorted(unknown), ", ".join(CANDIDATE_KEYS))
        slots[int(key)] = dict(entry)
    if 1 not in slots:
        _refuse("speculative_adaptive_config", sorted(slots), "batches from 1: smaller ones would take the first slot")
    return slots


def sglang_steps(config: Mapping[str, Any], batch: int, accepted: float, steps: int) -> int:
    """The draft length that SGLang goes on with in a slot: from ``steps``, once its average of ``accepted`` drafts
    [tok] is steady. It goes down one candidate while accepted <= candidate below - 0.5 (0.5 for a candidate 0) +
    down_hysteresis, otherwise up while accepted > candidate - 0.5 + up_hysteresis; from 0 it tries the next one.

    >>> slots = {"1": {"candidate_steps": [0, 3], "down_hysteresis": 0.2}}
    >>> [sglang_steps(slots, 8, accepted, 3) for accepted in (0.69, 0.71)]
    [0, 3]
    """
    slots = sglang_slots(config)
    entry = slots[max(start for start in slots if start <= batch)]
    candidates = sorted(set(entry["candidate_steps"]))
    place = candidates.index(steps) if steps in candidates else len(candidates) // 2
    if candidates[place] == 0:
        return candidates[min(place + 1, len(candidates) - 1)]
    start = place
    while place > 0:
        below = candidates[place - 1]
        if accepted > max(below, 1) - 0.5 + entry.get("down_hysteresis", config.get("down_hysteresis", -0.25)):
            break
        place -= 1
    while place == start and place + 1 < len(candidates):
        if accepted <= candidates[place] - 0.5 + entry.get("up_hysteresis", config.get("up_hysteresis", 0.0)):
            break
        place, start = place + 1, start + 1
    return candidates[place]


def dspark_step_time(table: Mapping[str, Any], requests: int, budget: int) -> float:
    """Step time [s] that SGLang's DSpark planner reads from a cost table for ``requests`` and ``budget`` tokens beside.

    Either ``sample_batch_tokens`` (increasing) with ``sample_steps_per_sec``, read at the last probe that is not above
    requests + budget, and ``max_batch_tokens`` no less than the last probe; or ``bias_seconds`` > 0 plus two tables,
    ``alpha_seconds`` over ``bs_probes`` and ``theta_seconds`` over ``m_probes``, joined linearly.

    >>> table = {"sample_batch_tokens": [1, 8], "sample_steps_per_sec": [100.0, 50.0], "max_batch_tokens": 8}
    >>> dspark_step_time(table, 4, 3), dspark_step_time(table, 4, 4)
    (0.01, 0.02)
    """
    if "bias_seconds" in table:
        _same_keys(table, ("bias_seconds", "bs_probes", "alpha_seconds", "m_probes", "theta_seconds"))
        if not table["bias_seconds"] > 0:
            _refuse("bias_seconds", table["bias_seconds"], "more than 0 s")
        parts = (("bs_probes", "alpha_seconds", requests), ("m_probes", "theta_seconds", requests + budget))
        return table["bias_seconds"] + sum(_joined(table, *part) for part in parts)
    _same_keys(table, ("sample_batch_tokens", "sample_steps_per_sec", "max_batch_tokens"))
    probes = _increasing(table, "sample_batch_tokens", "sample_steps_per_sec")
    if table["max_batch_tokens"] < probes[-1]:
        _refuse("max_batch_tokens", table["max_batch_tokens"], f"at least the largest probe, {probes[-1]}")
    place = max(bisect.bisect_right(probes, requests + budget) - 1, 0)
    return 1.0 / table["sample_steps_per_sec"][place]


def _same_keys(table: Mapping[str, Any], keys: Sequence[str]) -> None:
    if set(table) != set(keys):
        _refuse("cost table", sorted(table), ", ".join(keys))


def _increasing(table: Mapping[str, Any], probes: str, values: str) -> list[int]:
    found = table[probes]
    if not found or not all(_whole(probe, 1) for probe in found) or any(b <= a for a, b in pairwise(found)):
        _refuse(probes, found, "increasing whole numbers from 1")
    if len(found) != len(table[values]):
        _refuse(values, len(table[values]), f"{len(found)} values, one a probe")
    return list(found)


def _joined(table: Mapping[str, Any], probes: str, values: str, at: float) -> float:
    xs, ys = _increasing(table, probes, values), table[values]
    place = min(max(bisect.bisect_right(xs, at), 1), len(xs) - 1)
    if at <= xs[0] or at >= xs[-1]:
        return ys[0] if at <= xs[0] else ys[-1]
    share = (at - xs[place - 1]) / (xs[place] - xs[place - 1])
    return ys[place - 1] + share * (ys[place] - ys[place - 1])


def tensorrt_llm_draft_length(
    schedule: Mapping[int, int], max_draft_len: int, batch: int, *, upper_bounds: bool
) -> int:
    """The draft length at a batch by TensorRT-LLM's ``draft_len_schedule``.

    With ``upper_bounds`` a key is the last batch of its draft length, and batches above all keys draft nothing;
    otherwise it is the first one, and batch 1 must be a key. Either way the smallest key has max_draft_len.

    >>> [tensorrt_llm_draft_length({4: 4, 8: 2}, 4, batch, upper_bounds=True) for batch in (4, 5, 9)]
    [4, 2, 0]
    >>> [tensorrt_llm_draft_length({1: 4, 4: 2, 8: 0}, 4, batch, upper_bounds=False) for batch in (3, 4, 9)]
    [4, 2, 0]
    """
    name = "draft_len_schedule"
    if not schedule or not all(_whole(key, 1) and _whole(length, 0) for key, length in schedule.items()):
        _refuse(name, dict(schedule), "batches from 1 with draft lengths from 0, whole numbers")
    keys = sorted(schedule)
    if not upper_bounds and keys[0] != 1:
        _refuse(name, dict(schedule), "batch 1 among the keys")
    if schedule[keys[0]] != max_draft_len or max(schedule.values()) > max_draft_len:
        _refuse(name, dict(schedule), f"max_draft_len ({max_draft_len}) at the smallest key, and no more elsewhere")
    if not upper_bounds:
        return schedule[keys[bisect.bisect_right(keys, batch) - 1]]
    place = bisect.bisect_left(keys, batch)
    return schedule[keys[place]] if place < len(keys) else 0
