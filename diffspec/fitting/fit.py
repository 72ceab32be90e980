"""The verb `fit`: a trace becomes a fitted model, one deployment at a time."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.first_principles import FirstPrinciples
from diffspec.fitting import pooling, principles
from diffspec.fitting.deployment import FittedDeployment, FittedModel, used_versions
from diffspec.fitting.draws import UNCERTAINTIES, sampler
from diffspec.fitting.evaluate import not_predicted, predict_trace, reason_kind, summarise
from diffspec.fitting.forms import build_form, read_scales
from diffspec.fitting.hull import ranges
from diffspec.fitting.identify import trace_facts, untold_directions
from diffspec.fitting.noise import repeat_weights
from diffspec.fitting.objective import Objective, build_objective, choose_targets
from diffspec.fitting.observations import (
    acceptance_curve,
    is_endless,
    observations,
    require_rows,
    waiting_states,
)
from diffspec.fitting.profile import profile as profile_of
from diffspec.fitting.profile import profiled_paths
from diffspec.fitting.select import candidate_forms, folds_of, held_out_error, simplest_good, why_chosen
from diffspec.fitting.solve import LANES, SOLVERS, Solution, minimise, random_starts, refit_without
from diffspec.fitting.uncertainty import held_out_inflation
from diffspec.results import InputError
from diffspec.serving import MOST_STATES
from diffspec.traces import Trace, matches, set_aside_reasons
from diffspec.workload import check_range

STEP_TIMES = ("auto", "affine", "roofline")
LEAST_ROWS = 4
POOR_FIT = 0.3
"""Mean error on fitted rows above which a fit is called poor."""
MOST_SHIFTS, SETTLED = 4, 0.01
"""How often a fit asks the fluid model of finite runs again and weighs repeats, and the change (log units, weights) at
which both have settled."""
OBSERVABLES = ("ttft", "itl", "tpot", "e2e", "throughput")

Progress = Callable[[str, float], None]


def fit(
    trace: Trace,
    *,
    step_time: str = "auto",
    holdout: str | None = None,
    observables: tuple[str, ...] | None = None,
    all_rows: bool = False,
    start: FirstPrinciples | None = None,
    solver: str = "gauss-newton",
    uncertainty: str = "randomised",
    pool: str | None = None,
    prior: FittedModel | None = None,
    profile: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> FittedModel:
    """Fit one model per deployment of ``trace``.

    * ``step_time``: ``affine``, ``roofline``, or ``auto`` (the form with the smallest held-out error wins)
    * ``holdout``: an expression such as ``"draft_length==3"``; those rows are left out and scored afterwards
    * ``observables``: restrict the objective, such as ``("ttft", "itl")``
    * ``all_rows``: use rows that are not stationary too; they are set aside otherwise
    * ``start``: verifier, drafter and hardware of every deployment in the trace: priors are centred at first principles
      instead of at scales read from the trace, and the model can be transferred to other hardware; roofline only
    * ``solver``: ``gauss-newton``, or Optax's ``lbfgs`` and ``adam``; see :mod:`diffspec.fitting.solve`
    * ``uncertainty``: ``randomised`` (draws that fit scattered measurements), ``bootstrap`` (how far repeats of the
      benchmark would differ), ``nuts`` (the posterior, minutes; needs BlackJAX) or ``laplace`` (a covariance, quickly),
      see :mod:`diffspec.fitting.draws`
    * ``pool``: ``hardware``, ``verifier``, ``engine`` or ``all``: deployments with few rows learn from those that share
      it; ``prior``: a model whose deployments all of the trace learn from; see :mod:`diffspec.fitting.pooling`
    * ``profile``: names of parameters (or ``all``) whose profile likelihood is worked out, for
      ``quality["profiles"]``; see :mod:`diffspec.fitting.profile`
    * ``progress(what, share)`` is called while working

    Needs float64: set ``jax.config.update("jax_enable_x64", True)`` first, as the command line does.
    Errors: :class:`InputError` for unknown names, too few rows (fewer than 4 usable in a deployment without
    siblings), or float32.
    """
    if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise InputError('fitting needs float64: call jax.config.update("jax_enable_x64", True) first')
    if step_time not in STEP_TIMES:
        raise InputError(f"step_time: got {step_time!r}; allowed: {', '.join(STEP_TIMES)}")
    if solver not in SOLVERS:
        raise InputError(f"solver: got {solver!r}; allowed: {', '.join(SOLVERS)}")
    if uncertainty not in UNCERTAINTIES:
        raise InputError(f"uncertainty: got {uncertainty!r}; allowed: {', '.join(UNCERTAINTIES)}")
    if uncertainty == "nuts":
        sampler()  # refused now, not after the fit
    if start is not None and step_time == "affine":
        raise InputError(
            "step_time: got 'affine' with first principles (--verifier); allowed: auto, roofline: affine cannot "
            "tell weight reads from launches"
        )
    unknown = [name for name in observables or () if name not in OBSERVABLES]
    if unknown:
        raise InputError(f"observables: got {', '.join(unknown)}; allowed: {', '.join(OBSERVABLES)}")
    held_out = np.zeros(len(trace), dtype=bool)
    if holdout is not None:
        held_out = np.asarray(matches(trace.frame, holdout), dtype=bool)
        if not held_out.any():
            raise InputError(f"holdout {holdout!r}: none of {len(trace)} rows matches")
    used = replace(trace, frame=trace.frame[~held_out])
    if prior is not None and prior.rows_sha256 == used.digest():
        raise InputError("prior: it was fitted to these same rows, which must not count twice; give a model of others")
    report = progress or (lambda what, share: None)
    groups = list(trace.frame.groupby("deployment", sort=False))
    usable = {name: _usable_rows(frame[~held_out[frame.index.to_numpy()]], all_rows) for name, frame in groups}

    def fit_one(name, frame, siblings):
        apart = held_out[frame.index.to_numpy()]
        chosen = (step_time, observables, all_rows, start, solver, uncertainty, siblings, profile)
        deployment = _fit_deployment(str(name), frame[~apart], *chosen, report)
        deployment.warnings.extend(trace.warnings)
        if apart.any():
            scores = _score(deployment, frame[apart], all_rows)
            deployment.quality["holdout"] = {"expression": holdout, "rows": int(apart.sum()), "metrics": scores}
        return deployment

    fitted, left_out = pooling.fit_in_turn(groups, usable, fit_one, LEAST_ROWS, step_time, pool, prior)
    if left_out:
        fitted[0].warnings.append(f"not fitted, fewer than {LEAST_ROWS} usable rows: {', '.join(left_out)}")
    return FittedModel({d.name: d for d in fitted}, used.digest(), used_versions())


def _usable_rows(frame, all_rows: bool) -> int:
    return len(frame) if all_rows else sum(reason is None for reason in set_aside_reasons(frame))


def _score(deployment: FittedDeployment, frame, all_rows: bool) -> dict[str, Any]:
    kept = [all_rows or reason is None for reason in set_aside_reasons(frame)]
    frame = frame[kept].reset_index(drop=True)
    return summarise([predict_trace(deployment, frame)]) if len(frame) else {}


def _fit_deployment(
    name, frame, step_time, observables, all_rows, start, solver, method, siblings, profiled, report: Progress
) -> FittedDeployment:
    reasons = set_aside_reasons(frame)
    kept = np.asarray([all_rows or reason is None for reason in reasons], dtype=bool)
    counted = Counter(reason_kind(reason) for reason in reasons if reason is not None and not all_rows)
    frame = frame[kept].reset_index(drop=True)
    require_rows(frame, name, LEAST_ROWS if siblings is None else 1)
    curve = acceptance_curve(frame)
    defaults = _defaults(frame)
    data = observations(frame, curve)
    targets = choose_targets(data, observables)
    if not targets:
        raise InputError(f"deployment {name!r}: no row has any of the observables to fit: {', '.join(OBSERVABLES)}")
    scales = _scales(frame, data, curve)
    if start is not None:
        start, step_time = principles.at_lengths(start, scales), "roofline"
        defaults.pop("experts", None)
        defaults |= principles.known(start)
    tried: dict[str, dict[str, Any]] = {}
    solutions = {}
    names = candidate_forms(step_time, "experts" in defaults) if siblings is None else [siblings.form]
    every = [path for each in names for path in build_form(each, scales, defaults.get("experts")).paths]
    profiled = profiled_paths(profiled, list(dict.fromkeys(every)))
    folds = folds_of(frame, data, targets)
    for index, form_name in enumerate(names):

        def part(share, base=index, label=f"{name}: {form_name}"):
            report(label, (base + share) / len(names))

        form = build_form(form_name, scales, defaults.get("experts"))
        form = form if start is None else principles.started(form, start)
        form = pooling.informed(form, siblings, frame, start)
        near = waiting_states(data, only_near=True)
        form = replace(form, template=replace(form.template, waiting_states=near, finite_runs="trapezoid"))
        objective = build_objective(form, data, targets)
        objective, solution, weights = _minimise_all(objective, data, targets, solver, lambda s: part(0.8 * s))
        if not np.isfinite(solution.loss[solution.best]):
            raise InputError(
                f"deployment {name!r}: no finite fit of {form_name} exists; check the rows with 'diffspec check'"
            )
        vector = jnp.asarray(solution.vector[solution.best])
        held_out, by_fold, inflation = None, {}, {}
        if folds:
            refits = refit_without(objective, list(folds.values()), weights)
            held_out, by_fold = held_out_error(refits, folds, targets)
            inflation = held_out_inflation(objective, refits, list(folds.values()), weights)
        tried[form_name] = {
            "loss": float(solution.loss[solution.best]),
            "gradient": float(solution.gradient[solution.best]),
            "held_out_error": held_out,
            "held_out_by_fold": by_fold,
        }
        uncertainty = partial(UNCERTAINTIES[method], objective, solution, weights, data.cells, inflation)
        serving = jax.tree.map(np.asarray, form.model(vector[: len(form.paths)]))
        serving = replace(serving, waiting_states=MOST_STATES, finite_runs="fluid")
        best = solution.vector[solution.best], weights, solution.jacobian[solution.best]
        known = objective.fisher_information(*best)[: len(form.paths), : len(form.paths)]
        untold = untold_directions(form, known, trace_facts(frame))
        profiles = partial(_profiles, profiled, objective, solution, weights)
        solutions[form_name] = (serving, uncertainty, objective.stand_in_ratios(vector), untold, profiles)
    chosen = simplest_good({form: entry["held_out_error"] for form, entry in tried.items()})
    serving, draw, ratios, untold, profiles = solutions[chosen]
    report(f"{name}: uncertainty", 0.95)
    uncertainty = draw()
    if start is not None:
        defaults[principles.KEY] = principles.remember(start, serving)
    deployment = FittedDeployment(
        name=name,
        form=chosen,
        serving=serving,
        acceptance=curve,
        defaults=defaults,
        measured=ranges(frame),
        quality={
            "rows": len(frame),
            "set_aside": dict(counted),
            "observables": {t.column: int(t.used.sum()) for t in targets},
            "noise": uncertainty.misfit,
            "stand_in_ratios": ratios,
            "forms": tried,
            "chosen": why_chosen(chosen, tried),
            "untold": untold,
            "profiles": profiles(lambda what, share: report(f"{name}: profile of {what}", share)),
        }
        | ({} if siblings is None else siblings.told()),
        warnings=_warnings(frame, targets, counted),
        uncertainty=uncertainty,
    )
    deployment.warnings.extend(
        f"profile: the {chosen} form that was chosen has no {path}"
        for path in profiled
        if path not in deployment.quality["profiles"]
    )
    metrics = summarise([predict_trace(deployment, frame)])
    deployment.quality["metrics"] = metrics
    poor = [f"{column} {entry['mape']:.0%}" for column, entry in metrics.items() if entry["mape"] > POOR_FIT]
    if poor:
        deployment.warnings.append(f"poor fit, do not rely on it: mean error of {', '.join(poor)} on the fitted rows")
    if deployment.mixed_acceptance:
        deployment.warnings.append(deployment.mixed_acceptance)
    return deployment


def _profiles(asked, objective, solution, weights, report: Progress) -> dict[str, Any]:
    """Profile likelihoods of the parameters asked for that the form has, by path."""
    paths = [path for path in asked if path in objective.form.paths]
    return {path: profile_of(objective, solution, weights, path, partial(report, path)) for path in paths}


def _minimise_all(objective: Objective, data, targets, solver, progress) -> tuple[Objective, Solution, np.ndarray]:
    """The best fit to all rows, and their weights [targets, rows]: repeats of one operating point share what the model
    misses. Finite runs are met by their closed form plus what the fluid model differed from it at the solution before,
    until that settles."""
    weights = np.ones((len(targets), len(data)))

    def again(starts):
        return minimise(objective, starts, np.tile(weights, (LANES, 1, 1)), progress=progress, solver=solver)

    solution = again(random_starts(objective.size))
    finite = np.any(data.is_open() & ~is_endless(data))
    for _ in range(MOST_SHIFTS):
        if not np.isfinite(solution.loss[solution.best]):
            break
        fair = repeat_weights(data.cells, solution.residuals[solution.best], np.stack([t.used for t in targets]))
        moved = float(np.max(np.abs(fair - weights)))
        weights = fair
        if finite:
            following = objective.shifted(solution.vector[solution.best], solution.residuals[solution.best])
            moved = max(moved, float(np.max(np.abs(following.shift - objective.shift) * objective.used)))
            objective = following
        if moved == 0.0:
            break
        solution = again(solution.vector)
        if moved < SETTLED:
            break
    return objective, solution, weights


def _scales(frame, data, curve):
    order = list(data.order)
    speculative = frame["draft_length"].to_numpy(float)[order] > 0
    tokens = np.nan_to_num(frame["tokens_per_step"].to_numpy(float)[order], nan=2.0)
    prompt, output = (frame[name].to_numpy(float)[order] for name in ("prompt_length", "output_length"))
    return read_scales(data.observed, prompt, prompt + 0.5 * output, np.where(speculative, tokens, 1.0), output)


def _defaults(frame) -> dict[str, Any]:
    """Caps, reference sizes and names that hold for the deployment: the most frequent value of each column."""
    defaults: dict[str, Any] = {}
    numbers = ("max_batch_size", "kv_capacity_tokens", "max_batched_tokens", "verifier_params", "drafter_params")
    for column in (*numbers, "draft_probability", "method", "drafter", "verifier", "engine", "hardware"):
        rows = frame if column in ("verifier", "engine", "hardware", *numbers[:4]) else frame[frame["draft_length"] > 0]
        values = [value for value in rows[column] if value is not None and value == value]
        if values:
            value = Counter(values).most_common(1)[0][0]
            defaults[column] = value if isinstance(value, str) else float(value)
    experts = [frame[column].dropna() for column in ("num_experts", "experts_per_token", "expert_ranks")]
    if len(experts[0]) and len(experts[1]):
        ranks = float(experts[2].iloc[0]) if len(experts[2]) else 1.0
        defaults["experts"] = (float(experts[0].iloc[0]), float(experts[1].iloc[0]), ranks)
        check_range("experts_per_token", defaults["experts"][1], 0, defaults["experts"][0], low_open=True, unit="")
    return defaults


def _warnings(frame, targets, counted) -> list[str]:
    notes = [f"{count} rows set aside: {reason}" for reason, count in counted.items()]
    lengths = set(frame["draft_length"])
    if 0 not in lengths:
        notes.append("no k = 0 row: speedup over no speculation cannot be told")
    if lengths == {0}:
        notes.append("no speculative row: drafting cost stays at its prior, it is not knowledge")
    stand_ins = [t.column for t in targets if t.stands_in]
    if stand_ins:
        notes.append(f"{', '.join(stand_ins)} stand in for missing means, with a fitted bias")
    if set(frame["deployment"]) and len({name for name in frame["drafter"] if name}) > 1:
        notes.append("several drafters share one deployment: they are fitted as one; give each its own deployment")
    skipped = not_predicted(frame)
    if skipped:
        notes.append(f"not predicted yet, left out: {', '.join(skipped)}")
    return notes
