"""diffspec: why speculative decoding slows down under load, and what to do.

An interpretable, differentiable latency model of LLM serving with speculative decoding. Names are loaded when first
used, so that ``import diffspec`` stays fast. Precision: set ``jax.config.update("jax_enable_x64", True)`` for fitting.
"""

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffspec.acceptance import (
        ConstantAcceptance,
        MeasuredAcceptance,
        PositionAcceptance,
        acceptance_from_draft_acceptance_rate,
        acceptance_from_tokens_per_step,
    )
    from diffspec.acceptance_curves import (
        conditional_to_histogram,
        conditional_to_marginal,
        histogram_to_conditional,
        marginal_to_conditional,
    )
    from diffspec.acceptance_decay import DecayingAcceptance, decay_from_tokens_per_step, fit_decay, shrink_to_decay
    from diffspec.analysis.answers import predict_answer
    from diffspec.analysis.before_traces import before_traces, moved, predict_before_traces, predict_transferred
    from diffspec.analysis.design import design
    from diffspec.analysis.explaining import explain
    from diffspec.analysis.sensitivity import sensitivity
    from diffspec.architecture import Transformer, eagle_head, read_architecture
    from diffspec.batch_state import BatchState, StepParts
    from diffspec.boundaries.boundary import boundary
    from diffspec.chunks import chunked_vmap
    from diffspec.configuration import Configuration
    from diffspec.drafters import (
        AbstractDrafter,
        BlockDrafter,
        DraftCost,
        DraftModel,
        NgramDrafter,
        NoDrafter,
        OverlappedDrafter,
        RemoteDrafter,
        WindowedDrafter,
    )
    from diffspec.experts import ExpertRouting
    from diffspec.first_principles import Efficiency, FirstPrinciples, step_time_from
    from diffspec.fitting.deployment import FittedDeployment, FittedModel
    from diffspec.fitting.evaluate import evaluate
    from diffspec.fitting.fit import fit
    from diffspec.fitting.fleet import fit_fleet
    from diffspec.fitting.principles import transfer
    from diffspec.fitting.update import update
    from diffspec.hardware import Accelerator, accelerator
    from diffspec.lengths import Lengths
    from diffspec.optimizing.expert_balance import place_experts
    from diffspec.optimizing.fleet import optimize_fleet
    from diffspec.optimizing.joint import optimize_jointly
    from diffspec.optimizing.load_policy import policy
    from diffspec.optimizing.optimize import optimize
    from diffspec.optimizing.pareto import non_dominated
    from diffspec.optimizing.size import size
    from diffspec.percentiles import predict_distribution
    from diffspec.prediction import Prediction
    from diffspec.report.drawing import draw
    from diffspec.resources import MemoryPlan, energy_per_token, memory_plan
    from diffspec.results import RESULTS, DiffspecError, InputError, NoResultError, TraceError
    from diffspec.serving import ServingModel
    from diffspec.simulating import DraftSchedule, Engine, simulate
    from diffspec.staircase import StaircaseStepTime
    from diffspec.steady_state import SteadyState, solve_closed_loop, solve_open_loop
    from diffspec.step_time import AbstractStepTime, AffineStepTime, ExpertCost, RooflineStepTime
    from diffspec.traces import Trace, check, read_trace
    from diffspec.tree_search import BestTree, RegularTree, best_budget, best_tree
    from diffspec.trees import Tree, TreeAcceptance
    from diffspec.workload import Workload

__all__ = [
    "RESULTS",
    "AbstractDrafter",
    "AbstractStepTime",
    "Accelerator",
    "AffineStepTime",
    "BatchState",
    "BestTree",
    "BlockDrafter",
    "Configuration",
    "ConstantAcceptance",
    "DecayingAcceptance",
    "DiffspecError",
    "DraftCost",
    "DraftModel",
    "DraftSchedule",
    "Efficiency",
    "Engine",
    "ExpertCost",
    "ExpertRouting",
    "FirstPrinciples",
    "FittedDeployment",
    "FittedModel",
    "InputError",
    "Lengths",
    "MeasuredAcceptance",
    "MemoryPlan",
    "NgramDrafter",
    "NoDrafter",
    "NoResultError",
    "OverlappedDrafter",
    "PositionAcceptance",
    "Prediction",
    "RegularTree",
    "RemoteDrafter",
    "RooflineStepTime",
    "ServingModel",
    "StaircaseStepTime",
    "SteadyState",
    "StepParts",
    "Trace",
    "TraceError",
    "Transformer",
    "Tree",
    "TreeAcceptance",
    "WindowedDrafter",
    "Workload",
    "accelerator",
    "acceptance_from_draft_acceptance_rate",
    "acceptance_from_tokens_per_step",
    "before_traces",
    "best_budget",
    "best_tree",
    "boundary",
    "check",
    "chunked_vmap",
    "conditional_to_histogram",
    "conditional_to_marginal",
    "decay_from_tokens_per_step",
    "design",
    "draw",
    "eagle_head",
    "energy_per_token",
    "evaluate",
    "explain",
    "fit",
    "fit_decay",
    "fit_fleet",
    "histogram_to_conditional",
    "marginal_to_conditional",
    "memory_plan",
    "moved",
    "non_dominated",
    "optimize",
    "optimize_fleet",
    "optimize_jointly",
    "place_experts",
    "policy",
    "predict_answer",
    "predict_before_traces",
    "predict_distribution",
    "predict_transferred",
    "read_architecture",
    "read_trace",
    "sensitivity",
    "shrink_to_decay",
    "simulate",
    "size",
    "solve_closed_loop",
    "solve_open_loop",
    "step_time_from",
    "transfer",
    "update",
]

