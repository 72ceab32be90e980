"""`diffspec boundary`: where speculation pays, over any two axes."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffspec.cli.options import AsJson, MaxDraftLength, Out, PlotPath, WorkloadOptions, with_options
from diffspec.cli.output import deliver, note, progress_bar
from diffspec.cli.prepare import prepare_jax
from diffspec.cli.subject import SubjectOptions

if TYPE_CHECKING:
    from diffspec.boundaries.axes import Axis

_MAP = "Map"


@with_options
def command(
    subject: SubjectOptions,
    asked: WorkloadOptions,
    x: Annotated[
        str,
        typer.Option(
            "--x",
            metavar="AXIS",
            rich_help_panel=_MAP,
            help="Across: NAME=first:last, first:last:step or a,b,c; of arrival_rate, concurrency, acceptance_rate, "
            "prompt_length, output_length, draft_length, drafter_scale, max_batch_size, hardware=h100,l4. A name "
            "alone: its usual range.",
        ),
    ] = "arrival_rate",
    y: Annotated[
        str, typer.Option("--y", metavar="AXIS", rich_help_panel=_MAP, help="Upwards: the same.")
    ] = "acceptance_rate",
    points: Annotated[
        int, typer.Option("--points", metavar="N", rich_help_panel=_MAP, help="Values of NAME=first:last, 2 to 200.")
    ] = 13,
    quantity: Annotated[
        str,
        typer.Option(
            "--quantity",
            rich_help_panel=_MAP,
            help="e2e, tpot or ttft (latency), throughput (capacity), memory or energy.",
        ),
    ] = "e2e",
    draft_length: Annotated[
        str,
        typer.Option("--draft-length", metavar="K|best", help="Drafted tokens per step, or the best at each point."),
    ] = "best",
    max_draft_length: MaxDraftLength = 8,
    draws: Annotated[
        int, typer.Option("--draws", metavar="N", rich_help_panel=_MAP, help="Draws of what is not known; 0: none.")
    ] = 32,
    plot: PlotPath = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Map what speculation gains over two axes, and trace where it gains nothing. Exit code 1 if nothing is served.

    Example: diffspec boundary model.json --x arrival_rate=0.5:8 --y acceptance_rate=0.3:0.95 --plot map.png

    Before any trace: diffspec boundary --verifier config.json --drafter-kind head --hardware h100 --output-length 200
    --x prompt_length=128:32768 --y acceptance_rate --arrival-rate 2 --quantity throughput

    Over hardware: --x hardware=h100,rtx-4090,l4 (a fit needs --verifier and --hardware when it is made).
    """
    prepare_jax()
    from diffspec.boundaries.axes import parse_axis
    from diffspec.boundaries.boundary import boundary
    from diffspec.report import boundary_tables

    axes = dict(parse_axis(text, points) for text in (x, y))
    length = _draft_length(draft_length)
    longest = float(max_draft_length) if length == "best" else float(length)
    subject, stands = _standing_in(subject, asked, axes)
    deployment, unmeasured = subject.find(stands, longest)
    for name in ("arrival_rate", "concurrency"):
        if getattr(asked, name) is not None and len(asked.loads()[1]) != 1:
            _refuse(f"--{name.replace('_', '-')}: got several loads; allowed: one, or an axis {name}")
    lengths, notes = _lengths(asked, axes, deployment.measured)
    with progress_bar("boundary") as progress:
        answer = boundary(
            deployment if unmeasured is None else unmeasured,
            axes,
            points=points,
            quantity=quantity,
            draft_length=length,
            max_draft_length=max_draft_length,
            arrival_rate=None if asked.arrival_rate is None else asked.loads()[1][0],
            concurrency=None if asked.concurrency is None else asked.loads()[1][0],
            **lengths,
            acceptance=asked.acceptance_model(None if length == "best" else longest),
            max_batch_size=asked.max_batch_size,
            max_batched_tokens=asked.max_batched_tokens,
            drafter_params=asked.drafter_params,
            **asked.details(),
            tensor_parallel=subject.tensor_parallel,
            draws=draws,
            progress=progress,
        )
    note(notes)
    note(answer["warnings"], "warning")
    files: dict[Any, str | bytes] = {}
    if plot is not None:
        from diffspec.report import boundary_figures, figures

        files[plot] = figures.picture(boundary_figures.boundary(answer), plot)
    deliver(answer, boundary_tables.boundary, as_json=as_json, out=out, files=files, inputs=subject.inputs)
    if answer["outcome"] != "successful":
        raise typer.Exit(1)


def _refuse(message: str) -> None:
    from diffspec.results import InputError

    raise InputError(message)


def _draft_length(text: str) -> float | str:
    if text == "best":
        return text
    try:
        return float(text)
    except ValueError:
        _refuse(f"--draft-length: got {text!r}; allowed: a number above 0, or best")
    return text


def _standing_in(
    subject: SubjectOptions, asked: WorkloadOptions, axes: "dict[str, Axis | None]"
) -> tuple[SubjectOptions, WorkloadOptions]:
    """The options with a value of each axis where only an axis tells one: what a server is made for is told again at
    each point."""
    fields = {}
    for name in ("prompt_length", "output_length", "acceptance_rate"):
        axis = axes.get(name)
        if axis is not None and getattr(asked, name) is None:
            fields[name] = float(axis.value(0.5))
    others = ("acceptance_rate", "tokens_per_step", "position_acceptance", "acceptance")
    if any(getattr(asked, name) is not None for name in others):
        fields.pop("acceptance_rate", None)
    hardware = axes.get("hardware")
    if hardware is not None and subject.verifier is not None:
        if subject.hardware is not None:
            _refuse(f"--hardware: got {subject.hardware!r}, and an axis moves it; give one of both")
        subject = dataclasses.replace(subject, hardware=str(hardware.values[0]))
    elif hardware is not None and subject.hardware is not None:
        _refuse(f"--hardware: got {subject.hardware!r}, and an axis moves it; give one of both")
    return subject, dataclasses.replace(asked, **fields)


def _lengths(
    asked: WorkloadOptions, axes: "dict[str, Axis | None]", measured: dict[str, Any]
) -> tuple[dict[str, float | None], list[str]]:
    """Lengths that no axis moves, with a note for each that was not given."""
    names = ("prompt_length", "output_length")
    stands = dataclasses.replace(asked, **{name: 1.0 for name in names if name in axes})
    prompt, output, notes = stands.lengths(measured)
    found = dict(zip(names, (prompt, output), strict=True))
    return {name: getattr(asked, name) if name in axes else value for name, value in found.items()}, notes
