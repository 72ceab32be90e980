"""The figure of a joint decision: draft lengths, drafter and objective over the loads, and what the limits leave."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diffspec.report.figures import COLORS, LOADS, MARKERS, new_figure

_LIMIT = re.compile(r"(?:(.*): )?(\w+)\s*([<>])=?\s*(\S+)")
_ALL, _NOTHING, _COMMON = "#000000", "#888888", "#555555"


def joint(answer: Mapping[str, Any], title: str = "joint decision by load") -> Figure:
    """Left the draft length of each class (nodes where a tree is drawn) over the drafter that drafts it; in the middle
    the objective; both beside the best with one draft length for all classes. Right how much of each limit is used, or
    without limits the speedup over no speculation. Loads without a feasible point are grey, and have no line."""
    figure, axes = new_figure(1, 3, title, width=4.8)
    left, middle, right = axes[0]
    for ax in axes[0] if answer["table"] else ():
        _shade(ax, answer, named=ax is left)
    for ax in axes[0]:
        ax.set_xlabel(LOADS[answer["loop"]])
    _lengths(left, answer)
    _objective(middle, answer)
    if answer["limits"]:
        _limits(right, answer)
    else:
        _line(right, answer, [entry["speedup"] for entry in answer["table"]], "chosen", _ALL, "o-")
        right.set_ylabel("speedup in end-to-end latency")
    right.axhline(1.0, color=_COMMON, linewidth=1, linestyle="--")
    for ax in axes[0]:
        if ax.get_legend_handles_labels()[1]:
            ax.legend(frameon=False, fontsize=8)
    return figure


def _edges(loads: Sequence[float]) -> np.ndarray:
    """Where the range of each load begins and the last one ends: half way between loads."""
    at = np.asarray(loads, dtype=float)
    if at.size == 1:
        return at[0] * np.array([0.9, 1.1])
    inner = 0.5 * (at[1:] + at[:-1])
    return np.concatenate([[at[0] - (inner[0] - at[0])], inner, [at[-1] + (at[-1] - inner[-1])]])


def _drafter(answer: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """The drafter, and what else was chosen among: batch cap, replicas, placement of experts."""
    if not entry["feasible"]:
        return "none will do"
    told = [entry["drafter"] if any(entry["draft_lengths"].values()) else "no speculation"]
    if len({other["max_batch_size"] for other in answer["table"]}) > 1:
        told.append("no cap" if entry["max_batch_size"] is None else f"cap {entry['max_batch_size']:g}")
    if len(answer["replicas"]) > 1:
        told.append(f"{entry['replicas']} replica{'s' if entry['replicas'] > 1 else ''}")
    return ", ".join([*told, *([f"experts {entry['placement']}"] if answer["placements"] else [])])


def _shade(ax: Axes, answer: Mapping[str, Any], named: bool) -> None:
    """Each range of loads in the colour of its drafter."""
    table, names = answer["table"], [_drafter(answer, entry) for entry in answer["table"]]
    edges, colors = (
        _edges([entry["load"] for entry in table]),
        {name: place for place, name in enumerate(dict.fromkeys(names))},
    )
    place, seen = 0, set()
    for name, group in itertools.groupby(names):
        count = len(list(group))
        color = _NOTHING if name == "none will do" else COLORS[(colors[name] + 2) % len(COLORS)]
        label = name if named and name not in seen else None
        ax.axvspan(edges[place], edges[place + count], color=color, alpha=0.15, linewidth=0, label=label)
        seen.add(name)
        place += count
    ax.set_xlim(edges[0], edges[-1])


def _line(ax: Axes, answer: Mapping[str, Any], values, label: str, color: str, style: str, **more: Any) -> None:
    """Values over the loads; a gap where one is None or nothing is feasible."""
    entries = answer["table"]
    shown = [
        np.nan if value is None or not entry["feasible"] else value
        for entry, value in zip(entries, values, strict=True)
    ]
    if not np.isnan(shown).all():
        ax.plot([entry["load"] for entry in entries], shown, style, color=color, label=label, **more)


def _lengths(ax: Axes, answer: Mapping[str, Any]) -> None:
    table = answer["table"]
    steps = {"drawstyle": "steps-mid"}
    trees = any(entry["tree"] is not None for entry in table)
    for place, one in enumerate(answer["classes"]):
        values = [None if entry["tree"] is not None else entry["draft_lengths"][one["name"]] for entry in table]
        color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
        _line(ax, answer, values, one["name"], color, "-", marker=marker, **steps)
    if trees:
        nodes = [None if entry["tree"] is None else entry["tree"]["nodes"] for entry in table]
        _line(ax, answer, nodes, "tree, nodes", _ALL, "-", marker="*", **steps)
    alike = [_drafted(entry["common"]) if entry["common"]["feasible"] else None for entry in table]
    if len(answer["classes"]) > 1:
        _line(ax, answer, alike, "one for all", _COMMON, "--", **steps)
    ax.set_ylabel("drafted tokens per step" if trees else "draft length [tok]")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(bottom=-0.2)


def _drafted(common: Mapping[str, Any]) -> int:
    """Drafted tokens per step of the choice that is one for all: the nodes of its tree, where it draws one."""
    tree = common.get("tree")
    return common["draft_length"] if tree is None else tree["nodes"]


def _objective(ax: Axes, answer: Mapping[str, Any]) -> None:
    table = answer["table"]
    _line(ax, answer, [entry["objective"] for entry in table], "chosen", _ALL, "o-")
    alike = [entry["common"]["objective"] if entry["common"]["feasible"] else None for entry in table]
    _line(ax, answer, alike, "one draft length for all", _COMMON, "s--")
    rate, time = answer["objective"] in ("capacity", "goodput"), re.fullmatch(r"\w+_(mean|p\d+)", answer["objective"])
    ax.set_ylabel(answer["objective"] + (" [req/s]" if rate else " [s]" if time else ""))
    ax.set_ylim(bottom=0.0)


def _limits(ax: Axes, answer: Mapping[str, Any]) -> None:
    """Of each limit, the value over its bound (bound over value, where it is a least one): 1 is all that is allowed."""
    for place, text in enumerate(answer["limits"]):
        color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
        used = [_used(entry["metrics"], text) for entry in answer["table"]]
        _line(ax, answer, used, text, color, "-", marker=marker)
    ax.set_ylabel("share of the limit that is used")
    ax.set_ylim(bottom=0.0)


def _used(metrics: Mapping[str, Any], text: str) -> float | None:
    """None where the answer does not tell the metric: of limits on single requests it does not."""
    found = _LIMIT.fullmatch(text)
    if found is None:
        return None
    of, metric, side, bound = found.groups()
    value = metrics.get(of or "all", {}).get(metric)
    if not value:
        return None
    return value / float(bound) if side == "<" else float(bound) / value
