"""Options that several commands share, each defined once: the workload, the model, the form of the answer."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from diffspec.acceptance import AbstractAcceptance
    from diffspec.configuration import Configuration
    from diffspec.fitting.deployment import FittedDeployment, FittedModel
    from diffspec.workload import Workload

MOST_LOADS = 1000


def read_columns(identity: Path | None, assignments: list[str] | None) -> dict[str, Any]:
    """Columns that ``--identity`` and ``--set`` give to every row."""
    from diffspec.results import InputError
    from diffspec.traces.gather import read_identity

    try:
        text = None if identity is None else identity.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{identity}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return read_identity(text, assignments or [])


ModelPath = Annotated[Path, typer.Argument(metavar="MODEL.JSON", help="A model that 'diffspec fit' wrote.")]
TracePaths = Annotated[
    list[Path],
    typer.Argument(metavar="TRACE...", help="Tables (CSV, Parquet) or 'vllm bench serve' JSON, files or folders."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout (times in seconds).")]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Also write the answer to FILE, as JSON.")]
PlotPath = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Also draw it to FILE: SVG if it ends so, else PNG.")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A column for every row, such as draft_length=4; repeatable."),
]
Identity = Annotated[
    Path | None, typer.Option("--identity", metavar="FILE.YAML", help="Columns for every row, as a YAML mapping.")
]
AllRows = Annotated[bool, typer.Option("--all-rows", help="Use rows that are not stationary too.")]
DraftLength = Annotated[
    float, typer.Option("--draft-length", metavar="K", help="Drafted tokens per step; 0 for no speculation.")
]
MaxDraftLength = Annotated[int, typer.Option("--max-draft-length", metavar="K", help="Longest draft to consider.")]
Objective = Annotated[str, typer.Option("--objective", metavar="METRIC", help="What to make small.")]
CostPerHour = Annotated[
    str | None,
    typer.Option(
        "--cost-per-hour",
        metavar="X|FILE.YAML",
        help="Price of a device, or a catalogue: {h100: {cost_per_hour: 2.5}, ...}.",
    ),
]
CaptureSizes = Annotated[
    str | None,
    typer.Option(
        "--capture-sizes",
        metavar="1,2,4,8",
        help="Token counts that the engine pads a step to (CUDA graphs), to score choices on; 'vllm': its own.",
    ),
]

_LOAD, _ACCEPTANCE, _SERVER = "Workload (one load is needed)", "Acceptance (at most one)", "Server"


def _option(name: str, metavar: str, panel: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text, rich_help_panel=panel)


@dataclasses.dataclass(frozen=True)
class WorkloadOptions:
    """The options that say what is asked: one load, lengths, acceptance and caps; see :func:`with_options`."""

    arrival_rate: Annotated[
        str | None, _option("--arrival-rate", "X", _LOAD, "Open loop: mean arrivals per second, req/s.")
    ] = None
    concurrency: Annotated[
        str | None, _option("--concurrency", "N", _LOAD, "Closed loop: requests kept in flight.")
    ] = None
    prompt_length: Annotated[
        float | None,
        _option("--prompt-length", "P", _LOAD, "Mean prompt tokens; the measured ones if all rows had the same."),
    ] = None
    output_length: Annotated[
        float | None,
        _option("--output-length", "G", _LOAD, "Mean output tokens; the measured ones if all rows had the same."),
    ] = None
    output_scv: Annotated[
        float | None,
        _option("--output-scv", "C2", _LOAD, "Squared coefficient of variation of output lengths; 0: all alike."),
    ] = None
    prefix_hit_rate: Annotated[
        float | None,
        _option("--prefix-hit-rate", "H", _LOAD, "Share of every prompt that the prefix cache answers, 0 to 1."),
    ] = None
    acceptance_rate: Annotated[
        float | None,
        _option(
            "--acceptance-rate", "A", _ACCEPTANCE, "P(next draft token accepted, given all before it were), 0 to 1."
        ),
    ] = None
    tokens_per_step: Annotated[
        float | None,
        _option("--tokens-per-step", "E", _ACCEPTANCE, "Tokens per step at this draft length, bonus included."),
    ] = None
    position_acceptance: Annotated[
        str | None,
        _option("--position-acceptance", '"A;B;C"', _ACCEPTANCE, "The acceptance rate of each draft position."),
    ] = None
    acceptance: Annotated[
        Path | None,
        _option("--acceptance", "CURVE.JSON", _ACCEPTANCE, "A curve that 'diffspec acceptance' wrote, or a profile."),
    ] = None
    max_batch_size: Annotated[
        float | None, _option("--max-batch-size", "B", _SERVER, "Most requests in one step; default: as measured.")
    ] = None
    max_batched_tokens: Annotated[
        float | None,
        _option("--max-batched-tokens", "T", _SERVER, "Token budget of a step, which splits prompts; default: none."),
    ] = None
    deployment: Annotated[
        str | None, _option("--deployment", "D", _SERVER, "Which deployment, where the model has several.")
    ] = None
    drafter_params: Annotated[
        float | None, _option("--drafter-params", "N", _SERVER, "Parameters of the drafter, if not the measured one.")
    ] = None

    def loads(self) -> tuple[str, list[float]]:
        """Loop kind ("arrival_rate" or "concurrency") and its loads; ranges are inclusive ``first:last:step``."""
        from diffspec.results import InputError

        given = [name for name in ("arrival_rate", "concurrency") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(
                f"load: got {'both' if given else 'neither'}; allowed: exactly one of --arrival-rate (open loop) and "
                "--concurrency (closed loop)"
            )
        return given[0], parse_loads(getattr(self, given[0]), f"--{given[0].replace('_', '-')}")

    def workload(self, deployment: "FittedDeployment") -> "tuple[Workload, list[str]]":
        """The workload asked for, with a note for each length that was not given."""
        from diffspec.results import InputError
        from diffspec.workload import Workload

        loop, loads = self.loads()
        if len(loads) != 1:
            raise InputError(
                f"--{loop.replace('_', '-')}: got {len(loads)} loads; allowed: one number (optimize takes ranges)"
            )
        prompt, output, notes = self.lengths(deployment.measured)
        return Workload(prompt_length=prompt, output_length=output, **{loop: loads[0]}, **self.details()), notes

    def details(self) -> dict[str, Any]:
        """Fields of the workload beside load and lengths, those that were given."""
        fields = {name: getattr(self, name) for name in ("output_scv", "prefix_hit_rate")}
        return {name: value for name, value in fields.items() if value is not None}

    def lengths(self, known: Mapping[str, Any]) -> tuple[float, float, list[str]]:
        """(prompt_length, output_length) as given, else the only ``known`` (measured) ones, with notes that say so."""
        from diffspec.results import InputError
        from diffspec.workload import Workload

        found, notes = [], []
        for name in ("prompt_length", "output_length"):
            value, measured = getattr(self, name), known.get(name)
            option = f"--{name.replace('_', '-')}"
            if value is None:
                if not measured:
                    raise InputError(f"{option} is needed: no trace tells it")
                if measured[0] != measured[1]:
                    span = f"{measured[0]:g} to {measured[1]:g}"
                    raise InputError(f"{option} is needed: the measured ones differ ({span} tok)")
                value = float(measured[0])
                notes.append(f"{option} not given: {value:g} tok, as in every measured row")
            found.append(value)
        Workload(prompt_length=found[0], output_length=found[1], arrival_rate=1.0)  # checks their ranges
        return found[0], found[1], notes

    def acceptance_model(self, draft_length: float | None) -> "AbstractAcceptance | None":
        """The acceptance asked for, None for the deployment's own; without a draft length no --tokens-per-step."""
        import jax.numpy as jnp

        from diffspec.acceptance import ConstantAcceptance, PositionAcceptance, acceptance_from_tokens_per_step
        from diffspec.results import InputError

        names = ("acceptance_rate", "tokens_per_step", "position_acceptance", "acceptance")
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"acceptance: got {' and '.join(given)}; allowed: at most one of them")
        if self.acceptance_rate is not None:
            return ConstantAcceptance(self.acceptance_rate)
        if self.acceptance is not None:
            return PositionAcceptance(jnp.asarray(read_curve(self.acceptance), dtype=float))
        if self.position_acceptance is not None:
            rates = _numbers(self.position_acceptance.replace(",", ";").split(";"), "--position-acceptance")
            return PositionAcceptance(jnp.asarray(rates, dtype=float))
        if self.tokens_per_step is None:
            return None
        if draft_length is None:
            raise InputError(
                "--tokens-per-step holds at one draft length, and this command compares several; "
                "give --acceptance-rate or --position-acceptance"
            )
        if draft_length == 0:
            raise InputError(
                f"--tokens-per-step: got {self.tokens_per_step:g} with --draft-length 0; allowed: a draft length of 1 "
                "or more"
            )
        return acceptance_from_tokens_per_step(self.tokens_per_step, draft_length)

    def configuration(
        self, deployment: "FittedDeployment", draft_length: float, *, one_length: bool = True
    ) -> "Configuration":
        """The deployment's configuration at this draft length, with what was asked for in place of its own; where it is
        not the ``one_length`` that is asked about, an acceptance that holds at one draft length is refused."""
        return deployment.configuration(
            draft_length,
            acceptance=self.acceptance_model(draft_length if one_length else None),
            max_batch_size=self.max_batch_size,
            max_batched_tokens=self.max_batched_tokens,
            drafter_params=self.drafter_params,
        )


