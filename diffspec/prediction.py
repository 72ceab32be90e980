"""What a serving model answers: a prediction by stage, and two of them beside each other."""

import equinox as eqx

from diffspec.parameters import Scalar
from diffspec.results import RESULTS

STAGES = ("waiting", "prefill", "draft", "verify", "overhead")


class LoadSplit(eqx.Module):
    """A stage's share of e2e_latency [s]: alone on the server, and what the load adds."""

    load_independent: Scalar
    load_dependent: Scalar


class Prediction(eqx.Module):
    """Mean behaviour at one operating point. Times in s, rates in req/s, lengths in tok.

    ``ttft``: first token - arrival, waiting included; ``itl``: gap between stream events (one a step); ``tpot``:
    (e2e_latency - ttft)/(output_length - 1); ``decomposition``: stage -> :class:`LoadSplit`, summing to e2e_latency.
    ``speedup``: e2e_latency without speculation over e2e_latency, NaN-free: meaningful where both arms are successful.
    At ``saturated`` the latencies are those at 0.999 of capacity: lower bounds.
    """

    result: RESULTS
    ttft: Scalar
    itl: Scalar
    tpot: Scalar
    e2e_latency: Scalar
    waiting_time: Scalar
    throughput: Scalar
    effective_batch_size: Scalar
    batch_seen: Scalar
    utilization: Scalar
    capacity: Scalar
    overload: Scalar
    residual: Scalar
    tokens_per_step: Scalar
    steps_per_request: Scalar
    decomposition: dict[str, LoadSplit]


class Comparison(eqx.Module):
    """A configuration beside the same server without speculation.

    ``speedup`` [1] = e2e_latency of ``plain`` over that of ``speculative``; ``breakeven_rate`` [req/s]: the smallest
    arrival rate at which both are equally fast, infinite where the order never changes.
    """

    speculative: Prediction
    plain: Prediction
    speedup: Scalar
    breakeven_rate: Scalar
