"""`diffspec sensitivity`: what moves a metric."""

from pathlib import Path
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
from diffspec.cli.output import deliver, note, progress_bar
from diffspec.cli.prepare import prepare_jax
from diffspec.cli.subject import SubjectOptions

_PANEL = "What else to tell"


@with_options
def command(
    subject: SubjectOptions,
    asked: WorkloadOptions,
    draft_length: DraftLength,
    metric: Annotated[
        str,
        typer.Option(
            "--metric",
            help="What to explain: e2e_mean, ttft_p95, throughput, capacity, breakeven_rate, best_draft_length, ...",
        ),
    ] = "e2e_mean",
    in_words: Annotated[
        bool,
        typer.Option(
            "--explain",
            rich_help_panel=_PANEL,
            help="Bottlenecks in words, what halving each cost saves, and whose uncertainty counts.",
        ),
    ] = False,
    interactions: Annotated[
        bool, typer.Option("--second-order", rich_help_panel=_PANEL, help="Curvature and interactions of inputs.")
    ] = False,
    indices: Annotated[
        bool,
        typer.Option(
            "--global", rich_help_panel=_PANEL, help="Sobol' indices over what the fit leaves open and over --span."
        ),
    ] = False,
    span: Annotated[
        list[str] | None,
        typer.Option(
            "--span",
            metavar="FIELD=PERCENT",
            rich_help_panel=_PANEL,
            help="With --global: a field known to so many percent, such as arrival_rate=10; repeatable.",
        ),
    ] = None,
    points: Annotated[
        int | None,
        typer.Option(
            "--points", metavar="N", rich_help_panel=_PANEL, help="With --global: a power of two; default 512, or 64."
        ),
    ] = None,
    plot: PlotPath = None,
    plot_spider: Annotated[
        Path | None,
        typer.Option(
            "--plot-spider",
            metavar="FILE",
            rich_help_panel=_PANEL,
            help="Draw the metric as each of the largest 6 parameters is scaled, to FILE (SVG or PNG).",
        ),
    ] = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Tell what moves a metric: d log(metric) / d log(input) for each parameter, workload and configuration field.

    Example: diffspec sensitivity model.json --arrival-rate 3 --draft-length 2 --explain --plot why.png

    Before any trace, or on other hardware: --verifier and --hardware as predict takes them.
    """
    prepare_jax()
    from diffspec.analysis.explaining import explain
    from diffspec.report.sensitivity_tables import sensitivities

    deployment, unmeasured = subject.find(asked, draft_length)
    workload, notes = asked.workload(deployment)
    config = asked.configuration(deployment, draft_length)
    spans = read_spans(span or [])
    with progress_bar("sensitivity") as progress:
        answer = explain(
            unmeasured or deployment,
            workload,
            config,
            metric,
            in_words=in_words,
            interactions=interactions,
            indices=indices,
            spans=spans,
            points=points,
            scaled=plot_spider is not None,
            progress=progress,
        )
    note(notes)
    note(answer["warnings"], "warning")
    files = {}
    if plot is not None or plot_spider is not None:
        from diffspec.report import sensitivity_figures
        from diffspec.report.figures import picture

        if plot is not None:
            files[plot] = picture(sensitivity_figures.tornado(answer), plot)
        if plot_spider is not None:
            files[plot_spider] = picture(sensitivity_figures.spider(answer), plot_spider)
    deliver(answer, sensitivities, as_json=as_json, out=out, files=files, inputs=subject.inputs)
    if answer["outcome"] in ("saturated", "does_not_fit"):
        raise typer.Exit(1)


def read_spans(assignments: list[str]) -> dict[str, float]:
    """Percent by field of ``FIELD=PERCENT``. Errors: :class:`InputError` for another form.

    >>> read_spans(["arrival_rate=10"])
    {'arrival_rate': 10.0}
    """
    from diffspec.results import InputError

    found = {}
    for text in assignments:
        name, _, number = text.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            raise InputError(f"--span: got {text!r}; allowed: FIELD=PERCENT, such as arrival_rate=10") from None
    return found
