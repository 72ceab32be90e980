"""What an engine says of single requests: acceptance by position and step, times, and every shape it comes in."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffspec.results import TraceError
from diffspec.traces.readers import request_metrics
from diffspec.traces.readers.request_metrics import position_acceptance, read, recognises, steps
from diffspec.traces.source import Source

FIXTURES = Path(__file__).parent / "fixtures" / "vllm"


def summed(accepted, drafted, k):
    """The `speculative_decoding` object of steps that drafted and accepted so many tokens, level "summary"."""
    return {
        "mean_acceptance_length": 1 + sum(accepted) / max(1, len(accepted)),
        "draft_acceptance_rate": sum(accepted) / max(1, sum(drafted)),
        "acceptance_histogram": [accepted.count(j) for j in range(k + 1)],
        "num_spec_steps": len(accepted),
        "num_accepted_draft_tokens": sum(accepted),
        "num_draft_tokens": sum(drafted),
        "num_spec_tokens": k,
    }


def detailed(accepted, drafted, k):
    return summed(accepted, drafted, k) | {"per_step_accepted": accepted, "per_step_drafted": drafted}


def response(spec, output_tokens=None, **more):
    accepted = spec.get("per_step_accepted") if isinstance(spec, dict) else None
    if output_tokens is None:
        output_tokens = 1 + sum(count + 1 for count in accepted) if isinstance(accepted, list) else 40
    metrics = {
        "time_to_first_token_ms": 20.0,
        "generation_time_ms": 400.0,
        "queue_time_ms": 1.5,
        "mean_itl_ms": 10.0,
        "tokens_per_second": 90.0,
        "speculative_decoding": spec,
    }
    usage = {"prompt_tokens": 8, "completion_tokens": output_tokens, "total_tokens": 8 + output_tokens}
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "choices": [{"text": "x"}],
        "usage": usage,
        "metrics": metrics,
        **more,
    }


@pytest.fixture
def load(tmp_path):
    def load(content, name="responses.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        source = Source(path)
        assert recognises(source)
        return read(source)

    return load


THREE = detailed([2, 0, 1], [2, 3, 1], 3)


def test_a_detailed_response(load):
    row = load(response(THREE, task="code", temperature=0.7)).iloc[0]
    assert (row["drafts"], row["drafted_tokens"], row["accepted_tokens"], row["draft_length"]) == (3, 6, 3, 3)
    assert row["accepted_at"] == (2, 1, 0), "steps that accepted positions 1, 2, 3"
    assert row["drafted_at"] == (3, 2, 1), "the third step drafted one token, only the second drafted three"
    assert row["reached_at"] == (3, 1, 0), "position 2 was tried, after an accepted first, in one step"
    assert row["step_position"] == (1, 4, 5), "after the first token, then 2+1, then 0+1 more"
    assert (row["ttft"], row["generation_time"], row["tpot"]) == pytest.approx((0.02, 0.4, 0.01))
    assert (row["queue_time"], row["e2e_latency"]) == pytest.approx((0.0015, 0.42))
    assert (row["prompt_tokens"], row["output_tokens"], row["task"], row["temperature"]) == (8, 7, "code", 0.7)
    assert (row["request_id"], row["source_row"]) == ("cmpl-1", 1)


def test_a_histogram_alone(load):
    frame = load(response(summed([3, 1, 0, 3, 2], [3] * 5, 3)))
    row = frame.iloc[0]
    assert row["accepted_at"] == (4, 3, 2) and row["reached_at"] == (5, 4, 3) and row["drafted_at"] == (5, 5, 5)
    assert row["step_position"] is None and frame.attrs["warnings"] == []
    assert position_acceptance(frame) == pytest.approx((0.8, 0.75, 2 / 3))
    varied = load(response(summed([1, 0], [1, 3], 3)))
    assert any("lower bound" in line for line in varied.attrs["warnings"])


def test_varying_lengths_bias_a_histogram_and_not_the_arrays(load):
    """Each drafted token is accepted with 0.8, given those before; half of the steps draft one token, half four."""
    random = np.random.default_rng(11)
    drafted = [1 if random.random() < 0.5 else 4 for _ in range(40_000)]
    accepted = [int(np.cumprod(random.random(d) < 0.8).sum()) for d in drafted]
    requests = [(accepted[i : i + 200], drafted[i : i + 200]) for i in range(0, 40_000, 200)]
    exact = load("\n".join(json.dumps(response(detailed(a, d, 4))) for a, d in requests), "many.jsonl")
    assert position_acceptance(exact) == pytest.approx((0.8,) * 4, abs=0.012)
    rough = load("\n".join(json.dumps(response(summed(a, d, 4), 9999)) for a, d in requests), "rough.jsonl")
    assert position_acceptance(rough)[0] == pytest.approx(0.8, abs=0.012)
    assert position_acceptance(rough)[1] == pytest.approx(0.4, abs=0.012), "half of the steps never tried it"
    assert exact["drafts"].sum() == 40_000 and exact["accepted_tokens"].sum() == sum(accepted)


def test_acceptance_by_output_position(load):
    """Acceptance 1 while fewer than 20 tokens are out, then 0: the steps show where it changes."""
    accepted, out = [], 1
    while out < 40:
        accepted.append(3 if out < 20 else 0)
        out += accepted[-1] + 1
    frame = load([response(detailed(accepted, [3] * len(accepted), 3)), response(summed([1], [3], 3), 3)])
    table = steps(frame)
    assert len(table) == len(accepted) and (table["request"] == 0).all() and table["step"].iloc[-1] == len(accepted)
    early = table[table["position"] < 20]
    assert early["accepted"].sum() == early["drafted"].sum() == 15 and table["accepted"].sum() == 15
    assert table["position"].tolist()[:6] == [1, 5, 9, 13, 17, 21]


def test_steps_without_drafts(load):
    """Listed with no drafts they move the position on; not listed, the positions are not known."""
    listed = load(response(detailed([1, 0, 2], [2, 0, 2], 2), 7)).iloc[0]
    assert listed["drafts"] == 2 and listed["step_position"] == (1, 4) and listed["step_accepted"] == (1, 2)
    assert listed["drafted_at"] == (2, 2)
    unlisted = load(response(detailed([1, 2], [2, 2], 2), 60))
    assert unlisted["step_position"].iloc[0] is None and any(
        "no output positions" in w for w in unlisted.attrs["warnings"]
    )
    assert np.isnan(steps(unlisted)["position"]).all() and len(steps(unlisted)) == 2
    beyond = load(response(detailed([1, 4], [4, 4], 4), 6)).iloc[0]
    assert beyond["step_position"] == (1, 3), "the last step accepted more than max_tokens left room for"


def sse(*events, head=""):
    return head + "\n\n".join(f"data: {json.dumps(event)}" for event in events) + "\n\ndata: [DONE]\n\n"


BARE = {"time_to_first_token_ms": 20.0, "generation_time_ms": 400.0, "speculative_decoding": THREE}
CHUNK = {"id": "cmpl-1", "choices": [{"text": "a"}]}
USAGE = {"prompt_tokens": 8, "completion_tokens": 7}
SHAPES = {
    "response": (json.dumps(response(THREE)), 8),
    "indented": (json.dumps(response(THREE), indent=2), 8),
    "list": (json.dumps([response(THREE)]), 8),
    "bare metrics": (json.dumps(BARE), None),
    "bare speculation": (json.dumps(THREE), None),
    "guidellm": (json.dumps({"request_id": "r", "response_metrics": BARE}), None),
    "batch output": (json.dumps({"custom_id": "a", "response": {"status_code": 200, "body": response(THREE)}}), 8),
    "choice": (json.dumps({"choices": [{"index": 0, "speculative_decoding_stats": THREE}], "usage": USAGE}), 8),
    "stream": (sse(CHUNK, CHUNK, {"id": "cmpl-1", "choices": [], "usage": USAGE, "metrics": BARE}), 8),
    "usage after metrics": (sse(CHUNK, {"id": "cmpl-1", "metrics": BARE}, {"id": "cmpl-1", "usage": USAGE}), 8),
    "stream with headers": (
        sse({**CHUNK, "usage": USAGE, "metrics": BARE}, head="HTTP/1.1 200 OK\r\nserver: u\r\n\r\n"),
        8,
    ),
    "stream with events": (sse({**CHUNK, "usage": USAGE, "metrics": BARE}, head=": ping\nevent: chunk\n"), 8),
}


@pytest.mark.parametrize(("content", "prompt"), SHAPES.values(), ids=SHAPES)
def test_every_shape_says_the_same(load, content, prompt):
    frame = load(content, "file.txt")
    assert len(frame) == 1
    row = frame.iloc[0]
    assert row["accepted_at"] == (2, 1, 0) and row["reached_at"] == (3, 1, 0) and row["drafts"] == 3
    assert row["prompt_tokens"] == prompt or (prompt is None and np.isnan(row["prompt_tokens"]))


def test_a_sparse_histogram_of_earlier_versions(load):
    stats = summed([0, 3, 1], [3, 3, 3], 3) | {"acceptance_histogram": {"0": 1, "1": 1, "3": 1}}
    row = load({"choices": [{"index": 0, "speculative_decoding_stats": stats}], "usage": USAGE}).iloc[0]
    assert row["accepted_at"] == (2, 1, 1) and row["drafts"] == 3


def test_sglang(load):
    meta = {
        "id": "abc",
        "prompt_tokens": 10,
        "completion_tokens": 7,
        "e2e_latency": 0.5,
        "spec_verify_ct": 3,
        "spec_accept_length": 7 / 3,
        "spec_num_correct_drafts": 3,
        "spec_num_proposed_drafts": 9,
        "spec_correct_drafts_histogram": [1, 1, 1],
    }
    for content in ({"text": "x", "meta_info": meta}, {"choices": [{"meta_info": meta}], "usage": {}}, meta):
        row = load(content).iloc[0]
        assert (row["drafts"], row["drafted_tokens"], row["accepted_tokens"]) == (3, 9, 3)
        assert (row["prompt_tokens"], row["output_tokens"], row["e2e_latency"]) == (10, 7, 0.5)
        assert row["draft_length"] == 3, "nine tokens in three steps, though no step accepted three"
        assert row["accepted_at"] == (2, 1, 0) and row["reached_at"] == (3, 2, 1)
    plain = {"prompt_tokens": 10, "completion_tokens": 7, "e2e_latency": 0.5}
    assert np.isnan(load({"meta_info": plain}).iloc[0]["accepted_tokens"])


def test_times_without_speculation(load):
    row = load(response(None)).iloc[0]
    assert row["ttft"] == pytest.approx(0.02) and np.isnan(row["drafts"]) and row["accepted_at"] is None


def test_a_report_of_guidellm(tmp_path):
    one = {"request_id": "r", "response_metrics": BARE, "prompt_tokens": 64, "output_tokens": 7}
    requests = {"successful": [one, one | {"response_metrics": None}], "errored": [one], "incomplete": []}
    path = tmp_path / "benchmarks.json"
    path.write_text(
        json.dumps({"metadata": {}, "benchmarks": [{"requests": requests}, {"requests": {"successful": [one]}}]})
    )
    assert not recognises(Source(path)), "a report is operating points first"
    frame = read(Source(path))
    assert (
        len(frame) == 2 and frame["prompt_tokens"].tolist() == [64, 64] and frame["request_id"].tolist() == ["r", "r"]
    )
    assert frame["step_position"].tolist() == [(1, 4, 5)] * 2
    assert any("1 records have no metrics" in line for line in frame.attrs["warnings"])


def test_several_streams_in_one_transcript(load):
    other = detailed([1], [3], 3)
    events = [CHUNK, {"id": "b", "choices": []}, {"id": "b", "metrics": {"speculative_decoding": other}}]
    frame = load(sse(*events, {"id": "cmpl-1", "usage": USAGE, "metrics": BARE}))
    assert sorted(frame["drafts"]) == [1, 3] and frame["source_row"].tolist() == [7, 5]


# A change to the speculative_decoding object, and a part of the message.
BAD = [
    ({"acceptance_histogram": [1, 1, 1, 1], "per_step_accepted": None, "per_step_drafted": None}, "does not add up"),
    ({"per_step_accepted": [2, 0]}, "differ in length"),
    ({"per_step_accepted": None}, "differ in length"),
    ({"per_step_accepted": [2, 0, 2]}, "accepted more than it drafted"),
    ({"per_step_accepted": [2, 0, -1]}, "whole numbers"),
    ({"per_step_accepted": [2, 0, True]}, "whole numbers"),
    ({"per_step_accepted": "2,0,1"}, "whole numbers"),
    ({"per_step_drafted": [2, 3, 10**30]}, "whole numbers"),
    ({"num_spec_steps": 9}, "do not add up"),
    ({"num_spec_steps": "3"}, "a number, at least 0"),
    ({"num_spec_steps": float("nan")}, "a number, at least 0"),
    ({"num_draft_tokens": 10**400}, "a number, at least 0"),
    ({"num_spec_tokens": -1}, "a number, at least 0"),
    ({"num_spec_tokens": 10**12}, "at most 1000"),
    ({"num_spec_steps": 1e-9, "num_draft_tokens": 1e15}, "do not add up|at most 1000"),
    ({"acceptance_histogram": [1.5]}, "whole numbers"),
    ({"acceptance_histogram": {"a": 1}}, "a map from accepted"),
    ({"acceptance_histogram": {"9999999": 1}}, "a map from accepted"),
    ({"acceptance_histogram": 7}, "a list of counts"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_request_is_named_and_left_out(load, change, message):
    spoilt = response(THREE | change)
    with pytest.raises(TraceError, match=message):
        load(spoilt)
    frame = load([response(THREE), spoilt])
    assert len(frame) == 1 and any("1 of 2 requests left out" in line for line in frame.attrs["warnings"])


def test_what_holds_no_metrics(tmp_path):
    path = tmp_path / "stream.txt"
    path.write_text(sse(CHUNK))
    assert recognises(Source(path))
    with pytest.raises(TraceError, match="per-request-spec-decode-metrics"):
        read(Source(path))
    path.write_text(sse(CHUNK) + 'data: {"id": "x", "cho')
    with pytest.raises(TraceError, match=r"row 5.*cut off"):
        read(Source(path))
    for content in ('{"completed": 3, "mean_ttft_ms": 4}', "[]", "{}", '{"metrics": {"a": 1}}', '{"metrics": null}'):
        path.write_text(content)
        assert not recognises(Source(path)), content
    nested = response(THREE)
    for _ in range(10):
        nested = {"response": nested}
    path.write_text(json.dumps(nested))
    assert not recognises(Source(path)), "not searched for without end"
    several = {"choices": [{"text": ""}] * 2, "metrics": None, "usage": USAGE}
    path.write_text(json.dumps([response(THREE), several]))
    assert any("1 records have no metrics" in line for line in read(Source(path)).attrs["warnings"])


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from([*THREE, "metrics", "usage", "id", "choices", "speculative_decoding"]), value=JSON)
def test_a_changed_field_is_read_or_named(tmp_path_factory, key, value):
    record = json.loads(json.dumps(response(THREE)))
    for holder in (record, record["metrics"], record["metrics"]["speculative_decoding"]):
        if key in holder:
            holder[key] = value
            break
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_text(json.dumps([record, response(THREE)]))
    frame = read(Source(path))
    assert 1 <= len(frame) <= 2 and (frame["drafts"].dropna() >= 0).all()


def test_doctest():
    import doctest

    assert doctest.testmod(request_metrics).failed == 0


def test_requests_of_a_real_engine():
    """vLLM 0.32.0 with a draft model of four tokens: one response, one stream, one stream with usage in every event."""
    one = read(Source(FIXTURES / "completion.json")).iloc[0]
    assert one["step_accepted"] == (3, 4, 4, 4) and one["accepted_at"] == (4, 4, 4, 3) and one["output_tokens"] == 16
    assert one["ttft"] == pytest.approx(0.022316544) and one["e2e_latency"] == pytest.approx(16 / 158.2894388449569)
    assert one["tpot"] == pytest.approx(one["generation_time"] / 15), "what vLLM calls mean ITL is per token"
    stream = read(Source(FIXTURES / "completion_stream.txt"))
    assert stream["step_accepted"].iloc[0] == (1, 2, 2, 1, 4) and stream["source_row"].iloc[0] == 20
    assert stream["step_position"].iloc[0] == (1, 3, 6, 9, 11), "as the words of the stream's events count"
    assert position_acceptance(stream) == pytest.approx((1.0, 0.6, 1 / 3, 1.0))
    usage = read(Source(FIXTURES / "completion_stream_continuous_usage.txt")).iloc[0]
    assert usage["output_tokens"] == 16 and usage["step_position"] == (1, 4, 9, 14)


def test_requests_in_a_real_report_of_guidellm():
    """GuideLLM 0.8.1 kept four requests: 34 steps, of which 34, 29, 20 and 13 accepted positions 1 to 4."""
    frame = read(Source(FIXTURES.parent / "guidellm" / "guidellm_0.8.1.json"))
    assert len(frame) == 4 and frame["drafts"].sum() == 34 and frame["output_tokens"].tolist() == [32] * 4
    assert position_acceptance(frame) == pytest.approx((34 / 34, 29 / 34, 20 / 29, 13 / 20))
    assert frame["accepted_tokens"].sum() == 34 + 29 + 20 + 13
    assert frame["tpot"].tolist() == pytest.approx((frame["generation_time"] / 31).tolist())
