"""What several parts of the suite ask about: a synthetic server, its classes of requests, and the relaxed joint
problem."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import ConstantAcceptance
from diffspec.drafters import DraftCost
from diffspec.fitting.deployment import FittedDeployment
from diffspec.optimizing.catalogue import DrafterChoice, RequestClass
from diffspec.optimizing.joint_arms import arms_of
from diffspec.optimizing.joint_problem import parse_objective, shapes_of
from diffspec.optimizing.joint_search import Ranges, relaxable, relaxed_function, variables_of
from diffspec.serving import ServingModel
from diffspec.step_time import RooflineStepTime

SERVER_STEP = RooflineStepTime(
    weight_read=6e-3,
    token_compute=4e-5,
    kv_read=6e-8,
    step_overhead=1e-3,
    prefill_token=2e-5,
    draft=DraftCost(pass_base=8e-4, pass_sequence=1e-5),
)
"""A synthetic server's step: that of tests/test_joint.py."""
CAPS, LONGEST = (8.0, 48.0), 8
SMALL = DrafterChoice("small", 0.5e9, ConstantAcceptance(0.6))
LARGE = DrafterChoice("large", 2e9, ConstantAcceptance(0.78))


def deployment() -> FittedDeployment:
    serving = jax.tree.map(jnp.asarray, ServingModel(SERVER_STEP, first_token_steps=1.5))
    measured = {"draft_lengths": [0, 1, 3, 5], "arrival_rate": [1.0, 20.0], "concurrency": None}
    measured |= {"prompt_length": [100.0, 2000.0], "output_length": [50.0, 400.0]}
    defaults = {"max_batch_size": CAPS[-1], "drafter_params": 1e9}
    return FittedDeployment("synthetic", "roofline", serving, None, defaults, measured, {"rows": 1})


def classes(count: int) -> tuple[RequestClass, ...]:
    """``count`` classes of requests, alike in share and unlike in lengths and acceptance."""
    spread = np.linspace(0.0, 1.0, count)
    return tuple(
        RequestClass(f"class{i}", 1.0 / count, 200 + 800 * at, 300 - 200 * at, acceptance=ConstantAcceptance(a))
        for i, (at, a) in enumerate(zip(spread, 0.55 + 0.35 * spread, strict=True))
    )


class Relaxed(NamedTuple):
    """The relaxed joint problem of one drafter at one load: ``function(x, data, shared)`` -> (log cost, what must not
    be above 0), its data for one lane, what all lanes share, and how many reals there are."""

    function: Any
    data: dict[str, np.ndarray]
    shared: Any
    variables: int


def relaxed_problem(count: int, load: float = 6.0) -> Relaxed:
    """A length for each of ``count`` classes and the batch cap, at ``load`` [req/s], mean e2e latency made small: the
    function that `diffspec.optimizing.joint_search.relaxed` solves."""
    asked, ranges, goal = classes(count), Ranges(LONGEST, CAPS), parse_objective("e2e_mean")
    nothing = {"max_batched_tokens": None, "cost_per_hour": None, "draws": None}
    (arm,) = arms_of(deployment(), (LARGE,), asked, ranges, None, {}, **nothing)
    variables = variables_of(arm, ranges, count)
    low, high = variables.ranges(arm, ranges, None)
    data = {"load": load, "low": low, "high": high, "cap": CAPS[0], "size": float(np.log(arm.size)), "replicas": 1.0}
    shared = (arm.drafted._replace(candidates=None), shapes_of(asked), np.zeros(0), 0.0)
    data = {name: np.asarray(value, dtype=float) for name, value in data.items()}
    return Relaxed(relaxed_function(relaxable(goal), (), variables), data, shared, len(low))


def lanes(data: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The data of one lane, ``count`` times."""
    return {name: np.repeat(value[None], count, axis=0) for name, value in data.items()}
