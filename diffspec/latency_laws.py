"""Percentiles of latency under an open loop: what a request meets along its service, over the chain of requests.

P(n) alone gives no percentile of latency, since n moves during service. Approximation, in two moments: a request of S
steps takes own prefill + sum over its steps of pace(n), and n, seen along its steps, is a stationary process with
distribution P; so mean = S*E[pace] exactly, and variance = 2*Var[pace]*int_0^S (S-u)*r(u) du. The correlation r is one
minus the residual-life distribution of lengths, stretched so that an exponential law has the chain's own correlation
time (a closed sum for birth-death chains). Around it a request is normal in the log, and one that waited has an
exponential wait added. The percentiles are those of the mixture over lengths; the time per token of outputs of up to 24
tokens after the first, which make its tail, is mixed over their whole number of steps too. Judged by simulation in
experiments/04_physics_against_simulator.

What a request meets is told by two modules: its own :class:`Pace`, and the :class:`Company` of all requests. Where
classes share the server each has a pace of its own in the same company. Others' prompts that differ count by their mean
and their spread: as prompts of mean size E[f^2]/E[f] at a rate that keeps the time they take, f the prefill of one.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln, log_ndtr, ndtr
from jaxtyping import Array, Float

from diffspec.acceptance import steps_of_short_outputs
from diffspec.company import Company, Pace, StepsLaw
from diffspec.parameters import Scalar
from diffspec.waiting import RequestsInSystem, prompt_wait, queue_scv, requests_in_system, waiting_factor

_ROUNDS = 45
_SMALL = 1e-12
_GAP_SPREAD = 0.02
"""Relative spread given to the gaps, whose percentiles would jump otherwise."""
_SHORT = 24
"""Tokens after the first of outputs whose number of steps is a distribution of its own (two moments do beyond)."""
_PROMPTS = 6
"""Prompts that one step is told to carry, the last one for all beyond."""


class FirstToken(eqx.Module):
    """The law of the time to the first token: alone from ``own`` [s], in a busy engine uniform over ``wide`` [s] from
    ``begin`` [s] on, by what the step under way carries; after a wait exponential of mean ``waits`` [s] beyond
    ``waits_from`` [s]; ``queues``: the share that queues for the token budget, ``queue`` [s] on average."""

    own: Scalar
    begin: Float[Array, "states prompts"]
    wide: Float[Array, "states prompts 1"]
    weight: Float[Array, "states prompts prompts"]
    busy: Float[Array, "states"]
    calm: Float[Array, "states"]
    calm_first: Scalar
    waits_from: Scalar
    waits: Scalar
    queues: Scalar | None
    queue: Scalar | None

    def probability(self, t: Scalar) -> Scalar:
        """P(time to the first token <= t)."""
        met_busy = jnp.sum(self.weight * jnp.clip((t - self.begin[:, None, :]) / self.wide, 0.0, 1.0), axis=(1, 2))
        alone = jnp.clip((t - self.own) / (1e-3 * self.own + 1e-9) + 0.5, 0.0, 1.0)
        queued = -jnp.expm1(-jnp.maximum(t - self.waits_from, 0.0) / jnp.maximum(self.waits, 1e-9))
        soon = self.calm @ jnp.where(self.busy > 0, met_busy, alone)
        if self.queues is not None and self.queue is not None:
            late = -jnp.expm1(-jnp.maximum(t - self.own - self.calm_first, 0.0) / self.queue)
            soon = (1.0 - self.queues) * soon + self.queues * jnp.sum(self.calm) * late
        return soon + (1.0 - jnp.sum(self.calm)) * queued


class Mixed(eqx.Module):
    """A mixture of lognormal laws, with an exponential wait of mean ``wait`` [s] added where that is positive."""

    share: Float[Array, "parts"]
    mean: Float[Array, "parts"]
    variance: Float[Array, "parts"]
    wait: Float[Array, "parts"] | None = None

    def probability(self, t: Scalar) -> Scalar:
        """P(X <= t)."""
        return self.share @ _cdf(t, self.mean, self.variance, self.wait)


class LatencyLaws(eqx.Module):
    """The laws of ttft, tpot, itl and e2e [s] of a request, their means, and the chain of requests they come from.

    ``highest`` [s] by metric: where the search for percentiles begins; ``stretch`` [1] by metric: what times are
    multiplied by before they are looked up (:meth:`at_means`).
    """

    requests: RequestsInSystem
    waiting_time: Scalar
    ttft_mean: Scalar
    e2e_mean: Scalar
    first: FirstToken
    e2e: Mixed
    tpot: Mixed
    gaps: Float[Array, "states prompts"]
    gap_share: Float[Array, "states prompts"]
    highest: dict[str, Scalar]
    stretch: dict[str, Scalar] = eqx.field(default_factory=dict)

    def at_means(self, means: Mapping[str, Scalar]) -> "LatencyLaws":
        """The same laws scaled to these ``means`` [s] of ttft and e2e."""
        own = {"ttft": self.ttft_mean, "e2e": self.e2e_mean}
        return replace(self, stretch={name: own[name] / mean for name, mean in means.items() if name in own})

    def probability(self, metric: str, t: Scalar) -> Scalar:
        """P(metric <= t)."""
        t = t * self.stretch.get(metric, 1.0)
        if metric == "itl":
            return jnp.sum(self.gap_share * ndtr(jnp.log(jnp.maximum(t, 1e-300) / self.gaps) / _GAP_SPREAD))
        return {"ttft": self.first, "tpot": self.tpot, "e2e": self.e2e}[metric].probability(t)

    def percentiles(self, metric: str, percents: Float[Array, "percentiles"]) -> Float[Array, "percentiles"]:
        """Percentiles [s] of a metric; derivatives by the implicit function theorem."""
        high = self.highest[metric] / self.stretch.get(metric, 1.0)
        return quantiles(lambda t: self.probability(metric, t), percents / 100.0, high)


class ClassLaws(eqx.Module):
    """The laws of several classes of requests: ``each`` with a leading axis of classes, and the ``weight`` [classes] of
    each class by metric among all requests (of ``itl``: among all gaps)."""

    each: LatencyLaws
    weight: dict[str, Float[Array, "classes"]]

    def at_means(self, means: Mapping[str, Float[Array, "classes"]]) -> "ClassLaws":
        """The same laws scaled to these ``means`` [classes] [s] of ttft and e2e."""
        return replace(self, each=jax.vmap(lambda laws, means: laws.at_means(means))(self.each, dict(means)))

    def probability(self, metric: str, t: Float[Array, "classes"]) -> Float[Array, "classes"]:
        """P(metric <= t) of each class at a time [s] of its own."""
        return jax.vmap(lambda laws, t: laws.probability(metric, t))(self.each, t)

    def percentiles(self, metric: str, percents: Float[Array, "percentiles"]) -> Float[Array, "classes percentiles"]:
        """Percentiles [s] of each class."""
        return jax.vmap(lambda laws: laws.percentiles(metric, percents))(self.each)

    def percentiles_of_all(
        self, metric: str, percents: Float[Array, "percentiles"], factor: Float[Array, "classes"] | float = 1.0
    ) -> Float[Array, "percentiles"]:
        """Percentiles [s] of the requests of all classes together, their shares times ``factor``."""
        weight = self.weight[metric] * factor
        weight = weight / jnp.sum(weight)
        high = self.each.highest[metric] / self.each.stretch.get(metric, 1.0)

        def probability(t):
            return weight @ self.probability(metric, jnp.broadcast_to(t, weight.shape))

        return quantiles(probability, percents / 100.0, jnp.max(high))


def latency_laws(
    pace: Pace, law: StepsLaw, company: Company, *, cap: Scalar | None = None, arrival_scv: Scalar = 1.0
) -> LatencyLaws:
    """The laws at a sustainable arrival rate. Approximations are stated at the top of this module."""
    arrival_rate = company.arrival_rate
    chain = requests_in_system(company.residence, arrival_rate, cap)
    states = company.residence.shape[0]
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

    foreign, prompt_rate = company.foreign, company.prompt_rate
    stall = jnp.minimum(prompt_rate * foreign, 0.95)  # share of time that others' prompts take
    tokens, steps, by_acceptance = law.tokens, law.steps, law.by_acceptance
    waits = jnp.clip(chain.waiting_probability, _SMALL, 1.0 - _SMALL)
    # prompts come in Poisson numbers and during prompts (a delay cycle) while there are places; into a full batch as
    # requests leave, whose number during a service varies as services do: not at all where all are equally long
    free, full = (1.0 - waits) / (1.0 - stall * (1.0 - waits)) ** 2, waits * jnp.clip(company.service_scv, 0.0, 1.0)
    by_prefill = stall * foreign * mean_pace * (free + full)  # of every step
    mean_steps = jnp.maximum(company.share @ company.steps, _SMALL)
    correlated = partial(_correlated, lengths=company.steps, share=company.share, mean_steps=mean_steps)
    variance = spread * correlated(steps, correlation_steps=correlation_steps)
    variance = variance + by_acceptance * mean_pace**2 + by_prefill * steps

    # a queue forms behind full places; a prompt's own prefill is engine time that does not vary
    service_scv = queue_scv(company.service_scv, last * foreign / company.residence[-1])
    load = jnp.minimum(chain.load, 1.0 - 1e-9)
    waiting = chain.waiting_time * waiting_factor(load, last, service_scv, arrival_scv)
    wait_if = waiting / waits

    # the first token: the rest of the step under way, then the step that carries the prompt, and others' prompts in it
    bare = company.step[jnp.maximum(jnp.arange(states) - 1, 0)]
    under_way = bare / (1.0 - stall)
    met = under_way + prompt_rate * foreign**2 / (1.0 - stall**2)
    rest = 0.5 * pace.first_steps * busy * met  # until the next step begins
    own = pace.overhead + pace.prefill
    carry = shared * pace.step + busy * stall * met

    # prompts queue for the token budget, whether or not places are full; those of a step under way are counted below
    queues, in_queue, queue_if = 0.0, 0.0, 0.0
    if company.prompt_service is not None:
        prompt_service = others @ company.prompt_service
        queues = jnp.clip(arrival_rate * prompt_service, _SMALL, 0.999)
        in_queue = prompt_wait(prompt_service, arrival_rate) - prompt_wait(company.prefill, arrival_rate)
        in_queue = in_queue * company.prompt_service_square
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
    if company.prompt_service is not None:
        kinds[0] = ((1.0 - waits) * (1.0 - queues), 0.0, 0.0, quick)
        kinds.append(((1.0 - waits) * queues, 0.0, queue_if, quick))
    share = jnp.concatenate([law.share * part for part, *_ in kinds])
    mean = jnp.concatenate([base + sure + steps * speed for _, sure, _, speed in kinds])
    both = jnp.concatenate([variance] * len(kinds))
    wait = jnp.concatenate([jnp.full_like(steps, random) for _, _, random, _ in kinds])

    waiting = waiting + in_queue
    e2e_mean = waiting + base + law.share @ (steps * mean_pace)
    ttft_mean = waiting + own + others @ (rest + carry)
    decoded = jnp.where(tokens > 1.5, 1.0, 0.0)
    after_first = jnp.maximum(tokens - 1.0, 0.5)
    tpot_parts = [(decoded * law.share, steps, after_first, variance, quick, slow)]
    if pace.tokens_pmf is not None:
        n, s = (axis.ravel() + 1.0 for axis in jnp.indices((_SHORT, _SHORT), dtype=mean_pace.dtype))
        near = jnp.maximum(
            1.0 - jnp.abs((tokens - 1.0)[:, None] - jnp.arange(1.0, _SHORT + 1.0)), 0.0
        )  # rounded at random
        chance = (law.share @ near)[:, None] * steps_of_short_outputs(pace.tokens_pmf, _SHORT)
        by_chance = spread * correlated(s, correlation_steps=correlation_steps) + by_prefill * s
        longer = law.share * jnp.clip(tokens - 1.0 - _SHORT, 0.0, 1.0)
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

    prompts = jnp.arange(_PROMPTS, dtype=mean_pace.dtype)
    lasts = bare[:, None] + prompts * foreign  # the step under way, by the prompts it carries
    carried = _poisson(prompt_rate * under_way, prompts) * lasts
    carried = carried / jnp.sum(carried, axis=1, keepdims=True)  # a longer step is met more often
    together = _poisson(prompt_rate * lasts, prompts)  # prompts that arrived in the same step
    begin = own + (shared * pace.step)[:, None] + prompts * foreign
    weight = busy[:, None, None] * carried[:, :, None] * together

    calm_first = calm @ (rest + carry) / jnp.maximum(jnp.sum(calm), _SMALL)

    gaps, gap_share = _gaps(pace, company, others / jnp.sum(others), prompt_rate / (1.0 - stall))
    longest = jnp.max(wait)
    return LatencyLaws(
        requests=chain,
        waiting_time=waiting + others @ rest,
        ttft_mean=ttft_mean,
        e2e_mean=e2e_mean,
        first=FirstToken(
            own=own,
            begin=begin,
            wide=jnp.maximum(pace.first_steps * lasts[:, :, None], 1e-3 * own + 1e-9),
            weight=weight,
            busy=busy,
            calm=calm,
            calm_first=calm_first,
            waits_from=own + carry[-1] + in_queue,
            waits=wait_if,
            queues=queues if company.prompt_service is not None else None,
            queue=queue_if if company.prompt_service is not None else None,
        ),
        e2e=Mixed(share, mean, both, wait),
        tpot=Mixed(tpot_share, tpot_mean, tpot_variance),
        gaps=gaps,
        gap_share=gap_share,
        highest={
            "ttft": own + in_queue + 3.0 * jnp.max(rest + carry) + 25.0 * longest,
            "tpot": jnp.max(mean + 12.0 * jnp.sqrt(both)) + 25.0 * longest,
            "itl": 2.0 * jnp.max(gaps),
            "e2e": jnp.max(mean + 12.0 * jnp.sqrt(both)) + 25.0 * longest,
        },
    )


def _gaps(pace: Pace, company: Company, others, flow):
    """Gaps between stream events [s] and their shares, [states, prompts]: a step with what it carries.

    Whole prompts come in Poisson numbers, ``flow``*step of them; of a prompt in chunks a step carries one or none.
    """
    prompts = jnp.arange(_PROMPTS, dtype=pace.step.dtype)
    pieces = 1.0 + company.chunk_steps
    chunked = pieces[:, None] > 1.01
    carrying = flow * pace.step * pieces
    one = jnp.minimum(carrying, 1.0)[:, None]
    chunk_or_none = jnp.where(prompts == 1.0, one, jnp.where(prompts == 0.0, 1.0 - one, 0.0))
    share = others[:, None] * jnp.where(chunked, chunk_or_none, _poisson(carrying, prompts))
    carried = jnp.where(chunked, jnp.minimum(prompts, 1.0), prompts)
    return pace.step[:, None] + carried * (company.foreign / pieces)[:, None], share


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
    if wait is None:
        return plain
    rate = 1.0 / jnp.where(wait > 0, jnp.maximum(wait, 1e-9), 1.0)
    sigma = jnp.sqrt(variance)
    z = (t - mean) / sigma
    exponent = rate * (mean - t) + 0.5 * (rate * sigma) ** 2 + log_ndtr(z - rate * sigma)
    late = jnp.exp(jnp.where(wait > 0, exponent, 0.0))
    return jnp.where(wait > 0, jnp.clip(ndtr(z) - late, 0.0, 1.0), plain)


def quantiles(cdf, wanted, high):
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
