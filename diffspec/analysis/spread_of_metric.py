"""Where the uncertainty of a metric comes from: its linear shares, and Sobol' indices over what is not known.

What a fit leaves open is known by draws. They are skewed: rows bound a cost from above long before they bound it from
below. So their law is told as a normal copula: every parameter keeps the quantiles of its draws, and the correlation is
that of their normal scores; without draws it is normal in unconstrained coordinates. A field that the user does not
know is lognormal. With p the parameters' own values, C their covariance over the draws and g = d log(metric)/dp at the
fit, to first order

    Var[log metric] = g'Cg = sum_i g_i (Cg)_i,     linear share_i = g_i (Cg)_i/(g'Cg)

Shares sum to 1 and may be negative: parameters that a trace knows only together cancel (the covariance decomposition,
Li et al. 2010, J. Phys. Chem. A 114). ``alone`` is g_i^2 C_ii/(g'Cg), as if nothing were correlated. Neither a copula
nor a tangent holds curved trade-offs, and both overstate a metric that a trace pins down where its parameters are not.
What the draws themselves say is told beside them: ``deviation_of_draws`` of log(metric), ``told_by_draws``, the squared
rank correlation of a parameter with the metric, and a warning where the deviations differ by more than half.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

from diffspec.analysis.metrics import values_at
from diffspec.analysis.plain import finite
from diffspec.analysis.sensitivity import Progress, Slopes
from diffspec.analysis.sobol import sobol_indices
from diffspec.fitting.deployment import Z_90, FittedDeployment
from diffspec.fitting.uncertainty import DRAWS, Uncertainty
from diffspec.parameters import parameter_infos, to_constrained, to_unconstrained
from diffspec.results import InputError

POINTS, SLOW_POINTS = 512, 64
"""Points for means, and for percentiles and roots, which take their time."""


class Unknown:
    """Inputs that are not known: ``places`` [unknown] in the inputs of ``slopes``; ``covariance`` [unknown, unknown] of
    their normal coordinates; ``draws`` [draws, unknown] of their own values. ``spans``: percent by field, the central
    90 % of a lognormal lying within a factor 1 + span/100."""

    def __init__(self, slopes: Slopes, known: Uncertainty | None, spans: Mapping[str, float]):
        self.slopes, self.known = slopes, known
        paths = list(slopes.inputs.paths)
        infos = parameter_infos(slopes.point.serving)
        fields = [name for name, kind in zip(paths, slopes.inputs.kinds, strict=True) if kind != "parameter"]
        for name, span in spans.items():
            if name not in fields:
                raise InputError(f"span: got {name!r}; allowed: {', '.join(fields)}")
            if not 0 < span <= 1000:
                raise InputError(f"span of {name}: got {span!r}; allowed: (0, 1000] percent")
            if slopes.at[paths.index(name)] == 0:
                raise InputError(f"span of {name}: got a field at 0; allowed: one above 0, which percents can move")
        self.paths: list[str] = []
        deviations = np.zeros((DRAWS, 0))
        if known is not None:
            deviations = known.deviations(DRAWS if known.draws is None else len(known.draws))
            widths = deviations.std(axis=0)
            inside = [infos[path].low < slopes.at[paths.index(path)] < infos[path].high for path in known.paths]
            kept = [i for i in range(len(known.paths)) if inside[i] and widths[i] > 1e-9]
            self.paths, deviations = [known.paths[i] for i in kept], deviations[:, kept]
        self.infos = [infos[path] for path in self.paths]
        self.places = np.asarray([paths.index(path) for path in (*self.paths, *spans)], dtype=int)
        count, total = len(self.paths), len(self.places)
        self.covariance = np.zeros((total, total))
        self.quantiles = None
        if known is not None and count and known.draws is not None:
            self.quantiles = np.sort(deviations, axis=0)
            scores = ndtri((np.argsort(np.argsort(deviations, axis=0), axis=0) + 0.5) / len(deviations))
            self.covariance[:count, :count] = np.corrcoef(scores.T)
        elif known is not None and count:
            index = [known.paths.index(path) for path in self.paths]
            self.covariance[:count, :count] = _inflated(known)[np.ix_(index, index)]
        widths = np.asarray([np.log1p(span / 100.0) / Z_90 for span in spans.values()])
        self.covariance[range(count, total), range(count, total)] = widths**2
        self.draws = self._moved(np.pad(deviations, ((0, 0), (0, len(spans)))))

    @property
    def names(self) -> list[str]:
        """Names of the unknown inputs."""
        return [self.slopes.inputs.names[place] for place in self.places]

    def values(self, coordinates: Float[np.ndarray, "rows unknown"]) -> Float[np.ndarray, "rows inputs"]:
        """All inputs with the unknown ones at normal ``coordinates``."""
        deviations = np.array(coordinates)
        if self.quantiles is not None:
            levels = (np.arange(len(self.quantiles)) + 0.5) / len(self.quantiles)
            for index in range(len(self.paths)):
                deviations[:, index] = np.interp(ndtr(coordinates[:, index]), levels, self.quantiles[:, index])
        return self._moved(deviations)

    def _moved(self, deviations: np.ndarray) -> np.ndarray:
        """All inputs with the unknown ones moved by ``deviations`` of their unconstrained coordinates."""
        rows = np.tile(self.slopes.at, (len(deviations), 1))
        for index, place in enumerate(self.places):
            moved, value = deviations[:, index], self.slopes.at[place]
            if index < len(self.infos):
                info = self.infos[index]
                rows[:, place] = to_constrained(to_unconstrained(value, info) + moved, info)
            else:
                rows[:, place] = value * np.exp(moved)
        low, high = self.slopes.inputs.allowed(self.slopes.point)
        return np.clip(rows, low, high)

    def log_metric(
        self, rows: Float[np.ndarray, "rows inputs"], progress: Progress | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(log metric, saturated) at each row of inputs; nan where the metric has no logarithm."""
        values, used = values_at(self.slopes.metric, self.slopes.inputs, self.slopes.point, rows, progress)
        good = np.isfinite(values) & (values > 0) & (values < 1e12)
        return np.where(good, np.log(np.where(good, values, 1.0)), np.nan), used >= 1.0

    @cached_property
    def log_metric_of_draws(self) -> np.ndarray:
        """log(metric) of each draw of the parameters, nan where it has none; empty without draws."""
        return self.log_metric(self.draws)[0] if self.paths else np.zeros(0)

    def deviation_of_draws(self) -> float | None:
        """Standard deviation of log(metric) over the draws of the parameters; None without."""
        found = self.log_metric_of_draws
        return finite(np.nanstd(found)) if np.isfinite(found).any() else None

    def told_by_draws(self) -> dict[str, float | None]:
        """The squared rank correlation (Spearman) of each parameter with the metric over the draws."""
        good = np.isfinite(self.log_metric_of_draws)
        if good.sum() < 8 or np.ptp(self.log_metric_of_draws[good]) == 0:
            return {}
        ranks = rankdata(self.draws[good][:, self.places[: len(self.paths)]], axis=0)
        own = rankdata(self.log_metric_of_draws[good])
        squares = [np.corrcoef(column, own)[0, 1] ** 2 for column in ranks.T]
        return dict(zip(self.names, map(finite, squares), strict=False))


