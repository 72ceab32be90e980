"""Bad input end to end: exit code 2, the place and the mend in the message, nothing on stdout, nothing written."""

import json
from pathlib import Path

import pytest
from test_cli_main import TRACE, files_in, run, toy_deployment, toy_model

HEADER = "arrival_rate,concurrency,prompt_length,output_length,draft_length,tokens_per_step,acceptance_rate,"
HEADER += "draft_acceptance_rate,n_requests,ttft_mean,itl_mean,tpot_mean,e2e_mean"
GOOD = {
    "arrival_rate": "2",
    "prompt_length": "64",
    "output_length": "64",
    "draft_length": "2",
    "tokens_per_step": "1.9",
    "n_requests": "200",
    "ttft_mean": "0.09",
    "itl_mean": "0.02",
    "tpot_mean": "0.0105",
    "e2e_mean": "0.75",
}
LOAD = ("--arrival-rate", "3", "--prompt-length", "64", "--output-length", "64")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("DIFFSPEC_CACHE_DIR", "")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return toy_model(tmp_path_factory.mktemp("toy") / "model.json")


def table(path: Path, *rows: dict[str, str]) -> Path:
    names = HEADER.split(",")
    lines = [HEADER, *(",".join(row.get(name, "") for name in names) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def refused(folder: Path, *arguments) -> str:
    """The message of a command line that must be refused and leave the folder as it was."""
    before = files_in(folder)
    ran = run(*arguments)
    assert ran.code == 2, (ran.code, ran.out, ran.err)
    assert ran.out == "" and files_in(folder) == before
    assert "Traceback" not in ran.err
    return ran.err


def fit_refused(folder: Path, *traces, options=()) -> str:
    return refused(folder, "fit", *traces, "--out", folder / "model.json", *options)


# column, got, what the message says is allowed or advises
BAD_CELLS = [
    ({"prompt_length": "-64"}, "prompt_length", "-64", "above 0"),
    ({"prompt_length": "0"}, "prompt_length", "0", "above 0"),
    ({"output_length": "0"}, "output_length", "0", "1 to"),
    ({"acceptance_rate": "1.2"}, "acceptance_rate", "1.2", "0 to 1"),
    ({"acceptance_rate": "60"}, "acceptance_rate", "60", "perhaps a percentage: divide by 100"),
    ({"draft_acceptance_rate": "45%", "tokens_per_step": ""}, "draft_acceptance_rate", "45%", "divide the percentage"),
    ({"tokens_per_step": "3.4"}, "tokens_per_step", "3.4", "3"),
    ({"tokens_per_step": "0.9"}, "tokens_per_step", "0.9", "the bonus token counts"),
    ({"concurrency": "4"}, "concurrency", "", "arrival_rate"),
    ({"arrival_rate": ""}, "arrival_rate", "", "concurrency"),
    ({"itl_mean": "NaN"}, "itl_mean", "NaN", "leave the cell empty"),
    ({"draft_length": "two"}, "draft_length", "two", "whole number"),
    ({"itl_mean": "21.0", "e2e_mean": "", "tpot_mean": ""}, "itl_mean", "21", "perhaps milliseconds: divide by 1000"),
]


@pytest.mark.parametrize(("change", "column", "got", "hint"), BAD_CELLS)
def test_a_bad_cell_is_named_with_its_place(tmp_path, change, column, got, hint):
    trace = table(tmp_path / "runs.csv", GOOD, GOOD | change, GOOD | {"arrival_rate": "3"})
    message = fit_refused(tmp_path, trace)
    for part in ("runs.csv", "row 3", column, got, hint):
        assert part in message, (part, message)


def test_a_table_in_milliseconds_is_told_so(tmp_path):
    times = {"ttft_mean": "90", "itl_mean": "20", "tpot_mean": "10.5", "e2e_mean": "750"}
    rows = [GOOD | times | {"arrival_rate": rate} for rate in ("1", "2", "3", "4")]
    message = fit_refused(tmp_path, table(tmp_path / "runs.csv", *rows))
    assert "milliseconds" in message and "runs.csv" in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file is empty"),
        (HEADER.encode() + b"\n", "no rows"),
        (b'{"num_prompts": 8, "completed": 8, "mean_ttft_ms"', "JSON"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00", "binary"),
        (b"<html><body>404</body></html>", "web page"),
        (b"name,colour\nx,red\n", "no column of the operating-point table"),
        (b"Dear all,\n\nthe runs are done.\n", "no column of the operating-point table"),
    ],
)
def test_a_file_that_is_no_trace(tmp_path, content, told):
    (tmp_path / "runs.csv").write_bytes(content)
    message = fit_refused(tmp_path, tmp_path / "runs.csv")
    assert "runs.csv" in message and told in message
    assert "runs.csv" in refused(tmp_path, "check", tmp_path / "runs.csv")


def test_a_missing_file(tmp_path):
    message = fit_refused(tmp_path, tmp_path / "nowhere.csv")
    assert "nowhere.csv" in message and "no such file" in message


def test_too_few_rows(tmp_path):
    message = fit_refused(tmp_path, table(tmp_path / "runs.csv", GOOD, GOOD | {"arrival_rate": "3"}))
    assert "got 2 usable rows" in message and "at least" in message


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--step-time", "linear"), "step_time: got 'linear'"),
        (("--observables", "ttft,speed"), "speed"),
        (("--holdout", "draft_length==9"), "none of 27 rows matches"),
        (("--holdout", "colour==1"), "no column 'colour'"),
        (("--holdout", "draft_length"), "is needed"),
    ],
)
def test_bad_options_of_fit(tmp_path, options, told):
    assert told in fit_refused(tmp_path, TRACE, options=options)


