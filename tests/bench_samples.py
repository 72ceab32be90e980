"""Small results as benchmark clients write them: vLLM, its sweep, SGLang, GuideLLM and its CSV."""

import copy
import csv
import io
import json
import math

import pandas as pd

VLLM = {
    "date": "20260101-000000",
    "backend": "vllm",
    "label": None,
    "model_id": "org/verifier",
    "num_prompts": 40,
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": 4,
    "duration": 20.0,
    "completed": 40,
    "failed": 0,
    "total_input_tokens": 2560,
    "total_output_tokens": 1280,
    "request_throughput": 2.0,
    "request_goodput": None,
    "mean_ttft_ms": 100.0,
    "median_ttft_ms": 90.0,
    "std_ttft_ms": 8.0,
    "p90_ttft_ms": 140.0,
    "p99_ttft_ms": 160.0,
    "mean_tpot_ms": 60.0,
    "mean_itl_ms": 60.0,
    "mean_e2el_ms": 1960.0,
}
VLLM_SPEC = VLLM | {
    "spec_decode_acceptance_rate": 60.0,
    "spec_decode_acceptance_length": 2.2,
    "spec_decode_num_drafts": 560,
    "spec_decode_draft_tokens": 1120,
    "spec_decode_accepted_tokens": 672,
    "spec_decode_per_position_acceptance_rates": [0.8, 0.4],
}
VLLM_OPEN = VLLM | {"request_rate": 2.0, "max_concurrency": None, "num_prompts": 40}
# InferenceX's variant: seconds, and keys without a unit.
VLLM_SECONDS = {key: value for key, value in VLLM.items() if not key.endswith("_ms")} | {
    "good_completed": None,
    "median_ttft": 0.09,
    "p99_ttft": 0.16,
    "median_e2el": 1.95,
    "p99_e2el": 2.1,
    "median_tpot": 0.06,
    "p99_tpot": 0.07,
}


def sweep_csv(records: list[dict]) -> str:
    """`summary.csv` of a sweep as vLLM writes it: pandas' table of the runs, with its index."""
    return pd.DataFrame.from_records(records).to_csv()


# A result of 0.5.23: keys in the order in which the client writes them.
SGLANG = {
    "tag": None,
    "backend": "sglang",
    "dataset_name": "random",
    "request_rate": math.inf,
    "max_concurrency": 4,
    "sharegpt_output_len": None,
    "random_input_len": 64,
    "random_output_len": 32,
    "random_range_ratio": 1.0,
    "server_info": {
        "model_path": "org/verifier",
        "tp_size": 1,
        "ep_size": 2,
        "max_running_requests": 48,
        "max_total_num_tokens": 9000,
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": "org/drafter",
        "speculative_num_steps": 3,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 4,
        "internal_states": [{"avg_spec_accept_length": 2.5}],
        "version": "0.5.23",
    },
    "duration": 20.0,
    "completed": 40,
    "total_input_tokens": 2560,
    "total_input_text_tokens": 2560,
    "total_input_vision_tokens": 0,
    "total_output_tokens": 1280,
    "total_output_tokens_retokenized": 1279,
    "request_throughput": 2.0,
    "input_throughput": 128.0,
    "output_throughput": 64.0,
    "total_throughput": 192.0,
    "mean_e2e_latency_ms": 1960.0,
    "median_e2e_latency_ms": 1950.0,
    "std_e2e_latency_ms": 20.0,
    "p90_e2e_latency_ms": 2000.0,
    "p95_e2e_latency_ms": 2010.0,
    "p99_e2e_latency_ms": 2020.0,
    "mean_ttft_ms": 100.0,
    "median_ttft_ms": 90.0,
    "p90_ttft_ms": 140.0,
    "p99_ttft_ms": 160.0,
    "mean_tpot_ms": 60.0,
    "median_tpot_ms": 59.0,
    "p99_tpot_ms": 66.0,
    "mean_itl_ms": 60.0,
    "median_itl_ms": 59.0,
    "p95_itl_ms": 66.0,
    "concurrency": 3.92,
    "accept_length": 2.5,
    "max_output_tokens_per_s": 80.0,
    "max_concurrent_requests": 5,
    "goodput_slos_ms": {"ttft": 200.0},
    "request_goodput": 1.9,
    "slo_attainment": 0.95,
    "slo_attainment_by_metric": {"ttft": 0.95},
}
SGLANG_PLAIN = SGLANG | {
    "server_info": SGLANG["server_info"] | {"speculative_algorithm": None, "internal_states": [{}]},
    "accept_length": None,
}
# What the client of December 2024 writes.
SGLANG_2024 = {
    "backend": "sglang",
    "dataset_name": "random",
    "request_rate": 2.0,
    "max_concurrency": None,
    "total_input_tokens": 2560,
    "total_output_tokens": 1280,
    "total_output_tokens_retokenized": 1279,
    "mean_e2e_latency_ms": 1960.0,
    "median_e2e_latency_ms": 1950.0,
    "median_ttft_ms": 90.0,
    "median_itl_ms": 60.0,
    "output_throughput": 64.0,
    "sharegpt_output_len": None,
    "random_input_len": 64,
    "random_output_len": 32,
    "random_range_ratio": 1.0,
    "duration": 20.0,
    "completed": 40,
}


