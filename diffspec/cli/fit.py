"""`diffspec fit`: a trace becomes a model."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diffspec.cli.options import (
    AllRows,
    AsJson,
    Assignments,
    Identity,
    read_columns,
    read_curve,
    read_model,
)
from diffspec.cli.output import deliver, note, progress_bar
from diffspec.cli.prepare import prepare_jax
from diffspec.cli.subject import Drafter, DrafterKind, Hardware, TensorParallel, Verifier, read_pair


def command(
    traces: Annotated[
        list[Path] | None,
        typer.Argument(metavar="TRACE...", help="Tables (CSV, Parquet) or 'vllm bench serve' JSON, files or folders."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="MODEL.JSON", help="Where to write the model.")] = None,
    step_time: Annotated[
        str,
        typer.Option(
            "--step-time", metavar="FORM", help="affine, roofline, or auto: the smaller cross-validated error."
        ),
    ] = "auto",
    holdout: Annotated[
        str | None,
        typer.Option("--holdout", metavar="FILTER", help='Rows to leave out and score, such as "draft_length==3".'),
    ] = None,
    observables: Annotated[
        str | None,
        typer.Option("--observables", metavar="LIST", help="What to fit, such as ttft,itl; default: what is there."),
    ] = None,
    solver: Annotated[
        str,
        typer.Option(
            "--solver", metavar="NAME", help="gauss-newton, or Optax's lbfgs or adam (slower, for comparison)."
        ),
    ] = "gauss-newton",
    uncertainty: Annotated[
        str,
        typer.Option(
            "--uncertainty",
            metavar="NAME",
            help="randomised (draws that fit scattered rows), bootstrap (how far repeats would differ), nuts (the "
            "posterior, minutes; needs BlackJAX), or laplace (quick, rough).",
        ),
    ] = "randomised",
    assignments: Assignments = None,
    identity: Identity = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave bad rows out; they go to MODEL.JSON.bad_rows.csv.")
    ] = False,
    acceptance: Annotated[
        Path | None,
        typer.Option(
            "--acceptance", metavar="CURVE.JSON", help="Acceptance of rows that tell none, from 'diffspec acceptance'."
        ),
    ] = None,
    all_rows: AllRows = False,
    pool: Annotated[
        str | None,
        typer.Option(
            "--pool",
            metavar="COLUMN",
            help="hardware, verifier, engine or all: deployments with few rows learn from siblings.",
        ),
    ] = None,
    prior: Annotated[
        Path | None,
        typer.Option("--prior", metavar="MODEL.JSON", help="A model whose deployments are siblings of these."),
    ] = None,
    update: Annotated[
        Path | None,
        typer.Option("--update", metavar="MODEL.JSON", help="Take the rows into this model, and tell what changed."),
    ] = None,
    forgetting: Annotated[
        float | None,
        typer.Option(
            "--forgetting",
            metavar="F",
            help="With --update: what old rows keep of their say per new row; default 0.98.",
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            metavar="LIST",
            help="Parameters whose profile likelihood to work out, such as verify_kv,draft.pass_base, or all.",
        ),
    ] = None,
    fleet: Annotated[
        Path | None,
        typer.Option(
            "--fleet",
            metavar="DIR",
            help="Fit each file or folder in DIR (of a table: each deployment) as a model of its own; --out: a folder.",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", metavar="N", help="With --fleet: processes that fit; default 1.")
    ] = None,
    verifier: Verifier = None,
    drafter: Drafter = None,
    hardware: Hardware = None,
    tensor_parallel: TensorParallel = None,
    drafter_kind: DrafterKind = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw the rows against the fit beside MODEL.JSON.")] = (
        True
    ),
    template: Annotated[bool, typer.Option("--template", help="Print a small valid trace to fill in, and stop.")] = (
        False
    ),
    as_json: AsJson = False,
) -> None:
    """Fit a model to a trace, one set of parameters per deployment.

    Example: diffspec fit runs.csv --out model.json --holdout "draft_length==3"

    A table to start from: diffspec fit --template > trace.csv

    From first principles, so that predict --hardware can transfer it: diffspec fit runs.csv --out model.json
    --verifier config.json --drafter draft.json --hardware h100

    New rows of servers that are fitted already: diffspec fit --update model.json new.parquet --out model2.json

    Many traces at once, going on where a run that was stopped left off: diffspec fit --fleet traces/ --out models/
    --processes 8
    """
    if template:
        from diffspec.traces import template as template_text

        sys.stdout.write(template_text())
        return
    prepare_jax()
    from diffspec.fitting.fit import fit
    from diffspec.report import fitting_tables, tables
    from diffspec.report.files import check_target
    from diffspec.results import InputError
    from diffspec.traces import read_trace

    if fleet is not None:
        others = (update, forgetting, acceptance, pool, prior, profile, verifier, drafter, hardware, tensor_parallel)
        if traces or out is None or any(option is not None for option in (*others, drafter_kind)):
            raise InputError(
                "--fleet goes with --out FOLDER, --processes, --step-time, --holdout, --observables, --solver, "
                "--uncertainty, --all-rows, --set, --identity and --skip-bad-rows, and reads its traces from DIR"
            )
        from diffspec.cli.fleet import fit_folder

        chosen = None if observables is None else tuple(name.strip() for name in observables.split(","))
        asked = {"step_time": step_time, "holdout": holdout, "observables": chosen, "all_rows": all_rows}
        asked |= {"solver": solver, "uncertainty": uncertainty}
        reading = {"skip_bad_rows": skip_bad_rows, "identity": read_columns(identity, assignments)}
        told = fit_folder(fleet, out, 1 if processes is None else processes, asked, reading)
        note(told["warnings"], "warning")
        deliver(told, fitting_tables.fleet, as_json=as_json)
        if not told["fitted"]:
            raise typer.Exit(1)
        return
    if processes is not None:
        raise InputError("--processes goes with --fleet DIR")
    if not traces:
        raise InputError("TRACE is missing: diffspec fit TRACE... --out model.json, or diffspec fit --template")
    if out is None:
        raise InputError("--out is missing: diffspec fit TRACE... --out model.json")
    if update is not None:
        others = (holdout, acceptance, pool, prior, profile, verifier, drafter, hardware, tensor_parallel, drafter_kind)
        if step_time != "auto" or any(option is not None for option in others):
            raise InputError(
                "--update goes with --forgetting, --observables, --all-rows, --set, --identity, --skip-bad-rows and "
                "--no-plot; the model keeps its form, its priors and its acceptance, which the new rows update"
            )
    elif forgetting is not None:
        raise InputError("--forgetting needs --update MODEL.JSON: a fit weighs all rows alike")
    start = None
    if verifier is not None:
        start = read_pair(verifier, drafter, hardware, tensor_parallel, drafter_kind)
    elif (drafter, hardware, tensor_parallel, drafter_kind) != (None, None, None, None):
        raise InputError("--drafter, --hardware, --tensor-parallel and --drafter-kind need --verifier CONFIG.JSON")
    check_target(out, tuple(traces))
    trace = read_trace(traces, skip_bad_rows=skip_bad_rows, identity=read_columns(identity, assignments))
    if acceptance is not None:
        trace = trace.with_acceptance(read_curve(acceptance))
    chosen = None if observables is None else tuple(name.strip() for name in observables.split(","))
    summaries = None
    if update is not None:
        from diffspec.fitting.update import FORGETTING
        from diffspec.fitting.update import update as update_model

        factor = FORGETTING if forgetting is None else forgetting
        model, summaries = update_model(
            read_model(update), trace, forgetting=factor, observables=chosen, all_rows=all_rows
        )
    else:
        with progress_bar("fit") as progress:
            model = fit(
                trace,
                step_time=step_time,
                holdout=holdout,
                observables=chosen,
                all_rows=all_rows,
                start=start,
                solver=solver,
                uncertainty=uncertainty,
                pool=pool,
                prior=None if prior is None else read_model(prior),
                profile=() if profile is None else tuple(name.strip() for name in profile.split(",")),
                progress=progress,
            )
    files: dict[Path, str | bytes] = {out: model.to_json()}
    warnings = list(trace.warnings)
    if trace.bad_rows is not None and len(trace.bad_rows):
        spoilt = out.with_name(out.name + ".bad_rows.csv")
        files[spoilt] = trace.bad_rows.to_csv(index=False)
        warnings.append(f"{len(trace.bad_rows)} bad rows left out; see {spoilt}")
    if plot:
        files |= _plots(model, trace, out, holdout, all_rows)
    answer: dict[str, Any] = {
        "model": str(out),
        "files": [str(path) for path in files],
        "rows": len(trace),
        "rows_sha256": model.rows_sha256,
        "deployments": [deployment.to_dict() for deployment in model.deployments.values()],
        "warnings": warnings,
    }
    if summaries is not None:
        answer["update"] = summaries
    note([*warnings, *(w for deployment in model.deployments.values() for w in deployment.warnings)], "warning")
    show = tables.fit_summary if summaries is None else fitting_tables.update_summary
    inputs = (*traces, *(path for path in (update, prior) if path is not None and path != out))
    deliver(answer, show, as_json=as_json, files=files, inputs=inputs)


def _plots(model, trace, out: Path, holdout: str | None, all_rows: bool) -> dict[Path, str | bytes]:
    """A figure per deployment, named after the model and, where there are several, the deployment."""
    from diffspec.report import figures, measured

    drawn: dict[Path, str | bytes] = {}
    for number, deployment in enumerate(model.deployments.values(), start=1):
        parts = measured.fitted_and_held_out(deployment, trace, holdout, all_rows=all_rows)
        if not parts:  # an update without new rows of this one
            continue
        name = re.sub(r"[^\w.-]+", "-", deployment.name).strip("-.") or "deployment"
        stem = out.stem if len(model.deployments) == 1 else f"{out.stem}-{number}-{name}"
        figure = figures.against_measured(parts, f"{deployment.name}: {deployment.form} step time against measurements")
        drawn[out.with_name(f"{stem}.png")] = figures.png(figure)
    return drawn
