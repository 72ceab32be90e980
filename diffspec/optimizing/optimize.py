"""The verb `optimize`: which draft length at which load, under limits, with proof by exhaustive evaluation."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import AbstractAcceptance
from diffspec.analysis.answers import QUEUEING
from diffspec.analysis.before_traces import DOES_NOT_FIT, Unmeasured
from diffspec.analysis.intervals import NO_INTERVALS, each
from diffspec.analysis.plain import enough_states, finite
from diffspec.configuration import Configuration, batch_cap
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.uncertainty import DRAWS
from diffspec.optimizing.batch_tables import schedule_length
from diffspec.optimizing.choice import best_static, choice_intervals, drawn_costs
from diffspec.optimizing.every_length import EveryLength
from diffspec.optimizing.flags import vllm_flags
from diffspec.optimizing.limits import MAXIMISED, costs, least
from diffspec.optimizing.question import read_question
from diffspec.optimizing.schedule import batch_schedule, latency_under_schedule
from diffspec.optimizing.servers import Server, prices, server_of
from diffspec.results import InputError
from diffspec.serving import MOST_STATES, ServingModel
from diffspec.staircase import StaircaseStepTime
from diffspec.workload import Workload, batched, check_range

OPTIMALITY_TOLERANCE = 1e-9


def optimize_unmeasured(subject: Unmeasured, **asked: Any) -> dict[str, Any]:
    """:func:`optimize` of what was not measured, with ``intervals`` of each load's draft length over the draws of what
    is not known, ``memory`` and ``assumptions``; outcome ``does_not_fit``, without a policy, where it does not fit."""
    answer = optimize(subject.deployment, server=server_of(subject), draws=subject.models(), **asked)
    if not subject.plan.fits:
        empty = {name: [] for name in ("policy", "table", "schedule", "schedule_vs_static")}
        flags = dict.fromkeys(answer["flags"])
        answer |= dict.fromkeys(("static_draft_length", "optimality_gap", "infeasible", "intervals"))
        answer |= empty | {"outcome": DOES_NOT_FIT, "flags": flags, "warnings": []}
    return answer | subject.told()


def optimize(
    deployment: FittedDeployment,
    *,
    loads: Sequence[float],
    loop: str = "arrival_rate",
    prompt_length: float,
    output_length: float,
    max_draft_length: int = 8,
    slo: Sequence[str] = (),
    objective: str = "e2e_mean",
    acceptance: AbstractAcceptance | None = None,
    max_batch_size: float | None = None,
    max_batched_tokens: float | None = None,
    output_scv: float = 0.0,
    prefix_hit_rate: float = 0.0,
    capture_sizes: Sequence[int] | None = None,
    drafter_params: float | None = None,
    draws: ServingModel | None = None,
    risk: float | None = None,
    cost_per_hour: float | Mapping[str, Any] | None = None,
    server: Server | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Best draft length at each load: relaxed over [1, K] with implicit gradients, rounded, checked exhaustively.

    * ``loads`` [req/s or req], increasing; ``loop``: ``arrival_rate`` (open) or ``concurrency`` (closed)
    * ``slo``: limits on means, ``"ttft_mean<0.5"`` (s), percentiles, ``"ttft_p95<0.5"`` (p50, p90, p95, p99 of ttft,
      tpot, itl, e2e), ``throughput``, ``goodput``, ``utilization``, ``energy``, ``cost`` and ``memory`` (GB of a device
      with the batch at its cap, :class:`diffspec.resources.MemoryUse`); ``"ttft<0.5"`` (of ttft, tpot, e2e): one that
      each request keeps or not, which goodput counts
    * ``objective``: one of those metrics but utilization; throughput and goodput [req/s] are made large, all others
      small. ``energy`` [J] and ``cost`` are per million output tokens, of one replica
    * ``cost_per_hour``: of a device, one number or by hardware (:func:`diffspec.optimizing.servers.prices`);
      ``server``: the replica of a deployment that was not measured
    * ``capture_sizes`` [tok]: batches that the engine pads to (CUDA graphs); the smooth relaxation is then rounded,
      checked and reported on that staircase (:class:`diffspec.staircase.StaircaseStepTime`)
    * k = 0 (no speculation) is a branch of its own, always compared, feasible or not like any other
    * ``draws``: serving models with a leading axis, drawn from what is not known; by default what the fit leaves open
    * ``risk`` [1]: choose by the cost that this share of the draws does not exceed, 0.9 say, where a draw that breaks a
      limit or saturates exceeds any; None: by the model as it is. Relaxation and schedule are of the model as it is

    Returns plain data: ``outcome`` (``successful`` when some load has a feasible draft length, else ``infeasible`` or
    ``saturated``), ``policy`` (ranges of loads with one draft length; metrics and headroom are those at load_to, the
    worst of the range), ``table`` (one entry per load), ``schedule`` ([[first_batch, last_batch, k], ...]),
    ``schedule_vs_static``, ``flags``, ``optimality_gap`` (relaxed and rounded over exhaustive, - 1, the largest over
    loads), ``static_draft_length``, ``infeasible`` (which limit fails by how much where nothing is feasible),
    ``intervals`` (:func:`diffspec.optimizing.choice.choice_intervals`; None with ``intervals_reason`` for a model
    without draws), and ``inside_measured`` and ``outside_measured`` (:mod:`diffspec.fitting.hull`) of each entry and,
    together, of all that have a draft length. Entries have ``chosen_probability``: that their draft length is the best,
    and ``risk_objective``: the objective that the share ``risk`` of draws does not exceed (throughput: does not miss).

    Errors: :class:`InputError` for unknown metrics, loads that do not increase, ranges, and what means nothing here
    (:func:`diffspec.optimizing.question.read_question`).
    """
    question = read_question(objective, slo, loop, loads, max_draft_length)
    limits = question.limits
    if output_length <= 1 and any(name.startswith(("tpot", "itl")) for name in question.metrics):
        raise InputError(
            f"output_length: got {output_length:g}, whose requests have no time per token after the first; allowed: "
            "more than 1 tok with objectives and limits on tpot and itl"
        )
    check_range("prompt_length", float(prompt_length), 0, 1e8, low_open=True, unit="tok")
    check_range("output_length", float(output_length), 1, 1e8, low_open=False, unit="tok")
    check_range("output_scv", float(output_scv), 0, 100, low_open=False, unit="(squared coefficient of variation)")
    check_range("risk", risk, 0, 1, low_open=True, unit="(share of the draws)")
    check_range("prefix_hit_rate", float(prefix_hit_rate), 0, 1, low_open=False, unit="(share of the prompt)")
    report = progress or (lambda what, share: None)
    config = deployment.configuration(
        float(max_draft_length),
        acceptance=acceptance,
        max_batch_size=max_batch_size,
        max_batched_tokens=max_batched_tokens,
        drafter_params=drafter_params,
    )
    config = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=float), config)
    count = len(loads)
    workloads = batched(
        Workload,
        prompt_length=np.full(count, float(prompt_length)),
        output_length=np.full(count, float(output_length)),
        arrival_scv=np.ones(count),
        output_scv=np.full(count, float(output_scv)),
        prefix_hit_rate=np.full(count, float(prefix_hit_rate)),
        **{loop: np.asarray(loads, dtype=float)},
    )
    smooth = enough_states(jax.tree.map(np.asarray, deployment.serving), workloads, config)
    serving = on_captured_sizes(smooth, capture_sizes)
    server = server or server_of(deployment, max_batched_tokens)
    price = prices([server], cost_per_hour)[0]
    every = EveryLength(question, max_draft_length, workloads, config, server, price, max_batched_tokens)
    report("every draft length", 0.1)
    metrics, saturated = every.values(serving)
    plain_known = deployment.plain_measured
    if not plain_known:  # what a server without its drafter would do was not measured: no candidate
        saturated = saturated | (np.arange(max_draft_length + 1) == 0)
    report("relaxed draft length", 0.4)
    relaxed = every.relaxed(smooth, metrics)
    report("how sure that is", 0.6)
    known = deployment.uncertainty if draws is None else None
    if known is not None:
        draws = known.models(deployment.serving, DRAWS)
    drawn = None
    if draws is not None:
        trimmed = (enough_states(model, workloads, config) for model in each(draws))
        found = every.drawn([on_captured_sizes(model, capture_sizes) for model in trimmed])
        drawn = drawn_costs(found, limits, objective, plain_known=plain_known)
    elif risk is not None:
        raise InputError(f"risk: got {risk:g}, but {NO_INTERVALS}")
    risky = None if risk is None or drawn is None else drawn.at_risk(risk)
    table = [
        _choose(
            float(load),
            {name: value[i] for name, value in metrics.items()},
            saturated[i],
            limits,
            objective,
            relaxed[i],
            None if risky is None else (risk, risky[0][i], risky[1][i]),
        )
        for i, load in enumerate(loads)
    ]
    fields = {"prompt_length": float(prompt_length), "output_length": float(output_length)}
    for entry in table:
        length = entry["draft_length"]
        entry |= deployment.hull(
            entry["nearest_draft_length"] if length is None else length, {loop: entry["load"]} | fields
        )
    varied = None
    if drawn is not None:
        chosen, is_open = [entry["draft_length"] for entry in table], loop == "arrival_rate"
        varied = choice_intervals(
            loads, chosen, drawn, is_open=is_open, plain_known=plain_known, known=known, objective=objective
        )
    for i, entry in enumerate(table):
        shares = {} if varied is None else varied["loads"][i]["probability_best"]
        entry["chosen_probability"] = shares.get(str(entry["draft_length"]))
    report("schedule over the batch", 0.8)
    one = jax.tree.map(lambda leaf: leaf[0], workloads)
    batches = schedule_length(config, one)
    schedule = batch_schedule(serving, one, config, max_draft_length, batches)
    static = best_static(metrics, saturated, limits, objective)
    report("done", 1.0)
    feasible = [entry for entry in table if entry["feasible"]]
    outcome = "successful" if feasible else "saturated" if saturated.all() else "infeasible"
    method, drafter = (deployment.defaults.get(name) for name in ("method", "drafter"))
    gaps = [entry["optimality_gap"] for entry in feasible if entry["optimality_gap"] is not None]
    return {
        "outcome": outcome,
        "objective": objective,
        "limits": [limit.text for limit in (*limits, *question.within)],
        "loop": loop,
        "risk": risk,
        "deployment": deployment.name,
        "policy": _merge(table),
        "table": table,
        "static_draft_length": static,
        "schedule": schedule.ranges,
        "schedule_vs_static": [
            {
                "load": entry["load"],
                "e2e_schedule": latency_under_schedule(schedule, entry["load"], loop),
                "e2e_static": None
                if static is None or saturated[i][static]
                else finite(metrics["e2e_mean"][i][static]),
                "e2e_policy": entry["metrics"]["e2e_mean"] if entry["feasible"] else None,
            }
            for i, entry in enumerate(table)
        ],
        "flags": vllm_flags(static or 0, schedule.ranges if feasible else [[1, batches, 0]], method, drafter),
        "optimality_gap": max(gaps) if gaps else None,
        "infeasible": None if feasible else table[0]["violations"],
        "intervals": varied,
        "intervals_reason": NO_INTERVALS if varied is None else None,
        **_hull_of(feasible or table),
        "warnings": _caveats(deployment, loads, loop, prompt_length, output_length, max_draft_length, acceptance)
        + _queueing(table, loop, config, one)
        + every.unknown(metrics),
    }


