"""A policy in the form that an engine reads, for the versions whose rules are known, checked by those rules.

| export | for | what |
|---|---|---|
| ``vllm`` | 0.33 | ``--speculative-config``: one draft length, and ``num_speculative_tokens_per_batch_size`` |
| ``sglang`` | 0.5.23 | ``--speculative-adaptive-config`` and the flags that go with it |
| ``sglang-dspark`` | 0.5.23 | step-cost tables of the DSpark planner, both forms |
| ``tensorrt-llm`` | 1.2, 1.4 (must be said) | ``draft_len_schedule``: its keys changed sides between these releases |
| ``json`` | | the answer |
| ``python`` | | a look-up with hysteresis and fallback, without any import |

What an engine cannot express is said in ``notes``: bands where it has no memory, context lengths. The tests also ask
the engines' own parsers, where their Python files are on the path (an unpacked wheel is enough): vLLM 0.33.0 and SGLang
0.5.23 took all that is written. TensorRT-LLM's wheels are not on the package index: the validator and the look-up of
its published sources were asked, of either way round.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from diffspec.optimizing.dspark import dspark_tables
from diffspec.optimizing.engine_rules import (
    dspark_step_time,
    sglang_slots,
    sglang_steps,
    tensorrt_llm_draft_length,
    vllm_draft_lengths,
)
from diffspec.optimizing.flags import speculative_config, speculative_flag
from diffspec.optimizing.lookup import lookup_source
from diffspec.results import InputError, NoResultError

EXPORTS = ("vllm", "sglang", "sglang-dspark", "tensorrt-llm", "json", "python")
FLIPPED = (
    "draft_len_schedule: keys are first batches, with batch 1 among them, in 1.2 (PR #8194), and last batches, with no "
    "drafts above them, in 1.4 (PR #10860, merged 2026-03-13); 1.3 changed sides among its release candidates"
)
VERSIONS: dict[str, dict[str, str]] = {
    "vllm": {"0.33": "num_speculative_tokens_per_batch_size, a list of [first, last, K] (PR #32374)"},
    "sglang": {"0.5.23": "--speculative-adaptive-config, batches as smallest ones"},
    "sglang-dspark": {"0.5.23": "--speculative-dspark-sps-table-path"},
    "tensorrt-llm": {"1.2": FLIPPED, "1.4": FLIPPED},
}
"""Engine -> release -> what is known of it; the first of vLLM and SGLang is the default."""
SGLANG_ALGORITHMS = {"eagle": "EAGLE", "eagle3": "EAGLE3", "mtp": "EAGLE"}
TENSORRT_TYPES = {"eagle": "Eagle3", "eagle3": "Eagle3", "mtp": "MTP", "draft_model": "DraftTarget", "ngram": "NGram"}


class Export(NamedTuple):
    """``text`` of one ``file``; ``flag``: how the engine is told of it, None where it is best served without;
    ``notes``: what it cannot express, one line each."""

    engine: str
    version: str | None
    context_length: float | None
    file: str
    text: str
    flag: str | None
    notes: list[str]


def check_version(engine: str, version: str | None) -> str | None:
    """The release of ``engine`` whose rules hold for ``version``; the default where none is given.

    Errors: :class:`InputError` for an unknown export, an unknown version, or TensorRT-LLM without one.

    >>> check_version("vllm", "0.33.0"), check_version("sglang", None), check_version("json", None)
    ('0.33', '0.5.23', None)
    """
    if engine not in EXPORTS:
        raise InputError(f"export: got {engine!r}; allowed: {', '.join(EXPORTS)}")
    if engine not in VERSIONS:
        return None
    known = VERSIONS[engine]
    told = "; ".join(f"{release}: {what}" for release, what in known.items())
    if version is None and engine == "tensorrt-llm":
        raise InputError(f"--engine-version is needed for tensorrt-llm: {FLIPPED}")
    for release in known:
        if version is None or version == release or version.startswith((f"{release}.", f"{release}rc")):
            return release
    raise InputError(f"engine version: got {version!r} for {engine}; known: {told}")


def export(
    engine: str, answer: Mapping[str, Any], subject: Mapping[str, Any], version: str | None = None
) -> list[Export]:
    """The files of one export, one for each context length where the engine has none of its own.

    ``answer``: what :func:`diffspec.optimizing.load_policy.policy` returned; ``subject``: ``method``, ``drafter`` and,
    for step-cost tables, ``step_time(draft_length, sequences, query_tokens, context)`` [s] of the deployment.

    Errors: as :func:`check_version`; :class:`NoResultError` where the engine cannot be told this schedule.
    """
    release = check_version(engine, version)
    if not answer["contexts"]:
        raise NoResultError("there is no schedule to export")
    if engine == "json":
        return [Export("json", None, None, "policy.json", json.dumps(answer, indent=1) + "\n", None, [])]
    if engine == "python":
        return [Export("python", None, None, "draft_length.py", lookup_source(answer), None, [])]
    make = {"vllm": _vllm, "sglang": _sglang, "sglang-dspark": _dspark, "tensorrt-llm": _tensorrt_llm}[engine]
    files = []
    for context in answer["contexts"]:
        files += make(answer, context, subject, str(release))
    if len(answer["contexts"]) > 1:
        note = f"{engine} {release} has no context length in its schedule: serve the file of the usual one"
        files = [made._replace(notes=[*made.notes, note]) for made in files]
    return files


def _name(stem: str, context: Mapping[str, Any], ending: str) -> str:
    length = context["context_length"]
    return f"{stem}.{ending}" if length is None else f"{stem}_context_{length:g}.{ending}"


def _schedule(context: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    return [(int(first), int(last), int(length)) for first, last, length in context["schedule"]]


def _agrees(engine: str, context: Mapping[str, Any], length_at: Callable[[int], int]) -> None:
    """Raise unless the engine, by its rules, takes the schedule's own draft length at every batch."""
    for first, last, length in _schedule(context):
        for batch in range(first, last + 1):
            if length_at(batch) != length:
                raise NoResultError(
                    f"{engine} would take {length_at(batch)} at batch {batch}, the schedule has {length}"
                )


