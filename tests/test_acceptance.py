"""Tokens per step and steps per request against sums, series, an exact recursion and simulated drafts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from oracles import chain_pmf, geometric_tokens, geometric_tokens_slope, simulate_steps, tokens_near_one

from diffspec.acceptance import (
    MAX_DRAFT_LENGTH,
    ConstantAcceptance,
    MeasuredAcceptance,
    PositionAcceptance,
    acceptance_from_tokens_per_step,
    steps_per_request,
    steps_per_request_exact,
)
from diffspec.results import InputError

FALLING = np.array([0.85, 0.7, 0.55, 0.5, 0.3])
RISING = np.array([0.3, 0.6, 0.8, 0.9])  # n-gram and suffix drafters
TOKENS = np.arange(1, MAX_DRAFT_LENGTH + 2)


def constant_tokens(rate, k):
    return ConstantAcceptance(rate).tokens_per_step(k)


constant = jax.jit(jax.vmap(constant_tokens))
constant_slopes = jax.jit(jax.vmap(jax.grad(constant_tokens, (0, 1))))


def distribution(acceptance, k):
    return acceptance.pmf(k), acceptance.moments(k), acceptance.tokens_per_step(k)


distributions = jax.jit(jax.vmap(distribution, (None, 0)))
slopes = jax.jit(jax.vmap(jax.grad(lambda acceptance, k: acceptance.tokens_per_step(k), argnums=1), (None, 0)))


def acceptances():
    curves = np.stack([np.full(MAX_DRAFT_LENGTH, 0.9), np.linspace(0.9, 0.4, MAX_DRAFT_LENGTH)])
    return {
        "zero": ConstantAcceptance(0.0),
        "constant": ConstantAcceptance(0.7),
        "one": ConstantAcceptance(1.0),
        "falling": PositionAcceptance(jnp.asarray(FALLING)),
        "rising": PositionAcceptance(jnp.asarray(RISING)),
        "with zero": PositionAcceptance(jnp.array([0.8, 0.0, 0.5])),
        "measured": MeasuredAcceptance((2, 6), jnp.asarray(curves)),
    }


@pytest.mark.parametrize("k", [1, 2, 5, 8, 32])
def test_constant_equals_the_geometric_sum_at_whole_lengths(k):
    rates = np.array([0.0, 1e-8, 0.1, 0.5, 0.8, 0.95, 1 - 1e-3, 1 - 2e-4, 1 - 5e-5, 1 - 1e-9, 1.0])
    at = np.full(rates.shape, float(k))
    assert_close(constant(rates, at), [geometric_tokens(a, k) for a in rates], rtol=1e-13)
    by_rate, by_length = constant_slopes(rates, at)
    assert_close(by_rate, [geometric_tokens_slope(a, k) for a in rates], rtol=1e-11)
    inside = rates[1:-1]
    assert_close(np.asarray(by_length)[0], 0.0, rtol=0, atol=1e-12)
    if k < MAX_DRAFT_LENGTH:  # E(k) is constant beyond the longest draft
        expected = -np.log(inside) * inside ** (k + 1) / (1 - inside)
        assert_close(np.asarray(by_length)[1:-1], expected, rtol=1e-6)  # of the closed form: log(a) cancels near 1
        assert_close(np.asarray(by_length)[-1], 1.0, rtol=1e-12)


@pytest.mark.parametrize("k", [0.25, 1.5, 3.75, 7.1])
def test_constant_at_real_lengths(k):
    low = np.array([0.05, 0.3, 0.6, 0.9])
    assert_close(constant(low, np.full(4, k)), (1 - low ** (k + 1)) / (1 - low), rtol=1e-13)
    miss = np.array([1e-9, 5e-5, 2e-4, 1e-3, 0.02])
    value, slope = np.array([tokens_near_one(m, k) for m in miss]).T
    assert_close(constant(1 - miss, np.full(5, k)), value, rtol=1e-12)
    assert_close(constant_slopes(1 - miss, np.full(5, k))[0], slope, rtol=1e-9)
    # and by finite differences, in k and in alpha (one-sided towards the inside at alpha = 1)
    h = 1e-5
    for rate in (0.3, 0.9, 1 - 1e-4, 1 - 1e-9):
        by_rate, by_length = (float(s[0]) for s in constant_slopes(np.array([rate]), np.array([k])))
        down, up = constant(np.full(2, rate), np.array([k - h, k + h]))
        assert_close(by_length, (up - down) / (2 * h), rtol=1e-8, atol=1e-10)
        middle = min(rate, 1 - h)
        down, up = constant(np.array([middle - h, middle + h]), np.full(2, k))
        assert_close(by_rate, (up - down) / (2 * h), rtol=1e-4)


@pytest.mark.parametrize("name", acceptances())
def test_distribution_moments_and_monotony(name):
    acceptance = acceptances()[name]
    k = np.unique(np.concatenate([np.arange(33.0), np.linspace(0, 12, 97), [31.3]]))
    pmf, (m1, m2), mean = (
        np.asarray(leaf) if not isinstance(leaf, tuple) else leaf for leaf in distributions(acceptance, k)
    )
    assert_close(pmf.sum(axis=1), 1.0, rtol=1e-14)
    assert pmf.min() >= -1e-16
    assert_close(m1, pmf @ TOKENS, rtol=1e-13)
    assert_close(m2, pmf @ TOKENS**2, rtol=1e-13)
    assert_close(mean, m1, rtol=0)
    # a measured drafter's curve may fall with k, so that E(k) need not rise
    assert name == "measured" or np.all(np.diff(mean) >= -1e-15)
    whole = k == np.floor(k)  # in between, a monotone cubic may bulge above k + 1
    assert np.all(mean[whole] <= k[whole] + 1 + 1e-14)
    assert np.all(mean >= 1)


@pytest.mark.parametrize("rates", [FALLING, RISING])
def test_positions_at_whole_lengths_are_the_chain(rates):
    pmf = np.asarray(distributions(PositionAcceptance(jnp.asarray(rates)), np.arange(1.0, 8.0))[0])
    for k in range(1, 8):
        extended = np.concatenate([rates, np.full(8, rates[-1])])[:k]
        assert_close(pmf[k - 1, : k + 1], chain_pmf(extended), rtol=0, atol=1e-15)
        assert np.all(pmf[k - 1, k + 1 :] == 0)


@pytest.mark.parametrize("name", ["constant", "falling", "rising"])
def test_continuously_differentiable_at_whole_lengths(name):
    acceptance = acceptances()[name]
    k = np.arange(1.0, 9.0)
    h = 1e-6
    below, here, above = (np.asarray(distributions(acceptance, k + d)[2]) for d in (-h, 0.0, h))
    slope = np.asarray(slopes(acceptance, k))
    assert_close((above - here) / h, slope, rtol=1e-5)
    assert_close((here - below) / h, slope, rtol=1e-5)
    if name != "constant":  # the stated slope: harmonic mean of the neighbouring gains
        gains = np.diff(np.asarray(distributions(acceptance, np.arange(0.0, 10.0))[2]))
        assert_close(slope, 2 * gains[:-1] * gains[1:] / (gains[:-1] + gains[1:]), rtol=1e-12)


def test_second_derivative_of_the_constant_form():
    bend = jax.jit(jax.vmap(jax.grad(jax.grad(constant_tokens, 1), 1)))
    k = np.array([0.0, 0.5, 1.0, 3.0, 3.5, 8.0])
    assert_close(bend(np.full(6, 0.8), k), -(np.log(0.8) ** 2) * 0.8 ** (k + 1) / 0.2, rtol=1e-10)


def test_draft_probability_thins_the_drafted_tokens():
    acceptance = PositionAcceptance(jnp.asarray(FALLING))
    full, thin, none = (np.asarray(acceptance.pmf(4.0, q)) for q in (1.0, 0.3, 0.0))
    alone = np.eye(33)[0]
    assert_close(thin, 0.3 * full + 0.7 * alone, rtol=0, atol=1e-15)  # a mixture of steps with and without a draft
    assert_close(none, alone, rtol=0)
    assert_close(acceptance.moments(4.0, 0.3), (thin @ TOKENS, thin @ TOKENS**2), rtol=1e-14)


def test_measured_is_exact_where_it_was_measured():
    curves = np.random.default_rng(0).uniform(0.2, 0.95, (3, MAX_DRAFT_LENGTH))
    measured = MeasuredAcceptance((1, 4, 7), jnp.asarray(curves))
    for k, curve in zip((1, 4, 7), curves, strict=True):
        assert_close(measured.conditional_rates(float(k)), curve, rtol=1e-15)
        assert_close(np.asarray(measured.pmf(float(k)))[: k + 1], chain_pmf(curve[:k]), rtol=0, atol=1e-15)
    assert_close(measured.conditional_rates(0.5), curves[0], rtol=0)
    assert_close(measured.conditional_rates(9.0), curves[2], rtol=1e-15)
    assert_close(measured.conditional_rates(2.5), (curves[0] + curves[1]) / 2, rtol=1e-14)


@pytest.mark.parametrize("k", [1, 4, 2.5, 16])
@pytest.mark.parametrize("rate", [0.05, 0.6, 0.8, 0.99])
def test_acceptance_from_tokens_per_step_round_trip(rate, k):
    tokens = (1 - rate ** (k + 1)) / (1 - rate)
    assert_close(acceptance_from_tokens_per_step(tokens, k).acceptance_rate, rate, rtol=1e-12)


def test_acceptance_from_the_ends():
    assert acceptance_from_tokens_per_step(1.0, 4).acceptance_rate < 1e-12
    assert_close(acceptance_from_tokens_per_step(5, 4).acceptance_rate, 1.0, rtol=1e-12)


def smooth_and_exact(rates, output_length):
    pmf = chain_pmf(rates)
    tokens = np.arange(1, len(pmf) + 1)
    smooth = steps_per_request(pmf @ tokens, pmf @ tokens**2, float(output_length))
    return float(smooth), steps_per_request_exact(pmf, output_length)


@pytest.mark.parametrize("rates", [FALLING, RISING, np.full(5, 0.8)])
@pytest.mark.parametrize("output_length", [2, 17, 64])
def test_exact_steps_agree_with_simulated_requests(rates, output_length):
    steps = simulate_steps(rates, output_length, 40_000, seed=output_length)
    error = max(steps.std() / np.sqrt(steps.size), 1e-12)
    assert abs(steps.mean() - steps_per_request_exact(chain_pmf(rates), output_length)) < 4 * error


# Measured: largest relative error over acceptance 0..alpha_max in steps of 0.05 and every draft length 1..8
@pytest.mark.parametrize(
    ("output_length", "alpha_max", "bound"),
    [(8, 0.8, 0.06), (16, 0.8, 0.004), (16, 0.95, 0.06), (32, 0.8, 5e-5), (64, 0.9, 1e-4), (128, 0.95, 5e-5)],
)
def test_smooth_steps_follow_the_exact_recursion(output_length, alpha_max, bound):
    worst = published = 0.0
    for alpha in np.arange(0.0, alpha_max + 1e-9, 0.05):
        for k in range(1, 9):
            smooth, exact = smooth_and_exact(np.full(k, alpha), output_length)
            worst = max(worst, abs(smooth / exact - 1))
            published = max(published, abs(output_length / geometric_tokens(alpha, k) / exact - 1))
    assert worst < bound
    assert worst < published


def test_published_steps_are_too_few_for_long_drafts():
    smooth, exact = smooth_and_exact(np.full(8, 0.8), 64)
    published = float(steps_per_request(geometric_tokens(0.8, 8), 1.0, 64.0, "published"))
    assert_close(published, 64 / geometric_tokens(0.8, 8), rtol=1e-15)
    assert 0.02 < 1 - published / exact < 0.05
    assert abs(smooth / exact - 1) < 1e-3


def test_steps_without_speculation_are_the_remaining_tokens():
    for output_length in (1.0, 2.0, 64.5):
        assert float(steps_per_request(1.0, 1.0, output_length)) == output_length - 1
    assert steps_per_request_exact(np.array([1.0]), 64) == 63
    assert steps_per_request_exact(np.array([1.0]), 1) == 0
    # a step emits at least one token: never more steps than tokens to emit
    assert float(steps_per_request(3.0, 20.0, 1.0)) == 0.0
    assert float(steps_per_request(1.2, 9.0, 2.0)) == 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConstantAcceptance(1.2),
        lambda: ConstantAcceptance(-0.1),
        lambda: ConstantAcceptance(float("nan")),
        lambda: ConstantAcceptance(80),
        lambda: PositionAcceptance(jnp.array([0.5, 1.5])),
        lambda: PositionAcceptance(jnp.zeros(0)),
        lambda: PositionAcceptance(jnp.full(33, 0.5)),
        lambda: MeasuredAcceptance((4, 2), jnp.full((2, 32), 0.5)),
        lambda: MeasuredAcceptance((), jnp.full((0, 32), 0.5)),
        lambda: MeasuredAcceptance((2,), jnp.full((2, 32), 0.5)),
        lambda: acceptance_from_tokens_per_step(5.5, 4),
        lambda: acceptance_from_tokens_per_step(0.9, 4),
        lambda: acceptance_from_tokens_per_step(1.5, 0),
        lambda: acceptance_from_tokens_per_step(1.5, 33),
    ],
)
def test_bad_input_is_named(make):
    with pytest.raises(InputError):
        make()


def test_percentage_gets_advice():
    with pytest.raises(InputError, match=r"acceptance_rate: got 80; allowed: \[0, 1\].*divide a percentage by 100"):
        ConstantAcceptance(80)
