"""Analysis and optimisation on a fitted deployment: against finite differences, brute force and closed forms."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from scipy.optimize import brentq

from diffspec.acceptance import ConstantAcceptance
from diffspec.analysis.answers import predict_answer
from diffspec.analysis.sensitivity import sensitivity
from diffspec.fitting.fit import fit
from diffspec.optimizing.flags import vllm_flags
from diffspec.optimizing.limits import LIMITED, parse_limit
from diffspec.optimizing.optimize import optimize
from diffspec.optimizing.schedule import batch_schedule, residence_under_schedule
from diffspec.parameters import get_parameters, set_parameters
from diffspec.prediction import STAGES
from diffspec.results import InputError
from diffspec.staircase import StaircaseStepTime
from diffspec.traces import read_trace
from diffspec.workload import Workload

QUIET = Path(__file__).parents[1] / "data" / "vllm_cpu_quiet.csv"
LENGTHS = {"prompt_length": 64.0, "output_length": 64.0}
LOADS = [0.5, 2.0, 4.0, 6.0, 8.0, 12.0]


@pytest.fixture(scope="module")
def deployment():
    return fit(read_trace(QUIET), step_time="affine").deployment()


@pytest.fixture(scope="module")
def metrics_of(deployment):
    """(rate, k, acceptance) -> prediction, one compiled program."""

    @jax.jit
    def program(rate, k, alpha):
        config = deployment.configuration(k, acceptance=ConstantAcceptance(alpha))
        return deployment.serving.predict(Workload(**LENGTHS, arrival_rate=rate), config)

    return lambda rate, k, alpha=0.8: program(float(rate), float(k), float(alpha))


@pytest.fixture(scope="module")
def limited(deployment):
    return optimize(
        deployment,
        loads=LOADS,
        **LENGTHS,
        slo=["ttft_mean<0.18", "e2e_mean < 2.5"],
        acceptance=ConstantAcceptance(0.8),
    )


def test_prediction_answer_is_plain_and_complete(deployment):
    answer = predict_answer(deployment, Workload(**LENGTHS, arrival_rate=3.0), deployment.configuration(4))
    json.dumps(answer, allow_nan=False)
    assert answer["outcome"] == "successful" and answer["speedup_reason"] is None
    total = sum(part for stage in STAGES for part in answer["decomposition"][stage].values())
    assert_close(total, answer["e2e_latency"], rtol=1e-9)
    assert_close(answer["speedup"], answer["plain"]["e2e_latency"] / answer["e2e_latency"], rtol=1e-12)
    (mixed,) = answer["warnings"]  # the trace imposes 0.6 at draft length 2 and 0.9 at 4
    assert "0.60 at draft length 2, 0.90 at draft length 4" in mixed
    own = deployment.configuration(4, acceptance=ConstantAcceptance(0.9))
    answer = predict_answer(deployment, Workload(**LENGTHS, arrival_rate=3.0), own, percentile_intervals=True)
    assert answer["warnings"] == [] and answer["inside_measured"] and answer["outside_measured"] == []
    told = answer["intervals"]
    for name in ("ttft", "itl", "tpot", "e2e_latency", "capacity", "utilization", "effective_batch_size", "speedup"):
        assert told["metrics"][name]["low"] < answer[name] < told["metrics"][name]["high"], name
    for metric in ("ttft", "tpot", "itl", "e2e"):
        for name, edges in told["percentiles"][metric].items():
            assert edges["low"] < answer["percentiles"][metric][name] < edges["high"]
    older = predict_answer(replace(deployment, uncertainty=None), Workload(**LENGTHS, arrival_rate=3.0), own)
    assert older["intervals"] is None and "fit the trace again" in older["intervals_reason"]
    assert older["ttft"] == answer["ttft"] and answer["intervals_reason"] is None


def test_requests_wait_for_a_place_in_the_batch(deployment):
    """One place: M/G/1 with the wait of Pollaczek and Khinchine; optimize counts it, and nothing is warned about."""
    load = Workload(**LENGTHS, arrival_rate=1.2)
    config = deployment.configuration(4, acceptance=ConstantAcceptance(0.9), max_batch_size=1)
    answer = predict_answer(deployment, load, config)
    free = predict_answer(deployment, load, deployment.configuration(4, acceptance=ConstantAcceptance(0.9)))
    assert answer["outcome"] == "successful" and answer["warnings"] == []
    service = answer["e2e_latency"] - answer["waiting_time"]
    use = 1.2 * service
    low, high = (0.5 * use / (1 - use) * service * (1 + scv) for scv in (0.0, 0.1))
    assert low <= answer["waiting_time"] <= high, "between fixed service and the spread of acceptance"
    assert answer["percentiles"]["waiting_probability"] == pytest.approx(use, rel=0.05)
    assert answer["ttft"] > free["ttft"] + 0.9 * answer["waiting_time"] - 0.2
    policy = optimize(deployment, loads=[1.2], **LENGTHS, max_batch_size=1, acceptance=ConstantAcceptance(0.9))
    assert not any("near its cap" in note for note in policy["warnings"])
    assert policy["policy"][0]["metrics"]["e2e_mean"] <= answer["e2e_latency"] * (1 + 1e-9)


@pytest.mark.slow
def test_a_full_batch_has_percentiles_where_the_chain_is_as_long_as_the_cap(deployment):
    config = deployment.configuration(4, acceptance=ConstantAcceptance(0.9), max_batch_size=64)
    load = Workload(**LENGTHS, arrival_rate=1.0)
    capacity = predict_answer(deployment, load, config, with_intervals=False)["capacity"]
    load = Workload(**LENGTHS, arrival_rate=0.995 * capacity)
    answer = predict_answer(deployment, load, config, with_intervals=False)
    assert answer["effective_batch_size"] > 0.9 * 64
    assert answer["percentiles"]["e2e"]["p99"] > answer["percentiles"]["e2e"]["p50"] > 0


@pytest.mark.slow
def test_without_plain_rows_no_speedup_and_no_zero(deployment):
    blind = fit(read_trace(QUIET).where("draft_length > 0"), step_time="affine").deployment()
    answer = optimize(blind, loads=[1.0, 4.0], **LENGTHS, max_draft_length=4, acceptance=ConstantAcceptance(0.1))
    assert [entry["speedup"] for entry in answer["table"]] == [None, None]
    assert all(entry["draft_length"] != 0 for entry in answer["table"])
    with pytest.raises(InputError, match="equals arrival_rate"):
        optimize(deployment, loads=[1.0], **LENGTHS, objective="throughput")


def test_breakeven_is_where_both_arms_take_equally_long(deployment, metrics_of):
    config = deployment.configuration(4, acceptance=ConstantAcceptance(0.35))
    answer = predict_answer(deployment, Workload(**LENGTHS, arrival_rate=1.0), config)
    gap = lambda rate: float(metrics_of(rate, 4, 0.35).e2e_latency - metrics_of(rate, 0, 0.35).e2e_latency)  # noqa: E731
    capacity = float(metrics_of(1.0, 4, 0.35).capacity)
    grid = np.linspace(0.01, 0.99 * capacity, 60)
    gaps = [gap(rate) for rate in grid]
    crossings = np.flatnonzero(np.sign(gaps[:-1]) != np.sign(gaps[1:]))
    if not crossings.size:
        assert answer["breakeven_rate"] is None and "at every arrival rate" in answer["breakeven_reason"]
    else:
        expected = brentq(gap, grid[crossings[0]], grid[crossings[0] + 1], xtol=1e-12)
        assert_close(answer["breakeven_rate"], expected, rtol=1e-8)


def test_speedup_is_missing_with_a_reason(deployment):
    plain = predict_answer(deployment, Workload(**LENGTHS, arrival_rate=1.0), deployment.configuration(0))
    assert plain["speedup"] is None and "draft_length is 0" in plain["speedup_reason"]
    over = predict_answer(deployment, Workload(**LENGTHS, arrival_rate=500.0), deployment.configuration(4))
    assert over["outcome"] == "saturated" and over["e2e_latency"] is None and "saturated" in over["speedup_reason"]
    assert_close(over["shortfall"], 500.0 - over["capacity"], rtol=1e-9)
    json.dumps(over, allow_nan=False)
    assert any("outside the measured range" in note for note in over["warnings"])


def test_configuration_refuses_what_is_unknown(deployment):
    config = deployment.configuration(4, drafter_params=5.38e6)
    assert_close(config.drafter_scale, 2.0, rtol=1e-12)
    bare = fit(read_trace(QUIET).where("draft_length==0"), step_time="affine").deployment()
    assert "no speculative row" in " ".join(bare.warnings)
    with pytest.raises(InputError, match="no acceptance of its own"):
        bare.configuration(4)
    with pytest.raises(InputError, match="size of its drafter is unknown"):
        bare.configuration(4, acceptance=ConstantAcceptance(0.8), drafter_params=1e6)
    guess = bare.configuration(4, acceptance=ConstantAcceptance(0.8))
    answer = predict_answer(bare, Workload(**LENGTHS, arrival_rate=1.0), guess)
    assert any("guess" in note for note in answer["warnings"])


@pytest.mark.parametrize("metric", ["e2e_mean", "ttft_mean", "capacity"])
def test_elasticities_are_finite_differences(deployment, metric):
    workload, config = Workload(**LENGTHS, arrival_rate=3.0), deployment.configuration(4)
    answer = sensitivity(deployment, workload, config, metric)
    field = {"e2e_mean": "e2e_latency", "ttft_mean": "ttft", "capacity": "capacity"}[metric]
    values = {path: float(value) for path, value in get_parameters(deployment.serving).items()}
    step = 1e-5

    @jax.jit
    def metric_at(shifts, rate, prompt, output):
        moved = {path: value * jnp.exp(shift) for (path, value), shift in zip(values.items(), shifts, strict=True)}
        load = Workload(prompt_length=prompt, output_length=output, arrival_rate=rate)
        return jnp.log(getattr(set_parameters(deployment.serving, moved).predict(load, config), field))

    base = (3.0, 64.0, 64.0)
    zero = np.zeros(len(values))
    by_name = {row["name"]: row["elasticity"] for row in answer["elasticities"]}
    for index, path in enumerate(values):
        shift = zero.copy()
        shift[index] = step
        numeric = float(metric_at(shift, *base) - metric_at(-shift, *base)) / (2 * step)
        assert_close(by_name[path.removeprefix("step_time.")], numeric, rtol=1e-5, atol=1e-7)
    for index, name in enumerate(("arrival_rate", "prompt_length", "output_length")):
        up, down = list(base), list(base)
        up[index], down[index] = up[index] * math.exp(step), down[index] * math.exp(-step)
        numeric = float(metric_at(zero, *up) - metric_at(zero, *down)) / (2 * step)
        assert_close(by_name[name], numeric, rtol=1e-5, atol=1e-7)
    sizes = [abs(row["elasticity"]) for row in answer["elasticities"]]
    assert sizes == sorted(sizes, reverse=True)


def test_time_parameters_scale_latency_together(deployment):
    """Twice every time at half the rate is twice the latency: elasticities of times minus the rate's are 1."""
    answer = sensitivity(deployment, Workload(**LENGTHS, arrival_rate=3.0), deployment.configuration(4))
    assert answer["inside_measured"] and answer["intervals"]["draws"] == 64
    told = answer["intervals"]["elasticities"]
    assert all(told[row["name"]]["low"] <= told[row["name"]]["high"] for row in answer["elasticities"])
    assert told["arrival_rate"]["low"] < told["arrival_rate"]["high"]
    times = sum(row["elasticity"] for row in answer["elasticities"] if row["unit"] in ("s", "s/req", "s/tok"))
    rate = next(row["elasticity"] for row in answer["elasticities"] if row["name"] == "arrival_rate")
    assert_close(times - rate, 1.0, rtol=1e-9)


