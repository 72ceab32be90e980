"""Placement of experts: coverage with copies against simulated routing, EPLB against its published example, placements
and draft lengths against every one there is, and the command line."""

import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from helpers import assert_close
from oracles import route_by_systematic_sampling
from test_architecture import QWEN3_30B_A3B
from test_cli_main import run, toy_deployment, toy_model

from diffspec.acceptance import ConstantAcceptance
from diffspec.analysis.before_traces import before_traces
from diffspec.architecture import read_architecture
from diffspec.cli.experts import ExpertOptions
from diffspec.experts import CoverageTable, ExpertRouting
from diffspec.first_principles import FirstPrinciples
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.forms import Scales, build_form
from diffspec.hardware import accelerator
from diffspec.optimizing import expert_search
from diffspec.optimizing.catalogue import DrafterChoice
from diffspec.optimizing.expert_balance import exported, place_experts, place_unmeasured
from diffspec.optimizing.expert_placement import (
    ExpertPlacement,
    Placing,
    all_placements,
    check_slots,
    eplb,
    exports,
    packing,
    round_robin,
)
from diffspec.optimizing.expert_problem import undominated
from diffspec.optimizing.expert_search import _Layer, descend, neighbours, pressure, rounded, routed
from diffspec.optimizing.fleet import optimize_fleet
from diffspec.optimizing.joint_arms import making_room
from diffspec.optimizing.servers import server_of
from diffspec.results import InputError
from diffspec.traces.routing import RoutingCounts, read_routing
from diffspec.workload import Workload

LENGTHS = {"prompt_length": 64.0, "output_length": 64.0}
SKEWED = np.array([[0.8, 0.5, 0.3, 0.2, 0.15, 0.05]])  # m = 2 of M = 6
ACCEPTANCE = ConstantAcceptance(0.75)
LONGEST = 3


def popularity(experts: int, per_token: float, skew: float, seed: int, layers: int = 1) -> np.ndarray:
    """Zipf-like popularity in random order, each layer its own, capped at 1."""
    share = np.arange(1, experts + 1.0) ** -skew
    scale = np.max([per_token / share.sum(), 1e-9])
    for _ in range(60):
        scale *= per_token / np.minimum(scale * share, 1.0).sum()
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(np.minimum(scale * share, 1.0)) for _ in range(layers)])


def mixture(experts: int, per_token: int, ranks: int, **defaults) -> FittedDeployment:
    """A mixture of experts that nothing was fitted to, its step mostly the reading of experts."""
    serving = build_form("roofline-moe", Scales(0.02, 0.08, 96.0, 64.0), (experts, per_token, ranks)).template
    plain = toy_deployment()
    told = {"max_batch_size": None, "experts": (float(experts), float(per_token), float(ranks))}
    return FittedDeployment(
        name="mixture",
        form="roofline-moe",
        serving=serving,
        acceptance=plain.acceptance,
        defaults=plain.defaults | told | defaults,
        measured=plain.measured,
        quality=plain.quality,
    )


def counts_of(shares: np.ndarray) -> RoutingCounts:
    return RoutingCounts("synthetic", shares * 1e6)


def asked(loads, **more):
    return {"loads": loads, **LENGTHS, "acceptance": ACCEPTANCE, "max_draft_length": LONGEST} | more


@pytest.fixture(scope="module")
def small():
    """Six experts on two ranks with two copies, small enough to compare all placements."""
    deployment = mixture(6, 2, 2)
    loads = [0.5, 6.0]
    placed, answer = place_experts(deployment, counts_of(SKEWED), redundant_experts=2, **asked(loads))
    return deployment, loads, placed, answer


