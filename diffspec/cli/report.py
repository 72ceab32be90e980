"""`diffspec report`: one interactive page of a fitted model."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from diffspec.cli.options import AllRows, AsJson, ModelPath, read_model
from diffspec.cli.output import deliver, note, progress_bar
from diffspec.cli.prepare import prepare_jax


def command(
    model: ModelPath,
    traces: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[TRACE...]", help="The measured rows, to be shown beside their predictions."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PAGE.HTML", help="Where to write the page; needed without --json.")
    ] = None,
    deployment: Annotated[
        str | None,
        typer.Option("--deployment", metavar="D", help="One deployment; by default all of the model, with a chooser."),
    ] = None,
    max_draft_length: Annotated[
        int, typer.Option("--max-draft-length", metavar="K", help="Longest draft to consider.")
    ] = 8,
    all_rows: AllRows = False,
    as_json: AsJson = False,
) -> None:
    """Write a self-contained page that answers questions in the browser: latency, stages, policy, boundaries, the fit.

    Example: diffspec report model.json runs.csv --out report.html

    The page loads nothing from the network: the fitted model is in it, translated to JavaScript.
    """
    prepare_jax()
    from diffspec.report.files import check_target
    from diffspec.report.page_data import page_data
    from diffspec.report.page_html import page_html, pages_html
    from diffspec.results import InputError
    from diffspec.traces import read_trace
    from diffspec.workload import check_range

    if out is None and not as_json:
        raise InputError("--out is missing: diffspec report MODEL.JSON --out report.html")
    check_range("--max-draft-length", max_draft_length, 1, 32, low_open=False, unit="tok")
    inputs = (model, *(traces or ()))
    if out is not None:
        check_target(out, inputs)
    fitted = read_model(model)
    several = deployment is None and len(fitted.deployments) > 1
    chosen = list(fitted.deployments.values()) if several else [fitted.deployment(deployment)]
    trace = read_trace(traces) if traces else None
    words = ["diffspec", "report", *(str(path) for path in inputs)]
    words += [] if deployment is None else ["--deployment", deployment]
    words += [] if max_draft_length == 8 else ["--max-draft-length", str(max_draft_length)]
    words += ["--all-rows"] if all_rows else []
    words += [] if out is None else ["--out", str(out)]
    told = []
    with progress_bar("report") as progress:
        for number, part in enumerate(chosen):
            progress(part.name, number / len(chosen))
            found = page_data(
                fitted,
                part,
                trace,
                command=shlex.join(words),
                model_file=model.name,
                max_draft_length=max_draft_length,
                all_rows=all_rows,
            )
            told.append(found)
        pages = {}
        if out is not None:
            both = list(zip(told, chosen, strict=True))
            pages[out] = pages_html(both) if several else page_html(*both[0])
    if trace is not None:
        note(trace.warnings, "warning")
        empty = [data["deployment"] for data in told if not data["rows"]]
        note((f"no row of the trace is of deployment {name!r}" for name in empty), "warning")
    page = None if out is None else {"path": str(out), "bytes": len(pages[out].encode())}
    answer = ({"deployments": told} if several else told[0]) | {"page": page}
    deliver(answer, _show, as_json=as_json, files=pages, inputs=inputs)


def _show(answer):
    page, parts = answer["page"], answer.get("deployments", [answer])
    rows = sum(len(part["rows"]) for part in parts)
    shown = f"{rows} measured rows in it" if rows else "no measured rows in it: name the trace to see them"
    name = parts[0]["deployment"] if len(parts) == 1 else f"{len(parts)} deployments"
    yield f"{name}: a page of {page['bytes'] / 1000:.0f} kB, {shown}; open it in a browser"
