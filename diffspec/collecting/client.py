"""One streamed request to an OpenAI-compatible server, timed chunk by chunk.

While a response streams, only the clock is read and the bytes are kept; they are parsed when it is complete, once a
request instead of once a chunk. What that costs is measured (CPU time a request, send lag) and reported.
"""

import asyncio
import json
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..results import NoResultError
from .load import Ask
from .plan import Server

if TYPE_CHECKING:
    import aiohttp

MOST_RESPONSE = 64 << 20
"""Bytes of one response after which it is given up."""


@dataclass
class Sent:
    """One request as it went. Times in seconds after the cell began: `arrival`, when it was due (closed loops: sent),
    `sent`, `events`, the arrival of every chunk with tokens in it, and `completion`. `metrics`: the engine's own
    account of the request, where it gives one."""

    arrival: float
    sent: float
    events: list[float] = field(default_factory=list)
    completion: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    asked_prompt: int = 0
    asked_output: int = 0
    phase: str = "warmup"
    error: str | None = None
    metrics: dict[str, Any] | None = None
    task: str | None = None
    temperature: float | None = None

    @property
    def ok(self) -> bool:
        """Completed with at least one token."""
        return self.error is None and self.completion is not None and bool(self.events)

    @property
    def latency(self) -> float:
        """End-to-end latency [s]; NaN before completion."""
        return math.nan if self.completion is None else self.completion - self.arrival


def headers(server: Server, environment: dict[str, str]) -> dict[str, str]:
    """Headers of every request: the key from the environment, where the plan names its variable."""
    if server.api_key_env is None:
        return {}
    key = environment.get(server.api_key_env)
    if not key:
        raise NoResultError(f"server: api_key_env: the variable {server.api_key_env} is not set")
    return {"Authorization": f"Bearer {key}"}


def session(server: Server, environment: dict[str, str]) -> "aiohttp.ClientSession":
    """A session that reuses connections without limit, follows no proxy and reads nothing but what it is sent."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=server.timeout, sock_connect=30)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        trust_env=False,
        headers=headers(server, environment),
        read_bufsize=1 << 20,
    )


async def send(http: "aiohttp.ClientSession", url: str, chat: bool, ask: Ask, arrival: float, began: float) -> Sent:
    """Send one request and follow its stream to the end; failures are told in `Sent.error`, never raised. `began` is
    the cell's beginning on `time.perf_counter`; cancellation closes the connection, on which engines abort."""
    clock = time.perf_counter
    sent = Sent(
        arrival,
        clock() - began,
        asked_prompt=ask.prompt_length,
        asked_output=ask.output_length,
        task=ask.task,
        temperature=ask.body.get("temperature"),
    )
    chunks: list[tuple[float, bytes]] = []
    size = 0
    try:
        async with http.post(url, json=ask.body, allow_redirects=False) as response:
            if response.status != 200:
                text = (await response.content.read(2000)).decode("utf-8", "replace")
                sent.error = f"HTTP {response.status}: {' '.join(text.split())[:300]}"
                return sent
            async for line in response.content:
                chunks.append((clock() - began, line))
                size += len(line)
                if size > MOST_RESPONSE:
                    sent.error = f"the response is longer than {MOST_RESPONSE} bytes"
                    return sent
    except asyncio.CancelledError:
        sent.error = "cancelled"
        raise
    except TimeoutError:
        sent.error = "timed out"
    except Exception as error:  # whatever one request meets is told in its record, and the cell goes on
        sent.error = f"{type(error).__name__}: {error}"[:300]
    if sent.error is None:
        _understand(sent, chunks, chat)
    return sent


def _understand(sent: Sent, chunks: list[tuple[float, bytes]], chat: bool) -> None:
    """Read the stream's events: times of those with tokens, usage, errors, the engine's metrics."""
    finish = None
    for moment, line in chunks:
        line = line.strip()
        if not line.startswith(b"data:"):
            if line.startswith(b"{") and not sent.events:
                sent.error = f"not a stream: {line[:200].decode('utf-8', 'replace')}"
            continue
        payload = line[5:].strip()
        if payload == b"[DONE]":
            continue
        try:
            event = json.loads(payload)
        except (ValueError, RecursionError):
            sent.error = f"an event of the stream is not JSON: {payload[:120].decode('utf-8', 'replace')}"
            return
        if not isinstance(event, dict):
            continue
        if event.get("error"):
            sent.error = f"the server says: {str(event['error'])[:300]}"
            return
        if isinstance(event.get("metrics"), dict):
            sent.metrics = event["metrics"]
        usage = event.get("usage")
        if isinstance(usage, dict):
            sent.prompt_tokens = _count(usage.get("prompt_tokens"), sent.prompt_tokens)
            sent.output_tokens = _count(usage.get("completion_tokens"), sent.output_tokens)
        choices = event.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            finish = choices[0].get("finish_reason") or finish
            if not chat or _has_tokens(choices[0].get("delta")):
                sent.events.append(moment)
                sent.completion = moment
    if not sent.events:
        sent.error = sent.error or "the response holds no token"
    if sent.output_tokens is None and finish == "length":
        sent.output_tokens = sent.asked_output
    if sent.ok and sent.output_tokens is None:
        sent.error = "the server sends no usage (stream_options.include_usage) and the output did not reach max_tokens"


def _has_tokens(delta: Any) -> bool:
    names = ("content", "reasoning_content", "reasoning", "tool_calls")
    return isinstance(delta, dict) and any(delta.get(name) for name in names)


def _count(value: Any, default: int | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default