# --- coverage with copies ----------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_copies_cover_as_simulated_routing_does(tokens):
    """Each token of an expert goes to one of its copies; every copy that gets one is read."""
    slots = np.array([0, 1, 2, 3, 0, 4, 5, 1])
    routing = ExpertRouting.from_slots(SKEWED[0], slots, 2)
    random = np.random.default_rng(tokens)
    read = np.zeros((20_000, slots.size), bool)
    for _ in range(tokens):
        chosen = route_by_systematic_sampling(SKEWED[0], 1, len(read), seed=int(random.integers(1 << 30)))
        for expert in range(6):
            copies = np.flatnonzero(slots == expert)
            taken = random.choice(copies, len(read))
            read[np.arange(len(read)), taken] |= chosen[:, expert]
    on_rank = read.reshape(len(read), 2, 4).sum(axis=2)
    slowest = int(on_rank.mean(axis=0).argmax())
    error = on_rank[:, slowest].std() / np.sqrt(len(read))
    assert abs(float(routing.coverage(float(tokens))) * 3 - on_rank.mean(axis=0).max()) < 4 * error + 1e-12
    placement = ExpertPlacement(slots[None], 2, 6)
    assert_close(placement.loads(SKEWED)[0], [0.4 + 0.25 + 0.3 + 0.2, 0.4 + 0.15 + 0.05 + 0.25], rtol=1e-12)
    assert_close(routing.load_imbalance(), placement.load_imbalance(SKEWED), rtol=1e-12)


def test_one_copy_each_is_the_placement_of_before():
    slots = np.array([0, 5, 2, 1, 3, 4])
    plain = ExpertRouting.from_popularity(SKEWED[0], [0, 1, 0, 1, 1, 0])
    for tokens in (0.3, 1.0, 7.0, 300.0):
        assert_close(ExpertRouting.from_slots(SKEWED[0], slots, 2).coverage(tokens), plain.coverage(tokens), rtol=1e-14)
    assert_close(ExpertRouting.from_slots(SKEWED[0], slots, 2).load_imbalance(), plain.load_imbalance(), rtol=1e-14)


def test_copies_widen_coverage_and_even_loads():
    shares = [0.9, 0.4, 0.3, 0.2, 0.1, 0.1]
    alone = ExpertRouting.from_slots(shares, [0, 1, 2, 3, 4, 5], 2)
    copied = ExpertRouting.from_slots(shares, [0, 5, 4, 2, 0, 1, 3, 2], 2)
    assert_close([alone.load_imbalance(), copied.load_imbalance()], [1.6, 1.2], rtol=1e-12)
    assert float(copied.coverage(1e9)) == pytest.approx(8 / 6) and float(alone.coverage(1e9)) == pytest.approx(1.0)


def test_layers_are_averaged_after_the_slowest_rank():
    shares = popularity(8, 2, 1.0, 3, layers=3)
    placement = round_robin(shares, 4)
    every = placement.routing(shares)
    each = [ExpertRouting.from_slots(shares[i], placement.slots[i], 4) for i in range(3)]
    for tokens in (1.0, 20.0):
        assert_close(every.coverage(tokens), np.mean([float(one.coverage(tokens)) for one in each]), rtol=1e-13)
    assert_close(every.load_imbalance(), np.mean([float(one.load_imbalance()) for one in each]), rtol=1e-13)
    assert placement.max_rank_load(shares) == pytest.approx(max(float(o.load_imbalance()) for o in each) * 2 / 4)


@pytest.mark.parametrize("layers", [1, 4])
def test_a_table_is_its_routing(layers):
    shares = popularity(24, 3, 1.2, 5, layers)
    placement = eplb(shares, 4, 8)
    table, routing = placement.table(shares), placement.routing(shares)
    tokens = np.exp(np.random.default_rng(6).uniform(np.log(0.2), np.log(5e5), 300))
    read = jax.jit(jax.vmap(lambda table, t: table.coverage(t), (None, 0)))
    exact = jax.jit(jax.vmap(lambda routing, t: routing.coverage(t), (None, 0)))(routing, tokens)
    assert_close(read(table, tokens), exact, rtol=2e-5)  # the kinks where another rank becomes the slowest
    assert np.median(np.abs(np.asarray(read(table, tokens) / exact) - 1)) < 1e-7
    made = jax.jit(CoverageTable.of)(routing)
    assert_close(made.log_coverage, table.log_coverage, rtol=1e-12, atol=1e-12)
    assert_close(made.elasticity, table.elasticity, rtol=1e-9, atol=1e-12)
    assert_close(table.load_imbalance(), routing.load_imbalance(), rtol=1e-13)
    slope = jax.jit(jax.vmap(jax.grad(lambda x, t: jnp.log(t.coverage(jnp.exp(x)))), (0, None)))(np.log(tokens), table)
    assert np.all((np.asarray(slope) <= 1.0 + 1e-4) & (np.asarray(slope) >= -1e-9))
    assert float(table.coverage(0.0)) == 0.0
    assert float(table.coverage(1e8)) == pytest.approx(float(routing.coverage(1e8)), rel=1e-3)


