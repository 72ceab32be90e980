"""What the readers of benchmark JSON share: typed access to a record, its load, and its latencies."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..json_text import loads
from ..problems import Problem
from ..schema import METRICS, PERCENTILES

SEVERAL = 1.25
"""Tokens in a stream event from which on an engine is taken to draft."""
WAITED = 0.02
"""Share of e2e that requests may wait in the client before an open loop is no open loop any more."""
LARGEST = 1e30
"""No number of a benchmark is larger, and none but 0 is below ``1/LARGEST``: products and quotients stay finite."""


class Unit(NamedTuple):
    """How a format names latencies and in what unit: the end of the key, and how many of the unit make a second."""

    suffix: str
    per_second: float


MILLISECONDS, SECONDS = Unit("_ms", 1000.0), Unit("", 1.0)


class Record:
    """Typed access to the keys of one JSON object; what has the wrong type becomes a problem and reads as missing.

    >>> source = Record({"completed": "8", "metrics": {"mean": 2}})
    >>> source.number("completed"), source.sub("metrics").number("mean"), source.number("absent")
    (nan, 2.0, nan)
    >>> source.problems[0].line()
    "column 'completed': got '8'; allowed: a finite number, at least 0"
    """

    def __init__(self, record: Mapping[str, Any], prefix: str = "", problems: list[Problem] | None = None):
        self.record, self.prefix = record, prefix
        self.problems: list[Problem] = [] if problems is None else problems

    def complain(
        self, key: str | None, message: str = "", allowed: str | None = None, advice: str | None = None
    ) -> None:
        """A problem with the value of `key`, or with the whole record; the first for each key counts."""
        name = None if key is None else self.prefix + key
        if name is None or all(problem.column != name for problem in self.problems):
            got = self.record.get(key or "")
            self.problems.append(Problem(message, None, None, name, got, allowed, advice))

    def number(self, key: str, low: float = 0.0) -> float:
        """A finite number >= `low`, NaN when the key is absent or null."""
        value = self.record.get(key)
        if value is None:
            return math.nan
        try:
            if isinstance(value, (bool, str, list, dict)):
                raise TypeError
            number = float(value)
        except (TypeError, OverflowError):
            number = math.inf
        if low <= number <= LARGEST:
            return number if abs(number) * LARGEST >= 1 else 0.0
        most = f" and at most {LARGEST:g}" if LARGEST < number < math.inf else ""
        self.complain(key, allowed=f"a finite number, at least {low:g}{most}")
        return math.nan

    def numbers(self, key: str) -> list[float] | None:
        """A list of finite numbers >= 0, None when the key is absent or null."""
        value = self.record.get(key)
        if value is None:
            return None
        found = finite(value)
        if found is None:
            self.complain(key, allowed="a list of finite numbers, at least 0")
        return found

    def text(self, key: str) -> str | None:
        """A text without blanks around it; None when it is absent, empty, or no text."""
        return text(self.record.get(key))

    def sub(self, key: str) -> "Record":
        """The object under `key`, an empty one where it is absent or null; problems go to the same list."""
        value = self.record.get(key)
        if value is not None and not isinstance(value, dict):
            self.complain(key, allowed="an object")
        return Record(value if isinstance(value, dict) else {}, f"{self.prefix}{key}.", self.problems)

    def of_successes(self, key: str) -> np.ndarray | None:
        """The numbers of a per-request list without the requests that `errors` marks; None where there are none."""
        values, errors = self.numbers(key), self.record.get("errors")
        if not values:
            return None
        errors = errors if isinstance(errors, list) else []
        kept = [value for index, value in enumerate(values) if index >= len(errors) or not errors[index]]
        return np.array(kept) if kept else None


def finite(value: Any) -> list[float] | None:
    """A list of finite numbers from 0 to `LARGEST` as floats, None for anything else."""
    if not isinstance(value, list) or any(type(item) not in (int, float) for item in value):
        return None
    try:
        numbers = [float(item) for item in value]
    except OverflowError:
        return None
    if not all(0 <= item <= LARGEST for item in numbers):
        return None
    return [item if item * LARGEST >= 1 else 0.0 for item in numbers]


def text(value: Any) -> str | None:
    """A text without blanks around it; None when it is empty or no text."""
    return value.strip() or None if isinstance(value, str) else None


def read_load(source: Record, row: dict, notes: list[str]) -> None:
    """`request_rate`, `max_concurrency` and `burstiness` of `vllm bench serve` and `sglang.bench_serving`.

    An infinite rate ("inf", or bare `Infinity`) with a cap is a closed loop; without one it is a burst and a problem.
    """
    rate, cap = source.record.get("request_rate"), source.number("max_concurrency")
    rate = rate.strip().lower() if isinstance(rate, str) else rate
    if rate in ("inf", "infinity", math.inf):
        if math.isnan(cap):
            source.complain(
                "max_concurrency",
                "an infinite request_rate without max_concurrency is one burst: neither an open nor a closed loop",
                "a finite request_rate, or max_concurrency",
                "run again with --request-rate R or --max-concurrency N",
            )
        row["concurrency"] = cap
        return
    if rate == "trace":
        source.complain("request_rate", "the times of a trace were replayed: there is no steady rate", "a number")
        return
    if rate is None:
        source.complain("request_rate", "the key is missing", 'a number or "inf"')
        return
    try:
        value = float(rate) if isinstance(rate, str) else rate
    except ValueError:
        source.complain("request_rate", allowed='a number or "inf"')
        return
    row["arrival_rate"] = Record({"request_rate": value}, source.prefix, source.problems).number("request_rate")
    burstiness = source.record.get("burstiness")
    shape = 1.0 if burstiness is None else math.inf if burstiness in ("inf", math.inf) else source.number("burstiness")
    if shape == 0:
        source.complain("burstiness", allowed="above 0")
    elif not math.isnan(shape):
        row["arrival_scv"] = 1.0 / shape
        row["arrival_process"] = "poisson" if shape == 1 else "constant" if math.isinf(shape) else "gamma"
    if source.record.get("ramp_up_strategy"):
        notes.append("the request rate was ramped up: request_rate is no steady arrival rate")


def note_waiting(source: Record, row: dict, notes: list[str]) -> None:
    """Say when the arrivals of an open loop ran into `max_concurrency` and waited in the client, unmeasured."""
    cap = source.number("max_concurrency")
    if "arrival_rate" not in row or math.isnan(cap):
        return
    waits, e2e = finite(source.record.get("queue_times")), row.get("e2e_mean", math.nan)
    wait = float(np.mean(waits)) if waits else source.number("mean_client_queue_time_ms") / 1000
    if math.isnan(wait) or math.isnan(e2e):
        held = source.number("max_concurrent_requests") >= cap or source.number("concurrency") >= 0.9 * cap
    else:
        held = wait > WAITED * e2e
    if held:
        known = f" {wait:.3g} s on average" if wait > 0 else ""
        notes.append(
            f"arrivals at {row['arrival_rate']:g} req/s ran into max_concurrency {cap:g}: requests waited{known} in "
            "the client, so the loop was neither open nor closed; read as open"
        )


def read_latencies(source: Record, row: dict, unit: Unit, keys: Mapping[str, str] | None = None) -> None:
    """Fill the latencies [s] from ``mean_<key><suffix>``, ``median_...`` and ``p<percent>_...``; `keys`: the name of a
    metric in the format where it is not ours."""
    single = row.get("output_length") == 1
    for metric in METRICS:
        key = (keys or {}).get(metric, metric) + unit.suffix
        names = {f"mean_{key}": "mean", f"median_{key}": "p50"} | {f"p{p[1:]}_{key}": p for p in PERCENTILES}
        for name, statistic in names.items():
            value = source.number(name) / unit.per_second
            # One output token has no gap, and the client writes 0 for "no such sample".
            if not math.isnan(value) and not (metric in ("itl", "tpot") and value == 0 and (single or "mean" in name)):
                row[f"{metric}_{statistic}"] = value


def note_several_tokens(row: dict, notes: list[str], told: bool = True) -> None:
    """Say when the gaps between stream events hold several tokens, but the file speaks of no drafts. Where the client
    could not know of drafts (not `told`), the tokens of an event stand for `tokens_per_step`."""
    gap, token = row.get("itl_mean", math.nan), row.get("tpot_mean", math.nan)
    if row.get("draft_length") or "tokens_per_step" in row or not gap > SEVERAL * token > 0:
        return
    found = f"itl is {gap / token:.3g} times tpot, so stream events hold several tokens"
    if told:
        notes.append(f"{found}, but the file does not speak of drafts: if there were any, give method and draft_length")
    else:
        row["tokens_per_step"] = gap / token
        notes.append(
            f"{found}: taken for tokens_per_step; the file cannot tell the drafts: give method and draft_length"
        )


def spread(lengths: np.ndarray | None) -> float:
    """Squared coefficient of variation; NaN where there is nothing to vary.

    >>> spread(np.array([32.0, 96.0]))
    0.25
    """
    if lengths is None or not len(lengths) or not lengths.mean() > 0:
        return math.nan
    return float(lengths.var() / lengths.mean() ** 2)


def json_object(value: Any) -> dict[str, Any] | None:
    """An object, or the object that a JSON text holds; None for anything else."""
    if isinstance(value, str):
        try:
            value = loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None
