"""`diffspec policy`: the draft length as a function of load, for the engine to follow."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from diffspec.cli.options import (
    AsJson,
    CaptureSizes,
    MaxDraftLength,
    Objective,
    Out,
    PlotPath,
    WorkloadOptions,
    parse_capture_sizes,
    parse_loads,
    with_options,
)
from diffspec.cli.output import deliver, note, progress_bar
from diffspec.cli.prepare import prepare_jax
from diffspec.cli.subject import SubjectOptions

_TIERS, _EXPORT = "Tiers of the schedule", "Export"


@with_options
def command(
    subject: SubjectOptions,
    asked: WorkloadOptions,
    max_draft_length: MaxDraftLength = 8,
    slo: Annotated[
        list[str] | None,
        typer.Option("--slo", metavar='"METRIC<X"', help="A limit under the schedule, in s or req/s; repeat for more."),
    ] = None,
    objective: Objective = "e2e_mean",
    risk: Annotated[
        str,
        typer.Option(
            "--risk",
            metavar="mean|point|Q",
            help="Over what the fit leaves open: the expectation, nothing (the fit itself), or a quantile such as 0.9.",
        ),
    ] = "mean",
    context_lengths: Annotated[
        str | None,
        typer.Option("--context-lengths", metavar="1024,8192", help="A schedule for each number of cached tokens."),
    ] = None,
    forbid_zero: Annotated[
        bool, typer.Option("--forbid-zero", rich_help_panel=_TIERS, help="No tier without drafts.")
    ] = False,
    min_gain: Annotated[
        float,
        typer.Option("--min-gain", metavar="G", rich_help_panel=_TIERS, help="Least gain of a tier over the others."),
    ] = 0.01,
    min_width: Annotated[
        int, typer.Option("--min-width", metavar="N", rich_help_panel=_TIERS, help="Least batches that a tier holds.")
    ] = 1,
    hysteresis: Annotated[
        float | None,
        typer.Option(
            "--hysteresis",
            metavar="N",
            rich_help_panel=_TIERS,
            help="Half width of the bands around thresholds, 0 for none; default: as far as the batch wavers.",
        ),
    ] = None,
    capture_sizes: CaptureSizes = None,
    export: Annotated[
        list[str] | None,
        typer.Option(
            "--export",
            metavar="ENGINE",
            rich_help_panel=_EXPORT,
            help="vllm, sglang, sglang-dspark, tensorrt-llm, json or python; repeat for more.",
        ),
    ] = None,
    engine_version: Annotated[
        str | None,
        typer.Option(
            "--engine-version", metavar="X", rich_help_panel=_EXPORT, help="Which release; tensorrt-llm needs it."
        ),
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out-dir", metavar="FOLDER", rich_help_panel=_EXPORT, help="Write the exported files there."),
    ] = None,
    plot: PlotPath = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Draft length by batch and load, with hysteresis and fallback, for engines to follow. Exit code 1 without answer.

    Loads are one number, a list 1,2,4 or an inclusive range first:last:step; without any, 0.1 to 0.9 of capacity.

    Example: diffspec policy model.json --arrival-rate 1:8:1 --slo "ttft_mean<0.5" --export vllm --out-dir flags

    Before any trace, or on other hardware: --verifier and --hardware as predict takes them.
    """
    prepare_jax()
    from diffspec.optimizing.dspark import export_subject
    from diffspec.optimizing.exports import check_version, exports
    from diffspec.optimizing.load_policy import policy, policy_unmeasured
    from diffspec.report import policy_tables
    from diffspec.results import InputError

    for engine in export or []:
        check_version(engine, engine_version)
    if out_dir is not None and not export:
        raise InputError("--out-dir: got no --export; allowed: with the engines to write files for")
    contexts = [] if context_lengths is None else parse_loads(context_lengths, "--context-lengths")
    if contexts and asked.prompt_length is None:  # each schedule has the prompt that its context length leaves
        asked = dataclasses.replace(asked, prompt_length=contexts[0])
    deployment, unmeasured = subject.find(asked, max_draft_length)
    loop, loads = "arrival_rate", None
    if asked.arrival_rate is not None or asked.concurrency is not None:
        loop, loads = asked.loads()
    prompt, output, notes = asked.lengths(deployment.measured)
    with progress_bar("policy") as progress:
        choose = partial(policy, deployment) if unmeasured is None else partial(policy_unmeasured, unmeasured)
        answer = choose(
            loads=loads,
            loop=loop,
            prompt_length=prompt,
            output_length=output,
            context_lengths=contexts,
            max_draft_length=max_draft_length,
            slo=slo or [],
            objective=objective,
            risk=risk,
            forbid_zero=forbid_zero,
            min_gain=min_gain,
            min_width=min_width,
            hysteresis=hysteresis,
            acceptance=asked.acceptance_model(None),
            max_batch_size=asked.max_batch_size,
            max_batched_tokens=asked.max_batched_tokens,
            capture_sizes=parse_capture_sizes(capture_sizes),
            **asked.details(),
            drafter_params=asked.drafter_params,
            progress=progress,
        )
    made = []
    if export and answer["contexts"]:
        made = exports(export, answer, export_subject(deployment, asked.drafter_params), engine_version)
    answer["exports"] = [one._asdict() for one in made]
    note(notes)
    note(answer["warnings"], "warning")
    files: dict[Path, str | bytes] = {}
    if out_dir is not None:
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out-dir: {out_dir} cannot be made: {error.strerror or error}") from None
        files |= {out_dir / one.file: one.text for one in made}
    if plot is not None and answer["contexts"]:
        from diffspec.report import figures, policy_figures

        files[plot] = figures.picture(policy_figures.load_policy(answer), plot)
    show = partial(policy_tables.load_policy, with_files=out_dir is None)
    deliver(answer, show, as_json=as_json, out=out, files=files, inputs=subject.inputs)
    if answer["outcome"] != "successful":
        raise typer.Exit(1)
