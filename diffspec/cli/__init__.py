"""The command line. ``main`` is the console entry point; :mod:`diffspec.cli.app` lists the commands."""

import os
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run a command line (``sys.argv[1:]`` by default) and return its exit code.

    0 done; 1 an expected absence of an answer; 2 wrong usage or bad input, said in one line on stderr. Any other
    exception is a mistake of ours and keeps its traceback.
    """
    from diffspec.cli.app import app

    try:
        app(args=arguments, prog_name="diffspec")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        code = _code_of(error)
        if code is None:
            raise
        sys.stderr.write(f"error: {error}\n")
    return _flushed(code)


def _code_of(error: Exception) -> int | None:
    """Exit code of an expected error, None for any other."""
    if "diffspec.results" not in sys.modules:  # it loads jax, which --help must not
        return None
    from diffspec.results import InputError, NoResultError

    return 2 if isinstance(error, InputError) else 1 if isinstance(error, NoResultError) else None


def _flushed(code: int) -> int:
    """Flush stdout; a reader that has gone away (``| head``) is no reason for a traceback."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code
