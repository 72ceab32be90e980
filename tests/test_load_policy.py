"""The policy over load: closed forms, brute force, the chain's own theory, and the simulator as judges."""

import itertools
import json
import math
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from test_cli_main import run, toy_deployment, toy_model

from diffspec.acceptance import ConstantAcceptance, steps_per_request
from diffspec.analysis.before_traces import before_traces
from diffspec.architecture import Transformer
from diffspec.configuration import Configuration
from diffspec.drafters import DraftCost
from diffspec.first_principles import FirstPrinciples, draws
from diffspec.fitting.uncertainty import Uncertainty
from diffspec.hardware import accelerator
from diffspec.optimizing.batch_tables import batch_tables
from diffspec.optimizing.least_acceptance import break_even
from diffspec.optimizing.limits import parse_limit
from diffspec.optimizing.load_policy import policy, policy_unmeasured
from diffspec.optimizing.policy_answer import advice
from diffspec.optimizing.robust_choice import Judged, Risk, best, best_worth_having, judge, parse_risk, risk_costs
from diffspec.optimizing.schedule import ranges_of
from diffspec.optimizing.tiers import Band, bands_of, crossing, merged_tiers, rate_at_batch, switches
from diffspec.optimizing.under_schedule import UnderSchedule, chains, under_schedules
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.simulating import DraftSchedule, Engine, simulate
from diffspec.step_time import AffineStepTime, RooflineStepTime
from diffspec.waiting import requests_in_system
from diffspec.workload import Workload

LENGTHS = {"prompt_length": 200.0, "output_length": 100.0}
SERVER = ServingModel(
    RooflineStepTime(
        weight_read=8e-3, token_compute=1e-4, kv_read=6e-8, prefill_token=2e-5, draft=DraftCost(pass_base=8e-4)
    ),
    first_token_steps=1.5,
)
ALPHA = 0.75
BATCHES = 48
CAP = jnp.asarray(float(BATCHES))


@pytest.fixture(scope="module")
def tables():
    config = Configuration(jnp.asarray(4.0), ConstantAcceptance(jnp.asarray(ALPHA)), max_batch_size=CAP)
    return batch_tables(SERVER, _floats(Workload(**LENGTHS, arrival_rate=1.0)), config, 4, BATCHES)


@pytest.fixture(scope="module")
def unsure():
    """The toy deployment with draws: costs of a verified token and of a draft pass are each uncertain by 40 %."""
    deployment = toy_deployment()
    paths = ("step_time.verify_query", "step_time.draft.pass_base")
    known = Uncertainty(
        method="laplace",
        paths=paths,
        covariance=np.diag([0.4**2, 0.4**2]),
        prior=np.array([1.0, 1.0]),
        misfit={"itl_mean": 0.02, "ttft_mean": 0.02},
        request_spread={"itl_mean": 0.0, "ttft_mean": 0.0},
        degrees_of_freedom=30.0,
        inflation={},
    )
    return replace(deployment, uncertainty=known)


ASKED = {
    "prompt_length": 64.0,
    "output_length": 64.0,
    "max_draft_length": 4,
    "acceptance": ConstantAcceptance(0.62),
    "loads": [2.0, 8.0, 16.0],
}


@pytest.fixture(scope="module")
def few(unsure):
    """A few of the draws, for tests that do not care how many."""
    return unsure.uncertainty.models(unsure.serving, 8)


@pytest.fixture(scope="module")
def answer(unsure):
    return policy(unsure, **ASKED)


def _floats(module):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=float), module)


# --- the equilibrium under a schedule ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("cap", "rate"), [(6.0, 1.7), (6.4, 1.7), (3.0, 0.4)])
def test_many_chains_are_the_chain(cap, rate):
    sizes = np.append(np.arange(1.0, np.ceil(cap)), cap)
    residence = 1.0 + 0.4 * sizes
    one = requests_in_system(jnp.asarray(residence), jnp.asarray(rate), jnp.asarray(cap))
    many = chains(np.stack([residence, 2.0 * residence]), sizes, np.array([rate, 0.5 * rate]))
    for found in (many.queue / np.array([rate, rate]), many.in_service, many.load):
        assert found[0] == pytest.approx(found[1], rel=1e-12), "twice as slow at half the rate is the same chain"
    assert many.queue[0] / rate == pytest.approx(float(one.waiting_time), rel=1e-9)
    assert many.in_service[0] == pytest.approx(float(one.in_service), rel=1e-9)
    assert many.probability[0] == pytest.approx(np.asarray(one.probability), rel=1e-9)


