"""Figures: measured points, fitted curves, stages, speedup, policy. Each function returns a matplotlib figure."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from diffspec.fitting.evaluate import scored_columns
from diffspec.report.curves import Curves
from diffspec.report.measured import ScoredPart

# Okabe and Ito, "Color universal design" (2008): told apart by colour-blind readers; markers tell them apart in grey.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STAGE_COLORS = {
    "overhead": "#BBBBBB",
    "prefill": "#56B4E9",
    "draft": "#E69F00",
    "verify": "#0072B2",
    "waiting": "#D55E00",
}
LOADS = {"arrival_rate": "arrival rate [req/s]", "concurrency": "requests in flight"}
NAMES = {
    "ttft": "time to first token",
    "itl": "gap between stream events",
    "tpot": "time per output token",
    "e2e": "end-to-end latency",
    "throughput": "throughput",
}
MOST_LINES = 14


def png(figure: Figure) -> bytes:
    """The figure as PNG, 150 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def picture(figure: Figure, path: Path) -> bytes:
    """The figure as its file's ending asks: SVG for .svg (the same bytes for the same figure), PNG for any other."""
    if path.suffix.lower() != ".svg":
        return png(figure)
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "diffspec", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def new_figure(rows: int, columns: int, title: str, width: float = 4.6, height: float = 3.5) -> tuple[Figure, Any]:
    """An empty figure of panels in the house style, and its axes [rows, columns]."""
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color="#DDDDDD", linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def style(draft_lengths: Sequence[int]) -> dict[int, tuple[str, str]]:
    """Colour and marker of each draft length."""
    return {k: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, k in enumerate(sorted(set(draft_lengths)))}


def draft_label(k: int) -> str:
    """A draft length in a legend."""
    return "no speculation" if k == 0 else f"draft length {k}"


# --- measured against predicted ---------------------------------------------------------------------------------------


