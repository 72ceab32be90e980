"""The figure of `diffspec policy`: draft length and gain by batch, and by load, with their intervals."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diffspec.report.figures import COLORS, LOADS, MARKERS, new_figure


def load_policy(answer: Mapping[str, Any], title: str = "draft length by batch and load") -> Figure:
    """Left the schedule with its bands, in the middle the gain of each tier, right the speedup at each load."""
    figure, axes = new_figure(1, 3, title, width=4.6)
    for place, context in enumerate(answer["contexts"]):
        color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
        length = context["context_length"]
        name = "schedule" if length is None else f"{length:g} cached tokens"
        _schedule(axes[0, 0], context, color, name)
        _tiers(axes[0, 1], context, color, name)
        _loads(axes[0, 2], context, color, marker, name)
    left, middle, right = axes[0]
    left.set(xlabel="decoding requests in the step", ylabel="draft length [tok]", xscale="log")
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_ylim(bottom=-0.2)
    middle.set(xlabel="decoding requests in the step", ylabel="speedup over no speculation", xscale="log")
    right.set(xlabel=LOADS[answer["loop"]], ylabel="speedup in end-to-end latency")
    for ax in (middle, right):
        ax.axhline(1.0, color="#555555", linewidth=1, linestyle="--")
    left.legend(frameon=False)
    right.legend(frameon=False, fontsize=8)
    return figure


def _schedule(ax: Axes, context: Mapping[str, Any], color: str, name: str) -> None:
    edges = [context["schedule"][0][0], *(last + 0.5 for _, last, _ in context["schedule"])]
    lengths = [length for *_, length in context["schedule"]]
    ax.step(edges, [*lengths, lengths[-1]], where="post", color=color, label=name)
    for band in context["bands"]:
        ax.axvspan(band["down"] - 0.5, band["up"] + 0.5, color=color, alpha=0.15, linewidth=0)


def _tiers(ax: Axes, context: Mapping[str, Any], color: str, name: str) -> None:
    for tier in context["tiers"]:
        if tier["speedup"] is None:
            continue
        ends = [tier["first_batch"], tier["last_batch"] + 0.5]
        ax.plot(ends, [tier["speedup"]] * 2, color=color, linewidth=2)
        told = tier["speedup_interval"]
        if told and told["high"] is not None:
            ax.fill_between(ends, [told["low"]] * 2, [told["high"]] * 2, color=color, alpha=0.2, linewidth=0)


def _loads(ax: Axes, context: Mapping[str, Any], color: str, marker: str, name: str) -> None:
    for key, style, other in (("speedup", "-", "no speculation"), ("speedup_over_static", ":", "one draft length")):
        shown = [entry for entry in context["loads"] if entry[key] is not None]
        if not shown:
            continue
        loads = np.array([entry["load"] for entry in shown])
        ax.plot(
            loads, [entry[key] for entry in shown], style, color=color, marker=marker, label=f"{name}, over {other}"
        )
        edges = [entry[f"{key}_interval"] or {} for entry in shown]
        low, high = ([np.nan if edge.get(side) is None else edge[side] for edge in edges] for side in ("low", "high"))
        ax.fill_between(loads, low, high, color=color, alpha=0.15, linewidth=0)