NAMES = ("p001", "p01", "p05", "p10", "p25", "p50", "p75", "p90", "p95", "p99", "p999")


def summary(mean, low=None, variance=0.0):
    """A distribution whose percentile q is mean*(0.5 + q)."""
    shares = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
    percentiles = {name: mean * (0.5 + share) for name, share in zip(NAMES, shares, strict=True)}
    low = 0.5 * mean if low is None else low
    return {
        "mean": mean,
        "median": mean,
        "mode": mean,
        "variance": variance,
        "std_dev": variance**0.5,
        "min": low,
        "max": 1.5 * mean,
        "count": 40,
        "total_sum": 40 * mean,
        "percentiles": percentiles,
        "pdf": None,
    }


def by_status(mean, **more):
    none = summary(0.0)
    return {"successful": summary(mean, **more), "incomplete": none, "errored": none, "total": summary(mean, **more)}


def benchmark(strategy, **changes):
    """A benchmark of 40 requests of 64 and 32 tokens in 20 s: ttft 40 ms, 60 ms a token, one token an event."""
    metrics = {
        "request_totals": {"successful": 40, "incomplete": 0, "errored": 0, "total": 40},
        "requests_per_second": by_status(2.0),
        "request_concurrency": by_status(3.8),
        "request_latency": by_status(1.9),
        "prompt_token_count": by_status(64.0, variance=1024.0),
        "output_token_count": by_status(32.0),
        "time_to_first_token_ms": by_status(40.0),
        "time_per_output_token_ms": by_status(59.375),
        "inter_token_latency_ms": by_status(60.0),
        "output_tokens_per_iteration": by_status(1.0),
        "iter_tokens_per_iteration": by_status(1.0),
    } | changes
    return {
        "type_": "generative_benchmark",
        "config": {
            "run_id": "r",
            "run_index": 0,
            "strategy": copy.deepcopy(strategy),
            "profile": {"type_": strategy["type_"], "completed_strategies": [strategy]},
            "requests": {"data": "['prompt_tokens=64,output_tokens=32']"},
            "backend": {"model": "org/verifier"},
        },
        "scheduler_state": {},
        "scheduler_metrics": {
            "start_time": 1000.0,
            "request_start_time": 1002.0,
            "measure_start_time": 1002.0,
            "measure_end_time": 1022.0,
            "request_end_time": 1022.0,
            "end_time": 1022.1,
        },
        "metrics": metrics,
        "requests": {"successful": [], "incomplete": [], "errored": [], "total": None},
        "duration": 20.0,
        "warmup_duration": 0.0,
        "cooldown_duration": 0.0,
    }


