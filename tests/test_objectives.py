"""`diffspec optimize` beyond means: percentiles, goodput, energy and cost, against the predictions one by one, scipy,
closed forms and the simulator."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import SERVER_STEP, assert_close
from scipy.optimize import brentq
from test_cli_main import run, toy_deployment, toy_model

from diffspec.acceptance import ConstantAcceptance
from diffspec.analysis.answers import predict_answer
from diffspec.analysis.before_traces import before_traces
from diffspec.analysis.simulated import engine_of
from diffspec.architecture import read_architecture
from diffspec.first_principles import FirstPrinciples
from diffspec.fitting.uncertainty import Uncertainty
from diffspec.hardware import accelerator
from diffspec.optimizing.limits import least
from diffspec.optimizing.optimize import optimize, optimize_unmeasured
from diffspec.optimizing.question import read_question
from diffspec.optimizing.servers import joules, server_of
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.simulating import simulate
from diffspec.workload import Workload

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
ACCEPTANCE = ConstantAcceptance(0.8)
TAILS = {"slo": ["e2e_p99<0.9", "tpot_p95<0.0045"], "objective": "ttft_p95"}
LENGTHS = {"prompt_length": 64.0, "output_length": 64.0, "output_scv": 0.5}
ASKED = LENGTHS | {"loads": [4.0, 40.0, 50.0], "max_draft_length": 3, "max_batch_size": 16.0, "acceptance": ACCEPTANCE}


@pytest.fixture(scope="module")
def deployment():
    """A cap of 16 that requests wait for at the higher loads, and draws around its costs."""
    serving = ServingModel(SERVER_STEP, first_token_steps=1.5)
    made = replace(toy_deployment(), form="roofline", serving=serving)
    paths = ("step_time.weight_read", "step_time.token_compute")
    noise = {"ttft_mean": 0.05, "itl_mean": 0.02}
    known = Uncertainty("laplace", paths, np.diag([0.03, 0.03]), np.ones(2), noise, dict.fromkeys(noise, 0.0), 5.0, {})
    return replace(made, uncertainty=known)


@pytest.fixture(scope="module")
def predicted(deployment):
    """(load, k) -> what `diffspec predict` tells, percentiles included."""
    kept = {}

    def at(load, length):
        if (load, length) not in kept:
            config = deployment.configuration(float(length), acceptance=ACCEPTANCE, max_batch_size=16.0)
            workload = Workload(**LENGTHS, arrival_rate=float(load))
            kept[load, length] = predict_answer(deployment, workload, config, with_intervals=False)
        return kept[load, length]

    return at


@pytest.fixture(scope="module")
def by_percentile(deployment):
    return optimize(deployment, **TAILS, **ASKED)


@pytest.mark.slow
def test_percentiles_choose_what_the_predictions_one_by_one_choose(by_percentile, predicted):
    """And their values are those of `predict`, which finds them in a program of its own. Without load the smallest p95
    of ttft is that of no speculation: the limit on the tail of tpot forbids it."""
    assert by_percentile["limits"] == TAILS["slo"] and by_percentile["outcome"] == "successful"
    chosen = []
    for entry in by_percentile["table"]:
        every = {k: predicted(entry["load"], k)["percentiles"] for k in range(4)}
        tails = {k: told for k, told in every.items() if told}
        keeps = [k for k, told in tails.items() if told["e2e"]["p99"] < 0.9 and told["tpot"]["p95"] < 0.0045]
        best = min(keeps, key=lambda k: tails[k]["ttft"]["p95"]) if keeps else None
        assert entry["draft_length"] == best
        told = tails[entry["nearest_draft_length"] if best is None else best]
        for name in ("tpot_p95", "e2e_p99", "ttft_p95"):
            metric, percent = name.split("_")
            assert_close(entry["metrics"][name], told[metric][percent], rtol=1e-6)
        chosen.append(best)
    free = min(range(4), key=lambda k: predicted(4.0, k)["percentiles"]["ttft"]["p95"])
    assert free == 0 and chosen[0] not in (None, 0) and chosen[2] is None


def test_the_relaxation_lies_where_the_tail_reaches_its_limit(deployment, by_percentile):
    """At 4 req/s each drafted token lengthens ttft and shortens tpot: the root of p95 = limit by Brent's method. Few
    rounds of multipliers leave it within 2 %, where the limit is kept."""

    def above(length):
        config = deployment.configuration(float(length), acceptance=ACCEPTANCE, max_batch_size=16.0)
        workload = Workload(**LENGTHS, arrival_rate=4.0)
        told = predict_answer(deployment, workload, config, with_intervals=False)
        return told["percentiles"]["tpot"]["p95"] - 0.0045

    root = brentq(above, 1.0, 2.0, xtol=1e-6)
    assert root * 0.9999 < by_percentile["table"][0]["relaxed_draft_length"] < 1.02 * root


@pytest.mark.slow
def test_goodput_is_the_rate_of_simulated_requests_that_keep_their_limits(deployment):
    """Independent of the model's distribution: the simulator's requests, counted."""
    entry = optimize(deployment, objective="goodput", slo=["ttft<0.022", "tpot<0.0042"], **ASKED)["table"][1]
    length = float(entry["draft_length"])
    config = deployment.configuration(length, acceptance=ACCEPTANCE, max_batch_size=16.0)
    workload = Workload(**LENGTHS, arrival_rate=40.0)
    engine = engine_of(deployment, workload, config)
    found = simulate(
        deployment.serving.step_time, workload, engine, n_requests=3000, replications=8, output_law="lognormal"
    )
    keeps = np.concatenate([(lane.ttft < 0.022) & ~(lane.tpot >= 0.0042) for lane in found.lanes])
    counted = 40.0 * keeps.mean()
    assert 0.05 < keeps.mean() < 0.95, "both limits matter"
    assert_close(entry["metrics"]["goodput"], counted, rtol=0.05)


def test_equal_goodputs_go_to_the_quicker(deployment):
    """Where every request keeps its limits goodput is the load at any draft length: the smallest e2e_mean decides."""
    easy = optimize(deployment, objective="goodput", slo=["ttft<9", "tpot<1"], **ASKED)["table"][0]
    quick = optimize(deployment, **ASKED)["table"][0]
    assert easy["draft_length"] == quick["draft_length"] and easy["metrics"]["goodput"] == pytest.approx(4.0, rel=1e-6)


@pytest.mark.slow
def test_risk_looks_at_the_draws_of_a_percentile(deployment, by_percentile):
    """The objective that nine of ten draws do not exceed is above the centre's, and all draws told are the 32 asked."""
    loose = TAILS | {"slo": ["e2e_p99<9", "tpot_p95<1"]}
    entry = optimize(deployment, **loose, risk=0.9, **ASKED)["table"][0]
    assert entry["risk_objective"] > entry["metrics"]["ttft_p95"]
    assert by_percentile["intervals"]["draws"] == 32


