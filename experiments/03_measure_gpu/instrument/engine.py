"""The engine of the serving loop: a verifier, a drafter, their caches and their graphs, behind `loop.Engine`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .grid import BATCH_BUCKETS, LANE_BUCKETS, bucket
from .loop import Lane
from .model import Cache, Model
from .ops import Segment
from .timing import Recorder


@dataclass(frozen=True)
class Limits:
    """Sizes of an engine: requests in the batch, tokens in one lane, and the longest prompt plus output [tok]."""

    requests: int
    chunk: int
    longest: int
    most_drafts: int = 16

    @property
    def rows(self) -> int:
        """Cache rows of one request: room for a chunk's padding and for rejected tokens."""
        return self.longest + self.chunk + self.most_drafts + 1


class Buffers:
    """Fixed places of what changes from step to step: cache row and length of every decoding request and lane, and a
    number that makes the tokens of each step different. Sent to the device in one copy."""

    def __init__(self, limits: Limits, device: torch.device):
        self.requests, self.lanes = limits.requests, max(LANE_BUCKETS)
        size = 2 * (self.requests + self.lanes) + 1
        self.host = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.numbers = self.host.numpy()
        self.device = self.host.to(device)

    def segment(self, batch: int, tokens: int, lanes: bool, longest: int) -> Segment:
        first = self.requests if lanes else 0
        total = self.requests + self.lanes
        return Segment(
            self.device[first : first + batch], self.device[total + first : total + first + batch], tokens, longest
        )

    @property
    def salt(self) -> Tensor:
        return self.device[-1]

    def send(self, decoding: Sequence[tuple[int, int]], lanes: Sequence[Lane], rows: int, salt: int) -> None:
        """Places without a request point at the spare slot, one beyond the last, and at length 0."""
        total, spare = self.requests + self.lanes, self.requests * rows
        self.numbers[:total], self.numbers[total:] = spare, 0
        if decoding:
            slots, cached = zip(*decoding, strict=True)
            self.numbers[: len(slots)] = np.asarray(slots) * rows
            self.numbers[total : total + len(slots)] = cached
        for index, lane in enumerate(lanes):
            self.numbers[self.requests + index] = lane.slot * rows
            self.numbers[total + self.requests + index] = lane.start
        self.numbers[-1] = salt
        self.device.copy_(self.host, non_blocking=True)


