"""Trees against simulated verification, enumeration of every small tree, recursion, chains and finite differences."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from oracles import chain_pmf, geometric_tokens

from diffspec.acceptance import ConstantAcceptance, PositionAcceptance
from diffspec.batch_state import BatchState
from diffspec.configuration import Configuration
from diffspec.drafters import BlockDrafter, DraftModel
from diffspec.results import InputError
from diffspec.serving import ServingModel
from diffspec.step_time import AffineStepTime, RooflineStepTime
from diffspec.tree_search import RegularTree, best_budget, best_tree
from diffspec.trees import Tree, TreeAcceptance
from diffspec.workload import Workload

SORTED = np.array([[0.6, 0.2, 0.1], [0.5, 0.3, 0.05], [0.45, 0.2, 0.1], [0.4, 0.1, 0.1]])
UNSORTED = np.array([[0.3, 0.5, 0.1], [0.5, 0.05, 0.3], [0.2, 0.3, 0.4], [0.4, 0.1, 0.2]])
BUSHY = Tree([-1, -1, -1, 0, 0, 1, 3, 3, 6])


def path_products(parents, p):
    """P(node accepted), written from the definition: walk up to the root."""
    ranks = [sum(q == parents[i] for q in parents[: i + 1]) for i in range(len(parents))]

    def depth(i):
        return 1 if parents[i] < 0 else 1 + depth(parents[i])

    def value(i):
        own = p[depth(i) - 1][ranks[i] - 1]
        return own if parents[i] < 0 else own * value(parents[i])

    return np.array([value(i) for i in range(len(parents))]), np.array([depth(i) for i in range(len(parents))])


def tokens(tree, p):
    """E of a tree from its path products; the one row of p serves every depth."""
    return 1 + path_products(tree.parents, np.broadcast_to(p, (max(tree.max_depth, len(p)), len(p[0]))))[0].sum()


def verify(tree, p, n, seed):
    """Accepted drafts of n simulated steps: at each node the verifier takes one of all possible candidates, or none."""
    rng = np.random.default_rng(seed)
    children = {(parent, int(rank)): i for i, (parent, rank) in enumerate(zip(tree.parents, tree.rank, strict=True))}
    accepted = np.zeros(n, int)
    for step in range(n):
        node, depth = -1, 0
        while depth < len(p):
            taken = int(np.searchsorted(np.cumsum(p[depth]), rng.random(), side="right")) + 1
            if (node, taken) not in children:
                break
            node, depth = children[(node, taken)], depth + 1
        accepted[step] = depth
    return accepted


@pytest.mark.parametrize("p", [SORTED, UNSORTED])
def test_values_are_path_products_and_depth_sums_the_distribution(p):
    values, depth = path_products(BUSHY.parents, p)
    assert_close(BUSHY.values(p), values, rtol=1e-14)
    assert_close(BUSHY.depth, depth, rtol=0)
    assert_close(BUSHY.tokens_per_step(p), 1 + values.sum(), rtol=1e-14)
    accepted = verify(BUSHY, p, 10_000, seed=1)
    survival = np.asarray(BUSHY.survival(p))
    for d, share in enumerate(survival):
        assert abs(np.mean(accepted >= d) - share) < 4 * np.sqrt(share * (1 - share) / 10_000) + 1e-12
    m1, m2 = TreeAcceptance(BUSHY, jnp.asarray(p)).moments(float(BUSHY.max_depth))
    assert_close(m1, 1 + values.sum(), rtol=1e-13)
    emitted = accepted + 1.0
    assert abs(emitted.mean() - m1) < 4 * emitted.std() / 100
    assert abs((emitted**2).mean() - m2) < 4 * (emitted**2).std() / 100


def test_a_chain_is_a_tree_of_width_one():
    rates = np.array([0.85, 0.7, 0.55, 0.5])
    chain = Tree.regular(1, 4)
    assert chain.parents == (-1, 0, 1, 2)
    assert_close(chain.tokens_per_step(rates[:, None]), chain_pmf(rates) @ np.arange(1, 6), rtol=1e-14)
    for alpha in (0.3, 0.9, 1.0):
        assert_close(Tree.regular(1, 7).tokens_per_step([[alpha]]), geometric_tokens(alpha, 7), rtol=1e-13)
    as_tree, as_chain = TreeAcceptance(chain, jnp.asarray(rates[:, None])), PositionAcceptance(jnp.asarray(rates))
    for k in (0.0, 1.0, 2.5, 4.0):
        assert_close(as_tree.survival(k)[:4], as_chain.survival(k)[:4], rtol=1e-13)
        assert_close(as_tree.pmf(k).sum(), 1.0, rtol=1e-14)


@pytest.mark.parametrize(("width", "depth"), [(1, 5), (2, 4), (3, 3), (4, 2)])
def test_regular_trees_of_independent_candidates(width, depth):
    # width independent candidates, each right with chance alpha: one is accepted with q = 1-(1-alpha)^width, and
    # S_d = q^d, so E = (1-q^(depth+1))/(1-q)
    alpha = 0.35
    p = [alpha * (1 - alpha) ** np.arange(width)]
    tree = Tree.regular(width, depth)
    assert tree.nodes == sum(width**d for d in range(1, depth + 1))
    assert tree.max_depth == depth
    assert_close(tree.tokens_per_step(p), geometric_tokens(1 - (1 - alpha) ** width, depth), rtol=1e-13)


@cache
def every_tree(nodes, max_depth, ranks):
    """Parents of every tree of so many nodes: each further node continues any earlier one."""
    if nodes == 0:
        return ((),)
    found = set()
    for parents in every_tree(nodes - 1, max_depth, ranks):
        for parent in range(-1, nodes - 1):
            longer = (*parents, parent)
            tree = Tree(longer)
            if tree.max_depth <= max_depth and tree.rank.max() <= ranks:
                found.add(longer)
    return tuple(found)


@pytest.mark.parametrize("p", [SORTED, UNSORTED, np.full((4, 3), 0.3)], ids=["sorted", "unsorted", "equal"])
@pytest.mark.parametrize("max_depth", [1, 2, 4])
def test_best_tree_is_the_best_of_all_trees(p, max_depth):
    for budget in range(6):
        best = max(1 + path_products(t, p)[0].sum() for m in range(budget + 1) for t in every_tree(m, max_depth, 3))
        tree = best_tree(budget, p, max_depth)
        assert tree.nodes <= budget
        assert tree.max_depth <= max_depth
        assert_close(tokens(tree, p), best, rtol=1e-13)


def test_best_tree_against_the_largest_path_products():
    # where candidates are sorted, the budget largest path products of the whole tree are closed under parents and
    # better siblings: their sum bounds every tree's and is reached
    p = np.array([[0.55, 0.18, 0.09, 0.05, 0.02]] * 6) * np.linspace(1.0, 0.7, 6)[:, None]
    level, products = np.ones(1), []
    for row in p:
        level = np.outer(level, row).ravel()
        products.append(level)
    largest = np.sort(np.concatenate(products))[::-1]
    for budget in (1, 7, 40, 64):
        assert_close(tokens(best_tree(budget, p, 6), p), 1 + largest[:budget].sum(), rtol=1e-12)


def test_best_tree_against_the_published_recursion():
    # Sequoia's recursion (arXiv 2402.12374; T(m, d, b) of its public tree_search.py), written again with a cache
    p, max_depth = [0.62, 0.21, 0.08, 0.03], 5

    @cache
    def best(m, d, b):  # m nodes with the root, at most d levels with the root's, b branches at the root
        if d == 0 or m < 1:
            return -np.inf
        if b == 0:
            return 1.0 if m == 1 else -np.inf
        return max((best(m - y, d, b - 1) + p[b - 1] * top(y, d - 1) for y in range(1, m)), default=-np.inf)

    @cache
    def top(m, d):
        return max(best(m, d, b) for b in range(len(p) + 1))

    for budget in (1, 2, 5, 11, 24):
        expected = max(top(m, max_depth + 1) for m in range(1, budget + 2))
        assert_close(tokens(best_tree(budget, [p], max_depth), [p]), expected, rtol=1e-12)


def test_growth_with_the_budget():
    # Sequoia: a chain saturates at 1/(1-alpha), the best tree under a power law of rejection goes on growing about
    # like the logarithm of its size
    ranks = np.arange(1, 33)
    rejection = (ranks + 1.0) ** -1.0  # P(none of the first r candidates is accepted)
    p = [-np.diff(np.concatenate([[1.0], rejection]))]
    sizes = [4, 16, 64, 256]
    found = [tokens(best_tree(m, p, 12), p) for m in sizes]
    assert geometric_tokens(0.5, 256) <= 2.0 < found[0]
    gains = np.diff(found)
    assert np.all(gains > 0.6), gains
    assert_close(gains, gains.mean(), rtol=0.25)  # each fourfold budget adds about the same


def step(drafter):
    return RooflineStepTime(weight_read=8e-3, token_compute=4e-5, step_overhead=1e-3, sharpness=6.0, draft=drafter)


def test_best_budget_is_the_best_of_every_budget_and_depth():
    draft = DraftModel(pass_overhead=2e-4, weight_read=5e-4, token_compute=2e-6)
    seconds = jax.jit(lambda state: step(draft)(state).total)
    for n in (1.0, 16.0, 300.0):
        found = best_budget(step(draft), SORTED, sequences=n, context=500.0, max_budget=12, max_depth=4)
        rates = [n / float(seconds(BatchState(n, n, n * 500.0, 0.0, 0.0, 0.0)))]
        for depth in range(1, 5):
            for budget in range(1, 13):
                tree = best_tree(budget, SORTED, depth)
                state = BatchState(n, n * (tree.nodes + 1), n * 500.0, 0.0, float(tree.max_depth), n * tree.nodes)
                rates.append(n * tokens(tree, SORTED) / float(seconds(state)))
        assert_close(found.tokens_per_second, max(rates), rtol=1e-12)
        tree = found.tree
        assert_close(tokens(tree, SORTED), found.tokens_per_step, rtol=1e-12)
        state = BatchState(n, n * (tree.nodes + 1), n * 500.0, 0.0, float(tree.max_depth), n * tree.nodes)
        assert_close(seconds(state), found.step_time, rtol=1e-12)


def test_the_best_budget_shrinks_with_the_batch():
    draft = BlockDrafter(overhead=5e-4)
    sizes = [
        best_budget(step(draft), SORTED, sequences=n, max_budget=48, max_depth=4).tree.nodes for n in (1, 8, 64, 512)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 10 > sizes[-1]
    compute_bound = AffineStepTime(verify_base=1e-6, verify_query=1e-2, draft=draft)
    assert best_budget(compute_bound, [[0.5]], sequences=64, max_budget=8, max_depth=4).tree == Tree([])


def test_predictions_of_a_tree():
    tree, p = Tree.regular(2, 2), jnp.array([[0.6, 0.2]])
    inner = AffineStepTime(
        verify_base=0.01, verify_query=1e-4, draft=DraftModel(pass_overhead=1e-3, token_compute=1e-5)
    )
    model = ServingModel(inner, first_token_steps=0.0)
    config = Configuration(draft_length=2.0, acceptance=TreeAcceptance(tree, p))
    workload = Workload(prompt_length=64, output_length=200, concurrency=4)
    comparison = eqx.filter_jit(model.compare)(workload, config)
    assert_close(comparison.speculative.tokens_per_step, 2.44, rtol=1e-12)
    # 6 nodes and the root, 4 sequences; two passes over 4*3 tokens each on average
    assert_close(comparison.speculative.itl, 0.01 + 28e-4 + 2 * (1e-3 + 12e-5), rtol=1e-12)
    assert_close(comparison.plain.itl, 0.01 + 4e-4, rtol=1e-12)
    half = TreeAcceptance(tree, p).drafted_tokens(1.0)  # a tree cut at half its depth drafts half its nodes on average
    assert half == 3.0


# --- the relaxation ------------------------------------------------------------------------------------------------

relaxed = jax.jit(
    jax.vmap(lambda w, d: (lambda t: (t.tokens_per_step(), t.nodes()))(RegularTree(w, d, jnp.asarray(SORTED))))
)


def test_relaxation_is_exact_at_whole_trees():
    pairs = [(w, d) for w in (1, 2, 3) for d in (1, 2, 3, 4)]
    emitted, nodes = relaxed(*np.array(pairs, dtype=float).T)
    assert_close(emitted, [tokens(Tree.regular(w, d), SORTED) for w, d in pairs], rtol=1e-13)
    assert_close(nodes, [Tree.regular(w, d).nodes for w, d in pairs], rtol=1e-12)
    near = relaxed(np.array([1 + 1e-9, 1 + 9e-5, 1 + 1.1e-4]), np.full(3, 3.0))[1]
    assert_close(near, [sum((1 + e) ** d for d in (1, 2, 3)) for e in (1e-9, 9e-5, 1.1e-4)], rtol=1e-12)


def test_relaxation_is_monotone_and_smooth():
    width, depth = np.meshgrid(np.linspace(1, 3, 41), np.linspace(0, 4, 41))
    for values in (np.asarray(x).reshape(41, 41) for x in relaxed(width.ravel(), depth.ravel())):
        assert np.all(np.diff(values, axis=0) > -1e-14)
        assert np.all(np.diff(values, axis=1) > -1e-14)

    def both(x):
        return jnp.stack(relaxed(x[:1], x[1:])).ravel()

    slopes = jax.jit(jax.jacfwd(both))
    for point in ([1.4, 2.3], [2.0, 3.0], [2.7, 1.6], [1.00005, 2.5]):
        for i in (0, 1):
            shift = np.eye(2)[i] * 1e-6
            numeric = (both(np.array(point) + shift) - both(np.array(point) - shift)) / 2e-6
            assert_close(np.asarray(slopes(np.array(point)))[:, i], numeric, rtol=1e-5, atol=1e-8)


def test_gradients_of_a_tree_in_its_probabilities():
    acceptance = TreeAcceptance(BUSHY, jnp.asarray(SORTED))
    slope = jax.jit(jax.grad(lambda a: a.moments(4.0)[1]))(acceptance).probabilities
    for i, j in ((0, 0), (1, 1), (3, 0)):
        shift = np.zeros_like(SORTED)
        shift[i, j] = 1e-6
        up, down = (TreeAcceptance(BUSHY, jnp.asarray(SORTED + s * shift)).moments(4.0)[1] for s in (1, -1))
        assert_close(slope[i, j], (up - down) / 2e-6, rtol=1e-7, atol=1e-9)


def test_ascent_on_the_relaxation_finds_the_best_regular_tree():
    model, n = step(DraftModel(pass_overhead=1e-4, weight_read=3e-4, token_compute=2e-6)), 12.0
    p = jnp.asarray(np.array([[0.5, 0.2, 0.1, 0.05]]))

    def rate(w, d):
        tree = RegularTree(w, d, p)
        nodes = tree.nodes()
        return jnp.log(tree.tokens_per_step() / model(BatchState(n, n * (nodes + 1), 0.0, 0.0, d, n * nodes)).total)

    @jax.jit
    def climb(x):
        def body(_, x):
            slope = jax.grad(lambda x: rate(x[0], x[1]))(x)
            return jnp.clip(x + 0.5 * slope / (1.0 + jnp.abs(slope)), 1.0, jnp.array([4.0, 8.0]))

        return jax.lax.fori_loop(0, 2000, body, x)

    whole = [(w, d) for w in range(1, 5) for d in range(1, 9)]
    grid = dict(zip(whole, np.asarray(jax.jit(jax.vmap(rate))(*np.array(whole, dtype=float).T)), strict=True))
    width, depth = max(grid, key=grid.get)
    top = np.asarray(climb(jnp.array([1.5, 2.0])))
    assert float(rate(top[0], top[1])) >= grid[(width, depth)] - 1e-9
    around = [(w, d) for w in {int(top[0]), int(np.ceil(top[0]))} for d in {int(top[1]), int(np.ceil(top[1]))}]
    assert (width, depth) in around


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tree([0]),
        lambda: Tree([-1, 2]),
        lambda: Tree.regular(4, 9),
        lambda: Tree([-1, -1]).values([[0.5]]),
        lambda: Tree([-1, 0]).values([[0.5], [1.2]]),
        lambda: best_tree(4, [[0.7, 0.6]], 2),
        lambda: best_tree(4, [[0.5], [0.5]], 3),
        lambda: best_tree(-1, [[0.5]], 3),
        lambda: best_tree(4, [[0.5]], 0),
        lambda: best_budget(AffineStepTime(verify_base=1.0), [[0.5]], sequences=0),
        lambda: best_budget(AffineStepTime(verify_base=1.0), [[0.5]], sequences=4, context=-5.0),
        lambda: best_budget(AffineStepTime(verify_base=1.0), [[0.5]], sequences=4, context=float("nan")),
        lambda: Tree.regular(0, 3),
        lambda: Tree.regular(-1, 2),
        lambda: Tree.regular(2, -1),
        lambda: Tree.regular(10**9, 10),  # at once, and without the memory for them
        lambda: Tree([-1]).values([["a"]]),
        lambda: Tree([-1]).values([[0.5], [0.2, 0.1]]),
        lambda: TreeAcceptance(Tree([]), jnp.array([[0.5]])),
        lambda: TreeAcceptance(Tree.regular(1, 33), jnp.array([[0.5]])),
        lambda: RegularTree(0.5, 2.0, jnp.array([[0.5]])),
        lambda: RegularTree(2.0, 2.0, jnp.array([[0.5]])),
    ],
)
def test_bad_input_is_named(make):
    with pytest.raises(InputError, match=r"allowed|needs"):
        make()


def test_constant_acceptance_is_the_chain_of_the_relaxation():
    alpha, k = 0.7, 5.0
    chain = RegularTree(1.0, k, jnp.array([[alpha]]))
    assert_close(chain.tokens_per_step(), ConstantAcceptance(alpha).tokens_per_step(k), rtol=1e-13)
    assert_close(chain.nodes(), k, rtol=1e-13)
