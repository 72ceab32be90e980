"""The JSON of `vllm bench serve`: units, acceptance, loops, metadata, folders, and what is no result."""

import doctest
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bench_samples import VLLM as PLAIN
from bench_samples import VLLM_OPEN as OPEN
from bench_samples import VLLM_SECONDS as SECONDS
from bench_samples import VLLM_SPEC as SPEC
from bench_samples import sweep_csv
from hypothesis import given, settings
from hypothesis import strategies as st

from diffspec.results import TraceError
from diffspec.traces import TraceProblems, read_trace
from diffspec.traces.gather import gather
from diffspec.traces.readers import bench_record


@pytest.fixture
def write(tmp_path):
    def write(content, name="run.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def row(write):
    def row(record):
        frame = read_trace(write(record)).frame
        assert len(frame) == 1
        return frame.iloc[0]

    return row


def test_doctest():
    result = doctest.testmod(bench_record)
    assert result.attempted > 0 and result.failed == 0


def test_a_plain_closed_loop_in_seconds(row):
    got = row(PLAIN)
    assert (got["concurrency"], got["method"], got["draft_length"]) == (4, "none", 0)
    assert np.isnan(got["arrival_rate"]) and got["arrival_process"] is None
    assert (got["prompt_length"], got["output_length"]) == (64, 32)
    assert (got["throughput"], got["n_requests"], got["failed"]) == (2, 40, 0)
    assert got["ttft_mean"] == pytest.approx(0.1) and got["ttft_p50"] == pytest.approx(0.09)
    assert got["ttft_p90"] == pytest.approx(0.14) and got["ttft_p99"] == pytest.approx(0.16)
    assert np.isnan(got["ttft_p95"]) and np.isnan(got["tokens_per_step"])
    assert got["e2e_mean"] == pytest.approx(1.96)
    assert (got["deployment"], got["verifier"], got["run"]) == ("org/verifier", "org/verifier", "run")


def test_marginal_acceptance_becomes_conditional(row):
    got = row(SPEC | {"method": "eagle3"})
    assert (got["method"], got["draft_length"], got["tokens_per_step"]) == ("eagle3", 2, 2.2)
    assert got["position_acceptance"] == pytest.approx((0.8, 0.5))
    assert got["draft_acceptance_rate"] == pytest.approx(0.6)
    assert np.isnan(got["acceptance_rate"]), "accepted/drafted is not the conditional acceptance"


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_conditional_acceptance_multiplies_back_to_the_marginal(conditional):
    marginal = np.cumprod(conditional).tolist()
    record = SPEC | {
        "spec_decode_per_position_acceptance_rates": marginal,
        "spec_decode_draft_tokens": 560 * len(marginal),
        "spec_decode_acceptance_length": 1 + sum(marginal),
    }
    got, _, problems = bench_record.read_record(record, "r")
    assert problems == [] and got["draft_length"] == len(marginal)
    assert all(0 <= entry <= 1 for entry in got["position_acceptance"])
    assert np.cumprod(got["position_acceptance"]) == pytest.approx(marginal)


def test_zero_marginals(row):
    got = row(SPEC | {"spec_decode_per_position_acceptance_rates": [0.0, 0.0], "spec_decode_acceptance_length": 1.0})
    assert got["position_acceptance"] == (0.0, 0.0) and got["tokens_per_step"] == 1.0


def test_the_draft_length_comes_from_counters_then_from_the_list(write):
    varying = SPEC | {"spec_decode_draft_tokens": 900, "method": "ngram"}
    trace = read_trace(write(varying))
    assert trace.frame["draft_length"].tolist() == [2]
    assert any("vary in length, 1.61 tokens" in line for line in trace.warnings)
    planned = varying | {"speculative_config": json.dumps({"method": "ngram_gpu", "num_speculative_tokens": 2})}
    assert read_trace(write(planned)).frame["method"].tolist() == ["ngram"]
    unused = SPEC | {"spec_decode_per_position_acceptance_rates": [0.8, 0.4, 0.0, 0.0]}
    assert read_trace(write(unused)).frame["position_acceptance"].tolist()[0] == pytest.approx((0.8, 0.5))


def test_sweep_overrides_and_metadata_fill_columns(row):
    got = row(
        SPEC
        | {
            "speculative_config.method": "dflash",
            "speculative_config.model": "org/drafter",
            "speculative_config.num_speculative_tokens": 2,
            "max_num_seqs": 16,
            "deployment": "mine",
            "hardware": "1 card",
            "verifier_params": "8e9",
            "arrival_rate": 7,
        }
    )
    assert (got["method"], got["drafter"], got["max_batch_size"]) == ("block", "org/drafter", 16)
    assert (got["deployment"], got["hardware"], got["verifier_params"]) == ("mine", "1 card", 8e9)
    assert np.isnan(got["arrival_rate"]), "the load is what the client did"


@pytest.mark.parametrize(
    ("burstiness", "process", "scv"), [(1.0, "poisson", 1.0), (0.5, "gamma", 2.0), (4, "gamma", 0.25)]
)
def test_burstiness_is_the_shape_of_gamma_gaps(row, burstiness, process, scv):
    got = row(OPEN | {"burstiness": burstiness})
    assert (got["arrival_rate"], got["arrival_process"], got["arrival_scv"]) == (2.0, process, scv)
    assert np.isnan(got["concurrency"])


def test_an_open_loop_that_ran_into_its_cap_is_named(write):
    quiet = read_trace(write(OPEN | {"max_concurrency": 64, "max_concurrent_requests": 9}))
    assert quiet.warnings == [] and quiet.frame["arrival_rate"].tolist() == [2.0]
    capped = read_trace(write(OPEN | {"max_concurrency": 8, "max_concurrent_requests": 9}))
    assert any("neither open nor closed" in line for line in capped.warnings)
    ramped = read_trace(write(OPEN | {"ramp_up_strategy": "linear"}))
    assert any("ramped" in line for line in ramped.warnings)


def test_detailed_arrays_give_batch_spread_and_missing_e2e(row):
    record = {k: v for k, v in PLAIN.items() if "e2el" not in k} | {
        "latencies": [1.9] * 20 + [2.1] * 20,
        "input_lens": [32, 96] * 20,
        "output_lens": [32] * 40,
        "errors": [""] * 40,
    }
    got = row(record)
    assert got["effective_batch_size"] == pytest.approx(80 / 20)
    assert got["e2e_mean"] == pytest.approx(2.0) and got["e2e_p99"] == pytest.approx(2.1)
    assert got["prompt_scv"] == pytest.approx(0.25) and got["output_scv"] == 0


def test_one_output_token_has_no_gap(row):
    zero = {"mean_itl_ms": 0.0, "mean_tpot_ms": 0.0, "mean_e2el_ms": 100.0, "total_output_tokens": 40}
    got = row(PLAIN | zero)
    assert np.isnan(got["itl_mean"]) and np.isnan(got["tpot_mean"]) and got["ttft_mean"] == pytest.approx(0.1)


def test_other_traffic_in_the_counters_is_named(write):
    warmed = SPEC | {"spec_decode_num_drafts": 900, "spec_decode_draft_tokens": 1800}
    assert any("warm-up or other traffic" in line for line in read_trace(write(warmed)).warnings)
    rare = SPEC | {"spec_decode_num_drafts": 56, "spec_decode_draft_tokens": 112, "method": "ngram"}
    assert any("of the steps drafted" in line for line in read_trace(write(rare)).warnings)
    idle = {k: v for k, v in SPEC.items() if "rate" not in k or k == "request_rate"} | {"draft_length": 3}
    never = read_trace(write(idle | {"spec_decode_num_drafts": 0, "spec_decode_draft_tokens": 0}))
    assert any("never drafted" in line for line in never.warnings) and never.frame["draft_length"].tolist() == [3]


def test_lines_and_lists_hold_several_results(write):
    lines = "\n".join([json.dumps(PLAIN), "", json.dumps(SPEC)]) + "\n"
    by_line, by_list = read_trace(write(lines, "runs.jsonl")), read_trace(write([PLAIN, SPEC], "runs.json"))
    assert by_line.frame["source_row"].tolist() == [1, 3] and by_list.frame["source_row"].tolist() == [1, 2]
    assert by_list.frame["run"].tolist() == ["runs#1", "runs#2"]


# Change to a good result, the key or column blamed, a part of the message.
ERRORS = [
    ({"request_rate": "inf", "max_concurrency": None}, "max_concurrency", "neither an open nor a closed loop"),
    ({"request_rate": "fast"}, "request_rate", "inf"),
    ({"request_rate": None}, "request_rate", "missing"),
    ({"request_rate": -1.0}, "request_rate", "at least 0"),
    ({"completed": 0}, "completed", "no request completed"),
    ({"completed": "40"}, "completed", "a finite number"),
    ({"mean_ttft_ms": "100"}, "mean_ttft_ms", "a finite number"),
    ({"mean_ttft_ms": True}, "mean_ttft_ms", "a finite number"),
    ({"mean_ttft_ms": [1]}, "mean_ttft_ms", "a finite number"),
    ({"mean_ttft_ms": float("nan")}, "mean_ttft_ms", "a finite number"),
    ({"mean_ttft_ms": float("inf")}, "mean_ttft_ms", "a finite number"),
    ({"mean_ttft_ms": 10**400}, "mean_ttft_ms", "more than 30 digits"),
    ({"mean_ttft_ms": -1.0}, "mean_ttft_ms", "at least 0"),
    ({"p90_ttft_ms": 10.0}, "ttft_p90", "out of order"),
    ({"burstiness": 0, "request_rate": 2.0}, "burstiness", "above 0"),
    ({"total_output_tokens": 0}, "output_length", "1 to"),
    ({"max_concurrency": 0}, "concurrency", "above 0"),
    ({"verifier_params": "big"}, "verifier_params", "'big'"),
    ({"speculative_config": "{"}, "speculative_config", "not valid JSON"),
    ({"latencies": [1, "x"]}, "latencies", "a list of finite numbers"),
    ({"latencies": [1, 10**400]}, "latencies", "a list of finite numbers"),
]
SPEC_ERRORS = [
    (
        {"spec_decode_per_position_acceptance_rates": [0.4, 0.8]},
        "spec_decode_per_position_acceptance_rates",
        "increase",
    ),
    ({"spec_decode_per_position_acceptance_rates": [1.5]}, "spec_decode_per_position_acceptance_rates", "increase"),
    ({"spec_decode_per_position_acceptance_rates": 0.8}, "spec_decode_per_position_acceptance_rates", "a list"),
    ({"spec_decode_acceptance_rate": 140.0}, "spec_decode_acceptance_rate", "0 to 100 percent"),
    ({"spec_decode_acceptance_length": 3.4}, "tokens_per_step", "1 to 3"),
    ({"draft_length": "many"}, "draft_length", "'many'"),
]


@pytest.mark.parametrize(
    ("base", "change", "column", "part"),
    [(PLAIN, *case) for case in ERRORS] + [(SPEC, *case) for case in SPEC_ERRORS],
)
def test_a_bad_value_is_named_with_its_key(write, base, change, column, part):
    path = write(base | change)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert (caught.value.file, caught.value.row, caught.value.column) == (str(path), 1, column)
    assert part in str(caught.value)
    assert not isinstance(caught.value, TraceProblems), str(caught.value)


def test_an_older_client_without_token_totals_needs_the_lengths_beside_it(write):
    old = {k: v for k, v in PLAIN.items() if k not in ("total_input_tokens", "total_output_tokens", "completed")}
    with pytest.raises(TraceProblems, match=r"column 'prompt_length': the column is missing(.|\n)*'output_length'"):
        read_trace(write(old))
    raw = gather([write(old)]).points[0][1]
    assert any("older client: total_input_tokens is missing" in line for line in raw.attrs["warnings"])
    mended = read_trace(write(old | {"prompt_length": 64, "output_length": 32}))
    got = mended.frame.iloc[0]
    assert (got["prompt_length"], got["output_length"], got["n_requests"], got["ttft_mean"]) == (64, 32, 40, 0.1)
    assert any("num_prompts is taken" in line for line in mended.warnings)


def test_a_missing_throughput_and_failure_count_are_worked_out(row):
    got = row({k: v for k, v in PLAIN.items() if k not in ("request_throughput", "failed")} | {"num_prompts": 42})
    assert (got["throughput"], got["failed"]) == (2.0, 2.0)


NOT_RESULTS = [
    (b'{"num_prompts": 3', "cut off"),
    (json.dumps(PLAIN)[:-30].encode(), "cut off"),
    (b"{]", "not valid JSON"),
    (b"[" * 200_000, "nested too deeply|not valid JSON"),
    (b'{"completed": ' + b"9" * 5000 + b', "mean_ttft_ms": 1}', "cannot be read"),
    (b"{}", "no format that is read"),
    (b"[]", "an empty list"),
    (b"[1, 2]", "JSON of ints"),
    (b'{"hello": "\xff"}', "not UTF-8"),
    (b'{"metadata": {}, "benchmarks": []}', "GuideLLM's report without a benchmark"),
    (b'{"median_ttft_ms": 8, "mean_tpot_ms": 0.3}', "without counts"),
    ((json.dumps(PLAIN) + "\n" + json.dumps(PLAIN)[:50]).encode(), "line 2"),
]


@pytest.mark.parametrize(("content", "message"), NOT_RESULTS, ids=range(len(NOT_RESULTS)))
def test_what_is_no_result_says_why(write, content, message):
    path = write(content)
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(path)
    assert caught.value.file == str(path)


def test_bad_results_are_set_aside(write):
    path = write([PLAIN, PLAIN | {"completed": 0}, 3, SPEC], "runs.json")
    with pytest.raises(TraceProblems, match="2 problems"):
        read_trace(path)
    trace = read_trace(path, skip_bad_rows=True)
    assert trace.frame["source_row"].tolist() == [1, 4]
    assert trace.bad_rows is not None and trace.bad_rows["source_row"].tolist() == [2, 3]
    assert "no request completed" in trace.bad_rows["problem"].iloc[0]


def test_a_folder_is_read_recursively_and_what_is_no_run_is_skipped_aloud(write, tmp_path):
    write(PLAIN, "sweep/SERVE-a/run=0.json")
    write(SPEC, "sweep/SERVE-b/run=0.JSON")
    write(json.dumps(OPEN) + "\n" + json.dumps(OPEN | {"request_rate": 1.0, "duration": 39.0}), "sweep/more.jsonl")
    write([PLAIN, PLAIN], "sweep/SERVE-a/summary.json")
    write(PLAIN, "sweep/SERVE-a/warmup.json")
    write({"error": "x"}, "sweep/run=1.failure.json")
    write({"serve_params": []}, "sweep/params.json")
    write("not json", "sweep/notes.txt")
    trace = read_trace(tmp_path / "sweep")
    assert len(trace) == 4 and len(trace.sources) == 3
    skipped = next(line for line in trace.warnings if "skipped" in line)
    assert all(name in skipped for name in ("summary.json", "warmup.json", "failure.json", "params.json"))
    assert "more.jsonl" not in skipped and "run=0" not in skipped
    write("{", "sweep/broken.json")
    with pytest.raises(TraceError, match=r"broken\.json: not valid JSON"):
        read_trace(tmp_path / "sweep")


def test_the_variant_in_seconds(write):
    trace = read_trace(write(SECONDS))
    got = trace.frame.iloc[0]
    assert (got["ttft_p50"], got["ttft_p99"], got["e2e_p50"], got["tpot_p50"]) == (0.09, 0.16, 1.95, 0.06)
    assert (got["concurrency"], got["output_length"], got["draft_length"], got["throughput"]) == (4, 32, 0, 2)
    told = "\n".join(trace.warnings)
    assert "read as seconds" in told and "whether tokens were drafted" in told
    drafted = read_trace(write(SECONDS | {"method": "mtp", "draft_length": 2})).frame.iloc[0]
    assert (drafted["method"], drafted["draft_length"]) == ("mtp", 2)
    with pytest.raises(TraceError, match=r"longer than the whole run.*perhaps milliseconds") as caught:
        read_trace(write(SECONDS | {"median_ttft": 90.0, "p99_ttft": 160.0}))
    assert caught.value.column == "median_ttft"


def test_metadata_in_an_object_or_its_text_fills_columns(row):
    inner = {"deployment": "mine", "max-num-seqs": 16, "completed": 3, "request_rate": 9, "notes": {"a": 1}}
    config = {"speculative_config": {"method": "eagle3", "num_speculative_tokens": 2}}
    for metadata in (inner | config, json.dumps(inner | config)):
        got = row(SPEC | {"metadata": metadata})
        assert (got["deployment"], got["max_batch_size"], got["method"]) == ("mine", 16, "eagle3")
        assert (got["n_requests"], got["concurrency"]) == (40, 4), "what the client measured is not overridden"
    assert row(PLAIN | {"metadata": inner, "deployment": "outer"})["deployment"] == "outer"
    assert row(PLAIN | {"metadata": "not json", "max-num-seqs": 8})["max_batch_size"] == 8


def test_waiting_in_the_client_is_measured_where_the_client_says_so(write):
    """`max_concurrent_requests` counts whole seconds that a request touches: it may exceed the cap without waiting."""
    capped = OPEN | {"max_concurrency": 8, "max_concurrent_requests": 12, "mean_e2el_ms": 1000.0}
    assert read_trace(write(capped | {"queue_times": [1e-4] * 40})).warnings == []
    warned = read_trace(write(capped | {"queue_times": [0.5] * 40})).warnings
    assert any("waited 0.5 s on average in the client" in line for line in warned)
    keyed = read_trace(
        write(capped | {"mean_client_queue_time_ms": 500.0, "mean_e2el_including_client_queue_ms": 1500})
    )
    assert any("waited 0.5 s" in line for line in keyed.warnings) and keyed.frame["e2e_mean"].tolist() == [1.0]
    closed = read_trace(write(PLAIN | {"queue_times": [9.0] * 40, "mean_client_queue_time_ms": 9000.0}))
    assert closed.warnings == [], "in a closed loop the client holds requests back by design"


def test_events_of_several_tokens_without_a_word_of_drafts_are_named(write):
    speculating = PLAIN | {"mean_itl_ms": 150.0, "mean_tpot_ms": 60.0}
    assert any("itl is 2.5 times tpot" in line for line in read_trace(write(speculating)).warnings)
    assert not any("times tpot" in line for line in read_trace(write(SPEC | {"mean_itl_ms": 130.0})).warnings)


def test_old_and_new_keys_besides_are_passed_over(row):
    more = {
        "request_goodput:": None,
        "best_of": 1,
        "rtfx": 0.0,
        "probe_completed": 3,
        "rps_change_events": [{"rps": 1, "timestamp": "x"}],
        "mean_client_queue_time_ms": 0.1,
        "p99_9_ttft_ms": 170.0,
        "p99.9_ttft_ms": 170.0,
    }
    assert row(PLAIN | more).equals(row(PLAIN))


def test_failed_requests_are_no_latencies(row):
    """0.33 keeps `latencies` in every file, 0 for a request that failed; errors only with --save-detailed."""
    bare = {k: v for k, v in PLAIN.items() if "e2el" not in k} | {"failed": 10, "num_prompts": 50}
    got = row(bare | {"latencies": [2.0] * 40 + [0.0] * 10, "queue_times": [0.0] * 50})
    assert (got["e2e_mean"], got["e2e_p50"], got["effective_batch_size"]) == (2.0, 2.0, 4.0)


def test_the_summary_of_a_sweep_is_the_results_again(write):
    runs = [
        PLAIN | {"run_number": 0, "max_num_seqs": 16, "temperature": 0},
        SPEC
        | {"speculative_config": {"method": "eagle3", "model": None, "num_speculative_tokens": 2}, "run_number": 0},
        SPEC
        | {"speculative_config.method": "dflash", "speculative_config.num_speculative_tokens": 2, "max-num-seqs": 8}
        | {"latencies": [1.9] * 40, "queue_times": [0.0] * 40, "label": "8"},
        OPEN | {"request_rate": 2.0},
    ]
    by_json = read_trace(write(runs, "runs.json")).frame
    text = sweep_csv(runs)
    assert text.startswith(",") and "{'method': 'eagle3', 'model': None" in text and "16.0" in text
    trace = read_trace(write(text, "summary.csv"))
    assert trace.frame["source_row"].tolist() == [2, 3, 4, 5]
    assert trace.frame["method"].tolist() == ["none", "eagle3", "block", "none"]
    assert trace.frame["max_batch_size"].tolist()[::2] == [16, 8] and trace.frame["workload"].tolist()[2] == "8"
    assert trace.frame["concurrency"].tolist()[:3] == [4, 4, 4] and trace.frame["arrival_rate"].tolist()[3] == 2
    for name in by_json.columns:
        if name not in ("run", "source_file", "source_row"):
            pd.testing.assert_series_equal(trace.frame[name], by_json[name], check_exact=True)


def test_a_summary_with_bad_rows(write):
    text = sweep_csv([PLAIN, PLAIN | {"completed": 0}, PLAIN | {"mean_ttft_ms": "fast"}])
    path = write(text, "summary.csv")
    with pytest.raises(TraceProblems, match="2 problems"):
        read_trace(path)
    assert read_trace(path, skip_bad_rows=True).frame["source_row"].tolist() == [2]
    with pytest.raises(TraceError, match="wrong number of cells"):
        read_trace(write(text[:-40], "summary.csv"))
    with pytest.raises(TraceError, match="the table has no rows"):
        read_trace(write(text.splitlines()[0], "summary.csv"))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    cell=st.text(max_size=12) | st.sampled_from(["inf", "nan", "1e999", "[1, 2", "{'a': }", "((((", "True"]),
)
def test_one_changed_cell_of_a_summary_is_read_or_named(tmp_path_factory, data, cell):
    frame = pd.DataFrame.from_records([SPEC, SPEC | {"speculative_config": {"num_speculative_tokens": 2}}]).astype(
        object
    )
    frame.loc[1, data.draw(st.sampled_from(list(frame.columns)))] = cell
    path = tmp_path_factory.getbasetemp() / "mutated.csv"
    path.write_bytes(frame.to_csv().encode("utf-8", "replace"))
    try:
        got = read_trace(path).frame
    except TraceError as error:
        assert error.file == str(path)
        return
    assert len(got) == 2 and (got["output_length"] >= 1).all()


