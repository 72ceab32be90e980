"""What `diffspec size` answers: tables for a terminal, and a figure of the capacity curve and the Pareto front."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.text import Text

from diffspec.report.figures import COLORS, MARKERS, draft_label
from diffspec.report.numbers import NONE, metric_value, percent, quantity, significant
from diffspec.report.tables import table

KNOB_NAMES = {"prompt_length": "prompt length [tok]", "acceptance_rate": "acceptance rate"}
_MOST = 8


def _name(entry: Mapping[str, Any]) -> str:
    count = entry["tensor_parallel"]
    return f"{count} x {entry['hardware']}" if count > 1 else entry["hardware"]


def sizing(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The recommendation beside the best without speculation, the next best, the curve, the front, what fails."""
    limits = ", ".join(answer["limits"]) or "no limit"
    if answer["outcome"] == "successful":
        yield _chosen(answer, f"{answer['target_rate']:g} req/s within {limits}: {answer['deployment']}")
        yield from _sure(answer)
        yield _ranking(answer)
        yield from _split(answer)
    else:
        yield from _failed(answer, limits)
    for entry in answer["does_not_fit"]:
        missing = f"{entry['missing_bytes'] / 1e9:.3g} GB"
        drafter = " with its drafter" if entry["plain_fits"] else ""
        yield Text(f"{_name(entry)}{drafter} does not fit: {missing} of memory are missing on each device")
    if answer["curve"]:
        yield _curve(answer["curve"])
    if answer["pareto"]:
        yield _front(answer["pareto"])
    if answer["assumptions"]:
        yield table("assumed", ("what",), [(line,) for line in answer["assumptions"]])


def _chosen(answer: Mapping[str, Any], title: str) -> RenderableType:
    columns = [("recommended", answer["recommended"])]
    if answer["plain"] is not None and answer["recommended"]["draft_length"] > 0:
        columns.append(("without speculation", answer["plain"]))

    def row(label: str, tell) -> tuple[str, ...]:
        return (label, *(tell(entry) for _, entry in columns))

    rows = [
        row("replicas", lambda entry: f"{entry['replicas']} of {_name(entry)}"),
        row("draft length", lambda entry: f"{entry['draft_length']:g}"),
        row("batch cap", lambda entry: quantity(entry["max_batch_size"], "req")),
        row("largest rate of a replica", lambda entry: quantity(entry["rate_per_replica"], "req/s")),
        row("what bounds it", lambda entry: entry["binding"]),
        row("rate it is given", lambda entry: quantity(entry["arrival_rate"], "req/s")),
        row("headroom", lambda entry: percent(entry["headroom"])),
        row("device-hours per million tokens", lambda entry: significant(entry["device_hours"])),
        row("cost per million tokens", lambda entry: significant(entry["cost"])),
        row("energy per million tokens", _energy),
    ]
    names = dict.fromkeys(name for _, entry in columns for name in entry["metrics"])
    rows += [
        row(name, lambda entry, name=name: _metric(name, entry["metrics"].get(name)))
        for name in names
        if name != "itl_mean" or any(limit.startswith("itl") for limit in answer["limits"])
    ]
    return table(title, ("", *(name for name, _ in columns)), rows)


def _metric(name: str, value: float | None) -> str:
    return percent(value) if name == "utilization" else metric_value(name, value)


def _energy(entry: Mapping[str, Any]) -> str:
    return NONE if entry["energy"] is None else f"{significant(entry['energy'] / 3.6e6)} kWh"


