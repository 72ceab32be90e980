"""Coverage of expert weights against the closed form, simulated routing, and hand-made placements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from oracles import route_by_systematic_sampling

from diffspec.experts import ExpertRouting
from diffspec.results import InputError

TOKENS = np.array([1e-3, 0.5, 1.0, 2.0, 8.0, 33.3, 256.0, 1e4])
coverages = jax.jit(jax.vmap(lambda routing, tokens: routing.coverage(tokens), (None, 0)))
SKEWED = np.array([0.9, 0.6, 0.3, 0.1, 0.05, 0.05, 0.0, 0.0])  # m = 2 of M = 8


@pytest.mark.parametrize(("num_experts", "per_token"), [(128, 8), (32, 4), (8, 2), (16, 1)])
def test_uniform_coverage_is_the_published_form(num_experts, per_token):
    routing = ExpertRouting.uniform(num_experts, per_token)
    assert_close(coverages(routing, TOKENS), 1 - (1 - per_token / num_experts) ** TOKENS, rtol=1e-12)
    assert_close(routing.coverage(0.0), 0.0, rtol=0)
    assert_close(routing.coverage(1.0), per_token / num_experts, rtol=1e-14)


def test_every_expert_is_read_when_tokens_take_all():
    assert_close(coverages(ExpertRouting.uniform(4, 4), TOKENS[TOKENS >= 0.5]), 1.0, rtol=1e-12)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_uniform_experts_on_ranks_cover_alike(ranks):
    one, many = ExpertRouting.uniform(64, 4), ExpertRouting.uniform(64, 4, ranks)
    assert_close(coverages(many, TOKENS), coverages(one, TOKENS), rtol=1e-14)
    assert_close(many.load_imbalance(), 1.0, rtol=1e-14)


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_skewed_coverage_agrees_with_simulated_routing(tokens):
    read = route_by_systematic_sampling(SKEWED, tokens, 100_000, seed=tokens)
    ranks = np.arange(8) // 4
    share = read.mean(axis=1)
    one = ExpertRouting.from_popularity(SKEWED).coverage(float(tokens))
    assert abs(float(one) - share.mean()) < 4 * share.std() / np.sqrt(share.size) + 1e-12
    # on two ranks: the mean of what the fuller rank reads, over its 4 experts
    busy = read[:, ranks == 0].mean(axis=1)
    two = ExpertRouting.from_popularity(SKEWED, ranks).coverage(float(tokens))
    assert abs(float(two) - busy.mean()) < 4 * busy.std() / np.sqrt(busy.size) + 1e-12


def test_skew_lowers_coverage_on_one_rank():
    rng = np.random.default_rng(1)
    for _ in range(20):
        popularity = rng.dirichlet(np.full(16, 0.5)) * 2
        popularity = np.minimum(popularity, 1.0)
        uniform = 1 - (1 - popularity.mean()) ** TOKENS
        skewed = np.asarray(coverages(ExpertRouting.from_popularity(popularity), TOKENS))
        more_than_one = TOKENS > 1
        assert np.all(skewed[more_than_one] < uniform[more_than_one])  # Jensen: 1-(1-p)^T is concave in p for T > 1
        assert_close(skewed[TOKENS == 1], uniform[TOKENS == 1], rtol=1e-13)


def test_the_slowest_rank_sets_the_step():
    # two tokens read the experts with probability 1, 0.75, 0.75, 0; two experts a rank
    popularity = [1.0, 0.5, 0.5, 0.0]
    together = ExpertRouting.from_popularity(popularity, [0, 0, 1, 1])
    assert_close(together.coverage(2.0), (1 + 0.75) / 2, rtol=1e-14)
    assert_close(together.load_imbalance(), 1.5, rtol=1e-14)
    apart = ExpertRouting.from_popularity(popularity, [0, 1, 1, 0])
    assert_close(apart.coverage(2.0), (0.75 + 0.75) / 2, rtol=1e-14)
    assert_close(apart.load_imbalance(), 1.0, rtol=1e-14)
    # an uneven number of experts on ranks counts too: relative to the mean of two a rank
    crowded = ExpertRouting.from_popularity(popularity, [0, 0, 0, 1])
    assert_close(crowded.coverage(2.0), 2.5 / 2, rtol=1e-14)
    assert_close(crowded.load_imbalance(), 2.0, rtol=1e-14)


def test_a_soft_placement_is_between_the_hard_ones():
    popularity = jnp.array([0.9, 0.5, 0.4, 0.2])
    soft = ExpertRouting(popularity, jnp.full((2, 4), 0.5))
    assert_close(soft.load_imbalance(), 1.0, rtol=1e-14)
    assert_close(soft.coverage(3.0), ExpertRouting.from_popularity(np.asarray(popularity)).coverage(3.0), rtol=1e-14)


def test_elasticity_of_coverage_in_tokens_is_at_most_one():
    def log_coverage(routing, log_tokens):
        return jnp.log(routing.coverage(jnp.exp(log_tokens)))

    elasticities = jax.jit(jax.vmap(jax.grad(log_coverage, argnums=1), (None, 0)))
    rng = np.random.default_rng(2)
    log_tokens = np.linspace(np.log(1e-4), np.log(1e4), 60)
    for _ in range(10):
        routing = ExpertRouting.from_popularity(rng.uniform(0, 1, 12) ** 3, np.arange(12) % 3)
        elasticity = np.asarray(elasticities(routing, log_tokens))
        assert np.all(elasticity <= 1 + 1e-12)
        assert np.all(elasticity >= 0)
    x = -np.log1p(-0.25) * np.exp(log_tokens)  # one rank, uniform: x/(exp(x)-1) with x = T*log(4/3)
    expected = x * np.exp(-x) / -np.expm1(-x)
    assert_close(elasticities(ExpertRouting.uniform(8, 2), log_tokens), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExpertRouting.uniform(8, 9),
        lambda: ExpertRouting.uniform(8, 0),
        lambda: ExpertRouting.from_popularity([0.5, 1.5]),
        lambda: ExpertRouting.from_popularity([0.5, float("nan")]),
        lambda: ExpertRouting.from_popularity([]),
        lambda: ExpertRouting.from_popularity([[0.5]]),
        lambda: ExpertRouting.from_popularity([0.5, 0.5], [0]),
        lambda: ExpertRouting.from_popularity([0.5, 0.5], [0, -1]),
    ],
)
def test_bad_input_is_named(make):
    with pytest.raises(InputError):
        make()
