"""The work of `scale` done by the workers of a Dask cluster, one on this machine or one that is already there.

Dask and not Ray, by measurement (`experiments/09_speed/engines.py`). A task is a partition; it reads its files itself,
so that a worker that dies takes nothing with it that cannot be read again, by another. No more tasks are handed out
than keep every worker busy, and what they send is taken as it comes: neither the scheduler nor this process holds more
of it as the logs grow.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..results import InputError, NoResultError
from .scale import Runner

AHEAD = 3
"""Tasks handed out for each thread of the cluster."""
RETRIES = 2
"""More tries of a task that failed with an error."""
PATIENCE = 60.0
"""How long [s] a cluster may be without any worker."""
CONNECT = 10.0
"""How long [s] a scheduler may take to answer."""
_POLL = 1.0
_KEEP_MEMORY = {
    **{f"{name}_NUM_THREADS": 1 for name in ("OMP", "MKL", "OPENBLAS")},
    "MALLOC_TRIM_THRESHOLD_": 256 << 20,
    "MALLOC_MMAP_THRESHOLD_": 32 << 20,
    "MALLOC_ARENA_MAX": 1,
}
"""Workers of this machine keep memory that is freed for the next batch. By default Dask has them give it back at once:
much of their time then goes into getting it again."""


@contextmanager
def dask_runner(scheduler: str | None = None, workers: int | None = None) -> Iterator[Runner]:
    """The `scale.Runner` of the cluster whose scheduler listens at an address such as ``tcp://10.0.0.1:8786``, or, by
    default, of one with `workers` processes (one a core) on this machine, for as long as the context lasts.

    Raises `InputError` when a package is missing or no scheduler answers, and, while it runs, `NoResultError` when the
    cluster is lost: killed workers alone are replaced, their partitions read again."""
    try:
        import ddsketch  # noqa: F401
        from distributed import Client, LocalCluster
    except ImportError as error:
        lacking = f"--engine dask: {error.name or 'a package'} is not installed"
        raise InputError(f"{lacking}; pip install 'diffspec[scale]'") from None
    cluster = None
    if scheduler is None:
        import dask.config

        quiet: dict[str, Any] = {"dashboard_address": ":0", "silence_logs": logging.CRITICAL}
        with dask.config.set({"distributed.nanny.pre-spawn-environ": _KEEP_MEMORY}):
            cluster = LocalCluster(n_workers=workers or os.cpu_count() or 1, threads_per_worker=1, **quiet)
    try:
        try:
            client = Client(cluster if cluster is not None else scheduler, timeout=CONNECT, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise InputError(
                f"--scheduler: got {scheduler!r}; allowed: the address of a running Dask scheduler, such as "
                f"tcp://10.0.0.1:8786 ({_short(error)})"
            ) from None
        try:
            yield _Dask(client, "on this machine" if scheduler is None else f"at {scheduler}")
        finally:
            client.close(timeout=CONNECT)
    finally:
        if cluster is not None:
            cluster.close(timeout=CONNECT)


@dataclass(frozen=True)
class _Dask:
    """A `Runner`: see `dask_runner`. `place`: where the cluster is, in words."""

    client: Any
    place: str

    def __call__(self, function: Callable[..., Any], items: Sequence[Any], *shared: Any) -> Iterator[tuple[int, Any]]:
        from concurrent.futures import CancelledError

        done = 0
        try:
            for answer in self._results(function, items, shared):
                yield answer
                done += 1
        except _TaskError as failed:
            raise self._told(failed.error) from None
        except (CancelledError, OSError, TimeoutError) as error:
            raise NoResultError(
                f"the Dask cluster {self.place} is gone ({_short(error)}): {done} of {len(items)} partitions were "
                "read; nothing was written, start it again"
            ) from None

    def _told(self, error: BaseException) -> BaseException:
        """What a task ended with, as an error for users where it is theirs to mend."""
        from distributed import KilledWorker

        if isinstance(error, KilledWorker):
            return NoResultError(
                f"workers died each time they read the same partition ({_short(error)}); do they have memory enough? "
                "About 1 GB a worker is"
            )
        if isinstance(error, ModuleNotFoundError):
            return InputError(
                f"a worker of the Dask cluster {self.place} lacks {error.name}; pip install 'diffspec[scale]' there"
            )
        if isinstance(error, OSError):
            return InputError(f"a worker of the Dask cluster {self.place} cannot read: {_short(error)}")
        return error

    def _results(
        self, function: Callable[..., Any], items: Sequence[Any], shared: Sequence[Any]
    ) -> Iterator[tuple[int, Any]]:
        # A task that gives what all others need: unlike data sent to a worker, it is done again where one dies.
        given = [self.client.submit(_opened, _Sealed(value), pure=False, retries=RETRIES) for value in shared]
        waiting = deque(enumerate(items))
        running: dict[Any, int] = {}
        while waiting or running:
            most = AHEAD * max(sum(self.client.nthreads().values()), 1)
            while waiting and len(running) < most:
                place, item = waiting.popleft()
                task = self.client.submit(_applied, function, _Sealed(item), *given, pure=False, retries=RETRIES)
                running[task] = place
            for task in self._finished(list(running)):
                if task.status == "error":
                    raise _TaskError(task.exception())
                yield running.pop(task), task.result()

    def _finished(self, tasks: list[Any]) -> list[Any]:
        """Tasks that are done, at least one. Raises `OSError` when nobody is left to do them."""
        from distributed import wait

        alone_since = None
        while True:
            try:
                with self.client.as_current():
                    ended: Any = wait(tasks, timeout=_POLL, return_when="FIRST_COMPLETED")
                return list(ended.done)
            except TimeoutError:
                if self.client.status not in ("running", "connecting"):
                    raise OSError("the scheduler has closed the connection") from None
                if self.client.nthreads():
                    alone_since = None
                elif alone_since is None:
                    alone_since = time.monotonic()
                elif time.monotonic() - alone_since > PATIENCE:
                    raise OSError(f"no worker for {PATIENCE:g} s") from None


class _TaskError(Exception):
    """`error`, which a task ended with, told apart from what goes wrong here."""

    def __init__(self, error: BaseException):
        self.error = error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@dataclass(frozen=True)
class _Sealed:
    """A value that Dask hands on as it is, without looking for tasks in it."""

    value: Any


def _opened(sealed: _Sealed) -> Any:
    return sealed.value


def _applied(function: Callable[..., Any], sealed: _Sealed, *shared: Any) -> Any:
    return function(sealed.value, *shared)