def against_measured(parts: Sequence[ScoredPart], title: str) -> Figure:
    """Latency against load with the predictions of the same rows, then predicted against measured per observable."""
    look = style([int(k) for part in parts for k in part.column("draft_length")])
    columns = list(dict.fromkeys(name for part in parts for name in scored_columns(part.scored)))
    main = next((name for name in columns if name.startswith("e2e")), columns[0])
    panels: list[Callable[[Axes], None]] = []
    for loop in LOADS:
        if any(np.isfinite(part.column(loop)).any() for part in parts):
            panels.append(lambda ax, loop=loop: _rows_by_load(ax, parts, main, loop, look))
    for name in columns:
        panels.append(lambda ax, name=name: _parity(ax, parts, name, look))
    across = len(panels) if len(panels) <= 2 else 4 if len(panels) > 6 else 3
    down = -(-len(panels) // across)
    figure, axes = new_figure(down, across, title)
    for ax, panel in zip(axes.flat, panels, strict=False):
        panel(ax)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    handles = [Line2D([], [], color=c, marker=m, linestyle="-", label=draft_label(k)) for k, (c, m) in look.items()]
    if any(part.label == "held out" for part in parts):
        handles.append(
            Line2D([], [], color="#555555", marker="o", markerfacecolor="white", linestyle="", label="held out")
        )
    handles.append(Line2D([], [], color="#555555", label="model, at the measured rows"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
    return figure


def _metric_label(name: str) -> str:
    metric, _, statistic = name.partition("_")
    unit = "[req/s]" if metric == "throughput" else "[ms]"
    median = " (median)" if statistic == "p50" else ""
    return f"{NAMES.get(metric, metric)}{median} {unit}"


def _shown(name: str, values: np.ndarray) -> np.ndarray:
    return values if name.startswith("throughput") else 1000 * values


def _face(part: ScoredPart, color: str) -> str:
    return "white" if part.label == "held out" else color


def _rows_by_load(ax: Axes, parts: Sequence[ScoredPart], name: str, loop: str, look: Mapping) -> None:
    series: dict[tuple, list[tuple[float, float]]] = {}
    for part in parts:
        load, lengths = part.column(loop), part.column("draft_length")
        measured = part.scored.measured.get(name)
        predicted = part.scored.predicted.get(name)
        if measured is None or predicted is None:
            continue
        measured, predicted = _shown(name, measured), _shown(name, predicted)
        emitted = np.round(np.nan_to_num(part.column("tokens_per_step")))
        keys = zip(lengths, part.column("prompt_length"), part.column("output_length"), emitted, strict=True)
        for i, key in enumerate(keys):
            if not np.isfinite(load[i]):
                continue
            color, marker = look[int(key[0])]
            ax.plot(load[i], measured[i], marker, color=color, markerfacecolor=_face(part, color), ms=5)
            series.setdefault(key, []).append((float(load[i]), float(predicted[i])))
    for key, points in series.items():
        points.sort()
        line = "-" if len(series) <= MOST_LINES else ""
        ax.plot(*zip(*points, strict=True), line, color=look[int(key[0])][0], marker="_", ms=6, linewidth=1.2)
    ax.set(xlabel=LOADS[loop], ylabel=_metric_label(name), title=f"against {LOADS[loop].split(' [')[0]}")
    ax.set_ylim(bottom=0)


def _parity(ax: Axes, parts: Sequence[ScoredPart], name: str, look: Mapping) -> None:
    points = []
    for part in parts:
        rows = scored_columns(part.scored).get(name)
        if rows is None:
            continue
        rows = rows & ~part.scored.saturated
        measured = _shown(name, part.scored.measured[name])
        predicted = _shown(name, part.scored.predicted[name])
        for k, (color, marker) in look.items():
            here = rows & (part.column("draft_length") == k)
            face = _face(part, color)
            ax.plot(measured[here], predicted[here], marker, color=color, markerfacecolor=face, ms=5, linestyle="")
        points += [measured[rows], predicted[rows]]
    values = np.concatenate(points) if points else np.ones(1)
    ends = np.array([values.min() / 1.15, values.max() * 1.15]) if len(values) else np.array([1.0, 10.0])
    ax.plot(ends, ends, color="#555555", linewidth=1)
    ax.fill_between(ends, ends * 0.9, ends * 1.1, color="#555555", alpha=0.12, linewidth=0)
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured", ylabel="predicted")
    _plain_ticks(ax, ends)
    ax.set_title(f"{_metric_label(name)}, band: 10 %", fontsize=10)


def _plain_ticks(ax: Axes, ends: np.ndarray) -> None:
    """A few round ticks on both logarithmic axes, written as plain numbers."""
    steps = np.outer(10.0 ** np.arange(-6, 9), [1, 2, 5]).ravel()
    chosen = [tick for tick in steps if ends[0] <= tick <= ends[1]]
    chosen = chosen if len(chosen) <= 5 else [tick for tick in chosen if f"{tick:e}".startswith("1")]
    if len(chosen) < 2:
        chosen = [float(f"{tick:.2g}") for tick in np.geomspace(ends[0] * 1.05, ends[1] / 1.05, 3)]
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(chosen, [f"{tick:g}" for tick in chosen])
        axis.set_ticks([], minor=True)


# --- curves over load -------------------------------------------------------------------------------------------------


def _curve(ax: Axes, loads: np.ndarray, values: np.ndarray, color: str, measured_to: float | None) -> None:
    """A curve, dashed beyond the loads that were measured."""
    within = np.ones(len(loads), dtype=bool) if measured_to is None else loads <= measured_to
    ax.plot(loads[within], values[within], color=color, linewidth=1.8)
    if not within.all():
        last = max(int(within.sum()) - 1, 0)
        ax.plot(loads[last:], values[last:], color=color, linewidth=1.4, linestyle=(0, (4, 2)))


def latency_curves(
    curves: Mapping[str, Curves],
    parts: Sequence[ScoredPart],
    title: str,
    measured_to: Mapping[str, float] | None = None,
) -> Figure:
    """Latency against load: a curve per draft length in steady state, with the measured points. ``measured_to``: the
    largest measured load of each loop, beyond which curves are dashed."""
    ends = measured_to or {}
    metrics = (("e2e_latency", "e2e_mean"), ("ttft", "ttft_mean"))
    figure, axes = new_figure(len(metrics), len(curves), title, width=5.4)
    for column, (loop, curve) in enumerate(curves.items()):
        look = style(curve.draft_lengths)
        for row, (field, observed) in enumerate(metrics):
            ax = axes[row, column]
            highest = 0.0
            for k in curve.draft_lengths:
                color = look[k][0]
                _curve(ax, curve.loads, 1000 * curve.of(field, k), color, ends.get(loop))
            for part in parts:
                if observed not in part.scored.measured:
                    continue
                load, measured = part.column(loop), 1000 * part.scored.measured[observed]
                for k, (color, marker) in look.items():
                    here = (part.column("draft_length") == k) & np.isfinite(load) & np.isfinite(measured)
                    if here.any():
                        highest = max(highest, float(measured[here].max()))
                        ax.plot(load[here], measured[here], marker, color=color, markerfacecolor=_face(part, color))
            ax.set(xlabel=LOADS[loop], ylabel=_metric_label(observed), xlim=(0, curve.loads[-1]))
            ax.set_ylim(0, 1.5 * highest if highest else None)
    handles = [
        Line2D([], [], color=c, marker=m, label=draft_label(k))
        for k, (c, m) in style([k for curve in curves.values() for k in curve.draft_lengths]).items()
    ]
    if any(part.label == "held out" for part in parts):
        handles.append(
            Line2D([], [], color="#555555", marker="o", markerfacecolor="white", linestyle="", label="held out")
        )
    handles.append(Line2D([], [], color="#555555", label="model, steady state"))
    if ends:
        handles.append(Line2D([], [], color="#555555", linestyle=(0, (4, 2)), label="beyond the measured loads"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
    return figure


def stages_by_load(curve: Curves, draft_lengths: Sequence[int], title: str) -> Figure:
    """Stacked stages of the end-to-end latency against load, a panel per draft length."""
    figure, axes = new_figure(1, len(draft_lengths), title, width=5.2)
    finite = [1000 * curve.of("e2e_latency", k) for k in draft_lengths]
    top = 1.05 * max(float(np.nanpercentile(values, 92)) for values in finite)
    order = [stage for stage in STAGE_COLORS if np.nansum(curve.stages[stage]) > 0]
    for ax, k in zip(axes.flat, draft_lengths, strict=True):
        row = curve.draft_lengths.index(k)
        shown = np.isfinite(curve.of("e2e_latency", k))
        layers = [1000 * curve.stages[stage][row][shown] for stage in order]
        colors = [STAGE_COLORS[stage] for stage in order]
        ax.stackplot(curve.loads[shown], layers, colors=colors, labels=order, edgecolor="white", linewidth=0.4)
        ax.set(xlabel=LOADS[curve.loop], ylabel=_metric_label("e2e_mean"), title=draft_label(k))
        ax.set(xlim=(0, curve.loads[-1]), ylim=(0, top))
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    return figure


def speedup_by_load(
    curve: Curves,
    title: str,
    points: Mapping[int, tuple[np.ndarray, np.ndarray]] | None = None,
    measured_to: float | None = None,
) -> Figure:
    """Speedup over no speculation against load, with the break-even load of each draft length; ``points``: measured
    loads and speedups by draft length; beyond ``measured_to`` curves are dashed."""
    figure, axes = new_figure(1, 1, title, width=7.2, height=4.2)
    ax = axes[0, 0]
    look = style(curve.draft_lengths)
    handles = []
    for k in curve.draft_lengths:
        if k == 0:
            continue
        color, marker = look[k]
        crossing = curve.breakeven(k)
        told = "" if crossing is None else f", break-even at {crossing:.2f} (star)"
        _curve(ax, curve.loads, curve.speedup(k), color, measured_to)
        handles.append(Line2D([], [], color=color, marker=marker, label=draft_label(k) + told))
        if crossing is not None:
            ax.plot([crossing], [1.0], marker="*", ms=14, color=color, markeredgecolor="white", zorder=3)
        if points and k in points:
            load, ratio = points[k]
            ax.plot(load, ratio, marker, color=color, linestyle="")
    ax.axhline(1.0, color="#555555", linewidth=1, linestyle="--")
    ax.set(xlabel=LOADS[curve.loop], ylabel="speedup in end-to-end latency", xlim=(0, curve.loads[-1]))
    ax.set_ylim(bottom=0)
    if measured_to is not None:
        handles.append(Line2D([], [], color="#555555", linestyle=(0, (4, 2)), label="beyond the measured loads"))
    ax.legend(handles=handles, frameon=False, loc="lower left")
    return figure


# --- decisions --------------------------------------------------------------------------------------------------------


def policy(answer: Mapping[str, Any], title: str = "draft length by load") -> Figure:
    """Chosen draft length and speedup at each load of an optimisation."""
    entries = [entry for entry in answer["table"] if entry["draft_length"] is not None]
    load = [entry["load"] for entry in entries]
    figure, axes = new_figure(1, 2, title, width=5.0)
    left, right = axes.flat
    left.step(load, [entry["draft_length"] for entry in entries], where="mid", color=COLORS[0], label="chosen")
    left.plot(load, [entry["draft_length"] for entry in entries], "o", color=COLORS[0])
    relaxed = [entry["relaxed_draft_length"] for entry in entries]
    left.plot(load, relaxed, "--", color=COLORS[1], label="relaxed, over 1 and more")
    left.set(xlabel=LOADS[answer["loop"]], ylabel="draft length [tok]", ylim=(-0.2, max([*relaxed, 1.0]) + 0.5))
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(frameon=False)
    known = [(entry["load"], entry["speedup"]) for entry in entries if entry["speedup"] is not None]
    if known:
        right.plot(*zip(*known, strict=True), "o-", color=COLORS[0])
    right.axhline(1.0, color="#555555", linewidth=1, linestyle="--")
    right.set(xlabel=LOADS[answer["loop"]], ylabel="speedup in end-to-end latency")
    return figure


def acceptance(groups: Sequence[Mapping[str, Any]], title: str = "acceptance by draft position") -> Figure:
    """Conditional acceptance at each draft position with its 95 % interval, one line a group."""
    figure, axes = new_figure(1, 1, title, width=6.0, height=4.0)
    ax = axes[0, 0]
    for index, group in enumerate(groups):
        places = np.array([entry["position"] for entry in group["positions"]]) + 0.06 * index
        values, low, high = (
            np.array([entry[name] for entry in group["positions"]]) for name in ("acceptance", "low", "high")
        )
        name = ", ".join(f"{key} {value}" for key, value in group["group"].items()) or "all"
        # a rate of 0 or 1 has its interval on one side only
        ends = np.maximum(np.stack([values - low, high - values]), 0.0)
        ax.errorbar(places, values, ends, marker="o", capsize=3, linewidth=1.2, label=f"{name} ({group['units']})")
    ax.set_xlabel("draft position")
    ax.set_ylabel("P(accepted | all before it were)")
    ax.set_ylim(0.0, 1.02)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize=8)
    return figure
