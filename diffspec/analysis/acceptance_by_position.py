"""How acceptance depends on the draft position, with intervals: the pre-evaluation of a drafter.

Conditional acceptance a_i = sum_u accepted_ui / sum_u reached_ui over units u (requests, or benchmark runs) is a ratio
estimator; with at least `FEW_UNITS` units its covariance is that of the units, ``Cov_ij = m/(m-1) sum_u e_ui e_uj``
with ``e_ui = (accepted_ui - a_i reached_ui) / sum_u reached_ui`` (Cochran, Sampling Techniques, ch. 6), which allows
for requests that differ. With fewer units steps are taken to be independent (Wilson's interval), and that is said.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from diffspec.acceptance_curves import conditional_to_tokens_per_step
from diffspec.results import InputError
from diffspec.traces.acceptance_counts import LABELS, AcceptanceCounts, acceptance_counts, profiles
from diffspec.traces.gather import Gathered
from diffspec.traces.readers.speculation_profile import from_conditional, write

FEW_UNITS = 20
LEVEL = 0.95
LEVEL_SLOPE = 0.02
"""Changes of acceptance per draft position below this are called level."""
_Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)


@dataclass(frozen=True)
class PositionEstimate:
    """Conditional acceptance of one draft position with its 95 % interval, and the steps it rests on."""

    position: int
    acceptance: float
    low: float
    high: float
    reached: float


@dataclass(frozen=True)
class AcceptanceEstimate:
    """Acceptance of one group of requests. `group`, what they share; `units` and `unit`, how many independent requests
    or runs; `positions`; `tokens_per_step` = 1 + a_1 + a_1 a_2 + ...; `slope`, change of acceptance per draft position
    with its interval; `verdict`, "falls", "rises", "level" (the interval excludes changes above 0.02 a position), or
    "cannot tell"; `independent_steps`, whether intervals take the steps of a request to be independent."""

    group: dict[str, str]
    unit: str
    units: int
    positions: tuple[PositionEstimate, ...]
    tokens_per_step: float
    slope: float | None
    slope_low: float | None
    slope_high: float | None
    verdict: str
    independent_steps: bool

    @property
    def conditional(self) -> tuple[float, ...]:
        """The curve a_1, a_2, ... as fit, predict and optimize take it."""
        return tuple(entry.acceptance for entry in self.positions)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**self.__dict__, "positions": [dict(entry.__dict__) for entry in self.positions]}


def estimate(counts: AcceptanceCounts, group: dict[str, str] | None = None) -> AcceptanceEstimate:
    """Acceptance by draft position of all units of `counts`.

    >>> one = AcceptanceCounts(np.array([[80.0, 56.0]]), np.array([[100.0, 80.0]]), {}, "run")
    >>> found = estimate(one)
    >>> found.conditional, round(found.tokens_per_step, 3), found.independent_steps
    ((0.8, 0.7), 2.36, True)
    """
    reached, accepted = counts.reached.sum(axis=0), counts.accepted.sum(axis=0)
    known = int(np.cumprod(reached > 0).sum())
    if known == 0:
        raise InputError("acceptance: no step reached the first draft position; the drafter never drafted")
    reached, rates = reached[:known], accepted[:known] / reached[:known]
    units = len(counts.reached)
    clustered = units >= FEW_UNITS
    if clustered:
        errors = (counts.accepted[:, :known] - rates * counts.reached[:, :known]) / reached
        covariance = units / (units - 1) * errors.T @ errors
        # Units that all agree say nothing of their spread: no variance falls below that of independent steps.
        covariance += np.diag(np.maximum(_binomial(rates, reached) - np.diag(covariance), 0.0))
        several = (counts.reached[:, :known] > 0).sum(axis=0) >= FEW_UNITS
        bounds = [
            _logit_interval(rate, math.sqrt(covariance[i, i])) if several[i] else _wilson(rate, reached[i])
            for i, rate in enumerate(rates)
        ]
    else:
        covariance = np.diag(_binomial(rates, reached))
        bounds = [_wilson(rate, count) for rate, count in zip(rates, reached, strict=True)]
    positions = tuple(
        PositionEstimate(index + 1, float(rates[index]), low, high, float(reached[index]))
        for index, (low, high) in enumerate(bounds)
    )
    slope, error = _slope((rates * reached + 2) / (reached + 4), covariance)
    low, high = slope - _Z * error, slope + _Z * error
    has_slope = known > 1
    return AcceptanceEstimate(
        group or {},
        counts.unit,
        units,
        positions,
        conditional_to_tokens_per_step(rates),
        slope if has_slope else None,
        low if has_slope else None,
        high if has_slope else None,
        _verdict(low, high) if has_slope else "cannot tell",
        not clustered,
    )


def estimates(found: Sequence[AcceptanceCounts], by: Sequence[str] = ()) -> list[AcceptanceEstimate]:
    """Acceptance of all units of one kind together (requests where there are any, else runs), then by the values of
    each label in `by` that they have. Raises `InputError` for a label nobody carries."""
    if not found:
        raise InputError(
            "acceptance: nothing here tells acceptance by draft position; give per-request metrics, a pair of /metrics "
            "scrapes, a benchmark JSON with spec_decode fields, or a speculation profile"
        )
    unit = "request" if any(counts.unit == "request" for counts in found) else "run"
    same = [counts for counts in found if counts.unit == unit]
    whole = _stacked(same)
    answers = [estimate(whole)]
    for name in by:
        if name not in LABELS:
            raise InputError(f"by: got {name!r}; allowed: {', '.join(LABELS)}")
        values = whole.labels.get(name)
        if values is None:
            raise InputError(f"by: no {unit} says its {name}; known here: {', '.join(whole.labels) or 'nothing'}")
        for value in dict.fromkeys(values):
            part = whole.where(np.array([entry == value for entry in values]))
            if part.reached[:, :1].sum() > 0:
                answers.append(estimate(part, {name: "not said" if value is None else str(value)}))
    return answers


def _stacked(parts: Sequence[AcceptanceCounts]) -> AcceptanceCounts:
    width = max(part.reached.shape[1] for part in parts)

    def wide(values: np.ndarray) -> np.ndarray:
        return np.pad(values, ((0, 0), (0, width - values.shape[1])))

    names = [name for name in LABELS if any(name in part.labels for part in parts)]
    labels = {
        name: [value for part in parts for value in part.labels.get(name, [None] * len(part.reached))] for name in names
    }
    accepted, reached = (
        np.concatenate([wide(getattr(part, name)) for part in parts]) for name in ("accepted", "reached")
    )
    return AcceptanceCounts(accepted, reached, labels, parts[0].unit)


def _binomial(rates: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """Variance of proportions of independent steps, with two successes and two failures added (Agresti and Coull): it
    is not zero where all or none were accepted."""
    adjusted = (rates * reached + 2) / (reached + 4)
    return adjusted * (1 - adjusted) / reached


def _wilson(rate: float, count: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion of `count` independent steps."""
    centre = (rate + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(rate * (1 - rate) / count + _Z**2 / (4 * count**2))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def _logit_interval(rate: float, error: float) -> tuple[float, float]:
    """An interval made symmetric in the logit, so that it stays within 0 and 1 (delta method)."""
    if rate <= 0.0 or rate >= 1.0:
        return (0.0, min(1.0, _Z * error)) if rate <= 0.0 else (max(0.0, 1.0 - _Z * error), 1.0)
    centre, half = math.log(rate / (1 - rate)), _Z * error / (rate * (1 - rate))
    return 1 / (1 + math.exp(half - centre)), 1 / (1 + math.exp(-half - centre))


def _slope(rates: np.ndarray, covariance: np.ndarray) -> tuple[float, float]:
    """Slope of acceptance over the draft position by weighted least squares, and its standard error; `rates` are drawn
    towards a half by two successes and two failures, so that a handful of steps makes no slope."""
    weights = 1.0 / np.maximum(np.diag(covariance), 1e-12)
    places = np.arange(1, len(rates) + 1)
    centred = weights * (places - np.average(places, weights=weights))
    spread = float((centred * places).sum())
    if len(rates) < 2 or spread <= 0:
        return 0.0, math.inf
    contrast = centred / spread
    return float(contrast @ rates), float(math.sqrt(max(contrast @ covariance @ contrast, 0.0)))


def _verdict(low: float, high: float) -> str:
    if high < 0:
        return "falls"
    if low > 0:
        return "rises"
    return "level" if low >= -LEVEL_SLOPE and high <= LEVEL_SLOPE else "cannot tell"


def study(gathered: Gathered, by: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """The answer of `diffspec acceptance` as plain data, and the curve of all groups together as the text of a
    speculation profile. Profiles alone are answered with their rates, without intervals."""
    at_output = "output_position" in by
    found = acceptance_counts(gathered)
    given = profiles(gathered)
    warnings = [*gathered.warnings, *(line for item in given for line in item.warnings)]
    for frame in gathered.of("acceptance"):
        warnings += getattr(frame, "attrs", {}).get("warnings", [])
    if not found and given:
        if len(given) > 1 or by:
            raise InputError("acceptance: profiles hold rates without counts: give one, and no --by")
        profile = given[0]
        group = {"file": "profile", "conditional": list(profile.conditional), "marginal": list(profile.marginal)}
        answer = {"groups": [], "profile": group | {"tokens_per_step": profile.tokens_per_step}}
        return answer | {"sources": gathered.recognised, "warnings": warnings}, write(profile)
    groups = estimates(found, [name for name in by if name != "output_position"])
    if at_output and not any(len(counts.reached) for counts in acceptance_counts(gathered, by_output_position=True)):
        raise InputError(
            "by: output_position needs the steps of each request: start vLLM with --per-request-spec-decode-metrics "
            "detailed"
        )
    if at_output:
        groups += estimates(acceptance_counts(gathered, by_output_position=True), ["output_position"])[1:]
    if groups[0].independent_steps:
        warnings.append(
            f"{groups[0].units} {groups[0].unit}s only: intervals take the steps of a request to be independent and "
            "are too narrow where requests differ; per-request metrics tell"
        )
    categories = {name: entry.conditional for entry in groups[1:] if (name := entry.group.get("task"))}
    conditions = {"unit": groups[0].unit, "units": groups[0].units, "level": LEVEL}
    profile = from_conditional(groups[0].conditional, categories=categories, conditions=conditions)
    answer = {"groups": [entry.to_dict() for entry in groups], "profile": None}
    return answer | {"sources": gathered.recognised, "warnings": warnings}, write(profile)
