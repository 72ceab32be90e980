"""The formats that traces come in, recognised by content, never by a file's name.

`FORMATS` is the list: the first whose `recognises` says yes reads the file. What a file gives differs: operating points
(a row a benchmark run), requests (summarised into operating points), counters of an engine (snapshots, differenced over
a run), acceptance, step times, or arrivals.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..results import TraceError
from . import requests
from .looks import looks_like
from .problems import Problem
from .readers import (
    arrivals,
    guidellm,
    guidellm_csv,
    inferencex,
    prometheus,
    request_metrics,
    sglang_bench,
    speculation_profile,
    step_samples,
    sweep_summary,
    vllm_bench,
)
from .readers.bench_record import is_bench_record, is_seconds_record
from .schema import NAMES
from .source import Source
from .table import table_from_bytes

_OTHER_COLUMNS = "no column of the operating-point table in the header"
GIVES = ("operating points", "requests", "counters", "acceptance", "step times", "arrivals")


@dataclass(frozen=True)
class Format:
    """One format. `name`, as users call it; `gives`, one of `GIVES`; `recognises(source)` by content; `read(source)`:
    for operating points the raw frame that `validate` takes (cells as found, `source_file`, `source_row`, and
    ``frame.attrs["warnings"]`` and ``["problems"]``), for the others what the reader's module says; `handled`, the
    units and meanings in which the format differs from the table, and what is made of them."""

    name: str
    gives: str
    recognises: Callable[[Source], bool]
    read: Callable[[Source], Any]
    handled: str


def _is_table(source: Source) -> bool:
    return bool(set(source.columns) & set(NAMES)) and not sweep_summary.recognises(source)


FORMATS: tuple[Format, ...] = (
    Format(
        "vllm bench serve JSON",
        "operating points",
        lambda source: is_bench_record(source.first),
        vllm_bench.read_bench,
        "milliseconds; acceptance in percent and marginal by position, made conditional; TPOT without the first token",
    ),
    Format(
        "vllm bench serve JSON in seconds",
        "operating points",
        lambda source: is_seconds_record(source.first),
        vllm_bench.read_seconds,
        "seconds; TPOT without the first token",
    ),
    Format(
        "vllm bench sweep summary",
        "operating points",
        sweep_summary.recognises,
        sweep_summary.read_sweep_summary,
        "milliseconds; acceptance in percent and marginal by position, made conditional",
    ),
    Format(
        "SGLang bench_serving JSON lines",
        "operating points",
        lambda source: sglang_bench.is_sglang_record(source.first),
        sglang_bench.read_sglang_bench,
        "milliseconds; accept_length counts from the server's start; ITL per token is not taken for a step",
    ),
    Format(
        "GuideLLM report",
        "operating points",
        lambda source: guidellm.is_report(source.first),
        guidellm.read_guidellm,
        "milliseconds, request latency in seconds; its TPOT holds the first token: its ITL is the tpot here",
    ),
    Format(
        "GuideLLM CSV",
        "operating points",
        guidellm_csv.recognises,
        guidellm_csv.read_guidellm_csv,
        "milliseconds, request latency in seconds; its TPOT holds the first token: its ITL is the tpot here",
    ),
    Format(
        "InferenceX results",
        "operating points",
        lambda source: inferencex.is_aggregate(source.first),
        inferencex.read_inferencex,
        "seconds",
    ),
    Format(
        "/metrics of vLLM or SGLang",
        "counters",
        prometheus.recognises,
        prometheus.read,
        "seconds; counters are differenced; acceptance by position is marginal, made conditional",
    ),
    Format(
        "vllm bench forward JSON",
        "step times",
        step_samples.recognises,
        step_samples.read,
        "microseconds; forward passes alone, without sampling and scheduling",
    ),
    Format(
        "speculation profile",
        "acceptance",
        speculation_profile.recognises,
        speculation_profile.read,
        "conditional and marginal acceptance told apart",
    ),
    Format(
        "per-request metrics",
        "acceptance",
        request_metrics.recognises,
        request_metrics.read,
        "milliseconds; a request's mean_itl_ms is a time per token",
    ),
    Format(
        "raw requests of diffspec collect",
        "acceptance",
        lambda source: isinstance(source.first, dict) and {"cell", "began_unix"} <= set(source.first),
        request_metrics.read,
        "the engine's own account of each request, where it gave one",
    ),
    Format("request table", "requests", requests.recognises, requests.read, "seconds; steady windows"),
    Format("arrivals", "arrivals", arrivals.recognises, arrivals.read, "dates, seconds or milliseconds, by the format"),
    Format(
        "operating-point table",
        "operating points",
        _is_table,
        lambda source: table_from_bytes(source.data, source.file),
        "seconds; acceptance conditional by position",
    ),
)


def recognise(source: Source) -> Format | None:
    """The format of a file; None when it is none of `FORMATS`."""
    return next((item for item in FORMATS if item.recognises(source)), None)


def read_source(source: Source) -> tuple[Format, Any]:
    """The format of a file and what its reader makes of it. Raises `TraceError` when no format fits."""
    found = recognise(source)
    if found is None:
        raise unrecognised(source)
    return found, found.read(source)


def unrecognised(source: Source):
    """The error for a file of no known format: what it looks like, and what is understood."""
    what, advice = looks_like(source)
    like = f": this looks like {what}" if what else ""
    if source.kind == "json":
        return Problem(
            f"no format that is read{like}", source.file, None, None, _got(source), _understood(), advice
        ).error()
    try:
        table_from_bytes(source.data, source.file)
    except TraceError as error:  # binary, a web page, cut off, or a table with other columns
        if _OTHER_COLUMNS not in str(error):
            return error
    allowed = "names such as arrival_rate, prompt_length, output_length, draft_length, ttft_mean, itl_mean; or "
    return Problem(_OTHER_COLUMNS + like, source.file, 1, None, _got(source), allowed + _understood(), advice).error()


def _got(source: Source) -> str:
    """The names in a file, shortened."""
    if source.kind != "json":
        return ", ".join(name for name in source.columns if name)[:60]
    first = source.first
    if isinstance(first, dict):
        return ", ".join(sorted(map(str, first))[:6]) or "{}"
    return "an empty list" if first is None else type(first).__name__


def _understood() -> str:
    return "one of " + ", ".join(item.name for item in FORMATS)
