"""Discrete-event simulation of a serving engine: an oracle that shares only the step time with the model."""

from .requests import Requests, draw_arrivals, draw_requests, from_arrivals
from .run import Engine, Lane, LaneResult, run_lanes
from .schedule import DraftSchedule
from .simulation import Estimate, Simulation, replay, simulate

__all__ = [
    "DraftSchedule",
    "Engine",
    "Estimate",
    "Lane",
    "LaneResult",
    "Requests",
    "Simulation",
    "draw_arrivals",
    "draw_requests",
    "from_arrivals",
    "replay",
    "run_lanes",
    "simulate",
]
