"""`boundary`: a map of what speculation gains over two axes, the contour on which it gains nothing, and how sure both
are."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from diffspec.acceptance import AbstractAcceptance, AbstractPositionwise
from diffspec.analysis.before_traces import DOES_NOT_FIT, Unmeasured
from diffspec.analysis.intervals import NO_INTERVALS, spread
from diffspec.analysis.plain import finite
from diffspec.boundaries.axes import POINTS, Axis
from diffspec.boundaries.points import Gains, Ground, states_for
from diffspec.boundaries.question import LENGTHS, LOOPS, Question
from diffspec.boundaries.tracing import JUMP, Roots, contours, line_roots, refine
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.uncertainty import LEVEL

DRAWS = 32
"""Draws of what is not known behind a map's uncertainty."""
ZONES = ("gain", "loss", "gain_by_capacity", "loss_by_capacity", "saturated", DOES_NOT_FIT)
"""What a point of a map can be: both serve the load, and speculation is better, or not; it alone serves it; it alone
does not; neither does; it, or both, do not fit into the memory."""
Progress = Callable[[str, float], None]


def boundary(
    subject: FittedDeployment | Unmeasured,
    axes: Mapping[str, Any],
    *,
    points: int = POINTS,
    quantity: str = "e2e",
    draft_length: float | int | str = "best",
    max_draft_length: int = 8,
    arrival_rate: float | None = None,
    concurrency: float | None = None,
    prompt_length: float | None = None,
    output_length: float | None = None,
    acceptance: AbstractAcceptance | None = None,
    max_batch_size: float | None = None,
    max_batched_tokens: float | None = None,
    drafter_params: float | None = None,
    output_scv: float = 0.0,
    prefix_hit_rate: float = 0.0,
    tensor_parallel: int | None = None,
    draws: int = DRAWS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Map of what speculation gains over two axes, and the contour on which it gains nothing.

    * ``axes``: two of ``arrival_rate`` [req/s] or ``concurrency`` [req], ``acceptance_rate``, ``prompt_length``,
      ``output_length``, ``draft_length`` [tok], ``drafter_scale`` [1] (parameters over those of the deployment's
      drafter), ``max_batch_size`` [req] and ``hardware`` (names), each with its increasing values; the first runs
      across. None in place of values: ``points`` of the usual range, of arrival rates up to the largest capacity
    * ``quantity``: ``e2e``, ``tpot``, ``ttft``, ``throughput``, ``memory`` or ``energy``
      (:mod:`diffspec.boundaries.points`), told as a gain: above 1 speculation is better
    * ``draft_length``: one [tok], or ``"best"``: the best whole one up to ``max_draft_length`` at each point; then the
      contour is where the best one is no better than none
    * what no axis moves: a load, both lengths (by default the measured ones, if they were all alike), the acceptance
      (by default the deployment's own), caps; ``draws``: how many of what is not known, 0: none

    Returns ``axes``, ``gain[row][column]`` (rows: second axis; None where not both serve the load), ``zone`` (one of
    :data:`ZONES`), ``best_draft_length``, ``zones`` (the share of points and the range of both axes of each zone),
    ``crossings`` (on each grid line the values at which the sign changes, ``kind`` ``break_even``, or ``jump`` where a
    server saturates or stops to fit), ``contours`` (polylines of points [x, y] at which |gain - 1| <= ``tolerance``,
    none of them interpolated: ``largest_residual``; ``broken_joins``: how many cells a line could not be followed
    through), and ``uncertainty``: ``gaining_share``, the share of draws that gain at each point, and of each line's
    first crossing low, median and high, and the share of draws that have one. Draws are of parameters alone.
    Errors: :class:`InputError` for bad axes and ranges; :class:`NoResultError` where no run without speculation was
    fitted.

    >>> from diffspec import FirstPrinciples, Transformer, accelerator, before_traces
    >>> verifier = Transformer("8B", 32, 4096, 128256, 32, 8, 128, 14336)
    >>> pair = FirstPrinciples(verifier, accelerator("h100"), drafter_kind="head")
    >>> axes = {"concurrency": [1, 8], "acceptance_rate": [0.1, 0.9]}
    >>> asked = {"prompt_length": 512, "output_length": 128, "draft_length": 3, "draws": 0}
    >>> boundary(before_traces(pair), axes, **asked)["zone"]
    [['loss', 'loss'], ['gain', 'gain']]
    """
    found = Question(subject, axes, points, tensor_parallel, max_batched_tokens)
    ground = found.ground(
        quantity=quantity,
        draft_length=draft_length,
        max_draft_length=max_draft_length,
        loads={"arrival_rate": arrival_rate, "concurrency": concurrency},
        lengths={"prompt_length": prompt_length, "output_length": output_length},
        acceptance=acceptance,
        max_batch_size=max_batch_size,
        max_batched_tokens=max_batched_tokens,
        drafter_params=drafter_params,
        details={"output_scv": output_scv, "prefix_hit_rate": prefix_hit_rate},
    )
    tell = progress or (lambda label, share: None)
    x, y = found.axes(ground)
    map_ = _Map(ground, x, y)
    ground = map_.ground
    tell("map", 0.05)
    gains = map_.at_nodes()
    zone = _zones(gains, quantity)
    tell("break-even", 0.2)
    along = tuple(way for way, axis in enumerate((x, y)) if not axis.categorical)
    roots = line_roots(map_.gap, (x.nodes, y.nodes), along)
    tell("contours", 0.4)
    lines, worst, broken = ([], 0.0, 0) if len(along) < 2 else contours(map_.gap, (x.nodes, y.nodes), roots)
    exact = np.abs(roots.value[roots.exact])
    worst = max(worst, float(exact.max()) if exact.size else 0.0)
    tell("draws", 0.6)
    both = np.isin(zone, ("gain", "loss"))
    share = {name: float((zone == name).mean()) for name in ZONES}
    nothing = share["saturated"] + share[DOES_NOT_FIT] == 1.0
    answer = {
        "outcome": (DOES_NOT_FIT if share[DOES_NOT_FIT] else "saturated") if nothing else "successful",
        "deployment": found.name,
        "quantity": quantity,
        "draft_length": None if "draft_length" in (x.name, y.name) else draft_length,
        "max_draft_length": max_draft_length if draft_length == "best" and not found.has("draft_length") else None,
        "axes": [_axis_told(x), _axis_told(y)],
        "fixed": dict(ground.fixed) | _given(ground, (x.name, y.name), drafter_params),
        "gain": [
            [finite(np.exp(g)) if b else None for g, b in zip(*row, strict=True)]
            for row in _rows(gains.log_gain, both, map_)
        ],
        "best_draft_length": None
        if ground.draft_lengths is None or len(ground.draft_lengths) == 1
        else [
            [int(k) if z in ("gain", "gain_by_capacity") else 0 for k, z in zip(*row, strict=True)]
            for row in _rows(gains.draft_length, zone, map_)
        ],
        "zone": zone.reshape(map_.shape).tolist(),
        "zones": _where(zone, map_, share),
        "crossings": _crossings(roots, x, y),
        "contours": [[[float(x.value(u)), float(y.value(v))] for u, v in line] for line in lines],
        "broken_joins": broken,
        "tolerance": JUMP,
        "largest_residual": worst,
        "uncertainty": _uncertainty(found, ground, map_, draws, along),
        "uncertainty_reason": None,
        **_hull(found, ground, map_, gains),
        "warnings": found.warnings(ground),
    }
    if answer["uncertainty"] is None:
        answer["uncertainty_reason"] = NO_INTERVALS if draws > 0 else "not asked for"
    return answer | found.told()


def _crossings(roots: Roots, x: Axis, y: Axis) -> list[dict[str, Any]]:
    """The changes of sign on each grid line as plain data, along the first axis first."""
    found = zip(roots.along.tolist(), roots.line.tolist(), roots.points, roots.rising, roots.exact, strict=True)
    return [
        {
            "along": (x, y)[way].name,
            "at": (y, x)[way].values[line],
            "value": float((x, y)[way].value(point[way])),
            "gains": "above" if rising else "below",
            "kind": "break_even" if exact else "jump",
        }
        for way, line, point, rising, exact in sorted(found, key=lambda root: (root[0], root[1], root[2][root[0]]))
    ]


class _Map:
    """The function of two coordinates whose contour is asked for."""

    def __init__(self, ground: Ground, x: Axis, y: Axis):
        self.x, self.y, self.shape = x, y, (len(y.values), len(x.values))
        self.ground = replace(ground, states=states_for(ground.caps(self.points(*self.nodes()))))

    def points(self, u, v) -> dict[str, np.ndarray]:
        """Values of both axes at coordinates."""
        return {self.x.name: self.x.value(u), self.y.name: self.y.value(v)}

    def gap(self, u, v) -> np.ndarray:
        """Logarithm of the gain at coordinates of any one shape."""
        u, v = np.broadcast_arrays(u, v)
        if not u.size:
            return np.zeros(u.shape)
        return self.ground.gains(self.points(u.ravel(), v.ravel())).log_gain.reshape(u.shape)

    def nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates of all grid points, the first axis fastest."""
        v, u = np.meshgrid(self.y.nodes, self.x.nodes, indexing="ij")
        return u.ravel(), v.ravel()

    def at_nodes(self) -> Gains:
        """The gains of all grid points."""
        return self.ground.gains(self.points(*self.nodes()))


def _given(ground: Ground, moved: tuple[str, str], drafter_params: float | None) -> dict[str, Any]:
    """What the configuration was given that no axis moves; None for the deployment's own. Acceptance: of each position
    of the longest draft."""
    told: dict[str, Any] = {"max_batched_tokens": ground.max_batched_tokens, "drafter_params": drafter_params}
    if "max_batch_size" not in moved:
        told["max_batch_size"] = ground.max_batch_size
    if not ground.moves_acceptance:
        chain = ground.acceptance if isinstance(ground.acceptance, AbstractPositionwise) else None
        count = max(int(ground.longest), 1)
        told["acceptance"] = (
            None if chain is None else np.asarray(chain.conditional_rates(float(count)))[:count].tolist()
        )
    return told


def _zones(gains: Gains, quantity: str) -> np.ndarray:
    names = np.where(gains.log_gain > 0, "gain", "loss").astype("U20")
    if quantity != "throughput":
        names[gains.plain_saturated & ~gains.saturated] = "gain_by_capacity"
        names[~gains.plain_saturated & gains.saturated] = "loss_by_capacity"
        names[gains.plain_saturated & gains.saturated] = "saturated"
    names[~gains.fits] = DOES_NOT_FIT
    return names


def _where(zone: np.ndarray, map_: _Map, share: Mapping[str, float]) -> dict[str, Any]:
    """Of each zone that there is: its share of the grid points, and the range of both axes."""
    u, v = map_.nodes()
    told = {}
    for name, part in share.items():
        if part == 0:
            continue
        spans = {}
        for axis, places in ((map_.x, u), (map_.y, v)):
            found = places[zone == name]
            if axis.categorical:
                spans[axis.name] = [axis.values[int(i)] for i in np.unique(found)]
            else:
                nearest = (np.argmin(np.abs(axis.nodes - end)) for end in (found.min(), found.max()))
                spans[axis.name] = [float(axis.values[int(place)]) for place in nearest]
        told[name] = {"share": part} | spans
    return told


def _rows(values: np.ndarray, others: np.ndarray, map_: _Map):
    return zip(values.reshape(map_.shape), others.reshape(map_.shape), strict=True)


def _axis_told(axis: Axis) -> dict[str, Any]:
    scale = "names" if axis.categorical else "log" if axis.logarithmic else "linear"
    return {"name": axis.name, "unit": axis.unit, "scale": scale, "values": list(axis.values)}


def _uncertainty(found: Question, ground: Ground, map_: _Map, draws: int, along: tuple[int, ...]):
    """Shares of draws that gain, and the interval of each line's first crossing; None without draws."""
    if draws <= 0:
        return None
    models = tuple(server.draws(draws) for server in found.servers)
    if any(model is None for model in models):
        return None
    models = tuple(jax.tree.map(lambda leaf: np.asarray(leaf)[:draws], model) for model in models)
    count = min(draws, *(len(jax.tree.leaves(model)[0]) for model in models))
    u, v = map_.nodes()
    number = np.repeat(np.arange(count), u.size)

    def gap(u, v, draw):
        at = map_.points(u, v) | {"draw": draw}
        return ground.gains(at, models).log_gain

    grid = gap(np.tile(u, count), np.tile(v, count), number).reshape(count, *map_.shape)
    told = []
    for way in along:
        axis, other = ((map_.x, map_.y), (map_.y, map_.x))[way]
        values = grid if way == 0 else np.swapaxes(grid, 1, 2)
        draw, line, first = _first_changes(values)
        roots = _refine_draws(gap, axis, other, way, draw, line, first)
        for index, at in enumerate(other.values):
            mine = roots[line == index]
            mine = mine[np.isfinite(mine)]
            told.append({"along": axis.name, "at": at, "share": mine.size / count, **spread(axis.value(mine))})
    gaining = (np.nan_to_num(grid, nan=-1.0) > 0).mean(axis=0)
    return {
        "level": LEVEL,
        "draws": count,
        "includes": ["parameters"],
        "gaining_share": gaining.tolist(),
        "crossings": told,
    }


def _first_changes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(draw, line, place) of the first change of sign along the last axis, where there is one."""
    known = np.isfinite(values[..., 1:]) & np.isfinite(values[..., :-1])
    changed = known & ((values[..., 1:] > 0) != (values[..., :-1] > 0))
    draw, line = np.nonzero(changed.any(axis=-1))
    return draw, line, np.argmax(changed[draw, line], axis=-1)


def _refine_draws(gap: Callable, axis: Axis, other: Axis, way: int, draw, line, first) -> np.ndarray:
    """Coordinates of these changes of sign."""
    if not draw.size:
        return np.zeros(0)
    fixed = other.nodes[line]
    start, end = (np.stack([axis.nodes[first + step], fixed], axis=1) for step in (0, 1))
    if way == 1:
        start, end = start[:, ::-1], end[:, ::-1]
    points, _ = refine(gap, start, end, lanes=draw)
    return points[:, way]


def _hull(found: Question, ground: Ground, map_: _Map, gains: Gains) -> dict[str, Any]:
    """Share of the points inside what was measured, and the fields in which others lie outside."""
    deployment = found.servers[0].deployment
    if found.servers[0].subject is not None:
        return {"inside_measured_share": 0.0, "outside_measured_fields": []}
    points = map_.points(*map_.nodes())
    inside, fields = [], set()
    for index in range(len(gains.draft_length)):
        names = (*LOOPS, *LENGTHS)
        asked = {
            n: float(points[n][index]) if n in points else ground.fixed[n]
            for n in names
            if n in points or n in ground.fixed
        }
        told = deployment.hull(float(gains.draft_length[index]), asked)
        inside.append(told["inside_measured"])
        fields |= {entry["field"] for entry in told["outside_measured"]}
    return {"inside_measured_share": float(np.mean(inside)), "outside_measured_fields": sorted(fields)}
