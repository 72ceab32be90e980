"""Fleets of fits: the same models as fits one by one, a record that goes on, and a process that dies."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_cli_main import run

from diffspec.cli.prepare import prepare_jax
from diffspec.fitting.deployment import FittedModel
from diffspec.fitting.fit import fit
from diffspec.fitting.fleet import fit_fleet
from diffspec.results import InputError, NoResultError
from diffspec.traces import read_trace

DATA = Path(__file__).parents[1] / "data"
QUICK = {"step_time": "affine", "uncertainty": "laplace"}
OPTIONS = ["--step-time", "affine", "--uncertainty", "laplace"]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Two deployments of eight measured rows each, and one of two rows, in one table."""
    rows = pd.read_csv(DATA / "vllm_cpu_quiet.csv")
    parts = [rows.iloc[start : start + size].assign(deployment=name) for name, start, size in PARTS]
    path = tmp_path_factory.mktemp("fleet") / "table.csv"
    pd.concat(parts).to_csv(path, index=False)
    return path


PARTS = (("north", 0, 8), ("south/1", 8, 8), ("few", 16, 2))


def test_a_fleet_has_the_models_of_single_fits_and_goes_on(table, tmp_path):
    """A table's deployments, each as if it were alone; what failed is told and tried again, what was fitted is not."""
    out = tmp_path / "models"
    code, told, err = run("fit", "--fleet", str(table), "--out", str(out), *OPTIONS, "--json")
    answer = json.loads(told)
    assert code == 0 and (answer["fitted"], answer["failed"], answer["resumed"]) == (2, 1, 0)
    entries = {entry["name"]: entry for entry in answer["traces"]}
    assert "at least 4" in entries["few"]["error"] and "few: " in err
    parts = read_trace(table).by_deployment()
    for name in ("north", "south/1"):
        alone = fit(parts[name], **QUICK)
        kept = FittedModel.from_json(Path(entries[name]["model"]).read_text())
        assert kept.to_json() == FittedModel.from_json(alone.to_json()).to_json()
        assert entries[name]["rows"] == 8 and entries[name]["seconds"] > 0
    assert Path(entries["south/1"]["model"]).name == "south-1.json"
    code, told, _ = run("fit", "--fleet", str(table), "--out", str(out), *OPTIONS)
    assert code == 0 and "2 fitted (2 of them before), 1 failed" in told
    Path(entries["north"]["model"]).unlink()
    record = out / "fleet.jsonl"
    record.write_text(record.read_text() + '{"name": "cut sho')  # a crash while it was written
    again = json.loads(run("fit", "--fleet", str(table), "--out", str(out), *OPTIONS, "--json")[1])
    assert [entry["resumed"] for entry in again["traces"]] == [False, True, False]
    assert FittedModel.from_json(Path(entries["north"]["model"]).read_text()).deployment().quality["rows"] == 8


def test_what_means_nothing_is_refused(table, tmp_path):
    empty, out = tmp_path / "empty", str(tmp_path / "out")
    empty.mkdir()
    for command, sentence in (
        (["--fleet", str(empty), "--out", out], "an empty folder"),
        (["--fleet", str(table)], "--out FOLDER"),
        (["--fleet", str(table), "--out", out, "--profile", "all"], "--out FOLDER"),
        ([str(table), "--out", out, "--processes", "2"], "--processes goes with --fleet"),
        (["--fleet", str(table), "--out", out, "--processes", "0"], "processes: got 0"),
        (["--fleet", str(table), "--out", str(table)], "cannot be made a folder"),
    ):
        code, told, err = run("fit", *command)
        assert code == 2 and not told and sentence in err, command
    with pytest.raises(InputError, match="got no trace"):
        next(fit_fleet({}))


def dies():
    """What a process does that runs out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def broken():
    raise ValueError("a fault")


@pytest.mark.slow
def test_a_process_that_dies_loses_nothing_that_was_finished(table):
    """Two processes give the numbers of one; a fault stops nothing; a process that is killed ends in an error."""
    parts = read_trace(table).by_deployment()
    reads = {name: partial(read_trace(table).by_deployment().get, name) for name in parts}
    asked = {"processes": 2, "prepare": prepare_jax, **QUICK}
    found = {one.name: one for one in fit_fleet(reads | {"broken": broken}, **asked)}
    assert found["broken"].error == "ValueError: a fault" and found["few"].model is None
    for name in ("north", "south/1"):
        alone = next(fit_fleet({name: reads[name]}, **QUICK)).model.deployment()
        values = [entry["value"] for entry in alone.to_dict()["parameters"].values()]
        others = [entry["value"] for entry in found[name].model.deployment().to_dict()["parameters"].values()]
        assert values == pytest.approx(others, rel=1e-10)
    kept = []
    with pytest.raises(NoResultError, match="a process died"):
        for one in fit_fleet({"north": reads["north"], "killed": dies, "south/1": reads["south/1"]}, **asked):
            kept.append(one.name)
    assert np.isin(kept, ["north", "south/1"]).all()
