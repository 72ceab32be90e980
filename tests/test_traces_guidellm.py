"""GuideLLM's report and its CSV: which of its latencies is which of ours, loads, windows, drafts, real files."""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from bench_samples import CONCURRENT, POISSON, benchmark, by_status, report, summary, table
from hypothesis import given, settings
from hypothesis import strategies as st

from diffspec.results import TraceError
from diffspec.traces import TraceProblems, read_trace
from diffspec.traces.readers import guidellm


@pytest.fixture
def write(tmp_path):
    def write(content, name="benchmarks.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def row(write):
    return lambda one: read_trace(write(report(one))).frame.iloc[0]


def test_inter_token_latency_is_tpot_and_seconds_stay_seconds(write):
    trace = read_trace(write(report(benchmark(CONCURRENT))))
    got = trace.frame.iloc[0]
    assert got["ttft_mean"] == 0.04 and got["e2e_mean"] == 1.9
    assert got["tpot_mean"] == 0.06, "time_per_output_token_ms would be 0.059375: it holds the first token"
    assert got["ttft_mean"] + got["tpot_mean"] * (got["output_length"] - 1) == pytest.approx(got["e2e_mean"])
    assert got["ttft_p90"] == pytest.approx(0.04 * 1.4) and got["e2e_p95"] == pytest.approx(1.9 * 1.45)
    assert got["tpot_p99"] == pytest.approx(0.06 * 1.49) and got["tpot_p50"] == pytest.approx(0.06)
    assert (got["concurrency"], got["throughput"], got["effective_batch_size"]) == (4, 2, 3.8)
    assert (got["prompt_length"], got["prompt_scv"], got["output_scv"]) == (64, 0.25, 0)
    assert (got["verifier"], got["n_requests"], got["failed"]) == ("org/verifier", 40, 0)
    assert (got["draft_length"], got["method"]) == (0, "none")
    assert trace.warnings == []


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ({"type_": "synchronous", "worker_count": 1, "max_concurrency": 1}, {"concurrency": 1}),
        ({"type_": "concurrent", "streams": 8}, {"concurrency": 8}),
        ({"type_": "throughput", "max_concurrency": 16}, {"concurrency": 16}),
        (
            {"type_": "constant", "rate": 2.5},
            {"arrival_rate": 2.5, "arrival_process": "constant", "arrival_scv": 0},
        ),
        (POISSON, {"arrival_rate": 2, "arrival_process": "poisson", "arrival_scv": 1}),
    ],
)
def test_strategies_are_loads(row, strategy, expected):
    got = row(benchmark(strategy))
    assert {name: got[name] for name in expected} == expected
    assert np.isfinite(got["concurrency"]) != np.isfinite(got["arrival_rate"])


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"type_": "throughput", "max_concurrency": None}, "neither an open nor a closed loop"),
        ({"type_": "trace", "time_scale": 1.0}, "without a steady load"),
        ({"type_": "constant", "rate": None}, "the key is missing"),
        ({"type_": "constant", "rate": "2"}, "a finite number"),
        ({"type_": 3}, "without a steady load"),
    ],
)
def test_strategies_that_are_no_load(write, strategy, message):
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(write(report(benchmark(strategy))))
    assert str(caught.value.column).startswith("config.strategy.") and caught.value.row == 1


def test_a_sweep_gives_a_row_a_benchmark(write):
    rates = [1.0, 1.5, 2.0]
    path = write(report(*(benchmark(POISSON | {"rate": rate}) for rate in rates)))
    frame = read_trace(path).frame
    assert frame["arrival_rate"].tolist() == rates and frame["source_row"].tolist() == [1, 2, 3]
    assert frame["run"].tolist() == ["benchmarks#1", "benchmarks#2", "benchmarks#3"]


