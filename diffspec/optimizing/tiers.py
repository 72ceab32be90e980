"""Tiers of a schedule over the batch: which are worth having, and the bands that keep a server from flapping.

A static schedule has no memory, so hysteresis can only mean fewer and wider tiers: a tier goes when its batches, given
to its neighbours at the best split, lose less than ``min_gain`` on average, or when it is narrower than ``min_width``.
A look-up with memory has a band around every threshold: it goes up when the batch exceeds ``up`` and down when it falls
below ``down``. Switching rates with and without a band follow from mean first passages of the birth-death chain:

    h_m = 1/rate + mu_m/rate*h_(m-1)   (m to m + 1),      d_m = 1/mu_m + rate/mu_m*d_(m+1)   (m to m - 1)

Derivation: ours (the recursions are those of any birth-death chain).
"""

import itertools
from typing import Any, NamedTuple

import numpy as np

from diffspec.optimizing.schedule import ranges_of
from diffspec.optimizing.under_schedule import chains

UNLIKELY = 1e6
"""Log cost of a draft length that cannot keep a batch in service."""


class Band(NamedTuple):
    """Between a tier that ends at batch ``threshold`` and the next: ``up`` is the last batch to which the first is
    kept when the batch grows, ``down`` the first one to which the second is kept when it falls. Without memory up =
    threshold and down = threshold + 1."""

    threshold: int
    down: int
    up: int


def merged_tiers(
    draft_lengths: np.ndarray, cost: np.ndarray, *, min_gain: float = 0.0, min_width: int = 1
) -> np.ndarray:
    """Draft lengths of batches 1, 2, ... without the tiers that are not worth having.

    ``cost`` [draft lengths, batches]: log of what is made small. The tier that costs least to lose goes first, until
    every tier is worth ``min_gain`` [1] and ``min_width`` [req] wide, or one is left.

    >>> cost = np.log([[1.0, 1.0, 1.0, 1.0], [0.9, 0.998, 1.2, 1.2]])
    >>> [merged_tiers(np.array([1, 1, 0, 0]), cost, min_gain=gain).tolist() for gain in (0.0, 0.06, 0.2)]
    [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    """
    chosen, cost = draft_lengths.copy(), np.minimum(cost, UNLIKELY)
    limit = np.log1p(min_gain)
    while True:
        tiers = ranges_of(chosen)
        if len(tiers) == 1:
            return chosen
        losses = [_loss(tiers, place, cost) for place in range(len(tiers))]
        widths = [last - first + 1 for first, last, _ in tiers]
        going = [
            place for place, (loss, _) in enumerate(losses) if widths[place] < min_width or loss < limit * widths[place]
        ]
        if not going:
            return chosen
        place = min(going, key=lambda index: losses[index][0])
        first, last, _ = tiers[place]
        split = losses[place][1]
        if place > 0:
            chosen[first - 1 : split] = tiers[place - 1][2]
        if place + 1 < len(tiers):
            chosen[split:last] = tiers[place + 1][2]


def _loss(tiers: list[list[int]], place: int, cost: np.ndarray) -> tuple[float, int]:
    """(loss, split): the log cost, summed over its batches, of giving a tier to its neighbours, the batches up to
    ``split`` to the one before it and the others to the one after it."""
    first, last, length = tiers[place]
    own = cost[length, first - 1 : last]
    before = None if place == 0 else cost[tiers[place - 1][2], first - 1 : last] - own
    after = None if place + 1 == len(tiers) else cost[tiers[place + 1][2], first - 1 : last] - own
    if before is None or after is None:
        only = before if after is None else after
        assert only is not None
        return float(only.sum()), last if after is None else first - 1
    ahead = np.concatenate([[0.0], np.cumsum(before)])
    behind = np.concatenate([np.cumsum(after[::-1])[::-1], [0.0]])
    split = int(np.argmin(ahead + behind))
    return float((ahead + behind)[split]), first - 1 + split


def crossing(cost: np.ndarray, first: int, second: int, near: int) -> int:
    """The last batch at which draft length ``first`` is no worse than ``second``, around the threshold ``near``: the
    split that would cost least. ``cost`` [draft lengths, batches] in logs.

    >>> crossing(np.log([[1.0, 1.0, 1.0], [0.8, 0.9, 1.1]]), 1, 0, 2)
    2
    """
    gap = np.minimum(cost[first], UNLIKELY) - np.minimum(cost[second], UNLIKELY)
    ahead = np.concatenate([[0.0], np.cumsum(gap)])  # first up to the split, second behind it
    best = np.flatnonzero(ahead <= ahead.min() + 1e-12)
    return int(best[np.argmin(np.abs(best - near))])