def with_options(command: Callable) -> Callable:
    """Give a command, for each parameter annotated with a dataclass of options, those options in the command line."""
    signature = inspect.signature(command)
    parameters, groups = [], {}
    for parameter in signature.parameters.values():
        if not dataclasses.is_dataclass(parameter.annotation):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = parameter.annotation
        for field in dataclasses.fields(parameter.annotation):
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
                )
            )

    @wraps(command)
    def run(**values):
        made = {
            name: options(**{field.name: values.pop(field.name) for field in dataclasses.fields(options)})
            for name, options in groups.items()
        }
        return command(**made, **values)

    del run.__wrapped__  # else its signature and annotations would be read instead
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def parse_loads(text: str, option: str) -> list[float]:
    """Loads from ``2``, ``1,2,4`` or the inclusive range ``first:last:step``.

    >>> parse_loads("0.5:2:0.5", "--arrival-rate")
    [0.5, 1.0, 1.5, 2.0]
    """
    from diffspec.results import InputError

    if ":" not in text:
        return _numbers(text.split(","), option)
    parts = _numbers(text.split(":"), option)
    if len(parts) != 3 or parts[2] <= 0 or parts[1] < parts[0]:
        raise InputError(f"{option}: got {text!r}; allowed: first:last:step with first <= last and step > 0")
    first, last, step = parts
    count = math.floor((last - first) / step + 1e-9) + 1
    if count > MOST_LOADS:
        raise InputError(f"{option}: got {text!r}, {count} loads; allowed: up to {MOST_LOADS}; take a larger step")
    return [round(first + index * step, 12) for index in range(count)]


