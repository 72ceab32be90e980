"""What a map asks: the deployments by hardware, the two axes, and what no axis moves, checked."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from diffspec.acceptance import AbstractAcceptance, ConstantAcceptance
from diffspec.analysis.before_traces import Unmeasured, before_traces, check_drafting, moved
from diffspec.boundaries.axes import HARDWARE, KINDS, Axis, make_axis, spaced
from diffspec.boundaries.points import QUANTITIES, Ground, states_for
from diffspec.fitting.deployment import FittedDeployment
from diffspec.hardware import accelerator
from diffspec.optimizing.servers import server_of
from diffspec.results import InputError, NoResultError
from diffspec.workload import Workload, check_range

LOOPS = ("arrival_rate", "concurrency")
LENGTHS = ("prompt_length", "output_length")
LEAST, MOST = 0.05, 1.05
"""Shares of the largest capacity over which arrival rates run when no range is asked for."""


class Question:
    """The deployments asked about, by hardware, and the axes; :meth:`ground` is what all points share.

    Errors: :class:`InputError` for axes that are not two different ones, or of which one is unknown.
    """

    def __init__(
        self,
        subject: FittedDeployment | Unmeasured,
        axes: Mapping[str, Any],
        points: int,
        tensor_parallel: int | None,
        max_batched_tokens: float | None,
    ):
        if len(axes) != 2:
            raise InputError(f"axes: got {len(axes)} ({', '.join(axes)}); allowed: two different ones")
        if set(LOOPS) <= set(axes):
            raise InputError("axes: got arrival_rate and concurrency; allowed: one load, in an open or a closed loop")
        self.points = points
        self.made = {name: _made(name, values, points) for name, values in axes.items()}
        hardware = self.made.get(HARDWARE)
        names = (None,) if hardware is None else tuple(map(str, hardware.values))
        subjects = [_on(subject, name, tensor_parallel, max_batched_tokens) for name in names]
        self.servers = tuple(server_of(found, max_batched_tokens) for found in subjects)
        self.name = self.servers[0].deployment.name
        if hardware is not None and self.servers[0].first_principles:
            self.name = self.name.rsplit(" on ", 1)[0]
        self.subjects = tuple(found for found in subjects if not isinstance(found, FittedDeployment))

    def has(self, name: str) -> bool:
        """Whether an axis moves it."""
        return name in self.made

    def axes(self, ground: Ground) -> tuple[Axis, Axis]:
        """Both axes; arrival rates without a range run up to the largest capacity there is on the other axis."""
        x, y = (
            _up_to_capacity(ground, self.made, self.points) if made is None else made for made in self.made.values()
        )
        return x, y

    def ground(
        self,
        *,
        quantity: str,
        draft_length: float | int | str,
        max_draft_length: int,
        loads: Mapping[str, float | None],
        lengths: Mapping[str, float | None],
        details: Mapping[str, float],
        acceptance: AbstractAcceptance | None,
        max_batch_size: float | None,
        max_batched_tokens: float | None,
        drafter_params: float | None,
    ) -> Ground:
        """What all points share; errors as :func:`diffspec.boundaries.boundary.boundary` tells them."""
        server, deployment = self.servers[0], self.servers[0].deployment
        if quantity not in QUANTITIES:
            raise InputError(f"quantity: got {quantity!r}; allowed: {', '.join(QUANTITIES)}")
        if quantity in ("memory", "energy") and server.pair is None:
            raise InputError(
                f"quantity {quantity}: the architecture of {deployment.name!r} is not known; fit again with --verifier "
                "config.json --hardware NAME"
            )
        if not deployment.plain_measured:
            raise NoResultError("no k = 0 row was fitted: latency without speculation is not known, nor a gain over it")
        moved_too: dict[str, Any] = {
            "prompt_length": lengths["prompt_length"],
            "output_length": lengths["output_length"],
        }
        moved_too |= {"max_batch_size": max_batch_size, "drafter_scale": drafter_params, "acceptance_rate": acceptance}
        moved_too["draft_length"] = None if draft_length == "best" else draft_length
        for name, value in moved_too.items():
            if self.has(name) and value is not None:
                shown = f"{value:g}" if isinstance(value, int | float) else "one"
                raise InputError(f"{name}: got {shown}, and an axis moves it; give one of both")
        loop, load = _load(self.made, loads)
        fixed = {name: float(value) for name, value in details.items()}
        if load is not None:
            fixed[loop] = float(load)
        for name, value in lengths.items():
            if not self.has(name):
                fixed[name] = _length(name, value, deployment.measured)
        moving = self.made.get("output_length")
        shortest = float(fixed["output_length"] if moving is None else moving.values[0])
        if quantity == "tpot" and shortest <= 1:
            raise InputError(
                f"output_length: got {shortest:g}, whose requests have no time per token after the first; allowed: "
                "more than 1 tok with the quantity tpot"
            )
        Workload(**fixed, **{name: 1.0 for name in (*LENGTHS, *LOOPS) if self.has(name)})  # checks their ranges
        if self.has("acceptance_rate"):
            acceptance = ConstantAcceptance(0.5)
        choices, longest = self._draft_lengths(draft_length, max_draft_length)
        if server.first_principles and server.pair is not None:
            check_drafting(server.pair, longest, acceptance)
        cap = 1.0 if self.has("max_batch_size") else max_batch_size
        config = deployment.configuration(
            longest,
            acceptance=acceptance,
            max_batch_size=cap,
            max_batched_tokens=max_batched_tokens,
            drafter_params=drafter_params,
        )
        return Ground(
            servers=self.servers,
            quantity=quantity,
            loop=loop,
            fixed=fixed,
            draft_lengths=choices,
            longest=longest,
            acceptance=acceptance,
            moves_acceptance=self.has("acceptance_rate"),
            max_batch_size=cap,
            max_batched_tokens=max_batched_tokens,
            drafter_scale=float(config.drafter_scale),
        )

    def _draft_lengths(self, draft_length, most: int) -> tuple[tuple[float, ...] | None, float]:
        """(draft lengths to choose from, None where an axis moves it; the longest)."""
        moving = self.made.get("draft_length")
        if moving is not None:
            return None, float(moving.values[-1])
        if draft_length == "best":
            check_range("max_draft_length", most, 1, KINDS["draft_length"].high, low_open=False, unit="tok")
            return tuple(float(k) for k in range(1, int(most) + 1)), float(int(most))
        check_range("draft_length", draft_length, 0, KINDS["draft_length"].high, low_open=True, unit="tok, or 'best'")
        return (float(draft_length),), float(draft_length)

    def told(self) -> dict[str, Any]:
        """What is told of servers that were not measured: ``memory`` (None over hardware) and ``assumptions``."""
        if not self.subjects:
            return {}
        if not self.has(HARDWARE):
            return self.subjects[0].told()
        lines = dict.fromkeys(line for subject in self.subjects for line in subject.assumptions)
        return {"memory": None, "assumptions": list(lines)}

    def warnings(self, ground: Ground) -> list[str]:
        """What the map takes for granted."""
        notes = []
        deployment = self.servers[0].deployment
        if ground.acceptance is None and deployment.mixed_acceptance:
            notes.append(deployment.mixed_acceptance)
        if self.has("drafter_scale") or ground.drafter_scale != 1.0:
            notes.append(
                "drafting times are scaled with the drafter's size, as published within a model family; acceptance is "
                "left as it is, though a drafter of another size has another one"
            )
        if (
            ground.quantity in ("energy", "memory")
            and ground.draft_lengths is not None
            and len(ground.draft_lengths) > 1
        ):
            notes.append(
                f"the best draft length is the best for {ground.quantity} alone: what it does to latency is another map"
            )
        if ground.states == 0 and ground.loop == "arrival_rate":
            notes.append("no batch cap is known, or one above 1,024 requests: nobody waits for a place")
        return notes


def _made(name: str, values: Any, points: int) -> Axis | None:
    if isinstance(values, Axis):
        return values
    if values is None and name == "arrival_rate":
        return None
    if values is None and name in KINDS and KINDS[name].default is not None:
        return spaced(name, *KINDS[name].default, points=points)  # type: ignore[misc]
    return make_axis(name, [] if values is None else list(values))


def _on(subject, hardware: str | None, tensor_parallel: int | None, max_batched_tokens: float | None):
    """The subject on other hardware."""
    if hardware is None:
        return subject
    if isinstance(subject, FittedDeployment):
        return moved(subject, accelerator(hardware), tensor_parallel, max_batched_tokens)
    if subject.deployment.quality.get("rows") == 0:
        return before_traces(replace(subject.pair, hardware=accelerator(hardware)), max_batched_tokens)
    raise InputError("axis hardware: the fit was moved already; leave its hardware out")


def _load(made: Mapping[str, Any], loads: Mapping[str, float | None]) -> tuple[str, float | None]:
    """(loop, its load, None where an axis moves it)."""
    moving = [name for name in LOOPS if name in made]
    given = [name for name in LOOPS if loads[name] is not None]
    if len(moving) + len(given) != 1:
        got = " and ".join([*given, *(f"the axis {name}" for name in moving)]) or "none"
        raise InputError(f"load: got {got}; allowed: one of arrival_rate and concurrency, given or as an axis")
    return (moving or given)[0], None if moving else loads[given[0]]


def _length(name: str, value: float | None, measured: Mapping[str, Any]) -> float:
    if value is not None:
        return float(value)
    span = measured.get(name)
    if not span or span[0] != span[1]:
        told = "no trace tells it" if not span else f"the measured ones differ ({span[0]:g} to {span[1]:g} tok)"
        raise InputError(f"{name} is needed: {told}")
    return float(span[0])


def _up_to_capacity(ground: Ground, made: Mapping[str, Axis | None], points: int) -> Axis:
    (other,) = [axis for axis in made.values() if axis is not None]
    at = {other.name: other.value(other.nodes), "arrival_rate": np.full(len(other.values), 1e-6)}
    found = replace(ground, states=states_for(ground.caps(at))).capacities(at)
    if not np.isfinite(found).any():
        raise InputError("axis arrival_rate: the capacity is not bounded; give the rates, arrival_rate=first:last")
    largest = float(found[np.isfinite(found)].max())
    return spaced("arrival_rate", LEAST * largest, MOST * largest, points)