def rate_at_batch(residence: np.ndarray, sizes: np.ndarray, batch: float) -> float:
    """The arrival rate [req/s] at which the mean batch under ``residence`` [s] is ``batch`` [req]: bisection."""
    low, high = 0.0, float(sizes[-1] / residence[-1]) * (1.0 - 1e-9)
    for _ in range(60):
        middle = 0.5 * (low + high)
        mean = float(chains(residence[None], sizes, np.asarray([middle])).in_service[0])
        low, high = (middle, high) if mean < batch else (low, middle)
    return 0.5 * (low + high)


def bands_of(
    draft_lengths: np.ndarray, cost: np.ndarray, residence: np.ndarray, *, width: float | None, most_loss: float
) -> list[Band]:
    """The band of each threshold of a schedule over batches 1, 2, ...

    A band reaches one standard deviation of the batch to both sides (``width`` [req] instead, if given), at the arrival
    rate that puts the mean batch at the threshold: inside it a batch tells a change of load from chance no better than
    that. It ends earlier where the tier that is kept costs more than ``most_loss`` [1] beyond the other, and at the far
    ends of both tiers. ``residence`` [draft lengths, batches] [s], ``cost`` its logs or those of another objective.
    """
    tiers, sizes = ranges_of(draft_lengths), np.arange(1.0, draft_lengths.size + 1.0)
    own = residence[draft_lengths, np.arange(draft_lengths.size)]
    limit, bands = np.log1p(most_loss), []
    for (first, last, before), (_, end, after) in itertools.pairwise(tiers):
        reach = width
        if reach is None:
            rate = rate_at_batch(own, sizes, last + 0.5)
            share = chains(own[None], sizes, np.asarray([rate])).probability[0, 1:]
            mean = share @ sizes
            reach = float(np.sqrt(max(share @ sizes**2 - mean**2, 0.0)))
        far = int(np.floor(reach))
        up, down = last, last + 1
        while up < min(last + far, end) and cost[before, up] - cost[after, up] <= limit:
            up += 1
        while down > max(last + 1 - far, first) and cost[after, down - 2] - cost[before, down - 2] <= limit:
            down -= 1
        bands.append(Band(last, down, up))
    return bands


def switches(draft_lengths: np.ndarray, residence: np.ndarray, band: Band, rate: float) -> float:
    """How often per second [1/s] a server at arrival rate ``rate`` [req/s] goes up and down again over one band.

    1/(mean time from down - 1 to up + 1 with the draft length below + mean time back with the one above).
    """
    sizes = np.arange(1.0, draft_lengths.size + 1.0)
    place = np.arange(draft_lengths.size)
    below, above = draft_lengths.copy(), draft_lengths.copy()
    below[band.threshold : band.up] = draft_lengths[band.threshold - 1]
    above[band.down - 1 : band.threshold] = draft_lengths[band.threshold]
    deaths = sizes / residence[below, place]
    rising = [1.0 / rate]
    for mu in deaths[: band.up]:
        rising.append(1.0 / rate + mu / rate * rising[-1])
    deaths = sizes / residence[above, place]
    if rate >= deaths[-1]:
        return 0.0
    falling = [1.0 / (deaths[-1] - rate)]
    for mu in deaths[-2::-1]:
        falling.append(1.0 / mu + rate / mu * falling[-1])
    falling = falling[::-1]  # falling[m - 1]: from m to m - 1
    cycle = sum(rising[band.down - 1 : band.up + 1]) + sum(falling[band.down - 1 : band.up + 1])
    return float(1.0 / cycle)


def thresholds(draft_lengths: np.ndarray, costs: np.ndarray) -> list[np.ndarray]:
    """Where each threshold lies in every draw: :func:`crossing` in ``costs`` [draws, draft lengths, batches]."""
    return [
        np.asarray([crossing(cost, before, after, last) for cost in costs])
        for (_, last, before), (_, _, after) in itertools.pairwise(ranges_of(draft_lengths))
    ]


def switching(draft_lengths: np.ndarray, residence: np.ndarray, band: Band) -> dict[str, Any]:
    """What a band saves at the arrival rate that puts the mean batch at its threshold: ``arrival_rate`` [req/s], and
    ``switches_per_minute`` with it and ``without_band``."""
    sizes = np.arange(1.0, draft_lengths.size + 1.0)
    own = residence[draft_lengths, np.arange(draft_lengths.size)]
    rate = rate_at_batch(own, sizes, band.threshold + 0.5)
    bare = Band(band.threshold, band.threshold + 1, band.threshold)
    return {
        "arrival_rate": rate,
        "switches_per_minute": 60.0 * switches(draft_lengths, residence, band, rate),
        "without_band": 60.0 * switches(draft_lengths, residence, bare, rate),
    }
