"""What the claims are judged by: models before any trace, measured step times, and points served by a real engine.

See claims.py for what each source is.
"""

import csv
import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

jax.config.update("jax_enable_x64", True)
HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(REPOSITORY))

from scipy.optimize import brentq  # noqa: E402

from diffspec.analysis.before_traces import before_traces  # noqa: E402
from diffspec.architecture import Transformer, read_architecture  # noqa: E402
from diffspec.batch_state import BatchState  # noqa: E402
from diffspec.boundaries.boundary import boundary  # noqa: E402
from diffspec.first_principles import FirstPrinciples  # noqa: E402
from diffspec.hardware import Accelerator, accelerator  # noqa: E402

LENGTHS = {"prompt_length": 1024.0, "output_length": 256.0}
DRAFTERS = {"draft-1b": "1.2B model", "draft-0.5b": "0.5B model", "eagle-8b": "EAGLE head"}
CELL_LENGTHS = (1, 3, 5, 7)
"""Draft lengths of the cells."""
DATA_CENTRE, OTHERS = ("a100", "h100", "h200", "b200"), ("l4", "a10g", "rtx-3090", "rtx-4090", "rtx-5090")


class Grid(NamedTuple):
    """How finely first principles are asked: ``points`` of an axis, and loads."""

    points: int = 13
    batches: tuple[float, ...] = (1.0, 4.0, 16.0, 64.0)


FULL = Grid()

# --- the models asked about before any trace ------------------------------------------------------------------------

LLAMA_8B = read_architecture(REPOSITORY / "data" / "configs" / "llama-3.1-8b.json")
LLAMA_1B = read_architecture(REPOSITORY / "data" / "configs" / "llama-3.2-1b.json")
LLAMA_3B = Transformer("Llama-3.2-3B", 28, 3072, 128256, 24, 8, 128, 8192, tied=True)
LLAMA_70B = Transformer("Llama-3.1-70B", 80, 8192, 128256, 64, 8, 128, 28672)
MOE = Transformer(  # Qwen3-30B-A3B
    *("30B-A3B, 128 experts", 48, 2048, 151936, 32, 4, 128, 0),
    **{"moe_layers": 48, "num_experts": 128, "experts_per_token": 8, "expert_intermediate": 768},
)


def pairs(hardware: str = "h100") -> dict[str, FirstPrinciples]:
    """Verifier and drafter on this hardware; the 70B verifier on four devices."""
    device = accelerator(hardware)
    return {
        "8B + 1B": FirstPrinciples(LLAMA_8B, device, LLAMA_1B, **LENGTHS),
        "8B + EAGLE head": FirstPrinciples(LLAMA_8B, device, drafter_kind="head", **LENGTHS),
        "70B + 8B": FirstPrinciples(LLAMA_70B, device, LLAMA_8B, tensor_parallel=4, **LENGTHS),
        "70B + 1B": FirstPrinciples(LLAMA_70B, device, LLAMA_1B, tensor_parallel=4, **LENGTHS),
    }


def map_of(pair: FirstPrinciples, axes: dict[str, Any], **asked: Any) -> dict[str, Any]:
    """A map before any trace, without draws."""
    lengths = {name: value for name, value in LENGTHS.items() if name not in axes}
    return boundary(before_traces(pair), axes, draws=0, **lengths | asked)


def step_gain(pair: FirstPrinciples, batch: float, alpha: float, k: int, step=None) -> float:
    """Tokens a second of ``batch`` decoding requests with drafts of ``k`` over those without."""
    step = pair.step_time() if step is None else step

    def time(length: float) -> float:
        state = BatchState(
            sequences=batch,
            query_tokens=batch * (length + 1.0),
            kv_tokens=batch * pair.context,
            draft_passes=length,
            draft_tokens=batch * length,
        )
        return float(step(state).total)

    return emitted(alpha, k) * time(0.0) / time(float(k))


def emitted(alpha: float, k: int) -> float:
    """E(k) = 1 + alpha + ... + alpha^k, tokens a step."""
    return float(sum(alpha**j for j in range(k + 1)))


