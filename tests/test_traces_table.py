"""Operating-point tables: reading, normalising, every kind of error, filters, digests."""

import doctest
import importlib
import io
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffspec.results import InputError, TraceError
from diffspec.traces import (
    COLUMNS,
    Trace,
    TraceProblems,
    matches,
    read_table,
    read_trace,
    template,
    to_csv,
    validate,
)
from diffspec.traces.schema import KINDS, METHODS, NAMES, NUMBER_NAMES

MODULES = ("schema", "problems", "sheet", "validation", "consistency", "table", "trace", "where", "renewal")

# One open-loop and one closed-loop row that obey every identity: e2e = ttft + tpot*(64 - 1).
OPEN = {
    "deployment": "d",
    "arrival_rate": "2",
    "arrival_process": "poisson",
    "prompt_length": "64",
    "output_length": "64",
    "method": "eagle3",
    "draft_length": "2",
    "tokens_per_step": "2.08",
    "position_acceptance": "0.6;0.8",
    "ttft_mean": "0.1",
    "ttft_p50": "0.09",
    "ttft_p99": "0.3",
    "itl_mean": "0.04",
    "tpot_mean": "0.02",
    "e2e_mean": "1.36",
    "throughput": "1.9",
    "n_requests": "100",
    "failed": "0",
}
CLOSED = OPEN | {"arrival_rate": "", "arrival_process": "", "concurrency": "4", "throughput": "2.9"}


def csv_text(*rows: dict) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    frame = pd.DataFrame([{name: row.get(name, "") for name in names} for row in rows])
    return frame.to_csv(index=False)


