"""`diffspec sensitivity`: what moves a metric."""

from typing import Annotated

import typer

from diffspec.cli.options import (
    AsJson,
    DraftLength,
    ModelPath,
    Out,
    PlotPath,
    WorkloadOptions,
    read_model,
    with_workload,
)
from diffspec.cli.output import deliver, note
from diffspec.cli.prepare import prepare_jax


@with_workload
def command(
    model: ModelPath,
    asked: WorkloadOptions,
    draft_length: DraftLength,
    metric: Annotated[str, typer.Option(help="What to explain, such as e2e_mean, ttft_mean, throughput.")] = "e2e_mean",
    plot: PlotPath = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Tell what moves a metric: d log(metric) / d log(input) for each parameter and workload field.

    Example: diffspec sensitivity model.json --arrival-rate 3 --draft-length 2 --metric e2e_mean --plot why.png
    """
    prepare_jax()
    from diffspec.analysis.sensitivity import sensitivity
    from diffspec.report import tables

    deployment = read_model(model).deployment(asked.deployment)
    workload, notes = asked.workload(deployment)
    answer = sensitivity(deployment, workload, asked.configuration(deployment, draft_length), metric)
    note(notes)
    note(answer["warnings"], "warning")
    files = {}
    if plot is not None:
        from diffspec.report import figures

        files[plot] = figures.png(figures.elasticities(answer))
    deliver(answer, tables.sensitivities, as_json=as_json, out=out, files=files, inputs=(model,))
    if answer["outcome"] == "saturated":
        raise typer.Exit(1)
