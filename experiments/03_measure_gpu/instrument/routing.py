"""Expert coverage and step time against routing skew: popularity imposed on the router's choice."""

from collections.abc import Iterable

import numpy as np
import torch

from .experts import draw_experts, expected_coverage, popularity
from .grid import Budget, RoutingCell
from .session import Session
from .shapes import uniform_coverage, work
from .step_cost import Bench, roofline_columns
from .tables import Table, spread
from .timing import time_runs

COLUMNS = (
    *("device", "model", "dtype", "skew", "batch", "tokens_per_request", "context", "tokens", "draws"),
    *("coverage_measured", "coverage_formula", "coverage_uniform", "load_imbalance", "step_time_s", "p10", "p90", "n"),
    *("bytes", "flops", "roofline_time_s", "ratio", "graph"),
)
KEY = ("model", "skew", "batch", "tokens_per_request")
CONTEXT, DRAWS, SAMPLE = 1024, 5, 20_000


class ImposedRouting:
    """Draws experts by a Zipf-like popularity, a ranking of its own in each layer, into a buffer that recorded passes
    read. Inside `with`, the model of `bench` routes as drawn."""

    def __init__(self, bench: Bench, most_tokens: int):
        self.bench, self.shape, device = bench, bench.model.shape, bench.model.device
        self.generator = torch.Generator(device=device).manual_seed(4)
        size = (self.shape.layers, most_tokens, self.shape.experts_per_token)
        self.ids = torch.zeros(size, dtype=torch.int64, device=device)
        order = torch.rand(self.shape.layers, self.shape.experts, device=device, generator=self.generator)
        self.ranking = order.argsort(dim=1)  # [layers, rank] -> expert

    def _ranks(self, skew: float, tokens: int) -> torch.Tensor:
        share = popularity(self.shape.experts, skew).to(self.ids.device)
        return draw_experts(tokens, self.shape.experts_per_token, share, self.generator)

    def hit_probability(self, skew: float) -> torch.Tensor:
        """P(a token is routed to the expert of each rank), by sampling; sums to experts_per_token."""
        ranks = self._ranks(skew, SAMPLE)
        return torch.bincount(ranks.flatten(), minlength=self.shape.experts).double() / SAMPLE

    def draw(self, skew: float, tokens: int) -> tuple[float, float]:
        """Fill the buffer for `tokens` tokens; returns mean coverage, and mean of largest/mean tokens of an expert."""
        ranks = self._ranks(skew, self.shape.layers * tokens).view(self.shape.layers, -1)
        ids = self.ranking.gather(1, ranks)
        self.ids[:, :tokens] = ids.view(self.shape.layers, tokens, -1)
        loads = torch.zeros(self.ranking.shape, device=ids.device).scatter_add_(
            1, ids, torch.ones(ids.shape, device=ids.device)
        )
        covered = (loads > 0).float().mean()
        return float(covered), float((loads.amax(dim=1) / loads.mean(dim=1)).mean())

    def __enter__(self) -> "ImposedRouting":
        self.bench.model.imposed = self.ids
        return self

    def __exit__(self, *_: object) -> None:
        self.bench.model.imposed = None


def measure(
    session: Session, bench: Bench, cells: Iterable[RoutingCell], table: Table, budget: Budget, seconds: float
) -> None:
    """Measure the cells that `table` has not yet, as far as the budget goes; `seconds` of replays for each."""
    cells, shape = list(cells), bench.model.shape
    context = 64 if session.tiny else CONTEXT
    value_bytes = 4 if session.dtype == torch.float32 else 2
    with ImposedRouting(bench, max(cell.batch * cell.tokens for cell in cells)) as imposed:
        for cell in cells:
            tokens = cell.batch * cell.tokens
            identity = {"model": shape.name, "skew": cell.skew, "batch": cell.batch, "tokens_per_request": cell.tokens}
            if table.has(**identity):
                continue

            def run(cell=cell, tokens=tokens, identity=identity) -> None:
                imposed.draw(cell.skew, tokens)
                recorded, graph = bench.recording(cell.batch, cell.tokens, context, True)
                drawn, times = [], []
                for _ in range(DRAWS):
                    drawn.append(imposed.draw(cell.skew, tokens))
                    times.append(time_runs(recorded, session.device, seconds / DRAWS, most=20))
                covered, imbalance = np.mean(drawn, axis=0).tolist()
                measured = spread(np.concatenate(times))
                needed = work(shape, cell.batch, cell.tokens, context, value_bytes, coverage=covered)
                table.add(
                    {"device": session.name, "dtype": session.dtype_name, **identity, "context": context}
                    | {"tokens": tokens, "draws": DRAWS, "coverage_measured": covered, "load_imbalance": imbalance}
                    | {"coverage_formula": expected_coverage(imposed.hit_probability(cell.skew), tokens)}
                    | {"coverage_uniform": uniform_coverage(shape.experts, shape.experts_per_token, tokens)}
                    | {**measured, "graph": int(graph)}
                    | roofline_columns(session, needed.bytes, needed.flops, measured["step_time_s"])
                )

            session.attempt(cell, budget, 0.5 + 2 * seconds, run)


def summary(table: Table) -> list[str]:
    """A short table, step time in milliseconds."""
    lines = [f"{'skew':>6}{'batch':>7}{'tokens':>8}{'coverage':>10}{'formula':>9}{'uniform':>9}{'ms':>9}"]
    for row in sorted(table.rows, key=lambda row: (int(row["tokens"]), int(row["batch"]), float(row["skew"]))):
        shares = "".join(f"{float(row[f'coverage_{name}']):>9.3f}" for name in ("measured", "formula", "uniform"))
        lines.append(
            f"{row['skew']:>6}{row['batch']:>7}{row['tokens']:>8} {shares}{1e3 * float(row['step_time_s']):>9.2f}"
        )
    return lines