def test_a_sweep_folder_counts_each_run_once(write, tmp_path):
    first, second = PLAIN | {"run_number": 0}, OPEN | {"run_number": 0}
    write(first, "sweep/SERVE-a-BENCH-x/run=0.json")
    write(second, "sweep/SERVE-a-BENCH-y/run=0.json")
    write([first], "sweep/SERVE-a-BENCH-x/summary.json")
    write([second], "sweep/SERVE-a-BENCH-y/summary.json")
    write(PLAIN | {"completed": 2}, "sweep/SERVE-a-BENCH-x/warmup.json")
    write({"run_number": 1, "error": "boom"}, "sweep/SERVE-a-BENCH-x/run=1.failure.json")
    write({"error": "boom"}, "sweep/SERVE-b-failure.json")
    write(sweep_csv([first, second]), "sweep/summary.csv")
    trace = read_trace(tmp_path / "sweep")
    assert sorted(trace.frame["n_requests"]) == [40, 40] and len(trace.sources) == 2
    assert any("summary.csv" in line and "warmup.json" in line for line in trace.warnings)
    (tmp_path / "sweep" / "SERVE-a-BENCH-x" / "run=0.json").unlink()
    partly = read_trace(tmp_path / "sweep")  # its summary.json stands in for the run that is gone
    assert len(partly) == 2 and any(name.endswith("BENCH-x/summary.json") for name in partly.sources)
    for name in ("SERVE-a-BENCH-x/summary.json", "SERVE-a-BENCH-y/summary.json", "SERVE-a-BENCH-y/run=0.json"):
        (tmp_path / "sweep" / name).unlink()
    only = read_trace(tmp_path / "sweep")
    assert len(only) == 2 and only.sources == [str(tmp_path / "sweep" / "summary.csv")]


