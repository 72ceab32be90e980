"""`diffspec design`: which benchmark runs to make next."""

from pathlib import Path
from typing import Annotated

import typer

from diffspec.cli.options import AsJson, ModelPath, Out, read_curve, read_model
from diffspec.cli.output import deliver, note, progress_bar
from diffspec.cli.prepare import prepare_jax

_ASKED, _RUNS = "What is asked (default: as measured)", "Which runs are allowed"


def _span(name: str, what: str):
    return typer.Option(name, metavar="LOW:HIGH", help=what, rich_help_panel=_ASKED)


def command(
    model: ModelPath,
    budget: Annotated[int, typer.Option("--budget", metavar="N", help="How many runs.")] = 6,
    criterion: Annotated[
        str,
        typer.Option(
            "--criterion", help="What is to become surer: predictions, parameters, or decision (the best draft length)."
        ),
    ] = "predictions",
    arrival_rate: Annotated[str | None, _span("--arrival-rate", "Open loop, req/s.")] = None,
    concurrency: Annotated[str | None, _span("--concurrency", "Closed loop, requests in flight.")] = None,
    draft_length: Annotated[str | None, _span("--draft-length", "Drafted tokens per step.")] = None,
    prompt_length: Annotated[str | None, _span("--prompt-length", "Mean prompt tokens.")] = None,
    output_length: Annotated[str | None, _span("--output-length", "Mean output tokens.")] = None,
    max_draft_length: Annotated[
        int | None,
        typer.Option(
            "--max-draft-length",
            metavar="K",
            rich_help_panel=_RUNS,
            help="Longest draft to ask and run, measured before or not.",
        ),
    ] = None,
    max_rate: Annotated[
        float | None,
        typer.Option("--max-rate", metavar="R", rich_help_panel=_RUNS, help="No run above this many req/s."),
    ] = None,
    max_utilization: Annotated[
        float,
        typer.Option(
            "--max-utilization", metavar="U", rich_help_panel=_RUNS, help="No open loop above this share of capacity."
        ),
    ] = 0.8,
    requests: Annotated[
        int, typer.Option("--requests", metavar="N", rich_help_panel=_RUNS, help="Requests that each run measures.")
    ] = 200,
    acceptance_rate: Annotated[
        float | None,
        typer.Option("--acceptance-rate", metavar="A", help="In place of the measured acceptance, 0 to 1."),
    ] = None,
    acceptance: Annotated[
        Path | None,
        typer.Option("--acceptance", metavar="CURVE.JSON", help="The same, a curve that 'diffspec acceptance' wrote."),
    ] = None,
    deployment: Annotated[
        str | None, typer.Option("--deployment", metavar="D", help="Which deployment, where the model has several.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan", metavar="FILE.YAML", help="Write a 'diffspec collect' plan; FILE-k4.yaml for each draft length."
        ),
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option("--sweep", metavar="FOLDER", help="Write parameter files for 'vllm bench sweep serve'."),
    ] = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Choose the benchmark runs that most narrow what a fit leaves open, the most telling one first.

    Example: diffspec design model.json --budget 6 --max-draft-length 8 --plan plan.yaml
    """
    prepare_jax()
    import jax.numpy as jnp

    from diffspec.acceptance import ConstantAcceptance, PositionAcceptance
    from diffspec.analysis.design import design
    from diffspec.analysis.design_files import plan_files, sweep_files
    from diffspec.report import fitting_tables
    from diffspec.results import InputError

    given = {
        "arrival_rate": arrival_rate,
        "concurrency": concurrency,
        "draft_length": draft_length,
        "prompt_length": prompt_length,
        "output_length": output_length,
    }
    if acceptance is not None and acceptance_rate is not None:
        raise InputError("acceptance: got --acceptance-rate and --acceptance; allowed: at most one of them")
    own = None if acceptance_rate is None else ConstantAcceptance(acceptance_rate)
    if acceptance is not None:
        own = PositionAcceptance(jnp.asarray(read_curve(acceptance), dtype=float))
    if sweep is not None and not sweep.is_dir():
        raise InputError(f"--sweep {sweep}: no such folder; create it first")
    with progress_bar("design") as progress:
        answer = design(
            read_model(model).deployment(deployment),
            budget,
            criterion=criterion,
            asked={name: _read_span(text, name) for name, text in given.items() if text is not None},
            max_draft_length=max_draft_length,
            max_rate=max_rate,
            max_utilization=max_utilization,
            requests=requests,
            acceptance=own,
            progress=progress,
        )
    note(answer["warnings"], "warning")
    files: dict[Path, str | bytes] = {}
    if plan is not None:
        files |= {plan.with_name(name): text for name, text in plan_files(answer["plan"], plan.name).items()}
    if sweep is not None:
        files |= {sweep / name: text for name, text in sweep_files(answer["sweep"]).items()}
    deliver(answer, fitting_tables.next_runs, as_json=as_json, out=out, files=files, inputs=(model,))


def _read_span(text: str, name: str) -> tuple[float, float]:
    from diffspec.results import InputError

    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise InputError(f"--{name.replace('_', '-')}: got {text!r}; allowed: LOW:HIGH, such as 1:4, or one number")
    return numbers[0], numbers[-1]
