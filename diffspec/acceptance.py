"""How many tokens a speculative step emits, and how many steps a request needs.

| on paper                                     | in code                                |
|----------------------------------------------|----------------------------------------|
| a_j = P(token j accepted given 1..j-1 were)  | ``conditional_rates``                  |
| S_j = a_1 * ... * a_j                        | ``survival`` (entry j = P(tokens > j)) |
| E(k) = sum_{j=0..k} S_j, bonus token included | ``tokens_per_step``                   |
| m1 = E(k), m2 = sum_{j=0..k} (2j+1) S_j      | ``moments``                            |

Draft length is real-valued: position j counts with weight w_j(k), which rises from 0 to 1 while k goes from j-1 to j.
Whole draft lengths are exact, the distribution stays a distribution in between, and E(k) is continuously
differentiable in k, so that a gradient method can move draft length.
"""

from abc import abstractmethod
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from diffspec.acceptance_curves import draft_acceptance_rate_to_tokens_per_step, tokens_per_step_to_constant
from diffspec.parameters import Scalar
from diffspec.results import InputError
from diffspec.workload import check_range

MAX_DRAFT_LENGTH = 32
"""Longest draft that diffspec represents [tok]."""


class AbstractAcceptance(eqx.Module):
    """What a prediction needs of acceptance: the first two moments of the tokens that one step emits."""

    @abstractmethod
    def moments(self, draft_length: Scalar, draft_probability: Scalar = 1.0) -> tuple[Scalar, Scalar]:
        """First and second moment (m1, m2) of the tokens per step [tok, tok^2]."""

    def drafted_tokens(self, draft_length: Scalar) -> Scalar:
        """Tokens drafted and verified for a sequence in a step of ``draft_length`` positions [tok]; more in a tree."""
        return draft_length

    def tokens_per_step(self, draft_length: Scalar) -> Float[Array, ""]:
        """E(k) = sum_{j=0..k} S_j [tok], the mean tokens emitted per step, bonus token included."""
        return self.moments(draft_length)[0]


class KnownMoments(AbstractAcceptance):
    """Moments computed beforehand, for many evaluations at one draft length: ``m1`` [tok] and ``m2`` [tok^2]."""

    m1: Scalar
    m2: Scalar

    def moments(self, draft_length: Scalar, draft_probability: Scalar = 1.0):
        return self.m1, self.m2


class AbstractPositionwise(AbstractAcceptance):
    """Distribution of the tokens emitted by one speculative step, for real-valued draft_length in [0, 32]."""

    @abstractmethod
    def conditional_rates(self, draft_length: Scalar) -> Float[Array, "32"]:
        """a_1..a_32: probability that draft position j is accepted given that all before it were."""

    @abstractmethod
    def position_weights(self, draft_length: Scalar) -> Float[Array, "32"]:
        """w_1..w_32 in [0, 1]: how much of draft position j exists at this real-valued draft length."""

    def survival(self, draft_length: Scalar, draft_probability: Scalar = 1.0) -> Float[Array, "33"]:
        """P(tokens > j) for j = 0..32. A drafter that drafts in a share ``draft_probability`` of steps thins j >= 1."""
        drafted = jnp.cumprod(self.conditional_rates(draft_length)) * self.position_weights(draft_length)
        return jnp.concatenate([jnp.ones(1, dtype=drafted.dtype), draft_probability * drafted])

    def pmf(self, draft_length: Scalar, draft_probability: Scalar = 1.0) -> Float[Array, "33"]:
        """P(tokens = j + 1) for j = 0..32; sums to 1."""
        survival = self.survival(draft_length, draft_probability)
        return survival - jnp.append(survival[1:], jnp.zeros_like(survival[:1]))

    def moments(self, draft_length: Scalar, draft_probability: Scalar = 1.0):
        """First and second moment (m1, m2) of the tokens per step [tok, tok^2]."""
        survival = self.survival(draft_length, draft_probability)
        odd = 2.0 * jnp.arange(MAX_DRAFT_LENGTH + 1, dtype=survival.dtype) + 1.0
        return jnp.sum(survival), jnp.sum(odd * survival)


