"""`diffspec evaluate`: errors of a model on measured rows."""

from typing import Annotated

import typer

from diffspec.cli.options import AllRows, AsJson, ModelPath, Out, PlotPath, TracePaths, read_model
from diffspec.cli.output import deliver, note
from diffspec.cli.prepare import prepare_jax


def command(
    model: ModelPath,
    traces: TracePaths,
    where: Annotated[
        str | None,
        typer.Option("--where", metavar="FILTER", help='Only the rows that match, such as "concurrency==32".'),
    ] = None,
    all_rows: AllRows = False,
    plot: PlotPath = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Score a model on measured rows: errors of every mean in the table.

    Example: diffspec evaluate model.json runs.csv --where "arrival_rate==3" --json
    """
    prepare_jax()
    from diffspec.fitting.evaluate import evaluate
    from diffspec.report import tables
    from diffspec.traces import read_trace

    fitted = read_model(model)
    trace = read_trace(traces)
    if where is not None:
        trace = trace.where(where)
    answer = evaluate(fitted, trace, all_rows=all_rows)
    note(answer["warnings"], "warning")
    files = {}
    if plot is not None:
        from diffspec.report import figures, measured

        parts = measured.scored_by_deployment(fitted, trace, all_rows=all_rows)
        files[plot] = figures.picture(figures.against_measured(parts, "model against measurements"), plot)
    deliver(answer, tables.evaluation, as_json=as_json, out=out, files=files, inputs=(model, *traces))
