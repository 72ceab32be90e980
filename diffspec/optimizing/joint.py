"""The verb `optimize` for several classes of requests and a catalogue of drafters: one joint decision for each load.

Decided together: the drafter, the draft length of each class or the tree that it draws, the batch cap, how many
replicas share the load, and where experts lie (:mod:`diffspec.optimizing.joint_experts`). For each drafter and load
the reals are found first (:mod:`diffspec.optimizing.constrained`, gradients through the equilibrium, a few starts side
by side), then rounded, then improved by exact evaluation of all neighbours until none is better. Where all whole points
are fewer than :data:`MOST_POINTS` they are evaluated too: the answer is then the best of all, and ``optimality_gap``
says how far the relaxed and rounded one was from it. Where none keeps the limits it is the nearest
(:mod:`diffspec.optimizing.joint_choice`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffspec.acceptance import AbstractAcceptance
from diffspec.analysis.intervals import NO_INTERVALS
from diffspec.analysis.plain import finite
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.observations import UNCAPPED
from diffspec.optimizing.catalogue import DrafterChoice, RequestClass, acceptance_of_size
from diffspec.optimizing.constrained import Solution
from diffspec.optimizing.expert_placement import Placing
from diffspec.optimizing.joint_answer import (
    caveats,
    class_told,
    merged,
    point_told,
    relaxed_told,
    shadow_prices,
    value_of,
    violations,
)
from diffspec.optimizing.joint_arms import ANY, arms_of, largest_batch, looking_at, making_room, with_percentiles
from diffspec.optimizing.joint_choice import Compared, best_of, compared, surely
from diffspec.optimizing.joint_draws import Contender, intervals_told
from diffspec.optimizing.joint_experts import search_placements
from diffspec.optimizing.joint_problem import COST, excesses
from diffspec.optimizing.joint_question import Question, read_joint_question
from diffspec.optimizing.joint_search import STARTS, Arm, Ranges, Scored, as_reals, excess_slopes, relaxed, score
from diffspec.optimizing.limits import MEMORY
from diffspec.optimizing.servers import server_of
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.workload import check_range


def optimize_jointly(
    deployment: FittedDeployment,
    *,
    loads: Sequence[float],
    classes: Sequence[RequestClass],
    drafters: Sequence[DrafterChoice] = (),
    max_draft_length: int = 8,
    batch_caps: Sequence[float] = (),
    replicas: Sequence[int] = (1,),
    placements: Placing | None = None,
    max_batched_tokens: float | None = None,
    acceptance: AbstractAcceptance | None = None,
    slo: Sequence[str] = (),
    objective: str = "e2e_mean",
    cost_per_hour: float | Mapping[str, Any] | None = None,
    risk: float | None = None,
    draws: ServingModel | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Best drafter, draft length of each class or tree, batch cap, replicas and placement at each total arrival rate.

    * ``loads`` [req/s], increasing: of all classes together; ``classes``: shares, lengths, acceptance and own limits
    * ``drafters``: a catalogue; none: the deployment's own. One with ``candidates`` draws trees: the best tree of every
      budget and depth is a candidate. ``batch_caps`` [req]: candidates, default the measured cap
    * ``replicas``: how many may share the load evenly, whole numbers; ``placements``: of a mixture's experts; better
      ones are looked for at the decisions (:mod:`diffspec.optimizing.joint_experts`)
    * ``acceptance``: of drafters and classes that have none; default the deployment's own
    * ``slo``: limits on means, percentiles (``"ttft_p95<0.5"``) and throughput of all requests, on ``utilization``,
      ``cost``, ``energy`` and ``memory`` [GB]; classes have their own. ``"ttft<0.5"``: one that each request keeps or
      not, which ``goodput`` counts (:mod:`diffspec.optimizing.joint_tails`)
    * ``objective``: a mean latency, a percentile of all requests, ``cost`` or ``energy`` [J] (of a million output
      tokens; equal costs are told apart by the mean e2e latency), a weighted sum of these, or ``capacity`` or
      ``goodput`` [req/s] (of all replicas, made large)
    * ``cost_per_hour``: of a device (:func:`diffspec.optimizing.servers.prices`), where the cost is asked about
    * ``risk`` [1]: choose by the cost that this share of the draws does not exceed, among the shortlist of
      :mod:`diffspec.optimizing.joint_draws`; None: by the model as it is. ``draws``: serving models with a leading
      axis, by default what the fit leaves open

    Returns plain data: ``outcome`` (``successful`` when some load has a feasible point), ``table`` with, for each load,
    ``drafter``, ``draft_lengths`` by class, ``tree`` (None: a chain), ``max_batch_size``, ``replicas``, ``placement``
    and how it was ``placed`` (:meth:`diffspec.optimizing.joint_experts.Searched.told`; None without experts),
    ``objective``, ``metrics`` by class and of ``all``, ``speedup`` (mean e2e latency without speculation, of the
    deployment that was given and as many replicas, over that of the choice; below 1 where the objective is another),
    ``common`` (the best with one draft length for all classes, which is what engines take today), ``relaxed`` (the
    reals, with the Karush-Kuhn-Tucker residuals of :class:`diffspec.optimizing.constrained.Solution`),
    ``shadow_prices`` of the limits, ``optimality_gap``, ``evaluated``, ``exhaustive``, ``chosen_probability``, and
    ``violations`` where nothing is feasible; ``intervals`` (:func:`diffspec.optimizing.joint_draws.interval_of` each
    load; None with ``intervals_reason`` for a model without draws); and ``policy``: neighbouring loads with the same
    decision. ``drafter_size``: the best real size where the catalogue's acceptance rates tell how acceptance follows
    size.

    Errors: :class:`InputError` for unknown names, loads that do not increase, or ranges.
    """
    for cap in batch_caps:
        check_range("batch_caps", float(cap), 1, 1e8, low_open=False, unit="req")
    known_cap = deployment.defaults.get("max_batch_size")
    caps = tuple(sorted({float(cap) for cap in batch_caps})) or (UNCAPPED if known_cap is None else float(known_cap),)
    asked = read_joint_question(classes, objective, slo, Ranges(max_draft_length, caps), loads, replicas, risk)
    if COST in asked.looked_at and cost_per_hour is None:
        raise InputError("cost: needs the price of a device; allowed: cost_per_hour (--cost-per-hour)")
    goal, shapes, limits, ranges = asked.goal, asked.shapes, asked.limits, asked.ranges
    report = progress or (lambda what, share: None)
    given = {"max_batched_tokens": max_batched_tokens, "cost_per_hour": cost_per_hour, "draws": draws}
    tables, notes = {}, []
    if placements is not None:
        tables, (drafters, notes) = placements.tables(), making_room(drafters, placements)
    arms = arms_of(deployment, drafters, classes, ranges, acceptance, tables, **given)
    tails = asked.tails(largest_batch(arms, asked))
    arms = [looking_at(arm, tails, asked) for arm in arms]
    sure = all(arm.models is not None for arm in arms)
    if risk is not None and not sure:
        raise InputError(f"risk: got {risk:g}, but {NO_INTERVALS}")
    asked = asked.counting(arms)
    solved = []
    for number, arm in enumerate(arms):
        report(f"{arm.name}: relaxed", 0.5 * number / len(arms))
        solved.append(relaxed(arm, shapes, goal, limits, asked.each, ranges, replicas=asked.sharing))
    found = []
    for i, load in enumerate(loads):
        report(f"{load:g} req/s: whole points", 0.5 + 0.2 * i / len(loads))
        found.append(compared(asked, i, arms, solved, sure))
    searched = None
    if placements is not None:
        searched = search_placements(asked, arms, solved, found, placements, sure, lambda what: report(what, 0.7))
        asked, arms, solved, found = searched[:4]
    (own,) = arms_of(deployment, (), classes, ranges, acceptance or ANY, {}, **given)
    powered = not asked.looked_at & {"energy", MEMORY} or server_of(deployment).pair is not None
    own = looking_at(own, tails, asked, drafts=False) if deployment.plain_measured and powered else None
    table, varied = [], []
    for i, load in enumerate(loads):
        report(f"{load:g} req/s: the choice", 0.8 + 0.2 * i / len(loads))
        entry, interval = _decide(asked, i, arms, own, solved, found[i], sure)
        told = None if searched is None or placements is None else searched.told(i, entry["placement"], placements)
        table.append(entry | {"placed": told})
        varied.append({"load": float(load)} | interval)
    between = _between(asked, arms, drafters, {entry["placement"] for entry in table})
    for i, entry in enumerate(table):
        place = asked.replicas.index(entry["replicas"])
        entry["drafter_size"] = (
            None if between is None else between[entry["placement"]][i * len(asked.replicas) + place]
        )
    report("done", 1.0)
    feasible = [entry for entry in table if entry["feasible"]]
    gaps = [entry["optimality_gap"] for entry in feasible if entry["optimality_gap"] is not None]
    saturated = all("capacity" in entry["violations"] for entry in table)
    return {
        "outcome": "successful" if feasible else "saturated" if saturated else "infeasible",
        "objective": goal.text,
        "limits": [limit.text(classes) for limit in (*limits, *asked.within)],
        "loop": "arrival_rate",
        "risk": risk,
        "deployment": deployment.name,
        "classes": [class_told(one) for one in classes],
        "drafters": list(dict.fromkeys(arm.name for arm in arms)),
        "replicas": list(asked.replicas),
        "placements": [] if searched is None else list(searched.placements),
        "table": table,
        "policy": merged(table),
        "optimality_gap": max(gaps) if gaps else None,
        "infeasible": None if feasible else table[0]["violations"],
        **intervals_told(varied, arms),
        "warnings": caveats(deployment, arms, classes, loads, max_draft_length, caps) + notes,
    }


