"""Which implementation of each operation to use on this device: the fast one where it is right, and for attention also
faster. Every comparison becomes a row of a table."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops as plain
from .experts import experts_grouped, experts_loop, route
from .ops import Ops, Rotary, Segment
from .tables import Table
from .timing import time_runs

COLUMNS = (
    "device",
    "dtype",
    "operation",
    "case",
    "candidate",
    "error",
    "tolerance",
    "candidate_s",
    "torch_s",
    "used",
    "note",
)
Heads = tuple[int, int, int]  # (heads, kv_heads, head_size)
# ||candidate - reference|| / ||reference||, the reference computed in float32 from the same inputs
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}


@dataclass
class Checks:
    """Compares candidates with `ops` on `device` and writes what it finds into `table`."""

    device: torch.device
    dtype: torch.dtype
    head: dict[str, Any]
    table: Table
    tiny: bool = False

    def __post_init__(self):
        self.generator = torch.Generator(device=self.device).manual_seed(0)

    def random(self, *size: int) -> Tensor:
        return torch.empty(size, device=self.device).normal_(generator=self.generator).to(self.dtype)

    def compare(
        self, operation: str, case: str, candidate: str, fast: Callable[[], Tensor], slow: Callable[[], Tensor],
        reference: Callable[[], Tensor], tolerance: float | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The row about `fast`: how far it is from `reference`, how long it and `slow` take, and whether it is `used`,
        which it is if it runs and is close."""
        tolerance = tolerance or TOLERANCE[self.dtype]
        row = dict(self.head, operation=operation, case=case, candidate=candidate, tolerance=tolerance, used=0)
        try:
            expected = reference().float()
            row["error"] = float((fast().float() - expected).norm() / expected.norm())
            row["candidate_s"], row["torch_s"] = (
                float(np.median(time_runs(run, self.device, 0.02, most=20))) for run in (fast, slow)
            )
            row["used"] = int(math.isfinite(row["error"]) and row["error"] <= tolerance)
            row["note"] = "" if row["used"] else "not within the tolerance"
        except Exception as problem:  # whatever goes wrong, the plain implementation remains
            if isinstance(problem, RuntimeError) and self.device.type == "cuda":
                torch.cuda.synchronize()  # raises if the device itself is lost
            row["note"] = f"{type(problem).__name__}: {problem}".split("\n")[0][:200]
        self.table.add(row)
        return row


Run = Callable[[Any, Callable[[Tensor], Tensor]], Tensor]
"""run(module, cast): the operation as `module` has it, on inputs passed through `cast`."""


