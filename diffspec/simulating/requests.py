"""Requests to simulate: when they arrive and how long they are, drawn from a seed or given by a trace."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from diffspec.results import InputError
from diffspec.workload import Workload

LengthLaw = Literal["fixed", "geometric", "lognormal"]
LONGEST = 1_000_000


@dataclass(frozen=True)
class Requests:
    """``arrival_time`` [s], nondecreasing (None: a closed loop), ``prompt_tokens`` and ``output_tokens`` [tok] >= 1.

    ``leniency`` [1], if given, multiplies every conditional acceptance rate of a request: some texts are easier to
    draft than others. The simulator clips the product at 1. ``longest_draft`` [tok], if given, limits the engine's
    draft length for each request.
    """

    prompt_tokens: Int[np.ndarray, "n"]
    output_tokens: Int[np.ndarray, "n"]
    arrival_time: Float[np.ndarray, "n"] | None = None
    leniency: Float[np.ndarray, "n"] | None = None
    longest_draft: Int[np.ndarray, "n"] | None = None

    def __post_init__(self):
        n = len(self.prompt_tokens)
        for name in ("output_tokens", "arrival_time", "leniency", "longest_draft"):
            values = getattr(self, name)
            if values is not None and len(values) != n:
                raise InputError(f"{name}: got {len(values)} values for {n} requests; allowed: one each")
        for name in ("prompt_tokens", "output_tokens"):
            values = getattr(self, name)
            if n == 0 or values.min() < 1 or values.max() > LONGEST:
                raise InputError(f"{name}: allowed: at least one request, each of 1 to {LONGEST} tokens")
        times = self.arrival_time
        if times is not None and not (np.all(np.isfinite(times)) and np.all(np.diff(times) >= 0)):
            raise InputError("arrival_time: allowed: finite and nondecreasing seconds; sort the requests by arrival")

    def __len__(self) -> int:
        return len(self.prompt_tokens)


def draw_requests(
    workload: Workload,
    n_requests: int,
    random: np.random.Generator,
    *,
    output_law: LengthLaw = "fixed",
    prompt_law: LengthLaw = "fixed",
    prompt_scv: float = 0.0,
    leniency_scv: float = 0.0,
) -> Requests:
    """``n_requests`` drawn from ``workload``.

    * gaps: gamma with mean 1/arrival_rate and squared coefficient of variation arrival_scv (1: Poisson, 0: constant);
      a closed loop has none
    * lengths: ``fixed``; ``geometric`` on 1, 2, ... (scv about 1); ``lognormal`` with workload.output_scv or
      ``prompt_scv``, rounded to whole tokens with the mean kept
    * ``leniency_scv``: spread over requests of how easily they are drafted (gamma, mean 1)
    """
    arrival = None
    if workload.is_open:
        arrival = np.cumsum(draw_gaps(float(workload.arrival_rate), float(workload.arrival_scv), n_requests, random))  # type: ignore[arg-type]
    return Requests(
        draw_lengths(float(workload.prompt_length), prompt_law, prompt_scv, n_requests, random),
        draw_lengths(float(workload.output_length), output_law, float(workload.output_scv), n_requests, random),
        arrival,
        None if leniency_scv == 0 else random.gamma(1.0 / leniency_scv, leniency_scv, n_requests),
    )


def draw_arrivals(
    rates: Sequence[tuple[float, float]], random: np.random.Generator, scv: float = 1.0
) -> Float[np.ndarray, "n"]:
    """Arrival times [s] of a load that changes: ``rates`` = (time [s], arrival rate [req/s]) from time 0 on, joined
    linearly; two entries at one time are a jump (a burst begins or ends).

    Unit-rate gaps (gamma, ``scv``; 1: Poisson) are stretched by the inverse of the cumulated rate, which is exact:
    Lambda(t) = int_0^t rate, arrivals at Lambda^-1(1st gap), Lambda^-1(1st + 2nd gap), ... until the last time.

    >>> ramp = draw_arrivals([(0.0, 1.0), (100.0, 9.0)], np.random.default_rng(0))
    >>> 450 < len(ramp) < 550 and float((ramp < 50.0).mean()) < 0.35  # 500 on average, 150 of them in the first half
    True
    """
    time, rate = (np.asarray(column, dtype=float) for column in zip(*rates, strict=True))
    good = (
        time.size > 1 and time[0] == 0 and np.all(np.diff(time) >= 0) and np.all(np.isfinite(rate)) and rate.min() >= 0
    )
    span = np.diff(time)
    grown = np.concatenate([[0.0], np.cumsum(0.5 * (rate[1:] + rate[:-1]) * span)])
    if not good or grown[-1] <= 0:
        raise InputError(
            f"rates: got {list(rates)}; allowed: (time, rate) from 0 s on, nondecreasing times, rates >= 0"
        )
    count = int(grown[-1] + 10.0 * np.sqrt(max(scv, 1.0) * grown[-1]) + 20.0)
    reached = np.cumsum(draw_gaps(1.0, scv, count, random))
    reached = reached[reached < grown[-1]]
    part = np.searchsorted(grown, reached, side="right") - 1
    left = reached - grown[part]
    slope = (rate[part + 1] - rate[part]) / np.where(span[part] > 0, span[part], 1.0)
    root = np.sqrt(np.maximum(rate[part] ** 2 + 2.0 * slope * left, 0.0))
    return time[part] + 2.0 * left / np.maximum(rate[part] + root, 1e-300)


def from_arrivals(
    arrival_time: Float[np.ndarray, "n"],
    prompt_tokens: Int[np.ndarray, "n"] | float | int,
    output_tokens: Int[np.ndarray, "n"] | float | int,
) -> Requests:
    """Requests at given times [s] (drawn by :func:`draw_arrivals`, or of a recorded trace), their lengths given each or
    one for all [tok]."""
    count = len(arrival_time)
    prompts, outputs = (
        np.broadcast_to(np.asarray(value).astype(np.int64), count) for value in (prompt_tokens, output_tokens)
    )
    return Requests(prompts, outputs, np.asarray(arrival_time, dtype=float))


def draw_gaps(rate: float, scv: float, n: int, random: np.random.Generator) -> Float[np.ndarray, "n"]:
    """Gaps between arrivals [s]: gamma with mean 1/rate and the given squared coefficient of variation."""
    if scv == 0.0:
        return np.full(n, 1.0 / rate)
    return random.gamma(1.0 / scv, scv / rate, n)


def draw_lengths(mean: float, law: LengthLaw, scv: float, n: int, random: np.random.Generator) -> Int[np.ndarray, "n"]:
    """Whole lengths >= 1 with the given mean [tok]; a fixed fractional mean alternates between its neighbours."""
    if law == "geometric":
        return random.geometric(1.0 / max(mean, 1.0), n)
    if law == "lognormal" and scv > 0:
        spread = np.log1p(scv)
        values = random.lognormal(np.log(mean) - 0.5 * spread, np.sqrt(spread), n)
    else:
        values = np.full(n, mean)
    whole = np.floor(values)
    return np.clip(whole + (random.random(n) < values - whole), 1, LONGEST).astype(np.int64)