def test_failures_cuts_ramps_and_caps_are_said(write):
    totals = {"successful": 40, "incomplete": 5, "errored": 2, "total": 47}
    one = benchmark(POISSON | {"max_concurrency": 5, "rampup_duration": 3.0}, request_totals=totals)
    one["warnings"] = [{"code": "c", "message": "arrivals were late"}, 3, {"message": None}]
    trace = read_trace(write(report(one)))
    assert trace.frame["failed"].tolist() == [2]
    told = "\n".join(trace.warnings)
    for part in ("5 requests were cut off", "ran into max_concurrency 5", "ramped up over 3 s", "arrivals were late"):
        assert part in told


def test_stream_events_give_itl_and_where_they_hold_several_tokens_ask_for_the_draft_length(write):
    speculating = benchmark(CONCURRENT, iter_tokens_per_iteration=by_status(2.5))
    with pytest.raises(TraceError, match="draft_length': the value is missing"):
        read_trace(write(report(speculating)))
    got, notes, problems = guidellm.read_benchmark(speculating, "r")
    assert got["itl_mean"] == pytest.approx(0.15) and got["tokens_per_step"] == 2.5 and problems == []
    assert any("give method and draft_length" in note for note in notes)
    nearly = benchmark(CONCURRENT, iter_tokens_per_iteration=by_status(1.0035))
    got = read_trace(write(report(nearly))).frame.iloc[0]
    assert got["itl_mean"] == pytest.approx(0.06021) and got["draft_length"] == 0


def test_acceptance_from_vllms_metrics_of_each_request(write):
    """Draft length 2: histograms 1, 2, 3 and 1, 0, 3 over 10 steps, 14 of 20 drafts accepted, 8 steps at least one."""

    def answer(histogram):
        steps, accepted = sum(histogram), sum(j * count for j, count in enumerate(histogram))
        drafts = {
            "num_spec_steps": steps,
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": 2 * steps,
            "num_spec_tokens": 2,
            "mean_acceptance_length": 1 + accepted / steps,
            "draft_acceptance_rate": accepted / (2 * steps),
            "acceptance_histogram": histogram,
        }
        return {"request_id": "x", "response_metrics": {"queue_time_ms": 1.0, "speculative_decoding": drafts}}

    one = benchmark(CONCURRENT, iter_tokens_per_iteration=by_status(2.3))
    one["requests"]["successful"] = [answer([1, 2, 3]), answer([1, 0, 3]), {"response_metrics": None}]
    trace = read_trace(write(report(one)))
    got = trace.frame.iloc[0]
    assert (got["draft_length"], got["tokens_per_step"], got["draft_acceptance_rate"]) == (2, 2.4, 0.7)
    assert got["position_acceptance"] == pytest.approx((8 / 10, 6 / 8))
    assert any("2 of 40 requests" in line for line in trace.warnings)


def test_a_window_that_outlasts_the_run_is_mended(write):
    one = benchmark(CONCURRENT)
    one["scheduler_metrics"] |= {"measure_start_time": 1004.0, "measure_end_time": 1044.0, "request_end_time": 1014.0}
    one |= {"duration": 40.0, "warmup_duration": 2.0, "cooldown_duration": -30.0}
    trace = read_trace(write(report(one)))
    assert trace.frame["throughput"].tolist() == [8.0], "2 req/s over 40 s, of which requests ran for 10 s"
    assert trace.frame["effective_batch_size"].iloc[0] == pytest.approx(15.2)
    assert any("outlasts the run by 30 s" in line for line in trace.warnings)


def test_requests_that_end_with_the_window_count(write):
    low = benchmark(CONCURRENT, requests_per_second=by_status(1.8))
    trace = read_trace(write(report(low)))
    assert trace.frame["throughput"].tolist() == [2.0] and any("leaves out" in line for line in trace.warnings)
    warm = low | {"warmup_duration": 2.0}
    assert read_trace(write(report(warm))).frame["throughput"].tolist() == [1.8]
    late = copy.deepcopy(low)
    late["scheduler_metrics"]["end_time"] = 1030.0
    assert read_trace(write(report(late))).frame["throughput"].tolist() == [1.8]


