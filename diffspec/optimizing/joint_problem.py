"""The joint problem as functions: what a point (draft lengths, batch cap, drafter size) costs, and which limits it
keeps, for one drafter at one load.

A point is (draft_length of each class, max_batch_size, tree, log of the drafter's size), where ``tree`` is the number
of a shape, or the real width of a regular tree while the problem is relaxed, and 0 for chains; its cost is

    log sum over classes of share*weight*metric, or a weighted sum of metrics; minus log capacity for ``capacity``

and limits are log excesses, of one class or of all requests; tails of latency, goodput and energy are those of
:mod:`diffspec.optimizing.joint_tails`. Memory is :class:`diffspec.resources.MemoryUse` with the batch at its cap, its
requests of each class as often as in service. The same functions serve the relaxed solver
(reals, gradients) and the exact evaluation (whole numbers, many at once).
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import AbstractAcceptance, ConstantAcceptance
from diffspec.analysis.answers import metric_values
from diffspec.analysis.plain import padded_rows
from diffspec.configuration import Configuration
from diffspec.latency_distribution import PERCENTILE_METRICS
from diffspec.optimizing.catalogue import RequestClass
from diffspec.optimizing.joint_tails import UNKNOWN, Tails, of_all, of_objective, tail_name
from diffspec.optimizing.limits import MEMORY, OBJECTIVES, SPENT, Limit
from diffspec.optimizing.servers import hours_per_million
from diffspec.programs import program
from diffspec.resources import MemoryUse
from diffspec.results import RESULTS, InputError
from diffspec.serving import ServingModel
from diffspec.tree_shapes import RegularTreeAcceptance, ShapeAcceptance
from diffspec.workload import Workload, held_tokens

LATENCIES = tuple(name for name in OBJECTIVES if name != "throughput")
COST = "cost"
SUMMED = (*LATENCIES, *PERCENTILE_METRICS, *SPENT)
"""What may be added up in an objective."""
MADE_LARGE = ("capacity", "goodput")
ADDED_UP = ("throughput", *MADE_LARGE)
"""What adds up over classes and replicas."""
_LEAST_TAIL = 1e-9
_TERM = re.compile(r"^\s*(?:([0-9.eE+-]+)\s*\*)?\s*([A-Za-z0-9_]+)\s*$")
CHUNK, FEW = 512, 32
"""Points that one call evaluates; and those that one call evaluates in many draws."""


class Objective(NamedTuple):
    """``terms``: (factor, metric), added; a single one of :data:`MADE_LARGE` is made large, everything else small."""

    text: str
    terms: tuple[tuple[float, str], ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of its terms."""
        return tuple(name for _, name in self.terms)

    @property
    def made_large(self) -> bool:
        """True of what adds up over replicas, and is made large."""
        return self.metrics[0] in MADE_LARGE

    @property
    def flat(self) -> bool:
        """True of goodput: where nearly all requests keep their limits it is the load itself, at many points."""
        return self.metrics == ("goodput",)


class ClassLimit(NamedTuple):
    """A limit of the class of this number, or of the mean over requests (None)."""

    number: int | None
    limit: Limit

    @property
    def of_one(self) -> "ClassLimit":
        """The same limit at a bound of 1: what a program is compiled for, whatever the bound."""
        return self._replace(limit=self.limit.of_one)

    def text(self, classes: Sequence[RequestClass]) -> str:
        """As a user reads it, such as ``chat: tpot_mean<0.05``."""
        return self.limit.text if self.number is None else f"{classes[self.number].name}: {self.limit.text}"


class Drafted(NamedTuple):
    """One drafter on one server, as arrays: the serving model, the acceptance of each class, (a, b) of an acceptance
    that follows the size (None: it does not), and what the configuration takes from the deployment.

    ``shapes``: (rates [classes, shapes, 32], nodes [shapes], depth [shapes]) of a drafter that draws trees;
    ``candidates``: of each class [depths, ranks], while the tree is relaxed; ``hourly``: price of a replica's hour;
    ``tails``: what is looked at beyond means; ``memory``: what lies in that of a device, where that is limited
    """

    serving: ServingModel
    acceptances: tuple[AbstractAcceptance, ...]
    by_size: Any
    reference_size: Any
    draft_probability: Any
    kv_capacity_tokens: Any
    max_batched_tokens: Any
    shapes: Any = None
    candidates: Any = None
    hourly: Any = None
    tails: Tails | None = None
    memory: MemoryUse | None = None