def test_a_folder_without_results(tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(TraceError, match="no trace in this folder"):
        read_trace(tmp_path)


@settings(max_examples=80, deadline=None)
@given(
    key=st.sampled_from(sorted(SPEC)),
    value=st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
        max_leaves=3,
    ),
    drop=st.booleans(),
)
def test_one_changed_key_is_read_or_named(tmp_path_factory, key, value, drop):
    record = SPEC | {key: value}
    if drop:
        del record[key]
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_text(json.dumps(record))
    try:
        frame = read_trace(path).frame
    except TraceError as error:
        assert error.file == str(path)
        return
    assert len(frame) == 1 and frame["output_length"].iloc[0] >= 1
    assert np.isfinite(frame["concurrency"].iloc[0]) != np.isfinite(frame["arrival_rate"].iloc[0])


@settings(max_examples=40, deadline=None)
@given(at=st.integers(0, len(json.dumps(SPEC)) - 1))
def test_a_result_cut_anywhere_is_an_error(tmp_path_factory, at):
    path = tmp_path_factory.getbasetemp() / "cut.json"
    path.write_text(json.dumps(SPEC)[:at])
    with pytest.raises(TraceError):
        read_trace(path)


OWN = Path(__file__).parent / "fixtures" / "vllm_bench"


def test_our_own_detailed_result_agrees_with_its_requests():
    """Every number put together from the arrays of the eight requests; vLLM 0.32, four drafts a step."""
    record = json.loads((OWN / "spec_detailed.json").read_text())
    got = read_trace(OWN / "spec_detailed.json").frame.iloc[0]
    ttft, e2e, tokens = (np.array(record[key]) for key in ("ttfts", "latencies", "output_lens"))
    gaps = np.concatenate(record["itls"])
    assert got["ttft_mean"] == pytest.approx(ttft.mean()) and got["ttft_p90"] == pytest.approx(np.percentile(ttft, 90))
    assert got["e2e_mean"] == pytest.approx(e2e.mean()) and got["e2e_p99"] == pytest.approx(np.percentile(e2e, 99))
    assert got["tpot_mean"] == pytest.approx(((e2e - ttft) / (tokens - 1)).mean())
    assert got["itl_mean"] == pytest.approx(gaps.mean()) and got["itl_p50"] == pytest.approx(np.median(gaps))
    assert got["effective_batch_size"] == pytest.approx(e2e.sum() / record["duration"])
    assert (got["arrival_rate"], got["prompt_length"], got["output_length"]) == (2, 64, 16)
    assert got["draft_length"] == 4 and got["tokens_per_step"] == pytest.approx(1 + 93 / 35)
    assert got["draft_acceptance_rate"] == pytest.approx(93 / 140)
    marginal = np.cumprod(got["position_acceptance"])
    assert marginal * 35 == pytest.approx(np.round(marginal * 35)), "accepted at a position is a whole number of tokens"
    assert 1 + marginal.sum() == pytest.approx(got["tokens_per_step"])
    assert got["position_acceptance"] == pytest.approx((0.95, 0.85, 0.7, 0.6), abs=0.05), "imposed on the server"
    assert got["engine"] == "vllm-0.32.0-cpu", "metadata of the run"


