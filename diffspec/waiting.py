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
from jaxtyping import Array, Float

from diffspec.parameters import Scalar


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
    waiting: Scalar, n_requests: Scalar, places: Scalar, arrival_rate: Scalar, variability: Scalar
) -> Scalar:
    """Mean wait [s] in a run of ``n_requests`` that starts empty, from the stationary ``waiting`` [s].

    The first ``places`` requests find a place. From then on the queue grows at most as a reflected Brownian motion,
    sqrt(2*variability*m/pi) requests after m arrivals (variability: arrival plus service scv), two thirds of that on
    average; the harmonic sum of both bounds is taken. Approximation; a long run has the stationary wait.

    >>> [round(float(wait_of_finite_run(5.0, n, 8.0, 2.0, 1.0)), 3) for n in (8.0, 80.0, 1e12)]
    [0.0, 1.444, 5.0]
    """
    late = jnp.maximum(n_requests - places, 0.0)
    grown = late / n_requests * jnp.sqrt(2.0 * variability * jnp.maximum(late, 1e-12) / jnp.pi) / arrival_rate / 1.5
    return waiting * grown / jnp.maximum(waiting + grown, 1e-15)  # whose square single precision holds too
