"""The verb `optimize` for several classes of requests and a catalogue of drafters: one joint decision for each load.

Decided together: the drafter, the draft length of each class, and the batch cap. For each drafter and load the reals
are found first (:mod:`diffspec.optimizing.constrained`, gradients through the equilibrium, a few starts side by side),
then rounded, then improved by exact evaluation of all neighbours until none is better. Where all whole points are fewer
than :data:`MOST_POINTS` they are evaluated too: the answer is then the best of all, and ``optimality_gap`` says how far
the relaxed and rounded one was from it.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from diffspec.acceptance import AbstractAcceptance, ConstantAcceptance
from diffspec.analysis.plain import as_floats, finite
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.observations import states_of
from diffspec.optimizing.catalogue import DrafterChoice, RequestClass, acceptance_of_size
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
from diffspec.optimizing.joint_problem import ClassLimit, Drafted, over_all, parse_objective, shapes_of
from diffspec.optimizing.joint_search import (
    NO_CAP,
    STARTS,
    Arm,
    Ranges,
    first,
    joined,
    relaxed,
    rounded,
    score,
)
from diffspec.optimizing.limits import check_loads, parse_limit
from diffspec.results import InputError
from diffspec.serving import MOST_STATES
from diffspec.workload import check_range

MOST_POINTS = 1_000_000
"""Whole points of all loads that are evaluated one by one; above it the relaxed and rounded answer stands alone."""


def optimize_jointly(
    deployment: FittedDeployment,
    *,
    loads: Sequence[float],
    classes: Sequence[RequestClass],
    drafters: Sequence[DrafterChoice] = (),
    max_draft_length: int = 8,
    batch_caps: Sequence[float] = (),
    max_batched_tokens: float | None = None,
    acceptance: AbstractAcceptance | None = None,
    slo: Sequence[str] = (),
    objective: str = "e2e_mean",
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Best drafter, draft length of each class and batch cap at each total arrival rate.

    * ``loads`` [req/s], increasing: of all classes together; ``classes``: shares, lengths, acceptance and own limits
    * ``drafters``: a catalogue; none: the deployment's own. ``batch_caps`` [req]: candidates, default the measured cap
    * ``acceptance``: of drafters and classes that have none; default the deployment's own
    * ``slo``: limits on the mean over all requests, or on ``utilization``; classes have their own
    * ``objective``: a mean latency, a weighted sum of them, or ``capacity`` (made large)

    Returns plain data: ``outcome`` (``successful`` when some load has a feasible point), ``table`` with, for each load,
    ``drafter``, ``draft_lengths`` by class, ``max_batch_size``, ``objective``, ``metrics`` by class and of ``all``,
    ``speedup`` (mean e2e latency without speculation, of the deployment that was given, over that of the choice; below
    1 where the objective is another), ``common`` (the best with one draft length for all classes, which is what engines
    take today), ``relaxed`` (the reals, with the Karush-Kuhn-Tucker residuals of
    :class:`diffspec.optimizing.constrained.Solution`), ``shadow_prices`` of the limits, ``optimality_gap``,
    ``evaluated`` and ``exhaustive``, and ``violations`` where nothing is feasible; and ``policy``: neighbouring loads
    with the same decision. ``drafter_size``: the best real size where the catalogue's acceptance rates tell how
    acceptance follows size.

    Errors: :class:`InputError` for unknown names, loads that do not increase, or ranges.
    """
    goal, shapes = parse_objective(objective), shapes_of(classes)
    limits = tuple(ClassLimit(None, parse_limit(text)) for text in slo)
    limits += tuple(ClassLimit(number, limit) for number, one in enumerate(classes) for limit in one.limits)
    _check(loads, classes, max_draft_length, batch_caps)
    report = progress or (lambda what, share: None)
    known_cap = deployment.defaults.get("max_batch_size")
    caps = tuple(sorted({float(cap) for cap in batch_caps})) or (NO_CAP if known_cap is None else float(known_cap),)
    ranges = Ranges(max_draft_length, caps)
    arms = [_arm(deployment, choice, classes, ranges, max_batched_tokens, acceptance) for choice in drafters or (_OWN,)]
    total: int = sum(ranges.points(len(classes), arm.zero) for arm in arms)
    exhaustive = total * len(loads) <= MOST_POINTS
    solved = []
    for number, arm in enumerate(arms):
        share = number / len(arms)
        report(f"{arm.name}: relaxed", 0.6 * share)
        solved.append(relaxed(arm, shapes, goal, limits, loads, ranges))
    between = _between(arms, drafters, shapes, goal, limits, loads, ranges, classes)
    plain = _arm(deployment, _OWN, classes, ranges, max_batched_tokens, acceptance or _ANY)
    own = plain if deployment.plain_measured else None
    table = []
    for i, load in enumerate(loads):
        report(f"{load:g} req/s: whole points", 0.6 + 0.4 * i / len(loads))
        entry = _decide(load, i, arms, own, solved, shapes, goal, limits, ranges, classes, exhaustive)
        table.append(entry | {"drafter_size": None if between is None else between[i]})
    report("done", 1.0)
    feasible = [entry for entry in table if entry["feasible"]]
    gaps = [entry["optimality_gap"] for entry in feasible if entry["optimality_gap"] is not None]
    saturated = all("capacity" in entry["violations"] for entry in table)
    return {
        "outcome": "successful" if feasible else "saturated" if saturated else "infeasible",
        "objective": goal.text,
        "limits": [limit.text(classes) for limit in limits],
        "loop": "arrival_rate",
        "deployment": deployment.name,
        "classes": [class_told(one) for one in classes],
        "drafters": [arm.name for arm in arms],
        "table": table,
        "policy": merged(table),
        "optimality_gap": max(gaps) if gaps else None,
        "infeasible": None if feasible else table[0]["violations"],
        "warnings": caveats(deployment, arms, classes, loads, max_draft_length, caps),
    }


