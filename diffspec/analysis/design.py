"""Which benchmark runs to make next: those that most narrow what a fit leaves open.

With Sigma the covariance of the fitted coordinates, each run adds its information (:mod:`diffspec.analysis.runs`), and
a criterion of what is left is made small over sets of runs (:mod:`diffspec.analysis.optimal_design`):

* ``predictions`` (I-optimal): mean variance g'Sigma g of log ttft, log itl and log e2e over the questions asked
* ``parameters`` (D-optimal): log det Sigma
* ``decision``: mean variance of log e2e(best draft length) - log e2e(rival), rivals the neighbours of the best and 0,
  over the loads asked

Runs are chosen from a grid, greedily and by exchange; then load and lengths move along the exact gradient of the
criterion (through the equilibrium) and are rounded. What acceptance will be at a draft length is taken from the
deployment's curve and is no part of Sigma; a run at a new draft length tells it besides.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize

from diffspec.acceptance import MAX_DRAFT_LENGTH, AbstractAcceptance
from diffspec.analysis import optimal_design
from diffspec.analysis.design_files import plans, sweeps
from diffspec.analysis.run_grid import MOST_ASKED, Space, asked_space, grid, rounded, run_space
from diffspec.analysis.runs import LOOPS, PREDICTED, Knowledge, Run, alike, read_run
from diffspec.fitting.deployment import FittedDeployment
from diffspec.parameters import parameter_infos
from diffspec.results import InputError
from diffspec.workload import check_range

CRITERIA = ("predictions", "parameters", "decision")
NAMED = 0.15
"""A parameter is named by what a run tells when at least this share of the run's gain comes through it."""
STEPS = 20
"""Most steps of the gradient search of one run."""

Progress = Callable[[str, float], None]


class Questions(NamedTuple):
    """What is to become better known: gradients [n, paths] of linear questions under a ``label`` [n] each, and their
    mean outer product ``matrix``, None for the D criterion."""

    gradients: np.ndarray
    labels: list[str]
    matrix: np.ndarray | None

    def deviations(self, precision: np.ndarray) -> dict[str, float]:
        """Typical standard deviation (root mean square) of the questions of each label."""
        variance = np.einsum("np,pq,nq->n", self.gradients, np.linalg.inv(precision), self.gradients)
        chosen = {label: np.asarray([told == label for told in self.labels]) for label in self.labels}
        return {label: float(np.sqrt(variance[rows].mean())) for label, rows in chosen.items()}


