"""The figure of a joint decision: what is drawn is what is answered."""

import json
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from test_cli_main import run, toy_model

from diffspec.report import drawing
from diffspec.report.joint_figures import joint


def entry(load: float, lengths: dict[str, int], **changed: Any) -> dict[str, Any]:
    """One load of an answer; code may take 0.2 s to its first token, of all at least 3 req/s are served."""
    metrics = {"code": {"ttft_mean": 0.05 * load}, "all": {"throughput": load}, "chat": {}}
    common = {"drafter": "small", "draft_length": 2, "objective": 0.6 * load, "feasible": True}
    told = {"load": load, "feasible": True, "drafter": "small", "draft_lengths": lengths, "tree": None}
    told |= {"max_batch_size": 8.0, "replicas": 1, "placement": None, "objective": 0.5 * load, "speedup": 2.0 / load}
    return told | {"metrics": metrics, "common": common} | changed


def answer(*table: dict[str, Any], **changed: Any) -> dict[str, Any]:
    told = {"loop": "arrival_rate", "objective": "e2e_mean", "limits": ["code: ttft_mean<0.2", "throughput>3"]}
    told |= {"classes": [{"name": "chat"}, {"name": "code"}], "drafters": ["small", "large"], "replicas": [1]}
    return told | {"placements": [], "table": list(table)} | changed


def lines(ax) -> dict[str, list[float]]:
    """The heights of the labelled lines of a panel."""
    drawn = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
    return {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float).tolist() for line in drawn}


def spans(ax) -> list[tuple[str, float, float]]:
    """(colour, from, to) of the shades of a panel."""
    return [(to_hex(p.get_facecolor()), *np.round(p.get_extents().get_points()[:, 0], 9)) for p in ax.patches]


TABLE = (
    entry(1.0, {"chat": 4, "code": 5}),
    entry(2.0, {"chat": 3, "code": 5}),
    entry(4.0, {"chat": 2, "code": 2}, drafter="large"),
    entry(6.0, {"chat": 1, "code": 1}, feasible=False, objective=None, speedup=None),
)


def test_what_is_drawn_is_what_is_answered():
    figure = joint(answer(*TABLE))
    left, middle, right = figure.axes
    nan = float("nan")
    assert lines(left) == {
        "chat": pytest.approx([4, 3, 2, nan], nan_ok=True),
        "code": pytest.approx([5, 5, 2, nan], nan_ok=True),
        "one for all": pytest.approx([2, 2, 2, nan], nan_ok=True),
    }
    assert lines(middle) == {
        "chosen": pytest.approx([0.5, 1, 2, nan], nan_ok=True),
        "one draft length for all": pytest.approx([0.6, 1.2, 2.4, nan], nan_ok=True),
    }
    assert lines(right) == {
        "code: ttft_mean<0.2": pytest.approx([0.25, 0.5, 1, nan], nan_ok=True),
        "throughput>3": pytest.approx([3, 1.5, 0.75, nan], nan_ok=True),
    }
    assert right.get_lines()[-1].get_ydata() == [1.0, 1.0]
    assert [ax.get_xlabel() for ax in figure.axes] == ["arrival rate [req/s]"] * 3
    assert middle.get_ylabel() == "e2e_mean [s]" and left.get_ylabel() == "draft length [tok]"
    shown = [text.get_text() for text in left.get_legend().get_texts()]
    assert set(shown) == {"chat", "code", "one for all", "small", "large", "none will do"}


def test_shades_are_the_drafters():
    """Ranges end half way between loads; the drafter that nobody drafts with is no speculation."""
    off = entry(8.0, {"chat": 0, "code": 0})
    left = joint(answer(*TABLE, off)).axes[0]
    edges = [tuple(patch.get_x() + part * patch.get_width() for part in (0, 1)) for patch in left.patches]
    assert edges == [pytest.approx(edge) for edge in ((0.5, 3.0), (3.0, 5.0), (5.0, 7.0), (7.0, 9.0))]
    assert [patch.get_label() for patch in left.patches] == ["small", "large", "none will do", "no speculation"]
    assert len({to_hex(patch.get_facecolor()) for patch in left.patches}) == 4
    assert left.get_xlim() == (0.5, 9.0)


