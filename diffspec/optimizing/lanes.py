"""Many servers under load at once, and the largest arrival rate at which each keeps every limit.

A lane is one serving model with one workload and one configuration. With excess(rate) the largest over the limits of
log(value/bound), for a limit on percentile p of log(P(metric > bound)/(1 - p)), the answer is the first root of
excess(rate) = 0 in (0, 0.999*capacity), in the coordinate x of rate = capacity*(1 - exp(-x)), in which latencies that
grow like 1/(1 - utilization) are straight lines. The excess is scanned at :data:`SCAN` places, since nothing promises
that it only grows, and its first change of sign refined by Chandrupatla's bracketed search (1997) on all lanes
together. The rate told is the end of the bracket at which every limit is kept. Derivation: ours.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import elementwise

from diffspec.analysis.answers import metric_values
from diffspec.configuration import Configuration
from diffspec.lengths import Lengths
from diffspec.optimizing.limits import Limit
from diffspec.percentiles import predict_distribution
from diffspec.programs import program
from diffspec.serving import ServingModel
from diffspec.workload import Workload

COMPILED = {"xla_backend_optimization_level": 1}
"""Hardly longer to compile than without optimisation, and three times as fast to run."""
SCAN, NEAR = 8, 3
"""Places of the scan between no load and the largest rate, and how many of them come first where only the first root
counts: most lanes need no more."""
LEAST = 1e-6
"""Share of capacity that counts as no load at all."""
MOST = 0.9989
"""Share of capacity up to which a server is not saturated."""
TOLERANCE = 1e-6
"""Width of the last bracket, relative to the rate."""
CALL, CHUNK = 512, 8
"""Lanes of one call of the compiled program, which goes through those that are there by so many at a time: one program
for any number of lanes."""
_LEAST_TAIL = 1e-9
_FARTHEST = -math.log1p(-MOST)


class Lanes(NamedTuple):
    """Servers with their questions: modules whose leaves all have a leading axis, and what all lanes share.

    ``workloads``: of open loops; their arrival_rate is replaced. ``lengths``: the law of output lengths, for
    percentiles; ``states`` [req]: size of the chain of requests, at least every batch cap; ``asked``: how many times
    the program takes of each metric that has percentiles, so that all questions about these lanes run one program
    """

    models: ServingModel
    workloads: Workload
    configs: Configuration
    lengths: Lengths
    states: int
    asked: tuple[tuple[str, int], ...] = ()

    @property
    def count(self) -> int:
        """How many lanes there are."""
        return int(np.shape(self.workloads.prompt_length)[0])

    def take(self, index) -> "Lanes":
        """The lanes at ``index``, in this order, repeated where it repeats."""
        index = np.asarray(index, dtype=int)
        models, workloads, configs = jax.tree.map(lambda leaf: leaf[index], (self.models, self.workloads, self.configs))
        return self._replace(models=models, workloads=workloads, configs=configs)


class LargestRates(NamedTuple):
    """Per lane: ``rate`` [req/s], 0 where a limit is broken without load; ``capacity`` [req/s]; ``excess`` at no load;
    ``binding``: the index of the limit that is reached there or broken without load, -1 for the capacity; ``again``:
    whether the limits are kept once more at some higher rate that was scanned."""

    rate: np.ndarray
    capacity: np.ndarray
    excess: np.ndarray
    binding: np.ndarray
    again: np.ndarray


def asked_of(metrics: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """:attr:`Lanes.asked` for limits on these metrics.

    >>> asked_of(["ttft_p50", "ttft_p95", "tpot_mean", "e2e_p99"])
    (('ttft', 2), ('e2e', 1))
    """
    columns = by_metric([Limit(metric, 1, 1.0) for metric in metrics])
    return tuple((metric, len(found)) for metric, found in columns.items())


def join(
    models: Sequence[Any], workloads: Sequence[Any], configs: Sequence[Any], lengths: Lengths, states: int, asked=()
) -> Lanes:
    """:class:`Lanes` of single modules of one structure each."""

    def stacked(column):
        return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf, dtype=float) for leaf in leaves]), *column)

    shared = jax.tree.map(np.asarray, lengths)
    return Lanes(stacked(models), stacked(workloads), stacked(configs), shared, states, asked)


def evaluate(
    lanes: Lanes, rates, times: Mapping[str, np.ndarray] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(values, tails) at an arrival rate [req/s] for each lane: means by their names in ``METRICS``, with ``batch``
    [req] in service; and ``tails[metric]`` [lanes, times] = P(metric > t) at the ``times[metric]`` [lanes, times]
    asked for."""
    rates = np.asarray(rates, dtype=float)
    given, times = dict(times or {}), {}
    for metric, count in lanes.asked:
        found = np.ones((lanes.count, count))
        if metric in given:
            found[:, : given[metric].shape[1]] = given[metric]
        times[metric] = found
    parts = []
    for start in range(0, lanes.count, CALL):
        count = min(CALL, lanes.count - start)
        index = np.minimum(np.arange(start, start + CALL), lanes.count - 1)
        part = lanes.take(index)
        asked = {metric: found[index] for metric, found in times.items()}
        found = _evaluate(part.states, *part[:3], part.lengths, rates[index], asked, -(-count // CHUNK))
        parts.append(jax.tree.map(lambda leaf, count=count: np.asarray(leaf)[:count], found))
    return jax.tree.map(lambda *columns: np.concatenate(columns), *parts)


@program(0, compiler_options=COMPILED)
def _evaluate(states: int, models, workloads, configs, lengths, rates, times, chunks):
    def one(model, workload, config, rate, asked):
        model = dataclasses.replace(model, waiting_states=states)
        load = eqx.tree_at(lambda w: w.arrival_rate, workload, rate)
        found = model.predict(load, config)
        means = metric_values(found) | {"batch": found.effective_batch_size}
        if not asked:
            return means, {}
        scaled = {"ttft": found.ttft, "e2e": found.e2e_latency}
        spread = predict_distribution(
            model, load, config, lengths, states=states, percentiles=(), at=asked, means=scaled
        )
        return means, {metric: 1.0 - share for metric, share in spread.attained.items()}

    return in_chunks(one, (models, workloads, configs, rates, times), chunks)


def in_chunks(one: Callable, lanes: tuple, chunks):
    """``one(*lane)`` of the first ``chunks`` times :data:`CHUNK` of :data:`CALL` lanes, zeros of the others; traced, so
    that one program serves any number of lanes."""

    def chunk(number):
        part = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, CHUNK * number, CHUNK), lanes)
        return jax.vmap(one)(*part)

    def store(number, whole):
        return jax.tree.map(
            lambda leaf, part: jax.lax.dynamic_update_slice_in_dim(leaf, part, CHUNK * number, 0), whole, chunk(number)
        )

    empty = jax.tree.map(lambda leaf: jnp.zeros((CALL, *leaf.shape[1:]), leaf.dtype), jax.eval_shape(chunk, 0))
    return jax.lax.fori_loop(0, chunks, store, empty)