def test_what_was_not_streamed_is_missing_not_zero(write):
    zero = {"time_to_first_token_ms": by_status(0.0), "inter_token_latency_ms": by_status(0.0)}
    got = read_trace(write(report(benchmark(CONCURRENT, **zero)))).frame.iloc[0]
    assert np.isnan(got["ttft_mean"]) and np.isnan(got["tpot_mean"]) and np.isnan(got["ttft_p99"])
    assert np.isnan(got["itl_mean"]) and got["e2e_mean"] == 1.9
    some = benchmark(CONCURRENT, time_to_first_token_ms=by_status(40.0, low=0.0))
    assert any("counts 0 for requests without one" in line for line in read_trace(write(report(some))).warnings)
    uneven = benchmark(CONCURRENT, output_token_count=by_status(32.0, variance=256.0))
    assert any("weighted by tokens" in line for line in read_trace(write(report(uneven))).warnings)


def test_the_shape_of_03_is_read_too(row):
    """As written by GuideLLM 0.3: arguments under `args`, totals beside the metrics, no scheduler_metrics."""
    one = benchmark(CONCURRENT)
    totals = one["metrics"].pop("request_totals")
    del one["metrics"]["iter_tokens_per_iteration"]
    old = {"args": {"strategy": {"type_": "concurrent", "streams": 4}}, "request_totals": totals}
    got = row(old | {"metrics": one["metrics"], "duration": 20.0})
    assert (got["concurrency"], got["n_requests"], got["tpot_mean"]) == (4, 40, 0.06) and np.isnan(got["itl_mean"])


def test_bad_values_are_named_with_their_path(write):
    for change, column, part in [
        ({"request_latency": {"successful": {"mean": "1.9"}}}, "metrics.request_latency.successful.mean", "finite"),
        ({"request_latency": {"successful": 3}}, "metrics.request_latency.successful", "an object"),
        ({"request_totals": {"successful": 0}}, "metrics.request_totals.successful", "no request completed"),
        ({"output_token_count": by_status(0.0)}, "output_length", "1 to"),
        ({"time_to_first_token_ms": by_status(-4.0)}, "metrics.time_to_first_token_ms.successful.mean", "at least 0"),
    ]:
        with pytest.raises(TraceError, match=part) as caught:
            read_trace(write(report(benchmark(CONCURRENT, **change))))
        assert (caught.value.row, caught.value.column) == (1, column)


def test_a_bad_benchmark_is_set_aside(write):
    path = write(report(benchmark(CONCURRENT), 3, benchmark({"type_": "trace"}), benchmark(POISSON)))
    with pytest.raises(TraceProblems, match="2 problems"):
        read_trace(path)
    assert read_trace(path, skip_bad_rows=True).frame["source_row"].tolist() == [1, 4]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["mean", "successful", "p50"]), inner),
    max_leaves=4,
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(data=st.data(), value=JSON)
def test_one_changed_value_is_read_or_named(tmp_path_factory, data, value):
    one = benchmark(CONCURRENT)
    place = one
    for _ in range(4):
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    path = tmp_path_factory.getbasetemp() / "mutated_guidellm.json"
    path.write_text(json.dumps(report(one, benchmark(CONCURRENT))))
    try:
        frame = read_trace(path).frame
    except TraceError as error:
        assert error.file == str(path)
        return
    assert len(frame) == 2 and (frame["output_length"] >= 1).all()


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 0.999), as_csv=st.booleans())
def test_a_report_cut_anywhere_is_an_error_or_its_whole_rows(tmp_path_factory, share, as_csv):
    several = [benchmark(CONCURRENT), benchmark(POISSON)]
    text = table(*several) if as_csv else json.dumps(report(*several))
    path = tmp_path_factory.getbasetemp() / "cut_guidellm"
    path.write_text(text[: int(share * len(text))])
    try:
        frame = read_trace(path).frame
    except TraceError as error:
        assert error.file == str(path)
        return
    assert as_csv and len(frame) <= 2 and frame["e2e_mean"].eq(1.9).all()


