"""Options of `diffspec optimize` for several classes of requests, a catalogue of drafters, and replicas."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffspec.cli.options import WorkloadOptions, parse_loads, read_model

if TYPE_CHECKING:
    from diffspec.fitting.deployment import FittedDeployment

_PANEL = "Several classes, drafters, batch caps, replicas (decided together)"


def _option(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text, rich_help_panel=_PANEL)


@dataclasses.dataclass(frozen=True)
class JointOptions:
    """The options that make the decision a joint one; see :func:`diffspec.cli.options.with_options`."""

    classes: Annotated[
        Path | None, _option("--classes", "FILE.YAML", "Classes of requests that share the server; loads are of all.")
    ] = None
    drafters: Annotated[Path | None, _option("--drafters", "FILE.YAML", "A catalogue of drafters to choose from.")] = (
        None
    )
    batch_caps: Annotated[str | None, _option("--batch-caps", "16,32,64", "Batch caps to choose from.")] = None
    replicas: Annotated[str | None, _option("--replicas", "1,2,4", "How many replicas may share the load.")] = None
    template: Annotated[
        bool, typer.Option("--template", help="Print such files to start from, and exit.", rich_help_panel=_PANEL)
    ] = False

    @property
    def asked(self) -> bool:
        """True when one of them is given."""
        return any(value is not None for value in (self.classes, self.drafters, self.batch_caps, self.replicas))

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files that are read, and must not be written."""
        return tuple(path for path in (self.classes, self.drafters) if path is not None)

    def with_mean_lengths(self, asked: WorkloadOptions) -> WorkloadOptions:
        """The workload asked for with the mean lengths of the classes: what memory is planned for before any trace."""
        if self.classes is None or asked.prompt_length is not None or asked.output_length is not None:
            return asked
        from diffspec.optimizing.catalogue import mean_request, parse_classes

        prompt, output, _ = mean_request(parse_classes(_text(self.classes), str(self.classes)))
        return dataclasses.replace(asked, prompt_length=prompt, output_length=output)

    def refuse(self, others: dict[str, Any]) -> None:
        """Raise :class:`InputError` where one of these options is given too, which a joint decision does not take."""
        from diffspec.results import InputError

        given = [option for option, value in others.items() if value is not None]
        if given:
            raise InputError(
                f"got {', '.join(given)} with --classes, --drafters, --batch-caps or --replicas; allowed: one or the "
                "other (a catalogue has each drafter's size)"
            )

    def replica_counts(self) -> list[int]:
        """How many replicas to compare."""
        from diffspec.results import InputError

        if self.replicas is None:
            return [1]
        counts = parse_loads(self.replicas, "--replicas")
        if any(count != int(count) for count in counts):
            raise InputError(f"--replicas: got {self.replicas}; allowed: whole numbers, such as 1,2,4")
        return [int(count) for count in counts]

    def _loads(self, asked: WorkloadOptions) -> list[float]:
        from diffspec.results import InputError

        loop, loads = asked.loads()
        if loop != "arrival_rate":
            raise InputError(
                "--concurrency: got a closed loop; allowed with --classes, --drafters, --batch-caps, --replicas: "
                "--arrival-rate"
            )
        return loads

    def mean_question(
        self, deployment: "FittedDeployment", asked: WorkloadOptions, max_draft_length: int
    ) -> dict[str, Any]:
        """What a placement of experts is looked for: the mean request, at each load [req/s] that a replica may have."""
        from diffspec.optimizing.catalogue import mean_request, parse_classes

        loads = self._loads(asked)
        prompt, output, _ = self.with_mean_lengths(asked).lengths(deployment.measured)
        acceptance = asked.acceptance_model(None)
        if acceptance is None and self.classes is not None:
            _, _, acceptance = mean_request(parse_classes(_text(self.classes), str(self.classes)))
        return {
            "loads": sorted({load / count for load in loads for count in self.replica_counts()}),
            "prompt_length": prompt,
            "output_length": output,
            "max_draft_length": max_draft_length,
            "acceptance": acceptance,
            "max_batched_tokens": asked.max_batched_tokens,
        }

    def print_template(self) -> None:
        """Both files, commented, on stdout."""
        from diffspec.optimizing.catalogue import CLASSES_EXAMPLE, DRAFTERS_EXAMPLE

        print(f"# classes.yaml\n{CLASSES_EXAMPLE}---\n# drafters.yaml\n{DRAFTERS_EXAMPLE}", end="")

    def decide(
        self,
        deployment: "FittedDeployment",
        asked: WorkloadOptions,
        progress: Callable[[str, float], None],
        **question: Any,
    ) -> tuple[dict[str, Any], list[str]]:
        """The answer of :func:`diffspec.optimizing.joint.optimize_jointly`, and notes on what was not given."""
        from diffspec.optimizing.catalogue import RequestClass, parse_classes, parse_drafters
        from diffspec.optimizing.joint import optimize_jointly
        from diffspec.results import InputError

        loads = self._loads(asked)
        acceptance, notes = asked.acceptance_model(None), []
        if self.classes is None:
            prompt, output, notes = asked.lengths(deployment.measured)
            classes = (RequestClass("all", 1.0, prompt, output, acceptance=acceptance, **asked.details()),)
        else:
            if asked.prompt_length is not None or asked.output_length is not None or asked.details():
                raise InputError("--classes: lengths, --output-scv and --prefix-hit-rate are given in the file")
            classes = parse_classes(_text(self.classes), str(self.classes))
        drafters = ()
        if self.drafters is not None:
            folder = self.drafters.parent

            def read(path: str):
                model = read_model(folder / path)
                return model.deployment(asked.deployment if len(model.deployments) > 1 else None)

            drafters = parse_drafters(_text(self.drafters), str(self.drafters), read)
        caps = [] if self.batch_caps is None else parse_loads(self.batch_caps, "--batch-caps")
        replicas = self.replica_counts()
        if asked.max_batch_size is not None:
            if caps:
                raise InputError("batch cap: got --max-batch-size and --batch-caps; allowed: one of them")
            caps = [asked.max_batch_size]
        answer = optimize_jointly(
            deployment,
            loads=loads,
            classes=classes,
            drafters=drafters,
            batch_caps=caps,
            replicas=replicas,
            max_batched_tokens=asked.max_batched_tokens,
            acceptance=acceptance,
            progress=progress,
            **question,
        )
        return answer, notes


def _text(path: Path) -> str:
    from diffspec.results import InputError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
