"""Where the copies of experts lie: placements, the load of ranks, and the heuristics to compare with.

A server with R ranks has S slots for experts in each layer, S/R on each rank: one for each of its M experts and N for
further copies (redundant experts). A placement names the expert of every slot.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffspec.experts import CoverageTable, ExpertRouting, log_nodes
from diffspec.results import InputError


@dataclass(frozen=True)
class ExpertPlacement:
    """``slots`` [layers, S]: the expert of each slot, rank by rank; ``ranks``: R; ``experts``: M."""

    slots: np.ndarray
    ranks: int
    experts: int

    @property
    def copies(self) -> np.ndarray:
        """Copies of each expert [layers, experts]."""
        return np.stack([np.bincount(layer, minlength=self.experts) for layer in self.slots])

    @property
    def on_rank(self) -> np.ndarray:
        """Copies of each expert on each rank [layers, ranks, experts]."""
        of = self.slots.reshape(len(self.slots), self.ranks, -1)
        return (of[..., None] == np.arange(self.experts)).sum(axis=2)

    def loads(self, popularity: np.ndarray) -> np.ndarray:
        """Experts that a token keeps busy on each rank, on average [layers, ranks]; they sum to experts_per_token.

        >>> spread = ExpertPlacement(np.array([[0, 1, 0, 2]]), 2, 3)
        >>> spread.loads(np.array([[0.8, 0.5, 0.7]]))
        array([[0.9, 1.1]])
        """
        each = np.asarray(popularity) / self.copies
        return np.take_along_axis(each, self.slots, axis=1).reshape(len(self.slots), self.ranks, -1).sum(axis=2)

    def max_rank_load(self, popularity: np.ndarray) -> float:
        """Largest load of a rank in any layer."""
        return float(self.loads(popularity).max())

    def load_imbalance(self, popularity: np.ndarray) -> float:
        """Largest over mean load of a rank, mean over layers: :meth:`diffspec.experts.ExpertRouting.load_imbalance`."""
        loads = self.loads(popularity)
        return float((loads.max(axis=1) / loads.mean(axis=1)).mean())

    def routing(self, popularity: np.ndarray) -> ExpertRouting:
        """The placement as the step time takes it."""
        return ExpertRouting.from_slots(popularity, self.slots, self.ranks)

    def table(self, popularity: np.ndarray) -> CoverageTable:
        """:meth:`CoverageTable.of` of :meth:`routing`, without a compiled program: a millisecond a layer."""
        log_coverage, elasticity, imbalance = (jnp.asarray(part) for part in self.curves(popularity))
        return CoverageTable(log_coverage, elasticity, imbalance)

    def curves(self, popularity: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The leaves of :meth:`table`: log coverage [nodes], its elasticity [nodes], load imbalance."""
        copies, log_tokens = self.copies, log_nodes()
        tokens, nodes = np.exp(log_tokens), np.arange(log_tokens.size)
        covered, slopes = np.zeros(log_tokens.size), np.zeros(log_tokens.size)
        for layer, on_rank in enumerate(self.on_rank):
            log_miss = np.log(np.maximum(1.0 - popularity[layer] / copies[layer], np.finfo(float).tiny))[:, None]
            exponent = log_miss * tokens
            missed = np.exp(exponent)
            read = on_rank.astype(float) @ -np.expm1(exponent)
            slowest = read.argmax(axis=0)
            covered += read[slowest, nodes]
            slopes += np.einsum("ne,en->n", on_rank[slowest], -exponent * missed)
        mean = covered / len(self.slots) / (self.experts / self.ranks)
        return np.log(mean), slopes / covered, np.asarray(self.load_imbalance(popularity))


@dataclass(frozen=True)
class Placing:
    """``placements`` by name of experts of this ``popularity`` [layers, experts], for a decision to choose from;
    ``caps`` [layers]: the largest load of a rank that placements which are looked for beside them may have, None: no
    others are looked for."""

    popularity: np.ndarray
    placements: Mapping[str, ExpertPlacement]
    caps: np.ndarray | None = None

    @property
    def copies(self) -> int:
        """Further copies of experts in each layer."""
        return max((one.slots.shape[1] - one.experts for one in self.placements.values()), default=0)

    def tables(self) -> dict[str, CoverageTable]:
        """The placements as the step time takes them."""
        return {name: placement.table(self.popularity) for name, placement in self.placements.items()}


