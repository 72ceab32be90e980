"""The error of a fixed number of Newton steps, proven and measured, in float64 and float32; predictions in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from test_steady_state import HARD_LOADS, hard_residence, hard_residence_numpy, random_systems

import diffspec.steady_state as steady_state_module
from diffspec.acceptance import ConstantAcceptance
from diffspec.configuration import Configuration
from diffspec.drafters import DraftCost
from diffspec.results import RESULTS
from diffspec.serving import ServingModel
from diffspec.steady_state import solve_open_loop
from diffspec.step_time import BatchState, RooflineStepTime
from diffspec.workload import Workload

COUNT, HARDEST = 100_000, 1000
EPS, EPS32 = np.finfo(np.float64).eps, np.finfo(np.float32).eps


def solved(p):
    """What is told of each system, and the elasticity of its residence time in B there."""
    rate = p["utilization"] * p["cap"] / hard_residence(p, p["cap"])
    state = solve_open_loop(lambda n: hard_residence(p, n), rate, max_batch_size=p["cap"])
    log_batch = jnp.log(state.effective_batch_size)

    def log_time(log_batch):
        return jnp.log(hard_residence(p, jnp.minimum(jnp.exp(log_batch) + 1, p["cap"])))

    elasticity = jax.jvp(log_time, (log_batch,), (jnp.ones_like(log_batch),))[1]
    converged = state.result == RESULTS.successful
    return {
        "rate": rate,
        "batch": state.effective_batch_size,
        "time": state.residence_time,
        "residual": state.residual,
        "elasticity": elasticity,
        "converged": converged,
    }


@pytest.fixture(scope="module")
def systems():
    return random_systems(5, COUNT)


@pytest.fixture(scope="module")
def double(systems):
    return {name: np.asarray(value) for name, value in jax.jit(jax.vmap(solved))(systems).items()}


@pytest.fixture(scope="module")
def single(systems):
    with jax.enable_x64(False):
        found = jax.jit(jax.vmap(solved))({name: np.float32(value) for name, value in systems.items()})
    assert found["batch"].dtype == jnp.float32
    return {name: np.asarray(value) for name, value in found.items()}


def test_twelve_steps_reach_rounding(double):
    assert double["converged"].all()
    assert double["residual"].max() < 1e-15


def test_the_hardest_systems_agree_with_brentq_within_the_bound(systems, double):
    """|log(B/B*)| <= -log(1 - residual)/(1 - elasticity), beside the rounding of the residence time itself."""
    by_elasticity, by_residual = np.argsort(-double["elasticity"]), np.argsort(-double["residual"])
    hardest = np.unique(np.concatenate([by_elasticity[: HARDEST // 2], by_residual[: HARDEST // 2]]))
    ratios = []
    for i in hardest:
        one = {key: float(value[i]) for key, value in systems.items()}
        rate = float(double["rate"][i])

        def gap(log_x, one=one, rate=rate):
            x = np.exp(log_x)
            return 1 - rate * x * hard_residence_numpy(one, min(1 / x + 1, one["cap"]))

        ends = [-np.log(rate * hard_residence_numpy(one, n)) for n in (one["cap"], 1.0)]
        root = -brentq(gap, ends[0] - 1e-9, ends[1] + 1e-9, xtol=1e-15, rtol=1e-15)
        bound = -np.log1p(-(double["residual"][i] + 40 * EPS)) / (1.0 - double["elasticity"][i])
        ratios.append(abs(np.log(double["batch"][i]) - root) / bound)
    assert len(ratios) > 0.9 * HARDEST
    assert 1e-3 < max(ratios) < 1.0


CONVEX = 10_000


def convex_residence(p, n):
    """Prompts and whole steps of a roofline: convex in the batch."""
    step = RooflineStepTime(
        weight_read=p["weight"],
        token_compute=p["token"],
        sharpness=p["sharpness"],
        step_overhead=p["overhead"],
        sequence_overhead=p["slope"],
    )
    return p["prefill"] * n + 20 * step(BatchState(sequences=n, query_tokens=4 * n)).total


def convex_solved(p):
    """(d_0, q, residual, elasticity at the root, whether the root is at least 1 below the cap)."""
    cap = p["cap"]
    rate = p["utilization"] * cap / convex_residence(p, cap)
    state = solve_open_loop(lambda n: convex_residence(p, n), rate, max_batch_size=cap)

    def time_seen(batch):
        return convex_residence(p, jnp.minimum(batch + 1, cap))

    def intercept(batch):
        time, slope = jax.jvp(time_seen, (batch,), (jnp.ones_like(batch),))
        return time - batch * slope, batch * slope / time

    first, alone = rate * time_seen(jnp.zeros(())), time_seen(jnp.zeros(()))
    batch = state.effective_batch_size
    at_root, elasticity = intercept(batch)
    inner = batch <= cap - 1
    return time_seen(first) / alone - 1, intercept(first)[0] / at_root, state.residual, elasticity, inner


def test_the_bound_of_convex_forms_holds_at_every_number_of_steps(monkeypatch):
    p = random_systems(11, CONVEX)
    start, ratio, _, elasticity, inner = (np.asarray(x) for x in jax.jit(jax.vmap(convex_solved))(p))
    assert inner.sum() > CONVEX / 2
    assert np.all(elasticity[inner] <= p["utilization"][inner] * (1 + 1e-12))
    closest = {}
    for steps in (2, 3, 4, 6, 12):
        monkeypatch.setattr(steady_state_module, "ITERATIONS", steps)
        residual = np.asarray(jax.jit(jax.vmap(lambda p: convex_solved(p)[2]))(p))
        bound = start * (1 - np.maximum(ratio, 1.0) ** (-1 / steps)) ** steps
        assert np.all(residual[inner] <= bound[inner] + 1e-15)
        closest[steps] = float(np.max(residual[inner] / (bound[inner] + 1e-15)))
    assert closest[2] > 0.5  # nearly attained: half the bound would fail


# --- float32 --------------------------------------------------------------------------------------------------------


def test_single_precision_is_off_by_what_is_told(systems, double, single):
    ordinary = (double["batch"] <= 1e11) & (systems["utilization"] < HARD_LOADS[-1])
    assert ordinary.mean() > 0.75
    assert single["converged"][ordinary].all()
    # the last load is 0.999 less rounding, which is 0.999 in float32: some are told to be saturated, none to be fine
    near = (double["batch"] <= 1e11) & single["converged"]
    for name in ("batch", "time"):
        off = np.abs(np.log(single[name] / double[name]))
        assert np.max((off * (1 - double["elasticity"]))[near]) < 5 * EPS32
        mild = near & (systems["utilization"] <= 0.9)
        assert off[mild].max() < 1e-5
        assert np.quantile(off[mild], 0.99) < 3e-6
    assert np.max((off * (1 - double["elasticity"]))[near]) > EPS32  # the statement is not a loose one


def random_servers(count: int, seed: int):
    """Numbers of synthetic servers, each an axis; the load is a share of capacity."""
    rng = np.random.default_rng(seed)

    def log_uniform(low, high):
        return 10 ** rng.uniform(low, high, count)

    return {
        "weight_read": log_uniform(-3, -1),
        "token_compute": log_uniform(-5, -3),
        "kv_read": log_uniform(-8, -6),
        "step_overhead": log_uniform(-4, -2),
        "prefill_token": log_uniform(-6, -4),
        "pass_base": log_uniform(-4, -2),
        "prompt_length": log_uniform(1.5, 3.5),
        "output_length": log_uniform(1.3, 2.7),
        "acceptance": rng.uniform(0.3, 0.95, count),
        "draft_length": rng.integers(0, 9, count).astype(float),
        "load": rng.uniform(0.05, 0.95, count),
    }


def predicted(p):
    """Of one server with a cap of 64."""
    costs = {name: p[name] for name in ("weight_read", "token_compute", "kv_read", "step_overhead", "prefill_token")}
    model = ServingModel(RooflineStepTime(**costs, draft=DraftCost(pass_base=p["pass_base"])), waiting_states=64)
    config = Configuration(p["draft_length"], ConstantAcceptance(p["acceptance"]), max_batch_size=64.0)

    def at(rate):
        return model.predict(Workload(p["prompt_length"], p["output_length"], arrival_rate=rate), config)

    found = at(p["load"] * at(jnp.full_like(p["load"], 1e-6)).capacity)
    names = ("ttft", "tpot", "e2e_latency", "throughput", "capacity", "effective_batch_size")
    return {name: getattr(found, name) for name in names}, found.result == RESULTS.successful


def test_predictions_in_single_precision():
    servers = random_servers(5000, 7)
    double, well = jax.jit(jax.vmap(predicted))(servers)
    with jax.enable_x64(False):
        single, also = jax.jit(jax.vmap(predicted))(jax.tree.map(np.float32, servers))
    assert np.all(well) and np.all(also)
    for name, values in double.items():
        assert single[name].dtype == jnp.float32
        off = np.abs(np.asarray(single[name], dtype=float) / np.asarray(values) - 1.0)
        most, usual = (1e-5, 3e-6) if name == "ttft" else (4e-6, 1e-6)  # ttft: with the wait for a place
        assert EPS32 / 8 < off.max() < most
        assert np.quantile(off, 0.99) < usual
