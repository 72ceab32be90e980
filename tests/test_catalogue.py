"""Files of classes and drafters: what YAML takes for a truth or a list is no number and no name."""

import pytest

from diffspec.optimizing.catalogue import parse_classes, parse_drafters
from diffspec.results import InputError

LENGTHS = "prompt_length: 10, output_length: 5"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- {name: a, candidates: [[0.6]], max_nodes: true}", "max_nodes: got True; allowed: a number"),
        ("- {name: a, candidates: [[true, 0.2]]}", "rows of probabilities"),
        ("- {name: a, acceptance_rate: true}", "acceptance_rate: got True; allowed: 0 to 1"),
        ("- {name: a, acceptance_rate: {chat: no}}", "chat: acceptance_rate: got False"),
        ("- {name: a, position_acceptance: [0.5, true]}", r"position_acceptance: got \[0.5, True\]"),
        ("- {name: a, drafter_params: yes}", "drafter_params: got True"),
        ("- {name: [a], drafter_params: 1}", r"entry 1: name: got \['a'\]; allowed: a text"),
        ("- {name: {a: b}}", "name: got {'a': 'b'}"),
        ("- {name: a}\n- {name: on}", "entry 2: name: got True"),
        ("- name:", "name: got None"),
    ],
)
def test_drafters_of_another_kind_are_refused(text, sentence):
    with pytest.raises(InputError, match=sentence):
        parse_drafters(text)


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ("share: true", "share: got True"),
        ("weight: on", "weight: got True"),
        ("output_scv: no", "output_scv: got False"),
    ],
)
def test_truths_are_no_numbers_of_a_class(field, sentence):
    with pytest.raises(InputError, match=sentence):
        parse_classes(f"- {{name: a, {LENGTHS}, {field}}}")
    with pytest.raises(InputError, match="name: got"):
        parse_classes(f"- {{name: [a], {LENGTHS}}}")


def test_numbers_as_texts_and_as_names_are_read():
    """1e9 without a point is a text to YAML; a drafter may be called by its size, or by its place."""
    first, second = parse_drafters("- {name: 8, drafter_params: 1e9, acceptance_rate: 0.5}\n- {drafter_params: 2e9}")
    assert (first.name, first.drafter_params) == ("8", 1e9)
    assert (second.name, second.drafter_params) == ("2", 2e9)
