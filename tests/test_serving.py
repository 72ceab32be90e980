"""The published equations through the general path, the identities of every prediction, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, finite_difference, names
from oracles import (
    PublishedEquation3,
    ReferenceServer,
    geometric_tokens,
    published_breakeven,
    published_equation4_gap,
    published_speedup,
)
from scipy.optimize import brentq

from diffspec.acceptance import ConstantAcceptance
from diffspec.configuration import Configuration
from diffspec.experts import ExpertRouting
from diffspec.parameters import get_parameters, parameter_infos, set_parameters
from diffspec.prediction import STAGES
from diffspec.results import RESULTS, outcome_name
from diffspec.serving import ServingModel
from diffspec.step_time import AffineStepTime, DraftCost, ExpertCost, RooflineStepTime
from diffspec.workload import Workload

PUBLISHED = {"first_token_steps": 0.0, "self_share": 0.0, "steps_form": "published"}
PROMPT, OUTPUT = 200.0, 64.0


def speculation(k, alpha):
    return Configuration(draft_length=k, acceptance=ConstantAcceptance(alpha))


# --- the published model is one special case -----------------------------------------------------------------------

# verify_base, verify_sequence, pass_base, pass_sequence, prefill_token, request_overhead, prefill_interference
COSTS = np.array([6e-3, 4e-4, 9e-4, 4.5e-4, 2e-5, 3e-2, 0.7])


def published_model(p):
    step = AffineStepTime(
        verify_base=p[0],
        verify_sequence=p[1],
        draft=DraftCost(pass_base=p[2], pass_sequence=p[3]),
        prefill_token=p[4],
    )
    return ServingModel(step, request_overhead=p[5], prefill_interference=p[6], **PUBLISHED)


@jax.jit
@jax.vmap
def published_predictions(p, rate, k, alpha):
    model, load = published_model(p), Workload(PROMPT, OUTPUT, arrival_rate=rate)
    fast, slow = model.predict(load, speculation(k, alpha)), model.predict(load, Configuration())
    return fast.e2e_latency, slow.e2e_latency, fast.capacity, slow.capacity, fast.result, slow.result


def equation3(p):
    prefill = (p[5] + p[4] * PROMPT, p[6] * p[4] * PROMPT)
    return PublishedEquation3(prefill, verify=(p[0], p[1]), draft=(p[2], p[3]))


def test_equations_1_2_3():
    rng = np.random.default_rng(0)
    n = 200
    p = COSTS * np.exp(rng.normal(0, 0.5, (n, 7)))
    alpha, k = rng.uniform(0, 1, n), rng.integers(1, 9, n).astype(float)
    loops = [
        (equation3(q).loop(OUTPUT, a, int(j)), equation3(q).loop(OUTPUT, 0.0, 0))
        for q, a, j in zip(p, alpha, k, strict=True)
    ]
    load = rng.choice([0.01, 0.5, 0.9, 0.99], n)
    rate = load * np.array([min(fast.capacity, slow.capacity) for fast, slow in loops])
    fast_e2e, slow_e2e, fast_capacity, slow_capacity, *results = published_predictions(p, rate, k, alpha)
    assert all(set(names(result, n)) == {"successful"} for result in results)
    for i, (fast, slow) in enumerate(loops):
        assert_close(fast_e2e[i], fast.latency(rate[i]), rtol=1e-12)  # Eq 1 with the coefficients of Eq 3
        assert_close(slow_e2e[i], slow.latency(rate[i]), rtol=1e-12)
        assert_close([fast_capacity[i], slow_capacity[i]], [fast.capacity, slow.capacity], rtol=1e-13)
        ratios = fast.c1 / slow.c1, fast.c2 / slow.c2
        assert_close(slow_e2e[i] / fast_e2e[i], published_speedup(*ratios, rate[i] * slow.c2), rtol=1e-11)


compare = jax.jit(
    lambda p, rate, k, alpha: published_model(p).compare(
        Workload(PROMPT, OUTPUT, arrival_rate=rate), speculation(k, alpha)
    )
)


@pytest.mark.parametrize(("k", "alpha"), [(3.0, 0.6), (5.0, 0.7), (2.0, 0.5)])
def test_breakeven_is_the_published_one(k, alpha):
    fast, slow = equation3(COSTS).loop(OUTPUT, alpha, int(k)), equation3(COSTS).loop(OUTPUT, 0.0, 0)
    expected = published_breakeven(fast.c1 / slow.c1, fast.c2 / slow.c2)
    assert 0 < expected < 1
    comparison = compare(COSTS, 5.0, k, alpha)
    assert_close(float(comparison.breakeven_rate) * slow.c2, expected, rtol=0, atol=1e-11)
    assert_close(comparison.speedup, slow.latency(5.0) / fast.latency(5.0), rtol=1e-12)
    assert_close(comparison.speculative.tokens_per_step, geometric_tokens(alpha, int(k)), rtol=1e-13)
    assert float(comparison.plain.tokens_per_step) == 1.0


def test_breakeven_at_its_ends():
    never = compare(COSTS, 5.0, 4.0, 0.01)  # slower at every rate that both sustain
    assert np.isinf(never.breakeven_rate) and never.speedup < 1.0
    cheap = np.where(np.arange(7) == 3, 1e-5, COSTS)
    always = compare(cheap, 5.0, 4.0, 0.98)  # faster at every rate that both sustain
    assert always.speculative.capacity > always.plain.capacity
    assert np.isinf(always.breakeven_rate) and always.speedup > 1.0


def test_breakeven_where_speculation_starts_to_pay_under_load():
    """Long contexts (MagicDec, arXiv 2408.11049): slower alone, faster in a batch: a draft shares the KV reads."""
    model = ServingModel(
        RooflineStepTime(
            weight_read=6e-3, token_compute=1e-5, kv_read=6e-8, sharpness=1.0, draft=DraftCost(pass_base=3.5e-3)
        )
    )
    config = Configuration(2.0, ConstantAcceptance(0.5))

    @jax.jit
    @jax.vmap
    def compared(rate):
        comparison = model.compare(Workload(32000.0, 400.0, arrival_rate=rate), config)
        limit = jnp.minimum(comparison.speculative.capacity, comparison.plain.capacity)
        return comparison.speedup, comparison.breakeven_rate, limit

    limit = float(compared(jnp.full(40, 1e-6))[2][0])
    rates = np.linspace(0.01, 0.95, 40) * limit
    values, breakeven, _ = (np.asarray(part) for part in compared(jnp.asarray(rates)))
    assert values[0] < 1.0 < values[-1]
    at = np.flatnonzero(np.diff(np.sign(values - 1.0)))[0]
    expected = brentq(lambda rate: float(compared(jnp.full(40, rate))[0][0]) - 1.0, rates[at], rates[at + 1])
    assert_close(breakeven, expected, rtol=1e-8)


def equation4(share):
    def predict(c1, c2, rate, k, alpha):
        experts = ExpertCost(ExpertRouting.uniform(128, 8), weight_read=c1[1], token_share=share, sequence=c2[1])
        step = AffineStepTime(verify_base=c1[0], verify_sequence=c2[0], experts=experts, scale_bounded=False)
        prediction = ServingModel(step, **PUBLISHED).predict(
            Workload(1.0, OUTPUT, arrival_rate=rate), speculation(k, alpha)
        )
        return prediction.e2e_latency, prediction.residual, prediction.result

    return jax.jit(jax.vmap(predict))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_equation_4(share):
    """T = B with token_share 0 (no speculation), B*(k+1) with token_share 1 (verification)."""
    rng = np.random.default_rng(1)
    n = 100
    c1, c2 = 10 ** rng.uniform(-3, -2, (n, 2)), 10 ** rng.uniform(-5, -3, (n, 2))
    k, alpha = rng.integers(1, 9, n).astype(float), rng.uniform(0, 1, n)
    steps = OUTPUT / np.array([geometric_tokens(a, int(j)) for a, j in zip(alpha, k, strict=True)])
    rate = rng.choice([0.01, 0.3, 0.8], n) / (steps * c2.sum(axis=1))
    latency, residual, result = equation4(share)(c1, c2, rate, k, alpha)
    outcomes = names(result, n)
    assert set(outcomes) <= {"successful", "metastable"}
    assert np.asarray(residual).max() < 1e-14
    for i in range(n):
        rest = (rate[i], steps[i], c1[i], c2[i], 1 + share * k[i], 8 / 128)
        grid = np.geomspace(rate[i] * steps[i] * c1[i, 0], 1e8, 20_001)
        first = np.argmax(published_equation4_gap(grid, *rest) >= 0)
        low, high = grid[max(first - 1, 0)], grid[first]
        batch = low if low == high else brentq(published_equation4_gap, low, high, args=rest, xtol=1e-15, rtol=1e-15)
        assert_close(latency[i], batch / rate[i], rtol=1e-12)


# --- identities of every prediction --------------------------------------------------------------------------------

BASE = ServingModel(
    RooflineStepTime(
        weight_read=6e-3,
        token_compute=5e-5,
        kv_read=4e-8,
        inefficiency=0.05,
        sharpness=3.0,
        step_overhead=1e-3,
        sequence_overhead=2e-5,
        prefill_token=2e-5,
        draft=DraftCost(1e-3, 1e-5, 2e-9, 5e-4, 1e-5, 1e-6),
        experts=ExpertCost(ExpertRouting.uniform(32, 4, 2), weight_read=5e-3, token_share=0.6),
    ),
    request_overhead=5e-3,
    prefill_interference=0.9,
    first_token_steps=1.2,
    closed_loop_sync=0.8,
    sync_spread=1.5,
)
PATHS = list(parameter_infos(BASE))
VALUES = np.array([float(value) for value in get_parameters(BASE).values()])
LOAD_NAMES = (
    "prompt_length",
    "output_length",
    "load",
    "acceptance",
    "draft_length",
    "cap",
    "arrival_scv",
    "n_requests",
)
COLUMN = {name: len(PATHS) + i for i, name in enumerate(LOAD_NAMES)}
NO_CAP, ENDLESS = 1e15, 1e30
LOADS = np.array([300.0, 80.0, 4.0, 0.75, 3.4, NO_CAP, 1.0, ENDLESS])
METRICS = ("ttft", "itl", "tpot", "e2e_latency", "waiting_time", "throughput", "effective_batch_size", "batch_seen")
METRICS += ("utilization", "capacity", "overload", "residual", "tokens_per_step", "steps_per_request")


def predict(is_open, z):
    """Prediction at z = log(parameters, loads); the open loop is capped by its KV cache, the closed one by batch."""
    values = jnp.exp(z)
    model = set_parameters(BASE, dict(zip(PATHS, values, strict=False)))
    prompt, output, load, acceptance, k, cap, scv, n_requests = values[len(PATHS) :]
    loop = {"arrival_rate": load, "arrival_scv": scv, "n_requests": n_requests} if is_open else {"concurrency": load}
    caps = {"kv_capacity_tokens": cap * (prompt + output / 2)} if is_open else {"max_batch_size": cap}
    config = Configuration(draft_length=k, acceptance=ConstantAcceptance(acceptance), **caps)
    return model.predict(Workload(prompt, output, **loop), config)


PREDICT = {is_open: jax.jit(jax.vmap(lambda z, is_open=is_open: predict(is_open, z))) for is_open in (True, False)}
CENTER = np.log(np.concatenate([VALUES, LOADS]))
KINDS = {
    "open": (True, {}),
    "constant arrivals": (True, {"arrival_scv": 1e-30}),
    "capped": (True, {"cap": 24.0}),
    "finite": (True, {"n_requests": 100.0}),
    "closed": (False, {}),
    "closed capped": (False, {"cap": 24.0}),
}


def random_points(fixed, n=300):
    rng = np.random.default_rng(7)
    z = CENTER + rng.normal(0, 0.4, (n, CENTER.size)) * (np.arange(CENTER.size) < COLUMN["cap"])
    z[:, COLUMN["load"]] = np.log(rng.uniform(1, 60, n))
    z[:, COLUMN["acceptance"]] = np.log(rng.uniform(0.05, 1, n))
    z[:, COLUMN["draft_length"]] = np.log(rng.uniform(0.5, 10, n))
    z[:, PATHS.index("step_time.sharpness")] = np.log(rng.uniform(1, 12, n))
    for name, value in fixed.items():
        z[:, COLUMN[name]] = np.log(value)
    return z


@pytest.mark.parametrize("kind", KINDS)
def test_identities(kind):
    is_open, fixed = KINDS[kind]
    z = random_points(fixed)
    prediction = PREDICT[is_open](z)
    got = {name: np.asarray(getattr(prediction, name)) for name in METRICS}
    load, output = np.exp(z[:, COLUMN["load"]]), np.exp(z[:, COLUMN["output_length"]])
    cap = fixed.get("cap", np.inf)
    assert all(np.all(np.isfinite(value)) for value in got.values())
    assert all(np.all(value >= 0) for value in got.values())
    split = prediction.decomposition
    assert set(split) == set(STAGES)
    total = sum(np.asarray(split[stage].load_independent) + np.asarray(split[stage].load_dependent) for stage in STAGES)
    assert_close(total, got["e2e_latency"], rtol=1e-9)
    assert_close(got["ttft"] + got["tpot"] * (output - 1), got["e2e_latency"], rtol=1e-12)
    assert_close(got["itl"] * got["steps_per_request"], got["tpot"] * (output - 1), rtol=1e-12)
    assert np.all(got["ttft"] >= got["waiting_time"])
    assert got["residual"].max() < 1e-13
    outcomes = np.array(names(prediction.result, len(z)))
    batch, seen = got["effective_batch_size"], got["batch_seen"]
    assert np.all(batch <= cap * (1 + 1e-14))
    assert np.all(seen <= cap * (1 + 1e-14))
    if not is_open:
        assert set(outcomes) == {"successful"}
        assert_close(got["throughput"] * got["e2e_latency"], load, rtol=1e-12)  # Little's law, waiting included
        assert_close(batch, np.minimum(load, cap), rtol=1e-14)
        assert np.all((got["waiting_time"] > 1e-12) == (load > cap))
        assert kind == "closed" or 20 < np.sum(load > cap) < 280
        return
    healthy = outcomes == "successful"
    assert set(outcomes) == ({"successful"} if kind == "finite" else {"successful", "saturated"})
    if kind == "finite":  # its throughput is what a benchmark prints, drain included
        assert np.all(got["throughput"] < np.minimum(load, got["capacity"] * (1 + 1e-12)))
        assert np.any(load > got["capacity"]) and np.all(batch < 100)
        healthy = load < 0.999 * got["capacity"]
    else:
        assert_close(got["throughput"][healthy], load[healthy], rtol=1e-14)
    served = got["e2e_latency"] - got["waiting_time"]
    assert_close(got["throughput"] * served, batch, rtol=1e-12 if kind != "capped" else 1e-11)
    assert np.all((got["waiting_time"] > 0) == (kind == "capped"))
    assert np.all((load > 0.999 * got["capacity"]) == ~healthy)
    assert np.all((got["overload"] > 0) == (~healthy & (kind != "finite")))
    if kind == "open":
        assert_close(seen, batch + 1, rtol=1e-12)
    if kind == "constant arrivals":
        assert_close(seen, np.maximum(1, batch), rtol=1e-12)
        assert np.any(seen == 1)
        assert np.any(seen > 1)


def test_the_decomposition_is_by_stage():
    z = random_points({}, 300)
    alone = PREDICT[True](z + np.where(np.arange(z.shape[1]) == COLUMN["load"], -30.0, 0.0))  # no load at all
    split = PREDICT[True](z).decomposition
    for stage in STAGES:
        assert_close(split[stage].load_independent, alone.decomposition[stage].load_independent, rtol=1e-13)
        assert_close(alone.decomposition[stage].load_dependent, 0.0, rtol=0, atol=1e-9)
        assert np.all(np.asarray(split[stage].load_dependent) >= -1e-15)
    assert_close(sum(split[stage].load_independent for stage in STAGES), alone.e2e_latency, rtol=1e-9)


@pytest.mark.parametrize(("kind", "metric"), [("open", "e2e_latency"), ("closed capped", "ttft")])
def test_gradients_equal_finite_differences(kind, metric):
    is_open, fixed = KINDS[kind]

    def log_metric(z):
        return jnp.log(getattr(predict(is_open, z), metric))

    z = random_points(fixed)[3]
    z[COLUMN["load"]] = np.log(4.0 if is_open else 40.0)  # above the cap
    z[COLUMN["draft_length"]] = np.log(3.4)
    gradient = np.asarray(jax.jit(jax.grad(log_metric))(z))
    assert np.all(np.isfinite(gradient))
    rows = finite_difference(lambda z: np.log(np.asarray(getattr(PREDICT[is_open](z), metric))), z, 1e-3)
    assert_close(gradient, rows, rtol=1e-7, atol=1e-9)
    # every parameter matters, those of the closed loop's first token only there
    still = {path for path, slope in zip(PATHS, gradient, strict=False) if abs(slope) < 1e-12}
    assert still == ({"closed_loop_sync", "sync_spread"} if is_open else set())


# --- an independent server, and single cases -----------------------------------------------------------------------


def test_open_loop_against_a_server_in_plain_floats():
    reference = ReferenceServer(6e-3, 5e-5, 4e-8, 3.0, 1e-3, 1e-3, 2e-5, 5e-3, 1.3)
    model = ServingModel(
        RooflineStepTime(
            weight_read=reference.weight_read,
            token_compute=reference.token_compute,
            kv_read=reference.kv_read,
            sharpness=reference.sharpness,
            step_overhead=reference.step_overhead,
            prefill_token=reference.prefill_token,
            draft=DraftCost(pass_base=reference.pass_base),
        ),
        request_overhead=reference.request_overhead,
        first_token_steps=reference.first_token_steps,
    )
    rates = np.array([0.1, 5.0, 20.0, 40.0])
    predict = jax.vmap(lambda rate: model.predict(Workload(PROMPT, OUTPUT, arrival_rate=rate), speculation(4.0, 0.7)))
    prediction = jax.jit(predict)(rates)
    assert set(names(prediction.result, 4)) == {"successful"}
    args = (PROMPT, OUTPUT, 0.7, 4)
    for i, rate in enumerate(rates):
        batch = brentq(lambda b, rate=rate: b - rate * reference.residence(b, *args), 0.0, 1e5, xtol=1e-13, rtol=1e-15)
        step = reference.step(batch + 1, PROMPT, OUTPUT, 4)
        assert_close(prediction.effective_batch_size[i], batch, rtol=1e-11)
        assert_close(prediction.e2e_latency[i], batch / rate, rtol=1e-11)
        p, join, others = 2e-5 * PROMPT, 1.3 * batch / (1 + batch) * step, 2e-5 * PROMPT * batch
        load = others * rate / batch
        before = join + p * (0.5 + load) / (1 + load)  # the others' prefill falls evenly on a request's own time
        early = others * before / (join + p + reference.steps(OUTPUT, 0.7, 4) * step)
        ttft = 5e-3 + p + join + early
        assert_close(prediction.ttft[i], ttft, rtol=1e-11)
        decode = step + (others - early) / reference.steps(OUTPUT, 0.7, 4)
        assert_close(prediction.itl[i], decode, rtol=1e-11)


def test_closed_loop_by_hand():
    step = AffineStepTime(verify_base=0.01, verify_sequence=1e-3, prefill_token=1e-4)
    model = ServingModel(step, closed_loop_sync=1.0, sync_spread=1.5)
    prediction = model.predict(Workload(100, 11, concurrency=5), Configuration())
    p, shared, step_time, steps = 0.01, 4 / 5, 0.015, 10
    sync = 1 / (1 + 1e-6 / 1.5)  # equal lengths, no speculation: no spread but the guard of its square root
    e2e = 5 * p + (steps + shared) * step_time
    load = 4 * p / e2e
    evenly = (shared * step_time + p * (0.5 + load) / (1 + load)) / (p + (steps + shared) * step_time)
    early = (sync / 2 + (1 - sync) * evenly) * 4 * p
    assert_close(prediction.ttft, p + shared * step_time + early, rtol=1e-12)
    assert_close(prediction.e2e_latency, e2e, rtol=1e-13)
    assert_close(prediction.tpot, (10 * step_time + 4 * p - early) / 10, rtol=1e-12)


@pytest.mark.parametrize("loop", [{"arrival_rate": 5.0}, {"concurrency": 8.0}])
def test_one_token_requests_end_with_their_first(loop):
    predict = jax.jit(lambda output: BASE.predict(Workload(300.0, output, **loop), speculation(3.0, 0.7)))
    one = predict(1.0)
    assert outcome_name(one.result) == "successful"
    assert_close(one.ttft, one.e2e_latency, rtol=1e-14)
    assert float(one.itl) == float(one.tpot) == float(one.steps_per_request) == 0.0
    assert 0 < float(one.e2e_latency) < float(predict(2.0).e2e_latency)


def test_drafter_and_verifier_scale():
    load = Workload(PROMPT, OUTPUT, concurrency=6.0)
    acceptance = ConstantAcceptance(0.7)

    @jax.jit
    def draft_and_verify(drafter, verifier):
        config = Configuration(draft_length=3.0, acceptance=acceptance, drafter_scale=drafter, verifier_scale=verifier)
        split = BASE.predict(load, config).decomposition
        parts = BASE.step_parts(load, config, 6.0)
        return jnp.stack([s.load_independent + s.load_dependent for s in split.values()]), jnp.stack(
            [parts.draft, parts.total]
        )

    (once, step), (thrice, step3), (double, _) = (
        draft_and_verify(1.0, 1.0),
        draft_and_verify(3.0, 1.0),
        draft_and_verify(1.0, 2.0),
    )
    draft, verify, overhead = STAGES.index("draft"), STAGES.index("verify"), STAGES.index("overhead")
    assert_close(thrice[draft], 3 * once[draft], rtol=1e-13)
    assert_close(thrice[verify], once[verify], rtol=1e-13)
    assert_close(double[draft], once[draft], rtol=1e-13)
    assert float(once[verify]) < float(double[verify]) < 2 * float(once[verify])  # experts and KV reads are not scaled
    assert_close(double[overhead], once[overhead], rtol=1e-13)
    assert_close(step3 - step, 2 * step[0], rtol=1e-12)


def test_jit_and_vmap_over_workloads():
    loads = jax.vmap(lambda rate, prompt: Workload(prompt, OUTPUT, arrival_rate=rate))(
        np.array([1.0, 4.0, 9.0]), np.array([50.0, 100.0, 500.0])
    )
    together = jax.jit(jax.vmap(BASE.predict, (0, None)))(loads, speculation(3.0, 0.7))
    one = jax.jit(lambda load, config: BASE.predict(load, config))(
        Workload(100.0, OUTPUT, arrival_rate=4.0), speculation(3.0, 0.7)
    )
    assert np.all(np.asarray(together.result == RESULTS.successful))
    for name in METRICS:
        assert_close(getattr(together, name)[1], getattr(one, name), rtol=1e-13, atol=1e-15)


def test_single_precision_finds_the_same_equilibrium():
    """Without x64 the tolerance follows the precision: successful, and within 1e-4 of double precision."""
    model = ServingModel(
        RooflineStepTime(weight_read=6e-3, token_compute=4e-5, kv_read=6e-8, prefill_token=2e-5),
    )

    @jax.jit
    @jax.vmap
    def of(rate):
        config = Configuration(4.0, ConstantAcceptance(0.8), max_batch_size=128.0)
        return model.predict(Workload(500.0, 200.0, arrival_rate=rate), config)

    def predict():
        return of(jnp.asarray([0.5, 5.0, 10.0]))

    double = predict()
    with jax.enable_x64(False):
        single = predict()
        assert single.e2e_latency.dtype == jnp.float32
        outcomes = names(single.result, 3)
        latencies = np.asarray(single.e2e_latency, dtype=float)
    assert outcomes == names(double.result, 3) == ["successful"] * 3
    assert_close(latencies, double.e2e_latency, rtol=1e-4)


def latency_of_a_run(rate, cap):
    model = ServingModel(RooflineStepTime(weight_read=6e-3, token_compute=4e-5, kv_read=6e-8, prefill_token=2e-5))
    load = Workload(500.0, 200.0, arrival_rate=rate, n_requests=300.0)
    return model.predict(load, Configuration(4.0, ConstantAcceptance(0.8), max_batch_size=cap)).e2e_latency


BACKWARDS, FORWARDS = jax.jit(jax.grad(latency_of_a_run)), jax.jit(jax.jacfwd(latency_of_a_run))


@pytest.mark.slow
@pytest.mark.parametrize("cap", [128.0, 1024.0])
def test_single_precision_has_gradients_where_nobody_waits(cap):
    """A run of fewer requests than places has no wait, whose derivative must not be 0*inf."""
    expected = float(BACKWARDS(5.0, cap))
    with jax.enable_x64(False):
        assert_close(float(BACKWARDS(5.0, cap)), expected, rtol=1e-2)
        assert_close(float(FORWARDS(5.0, cap)), expected, rtol=1e-2)


@pytest.mark.slow
def test_break_even_knows_what_the_prefix_cache_answers():
    step_time = RooflineStepTime(
        weight_read=6e-3, token_compute=4e-4, kv_read=6e-8, prefill_token=2e-4, draft=DraftCost(pass_base=5e-4)
    )
    model, config = ServingModel(step_time), Configuration(4.0, ConstantAcceptance(0.6))
    rates = []
    for hits in (0.0, 0.9):
        rate = float(model.breakeven_rate(Workload(64.0, 64.0, arrival_rate=1.0, prefix_hit_rate=hits), config))
        there = Workload(64.0, 64.0, arrival_rate=rate, prefix_hit_rate=hits)
        assert_close(model.compare(there, config).speedup, 1.0, rtol=1e-9)
        rates.append(rate)
    assert rates[1] > 1.1 * rates[0]
