"""What speculation gains at many points at once: a server with and without it, at any load, length, size or hardware.

A gain is a ratio of the same quantity with and without speculation, above 1 where speculation is better:

    e2e, tpot, ttft   latency without / with                                     (means)
    throughput        open loop: capacity with / without; closed loop: completed requests with / without
    memory            bytes of weights and of the cached tokens in use, without / with      (one device)
    energy            joules per output token, without / with

Before any trace the server without speculation holds no drafter and has more room for its cache, and step times are
those of the lengths at each point; a fit is taken as it is. A drafter of another size (``drafter_scale``) has its times
and its weights scaled, its cache not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from diffspec.acceptance import AbstractAcceptance, ConstantAcceptance
from diffspec.analysis.plain import as_floats
from diffspec.first_principles import FirstPrinciples
from diffspec.fitting.observations import states_of
from diffspec.fitting.principles import serving_model
from diffspec.optimizing.lanes import CALL, CHUNK, COMPILED, in_chunks
from diffspec.optimizing.servers import Server, joules, when_busy, without_drafter
from diffspec.programs import program
from diffspec.resources import BATCHED_TOKENS, MemoryPlan, memory_plan
from diffspec.results import RESULTS
from diffspec.serving import MOST_STATES, ServingModel
from diffspec.workload import Workload

QUANTITIES = ("e2e", "tpot", "ttft", "throughput", "memory", "energy")
FAR = 50.0
"""Logarithm that stands for a gain where only one side serves the load, or only one fits."""


class Gains(NamedTuple):
    """Per point: ``log_gain`` [log units] of the best draft length asked about, +-:data:`FAR` where one side alone
    serves the load or fits, nan where neither; ``draft_length`` [tok] of it; ``plain_saturated``, ``saturated``,
    ``plain_fits``, ``fits``."""

    log_gain: np.ndarray
    draft_length: np.ndarray
    plain_saturated: np.ndarray
    saturated: np.ndarray
    plain_fits: np.ndarray
    fits: np.ndarray


@dataclass(frozen=True)
class Ground:
    """What all points share.

    * ``servers``: by hardware (one where that is no axis); a point's ``hardware`` is its number
    * ``fixed``: numbers of every point that no axis moves: a load, lengths, and what :class:`Workload` has beside them
    * ``draft_lengths`` [tok]: to choose the best of at each point; None: each point has its own
    * ``acceptance``: None where an axis moves the acceptance rate, or the deployment's own is meant
    * ``max_batch_size``, ``max_batched_tokens``, ``drafter_scale``: as asked; a cap where an axis moves it
    * ``longest`` [tok]: the longest draft of all points; ``states``: waiting_states of all predictions
    """

    servers: tuple[Server, ...]
    quantity: str
    loop: str
    fixed: Mapping[str, float]
    draft_lengths: tuple[float, ...] | None
    longest: float
    acceptance: AbstractAcceptance | None
    moves_acceptance: bool
    max_batch_size: float | None
    max_batched_tokens: float | None
    drafter_scale: float
    states: int = MOST_STATES

    def gains(self, points: Mapping[str, np.ndarray], models: "tuple[ServingModel, ...] | None" = None) -> Gains:
        """At points given by arrays of one length; ``models``: by hardware, with a leading axis that a point's
        ``draw`` counts, in place of the servers' own."""
        parts = self._by_server(points, models, self._gains)
        return Gains(*parts)

    def _by_server(self, points: Mapping[str, np.ndarray], models, tell: Callable) -> Any:
        """``tell(found, server, at, lanes, memory)`` of the points of each server, in the order of the points."""
        count = len(next(iter(points.values())))
        which = np.asarray(points.get("hardware", np.zeros(count)), dtype=int)
        order, parts = [], []
        for number, server in enumerate(self.servers):
            chosen = np.flatnonzero(which == number)
            if chosen.size:
                order.append(chosen)
                own = None if models is None else models[number]
                part = {name: np.asarray(values)[chosen] for name, values in points.items()}
                parts.append(self._of_server(server, part, own, tell))
        back = np.argsort(np.concatenate(order))
        return jax.tree.map(lambda *columns: np.concatenate(columns)[back], *parts)

    def _of_server(self, server: Server, points: Mapping[str, np.ndarray], models, tell: Callable) -> Any:
        at, count = self._asked(points)
        lengths = self._draft_lengths(at, count)
        workload = self._workloads(at, count)
        config = self._configurations(server, at, count)
        memory = _memory(server, at, config, self.max_batched_tokens)
        caches = None if memory.caches is None else memory.caches[:, [0, *[1] * (lengths.shape[1] - 1)]]
        served = _lanes_of(server, at, models)
        found = _run(partial(_arms, self.states), (served, workload, config, lengths, caches))
        return tell(found, server, at, (served, workload, config, lengths), memory)

    def _gains(self, found, server: Server, at, lanes: tuple, memory: "Memory") -> Gains:
        cost, ends = self._costs(server, at, found, lanes, memory)
        fits = np.where(np.arange(cost.shape[1]) > 0, memory.fits[:, None], memory.plain_fits[:, None])
        return _compared(np.where(fits, cost, np.inf), ends & fits, lanes[3], memory.plain_fits, memory.fits)

    def _asked(self, points: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
        count = len(next(iter(points.values())))
        return {name: np.full(count, value) for name, value in self.fixed.items()} | dict(points), count

    def caps(self, points: Mapping[str, np.ndarray]) -> np.ndarray:
        """Batch caps [req] at points of all servers, with and without speculation; infinite where there are none."""
        at, count = self._asked(points)
        found = []
        for server in self.servers:
            config = self._configurations(server, at, count)
            memory = _memory(server, at, config, self.max_batched_tokens)
            own = np.full(count, np.inf) if config.max_batch_size is None else config.max_batch_size
            held = at["prompt_length"] + 0.5 * at["output_length"] * (1.0 + at.get("output_scv", 0.0))
            caches = np.full((count, 1), np.inf) if memory.caches is None else memory.caches / held[:, None]
            found.append(np.minimum(own[:, None], np.maximum(caches, 1.0)).ravel())
        return np.concatenate(found)

    def capacities(self, points: Mapping[str, np.ndarray]) -> np.ndarray:
        """The larger capacity [req/s] at points, with or without speculation, of the server of each."""
        parts = replace(self, quantity="throughput", loop="arrival_rate")
        return parts._by_server(points, None, lambda found, *_: found["capacity"].max(axis=1))

    def _draft_lengths(self, at, count: int) -> np.ndarray:
        """[points, 1 + choices]: no speculation first."""
        own = at["draft_length"][:, None] if self.draft_lengths is None else np.tile(self.draft_lengths, (count, 1))
        return np.concatenate([np.zeros((count, 1)), own], axis=1).astype(float)

    def _workloads(self, at, count: int) -> Workload:
        names = ("prompt_length", "output_length", self.loop, "output_scv", "prefix_hit_rate")
        one = Workload(**{name: 1.0 for name in names if name in at})
        lanes = jax.tree.map(lambda leaf: np.full(count, float(leaf)), one)
        present = [name for name in names if name in at]
        return eqx.tree_at(lambda w: [getattr(w, name) for name in present], lanes, [at[name] for name in present])

    def _configurations(self, server: Server, at, count: int):
        acceptance = ConstantAcceptance(0.5) if self.moves_acceptance else self.acceptance
        config = server.deployment.configuration(
            self.longest,
            acceptance=acceptance,
            max_batch_size=self.max_batch_size,
            max_batched_tokens=self.max_batched_tokens,
        )
        config = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (count, *np.shape(leaf))).astype(float), config)
        scale = at.get("drafter_scale", np.full(count, self.drafter_scale))
        config = eqx.tree_at(lambda c: c.drafter_scale, config, scale)
        if self.moves_acceptance:
            config = eqx.tree_at(lambda c: c.acceptance.acceptance_rate, config, at["acceptance_rate"])
        if "max_batch_size" in at:
            config = eqx.tree_at(lambda c: c.max_batch_size, config, at["max_batch_size"])
        return config

    def _costs(self, server: Server, at, found, lanes, memory: "Memory") -> tuple[np.ndarray, np.ndarray]:
        """(what is to be small [points, arms], where it does not exist for want of capacity)."""
        ends = found["saturated"]
        if self.quantity == "throughput":
            served = found["capacity" if self.loop == "arrival_rate" else "throughput"]
            return 1.0 / served, np.zeros_like(ends)
        if self.quantity == "memory":
            context = (at["prompt_length"] + 0.5 * at["output_length"])[:, None]
            drafting = np.arange(found["batch"].shape[1]) > 0
            held = memory.token_bytes[:, None] + np.where(drafting, memory.drafter_token_bytes[:, None], 0.0)
            weights = memory.weights[:, None] + np.where(drafting, memory.drafter_weights[:, None], 0.0)
            return weights + found["batch"] * context * held, ends
        if self.quantity == "energy":
            return _run(_joules_of(server), (*lanes, found["batch"], found["throughput"])), ends
        return found[self.quantity], ends


