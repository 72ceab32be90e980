"""Request logs in many files, read in parts by many workers: the same answer as one file, whatever the order; what a
sketch promises; files, workers and clusters that fail; and what docs/at-scale.md computes."""

import csv
import json
import math
import os
import signal

import numpy as np
import pandas as pd
import pytest
from helpers import experiment
from pandas.testing import assert_frame_equal
from test_cli_main import run as run_command

import diffspec.traces.dask_runner as dask_runner_module
import diffspec.traces.requests as requests_module
import diffspec.traces.scale as scale
import diffspec.traces.sketch as sketch_module
from diffspec.results import InputError, NoResultError, TraceError
from diffspec.traces import read_trace
from diffspec.traces.sketch import RELATIVE_ERROR, LatencySketch
from diffspec.traces.trace import trace_of
from diffspec.traces.windows import Gaps, Windows

pytest.importorskip("ddsketch", reason="needs the extra 'scale': ddsketch is not installed")
SHARES = [0.5, 0.9, 0.95, 0.99]
RATE = 20.0


def requests_of(count: int, seed: int = 0, rate: float = RATE, **columns) -> pd.DataFrame:
    """*Synthetic* requests on an epoch clock, in order of arrival, to a server with room for everybody."""
    random = np.random.default_rng(seed)
    arrival = 1.7e9 + np.cumsum(random.gamma(0.5, 2 / rate, count))  # gaps with scv 2
    service = random.gamma(4.0, 0.05, count)
    frame = pd.DataFrame(
        {
            "arrival_time": arrival,
            "first_token_time": arrival + 0.25 * service,
            "completion_time": arrival + service,
            "prompt_tokens": random.integers(50, 151, count),
            "output_tokens": random.integers(11, 31, count),
            "draft_length": 4,
            "drafted_tokens": 40,
            "accepted_tokens": random.integers(10, 31, count),
            "ok": random.random(count) > 0.01,
        }
    )
    return frame.assign(**columns)


def scattered(frame: pd.DataFrame, folder, files: int = 4, order: str = "shuffled"):
    """The rows in several files of small row groups: in no order, by turns, or one stretch after another."""
    folder.mkdir()
    rows = frame.sample(frac=1, random_state=1) if order == "shuffled" else frame
    stretches = np.array_split(np.arange(len(rows)), files)
    for number in range(files):
        part = rows.iloc[stretches[number]] if order == "stretches" else rows.iloc[number::files]
        part.to_parquet(folder / f"part {(7 * number) % files}.parquet", row_group_size=700)
    return folder


def points(*paths, run=scale.in_turn, report=None) -> pd.DataFrame:
    gathered, _ = scale.gather_logs([str(path) for path in paths], run, report)
    return trace_of(gathered).frame


def same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert_frame_equal(found.drop(columns="source_file"), expected.drop(columns="source_file"), rtol=1e-11)


@pytest.fixture(autouse=True)
def small_partitions(monkeypatch):
    monkeypatch.setattr(scale, "PART_ROWS", 1500)


@pytest.fixture(scope="module")
def log() -> pd.DataFrame:
    return requests_of(12_000)


@pytest.fixture(scope="module")
def whole(log, tmp_path_factory) -> pd.DataFrame:
    """What one process makes of one file in order of arrival."""
    path = tmp_path_factory.mktemp("whole") / "log.parquet"
    log.to_parquet(path)
    return read_trace(path).frame


