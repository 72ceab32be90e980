"""The verb `update`: a fitted model takes in new operating points, row by row, and tells whether the server changed.

Each row is met by the filter of :mod:`diffspec.fitting.kalman` in the coordinates, with the covariance, the noise and
the priors that the fit left (:mod:`diffspec.fitting.uncertainty`); what a row measures are the logs of the observables
that a fit would use. Sums of what the rows bring (:mod:`diffspec.fitting.drift`) tell a change; then the coordinates
are opened by OPENED where it began, and the rows since are met again. Acceptance likewise, by
:mod:`diffspec.fitting.online_acceptance`.
"""

import dataclasses
import hashlib
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.fitting.deployment import FittedDeployment, FittedModel, used_versions
from diffspec.fitting.drift import Watch, change_of, threshold
from diffspec.fitting.evaluate import predict_trace, reason_kind
from diffspec.fitting.forms import Form
from diffspec.fitting.hull import ranges
from diffspec.fitting.kalman import State, check_forgetting, correct, innovation, widen
from diffspec.fitting.noise import MISFIT, REQUEST_SPREAD
from diffspec.fitting.objective import Target, build_objective, choose_targets, predict_rows
from diffspec.fitting.observations import Observations, is_endless, observations, waiting_states
from diffspec.fitting.online_acceptance import KEY, update_acceptance
from diffspec.fitting.uncertainty import Uncertainty
from diffspec.parameters import get_parameters, parameter_infos, set_parameters, to_constrained, to_unconstrained
from diffspec.programs import program
from diffspec.results import InputError
from diffspec.traces import Trace, set_aside_reasons

FORGETTING = 0.98
OPENED = 0.3
"""Standard deviation (log, logit) by which every coordinate is opened where a change began."""
MOST_MOVED = 5
FACTS = ("verifier", "hardware", "engine", "drafter")


def update(
    model: FittedModel,
    trace: Trace,
    *,
    forgetting: float = FORGETTING,
    observables: tuple[str, ...] | None = None,
    all_rows: bool = False,
) -> tuple[FittedModel, list[dict[str, Any]]]:
    """The model after the rows of ``trace``, in their order, and per deployment what they did.

    * ``forgetting``: what is known of the directions that a row measures is divided by this per row, and is never less
      than before any data; 1: old rows count for ever, 0.98: about the last 50 count
    * ``observables``, ``all_rows``: as in :func:`diffspec.fitting.fit.fit`

    The summary of a deployment has ``rows``, ``set_aside``, ``skipped`` (rows that the model expects to saturate),
    ``forgetting``, ``observables`` (mean |log(predicted/measured)| ``before``, ``one_ahead`` of each row and ``after``,
    and ``scatter``, the root mean square of innovations over what was expected), ``moved`` (parameters moved most, in
    standard deviations of what was known), ``acceptance`` and ``drift``. Deployments without new rows are kept.

    Errors: :class:`InputError` for rows of a deployment that the model lacks or whose hardware, engine, verifier or
    drafter are others, for a model without uncertainty, or where no row is left.
    """
    check_forgetting(forgetting)
    if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise InputError('updating needs float64: call jax.config.update("jax_enable_x64", True) first')
    groups = [(str(name), frame) for name, frame in trace.frame.groupby("deployment", sort=False)]
    for name, frame in groups:
        _check_same(model, name, frame)
    updated, told = dict(model.deployments), []
    for name, frame in groups:
        updated[name], summary = _update_deployment(updated[name], frame, forgetting, observables, all_rows)
        told.append(summary)
    if not any(summary["rows"] for summary in told):
        raise InputError(
            f"no new row can be used (set aside: {[summary['set_aside'] for summary in told]}); "
            "use rows that are not stationary all the same with --all-rows"
        )
    both = hashlib.sha256(f"{model.rows_sha256} {trace.digest()}".encode()).hexdigest()
    return FittedModel(updated, both, used_versions()), told