def _compared(cost: np.ndarray, ends: np.ndarray, lengths: np.ndarray, plain_fits, fits) -> Gains:
    own = np.where(ends | ~np.isfinite(cost), np.inf, cost)
    best = 1 + np.argmin(own[:, 1:], axis=1)
    rows = np.arange(len(own))
    plain, speculative = own[:, 0], own[rows, best]
    with np.errstate(invalid="ignore", divide="ignore"):
        log_gain = np.log(plain) - np.log(speculative)
    log_gain = np.where(np.isnan(log_gain), np.nan, np.clip(log_gain, -FAR, FAR))
    return Gains(log_gain, lengths[rows, best], ends[:, 0], np.asarray(np.all(ends[:, 1:], axis=1)), plain_fits, fits)


@program(0, compiler_options=COMPILED)
def _arms(states: int, lanes: tuple, chunks):
    """What each lane's draft lengths come to, at their cache sizes where these are known."""

    def one(model, workload, config, lengths, caches):
        model = replace(model, waiting_states=states)

        def arm(length, cache):
            chosen = eqx.tree_at(lambda c: c.draft_length, config, length)
            if cache is not None:
                chosen = eqx.tree_at(lambda c: c.kv_capacity_tokens, chosen, cache)
            found = model.predict(workload, chosen)
            return {
                "e2e": found.e2e_latency,
                "tpot": found.tpot,
                "ttft": found.ttft,
                "capacity": found.capacity,
                "throughput": found.throughput,
                "batch": found.effective_batch_size,
                "saturated": found.result == RESULTS.saturated,
            }

        return jax.vmap(arm)(lengths, caches)

    return in_chunks(one, lanes, chunks)


