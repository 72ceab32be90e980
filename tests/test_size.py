"""`diffspec size`: the rate a replica sustains, replicas, cost and energy, curve and front: against closed forms, brute
force, the predictions one by one, and the simulator."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import EXPERIMENTS, assert_close, experiment
from scipy.optimize import brentq
from test_cli_main import run, toy_deployment, toy_model

import diffspec
from diffspec.acceptance import ConstantAcceptance
from diffspec.analysis.before_traces import before_traces
from diffspec.analysis.simulated import engine_of
from diffspec.architecture import read_architecture
from diffspec.batch_state import BatchState
from diffspec.configuration import Configuration
from diffspec.first_principles import FirstPrinciples
from diffspec.fitting.uncertainty import Uncertainty
from diffspec.hardware import accelerator
from diffspec.lengths import Lengths
from diffspec.optimizing import lanes as lanes_module
from diffspec.optimizing.candidates import candidates, replicas_of
from diffspec.optimizing.drawn_rates import drawn_rates
from diffspec.optimizing.lanes import asked_of, join, largest_rates, limited_values
from diffspec.optimizing.limits import LIMITED, PERCENTILE_METRICS, Limit, parse_limit
from diffspec.optimizing.pareto import non_dominated
from diffspec.optimizing.servers import prices, server_of
from diffspec.optimizing.size import SIZED, size
from diffspec.percentiles import predict_distribution
from diffspec.report.sizing import sizing, sizing_figure
from diffspec.resources import energy_per_token
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.simulating import simulate
from diffspec.step_time import AffineStepTime
from diffspec.workload import Workload

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
ACCEPTANCE = ConstantAcceptance(0.8)
SLO = ("ttft_p95<0.25", "tpot_mean<0.03")
ASKED = {"prompt_length": 64.0, "output_length": 64.0, "slo": SLO, "acceptance": ACCEPTANCE, "max_draft_length": 4}


@pytest.fixture(scope="module")
def deployment():
    """Costs are known to within a fifth or so, as after a fit; its measured cap of 64 is the largest batch."""
    made = toy_deployment()
    paths = ("step_time.verify_base", "step_time.verify_query")
    noise = {"ttft_mean": 0.05, "itl_mean": 0.02}
    prior = np.asarray([1.0, 1.0])
    known = Uncertainty("laplace", paths, np.diag([0.03, 0.03]), prior, noise, dict.fromkeys(noise, 0.0), 5.0, {})
    return replace(made, uncertainty=known)


@pytest.fixture(scope="module")
def answer(deployment):
    return size(deployment, target_rate=80.0, headroom=0.1, cost_per_hour=2.0, **ASKED)


@pytest.fixture(scope="module")
def pair():
    def made(hardware="h100", devices=1):
        verifier, drafter = (read_architecture(CONFIGS / f"llama-3.{name}.json") for name in ("1-8b", "2-1b"))
        return FirstPrinciples(
            verifier, accelerator(hardware), drafter, tensor_parallel=devices, prompt_length=512.0, output_length=200.0
        )

    return made


PLANNED = {"prompt_length": 512.0, "output_length": 200.0, "acceptance": ACCEPTANCE, "max_draft_length": 3}


@pytest.fixture(scope="module")
def planned(pair):
    """Before any trace, over two devices and two ways to use two of the first."""
    subjects = [before_traces(pair("h100")), before_traces(pair("h100", 2)), before_traces(pair("l4"))]
    catalogue = {"catalogue": {"h100": {"cost_per_hour": 2.5}, "L4": {"cost_per_hour": 0.7}}}
    asked = PLANNED | {"slo": ["tpot_mean<0.1"], "target_rate": 100.0, "cost_per_hour": catalogue}
    return subjects, size(subjects, **asked)


@pytest.fixture(scope="module")
def values_at(deployment):
    """The limited metrics of a candidate at a rate: means as `diffspec predict` tells them, and the percentile by its
    quantile, where the search asks the distribution."""

    @jax.jit
    def program(length, cap, rate):
        config = deployment.configuration(length, acceptance=ACCEPTANCE, max_batch_size=cap)
        load = Workload(prompt_length=64.0, output_length=64.0, arrival_rate=rate)
        found = deployment.serving.predict(load, config)
        spread = predict_distribution(deployment.serving, load, config, Lengths.fixed(), states=64, percentiles=(95,))
        return found, spread.ttft[0] * found.ttft / spread.ttft_mean

    def at(entry, rate):
        found, ttft_p95 = program(float(entry["draft_length"]), float(entry["max_batch_size"]), float(rate))
        return {"ttft_p95": float(ttft_p95), "tpot_mean": float(found.tpot), "capacity": float(found.capacity)}

    return at


# --- limits ----------------------------------------------------------------------


def test_limits_on_percentiles_are_read_where_they_are_allowed():
    assert parse_limit("ttft_p95 < 0.5", SIZED) == Limit("ttft_p95", 1, 0.5)
    assert parse_limit("itl_p99<0.1", SIZED).percentile == ("itl", 0.99)
    assert parse_limit("ttft_mean<0.5").percentile is None
    assert len(PERCENTILE_METRICS) == 16 and not set(PERCENTILE_METRICS) & set(LIMITED)
    with pytest.raises(InputError, match="unknown metric 'ttft_p95'; allowed: ttft_mean"):
        parse_limit("ttft_p95<0.5")
    with pytest.raises(InputError, match="did you mean 'ttft_p9"):
        parse_limit("ttft_p96<0.5", SIZED)


# --- the largest rate ----------------------------------------------------------------------


def test_the_largest_rate_of_an_affine_server_is_the_closed_form():
    """Published form (Eq 1): L = C1/(1 - rate*C2), so L = b at rate = (1 - C1/b)/C2, for bounds near C1 and far off."""
    base, each, output = 0.02, 0.001, 101.0
    server = ServingModel(AffineStepTime(verify_base=base, verify_query=each), self_share=0.0, first_token_steps=0.0)
    c1, c2 = 100.0 * base, 100.0 * each
    load, config = Workload(10.0, output, arrival_rate=1.0), Configuration(max_batch_size=1024.0)
    bounds = np.asarray([1.05, 2.0, 5.0]) * c1
    lanes = join([server], [load], [config], Lengths.fixed(), 1024)
    found = [largest_rates(lanes, [Limit("e2e_mean", 1, float(bound))]) for bound in bounds]
    assert_close([one.rate[0] for one in found], (1.0 - c1 / bounds) / c2, rtol=2e-6)
    assert [one.binding[0] for one in found] == [0, 0, 0] and not any(one.again[0] for one in found)
    none = largest_rates(lanes, [Limit("e2e_mean", 1, 0.99 * c1)])
    assert none.rate[0] == 0 and none.binding[0] == 0 and none.excess[0] > 0
    free = largest_rates(lanes, [Limit("e2e_mean", 1, 1e6 * c1)])
    assert free.binding[0] == -1
    assert_close(free.rate, 0.9989 * free.capacity, rtol=1e-9)


def test_the_first_crossing_is_taken_where_latency_falls_again(monkeypatch):
    """An excess that is broken in the middle of the range only: no promise that it grows."""
    server = ServingModel(AffineStepTime(verify_base=0.02, verify_query=0.001), self_share=0.0, first_token_steps=0.0)
    load, config = Workload(10.0, 101.0, arrival_rate=1.0), Configuration(max_batch_size=1024.0)
    lanes = join([server], [load], [config], Lengths.fixed(), 1024)
    capacity = largest_rates(lanes, []).capacity[0]

    def humped(part, limits, rates, shift=None):
        share = np.asarray(rates) / capacity
        return ((share - 0.4) * (0.8 - share))[:, None], {}

    monkeypatch.setattr(lanes_module, "excesses", humped)
    found = largest_rates(lanes, [Limit("e2e_mean", 1, 1.0)])
    assert_close(found.rate, [0.4 * capacity], rtol=1e-5)
    assert found.again.tolist() == [True]
    alone = largest_rates(lanes, [Limit("e2e_mean", 1, 1.0)], beyond=False)
    assert alone.rate.tolist() == found.rate.tolist() and alone.again.tolist() == [False]


@pytest.mark.parametrize("root", [-0.1, 0.02, 0.5, 0.9, 0.97, 0.998, 1.2])
def test_the_first_root_alone_is_the_same_in_fewer_evaluations(root, monkeypatch):
    """Broken without load, at any place of the scan, never; lanes that need the far places among lanes that do not."""
    server = ServingModel(AffineStepTime(verify_base=0.02, verify_query=0.001), self_share=0.0, first_token_steps=0.0)
    loads = [Workload(prompt, 101.0, arrival_rate=1.0) for prompt in (1.0, 2.0, 3.0)]
    lanes = join([server] * 3, loads, [Configuration(max_batch_size=1024.0)] * 3, Lengths.fixed(), 1024)
    capacity, roots, looked = largest_rates(lanes, []).capacity, np.asarray([0.3, root, 0.99]), []

    def rising(part, limits, rates, shift=None):
        lane = np.asarray(part.workloads.prompt_length).astype(int) - 1
        looked.append(lane.size)
        return (np.asarray(rates) / capacity[lane] - roots[lane])[:, None], {}

    monkeypatch.setattr(lanes_module, "excesses", rising)
    whole = largest_rates(lanes, [Limit("e2e_mean", 1, 1.0)])
    every, looked[:] = sum(looked), []
    alone = largest_rates(lanes, [Limit("e2e_mean", 1, 1.0)], beyond=False)
    assert alone.rate.tolist() == whole.rate.tolist() and alone.excess.tolist() == whole.excess.tolist()
    assert sum(looked) < every
    assert_close(whole.rate, np.where(roots < 0, 0.0, np.minimum(roots, 0.9989)) * capacity, rtol=2e-6)


def test_draws_of_several_candidates_are_those_of_each(deployment):
    load, ask = Workload(64.0, 64.0, arrival_rate=1.0), {"acceptance": ACCEPTANCE, "max_batched_tokens": None}
    limits = [parse_limit(f"{name}<{bound}", SIZED) for name, bound in (("ttft_p95", 0.25), ("tpot_mean", 0.03))]
    metrics = ["ttft_p95", "tpot_mean", "e2e_mean"]
    pool = candidates([server_of(deployment)], [None], load, 4, None, metrics, ask | {"drafter_params": None})
    together = drawn_rates(pool, [0, 3], limits)
    for place, rates in together.items():
        assert rates.size == 64 and np.ptp(rates) > 0
        assert rates.tolist() == drawn_rates(pool, [place], limits)[place].tolist()
    unsure = candidates(
        [server_of(replace(deployment, uncertainty=None))],
        [None],
        load,
        0,
        None,
        metrics,
        ask | {"drafter_params": None},
    )
    assert drawn_rates(unsure, [0], limits)[0].size == 0


def test_every_candidates_rate_is_where_its_limits_are_reached(values_at, answer):
    """Against brentq on the predictions themselves, percentiles by quantile (the search asks the distribution)."""
    bounds = {"ttft_p95": 0.25, "tpot_mean": 0.03}
    picked = [entry for entry in answer["candidates"] if entry["max_batch_size"] in (64.0, 8.0)]
    assert len(picked) == 10
    for entry in picked[::3]:
        capacity = values_at(entry, 1.0)["capacity"]

        def worst(rate, entry=entry):
            found = values_at(entry, rate)
            return max(math.log(found[name] / bound) for name, bound in bounds.items())

        if worst(0.9989 * capacity) <= 0:
            assert entry["binding"] == "capacity"
            assert_close(entry["rate_per_replica"], 0.9989 * capacity, rtol=1e-6)
            continue
        expected = brentq(worst, 1e-3 * capacity, 0.9989 * capacity, xtol=1e-9)
        assert_close(entry["rate_per_replica"], expected, rtol=1e-5)
        at = values_at(entry, entry["rate_per_replica"])
        limit = parse_limit(entry["binding"], SIZED)
        assert_close(at[limit.metric], limit.bound, rtol=1e-4)


def test_percentiles_are_those_of_predict(deployment, values_at):
    config = server_of(deployment).configuration(
        2, 16.0, acceptance=ACCEPTANCE, max_batched_tokens=None, drafter_params=None, longest=4
    )
    load = Workload(prompt_length=64.0, output_length=64.0, arrival_rate=1.0)
    lanes = join([deployment.serving] * 2, [load] * 2, [config] * 2, Lengths.fixed(), 64, asked_of(["ttft_p95"]))
    found = limited_values(lanes, ["ttft_p95", "tpot_mean"], [2.0, 9.0])
    for place, rate in enumerate((2.0, 9.0)):
        expected = values_at({"draft_length": 2, "max_batch_size": 16.0}, rate)
        assert_close(found["ttft_p95"][place], expected["ttft_p95"], rtol=1e-5)
        assert_close(found["tpot_mean"][place], expected["tpot_mean"], rtol=1e-9)


# --- replicas ----------------------------------------------------------------------


def test_replicas_are_the_fewest_that_keep_the_limits(values_at, answer):
    chosen = answer["recommended"]
    json.dumps(answer, allow_nan=False)
    assert answer["outcome"] == "successful" and answer["minimise"] == "cost"
    count = chosen["replicas"]
    usable = 0.9 * chosen["rate_per_replica"]
    assert (count - 1) * usable < 80.0 <= count * usable
    assert_close(chosen["headroom"], 1.0 - 80.0 / count / chosen["rate_per_replica"], rtol=1e-12)
    assert chosen["headroom"] >= 0.1
    at = values_at(chosen, 80.0 / count)
    assert at["ttft_p95"] <= 0.25 and at["tpot_mean"] <= 0.03
    for name in ("ttft_p95", "tpot_mean"):
        assert_close(chosen["metrics"][name], at[name], rtol=1e-5)
    assert answer["plain"]["draft_length"] == 0 and answer["plain"]["devices"] >= chosen["devices"]
    assert chosen["cost"] == min(entry["cost"] for entry in answer["candidates"])
    costs = [entry["cost"] for entry in answer["candidates"]]
    assert costs == sorted(costs) and len(costs) == 25  # 5 draft lengths at caps of 64, 32, 16, 8 and 4


def test_more_spare_rate_or_burstier_arrivals_need_no_fewer_replicas(deployment, answer):
    spare = size(deployment, target_rate=80.0, headroom=0.5, **ASKED)
    bursty = size(deployment, target_rate=80.0, headroom=0.1, burst_scv=4.0, **ASKED)
    assert spare["recommended"]["replicas"] >= answer["recommended"]["replicas"]
    assert bursty["recommended"]["rate_per_replica"] < answer["recommended"]["rate_per_replica"]
    assert any("1 + (c2 - 1)/R" in line for line in bursty["assumptions"])
    assert any("split evenly" in line for line in answer["assumptions"])


@pytest.mark.parametrize(
    ("slo", "cap"),
    [
        (("ttft_p95<0.25", "tpot_mean<0.03"), 64.0),
        (("ttft_p95<0.25", "tpot_mean<0.03"), 16.0),
        (("ttft_p95<1.0", "tpot_mean<0.1"), 16.0),
    ],
)
def test_the_simulator_keeps_the_limits_with_these_replicas_and_not_with_one_fewer(deployment, slo, cap):
    """A target of 3.5 times what the best replica sustains: four keep the limits, three do not (95 % intervals)."""
    asked = ASKED | {"slo": slo, "max_batch_size": cap}
    rate = size(deployment, target_rate=1.0, **asked)["recommended"]["rate_per_replica"]
    chosen = size(deployment, target_rate=3.5 * rate, **asked)["recommended"]
    assert chosen["replicas"] == 4
    config = deployment.configuration(float(chosen["draft_length"]), acceptance=ACCEPTANCE, max_batch_size=cap)
    limits = [parse_limit(text, SIZED) for text in slo]

    def simulated(replicas):
        load = Workload(prompt_length=64.0, output_length=64.0, arrival_rate=3.5 * rate / replicas)
        engine = engine_of(deployment, load, config)
        found = simulate(deployment.serving.step_time, load, engine, n_requests=2000, replications=8)
        return found.percentile("ttft", 95), found.mean("tpot")

    kept, broken = simulated(4), simulated(3)
    assert all(value.value <= limit.bound + value.half_width for value, limit in zip(kept, limits, strict=True))
    assert any(value.value - value.half_width > limit.bound for value, limit in zip(broken, limits, strict=True))


# --- before any trace ----------------------------------------------------------------------


def test_memory_caps_the_batch_and_what_does_not_fit_is_said(planned):
    _, answer = planned
    (missing,) = answer["does_not_fit"]
    assert missing["hardware"] == "l4" and missing["missing_bytes"] > 0 and missing["plain_fits"]
    on_l4 = [entry for entry in answer["candidates"] if entry["hardware"] == "l4"]
    assert on_l4 and all(entry["draft_length"] == 0 for entry in on_l4), "it holds the verifier alone"
    assert all(entry["max_batch_size"] < 256 for entry in on_l4)
    assert answer["memory"]["fits"] and answer["recommended"]["hardware"] == "h100"


@pytest.mark.slow
def test_a_limit_on_memory_leaves_the_candidates_that_keep_it(planned):
    """Those of the answer without it whose weights and cache at the cap, by their plans, are below it; and, where none
    is, the one that takes least."""
    subjects, free = planned
    plans = {(one.pair.hardware.name, one.pair.tensor_parallel): server_of(one) for one in subjects}

    def gigabytes(entry):
        server = plans[entry["hardware"], entry["tensor_parallel"]]
        plan = server.plan if entry["draft_length"] else server.plain_plan
        tokens = min(entry["max_batch_size"] * 612.0, plan.kv_capacity_tokens)
        held = tokens * (plan.kv_bytes_per_token + plan.drafter_kv_bytes_per_token)
        return (plan.verifier_bytes + plan.drafter_bytes + plan.activation_bytes + plan.reserve_bytes + held) / 1e9

    asked = PLANNED | {"target_rate": 100.0}
    bound = float(np.median([gigabytes(entry) for entry in free["candidates"]]))
    found = size(subjects, slo=["tpot_mean<0.1", f"memory<{bound!r}"], **asked)
    names = ("hardware", "tensor_parallel", "draft_length", "max_batch_size")
    kept = {tuple(one[name] for name in names) for one in free["candidates"] if gigabytes(one) <= bound * (1 + 1e-12)}
    assert {tuple(one[name] for name in names) for one in found["candidates"]} == kept
    assert found["recommended"]["metrics"]["memory"] == pytest.approx(gigabytes(found["recommended"]), rel=1e-9)
    none = size(subjects, slo=["memory<5", "tpot_mean<0.1"], **asked)
    told = none["infeasible"]["limits"]["memory<5"]
    least = min(gigabytes(entry) for entry in free["candidates"])
    assert none["outcome"] == "infeasible" and told["value"] == pytest.approx(least, rel=1e-9)
    assert told["excess"] == pytest.approx(least / 5.0 - 1.0, rel=1e-9)
    json.dumps([found, none], allow_nan=False)


def test_a_pair_that_fits_nowhere_is_an_answer(planned, pair):
    small = replace(accelerator("l4"), memory_bytes=8e9)
    found = size(before_traces(replace(pair(), hardware=small)), target_rate=1.0, slo=["tpot_mean<1"], **PLANNED)
    json.dumps(found, allow_nan=False)
    assert found["outcome"] == "does_not_fit" and found["recommended"] is None and found["curve"] is None
    (missing,) = found["does_not_fit"]
    assert missing["missing_bytes"] > 5e9 and not missing["plain_fits"]
    assert found.keys() == planned[1].keys()
    assert "does not fit" in "\n".join(str(part) for part in sizing(found))


def test_tensor_parallelism_is_compared_with_as_many_replicas(planned):
    _, answer = planned
    (entry,) = answer["tensor_parallel"]
    best = {n: max(e["rate_per_replica"] for e in answer["candidates"] if e["tensor_parallel"] == n) for n in (1, 2)}
    assert entry == {
        "hardware": "h100",
        "devices": 2,
        "one_replica": best[2],
        "replicas": 2 * best[1],
        "ratio": best[2] / (2 * best[1]),
    }


def test_cost_and_energy_are_what_their_formulas_say(planned):
    """At 0.4 req/s, where the device idles for most of the time."""
    subjects, answer = planned
    quiet = {"target_rate": 0.4, "cost_per_hour": {"h100": 2.5}, "minimise": "energy"}
    chosen = size(subjects[:1], **PLANNED | {"slo": ["tpot_mean<0.1"]} | quiet)["recommended"]
    tokens = 0.4 * 200.0
    assert_close(chosen["device_hours"], chosen["devices"] * 1e6 / 3600 / tokens, rtol=1e-12)
    assert_close(chosen["cost"], 2.5 * chosen["device_hours"], rtol=1e-12)
    server = server_of(subjects[0])
    length, rate = float(chosen["draft_length"]), chosen["arrival_rate"]
    assert server.pair is not None
    n = chosen["effective_batch_size"] / -math.expm1(-chosen["effective_batch_size"])
    step = server.deployment.serving.step_time
    state = BatchState(
        sequences=n, query_tokens=n * (1 + length), kv_tokens=n * 612.0, draft_passes=length, draft_tokens=n * length
    )
    emitted = float(ACCEPTANCE.moments(length)[0])
    prefill = float(step(BatchState(prefill_tokens=512.0, draft_passes=length)).prefill)
    working, _ = energy_per_token(server.pair, step, state, emitted, prefill)
    busy = min(rate * (200.0 / (n * emitted) * float(step(state).total) + prefill), 1.0)
    idle = server.tensor_parallel * 70.0 * (1.0 - busy) / (rate * 200.0)
    assert 0 < busy < 0.5
    full = answer["recommended"]
    assert full["energy"] < 0.2 * chosen["energy"], "a full batch shares the reading of weights"
    assert_close(chosen["energy"], 1e6 * (float(working) + idle), rtol=1e-9)


def test_prices_are_of_every_device_or_by_hardware(pair):
    servers = [server_of(before_traces(pair("h100", 2))), server_of(before_traces(pair("l4")))]
    assert prices(servers, 3) == [6.0, 3.0] and prices(servers, None) == [None, None]
    assert prices(servers, {"h100": 2.5}) == [5.0, None]
    for bad, message in (
        ({"h100": 0}, "cost_per_hour of 'h100': got 0"),
        ({"h100": {"price": 3}}, "got None"),
        ({"hx100": 1.0}, "hardware: got 'hx100'"),
        (-1.0, "got -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            prices(servers, bad)
    unpriced = PLANNED | {"target_rate": 5.0, "minimise": "cost", "cost_per_hour": {"l4": 1.0}}
    with pytest.raises(InputError, match="no price is known of h100"):
        size([before_traces(pair("h100"))], **unpriced)


# --- curve, front, uncertainty ----------------------------------------------------------------------


def test_the_curve_has_the_sized_rates_and_falls_with_context(answer):
    curve = answer["curve"]
    assert curve["knob"] == "prompt_length" and curve["values"][2] == 64.0
    of = {e["draft_length"]: e["rate_per_replica"] for e in answer["candidates"] if e["max_batch_size"] == 64.0}
    assert_close(curve["rates"][2], [of[length] for length in curve["draft_lengths"]], rtol=1e-9)
    rates = np.asarray(curve["rates"])
    assert (np.diff(rates, axis=0) < 0).all(), "a longer context is never served faster"
    for entry, row in zip(curve["best"], rates, strict=True):
        assert entry["rate"] == row.max() and entry["plain_rate"] == row[0]
        assert_close(entry["gain"], row.max() / row[0], rtol=1e-12)
    assert [entry["inside_measured"] for entry in curve["best"]] == [False, False, True, False, False]


def test_the_curve_by_acceptance_rises(deployment):
    found = size(deployment, target_rate=20.0, knob="acceptance_rate", knob_values=[0.9, 0.5, 0.7], **ASKED)["curve"]
    assert found["values"] == [0.5, 0.7, 0.9]
    rates = np.asarray(found["rates"])
    assert_close(rates[:, 0], rates[0, 0], rtol=1e-9)
    assert (np.diff(rates[:, 1:], axis=0) > 0).all()


def test_the_front_is_what_brute_force_leaves():
    random = np.random.default_rng(0)
    for points in (random.integers(0, 6, (150, 3)).astype(float), random.random((200, 3)), random.random((40, 1))):
        expected = {
            i
            for i, point in enumerate(points)
            if not any((other <= point).all() and (other < point).any() for other in points)
        }
        assert set(non_dominated(points).tolist()) == expected
    assert non_dominated(np.zeros((0, 3))).size == 0


def test_the_front_of_an_answer_is_not_dominated_and_dominates_the_rest(answer):
    pareto = answer["pareto"]
    latency, rate, spend = pareto["objectives"]
    assert (latency, spend) == ("e2e_mean", "cost")

    def of(point):
        return np.asarray([point[latency], -point[rate], point[spend]])

    points, front = [of(point) for point in pareto["points"]], [of(point) for point in pareto["front"]]
    assert len(front) + pareto["dominated"] == len(points)
    beaten = [any((q <= p).all() and (q < p).any() for q in points) for p in points]
    assert sum(beaten) == pareto["dominated"]
    assert not any((q <= p).all() and (q < p).any() for p in front for q in points)
    assert [point[latency] for point in pareto["front"]] == sorted(point[latency] for point in pareto["front"])


def test_replicas_of_a_rate():
    assert replicas_of(10.0, 40.0, 0.0) == 4 and replicas_of(9.99, 40.0, 0.0) == 5 and replicas_of(1e9, 40.0, 0.0) == 1


def test_a_risk_sizes_for_the_rate_that_enough_draws_sustain(deployment, answer):
    told = answer["intervals"]
    low, median, high = (told["rate_per_replica"][name] for name in ("low", "median", "high"))
    assert low < median < high and low < answer["recommended"]["rate_per_replica"] < high
    assert told["replicas"]["low"] <= answer["recommended"]["replicas"] <= told["replicas"]["high"]
    assert told["feasible_share"] == 1.0 and told["draws"] == 64
    few = ASKED | {"max_draft_length": 2, "max_batch_size": 64.0, "target_rate": 80.0, "headroom": 0.1}
    careful, bold = (size(deployment, risk=risk, **few) for risk in (0.9, 0.1))
    chosen, spread = careful["recommended"], careful["intervals"]["rate_per_replica"]
    assert spread["low"] <= chosen["rate_per_replica"] < spread["median"]
    assert chosen["replicas"] >= answer["recommended"]["replicas"]
    assert bold["recommended"]["rate_per_replica"] > answer["recommended"]["rate_per_replica"]
    with pytest.raises(InputError, match=r"risk: got 0\.9, but the model does not tell"):
        size(replace(deployment, uncertainty=None), risk=0.9, **few)


# --- infeasible, and bad input ----------------------------------------------------------------------


def test_infeasible_names_the_limit_and_the_nearest_candidate(deployment, values_at, answer):
    found = size(deployment, target_rate=5.0, **ASKED | {"slo": ["ttft_p95<0.25", "tpot_mean<0.001"]})
    json.dumps(found, allow_nan=False)
    assert found["outcome"] == "infeasible" and found["recommended"] is None and found["candidates"] == []
    told = found["infeasible"]
    assert found.keys() == answer.keys()
    assert told["limits"]["ttft_p95<0.25"]["excess"] < 0 < told["limits"]["tpot_mean<0.001"]["excess"]
    at = {length: values_at({"draft_length": length, "max_batch_size": 64.0}, 1e-5)["tpot_mean"] for length in range(5)}
    best = min(at, key=at.__getitem__)
    assert told["nearest"]["draft_length"] == best
    assert_close(told["limits"]["tpot_mean<0.001"]["excess"], at[best] / 0.001 - 1.0, rtol=1e-4)
    assert all(rate == 0 for row in found["curve"]["rates"] for rate in row)
    text = "\n".join(str(part) for part in sizing(found))
    assert "a limit is broken without load" in text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"slo": ["throughput>3"]}, "unknown metric 'throughput'"),
        ({"slo": ["ttft_mean>3"]}, "an upper limit"),
        ({"target_rate": 0.0}, "target_rate: got 0.0"),
        ({"headroom": 1.0}, "headroom: got 1.0"),
        ({"burst_scv": -1.0}, "burst_scv"),
        ({"minimise": "money"}, "minimise: got 'money'"),
        ({"latency": "utilization"}, "latency: got 'utilization'"),
        ({"knob": "weather"}, "knob: got 'weather'"),
        ({"knob": "acceptance_rate", "knob_values": [0.5, 1.5]}, "knob_values"),
        ({"risk": 1.0}, "risk: got 1.0"),
        ({"max_batch_size": 2000.0}, "max_batch_size: got 2000"),
        ({"max_draft_length": 99}, "max_draft_length"),
        ({"minimise": "energy"}, "minimise: got 'energy', which is not known"),
    ],
)
def test_bad_questions_are_refused(deployment, asked, message):
    with pytest.raises(InputError, match=message):
        size(deployment, **{"target_rate": 5.0, **ASKED, **asked})


# --- the command ----------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSPEC_CACHE_DIR", "")
    return toy_model(tmp_path / "model.json")


COMMAND = ("--target-rate", "80", "--acceptance-rate", "0.8", "--max-draft-length", "4", "--slo", "tpot_mean<0.03")


def test_the_command_answers_as_json_tables_and_plot(model, tmp_path):
    ran = run(
        *("size", model, *COMMAND, "--slo", "ttft_p95<0.25", "--json", "--headroom", "0.1", "--cost-per-hour", "2"),
        *("--out", tmp_path / "answer.json", "--plot", tmp_path / "size.png"),
    )
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told == json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))
    assert (tmp_path / "size.png").read_bytes().startswith(b"\x89PNG")
    assert "no intervals" in "\n".join(str(part) for part in sizing(told)) and told["intervals"] is None
    documented = {word.split("``")[0] for word in (size.__doc__ or "").split("Returns plain data:")[1].split(" ``")}
    assert set(told) <= documented, set(told) - documented
    ran = run("size", model, *COMMAND, "--slo", "ttft_p95<0.25", "--headroom", "0.1")
    assert ran.code == 0 and "replicas" in ran.out and "Pareto front" in ran.out


def test_exit_codes_and_refusals_of_the_command(model, tmp_path):
    ran = run("size", model, *COMMAND, "--slo", "ttft_p95<0.0001")
    assert ran.code == 1 and "infeasible" in ran.out and "fails by" in ran.out
    catalogue = tmp_path / "prices.yaml"
    catalogue.write_text("- 3\n", encoding="utf-8")
    for arguments, message in (
        (("--arrival-rate", "3"), "--target-rate, of all replicas together"),
        (("--cost-per-hour", "cheap"), "--cost-per-hour: got 'cheap'"),
        (("--cost-per-hour", catalogue), "got no mapping"),
        (("--max-tensor-parallel", "4"), "--max-tensor-parallel needs --hardware"),
        (("--hardware", "h100"), "cannot be transferred"),
        (("--slo", "ttft_p42<1"), "unknown metric 'ttft_p42'"),
    ):
        ran = run("size", model, *COMMAND, *arguments)
        assert ran.code == 2 and message in ran.err, (arguments, ran.err)


def test_a_catalogue_of_hardware_before_any_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSPEC_CACHE_DIR", "")
    prices_file = tmp_path / "prices.yaml"
    prices_file.write_text("catalogue: {h100: {cost_per_hour: 2.5}, l4: {cost_per_hour: 0.7}}\n", encoding="utf-8")
    ran = run(
        *("size", "--verifier", CONFIGS / "llama-3.1-8b.json", "--drafter", CONFIGS / "llama-3.2-1b.json"),
        *("--hardware", "h100,l4", "--max-tensor-parallel", "2", "--prompt-length", "512", "--output-length", "200"),
        *("--target-rate", "100", "--acceptance-rate", "0.8", "--max-draft-length", "3", "--slo", "tpot_mean<0.1"),
        *("--cost-per-hour", prices_file, "--json"),
    )
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert {(e["hardware"], e["tensor_parallel"]) for e in told["candidates"]} == {
        ("h100", 1),
        ("h100", 2),
        ("l4", 1),
        ("l4", 2),
    }
    assert told["minimise"] == "cost" and told["recommended"]["energy"] > 0
    assert sizing_figure(told).axes[1].get_xlabel() == "rate of a device [req/s]"


def test_public_names():
    assert diffspec.size is size and diffspec.non_dominated is non_dominated


# --- the experiment ----------------------------------------------------------------------


def test_the_table_of_the_experiment_is_that_of_its_numbers():
    folder, module = EXPERIMENTS / "07_optimise", experiment("07_optimise", "capacity")
    found = json.loads((folder / "capacity.json").read_text(encoding="utf-8"))
    assert module.markdown(found) == (folder / "capacity.md").read_text(encoding="utf-8")
    for entries in found["measured"].values():
        assert {entry["metric"] for entry in entries} == set(module.METRICS)
        assert all(entry["inside"] == (entry["low"] <= entry["offered_rate"] <= entry["high"]) for entry in entries)