@pytest.fixture
def write(tmp_path):
    def write(content, name="table.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def read(write):
    return lambda *rows, **options: read_trace(write(csv_text(*rows)), **options)


def problems_of(*rows: dict):
    frame = pd.DataFrame([{k: r.get(k, "") for k in dict.fromkeys(n for row in rows for n in row)} for r in rows])
    return validate(frame.astype(object), "t.csv")[2]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    result = doctest.testmod(importlib.import_module(f"diffspec.traces.{name}"))
    assert result.failed == 0
    if name in ("schema", "problems", "sheet", "validation", "where", "renewal"):
        assert result.attempted > 0


def test_the_columns_are_named_once_and_say_what_they_mean():
    assert len(set(NAMES)) == len(COLUMNS)
    assert {column.kind for column in COLUMNS} == set(KINDS)
    assert all(column.meaning and column.allowed for column in COLUMNS)


def test_the_package_does_not_import_pandas():
    program = "import sys, diffspec.traces; from diffspec.traces import template; print('pandas' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_an_unknown_public_name_is_an_attribute_error():
    import diffspec.traces as traces

    with pytest.raises(AttributeError, match="read_trase"):
        _ = traces.read_trase
    assert all(hasattr(traces, name) for name in traces.__all__)


def test_the_template_is_valid_and_has_open_and_closed_rows_of_both_kinds(write):
    trace = read_trace(write(template()))
    assert trace.warnings == []
    assert trace.frame["draft_length"].tolist() == [0, 4, 0, 4]
    assert trace.frame["concurrency"].notna().tolist() == [False, False, True, True]
    assert trace.frame["arrival_rate"].notna().tolist() == [True, True, False, False]


def test_the_canonical_frame(read):
    frame = read(OPEN, CLOSED).frame
    assert list(frame.columns) == [*NAMES, "source_file", "source_row"]
    assert all(frame[name].dtype == np.float64 for name in NUMBER_NAMES)
    assert frame["position_acceptance"].tolist() == [(0.6, 0.8), (0.6, 0.8)]
    assert frame["drafter"].tolist() == [None, None]
    assert frame["source_row"].tolist() == [2, 3]
    assert frame["arrival_scv"].iloc[0] == 1 and np.isnan(frame["arrival_scv"].iloc[1])


def test_what_a_missing_cell_means(read):
    bare = {"concurrency": "4", "prompt_length": "64", "output_length": "64", "e2e_mean": "1.3"}
    trace = read(bare | {"draft_length": ""}, bare | {"draft_length": "3", "tokens_per_step": "2"})
    frame = trace.frame
    assert frame["deployment"].tolist() == ["default", "default"]
    assert frame["failed"].tolist() == [0, 0]
    assert frame["draft_length"].tolist() == [0, 3]
    assert frame["method"].tolist() == ["none", "draft_model"]
    assert len(trace.warnings) == 1 and "draft_model (1 row)" in trace.warnings[0]


def test_assumptions_are_said(read):
    trace = read(OPEN | {"arrival_process": "", "draft_length": "", "tokens_per_step": ""})
    assert trace.frame["arrival_process"].iloc[0] == "poisson" and trace.frame["draft_length"].iloc[0] == 2
    assert [("poisson" in line, "position_acceptance" in line) for line in trace.warnings] == [
        (False, True),
        (True, False),
    ]
    rated = read(OPEN | {"tokens_per_step": "", "position_acceptance": "", "draft_acceptance_rate": "0.5"})
    assert rated.frame["tokens_per_step"].iloc[0] == 2.0 and "draft_acceptance_rate" in rated.warnings[0]


@pytest.mark.parametrize(
    ("written", "kept"),
    [("EAGLE3", "eagle3"), ("draft-model", "draft_model"), ("deepseek_mtp", "mtp"), ("dflash", "block")],
)
def test_method_names_of_engines(read, written, kept):
    assert read(OPEN | {"method": written}).frame["method"].iloc[0] == kept
    assert kept in METHODS


# Every kind of error: change to a good row, the column blamed, parts of the message.
ERRORS = [
    ({"prompt_length": "-3"}, "prompt_length", ["-3", "above 0"]),
    ({"prompt_length": "0"}, "prompt_length", ["above 0"]),
    ({"output_length": "0.5"}, "output_length", ["1 to"]),
    ({"output_length": ""}, "output_length", ["missing"]),
    ({"ttft_mean": "NaN"}, "ttft_mean", ["'NaN'", "leave the cell empty"]),
    ({"ttft_mean": "abc"}, "ttft_mean", ["'abc'"]),
    ({"ttft_mean": "inf"}, "ttft_mean", ["'inf'"]),
    ({"ttft_mean": "1e999"}, "ttft_mean", ["too large"]),
    ({"ttft_mean": "0,1"}, "ttft_mean", ["decimal point"]),
    ({"ttft_mean": "100 ms"}, "ttft_mean", ["number alone"]),
    ({"ttft_mean": "1_0"}, "ttft_mean", ["'1_0'"]),
    ({"ttft_mean": "-0.1"}, "ttft_mean", ["above 0"]),
    ({"acceptance_rate": "1.2"}, "acceptance_rate", ["0 to 1", "percentage"]),
    ({"acceptance_rate": "81%"}, "acceptance_rate", ["divide the percentage by 100"]),
    ({"acceptance_rate": "-0.1"}, "acceptance_rate", ["0 to 1"]),
    ({"position_acceptance": "0.6;80"}, "position_acceptance", ["80.0", "percentage"]),
    ({"position_acceptance": "0.6;;0.8"}, "position_acceptance", ["one number for each position"]),
    ({"position_acceptance": "0.6"}, "position_acceptance", ["1 positions for draft_length 2"]),
    ({"tokens_per_step": "3.2"}, "tokens_per_step", ["1 to 3"]),
    ({"tokens_per_step": "0.9"}, "tokens_per_step", ["bonus token"]),
    ({"draft_length": "-1"}, "draft_length", ["0 to"]),
    ({"draft_length": "2.5"}, "draft_length", ["whole number"]),
    ({"draft_length": "", "position_acceptance": ""}, "draft_length", ["missing"]),
    ({"method": "none", "position_acceptance": ""}, "draft_length", ["method 'none'"]),
    ({"method": "eagle_3"}, "method", ["did you mean 'eagle3'"]),
    ({"arrival_process": "weekly"}, "arrival_process", ["poisson, constant"]),
    ({"arrival_scv": "3"}, "arrival_scv", ["poisson"]),
    ({"concurrency": "4"}, "arrival_rate", ["both", "exactly one"]),
    ({"arrival_rate": ""}, "arrival_rate", ["neither", "exactly one"]),
    ({"ttft_p99": "0.05"}, "ttft_p99", ["out of order", "ttft_p50"]),
    ({"ttft_mean": "100"}, "ttft_mean", ["milliseconds"]),
    ({"e2e_mean": "1360"}, "e2e_mean", ["milliseconds"]),
    ({"itl_mean": "40"}, "itl_mean", ["up to 20 s", "milliseconds"]),
    ({"itl_mean": "12"}, "itl_mean", ["tpot", "milliseconds"]),
    ({"tpot_mean": "20"}, "tpot_mean", ["milliseconds"]),
    ({"ttft_p99": "300"}, "ttft_p99", ["ttft_mean", "milliseconds"]),
    ({"throughput": "120"}, "throughput", ["tokens per second"]),
    ({"n_requests": "10.5"}, "n_requests", ["whole"]),
    ({"failed": "-1"}, "failed", ["0 to"]),
    ({"num_experts": "4", "experts_per_token": "8"}, "experts_per_token", ["num_experts"]),
    ({"kv_usage_mean": "64"}, "kv_usage_mean", ["percentage"]),
    ({"load_imbalance": "0.5"}, "load_imbalance", ["1 to"]),
]


@pytest.mark.parametrize(("change", "column", "parts"), ERRORS, ids=[f"{e[1]}-{i}" for i, e in enumerate(ERRORS)])
def test_every_kind_of_error_names_its_place(write, change, column, parts):
    path = write(csv_text(OPEN, OPEN | change))
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    error = caught.value
    assert (error.file, error.row, error.column) == (str(path), 3, column)
    assert all(part in str(error) for part in parts)
    assert not isinstance(error, TraceProblems), "one mistake, one problem"


def test_a_row_without_anything_observed(read):
    nothing = {name: "" for name in OPEN if name.split("_")[0] in ("ttft", "itl", "tpot", "e2e", "throughput")}
    with pytest.raises(TraceError, match="row 3: nothing observed"):
        read(OPEN, OPEN | nothing)


def test_all_problems_are_reported_at_once_and_the_long_tail_is_counted(write):
    rows = [OPEN | {"prompt_length": "-1", "acceptance_rate": "81"} for _ in range(8)]
    path = write(csv_text(*rows))
    with pytest.raises(TraceProblems) as caught:
        read_trace(path)
    error = caught.value
    assert len(error.problems) == 16 and str(error).startswith(f"{path}: 16 problems")
    assert len(str(error).splitlines()) == 12 and "... and 6 more" in str(error)
    assert (error.row, error.column, error.got) == (2, "prompt_length", -1.0)


@pytest.mark.parametrize("rows", [(OPEN,), (CLOSED,), (OPEN, CLOSED)])
def test_a_table_in_milliseconds_throughout(write, rows):
    latencies = ("ttft", "itl", "tpot", "e2e")
    slow = [
        {k: str(float(v) * 1000) if k.split("_")[0] in latencies and v else v for k, v in row.items()} for row in rows
    ]
    with pytest.raises(TraceError, match="milliseconds"):
        read_trace(write(csv_text(*slow)))
    with pytest.raises(TraceError, match="milliseconds"):
        read_trace(write(csv_text(*slow)), skip_bad_rows=True)


def test_gaps_in_milliseconds_alone_are_seen_without_any_other_column(write):
    row = {"arrival_rate": "2", "arrival_process": "poisson", "prompt_length": "64", "output_length": "64"}
    with pytest.raises(TraceError, match=r"column 'itl_mean'.*milliseconds"):
        read_trace(write(csv_text(row | {"itl_mean": "9.1"}, row | {"itl_mean": "12.3"})))
    assert len(read_trace(write(csv_text(row | {"itl_mean": "0.0091"})))) == 1


def test_a_truly_slow_closed_loop_is_believed(read):
    slow = {"tpot_mean": "2", "itl_mean": "4", "ttft_mean": "10", "ttft_p50": "", "ttft_p99": "", "e2e_mean": "136"}
    assert len(read(CLOSED | slow | {"throughput": "0.029"})) == 1


TABLE_ERRORS = [
    (b"", "empty"),
    (b"  \n\n", "empty"),
    (b"\xef\xbb\xbf", "empty"),
    (b",,\n,,\n", "empty"),
    (csv_text(OPEN).splitlines()[0].encode(), "no rows"),
    (b"<!DOCTYPE html><html></html>", "web page"),
    (b"\x89PNG\r\n\x1a\n\x00\x00", "binary"),
    (b"PK\x03\x04 workbook", "Excel"),
    (b"\x1f\x8b\x08", "gzip"),
    (b"PAR1 cut", "cut off"),
    (b"PAR1" + b"junk" * 8 + b"PAR1", "Parquet file cannot be read"),
    (b"a,b\n1,2\n", "no column of the operating-point table"),
    (b"1,2,3\n4,5,6\n", "no column of the operating-point table"),
    (b"arrival_time,first_token_time\n1,2\n", "request table"),
    (b"ttft_mean,ttft_mean\n1,2\n", "duplicate column"),
    (b"deployment,ttft_mean\n\xff\xe9,1\n", "line 2 is not UTF-8"),
    ("deployment,ttft_mean\n".encode("utf-16"), "UTF-16"),
    (b'deployment,ttft_mean\n"never closed,1\n', "cut off"),
    (b"prompt_length,output_length,e2e_mean\n1,2,3\n", "neither arrival_rate nor concurrency"),
    (b"prompt_length,output_length,arrival_rate\n1,2,3\n", "nothing observed"),
    (b"prompt_len,output_length,arrival_rate,e2e_mean\n1,2,3,4\n", "perhaps it is called 'prompt_len'"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("content", "message"), TABLE_ERRORS, ids=[e[1] for e in TABLE_ERRORS])
def test_what_is_no_table_raises_also_when_bad_rows_are_skipped(write, content, message, skip):
    path = write(content)
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(path, skip_bad_rows=skip)
    assert caught.value.file == str(path)


def test_a_missing_file_a_folder_and_nothing(tmp_path):
    with pytest.raises(TraceError, match="no such file"):
        read_trace(tmp_path / "absent.csv")
    with pytest.raises(TraceError, match="no trace in this folder"):
        read_trace(tmp_path)
    with pytest.raises(TraceError, match="a folder where a file is needed"):
        read_table(tmp_path)
    with pytest.raises(InputError, match="no trace given"):
        read_trace([])


def test_a_file_cut_off_inside_a_row(write):
    text = csv_text(OPEN, OPEN)
    cut = text[: text.rstrip().rfind(",") - 3]
    with pytest.raises(TraceError, match=r"row 3: wrong number of cells.*cut off"):
        read_trace(write(cut))
    assert len(read_trace(write(cut), skip_bad_rows=True)) == 1


def test_rows_are_counted_as_a_spreadsheet_does(write):
    lines = csv_text(OPEN, OPEN | {"run": "two\nlines"}, OPEN | {"ttft_mean": "x"}).split("\n")
    path = write("\n".join([lines[0], lines[1], "", *lines[2:]]))
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert caught.value.row == 5


@pytest.mark.parametrize("separator", ["\t", ";"])
def test_other_separators_and_a_byte_order_mark(write, separator):
    frame = pd.read_csv(io.StringIO(csv_text(OPEN, CLOSED)), dtype=str, keep_default_na=False)
    path = write("\ufeff" + frame.to_csv(index=False, sep=separator), "table.txt")
    assert read_trace(path).digest() == read_trace(write(csv_text(OPEN, CLOSED))).digest()


def test_parquet_and_csv_are_told_apart_by_content(write, tmp_path):
    typed = pd.read_csv(io.StringIO(csv_text(OPEN, CLOSED)))
    typed["position_acceptance"] = [[0.6, 0.8], [0.6, 0.8]]
    buffer = io.BytesIO()
    typed.to_parquet(buffer)
    parquet = read_trace(write(buffer.getvalue(), "table.csv"))
    text = read_trace(write(csv_text(OPEN, CLOSED), "table.parquet"))
    assert parquet.digest() == text.digest()
    assert parquet.frame["source_row"].tolist() == [2, 3]


def test_unknown_columns_are_kept_and_named_once_with_a_guess(read):
    trace = read(OPEN | {"ttft_avg": "1", "colour": "red", "note": ""})
    assert trace.frame["ttft_avg"].tolist() == [1.0] and trace.frame["colour"].tolist() == ["red"]
    assert len(trace.warnings) == 1
    assert "'ttft_avg' (did you mean 'ttft_" in trace.warnings[0] and "'colour'" in trace.warnings[0]


def test_bad_rows_are_set_aside_as_they_were_found(write):
    path = write(csv_text(OPEN, OPEN | {"ttft_mean": "abc", "failed": "-1"}, CLOSED))
    trace = read_trace(path, skip_bad_rows=True)
    assert trace.frame["source_row"].tolist() == [2, 4]
    assert trace.bad_rows is not None and trace.bad_rows["ttft_mean"].tolist() == ["abc"]
    assert trace.bad_rows["source_row"].tolist() == [3]
    assert "'abc'" in trace.bad_rows["problem"].iloc[0] and "'failed'" in trace.bad_rows["problem"].iloc[0]
    # The mended file of bad rows is a table again: what was added to it is no unknown column.
    mended = trace.bad_rows.assign(ttft_mean="0.1", failed="0")
    again = read_trace(write(mended.to_csv(index=False), "mended.csv"))
    assert len(again) == 1 and again.warnings == []


def test_no_good_row_is_an_error_even_when_skipping(read):
    with pytest.raises(TraceError, match="abc"):
        read(OPEN | {"ttft_mean": "abc"}, skip_bad_rows=True)


def test_nothing_is_set_aside_unless_asked(read):
    assert read(OPEN).bad_rows is None
    skipped = read(OPEN, skip_bad_rows=True).bad_rows
    assert skipped is not None and len(skipped) == 0


def test_files_are_joined_and_repeats_are_named(write):
    a, b = write(csv_text(OPEN), "a.csv"), write(csv_text(OPEN, CLOSED), "b.csv")
    trace = read_trace([a, b])
    assert len(trace) == 3 and trace.sources == [str(a), str(b)]
    assert [line for line in trace.warnings if "repeats" in line] == [
        f"{b} row 2 repeats {a} row 2 exactly; both are kept"
    ]


def test_problems_of_all_files_are_gathered(write):
    a, b = write(csv_text(OPEN | {"failed": "x"}), "a.csv"), write(csv_text(OPEN | {"failed": "y"}), "b.csv")
    with pytest.raises(TraceProblems) as caught:
        read_trace([a, b])
    assert [problem.file for problem in caught.value.problems] == [str(a), str(b)]
    assert str(a) in str(caught.value) and str(b) in str(caught.value)


def test_the_digest_depends_on_the_measurements_alone(read, write):
    base = read(OPEN, CLOSED).digest()
    assert len(base) == 64
    assert read(CLOSED, OPEN).digest() == base
    assert read(dict(reversed(OPEN.items())) | {"colour": "red"}, CLOSED).digest() == base
    assert read(OPEN | {"ttft_mean": "0.1000001"}, CLOSED).digest() != base
    assert read(OPEN).digest() != base


def test_a_trace_written_as_csv_reads_back(read, write):
    trace = read(OPEN, CLOSED | {"e2e_mean": "1.3600000000000003"})
    again = read_trace(write(to_csv(trace.frame), "again.csv"))
    assert again.digest() == trace.digest() and again.warnings == []


FILTERS = [
    ("draft_length == 2", [1, 1, 0]),
    ("draft_length = 0", [0, 0, 1]),
    ("draft_length != 2", [0, 0, 1]),
    ("arrival_rate <= 2", [1, 0, 0]),
    ("arrival_rate != 2", [0, 1, 1]),
    ("arrival_rate == ''", [0, 1, 0]),
    ('drafter == ""', [1, 1, 1]),
    ("concurrency>3,draft_length>=2", [0, 1, 0]),
    ("draft_length in (0, 3) or concurrency == 4", [0, 1, 1]),
    ("draft_length in {1;2;3}", [1, 1, 0]),
    ("method == eagle3 and arrival_rate > 0", [1, 0, 0]),
    ("method in ('none', 'ngram')", [0, 0, 1]),
    ("(draft_length == 0 or concurrency == 4) AND e2e_mean < 1.2", [0, 0, 1]),
    ("draft_length == 0 or concurrency == 4 and e2e_mean < 1.2", [0, 0, 1]),
    ("arrival_rate < 1e3", [1, 0, 1]),
    ("deployment == 'd'", [1, 1, 1]),
]


@pytest.fixture
def three(read) -> Trace:
    plain = {"method": "none", "draft_length": "0", "tokens_per_step": "", "position_acceptance": "", "itl_mean": ""}
    return read(OPEN, CLOSED, OPEN | plain | {"arrival_rate": "3", "tpot_mean": "0.015", "e2e_mean": "1.045"})


@pytest.mark.parametrize(("expression", "rows"), FILTERS)
def test_filters(three, expression, rows):
    assert matches(three.frame, expression).astype(int).tolist() == rows
    assert three.where(expression).frame["source_row"].tolist() == [i + 2 for i, row in enumerate(rows) if row]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("draft_len == 2", "no column 'draft_len'; did you mean 'draft_length'"),
        ("draft_length", "got the end where one of =="),
        ("draft_length ==", "got the end where a value"),
        ("draft_length == two", "holds numbers; got 'two'"),
        ("draft_length == nan", "holds numbers"),
        ("method < eagle", "holds texts"),
        ("position_acceptance == 0.6", "holds lists"),
        ("draft_length in 2", r"where '\('"),
        ("draft_length in (1", r"where '\)'"),
        ("draft_length == 2 draft_length == 2", "where and, or"),
        ("(draft_length == 2", r"where '\)'"),
        ("__import__('os')", "no column '__import__'"),
        ("draft_length == 2 and", "where a column"),
        ("", "where a column"),
        ("draft_length ! 2", "cannot be read from"),
        ("(" * 60 + "draft_length == 2" + ")" * 60, "nested"),
        ("draft_length == 2 or " * 400 + "draft_length == 2", "characters long"),
        ("draft_length == 9", "none of 3 rows"),
    ],
)
def test_a_filter_that_cannot_be_used_says_why(three, expression, message):
    with pytest.raises(InputError, match=message):
        three.where(expression)


