"""The joint decision beyond drafters and caps: trees, replicas with a price, placements of experts, and a risk."""

import json
import math
from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SERVER_STEP
from test_expert_placement import SKEWED, counts_of, mixture, popularity
from test_trees import path_products

from diffspec.acceptance import AbstractPositionwise, ConstantAcceptance
from diffspec.cli import main
from diffspec.configuration import Configuration
from diffspec.experts import ExpertRouting
from diffspec.fitting.deployment import FittedDeployment, FittedModel
from diffspec.optimizing import expert_problem, joint_experts
from diffspec.optimizing.catalogue import DrafterChoice, RequestClass, parse_drafters
from diffspec.optimizing.expert_balance import candidate_placements, place_experts
from diffspec.optimizing.expert_placement import ExpertPlacement, Placing, all_placements, eplb
from diffspec.optimizing.expert_search import routed
from diffspec.optimizing.joint import optimize_jointly
from diffspec.optimizing.joint_answer import violations
from diffspec.optimizing.joint_arms import arms_of
from diffspec.optimizing.joint_choice import foremost, least_risky
from diffspec.optimizing.joint_draws import Contender, Drawn, contenders, draw_shortlist, shortlist
from diffspec.optimizing.joint_experts import aim_of
from diffspec.optimizing.joint_problem import ClassLimit, parse_objective, shapes_of
from diffspec.optimizing.joint_question import read_joint_question
from diffspec.optimizing.joint_search import Ranges, Scored, rows, score, scored
from diffspec.optimizing.limits import parse_limit
from diffspec.programs import FAST_COMPILE
from diffspec.report import joint_tables
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.trees import Tree
from diffspec.workload import Workload

CHAT = RequestClass("chat", 1.0, 300.0, 200.0, acceptance=ConstantAcceptance(0.65))
CANDIDATES = np.asarray([[0.55, 0.25, 0.1], [0.5, 0.25, 0.05]])
TREES = DrafterChoice("trees", candidates=CANDIDATES, max_nodes=6)
LONGEST = 3
CAP = {"max_batch_size": 48.0}
NOTHING = {"max_batched_tokens": None, "cost_per_hour": None, "draws": None}


@pytest.fixture(scope="module")
def deployment():
    serving = jax.tree.map(jnp.asarray, ServingModel(SERVER_STEP, first_token_steps=1.5))
    measured = {"draft_lengths": [0, 1, 3, 5], "arrival_rate": [1.0, 20.0], "concurrency": None}
    measured |= {"prompt_length": [100.0, 2000.0], "output_length": [50.0, 400.0]}
    return FittedDeployment(
        "synthetic", "roofline", serving, None, CAP | {"drafter_params": 1e9}, measured, {"rows": 1}
    )


@pytest.fixture(scope="module")
def decide(deployment):
    """One shape of question, so that its programs are compiled once."""

    def decide(loads, **asked):
        asked = {"max_draft_length": LONGEST, "classes": (CHAT,), "cost_per_hour": 3.6, "drafters": (TREES,)} | asked
        return optimize_jointly(deployment, loads=loads, **asked)

    return decide


@pytest.fixture(scope="module")
def drawn():
    """Sixteen servers: costs of weights and of tokens unlike those of the model, by 30 %, in their logarithms."""
    spread = np.exp(0.3 * np.random.default_rng(5).standard_normal((3, 16)))
    base = jax.tree.map(lambda leaf: jnp.full(16, float(leaf)), ServingModel(SERVER_STEP, first_token_steps=1.5))

    def costs(model):
        return model.step_time.weight_read, model.step_time.token_compute, model.step_time.draft.pass_base

    return eqx.tree_at(costs, base, tuple(cost * by for cost, by in zip(costs(base), spread, strict=True)))


