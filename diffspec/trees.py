"""Tree drafts: several candidates at each draft position, verified together.

| on paper (Sequoia, arXiv 2402.12374)                              | in code                        |
|-------------------------------------------------------------------|--------------------------------|
| p_d(r): P(the r-th candidate at depth d is the accepted one, given its parent was) | ``probabilities[d-1, r-1]`` |
| value of a node: product of p along its path from the root        | :meth:`Tree.values`            |
| E = 1 + sum of the values of all nodes                            | :meth:`Tree.tokens_per_step`   |
| S_d = sum of the values at depth d = P(at least d drafts accepted) | ``TreeAcceptance.survival``   |
| T(m, d): best value of a subtree of m nodes rooted at depth d     | :mod:`diffspec.tree_search`    |

At most one candidate of each parent is accepted, so the accepted path is unique and the depths' sums S_d are all that
moments and step counts need: a tree predicts like a chain whose conditional rates are S_d/S_(d-1). It costs more: all
its nodes are drafted and verified. A chain is the tree of width 1.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from diffspec.acceptance import MAX_DRAFT_LENGTH, AbstractPositionwise, monotone_weights
from diffspec.parameters import Scalar
from diffspec.results import InputError
from diffspec.workload import as_numbers

MAX_NODES = 1024
"""Most drafted nodes of a tree [tok]."""


class Tree:
    """A tree of drafted tokens: ``parents[i]`` is the node that node i continues, -1 for the verified token (the root).

    Parents come before their children; the children of a node are its candidates in order of rank. ``depth`` and
    ``rank`` (both from 1) are derived, ``nodes`` counts the drafted tokens, the root not among them.

    >>> tree = Tree([-1, -1, 0])  # two candidates, and one more token after the better one
    >>> tree.nodes, tree.max_depth, tree.rank.tolist()
    (3, 2, [1, 2, 1])
    """

    def __init__(self, parents: Sequence[int]):
        known = as_numbers("parents", parents)
        if known.ndim != 1 or not np.all(np.isfinite(known)) or np.any(known != np.round(known)):
            raise InputError(f"parents: got {parents!r}; allowed: whole numbers, -1 or an earlier node each")
        self.parents = tuple(int(parent) for parent in known)
        if len(self.parents) > MAX_NODES or any(not -1 <= p < i for i, p in enumerate(self.parents)):
            raise InputError(f"parents: allowed: at most {MAX_NODES}, each -1 or an earlier node")
        depth, rank, children = [], [], {}
        for parent in self.parents:
            depth.append(1 if parent < 0 else depth[parent] + 1)
            children[parent] = children.get(parent, 0) + 1
            rank.append(children[parent])
        self.depth, self.rank = np.array(depth, dtype=int), np.array(rank, dtype=int)

    @classmethod
    def regular(cls, width: int, depth: int) -> "Tree":
        """Every node down to ``depth`` has ``width`` children; a chain for width 1.

        >>> Tree.regular(2, 3).nodes
        14
        """
        for name, value, low in (("width", width, 1), ("depth", depth, 0)):
            check_whole(name, value, low, MAX_NODES)
        parents, level = [], [-1]
        for _ in range(depth):
            if len(parents) + len(level) * width > MAX_NODES:
                raise InputError(f"width {width}, depth {depth}: allowed: at most {MAX_NODES} nodes")
            first = len(parents)
            parents += [parent for parent in level for _ in range(width)]
            level = list(range(first, len(parents)))
        return cls(parents)

    @property
    def nodes(self) -> int:
        """Drafted tokens [tok]."""
        return len(self.parents)

    @property
    def max_depth(self) -> int:
        """Sequential draft passes that grow the tree level by level [1]; the most drafts that can be accepted."""
        return int(self.depth.max(initial=0))

    def __eq__(self, other):
        return isinstance(other, Tree) and self.parents == other.parents

    def __hash__(self):
        return hash(self.parents)

    def __repr__(self):
        return f"Tree({list(self.parents)})"

    def values(self, probabilities) -> Float[Array, "nodes"]:
        """P(node is accepted): the product of p along its path; differentiable in ``probabilities``."""
        probabilities = check_probabilities(probabilities, self)
        found = jnp.ones(self.nodes + 1, dtype=probabilities.dtype)  # the last one is the root
        parents = np.array(self.parents, dtype=int) % (self.nodes + 1)
        for depth in range(1, self.max_depth + 1):
            here = np.flatnonzero(self.depth == depth)
            found = found.at[here].set(found[parents[here]] * probabilities[depth - 1, self.rank[here] - 1])
        return found[:-1]

    def survival(self, probabilities) -> Float[Array, "depths"]:
        """S_0..S_max_depth: P(at least d drafts are accepted)."""
        sums = jax.ops.segment_sum(self.values(probabilities), self.depth - 1, self.max_depth)
        return jnp.concatenate([jnp.ones(1, dtype=sums.dtype), sums])

    def tokens_per_step(self, probabilities) -> Float[Array, ""]:
        """E = 1 + sum of path products [tok], the bonus token included.

        >>> p = [[0.6, 0.2], [0.5, 0.1]]
        >>> round(float(Tree([-1, -1, 0]).tokens_per_step(p)), 6)
        2.1
        """
        return jnp.sum(self.survival(probabilities))


def check_whole(name: str, value: int, low: int, high: int) -> None:
    """Raise :class:`InputError` unless ``value`` is a whole number in [low, high]."""
    if not isinstance(value, int | np.integer) or not low <= value <= high:
        raise InputError(f"{name}: got {value!r}; allowed: a whole number, {low} to {high}")


def check_probabilities(probabilities, tree: Tree | None = None):
    """Candidates' probabilities as an array [depth, rank]; one row serves every depth of a tree that is deeper.

    Errors: :class:`InputError` unless each is in [0, 1], rows sum to at most 1, and every node of ``tree`` has one.
    """
    traced = isinstance(probabilities, Tracer) or eqx.is_array(probabilities)
    array = jnp.atleast_2d(jnp.asarray(probabilities if traced else as_numbers("probabilities", probabilities), float))
    if array.ndim != 2 or not array.size:
        raise InputError("probabilities: allowed: a matrix, one row for each depth, one column for each rank")
    if not isinstance(array, Tracer):
        known = np.asarray(array)
        if not np.all((known >= 0) & (known <= 1)) or np.any(known.sum(axis=1) > 1 + 1e-9):
            raise InputError("probabilities: allowed: [0, 1] each, at most 1 over the candidates of one parent")
    if tree is None or not tree.nodes:
        return array
    if array.shape[0] == 1:
        array = jnp.broadcast_to(array, (tree.max_depth, array.shape[1]))
    if array.shape[0] < tree.max_depth or array.shape[1] < tree.rank.max():
        raise InputError(
            f"probabilities: got {array.shape[0]} depths, {array.shape[1]} ranks; "
            f"the tree needs {tree.max_depth} and {int(tree.rank.max())}"
        )
    return array


class TreeAcceptance(AbstractPositionwise):
    """Acceptance of a tree draft, for a ``Configuration`` whose draft_length is the tree's max_depth (at most 32).

    A shorter draft_length cuts the tree at that depth; a prediction charges for nodes*draft_length/max_depth tokens.

    >>> acceptance = TreeAcceptance(Tree.regular(2, 2), jnp.array([[0.6, 0.2]]))
    >>> [round(float(acceptance.tokens_per_step(depth)), 4) for depth in (0, 1, 2)]
    [1.0, 1.8, 2.44]
    """

    tree: Tree = eqx.field(static=True)
    probabilities: Float[Array, "depths ranks"]

    def __check_init__(self):
        if not 1 <= self.tree.max_depth <= MAX_DRAFT_LENGTH:
            raise InputError(f"tree: got depth {self.tree.max_depth}; allowed: 1 to {MAX_DRAFT_LENGTH}")
        check_probabilities(self.probabilities, self.tree)

    def conditional_rates(self, draft_length: Scalar) -> Float[Array, "32"]:
        survival = self.tree.survival(self.probabilities)
        before, after = survival[:-1], survival[1:]
        rates = jnp.where(before > 0, after / jnp.where(before > 0, before, 1.0), 0.0)
        return jnp.pad(rates, (0, MAX_DRAFT_LENGTH - rates.shape[0]))

    def position_weights(self, draft_length: Scalar) -> Float[Array, "32"]:
        return monotone_weights(self.conditional_rates(draft_length), draft_length)

    def drafted_tokens(self, draft_length: Scalar) -> Scalar:
        """nodes*draft_length/max_depth [tok]."""
        return draft_length * (self.tree.nodes / max(self.tree.max_depth, 1))
