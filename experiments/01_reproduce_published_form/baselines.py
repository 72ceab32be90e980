"""The published forms, fitted on their own: nothing here comes from diffspec.

Each form says that the mean latency is linear in the requests in flight n, with coefficients linear in the unknowns:

    L(n) = C1 + n*C2,   Ci = sum_j c_j * (plain_i[j] + coverage(T)*covered_i[j]),   c_j >= 0

In a closed loop n is the concurrency. In an open loop Little's law closes it, n = arrival_rate*L, which without
coverage is L = C1/(1 - arrival_rate*C2). With coverage (mixture of experts), phi = 1 - (1 - m/M)^T over the
T = n*(k+1) tokens of a step, it is a fixed point, found by bisection. Nothing here waits above a cap or knows how long
a run was.

| form | on paper | unknowns |
|---|---|---|
| `Eq 1` | C1, C2 of their own for each (draft length, acceptance, lengths) | 2 for each |
| `Eq 3` | Ci = ci_prefill + (output_length/E)*(ci_verify + k*ci_draft) | 6 |
| `Eq 3 lengths` | the same, c2_prefill scaled by the prompt and c2_verify by prompt + output/2, as published | 6 |
| `Eq 4` | Eq 3 with ci_verify split into a part without and a part with coverage | 8 |
| `linear step` | a step of t0 + d0*k + n*(t1*(k+1) + t2*context + d1*k), and prefill of n prompts | 6 |

E: tokens per step of the row (1 without speculation).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares, nnls

STARTS = 4
FLATTEST = 0.02
"""1/(1 - x) goes on in a straight line above x = 1 - FLATTEST while fitting, so that overload stays finite."""


@dataclass(frozen=True)
class Rows:
    """Operating points as arrays of one length. ``users``: concurrency, NaN in an open loop; ``share``: experts of a
    token over all experts (m/M), NaN for dense models; ``group``: rows alike in it share acceptance."""

    arrival_rate: np.ndarray
    users: np.ndarray
    draft_length: np.ndarray
    tokens_per_step: np.ndarray
    prompt_length: np.ndarray
    output_length: np.ndarray
    share: np.ndarray
    group: np.ndarray
    latency: np.ndarray

    def __len__(self) -> int:
        return len(self.latency)

    def take(self, mask: np.ndarray) -> "Rows":
        """The rows under ``mask``."""
        return Rows(**{field.name: getattr(self, field.name)[mask] for field in fields(self)})

    @property
    def configurations(self) -> list[tuple]:
        """What Eq 1 has its own coefficients for: (draft length, group, prompt, output), lengths by thirds of an
        octave, since measured means differ a little from run to run."""
        lengths = [np.round(3 * np.log2(column)) for column in (self.prompt_length, self.output_length)]
        columns = (self.draft_length, self.group, *lengths)
        return list(zip(*(column.tolist() for column in columns), strict=True))


def rows_of(frame) -> Rows:
    """Rows of a trace's frame. Latency: e2e_mean, else concurrency/throughput (Little's law in a closed loop)."""
    number = {name: frame[name].to_numpy(float) for name in ("arrival_rate", "concurrency", "e2e_mean", "throughput")}
    length = frame["draft_length"].to_numpy(float)
    emitted = np.where(length > 0, frame["tokens_per_step"].to_numpy(float), 1.0)
    little = number["concurrency"] / number["throughput"]
    return Rows(
        arrival_rate=number["arrival_rate"],
        users=number["concurrency"],
        draft_length=length,
        tokens_per_step=emitted,
        prompt_length=frame["prompt_length"].to_numpy(float),
        output_length=frame["output_length"].to_numpy(float),
        share=frame["experts_per_token"].to_numpy(float) / frame["num_experts"].to_numpy(float),
        group=np.asarray(
            [_group(run, rejection) for run, rejection in zip(frame["run"], frame["rejection"], strict=True)]
        ),
        latency=np.where(np.isnan(number["e2e_mean"]), little, number["e2e_mean"]),
    )


def _group(run, rejection) -> str:
    found = re.search(r"_a(\d+)", str(run))
    return f"a{found.group(1)}" if found else str(rejection)


class Design(NamedTuple):
    """Columns [rows, unknowns] of C1 and C2, without and with coverage, and which rows the form can predict."""

    plain: tuple[np.ndarray, np.ndarray]
    covered: tuple[np.ndarray, np.ndarray]
    known: np.ndarray

    def intercept_and_slope(self, unknowns, phi):
        """C1 and C2 of each row at coverage ``phi``."""
        sides = zip(self.plain, self.covered, strict=True)
        return tuple(plain @ unknowns + phi * (covered @ unknowns) for plain, covered in sides)


def _columns(first: list, second: list, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    nothing = np.zeros(len(rows))
    one = [nothing + column for column in first] + [nothing] * len(second)
    two = [nothing] * len(first) + [nothing + column for column in second]
    return np.stack(one, axis=1), np.stack(two, axis=1)


def _dense(first: list, second: list, rows: Rows) -> Design:
    plain = _columns(first, second, rows)
    return Design(plain, (np.zeros_like(plain[0]), np.zeros_like(plain[1])), np.ones(len(rows), dtype=bool))


def eq1(rows: Rows, fitted: Rows) -> Design:
    """One pair for each configuration that was fitted at two loads or more."""
    loads: dict[tuple, set] = {}
    for index, key in enumerate(fitted.configurations):
        loads.setdefault(key, set()).add(str((fitted.arrival_rate[index], fitted.users[index])))
    keys = sorted(key for key, seen in loads.items() if len(seen) > 1)
    member = [np.asarray([float(key == own) for own in rows.configurations]) for key in keys]
    if not member:
        return _dense([0.0], [0.0], rows)._replace(known=np.zeros(len(rows), dtype=bool))
    return _dense(member, member, rows)._replace(known=np.sum(member, axis=0) > 0)


def eq3(rows: Rows, fitted: Rows) -> Design:
    """Six coefficients pooled over everything."""
    steps, k = rows.output_length / rows.tokens_per_step, rows.draft_length
    return _dense([1.0, steps, steps * k], [1.0, steps, steps * k], rows)


def eq3_lengths(rows: Rows, fitted: Rows) -> Design:
    """Six coefficients, the two of them scaled with lengths that are published to scale."""
    steps, k = rows.output_length / rows.tokens_per_step, rows.draft_length
    context = rows.prompt_length + 0.5 * rows.output_length
    return _dense([1.0, steps, steps * k], [rows.prompt_length, steps * context, steps * k], rows)


def eq4(rows: Rows, fitted: Rows) -> Design:
    """Eq 3 for a mixture of experts: verify coefficients without and with coverage."""
    steps, k = rows.output_length / rows.tokens_per_step, rows.draft_length
    plain = _columns([1.0, steps, 0.0, steps * k], [1.0, steps, 0.0, steps * k], rows)
    covered = _columns([0.0, 0.0, steps, 0.0], [0.0, 0.0, steps, 0.0], rows)
    return Design(plain, covered, np.isfinite(rows.share))


def linear_step(rows: Rows, fitted: Rows) -> Design:
    """Six coefficients of one engine step, linear in sequences, tokens and context."""
    steps, k = rows.output_length / rows.tokens_per_step, rows.draft_length
    context = rows.prompt_length + 0.5 * rows.output_length
    return _dense([steps, steps * k], [steps * (k + 1), steps * context, steps * k, rows.prompt_length], rows)


FORMS: dict[str, Callable[[Rows, Rows], Design]] = {
    "Eq 1": eq1,
    "Eq 3": eq3,
    "Eq 3 lengths": eq3_lengths,
    "Eq 4": eq4,
    "linear step": linear_step,
}


def _inverse(x):
    """1/x, continued in a straight line below FLATTEST."""
    return np.where(x > FLATTEST, 1.0 / np.maximum(x, FLATTEST), (2.0 - x / FLATTEST) / FLATTEST)


def _coverage(rows: Rows, batch):
    share = np.where(np.isnan(rows.share), 0.0, rows.share)
    return -np.expm1(np.log1p(-np.minimum(share, 1 - 1e-12)) * batch * (rows.draft_length + 1.0))


def latencies(design: Design, unknowns: np.ndarray, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Latency [s] of each row, and whether it is saturated (then the latency only says how far beyond)."""
    closed = ~np.isnan(rows.users)
    rate = np.where(closed, 0.0, rows.arrival_rate)
    if not any(columns.any() for columns in design.covered):
        one, two = design.intercept_and_slope(unknowns, 0.0)
        return np.where(
            closed, one + np.nan_to_num(rows.users) * two, one * _inverse(1.0 - rate * two)
        ), rate * two >= 1
    one, two = design.intercept_and_slope(unknowns, 1.0)
    saturated = rate * two >= 1
    low, high = np.zeros(len(rows)), rate * one * _inverse(1.0 - rate * two)  # coverage 1 bounds the batch from above
    for _ in range(60):
        middle = 0.5 * (low + high)
        one, two = design.intercept_and_slope(unknowns, _coverage(rows, middle))
        short = rate * (one + middle * two) > middle
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    batch = np.where(closed, rows.users, 0.5 * (low + high))
    one, two = design.intercept_and_slope(unknowns, _coverage(rows, batch))
    return one + batch * two, saturated