_OWN, _ANY = DrafterChoice("fitted"), ConstantAcceptance(0.5)
"""The deployment's own drafter; an acceptance for points that do not draft."""


def _check(loads, classes, longest, caps) -> None:
    check_loads(loads, "arrival_rate", longest)
    if not classes:
        raise InputError("classes: got none; allowed: at least one")
    names = [one.name for one in classes]
    if len(names) > len(set(names)) or (len(names) > 1 and "all" in names):
        raise InputError(f"classes: got the names {', '.join(names)}; allowed: each once, and none called 'all'")
    if abs(sum(one.share for one in classes) - 1.0) > 1e-6:
        raise InputError(f"classes: got shares that sum to {sum(one.share for one in classes):g}; allowed: to 1")
    for cap in caps:
        check_range("batch_caps", float(cap), 1, 1e8, low_open=False, unit="req")


def _arm(own: FittedDeployment, choice: DrafterChoice, classes, ranges: Ranges, budget, acceptance) -> Arm:
    deployment = choice.deployment or own
    unknown = [name for name in choice.by_class or {} if name not in {one.name for one in classes}]
    if unknown:
        allowed = ", ".join(one.name for one in classes)
        raise InputError(f"drafter {choice.name!r}: acceptance of {', '.join(unknown)}; allowed classes: {allowed}")
    found = []
    for one in classes:
        rate = (choice.by_class or {}).get(one.name) or choice.acceptance or one.acceptance or acceptance
        config = deployment.configuration(1.0, acceptance=rate, drafter_params=choice.drafter_params)
        found.append(as_floats(config.acceptance))
    reference = deployment.defaults.get("drafter_params", 1.0)
    serving = as_floats(deployment.serving)
    states = states_of(max((cap for cap in ranges.caps if cap <= MOST_STATES), default=None))
    serving = replace(serving, waiting_states=min(serving.waiting_states, states))
    kv, probability = (deployment.defaults.get(name) for name in ("kv_capacity_tokens", "draft_probability"))
    drafted = Drafted(
        serving=serving,
        acceptances=tuple(found),
        by_size=None,
        reference_size=np.asarray(float(reference)),
        draft_probability=np.asarray(1.0 if probability is None else float(probability)),
        kv_capacity_tokens=None if kv is None else np.asarray(float(kv)),
        max_batched_tokens=None if budget is None else np.asarray(float(budget)),
    )
    return Arm(choice.name, deployment, float(choice.drafter_params or reference), drafted, deployment.plain_measured)


