"""The figure of an answer, for notebooks and scripts: shown as SVG, saved as SVG or PNG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from diffspec.fitting.deployment import FittedDeployment
from diffspec.report import (
    boundary_figures,
    figures,
    joint_figures,
    measured,
    policy_figures,
    sensitivity_figures,
    sizing,
)
from diffspec.report.files import check_target, write_files
from diffspec.results import InputError
from diffspec.traces import Trace

_OF_KEY = {
    "elasticities": sensitivity_figures.tornado,
    "contours": boundary_figures.boundary,
    "contexts": policy_figures.load_policy,
    "drafters": joint_figures.joint,
    "recommended": sizing.sizing_figure,
    "static_draft_length": figures.policy,
}
_DRAWN = "answers of sensitivity, explain, boundary, policy, size and optimize, or a deployment with its trace"


class Drawing:
    """A matplotlib ``figure`` that a notebook shows as SVG."""

    def __init__(self, figure: Figure):
        self.figure = figure

    def _repr_svg_(self) -> str:
        return figures.picture(self.figure, Path("drawing.svg")).decode()

    def save(self, path: str | Path) -> None:
        """Write SVG where ``path`` ends so, PNG otherwise. Errors: :class:`InputError` where that cannot be written."""
        check_target(Path(path))
        write_files({Path(path): figures.picture(self.figure, Path(path))})


def draw(answer: Mapping[str, Any] | FittedDeployment, trace: Trace | None = None) -> Drawing:
    """The figure that ``--plot`` of a command draws of its ``answer``; of a fitted deployment with the ``trace`` of its
    fit, what was measured against what the model says, rows that were held out apart.

    Errors: :class:`InputError` for an answer that has no figure, and for a deployment without a row of its own.

    >>> row = {"name": "verify_base", "kind": "parameter", "elasticity": 0.7}
    >>> drawing = draw({"metric": "e2e_mean", "elasticities": [row]})
    >>> drawing._repr_svg_()[:5]
    '<?xml'
    """
    if isinstance(answer, FittedDeployment):
        held_out = answer.quality.get("holdout", {}).get("expression")
        parts = [] if trace is None else measured.fitted_and_held_out(answer, trace, held_out)
        if not parts:
            raise InputError(
                f"trace: got no row of deployment {answer.name!r}; allowed: the trace that it was fitted to"
            )
        title = f"{answer.name}: {answer.form} step time against measurements"
        return Drawing(figures.against_measured(parts, title))
    for key, figure in _OF_KEY.items():
        if key in answer:
            return Drawing(figure(answer))
    raise InputError(f"answer: got keys {', '.join(map(str, answer)) or 'none'}; allowed: {_DRAWN}")
