"""Formats are recognised by content, one file by exactly one of them, and a file of none is told what it looks like."""

import doctest
import importlib
import json
from pathlib import Path

import pytest
from bench_samples import (
    CONCURRENT,
    SGLANG,
    SGLANG_2024,
    VLLM,
    VLLM_SECONDS,
    VLLM_SPEC,
    benchmark,
    report,
    sweep_csv,
    table,
)

from diffspec.results import TraceError
from diffspec.traces import read_trace, template
from diffspec.traces.formats import FORMATS, GIVES, recognise
from diffspec.traces.source import Source

OWN = Path(__file__).parent / "fixtures"
AGGREGATE = {"hw": "b200", "framework": "vllm", "model": "org/m", "conc": 8, "isl": 64, "osl": 32, "mean_tpot": 0.01}
REQUESTS = "arrival_time,first_token_time,completion_time,prompt_tokens,output_tokens\n0,1,2,8,8\n"
# One small file of each format, and its name.
SYNTHETIC = {
    "vllm bench serve JSON": (json.dumps(VLLM), json.dumps(VLLM_SPEC) + "\n" + json.dumps(VLLM), json.dumps([VLLM])),
    "vllm bench serve JSON in seconds": (json.dumps(VLLM_SECONDS),),
    "vllm bench sweep summary": (sweep_csv([VLLM, VLLM_SPEC]), sweep_csv([VLLM | {"max_num_seqs": 8}])),
    "SGLang bench_serving JSON lines": (
        json.dumps(SGLANG),
        json.dumps(SGLANG_2024) + "\n" + json.dumps(SGLANG_2024),
        json.dumps([SGLANG]),
    ),
    "GuideLLM report": (json.dumps(report(benchmark(CONCURRENT))), json.dumps(report(benchmark(CONCURRENT)), indent=1)),
    "GuideLLM CSV": (table(benchmark(CONCURRENT)),),
    "InferenceX results": (json.dumps([AGGREGATE]), json.dumps(AGGREGATE | {"metrics": {"mean_ttft": 0.1}})),
    "request table": (REQUESTS,),
    "operating-point table": (template(), "ttft_mean,arrival_rate\n1,2\n"),
}
# Pattern of a file below ../shared/fixtures -> its format; None: none.
REAL = {
    "vllm_bench/*inferencex.json": "vllm bench serve JSON in seconds",
    "vllm_bench/*.json": "vllm bench serve JSON",
    "sglang/*.jsonl": "SGLang bench_serving JSON lines",
    "guidellm/*derived.csv": None,
    "guidellm/*.json": "GuideLLM report",
    "prometheus/*.txt": "/metrics of vLLM or SGLang",
}


def matching(path: Path) -> list[str]:
    """Names of all formats whose recogniser says yes, not only of the first."""
    return [item.name for item in FORMATS if item.recognises(Source(path))]


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in SYNTHETIC.items() for text in texts], ids=lambda e: e[:24]
)
def test_one_format_recognises_each_file(tmp_path, name, text):
    path = tmp_path / "anything.txt"
    path.write_text(text)
    assert matching(path) == [name]


def test_every_format_of_operating_points_has_an_example():
    assert {item.name for item in FORMATS if item.gives == "operating points"} <= set(SYNTHETIC)
    assert {item.gives for item in FORMATS} <= set(GIVES)
    assert len({item.name for item in FORMATS}) == len(FORMATS)


def test_one_format_recognises_each_real_file(shared):
    folder = shared / "fixtures"
    expected = {}
    for pattern, name in REAL.items():
        for path in folder.glob(pattern):
            expected.setdefault(path, name)
    assert len(expected) >= 20
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"):
        found = matching(path)
        assert len(found) <= 1, f"{path.name} is taken for {found}"
        if path in expected:
            assert found == [expected[path]] * (expected[path] is not None), path.name


def test_one_format_recognises_each_of_our_own_files():
    for path in sorted(path for path in OWN.rglob("*") if path.is_file() and path.suffix != ".md"):
        expected = 0 if path.name.endswith("_params.json") else 1  # what a sweep was to do
        assert len(matching(path)) == expected, f"{path.name} is taken for {matching(path)}"


def test_recognising_a_large_file_of_lines_parses_only_the_first(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(VLLM) + "\n" + "{broken\n" * 1000)
    found = recognise(Source(path))
    assert found is not None and found.name == "vllm bench serve JSON"


# Text of a file of no format, and what the error takes it for or advises.
UNKNOWN = [
    ('{"avg_latency": 1.0, "latencies": [1], "percentiles": {"50": 1}}', "vllm bench latency"),
    ('{"elapsed_time": 1, "num_requests": 2, "requests_per_second": 2}', "vllm bench throughput"),
    ('{"batch_size": 1, "acc_length": 2.1, "throughput": 3}\n{"batch_size": 2, "acc_length": 2}', "SpecForge"),
    ('{"benchmarks": [], "metadata": {}}', "without a benchmark"),
    ('{"traceEvents": []}', "profiler's trace"),
    ('{"input_config": {}, "request_throughput": {"unit": "requests/sec"}}', "AIPerf"),
    ("[]", "an empty list"),
    ('["a"]', "JSON of strs"),
    ("3 4 5", "no column of the operating-point table"),
    ('{"x": 1}', "got 'x'"),
    ("ttft_median_ms,p99_itl,notes\n1,2,x\n", "ttft_median_ms is ttft_p50 in milliseconds; p99_itl is itl_p99"),
]


@pytest.mark.parametrize(("text", "part"), UNKNOWN, ids=range(len(UNKNOWN)))
def test_a_file_of_no_format_is_told_what_it_looks_like(tmp_path, text, part):
    path = tmp_path / "unknown"
    path.write_text(text)
    assert matching(path) == []
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert part in str(caught.value) and "GuideLLM report" in str(caught.value)
    assert caught.value.file == str(path)


@pytest.mark.parametrize(
    "name",
    ["json_record", "rows", "bench_record", "sglang_bench", "guidellm", "inferencex", "sweep_summary"],
)
def test_examples_of_the_readers(name):
    result = doctest.testmod(importlib.import_module(f"diffspec.traces.readers.{name}"))
    assert result.attempted > 0 and result.failed == 0


def test_aggregates_of_inferencex(tmp_path):
    path = tmp_path / "agg.json"
    measured = {"mean_ttft": 0.2, "median_ttft": 0.19, "p99_ttft": 0.4, "mean_itl": 0.01, "tput_per_gpu": 1000.0}
    path.write_text(json.dumps([AGGREGATE | measured, AGGREGATE | measured | {"conc": 16, "spec_decoding": "none"}]))
    trace = read_trace(path)
    got = trace.frame.iloc[0]
    assert (got["concurrency"], got["prompt_length"], got["output_length"]) == (8, 64, 32)
    assert (got["ttft_mean"], got["ttft_p50"], got["ttft_p99"], got["tpot_mean"]) == (0.2, 0.19, 0.4, 0.01)
    assert (got["hardware"], got["engine"]) == ("b200", "vllm") and any("nominal" in line for line in trace.warnings)
    path.write_text(json.dumps(AGGREGATE | {"mean_tpot": 10.0}))
    with pytest.raises(TraceError, match="perhaps milliseconds"):
        read_trace(path)
    path.write_text(json.dumps(AGGREGATE | {"spec_decoding": "mtp"}))
    with pytest.raises(TraceError, match="draft_length': the value is missing"):
        read_trace(path)
