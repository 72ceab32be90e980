"""How sure a fit is: draws of its parameters, and intervals around what it predicts.

With F the expected information of the fitted rows (:mod:`diffspec.fitting.noise`) in standardised coordinates z, whose
priors are N(0, 1), the Laplace approximation of the posterior is N(z_fitted, inverse of (F + identity)): directions
that the rows do not tell keep the width of their prior. In logarithms of costs that is a poor picture where the rows
tell little: they bound a cost from above long before they bound it from below, and normal draws are slower servers than
any that the rows allow. So draws are best fits to scattered rows (:mod:`diffspec.fitting.draws`); the covariance serves
designs and updates. A measured value is then predicted as

    log value = log predicted(draw) + sigma*t_nu

A model that misses something errs more where it was not measured than its residuals say. Refits without groups of rows
(loads, draft lengths, lengths) show how much: ``inflation`` is the factor, at least 1, by which the 90 % quantile of
held-out residuals exceeds what both terms together allow; it widens both.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtri, stdtrit
from scipy.stats import qmc

from diffspec.fitting.objective import Objective
from diffspec.fitting.solve import Solution
from diffspec.parameters import get_parameters, parameter_infos, set_parameters, to_constrained, to_unconstrained
from diffspec.serving import ServingModel

LEVEL = 0.9
DRAWS = 64
NOISE_POINTS = 32


@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """What a fit leaves open, in unconstrained coordinates (log or logit) of the parameters ``paths``.

    * ``covariance`` [paths, paths] around the fitted values; ``draws`` [n, paths], deviations from them, where the
      ``method`` drew some; ``prior`` [paths]: standard deviations before any row
    * ``misfit``, ``request_spread`` (log units, by trace column) and ``degrees_of_freedom`` of the noise
    * ``inflation`` by trace column, see the module
    """

    method: str
    paths: tuple[str, ...]
    covariance: np.ndarray
    prior: np.ndarray
    misfit: dict[str, float]
    request_spread: dict[str, float]
    degrees_of_freedom: float
    inflation: dict[str, float]
    draws: np.ndarray | None = None

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation [paths] of each coordinate."""
        return np.sqrt(np.diag(self.covariance)) if self.draws is None else self.draws.std(axis=0)

    @property
    def inflated(self) -> np.ndarray:
        """Standard deviation [paths] of each coordinate, inflated, but no wider than its prior."""
        factor = 1.0 if self.draws is not None else self.parameter_inflation  # draws are inflated when they are made
        return np.minimum(factor * self.deviation, np.maximum(self.prior, self.deviation))

    @property
    def parameter_inflation(self) -> float:
        """The factor that widens parameters: the geometric mean over the columns."""
        return float(np.exp(np.mean(np.log(list(self.inflation.values()))))) if self.inflation else 1.0

    def deviations(self, count: int) -> np.ndarray:
        """``count`` deviations [count, paths] from the fitted coordinates, inflated but no wider than the priors."""
        if self.draws is not None:
            return self.draws[np.arange(count) % len(self.draws)]
        points = qmc.Sobol(len(self.paths), rng=0).random(2 ** int(np.ceil(np.log2(count))))[:count]
        values, vectors = np.linalg.eigh(self.covariance)
        along = ndtri(np.clip(points, 1e-9, 1 - 1e-9)) * np.sqrt(np.maximum(values, 0.0))
        return along @ vectors.T * (self.inflated / np.maximum(self.deviation, 1e-300))

    def models(self, serving: ServingModel, count: int = DRAWS) -> ServingModel:
        """``count`` draws of the serving model: one module with a leading axis."""
        return moved(serving, self.paths, self.deviations(count))

    def noise(self, column: str, requests: Any = np.inf) -> np.ndarray | None:
        """Inflated scale [log units] of a measured ``column`` that is a mean over ``requests`` requests; None for a
        column that was not fitted and has no kin that was (tpot: itl, a mean: its median)."""
        metric = column.split("_")[0]
        others = _KIN.get(metric, (metric,))
        kin = [column, *(f"{other}_{statistic}" for other in others for statistic in ("mean", "p50"))]
        known = next((name for name in kin if name in self.misfit), None)
        if known is None:
            return None
        sampled = self.request_spread[known] ** 2 / np.asarray(requests, dtype=float)
        return np.asarray(self.inflation.get(known, 1.0) * np.sqrt(self.misfit[known] ** 2 + sampled))

    def noise_of(self, column: str, ttft_share, requests: Any = np.inf) -> np.ndarray | None:
        """:meth:`noise` of any column of a row of which ``ttft_share`` of the latency is ttft; an end-to-end latency
        that was not fitted has what its parts have, independently."""
        found = self.noise(column, requests)
        if found is None and column.startswith("e2e"):
            first, rest = self.noise("ttft_mean", requests), self.noise("itl_mean", requests)
            if first is not None and rest is not None:
                found = np.asarray(np.hypot(ttft_share * first, (1.0 - ttft_share) * rest))
        return found

    def edges(self, values: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Low and high edge of the central LEVEL of exp(noise*t) times ``values`` [draws, ...]; nan where a draw is."""
        points = stdtrit(self.degrees_of_freedom, (np.arange(NOISE_POINTS) + 0.5) / NOISE_POINTS)
        scattered = values[:, None] * np.exp(np.multiply.outer(points, noise))
        flat = scattered.reshape(-1, *values.shape[1:])
        low, high = np.quantile(flat, (0.5 - LEVEL / 2, 0.5 + LEVEL / 2), axis=0, method="nearest")
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the inverse of :meth:`from_dict`."""
        data = dataclasses.asdict(self) | {"paths": list(self.paths), "level": LEVEL}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in data.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Uncertainty":
        """Rebuild from :meth:`to_dict`'s plain data. Errors: ValueError for damaged or non-finite matrices."""
        paths = tuple(data["paths"])
        arrays = {name: np.asarray(data[name], dtype=float) for name in ("covariance", "prior")}
        draws = None if data["draws"] is None else np.asarray(data["draws"], dtype=float)
        shapes = {"covariance": (len(paths), len(paths)), "prior": (len(paths),)}
        for name, shape in shapes.items():
            if arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
                raise ValueError(f"uncertainty.{name}: got shape {arrays[name].shape}; allowed: finite, {shape}")
        if draws is not None and (draws.ndim != 2 or draws.shape[1] != len(paths) or not np.isfinite(draws).all()):
            raise ValueError(f"uncertainty.draws: got shape {draws.shape}; allowed: finite, (n, {len(paths)})")
        names = ("method", "misfit", "request_spread", "degrees_of_freedom", "inflation")
        plain: dict[str, Any] = {name: data[name] for name in names} | arrays
        return cls(paths=paths, draws=draws, **plain)


_KIN = {"tpot": ("tpot", "itl"), "itl": ("itl", "tpot")}


def moved(serving: ServingModel, paths: tuple[str, ...], deviations: np.ndarray) -> ServingModel:
    """``serving`` with the coordinates of ``paths`` moved by each row of ``deviations``: one module with a leading axis
    on every leaf."""
    infos, values = parameter_infos(serving), get_parameters(serving)

    def repeated(leaf):
        return jnp.broadcast_to(jnp.asarray(leaf, dtype=float), (len(deviations), *np.shape(leaf)))

    whole = jax.tree.map(repeated, serving)
    drawn = {
        path: to_constrained(to_unconstrained(values[path], infos[path]) + deviations[:, index], infos[path])
        for index, path in enumerate(paths)
    }
    return set_parameters(whole, drawn)


def posterior_covariance(objective: Objective, vector, weights, jacobian) -> np.ndarray:
    """Laplace covariance [places, places] in standardised coordinates, from the expected information."""
    known = objective.fisher_information(vector, weights, jacobian)
    return np.linalg.inv(known + np.eye(len(known)))


def held_out_inflation(
    objective: Objective, refits: Solution, folds: list[np.ndarray], weights: np.ndarray
) -> dict[str, float]:
    """The ``inflation`` of each column by refits without each of ``folds`` (True = held out)."""
    real = np.asarray(objective.real) > 0
    used, requests = np.asarray(objective.used)[:, real] > 0, np.asarray(objective.requests)[real]
    ratios: dict[str, list[float]] = {column: [] for column in objective.columns}
    tails = []
    for fold, vector, residuals, jacobian in zip(folds, *refits[:1], *refits[3:5], strict=True):
        covariance = posterior_covariance(objective, vector, weights * ~fold, jacobian)
        noise = objective.noise(jnp.asarray(vector))
        variance = np.einsum("trp,pq,trq->tr", jacobian, covariance, jacobian)
        allowed = np.sqrt(variance + np.asarray(noise.scale(requests)) ** 2)
        tails.append(float(noise.degrees_of_freedom))
        for index, column in enumerate(objective.columns):
            rows = used[index] & fold
            ratios[column].extend(np.abs(residuals[index, rows]) / allowed[index, rows])
    expected = stdtrit(float(np.median(tails)), 0.5 + LEVEL / 2) if tails else 1.0
    return {
        column: max(1.0, float(np.quantile(found, LEVEL) / expected)) if found else 1.0
        for column, found in ratios.items()
    }


def laplace(
    objective: Objective, solution: Solution, weights: np.ndarray, cells: np.ndarray, inflation: dict[str, float]
) -> Uncertainty:
    """The uncertainty of the best lane of a solution by its covariance alone."""
    vector, jacobian = solution.vector[solution.best], solution.jacobian[solution.best]
    count, spread = len(objective.form.paths), np.asarray(objective.form.spread)
    covariance = posterior_covariance(objective, vector, weights, jacobian)[:count, :count]
    noise = objective.noise(jnp.asarray(vector))
    return Uncertainty(
        method="laplace",
        paths=objective.form.paths,
        covariance=spread[:, None] * covariance * spread,
        prior=spread,
        misfit=dict(zip(objective.columns, map(float, noise.misfit), strict=True)),
        request_spread=dict(zip(objective.columns, map(float, noise.request_spread), strict=True)),
        degrees_of_freedom=float(noise.degrees_of_freedom),
        inflation=inflation,
    )
