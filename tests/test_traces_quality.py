"""Quality checks: which rows are set aside, which identities are reported broken, what a trace spans."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffspec.acceptance_curves import tokens_per_step_to_constant
from diffspec.traces import Trace, check, read_trace, set_aside_reasons, template, validate
from diffspec.traces.design import repeats
from diffspec.traces.renewal import expected_steps, moments

PLAIN = dict(
    deployment="d",
    arrival_rate=2.0,
    arrival_process="poisson",
    prompt_length=64,
    output_length=64,
    method="none",
    draft_length=0,
    ttft_mean=0.1,
    itl_mean=0.02,
    tpot_mean=0.02,
    e2e_mean=1.36,
    throughput=1.95,
    n_requests=100,
)
CLOSED = PLAIN | dict(arrival_rate=None, arrival_process=None, concurrency=4, throughput=2.9, ttft_p99=0.3)
STEPS = expected_steps(64, 2, acceptance=(0.6, 0.8))
DRAFTED = PLAIN | dict(
    method="eagle3", draft_length=2, tokens_per_step=2.08, position_acceptance="0.6;0.8", itl_mean=0.02 * 63 / STEPS
)


def trace_of(*rows: dict) -> Trace:
    frame, _, problems = validate(pd.DataFrame(list(rows)).astype(object), "t.csv")
    assert problems == []
    return Trace(frame)


def finding(report, name: str):
    found = [item for item in report.findings if item.check == name]
    assert len(found) == 1
    return found[0]


def test_a_clean_trace_has_no_warning_but_the_missing_spread():
    rows = [PLAIN | dict(arrival_rate=rate, throughput=rate) for rate in (1.0, 2.0, 3.0)]
    rows += [DRAFTED, DRAFTED | dict(draft_length=1, tokens_per_step=1.6, position_acceptance="0.6", itl_mean=None)]
    report = check(trace_of(*rows))
    assert report.warnings == []
    assert report.stationary == [True] * 5 and report.set_aside == [None] * 5


def test_every_check_of_the_template_can_be_read_as_json(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(template())
    report = check(read_trace(path))
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert set(json.loads(text)) == {"stationary", "set_aside", "findings", "deployments"}
    assert {item.severity for item in report.findings} <= {"ok", "warning", "unchecked"}
    assert finding(report, "renewal identity").severity == "ok"
    assert finding(report, "little's law").severity == "ok"


ASIDE = [
    (PLAIN, None),
    (PLAIN | dict(failed=1), "1 requests failed"),
    (PLAIN | dict(n_requests=10), "not stationary: a request lasts 0.27"),
    (PLAIN | dict(n_requests=10, e2e_mean=None), "not stationary: a request lasts 0.27"),
    (PLAIN | dict(n_requests=10, e2e_mean=None, tpot_mean=None), None),
    (PLAIN | dict(n_requests=None), None),
    (PLAIN | dict(n_requests=11), None),
    (CLOSED, None),
    (CLOSED | dict(n_requests=16), None),
    (CLOSED | dict(n_requests=15), "too short: 15 requests for 4 in flight"),
    (CLOSED | dict(n_requests=None), None),
]


@pytest.mark.parametrize(("row", "reason"), ASIDE)
def test_rows_are_set_aside_with_the_reason(row, reason):
    [got] = set_aside_reasons(trace_of(row).frame)
    assert (got is None) if reason is None else (got or "").startswith(reason)
    report = check(trace_of(row))
    assert report.stationary == [reason is None] and report.set_aside == [got]
    assert finding(report, "stationarity").severity == ("ok" if reason is None else "warning")


# Change to a good row, the check that must warn.
WARNINGS = [
    (CLOSED, dict(throughput=2.5), "little's law"),
    (CLOSED, dict(throughput=3.2), "little's law"),
    (PLAIN, dict(effective_batch_size=2.0), "little's law"),
    (PLAIN, dict(itl_mean=0.021), "renewal identity"),
    (DRAFTED, dict(itl_mean=DRAFTED["itl_mean"] * 1.03), "renewal identity"),
    (DRAFTED, dict(tokens_per_step=2.3), "acceptance"),
    (DRAFTED, dict(position_acceptance=None, acceptance_rate=0.8), "acceptance"),
    (DRAFTED, dict(tokens_per_step=1.03, position_acceptance="0.03;0.1"), "useful drafter"),
    (PLAIN, dict(throughput=1.7), "open loops keep up"),
    (CLOSED, dict(), "start burst"),
    (PLAIN, dict(preemptions=3), "kv cache"),
    (PLAIN, dict(kv_usage_mean=0.97), "kv cache"),
    (DRAFTED, dict(), "plain rows"),
    (DRAFTED, dict(), "draft lengths"),
    (PLAIN, dict(), "loads"),
]


@pytest.mark.parametrize(("base", "change", "name"), WARNINGS)
def test_each_check_warns_about_the_row_that_breaks_it(base, change, name):
    whole_deployment = name in ("plain rows", "draft lengths", "loads")
    good = [] if whole_deployment else [PLAIN | dict(arrival_rate=1.9, deployment="other")]
    item = next(
        item for item in check(trace_of(*good, base | change)).findings if item.check == name and item.severity != "ok"
    )
    assert item.severity == "warning" and item.value is not None and item.rows == [len(good)]
    assert item.allowed and item.message


def test_the_renewal_count_clears_what_the_naive_count_would_flag():
    """With long drafts tpot*E/itl alone is over 2 % from 1 on 64 tokens; with the renewal count the row is clean."""
    deep = dict(draft_length=6, tokens_per_step=None, acceptance_rate=0.9, position_acceptance=None)
    steps = expected_steps(64, 6, acceptance=[0.9] * 6)
    row = DRAFTED | deep | dict(itl_mean=0.02 * 63 / steps)
    assert abs(0.02 * moments([0.9] * 6)[0] / row["itl_mean"] - 1) > 0.02
    assert finding(check(trace_of(row)), "renewal identity").severity == "ok"


def test_a_check_without_its_columns_is_unchecked_not_ok():
    bare = dict(arrival_rate=2, prompt_length=64, output_length=64, ttft_mean=0.1, arrival_process="poisson")
    report = check(trace_of(bare))
    unchecked = {item.check for item in report.findings if item.severity == "unchecked"}
    assert unchecked == {
        "little's law",
        "renewal identity",
        "acceptance",
        "useful drafter",
        "open loops keep up",
        "start burst",
        "kv cache",
        "repeats",
    }


def test_repeats_give_the_noise_floor():
    rows = [PLAIN, PLAIN | dict(e2e_mean=1.36 * 1.1, run="again"), PLAIN | dict(arrival_rate=1.0), DRAFTED]
    item = finding(check(trace_of(*rows)), "repeats")
    assert item.rows == [0, 1] and item.value == pytest.approx(0.1 / 2.1) and item.severity == "ok"
    wild = finding(check(trace_of(PLAIN, PLAIN | dict(e2e_mean=1.9))), "repeats")
    assert wild.severity == "warning"


def test_other_acceptance_or_length_is_no_repeat():
    low = DRAFTED | dict(tokens_per_step=1.5, position_acceptance=None)
    frame = trace_of(DRAFTED, DRAFTED | dict(tokens_per_step=2.1), low, DRAFTED | dict(output_length=32)).frame
    assert repeats(frame) == [[0, 1]]


def test_deployments_are_summarized():
    rows = [PLAIN, DRAFTED, CLOSED | dict(deployment="e", n_requests=3)]
    first, second = check(trace_of(*rows)).deployments
    assert (first["deployment"], first["rows"], first["set_aside"]) == ("d", 2, 0)
    assert first["arrival_rate"] == [2.0, 2.0] and first["concurrency"] is None
    assert first["draft_lengths"] == [0, 2] and first["methods"] == ["eagle3", "none"]
    assert first["acceptance"] == [0.6, 0.8] and first["tokens_per_step"] == [2.08, 2.08]
    assert second["set_aside"] == 1 and "ttft_p99" in second["observables"]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_moments_are_those_of_the_distribution(acceptance):
    """Against the distribution itself: P(T = j+1) = a_1..a_j*(1 - a_{j+1})."""
    mass = np.cumprod([1.0, *acceptance]) * (1 - np.array([*acceptance, 0.0]))
    tokens = np.arange(1, len(acceptance) + 2)
    assert mass.sum() == pytest.approx(1)
    assert moments(acceptance) == pytest.approx(((mass * tokens).sum(), (mass * tokens**2).sum()))


@pytest.mark.parametrize(("output_length", "acceptance"), [(33, (0.6, 0.8)), (64, (0.9,) * 6), (200, (0.5, 0.9, 0.1))])
def test_expected_steps_against_the_exact_recursion(output_length, acceptance):
    mass = np.cumprod([1.0, *acceptance]) * (1 - np.array([*acceptance, 0.0]))
    steps = [0.0]
    for left in range(1, output_length):
        steps.append(1 + sum(p * steps[max(left - j - 1, 0)] for j, p in enumerate(mass)))
    assert expected_steps(output_length, len(acceptance), acceptance=acceptance) == pytest.approx(steps[-1], rel=2e-3)


@settings(max_examples=60, deadline=None)
@given(alpha=st.floats(0.01, 0.99), draft_length=st.integers(1, 8))
def test_constant_acceptance_inverts_the_mean(alpha, draft_length):
    mean = moments([alpha] * draft_length)[0]
    assert tokens_per_step_to_constant(mean, draft_length) == pytest.approx(alpha, abs=1e-9)


def test_abstaining_drafters_take_more_steps():
    always = expected_steps(64, 3, 2.5)
    half = expected_steps(64, 3, 2.5, draft_probability=0.5)
    assert always < half < 63 and expected_steps(64, 3, 2.5, draft_probability=0.0) == pytest.approx(63)
    assert np.isnan(expected_steps(64, 3))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            dict(
                e2e_mean=st.none() | st.floats(1e-300, 1e4),
                tpot_mean=st.none() | st.floats(1e-300, 1.0),
                itl_mean=st.none() | st.floats(1e-300, 1.0),
                throughput=st.none() | st.floats(1e-300, 1e5),
                n_requests=st.none() | st.integers(1, 10**6),
                draft_length=st.integers(0, 9),
                effective_batch_size=st.none() | st.floats(1e-300, 1e4),
            )
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_valid_frame_can_be_checked(rows):
    base = {k: v for k, v in PLAIN.items() if k != "method"}
    report = check(Trace(validate(pd.DataFrame([base | row for row in rows]).astype(object), "t.csv")[0]))
    json.dumps(report.to_dict(), allow_nan=False)
    assert len(report.stationary) == len(report.set_aside) == len(rows)
    assert all(0 <= row < len(rows) for item in report.findings for row in item.rows)


def test_the_quiet_measurements_are_clean(shared):
    report = check(read_trace(shared / "traces" / "vllm_cpu" / "quiet_operating_points.csv"))
    assert all(report.stationary)
    assert [item.check for item in report.warnings] == ["start burst"]
    renewal = finding(report, "renewal identity").value
    assert renewal is not None and abs(renewal - 1) < 0.01


def test_the_noisy_measurements_show_their_noise(shared):
    report = check(read_trace(shared / "traces" / "vllm_cpu" / "operating_points.csv"))
    assert report.stationary.count(False) == 15
    noise = finding(report, "repeats").value
    assert noise is not None and 0.02 < noise < 0.06


def steady_rows(**cells) -> pd.DataFrame:
    row = dict(arrival_rate=5.0, prompt_length=64, output_length=64, draft_length=0, e2e_mean=1.0, window="steady")
    return validate(pd.DataFrame([row | cells]))[0]


def test_a_steady_window_may_hold_few_requests_but_not_fill_up():
    # a third of the window long: set aside were it a whole run
    assert set_aside_reasons(steady_rows(n_requests=15, throughput=5.0, offered_rate=5.0)) == [None]
    assert "not stationary" in str(set_aside_reasons(steady_rows(n_requests=15, throughput=5.0, window="run")))
    assert "of the run" in str(set_aside_reasons(steady_rows(n_requests=4, throughput=5.0, offered_rate=5.0)))
    # 100 arrive, 80 are completed: 20 are left, more than 3*sqrt(5) + 3 = 9.7
    assert "overloaded" in str(set_aside_reasons(steady_rows(n_requests=100, throughput=4.0, offered_rate=5.0)))
    # 20 arrive, 16 are completed: chance
    assert set_aside_reasons(steady_rows(n_requests=20, throughput=4.0, offered_rate=5.0)) == [None]


def test_the_start_burst_is_no_matter_in_a_steady_window():
    row = dict(arrival_rate=None, concurrency=8.0, n_requests=48, throughput=8.0, ttft_mean=0.1, ttft_p99=0.3)
    assert not [item for item in check(Trace(steady_rows(**row))).warnings if item.check == "start burst"]
    assert [item for item in check(Trace(steady_rows(**row, window="run"))).warnings if item.check == "start burst"]
