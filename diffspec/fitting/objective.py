"""What a fit minimises: robust residuals in log space over a non-redundant set of observables, plus the priors.

For each row ttft and itl (else tpot) are used; e2e only where one of them is missing; throughput only in closed loops
without e2e (open-loop throughput equals arrival_rate by construction). A median stands in for a missing mean. With
r = log(predicted) - log(measured) and a fitted scale sigma for each observable,

    loss = sum_rows [ (nu+1)/2 * log(1 + r^2/(nu*sigma^2)) + log(sigma) ] + sum z^2/2,   nu = 4 (Student t)
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffspec.fitting.forms import Form
from diffspec.fitting.observations import PREDICTED, Block, Observations, padded
from diffspec.prediction import Prediction
from diffspec.serving import ServingModel

DEGREES_OF_FREEDOM = 4.0
NOISE_CENTRE, NOISE_SPREAD, NOISE_FLOOR = 0.03, 0.7, 0.003
STAND_IN_SPREAD = 0.1
"""Prior standard deviation of the log ratio of a median that stands in for a mean, to the mean."""


class Target(NamedTuple):
    """One observable of the objective: trace column, log of its values (0 where unused) and which rows use it."""

    column: str
    log_value: np.ndarray
    used: np.ndarray

    @property
    def stands_in(self) -> bool:
        """True for a median used in place of a missing mean."""
        return self.column.endswith("_p50")


def choose_targets(data: Observations, observables: tuple[str, ...] | None = None) -> list[Target]:
    """The non-redundant observables of each row; ``observables`` (such as ``("itl", "ttft")``) restricts."""

    wanted = set(observables or ("ttft", "itl", "tpot", "e2e", "throughput"))
    columns: dict[str, np.ndarray] = {}

    def present(column):
        return np.isfinite(data.observed.get(column, np.full(len(data), np.nan)))

    def first_present(candidates):
        """Take the first candidate that each row has; True where there was one."""
        found = np.zeros(len(data), dtype=bool)
        for column in candidates:
            if column.split("_")[0] in wanted:
                columns[column] = present(column) & ~found
                found |= columns[column]
        return found

    has_first = first_present(("ttft_mean", "ttft_p50"))
    has_step = first_present(("itl_mean", "tpot_mean", "itl_p50", "tpot_p50"))
    if "e2e" in wanted:
        mean, median = present("e2e_mean"), present("e2e_p50")
        missing = ~(has_first & has_step)
        columns |= {"e2e_mean": mean & missing, "e2e_p50": median & ~mean & missing}
    if "throughput" in wanted:
        columns["throughput"] = present("throughput") & ~data.is_open() & ~present("e2e_mean")
    targets = []
    for column, used in columns.items():
        if used.any():
            values = np.where(used, data.observed[column], 1.0)
            targets.append(Target(column, np.log(values), used))
    return targets


@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def predict_blocks(serving: ServingModel, blocks: tuple[Block, ...]) -> list[Prediction]:
    """Predictions of all rows of each block, compiled in a hurry: for a few calls only."""
    return [jax.vmap(lambda w, c: serving.predict(w, c))(block.workload, block.config) for block in blocks]


def predict_rows(model, blocks: tuple[Block, ...]):
    """Predictions of all rows, block after block, by observable prefix: dict of arrays in block order."""
    parts = []
    for block in blocks:
        prediction = jax.vmap(lambda w, c: model.predict(w, c))(block.workload, block.config)
        parts.append({m: getattr(prediction, f) for m, f in PREDICTED.items()} | {"throughput": prediction.throughput})
    return {name: jnp.concatenate([part[name] for part in parts]) for name in parts[0]}


class Objective(eqx.Module):
    """(loss, residuals) of (vector, weights), over padded rows; ``real`` [rows] is 1 for rows of the trace.

    vector = standardised parameters, then per target a log noise scale and, for medians that stand in, a log bias.
    ``weights`` [rows] in {0, 1} select rows: a hold-out needs no recompilation. Finite runs are met by their closed
    form and ``shift`` [targets, rows], log units: how far the fluid model was from it where :meth:`shifted` was asked.
    """

    form: Form
    blocks: tuple[Block, ...]
    real: jax.Array
    log_values: jax.Array
    used: jax.Array
    shift: jax.Array
    columns: tuple[str, ...] = eqx.field(static=True)

    @property
    def size(self) -> int:
        """Length of the vector."""
        return len(self.form.paths) + 2 * len(self.columns)

    def residuals(self, vector):
        """log(predicted) - log(measured), [targets, rows]; zero where unused."""
        count = len(self.form.paths)
        predicted = predict_rows(self.form.model(vector[:count]), self.blocks)
        logs = jnp.stack([jnp.log(predicted[column.split("_")[0]]) for column in self.columns])
        bias = STAND_IN_SPREAD * vector[count + len(self.columns) :]
        stands_in = jnp.asarray([float(column.endswith("_p50")) for column in self.columns])
        logs = logs + self.shift + (stands_in * bias)[:, None]
        return jnp.where(self.used > 0, logs - self.log_values, 0.0)

    def shifted(self, vector) -> "Objective":
        """The objective with finite runs as the fluid model has them at ``vector``."""
        model = self.form.model(jnp.asarray(vector)[: len(self.form.paths)])

        def logs(how):
            found = predict_blocks(dataclasses.replace(model, finite_runs=how), self.blocks)
            fields = [PREDICTED.get(column.split("_")[0], "throughput") for column in self.columns]
            return np.log([np.concatenate([getattr(block, field) for block in found]) for field in fields])

        return dataclasses.replace(self, shift=jnp.asarray(logs("fluid") - logs("trapezoid")))

    def stand_in_ratios(self, vector) -> dict[str, float]:
        """Fitted ratio of each median that stands in for a mean, to the mean."""
        bias = np.asarray(vector)[len(self.form.paths) + len(self.columns) :]
        pairs = zip(self.columns, bias, strict=True)
        return {column: float(np.exp(STAND_IN_SPREAD * b)) for column, b in pairs if column.endswith("_p50")}

    def noise(self, vector):
        """Fitted noise scale of each target, in log units."""
        count = len(self.form.paths)
        return NOISE_FLOOR + NOISE_CENTRE * jnp.exp(NOISE_SPREAD * vector[count : count + len(self.columns)])

    def __call__(self, vector, weights):
        sigma = self.noise(vector)[:, None]
        residuals = self.residuals(vector)
        r = residuals / sigma
        nu = DEGREES_OF_FREEDOM
        each = 0.5 * (nu + 1.0) * jnp.log1p(r**2 / nu) + jnp.log(sigma)
        return jnp.sum(each * self.used * weights) + 0.5 * jnp.sum(vector**2), residuals


def build_objective(form: Form, data: Observations, targets: list[Target]) -> Objective:
    """Objective of one form over the rows of ``data``, in its block order, each block padded."""
    blocks = tuple(padded(block) for block in data.blocks)
    real = np.concatenate([np.arange(len(long)) < len(short) for long, short in zip(blocks, data.blocks, strict=True)])

    def spread(columns):
        lengthened = np.zeros((len(targets), len(real)))
        lengthened[:, real] = np.stack(columns)
        return jnp.asarray(lengthened)

    return Objective(
        form=form,
        blocks=jax.tree.map(jnp.asarray, blocks),
        real=jnp.asarray(real.astype(float)),
        log_values=spread([t.log_value for t in targets]),
        used=spread([t.used for t in targets]),
        shift=jnp.zeros((len(targets), len(real))),
        columns=tuple(t.column for t in targets),
    )