@pytest.mark.slow
def test_the_tree_is_the_best_of_all(decide, brute):
    """At two loads, against every tree of up to six nodes, three deep and three wide, written out: a tree of most
    tokens per step is that of least latency up to the law of its tokens."""
    few, many = decide([0.5, 24.0])["table"]
    assert few["tree"]["nodes"] > many["tree"]["nodes"]  # tokens to verify cost more in a large batch
    for entry in (few, many):
        told = entry["tree"]
        steps, top, tokens = (int(word) for word in told["sglang"].split()[1::2])
        assert (steps, tokens) == (told["depth"], told["nodes"] + 1) and told["width"] <= top
        assert told["nodes"] <= top + (steps - 1) * top**2  # as many as SGLang scores
        assert entry["draft_lengths"] == {"chat": told["depth"]} and entry["exhaustive"]
        assert 0.0 <= entry["optimality_gap"] < 0.02
        found = brute(entry["load"])
        assert entry["metrics"]["all"]["e2e_mean"] == pytest.approx(found[tuple(told["parents"])], rel=1e-9)
        assert entry["objective"] <= min(found.values()) * 1.001
        relaxed = entry["relaxed"]
        assert 1.0 <= relaxed["tree"]["width"] <= 3.0 and relaxed["tree"]["nodes"] <= 6 * 1.001


class Written(AbstractPositionwise):
    """A tree's conditional rates and nodes, as they are."""

    rates: jax.Array
    nodes: jax.Array

    def conditional_rates(self, draft_length):
        return self.rates

    def position_weights(self, draft_length):
        return jnp.where(jnp.arange(32.0) < draft_length, 1.0, 0.0)

    def drafted_tokens(self, draft_length):
        return self.nodes


@pytest.fixture(scope="module")
def brute(deployment):
    """load -> {parents: mean e2e latency [s]} of every tree."""
    trees = {()}
    for _ in range(6):
        trees |= {(*tree, parent) for tree in trees for parent in range(-1, len(tree))}
    trees = [tree for tree in map(Tree, trees - {()}) if tree.max_depth <= LONGEST and tree.rank.max() <= 3]
    table, rates = np.concatenate([CANDIDATES, CANDIDATES[-1:]]), np.zeros((len(trees), 32))
    for row, tree in zip(rates, trees, strict=True):
        value, depth = path_products(tree.parents, table)
        survival = [1.0, *(value[depth == level].sum() for level in range(1, tree.max_depth + 1))]
        row[: tree.max_depth] = np.divide(survival[1:], survival[:-1])
    nodes, depths = (np.asarray([float(getattr(tree, name)) for tree in trees]) for name in ("nodes", "max_depth"))

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def every(load, rates, nodes, depths):
        def one(rates, nodes, depth):
            workload = Workload(CHAT.prompt_length, CHAT.output_length, arrival_rate=load)
            config = Configuration(depth, Written(rates, nodes), **CAP)
            return deployment.serving.predict(workload, config).e2e_latency

        return jax.vmap(one)(rates, nodes, depths)

    def at(load):
        found = np.asarray(every(load, rates, nodes, depths))
        return dict(zip([tree.parents for tree in trees], found.tolist(), strict=True))

    return at


@pytest.mark.slow
def test_replicas_share_the_load_and_cost_money(decide):
    """The cheapest that keeps the limit has the fewest replicas that do, and its price is that of a million tokens."""
    alone = {count: decide([60.0 / count])["table"][0] for count in (2, 3)}
    fewest, bound = 3, math.sqrt(math.prod(entry["objective"] for entry in alone.values()))
    asked = {"replicas": [4, 1, 3, 2], "objective": "cost"}
    answer = decide([60.0], slo=[f"e2e_mean<{bound!r}", "throughput>59"], **asked)
    (entry,) = answer["table"]
    assert entry["replicas"] == fewest and answer["replicas"] == [1, 2, 3, 4]
    assert entry["objective"] == pytest.approx(fewest * 3.6 * 1e6 / (3600 * 60.0 * 200.0), rel=1e-9)
    same = alone[fewest]
    assert entry["metrics"]["chat"]["e2e_mean"] == pytest.approx(same["metrics"]["chat"]["e2e_mean"], rel=1e-9)
    assert entry["metrics"]["all"]["capacity"] == pytest.approx(fewest * same["metrics"]["all"]["capacity"], rel=1e-9)
    assert entry["metrics"]["all"]["throughput"] == pytest.approx(60.0, rel=1e-9)
    assert entry["metrics"]["chat"]["throughput"] == pytest.approx(60.0, rel=1e-9)
    assert entry["shadow_prices"] == [] and entry["relaxed"]["objective"] is None  # no real moves a price
    more = decide([60.0], slo=[f"e2e_mean<{bound!r}", "throughput>61"], **asked)
    assert more["outcome"] == "infeasible" and more["infeasible"]["throughput>61"]["value"] == pytest.approx(60.0)
    assert more["table"][0]["headroom"] is None
    json.dumps(answer, allow_nan=False)


