"""The JSON of `vllm bench serve`: units, acceptance, loops, metadata, folders, and what is no result."""

import doctest
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffspec.results import TraceError
from diffspec.traces import TraceProblems, read_trace, read_vllm_bench
from diffspec.traces.readers import bench_record

PLAIN = {
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
SPEC = PLAIN | {
    "spec_decode_acceptance_rate": 60.0,
    "spec_decode_acceptance_length": 2.2,
    "spec_decode_num_drafts": 560,
    "spec_decode_draft_tokens": 1120,
    "spec_decode_accepted_tokens": 672,
    "spec_decode_per_position_acceptance_rates": [0.8, 0.4],
}
OPEN = PLAIN | {"request_rate": 2.0, "max_concurrency": None, "num_prompts": 40}


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


def test_an_older_client_without_token_totals_is_refused(write):
    old = {k: v for k, v in PLAIN.items() if k not in ("total_input_tokens", "total_output_tokens")}
    with pytest.raises(TraceError, match=r"total_input_tokens.*older client"):
        read_trace(write(old))


def test_a_missing_throughput_and_failure_count_are_worked_out(row):
    got = row({k: v for k, v in PLAIN.items() if k not in ("request_throughput", "failed")} | {"num_prompts": 42})
    assert (got["throughput"], got["failed"]) == (2.0, 2.0)


NOT_RESULTS = [
    (b'{"num_prompts": 3', "cut off"),
    (json.dumps(PLAIN)[:-30].encode(), "cut off"),
    (b"{]", "not valid JSON"),
    (b"[" * 200_000, "nested too deeply|not valid JSON"),
    (b'{"completed": ' + b"9" * 5000 + b', "mean_ttft_ms": 1}', "cannot be read"),
    (b"{}", "no result of vllm bench serve"),
    (b"[]", "an empty list"),
    (b"[1, 2]", "no result of vllm bench serve"),
    (b'{"hello": "\xff"}', "not UTF-8"),
    (b'{"completed": 8, "mean_ttft_ms": 1, "accept_length": 2, "mean_e2e_latency_ms": 3}', "SGLang"),
    (b'{"metadata": {}, "benchmarks": []}', "GuideLLM"),
    (b'{"num_prompts": 8, "median_ttft": 0.3}', "no '_ms'"),
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
    assert "notes" not in skipped
    write("{", "sweep/broken.json")
    with pytest.raises(TraceError, match=r"broken\.json: not valid JSON"):
        read_trace(tmp_path / "sweep")


def test_a_folder_without_results(tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(TraceError, match="no result of vllm bench serve in this folder"):
        read_vllm_bench(tmp_path)


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
    "benchmark_serving_v0.7_20250304__nv-action.json": "older client",
    "vllm_bench_serve_all_failed_v0.25.1__er0080.json": "no request completed",
    "vllm_bench_serve_openloop_spec_eagle3_v0.14.1__do-gtc.json": None,
    "vllm_bench_serve_openloop_v0.14.1__do-gtc.json": None,
    "vllm_bench_serve_spec_v0.25.1__er0080.json": None,
    "vllm_bench_serve_v0.25.1__er0080.json": None,
    "vllm_bench_sweep_run0_v0.25.1__er0080.json": None,
    "vllm_bench_sweep_summary_v0.25.1__er0080.json": None,
    "vllm_variant_seconds_units__inferencex.json": "no '_ms'",
}


@pytest.mark.parametrize(("name", "message"), FIXTURES.items())
def test_results_of_real_clients(shared, name, message):
    path = shared / "fixtures" / "vllm_bench" / name
    if message is not None:
        with pytest.raises(TraceError, match=message):
            read_trace(path)
        return
    frame = read_trace(path).frame
    assert (frame["ttft_mean"] < 2).all() and (frame["throughput"] > 0).all()
    if "spec" in name:
        assert frame["draft_length"].tolist() == [3]
        first = frame["position_acceptance"].iloc[0]
        assert 1 + np.cumprod(first).sum() == pytest.approx(frame["tokens_per_step"].iloc[0], rel=1e-6)