class TorchEngine:
    """Runs a step on the device: the drafter's passes for the decoding requests and over new chunks of prompts, then
    one pass of the verifier over (draft_length + 1) tokens of each decoding request and all chunks together.

    The drafter first re-reads the last draft_length + 1 tokens of each request, as many as the verifier has just
    decided about, so that its cache is right whatever was accepted; then it takes draft_length - 1 passes of one token.
    Batches are padded to `BATCH_BUCKETS`, lanes to `LANE_BUCKETS` and to `chunk` tokens. Tokens are random (the argmax
    plus noise), so that random weights cannot run into a loop of one token; they decide nothing but the routing.
    """

    def __init__(self, verifier: Model, drafter: Model | None, limits: Limits, recorder: Recorder):
        self.verifier, self.drafter, self.limits, self.recorder = verifier, drafter, limits, recorder
        self.chunk, self.max_lanes = limits.chunk, max(LANE_BUCKETS)
        self.device = verifier.device
        self.buckets = (*(each for each in BATCH_BUCKETS if each < limits.requests), limits.requests)
        self.buffers = Buffers(limits, self.device)
        models = [verifier] if drafter is None else [verifier, drafter]
        assert all(model.shape.vocabulary <= verifier.shape.vocabulary for model in models)
        rows = (limits.requests + 1) * limits.rows
        self.caches = [Cache(model.shape, rows, self.device, model.dtype) for model in models]
        most = limits.requests * (limits.most_drafts + 1) + self.max_lanes * self.chunk
        generator = torch.Generator().manual_seed(1)
        smallest = min(model.shape.vocabulary for model in models)
        self.noise = torch.randint(smallest, (most,), generator=generator).to(self.device)
        self.hidden: Tensor | None = None
        if drafter is not None and drafter.shape.reads_hidden:
            size = (most, drafter.shape.hidden)
            self.hidden = torch.empty(size, device=self.device, dtype=drafter.dtype).normal_()
        self.drafts = torch.zeros(limits.requests, limits.most_drafts, dtype=torch.int64, device=self.device)
        self.sampled = torch.zeros(most, dtype=torch.int64, device=self.device)
        self.salts = np.random.default_rng(2)
        self.recorded: dict[tuple[str, int, int, int], tuple[Callable[[], None], bool]] = {}

    def prepare(self, requests: int, lanes: int, draft_length: int) -> None:
        for key in self._keys(requests, lanes, draft_length):
            if key not in self.recorded:
                kind, *sizes = key
                model = self.verifier if kind == "verify" else self.drafter
                self.buffers.send([], [], self.limits.rows, 0)
                self.recorded[key] = self.recorder.record(partial(getattr(self, f"_{kind}"), *sizes), model.graph_safe)

    def step(self, decoding: Sequence[tuple[int, int]], lanes: Sequence[Lane], draft_length: int) -> None:
        self.buffers.send(decoding, lanes, self.limits.rows, int(self.salts.integers(1 << 40)))
        for key in self._keys(len(decoding), len(lanes), draft_length):
            self.recorded[key][0]()
        # an engine reads its new tokens back: this waits until they are there
        self.sampled[: max(len(decoding), 1)].cpu()

    def _keys(self, requests: int, lanes: int, k: int) -> list[tuple[str, int, int, int]]:
        batch = bucket(self.buckets, requests) if requests else 0
        lanes = bucket(LANE_BUCKETS, lanes)
        keys = [("draft", batch, 0, k)] if k and batch else []
        keys += [("read", 0, lanes, 0)] if k and lanes else []
        return [*keys, ("verify", batch, lanes, k if batch else 0)]

    def _tokens(self, count: int, vocabulary: int) -> Tensor:
        return (self.noise[:count] + self.buffers.salt) % vocabulary

    def _verify(self, batch: int, lanes: int, k: int) -> None:
        fed, vocabulary, longest = k + 1, self.verifier.shape.vocabulary, self.limits.rows
        tokens = self._tokens(batch * fed + lanes * self.chunk, vocabulary)
        if k:
            tokens[: batch * fed].view(batch, fed)[:, 1:] = self.drafts[:batch, :k]
        segments, rows = [], [torch.arange(batch * fed, device=self.device)]
        if batch:
            segments.append(self.buffers.segment(batch, fed, False, longest))
        if lanes:
            segments.append(self.buffers.segment(lanes, self.chunk, True, longest))
            # one row of logits for each chunk
            rows.append(batch * fed + torch.arange(1, lanes + 1, device=self.device) * self.chunk - 1)
        logits, _ = self.verifier.forward(tokens, segments, self.caches[0], torch.cat(rows))
        torch.argmax(logits, dim=-1, out=self.sampled[: logits.shape[0]])

    def _draft(self, batch: int, _: int, k: int) -> None:
        model, cache = self.drafter, self.caches[1]
        vocabulary, fed = model.shape.vocabulary, k + 1
        now = self.buffers.segment(batch, 1, False, self.limits.rows)
        again = Segment(now.base, (now.start - k).clamp_(min=0), fed, now.longest)
        last = torch.arange(1, batch + 1, device=self.device) * fed - 1
        hidden = None if self.hidden is None else self.hidden[: batch * fed]
        logits, hidden = model.forward(self._tokens(batch * fed, vocabulary), [again], cache, last, hidden)
        for index in range(k):
            self.drafts[:batch, index] = (logits.argmax(dim=-1) + self.buffers.salt) % vocabulary
            if index + 1 < k:
                one = Segment(now.base, now.start + index + 1, 1, now.longest)
                states = hidden if model.shape.reads_hidden else None
                logits, hidden = model.forward(self.drafts[:batch, index], [one], cache, None, states)

    def _read(self, _: int, lanes: int, __: int) -> None:
        """The drafter's pass over chunks of prompts: it fills its cache, and nobody asks for its logits."""
        tokens = self._tokens(lanes * self.chunk, self.drafter.shape.vocabulary)
        segment = self.buffers.segment(lanes, self.chunk, True, self.limits.rows)
        last = torch.arange(1, lanes + 1, device=self.device) * self.chunk - 1
        hidden = None if self.hidden is None else self.hidden[: lanes * self.chunk]
        self.drafter.forward(tokens, [segment], self.caches[1], last, hidden)

    @property
    def all_graphs(self) -> bool:
        """Whether every pass so far runs as a graph."""
        return all(graph for _, graph in self.recorded.values())
