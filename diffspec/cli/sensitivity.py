"""`diffspec sensitivity`: what moves a metric."""

from typing import Annotated

import typer

from diffspec.cli.options import (
    AsJson,
    DraftLength,
    Out,
    PlotPath,
    WorkloadOptions,
    with_options,
)
from diffspec.cli.output import deliver, note
from diffspec.cli.prepare import prepare_jax
from diffspec.cli.subject import SubjectOptions


@with_options
def command(
    subject: SubjectOptions,
    asked: WorkloadOptions,
    draft_length: DraftLength,
    metric: Annotated[
        str, typer.Option("--metric", help="What to explain, such as e2e_mean, ttft_mean, throughput.")
    ] = "e2e_mean",
    plot: PlotPath = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Tell what moves a metric: d log(metric) / d log(input) for each parameter and workload field.

    Example: diffspec sensitivity model.json --arrival-rate 3 --draft-length 2 --metric e2e_mean --plot why.png

    Before any trace, or on other hardware: --verifier and --hardware as predict takes them.
    """
    prepare_jax()
    from diffspec.analysis.sensitivity import sensitivity, sensitivity_unmeasured
    from diffspec.report import tables

    deployment, unmeasured = subject.find(asked, draft_length)
    workload, notes = asked.workload(deployment)
    config = asked.configuration(deployment, draft_length)
    if unmeasured is None:
        answer = sensitivity(deployment, workload, config, metric)
    else:
        answer = sensitivity_unmeasured(unmeasured, workload, config, metric)
    note(notes)
    note(answer["warnings"], "warning")
    files = {}
    if plot is not None:
        from diffspec.report import figures

        files[plot] = figures.picture(figures.elasticities(answer), plot)
    deliver(answer, tables.sensitivities, as_json=as_json, out=out, files=files, inputs=subject.inputs)
    if answer["outcome"] in ("saturated", "does_not_fit"):
        raise typer.Exit(1)