def test_energy_and_cost_of_a_closed_loop(unmeasured):
    """The least energy by brute force; cost is the price over the throughput; what is cheap is what serves most."""
    subject = unmeasured
    closed = {"prompt_length": 512.0, "output_length": 200.0, "loads": [1.0, 64.0], "loop": "concurrency"}
    closed |= {"max_draft_length": 3, "acceptance": ACCEPTANCE}
    frugal = optimize_unmeasured(subject, objective="energy", slo=["cost<9"], cost_per_hour=2.0, **closed)
    deployment, server = subject.deployment, server_of(subject)
    predict = jax.jit(lambda workload, config: deployment.serving.predict(workload, config))
    for entry in frugal["table"]:
        energies = []
        for length in range(4):
            config = deployment.configuration(float(length), acceptance=ACCEPTANCE)
            workload = Workload(512.0, 200.0, concurrency=entry["load"])
            found = predict(*jax.tree.map(np.asarray, (workload, config)))
            arguments = (config, found.effective_batch_size, found.throughput)  # as many in service as in the loop
            spent = joules(server.pair_at(workload), deployment.serving.step_time, workload, *arguments)
            energies.append(1e6 * float(spent))
        metrics = entry["metrics"]
        assert entry["draft_length"] == np.argmin(energies)
        assert_close(metrics["energy"], min(energies), rtol=1e-6)
        assert_close(metrics["cost"], 2.0 * 1e6 / (3600 * metrics["throughput"] * 200.0), rtol=1e-9)
    cheap, most = (
        optimize_unmeasured(subject, objective=objective, cost_per_hour=2.0, **closed)["table"]
        for objective in ("cost", "throughput")
    )
    assert [entry["draft_length"] for entry in cheap] == [entry["draft_length"] for entry in most]


@pytest.fixture(scope="module")
def unmeasured():
    """Llama 8B with a 1B drafter on an H100."""
    verifier, drafter = (read_architecture(CONFIGS / f"llama-3.{name}.json") for name in ("1-8b", "2-1b"))
    return before_traces(FirstPrinciples(verifier, accelerator("h100"), drafter))


