"""What moves a metric: exact elasticities d log(metric)/d log(input), through the equilibrium's implicit derivative."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.analysis.answers import METRICS
from diffspec.analysis.before_traces import DOES_NOT_FIT, Unmeasured
from diffspec.analysis.intervals import NO_INTERVALS, each, spread
from diffspec.analysis.plain import FAST_COMPILE, as_floats, enough_states, finite
from diffspec.configuration import Configuration
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.uncertainty import DRAWS, LEVEL
from diffspec.parameters import get_parameters, parameter_infos, set_parameters
from diffspec.results import InputError, outcome_name
from diffspec.serving import ServingModel
from diffspec.workload import Workload

WORKLOAD_UNITS = {
    "arrival_rate": "req/s",
    "concurrency": "req",
    "prompt_length": "tok",
    "output_length": "tok",
    "arrival_scv": "1",
}


@partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def _elasticities(metric: str, serving: ServingModel, workload: Workload, config: Configuration):
    def log_metric(log_parameters, log_fields):
        model = set_parameters(serving, {path: jnp.exp(value) for path, value in log_parameters.items()})
        fields = {name: jnp.exp(value) for name, value in log_fields.items()}
        load = replace(workload, **fields)
        prediction = model.predict(load, config)
        return jnp.log(getattr(prediction, METRICS[metric])), prediction

    fields = {name: getattr(workload, name) for name in WORKLOAD_UNITS if getattr(workload, name) is not None}
    logs = (jax.tree.map(jnp.log, get_parameters(serving)), jax.tree.map(jnp.log, fields))
    gradients, prediction = jax.grad(log_metric, argnums=(0, 1), has_aux=True)(*logs)
    return gradients, prediction


def sensitivity_unmeasured(
    subject: Unmeasured, workload: Workload, config: Configuration, metric: str = "e2e_mean"
) -> dict[str, Any]:
    """:func:`sensitivity` of what was not measured, over the draws of what is not known, with ``memory`` and
    ``assumptions``; without elasticities where it does not fit."""
    answer = sensitivity(subject.deployment, workload, config, metric, draws=subject.models())
    if not subject.plan.fits:
        nothing = {"value": None, "outcome": DOES_NOT_FIT, "elasticities": [], "intervals": None}
        return answer | nothing | subject.told()
    return answer | subject.told()


def slope_intervals(
    models: ServingModel, workload: Workload, config: Configuration, metric: str, names: Sequence[str]
) -> dict[str, Any]:
    """How elasticities vary over a batch of models: ``elasticities[name]`` = low, median, high."""
    trimmed = (enough_states(model, workload, config) for model in each(models))
    found = [_elasticities(metric, model, workload, config)[0] for model in trimmed]
    slopes = {
        name.removeprefix("step_time."): [float(draw[group][name]) for draw in found]
        for group in (0, 1)
        for name in found[0][group]
    }
    return {"level": LEVEL, "draws": len(found), "elasticities": {name: spread(slopes[name]) for name in names}}


def sensitivity(
    deployment: FittedDeployment,
    workload: Workload,
    config: Configuration,
    metric: str = "e2e_mean",
    *,
    draws: ServingModel | None = None,
) -> dict[str, Any]:
    """Elasticities of ``metric`` with respect to every positive parameter and workload field, largest first.

    An elasticity of 0.7 says: 1 % more of the input gives 0.7 % more of the metric. Returns ``{"metric", "value",
    "outcome", "elasticities": [{"name", "kind", "elasticity", "value", "unit"}], "warnings"}``, kind ``"parameter"`` or
    ``"workload"``; ``"intervals"`` over ``draws``, by default of what the fit leaves open (parameters alone; None with
    ``"intervals_reason"`` for a model without draws); ``"inside_measured"`` and ``"outside_measured"``
    (:mod:`diffspec.fitting.hull`). At saturation the value is None and the elasticities are those at 0.999 of
    capacity, with a warning. An elasticity that does not exist is None, and a warning says why: all of a metric that is
    0 or infinite, and those that are not finite.
    Errors: :class:`InputError` for an unknown metric.
    """
    if metric not in METRICS:
        raise InputError(f"metric: got {metric!r}; allowed: {', '.join(METRICS)}")
    values = {path: float(value) for path, value in get_parameters(deployment.serving).items()}
    moving = {path: value for path, value in values.items() if value > 0}  # log coordinates; 0 is switched off
    serving = set_parameters(deployment.serving, {path: np.asarray(value) for path, value in values.items()})
    workload, config = (as_floats(part) for part in (workload, config))
    serving = enough_states(serving, workload, config)
    (by_parameter, by_field), prediction = _elasticities(metric, serving, workload, config)
    infos = parameter_infos(deployment.serving)
    found = float(getattr(prediction, METRICS[metric]))
    moves = finite(found) is not None and found > 0  # else it has no logarithm, and no slope of that
    rows = [
        {
            "name": path.removeprefix("step_time."),
            "kind": "parameter",
            "elasticity": finite(by_parameter[path]) if moves else None,
            "value": value,
            "unit": infos[path].unit,
        }
        for path, value in moving.items()
    ]
    for name, slope in by_field.items():
        value = float(getattr(workload, name))
        if value > 0:
            entry = {"elasticity": finite(slope) if moves else None, "value": value, "unit": WORKLOAD_UNITS[name]}
            rows.append({"name": name, "kind": "workload"} | entry)
    rows.sort(key=lambda row: -abs(row["elasticity"] or 0.0))
    outcome = outcome_name(prediction.result)
    asked = {name: float(getattr(workload, name)) for name in WORKLOAD_UNITS if getattr(workload, name) is not None}
    warnings = deployment.caveats(float(config.draft_length), asked)
    if outcome == "saturated":
        warnings.append("saturated: elasticities are those at 0.999 of capacity, where the load itself cannot move")
    if not moves:
        told = "0" if found == 0 else "unbounded"
        warnings.append(f"{metric} is {told} here, so nothing moves it by a percentage: there are no elasticities")
    elif missing := [row["name"] for row in rows if row["elasticity"] is None]:
        warnings.append(
            f"no elasticity (the derivative is not finite) for {', '.join(missing)}: {metric} has a kink there"
        )
    value = None if outcome == "saturated" else finite(found)
    if draws is None and deployment.uncertainty is not None:
        draws = deployment.uncertainty.models(serving, DRAWS)
    told = None
    if draws is not None:
        names = [row["name"] for row in rows if row["elasticity"] is not None]
        told = slope_intervals(draws, workload, config, metric, names)
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
