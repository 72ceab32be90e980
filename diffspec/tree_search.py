"""Which tree to draft: the best one under a node budget, the budget that pays at a batch, and a smooth relaxation."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffspec.acceptance import MAX_DRAFT_LENGTH, monotone_weights
from diffspec.batch_state import BatchState
from diffspec.parameters import Scalar
from diffspec.results import InputError
from diffspec.step_time import AbstractStepTime
from diffspec.trees import MAX_NODES, Tree, check_probabilities, check_whole
from diffspec.workload import check_range


class BestTree(NamedTuple):
    """A tree, its E [tok], the step time [s] it was chosen with, and the tokens per second of all sequences [tok/s]."""

    tree: Tree
    tokens_per_step: float
    step_time: float
    tokens_per_second: float


def best_tree(budget: int, probabilities, max_depth: int) -> Tree:
    """The tree of at most ``budget`` nodes and ``max_depth`` levels with the largest tokens per step; exact.

    Dynamic programme: T_d(m) = 1 + max over widths b of C_d(b, m-1), the best value of a subtree of m nodes rooted at
    depth d (T_max_depth(1) = 1); C_d(b, m) = max over y of C_d(b-1, m-y) + p_(d+1)(b)*T_(d+1)(y). Time
    O(max_depth*ranks*budget^2). ``probabilities`` as in :func:`check_probabilities`, a single row for all depths.

    >>> best_tree(3, [[0.6, 0.3]], max_depth=3).parents  # a second candidate (0.3) beats a third level (0.216)
    (-1, -1, 0)
    """
    programme = _Programme(budget, _host(probabilities, max_depth), max_depth)
    return programme.tree(int(np.argmax(programme.best)))


def best_trees(budget: int, probabilities, max_depth: int) -> list[Tree]:
    """:func:`best_tree` of exactly 0, 1, ..., ``budget`` nodes, where there is a tree of so many; from one programme.

    >>> [tree.parents for tree in best_trees(2, [[0.6, 0.3]], max_depth=3)]
    [(), (-1,), (-1, 0)]
    """
    programme = _Programme(budget, _host(probabilities, max_depth), max_depth)
    return [programme.tree(size) for size in range(budget + 1) if np.isfinite(programme.best[size])]


def best_budget(
    step_time: AbstractStepTime,
    probabilities,
    *,
    sequences: float | int,
    context: float | int = 0.0,
    max_budget: int = 64,
    max_depth: int = 8,
) -> BestTree:
    """The tree that emits most tokens per second in a batch of ``sequences`` with ``context`` cached tokens each.

    Scores E/step time of the best tree of every budget 0..max_budget and depth limit 0..max_depth, 0 being no
    speculation: query_tokens = sequences*(nodes+1), draft_passes = depth, draft_tokens = sequences*nodes. Sequoia's
    hardware-aware choice, at any load.
    """
    check_range("sequences", sequences, 0, 1e9, low_open=True, unit="req")
    check_range("context", context, 0, 1e9, low_open=False, unit="tok")
    check_whole("max_budget", max_budget, 0, MAX_NODES)
    known = _host(probabilities, max_depth)
    programmes = [_Programme(max_budget, known, limit) for limit in range(1, max_depth + 1)]
    tokens = np.stack([np.r_[1.0, np.full(max_budget, -np.inf)], *(programme.best for programme in programmes)])
    depth, nodes = (grid.ravel().astype(float) for grid in np.indices(tokens.shape))

    def seconds(nodes, depth):
        n = jnp.asarray(float(sequences))
        return step_time(BatchState(n, n * (nodes + 1), n * context, 0.0, depth, n * nodes)).total

    times = np.asarray(jax.vmap(seconds)(jnp.asarray(nodes), jnp.asarray(depth))).reshape(tokens.shape)
    limit, size = np.unravel_index(int(np.argmax(np.where(tokens > 0, tokens / times, 0.0))), tokens.shape)
    tree = Tree([]) if limit == 0 else programmes[limit - 1].tree(int(size))
    emitted, time = float(tokens[limit, size]), float(times[limit, size])
    return BestTree(tree, emitted, time, float(sequences) * emitted / time)


class RegularTree(eqx.Module):
    """Regular trees of real-valued ``width`` >= 1 and ``depth``: smooth, and exact at whole values.

    Between whole widths the candidates' joint probability q_d(width) follows the monotone cubic of
    :func:`diffspec.acceptance.monotone_weights`; so does E between whole depths, with conditional rates q_d. Nodes
    follow the geometric sum (width^(depth+1) - width)/(width - 1). Both are differentiable: put them into a step time
    and move width and depth by a gradient method; then round, or ask :func:`best_budget`.

    >>> tree = RegularTree(2.0, 3.0, jnp.array([[0.6, 0.2]]))
    >>> round(float(tree.tokens_per_step()), 4), round(float(tree.nodes()), 4)
    (2.952, 14.0)
    """

    width: Scalar
    depth: Scalar
    probabilities: Float[Array, "depths ranks"]

    def __check_init__(self):
        if not eqx.is_array_like(self.probabilities) or self.probabilities.ndim != 2:
            raise InputError("probabilities: allowed: an array, one row for each depth, one column for each rank")
        check_range("width", self.width, 1, self.probabilities.shape[1], low_open=False, unit="candidates")
        check_range("depth", self.depth, 0, MAX_DRAFT_LENGTH, low_open=False, unit="tok")
        if self.probabilities.shape[0] > MAX_DRAFT_LENGTH or self.probabilities.shape[1] > MAX_DRAFT_LENGTH:
            raise InputError(f"probabilities: allowed: at most {MAX_DRAFT_LENGTH} depths and ranks")
        check_probabilities(self.probabilities)

    def conditional_rates(self) -> Float[Array, "32"]:
        """q_1..q_32: P(one of the candidates at depth d is accepted, given their parent was); the last row repeats."""
        rows = jax.vmap(lambda row: _sum_of_first(row, self.width))(self.probabilities)
        return jnp.concatenate([rows, jnp.broadcast_to(rows[-1:], (MAX_DRAFT_LENGTH - rows.shape[0],))])

    def tokens_per_step(self) -> Float[Array, ""]:
        """E(width, depth) [tok]."""
        rates = self.conditional_rates()
        return 1.0 + jnp.sum(jnp.cumprod(rates) * monotone_weights(rates, self.depth))

    def nodes(self) -> Float[Array, ""]:
        """Drafted tokens [tok]: width + width^2 + ... + width^depth."""
        width, depth = jnp.asarray(self.width, dtype=float), jnp.asarray(self.depth, dtype=float)
        log_width = jnp.log(width)
        narrow = jnp.abs(log_width) < 1e-4
        wide = jnp.where(narrow, 1.0, log_width)  # double where: no 0/0 in the branch not taken
        x = depth * log_width
        series = depth * (1 + x / 2 + x**2 / 6 + x**3 / 24) / (1 + log_width / 2 + log_width**2 / 6 + log_width**3 / 24)
        return width * jnp.where(narrow, series, jnp.expm1(depth * wide) / jnp.expm1(wide))


def _sum_of_first(row, width):
    """Sum of the first ``width`` entries of ``row``, the monotone cubic of its running sum in between."""
    gains = jnp.pad(row, (0, MAX_DRAFT_LENGTH - row.shape[0]))
    before = jnp.concatenate([gains[:1], gains[:-1]])
    ratios = jnp.where(before > 0, gains / jnp.where(before > 0, before, 1.0), 0.0)
    return jnp.sum(gains * monotone_weights(ratios, width))


def _host(probabilities, max_depth: int) -> np.ndarray:
    check_whole("max_depth", max_depth, 1, MAX_DRAFT_LENGTH)
    array = np.asarray(check_probabilities(probabilities))
    if array.shape[0] == 1:
        array = np.broadcast_to(array, (max_depth, array.shape[1]))
    if array.shape[0] < max_depth:
        raise InputError(f"probabilities: got {array.shape[0]} depths; allowed: 1, or at least max_depth = {max_depth}")
    return array[:max_depth]


class _Programme:
    """Best trees of every budget up to ``budget``, at most ``max_depth`` deep; ``best[m]`` = E with exactly m nodes."""

    def __init__(self, budget: int, probabilities: np.ndarray, max_depth: int):
        check_whole("budget", budget, 0, MAX_NODES)
        sizes = np.arange(budget + 1)
        gap = sizes[:, None] - sizes[None, :]  # nodes left for the candidates before the last one
        self.widths, self.shares = [], []
        below = np.where(sizes == 1, 1.0, -np.inf)  # T at the deepest level: a leaf
        for row in probabilities[max_depth - 1 :: -1]:
            children = [np.where(sizes == 0, 0.0, -np.inf)]
            shares = [np.zeros(budget + 1, dtype=int)]
            for chance in row:
                whole = np.where(gap >= 0, children[-1][gap], -np.inf)
                whole = whole + np.where(sizes >= 1, chance * np.where(np.isfinite(below), below, 0.0), -np.inf)
                whole = np.where(np.isfinite(below)[None, :], whole, -np.inf)
                shares.append(np.argmax(whole, axis=1))
                children.append(np.max(whole, axis=1))
            self.widths.append(np.argmax(children, axis=0))
            self.shares.append(shares)
            inside = 1.0 + np.max(children, axis=0)
            below = np.concatenate([[-np.inf], inside[:-1]])  # a subtree's size counts its root
            self.best = inside
        self.widths.reverse()
        self.shares.reverse()

    def tree(self, size: int) -> Tree:
        """The best tree of exactly ``size`` drafted nodes."""
        parents: list[int] = []
        waiting = [(-1, 0, size)]  # a node, its depth, the nodes below it
        for parent, depth, left in waiting:
            if not left:
                continue
            sizes = []
            for width in range(int(self.widths[depth][left]), 0, -1):
                sizes.append(int(self.shares[depth][width][left]))
                left -= sizes[-1]
            for share in reversed(sizes):
                parents.append(parent)
                waiting.append((len(parents) - 1, depth + 1, share - 1))
        return Tree(parents)
