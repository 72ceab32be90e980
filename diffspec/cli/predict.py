"""`diffspec predict`: one operating point."""

from pathlib import Path
from typing import Annotated, Any

import typer

from diffspec.cli.options import (
    AsJson,
    Drafter,
    DrafterKind,
    DraftLength,
    Hardware,
    Out,
    TensorParallel,
    Verifier,
    WorkloadOptions,
    read_model,
    read_pair,
    with_workload,
)
from diffspec.cli.output import deliver, note
from diffspec.cli.prepare import prepare_jax


@with_workload
def command(
    asked: WorkloadOptions,
    draft_length: DraftLength,
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL.JSON]", help="A model that 'diffspec fit' wrote.")
    ] = None,
    verifier: Verifier = None,
    drafter: Drafter = None,
    hardware: Hardware = None,
    tensor_parallel: TensorParallel = None,
    drafter_kind: DrafterKind = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Predict latency, throughput and where the time goes at one load. Exit code 1 if it saturates or does not fit.

    Example: diffspec predict model.json --arrival-rate 3 --prompt-length 64 --output-length 64 --draft-length 2

    Before any trace: diffspec predict --verifier config.json --drafter-kind head --hardware h200 --arrival-rate 3
    --prompt-length 512 --output-length 256 --draft-length 2 --acceptance-rate 0.7

    On other hardware than the fit's: diffspec predict model.json --hardware h200 ...
    """
    from diffspec.results import InputError

    if (model is None) == (verifier is None):
        got = "neither" if model is None else "both"
        raise InputError(
            f"MODEL.JSON or --verifier: got {got}; allowed: a fitted model, or --verifier config.json --hardware NAME"
        )
    if model is not None and (drafter is not None or drafter_kind is not None):
        raise InputError("--drafter and --drafter-kind go with --verifier: a fitted model has its own drafter")
    if model is not None and hardware is None and tensor_parallel is not None:
        raise InputError("--tensor-parallel needs --hardware: which device the model is to be transferred to")
    prepare_jax()
    from diffspec.report import tables

    if verifier is not None:
        answer, notes = _unmeasured(asked, draft_length, verifier, drafter, hardware, tensor_parallel, drafter_kind)
    else:
        assert model is not None
        answer, notes = _measured(asked, draft_length, model, hardware, tensor_parallel)
    note(notes)
    note(answer["warnings"], "warning")
    inputs = tuple(path for path in (model, verifier, drafter) if path is not None)
    deliver(answer, tables.prediction, as_json=as_json, out=out, inputs=inputs)
    if answer["outcome"] in ("saturated", "unconverged", "does_not_fit"):
        raise typer.Exit(1)


def _measured(asked, draft_length, model, hardware, tensor_parallel) -> tuple[dict[str, Any], list[str]]:
    deployment = read_model(model).deployment(asked.deployment)
    workload, notes = asked.workload(deployment)
    if hardware is None:
        from diffspec.analysis.answers import predict_answer

        return predict_answer(deployment, workload, asked.configuration(deployment, draft_length)), notes
    from diffspec.analysis.before_traces import predict_transferred
    from diffspec.hardware import accelerator
    from diffspec.results import InputError

    if asked.max_batched_tokens is not None:
        raise InputError("--max-batched-tokens: allowed on the hardware of the fit, without --hardware")
    answer = predict_transferred(
        deployment,
        workload,
        draft_length,
        accelerator(hardware),
        tensor_parallel=tensor_parallel,
        acceptance=asked.acceptance_model(draft_length),
        max_batch_size=asked.max_batch_size,
    )
    return answer, notes


def _unmeasured(
    asked, draft_length, verifier, drafter, hardware, tensor_parallel, drafter_kind
) -> tuple[dict[str, Any], list[str]]:
    from diffspec.analysis.before_traces import predict_before_traces
    from diffspec.fitting.principles import unmeasured_deployment
    from diffspec.resources import memory_plan
    from diffspec.results import InputError

    for name, given in (
        ("--deployment", asked.deployment),
        ("--drafter-params", asked.drafter_params),
        ("--max-batched-tokens", asked.max_batched_tokens),
    ):
        if given is not None:
            raise InputError(f"{name} goes with a fitted model, not with --verifier")
    for name, given in (("--prompt-length", asked.prompt_length), ("--output-length", asked.output_length)):
        if given is None:
            raise InputError(f"{name} is needed: no trace tells it")
    pair = read_pair(
        *(verifier, drafter, hardware, tensor_parallel, drafter_kind),
        prompt_length=asked.prompt_length,
        output_length=asked.output_length,
    )
    workload, notes = asked.workload(unmeasured_deployment(pair, memory_plan(pair)))
    answer = predict_before_traces(
        pair,
        workload,
        draft_length,
        acceptance=asked.acceptance_model(draft_length),
        max_batch_size=asked.max_batch_size,
    )
    return answer, notes