def _inflated(known: Uncertainty) -> np.ndarray:
    factor = known.inflated / np.maximum(known.deviation, 1e-300)
    return known.covariance * np.outer(factor, factor)


def unknown_of(slopes: Slopes, deployment: FittedDeployment, spans: Mapping[str, float] | None = None) -> Unknown:
    """What is not known: of the fit, and the workload or configuration fields of ``spans`` [percent]. Errors:
    :class:`InputError` where there is nothing."""
    found = Unknown(slopes, deployment.uncertainty, spans or {})
    if not found.places.size:
        raise InputError(
            "global: got a model that does not tell how sure it is, and no span; allowed: a model fitted with this "
            "version of diffspec, or a span such as arrival_rate=10"
        )
    return found


def linear_shares(unknown: Unknown) -> dict[str, Any]:
    """``{"deviation", "deviation_of_draws", "shares": [{"name", "share", "alone", "told_by_draws"}]}``, largest
    share first; deviations are those of log(metric)."""
    if not unknown.slopes.moves:
        return {"deviation": None, "deviation_of_draws": None, "shares": []}
    slope = unknown.slopes.derivative[unknown.places] / unknown.slopes.value
    covariance = np.atleast_2d(np.cov(unknown.draws[:, unknown.places].T, ddof=0))
    fields = np.arange(len(unknown.paths), len(unknown.places))
    at = unknown.slopes.at[unknown.places[fields]]
    covariance[fields, fields] = at**2 * np.diag(unknown.covariance)[fields]
    along = covariance @ slope
    variance = float(slope @ along)
    scale = variance if variance > 0 else np.nan
    alone = slope**2 * np.diag(covariance)
    correlated = unknown.told_by_draws()
    rows = [
        {"name": name, "share": finite(share), "alone": finite(own), "told_by_draws": correlated.get(name)}
        for name, share, own in zip(unknown.names, slope * along / scale, alone / scale, strict=True)
    ]
    rows.sort(key=lambda row: -abs(row["share"] or 0.0))
    deviation = finite(np.sqrt(max(variance, 0.0)))
    return {"deviation": deviation, "deviation_of_draws": unknown.deviation_of_draws(), "shares": rows}