def _numbers(texts: list[str], option: str) -> list[float]:
    from diffspec.results import InputError

    values = []
    for text in texts:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{option}: got {text.strip()!r}; allowed: a finite number")
        values.append(value)
    return values


def read_curve(path: Path) -> tuple[float, ...]:
    """Conditional acceptance a_1, a_2, ... from a speculation profile, as `diffspec acceptance` writes it."""
    from diffspec.traces.readers import speculation_profile
    from diffspec.traces.source import Source

    source = Source(path)
    if not speculation_profile.recognises(source):
        from diffspec.results import InputError

        raise InputError(
            f"{path}: no speculation profile; make one with 'diffspec acceptance FILE... --out {path.name}'"
        )
    return speculation_profile.read(source).conditional


def read_model(path: Path) -> "FittedModel":
    """The model in a file. :class:`InputError` when it is missing, unreadable or no model of this version."""
    from diffspec.fitting.deployment import FittedModel
    from diffspec.results import InputError

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; make a model with 'diffspec fit TRACE --out {path}'") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a diffspec model (not UTF-8 text); make one with 'diffspec fit'") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        return FittedModel.from_json(text, source=str(path))
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None


def parse_capture_sizes(text: str | None) -> tuple[int, ...] | None:
    """Token counts of ``--capture-sizes``: whole numbers joined by commas, or ``vllm`` for those of vLLM.

    >>> parse_capture_sizes("1,2,4")
    (1, 2, 4)
    """
    from diffspec.results import InputError
    from diffspec.staircase import CAPTURE_SIZES

    if text is None or text == "vllm":
        return None if text is None else CAPTURE_SIZES
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"--capture-sizes: got {text!r}; allowed: whole numbers joined by commas, such as 1,2,4,8, or vllm"
        ) from None


def read_prices(text: str | None) -> tuple[Any, tuple[Path, ...]]:
    """(price or catalogue, files read) of ``--cost-per-hour``: a number, or a YAML file."""
    from diffspec.results import InputError

    if text is None:
        return None, ()
    try:
        return float(text), ()
    except ValueError:
        pass
    import yaml

    path = Path(text)
    try:
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--cost-per-hour: got {text!r}; allowed: a number, or a YAML file ({reason})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(listed, dict):
        raise InputError(f"{path}: got no mapping; allowed: catalogue: {{h100: {{cost_per_hour: 2.5}}}}")
    return listed, (path,)