def excesses(lanes: Lanes, limits: Sequence[Limit], rates, shift=None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Log excess [lanes, limits] at a rate for each lane, > 0 where a limit is broken, and the means. ``shift`` [lanes,
    limits]: what a measured value is expected to have above the predicted one, in log units."""
    shift = np.zeros((lanes.count, len(limits))) if shift is None else shift
    bounds = np.asarray([limit.bound for limit in limits]) * np.exp(-shift)
    columns = by_metric(limits)
    values, tails = evaluate(lanes, rates, {metric: bounds[:, found] for metric, found in columns.items()})
    found = np.zeros((lanes.count, len(limits)))
    for index, limit in enumerate(limits):
        if limit.percentile is None:
            found[:, index] = np.log(np.maximum(values[limit.metric], 1e-300) / bounds[:, index])
        else:
            metric, share = limit.percentile
            tail = tails[metric][:, columns[metric].index(index)]
            found[:, index] = np.log(np.maximum(tail, _LEAST_TAIL) / (1.0 - share))
    return found, values


def by_metric(limits: Sequence[Limit]) -> dict[str, list[int]]:
    """The limits on percentiles by metric: their places among all limits."""
    columns: dict[str, list[int]] = {}
    for index, limit in enumerate(limits):
        if limit.percentile is not None:
            columns.setdefault(limit.percentile[0], []).append(index)
    return columns


def largest_rates(lanes: Lanes, limits: Sequence[Limit], shift=None, *, beyond: bool = True) -> LargestRates:
    """The largest arrival rate [req/s] of each lane that keeps every limit: see the module. Without limits it is 0.9989
    of capacity. With ``beyond`` False what lies beyond the first root is not looked at (``again`` is False), nor which
    limit it is of (``binding`` is -1): the same rates, in fewer evaluations."""
    count = lanes.count
    shift = np.zeros((count, len(limits))) if shift is None else np.asarray(shift, dtype=float)
    none = np.full(count, 1e-9)
    capacity = evaluate(lanes, none)[0]["capacity"]

    def at(x, index):
        """Worst log excess and the limit it is of, of the lanes at ``index``."""
        if not limits:
            return np.full(len(index), -1.0), np.full(len(index), -1)
        found, _ = excesses(lanes.take(index), limits, -capacity[index] * np.expm1(-x), shift[index])
        return found.max(axis=1), found.argmax(axis=1)

    grid = np.concatenate([[-math.log1p(-LEAST)], np.linspace(0.0, _FARTHEST, SCAN + 1)[1:]])
    scanned, limit = np.full((len(grid), count), np.inf), np.full((len(grid), count), -1)
    parts = (range(len(grid)),) if beyond else (range(NEAR + 1), range(NEAR + 1, len(grid)))
    for part in parts:
        going = np.flatnonzero((scanned[: part.start] <= 0).all(axis=0))
        if not going.size:
            continue
        shape = (len(part), len(going))
        found = at(np.repeat(grid[part], len(going)), np.tile(going, len(part)))
        places = np.asarray(part)[:, None], going
        scanned[places], limit[places] = (each.reshape(shape) for each in found)
    broken = scanned > 0
    first = np.where(broken.any(axis=0), broken.argmax(axis=0), len(grid))
    again = np.asarray([beyond and (~broken[first[i] :, i]).any() for i in range(count)])
    rate = np.where(first == len(grid), MOST * capacity, 0.0)
    binding = np.where(first == 0, limit[0], -1)
    inside = np.flatnonzero((first > 0) & (first < len(grid)))
    if inside.size:
        low, high = grid[first[inside] - 1], grid[first[inside]]
        root = elementwise.find_root(
            lambda x, index: at(x, index.astype(int))[0],
            (low, high),
            args=(inside,),
            tolerances={"xatol": 0.0, "xrtol": TOLERANCE, "fatol": 0.0, "frtol": 0.0},
            maxiter=60,
        )
        left, right = root.bracket
        below, above = root.f_bracket
        kept = np.where(below <= 0, left, np.where(above <= 0, right, low))
        rate[inside] = -capacity[inside] * np.expm1(-kept)
        if beyond:
            binding[inside] = at(np.where(below > 0, left, right), inside)[1]
    return LargestRates(rate, capacity, scanned[0], binding, again)


def limited_values(lanes: Lanes, metrics: Sequence[str], rates) -> dict[str, np.ndarray]:
    """The value [lanes] of each of ``metrics``, means or percentiles such as ``ttft_p95`` [s], at a rate for each lane.

    Percentiles are found on the distribution by bracketed search, all lanes together, to 1e-6; not a number where there
    are none (times per token of outputs of one token)."""
    asked = [Limit(metric, 1, 1.0) for metric in metrics]
    values, _ = evaluate(lanes, rates)
    found = {limit.metric: values[limit.metric] for limit in asked if limit.percentile is None}
    for limit in asked:
        if limit.percentile is not None:
            found[limit.metric] = _quantile(lanes, limit, values, np.asarray(rates, dtype=float))
    return found


def _quantile(lanes: Lanes, limit: Limit, values: Mapping[str, np.ndarray], rates: np.ndarray) -> np.ndarray:
    metric, share = limit.percentile  # type: ignore[misc]

    def gap(log_time, index):
        index = index.astype(int)
        _, tails = evaluate(lanes.take(index), rates[index], {metric: np.exp(log_time)[:, None]})
        return np.log(np.maximum(tails[metric][:, 0], _LEAST_TAIL) / (1.0 - share))

    every = np.arange(lanes.count)
    middle = np.log(np.maximum(values[f"{metric}_mean"], 1e-9))
    low, high = middle - 3.0, middle + 3.0
    for _ in range(8):  # widened until they hold the root
        wide = gap(low, every) < 0
        low = np.where(wide, low - 3.0, low)
        tall = gap(high, every) > 0
        high = np.where(tall, high + 3.0, high)
        if not (wide.any() or tall.any()):
            break
    tolerances = {"xatol": TOLERANCE, "xrtol": 0.0, "fatol": 0.0, "frtol": 0.0}
    return np.exp(elementwise.find_root(gap, (low, high), args=(every,), tolerances=tolerances, maxiter=60).x)


def over_draws(lanes: Lanes, models: ServingModel) -> Lanes:
    """Each lane's question asked of each of ``models`` (a leading axis): lane by lane, models within."""
    drawn = int(jnp.shape(jax.tree.leaves(models)[0])[0])
    outer, inner = np.repeat(np.arange(lanes.count), drawn), np.tile(np.arange(drawn), lanes.count)
    return lanes.take(outer)._replace(models=jax.tree.map(lambda leaf: np.asarray(leaf, dtype=float)[inner], models))
