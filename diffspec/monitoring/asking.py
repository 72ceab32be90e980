"""What the fitted model says of a window: latencies with intervals, stages, headroom, and the best draft length now.

All draws of what the fit leaves open, all draft lengths and the loads that chance could have made of the window's are
evaluated by one compiled program, so that a window costs milliseconds.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import PositionAcceptance
from diffspec.analysis.intervals import misfit, spread
from diffspec.analysis.plain import as_floats, enough_states, finite
from diffspec.configuration import Configuration
from diffspec.fitting.deployment import FittedDeployment
from diffspec.monitoring.windows import LATENCIES, Window
from diffspec.prediction import STAGES
from diffspec.programs import program
from diffspec.results import RESULTS
from diffspec.serving import ServingModel
from diffspec.workload import Workload

DRAWS = 32
"""Draws of what the fit leaves open behind every interval of a window."""
ASSUMED_MISFIT = 0.1
"""Standard deviation [log units] of measured around predicted where the model does not tell its own: judgement."""
NORMAL = 1e9
"""Degrees of freedom of a t distribution that is normal."""
_TOLD = (*LATENCIES, "effective_batch_size", "utilization", "capacity")


@dataclass(frozen=True)
class Expected:
    """What the model says of a window.

    ``answer``: plain data for people and JSON; ``log_ratio[metric]``: log(measured/predicted); ``unsure[metric]``: the
    standard deviation of log predictions over the draws; ``noise[metric]``: the scale of what a window scatters around
    them [log units], see :func:`expected`; ``degrees_of_freedom`` of that noise.
    """

    answer: dict[str, Any]
    log_ratio: dict[str, float]
    unsure: dict[str, float]
    noise: dict[str, float]
    degrees_of_freedom: float


def padded(rates: tuple[float, ...] | None) -> PositionAcceptance:
    """Acceptance of a measured curve, always of 32 positions, so that one program serves all; the last rate repeats."""
    known = list(rates or (0.5,))[:32]
    return PositionAcceptance(jnp.asarray(known + known[-1:] * (32 - len(known)), dtype=float))


def expected(
    deployment: FittedDeployment,
    seen: Window,
    draft_length: float,
    window_rates: tuple[float, ...] | None,
    known_rates: tuple[float, ...] | None,
    max_draft_length: int,
    *,
    closed_loop: bool = False,
) -> Expected:
    """Ask ``deployment`` at the operating point of ``seen``.

    Latencies at ``draft_length`` are asked at the window's own acceptance ``window_rates``, so that a residual is about
    time, not acceptance; draft lengths are compared at ``known_rates``, what all windows tell. Without speculation
    both may be None: no draft length is then compared.

    The scale of a residual's noise is

        sqrt(misfit(requests)^2 + (d log metric / d log load)^2 / requests)

    the fit's own misfit of a mean over the window's requests, and what the load of the window scatters by chance (a
    count of n Poisson arrivals has a relative standard deviation of 1/sqrt(n)), by the model's slope there.
    """
    measured = {metric: float(seen.row[column]) for metric, column in LATENCIES.items() if column in seen.row}
    load = float(seen.row["arrival_rate"])
    if closed_loop:
        batch = seen.row.get("effective_batch_size") or (seen.running or 0.0) + (seen.waiting or 0.0)
        load = max(float(batch), 1.0)
    prompt, output = float(seen.row.get("prompt_length", np.nan)), float(seen.row.get("output_length", np.nan))
    loop = "concurrency" if closed_loop else "arrival_rate"
    output = max(output, 1.0)
    workload = as_floats(Workload(prompt_length=prompt, output_length=output, **{loop: load}))
    config = _configuration(deployment, draft_length, window_rates)
    longest = max(max_draft_length, int(draft_length))
    known = deployment.uncertainty
    models = None if known is None else known.models(deployment.serving, DRAWS)
    step = min(1.0 / np.sqrt(max(seen.requests, 1.0)), 0.5)
    around = load * np.exp(np.asarray([0.0, -step, step]))
    curve = padded(known_rates or window_rates)
    point, lengths = _ask(deployment, models, workload, config, curve, around, longest)
    fitted = {name: values[0] for name, values in point.items()}  # [loads]
    saturated = bool(fitted["saturated"][0])
    told: dict[str, Any] = {"outcome": "saturated" if saturated else "successful"}
    share = float(fitted["ttft"][0] / fitted["e2e_latency"][0])
    scales = _scales(deployment, not closed_loop, share, np.inf)
    for name in _TOLD:
        latency = name in LATENCIES or name == "effective_batch_size"
        values = np.where(point["saturated"][1:, 0], np.inf, point[name][1:, 0]) if latency else point[name][1:, 0]
        edges = {"low": None, "high": None}
        if known is not None and scales[name] is not None:
            edges = spread(values, known, float(scales[name] or 0.0))
        value = None if latency and saturated else finite(fitted[name][0])
        told[name] = {"value": value, "low": edges["low"], "high": edges["high"]}
    parts = {stage: float(fitted[stage][0]) for stage in STAGES}
    total = sum(parts.values())
    told["stages"] = None if saturated else {stage: part / total for stage, part in parts.items()}
    told["headroom"] = finite(1.0 - fitted["utilization"][0])
    told["draft_length"] = None
    if draft_length == 0 or known_rates is not None or window_rates is not None:
        told["draft_length"] = _best(deployment, lengths, draft_length, known_rates or window_rates)
    asked = {loop: load, "prompt_length": prompt, "output_length": output}
    told |= deployment.hull(float(draft_length), asked)
    if told["draft_length"] is not None and told["draft_length"]["best"] is not None:
        inside = deployment.hull(float(told["draft_length"]["best"]), asked)["inside_measured"]
        told["draft_length"]["inside_measured"] = inside
    sampled = _scales(deployment, not closed_loop, share, seen.requests)
    ratios, unsure, noise = {}, {}, {}
    for metric, value in measured.items():
        if saturated or not value > 0:
            continue
        ratios[metric] = float(np.log(value / fitted[metric][0]))
        draws = point[metric][1:, 0][~point["saturated"][1:, 0]]
        unsure[metric] = float(np.std(np.log(draws))) if draws.size > 1 else 0.0
        kept = [float(np.log(fitted[metric][i] / fitted[metric][0])) for i in (1, 2) if not fitted["saturated"][i]]
        by_chance = float(np.mean(np.abs(kept))) if kept and not closed_loop else 0.0
        own = sampled[metric]
        noise[metric] = float(np.hypot(ASSUMED_MISFIT if own is None else own, by_chance))
    freedom = NORMAL if known is None else known.degrees_of_freedom
    return Expected(told, ratios, unsure, noise, freedom)


def _scales(deployment: FittedDeployment, is_open: bool, ttft_share: float, requests: float) -> dict[str, float | None]:
    if deployment.uncertainty is None:
        return dict.fromkeys(_TOLD, ASSUMED_MISFIT)
    return misfit(deployment.uncertainty, is_open=is_open, ttft_share=ttft_share, requests=requests)


def _configuration(deployment: FittedDeployment, draft_length: float, rates) -> Configuration:
    """The deployment's, with numbers at every leaf; without speculation the acceptance is never looked at."""
    config = deployment.configuration(max(float(draft_length), 1.0), acceptance=padded(rates))
    return as_floats(eqx.tree_at(lambda c: c.draft_length, config, float(draft_length)))