def test_policy_is_what_brute_force_finds(limited, metrics_of):
    for entry in limited["table"]:
        best, best_k = math.inf, None
        for k in range(9):
            prediction = metrics_of(entry["load"], k)
            feasible = (
                float(prediction.utilization) < 0.999
                and float(prediction.ttft) <= 0.18
                and float(prediction.e2e_latency) <= 2.5
            )
            if feasible and float(prediction.e2e_latency) < best:
                best, best_k = float(prediction.e2e_latency), k
        assert entry["draft_length"] == best_k, entry
        if best_k is not None:
            assert_close(entry["metrics"]["e2e_mean"], best, rtol=1e-9)
            assert entry["headroom"] >= 0.0


def test_the_probability_of_each_draft_length_is_that_of_a_count(deployment, limited):
    """Every draw, load and draft length by itself: which is best within the limits, and what the chosen one loses."""
    config = deployment.configuration(8.0, acceptance=ConstantAcceptance(0.8))

    @jax.jit
    @jax.vmap
    def program(model, rate, k):
        return model.predict(Workload(**LENGTHS, arrival_rate=rate), eqx.tree_at(lambda c: c.draft_length, config, k))

    loads = LOADS[1:4]
    models = deployment.uncertainty.models(deployment.serving, 64)
    cells = list(itertools.product(range(64), loads, range(9)))
    draw, rate, k = (np.asarray(column) for column in zip(*cells, strict=True))
    found = program(jax.tree.map(lambda leaf: leaf[draw], models), rate, k.astype(float))
    ttft, e2e = (np.asarray(getattr(found, name)).reshape(64, 3, 9) for name in ("ttft", "e2e_latency"))
    allowed = (ttft <= 0.18) & (e2e <= 2.5) & (np.asarray(found.utilization).reshape(64, 3, 9) < 0.999)
    told = limited["intervals"]
    assert told["draws"] == 64 and [entry["load"] for entry in told["loads"]] == LOADS
    for place, load in enumerate(loads):
        entry, chosen = told["loads"][place + 1], limited["table"][place + 1]["draft_length"]
        best = [
            min((e2e[i, place, j], j) for j in range(9) if allowed[i, place, j])[1] if allowed[i, place].any() else None
            for i in range(64)
        ]
        assert entry["probability_best"] == {str(j): best.count(j) / 64 for j in range(9)}, load
        assert entry["feasible_share"] == 1 - best.count(None) / 64
        if chosen is None:
            continue
        assert limited["table"][place + 1]["chosen_probability"] == best.count(chosen) / 64
        keeps = [i for i in range(64) if allowed[i, place, chosen]]
        regrets = [e2e[i, place, chosen] / e2e[i, place, best[i]] - 1 for i in keeps]
        assert entry["chosen_feasible_share"] == len(keeps) / 64
        assert entry["expected_regret"] == pytest.approx(np.mean(regrets), rel=1e-6, abs=1e-12)
        ratios = e2e[:, place, 0] / e2e[:, place, chosen]
        assert entry["speedup"] is None or entry["speedup"]["median"] == pytest.approx(
            np.quantile(ratios, 0.5, method="nearest"), rel=1e-9
        )
    static = told["static_draft_length"]["probability_best"]
    assert set(static) == set(map(str, range(9))) and sum(static.values()) <= 1.0 + 1e-12