def held(subject, **asked):
    """The choice under a limit on memory, with 712 tokens of each request, 612 while it runs."""
    asked = {"prompt_length": 512.0, "output_length": 200.0, "loads": [4.0], "max_draft_length": 3} | asked
    return optimize(subject.deployment, server=server_of(subject), acceptance=ACCEPTANCE, **asked)


def test_memory_is_weights_activations_runtime_and_the_cache(unmeasured):
    """By hand: weights (norms, some 1e-4 of them, left out), the plan's activations, 2 GB, and 100 requests."""
    weights, token, plan = 0.0, 0.0, unmeasured.plan
    for count, hidden, mlp, kv_heads, head, tables in ((32, 4096, 14336, 8, 128, 2), (16, 2048, 8192, 8, 64, 1)):
        layer = 2 * hidden**2 + 2 * hidden * kv_heads * head + 3 * hidden * mlp
        weights += 2.0 * (count * layer + tables * 128256 * hidden)
        token += 2.0 * count * 2 * kv_heads * head
    expected = (weights + plan.activation_bytes + 2e9 + 100.0 * 612.0 * token) / 1e9
    use = server_of(unmeasured).memory_use(Workload(512.0, 200.0, arrival_rate=1.0), None)
    assert_close(use.gigabytes(100.0 * 612.0, True), expected, rtol=1e-3)
    assert_close(use.gigabytes(1e9, True), plan.usable_bytes / 1e9, rtol=1e-9)  # the cache fills what there is
    plain = plan.verifier_bytes + plan.activation_bytes + plan.reserve_bytes + 1e4 * plan.kv_bytes_per_token
    assert_close(use.gigabytes(1e4, False), plain / 1e9, rtol=1e-12)
    assert_close(use.gigabytes(0.0, True, 2.0) - use.gigabytes(0.0, True), plan.drafter_bytes / 1e9, rtol=1e-9)


@pytest.mark.slow
def test_a_limit_on_memory_counts_the_batch_at_its_cap(unmeasured):
    plan = unmeasured.plan
    weights = plan.verifier_bytes + plan.drafter_bytes + plan.activation_bytes + plan.reserve_bytes
    token = plan.kv_bytes_per_token + plan.drafter_kv_bytes_per_token
    (kept,) = held(unmeasured, slo=["memory<60"], max_batch_size=100.0)["table"]
    exact = kept["metrics"]["memory"]
    assert kept["draft_length"] > 0 and exact == pytest.approx((weights + 61_200.0 * token) / 1e9, rel=1e-9)
    assert kept["headroom"] == pytest.approx(1.0 - exact / 60.0, rel=1e-9)
    plain = exact - (plan.drafter_bytes + 100.0 * 612.0 * plan.drafter_kv_bytes_per_token) / 1e9
    (tight,) = held(unmeasured, slo=[f"memory<{0.5 * (plain + exact)!r}"], max_batch_size=100.0)["table"]
    assert tight["draft_length"] == 0 and tight["metrics"]["memory"] == pytest.approx(plain, rel=1e-12)
    broken = held(unmeasured, slo=["memory<20"], max_batch_size=100.0)
    assert broken["outcome"] == "infeasible" and broken["table"][0]["nearest_draft_length"] == 0
    excess = pytest.approx(plain / 20.0 - 1.0)
    assert broken["infeasible"] == {"memory<20": {"value": pytest.approx(plain), "bound": 20.0, "excess": excess}}


@pytest.mark.slow
def test_memory_without_a_cap_is_that_of_a_full_cache_and_a_loop_has_no_more_in_flight(unmeasured):
    plan = unmeasured.plan
    (full,) = held(unmeasured, slo=["memory<99"])["table"]
    assert full["metrics"]["memory"] == pytest.approx(plan.usable_bytes / 1e9, rel=1e-9)
    (loop,) = held(unmeasured, slo=["memory<99"], loop="concurrency", loads=[10.0], max_batch_size=100.0)["table"]
    weights = plan.verifier_bytes + plan.drafter_bytes + plan.activation_bytes + plan.reserve_bytes
    tokens = 10.0 * 612.0 * (plan.kv_bytes_per_token + plan.drafter_kv_bytes_per_token)
    assert loop["draft_length"] > 0 and loop["metrics"]["memory"] == pytest.approx((weights + tokens) / 1e9, rel=1e-9)


