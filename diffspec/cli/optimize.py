"""`diffspec optimize`: the draft length for each load."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from diffspec.cli import fleet
from diffspec.cli.experts import ExpertOptions, half
from diffspec.cli.joint import JointOptions
from diffspec.cli.options import (
    AsJson,
    CaptureSizes,
    CostPerHour,
    MaxDraftLength,
    Objective,
    Out,
    PlotPath,
    WorkloadOptions,
    parse_capture_sizes,
    read_prices,
    with_options,
)
from diffspec.cli.output import deliver, note, progress_bar
from diffspec.cli.prepare import prepare_jax
from diffspec.cli.subject import SubjectOptions


@with_options
def command(
    subject: SubjectOptions,
    asked: WorkloadOptions,
    joint: JointOptions,
    placing: ExpertOptions,
    max_draft_length: MaxDraftLength = 8,
    slo: Annotated[
        list[str] | None,
        typer.Option("--slo", metavar='"METRIC<X"', help="A limit in s, req/s or GB; repeat for more."),
    ] = None,
    objective: Objective = "e2e_mean",
    capture_sizes: CaptureSizes = None,
    risk: Annotated[
        float | None,
        typer.Option("--risk", metavar="Q", help="Choose by what this share of the draws does not exceed, say 0.9."),
    ] = None,
    cost_per_hour: CostPerHour = None,
    plot: PlotPath = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Choose the draft length for each load, within limits. Exit code 1 if no load has an answer.

    Loads are one number, a list 1,2,4 or an inclusive range first:last:step.

    Example: diffspec optimize model.json --arrival-rate 0.5:6:0.5 --max-draft-length 8 --slo "ttft_mean<0.5"

    Objectives and limits: ttft_mean, tpot_p95 and their like, throughput, energy and cost (of a million output tokens;
    cost with --cost-per-hour), utilization and memory (GB of a device with the batch at its cap; with --verifier and
    --hardware) as limits, and goodput: the requests per second that keep limits on single
    ones, such as --slo "ttft<0.5" --slo "tpot<0.03" --objective goodput.

    Before any trace, or on other hardware: --verifier and --hardware as predict takes them. With --classes, --drafters,
    --batch-caps or --replicas the drafter, the draft length of each class or the tree, the batch cap and how many
    replicas share the load are decided together at each load; capacity is an objective then, too.
    Of a folder of models (fit --fleet) the best draft length of each is found at once.
    With --experts it also places a mixture's experts on --expert-ranks, together with the draft length or with all
    that is decided.
    """
    if joint.template:
        joint.print_template()
        return
    prepare_jax()
    if subject.model is not None and subject.model.is_dir():
        given = {"--risk": risk, "--cost-per-hour": cost_per_hour, "--capture-sizes": capture_sizes, "--plot": plot}
        given |= {"--classes, --drafters, ...": joint.asked or None, "--deployment": asked.deployment}
        given |= {"--max-batch-size": asked.max_batch_size, "--drafter-params": asked.drafter_params}
        for options in (subject, placing):
            values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
            given |= {f"--{name.replace('_', '-')}": value or None for name, value in values.items() if name != "model"}
        question = {"max_draft_length": max_draft_length, "slo": slo or [], "objective": objective}
        answer, inputs = fleet.optimize_folder(subject.model, asked, given, question)
        note(answer["warnings"], "warning")
        from diffspec.report.policy_tables import fleet_policies

        deliver(answer, fleet_policies, as_json=as_json, out=out, inputs=inputs)
        if answer["outcome"] != "successful":
            raise typer.Exit(1)
        return
    from diffspec.optimizing.optimize import optimize, optimize_unmeasured
    from diffspec.report import expert_tables, tables

    deployment, unmeasured = subject.find(joint.with_mean_lengths(asked), max_draft_length)
    if joint.asked:
        apart = {"--capture-sizes": capture_sizes, "--drafter-params": asked.drafter_params}
        joint.refuse(apart)
        prices, listed = read_prices(cost_per_hour)
        question = {"max_draft_length": max_draft_length, "slo": slo or [], "objective": objective}
        question |= {"risk": risk, "cost_per_hour": prices}
        answer, notes, files = _jointly(deployment, unmeasured, asked, joint, placing, question)
        note(notes)
        note(answer["warnings"], "warning")
        if plot is not None:
            from diffspec.report import figures, joint_figures

            files[plot] = figures.picture(joint_figures.joint(answer), plot)
        inputs = subject.inputs + joint.inputs + placing.inputs + listed
        deliver(answer, _joint_tables, as_json=as_json, out=out, files=files, inputs=inputs)
        if answer["outcome"] != "successful":
            raise typer.Exit(1)
        return
    loop, loads = asked.loads()
    prompt, output, notes = asked.lengths(deployment.measured)
    acceptance = asked.acceptance_model(None)
    question = {
        "loads": loads,
        "loop": loop,
        "prompt_length": prompt,
        "output_length": output,
        "max_draft_length": max_draft_length,
        "slo": slo or [],
        "objective": objective,
        "acceptance": acceptance,
        "max_batch_size": asked.max_batch_size,
        "max_batched_tokens": asked.max_batched_tokens,
        "drafter_params": asked.drafter_params,
        **asked.details(),
    }
    prices, listed = read_prices(cost_per_hour)
    with progress_bar("optimize") as progress:
        share = 0.0 if placing.experts is None else 0.8
        deployment, unmeasured, placed = placing.place(
            deployment, unmeasured, **question, progress=half(progress, 0.0, share)
        )
        choose = partial(optimize, deployment) if unmeasured is None else partial(optimize_unmeasured, unmeasured)
        sizes, progress = parse_capture_sizes(capture_sizes), half(progress, share, 1.0)
        answer = choose(**question, risk=risk, capture_sizes=sizes, cost_per_hour=prices, progress=progress)
    if placed is not None:
        answer |= {"experts": placed, "warnings": answer["warnings"] + placed["warnings"]}
        if placed["outcome"] == "does_not_fit":
            answer["outcome"] = placed["outcome"]
    note(notes)
    note(answer["warnings"], "warning")
    files: dict[Path, str | bytes] = {**placing.files(placed)}
    if plot is not None:
        from diffspec.report import figures

        files[plot] = figures.picture(figures.policy(answer), plot)

    def show(told):
        yield from tables.policy(told)
        if "experts" in told:
            yield from expert_tables.placement(told["experts"])

    deliver(answer, show, as_json=as_json, out=out, files=files, inputs=subject.inputs + placing.inputs + listed)
    if answer["outcome"] != "successful":
        raise typer.Exit(1)


