"""What moves a metric: exact elasticities d log(metric)/d log(input), through the equilibrium's implicit derivative."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from diffspec.analysis.before_traces import DOES_NOT_FIT, Unmeasured
from diffspec.analysis.inputs import WORKLOAD_UNITS, Inputs, Point, inputs_of
from diffspec.analysis.intervals import NO_INTERVALS, each, spread
from diffspec.analysis.metrics import EXPLAINED, Metric, metric_of, slopes_at
from diffspec.analysis.plain import as_floats, enough_states, finite
from diffspec.configuration import Configuration
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.uncertainty import DRAWS, LEVEL
from diffspec.prediction import Prediction
from diffspec.programs import program
from diffspec.results import InputError, outcome_name
from diffspec.serving import ServingModel
from diffspec.workload import Workload

Progress = Callable[[float], None]
"""Told the share that is done, from 0 to 1."""
SLOW_DRAWS = 16
"""Draws behind the intervals of percentiles and roots, which take their time one by one."""


class Slopes(NamedTuple):
    """A metric at a point: its ``value``, its derivative by each input's own value, and the prediction there."""

    metric: Metric
    inputs: Inputs
    point: Point
    at: Float[np.ndarray, "inputs"]
    value: float
    derivative: Float[np.ndarray, "inputs"]
    prediction: Prediction

    @property
    def moves(self) -> bool:
        """False where the metric has no logarithm, and so no elasticities: 0, unbounded or not there."""
        return finite(self.value) is not None and self.value > 0

    @property
    def ends(self) -> bool:
        """True where the server saturates: no steady state."""
        return outcome_name(self.prediction.result) == "saturated"

    @property
    def survives(self) -> bool:
        """True for a metric that a saturated server has, too."""
        return self.metric.family == "breakeven_rate" or self.metric.name in ("capacity", "utilization")

    @property
    def elasticities(self) -> Float[np.ndarray, "inputs"]:
        """d log(metric)/d log(input) [inputs]; 0 for an input at 0, nan where there is none."""
        if not self.moves:
            return np.full(len(self.at), np.nan)
        return np.where(self.at == 0, 0.0, self.derivative * self.at / self.value)

    def moved(self, values) -> "Slopes":
        """The same metric with inputs at other ``values`` [inputs]."""
        found = slopes_at(self.metric, self.inputs, self.point, values)
        return Slopes(self.metric, self.inputs, self.point, np.asarray(values), *found)


@program()
def _predict(point: Point) -> Prediction:
    return point.serving.predict(point.workload, point.config)


def find_slopes(serving: ServingModel, workload: Workload, config: Configuration, metric: str) -> Slopes:
    """The derivatives of ``metric`` at a point. Errors: :class:`InputError` for a metric that is not there."""
    if metric not in EXPLAINED:
        raise InputError(f"metric: got {metric!r}; allowed: {', '.join(EXPLAINED)}")
    point = Point(*(as_floats(part) for part in (serving, workload, config)))
    point = point._replace(serving=enough_states(*point))
    chosen = metric_of(metric, point, lambda: _predict(point))
    inputs = inputs_of(point, chosen.without)
    values = inputs.values(point)
    return Slopes(chosen, inputs, point, values, *slopes_at(chosen, inputs, point, values))


def sensitivity_unmeasured(
    subject: Unmeasured, workload: Workload, config: Configuration, metric: str = "e2e_mean"
) -> dict[str, Any]:
    """:func:`sensitivity` of what was not measured, over the draws of what is not known, with ``memory`` and
    ``assumptions``; without elasticities where it does not fit."""
    return sensitivity(subject.deployment, workload, config, metric, draws=subject.models()) | not_fitting(subject)


def not_fitting(subject: Unmeasured) -> dict[str, Any]:
    """What is told of something unmeasured: ``memory`` and ``assumptions``, and no numbers where it does not fit."""
    nothing = {"value": None, "outcome": DOES_NOT_FIT, "elasticities": [], "intervals": None}
    return ({} if subject.plan.fits else nothing) | subject.told()


def each_point(models: ServingModel, slopes: Slopes) -> Iterator[Point]:
    """The point of ``slopes`` by each of a batch of models; the first :data:`SLOW_DRAWS` where each takes its time."""
    for model in islice(each(models), None if slopes.metric.family == "means" else SLOW_DRAWS):
        yield slopes.point._replace(serving=enough_states(model, *slopes.point[1:]))