def report(*benchmarks):
    metadata = {"version": 2, "guidellm_version": "0.8.1", "python_version": "3.12.3", "platform": "p"}
    return {"metadata": metadata, "config": {}, "benchmarks": list(benchmarks), "conclusions": []}


CONCURRENT = {"type_": "concurrent", "worker_count": 4, "max_concurrency": 4, "streams": 4, "rampup_duration": 0.0}
POISSON = {"type_": "poisson", "rate": 2.0, "max_concurrency": None, "random_seed": 42}


GROUPS = {
    "request_latency": ("Request Latency", "Sec"),
    "time_to_first_token_ms": ("Time to First Token", "ms"),
    "time_per_output_token_ms": ("Time per Output Token", "ms"),
    "inter_token_latency_ms": ("Inter Token Latency", "ms"),
    "requests_per_second": ("Server Throughput", "Requests/Sec"),
    "request_concurrency": ("Server Throughput", "Concurrency"),
    "prompt_token_count": ("Token Metrics", "Input Tokens"),
    "output_token_count": ("Token Metrics", "Output Tokens"),
    "iter_tokens_per_iteration": ("Token Streaming", "Iter Tokens/Iter"),
}


def cells(one):
    """One benchmark as (header, value) pairs, in the order of `guidellm/benchmark/outputs/csv.py`."""
    config, metrics, strategy = one["config"], one["metrics"], one["config"]["strategy"]
    named = {"constant": "rate", "poisson": "rate", "concurrent": "streams"}.get(strategy["type_"])
    shown = f"{strategy['rate']:.2f}" if named == "rate" else str(strategy.get(named))
    yield ("Run Info", "Run ID", ""), config["run_id"]
    yield ("Run Info", "Run Index", ""), config["run_index"]
    for name in ("Profile", "Requests", "Backend"):
        yield ("Run Info", name, ""), json.dumps(config[name.lower()])
    yield ("Benchmark", "Type", ""), "generative_benchmark"
    yield ("Benchmark", "Strategy", ""), f"{strategy['type_']}@{shown}" if named else strategy["type_"]
    for name in ("Start Time", "Request End Time", "End Time"):
        yield ("Timings", name, ""), "2026-03-02 17:42:38"
    for name, key in (("Duration", "duration"), ("Warmup", "warmup_duration"), ("Cooldown", "cooldown_duration")):
        yield ("Timings", name, "Sec"), one[key]
    for status in ("successful", "incomplete", "errored", "total"):
        yield ("Request Counts", status.capitalize(), ""), metrics["request_totals"][status]
    for key, (group, unit) in GROUPS.items():
        for status in ("successful", "incomplete", "errored"):
            found = metrics[key][status]
            if found["total_sum"] == 0.0:
                continue
            name, p = f"{status.capitalize()} {unit}", found["percentiles"]
            yield (group, name, "Mean"), found["mean"]
            yield (group, name, "Median"), found["median"]
            yield (group, name, "Std Dev"), found["std_dev"]
            listed = [found["min"], *(p[q] for q in NAMES if q not in ("p50", "p999")), found["max"]]
            yield (group, name, "Percentiles"), "[" + ", ".join(map(str, listed)) + "]"
    yield ("Runtime Info", "Metadata", ""), json.dumps({"version": 2})
    yield ("Runtime Info", "Arguments", ""), json.dumps({"target": "http://localhost"})


def table(*benchmarks, aligned=True):
    """The table of several benchmarks; before 0.7 (not `aligned`) with the header of the first."""
    rows = [dict(cells(one)) for one in benchmarks]
    header = list(dict.fromkeys(key for row in (rows if aligned else rows[:1]) for key in row))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([[key[level] for key in header] for level in range(3)])
    writer.writerows([row.get(key, "") for key in header] if aligned else list(row.values()) for row in rows)
    return text.getvalue()
