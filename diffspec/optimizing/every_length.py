"""Every draft length at every load: means, percentiles, goodput, energy and cost, exactly at whole lengths and
differentiable at real ones.

    cost per million output tokens = price of an hour * 1e6 / (3600 * throughput * output_length)
    memory: that of :class:`diffspec.resources.MemoryUse`, tokens = in flight*(prompt + output*(1 + output_scv)/2)

In flight are as many requests as the batch cap allows, and no more than a closed loop has. Energy is
:func:`diffspec.optimizing.servers.joules`', per million output tokens.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.analysis.answers import metric_values
from diffspec.analysis.plain import few_sizes, padded_rows
from diffspec.configuration import Configuration, batch_cap
from diffspec.first_principles import FirstPrinciples
from diffspec.lengths import Lengths
from diffspec.optimizing.limits import MEMORY, costs
from diffspec.optimizing.question import Question
from diffspec.optimizing.relaxation import at_draft_length, relaxed_draft_lengths
from diffspec.optimizing.servers import FIT_AGAIN, MILLION, NO_PAIR, Server, hours_per_million, joules, when_busy
from diffspec.parameters import Scalar
from diffspec.percentiles import known_up_to, predict_distribution, states_for
from diffspec.prediction import Prediction
from diffspec.programs import program
from diffspec.results import RESULTS, InputError
from diffspec.serving import MOST_STATES, ServingModel
from diffspec.workload import Workload

Values = dict[str, np.ndarray]
SPREAD_DRAWS = 32
"""Draws that are asked for percentiles or goodput, which take their time."""
SPREAD_ROUNDS = 4
"""Rounds of multipliers for such a question."""


class EveryLength(NamedTuple):
    """A question about draft lengths 0..``longest`` at each load; ``workloads`` has a leading axis. ``server`` and
    ``price`` [1/h] are those of the whole replica."""

    question: Question
    longest: int
    workloads: Workload
    config: Configuration
    server: Server
    price: float | None
    max_batched_tokens: float | None = None

    def values(self, serving: ServingModel) -> tuple[Values, np.ndarray]:
        """(values, saturated), [loads, draft lengths 0..longest], of every mean and all that the question looks at."""
        states = 0
        if self.question.spread:  # how long the chain must be depends on the batch
            states = self._states(self._evaluate(serving, _means, ())[0]["effective_batch_size"])
        found, saturated = self._evaluate(serving, *self._looked_at(states))
        if self.question.spread:
            beyond = found["effective_batch_size"] > self._known_up_to(states)
            found |= {name: np.where(beyond, np.inf, found[name]) for name in self.question.percentiles}
            if "goodput" in found:
                none = beyond | (found["goodput"] <= 1e-9 * found["throughput"])
                found["goodput"] = np.where(none, 0.0, found["goodput"])
        return found, saturated

    def drawn(self, models: list[ServingModel]) -> list[tuple[Values, np.ndarray]]:
        """:meth:`values` of each of ``models``, of the first 32 where percentiles or goodput are looked at."""
        return [self.values(model) for model in (models[:SPREAD_DRAWS] if self.question.spread else models)]

    def relaxed(self, smooth: ServingModel, values: Values) -> np.ndarray:
        """Best real draft length of each load; ``values``: those at whole lengths. Percentiles take their time: they
        are relaxed from the best whole length only, in few rounds."""
        function, data = self._looked_at(self._states(values["effective_batch_size"]) if self.question.spread else 0)
        asked = (self.question.objective, self.question.limits, self.longest, smooth, self.workloads, self.config)
        if not self.question.spread:
            return relaxed_draft_lengths(*asked, function, data)
        cost, worst, _ = costs(values, values["utilization"] >= 1.0, self.question.limits, self.question.objective)
        best = np.argmin(np.where(worst <= 0, cost, 1e6 * (1.0 + worst))[:, 1:], axis=1)  # of lengths 1 and more
        starts = (best / max(self.longest - 1.0, 1.0))[:, None]
        return relaxed_draft_lengths(*asked, function, data, starts, SPREAD_ROUNDS)

    def unknown(self, values: Values) -> list[str]:
        """A warning where the mean batch is beyond what percentiles are computed for."""
        batches = values["effective_batch_size"]
        most = self._known_up_to(self._states(batches)) if self.question.spread else np.inf
        loads = [f"{rate:g}" for rate, row in zip(self._rates(), batches > most, strict=True) if row.any()]
        told = f"req/s some batches are above {most:.0f} req, where no percentile is computed"
        return [f"at {', '.join(loads)} {told}"] if loads else []

    def _rates(self) -> np.ndarray:
        load = self.workloads.arrival_rate if self.workloads.is_open else self.workloads.concurrency
        return np.asarray(load)

    def _states(self, batches: np.ndarray) -> int:
        cap = self._cap()
        return states_for(None if cap is None else min(float(cap), MOST_STATES), float(batches.max()))

    def _known_up_to(self, states: int) -> float:
        return float(known_up_to(states, self._cap()))

    def _cap(self) -> Scalar | None:
        return batch_cap(jax.tree.map(lambda leaf: leaf[0], self.workloads), self.config)

    def _looked_at(self, states: int) -> tuple[Callable, tuple]:
        """:class:`LookedAt` with its data."""
        question, workload = self.question, jax.tree.map(lambda leaf: float(leaf[0]), self.workloads)
        pair = self.server.pair_at(workload) if "energy" in question.metrics else None
        if "energy" in question.metrics and pair is None:
            raise InputError(f"energy: {NO_PAIR}; {FIT_AGAIN}")
        if "cost" in question.metrics and self.price is None:
            raise InputError("cost: no price is known; allowed: with cost_per_hour, the price of a device")
        if not (question.spread or question.spent):
            return _means, ()
        use = self.server.memory_use(workload, self.max_batched_tokens) if MEMORY in question.metrics else None
        law, price = Lengths.lognormal(float(workload.output_scv)), np.float64(self.price or np.nan)
        key = None if pair is None else json.dumps(pair.to_dict(), sort_keys=True)
        return LookedAt(question.of_one, states, key), (question.bounds, law, price, use)

    def _evaluate(self, serving: ServingModel, function: Callable, data: tuple) -> tuple[Values, np.ndarray]:
        count = len(self._rates())
        workloads = padded_rows(self.workloads, few_sizes(count))
        found = _evaluate(function, self.longest, serving, workloads, self.config, data, count)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], found)


@program(0, 1)
def _evaluate(function: Callable, longest: int, serving: ServingModel, workloads: Workload, config, data, count):
    """Of the first ``count`` loads; traced, so that few programs serve any number of them."""
    lengths = jnp.arange(longest + 1, dtype=float)

    def at_load(workload: Workload):
        def at_length(length):
            at = at_draft_length(config, length)
            prediction = serving.predict(workload, at)
            values = function(serving, workload, at, prediction, data)
            values |= {"effective_batch_size": prediction.effective_batch_size}
            return values, prediction.result == RESULTS.saturated

        return jax.vmap(at_length)(lengths)

    if function is _means:
        return jax.vmap(at_load)(workloads)

    def store(number, whole):  # percentiles take memory and time: load by load, none that is not there
        found = at_load(jax.tree.map(lambda leaf: leaf[number], workloads))
        return jax.tree.map(lambda leaf, one: leaf.at[number].set(one), whole, found)

    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(jax.vmap(at_load), workloads))
    return jax.lax.fori_loop(0, count, store, empty)


def _means(serving: ServingModel, workload: Workload, config: Configuration, found: Prediction, data):
    return metric_values(found)


class LookedAt(NamedTuple):
    """(serving, workload, config, prediction, data) -> every mean and all that ``question`` looks at, by name; equal
    for the same question, so that its program is compiled once. ``states`` [req]: of the chain of requests;
    ``pair_json``: of the architecture and hardware, for energy.

    ``data``: (bounds [s] of the limits on single requests, the law of lengths, price of an hour [1/h], the
    :class:`diffspec.resources.MemoryUse`, None without a limit on memory)
    """

    question: Question
    states: int
    pair_json: str | None

    def __call__(self, serving: ServingModel, workload: Workload, config: Configuration, found: Prediction, data):
        question, (bounds, law, price, use) = self.question, data
        values: dict[str, Any] = metric_values(found)
        if question.spread:
            percents = tuple(dict.fromkeys(int(name.split("_p")[1]) for name in question.percentiles))
            limited = [limit.metric for limit in question.within]
            times: Mapping[str, Any] = {
                name: bounds[np.flatnonzero([one == name for one in limited])] for name in dict.fromkeys(limited)
            }
            means = {"ttft": found.ttft, "e2e": found.e2e_latency}
            spread = predict_distribution(
                serving, workload, config, law, states=self.states, percentiles=percents, at=times, means=means
            )
            tails = spread.at_means(**means)
            for name in question.percentiles:
                metric, percent = name.split("_p")
                values[name] = tails[metric][percents.index(int(percent))]
            if "goodput" in question.metrics:
                share = jnp.prod(jnp.concatenate(list(spread.attained.values())))
                values["goodput"] = found.throughput * jnp.maximum(share, 1e-12)  # for its logarithm
        if "cost" in question.metrics:
            values["cost"] = hours_per_million(price, found.throughput, workload.output_length)
        if "energy" in question.metrics and self.pair_json is not None:
            pair = FirstPrinciples.from_dict(json.loads(self.pair_json))
            batch = when_busy(found.effective_batch_size, workload)
            spent = joules(pair, serving.step_time, workload, config, batch, found.throughput)
            values["energy"] = MILLION * spent
        if use is not None:
            caps = [jnp.asarray(n, dtype=float) for n in (config.max_batch_size, workload.concurrency) if n is not None]
            most = jnp.min(jnp.stack(caps)) if caps else jnp.inf
            values[MEMORY] = use.gigabytes(most * workload.held_tokens, config.draft_length > 0, config.drafter_scale)
        return values
