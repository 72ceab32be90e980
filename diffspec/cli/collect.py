"""`diffspec collect`: drive a server with a stated load and record a trace."""

from pathlib import Path
from typing import Annotated

import typer

from diffspec.cli.options import AsJson
from diffspec.cli.output import deliver, note, progress_bar


def command(
    plan: Annotated[
        Path | None, typer.Argument(metavar="PLAN.YAML", help="What to measure; --template prints one.")
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", metavar="URL", help="The server, such as http://127.0.0.1:8000.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Where the trace goes.")] = None,
    max_rate: Annotated[
        float | None, typer.Option("--max-rate", metavar="R", help="Never more than this many req/s.")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option("--max-requests", metavar="N", help="Never more than this many requests.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the cells and how long they take; send nothing.")] = (
        False
    ),
    template: Annotated[bool, typer.Option("--template", help="Print a plan to start from, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure an OpenAI-compatible server (vLLM, SGLang, TGI, ...) over a grid of loads and record the trace.

    Load goes only to URL, never above the caps. An interrupted collection goes on where it stopped: run it again.

    Example: diffspec collect plan.yaml --url http://127.0.0.1:8000 --out trace --max-rate 10 --max-requests 5000
    """
    from diffspec.collecting.collect import check_files, check_url, collect
    from diffspec.collecting.plan_text import TEMPLATE, read_plan
    from diffspec.report import trace_tables
    from diffspec.results import InputError

    if template:
        typer.echo(TEMPLATE, nl=False)
        return
    if plan is None:
        raise InputError("PLAN.YAML is missing: diffspec collect --template > plan.yaml writes one to start from")
    try:
        text = plan.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{plan}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    read = read_plan(text, str(plan), url=url, max_rate=max_rate, max_requests=max_requests)
    if dry_run:
        check_files(read, plan.parent)
        deliver(read.summary(), trace_tables.plan_summary, as_json=as_json)
        return
    check_url(read.server.url)
    if out is None:
        raise InputError("--out is missing: the folder for the trace")
    with progress_bar("collect") as progress:
        done = collect(read, out, beside=plan.parent, progress=progress)
    note(done.warnings, "warning")
    note((f"{name} failed: {why}" for name, why in done.failed.items()), "warning")
    deliver(done.to_dict(), trace_tables.collected, as_json=as_json)
    if done.failed:
        raise typer.Exit(1)
