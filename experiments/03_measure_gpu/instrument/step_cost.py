"""The cost of one pass of one model over a grid of batch x tokens per request x context, beside its roofline."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .grid import Budget, StepCell
from .model import Cache, Model
from .ops import Ops, Segment
from .session import Session
from .shapes import work
from .tables import Table, spread
from .timing import Recorder, time_runs

COLUMNS = (
    *("device", "model", "role", "dtype", "batch", "tokens_per_request", "context", "step_time_s", "p10", "p90", "n"),
    *("bytes", "flops", "roofline_time_s", "ratio", "coverage", "attention", "graph"),
)
KEY = ("model", "batch", "tokens_per_request", "context")


class Bench:
    """One model with its cache, and its recorded passes: the context is read on the device, so one recording of
    (batch, tokens) serves every context that the cache holds."""

    def __init__(self, model: Model, rows: int, most_batch: int, most_tokens: int, recorder: Recorder):
        self.model, self.recorder = model, recorder
        self.cache = Cache(model.shape, rows, model.device, model.dtype)
        self.base, self.start = (torch.zeros(most_batch, dtype=torch.int64, device=model.device) for _ in range(2))
        total = most_batch * most_tokens
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(model.shape.vocabulary, (total,), generator=generator).to(model.device)
        self.out = torch.zeros(total, dtype=torch.int64, device=model.device)
        self.hidden = None
        if model.shape.reads_hidden:
            self.hidden = torch.empty(total, model.shape.hidden, device=model.device, dtype=model.dtype).normal_()
        self.recorded: dict[tuple, tuple[Callable[[], None], bool]] = {}
        self.coverages: dict[tuple[int, int], float] = {}

    def fits(self, batch: int, tokens: int, context: int) -> bool:
        return batch * (context + tokens) <= self.cache.rows

    def recording(self, batch: int, tokens: int, context: int, verify: bool) -> tuple[Callable[[], None], bool]:
        """(what to run, whether it is a graph) for this pass. `verify`: logits for every token, else for each request's
        last one."""
        self.base[:batch] = torch.arange(batch, device=self.base.device) * (context + tokens)
        self.start[:batch] = context
        # PyTorch's attention gathers a fixed length, so each context is a recording of its own there
        fixed = context if self.model.ops.names["attend"] == "torch" else None
        key = (batch, tokens, verify, self.model.imposed is not None, fixed)
        if key not in self.recorded:
            segment = Segment(self.base[:batch], self.start[:batch], tokens, context + tokens)
            self.recorded[key] = self.recorder.record(lambda: self._run(segment, verify), self.model.graph_safe)
        return self.recorded[key]

    def _run(self, segment: Segment, verify: bool) -> None:
        total = segment.batch * segment.tokens
        hidden = None if self.hidden is None else self.hidden[:total]
        rows = None
        if not verify and segment.tokens > 1:
            rows = torch.arange(1, segment.batch + 1, device=self.base.device) * segment.tokens - 1
        logits, _ = self.model.forward(self.tokens[:total], [segment], self.cache, rows, hidden)
        torch.argmax(logits, dim=-1, out=self.out[: logits.shape[0]])

    def routed_coverage(self, batch: int, tokens: int) -> float | None:
        """Mean share of a layer's experts that one pass of this size reaches; None for a dense model."""
        if not self.model.shape.experts:
            return None
        if (batch, tokens) not in self.coverages:
            self.model.routed = []
            try:
                self._run(Segment(self.base[:batch], self.start[:batch], tokens), True)
                counts = [ids.unique().numel() for ids in self.model.routed]
            finally:
                self.model.routed = None
            self.coverages[batch, tokens] = float(np.mean(counts)) / self.model.shape.experts
        return self.coverages[batch, tokens]


