"""Beyond the mean: how many requests are in the system and how long they wait for a place in the batch.

The number in the system is a birth-death chain: births at arrival_rate, deaths at min(n, cap)/residence(min(n, cap)),
cap places in the batch. Its distribution, waiting and blocking are exact for it, and Little's law holds exactly. Below
the cap it does not care for the law of lengths (state-dependent processor sharing is insensitive: Cohen 1979); above it
waiting does, and is corrected for it (Kimura 1986, with Cosmetatos' deterministic limit). Judged by simulation in
experiments/04_physics_against_simulator.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr
from jaxtyping import Array, Float

from diffspec.parameters import Scalar

_NODES, _WEIGHTS = (
    0.5 * (part + shift) for part, shift in zip(np.polynomial.legendre.leggauss(12), (1.0, 0.0), strict=True)
)
_SIEGMUND = 0.583
_LEVEL, _STEEPEST = 1e-3, 3.0
"""Growth of a queue [req per arrival] between -1 and 1 times the first is interpolated (the first is where saturation
begins, too); it never falls by more than the second: such queues settle at once."""
_NEARLY_FULL = 0.02
"""Places that never fill are taken to be full after ln(1/0.02) service times."""


class RequestsInSystem(eqx.Module):
    """Stationary distribution of the requests in the system.

    * ``probability[n]``: P(n in the system), n = 0..states; the rest of the mass follows geometrically with ratio
      ``load`` = arrival_rate*residence(cap)/cap
    * ``mean`` [req], ``in_service`` [req]; ``waiting_probability``: P(an arrival finds no place)
    * ``waiting_time`` [s]: mean over all requests, by Little's law (mean - in_service)/arrival_rate
    """

    probability: Float[Array, "n"]
    load: Scalar
    mean: Scalar
    in_service: Scalar
    waiting_probability: Scalar
    waiting_time: Scalar


def requests_in_system(
    residence: Float[Array, "states"], arrival_rate: Scalar, cap: Scalar | None = None
) -> RequestsInSystem:
    """Birth-death chain with death rate min(n, cap)/residence[min(n, cap)]; arrival_rate below cap/residence(cap).

    ``residence[n-1]`` [s]: time in service when n are; its last entry is that at the cap or above (whatever is beyond a
    real-valued ``cap`` must repeat residence(cap)). Differentiable in everything, and stable for thousands of states
    (sums of logarithms).

    >>> chain = requests_in_system(jnp.full(4, 0.5), 6.0)  # M/M/4 at load 0.75: Erlang C gives P(wait) = 0.5094
    >>> round(float(chain.waiting_probability), 4)
    0.5094
    """
    places = jnp.arange(1, residence.shape[0] + 1, dtype=residence.dtype)
    servers = places if cap is None else jnp.minimum(places, cap)
    most = servers[-1]
    odds = jnp.log(arrival_rate * residence / servers)
    log_weight = jnp.concatenate([jnp.zeros(1, dtype=odds.dtype), jnp.cumsum(odds)])
    load = arrival_rate * residence[-1] / most
    weight = jnp.exp(log_weight - jax.lax.stop_gradient(jnp.max(log_weight)))
    beyond = load / (1.0 - load)  # mass above the last state, relative to it
    total = jnp.sum(weight) + weight[-1] * beyond
    probability = weight / total
    last = probability[-1]
    waiting_below = jnp.sum(probability[1:] * (places - servers))
    excess = places[-1] - most
    queue = waiting_below + last * (beyond * (1.0 + excess) + beyond**2)
    in_service = jnp.sum(probability[1:] * servers) + last * beyond * most
    number = jnp.concatenate([jnp.zeros(1, dtype=places.dtype), places])
    full = jnp.clip(number - most + 1.0, 0.0, 1.0)  # a fractional place is there for that share of arrivals
    return RequestsInSystem(
        probability=probability,
        load=load,
        mean=in_service + queue,
        in_service=in_service,
        waiting_probability=jnp.sum(full * probability) + last * beyond,
        waiting_time=queue / arrival_rate,
    )


def blocking_probability(residence: Float[Array, "states"], arrival_rate: Scalar, cap: Scalar | None = None) -> Scalar:
    """P(an arrival is turned away) when no more than ``states`` requests are let into the system; any load.

    >>> round(float(blocking_probability(jnp.full(4, 0.5), 6.0)), 4)  # Erlang B with 4 lines and 3 Erlang
    0.2061
    """
    places = jnp.arange(1, residence.shape[0] + 1, dtype=residence.dtype)
    servers = places if cap is None else jnp.minimum(places, cap)
    log_weight = jnp.concatenate([jnp.zeros(1), jnp.cumsum(jnp.log(arrival_rate * residence / servers))])
    return jnp.exp(log_weight[-1] - jax.nn.logsumexp(log_weight))


def waiting_factor(load: Scalar, places: Scalar, service_scv: Scalar, arrival_scv: Scalar = 1.0) -> Scalar:
    """Mean wait over that of exponential service and Poisson arrivals, for ``places`` servers.

    Kimura (1986) between the exponential and the deterministic queue, (1+c2)/(2*c2 + (1-c2)/d), with Cosmetatos' (1976)
    d = (1 + (1-load)*(m-1)*(sqrt(4+5m)-2)/(16*load*m))/2 for fixed lengths; arrivals enter as in heavy traffic,
    (arrival_scv + c2)/(1 + c2).

    >>> round(float(waiting_factor(0.8, 1.0, 0.0)), 6), float(waiting_factor(0.8, 16.0, 1.0))
    (0.5, 1.0)
    """
    correction = (1.0 - load) * (places - 1.0) * (jnp.sqrt(4.0 + 5.0 * places) - 2.0) / (16.0 * load * places)
    fixed = 0.5 * (1.0 + jnp.minimum(correction, 1.0))
    factor = (1.0 + service_scv) / (2.0 * service_scv + (1.0 - service_scv) / fixed)
    return factor * (arrival_scv + service_scv) / (1.0 + service_scv)


def queue_scv(service_scv: Scalar, fixed_share: Scalar) -> Scalar:
    """Squared coefficient of variation of the gaps between departures of a full batch: that of the service, of which a
    share ``fixed_share`` is engine time that does not vary (prompts), (1 - fixed_share)^2*service_scv."""
    return jnp.maximum(service_scv, 0.0) * (1.0 - jnp.clip(fixed_share, 0.0, 1.0)) ** 2


def prompt_wait(prompt_service: Scalar, arrival_rate: Scalar) -> Scalar:
    """Mean wait [s] of a prompt for the token budget, which serves prompts one after the other, ``prompt_service`` [s]
    each: that of an M/D/1 queue, s*rho/(2*(1 - rho)) with rho = arrival_rate*s, held below 0.999.

    >>> round(float(prompt_wait(0.1, 5.0)), 9)
    0.05
    """
    load = jnp.minimum(arrival_rate * prompt_service, 0.999)
    return 0.5 * prompt_service * load / (1.0 - load)


def wait_of_finite_run(
    n_requests: Scalar,
    places: Scalar,
    arrival_rate: Scalar,
    capacity: Scalar,
    *,
    arrival_scv: Scalar = 1.0,
    service_scv: Scalar = 0.0,
    length_scv: Scalar = 0.0,
    stationary: Scalar | None = None,
) -> Scalar:
    """Mean wait [s] over a run of ``n_requests`` that starts empty, below ``capacity`` [req/s], at it and above.

    Once the places are filled the queue follows the running maximum M of a Brownian motion that drifts by
    1 - capacity/arrival_rate requests per arrival and varies by sigma^2 = arrival_scv + service_scv of them (Abate,
    Whitt 1987); a walk over ``places`` servers stays 0.583*sqrt(places) below it (Siegmund 1979):

        wait = (1/n)*sum over later arrivals m of E[(M_m - 0.583*sqrt(places))^+]/capacity

    Below capacity the sum is scaled to end at the ``stationary`` wait [s]. A share 1 - ``length_scv`` of equal lengths
    fills the places with as many arrivals and leaves them a service time later, in step: the queue grows by half the
    places' drift more. Random lengths leave while the places fill, until sqrt(places)/2 of them are free. Derivation:
    ours; judged by the simulator in tests/test_finite_runs.py and experiments/04.

    >>> [round(float(wait_of_finite_run(n, 8.0, 2.0, 2.1, stationary=5.0)), 3) for n in (8.0, 80.0, 1e6)]
    [0.0, 1.242, 4.999]
    """
    rate, capacity, total = (jnp.asarray(x, dtype=float) for x in (arrival_rate, capacity, n_requests))
    share, fills = jnp.clip(length_scv, 0.0, 1.0), places < total
    places = jnp.where(fills, places, 1.0)
    load = rate / capacity
    taken = (places - 0.5 * jnp.sqrt(places)) / (load * places)
    filled = places * (1.0 - share) - share * load * places * jnp.log(jnp.maximum(1.0 - taken, _NEARLY_FULL))
    late = jnp.maximum(total - filled, 1e-9 * total)
    sigma = jnp.sqrt(jnp.maximum(arrival_scv + service_scv, 1e-6))
    growth = jnp.maximum(1.0 - 1.0 / load, -_STEEPEST)  # of the queue, requests per arrival
    below = _SIEGMUND * jnp.sqrt(places) / sigma

    def queue(growth):
        """Mean of sigma*(M - below)^+ over the late arrivals [req]; over its stationary value where that exists."""
        drift = growth / sigma
        start = jnp.where(drift < 0, below, -jnp.expm1(-2.0 * jnp.abs(drift) * below) / (2.0 * jnp.abs(drift)))
        after = late * _NODES**2  # the queue grows like a square root at first
        grown = sigma * 2.0 * (_WEIGHTS * _NODES) @ _running_maximum(after, drift, start)
        if stationary is None:
            return grown
        settled = sigma * jnp.exp(2.0 * jnp.minimum(drift, 0.0) * below) / (2.0 * jnp.abs(drift))
        return jnp.where(drift < 0, grown / jnp.maximum(settled, 1e-30) * stationary * capacity, grown)

    above = jnp.clip(0.5 + 0.5 * growth / _LEVEL, 0.0, 1.0)  # across capacity linearly: there the formula is 0/0
    mean = above * queue(jnp.maximum(growth, _LEVEL)) + (1.0 - above) * queue(jnp.minimum(growth, -_LEVEL))
    in_step = (1.0 - share) * 0.5 * places * jnp.maximum(growth, 0.0)
    return jnp.where(fills, late / total * (mean + in_step) / capacity, 0.0)


def _running_maximum(time, drift, start):
    """E[(M - start)^+] of the maximum M that a Brownian motion of variance 1 and ``drift`` (not 0) reached."""
    root = jnp.sqrt(time)
    a, b = (start - drift * time) / root, (start + drift * time) / root
    tail = ndtr(-a)
    return root * (jnp.exp(-0.5 * a**2) / jnp.sqrt(2.0 * jnp.pi) - a * tail) + (
        tail - jnp.exp(2.0 * drift * start + log_ndtr(-b))
    ) / (2.0 * drift)