def check_slots(experts: int, ranks: int, redundant: int) -> int:
    """Slots of a rank. :class:`InputError` where ranks cannot have equally many.

    >>> check_slots(256, 8, 32)
    36
    """
    if not 1 <= ranks <= experts:
        raise InputError(f"expert_ranks: got {ranks}; allowed: 1 to {experts}, the number of experts")
    if redundant < 0 or redundant > experts * (ranks - 1):
        raise InputError(f"redundant_experts: got {redundant}; allowed: 0 to {experts * (ranks - 1)}")
    if (experts + redundant) % ranks:
        low = redundant - (experts + redundant) % ranks
        near = " or ".join(str(value) for value in (low, low + ranks) if value >= 0)
        raise InputError(
            f"redundant_experts: got {redundant}: {experts + redundant} copies cannot lie equally on {ranks} ranks; "
            f"allowed: {near}"
        )
    return (experts + redundant) // ranks


def round_robin(popularity: np.ndarray, ranks: int, redundant: int = 0) -> ExpertPlacement:
    """Copy i (expert i modulo M) on rank i modulo R, whatever the popularity.

    >>> round_robin(np.ones((1, 4)), 2).slots
    array([[0, 2, 1, 3]])
    """
    layers, experts = np.shape(popularity)
    size = check_slots(experts, ranks, redundant)
    slots = (np.arange(size)[None, :] * ranks + np.arange(ranks)[:, None]).reshape(-1) % experts
    return ExpertPlacement(np.tile(slots, (layers, 1)), ranks, experts)


def eplb(popularity: np.ndarray, ranks: int, redundant: int = 0, *, groups: int = 1, nodes: int = 1) -> ExpertPlacement:
    """DeepSeek's expert-parallelism load balancer, in our words and our code (github.com/deepseek-ai/EPLB, eplb.py).

    Global: each of the N further copies goes to the expert whose copies carry most each (p_e/c_e); then the copies,
    heaviest first, each go to the rank with the smallest load of those that have a free slot. Hierarchical, where the
    groups of neighbouring experts divide equally among nodes: groups, heaviest first, are packed onto nodes in the same
    way, and each node then copies and packs its own experts onto its own ranks. As there, groups that nodes do not
    divide are ignored, and with one slot a rank copies stay in order. Ties go to the expert, copy and rank named first.

    Errors: :class:`InputError` where ranks, groups or nodes do not divide what they share.

    >>> eplb(np.array([[0.9, 0.5, 0.4, 0.2]]), 2).slots
    array([[0, 3, 1, 2]])
    """
    popularity = np.asarray(popularity, dtype=float)
    experts = popularity.shape[1]
    check_slots(experts, ranks, redundant)
    if groups < 1 or experts % groups:
        raise InputError(f"expert_groups: got {groups}; allowed: a divisor of the {experts} experts")
    if nodes < 1 or ranks % nodes or redundant % nodes:
        raise InputError(
            f"nodes: got {nodes}; allowed: a divisor of {ranks} ranks and of {redundant} redundant experts"
        )
    if groups % nodes:
        groups = nodes = 1
    slots = np.stack([_balanced(layer, ranks, redundant, groups, nodes) for layer in popularity])
    return ExpertPlacement(slots, ranks, experts)


