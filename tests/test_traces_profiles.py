"""Speculation profiles, times of forward passes, and arrivals."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffspec.results import TraceError
from diffspec.traces.readers import arrivals, speculation_profile, step_samples
from diffspec.traces.readers.speculation_profile import from_conditional, from_record, write
from diffspec.traces.source import Source


@pytest.fixture
def source(tmp_path):
    def source(content, name="file.json"):
        path = tmp_path / name
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return Source(path)

    return source


# Speculation profiles

# As Model-Optimizer writes it: 100 steps emitted 1, 2 and 3 tokens in 40, 30 and 30 of them.
PROFILE = {
    "schema_version": "1.0",
    "measured": True,
    "method": "eagle3",
    "draft_checkpoint": {"id": "org/drafter"},
    "target_model": "org/verifier",
    "num_speculative_tokens": 3,
    "block_size": None,
    "max_supported_k": 3,
    "verification_method": "longest_prefix",
    "conditional_accept_rates": [0.6, 0.5, 0.0],
    "marginal_accept_rates": [0.6, 0.3, 0.0],
    "mean_accept_length": 1.9,
    "mean_accept_length_per_request": 2.1,
    "accept_length_model": "chain_analytic",
    "accept_length_by_k": {"3": 1.9, "1": 1.6},
    "acceptance_length_histogram": {"1": 40, "2": 30, "3": 30},
    "per_category": {
        "code": {"mean_accept_length": 2.2, "conditional_accept_rates": [0.8, 0.5, 0.0]},
        "chat": {"mean_accept_length": 1.5},
    },
    "measurement_conditions": {"dataset": "d", "concurrency": 1},
    "validation": {},
}


def test_a_profile(source):
    file = source(PROFILE)
    assert speculation_profile.recognises(file)
    found = speculation_profile.read(file)
    assert (found.method, found.num_speculative_tokens, found.tokens_per_step) == ("eagle3", 3, 1.9)
    assert found.conditional == (0.6, 0.5, 0.0) and found.marginal == (0.6, 0.3, 0.0)
    assert found.categories == {"code": (0.8, 0.5, 0.0)}
    assert found.category_tokens_per_step == {"code": 2.2, "chat": 1.5}
    assert (found.target_model, found.draft_checkpoint) == ("org/verifier", "org/drafter")
    assert found.by_length == {1: 1.6, 3: 1.9} and found.conditions["concurrency"] == 1 and found.warnings == ()


def test_each_convention_gives_the_other():
    for missing in ("conditional_accept_rates", "marginal_accept_rates"):
        found = from_record({key: value for key, value in PROFILE.items() if key != missing})
        assert found.conditional == pytest.approx((0.6, 0.5, 0.0)) and found.marginal == pytest.approx((0.6, 0.3, 0.0))
        null = from_record(PROFILE | {missing: None})
        assert null.conditional == pytest.approx((0.6, 0.5, 0.0))
    unsaid = from_record({"marginal_accept_rates": [0.5, 0.25], "schema_version": "1.0"})
    assert unsaid.tokens_per_step == 1.75 and unsaid.method is None


BAD_PROFILES = [
    ({"marginal_accept_rates": [0.6, 0.5, 0.0]}, "not the running product.*off by 0.2"),
    ({"conditional_accept_rates": [0.6, 0.3, 0.0]}, "the same numbers stand for both"),
    ({"marginal_accept_rates": [0.3, 0.6, 0.0], "conditional_accept_rates": None}, "perhaps these are the conditional"),
    ({"conditional_accept_rates": [60.0, 50.0, 0.0]}, "divide by 100"),
    ({"conditional_accept_rates": [0.6, "0.5", 0.0]}, "from 0 to 1"),
    ({"conditional_accept_rates": [0.6, True, 0.0]}, "from 0 to 1"),
    ({"conditional_accept_rates": [0.6, float("nan"), 0.0]}, "from 0 to 1"),
    ({"conditional_accept_rates": [0.6, 10**400, 0.0]}, "from 0 to 1"),
    ({"conditional_accept_rates": {"0": 0.6}}, "from 0 to 1"),
    ({"conditional_accept_rates": [0.5] * 2000}, "at most 1000"),
    ({"conditional_accept_rates": [0.6, 0.5]}, "differ in number"),
    ({"num_speculative_tokens": 5}, "3, the number of rates"),
    ({"num_speculative_tokens": "3"}, "3, the number of rates"),
    ({"mean_accept_length": 2.4}, "add up to 1.9.*cuts the rates short"),
    ({"mean_accept_length": 0.9}, "bonus token included"),
    ({"mean_accept_length": "1.9"}, "bonus token included"),
    ({"measured": False}, "a stub"),
    (
        {"conditional_accept_rates": None, "marginal_accept_rates": None, "vectors_unavailable_reason": "block"},
        "no acceptance by position.*block",
    ),
    ({"per_category": {"code": {"conditional_accept_rates": [2]}}}, "category 'code'"),
]


@pytest.mark.parametrize(("change", "message"), BAD_PROFILES, ids=range(len(BAD_PROFILES)))
def test_a_contradiction_is_an_error(source, change, message):
    file = source(PROFILE | change)
    assert speculation_profile.recognises(file)
    with pytest.raises(TraceError, match=message) as caught:
        speculation_profile.read(file)
    assert str(caught.value.file).startswith(file.file)


def test_small_differences_and_other_versions_are_told():
    rounded = from_record(PROFILE | {"marginal_accept_rates": [0.6, 0.301, 0.0]})
    assert rounded.marginal == (0.6, 0.3, 0.0) and any("differ by 0.001" in line for line in rounded.warnings)
    later = from_record(PROFILE | {"schema_version": "2.0", "per_category": {"x": 3}, "accept_length_by_k": {"a": 1}})
    assert len(later.warnings) == 3 and later.by_length == {}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_what_is_written_reads_back(conditional):
    profile = from_conditional(conditional, "eagle3", categories={"code": tuple(conditional)}, conditions={"n": 3})
    text = write(profile)
    again = from_record(json.loads(text))
    assert again.marginal == pytest.approx(np.cumprod(conditional), abs=1e-5)
    assert again.tokens_per_step == pytest.approx(1 + np.cumprod(conditional).sum(), abs=1e-5)
    assert again.conditional == pytest.approx(conditional, abs=1e-6) and again.warnings == ()
    assert again.categories["code"] == pytest.approx(conditional, abs=1e-6) and again.conditions == {"n": 3}
    raw = json.loads(text)
    assert raw["schema_version"] == "1.0" and raw["measured"] is True and raw["accept_length_model"] == "chain_analytic"
    assert raw["validation"]["mean_consistency"]["passed"] and raw["validation"]["marginal_monotonicity"]["passed"]
    assert set(PROFILE) - set(raw) == {"mean_accept_length_per_request"}


def test_a_block_drafter_is_no_chain():
    assert json.loads(write(from_conditional([0.5], "dflash")))["accept_length_model"] == "measured_per_k"
    odd = json.loads(write(speculation_profile.SpeculationProfile(None, 1, (0.5,), (0.5,), 1.9)))
    assert odd["validation"]["mean_consistency"]["passed"] is False


# Times of forward passes

LATENCY = {
    "timer": "cuda_event",
    "median": 5000.0,
    "mean": 5100.0,
    "std": 90.0,
    "min": 4900.0,
    "p90": 5300.0,
    "count": 20,
}
CASE = {
    "case": "verify",
    "requests": [
        {"query_len": 4, "kv_len": 1000, "num_draft_tokens": 3, "chunked": False},
        {"query_len": 4, "kv_len": 3000, "num_draft_tokens": 3, "chunked": False, "count": 2},
        {"query_len": 512, "kv_len": 512, "num_draft_tokens": 0, "chunked": True},
    ],
    "median_us": 5000.0,
    "ranks": [
        {
            "num_tokens": 524,
            "kv_blocks": 50,
            "routing": "real",
            "latency_us": LATENCY,
            "drafter": {
                "method": "eagle3",
                "acceptance": "all",
                "num_draft_tokens": 3,
                "latency_us": {"median": 700.0},
            },
        },
        {"num_tokens": 524, "latency_us": LATENCY | {"median": 5500.0}},
    ],
}


def test_step_samples(source):
    file = source([CASE, CASE | {"case": "again"}])
    assert step_samples.recognises(file)
    frame = step_samples.read(file)
    assert frame["case"].tolist() == ["verify", "verify", "again", "again"] and frame["rank"].tolist() == [0, 1, 0, 1]
    row = frame.iloc[0]
    assert (row["requests"], row["query_tokens"], row["kv_tokens"]) == (4, 524, 7512)
    assert (row["query_length_mean"], row["kv_length_mean"], row["draft_tokens"]) == (131, 1878, 9)
    assert (row["prefill_requests"], row["samples"], row["timer"]) == (1, 20, "cuda_event")
    times = row[["step_time_median", "step_time_mean", "step_time_min", "step_time_p90", "drafter_time"]]
    assert times.tolist() == pytest.approx([5e-3, 5.1e-3, 4.9e-3, 5.3e-3, 7e-4])
    assert frame["step_time_median"].iloc[1] == pytest.approx(5.5e-3) and frame["drafter"].iloc[1] is None
    assert frame["source_row"].tolist() == [1, 1, 2, 2] and "no sampling" in frame.attrs["warnings"][0]


BAD_CASES = [
    ({"requests": []}, "a list of requests"),
    ({"requests": [3]}, "a request is an object"),
    ({"requests": [{"kv_len": 4}]}, "need a query_len"),
    ({"requests": [{"query_len": -4}]}, "a number, at least 0"),
    ({"requests": [{"query_len": 4, "count": 0}]}, "need a query_len"),
    ({"requests": [{"query_len": 10**400}]}, "a number, at least 0"),
    ({"ranks": {}}, "a list of ranks"),
    ({"ranks": [{"latency_us": 5}]}, "a rank has latency_us"),
    ({"ranks": [{"latency_us": {"min": 5}}]}, "neither a median"),
    ({"ranks": [{"latency_us": {"median": float("nan")}}]}, "a number, at least 0"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CASES, ids=range(len(BAD_CASES)))
def test_a_bad_case_is_named_and_left_out(source, change, message):
    with pytest.raises(TraceError, match=message):
        step_samples.read(source(CASE | change))
    frame = step_samples.read(source([CASE, CASE | change]))
    assert len(frame) == 2 and any("1 cases left out" in line for line in frame.attrs["warnings"])


# Arrivals

ROWS = ((0.0, 4801, 10), (0.052, 3175, 8), (1.5, 112, 29))
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-20 18:17:03.9700000,4801,10\n"
    "2023-11-20 18:17:04.0220000,3175,8\n2023-11-20 18:17:05.4700000,112,29"
)
MOONCAKE = "\n".join(
    json.dumps({"timestamp": round(1000 * t), "input_length": i, "output_length": o, "hash_ids": [0]})
    for t, i, o in ROWS
)
BLIS = (
    "request_id,client_id,input_tokens,output_tokens,arrival_time_us,send_time_us,status\n"
    "0,a,4801,10,2000,9,ok\n1,a,3175,8,54000,9,ok\n2,b,112,29,1502000,9,ok\n"
)
SIMULATOR = "\n".join(
    json.dumps({"input_toks": i, "output_toks": o, "arrival_time_ns": 10**9 + round(t * 1e9)}) for t, i, o in ROWS
)
PLAIN = "arrival_time;prompt_tokens;output_tokens\n7;4801;10\n7.052;3175;8\n8.5;112;29\n"
LISTS = {
    "azure.csv": AZURE,
    "mooncake.jsonl": MOONCAKE,
    "blis.csv": BLIS,
    "simulator.jsonl": SIMULATOR,
    "plain.csv": PLAIN,
}


@pytest.mark.parametrize(("name", "content"), LISTS.items())
def test_every_list_of_arrivals_says_the_same(source, name, content):
    file = source(content, name)
    assert arrivals.recognises(file)
    frame = arrivals.read(file)
    assert frame["arrival_time"].tolist() == pytest.approx([0, 0.052, 1.5], abs=1e-9)
    assert frame["prompt_tokens"].tolist() == [4801, 3175, 112] and frame["output_tokens"].tolist() == [10, 8, 29]
    assert frame.attrs["warnings"] == []


def test_parquet_and_optional_lengths(source, tmp_path):
    path = tmp_path / "a.parquet"
    pd.DataFrame({"arrival_time": [5.0, 3.0, 9.0], "prompt_tokens": [1, 2, 3]}).to_parquet(path)
    frame = arrivals.read(Source(path))
    assert frame["arrival_time"].tolist() == [0, 2, 6] and frame["prompt_tokens"].tolist() == [2, 1, 3]
    assert frame["output_tokens"].isna().all() and any("sorted" in line for line in frame.attrs["warnings"])
    empty = arrivals.read(source("arrival_time,output_tokens\n1,\n2,7\n", "b.csv"))
    assert math.isnan(empty["output_tokens"].iloc[0]) and empty["output_tokens"].iloc[1] == 7


BAD_LISTS = [
    (PLAIN.replace("7.052", "soon"), "row 3, column 'arrival_time'"),
    (PLAIN.replace("7.052", "inf"), "row 3, column 'arrival_time'"),
    (PLAIN.replace("7.052", ""), "row 3, column 'arrival_time'"),
    (PLAIN.replace("3175", "-3175"), "row 3, column 'prompt_tokens'.*at least 0"),
    (PLAIN.replace("3175", "many"), "row 3, column 'prompt_tokens'"),
    (PLAIN.replace("3175", "nan"), "row 3, column 'prompt_tokens'"),
    ("arrival_time,prompt_tokens\n", "no arrivals"),
    ("arrival_time,prompt_tokens\n1,2,3\n", "cannot be read"),
    ("arrival_time,prompt_tokens\n1\n", "cannot be read"),
    (AZURE.replace("18:17:04.0220000", "later"), "row 3, column 'TIMESTAMP'.*a date and time"),
    (MOONCAKE.replace("52", "null"), "row 2, column 'timestamp'"),
    (MOONCAKE.replace("52", "true"), "row 2, column 'timestamp'"),
    (MOONCAKE.replace("52", "1" + "0" * 400), "row 2, column 'timestamp'"),
    (MOONCAKE.replace("3175", '"x"'), "row 2, column 'input_length'"),
    (MOONCAKE + "\n7", "row 4, column 'timestamp'"),
]


@pytest.mark.parametrize(("content", "message"), BAD_LISTS, ids=range(len(BAD_LISTS)))
def test_a_bad_arrival_is_named(source, content, message):
    file = source(content, "list.txt")
    assert arrivals.recognises(file)
    with pytest.raises(TraceError, match=message) as caught:
        arrivals.read(file)
    assert caught.value.file == file.file


def test_what_is_more_than_arrivals_is_left_to_others(source):
    for content in (
        "arrival_time,first_token_time,completion_time\n1,2,3\n",
        "deployment,arrival_time\na,2\n",
        "arrival_rate,prompt_length\n1,2\n",
        "time,tokens\n1,2\n",
        '{"timestamp": 3}',
        "",
    ):
        if content:
            assert not arrivals.recognises(source(content, "x")), content
    with pytest.raises(TraceError, match="no list of arrivals"):
        arrivals.read(source("time,tokens\n1,2\n"))


def test_the_summary_by_hand():
    times = np.concatenate([np.arange(0, 60, 2.0), np.arange(60, 120.1, 0.5), [180.0]])
    found = arrivals.summary(pd.DataFrame({"arrival_time": times, "prompt_tokens": [10.0, 30.0] * 76}))
    assert found["n_requests"] == 152 and found["duration"] == 180 and found["arrival_rate"] == pytest.approx(151 / 180)
    assert found["peak_rate"] == 2.0, "120 from 60 s on, that at 120 s not among them"
    gaps = np.array([2.0] * 30 + [0.5] * 120 + [60.0])
    assert found["arrival_scv"] == pytest.approx(gaps.var() / gaps.mean() ** 2)
    assert found["prompt_length"] == 20 and found["prompt_scv"] == pytest.approx(100 / 400)
    assert math.isnan(found["output_length"]) and math.isnan(found["output_scv"])
    one = arrivals.summary(pd.DataFrame({"arrival_time": [3.0]}))
    assert one["n_requests"] == 1 and math.isnan(one["arrival_rate"]) and math.isnan(one["peak_rate"])


def test_arrivals_of_known_variability():
    random = np.random.default_rng(3)
    gaps = random.gamma(0.25, 4 * 0.5, 100_000)  # mean 0.5 s, squared coefficient of variation 4
    found = arrivals.summary(pd.DataFrame({"arrival_time": np.cumsum(gaps)}))
    assert found["arrival_rate"] == pytest.approx(2.0, rel=0.03) and found["arrival_scv"] == pytest.approx(4, rel=0.05)


def test_a_clock_that_moves_in_steps_is_told(source):
    lines = [json.dumps({"timestamp": 3000 * (i // 10), "input_length": 1, "output_length": 1}) for i in range(100)]
    frame = arrivals.read(source("\n".join(lines), "steps.jsonl"))
    assert any("steps of about 3 s" in line for line in frame.attrs["warnings"])


PUBLIC = {
    "arrivals_azure2023/AzureLLMInferenceTrace_code.csv": (8819, 3436, 2.57, 13.2, 2048, 28),
    "arrivals_azure2023/AzureLLMInferenceTrace_conv.csv": (19366, 3502, 5.53, 1.09, 1155, 211),
    "arrivals_mooncake/conversation_trace.stripped.jsonl": (12031, 3537, 3.40, None, 12035, 343),
}


@pytest.mark.parametrize(("name", "expected"), PUBLIC.items())
def test_public_traces_have_their_published_numbers(shared, name, expected):
    requests, duration, rate, variation, prompt, output = expected
    frame = arrivals.read(Source(shared / "traces" / name))
    found = arrivals.summary(frame)
    assert found["n_requests"] == requests and found["duration"] == pytest.approx(duration, abs=0.6)
    assert found["arrival_rate"] == pytest.approx(rate, abs=0.005)
    assert found["prompt_length"] == pytest.approx(prompt, abs=0.6) and found["output_length"] == pytest.approx(
        output, abs=0.6
    )
    if variation:
        assert math.sqrt(found["arrival_scv"]) == pytest.approx(variation, rel=0.005)
    else:
        assert any("steps of about 3 s" in line for line in frame.attrs["warnings"])


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_field_is_read_or_named(tmp_path_factory, data):
    reader, record = data.draw(
        st.sampled_from(
            [(speculation_profile, PROFILE), (step_samples, CASE), (arrivals, json.loads(MOONCAKE.split("\n")[0]))]
        )
    )
    record = json.loads(json.dumps(record))
    holders = [record, *(value for value in record.values() if isinstance(value, dict))]
    for name in ("requests", "ranks"):
        holders += record.get(name, [])
    holders += [rank["latency_us"] for rank in record.get("ranks", [])]
    holder = data.draw(st.sampled_from(holders))
    if holder:
        holder[data.draw(st.sampled_from(sorted(holder)))] = data.draw(JSON)
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_text(json.dumps(record))
    if reader.recognises(Source(path)):
        try:
            reader.read(Source(path))
        except TraceError as error:
            assert str(error.file).startswith(str(path))


def test_doctests():
    import doctest

    for module in (speculation_profile, step_samples, arrivals):
        result = doctest.testmod(module)
        assert result.failed == 0 and result.attempted > 0
