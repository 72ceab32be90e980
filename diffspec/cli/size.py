"""`diffspec size`: how many replicas, of what, at what cost."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffspec.cli.options import (
    AsJson,
    CostPerHour,
    MaxDraftLength,
    Out,
    PlotPath,
    WorkloadOptions,
    parse_loads,
    read_prices,
    with_options,
)
from diffspec.cli.output import deliver, note, progress_bar
from diffspec.cli.prepare import prepare_jax
from diffspec.cli.subject import SubjectOptions

if TYPE_CHECKING:
    from diffspec.analysis.before_traces import Unmeasured
    from diffspec.fitting.deployment import FittedDeployment

_COST, _CURVE = "What it costs", "Curve and front"


@with_options
def command(
    subject: SubjectOptions,
    asked: WorkloadOptions,
    target_rate: Annotated[float, typer.Option("--target-rate", metavar="X", help="Arrivals per second to serve.")],
    slo: Annotated[
        list[str] | None,
        typer.Option(
            "--slo",
            metavar='"METRIC<X"',
            help="An upper limit, such as ttft_p95<0.5, tpot_mean<0.05 or memory<72 (GB); repeatable.",
        ),
    ] = None,
    headroom: Annotated[
        float, typer.Option("--headroom", metavar="H", help="Share of the largest rate to leave unused.")
    ] = 0.0,
    max_draft_length: MaxDraftLength = 8,
    max_tensor_parallel: Annotated[
        int | None,
        typer.Option(
            "--max-tensor-parallel",
            metavar="N",
            help="Compare 1, 2, 4, ... devices a replica up to N; default: 8 before any trace, else as measured.",
        ),
    ] = None,
    burst_scv: Annotated[
        float, typer.Option("--burst-scv", metavar="C2", help="Squared CV of the gaps between a replica's arrivals.")
    ] = 1.0,
    risk: Annotated[
        float | None,
        typer.Option("--risk", metavar="Q", help="Size for the rate that this share of the draws sustains, say 0.9."),
    ] = None,
    cost_per_hour: CostPerHour = None,
    minimise: Annotated[
        str | None,
        typer.Option(
            "--minimise",
            metavar="WHAT",
            rich_help_panel=_COST,
            help="cost, device_hours or energy; default: cost where prices are known.",
        ),
    ] = None,
    knob: Annotated[
        str,
        typer.Option("--knob", metavar="NAME", rich_help_panel=_CURVE, help="prompt_length or acceptance_rate."),
    ] = "prompt_length",
    knob_values: Annotated[
        str | None, typer.Option("--knob-values", metavar="A,B,C", rich_help_panel=_CURVE, help="Its values.")
    ] = None,
    latency: Annotated[
        str, typer.Option("--latency", metavar="METRIC", rich_help_panel=_CURVE, help="Latency of the Pareto front.")
    ] = "e2e_mean",
    plot: PlotPath = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Tell how many replicas of which configuration serve a target rate within limits. Exit code 1 if none does.

    Example: diffspec size model.json --target-rate 40 --slo "ttft_p95<0.5" --slo "tpot_mean<0.05" --headroom 0.2

    Before any trace, over a catalogue: diffspec size --verifier config.json --drafter-kind head --hardware h100,l4
    --target-rate 40 --slo "tpot_mean<0.05" --prompt-length 512 --output-length 200 --acceptance-rate 0.8
    """
    prepare_jax()
    from diffspec.analysis.before_traces import Unmeasured
    from diffspec.optimizing.size import size
    from diffspec.report import sizing
    from diffspec.results import InputError

    if asked.arrival_rate is not None or asked.concurrency is not None:
        raise InputError("--arrival-rate and --concurrency: allowed: --target-rate, of all replicas together")
    found = _subjects(subject, asked, max_draft_length, max_tensor_parallel)
    deployment = found[0].deployment if isinstance(found[0], Unmeasured) else found[0]
    prompt, output, notes = asked.lengths(deployment.measured)
    prices, listed = read_prices(cost_per_hour)
    with progress_bar("size") as progress:
        answer = size(
            found,
            target_rate=target_rate,
            prompt_length=prompt,
            output_length=output,
            slo=slo or [],
            headroom=headroom,
            max_draft_length=max_draft_length,
            acceptance=asked.acceptance_model(None),
            max_batch_size=asked.max_batch_size,
            max_batched_tokens=asked.max_batched_tokens,
            **asked.details(),
            burst_scv=burst_scv,
            drafter_params=asked.drafter_params,
            cost_per_hour=prices,
            minimise=minimise,
            latency=latency,
            knob=knob,
            knob_values=None if knob_values is None else parse_loads(knob_values, "--knob-values"),
            risk=risk,
            progress=progress,
        )
    note(notes)
    note(answer["warnings"], "warning")
    files = {}
    if plot is not None:
        from diffspec.report import figures

        files[plot] = figures.picture(sizing.sizing_figure(answer), plot)
    deliver(answer, sizing.sizing, as_json=as_json, out=out, files=files, inputs=(*subject.inputs, *listed))
    if answer["outcome"] != "successful":
        raise typer.Exit(1)


def _subjects(
    subject: SubjectOptions, asked: WorkloadOptions, max_draft_length: int, most: int | None
) -> "list[FittedDeployment | Unmeasured]":
    """The deployment as it was measured, or one for each hardware and tensor parallelism."""
    from diffspec.hardware import PRESETS, accelerator
    from diffspec.results import InputError

    drafts = subject.model is not None or subject.drafter is not None or subject.drafter_kind not in (None, "none")
    longest = max_draft_length if drafts else 0
    if most is not None and not 1 <= most <= 1024:
        raise InputError(f"--max-tensor-parallel: got {most}; allowed: 1 to 1024")
    if most is not None and subject.tensor_parallel is not None:
        raise InputError("--tensor-parallel and --max-tensor-parallel: got both; allowed: one of them")
    if subject.hardware is None:
        if most is not None:
            raise InputError("--max-tensor-parallel needs --hardware")
        deployment, unmeasured = subject.find(asked, longest)
        return [deployment if unmeasured is None else unmeasured]
    names = list(PRESETS) if subject.hardware == "all" else [name.strip() for name in subject.hardware.split(",")]
    counts: list[int | None] = [subject.tensor_parallel]
    if subject.tensor_parallel is None and (most is not None or subject.verifier is not None):
        counts = [2**power for power in range((8 if most is None else most).bit_length())]
    found: list[Any] = []
    for name in dict.fromkeys(accelerator(name).name for name in names):
        for count in counts:
            one = dataclasses.replace(subject, hardware=name, tensor_parallel=count)
            deployment, unmeasured = one.find(asked, longest)
            assert unmeasured is not None
            if unmeasured.pair.verifier.heads % unmeasured.pair.tensor_parallel == 0:
                found.append(unmeasured)
    if not found:
        raise InputError("--tensor-parallel: got a number of devices that does not divide the verifier's heads")
    return found
