"""Where runs may lie and what is asked: ranges of loads and lengths, grids over them, and sensible numbers."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from diffspec.analysis.runs import APART, LOOPS, Run
from diffspec.fitting.deployment import FittedDeployment
from diffspec.results import InputError

MOST_ASKED = 0.95
"""Share of capacity above which nothing is asked: latencies there are decided by the load, not by what costs are."""
NAMES = (*LOOPS, "draft_length", "prompt_length", "output_length")
Range = tuple[float, float]


class Space(NamedTuple):
    """Ranges (low, high): ``loads`` by loop [req/s, req], ``draft_lengths`` one by one, mean lengths [tok]."""

    loads: dict[str, Range]
    draft_lengths: tuple[int, ...]
    prompt_length: Range
    output_length: Range


def asked_space(
    deployment: FittedDeployment, asked: Mapping[str, Range], max_draft_length: int | None, speculative: bool
) -> Space:
    """What the questions are about: what was named, else what was measured. A load named for one loop leaves the other
    out; ``max_draft_length`` adds the draft lengths up to it. Errors: :class:`InputError`."""
    for name, span in asked.items():
        if name not in NAMES:
            raise InputError(f"asked: got {name!r}; allowed: {', '.join(NAMES)}")
        low = {"arrival_rate": 1e-9, "draft_length": 0.0}.get(name, 1.0)
        high = 32.0 if name == "draft_length" else 1e9
        if not (len(span) == 2 and low <= span[0] <= span[1] <= high):
            raise InputError(
                f"{name}: got {span[0]:g} to {span[-1]:g}; allowed: low:high, {low:g} or more, low <= high"
            )
    measured = deployment.measured
    loads = {loop: asked[loop] for loop in LOOPS if loop in asked}
    loads = loads or {loop: tuple(measured[loop]) for loop in LOOPS if measured.get(loop)}
    if "draft_length" in asked:
        low, high = asked["draft_length"]
        lengths = tuple(range(math.ceil(low), math.floor(high) + 1))
    else:
        known = measured["draft_lengths"]
        lengths = tuple(sorted({*known, *range(max(known) + 1, (max_draft_length or 0) + 1)}))
    if not speculative:
        if max(lengths, default=0) > 0:
            raise InputError(
                f"deployment {deployment.name!r} has no acceptance of its own: no speculative row was fitted; allowed: "
                "draft length 0, or an acceptance (--acceptance-rate, --acceptance)"
            )
        lengths = (0,)
    spans = [tuple(asked.get(name) or measured[name]) for name in ("prompt_length", "output_length")]
    return Space(loads, lengths, *spans)  # type: ignore[arg-type]


def run_space(
    deployment: FittedDeployment, asked: Space, max_draft_length: int | None, max_rate: float | None, speculative: bool
) -> Space:
    """Where runs may lie: what was asked and what was measured, rates up to ``max_rate``, any draft length up to
    ``max_draft_length`` (by default the longest of both)."""
    measured = deployment.measured
    loads = {}
    for loop in LOOPS:
        spans = [span for span in (asked.loads.get(loop), measured.get(loop)) if span]
        if spans:
            low, high = min(span[0] for span in spans), max(span[1] for span in spans)
            loads[loop] = (low, high if max_rate is None or loop != LOOPS[0] else min(high, max_rate))
    longest = max(*asked.draft_lengths, *measured["draft_lengths"]) if max_draft_length is None else max_draft_length
    lengths = tuple(range(int(longest) + 1)) if speculative else (0,)
    pairs = [(getattr(asked, name), measured[name]) for name in ("prompt_length", "output_length")]
    prompt, output = ((min(a[0], b[0]), max(a[1], b[1])) for a, b in pairs)
    return Space(loads, lengths, prompt, (max(output[0], 2.0), max(output[1], 2.0)))  # one token has no gap to measure


def grid(space: Space, levels: int) -> list[Run]:
    """Runs over a space: every draft length, up to three of each length and ``levels`` loads, evenly in the logarithm
    and at least APART; ``levels`` = 1 takes the lowest load only."""
    found = []
    for loop, span in space.loads.items():
        lists = (
            _spread(span, levels),
            space.draft_lengths,
            _spread(space.prompt_length, 3),
            _spread(space.output_length, 3),
        )
        for load, k, prompt, output in itertools.product(*lists):
            found.append(rounded(Run(loop, load, int(k), prompt, output), space))
    return list(dict.fromkeys(found))


def _spread(span: Range, most: int) -> list[float]:
    low, high = span
    count = min(most, 1 + math.floor(math.log(high / low) / math.log(APART) + 1e-9)) if high > low else 1
    if count == 1 and most > 1 and high > low:
        return [math.sqrt(low * high)]
    return [float(value) for value in np.geomspace(low, high, count)]


def rounded(run: Run, space: Space) -> Run:
    """The run with numbers that one would choose, inside the space: rates of two digits, lengths in steps of a power of
    two that are an eighth or less of them, whole requests in flight.

    >>> span = (1.0, 1000.0)
    >>> rounded(Run("arrival_rate", 3.1416, 4, 203.0, 66.0), Space({"arrival_rate": (1.0, 3.1)}, (4,), span, span))
    Run(loop='arrival_rate', load=3.1, draft_length=4, prompt_length=208.0, output_length=64.0)
    """
    low, high = space.loads[run.loop]
    if run.loop == LOOPS[0]:
        load = float(f"{run.load:.2g}")
        if load > high:
            digit = 10.0 ** (math.floor(math.log10(high)) - 1)
            load = float(f"{math.floor(high / digit + 1e-9) * digit:.2g}")
        load = load if low <= load else float(np.clip(run.load, low, high))
    else:
        load = float(np.clip(round(run.load), math.ceil(low - 1e-9), max(math.floor(high + 1e-9), 1)))

    def whole(value, span):
        step = 2.0 ** max(math.floor(math.log2(value)) - 3, 0)
        return float(np.clip(step * round(value / step), *span))

    lengths = whole(run.prompt_length, space.prompt_length), whole(run.output_length, space.output_length)
    return replace(run, load=load, prompt_length=lengths[0], output_length=lengths[1])