def test_recommendations_say_whether_they_were_measured(limited):
    assert limited["inside_measured"] == all(
        entry["inside_measured"] for entry in limited["table"] if entry["feasible"]
    )
    for entry in limited["table"]:
        k = entry["draft_length"] if entry["feasible"] else entry["nearest_draft_length"]
        measured = (k == 0 or 2 <= k <= 4) and entry["load"] <= 4.0
        assert entry["inside_measured"] == measured == (not entry["outside_measured"]), entry
    for part in limited["policy"]:
        rows = [row for row in limited["table"] if part["load_from"] <= row["load"] <= part["load_to"]]
        assert part["inside_measured"] == all(row["inside_measured"] for row in rows)


def test_policy_ranges_cover_the_loads_and_limits_bind(limited):
    policy = limited["policy"]
    assert policy[0]["load_from"] == LOADS[0] and policy[-1]["load_to"] == LOADS[-1]
    assert limited["outcome"] == "successful"
    last = policy[-1]
    assert last["draft_length"] is None and last["violations"]  # 12 req/s: which limit fails, how far
    json.dumps(limited, allow_nan=False)


def test_relaxation_finds_the_continuous_optimum(deployment, metrics_of):
    answer = optimize(deployment, loads=[1.0, 4.0], **LENGTHS, acceptance=ConstantAcceptance(0.8))
    assert answer["optimality_gap"] == 0.0
    for entry in answer["table"]:
        grid = np.linspace(1.0, 8.0, 281)
        values = [float(metrics_of(entry["load"], k).e2e_latency) for k in grid]
        at_relaxed = float(metrics_of(entry["load"], entry["relaxed_draft_length"]).e2e_latency)
        assert at_relaxed <= min(values) * (1 + 1e-4)


