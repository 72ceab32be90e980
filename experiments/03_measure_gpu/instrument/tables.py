"""Tables that survive an interruption, and runs of the loop as rows of diffspec's two tables. No torch here."""

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .loop import Load, Run, Settings

STATISTICS = ("mean", "p50", "p90", "p95", "p99")


class Table:
    """A CSV file to which rows are appended, each written out at once. `key` names the columns that identify a row.

    Rows of an earlier run are kept when `resume` is set, and the file begins anew otherwise. A last line that was cut
    off is dropped.
    """

    def __init__(self, path: Path, columns: Iterable[str], key: Iterable[str] = (), resume: bool = False):
        self.path, self.columns, self.key = path, tuple(columns), tuple(key)
        self.rows: list[dict[str, str]] = []
        if resume and path.exists():
            text = path.read_text(encoding="utf-8")
            lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
            reader = csv.DictReader(lines)
            if tuple(reader.fieldnames or self.columns) != self.columns:
                raise ValueError(f"{path}: its columns are those of another version; move it away or drop --resume")
            self.rows = [row for row in reader if None not in row.values()]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite()

    def _rewrite(self) -> None:
        self.done = {tuple(row[name] for name in self.key) for row in self.rows}
        with self.path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def keep(self, wanted: Callable[[dict[str, str]], bool]) -> "Table":
        """Drop every row but those wanted; returns the table."""
        self.rows = [row for row in self.rows if wanted(row)]
        self._rewrite()
        return self

    def has(self, **identity: Any) -> bool:
        """Whether a row with these values of the key columns is there."""
        return tuple(_text(identity[name]) for name in self.key) in self.done

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Append rows to the file; None and NaN become empty cells."""
        texts = [{name: _text(row.get(name)) for name in self.columns} for row in rows]
        for row in rows:
            if unknown := set(row) - set(self.columns):
                raise ValueError(f"{self.path.name} has no column {', '.join(sorted(unknown))}")
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns).writerows(texts)
        self.rows += texts
        self.done |= {tuple(row[name] for name in self.key) for row in texts}


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (float, np.floating)):
        return f"{float(value):.8g}"
    return str(value)


def spread(values: np.ndarray) -> dict[str, float]:
    """`step_time_s` (the median), `p10`, `p90` and `n` of repeated timings [s]."""
    low, middle, high = np.percentile(values, (10, 50, 90))
    return {"step_time_s": float(middle), "p10": float(low), "p90": float(high), "n": len(values)}


IDENTITY = ("deployment", "run", "method", "draft_length", "arrival_rate", "arrival_process", "max_batch_size")
REQUEST_COLUMNS = (
    *IDENTITY,
    "max_batched_tokens",
    *("arrival_time", "schedule_time", "first_token_time", "completion_time", "prompt_tokens", "output_tokens"),
    *("drafted_tokens", "accepted_tokens", "stream_events", "ok", "measured"),
)
POINT_COLUMNS = (
    *("deployment", "run", "engine", "hardware", "verifier", "drafter", "workload", "method", "draft_length"),
    *("rejection", "verifier_params", "drafter_params", "drafter_layers", "num_experts", "experts_per_token"),
    *("kv_bytes_per_token", "arrival_rate", "arrival_process", "arrival_scv", "max_batch_size"),
    *("max_batched_tokens", "kv_capacity_tokens", "prompt_length", "output_length", "prompt_scv", "output_scv"),
    *("tokens_per_step", "acceptance_rate", "position_acceptance", "n_requests", "failed", "throughput"),
    *(f"{metric}_{statistic}" for metric in ("ttft", "itl", "tpot", "e2e") for statistic in STATISTICS),
    *(
        "window",
        "offered_rate",
        "effective_batch_size",
        "waiting_mean",
        "imposed_acceptance",
        "load_fraction",
        "seed",
        "device_seconds",
    ),
)
STEP_COLUMNS = ("run", "decoding", "prompt_tokens", "steps", "step_time_mean_s", "cached_tokens_mean")


def request_rows(run: Run, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The events of a run as rows of diffspec's request table [s, tok], with what `identity` has for its columns."""
    given = {name: identity[name] for name in REQUEST_COLUMNS if name in identity}
    return [
        {
            **given,
            "arrival_time": each.arrival_time,
            "schedule_time": each.schedule_time,
            "first_token_time": each.first_token_time,
            "completion_time": each.completion_time,
            "prompt_tokens": each.prompt_tokens,
            "output_tokens": each.output_tokens if not math.isnan(each.completion_time) else each.emitted,
            "drafted_tokens": each.drafted_tokens,
            "accepted_tokens": each.accepted_tokens,
            "stream_events": each.stream_events,
            "ok": int(not math.isnan(each.completion_time)),
            "measured": int(each.measured),
        }
        for each in run.requests
    ]


