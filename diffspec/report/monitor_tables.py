"""What `diffspec monitor` says: one table for each window, a line for what is no window, a summary at the end."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from diffspec.report.numbers import NONE, milliseconds, percent, significant
from diffspec.report.tables import table

LATENCIES = {"ttft": "ttft", "itl": "itl", "tpot": "tpot", "e2e_latency": "end to end"}
_LEAST_GAIN = 0.01


def clock(moment: float) -> str:
    """A unix time as hours, minutes and seconds in UTC.

    >>> clock(3661.4)
    '01:01:01'
    """
    return datetime.fromtimestamp(moment, UTC).strftime("%H:%M:%S")


def event(told: Mapping[str, Any]) -> Group:
    """One event of :class:`diffspec.monitoring.monitor.Monitor`."""
    return Group(*_event(told))


def _event(told: Mapping[str, Any]) -> Iterator[RenderableType]:
    when, predicted, seen = clock(told["time"]), told["predicted"], told["measured"]
    if predicted is None:
        why = "; ".join(told["notes"])
        yield Text(f"{when} {told['event']}{': ' if why else ''}{why}", style="" if seen or not why else "yellow")
        return
    rows = []
    for metric, name in LATENCIES.items():
        asked, residual = predicted[metric], (told["residuals"] or {}).get(metric, {})
        low, high = (milliseconds(asked[edge]) for edge in ("low", "high"))
        inside = NONE if NONE in (low, high) else f"{low} to {high}"
        sigma = f"{residual['log_ratio'] / residual['scale']:+.1f}" if residual else NONE
        rows.append((name, milliseconds(seen[metric]), milliseconds(asked["value"]), inside, sigma))
    batch = predicted["effective_batch_size"]
    inside = NONE if batch["low"] is None else f"{significant(batch['low'])} to {significant(batch['high'])}"
    rows.append(("batch", significant(seen["effective_batch_size"]), significant(batch["value"]), inside, NONE))
    title = f"{when} {told['deployment']}: {significant(seen['arrival_rate'])} req/s, {seen['requests']:g} requests in "
    title += f"{told['duration']:.3g} s"
    yield table(title, ("", "measured", "predicted", "90 %", "deviation"), rows)
    if predicted["stages"] is not None:
        shares = (f"{stage} {percent(share)}" for stage, share in predicted["stages"].items())
        yield Text(f"stages: {', '.join(shares)}")
    running = f"{significant(seen['running'])} running, {significant(seen['waiting'])} waiting"
    yield Text(
        f"{running}; capacity {significant(predicted['capacity']['value'])} req/s, utilization "
        f"{percent(predicted['utilization']['value'])}, headroom {percent(predicted['headroom'])}"
    )
    if told["acceptance"] is not None:
        known = told["acceptance"]
        yield Text(
            f"tokens per step {significant(known['tokens_per_step'])} at draft length {known['draft_length']}, "
            f"{significant(known['expected_tokens_per_step'])} expected"
        )
    if predicted["draft_length"] is not None:
        yield Text(advice(predicted["draft_length"]))
    for change in told["anomalies"]:
        yield Text(change["text"], style="bold" if change["back"] else "bold red")
    if not told["anomalies"]:
        for entry in told["standing"]:
            yield Text(f"still: {entry['what']} {percent(entry['change'])} since {clock(entry['since'])}")
    for line in told["notes"]:
        yield Text(line)


def advice(told: Mapping[str, Any]) -> str:
    """The best draft length now, in words.

    >>> advice({"now": 4.0, "best": 4, "gain": 0.0})
    'draft length 4 is the best now'
    """
    now, best, gain = told["now"], told["best"], told["gain"]
    if best is None:
        return "no draft length sustains this load"
    if best == now:
        return f"draft length {best} is the best now"
    if gain is None:
        return f"draft length {best} would sustain this load, {now:g} does not"
    if gain < _LEAST_GAIN:
        return f"draft length {now:g} is as good as the best now, {best} (gain {percent(gain)})"
    low, high = told["low"], told["high"]
    edges = "" if low is None or high is None else f" (90 %: {percent(low)} to {percent(high)})"
    outside = "" if told["inside_measured"] else ", beyond what was measured"
    return f"draft length {best} would be the best now{outside}: latency at {now:g} is {percent(gain)} longer{edges}"


def summary(told: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The end of a watch."""
    counts = ", ".join(f"{count} {kind}" for kind, count in told["events"].items() if count)
    yield Text(
        f"{told['deployment']}: {told['scrapes']} scrapes ({counts}), {told['compared']} windows compared", style="bold"
    )
    if told["bias"]:
        biases = (f"{LATENCIES.get(name, name)} {percent(value)}" for name, value in told["bias"].items())
        yield Text(f"measured over predicted, - 1, on average: {', '.join(biases)}")
    for change in told["anomalies"]:
        yield Text(change["text"], style="bold" if change["back"] else "bold red")
    if not told["compared"]:
        yield Text("no window could be compared with the model")
    elif not told["anomalies"]:
        yield Text("nothing changed")
