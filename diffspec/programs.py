"""How programs that run a few times are compiled, and how the command line keeps them for its next process.

JAX's own cache holds what XLA makes of a program, but a process must trace and lower the program before it can ask for
it, which takes most of a short command. Here the executable is kept under what the trace depends on: the function, the
static arguments, the structure, shapes and types of the others, all of diffspec's sources, versions, the settings of
JAX and XLA, and the processor. Only the command line keeps programs (:func:`diffspec.cli.prepare.prepare_jax`); for
everybody else :func:`program` is ``jax.jit``, and so it is wherever anything at all goes wrong.

An entry is machine code that is run: the folder deserves the trust that JAX's cache beside it needs. Nothing is kept
where the sources are not files or have changed since they were read, or where an argument's class or function is
neither ours nor of a package whose version is known, or where a program calls LAPACK; and only for one CPU device.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import io
import os
import pickle
import platform
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.core import Tracer

FAST_COMPILE = {"xla_backend_optimization_level": 0}
"""For programs that run a few times: compiling them is what takes time."""
MOST_ENTRIES = 128
"""Programs that are kept, about a megabyte each; those that were not used for longest make room."""
_PACKAGES = ("jax", "jaxlib", "equinox", "optax", "numpy")
_KNOWN = {"diffspec", "builtins", "collections", "copyreg", "functools", "jaxtyping", *_PACKAGES}
_HERE, _STARTED = Path(__file__).parent, time.time()
_folder: Path | None = None


def keep_programs(folder: Path | None) -> None:
    """Keep the executables of every :func:`program` in ``folder`` from now on; None: keep none."""
    global _folder
    _folder = folder


def program(*static: int, compiler_options: dict[str, Any] = FAST_COMPILE) -> Callable[[Callable], Callable]:
    """Decorator: ``jax.jit`` with the arguments at the places ``static`` static, kept where :func:`keep_programs` says.

    The function must depend on nothing but its arguments and the sources: ValueError for one with a closure.

    >>> @program(0)
    ... def power(exponent, x):
    ...     return x**exponent
    >>> float(power(3, 2.0))
    8.0
    """

    def decorate(function: Callable) -> Callable:
        if inspect.unwrap(function).__closure__ is not None:
            raise ValueError(f"{function.__qualname__}: got a closure; allowed: a function of its arguments alone")
        jitted = jax.jit(function, static_argnums=static, compiler_options=compiler_options)
        ready: dict[Any, Callable | None] = {}

        @functools.wraps(function)
        def call(*args):
            given = tuple(arg for place, arg in enumerate(args) if place not in static)
            leaves, tree = jax.tree.flatten(given)
            if _folder is None or any(isinstance(leaf, Tracer) for leaf in leaves):
                return jitted(*args)
            asked = (_folder, tree, tuple(args[place] for place in static), tuple(map(jax.typeof, leaves)))
            if asked not in ready:
                name = f"{function.__module__}.{function.__qualname__}"
                path = _entry(name, compiler_options, *asked)
                ready[asked], *answer = _loaded(path, given) or (_stored(path, jitted, args),)
                if answer:
                    return answer[0]
            run = ready[asked]
            return jitted(*args) if run is None else run(*given)

        return call

    return decorate


def _entry(name: str, options: dict[str, Any], folder: Path, tree, static: tuple, types: tuple) -> Path | None:
    """Where the executable is kept; None for what cannot be told by value, and for anything but one CPU device."""
    try:
        if jax.default_backend() != "cpu" or jax.device_count() > 1 or changed(_HERE):
            return None
        shapes = [(str(kind.dtype), kind.shape, kind.weak_type) for kind in types]
        settings = {name: value for name, value in jax.config.values.items() if "cache" not in name}
        environment = sorted(pair for pair in os.environ.items() if pair[0].startswith("XLA_"))
        structure = jax.tree.unflatten(tree, range(tree.num_leaves))  # static fields by value, classes by full name
        asked = io.BytesIO()
        _Pickler(asked, name).dump((name, options, static, structure, shapes, settings, environment))
        key = hashlib.sha256(sources(_HERE) + _platform() + asked.getvalue()).hexdigest()
    except Exception:  # whatever has no value that can be told
        return None
    return folder / f"{name.rsplit('.', 1)[-1]}-{key[:40]}"


class _Pickler(pickle.Pickler):
    """Refuses classes and functions that may change without the key: those of neither us, the program's own package nor
    one of known version."""

    def __init__(self, file: io.BytesIO, name: str):
        super().__init__(file)
        self.known = {*_KNOWN, name.split(".")[0]}

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, type | types.FunctionType) and thing.__module__.split(".")[0] not in self.known:
            raise pickle.PicklingError(f"{thing.__module__}.{thing.__qualname__} may be another one tomorrow")
        return NotImplemented


def changed(folder: Path) -> bool:
    """Whether a Python file below a folder was written after this process began: it may have read the one before."""
    return any(path.stat().st_mtime > _STARTED for path in folder.rglob("*.py"))


@functools.cache
def sources(folder: Path) -> bytes:
    """Digest of all Python files below a folder: their names and what they hold. FileNotFoundError without any."""
    digest, paths = hashlib.sha256(), sorted(folder.rglob("*.py"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no Python files")
    for path in paths:
        text = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(text)} ".encode() + text)
    return digest.digest()


@functools.cache
def _platform() -> bytes:
    """Versions, and the processor's instructions; the machine's name where they are not told."""
    told = [sys.version, platform.machine(), *(importlib.metadata.version(package) for package in _PACKAGES)]
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            told.append(next(line for line in lines if line.startswith(("flags", "Features"))))
    except (OSError, StopIteration):
        told.append(platform.node())
    return repr(told).encode()


def _loaded(path: Path | None, given: tuple) -> tuple[Callable, Any] | None:
    """The executable kept, and what it answers to ``given``; None where there is none, or none that works."""
    try:
        if path is None:
            return None
        digest, content = (text := path.read_bytes())[:32], text[32:]
        if hashlib.sha256(content).digest() != digest:
            return None
        from jax.experimental.serialize_executable import deserialize_and_load

        executable, answer = pickle.loads(content)
        run = deserialize_and_load(executable, jax.tree.structure((given, {})), jax.tree.structure(answer))
        found = jax.block_until_ready(run(*given))
    except Exception:  # damaged, unreadable, of another machine: it is compiled again
        return None
    with contextlib.suppress(OSError):  # a folder that is only read
        os.utime(path)
    return run, found


def _stored(path: Path | None, jitted, args: tuple) -> Callable | None:
    """The program compiled, and kept where that is possible, by JAX's cache where it is not; None: use ``jitted``."""
    if path is None:
        return None
    from jax.experimental.compilation_cache import compilation_cache
    from jax.experimental.serialize_executable import serialize

    lowered, partial = jitted.lower(*args), path.with_name(f"{path.name}.{os.getpid()}")
    if "custom_call" in lowered.as_text():  # of LAPACK, which tracing prepares and a process that loads it lacks
        return lowered.compile()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError:
        return lowered.compile()
    used = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)  # what was read from JAX's cache cannot be kept whole
        compilation_cache.reset_cache()
        compiled = lowered.compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", used)
        compilation_cache.reset_cache()
    try:
        executable, _, tree = serialize(compiled)
        content = pickle.dumps((executable, jax.tree.unflatten(tree, range(tree.num_leaves))))
        partial.write_bytes(hashlib.sha256(content).digest() + content)
        if not changed(_HERE):
            partial.replace(path)
        entries = sorted(path.parent.iterdir(), key=lambda entry: entry.stat().st_mtime)
        for entry in entries[:-MOST_ENTRIES]:
            entry.unlink(missing_ok=True)
    except Exception:  # not to be serialised, no room: the program is there all the same
        pass
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return compiled