class Shapes(NamedTuple):
    """Of each class: share, weight and the fields of its workload, arrays [classes]."""

    share: Any
    weight: Any
    prompt_length: Any
    output_length: Any
    output_scv: Any
    prefix_hit_rate: Any


def parse_objective(text: str) -> Objective:
    """``e2e_mean``, ``0.7*e2e_mean+0.3*ttft_p95`` (seconds), ``cost`` and ``energy`` (J) of a million output tokens,
    sums of these, or ``capacity`` or ``goodput`` alone.

    >>> parse_objective("0.7*e2e_mean + 0.3*ttft_mean").terms
    ((0.7, 'e2e_mean'), (0.3, 'ttft_mean'))
    """
    if text.strip() in MADE_LARGE:
        return Objective(text.strip(), ((1.0, text.strip()),))
    terms = []
    for part in text.split("+"):
        match = _TERM.match(part)
        if match is None:
            raise InputError(
                f"objective: got {text!r}; allowed: a metric, or a sum such as '0.7*e2e_mean+0.3*ttft_mean'"
            )
        try:
            factor = float(match[1] or 1.0)
        except ValueError:
            factor = math.nan
        if match[2] not in SUMMED:
            near = difflib.get_close_matches(match[2], (*SUMMED, *MADE_LARGE), 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            allowed = f"{', '.join(SUMMED)}, sums of them, or {', '.join(MADE_LARGE)} alone"
            raise InputError(f"objective: got {match[2]!r}; allowed: {allowed}{hint}")
        if not (math.isfinite(factor) and factor > 0):
            raise InputError(f"objective: got the factor {match[1]!r}; allowed: above 0")
        terms.append((factor, match[2]))
    return Objective(text, tuple(terms))


def shapes_of(classes: Sequence[RequestClass]) -> Shapes:
    """The classes as arrays."""
    return Shapes(*(np.asarray([float(getattr(one, name)) for one in classes]) for name in Shapes._fields))


def predicted(drafted: Drafted, shapes: Shapes, load, point):
    """(metrics [classes] by name, overload, saturated) of one point at a total arrival rate ``load`` [req/s]."""
    count = len(drafted.acceptances)
    lengths, (cap, tree, size) = point[:count], point[count:]
    acceptances = drafted.acceptances
    if drafted.candidates is not None:
        acceptances = tuple(RegularTreeAcceptance(tree, table) for table in drafted.candidates)
    elif drafted.shapes is not None:
        shape = tree.astype(int)
        rates, nodes, depth = drafted.shapes
        acceptances = tuple(ShapeAcceptance(rates[c, shape], nodes[shape], depth[shape]) for c in range(count))
    elif drafted.by_size is not None:
        start, slope = drafted.by_size
        acceptances = (ConstantAcceptance(jax.nn.sigmoid(start + slope * size)),) * count
    workloads = [
        Workload(
            shapes.prompt_length[c],
            shapes.output_length[c],
            arrival_rate=load * shapes.share[c],
            output_scv=shapes.output_scv[c],
            prefix_hit_rate=shapes.prefix_hit_rate[c],
        )
        for c in range(count)
    ]
    configs = [
        Configuration(
            lengths[c],
            acceptances[c],
            max_batch_size=cap,
            kv_capacity_tokens=drafted.kv_capacity_tokens,
            max_batched_tokens=drafted.max_batched_tokens,
            draft_probability=drafted.draft_probability,
            drafter_scale=jnp.exp(size) / drafted.reference_size,
        )
        for c in range(count)
    ]
    found = drafted.serving.predict_classes(workloads, configs)
    metrics = metric_values(found)
    if drafted.hourly is not None:
        output = jnp.sum(shapes.share * shapes.output_length)
        metrics[COST] = jnp.full(count, drafted.hourly * hours_per_million(1.0, load, output))
    if drafted.memory is not None:
        in_service = found.effective_batch_size / jnp.sum(found.effective_batch_size)
        held = held_tokens(shapes.prompt_length, shapes.output_length, shapes.output_scv)
        used = drafted.memory.gigabytes(cap * (in_service @ held), jnp.max(lengths) > 0, configs[0].drafter_scale)
        metrics[MEMORY] = jnp.full(count, used)
    if drafted.tails is not None:
        weight = jnp.asarray(shapes.weight)
        metrics |= drafted.tails.metrics(drafted.serving, workloads, configs, found, weight)
    return metrics, found.overload[0], (found.result == RESULTS.saturated)[0]


def over_all(name: str, metrics, share):
    """A metric of all requests: their mean; capacity, throughput and goodput add up, utilization, cost, energy and
    memory are those of all; a percentile is that of all."""
    values = metrics[of_all(name) if name in PERCENTILE_METRICS else name]
    if name in ADDED_UP:
        return values.sum(-1)
    shared = name in ("utilization", *SPENT, MEMORY) or name in PERCENTILE_METRICS
    return values[..., 0] if shared else (values * share).sum(-1)


def cost_of(objective: Objective, metrics, shapes: Shapes):
    """log of what is minimised, from metrics [..., classes]; numpy or JAX arrays."""
    if objective.made_large:
        return -jnp.log(over_all(objective.metrics[0], metrics, shapes.share))
    weight = shapes.share * shapes.weight
    total = 0.0
    for factor, name in objective.terms:
        if name in PERCENTILE_METRICS:
            total = total + factor * metrics[of_objective(name)][..., 0]
        else:
            total = total + factor * (metrics[name] * weight).sum(-1) / weight.sum()
    return jnp.log(total)


def excesses(limits: Sequence[ClassLimit], metrics, share, replicas: Any = 1) -> list:
    """Log excess of every limit, of a percentile that was not found log(P(metric > bound)/(1 - p)); what adds up is
    that of all ``replicas``."""
    found, place = [], 0
    for number, limit in limits:
        if limit.percentile is not None and limit.metric not in metrics:
            tail = jnp.maximum(metrics[tail_name(place)][..., 0], _LEAST_TAIL)
            found.append(jnp.log(tail / (1.0 - limit.percentile[1])))
            place += 1
            continue
        value = over_all(limit.metric, metrics, share) if number is None else metrics[limit.metric][..., number]
        found.append(limit.excess(value * replicas if limit.metric in ADDED_UP else value))
    return found


def unmet(goal: Objective, metrics, cost):
    """Whether a point has no objective: no request keeps the limits that goodput counts, or the mean batch is beyond
    what percentiles are computed for."""
    found = ~np.isfinite(np.asarray(cost))
    if UNKNOWN in metrics:
        found = found | (np.asarray(metrics[UNKNOWN])[..., 0] > 0)
    if goal.flat:
        found = found | (np.asarray(metrics["goodput"]).sum(-1) <= 1e-9 * np.asarray(metrics["throughput"]).sum(-1))
    return found


@program()
def _many(drafted: Drafted, shapes: Shapes, load, points):
    return jax.vmap(lambda point: predicted(drafted, shapes, load, point))(points)


@program()
def _drawn(drafted: Drafted, models: ServingModel, shapes: Shapes, load, points):
    def one(model):
        model = replace(model, waiting_states=drafted.serving.waiting_states)
        metrics, _, saturated = jax.vmap(lambda point: predicted(drafted._replace(serving=model), shapes, load, point))(
            points
        )
        return metrics, saturated

    return jax.lax.map(one, models)


def evaluate_points(drafted: Drafted, shapes: Shapes, load: float, points: np.ndarray):
    """(metrics [points, classes] by name, saturated [points]) of many points, :data:`CHUNK` a call."""
    parts, tails = [], drafted.tails
    size = CHUNK if tails is None or not tails.spread else max(CHUNK * 64 // tails.states, FEW)  # memory
    for first in range(0, len(points), size):
        padded = padded_rows(points[first : first + size], size)
        metrics, _, saturated = _many(drafted, shapes, float(load), padded)
        parts.append((metrics, saturated))
    metrics, saturated = jax.tree.map(lambda *chunks: np.concatenate(chunks)[: len(points)], *parts)
    return metrics, saturated


def evaluate_draws(drafted: Drafted, models: ServingModel, shapes: Shapes, load: float, points: np.ndarray):
    """(metrics [draws, points, classes] by name, saturated [draws, points]) of a few points in each of ``models``,
    which have a leading axis; :data:`FEW` points a call."""
    parts = []
    for first in range(0, len(points), FEW):
        padded = padded_rows(points[first : first + FEW], FEW)
        parts.append(_drawn(drafted, models, shapes, float(load), padded))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1)[:, : len(points)], *parts)