def test_our_own_lines_and_a_closed_loop():
    lines = [json.loads(line) for line in (OWN / "spec_append.jsonl").read_text().splitlines()]
    frame = read_trace(OWN / "spec_append.jsonl").frame
    assert frame["arrival_rate"].tolist() == [3, 6] and frame["source_row"].tolist() == [1, 2]
    assert frame["effective_batch_size"].tolist() == pytest.approx(
        [sum(record["latencies"]) / record["duration"] for record in lines]
    )
    closed = read_trace(OWN / "spec_summary.json")
    got = closed.frame.iloc[0]
    assert got["concurrency"] == 2 and np.isnan(got["arrival_rate"])
    assert got["throughput"] * got["e2e_mean"] == pytest.approx(got["effective_batch_size"], rel=1e-3)
    assert not any("waited" in line for line in closed.warnings), "8 in one second, never more than 2 at once"


def test_our_own_sweep_is_the_same_as_files_and_as_its_summary():
    """`vllm bench sweep serve` of vLLM 0.32: plain and two drafts, each at 2 req/s and at 2 in flight, twice."""
    folder = OWN.parent / "vllm_sweep" / "tiny"
    trace = read_trace(folder.parent)
    assert len(trace) == 8 and sorted(read_trace(folder).frame["run"]) == sorted(trace.frame["run"])
    assert "SERVE--spec_k2-BENCH--c2/run=1" in set(trace.frame["run"])
    by_csv = read_trace(folder / "summary.csv").frame
    key = ["method", "concurrency", "e2e_mean"]
    files, table = (frame.sort_values(key).reset_index(drop=True) for frame in (trace.frame, by_csv))
    for name in files.columns:
        if name not in ("run", "source_file", "source_row"):
            pd.testing.assert_series_equal(files[name], table[name], rtol=1e-12)
    assert files["max_batch_size"].eq(8).all() and files["method"].tolist() == ["draft_model"] * 4 + ["none"] * 4
    drafting = files[files["draft_length"] == 2]
    assert len(drafting) == 4 and set(drafting["drafter"]) == {"small_first_1"}
    assert drafting["tokens_per_step"].tolist() == pytest.approx([1 + 46 / 45] * 4)
    assert drafting["position_acceptance"].iloc[0] == pytest.approx((25 / 45, 21 / 25))
    closed = files[files["concurrency"] == 2]
    assert len(closed) == 4 and (closed["throughput"] * closed["e2e_mean"] / 2).between(0.97, 1.001).all()
    assert files["arrival_rate"].dropna().eq(2).sum() == 4


