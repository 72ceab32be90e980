"""Every metric that can be explained, as a differentiable function of an operating point.

* means and capacity: fields of a prediction (:data:`diffspec.analysis.answers.METRICS`)
* percentiles of an open loop, such as ``ttft_p95``, scaled to the means of the prediction as `predict` tells them
* ``breakeven_rate`` [req/s]: the root r of g(r, p) = log(e2e with speculation/e2e without) = 0
* ``best_draft_length`` [tok]: the stationary point k of L(k, p) = log(e2e) with 1 < k < :data:`LONGEST`

A root x(p) of F(x, p) = 0 is found without derivatives as x0 and then told as x0 - F(x0, p)/F_x, with x0 and F_x held
fixed: one Newton step, whose derivative is that of the implicit function theorem, dx/dp = -F_p/F_x. So the break-even
rate moves by -g_p/g_r and the best draft length by -L_kp/L_kk.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.analysis.answers import METRICS, metric_values
from diffspec.analysis.inputs import Inputs, Point
from diffspec.configuration import batch_cap
from diffspec.latency_distribution import PERCENTILE_METRICS
from diffspec.lengths import Lengths
from diffspec.percentiles import known_up_to, predict_distribution, states_for
from diffspec.prediction import Prediction
from diffspec.programs import program
from diffspec.results import InputError

ROOTS = ("breakeven_rate", "best_draft_length")
EXPLAINED = (*METRICS, *PERCENTILE_METRICS, *ROOTS)
"""Metrics that :func:`diffspec.analysis.sensitivity.sensitivity` explains."""
LONGEST = 16.0
"""Longest draft [tok] among which the best is looked for."""
LANES, PASSES = 33, 9
BLOCK, SLOW_BLOCK = 256, 16


class Metric(NamedTuple):
    """A metric in the family of those that one program computes, ``index`` its place there. ``states``: of the chain
    that percentiles need."""

    name: str
    family: str
    index: int
    states: int = 0

    @property
    def without(self) -> tuple[str, ...]:
        """Inputs that the metric is not a function of, being itself their best or break-even value."""
        if self.family == "percentiles":
            return ("n_requests",)
        hidden = {
            "breakeven_rate": ("arrival_rate", "concurrency", "n_requests"),
            "best_draft_length": ("draft_length",),
        }
        return hidden.get(self.name, ())


class Law(NamedTuple):
    """A lognormal law of output lengths and its squared coefficient of variation."""

    lengths: Lengths
    scv: Any

    def at(self, scv) -> Lengths:
        """The law with another ``scv``, the same quantiles stretched: relative^q over its mean, q^2 = log(1 + scv)/
        log(1 + own scv); traceable."""
        if self.lengths.relative.size == 1:
            return self.lengths
        stretched = self.lengths.relative ** jnp.sqrt(jnp.log1p(scv) / jnp.log1p(self.scv))
        return Lengths(stretched / (self.lengths.share @ stretched), self.lengths.share)


def metric_of(name: str, point: Point, prediction: Callable[[], Prediction]) -> Metric:
    """The metric called ``name`` at a point. Errors: :class:`InputError` for an unknown one, a percentile of a closed
    loop or a finite run, a break-even rate or best draft length without speculation, and a batch beyond the chain."""
    if name in METRICS:
        return Metric(name, "means", list(METRICS).index(name))
    if name not in EXPLAINED:
        raise InputError(f"metric: got {name!r}; allowed: {', '.join(EXPLAINED)}")
    if name in PERCENTILE_METRICS:
        if not point.workload.is_open or point.workload.n_requests is not None:
            raise InputError(f"metric: got {name!r}; allowed: percentiles in a steady open loop, with arrival_rate")
        cap, batch = batch_cap(point.workload, point.config), float(prediction().effective_batch_size)
        states = states_for(None if cap is None else float(cap), 1.2 * batch)
        most = float(known_up_to(states, cap))
        if batch > most:
            raise InputError(f"metric: got {name!r} at a batch of {batch:.0f} req; allowed: up to {most:.0f}")
        return Metric(name, "percentiles", PERCENTILE_METRICS.index(name), states)
    if point.config.acceptance is None or float(point.config.draft_length) == 0:
        raise InputError(f"metric: got {name!r} without speculation; allowed: with draft_length > 0")
    return Metric(name, name, 0)


def all_of(metric: Metric, point: Point, law: Law | None = None) -> tuple[Any, Prediction]:
    """Values [family] of the metric's family at a point, and the prediction there; traceable and differentiable.
    ``law``: of output lengths, which percentiles need."""
    prediction = point.serving.predict(point.workload, point.config)
    if metric.family == "means":
        return jnp.stack([jnp.asarray(value) for value in metric_values(prediction).values()]), prediction
    if metric.family == "percentiles":
        assert law is not None
        return _percentiles(metric.states, point, prediction, law), prediction
    found = _breakeven(point) if metric.family == "breakeven_rate" else _best_draft_length(point)
    return found[None], prediction


@program(0, 1)
def _slope_program(metric: Metric, inputs: Inputs, point: Point, law: Law, values, index):
    def value(values):
        found, prediction = all_of(metric, inputs.placed(point, values), law)
        return found[index], prediction

    (found, prediction), slopes = jax.value_and_grad(value, has_aux=True)(values)
    return found, slopes, prediction


@program(0, 1)
def _value_program(metric: Metric, inputs: Inputs, point: Point, law: Law, lanes):
    def value(values):
        found, prediction = all_of(metric, inputs.placed(point, values), law)
        return found, prediction.utilization

    if metric.family == "means":
        return jax.vmap(value)(lanes)
    return jax.lax.map(value, lanes)


def slopes_at(metric: Metric, inputs: Inputs, point: Point, values) -> tuple[float, np.ndarray, Prediction]:
    """(value, derivative [inputs] with respect to each input's own value, prediction). All metrics of a family share
    one compiled program."""
    asked = (_family(metric), inputs, point, _law(point), np.asarray(values), metric.index)
    found, slopes, prediction = _slope_program(*asked)
    return float(found), np.asarray(slopes), prediction


def values_at(
    metric: Metric, inputs: Inputs, point: Point, lanes, progress: Callable[[float], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(values, utilizations) of the metric with inputs at each row of ``lanes`` [lanes, inputs], in blocks of one size,
    so that one compiled program serves all. ``progress`` is told the share of blocks that are done."""
    lanes, block = np.asarray(lanes), BLOCK if metric.family == "means" else SLOW_BLOCK
    filled = np.concatenate([lanes, np.repeat(lanes[:1], -len(lanes) % block, axis=0)])
    asked = (_family(metric), inputs, point, _law(point))
    blocks = np.split(filled, len(filled) // block)
    found = []
    for number, rows in enumerate(blocks, start=1):
        found.append(jax.tree.map(np.asarray, _value_program(*asked, rows)))
        if progress is not None:
            progress(number / len(blocks))
    values = np.concatenate([of_family[:, metric.index] for of_family, _ in found])
    return values[: len(lanes)], np.concatenate([used for _, used in found])[: len(lanes)]


def _family(metric: Metric) -> Metric:
    return Metric(metric.family, metric.family, 0, metric.states)


def _law(point: Point) -> Law:
    scv = float(point.workload.output_scv)
    return Law(Lengths.lognormal(scv), np.asarray(scv))


def _percentiles(states: int, point: Point, prediction: Prediction, law: Law):
    lengths = law.at(point.workload.output_scv)
    found = predict_distribution(*point, lengths, states=states)
    return jnp.concatenate(list(found.at_means(prediction.ttft, prediction.e2e_latency).values()))


def _newton(function: Callable, root):
    """The root told by one Newton step with a fixed slope, see the module; (root, slope)."""
    root = jax.lax.stop_gradient(root)
    value, slope = jax.jvp(function, (root,), (jnp.ones_like(root),))
    slope = jax.lax.stop_gradient(slope)
    return root - value / jnp.where(slope == 0.0, 1.0, slope), slope


def _breakeven(point: Point):
    serving, workload, config = point
    known = jax.lax.stop_gradient(serving.breakeven_rate(workload, config))
    exists = jnp.isfinite(known)
    lengths = jnp.stack([jnp.asarray(config.draft_length, dtype=float), jnp.zeros(())])

    def gap(rate):
        load = replace(workload, arrival_rate=rate, concurrency=None, n_requests=None)
        latency = jax.vmap(lambda k: serving.predict(load, replace(config, draft_length=k)).e2e_latency)(lengths)
        return jnp.log(latency[0] / latency[1])

    rate, _ = _newton(gap, jnp.where(exists, known, 1e-3))
    return jnp.where(exists, rate, jnp.inf)


def _best_draft_length(point: Point):
    serving, workload, config = point

    def cost(length):
        return jnp.log(serving.predict(workload, replace(config, draft_length=length)).e2e_latency)

    def slope(length):
        return jax.jvp(cost, (length,), (jnp.ones_like(length),))[1]

    def around(low, high):
        return low + (high - low) * jnp.linspace(0.0, 1.0, LANES)

    lengths = around(jnp.ones(()), jnp.full((), LONGEST))
    best = jnp.argmin(jax.vmap(cost)(lengths))
    ends = lengths[jnp.maximum(best - 1, 0)], lengths[jnp.minimum(best + 1, LANES - 1)]

    def narrow(_, ends):
        lengths = around(*ends)
        first = jnp.argmax(jax.vmap(slope)(lengths) >= 0.0)
        return lengths[jnp.maximum(first - 1, 0)], lengths[first]

    low, high = jax.lax.fori_loop(0, PASSES, narrow, jax.tree.map(jax.lax.stop_gradient, ends))
    start = jax.lax.stop_gradient(0.5 * (low + high))
    inside = (start > 1.0 + 1e-6) & (start < LONGEST - 1e-6)
    found, curvature = _newton(slope, jnp.where(inside, start, 2.5))
    smooth = jnp.abs(jax.lax.stop_gradient(found) - start) < 1e-4  # else no root: the slope jumps over 0 at a kink
    return jnp.where(inside & smooth & (curvature > 0.0), found, jnp.nan)