def test_affine_residence_has_the_published_latency():
    """residence = c1 + c2*n: (c1 + c2)/(1 - rate*c2), whatever the schedule is called; and its first token's share."""
    step = ServingModel(AffineStepTime(verify_base=0.01, verify_sequence=0.002, prefill_token=1e-4))
    config = Configuration(jnp.asarray(1.0), ConstantAcceptance(jnp.asarray(0.0)))
    load = _floats(Workload(10.0, 101.0, arrival_rate=1.0))
    made = batch_tables(replace(step, first_token_steps=0.0), load, config, 1, 400)
    c1, c2 = (np.linalg.solve([[1.0, 1.0], [1.0, 2.0]], made.residence[0, :2])).tolist()
    rates = np.array([0.5, 2.0, 4.0])
    found = under_schedules(made, np.zeros((1, 400), dtype=int), rates, "arrival_rate", 101.0)
    assert found.metrics["e2e_mean"][0] == pytest.approx((c1 + c2) / (1.0 - rates * c2), rel=1e-9)
    assert found.batch_mean[0] == pytest.approx(rates * found.metrics["e2e_mean"][0], rel=1e-9)  # Little's law
    parts = found.metrics["ttft_mean"] + 100.0 * found.metrics["tpot_mean"]
    assert parts == pytest.approx(found.metrics["e2e_mean"], rel=1e-12)


@pytest.mark.parametrize("loop", ["arrival_rate", "concurrency"])
def test_one_draft_length_at_every_batch_is_its_prediction(tables, loop):
    """Closed loops exactly; open loops up to the gap between the chain and the mean batch."""
    loads = np.array([5.0, 20.0, 60.0]) if loop == "concurrency" else np.array([4.0, 12.0, 20.0])
    load = _floats(Workload(**LENGTHS, **{loop: 1.0}))
    config = Configuration(jnp.asarray(3.0), ConstantAcceptance(jnp.asarray(ALPHA)), max_batch_size=CAP)
    made = tables if loop == "arrival_rate" else batch_tables(SERVER, load, config, 4, BATCHES)
    found = under_schedules(made, np.full((1, BATCHES), 3), loads, loop, 100.0)
    program = jax.jit(lambda x: SERVER.predict(replace(load, **{loop: x}), config))
    for place, x in enumerate(loads):
        told = program(jnp.asarray(x))
        exact = {"e2e_mean": told.e2e_latency, "ttft_mean": told.ttft, "tpot_mean": told.tpot, "itl_mean": told.itl}
        for name, value in exact.items():
            rel = 1e-9 if loop == "concurrency" else 0.04
            assert found.metrics[name][0, place] == pytest.approx(float(value), rel=rel), (name, x)
        assert found.metrics["utilization"][0, place] == pytest.approx(float(told.utilization), rel=1e-6)


@pytest.mark.parametrize("rate", [10.0, 22.0])
def test_the_equilibrium_under_a_schedule_is_what_the_simulator_says(tables, rate):
    """Three tiers whose thresholds lie inside the batch's fluctuation."""
    schedule = [[1, 8, 4], [9, 24, 2], [25, BATCHES, 0]]
    lengths = np.concatenate([np.full(last - first + 1, k) for first, last, k in schedule])
    found = under_schedules(tables, lengths[None], np.array([rate]), "arrival_rate", 100.0)
    engine = Engine(position_acceptance=(ALPHA,), max_batch_size=BATCHES, schedule=DraftSchedule(schedule))
    told = simulate(SERVER.step_time, Workload(**LENGTHS, arrival_rate=rate), engine, n_requests=1500, replications=12)
    for name, metric in (("e2e", "e2e_mean"), ("tpot", "tpot_mean")):
        estimate, mean = told.mean(name), float(found.metrics[metric][0, 0])
        assert estimate.relative < 0.04
        assert abs(estimate.value - mean) < 0.05 * mean + estimate.half_width, (name, estimate, mean)
    itl, mean = told.itl(), float(found.metrics["itl_mean"][0, 0])
    assert abs(itl.value - mean) < 0.05 * mean