# GuideLLM's CSV -------------------------------------------------------------------------------------------------------


def test_the_csv_gives_the_rows_of_the_json(write):
    failed = benchmark(POISSON | {"rate": 1.234})
    failed["metrics"]["request_totals"] |= {"errored": 1}
    failed["metrics"]["request_latency"]["errored"] = summary(0.5)
    cut = {"successful": summary(3.8), "incomplete": summary(0.2), "errored": summary(0.0), "total": summary(4.0)}
    several = [benchmark(CONCURRENT, request_concurrency=cut), failed, benchmark({"type_": "constant", "rate": 2.5})]
    by_json = read_trace(write(report(*several))).frame
    by_csv = read_trace(write(table(*several), "benchmarks.csv")).frame
    assert by_csv["source_row"].tolist() == [4, 5, 6] and by_csv["arrival_rate"].tolist()[1:] == [1.234, 2.5]
    assert by_csv["failed"].tolist() == [0, 1, 0]
    assert by_csv["effective_batch_size"].tolist() == [4.0, 3.8, 3.8], "with the requests cut off at the end"
    for name in by_json.columns:
        if name not in ("source_file", "source_row"):
            known = by_json[name].notna()
            assert by_csv[name].notna().tolist() == known.tolist(), name
            for got, expected in zip(by_csv[name][known], by_json[name][known], strict=True):
                assert got == (pytest.approx(expected) if isinstance(expected, float) else expected), name


def test_rows_under_the_header_of_another_are_refused(write):
    failed = benchmark(CONCURRENT)
    failed["metrics"]["request_latency"]["errored"] = summary(0.5)
    path = write(table(benchmark(CONCURRENT), failed, benchmark(POISSON), aligned=False), "benchmarks.csv")
    with pytest.raises(TraceError, match=r"row 5: .* under the columns they belong to.*read its JSON"):
        read_trace(path)
    assert read_trace(path, skip_bad_rows=True).frame["source_row"].tolist() == [4, 6]
    whole = table(benchmark(CONCURRENT))
    with pytest.raises(TraceError, match="under the columns they belong to"):
        read_trace(write(whole[: whole.rindex(",")] + "\n", "benchmarks.csv"))


def test_the_rate_in_a_csv(write):
    """0.5 names only the kind and lists what it ran; 0.8 shows two decimals and lists the rates, but not of a sweep."""
    ran = [{"type_": "synchronous"}, POISSON | {"rate": 1.234}, POISSON | {"rate": 1.2341}]
    several = [benchmark(strategy) for strategy in ran]
    for index, one in enumerate(several):
        one["config"] |= {"run_index": index, "profile": {"type_": "sweep", "completed_strategies": ran}}
    old = table(*several).replace("poisson@1.23", "poisson")
    assert read_trace(write(old, "benchmarks.csv")).frame["arrival_rate"].tolist()[1:] == [1.234, 1.2341]
    for one in several:
        one["config"]["profile"] = {"kind": "poisson", "rate": [1.234, 2.0]}
    trace = read_trace(write(table(*several), "benchmarks.csv"))
    assert trace.frame["arrival_rate"].tolist()[1:] == [1.234, 1.234] and trace.warnings == []
    for one in several:
        one["config"]["profile"] = {"kind": "sweep"}
    trace = read_trace(write(table(*several), "benchmarks.csv"))
    assert trace.frame["arrival_rate"].tolist()[1:] == [1.23, 1.23]
    assert any("rounded to 0.01" in line for line in trace.warnings)
    without = table(*several).replace("poisson@1.23", "poisson")
    with pytest.raises(TraceProblems, match=r"config\.strategy\.rate': the key is missing"):
        read_trace(write(without, "benchmarks.csv"))
    for shown in ("throughput@unlimited", "throughput"):
        with pytest.raises(TraceError, match="one burst"):
            read_trace(write(table(several[0]).replace("synchronous", shown), "benchmarks.csv"))
    capped = read_trace(write(table(several[0]).replace("synchronous", "throughput@16"), "benchmarks.csv"))
    assert capped.frame["concurrency"].tolist() == [16]


