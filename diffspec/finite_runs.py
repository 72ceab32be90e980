"""A benchmark run of n requests: it starts empty, fills, and drains; its means are not those of a steady state.

Fluid model in virtual time V, of which a request of mean length needs one unit:

    dt = w(n, age)*dV + p*da,    da = arrival_rate*dt until n_requests have arrived,
    mean time in service = int n dt / n_requests    (Little's law over the whole run)

with n requests in service, w [s] what all steps of a request take beside them, p [s] what the prefill of a prompt costs
the others (its own comes on top), and age the tokens that a request in service has emitted, on average, over its output
length: below its steady value while the run fills, so that contexts are shorter. Lengths are a mixture: equal ones,
which leave after one unit, and a share of exponential ones, which is the squared coefficient of variation of the
mixture. Derivation: ours. Judged by the simulator in tests/test_finite_runs.py and experiments/04.

:func:`finite_run_factor` is a closed form of it for equal lengths and a residence that does not depend on the batch: a
first approximation, a hundred times cheaper, which fits descend on.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffspec.parameters import Scalar

PER_UNIT = 10
"""Midpoint steps of integration in a unit of virtual time."""

FILLING, DRAINING = 10, 6
"""Units of virtual time that are integrated while requests arrive, and after."""

_OLDEST = 10.0
"""Largest mean age [1]: while the last few exponential requests drain, it grows by one a unit."""
_SHORTEST = 1e-9
"""Work [s] of a request without steps, of a single token say: its prefill is beside it."""


class FiniteRun(eqx.Module):
    """One run: the mean ``residence_time`` [s] of its requests in service, and its ``duration`` [s] from the first
    arrival until less than one request is left. The wait for a place is :func:`diffspec.waiting.wait_of_finite_run`."""

    residence_time: Scalar
    duration: Scalar


class _State(eqx.Module):
    """Requests in service of ``equal`` and of ``random`` length, the sums of their ages, those that ``queue``, how many
    ``arrived`` and were ``admitted``, int n dt (``area``), and the equal ones admitted in each step of the last unit,
    with the excess over half of them, on average during that step (``ring``)."""

    equal: Scalar
    random: Scalar
    equal_age: Scalar
    random_age: Scalar
    queue: Scalar
    arrived: Scalar
    admitted: Scalar
    area: Scalar
    ring: Float[Array, "steps 2"]


def finite_run(
    work: Callable,
    *,
    prefill: Scalar,
    arrival_rate: Scalar,
    n_requests: Scalar,
    output_scv: Scalar = 0.0,
    max_batch_size: Scalar = jnp.inf,
    steady_residence: Scalar,
    capacity: Scalar,
) -> FiniteRun:
    """Integrate a run of ``n_requests`` arrivals at ``arrival_rate`` [req/s] on an engine that is empty at first.

    ``work(n, age)`` [s]: see the module. A run longer than 10 units goes on at the residence reached, which approaches
    ``steady_residence`` [s] below ``capacity`` [req/s] and grows steadily above.

    >>> run = finite_run(lambda n, age: 1.0 + 0.0 * n, prefill=0.0, arrival_rate=2.0, n_requests=50.0,
    ...     steady_residence=1.0, capacity=20.0)
    >>> round(float(run.residence_time), 6)  # where the load does not matter, neither does the run
    1.0
    """
    rate, total, prefill, scv = (jnp.asarray(x, dtype=float) for x in (arrival_rate, n_requests, prefill, output_scv))
    share = jnp.clip(scv, 0.0, 1.0)
    older = (1.0 + scv) / (1.0 + share)  # of lengths more variable than exponential
    dv = 1.0 / PER_UNIT
    stay = jnp.exp(-dv)

    def advance(state: _State, step):
        leaving, leaving_early = state.ring[step % PER_UNIT]
        left = jnp.where(step < FILLING * PER_UNIT, jnp.maximum(total - state.arrived, 0.0), 0.0)
        before = state.equal + state.random

        def step_of(n, age):
            """Duration, requests that arrive and are admitted, how many of the latter beyond half are there on average:
            the last to arrive do so early in their step."""
            took = jnp.maximum(work(n, older * age), _SHORTEST) * dv
            offered = rate * took / (1.0 - jnp.minimum(rate * prefill, 0.95))
            places = jnp.maximum(max_batch_size - before + leaving + state.random * (1.0 - stay), 0.0)
            admitted = jnp.minimum(state.queue + jnp.minimum(offered, left), places)
            time = took + prefill * admitted
            until = jnp.minimum(1.0, left / offered)
            return time, jnp.minimum(rate * time, left), admitted, 0.5 * (1.0 - until) * admitted, until

        def after(admitted, early, until):
            """The requests in service after the step and their ages, and both on average during it."""
            equal = jnp.maximum(state.equal + (1.0 - share) * admitted - leaving, 0.0)
            random = state.random * stay + share * admitted * jnp.exp(-dv * (1.0 - 0.5 * until))
            mean_equal = 0.5 * (state.equal + equal) + (1.0 - share) * early - leaving_early
            mean_random = 0.5 * (state.random + random) + share * early
            equal_age = jnp.clip(state.equal_age + dv * mean_equal - leaving, 0.0, equal)
            random_age = state.random_age * stay + dv * mean_random
            mean = jnp.maximum(mean_equal + mean_random, 0.0)
            ages = 0.5 * (state.equal_age + state.random_age + equal_age + random_age)
            return (equal, random, equal_age, random_age), mean, jnp.minimum(ages / jnp.maximum(mean, 1e-9), _OLDEST)

        age = (state.equal_age + state.random_age) / jnp.maximum(before, 1e-9)
        _, n, age = after(*step_of(before, age)[2:])
        time, arrivals, admitted, early, until = step_of(n, age)
        now, n, _ = after(admitted, early, until)
        queue = jnp.maximum(state.queue + arrivals - admitted, 0.0)
        arrived = state.arrived + arrivals
        following = _State(
            *now,  # type: ignore[call-arg]
            queue=queue,
            arrived=arrived,
            admitted=state.admitted + admitted,
            area=state.area + n * time,
            ring=state.ring.at[step % PER_UNIT].set((1.0 - share) * jnp.stack([admitted, early])),
        )
        lasts = time * jnp.where(left > arrivals, 1.0, jnp.minimum(n, 1.0))
        return following, (time * PER_UNIT, (now[0] + now[1] - before) / time, lasts)

    zero = jnp.zeros(jnp.broadcast_shapes(rate.shape, total.shape), dtype=rate.dtype)
    empty = {field: zero for field in _State.__annotations__}
    start = _State(**empty | {"ring": jnp.zeros((PER_UNIT, 2), dtype=zero.dtype)})
    end, (pace, growth, lasts) = jax.lax.scan(advance, start, jnp.arange((FILLING + DRAINING) * PER_UNIT))

    filled = slice((FILLING - 1) * PER_UNIT, FILLING * PER_UNIT)  # equal lengths come and go in waves of one unit
    last = jnp.mean(pace[filled])
    rest = jnp.maximum(total - end.admitted, 0.0)
    seconds = rest / rate
    settled = jnp.maximum(jnp.maximum(1.0 - rate / capacity, 1e-9) * seconds / last, 1e-12)
    below = steady_residence + (last - steady_residence) * -jnp.expm1(-settled) / settled
    above = last + 0.5 * jnp.maximum(jnp.mean(growth[filled]), 0.0) * seconds / rate
    beyond = jnp.where(rest > 1e-9 * total, jnp.where(rate < capacity, below, above), 0.0)
    return FiniteRun(
        residence_time=(end.area + rest * beyond) / total,
        duration=jnp.maximum(jnp.sum(lasts) + seconds, total / capacity),
    )


def finite_run_factor(share):
    """Mean batch that requests of a finite run see, over the steady-state batch, at a constant residence time.

    With x = arrival_rate*residence/n_requests the trapezoid of requests in flight gives 1 - x/3 for x <= 1 and
    (1 - 1/(3x))/x beyond: the seen batch never exceeds n_requests, so a run always ends.

    >>> float(finite_run_factor(0.3)), round(float(finite_run_factor(2.0)), 6)
    (0.9, 0.416667)
    """
    share = jnp.asarray(share, dtype=float)
    long = jnp.maximum(share, 1.0)
    return jnp.where(share <= 1.0, 1.0 - share / 3.0, (1.0 - 1.0 / (3.0 * long)) / long)