def _between(asked: Question, arms, drafters, chosen) -> dict[str | None, list[dict[str, Any]]] | None:
    """By placement that was ``chosen``, the best real size of a drafter at each load of a replica, where the catalogue
    tells how acceptance follows size."""
    family = [choice for choice in drafters if choice.drafter_params is not None and choice.deployment is None]
    family = [choice for choice in family if not choice.draws_trees]
    try:
        by_size = acceptance_of_size(family)
    except InputError:
        return None
    sizes = sorted(math.log(choice.drafter_params) for choice in family)  # type: ignore[arg-type]
    placed = [arm for arm in arms if arm.name == family[0].name and arm.placement in chosen]
    return {arm.placement: _between_on(asked, arm, by_size, (sizes[0], sizes[-1])) for arm in placed}


def _between_on(asked: Question, arm: Arm, by_size, ends: tuple[float, float]) -> list[dict[str, Any]]:
    """:func:`_between` on the placement of an arm of the family."""
    drafted = arm.drafted._replace(by_size=(np.asarray(by_size[0]), np.asarray(by_size[1])))
    arm, loads, count = arm._replace(drafted=drafted), asked.each, len(asked.classes)
    solution = relaxed(arm, asked.shapes, asked.goal, asked.limits, loads, asked.ranges, ends, asked.sharing)
    told = []
    for i in range(len(loads)):
        lane = solution.best(slice(i * len(STARTS), (i + 1) * len(STARTS)))
        real = as_reals(arm, asked.ranges, solution.x[lane], count, ends)
        told.append(
            {
                "drafter_params": math.exp(real.size),  # type: ignore[arg-type]
                "acceptance_rate": 1.0 / (1.0 + math.exp(-by_size[0] - by_size[1] * real.size)),  # type: ignore[operator]
                "draft_lengths": {one.name: float(k) for one, k in zip(asked.classes, real.lengths, strict=True)},
                "objective": finite(value_of(asked.goal, float(solution.value[lane]), asked.sharing[i])),
                "violation": float(solution.violation[lane]),
            }
        )
    return told


