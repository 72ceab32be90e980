"""Scrapes of /metrics joined to benchmark results: found by content, filled in, never over what the client measured."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diffspec.results import TraceError
from diffspec.traces import validate
from diffspec.traces.gather import gather
from diffspec.traces.join import join, run_name
from diffspec.traces.readers.prometheus import parse, read
from diffspec.traces.source import Source

FIXTURES = Path(__file__).parent / "fixtures" / "vllm"


def scrape(requests, tokens, *, file="scrape.txt", time=None, drafts=None, accepted=(), e2e=None, started=5, **gauges):
    """One scrape of an engine that has finished so many requests with so many output tokens."""
    lines = [f"# scrape {time}"] if time is not None else []
    lines += [f"process_start_time_seconds {started}", f"vllm:generation_tokens_total {tokens}"]
    lines += [f'vllm:request_success_total{{finished_reason="length"}} {requests}', "vllm:num_preemptions_total 0"]
    lines += [f"vllm:request_generation_tokens_sum {tokens}", f"vllm:request_generation_tokens_count {requests}"]
    if drafts is not None:
        k = len(accepted)
        lines += [
            f"vllm:spec_decode_num_drafts_total {drafts}",
            f"vllm:spec_decode_num_draft_tokens_total {k * drafts}",
        ]
        lines += [f"vllm:spec_decode_num_accepted_tokens_total {sum(accepted)}"]
        name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        lines += [f'{name}{{position="{at}"}} {count}' for at, count in enumerate(accepted)]
    if e2e is not None:
        lines += [f"vllm:e2e_request_latency_seconds_sum {e2e}", f"vllm:e2e_request_latency_seconds_count {requests}"]
    for name in ("running", "waiting"):
        lines.append(f"vllm:num_requests_{name} {gauges.get(name, 0)}")
    (found,) = parse("\n".join(lines) + "\n", file)
    return found


def bench(*rows):
    base = {"n_requests": 100.0, "output_length": 64.0, "prompt_length": 32.0, "throughput": 5.0, "arrival_rate": 5.0}
    frame = pd.DataFrame([base | {"e2e_mean": 1.0} | row for row in rows]).astype(object)
    frame["source_file"] = [row.get("source_file", f"run{index}.json") for index, row in enumerate(rows)]
    frame["source_row"] = range(1, len(rows) + 1)
    return frame


def pair(start=0, requests=100, tokens=6400, **after):
    return [
        scrape(start, start * 64, **dict.fromkeys(("drafts",), 0 if "drafts" in after else None), **_zero(after)),
        scrape(start + requests, start * 64 + tokens, **after),
    ]


def _zero(after):
    kept = {key: value for key, value in after.items() if key in ("file", "started")}
    return kept | ({"accepted": tuple(0 for _ in after["accepted"])} if "accepted" in after else {})


def test_a_pair_fills_what_the_client_cannot_know():
    frame, notes = join(bench({}), pair(drafts=2000, accepted=(1600, 1200, 600)))
    row = frame.iloc[0]
    assert row["tokens_per_step"] == pytest.approx(1 + 3400 / 2000) and row["draft_length"] == 3
    assert row["position_acceptance"] == pytest.approx((0.8, 0.75, 0.5)) and row["preemptions"] == 0
    assert row["e2e_mean"] == 1.0 and row["throughput"] == 5.0
    assert len(notes) == 1 and "from the counters" in notes[0]
    canonical, _, problems = validate(frame.assign(method="eagle3"), "joined")
    assert not problems and canonical["tokens_per_step"].tolist() == [2.7]


def test_the_client_is_never_overwritten_and_told_when_it_disagrees():
    given = {"tokens_per_step": 2.6, "draft_length": 3, "effective_batch_size": 4.0, "position_acceptance": (0.8,) * 3}
    frame, notes = join(bench(given), pair(drafts=2000, accepted=(1600, 1200, 600), e2e=300.0))
    row = frame.iloc[0]
    assert all(row[name] == value for name, value in given.items()) and row["e2e_mean"] == 1.0
    assert any("2.6 in the result, 2.7 in the counters" in line for line in notes)
    close = join(bench(given | {"tokens_per_step": 2.69}), pair(drafts=2000, accepted=(1600, 1200, 600)))
    assert not any("in the result" in line for line in close[1])


def test_a_result_without_speculation_from_an_engine_that_drafted():
    plain = {"method": "none", "draft_length": 0}
    frame, notes = join(bench(plain), pair(drafts=2000, accepted=(1600, 1200, 600)))
    row = frame.iloc[0]
    assert row["draft_length"] == 3 and row["method"] is None and any("speaks of no speculation" in w for w in notes)
    frame, _ = join(bench(plain), pair())
    assert frame.iloc[0]["method"] == "none" and frame.iloc[0]["draft_length"] == 0


@pytest.mark.slow
def test_order_and_other_scrapes_do_not_matter():
    scrapes = [scrape(0, 0), scrape(37, 37 * 64), scrape(137, 137 * 64), scrape(139, 139 * 64)]
    other = [scrape(3, 192, started=900), scrape(63, 3840 + 192, started=900)]
    expected = join(bench({}), scrapes[1:3])[0].iloc[0]["preemptions"]
    for shuffled in itertools.permutations(scrapes + other):
        frame, notes = join(bench({}), shuffled)
        assert frame.iloc[0]["preemptions"] == expected == 0 and not any("traffic" in line for line in notes)


def test_content_pairs_runs_of_one_server():
    rows = [{"n_requests": n, "output_length": 64.0} for n in (50.0, 80.0, 120.0)]
    counts = np.cumsum([10, 50, 80, 120])
    scrapes = [
        scrape(int(n), int(n) * 64, drafts=int(n), accepted=(int(n * n) // 400,), file=f"{n}.txt") for n in counts
    ]
    frame, _ = join(bench(*rows), scrapes[::-1])
    for index, (first, last) in enumerate(itertools.pairwise(counts)):
        taken = int(last * last) // 400 - int(first * first) // 400
        assert frame["tokens_per_step"].iloc[index] == pytest.approx(1 + taken / (last - first))


def test_warm_up_and_other_traffic_are_told():
    frame, notes = join(bench({}), pair(requests=103, tokens=6592))
    assert frame.iloc[0]["preemptions"] == 0
    assert any("103 requests and 6592 tokens but 100 and 6400 were received: warm-up" in line for line in notes)
    frame, notes = join(bench({}), pair(requests=101, tokens=6464))
    assert not any("warm-up" in line for line in notes), "within 2 %"
    for requests, tokens in ((90, 5760), (200, 12800)):
        frame, notes = join(bench({}), pair(requests=requests, tokens=tokens))
        assert "preemptions" not in frame.columns and len(notes) == 1
        assert f"({'first to last: '}{requests} requests and {tokens} tokens)" in notes[0]


def taken(notes):
    """Which scrape each row of the benchmark begins with."""
    return {line.split(",")[0]: line.split("between ")[1].split(" and")[0] for line in notes if "between" in line}


def test_equal_runs_are_told_apart_by_name_then_by_latency():
    rows = [{"source_file": "a/x.json", "e2e_mean": 1.0}, {"source_file": "a/y.json", "e2e_mean": 2.0}]

    def scrapes(first, second, latencies):
        """Two runs of 100 requests, one after the other: 500 drafts of which 300 are accepted, 400 of which 100 are."""
        ends = [(0, 0, 0, 0.0), (100, 500, 300, 100 * latencies[0])]
        ends += [ends[-1], (200, 900, 400, ends[-1][3] + 100 * latencies[1])]
        files = [f"{name}.metrics_{when}.txt" for name in (first, second) for when in ("before", "after")]
        return [
            scrape(n, n * 64, drafts=drafts, accepted=(accepted,), file=file, e2e=e2e)
            for file, (n, drafts, accepted, e2e) in zip(files, ends, strict=True)
        ]

    frame, notes = join(bench(*rows), scrapes("x", "y", (1.98, 1.02)))
    assert taken(notes) == {"a/x.json": "x.metrics_before.txt", "a/y.json": "y.metrics_before.txt"}
    assert frame["tokens_per_step"].tolist() == [1.6, 1.25], "names come before latencies"
    frame, _ = join(bench(*rows), scrapes("p", "q", (1.98, 1.02)))
    assert frame["tokens_per_step"].tolist() == [1.25, 1.6], "without names the latencies tell"
    for latencies in ((1.5, 1.5), (1.0, 1.05)):
        with pytest.raises(TraceError, match=r"several runs.*X\.json, X\.metrics_before\.txt"):
            join(bench(*rows), scrapes("p", "q", latencies))
    with pytest.raises(TraceError, match="several runs"):
        join(bench(rows[0], rows[0]), scrapes("p", "q", (1.0, 1.0))[:2])
    frame, _ = join(bench(*rows), scrapes("y", "q", (1.98, 1.02))[:2])
    assert pd.isna(frame["tokens_per_step"].iloc[0]) and frame["tokens_per_step"].iloc[1] == 1.6


def test_a_long_series_holds_the_run_and_its_gauges():
    """Five runs of 100 requests in one series of scrapes, 20 s each, 10 s idle between; the third has its own e2e."""
    scrapes, finished, spent = [], 0, 0.0
    for run in range(5):
        start = run * 30.0
        scrapes.append(scrape(finished, finished * 64, time=start, e2e=spent, file="series.txt"))
        for tick in range(1, 20):
            done, use = finished + 5 * tick, spent + 5 * tick * (run + 1)
            scrapes.append(
                scrape(done, done * 64, time=start + tick, e2e=use, running=4 + run, waiting=run, file="series.txt")
            )
        finished, spent = finished + 100, spent + 100 * (run + 1)
        scrapes.append(scrape(finished, finished * 64, time=start + 20, e2e=spent, file="series.txt"))
    frame, notes = join(bench({"e2e_mean": 3.0}), scrapes)
    row = frame.iloc[0]
    # Running 6 and waiting 2 in the scrapes from 1 to 19 s of 20 s, zero at both ends: trapezoids give 19/20 of it.
    assert row["waiting_mean"] == pytest.approx(2 * 19 / 20) and row["effective_batch_size"] == pytest.approx(
        8 * 19 / 20
    )
    assert not any("warm-up" in line for line in notes)


def test_rows_without_totals_and_empty_input():
    frame, notes = join(bench({"n_requests": None}, {"output_length": "many"}), pair())
    assert len(notes) == 2 and all("is missing" in line for line in notes) and "preemptions" not in frame.columns
    assert join(bench({}), [])[1] == []
    assert len(join(bench({}).iloc[:0], pair())[0]) == 0


def test_attributes_and_the_given_frame_are_kept():
    given = bench({})
    given.attrs["warnings"] = ["kept"]
    frame, _ = join(given, pair())
    assert frame.attrs["warnings"] == ["kept"] and "preemptions" not in given.columns


def test_names():
    names = ["x.metrics_before.txt", "a/b/x.metrics_after.txt", "x.json", "x.metrics.txt", "x_before.txt"]
    assert {run_name(name) for name in names} == {"x"}


def results(path) -> pd.DataFrame:
    """Rows of the benchmark results in a file or folder, as the readers give them."""
    return pd.concat([frame for _, frame in gather([path]).points], ignore_index=True)


RUNS = ["k0__p64_o64_r2", "k4_a90__p64_o64_r2"]


def test_real_runs_of_two_servers(shared, tmp_path):
    folder = shared / "traces" / "vllm_cpu" / "raw"
    scrapes = []
    for run in RUNS:
        shutil.copy(folder / f"{run}.json", tmp_path)
        scrapes += [read(Source(folder / f"{run}.metrics_{when}.txt"))[0] for when in ("after", "before")]
    frame, notes = join(results(tmp_path), scrapes)
    assert len(frame) == 2 and not any("warm-up" in line or "in the result" in line for line in notes)
    assert frame["preemptions"].tolist() == [0, 0] and (frame["waiting_mean"] < 1e-3).all()
    # Both ran 60 requests of 64 tokens: the names decide; without names the mean latencies do.
    for snapshot, name in zip(scrapes, "abcd", strict=True):
        object.__setattr__(snapshot, "file", name)
    again, notes = join(results(tmp_path), scrapes)
    assert sorted(taken(notes).values()) == ["b", "d"]
    pd.testing.assert_frame_equal(again, frame)


def test_counters_give_acceptance_to_a_result_that_lacks_it(shared, tmp_path):
    folder = shared / "traces" / "vllm_cpu" / "raw"
    record = json.loads((folder / f"{RUNS[1]}.json").read_text())
    full = {key: value for key, value in record.items() if not isinstance(value, list) or len(value) < 12}
    (tmp_path / "bare.json").write_text(json.dumps({k: v for k, v in full.items() if not k.startswith("spec_decode")}))
    scrapes = [read(Source(folder / f"{RUNS[1]}.metrics_{when}.txt"))[0] for when in ("before", "after")]
    frame, notes = join(results(tmp_path / "bare.json"), scrapes)
    row = frame.iloc[0]
    assert row["tokens_per_step"] == pytest.approx(record["spec_decode_acceptance_length"], rel=1e-12)
    assert np.cumprod(row["position_acceptance"]) == pytest.approx(
        record["spec_decode_per_position_acceptance_rates"], abs=1e-6
    )
    assert row["draft_length"] == 4 and any("speaks of no speculation" in line for line in notes)