@pytest.mark.slow
def test_a_risk_is_a_quantile_over_draws(decide, deployment, drawn):
    """Against every draft length predicted in every draw."""
    load, lengths = 12.0, np.arange(LONGEST + 1.0)

    def every(models, lengths):
        def one(model, length):
            workload = Workload(CHAT.prompt_length, CHAT.output_length, arrival_rate=load)
            return model.predict(workload, Configuration(length, CHAT.acceptance, **CAP)).e2e_latency

        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(models, lengths)

    found = np.asarray(jax.jit(every, compiler_options=FAST_COMPILE)(drawn, lengths))
    asked = {"drafters": (), "draws": drawn, "slo": ["e2e_mean<2"]}
    plain = decide([load], **asked)
    interval = plain["intervals"]["loads"][0]
    (chosen,) = plain["table"][0]["draft_lengths"].values()
    best = found.argmin(axis=1)
    assert plain["intervals"]["draws"] == 16 and interval["compared"] == LONGEST + 1
    assert interval["probability_best"] == pytest.approx((best == chosen).mean())
    assert 0.0 < interval["probability_best"] < 1.0
    assert plain["table"][0]["chosen_probability"] == interval["probability_best"]
    regret = (found[:, chosen] / found.min(axis=1) - 1.0)[found[:, chosen] < 2.0]
    assert interval["expected_regret"] == pytest.approx(regret.mean(), rel=1e-6)
    speedups = np.sort(found[:, 0] / found[:, chosen])
    assert speedups[0] <= interval["speedup"]["low"] <= interval["speedup"]["high"] <= speedups[-1]
    for risk in (0.25, 0.9):
        worst = np.sort(found, axis=0)[int(np.ceil(risk * 16)) - 1]
        (entry,) = decide([load], risk=risk, **asked)["table"]
        assert entry["draft_lengths"] == {"chat": int(worst.argmin())}
        assert entry["risk_objective"] == pytest.approx(worst.min(), rel=1e-9)
    few = decide([load], risk=0.25, **(asked | {"slo": [f"e2e_mean<{plain['table'][0]['objective'] * 0.9!r}"]}))
    (kept,) = few["table"]
    assert kept["feasible"] and kept["violations"] == {} and kept["speedup"] > 1.0  # broken by the model as it is
    broken = decide([load], risk=0.9, **(asked | {"slo": [f"e2e_mean<{float(np.median(found.min(axis=1)))!r}"]}))
    assert broken["outcome"] == "infeasible" and broken["infeasible"]["risk"]["bound"] == 0.9
    json.dumps([plain, broken], allow_nan=False)


def test_a_shortlist_of_any_length(drawn, deployment):
    """What must be there is, however much there is; points are evaluated some at a time."""
    own = arms_of(deployment, (), (CHAT,), Ranges(LONGEST, (48.0,)), None, {}, **NOTHING)[0]
    shapes, goal = shapes_of((CHAT,)), parse_objective("e2e_mean")
    points = np.tile([[2.0, 48.0, 0.0], [3.0, 48.0, 0.0]], (20, 1))
    points[:, 1] = np.arange(9.0, 49.0)
    found = score(own, shapes, goal, (), 12.0, points)
    every = contenders(0, found, 40)
    listed = shortlist(every, every)
    assert len(listed) == 40 == len({one.same for one in listed})
    both = draw_shortlist([own._replace(models=drawn)], listed, shapes, goal, (), 12.0)
    last = draw_shortlist([own._replace(models=drawn)], listed[-4:], shapes, goal, (), 12.0)
    assert both.cost.shape == (16, 40) and both.cost[:, -4:] == pytest.approx(last.cost, rel=1e-12)
    assert len(contenders(0, score(own, shapes, goal, (), 12.0, points[[0, 0, 1]]))) == 2