def _decide(asked: Question, i: int, arms: list[Arm], own: Arm | None, solved, found: Compared, sure: bool):
    """(entry of the table, its interval) at one load."""
    load = asked.loads[i]
    plain = None if own is None else [_plain(asked, own, load, replicas) for replicas in asked.replicas]
    if sure:
        winner, interval, at_risk = surely(asked, load, arms, own, found, plain)
    else:
        winner, interval, at_risk = best_of(asked, load, arms, found), {}, None
    kept = None if at_risk is None else math.isfinite(at_risk)
    arm = arms[winner.arm]
    told = with_percentiles(arm, winner.point, load / int(winner.point.replicas[0]), asked)
    entry = _entry(asked, load, arm, told, plain, kept)
    entry |= _relaxed_entry(asked, i, arms[winner.arm], solved[winner.arm], winner.point)
    if at_risk is not None:
        entry["risk_objective"] = finite(value_of(asked.goal, at_risk)) if kept else None
        if not kept:
            share = {"value": interval["chosen_feasible_share"], "bound": asked.risk, "compared": interval["compared"]}
            entry["violations"] |= {"risk": share}
    attempt, alike = found.attempt.point, found.alike.point
    judged = asked.exhaustive and entry["feasible"] and attempt.rank[0] < 1e6 and asked.risk is None
    gap = max(float(np.expm1(attempt.cost[0] - winner.point.cost[0])), 0.0) if judged else None
    lost = bool(alike.saturated[0])
    one = point_told(alike, arms[found.alike.arm], asked.classes, asked.goal, asked.shapes)
    return entry | {
        "common": {
            "drafter": arms[found.alike.arm].name,
            "draft_length": int(alike.points[0, 0]),
            "tree": one["tree"],
            "objective": None if lost else finite(value_of(asked.goal, alike.cost[0])),
            "feasible": bool(alike.worst[0] <= 0 and not lost),
        },
        "optimality_gap": gap if gap is None or gap > 1e-9 else 0.0,
        "evaluated": found.evaluated,
        "exhaustive": asked.exhaustive,
        "chosen_probability": interval.get("probability_best"),
    }, interval


