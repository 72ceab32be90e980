"""The equilibrium against closed forms, scipy, a birth-death chain and unrolled iterations; its derivatives too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import AS_USERS_COMPILE, assert_close, finite_difference, names
from oracles import AffineLoop, processor_sharing_latency
from scipy.optimize import brentq

from diffspec.results import RESULTS, outcome_name
from diffspec.steady_state import SATURATION_MARGIN, solve_closed_loop, solve_open_loop
from diffspec.step_time import BatchState, RooflineStepTime

EDGE = (1 - SATURATION_MARGIN) * (1 - 1e-9)  # 0.999 less rounding: the highest load that is not saturated
LOADS = np.array([0.1, 0.5, 0.9, 0.99, 0.998])  # room for finite differences
HARD_LOADS = np.array([0.1, 0.5, 0.9, 0.99, EDGE])


def published(c, **options):
    """Open loop with residence c1 + c2*B, c = (c1, c2, rate), no self share."""
    return solve_open_loop(lambda n: c[0] + c[1] * n, c[2], batch_seen=lambda b: b, **options)


def mixed(c, n):
    """Affine + square root (concave) + rounded corner (convex): c = (c1, c2, root, flat, ramp)."""
    return c[0] + c[1] * n + c[2] * jnp.sqrt(n) + (c[3] ** 6 + (c[4] * n) ** 6) ** (1 / 6)


SHAPES = {
    "affine": np.array([0.5, 0.02, 1e-9, 1e-9, 1e-9]),
    "convex": np.array([0.05, 0.001, 1e-9, 0.5, 0.02]),
    "concave": np.array([0.1, 0.002, 0.3, 1e-9, 1e-9]),
    "mixed": np.array([0.05, 0.002, 0.1, 0.4, 0.01]),
}


def shaped_rate(c, utilization):
    return utilization / (c[1] + c[4])  # capacity of the mixed form: its slope at infinity


def log_residence_time(z):
    """log W of the mixed form at z = log (c1, c2, root, flat, ramp, rate)."""
    c = jnp.exp(z)
    return jnp.log(solve_open_loop(lambda n: mixed(c, n), c[5]).residence_time)


def unrolled(z):
    """The same by 60 Newton steps on log B - log(rate*W(B+1)) from below, differentiated through every step."""

    def gap(log_batch):
        c = jnp.exp(z)
        return log_batch - jnp.log(c[5] * mixed(c, jnp.exp(log_batch) + 1))

    def step(log_batch, _):
        value, slope = jax.jvp(gap, (log_batch,), (jnp.ones_like(log_batch),))
        return log_batch - value / slope, None

    c = jnp.exp(jax.lax.stop_gradient(z))
    start = jnp.log(c[5] * mixed(c, 1.0))
    return jax.lax.scan(step, start, length=60)[0] - z[5]


rows = jax.jit(jax.vmap(log_residence_time))
reverse = jax.jit(jax.vmap(jax.grad(log_residence_time)))
forward = jax.jit(jax.vmap(jax.jacfwd(log_residence_time)))
hessian = jax.jit(jax.vmap(jax.hessian(log_residence_time)))
reverse_twice = jax.jit(jax.vmap(jax.jacrev(jax.jacrev(log_residence_time))))
unrolled_rows = jax.jit(jax.vmap(unrolled))
unrolled_gradient = jax.jit(jax.vmap(jax.jacfwd(unrolled)))
unrolled_hessian = jax.jit(jax.vmap(jax.jacfwd(jax.jacfwd(unrolled))))


def points(name):
    c = SHAPES[name]
    return np.log(np.array([[*c, shaped_rate(c, u)] for u in LOADS]))


@pytest.mark.parametrize("name", SHAPES)
def test_first_derivatives_four_ways(name):
    z = points(name)
    assert_close(rows(z), unrolled_rows(z), rtol=1e-11, atol=1e-11)
    gradient = np.asarray(reverse(z))
    # relative to the largest entry: those of parameters that are switched off are rounding
    scale = np.abs(gradient).max(axis=1, keepdims=True)
    assert_close(gradient / scale, forward(z) / scale, rtol=1e-12, atol=1e-13)
    assert_close(gradient / scale, unrolled_gradient(z) / scale, rtol=1e-9, atol=1e-11)
    for load, at, got, size in zip(LOADS, z, gradient, scale, strict=True):
        step = 2e-2 * (1 - load) if load > 0.9 else 1e-3
        assert_close(finite_difference(rows, at, step) / size, got / size, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SHAPES)
def test_second_derivatives_four_ways(name):
    z = points(name)
    second = np.asarray(hessian(z))
    scale = np.abs(second).max(axis=(1, 2), keepdims=True)
    assert_close(second / scale, np.swapaxes(second, 1, 2) / scale, rtol=0, atol=1e-11)
    assert_close(reverse_twice(z) / scale, second / scale, rtol=0, atol=1e-11)
    assert_close(unrolled_hessian(z) / scale, second / scale, rtol=0, atol=1e-8)
    for load, at, got, size in zip(LOADS, z, second, scale, strict=True):
        step = 1e-2 * (1 - load) if load > 0.9 else 1e-3
        assert_close(finite_difference(reverse, at, step) / size, got / size, rtol=0, atol=1e-6)


def test_affine_derivatives_are_the_closed_form():
    loop = AffineLoop(0.5, 0.02)
    z = np.log(np.array([[0.5, 0.02, u / 0.02] for u in HARD_LOADS]))

    def log_latency(z):
        return jnp.log(published(jnp.exp(z)).residence_time)

    values = jax.jit(jax.vmap(log_latency))(z)
    first = jax.jit(jax.vmap(jax.grad(log_latency)))(z)
    second = jax.jit(jax.vmap(jax.hessian(log_latency)))(z)
    for u, *got in zip(HARD_LOADS, values, first, second, strict=True):
        rate, lost = u / 0.02, 1e-15 / (1 - u)  # rounding of 1 - u
        assert_close(got[0], np.log(loop.latency(rate)), rtol=10 * lost)
        assert_close(got[1], loop.log_gradient(rate), rtol=50 * lost)
        assert_close(got[2], loop.log_hessian(rate), rtol=200 * lost, atol=1e-9)


# --- random hard systems -------------------------------------------------------------------------------------------

N = 8000


def random_systems(seed, count=N):
    rng = np.random.default_rng(seed)

    def log_uniform(low, high):
        return 10 ** rng.uniform(low, high, count)

    return {
        "weight": log_uniform(-4, 0),
        "token": log_uniform(-6, -2),
        "inefficiency": np.where(rng.random(count) < 0.5, 0.0, log_uniform(-3, 0)),
        "sharpness": rng.uniform(1, 12, count),
        "overhead": log_uniform(-6, -2),
        "slope": log_uniform(-7, -3),
        "prefill": np.where(rng.random(count) < 0.3, 0.0, log_uniform(-4, 0)),
        "cap": np.where(rng.random(count) < 0.5, 1e18, log_uniform(0, 3)),
        "utilization": rng.choice(HARD_LOADS, count),
    }


def hard_residence(p, n):
    step = RooflineStepTime(
        weight_read=p["weight"],
        token_compute=p["token"],
        inefficiency=p["inefficiency"],
        sharpness=p["sharpness"],
        step_overhead=p["overhead"],
        sequence_overhead=p["slope"],
    )
    return p["prefill"] * n + (20 + (n - 1) / n) * step(BatchState(sequences=n, query_tokens=4 * n)).total


def hard_residence_numpy(p, n):
    tokens = 4 * n
    high, low = p["weight"], p["token"] * tokens / np.sqrt(1 + p["inefficiency"] * tokens)
    high, low = max(high, low), min(high, low)
    verify = high * (1 + (low / high) ** p["sharpness"]) ** (1 / p["sharpness"])
    return p["prefill"] * n + (20 + (n - 1) / n) * (p["overhead"] + p["slope"] * n + verify)


@pytest.fixture(scope="module")
def solved():
    p = random_systems(3)

    def solve(p):
        rate = p["utilization"] * p["cap"] / hard_residence(p, p["cap"])
        return rate, solve_open_loop(lambda n: hard_residence(p, n), rate, max_batch_size=p["cap"])

    rate, state = jax.jit(jax.vmap(solve))(p)
    return p, np.asarray(rate), state


def test_every_hard_system_converges(solved):
    p, rate, state = solved
    assert np.all(np.asarray(state.result == RESULTS.successful))
    assert np.asarray(state.residual).max() < 1e-14
    assert_close(state.utilization, p["utilization"], rtol=1e-12)
    assert_close(state.throughput, rate, rtol=1e-15)
    assert np.all(np.asarray(state.effective_batch_size) <= p["cap"])
    assert np.all(np.asarray(state.overload) == 0)
    assert_close(state.effective_batch_size, rate * np.asarray(state.residence_time), rtol=1e-14)


def test_hard_systems_agree_with_brentq(solved):
    p, rate, state = solved
    for i in range(0, N, 40):
        one = {key: float(value[i]) for key, value in p.items()}

        def gap(log_x, one=one, i=i):
            x = np.exp(log_x)
            return 1 - rate[i] * x * hard_residence_numpy(one, min(1 / x + 1, one["cap"]))

        ends = [-np.log(rate[i] * hard_residence_numpy(one, n)) for n in (one["cap"], 1.0)]
        root = np.exp(-brentq(gap, ends[0] - 1e-9, ends[1] + 1e-9, xtol=1e-15, rtol=1e-15))
        # the root is known to eps over 1 - elasticity, which is at least 1 - utilization
        bound = 2e-14 / (1 - one["utilization"])
        assert_close(state.effective_batch_size[i], root, rtol=bound)


def test_near_the_cap(solved):
    """Between cap-1 and cap a request sees cap: B = rate*W(cap) there."""
    p, rate, state = solved
    batch, full = np.asarray(state.effective_batch_size), (p["cap"] < 1e18)
    edge = full & (batch > p["cap"] - 1)
    assert edge.sum() > 50
    for i in np.flatnonzero(edge)[:200]:
        one = {key: float(value[i]) for key, value in p.items()}
        assert_close(batch[i], rate[i] * hard_residence_numpy(one, one["cap"]), rtol=1e-13)
        assert_close(state.batch_seen[i], one["cap"], rtol=0)


# --- saturation -----------------------------------------------------------------------------------------------------


def test_saturated_lanes_among_healthy_ones():
    utilization = np.array([0.5, EDGE, 1.0, 1.5, 0.2, 100.0])
    cap = np.array([1e18, 1e18, 1e18, 1e18, 40.0, 40.0])
    outputs = ("residence_time", "effective_batch_size", "overload", "utilization", "capacity", "batch_seen")

    def solve(z, cap):
        c = jnp.exp(z)
        state = solve_open_loop(lambda n: c[0] + c[1] * n, c[2], max_batch_size=cap)
        return jnp.stack([getattr(state, name) for name in outputs]), state.result

    capacity = np.where(cap < 1e18, cap / (0.5 + 0.02 * cap), 1 / 0.02)
    z = np.log(np.stack([np.full(6, 0.5), np.full(6, 0.02), utilization * capacity], axis=1))
    lanes = jax.jit(jax.vmap(solve), compiler_options=AS_USERS_COMPILE)
    values, result = lanes(z, cap)
    slopes = jax.jit(jax.vmap(jax.jacrev(lambda z, cap: solve(z, cap)[0])))(z, cap)
    assert names(result, 6) == ["successful", "successful", "saturated", "saturated", "successful", "saturated"]
    assert np.all(np.isfinite(values))
    assert np.all(np.isfinite(slopes))
    alone = np.stack([lanes(z[i : i + 1], cap[i : i + 1])[0][0] for i in (0, 1, 4)])
    assert_close(values[np.array([0, 1, 4])], alone, rtol=1e-14)
    got = dict(zip(outputs, np.asarray(values).T, strict=True))
    assert_close(got["capacity"], capacity, rtol=1e-13)
    assert_close(got["utilization"], utilization, rtol=1e-13)
    assert_close(got["overload"], np.maximum(utilization - (1 - SATURATION_MARGIN), 0), rtol=1e-10, atol=1e-15)
    # a saturated system shows the numbers just below capacity
    assert_close(got["residence_time"][2:4], 0.52 / SATURATION_MARGIN, rtol=1e-11)
    assert np.all(got["effective_batch_size"] <= cap)
    # overload falls with a lower rate and with a lower c2: the way back for an optimiser; zero where healthy
    by_rate = np.asarray(slopes)[:, outputs.index("overload"), 2]
    assert_close(by_rate[[3, 5]], utilization[[3, 5]], rtol=1e-12)
    assert_close(by_rate[[0, 4]], 0.0, rtol=0)


def test_within_the_margin_below_capacity_is_saturated_too():
    """Numbers are solved at 0.999 of capacity there, so the outcome may not claim the given rate."""
    state = jax.jit(published)(np.array([0.5, 0.02, 0.9995 / 0.02]))
    assert outcome_name(state.result) == "saturated"
    assert_close(state.overload, 0.0005, rtol=1e-9)
    assert_close(state.throughput, 0.999 / 0.02, rtol=1e-13)
    assert_close(state.residence_time, AffineLoop(0.5, 0.02).latency(0.999 / 0.02), rtol=1e-11)


def test_capacity_of_the_uncapped_convex_form():
    state = solve_open_loop(lambda n: mixed(SHAPES["convex"], n), 1.0)
    assert_close(state.capacity, 1 / 0.021, rtol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_residence_is_not_successful(value):
    for scale_bounded in (True, False):
        state = solve_open_loop(lambda n: n * value, 1.0, max_batch_size=10.0, scale_bounded=scale_bounded)
        assert outcome_name(state.result) in ("unconverged", "saturated")
        assert np.isnan(value) <= (outcome_name(state.result) == "unconverged")
    assert outcome_name(solve_closed_loop(lambda n: n * value, 2.0).result) == "unconverged"


def test_a_negative_residence_is_not_successful():
    assert outcome_name(solve_closed_loop(lambda n: 1.0 - n, 2.0).result) == "unconverged"


# --- forms without the scale bound ----------------------------------------------------------------------------------


def thrashing(n):
    """Residence that collapses beyond n = 30: throughput n/W rises to a peak, falls, and rises again."""
    return 0.5 + 0.01 * n + 4.0 / (1.0 + (30.0 / n) ** 6)


def test_metastable_systems_report_their_smallest_root():
    grid = np.geomspace(1e-3, 1e6, 2_000_001)
    throughput = grid / thrashing(grid + 1)
    rates = np.array([2.0, 10.0, 20.0, 24.0, 60.0, 99.0, 101.0])

    def solve(rate):
        return solve_open_loop(thrashing, rate, scale_bounded=False)

    state = jax.jit(jax.vmap(solve))(rates)
    slopes = jax.jit(jax.vmap(jax.grad(lambda rate: solve(rate).residence_time)))(rates)
    assert np.all(np.isfinite(slopes))
    outcomes = names(state.result, rates.size)
    for i, rate in enumerate(rates[:-1]):
        smallest = grid[np.argmax(throughput >= rate)]
        assert_close(state.effective_batch_size[i], smallest, rtol=2e-5)
        crossings = np.sum(np.diff(np.sign(throughput - rate)) != 0)
        assert (outcomes[i] == "metastable") == (crossings > 1)
        assert state.residual[i] < 1e-14
    assert {"metastable", "successful"} <= set(outcomes)
    assert outcomes[-1] == "saturated"
    assert_close(state.capacity, 100.0, rtol=1e-3)  # 1/0.01, approached from below on the scanned grid


def test_scanned_and_bracketed_roots_agree():
    c = SHAPES["mixed"]

    def solve(rate, cap, scale_bounded):
        options = {"max_batch_size": cap, "scale_bounded": scale_bounded}
        return solve_open_loop(lambda n: mixed(c, n), rate, **options).residence_time

    rates = np.array([0.01, 1.0, 10.0, 30.0])
    both = [jax.jit(jax.vmap(lambda r, flag=flag: solve(r, 60.0, flag)))(rates) for flag in (True, False)]
    assert_close(both[1], both[0], rtol=1e-13)


# --- closed loop and the chain --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_closed_loop(name):
    def residence(n):
        return mixed(SHAPES[name], n)

    for concurrency, cap in ((1.0, None), (7.5, None), (7.5, 20.0), (50.0, 20.0)):
        state = solve_closed_loop(residence, concurrency, max_batch_size=cap)
        batch = min(concurrency, cap or np.inf)
        assert_close(state.effective_batch_size, batch, rtol=0)
        assert_close(state.throughput, batch / float(residence(batch)), rtol=1e-14)
        assert outcome_name(state.result) == "successful"
        assert state.utilization <= 1 + 1e-14
        if concurrency > (cap or np.inf):
            assert_close(state.capacity, state.throughput, rtol=1e-14)


@pytest.mark.parametrize("utilization", [0.1, 0.5, 0.9])
def test_affine_open_loop_is_the_processor_sharing_chain(utilization):
    c1, c2 = 0.4, 0.03
    rate = utilization / c2
    chain = processor_sharing_latency(lambda n: c1 + c2 * n, rate, truncation=4000)
    state = solve_open_loop(lambda n: c1 + c2 * n, rate)
    assert_close(state.residence_time, chain, rtol=1e-10)
    assert_close(state.residence_time, (c1 + c2) / (1 - rate * c2), rtol=1e-13)


def test_other_forms_are_near_the_chain():
    """For a curved residence the mean-field answer is an approximation; the gaps are measured."""
    gaps = {}
    for name in ("convex", "mixed"):
        for utilization in (0.3, 0.6, 0.9):
            c = SHAPES[name]
            rate = shaped_rate(c, utilization)
            chain = processor_sharing_latency(lambda n, c=c: np.asarray(mixed(c, n)), rate, truncation=20_000)
            gaps[name, utilization] = float(rows(np.log([[*c, rate]]))[0]) - np.log(chain)
    assert max(abs(gap) for (_, utilization), gap in gaps.items() if utilization < 0.9) < 0.02
    assert abs(gaps["mixed", 0.9]) < 0.002
    # the chain's batch fluctuates, and a convex residence gets slower by more above its mean than faster below
    assert -0.14 < gaps["convex", 0.9] < -0.1
