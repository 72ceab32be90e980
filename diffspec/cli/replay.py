"""Options of `diffspec simulate` for what changes: a draft length that follows the batch, and arrivals from a file."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffspec.cli.options import WorkloadOptions

if TYPE_CHECKING:
    from diffspec.analysis.simulated import Replayed
    from diffspec.fitting.deployment import FittedDeployment
    from diffspec.optimizing.schedule_files import ReadSchedule
    from diffspec.traces.arrival_list import ArrivalList
    from diffspec.workload import Workload

_PANEL = "A schedule, or arrivals from a file"


@dataclasses.dataclass(frozen=True)
class ReplayOptions:
    """The options that say what is replayed; see :func:`diffspec.cli.options.with_options`."""

    schedule: Annotated[
        Path | None,
        typer.Option(
            "--schedule",
            metavar="FILE.JSON",
            rich_help_panel=_PANEL,
            help="Draft length by batch, not one --draft-length: an answer of policy or optimize, or vLLM's config.",
        ),
    ] = None
    bands: Annotated[
        bool,
        typer.Option(
            "--bands",
            rich_help_panel=_PANEL,
            help="Follow the policy's hysteresis bands, as its Python look-up does; engines have no memory.",
        ),
    ] = False
    arrivals: Annotated[
        Path | None,
        typer.Option(
            "--arrivals",
            metavar="FILE",
            rich_help_panel=_PANEL,
            help="Replay these arrivals (a table, Azure, Mooncake, requests); --arrival-rate rescales their times.",
        ),
    ] = None
    arrivals_run: Annotated[
        str | None,
        typer.Option(
            "--arrivals-run", metavar="RUN", rich_help_panel=_PANEL, help="Which run of a request table with several."
        ),
    ] = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files that are read, and must not be written."""
        return tuple(path for path in (self.schedule, self.arrivals) if path is not None)

    def check(self, draft_length: float | None, asked: WorkloadOptions) -> None:
        """Raise :class:`InputError` unless there is one draft length or a schedule, and options that go together."""
        from diffspec.results import InputError

        if (draft_length is None) == (self.schedule is None):
            got = "neither" if draft_length is None else "both"
            raise InputError(f"--draft-length or --schedule: got {got}; allowed: exactly one of them")
        if self.bands and self.schedule is None:
            raise InputError("--bands goes with --schedule: the bands are those of a policy")
        if self.arrivals_run is not None and self.arrivals is None:
            raise InputError("--arrivals-run goes with --arrivals: which run of that file")
        if self.arrivals is not None and asked.concurrency is not None:
            raise InputError("--arrivals: got --concurrency too; allowed: an open loop, in which requests come by time")

    def read_schedule(self, workload: "Workload | None" = None) -> "ReadSchedule | None":
        """The schedule asked for, of several context lengths that of the workload; its bands only with --bands."""
        if self.schedule is None:
            return None
        from diffspec.optimizing.schedule_files import parse_schedule
        from diffspec.results import InputError

        try:
            text = self.schedule.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.schedule}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        cached = 1.0 if workload is None else float(workload.held_tokens)
        found = parse_schedule(text, str(self.schedule), cached)
        if self.bands and not found.bands and len(found.ranges) > 1:
            raise InputError(f"--bands: {self.schedule} has none; allowed: an answer of 'diffspec policy'")
        return found if self.bands else dataclasses.replace(found, bands=())

    def read_arrivals(self, most: int | None) -> "ArrivalList | None":
        """The arrivals asked for, the first ``most`` of them."""
        if self.arrivals is None:
            return None
        from diffspec.traces.arrival_list import read_arrivals

        found = read_arrivals(self.arrivals, self.arrivals_run)
        return found if most is None else found.first(most)


def with_file_lengths(asked: WorkloadOptions, arrivals: "ArrivalList | None") -> WorkloadOptions:
    """The workload asked for with the mean lengths of the file where none are given: what memory is planned for."""
    import math

    if arrivals is None:
        return asked
    told = arrivals.summary()
    found = {name: told[name] for name in ("prompt_length", "output_length") if getattr(asked, name) is None}
    return dataclasses.replace(asked, **{name: value for name, value in found.items() if math.isfinite(value)})


