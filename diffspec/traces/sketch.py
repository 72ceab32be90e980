"""Percentiles that can be merged: latencies of parts of a table, kept exactly while they are few, else in a DDSketch.

A DDSketch (Masson, Rim & Lee, VLDB 2019; the `ddsketch` package) counts values in bins whose edges grow by the factor
``(1 + a) / (1 - a)``, so that every quantile is told within the relative error ``a``, whatever the distribution, and
counts of parts add up: the merged sketch is the same however the values were split. A t-digest of the same size is
smaller and has no such bound; its answer changes with the order of merging.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

RELATIVE_ERROR = 0.002
"""Largest relative error of a percentile, against the value of its rank."""
EXACT = 4096
"""Up to so many values are kept as they are."""
_HELD = 1 << 18


class LatencySketch:
    """Latencies [s] of one metric in one window, any number of them; see the module.

    Up to `EXACT` values, percentiles are those of the values; beyond, each is within `RELATIVE_ERROR` of the value
    whose rank is ``floor(share * (n - 1))``. Which of the two depends on the number of values alone, not on how they
    were split. What is not finite is left out.

    >>> import numpy as np
    >>> early, late = LatencySketch(), LatencySketch()
    >>> early.add(np.arange(1, 5001.0)), late.add(np.arange(5001, 10001.0)), early.merge(late)
    (None, None, None)
    >>> abs(early.percentiles([0.5])[0] / 5000 - 1) < RELATIVE_ERROR
    True
    """

    def __init__(self) -> None:
        self.held: list[np.ndarray] = []
        self.count = 0
        self.sketch: Any = None

    def add(self, values: np.ndarray) -> None:
        """Add values."""
        values = values[np.isfinite(values)].astype(np.float32)
        self.held.append(values)
        self.count += len(values)
        if sum(map(len, self.held)) > _HELD:
            self._settle()

    def merge(self, other: "LatencySketch") -> None:
        """Add what another holds."""
        self.held += other.held
        self.count += other.count
        if other.sketch is not None:
            if self.sketch is None:
                self.sketch = other.sketch
            else:
                self.sketch.merge(other.sketch)
        self._settle()

    def percentiles(self, shares: Sequence[float]) -> list[float]:
        """The values below which these shares lie, in the order given; NaN when there are none."""
        self._settle()
        if self.count == 0:
            return [float("nan")] * len(shares)
        if self.sketch is None:
            return np.quantile(self.held[0].astype(float), shares).tolist()
        return [float(self.sketch.get_quantile_value(share)) for share in shares]

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return self.__dict__

    def _settle(self) -> None:
        """Few values become one array, many go into the sketch."""
        values = np.concatenate(self.held) if self.held else np.zeros(0, np.float32)
        self.held = [values]
        if self.count > EXACT and len(values):
            counted = _sketch(values.astype(float))
            if self.sketch is None:
                self.sketch = counted
            else:
                self.sketch.merge(counted)
            self.held = []


def _sketch(values: np.ndarray) -> Any:
    """A DDSketch of values. `DDSketch.add` takes one at a time; here they are counted by bin at once."""
    from ddsketch.ddsketch import BaseDDSketch
    from ddsketch.mapping import LogarithmicMapping

    mapping = LogarithmicMapping(RELATIVE_ERROR)
    zero = np.abs(values) <= mapping.min_possible
    stores = [_store(mapping, values[~zero & (values > 0)]), _store(mapping, -values[~zero & (values < 0)])]
    return BaseDDSketch(mapping, stores[0], stores[1], float(zero.sum()))


def _store(mapping: Any, values: np.ndarray) -> Any:
    from ddsketch.store import DenseStore

    store = DenseStore()
    if len(values):
        keys = np.ceil(np.log(values) / np.log(mapping.gamma)).astype(np.int64)
        low, high = int(keys.min()), int(keys.max())
        store.add(low, 0.0)
        store.add(high, 0.0)
        start = low - store.offset
        store.bins[start : start + high - low + 1] = np.bincount(keys - low).astype(float).tolist()
        store.count = float(len(values))
    return store
