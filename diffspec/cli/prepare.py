"""Settings that must be made before jax does any work: precision, device, compilation cache."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path | None:
    """Folder of compiled programs: DIFFSPEC_CACHE_DIR where set (None when it is empty), else jax/ in diffspec's part
    of the user's cache folder."""
    chosen = os.environ.get("DIFFSPEC_CACHE_DIR")
    if chosen is not None:
        return Path(chosen) if chosen.strip() else None
    try:
        if os.name == "nt":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home folder
        return None
    return base / "diffspec" / "jax"


def prepare_jax() -> None:
    """float64; the CPU unless JAX_PLATFORMS says otherwise (the arrays are tiny); compiled programs kept between runs,
    JAX's and, unless DIFFSPEC_KEEP_PROGRAMS is 0, those of :mod:`diffspec.programs`.

    A cache folder that cannot be made or written is done without.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from diffspec.programs import keep_programs

    jax.config.update("jax_enable_x64", True)
    keep_programs(None)
    folder = cache_folder()
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # reading a small one takes a tenth as long
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if jax.config.values["jax_enable_compilation_cache"] and os.environ.get("DIFFSPEC_KEEP_PROGRAMS") != "0":
        keep_programs(folder / "programs")