@settings(max_examples=80, deadline=None)
@given(expression=st.text(alphabet="draft_length methodin=!<>()'\",;and or 0123.e+-{}", max_size=40))
def test_a_filter_either_answers_or_raises_an_input_error(expression):
    frame = validate(pd.DataFrame([OPEN]).astype(object), None)[0]
    try:
        answer = matches(frame, expression)
    except InputError:
        return
    assert answer.dtype == bool and answer.shape == (1,)


NUMERIC = [name for name in OPEN if name not in ("deployment", "arrival_process", "method", "position_acceptance")]


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(OPEN)),
    cell=st.one_of(
        st.floats().map(repr),
        st.text(max_size=8),
        st.integers().map(str),
        st.sampled_from(["", "NaN", "1e308", "5e-324", "0", "-0.0", "٣", "1;2"]),
    ),
    closed=st.booleans(),
)
def test_one_changed_cell_is_either_valid_or_named(name, cell, closed):
    row = (CLOSED if closed else OPEN) | {name: cell}
    frame, _, problems = validate(pd.DataFrame([row]).astype(object), "t.csv")
    assert list(frame.columns)[: len(NAMES)] == list(NAMES) and len(frame) == 1
    numbers = frame[list(NUMBER_NAMES)].to_numpy(float)
    assert np.isfinite(numbers[~np.isnan(numbers)]).all()
    for problem in problems:
        assert problem.file == "t.csv" and problem.row in (2, None) and problem.line()
    text = cell.strip()
    if name in NUMERIC and text and not problems:
        assert frame[name].iloc[0] == float(text), "an accepted number is kept as it is"


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(NUMERIC), factor=st.sampled_from([-1.0, float("nan"), float("inf"), -float("inf")]))
def test_a_negative_or_non_finite_number_is_never_accepted(name, factor):
    broken = OPEN | {name: repr((float(OPEN[name]) or 1.0) * factor)}
    problems = problems_of(broken)
    assert any(problem.column == name and problem.row in (2, None) for problem in problems)


