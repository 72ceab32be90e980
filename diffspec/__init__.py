"""diffspec: why speculative decoding slows down under load, and what to do.

An interpretable, differentiable latency model of LLM serving with speculative decoding. Names are loaded when first
used, so that ``import diffspec`` stays fast. Precision: set ``jax.config.update("jax_enable_x64", True)`` for fitting.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffspec.acceptance import ConstantAcceptance, MeasuredAcceptance, PositionAcceptance
    from diffspec.analysis.answers import predict_answer
    from diffspec.analysis.sensitivity import sensitivity
    from diffspec.experts import ExpertRouting
    from diffspec.fitting.deployment import FittedDeployment, FittedModel
    from diffspec.fitting.evaluate import evaluate
    from diffspec.fitting.fit import fit
    from diffspec.optimizing.policy import optimize
    from diffspec.results import RESULTS, DiffspecError, InputError, NoResultError, TraceError
    from diffspec.serving import Configuration, Prediction, ServingModel
    from diffspec.steady_state import SteadyState, solve_closed_loop, solve_open_loop
    from diffspec.step_time import (
        AbstractStepTime,
        AffineStepTime,
        BatchState,
        DraftCost,
        ExpertCost,
        RooflineStepTime,
        StepParts,
    )
    from diffspec.traces import Trace, check, read_trace
    from diffspec.workload import Workload

__all__ = [
    "RESULTS",
    "AbstractStepTime",
    "AffineStepTime",
    "BatchState",
    "Configuration",
    "ConstantAcceptance",
    "DiffspecError",
    "DraftCost",
    "ExpertCost",
    "ExpertRouting",
    "FittedDeployment",
    "FittedModel",
    "InputError",
    "MeasuredAcceptance",
    "NoResultError",
    "PositionAcceptance",
    "Prediction",
    "RooflineStepTime",
    "ServingModel",
    "SteadyState",
    "StepParts",
    "Trace",
    "TraceError",
    "Workload",
    "check",
    "evaluate",
    "fit",
    "optimize",
    "predict_answer",
    "read_trace",
    "sensitivity",
    "solve_closed_loop",
    "solve_open_loop",
]

_HOMES = {
    "acceptance": ("ConstantAcceptance", "MeasuredAcceptance", "PositionAcceptance"),
    "analysis.answers": ("predict_answer",),
    "analysis.sensitivity": ("sensitivity",),
    "experts": ("ExpertRouting",),
    "fitting.deployment": ("FittedDeployment", "FittedModel"),
    "fitting.evaluate": ("evaluate",),
    "fitting.fit": ("fit",),
    "optimizing.policy": ("optimize",),
    "results": ("RESULTS", "DiffspecError", "InputError", "NoResultError", "TraceError"),
    "serving": ("Configuration", "Prediction", "ServingModel"),
    "steady_state": ("SteadyState", "solve_closed_loop", "solve_open_loop"),
    "step_time": (
        "AbstractStepTime",
        "AffineStepTime",
        "BatchState",
        "DraftCost",
        "ExpertCost",
        "RooflineStepTime",
        "StepParts",
    ),
    "traces": ("Trace", "check", "read_trace"),
    "workload": ("Workload",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"diffspec.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
