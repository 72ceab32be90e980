"""Tree shapes to choose among: the best tree of every budget and depth as arrays, and what lies between them as reals.

A shape is one of many that one compiled program must serve, so :class:`ShapeAcceptance` holds what a prediction needs
of a tree (:mod:`diffspec.trees`) as arrays: S_d/S_(d-1) by depth, its nodes and its depth. Gradients move the width and
depth of a regular tree instead (:class:`RegularTreeAcceptance`), and the whole shapes near it are then evaluated.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from diffspec.acceptance import MAX_DRAFT_LENGTH, AbstractPositionwise, monotone_weights
from diffspec.parameters import Scalar
from diffspec.tree_search import RegularTree, best_trees
from diffspec.trees import Tree


class ShapeAcceptance(AbstractPositionwise):
    """Acceptance of one tree, drafted whole (``draft_length`` = ``depth``) or not at all (0).

    ``rates``: S_d/S_(d-1), 0 below the last level; ``nodes`` [tok]: drafted and verified; ``depth`` [tok].
    """

    rates: Float[Array, "32"]
    nodes: Scalar
    depth: Scalar

    def conditional_rates(self, draft_length: Scalar) -> Float[Array, "32"]:
        return self.rates

    def position_weights(self, draft_length: Scalar) -> Float[Array, "32"]:
        return monotone_weights(self.rates, draft_length)

    def drafted_tokens(self, draft_length: Scalar) -> Scalar:
        """nodes*draft_length/depth [tok]."""
        return self.nodes * draft_length / self.depth


class RegularTreeAcceptance(AbstractPositionwise):
    """Acceptance of the regular tree of real ``width`` >= 1 whose depth is the draft length; smooth in both.

    >>> import jax.numpy as jnp
    >>> acceptance = RegularTreeAcceptance(2.0, jnp.array([[0.6, 0.2]]))
    >>> round(float(acceptance.tokens_per_step(3.0)), 4), round(float(acceptance.drafted_tokens(3.0)), 4)
    (2.952, 14.0)
    """

    width: Scalar
    probabilities: Float[Array, "depths ranks"]

    def conditional_rates(self, draft_length: Scalar) -> Float[Array, "32"]:
        return RegularTree(self.width, draft_length, self.probabilities).conditional_rates()

    def position_weights(self, draft_length: Scalar) -> Float[Array, "32"]:
        return monotone_weights(self.conditional_rates(draft_length), draft_length)

    def drafted_tokens(self, draft_length: Scalar) -> Scalar:
        """Nodes of the tree [tok]."""
        return RegularTree(self.width, draft_length, self.probabilities).nodes()


class TreeShapes(NamedTuple):
    """``trees``, and of each its ``nodes`` and ``depth`` [shapes] and the conditional ``rates`` of each class
    [classes, shapes, 32]; ``candidates`` [classes, depths, ranks]: the probabilities that they come from."""

    trees: tuple[Tree, ...]
    nodes: np.ndarray
    depth: np.ndarray
    rates: np.ndarray
    candidates: np.ndarray


def tree_shapes(by_class: list[np.ndarray], shares: np.ndarray, *, max_nodes: int, max_depth: int) -> TreeShapes:
    """The trees of most tokens per step for every budget up to ``max_nodes`` and depth limit up to ``max_depth``, each
    once, in order of nodes, then depth.

    ``by_class``: P(the r-th candidate at depth d is accepted, given its parent was) of each class of requests [depth,
    rank]; the last row serves deeper levels. A batch drafts one shape for all, so trees are best for the mean of the
    classes by ``shares``.

    >>> found = tree_shapes([np.array([[0.6, 0.3]])], np.ones(1), max_nodes=2, max_depth=2)
    >>> [tree.parents for tree in found.trees]
    [(-1,), (-1, -1), (-1, 0)]
    """
    depths, ranks = (max(table.shape[axis] for table in by_class) for axis in (0, 1))
    tables = [_widened(table, max(depths, max_depth), ranks) for table in by_class]
    mean = np.tensordot(np.asarray(shares) / np.sum(shares), np.stack(tables), 1)
    found = {tree for limit in range(1, max_depth + 1) for tree in best_trees(max_nodes, mean, limit) if tree.nodes}
    trees = tuple(sorted(found, key=lambda tree: (tree.nodes, tree.max_depth, tree.parents)))
    rates = np.zeros((len(tables), len(trees), MAX_DRAFT_LENGTH))
    for number, tree in enumerate(trees):
        for which, table in enumerate(tables):
            survival = _survival(tree, table)
            before = np.where(survival[:-1] > 0, survival[:-1], 1.0)
            rates[which, number, : tree.max_depth] = survival[1:] / before
    nodes, depth = (np.asarray([float(getattr(tree, name)) for tree in trees]) for name in ("nodes", "max_depth"))
    return TreeShapes(trees, nodes, depth, rates, np.stack(tables))


def _survival(tree: Tree, table: np.ndarray) -> np.ndarray:
    """:meth:`Tree.survival` of many trees, for which compiling one program each would take longer."""
    value = np.ones(tree.nodes + 1)  # the last one is the root
    for node, parent in enumerate(tree.parents):
        value[node] = value[parent] * table[tree.depth[node] - 1, tree.rank[node] - 1]
    return np.concatenate([[1.0], np.bincount(tree.depth, value[:-1], tree.max_depth + 1)[1:]])


def _widened(table: np.ndarray, depths: int, ranks: int) -> np.ndarray:
    rows = np.concatenate([table, np.repeat(table[-1:], depths - len(table), axis=0)])
    return np.pad(rows, ((0, 0), (0, ranks - table.shape[1])))
