"""The figure of `diffspec boundary`: the map with its contour, the best draft lengths, and how sure the sign is."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from diffspec.report.boundary_tables import QUANTITIES
from diffspec.report.figures import COLORS, new_figure

HATCHES = {"gain_by_capacity": "..", "loss_by_capacity": "//", "saturated": "xx", "does_not_fit": "++"}
NAMES = {
    "gain_by_capacity": "only speculation serves it",
    "loss_by_capacity": "only plain decoding serves it",
    "saturated": "nobody serves it",
    "does_not_fit": "does not fit",
}
MOST_TICKS = 8


def boundary(answer: Mapping[str, Any], title: str | None = None) -> Figure:
    """Left the gain with the contour where it is 1; then the best draft length where it was chosen, and the share of
    draws that gain where there are draws."""
    panels = [_gain]
    if answer["best_draft_length"] is not None:
        panels.append(_best)
    if answer["uncertainty"] is not None:
        panels.append(_share)
    heading = title or f"{answer['deployment']}: {QUANTITIES[answer['quantity']]}"
    figure, axes = new_figure(1, len(panels), heading, width=5.2, height=4.2)
    for ax, panel in zip(axes[0], panels, strict=True):
        ax.grid(False)
        panel(figure, ax, answer)
        _contours(ax, answer)
        _ticks(ax, answer)
    present = [zone for zone in HATCHES if zone in answer["zones"]]
    handles = [
        Patch(facecolor="white", edgecolor="#555555", hatch=HATCHES[zone], label=NAMES[zone]) for zone in present
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _gain(figure: Figure, ax: Axes, answer: Mapping[str, Any]) -> None:
    values = np.log2(np.asarray([[np.nan if g is None else g for g in row] for row in answer["gain"]], dtype=float))
    reach = max(float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0, 0.1)
    drawn = ax.pcolormesh(*_edges(answer), values, cmap="RdBu", vmin=-reach, vmax=reach)
    ticks = np.linspace(-reach, reach, 5)
    bar = figure.colorbar(drawn, ax=ax, ticks=ticks)
    bar.set_ticklabels([f"{2.0**tick:.2g}" for tick in ticks])
    bar.set_label(QUANTITIES[answer["quantity"]])
    across, upwards = _edges(answer)
    for row, zones in enumerate(answer["zone"]):
        for column, zone in enumerate(zones):
            if zone in HATCHES:
                corner, size = (across[column], upwards[row]), (np.diff(across)[column], np.diff(upwards)[row])
                look = {"facecolor": "white", "edgecolor": "#777777", "linewidth": 0}
                ax.add_patch(Rectangle(corner, *size, hatch=HATCHES[zone], **look))


def _best(figure: Figure, ax: Axes, answer: Mapping[str, Any]) -> None:
    lengths = np.asarray(answer["best_draft_length"], dtype=float)
    most = int(answer["max_draft_length"])
    shades = ListedColormap(["#FFFFFF", *[str(round(0.9 - 0.7 * k / most, 3)) for k in range(1, most + 1)]])
    drawn = ax.pcolormesh(*_edges(answer), lengths, cmap=shades, norm=BoundaryNorm(np.arange(-0.5, most + 1), most + 1))
    figure.colorbar(drawn, ax=ax, ticks=range(most + 1)).set_label("best draft length (0: none)")


def _share(figure: Figure, ax: Axes, answer: Mapping[str, Any]) -> None:
    known = answer["uncertainty"]
    drawn = ax.pcolormesh(*_edges(answer), np.asarray(known["gaining_share"]), cmap="PuOr", vmin=0.0, vmax=1.0)
    figure.colorbar(drawn, ax=ax).set_label(f"share of {known['draws']} draws that gain")
    for number, axis in enumerate(answer["axes"]):
        if axis["scale"] == "names":
            continue
        found = [e for e in known["crossings"] if e["along"] == axis["name"] and e["share"] >= 0.5 and e["low"]]
        other = answer["axes"][1 - number]
        across = _places(axis, [value for entry in found for value in (entry["low"], entry["high"])]).reshape(-1, 2)
        at = _places(other, [entry["at"] for entry in found])
        for place, ends in zip(at, across, strict=True):
            line = (ends, [place, place]) if number == 0 else ([place, place], ends)
            ax.plot(*line, color=COLORS[2], linewidth=1.2, marker="|")


def _contours(ax: Axes, answer: Mapping[str, Any]) -> None:
    x, y = answer["axes"]
    for line in answer["contours"]:
        points = list(zip(*line, strict=True))
        ax.plot(_places(x, points[0]), _places(y, points[1]), color="black", linewidth=1.8)
    for entry in answer["crossings"]:
        if entry["kind"] != "break_even" or answer["contours"]:
            continue
        along = entry["along"] == x["name"]
        own, other = (x, y) if along else (y, x)
        point = _places(own, [entry["value"]])[0], _places(other, [entry["at"]])[0]
        ax.plot(*(point if along else point[::-1]), color="black", marker="_" if not along else "|", markersize=14)


def _places(axis: Mapping[str, Any], values) -> np.ndarray:
    """Where values are drawn: the number of a name, a logarithm, or the value itself."""
    if axis["scale"] == "names":
        return np.asarray([axis["values"].index(value) for value in values], dtype=float)
    numbers = np.asarray(values, dtype=float)
    return np.log10(numbers) if axis["scale"] == "log" else numbers


def _edges(answer: Mapping[str, Any]) -> list[np.ndarray]:
    found = []
    for axis in answer["axes"]:
        nodes = _places(axis, axis["values"])
        inner = 0.5 * (nodes[1:] + nodes[:-1])
        found.append(np.concatenate([[1.5 * nodes[0] - 0.5 * nodes[1]], inner, [1.5 * nodes[-1] - 0.5 * nodes[-2]]]))
    return found


def _ticks(ax: Axes, answer: Mapping[str, Any]) -> None:
    for axis, put in zip(answer["axes"], (ax.set_xticks, ax.set_yticks), strict=True):
        values = axis["values"][:: -(-len(axis["values"]) // MOST_TICKS)]
        labels = [value if axis["scale"] == "names" else f"{value:.3g}" for value in values]
        put(_places(axis, values), labels=labels)
    x, y = (
        f"{axis['name']} [{axis['unit']}]" if axis["unit"] not in ("", "1") else axis["name"] for axis in answer["axes"]
    )
    ax.set(xlabel=x, ylabel=y)
    ax.tick_params(axis="x", labelrotation=45)
