"""README.md, the pages of docs/ and its notebooks run, and what they say is held against what they answer.

All in one process, so that programs are compiled once for all of them. README.md runs in one folder with a copy of
data/, its commands in order and then its Python as one program; so do the pages, the walkthrough with the checks of its
table, and the notebooks, whose committed outputs must be those of today.
"""

import csv
import json
import re
import shutil
from xml.etree import ElementTree

import pytest
import yaml
from documents import REPOSITORY, blocks, commands, run_document, run_notebook, told, unlike

from diffspec.cli import demo

DOCS = REPOSITORY / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
FIRST_SCREEN = ("pip install . && diffspec demo", "pip install -e '.[test]' && pytest")
ELSEWHERE = {"walkthrough.md", "extending.md"}  # below, and test_drafters.py
FILES = {  # what a reader has made, by the name that the pages give it
    "serve.json": "vllm_bench/spec_detailed.json",
    "sweep": "vllm_sweep/tiny",
    "sglang.jsonl": "sglang/bench_vllm_details.jsonl",
    "guidellm.json": "guidellm/guidellm_0.8.1.json",
    "before.txt": "vllm/metrics_before.txt",
    "after.txt": "vllm/metrics_after.txt",
    "completion.json": "vllm/completion.json",
}
WALKTHROUGH = (DOCS / "walkthrough.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d+)( \(held out\))? \| (\d+) \| (\d+) \| (\d+) \| (\d) \| (\d) \|$", re.MULTILINE)


def copied(folder, *names):
    """The folder with copies of files of data/, as the current one of a document that names data/..."""
    (folder / "data").mkdir()
    for name in names:
        shutil.copy(REPOSITORY / "data" / name, folder / "data" / name)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSPEC_CACHE_DIR", "")
    monkeypatch.setattr(demo, "STEP_TIME", "affine")  # the cheaper half; .ci/run does the whole demonstration
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- README.md ------------------------------------------------------------------------------------


def test_the_readme_runs(folder):
    shutil.copytree(REPOSITORY / "data", folder / "data")
    shells, programs = run_document((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    assert shells > 20 and programs == 2


@pytest.mark.parametrize("command", FIRST_SCREEN)
def test_the_first_screen_has_both_commands(command):
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert command in [line.strip() for line in lines[:45]]


GOOD = """
```bash
pip install . && diffspec fit --template > trace.csv
diffspec check trace.csv \\
    --json  # a comment
diffspec check other.csv && diffspec check trace.csv
```
"""


def test_commands_are_found():
    ((language, source),) = blocks(GOOD)
    assert language == "bash"
    assert commands(source) == [
        (["fit", "--template"], "trace.csv", 0),
        (["check", "trace.csv", "--json"], None, 0),
        (["check", "other.csv"], None, 0),
        (["check", "trace.csv"], None, 0),
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD, "other.csv: no such file"),
        ("```bash\ndiffspec nonsense\n```\n", "exit code 2"),
        ("```bash\ndiffspec check trace.csv | head\n```\n", "only && and >"),
        ("```python\nimport diffspec\ndiffspec.no_such_name\n```\n", "AttributeError"),
        ("```python\nx = 1\n```\n```python\nassert x == 2\n```\n", "AssertionError"),
    ],
)
def test_a_wrong_document_fails(folder, text, told):
    with pytest.raises(AssertionError, match=re.escape(told)):
        run_document(text)


def test_a_right_document_passes(folder):
    text = GOOD.replace("diffspec check other.csv && ", "") + "```python\nfrom diffspec import read_trace\n"
    text += "assert len(read_trace('trace.csv')) == 4\n```\n"
    assert run_document(text) == (3, 1)


# --- the pages ------------------------------------------------------------------------------------


def pages_of(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(entry)]


