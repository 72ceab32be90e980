"""Benchmark runs that could be made, and what each would tell of a fitted deployment's parameters.

A run at x measures log ttft and log itl (log e2e where a fit knew only that). Linearised at the fitted coordinates,
its information is I(x) = sum_o J_o(x)' J_o(x) * w_o, with J_o the gradient of log o by the unconstrained coordinates
through the equilibrium and w_o = (nu+1)/(nu+3)/sigma_o^2, sigma_o the fitted noise of a mean over the planned requests:
what a fit (:meth:`diffspec.fitting.objective.Objective.fisher_information`) expects of such a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import AbstractAcceptance
from diffspec.analysis.optimal_design import criterion
from diffspec.configuration import Configuration
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.uncertainty import Uncertainty
from diffspec.parameters import (
    Scalar,
    get_parameters,
    parameter_infos,
    set_parameters,
    to_constrained,
    to_unconstrained,
)
from diffspec.programs import program
from diffspec.results import RESULTS, InputError
from diffspec.serving import MOST_STATES, ServingModel
from diffspec.workload import Workload

LOOPS = ("arrival_rate", "concurrency")
APART = 1.25
"""Two runs of one draft length differ by at least this factor in load or a length: nearer ones share what the model
misses, as repeats do, and the second would tell less than its information says."""
TOGETHER = 64
"""How many runs the model is asked about at once."""
PREDICTED = ("ttft", "itl", "e2e_latency")


@dataclass(frozen=True)
class Run:
    """One benchmark run: ``loop`` (one of LOOPS) with its ``load`` [req/s or req], draft length and mean lengths."""

    loop: str
    load: float
    draft_length: int
    prompt_length: float
    output_length: float

    @property
    def x(self) -> np.ndarray:
        """log load, log prompt length, log output length, draft length."""
        return np.append(np.log([self.load, self.prompt_length, self.output_length]), self.draft_length)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the load under the name of its loop."""
        lengths = {"prompt_length": self.prompt_length, "output_length": self.output_length}
        return {self.loop: self.load, "draft_length": self.draft_length} | lengths


def alike(some: list[Run], others: list[Run]) -> np.ndarray:
    """True [some, others] for pairs of runs that are too near to be made both; see APART."""
    runs = [*some, *others]
    x, loops = np.stack([run.x for run in runs]), [LOOPS.index(run.loop) for run in runs]
    scaled = np.column_stack([x[:, :3] / (np.log(APART) * (1 - 1e-9)), x[:, 3], loops])
    gaps = np.abs(scaled[: len(some), None] - scaled[None, len(some) :])
    return np.all(gaps < 1.0, axis=-1)


def read_run(given: Mapping[str, Any]) -> Run:
    """A run from plain data with the keys of :meth:`Run.to_dict`; others are ignored. Errors: :class:`InputError`."""
    loops = [loop for loop in LOOPS if given.get(loop) is not None and given[loop] == given[loop]]
    if len(loops) != 1:
        raise InputError(f"candidate: got {' and '.join(loops) or 'no load'}; allowed: one of {' and '.join(LOOPS)}")
    names = (loops[0], "draft_length", "prompt_length", "output_length")
    try:
        load, length, prompt, output = (float(given[name]) for name in names)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"candidate: {error}; allowed: numbers for {', '.join(names)}") from None
    Workload(prompt_length=prompt, output_length=output, **{loops[0]: load})  # checks the ranges
    return Run(loops[0], load, int(length), prompt, output)


class Server(eqx.Module):
    """A fitted deployment as a function of where it is asked and of ``shift``, a move of its fitted coordinates."""

    serving: ServingModel
    acceptance: AbstractAcceptance | None
    max_batch_size: Scalar | None
    kv_capacity_tokens: Scalar | None
    draft_probability: Scalar
    paths: tuple[str, ...] = eqx.field(static=True)

    def predict(self, loop: str, x, shift):
        """The prediction at ``x`` (:attr:`Run.x`) of the model moved by ``shift`` [paths]."""
        infos, values = parameter_infos(self.serving), get_parameters(self.serving)
        moved = {
            path: to_constrained(to_unconstrained(values[path], infos[path]) + shift[index], infos[path])
            for index, path in enumerate(self.paths)
        }
        load, prompt, output = jnp.exp(x[0]), jnp.exp(x[1]), jnp.exp(x[2])
        config = Configuration(
            draft_length=0.0 if self.acceptance is None else x[3],
            acceptance=self.acceptance,
            max_batch_size=self.max_batch_size,
            kv_capacity_tokens=self.kv_capacity_tokens,
            draft_probability=self.draft_probability,
        )
        workload = Workload(prompt_length=prompt, output_length=output, **{loop: load})
        return set_parameters(self.serving, moved).predict(workload, config)

    def logs(self, loop: str, x, shift):
        """log ttft, log itl, log e2e [3] and the prediction."""
        found = self.predict(loop, x, shift)
        return jnp.log(jnp.stack([getattr(found, name) for name in PREDICTED])), found

    def jacobian(self, loop: str, x):
        """Gradients [3, paths] of the logs by the fitted coordinates, and the prediction."""
        still = jnp.zeros(len(self.paths), dtype=jnp.result_type(float))
        return jax.jacfwd(lambda shift: self.logs(loop, x, shift), has_aux=True)(still)


@program(0)
def _ask(loop: str, server: Server, points):
    jacobian, found = jax.vmap(lambda x: server.jacobian(loop, x))(points)
    stable = (found.result == RESULTS.successful) & jnp.isfinite(jacobian).all(axis=(1, 2))
    return jacobian, found.e2e_latency, found.throughput, found.utilization, found.capacity, stable


