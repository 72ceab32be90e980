"""Malformed, cut, empty and hostile files end in a trace, in rows set aside aloud, or in an error that names them."""

import datetime
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from bench_samples import CONCURRENT, VLLM, benchmark, report, sweep_csv
from hostile import CASE, METRICS, NAMES_OF_FORMATS, SECONDS, judge, mutation, request_table, seeds, within

from diffspec.results import TraceError
from diffspec.traces import join as join_module
from diffspec.traces import parquet_size, read_trace, template, to_csv
from diffspec.traces import table as table_module
from diffspec.traces.gather import gather
from diffspec.traces.readers import request_metrics, sweep_summary
from diffspec.traces.readers.prometheus import parse
from diffspec.traces.schema import NAMES

FEW, MANY = 20, 10_000


@pytest.mark.parametrize("name", NAMES_OF_FORMATS)
def test_the_valid_files_are_read(tmp_path, name):
    for seed in seeds()[name]:
        paths = seed.write(tmp_path / "file")
        assert gather(paths).recognised[0]["format"] == name
        assert judge(paths, seed.identity) == "accepted"


def outcomes(folder, name, numbers):
    """How many of the mutations had each outcome."""
    found = {"accepted": 0, "skipped": 0, "refused": 0}
    for number in numbers:
        seed, data = mutation(name, number)
        try:
            found[judge(seed.write(folder / "file", data), seed.identity, whole=number % 4 == 0)] += 1
        except Exception as error:
            error.add_note(f"mutation({name!r}, {number})")
            raise
    return found


