"""The verb `size`: how many replicas of which configuration serve a target rate within latency limits, at what cost.

Arrivals are split evenly and at random over replicas: splitting a Poisson process so leaves Poisson processes, so every
replica is the open loop that :mod:`diffspec.serving` predicts, at target_rate/replicas.

    replicas = ceil(target_rate / ((1 - headroom)*largest rate within limits))
    headroom told = 1 - target_rate/(replicas*largest rate within limits)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffspec.acceptance import MAX_DRAFT_LENGTH, AbstractAcceptance
from diffspec.analysis.before_traces import DOES_NOT_FIT, Unmeasured
from diffspec.analysis.intervals import NO_INTERVALS
from diffspec.fitting.deployment import FittedDeployment
from diffspec.optimizing.candidates import Candidates, candidates
from diffspec.optimizing.curve import capacity_curve, knob_range
from diffspec.optimizing.drawn_rates import drawn_rates, rate_intervals
from diffspec.optimizing.lanes import LEAST, LargestRates, largest_rates, limited_values
from diffspec.optimizing.limits import LIMITED, MEMORY, PERCENTILE_METRICS, Limit, of_rate, parse_limit
from diffspec.optimizing.pareto import pareto
from diffspec.optimizing.servers import NO_PAIR, USUAL_CAP, Server, prices, server_of
from diffspec.results import InputError
from diffspec.workload import Workload, check_range

SIZED = (*(name for name in LIMITED if name != "throughput"), *PERCENTILE_METRICS, MEMORY)
MINIMISED = ("cost", "device_hours", "energy")
SHORTLIST = 8
"""Candidates, the best at the centre, whose draws are looked at where a risk is asked for, beside the best without
speculation."""
POISSON = (
    "arrivals are split evenly and at random over the replicas: each sees target_rate/replicas, Poisson where the "
    "whole is; a balancer that looks at queues does better"
)


def size(
    subjects: FittedDeployment | Unmeasured | Sequence[FittedDeployment | Unmeasured],
    *,
    target_rate: float,
    prompt_length: float,
    output_length: float,
    slo: Sequence[str] = (),
    headroom: float = 0.0,
    max_draft_length: int = 8,
    acceptance: AbstractAcceptance | None = None,
    max_batch_size: float | None = None,
    max_batched_tokens: float | None = None,
    output_scv: float = 0.0,
    prefix_hit_rate: float = 0.0,
    burst_scv: float = 1.0,
    drafter_params: float | None = None,
    cost_per_hour: float | Mapping[str, Any] | None = None,
    minimise: str | None = None,
    latency: str = "e2e_mean",
    knob: str = "prompt_length",
    knob_values: Sequence[float] | None = None,
    risk: float | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Replicas, configuration, headroom, cost and energy for a target rate [req/s] within latency limits.

    * ``subjects``: a fitted deployment, what was not measured (:func:`diffspec.analysis.before_traces.before_traces`,
      :func:`~diffspec.analysis.before_traces.moved`), or several: one for each hardware and tensor parallelism
    * ``slo``: upper limits on means, ``"ttft_mean<0.5"``, percentiles, ``"ttft_p95<0.5"`` (p50, p90, p95, p99 of ttft,
      tpot, itl, e2e; s), ``"utilization<0.8"``, or ``"memory<72"`` (GB of a device with the batch at its cap,
      :class:`diffspec.resources.MemoryUse`); without any, stability alone
    * ``headroom`` [1]: share of the largest rate within limits to leave unused
    * ``max_batch_size`` [req]: the batch cap; by default the deployment's own and its halves are compared
    * ``burst_scv`` [1]: squared coefficient of variation of the gaps between a replica's arrivals, 1: Poisson
    * ``cost_per_hour``: of a device, one number or by hardware (:func:`diffspec.optimizing.servers.prices`);
      ``minimise``: ``cost``, ``device_hours`` or ``energy``; by default cost where every price is known
    * ``latency``: metric of the Pareto front; ``knob``, ``knob_values``: ``prompt_length`` or ``acceptance_rate``, the
      second axis of the capacity curve
    * ``risk`` [1]: share of the draws of what is not known that must sustain the rate a replica is given

    Returns plain data:

    * ``outcome`` (``successful``, ``infeasible``, ``does_not_fit``), ``target_rate``, ``headroom_wanted``, ``limits``,
      ``minimise``, ``risk``, ``deployment``
    * ``recommended`` and ``plain`` (the best without speculation), None where none will do: ``hardware``,
      ``tensor_parallel``, ``devices_per_replica``, ``draft_length``, ``max_batch_size``; ``rate_per_replica`` [req/s]
      (the largest within limits, or that which ``risk`` leaves) and ``rate_per_device``; ``binding``: the limit that is
      reached there, or ``capacity``; ``replicas``, ``devices``; ``arrival_rate`` [req/s] of one replica, ``headroom``
      there; ``device_hours`` and ``cost`` per million output tokens; ``energy`` [J per million output tokens] or
      ``energy_reason``; ``metrics`` and ``effective_batch_size`` at arrival_rate
    * ``gain``: of recommended over plain, ``rate_per_device``, ``devices``, ``device_hours`` and what is minimised
    * ``candidates``: like recommended, without metrics, the best first; with a ``risk`` the 8 best at the centre, and
      the best of them without speculation
    * ``tensor_parallel``: for N ``devices`` of each ``hardware``, the rate of ``one_replica``, of N ``replicas``, and
      their ``ratio``
    * ``curve``: :func:`diffspec.optimizing.curve.capacity_curve`; ``pareto``: :func:`diffspec.optimizing.pareto.pareto`
    * ``infeasible``: ``reason``, ``nearest`` (a candidate) and what of the ``limits`` fails on it without load: its
      ``value``, ``bound`` and ``excess`` (value/bound - 1); ``does_not_fit``: servers with their
      ``missing_bytes``, and whether it ``plain_fits``, without the drafter
    * ``intervals`` of the recommended over draws of what is not known: ``rate_per_replica``, ``replicas``,
      ``feasible_share``, ``level``, ``draws``; None with an ``intervals_reason``
    * ``memory``, ``inside_measured``, ``outside_measured``, ``assumptions``, ``warnings``

    Errors: :class:`InputError` for unknown metrics, lower limits, ranges and prices.
    """
    limits = _limits(slo)
    _check(target_rate, headroom, max_draft_length, burst_scv, minimise, latency, risk)
    report = progress or (lambda what, share: None)
    listed = [subjects] if isinstance(subjects, FittedDeployment | Unmeasured) else list(subjects)
    if not listed:
        raise InputError("subjects: got none; allowed: at least one deployment")
    servers = [server_of(subject, max_batched_tokens) for subject in listed]
    priced = prices(servers, cost_per_hour)
    values = knob_range(knob, knob_values, float(prompt_length))
    workload = Workload(
        prompt_length=float(prompt_length),
        output_length=float(output_length),
        arrival_rate=1.0,
        arrival_scv=float(burst_scv),
        output_scv=float(output_scv),
        prefix_hit_rate=float(prefix_hit_rate),
    )
    ask: dict[str, Any] = {
        "acceptance": acceptance,
        "max_batched_tokens": max_batched_tokens,
        "drafter_params": drafter_params,
    }
    told = {
        "outcome": DOES_NOT_FIT,
        "target_rate": float(target_rate),
        "headroom_wanted": float(headroom),
        "limits": [limit.text for limit in limits],
        "minimise": minimise,
        "risk": risk,
    }
    fitting = [place for place, server in enumerate(servers) if server.fits(0) or server.fits(1)]
    missing = [
        server.told() | {"missing_bytes": server.plan.missing_bytes, "plain_fits": server.fits(0)}
        for server in servers
        if server.plan is not None and not server.plan.fits
    ]
    if not fitting:
        return told | _nothing(servers[0]) | {"does_not_fit": missing}
    report("largest rate of each candidate", 0.1)
    metrics = list(dict.fromkeys([*(limit.metric for limit in limits), latency]))
    kept, priced = [servers[place] for place in fitting], [priced[place] for place in fitting]
    aim = _aim(minimise, kept, priced)
    pool = candidates(kept, priced, workload, max_draft_length, max_batch_size, [*_columns(limits), latency], ask)
    rated, most = of_rate(limits)
    limits = (*rated, *(limit for limit in limits if limit.metric == MEMORY))
    found = largest_rates(pool.lanes, rated)
    if pool.memory is not None:
        keeps = pool.memory <= most
        found = found._replace(
            rate=np.where(keeps, found.rate, 0.0), binding=np.where(keeps, found.binding, len(rated))
        )

    def sized_at(rates, whole: bool = True):
        known = whole or aim == "energy"
        entries = pool.sized(rates, float(target_rate), float(headroom), limits, found.binding, energy=known)
        return entries, pool.ranked(entries, aim)

    sized, ranked = sized_at(found.rate, whole=risk is None)
    drawn: dict[int, np.ndarray] = {}
    if risk is not None and ranked:
        report("the rate that enough draws sustain", 0.4)
        looked = dict.fromkeys([*ranked[:SHORTLIST], *[at for at in ranked if pool.draft_length[at] == 0][:1]])
        drawn = drawn_rates(pool, list(looked), rated)
        sure = np.zeros(len(found.rate))
        for place, rates in drawn.items():
            if not len(rates):
                raise InputError(f"risk: got {risk:g}, but {NO_INTERVALS}")
            sure[place] = np.quantile(rates, 1.0 - risk, method="lower")
        sized, ranked = sized_at(sure)
    report("capacity curve", 0.6)
    centre = ranked[0] if ranked else _nearest(pool, limits, found)
    curve = capacity_curve(pool, centre, limits, knob, values, ask)
    server = pool.servers[pool.server[centre]]
    answer = told | {"minimise": aim, "does_not_fit": missing}
    if not ranked:
        answer |= _nothing(server) | {"outcome": "infeasible", "curve": curve}
        return answer | {"infeasible": _infeasible(pool, centre, limits, found, drawn, risk)}
    report("Pareto front", 0.8)
    best, plain = ranked[0], next((place for place in ranked if pool.draft_length[place] == 0), None)
    rates = drawn[best] if drawn else drawn_rates(pool, [best], rated)[best]
    fields = {name: float(getattr(workload, name)) for name in ("prompt_length", "output_length")}
    fields["arrival_rate"] = sized[best]["arrival_rate"]
    length = float(pool.draft_length[best])
    told_plain = None if plain is None else _entry(pool, sized, plain, metrics)
    report("done", 1.0)
    return answer | {
        "outcome": "successful",
        "deployment": server.deployment.name,
        "recommended": _entry(pool, sized, best, metrics),
        "plain": told_plain,
        "gain": None if plain is None else _gain(sized[best], sized[plain], aim),
        "candidates": [_without(sized[place]) for place in ranked],
        "tensor_parallel": _against_replicas(pool, found.rate),
        "curve": curve,
        "pareto": pareto(pool, sized, ranked, float(target_rate), latency, aim),
        "infeasible": None,
        "intervals": rate_intervals(rates, float(target_rate), float(headroom)),
        "intervals_reason": None if len(rates) else NO_INTERVALS,
        "memory": None if server.plan is None else server.plan.to_dict(),
        **server.deployment.hull(length, fields),
        "assumptions": _assumptions(server, float(burst_scv)),
        "warnings": _caveats(pool, best, fields, limits, aim, bool(found.again[best]), acceptance),
    }


