"""Finite benchmark runs and closed loops of the model, against the simulator: e2e means."""

import pytest

from diffspec.acceptance import ConstantAcceptance
from diffspec.configuration import Configuration
from diffspec.serving import ServingModel
from diffspec.simulating import Engine, simulate
from diffspec.step_time import DraftCost, RooflineStepTime
from diffspec.workload import Workload

SLOW = RooflineStepTime(weight_read=0.05, token_compute=1e-3, kv_read=1e-6, prefill_token=1e-4)
FAST = RooflineStepTime(
    weight_read=6e-3, token_compute=4e-5, kv_read=6e-8, prefill_token=2e-5, draft=DraftCost(pass_base=5e-4)
)


@pytest.mark.parametrize(("rate", "n"), [(2.0, 300), (2.0, 100), (1.0, 300)])
def test_a_finite_run_is_faster_than_the_steady_state(rate, n):
    """A run starts empty and drains: the correction holds within 2 %, where the steady state misses by up to 12 %."""
    load = {"prompt_length": 300.0, "output_length": 241.0, "arrival_rate": rate}
    found = simulate(SLOW, Workload(**load), Engine(), n_requests=n, replications=32, finite=True)
    measured = found.mean("e2e")
    model = ServingModel(SLOW, first_token_steps=1.5)
    finite = float(model.predict(Workload(**load, n_requests=float(n)), Configuration()).e2e_latency)
    steady = float(model.predict(Workload(**load), Configuration()).e2e_latency)
    assert measured.relative < 0.025
    assert finite == pytest.approx(measured.value, rel=0.02)
    assert finite < steady
    if rate * measured.value / n > 0.3:
        assert steady > 1.1 * measured.value


@pytest.mark.parametrize(("concurrency", "k"), [(1, 0), (8, 4), (32, 0), (32, 4)])
def test_a_closed_loop_is_as_fast_as_simulated(concurrency, k):
    config = Configuration(float(k), ConstantAcceptance(0.8))
    load = Workload(300.0, 120.0, concurrency=float(concurrency))
    model = ServingModel(FAST, first_token_steps=1.5).predict(load, config)
    found = simulate(FAST, load, Engine(k, (0.8,) * k), n_requests=500, replications=4)
    assert float(model.e2e_latency) == pytest.approx(found.mean("e2e").value, rel=0.03)
    assert float(model.throughput) == pytest.approx(found.throughput.value, rel=0.03)


@pytest.mark.parametrize(("cap", "use", "n"), [(8, 0.9, 80), (16, 0.97, 80), (16, 0.97, 300)])
def test_a_short_run_near_saturation_has_not_waited_long_yet(cap, use, n):
    """Within 10 % where the stationary wait would put e2e 13 to 74 % too high."""
    config = Configuration(max_batch_size=float(cap))
    model = ServingModel(FAST, first_token_steps=1.5)
    rate = use * float(model.predict(Workload(300.0, 120.0, arrival_rate=1.0), config).capacity)
    found = simulate(
        FAST,
        Workload(300.0, 120.0, arrival_rate=rate),
        Engine(max_batch_size=cap),
        n_requests=n,
        replications=100,
        finite=True,
    )
    measured = found.mean("e2e").value
    finite = model.predict(Workload(300.0, 120.0, arrival_rate=rate, n_requests=float(n)), config)
    steady = model.predict(Workload(300.0, 120.0, arrival_rate=rate), config)
    assert float(finite.e2e_latency) == pytest.approx(measured, rel=0.1)
    assert float(steady.e2e_latency) > 1.1 * measured
