"""The JSON lines of `sglang.bench_serving`: units, loops, acceptance, drafts, gaps put together again, real files."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from bench_samples import SGLANG as NEW
from bench_samples import SGLANG_2024 as OLD
from bench_samples import SGLANG_PLAIN as PLAIN
from hypothesis import given, settings
from hypothesis import strategies as st

from diffspec.results import TraceError
from diffspec.traces import TraceProblems, read_trace
from diffspec.traces.readers import sglang_bench


@pytest.fixture
def write(tmp_path):
    def write(*records):
        path = tmp_path / "sglang_0101.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


@pytest.fixture
def row(write):
    return lambda record: read_trace(write(record)).frame.iloc[0]


def test_a_result_of_the_newest_client(write):
    trace = read_trace(write(NEW))
    got = trace.frame.iloc[0]
    assert (got["concurrency"], got["throughput"], got["n_requests"]) == (4, 2, 40)
    assert (got["prompt_length"], got["output_length"], got["effective_batch_size"]) == (64, 32, 3.92)
    assert got["ttft_mean"] == 0.1 and got["ttft_p50"] == 0.09 and got["ttft_p90"] == 0.14 and got["ttft_p99"] == 0.16
    assert got["e2e_mean"] == 1.96 and got["e2e_p50"] == 1.95 and got["e2e_p95"] == 2.01 and got["tpot_mean"] == 0.06
    assert (got["verifier"], got["drafter"], got["engine"]) == ("org/verifier", "org/drafter", "sglang 0.5.23")
    assert (got["max_batch_size"], got["expert_ranks"], got["kv_capacity_tokens"]) == (48, 2, 9000)
    assert (got["method"], got["draft_length"], got["tokens_per_step"]) == ("eagle3", 3, 2.5)
    assert any("server's average since its start" in line for line in trace.warnings)
    assert np.isnan(got["itl_mean"]) and any("ITL is left out" in line for line in trace.warnings)


def test_a_plain_server_keeps_its_gaps(write):
    trace = read_trace(write(PLAIN))
    got = trace.frame.iloc[0]
    assert (got["method"], got["draft_length"]) == ("none", 0) and np.isnan(got["tokens_per_step"])
    assert got["itl_mean"] == 0.06 and got["itl_p95"] == 0.066
    assert trace.warnings == []


def test_bare_infinity_without_a_cap_is_a_burst(write):
    path = write(PLAIN | {"max_concurrency": None})
    assert '"request_rate": Infinity' in path.read_text()
    with pytest.raises(TraceError, match="neither an open nor a closed loop") as caught:
        read_trace(path)
    assert caught.value.column == "max_concurrency"


def test_the_client_of_2024_has_medians_and_the_batch_by_littles_law(row):
    got = row(OLD)
    assert (got["arrival_rate"], got["arrival_process"], got["throughput"]) == (2, "poisson", 2)
    assert (got["ttft_p50"], got["itl_p50"], got["e2e_mean"]) == (0.09, 0.06, 1.96)
    assert np.isnan(got["ttft_mean"]) and np.isnan(got["tpot_mean"])
    assert got["effective_batch_size"] == pytest.approx(1.96 * 40 / 20)


@pytest.mark.parametrize(
    ("change", "method", "drafted"),
    [
        ({"speculative_algorithm": "EAGLE"}, "eagle", 3),
        ({"speculative_algorithm": "NEXTN"}, "mtp", 3),
        ({"speculative_algorithm": "FROZEN_KV_MTP"}, "mtp", 3),
        ({"speculative_algorithm": "STANDALONE", "speculative_num_steps": 5}, "draft_model", 5),
        ({"speculative_eagle_topk": 4, "speculative_num_draft_tokens": 8}, "tree", 7),
        (
            {"speculative_algorithm": "NGRAM", "speculative_eagle_topk": 10, "speculative_num_draft_tokens": 12},
            "ngram",
            11,
        ),
        (
            {"speculative_algorithm": "DFLASH", "speculative_num_steps": None, "speculative_eagle_topk": None}
            | {"speculative_num_draft_tokens": 16},
            "block",
            15,
        ),
    ],
)
def test_the_verified_root_is_no_draft(row, change, method, drafted):
    got = row(NEW | {"server_info": NEW["server_info"] | change})
    assert (got["method"], got["draft_length"]) == (method, drafted)


def test_older_servers_keep_their_arguments_in_the_state(row):
    info = {key: value for key, value in NEW["server_info"].items() if key != "internal_states"}
    got = row(NEW | {"server_info": {"version": "0.4.10", "internal_states": [info]}})
    assert (got["method"], got["draft_length"], got["engine"]) == ("eagle3", 3, "sglang 0.4.10")
    apart = row(NEW | {"server_info": {"prefill": [{}], "decode": [NEW["server_info"]]}})
    assert (apart["method"], apart["verifier"]) == ("eagle3", "org/verifier")


def test_several_ranks_and_adaptive_drafts_are_said(write):
    info = NEW["server_info"] | {"internal_states": [{}, {}], "speculative_adaptive": True}
    warnings = read_trace(write(NEW | {"server_info": info})).warnings
    assert any("first of 2 ranks" in line for line in warnings) and any("adapts" in line for line in warnings)


def test_acceptance_without_the_server_needs_the_draft_length(write):
    with pytest.raises(TraceError, match="draft_length': the value is missing"):
        read_trace(write(NEW | {"server_info": None}))
    unknown = NEW | {"server_info": NEW["server_info"] | {"speculative_algorithm": "UNO"}}
    assert any("'uno' is not known" in line for line in read_trace(write(unknown)).warnings)


def test_details_put_the_gaps_together_again(write):
    """Two requests: events of 2 and 1 tokens after 40 and 20 ms; one of 3 tokens after 60 ms. The third failed."""
    details = {
        "input_lens": [32, 96, 64],
        "output_lens": [4, 4, 0],
        "ttfts": [0.1, 0.1, 0.0],
        "itls": [[0.02, 0.02, 0.0201], [0.021, 0.021, 0.021], [9.0]],
        "errors": ["", "", "refused"],
    }
    totals = {"completed": 2, "total_input_tokens": 128, "total_output_tokens": 8, "request_throughput": 0.1}
    trace = read_trace(write(NEW | totals | details))
    got = trace.frame.iloc[0]
    gaps = [0.04, 0.0201, 0.063]
    assert got["itl_mean"] == pytest.approx(np.mean(gaps)) and got["itl_p50"] == pytest.approx(0.04)
    assert got["itl_p99"] == pytest.approx(np.percentile(gaps, 99))
    assert (got["failed"], got["prompt_scv"], got["output_scv"]) == (1, 0.25, 0)
    assert not any("ITL is left out" in line for line in trace.warnings)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-3, 1.0), st.integers(1, 6)), min_size=1, max_size=12, unique_by=lambda e: e[0]))
def test_gaps_survive_their_division(events):
    parts = [gap / tokens for gap, tokens in events for _ in range(tokens)]
    if any(a[0] / a[1] == b[0] / b[1] for a, b in itertools.pairwise(events)):
        return
    got, _, problems = sglang_bench.read_record(NEW | {"itls": [parts], "errors": [""]}, "r")
    assert problems == [] and got["itl_mean"] == pytest.approx(np.mean([gap for gap, _ in events]))


def test_answers_that_were_not_streamed_have_no_first_token(write):
    zero = {key: 0.0 for key in PLAIN if key.endswith(("_ttft_ms", "_itl_ms"))}
    trace = read_trace(write(PLAIN | zero))
    assert np.isnan(trace.frame["ttft_mean"].iloc[0]) and np.isnan(trace.frame["tpot_mean"].iloc[0])
    assert trace.frame["e2e_mean"].iloc[0] == 1.96 and any("not streamed" in line for line in trace.warnings)


def test_an_open_loop_that_filled_its_cap_is_named(write):
    held = PLAIN | {"request_rate": 5.0, "max_concurrency": 4, "max_concurrent_requests": None}
    assert any("neither open nor closed" in line for line in read_trace(write(held)).warnings)
    free = held | {"max_concurrency": 256}
    assert read_trace(write(free)).warnings == []


def test_notes_that_rows_share_are_said_once(write):
    trace = read_trace(write(NEW, NEW | {"request_rate": 2.0}, NEW | {"request_rate": 1.0}))
    told = [line for line in trace.warnings if "server's average" in line]
    assert len(told) == 1 and "rows 1, 2, 3" in told[0]
    assert trace.frame["run"].tolist() == ["sglang_0101#1", "sglang_0101#2", "sglang_0101#3"]


# Change to a good result, the key or column blamed, a part of the message.
ERRORS = [
    ({"request_rate": "trace"}, "request_rate", "times of a trace"),
    ({"request_rate": "fast"}, "request_rate", "inf"),
    ({"request_rate": None}, "request_rate", "missing"),
    ({"request_rate": -1}, "request_rate", "at least 0"),
    ({"completed": 0}, "completed", "no request completed"),
    ({"completed": "40"}, "completed", "a finite number"),
    ({"mean_ttft_ms": "100"}, "mean_ttft_ms", "a finite number"),
    ({"mean_ttft_ms": math.nan}, "mean_ttft_ms", "a finite number"),
    ({"mean_e2e_latency_ms": 10**400}, "mean_e2e_latency_ms", "more than 30 digits"),
    ({"mean_tpot_ms": -1.0}, "mean_tpot_ms", "at least 0"),
    ({"max_concurrency": [4]}, "max_concurrency", "a finite number"),
    ({"accept_length": 4.5}, "tokens_per_step", "1 to 4"),
    ({"accept_length": "2.5"}, "accept_length", "a finite number"),
    ({"server_info": [1]}, "server_info", "an object"),
    ({"server_info": NEW["server_info"] | {"speculative_num_steps": "3"}}, "server_info.speculative_num_steps", "num"),
    ({"itls": [[1, "x"]]}, "itls", "a list of lists"),
    ({"itls": [3]}, "itls", "a list of lists"),
    ({"output_lens": [1, 10**400]}, "output_lens", "a list of finite numbers"),
    ({"total_output_tokens": 0}, "output_length", "1 to"),
]


@pytest.mark.parametrize(("change", "column", "part"), ERRORS)
def test_a_bad_value_is_named_with_its_key(write, change, column, part):
    path = write(NEW | change)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert (caught.value.file, caught.value.row, caught.value.column) == (str(path), 1, column)
    assert part in str(caught.value)


def test_bad_lines_are_set_aside(write):
    path = write(NEW, {"hello": 1}, NEW | {"completed": 0}, PLAIN)
    with pytest.raises(TraceProblems, match="2 problems"):
        read_trace(path)
    assert read_trace(path, skip_bad_rows=True).frame["source_row"].tolist() == [1, 4]


@settings(max_examples=80, deadline=None)
@given(
    key=st.sampled_from([*sorted(NEW), "itls", "errors", "input_lens", "output_lens"]),
    value=st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(sorted(NEW["server_info"])), inner),
        max_leaves=4,
    ),
)
def test_one_changed_key_is_read_or_named(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "mutated_sglang.jsonl"
    path.write_text(json.dumps(NEW | {key: value}))
    try:
        frame = read_trace(path).frame
    except TraceError as error:
        assert error.file == str(path)
        return
    assert len(frame) == 1 and frame["output_length"].iloc[0] >= 1


OWN = Path(__file__).parent / "fixtures" / "sglang"
DRAFTS = {"draft_length": 4, "method": "draft_model"}


def test_our_own_lines_of_a_speculating_vllm():
    """The client of SGLang knows nothing of another server's drafts; a vLLM 0.32 drafted four tokens a step."""
    with pytest.raises(TraceProblems, match="draft_length': the value is missing"):
        read_trace(OWN / "bench_vllm.jsonl")
    raw = [json.loads(line) for line in (OWN / "bench_vllm.jsonl").read_text().splitlines()]
    frame = read_trace(OWN / "bench_vllm.jsonl", identity=DRAFTS).frame
    opened, closed = frame.iloc[0], frame.iloc[1]
    assert (opened["arrival_rate"], opened["arrival_process"], closed["concurrency"]) == (3, "poisson", 2)
    assert closed["throughput"] * closed["e2e_mean"] == pytest.approx(closed["effective_batch_size"], rel=1e-6)
    for (_, got), record in zip(frame.iterrows(), raw, strict=True):
        assert got["throughput"] == pytest.approx(record["completed"] / record["duration"])
        assert got["output_length"] == record["output_throughput"] / record["request_throughput"] == 32
        assert got["ttft_p90"] * 1000 == record["p90_ttft_ms"] and got["itl_p50"] * 1000 == record["median_itl_ms"]
        assert got["tokens_per_step"] == pytest.approx(got["itl_mean"] / got["tpot_mean"])
        assert 3.2 < got["tokens_per_step"] < 4