def test_the_pages_run(folder):
    copied(folder, "vllm_cpu_quiet.csv", "vllm_h200_requests.parquet")
    for name, source in FILES.items():
        source = REPOSITORY / "tests" / "fixtures" / source
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    names = pages_of(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    pages = [DOCS / name for name in names if name not in ELSEWHERE and (DOCS / name).exists()]
    counted, programs = run_document("\n".join(page.read_text(encoding="utf-8") for page in pages))
    assert counted >= 12 and programs == 2


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The folder in which the walkthrough was run."""
    folder = copied(tmp_path_factory.mktemp("walkthrough"), "vllm_h200.csv", "vllm_h200_requests.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSPEC_CACHE_DIR", "")
        patch.chdir(folder)
        counted, _ = run_document(WALKTHROUGH)
    assert counted == 4
    return folder


def measured() -> dict[float, dict[int, float]]:
    with (REPOSITORY / "data" / "vllm_h200.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found: dict[float, dict[int, float]] = {}
    for row in rows:
        found.setdefault(float(row["arrival_rate"]), {})[int(float(row["draft_length"]))] = float(row["e2e_mean"])
    return found


def test_the_table_is_what_was_measured_and_answered(walked):
    (context,) = json.loads((walked / "policy.json").read_text(encoding="utf-8"))["contexts"]
    recommended = {entry["load"]: entry["draft_length"] for entry in context["loads"]}
    rows, table = ROW.findall(WALKTHROUGH), measured()
    assert [float(rate) for rate, *_ in rows] == sorted(table) == sorted(recommended)
    for rate, _, plain, one, three, best, chosen in rows:
        here = table[float(rate)]
        assert [round(1e3 * here[k]) for k in (0, 1, 3)] == [int(plain), int(one), int(three)]
        assert int(best) == min(here, key=lambda k: here[k])
        assert int(chosen) == recommended[float(rate)]


def test_the_held_out_rows_are_met_as_the_page_says(walked):
    (deployment,) = json.loads((walked / "h200.json").read_text(encoding="utf-8"))["deployments"]
    held = deployment["quality"]["holdout"]
    assert held["rows"] == 3 and held["expression"] == "arrival_rate==22"
    assert round(100 * held["metrics"]["e2e_mean"]["mape"]) == 6
    assert round(100 * held["metrics"]["ttft_mean"]["mape"]) == 11


def test_the_replayed_run_is_as_long_as_the_measured_one(walked):
    played = json.loads((walked / "played.json").read_text(encoding="utf-8"))
    assert played["arrivals"]["run"] == "eagle_k3_a80__p512_o128_r22"
    mean = played["metrics"]["e2e"]["mean"]["value"]
    assert mean == pytest.approx(0.45, rel=0.02) and mean == pytest.approx(measured()[22.0][3], rel=0.1)


# --- notebooks ------------------------------------------------------------------------------------


def in_order(html: str) -> str:
    """The same text with the items of its lists in alphabetical order: what a trace cannot tell is told by how little
    it tells, and two things that it tells equally little of change places by rounding."""
    items = sorted(re.findall("<li>.*?</li>", html))
    return re.sub("<li>.*?</li>", lambda found: items.pop(0), html)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_shows_now(path, folder, monkeypatch):
    """Each cell, without Jupyter: the same words, and numbers within one unit of their last digit, or 1 %, because the
    tests compile without optimisations and a fit ends where its gradient is small."""
    monkeypatch.chdir(path.parent)
    kinds = set()
    for cell, now in run_notebook(path):
        committed = told(cell)
        assert set(committed) == set(now), cell["source"]
        kinds |= set(committed)
        for kind, text in committed.items():
            if kind == "image/svg+xml":
                assert len(text) < 60_000
                text, now[kind] = (" ".join(ElementTree.fromstring(svg).itertext()) for svg in (text, now[kind]))
            assert unlike(in_order(text), in_order(now[kind]), 0.01) == [], kind
    assert {"stdout", "image/svg+xml"} <= kinds


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 2


def test_changed_outputs_are_found():
    assert unlike("e2e 1.25 s (k = 4)", "e2e 1.26 s (k = 4)") == []
    assert unlike("e2e 1.25 s (k = 4)", "e2e 1.27 s (k = 4)") == ["1.25 is now 1.27: ...e2e 1.25 s (k = 4)..."]
    assert unlike("500 ms", "504 ms", 0.01) == [] and unlike("500 ms", "506 ms", 0.01) != []
    assert unlike("4.5e-05", "4.6e-05") == [] and unlike("4.5e-05", "4.7e-05") != []
    assert unlike("pays at 3", "loses at 3") == ["'pays at ' is now 'loses at '"]
    assert unlike("at 3", "at 3 and 4") == ["'' is now ' and '"]
