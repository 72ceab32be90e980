"""Central 90 % intervals of predictions: the whole prediction repeated for draws of what is not known.

Draws are serving models, one module with a leading axis: of the efficiencies before any trace, of the errors of a
transfer, or of what a fit leaves open (:mod:`diffspec.fitting.uncertainty`). A fitted model also misses something: the
values of each draw are scattered by its misfit, so that the interval is that of what a long benchmark would measure,
the server's true means (:func:`misfit`). Acceptance is as given and in no interval.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffspec.analysis.plain import as_floats, enough_states, finite
from diffspec.configuration import Configuration
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.uncertainty import DRAWS, LEVEL, Uncertainty
from diffspec.programs import program
from diffspec.results import RESULTS
from diffspec.serving import ServingModel
from diffspec.workload import Workload

LATENCIES = ("ttft", "itl", "tpot", "e2e_latency")
COMPARED = ("speedup", "breakeven_rate")
METRICS = (*LATENCIES, "throughput", "capacity", "utilization", "effective_batch_size", *COMPARED)
"""Metrics that come with an interval."""
NO_INTERVALS = "the model does not tell how sure it is: fit the trace again with this version of diffspec"
_SCAN, _REFINE = 32, 4
"""Rates at which a draw's break-even rate is looked for, and how often the bracket found is narrowed."""


@program(0)
def _predict_draws(states: int, models: ServingModel, workloads: Workload, config: Configuration):
    """Per draw, with a workload of its own, the metrics of ``config``, and of it and no speculation ``e2e_both`` [s],
    ``capacity_both`` [req/s] and ``saturated_both``; ``states``: waiting_states."""
    lengths = jnp.stack([jnp.asarray(config.draft_length, dtype=float), jnp.zeros(())])

    def one(model, workload):
        model = dataclasses.replace(model, waiting_states=states)
        both = jax.vmap(lambda k: model.predict(workload, eqx.tree_at(lambda c: c.draft_length, config, k)))(lengths)
        found = {name: getattr(both, name)[0] for name in METRICS if name not in COMPARED}
        found |= {"e2e_both": both.e2e_latency, "capacity_both": both.capacity}
        return found | {"saturated_both": both.result == RESULTS.saturated}

    return jax.vmap(one)(models, workloads)


def _predicted(models: ServingModel, workload: Workload, config: Configuration, rates=None) -> dict[str, np.ndarray]:
    """:func:`_predict_draws` of one workload for all draws, or with an arrival rate for each."""
    (count,) = jax.tree.leaves(models)[0].shape
    states = enough_states(next(each(models)), workload, config).waiting_states
    workloads = jax.tree.map(lambda leaf: np.broadcast_to(leaf, count).astype(float), workload)
    if rates is not None:
        workloads = eqx.tree_at(lambda w: w.arrival_rate, workloads, rates)
    return {name: np.asarray(values) for name, values in _predict_draws(states, models, workloads, config).items()}


def _breakeven_rates(models, workload: Workload, config: Configuration, most: np.ndarray) -> np.ndarray:
    """Each draw's smallest arrival rate [req/s] below ``most`` at which both arms are equally fast, infinite where
    none is (:meth:`ServingModel.breakeven_rate`): scanned, then interpolated in a bracket that narrows. By the program
    of :func:`_predict_draws`, which is compiled already."""
    load = dataclasses.replace(workload, arrival_rate=np.asarray(1.0), concurrency=None, n_requests=None)

    def gaps(rates):
        latency = _predicted(models, load, config, rates)["e2e_both"]
        return np.log(latency[:, 0] / latency[:, 1])

    rates = np.linspace(1e-6, 0.998, _SCAN)[:, None] * most
    found = np.stack([gaps(row) for row in rates])
    changed = np.sign(found[1:]) != np.sign(found[:-1])
    first, draws = np.argmax(changed, axis=0), np.arange(most.size)
    low, high = rates[first, draws], rates[first + 1, draws]
    at_low, at_high = found[first, draws], found[first + 1, draws]

    def between():
        steep = np.where(at_low == at_high, 1.0, at_low - at_high)
        return low + (high - low) * at_low / steep

    for _ in range(_REFINE):
        middle = between()
        gap = gaps(middle)
        left = np.sign(gap) == np.sign(at_low)
        low, at_low = np.where(left, middle, low), np.where(left, gap, at_low)
        high, at_high = np.where(left, high, middle), np.where(left, at_high, gap)
    return np.where(changed.any(axis=0), between(), np.inf)


@dataclasses.dataclass(frozen=True)
class Draws:
    """One operating point predicted by each of a batch of ``models``.

    ``values[name]`` [draws] of :data:`METRICS`, infinite where a saturated draw has none; ``saturated`` [draws];
    ``scales[name]`` [log units]: the misfit, 0 without a fit, None where it is not known; ``known``, ``requests``: the
    fit behind it, and how many requests a value is a mean of
    """

    models: ServingModel
    values: dict[str, np.ndarray]
    saturated: np.ndarray
    scales: dict[str, float | None]
    known: Uncertainty | None
    requests: float

    def spread(self, metric: str, values=None) -> dict[str, float | None] | None:
        """:func:`spread` of a metric, or of ``values`` of its kind; None where its misfit is not known."""
        scale = self.scales[metric]
        return None if scale is None else spread(self.values[metric] if values is None else values, self.known, scale)

    def told(self) -> dict[str, Any]:
        """As plain data: ``level``, ``draws``, the share of draws that saturate and that have a break-even rate,
        ``includes`` (what the intervals hold) and ``metrics[name]`` = low, median, high (None where infinite)."""
        crosses = np.isfinite(self.values.get("breakeven_rate", np.nan))
        kept = self.values | ({"breakeven_rate": self.values["breakeven_rate"][crosses]} if crosses.shape else {})
        spreads = {name: self.spread(name, kept[name]) for name in METRICS if name in kept}
        fitted = [] if self.known is None else ["misfit"] if np.isinf(self.requests) else ["misfit", "requests"]
        return {
            "level": LEVEL,
            "draws": int(self.saturated.size),
            "saturated_share": float(self.saturated.mean()),
            **({"breakeven_share": float(crosses.mean())} if crosses.shape else {}),
            "includes": ["parameters", *fitted],
            "metrics": {name: edges for name, edges in spreads.items() if edges is not None},
        }