def _limits(slo: Sequence[str]) -> tuple[Limit, ...]:
    limits = tuple(parse_limit(text, SIZED) for text in slo)
    for limit in limits:
        if limit.sign < 0:
            raise InputError(
                f"limit {limit.text!r}: allowed: an upper limit, METRIC<NUMBER, which a lower rate can keep"
            )
    return limits


def _check(target_rate, headroom, max_draft_length, burst_scv, minimise, latency, risk) -> None:
    check_range("target_rate", float(target_rate), 0, 1e9, low_open=True, unit="req/s")
    check_range("burst_scv", float(burst_scv), 0, 1e3, low_open=False, unit="(squared coefficient of variation)")
    if not 0 <= headroom < 1:
        raise InputError(f"headroom: got {headroom!r}; allowed: [0, 1), the share of the rate to leave unused")
    if not isinstance(max_draft_length, int) or not 0 <= max_draft_length <= MAX_DRAFT_LENGTH:
        raise InputError(f"max_draft_length: got {max_draft_length!r}; allowed: 0 to {MAX_DRAFT_LENGTH}")
    if minimise is not None and minimise not in MINIMISED:
        raise InputError(f"minimise: got {minimise!r}; allowed: {', '.join(MINIMISED)}")
    if latency not in SIZED or latency in ("utilization", MEMORY):
        allowed = ", ".join(name for name in SIZED if name not in ("utilization", MEMORY))
        raise InputError(f"latency: got {latency!r}; allowed: {allowed}")
    if risk is not None and not 0 < risk < 1:
        raise InputError(f"risk: got {risk!r}; allowed: (0, 1), the share of draws that must sustain the rate")