def global_indices(unknown: Unknown, points: int | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Sobol' indices of log(metric) (:mod:`diffspec.analysis.sobol`), largest total first, beside the linear shares.

    ``{"points", "evaluations", "used", "deviation", "saturated_share", "linear", "indices": [{"name", "first",
    "first_interval", "total", "total_interval"}]}``; ``deviation``: of log metric. Latencies of saturated points are
    those at 0.999 of capacity. ``points``: a power of two; ``progress`` is told the share of evaluations done. Errors:
    :class:`InputError` for another number.
    """
    if points is None:
        points = POINTS if unknown.slopes.metric.family == "means" else SLOW_POINTS
    if points < 8 or points > 2**16 or points & (points - 1):
        raise InputError(f"points: got {points}; allowed: a power of two from 8 to 65536")
    saturated = []

    def function(rows):
        values, beyond = unknown.log_metric(unknown.values(rows), progress)
        saturated.append(beyond[:points].mean())
        return values

    found = sobol_indices(function, unknown.covariance, points)
    rows = [
        {
            "name": name,
            "first": finite(found.first[i]),
            "first_interval": {"low": finite(found.first_edges[0, i]), "high": finite(found.first_edges[1, i])},
            "total": finite(found.total[i]),
            "total_interval": {"low": finite(found.total_edges[0, i]), "high": finite(found.total_edges[1, i])},
        }
        for i, name in enumerate(unknown.names)
    ]
    rows.sort(key=lambda row: -row["total"])
    return {
        "points": points,
        "evaluations": points * (1 + 2 * len(rows)),
        "used": found.used,
        "deviation": finite(found.deviation),
        "saturated_share": float(saturated[0]),
        "linear": linear_shares(unknown),
        "indices": rows,
    }


def overstated(deviation: float | None, of_draws: float | None, whose: str) -> list[str]:
    """A warning where ``whose`` deviation of log(metric) is not that of the draws, by more than half.

    >>> overstated(0.5, 0.1, "the tangent")[0][:50]
    'the tangent moves the metric by 50.0 % (one standa'
    >>> overstated(0.11, 0.1, "the tangent")
    []
    """
    if not deviation or not of_draws or 2 / 3 <= deviation / of_draws <= 1.5:
        return []
    told, of_all = f"{100 * deviation:.1f} %", f"{100 * of_draws:.1f} %"
    return [
        f"{whose} moves the metric by {told} (one standard deviation), the draws of the fit by {of_all}: parameters "
        "that the trace knows only together; trust the draws (told_by_draws)"
    ]
