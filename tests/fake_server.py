"""An OpenAI-compatible server whose timing is known: it waits, streams chunks at stated intervals, and counts."""

import asyncio
import json
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web


@dataclass
class FakeServer:
    """`first` [s] to the first chunk, `gap` [s] between chunks of `per_chunk` tokens, at most `places` at a time (the
    others wait); `fail` makes every request answer that HTTP status. `received` holds every request's body."""

    first: float = 0.02
    gap: float = 0.004
    per_chunk: int = 2
    places: int = 1000
    fail: int | None = None
    broken_after: int | None = None
    tells_metrics: bool = False
    received: list[dict] = field(default_factory=list)
    drafts: int = 0
    accepted: int = 0
    url: str = ""

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.received.append(body)
        if self.fail is not None:
            return web.json_response({"error": {"message": "out of order"}}, status=self.fail)
        async with self.semaphore:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await asyncio.sleep(self.first)
            left, chunks = body["max_tokens"], 0
            while left > 0:
                tokens = 1 if left == body["max_tokens"] else min(self.per_chunk, left)
                left -= tokens
                choice = {"index": 0, "text": "x" * tokens, "finish_reason": None if left else "length"}
                if "messages" in body:
                    choice["delta"] = {"content": choice.pop("text")}
                await response.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
                chunks += 1
                if chunks == self.broken_after:
                    request.transport.close()
                    return response
                if left:
                    await asyncio.sleep(self.gap)
            self.drafts += chunks - 1
            self.accepted += body["max_tokens"] - chunks
            prompt = body.get("prompt") or body["messages"][0]["content"].split()
            usage = {"prompt_tokens": len(prompt), "completion_tokens": body["max_tokens"]}
            last = {"choices": [], "usage": usage}
            if self.tells_metrics:  # every draft of per_chunk - 1 tokens is accepted
                k = self.per_chunk - 1
                steps = {"num_spec_steps": chunks - 1, "acceptance_histogram": [0] * k + [chunks - 1]}
                steps |= {"num_draft_tokens": k * (chunks - 1), "num_accepted_draft_tokens": k * (chunks - 1)}
                last["metrics"] = {
                    "time_to_first_token_ms": 1.0,
                    "speculative_decoding": steps | {"num_spec_tokens": k},
                }
            await response.write(f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode())
            return response

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def metrics(self, request: web.Request) -> web.Response:
        k = self.per_chunk
        counters = {
            "num_drafts": self.drafts,
            "num_draft_tokens": k * self.drafts,
            "num_accepted_tokens": self.accepted,
        }
        lines = [
            f'# TYPE vllm:spec_decode_{name} counter\nvllm:spec_decode_{name}_total{{model_name="fake"}} {value}'
            for name, value in counters.items()
        ]
        return web.Response(text="\n".join(lines) + "\n")

    def application(self) -> web.Application:
        self.semaphore = asyncio.Semaphore(self.places)
        app = web.Application()
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/chat/completions", self.completions)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/health", self.models)
        return app


@contextmanager
def running(server: FakeServer):
    """Serve in a thread of its own on a free port of this machine; `server.url` is its address meanwhile."""
    loop, ready, box = asyncio.new_event_loop(), threading.Event(), {}

    async def start() -> None:
        box["runner"] = web.AppRunner(server.application(), shutdown_timeout=0.1)
        await box["runner"].setup()
        site = web.TCPSite(box["runner"], "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        ready.set()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(box["runner"].cleanup())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


if __name__ == "__main__":  # in the place of `vllm serve MODEL ... --port PORT`
    port = int(sys.argv[sys.argv.index("--port") + 1])

    async def begin() -> web.Application:
        return FakeServer().application()

    web.run_app(begin(), host="127.0.0.1", port=port)