def _aim(minimise: str | None, servers: Sequence[Server], priced: Sequence[float | None]) -> str:
    unknown = sorted({server.hardware for server, price in zip(servers, priced, strict=True) if price is None})
    if minimise == "cost" and unknown:
        raise InputError(f"minimise: got 'cost', but no price is known of {', '.join(unknown)}: give cost_per_hour")
    return minimise or ("device_hours" if unknown else "cost")


def _columns(limits: Sequence[Limit]) -> list[str]:
    return [limit.metric for limit in limits]


def _without(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in ("metrics", "effective_batch_size")}


def _entry(pool: Candidates, sized: Sequence[dict[str, Any]], place: int, metrics: Sequence[str]) -> dict[str, Any]:
    """One candidate in full, with every limited metric at its rate."""
    entry = sized[place]
    shown = entry["metrics"] | pool.at_limits(place, metrics, entry["arrival_rate"])
    return entry | {"metrics": shown, "energy_reason": NO_PAIR if entry["energy"] is None else None}


def _gain(best: Mapping[str, Any], plain: Mapping[str, Any], aim: str) -> dict[str, Any]:
    """Of the recommended candidate over the best without speculation: rate per device, and what it spends less."""
    spent = {name: best[name] / plain[name] if plain[name] else None for name in ("devices", "device_hours", aim)}
    return {"rate_per_device": best["rate_per_device"] / plain["rate_per_device"]} | spent


