"""A joint decision as plain data: points, relaxed solutions, shadow prices, and where the answer must be doubted."""

import itertools
import math
from typing import Any

import numpy as np

from diffspec.acceptance import MeasuredAcceptance
from diffspec.analysis.plain import finite
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.observations import UNCAPPED
from diffspec.optimizing.catalogue import RequestClass
from diffspec.optimizing.constrained import Solution, tied_groups
from diffspec.optimizing.joint_problem import ADDED_UP, Objective, excesses, over_all
from diffspec.optimizing.joint_question import Question
from diffspec.optimizing.joint_search import Arm, Ranges, Scored, as_reals, relaxable
from diffspec.optimizing.joint_tails import UNKNOWN
from diffspec.percentiles import known_up_to
from diffspec.serving import MOST_STATES


def value_of(goal: Objective, cost: float, replicas: int = 1) -> float:
    """The objective of a log cost; a relaxed capacity or goodput is that of one of the ``replicas``."""
    return float(replicas * np.exp(-cost) if goal.made_large else np.exp(cost))


def point_told(point: Scored, arm: Arm, classes, goal, shapes) -> dict[str, Any]:
    """What a whole point is, and what it does for each class and for all."""
    count = len(classes)
    replicas, hidden = int(point.replicas[0]), bool(point.saturated[0])
    metrics = {name: values * (replicas if name in ADDED_UP else 1) for name, values in point.metrics.items()}
    names = [name for name in metrics if " " not in name]  # tails, and what is of all, have names of two words
    of_class = {
        one.name: {name: finite(metrics[name][0, number]) for name in names} for number, one in enumerate(classes)
    }
    of_all = {name: finite(over_all(name, metrics, shapes.share)[0]) for name in names}
    cap, shape = (float(value) for value in point.points[0, count : count + 2])
    return {
        "draft_lengths": {one.name: int(point.points[0, number]) for number, one in enumerate(classes)},
        "tree": _tree_told(arm, int(shape)) if arm.trees is not None and point.points[0, 0] > 0 else None,
        "max_batch_size": None if cap >= UNCAPPED else cap,
        "replicas": replicas,
        "placement": arm.placement,
        "objective": None if hidden else finite(value_of(goal, point.cost[0])),
        "metrics": {} if hidden else of_class | {"all": of_all},
    }


def _tree_told(arm: Arm, shape: int) -> dict[str, Any]:
    """A tree as data, and SGLang's flags for one of this depth and number of nodes: its top k is the widest choice, or
    the most nodes of a level that have children, whichever is more, so that this tree is among those that it may draw.
    It draws the likeliest nodes of each step, not this one tree."""
    tree = arm.trees.trees[shape]  # type: ignore[union-attr]
    width = int(tree.rank.max())
    inner = {parent for parent in tree.parents if parent >= 0}
    top = max([width, *np.bincount([tree.depth[node] for node in inner]).tolist()] if inner else [width])
    return {
        "nodes": tree.nodes,
        "depth": tree.max_depth,
        "width": width,
        "parents": list(tree.parents),
        "sglang": f"--speculative-num-steps {tree.max_depth} --speculative-eagle-topk {top} "
        f"--speculative-num-draft-tokens {tree.nodes + 1}",
    }


def relaxed_told(
    solution: Solution, lane: int, arm: Arm, goal: Objective, classes, ranges: Ranges, replicas: int
) -> dict[str, Any]:
    """The reals and the conditions' residuals there. A step drafts as long as its longest draft: where lengths of
    classes meet, the cost has a kink, and ``stationarity`` is that of moving them together (``tied`` names them)."""
    count = len(classes)
    x = solution.x[lane]
    groups = [] if arm.trees is not None else tied_groups(x, range(count))
    real = as_reals(arm, ranges, x, count)
    own = relaxable(goal) is goal
    return {
        "draft_lengths": {one.name: float(k) for one, k in zip(classes, real.lengths, strict=True)},
        "tree": None if arm.trees is None else {"width": real.width, "nodes": real.nodes},
        "max_batch_size": real.cap if len(ranges.caps) > 1 else None,
        "objective": finite(value_of(goal, float(solution.value[lane]), replicas)) if own else None,
        "stationarity": finite(solution.stationarity[lane]),
        "tied": [[classes[number].name for number in sorted(group)] for group in groups if len(group) > 1],
        "complementarity": float(solution.complementarity[lane]),
        "violation": float(solution.violation[lane]),
    }


def shadow_prices(solution: Solution, lane: int, goal, limits, classes, slopes) -> list[dict[str, Any]]:
    """Of each limit: whether it is active in the relaxed problem, and by how many percent one percent more room betters
    the objective (an elasticity: the multiplier, since costs and excesses are logarithms, times ``slopes`` [limits], by
    how much one percent more room lowers the excess). Empty where the relaxed problem has no feasible point: no room
    has a price there."""
    if solution.violation[lane] > 1e-3 or relaxable(goal) is not goal:  # a price alone does not move with reals
        return []
    told = []
    for number, entry in enumerate(limits):
        price = float(solution.multipliers[lane, number] * max(slopes[number], 0.0)) + 0.0
        excess = float(solution.excess[lane, number])
        upper = entry.limit.sign > 0
        room = f"{'relaxing' if upper else 'lowering'} {entry.text(classes)} by 10 %"
        gain = "raises" if goal.made_large else "lowers"
        told.append(
            {
                "limit": entry.text(classes),
                "active": price > 1e-3 and excess > -1e-2,
                "elasticity": price,
                "words": f"{room} {gain} {goal.text} by about {10 * price:.2g} %" if price > 1e-3 else "not active",
            }
        )
    return told


