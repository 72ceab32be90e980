"""What the parts share: the device and its peaks, the tables of what was skipped, and cells that may fail."""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .checks import COLUMNS as CHECK_COLUMNS
from .checks import Checks, choose
from .grid import Budget
from .ops import Ops
from .shapes import SHAPES, TINY, Shape, Work
from .tables import Table
from .timing import Recorder, peaks

SKIPPED = ("cell", "reason", "detail")
DEVICE = (
    *("device", "dtype", "torch", "triton", "memory_bytes", "copy_bandwidth", "read_bandwidth", "bandwidth"),
    *("matmul_rate", "part", "seconds", "graphs", "graph_problem"),
)


class DeviceLost(RuntimeError):
    """The device answers no more in this process: nothing after this can be measured. Start again with --resume."""


@dataclasses.dataclass
class Session:
    """One part on one device, writing into `out` as it goes."""

    part: int
    out: Path
    device: torch.device
    tiny: bool = False
    resume: bool = False
    quiet: bool = False

    def __post_init__(self):
        self.begun = time.monotonic()
        cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        self.name = torch.cuda.get_device_name(self.device) if cuda else "CPU"
        self.skipped = self.table("skipped", SKIPPED, fresh=True)
        table = self.table("checks", CHECK_COLUMNS, fresh=True)
        self.checks = Checks(self.device, self.dtype, {"device": self.name, "dtype": self.dtype_name}, table, self.tiny)
        self.recorder = Recorder(self.device)
        self.peaks = peaks(self.device, self.dtype, self.tiny or not cuda)
        self.devices = self.table("device", DEVICE)
        self.devices.add(self._device())
        self.tell(f"{self.name}: {self.peaks['bandwidth']:.3g} B/s, {self.peaks['matmul_rate']:.3g} flop/s")

    def table(self, name: str, columns: tuple[str, ...], key: tuple[str, ...] = (), fresh: bool = False) -> Table:
        """The table part<N>_<name>.csv, with what an earlier run left there when resuming (unless `fresh`)."""
        return Table(self.out / f"part{self.part}_{name}.csv", columns, key, self.resume and not fresh)

    def shape(self, name: str) -> Shape:
        return (TINY if self.tiny else SHAPES)[name]

    def tell(self, text: str) -> None:
        if not self.quiet:
            print(f"[{time.monotonic() - self.begun:5.0f} s] {text}", file=sys.stderr, flush=True)

    def roofline(self, needed: Work) -> float:
        return needed.seconds(self.peaks["bandwidth"], self.peaks["matmul_rate"])

    def choose_ops(self, shapes: list[Shape]) -> Ops:
        """Compare the implementations for these models; the comparisons go to part<N>_checks.csv."""
        heads = [(each.heads, each.kv_heads, each.head_size) for each in shapes]
        chosen = choose(self.checks, heads, any(each.experts for each in shapes))
        self.tell(f"operations: {chosen.names}, grouped experts: {chosen.grouped}")
        return chosen

    def skip(self, cell: Any, reason: str, detail: str = "") -> None:
        """Say in part<N>_skipped.csv that a cell was not measured; --resume tries it again."""
        self.skipped.add({"cell": str(cell), "reason": reason, "detail": detail[:300]})

    def attempt(self, cell: Any, budget: Budget, estimate: float, run: Callable[[], None]) -> None:
        """Run a cell that is estimated to take `estimate` seconds, if the budget allows it. A cell that does not fit or
        fails is recorded and skipped."""
        if not budget.allows(estimate):
            self.skip(cell, "budget", f"{estimate:.1f} s estimated, {budget.left():.1f} s left")
            return
        begun = time.monotonic()
        try:
            run()
        except torch.cuda.OutOfMemoryError as error:
            self.skip(cell, "memory", str(error))
            torch.cuda.empty_cache()
        except Exception as error:
            self.failed(cell, error)
        budget.learn(estimate, time.monotonic() - begun)

    def failed(self, cell: Any, error: Exception) -> None:
        """Record an error. Raises `DeviceLost` where the device answers no more."""
        self.skip(cell, "error", f"{type(error).__name__}: {error}")
        self.tell(f"{cell}: {type(error).__name__}: {error}")
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as lost:
                raise DeviceLost(f"{self.name} failed in {cell}: start again with --resume") from lost

    def finish(self) -> None:
        """Say in part<N>_device.csv how long the part took, and why passes ran without graphs, if any did."""
        problems = self.recorder.problems
        self.devices.rows[-1:] = []
        seconds = time.monotonic() - self.begun
        self.devices.keep(lambda row: True).add(
            self._device() | {"seconds": seconds, "graph_problem": problems[0] if problems else None}
        )

    def _device(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        memory = torch.cuda.get_device_properties(self.device).total_memory if cuda else None
        row = {"device": self.name, "dtype": self.dtype_name, "torch": torch.__version__, "triton": _triton_version()}
        return row | {"memory_bytes": memory, **self.peaks, "part": self.part, "graphs": int(self.recorder.enabled)}


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
