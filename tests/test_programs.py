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
from jax.experimental.compilation_cache import compilation_cache
from test_cli_main import TRACE, toy_model

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
    with pytest.raises(FileNotFoundError):
        sources(tmp_path / "zipped")
    fresh_process()(2, PAIR)
    monkeypatch.setattr(programs, "sources", lambda _: before)
    fresh_process()(2, PAIR)
    assert len(TRACED) == 2


def test_sources_that_changed_since_the_start_keep_nothing(folder, tmp_path, monkeypatch):
    """The process may have read them before: neither what it traces nor what is kept belongs to them."""
    (tmp_path / "new.py").write_text("")
    os.utime(tmp_path / "new.py", (2e9, 2e9))
    assert programs.changed(tmp_path) and not programs.changed(folder.parent / "nothing")
    monkeypatch.setattr(programs, "_HERE", tmp_path)
    assert float(fresh_process()(2, PAIR)["sum"]) == 14.5
    assert not folder.exists()


def test_what_may_be_another_tomorrow_is_not_kept(folder):
    """A class of a module that the key does not hold."""

    class Foreign(NamedTuple):
        first: object
        second: object

    Foreign.__module__, Foreign.__qualname__ = "mine", "Foreign"
    module = types.ModuleType("mine")
    module.__dict__["Foreign"] = Foreign
    sys.modules["mine"] = module
    try:
        assert float(fresh_process()(2, Foreign(*PAIR))["sum"]) == -13.5
    finally:
        del sys.modules["mine"]
    assert not folder.exists()


def _root(power, pair):
    TRACED.append("root")
    return {"sum": jnp.linalg.cholesky(pair.first[:, None] * pair.first + power * jnp.eye(3)).sum() + pair.second}


def test_what_calls_lapack_is_not_kept(folder):
    """A process that loads the executable has not prepared LAPACK for it: it would end in a segmentation fault."""
    expected = np.linalg.cholesky(np.outer(PAIR.first, PAIR.first) + 2.0 * np.eye(3)).sum() + 0.5
    for _ in range(2):
        assert float(fresh_process(_root)(2, PAIR)["sum"]) == pytest.approx(expected, rel=1e-12)
    assert TRACED == ["root", "root"] and not folder.exists()


def test_side_by_side_it_is_the_function(folder):
    fresh = fresh_process()
    fresh(2, PAIR)
    pairs = Pair(np.stack([PAIR.first, 2.0 * PAIR.first]), np.asarray([0.5, 0.0]))
    assert jax.vmap(lambda pair: fresh(2, pair)["sum"])(pairs).tolist() == [14.5, 56.0]


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


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    """And JAX's cache is used as ever."""
    monkeypatch.setattr(compilation_cache, "reset_cache", lambda: TRACED.append("cache off"))
    (tmp_path / "file").write_text("")
    keep_programs(tmp_path / "file" / "programs")
    for _ in range(2):
        assert float(fresh_process()(2, PAIR)["sum"]) == 14.5
    assert TRACED == ["Pair", "Pair"]


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


LOAD = ["--arrival-rate", "3", "--prompt-length", "64", "--output-length", "64"]
CHOICE = [*LOAD, "--acceptance-rate", "0.8", "--max-draft-length", "3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["sensitivity", *LOAD, "--draft-length", "2"],
        ["optimize", *CHOICE],
        ["optimize", *CHOICE, "--batch-caps", "4,8", "--slo", "ttft_p95<1"],
        ["policy", *CHOICE],
        ["size", "--target-rate", "20", *CHOICE[2:]],
        ["simulate", *LOAD, "--draft-length", "2", "--requests", "50"],
    ],
    ids=lambda arguments: " ".join(arguments[::7]),
)
def test_a_second_process_answers_the_same(arguments, tmp_path):
    toy_model(tmp_path / "model.json")
    answers_the_same([arguments[0], "model.json", *arguments[1:]], tmp_path)


@pytest.mark.slow
def test_a_second_process_fits_and_designs_the_same(tmp_path):
    """Both call LAPACK."""
    answers_the_same(["fit", str(TRACE), "--out", "model.json", "--step-time", "affine"], tmp_path)
    answers_the_same(["design", "model.json", "--budget", "3", *CHOICE], tmp_path)


def answers_the_same(arguments: list[str], folder) -> None:
    environment = os.environ | {"DIFFSPEC_CACHE_DIR": str(folder / "cache")}
    command = [
        sys.executable,
        "-c",
        "import sys; from diffspec.cli import main; sys.exit(main())",
        *arguments,
        "--json",
    ]
    runs = [subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True) for _ in range(2)]
    assert [done.returncode for done in runs] == [0, 0], [done.stderr for done in runs]
    assert runs[0].stdout == runs[1].stdout != ""