@program(0)
def _slope(loop: str, server: Server, x, precision, weights, questions):
    def after(x):
        jacobian, _ = server.jacobian(loop, x)
        return criterion(precision + jnp.einsum("op,o,oq->pq", jacobian, weights, jacobian), questions, jnp)

    value, push = jax.linearize(after, x)  # forward: compiles in half the time of reverse, for three numbers
    return value, jax.vmap(push)(jnp.eye(4, dtype=x.dtype)[:3])


@dataclass(frozen=True)
class Asked:
    """What the model says at some runs: ``jacobian`` [runs, 3, paths] of log ttft, itl, e2e; e2e [s], throughput
    [req/s], utilization, capacity [req/s], and whether a steady state exists."""

    jacobian: np.ndarray
    e2e: np.ndarray
    throughput: np.ndarray
    utilization: np.ndarray
    capacity: np.ndarray
    stable: np.ndarray


class Knowledge:
    """A fitted deployment as its runs see it: ``precision`` [paths, paths] before any new run, ``weights`` [3] of
    log ttft, itl and e2e, and questions about runs.

    ``precision`` = D + (C^-1 - D)/f^2 with D the prior's, C the fit's covariance and f its inflation: held-out misses
    widen what the rows told, not what the priors hold; C^-1 where f = 1.
    """

    def __init__(self, deployment: FittedDeployment, acceptance: AbstractAcceptance | None, requests: int):
        known = deployment.uncertainty
        if known is None:
            raise InputError(
                f"deployment {deployment.name!r}: the model file does not tell how uncertain its parameters are (an "
                "older version fitted it, or nothing was fitted); fit the trace again with 'diffspec fit'"
            )
        prior = np.diag(known.prior**-2.0)
        told = (np.linalg.inv(known.covariance) - prior) / known.parameter_inflation**2
        values, vectors = np.linalg.eigh(0.5 * (told + told.T))
        self.precision = prior + (vectors * np.maximum(values, 0.0)) @ vectors.T
        self.weights = observed_weights(known, requests)
        if not self.weights.any():
            raise InputError(
                f"deployment {deployment.name!r}: got noise of {', '.join(known.misfit)}; allowed: of ttft, itl, tpot "
                "or e2e; a design needs the noise of a latency: fit one of them"
            )
        self.paths, self.uncertainty = known.paths, known
        cap, tokens = (deployment.defaults.get(name) for name in ("max_batch_size", "kv_capacity_tokens"))
        states = 0 if cap is None or cap > MOST_STATES else 2 ** int(np.ceil(np.log2(max(cap, 16.0))))
        serving = replace(deployment.serving, waiting_states=states)
        leaves = (serving, acceptance or deployment.acceptance, cap, tokens)
        serving, acceptance, cap, tokens = jax.tree.map(lambda leaf: np.asarray(leaf, dtype=float), leaves)
        share = np.asarray(float(deployment.defaults.get("draft_probability", 1.0)))
        self.server = Server(serving, acceptance, cap, tokens, share, known.paths)

    def ask(self, runs: list[Run]) -> Asked:
        """What the model says at ``runs``."""
        count, size = len(runs), len(self.paths)
        jacobian = np.zeros((count, 3, size))
        numbers = np.zeros((5, count))
        for loop in LOOPS:
            rows = [index for index, run in enumerate(runs) if run.loop == loop]
            if rows:  # in batches of one size: one program
                points = np.stack([runs[index].x for index in rows])
                whole = points[np.minimum(np.arange(-(-len(rows) // TOGETHER) * TOGETHER), len(rows) - 1)]
                parts = [_ask(loop, self.server, some) for some in np.split(whole, len(whole) // TOGETHER)]
                for into, part in zip((jacobian, *numbers), zip(*parts, strict=True), strict=True):
                    into[rows] = np.concatenate([np.asarray(some) for some in part])[: len(rows)]
        stable = numbers[-1] > 0
        jacobian[~stable] = 0.0
        e2e, throughput, utilization, capacity, _ = numbers
        return Asked(jacobian, e2e, throughput, utilization, capacity, stable)

    def informations(self, asked: Asked) -> np.ndarray:
        """Information [runs, paths, paths] of each run; zero where no steady state exists."""
        return np.einsum("rop,o,roq->rpq", asked.jacobian, self.weights, asked.jacobian)

    def slope(self, loop: str, x, precision, questions) -> tuple[float, np.ndarray]:
        """The criterion after one more run at ``x``, and its exact gradient [3] by log load and log lengths."""
        value, gradient = _slope(loop, self.server, jnp.asarray(x), precision, self.weights, questions)
        return float(value), np.asarray(gradient)


def observed_weights(known: Uncertainty, requests: int) -> np.ndarray:
    """(nu+1)/(nu+3)/sigma^2 of log ttft, itl and e2e [3] of a run of ``requests`` requests; 0 for what a fit does not
    use: e2e where it knows ttft and itl."""
    scales = [known.noise(column, np.asarray([requests])) for column in ("ttft_mean", "itl_mean", "e2e_mean")]  # type: ignore[arg-type]
    if scales[0] is not None and scales[1] is not None:
        scales[2] = None
    tail = (known.degrees_of_freedom + 1.0) / (known.degrees_of_freedom + 3.0)
    return np.asarray([0.0 if scale is None else tail / float(scale[0]) ** 2 for scale in scales])