def _check_same(model: FittedModel, name: str, frame) -> None:
    if name not in model.deployments:
        raise InputError(
            f"deployment: got new rows of {name!r}; allowed: {', '.join(map(repr, model.deployments))}; fit it on its "
            "own, with these as siblings: diffspec fit NEW --prior MODEL.JSON, or, if it is the same server under "
            "another name, give that name: --set deployment=NAME"
        )
    known = model.deployments[name]
    if known.uncertainty is None:
        raise InputError(
            f"deployment {name!r}: the model does not tell how sure it is, so new rows cannot be weighed against it; "
            "fit the trace again with this version of diffspec"
        )
    for column in FACTS:
        expected = known.defaults.get(column)
        rows = frame[frame["draft_length"] > 0] if column == "drafter" else frame
        others = sorted({value for value in rows[column] if isinstance(value, str) and value} - {expected})
        if expected and others:
            raise InputError(
                f"deployment {name!r}: {column}: got {others[0]!r} in the new rows; allowed: {expected!r}, as in those "
                "of the model; give these rows a deployment of their own and fit it with --prior MODEL.JSON"
            )


class _Rows:
    """The rows of one deployment as what the filter meets: per row of the frame its values, noise and h."""

    def __init__(self, deployment: FittedDeployment, data: Observations, targets: list[Target]):
        known = deployment.uncertainty
        assert known is not None
        near = waiting_states(data, only_near=True)
        template = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=float), deployment.serving)
        template = dataclasses.replace(template, waiting_states=near, finite_runs="trapezoid")
        self.form = Form(deployment.form, known.paths, template, jnp.asarray(known.prior))
        self.columns = tuple(target.column for target in targets)
        ratios = deployment.quality.get("stand_in_ratios", {})
        shift = np.log([[ratios.get(column, 1.0)] for column in self.columns]) + np.zeros(len(data))
        if np.any(data.is_open() & ~is_endless(data)):
            objective = build_objective(self.form, data, targets)
            moved = objective.shifted(np.zeros(objective.size)).shift
            shift = shift + np.asarray(moved)[:, np.asarray(objective.real) > 0]
        self.values = np.stack([target.log_value for target in targets]) - shift
        self.used = np.stack([target.used for target in targets])
        plain = dataclasses.replace(known, inflation={})
        self.noise = np.stack([_noise(plain, column, data.requests) for column in self.columns])
        self.inflation = np.asarray([known.inflation.get(column, 1.0) for column in self.columns])
        sizes = [len(block) for block in data.blocks]
        places = [(block, row) for block, size in enumerate(sizes) for row in range(size)]
        self._blocks, self._places = jax.tree.map(np.asarray, data.blocks), places
        self.position = {frame_row: place for place, frame_row in enumerate(data.order)}

    def measure(self, row: int):
        """h and its jacobian of a row's used targets, as a function of the standardised coordinates."""
        place = self.position[row]
        used = self.used[:, place]
        block, at = self._places[place]
        one = jax.tree.map(lambda leaf: leaf[at : at + 1], self._blocks[block])

        def measured(z):
            logs, jacobian = _logs_and_jacobian(self.form, one, self.columns, z)
            return np.asarray(logs)[used], np.asarray(jacobian)[used]

        return measured


def _noise(known: Uncertainty, column: str, requests: Any) -> np.ndarray:
    found = known.noise_of(column, 0.5, requests)
    return np.sqrt(MISFIT**2 + REQUEST_SPREAD**2 / requests) if found is None else found


@program(2)
def _logs_and_jacobian(form, block, columns, z):
    def logs(z):
        predicted = predict_rows(form.model(z), (block,))
        return jnp.stack([jnp.log(predicted[column.split("_")[0]][0]) for column in columns])

    found, push = jax.linearize(logs, z)
    return found, jax.vmap(push, out_axes=-1)(jnp.eye(len(z), dtype=z.dtype))


