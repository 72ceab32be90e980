"""What `diffspec simulate` says: of the schedule and the arrivals that were replayed, then the numbers."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from diffspec.report import tables
from diffspec.report.numbers import significant


def simulation(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The schedule and the arrivals, where there are any, before :func:`diffspec.report.tables.simulation`."""
    schedule, arrivals = answer.get("schedule"), answer.get("arrivals")
    if schedule is not None:
        tiers = ", ".join(f"{k} at batches {first} to {last}" for first, last, k in schedule["ranges"])
        bands = "".join(f"; on above {up}, back below {down}" for down, up in schedule["bands"] or ())
        yield Text(f"draft length {tiers}{bands}; {significant(schedule['switches'])} changes in a replication")
    if arrivals is not None:
        run = "" if arrivals["run"] is None else f", run {arrivals['run']}"
        yield Text(
            f"{arrivals['file']}{run} ({arrivals['format']}): {arrivals['n_requests']:.0f} arrivals in "
            f"{significant(arrivals['duration'])} s, {significant(arrivals['arrival_rate'])} req/s, scv "
            f"{significant(arrivals['arrival_scv'])}; the model's numbers are those of a steady load like it"
        )
    yield from tables.simulation(answer)