def check(session: Session, bench: Bench) -> None:
    """Two more rows of the checks table: the whole model with the chosen operations against the plain ones, and a
    recorded pass against the same pass run directly (error: share of other argmaxes)."""
    model, batch, tokens, context = bench.model, 4, 3, 16 if session.tiny else 512
    recorded, graph = bench.recording(batch, tokens, context, True)
    segment = Segment(bench.base[:batch], bench.start[:batch], tokens, context + tokens)
    hidden = None if bench.hidden is None else bench.hidden[: batch * tokens]
    chosen = model.ops

    def logits(ops: Ops) -> Tensor:
        model.ops = ops
        try:
            return model.forward(bench.tokens[: batch * tokens], [segment], bench.cache, None, hidden)[0]
        finally:
            model.ops = chosen

    # the plain operations, but the same product over experts: both would be another comparison
    plain, case = Ops(grouped=chosen.grouped), f"{model.shape.name}: batch {batch}, tokens {tokens}, context {context}"
    run, slow = partial(logits, chosen), partial(logits, plain)
    session.checks.compare("model", case, "chosen operations", run, slow, slow, tolerance=0.1)
    bench._run(segment, True)
    direct = bench.out[: batch * tokens].clone()
    bench.out.zero_()
    recorded()
    other = float((bench.out[: batch * tokens] != direct).float().mean())
    row = dict(session.checks.head, operation="graph", case=case, candidate="graph" if graph else "no graph")
    session.checks.table.add(row | {"error": other, "tolerance": 0.0, "used": int(graph)})


def measure(
    session: Session, benches: Mapping[str, Bench], roles: Mapping[str, str], cells: Iterable[StepCell], table: Table,
    budget: Budget, seconds: float,
) -> None:  # fmt: skip
    """Measure the cells that `table` has not yet, as far as the budget goes; `seconds` of replays for each."""
    value_bytes = 4 if session.dtype == torch.float32 else 2
    for cell in cells:
        bench, role = benches[cell.model], roles[cell.model]
        identity = {"model": bench.model.shape.name, "batch": cell.batch}
        identity |= {"tokens_per_request": cell.tokens, "context": cell.context}
        if table.has(**identity):
            continue
        verify = role == "verifier"
        rows = cell.batch * cell.tokens if verify else cell.batch
        if not bench.fits(cell.batch, cell.tokens, cell.context):
            session.skip(cell, "memory", f"{cell.batch * (cell.context + cell.tokens)} cache rows")
            continue
        guess = work(bench.model.shape, cell.batch, cell.tokens, cell.context, value_bytes, rows)
        estimate = 0.3 + max(seconds, 8 * 1.5 * session.roofline(guess))

        def run(cell=cell, bench=bench, role=role, identity=identity, rows=rows, verify=verify) -> None:
            recorded, graph = bench.recording(cell.batch, cell.tokens, cell.context, verify)
            covered = bench.routed_coverage(cell.batch, cell.tokens)
            times = time_runs(recorded, session.device, seconds)
            needed = work(bench.model.shape, cell.batch, cell.tokens, cell.context, value_bytes, rows, covered)
            row = {"device": session.name, "role": role, "dtype": session.dtype_name, **identity, **spread(times)}
            row |= roofline_columns(session, needed.bytes, needed.flops, float(np.median(times)))
            row |= {"coverage": covered, "attention": bench.model.ops.names["attend"], "graph": int(graph)}
            table.add(row)

        session.attempt(cell, budget, estimate, run)


def roofline_columns(session: Session, needed_bytes: float, flops: float, step_time: float) -> dict[str, float]:
    """`bytes`, `flops`, `roofline_time_s` on this device's measured peaks, and `ratio` = step time / roofline."""
    roofline = max(needed_bytes / session.peaks["bandwidth"], flops / session.peaks["matmul_rate"])
    return {"bytes": needed_bytes, "flops": flops, "roofline_time_s": roofline, "ratio": step_time / roofline}


def summary(table: Table) -> list[str]:
    """A short table: step times in milliseconds at one context, and the median ratio to the roofline of each model."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in table.rows):
        rows = [row for row in table.rows if row["model"] == model]
        ratios = sorted(float(row["ratio"]) for row in rows)
        lines.append(f"{model}: {len(rows)} cells, step time / roofline: median {ratios[len(ratios) // 2]:.2f}, "
                     f"{ratios[0]:.2f} to {ratios[-1]:.2f}")  # fmt: skip
        contexts = sorted({int(row["context"]) for row in rows}, key=lambda each: abs(math.log(each / 1024)))
        shown = {(int(r["batch"]), int(r["tokens_per_request"])): 1e3 * float(r["step_time_s"])
                 for r in rows if int(r["context"]) == contexts[0]}  # fmt: skip
        fed = sorted({tokens for _, tokens in shown})
        lines.append(f"  ms at context {contexts[0]}; batch | tokens " + "".join(f"{each:>9}" for each in fed))
        for batch in sorted({batch for batch, _ in shown}):
            cells = (shown.get((batch, each)) for each in fed)
            lines.append(f"  {batch:>31}" + "".join(f"{'-' if x is None else f'{x:.2f}':>9}" for x in cells))
    return lines