def _between(arms, drafters, shapes, goal, limits, loads, ranges: Ranges, classes) -> list[dict[str, Any]] | None:
    """The best real size of a drafter at each load, where the catalogue tells how acceptance follows size."""
    family = [choice for choice in drafters if choice.drafter_params is not None and choice.deployment is None]
    try:
        by_size = acceptance_of_size(family)
    except InputError:
        return None
    sizes = sorted(math.log(choice.drafter_params) for choice in family)  # type: ignore[arg-type]
    arm = next(arm for arm in arms if arm.name == family[0].name)
    drafted = arm.drafted._replace(by_size=(np.asarray(by_size[0]), np.asarray(by_size[1])))
    ends = (sizes[0], sizes[-1])
    solution = relaxed(arm._replace(drafted=drafted), shapes, goal, limits, loads, ranges, ends)
    told = []
    for i in range(len(loads)):
        lane = solution.best(slice(i * len(STARTS), (i + 1) * len(STARTS)))
        size = ends[0] + (ends[1] - ends[0]) * float(solution.x[lane, -1])
        rate = 1.0 / (1.0 + math.exp(-by_size[0] - by_size[1] * size))
        lengths = 1.0 + (ranges.longest - 1.0) * solution.x[lane, : len(shapes.share)]
        told.append(
            {
                "drafter_params": math.exp(size),
                "acceptance_rate": rate,
                "draft_lengths": {one.name: float(k) for one, k in zip(classes, lengths, strict=True)},
                "objective": finite(value_of(goal, float(solution.value[lane]))),
                "violation": float(solution.violation[lane]),
            }
        )
    return told


def _decide(load, i, arms, own, solved, shapes, goal, limits, ranges, classes, exhaustive) -> dict[str, Any]:
    """The decision at one load."""
    count, evaluated = len(classes), 0
    attempts, best, common = [], [], []
    plain = None
    if own is not None:
        plain = score(own, shapes, goal, limits, load, np.asarray([[*[0.0] * count, ranges.caps[-1]]]))
    for arm, solution in zip(arms, solved, strict=True):
        lane = solution.best(slice(i * len(STARTS), (i + 1) * len(STARTS)))
        found = rounded(arm, shapes, goal, limits, load, ranges, solution.x[lane], count)
        evaluated += len(found.points)
        attempts.append(first(found))
        diagonal = np.asarray(
            [(*[k] * count, cap) for k in ranges.lengths(arm.zero) for cap in ranges.caps], dtype=float
        )
        alike = score(arm, shapes, goal, limits, load, diagonal)
        evaluated += len(diagonal)
        common.append(first(alike))
        found = joined(found, alike)
        if exhaustive and count > 1:
            lengths = [ranges.lengths(arm.zero)] * count
            whole = np.asarray(list(itertools.product(*lengths, ranges.caps)), dtype=float)
            found = score(arm, shapes, goal, limits, load, whole)
            evaluated += len(whole)
        best.append(first(found))
    winner = int(np.argmin([one.rank[0] for one in best]))
    chosen, arm = best[winner], arms[winner]
    feasible = bool(chosen.worst[0] <= 0 and not chosen.saturated[0])
    attempt = min(attempts, key=lambda one: one.rank[0])
    judged = exhaustive and feasible and attempt.rank[0] < 1e6
    gap = float(np.expm1(attempt.cost[0] - chosen.cost[0])) if judged else None
    alike = int(np.argmin([one.rank[0] for one in common]))
    solution = solved[winner]
    lane = solution.best(slice(i * len(STARTS), (i + 1) * len(STARTS)))
    speedup = None
    if plain is not None and not plain.saturated[0] and feasible:
        both = [over_all("e2e_mean", one.metrics["e2e_mean"], shapes.share)[0] for one in (plain, chosen)]
        speedup = finite(both[0] / both[1])
    spare = 1.0 - float(chosen.metrics["utilization"][0, 0])
    headroom = min(spare, float(-np.expm1(chosen.worst[0]))) if limits else spare
    lost = bool(common[alike].saturated[0])
    return {
        "load": float(load),
        "feasible": feasible,
        "drafter": arm.name,
        **point_told(chosen, classes, goal, shapes, count),
        "speedup": speedup,
        "headroom": headroom,
        "common": {
            "drafter": arms[alike].name,
            "draft_length": int(common[alike].points[0, 0]),
            "objective": None if lost else finite(value_of(goal, common[alike].cost[0])),
            "feasible": bool(common[alike].worst[0] <= 0 and not lost),
        },
        "relaxed": relaxed_told(solution, lane, goal, classes, ranges),
        "shadow_prices": shadow_prices(solution, lane, goal, limits, classes),
        "optimality_gap": gap if gap is None or gap > 1e-9 else 0.0,
        "evaluated": evaluated,
        "exhaustive": exhaustive,
        "violations": {} if feasible else violations(chosen, limits, classes, shapes, load),
    }
