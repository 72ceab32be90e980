"""Finite benchmark runs and closed loops of the model, against the simulator: e2e means."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from helpers import AS_USERS_COMPILE, predict
from scipy.integrate import solve_ivp

from diffspec.acceptance import ConstantAcceptance
from diffspec.configuration import Configuration
from diffspec.finite_runs import finite_run
from diffspec.serving import ServingModel
from diffspec.simulating import Engine, simulate
from diffspec.step_time import AffineStepTime, DraftCost, RooflineStepTime
from diffspec.workload import Workload

SLOW = RooflineStepTime(weight_read=0.05, token_compute=1e-3, kv_read=1e-6, prefill_token=1e-4)
FAST = RooflineStepTime(
    weight_read=6e-3, token_compute=4e-5, kv_read=6e-8, prefill_token=2e-5, draft=DraftCost(pass_base=5e-4)
)


def run_of(work, rate, n, scv=0.0, prefill=0.0, cap=jnp.inf):
    return finite_run(
        work,
        prefill=prefill,
        arrival_rate=rate,
        n_requests=n,
        output_scv=scv,
        max_batch_size=cap,
        steady_residence=1.0,
        capacity=1e-3,
    )


@pytest.mark.parametrize(("scv", "expected"), [(0.0, 1.0 + 0.5 * 20), (1.0, 1.0 + 0.5 * 20 / 2), (0.5, None)])
def test_requests_that_come_all_at_once(scv, expected):
    """n(V) = 20 for one unit, or 20*exp(-V): the mean of 1 + n/2 over them."""
    found = float(run_of(lambda n, age: 1.0 + 0.5 * n, 1e9, 20.0, scv).residence_time)
    if expected is None:  # half of either: n = 10 + 10*exp(-V) for one unit, 10*exp(-V) after
        kept = 1.0 - math.exp(-1.0)
        square = 100 * 1 + 2 * 100 * kept + 100 * 0.5
        expected = (20 + 0.5 * square) / 20
    assert found == pytest.approx(expected, rel=3e-3)


@pytest.mark.parametrize(("rate", "n", "prefill"), [(2.0, 40.0, 0.0), (8.0, 60.0, 0.02), (1.0, 9.0, 0.1)])
def test_exponential_lengths_against_an_independent_integrator(rate, n, prefill):
    """dn/dt = rate*[t < n/rate] - n/w(n) beside prefills: scipy's adaptive integrator in real time."""

    def slope(t, state):
        arriving = rate if t < n / rate else 0.0
        leaving = state[0] / (1.0 + 0.3 * state[0]) * (1.0 - arriving * prefill)
        return [arriving - leaving, state[0]]

    area = solve_ivp(slope, (0.0, n / rate), [0.0, 0.0], rtol=1e-9, atol=1e-9).y[:, -1]
    area = solve_ivp(slope, (n / rate, n / rate + 400.0), area, rtol=1e-9, atol=1e-9).y[1, -1]
    found = run_of(lambda batch, age: 1.0 + 0.3 * batch, rate, n, 1.0, prefill).residence_time
    assert float(found) == pytest.approx(area / n, rel=0.01)


def test_the_contexts_of_a_run_are_those_of_its_ages():
    """All at once: equal requests are half through on average, exponential ones a whole mean length at the end."""
    found = run_of(lambda n, age: 1.0 + age, 1e9, 20.0).residence_time
    assert float(found) == pytest.approx(1.5, rel=0.01)
    found = run_of(lambda n, age: 1.0 + age, 1e9, 20.0, 1.0).residence_time
    assert float(found) == pytest.approx(2.0, rel=0.03)  # int exp(-V)*(1 + V) dV


# Where rounding decides whether a run has just ended its slopes are off: seen with the compiler options of conftest.py.
@partial(jax.jit, compiler_options=AS_USERS_COMPILE)
@jax.value_and_grad
def log_latency(log_rate, n):
    load = Workload(300.0, 241.0, arrival_rate=jnp.exp(log_rate), n_requests=n, output_scv=0.5)
    return jnp.log(ServingModel(SLOW, first_token_steps=1.5).predict(load, Configuration()).e2e_latency)