def test_a_norm_over_ranks_is_a_smooth_maximum():
    plain = ExpertRouting.from_slots(SKEWED[0], [0, 5, 4, 1, 2, 3], 2)
    for sharpness, close in ((8.0, 0.1), (64.0, 0.012)):
        smooth = ExpertRouting(plain.popularity, plain.placement, plain.share, sharpness)
        for part in ("coverage", "load_imbalance"):
            arguments = (5.0,) if part == "coverage" else ()
            ratio = float(getattr(smooth, part)(*arguments) / getattr(plain, part)(*arguments))
            assert 1.0 <= ratio <= 1.0 + close


# --- files ----------------------------------------------------------------------


def test_histograms_and_choices_are_read(tmp_path):
    chosen = np.array([[0, 1], [0, 2], [0, 3], [1, 2]])
    np.savez(tmp_path / "ids.npz", experts=chosen, num_experts=5)
    np.savez(tmp_path / "counts.npz", counts=[3, 2, 2, 1, 0], tokens=4)
    layered = {"layer": [3, 3, 3, 3, 9, 9], "expert": [0, 1, 2, 3, 0, 4], "count": [3, 2, 2, 1, 4, 4]}
    pd.DataFrame(layered).to_csv(tmp_path / "table.csv", index=False)
    pd.DataFrame(layered).to_parquet(tmp_path / "table.parquet")
    steps = [[[1, 1, 1, 1, 0]], [[2, 1, 1, 0, 0]]]
    (tmp_path / "sglang.json").write_text(json.dumps({"logical_count": steps}))
    expected = np.array([[0.75, 0.5, 0.5, 0.25, 0.0]])
    for name in ("ids.npz", "counts.npz", "sglang.json"):
        assert_close(read_routing(tmp_path / name).popularity(5, 2), expected, rtol=1e-14)
    for name in ("table.csv", "table.parquet"):
        assert_close(read_routing(tmp_path / name).popularity(5, 2), [expected[0], [1, 0, 0, 0, 1]], rtol=1e-14)
    assert read_routing(tmp_path / "ids.npz").experts_per_token == 2.0
    np.savez(tmp_path / "layers.npz", experts=np.stack([chosen, chosen[:, ::-1]]), num_experts=5)
    assert read_routing(tmp_path / "layers.npz").counts.tolist() == [[3, 2, 2, 1, 0]] * 2


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"count": [1.0]}, "exactly one of counts, experts, logical_count"),
        ({"counts": [1.0], "experts": [[0]]}, "exactly one of"),
        ({"counts": [1.0, -2.0]}, "got -2; allowed: 0 or more"),
        ({"counts": [1.0, np.nan]}, "finite numbers"),
        ({"counts": [[1.0, 1.0], [0.0, 0.0]]}, "layer 1 has no tokens"),
        ({"counts": np.ones((2, 2, 2))}, r"\[experts\] or \[layers, experts\]"),
        ({"counts": ["a", "b"]}, "an array of numbers"),
        ({"counts": [2.0, 2.0], "tokens": [1.0, 2.0]}, "one number above 0"),
        ({"counts": [[2.0, 2.0], [3.0, 3.0]], "tokens": 2.0}, "layers have"),
        ({"experts": [0, 1]}, r"\[tokens, experts_per_token\]"),
        ({"experts": [[0, 1], [2, 2]]}, "token 1 goes to one expert twice"),
        ({"experts": [[0.5, 1]]}, "whole numbers"),
        ({"experts": [[0, 7]], "num_experts": 4}, "from 0 to 3"),
    ],
)
def test_bad_routing_is_named(arrays, said, tmp_path):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(InputError, match=said):
        read_routing(tmp_path / "r.npz")


