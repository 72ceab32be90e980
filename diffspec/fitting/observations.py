"""A trace's rows as batched workloads, configurations and observed latencies, ready for `jax.vmap`.

Nothing measured as a latency ever enters a workload or a configuration: that would leak the target into the
regressors. Acceptance is an input of the model and is taken from the row itself.
"""

import math
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import (
    MAX_DRAFT_LENGTH,
    KnownMoments,
    MeasuredAcceptance,
    PositionAcceptance,
    acceptance_from_tokens_per_step,
)
from diffspec.configuration import Configuration, batch_cap
from diffspec.fitting.noise import TYPICAL_REQUESTS
from diffspec.results import InputError, TraceError
from diffspec.serving import ENDLESS, MOST_STATES
from diffspec.workload import Workload, batched

NEVER_ENDING = 1e12
"""Stand-in for an unknown number of requests: the finite-run correction vanishes."""

UNCAPPED = 1e9
"""Stand-in for an unknown batch cap [req]."""

PREDICTED = {"ttft": "ttft", "itl": "itl", "tpot": "tpot", "e2e": "e2e_latency"}
"""Observed metric -> field of :class:`diffspec.serving.Prediction`."""


class Block(eqx.Module):
    """Inputs of the rows of one loop kind (open or closed), with a leading row axis on every array."""

    workload: Workload
    config: Configuration

    def __len__(self) -> int:
        return self.workload.prompt_length.shape[0]  # type: ignore[union-attr]


@dataclass(frozen=True)
class Observations:
    """All rows of one deployment. ``blocks``: open-loop rows, then closed-loop rows, empty blocks left out;
    ``observed[column]``: measured values in block order, NaN where missing; ``order``: positions in the frame;
    ``requests``: how many requests each row is a mean of; ``cells``: number of its operating point, which repeats
    share."""

    blocks: tuple[Block, ...]
    observed: dict[str, np.ndarray]
    order: tuple[int, ...]
    requests: np.ndarray
    cells: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def is_open(self) -> np.ndarray:
        """True for open-loop rows, in block order."""
        return np.concatenate([np.full(len(b), b.workload.is_open) for b in self.blocks])


def waiting_states(data: Observations, *, only_near: bool = False) -> int:
    """Chain size that the waiting of these rows needs (`ServingModel.waiting_states`), 0 where no open row is capped.

    ``only_near``: only rows whose measured batch, two standard deviations up, reaches the cap count: a fit evaluates
    the chain thousands of times.
    """
    if not data.blocks[0].workload.is_open:
        return 0
    block = data.blocks[0]
    caps = np.asarray(jax.vmap(batch_cap)(block.workload, block.config))
    counts = caps <= MOST_STATES
    if only_near:
        e2e = data.observed.get("e2e_mean", np.full(len(data), np.nan))[: len(block)]
        batch = np.nan_to_num(np.asarray(block.workload.arrival_rate) * e2e)
        counts &= batch + 2.0 * np.sqrt(batch) >= caps
    return states_of(caps[counts].max() if counts.any() else None)


def states_of(cap: float | None) -> int:
    """Chain size that waiting below a batch ``cap`` [req] needs, a power of two; 0 where waiting is not computed.

    >>> states_of(64.0), states_of(3.0), states_of(None), states_of(5000.0)
    (64, 16, 0, 0)
    """
    return 0 if cap is None or cap > MOST_STATES else 2 ** int(np.ceil(np.log2(max(cap, 16.0))))


def is_endless(data: Observations) -> np.ndarray:
    """True, in block order, for open-loop rows that are no run of a known number of requests."""
    never = [np.asarray(b.workload.n_requests) >= ENDLESS if b.workload.is_open else None for b in data.blocks]
    pairs = zip(never, data.blocks, strict=True)
    return np.concatenate([np.zeros(len(block), dtype=bool) if rows is None else rows for rows, block in pairs])


def padded(block: Block) -> Block:
    """The block lengthened to a power of two (at least 16) by repeating its last row, so that traces of many sizes
    share few compiled programs. The added rows are for shape only."""
    size = 16
    while size < len(block):
        size *= 2
    rows = np.minimum(np.arange(size), len(block) - 1)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], block)


def observations(frame, curve: MeasuredAcceptance | None = None) -> Observations:
    """Batch the rows of one deployment; ``curve``: acceptance to use for speculative rows that carry none.

    Rows of one deployment share one set of costs, whatever parameter counts they name: drafting time follows a
    drafter's depth more than its size (experiments/01_reproduce_published_form, natural acceptance held out).

    Errors: :class:`TraceError` for a draft longer than 32 tokens or a speculative row without any acceptance.
    """
    open_rows = [i for i in range(len(frame)) if not math.isnan(frame["arrival_rate"].iloc[i])]
    closed_rows = [i for i in range(len(frame)) if i not in set(open_rows)]
    blocks = tuple(_block(frame, rows, curve) for rows in (open_rows, closed_rows) if rows)
    order = open_rows + closed_rows
    names = [name for name in frame.columns if name.startswith(("ttft_", "itl_", "tpot_", "e2e_"))] + ["throughput"]
    observed = {name: frame[name].to_numpy(dtype=float)[order] for name in names if frame[name].notna().any()}
    single = frame["output_length"].to_numpy(dtype=float)[order] <= 1.0  # one token: no gap between tokens to predict
    for name, values in observed.items():
        if name.startswith(("itl_", "tpot_")):
            observed[name] = np.where(single, np.nan, values)
    requests = np.nan_to_num(frame["n_requests"].to_numpy(dtype=float)[order], nan=TYPICAL_REQUESTS)
    return Observations(blocks, observed, tuple(order), np.maximum(requests, 1.0), _cells(frame, order))