@pytest.mark.parametrize(("rate", "n"), [(3.0, 40.0), (0.4, 200.0), (30.0, 100.0), (2.0, 1e12)])
def test_a_run_has_derivatives(rate, n):
    slope = float(log_latency(math.log(rate), n)[1])
    step = 1e-5
    ends = [float(log_latency(math.log(rate) + s, n)[0]) for s in (-step, step)]
    assert slope == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-3, abs=1e-6) and slope >= 0


@pytest.mark.parametrize("output", [1.0, 2.0])
def test_runs_of_single_tokens_have_numbers(output):
    model = ServingModel(SLOW, first_token_steps=1.5, waiting_states=0)

    @jax.jit
    @jax.vmap
    def latency(rate, n, hits):
        load = Workload(300.0, output, arrival_rate=rate, n_requests=n, prefix_hit_rate=hits)
        return model.predict(load, Configuration(max_batch_size=16.0)).e2e_latency

    grid = jnp.stack(jnp.meshgrid(jnp.array([1e-6, 1.0, 1e4]), jnp.array([1.0, 2.0, 300.0]), jnp.array([0.0, 0.5])))
    values = latency(*grid.reshape(3, -1))
    assert jnp.all(jnp.isfinite(values) & (values > 0))


@pytest.mark.parametrize("rate", [0.1, 3.0, 1e4])
def test_a_run_of_one_request_is_alone(rate):
    model = ServingModel(SLOW, first_token_steps=1.5)
    alone = predict(model, Workload(300.0, 241.0, concurrency=1.0), Configuration())
    load = Workload(300.0, 241.0, arrival_rate=rate, n_requests=1.0)
    for config in (Configuration(), Configuration(max_batch_size=16.0)):
        run = predict(model, load, config)
        assert float(run.e2e_latency) == pytest.approx(float(alone.e2e_latency), rel=0.01)
        assert float(run.batch_seen) == pytest.approx(1.0, abs=0.02)


def test_an_endless_run_is_the_steady_state():
    model = ServingModel(SLOW, first_token_steps=1.5)
    for rate in (0.1, 1.0, 3.0):
        load = {"prompt_length": 300.0, "output_length": 241.0, "arrival_rate": rate, "output_scv": 0.6}
        endless = predict(model, Workload(**load, n_requests=1e12), Configuration())
        steady = predict(model, Workload(**load), Configuration())
        assert float(endless.e2e_latency) == pytest.approx(float(steady.e2e_latency), rel=1e-6)
        assert float(endless.ttft) == pytest.approx(float(steady.ttft), rel=1e-6)


@pytest.mark.parametrize(
    ("rate", "n", "law"),
    [(1.0, 300, "fixed"), (2.0, 300, "fixed"), (4.0, 300, "fixed"), (4.0, 300, "geometric"), (8.0, 100, "geometric")],
)
def test_a_finite_run_is_faster_than_the_steady_state(rate, n, law):
    """A run starts empty and drains, overloaded or not (capacity 3.4 req/s): the fluid model holds within 3 %, 5 % for
    geometric lengths, beside the simulator's own half width."""
    load = {"prompt_length": 300.0, "output_length": 241.0, "arrival_rate": rate}
    found = simulate(SLOW, Workload(**load), Engine(), n_requests=n, replications=48, finite=True, output_law=law)
    measured = found.mean("e2e")
    model = ServingModel(SLOW, first_token_steps=1.5)
    load["output_scv"] = 1.0 if law == "geometric" else 0.0
    finite = predict(model, Workload(**load, n_requests=float(n)), Configuration())
    steady = predict(model, Workload(**load), Configuration())
    tolerance = (0.05 if law == "geometric" else 0.03) + measured.relative
    assert measured.relative < 0.04
    assert float(finite.e2e_latency) == pytest.approx(measured.value, rel=tolerance)
    assert float(steady.e2e_latency) > (1.1 if rate * measured.value / n > 0.3 else 1.0) * measured.value
    assert float(finite.utilization) == pytest.approx(rate / float(steady.capacity))