def shrunk(verifier: Transformer, ratio: float) -> Transformer:
    """A drafter of the verifier's shape with about ``ratio`` times its weights outside the embedding."""
    scale = ratio ** (1.0 / 3.0)
    heads = max(round(verifier.heads * scale), 1)
    return dataclasses.replace(
        verifier,
        name=f"{verifier.name} x {ratio:.3g}",
        layers=max(round(verifier.layers * scale), 1),
        hidden=heads * verifier.head_dim,
        heads=heads,
        kv_heads=max(min(verifier.kv_heads, heads), 1),
        intermediate=round(verifier.intermediate * scale),
        tied=True,
    )


RATIOS = (1 / 4, 1 / 7, 1 / 10, 1 / 14, 1 / 20, 1 / 40, 1 / 80)


def family(hardware: str = "h100") -> dict[float, FirstPrinciples]:
    """Drafters of a 70B verifier on four devices, by the ratio asked for."""
    device = accelerator(hardware)
    return {
        ratio: FirstPrinciples(LLAMA_70B, device, shrunk(LLAMA_70B, ratio), tensor_parallel=4, **LENGTHS)
        for ratio in RATIOS
    }


def best_step_gain(pair: FirstPrinciples, batch: float, alpha: float, step=None) -> tuple[float, int]:
    """(gain, draft length) of the best draft of 1 to 10 tokens."""
    step = pair.step_time() if step is None else step
    return max((step_gain(pair, batch, alpha, k, step), k) for k in range(1, 11))


def scaled_bandwidth(device: Accelerator, factor: float) -> Accelerator:
    """The same device with another memory bandwidth."""
    return dataclasses.replace(
        device, name=f"{device.name} x {factor:g}", memory_bandwidth=factor * device.memory_bandwidth
    )


# --- measured -------------------------------------------------------------------------------------------------------


def cells() -> list[dict[str, Any]]:
    """Measured cells: drafter, batch, context, and for each draft length what a step costs over one without a draft."""
    times = {}
    with (REPOSITORY / "experiments" / "03_measure_gpu" / "results" / "part1_step_cost.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["model"], int(row["batch"]), int(row["tokens_per_request"]), int(row["context"])
            times[key] = float(row["step_time_s"])
    found = []
    for drafter in DRAFTERS:
        for model, batch, tokens, context in sorted(times):
            if (model, tokens) != (drafter, 1) or ("dense-8b", batch, 1, context) not in times:
                continue
            plain, one = times["dense-8b", batch, 1, context], times[drafter, batch, 1, context]
            costs = {k: (times["dense-8b", batch, k + 1, context] + k * one) / plain for k in CELL_LENGTHS}
            found.append({"drafter": drafter, "batch": batch, "context": context, "cost": costs, "draft": one / plain})
    return found


def cell_gain(cell: dict[str, Any], alpha: float, lengths=CELL_LENGTHS) -> tuple[float, int]:
    """(gain of the best draft length, that length)."""
    return max((emitted(alpha, k) / cell["cost"][k], k) for k in lengths)


def cell_break_even(cell: dict[str, Any]) -> float:
    """Acceptance above which the best draft length gains; 1 where even full acceptance loses."""
    if cell_gain(cell, 1.0)[0] <= 1.0:
        return 1.0
    return float(brentq(lambda alpha: cell_gain(cell, alpha)[0] - 1.0, 0.0, 1.0, xtol=1e-10))


def served(table: str) -> dict[str, dict[str, str]]:
    """Rows of a measured table by run."""
    with (REPOSITORY / "data" / f"{table}.csv").open(newline="", encoding="utf-8") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def speedup(rows: dict[str, dict[str, str]], run: str, plain: str) -> float:
    """Measured mean end-to-end latency without speculation over that with it."""
    return float(rows[plain]["e2e_mean"]) / float(rows[run]["e2e_mean"])


def span(values) -> str:
    """The smallest and the largest of values, as text."""
    values = [float(value) for value in values]
    return f"{min(values):.2f} to {max(values):.2f}"


def told(claim: str, verdict: str, holds: str, fails: str, source: str, **data: Any) -> dict[str, Any]:
    return {"claim": claim, "verdict": verdict, "holds": holds, "fails": fails, "source": source, "data": data}