def test_goodputs_that_are_near_are_equal_by_their_distance():
    """Within a part in a thousand of the most the quickest, however a grid would cut; of equal ones the fewest
    replicas; a latency has no such room."""
    cost = np.asarray([-1.0004, -0.99945, -0.9993, -1.5])
    points = np.tile([[3.0, 48.0, 0.0, 0.0]], (4, 1))
    worst, e2e = np.asarray([-1.0, -1.0, -1.0, 1.0]), np.asarray([3.0, 2.0, 1.0, 0.0])
    metrics = {"utilization": np.full((4, 1), 0.5)}
    served = np.zeros(4, bool)
    for equal, best in ((1e-3, 1), (0.0, 0)):
        found = Scored(points, metrics, cost, np.full(4, equal), worst, served, e2e, np.ones(4))
        assert found.order[0] == best
        each = [Contender(0, rows(found, [row])) for row in range(4)]
        assert foremost(each) is each[best]
        twice = found._replace(replicas=np.full(4, 2.0))
        assert foremost([Contender(0, rows(twice, [best])), *each]) is each[best]


def test_a_risk_that_nothing_meets_leaves_the_one_that_keeps_limits_most_often():
    """Neither the quickest nor the cheapest; where draws tell none from another, the nearest by the model as it is; and
    a limit that is broken in draws alone is none that the point breaks."""
    points = np.tile([[3.0, 48.0, 0.0, 0.0]], (3, 1))
    metrics = {name: np.full((3, 1), 0.5) for name in ("utilization", "ttft_mean")}
    cost, e2e = np.asarray([-1.0, -1.1, -1.2]), np.asarray([2.0, 3.0, 1.0])
    found = Scored(points, metrics, cost, np.full(3, 1e-3), np.full(3, -1.0), np.zeros(3, bool), e2e, np.ones(3))
    listed = [Contender(0, rows(found, [row])) for row in range(3)]
    kept = np.asarray([[True, True, False]] * 2 + [[True, False, False]] + [[False] * 3])
    drawn = Drawn(np.tile(cost, (4, 1)), kept, np.ones((4, 3)))
    assert least_risky(drawn, listed, [0, 1, 2], 2, 0.9, 1e-3) == (0, np.inf)
    assert least_risky(drawn, listed, [1, 2], 2, 0.9, 0.0) == (1, np.inf)
    nothing = drawn._replace(feasible=np.zeros((4, 3), bool))
    assert least_risky(nothing, listed, [0, 1, 2], 1, 0.9, 1e-3) == (1, np.inf)
    assert least_risky(drawn, listed, [0, 1, 2], 2, 0.5, 0.0) == (1, -1.1)
    assert least_risky(drawn, listed, [0, 1, 2], 2, 0.5, 0.2) == (0, -1.0)  # equal, and quicker
    ranges = Ranges(LONGEST, (48.0,))
    asked = read_joint_question((CHAT,), "e2e_mean", ["ttft_mean<0.6"], ranges, [1.0], [1], 0.9)
    assert violations(listed[0].point, asked, 1.0) == {}


