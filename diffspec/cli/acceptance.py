"""`diffspec acceptance`: how acceptance depends on the draft position, before anything is fitted."""

from pathlib import Path
from typing import Annotated

import typer

from diffspec.cli.options import AsJson
from diffspec.cli.output import deliver, note


def command(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Per-request metrics, /metrics scrapes, benchmark results, a profile."),
    ],
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            metavar="LIST",
            help="Split by workload, task, temperature, deployment, run, draft_length, output_position.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="CURVE.JSON", help="Write the curve for --acceptance.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Also draw it to FILE: SVG if it ends so, else PNG.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure conditional acceptance at each draft position, with intervals, and whether it falls along the draft.

    The curve that --out writes is a speculation profile (schema 1.0); fit, predict, optimize and sensitivity take it as
    --acceptance CURVE.JSON.

    Example: diffspec acceptance before.txt after.txt --out curve.json
    """
    from diffspec.analysis.acceptance_by_position import study
    from diffspec.report import trace_tables
    from diffspec.report.files import check_target
    from diffspec.traces.gather import gather

    labels = () if by is None else tuple(name.strip() for name in by.split(","))
    answer, curve = study(gather(files), labels)
    contents: dict[Path, str | bytes] = {}
    if out is not None:
        check_target(out, tuple(files))
        contents[out] = curve
    if plot is not None:
        from diffspec.report import figures

        check_target(plot, tuple(files))
        contents[plot] = figures.picture(figures.acceptance(answer["groups"]), plot)
    note(answer["warnings"], "warning")
    deliver(answer, trace_tables.acceptance, as_json=as_json, files=contents, inputs=tuple(files))
