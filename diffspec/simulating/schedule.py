"""A draft length that follows the batch: the schedule that a simulated engine may be given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from diffspec.results import InputError


@dataclass(frozen=True)
class DraftSchedule:
    """One draft length for all sequences of an iteration, by how many of them decode in it. With any drafts at all the
    drafter stays loaded: at draft length 0 it reads the prompts too.

    * ``ranges``: [[first_batch, last_batch, draft_length], ...] [req, req, tok], from batch 1, without gaps; the last
      holds above its end, too
    * ``bands``: (down, up) of each threshold between two ranges: the engine moves on when the batch exceeds ``up`` and
      back when it falls below ``down``. Without bands up is the last batch of the first range, down the next one
    * ``position_acceptance``: conditional rates by draft length, where they depend on it; otherwise the engine's own

    >>> schedule = DraftSchedule([[1, 4, 3], [5, 64, 0]], bands=[(3, 6)])
    >>> schedule.thresholds()
    ([0, 3], [6, 1099511627776])
    """

    ranges: Sequence[Sequence[int]]
    bands: Sequence[tuple[int, int]] = ()
    position_acceptance: Mapping[int, Sequence[float]] | None = None

    def __post_init__(self):
        rows = [tuple(row) for row in self.ranges]
        whole = all(len(row) == 3 and all(isinstance(x, int | np.integer) for x in row) for row in rows)
        joined = whole and all(after[0] == before[1] + 1 for before, after in pairwise(rows))
        if not rows or not joined or rows[0][0] != 1 or any(a > b or k < 0 for a, b, k in rows):
            raise InputError(
                f"draft schedule: got {list(self.ranges)}; allowed: [[1, last_batch, draft_length], ...], whole "
                "numbers without gaps"
            )
        if len(self.bands) not in (0, len(rows) - 1):
            raise InputError(f"bands: got {len(self.bands)} for {len(rows) - 1} thresholds; allowed: none, or one each")
        for (down, up), (first, last, _), (_, end, _) in zip(self.bands, rows, rows[1:], strict=False):
            if not (first <= down <= last + 1 and last <= up <= end):
                raise InputError(
                    f"bands: got down {down}, up {up} at the threshold {last}; allowed: {first} to {last + 1}, and "
                    f"{last} to {end}"
                )
        for k, rates in (self.position_acceptance or {}).items():
            if k < 0 or (k > 0 and not len(rates)) or not all(0 <= rate <= 1 for rate in rates):
                raise InputError(f"position_acceptance: got {rates} at draft length {k}; allowed: rates from 0 to 1")
        missing = {k for *_, k in rows if k > 0} - set(self.position_acceptance or {})
        if self.position_acceptance is not None and missing:
            raise InputError(f"position_acceptance: got none for draft lengths {sorted(missing)}; allowed: all of them")

    @property
    def longest(self) -> int:
        """The longest draft [tok]."""
        return max(k for *_, k in self.ranges)

    def thresholds(self) -> tuple[list[int], list[int]]:
        """(batch below which each range is left for the one before it, batch above which for the next one) [req]."""
        bands = list(self.bands) or [(last + 1, last) for _, last, _ in self.ranges[:-1]]
        return [0, *(int(down) for down, _ in bands)], [*(int(up) for _, up in bands), 2**40]