# --- one large CSV file ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "start"),
    [({}, b""), ({"quoting": csv.QUOTE_NONNUMERIC}, b""), ({"sep": ";", "lineterminator": "\r\n"}, b"\xef\xbb\xbf")],
    ids=["plain", "quoted", "semicolons, CRLF and a mark"],
)
def test_a_csv_file_is_read_in_parts_as_in_one(log, tmp_path, monkeypatch, written, start):
    monkeypatch.setattr(scale, "_PIECE", 10_000)
    frame = log.assign(deployment=np.where(np.arange(len(log)) % 2, "a, b" if written else "a", ""))
    frame.loc[11_000, "prompt_tokens"] = -1
    text = frame.to_csv(index=False, **written).encode().rstrip()
    (tmp_path / "log.csv").write_bytes(start + text)
    gathered, partitions = scale.gather_logs([tmp_path / "log.csv"])
    assert partitions >= 6
    alone = read_trace(tmp_path / "log.csv")
    same(trace_of(gathered).frame, alone.frame)
    assert "(first: row 11001)" in str(trace_of(gathered).warnings) and "(first: row 11001)" in str(alone.warnings)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("True", '"on two\nlines"'),
        lambda text: text + "\n",
        lambda text: text.replace("\n", "\r"),
    ],
    ids=["line ends in cells", "an empty line", "old line ends"],
)
def test_a_csv_file_whose_lines_may_be_no_rows_is_one_part(log, tmp_path, monkeypatch, spoil):
    monkeypatch.setattr(scale, "_PIECE", 10_000)
    path = tmp_path / "log.csv"
    path.write_text(spoil(log.to_csv(index=False)), newline="")
    (located,) = scale.locate([path])
    assert scale._lines(located, located.source()) is None


# --- percentiles that can be merged ------------------------------------------------------------

