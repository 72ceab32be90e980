"""What a replica can be: a deployment on so many devices, its batch caps, its price and its energy.

    device-hours per million output tokens = devices * 1e6 / (3600 * arrival_rate * output_length)
    cost per million output tokens = replicas * price of a replica [1/h] * 1e6 / (3600 * arrival_rate * output_length)
    joules per output token = joules while it works + devices*idle_power*(1 - busy)/(rate*output_length)
    busy = rate*(output_length/(n*tokens_per_step)*step_time(n) + prefill_time)

``arrival_rate`` [req/s]: of all replicas, ``rate``: of one. Joules while it works are
:func:`diffspec.resources.energy_per_token`'s at n = B/(1 - exp(-B)) sequences, the mean of a Poisson batch that is not
empty; a device that does not work draws its idle power.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import AbstractAcceptance
from diffspec.analysis.before_traces import Unmeasured, Working, before_traces, working, working_at
from diffspec.configuration import Configuration, batch_cap
from diffspec.first_principles import FirstPrinciples
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.principles import KEY
from diffspec.hardware import accelerator
from diffspec.parameters import Scalar
from diffspec.request_mix import mean_step, request_mix
from diffspec.resources import BATCHED_TOKENS, MemoryPlan, MemoryUse, memory_plan
from diffspec.results import InputError
from diffspec.serving import MOST_STATES, ServingModel
from diffspec.step_time import AbstractStepTime
from diffspec.workload import Workload

USUAL_CAP = 256.0
"""Batch cap [req] of a deployment that knows none (vLLM's usual max_num_seqs)."""
HALVINGS = 4
"""How often the batch cap is halved, for smaller ones that are compared."""
MILLION, HOUR = 1e6, 3600.0
NO_PAIR = "neither the fit nor the question names a verifier's config and its hardware"
FIT_AGAIN = "fit again with --verifier config.json --hardware NAME"
"""What to do about :data:`NO_PAIR`."""
UNFILLED = 1e15
"""Stands for a KV cache [tok] that is not known to end."""
COPIES = "expert_copies_bytes"
"""Where a deployment's defaults keep what further copies of experts take of each device [B]."""


@dataclass(frozen=True)
class Server:
    """One kind of replica.

    ``deployment``, and the ``subject`` it is of where it was not measured; ``pair``: architecture and hardware, None
    where they are not known; ``hardware``: its name, "device" where it has none; ``devices``: of one replica, the
    drafter's own included; ``plan``: of its memory, None where that is not known; ``plain_plan``: the same without a
    drafter, where first principles tell
    """

    deployment: FittedDeployment
    subject: Unmeasured | None
    pair: FirstPrinciples | None
    hardware: str
    tensor_parallel: int
    devices: int
    plan: MemoryPlan | None
    plain_plan: MemoryPlan | None

    def fits(self, draft_length: float) -> bool:
        """Whether its memory holds the weights and one request, as far as that is known."""
        plan = self.plan if draft_length > 0 or self.plain_plan is None else self.plain_plan
        return plan is None or plan.fits

    @property
    def first_principles(self) -> bool:
        """True when nothing of it was fitted."""
        return self.subject is not None and self.deployment.quality.get("rows") == 0

    def pair_at(self, workload: Workload) -> FirstPrinciples | None:
        """:attr:`pair` for requests of these lengths."""
        if self.pair is None:
            return None
        return replace(
            self.pair, prompt_length=float(workload.prompt_length), output_length=float(workload.output_length)
        )

    def memory_use(self, workload: Workload, max_batched_tokens: float | None, *, drafts: bool = True) -> MemoryUse:
        """What lies in the memory of a device while it serves requests of these lengths.

        Errors: :class:`InputError` where architecture and hardware are not known, or the drafter of one that
        ``drafts``."""
        pair, kept = self.pair_at(workload), self.deployment.defaults
        if pair is None:
            raise InputError(f"memory: {NO_PAIR} ({self.deployment.name}); {FIT_AGAIN}")
        if drafts and not pair.drafter_kind:
            what = "give" if self.deployment.quality.get("rows") == 0 else FIT_AGAIN
            raise InputError(
                f"memory: the drafter of {self.deployment.name!r} is not known; {what} --drafter config.json or "
                "--drafter-kind (ngram: a lookup, which has no weights)"
            )
        tokens = BATCHED_TOKENS if max_batched_tokens is None else max_batched_tokens
        plan = memory_plan(pair, batched_tokens=tokens, copies_bytes=kept.get(COPIES, 0.0))
        return MemoryUse(
            plan.verifier_bytes + plan.activation_bytes + plan.reserve_bytes,
            plan.drafter_bytes,
            plan.kv_bytes_per_token,
            plan.drafter_kv_bytes_per_token,
            float(kept.get("kv_capacity_tokens") or plan.kv_capacity_tokens),
        )

    def gigabytes(self, workload: Workload, config: Configuration, max_batched_tokens: float | None) -> float:
        """Memory [GB] in use on a device with the batch at the cap of ``config``."""
        drafts = float(config.draft_length) > 0  # type: ignore[arg-type]
        use = self.memory_use(workload, max_batched_tokens, drafts=drafts)
        cache = config.kv_capacity_tokens
        use = use if cache is None or cache >= UNFILLED else use._replace(most_tokens=float(cache))  # type: ignore[arg-type]
        return float(use.gigabytes(config.max_batch_size * workload.held_tokens, drafts, config.drafter_scale))

    def draws(self, count: int) -> ServingModel | None:
        """Serving models drawn from what is not known, with a leading axis; None where nothing tells."""
        if self.subject is not None:
            return self.subject.models()
        known = self.deployment.uncertainty
        return None if known is None else known.models(self.deployment.serving, count)

    def told(self) -> dict[str, Any]:
        """Its name as plain data."""
        return {"hardware": self.hardware, "tensor_parallel": self.tensor_parallel, "devices_per_replica": self.devices}

    def at_lengths(self, prompt_length: float, output_length: float, max_batched_tokens: float | None) -> "Server":
        """The same replica for requests of these lengths, on which first principles depend; fits are left as they
        are."""
        if not self.first_principles or self.pair is None:
            return self
        pair = replace(self.pair, prompt_length=prompt_length, output_length=output_length)
        return server_of(before_traces(pair, max_batched_tokens), max_batched_tokens)

    def longest_draft(self, asked: int, acceptance: AbstractAcceptance | None) -> int:
        """The longest draft that it can be asked about: 0 without a drafter."""
        if self.first_principles and self.pair is not None and not self.pair.drafter_kind:
            return 0
        return 0 if acceptance is None and self.deployment.acceptance is None else asked

    def configuration(
        self,
        draft_length: int,
        cap: float,
        *,
        acceptance: AbstractAcceptance | None,
        max_batched_tokens: float | None,
        drafter_params: float | None,
        longest: int,
    ) -> Configuration:
        """At this draft length and batch cap; of one structure for all that share ``longest``. Without speculation
        first principles keep no drafter in memory."""
        config = self.deployment.configuration(
            float(longest),
            acceptance=acceptance,
            max_batch_size=cap,
            max_batched_tokens=max_batched_tokens,
            drafter_params=drafter_params,
        )
        cache = config.kv_capacity_tokens
        if draft_length == 0 and self.plain_plan is not None:
            cache = max(self.plain_plan.kv_capacity_tokens, 1.0)
        kept = UNFILLED if cache is None else float(cache)
        return replace(config, draft_length=float(draft_length), kv_capacity_tokens=kept)


def server_of(subject: FittedDeployment | Unmeasured, max_batched_tokens: float | None = None) -> Server:
    """The replica of a fitted deployment, or of one that was not measured; ``max_batched_tokens`` [tok], where given,
    bounds the activations without a drafter too."""
    deployment = subject if isinstance(subject, FittedDeployment) else subject.deployment
    pair: FirstPrinciples | None
    if isinstance(subject, FittedDeployment):
        kept = deployment.defaults.get(KEY)
        pair, plan = None if kept is None else FirstPrinciples.from_dict(kept), None
    else:
        pair, plan = subject.pair, subject.plan
    plain_plan = None
    if plan is not None and pair is not None and pair.drafter_kind and deployment.quality.get("rows") == 0:
        tokens = {} if max_batched_tokens is None else {"batched_tokens": max_batched_tokens}
        plain_plan = memory_plan(without_drafter(pair), **tokens)
    devices = 1 if pair is None else pair.tensor_parallel
    return Server(
        deployment=deployment,
        subject=None if isinstance(subject, FittedDeployment) else subject,
        pair=pair,
        hardware="device" if pair is None else pair.hardware.name,
        tensor_parallel=devices,
        devices=devices + (pair is not None and pair.drafter_hardware is not None),
        plan=plan,
        plain_plan=plain_plan,
    )


def without_drafter(pair: FirstPrinciples) -> FirstPrinciples:
    """The verifier alone on the same hardware."""
    alone = {"drafter": None, "drafter_kind": "", "drafter_window": None, "drafter_hardware": None}
    return replace(pair, **alone, draft_overlap=0.0, transfer_latency=0.0, draft_probability=1.0)


def batch_caps(server: Server, workload: Workload, asked: float | None) -> list[float]:
    """Batch caps [req] to compare: the one ``asked`` for, else the deployment's own (at most what its memory holds) and
    its halves. Errors: :class:`InputError` outside 1 to 1,024, for which waiting is not computed."""
    if asked is not None:
        if not 1 <= asked <= MOST_STATES:
            raise InputError(
                f"max_batch_size: got {asked:g}; allowed: 1 to {MOST_STATES} req, to know how long one waits"
            )
        return [float(asked)]
    own = min(float(server.deployment.defaults.get("max_batch_size") or USUAL_CAP), float(MOST_STATES))
    cache = server.deployment.defaults.get("kv_capacity_tokens")
    if cache is not None:
        cache = max(float(cache), 0.0 if server.plain_plan is None else server.plain_plan.kv_capacity_tokens)
        own = min(own, math.ceil(float(batch_cap(workload, Configuration(kv_capacity_tokens=float(cache))))))  # type: ignore[arg-type]
    return list(dict.fromkeys(float(max(math.floor(own / 2**step), 1)) for step in range(HALVINGS + 1)))


def prices(servers: Sequence[Server], cost_per_hour: float | Mapping[str, Any] | None) -> list[float | None]:
    """Price of an hour of each kind of replica: one number for every device, or ``{"h100": {"cost_per_hour": 2.5}}``
    (also ``{"h100": 2.5}``, or below a key ``catalogue``) by hardware; None where none is given.

    Errors: :class:`InputError` for what is no price, or a catalogue that names no hardware there is.
    """
    if cost_per_hour is None:
        return [None] * len(servers)
    if not isinstance(cost_per_hour, Mapping):
        return [_price("cost_per_hour", cost_per_hour) * server.devices for server in servers]
    listed = cost_per_hour.get("catalogue", cost_per_hour)
    if not isinstance(listed, Mapping):
        raise InputError(f"cost_per_hour: catalogue: got {listed!r}; allowed: hardware names with their prices")
    known: dict[str, float] = {}
    for name, entry in listed.items():
        found = entry.get("cost_per_hour") if isinstance(entry, Mapping) else entry
        key = "device" if name == "device" else accelerator(str(name)).name
        known[key] = _price(f"cost_per_hour of {name!r}", found)
    found = []
    for server in servers:
        names = [server.hardware] * server.tensor_parallel
        if server.pair is not None and server.pair.drafter_hardware is not None:
            names.append(server.pair.drafter_hardware.name)
        found.append(sum(known[name] for name in names) if all(name in known for name in names) else None)
    return found


def _price(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(
            f"{name}: got {value!r}; allowed: a number above 0, of any currency, for an hour of one device"
        )
    return float(value)


def hours_per_million(devices, arrival_rate, output_length):
    """Device-hours (or, of what they cost, money) per million output tokens.

    >>> round(hours_per_million(2, 40.0, 250.0), 4)  # 10,000 tok/s: a million takes 100 s of two devices
    0.0556
    """
    return devices * MILLION / (HOUR * arrival_rate * output_length)


def joules_per_token(
    server: Server,
    configs: Configuration,
    batches: np.ndarray,
    rates: np.ndarray,
    workload: Workload,
) -> np.ndarray | None:
    """Joules per output token [lanes] at arrival ``rates`` [req/s] with ``batches`` [req] in service: see the module.
    ``configs`` has a leading axis. None where the architecture is not known."""
    pair = server.pair_at(workload)
    if pair is None:
        return None
    step = server.deployment.serving.step_time
    with jax.numpy_dtype_promotion("standard"):
        one = partial(joules, pair, step, workload)
        return np.asarray(jax.vmap(one)(configs, when_busy(jnp.asarray(batches), workload), jnp.asarray(rates)))


def when_busy(batch, workload: Workload):
    """Mean [req] of a batch that is not empty, from the mean ``batch`` [req] of all: Poisson in an open loop; a closed
    one is never empty."""
    return batch / -jnp.expm1(-jnp.maximum(batch, 1e-9)) if workload.is_open else batch


def joules(pair: FirstPrinciples, step: AbstractStepTime, workload: Workload, config: Configuration, n, rate) -> Scalar:
    """Joules per output token [J] of one server of a ``pair`` of the workload's lengths with ``n`` [req] in service
    while it works: see the module."""
    found = working(pair, step, workload, config, n)
    return _with_idle(pair, found, n, workload.output_length, rate)


def joules_of_classes(
    pair: FirstPrinciples,
    serving: ServingModel,
    workloads: Sequence[Workload],
    configs: Sequence[Configuration],
    batch,
) -> Scalar:
    """:func:`joules` of a server of several classes with a mean ``batch`` [req] in service: those of the mean step
    (:func:`diffspec.request_mix.mean_step`) and the mean request. ``pair``: of the mean lengths."""
    request = request_mix(serving.step_time, workloads, configs, serving.steps_form)
    state, tokens = mean_step(request, workloads, configs, batch)
    read = request.mean(request.prompt_tokens)
    found = working_at(pair, serving.step_time, state, tokens, read, configs[0].drafter_scale)
    rate = sum(jnp.asarray(workload.arrival_rate, dtype=float) for workload in workloads)
    output = request.mean(jnp.asarray([workload.output_length for workload in workloads], dtype=float))
    return _with_idle(pair, found, state.sequences, output, rate)


def _with_idle(pair: FirstPrinciples, found: Working, n, output, rate) -> Scalar:
    """Joules per output token from those while it works, and the idle power in between."""
    busy = jnp.minimum(rate * (output / (n * found.tokens) * found.step + found.prefill), 1.0)
    return found.joules + pair.tensor_parallel * pair.hardware.idle_power * (1.0 - busy) / (rate * output)