def _update_deployment(deployment, frame, forgetting, observables, all_rows):
    reasons = set_aside_reasons(frame)
    kept = np.asarray([all_rows or reason is None for reason in reasons], dtype=bool)
    counted = Counter(reason_kind(reason) for reason in reasons if reason is not None and not all_rows)
    frame = frame[kept].reset_index(drop=True)
    before = deployment.quality.get(KEY, {})
    summary: dict[str, Any] = {"deployment": deployment.name, "rows": 0, "set_aside": dict(counted), "skipped": 0}
    summary |= {"forgetting": forgetting, "observables": {}, "moved": [], "acceptance": {}, "drift": []}
    if not len(frame):
        return deployment, summary
    curve, acceptance, counts = update_acceptance(deployment, frame, forgetting, before)
    targets = choose_targets(data := observations(frame, deployment.acceptance), observables)
    if not targets:
        raise InputError(f"deployment {deployment.name!r}: no new row has any of the observables to learn from")
    known, rows = deployment.uncertainty, _Rows(deployment, data, targets)
    state, skipped, errors, costs, watches = _filter(known, rows, frame, forgetting, before)
    serving = _moved_to(deployment, state.mean)
    drift = [*costs, *acceptance.pop("drift")]
    spread = known.prior
    uncertainty = dataclasses.replace(
        known,
        covariance=spread[:, None] * state.covariance * spread,
        draws=None if known.draws is None else state.draws * spread,
    )
    following = {
        "updates": before.get("updates", 0) + 1,
        "rows": before.get("rows", 0) + len(frame) - len(skipped),
        "forgetting": forgetting,
        "watches": watches | acceptance.pop("watches"),
        "acceptance_requests": counts,
        "drift": [*before.get("drift", []), *drift],
    }
    after = dataclasses.replace(
        deployment,
        serving=serving,
        acceptance=curve,
        measured=ranges(frame, deployment.measured),
        quality=deployment.quality | {KEY: following},
        uncertainty=uncertainty,
        warnings=[*deployment.warnings, *(f"changed: {entry['text']}" for entry in drift)],
    )
    summary |= {"rows": len(frame) - len(skipped), "skipped": len(skipped), "drift": drift}
    summary |= {"acceptance": acceptance["curves"], "moved": _most_moved(deployment, after)}
    summary["observables"] = _errors(deployment, after, frame, targets, data, errors)
    return after, summary


def _filter(known: Uncertainty, rows: _Rows, frame, forgetting: float, before: dict[str, Any]):
    """The state after all rows, rows skipped, innovations (target -> errors, scores' roots), changes and the sums."""
    spread = known.prior
    covariance = known.covariance / spread[:, None] / spread
    draws = np.zeros((0, len(spread))) if known.draws is None else known.draws / spread
    states = [State(np.zeros(len(spread)), covariance, draws)]  # states[i] is the one before row i
    random = np.random.default_rng([0, before.get("rows", 0)])
    watches = {column: Watch.from_dict(before.get("watches", {}).get(column, {})) for column in rows.columns}
    limit = threshold(2 * len(watches))
    errors: dict[str, list[tuple[float, float]]] = {column: [] for column in rows.columns}
    skipped, changes, reference = [], [], states[0]

    def learn(state: State, row: int):
        place = rows.position[row]
        used = rows.used[:, place]
        learned = np.asarray([watches[column].learned for column in rows.columns])
        return correct(
            state,
            rows.measure(row),
            rows.values[used, place],
            learned[used] * rows.noise[used, place],
            known.degrees_of_freedom,
            forgetting=forgetting,
            draw_scale=rows.inflation[used],
            random=random,
        )

    for row in range(len(frame)):
        used = np.flatnonzero(rows.used[:, rows.position[row]])
        measure, place = rows.measure(row), rows.position[row]
        try:
            state, found = learn(states[-1], row)
            stood = innovation(reference, measure, rows.values[used, place])
        except ValueError:
            skipped.append(row)
            states.append(states[-1])
            continue
        noise = rows.inflation[used] * rows.noise[used, place]
        unsure = rows.inflation[used] * np.sqrt(stood.variance)
        scales = np.hypot(rows.inflation[used] * np.sqrt(found.variance), noise)
        for index, target in enumerate(used):
            column, error = rows.columns[target], float(found.error[index])
            watches[column].add(float(stood.error[index]), unsure[index], noise[index], known.degrees_of_freedom)
            errors[column].append((error, error / scales[index]))
        states.append(state)
        alarms = {column: watch.alarm(limit) for column, watch in watches.items()}
        rung = {column: alarm for column, alarm in alarms.items() if alarm is not None}
        if rung:
            since = max(0, row + 1 - max(count for count, _ in rung.values()))
            changes += [change_of(column, np.expm1(size), frame, row, count) for column, (count, size) in rung.items()]
            del states[since + 1 :]
            states[since] = widen(states[since], OPENED / spread, random)
            watches = {column: watch.again(limit) for column, watch in watches.items()}
            for again in range(since, row + 1):
                try:
                    states.append(learn(states[-1], again)[0])
                except ValueError:
                    states.append(states[-1])
            reference = states[-1]
    return states[-1], skipped, errors, changes, {column: watch.to_dict() for column, watch in watches.items()}


