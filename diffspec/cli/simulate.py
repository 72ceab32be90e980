"""`diffspec simulate`: the same question, asked of a discrete-event simulation."""

from pathlib import Path
from typing import Annotated

import typer

from diffspec.cli.options import AsJson, DraftLength, Out, WorkloadOptions, with_options
from diffspec.cli.output import deliver, note, progress_bar
from diffspec.cli.prepare import prepare_jax
from diffspec.cli.subject import SubjectOptions

_SIMULATION = "Simulation"


@with_options
def command(
    subject: SubjectOptions,
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
    """Simulate the engine request by request, beside what the model predicts. Exit code 1 if it saturates.

    Example: diffspec simulate model.json --arrival-rate 3 --draft-length 4 --max-batch-size 16 --requests 500

    Before any trace, or on other hardware: --verifier and --hardware as predict takes them.
    """
    prepare_jax()
    from diffspec.analysis.simulated import request_table, simulate_answer
    from diffspec.report import tables
    from diffspec.results import NoResultError

    deployment, unmeasured = subject.find(asked, draft_length)
    if unmeasured is not None and not unmeasured.plan.fits:
        raise NoResultError("verifier and drafter do not fit into the memory of the device: predict says by how much")
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
    if unmeasured is not None:
        answer |= unmeasured.told()
    note(notes)
    note(answer["warnings"], "warning")
    files = {} if table is None else {table: request_table(found)}
    deliver(answer, tables.simulation, as_json=as_json, out=out, files=files, inputs=subject.inputs)
    if answer["saturated"]:
        raise typer.Exit(1)
