"""Read and write `speculation_profile.json`, schema 1.0: how well a drafter drafts, told once for several tools.

Two conventions stand side by side and are easily taken for each other:

    conditional_accept_rates[i] = P(draft i+1 accepted | drafts 1..i were)      what the model here calls a_1..a_k
    marginal_accept_rates[i]    = P(drafts 1..i+1 accepted) = product of the conditional ones to i
    mean_accept_length          = 1 + sum of the marginal ones                  [tok], tokens per step, bonus included

Where both are given they are checked against each other; where one is missing it is worked out. Traps: the mean per
request (`mean_accept_length_per_request`) weighs short requests as long ones and is another number.
`acceptance_length_histogram` counts by tokens emitted, the bonus included. A profile with `measured` false is a stub.
Block verification has no acceptance by position: such a profile has null for both.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Any

from ...acceptance_curves import conditional_to_marginal
from ..problems import Problem
from ..source import Source

SCHEMA_VERSION = "1.0"
TOLERANCE = 0.02
"""Absolute difference of the two conventions, and of the mean [tok], above which a profile is in error."""
_ROUNDED = 2e-4  # six decimals, several of them multiplied
# Their draft of k tokens begins with their draft of k-1: acceptance measured at k holds for every shorter draft.
_CHAINS = ("eagle", "eagle1", "eagle2", "eagle3", "draft_model")
_RATES = ("conditional_accept_rates", "marginal_accept_rates")


@dataclass(frozen=True)
class SpeculationProfile:
    """Acceptance of a drafter. `conditional` and `marginal` acceptance of positions 1..`num_speculative_tokens`;
    `tokens_per_step` [tok], bonus included; `categories`, conditional acceptance by category where the profile gives
    it; `category_tokens_per_step`, for each category that names its mean; `conditions`, of the measurement, as given;
    `by_length`, tokens per step measured at other draft lengths; `warnings`, what a reader should know."""

    method: str | None
    num_speculative_tokens: int
    conditional: tuple[float, ...]
    marginal: tuple[float, ...]
    tokens_per_step: float
    categories: dict[str, tuple[float, ...]] = field(default_factory=dict)
    category_tokens_per_step: dict[str, float] = field(default_factory=dict)
    target_model: str | None = None
    draft_checkpoint: str | None = None
    conditions: dict[str, Any] = field(default_factory=dict)
    by_length: dict[int, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def from_conditional(conditional: Sequence[float], method: str | None = None, **rest: Any) -> SpeculationProfile:
    """The profile of a conditional acceptance a_1..a_k.

    >>> profile = from_conditional([0.5, 0.5], "eagle3")
    >>> profile.marginal, profile.tokens_per_step
    ((0.5, 0.25), 1.75)
    """
    marginal = tuple(conditional_to_marginal(list(conditional)).tolist())
    k = len(marginal)
    return SpeculationProfile(method, k, tuple(map(float, conditional)), marginal, 1 + sum(marginal), **rest)


def recognises(source: Source) -> bool:
    """Whether a file is a speculation profile."""
    first = source.first
    return isinstance(first, dict) and (
        any(key in first for key in _RATES) or {"schema_version", "mean_accept_length"} <= set(first)
    )


def read(source: Source) -> SpeculationProfile:
    """The profile in a file. Raises `TraceError` when it is a stub, holds no acceptance by position, rates that are no
    probabilities, marginal ones that increase, or two conventions that contradict each other."""
    record = source.first
    if not isinstance(record, dict):
        raise Problem("no speculation profile", source.file, got=type(record).__name__).error()
    if len(source.records) > 1:
        raise Problem("several values in the file", source.file, got=len(source.records), allowed="one profile").error()
    return from_record(record, source.file)


def from_record(record: dict[str, Any], file: str = "the profile") -> SpeculationProfile:
    """`read` for JSON already parsed."""
    warnings: list[str] = []
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        warnings.append(f"{file}: schema version {str(version)[:20]}, read as {SCHEMA_VERSION}")
    if record.get("measured") is False:
        raise Problem("a stub: nothing was measured", file, column="measured", got=False).error()
    conditional, marginal = _pair(record, file, warnings)
    if conditional is None or marginal is None:
        reason = record.get("vectors_unavailable_reason")
        got = reason if isinstance(reason, str) else None
        raise Problem("the profile has no acceptance by position", file, column=_RATES[0], got=got).error()
    planned = record.get("num_speculative_tokens")
    if planned is not None and (type(planned) is not int or planned != len(conditional)):
        allowed = f"{len(conditional)}, the number of rates"
        raise Problem("", file, None, "num_speculative_tokens", planned, allowed).error()
    implied = 1 + sum(marginal)
    mean = _mean(record.get("mean_accept_length"), "mean_accept_length", file)
    if mean is not None and abs(mean - implied) > TOLERANCE:
        advice = "num_speculative_tokens below the drafts of the run cuts the rates short"
        message = f"mean_accept_length {mean:g} but the rates add up to {implied:g}"
        raise Problem(message, file, None, "mean_accept_length", advice=advice).error()
    method = _text(record.get("method"))
    categories, means = _categories(record.get("per_category"), file, warnings)
    conditions = record.get("measurement_conditions")
    return SpeculationProfile(
        method=method,
        num_speculative_tokens=len(conditional),
        conditional=conditional,
        marginal=marginal,
        tokens_per_step=implied if mean is None else mean,
        categories=categories,
        category_tokens_per_step=means,
        target_model=_name(record.get("target_model")),
        draft_checkpoint=_name(record.get("draft_checkpoint")),
        conditions=conditions if isinstance(conditions, dict) else {},
        by_length=_by_length(record.get("accept_length_by_k"), file, warnings),
        warnings=tuple(warnings),
    )


def write(profile: SpeculationProfile) -> str:
    """A profile as the text of `speculation_profile.json`, schema 1.0; `read` gives it back to six decimals.

    >>> json.loads(write(from_conditional([0.8, 0.5])))["marginal_accept_rates"]
    [0.8, 0.4]
    """
    implied = 1 + sum(profile.marginal)
    increasing = any(b > a + 1e-9 for a, b in zip(profile.marginal, profile.marginal[1:], strict=False))
    chain = (profile.method or "").lower() in _CHAINS
    by_length = profile.by_length or {profile.num_speculative_tokens: profile.tokens_per_step}
    names = sorted({*profile.categories, *profile.category_tokens_per_step})
    record = {
        "schema_version": SCHEMA_VERSION,
        "measured": True,
        "producer": "diffspec",
        "method": profile.method,
        "draft_checkpoint": profile.draft_checkpoint,
        "target_model": profile.target_model,
        "num_speculative_tokens": profile.num_speculative_tokens,
        "block_size": None,
        "max_supported_k": profile.num_speculative_tokens,
        "verification_method": "longest_prefix",
        "conditional_accept_rates": [round(value, 6) for value in profile.conditional],
        "marginal_accept_rates": [round(value, 6) for value in profile.marginal],
        "mean_accept_length": round(profile.tokens_per_step, 6),
        "accept_length_model": "chain_analytic" if chain else "measured_per_k",
        "accept_length_by_k": {str(k): round(value, 6) for k, value in sorted(by_length.items())},
        "acceptance_length_histogram": None,
        "per_category": {name: _category(profile, name) for name in names} or None,
        "measurement_conditions": profile.conditions or None,
        "validation": {
            "mean_consistency": {
                "implied_mean_accept_length": round(implied, 6),
                "reported_mean_accept_length": round(profile.tokens_per_step, 6),
                "abs_delta": round(abs(implied - profile.tokens_per_step), 6),
                "tolerance": TOLERANCE,
                "passed": abs(implied - profile.tokens_per_step) <= TOLERANCE,
            },
            "marginal_monotonicity": {"passed": not increasing, "violations": []},
        },
    }
    return json.dumps(record, indent=2, allow_nan=False) + "\n"


def _category(profile: SpeculationProfile, name: str) -> dict[str, Any]:
    conditional = profile.categories.get(name)
    mean = profile.category_tokens_per_step.get(name)
    if conditional is None:
        return {"mean_accept_length": mean}
    marginal = tuple(accumulate(conditional, mul))
    return {
        "mean_accept_length": round(1 + sum(marginal) if mean is None else mean, 6),
        "conditional_accept_rates": [round(value, 6) for value in conditional],
        "marginal_accept_rates": [round(value, 6) for value in marginal],
    }


def _pair(
    record: dict[str, Any], file: str, warnings: list[str]
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Both conventions, each from the other where it is missing."""
    conditional, marginal = (_rates(record.get(key), key, file) for key in _RATES)
    if marginal is not None:
        for index, (before, here) in enumerate(zip((1.0, *marginal), marginal, strict=False)):
            if here > before + _ROUNDED:
                message = f"position {index + 1} is accepted more often than all before it"
                advice = "perhaps these are the conditional rates"
                raise Problem(message, file, None, _RATES[1], here, f"at most {before:g}", advice).error()
    if conditional is None and marginal is None:
        return None, None
    if conditional is None:
        assert marginal is not None
        pairs = zip((1.0, *marginal), marginal, strict=False)
        return tuple(min(1.0, b / a) if a > 0 else 0.0 for a, b in pairs), marginal
    implied = tuple(accumulate(conditional, mul))
    if marginal is None:
        return conditional, implied
    if len(marginal) != len(conditional):
        raise Problem("conditional and marginal rates differ in number", file, None, _RATES[1], len(marginal)).error()
    off = max(abs(a - b) for a, b in zip(implied, marginal, strict=True))
    if off > TOLERANCE:
        alike = max(abs(a - b) for a, b in zip(conditional, marginal, strict=True)) < _ROUNDED
        advice = "the same numbers stand for both: one of the names is wrong" if alike else None
        message = f"the marginal rates are not the running product of the conditional ones (off by {off:.3g})"
        raise Problem(message, file, None, _RATES[1], advice=advice).error()
    if off > _ROUNDED:
        warnings.append(f"{file}: marginal and conditional rates differ by {off:.2g}; the conditional ones are used")
        return conditional, implied
    return conditional, marginal


