"""Beyond the mean: how many requests are in the system, how long they wait for a place, and percentiles of latency.

The number in the system is a birth-death chain: births at arrival_rate, deaths at min(n, cap)/residence(min(n, cap)),
cap places in the batch. Its distribution, waiting and blocking are exact for it, and Little's law holds exactly. Below
the cap it does not care for the law of lengths (state-dependent processor sharing is insensitive: Cohen 1979); above it
waiting does, and is corrected for it (Kimura 1986, with Cosmetatos' deterministic limit).

P(n) alone gives no percentile of latency, since n moves during service. Approximation, in two moments: a request of S
steps takes own prefill + sum over its steps of pace(n), and n, seen along its steps, is a stationary process with
distribution P; so mean = S*E[pace] exactly, and variance = 2*Var[pace]*int_0^S (S-u)*r(u) du. The correlation r is one
minus the residual-life distribution of lengths, stretched so that an exponential law has the chain's own correlation
time (a closed sum for birth-death chains). Around it a request is normal in the log, and one that waited has an
exponential wait added. The percentiles are those of the mixture over lengths. Judged by simulation in
experiments/04_physics_against_simulator.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln, log_ndtr, ndtr
from jaxtyping import Array, Float

from diffspec.acceptance import steps_per_request
from diffspec.lengths import Lengths
from diffspec.parameters import Scalar

PERCENTILES = (50, 90, 95, 99)
_ROUNDS = 60
_SMALL = 1e-12
_GAP_SPREAD = 0.02
"""Relative spread given to the gaps, whose percentiles would jump otherwise."""
_PROMPTS = 6
"""Prompts that one step is told to carry, the last one for all beyond."""


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


class Pace(eqx.Module):
    """What a request meets along its service, by the number n = 1..states in service, itself included.

    * ``residence[n-1]`` [s]: time in service; ``step[n-1]`` [s]: the engine step
    * ``prefill`` [s]: of its own prompt; ``overhead`` [s]: outside the engine
    * ``steps`` [step] of a request of mean length; ``tokens_per_step`` [tok] and its second moment ``tokens_square``
    * ``first_steps`` [step]: others' steps that a prompt shares in a busy engine; half as many pass before it begins;
      ``chunk_steps[n-1]`` [step]: further steps that a prompt of several chunks shares
    * ``interference`` [1]: foreign prefill paid, relative to a prompt's own
    """

    residence: Float[Array, "states"]
    step: Float[Array, "states"]
    prefill: Scalar
    overhead: Scalar
    steps: Scalar
    tokens_per_step: Scalar
    tokens_square: Scalar
    first_steps: Scalar
    chunk_steps: Float[Array, "states"]
    interference: Scalar


class LatencyDistribution(eqx.Module):
    """Means [s] and percentiles [s] of ttft, tpot, itl and e2e under an open loop, and the chain they come from."""

    requests: RequestsInSystem
    waiting_time: Scalar
    ttft_mean: Scalar
    e2e_mean: Scalar
    ttft: Float[Array, "percentiles"]
    tpot: Float[Array, "percentiles"]
    itl: Float[Array, "percentiles"]
    e2e: Float[Array, "percentiles"]


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
    return waiting * grown / (waiting + grown + 1e-30)


def latency_distribution(
    pace: Pace,
    arrival_rate: Scalar,
    output_length: Scalar,
    lengths: Lengths,
    *,
    cap: Scalar | None = None,
    arrival_scv: Scalar = 1.0,
    percentiles: tuple[float, ...] = PERCENTILES,
) -> LatencyDistribution:
    """Means and percentiles at a sustainable arrival rate. Approximations are stated at the top of this module.

    ``output_length`` [tok] and ``lengths``: the mean and the law. Requests of a single token have no tpot and are left
    out of its percentiles.
    """
    chain = requests_in_system(pace.residence, arrival_rate, cap)
    states = pace.residence.shape[0]
    number = jnp.arange(states, dtype=pace.residence.dtype)
    last = jnp.asarray(states, dtype=float) if cap is None else jnp.asarray(cap, dtype=float)
    at_cap = number == jnp.ceil(last) - 1.0
    others = jnp.where(number < last, chain.probability[:-1], 0.0)  # as arrivals find them
    others = others + jnp.where(at_cap, 1.0 - jnp.sum(others), 0.0)  # those who waited join a full batch
    busy = jnp.minimum(number, 1.0)  # an arrival meets a step under way wherever somebody is there

    # pace of a decoding request by the others in service, foreign prefill included
    shared = busy * (pace.first_steps + pace.chunk_steps)  # others' steps until the first token
    per_step = (pace.residence - pace.overhead - pace.prefill) / (pace.steps + shared)
    mean_pace = others @ per_step
    spread = others @ (per_step - mean_pace) ** 2
    drift = jnp.cumsum(others * (per_step - mean_pace))[:-1]
    births = arrival_rate * per_step[:-1] * others[:-1]  # along the request's own steps
    likely = others[:-1] > 1e-14
    slowness = jnp.sum(jnp.where(likely, drift**2 / jnp.where(likely, births, 1.0), 0.0))
    correlation_steps = jnp.where(spread > 0, slowness / jnp.where(spread > 0, spread, 1.0), 0.0)

    foreign = pace.prefill * pace.interference
    stall = jnp.minimum(arrival_rate * foreign, 0.95)  # share of time that others' prompts take
    tokens = jnp.maximum(output_length * lengths.relative, 1.0)
    m1, m2 = pace.tokens_per_step, pace.tokens_square
    count = jax.vmap(lambda length: steps_per_request(m1, m2, length))(tokens)
    count = jnp.maximum(count, jnp.minimum(tokens - 1.0, 1.0))  # whole steps: a second token takes one
    mean_steps = jnp.maximum(lengths.share @ count, _SMALL)
    steps = count * pace.steps / mean_steps
    mean_steps = jnp.maximum(pace.steps, _SMALL)
    by_acceptance = jnp.maximum(tokens - 2.0, 0.0) * (m2 - m1**2) / m1**3
    by_prefill = stall * foreign * mean_pace  # of every step: Poisson numbers of prompts
    variance = spread * _correlated(steps, lengths.share, mean_steps, correlation_steps)
    variance = variance + by_acceptance * mean_pace**2 + by_prefill * steps

    # a queue forms behind full places; a prompt's own prefill is engine time that does not vary
    service_scv = (lengths.share @ (steps**2 + by_acceptance)) / mean_steps**2 - 1.0
    service_scv = queue_scv(service_scv, last * foreign / pace.residence[-1])
    load = jnp.minimum(chain.load, 1.0 - 1e-9)
    waiting = chain.waiting_time * waiting_factor(load, last, service_scv, arrival_scv)
    waits = jnp.clip(chain.waiting_probability, _SMALL, 1.0 - _SMALL)
    wait_if = waiting / waits

    # the first token: the rest of the step under way, then the step that carries the prompt, and others' prompts in it
    bare = pace.step[jnp.maximum(jnp.arange(states) - 1, 0)]
    under_way = bare / (1.0 - stall)
    met = under_way + arrival_rate * foreign**2 / (1.0 - stall**2)
    rest = 0.5 * pace.first_steps * busy * met  # until the next step begins
    own = pace.overhead + pace.prefill
    carry = shared * pace.step + busy * stall * met

    # those who wait meet a full batch, and it takes their service a correlation time to forget it
    forget = _memory(steps / jnp.maximum(correlation_steps, _SMALL))
    slow = mean_pace + (per_step[-1] - mean_pace) * forget
    quick = (mean_pace - waits * slow) / (1.0 - waits)
    join = others @ (shared * per_step + rest)
    base = own + join
    share = jnp.concatenate([lengths.share * (1.0 - waits), lengths.share * waits])
    mean = jnp.concatenate([base + steps * quick, base + steps * slow])
    both = jnp.concatenate([variance, variance])
    wait = jnp.concatenate([jnp.zeros_like(steps), jnp.full_like(steps, wait_if)])

    e2e_mean = waiting + base + lengths.share @ (steps * mean_pace)
    ttft_mean = waiting + own + others @ (rest + carry)
    decoded = jnp.where(tokens > 1.5, 1.0, 0.0)
    after_first = jnp.maximum(tokens - 1.0, 0.5)
    tpot_share = share * jnp.concatenate([decoded, decoded])
    tpot_share = tpot_share / jnp.maximum(jnp.sum(tpot_share), _SMALL)
    tpot_mean = jnp.concatenate([steps * quick / after_first, steps * slow / after_first])
    tpot_variance = jnp.concatenate([variance / after_first**2] * 2)
    calm = jnp.maximum(others - jnp.where(at_cap, waits, 0.0), 0.0)

    def of_e2e(t):
        return share @ _cdf(t, mean, both, wait)

    def of_tpot(t):
        return tpot_share @ _cdf(t, tpot_mean, tpot_variance, jnp.zeros_like(tpot_mean))

    prompts = jnp.arange(_PROMPTS, dtype=mean_pace.dtype)
    lasts = bare[:, None] + prompts * foreign  # the step under way, by the prompts it carries
    carried = _poisson(arrival_rate * under_way, prompts) * lasts
    carried = carried / jnp.sum(carried, axis=1, keepdims=True)  # a longer step is met more often
    together = _poisson(arrival_rate * lasts, prompts)  # prompts that arrived in the same step
    begin = own + (shared * pace.step)[:, None] + prompts * foreign
    weight = busy[:, None, None] * carried[:, :, None] * together

    def of_ttft(t):
        wide = jnp.maximum(pace.first_steps * lasts[:, :, None], 1e-3 * own + 1e-9)
        met_busy = jnp.sum(weight * jnp.clip((t - begin[:, None, :]) / wide, 0.0, 1.0), axis=(1, 2))
        alone = jnp.clip((t - own) / (1e-3 * own + 1e-9) + 0.5, 0.0, 1.0)
        queued = -jnp.expm1(-jnp.maximum(t - own - carry[-1], 0.0) / jnp.maximum(wait_if, 1e-9))
        return calm @ jnp.where(busy > 0, met_busy, alone) + (1.0 - jnp.sum(calm)) * queued

    gaps, gap_share = _gaps(pace, others / jnp.sum(others), arrival_rate / (1.0 - stall), foreign)

    def of_itl(t):
        return jnp.sum(gap_share * ndtr(jnp.log(jnp.maximum(t, 1e-300) / gaps) / _GAP_SPREAD))

    wanted = jnp.asarray(percentiles, dtype=float) / 100.0
    high = jnp.max(mean + 12.0 * jnp.sqrt(both)) + 25.0 * wait_if
    return LatencyDistribution(
        requests=chain,
        waiting_time=waiting + others @ rest,
        ttft_mean=ttft_mean,
        e2e_mean=e2e_mean,
        ttft=_quantiles(of_ttft, wanted, own + 3.0 * jnp.max(rest + carry) + 25.0 * wait_if),
        tpot=_quantiles(of_tpot, wanted, high),
        itl=_quantiles(of_itl, wanted, 2.0 * jnp.max(gaps)),
        e2e=_quantiles(of_e2e, wanted, high),
    )


def _gaps(pace: Pace, others, flow, foreign):
    """Gaps between stream events [s] and their shares, [states, prompts]: a step with what it carries.

    Whole prompts come in Poisson numbers, ``flow``*step of them; of a prompt in chunks a step carries one or none.
    """
    prompts = jnp.arange(_PROMPTS, dtype=pace.step.dtype)
    pieces = 1.0 + pace.chunk_steps
    chunked = pieces[:, None] > 1.01
    carrying = flow * pace.step * pieces
    one = jnp.minimum(carrying, 1.0)[:, None]
    chunk_or_none = jnp.where(prompts == 1.0, one, jnp.where(prompts == 0.0, 1.0 - one, 0.0))
    share = others[:, None] * jnp.where(chunked, chunk_or_none, _poisson(carrying, prompts))
    carried = jnp.where(chunked, jnp.minimum(prompts, 1.0), prompts)
    return pace.step[:, None] + carried * (foreign / pieces)[:, None], share


def _poisson(mean, number):
    """P(number) along a new last axis; the last number stands for itself and all beyond."""
    mean = mean[..., None]
    share = jnp.exp(number * jnp.log(jnp.maximum(mean, 1e-300)) - mean - gammaln(number + 1.0))
    return share.at[..., -1].add(1.0 - jnp.sum(share, axis=-1))


def _correlated(steps, share, mean_steps, correlation_steps):
    """2*int_0^S (S-u)*r(u) du for every S, r(u) = 1 - residual-life cdf at u*mean_steps/correlation_steps.

    With stretched lengths y_j = S_j*correlation_steps/mean_steps it is a sum over lengths of piecewise cubics:
    r(u) = sum_j w_j*(y_j - u)^+ / sum_j w_j*y_j.
    """
    stretch = correlation_steps / mean_steps
    y = jnp.maximum(steps * stretch, _SMALL)
    whole = share @ y
    s = steps[:, None]
    reach = jnp.minimum(s, y[None, :])
    area = reach * s * y - 0.5 * reach**2 * (s + y) + reach**3 / 3.0
    return 2.0 * (area @ share) / whole


def _memory(x):
    """(1 - exp(-x))/x, 1 at 0: the mean over a service of what its start was."""
    safe = jnp.where(x > 1e-6, x, 1.0)
    return jnp.where(x > 1e-6, -jnp.expm1(-safe) / safe, 1.0 - 0.5 * x)


def _cdf(t, mean, variance, wait):
    """P(X <= t): lognormal around ``mean`` with ``variance``; with an exponential of mean ``wait`` added where it is
    positive, a normal and an exponential (exponentially modified normal)."""
    mean = jnp.maximum(mean, 1e-12)
    variance = jnp.maximum(variance, 1e-8 * mean**2)
    log_variance = jnp.log1p(variance / mean**2)
    plain = ndtr((jnp.log(jnp.maximum(t, 1e-300) / mean) + 0.5 * log_variance) / jnp.sqrt(log_variance))
    rate = 1.0 / jnp.where(wait > 0, jnp.maximum(wait, 1e-9), 1.0)
    sigma = jnp.sqrt(variance)
    z = (t - mean) / sigma
    exponent = rate * (mean - t) + 0.5 * (rate * sigma) ** 2 + log_ndtr(z - rate * sigma)
    late = jnp.exp(jnp.where(wait > 0, exponent, 0.0))
    return jnp.where(wait > 0, jnp.clip(ndtr(z) - late, 0.0, 1.0), plain)


def _quantiles(cdf, wanted, high):
    """t with cdf(t) = wanted by bisection on [0, high]; derivatives by the implicit function theorem."""

    def one(probability):
        def gap(t):
            return cdf(t) - probability

        def solve(function, start):
            def halve(_, bracket):
                low, top = bracket
                middle = 0.5 * (low + top)
                below = function(middle) < 0
                return jnp.where(below, middle, low), jnp.where(below, top, middle)

            low, top = jax.lax.fori_loop(0, _ROUNDS, halve, (jnp.zeros_like(start), start))
            return 0.5 * (low + top)

        return jax.lax.custom_root(
            gap,
            jax.lax.stop_gradient(high),
            solve,
            lambda linear, y: y / linear(jnp.ones_like(y)),
        )

    return jax.vmap(one)(wanted)
