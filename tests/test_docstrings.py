"""Every example in a docstring of diffspec runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import diffspec

MODULES = sorted(module.name for module in pkgutil.walk_packages(diffspec.__path__, "diffspec."))
MODULES = [name for name in MODULES if not name.endswith("__main__")]


def examples(name: str) -> list[doctest.DocTest]:
    """The tests that doctest finds in a module, by their finder's rules."""
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module, report=True)
    assert results.failed == 0


def test_the_core_has_examples():
    for name in ("acceptance", "experts", "serving", "steady_state", "step_time", "workload"):
        assert examples(f"diffspec.{name}"), f"diffspec/{name}.py shows no example"
    assert sum(len(test.examples) for name in MODULES for test in examples(name)) >= 20


def test_a_wrong_example_is_found():
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(wrong, out=lambda text: None).failed == 1
