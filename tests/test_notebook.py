"""What notebooks show of answers, and figures as files."""

import html.parser
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli_main import REPOSITORY, toy_deployment

from diffspec.fitting.deployment import FittedModel
from diffspec.optimizing.policy_answer import PolicyAnswer
from diffspec.prediction import STAGES, LoadSplit, Prediction
from diffspec.report import drawing, figures, notebook
from diffspec.results import RESULTS, InputError


def cells(text):
    """Texts of the cells of the tables of an HTML text, which must be well nested."""
    found, opened = [], []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

        def handle_data(self, data):
            if opened and opened[-1] in ("td", "th"):
                found.append(data)

    Reader().feed(text)
    assert opened == []
    return found


def prediction(result):
    fields = dict.fromkeys(Prediction.__dataclass_fields__, jnp.asarray(0.25))
    parts = {stage: LoadSplit(jnp.asarray(0.1), jnp.asarray(0.05)) for stage in STAGES}
    return Prediction(**fields | {"result": result, "decomposition": parts})


def test_a_prediction_is_two_tables():
    shown = cells(notebook.prediction_html(prediction(RESULTS.successful)))
    assert shown[:4] == ["metric", "value", "ttft", "250 ms"] and shown[-3:] == ["overhead", "100 ms", "50 ms"]


def test_a_saturated_prediction_has_no_latency():
    shown = cells(notebook.prediction_html(prediction(RESULTS.saturated)))
    assert shown[shown.index("e2e_latency") + 1] == "-" and shown[shown.index("capacity") + 1] == "0.25 req/s"


def test_many_predictions_are_told_by_their_shape():
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), prediction(RESULTS.successful))
    assert notebook.prediction_html(many) == "<p>predictions of shape (3,)</p>"


def test_a_model_shows_parameters_and_what_is_not_told():
    toy = toy_deployment("a <b>")
    toy.quality["untold"] = [{"words": "nothing of <kv_read>"}]
    toy.quality["metrics"] = {"e2e_mean": {"rows": 9, "mape": 0.05, "bias": -0.01}}
    text = notebook.model_html(FittedModel({"a": toy}, "0" * 64, {}))
    shown = cells(text)
    assert "verify_base" in shown and "5.0 %" in shown and "a &lt;b&gt;" in text and "&lt;kv_read&gt;" in text


def test_a_policy_shows_its_tiers_and_advice():
    tier = {"first_batch": 1, "last_batch": 8, "draft_length": 4, "speedup": 1.5}
    context = {"prompt_length": 64.0, "tiers": [tier], "advice": ["leave speculation off above batch 8"]}
    text = notebook.policy_html(PolicyAnswer({"deployment": "toy", "contexts": [context]}))
    assert cells(text) == ["batch", "draft length", "speedup", "1 to 8", "4", "1.5"]
    assert "<li>leave speculation off above batch 8</li>" in text


def test_import_in_a_notebook_registers_the_types_by_name_and_loads_nothing():
    """A stand-in for IPython that keeps what it is told, as its formatters do."""
    program = """
import sys, types
kept = {}
formatter = types.SimpleNamespace(for_type_by_name=lambda module, name, show: kept.update({(module, name): show}))
shell = types.SimpleNamespace(display_formatter=types.SimpleNamespace(formatters={"text/html": formatter}))
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: shell)
import diffspec
assert "jax" not in sys.modules
import importlib
for module, name in kept:
    assert hasattr(importlib.import_module(module), name), (module, name)
answer = diffspec.optimizing.policy_answer.PolicyAnswer(deployment="toy", contexts=[])
assert kept["diffspec.optimizing.policy_answer", "PolicyAnswer"](answer) == ""
print(len(kept))
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.stdout.strip() == "4", ran.stderr


def test_an_answer_is_drawn_as_its_command_draws_it(tmp_path):
    row = {"name": "verify_base", "kind": "parameter", "elasticity": 0.7}
    tornado = drawing.draw({"metric": "e2e_mean", "elasticities": [row]})
    shown = " ".join(ElementTree.fromstring(tornado._repr_svg_()).itertext())
    assert "what moves e2e_mean" in shown and "verify_base" in shown
    entry = {"load": 2.0, "draft_length": 3, "relaxed_draft_length": 2.6, "speedup": 1.2}
    policy = drawing.draw({"static_draft_length": 3, "loop": "arrival_rate", "table": [entry]})
    assert "draft length by load" in " ".join(ElementTree.fromstring(policy._repr_svg_()).itertext())
    tornado.save(tmp_path / "a.svg")
    tornado.save(tmp_path / "a.png")
    assert (tmp_path / "a.svg").read_text(encoding="utf-8") == tornado._repr_svg_()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_what_has_no_figure_is_refused(tmp_path):
    with pytest.raises(InputError, match="got keys rows; allowed: answers of sensitivity"):
        drawing.draw({"rows": 3})
    with pytest.raises(InputError, match="no row of deployment 'toy'; allowed: the trace that it was fitted to"):
        drawing.draw(toy_deployment())
    with pytest.raises(InputError, match="does not exist"):
        drawing.draw({"metric": "e2e_mean", "elasticities": []}).save(tmp_path / "gone" / "a.svg")


def test_a_figure_is_what_its_file_is_called():
    figure, axes = figures.new_figure(1, 1, "title")
    axes[0, 0].plot(np.arange(3))
    assert figures.picture(figure, Path("a.png")).startswith(b"\x89PNG")
    first = figures.picture(figure, Path("a.SVG"))
    assert ElementTree.fromstring(first).tag.endswith("svg") and b">title<" in first
    assert first == figures.picture(figure, Path("b.svg"))
