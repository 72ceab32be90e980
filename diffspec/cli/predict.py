"""`diffspec predict`: one operating point."""

from typing import Annotated

import typer

from diffspec.cli.options import AsJson, DraftLength, Out, WorkloadOptions, with_options
from diffspec.cli.output import deliver, note
from diffspec.cli.prepare import prepare_jax
from diffspec.cli.subject import SubjectOptions


@with_options
def command(
    subject: SubjectOptions,
    asked: WorkloadOptions,
    draft_length: DraftLength,
    percentile_intervals: Annotated[
        bool, typer.Option("--percentile-intervals", help="Intervals of the percentiles too; takes longer.")
    ] = False,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Predict latency, throughput and where the time goes at one load. Exit code 1 if it saturates or does not fit.

    Example: diffspec predict model.json --arrival-rate 3 --prompt-length 64 --output-length 64 --draft-length 2

    Before any trace: diffspec predict --verifier config.json --drafter-kind head --hardware h200 --arrival-rate 3
    --prompt-length 512 --output-length 256 --draft-length 2 --acceptance-rate 0.7

    On other hardware than the fit's: diffspec predict model.json --hardware h200 ...
    """
    prepare_jax()
    from diffspec.report import tables

    deployment, unmeasured = subject.find(asked, draft_length)
    workload, notes = asked.workload(deployment)
    config = asked.configuration(deployment, draft_length)
    if unmeasured is None:
        from diffspec.analysis.answers import predict_answer

        answer = predict_answer(deployment, workload, config, percentile_intervals=percentile_intervals)
    else:
        from diffspec.analysis.before_traces import predict_unmeasured

        answer = predict_unmeasured(unmeasured, workload, config, percentile_intervals=percentile_intervals)
    note(notes)
    note(answer["warnings"], "warning")
    deliver(answer, tables.prediction, as_json=as_json, out=out, inputs=subject.inputs)
    if answer["outcome"] in ("saturated", "unconverged", "does_not_fit"):
        raise typer.Exit(1)