@pytest.mark.slow
def test_risk_chooses_by_a_quantile_over_draws(deployment):
    """Every draft length in every draw, one by one: the 58th best of 64 draws is the cost at a risk of 0.9."""
    asked = {"max_draft_length": 3, "acceptance": ConstantAcceptance(0.55), "slo": ["ttft_mean<0.4"]}
    answer = optimize(deployment, loads=[2.0, 5.0], **LENGTHS, risk=0.9, **asked)
    models = deployment.uncertainty.models(deployment.serving)

    @jax.jit
    def drawn(load, length):
        config = deployment.configuration(length, acceptance=asked["acceptance"])
        found = jax.vmap(lambda model: model.predict(Workload(**LENGTHS, arrival_rate=load), config))(models)
        kept = (found.ttft < 0.4) & (found.overload == 0.0)
        return jnp.where(kept, found.e2e_latency, jnp.inf)

    assert answer["risk"] == 0.9 and answer["optimality_gap"] is None
    for entry in answer["table"]:
        costs = [float(np.sort(np.asarray(drawn(entry["load"], float(k))))[57]) for k in range(4)]
        assert entry["draft_length"] == int(np.argmin(costs))
        assert entry["risk_objective"] == pytest.approx(min(costs), rel=1e-6)
    sure = optimize(deployment, loads=[2.0], **LENGTHS, risk=0.9, max_draft_length=3, slo=["ttft_mean<0.05"])
    told = sure["infeasible"]["risk"]
    assert sure["outcome"] == "infeasible" and told["bound"] == 0.9 > told["value"]
    with pytest.raises(InputError, match=r"risk: got 1\.5"):
        optimize(deployment, loads=[2.0], **LENGTHS, risk=1.5)
    with pytest.raises(InputError, match="fit the trace again"):
        optimize(replace(deployment, uncertainty=None), loads=[2.0], **LENGTHS, risk=0.9)


