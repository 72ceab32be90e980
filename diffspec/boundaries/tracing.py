"""Contours of a function of two coordinates in the unit square where it is 0, traced by roots.

Every grid line is scanned between its nodes and each change of sign refined by Chandrupatla's bracketed search (1997)
on all brackets together. Roots on the sides of one cell are joined (of two ways to join four, by the sign in the
middle), and each join is followed: from the middle of the chord a root is sought along its normal, and again on both
halves while the curve bends. A join without such a root is taken away. No vertex is interpolated: the function is 0 at
each to the tolerance of the search. Several contours, closed ones and ones that end where the function has no value are
told alike. Derivation: ours, after the marching squares of Lorensen and Cline (1987).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import elementwise

SCAN = 3
"""Parts of a side of a cell in which a change of sign is looked for."""
ROUNDS, BEND = 3, 2e-3
"""How often a chord is halved, and the distance of the curve from it below which it is not."""
REACHES = (0.1, 0.5, 1.0)
"""How far from the middle of a chord the curve is looked for, in its lengths: near first, as others may be near."""
JUMP = 1e-6
"""|function| at a root from which on it is a jump and no root."""


@dataclass(frozen=True)
class Roots:
    """Changes of sign: ``points`` [n, 2]; ``value`` [n] of the function there; ``rising`` [n]: positive beyond, along
    the line; ``line``, ``side`` [n]: on which line and between which nodes; ``along`` [n]: 0 for lines along the first
    coordinate, 1 along the second."""

    points: np.ndarray
    value: np.ndarray
    rising: np.ndarray
    line: np.ndarray
    side: np.ndarray
    along: np.ndarray

    @property
    def exact(self) -> np.ndarray:
        """Which are roots, not jumps."""
        return np.abs(self.value) <= JUMP


def refine(gap: Callable, start: np.ndarray, end: np.ndarray, *, lanes=None) -> tuple[np.ndarray, np.ndarray]:
    """(points [n, 2], values [n]) of a change of sign on each segment from ``start`` to ``end`` [n, 2]; nan where the
    function has no value on the way. A jump keeps the value on one of its sides. With ``lanes`` [n] the function is
    ``gap(u, v, lane)``."""
    if not len(start):
        return np.zeros((0, 2)), np.zeros(0)
    place = np.arange(len(start))

    def at(share, index):
        index = index.astype(int)
        points = start[index] + share[..., None] * (end - start)[index]
        more = () if lanes is None else (np.asarray(lanes)[index],)
        return gap(points[..., 0], points[..., 1], *more)

    tolerances = {"xatol": 1e-13, "xrtol": 1e-13, "fatol": 1e-12, "frtol": 0.0}
    ends = np.zeros(len(start)), np.ones(len(start))
    found = elementwise.find_root(at, ends, args=(place,), tolerances=tolerances, maxiter=80)
    return start + found.x[:, None] * (end - start), np.where(np.isfinite(found.x), found.f_x, np.nan)


def line_roots(gap: Callable, nodes: tuple[np.ndarray, np.ndarray], along: tuple[int, ...] = (0, 1)) -> Roots:
    """All changes of sign on the lines through the ``nodes`` of both coordinates, along those asked for."""
    starts, ends, rising, lines, sides, ways = ([] for _ in range(6))
    for way in along:
        own, other = nodes[way], nodes[1 - way]
        parts = np.linspace(0.0, 1.0, SCAN + 1)[:-1]
        fine = np.append((own[:-1, None] + parts * np.diff(own)[:, None]).ravel(), own[-1])
        grid = np.stack(np.broadcast_arrays(fine[None, :], other[:, None]), axis=-1)
        points = grid if way == 0 else grid[..., ::-1]
        values = gap(points[..., 0].ravel(), points[..., 1].ravel()).reshape(points.shape[:2])
        known = np.isfinite(values[:, 1:]) & np.isfinite(values[:, :-1])
        above = values > 0
        line, step = np.nonzero(known & (above[:, 1:] != above[:, :-1]))
        starts.append(points[line, step])
        ends.append(points[line, step + 1])
        rising.append(above[line, step + 1])
        lines.append(line)
        sides.append(step // SCAN)
        ways.append(np.full(line.size, way))
    joined = [np.concatenate(part) for part in (starts, ends, rising, lines, sides, ways)]
    points, value = refine(gap, joined[0], joined[1])
    kept = np.isfinite(value)
    return Roots(points[kept], value[kept], *(part[kept] for part in joined[2:]))


def contours(gap: Callable, nodes: tuple[np.ndarray, np.ndarray], roots: Roots) -> tuple[list[np.ndarray], float, int]:
    """(polylines [points, 2] through the exact ``roots``, largest |function| on them, joins taken away); a closed line
    ends where it starts."""
    links = _links(gap, nodes, roots)
    if not links:
        return [], 0.0, 0
    pairs = np.asarray(links)
    paths, worst = _follow(gap, roots.points[pairs[:, 0]], roots.points[pairs[:, 1]])
    kept = [(pair, path) for pair, path in zip(links, paths, strict=True) if path is not None]
    used = np.abs(roots.value[roots.exact])
    return _chain(kept), max(worst, float(used.max()) if used.size else 0.0), len(links) - len(kept)


def _links(gap: Callable, nodes, roots: Roots) -> list[tuple[int, int]]:
    """Pairs of roots that one contour joins inside a cell."""
    cells: dict[tuple[int, int], list[tuple[float, int]]] = {}
    columns, rows = len(nodes[0]) - 1, len(nodes[1]) - 1
    for index in np.flatnonzero(roots.exact):
        line, side, way = int(roots.line[index]), int(roots.side[index]), int(roots.along[index])
        beside = rows if way == 0 else columns
        share = _share(nodes[way], side, roots.points[index, way])
        for cell, turn in ((line, 0), (line - 1, 2)):  # the line is the first or the last side of the cell
            if 0 <= cell < beside:
                key = (side, cell) if way == 0 else (cell, side)
                first = turn == 0
                around = (share if first else 3.0 - share) if way == 0 else (4.0 - share if first else 1.0 + share)
                cells.setdefault(key, []).append((around, int(index)))
    links, crossed = [], []
    for key, found in cells.items():
        ordered = [index for _, index in sorted(found)]
        if len(ordered) == 4:
            crossed.append((key, ordered))
        else:
            links += _nearest(roots.points, ordered)
    if crossed:
        middles = np.asarray([[np.mean(nodes[way][key[way] : key[way] + 2]) for way in (0, 1)] for key, _ in crossed])
        corners = np.asarray([[nodes[0][key[0]], nodes[1][key[1]]] for key, _ in crossed])
        inside, corner = gap(*middles.T), gap(*corners.T)
        for (_, (a, b, c, d)), same in zip(crossed, (inside > 0) == (corner > 0), strict=True):
            links += [(a, b), (c, d)] if same else [(a, d), (b, c)]  # the arc over the corner lies from d to a
    return links


def _share(nodes: np.ndarray, side: int, place: float) -> float:
    return float((place - nodes[side]) / (nodes[side + 1] - nodes[side]))


def _nearest(points: np.ndarray, ordered: list[int]) -> list[tuple[int, int]]:
    """Neighbours around a cell joined, the nearest first, so that no two joins cross."""
    links = []
    ordered = list(ordered)
    while len(ordered) > 1:
        gaps = [
            float(np.hypot(*(points[a] - points[b]))) for a, b in zip(ordered, ordered[1:] + ordered[:1], strict=True)
        ]
        place = int(np.argmin(gaps))
        following = (place + 1) % len(ordered)
        links.append((ordered[place], ordered[following]))
        ordered = [index for number, index in enumerate(ordered) if number not in (place, following)]
    return links


def _follow(gap: Callable, start: np.ndarray, end: np.ndarray) -> tuple[list[Any], float]:
    """Per join the points from start to end, None where no root lies beside its middle; and the largest |function|."""
    paths: list[Any] = [[a, b] for a, b in zip(start, end, strict=True)]
    open_sides = [(number, 0) for number in range(len(paths))]  # (join, place of the chord in its path)
    worst = 0.0
    for level in range(ROUNDS):
        if not open_sides:
            break
        a = np.asarray([paths[number][place] for number, place in open_sides])
        b = np.asarray([paths[number][place + 1] for number, place in open_sides])
        points, values = _beside(gap, a, b)
        found = np.abs(values) <= JUMP
        worst = max(worst, float(np.abs(values[found]).max()) if found.any() else 0.0)
        bends = np.hypot(*(points - 0.5 * (a + b)).T)
        inserted: dict[int, list[tuple[int, np.ndarray, bool]]] = {}
        for (number, place), point, good, bend in zip(open_sides, points, found, bends, strict=True):
            if good:
                inserted.setdefault(number, []).append((place, point, bool(bend > BEND)))
            elif level == 0:
                paths[number] = None
        open_sides = []
        for number, entries in inserted.items():
            for shift, (place, point, bent) in enumerate(entries):
                paths[number].insert(place + 1 + shift, point)
                if bent:
                    open_sides += [(number, place + shift), (number, place + shift + 1)]
    return paths, worst


def _beside(gap: Callable, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The root on the normal through the middle of each chord, no farther than its length."""
    middle, normal = 0.5 * (a + b), np.stack([a[:, 1] - b[:, 1], b[:, 0] - a[:, 0]], axis=1)
    points, values = np.full_like(a, np.nan), np.full(len(a), np.nan)
    for reach in REACHES:
        todo = np.flatnonzero(np.isnan(values))
        low, high = (np.clip(middle[todo] + sign * reach * normal[todo], 0.0, 1.0) for sign in (-1.0, 1.0))
        ends = gap(*low.T), gap(*high.T)
        changes = np.isfinite(ends[0]) & np.isfinite(ends[1]) & ((ends[0] > 0) != (ends[1] > 0))
        points[todo[changes]], values[todo[changes]] = refine(gap, low[changes], high[changes])
        if changes.all():
            break
    return points, values


def _chain(links: list[tuple[tuple[int, int], list[np.ndarray]]]) -> list[np.ndarray]:
    """Joins that share a root, as polylines."""
    at: dict[int, list[int]] = {}
    for number, (pair, _) in enumerate(links):
        for root in pair:
            at.setdefault(root, []).append(number)
    left = set(range(len(links)))
    lines = []
    ends = [root for root, numbers in at.items() if len(numbers) == 1]
    for root in [*ends, *at]:  # open lines from their ends, then closed ones
        here, points = root, []
        while True:
            number = next((number for number in at[here] if number in left), None)
            if number is None:
                break
            left.remove(number)
            (first, last), path = links[number]
            forward = path if first == here else path[::-1]
            points += forward if not points else forward[1:]
            here = last if first == here else first
        if points:
            lines.append(np.asarray(points))
    return lines
