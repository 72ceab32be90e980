"""CUDA graphs, timings, and the peaks of the device that the roofline is drawn with."""

import time
from collections.abc import Callable

import numpy as np
import torch


def wait(device: torch.device) -> None:
    """Until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Recorder:
    """Turns functions into CUDA graphs that share one memory pool. On a CPU, and where capturing fails or is not
    allowed, the function itself is what runs."""

    def __init__(self, device: torch.device, enabled: bool = True):
        self.device = device
        self.enabled = enabled and device.type == "cuda"  # until three recordings have failed
        self.pool = torch.cuda.graph_pool_handle() if self.enabled else None
        self.problems: list[str] = []

    def record(self, function: Callable[[], None], graph_safe: bool = True) -> tuple[Callable[[], None], bool]:
        """(what to call to run `function`, whether it is a graph). `function` takes its inputs from fixed buffers and
        leaves its results in fixed buffers. It is run once before, so that kernels are compiled."""
        function()
        wait(self.device)
        if not (self.enabled and graph_safe):
            return function, False
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                function()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize()  # raises if the device itself is lost
            self.problems.append(str(error).split("\n")[0])
            self.enabled = len(self.problems) < 3
            return function, False
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay, True


def time_runs(
    run: Callable[[], None], device: torch.device, seconds: float, least: int = 5, most: int = 50
) -> np.ndarray:
    """Durations [s] of between `least` and `most` runs, about `seconds` in all, after two that are not counted."""
    run()
    wait(device)
    begun = time.perf_counter()
    run()
    wait(device)
    count = int(min(max(seconds / max(time.perf_counter() - begun, 1e-6), least), most))
    if device.type != "cuda":
        times = []
        for _ in range(count):
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
        return np.array(times)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for first, last in events:
        first.record()
        run()
        last.record()
    torch.cuda.synchronize()
    return np.array([first.elapsed_time(last) for first, last in events]) * 1e-3


def peaks(device: torch.device, dtype: torch.dtype, tiny: bool = False) -> dict[str, float]:
    """Measured ceilings: `copy_bandwidth` (bytes read and written), `read_bandwidth` (a sum), their larger one as
    `bandwidth` [B/s], and `matmul_rate` [1/s], a square matrix product of random numbers. Medians."""
    elements, side = (1 << 20, 128) if tiny else (1 << 31, 8192)
    source = torch.empty(elements, device=device, dtype=dtype).normal_()
    target = torch.empty_like(source)
    size = source.element_size()
    copy = float(np.median(time_runs(lambda: target.copy_(source), device, 0.2)))
    del target
    rows = source.view(-1, 1024)
    read = float(np.median(time_runs(lambda: rows.sum(dim=1), device, 0.2)))
    del source, rows
    left, right = (torch.empty(side, side, device=device, dtype=dtype).normal_() for _ in range(2))
    product = float(np.median(time_runs(lambda: torch.mm(left, right), device, 0.3)))
    found = {"copy_bandwidth": 2 * elements * size / copy, "read_bandwidth": elements * size / read}
    return found | {"bandwidth": max(found.values()), "matmul_rate": 2.0 * side**3 / product}