def test_a_goodput_that_no_request_counts_for_is_infeasible(deployment):
    answer = optimize(deployment, objective="goodput", slo=["ttft<0.000001", "tpot<1"], **ASKED)
    assert answer["outcome"] == "infeasible" and answer["infeasible"] == {"goodput": {"value": 0.0, "bound": None}}
    json.dumps(answer, allow_nan=False)


def test_the_same_limit_twice_is_one_and_equals_are_equal():
    asked = ("goodput", ["ttft<0.5", "tpot<1", "ttft<0.1", "ttft<0.1"], "arrival_rate", [1.0], 4)
    assert [limit.text for limit in read_question(*asked).within] == ["ttft<0.1", "tpot<1"]
    cost = -np.asarray([[2.5, 2.5 * (1 + 8e-6)], [2.5, 2.6], [2.6, 2.5]])
    e2e = np.asarray([[1.0, 3.0], [1.0, 3.0], [3.0, 1.0]])
    assert least(np.log(-cost) * -1.0, e2e, "goodput").tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"objective": "ttft_p96"}, r"did you mean 'ttft_p9"),
        ({"slo": ["ttft<0.5"]}, "ttft_p95<NUMBER"),
        ({"objective": "goodput"}, "at least one, such as"),
        ({"objective": "goodput", "slo": ["ttft>0.5"]}, "an upper limit"),
        ({"objective": "goodput", "slo": ["goodput<5", "ttft<1"]}, "limited from below"),
        ({"objective": "e2e_p95", "loop": "concurrency"}, "has no percentiles"),
        ({"objective": "cost", "cost_per_hour": 1.0}, "diffspec size"),
        ({"slo": ["cost<5"]}, "no price is known"),
        ({"objective": "energy"}, "neither the fit nor the question"),
        ({"slo": ["memory<72"]}, "fit again with --verifier config.json --hardware NAME"),
        ({"slo": ["memory>72"]}, "memory is limited from above, in GB"),
        ({"objective": "memory"}, "objective: got 'memory'"),
        ({"objective": "tpot_mean", "output_length": 1.0}, "no time per token after the first"),
        ({"slo": ["tpot_p95<1"], "output_length": 1.0}, "no time per token after the first"),
    ],
)
def test_what_means_nothing_is_refused(deployment, asked, said):
    with pytest.raises(InputError, match=said):
        optimize(deployment, **(ASKED | asked))


@pytest.mark.slow
def test_batches_beyond_the_chain_have_no_percentile_and_say_so(deployment):
    """At a cap that is beyond any batch and 0.999 of capacity of draft length 1: thousands in service, a mean but no
    percentile."""
    config = deployment.configuration(1.0, acceptance=ACCEPTANCE, max_batch_size=1e6)
    capacity = predict_answer(deployment, Workload(**LENGTHS, arrival_rate=1.0), config, with_intervals=False)[
        "capacity"
    ]
    asked = ASKED | {"loads": [0.9985 * capacity], "max_batch_size": 1e6, "max_draft_length": 1, "slo": ["ttft_p95<9"]}
    answer = optimize(deployment, **asked)
    assert answer["table"][0]["draft_length"] == 0  # which serves more, and whose batch is small here
    assert any("no percentile is computed" in note for note in answer["warnings"])


def test_command_line(tmp_path, deployment):
    model = str(toy_model(tmp_path / "model.json", replace(deployment, uncertainty=None)))
    flags = ["--prompt-length", "64", "--output-length", "64", "--output-scv", "0.5", "--acceptance-rate", "0.8"]
    flags += ["--max-batch-size", "16", "--max-draft-length", "3"]
    tails = [part for limit in TAILS["slo"] for part in ("--slo", limit)] + ["--objective", TAILS["objective"]]
    ran = run("optimize", model, "--arrival-rate", "4,40,50", *flags, *tails, "--json")
    answer = json.loads(ran.out)
    assert ran.code == 0 and answer["limits"] == TAILS["slo"] and answer["table"][0]["metrics"]["tpot_p95"] < 0.0045
    shown = run("optimize", model, "--arrival-rate", "4,40,50", *flags, *tails)
    assert all(name in shown.out for name in ("ttft_p95", "e2e_p99", "tpot_p95"))
    wrong = run("optimize", model, "--arrival-rate", "2", *flags, "--objective", "cost", "--cost-per-hour", "x")
    assert wrong.code == 2 and "--cost-per-hour" in wrong.err