class ConstantAcceptance(AbstractPositionwise):
    """One acceptance rate alpha for every position: S_j = alpha^j, E(k) = (1-alpha^(k+1))/(1-alpha).

    ``acceptance_rate`` in [0, 1]; the closed form also holds for real k. Source: Leviathan et al., arXiv 2211.17192.

    >>> round(float(ConstantAcceptance(0.8).tokens_per_step(4)), 4)
    3.3616
    """

    acceptance_rate: Scalar

    def __check_init__(self):
        advice = "acceptance is a fraction: divide a percentage by 100"
        check_range("acceptance_rate", self.acceptance_rate, 0, 1, low_open=False, unit="", advice=advice)

    def conditional_rates(self, draft_length: Scalar) -> Float[Array, "32"]:
        return jnp.full(MAX_DRAFT_LENGTH, jnp.asarray(self.acceptance_rate, dtype=float))

    def position_weights(self, draft_length: Scalar) -> Float[Array, "32"]:
        part = _part_of_position(draft_length)
        log_rate = jnp.log(jnp.maximum(jnp.asarray(self.acceptance_rate, dtype=float), 1e-30))
        near_one = jnp.abs(log_rate) < 1e-4
        far = jnp.where(near_one, -1.0, log_rate)  # double where: no 0/0 in the branch not taken
        series = (
            part
            * (1 + part * log_rate / 2 + (part * log_rate) ** 2 / 6 + (part * log_rate) ** 3 / 24)
            / (1 + log_rate / 2 + log_rate**2 / 6 + log_rate**3 / 24)
        )
        return jnp.where(near_one, series, jnp.expm1(part * far) / jnp.expm1(far))


class PositionAcceptance(AbstractPositionwise):
    """Conditional acceptance per draft position a_1..a_n; positions beyond the last measured one repeat the last rate.

    Between whole draft lengths E(k) follows the monotone cubic of Fritsch and Butland (1984), whose slope at a whole k
    is the harmonic mean of the neighbouring gains S_k and S_(k+1).

    >>> acceptance = PositionAcceptance(jnp.array([0.8, 0.7, 0.6]))
    >>> round(float(acceptance.tokens_per_step(3)), 4)
    2.696
    """

    position_acceptance: Float[Array, "positions"]

    def __check_init__(self):
        check_position_acceptance(self.position_acceptance)

    def conditional_rates(self, draft_length: Scalar) -> Float[Array, "32"]:
        return _extend(self.position_acceptance)

    def position_weights(self, draft_length: Scalar) -> Float[Array, "32"]:
        return monotone_weights(self.conditional_rates(draft_length), draft_length)


class MeasuredAcceptance(AbstractPositionwise):
    """Conditional acceptance per position measured at several draft lengths, as a drafter's curves may depend on k.

    ``draft_lengths``: whole, strictly increasing, >= 1; ``curves[i]`` are the conditional rates at draft_lengths[i].
    Between two measured draft lengths the rates are blended by the smooth step 3f^2-2f^3; beyond the ends the nearest
    curve holds.
    """

    draft_lengths: tuple[int, ...] = eqx.field(static=True)
    curves: Float[Array, "lengths 32"]

    def __check_init__(self):
        whole = all(isinstance(length, int) and length >= 1 for length in self.draft_lengths)
        if not self.draft_lengths or not whole or list(self.draft_lengths) != sorted(set(self.draft_lengths)):
            raise InputError(f"draft_lengths: got {self.draft_lengths}; allowed: whole numbers >= 1, increasing")
        if len(self.draft_lengths) != self.curves.shape[0]:
            raise InputError(f"{len(self.draft_lengths)} draft lengths but {self.curves.shape[0]} acceptance curves")
        for curve in [] if isinstance(self.curves, Tracer) else self.curves:
            check_position_acceptance(curve)

    def conditional_rates(self, draft_length: Scalar) -> Float[Array, "32"]:
        rates = self.curves[0]
        for low, high, after in zip(self.draft_lengths, self.draft_lengths[1:], self.curves[1:], strict=False):
            part = _unit_ramp((draft_length - low) / (high - low))
            rates = rates + part**2 * (3.0 - 2.0 * part) * (after - rates)
        return rates

    def position_weights(self, draft_length: Scalar) -> Float[Array, "32"]:
        return monotone_weights(self.conditional_rates(draft_length), draft_length)


def _unit_ramp(x):
    # derivative 1 at 0 and 0 at 1: at whole k exactly one position moves, so every derivative is the one from above
    # (minimum and maximum halve both sides at a tie: right at first order, half as large at second)
    return jnp.where(x >= 1.0, 1.0, jnp.where(x < 0.0, 0.0, x))


def _part_of_position(draft_length):
    positions = jnp.arange(MAX_DRAFT_LENGTH, dtype=jnp.result_type(float))
    return _unit_ramp(jnp.asarray(draft_length, dtype=float) - positions)


def monotone_weights(rates, draft_length):
    """Hermite weight of each position, so that E(k) is the monotone cubic of Fritsch and Butland (1984).

    ``rates``: a_1..a_32, the ratio of each gain to the one before it; the slopes 2/(1+a_j) and 2a/(1+a) at the ends are
    harmonic means of neighbouring gains divided by the gain S_j.
    """
    part = _part_of_position(draft_length)
    following = jnp.append(rates[1:], rates[-1:])
    step = part**2 * (3.0 - 2.0 * part)
    rise = part * (1.0 - part) ** 2
    fall = part**2 * (part - 1.0)
    return step + rise * 2.0 / (1.0 + rates) + fall * 2.0 * following / (1.0 + following)


