"""A serving deployment: step time, prefill sharing and the equilibrium, composed into predictions.

One request that sees n requests in service (itself included; o = n - self_share others) spends

    residence(n) = request_overhead + p + prefill_interference*p*o + (steps + first_token_steps*o/(1+o)) * step(n)

with p the prefill time of one prompt, steps the renewal count of :mod:`diffspec.acceptance` and step(n) the engine step
over n sequences. o/(1+o) is the chance to arrive in mid-step: then the first token waits for the step under way and for
the others' share of the step that carries the prompt. The others' prefill falls evenly on the time of a request; in a
closed loop, the more its requests start together (sync falls as the spread of steps per request grows), the nearer it
comes to (N-1)/2*p before the first token. Decode carries the rest. All times in s.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from diffspec.acceptance import StepsForm
from diffspec.break_even import break_even_rate
from diffspec.configuration import Configuration, batch_cap
from diffspec.finite_runs import finite_run, finite_run_factor
from diffspec.parameters import Scalar, parameter
from diffspec.prediction import Comparison, LoadSplit, Prediction
from diffspec.request_cost import RequestCost, request_cost
from diffspec.request_mix import mean_workload, request_mix
from diffspec.results import RESULTS
from diffspec.steady_state import (
    SteadyState,
    batch_with_residence,
    share_reaches_one,
    solve_closed_loop,
    solve_open_loop,
)
from diffspec.step_time import AbstractStepTime, StepParts
from diffspec.waiting import prompt_wait, queue_scv, requests_in_system, wait_of_finite_run, waiting_factor
from diffspec.workload import Workload

MOST_STATES = 1024
"""Largest batch cap for which waiting in open loops is computed."""

ENDLESS = 1e9
"""A run of so many requests [req] is taken for a steady state."""


class ServingModel(eqx.Module):
    """Latency model of one deployment; :meth:`predict` is the main verb. Differentiable and batchable by `jax.vmap`.

    Beside the step time it holds what a request costs outside decode steps. ``self_share`` = 1: a request sees the
    time-average batch plus itself; 0 reproduces the published forms, as ``steps_form="published"`` does for steps (set
    ``first_token_steps`` to 0 with it: a request that does not see itself makes that term break the scale bound).
    ``waiting_states``: largest cap for which waiting in open loops is computed; 0 turns it off. ``finite_runs``: how a
    workload with n_requests is met; the trapezoid is a cheap first approximation (see :mod:`diffspec.finite_runs`).

    >>> from diffspec.step_time import AffineStepTime
    >>> model = ServingModel(AffineStepTime(verify_base=0.02, verify_query=0.001, prefill_token=1e-4))
    >>> prediction = model.predict(Workload(prompt_length=100, output_length=51, arrival_rate=2.0), Configuration())
    >>> round(float(prediction.e2e_latency), 4)
    1.2235
    """

    step_time: AbstractStepTime
    request_overhead: Scalar = parameter(0.0, unit="s", meaning="per request, outside the engine step (HTTP, tokens)")
    prefill_interference: Scalar = parameter(
        1.0, unit="1", meaning="a prompt's prefill times this is what every other request in service pays"
    )
    first_token_steps: Scalar = parameter(
        1.0, unit="step", low=0.0, high=3.0, meaning="steps that a prompt arriving at a busy engine waits and shares"
    )
    closed_loop_sync: Scalar = parameter(
        1.0, unit="1", low=0.0, high=2.0, meaning="how far a closed loop's requests start together: ttft sync*(N-1)/2*p"
    )
    sync_spread: Scalar = parameter(
        1.5, unit="step", meaning="spread of steps per request that halves the synchrony of a closed loop"
    )
    self_share: float = eqx.field(static=True, default=1.0)
    steps_form: StepsForm = eqx.field(static=True, default="renewal")
    waiting_states: int = eqx.field(static=True, default=MOST_STATES)
    finite_runs: Literal["fluid", "trapezoid"] = eqx.field(static=True, default="fluid")

    def predict(self, workload: Workload, config: Configuration) -> Prediction:
        """Steady state (or finite run, if workload.n_requests is given) of ``config`` under ``workload``.

        Open loop: B solves B = arrival_rate*residence(batch_seen(B)), batch_seen = max(self_share, B +
        self_share*arrival_scv), and requests wait where a batch cap fills; closed loop: B = min(concurrency, cap).
        A finite run (:mod:`diffspec.finite_runs`) is always successful: a utilization above 1 tells its overload.
        Errors: never for saturation, which is a result with numbers; :class:`InputError` for ranges.
        """
        request, cap = self.within_budget(workload, config)
        residence = partial(self._residence, request)
        if workload.is_open:
            state = solve_open_loop(
                residence,
                workload.arrival_rate,  # type: ignore[arg-type]
                max_batch_size=cap,
                batch_seen=lambda batch: self._batch_seen(workload, batch),
                scale_bounded=self.step_time.scale_bounded,
            )
            sync, waiting = 0.0, self._waiting(workload, request, state, batch_cap(workload, config))
            if workload.n_requests is not None and self.finite_runs == "fluid":
                state = self._finite_run(workload, request, state, cap)
            times = self._times(request, state.batch_seen)
            if request.budget is not None:
                waiting = waiting + self._prompt_wait(workload, request, state, times)
        else:
            state = solve_closed_loop(residence, workload.concurrency, max_batch_size=cap)  # type: ignore[arg-type]
            in_flight = jnp.asarray(workload.concurrency, dtype=float)
            waiting = jnp.maximum(in_flight - state.effective_batch_size, 0.0) / state.throughput
            sync = self._sync(request)
            times = self._times(request, state.batch_seen)
        alone = request.step_parts(jnp.full_like(times[0], self.self_share))
        met = self._foreign_prefill_in_ttft(request, times, sync)
        return self._assemble(workload, request, state, times, met, waiting, alone)

    def predict_classes(self, workloads: Sequence[Workload], configs: Sequence[Configuration]) -> Prediction:
        """Steady state of several classes that share the server in open loops, with an axis of classes
        (:mod:`diffspec.request_mix`): B_c = arrival_rate_c*residence_c, caps are the first configuration's, arrivals
        are taken for Poisson. ``capacity``: of the class, when all rates grow alike until the server saturates.

        >>> from diffspec.step_time import AffineStepTime
        >>> model = ServingModel(AffineStepTime(verify_base=0.02, verify_sequence=1e-3, prefill_token=1e-4))
        >>> both = [Workload(100, 51, arrival_rate=1.0), Workload(2000, 21, arrival_rate=0.5)]  # chat, summaries
        >>> found = model.predict_classes(both, [Configuration(), Configuration()])
        >>> [round(float(value), 3) for value in found.e2e_latency]
        [1.314, 0.749]
        """
        request = request_mix(self.step_time, workloads, configs, self.steps_form)
        share: Any = request.share
        rates = jnp.asarray([workload.arrival_rate for workload in workloads], dtype=float)
        together = mean_workload(workloads, request.mix)
        places = batch_cap(together, configs[0])
        cap = self._largest_batch(request, places)
        state = solve_open_loop(
            partial(self._residence, request),
            jnp.sum(rates),
            max_batch_size=cap,
            batch_seen=lambda batch: self._batch_seen(together, batch),
            scale_bounded=self.step_time.scale_bounded,
        )
        waiting = self._waiting(together, request, state, places)
        times = jax.tree.map(partial(jnp.broadcast_to, shape=rates.shape), self._times(request, state.batch_seen))
        met = self._foreign_prefill_in_ttft(request, times)
        if request.budget is not None:
            waiting = waiting + self._prompt_wait(together, request, state, times)
        alone = request.step_parts(jnp.full_like(times[0], self.self_share))

        def of_class(share, cost, times, met, alone, output_length):
            own = replace(
                state,
                effective_batch_size=state.throughput * share * times[0],
                throughput=state.throughput * share,
                capacity=state.capacity * share,
            )
            workload = eqx.tree_at(lambda w: w.output_length, together, output_length)
            return self._assemble(workload, cost, own, times, met, waiting, alone)

        lengths, cost = jnp.asarray([w.output_length for w in workloads], dtype=float), replace(request, budget=None)
        return jax.vmap(of_class)(share, replace(cost, share=None), times, met, alone, lengths)

    def compare(self, workload: Workload, config: Configuration) -> Comparison:
        """Predict ``config`` and the same server without speculation; speedup and break-even arrival rate."""
        speculative, plain = self._both_arms(workload, config)
        return Comparison(
            speculative=speculative,
            plain=plain,
            speedup=plain.e2e_latency / speculative.e2e_latency,
            breakeven_rate=self.breakeven_rate(workload, config),
        )

    def _both_arms(self, workload: Workload, config: Configuration) -> tuple[Prediction, Prediction]:
        """Predictions with and without speculation; draft_length 0 drops every cost of the drafter."""
        lengths = jnp.stack([jnp.asarray(config.draft_length, dtype=float), jnp.zeros(())])
        both = jax.vmap(lambda length: self.predict(workload, eqx.tree_at(lambda c: c.draft_length, config, length)))(
            lengths
        )
        return jax.tree.map(lambda leaf: leaf[0], both), jax.tree.map(lambda leaf: leaf[1], both)

    def breakeven_rate(self, workload: Workload, config: Configuration):
        """Smallest arrival rate [req/s] at which ``config`` and no speculation are equally fast, in an open loop:
        :func:`diffspec.break_even.break_even_rate`. Infinite when the order never changes; no derivative."""
        return break_even_rate(lambda load: self._both_arms(load, config), workload)

    def residence_time(self, workload: Workload, config: Configuration, batch_seen: Scalar):
        """Time in service [s] of a request that sees ``batch_seen`` requests, itself included: the function whose
        equilibrium :meth:`predict` solves."""
        return self._times(self.request_cost(workload, config), jnp.asarray(batch_seen, dtype=float))[0]

    def times_in_service(self, workload: Workload, request: RequestCost, batch_seen: Scalar):
        """Time in service of a ``request`` (:meth:`request_cost`) that sees ``batch_seen`` requests, itself included,
        and its part until the first token, waiting left out [s]."""
        times = self._times(request, jnp.asarray(batch_seen, dtype=float))
        sync = 0.0 if workload.is_open else self._sync(request)
        in_ttft = self._foreign_prefill_in_ttft(request, times, sync)
        first = self.request_overhead + request.prefill + in_ttft + times[3] * times[1].total
        return times[0], jnp.where(jnp.asarray(workload.output_length, dtype=float) <= 1.0, times[0], first)

    def step_parts(self, workload: Workload, config: Configuration, sequences: Scalar) -> StepParts:
        """Parts of the engine step [s] over ``sequences`` decoding requests of this workload."""
        return self.request_cost(workload, config).step_parts(sequences)

    def request_cost(self, workload: Workload, config: Configuration) -> RequestCost:
        """Prefill, steps and step parts of one request of ``workload`` on ``config``."""
        return request_cost(self.step_time, workload, config, self.steps_form)

    def _times(self, request: RequestCost, n):
        """(residence, step parts, foreign prefill, steps in the first token) for a request that sees n in service."""
        others = jnp.maximum(n - self.self_share, 0.0)
        shared_steps, decoding = self._shared_steps(request, n, others)
        parts = request.step_parts(decoding)
        own = self.request_overhead + request.prefill + (request.steps + shared_steps) * parts.total
        foreign = request.foreign_prefill(own, self.prefill_interference * others)
        return own + foreign, parts, foreign, shared_steps

    def _sync(self, request: RequestCost):
        """How far the requests of a closed loop start together, see the class."""
        return self.closed_loop_sync / (1.0 + request.spread / self.sync_spread)

    def _shared_steps(self, request: RequestCost, n, others):
        """Others' steps [step] until the first token, and the sequences that decode of n in service."""
        busy = others / (1.0 + others)
        chunks = request.chunks(others) * busy
        return self.first_token_steps * busy + chunks, request.decoding(n, chunks)

    def _waiting(self, workload: Workload, request: RequestCost, state: SteadyState, cap):
        """Mean wait [s] for one of ``cap`` places in an open loop; see :mod:`diffspec.waiting`."""
        if cap is None:
            return jnp.zeros_like(state.residence_time)
        times = self._times(request, cap)[0]
        full = request.mean(times)
        spread = (request.spread / jnp.maximum(request.steps, 1e-9)) ** 2
        if request.share is not None:  # classes that take longer are part of the spread
            spread = request.mean(times**2 * (1.0 + spread)) / full**2 - 1.0
        prompts = cap * request.mean(request.prefill) * self.prefill_interference
        service_scv = queue_scv(spread, prompts / full)
        waiting = None
        if self.waiting_states > 0:
            known = cap <= self.waiting_states
            places = jnp.where(known, cap, 1.0)
            served = jnp.minimum(jnp.arange(1, self.waiting_states + 1, dtype=jnp.result_type(float)), places)
            residence = jax.vmap(lambda n: self._residence(request, n))(served)
            rate = jnp.where(known, state.throughput, 0.5 * places / residence[-1])
            chain = requests_in_system(residence, rate, places)
            waiting = chain.waiting_time * waiting_factor(chain.load, places, service_scv, workload.arrival_scv)
            waiting = jnp.where(known, waiting, 0.0)
        if workload.n_requests is None:
            return jnp.zeros_like(full) if waiting is None else waiting
        return self._wait_of_run(workload, cap, cap / full, waiting, service_scv, spread)

    def _foreign_prefill_in_ttft(self, request: RequestCost, times, sync: Scalar = 0.0):
        """How much of others' prefill [s] a request pays before its first token.

        Others' prompts fall evenly on the time of a request, its own prefill counting for (1/2 + rho)/(1 + rho) of
        itself, rho = foreign/residence: the prompts of a step end together, behind those of the step under way (gated
        service: ttft = p + s + (1/2 + rho)*(s/(1-rho) + p*rho/(1-rho^2)) at a step s). Synchrony makes it sync/2.
        """
        residence, parts, foreign, shared_steps = times
        load = jnp.clip(foreign / residence, 0.0, 1.0)
        joining = shared_steps * parts.total
        before = joining + request.met_prompt * (0.5 + load) / (1.0 + load)
        evenly = before / jnp.maximum(joining + request.prefill + request.steps * parts.total, 1e-30)
        return foreign * ((1.0 - sync) * evenly + 0.5 * sync)

    def _prompt_wait(self, workload: Workload, request: RequestCost, state: SteadyState, times):
        """Mean wait [s] of a prompt for the token budget, beyond what the residence holds of others' prefill."""
        service = request.mean(each := request.prompt_service(state.batch_seen))
        if workload.n_requests is None:  # Pollaczek and Khinchine: prompts of several classes differ
            wait = prompt_wait(service, state.throughput) * (request.mean(each**2) / service**2)
        else:
            wait = prompt_wait(service, workload.arrival_rate)  # type: ignore[arg-type]
            wait = self._wait_of_run(workload, 1.0, 1.0 / service, wait)
        return jnp.maximum(wait - request.mean(self._foreign_prefill_in_ttft(request, times)), 0.0)

    def _wait_of_run(
        self, workload: Workload, places, capacity, stationary, service_scv: Any = 0.0, length_scv: Any = 0.0
    ):
        n_requests = jnp.asarray(workload.n_requests, dtype=float)
        waiting = wait_of_finite_run(
            n_requests,
            places,
            workload.arrival_rate,  # type: ignore[arg-type]
            capacity,
            arrival_scv=workload.arrival_scv,
            service_scv=service_scv,
            length_scv=length_scv,
            stationary=stationary,
        )
        return waiting if stationary is None else jnp.where(n_requests >= ENDLESS, stationary, waiting)

    def within_budget(self, workload: Workload, config: Configuration) -> tuple[RequestCost, Scalar | None]:
        """The cost of a request, and the largest batch [req] in service or None: by batch size, KV memory, and the
        token budget, n/residence(n) = 1/prompt_service(most_decoding); see :mod:`diffspec.request_cost`."""
        request, cap = self.request_cost(workload, config), batch_cap(workload, config)
        return request, self._largest_batch(request, cap)

    def _largest_batch(self, request: RequestCost, cap):
        if request.budget is None:
            return cap
        fastest = request.mean(request.prompt_service(request.most_decoding))
        return share_reaches_one(
            lambda n: n * fastest / self._residence(request, n), jnp.asarray(1e9 if cap is None else cap, dtype=float)
        )

    def _residence(self, request: RequestCost, n):
        """Mean time in service [s] of all requests that see n in service."""
        return request.mean(self._times(request, n)[0])

    def _batch_seen(self, workload: Workload, batch):
        if workload.n_requests is not None and self.finite_runs == "trapezoid":
            batch = batch * finite_run_factor(batch / workload.n_requests)
        return jnp.maximum(batch + self.self_share * workload.arrival_scv, self.self_share)

    def _finite_run(self, workload: Workload, request: RequestCost, steady: SteadyState, cap):
        """The state of a run of n_requests (throughput: n_requests over its duration; effective_batch_size: throughput
        times time in service)."""
        most = jnp.asarray(jnp.inf if cap is None else cap, dtype=float)
        n_requests = jnp.asarray(workload.n_requests, dtype=float)
        own = self.request_overhead + request.prefill
        others_share = 1.0 - 1.0 / n_requests  # of those in service one is itself: a lone request meets nobody

        def work(n, age):
            seen = jnp.minimum(self._batch_seen(workload, n * others_share), most)
            context = workload.prompt_length + workload.output_length * age
            others = jnp.maximum(seen - self.self_share, 0.0)
            shared_steps, decoding = self._shared_steps(request, seen, others)
            return (request.steps + shared_steps) * request.step_parts(decoding, context).total

        def residence(n):
            return self._times(request, n)[0]

        run = finite_run(
            work,
            prefill=request.prefill * self.prefill_interference * others_share,
            arrival_rate=workload.arrival_rate,  # type: ignore[arg-type]
            n_requests=n_requests,
            output_scv=workload.output_scv,
            max_batch_size=most,
            steady_residence=steady.residence_time - own,
            capacity=steady.capacity,
        )
        time = run.residence_time + own
        most = jnp.minimum(jnp.maximum(n_requests, steady.batch_seen), most)
        throughput = n_requests / run.duration
        finite = replace(
            steady,
            effective_batch_size=throughput * time,
            batch_seen=batch_with_residence(residence, time, self.self_share, most),
            residence_time=time,
            throughput=throughput,
            overload=jnp.zeros_like(time),
        )
        endless = n_requests >= ENDLESS
        state = jax.tree.map(lambda known, fluid: jnp.where(endless, known, fluid), steady, finite)
        ends = ~endless & (steady.result == RESULTS.saturated)
        return replace(state, result=RESULTS.where(ends, RESULTS.successful, steady.result))

    def _assemble(
        self, workload, request: RequestCost, state: SteadyState, times, in_ttft, waiting, alone
    ) -> Prediction:
        residence, parts, foreign_prefill, shared_steps = times
        ttft = waiting + self.request_overhead + request.prefill + in_ttft + shared_steps * parts.total
        decode = request.steps * parts.total + foreign_prefill - in_ttft
        e2e = waiting + residence
        only_first = jnp.asarray(workload.output_length, dtype=float) <= 1.0  # ends with its first token
        ttft, decode = jnp.where(only_first, e2e, ttft), jnp.where(only_first, 0.0, decode)
        tokens_after_first = jnp.maximum(jnp.asarray(workload.output_length, dtype=float) - 1.0, 1e-9)
        steps = request.steps + shared_steps

        def split(now, by_itself, per_request=0.0):
            independent = per_request + request.steps * by_itself
            return LoadSplit(independent, steps * now - request.steps * by_itself)

        decomposition = {
            "waiting": LoadSplit(jnp.zeros_like(waiting), waiting),
            "prefill": LoadSplit(request.prefill, foreign_prefill),
            "draft": split(parts.draft, alone.draft),
            "verify": split(parts.verify, alone.verify),
            "overhead": split(parts.overhead, alone.overhead, self.request_overhead),
        }
        return Prediction(
            result=state.result,
            ttft=ttft,
            itl=decode / jnp.maximum(request.steps, 1e-9),
            tpot=decode / tokens_after_first,
            e2e_latency=e2e,
            waiting_time=waiting,
            throughput=state.throughput,
            effective_batch_size=state.effective_batch_size,
            batch_seen=state.batch_seen,
            utilization=state.utilization,
            capacity=state.capacity,
            overload=state.overload,
            residual=state.residual,
            tokens_per_step=request.tokens_per_step,
            steps_per_request=request.steps,
            decomposition=decomposition,
        )
