"""`diffspec simulate`: the same question, asked of a discrete-event simulation."""

from pathlib import Path
from typing import Annotated

import typer

from diffspec.cli.options import AsJson, Out, WorkloadOptions, with_options
from diffspec.cli.output import deliver, note, progress_bar
from diffspec.cli.prepare import prepare_jax
from diffspec.cli.replay import (
    ReplayOptions,
    replay_workload,
    replayed_requests,
    with_file_lengths,
)
from diffspec.cli.subject import SubjectOptions

_SIMULATION = "Simulation"
REQUESTS = 2000
"""Measured requests a replication, where they are drawn and no number is asked for."""


@with_options
def command(
    subject: SubjectOptions,
    asked: WorkloadOptions,
    replay: ReplayOptions,
    draft_length: Annotated[
        float | None,
        typer.Option("--draft-length", metavar="K", help="Drafted tokens per step; 0 for no speculation."),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            min=1,
            rich_help_panel=_SIMULATION,
            help="Measured requests a replication: by default 2000, or all arrivals of the file.",
        ),
    ] = None,
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

    With --schedule the draft length follows the batch. With --arrivals the requests of a file are replayed, from an
    empty engine until the last is complete; replications differ in which drafts are accepted.

    Before any trace, or on other hardware: --verifier and --hardware as predict takes them.
    """
    replay.check(draft_length, asked)
    prepare_jax()
    import numpy as np

    from diffspec.analysis.simulated import request_table, simulate_answer
    from diffspec.optimizing.schedule_files import predict_under_schedule
    from diffspec.report import simulation_tables
    from diffspec.results import InputError, NoResultError
    from diffspec.simulating import DraftSchedule

    if replay.arrivals is not None and finite:
        raise InputError("--finite: got --arrivals too; allowed: one of them, arrivals are always replayed from empty")
    arrivals = replay.read_arrivals(requests)
    draws = {"replications": replications, "seed": seed, "output_law": output_law}
    first = replay.read_schedule()
    longest = float(draft_length or 0.0) if first is None else float(first.longest)
    deployment, unmeasured = subject.find(with_file_lengths(asked, arrivals), longest)
    if unmeasured is not None and not unmeasured.plan.fits:
        raise NoResultError("verifier and drafter do not fit into the memory of the device: predict says by how much")
    more, replayed = {}, None
    if arrivals is None:
        workload, notes = asked.workload(deployment)
    else:
        workload, told, notes = replay_workload(arrivals, asked, deployment)
        replayed, said = replayed_requests(arrivals, asked, workload, told["time_scale"], **draws)
        notes, more = notes + said, {"arrivals": told}
    schedule = replay.read_schedule(workload)
    longest = longest if schedule is None else float(schedule.longest)
    config = asked.configuration(deployment, longest, one_length=schedule is None)
    played = None if schedule is None or longest == 0 else DraftSchedule(schedule.ranges, schedule.bands)
    with progress_bar("simulate") as progress:
        answer, found = simulate_answer(
            deployment,
            workload,
            config,
            n_requests=requests or REQUESTS,
            **draws,
            finite=finite,
            schedule=played,
            replayed=replayed,
            progress=lambda share: progress("simulate", share),
        )
    if schedule is not None:
        told = {name: getattr(schedule, name) for name in ("ranges", "bands", "context_length")}
        switches = float(np.mean([lane.switches for lane in found.lanes]))
        more["schedule"] = {"file": str(replay.schedule)} | told | {"switches": switches}
    if played is not None and schedule is not None:
        answer["predicted"] = predict_under_schedule(deployment, workload, config, schedule)
    answer |= more
    if unmeasured is not None:
        answer |= unmeasured.told()
    note(notes)
    note(answer["warnings"], "warning")
    files = {} if table is None else {table: request_table(found)}
    inputs = subject.inputs + replay.inputs
    deliver(answer, simulation_tables.simulation, as_json=as_json, out=out, files=files, inputs=inputs)
    if answer["saturated"]:
        raise typer.Exit(1)