def test_our_own_details_give_the_reported_means():
    record = json.loads((OWN / "bench_vllm_details.jsonl").read_text())
    got = read_trace(OWN / "bench_vllm_details.jsonl", identity=DRAFTS).frame.iloc[0]
    gaps = [gap for gaps in record["itls"] for gap in gaps]
    assert got["itl_mean"] == pytest.approx(np.mean(gaps)) == pytest.approx(record["mean_itl_ms"] / 1000)
    assert got["itl_p99"] == pytest.approx(np.percentile(gaps, 99)) == pytest.approx(record["p99_itl_ms"] / 1000)
    assert got["ttft_mean"] == pytest.approx(np.mean(record["ttfts"])) and got["ttft_p95"] == pytest.approx(
        np.percentile(record["ttfts"], 95)
    )
    assert (got["failed"], got["output_scv"], got["n_requests"]) == (0, 0, len(record["ttfts"]))
    tokens = np.array(record["output_lens"]) - 1
    tpot = [sum(gaps) / count for gaps, count in zip(record["itls"], tokens, strict=True)]
    assert got["tpot_mean"] == pytest.approx(np.mean(tpot), rel=0.05), "from the first to the last token"
    assert got["tokens_per_step"] == pytest.approx(tokens.sum() / len(gaps), rel=0.05)


