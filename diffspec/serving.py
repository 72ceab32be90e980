"""A serving deployment: step time, prefill sharing and the equilibrium, composed into predictions.

One request that sees n requests in service (itself included; o = n - self_share others) spends

    residence(n) = request_overhead + p + prefill_interference*p*o + (steps + first_token_steps*o/(1+o)) * step(n)

with p the prefill time of one prompt, steps the renewal count of :mod:`diffspec.acceptance` and step(n) the engine step
over n sequences. o/(1+o) is the chance to arrive in mid-step: then the first token waits for the step under way and for
the others' share of the step that carries the prompt. The others' prefill falls evenly on the time of a request; in a
closed loop, the more its requests start together (sync falls as the spread of steps per request grows), the nearer it
comes to (N-1)/2*p before the first token. Decode carries the rest. All times in s.
"""

from dataclasses import replace
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from diffspec.acceptance import StepsForm
from diffspec.configuration import Configuration, batch_cap
from diffspec.finite_runs import finite_run, finite_run_factor
from diffspec.parameters import Scalar, parameter
from diffspec.prediction import Comparison, LoadSplit, Prediction
from diffspec.request_cost import RequestCost, request_cost
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

        def residence(n):
            return self._times(request, n)[0]

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
            if config.max_batched_tokens is not None:  # of that wait the residence holds the others' prefill
                _, met = self._foreign_prefill(request, state.residence_time, times, sync)
                waiting = waiting + jnp.maximum(self._prompt_wait(workload, request, state) - met, 0.0)
        else:
            state = solve_closed_loop(residence, workload.concurrency, max_batch_size=cap)  # type: ignore[arg-type]
            in_flight = jnp.asarray(workload.concurrency, dtype=float)
            waiting = jnp.maximum(in_flight - state.effective_batch_size, 0.0) / state.throughput
            sync = self._sync(request)
            times = self._times(request, state.batch_seen)
        return self._assemble(workload, request, state, times, sync, waiting)

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
        """Smallest arrival rate [req/s] at which ``config`` and no speculation are equally fast, in an open loop.

        Infinite when the order never changes below the smaller of both capacities: then the sign at any load tells it.
        Speculation may lose at low load and win at high load as well as the other way round (long contexts), so the
        order is scanned at 64 rates and the first change is refined by bisection to 1e-10 of capacity. For affine
        residence without self share it is r*/C2_plain, r* = (1-C1R)/(C2R-C1R). No derivative: use speedup's.
        """

        def arms(rate):
            load = replace(workload, arrival_rate=rate, concurrency=None, n_requests=None)
            fast, slow = self._both_arms(load, config)
            return jnp.log(fast.e2e_latency / slow.e2e_latency), jnp.minimum(fast.capacity, slow.capacity)

        lanes = 64
        whole = jnp.linspace(0.0, 1.0, lanes)
        below_capacity = jnp.concatenate([jnp.full(1, 1e-6), jnp.linspace(0.0, 0.998, lanes)[1:]])

        def narrow(iteration, carry):  # the first pass scans up to capacity, each later one a bracket 63 times smaller
            low, high, crossing = carry
            rates = low + jnp.where(iteration == 1, below_capacity, whole) * (high - low)
            gap, limits = jax.vmap(arms)(jnp.where(iteration == 0, 1e-9, rates))
            changed = jnp.append(jnp.sign(gap[1:]) != jnp.sign(gap[:-1]), False)
            index = jnp.argmax(changed)
            following = jnp.minimum(index + 1, lanes - 1)
            scan = iteration > 0
            return (
                jnp.where(scan & changed.any(), rates[index], low),
                jnp.where(scan, jnp.where(changed.any(), rates[following], high), limits[0]),
                jnp.where(iteration == 1, changed.any(), crossing),
            )

        zero = jnp.zeros((), dtype=jnp.result_type(float))
        low, high, crossing = jax.lax.fori_loop(0, 8, narrow, (zero, zero, jnp.zeros((), dtype=bool)))
        return jax.lax.stop_gradient(jnp.where(crossing, 0.5 * (low + high), jnp.inf))

    def residence_time(self, workload: Workload, config: Configuration, batch_seen: Scalar):
        """Time in service [s] of a request that sees ``batch_seen`` requests, itself included: the function whose
        equilibrium :meth:`predict` solves."""
        return self._times(self.request_cost(workload, config), jnp.asarray(batch_seen, dtype=float))[0]

    def times_in_service(self, workload: Workload, request: RequestCost, batch_seen: Scalar):
        """Time in service of a ``request`` (:meth:`request_cost`) that sees ``batch_seen`` requests, itself included,
        and its part until the first token, waiting left out [s]."""
        times = self._times(request, jnp.asarray(batch_seen, dtype=float))
        sync = 0.0 if workload.is_open else self._sync(request)
        _, in_ttft = self._foreign_prefill(request, times[0], times, sync)
        first = self.request_overhead + request.prefill + in_ttft + times[3] * times[1].total
        return times[0], jnp.where(jnp.asarray(workload.output_length, dtype=float) <= 1.0, times[0], first)

    def step_parts(self, workload: Workload, config: Configuration, sequences: Scalar) -> StepParts:
        """Parts of the engine step [s] over ``sequences`` decoding requests of this workload."""
        return self.request_cost(workload, config).step_parts(sequences)

    def request_cost(self, workload: Workload, config: Configuration) -> RequestCost:
        """Prefill, steps and step parts of one request of ``workload`` on ``config``."""
        return request_cost(self.step_time, workload, config, self.steps_form)

    def _times(self, request: RequestCost, n):
        """(residence, step parts, others, steps in the first token) for a request that sees n in service."""
        others = jnp.maximum(n - self.self_share, 0.0)
        shared_steps, decoding = self._shared_steps(request, n, others)
        parts = request.step_parts(decoding)
        residence = (
            self.request_overhead
            + request.prefill * (1.0 + self.prefill_interference * others)
            + (request.steps + shared_steps) * parts.total
        )
        return residence, parts, others, shared_steps

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
        spread = (request.spread / jnp.maximum(request.steps, 1e-9)) ** 2
        full = self._times(request, cap)[0]
        prompts = cap * request.prefill * self.prefill_interference
        service_scv = queue_scv(spread, prompts / full)
        waiting = None
        if self.waiting_states > 0:
            known = cap <= self.waiting_states
            places = jnp.where(known, cap, 1.0)
            served = jnp.minimum(jnp.arange(1, self.waiting_states + 1, dtype=jnp.result_type(float)), places)
            residence = jax.vmap(lambda n: self._times(request, n)[0])(served)
            rate = jnp.where(known, state.throughput, 0.5 * places / residence[-1])
            chain = requests_in_system(residence, rate, places)
            waiting = chain.waiting_time * waiting_factor(chain.load, places, service_scv, workload.arrival_scv)
            waiting = jnp.where(known, waiting, 0.0)
        if workload.n_requests is None:
            return jnp.zeros_like(full) if waiting is None else waiting
        return self._wait_of_run(workload, cap, cap / full, waiting, service_scv, spread)

    def _foreign_prefill(self, request: RequestCost, residence, times, sync):
        """The prefill of others' prompts [s] that a request pays, and how much of it before its first token.

        Others' prompts fall evenly on the time of a request, its own prefill counting for (1/2 + rho)/(1 + rho) of
        itself, rho = foreign/residence: the prompts of a step end together, behind those of the step under way (gated
        service: ttft = p + s + (1/2 + rho)*(s/(1-rho) + p*rho/(1-rho^2)) at a step s). Synchrony makes it sync/2.
        """
        _, parts, others, shared_steps = times
        foreign = request.prefill * self.prefill_interference * others
        load = jnp.clip(foreign / residence, 0.0, 1.0)
        joining = shared_steps * parts.total
        before = joining + request.prefill * (0.5 + load) / (1.0 + load)
        evenly = before / jnp.maximum(joining + request.prefill + request.steps * parts.total, 1e-30)
        return foreign, foreign * ((1.0 - sync) * evenly + 0.5 * sync)

    def _prompt_wait(self, workload: Workload, request: RequestCost, state: SteadyState):
        """Mean wait [s] of a prompt for the token budget."""
        service = request.prompt_service(state.batch_seen)
        if workload.n_requests is None:
            return prompt_wait(service, state.throughput)
        wait = prompt_wait(service, workload.arrival_rate)  # type: ignore[arg-type]
        return self._wait_of_run(workload, 1.0, 1.0 / service, wait)

    def _wait_of_run(self, workload: Workload, places, capacity, stationary, service_scv=0.0, length_scv=0.0):
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
        if config.max_batched_tokens is None:
            return request, cap
        fastest = request.prompt_service(request.most_decoding)
        most = share_reaches_one(
            lambda n: n * fastest / self._times(request, n)[0], jnp.asarray(1e9 if cap is None else cap, dtype=float)
        )
        return request, most

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

    def _assemble(self, workload, request: RequestCost, state: SteadyState, times, sync, waiting) -> Prediction:
        residence, parts, others, shared_steps = times
        alone = request.step_parts(jnp.full_like(others, self.self_share))
        foreign_prefill, in_ttft = self._foreign_prefill(request, state.residence_time, times, sync)
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