@pytest.mark.parametrize("law", ["fixed", "geometric"])
@pytest.mark.parametrize(("use", "n"), [(1.0, 50), (1.0, 300), (1.3, 300), (2.5, 50), (2.5, 300)])
def test_a_run_at_its_cap_and_overloaded(use, n, law):
    """e2e within 6 %; 10 % for geometric lengths at capacity."""
    config = Configuration(max_batch_size=16.0)
    model = ServingModel(FAST, first_token_steps=1.5)
    scv = 1.0 if law == "geometric" else 0.0
    rate = use * float(predict(model, Workload(300.0, 120.0, arrival_rate=1.0, output_scv=scv), config).capacity)
    load = Workload(300.0, 120.0, arrival_rate=rate)
    found = simulate(FAST, load, Engine(max_batch_size=16), n_requests=n, replications=96, finite=True, output_law=law)
    told = predict(model, Workload(300.0, 120.0, arrival_rate=rate, output_scv=scv, n_requests=float(n)), config)
    e2e, waiting = found.mean("e2e"), found.mean("waiting")
    assert e2e.relative < 0.08
    tolerance = 0.1 if use == 1.0 and law == "geometric" else 0.06
    assert float(told.e2e_latency) == pytest.approx(e2e.value, rel=tolerance + e2e.relative)
    if use > 1.0 and n == 300:
        assert float(told.waiting_time) == pytest.approx(waiting.value, rel=0.08 + waiting.relative)


@pytest.mark.slow
@pytest.mark.parametrize(("concurrency", "k"), [(1, 0), (8, 4), (32, 0), (32, 4)])
def test_a_closed_loop_is_as_fast_as_simulated(concurrency, k):
    config = Configuration(float(k), ConstantAcceptance(0.8))
    load = Workload(300.0, 120.0, concurrency=float(concurrency))
    model = predict(ServingModel(FAST, first_token_steps=1.5), load, config)
    found = simulate(FAST, load, Engine(k, (0.8,) * k), n_requests=500, replications=4)
    assert float(model.e2e_latency) == pytest.approx(found.mean("e2e").value, rel=0.03)
    assert float(model.throughput) == pytest.approx(found.throughput.value, rel=0.03)


@pytest.mark.parametrize(("cap", "use", "n"), [(8, 0.9, 80), (16, 0.97, 80), (16, 0.97, 300)])
def test_a_short_run_near_saturation_has_not_waited_long_yet(cap, use, n):
    """Within 10 % where the stationary wait would put e2e 13 to 74 % too high."""
    config = Configuration(max_batch_size=float(cap))
    model = ServingModel(FAST, first_token_steps=1.5)
    rate = use * float(predict(model, Workload(300.0, 120.0, arrival_rate=1.0), config).capacity)
    found = simulate(
        FAST,
        Workload(300.0, 120.0, arrival_rate=rate),
        Engine(max_batch_size=cap),
        n_requests=n,
        replications=100,
        finite=True,
    )
    measured = found.mean("e2e").value
    finite = predict(model, Workload(300.0, 120.0, arrival_rate=rate, n_requests=float(n)), config)
    steady = predict(model, Workload(300.0, 120.0, arrival_rate=rate), config)
    assert float(finite.e2e_latency) == pytest.approx(measured, rel=0.1)
    assert float(steady.e2e_latency) > 1.1 * measured


@pytest.mark.parametrize(("budget", "rate", "n"), [(512, 3.0, 40), (512, 5.8, 40), (512, 20.0, 40), (512, 20.0, 200)])
def test_a_run_under_a_token_budget_ends(budget, rate, n):
    """Up to three times the capacity: e2e within 15 % of the simulator; an endless run would wait for minutes."""
    model = ServingModel(AffineStepTime(verify_base=0.01, verify_query=2e-4, prefill_token=2e-5))
    load = {"prompt_length": 4000.0, "output_length": 50.0, "arrival_rate": rate}
    told = predict(model, Workload(**load, n_requests=float(n)), Configuration(max_batched_tokens=float(budget)))
    engine = Engine(max_batched_tokens=budget)
    found = simulate(model.step_time, Workload(**load), engine, n_requests=n, replications=16, finite=True)
    assert float(told.e2e_latency) == pytest.approx(found.mean("e2e").value, rel=0.15)
