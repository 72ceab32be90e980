"""The functions of a deployment that a page draws with, translated from its serving model.

| JavaScript | what | returns |
|---|---|---|
| ``momentsConstant(k, a)`` | :meth:`diffspec.acceptance.ConstantAcceptance.moments` | m1, m2 |
| ``momentsMeasured(k)`` | the same of the deployment's own curves, where it has some | m1, m2 |
| ``predictOpen(p, load, k, m1, m2, prompt, output, cap)`` | :meth:`diffspec.serving.ServingModel.predict` | OUTPUTS |
| ``predictClosed(...)`` | the same in a closed loop, of so many requests in flight | OUTPUTS |

``p`` holds the parameters in the order of :func:`parameter_order`: the fitted ones, or a draw of what the fit leaves
open. Without a batch cap the last argument is left out.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import ConstantAcceptance, KnownMoments
from diffspec.browser.translate import runtime, translate
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.observations import states_of
from diffspec.parameters import get_parameters, parameter_infos, set_parameters
from diffspec.prediction import STAGES, Prediction
from diffspec.results import RESULTS
from diffspec.serving import MOST_STATES, ServingModel
from diffspec.workload import Workload

FIELDS = (
    *("ttft", "itl", "tpot", "e2e_latency", "throughput", "utilization", "capacity"),
    *("effective_batch_size", "waiting_time", "tokens_per_step"),
)
OUTPUTS = (*FIELDS, *(f"{stage}_{part}" for stage in STAGES for part in ("independent", "dependent")), "saturated")
"""What a prediction returns, in this order: s, req/s, req and tok as in :class:`diffspec.prediction.Prediction`;
``saturated`` is a boolean."""


def parameter_order(serving: ServingModel) -> tuple[str, ...]:
    """Paths of the parameters in the order of ``p``."""
    return tuple(parameter_infos(serving))


def parameter_values(serving: ServingModel) -> np.ndarray:
    """The parameters as ``p`` has them: one number each, or [draws, parameters] of draws with a leading axis."""
    return np.stack([np.asarray(value, dtype=float) for value in get_parameters(serving).values()], axis=-1)


def _outputs(prediction: Prediction) -> list[Any]:
    parts = [prediction.decomposition[stage] for stage in STAGES]
    split = [value for part in parts for value in (part.load_independent, part.load_dependent)]
    return [*(getattr(prediction, name) for name in FIELDS), *split, prediction.result == RESULTS.saturated]


def browser_functions(deployment: FittedDeployment, largest_cap: float | None) -> str:
    """JavaScript of a deployment's functions, with the helpers that they call.

    ``largest_cap`` [req]: the largest batch cap that will be asked for (as many states of the waiting chain are
    computed), None for a deployment without one.
    """
    serving, config = deployment.serving, deployment.configuration(1.0, acceptance=KnownMoments(1.0, 1.0))
    states = MOST_STATES if largest_cap is None else states_of(float(largest_cap))
    serving = dataclasses.replace(serving, waiting_states=states)
    order = parameter_order(serving)

    def predict(loop, parameters, load, draft_length, m1, m2, prompt, output, cap=None):
        model = set_parameters(serving, dict(zip(order, parameters, strict=True)))
        asked = dataclasses.replace(
            config, draft_length=draft_length, acceptance=KnownMoments(m1, m2), max_batch_size=cap
        )
        return _outputs(model.predict(Workload(prompt, output, **{loop: load}), asked))

    numbers = [jnp.asarray(1.0)] * (6 if largest_cap is None else 7)
    given = [jnp.asarray(parameter_values(serving)), *numbers]
    probability = config.draft_probability
    texts = [
        translate("momentsConstant", lambda k, a: ConstantAcceptance(a).moments(k, probability), *numbers[:2]),
        translate("predictOpen", lambda *values: predict("arrival_rate", *values), *given),
        translate("predictClosed", lambda *values: predict("concurrency", *values), *given),
    ]
    own = deployment.acceptance
    if own is not None:
        texts.append(translate("momentsMeasured", lambda k: own.moments(k, probability), numbers[0]))
    return "\n".join([runtime(texts), *texts])
