"""Scrapes of /metrics: what is read, differences, resets, percentiles of buckets, and operating points."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffspec.results import TraceError
from diffspec.traces import validate
from diffspec.traces.join import points
from diffspec.traces.readers.counters import difference, operating_point, percentile
from diffspec.traces.readers.prometheus import Histogram, parse, read, recognises
from diffspec.traces.source import Source

FIXTURES = Path(__file__).parent / "fixtures" / "vllm"
LABELS = 'engine="0",model_name="m"'


def histogram(name, observations, bounds=(0.1, 0.2, 0.5, 1.0), labels=LABELS):
    """The lines of a histogram of these observations."""
    lines = [f'{name}_bucket{{{labels},le="{le}"}} {sum(x <= le for x in observations)}.0' for le in bounds]
    lines.append(f'{name}_bucket{{{labels},le="+Inf"}} {len(observations)}.0')
    return [*lines, f"{name}_count{{{labels}}} {len(observations)}.0", f"{name}_sum{{{labels}}} {sum(observations)}"]


def exposition(*, drafts=None, drafted=0, at=(), generated=0, success=0, abort=0, gauges=(), extra=(), labels=LABELS):
    """A scrape in the names of vLLM 0.12 and later."""
    lines = ["# HELP vllm:num_requests_running Number of requests in model execution batches."]
    lines += [f"vllm:generation_tokens_total{{{labels}}} {float(generated)}"]
    lines += [f"vllm:generation_tokens_created{{{labels}}} 1.79e+09"]
    lines += [f'vllm:request_success_total{{{labels},finished_reason="length"}} {float(success)}']
    lines += [f'vllm:request_success_total{{{labels},finished_reason="abort"}} {float(abort)}']
    if drafts is not None:
        lines += [f"vllm:spec_decode_num_drafts_total{{{labels}}} {float(drafts)}"]
        lines += [f"vllm:spec_decode_num_drafts_created{{{labels}}} 1.79e+09"]
        lines += [f"vllm:spec_decode_num_draft_tokens_total{{{labels}}} {float(drafted)}"]
        lines += [f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}} {float(sum(at))}"]
        for index, count in enumerate(at):
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            lines.append(f'{name}{{{labels},position="{index}"}} {float(count)}')
    lines += [f"{name}{{{labels}}} {value}" for name, value in gauges]
    return "\n".join([*lines, *extra]) + "\n"


def gauges(running, waiting=0, usage=0.0):
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return list(zip(names, (running, waiting, usage), strict=True))


def one(text, file="scrape.txt"):
    (snapshot,) = parse(text, file)
    return snapshot


def scrape(time, **what):
    return one(f"# scrape {time}\n" + exposition(**what))


# Reading


def test_counters_are_read_and_created_gauges_are_not():
    found = one(exposition(drafts=10, drafted=40, at=(9, 7, 5, 4), generated=35, success=2, abort=1))
    assert found.engine == "vllm" and found.models == ("m",) and found.time is None
    assert found.counters == {"drafts": 10, "draft_tokens": 40, "accepted": 25, "generation_tokens": 35}
    assert found.accepted_at == (9, 7, 5, 4) and found.finished == {"length": 2, "abort": 1}


def test_engines_and_models_are_added_up_and_kv_usage_is_their_mean():
    text = exposition(generated=10, gauges=gauges(3, 1, 0.2))
    text += exposition(generated=5, gauges=gauges(4, 0, 0.6), labels='engine="1",model_name="other"')
    found = one(text)
    assert found.counters["generation_tokens"] == 15
    assert found.gauges == {"running": 7, "waiting": 1, "kv_usage": pytest.approx(0.4)}
    assert any("2 models are added up" in line for line in found.warnings)


def test_ranks_of_sglang_repeat_their_scheduler():
    lines = []
    for dp, running in ((0, 3), (1, 5)):
        for tp in (0, 1):
            labels = f'dp_rank="{dp}",model_name="m",tp_rank="{tp}"'
            lines.append(f"sglang:num_running_reqs{{{labels}}} {running}.0")
            lines += histogram("sglang:queue_time_seconds", [0.15] * (dp + 1), labels=labels)
    lines.append('sglang:prompt_tokens_total{is_streaming="true",model_name="m"} 600.0')
    lines.append('sglang:prompt_tokens_total{is_streaming="false",model_name="m"} 400.0')
    found = one("\n".join(lines) + "\n")
    assert found.engine == "sglang" and found.gauges["running"] == 8
    assert found.histograms["queue"].count == 3 and found.histograms["queue"].sum == pytest.approx(0.45)
    assert dict(found.histograms["queue"].buckets)[0.2] == 3 and found.counters["prompt_tokens"] == 1000


def test_the_histogram_called_total_and_the_itl_of_older_engines():
    lines = histogram("vllm:iteration_tokens_total", [8, 8, 1], (1, 8, 16))
    lines += histogram("vllm:time_per_output_token_seconds", [0.05, 0.15])
    found = one("\n".join(lines) + "\n")
    assert found.histograms["iteration_tokens"].sum == 17 and found.histograms["itl"].count == 2


def test_of_an_old_and_a_new_name_of_one_number_the_new_counts():
    lines = ["vllm:gpu_cache_usage_perc 0.5", "vllm:kv_cache_usage_perc 0.25", "vllm:generation_tokens_total 1"]
    lines += histogram("vllm:time_per_output_token_seconds", [0.05, 0.15, 0.3])
    lines += histogram("vllm:inter_token_latency_seconds", [0.05, 0.15])
    for order in (lines, lines[::-1]):
        found = one("\n".join(order) + "\n")
        assert found.gauges == {"kv_usage": 0.25} and found.histograms["itl"].count == 2


def test_a_series_in_one_file_has_times_and_rows():
    text = "# scrape 100.5\n" + exposition(generated=1) + "# scrape 101.5\n" + exposition(generated=4)
    first, second = parse(text)
    assert (first.time, second.time) == (100.5, 101.5) and (first.row, second.row) == (1, 7)
    assert second.counters["generation_tokens"] == 4
    assert len(parse(text + "# scrape 102.5\n")) == 2, "a scrape that failed is passed over"


def test_timestamps_of_samples_are_a_time():
    assert one("vllm:generation_tokens_total 5 1790000000500\n").time == pytest.approx(1790000000.5)


def test_a_cut_last_line_is_left_out_aloud():
    text = exposition(generated=1234, gauges=gauges(5))
    cut = one(text[:-12])
    assert "kv_usage" not in cut.gauges and any("cut off" in line for line in cut.warnings)
    assert one(text).warnings == ()


BAD = [
    ("# HELP vllm:generation_tokens_total x\n# TYPE vllm:generation_tokens_total counter\n", "no counter of vLLM"),
    ("process_start_time_seconds 5\n", "no counter of vLLM"),
    ("# scrape\n", "no counter of vLLM"),
    ("# scrape soon\nvllm:generation_tokens_total 5\n", "the time of the scrape"),
    ("# scrape 1e999\nvllm:generation_tokens_total 5\n", "the time of the scrape"),
    ("vllm:generation_tokens_total 5\nvllm:generation_tokens_total 6\n", "row 2.*twice in one scrape.*# scrape"),
    ("vllm:generation_tokens_total 5\nsglang:generation_tokens_total 6\n", "vLLM and of SGLang in one scrape"),
    ("vllm:generation_tokens_total nan\n", "row 1.*not a line"),
    ("vllm:generation_tokens_total -4\n", "not a line"),
    ("vllm:generation_tokens_total 1e999\n", "not a line"),
    ("vllm:generation_tokens_total\n", "not a line"),
    ('vllm:generation_tokens_total{engine="0" 5\n', "not a line"),
    ('vllm:generation_tokens_total{engine="0",engine="1"} 5\n', "not a line"),
    ('vllm:spec_decode_num_accepted_tokens_per_pos_total{position="x"} 5\n', "not a line"),
    ('vllm:spec_decode_num_accepted_tokens_per_pos_total{position="99999999999"} 5\n', "not a line"),
    ("vllm:spec_decode_num_accepted_tokens_per_pos_total 5\n", "not a line"),
    ('vllm:time_to_first_token_seconds_bucket{le="x"} 5\n', "not a line"),
    ("vllm:time_to_first_token_seconds_bucket 5\n", "not a line"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_what_cannot_be_read_is_named(text, message):
    with pytest.raises(TraceError, match=message) as caught:
        parse(text, "metrics.txt")
    assert caught.value.file == "metrics.txt"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_mangled_scrape_is_read_or_refused(data):
    text = exposition(drafts=5, drafted=10, at=(4, 3), generated=9, gauges=gauges(1))
    at = data.draw(st.integers(0, len(text) - 1))
    junk = data.draw(st.text(max_size=8))
    try:
        found = parse(text[:at] + junk + text[at + data.draw(st.integers(0, 5)) :])
        assert all(value >= 0 for snapshot in found for value in snapshot.totals().values())
    except TraceError:
        pass


def test_recognition_is_by_content(tmp_path):
    for name, content, expected in (
        ("a", exposition(generated=1), True),
        ("b", "# TYPE sglang:num_running_reqs gauge\n", True),
        ("c", "python_gc_objects_collected_total 3\n", False),
        ("d", "arrival_rate,vllm:x\n1,2\n", False),
        ("e", '{"vllm:a": 1}', False),
    ):
        (tmp_path / name).write_text(content)
        assert recognises(Source(tmp_path / name)) is expected, name


# Differences


def test_differences_and_labels_that_appear_later():
    before = one(exposition(generated=100, success=4))
    after = one(exposition(drafts=7, drafted=14, at=(5, 3), generated=164, success=10, abort=1))
    run = difference(before, after)
    assert run.counters == {"drafts": 7, "draft_tokens": 14, "accepted": 8, "generation_tokens": 64}
    assert run.accepted_at == (5, 3) and run.finished == {"length": 6, "abort": 1}
    assert (run.completed, run.failed, run.duration) == (6, 1, None)


def test_equal_scrapes_differ_by_nothing_and_make_no_operating_point():
    text = exposition(generated=100, success=4)
    assert set(difference(one(text), one(text)).counters.values()) == {0}
    with pytest.raises(TraceError, match="nothing happened"):
        operating_point(one(text), one(text))


def started(seconds):
    return [f"process_start_time_seconds {seconds}"]


def test_a_restart_is_an_error_and_a_wrong_order_is_mended():
    few, many = {"generated": 100, "success": 4}, {"generated": 164, "success": 5}
    later = exposition(**few, extra=started(900))
    with pytest.raises(TraceError, match=r"restarted.*fell from 164 to 100"):
        difference(one(exposition(**many, extra=started(100))), one(later))
    with pytest.raises(TraceError, match="restarted"):  # even where the new counters have overtaken the old
        difference(one(exposition(**few, extra=started(100))), one(exposition(**many, extra=started(900))))
    with pytest.raises(TraceError, match="restarted"):
        difference(one(exposition(generated=100, success=9)), one(exposition(generated=200, success=2)))
    with pytest.raises(TraceError, match="restarted"):
        difference(scrape(10, **many), scrape(20, **few))
    for before, after, sure in (
        (scrape(20, **many), scrape(10, **few), True),
        (one(exposition(**many, extra=started(9))), one(exposition(**few, extra=started(9))), True),
        (one(exposition(**many)), one(exposition(**few)), False),
    ):
        run = difference(before, after)
        assert run.counters["generation_tokens"] == 64 and run.completed == 1
        assert ("turned round" in run.notes[0]) is sure
    assert difference(scrape(20, **many), scrape(10, **few)).duration == 10
    with pytest.raises(TraceError, match="backwards"):
        difference(scrape(20, **few), scrape(10, **many))
    other = exposition(**many, labels='engine="0",model_name="else"')
    with pytest.raises(TraceError, match="not of one server"):
        difference(one(exposition(**few)), one(other))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.001, 0.99), min_size=1, max_size=60), st.lists(st.floats(0.001, 0.99), max_size=60))
def test_differenced_histograms_are_those_of_the_run(run, earlier):
    name = "vllm:time_to_first_token_seconds"
    before = one(exposition(extra=histogram(name, earlier)))
    after = one(exposition(success=1, extra=histogram(name, [*earlier, *run])))
    found = difference(before, after).histograms["ttft"]
    assert found.count == len(run) and found.sum == pytest.approx(sum(run), abs=1e-9)
    assert dict(found.buckets) == {le: sum(x <= le for x in run) for le in (0.1, 0.2, 0.5, 1.0, math.inf)}


# Percentiles


def test_percentiles_of_buckets_against_the_closed_form():
    # Uniform on [0, 4] with bounds at 1, 2, 4: the interpolated quantile function is exact.
    buckets = ((1.0, 250.0), (2.0, 500.0), (4.0, 1000.0), (math.inf, 1000.0))
    uniform = Histogram(2000.0, 1000.0, buckets)
    for share in (0.05, 0.25, 0.5, 0.9, 0.95, 0.99, 1.0):
        assert percentile(uniform, share) == pytest.approx(4 * share)
    tail = Histogram(1.0, 10, ((1.0, 8.0), (math.inf, 10.0)))
    assert percentile(tail, 0.8) == 1.0 and percentile(tail, 0.81) is None
    assert percentile(Histogram(0.0, 0.0, ((1.0, 0.0),)), 0.5) is None and percentile(Histogram(1.0, 2.0), 0.5) is None
    gap = Histogram(1.0, 4, ((1.0, 2.0), (2.0, 2.0), (3.0, 4.0)))
    assert percentile(gap, 0.5) == 1.0 and percentile(gap, 0.75) == 2.5, "an empty bucket has no observations"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_a_percentile_lies_in_the_bucket_of_the_true_one(values, share):
    bounds = (0.1, 0.2, 0.5, 1.0)
    buckets = tuple((le, float(sum(x <= le for x in values))) for le in (*bounds, math.inf))
    found = percentile(Histogram(sum(values), len(values), buckets), share)
    true = sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]
    low = max((le for le in (0.0, *bounds) if le < true), default=0.0)
    assert found is not None and low <= found <= min(le for le in bounds if le >= true)


# Operating points


def test_means_rates_and_lengths_by_hand():
    def text(ttft, e2e, itl, success, generated):
        extra = histogram("vllm:time_to_first_token_seconds", ttft)
        extra += histogram("vllm:e2e_request_latency_seconds", e2e, (1, 2, 5))
        extra += histogram("vllm:inter_token_latency_seconds", itl)
        extra += histogram("vllm:request_prompt_tokens", [50] * success, (10, 100))
        extra += histogram("vllm:request_generation_tokens", [16] * success, (10, 100))
        extra += histogram("vllm:request_queue_time_seconds", [0.05] * success)
        return exposition(success=success, generated=generated, gauges=gauges(0), extra=extra)

    before = one("# scrape 1000\n" + text([0.9], [3.0], [0.3], 1, 16))
    after = one("# scrape 1008\n" + text([0.9, 0.12, 0.18], [3.0, 1.5, 1.7], [0.3, 0.03, 0.05, 0.04], 3, 48))
    row, notes = operating_point(before, after)
    assert row["ttft_mean"] == pytest.approx(0.15) and row["ttft_p50"] == pytest.approx(0.15)
    assert row["e2e_mean"] == pytest.approx(1.6) and row["itl_mean"] == pytest.approx(0.04)
    assert row["itl_p99"] == pytest.approx(0.099), "all in the first bucket, whose lower bound is 0"
    assert (row["prompt_length"], row["output_length"], row["n_requests"], row["failed"]) == (50, 16, 2, 0)
    assert row["throughput"] == 0.25 and row["effective_batch_size"] == pytest.approx(3.2 / 8)
    assert row["waiting_mean"] == pytest.approx(0.1 / 8)
    assert (row["method"], row["draft_length"]) == ("none", 0) and "tokens_per_step" not in row
    assert "arrival_rate" not in row and any("open loop from a closed" in line for line in notes)
    assert any("e2e_p50 lies between 1 and 2 s" in line or "lies between" in line for line in notes)
    given_duration, _ = operating_point(before, after, duration=4.0)
    assert given_duration["throughput"] == 0.5
    timeless = operating_point(one(text([], [], [], 0, 0)), one(text([0.2], [1.0], [0.1], 1, 16)))
    assert "throughput" not in timeless[0] and any("time between" in line for line in timeless[1])


def test_conditional_acceptance_of_a_simulated_walk():
    """Steps that draft three tokens and keep each with a known probability, given those before: 0.9, 0.6, 0.3."""
    random = np.random.default_rng(7)
    kept = np.cumprod(random.random((200_000, 3)) < np.array([0.9, 0.6, 0.3]), axis=1).sum(axis=0)
    before = one(exposition(drafts=1000, drafted=3000, at=(999, 998, 997), generated=5, success=1))
    at = [int(count) + start for count, start in zip(kept, (999, 998, 997), strict=True)]
    after = one(exposition(drafts=201_000, drafted=603_000, at=at, generated=500_000, success=2))
    row, notes = operating_point(before, after)
    assert row["position_acceptance"] == pytest.approx((0.9, 0.6, 0.3), abs=0.004)
    assert row["tokens_per_step"] == pytest.approx(1 + 0.9 + 0.54 + 0.162, abs=0.01)
    assert row["tokens_per_step"] == pytest.approx(1 + np.cumprod(row["position_acceptance"]).sum(), rel=1e-12)
    assert row["draft_acceptance_rate"] == pytest.approx((0.9 + 0.54 + 0.162) / 3, abs=0.003)
    assert row["draft_length"] == 3 and not any("vary" in line for line in notes)


def test_drafts_of_varying_length_and_steps_without_drafts_are_told():
    before = one(exposition(drafts=0, drafted=0, at=(0, 0, 0)))
    extra = histogram("vllm:inter_token_latency_seconds", [0.05] * 40)
    after = one(exposition(drafts=10, drafted=25, at=(8, 4, 0), generated=60, success=1, extra=extra))
    row, notes = operating_point(before, after)
    assert row["draft_length"] == 3 and any("vary in length, 2.5 tokens" in line for line in notes)
    assert row["position_acceptance"] == (0.8, 0.5, 0.0) and row["tokens_per_step"] == 2.2
    assert row["draft_probability"] == 0.25, "10 of 40 steps drafted"
    idle = operating_point(before, one(exposition(drafts=0, drafted=0, at=(0, 0, 0), generated=9, success=1)))
    assert "tokens_per_step" not in idle[0] and any("never drafted" in line for line in idle[1])


def test_gauges_are_averaged_over_time_within_the_load():
    def at(time, running, waiting, usage, generated, success):
        return scrape(time, generated=generated, success=success, gauges=gauges(running, waiting, usage))

    idle, late = at(0, 0, 0, 0, 0, 0), at(90, 0, 0, 0, 100, 10)
    inside = [at(12, 4, 2, 0.5, 10, 1), at(14, 8, 4, 0.9, 30, 2), at(18, 2, 0, 0.1, 60, 5)]
    between = [at(10, 0, 0, 0, 0, 0), *inside, at(20, 0, 0, 0, 100, 10)]
    row, notes = operating_point(idle, late, between)
    # Trapezoids from 10 to 20 s: running 4, 12, 20, 2 = 38; waiting 2, 6, 8, 0 = 16; usage .5, 1.4, 2, .1 = 4.
    assert row["waiting_mean"] == pytest.approx(1.6) and row["kv_usage_mean"] == pytest.approx(0.4)
    assert row["effective_batch_size"] == pytest.approx(5.4) and row["throughput"] == 1.0
    assert any("3 scrapes during the load" in line for line in notes)
    few, notes = operating_point(idle, late, between[:3])
    assert "kv_usage_mean" not in few and any("too few" in line for line in notes)


def test_the_arrival_rate_of_an_open_loop_counts_what_is_still_in_the_system():
    before = scrape(0, generated=0, success=10, gauges=gauges(2, 0))
    after = scrape(20, generated=900, success=60, abort=3, gauges=gauges(6, 3))
    row, notes = operating_point(before, after, open_loop=True)
    assert row["arrival_rate"] == pytest.approx((50 + 3 + 7) / 20) and row["throughput"] == 2.5
    assert row["failed"] == 3 and any("3 requests failed" in line for line in notes)


def test_sglang_counts_gaps_by_token_and_steps_by_finished_request():
    def text(requests, generated, verified, gap_sum, gap_count):
        base = 'model_name="m"'
        return (
            f"sglang:num_requests_total{{{base}}} {requests}\nsglang:generation_tokens_total{{{base}}} {generated}\n"
            f"sglang:spec_verify_calls_total{{{base}}} {verified}\nsglang:num_aborted_requests_total{{{base}}} 1\n"
            f"sglang:inter_token_latency_seconds_sum{{{base}}} {gap_sum}\nsglang:spec_num_steps{{{base}}} 3\n"
            f"sglang:inter_token_latency_seconds_count{{{base}}} {gap_count}\n"
        )

    row, notes = operating_point(one(text(10, 640, 300, 6.3, 630)), one(text(20, 1290, 556, 16.54, 1270)), duration=5)
    assert row["n_requests"] == 10 and row["throughput"] == 2 and row["failed"] == 0
    assert row["tokens_per_step"] == pytest.approx((650 - 10) / 256), "the first token comes from the prefill"
    assert row["tpot_mean"] == pytest.approx(10.24 / 640) and row["itl_mean"] == pytest.approx(10.24 / 256)
    assert row["draft_length"] == 3 and any("one gap a token" in line for line in notes)


def test_points_are_raw_rows_that_validate_takes():
    before, after = scrape(0, generated=0, success=0), scrape(10, generated=640, success=10)
    extra = histogram("vllm:e2e_request_latency_seconds", [0.5] * 10)
    extra += histogram("vllm:request_prompt_tokens", [32] * 10, (100,))
    after = scrape(10, generated=640, success=10, gauges=gauges(0), extra=extra)
    raw = points([after, before], open_loop=True)
    frame, warnings, problems = validate(raw, "scrapes")
    assert not problems and frame["arrival_rate"].tolist() == [1.0] and frame["output_length"].tolist() == [64.0]
    assert frame["e2e_mean"].tolist() == [0.5] and any("Little" in line for line in warnings)
    assert validate(points([before, after]))[2][0].message.startswith("neither arrival_rate nor concurrency")
    with pytest.raises(TraceError, match="before and after"):
        points([before])


def test_points_of_several_runs_are_told_apart_by_name():
    def at(name, generated, success):
        return one(exposition(generated=generated, success=success), name)

    scrapes = [at("b.metrics_after.txt", 90, 9), at("a.metrics_before.txt", 10, 1), at("b.metrics_before.txt", 40, 4)]
    scrapes.append(at("a.metrics_after.txt", 30, 3))
    assert points(scrapes).set_index("run")["n_requests"].to_dict() == {"a": 2, "b": 5}
    with pytest.raises(TraceError, match="one scrape tells nothing"):
        points(scrapes[:3])


# Real scrapes


def test_a_run_of_a_real_engine_by_hand():
    """vLLM 0.32.0, 24 requests of 64 tokens, a draft model of four; the numbers are differences of the two files."""
    before, after = (read(Source(FIXTURES / f"metrics_{when}.txt"))[0] for when in ("before", "after"))
    row, _ = operating_point(after, before, duration=6.0)
    assert (row["n_requests"], row["output_length"], row["throughput"]) == (24, 64, 4.0)
    assert row["tokens_per_step"] == pytest.approx(1 + 1125 / 422)
    assert row["draft_acceptance_rate"] == pytest.approx(1125 / 1688) and row["draft_length"] == 4
    assert row["position_acceptance"] == pytest.approx((399 / 422, 344 / 399, 239 / 344, 143 / 239))
    imposed, tried = np.array([0.95, 0.85, 0.7, 0.6]), np.array([422, 399, 344, 239])
    noise = np.sqrt(imposed * (1 - imposed) / tried)
    assert (np.abs(row["position_acceptance"] - imposed) < 3 * noise).all(), "the server was told to accept so"
    assert row["ttft_mean"] == pytest.approx((5.151638984680176 - 2.2309679985046387) / 24)
    assert row["itl_mean"] == pytest.approx((18.980806498002494 - 3.538382920998629) / 422)
    # 18, 23 and 24 of the 24 requests took at most 0.8, 1.0 and 1.5 s, none 0.5 s.
    assert row["e2e_p50"] == pytest.approx(0.5 + 0.3 * 12 / 18) and row["e2e_p90"] == pytest.approx(0.8 + 0.2 * 3.6 / 5)


def test_a_series_of_a_real_engine_by_hand():
    source = Source(FIXTURES / "metrics_series.txt")
    assert recognises(source)
    series = read(source)
    times = [1795362587.056, 1795362589.094, 1795362591.145, 1795362593.236, 1795362595.346]
    assert [scrape.time for scrape in series] == times
    assert [scrape.gauges["running"] for scrape in series] == [3, 0, 1, 7, 2]
    row, notes = operating_point(series[0], series[-1], series[1:-1])
    area = 1.5 * 2.038 + 0.5 * 2.051 + 4 * 2.091 + 4.5 * 2.110
    assert row["effective_batch_size"] == pytest.approx(area / 8.29, rel=1e-6)
    assert row["throughput"] == pytest.approx((120 - 85) / 8.29, rel=1e-6) and row["n_requests"] == 35
    assert row["tokens_per_step"] == pytest.approx(1 + 1604 / 615) and "ttft_p50" not in row
    assert any("3 scrapes during the load" in line for line in notes)
    with_arrivals, _ = operating_point(series[0], series[-1], series[1:-1], open_loop=True)
    assert with_arrivals["arrival_rate"] == pytest.approx((35 + 2 - 3) / 8.29, rel=1e-6), "the client sent 4 a second"


REAL = {
    "metrics_vllm_0.12.0_eagle3_moe__altria.txt": (164, 94680, 1 + 62423 / 32371),
    "metrics_vllm_0.25.1_loaded__er0080.txt": (600, 165293, None),
    "metrics_vllm_0.9.2_V0engine_mlp_speculator__altria.txt": (164, 49196, None),
}


@pytest.mark.parametrize(("name", "expected"), REAL.items())
def test_scrapes_of_real_engines(shared, name, expected):
    (found,) = read(Source(shared / "fixtures" / "prometheus" / name))
    finished, generated, per_step = expected
    assert sum(found.finished.values()) == finished and found.counters["generation_tokens"] == generated
    assert found.histograms["e2e"].count == finished and found.gauges["kv_usage"] < 0.2
    if per_step:
        assert 1 + found.counters["accepted"] / found.counters["drafts"] == pytest.approx(per_step)
        assert found.accepted_at == (25690, 20430, 16303)


def test_a_real_server_from_idle_to_loaded(shared):
    folder = shared / "fixtures" / "prometheus"
    idle, loaded = (
        read(Source(folder / f"metrics_vllm_0.25.1_{state}__er0080.txt"))[0] for state in ("idle", "loaded")
    )
    row, _ = operating_point(idle, loaded, duration=100.0, open_loop=True)
    assert (row["prompt_length"], row["output_length"], row["n_requests"]) == (512, 256, 600)
    assert row["ttft_mean"] == pytest.approx(88.24499082565308 / 664) and row["draft_length"] == 0
    assert row["arrival_rate"] == pytest.approx((600 + 64 + 64) / 100)
    # From the file: 593 of 664 first tokens within 0.25 s, all within 0.5 s; 0.9*664 = 597.6.
    assert row["ttft_p90"] == pytest.approx(0.25 + 0.25 * (597.6 - 593) / (664 - 593))
    assert operating_point(loaded, idle, duration=100.0)[1][0] == "the scrapes are in the wrong order: turned round"


def test_the_v0_engine_gives_no_acceptance(shared):
    """Its counters say 0.19 of 3 drafts; its output tokens say 1.32 tokens per stream event."""
    path = shared / "fixtures" / "prometheus" / "metrics_vllm_0.9.2_V0engine_mlp_speculator__altria.txt"
    (after,) = read(Source(path))
    empty = one("vllm:generation_tokens_total 0\n")
    row, notes = operating_point(empty, one(path.read_text()) if after.models else after)
    assert row["tokens_per_step"] == pytest.approx((64998 - 164) / 49032) and "draft_acceptance_rate" not in row
    assert row["output_length"] == pytest.approx(64998 / 164) and any("V0" in line for line in notes)


RUNS = ["k0__p64_o64_r2", "k4_a90__p64_o64_r2"]


@pytest.mark.parametrize("run", RUNS)
def test_the_engine_and_the_client_saw_the_same_run(shared, run):
    import json

    folder = shared / "traces" / "vllm_cpu" / "raw"
    before, after = (read(Source(folder / f"{run}.metrics_{when}.txt"))[0] for when in ("before", "after"))
    client = json.loads((folder / f"{run}.json").read_text())
    row, _ = operating_point(before, after, duration=client["duration"])
    assert row["n_requests"] == client["completed"] and row["output_length"] == 64 and row["prompt_length"] == 64
    assert row["throughput"] == pytest.approx(client["request_throughput"])
    for name, key, close in (("e2e", "e2el", 0.02), ("itl", "itl", 0.01), ("tpot", "tpot", 0.01)):
        assert row[f"{name}_mean"] == pytest.approx(client[f"mean_{key}_ms"] / 1000, rel=close), name
    assert 0.85 < row["ttft_mean"] / (client["mean_ttft_ms"] / 1000) < 1, "the client's has the way there and back"
    if run.startswith("k4"):
        assert row["tokens_per_step"] == pytest.approx(client["spec_decode_acceptance_length"], rel=1e-12)
        marginal = np.cumprod(row["position_acceptance"])
        assert marginal == pytest.approx(client["spec_decode_per_position_acceptance_rates"], abs=1e-6)
        assert row["draft_acceptance_rate"] == pytest.approx(client["spec_decode_acceptance_rate"] / 100)
        assert "draft_probability" not in row, "every step drafted: as many gaps between events as drafts"
    else:
        assert row["method"] == "none" and row["draft_length"] == 0
