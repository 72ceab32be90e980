"""The entry point: exit codes, help, version, broken pipes; and the helpers that the other CLI tests share."""

import io
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple, get_type_hints

import jax.numpy as jnp
import pytest
from typer.models import OptionInfo

from diffspec.acceptance import MeasuredAcceptance
from diffspec.cli import main, prepare
from diffspec.cli.app import app
from diffspec.cli.options import parse_loads
from diffspec.fitting.deployment import FittedDeployment, FittedModel
from diffspec.fitting.forms import Scales, build_form
from diffspec.results import InputError, NoResultError

REPOSITORY = Path(__file__).resolve().parents[1]
TRACE = REPOSITORY / "data" / "vllm_cpu_quiet.csv"
COMMANDS = (
    "boundary",
    "check",
    "demo",
    "design",
    "evaluate",
    "fit",
    "monitor",
    "optimize",
    "policy",
    "predict",
    "report",
    "sensitivity",
    "size",
)


class Ran(NamedTuple):
    """What a command line left behind."""

    code: int
    out: str
    err: str


def run(*arguments) -> Ran:
    """One command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Ran(code, out.getvalue(), err.getvalue())


def toy_deployment(name: str = "toy", speculative: bool = True, **measured) -> FittedDeployment:
    """A deployment with plausible parameters that nothing was fitted to."""
    spans = {
        "draft_lengths": [0, 2, 4] if speculative else [0],
        "arrival_rate": [0.5, 8.0],
        "concurrency": [1.0, 16.0],
        "prompt_length": [64.0, 64.0],
        "output_length": [64.0, 64.0],
        "tokens_per_step": [2.0, 3.0],
    }
    curves = jnp.tile(jnp.asarray([[0.7], [0.8]]), (1, 32))
    return FittedDeployment(
        name=name,
        form="affine",
        serving=build_form("affine", Scales(0.02, 0.08, 96.0, 64.0)).template,
        acceptance=MeasuredAcceptance((2, 4), curves) if speculative else None,
        defaults={"max_batch_size": 64.0, "method": "draft_model", "drafter": "tiny", "drafter_params": 1e6},
        measured=spans | measured,
        quality={
            "rows": 9,
            "set_aside": {},
            "metrics": {},
            "forms": {"affine": {"loss": 0.0, "gradient": 0.0, "held_out_error": None, "held_out_by_fold": {}}},
        },
    )


def toy_model(path: Path, *deployments: FittedDeployment) -> Path:
    """A model file of toy deployments."""
    chosen = deployments or (toy_deployment(),)
    model = FittedModel({deployment.name: deployment for deployment in chosen}, "0" * 64, {"diffspec": "test"})
    path.write_text(model.to_json(), encoding="utf-8")
    return path


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- help, version, usage ----------------------------------------------------------------------


def test_help_lists_every_command():
    ran = run("--help")
    assert ran.code == 0
    assert all(command in ran.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_an_example(command):
    ran = run(command, "--help")
    assert ran.code == 0
    assert f"Example: diffspec {command}" in " ".join(ran.out.split())
    assert "--json" in ran.out


def test_the_workload_options_are_the_same_everywhere():
    names = ("arrival-rate", "concurrency", "prompt-length", "output-length", "acceptance-rate", "tokens-per-step")
    names += ("position-acceptance", "max-batch-size", "deployment", "drafter-params")
    for command in ("predict", "optimize", "policy", "sensitivity"):
        told = run(command, "--help").out
        assert [name for name in names if f"--{name}" not in told] == []


def test_version():
    ran = run("--version")
    assert ran.code == 0 and ran.out.startswith("diffspec ")


@pytest.mark.parametrize("arguments", [("nonsense",), ("predict",), ("predict", "m.json", "--draft-length", "two")])
def test_wrong_usage_is_2(arguments):
    ran = run(*arguments)
    assert ran.code == 2 and ran.out == "" and "Usage" in ran.err


def test_help_loads_nothing_heavy():
    program = (
        "import sys\nfrom diffspec.cli import main\ncode = main(['predict', '--help'])\n"
        "heavy = {'jax', 'equinox', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.benchmark
def test_help_is_quick():
    program = "import sys; from diffspec.cli import main; sys.exit(main(['--help']))"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.5, times  # measured: 0.25 s


# --- errors ----------------------------------------------------------------------


@pytest.mark.parametrize(("error", "code"), [(InputError("bad"), 2), (NoResultError("none"), 1)])
def test_expected_errors_are_one_line(monkeypatch, error, code):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("diffspec.traces.read_trace", fails)
    ran = run("check", "anything.csv")
    assert ran == (code, "", f"error: {error}\n")


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    def fails(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("diffspec.traces.read_trace", fails)
    with pytest.raises(ZeroDivisionError):
        run("check", "anything.csv")


def test_a_reader_that_goes_away_is_no_traceback():
    program = "import sys; from diffspec.cli import main; sys.exit(main(['fit', '--template']))"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()  # nobody reads
        assert process.stderr.read() == b""


# --- settings before jax ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"DIFFSPEC_CACHE_DIR": ""}, None),
        ({"DIFFSPEC_CACHE_DIR": "here"}, Path("here")),
        ({"XDG_CACHE_HOME": "cache"}, Path("cache/diffspec/jax")),
    ],
)
def test_where_compiled_programs_are_kept(monkeypatch, environment, folder):
    monkeypatch.delenv("DIFFSPEC_CACHE_DIR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if "XDG_CACHE_HOME" in environment and (sys.platform == "darwin" or sys.platform == "win32"):
        pytest.skip("XDG folders are for Linux")
    assert prepare.cache_folder() == folder


def test_a_cache_that_cannot_be_made_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("DIFFSPEC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    prepare.prepare_jax()


# --- loads ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "loads"),
    [
        ("2", [2.0]),
        ("1,2,4", [1.0, 2.0, 4.0]),
        ("0.1:0.3:0.1", [0.1, 0.2, 0.3]),
        ("1:4:2", [1.0, 3.0]),
        ("3:3:1", [3.0]),
    ],
)
def test_loads(text, loads):
    assert parse_loads(text, "--arrival-rate") == loads


@pytest.mark.parametrize("text", ["", "a", "1,", "1:2", "2:1:1", "1:2:0", "1:2:-1", "nan", "inf", "0:1e9:1", "1:2:3:4"])
def test_bad_loads(text):
    with pytest.raises(InputError, match=r"--arrival-rate: got .*allowed"):
        parse_loads(text, "--arrival-rate")


def test_every_option_is_declared_by_name():
    """Typer 0.27 derives no name for an option that states only a metavar, and then refuses `--url` and the like."""
    nameless = [
        f"{command.name} {name}"
        for command in app.registered_commands
        if command.callback
        for name, hint in get_type_hints(command.callback, include_extras=True).items()
        for extra in getattr(hint, "__metadata__", ())
        if isinstance(extra, OptionInfo) and not str(extra.default).startswith("--")  # where Annotated keeps it
    ]
    assert not nameless
