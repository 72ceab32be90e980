"""Loads and configurations: what is refused, the caps, the batch a request sees, and finite runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from oracles import fluid_batch_seen

from diffspec.acceptance import ConstantAcceptance
from diffspec.configuration import Configuration, batch_cap
from diffspec.finite_runs import finite_run_factor
from diffspec.results import InputError, outcome_name
from diffspec.serving import ServingModel
from diffspec.step_time import AffineStepTime
from diffspec.workload import Workload, as_numbers, check_range

MODEL = ServingModel(AffineStepTime(verify_base=0.02, verify_query=1e-3, prefill_token=1e-4))


def test_open_and_closed():
    assert Workload(64, 64, arrival_rate=1.0).is_open
    assert not Workload(64, 64, concurrency=4).is_open


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arrival_rate": None}, "neither"),
        ({"concurrency": 4}, "both"),
        ({"prompt_length": 0}, "prompt_length: got 0"),
        ({"prompt_length": float("nan")}, "prompt_length"),
        ({"output_length": 0.5}, "output_length"),
        ({"arrival_rate": 0.0}, r"arrival_rate: got 0.0; allowed: \(0, 1e\+09\] req/s"),
        ({"arrival_rate": -1.0}, "arrival_rate"),
        ({"arrival_rate": None, "concurrency": 0.5}, "concurrency"),
        ({"arrival_scv": -0.1}, "arrival_scv"),
        ({"output_scv": -0.1}, "output_scv"),
        ({"n_requests": 0}, "n_requests"),
    ],
)
def test_a_workload_out_of_range_is_refused(change, words):
    good = {"prompt_length": 64, "output_length": 64, "arrival_rate": 2.0}
    Workload(**good)
    with pytest.raises(InputError, match=words):
        Workload(**(good | change))


@pytest.mark.parametrize(
    "change",
    [
        {"draft_length": 33},
        {"draft_length": -1},
        {"draft_length": 3},  # no acceptance
        {"max_batch_size": 0.5},
        {"draft_probability": 1.1},
        {"drafter_scale": 0.0},
        {"verifier_scale": -1.0},
        {"kv_capacity_tokens": -5.0},
        {"draft_length": jnp.asarray(-3.0), "acceptance": ConstantAcceptance(0.8)},
    ],
)
def test_a_configuration_out_of_range_is_refused(change):
    Configuration()
    with pytest.raises(InputError):
        Configuration(**change)


def test_ends_of_a_range_and_traced_values():
    check_range("x", 1, 0, 1, low_open=True, unit="")
    check_range("x", 0, 0, 1, low_open=False, unit="")
    with pytest.raises(InputError, match=r"x: got 0; allowed: \(0, 1\] tok; a hint"):
        check_range("x", 0, 0, 1, low_open=True, unit="tok", advice="a hint")
    for wrong in (jnp.asarray(1.5), np.float32(1.5), np.asarray(np.nan), "0.5"):
        with pytest.raises(InputError, match=r"x: got .*; allowed: "):
            check_range("x", wrong, 0, 1, low_open=False, unit="")
    check_range("x", None, 0, 1, low_open=False, unit="")
    check_range("x", np.asarray([0.5, 2.0]), 0, 1, low_open=False, unit="")  # many numbers: a batch
    assert as_numbers("x", [1, "2"]).tolist() == [1.0, 2.0]
    with pytest.raises(InputError, match=r"x: got \['a'\]; allowed: numbers"):
        as_numbers("x", ["a"])
    rates = jax.vmap(lambda rate: Workload(64.0, 64.0, arrival_rate=rate).arrival_rate)(jnp.array([-1.0, 1.0]))
    assert_close(rates, [-1.0, 1.0], rtol=0)  # a traced number cannot be judged


def test_plain_keeps_the_server():
    config = Configuration(4.0, ConstantAcceptance(0.7), max_batch_size=8, kv_capacity_tokens=1e4, verifier_scale=2.0)
    plain = config.plain()
    assert (plain.draft_length, plain.acceptance) == (0.0, None)
    assert (plain.max_batch_size, plain.kv_capacity_tokens, plain.verifier_scale) == (8, 1e4, 2.0)


def test_the_smaller_cap_holds():
    load = Workload(100.0, 50.0, arrival_rate=1.0)  # a request holds 125 tokens on average
    assert batch_cap(load, Configuration()) is None
    assert float(batch_cap(load, Configuration(max_batch_size=8))) == 8
    assert float(batch_cap(load, Configuration(kv_capacity_tokens=1250.0))) == 10
    assert float(batch_cap(load, Configuration(max_batch_size=8, kv_capacity_tokens=1250.0))) == 8
    assert float(batch_cap(load, Configuration(max_batch_size=32, kv_capacity_tokens=1250.0))) == 10
    assert float(batch_cap(load, Configuration(kv_capacity_tokens=60.0))) == 1  # one request always fits


@pytest.mark.parametrize("share", [0.01, 0.3, 0.999, 1.0, 1.001, 2.0, 30.0])
def test_finite_run_factor_is_the_fluid_integral(share):
    rate, n_requests = 3.0, 50.0
    residence = share * n_requests / rate
    seen = fluid_batch_seen(rate, residence, n_requests)
    assert_close(float(finite_run_factor(share)) * rate * residence, seen, rtol=1e-8)


def test_finite_run_factor_is_smooth_and_the_seen_batch_grows():
    assert float(finite_run_factor(0.0)) == 1.0
    slope = jax.vmap(jax.grad(finite_run_factor))(np.array([1 - 1e-9, 1 + 1e-9]))
    assert_close(slope, -1 / 3, rtol=1e-7)
    x = np.geomspace(1e-3, 1e3, 2000)
    assert np.all(np.diff(x * np.asarray(finite_run_factor(x))) > 0)  # which the solver of the equilibrium needs


@jax.jit
@jax.vmap
def predict(rate, scv, n_requests):
    load = Workload(100.0, 51.0, arrival_rate=rate, arrival_scv=scv, n_requests=n_requests)
    return MODEL.predict(load, Configuration())


def test_finite_runs_between_an_empty_server_and_the_steady_state():
    runs = np.array([1.0, 10.0, 100.0, 1e4, 1e6, 1e12])
    latency = np.asarray(predict(np.full(6, 10.0), np.ones(6), runs).e2e_latency)
    steady = jax.jit(lambda: MODEL.predict(Workload(100.0, 51.0, arrival_rate=10.0), Configuration()))()
    assert outcome_name(steady.result) == "successful"
    assert np.all(np.diff(latency) > 0)
    assert_close(latency[-1], steady.e2e_latency, rtol=1e-9)
    # a long run differs by the ramps: (B/n)*B/3 less seen, times the slope of latency in the batch
    first_order = (steady.e2e_latency - latency[4]) / (steady.e2e_latency - latency[3])
    assert_close(first_order, 1e-2, rtol=0.02)
    overloaded = predict(np.array([1e3]), np.ones(1), np.array([100.0]))
    assert outcome_name(overloaded.result) == "successful"  # a run always ends
    assert float(overloaded.batch_seen[0]) < 101


def test_constant_arrivals_see_at_least_themselves():
    rates = np.array([0.1, 1.0, 5.0, 15.0])
    endless = np.full(4, 1e12)
    constant, poisson = (predict(rates, np.full(4, scv), endless) for scv in (0.0, 1.0))
    assert_close(constant.batch_seen, np.maximum(1, constant.effective_batch_size), rtol=1e-9)
    assert_close(poisson.batch_seen, np.asarray(poisson.effective_batch_size) + 1, rtol=1e-9)
    assert np.all(np.asarray(constant.e2e_latency) <= np.asarray(poisson.e2e_latency))
    alone = 100 * 1e-4 + 50 * 0.021  # seen alone: own prefill and 50 steps
    assert_close(constant.e2e_latency[0], alone, rtol=1e-13)
