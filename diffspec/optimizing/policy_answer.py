"""The answer of the verb `policy`, part by part: tiers, bands, loads, gains, and what to do in words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffspec.analysis.intervals import spread
from diffspec.analysis.plain import finite
from diffspec.configuration import Configuration
from diffspec.optimizing.batch_tables import BatchTables
from diffspec.optimizing.least_acceptance import break_even
from diffspec.optimizing.limits import Limit
from diffspec.optimizing.robust_choice import Judged, Risk, over_loads
from diffspec.optimizing.schedule import ranges_of
from diffspec.optimizing.tiers import Band, bands_of, switching, thresholds
from diffspec.optimizing.under_schedule import UnderSchedule
from diffspec.serving import ServingModel
from diffspec.workload import Workload

ENDS = 8
"""Questions after break-even acceptance are asked in multiples of so many."""

AS_GOOD = 1.005
"""A schedule that gains less over one draft length is no better in words."""


class PolicyAnswer(dict[str, Any]):
    """The answer of :func:`diffspec.optimizing.load_policy.policy`, plain data, by a name that notebooks show as tables
    (:func:`diffspec.report.notebook.policy_html`)."""


@dataclass(frozen=True)
class Asked:
    """What a policy is asked with; see :func:`policy`."""

    loads: Sequence[float] | None
    loop: str
    output_length: float
    max_draft_length: int
    limits: tuple[Limit, ...]
    objective: str
    risk: Risk
    forbid_zero: bool
    min_gain: float
    min_width: int
    hysteresis: float | None
    workload_fields: dict[str, float]

    @property
    def lengths(self) -> list[int]:
        """Draft lengths that a tier may have."""
        return list(range(1 if self.forbid_zero else 0, self.max_draft_length + 1))


def off_above(schedule: np.ndarray) -> int | None:
    """The last batch before the tier without drafts at the end: 0 where nothing else is, None where there is none."""
    if schedule[-1] > 0:
        return None
    return int(np.max(np.flatnonzero(schedule > 0), initial=-1)) + 1


def tier_entries(schedule, point, costs, static, plains, plain_known: bool) -> list[dict[str, Any]]:
    """Gains of each tier at its batches, equally weighted: exp(mean log cost of the other - mean log cost) over the
    fitted parameters, and over draws; ``plains``: log costs of a server without a drafter, of the fit and of draws."""
    entries, off = [], not (schedule > 0).any()
    for first, last, length in ranges_of(schedule):
        place = np.arange(first - 1, last)

        def gain(table, plain, other, place=place, length=length):
            own = plain[..., place] if off else table[..., length, place]
            against = plain[..., place] if other is None else np.minimum(table[..., other[place], place], 500.0)
            return np.exp((against - own).mean(axis=-1))

        entry: dict[str, Any] = {"first_batch": first, "last_batch": last, "draft_length": length}
        one = None if not static.any() else static  # one draft length of 0 is a server without a drafter
        for name, other, known in (("speedup", None, plain_known), ("speedup_over_static", one, True)):
            entry[name] = float(gain(point, plains[0], other)) if known else None
            drawn = None if costs is None or not known else gain(costs, np.stack(plains[1:]), other)
            entry[f"{name}_interval"] = None if drawn is None else spread(drawn)
        likely = None
        if costs is not None:
            likely = float((np.argmin(costs[..., place], axis=1) == length).mean())
        entries.append(entry | {"probability_best": likely})
    return entries


def add_break_even(tiers, models: Iterable[ServingModel], workload: Workload, config: Configuration) -> None:
    """Add, to tiers with drafts, the acceptance below which no speculation is faster, at the worse end of the tier."""
    drafting = [tier for tier in tiers if tier["draft_length"] > 0]
    names = ("breakeven_acceptance_rate", "breakeven_tokens_per_step", "breakeven_interval")
    for tier in tiers:
        tier |= dict.fromkeys(names)
    if not drafting:
        return
    ends = [(tier["draft_length"], tier[name]) for tier in drafting for name in ("first_batch", "last_batch")]
    size = ENDS * -(-len(ends) // ENDS)  # few program sizes, few compilations
    lengths, batches = (np.resize(column, size) for column in zip(*ends, strict=True))
    found = [break_even(model, workload, config, lengths, batches) for model in models]
    rates, emitted = (
        np.stack([part[: len(ends)].reshape(-1, 2).max(axis=1) for part in parts]) for parts in zip(*found, strict=True)
    )
    for place, tier in enumerate(drafting):
        interval = spread(rates[1:, place]) if len(rates) > 1 else None
        values = (finite(rates[0, place]), finite(emitted[0, place]), interval)
        tier |= dict(zip(names, values, strict=True))


def band_entries(schedule, cost, centre: BatchTables, costs, asked: Asked) -> list[dict[str, Any]]:
    residence = centre.residence[:, :-1]
    found: list[Band] = bands_of(schedule, cost, residence, width=asked.hysteresis, most_loss=asked.min_gain)
    where = [None] * len(found) if costs is None else [spread(draws) for draws in thresholds(schedule, costs)]
    return [
        band._asdict() | {"threshold_interval": interval} | switching(schedule, residence, band)
        for band, interval in zip(found, where, strict=True)
    ]


def load_entries(
    deployment, asked: Asked, fields, loads, schedule, at_centre, under_draws, judged: Judged, places
) -> list[dict[str, Any]]:
    chosen, static, plain = places
    lengths = _columns_of(schedule, at_centre.probability.shape[-1] - 1)
    entries = []
    for place, load in enumerate(loads):
        share = at_centre.probability[chosen, place, 1:]
        busy = share / max(share.sum(), 1e-300)
        usual = int(np.argmax(np.bincount(lengths, weights=busy)))
        saturated = bool(at_centre.saturated[chosen, place])
        metrics = {name: finite(values[chosen, place]) for name, values in at_centre.metrics.items()}
        entry = {
            "load": float(load),
            "feasible": bool(judged.feasible[chosen, place]),
            "saturated": saturated,
            "draft_length": usual,
            "time_share": {str(k): float(busy[lengths == k].sum()) for k in sorted(set(lengths.tolist()))},
            "batch_mean": float(at_centre.batch_mean[chosen, place]),
            "batch_deviation": float(at_centre.batch_deviation[chosen, place]),
            "capacity": finite(at_centre.capacity[chosen, place]),
            "metrics": {} if saturated else metrics,
            "risk_value": finite(judged.risk[chosen, place]),
            "violations": _violations(asked.limits, {name: v[chosen, place] for name, v in judged.limited.items()}),
            "saturated_share": float(np.mean([each.saturated[chosen, place] for each in under_draws]))
            if under_draws
            else None,
        }
        for name, other, known in (
            ("speedup", plain, deployment.plain_measured),
            ("speedup_over_static", static, True),
        ):
            entry[name] = finite(_ratio(at_centre, other, chosen)[place]) if known else None
            ratios = [_ratio(found, other, chosen)[place] for found in under_draws]
            entry[f"{name}_interval"] = spread(ratios) if known and ratios else None
        entries.append(entry | deployment.hull(usual, {asked.loop: float(load)} | lengths_of(fields)))
    return entries


def _columns_of(schedule: np.ndarray, columns: int) -> np.ndarray:
    """Draft lengths of the columns that a table keeps; a last, fractional one has that of the whole batch below it."""
    kept = schedule[:columns]
    return kept if kept.size == columns else np.append(kept, kept[-1:])


def _ratio(found: UnderSchedule, other: int, chosen: int) -> np.ndarray:
    """e2e of the other schedule over that of the chosen one at every load; infinite where only the other saturates, not
    a number where the chosen one does."""
    e2e = np.where(found.saturated, np.inf, found.metrics["e2e_mean"])
    with np.errstate(invalid="ignore"):
        return np.where(found.saturated[chosen], np.nan, e2e[other] / e2e[chosen])


def _violations(limits: Sequence[Limit], values) -> dict[str, Any]:
    """The limits that do not hold, with what the risk makes of their metric; None where it is infinite."""
    with np.errstate(divide="ignore"):
        broken = [limit for limit in limits if float(limit.excess(values[limit.metric])) > 0]
    return {limit.text: {"value": finite(values[limit.metric]), "bound": limit.bound} for limit in broken}


def lengths_of(fields) -> dict[str, float]:
    return {name: fields[name] for name in ("prompt_length", "output_length")}


def gain_entry(found: Sequence[UnderSchedule], places, plain_known: bool, judged: Judged) -> dict[str, Any]:
    """Speedups in the geometric mean over the loads that both sides can bear: of the fit (the first of ``found``), and
    their intervals over the others, which are draws."""
    chosen, static, plain = places
    told: dict[str, Any] = {"loads": int(judged.feasible[chosen].sum())}
    for name, other, known in (("speedup", plain, plain_known), ("speedup_over_static", static, True)):
        ratios = []
        for each in found:
            stable = ~(each.saturated[chosen] | each.saturated[other])
            latency = each.metrics["e2e_mean"][:, stable]
            ratios.append(float(over_loads(latency[other] / latency[chosen])) if stable.any() else np.nan)
        told[name] = None if not known or np.isnan(ratios[0]) else ratios[0]
        told[f"{name}_interval"] = spread(ratios[1:]) if known and len(ratios) > 1 else None
    return told


def advice(schedule, static: int, gains, tiers, entries, drafting: np.ndarray, limited: bool) -> list[str]:
    """What to do, in words. ``tiers`` and ``entries`` (of loads) as in the answer; ``drafting`` [batches]: log cost of
    the best draft length above 0, relative to a server without a drafter."""
    off = off_above(schedule)
    if not (schedule > 0).any():
        pays = np.flatnonzero(drafting < 0)
        if not pays.size:
            return ["leave speculation off: no draft length pays at any batch"]
        gain = 100 * (np.exp(-drafting.min()) - 1)
        within = " within the limits" if limited else ""
        return [
            f"leave speculation off: over these loads a server without a drafter is better{within}; drafts pay at "
            f"{pays.size} of {drafting.size} batches, up to {pays[-1] + 1}, by {gain:.1f} % at most: ask again without "
            "the highest loads"
        ]
    lines = []
    losing = [tier for tier in tiers if tier["speedup"] is not None and tier["speedup"] < 1.0]
    if off is not None:
        lines.append(f"leave speculation off above batch {off}")
    elif tiers[0]["speedup"] is not None and not losing:
        lines.append(f"speculation pays at every batch up to {schedule.size}, the largest looked at")
    for tier in losing:
        lines.append(
            f"at batches {tier['first_batch']} to {tier['last_batch']} a server without a drafter is "
            f"{100 * (1 / tier['speedup'] - 1):.1f} % faster: a loaded drafter reads every prompt, drafting or not"
        )
    slower = [entry["load"] for entry in entries if entry["speedup"] is not None and entry["speedup"] < 1.0]
    if slower:
        lines.append(
            f"at {len(slower)} of {len(entries)} loads, from {min(slower):.4g} on, no drafter at all is faster"
        )
    if len(tiers) == 1:
        lines.append(f"one draft length, {tiers[0]['draft_length']}, at every batch: no schedule is needed")
    elif gains["speedup_over_static"] is not None and gains["speedup_over_static"] < AS_GOOD:
        lines.append(
            f"at these loads one draft length, {static}, is as good (the schedule gains "
            f"{100 * (gains['speedup_over_static'] - 1):.1f} %); the schedule is for loads beyond them"
        )
    if not any(entry["feasible"] for entry in entries):
        lines.append("no load keeps the limits under any schedule")
    return lines
