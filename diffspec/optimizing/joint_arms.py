"""What a joint decision chooses among, as arrays: every drafter of the catalogue on every placement of experts."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import AbstractAcceptance, ConstantAcceptance
from diffspec.analysis.plain import as_floats
from diffspec.experts import CoverageTable
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.observations import states_of
from diffspec.fitting.uncertainty import DRAWS
from diffspec.optimizing.catalogue import DrafterChoice, RequestClass, mean_request
from diffspec.optimizing.expert_balance import with_copies
from diffspec.optimizing.expert_placement import Placing
from diffspec.optimizing.expert_search import routed, routed_draws
from diffspec.optimizing.joint_problem import Drafted, evaluate_points
from diffspec.optimizing.joint_question import Question
from diffspec.optimizing.joint_search import Arm, Ranges, Scored
from diffspec.optimizing.joint_tails import Tails, of_all
from diffspec.optimizing.limits import MEMORY
from diffspec.optimizing.servers import COPIES, FIT_AGAIN, NO_PAIR, prices, server_of
from diffspec.results import InputError
from diffspec.serving import MOST_STATES, ServingModel
from diffspec.tree_shapes import tree_shapes
from diffspec.workload import Workload

OWN, ANY = DrafterChoice("fitted"), ConstantAcceptance(0.5)
"""The deployment's own drafter; an acceptance for points that do not draft."""


def arms_of(
    own: FittedDeployment,
    drafters: Sequence[DrafterChoice],
    classes: Sequence[RequestClass],
    ranges: Ranges,
    acceptance: AbstractAcceptance | None,
    placements: Mapping[str, CoverageTable],
    *,
    max_batched_tokens: float | None,
    cost_per_hour: float | Mapping[str, Any] | None,
    draws: ServingModel | None,
) -> list[Arm]:
    """Every drafter, the deployment's ``own`` where none is given, on every placement. ``draws``: of ``own``, by
    default what its fit leaves open."""
    found = []
    for choice in drafters or (OWN,):
        arm = _arm(own, choice, classes, ranges, max_batched_tokens, acceptance)
        drafted, models = arm.drafted, draws
        if arm.deployment is not own or draws is None:
            known = arm.deployment.uncertainty
            models = None if known is None else known.models(arm.deployment.serving, DRAWS)
        models = None if models is None else as_floats(models)
        if cost_per_hour is not None:
            drafted = drafted._replace(hourly=np.asarray(_price(arm, cost_per_hour)))
        arm = arm._replace(drafted=drafted, models=models)
        if not placements:
            found.append(arm)
            continue
        if getattr(arm.deployment.serving.step_time, "experts", None) is None:
            raise InputError(f"drafter {choice.name!r}: its model is no mixture of experts: no placement can be asked")
        found += [on_placement(arm, name, table) for name, table in placements.items()]
    return found


def making_room(drafters: Sequence[DrafterChoice], placements: Placing) -> tuple[list[DrafterChoice], list[str]]:
    """The catalogue, in which deployments of drafters' own hold the copies of experts too, as the one that was placed
    does; and what is to be said about it."""
    found, notes = list(drafters), []
    for number, choice in enumerate(drafters):
        if choice.deployment is not None and COPIES not in choice.deployment.defaults:
            held, _, told = with_copies(choice.deployment, placements.copies, placements.popularity.shape[1])
            found[number] = replace(choice, deployment=held)
            notes += [f"drafter {choice.name}: {note}" for note in told]
    return found, notes


def on_placement(arm: Arm, name: str, table: CoverageTable) -> Arm:
    """The drafter of an arm with the experts placed in another way."""
    drafted = arm.drafted._replace(serving=as_floats(routed(arm.drafted.serving, table)))
    models = None if arm.models is None else as_floats(routed_draws(arm.models, table))
    return arm._replace(drafted=drafted, models=models, placement=name)