def replay_workload(
    arrivals: "ArrivalList", asked: WorkloadOptions, deployment: "FittedDeployment"
) -> "tuple[Workload, dict[str, Any], list[str]]":
    """The steady workload with the means of ``arrivals``, what is told of them, and notes.

    Lengths are those asked for, else the file's, else the measured ones; with --arrival-rate times are rescaled to it.
    """
    import math

    from diffspec.results import InputError
    from diffspec.workload import Workload

    told = arrivals.summary()
    if not math.isfinite(told["arrival_rate"]):
        raise InputError(f"{arrivals.file}: got {len(arrivals)} arrivals; allowed: at least two, not all at one time")
    rate, notes = told["arrival_rate"], list(arrivals.warnings)
    scaled = rate
    if asked.arrival_rate is not None:
        _, loads = asked.loads()
        if len(loads) != 1:
            raise InputError(f"--arrival-rate: got {len(loads)} loads; allowed: one number, which rescales --arrivals")
        scaled = loads[0]
    known = dict(deployment.measured)
    for name in ("prompt_length", "output_length"):
        if math.isfinite(told[name]):
            known[name] = [max(told[name], 1.0)] * 2
    prompt, output, said = asked.lengths(known)
    notes += [note for note in said if not math.isfinite(told[note.split(" ")[0].strip("-").replace("-", "_")])]
    details = asked.details()
    own = asked.output_length is None and math.isfinite(told["output_scv"])
    if own and "output_scv" in details:
        raise InputError(f"--output-scv: {arrivals.file} tells the output lengths; allowed: with --output-length")
    if own:
        details["output_scv"] = told["output_scv"]
    workload = Workload(prompt, output, arrival_rate=scaled, arrival_scv=told["arrival_scv"], **details)
    answer = {"file": str(arrivals.file), "format": arrivals.format, "run": arrivals.run, "time_scale": rate / scaled}
    answer |= {name: value if math.isfinite(value) else None for name, value in told.items()}
    answer |= {"arrival_rate": scaled, "duration": told["duration"] * rate / scaled}
    answer["peak_rate"] = told["peak_rate"] * scaled / rate
    return workload, answer, notes


def replayed_requests(
    arrivals: "ArrivalList",
    asked: WorkloadOptions,
    workload: "Workload",
    time_scale: float,
    *,
    replications: int,
    seed: int,
    output_law: str,
) -> "tuple[Replayed, list[str]]":
    """The requests of each replication, which differ in what the file does not tell, and notes."""
    import numpy as np

    from diffspec.analysis.simulated import Replayed
    from diffspec.results import InputError
    from diffspec.simulating.requests import Requests, draw_lengths

    notes = []

    def given(values, option: Any, name: str):
        """Lengths of the file, gaps filled with the mean of the others; None where it has none."""
        unknown = np.isnan(values)
        if option is not None or unknown.all():
            return None
        if unknown.any():
            notes.append(f"{int(unknown.sum())} of {len(values)} requests have no {name}: the mean of the others")
        return np.maximum(np.rint(np.where(unknown, values[~unknown].mean(), values)), 1.0).astype(np.int64)

    prompts = given(arrivals.prompt_tokens, asked.prompt_length, "prompt_tokens")
    outputs = given(arrivals.output_tokens, asked.output_length, "output_tokens")
    if outputs is not None and output_law != "fixed":
        raise InputError(
            f"--output-law: got {output_law!r}, and {arrivals.file} tells the output lengths; allowed: fixed, or with "
            "--output-length"
        )
    runs = []
    for number in range(replications):
        random = np.random.default_rng([seed, number])
        means = (float(workload.prompt_length), float(workload.output_length))
        size, scv = len(arrivals), float(workload.output_scv)
        runs.append(
            Requests(
                draw_lengths(means[0], "fixed", 0.0, size, random) if prompts is None else prompts,
                draw_lengths(means[1], output_law, scv, size, random) if outputs is None else outputs,  # type: ignore[arg-type]
                arrivals.arrival_time * time_scale,
            )
        )
    return Replayed(runs, arrivals.first_measured, arrivals.end_measured), notes