def test_our_own_failed_run_is_refused():
    with pytest.raises(TraceError, match="no request completed"):
        read_trace(OWN / "all_failed.json")


def test_the_measured_results_agree_with_their_table(shared, tmp_path):
    """Our converter and the one that made the published table agree on every number."""
    folder = shared / "traces" / "vllm_cpu"
    table = read_trace(folder / "quiet_operating_points.csv").frame.set_index("run")
    for run in table.index:
        source = folder / "raw" / f"{run}.json"
        if source.is_file():
            shutil.copy(source, tmp_path)
    raw = read_trace(tmp_path).frame.set_index("run")
    assert sorted(raw.index) == sorted(table.index)
    for name in ("draft_length", "concurrency", "arrival_rate", "prompt_length", "output_length", "n_requests"):
        np.testing.assert_array_equal(raw.loc[table.index, name], table[name], err_msg=name)
    for name in ("ttft_mean", "ttft_p99", "itl_mean", "itl_p50", "tpot_mean", "e2e_mean", "throughput"):
        np.testing.assert_allclose(raw.loc[table.index, name], table[name], rtol=1e-6, err_msg=name)
    for name in ("effective_batch_size", "tokens_per_step"):
        np.testing.assert_allclose(raw.loc[table.index, name], table[name], rtol=1e-5, err_msg=name)
    for run in table.index:
        if table["position_acceptance"][run] is not None:
            assert raw["position_acceptance"][run] == pytest.approx(table["position_acceptance"][run], abs=1e-5)