def _memoryless(context: Mapping[str, Any]) -> list[str]:
    wide = [band for band in context["bands"] if band["up"] > band["threshold"] or band["down"] <= band["threshold"]]
    if not wide:
        return []
    told = ", ".join(f"{band['down']} to {band['up']}" for band in wide)
    return [f"no memory of the last batch: the bands ({told}) are not in it; the python export has them"]


def _vllm(answer, context, subject, release: str) -> list[Export]:
    schedule, method, drafter = _schedule(context), subject.get("method"), subject.get("drafter")
    if not any(length for *_, length in schedule):
        text = json.dumps({}) + "\n"
        notes = ["speculation is best left off: serve without --speculative-config"]
        name = _name("vllm_speculative_config", context, "json")
        return [Export("vllm", release, context["context_length"], name, text, None, notes)]
    longest = max(length for *_, length in schedule)
    config = speculative_config(method, drafter) | {"num_speculative_tokens": longest}
    if len(schedule) > 1:
        config["num_speculative_tokens_per_batch_size"] = [list(entry) for entry in schedule]
    lengths = vllm_draft_lengths(config, context["batches"])
    _agrees("vllm", context, lambda batch: lengths[batch - 1])
    notes = []
    if len(schedule) > 1:
        notes = ["vLLM ignores the schedule with data parallelism", *_memoryless(context)]
    made = []
    static = context["static_draft_length"]
    for stem, one in (
        ("vllm_speculative_config", config),
        ("vllm_static", speculative_config(method, drafter) | {"num_speculative_tokens": static}),
    ):
        if one["num_speculative_tokens"] == 0:
            continue
        vllm_draft_lengths(one, context["batches"])
        text = json.dumps(one, indent=1) + "\n"
        flag = speculative_flag(one)
        name = _name(stem, context, "json")
        made.append(Export("vllm", release, context["context_length"], name, text, flag, notes))
        notes = ["one draft length for all batches, the best at these loads"]
    return made


def _sglang(answer, context, subject, release: str) -> list[Export]:
    schedule, slots, notes = _schedule(context), {}, []
    for tier, (first, _, length) in zip(context["tiers"], schedule, strict=True):
        slot: dict[str, Any] = {"candidate_steps": [length], "up_hysteresis": 0.0, "down_hysteresis": 0.0}
        least = tier["breakeven_tokens_per_step"]
        if length > 0 and least is not None and not answer["forbid_zero"]:
            slot = {"candidate_steps": [0, length], "up_hysteresis": 0.0, "down_hysteresis": round(least - 1.5, 4)}
        slots[str(first)] = slot | {"ceiling_coeff": 0}
    config = {**slots, "ema_alpha": 0.2, "update_interval": 5, "warmup_batches": 10}
    found = sglang_slots(config)
    assert len(found) == len(schedule)
    _agrees("sglang", context, lambda batch: sglang_steps(config, batch, 32.0, _settled(config, batch)))
    if not any(length for *_, length in schedule):
        notes.append("speculation is best left off: serve without --speculative-algorithm")
    method = subject.get("method")
    algorithm = SGLANG_ALGORITHMS.get(method or "", "EAGLE3")
    if method not in SGLANG_ALGORITHMS:
        notes.append(
            f"SGLang adapts EAGLE and EAGLE3 with topk 1 only; this drafter's method is {method or 'not known'}"
        )
    if any(len(entry["candidate_steps"]) > 1 for entry in found.values()):
        notes.append("each slot falls back to 0 where fewer drafts are accepted than break even, and tries again")
    notes += _memoryless(context)
    name, longest = _name("sglang_adaptive", context, "json"), max(length for *_, length in schedule)
    flag = None
    if longest > 0:
        flag = (
            f"--speculative-algorithm {algorithm} --speculative-num-steps {longest} --speculative-eagle-topk 1 "
            f"--speculative-num-draft-tokens {longest + 1} --speculative-adaptive --speculative-adaptive-config {name}"
        )
    text = json.dumps(config, indent=1) + "\n"
    return [Export("sglang", release, context["context_length"], name, text, flag, notes)]