class Fitted(NamedTuple):
    """A form with its unknowns, and the rows it was fitted to."""

    form: str
    unknowns: np.ndarray
    rows: Rows

    def predict(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Latency [s] of each row (NaN where the form says nothing) and whether it is saturated."""
        design = FORMS[self.form](rows, self.rows)
        values, saturated = latencies(design, self.unknowns, rows)
        return np.where(design.known, values, np.nan), saturated & design.known


def fit_form(form: str, rows: Rows, seed: int = 0) -> Fitted:
    """Least squares on the relative error of the latency, unknowns >= 0, best of STARTS starts.

    The first start solves the problem that is linear once the *measured* latency stands in for Little's law; it is
    only a start. Unknowns are scaled so that each one's share of the mean latency is its coordinate.
    """
    design = FORMS[form](rows, rows)
    rows, design = _only(rows, design)
    if not len(rows):
        return Fitted(form, np.zeros(design.plain[0].shape[1]), rows)
    batch = np.where(np.isnan(rows.users), rows.arrival_rate * rows.latency, rows.users)
    phi = _coverage(rows, batch)[:, None]
    linear = [plain + phi * covered for plain, covered in zip(design.plain, design.covered, strict=True)]
    matrix = (linear[0] + batch[:, None] * linear[1]) / rows.latency[:, None]
    sizes = matrix.mean(axis=0)
    used = sizes > 0
    scale = np.where(used, 1.0 / np.where(used, sizes, 1.0), 0.0)

    def residual(coordinates):
        values, _ = latencies(design, _spread(coordinates, used) * scale, rows)
        return values / rows.latency - 1.0

    guess = np.maximum(nnls(matrix[:, used] * scale[used], np.ones(len(rows)))[0], 1e-3)
    draws = np.random.default_rng(seed).lognormal(0.0, 0.7, (STARTS, used.sum()))
    draws[0] = 1.0
    found = [
        least_squares(residual, guess * draw, bounds=(0, np.inf), xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=400)
        for draw in draws
    ]
    best = min(found, key=lambda result: result.cost)
    return Fitted(form, _spread(best.x, used) * scale, rows)


def _spread(values, used):
    out = np.zeros(len(used))
    out[used] = values
    return out


def _only(rows: Rows, design: Design) -> tuple[Rows, Design]:
    keep = design.known
    one, two = (tuple(columns[keep] for columns in side) for side in (design.plain, design.covered))
    return rows.take(keep), Design(one, two, design.known[keep])