ONLINE = (
    "llama_3_3_70b_online_output__datacrunch_20241214.jsonl",
    "llama_405b_online_output__datacrunch_20241214.jsonl",
)


@pytest.mark.parametrize("name", ONLINE)
def test_real_lines_of_december_2024(shared, name):
    path = shared / "fixtures" / "sglang" / name
    raw = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    frame = read_trace(path).frame
    assert len(frame) == len(raw) > 5
    for (_, got), record in zip(frame.iterrows(), raw, strict=True):
        assert got["arrival_rate"] == record["request_rate"] and np.isnan(got["concurrency"])
        assert got["ttft_p50"] * 1000 == pytest.approx(record["median_ttft_ms"])
        assert got["e2e_mean"] * 1000 == pytest.approx(record["mean_e2e_latency_ms"])
        assert got["output_length"] * record["completed"] == pytest.approx(record["total_output_tokens"])
        # The rate of tokens was worked out by the client: another way to the rate of requests.
        assert got["throughput"] * got["output_length"] == pytest.approx(record["output_throughput"])


def test_a_real_burst_of_december_2024_is_refused(shared):
    path = shared / "fixtures" / "sglang" / "llama_3_3_70b_offline_output__datacrunch_20241214.jsonl"
    with pytest.raises(TraceProblems, match="7 problems") as caught:
        read_trace(path)
    assert {problem.column for problem in caught.value.problems} == {"max_concurrency"}


def test_a_real_line_of_2025(shared):
    frame = read_trace(shared / "fixtures" / "sglang" / "sglang_bench_serving_2025_single_row__docstring.jsonl").frame
    got = frame.iloc[0]
    assert (got["arrival_rate"], got["draft_length"], got["output_length"]) == (5, 0, 195.775)
    assert got["effective_batch_size"] == pytest.approx(got["throughput"] * got["e2e_mean"], rel=1e-6)
    assert got["ttft_p99"] == pytest.approx(0.3279139723521075) and got["itl_p95"] == pytest.approx(
        0.018839622958330438
    )
