"""What is measured: one entry a server, with the cells that are sent to it, most informative first.

Conditional acceptance falls along the draft, as real drafters' does; servers of different draft lengths share one
curve. Requests are 64 tokens in and 64 out unless a cell says otherwise. Arms that are compared share verifier, caps
and seeds: draft length 0 is the arm without speculation.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

FALLING = (0.95, 0.85, 0.75, 0.65, 0.55, 0.45)
LOW = (0.6,) * 6
USUAL = "imposed_4m"
"""The drafter of each verifier's main deployment; other drafters make deployments of their own."""
NATURAL = None
"""Standard, lossless rejection: what the drafter earns."""


@dataclass(frozen=True)
class Arm:
    """One server: names of the models, draft length, conditional acceptance imposed per position (None: standard
    rejection), batch cap, and the grid of cells in the form of a `diffspec collect` plan."""

    name: str
    verifier: str
    grid: list[dict[str, Any]]
    drafter: str | None = None
    draft_length: int = 0
    acceptance: tuple[float, ...] | None = None
    max_num_seqs: int = 64

    def marginal(self) -> list[float] | None:
        """P(first i draft tokens accepted), as the engine wants it."""
        if self.acceptance is None or self.draft_length == 0:
            return None
        return [math.prod(self.acceptance[: i + 1]) for i in range(self.draft_length)]


def open_loop(
    rates: Iterable[float], prompt: int = 64, output: int = 64, seconds: float = 17.0, **more: Any
) -> list[dict]:
    """Cells of Poisson arrivals of about `seconds` each, at least 30 requests."""
    return [
        {
            "arrival_rate": rate,
            "prompt_length": prompt,
            "output_length": output,
            "requests": max(30, round(seconds * rate)),
        }
        | more
        for rate in rates
    ]


def closed_loop(users: Iterable[int], prompt: int = 64, output: int = 64, **more: Any) -> list[dict]:
    """Cells with a fixed number of requests in flight: six requests a place, at least 16."""
    return [
        {"concurrency": count, "prompt_length": prompt, "output_length": output, "requests": max(16, 6 * count)} | more
        for count in users
    ]


def bursty(rates: Iterable[float]) -> list[dict]:
    """The same mean rate in bursts (scv 4) and without any randomness."""
    cells = open_loop(rates, arrival_process="gamma", arrival_scv=4.0)
    return cells + open_loop(rates, arrival_process="constant")


def spec(name: str, k: int, grid: list[dict], **more: Any) -> Arm:
    """An arm of the small verifier with the middle drafter and falling acceptance."""
    return Arm(name, "small", grid, **({"drafter": USUAL, "draft_length": k, "acceptance": FALLING} | more))


LONG = [*open_loop([1.0], 512), *closed_loop([4], 512), *open_loop([1.2], 1024, 32)]
REPEATED = [*open_loop([6.0], repeats=3), *closed_loop([8], repeats=3)]
ARMS: tuple[Arm, ...] = (
    Arm(
        "k0",
        "small",
        [*REPEATED, *open_loop([1.0, 3.0, 8.0, 9.0]), *closed_loop([1, 4, 16, 32]), *LONG, *bursty([6.0])],
    ),
    spec("k4", 4, [*REPEATED, *open_loop([1.0, 3.0, 7.0, 8.0]), *closed_loop([1, 4, 16, 32]), *LONG, *bursty([6.0])]),
    spec("k2", 2, [*open_loop([3.0, 6.0, 8.0]), *closed_loop([1, 8, 32])]),
    Arm("k0_cap8", "small", [*open_loop([7.0]), *closed_loop([16])], max_num_seqs=8),
    spec("k4_cap8", 4, [*open_loop([6.0]), *closed_loop([16])], max_num_seqs=8),
    Arm("k0_cap16", "small", [*open_loop([9.0]), *closed_loop([32])], max_num_seqs=16),
    spec("k4_cap16", 4, [*open_loop([7.0]), *closed_loop([32])], max_num_seqs=16),
    Arm("moe_k0", "moe", [*open_loop([1.5, 4.0]), *closed_loop([1, 4, 16])]),
    Arm("moe_k4", "moe", [*open_loop([1.5, 4.0]), *closed_loop([1, 4, 16])], USUAL, 4, FALLING),
    Arm("moe_k2", "moe", [*open_loop([4.0]), *closed_loop([1, 16])], USUAL, 2, FALLING),
    Arm("large_k0", "large", [*open_loop([2.2]), *closed_loop([1, 8])]),
    *(
        Arm(f"{verifier}_{size}", verifier, [*open_loop([rate]), *closed_loop([1, 8])], f"imposed_{size}", 4, FALLING)
        for verifier, rate, sizes in (("large", 2.2, ("1m", "4m", "17m")), ("small", 4.0, ("1m", "17m")))
        for size in sizes
    ),
    *(
        Arm(f"{verifier}_first_{layers}", verifier, closed_loop([1, 4]), f"{verifier}_first_{layers}", 4, NATURAL)
        for verifier in ("small", "large")
        for layers in (1, 2, 4)
    ),
    spec("k6", 6, [*open_loop([3.0, 6.0]), *closed_loop([1, 8])]),
    spec("k4_low", 4, [*open_loop([3.0, 4.5]), *closed_loop([1, 8])], acceptance=LOW),
)
