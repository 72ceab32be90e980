"""What a fit minimises: robust residuals in log space over a non-redundant set of observables, plus the priors.

For each row ttft and itl (else tpot) are used; e2e only where one of them is missing; throughput only in closed loops
without e2e (open-loop throughput equals arrival_rate by construction). A median stands in for a missing mean. With
r = log(predicted) - log(measured) and the noise of :mod:`diffspec.fitting.noise`,

    loss = -sum_rows weight*log p(r) + sum z^2/2
"""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffspec.fitting.forms import Form
from diffspec.fitting.noise import Noise, coordinates, curvature, information, negative_log_likelihood, noise_at
from diffspec.fitting.observations import PREDICTED, Block, Observations, padded
from diffspec.prediction import Prediction
from diffspec.programs import program
from diffspec.serving import ServingModel

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


@program()
def predict_blocks(serving: ServingModel, blocks: tuple[Block, ...]) -> list[Prediction]:
    """Predictions of all rows of each block, compiled in a hurry: for a few calls only."""
    return [jax.vmap(lambda w, c: serving.predict(w, c))(block.workload, block.config) for block in blocks]


@program()
def predict_draws(models: ServingModel, blocks: tuple[Block, ...]) -> list[Prediction]:
    """:func:`predict_blocks` for each of a batch of models: a leading axis of draws."""
    each = jax.vmap(jax.vmap(lambda model, w, c: model.predict(w, c), (None, 0, 0)), (0, None, None))
    return [each(models, block.workload, block.config) for block in blocks]


def predict_rows(model, blocks: tuple[Block, ...]):
    """Predictions of all rows, block after block, by observable prefix: dict of arrays in block order."""
    parts = []
    for block in blocks:
        prediction = jax.vmap(lambda w, c: model.predict(w, c))(block.workload, block.config)
        parts.append({m: getattr(prediction, f) for m, f in PREDICTED.items()} | {"throughput": prediction.throughput})
    return {name: jnp.concatenate([part[name] for part in parts]) for name in parts[0]}


class Linearised(NamedTuple):
    """A loss with its ``gradient`` [size] and a positive ``curvature`` [size, size] (Gauss-Newton in what is fitted,
    exact in the noise), the ``residuals`` [targets, rows] and their ``jacobian`` [targets, rows, places] by the
    parameters and stand-in ratios."""

    loss: Any
    gradient: Any
    curvature: Any
    residuals: Any
    jacobian: Any