def _three(run: Run, slow: Any, fast: Any) -> tuple[Callable[[], Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    """(fast, slow, reference): the last is the slow one in float32."""
    same, wide = (lambda x: x), (lambda x: x.float() if x.is_floating_point() else x)
    return partial(run, fast, same), partial(run, slow, same), partial(run, slow, wide)


def _attention_case(checks: Checks, heads: Heads, batch: int, tokens: int, context: int) -> Run:
    count, kv_heads, size = heads
    longest = context + tokens
    keys, values = (checks.random(batch * longest, kv_heads, size) for _ in range(2))
    base = torch.arange(batch, device=checks.device) * longest
    # every request another length, so that masks matter
    start = torch.linspace(context, context // 2, batch, device=checks.device).long()
    query, segment = checks.random(batch, tokens, count, size), Segment(base, start, tokens, longest)
    return lambda module, cast: module.attend(cast(query), segment, cast(keys), cast(values))


def _attention(checks: Checks, fast: Any, shapes: list[Heads]) -> bool:
    """Whether attention is right in every case, and faster over all of them together."""
    cases = [(2, 3, 32)] if checks.tiny else [(8, 1, 4096), (1, 4, 8192), (64, 8, 1024), (2, 256, 256)]
    rows = []
    for heads, (batch, tokens, context) in product(shapes, cases):
        case = f"batch {batch}, tokens {tokens}, context {context}, heads {heads}"
        run = _attention_case(checks, heads, batch, tokens, context)
        rows.append(checks.compare("attend", case, "triton", *_three(run, plain, fast)))
    if not all(row["used"] for row in rows):
        return False
    took = {name: sum(row[name] for row in rows) for name in ("candidate_s", "torch_s")}
    faster = checks.tiny or took["candidate_s"] <= took["torch_s"]
    total = dict(checks.head, operation="attend", case="all together", candidate="triton", used=int(faster))
    checks.table.add(total | took | {"note": "" if faster else "not faster"})
    return faster


def _rotation_case(checks: Checks, heads: Heads) -> Run:
    count, kv_heads, size = heads
    segment = Segment(torch.tensor([0, 64], device=checks.device), torch.tensor([7, 30], device=checks.device), 3)
    rotary = Rotary.make(128, size, checks.device)
    mixed = checks.random(6, (count + 2 * kv_heads) * size)

    def run(module: Any, cast: Callable[[Tensor], Tensor]) -> Tensor:
        keys, values = (cast(torch.zeros(128, kv_heads, size, device=checks.device, dtype=checks.dtype)) for _ in "kv")
        query = module.rotate_store(cast(mixed), segment, rotary, keys, values)
        return torch.cat([each.flatten() for each in (query, keys, values)])

    return run


def _small(checks: Checks, fast: Any, shapes: list[Heads]) -> Iterator[str]:
    """Names of the small operations that pass."""
    rows, width = (5, 48) if checks.tiny else (512, 4096)
    x, update, weight = checks.random(rows, width), checks.random(rows, width), checks.random(width)
    runs: dict[str, list[tuple[str, Run]]] = {
        "add_norm": [("", lambda module, cast: module.add_norm(cast(x).clone(), cast(update), cast(weight)))],
        "gate": [("", lambda module, cast: module.gate(cast(x)))],
        "rotate_store": [(f"heads {heads}", _rotation_case(checks, heads)) for heads in shapes],
    }
    for name, cases in runs.items():
        found = [
            checks.compare(name, case or f"rows {rows}, width {width}", "triton", *_three(run, plain, fast))["used"]
            for case, run in cases
        ]
        if all(found):
            yield name


def _grouped(checks: Checks) -> bool:
    experts, each, hidden, width, tokens = (8, 2, 64, 32, 6) if checks.tiny else (128, 8, 2048, 768, 64)
    x = checks.random(tokens, hidden)
    ids, weights = route(checks.random(tokens, experts), each)
    inward = checks.random(experts, 2 * width, hidden) * hidden**-0.5
    outward = checks.random(experts, hidden, width) * width**-0.5

    def run(module: Any, cast: Callable[[Tensor], Tensor]) -> Tensor:
        return module(cast(x), ids, cast(weights), cast(inward), cast(outward), plain.gate)

    case = f"tokens {tokens}, experts {experts}, width {width}"
    return bool(checks.compare("experts", case, "grouped_mm", *_three(run, experts_loop, experts_grouped))["used"])


def choose(checks: Checks, shapes: list[Heads], experts: bool = False, use_triton: bool | None = None) -> Ops:
    """The operations to use for models with these (heads, kv_heads, head_size). `use_triton`: by default on a GPU."""
    chosen = Ops()
    shapes = sorted(set(shapes))
    if checks.device.type == "cuda" if use_triton is None else use_triton:
        try:
            from . import kernels
        except ImportError as problem:
            note = f"no triton: {problem}"
            checks.table.add(dict(checks.head, operation="all", candidate="triton", used=0, note=note))
        else:
            names = list(_small(checks, kernels, shapes))
            if _attention(checks, kernels, shapes):
                names.append("attend")
            fast = {name: getattr(kernels, name) for name in names}
            chosen = replace(chosen, **fast, names=chosen.names | dict.fromkeys(names, "triton"))
    return replace(chosen, grouped=_grouped(checks)) if experts else chosen