def test_infeasible_and_saturated_name_the_limit(deployment):
    answer = optimize(deployment, loads=[1.0], **LENGTHS, slo=["e2e_mean<0.01"], max_draft_length=3)
    assert answer["outcome"] == "infeasible" and answer["infeasible"]["e2e_mean<0.01"]["value"] > 0.01
    assert answer["flags"]["vllm_static"] is None
    full = optimize(deployment, loads=[900.0], **LENGTHS, max_draft_length=3)
    assert full["outcome"] == "saturated" and full["infeasible"]["capacity"]["shortfall"] > 0


def test_concurrency_policy(deployment):
    answer = optimize(
        deployment, loads=[1.0, 16.0, 64.0], loop="concurrency", **LENGTHS, objective="throughput", max_draft_length=4
    )
    for entry in answer["table"]:
        assert_close(entry["metrics"]["throughput"] * entry["metrics"]["e2e_mean"], entry["load"], rtol=1e-9)


def test_schedule_takes_the_fastest_draft_length_at_each_batch(deployment, limited):
    config = deployment.configuration(8, acceptance=ConstantAcceptance(0.8))
    workload = Workload(**LENGTHS, arrival_rate=1.0)
    schedule = limited["schedule"]
    assert schedule[0][0] == 1 and schedule[-1][1] == 64
    assert all(after[0] == before[1] + 1 for before, after in itertools.pairwise(schedule))

    @jax.jit
    @jax.vmap
    def pace(k, n):
        chosen = deployment.configuration(k, acceptance=ConstantAcceptance(0.8))
        step = deployment.serving.step_parts(workload, chosen, n).total
        return step / config.acceptance.tokens_per_step(k)

    for first, last, k in schedule:
        for batch in {first, (first + last) // 2, last}:
            lengths = jnp.arange(9.0)
            assert int(np.argmin(np.asarray(pace(lengths, jnp.full(9, float(batch)))))) == k


def test_schedule_equilibrium_of_an_affine_residence():
    sizes = np.arange(1.0, 201.0)
    residence = 0.5 + 0.1 * sizes  # (c1 + c2)/(1 - rate*c2)
    assert_close(residence_under_schedule(sizes, residence, 4.0, "arrival_rate"), 0.6 / (1 - 0.4), rtol=1e-9)
    assert residence_under_schedule(sizes, residence, 11.0, "arrival_rate") is None
    assert_close(residence_under_schedule(sizes, residence, 400.0, "concurrency"), 20.5 * 2, rtol=1e-12)


@pytest.mark.slow
def test_a_schedule_leaves_room_for_prompts_in_the_token_budget(deployment):
    """No batch drafts so much that prompts find no place; the largest draft length there is the policy's own cap."""
    asked = {"prompt_length": 64.0, "output_length": 64.0, "max_draft_length": 4}
    for loads, loop in (([2.0, 6.0], "arrival_rate"), ([8.0, 40.0], "concurrency")):
        free, bound = (
            optimize(deployment, loads=loads, loop=loop, acceptance=ConstantAcceptance(0.9), **asked, **budget)
            for budget in ({}, {"max_batched_tokens": 48.0})
        )
        assert free["schedule"] != bound["schedule"]
        assert all(last * (1 + k) < 48.0 or k == 0 for _, last, k in bound["schedule"])
        assert not any("budget" in line for line in bound["warnings"])
    config = deployment.configuration(4.0, acceptance=ConstantAcceptance(0.9), max_batched_tokens=48.0)
    workload = Workload(**LENGTHS, arrival_rate=1.0)
    schedule = batch_schedule(deployment.serving, workload, config, 4, 64)
    most = [
        float(
            deployment.serving.within_budget(
                workload,
                deployment.configuration(float(k), acceptance=ConstantAcceptance(0.9), max_batched_tokens=48.0),
            )[1]
        )
        for k in range(5)
    ]
    assert most == sorted(most, reverse=True), "the more is drafted, the smaller the batch"
    assert all(last <= most[k] or k == 0 for _, last, k in schedule.ranges)
    assert schedule.sizes[-1] < 48.0, "no more requests than a budget holds"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"max_batch_size": 6.0}, {"max_batched_tokens": 48.0}])
