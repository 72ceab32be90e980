"""Fleets of fits: the same models as fits one by one, a record that goes on, and a process that dies."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_cli_main import run, toy_deployment

from diffspec.cli.fleet import fit_folder
from diffspec.cli.prepare import prepare_jax
from diffspec.fitting.deployment import FittedModel
from diffspec.fitting.fit import fit
from diffspec.fitting.fleet import FittedTrace, fit_fleet
from diffspec.optimizing.fleet import optimize_fleet
from diffspec.optimizing.optimize import optimize
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
    record.write_bytes(record.read_bytes() + b'123\n{"outcome": "fitted"}\n\xff')
    third = json.loads(run("fit", "--fleet", str(table), "--out", str(out), *OPTIONS, "--json")[1])
    assert [entry["resumed"] for entry in third["traces"]] == [True, True, False]
    assert FittedModel.from_json(Path(entries["north"]["model"]).read_text()).deployment().quality["rows"] == 8


def test_a_trace_keeps_its_file(table, tmp_path, monkeypatch):
    """A trace that joins later, whose name is the same but for signs, takes no other's file; a trace that is spoilt
    loses its model."""
    model, source, out = FittedModel({"toy": toy_deployment()}, "0" * 64, {}), tmp_path / "traces", tmp_path / "models"
    source.mkdir()

    def fits(traces, **asked):
        for name, read in traces.items():
            spoilt = read.args[0][0].read_text() == "spoilt"
            yield FittedTrace(name, None if spoilt else model, "spoilt" if spoilt else None, 1.0)

    monkeypatch.setattr("diffspec.fitting.fleet.fit_fleet", fits)
    (source / "x-y.csv").write_text("one")
    fit_folder(source, out, 1, {}, {})
    (source / "x y.csv").write_text("two")
    told = {entry["name"]: entry for entry in fit_folder(source, out, 1, {}, {})["traces"]}
    assert told["x-y.csv"]["resumed"] and told["x-y.csv"]["model"] != told["x y.csv"]["model"]
    assert Path(told["x-y.csv"]["model"]).name == "x-y.json"
    (source / "x-y.csv").write_text("spoilt")
    told = fit_folder(source, out, 1, {}, {})
    assert told["failed"] == 1 and not (out / "x-y.json").exists() and (out / "x-y-2.json").exists()


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
        (["--fleet", str(empty), "--out", str(empty / "models")], "allowed: a folder elsewhere"),
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


def test_a_fleet_is_optimised_as_each_alone(tmp_path):
    """A cap or another, no row without drafts, an acceptance of its own or none."""
    plain, capped = toy_deployment("plain"), toy_deployment("capped", draft_lengths=[1, 2, 4])
    capped = replace(capped, defaults=capped.defaults | {"max_batch_size": 8.0})
    silent = replace(toy_deployment("silent"), acceptance=None)
    fleet = {one.name: one for one in (plain, capped, silent)}
    asked = {"loads": [0.5, 2.0, 400.0], "prompt_length": 64.0, "output_length": 64.0, "max_draft_length": 3}
    answer = optimize_fleet(fleet, **asked, slo=["ttft_mean<5"])
    told = {one["deployment"]: one for one in answer["deployments"]}
    assert list(told) == list(fleet) and answer["programs"] == 2 and "acceptance" in told["silent"]["error"]
    for name in ("plain", "capped"):
        alone = optimize(fleet[name], **asked, slo=["ttft_mean<5"])
        for entry, one in zip(told[name]["table"], alone["table"], strict=True):
            assert entry["feasible"] == one["feasible"] and entry["draft_length"] == one["draft_length"]
            if one["feasible"]:
                assert entry["metrics"]["e2e_mean"] == pytest.approx(one["metrics"]["e2e_mean"], rel=1e-10)
                both = entry["speedup"], one["speedup"]
                assert both == (None, None) or both[0] == pytest.approx(both[1], rel=1e-10)
    assert not told["capped"]["table"][2]["feasible"]
    with pytest.raises(InputError, match="got no deployment"):
        optimize_fleet({}, **asked)
    for name in ("plain", "capped"):
        (tmp_path / f"{name}.json").write_text(FittedModel({name: fleet[name]}, "0" * 64, {}).to_json())
    (tmp_path / "notes.json").write_text("{}")
    command = ["optimize", tmp_path, "--arrival-rate", "0.5,2,400", "--max-draft-length", "3", "--slo", "ttft_mean<5"]
    command += ["--prompt-length", "64", "--output-length", "64"]
    code, shown, err = run(*command, "--out", tmp_path.parent / "told.json")
    assert code == 0 and "draft length by load: successful" in shown and "notes.json" in err
    kept = json.loads((tmp_path.parent / "told.json").read_text())
    assert [one["table"] for one in kept["deployments"]] == [told[name]["table"] for name in ("capped", "plain")]
    assert run(*command, "--risk", "0.9").code == 2 and run(*command[:4]).code == 2
    assert "--hardware" in run(*command, "--hardware", "h200").err
    assert "overwritten" in run(*command, "--out", tmp_path / "plain.json").err


@pytest.mark.slow
def test_two_processes_of_two_devices_give_the_numbers_of_one(tmp_path):
    """One program over all devices of both processes, by jax.distributed, against one device of one process."""
    toy = toy_deployment()
    fleet = {f"{cap}": replace(toy, defaults=toy.defaults | {"max_batch_size": 2.0 + cap}) for cap in range(5)}
    for name, one in fleet.items():
        (tmp_path / f"{name}.json").write_text(FittedModel({"toy": one}, "0" * 64, {}).to_json())
    asked = {"loads": [0.5, 2.0], "prompt_length": 64.0, "output_length": 64.0, "max_draft_length": 3}
    alone = optimize_fleet(fleet, **asked)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(DATA.parent)}
    command = [sys.executable, "-c", DISTRIBUTED, address]
    started = [
        subprocess.Popen(
            [*command, str(number), str(tmp_path), json.dumps(asked)], env=environment, stdout=subprocess.PIPE
        )
        for number in range(2)
    ]
    answers = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in started]
    assert answers[0]["deployments"] == answers[1]["deployments"] and answers[0]["devices"] == 4
    for one, other in zip(alone["deployments"], answers[0]["deployments"], strict=True):
        for entry, told in zip(one["table"], other["table"], strict=True):
            assert told["draft_length"] == entry["draft_length"]
            assert told["metrics"] == pytest.approx(entry["metrics"], rel=1e-10)


DISTRIBUTED = """
import json, pathlib, sys
import jax
address, number, folder, asked = sys.argv[1:]
jax.config.update("jax_enable_x64", True)
jax.distributed.initialize(address, num_processes=2, process_id=int(number))
import diffspec
texts = {path.stem: path.read_text() for path in sorted(pathlib.Path(folder).glob("*"))}
deployments = {name: diffspec.FittedModel.from_json(text).deployment() for name, text in texts.items()}
print(json.dumps(diffspec.optimize_fleet(deployments, **json.loads(asked))))
"""


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