def _jointly(
    deployment,
    unmeasured,
    asked: WorkloadOptions,
    joint: JointOptions,
    placing: ExpertOptions,
    question: dict[str, Any],
) -> tuple[dict[str, Any], list[str], dict[Path, str | bytes]]:
    """(answer, notes, files) where more is decided than the draft length."""
    with progress_bar("optimize") as progress:
        share, mean = 0.0, {}
        if placing.experts is not None:
            share, mean = 0.6, joint.mean_question(deployment, asked, question["max_draft_length"])
        deployment, unmeasured, placed = placing.place(
            deployment, unmeasured, **mean, progress=half(progress, 0.0, share)
        )
        question["draws"] = None if unmeasured is None else unmeasured.models()
        question["placements"] = placing.candidates(deployment, placed)
        answer, notes = joint.decide(deployment, asked, half(progress, share, 1.0), **question)
    if placed is not None:
        from diffspec.optimizing.expert_balance import exported

        placed = exported(placed, answer["table"])
        answer |= {"experts": placed, "warnings": answer["warnings"] + placed["warnings"]}
    if unmeasured is not None:
        answer |= unmeasured.told()
    lost = (unmeasured is not None and not unmeasured.plan.fits) or (placed or {}).get("outcome") == "does_not_fit"
    if lost:
        empty: dict[str, Any] = {name: [] for name in ("table", "policy", "warnings")}
        empty |= dict.fromkeys(("optimality_gap", "infeasible", "intervals"))
        answer |= empty | {"outcome": "does_not_fit"}
    return answer, notes, {**placing.files(placed)}


def _joint_tables(told: dict[str, Any]) -> Iterator[Any]:
    from diffspec.report import expert_tables, joint_tables

    yield from joint_tables.joint(told)
    if "experts" in told:
        yield from expert_tables.placement(told["experts"])