def test_a_csv_with_bad_cells(write):
    text = table(benchmark(CONCURRENT))
    with pytest.raises(TraceError, match="Percentiles"):
        read_trace(write(text.replace("[20.0, 20.04", "[20.0"), "benchmarks.csv"))
    with pytest.raises(TraceError, match="a finite number"):
        read_trace(write(text.replace(",40.0,40.0,", ",many,40.0,", 1), "benchmarks.csv"))
    with pytest.raises(TraceError, match="header is incomplete"):
        read_trace(write("".join(text.splitlines(keepends=True)[:2]), "benchmarks.csv"))
    with pytest.raises(TraceError, match="no rows"):
        read_trace(write("".join(text.splitlines(keepends=True)[:3]), "benchmarks.csv"))


# Reports of our own: GuideLLM against a vLLM 0.32 with a draft length of 4 --------------------------------------------

OWN = Path(__file__).parent / "fixtures" / "guidellm"
DRAFTS = {"draft_length": 4, "method": "draft_model"}


@pytest.mark.parametrize("version", ["0.5.4", "0.8.1"])
def test_our_own_reports_as_json_and_csv(version):
    raw = json.loads((OWN / f"guidellm_{version}.json").read_text())["benchmarks"]
    by_json = read_trace(OWN / f"guidellm_{version}.json", identity=DRAFTS).frame
    by_csv = read_trace(OWN / f"guidellm_{version}.csv", identity=DRAFTS).frame
    assert by_json["arrival_rate"].tolist() == by_csv["arrival_rate"].tolist() == [2.0, 4.0]
    assert by_json["output_length"].tolist() == [32, 32] and by_json["n_requests"].tolist() == [12, 12]
    for (_, got), one in zip(by_json.iterrows(), raw, strict=True):
        metrics = {name: found["successful"]["mean"] for name, found in one["metrics"].items() if name[-2:] == "ms"}
        assert got["ttft_mean"] == pytest.approx(metrics["time_to_first_token_ms"] / 1000)
        whole = metrics["time_per_output_token_ms"] / 1000 * 32  # from the request's start to its last token
        assert got["ttft_mean"] + 31 * got["tpot_mean"] == pytest.approx(whole, rel=1e-9)
        assert got["e2e_mean"] == pytest.approx(whole, rel=0.05) and got["e2e_mean"] > whole
        assert got["throughput"] == pytest.approx(12 / one["duration"], rel=1e-6)
        events = one["metrics"]["output_tokens_per_iteration"]["successful"]["count"]
        assert got["itl_mean"] == pytest.approx(31 * 12 * got["tpot_mean"] / (events - 12)), "first events have no gap"
    for name in ("ttft_mean", "ttft_p99", "itl_mean", "tpot_p50", "tpot_p95", "e2e_p90", "throughput"):
        assert by_csv[name].tolist() == pytest.approx(by_json[name].tolist()), name
    assert by_csv["tokens_per_step"].between(3.4, 3.7).all() and by_csv["itl_mean"].gt(3 * by_csv["tpot_mean"]).all()


def test_our_own_report_without_the_draft_length_is_refused():
    for name in ("guidellm_0.5.4.json", "guidellm_0.5.4.csv", "guidellm_0.8.1.csv"):
        with pytest.raises(TraceProblems, match="draft_length': the value is missing"):
            read_trace(OWN / name)


