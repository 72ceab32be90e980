"""`diffspec demo`: the whole way on the packaged measurements."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from diffspec.cli.options import AsJson
from diffspec.cli.output import deliver, note, progress_bar
from diffspec.cli.prepare import prepare_jax

TRACE = "vllm_cpu_quiet.csv"
HOLDOUT = "arrival_rate==3 or concurrency==8"
STEP_TIME = "auto"
ACCEPTANCE = 0.75
LONGEST = 4
LIMIT = "ttft_mean<0.5"


def command(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the model and the plots.")] = Path(
        "diffspec-demo"
    ),
    as_json: AsJson = False,
) -> None:
    """Fit, evaluate, explain and optimise on packaged measurements: vLLM on a CPU with speculative decoding.

    Example: diffspec demo --out diffspec-demo
    """
    prepare_jax()
    from diffspec.fitting.fit import fit
    from diffspec.report import figures
    from diffspec.results import InputError
    from diffspec.traces import read_trace

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made: {error.strerror or error}") from None
    trace = read_trace(packaged_trace())
    note([f"{len(trace)} real measurements of vLLM 0.32.0 on one CPU core: shapes to learn from, not GPU numbers"])
    with progress_bar("demo") as progress:
        held = fit(
            trace,
            step_time=STEP_TIME,
            holdout=HOLDOUT,
            progress=lambda what, share: progress(f"1/3 {what}", 0.6 * share),
        )
        form = held.deployment().form
        whole = fit(trace, step_time=form, progress=lambda what, share: progress(f"2/3 {what}", 0.6 + 0.25 * share))
        progress("3/3 policy and figures", 0.85)
        policy = _policy(whole.deployment())
        pictures = _figures(held.deployment(), whole.deployment(), trace, policy)
    note(policy["warnings"], "warning")
    files: dict[Path, str | bytes] = {out / "model.json": whole.to_json()}
    files |= {out / f"{name}.png": figures.png(figure) for name, figure in pictures.items()}
    answer = {
        "trace": TRACE,
        "rows": len(trace),
        "holdout": held.deployment().quality["holdout"],
        "held_out_fit": held.deployment().to_dict(),
        "final_fit": whole.deployment().to_dict(),
        "policy_acceptance_rate": ACCEPTANCE,
        "policy": policy,
        "files": [str(path) for path in files],
    }
    deliver(answer, _show, as_json=as_json, files=files)


def packaged_trace() -> Path:
    """The demonstration's table: inside the installed package, or in data/ of the repository it is run from."""
    from importlib.resources import files

    from diffspec.results import InputError

    package = Path(str(files("diffspec")))
    places = (package / "packaged" / TRACE, package.parent / "data" / TRACE)
    for place in places:
        if place.is_file():
            return place
    raise InputError(f"the packaged measurements {TRACE} are missing; install diffspec again")


def _policy(deployment) -> dict[str, Any]:
    from diffspec.acceptance import ConstantAcceptance
    from diffspec.optimizing.optimize import optimize

    return optimize(
        deployment,
        loads=[0.5 * step for step in range(1, 9)],
        loop="arrival_rate",
        prompt_length=64.0,
        output_length=64.0,
        max_draft_length=LONGEST,
        slo=[LIMIT],
        acceptance=ConstantAcceptance(ACCEPTANCE),
    )


def _figures(held, whole, trace, policy) -> dict[str, Any]:
    import numpy as np

    from diffspec.report import figures, measured
    from diffspec.report.curves import draw_curves

    parts = measured.fitted_and_held_out(held, trace, HOLDOUT)
    lengths = held.measured["draft_lengths"]
    rates, users = np.linspace(0.05, 6.5, 130), np.linspace(1.0, 18.0, 69)

    def curves_of(deployment):
        return draw_curves(
            deployment, lengths, prompt_length=64.0, output_length=64.0, arrival_rates=rates, concurrencies=users
        )

    curves, final = curves_of(held), curves_of(whole)["arrival_rate"]
    measured_to = {"arrival_rate": 4.0, "concurrency": 16.0}
    told = "vLLM on a CPU core, 64 tokens in and out; acceptance 0.6 at draft length 2, 0.9 at 4"
    return {
        "fit": figures.against_measured(parts, f"{held.form} step time against measurements"),
        "latency": figures.latency_curves(curves, parts, f"latency against load\n{told}", measured_to),
        "decomposition": figures.stages_by_load(final, [0, lengths[-1]], f"where the time goes\n{told}"),
        "speedup": figures.speedup_by_load(
            final, f"speedup against load\n{told}", _measured_speedup(trace), measured_to["arrival_rate"]
        ),
        "policy": figures.policy(policy, f"draft length by load at acceptance {ACCEPTANCE:g}, limit {LIMIT}"),
    }


def _measured_speedup(trace) -> dict[int, Any]:
    """Draft length -> (arrival rates, e2e_mean of the plain row over that of the speculative one)."""
    frame = trace.frame[trace.frame["arrival_rate"].notna()]
    plain = frame[frame["draft_length"] == 0].set_index("arrival_rate")["e2e_mean"]
    points = {}
    for k, rows in frame[frame["draft_length"] > 0].groupby("draft_length"):
        rates = rows["arrival_rate"].to_numpy(float)
        points[int(k)] = (rates, plain.loc[rates].to_numpy(float) / rows["e2e_mean"].to_numpy(float))
    return points


def _show(answer: dict[str, Any]) -> Iterator[Any]:
    from diffspec.report import tables

    held = answer["held_out_fit"]["quality"]
    yield tables.parameters(answer["final_fit"])
    title = f"1. errors with {answer['holdout']['rows']} rows held out ({HOLDOUT})"
    yield tables.errors({"fitted rows": held["metrics"], "held out": held["holdout"]["metrics"]}, title)
    yield f"2. the policy of the final fit, at acceptance {ACCEPTANCE:g} per position and {LIMIT} (loads in req/s):"
    yield from tables.policy(answer["policy"])
