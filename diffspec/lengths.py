"""The law of output lengths, as representative lengths with their shares: fine in the tails, where percentiles are."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffspec.parameters import Scalar
from diffspec.results import InputError

BINS = 96
_POINTS = 16384


class Lengths(eqx.Module):
    """Lengths relative to their mean: ``relative[i]`` with probability ``share[i]``; mean 1.

    A third of the bins each for the shortest tenth, the middle and the longest tenth, both tails down to one in ten
    thousand: the longest requests make the tail of e2e, the shortest that of tpot. Build it with :meth:`fixed`,
    :meth:`geometric`, :meth:`lognormal` or :meth:`measured`.

    >>> round(float(Lengths.lognormal(1.5).scv()), 2)
    1.48
    """

    relative: Float[Array, "bins"]
    share: Float[Array, "bins"]

    @classmethod
    def fixed(cls) -> "Lengths":
        """Every request has the mean length."""
        return cls(jnp.ones(1), jnp.ones(1))

    @classmethod
    def geometric(cls) -> "Lengths":
        """Geometric on 1, 2, ...; its shape hardly depends on the mean, and is taken as exponential."""
        return cls._of(-np.log1p(-_midpoints()))

    @classmethod
    def lognormal(cls, scv: float) -> "Lengths":
        """Lognormal with squared coefficient of variation ``scv`` >= 0."""
        from scipy.special import ndtri

        if not 0 <= scv <= 100:
            raise InputError(f"output_scv: got {scv!r}; allowed: 0 to 100")
        return cls.fixed() if scv == 0 else cls._of(np.exp(math.sqrt(math.log1p(scv)) * ndtri(_midpoints())))

    @classmethod
    def measured(cls, lengths) -> "Lengths":
        """From a sample of lengths [tok], of a request table, say."""
        values = np.sort(np.asarray(lengths, dtype=float))
        if values.size == 0 or not np.all(np.isfinite(values)) or values[0] <= 0:
            raise InputError("lengths: allowed: at least one finite length above 0")
        return cls._of(np.interp(_midpoints(), (np.arange(values.size) + 0.5) / values.size, values))

    @classmethod
    def _of(cls, values: np.ndarray) -> "Lengths":
        tail = 0.1 * 10.0 ** (-3.0 * np.linspace(0.0, 1.0, BINS // 3))
        edges = np.concatenate([[0.0, 1.0], tail, np.linspace(0.1, 0.9, BINS // 3), 1.0 - tail])
        edges = np.unique(np.round(edges * _POINTS).astype(int))
        counts = np.diff(edges)
        means = np.add.reduceat(values, edges[:-1]) / counts
        return cls(jnp.asarray(means / values.mean()), jnp.asarray(counts / _POINTS))

    @classmethod
    def stacked(cls, scvs: Sequence[float]) -> "Lengths":
        """Lognormal laws with these squared coefficients of variation, with a leading axis.

        >>> Lengths.stacked([0.0, 0.0]).share.shape, Lengths.stacked([0.0, 1.0]).of(0).scv() < 1e-9
        ((2, 1), Array(True, dtype=bool))
        """
        found = [cls.lognormal(scv) for scv in scvs]
        if any(scv > 0 for scv in scvs):
            equal = cls._of(np.ones(_POINTS))
            found = [law if scv > 0 else equal for scv, law in zip(scvs, found, strict=True)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    def of(self, place: int) -> "Lengths":
        """The law at a place of a leading axis."""
        return Lengths(self.relative[place], self.share[place])

    def scv(self) -> Scalar:
        """Squared coefficient of variation [1]."""
        return jnp.sum(self.share * self.relative**2) - 1.0


def _midpoints() -> np.ndarray:
    return (np.arange(_POINTS) + 0.5) / _POINTS
