"""`diffspec simulate`: the same question, asked of a discrete-event simulation."""

from pathlib import Path
from typing import Annotated

import typer

from diffspec.cli.options import AsJson, DraftLength, ModelPath, Out, WorkloadOptions, read_model, with_workload
from diffspec.cli.output import deliver, note, progress_bar
from diffspec.cli.prepare import prepare_jax

_SIMULATION = "Simulation"


@with_workload
def command(
    model: ModelPath,
    asked: WorkloadOptions,
    draft_length: DraftLength,
    requests: Annotated[
        int, typer.Option("--requests", min=1, rich_help_panel=_SIMULATION, help="Measured requests a replication.")
    ] = 2000,
    replications: Annotated[
        int, typer.Option("--replications", min=1, max=1000, rich_help_panel=_SIMULATION, help="Independent runs.")
    ] = 8,
    seed: Annotated[
        int, typer.Option("--seed", min=0, rich_help_panel=_SIMULATION, help="The same seed gives the same numbers.")
    ] = 0,
    output_law: Annotated[
        str,
        typer.Option(
            "--output-law",
            rich_help_panel=_SIMULATION,
            help="Output lengths: fixed, geometric, or lognormal (with --output-scv).",
        ),
    ] = "fixed",
    finite: Annotated[
        bool, typer.Option("--finite", rich_help_panel=_SIMULATION, help="A run that starts empty and drains.")
    ] = False,
    table: Annotated[
        Path | None,
        typer.Option("--table", metavar="FILE.CSV", rich_help_panel=_SIMULATION, help="Write the requests there."),
    ] = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Simulate the fitted engine request by request, beside what the model predicts. Exit code 1 if it saturates.

    Example: diffspec simulate model.json --arrival-rate 3 --draft-length 4 --max-batch-size 16 --requests 500
    """
    prepare_jax()
    from diffspec.analysis.simulated import request_table, simulate_answer
    from diffspec.report import tables

    deployment = read_model(model).deployment(asked.deployment)
    workload, notes = asked.workload(deployment)
    with progress_bar("simulate") as progress:
        answer, found = simulate_answer(
            deployment,
            workload,
            asked.configuration(deployment, draft_length),
            output_law=output_law,
            n_requests=requests,
            replications=replications,
            seed=seed,
            finite=finite,
            progress=lambda share: progress("simulate", share),
        )
    note(notes)
    note(answer["warnings"], "warning")
    files = {} if table is None else {table: request_table(found)}
    deliver(answer, tables.simulation, as_json=as_json, out=out, files=files, inputs=(model,))
    if answer["saturated"]:
        raise typer.Exit(1)