def test_other_bad_files_are_named(tmp_path):
    (tmp_path / "r.npz").write_bytes(b"PK nonsense")
    (tmp_path / "r.json").write_text("[1, 2]")
    (tmp_path / "r.csv").write_text("layer,count\n0,1\n")
    (tmp_path / "s.csv").write_text("expert,count\n0,1\n-1,1\n")
    np.save(tmp_path / "a.npy", np.ones(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    for name, said in (
        ("r.npz", "numpy.savez"),
        ("a.npz", "single array"),
        ("r.json", "an object"),
        ("r.csv", "no column expert"),
        ("s.csv", "whole numbers"),
        ("none.npz", "no such file"),
        ("x.pt", "logical_count"),
        ("x.txt", "allowed: .npz"),
    ):
        with pytest.raises(InputError, match=said):
            read_routing(tmp_path / name)
    routes = counts_of(SKEWED)
    for count, per_token, said in ((8, 2, "got 6 experts"), (6, 4, "times as many tokens")):
        with pytest.raises(InputError, match=said):
            routes.popularity(count, per_token)
    with pytest.raises(InputError, match="got 2 experts per token"):
        RoutingCounts("x", np.ones((1, 6)), 3.0, 2.0).popularity(6, 3)


# --- heuristics ----------------------------------------------------------------------


def test_eplb_gives_its_published_example():
    """The example of DeepSeek's README: two layers of 12 experts, 16 copies, 4 groups, 2 nodes of 4 ranks (MIT)."""
    load = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    printed = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert eplb(np.array(load, float), 8, 4, groups=4, nodes=2).slots.tolist() == printed


def test_copies_minimise_the_largest_load_per_copy():
    """Greedy copying is optimal for max p_e/c_e: compared with every way to share out three copies."""
    random = np.random.default_rng(8)
    for _ in range(20):
        own = random.dirichlet(np.ones(5))
        copies = eplb(own[None], 2, 3).copies[0]
        every = (1 + np.bincount(more, minlength=5) for more in itertools.combinations_with_replacement(range(5), 3))
        assert (own / copies).max() == pytest.approx(min((own / counts).max() for counts in every))


def test_packs_hold_equally_many_and_round_robin_looks_at_nothing():
    held = packing(np.array([9.0, 1.0, 1.0, 1.0, 5.0, 4.0]), 2)
    assert held == [[0, 1, 3], [4, 5, 2]]  # 9 and 5+4, then a 1 each in turn, the last where there is room
    placement = round_robin(np.ones((2, 4)), 3, 2)
    assert placement.slots.tolist() == [[0, 3, 1, 0, 2, 1]] * 2
    assert placement.on_rank[0].sum(axis=1).tolist() == [2, 2, 2]
    told = exports(placement)
    assert told["sglang"]["init_expert_location"] == {"physical_to_logical_map": [[0, 3, 1, 0, 2, 1]] * 2}
    assert "--ep-num-redundant-experts 2" in told["sglang"]["flags"] and '"num_redundant_experts":2' in str(
        told["vllm"]
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: check_slots(6, 4, 0), "allowed: 2"),
        (lambda: check_slots(6, 4, 3), "allowed: 2 or 6"),
        (lambda: check_slots(6, 7, 1), "1 to 6"),
        (lambda: check_slots(6, 2, -2), "redundant_experts: got -2"),
        (lambda: eplb(SKEWED, 2, 2, groups=4), "a divisor of the 6 experts"),
        (lambda: eplb(SKEWED, 2, 2, groups=2, nodes=3), "nodes: got 3"),
        (lambda: ExpertRouting.from_slots(SKEWED[0], [0, 1, 2, 3, 4, 4], 2), "every expert"),
        (lambda: ExpertRouting.from_slots(SKEWED[0], [0, 1, 2, 3, 4, 5, 0], 2), "equal slots"),
        (lambda: ExpertRouting.from_slots([1.5, 0.5], [0, 1], 2), r"in \[0, 1\]"),
    ],
)
def test_bad_placements_are_named(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_every_placement_is_listed_once():
    for experts, ranks, redundant in ((5, 2, 1), (4, 2, 2), (6, 3, 0), (3, 3, 3)):
        size = (experts + redundant) // ranks
        every = set()
        for more in itertools.combinations_with_replacement(range(experts), redundant):
            for order in set(itertools.permutations([*range(experts), *more])):
                rows = sorted(tuple(sorted(order[r * size : (r + 1) * size])) for r in range(ranks))
                every.add(tuple(itertools.chain(*rows)))
        listed = all_placements(experts, ranks, redundant, 10**6)
        assert listed is not None and len(listed) == len(every)
        assert {tuple(map(int, slots)) for slots in listed} == every


# --- search ----------------------------------------------------------------------


def test_pressure_is_the_derivative_of_the_objective():
    deployment, load = mixture(6, 2, 2), Workload(**LENGTHS, arrival_rate=4.0)
    config = deployment.configuration(3.0, acceptance=ACCEPTANCE)
    table = eplb(SKEWED, 2).table(SKEWED)
    pressed = pressure("e2e_mean", deployment.serving, table, load, config, 2, False)

    @jax.jit
    def latency(wider, busier):
        moved = CoverageTable(table.log_coverage + wider, table.elasticity, table.imbalance * jnp.exp(busier))
        at_two = deployment.configuration(2.0, acceptance=ACCEPTANCE)
        prediction = routed(deployment.serving, moved).predict(load, at_two)
        return jnp.log(prediction.e2e_latency)

    h = 1e-4
    assert_close(pressed.read, (latency(h, 0.0) - latency(-h, 0.0)) / (2 * h), rtol=1e-5)
    assert_close(pressed.load, (latency(0.0, h) - latency(0.0, -h)) / (2 * h), rtol=1e-5)
    assert 1.0 < pressed.tokens < 60.0


@pytest.mark.parametrize("redundant", [0, 4])
def test_scores_of_moves_are_those_of_the_placements_they_make(redundant):
    shares = popularity(12, 2, 1.0, 9)
    start = eplb(shares, 4, redundant)
    pressed, cap = expert_search.Pressure(6.0, 0.4, 0.3), 0.55
    layer = _Layer(shares[0], start.slots[0], 4, pressed, cap)

    def afresh(slots):
        made = _Layer(shares[0], slots, 4, pressed, cap)
        made.units = layer.units
        return made.now()

    for rank in range(4):
        scores, own, others = layer.swaps(rank)
        for i, j in itertools.product(range(len(own)), range(len(others))):
            slots = layer.slots.copy()
            slots[own[i]], slots[others[j]] = slots[others[j]], slots[own[i]]
            assert scores[i, j] == pytest.approx(afresh(slots), rel=1e-10)
    scores, free = layer.recopies()
    assert scores.shape == ((start.copies[0][start.slots[0]] > 1).sum(), 12) and bool(redundant) == bool(len(free))
    for i, expert in itertools.product(range(len(free)), range(12)):
        if expert != layer.slots[free[i]]:
            slots = layer.slots.copy()
            slots[free[i]] = expert
            assert scores[i, expert] == pytest.approx(afresh(slots), rel=1e-10)
    improved = descend(shares, start, pressed, np.array([np.inf]))
    assert afresh(improved.slots[0]) <= layer.now()
    beside = neighbours(shares, start, pressed, cap, 5)
    assert len(beside) == 5 and all((placement.slots != start.slots).sum() in (1, 2) for placement in beside)


def test_rounding_keeps_slots_and_copies():
    random = np.random.default_rng(10)
    soft = random.dirichlet(np.ones(3), 6).T * 1.5
    slots = rounded(soft, np.full(6, 1.5), 3)
    assert slots.size == 9 and set(slots) == set(range(6))
    hard = ExpertPlacement(np.array([[0, 4, 1, 0, 2, 3]]), 2, 5)
    again = rounded(hard.on_rank[0].astype(float), hard.copies[0].astype(float), 1)
    assert np.array_equal(ExpertPlacement(again[None], 2, 5).on_rank, hard.on_rank)


# --- together with the draft length ----------------------------------------------------------------------


@pytest.mark.slow
def test_small_problems_are_solved_to_the_optimum(small):
    """Every placement and draft length by the exact routing, without tables or tricks."""
    deployment, loads, _, answer = small
    every = all_placements(6, 2, 2, 10**6)
    assert every is not None
    routings = [ExpertRouting.from_slots(SKEWED[0], slots, 2) for slots in every]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *routings)

    @jax.jit
    def latencies(rate):
        def one(routing, length):
            config = deployment.configuration(length, acceptance=ACCEPTANCE)
            return routed(deployment.serving, routing).predict(Workload(**LENGTHS, arrival_rate=rate), config)

        lengths = jnp.arange(LONGEST + 1.0)
        return jax.vmap(lambda routing: jax.vmap(lambda k: one(routing, k).e2e_latency)(lengths))(stacked)

    busiest = np.array([ExpertPlacement(slots[None], 2, 6).max_rank_load(SKEWED) for slots in every])
    for load, entry in zip(loads, answer["table"], strict=True):
        e2e = np.asarray(latencies(load))
        allowed = busiest <= entry["eplb"]["max_rank_load"] * (1 + 1e-9)
        best, chosen = e2e[allowed].min(), entry["chosen"]
        assert_close(chosen["e2e_mean"], best, rtol=1e-6)
        assert chosen["draft_length"] == np.argmin(e2e[allowed].min(axis=0))
        assert entry["points"] == len(every) * (LONGEST + 1)
        assert entry["optimality_gap"] == pytest.approx(chosen["e2e_mean"] / best - 1, abs=1e-6)
        assert entry["latency_only"]["e2e_mean"] >= e2e.min() * (1 - 1e-6)
        kept = undominated(SKEWED, every, 2, entry["eplb"]["max_rank_load"])
        indices = [next(i for i, slots in enumerate(every) if np.array_equal(slots, p.slots[0])) for p in kept]
        assert len(kept) < allowed.sum()
        assert_close(e2e[indices].min(axis=0), e2e[allowed].min(axis=0), rtol=1e-9)