def _extend(rates):
    rates = jnp.asarray(rates, dtype=float)
    return jnp.concatenate([rates, jnp.broadcast_to(rates[-1:], (MAX_DRAFT_LENGTH - rates.shape[0],))])


def check_position_acceptance(rates) -> None:
    """Raise :class:`InputError` unless there are 1 to 32 conditional rates, each in [0, 1] where concrete."""
    if not eqx.is_array_like(rates) or np.ndim(rates) != 1:
        raise InputError(f"position_acceptance: got {rates!r}; allowed: an array of one rate for each position")
    if not 1 <= rates.shape[0] <= MAX_DRAFT_LENGTH:
        raise InputError(f"position_acceptance: got {rates.shape[0]} positions; allowed: 1 to {MAX_DRAFT_LENGTH}")
    if not eqx.is_array(rates) or isinstance(rates, Tracer):
        return
    for value in np.asarray(rates):
        check_range("position_acceptance", float(value), 0, 1, low_open=False, unit="", advice="it is a fraction")


def acceptance_from_tokens_per_step(tokens_per_step: float | int, draft_length: float | int) -> ConstantAcceptance:
    """The constant acceptance whose E(k) is the measured tokens_per_step; allowed range [1, draft_length + 1].

    >>> round(float(acceptance_from_tokens_per_step(3.3616, 4).acceptance_rate), 6)
    0.8
    """
    check_range("draft_length", draft_length, 0, MAX_DRAFT_LENGTH, low_open=True, unit="tok")
    check_range("tokens_per_step", tokens_per_step, 1, draft_length + 1, low_open=False, unit="tok")
    return ConstantAcceptance(tokens_per_step_to_constant(tokens_per_step, draft_length))


def acceptance_from_draft_acceptance_rate(
    draft_acceptance_rate: float | int, draft_length: float | int
) -> ConstantAcceptance:
    """The constant acceptance of which a share draft_acceptance_rate of draft_length drafted tokens is accepted.

    >>> round(float(acceptance_from_draft_acceptance_rate(0.5904, 4).acceptance_rate), 6)
    0.8
    """
    return acceptance_from_tokens_per_step(
        draft_acceptance_rate_to_tokens_per_step(draft_acceptance_rate, draft_length), draft_length
    )


StepsForm = Literal["renewal", "published"]


def steps_per_request(m1: Scalar, m2: Scalar, output_length: Scalar, form: StepsForm = "renewal"):
    """Decode steps of one request of ``output_length`` tokens when steps emit m1 tokens on average (second moment m2).

    ``renewal``: (output_length-1 + (m2/m1-1)/2)/m1, since prefill emits the first token and steps are whole (the
    renewal count, Lorden-type approximation); ``published``: output_length/m1 as in arXiv 2605.15051, Eq 3.

    >>> float(steps_per_request(1.0, 1.0, 64.0))
    63.0
    """
    if form == "published":
        return output_length / m1
    # below one emitted token no step is needed; between, the count may not exceed the tokens to emit
    remaining = jnp.maximum(output_length - 1.0, 0.0)
    return jnp.minimum((remaining + 0.5 * (m2 / m1 - 1.0)) / m1, remaining)


def steps_of_short_outputs(pmf: Float[Array, "tokens"], longest: int) -> Float[Array, "n s"]:
    """P(s steps make at least n tokens, and s - 1 do not), for n and s = 1..``longest``: the renewal count's own law,
    by recursion over the first step, P(n, s) = sum_j pmf_j P(n - j, s - 1) with P(n <= 0, 0) = 1.

    >>> [[float(p) for p in row] for row in steps_of_short_outputs(jnp.array([0.25, 0.75]), 2)]
    [[1.0, 0.0], [0.75, 0.25]]
    """
    size = longest + 1
    emitted = jnp.arange(1, pmf.shape[0] + 1)

    def add(table, n):  # rows of the table: tokens still to come, 0..longest; columns: steps, 0..longest
        row = jnp.roll(pmf @ table[jnp.maximum(n - emitted, 0)], 1).at[0].set(0.0)
        return table.at[n].set(row), None

    start = jnp.zeros((size, size), dtype=pmf.dtype).at[0, 0].set(1.0)
    table, _ = jax.lax.scan(add, start, jnp.arange(1, size))
    return table[1:, 1:]


def steps_per_request_exact(pmf: Float[np.ndarray, "tokens"], output_length: int) -> float:
    """Exact mean number of steps for a whole output length: N(g) = 1 + sum_t pmf(t) N(g-t), N(g <= 0) = 0.

    ``pmf[t-1]`` = P(a step emits t tokens). The oracle of :func:`steps_per_request`; g = output_length - 1.
    """
    pmf = np.asarray(pmf, dtype=float)
    need = int(output_length) - 1
    steps = np.zeros(max(need, 0) + 1)
    for g in range(1, need + 1):
        reach = min(g, len(pmf))
        steps[g] = 1.0 + pmf[:reach] @ steps[g - reach : g][::-1]
    return float(steps[-1])
