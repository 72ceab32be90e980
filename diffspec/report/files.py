"""Files written whole or not at all, and answers as JSON text."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffspec.results import InputError


def json_text(data: Any) -> str:
    """``data`` as indented JSON text. Numbers that are not finite become null, as JSON has no name for them.

    >>> json_text({"speedup": float("inf")})
    '{\\n "speedup": null\\n}'
    """
    return json.dumps(_plain(data), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def check_target(path: Path, inputs: tuple[Path, ...] = ()) -> None:
    """Raise :class:`InputError` when a file could not be written to ``path``, or would replace one of ``inputs``."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: got a folder; allowed: the name of a file")
        if not path.resolve().parent.is_dir():
            raise InputError(f"{path}: the folder {str(path.parent)!r} does not exist; create it first")
        for given in inputs:
            if path.exists() and given.exists() and path.samefile(given):
                raise InputError(f"{path}: is read by this command and would be overwritten; choose another name")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write all files or none: each under a temporary name beside its place, renamed once all are complete.

    Errors: :class:`InputError` when one cannot be written.
    """
    waiting: list[tuple[Path, Path]] = []
    try:
        for path, content in contents.items():
            data = content.encode("utf-8") if isinstance(content, str) else content
            target = path.resolve()
            if target.exists() and not target.is_file():  # a device or a pipe takes what it is given
                target.write_bytes(data)
                continue
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            waiting.append((temporary, target))
            temporary.write_bytes(data)
        while waiting:
            os.replace(*waiting[0])
            waiting.pop(0)
    except OSError as error:
        raise InputError(f"{error.filename or 'output'}: cannot be written: {error.strerror or error}") from None
    finally:
        for temporary, _ in waiting:
            temporary.unlink(missing_ok=True)