def test_our_own_report_with_vllms_metrics_tells_the_acceptance_by_itself():
    """From the per-step arrays of the two requests that each benchmark kept."""
    raw = json.loads((OWN / "guidellm_0.8.1.json").read_text())["benchmarks"]
    trace = read_trace(OWN / "guidellm_0.8.1.json")
    assert any("2 of 12 requests" in line for line in trace.warnings)
    for (_, got), one in zip(trace.frame.iterrows(), raw, strict=True):
        drafts = [item["response_metrics"]["speculative_decoding"] for item in one["requests"]["successful"]]
        accepted = np.concatenate([item["per_step_accepted"] for item in drafts])
        reached = [int((accepted >= position).sum()) for position in range(5)]
        assert got["draft_length"] == 4 and got["tokens_per_step"] == pytest.approx(1 + accepted.mean())
        assert got["draft_acceptance_rate"] == pytest.approx(accepted.mean() / 4)
        expected = [after / before for before, after in itertools.pairwise(reached)]
        assert got["position_acceptance"] == pytest.approx(tuple(expected))


# Real reports ---------------------------------------------------------------------------------------------------------

REAL = (
    ("Qwen3-30B-A3B_tp4_fp8_benchmarks.json", 1),
    ("Qwen3-4B_sanity_benchmarks.json", 4),
    ("Qwen3-4B_tp2_fp8_benchmarks.json", 1),
    ("gpt-oss-20b_tp4_benchmarks.json", 1),
)


@pytest.mark.parametrize(("name", "concurrency"), REAL)
def test_real_reports_agree_with_their_requests(shared, name, concurrency):
    """Every number from the requests of the measured window, put together by hand."""
    path = shared / "fixtures" / "guidellm" / name
    raw = json.loads(path.read_text())["benchmarks"][0]
    start, end = raw["start_time"], raw["end_time"]
    requests = [
        item
        for item in raw["requests"]["successful"]
        if item["request_end_time"] >= start and item["request_start_time"] <= end
    ]
    timings = [item["info"]["timings"] for item in requests]
    ttft = np.array([t["first_token_iteration"] - t["request_start"] for t in timings])
    e2e = np.array([t["request_end"] - t["request_start"] for t in timings])
    decode = np.array([t["last_token_iteration"] - t["first_token_iteration"] for t in timings])
    tokens = np.array([item["output_tokens"] for item in requests])
    events = np.array([t["token_iterations"] for t in timings])
    got = read_trace(path).frame.iloc[0]
    assert (got["concurrency"], got["n_requests"], got["draft_length"]) == (concurrency, len(requests), 0)
    assert got["ttft_mean"] == pytest.approx(ttft.mean()) and got["e2e_mean"] == pytest.approx(e2e.mean())
    assert got["tpot_mean"] == pytest.approx(decode.sum() / (tokens - 1).sum(), rel=1e-6)
    assert got["itl_mean"] == pytest.approx(decode.sum() / (events - 1).sum(), rel=1e-6)
    assert got["prompt_length"] == pytest.approx(np.mean([item["prompt_tokens"] for item in requests]))
    last = max(item["request_end_time"] for item in requests)
    done = sum(start <= item["request_end_time"] <= end for item in requests)
    done = max(done, len(requests) if raw["warmup_duration"] == 0 else 0)  # one ends 48 us after the window
    assert got["throughput"] == pytest.approx(done / (min(end, last) - start), rel=2e-3)
    assert got["throughput"] * got["e2e_mean"] / concurrency == pytest.approx(1.0, abs=0.06), "Little's law"


def test_the_home_made_table_is_no_format(shared):
    with pytest.raises(TraceError, match="summary of benchmarks under other names") as caught:
        read_trace(shared / "fixtures" / "guidellm" / "nirjhar17_all-benchmarks_derived.csv")
    assert "ttft_mean_ms is ttft_mean in milliseconds" in str(caught.value)
