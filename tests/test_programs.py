"""Programs kept between processes (:mod:`diffspec.programs`)."""

import os
import subprocess
import sys
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli_main import toy_model

from diffspec import programs
from diffspec.cli.prepare import prepare_jax
from diffspec.programs import keep_programs, program, sources
from diffspec.results import RESULTS

TRACED: list[str] = []


class Pair(NamedTuple):
    first: object
    second: object


class Other(NamedTuple):
    first: object
    second: object


def _compute(power, pair):
    TRACED.append(type(pair).__name__)
    sign = 1.0 if isinstance(pair, Pair) else -1.0
    return {"sum": sign * jnp.sum(pair.first**power) + pair.second, "result": RESULTS.saturated, "none": None}


def fresh_process(function=_compute):
    """The program as a process that never traced it has it."""
    copy = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    return program(0)(copy)


@pytest.fixture(autouse=True)
def folder(tmp_path):
    TRACED.clear()
    keep_programs(tmp_path / "programs")
    yield tmp_path / "programs"
    keep_programs(None)


PAIR = Pair(np.array([1.0, 2.0, 3.0]), np.asarray(0.5))


def test_the_next_process_does_not_trace(folder):
    first = fresh_process()
    for _ in range(2):
        assert float(first(2, PAIR)["sum"]) == 14.5
    (entry,) = folder.iterdir()
    os.utime(entry, (0, 0))
    second = fresh_process()
    found = [second(2, PAIR), second(2, Pair(PAIR.first + 1.0, PAIR.second))]
    assert TRACED == ["Pair"]
    assert [float(one["sum"]) for one in found] == [14.5, 29.5]
    assert found[0]["none"] is None and bool(found[0]["result"] == RESULTS.saturated)
    assert entry.stat().st_mtime > 0  # what is used is not what makes room


@pytest.mark.parametrize(
    ("power", "pair", "expected"),
    [
        (3, PAIR, 36.5),
        (2, Other(*PAIR), -13.5),
        (2, Pair(PAIR.first[:2], PAIR.second), 5.5),
        (2, Pair(PAIR.first.astype(np.float32), np.float32(0.5)), 14.5),
        (2, Pair(PAIR.first, 0.5), 14.5),
    ],
    ids=["static argument", "class", "shape", "type", "weak type"],
)
def test_another_question_is_another_program(power, pair, expected):
    fresh_process()(2, PAIR)
    assert float(fresh_process()(power, pair)["sum"]) == expected
    assert len(TRACED) == 2


def test_a_damaged_entry_is_made_again(folder):
    fresh_process()(2, PAIR)
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    for damaged in (b"", whole[:1000], whole[:-1] + bytes([whole[-1] ^ 1])):
        entry.write_bytes(damaged)
        TRACED.clear()
        assert float(fresh_process()(2, PAIR)["sum"]) == 14.5
        assert len(TRACED) == 1
    TRACED.clear()
    assert float(fresh_process()(2, PAIR)["sum"]) == 14.5
    assert not TRACED


def test_changed_sources_are_other_programs(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "inner" / "one.py").write_text("A = 1\n")
    before = sources(package)
    sources.cache_clear()
    assert sources(package) == before
    for change in (
        lambda: (package / "inner" / "one.py").write_text("A = 2\n"),
        lambda: (package / "inner" / "one.py").rename(package / "inner" / "two.py"),
        lambda: (package / "three.py").write_text(""),
    ):
        change()
        sources.cache_clear()
        assert sources(package) != before
        before = sources(package)
    fresh_process()(2, PAIR)
    monkeypatch.setattr(programs, "sources", lambda _: before)
    fresh_process()(2, PAIR)
    assert len(TRACED) == 2


def test_other_settings_are_other_programs(monkeypatch):
    fresh_process()(2, PAIR)
    monkeypatch.setenv("XLA_FLAGS", "other")
    fresh_process()(2, PAIR)
    assert len(TRACED) == 2
    precision = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        fresh_process()(2, PAIR)
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
    assert len(TRACED) == 3


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    keep_programs(tmp_path / "file" / "programs")
    for _ in range(2):
        assert float(fresh_process()(2, PAIR)["sum"]) == 14.5
    assert len(TRACED) == 2


def test_a_static_argument_without_a_value_is_compiled_as_ever(folder):
    call = program(0)(_apply)
    assert float(call(lambda x: 2.0 * x, np.asarray(3.0))) == 6.0
    assert not folder.exists()


def _apply(function, x):
    return function(x)


def test_the_oldest_entries_make_room(folder, monkeypatch):
    monkeypatch.setattr(programs, "MOST_ENTRIES", 2)
    for power in (1, 2):
        fresh_process()(power, PAIR)
        for entry in folder.iterdir():
            os.utime(entry, (entry.stat().st_mtime - 10, entry.stat().st_mtime - 10))
    fresh_process()(3, PAIR)
    assert len(list(folder.iterdir())) == 2
    TRACED.clear()
    fresh_process()(2, PAIR)
    assert not TRACED
    fresh_process()(1, PAIR)
    assert len(TRACED) == 1


def test_a_closure_is_refused():
    power = 2.0

    def raised(x):
        return x**power

    with pytest.raises(ValueError, match="closure"):
        program()(raised)


@pytest.mark.parametrize(
    ("environment", "cached", "kept"),
    [
        ({}, True, True),
        ({"DIFFSPEC_KEEP_PROGRAMS": "0"}, True, False),
        ({"DIFFSPEC_CACHE_DIR": ""}, True, False),
        ({}, False, False),
    ],
)
def test_what_switches_it_off(environment, cached, kept, tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: jax.config.values[name] for name in names}
    for name, value in ({"DIFFSPEC_CACHE_DIR": str(tmp_path / "cache")} | environment).items():
        monkeypatch.setenv(name, value)
    jax.config.update("jax_enable_compilation_cache", cached)
    try:
        prepare_jax()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    fresh_process()(2, PAIR)
    assert (tmp_path / "cache" / "programs").exists() == kept


COUNTED = """
import sys
import jax.monitoring
traced = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **told: event.endswith("jaxpr_trace_duration") and traced.append(told.get("fun_name"))
)
from diffspec.cli import main
code = main(sys.argv[1:])
print(*sorted({"_compare", "_distribution"}.intersection(traced)), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
def test_a_second_predict_traces_no_large_program(tmp_path):
    model = toy_model(tmp_path / "model.json")
    load = ["--arrival-rate", "3", "--prompt-length", "64", "--output-length", "64", "--draft-length", "2", "--json"]
    environment = os.environ | {"DIFFSPEC_CACHE_DIR": str(tmp_path / "cache")}

    def run(**settings: str) -> tuple[str, str]:
        command = [sys.executable, "-c", COUNTED, "predict", str(model), *load]
        done = subprocess.run(command, env=environment | settings, capture_output=True, text=True, check=True)
        return done.stdout, done.stderr.splitlines()[-1]

    first = run()
    assert first[1] == "_compare _distribution"
    assert run() == (first[0], "")
    assert run(DIFFSPEC_KEEP_PROGRAMS="0") == first