def test_a_placement_is_looked_for_by_what_a_decision_lacks():
    """Its merit tells: the objective where limits are kept; the worst limit where there is one; the latency where no
    request counts, whether or not there are limits; the load where it is not served."""
    shapes, limits = shapes_of((CHAT,)), (ClassLimit(None, parse_limit("ttft_mean<0.4")),)
    merits = {}
    for name, goodput, ttft in (("kept", 0.9, 0.3), ("broken", 0.9, 0.5), ("nothing", 0.0, 0.3), ("both", 0.0, 0.5)):
        told = {"goodput": goodput, "throughput": 1.0, "utilization": 0.5, "e2e_mean": 2.0, "ttft_mean": ttft}
        metrics = {metric: np.full((2, 1), value) for metric, value in told.items()}
        found = scored(
            np.ones((2, 4)), metrics, np.asarray([0, 1], bool), shapes, parse_objective("goodput"), limits, 1
        )
        merits[name], lost = found.rank + 1e-3 * found.e2e
        assert aim_of(lost, True) == "load"
    assert [aim_of(merit, True) for merit in merits.values()] == ["cost", "limits", "latency", "latency"]
    assert aim_of(merits["nothing"], False) == "latency"


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        *(("goodput", "4 req/s"), ("capacity", "4 req/s"), ("energy", "4 J"), ("cost", "4"), ("2*cost", "4")),
        *(("e2e_p95", "4000 ms"), ("0.7*e2e_mean + 0.3*ttft_mean", "4000 ms"), ("e2e_mean+0.1*energy", "4")),
    ],
)
def test_an_objective_is_told_in_its_unit_and_a_placement_where_it_serves(objective, value):
    common = {"drafter": "good", "draft_length": 2, "tree": None, "objective": 4.0, "feasible": True}
    entry = {"load": 1.0, "drafter": "good", "draft_lengths": {"chat": 2}, "tree": None, "max_batch_size": 16.0}
    entry |= {"placement": "searched", "objective": 4.0, "common": common, "metrics": {}, "shadow_prices": []}
    entry |= dict.fromkeys(("speedup", "headroom", "chosen_probability", "drafter_size")) | {"violations": {}}
    placed = {"searched": True, "objective_before": 4.0, "max_rank_load": 0.5}
    answer = {
        "replicas": [1],
        "placements": ["searched"],
        "objective": objective,
        "outcome": "",
        "optimality_gap": None,
    }

    def told(**changed):
        lines = list(joint_tables.joint(answer | {"table": [entry | {"placed": placed} | changed]}))
        return [str(line) for line in lines if "busiest" in str(line)]

    (both,), lost = told(feasible=True), told(feasible=False)
    assert both.endswith(f"{objective} {value} instead of {value}, busiest rank 0.5") and not lost
    (only,) = told(feasible=True, placed=placed | {"objective_before": None})
    assert only.endswith("at a decision: busiest rank 0.5")


def test_a_model_that_does_not_tell_has_no_intervals(decide):
    answer = decide([4.0])
    assert answer["intervals"] is None and answer["intervals_reason"].startswith("trees: ")
    with pytest.raises(InputError, match=r"risk: got 0\.9"):
        decide([4.0], risk=0.9)
    with pytest.raises(InputError, match="needs the price of a device"):
        decide([4.0], objective="cost", cost_per_hour=None)
    for counts in ([], [0]):
        with pytest.raises(InputError, match="replicas: got"):
            decide([4.0], replicas=counts)
    two = (CHAT, RequestClass("code", 0.0, 10.0, 10.0))
    unknown = DrafterChoice("x", candidates_by_class={"chat": CANDIDATES})
    with pytest.raises(InputError, match="none of class code"):
        decide([4.0], classes=two, drafters=(unknown,))
    placed = Placing(SKEWED, {"EPLB": eplb(SKEWED, 2)})
    with pytest.raises(InputError, match="no mixture of experts"):
        decide([4.0], placements=placed)


def test_trees_that_cannot_be_read_are_refused():
    for text, sentence in (
        ("- {name: a, max_nodes: 4}", "goes with candidates"),
        ("- {name: a, candidates: [[0.6, 0.5]]}", "at most 1"),
        ("- {name: a, candidates: [[0.6]], acceptance_rate: 0.5}", "one of them"),
        ("- {name: a, candidates: [[0.6]], max_nodes: 2.5}", "whole numbers"),
        ("- {name: a, candidates: [[x]]}", "rows of probabilities"),
    ):
        with pytest.raises(InputError, match=sentence):
            parse_drafters(text)
    (one,) = parse_drafters("- {name: a, candidates: {chat: [[0.5, 0.2], [0.4]]}, max_nodes: 8}")
    assert one.draws_trees and one.max_nodes == 8 and one.candidates_by_class["chat"].tolist() == [[0.5, 0.2], [0.4, 0]]