def _settled(config: Mapping[str, Any], batch: int) -> int:
    slots = sglang_slots(config)
    return max(slots[max(first for first in slots if first <= batch)]["candidate_steps"])


def _dspark(answer, context, subject, release: str) -> list[Export]:
    longest = max(length for *_, length in _schedule(context))
    if longest == 0:
        raise NoResultError("speculation is best left off: there is no step with drafts to tell the cost of")
    diagonal, additive, error = dspark_tables(
        subject["step_time"], longest, context["batches"], context["cached_tokens"]
    )
    made = []
    for stem, table, notes in (
        ("sglang_dspark", diagonal, [f"the costs of full drafts of {longest} at each number of tokens"]),
        (
            "sglang_dspark_additive",
            additive,
            [f"the additive form is at most {100 * error:.1f} % off the model's step"],
        ),
    ):
        dspark_step_time(table, 1, longest)
        name = _name(stem, context, "json")
        flag = f"--speculative-algorithm DSPARK --speculative-dspark-sps-table-path {name}"
        text = json.dumps(table) + "\n"
        made.append(Export("sglang-dspark", release, context["context_length"], name, text, flag, notes))
    return made


def _tensorrt_llm(answer, context, subject, release: str) -> list[Export]:
    schedule, upper = _schedule(context), release == "1.4"
    name = _name("tensorrt_llm", context, "yaml")
    longest = max(length for *_, length in schedule)
    if longest == 0:
        text, notes = "{}\n", ["speculation is best left off: serve without speculative_config"]
        return [Export("tensorrt-llm", release, context["context_length"], name, text, None, notes)]
    if schedule[0][2] != longest:
        raise NoResultError(
            f"TensorRT-LLM wants the longest draft ({longest}) at the smallest batches, where this schedule has "
            f"{schedule[0][2]}: export another engine's, or one draft length"
        )
    if upper:
        kept = schedule[:-1] if schedule[-1][2] == 0 else schedule
        table = {last: length for _, last, length in kept}
    else:
        table = {first: length for first, _, length in schedule}
    _agrees(
        "tensorrt-llm",
        context,
        lambda batch: tensorrt_llm_draft_length(table, longest, batch, upper_bounds=upper),
    )
    kind = TENSORRT_TYPES.get(subject.get("method") or "", "Eagle3")
    lines = ["speculative_config:", f"  decoding_type: {kind}", f"  max_draft_len: {longest}", "  draft_len_schedule:"]
    lines += [f"    {batch}: {length}" for batch, length in table.items()]
    if kind not in ("NGram", "MTP"):
        lines.insert(3, f"  speculative_model: {json.dumps(subject.get('drafter') or 'DRAFTER')}")
    notes = [f"for TensorRT-LLM {release} only: other releases read the same keys the other way round"]
    if upper and schedule[-1][2] > 0:
        notes.append(f"no drafts above batch {schedule[-1][1]}, the largest looked at")
    notes += _memoryless(context)
    text = "\n".join(lines) + "\n"
    flag = f"--extra_llm_api_options {name}"
    return [Export("tensorrt-llm", release, context["context_length"], name, text, flag, notes)]


def exports(
    engines: Sequence[str], answer: Mapping[str, Any], subject: Mapping[str, Any], version: str | None = None
) -> list[Export]:
    """:func:`export` for several engines. A version can be given for one engine at a time."""
    asked = [engine for engine in dict.fromkeys(engines) if engine in VERSIONS]
    families = {engine.split("-dspark")[0] for engine in asked}
    if version is not None and len(families) != 1:
        raise InputError(
            f"--engine-version: got {version!r} for {len(families)} engines; allowed: one engine at a time"
        )
    made = []
    for engine in dict.fromkeys(engines):
        made += export(engine, answer, subject, version if engine in VERSIONS else None)
    return made