@pytest.mark.parametrize("loop", ["arrival_rate", "concurrency"])
def test_a_schedule_of_one_draft_length_is_that_draft_length(deployment, options, loop):
    """A drafter that never pays: the schedule is 0 everywhere, and both latencies, waiting included, are the same."""
    loads = [0.5, 1.5, 2.5] if loop == "arrival_rate" else [1.0, 4.0, 12.0]
    answer = optimize(
        deployment,
        loads=loads,
        loop=loop,
        **LENGTHS,
        max_draft_length=2,
        acceptance=ConstantAcceptance(0.02),
        **options,
    )
    assert [k for *_, k in answer["schedule"]] == [0]
    for entry in answer["schedule_vs_static"]:
        assert entry["e2e_static"] is not None
        assert_close(entry["e2e_schedule"], entry["e2e_static"], rtol=0.01)


def test_flags_are_what_vllm_reads():
    flags = vllm_flags(3, [[1, 16, 5], [17, 64, 0]], "eagle3", "org/drafter")
    static = json.loads(flags["vllm_static"].removeprefix("--speculative-config '").removesuffix("'"))
    assert static == {"method": "eagle3", "model": "org/drafter", "num_speculative_tokens": 3}
    dynamic = json.loads(flags["vllm_dynamic"].removeprefix("--speculative-config '").removesuffix("'"))
    assert dynamic["num_speculative_tokens"] == 5
    assert dynamic["num_speculative_tokens_per_batch_size"] == [[1, 16, 5], [17, 64, 0]]
    off = vllm_flags(0, [[1, 64, 0]], "eagle3", None)
    assert off == {"vllm_static": None, "vllm_dynamic": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ttft<0.5", "did you mean 'ttft_mean'"),
        ("ttft_mean<-1", "a number above 0"),
        ("ttft_mean", "METRIC<NUMBER"),
        ("throughput<3", "limited from below"),
        ("ttft_mean<1e", "a number above 0"),
    ],
)
def test_limits_refuse_what_they_cannot_read(text, message):
    with pytest.raises(InputError, match=message):
        parse_limit(text)
    assert "e2e_mean" in LIMITED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loads": []}, "at least one load"),
        ({"loads": [2.0, 1.0]}, "increasing"),
        ({"loads": [1.0], "objective": "speed"}, "objective: got 'speed'"),
        ({"loads": [1.0], "max_draft_length": 40}, "whole numbers from 1 to 32"),
        ({"loads": [0.5], "loop": "concurrency"}, "at least 1 req"),
        ({"loads": [1.0], "prompt_length": -3.0}, "prompt_length: got -3.0"),
        ({"loads": [1.0], "output_length": math.nan}, "output_length: got nan"),
    ],
)
def test_optimize_refuses_bad_questions(deployment, options, message):
    with pytest.raises(InputError, match=message):
        optimize(deployment, **(LENGTHS | options))


