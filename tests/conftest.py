"""Strictness for every test: 64-bit floats, strict dtype promotion, shapes and types checked at run time.

Each pytest-xdist worker runs this file before it imports a test module, so the hook is in place before diffspec is.
"""

from pathlib import Path

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