def test_what_is_told_is_what_the_server_does(small):
    deployment, loads, placed, answer = small
    json.dumps(answer, allow_nan=False)
    exact = jax.jit(lambda model, rate, config: model.predict(Workload(**LENGTHS, arrival_rate=rate), config))
    for load, entry in zip(loads, answer["table"], strict=True):
        for name in ("round_robin", "eplb", "chosen", "latency_only"):
            told = entry[name]
            slots = np.array(told["physical_to_logical_map"])
            config = deployment.configuration(float(told["draft_length"]), acceptance=ACCEPTANCE)
            model = routed(deployment.serving, ExpertRouting.from_slots(SKEWED, slots, 2))
            assert_close(told["e2e_mean"], exact(model, load, config).e2e_latency, rtol=1e-5)
            loads_of = ExpertPlacement(slots, 2, 6).loads(SKEWED)
            assert_close(told["max_rank_load"], loads_of.max(), rtol=1e-12)
        at = next(told for told in answer["placement"]["at_loads"] if told["load"] == load)
        config = deployment.configuration(float(at["draft_length"]), acceptance=ACCEPTANCE)
        assert_close(at["e2e_mean"], exact(placed.serving, load, config).e2e_latency, rtol=1e-9)
        assert at["e2e_mean"] <= entry["eplb"]["e2e_mean"] * (1 + 1e-12)
    assert (
        answer["exports"]["sglang"]["init_expert_location"]["physical_to_logical_map"]
        == (answer["placement"]["physical_to_logical_map"])
    )
    assert any("more experts a layer is not known" in note for note in answer["warnings"])