@pytest.mark.slow
def test_choices_are_scored_on_the_staircase(deployment):
    """Two sizes only: every step below 64 tokens costs as if it had 64; the latencies are those of that engine."""
    asked = {"loads": [1.0, 3.0], "loop": "arrival_rate", "prompt_length": 64.0, "output_length": 64.0}
    smooth = optimize(deployment, **asked, max_draft_length=4)
    coarse = optimize(deployment, **asked, max_draft_length=4, capture_sizes=(64, 128))
    step_time = StaircaseStepTime(deployment.serving.step_time, (64, 128))
    padded = replace(deployment, serving=replace(deployment.serving, step_time=step_time))
    config = padded.configuration(jnp.asarray(4.0))

    @jax.jit
    def latency(rate, k):
        load = Workload(64.0, 64.0, arrival_rate=rate)
        return padded.serving.predict(load, eqx.tree_at(lambda c: c.draft_length, config, k)).e2e_latency

    for entry in coarse["table"]:
        by_hand = [float(latency(entry["load"], float(k))) for k in range(5)]
        assert entry["draft_length"] == int(np.argmin(by_hand))
        assert entry["metrics"]["e2e_mean"] == pytest.approx(min(by_hand), rel=1e-9)
    costs = [[entry["metrics"]["e2e_mean"] for entry in answer["table"]] for answer in (smooth, coarse)]
    assert np.all(np.array(costs[1]) > np.array(costs[0]))
    with pytest.raises(InputError, match="capture_sizes"):
        optimize(deployment, **asked, capture_sizes=(8, 4))


@pytest.mark.slow
def test_prompts_that_are_cached_or_split_change_the_choice_of_nothing_else(deployment):
    asked = {"loads": [1.0], "loop": "arrival_rate", "prompt_length": 512.0, "output_length": 64.0}
    plain, cached, split, varied = (
        optimize(deployment, **asked, max_draft_length=2, **extra)["table"][0]["metrics"]
        for extra in ({}, {"prefix_hit_rate": 0.9}, {"max_batched_tokens": 128.0}, {"output_scv": 1.0})
    )
    assert cached["ttft_mean"] < plain["ttft_mean"] < split["ttft_mean"]
    assert varied["e2e_mean"] != plain["e2e_mean"]
