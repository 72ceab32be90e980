"""Closed forms and brute-force references for the tests, written from the formulas alone: numpy, no diffspec."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class AffineLoop:
    """Open loop whose residence time is c1 + c2*B: the published Eq 1, L = c1/(1 - rate*c2), and its derivatives."""

    c1: float
    c2: float

    def latency(self, rate):
        return self.c1 / (1.0 - rate * self.c2)

    @property
    def capacity(self) -> float:
        return 1.0 / self.c2

    def log_gradient(self, rate) -> np.ndarray:
        """d log L / d (log c1, log c2, log rate)."""
        u = rate * self.c2
        return np.array([1.0, u / (1.0 - u), u / (1.0 - u)])

    def log_hessian(self, rate) -> np.ndarray:
        """Second derivatives of log L in (log c1, log c2, log rate)."""
        u = rate * self.c2
        bend = u / (1.0 - u) ** 2
        return np.array([[0.0, 0.0, 0.0], [0.0, bend, bend], [0.0, bend, bend]])


def published_speedup(c1_ratio, c2_ratio, r):
    """Eq 2: (1 - C2R*r) / (C1R*(1 - r))."""
    return (1.0 - c2_ratio * r) / (c1_ratio * (1.0 - r))


def published_breakeven(c1_ratio, c2_ratio):
    """r* = (1 - C1R)/(C2R - C1R)."""
    return (1.0 - c1_ratio) / (c2_ratio - c1_ratio)


@dataclass(frozen=True)
class PublishedEquation3:
    """Six coefficients: Ci_eff = ci_prefill + (output/E)*(ci_verify + k*ci_draft), i = 1, 2."""

    prefill: tuple[float, float]
    verify: tuple[float, float]
    draft: tuple[float, float]

    def loop(self, output: float, acceptance: float, k: int) -> AffineLoop:
        steps = output / geometric_tokens(acceptance, k)
        return AffineLoop(
            *(p + steps * (v + k * d) for p, v, d in zip(self.prefill, self.verify, self.draft, strict=True))
        )


def published_equation4_gap(batch, rate, steps, c1, c2, tokens_per_sequence, active_share):
    """batch - rate*residence for Eq 4 with c = (uncovered, increment) and phi = 1-(1-m/M)^(batch*tokens)."""
    phi = 1.0 - (1.0 - active_share) ** (batch * tokens_per_sequence)
    return batch - rate * steps * (c1[0] + phi * c1[1] + batch * (c2[0] + phi * c2[1]))


def geometric_tokens(alpha: float, k: int) -> float:
    """E = sum_{j=0..k} alpha^j for whole k: no cancellation, also at alpha = 0 and 1."""
    return math.fsum(alpha**j for j in range(k + 1))


def geometric_tokens_slope(alpha: float, k: int) -> float:
    """dE/dalpha for whole k."""
    return math.fsum(j * alpha ** (j - 1) for j in range(1, k + 1))


def tokens_near_one(miss: float, k: float, terms: int = 40) -> tuple[float, float]:
    """(E, dE/dalpha) for real k at alpha = 1 - miss, from the binomial series of (1-(1-miss)^(k+1))/miss."""
    value = slope = 0.0
    binomial = k + 1.0  # C(k+1, i+1) at i = 0
    for i in range(terms):
        value += binomial * (-miss) ** i
        if i:
            slope += i * binomial * (-miss) ** (i - 1)
        binomial *= (k - i) / (i + 2.0)
    return value, slope


def chain_pmf(rates) -> np.ndarray:
    """P(a step emits t tokens), t = 1..k+1, with conditional acceptance rates[0..k-1]: run of successes, then stop."""
    reached = np.concatenate([[1.0], np.cumprod(rates)])
    stop = np.concatenate([1.0 - np.asarray(rates), [1.0]])
    return reached * stop


def simulate_steps(rates, output_length: int, n: int, seed: int) -> np.ndarray:
    """Steps of n simulated requests: each step tosses the draft positions in turn until one is rejected."""
    rng = np.random.default_rng(seed)
    need = np.full(n, output_length - 1)
    steps = np.zeros(n, int)
    while np.any(need > 0):
        accepted = np.cumprod(rng.random((n, len(rates))) < np.asarray(rates), axis=1).sum(axis=1)
        steps += need > 0
        need = need - accepted - 1
    return steps


def route_by_systematic_sampling(popularity, tokens: int, n: int, seed: int) -> np.ndarray:
    """(n, experts) bool: experts read by n steps of `tokens` tokens, each token taking exactly m = sum(p) experts."""
    edges = np.concatenate([[0.0], np.cumsum(popularity)])
    m = round(edges[-1])
    rng = np.random.default_rng(seed)
    points = rng.random((n, tokens, 1)) + np.arange(m)  # expert e is hit with probability p_e
    hits = np.searchsorted(edges, points, side="right") - 1
    read = np.zeros((n, len(popularity)), bool)
    read[np.arange(n)[:, None], hits.reshape(n, -1)] = True
    return read


def processor_sharing_latency(residence: Callable, rate: float, truncation: int) -> float:
    """L = E[n]/rate of the birth-death chain with births at `rate` and deaths at n/residence(n) in state n >= 1."""
    n = np.arange(1, truncation + 1)
    log_weight = np.concatenate([[0.0], np.cumsum(np.log(rate * residence(n) / n))])
    weight = np.exp(log_weight - log_weight.max())
    return float(weight[1:] @ n / weight.sum() / rate)


def fluid_batch_seen(rate: float, residence: float, n_requests: float, points: int = 20001) -> float:
    """Batch seen in a finite run, time-averaged over a request's stay: integral of N(t)^2 over that of N(t).

    n requests arrive evenly during n/rate and stay `residence`: N(t) = rate * (time in which those present arrived).
    """
    window = n_requests / rate
    corners = np.unique([0.0, min(window, residence), max(window, residence), window + residence])
    time = np.unique(np.concatenate([np.linspace(a, b, points) for a, b in pairwise(corners)]))
    in_flight = rate * (np.minimum(time, window) - np.maximum(time - residence, 0.0))
    return float(np.trapezoid(in_flight**2, time) / np.trapezoid(in_flight, time))


@cache  # an equilibrium asks for it at every iteration
def chain_steps(output: float, alpha: float, k: int) -> float:
    """Steps of a request whose drafted tokens are each accepted with probability alpha."""
    pmf = chain_pmf(np.full(k, alpha))
    tokens = np.arange(1, k + 2)
    m1, m2 = pmf @ tokens, pmf @ tokens**2
    return (output - 1 + (m2 / m1 - 1) / 2) / m1


@dataclass(frozen=True)
class ReferenceServer:
    """A dense server in plain floats: roofline verification, chain drafter, shared prefill (open loop, Poisson)."""

    weight_read: float
    token_compute: float
    kv_read: float
    sharpness: float
    step_overhead: float
    pass_base: float
    prefill_token: float
    request_overhead: float
    first_token_steps: float

    def step(self, n: float, prompt: float, output: float, k: int) -> float:
        memory = self.weight_read + self.kv_read * n * (prompt + output / 2)
        compute = self.token_compute * n * (k + 1)
        verify = (memory**self.sharpness + compute**self.sharpness) ** (1 / self.sharpness)
        return self.step_overhead + verify + k * self.pass_base

    def steps(self, output: float, alpha: float, k: int) -> float:
        return chain_steps(output, alpha, k)

    def residence(self, batch: float, prompt: float, output: float, alpha: float, k: int) -> float:
        """Time in service of a request that finds `batch` others on average."""
        steps = self.steps(output, alpha, k) + self.first_token_steps * batch / (1 + batch)
        prefill = self.prefill_token * prompt * (1 + batch)
        return self.request_overhead + prefill + steps * self.step(batch + 1, prompt, output, k)