def _run(program: Callable, lanes: tuple) -> Any:
    """``program(lanes, chunks)`` of any number of lanes, by :data:`CALL`."""
    count = len(lanes[3])
    parts = []
    for start in range(0, count, CALL):
        size = min(CALL, count - start)
        index = np.minimum(np.arange(start, start + CALL), count - 1)
        part = jax.tree.map(lambda leaf, index=index: np.asarray(leaf)[index], lanes)
        found = program(part, -(-size // CHUNK))
        parts.append(jax.tree.map(lambda leaf, size=size: np.asarray(leaf)[:size], found))
    return jax.tree.map(lambda *columns: np.concatenate(columns), *parts)


# --- step times at other lengths ------------------------------------------------------------------------------------


def _lanes_of(server: Server, at: Mapping[str, np.ndarray], models: ServingModel | None) -> ServingModel:
    """The serving model of each point, or of its draw; first principles at its lengths: what changes with them does so
    by the same factor in every draw."""
    count = len(at["prompt_length"])
    own = as_floats(server.deployment.serving)
    if models is None:
        lanes = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (count, *leaf.shape)), own)
    else:
        lanes = jax.tree.map(lambda leaf: np.asarray(leaf, dtype=float)[at["draw"].astype(int)], models)
    if not server.first_principles or server.pair is None:
        return lanes
    pair, asked = server.pair, np.stack([at["prompt_length"], at["output_length"]], axis=1)
    if np.all(asked == [pair.prompt_length, pair.output_length]):
        return lanes
    different, place = np.unique(asked, axis=0, return_inverse=True)
    there = [_centres(pair, part) for part in np.array_split(different, -(-len(different) // CALL))]
    centres = jax.tree.map(lambda *leaves: np.concatenate(leaves), *there)

    def moved(lane, centre, here):
        known = np.broadcast_to(here != 0, centre.shape)
        factor = np.where(known, centre / np.where(known, here, 1.0), 1.0)
        return lane * factor[place.ravel()]

    return jax.tree.map(moved, lanes, centres, own)


def _centres(pair: FirstPrinciples, lengths: np.ndarray) -> ServingModel:
    index = np.minimum(np.arange(CALL), len(lengths) - 1)
    found = _program_of_lengths(pair)(lengths[index])
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype=float)[: len(lengths)], found)


_PROGRAMS: dict[tuple[str, int], tuple[Any, Callable]] = {}


def _kept(kind: str, owner: Any, make: Callable) -> Callable:
    """The program made for ``owner``, which has no hash, as long as it is alive: it is kept with it."""
    key = (kind, id(owner))
    if key not in _PROGRAMS:
        if len(_PROGRAMS) > 64:
            _PROGRAMS.clear()
        _PROGRAMS[key] = owner, make()
    return _PROGRAMS[key][1]


def _program_of_lengths(pair: FirstPrinciples) -> Callable:
    def make():
        def one(lengths):
            return serving_model(replace(pair, prompt_length=lengths[0], output_length=lengths[1]))

        return jax.jit(jax.vmap(one), compiler_options=COMPILED)

    return _kept("lengths", pair, make)


def _joules_of(server: Server) -> Callable:
    pair = server.pair
    assert pair is not None

    def make():
        def one(model, workload, config, lengths, batches, rates):
            there = replace(pair, prompt_length=workload.prompt_length, output_length=workload.output_length)

            def arm(length, batch, rate):
                chosen = eqx.tree_at(lambda c: c.draft_length, config, length)
                return joules(there, model.step_time, workload, chosen, when_busy(batch, workload), rate)

            return jax.vmap(arm)(lengths, batches, rates)

        @partial(jax.jit, compiler_options=COMPILED)
        def program(lanes, chunks):
            with jax.numpy_dtype_promotion("standard"):
                return in_chunks(one, lanes, chunks)

        return program

    return _kept("joules", pair, make)


# --- memory ---------------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Per point and device: ``caches`` [points, 2] [tok] that the server keeps without and with a drafter, None where
    that is not known; weights [B] and bytes of a cached token, the drafter's apart; whether either fits."""

    caches: np.ndarray | None
    weights: np.ndarray
    drafter_weights: np.ndarray
    token_bytes: np.ndarray
    drafter_token_bytes: np.ndarray
    plain_fits: np.ndarray
    fits: np.ndarray


def _memory(server: Server, at: Mapping[str, np.ndarray], config, max_batched_tokens: float | None) -> Memory:
    count, scale = len(at["prompt_length"]), np.asarray(config.drafter_scale)
    kept = server.deployment.defaults.get("kv_capacity_tokens")
    caches = None if kept is None else np.full((count, 2), float(kept))
    if server.pair is None:
        zeros, yes = np.zeros(count), np.ones(count, bool)
        return Memory(caches, zeros, zeros, zeros, zeros, yes, yes)
    tokens = BATCHED_TOKENS if max_batched_tokens is None else max_batched_tokens
    asked = np.stack([at["prompt_length"], at["output_length"], scale], axis=1)
    different, place = np.unique(asked, axis=0, return_inverse=True)
    rows = np.asarray([_plans(server.pair, tokens, *map(float, row)) for row in different])[place.ravel()]
    plain_cache, cache, weights, drafter, token, drafter_token, plain_fits, fits = rows.T
    if server.first_principles:
        caches = np.maximum(np.stack([plain_cache, cache], axis=1), 1.0)
    ran = np.full(count, server.subject is None)  # a measured server fits
    return Memory(caches, weights, drafter, token, drafter_token, (plain_fits > 0) | ran, (fits > 0) | ran)


def _plans(pair: FirstPrinciples, tokens: float, prompt: float, output: float, scale: float) -> tuple[float, ...]:
    """(cache without and with the drafter, weights, its weights, a token's bytes, its own, whether either fits)."""
    there = replace(pair, prompt_length=prompt, output_length=output)
    plan = memory_plan(there, batched_tokens=tokens)
    plain = memory_plan(without_drafter(there), batched_tokens=tokens) if pair.drafter_kind else plan
    cache, drafter = _resized(plan, scale)
    both = plan.kv_bytes_per_token, plan.drafter_kv_bytes_per_token
    longest = prompt + output
    return plain.kv_capacity_tokens, cache, plan.verifier_bytes, drafter, *both, plain.fits, cache >= longest


def _resized(plan: MemoryPlan, scale: float) -> tuple[float, float]:
    """(cache, drafter weights) when the drafter has ``scale`` times the weights."""
    drafter = plan.drafter_bytes * scale
    if drafter == plan.drafter_bytes:
        return plan.kv_capacity_tokens, drafter
    free = plan.free_bytes - plan.missing_bytes + plan.drafter_bytes - drafter
    return max(free, 0.0) / (plan.kv_bytes_per_token + plan.drafter_kv_bytes_per_token), drafter


def states_for(caps: np.ndarray) -> int:
    """waiting_states of predictions whose batch caps [req] are among ``caps`` or between them.

    >>> states_for(np.array([16.0, 200.0])), states_for(np.array([16.0, 5000.0])), states_for(np.array([np.inf]))
    (256, 1024, 0)
    """
    waits = caps <= MOST_STATES
    return 0 if not waits.any() else states_of(float(caps.max())) if waits.all() else MOST_STATES
