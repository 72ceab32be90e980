"""Files and folders gathered into one trace: which of them count, forward passes as loops, identity, the written."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bench_samples import CONCURRENT, POISSON, VLLM, VLLM_OPEN, benchmark, report
from hostile import CASE, request_table

from diffspec.results import TraceError
from diffspec.traces import read_trace, rows_to_csv, template, to_csv, to_parquet, validate
from diffspec.traces import source as source_module
from diffspec.traces.gather import gather, set_identity, step_points
from diffspec.traces.readers import step_samples
from diffspec.traces.schema import COLUMNS
from diffspec.traces.source import Source


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


# Folders


def test_of_a_collection_only_its_table_counts(write, tmp_path):
    """Raw files, requests and plots below it repeat the table; a result beside the folder is another measurement."""
    for folder in ("first", "deep/second"):
        write(f"{folder}/operating_points.csv", template())
        write(f"{folder}/requests.csv", request_table().to_csv(index=False))
        write(f"{folder}/raw/cell.jsonl", '{"cell": "c", "began_unix": 1}\n')
        write(f"{folder}/raw/run.json", VLLM)
    write("alone.json", VLLM_OPEN)
    write(".hidden.json", "{")
    trace = read_trace(tmp_path)
    assert len(trace) == 2 * 4 + 1
    assert {Path(name).name for name in trace.sources} == {"operating_points.csv", "alone.json"}


def test_requests_beside_results_repeat_them(write, tmp_path):
    requests = write("requests.csv", request_table().to_csv(index=False))
    result = write("result.json", VLLM)
    assert read_trace(tmp_path).sources == [str(result)]
    result.unlink()
    assert len(read_trace(tmp_path)) == 2, "the open loop and the closed one"
    assert len(read_trace([requests, write("result.json", VLLM)])) == 3, "both where both are named"


def test_large_files_of_a_folder_are_let_go(write, tmp_path, monkeypatch):
    """What is read beyond the head is forgotten once a file is recognised, and again once it is read."""
    monkeypatch.setattr(source_module, "HEAD", 1 << 10)
    monkeypatch.setattr("diffspec.traces.folders.HEAD", 1 << 10)
    sources = []
    made = Source.__init__
    monkeypatch.setattr(Source, "__init__", lambda self, path: (sources.append(self), made(self, path))[1])
    for index in range(3):
        write(f"{index}.json", json.dumps([VLLM] * 20, indent=1))
    assert len(read_trace(tmp_path)) == 60 and len(sources) == 3
    assert not any({"data", "text", "records", "first"} & set(source.__dict__) for source in sources)
    (again,) = (source for source in sources if source.path.name == "1.json")
    assert len(again.records) == 20


# Forward passes


def cases(*records, tmp_path):
    path = tmp_path / "forward.json"
    path.write_text(json.dumps(list(records)))
    return step_points(step_samples.read(Source(path)), "forward.json")


def test_forward_passes_are_closed_loops_of_their_context(tmp_path):
    """Two requests with 1000 and 3000 tokens of context: their mean is that of an answer half done."""
    plain = {"case": "plain", "requests": [{"query_len": 1, "kv_len": 500}], "ranks": CASE["ranks"][1:]}
    points = cases(CASE, plain, tmp_path=tmp_path)
    assert points["concurrency"].tolist() == [3, 1] and points["draft_length"].tolist() == [3, 0]
    assert points["itl_mean"].tolist() == pytest.approx([5.5e-3, 5.5e-3]), "the slowest rank"
    kv = np.array([(1000 + 2 * 3000) / 3, 500])
    assert (1 + points["output_length"] / 2).tolist() == pytest.approx(kv)
    assert points["tokens_per_step"].tolist()[0] == 4 and points["method"].tolist() == ["draft_model", "none"]
    frame, _, problems = validate(points)
    assert not problems and frame["source_row"].tolist() == [1, 2]


def test_cases_without_a_name_or_of_one_name_stay_apart(tmp_path):
    unnamed = {key: value for key, value in CASE.items() if key != "case"}
    assert cases(unnamed, CASE, CASE, unnamed, tmp_path=tmp_path)["source_row"].tolist() == [1, 2, 3, 4]


def test_prefill_is_left_out_aloud(tmp_path):
    prefill = CASE | {"requests": [{"query_len": 512, "kv_len": 512, "chunked": True}]}
    points = cases(prefill, CASE, tmp_path=tmp_path)
    assert points["source_row"].tolist() == [2] and any("1 cases with prefill" in w for w in points.attrs["warnings"])
    with pytest.raises(TraceError, match="no decoding or verifying case"):
        cases(prefill, tmp_path=tmp_path)


# Identity


def test_identity_replaces_aloud():
    frame = pd.DataFrame({"hardware": ["A", None, "B"], "draft_length": [4, 4, 4]}).astype(object)
    notes = set_identity(frame, {"hardware": "B", "draft_length": 4, "task": "code"})
    assert frame["hardware"].tolist() == ["B"] * 3 and frame["task"].tolist() == ["code"] * 3
    assert notes == ["hardware set to B, in place of A"], "not where nothing or the same was given"


# What is written


def every_column() -> pd.DataFrame:
    """The template with a value in every column: texts that look like numbers, and numbers of every size."""
    raw = pd.read_csv(io.StringIO(template()))
    for item in COLUMNS:
        if item.name not in raw.columns and item.kind != "observed":
            low, high = max(item.low, 0.0), item.high
            number = 1 if item.dtype == "integer" else low + (min(high, 3.0) - low) / 3
            raw[item.name] = ["NA", "null", "1e5", "007"] if item.dtype == "text" and not item.choices else None
            if item.dtype in ("number", "integer") and item.name not in ("arrival_scv", "acceptance_rate"):
                raw[item.name] = number
    raw["notes"] = ["a;b", 'say "x"', "two\nlines", " "]
    raw["deployment"] = ["NA", "nan", "None", "1.0"]
    frame, _, problems = validate(raw.astype(object), "made.csv")
    assert not problems, [problem.line() for problem in problems]
    return frame


@pytest.mark.parametrize(("name", "written"), [("t.csv", lambda f: to_csv(f).encode()), ("t.parquet", to_parquet)])
def test_what_is_written_reads_back(tmp_path, name, written):
    frame = every_column()
    (path := tmp_path / name).write_bytes(written(frame))
    back = read_trace(path)
    ours, theirs = (f.drop(columns=["source_file", "source_row"]) for f in (frame, back.frame))
    pd.testing.assert_frame_equal(ours, theirs)
    assert (tmp_path / "again").write_bytes(written(back.frame)) and read_trace(
        tmp_path / "again"
    ).digest() == back.digest()


def test_rows_of_the_table_reads_back(tmp_path):
    rows = [
        {"concurrency": 4, "prompt_length": 64, "output_length": 0.1 + 0.2 + 8, "draft_length": 2, "itl_mean": 0.03},
        {
            "arrival_rate": 2.5,
            "prompt_length": 64,
            "output_length": 8,
            "run": "x,y",
            "e2e_mean": 1e-3,
            "draft_length": 0,
        },
    ]
    rows[0]["position_acceptance"] = [0.8, 1 / 3]
    (path := tmp_path / "rows.csv").write_text(rows_to_csv(rows))
    frame = read_trace(path).frame
    for index, row in enumerate(rows):
        for name, value in row.items():
            cell = frame[name].iloc[index]
            assert cell == (tuple(value) if isinstance(value, list) else value), name
    assert rows_to_csv([{}]).strip() == ""


# Acceptance from elsewhere


def test_a_curve_fills_the_rows_that_tell_no_acceptance(write):
    header = "concurrency,prompt_length,output_length,draft_length,itl_mean,tokens_per_step,acceptance_rate,method"
    lines = ("4,8,64,2,0.01,,,eagle", "4,8,64,4,0.01,,,eagle", "4,8,64,2,0.01,1.5,,eagle", "4,8,64,0,0.01,,,none")
    trace = read_trace(write("t.csv", "\n".join((header, *lines, "4,8,64,2,0.01,,0.5,eagle\n"))))
    filled = trace.with_acceptance([0.8, 0.5])
    curves = filled.frame["position_acceptance"].tolist()
    assert curves == [(0.8, 0.5), (0.8, 0.5, 0.5, 0.5), None, None, None]
    assert filled.frame["tokens_per_step"].iloc[:3].tolist() == pytest.approx([2.2, 1 + 0.8 + 0.4 + 0.2 + 0.1, 1.5])
    assert filled.warnings[-1] == "acceptance of 2 rows that told none taken from the curve"
    assert trace.frame["position_acceptance"].isna().all(), "the trace itself is as it was"
    full = filled.with_acceptance([0.1])
    assert full.warnings == filled.warnings and full.digest() == filled.digest(), "a told acceptance stays"


def test_reports_as_lines_are_all_read(write):
    one, other = (json.dumps(report(benchmark(strategy))) for strategy in (CONCURRENT, POISSON))
    frame = read_trace(write("reports.jsonl", f"{one}\n{other}\n")).frame
    assert frame["source_row"].tolist() == [1, 2] and frame["concurrency"].notna().tolist() == [True, False]


def test_what_was_gathered_says_which_file_is_what(write):
    arrivals = write("log.csv", "arrival_time,prompt_tokens\n1,2\n2,3\n")
    gathered = gather([write("run.json", VLLM), arrivals])
    assert [entry["gives"] for entry in gathered.recognised] == ["operating points", "arrivals"]
    assert len(gathered.points) == 1 and len(gathered.of("arrivals")[0]) == 2 and not gathered.of("acceptance")