def test_never_worse_than_eplb_on_rank_load_or_latency(monkeypatch):
    """Random skews, layers and loads; without the relaxation, so that local search alone keeps the promise too."""
    monkeypatch.setattr(expert_search, "MOST_RELAXED", 0)
    deployment, better = mixture(24, 2, 4), 0
    for seed, (skew, layers, redundant) in enumerate(((0.5, 1, 0), (1.0, 1, 4), (1.5, 3, 0), (1.0, 3, 4))):
        shares = popularity(24, 2, skew, seed, layers)
        _, answer = place_experts(
            deployment, counts_of(shares), redundant_experts=redundant, **asked([1.0, 6.0], loop="concurrency")
        )
        base = np.array(answer["table"][0]["eplb"]["physical_to_logical_map"])
        caps = ExpertPlacement(base, 4, 24).loads(shares).max(axis=1)
        for entry in answer["table"]:
            assert entry["relaxed"] is None and entry["optimality_gap"] is None
            slots = np.array(entry["chosen"]["physical_to_logical_map"])
            assert np.all(ExpertPlacement(slots, 4, 24).loads(shares).max(axis=1) <= caps * (1 + 1e-9))
            assert entry["chosen"]["e2e_mean"] <= entry["eplb"]["e2e_mean"]
            assert entry["latency_only"]["e2e_mean"] <= entry["chosen"]["e2e_mean"]
            better += entry["chosen"]["e2e_mean"] < entry["eplb"]["e2e_mean"] * (1 - 1e-3)
    assert better >= 2