def violations(point: Scored, asked: Question, load: float) -> dict[str, Any]:
    """Which limits a point breaks, and by how much; or its capacity, or an objective that it does not have. Nothing
    where it breaks them in draws alone."""
    if point.saturated[0]:
        capacity = float(point.replicas[0] * over_all("capacity", point.metrics, asked.shapes.share)[0])
        return {"capacity": {"value": finite(capacity), "bound": float(load), "shortfall": finite(load - capacity)}}
    broken, share, replicas = {}, asked.shapes.share, int(point.replicas[0])
    for entry, excess in zip(asked.limits, excesses(asked.limits, point.metrics, share, replicas), strict=True):
        if float(np.asarray(excess)[0]) > 0:
            metric, number = entry.limit.metric, entry.number
            value = over_all(metric, point.metrics, share) if number is None else point.metrics[metric][:, number]
            value = value[0] * (replicas if metric in ADDED_UP else 1)
            broken[entry.text(asked.classes)] = entry.limit.told(finite(value))
    if not broken and point.worst[0] > 0:  # no limit, but no request that counts, or a percentile that is not known
        value = None if unmet_batch(point) else value_of(asked.goal, float(point.cost[0]), 1)
        broken[asked.goal.text] = {"value": None if value is None else finite(value), "bound": None}
    return broken


def unmet_batch(point: Scored) -> bool:
    """Whether the mean batch of a point is beyond what percentiles are computed for."""
    return UNKNOWN in point.metrics and bool(np.asarray(point.metrics[UNKNOWN])[0, 0] > 0)


def class_told(one: RequestClass) -> dict[str, Any]:
    names = ("name", "share", "prompt_length", "output_length", "output_scv", "prefix_hit_rate", "weight")
    return {name: getattr(one, name) for name in names} | {"slo": [limit.text for limit in one.limits]}


def merged(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring loads with the same decision as one range."""
    policy = []
    for _, group in itertools.groupby(
        table,
        key=lambda entry: (
            entry["feasible"],
            entry["drafter"],
            tuple(entry["draft_lengths"].values()),
            None if entry["tree"] is None else tuple(entry["tree"]["parents"]),
            *(entry[name] for name in ("max_batch_size", "replicas", "placement")),
        ),
    ):
        entries = list(group)
        names = ("feasible", "drafter", "draft_lengths", "tree", "max_batch_size", "replicas", "placement")
        names += ("objective", "speedup", "headroom")
        policy.append(
            {"load_from": entries[0]["load"], "load_to": entries[-1]["load"]} | {n: entries[-1][n] for n in names}
        )
    return policy


def caveats(own: FittedDeployment, arms, classes, loads, longest, caps) -> list[str]:
    """Where the answer must be doubted, one sentence each."""
    notes = []
    for arm in arms:
        for one in classes:
            for load in (loads[0], loads[-1]):
                fields = {"arrival_rate": load, "prompt_length": one.prompt_length, "output_length": one.output_length}
                for note in arm.deployment.caveats(longest, fields):
                    told = f"class {one.name}: {note}"
                    notes += [told] if told not in notes else []
    for arm in arms:
        cap, known = (one.defaults.get("max_batch_size") for one in (arm.deployment, own))
        if cap != known:
            notes.append(f"drafter {arm.name}: measured with a batch cap of {cap}, asked at those of this decision")
        mixed = arm.deployment.mixed_acceptance
        if mixed and any(isinstance(own_curve, MeasuredAcceptance) for own_curve in arm.drafted.acceptances):
            notes.append(f"drafter {arm.name}: {mixed}")
        if own.plain_measured and not arm.zero:
            notes.append(f"drafter {arm.name}: no k = 0 row was fitted: it always drafts")
    if any(cap > MOST_STATES for cap in caps if cap < UNCAPPED):
        notes.append(
            f"waiting for a place is not counted at batch caps above {MOST_STATES}: they look better than they are"
        )
    tails = arms[0].drafted.tails
    known = None if tails is None or not tails.spread else float(known_up_to(tails.states, max(caps)))
    if known is not None and known < math.inf:
        notes.append(
            f"above {known:.0f} req in service on average no percentile is known: such points "
            "count as breaking limits; give a batch cap"
        )
    if not own.plain_measured:
        notes.append("no k = 0 row was fitted: draft_length 0 is no candidate and no speedup is told")
    if len(classes) > 1:
        notes.append(
            "engines draft equally for all requests of a batch today: 'common' is the best such choice; a draft length "
            "by class needs an engine that takes one per request"
        )
    return notes