FIXTURES = {
    "benchmark_serving_detailed_c4.json": None,
    "benchmark_serving_v0.7_20250304__nv-action.json": "prompt_length': the column is missing",
    "vllm_bench_serve_all_failed_v0.25.1__er0080.json": "no request completed",
    "vllm_bench_serve_openloop_spec_eagle3_v0.14.1__do-gtc.json": None,
    "vllm_bench_serve_openloop_v0.14.1__do-gtc.json": None,
    "vllm_bench_serve_spec_v0.25.1__er0080.json": None,
    "vllm_bench_serve_v0.25.1__er0080.json": None,
    "vllm_bench_sweep_run0_v0.25.1__er0080.json": None,
    "vllm_bench_sweep_summary_v0.25.1__er0080.json": None,
    "vllm_variant_seconds_units__inferencex.json": None,
}


@pytest.mark.parametrize(("name", "message"), FIXTURES.items())
def test_results_of_real_clients(shared, name, message):
    path = shared / "fixtures" / "vllm_bench" / name
    if message is not None:
        with pytest.raises(TraceError, match=message):
            read_trace(path)
        return
    frame = read_trace(path).frame
    raw = json.loads(path.read_text())
    raw = raw if isinstance(raw, list) else [raw]
    assert frame["throughput"].tolist() == [record["request_throughput"] for record in raw]
    for key, factor in (("median_ttft_ms", 1e-3), ("median_ttft", 1.0)):
        if key in raw[0]:
            assert frame["ttft_p50"].tolist() == pytest.approx([record[key] * factor for record in raw])
    assert (frame["ttft_p50"] < 10).all() and (frame["tpot_p50"] < 0.1).all()
    if "spec" in name:
        assert frame["draft_length"].tolist() == [3]
        first = frame["position_acceptance"].iloc[0]
        assert 1 + np.cumprod(first).sum() == pytest.approx(frame["tokens_per_step"].iloc[0], rel=1e-6)