@pytest.mark.parametrize("name", NAMES_OF_FORMATS)
def test_a_mutated_file_is_read_or_refused(tmp_path, name):
    found = outcomes(tmp_path, name, range(FEW))
    assert found["accepted"] > 0 and found["refused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES_OF_FORMATS)
def test_many_mutated_files_are_read_or_refused(tmp_path, name):
    outcomes(tmp_path, name, range(MANY))


# Files made to hurt.

DEEPEST = 100_000
BRACKETS, OBJECTS = "[" * DEEPEST + "]" * DEEPEST, '{"a":' * DEEPEST + "1" + "}" * DEEPEST
REQUEST = '{"arrival_time":0,"completion_time":1,"prompt_tokens":8,"output_tokens":8'
SWEEP = "request_rate,num_prompts,mean_ttft_ms,errors\n2,8,1,"


@pytest.mark.parametrize(
    "text",
    [
        *(BRACKETS, OBJECTS, BRACKETS[:DEEPEST], OBJECTS[:DEEPEST], f'[{{"a": 1}}, {BRACKETS}]', f"{{}}\n{OBJECTS}\n"),
        *(
            f'{{"num_prompts":1,"mean_ttft_ms":{BRACKETS}}}',
            f'{{"metrics":{OBJECTS}}}',
            f'data: {{"metrics":{OBJECTS}}}\n',
        ),
        *(f'{REQUEST},"x":{BRACKETS}}}\n', f'{REQUEST}}}\n{REQUEST},"x":{OBJECTS}}}\n'),
        *(f'{SWEEP}"{BRACKETS}"\n', f'{SWEEP}"[{"-" * DEEPEST}1]"\n', f'{SWEEP}"[{"1+" * DEEPEST}1]"\n'),
        f'arrival_rate,position_acceptance\n2,"{BRACKETS[: DEEPEST // 2]}"\n',
        f'vllm:generation_tokens_total{{a="{"{" * DEEPEST}"}} 1\n',
    ],
    ids=range(16),
)
def test_deep_nesting(tmp_path, text):
    (path := tmp_path / "deep").write_text(text)
    assert judge([path], {}) == "refused"


def parquet(columns: dict) -> bytes:
    pq.write_table(pa.table(columns), target := io.BytesIO())
    return target.getvalue()


ROW = {"concurrency": [4], "prompt_length": [8], "output_length": [64], "itl_mean": [0.01]}
REPORT = json.dumps(report(benchmark(CONCURRENT)))
ODD = [
    (f'[{REPORT}, {{"a": 1}}]'.encode(), "skipped", "a report and no report"),
    (b'{"conditional_accept_rates": [0.5]}\n{"conditional_accept_rates": [0.4]}\n', "refused", "two profiles"),
    (b"arrival_time,prompt_tokens\n1,1e-200\n2,1e-200\n", "accepted", "lengths whose square is 0"),
    (parquet(request_table().to_dict("list")).replace(b"run", b"r\xffn"), "refused", "a name that is no UTF-8"),
    (b"arrival_time,completion_time,prompt_tokens,output_tokens,n\xe9\n0,1,8,8,2\n", "refused", "a header in Latin-1"),
    (parquet(ROW | {"a\x00b": [1], "": [2], " ": [3]}), "accepted", "names that CSV cannot hold"),
    (parquet(ROW | {"when": [datetime.date(2026, 1, 1)], "b": [b"\xff"], "l": [[1, None]]}), "accepted", "other types"),
    (parquet(request_table().to_dict("list") | {"run": ["x" * 200_000] * 200}), "refused", "a long name of a run"),
    (f"{template()}junk\n".encode(), "skipped", "a row that is none"),
]


@pytest.mark.parametrize(("data", "outcome"), [case[:2] for case in ODD], ids=[case[2] for case in ODD])
def test_odd_files(tmp_path, data, outcome):
    (path := tmp_path / "odd").write_bytes(data)
    assert judge([path], {}) == outcome


@pytest.mark.parametrize("number", ["1e400", "9" * 5000, "5e-324"], ids=["infinite", "long", "tiny"])
def test_huge_numbers_in_every_place(tmp_path, number):
    """In the place of each number of a result, of a scrape, and of a table in turn."""
    path = tmp_path / "huge"
    for name in ("vllm bench serve JSON", "/metrics of vLLM or SGLang", "operating-point table"):
        seed = seeds()[name][0]
        for place in list(re.finditer(rb"(?<=[ ,:])\d+\.?\d*(?=[,\n}\]])", seed.data))[:40:5]:
            data = seed.data[: place.start()] + number.encode() + seed.data[place.end() :]
            judge(seed.write(path, data), seed.identity, whole=False)


def special(folder: Path) -> dict[str, Path]:
    """Files that are none."""
    made = {name: folder / name for name in ("empty", "blank", "pipe", "endless", "loop", "dangling", "absent")}
    made["empty"].touch()
    made["blank"].write_text(" \n\r\n\t ")
    os.mkfifo(made["pipe"])
    made["endless"].symlink_to("/dev/zero")
    made["loop"].symlink_to(made["loop"])
    made["dangling"].symlink_to(made["absent"])
    return made


def test_what_is_no_file_is_refused_without_being_read(tmp_path):
    """A read of the pipe, or of all of the endless file, would not come back."""
    messages = {
        "empty": "the file is empty",
        "blank": "the file is empty",
        "pipe": "a pipe or a device",
        "endless": "a pipe or a device",
        "loop": "cannot be read",
        "dangling": "no such file",
        "absent": "no such file",
    }
    for name, path in special(tmp_path).items():
        with within(SECONDS), pytest.raises(TraceError, match=f"{name}: .*{messages[name]}"):
            gather([path])
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(TraceError, match="cannot be read"):
            gather([tmp_path / name])


def test_a_folder_of_junk(tmp_path):
    """One result among files that cannot be read: it is read, and every other is named."""
    special(tmp_path)["blank"].unlink()
    (tmp_path / "around").symlink_to(tmp_path)
    junk = {
        "binary": b"\x00\x01",
        "latin.csv": "é,ü\n".encode("latin-1"),
        "half": b'{"num_prompts": 1,',
        "page": b"<html>",
    }
    junk |= {"cut.parquet": b"PAR1" + b"\x15" * 40, "deep.txt": BRACKETS.encode()}
    for name, data in junk.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "run.json").write_bytes(seeds()["vllm bench serve JSON"][0].data)
    trace = read_trace(tmp_path)
    assert len(trace) == 1 and trace.sources == [str(tmp_path / "run.json")]
    told = "\n".join(trace.warnings)
    assert all(name in told for name in ("empty", *junk)) and "endless" not in told
    (tmp_path / "run.json").rename(tmp_path / "odd\udcff.json")  # a name in Latin-1, and so the name of a run
    odd = read_trace(tmp_path)
    assert odd.sources == [f"{tmp_path}/odd?.json"] and b"odd?" in to_csv(odd.frame).encode()
    (tmp_path / "odd\udcff.json").unlink()
    with pytest.raises(TraceError, match="no trace in this folder"):
        read_trace(tmp_path)


def test_small_parquet_files_that_hold_very_much(tmp_path, monkeypatch):
    """Told from the footer, before anything is unpacked."""
    monkeypatch.setattr(parquet_size, "MOST_CHUNK", 1 << 20)
    path, rows, long = tmp_path / "bomb", (1 << 20) + 1, "x" * (1 << 21)
    requests = {name: [1.0] for name in ("arrival_time", "completion_time", "prompt_tokens", "output_tokens")}
    bombs = [
        ({name: np.ones(rows) for name in requests}, "more rows than bytes"),
        ({"arrival_time": np.ones(rows)}, "more rows than bytes"),
        (requests | {"run": [long]}, "too much to unpack"),
        ({"arrival_time": [1.0], "prompt_tokens": [long]}, "too much to unpack"),
        ({"arrival_rate": [1.0], "notes": [long]}, "too much to unpack"),
        (requests | {"run": [np.zeros(1000)]}, "lists in the place of single values"),
        ({"arrival_rate": [1.0], "position_acceptance": [np.zeros(5_000_001)]}, "too large"),
    ]
    for columns, message in bombs:
        pq.write_table(pa.table(columns), path, compression="zstd")
        assert path.stat().st_size < 200_000
        with pytest.raises(TraceError, match=f"bomb.*{message}"):
            gather([path])