def test_fit_needs_a_trace_and_a_place(tmp_path):
    assert "TRACE is missing" in refused(tmp_path, "fit", "--out", tmp_path / "m.json")
    assert "--out is missing" in refused(tmp_path, "fit", TRACE)


def test_fit_refuses_places_it_cannot_write(tmp_path):
    (tmp_path / "runs.csv").write_bytes(TRACE.read_bytes())
    before = (tmp_path / "runs.csv").read_bytes()
    message = refused(tmp_path, "fit", tmp_path / "runs.csv", "--out", tmp_path / "runs.csv")
    assert "would be overwritten" in message and (tmp_path / "runs.csv").read_bytes() == before
    assert "does not exist" in refused(tmp_path, "fit", TRACE, "--out", tmp_path / "no" / "model.json")
    assert "got a folder" in refused(tmp_path, "fit", TRACE, "--out", tmp_path)


# --- models ----------------------------------------------------------------------


def other_version(text: str) -> str:
    return json.dumps(json.loads(text) | {"schema_version": 99})


def without_parameter(text: str) -> str:
    data = json.loads(text)
    data["deployments"][0]["parameters"].popitem()
    return json.dumps(data)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (other_version, "schema_version: got 99; allowed: 1"),
        (lambda text: text[: len(text) // 2], "not a diffspec model"),
        (lambda text: "{}", "not a diffspec model"),
        (lambda text: "[1, 2]", "not a diffspec model"),
        (lambda text: "", "not a diffspec model"),
        (lambda text: "arrival_rate,ttft\n1,2\n", "not a diffspec model"),
        (without_parameter, "parameters"),
        (lambda text: json.dumps(json.loads(text) | {"deployments": []}), "no deployment"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_file_that_is_no_model(model, tmp_path, spoil, told, command):
    bad = tmp_path / "bad.json"
    bad.write_text(spoil(model.read_text(encoding="utf-8")), encoding="utf-8")
    rest = (*LOAD, "--draft-length", "2") if command == "predict" else (TRACE,)
    message = refused(tmp_path, command, bad, *rest, "--out", tmp_path / "answer.json")
    assert "bad.json" in message and told in message


def test_a_missing_or_unreadable_model(tmp_path):
    assert "no such file" in refused(tmp_path, "predict", tmp_path / "m.json", *LOAD, "--draft-length", "2")
    assert "cannot be read" in refused(tmp_path, "predict", tmp_path, *LOAD, "--draft-length", "2")
    (tmp_path / "m.json").write_bytes(b"\xff\xfe\x00")
    assert "not a diffspec model" in refused(tmp_path, "predict", tmp_path / "m.json", *LOAD, "--draft-length", "2")


def test_evaluate_needs_rows_and_a_known_deployment(model, tmp_path):
    ran = refused(tmp_path, "evaluate", model, TRACE, "--where", "draft_length==9")
    assert "none of 27 rows matches" in ran
    several = toy_model(tmp_path / "m.json", toy_deployment("one"), toy_deployment("two"))
    assert "vllm-cpu/llama-29m" in refused(tmp_path, "evaluate", several, TRACE)


# --- questions ----------------------------------------------------------------------

LENGTHS = ("--prompt-length", "64", "--output-length", "64")
BAD_QUESTIONS = [
    (LENGTHS, "load: got neither"),
    ((*LOAD, "--concurrency", "4"), "load: got both"),
    (("--arrival-rate", "-1", *LENGTHS), "arrival_rate: got -1.0"),
    (("--arrival-rate", "0", *LENGTHS), "arrival_rate: got 0.0"),
    (("--arrival-rate", "fast", *LENGTHS), "--arrival-rate: got 'fast'"),
    (("--arrival-rate", "nan", *LENGTHS), "--arrival-rate: got 'nan'"),
    (("--concurrency", "0.5", *LENGTHS), "concurrency: got 0.5"),
    (("--arrival-rate", "3", "--prompt-length", "-5", "--output-length", "64"), "prompt_length: got -5.0"),
    (("--arrival-rate", "3", "--prompt-length", "nan", "--output-length", "64"), "prompt_length: got nan"),
    (("--arrival-rate", "3", "--prompt-length", "64", "--output-length", "0"), "output_length: got 0.0"),
    ((*LOAD, "--acceptance-rate", "1.5"), "acceptance_rate: got 1.5; allowed: [0, 1]"),
    ((*LOAD, "--acceptance-rate", "75"), "divide a percentage by 100"),
    ((*LOAD, "--acceptance-rate", "nan"), "acceptance_rate: got nan"),
    ((*LOAD, "--position-acceptance", "0.8;80"), "position_acceptance: got 80.0"),
    ((*LOAD, "--position-acceptance", "0.8;"), "--position-acceptance: got ''"),
    ((*LOAD, "--acceptance-rate", "0.5", "--tokens-per-step", "2"), "at most one"),
    ((*LOAD, "--max-batch-size", "0"), "max_batch_size: got 0.0"),
    ((*LOAD, "--drafter-params", "-1"), "got -1"),
    ((*LOAD, "--deployment", "moon"), "deployment: got 'moon'; allowed: 'toy'"),
]


@pytest.mark.parametrize(("options", "told"), BAD_QUESTIONS)
@pytest.mark.parametrize("command", ["predict", "optimize", "sensitivity"])
def test_a_bad_question(model, tmp_path, command, options, told):
    if command != "optimize":
        options = (*options, "--draft-length", "2")
    message = refused(tmp_path, command, model, *options, "--json", "--out", tmp_path / "answer.json")
    if command != "optimize":  # it names the loads in its own words
        assert told in message
    else:
        assert "got" in message


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--draft-length", "2", "--tokens-per-step", "3.5"), "tokens_per_step: got 3.5; allowed: [1, 3]"),
        (("--draft-length", "2", "--tokens-per-step", "0.9"), "tokens_per_step: got 0.9"),
        (("--draft-length", "0", "--tokens-per-step", "1"), "--draft-length 0"),
        (("--draft-length", "-1"), "draft_length: got -1.0"),
        (("--draft-length", "33"), "draft_length: got 33.0; allowed: [0, 32]"),
        (("--draft-length", "nan"), "draft_length: got nan"),
    ],
)
def test_a_bad_draft(model, tmp_path, options, told):
    assert told in refused(tmp_path, "predict", model, *LOAD, *options)


def test_ranges_are_for_optimize(model, tmp_path):
    message = refused(tmp_path, "predict", model, "--arrival-rate", "1:3:1", *LENGTHS, "--draft-length", "2")
    assert "got 3 loads" in message


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--slo", "speed<0.5"), "unknown metric 'speed'; allowed: ttft_mean"),
        (("--slo", "ttft_p96<0.5"), "unknown metric 'ttft_p96'"),
        (("--slo", "ttft_mean"), "METRIC<NUMBER"),
        (("--slo", "ttft_mean<-1"), "above 0"),
        (("--objective", "joy"), "objective: got 'joy'"),
        (("--max-draft-length", "0"), "max_draft_length: got 0"),
        (("--max-draft-length", "33"), "max_draft_length: got 33"),
        (("--tokens-per-step", "2"), "give --acceptance-rate or --position-acceptance"),
    ],
)
def test_bad_options_of_optimize(model, tmp_path, options, told):
    assert told in refused(tmp_path, "optimize", model, *LOAD, *options)


def test_an_unknown_metric_of_sensitivity(model, tmp_path):
    message = refused(tmp_path, "sensitivity", model, *LOAD, "--draft-length", "2", "--metric", "joy")
    assert "metric: got 'joy'; allowed: ttft_mean" in message


def test_speculation_without_any_acceptance(tmp_path):
    model = toy_model(tmp_path / "m.json", toy_deployment(speculative=False))
    message = refused(tmp_path, "predict", model, *LOAD, "--draft-length", "2")
    assert "no acceptance of its own" in message and "--acceptance-rate" in message


def test_an_answer_that_cannot_be_written_is_not_given(model, tmp_path):
    question = ("predict", model, *LOAD, "--draft-length", "2", "--json")
    assert "does not exist" in refused(tmp_path, *question, "--out", tmp_path / "no" / "answer.json")
    assert "would be overwritten" in refused(tmp_path, *question, "--out", model)


def test_the_demo_needs_a_folder(tmp_path):
    (tmp_path / "taken").write_text("a file")
    assert "cannot be made" in refused(tmp_path, "demo", "--out", tmp_path / "taken")