def _plain(asked: Question, own: Arm, load: float, replicas: int) -> Contender:
    """No speculation, of the deployment that was given: the last arm, and no candidate as such."""
    point = np.asarray([[*[0.0] * len(asked.classes), asked.ranges.caps[-1], 0.0]])
    return Contender(-1, score(own, asked.shapes, asked.goal, asked.limits, load / replicas, point, replicas))


def _entry(
    asked: Question, load: float, arm: Arm, point: Scored, plain: list[Contender] | None, kept: bool | None
) -> dict[str, Any]:
    """What the choice is and does; ``kept``: whether it keeps the limits in as many draws as the risk asks for, None
    without a risk."""
    feasible = bool(point.worst[0] <= 0 and not point.saturated[0]) if kept is None else kept
    speedup = None
    if plain is not None and feasible:
        base = plain[asked.replicas.index(int(point.replicas[0]))].point
        speedup = None if base.saturated[0] else finite(math.exp(base.e2e[0] - point.e2e[0]))
    spare = 1.0 - float(point.metrics["utilization"][0, 0])
    beyond = excesses(asked.limits, point.metrics, asked.shapes.share, int(point.replicas[0]))
    headroom = min([spare, *(float(-np.expm1(np.asarray(excess)[0])) for excess in beyond)])
    headroom = headroom if feasible else None
    return {
        "load": float(load),
        "feasible": feasible,
        "drafter": arm.name,
        **point_told(point, arm, asked.classes, asked.goal, asked.shapes),
        "speedup": speedup,
        "headroom": headroom,
        "violations": {} if feasible else violations(point, asked, load),
    }


def _relaxed_entry(asked: Question, i: int, arm: Arm, solution: Solution, point: Scored) -> dict[str, Any]:
    replicas = int(point.replicas[0])
    lane = asked.lane(solution, i, asked.replicas.index(replicas))
    slopes = excess_slopes(
        arm, asked.shapes, asked.limits, asked.loads[i] / replicas, solution.x[lane], asked.ranges, replicas
    )
    return {
        "relaxed": relaxed_told(solution, lane, arm, asked.goal, asked.classes, asked.ranges, replicas),
        "shadow_prices": shadow_prices(solution, lane, asked.goal, asked.limits, asked.classes, slopes),
    }