def slope_intervals(
    models: ServingModel, slopes: Slopes, names: Sequence[str], progress: Progress | None = None
) -> dict[str, Any]:
    """How sensitivities vary over a batch of models: ``elasticities[name]``, ``gradients[name]`` and ``value`` = low,
    median, high. The value of a draw that saturates is infinite."""
    drawn, count = [], jax.tree.leaves(models)[0].shape[0]
    count = count if slopes.metric.family == "means" else min(count, SLOW_DRAWS)
    for number, point in enumerate(each_point(models, slopes), start=1):
        drawn.append(slopes._replace(point=point).moved(slopes.inputs.values(point)))
        if progress is not None:
            progress(number / count)
    places = {name: place for place, name in enumerate(slopes.inputs.names)}
    elasticities, gradients = (np.array([getattr(s, of) for s in drawn]) for of in ("elasticities", "derivative"))
    values = [np.inf if s.ends and not s.survives else s.value for s in drawn]
    return {
        "level": LEVEL,
        "draws": len(drawn),
        "value": spread(values),
        "elasticities": {name: spread(elasticities[:, places[name]]) for name in names},
        "gradients": {name: spread(gradients[:, places[name]]) for name in names},
    }


def sensitivity(
    deployment: FittedDeployment,
    workload: Workload,
    config: Configuration,
    metric: str = "e2e_mean",
    *,
    draws: ServingModel | None = None,
) -> dict[str, Any]:
    """Elasticities of ``metric`` with respect to every parameter, workload and configuration field, largest first.

    ``metric``: a mean, a percentile, the capacity, the break-even rate or the best draft length
    (:data:`diffspec.analysis.metrics.EXPLAINED`). An elasticity of 0.7 says: 1 % more of the input gives 0.7 % more of
    the metric. Returns ``{"metric", "value", "outcome", "elasticities": [{"name", "kind", "elasticity", "value",
    "unit", "gradient"}], "warnings"}``, kind ``"parameter"``, ``"workload"`` or ``"configuration"``, the gradient that
    by the input's own value [metric/unit], which an input at 0 has too (its elasticity is 0); at a whole draft length
    measured curves bend, and the derivative is that from above; ``"intervals"`` (``"elasticities"``, ``"gradients"``,
    ``"value"``: ``"low"``, ``"median"``, ``"high"``) over ``draws``, by default of what the fit leaves open (parameters
    alone; None with ``"intervals_reason"`` for a model without draws);
    ``"inside_measured"`` and ``"outside_measured"`` (:mod:`diffspec.fitting.hull`). At saturation the value is None and
    the elasticities are those at 0.999 of capacity, with a warning. An elasticity that does not exist is None, and a
    warning says why: all of a metric that is 0, infinite or not there, and those that are not finite.
    Errors: :class:`InputError` for an unknown metric, and for one that is not there in this loop or configuration.
    """
    return explained(find_slopes(deployment.serving, workload, config, metric), deployment, draws=draws)


def explained(
    slopes: Slopes,
    deployment: FittedDeployment,
    *,
    draws: ServingModel | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The answer of :func:`sensitivity` from slopes that are known."""
    workload, config, metric = slopes.point.workload, slopes.point.config, slopes.metric.name
    units = slopes.inputs.units(slopes.point)
    columns = (slopes.inputs.names, slopes.inputs.kinds, slopes.elasticities, slopes.at, units, slopes.derivative)
    rows = [
        {
            "name": name,
            "kind": kind,
            "elasticity": finite(elasticity),
            "value": float(value),
            "unit": unit,
            "gradient": finite(gradient) if slopes.moves else None,
        }
        for name, kind, elasticity, value, unit, gradient in zip(*columns, strict=True)
    ]
    rows.sort(key=lambda row: -abs(row["elasticity"] or 0.0))
    outcome = outcome_name(slopes.prediction.result)
    asked = {name: float(getattr(workload, name)) for name in WORKLOAD_UNITS if getattr(workload, name) is not None}
    warnings = deployment.caveats(float(config.draft_length), asked)
    if outcome == "saturated":
        warnings.append("saturated: elasticities are those at 0.999 of capacity, where the load itself cannot move")
    if not slopes.moves:
        told = {"breakeven_rate": "no rate", "best_draft_length": "at a bound or at a kink, no stationary point"}
        said = "0" if slopes.value == 0 else told.get(metric, "unbounded")
        warnings.append(f"{metric} is {said} here, so nothing moves it by a percentage: there are no elasticities")
    elif missing := [row["name"] for row in rows if row["elasticity"] is None]:
        warnings.append(
            f"no elasticity (the derivative is not finite) for {', '.join(missing)}: {metric} has a kink there"
        )
    value = None if slopes.ends and not slopes.survives else finite(slopes.value)
    if draws is None and deployment.uncertainty is not None:
        draws = deployment.uncertainty.models(slopes.point.serving, DRAWS)
    told = None
    if draws is not None:
        known = [row["name"] for row in rows if row["elasticity"] is not None]
        told = slope_intervals(draws, slopes, known, progress)
    return {
        "metric": metric,
        "value": value,
        "outcome": outcome,
        "elasticities": rows,
        "intervals": told,
        "intervals_reason": NO_INTERVALS if told is None else None,
        **deployment.hull(float(config.draft_length), asked),
        "warnings": warnings,
    }
