"""Strictness for every test: 64-bit floats, strict dtype promotion, shapes and types checked at run time.

Each pytest-xdist worker runs this file before it imports a test module, so the hook is in place before diffspec is.
"""

import os
from pathlib import Path

# Most of the time of these tests is XLA's, compiling programs that then run once. Without LLVM's optimisations and the
# MLIR fusion emitters it takes a quarter as long, and a program that runs takes about three times as long; numbers
# differ by rounding. Programs that the command line runs once are compiled like this too (FAST_COMPILE). Processes that
# tests start inherit it. `XLA_FLAGS= pytest` compiles everything as users' programs are.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

import jax
import jaxtyping
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_compilation_cache", False)  # never a compiled function of an earlier run
PACKAGE = Path(__file__).resolve().parents[1] / "diffspec"
HOOKED = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "simulating" / "engine.py"  # numba compiles it, and cannot compile what checks its arguments
]
jaxtyping.install_import_hook(HOOKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


@pytest.fixture
def shared() -> Path:
    """Folder of measurements and design notes beside the repository; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared, which is absent")
    return folder


LONGEST = (
    *("test_documents", "test_uncertainty", "test_decisions", "test_waiting", "test_transfer", "test_cli_commands"),
    *(
        "test_fit",
        "test_simulating",
        "test_serving",
        "test_update",
        "test_joint",
        "test_joint_tails",
        "test_traces_hostile",
    ),
    *("test_request_mix", "test_finite_runs", "test_expert_placement", "test_pooling", "test_design", "test_report"),
    *("test_report_page", "test_objectives", "test_replay", "test_boundary"),
    *("test_sensitivity_global", "test_monitor", "test_browser"),
)
"""Files of tests that take longest: they start first, so that both workers end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, each in one piece (`--dist loadfile` hands out files in this order)."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