@settings(max_examples=100, deadline=None)
@given(junk=st.binary(max_size=200), prefix=st.sampled_from([b"", b"PAR1", b"deployment,ttft_mean\n", b"{", b"[1,"]))
def test_junk_is_a_trace_error(tmp_path_factory, junk, prefix):
    path = tmp_path_factory.getbasetemp() / "junk"
    path.write_bytes(prefix + junk)
    with pytest.raises(TraceError):
        read_trace(path)


@settings(max_examples=40, deadline=None)
@given(at=st.integers(1, len(template()) - 3))
def test_a_table_cut_anywhere_never_reads_as_whole(tmp_path_factory, at):
    path = tmp_path_factory.getbasetemp() / "cut.csv"
    path.write_text(template()[:at])
    try:
        trace = read_trace(path)
    except TraceError:
        return
    assert len(trace) < 4 or at >= len(template()) - 5  # only the last cell, 2.26, may lose digits unnoticed


def test_validate_takes_frames_made_by_hand():
    frame = pd.DataFrame([{k: v for k, v in OPEN.items() if v}])
    canonical, warnings, problems = validate(frame.assign(prompt_length=[64], failed=[True]))
    assert [problem.column for problem in problems] == ["failed"] and warnings == []
    assert canonical["prompt_length"].tolist() == [64.0] and problems[0].file is None
    doubled = pd.DataFrame([[1, 2]], columns=["ttft_mean", "ttft_mean"])
    assert "duplicate" in validate(doubled)[2][0].message


@pytest.mark.parametrize(("file", "rows"), [("quiet_operating_points.csv", 27), ("operating_points.csv", 97)])
def test_the_measured_tables_read_without_a_word(shared, file, rows):
    trace = read_trace(shared / "traces" / "vllm_cpu" / file)
    assert len(trace) == rows and trace.warnings == []


@pytest.mark.parametrize("metric", ["ttft", "itl", "tpot", "e2e"])
def test_each_measured_latency_in_milliseconds_is_found_in_every_row(shared, metric):
    table = pd.read_csv(shared / "traces" / "vllm_cpu" / "operating_points.csv")
    for name in table.columns:
        if name.startswith(metric):
            table[name] *= 1000
    problems = validate(table, "ms")[2]
    assert {problem.row for problem in problems} == set(range(2, len(table) + 2))
    assert all(problem.column and problem.column.startswith(metric) for problem in problems)
    assert all("milliseconds" in (problem.advice or "") for problem in problems)