def test_saturation_is_told_and_finite(tables):
    found = under_schedules(tables, np.zeros((1, BATCHES), dtype=int), np.array([1.0, 500.0]), "arrival_rate", 100.0)
    assert found.saturated.tolist() == [[False, True]]
    assert all(np.isfinite(values).all() for values in found.metrics.values())
    assert found.metrics["utilization"][0, 1] == pytest.approx(500.0 / found.capacity[0, 1])


# --- closed forms for the choice (model.md 1 and 5) -------------------------------------------------------------------


def lone_server(draft: float) -> ServingModel:
    """No prompts, no overheads: a verification lasts 1, a draft pass ``draft``, whatever the batch."""
    step = AffineStepTime(verify_base=1.0, prefill_token=0.0, draft=DraftCost(pass_base=draft))
    return ServingModel(step, first_token_steps=0.0)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.6])
def test_at_zero_load_speculation_pays_where_acceptance_beats_the_cost_ratio(ratio):
    """Leviathan et al. (2211.17192), corollary 3.9: there is a draft length that gains iff alpha > c."""
    config = _floats(Configuration(jnp.asarray(1.0), ConstantAcceptance(jnp.asarray(0.5))))
    long = _floats(Workload(1.0, 1e8, arrival_rate=1e-9))
    found = break_even(lone_server(ratio), long, config, [1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    assert found.acceptance_rate[0] == pytest.approx(ratio, rel=1e-6)
    emitted = 1.0 + ratio * np.array([1.0, 2.0, 4.0])  # E(k) = cost(k)/cost(0)
    assert found.tokens_per_step == pytest.approx(emitted, rel=1e-6)
    for k, rate in zip((2, 4), found.acceptance_rate[1:], strict=True):
        assert rate == pytest.approx(brentq(lambda a, k=k: sum(a**j for j in range(k + 1)) - 1 - k * ratio, 0, 1))
    assert np.all(np.diff(found.acceptance_rate) > 0), "so k = 1 decides whether any draft length gains"


@pytest.mark.parametrize("alpha", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("draft", [0.02, 0.15, 0.5])
def test_the_best_draft_length_is_where_the_marginal_rule_stops(alpha, draft):
    """Raise k while alpha^(k+1)*cost(k) > E(k)*(cost(k+1) - cost(k)); here cost(k) = 1 + draft*k, a lone request."""
    longest = 12
    config = _floats(Configuration(jnp.asarray(float(longest)), ConstantAcceptance(jnp.asarray(alpha))))
    load = _floats(Workload(1.0, 1e6, arrival_rate=1e-9))
    made = batch_tables(lone_server(draft), load, config, longest, 2)
    k, emitted = 0, 1.0
    while k < longest and alpha ** (k + 1) * (1 + draft * k) > emitted * draft:
        k, emitted = k + 1, emitted + alpha ** (k + 1)
    assert int(np.argmin(made.pace[:, 0])) == int(np.argmin(made.residence[:, 0])) == k
    assert (k > 0) == (alpha > draft)


def test_break_even_is_where_both_residences_agree(tables):
    config = _floats(Configuration(jnp.asarray(4.0), ConstantAcceptance(jnp.asarray(0.5)), max_batch_size=CAP))
    load = _floats(Workload(**LENGTHS, arrival_rate=1.0))
    program = jax.jit(lambda a, k, n: SERVER.residence_time(load, _with(config, a, k), n))
    found = break_even(SERVER, load, config, [2.0, 4.0], [10.0, 40.0])
    for rate, k, n in zip(found.acceptance_rate, (2.0, 4.0), (10.0, 40.0), strict=True):
        plain = float(program(0.5, 0.0, n))
        assert float(program(float(rate), k, n)) == pytest.approx(plain, rel=1e-8)
        assert float(program(float(rate) - 0.01, k, n)) > plain > float(program(float(rate) + 0.01, k, n))
    dear = replace(SERVER, step_time=replace(SERVER.step_time, draft=DraftCost(pass_base=1.0)))
    assert np.isinf(break_even(dear, load, config, [2.0], [4.0]).acceptance_rate).all()


def _with(config, alpha, k):
    return eqx.tree_at(lambda c: (c.acceptance, c.draft_length), config, (ConstantAcceptance(alpha), k))


# --- tiers and bands --------------------------------------------------------------------------------------------------


def wavy(seed: int, batches: int = 40) -> np.ndarray:
    """Log costs of four draft lengths that cross and nearly tie."""
    random = np.random.default_rng(seed)
    n = np.log(np.arange(1, batches + 1))
    slopes, offsets = np.sort(random.uniform(0.02, 0.3, 4)), np.sort(random.uniform(-0.3, 0.3, 4))[::-1]
    return slopes[:, None] * n + offsets[:, None] + 0.01 * random.standard_normal((4, batches))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("gain", "width"), [(0.0, 5), (0.02, 1), (0.05, 4), (10.0, 1)])
def test_every_tier_left_is_worth_having(seed, gain, width):
    """Brute force: no tier's batches, given to its neighbours at any split, lose less than the least gain."""
    cost = wavy(seed)
    greedy = np.argmin(cost, axis=0)
    found = merged_tiers(greedy, cost, min_gain=gain, min_width=width)
    tiers = ranges_of(found)
    assert set(found) <= set(greedy)
    if gain == 10.0:
        assert len(tiers) == 1
    for place, (first, last, k) in enumerate(tiers):
        if len(tiers) == 1:
            break
        assert last - first + 1 >= width
        columns = np.arange(first - 1, last)
        losses = []
        for split in range(first - 1, last + 1):
            before = tiers[place - 1][2] if place else None
            after = tiers[place + 1][2] if place + 1 < len(tiers) else None
            given = [before if column < split else after for column in columns]
            if None not in given:
                losses.append(sum(cost[g, c] - cost[k, c] for g, c in zip(given, columns, strict=True)))
        assert min(losses) >= math.log1p(gain) * columns.size - 1e-12
    assert merged_tiers(greedy, cost).tolist() == greedy.tolist() or gain > 0 or width > 1


def test_a_threshold_is_where_the_costs_cross():
    n = np.arange(1, 41)
    cost = np.stack([np.full(40, 1.0), 0.5 + 0.025 * n])  # the second is better up to 19, equal at 20
    assert crossing(cost, 1, 0, 7) in (19, 20)
    assert crossing(np.stack([cost[0], cost[0] + 1]), 1, 0, 7) == 0  # never
    assert crossing(np.stack([cost[0], cost[0] - 1]), 1, 0, 7) == 40  # always


def test_bands_are_as_wide_as_the_batch_wavers_and_cost_little():
    """With equal costs a band reaches one standard deviation of the batch; where costs part quickly it ends early."""
    n = np.arange(1.0, 101.0)
    residence = np.stack([np.full(100, 1.0)] * 2)  # no sharing: the batch is Poisson, deviation sqrt(n)
    chosen = np.where(n <= 36, 1, 0)
    (band,) = bands_of(chosen, np.log(residence), residence, width=None, most_loss=0.01)
    assert (band.threshold, band.up, band.down) == (36, 36 + 6, 37 - 6)
    steep = np.log(np.stack([np.full(100, 1.0), 1.0 + 0.004 * (n - 36.5)]))
    (band,) = bands_of(chosen, steep, residence, width=None, most_loss=0.01)
    assert (band.up, band.down) == (38, 35)
    (band,) = bands_of(chosen, np.log(residence), residence, width=2.0, most_loss=0.01)
    assert (band.up, band.down) == (38, 35)
    (band,) = bands_of(chosen, np.log(residence), residence, width=0.0, most_loss=0.01)
    assert (band.up, band.down) == (36, 37)
    rate = rate_at_batch(residence[0], n, 36.5)
    assert rate == pytest.approx(36.5, rel=1e-3)  # M/M/inf


def test_switching_rates_are_those_of_a_simulated_chain():
    """Without a band: rate*P(threshold), in equilibrium; with one: a birth-death chain played by hand."""
    n = np.arange(1.0, 61.0)
    residence = np.stack([1.0 + 0.02 * n, 1.0 + 0.03 * n])
    chosen, rate = np.where(n <= 12, 1, 0), 8.0
    own = residence[chosen, np.arange(60)]
    share = chains(own[None], n, np.array([rate])).probability[0]
    assert switches(chosen, residence, Band(12, 13, 12), rate) == pytest.approx(rate * share[12], rel=1e-9)
    band = Band(12, 10, 15)
    random, state, tier, time, ups = np.random.default_rng(0), 8, 0, 0.0, 0
    uniform, gaps = random.random(400_000), random.exponential(size=400_000)
    for u, gap in zip(uniform, gaps, strict=True):
        k = (1 if state <= 9 else 1 - tier) if state <= 15 else 0  # below the band 1, above it 0, inside as it was
        death = state / residence[k, state - 1] if state else 0.0
        time += gap / (rate + death)
        state += 1 if u * (rate + death) < rate else -1
        if tier == 0 and state > band.up:
            tier, ups = 1, ups + 1
        elif tier == 1 and state < band.down:
            tier = 0
    assert ups > 1000
    assert switches(chosen, residence, band, rate) == pytest.approx(ups / time, rel=0.06)


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_schedule_is_the_brute_force_of_its_expectation(unsure, answer):
    """Without merging, the draft length of each batch is that with the least mean residence over the draws; at 0 the
    drafter still reads this prompt and those of the others."""
    bare = policy(unsure, **ASKED, min_gain=0.0)["contexts"][0]
    config = _floats(unsure.configuration(4.0, acceptance=ASKED["acceptance"]))
    load = _floats(Workload(64.0, 64.0, arrival_rate=1.0))
    models = unsure.uncertainty.models(unsure.serving, 64)

    @jax.jit
    def residences(models, n):
        each = jax.vmap(lambda m: jax.vmap(lambda k: m.residence_time(load, _length(config, k), n))(jnp.arange(5.0)))
        return each(models)

    for first, last, k in bare["schedule"]:
        for n in {first, last}:
            found = np.array(residences(models, jnp.asarray(float(n))))
            found[:, 0] += 64.0 * models.step_time.draft.prefill_token * (1.0 + models.prefill_interference * (n - 1.0))
            assert int(np.argmin(found.mean(axis=0))) == k, n
    assert bare["schedule"][0][0] == 1 and bare["schedule"][-1][1] == bare["batches"] == 64
    assert all(after[0] == before[1] + 1 for before, after in itertools.pairwise(bare["schedule"]))


def _length(config, k):
    return eqx.tree_at(lambda c: c.draft_length, config, k)


def test_an_answer_is_plain_and_consistent(answer):
    json.dumps(answer, allow_nan=False)
    (context,) = answer["contexts"]
    assert answer["outcome"] == "successful" and answer["draws"] == 64 and answer["risk"] == "mean"
    tiers, bands = context["tiers"], context["bands"]
    assert [[t["first_batch"], t["last_batch"], t["draft_length"]] for t in tiers] == context["schedule"]
    assert [band["threshold"] for band in bands] == [t["last_batch"] for t in tiers[:-1]]
    for band, before, after in zip(bands, tiers, tiers[1:], strict=False):
        assert before["first_batch"] <= band["down"] <= band["threshold"] + 1
        assert band["threshold"] <= band["up"] <= after["last_batch"]
        assert band["switches_per_minute"] <= band["without_band"]
    for tier in tiers:
        if tier["draft_length"]:
            assert 0 < tier["breakeven_acceptance_rate"] < 1
            emitted = sum(tier["breakeven_acceptance_rate"] ** j for j in range(tier["draft_length"] + 1))
            assert tier["breakeven_tokens_per_step"] == pytest.approx(emitted, rel=1e-6)
            assert tier["speedup_interval"]["low"] <= tier["speedup_interval"]["high"]
    for entry in context["loads"]:
        assert sum(entry["time_share"].values()) == pytest.approx(1.0)
        assert entry["speedup_interval"]["low"] <= entry["speedup_interval"]["median"]
        assert entry["batch_mean"] == pytest.approx(entry["load"] * entry["metrics"]["e2e_mean"], rel=1e-3)


def test_the_schedule_is_no_worse_than_any_one_draft_length(answer, unsure, few):
    """Over the loads asked, with no tier merged away, the schedule is at least as good as any one draft length."""
    bare = policy(unsure, **ASKED, min_gain=0.0, risk="point", draws=few)["contexts"][0]
    assert bare["gain"]["speedup_over_static"] >= 1.0 - 1e-9
    assert bare["gain"]["speedup"] >= 1.0 - 1e-9
    assert answer["contexts"][0]["gain"]["speedup"] > 1.0


def test_zero_can_be_forbidden_and_tiers_be_wide(unsure, few):
    asked = ASKED | {"acceptance": ConstantAcceptance(0.25), "draws": few}
    off = policy(unsure, **asked)["contexts"][0]
    assert off["off_above"] is not None and off["schedule"][-1][2] == 0
    assert "leave speculation off" in off["advice"][0]
    never = policy(unsure, **ASKED | {"acceptance": ConstantAcceptance(0.01), "draws": few})["contexts"][0]
    assert never["advice"] == ["leave speculation off: no draft length pays at any batch"] and never["off_above"] == 0
    (busy,) = advice(np.zeros(4, dtype=int), 0, {}, [], [], np.log([0.8, 0.9, 1.1, 1.2]), True)
    assert "within the limits" in busy and "drafts pay at 2 of 4 batches, up to 2, by 25.0 % at most" in busy
    on = policy(unsure, **asked, forbid_zero=True)["contexts"][0]
    assert all(k >= 1 for *_, k in on["schedule"]) and on["off_above"] is None
    assert on["gain"]["speedup"] < 1.0, "and what that costs is told"
    wide = policy(unsure, **ASKED, draws=few, min_gain=0.0, min_width=30)["contexts"][0]
    assert all(last - first + 1 >= 30 for first, last, _ in wide["schedule"])


def test_limits_are_checked_under_the_schedule(unsure, answer, few):
    """A limit on the gap between events forbids long drafts: the schedule changes, and a second look agrees."""
    free = answer["contexts"][0]
    gap = [entry["metrics"]["itl_mean"] for entry in free["loads"]]
    limited = policy(unsure, **ASKED, slo=[f"itl_mean<{0.9 * gap[1]}"], risk="point", draws=few)["contexts"][0]
    assert limited["loads"][1]["feasible"] and not free["loads"][1]["violations"]
    assert limited["loads"][1]["metrics"]["itl_mean"] <= 0.9 * gap[1]
    assert limited["schedule"] != free["schedule"]
    nothing = policy(unsure, **ASKED, slo=["e2e_mean<0.001"], draws=few)
    assert nothing["outcome"] == "infeasible"
    assert all(entry["violations"]["e2e_mean<0.001"]["value"] > 0.001 for entry in nothing["contexts"][0]["loads"])
    full = policy(unsure, **ASKED | {"loads": [1e4], "draws": few})
    assert full["outcome"] == "saturated" and full["contexts"][0]["loads"][0]["metrics"] == {}


@pytest.mark.parametrize("rate", [2.0, 12.0, 20.0, 24.0])
def test_no_schedule_beats_the_fastest_at_every_batch(tables, rate):
    """A chain whose deaths are faster in every state holds fewer: against a thousand schedules, one change of the best
    at a time and at random."""
    random = np.random.default_rng(0)
    cost = tables.residence[:, :BATCHES].copy()
    cost[0] = tables.idle_residence[:BATCHES]
    fastest = np.argmin(cost, axis=0)
    moved = np.repeat(fastest[None], 5 * BATCHES, axis=0)
    moved[np.arange(5 * BATCHES), np.tile(np.arange(BATCHES), 5)] = np.repeat(np.arange(5), BATCHES)
    drawn = np.sort(random.integers(0, 5, (760, BATCHES)), axis=1)[:, ::-1]
    others = np.concatenate([fastest[None], moved, drawn])
    share = under_schedules(tables, others, np.array([rate]), "arrival_rate", 100.0).probability[:, 0]
    beyond = np.cumsum(share[:, ::-1], axis=1)[:, ::-1]  # P(at least n in service)
    assert np.all(beyond[:1] <= beyond + 1e-12)
    assert np.count_nonzero((beyond[1:] > beyond[:1] + 1e-4).any(axis=1)) > 10


def test_a_finer_schedule_must_be_worth_its_tiers():
    """Each tier more must be worth the least gain over the loads; feasible loads come first; throughput is negative."""
    schedules = np.array([[3, 3, 3, 3], [2, 2, 2, 2], [3, 3, 1, 1], [3, 2, 1, 1]])

    def chosen(values, feasible=(2, 2, 2, 2), gain=0.01):
        score = np.stack([-np.asarray(feasible, dtype=float), np.asarray(values)], axis=1)
        empty = np.zeros((4, 2))
        return best_worth_having(Judged(empty, {}, empty, score), schedules, range(2), range(2, 4), gain)

    assert chosen([1.0, 1.1, 0.992, 0.985]) == 0
    assert chosen([1.0, 1.1, 0.989, 0.985]) == 2
    assert chosen([1.0, 1.1, 0.989, 0.975]) == 3
    assert chosen([1.0, 0.99, 0.989, 0.98]) == 1
    assert chosen([1.0, 1.1, 0.9999, 0.9998], gain=0.0) == 3
    assert chosen([1.0, 1.1, 0.8, 1.2], feasible=(2, 2, 1, 3)) == 3
    assert chosen([-1.0, -0.9, -1.005, -1.03]) == 3 and chosen([-1.0, -0.9, -1.005, -1.015]) == 0


def test_tiers_are_kept_that_are_worth_it_to_those_who_wait(unsure, few, monkeypatch):
    """By its pace no second tier is worth 2 % at its batches; near capacity two more are worth 2 % each, and kept."""
    asked = {name: value for name, value in ASKED.items() if name != "loads"} | {"draws": few, "min_gain": 0.02}
    asked |= {"acceptance": ConstantAcceptance(0.8)}
    whole = policy(unsure, **asked)["contexts"][0]
    monkeypatch.setattr("diffspec.optimizing.load_policy.FINER", ())
    by_pace = policy(unsure, **asked)["contexts"][0]
    mean, coarse = (
        math.prod(entry["risk_value"] for entry in found["loads"]) ** (1 / len(found["loads"]))
        for found in (whole, by_pace)
    )
    assert len(by_pace["schedule"]) == 1 and len(whole["schedule"]) == 3
    assert mean * 1.02**2 < coarse


def test_context_lengths_have_their_own_schedules(unsure, few):
    asked = {name: value for name, value in ASKED.items() if name not in ("prompt_length", "loads")} | {"draws": few}
    found = policy(unsure, **asked, context_lengths=[4096.0, 96.0])
    assert [context["context_length"] for context in found["contexts"]] == [96.0, 4096.0]
    assert [context["prompt_length"] for context in found["contexts"]] == [64.0, 4064.0]
    alone = policy(unsure, **asked, prompt_length=64.0)["contexts"][0]
    assert found["contexts"][0]["schedule"] == alone["schedule"]
    loads = [entry["load"] for entry in alone["loads"]]
    assert loads == pytest.approx([part * loads[0] for part in range(1, 10)])
    with pytest.raises(InputError, match="each above 32 tok"):
        policy(unsure, **asked, context_lengths=[20.0])


def test_a_quantile_prefers_what_is_seldom_bad():
    """Two draft lengths: one is better on average, the other never bad; and what saturates in one draw of two."""

    def found(e2e, saturated=(False, False)):
        column = np.asarray(e2e)[:, None]
        return UnderSchedule({"e2e_mean": column}, np.asarray(saturated)[:, None], column, column, column, column)

    draws = [found([1.0, 1.3])] * 8 + [found([2.0, 1.3])] * 2
    for text, chosen in (("mean", 0), ("0.95", 1), ("0.5", 0)):
        judged = judge(draws, [], "e2e_mean", parse_risk(text))
        assert best(judged, [0, 1]) == chosen, text
    assert judge(draws, [], "e2e_mean", Risk("mean")).risk[:, 0] == pytest.approx([1.2, 1.3])
    limited = judge(draws, [parse_limit("e2e_mean<1.5")], "e2e_mean", Risk("quantile", 0.9))
    assert limited.feasible[:, 0].tolist() == [False, True] and limited.limited["e2e_mean"][0, 0] == 2.0
    assert parse_risk("mean").over(np.array([[1.0], [3.0]])) == 2.0
    ends = judge([found([1.0, 1.3]), found([1.0, 1.3], (True, False))], [], "e2e_mean", Risk("quantile", 0.9))
    assert np.isinf(ends.risk[0, 0]) and not ends.feasible[0, 0] and best(ends, [0, 1]) == 1
    costs = np.log(np.array([[[1.0], [3.0]], [[2.0], [1.0]], [[6.0], [4.0]]]))  # draws x lengths x batches
    assert np.exp(risk_costs(costs, Risk("mean")))[:, 0] == pytest.approx([3.0, 8 / 3])
    assert np.exp(risk_costs(costs, Risk("quantile", 0.5)))[:, 0] == pytest.approx([2.0, 3.0])
    with pytest.raises(InputError, match="a quantile between 0 and 1"):
        parse_risk("1.5")


def test_a_model_without_draws_answers_with_its_fit():
    found = policy(toy_deployment(), **ASKED)
    assert found["risk"] == "point" and found["draws"] is None and "fit the trace again" in found["intervals_reason"]
    assert found["contexts"][0]["tiers"][0]["speedup_interval"] is None


def test_what_was_not_measured_has_draws_too():
    pair = FirstPrinciples(Transformer("x", 2, 8, 32, 2, 1, 4, 16), accelerator("l4"), drafter_kind="head")
    subject = replace(before_traces(pair), models=lambda: draws(before_traces(pair).deployment.serving, {}, 2))
    found = policy_unmeasured(subject, **ASKED | {"max_batch_size": 16.0, "max_draft_length": 2})
    assert found["draws"] == 2 and "memory" in found and found["contexts"][0]["schedule"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loads": [2.0, 1.0]}, "increasing"),
        ({"loads": None, "loop": "concurrency"}, "concurrency: got no load"),
        ({"objective": "throughput"}, "equals arrival_rate"),
        ({"risk": 2.0}, "a quantile between 0 and 1"),
        ({"min_gain": -0.1}, "min_gain"),
        ({"min_width": 0}, "min_width"),
        ({"hysteresis": -1.0}, "hysteresis"),
        ({"prompt_length": None}, "prompt_length: got none"),
        ({"slo": ["itl<1"]}, "itl_mean"),
    ],
)
def test_bad_questions_are_refused(unsure, options, message):
    with pytest.raises(InputError, match=message):
        policy(unsure, **(ASKED | options))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_answers_writes_and_draws(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSPEC_CACHE_DIR", "")
    model = toy_model(tmp_path / "model.json")
    base = ("policy", model, "--arrival-rate", "2,8", "--acceptance-rate", "0.62", "--max-draft-length", "2")
    made = ("--export", "vllm", "--export", "python", "--out-dir", tmp_path / "made", "--plot", tmp_path / "p.png")
    ran = run(*base, *made)
    assert ran.code == 0, ran.err
    assert "draft length by batch" in ran.out and "--speculative-config" in ran.out
    assert {"vllm_speculative_config.json", "draft_length.py"} <= {path.name for path in (tmp_path / "made").iterdir()}
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    ran = run(*base, "--json", "--export", "json", "--slo", "e2e_mean<0.001")
    assert ran.code == 1
    told = json.loads(ran.out)
    assert told["outcome"] == "infeasible"
    assert json.loads(told["exports"][0]["text"])["contexts"] == told["contexts"]
    assert run(*base, "--export", "tensorrt-llm").code == 2
    assert run(*base, "--out-dir", tmp_path).code == 2


def test_steps_are_the_renewal_count(tables):
    """The table's own steps, so that gains are told of what the simulator plays."""
    acceptance = ConstantAcceptance(ALPHA)
    for k in range(5):
        m1, m2 = acceptance.moments(float(k)) if k else (jnp.ones(()), jnp.ones(()))
        assert tables.steps[k] == pytest.approx(float(steps_per_request(m1, m2, 100.0)))
