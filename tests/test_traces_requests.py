"""Request tables: windows against simulated queues and closed forms, streaming, and what is set aside."""

import math

import numpy as np
import pandas as pd
import pytest

from diffspec.results import TraceError
from diffspec.traces import read_trace
from diffspec.traces import requests as requests_module
from diffspec.traces.request_rows import BATCH_ROWS
from diffspec.traces.windows import Windows

RATE, SERVICE = 4.0, 0.2


def simulated(count: int, seed: int = 1, rate: float = RATE) -> pd.DataFrame:
    """Requests to a server with room for everybody (M/G/infinity): e2e is the service, in flight rate*service."""
    random = np.random.default_rng(seed)
    arrival = np.cumsum(random.exponential(1 / rate, count))
    service = random.gamma(4.0, SERVICE / 4.0, count)
    first = arrival + 0.25 * service
    return pd.DataFrame(
        {
            "arrival_time": arrival,
            "first_token_time": first,
            "completion_time": arrival + service,
            "prompt_tokens": random.integers(50, 151, count),
            "output_tokens": random.integers(11, 31, count),
            "arrival_rate": rate,
        }
    )


def only(frame: pd.DataFrame) -> pd.Series:
    assert len(frame) == 1
    return frame.iloc[0]


def write(frame: pd.DataFrame, path):
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_means_percentiles_and_load_of_a_run(tmp_path, suffix):
    requests = simulated(20_000)
    row = only(read_trace(write(requests, tmp_path / f"requests{suffix}")).frame)
    e2e = requests["completion_time"] - requests["arrival_time"]
    start = requests["arrival_time"].iloc[0] + 3 * e2e.mean()
    kept = requests["arrival_time"] >= start
    assert row["n_requests"] == kept.sum() and row["window"] == "steady" and row["failed"] == 0
    assert row["e2e_mean"] == pytest.approx(e2e[kept].mean(), rel=1e-9)
    for name, share in (("e2e_p50", 0.5), ("e2e_p99", 0.99)):
        assert row[name] == pytest.approx(np.quantile(e2e[kept], share), rel=1e-6)
    tpot = (requests["completion_time"] - requests["first_token_time"]) / (requests["output_tokens"] - 1)
    assert row["tpot_mean"] == pytest.approx(tpot[kept].mean(), rel=1e-9)
    assert row["ttft_mean"] == pytest.approx(0.25 * e2e[kept].mean(), rel=1e-6)
    assert row["prompt_length"] == pytest.approx(requests["prompt_tokens"][kept].mean())
    assert row["prompt_scv"] == pytest.approx(requests["prompt_tokens"][kept].var(ddof=0) / row["prompt_length"] ** 2)
    # Little's law of an infinite server, to sampling error
    assert row["effective_batch_size"] == pytest.approx(RATE * SERVICE, rel=0.03)
    assert row["throughput"] == pytest.approx(RATE, rel=0.03)


def test_time_in_flight_is_an_integral(tmp_path):
    windows = Windows([(10.0, 20.0), (30.0, 40.0)])
    times = np.array([[5.0, 12.0], [18.0, 33.0], [25.0, 26.0], [39.0, 60.0]])
    batch = {
        name: np.full(4, math.nan) for name in ("schedule_time", "drafted_tokens", "accepted_tokens", "stream_events")
    }
    batch |= {"arrival_time": times[:, 0], "first_token_time": times[:, 0], "completion_time": times[:, 1]}
    batch |= {"prompt_tokens": np.ones(4), "output_tokens": np.full(4, 2.0), "ok": np.ones(4)}
    for index in range(4):  # one by one is the same as all at once
        windows.add({name: values[index : index + 1] for name, values in batch.items()})
    # [10,20): 2 s of the first, 2 s of the second; [30,40): 3 s of the second, 1 s of the last
    assert windows.in_flight() == pytest.approx([0.4, 0.4])
    assert [windows.row(index)["n_requests"] for index in (0, 1)] == [1, 1]
    assert [windows.row(index)["throughput"] for index in (0, 1)] == pytest.approx([0.1, 0.1])


def test_runs_are_told_apart_by_their_columns(tmp_path):
    frames = [
        simulated(3000, seed, rate).assign(run=f"r{rate:g}", draft_length=k)
        for seed, (rate, k) in enumerate(((2.0, 0), (6.0, 4)))
    ]
    frames[1] = frames[1].assign(drafted_tokens=40, accepted_tokens=30)
    mixed = pd.concat(frames).sample(frac=1, random_state=0)  # in no order at all
    frame = read_trace(write(mixed, tmp_path / "requests.csv")).frame.set_index("run")
    assert frame.loc["r2", "arrival_rate"] == 2 and frame.loc["r6", "arrival_rate"] == 6
    assert frame.loc["r6", "draft_acceptance_rate"] == pytest.approx(0.75)
    assert frame.loc["r6", "tokens_per_step"] == pytest.approx(1 + 0.75 * 4)
    assert frame.loc[["r2", "r6"], "throughput"].to_numpy() == pytest.approx([2, 6], rel=0.1)