def test_too_many_records(tmp_path, monkeypatch):
    """Runs and requests beyond what memory holds are refused while they are counted."""
    monkeypatch.setattr(table_module, "MOST_CELLS", 40 * len(NAMES))
    monkeypatch.setattr(request_metrics, "MOST_REQUESTS", 40)
    path = tmp_path / "many"
    for data in (
        json.dumps([VLLM] * 50),
        sweep_csv([VLLM] * 50),
        (template() + "\n".join(template().splitlines()[1:]) * 50),
        json.dumps([CASE] * 50),
        json.dumps([METRICS] * 50),
        json.dumps([json.loads(REQUEST + "}")] * 50),
    ):
        path.write_text(data)
        with pytest.raises(TraceError, match=r"many.*(too large|too many|one JSON list)"):
            gather([path])


def test_a_long_cell_of_numbers_is_read_and_another_is_left(tmp_path):
    assert sweep_summary.value("latencies", f"[{'0.5, ' * 300_000}1.0]") == [*[0.5] * 300_000, 1.0]
    assert isinstance(sweep_summary.value("errors", f"[{'None, ' * 300_000}None]"), str)


def test_idle_scrapes_are_compared_once(monkeypatch):
    """A run in a long series: the window that holds it goes from the last scrape before it to the first after it."""
    monkeypatch.setattr(join_module, "MOST_WINDOWS", 3)
    text = "# scrape {}\nvllm:generation_tokens_total {}\nvllm:request_success_total {}\n"
    counts = [(0, 0)] * 400 + [(640, 20), (1280, 40)] + [(1280, 40)] * 400
    series = parse("".join(text.format(time, *count) for time, count in enumerate(counts)), "series")
    (window,) = join_module._windows(series, 40, 1280)
    assert (window.scrapes[0].time, window.scrapes[-1].time, window.error) == (399, 401, 0.0)
    crowd = parse("".join(text.format(time, time, time) for time in range(300)), "series")
    with pytest.raises(TraceError, match=r"series.*too many scrapes hold as much"):
        join_module._windows(crowd, 100, 100)


# Large files, each read by a process of its own, which says how much memory it took.

READ = """
import pathlib, sys
from diffspec.results import TraceError
from diffspec.traces import read_trace
try:
    answer = len(read_trace(sys.argv[1]))
except TraceError as error:
    answer = error
peak = pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
print(int(peak) / 1e6, answer)
"""
# The interpreter and its libraries take 0.25 GB, a batch of requests 0.05 GB, and the sampled latencies 16 bytes a
# request; 200 MB of requests as objects of Python would take 3 GB and more.
MOST_MEMORY = 1.2


def read_alone(path: Path) -> tuple[float, str]:
    """Peak memory [GB] of reading a file, and how many rows came of it or the error."""
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    peak, answer = done.stdout.split(" ", 1)
    return float(peak), answer.strip()


def log_of_requests(path: Path, kind: str) -> None:
    """200 MB of requests at about 100 a second."""
    random = np.random.default_rng(3)
    with path.open("wb") as file:
        for part in range(10_000):
            arrival = 1000.0 * part + np.sort(random.random(100_000)) * 1000.0
            columns = {"arrival_time": arrival, "completion_time": arrival + random.gamma(4.0, 0.5, len(arrival))}
            columns |= {name: random.integers(10, 500, len(arrival)) for name in ("prompt_tokens", "output_tokens")}
            frame = pa.table(columns)
            if kind == "parquet":
                writer = pq.ParquetWriter(file, frame.schema) if part == 0 else writer
                writer.write_table(frame)
            elif kind == "csv":
                pyarrow.csv.write_csv(frame, file, pyarrow.csv.WriteOptions(include_header=part == 0))
            else:
                file.write(frame.to_pandas().to_json(orient="records", lines=True, double_precision=9).encode())
            if file.tell() > 200_000_000:
                break
        if kind == "parquet":
            writer.close()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_two_hundred_megabytes_of_requests(tmp_path, kind):
    log_of_requests(path := tmp_path / "log", kind)
    peak, answer = read_alone(path)
    assert int(answer) > 100 and peak < MOST_MEMORY, peak


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"num_prompts": 1, "request_rate": 1.0, "completed": 1, "mean_ttft_ms": 1}, "too large for operating points"),
        ({"arrival_time": 0, "completion_time": 1, "prompt_tokens": 1, "output_tokens": 1}, "one JSON list"),
        ({"timestamp": 1, "input_length": 1, "output_length": 2}, "arrivals without latencies"),
        ({"a": 1}, "no format that is read"),
    ],
    ids=["results", "requests", "arrivals", "anything"],
)
def test_a_million_records_in_one_list(tmp_path, record, message):
    (path := tmp_path / "million.json").write_text("[" + ",".join([json.dumps(record)] * 1_000_000) + "]")
    peak, answer = read_alone(path)
    assert "million.json" in answer and message in answer and peak < MOST_MEMORY, peak
