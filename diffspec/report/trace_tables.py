"""What is said about traces: plans, collections, imports, acceptance. Plain dicts in, rich renderables out."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType

from diffspec.report.numbers import NONE, milliseconds, significant
from diffspec.report.tables import check_summary, table


def _load(row: Mapping[str, Any]) -> str:
    if row.get("arrival_rate") is not None:
        return f"{row['arrival_rate']:g} req/s"
    return f"{row['concurrency']:g} in flight" if row.get("concurrency") is not None else "replay"


def duration(seconds: float) -> str:
    """A time a person can plan with.

    >>> duration(75), duration(5400)
    ('1 min 15 s', '1 h 30 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def plan_summary(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `diffspec collect --dry-run` says."""
    rows = [
        (
            cell["name"],
            _load(cell),
            f"{cell['prompt_length']:g} / {cell['output_length']:g}",
            str(cell["requests"]),
            duration(cell["seconds"]) if cell["arrival_rate"] else f"up to {duration(cell['seconds_at_most'])}",
        )
        for cell in answer["cells"]
    ]
    yield table("cells", ("cell", "load", "prompt / output [tok]", "requests", "time"), rows, left=2)
    limits = answer["limits"]
    yield (
        f"{len(rows)} cells, about {answer['requests']} requests (caps: {limits['max_requests']} requests, "
        f"{limits['max_rate']:g} req/s); "
        f"about {duration(answer['seconds'])}, at most {duration(answer['seconds_at_most'])}; nothing was sent"
    )


def operating_points(rows: list[Mapping[str, Any]], title: str) -> RenderableType:
    """Operating points, one line each."""

    def time(value: Any) -> str:
        return NONE if value is None else milliseconds(value)

    shown = [
        (
            str(row.get("run") or ""),
            _load(row),
            NONE if row.get("draft_length") is None else f"{row['draft_length']:g}",
            NONE if row.get("tokens_per_step") is None else f"{row['tokens_per_step']:.2f}",
            str(int(row.get("n_requests") or 0)),
            NONE if row.get("throughput") is None else significant(row["throughput"]),
            *(time(row.get(f"{metric}_mean")) for metric in ("ttft", "itl", "tpot", "e2e")),
        )
        for row in rows
    ]
    columns = ("run", "load", "k", "tokens/step", "requests", "req/s", "ttft", "itl", "tpot", "e2e")
    return table(title, columns, shown, left=2)


def collected(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `diffspec collect` says."""
    yield operating_points(answer["cells"], "measured cells (means)")
    kept = f", {len(answer['kept'])} kept from before" if answer["kept"] else ""
    client = answer["client"]
    yield f"{len(answer['measured'])} cells measured{kept}; table: {answer['table']}"
    if client["send_lag_p99"] is not None:
        yield (
            f"the client's own part: {1e3 * client['cpu_seconds_per_request']:.2f} ms of CPU a request; 99 % of the "
            f"requests left within {1e3 * client['send_lag_p99']:.2f} ms of their time"
        )


def acceptance(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `diffspec acceptance` says."""
    if answer["profile"] is not None:
        rows = [
            (str(i), f"{c:.3f}", f"{m:.3f}")
            for i, (c, m) in enumerate(
                zip(answer["profile"]["conditional"], answer["profile"]["marginal"], strict=True), 1
            )
        ]
        yield table("acceptance of the profile", ("draft position", "conditional", "marginal"), rows)
        yield f"tokens per step {answer['profile']['tokens_per_step']:.3f} (bonus included)"
        return
    for group in answer["groups"]:
        name = ", ".join(f"{key} {value}" for key, value in group["group"].items()) or "all"
        rows = [
            (
                str(entry["position"]),
                f"{entry['acceptance']:.3f}",
                f"{entry['low']:.3f} to {entry['high']:.3f}",
                f"{entry['reached']:.0f}",
            )
            for entry in group["positions"]
        ]
        yield table(
            f"{name}: {group['units']} {group['unit']}s",
            ("draft position", "conditional acceptance", "95 % interval", "steps that reached it"),
            rows,
        )
        yield f"tokens per step {group['tokens_per_step']:.3f} (bonus included); {_trend(group)}"


def _trend(group: Mapping[str, Any]) -> str:
    if group["slope"] is None:
        return "one position alone has no trend"
    interval = f"{group['slope']:+.3f} a position (95 %: {group['slope_low']:+.3f} to {group['slope_high']:+.3f})"
    words = {
        "falls": "acceptance falls along the draft",
        "rises": "acceptance rises along the draft",
        "level": "acceptance is level along the draft",
        "cannot tell": "whether acceptance falls along the draft cannot be told",
    }
    return f"{words[group['verdict']]}: {interval}"


def imported(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `diffspec import` says."""
    files = [(entry["file"], entry["format"], entry["gives"]) for entry in answer["files"]]
    yield table("recognised", ("file", "format", "gives"), files[:20], left=3)
    for name, handled in {entry["format"]: entry["handled"] for entry in answer["files"]}.items():
        yield f"{name}: {handled}"
    if len(files) > 20:
        yield f"... and {len(files) - 20} more files"
    for entry in answer["arrivals"]:
        yield arrivals(entry)
    if answer["rows"]:
        yield operating_points(answer["table"][:20], f"{answer['rows']} operating points (means)")
        if answer["rows"] > 20:
            yield f"... and {answer['rows'] - 20} more rows"
        yield from check_summary(answer)


def arrivals(entry: Mapping[str, Any]) -> RenderableType:
    """A log of arrivals, summarised."""
    rows = [(name.replace("_", " "), significant(value)) for name, value in entry.items() if name != "file"]
    return table(f"arrivals in {entry['file']}", ("quantity", "value"), rows)
