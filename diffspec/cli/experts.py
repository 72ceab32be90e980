"""The options of `diffspec optimize` that place experts on ranks."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from diffspec.analysis.before_traces import Unmeasured
    from diffspec.fitting.deployment import FittedDeployment
    from diffspec.optimizing.expert_placement import Placing

_PANEL = "Placement of experts"


@dataclasses.dataclass(frozen=True)
class ExpertOptions:
    """The options that say which experts lie where; see :func:`diffspec.cli.options.with_options`."""

    experts: Annotated[
        Path | None,
        typer.Option(
            "--experts",
            metavar="ROUTING.NPZ",
            rich_help_panel=_PANEL,
            help="How often each expert is chosen (.npz: counts or experts; .json: logical_count; .csv, .parquet).",
        ),
    ] = None
    expert_ranks: Annotated[
        int | None,
        typer.Option("--expert-ranks", metavar="R", rich_help_panel=_PANEL, help="Ranks that share the experts."),
    ] = None
    redundant_experts: Annotated[
        int | None,
        typer.Option("--redundant-experts", metavar="N", rich_help_panel=_PANEL, help="Further copies in each layer."),
    ] = None
    expert_groups: Annotated[
        int | None,
        typer.Option("--expert-groups", metavar="G", rich_help_panel=_PANEL, help="Groups that EPLB keeps on a node."),
    ] = None
    nodes: Annotated[
        int | None, typer.Option("--nodes", metavar="N", rich_help_panel=_PANEL, help="Nodes that the ranks are on.")
    ] = None
    any_rank_load: Annotated[
        bool,
        typer.Option(
            "--any-rank-load",
            rich_help_panel=_PANEL,
            help="Choose by the objective alone; by default no rank carries more than EPLB's busiest.",
        ),
    ] = False
    expert_location: Annotated[
        Path | None,
        typer.Option(
            "--expert-location",
            metavar="FILE.JSON",
            rich_help_panel=_PANEL,
            help="Also write the placement for SGLang's --init-expert-location.",
        ),
    ] = None

    def place(
        self, deployment: "FittedDeployment", unmeasured: "Unmeasured | None", **asked: Any
    ) -> "tuple[FittedDeployment, Unmeasured | None, dict[str, Any] | None]":
        """The server with its experts placed, and the answer about them; as it is, and None, without ``--experts``."""
        from diffspec.results import InputError

        given = {
            name: value
            for name in ("expert_ranks", "redundant_experts", "expert_groups", "nodes", "expert_location")
            if (value := getattr(self, name)) is not None
        }
        given |= {"any_rank_load": True} if self.any_rank_load else {}
        if self.experts is None:
            if given:
                raise InputError(f"--{next(iter(given)).replace('_', '-')} goes with --experts ROUTING.NPZ")
            return deployment, unmeasured, None
        given.pop("expert_location", None)
        from diffspec.optimizing.expert_balance import place_experts, place_unmeasured
        from diffspec.traces.routing import read_routing

        routes = read_routing(self.experts)
        if unmeasured is None:
            deployment, answer = place_experts(deployment, routes, **given, **asked)
            return deployment, None, answer
        unmeasured, answer = place_unmeasured(unmeasured, routes, **given, **asked)
        return unmeasured.deployment, unmeasured, answer

    def candidates(self, deployment: "FittedDeployment", answer: dict[str, Any] | None) -> "Placing | None":
        """The placements that a joint decision starts from; None without ``--experts``, or where nothing fits."""
        if answer is None or self.experts is None or not answer["table"]:
            return None
        from diffspec.optimizing.expert_balance import candidate_placements
        from diffspec.traces.routing import read_routing

        return candidate_placements(deployment, read_routing(self.experts), answer, self.any_rank_load)

    def files(self, answer: dict[str, Any] | None) -> dict[Path, str]:
        """What is written beside the answer: the placement, where there is one and a file for it was named."""
        from diffspec.report.files import json_text

        if self.expert_location is None or answer is None or answer["exports"] is None:
            return {}
        return {self.expert_location: json_text(answer["exports"]["sglang"]["init_expert_location"]) + "\n"}

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The file that is read, and must not be written."""
        return () if self.experts is None else (self.experts,)


def half(progress: Callable[[str, float], None], first: float, last: float) -> Callable[[str, float], None]:
    """Progress of a part of the work, from ``first`` to ``last`` of the bar."""
    return lambda what, share: progress(what, first + share * (last - first))
