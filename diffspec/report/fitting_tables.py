"""Tables of what to measure next, of what new rows changed in a fitted model, and of a fleet of fits."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from diffspec.report.numbers import NONE, percent, quantity, significant
from diffspec.report.tables import table

MOST_SHOWN = 40
"""Traces or deployments of a fleet that a table shows."""


def next_runs(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `diffspec design` says: the runs to make, what each tells, and what becomes surer."""
    rows, former = [], answer["before"]
    for number, point in enumerate(answer["points"], start=1):
        closed = "concurrency" in point
        load = f"{point['concurrency']:g} in flight" if closed else f"{significant(point['arrival_rate'])} req/s"
        lengths = f"{point['prompt_length']:g}+{point['output_length']:g}"
        fall = f"{percent(former)} to {percent(point['after'])}"
        rows.append(
            (str(number), load, str(point["draft_length"]), lengths, point["tells"], fall, percent(point["share"]))
        )
        former = point["after"]
    columns = ("", "load", "draft length", "prompt+output", "tells", "uncertainty", "share of gain")
    yield table(f"{answer['deployment']}: runs to make next, for {answer['criterion']}", columns, rows, left=5)
    shown = list(answer["expected"].items())
    rows = [(name, percent(told["before"]), percent(told["after"])) for name, told in shown]
    yield table("typical standard deviation", ("of", "now", "expected"), rows)
    told = f"{percent(answer['before'])} to {percent(answer['after'])}, {percent(answer['expected_gain'])} less"
    yield Text(f"expected: {told}, each run with {answer['points'][0]['requests']} requests")


def update_summary(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `diffspec fit --update` says: per deployment the errors on the new rows, what moved, and what changed."""
    for entry in answer["update"]:
        name, skipped = entry["deployment"], entry["skipped"]
        rows = [
            (column, str(told["rows"]), *(percent(told[when]) for when in ("before", "one_ahead", "after")))
            for column, told in entry["observables"].items()
        ]
        heads = ("mean error", "rows", "before", "one row ahead", "after")
        yield table(f"{name}: {entry['rows']} new rows", heads, rows, left=1)
        moved = [
            (
                told["parameter"],
                *(quantity(told[when], told["unit"]) for when in ("from", "to")),
                f"{told['deviations']:+.1f}",
            )
            for told in entry["moved"]
        ]
        yield table(f"{name}: parameters moved most", ("parameter", "from", "to", "deviations"), moved, left=1)
        for reason, count in entry["set_aside"].items():
            yield Text(f"{count} rows set aside: {reason}")
        if skipped:
            yield Text(f"{skipped} rows skipped: the model expects them to saturate")
        for change in entry["drift"]:
            yield Text(f"changed: {change['text']}")
        if not entry["drift"]:
            yield Text("no change found")


def shortened(text: str, most: int = 120) -> str:
    """The beginning of a long sentence."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def fleet(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `diffspec fit --fleet` says: what became of each trace, the first of them where there are many."""
    rows = [
        (
            entry["name"],
            "kept from before" if entry["resumed"] else entry["outcome"],
            NONE if entry["model"] is None else f"{entry['rows']}",
            f"{entry['seconds']:.1f} s",
            entry["model"] or shortened(entry["error"]),
        )
        for entry in answer["traces"][:MOST_SHOWN]
    ]
    title = f"{answer['fitted']} fitted ({answer['resumed']} of them before), {answer['failed']} failed"
    yield table(title, ("trace", "", "rows", "took", "model"), rows, left=2)
    hidden = len(answer["traces"]) - MOST_SHOWN
    if hidden > 0:
        yield Text(f"and {hidden} more; --json names all, and so does fleet.jsonl in {answer['out']}")
