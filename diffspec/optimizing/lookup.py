"""A policy as a small Python file without any import: a look-up of the draft length with hysteresis and fallback."""

from collections.abc import Mapping
from typing import Any

_SOURCE = '''"""Draft length by batch, for {deployment}. Written by diffspec; needs nothing.

draft_length = DraftLength()
draft_length(batch)                                 the draft length of the next step, for so many decoding requests
draft_length(batch, context_length=2000.0)          where there are schedules for several context lengths
draft_length(batch, tokens_per_step=1.4)            0 where fewer tokens come out of a step than break even
"""

# (context length [tok] or None,
#  tiers: (first batch, last batch, draft length, break-even tokens per step or None),
#  bands: (last batch to which the tier below is kept when the batch grows, first one to which the tier above is kept
#          when it falls), one for each two neighbouring tiers)
SCHEDULES = {schedules}
FALLBACK = {fallback}


class DraftLength:
    """Remembers its tier, so that a batch that wavers around a threshold does not change the draft length each time.

    ``retry``: calls for which a fallback to 0 lasts before drafts are tried again.
    """

    def __init__(self, retry=256):
        self.retry = retry
        self.tiers = [0] * len(SCHEDULES)
        self.off = 0

    def __call__(self, batch, context_length=None, tokens_per_step=None):
        place = 0
        while place + 1 < len(SCHEDULES) and context_length is not None:
            if context_length ** 2 <= SCHEDULES[place][0] * SCHEDULES[place + 1][0]:
                break
            place += 1
        _, tiers, bands = SCHEDULES[place]
        tier = self.tiers[place]
        while tier < len(bands) and batch > bands[tier][0]:
            tier += 1
        while tier > 0 and batch < bands[tier - 1][1]:
            tier -= 1
        self.tiers[place] = tier
        length, least = tiers[tier][2], tiers[tier][3]
        if self.off > 0:
            self.off -= 1
            return 0
        if FALLBACK and length > 0 and tokens_per_step is not None and least is not None and tokens_per_step < least:
            self.off = self.retry
            return 0
        return length
'''


def lookup_source(answer: Mapping[str, Any]) -> str:
    """The text of the Python file for an answer of :func:`diffspec.optimizing.load_policy.policy`.

    Its class has the tiers, bands and break-even tokens per step of every context length; between two context lengths
    the nearer one in logarithms holds. Without tiers at 0 (``forbid_zero``) it never falls back.
    """
    schedules = []
    for context in answer["contexts"]:
        tiers = [
            (tier["first_batch"], tier["last_batch"], tier["draft_length"], tier["breakeven_tokens_per_step"])
            for tier in context["tiers"]
        ]
        bands = [(band["up"], band["down"]) for band in context["bands"]]
        schedules.append(f"    ({context['context_length']!r}, {tiers!r}, {bands!r}),\n")
    rows = "[\n" + "".join(schedules) + "]"
    deployment = str(answer["deployment"]).replace("\\", "/").replace('"', "'")
    return _SOURCE.format(deployment=deployment, schedules=rows, fallback=not answer["forbid_zero"])
