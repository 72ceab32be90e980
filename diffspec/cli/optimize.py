"""`diffspec optimize`: the draft length for each load."""

from functools import partial
from typing import Annotated

import typer

from diffspec.cli.options import (
    AsJson,
    Out,
    PlotPath,
    WorkloadOptions,
    parse_capture_sizes,
    with_options,
)
from diffspec.cli.output import deliver, note, progress_bar
from diffspec.cli.prepare import prepare_jax
from diffspec.cli.subject import SubjectOptions


@with_options
def command(
    subject: SubjectOptions,
    asked: WorkloadOptions,
    max_draft_length: Annotated[
        int, typer.Option("--max-draft-length", metavar="K", help="Longest draft to consider.")
    ] = 8,
    slo: Annotated[
        list[str] | None, typer.Option("--slo", metavar='"METRIC<X"', help="A limit in s or req/s; repeat for more.")
    ] = None,
    objective: Annotated[str, typer.Option("--objective", metavar="METRIC", help="What to make small.")] = "e2e_mean",
    capture_sizes: Annotated[
        str | None,
        typer.Option(
            "--capture-sizes",
            metavar="1,2,4,8",
            help="Token counts that the engine pads a step to (CUDA graphs), to score choices on; 'vllm': its own.",
        ),
    ] = None,
    plot: PlotPath = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Choose the draft length for each load, within limits. Exit code 1 if no load has an answer.

    Loads are one number, a list 1,2,4 or an inclusive range first:last:step.

    Example: diffspec optimize model.json --arrival-rate 0.5:6:0.5 --max-draft-length 8 --slo "ttft_mean<0.5"

    Before any trace, or on other hardware: --verifier and --hardware as predict takes them.
    """
    prepare_jax()
    from diffspec.optimizing.optimize import optimize, optimize_unmeasured
    from diffspec.report import tables

    deployment, unmeasured = subject.find(asked, max_draft_length)
    loop, loads = asked.loads()
    prompt, output, notes = asked.lengths(deployment.measured)
    acceptance = asked.acceptance_model(None)
    with progress_bar("optimize") as progress:
        choose = partial(optimize, deployment) if unmeasured is None else partial(optimize_unmeasured, unmeasured)
        answer = choose(
            loads=loads,
            loop=loop,
            prompt_length=prompt,
            output_length=output,
            max_draft_length=max_draft_length,
            slo=slo or [],
            objective=objective,
            acceptance=acceptance,
            max_batch_size=asked.max_batch_size,
            max_batched_tokens=asked.max_batched_tokens,
            capture_sizes=parse_capture_sizes(capture_sizes),
            **asked.details(),
            drafter_params=asked.drafter_params,
            progress=progress,
        )
    note(notes)
    note(answer["warnings"], "warning")
    files = {}
    if plot is not None:
        from diffspec.report import figures

        files[plot] = figures.png(figures.policy(answer))
    deliver(answer, tables.policy, as_json=as_json, out=out, files=files, inputs=subject.inputs)
    if answer["outcome"] != "successful":
        raise typer.Exit(1)
