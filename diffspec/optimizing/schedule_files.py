"""A schedule over the batch read back from an answer: what `diffspec policy` and `diffspec optimize` write, or vLLM's
own configuration."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.analysis.plain import finite
from diffspec.configuration import Configuration
from diffspec.fitting.deployment import FittedDeployment
from diffspec.optimizing.batch_tables import batch_tables, schedule_length
from diffspec.optimizing.engine_rules import vllm_draft_lengths
from diffspec.optimizing.schedule import ranges_of
from diffspec.optimizing.under_schedule import under_schedules
from diffspec.results import InputError
from diffspec.workload import Workload

VLLM_KEY = "num_speculative_tokens_per_batch_size"
_READ = "an answer of 'diffspec policy' or 'diffspec optimize' (--json, --out), or a vLLM --speculative-config"


@dataclass(frozen=True)
class ReadSchedule:
    """``ranges``: [[first_batch, last_batch, draft_length], ...]; ``bands``: (down, up) of each threshold, () where the
    file has none; ``context_length`` [tok] of the schedule, where the file has several."""

    ranges: list[list[int]]
    bands: tuple[tuple[int, int], ...] = ()
    context_length: float | None = None

    @property
    def longest(self) -> int:
        """The longest draft [tok]."""
        return max(length for *_, length in self.ranges)


def parse_schedule(text: str, name: str, cached_tokens: float) -> ReadSchedule:
    """The schedule in the JSON ``text`` of the file ``name``; of several context lengths the one nearest to
    ``cached_tokens`` [tok] in logarithms, as the exported look-up takes it.

    Errors: :class:`InputError` where there is none.

    >>> parse_schedule('{"schedule": [[1, 8, 3], [9, 64, 0]]}', "answer.json", 100.0).longest
    3
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not JSON ({error}); allowed: {_READ}") from None
    if not isinstance(data, Mapping):
        raise InputError(f"{name}: got {type(data).__name__}; allowed: {_READ}")
    try:
        if "contexts" in data:
            return _of_policy(data, name, cached_tokens)
        if VLLM_KEY in data or "num_speculative_tokens" in data:
            entries = data.get(VLLM_KEY) or [[1, 1, 0]]
            lengths = vllm_draft_lengths(data, max(int(last) for _, last, _ in entries))
            return ReadSchedule(ranges_of(np.asarray(lengths)))
        if data.get("schedule"):
            return ReadSchedule(_whole(data["schedule"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{name}: damaged ({type(error).__name__}: {error}); allowed: {_READ}") from None
    if "schedule" in data:
        raise InputError(f"{name}: the answer has no schedule, its outcome is {data.get('outcome')!r}")
    raise InputError(f"{name}: got keys {', '.join(sorted(map(str, data))[:6]) or 'none'}; allowed: {_READ}")


def _whole(entries: Any) -> list[list[int]]:
    """Entries of whole numbers; ValueError for others."""
    found = [list(entry) for entry in entries]
    for number in (number for entry in found for number in entry):
        if isinstance(number, bool) or not isinstance(number, int | float) or number != int(number):
            raise ValueError(f"got {number!r}; allowed: whole numbers")
    return [[int(number) for number in entry] for entry in found]


def _of_policy(data: Mapping[str, Any], name: str, cached_tokens: float) -> ReadSchedule:
    if not data["contexts"]:
        raise InputError(f"{name}: the answer has no schedule, its outcome is {data.get('outcome')!r}")
    context = data["contexts"][0]
    for other in data["contexts"][1:]:
        if cached_tokens**2 > float(context["context_length"]) * float(other["context_length"]):
            context = other
    return ReadSchedule(
        _whole(context["schedule"]),
        tuple((int(band["down"]), int(band["up"])) for band in context["bands"]),
        None if context["context_length"] is None else float(context["context_length"]),
    )


def predict_under_schedule(
    deployment: FittedDeployment, workload: Workload, config: Configuration, schedule: ReadSchedule
) -> dict[str, Any]:
    """What the model says of a schedule without bands: ``outcome``, and the means [s] of ttft, tpot, itl and e2e
    (:mod:`diffspec.optimizing.under_schedule`: Poisson arrivals), None at saturation. With any
    drafts at all: without, it is the prediction of draft length 0."""
    workload, config = (jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=float), part) for part in (workload, config))
    batches = schedule_length(config, workload)
    tables = batch_tables(deployment.serving, workload, config, schedule.longest, batches)
    last = np.asarray([last for _, last, _ in schedule.ranges])
    place = np.minimum(np.searchsorted(last, np.arange(1, batches + 1)), len(last) - 1)
    lengths = np.asarray([length for *_, length in schedule.ranges])[place]
    loop = "arrival_rate" if workload.is_open else "concurrency"
    load = np.asarray([float(getattr(workload, loop))])
    found = under_schedules(tables, lengths[None], load, loop, float(workload.output_length))
    saturated = bool(found.saturated[0, 0])
    told: dict[str, Any] = {
        metric: {"mean": None if saturated else finite(found.metrics[f"{metric}_mean"][0, 0])}
        for metric in ("ttft", "tpot", "e2e", "itl")
    }
    return told | {"outcome": "saturated" if saturated else "successful"}
