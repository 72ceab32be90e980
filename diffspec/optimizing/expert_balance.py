"""Which placement of experts, and which draft length with it: decided together at each load.

Verification widens coverage, so a longer draft reads more experts, and how many the slowest rank reads depends on the
placement. At each load the placement and the draft length with the smallest objective are looked for among placements
whose busiest rank carries no more than EPLB's in any layer: EPLB's own is one of them, so that neither its rank load
nor its objective is ever exceeded.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from diffspec.acceptance import AbstractAcceptance
from diffspec.analysis.before_traces import Unmeasured
from diffspec.analysis.plain import as_floats, enough_states
from diffspec.experts import CoverageTable
from diffspec.first_principles import FirstPrinciples
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.principles import KEY
from diffspec.optimizing.expert_placement import (
    ExpertPlacement,
    Placing,
    all_placements,
    check_slots,
    eplb,
    exports,
    round_robin,
)
from diffspec.optimizing.expert_problem import INFEASIBLE, SMALL_SPACE, Point, Problem, merit_of
from diffspec.optimizing.expert_search import relaxed_placement, routed, routed_draws
from diffspec.optimizing.limits import check_question, parse_limit
from diffspec.optimizing.servers import COPIES
from diffspec.resources import memory_plan
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.traces.routing import RoutingCounts
from diffspec.workload import Workload

WORTH_TELLING = 1e-3
JOINTLY = "others where the batch cap is decided too (--batch-caps), and the placement at that decision"


def place_experts(
    deployment: FittedDeployment,
    routes: RoutingCounts,
    *,
    loads: Sequence[float],
    loop: str = "arrival_rate",
    prompt_length: float,
    output_length: float,
    expert_ranks: int | None = None,
    redundant_experts: int = 0,
    expert_groups: int = 1,
    nodes: int = 1,
    any_rank_load: bool = False,
    max_draft_length: int = 8,
    slo: Sequence[str] = (),
    objective: str = "e2e_mean",
    acceptance: AbstractAcceptance | None = None,
    max_batch_size: float | None = None,
    max_batched_tokens: float | None = None,
    output_scv: float = 0.0,
    prefix_hit_rate: float = 0.0,
    drafter_params: float | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> tuple[FittedDeployment, dict[str, Any]]:
    """Placement and draft length at each load, beside round robin and EPLB, each with the best draft length of its own.

    * ``routes``: how often experts are chosen; ``expert_ranks``: by default those of the fit, or the devices
    * ``redundant_experts``: further copies in each layer, of experts that are chosen here; ranks have equally many
      slots. Their memory is taken from the KV cache where the architecture is known
    * ``expert_groups``, ``nodes``: EPLB's hierarchical variant, see :func:`diffspec.optimizing.expert_placement.eplb`
    * ``any_rank_load``: choose by the objective alone, without EPLB's rank load as a cap
    * the others as :func:`diffspec.optimizing.optimize.optimize` takes them

    Returns the deployment with the placement that is best for all loads together, to ask anything else of, and plain
    data: ``outcome``, ``table`` (per load ``round_robin``, ``eplb``, ``chosen``, and ``latency_only``, chosen without
    the cap on the busiest rank; each with its ``draft_length``, metrics, ``max_rank_load`` [experts a token keeps
    busy], ``load_imbalance`` and ``physical_to_logical_map`` [layers, slots]; ``optimality_gap`` of the search over all
    ``points`` where there are fewer than a million, and the best of all is chosen, else None; ``relaxed``: draft length
    of the relaxation and whether it led to the choice; ``words``), ``placement`` (the one for all loads, with what it
    does ``at_loads``),
    ``exports`` (:func:`diffspec.optimizing.expert_placement.exports`), ``memory`` of the copies, and ``warnings``.

    Errors: :class:`InputError` for a deployment without experts, other experts in the file, or ranks, copies or groups
    that do not divide.
    """
    check_question(objective, loop, loads, max_draft_length)
    limits = tuple(parse_limit(text, instead=JOINTLY) for text in slo)
    report = progress or (lambda what, share: None)
    popularity, ranks, notes = _asked(deployment, routes, expert_ranks)
    size = check_slots(popularity.shape[1], ranks, redundant_experts)
    deployment, memory, told = with_copies(deployment, redundant_experts, popularity.shape[1])
    notes += told
    answer: dict[str, Any] = {
        "outcome": "does_not_fit",
        "file": routes.file,
        "layers": popularity.shape[0],
        "experts": popularity.shape[1],
        "experts_per_token": float(popularity[0].sum()),
        "expert_ranks": ranks,
        "redundant_experts": redundant_experts,
        "slots_per_rank": size,
        "memory": memory,
        "table": [],
        "placement": None,
        "exports": None,
        "warnings": notes,
    }
    if memory is not None and memory["kv_capacity_tokens"] < prompt_length + output_length:
        return deployment, answer
    config = deployment.configuration(
        float(max_draft_length),
        acceptance=acceptance,
        max_batch_size=max_batch_size,
        max_batched_tokens=max_batched_tokens,
        drafter_params=drafter_params,
    )
    config = as_floats(config)
    common = {"prompt_length": prompt_length, "output_length": output_length, "output_scv": output_scv}
    common |= {"arrival_scv": 1.0, "prefix_hit_rate": prefix_hit_rate}
    made = [Workload(**common, **{loop: float(load)}) for load in loads]
    workloads = [as_floats(workload) for workload in made]
    serving = enough_states(jax.tree.map(np.asarray, deployment.serving), workloads[0], config)
    problems = [
        Problem(
            serving=serving,
            popularity=popularity,
            config=config,
            workload=workload,
            longest=max_draft_length,
            limits=limits,
            objective=objective,
            plain_known=deployment.plain_measured,
        )
        for workload in workloads
    ]
    baselines = {
        "round_robin": round_robin(popularity, ranks, redundant_experts),
        "eplb": eplb(popularity, ranks, redundant_experts, groups=expert_groups, nodes=nodes),
    }
    every = None
    if len(popularity) == 1:
        at_most = SMALL_SPACE // (max_draft_length + 1)
        every = all_placements(popularity.shape[1], ranks, redundant_experts, at_most)
    candidates, table = [baselines["eplb"]], []
    for index, (load, problem) in enumerate(zip(loads, problems, strict=True)):
        report(f"experts at {load:g}", index / len(loads))
        entry, chosen = _at_load(problem, baselines, every, any_rank_load)
        table.append({"load": float(load)} | entry)
        candidates.append(chosen)
    report("one placement for all loads", 0.95)
    placement, together = _for_all(problems, candidates)
    feasible = [entry["chosen"]["draft_length"] is not None for entry in table]
    serving = routed(deployment.serving, placement.table(popularity))
    report("done", 1.0)
    return dataclasses.replace(deployment, serving=serving), answer | {
        "outcome": "successful" if any(feasible) else "infeasible",
        "table": table,
        "placement": _placed(loads, together),
        "exports": exports(placement),
    }


def candidate_placements(
    deployment: FittedDeployment, routes: RoutingCounts, answer: dict[str, Any], any_rank_load: bool = False
) -> Placing:
    """The different placements of an ``answer`` of :func:`place_experts`, for a decision that is about more than draft
    length to start from: the one for all loads, those chosen at single loads, EPLB's, and, where their busiest rank
    carries no more than EPLB's or ``any_rank_load`` is asked for, round robin and those chosen by latency alone."""
    count, per_token, _ = deployment.defaults["experts"]
    popularity = routes.popularity(int(count), float(per_token))
    ranks = int(answer["expert_ranks"])
    told = {"all loads": answer["placement"]} if answer["placement"] else {}
    for entry in answer["table"]:
        told |= {f"at {entry['load']:g} req/s": entry["chosen"], "EPLB": entry["eplb"]}
        told |= {
            "round robin": entry["round_robin"],
            f"any rank load at {entry['load']:g} req/s": entry["latency_only"],
        }
    found: dict[bytes, tuple[str, ExpertPlacement]] = {}
    most = min((entry["eplb"]["max_rank_load"] for entry in answer["table"]), default=math.inf)
    for name, one in told.items():
        if one["max_rank_load"] > most * (1.0 + 1e-9) and not any_rank_load:
            continue
        slots = np.asarray(one["physical_to_logical_map"], dtype=int)
        found.setdefault(slots.tobytes(), (name, ExpertPlacement(slots, ranks, popularity.shape[1])))
    caps = np.full(len(popularity), np.inf)
    if told and not any_rank_load:
        slots = np.asarray(told["EPLB"]["physical_to_logical_map"], dtype=int)
        caps = ExpertPlacement(slots, ranks, popularity.shape[1]).loads(popularity).max(axis=1)
    return Placing(popularity, dict(found.values()), caps)