def test_conflicts_limits_and_saturation_are_told(small):
    """Copies are read too: at low load a less even placement is faster. It is told, and chosen only on request."""
    deployment, loads, _, answer = small
    one = asked(loads[:1])
    _, free = place_experts(deployment, counts_of(SKEWED), redundant_experts=2, any_rank_load=True, **one)
    entry, capped = free["table"][0], answer["table"][0]
    assert entry["chosen"]["e2e_mean"] < capped["chosen"]["e2e_mean"] * (1 - 1e-3)
    assert entry["chosen"]["max_rank_load"] > capped["eplb"]["max_rank_load"]
    assert "not chosen, since rank load comes first" in capped["words"]
    _, answer = place_experts(deployment, counts_of(SKEWED), redundant_experts=2, **asked([500.0]))
    assert answer["outcome"] == "infeasible" and answer["table"][0]["chosen"]["draft_length"] is None
    assert "keeps the limits" in answer["table"][0]["words"]
    json.dumps(answer, allow_nan=False)


def test_what_a_joint_decision_places_is_exported_where_it_is_one(small):
    """That of every load that is served; where each has another, the one for all stays, and that is said."""
    *_, answer = small
    one, two = (
        {"placed": {"physical_to_logical_map": [slots]}} for slots in ([0, 1, 2, 3, 4, 5, 0, 1], [*range(6), 2, 3])
    )
    served, lost = {"feasible": True}, {"feasible": False}
    told = exported(answer, [one | served, two | lost, one | served])
    location = told["exports"]["sglang"]["init_expert_location"]
    assert (
        location == {"physical_to_logical_map": [[0, 1, 2, 3, 4, 5, 0, 1]]} and told["warnings"] == answer["warnings"]
    )
    told = exported(answer, [one | served, two | served])
    assert told["exports"] == answer["exports"] and "differently by load" in told["warnings"][-1]
    assert exported(answer, [{"placed": None} | served, one | lost]) == answer


def test_what_cannot_be_placed_is_named():
    deployment = mixture(6, 2, 1)
    with pytest.raises(InputError, match="give --expert-ranks"):
        place_experts(deployment, counts_of(SKEWED), **asked([1.0]))
    with pytest.raises(InputError, match="no mixture of experts"):
        place_experts(toy_deployment(), counts_of(SKEWED), expert_ranks=2, **asked([1.0]))
    with pytest.raises(InputError, match="got 6 experts"):
        place_experts(mixture(8, 2, 2), counts_of(SKEWED), **asked([1.0]))
    with pytest.raises(InputError, match=r"limits are on ttft_mean.*decided too \(--batch-caps\)"):
        place_experts(mixture(6, 2, 2), counts_of(SKEWED), **asked([1.0], slo=["memory<72"]))
    with pytest.raises(InputError, match="of one model at a time"):
        optimize_fleet({}, **asked([1.0], slo=["ttft_p95<0.5"]))
    with pytest.raises(InputError, match="did you mean 'ttft_mean'"):
        place_experts(mixture(6, 2, 2), counts_of(SKEWED), **asked([1.0], slo=["ttft_mea<1"]))


# --- the command line ----------------------------------------------------------------------


@pytest.fixture
def routing(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSPEC_CACHE_DIR", "")
    monkeypatch.setenv("COLUMNS", "160")
    np.savez(tmp_path / "routing.npz", counts=SKEWED * 1e6)
    return tmp_path / "routing.npz"


def test_a_joint_decision_starts_from_busier_ranks_only_where_any_will_do(small, routing):
    deployment, _, _, answer = small
    options = ExpertOptions(experts=routing)
    capped, free = (one.candidates(deployment, answer) for one in (options, replace(options, any_rank_load=True)))
    assert capped is not None and free is not None and np.all(np.isinf(free.caps)) and np.all(np.isfinite(capped.caps))
    busiest = {name: one.max_rank_load(SKEWED) for name, one in free.placements.items()}
    busier = {name for name, load in busiest.items() if load > capped.caps[0] * (1 + 1e-9)}
    assert busier and set(capped.placements) == set(busiest) - busier and free.copies == 2


def test_optimize_places_experts_of_a_fitted_model(routing, tmp_path):
    model = toy_model(tmp_path / "model.json", mixture(6, 2, 2))
    line = ("optimize", model, "--arrival-rate", "0.5,6", "--max-draft-length", "3", "--acceptance-rate", "0.75")
    line += ("--prompt-length", "64", "--output-length", "64", "--experts", routing, "--redundant-experts", "2")
    ran = run(*line, "--out", tmp_path / "answer.json", "--expert-location", tmp_path / "location.json")
    assert ran.code == 0, ran.err
    assert all(
        word in ran.out for word in ("EPLB", "round robin", "busiest rank", "search above optimum", "--ep-size 2")
    )
    assert "routing as even" in ran.err
    answer = json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))
    placed = answer["experts"]
    for told, entry in zip(placed["placement"]["at_loads"], answer["table"], strict=True):
        assert told["draft_length"] == entry["draft_length"]
        assert told["e2e_mean"] == pytest.approx(entry["metrics"]["e2e_mean"], rel=1e-9)
    location = json.loads((tmp_path / "location.json").read_text(encoding="utf-8"))
    assert location == {"physical_to_logical_map": placed["placement"]["physical_to_logical_map"]}
    assert run(*line, "--out", routing).code == 2  # the input is not written over
    assert run(*line[:2], *line[2:12], "--expert-ranks", "2").code == 2


