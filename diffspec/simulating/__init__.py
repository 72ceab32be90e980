"""Discrete-event simulation of a serving engine: an oracle that shares only the step time with the model."""

from .requests import Requests, draw_requests
from .run import Engine, Lane, LaneResult, run_lanes
from .simulation import Estimate, Simulation, replay, simulate

__all__ = [
    "Engine",
    "Estimate",
    "Lane",
    "LaneResult",
    "Requests",
    "Simulation",
    "draw_requests",
    "replay",
    "run_lanes",
    "simulate",
]
