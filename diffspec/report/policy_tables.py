"""What `diffspec policy` says: what to do, the schedule and its bands, and what it gains at each load; and the draft
lengths of a fleet."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from diffspec.report.fitting_tables import MOST_SHOWN
from diffspec.report.numbers import NONE, metric_value, percent, significant
from diffspec.report.tables import assumed, measured, table

SHOWN = ("ttft_mean", "tpot_mean", "e2e_mean", "throughput")


def load_policy(answer: Mapping[str, Any], with_files: bool = True) -> Iterator[RenderableType]:
    """The schedule of each context length, then exports, ``with_files``: with their text."""
    if answer["outcome"] == "does_not_fit":
        yield from assumed(answer, f"{answer['deployment']}: does_not_fit")
        return
    for context in answer["contexts"]:
        yield from _context(answer, context)
    yield from measured(answer)
    for made in answer.get("exports", ()):
        version = "" if made["version"] is None else f" {made['version']}"
        yield Text(f"{made['engine']}{version}: {made['file']}", style="bold")
        if made["flag"]:
            yield Text(made["flag"])
        if with_files and made["engine"] not in ("vllm", "json"):
            yield Text(made["text"].rstrip())
        for line in made["notes"]:
            yield Text(f"  {line}")
    yield from assumed(answer)


def _context(answer: Mapping[str, Any], context: Mapping[str, Any]) -> Iterator[RenderableType]:
    length = context["context_length"]
    name = answer["deployment"] if length is None else f"{answer['deployment']}, {length:g} cached tokens a request"
    for line in context["advice"]:
        yield Text(f"{name}: {line}", style="bold")
    rows = [
        (
            f"{tier['first_batch']} to {tier['last_batch']}",
            str(tier["draft_length"]),
            _with_interval(tier["speedup"], tier["speedup_interval"]),
            _with_interval(tier["speedup_over_static"], tier["speedup_over_static_interval"]),
            significant(tier["breakeven_acceptance_rate"]) if tier["draft_length"] else NONE,
            significant(tier["breakeven_tokens_per_step"]) if tier["draft_length"] else NONE,
            percent(tier["probability_best"]),
        )
        for tier in context["tiers"]
    ]
    best = f"over k = {context['static_draft_length']}"
    columns = ("batch", "draft length", "speedup", best, "pays above acceptance", "tokens a step", "best in draws")
    yield table(f"{name}: draft length by batch, risk {answer['risk']}", columns, rows)
    for band in context["bands"]:
        told = band["threshold_interval"]
        where = "" if told is None else f" (90 %: {told['low']:g} to {told['high']:g})"
        yield Text(
            f"threshold {band['threshold']}{where}: go on above {band['up']}, back below {band['down']}; at "
            f"{significant(band['arrival_rate'])} req/s {significant(band['switches_per_minute'])} switches a minute, "
            f"{significant(band['without_band'])} without the band"
        )
    metrics = [name for name in SHOWN if any(name in entry["metrics"] for entry in context["loads"])]
    rows = [
        (
            f"{entry['load']:.4g}",
            f"{entry['batch_mean']:.1f} ± {entry['batch_deviation']:.1f}",
            ", ".join(f"{k}: {percent(share)}" for k, share in entry["time_share"].items() if share >= 0.005),
            *(metric_value(name, entry["metrics"].get(name)) for name in metrics),
            _with_interval(entry["speedup"], entry["speedup_interval"]),
            _with_interval(entry["speedup_over_static"], entry["speedup_over_static_interval"]),
            "saturated" if entry["saturated"] else "yes" if entry["feasible"] else "no",
        )
        for entry in context["loads"]
    ]
    columns = ("load", "batch", "time at", *metrics, "speedup", best, "feasible")
    yield table(f"{name}: under the schedule", columns, rows)
    for entry in context["loads"]:
        for limit, missed in entry["violations"].items():
            metric = limit.split("<")[0].split(">")[0]
            yield Text(f"load {entry['load']:.4g}: {limit} fails: {metric_value(metric, missed['value'])}")
    yield Text(f"k = {context['static_draft_length']}: the best one draft length for all these loads")
    gain = context["gain"]
    if gain["speedup"] is not None:
        yield Text(
            f"over these loads {_with_interval(gain['speedup'], gain['speedup_interval'])} times as fast as no "
            f"speculation, {_with_interval(gain['speedup_over_static'], gain['speedup_over_static_interval'])} times "
            f"as fast as draft length {context['static_draft_length']}"
        )


def _with_interval(value: float | None, edges: Mapping[str, float | None] | None) -> str:
    """A ratio with its 90 % interval; the side that is not bounded is left open."""
    if edges is None or edges["low"] is None:
        return significant(value)
    high = "" if edges["high"] is None else significant(edges["high"])
    return f"{significant(value)} ({significant(edges['low'])} to {high or 'any'})"


def fleet_policies(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `diffspec optimize FOLDER` says: the draft length of each deployment at each load."""
    rows = []
    for one in answer["deployments"][:MOST_SHOWN]:
        cells = [NONE] * len(answer["loads"]) if one["error"] else []
        for entry in one["table"]:
            gain = f" ({entry['speedup']:.2f} times)" if entry["speedup"] else ""
            cells.append(f"{entry['draft_length']}{gain}" if entry["feasible"] else "none will do")
        rows.append((one["deployment"], *cells))
    unit = "req/s" if answer["loop"] == "arrival_rate" else "in flight"
    columns = ("deployment", *(f"{load:g} {unit}" for load in answer["loads"]))
    yield table(f"draft length by load: {answer['outcome']}", columns, rows, left=1)
    hidden = len(answer["deployments"]) - MOST_SHOWN
    if hidden > 0:
        yield Text(f"and {hidden} more deployments; --json or --out has all")