DISTRIBUTIONS = {
    "gamma": lambda random, size: random.gamma(4.0, 0.5, size),
    "lognormal over six decades": lambda random, size: np.exp(random.normal(0, 2.5, size)),
    "two modes": lambda random, size: np.where(random.random(size) < 0.93, 0.01, 30.0) * random.gamma(50, 0.02, size),
    "around zero": lambda random, size: random.normal(0.0, 1e-3, size),
    "zeros and few values": lambda random, size: random.integers(0, 4, size) * 0.25,
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_merged_sketches_keep_their_word_and_do_not_ask_for_an_order(name):
    random = np.random.default_rng(3)
    values = DISTRIBUTIONS[name](random, 30_000)
    found = []
    for splits in (np.array_split(values, 7), np.array_split(np.sort(values)[::-1], 50), [values]):
        merged = LatencySketch()
        for part in splits:
            other = LatencySketch()
            other.add(part)
            merged.merge(other)
        found.append(merged.percentiles(SHARES))
    assert found[0] == found[1] == found[2]
    ranked = np.sort(values.astype(np.float32).astype(float))[np.floor(np.array(SHARES) * 29_999).astype(int)]
    assert np.all(np.abs(np.array(found[0]) - ranked) <= (RELATIVE_ERROR + 1e-9) * np.abs(ranked))


def test_few_values_are_kept_exactly():
    values = np.random.default_rng(0).gamma(2.0, 1.0, sketch_module.EXACT).astype(np.float32)
    merged = LatencySketch()
    for part in np.array_split(values, 3):
        merged.add(part)
    assert merged.percentiles(SHARES) == pytest.approx(np.quantile(values.astype(float), SHARES), rel=1e-12)
    merged.add(np.array([math.nan, math.inf]))
    assert merged.count == len(values)
    assert all(math.isnan(value) for value in LatencySketch().percentiles(SHARES))


# --- windows in parts --------------------------------------------------------------------------


def test_stretches_of_arrivals_join_exactly_and_overlaps_are_not_guessed():
    arrivals = np.cumsum(np.random.default_rng(0).gamma(0.3, 1.0, 1000))
    gaps = np.diff(arrivals)
    expected = gaps.var() / gaps.mean() ** 2
    joined = Gaps()
    for start in (600, 0, 300):  # not in order of time
        other = Gaps()
        other.add(np.random.default_rng(start).permutation(arrivals[start : start + (400 if start == 600 else 300)]))
        joined.merge(other)
    assert joined.scv() == pytest.approx(expected, rel=1e-12)
    two = Gaps()
    two.add(arrivals[::2])
    two.add(arrivals[1::2])
    assert two.overlap() and math.isnan(two.scv())
    assert math.isnan(Gaps().scv())


def test_windows_of_parts_are_the_windows_of_all(log):
    columns = ("schedule_time", "stream_events")
    batch = {name: log[name].to_numpy(float) for name in log} | {name: np.full(len(log), math.nan) for name in columns}
    batch |= {name: batch[name] - 1.7e9 for name in ("arrival_time", "first_token_time", "completion_time")}
    spans = [(10.0, 100.0), (150.0, 300.0), (5000.0, 6000.0)]
    at_once, merged = Windows(spans, lambda *_: LatencySketch()), Windows(spans, lambda *_: LatencySketch())
    at_once.add(batch)
    for part in np.array_split(np.random.default_rng(0).permutation(len(log)), 4):
        other = Windows(spans, lambda *_: LatencySketch())
        other.add({name: values[part] for name, values in batch.items()})
        packed = other.packed()
        assert len(packed.totals[0]) == 2, "nothing falls into the last window, and nothing of it is sent"
        merged.merge(packed)
    for index in (0, 1):
        assert merged.row(index) == pytest.approx(at_once.row(index), rel=1e-11)
    assert merged.row(2) == {}


# --- many files are one table ------------------------------------------------------------------


@pytest.mark.parametrize("order", ["shuffled", "by turns", "stretches"])
def test_a_log_in_many_files_is_summarised_as_one(log, whole, tmp_path, order):
    folder = scattered(log, tmp_path / "logs", order=order)
    same(points(folder / "*.parquet"), whole)
    assert len(whole) >= 9 and whole["arrival_scv"].notna().all()


def test_the_gaps_are_those_of_the_arrivals_in_order(log, tmp_path):
    folder = scattered(log, tmp_path / "logs")
    found = points(folder).iloc[3]
    done = log[log["ok"]]
    latency = (done["completion_time"] - done["arrival_time"]).mean()
    start = log["arrival_time"].iloc[0] + 3 * latency + 3 * 60
    window = done[(done["arrival_time"] >= start) & (done["arrival_time"] < start + 60)]
    gaps = np.diff(window["arrival_time"])
    assert found["run"] == "requests window 4" and found["n_requests"] == len(window)
    assert found["arrival_scv"] == pytest.approx(gaps.var() / gaps.mean() ** 2, rel=1e-9)
    e2e = window["completion_time"] - window["arrival_time"]
    assert found["e2e_p95"] == pytest.approx(np.quantile(e2e, 0.95), rel=1e-6)


def test_one_file_in_no_order_is_told_the_same(log, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("diffspec.traces.request_rows.BATCH_ROWS", 3000)
    log.sample(frac=1, random_state=2).to_parquet(tmp_path / "log.parquet")
    same(read_trace(tmp_path / "log.parquet").frame, whole)


def test_arrivals_are_put_in_order_a_few_windows_at_a_time_or_left_out_aloud(log, whole, tmp_path, monkeypatch):
    folder = scattered(log, tmp_path / "logs")
    monkeypatch.setattr(requests_module, "MOST_SORTED", 4000)
    same(points(folder), whole)
    monkeypatch.setattr(requests_module, "MOST_READINGS", 1)
    gathered, _ = scale.gather_logs([folder])
    raw = gathered.points[0][1]
    known = raw["arrival_scv"].notna()
    assert 0 < known.sum() < len(known)
    assert any(f"arrival_scv left out of {(~known).sum()} windows" in text for text in raw.attrs["warnings"])
    assert raw.loc[known, "arrival_scv"].tolist() == whole.loc[known, "arrival_scv"].tolist()


def test_runs_lie_in_several_files_of_several_formats(tmp_path):
    runs = [requests_of(2500, seed, rate, run=f"r{rate:g}", arrival_rate=rate) for seed, rate in ((1, 5.0), (2, 40.0))]
    mixed = pd.concat(runs).sample(frac=1, random_state=0)
    pd.concat(runs).to_csv(tmp_path / "whole.csv", index=False)
    (tmp_path / "logs").mkdir()
    mixed.iloc[::3].to_parquet(tmp_path / "logs" / "a.parquet", row_group_size=500)
    mixed.iloc[1::3].to_csv(tmp_path / "logs" / "b.csv", index=False)  # numbers as text
    lines = mixed.iloc[2::3].to_json(orient="records", lines=True, double_precision=15)
    (tmp_path / "logs" / "c.jsonl").write_text(lines)
    found, expected = (frame.set_index("run").sort_index() for frame in (points(tmp_path / "logs"), _csv(tmp_path)))
    assert_frame_equal(
        found.drop(columns=["source_file", "source_row"]),
        expected.drop(columns=["source_file", "source_row"]),
        rtol=1e-6,
    )


def _csv(folder) -> pd.DataFrame:
    return read_trace(folder / "whole.csv").frame


def test_percentiles_of_many_requests_are_within_the_stated_error(tmp_path):
    requests = requests_of(15_000, arrival_rate=RATE)
    requests.to_parquet(tmp_path / "whole.parquet")
    expected = read_trace(tmp_path / "whole.parquet").frame.iloc[0]
    found = points(scattered(requests, tmp_path / "logs")).iloc[0]
    assert found["n_requests"] == expected["n_requests"] > sketch_module.EXACT
    for metric in ("ttft", "tpot", "e2e"):
        assert found[f"{metric}_mean"] == pytest.approx(expected[f"{metric}_mean"], rel=1e-11)
        for name in ("p50", "p90", "p95", "p99"):  # a little more: ranks between two values are not interpolated
            assert found[f"{metric}_{name}"] == pytest.approx(expected[f"{metric}_{name}"], rel=RELATIVE_ERROR + 1e-3)


def test_object_storage(log, whole):
    fsspec = pytest.importorskip("fsspec", reason="needs the extra 'scale': fsspec is not installed")
    store = fsspec.filesystem("memory")
    for number in range(3):
        with store.open(f"/bucket/logs/{number}.parquet", "wb") as file:
            log.iloc[number::3].to_parquet(file, row_group_size=900)
    with store.open("/bucket/logs/notes.txt", "wb") as file:
        file.write(b"nothing to see\n")
    same(points("memory://bucket/logs/*.parquet"), whole)
    gathered, partitions = scale.gather_logs(["memory://bucket/logs"])
    assert partitions > 3 and "notes.txt" in " ".join(gathered.warnings)
    assert [entry["file"] for entry in gathered.recognised] == [f"memory:///bucket/logs/{n}.parquet" for n in range(3)]
    same(gathered.points[0][1].pipe(lambda raw: trace_of(gathered).frame), whole)
    with pytest.raises(TraceError, match=r"memory:///bucket/logs/absent.parquet: cannot be read"):
        points("memory://bucket/logs/absent.parquet")
    with pytest.raises(InputError, match="nowhere://x: cannot be opened"):
        points("nowhere://x")


# --- bad files among many ----------------------------------------------------------------------


def spoil(frame: pd.DataFrame, rows) -> pd.DataFrame:
    spoilt = frame.copy()
    spoilt.loc[spoilt.index[rows], "completion_time"] = 0.0
    return spoilt


def test_bad_files_are_named_all_of_them(log, tmp_path):
    folder = scattered(log.head(4000), tmp_path / "logs")
    cut = folder / "cut.parquet"
    cut.write_bytes((folder / "part 0.parquet").read_bytes()[:5000])
    (folder / "other.csv").write_text("colour,taste\nred,sweet\n")
    log.head(10).drop(columns="output_tokens").to_csv(folder / "less.csv", index=False)
    with pytest.raises(TraceError) as caught:
        points(folder / "*")
    told = str(caught.value)
    assert all(
        name in told for name in ("cut.parquet", "other.csv", "less.csv")
    ) and "part" not in told.lower().replace("parquet", "")


def test_rows_that_cannot_be_read_name_their_files(log, tmp_path):
    folder = scattered(log.head(4000), tmp_path / "logs", files=2)
    for name in ("x", "y"):
        lines = log.head(2000).to_csv(index=False).splitlines()
        lines[1500] = "soon" + lines[1500][5:]
        (folder / f"{name}.csv").write_text("\n".join(lines))
    with pytest.raises(TraceError, match=r"(?s)2 problems.*x\.csv.*y\.csv"):
        points(folder)


def test_impossible_rows_are_counted_by_file(log, tmp_path):
    folder = scattered(log.head(9000), tmp_path / "logs", files=3, order="stretches")
    spoil(log.head(2000), [1234]).to_parquet(folder / "x.parquet", row_group_size=100)
    gathered, _ = scale.gather_logs([folder])
    told = "\n".join(trace_of(gathered).warnings)
    assert "x.parquet: 1 of 2000 requests set aside: completion before arrival (first: row 1235)" in told
    spoil(log.head(2000), slice(100, 200)).to_parquet(folder / "x.parquet", row_group_size=90)
    with pytest.raises(TraceError, match=r"x\.parquet, row 101: unusable requests.*\d+ of 2000"):
        points(folder)


def test_empty_files_patterns_and_folders(log, tmp_path):
    folder = scattered(log.head(6000), tmp_path / "logs")
    log.head(0).to_parquet(folder / "night.parquet")
    gathered, _ = scale.gather_logs([folder])
    assert any("night.parquet: no rows" in text for text in trace_of(gathered).warnings)
    with pytest.raises(TraceError, match="has no rows"):
        points(folder / "night.parquet")
    with pytest.raises(TraceError, match="no file there"):
        points(folder / "*.nothing")
    with pytest.raises(TraceError, match="no such file"):
        points(folder / "nothing.parquet")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "read.txt").write_text("nothing\n")
    with pytest.raises(TraceError, match=r"no request table among these files.*read\.txt"):
        points(tmp_path / "notes")


def test_results_of_other_tools_are_not_taken_for_logs(tmp_path, log):
    path = tmp_path / "table.csv"
    path.write_text("arrival_rate,prompt_length,output_length,draft_length,ttft_mean\n1,2,3,0,0.1\n")
    with pytest.raises(TraceError, match=r"operating-point table, no request table.*without --engine"):
        points(path)
    runs = pd.concat([log.head(30).assign(run=f"r{number}") for number in range(40)])
    runs.to_parquet(tmp_path / "runs.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests_module, "MOST_RUNS", 20)
        with pytest.raises(TraceError, match="too many runs"):
            points(tmp_path / "runs.parquet")


# --- the command line and clusters -------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["log.parquet", "--engine", "ray"], "--engine: got 'ray'; allowed: process or dask"),
        (["log.parquet", "--scheduler", "tcp://127.0.0.1:1"], "--scheduler: given without --engine dask"),
        (["s3://bucket/log.parquet"], "addresses are read with --engine dask"),
    ],
)
def test_wrong_use(arguments, message):
    ran = run_command("import", *arguments)
    assert ran.code == 2 and message in ran.err and ran.out == ""


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    ran = run_command("import", "log.parquet", "--engine", "dask")
    assert ran.code == 2 and "pip install 'diffspec[scale]'" in ran.err