def exported(answer: dict[str, Any], table: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An ``answer`` of :func:`place_experts` beside the ``table`` of a joint decision that started from it: its
    ``exports`` are then of the placement that was decided on, where that is one at all loads that are served."""
    served = [entry["placed"]["physical_to_logical_map"] for entry in table if entry["feasible"] and entry["placed"]]
    chosen = {str(slots): slots for slots in served}
    if len(chosen) == 1:
        (slots,) = chosen.values()
        placement = ExpertPlacement(np.asarray(slots, dtype=int), int(answer["expert_ranks"]), int(answer["experts"]))
        return answer | {"exports": exports(placement)}
    if not chosen:
        return answer
    note = "the decisions place experts differently by load: exports are of the placement for all, of the mean request"
    return answer | {"warnings": [*answer["warnings"], note]}


def _placed(loads: Sequence[float], together: list[dict[str, Any]]) -> dict[str, Any]:
    same = ("max_rank_load", "load_imbalance", "physical_to_logical_map")
    at_loads = [{k: v for k, v in told.items() if k not in same} for told in together]
    return {name: together[0][name] for name in same} | {
        "at_loads": [{"load": float(load)} | told for load, told in zip(loads, at_loads, strict=True)]
    }


def place_unmeasured(subject: Unmeasured, routes: RoutingCounts, **asked: Any) -> tuple[Unmeasured, dict[str, Any]]:
    """:func:`place_experts` of what was not measured: its plan without the memory of the copies, its draws with the
    placement."""
    deployment, answer = place_experts(subject.deployment, routes, **asked)
    plan, memory = subject.plan, answer["memory"]
    if memory is not None:
        longest = asked["prompt_length"] + asked["output_length"]
        tokens = memory["kv_capacity_tokens"]
        plan = dataclasses.replace(
            plan,
            verifier_bytes=plan.verifier_bytes + memory["copies_bytes"],
            free_bytes=max(plan.free_bytes - memory["copies_bytes"], 0.0),
            missing_bytes=plan.missing_bytes + max(memory["copies_bytes"] - plan.free_bytes, 0.0),
            kv_capacity_tokens=tokens,
            sequences=tokens / longest,
            fits=plan.fits and tokens >= longest,
        )
    models = subject.models
    if answer["placement"] is not None:
        routing = deployment.serving.step_time.experts.routing  # type: ignore[attr-defined]
        models = partial(_drawn_and_routed, subject.models, routing)
    return dataclasses.replace(subject, deployment=deployment, plan=plan, models=models), answer


def _drawn_and_routed(models: Callable[[], ServingModel], table: CoverageTable) -> ServingModel:
    return routed_draws(models(), table)


def _asked(
    deployment: FittedDeployment, routes: RoutingCounts, expert_ranks: int | None
) -> tuple[np.ndarray, int, list[str]]:
    """Popularity [layers, experts], ranks, and what is to be said about them."""
    experts = getattr(deployment.serving.step_time, "experts", None)
    if experts is None or "experts" not in deployment.defaults:
        raise InputError(
            f"deployment {deployment.name!r} is no mixture of experts, or was fitted without coverage; allowed: one "
            "whose trace has num_experts and experts_per_token (fit --step-time roofline), or --verifier config.json"
        )
    count, per_token, fitted = deployment.defaults["experts"]
    popularity = routes.popularity(int(count), float(per_token))
    kept, notes = deployment.defaults.get(KEY), []
    devices = None if kept is None else int(kept["tensor_parallel"])
    ranks = expert_ranks if expert_ranks is not None else int(fitted) if fitted > 1 else devices
    if ranks is None:
        raise InputError("expert_ranks: the model does not tell them; give --expert-ranks")
    if devices is not None and fitted == 1 and (ranks > devices or devices % ranks):
        raise InputError(
            f"expert_ranks: got {ranks}; allowed: a divisor of the {devices} devices that share the weights "
            "(--tensor-parallel)"
        )
    if deployment.quality.get("rows"):
        notes.append("the fit took routing as even; how uneven it was is already in the fitted costs, in part")
    if devices is None and fitted not in (1, ranks):
        notes.append(f"fitted with {fitted:g} expert ranks, asked for {ranks} on the same devices")
    notes.append("messages between ranks (all-to-all) are not told from other step costs: placement does not move them")
    return popularity, ranks, notes


def with_copies(
    deployment: FittedDeployment, redundant: int, experts: int
) -> tuple[FittedDeployment, dict[str, Any] | None, list[str]]:
    """The deployment whose KV cache has given room to ``redundant`` copies in each layer, their ``memory`` on each
    device [B] (None without an architecture), and what is to be said about it."""
    if redundant == 0:
        return deployment, None, []
    kept = deployment.defaults.get(KEY)
    if kept is None:
        note = f"the KV cache is as without copies: the memory of {redundant} more experts a layer is not known here"
        return deployment, None, [note]
    pair = FirstPrinciples.from_dict(kept)
    plan = memory_plan(pair)
    taken = pair.verifier.expert_bytes * redundant / experts / pair.tensor_parallel
    tokens = taken / (plan.kv_bytes_per_token + plan.drafter_kv_bytes_per_token)
    told = deployment.defaults.get("kv_capacity_tokens")
    before = plan.kv_capacity_tokens if told is None else told
    after = max(before - tokens, 1.0)
    memory = {"copies_bytes": taken, "kv_capacity_tokens": after, "kv_capacity_tokens_without": before}
    defaults = deployment.defaults | {COPIES: taken}
    defaults |= {} if told is None else {"kv_capacity_tokens": after}
    return dataclasses.replace(deployment, defaults=defaults), memory, []


def _at_load(
    problem: Problem, baselines: dict[str, ExpertPlacement], every: list[np.ndarray] | None, any_load: bool
) -> tuple[dict[str, Any], ExpertPlacement]:
    """The entry of a load, and the placement chosen there."""
    names = list(baselines)
    known = dict(zip(names, problem.points(list(baselines.values())), strict=True))
    start = known["eplb"]
    caps = start.placement.loads(problem.popularity).max(axis=1)
    caps = np.full(caps.size, np.inf) if any_load else caps
    best = min([p for p in known.values() if problem.keeps(p.placement, caps)], key=merit_of)
    best = min(problem.search(start, caps), best, key=merit_of)
    relaxed = relaxed_placement(
        *(problem.objective, problem.limits, problem.longest, problem.serving, problem.workload),
        *(problem.config, problem.popularity, start.placement, start.choice, caps),
    )
    if relaxed is not None:
        (rounded,) = problem.points([relaxed[0]])
        from_there = problem.search(rounded, caps)
        if problem.keeps(from_there.placement, caps) and from_there.best < best.best - 1e-12:
            best = from_there
            relaxed = (*relaxed, True)
    told: dict[str, Any] = {name: problem.told(point) for name, point in known.items()}
    told["relaxed"] = None if relaxed is None else {"draft_length": relaxed[1], "led_to_choice": len(relaxed) == 3}
    told |= {"optimality_gap": None, "points": None}
    if every is not None:
        optimum = problem.best_of_all(every, start.placement.ranks, caps)
        gap = math.expm1(best.best - optimum.best) if optimum.best < INFEASIBLE else 0.0
        told |= {"optimality_gap": 0.0 if abs(gap) < 1e-9 else gap, "points": len(every) * (problem.longest + 1)}
        best = min(best, optimum, key=merit_of)
    unbounded = problem.search(best, np.full(caps.size, np.inf))
    told |= {"chosen": problem.told(best), "latency_only": problem.told(unbounded)}
    return told | {"words": _words(problem, known["eplb"], best, unbounded)}, best.placement


def _words(problem: Problem, base: Point, best: Point, unbounded: Point) -> str:
    """What was chosen and why, in a sentence."""
    if best.best >= INFEASIBLE:
        return "no placement and draft length keeps the limits at this load; nearest shown"
    carried = f"busiest rank {best.placement.max_rank_load(problem.popularity):.4g}"
    than = f"EPLB's {base.placement.max_rank_load(problem.popularity):.4g}"
    sign = -1.0 if problem.objective == "throughput" else 1.0
    gain = sign * -math.expm1(sign * (best.best - base.best)) if base.best < INFEASIBLE else None
    against = "EPLB serves this load at no draft length" if gain is None else f"{problem.objective} {gain:.2%} better"
    told = f"{carried} against {than}, {against}"
    further = -math.expm1(unbounded.best - best.best)
    if further > WORTH_TELLING:
        more = unbounded.placement.max_rank_load(problem.popularity)
        told += f"; a busier rank ({more:.4g}) would make it another {further:.2%} better"
        told += ": not chosen, since rank load comes first"
    return told


def _for_all(
    problems: list[Problem], candidates: list[ExpertPlacement]
) -> tuple[ExpertPlacement, list[dict[str, Any]]]:
    """Of the placements chosen at single loads the one for all: it serves most loads, then the smallest mean log
    objective; with its draft length at each load."""
    distinct = list({placement.slots.tobytes(): placement for placement in candidates}.values())
    points = [problem.points(distinct) for problem in problems]
    merit = np.array([[point.best for point in row] for row in points])
    served = (merit < INFEASIBLE).sum(axis=0)
    among = np.flatnonzero(served == served.max())
    chosen = int(among[np.argmin(merit[:, among].mean(axis=0))])
    return distinct[chosen], [one.told(row[chosen]) for one, row in zip(problems, points, strict=True)]