def on_captured_sizes(serving: ServingModel, capture_sizes: Sequence[int] | None) -> ServingModel:
    """The model on the staircase of an engine that pads its batches; as it is without sizes."""
    if capture_sizes is None:
        return serving
    return replace(serving, step_time=StaircaseStepTime(inner=serving.step_time, capture_sizes=tuple(capture_sizes)))


def _choose(load, metrics, saturated, limits, objective, relaxed, risky) -> dict[str, Any]:
    """The decision at one load, from the exact values at whole draft lengths 0..K; ``risky``: (risk, cost at that risk,
    share of draws that keep the limits)."""
    cost, worst, feasible = costs(metrics, saturated, limits, objective)
    if risky is not None:
        cost, feasible = risky[1], np.isfinite(risky[1])
    entry: dict[str, Any] = {"load": load, "feasible": bool(feasible.any()), "relaxed_draft_length": float(relaxed)}
    if not feasible.any():
        penalty = np.where(saturated, 1e6 + np.maximum(metrics["utilization"] - 1.0, 0.0), np.minimum(worst, 1e5))
        nearest = int(np.argmin(penalty)) if risky is None else int(np.argmax(risky[2]))
        broken: dict[str, Any] = {
            limit.text: limit.told(finite(metrics[limit.metric][nearest]))
            for limit in limits
            if saturated[nearest] or float(limit.excess(metrics[limit.metric][nearest])) > 0
        }
        if saturated[nearest]:
            broken = {
                "capacity": {
                    "value": finite(metrics["capacity"][nearest]),
                    "bound": load,
                    "shortfall": finite(load - metrics["capacity"][nearest]),
                }
            }
        if not broken and risky is None:  # no limit, but no request that counts: a goodput of 0, or a tail not known
            broken = {objective: {"value": finite(metrics[objective][nearest]), "bound": None}}
        if risky is not None:  # the share of draws that keep the limits, and what was asked for
            broken["risk"] = {"value": float(risky[2][nearest]), "bound": risky[0]}
        return entry | {
            "draft_length": None,
            "risk_objective": None,
            "nearest_draft_length": nearest,
            "metrics": {name: finite(value[nearest]) for name, value in metrics.items()}
            if not saturated[nearest]
            else {},
            "speedup": None,
            "headroom": None,
            "optimality_gap": None,
            "violations": broken,
        }
    exact = np.where(feasible, cost, np.inf)
    best = int(least(exact, metrics["e2e_mean"], objective))
    near = {math.floor(relaxed), math.ceil(relaxed), 0}
    rounded = min(near, key=lambda k: exact[k])
    judged = np.isfinite(exact[rounded]) and risky is None  # the relaxation knows no draws
    gap = float(np.expm1(exact[rounded] - exact[best])) if judged else None
    sign = -1.0 if objective in MAXIMISED else 1.0
    plain_known = not saturated[0]
    headroom = float(-np.expm1(worst[best])) if limits else float(1.0 - metrics["utilization"][best])
    return entry | {
        "draft_length": best,
        "rounded_draft_length": rounded,
        "risk_objective": None if risky is None else float(np.exp(sign * exact[best])),
        "metrics": {name: finite(value[best]) for name, value in metrics.items()},
        "speedup": float(metrics["e2e_mean"][0] / metrics["e2e_mean"][best]) if plain_known else None,
        "headroom": headroom,
        "optimality_gap": 0.0 if gap is not None and gap < OPTIMALITY_TOLERANCE else gap,
        "violations": {},
    }


