"""What `diffspec sensitivity` says in a terminal: elasticities, interactions, shares of uncertainty, bottlenecks."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from diffspec.report.numbers import METRIC_UNITS, NONE, percent, quantity
from diffspec.report.tables import assumed, measured, table

UNITS = METRIC_UNITS | {"breakeven_rate": "req/s", "best_draft_length": "tok"}


def sensitivities(answer: Mapping[str, Any], most: int = 20) -> Iterator[RenderableType]:
    """Elasticities, largest first, then what else was asked for."""
    told = answer.get("intervals")
    rows = [
        (row["name"], row["kind"], quantity(row["value"], row["unit"]), _slope(row["elasticity"]))
        + (() if told is None else (_slopes(told["elasticities"].get(row["name"])),))
        for row in answer["elasticities"][:most]
    ]
    unit = UNITS.get(answer["metric"], "s")
    value = NONE if answer["value"] is None else quantity(answer["value"], unit)
    title = f"{answer['metric']} = {value}{_between(told, unit)} ({answer['outcome']})"
    if rows:
        columns = ("name", "kind", "now", "elasticity", *(() if told is None else (f"{told['level']:.0%} interval",)))
        yield table(title, columns, rows, left=2)
        yield Text("elasticity 0.7: 1 % more of it gives 0.7 % more of the metric")
    yield from _second_order(answer.get("second_order"))
    yield from _uncertainty(answer.get("uncertainty"))
    yield from _global(answer.get("global"))
    for line in answer.get("explanation", ()):
        yield Text(f"* {line}")
    yield from measured(answer)
    yield from assumed(answer, "" if rows else title)


def _second_order(found: Mapping[str, Any] | None, most: int = 8) -> Iterator[RenderableType]:
    if not found or not found["names"]:
        return
    rows = [("", f"{row['first']} x {row['second']}", _slope(row["value"])) for row in found["interactions"][:most]]
    rows += [("curvature", row["name"], _slope(row["value"])) for row in found["curvatures"][: most // 2]]
    rows[0] = ("interaction", *rows[0][1:])
    yield table("second order: d elasticity / d log(input)", ("", "of", "value"), rows, left=2)


def _uncertainty(found: Mapping[str, Any] | None, most: int = 8) -> Iterator[RenderableType]:
    if not found or found["deviation"] is None:
        return
    by_draws = sorted(found["shares"], key=lambda row: -(row["told_by_draws"] or 0.0))[:most]
    rows = [(r["name"], *(percent(r[of]) for of in ("told_by_draws", "share", "alone"))) for r in by_draws]
    yield table("whose uncertainty counts", ("parameter", "told by draws", "linear share", "by itself"), rows)
    told = f"one standard deviation: {percent(found['deviation'])} to first order"
    yield Text(f"{told}, {percent(found['deviation_of_draws'])} over the draws of the fit")


def _global(found: Mapping[str, Any] | None, most: int = 10) -> Iterator[RenderableType]:
    if not found:
        return
    rows = [
        (row["name"], *(part for of in ("first", "total") for part in (percent(row[of]), _span(row[f"{of}_interval"]))))
        for row in found["indices"][:most]
    ]
    title = f"Sobol' indices over {found['points']} points, one standard deviation {percent(found['deviation'])}"
    yield table(title, ("input", "first order", "90 % interval", "total", "90 % interval"), rows)


def _between(told: Mapping[str, Any] | None, unit: str) -> str:
    """The interval of the metric itself, that of what the fit leaves open; nothing where it has none."""
    edges = {} if told is None else told["value"]
    if edges.get("low") is None:
        return ""
    high = "unbounded" if edges["high"] is None else quantity(edges["high"], unit)
    return f", {told['level']:.0%} of draws {quantity(edges['low'], unit)} to {high}" if told else ""


def _slope(value: float | None) -> str:
    return "none" if value is None else f"{value:+.3f}"


def _slopes(edges: Mapping[str, float | None] | None) -> str:
    return NONE if edges is None else f"{_slope(edges['low'])} to {_slope(edges['high'])}"


def _span(edges: Mapping[str, float | None]) -> str:
    return f"{percent(edges['low'])} to {percent(edges['high'])}"
