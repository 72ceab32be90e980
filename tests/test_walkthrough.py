"""docs/walkthrough.md is run, and its table is held against the measurements and the answers."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from test_readme import run_document

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "walkthrough.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d+)( \(held out\))? \| (\d+) \| (\d+) \| (\d+) \| (\d) \| (\d) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder in which the page was run."""
    folder = tmp_path_factory.mktemp("walkthrough")
    (folder / "data").mkdir()
    for name in ("vllm_h200.csv", "vllm_h200_requests.parquet"):
        shutil.copy(REPOSITORY / "data" / name, folder / "data" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSPEC_CACHE_DIR", "")
        patch.chdir(folder)
        commands, _ = run_document(PAGE)
    assert commands == 4
    return folder


def measured() -> dict[float, dict[int, float]]:
    with (REPOSITORY / "data" / "vllm_h200.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found: dict[float, dict[int, float]] = {}
    for row in rows:
        found.setdefault(float(row["arrival_rate"]), {})[int(float(row["draft_length"]))] = float(row["e2e_mean"])
    return found


def test_the_table_is_what_was_measured_and_answered(folder):
    (context,) = json.loads((folder / "policy.json").read_text(encoding="utf-8"))["contexts"]
    recommended = {entry["load"]: entry["draft_length"] for entry in context["loads"]}
    rows, table = ROW.findall(PAGE), measured()
    assert [float(rate) for rate, *_ in rows] == sorted(table) == sorted(recommended)
    for rate, _, plain, one, three, best, told in rows:
        here = table[float(rate)]
        assert [round(1e3 * here[k]) for k in (0, 1, 3)] == [int(plain), int(one), int(three)]
        assert int(best) == min(here, key=lambda k: here[k])
        assert int(told) == recommended[float(rate)]


def test_the_held_out_rows_are_met_as_the_page_says(folder):
    (deployment,) = json.loads((folder / "h200.json").read_text(encoding="utf-8"))["deployments"]
    held = deployment["quality"]["holdout"]
    assert held["rows"] == 3 and held["expression"] == "arrival_rate==22"
    assert round(100 * held["metrics"]["e2e_mean"]["mape"]) == 6
    assert round(100 * held["metrics"]["ttft_mean"]["mape"]) == 11


def test_the_replayed_run_is_as_long_as_the_measured_one(folder):
    played = json.loads((folder / "played.json").read_text(encoding="utf-8"))
    assert played["arrivals"]["run"] == "eagle_k3_a80__p512_o128_r22"
    mean = played["metrics"]["e2e"]["mean"]["value"]
    assert mean == pytest.approx(0.45, rel=0.02) and mean == pytest.approx(measured()[22.0][3], rel=0.1)
