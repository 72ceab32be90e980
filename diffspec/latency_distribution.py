"""Percentiles of latency under an open loop: what a request meets along its service, over the chain of requests.

P(n) alone gives no percentile of latency, since n moves during service. Approximation, in two moments: a request of S
steps takes own prefill + sum over its steps of pace(n), and n, seen along its steps, is a stationary process with
distribution P; so mean = S*E[pace] exactly, and variance = 2*Var[pace]*int_0^S (S-u)*r(u) du. The correlation r is one
minus the residual-life distribution of lengths, stretched so that an exponential law has the chain's own correlation
time (a closed sum for birth-death chains). Around it a request is normal in the log, and one that waited has an
exponential wait added. The percentiles are those of the mixture over lengths; the time per token of outputs of up to 24
tokens after the first, which make its tail, is mixed over their whole number of steps too. Judged by simulation in
experiments/04_physics_against_simulator.
"""

from collections.abc import Mapping
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln, log_ndtr, ndtr
from jaxtyping import Array, Float

from diffspec.acceptance import steps_of_short_outputs, steps_per_request
from diffspec.lengths import Lengths
from diffspec.parameters import Scalar
from diffspec.waiting import RequestsInSystem, prompt_wait, queue_scv, requests_in_system, waiting_factor

PERCENTILES = (50, 90, 95, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2e")
PERCENTILE_METRICS = tuple(f"{name}_p{percent}" for name in LATENCIES for percent in PERCENTILES)
"""Names of percentiles, such as ``ttft_p95``."""
_ROUNDS = 45
_SMALL = 1e-12
_GAP_SPREAD = 0.02
"""Relative spread given to the gaps, whose percentiles would jump otherwise."""
_SHORT = 24
"""Tokens after the first of outputs whose number of steps is a distribution of its own (two moments do beyond)."""
_PROMPTS = 6
"""Prompts that one step is told to carry, the last one for all beyond."""


class Pace(eqx.Module):
    """What a request meets along its service, by the number n = 1..states in service, itself included.

    * ``residence[n-1]`` [s]: time in service; ``step[n-1]`` [s]: the engine step
    * ``prefill`` [s]: of its own prompt; ``overhead`` [s]: outside the engine
    * ``steps`` [step] of a request of mean length; ``tokens_per_step`` [tok] and its second moment ``tokens_square``;
      ``tokens_pmf[j]``: P(j + 1 tokens in a step), None where only the moments are known
    * ``first_steps`` [step]: others' steps that a prompt shares in a busy engine; half as many pass before it begins;
      ``chunk_steps[n-1]`` [step]: further steps that a prompt of several chunks shares
    * ``interference`` [1]: foreign prefill paid, relative to a prompt's own
    * ``prompt_service[n-1]`` [s]: what a prompt takes of the token budget; None without a budget
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
    prompt_service: Float[Array, "states"] | None = None
    tokens_pmf: Float[Array, "tokens"] | None = None


class LatencyDistribution(eqx.Module):
    """Means [s] and percentiles [s] of ttft, tpot, itl and e2e under an open loop, and the chain they come from.

    ``attained[metric]``: P(metric <= t) at the times that were asked for, the share of requests within a limit of t.
    """

    requests: RequestsInSystem
    waiting_time: Scalar
    ttft_mean: Scalar
    e2e_mean: Scalar
    ttft: Float[Array, "percentiles"]
    tpot: Float[Array, "percentiles"]
    itl: Float[Array, "percentiles"]
    e2e: Float[Array, "percentiles"]
    attained: dict[str, Float[Array, "times"]] = eqx.field(default_factory=dict)

    def at_means(self, ttft: Scalar, e2e: Scalar) -> dict[str, Float[Array, "percentiles"]]:
        """Percentiles [s] by metric, those of ttft and e2e scaled to these means [s]."""
        scale = {"ttft": ttft / self.ttft_mean, "e2e": e2e / self.e2e_mean}
        return {name: getattr(self, name) * scale.get(name, 1.0) for name in LATENCIES}


def latency_distribution(
    pace: Pace,
    arrival_rate: Scalar,
    output_length: Scalar,
    lengths: Lengths,
    *,
    cap: Scalar | None = None,
    arrival_scv: Scalar = 1.0,
    percentiles: tuple[float, ...] = PERCENTILES,
    at: Mapping[str, Float[Array, "times"]] | None = None,
    means: Mapping[str, Scalar] | None = None,
) -> LatencyDistribution:
    """Means and percentiles at a sustainable arrival rate. Approximations are stated at the top of this module.

    ``output_length`` [tok] and ``lengths``: the mean and the law. Requests of a single token have no tpot and are left
    out of its percentiles. ``at[metric]`` [s]: times whose probability is told in ``attained``, each of a distribution
    scaled to ``means[metric]`` [s] where that is given (ttft, e2e); a fraction of what a percentile costs.
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
    correlated = partial(_correlated, lengths=steps, share=lengths.share, mean_steps=mean_steps)
    variance = spread * correlated(steps, correlation_steps=correlation_steps)
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

    # prompts queue for the token budget, whether or not places are full; those of a step under way are counted below
    queues, in_queue, queue_if = 0.0, 0.0, 0.0
    if pace.prompt_service is not None:
        prompt_service = others @ pace.prompt_service
        queues = jnp.clip(arrival_rate * prompt_service, _SMALL, 0.999)
        in_queue = prompt_wait(prompt_service, arrival_rate) - prompt_wait(pace.prefill, arrival_rate)
        queue_if = jnp.maximum(in_queue, 1e-9) / queues

    # those who wait meet a full batch, and it takes their service a correlation time to forget it
    def paces(steps):
        forget = _memory(steps / jnp.maximum(correlation_steps, _SMALL))
        slow = mean_pace + (per_step[-1] - mean_pace) * forget
        return (mean_pace - waits * slow) / (1.0 - waits), slow

    quick, slow = paces(steps)
    join = others @ (shared * per_step + rest)
    base = own + join
    kinds = [(1.0 - waits, 0.0, 0.0, quick), (waits, in_queue, wait_if, slow)]  # share, sure and random wait, pace
    if pace.prompt_service is not None:
        kinds[0] = ((1.0 - waits) * (1.0 - queues), 0.0, 0.0, quick)
        kinds.append(((1.0 - waits) * queues, 0.0, queue_if, quick))
    share = jnp.concatenate([lengths.share * part for part, *_ in kinds])
    mean = jnp.concatenate([base + sure + steps * speed for _, sure, _, speed in kinds])
    both = jnp.concatenate([variance] * len(kinds))
    wait = jnp.concatenate([jnp.full_like(steps, random) for _, _, random, _ in kinds])

    waiting = waiting + in_queue
    e2e_mean = waiting + base + lengths.share @ (steps * mean_pace)
    ttft_mean = waiting + own + others @ (rest + carry)
    decoded = jnp.where(tokens > 1.5, 1.0, 0.0)
    after_first = jnp.maximum(tokens - 1.0, 0.5)
    tpot_parts = [(decoded * lengths.share, steps, after_first, variance, quick, slow)]
    if pace.tokens_pmf is not None:
        n, s = (axis.ravel() + 1.0 for axis in jnp.indices((_SHORT, _SHORT), dtype=mean_pace.dtype))
        near = jnp.maximum(
            1.0 - jnp.abs((tokens - 1.0)[:, None] - jnp.arange(1.0, _SHORT + 1.0)), 0.0
        )  # rounded at random
        chance = (lengths.share @ near)[:, None] * steps_of_short_outputs(pace.tokens_pmf, _SHORT)
        by_chance = spread * correlated(s, correlation_steps=correlation_steps) + by_prefill * s
        longer = lengths.share * jnp.clip(tokens - 1.0 - _SHORT, 0.0, 1.0)
        tpot_parts = [(longer, *tpot_parts[0][1:]), (chance.ravel(), s, n, by_chance, *paces(s))]
    tpot_share, tpot_mean, tpot_variance = (
        jnp.concatenate(column)
        for column in zip(
            *(
                (part * weight, count * speed / after, varied / after**2)
                for part, count, after, varied, *speeds in tpot_parts
                for weight, speed in zip((1.0 - waits, waits), speeds, strict=True)
            ),
            strict=True,
        )
    )
    tpot_share = tpot_share / jnp.maximum(jnp.sum(tpot_share), _SMALL)
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

    calm_first = calm @ (rest + carry) / jnp.maximum(jnp.sum(calm), _SMALL)

    def of_ttft(t):
        wide = jnp.maximum(pace.first_steps * lasts[:, :, None], 1e-3 * own + 1e-9)
        met_busy = jnp.sum(weight * jnp.clip((t - begin[:, None, :]) / wide, 0.0, 1.0), axis=(1, 2))
        alone = jnp.clip((t - own) / (1e-3 * own + 1e-9) + 0.5, 0.0, 1.0)
        queued = -jnp.expm1(-jnp.maximum(t - own - carry[-1] - in_queue, 0.0) / jnp.maximum(wait_if, 1e-9))
        soon = calm @ jnp.where(busy > 0, met_busy, alone)
        if pace.prompt_service is not None:
            late = -jnp.expm1(-jnp.maximum(t - own - calm_first, 0.0) / queue_if)
            soon = (1.0 - queues) * soon + queues * jnp.sum(calm) * late
        return soon + (1.0 - jnp.sum(calm)) * queued

    gaps, gap_share = _gaps(pace, others / jnp.sum(others), arrival_rate / (1.0 - stall), foreign)

    def of_itl(t):
        return jnp.sum(gap_share * ndtr(jnp.log(jnp.maximum(t, 1e-300) / gaps) / _GAP_SPREAD))

    own_means = {"ttft": ttft_mean, "e2e": e2e_mean}
    of = {"ttft": of_ttft, "tpot": of_tpot, "itl": of_itl, "e2e": of_e2e}
    attained = {}
    for metric, times in (at or {}).items():
        scale = own_means[metric] / (means or {})[metric] if metric in (means or {}) else jnp.ones(())
        attained[metric] = jax.vmap(of[metric])(times * scale)

    wanted = jnp.asarray(percentiles, dtype=float) / 100.0
    longest = jnp.max(wait)
    high = jnp.max(mean + 12.0 * jnp.sqrt(both)) + 25.0 * longest
    return LatencyDistribution(
        requests=chain,
        waiting_time=waiting + others @ rest,
        ttft_mean=ttft_mean,
        e2e_mean=e2e_mean,
        ttft=_quantiles(of_ttft, wanted, own + in_queue + 3.0 * jnp.max(rest + carry) + 25.0 * longest),
        tpot=_quantiles(of_tpot, wanted, high),
        itl=_quantiles(of_itl, wanted, 2.0 * jnp.max(gaps)),
        e2e=_quantiles(of_e2e, wanted, high),
        attained=attained,
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


def _correlated(steps, lengths, share, mean_steps, correlation_steps):
    """2*int_0^S (S-u)*r(u) du for every S, r(u) = 1 - residual-life cdf of ``lengths`` (in steps, with their ``share``)
    at u*mean_steps/correlation_steps.

    With stretched lengths y_j = lengths_j*correlation_steps/mean_steps it is a sum over lengths of piecewise cubics:
    r(u) = sum_j w_j*(y_j - u)^+ / sum_j w_j*y_j.
    """
    stretch = correlation_steps / mean_steps
    y = jnp.maximum(lengths * stretch, _SMALL)
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
    if not wanted.size:
        return wanted

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