def _rates(value: Any, key: str, file: str) -> tuple[float, ...] | None:
    if value is None or value == []:
        return None
    allowed = "a list of at most 1000 numbers from 0 to 1"
    if not isinstance(value, list) or len(value) > 1000:
        raise Problem("", file, None, key, value, allowed).error()
    for item in value:
        if type(item) not in (int, float) or not 0 <= item <= 1:
            advice = "perhaps percentages: divide by 100" if type(item) in (int, float) and 1 < item <= 100 else None
            raise Problem("", file, None, key, item, allowed, advice).error()
    return tuple(map(float, value))


def _mean(value: Any, key: str, file: str) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not 1 <= value <= 1001:
        raise Problem("", file, None, key, value, "1 to 1001 tokens, the bonus token included").error()
    return float(value)


def _categories(value: Any, file: str, warnings: list[str]) -> tuple[dict[str, tuple[float, ...]], dict[str, float]]:
    rates: dict[str, tuple[float, ...]] = {}
    means: dict[str, float] = {}
    for name, item in value.items() if isinstance(value, dict) else ():
        if not isinstance(item, dict):
            warnings.append(f"{file}: category {name[:40]!r} is no object and is left out")
            continue
        conditional, _ = _pair(item, f"{file}, category {name[:40]!r}", warnings)
        if conditional is not None:
            rates[name] = conditional
        mean = _mean(item.get("mean_accept_length"), f"per_category.{name[:40]}.mean_accept_length", file)
        if mean is not None:
            means[name] = mean
    return rates, means


def _by_length(value: Any, file: str, warnings: list[str]) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, mean in value.items() if isinstance(value, dict) else ():
        if key.isascii() and key.isdigit() and len(key) < 4 and type(mean) in (int, float) and math.isfinite(mean):
            found[int(key)] = float(mean)
        else:
            warnings.append(f"{file}: accept_length_by_k has {key[:20]!r}, which is left out")
    return found


def _text(value: Any) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _name(value: Any) -> str | None:
    """A model: its name, or of an object that describes it the first name it has."""
    if isinstance(value, dict):
        return next((text for key in ("id", "name", "model", "path") if (text := _text(value.get(key)))), None)
    return _text(value)
