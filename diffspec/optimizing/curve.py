"""The capacity curve: the largest rate within limits by draft length and one more knob, speculation or none."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from diffspec.acceptance import ConstantAcceptance
from diffspec.optimizing.candidates import Candidates
from diffspec.optimizing.lanes import join, largest_rates
from diffspec.optimizing.limits import Limit, of_rate
from diffspec.results import InputError

KNOBS = ("prompt_length", "acceptance_rate")
_SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)
_RATES = (0.5, 0.6, 0.7, 0.8, 0.9)


def knob_range(knob: str, values: Sequence[float] | None, prompt_length: float) -> list[float]:
    """The knob's values: those given, else a quarter of the prompt length to four times it, or acceptance 0.5 to 0.9.

    Errors: :class:`InputError` for an unknown knob or values out of its range.

    >>> knob_range("prompt_length", None, 512.0)
    [128.0, 256.0, 512.0, 1024.0, 2048.0]
    """
    if knob not in KNOBS:
        raise InputError(f"knob: got {knob!r}; allowed: {', '.join(KNOBS)}")
    if values is None:
        return [max(share * prompt_length, 1.0) for share in _SHARES] if knob == KNOBS[0] else list(_RATES)
    found = sorted({float(value) for value in values})
    most = 1e8 if knob == KNOBS[0] else 1.0
    if not found or not all(0 < value <= most for value in found):
        raise InputError(f"knob_values: got {list(values)}; allowed: values of {knob} in (0, {most:g}]")
    return found


def capacity_curve(
    pool: Candidates, place: int, limits: Sequence[Limit], knob: str, values: Sequence[float], ask: Mapping[str, Any]
) -> dict[str, Any]:
    """The largest rate within limits [req/s of a replica] on the server and batch cap of one candidate.

    ``knob``, ``values``; ``draft_lengths``; ``rates[i][j]`` at value i and draft length j, 0 where the limits cannot be
    kept; ``best``: by value ``draft_length`` (None where none will do) and ``rate``, ``plain_rate`` without speculation
    (None where it is not known), ``gain`` (rate over plain_rate) and ``inside_measured``.
    """
    server, cap = pool.servers[pool.server[place]], pool.cap[place]
    lengths = sorted(set(pool.draft_length))
    budget = ask["max_batched_tokens"]
    models, configs, workloads = [], [], []
    for value in values:
        asked, there, load = dict(ask), server, pool.workload
        if knob == "prompt_length":
            there = server.at_lengths(value, float(load.output_length), budget)
            load = replace(load, prompt_length=value)
        elif lengths[-1] > 0:
            asked["acceptance"] = ConstantAcceptance(value)
        for length in lengths:
            models.append(there.deployment.serving)
            configs.append(there.configuration(length, cap, longest=lengths[-1], **asked))
            workloads.append(load)
    lanes = join(models, workloads, configs, *pool.lanes[3:])
    fits = np.asarray([server.fits(length) for length in lengths])
    rated, most = of_rate(limits)
    rates = largest_rates(lanes, rated).rate.reshape(len(values), len(lengths)) * fits
    if most < np.inf:
        each = zip(workloads, configs, strict=True)
        held = np.asarray([server.gigabytes(load, config, budget) for load, config in each]).reshape(rates.shape)
        rates = np.where(held <= most, rates, 0.0)
    best = []
    for value, row in zip(values, rates, strict=True):
        top = int(np.argmax(row))
        plain = float(row[0]) if lengths[0] == 0 else None
        fields = {knob: value} if knob == "prompt_length" else {}
        best.append(
            {
                "value": value,
                "draft_length": lengths[top] if row[top] > 0 else None,
                "rate": float(row[top]),
                "plain_rate": plain,
                "gain": float(row[top]) / plain if plain else None,
                **{"inside_measured": server.deployment.hull(float(lengths[top]), fields)["inside_measured"]},
            }
        )
    return {
        "knob": knob,
        "values": list(values),
        "draft_lengths": lengths,
        "max_batch_size": cap,
        "rates": rates.tolist(),
        "best": best,
    }
