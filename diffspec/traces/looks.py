"""What a file of no known format looks like: a name for it and what to do, for the error that refuses it."""

from typing import Any

from .schema import METRICS, STATISTICS
from .source import Source

# Keys that tell a JSON file, what it is, and what to do with it. All keys of a set must be there.
_JSON: tuple[tuple[set[str], str, str | None], ...] = (
    ({"benchmarks"}, "GuideLLM's report without a benchmark in it", "run it again: no benchmark finished"),
    ({"avg_latency", "percentiles"}, "the result of vllm bench latency", "measure with vllm bench serve"),
    ({"elapsed_time", "requests_per_second"}, "the result of vllm bench throughput", "measure with vllm bench serve"),
    ({"acc_length", "batch_size"}, "SpecForge's benchmark", "it has throughput and acceptance, but no latency"),
    ({"acceptance_length", "throughput"}, "a benchmark of throughput", "it has no latency"),
    ({"input_config"}, "the export of AIPerf or GenAI-Perf", "measure with vllm bench serve or GuideLLM"),
    ({"load_summary", "successes"}, "the report of inference-perf", "measure with vllm bench serve or GuideLLM"),
    ({"scenario", "results"}, "the report of llm-d-benchmark", "take the result of the tool that it ran"),
    ({"traceEvents"}, "a profiler's trace", None),
    ({"choices"}, "an answer of the OpenAI interface without metrics", None),
    ({"data", "object"}, "an answer of the OpenAI interface", None),
    ({"serve_params"}, "parameters of vllm bench sweep", "name the folder with its results"),
    ({"run_number", "error"}, "a failed run of vllm bench sweep", "name the folder with its results"),
    ({"errorType"}, "an error message", None),
    ({"server_info"}, "SGLang's benchmark without results", "look at its log and run it again"),
)
_LATENCY_STARTS = tuple(f"{word}_{metric}" for word in ("mean", "median", "p50", "p99") for metric in METRICS)


def looks_like(source: Source) -> tuple[str | None, str | None]:
    """What the file looks like, and advice; None where nothing fits."""
    return _json(source.first) if source.kind == "json" else _table(source.columns)


def _json(first: Any) -> tuple[str | None, str | None]:
    if first is None:
        return "an empty list", None
    if not isinstance(first, dict):
        return f"JSON of {type(first).__name__}s", "results are objects"
    keys = set(first)
    for needed, what, advice in _JSON:
        if needed <= keys:
            return what, advice
    if any(key.startswith(_LATENCY_STARTS) for key in keys):
        return "a benchmark's result without counts", "num_prompts or completed, and durations, are needed"
    return None, None


def _table(columns: tuple[str, ...]) -> tuple[str | None, str | None]:
    """A table with other names: which of its columns are latencies of ours, perhaps in milliseconds."""
    mends = []
    for column in columns:
        name = column.lower()
        hint = _ours(name.removesuffix("_ms").removesuffix("_s"))
        if hint:
            mends.append(f"{column} is {hint}{' in milliseconds' if name.endswith('_ms') else ''}")
    if not mends:
        return None, "start from the template; the first line must hold the column names"
    few = "; ".join(mends[:3])
    return "a summary of benchmarks under other names", f"rename its columns as in the template: {few}"


def _ours(name: str) -> str | None:
    """The latency column of the table that another name means.

    >>> _ours("ttft_median"), _ours("p99_itl"), _ours("notes")
    ('ttft_p50', 'itl_p99', None)
    """
    words = set(name.replace("median", "p50").replace("avg", "mean").replace("e2el", "e2e").split("_"))
    for metric in METRICS:
        for statistic in STATISTICS:
            if words == {metric, statistic}:
                return f"{metric}_{statistic}"
    return None