def _against_replicas(pool: Candidates, rates: np.ndarray) -> list[dict[str, Any]]:
    """N devices as one replica with tensor parallelism against N replicas of one device, the best rate of each."""
    most: dict[tuple[str, int], float] = {}
    for place, rate in enumerate(rates):
        server = pool.servers[pool.server[place]]
        key = (server.hardware, server.tensor_parallel)
        most[key] = max(most.get(key, 0.0), float(rate))
    told = []
    for server in pool.servers:
        devices = server.tensor_parallel
        if devices > 1:
            one, alone = (most.get((server.hardware, count), 0.0) for count in (devices, 1))
            entry = {"hardware": server.hardware, "devices": devices, "one_replica": one, "replicas": devices * alone}
            told.append(entry | {"ratio": one / (devices * alone) if alone else None})
    return told


def _nearest(pool: Candidates, limits: Sequence[Limit], found: LargestRates) -> int:
    """The candidate that misses its limits by the least without load, by the largest value/bound."""
    if (found.rate > 0).any():  # feasible at the centre, not at the risk asked for
        return int(np.argmax(found.rate))
    values = limited_values(pool.lanes, _columns(of_rate(limits)[0]), LEAST * found.capacity)
    values |= {} if pool.memory is None else {MEMORY: pool.memory}
    worst = np.max([np.nan_to_num(values[limit.metric] / limit.bound) for limit in limits], axis=0)
    return int(np.argmin(worst))


def _infeasible(pool: Candidates, place: int, limits, found: LargestRates, drawn, risk) -> dict[str, Any]:
    """Which limits fail without load on the nearest candidate, and by how much."""
    at = pool.at_limits(place, _columns(limits), LEAST * float(found.capacity[place]))
    told = {}
    for limit in limits:
        value = at[limit.metric]
        if value is not None:
            told[limit.text] = limit.told(value)
    share = max((float((rates > 0).mean()) for rates in drawn.values()), default=None)
    reason = (
        "a limit is broken without load" if share is None else f"fewer than {risk:.0%} of the draws keep the limits"
    )
    return {"reason": reason, "limits": told, "nearest": pool.told(place), "feasible_share": share}


def _nothing(server: Server) -> dict[str, Any]:
    """The keys of an answer without a recommendation."""
    empty = ("recommended", "plain", "gain", "pareto", "intervals", "intervals_reason", "infeasible", "curve")
    lists: dict[str, Any] = {name: [] for name in ("candidates", "tensor_parallel", "outside_measured", "warnings")}
    shown = {
        "deployment": server.deployment.name,
        "memory": None if server.plan is None else server.plan.to_dict(),
        "inside_measured": False,
        "assumptions": _assumptions(server, 1.0),
    }
    return dict.fromkeys(empty) | lists | shown


def _assumptions(server: Server, burst_scv: float) -> list[str]:
    lines = [POISSON]
    if burst_scv != 1.0:
        lines.append(
            f"the gaps between a replica's arrivals have a squared coefficient of variation of {burst_scv:g}; of a "
            "whole stream with c2, an even random split over R leaves 1 + (c2 - 1)/R"
        )
    if server.pair is not None:
        lines.append(
            "energy: data-sheet power by activity (errors of tens of percent are expected), idle power for the rest of "
            "the time; a drafter's own device is not counted"
        )
    return [*lines, *([] if server.subject is None else server.subject.assumptions)]


def _caveats(pool: Candidates, best: int, fields, limits, aim: str, again: bool, acceptance) -> list[str]:
    server, length = pool.servers[pool.server[best]], float(pool.draft_length[best])
    notes = server.deployment.caveats(length, fields)
    if not limits:
        notes.append("no limit was given: sized for stability alone, where latency may be anything")
    if aim == "device_hours" and len({server.hardware for server in pool.servers}) > 1:
        notes.append("no prices: an hour of one device counts like that of any other; give cost_per_hour")
    if not server.deployment.plain_measured:
        notes.append("no k = 0 row was fitted: a plain server is no candidate")
    if not server.deployment.defaults.get("max_batch_size") and pool.cap[best] == USUAL_CAP:
        notes.append(
            f"no batch cap is known: at most {USUAL_CAP:g} requests in a step, as engines usually do; "
            "give max_batch_size to allow more"
        )
    if again:
        notes.append("latency does not grow with the rate everywhere: the limits are kept again at some higher rate")
    if acceptance is None and server.deployment.mixed_acceptance and length > 0:
        notes.append(server.deployment.mixed_acceptance)
    return notes
