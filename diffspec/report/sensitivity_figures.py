"""Figures of `diffspec sensitivity`: the tornado of elasticities and the spider of scaled parameters."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from diffspec.report.figures import COLORS, MARKERS, new_figure

KIND_COLORS = {"parameter": COLORS[0], "workload": COLORS[1], "configuration": COLORS[2]}


def tornado(answer: Mapping[str, Any], most: int = 15) -> Figure:
    """Bars of the largest elasticities with their intervals, a colour for each kind."""
    rows = [row for row in answer["elasticities"] if row["elasticity"]][:most][::-1]
    figure, axes = new_figure(1, 1, f"what moves {answer['metric']}", width=7.2, height=0.6 + 0.3 * max(len(rows), 3))
    ax = axes[0, 0]
    names = [row["name"] for row in rows]
    ax.barh(names, [row["elasticity"] for row in rows], color=[KIND_COLORS[row["kind"]] for row in rows])
    told = (answer.get("intervals") or {}).get("elasticities", {})
    for place, name in enumerate(names):
        edges = told.get(name)
        if edges and None not in edges.values():
            ax.plot([edges["low"], edges["high"]], [place, place], "|-", color="#333333", linewidth=1.2, ms=6)
    ax.axvline(0.0, color="#555555", linewidth=1)
    ax.set(xlabel=f"elasticity: percent of {answer['metric']} per percent of the input")
    handles = [Line2D([], [], color=color, linewidth=6, label=kind) for kind, color in KIND_COLORS.items()]
    if told:
        handles.append(
            Line2D([], [], color="#333333", marker="|", label=f"{answer['intervals']['level']:.0%} interval")
        )
    ax.legend(handles=handles, frameon=False, loc="lower right")
    return figure


def spider(answer: Mapping[str, Any]) -> Figure:
    """The metric, relative to now, with one parameter scaled at a time."""
    found = answer["spider"]
    figure, axes = new_figure(1, 1, f"{answer['metric']} as one parameter is scaled", width=6.4, height=4.2)
    ax = axes[0, 0]
    factors = np.asarray(found["factors"])
    now = int(np.argmin(np.abs(factors - 1.0)))
    for place, line in enumerate(found["lines"]):
        values = np.array([np.nan if value is None else value for value in line["values"]])
        look = {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)]}
        ax.plot(factors, values / values[now], linewidth=1.6, ms=4, label=line["name"], **look)
    ax.set_xscale("log", base=2)
    ax.set_xticks([0.5, 1.0, 2.0], ["0.5", "1", "2"])
    ax.axhline(1.0, color="#555555", linewidth=1, linestyle="--")
    ax.set(xlabel="factor on the parameter", ylabel=f"{answer['metric']}, relative to now")
    if found["lines"]:
        ax.legend(frameon=False)
    return figure
