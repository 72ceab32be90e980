"""What a question is about: a fitted model, the same on other hardware, or a pair of models before any trace."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffspec.cli.options import WorkloadOptions, read_model

if TYPE_CHECKING:
    from diffspec.analysis.before_traces import Unmeasured
    from diffspec.first_principles import FirstPrinciples
    from diffspec.fitting.deployment import FittedDeployment

_HARDWARE = "Before any trace, or on other hardware"
Verifier = Annotated[
    Path | None,
    typer.Option(
        "--verifier", metavar="CONFIG.JSON", rich_help_panel=_HARDWARE, help="The model's Hugging Face config.json."
    ),
]
Drafter = Annotated[
    Path | None,
    typer.Option(
        "--drafter", metavar="CONFIG.JSON", rich_help_panel=_HARDWARE, help="The drafter's, where it has one."
    ),
]
Hardware = Annotated[
    str | None,
    typer.Option("--hardware", metavar="NAME", rich_help_panel=_HARDWARE, help="Such as h200; '?' lists the presets."),
]
TensorParallel = Annotated[
    int | None,
    typer.Option("--tensor-parallel", metavar="N", rich_help_panel=_HARDWARE, help="Devices that share the weights."),
]
DrafterKind = Annotated[
    str | None,
    typer.Option(
        "--drafter-kind",
        metavar="KIND",
        rich_help_panel=_HARDWARE,
        help="model, head (or eagle, mtp), block (one pass), ngram (or suffix), none; default: model with --drafter.",
    ),
]
_RUNS = "How the drafter runs"


def _runs(name: str, metavar: str, text: str):
    return typer.Option(name, metavar=metavar, rich_help_panel=_RUNS, help=text)


@dataclasses.dataclass(frozen=True)
class SubjectOptions:
    """The options that say which server is meant; see :func:`diffspec.cli.options.with_options`."""

    model: Annotated[Path | None, typer.Argument(metavar="[MODEL.JSON]", help="A model that 'diffspec fit' wrote.")] = (
        None
    )
    verifier: Verifier = None
    drafter: Drafter = None
    hardware: Hardware = None
    tensor_parallel: TensorParallel = None
    drafter_kind: DrafterKind = None
    draft_probability: Annotated[
        float | None,
        _runs("--draft-probability", "P", "Share of steps that are drafted for, 0 to 1: an n-gram drafter abstains."),
    ] = None
    drafter_window: Annotated[
        float | None, _runs("--drafter-window", "N", "Cached tokens of a sequence that the drafter attends to.")
    ] = None
    draft_overlap: Annotated[
        float | None, _runs("--draft-overlap", "S", "Share of drafts made while the verifier verifies, 0 to 1.")
    ] = None
    drafter_hardware: Annotated[
        str | None, _runs("--drafter-hardware", "NAME", "A device of the drafter's own; the same names.")
    ] = None
    transfer_latency: Annotated[
        float | None, _runs("--transfer-latency", "S", "Seconds there and back between both devices, each step.")
    ] = None

    def check(self) -> None:
        """Raise :class:`InputError` unless a model or a verifier is given, with options that go with it."""
        from diffspec.results import InputError

        if (self.model is None) == (self.verifier is None):
            got = "neither" if self.model is None else "both"
            raise InputError(
                f"MODEL.JSON or --verifier: got {got}; allowed: a fitted model, or --verifier config.json "
                "--hardware NAME"
            )
        if self.model is not None and (self.drafter is not None or self.drafter_kind is not None):
            raise InputError("--drafter and --drafter-kind go with --verifier: a fitted model has its own drafter")
        for name in ("drafter_window", "draft_overlap", "drafter_hardware", "transfer_latency"):
            if self.model is not None and getattr(self, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} goes with --verifier: a fitted model has its own drafter")
        if self.model is not None and self.hardware is None and self.tensor_parallel is not None:
            raise InputError("--tensor-parallel needs --hardware: which device the model is to be transferred to")

    def find(self, asked: WorkloadOptions, draft_length: float) -> "tuple[FittedDeployment, Unmeasured | None]":
        """The deployment, and what is told of it where it was not measured; ``draft_length``: the longest asked for."""
        from diffspec.results import InputError
        from diffspec.workload import check_range

        self.check()
        if self.verifier is not None:
            from diffspec.analysis.before_traces import before_traces, check_drafting

            for name, given in (("--deployment", asked.deployment), ("--drafter-params", asked.drafter_params)):
                if given is not None:
                    raise InputError(f"{name} goes with a fitted model, not with --verifier")
            prompt, output, _ = asked.lengths({})
            pair = read_pair(
                *(self.verifier, self.drafter, self.hardware, self.tensor_parallel, self.drafter_kind),
                prompt_length=prompt,
                output_length=output,
                draft_probability=self.draft_probability,
                drafter_window=self.drafter_window,
                draft_overlap=self.draft_overlap,
                drafter_hardware=self.drafter_hardware,
                transfer_latency=self.transfer_latency,
            )
            one = asked.tokens_per_step is not None
            check_drafting(pair, draft_length, asked.acceptance_model(draft_length if one else None))
            subject = before_traces(pair, asked.max_batched_tokens)
            return subject.deployment, subject
        assert self.model is not None
        deployment = read_model(self.model).deployment(asked.deployment)
        if self.draft_probability is not None:
            check_range("--draft-probability", self.draft_probability, 0, 1, low_open=False, unit="(share of steps)")
            defaults = deployment.defaults | {"draft_probability": self.draft_probability}
            deployment = dataclasses.replace(deployment, defaults=defaults)
        if self.hardware is None:
            return deployment, None
        from diffspec.analysis.before_traces import moved
        from diffspec.hardware import accelerator

        subject = moved(deployment, accelerator(self.hardware), self.tensor_parallel, asked.max_batched_tokens)
        return subject.deployment, subject

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files that are read, and must not be written."""
        return tuple(path for path in (self.model, self.verifier, self.drafter) if path is not None)


def read_pair(
    verifier: Path,
    drafter: Path | None,
    hardware: str | None,
    tensor_parallel: int | None,
    drafter_kind: str | None,
    *,
    drafter_hardware: str | None = None,
    **numbers: float | None,
) -> "FirstPrinciples":
    """Verifier, drafter and hardware as asked; of ``numbers`` (lengths, how the drafter runs) those that are known."""
    from diffspec.architecture import read_architecture
    from diffspec.first_principles import FirstPrinciples
    from diffspec.hardware import PRESETS, accelerator
    from diffspec.results import InputError

    if hardware is None:
        raise InputError(f"--hardware is missing; allowed: {', '.join(PRESETS)}")
    return FirstPrinciples(
        verifier=read_architecture(verifier),
        hardware=accelerator(hardware),
        drafter=None if drafter is None else read_architecture(drafter),
        drafter_kind=drafter_kind or "",
        tensor_parallel=1 if tensor_parallel is None else tensor_parallel,
        drafter_hardware=None if drafter_hardware is None else accelerator(drafter_hardware),
        **{name: float(value) for name, value in numbers.items() if value is not None},
    )
