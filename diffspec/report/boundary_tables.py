"""What `diffspec boundary` says in a terminal: the map as text, its zones, and where speculation stops to pay."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from diffspec.report.numbers import NONE, percent, significant
from diffspec.report.tables import assumed, table

SIGNS = {"gain_by_capacity": "▲", "loss_by_capacity": "▼", "saturated": "×", "does_not_fit": "#"}
"""Cells in which not both servers serve the load."""
STYLES = {"gain": "green", "gain_by_capacity": "bold green", "loss": "red", "loss_by_capacity": "bold red"}
ZONES = {
    "gain": "speculation is better",
    "loss": "speculation is worse",
    "gain_by_capacity": "▲ it alone serves the load",
    "loss_by_capacity": "▼ it alone does not serve the load",
    "saturated": "× nobody serves the load",
    "does_not_fit": "# it does not fit into the memory",
}
QUANTITIES = {
    "e2e": "speedup in end-to-end latency",
    "tpot": "speedup in time per output token",
    "ttft": "speedup in time to first token",
    "throughput": "gain in throughput",
    "memory": "memory without over with speculation",
    "energy": "energy of a token without over with speculation",
}
MOST_COLUMNS = 16


def boundary(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The map, its zones, and the break-even of each line with its interval over the draws."""
    across, upwards = answer["axes"]
    length = answer["draft_length"]
    asked = "" if length is None else f", draft length {length if length == 'best' else f'{length:g}'}"
    title = f"{answer['deployment']}: {QUANTITIES[answer['quantity']]}{asked}"
    yield map_text(answer, title)
    yield table("zones", ("zone", "share", across["name"], upwards["name"]), _zones(answer))
    yield from _break_even(answer)
    yield Text(
        f"|gain - 1| is at most {answer['largest_residual']:.1e} on {len(answer['contours'])} contours of "
        f"{sum(map(len, answer['contours']))} points and on the crossings above"
    )
    if answer["outside_measured_fields"]:
        inside = percent(answer["inside_measured_share"])
        yield Text(f"{inside} of the points lie inside what was measured; others not in {_listed(answer)}")
    yield from assumed(answer)
    if answer.get("assumptions") and not answer["memory"]:
        yield table("assumed", ("what",), [(line,) for line in answer["assumptions"]])


def map_text(answer: Mapping[str, Any], title: str):
    """The map as a table, its second axis upwards; more columns than fit are left out evenly."""
    across, upwards = answer["axes"]
    count = len(across["values"])
    step = -(-count // MOST_COLUMNS)
    columns = list(range(0, count, step))
    made = table(
        title, (f"{upwards['name']} \\ {across['name']}", *(_value(across["values"][place]) for place in columns)), []
    )
    for row in reversed(range(len(upwards["values"]))):
        cells = [_cell(answer, row, column) for column in columns]
        made.add_row(Text(_value(upwards["values"][row])), *cells)
    return made


def _cell(answer: Mapping[str, Any], row: int, column: int) -> Text:
    zone, gain = answer["zone"][row][column], answer["gain"][row][column]
    lengths = answer["best_draft_length"]
    shown = SIGNS.get(zone) or (NONE if gain is None else f"{gain:.2f}" if gain < 10 else f"{gain:.0f}")
    if lengths is not None and lengths[row][column]:
        shown = f"{shown} k{lengths[row][column]}"
    return Text(shown, style=STYLES.get(zone, "dim"))


def _zones(answer: Mapping[str, Any]) -> list[tuple[str, ...]]:
    names = [axis["name"] for axis in answer["axes"]]
    return [
        (ZONES[name], percent(zone["share"]), *(_span(zone[axis]) for axis in names))
        for name, zone in answer["zones"].items()
    ]


def _span(values) -> str:
    if isinstance(values[0], str):
        return ", ".join(values)
    return _value(values[0]) if values[0] == values[1] else f"{_value(values[0])} to {_value(values[1])}"


def _value(value) -> str:
    return value if isinstance(value, str) else significant(value)


def _break_even(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    told = {(entry["along"], entry["at"]): entry for entry in (answer["uncertainty"] or {}).get("crossings", ())}
    for number, axis in enumerate(answer["axes"]):
        if axis["scale"] == "names":
            continue
        other = answer["axes"][1 - number]
        rows = []
        for at in other["values"]:
            found = [entry for entry in answer["crossings"] if entry["along"] == axis["name"] and entry["at"] == at]
            words = [
                f"{entry['gains']} {significant(entry['value'])}" + ("" if entry["kind"] == "break_even" else " (jump)")
                for entry in found
            ]
            edges = told.get((axis["name"], at))
            if not words and not (edges and edges["share"]):
                continue
            interval = NONE
            if edges and edges["share"]:
                interval = f"{significant(edges['low'])} to {significant(edges['high'])} ({percent(edges['share'])})"
            rows.append((_value(at), ", ".join(words) or NONE, interval))
        if rows:
            columns = (other["name"], f"gains where {axis['name']} is", "90 % of the draws that have one (share)")
            yield table(f"break-even {axis['name']}", columns, rows)


def _listed(answer: Mapping[str, Any]) -> str:
    return ", ".join(answer["outside_measured_fields"])