class Objective(eqx.Module):
    """Loss of a vector over padded rows; ``real`` [rows] is 1 for rows of the trace, ``requests`` [rows] how many
    requests are behind each.

    vector = standardised parameters, log ratios of medians that stand in for means, coordinates of the noise.
    ``weights`` [targets, rows] select and weigh rows: a hold-out needs no recompilation. Finite runs are met by their
    closed form and ``shift`` [targets, rows], log units: how far the fluid model was from it where :meth:`shifted` was
    asked.
    """

    form: Form
    blocks: tuple[Block, ...]
    real: jax.Array
    requests: jax.Array
    log_values: jax.Array
    used: jax.Array
    shift: jax.Array
    columns: tuple[str, ...] = eqx.field(static=True)

    @property
    def places(self) -> int:
        """Coordinates of what is predicted: parameters and stand-in ratios."""
        return len(self.form.paths) + len(self.columns)

    @property
    def size(self) -> int:
        """Length of the vector."""
        return self.places + coordinates(len(self.columns))

    def residuals(self, vector):
        """log(predicted) - log(measured), [targets, rows]; zero where unused."""
        predicted = predict_rows(self.form.model(vector[: len(self.form.paths)]), self.blocks)
        logs = jnp.stack([jnp.log(predicted[column.split("_")[0]]) for column in self.columns])
        bias = STAND_IN_SPREAD * vector[len(self.form.paths) : self.places]
        stands_in = jnp.asarray([float(column.endswith("_p50")) for column in self.columns])
        logs = logs + self.shift + (stands_in * bias)[:, None]
        return jnp.where(self.used > 0, logs - self.log_values, 0.0)

    def shifted(self, vector, residuals=None) -> "Objective":
        """The objective with finite runs as the fluid model has them at ``vector``. The ``residuals`` [targets, real
        rows] of a solution there tell what the closed form predicts, which spares a program to compile."""
        vector = np.asarray(vector)
        model = self.form.model(jnp.asarray(vector[: len(self.form.paths)]))

        def logs(how):
            found = predict_blocks(dataclasses.replace(model, finite_runs=how), self.blocks)
            fields = [PREDICTED.get(column.split("_")[0], "throughput") for column in self.columns]
            return np.log([np.concatenate([getattr(block, field) for block in found]) for field in fields])

        if residuals is None:
            return dataclasses.replace(self, shift=jnp.asarray(logs("fluid") - logs("trapezoid")))
        used, real = np.asarray(self.used) > 0, np.asarray(self.real) > 0
        bias = [np.log(self.stand_in_ratios(vector).get(column, 1.0)) for column in self.columns]
        closed = np.asarray(self.log_values - self.shift) - np.asarray(bias)[:, None]
        closed[:, real] += residuals
        return dataclasses.replace(self, shift=jnp.asarray(np.where(used, logs("fluid") - closed, 0.0)))

    def stand_in_ratios(self, vector) -> dict[str, float]:
        """Fitted ratio of each median that stands in for a mean, to the mean."""
        bias = np.asarray(vector)[len(self.form.paths) : self.places]
        pairs = zip(self.columns, bias, strict=True)
        return {column: float(np.exp(STAND_IN_SPREAD * b)) for column, b in pairs if column.endswith("_p50")}

    def noise(self, vector) -> Noise:
        """Fitted noise of the targets."""
        return noise_at(vector[self.places :])

    def _likelihood(self, residuals, noise_vector, weights):
        return negative_log_likelihood(residuals, noise_at(noise_vector), self.requests, weights * self.used)

    def __call__(self, vector, weights):
        likelihood = self._likelihood(self.residuals(vector), vector[self.places :], weights)
        return likelihood + 0.5 * jnp.sum(vector**2)

    def linearise(self, vector, weights, offset, centre) -> Linearised:
        """Everything that a solver asks for at one vector, from one forward sweep of derivatives; of the problem in
        which the logs of measured values are less by ``offset`` [targets, rows] and the priors N(centre, 1)."""
        seen, noise = vector[: self.places], vector[self.places :]
        residuals, push = jax.linearize(lambda part: self.residuals(jnp.concatenate([part, noise])), seen)
        residuals = residuals + offset * self.used
        jacobian = jax.vmap(push, out_axes=-1)(jnp.eye(self.places, dtype=vector.dtype))
        loss, (by_residual, by_noise) = jax.value_and_grad(self._likelihood, argnums=(0, 1))(residuals, noise, weights)
        gradient = jnp.concatenate([jnp.einsum("tr,trp->p", by_residual, jacobian), by_noise]) + vector - centre
        touching = curvature(residuals, noise_at(noise), self.requests, weights * self.used)
        second = jnp.zeros((self.size, self.size), dtype=vector.dtype)
        second = second.at[: self.places, : self.places].set(jnp.einsum("trp,tr,trq->pq", jacobian, touching, jacobian))
        of_noise = jax.hessian(self._likelihood, argnums=1)(residuals, noise, weights)
        second = second.at[self.places :, self.places :].set(of_noise) + jnp.eye(self.size, dtype=vector.dtype)
        return Linearised(loss + 0.5 * jnp.sum((vector - centre) ** 2), gradient, second, residuals, jacobian)

    def fisher_information(self, vector, weights, jacobian) -> np.ndarray:
        """Expected information [places, places] of the trace's rows, under ``weights`` and with the ``jacobian`` of a
        solution, on parameters and stand-in ratios; without the priors (each adds 1 to the diagonal)."""
        real = np.asarray(self.real) > 0
        used, requests = np.asarray(self.used)[:, real], np.asarray(self.requests)[real]
        expected = np.asarray(information(self.noise(jnp.asarray(vector)), requests, weights * used))
        return np.einsum("trp,tr,trq->pq", jacobian, expected, jacobian)


def build_objective(form: Form, data: Observations, targets: list[Target]) -> Objective:
    """Objective of one form over the rows of ``data``, in its block order, each block padded."""
    blocks = tuple(padded(block) for block in data.blocks)
    real = np.concatenate([np.arange(len(long)) < len(short) for long, short in zip(blocks, data.blocks, strict=True)])

    def lengthen(values):
        lengthened = np.ones((*np.shape(values)[:-1], len(real)))
        lengthened[..., real] = values
        return jnp.asarray(lengthened)

    return Objective(
        form=form,
        blocks=jax.tree.map(jnp.asarray, blocks),
        real=jnp.asarray(real.astype(float)),
        requests=lengthen(data.requests),
        log_values=lengthen(np.stack([t.log_value for t in targets])),
        used=lengthen(np.stack([t.used for t in targets])) * jnp.asarray(real.astype(float)),
        shift=jnp.zeros((len(targets), len(real))),
        columns=tuple(t.column for t in targets),
    )
