"""What a report page holds, as plain data: the fit, its quality, what it cannot tell, and where the sliders stand."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import stdtrit

from diffspec.browser.serving import OUTPUTS, parameter_order, parameter_values
from diffspec.configuration import Configuration, batch_cap
from diffspec.fitting.deployment import FittedDeployment, FittedModel, used_versions
from diffspec.fitting.evaluate import row_predictions
from diffspec.fitting.uncertainty import DRAWS, LEVEL, NOISE_POINTS
from diffspec.report.measured import ScoredPart, fitted_and_held_out
from diffspec.traces import Trace
from diffspec.workload import Workload

LONGEST = 8
ACCEPTANCE = 0.7
"""Where the acceptance slider stands at first."""
FACTS = ("verifier", "drafter", "method", "engine", "hardware")
OBSERVED = {"ttft_mean": "ttft", "itl_mean": "itl", "tpot_mean": "tpot", "e2e_mean": "e2e_latency"}


def page_data(
    model: FittedModel,
    deployment: FittedDeployment,
    trace: Trace | None = None,
    *,
    command: str = "",
    model_file: str = "",
    max_draft_length: int = LONGEST,
    all_rows: bool = False,
) -> dict[str, Any]:
    """The page of one deployment as plain data; with a ``trace`` its rows beside what the model predicts of them.

    Keys: ``deployment``, ``facts``, ``form``, ``measured``, ``plain_measured``, ``acceptance``, ``parameters``,
    ``quality``, ``untold``, ``warnings``, ``rows``, ``sliders`` (``min``, ``max``, ``step``, ``value``), ``outputs``,
    ``draws`` (what intervals are made of, None where the model does not tell how sure it is) and ``provenance``.
    """
    plain = deployment.to_dict()
    parts = [] if trace is None else _parts(model, deployment, trace, all_rows)
    return {
        "deployment": deployment.name,
        "facts": {name: str(deployment.defaults[name]) for name in FACTS if deployment.defaults.get(name)},
        "form": deployment.form,
        "measured": deployment.measured,
        "plain_measured": deployment.plain_measured,
        "acceptance": plain["acceptance"],
        "parameters": plain["parameters"],
        "quality": {name: value for name, value in deployment.quality.items() if name not in ("untold", "profiles")},
        "untold": [entry["words"] for entry in deployment.quality.get("untold", ())],
        "warnings": list(deployment.warnings),
        "rows": [row | {"part": part.label} for part in parts for row in row_predictions(deployment, part.scored)],
        "sliders": sliders(deployment, max_draft_length),
        "outputs": list(OUTPUTS),
        "draws": _draws(deployment),
        "provenance": {
            "command": command,
            "model_file": model_file,
            "model_sha256": hashlib.sha256(model.to_json().encode()).hexdigest(),
            "rows_sha256": model.rows_sha256,
            "fitted_with": model.versions,
            "made_with": used_versions(),
        },
    }


def _parts(model: FittedModel, deployment: FittedDeployment, trace: Trace, all_rows: bool) -> Sequence[ScoredPart]:
    """The deployment's rows; a trace of one deployment is that of a model of one, whatever their names."""
    if len(model.deployments) == 1 and len(set(trace.frame["deployment"])) == 1:
        trace = replace(trace, frame=trace.frame.assign(deployment=deployment.name))
    held_out = deployment.quality.get("holdout", {}).get("expression")
    return fitted_and_held_out(deployment, trace, held_out, all_rows=all_rows)


def _draws(deployment: FittedDeployment) -> dict[str, Any] | None:
    """``parameters`` [draws, parameters] as a page's functions take them, ``misfit`` by metric [log units] (that of an
    end-to-end latency that was not fitted is None: it follows from its parts), ``points`` of its law, ``level``."""
    known = deployment.uncertainty
    if known is None:
        return None
    models = known.models(deployment.serving, DRAWS)
    scales = {name: known.noise(column) for column, name in OBSERVED.items()}
    points = stdtrit(known.degrees_of_freedom, (np.arange(NOISE_POINTS) + 0.5) / NOISE_POINTS)
    return {
        "names": list(parameter_order(deployment.serving)),
        "parameters": [[float(f"{value:.12g}") for value in row] for row in parameter_values(models)],
        "misfit": {name: None if scale is None else float(scale) for name, scale in scales.items()},
        "points": points.tolist(),
        "level": LEVEL,
    }


def sliders(deployment: FittedDeployment, max_draft_length: int = LONGEST) -> dict[str, dict[str, float]]:
    """Range, step and first place of every slider: what was measured, and as far again. ``max_batch_size`` is there
    where the deployment has a batch cap. Loads reach beyond the largest capacity."""
    measured, cap = deployment.measured, deployment.defaults.get("max_batch_size")
    lengths = {name: measured.get(name) or [512.0, 512.0] for name in ("prompt_length", "output_length")}
    middle = {name: round(0.5 * (low + high)) for name, (low, high) in lengths.items()}
    drafted = [k for k in measured["draft_lengths"] if 0 < k <= max_draft_length]
    found = {
        "draft_length": _slider(0, max(max_draft_length, 1), 1, drafted[-1] if drafted else 0),
        "acceptance_rate": _slider(0, 1, 0.01, ACCEPTANCE),
        "prompt_length": _slider(1, nice(8 * lengths["prompt_length"][1]), 1, max(middle["prompt_length"], 1)),
        "output_length": _slider(1, nice(8 * lengths["output_length"][1]), 1, max(middle["output_length"], 1)),
    }
    rates, flights = measured.get("arrival_rate"), measured.get("concurrency")
    capacity = _capacity(deployment, middle)
    most = nice(max(1.5 * capacity if math.isfinite(capacity) else 0.0, 1.2 * (rates or [0, 1.0])[1]))
    step = nice(most / 400)
    start = 0.5 * sum(rates) if rates else 0.5 * capacity if math.isfinite(capacity) else 0.5 * most
    found["arrival_rate"] = _slider(step, most, step, max(round(start / step), 1) * step)
    start = round(0.5 * sum(flights)) if flights else 8
    found["concurrency"] = _slider(1, nice(max(2 * (flights or [1, 16])[1], 16)), 1, max(start, 1))
    if cap is not None:
        found["max_batch_size"] = _slider(1, nice(2 * cap), 1, round(cap))
    return found


def _slider(low: float, high: float, step: float, value: float) -> dict[str, float]:
    decimals = max(0, -math.floor(math.log10(step)) + 1)
    return {"min": low, "max": high, "step": step, "value": round(min(max(value, low), high), decimals)}


def _capacity(deployment: FittedDeployment, middle: Mapping[str, float]) -> float:
    """Capacity [req/s] without speculation at the lengths in the middle."""
    cap = deployment.defaults.get("max_batch_size")
    config = Configuration(max_batch_size=cap, kv_capacity_tokens=deployment.defaults.get("kv_capacity_tokens"))
    workload = Workload(middle["prompt_length"], middle["output_length"], arrival_rate=1.0)
    most = batch_cap(workload, config)
    batch = 1e6 if most is None else float(most)
    return batch / float(deployment.serving.residence_time(workload, config, batch))


def nice(value: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below ``value``.

    >>> nice(3.2), nice(0.004), nice(70.0)
    (5.0, 0.005, 100.0)
    """
    power = 10.0 ** math.floor(math.log10(value))
    return float(f"{next(m for m in (1, 2, 5, 10) if m * power >= value * (1 - 1e-9)) * power:.12g}")