def design(
    deployment: FittedDeployment,
    budget: int = 6,
    *,
    criterion: str = "predictions",
    asked: Mapping[str, tuple[float, float]] | None = None,
    max_draft_length: int | None = None,
    max_rate: float | None = None,
    max_utilization: float = 0.8,
    requests: int = 200,
    acceptance: AbstractAcceptance | None = None,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The ``budget`` runs that narrow the ``criterion`` most, the one that tells most first.

    * ``asked``: (low, high) of arrival_rate [req/s], concurrency [req], draft_length, prompt_length, output_length
      [tok] that the questions are about; what is not named is as measured. Runs may lie there and where was measured
    * ``max_draft_length``: runs may draft up to so many tokens, measured before or not (default: measured or asked)
    * ``max_rate`` [req/s] and ``max_utilization``: no run is above this rate and this share of capacity
    * ``requests`` [req]: how many each run measures; ``acceptance``: in place of the deployment's own
    * ``candidates``: choose among these runs only (mappings with the names of ``asked``), each once, as they are

    Returns ``points`` (each with ``after``, the criterion after it and those before it, its ``share`` of the gain, and
    what it ``tells``), ``before`` and ``after`` (typical standard deviation, log units), ``expected_gain`` = 1 -
    after/before, ``expected`` by question, ``plan`` and ``sweep`` (:mod:`diffspec.analysis.design_files`).
    Errors: :class:`InputError` for a model without uncertainty, a range that is none, or nothing to choose from.
    """
    if criterion not in CRITERIA:
        raise InputError(f"criterion: got {criterion!r}; allowed: {', '.join(CRITERIA)}")
    check_range("budget", budget, 1, 1000, low_open=False, unit="runs")
    check_range("requests", requests, 1, 1e6, low_open=False, unit="req")
    check_range("max_utilization", max_utilization, 0, MOST_ASKED, low_open=True, unit="of capacity")
    check_range("max_rate", max_rate, 0, 1e9, low_open=True, unit="req/s")
    check_range("max_draft_length", max_draft_length, 0, MAX_DRAFT_LENGTH, low_open=False, unit="tok")
    report = progress or (lambda what, share: None)
    knowledge = Knowledge(deployment, acceptance, requests)
    space = asked_space(deployment, asked or {}, max_draft_length, knowledge.server.acceptance is not None)
    allowed = run_space(deployment, space, max_draft_length, max_rate, knowledge.server.acceptance is not None)
    report("questions", 0.0)
    questions, warnings = _questions(criterion, knowledge, space, allowed.draft_lengths)
    report("candidates", 0.2)
    if candidates is None:
        found = _grid_runs(knowledge, allowed, max_utilization)
        near = alike(found, found) if found else None
    else:
        given = [read_run(entry) for entry in candidates]
        stable = knowledge.ask(given).stable & [
            run.loop != LOOPS[0] or run.load <= (max_rate or np.inf) for run in given
        ]
        found, near = [run for run, good in zip(given, stable, strict=True) if good], None
    if not found:
        raise InputError(
            f"no run is left to choose from below {max_utilization:g} of capacity"
            + (f" and {max_rate:g} req/s" if max_rate else "")
            + "; raise --max-utilization or --max-rate, or ask about lower loads"
        )
    informations = knowledge.informations(knowledge.ask(found))
    picked = optimal_design.choose(
        knowledge.precision,
        informations,
        int(budget),
        questions.matrix,
        near,
        lambda done: report("runs", 0.4 + 0.2 * done),
    )
    runs = [found[index] for index in picked]
    if candidates is None:
        runs = _refined(knowledge, questions, runs, allowed, max_utilization, report)
    if len(runs) < budget:
        warnings.append(f"only {len(runs)} runs are far enough apart to tell more than repeats would; budget {budget}")
    answer = _answer(deployment, knowledge, questions, runs, requests)
    answer |= {"criterion": criterion, "budget": int(budget), "deployment": deployment.name}
    if {run.draft_length for run in runs} - {0, *deployment.measured["draft_lengths"]}:
        warnings.append("acceptance at draft lengths that were never measured is read off the deployment's curve")
    answer["warnings"] = warnings
    answer["plan"] = plans(deployment, answer["points"], max_rate)
    answer["sweep"] = sweeps(deployment, answer["points"])
    report("done", 1.0)
    return answer


def _questions(criterion, knowledge: Knowledge, space: Space, draft_lengths) -> tuple[Questions, list[str]]:
    """The questions of a criterion, and warnings about those that have no answer."""
    size, warnings = len(knowledge.paths), []
    if criterion == "parameters":
        names = [path.removeprefix("step_time.") for path in knowledge.paths]
        return Questions(np.eye(size), names, None), warnings
    if criterion == "decision":
        space = space._replace(draft_lengths=tuple(sorted({0, *draft_lengths, *space.draft_lengths})))
    runs = grid(space, levels=5)
    told = knowledge.ask(runs)
    good = told.stable & (told.utilization <= MOST_ASKED)
    if not good.all():
        warnings.append(f"{int((~good).sum())} of {len(good)} questions are above {MOST_ASKED:g} of capacity: left out")
    gradients, labels = [], []
    if criterion == "predictions":
        for index, name in enumerate(PREDICTED):
            finite = good & [index != 1 or run.output_length > 1 for run in runs]
            gradients.append(told.jacobian[finite, index])
            labels += [name.removesuffix("_latency")] * int(finite.sum())
    else:
        where: dict[Run, list[int]] = {}
        for index in np.flatnonzero(good):
            where.setdefault(replace(runs[index], draft_length=0), []).append(int(index))
        for indices in where.values():
            best = min(indices, key=lambda index: told.e2e[index])
            k = runs[best].draft_length
            rivals = [index for index in indices if index != best and runs[index].draft_length in (0, k - 1, k + 1)]
            gradients += [(told.jacobian[best, 2] - told.jacobian[rival, 2])[None] for rival in rivals]
            labels += [f"draft length {k} against {runs[rival].draft_length}" for rival in rivals]
    stacked = np.concatenate([np.zeros((0, size)), *gradients])
    if not len(stacked):
        raise InputError(
            f"criterion {criterion}: no question is left below {MOST_ASKED:g} of capacity"
            + (" with two draft lengths to decide between" if criterion == "decision" else "")
            + "; ask about lower loads"
            + (", or give --max-draft-length and an acceptance" if criterion == "decision" else "")
        )
    return Questions(stacked, labels, stacked.T @ stacked / len(stacked)), warnings


def _grid_runs(knowledge: Knowledge, allowed: Space, max_utilization: float) -> list[Run]:
    """A grid of runs below ``max_utilization``, the rates of each setting spread up to its own bound."""
    corners = grid(allowed, levels=1)
    limits = max_utilization * knowledge.ask(corners).capacity
    found = []
    for corner, limit in zip(corners, limits, strict=True):
        low, high = allowed.loads[corner.loop]
        high = min(high, limit) if corner.loop == LOOPS[0] else high
        if low <= high:
            found += grid(Space({corner.loop: (low, high)}, (corner.draft_length,), *_points(corner)), levels=6)
    kept = knowledge.ask(found) if found else None
    return [] if kept is None else [run for run, good in zip(found, kept.stable, strict=True) if good]


def _points(run: Run) -> tuple[tuple[float, float], tuple[float, float]]:
    return (run.prompt_length, run.prompt_length), (run.output_length, run.output_length)


def _refined(knowledge: Knowledge, questions: Questions, runs, allowed: Space, max_utilization, report) -> list[Run]:
    """The runs with load and lengths moved along the gradient, one after the other, and rounded; a move too near
    another run, or one that does not lower the criterion, is not made."""
    runs = list(runs)
    informations = knowledge.informations(knowledge.ask(runs))
    for place, run in enumerate(runs):
        report("gradients", 0.6 + 0.35 * place / len(runs))
        others = knowledge.precision + informations.sum(axis=0) - informations[place]
        now, _ = knowledge.slope(run.loop, run.x, others, questions.matrix)
        limit = max_utilization * float(knowledge.ask([run]).capacity[0]) if run.loop == LOOPS[0] else np.inf
        low, high = allowed.loads[run.loop]
        bounds = [np.log([low, max(min(high, limit), run.load)])]
        bounds += [np.log(span) for span in (allowed.prompt_length, allowed.output_length)]
        bounds.append(np.full(2, run.x[3]))
        scale = abs(now) if questions.matrix is not None else 1.0

        def after(x, loop=run.loop, others=others, scale=scale):
            value, slope = knowledge.slope(loop, x, others, questions.matrix)
            return value / scale, np.append(slope, 0.0) / scale

        moved = minimize(after, run.x, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": STEPS})
        load, *lengths = (float(value) for value in np.exp(moved.x[:3]))
        trial = rounded(replace(run, load=load, prompt_length=lengths[0], output_length=lengths[1]), allowed)
        if trial.loop == LOOPS[0]:  # other lengths, other capacity
            limit = max(min(high, max_utilization * float(knowledge.ask([trial]).capacity[0])), low)
            trial = rounded(trial, allowed._replace(loads={trial.loop: (low, limit)}))
        told = knowledge.ask([trial])
        fits = told.stable[0] and (trial.loop != LOOPS[0] or told.utilization[0] <= max_utilization * (1 + 1e-9))
        apart = len(runs) == 1 or not alike([trial], runs[:place] + runs[place + 1 :]).any()
        lower, _ = knowledge.slope(trial.loop, trial.x, others, questions.matrix)
        if fits and apart and lower < now:
            runs[place], informations[place] = trial, knowledge.informations(told)[0]
    return runs


def _answer(deployment, knowledge: Knowledge, questions: Questions, runs, requests: int) -> dict[str, Any]:
    """Points in the order in which they tell most, and the criterion before and after."""
    told = knowledge.ask(runs)
    informations = knowledge.informations(told)
    order, values = optimal_design.in_order(knowledge.precision, informations, questions.matrix)
    start = float(optimal_design.criterion(knowledge.precision, questions.matrix))
    precision = knowledge.precision

    def typical(value):
        return optimal_design.typical_deviation(value, len(knowledge.paths), questions.matrix)

    points = []
    for index, value, former in zip(order, values, [start, *values], strict=False):
        run, before = runs[index], precision
        precision = precision + informations[index]
        points.append(
            run.to_dict()
            | {
                "requests": int(requests),
                "utilization": float(told.utilization[index]) if run.loop == LOOPS[0] else None,
                "throughput": float(told.throughput[index]),
                "after": typical(value),
                "share": (former - value) / max(start - values[-1], 1e-300),
                "tells": _tells(deployment, knowledge, before, precision, questions, run),
            }
        )
    before, after = typical(start), typical(values[-1])
    spreads = questions.deviations(knowledge.precision), questions.deviations(precision)
    return {
        "points": points,
        "before": before,
        "after": after,
        "expected_gain": 1.0 - after / before,
        "expected": {name: {"before": spreads[0][name], "after": spreads[1][name]} for name in spreads[0]},
    }


def _tells(deployment, knowledge: Knowledge, before, after, questions: Questions, run: Run) -> str:
    """What a run tells beside those before it, in words: what is new about it, and the parameters it narrows; the
    precisions without and with it."""
    before, after = np.linalg.inv(before), np.linalg.inv(after)
    if questions.matrix is None:
        gains = np.log(np.diag(before) / np.diag(after))
    else:
        gains = np.diag(questions.matrix @ (before - after))
    gains = np.maximum(gains, 0.0)
    infos, words = parameter_infos(deployment.serving), []
    lengths = deployment.measured["draft_lengths"]
    if run.draft_length not in lengths and run.draft_length < max(lengths):
        words.append(f"draft length {run.draft_length} was never measured")
    words += deployment.caveats(run.draft_length, run.to_dict())
    for index in np.argsort(-gains)[:2]:
        if gains[index] >= NAMED * gains.sum() > 0:
            narrower = 1.0 - np.sqrt(after[index, index] / before[index, index])
            name = knowledge.paths[index].removeprefix("step_time.")
            words.append(f"{name} (-{narrower:.0%}): {infos[knowledge.paths[index]].meaning}")
    return "; ".join(words)
