"""`diffspec predict`: one operating point."""

import typer

from diffspec.cli.options import AsJson, DraftLength, ModelPath, Out, WorkloadOptions, read_model, with_workload
from diffspec.cli.output import deliver, note
from diffspec.cli.prepare import prepare_jax


@with_workload
def command(
    model: ModelPath, asked: WorkloadOptions, draft_length: DraftLength, as_json: AsJson = False, out: Out = None
) -> None:
    """Predict latency, throughput and where the time goes at one load. Exit code 1 if it saturates.

    Example: diffspec predict model.json --arrival-rate 3 --prompt-length 64 --output-length 64 --draft-length 2
    """
    prepare_jax()
    from diffspec.analysis.answers import predict_answer
    from diffspec.report import tables

    deployment = read_model(model).deployment(asked.deployment)
    workload, notes = asked.workload(deployment)
    config = asked.configuration(deployment, draft_length)
    answer = predict_answer(deployment, workload, config)
    note(notes)
    note(answer["warnings"], "warning")
    deliver(answer, tables.prediction, as_json=as_json, out=out, inputs=(model,))
    if answer["outcome"] in ("saturated", "unconverged"):
        raise typer.Exit(1)
