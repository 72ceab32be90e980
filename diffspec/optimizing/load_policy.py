"""The verb `policy`: the draft length as a function of load, in the engines' own form, a schedule over the batch.

A schedule reacts to the batch at hand, so it is right at loads that nobody foresaw; what it gives at given loads is the
equilibrium under it (:mod:`diffspec.optimizing.under_schedule`), compared there with no speculation and with one draft
length. Limits are checked under the schedule. It is chosen over draws of what is not known
(:mod:`diffspec.optimizing.robust_choice`), its tiers are worth having, and its thresholds have bands
(:mod:`diffspec.optimizing.tiers`).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import AbstractAcceptance
from diffspec.analysis.before_traces import DOES_NOT_FIT, Unmeasured
from diffspec.analysis.intervals import NO_INTERVALS, each
from diffspec.analysis.plain import as_floats
from diffspec.configuration import Configuration
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.uncertainty import DRAWS, LEVEL
from diffspec.optimizing.batch_tables import BatchTables, batch_tables, schedule_length
from diffspec.optimizing.limits import check_question, parse_limit
from diffspec.optimizing.optimize import on_captured_sizes
from diffspec.optimizing.policy_answer import (
    Asked,
    PolicyAnswer,
    add_break_even,
    advice,
    band_entries,
    gain_entry,
    lengths_of,
    load_entries,
    off_above,
    tier_entries,
)
from diffspec.optimizing.robust_choice import (
    BROKEN,
    FINER,
    Risk,
    best,
    best_worth_having,
    candidates,
    judge,
    limit_excess,
    log_costs,
    parse_risk,
    plain_log_costs,
    risk_costs,
)
from diffspec.optimizing.schedule import ranges_of
from diffspec.optimizing.under_schedule import UnderSchedule, under_schedules
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.workload import Workload, check_range, held_tokens

SHARES = tuple(round(0.1 * part, 1) for part in range(1, 10))
"""Loads, as shares of the largest capacity, where none are given."""


def policy_unmeasured(subject: Unmeasured, **asked: Any) -> dict[str, Any]:
    """:func:`policy` of what was not measured, over the draws of what is not known, with ``memory`` and
    ``assumptions``; outcome ``does_not_fit``, without a schedule, where it does not fit."""
    if not subject.plan.fits:
        told = {"outcome": DOES_NOT_FIT, "deployment": subject.deployment.name, "contexts": [], "warnings": []}
        return told | subject.told()
    return policy(subject.deployment, draws=subject.models(), **asked) | subject.told()


def policy(
    deployment: FittedDeployment,
    *,
    loads: Sequence[float] | None = None,
    loop: str = "arrival_rate",
    prompt_length: float | None = None,
    output_length: float,
    context_lengths: Sequence[float] = (),
    max_draft_length: int = 8,
    slo: Sequence[str] = (),
    objective: str = "e2e_mean",
    risk: str | float | int = "mean",
    forbid_zero: bool = False,
    min_gain: float = 0.01,
    min_width: int = 1,
    hysteresis: float | int | None = None,
    acceptance: AbstractAcceptance | None = None,
    max_batch_size: float | None = None,
    max_batched_tokens: float | None = None,
    output_scv: float = 0.0,
    prefix_hit_rate: float = 0.0,
    capture_sizes: Sequence[int] | None = None,
    drafter_params: float | None = None,
    draws: ServingModel | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """A schedule over the batch, the gain that it is expected to have, and when to fall back to no speculation.

    * ``loads`` [req/s or req], increasing; in an open loop by default 0.1 to 0.9 of the largest capacity
    * ``context_lengths`` [tok]: one schedule for each, of running requests that hold so many cached tokens on average,
      prompt_length = context - output_length*(1 + output_scv)/2; otherwise one schedule for ``prompt_length``
    * ``risk``: ``mean`` minimises the expectation of the objective over the draws of what the fit leaves open (what a
      Bayes decision minimises, and the default), 0.9 that quantile, ``point`` the objective at the fitted parameters
      (all there is for a model without draws)
    * ``forbid_zero``: no tier without drafts (engines whose drafter goes stale); ``min_gain`` [1], ``min_width``
      [req]: what a tier must be worth over its neighbours; ``hysteresis`` [req]: half width of the bands around
      thresholds, 0 for none, by default one standard deviation of the batch as far as it costs less than ``min_gain``
    * ``slo``, ``objective``, ``capture_sizes``, ``draws``: as in :func:`diffspec.optimizing.optimize.optimize`

    Returns plain data. ``contexts`` has an entry for each context length: ``schedule`` ([[first_batch, last_batch, k],
    ...]), ``off_above`` (the last batch to speculate at; 0: at none; None: no end), ``tiers`` (gain over no speculation
    and over the best one draft length at their batches, break-even acceptance, share of draws in which their draft
    length is the best), ``bands``, ``loads`` (metrics under the schedule and their speedups), ``static_draft_length``,
    ``gain`` (geometric means over the loads) and ``advice`` in words. Intervals are the central 90 % over draws.

    Errors: :class:`InputError` for unknown metrics, loads that do not increase, or ranges.
    """
    if loads is None and loop == "concurrency":
        raise InputError("concurrency: got no load; allowed: at least one, in a closed loop")
    check_question(objective, loop, [1.0] if loads is None else loads, max_draft_length)
    check_range("output_length", float(output_length), 1, 1e8, low_open=False, unit="tok")
    check_range("min_gain", float(min_gain), 0, 10, low_open=False, unit="(share of the latency)")
    check_range("min_width", float(min_width), 1, 1e6, low_open=False, unit="req")
    check_range("hysteresis", hysteresis, 0, 1e6, low_open=False, unit="req")
    told_risk = parse_risk(risk)
    own = draws is None
    if draws is None and deployment.uncertainty is not None:
        draws = deployment.uncertainty.models(deployment.serving, DRAWS)
    if draws is None:
        told_risk = Risk("point")
    config = deployment.configuration(
        float(max_draft_length),
        acceptance=acceptance,
        max_batch_size=max_batch_size,
        max_batched_tokens=max_batched_tokens,
        drafter_params=drafter_params,
    )
    config = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=float), config)
    asked = Asked(
        loads=loads,
        loop=loop,
        output_length=float(output_length),
        max_draft_length=max_draft_length,
        limits=tuple(parse_limit(text) for text in slo),
        objective=objective,
        risk=told_risk,
        forbid_zero=forbid_zero or not deployment.plain_measured,
        min_gain=float(min_gain),
        min_width=int(min_width),
        hysteresis=None if hysteresis is None else float(hysteresis),
        workload_fields={"output_scv": float(output_scv), "prefix_hit_rate": float(prefix_hit_rate)},
    )
    report = progress or (lambda what, share: None)
    buckets = _buckets(prompt_length, context_lengths, float(output_length), float(output_scv))
    contexts = []
    for place, (context, prompt) in enumerate(buckets):

        def share(what: str, part: float, place=place) -> None:
            report(what, (place + part) / len(buckets))

        entry = _schedule_for(deployment, config, prompt, asked, draws, capture_sizes, share)
        contexts.append({"context_length": context} | entry)
    entries = [load for context in contexts for load in context["loads"]]
    outcome = "infeasible"
    if any(load["feasible"] for load in entries):
        outcome = "successful"
    elif all(load["saturated"] for load in entries):
        outcome = "saturated"
    outside: list[dict[str, Any]] = []
    for load in entries:
        outside += [told for told in load.pop("outside_measured") if told not in outside]
    told = {
        "outcome": outcome,
        "objective": objective,
        "limits": [limit.text for limit in asked.limits],
        "loop": loop,
        "deployment": deployment.name,
        "risk": told_risk.text,
        "draws": None if draws is None else jax.tree.leaves(draws)[0].shape[0],
        "level": LEVEL,
        "intervals_reason": NO_INTERVALS if draws is None and own else None,
        "forbid_zero": asked.forbid_zero,
        "min_gain": asked.min_gain,
        "min_width": asked.min_width,
        "contexts": contexts,
        "inside_measured": not outside,
        "outside_measured": outside,
        "warnings": _caveats(deployment, contexts, asked, acceptance),
    }
    return PolicyAnswer(told)


def _buckets(prompt, contexts, output: float, scv: float) -> list[tuple[float | None, float]]:
    """(context length or None, prompt length) of each schedule."""
    if not len(contexts):
        if prompt is None:
            raise InputError("prompt_length: got none; allowed: a prompt length, or context_lengths")
        check_range("prompt_length", float(prompt), 0, 1e8, low_open=True, unit="tok")
        return [(None, float(prompt))]
    held = held_tokens(0.0, output, scv)
    ordered = sorted(float(context) for context in contexts)
    if ordered[0] <= held or len(set(ordered)) < len(ordered):
        raise InputError(
            f"context_lengths: got {[f'{context:g}' for context in contexts]}; allowed: different lengths, each above "
            f"{held:g} tok, half of what a running request has emitted"
        )
    return [(context, context - held) for context in ordered]


def _schedule_for(
    deployment: FittedDeployment,
    config: Configuration,
    prompt: float,
    asked: Asked,
    draws: ServingModel | None,
    capture_sizes: Sequence[int] | None,
    report: Callable[[str, float], None],
) -> dict[str, Any]:
    """The entry of one context length."""
    fields = {"prompt_length": prompt, "output_length": asked.output_length} | asked.workload_fields
    workload = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype=float),
        Workload(**fields, **{asked.loop: asked.loads[0] if asked.loads else 1.0}),
    )
    batches = schedule_length(config, workload)

    def tables_of(model: ServingModel) -> BatchTables:
        model = on_captured_sizes(model, capture_sizes)
        return batch_tables(model, workload, config, asked.max_draft_length, batches)

    report("every draft length at every batch", 0.05)
    centre = tables_of(as_floats(deployment.serving))
    models = [] if draws is None else list(each(draws))
    drawn = []
    for place, model in enumerate(models):
        drawn.append(tables_of(model))
        report("every draft length at every batch", 0.1 + 0.4 * place / len(models))
    point = log_costs(centre, asked.objective)
    costs = np.stack([log_costs(tables, asked.objective) for tables in drawn]) if drawn else point[None]
    cost = point if asked.risk.kind == "point" else risk_costs(costs, asked.risk)
    loads = np.asarray(_default_loads(centre) if asked.loads is None else asked.loads, dtype=float)
    tables = [cost, point]
    if asked.limits:
        tables.append(cost + BROKEN * limit_excess(centre, asked.limits, asked.output_length))
    weight, more = _weight(centre, point, loads, asked), {"capped": bool(asked.limits), "min_width": asked.min_width}
    found, *finer = (
        candidates(tables, asked.lengths, weight=weight, min_gain=part * asked.min_gain, **more)
        for part in (1.0, *FINER)
    )
    statics = [np.full(batches, k) for k in range(asked.max_draft_length + 1)]
    both = np.stack([*found, *statics, *itertools.chain(*finer)])

    def under(tables: BatchTables) -> UnderSchedule:
        return under_schedules(tables, both, loads, asked.loop, asked.output_length)

    at_centre = under(centre)
    under_draws = []
    for place, tables in enumerate(drawn):
        under_draws.append(under(tables))
        report("latency under schedules", 0.5 + 0.35 * place / len(drawn))
    by_risk = [at_centre] if asked.risk.kind == "point" else under_draws
    judged = judge(by_risk, asked.limits, asked.objective, asked.risk)
    after = range(len(found) + len(statics), len(both))
    chosen = best_worth_having(judged, both, range(len(found)), after, asked.min_gain)
    static = best(judged, [len(found) + k for k in asked.lengths])
    plain = len(found)  # k = 0 at every batch
    schedule = both[chosen]
    report("break-even acceptance", 0.9)
    plains = [plain_log_costs(tables, asked.objective) for tables in (centre, *drawn)]
    tiers = tier_entries(schedule, point, costs if drawn else None, both[static], plains, deployment.plain_measured)
    add_break_even(tiers, [deployment.serving, *models], workload, config)
    drafting = point[1:].min(axis=0) - plains[0]
    bands = band_entries(schedule, cost, centre, costs if drawn else None, asked)
    entries = load_entries(
        deployment, asked, fields, loads, schedule, at_centre, under_draws, judged, (chosen, static, plain)
    )
    static_length = int(both[static][0])
    gains = gain_entry([at_centre, *under_draws], (chosen, static, plain), deployment.plain_measured, judged)
    return {
        "prompt_length": prompt,
        "output_length": asked.output_length,
        "cached_tokens": held_tokens(prompt, asked.output_length, asked.workload_fields["output_scv"]),
        "batches": batches,
        "schedule": ranges_of(schedule),
        "off_above": off_above(schedule),
        "static_draft_length": static_length,
        "tiers": tiers,
        "bands": bands,
        "loads": entries,
        "gain": gains,
        "advice": advice(schedule, static_length, gains, tiers, entries, drafting, bool(asked.limits)),
    }


def _default_loads(tables: BatchTables) -> list[float]:
    last = tables.kept[-1]
    return [share * float(np.max(tables.sizes[last] / tables.residence[:, last])) for share in SHARES]


def _weight(tables: BatchTables, cost: np.ndarray, loads: np.ndarray, asked: Asked) -> np.ndarray:
    """How much each batch counts within its tier: half by the time that the loads spend there, half alike."""
    among = np.asarray(asked.lengths)
    greedy = among[np.argmin(cost[among], axis=0)][None]
    share = under_schedules(tables, greedy, loads, asked.loop, asked.output_length).probability[0, :, 1:].mean(axis=0)
    alike = np.full(tables.batches, 1.0 / tables.batches)
    alike[: share.size] += share[: tables.batches]
    return 0.5 * alike


def _caveats(deployment, contexts, asked: Asked, acceptance) -> list[str]:
    notes = []
    for context in (contexts[0], contexts[-1]):
        for load in (context["loads"][0]["load"], context["loads"][-1]["load"]):
            fields = {asked.loop: load} | lengths_of(context)
            notes += [note for note in deployment.caveats(asked.max_draft_length, fields) if note not in notes]
    if not deployment.plain_measured:
        notes.append("no k = 0 row was fitted: no tier is without drafts and no gain over no speculation is told")
    if acceptance is None and deployment.mixed_acceptance:
        notes.append(deployment.mixed_acceptance)
    lengths = {k for context in contexts for *_, k in context["schedule"]}
    if 0 in lengths and len(lengths) > 1:
        notes.append(
            "draft_length 0 inside a schedule keeps the drafter loaded: it may cost more than no drafter at all"
        )
    return notes