@pytest.fixture(scope="module")
def placing():
    """Six experts with two copies on two ranks, placed for the mean request of a poor drafter; a catalogue has a better
    one, so that the decision verifies more tokens. (deployment with the placement for all, placements, the question)"""
    shares = popularity(6, 2, 0.7, 0)
    request = {"loads": [1.0], "prompt_length": 64.0, "output_length": 60.0, "max_draft_length": LONGEST}
    request |= {"acceptance": ConstantAcceptance(0.2), "redundant_experts": 2}
    placed, answer = place_experts(mixture(6, 2, 2), counts_of(shares), **request)
    classes = (RequestClass("chat", 0.8, 64.0, 64.0), RequestClass("code", 0.2, 64.0, 44.0))
    good = {"chat": ConstantAcceptance(0.95), "code": ConstantAcceptance(0.8)}
    asked = {"loads": [1.0], "classes": classes, "drafters": (DrafterChoice("good", by_class=good),)}
    asked |= {"batch_caps": (4.0, 16.0), "max_draft_length": LONGEST}
    return placed, candidate_placements(placed, counts_of(shares), answer), asked


@pytest.fixture(scope="module")
def every_placement(placing):
    """(slots, busiest rank, [(mean e2e latency, lengths, cap)]) of every placement, by its exact routing."""
    deployment, placements, asked = placing
    points = [(a, b, cap) for a in range(LONGEST + 1) for b in range(LONGEST + 1) for cap in asked["batch_caps"]]
    every = all_placements(6, 2, 2, 10**6)
    routings = [ExpertRouting.from_slots(placements.popularity[0], slots, 2) for slots in every]
    (choice,), (chat, code) = asked["drafters"], asked["classes"]

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def all_of(routings, points):
        def one(routing, point):
            configs = [
                Configuration(point[c], choice.by_class[name], max_batch_size=point[2])
                for c, name in enumerate(("chat", "code"))
            ]
            workloads = [
                Workload(single.prompt_length, single.output_length, arrival_rate=single.share)
                for single in (chat, code)
            ]
            found = routed(deployment.serving, routing).predict_classes(workloads, configs)
            return found.e2e_latency @ jnp.asarray([0.8, 0.2])

        return jax.lax.map(lambda routing: jax.vmap(one, (None, 0))(routing, points), routings)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *routings)
    found = np.asarray(all_of(stacked, np.asarray(points, dtype=float)))
    busiest = [ExpertPlacement(slots[None], 2, 6).max_rank_load(placements.popularity) for slots in every]
    return found, np.asarray(busiest), np.stack(every)


@pytest.mark.slow
def test_the_placement_is_the_best_of_all_at_the_decision(placing, every_placement):
    """Of every placement that loads no rank more than EPLB's, at every draft length of each class and every cap; what
    was chosen for the mean request is strictly worse."""
    deployment, placements, asked = placing
    found, busiest, _ = every_placement
    (entry,) = optimize_jointly(deployment, placements=placements, **asked)["table"]
    allowed = busiest <= placements.caps[0] * (1 + 1e-9)
    best, told = found[allowed].min(), entry["placed"]
    assert entry["objective"] == pytest.approx(best, rel=1e-5) and found.min() < best
    assert told["searched"] and entry["placement"] == "searched at 1 req/s"
    assert told["max_rank_load"] <= placements.caps[0] * (1 + 1e-9)
    assert entry["objective"] < told["objective_before"] * (1 - 1e-3)
    old = replace(placements, caps=None)
    (before,) = optimize_jointly(deployment, placements=old, **asked)["table"]
    assert before["objective"] == told["objective_before"] and not before["placed"]["searched"]
    json.dumps(entry, allow_nan=False)


