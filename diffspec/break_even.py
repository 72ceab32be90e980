"""Where two servers are equally fast: the smallest arrival rate at which a difference changes its sign."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp

from diffspec.workload import Workload

LANES = 64
"""Rates that one pass looks at: each bracket is 63 times smaller than the one before."""


def first_crossing(arms: Callable):
    """Smallest rate [req/s] at which the first result of ``arms(rate)`` changes its sign; infinite where it never does.

    ``arms(rate)`` -> (difference, capacity [req/s]): rates are looked at up to 0.998 of the capacity. The difference
    may change its sign more than once, so the whole range is scanned and the first change is refined to 1e-10 of
    capacity. No derivative.

    >>> round(float(first_crossing(lambda rate: (rate - 0.25, jnp.asarray(1.0)))), 9)
    0.25
    """
    whole = jnp.linspace(0.0, 1.0, LANES)
    below_capacity = jnp.concatenate([jnp.full(1, 1e-6), jnp.linspace(0.0, 0.998, LANES)[1:]])

    def narrow(iteration, carry):  # the first pass asks for the capacity, the second scans up to it
        low, high, crossing = carry
        rates = low + jnp.where(iteration == 1, below_capacity, whole) * (high - low)
        gap, limits = jax.vmap(arms)(jnp.where(iteration == 0, 1e-9, rates))
        changed = jnp.append(jnp.sign(gap[1:]) != jnp.sign(gap[:-1]), False)
        index = jnp.argmax(changed)
        following = jnp.minimum(index + 1, LANES - 1)
        scan = iteration > 0
        return (
            jnp.where(scan & changed.any(), rates[index], low),
            jnp.where(scan, jnp.where(changed.any(), rates[following], high), limits[0]),
            jnp.where(iteration == 1, changed.any(), crossing),
        )

    zero = jnp.zeros((), dtype=jnp.result_type(float))
    low, high, crossing = jax.lax.fori_loop(0, 8, narrow, (zero, zero, jnp.zeros((), dtype=bool)))
    return jax.lax.stop_gradient(jnp.where(crossing, 0.5 * (low + high), jnp.inf))


def break_even_rate(both_arms: Callable, workload: Workload):
    """Smallest arrival rate [req/s] at which two servers, ``both_arms(workload)`` -> (prediction, prediction), are
    equally fast in an open loop.

    Infinite when the order never changes below the smaller of both capacities: then the sign at any load tells it.
    Speculation may lose at low load and win at high load as well as the other way round (long contexts): the first
    change is taken. For affine residence without self share it is r*/C2_plain, r* = (1-C1R)/(C2R-C1R).
    """

    def arms(rate):
        fast, slow = both_arms(replace(workload, arrival_rate=rate, concurrency=None, n_requests=None))
        return jnp.log(fast.e2e_latency / slow.e2e_latency), jnp.minimum(fast.capacity, slow.capacity)

    return first_crossing(arms)