def _arm(own: FittedDeployment, choice: DrafterChoice, classes, ranges: Ranges, budget, acceptance) -> Arm:
    """One drafter of the catalogue."""
    deployment = choice.deployment or own
    named = choice.by_class or choice.candidates_by_class or {}
    unknown = [name for name in named if name not in {one.name for one in classes}]
    if unknown:
        allowed = ", ".join(one.name for one in classes)
        raise InputError(f"drafter {choice.name!r}: acceptance of {', '.join(unknown)}; allowed classes: {allowed}")
    found, trees, tables = [], None, []
    for one in classes:
        rate = (choice.by_class or {}).get(one.name) or choice.acceptance or one.acceptance or acceptance
        if choice.draws_trees:
            rate = ANY  # the shapes have their own
            table = (choice.candidates_by_class or {}).get(one.name, choice.candidates)
            if table is None:
                raise InputError(f"drafter {choice.name!r}: candidates: none of class {one.name}; allowed: all classes")
            tables.append(table)
        config = deployment.configuration(1.0, acceptance=rate, drafter_params=choice.drafter_params)
        found.append(as_floats(config.acceptance))
    if tables:
        shares = np.asarray([one.share for one in classes])
        trees = tree_shapes(tables, shares, max_nodes=choice.max_nodes, max_depth=ranges.longest)
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
        shapes=None if trees is None else (trees.rates, trees.nodes, trees.depth),
        candidates=None if trees is None else trees.candidates,
    )
    size = float(choice.drafter_params or reference)
    return Arm(choice.name, deployment, size, drafted, deployment.plain_measured, trees, choice.max_nodes)


def largest_batch(arms: Sequence[Arm], asked: Question) -> float:
    """The largest mean number of requests [req] in the system of one replica, over points at which classes draft alike
    and that are not saturated: how long a chain of requests must be where no cap bounds it."""
    most, count = 1.0, len(asked.classes)
    if max(asked.ranges.caps) <= MOST_STATES:
        return most
    for arm, load in itertools.product(arms, sorted(set(asked.each))):
        points = asked.ranges.alike(arm, count)
        points = np.column_stack([points, np.full(len(points), math.log(arm.size))])
        metrics, saturated = evaluate_points(arm.drafted._replace(candidates=None), asked.shapes, load, points)
        batches = (metrics["throughput"] * metrics["e2e_mean"]).sum(axis=1)
        most = max([most, *batches[~saturated].tolist()])
    return most


def looking_at(arm: Arm, tails: Tails | None, asked: Question, drafts: bool = True) -> Arm:
    """The arm, of which some points draft, with what is looked at beyond means. Errors: :class:`InputError` where its
    energy or memory is not known."""
    prompt, output, _ = mean_request(asked.classes)
    server, mean = server_of(arm.deployment), Workload(prompt, output, concurrency=1.0)
    pair, needed = server.pair_at(mean), [name for name in ("energy", MEMORY) if name in asked.looked_at]
    if needed and pair is None:
        raise InputError(f"{needed[0]}: {NO_PAIR} (drafter {arm.name}); {FIT_AGAIN}")
    if tails is not None and "energy" in needed and pair is not None:
        tails = replace(tails, pair_json=json.dumps(pair.to_dict(), sort_keys=True))
    drafted, use = arm.drafted._replace(tails=tails), None
    if MEMORY in needed:
        budget = drafted.max_batched_tokens
        use = as_floats(server.memory_use(mean, None if budget is None else float(budget), drafts=drafts))
        if pair is not None and pair.drafter is None and arm.size != drafted.reference_size:
            raise InputError(f"memory: drafter {arm.name}: the weights of the drafter that was measured are not known")
    return arm._replace(drafted=drafted._replace(memory=use))


def with_percentiles(arm: Arm, point: Scored, load: float, asked: Question) -> Scored:
    """Points at a ``load`` [req/s] of one replica, with the percentiles looked at, of each class and of all."""
    if all(of_all(metric) in point.metrics for metric in asked.percentiles):
        return point
    assert arm.drafted.tails is not None
    nothing = {"limits": (), "bounds": jnp.zeros(0), "within": (), "within_bounds": jnp.zeros((0, len(asked.classes)))}
    tails = replace(arm.drafted.tails, **nothing, objective=(), told=asked.percentiles, pair_json=None)
    drafted = arm.drafted._replace(candidates=None, tails=tails)
    metrics, _ = evaluate_points(drafted, asked.shapes, load, point.points)
    names = [name for metric in asked.percentiles for name in (metric, of_all(metric))]
    return point._replace(metrics=point.metrics | {name: metrics[name] for name in names})


def _price(arm: Arm, cost_per_hour: float | Mapping[str, Any]) -> float:
    server = server_of(arm.deployment)
    (price,) = prices([server], cost_per_hour)
    if price is None or not math.isfinite(price):
        raise InputError(
            f"cost_per_hour: none of {server.hardware!r} (drafter {arm.name}); allowed: one of each device"
        )
    return price