def test_what_else_was_chosen_is_named_and_one_load_is_drawn():
    told = answer(
        entry(2.0, {"chat": 1, "code": 1}, replicas=2, placement="even"),
        entry(4.0, {"chat": 1, "code": 1}, replicas=4, max_batch_size=None, placement="even"),
        replicas=[2, 4],
        placements=["even"],
    )
    labels = [patch.get_label() for patch in joint(told).axes[0].patches]
    assert labels == ["small, cap 8, 2 replicas, experts even", "small, no cap, 4 replicas, experts even"]
    alone = joint(answer(TABLE[0], limits=[])).axes
    assert lines(alone[2]) == {"chosen": [2.0]} and "speedup" in alone[2].get_ylabel()
    one = joint(answer(TABLE[0], classes=[{"name": "chat"}])).axes[0]
    assert set(lines(one)) == {"chat"}, "one class has no other choice of one draft length for all"


def test_trees_are_drawn_by_their_nodes():
    tree = {"nodes": 12, "depth": 4, "width": 3}
    left = joint(answer(TABLE[0], entry(2.0, {"chat": 4, "code": 4}, tree=tree))).axes[0]
    nan = float("nan")
    assert lines(left)["tree, nodes"] == pytest.approx([nan, 12], nan_ok=True)
    assert lines(left)["chat"] == pytest.approx([4, nan], nan_ok=True)
    assert left.get_ylabel() == "drafted tokens per step"
    alike = entry(2.0, {"chat": 4, "code": 4}, tree=tree)
    alike["common"] |= {"tree": {"nodes": 7, "depth": 2, "width": 2}}
    assert lines(joint(answer(TABLE[0], alike)).axes[0])["one for all"] == [2, 7]


@pytest.mark.parametrize(
    ("objective", "label"),
    [("goodput", "goodput [req/s]"), ("ttft_p95", "ttft_p95 [s]"), ("cost", "cost"), ("cost+2*e2e_mean",) * 2],
)
def test_axes_have_units_and_limits_that_are_not_told_no_line(objective, label):
    """A limit on single requests has no mean to show; a class may be called by a limit's sign."""
    row = entry(2.0, {"chat": 1, "a: b": 1}, metrics={"a: b": {"ttft_p95": 0.1, "tpot_mean": 0.0}})
    limits = ["a: b: ttft_p95<=0.2", "a: b: tpot_mean<1", "ttft<0.5", "a: b: e2e<1"]
    _, middle, right = joint(answer(row, limits=limits, classes=[{"name": "a: b"}], objective=objective)).axes
    assert lines(right) == {"a: b: ttft_p95<=0.2": [0.5]}
    assert middle.get_ylabel() == label


def test_nothing_feasible_is_a_figure_too():
    lost = answer(*(entry(load, {"chat": 1, "code": 1}, feasible=False, metrics={}) for load in (1.0, 2.0)))
    assert [lines(ax) for ax in joint(lost).axes] == [{}, {}, {}]
    empty = answer(limits=[])
    assert len(joint(empty).axes) == 3


def test_the_command_draws(tmp_path, monkeypatch):
    """The figure of the answer that is printed; the decision itself is that of tests/test_joint.py."""
    told = answer(*TABLE[:3]) | {"outcome": "successful", "warnings": []}
    monkeypatch.setattr("diffspec.optimizing.joint.optimize_jointly", lambda deployment, **asked: dict(told))
    asked = ("optimize", toy_model(tmp_path / "model.json"), "--arrival-rate", "1,2,4", "--batch-caps", "8,16")
    for name in ("a.svg", "b.png"):
        ran = run(*asked, "--json", "--plot", tmp_path / name)
        assert ran.code == 0, ran.err
        assert json.loads(ran.out) == told
    assert (tmp_path / "a.svg").read_text(encoding="utf-8") == drawing.draw(told)._repr_svg_()
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