@pytest.fixture
def subject(tmp_path):
    """Eight layers of six experts on two L4, never measured."""
    six = QWEN3_30B_A3B | {"num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 8}
    (tmp_path / "config.json").write_text(json.dumps(six), encoding="utf-8")
    device, verifier = accelerator("l4"), read_architecture(tmp_path / "config.json")
    return before_traces(FirstPrinciples(verifier, device, drafter_kind="head", tensor_parallel=2, **LENGTHS))


EXPERT_BYTES = 3 * 2048 * 768 * 2.0  # of a layer


def test_copies_take_memory_of_every_model_of_a_catalogue_once(subject):
    """A full cache is what the device has, whether the model tells its cache or not."""
    placements = Placing(SKEWED, {"EPLB": eplb(SKEWED, 2, 2)})
    given = [
        DrafterChoice(name, deployment=one) for name, one in (("own", subject.deployment), ("toy", mixture(6, 2, 2)))
    ]
    found, notes = making_room([DrafterChoice("small", 1e9), *given], placements)
    assert found[0].deployment is None and len(notes) == 1 and notes[0].startswith("drafter toy: the KV cache")
    own, load = found[1].deployment, Workload(**LENGTHS, arrival_rate=1.0)
    unknown = replace(own, defaults=own.defaults | {"kv_capacity_tokens": None})
    before, *after = (server_of(one).memory_use(load, None) for one in (subject.deployment, own, unknown))
    for use in after:
        assert use.fixed - before.fixed == pytest.approx(8 * 2 * EXPERT_BYTES / 2)
        assert use.gigabytes(1e12, True) == pytest.approx(subject.plan.usable_bytes / 1e9, rel=1e-9)
    assert making_room(found[1:2], placements)[0][0].deployment is own


def test_experts_are_placed_before_any_trace(subject, monkeypatch):
    """The memory of copies comes off the KV cache, and the draws of what is not known have the placement."""
    monkeypatch.setattr(expert_search, "MOST_RELAXED", 0)
    with pytest.raises(InputError, match="a divisor of the 2 devices"):
        place_unmeasured(subject, counts_of(SKEWED), expert_ranks=3, **asked([4.0]))
    placed, answer = place_unmeasured(subject, counts_of(SKEWED), redundant_experts=2, **asked([4.0]))
    assert answer["expert_ranks"] == 2 and answer["slots_per_rank"] == 4
    assert answer["memory"]["copies_bytes"] == pytest.approx(8 * 2 * EXPERT_BYTES / 2)
    lost = subject.plan.kv_capacity_tokens - placed.plan.kv_capacity_tokens
    per_token = placed.plan.kv_bytes_per_token + placed.plan.drafter_kv_bytes_per_token
    assert lost * per_token == pytest.approx(answer["memory"]["copies_bytes"])
    assert placed.plan.verifier_bytes - subject.plan.verifier_bytes == pytest.approx(answer["memory"]["copies_bytes"])
    table = placed.deployment.serving.step_time.experts.routing
    drawn = placed.models().step_time.experts.routing
    assert drawn.log_coverage.shape == (128, *table.log_coverage.shape)
    assert np.all(np.asarray(drawn.imbalance) == float(table.imbalance))
    crowded = replace(
        subject,
        deployment=replace(
            subject.deployment, defaults=subject.deployment.defaults | {"kv_capacity_tokens": lost + 100.0}
        ),
    )
    full, told = place_unmeasured(crowded, counts_of(SKEWED), redundant_experts=2, **asked([4.0]))
    assert told["outcome"] == "does_not_fit" and told["table"] == [] and not full.plan.fits