def draw(models: ServingModel, workload: Workload, config: Configuration, known: Uncertainty | None = None) -> Draws:
    """Predict one operating point by each of a batch of models: draws of what a fit leaves open where ``known``."""
    workload, config = (as_floats(part) for part in (workload, config))
    models = as_floats(models)  # one compiled program for models of one structure
    found = _predicted(models, workload, config)
    e2e, capacity, ends = (found.pop(f"{name}_both") for name in ("e2e", "capacity", "saturated"))
    ttft_share, saturated = float(np.median(found["ttft"] / found["e2e_latency"])), ends[:, 0]
    found |= {name: np.where(saturated, np.inf, found[name]) for name in (*LATENCIES, "effective_batch_size")}
    if float(config.draft_length) > 0:
        e2e = np.where(ends, np.inf, e2e)
        with np.errstate(invalid="ignore"):
            found["speedup"] = e2e[:, 1] / e2e[:, 0]  # not a number where both saturate
        found["breakeven_rate"] = _breakeven_rates(models, workload, config, capacity.min(axis=1))
    scales: dict[str, float | None] = dict.fromkeys(found, 0.0)
    requests = np.inf if workload.n_requests is None else float(workload.n_requests)
    if known is not None:
        scales = misfit(known, is_open=workload.is_open, ttft_share=ttft_share, requests=requests)
    return Draws(models, found, saturated, scales, known, requests)


def intervals(models: ServingModel, workload: Workload, config: Configuration) -> dict[str, Any]:
    """The central :data:`LEVEL` of each metric over a batch of models, see :meth:`Draws.told`."""
    return draw(models, workload, config).told()


def misfit(
    known: Uncertainty, *, is_open: bool, ttft_share: float, requests: float = np.inf
) -> dict[str, float | None]:
    """Scale [log units] of what a fit misses of each of :data:`METRICS`; None where that is not known.

    Latencies have what their own residuals have. Little's law passes on that of the end-to-end latency to the batch of
    an open loop (B = rate*e2e) and the throughput of a closed one (concurrency/e2e); what is given has none. A server
    whose steps are longer by some share has a capacity less by as much: that of itl. A speedup is a ratio of two
    end-to-end latencies, whose misfits are independent. A break-even rate has none: parameters alone.
    """

    def of(column: str) -> float | None:
        found = known.noise_of(column, ttft_share, requests)
        return None if found is None else float(found)

    step, whole, served = of("itl_mean"), of("e2e_mean"), of("throughput")
    return {
        "ttft": of("ttft_mean"),
        "itl": step,
        "tpot": of("tpot_mean"),
        "e2e_latency": whole,
        "throughput": 0.0 if is_open else whole if served is None else served,
        "capacity": step,
        "utilization": step,
        "effective_batch_size": whole if is_open else 0.0,
        "speedup": None if whole is None else 2.0**0.5 * whole,
        "breakeven_rate": 0.0,
    }


def spread(values, known: Uncertainty | None = None, scale: float = 0.0) -> dict[str, float | None]:
    """The central :data:`LEVEL` of draws, scattered by a misfit of ``scale`` [log units]: low, median and high, None
    where infinite; draws that are not a number are left out.

    >>> spread(range(101))
    {'low': 5.0, 'median': 50.0, 'high': 95.0}
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if not values.size:
        return dict.fromkeys(("low", "median", "high"))
    edges = (0.5 - LEVEL / 2, 0.5, 0.5 + LEVEL / 2)
    low, median, high = np.quantile(values, edges, method="nearest")  # infinite ones cannot be averaged
    if known is not None and scale > 0:
        (low,), (high,) = known.edges(values[:, None], np.asarray([scale]))
    return {"low": finite(low), "median": finite(median), "high": finite(high)}


def draw_deployment(
    deployment: FittedDeployment, workload: Workload, config: Configuration, models: ServingModel | None = None
) -> Draws | None:
    """:func:`draw` of a deployment by ``models``, by default by what its fit leaves open; None where the model does
    not tell how sure it is."""
    known = deployment.uncertainty if models is None else None
    if known is not None:
        models = known.models(deployment.serving, DRAWS)
    if models is None:
        return None
    drawn = draw(models, workload, config, known)
    if deployment.plain_measured:
        return drawn
    values = {name: values for name, values in drawn.values.items() if name not in COMPARED}
    return dataclasses.replace(drawn, values=values)


def each(models: ServingModel) -> Iterator[ServingModel]:
    """The models of a leading axis one by one, for programs that are compiled for one already."""
    models = as_floats(models)
    for index in range(jax.tree.leaves(models)[0].shape[0]):
        yield jax.tree.map(lambda leaf, index=index: leaf[index], models)