_HOMES = {
    "acceptance": (
        "ConstantAcceptance",
        "MeasuredAcceptance",
        "PositionAcceptance",
        "acceptance_from_draft_acceptance_rate",
        "acceptance_from_tokens_per_step",
    ),
    "acceptance_curves": (
        "conditional_to_histogram",
        "conditional_to_marginal",
        "histogram_to_conditional",
        "marginal_to_conditional",
    ),
    "acceptance_decay": (
        "DecayingAcceptance",
        "decay_from_tokens_per_step",
        "fit_decay",
        "shrink_to_decay",
    ),
    "analysis.answers": ("predict_answer",),
    "analysis.before_traces": (
        "before_traces",
        "moved",
        "predict_before_traces",
        "predict_transferred",
    ),
    "analysis.design": ("design",),
    "analysis.explaining": ("explain",),
    "analysis.sensitivity": ("sensitivity",),
    "architecture": (
        "Transformer",
        "eagle_head",
        "read_architecture",
    ),
    "batch_state": (
        "BatchState",
        "StepParts",
    ),
    "boundaries.boundary": ("boundary",),
    "chunks": ("chunked_vmap",),
    "drafters": (
        "AbstractDrafter",
        "BlockDrafter",
        "DraftCost",
        "DraftModel",
        "NgramDrafter",
        "NoDrafter",
        "OverlappedDrafter",
        "RemoteDrafter",
        "WindowedDrafter",
    ),
    "experts": ("ExpertRouting",),
    "first_principles": (
        "Efficiency",
        "FirstPrinciples",
        "step_time_from",
    ),
    "fitting.deployment": (
        "FittedDeployment",
        "FittedModel",
    ),
    "fitting.evaluate": ("evaluate",),
    "fitting.fit": ("fit",),
    "fitting.fleet": ("fit_fleet",),
    "fitting.principles": ("transfer",),
    "fitting.update": ("update",),
    "hardware": (
        "Accelerator",
        "accelerator",
    ),
    "lengths": ("Lengths",),
    "optimizing.expert_balance": ("place_experts",),
    "optimizing.fleet": ("optimize_fleet",),
    "optimizing.joint": ("optimize_jointly",),
    "optimizing.load_policy": ("policy",),
    "optimizing.optimize": ("optimize",),
    "optimizing.pareto": ("non_dominated",),
    "optimizing.size": ("size",),
    "percentiles": ("predict_distribution",),
    "report.drawing": ("draw",),
    "resources": (
        "MemoryPlan",
        "energy_per_token",
        "memory_plan",
    ),
    "results": (
        "RESULTS",
        "DiffspecError",
        "InputError",
        "NoResultError",
        "TraceError",
    ),
    "configuration": ("Configuration",),
    "prediction": ("Prediction",),
    "serving": ("ServingModel",),
    "simulating": (
        "DraftSchedule",
        "Engine",
    ),
    "simulating.simulation": ("simulate",),
    "staircase": ("StaircaseStepTime",),
    "steady_state": (
        "SteadyState",
        "solve_closed_loop",
        "solve_open_loop",
    ),
    "step_time": (
        "AbstractStepTime",
        "AffineStepTime",
        "ExpertCost",
        "RooflineStepTime",
    ),
    "traces": (
        "Trace",
        "check",
        "read_trace",
    ),
    "tree_search": (
        "BestTree",
        "RegularTree",
        "best_budget",
        "best_tree",
    ),
    "trees": (
        "Tree",
        "TreeAcceptance",
    ),
    "workload": ("Workload",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"diffspec.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


_IN_NOTEBOOKS = (
    ("diffspec.fitting.deployment", "FittedModel", "model_html"),
    ("diffspec.fitting.deployment", "FittedDeployment", "deployment_html"),
    ("diffspec.prediction", "Prediction", "prediction_html"),
    ("diffspec.optimizing.policy_answer", "PolicyAnswer", "policy_html"),
)


def _show_in_notebooks() -> None:
    """Tell IPython, where it runs, to show answers as tables (:mod:`diffspec.report.notebook`, loaded when one is)."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return
    for module, name, function in _IN_NOTEBOOKS:

        def show(value, function=function):
            return getattr(importlib.import_module("diffspec.report.notebook"), function)(value)

        shell.display_formatter.formatters["text/html"].for_type_by_name(module, name, show)


_show_in_notebooks()