def _sure(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    told = answer["intervals"]
    if told is None:
        yield Text(f"no intervals: {answer['intervals_reason']}")
        return
    rate, count = told["rate_per_replica"], told["replicas"]
    high = "unbounded" if count["high"] is None else f"{count['high']:g}"
    low = NONE if count["low"] is None else f"{count['low']:g}"
    yield Text(
        f"{told['level']:.0%} of {told['draws']} draws of what is not known: a replica sustains "
        f"{significant(rate['low'])} to {significant(rate['high'])} req/s; {low} to {high} replicas"
    )
    if answer["risk"] is not None:
        yield Text(f"sized for the rate that {answer['risk']:.0%} of the draws sustain")
    if told["feasible_share"] < 1:
        yield Text(f"{percent(1 - told['feasible_share'])} of the draws break a limit without load")
    fields = [entry["field"] for entry in answer["outside_measured"]]
    if "deployment" not in fields:
        yield Text(
            f"outside what was measured: {', '.join(dict.fromkeys(fields))}" if fields else "inside what was measured"
        )


def _ranking(answer: Mapping[str, Any]) -> RenderableType:
    """The best candidate of each server and draft length, those that spend least first."""
    seen: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for entry in answer["candidates"]:
        seen.setdefault((entry["hardware"], entry["tensor_parallel"], entry["draft_length"]), entry)
    rows = [
        (
            _name(entry),
            f"{entry['draft_length']:g}",
            f"{entry['max_batch_size']:g}",
            significant(entry["rate_per_replica"]),
            entry["binding"],
            str(entry["replicas"]),
            percent(entry["headroom"]),
            significant(entry["device_hours"]),
            significant(entry["cost"]),
            _energy(entry),
        )
        for entry in list(seen.values())[:_MOST]
    ]
    names = ("replica", "draft length", "batch cap", "rate, req/s", "bound by", "replicas", "headroom")
    title = f"candidates, least {answer['minimise'].replace('_', '-')} first ({len(answer['candidates'])} will do)"
    return table(title, (*names, "device-hours", "cost", "energy"), rows)


def _split(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    rows = [
        (
            entry["hardware"],
            str(entry["devices"]),
            significant(entry["one_replica"]),
            significant(entry["replicas"]),
            NONE if entry["ratio"] is None else percent(entry["ratio"]),
        )
        for entry in answer["tensor_parallel"]
    ]
    if rows:
        columns = ("hardware", "devices", "one replica, req/s", "as many replicas, req/s", "ratio")
        yield table("tensor parallelism against replicas", columns, rows)


def _failed(answer: Mapping[str, Any], limits: str) -> Iterator[RenderableType]:
    yield Text(f"{answer['target_rate']:g} req/s within {limits}: {answer['outcome']}", style="bold")
    told = answer["infeasible"]
    if told is None:
        return
    near = told["nearest"]
    yield Text(
        f"{told['reason']}; nearest: {_name(near)}, draft length {near['draft_length']:g}, "
        f"batch cap {near['max_batch_size']:g}"
    )
    rows = []
    for limit, entry in told["limits"].items():
        fails = f"fails by {percent(entry['excess'])}" if entry["excess"] > 0 else "kept"
        rows.append((limit, metric_value(limit.split("<")[0], entry["value"]), fails))
    yield table("without load", ("limit", "value", ""), rows)


def _curve(curve: Mapping[str, Any]) -> RenderableType:
    lengths = curve["draft_lengths"]
    rows = [
        (
            f"{entry['value']:g}",
            *(significant(rate) for rate in rates),
            NONE if entry["draft_length"] is None else f"{entry['draft_length']:g}",
            NONE if entry["gain"] is None else f"{significant(entry['gain'])} x",
        )
        for entry, rates in zip(curve["best"], curve["rates"], strict=True)
    ]
    title = f"largest rate of a replica [req/s] by draft length, batch cap {curve['max_batch_size']:g}"
    columns = (KNOB_NAMES[curve["knob"]], *(f"k={length}" for length in lengths), "best", "gain")
    return table(title, columns, rows)


def _front(pareto: Mapping[str, Any]) -> RenderableType:
    latency, _, spend = pareto["objectives"]
    rows = [
        (
            f"{entry['replicas']} of {_name(entry)}",
            f"{entry['draft_length']:g}",
            f"{entry['max_batch_size']:g}",
            metric_value(latency, entry[latency]),
            significant(entry["rate_per_device"]),
            significant(entry[spend]),
        )
        for entry in _spread(pareto["front"])
    ]
    title = f"Pareto front: {len(pareto['front'])} points, {pareto['dominated']} dominated"
    columns = (
        "replicas",
        "draft length",
        "batch cap",
        latency,
        "req/s of a device",
        f"{spend.replace('_', '-')} per M",
    )
    return table(title, columns, rows)


def _spread(front: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most :data:`_MOST` points, both ends among them."""
    places = np.unique(np.linspace(0, len(front) - 1, min(_MOST, len(front))).round().astype(int))
    return [front[place] for place in places]


# --- the figure -------------------------------------------------------------------------------------------------------


def sizing_figure(answer: Mapping[str, Any]) -> Figure:
    """Left: the capacity curve, a line for each draft length against the knob. Right: latency against the rate that a
    device serves, by hardware, the Pareto front joined; nothing there without a feasible candidate."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    limits = ", ".join(answer["limits"]) or "no limit"
    figure.suptitle(f"{answer['target_rate']:g} req/s within {limits}: {answer['outcome']}", fontsize=12)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
    curve, pareto = answer["curve"], answer["pareto"]
    if curve:
        for place, length in enumerate(curve["draft_lengths"]):
            rates = [row[place] for row in curve["rates"]]
            color = "#000000" if length == 0 else COLORS[(place - 1) % (len(COLORS) - 1)]
            style = {"color": color, "marker": MARKERS[place % len(MARKERS)], "markersize": 4}
            left.plot(curve["values"], rates, label=draft_label(length), linewidth=2.2 if length == 0 else 1.1, **style)
        left.set_xlabel(KNOB_NAMES[curve["knob"]])
        if curve["knob"] == "prompt_length":
            left.set_xscale("log", base=2)
            left.set_xticks(curve["values"], [f"{value:g}" for value in curve["values"]])
        left.set_ylabel("largest rate of a replica [req/s]")
        left.set_ylim(bottom=0.0)
        left.legend(fontsize=7, frameon=False)
    if pareto:
        _draw_front(right, pareto)
    else:
        right.set_visible(False)
    return figure


def _draw_front(axes, pareto: Mapping[str, Any]) -> None:
    latency, rate, spend = pareto["objectives"]
    for place, hardware in enumerate(dict.fromkeys(point["hardware"] for point in pareto["points"])):
        for plain in (True, False):
            chosen = [p for p in pareto["points"] if p["hardware"] == hardware and (p["draft_length"] == 0) == plain]
            if chosen:
                color = COLORS[place % len(COLORS)]
                axes.plot(
                    [point[rate] for point in chosen],
                    [1e3 * point[latency] for point in chosen],
                    linestyle="",
                    marker="x" if plain else "o",
                    markersize=4,
                    alpha=0.45,
                    color=color,
                    label=f"{hardware}, {'no speculation' if plain else 'speculation'}",
                )
    front = sorted(pareto["front"], key=lambda point: point[rate])
    axes.plot(
        [point[rate] for point in front],
        [1e3 * point[latency] for point in front],
        color="#000000",
        marker="s",
        markersize=4,
        markerfacecolor="none",
        linewidth=1.0,
        label=f"front ({spend.replace('_', '-')} too)",
    )
    axes.set_xlabel("rate of a device [req/s]")
    axes.set_ylabel(f"{latency} [ms]")
    axes.set_yscale("log")
    axes.legend(fontsize=7, frameon=False)