def _moved_to(deployment: FittedDeployment, mean: np.ndarray):
    known = deployment.uncertainty
    assert known is not None
    infos, values = parameter_infos(deployment.serving), get_parameters(deployment.serving)
    coordinates = known.prior * mean
    moved = {
        path: np.asarray(to_constrained(to_unconstrained(values[path], infos[path]) + step, infos[path]))
        for path, step in zip(known.paths, coordinates, strict=True)
    }
    return set_parameters(deployment.serving, moved)


def _most_moved(before: FittedDeployment, after: FittedDeployment) -> list[dict[str, Any]]:
    """Parameters that moved most, in standard deviations of what was known of them."""
    known = before.uncertainty
    assert known is not None
    infos = parameter_infos(before.serving)
    old, new = get_parameters(before.serving), get_parameters(after.serving)
    moves = [float(to_unconstrained(new[p], infos[p]) - to_unconstrained(old[p], infos[p])) for p in known.paths]
    sizes = np.asarray(moves) / np.maximum(known.deviation, 1e-300)
    told = []
    for index in np.argsort(-np.abs(sizes))[:MOST_MOVED]:
        path = known.paths[index]
        entry = {"parameter": path, "unit": infos[path].unit, "from": float(old[path]), "to": float(new[path])}
        told.append(entry | {"deviations": float(sizes[index])})
    return told


def _errors(before, after, frame, targets: list[Target], data: Observations, errors) -> dict[str, Any]:
    """Mean |log(predicted/measured)| by column of the rows: before, one ahead and after; and the scatter."""
    scored = [predict_trace(model, frame, with_intervals=False) for model in (before, after)]
    told, order = {}, np.asarray(data.order)
    for target in targets:
        rows = order[target.used]
        sizes = []
        for part in scored:
            with np.errstate(all="ignore"):
                each = np.abs(np.log(part.predicted[target.column][rows] / part.measured[target.column][rows]))
            finite = each[np.isfinite(each)]
            sizes.append(float(finite.mean()) if len(finite) else None)
        ahead = np.asarray(errors[target.column]).reshape(-1, 2)
        told[target.column] = {"rows": len(ahead), "before": sizes[0], "after": sizes[1]}
        told[target.column]["one_ahead"] = float(np.abs(ahead[:, 0]).mean()) if len(ahead) else None
        told[target.column]["scatter"] = float(np.sqrt(np.mean(ahead[:, 1] ** 2))) if len(ahead) else None
    return told