def test_one_process_says_so(log, tmp_path):
    log.head(6000).to_parquet(tmp_path / "log.parquet")
    answer = json.loads(run_command("import", tmp_path / "log.parquet", "--json").out)
    assert answer["engine"] == "process" and answer["partitions"] is None


distributed = pytest.importorskip("distributed", reason="needs the extra 'scale': dask is not installed")
CLUSTERS = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@CLUSTERS
def test_a_scheduler_that_does_not_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(dask_runner_module, "CONNECT", 0.5)
    ran = run_command("import", tmp_path, "--engine", "dask", "--scheduler", "tcp://127.0.0.1:9")
    assert ran.code == 2 and "--scheduler: got 'tcp://127.0.0.1:9'" in ran.err and "Traceback" not in ran.err


def fails(error: Exception) -> None:
    raise error


def dies(item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@CLUSTERS
def test_logs_in_object_storage_are_those_on_disk(log, tmp_path, monkeypatch):
    """A folder and a pattern of addresses on a server that speaks S3, read by two workers of their own."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed").ThreadedMotoServer(port=0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    environment = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (environment | {"AWS_ENDPOINT_URL": endpoint, "FSSPEC_S3_ENDPOINT_URL": endpoint}).items():
        monkeypatch.setenv(name, value)
    folder = scattered(log, tmp_path / "logs")
    storage = pytest.importorskip("s3fs").S3FileSystem(endpoint_url=endpoint, key="x", secret="x")
    storage.mkdir("bucket")
    storage.put(str(folder), "bucket/logs", recursive=True)
    tables = []
    for source in (folder, "s3://bucket/logs", "s3://bucket/logs/*.parquet"):
        table = tmp_path / f"points {len(tables)}.csv"
        ran = run_command("import", source, "--engine", "dask", "--out", table)
        assert ran.code == 0, ran.err
        tables.append(pd.read_csv(table, comment="#"))
    server.stop()
    for table in tables[1:]:
        assert_frame_equal(table, tables[0], rtol=1e-9)


@pytest.mark.slow
@CLUSTERS
def test_a_partition_that_kills_its_workers_ends_in_one_line():
    import dask

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        dask_runner_module.dask_runner(workers=1) as run,
        pytest.raises(NoResultError, match="workers died each time they read the same partition"),
    ):
        list(run(dies, [1]))


@pytest.mark.slow  # two processes that start: 6 s
@CLUSTERS
def test_a_worker_killed_while_it_reads_loses_nothing(log, whole, tmp_path):
    folder = scattered(log, tmp_path / "logs")
    with dask_runner_module.dask_runner(workers=2) as run:
        workers = run.client.run(os.getpid)
        assert len(set(workers.values())) == 2
        killed = []

        def report(what: str, share: float) -> None:
            if what.startswith("windows") and not killed:
                killed.append(next(iter(workers.values())))
                os.kill(killed[0], signal.SIGKILL)

        found = points(folder, run=run, report=report)
    assert killed, "the worker was to die between the partitions of the second reading"
    same(found, whole)


@CLUSTERS
def test_a_running_cluster_is_used_and_its_loss_is_told(log, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(dask_runner_module, "CONNECT", 2.0)
    store = pytest.importorskip("fsspec").filesystem("memory")
    for number in range(4):
        with store.open(f"/cluster/logs/{number}.parquet", "wb") as file:
            log.iloc[number::4].to_parquet(file, row_group_size=900)
    cluster = distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, protocol="tcp", dashboard_address=":0"
    )
    with cluster:
        out = tmp_path / "points.parquet"
        command = ("import", "memory://cluster/logs/*.parquet", "--engine", "dask", "--out", out)
        ran = run_command(*command, "--scheduler", cluster.scheduler_address, "--json")
        assert ran.code == 0, ran.err
        answer = json.loads(ran.out)
        assert answer["engine"] == "dask" and answer["partitions"] >= 4 and answer["rows"] == len(whole)
        assert len(answer["files"]) == 4
        same(read_trace(out).frame.assign(source_row=whole["source_row"]), whole)
        with dask_runner_module.dask_runner(cluster.scheduler_address) as run:
            assert sorted(run(pow, [3, 2], 2)) == [(0, 9), (1, 4)]
            for error, told in (
                (ModuleNotFoundError("no ddsketch", name="ddsketch"), (InputError, "lacks ddsketch; pip install")),
                (PermissionError("no entry"), (InputError, "a worker of .* cannot read: no entry")),
                (ZeroDivisionError("ours"), (ZeroDivisionError, "ours")),
            ):
                with pytest.raises(told[0], match=told[1]):
                    list(run(fails, [error]))
        with (
            pytest.raises(NoResultError, match=r"the Dask cluster at tcp://.* is gone .* of \d+ partitions were read"),
            dask_runner_module.dask_runner(cluster.scheduler_address) as run,
        ):
            points("memory://cluster/logs", run=run, report=lambda what, share: "windows" in what and cluster.close())


# --- docs/at-scale.md --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_paper():
    return experiment("09_speed", "on_paper")


def test_the_page_says_what_the_script_computes(on_paper):
    text = on_paper.PAGE.read_text(encoding="utf-8")
    assert text == on_paper.page(text, on_paper.measured())
    assert text.count(on_paper.START) == text.count(on_paper.END) == 1


def test_costs_by_hand(on_paper):
    reports = {
        "log_scale": {
            "dask": {"rows_per_cpu_s": 1e6, "peak_memory_gb": 2.0},
            "partition": {"rows": 1_000_000, "extents_bytes": 1000, "windows_bytes": 99_000},
            "bytes_per_row": 25.0,
            "task_overhead_s": 0.01,
        },
        "fleet": {"fits": [{}, {"median_fit": 6.0, "first_fits": [20.0, 30.0], "processes": 2}]},
    }
    found = on_paper.costs(reports, requests=8.64e11, deployments=86_400)
    assert found["log_cores"] == pytest.approx(10) and found["log_memory"] == pytest.approx(10e9)
    assert found["stored"] == pytest.approx(21.6e12) and found["read"] == pytest.approx(43.2e12)
    assert found["sent"] == pytest.approx(864_000 * 100_000)
    assert found["tasks"] == pytest.approx(1_728_000) and found["scheduler_s"] == pytest.approx(17_280)
    assert found["fit_cores"] == pytest.approx(6) and found["fit_first_s"] == 30.0