def _merge(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring loads with the same decision as one range, outside what was measured where one of them is."""
    at_load_to = ("draft_length", "metrics", "speedup", "headroom", "violations", "chosen_probability")
    policy: list[dict[str, Any]] = []
    for _, group in itertools.groupby(table, key=lambda entry: entry["draft_length"]):
        entries = list(group)
        last = {name: entries[-1][name] for name in at_load_to}
        policy.append({"load_from": entries[0]["load"], "load_to": entries[-1]["load"]} | last | _hull_of(entries))
    return policy


def _hull_of(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether all of these lie inside what was measured, and what does not, each told once."""
    outside: list[dict[str, Any]] = []
    for entry in entries:
        outside += [told for told in entry["outside_measured"] if told not in outside]
    return {"inside_measured": not outside, "outside_measured": outside}


def _queueing(table, loop: str, config: Configuration, workload: Workload) -> list[str]:
    """The loads at which the chosen batch is near a cap for which waiting is not computed."""
    cap = batch_cap(workload, config)
    if loop != "arrival_rate" or cap is None or float(cap) <= MOST_STATES:
        return []
    near = []
    for entry in table:
        batch = entry["load"] * entry["metrics"]["e2e_mean"] if entry["feasible"] else 0.0
        if batch + 2.0 * batch**0.5 >= float(cap):
            near.append(f"{entry['load']:g}")
    return [f"at {', '.join(near)} req/s {QUEUEING}"] if near else []


def _caveats(deployment, loads, loop, prompt, output, longest, acceptance) -> list[str]:
    notes = []
    for load in (loads[0], loads[-1]):
        fields = {loop: load, "prompt_length": prompt, "output_length": output}
        notes += [note for note in deployment.caveats(longest, fields) if note not in notes]
    if not deployment.plain_measured:
        notes.append("no k = 0 row was fitted: draft_length 0 is no candidate and no speedup is told")
    if acceptance is None and deployment.mixed_acceptance:
        notes.append(deployment.mixed_acceptance)
    notes.append("limits are not checked under the schedule; compare schedule_vs_static before using it")
    notes.append("draft_length 0 inside a schedule keeps the drafter loaded: it may cost more than no drafter at all")
    if acceptance is None:
        notes.append(
            "acceptance is the deployment's own curve, measured at draft lengths "
            f"{', '.join(map(str, deployment.acceptance.draft_lengths))}"
            if deployment.acceptance
            else ""
        )
    return [note for note in notes if note]