def _balanced(load: np.ndarray, ranks: int, redundant: int, groups: int, nodes: int) -> np.ndarray:
    members = np.arange(load.size).reshape(groups, -1)
    slots = []
    for packed in packing(load[members].sum(axis=1), nodes):
        own = members[packed].ravel()
        copies = np.ones(own.size, int)
        replicas = list(range(own.size))
        for _ in range(redundant // nodes):
            busiest = int(np.argmax(load[own] / copies))
            copies[busiest] += 1
            replicas.append(busiest)
        for on_rank in packing((load[own] / copies)[replicas], ranks // nodes):
            slots += [own[replicas[copy]] for copy in on_rank]
    return np.asarray(slots)


def packing(weights: np.ndarray, packs: int) -> list[list[int]]:
    """Items of each of ``packs`` packs of equally many items: heaviest first, to the lightest pack with room."""
    size = len(weights) // packs
    if size == 1:
        return [[item] for item in range(packs)]
    held: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in np.argsort(-np.asarray(weights), kind="stable"):
        lightest = min((pack for pack in range(packs) if len(held[pack]) < size), key=total.__getitem__)
        held[lightest].append(int(item))
        total[lightest] += float(weights[item])
    return held


def all_placements(experts: int, ranks: int, redundant: int, at_most: int) -> list[np.ndarray] | None:
    """Every placement of one layer [S], ranks without names; None where there are more than ``at_most``. A rank may
    hold two copies of one expert, as EPLB's may.

    >>> len(all_placements(6, 2, 0, 1000)), len(all_placements(3, 2, 1, 1000)), all_placements(64, 8, 8, 1000)
    (10, 6, None)
    """
    size = check_slots(experts, ranks, redundant)
    spread = 1 + (np.arange(experts) < redundant % experts) + redundant // experts
    fewest = math.lgamma(experts + redundant + 1) - ranks * math.lgamma(size + 1) - math.lgamma(ranks + 1)
    if fewest - sum(math.lgamma(count + 1) for count in spread) > math.log(at_most):
        return None
    found: list[np.ndarray] = []
    for copies in _copies(experts, redundant):
        for layout in _layouts(list(copies), ranks, size, ()):
            found.append(np.asarray(layout))
            if len(found) > at_most:
                return None
    return found


def _copies(experts: int, redundant: int) -> Iterator[tuple[int, ...]]:
    for chosen in itertools.combinations_with_replacement(range(experts), redundant):
        extra = Counter(chosen)
        yield tuple(1 + extra.get(expert, 0) for expert in range(experts))


def _layouts(left: list[int], ranks: int, size: int, former: tuple[int, ...]) -> Iterator[list[int]]:
    """Ranks in ascending order of their sorted slots, so that each set of ranks comes once: the first of those that are
    left holds the first expert that is left."""
    if ranks == 0:
        yield []
        return
    first = next(expert for expert, count in enumerate(left) if count)
    rest = [count - (expert == first) for expert, count in enumerate(left)]
    for others, without in _rows(rest, size - 1, first):
        row = (first, *others)
        if row >= former:
            for following in _layouts(without, ranks - 1, size, row):
                yield [*row, *following]


def _rows(left: list[int], size: int, first: int) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Sorted choices of ``size`` of the copies that are left, from an expert on, and what is left then."""
    if size == 0:
        yield (), left
        return
    for expert in range(first, len(left)):
        if left[expert]:
            rest = [*left[:expert], left[expert] - 1, *left[expert + 1 :]]
            for others, without in _rows(rest, size - 1, expert):
                yield (expert, *others), without


def exports(placement: ExpertPlacement) -> dict[str, Any]:
    """The placement as engines take it.

    * ``sglang``: ``init_expert_location``, the content of a file for ``--init-expert-location FILE.json``
      (``physical_to_logical_map`` [layers, S], and nothing else, as its ``init_by_mapping`` takes it), ``flags``,
      ``checked`` (against which source) and a ``note`` on layers
    * ``vllm``: its flag for so many redundant experts. It balances by its own copy of EPLB while it serves; its
      EPLBConfig (documentation up to 0.19) has no option that takes a placement
    """
    layers, slots = placement.slots.shape
    redundant = slots - placement.experts
    rows = f"{layers} row{'s' if layers > 1 else ''}"
    return {
        "sglang": {
            "init_expert_location": {"physical_to_logical_map": placement.slots.tolist()},
            "flags": f"--ep-size {placement.ranks} --ep-num-redundant-experts {redundant} "
            "--init-expert-location FILE.json --ep-dispatch-algorithm dynamic",
            "checked": "python/sglang/srt/eplb/expert_location.py at commit 01fec5c2; other versions may differ",
            "note": f"the map has {rows}; SGLang wants one for each layer of the model, dense ones too: repeat or add",
        },
        "vllm": {
            "flags": f"--enable-expert-parallel --enable-eplb --eplb-config '{{\"num_redundant_experts\":{redundant}}}'"
        },
    }