@pytest.mark.slow
def test_local_search_at_the_decision_is_near_the_best_of_all(placing, every_placement, monkeypatch):
    """Where placements are too many to compare; also without EPLB's rank load as a cap. Within a part in a thousand."""
    monkeypatch.setattr(joint_experts, "SMALL_SPACE", joint_experts.MOST_DECISIONS)
    deployment, placements, asked = placing
    found, busiest, _ = every_placement
    for caps, allowed in (
        (placements.caps, busiest <= placements.caps[0] * (1 + 1e-9)),
        (np.asarray([np.inf]), busiest < np.inf),
    ):
        (entry,) = optimize_jointly(deployment, placements=replace(placements, caps=caps), **asked)["table"]
        assert entry["objective"] <= found[allowed].min() * 1.001
        assert entry["placed"]["searched"] and entry["objective"] < entry["placed"]["objective_before"]


@pytest.mark.slow
def test_a_placement_for_goodput_is_looked_for_by_latency_and_where_nobody_keeps_the_limits(placing, monkeypatch):
    """Where every request keeps its limits goodput is the load on any placement: a quicker one is found all the same,
    also in the local search. Where none does no placement has an objective, and that is an answer; and a price, which
    no placement moves, leaves the quickest."""
    monkeypatch.setattr(joint_experts, "SMALL_SPACE", joint_experts.MOST_DECISIONS)
    monkeypatch.setattr(joint_experts, "STARTS", 1)
    monkeypatch.setattr(expert_problem, "POLISHED", 8)
    deployment, placements, asked = placing
    (quick,) = optimize_jointly(deployment, placements=placements, **asked)["table"]
    easy = {"objective": "goodput", "slo": ["ttft<900"]}
    (served,) = optimize_jointly(deployment, placements=placements, **easy, **asked)["table"]
    known = replace(placements, caps=None)
    (before,) = optimize_jointly(deployment, placements=known, **easy, **asked)["table"]
    latencies = [entry["metrics"]["all"]["e2e_mean"] for entry in (served, before, quick)]
    assert served["placed"]["searched"] and latencies[0] < latencies[1] * (1 - 1e-3)
    assert latencies[0] <= latencies[2] * 1.001
    answer = optimize_jointly(deployment, placements=placements, **(easy | {"slo": ["ttft<0.000001"]}), **asked)
    assert answer["outcome"] == "infeasible" and answer["table"][0]["placed"]["objective_before"] is None
    (cheap,) = optimize_jointly(deployment, placements=placements, objective="cost", cost_per_hour=2.0, **asked)[
        "table"
    ]
    assert cheap["objective"] == cheap["placed"]["objective_before"]
    assert cheap["metrics"]["all"]["e2e_mean"] <= latencies[2] * 1.001


@pytest.mark.slow
def test_a_placement_is_decided_on_the_command_line(tmp_path, capsys, monkeypatch):
    deployment = mixture(6, 2, 2)
    np.savez(tmp_path / "routing.npz", counts=popularity(6, 2, 0.7, 0) * 1e6)
    (tmp_path / "model.json").write_text(FittedModel({deployment.name: deployment}, "0" * 64, {}).to_json())
    (tmp_path / "drafters.yaml").write_text("- {name: good, acceptance_rate: 0.95}\n")
    command = ["optimize", str(tmp_path / "model.json"), "--arrival-rate", "1", "--max-draft-length", str(LONGEST)]
    command += ["--experts", str(tmp_path / "routing.npz"), "--redundant-experts", "2", "--batch-caps", "4,16"]
    command += ["--prompt-length", "64", "--output-length", "64", "--acceptance-rate", "0.2"]
    command += ["--drafters", str(tmp_path / "drafters.yaml"), "--expert-location", str(tmp_path / "location.json")]
    monkeypatch.setenv("COLUMNS", "240")  # no heading wraps
    assert main([*command, "--out", str(tmp_path / "told.json")]) == 0
    shown = capsys.readouterr().out
    assert "experts placed" in shown and "6 experts, 2 a token, on 2 ranks" in shown
    assert "the placement is one that was looked for at a decision: e2e_mean" in shown
    told = json.loads((tmp_path / "told.json").read_text())
    (entry,) = told["table"]
    assert told["experts"]["outcome"] == "successful" and entry["placement"] in told["placements"]
    assert "EPLB" in told["placements"] and entry["placed"]["searched"]
    location = json.loads((tmp_path / "location.json").read_text())
    assert location == {"physical_to_logical_map": entry["placed"]["physical_to_logical_map"]}