def _cells(frame, order) -> np.ndarray:
    """Numbers of the operating points, in block order: rows that asked the same of the server share one."""
    asked = ["arrival_rate", "concurrency", "prompt_length", "output_length", "draft_length", "max_batch_size"]
    asked += ["arrival_process", "arrival_scv", "output_scv", "workload", "method", "drafter"]
    tokens = (4.0 * frame["tokens_per_step"]).round()  # repeats of one acceptance differ by chance
    keys = frame[asked].assign(tokens_per_step=tokens)
    return keys.groupby(list(keys.columns), dropna=False, sort=False).ngroup().to_numpy()[order]


def _block(frame, rows, curve) -> Block:
    def column(name, missing):
        values = frame[name].to_numpy(dtype=float)[rows]
        return np.where(np.isnan(values), missing, values)

    process = frame["arrival_process"].tolist()
    scv = [0.0 if process[i] == "constant" else 1.0 for i in rows]
    is_open = not math.isnan(frame["arrival_rate"].iloc[rows[0]])
    steady = np.array([frame["window"].iloc[i] == "steady" for i in rows])
    n_requests = np.where(steady, NEVER_ENDING, column("n_requests", NEVER_ENDING))
    # a short window of random arrivals sees another rate than the one that was asked for
    rate = column("offered_rate", column("arrival_rate", 1.0))
    load = {"arrival_rate": rate, "n_requests": n_requests}
    workload = batched(
        Workload,
        prompt_length=column("prompt_length", 1.0),
        output_length=column("output_length", 1.0),
        arrival_scv=column("arrival_scv", np.asarray(scv)),
        output_scv=column("output_scv", 0.0),
        **(load if is_open else {"concurrency": column("concurrency", 1.0)}),
    )
    length, probability = column("draft_length", 0.0), column("draft_probability", 1.0)
    rates = np.stack([row_acceptance(frame, i, curve) for i in rows])
    m1, m2 = _moments(rates, length, probability)
    config = batched(
        Configuration,
        draft_length=length,
        acceptance=batched(KnownMoments, m1=m1, m2=m2),
        max_batch_size=column("max_batch_size", UNCAPPED),
        kv_capacity_tokens=column("kv_capacity_tokens", UNCAPPED * 1e6),
        draft_probability=probability,
    )
    return Block(workload, config)


@jax.jit
@jax.vmap
def _moments(rates, length, probability):
    return PositionAcceptance(rates).moments(length, probability)


def row_acceptance(frame, row: int, curve: MeasuredAcceptance | None) -> np.ndarray:
    """Conditional acceptance of positions 1..32 of one row: its position_acceptance, else its acceptance_rate, else the
    constant rate with its tokens_per_step, else the deployment's curve; zeros without speculation."""
    line = frame.iloc[row]
    length = line["draft_length"]
    if not length > 0:
        return np.zeros(MAX_DRAFT_LENGTH)
    place = {"file": line["source_file"], "row": line["source_row"]}
    if length > MAX_DRAFT_LENGTH:
        raise TraceError("", **place, column="draft_length", got=length, allowed=f"0 to {MAX_DRAFT_LENGTH} tok")
    positions = line["position_acceptance"]
    if isinstance(positions, tuple) and positions:
        kept = np.asarray(positions[:MAX_DRAFT_LENGTH], dtype=float)
        return np.concatenate([kept, np.full(MAX_DRAFT_LENGTH - len(kept), kept[-1])])
    if line["acceptance_rate"] >= 0:
        return np.full(MAX_DRAFT_LENGTH, line["acceptance_rate"])
    if line["tokens_per_step"] >= 1:
        return np.full(
            MAX_DRAFT_LENGTH, acceptance_from_tokens_per_step(line["tokens_per_step"], length).acceptance_rate
        )
    if curve is not None:
        return np.asarray(curve.conditional_rates(length), dtype=float)
    raise TraceError(
        "a speculative row needs its acceptance",
        **place,
        column="tokens_per_step",
        got="nothing",
        allowed="tokens_per_step, acceptance_rate or position_acceptance",
    )


def acceptance_curve(frame) -> MeasuredAcceptance | None:
    """The deployment's own acceptance: per measured draft length the mean conditional rates over its rows, weighted by
    n_requests; None when no speculative row tells its acceptance."""
    curves: dict[int, list[tuple[float, np.ndarray]]] = {}
    for row in range(len(frame)):
        line = frame.iloc[row]
        length = line["draft_length"]
        if not length > 0:
            continue
        try:
            rates = row_acceptance(frame, row, None)
        except TraceError:
            if length > MAX_DRAFT_LENGTH:
                raise
            continue
        weight = line["n_requests"] if line["n_requests"] > 0 else 1.0
        curves.setdefault(int(length), []).append((weight, rates))
    if not curves:
        return None
    lengths = sorted(curves)
    means = [np.average([r for _, r in curves[k]], axis=0, weights=[w for w, _ in curves[k]]) for k in lengths]
    return MeasuredAcceptance(tuple(lengths), jnp.asarray(np.stack(means)))


def require_rows(frame, name: str, least: int) -> None:
    """Raise :class:`InputError` when a deployment has too few usable rows to fit."""
    if len(frame) < least:
        raise InputError(
            f"deployment {name!r}: got {len(frame)} usable rows; allowed: at least {least}; measure more operating "
            "points (several loads, with and without speculation), or fit rows set aside too with --all-rows"
        )
