"""Tables of a joint decision: several classes of requests, a catalogue of drafters."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from diffspec.report.numbers import METRIC_UNITS, metric_value, percent, quantity, significant
from diffspec.report.tables import assumed, table

SHOWN = ("ttft_mean", "tpot_mean", "e2e_mean")


def joint(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `diffspec optimize --classes` says: the decision at each load, what each class gets, and limits' prices."""
    rows, by_class, prices = [], [], []
    several = len(answer["replicas"]) > 1
    for entry in answer["table"]:
        cap = entry["max_batch_size"]
        rows.append(
            (
                f"{entry['load']:g}",
                _drafter(entry),
                _draft(entry),
                "none" if cap is None else f"{cap:g}",
                *([f"{entry['replicas']}"] if several else []),
                *([entry["placement"]] if answer["placements"] else []),
                _objective(answer["objective"], entry["objective"]),
                significant(entry["speedup"]),
                percent(entry["headroom"]),
                percent(entry["chosen_probability"]),
                _common(answer["objective"], entry["common"]),
            )
        )
        for name in entry["draft_lengths"] if entry["metrics"] else ():
            metrics = entry["metrics"][name]
            by_class.append((f"{entry['load']:g}", name, *(metric_value(shown, metrics[shown]) for shown in SHOWN)))
        prices += [
            f"at {entry['load']:g} req/s {price['words']}" for price in entry["shadow_prices"] if price["active"]
        ]
    columns = (
        "load",
        "drafter",
        "draft length",
        "batch cap",
        *(["replicas"] if several else []),
        *(["experts placed"] if answer["placements"] else []),
        answer["objective"],
        "speedup",
        "headroom",
        "sure",
        "one for all",
    )
    yield table(f"joint decision by load: {answer['outcome']}", columns, rows, left=3)
    yield table("what each class gets", ("load", "class", *SHOWN), by_class, left=2)
    for line in prices:
        yield Text(line)
    for entry in answer["table"]:
        for limit, broken in entry["violations"].items():
            value = significant(broken["value"])
            share = broken.get("excess")
            by = "" if share is None else f", {percent(share)} beyond it at the nearest point"
            yield Text(f"at {entry['load']:g} req/s {limit} fails: {value}, allowed {significant(broken['bound'])}{by}")
    for entry in answer["table"]:
        placed = entry.get("placed")
        if placed and placed["searched"] and entry["feasible"]:
            told = f"busiest rank {significant(placed['max_rank_load'])}"
            if placed["objective_before"] is not None:
                values = (entry["objective"], placed["objective_before"])
                now, before = (_objective(answer["objective"], value) for value in values)
                told = f"{answer['objective']} {now} instead of {before}, {told}"
            yield Text(f"at {entry['load']:g} req/s the placement is one that was looked for at a decision: {told}")
    sizes = [entry for entry in answer["table"] if entry["drafter_size"]]
    if sizes:
        told = "; ".join(
            f"{entry['load']:g}: {significant(entry['drafter_size']['drafter_params'])} parameters "
            f"(acceptance rate {significant(entry['drafter_size']['acceptance_rate'])})"
            for entry in sizes
        )
        yield Text(f"best size between those of the catalogue, by load: {told}")
    if answer["optimality_gap"] is not None:
        gap = percent(answer["optimality_gap"])
        yield Text(f"the relaxation, rounded and improved, is within {gap} of exhaustive search")
    yield from assumed(answer)


def _drafter(entry: Mapping[str, Any]) -> str:
    if not entry["feasible"]:
        return "none will do"
    return entry["drafter"] if any(entry["draft_lengths"].values()) else "no speculation"


def _draft(entry: Mapping[str, Any]) -> str:
    """Draft lengths of the classes, or the tree that all draw."""
    if entry["tree"] is not None:
        return f"tree: {entry['tree']['nodes']} nodes, {entry['tree']['depth']} deep, {entry['tree']['width']} wide"
    return ", ".join(f"{name} {length}" for name, length in entry["draft_lengths"].items())


def _common(goal: str, common: Mapping[str, Any]) -> str:
    if not common["feasible"]:
        return "none"
    tree = common.get("tree")
    drafted = common["draft_length"] if tree is None else f"tree of {tree['nodes']}, {tree['depth']} deep"
    return f"{common['drafter']} {drafted}: {_objective(goal, common['objective'])}"


def _objective(text: str, value: float | None) -> str:
    """In the unit of its terms; bare where they have several."""
    units = {METRIC_UNITS.get(term.rpartition("*")[2].strip(), "s") for term in text.split("+")}
    return quantity(value, units.pop()) if len(units) == 1 else significant(value)