def _ask(deployment: FittedDeployment, models, workload: Workload, config: Configuration, curve, loads, longest: int):
    """(the measured configuration [1 + draws, loads], draft lengths 0..longest [1 + draws, longest + 1]) by metric; the
    first model is the fitted one."""
    serving = as_floats(deployment.serving)
    drawn = models or jax.tree.map(lambda leaf: np.zeros((0, *np.shape(leaf))), serving)
    stacked = jax.tree.map(lambda one, many: np.concatenate([np.asarray(one)[None], np.asarray(many)]), serving, drawn)
    states = enough_states(serving, workload, config).waiting_states
    compared = eqx.tree_at(lambda c: c.acceptance, config, as_floats(curve))
    numbers = np.arange(longest + 1, dtype=float)
    found = _evaluate(states, stacked, workload, config, compared, np.asarray(loads, dtype=float), numbers)
    point, lengths = jax.tree.map(np.asarray, found)
    return point, lengths


@program(0)
def _evaluate(states: int, models: ServingModel, workload: Workload, config, compared, loads, lengths):
    where = (lambda w: w.arrival_rate) if workload.is_open else (lambda w: w.concurrency)

    def told(model, load, asked):
        found = model.predict(eqx.tree_at(where, workload, load), asked)
        parts = {stage: part.load_independent + part.load_dependent for stage, part in found.decomposition.items()}
        metrics = {name: getattr(found, name) for name in _TOLD}
        return metrics | parts | {"saturated": found.result == RESULTS.saturated}

    def one(model):
        model = dataclasses.replace(model, waiting_states=states)
        point = jax.vmap(lambda load: told(model, load, config))(loads)
        at = eqx.filter_vmap(lambda k: told(model, loads[0], eqx.tree_at(lambda c: c.draft_length, compared, k)))
        return point, at(lengths)

    return jax.vmap(one)(models)


def _best(deployment: FittedDeployment, lengths: dict[str, np.ndarray], now: float, rates) -> dict[str, Any]:
    """The draft length with the smallest mean end-to-end latency at this load, and what it gains over the present one:
    latency now / latency at the best, - 1, with the central 90 % over the draws. No speculation is a candidate only
    where rows without were fitted; longer drafts than none only where acceptance is known."""
    latency = np.where(lengths["saturated"], np.inf, lengths["e2e_latency"])  # [1 + draws, k]
    allowed = np.ones(latency.shape[1], dtype=bool)
    allowed[0] = deployment.plain_measured or now == 0
    allowed[1:] = rates is not None
    costs = np.where(allowed, latency, np.inf)
    if not np.isfinite(costs[0]).any():
        nothing = dict.fromkeys(("best", "gain", "low", "high", "probability_best", "inside_measured"))
        return {"now": now} | nothing
    best = int(np.argmin(costs[0]))
    place = int(now)
    with np.errstate(invalid="ignore", divide="ignore"):
        gains = latency[:, place] / latency[:, best] - 1.0
    edges = spread(gains[1:]) if len(gains) > 1 else {"low": None, "high": None}
    wins = float(np.mean(np.argmin(costs[1:], axis=1) == best)) if len(gains) > 1 else None
    told = {"now": now, "best": best, "gain": finite(gains[0]), "low": edges["low"], "high": edges["high"]}
    return told | {"probability_best": wins}
