"""`diffspec demo` around its fits, which are faked here: tests/test_documents.py and .ci/run do the whole of it."""

import dataclasses
import json

import pytest
from test_cli_main import files_in, run, toy_deployment

from diffspec.cli import demo
from diffspec.fitting.deployment import FittedModel
from diffspec.results import InputError
from diffspec.traces import read_trace

PLOTS = {"fit.png", "latency.png", "decomposition.png", "speedup.png", "policy.png"}
SCORES = {"e2e_mean": {"rows": 6, "mape": 0.04, "max_ape": 0.1, "r2": 0.9, "bias": 0.01}}


@pytest.fixture
def fits(monkeypatch):
    """The options of each fit that the demonstration asks for."""
    asked = []

    def fit(trace, **options):
        asked.append({name: value for name, value in options.items() if name != "progress"})
        options["progress"]("fitting", 0.5)
        made = toy_deployment(trace.frame["deployment"].iloc[0])
        quality = made.quality | {"metrics": SCORES}
        if "holdout" in options:
            quality["holdout"] = {"expression": options["holdout"], "rows": 6, "metrics": SCORES}
        made = dataclasses.replace(made, quality=quality)
        return FittedModel({made.name: made}, trace.digest(), {"diffspec": "test"})

    monkeypatch.setattr("diffspec.fitting.fit.fit", fit)
    monkeypatch.setenv("DIFFSPEC_CACHE_DIR", "")
    return asked


@pytest.mark.slow
def test_demo_in_an_empty_folder(fits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = run("demo")
    assert ran.code == 0, ran.err
    assert files_in(tmp_path) == {"diffspec-demo"}
    folder = tmp_path / "diffspec-demo"
    assert files_in(folder) == PLOTS | {"model.json"}
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in PLOTS)
    FittedModel.from_json((folder / "model.json").read_text(encoding="utf-8"))
    assert "vLLM" in ran.err and "not GPU numbers" in ran.err
    told = ("held out", "e2e_mean", "draft length by load", f"acceptance {demo.ACCEPTANCE:g}", "ms")
    assert [word for word in told if word not in ran.out] == []
    assert fits == [{"step_time": "auto", "holdout": demo.HOLDOUT}, {"step_time": "affine"}]


def test_demo_as_json(fits, tmp_path):
    ran = run("demo", "--out", tmp_path / "a" / "b", "--json")
    assert ran.code == 0, ran.err
    answer = json.loads(ran.out)
    assert {"holdout", "held_out_fit", "final_fit", "policy", "files"} <= set(answer)
    assert answer["holdout"]["metrics"] == SCORES
    assert answer["policy"]["outcome"] == "successful"
    assert files_in(tmp_path / "a" / "b") == PLOTS | {"model.json"}


def test_the_held_out_part_is_there():
    trace = read_trace(demo.packaged_trace())
    assert len(trace) == 27
    assert len(trace.where(demo.HOLDOUT)) == 6


def test_missing_measurements_are_an_input_error(monkeypatch):
    monkeypatch.setattr(demo, "TRACE", "lost.csv")
    with pytest.raises(InputError, match=r"lost\.csv are missing; install diffspec again"):
        demo.packaged_trace()