def test_a_log_is_cut_into_windows_and_drifting_ones_are_set_aside(tmp_path):
    parts, start = [], 1.7e9  # an epoch clock: sums of such times would lose the digits that matter
    for seed, rate in enumerate((5.0, 20.0)):
        part = simulated(int(rate * 1230), seed, rate).drop(columns="arrival_rate")
        for name in ("arrival_time", "first_token_time", "completion_time"):
            part[name] += start
        start = part["arrival_time"].max()
        parts.append(part)
    trace = read_trace(write(pd.concat(parts), tmp_path / "log.parquet"))
    rates = trace.frame["arrival_rate"].to_numpy()
    assert len(trace) >= 30 and (trace.frame["window"] == "steady").all()
    assert all(4 < rate < 6 or 17 < rate < 23 for rate in rates)
    assert any("load changes" in text for text in trace.warnings)
    assert trace.frame["arrival_scv"].mean() == pytest.approx(1.0, abs=0.1)
    held = trace.frame["throughput"] * trace.frame["e2e_mean"]
    assert (trace.frame["effective_batch_size"] / held).mean() == pytest.approx(1.0, abs=0.01)


def test_the_measured_requests_alone_count(tmp_path):
    requests = simulated(2000)
    requests["measured"] = (requests.index >= 500) & (requests.index < 1500)
    requests["ok"] = requests.index != 700
    row = only(read_trace(write(requests, tmp_path / "requests.csv")).frame)
    assert (row["n_requests"], row["failed"]) == (999, 1)


def test_a_short_run_is_taken_whole(tmp_path):
    requests = pd.DataFrame(
        {
            "arrival_time": [0.0, 1.0, 2.0],
            "completion_time": [4.0, 6.0, 8.0],
            "prompt_tokens": 8,
            "output_tokens": 4,
            "concurrency": 3,
        }
    )
    row = only(read_trace(write(requests, tmp_path / "requests.csv")).frame)
    assert row["window"] == "run" and row["n_requests"] == 3
    assert row["throughput"] == pytest.approx(3 / 8) and row["effective_batch_size"] == pytest.approx(15 / 8)
    assert row["concurrency"] == 3 and math.isnan(row["ttft_mean"])


def test_waiting_and_gaps_between_chunks(tmp_path):
    requests = simulated(4000)
    requests["schedule_time"] = requests["arrival_time"] + 0.05
    requests["stream_events"] = 11
    row = only(read_trace(write(requests, tmp_path / "requests.csv")).frame)
    assert row["waiting_mean"] == pytest.approx(row["throughput"] * 0.05, rel=0.02)
    assert row["itl_mean"] == pytest.approx((row["e2e_mean"] - row["ttft_mean"]) / 10, rel=1e-6)
    assert math.isnan(row["itl_p99"])  # a request's mean gap is no sample of gaps


def test_batches_of_a_large_table_add_up(tmp_path):
    requests = simulated(2 * BATCH_ROWS + 1000)
    row = only(read_trace(write(requests, tmp_path / "requests.parquet")).frame)
    e2e = (requests["completion_time"] - requests["arrival_time"]).to_numpy()
    kept = requests["arrival_time"] >= requests["arrival_time"].iloc[0] + 3 * e2e.mean()
    assert row["n_requests"] == kept.sum() and row["e2e_mean"] == pytest.approx(e2e[kept].mean(), rel=1e-9)
    assert row["e2e_p95"] == pytest.approx(np.quantile(e2e[kept], 0.95), rel=5e-3)  # from a sample


def spoilt(change) -> pd.DataFrame:
    requests = simulated(1000)
    change(requests)
    return requests


def test_few_impossible_rows_are_set_aside_and_told(tmp_path):
    def change(requests):
        requests.loc[3, "completion_time"] = requests.loc[3, "arrival_time"] - 1
        requests.loc[7, "prompt_tokens"] = -5

    trace = read_trace(write(spoilt(change), tmp_path / "requests.csv"))
    told = "\n".join(trace.warnings)
    assert "1 of 1000 requests set aside: completion before arrival (first: row 4)" in told
    assert "token counts below 0" in told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.__setitem__("completion_time", r["arrival_time"] - 1), "completion before arrival.*1000 of 1000"),
        (lambda r: r.__setitem__("completion_time", r["arrival_time"] + 2e5), "longer than a day"),
        (lambda r: r.__setitem__("arrival_time", "soon"), "cannot be read|not a column of numbers"),
        (lambda r: r.__setitem__("arrival_time", math.inf), "no finite arrival_time"),
        (lambda r: r.__setitem__("output_tokens", math.nan), "no prompt_tokens or output_tokens"),
        (lambda r: r.__setitem__("ok", False), "no completed request"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_impossible_tables_end_in_a_clear_error(tmp_path, change, message, suffix):
    path = write(spoilt(change), tmp_path / f"requests{suffix}")
    with pytest.raises(TraceError, match=message):
        read_trace(path)


def test_cut_off_and_empty_tables(tmp_path):
    whole = write(simulated(500), tmp_path / "requests.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceError, match=r"cut off|cannot be read"):
        read_trace(tmp_path / "cut.parquet")
    header = tmp_path / "header.csv"
    header.write_text("arrival_time,completion_time,prompt_tokens,output_tokens\n")
    with pytest.raises(TraceError, match="no rows"):
        read_trace(header)
    header.write_text('arrival_time,completion_time,prompt_tokens,output_tokens\n1,2,"3\n')
    with pytest.raises(TraceError):
        read_trace(header)


def test_too_many_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(requests_module, "MOST_RUNS", 10)
    requests = simulated(100)
    requests["run"] = [f"run {index}" for index in range(100)]
    with pytest.raises(TraceError, match="too many runs"):
        read_trace(write(requests, tmp_path / "requests.csv"))
