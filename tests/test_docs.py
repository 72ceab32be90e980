"""The pages of docs/: their links lead somewhere, their equations name code, nothing is copied.

Their blocks and the notebooks run in test_documents.py.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml
from documents import REPOSITORY
from test_documents import pages_of

import diffspec

DOCS = REPOSITORY / "docs"
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
PAGES = sorted(DOCS.rglob("*.md"))


def load_hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()


def broken_links(page: Path) -> list[str]:
    """Links of a page to files that are not there; addresses and anchors within the page are passed over."""
    text = page.read_text(encoding="utf-8")
    targets = [found[1].split("#")[0] for found in hooks.LINK.findall(text)]
    return [target for target in targets if target and ":" not in target and not (page.parent / target).exists()]


def resolved(name: str):
    """The object behind a dotted name: its longest importable module, then attributes."""
    parts = name.split(".")
    value = importlib.import_module(".".join(parts[:-1]))
    return getattr(value, parts[-1])


def test_every_page_is_in_the_navigation_and_exists():
    nav = pages_of(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted([*(str(page.relative_to(DOCS)) for page in PAGES), *hooks.notebooks()])


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[a](page.md) [b](gone.md#x) [c](https://example.org/y) [d](#here)", encoding="utf-8")
    assert broken_links(page) == ["gone.md"]


def test_a_notebook_becomes_a_page():
    output = [
        {"output_type": "stream", "name": "stdout", "text": ["1.5\n"]},
        {"output_type": "execute_result", "data": {"text/html": ["<table></table>"]}},
        {"output_type": "execute_result", "data": {"image/svg+xml": ["<svg/>"]}},
    ]
    prose = {"cell_type": "markdown", "source": ["# A\n", "[b](b.ipynb), [c](../c.md)"]}
    code = {"cell_type": "code", "source": ["print(1.5)"], "outputs": output}
    page = hooks.notebook_page({"cells": [prose, code]})
    assert page.startswith(
        "# A\n[b](b.md), [c](../c.md)\n\n```python\nprint(1.5)\n```\n\n```text\n1.5\n```\n\n<div><table>"
    )
    assert page.endswith('src="data:image/svg+xml;base64,PHN2Zy8+">\n')
    for path in hooks.notebooks().values():
        assert hooks.notebook_page(json.loads(path.read_text(encoding="utf-8"))).count("```python") >= 5


def test_each_equation_names_code_that_exists():
    text = (DOCS / "theory.md").read_text(encoding="utf-8")
    for section in text.split("\n## ")[1:]:
        assert "```text" in section and "](reference.md#" in section, section.splitlines()[0]
    names = hooks.theory_objects()
    assert len(names) >= 20
    for name in names:
        assert (resolved(name).__doc__ or "").strip(), name
    for shown, target in re.findall(r"\[`([\w.]+)`\]\(reference\.md#([\w.]+)\)", text):
        assert f"diffspec.{shown}" == target
    with pytest.raises(AttributeError):
        resolved("diffspec.step_time.NoSuchStepTime")


def test_the_reference_has_every_public_name():
    entries = re.findall(r"^::: ([\w.]+)$", hooks.filled((DOCS / "reference.md").read_text()), re.MULTILINE)
    assert len(entries) == len(set(entries)) and set(hooks.theory_objects()) <= set(entries)
    assert {name.rsplit(".", 1)[1] for name in hooks.public_objects()} == set(diffspec.__all__)
    for name in hooks.public_objects():
        assert resolved(name) is getattr(diffspec, name.rsplit(".", 1)[1]), name


def test_the_validation_page_is_the_table_of_the_experiments():
    rows = [row for row in (REPOSITORY / "experiments" / "README.md").read_text().splitlines() if row.startswith("|")]
    page = hooks.inside_the_site(hooks.filled((DOCS / "validation.md").read_text(encoding="utf-8")), "validation.md")
    told = [row for row in page.splitlines() if row.startswith("|")]
    assert len(told) == len(rows) > 20
    assert [row.split("|")[1:3] for row in told] == [row.split("|")[1:3] for row in rows]
    assert "](../" not in page and "`experiments/04_physics_against_simulator/README.md`" in page


def test_links_out_of_the_site_show_their_path():
    text = "[b](../theory.md), [c](https://example.org), [table](../../data/x.md#part)"
    assert hooks.inside_the_site(text, "bring/page.md") == text.replace(
        "[table](../../data/x.md#part)", "table (`data/x.md`)"
    )


def test_examples_of_docstrings_become_code():
    assert hooks.as_markdown(["Say.", ">>> f()", "[1, 2]", "", "More [s] [tok]."]) == [
        *("Say.", "```python", ">>> f()", "[1, 2]", "```", "", "More [s] \\[tok]."),
    ]


def commands_of(workflow: str) -> list[str]:
    jobs = yaml.safe_load((REPOSITORY / ".github" / "workflows" / workflow).read_text(encoding="utf-8"))["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def test_the_workflow_is_what_a_merge_needs():
    assert commands_of("ci.yml") == [".ci/run"]
    checked = "pytest -m slow tests/test_documents.py"
    assert commands_of("docs.yml") == ["pip install -e '.[docs,test]'", "mkdocs build --strict", checked]


def test_the_citation_names_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{citation["version"]}"' in project and citation["license"] in project
    assert citation["title"].startswith("diffspec") and citation["authors"]
