"""Where scrapes of /metrics come from: an address that is asked again and again, or files that were recorded.

A recording is one text: each scrape after a line ``# scrape <unix time>``, as `diffspec collect` writes it and
`diffspec import` and `diffspec acceptance` read it; one that failed is a line of its own, ``# scrape <unix time>
failed: why``, which these readers pass over.
"""

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

from diffspec.results import InputError, TraceError
from diffspec.traces.readers.prometheus import Snapshot, parse
from diffspec.workload import check_range

QUICK = 10.0
"""Seconds after which a scrape is given up."""
LARGEST = 64 * 2**20
"""Bytes beyond which an answer is no exposition."""
_FAILED = re.compile(r"(?m)^# scrape (\S+) failed: (.*)$")
_STAMP = re.compile(r"(?<!\d)(\d{10}(?:\.\d+)?)(?!\d)")


@dataclass(frozen=True)
class Scrape:
    """One look at /metrics at ``time`` [unix s]: its ``snapshot``, or ``failure``, why there is none; ``text`` as it
    came, where it came over the network."""

    time: float
    snapshot: Snapshot | None = None
    failure: str = ""
    text: str = ""


def metrics_url(url: str) -> str:
    """The address to ask; ``/metrics`` where no path is given. Raises :class:`InputError` for what is no address.

    >>> metrics_url("http://127.0.0.1:8000")
    'http://127.0.0.1:8000/metrics'
    """
    allowed = "allowed: http://HOST:PORT/metrics or https://..."
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or any(letter.isspace() for letter in url):
        raise InputError(f"--metrics-url: got {url!r}; {allowed}")
    return url if parts.path.strip("/") else parts._replace(path="/metrics").geturl()


def fetch(url: str, quick: float = QUICK, clock: Callable[[], float] = time.time) -> Scrape:
    """One scrape of ``url``, given up after ``quick`` seconds; whatever goes wrong is its ``failure``. No proxy."""
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=quick) as answer:
            body = answer.read(LARGEST + 1)
    except HTTPError as error:
        return Scrape(clock(), failure=f"HTTP {error.code} {error.reason}")
    except URLError as error:
        return Scrape(clock(), failure=str(getattr(error.reason, "strerror", None) or error.reason))
    except (OSError, ValueError) as error:
        return Scrape(clock(), failure=str(getattr(error, "strerror", None) or error) or type(error).__name__)
    except Exception as error:  # http.client's, of servers that speak something else
        return Scrape(clock(), failure=f"no HTTP: {type(error).__name__}")
    now = clock()
    if len(body) > LARGEST:
        return Scrape(now, failure=f"the answer is longer than {LARGEST // 2**20} MiB")
    text = body.decode("utf-8", "replace").rstrip() + "\n"
    marked = f"# scrape {now:.3f}\n{text}"
    try:
        return Scrape(now, snapshot=parse(marked, url)[0], text=text)
    except TraceError as error:
        return Scrape(now, failure=str(error), text=text)


def live(
    url: str,
    interval: float,
    count: int | None = None,
    *,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[Scrape]:
    """Scrapes of ``url`` every ``interval`` seconds, ``count`` of them (None: without end). A late one does not shift
    those after it: what was missed is left out."""
    start, made = time.monotonic(), 0
    while count is None or made < count:
        yield fetch(url, min(QUICK, max(interval, 1.0)))
        made += 1
        if count is None or made < count:
            due = interval * math.ceil((time.monotonic() - start) / interval + 1e-9)
            wait(max(0.0, start + due - time.monotonic()))


def recorded(paths: Sequence[Path]) -> list[Scrape]:
    """The scrapes of recordings, by time. A file of a single scrape without a time may have it, in unix seconds, in its
    name. Raises :class:`InputError` for files that cannot be read, hold no scrape, or tell no time."""
    found: list[Scrape] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8").rstrip() + "\n"
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        failures = _FAILED.findall(text)
        snapshots = [] if failures and "\nvllm:" not in text and "\nsglang:" not in text else parse(text, path.name)
        stamp = _STAMP.search(path.name)
        for snapshot in snapshots:
            moment = snapshot.time
            if moment is None and stamp and len(snapshots) == 1:
                moment = float(stamp[1])
            if moment is None:
                raise InputError(
                    f"{path}: a scrape without its time; allowed: a line '# scrape <unix time>' before each, or one "
                    "scrape a file with the unix time in its name, such as metrics_1790000000.txt"
                )
            found.append(Scrape(moment, snapshot=snapshot))
        for stamp_text, why in failures:
            check_range(f"{path}: time of a scrape", _number(stamp_text), 0, 1e15, low_open=False, unit="unix s")
            found.append(Scrape(float(stamp_text), failure=why))
    return sorted(found, key=lambda scrape: scrape.time)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def as_recording(scrape: Scrape) -> str:
    """A scrape as a piece of a recording.

    >>> as_recording(Scrape(100.0, failure="Connection refused"))
    '# scrape 100.000 failed: Connection refused\\n'
    """
    if scrape.snapshot is None:
        return f"# scrape {scrape.time:.3f} failed: {' '.join(scrape.failure.split())}\n"
    return f"# scrape {scrape.time:.3f}\n{scrape.text}"