def step_rows(run: Run, name: str) -> list[dict[str, Any]]:
    """The steps of a run, one row for each pair (decoding requests, prompt tokens) that came up."""
    return [
        {
            "run": name,
            "decoding": decoding,
            "prompt_tokens": prompt,
            "steps": int(count),
            "step_time_mean_s": seconds / count,
            "cached_tokens_mean": cached / count,
        }
        for (decoding, prompt), (count, seconds, cached) in sorted(run.steps.items())
    ]


def operating_point(run: Run, load: Load, settings: Settings) -> dict[str, Any]:
    """The load, speculation and observed columns of diffspec's operating-point table for a run.

    Latencies [s] are those of the measured requests. The window is from the first measured arrival to the last one:
    `throughput` counts completions in it, `effective_batch_size` and `waiting_mean` are integrals over it of the
    requests in the system and of those not yet scheduled, so Little's law is a check and not a definition.
    """
    counted = [each for each in run.requests if each.measured]
    done = [each for each in counted if not math.isnan(each.completion_time)]
    k = settings.draft_length
    row: dict[str, Any] = {
        "method": "draft_model" if k else "none",
        "draft_length": k,
        "rejection": "synthetic" if k else "none",
        "arrival_rate": load.arrival_rate,
        "arrival_process": load.process,
        "max_batch_size": settings.max_batch_size,
        "max_batched_tokens": settings.max_batched_tokens,
        "prompt_length": float(np.mean([each.prompt_tokens for each in counted])),
        "output_length": float(np.mean([each.output_tokens for each in counted])),
        "n_requests": len(done),
        "failed": len(counted) - len(done),
        "imposed_acceptance": ";".join(f"{rate:g}" for rate in settings.acceptance) or None,
        "device_seconds": sum(seconds for _, seconds, _ in run.steps.values()),
    }
    if load.drawn:
        for name in ("prompt", "output"):
            lengths = np.array([getattr(each, f"{name}_tokens") for each in counted], float)
            row[f"{name}_scv"] = float(np.var(lengths) / np.mean(lengths) ** 2)
    if k and run.reached[0]:
        shares = [a / r for a, r in zip(run.accepted.tolist(), run.reached.tolist(), strict=True) if r]
        row["tokens_per_step"] = 1.0 + float(run.accepted.sum() / run.reached[0])
        # positions that were never reached have no measured rate, and then the list would be too short
        row["position_acceptance"] = ";".join(f"{share:.4f}" for share in shares) if len(shares) == k else None
    if not done:
        return row
    arrival, first, completion, output = (
        np.array([getattr(each, name) for each in done], float)
        for name in ("arrival_time", "first_token_time", "completion_time", "output_tokens")
    )
    several = output > 1
    latencies = {
        "ttft": first - arrival,
        "itl": run.gaps,
        "tpot": ((completion - first)[several]) / (output[several] - 1),
        "e2e": completion - arrival,
    }
    for metric, values in latencies.items():
        if len(values):
            numbers = (float(np.mean(values)), *np.percentile(values, (50, 90, 95, 99)).tolist())
            row |= {f"{metric}_{statistic}": number for statistic, number in zip(STATISTICS, numbers, strict=True)}
    return row | _over_window(
        run, min(each.arrival_time for each in counted), max(each.arrival_time for each in counted)
    )


def _over_window(run: Run, start: float, end: float) -> dict[str, Any]:
    if end <= start:
        return {}
    arrival, schedule, completion = (
        np.array([getattr(each, name) for each in run.requests], float)
        for name in ("arrival_time", "schedule_time", "completion_time")
    )

    def mean_number(begun: np.ndarray, ended: np.ndarray) -> float:
        ended = np.where(np.isnan(ended), np.inf, ended)
        return float(np.clip(np.minimum(ended, end) - np.maximum(begun, start), 0.0, None).sum() / (end - start))

    measured = sum(each.measured for each in run.requests)
    return {
        "window": "steady",  # load went on before and after
        "offered_rate": measured / (end - start),
        "throughput": float(np.sum((completion >= start) & (completion <= end)) / (end - start)),
        "effective_batch_size": mean_number(arrival, completion),
        "waiting_mean": mean_number(arrival, schedule),
    }
