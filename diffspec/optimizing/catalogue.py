"""What a joint decision chooses among and for whom: classes of requests and a catalogue of drafters, read from YAML."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml

from diffspec.acceptance import AbstractAcceptance, ConstantAcceptance, PositionAcceptance
from diffspec.fitting.deployment import FittedDeployment
from diffspec.optimizing.limits import LIMITED, PER_REQUEST, PERCENTILE_METRICS, Limit, parse_limit
from diffspec.results import InputError
from diffspec.trees import check_probabilities
from diffspec.workload import check_range

CLASSES_EXAMPLE = """classes:
- name: chat
  share: 0.6                # of the requests
  prompt_length: 300
  output_length: 200
  acceptance_rate: 0.7      # or position_acceptance: "0.8;0.7;0.6"; counts where the drafter gives none
  slo: ["tpot_mean<0.05"]   # limits of this class
- name: code
  share: 0.4
  prompt_length: 800
  output_length: 100
  acceptance_rate: 0.85
"""
DRAFTERS_EXAMPLE = """drafters:
- name: small
  drafter_params: 0.5e9     # drafting times of the fitted drafter are scaled by it
  acceptance_rate: 0.6
- name: large
  drafter_params: 1.5e9
  acceptance_rate: {chat: 0.7, code: 0.85}   # by class
- name: eagle
  model: eagle.json         # a fitted model of its own
- name: eagle trees
  candidates: [[0.6, 0.15, 0.05], [0.55, 0.15, 0.05]]   # P(candidate accepted | parent was): depths x ranks
  max_nodes: 16             # the tree of 1 to so many drafted tokens is decided, too
"""


LIMITED_OF_CLASS = (*LIMITED, *PERCENTILE_METRICS, "goodput", *PER_REQUEST)
MOST_NODES = 32
"""Drafted tokens of the largest tree to consider, unless told."""


@dataclass(frozen=True)
class RequestClass:
    """Requests of one kind: their ``share`` of all [1], lengths [tok], limits, and the acceptance that counts where a
    drafter of the catalogue gives none.

    ``weight`` [1] multiplies the share in the objective.
    """

    name: str
    share: float
    prompt_length: float
    output_length: float
    output_scv: float = 0.0
    prefix_hit_rate: float = 0.0
    acceptance: AbstractAcceptance | None = None
    limits: tuple[Limit, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class DrafterChoice:
    """One drafter of a catalogue: ``drafter_params`` scale the fitted drafter, or a ``deployment`` has its own;
    ``acceptance`` for all classes, ``by_class`` for some.

    A drafter that draws trees has ``candidates`` instead (or ``candidates_by_class``): P(the r-th candidate at depth d
    is accepted, given its parent was) [depth, rank], the last row for deeper levels; ``max_nodes`` [tok] of a tree.
    """

    name: str
    drafter_params: float | None = None
    acceptance: AbstractAcceptance | None = None
    by_class: Mapping[str, AbstractAcceptance] | None = None
    deployment: FittedDeployment | None = None
    candidates: np.ndarray | None = None
    candidates_by_class: Mapping[str, np.ndarray] | None = None
    max_nodes: int = MOST_NODES

    @property
    def draws_trees(self) -> bool:
        """True where its drafts are trees, whose shape is decided too."""
        return self.candidates is not None or self.candidates_by_class is not None


def parse_classes(text: str, source: str = "classes") -> tuple[RequestClass, ...]:
    """The classes of a YAML text; :data:`CLASSES_EXAMPLE` shows every field. Shares are made to sum to 1.

    Errors: :class:`InputError` that names the class, what was got and what is allowed.

    >>> [(one.name, round(one.share, 2)) for one in parse_classes(CLASSES_EXAMPLE)]
    [('chat', 0.6), ('code', 0.4)]
    """
    allowed = ("name", "share", "prompt_length", "output_length", "output_scv", "prefix_hit_rate", "weight", "slo")
    found = []
    for entry, name in _entries(text, source, "classes", (*allowed, *_ACCEPTANCE)):
        where = f"{source}: class {name!r}"
        numbers = {
            "share": _number(entry, where, "share", 1.0, 0, 1e9, low_open=True),
            "prompt_length": _number(entry, where, "prompt_length", None, 0, 1e8, low_open=True),
            "output_length": _number(entry, where, "output_length", None, 1, 1e8),
            "output_scv": _number(entry, where, "output_scv", 0.0, 0, 100),
            "prefix_hit_rate": _number(entry, where, "prefix_hit_rate", 0.0, 0, 1),
            "weight": _number(entry, where, "weight", 1.0, 0, 1e9, low_open=True),
        }
        acceptance, by_class = _acceptance(entry, where)
        if by_class:
            raise InputError(f"{where}: acceptance_rate: got a mapping; allowed: a number")
        slo = entry.get("slo", [])
        slo = [slo] if isinstance(slo, str) else slo
        if not isinstance(slo, list):
            raise InputError(f"{where}: slo: got {slo!r}; allowed: a list of limits such as ['ttft_mean<0.5']")
        limits = tuple(parse_limit(str(limit), LIMITED_OF_CLASS) for limit in slo)
        found.append(RequestClass(name, acceptance=acceptance, limits=limits, **numbers))
    total = sum(one.share for one in found)
    return tuple(RequestClass(**{**vars(one), "share": one.share / total}) for one in found)


def mean_request(classes: Sequence[RequestClass]) -> tuple[float, float, AbstractAcceptance | None]:
    """(prompt length, output length [tok], acceptance rate) of the mean request; None where classes have no constant
    rate each.

    >>> prompt, output, acceptance = mean_request(parse_classes(CLASSES_EXAMPLE))
    >>> prompt, output, round(float(acceptance.acceptance_rate), 4)
    (500.0, 160.0, 0.76)
    """
    prompt, output = (sum(one.share * getattr(one, name) for one in classes) for name in _LENGTHS)
    rates = [one.acceptance.acceptance_rate for one in classes if isinstance(one.acceptance, ConstantAcceptance)]
    if len(rates) < len(classes):
        return prompt, output, None
    rate = sum(one.share * rate for one, rate in zip(classes, rates, strict=True))
    return prompt, output, ConstantAcceptance(rate)


def parse_drafters(
    text: str, source: str = "drafters", read: Callable[[str], FittedDeployment] | None = None
) -> tuple[DrafterChoice, ...]:
    """The drafters of a YAML text; :data:`DRAFTERS_EXAMPLE` shows every field. ``read`` loads the model of a path.

    Errors: :class:`InputError` as :func:`parse_classes`.
    """
    found = []
    allowed = ("name", "drafter_params", "model", "candidates", "max_nodes", *_ACCEPTANCE)
    for entry, name in _entries(text, source, "drafters", allowed):
        where = f"{source}: drafter {name!r}"
        if "model" in entry and "drafter_params" in entry:
            raise InputError(f"{where}: got model and drafter_params; allowed: one of them")
        if "model" in entry and (not isinstance(entry["model"], str) or read is None):
            raise InputError(f"{where}: model: got {entry['model']!r}; allowed: the path of a fitted model")
        params = None
        if "drafter_params" in entry:
            params = _number(entry, where, "drafter_params", None, 0, 1e15, low_open=True)
        acceptance, by_class = _acceptance(entry, where)
        own = None if "model" not in entry or read is None else read(entry["model"])
        candidates, most = _candidates(entry, where)
        tables = (None, candidates) if isinstance(candidates, dict) else (candidates, None)
        found.append(DrafterChoice(name, params, acceptance, by_class, own, *tables, most))
    return tuple(found)


def _candidates(entry: dict[str, Any], where: str):
    """(candidates' probabilities, of all or by class; most nodes) of an entry."""
    if "candidates" not in entry:
        if "max_nodes" in entry:
            raise InputError(f"{where}: max_nodes: goes with candidates, of a drafter that draws trees")
        return None, MOST_NODES
    given = [name for name in _ACCEPTANCE if name in entry]
    if given:
        raise InputError(f"{where}: got candidates and {given[0]}; allowed: one of them")
    most = _number(entry, where, "max_nodes", float(MOST_NODES), 1, 256)
    if most != int(most):
        raise InputError(f"{where}: max_nodes: got {most!r}; allowed: whole numbers, 1 to 256")

    def one(value, where):
        rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
        try:
            longest = max(len(row) for row in rows)
            table = np.asarray([[*(_real(p) for p in row), *[0.0] * (longest - len(row))] for row in rows])
            return np.asarray(check_probabilities(table))
        except (TypeError, ValueError, InputError) as error:
            raise InputError(
                f"{where}: candidates: got {value!r}; allowed: rows of probabilities, the best candidate first, each "
                f"row at most 1 in sum, such as [[0.6, 0.2], [0.5, 0.2]] ({error})"
            ) from None

    value = entry["candidates"]
    if isinstance(value, dict):
        return {str(name): one(table, f"{where}: {name}") for name, table in value.items()}, int(most)
    return one(value, where), int(most)


def acceptance_of_size(drafters: Sequence[DrafterChoice]) -> tuple[float, float]:
    """(a, b) of logit(acceptance_rate) = a + b*log(drafter_params), by least squares over the drafters of a family.

    Errors: :class:`InputError` unless at least two drafters of different sizes have one acceptance rate each.

    >>> pair = (DrafterChoice("s", 1e9, ConstantAcceptance(0.6)), DrafterChoice("l", 4e9, ConstantAcceptance(0.8)))
    >>> a, b = acceptance_of_size(pair)
    >>> round(1 / (1 + math.exp(-a - b * math.log(2e9))), 3)
    0.71
    """
    known = [
        (math.log(drafter.drafter_params), float(drafter.acceptance.acceptance_rate))
        for drafter in drafters
        if drafter.drafter_params is not None and isinstance(drafter.acceptance, ConstantAcceptance)
    ]
    if len({size for size, _ in known}) < 2:
        raise InputError(
            "drafters: a size between those of the catalogue needs drafter_params and an acceptance_rate of at least "
            f"two sizes; got {len({size for size, _ in known})}"
        )
    sizes, rates = np.asarray(known).T
    rates = np.clip(rates, 1e-6, 1.0 - 1e-6)
    slope, start = np.polyfit(sizes, np.log(rates / (1.0 - rates)), 1)
    return float(start), float(slope)


_ACCEPTANCE = ("acceptance_rate", "position_acceptance")
_LENGTHS = ("prompt_length", "output_length")


def _entries(text: str, source: str, key: str, allowed: tuple[str, ...]):
    try:  # classes and drafters may be two documents of one file
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    named = [document[key] for document in documents if isinstance(document, dict) and key in document]
    entries = named[0] if named else documents[0] if documents else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{source}: got no list of mappings; allowed: '{key}:' and one entry each, '- name: ...'")
    names: set[str] = set()
    for number, entry in enumerate(entries, 1):
        name = entry.get("name", number)
        if isinstance(name, bool) or not isinstance(name, str | int | float):
            raise InputError(f"{source}: entry {number}: name: got {name!r}; allowed: a text, quoted where in doubt")
        name = str(name)
        unknown = [str(field) for field in entry if field not in allowed]
        if unknown:
            raise InputError(f"{source}: {name!r}: got {', '.join(unknown)}; allowed: {', '.join(allowed)}")
        if name in names:
            raise InputError(f"{source}: got two entries named {name!r}; allowed: each name once")
        names.add(name)
        yield entry, name


def _real(value: Any) -> float:
    """A number of YAML, where true and false are none, and a text such as 5e8 is one."""
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _number(entry: dict[str, Any], where: str, field: str, default, low, high, low_open=False) -> float:
    value = entry.get(field, default)
    if value is None:
        raise InputError(f"{where}: {field} is missing; allowed: {low:g} to {high:g}")
    try:
        value = _real(value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: {field}: got {value!r}; allowed: a number") from None
    check_range(f"{where}: {field}", value, low, high, low_open=low_open, unit="")
    return value


def _acceptance(entry: dict[str, Any], where: str):
    """(acceptance of all, acceptance by class) of an entry."""
    given = [name for name in _ACCEPTANCE if name in entry]
    if len(given) > 1:
        raise InputError(f"{where}: got acceptance_rate and position_acceptance; allowed: one of them")
    if not given:
        return None, None
    value = entry[given[0]]

    def one(value, where):
        values: list[Any] = [value]
        if given[0] == "position_acceptance":
            values = value if isinstance(value, list) else str(value).replace(",", ";").split(";")
        try:
            rates = [_real(part) for part in values]
        except (TypeError, ValueError):
            raise InputError(f"{where}: {given[0]}: got {value!r}; allowed: 0 to 1") from None
        for rate in rates:
            check_range(f"{where}: {given[0]}", rate, 0, 1, low_open=False, unit="")
        return ConstantAcceptance(rates[0]) if given[0] == "acceptance_rate" else PositionAcceptance(jnp.asarray(rates))

    if isinstance(value, dict):
        return None, {str(name): one(rate, f"{where}: {name}") for name, rate in value.items()}
    return one(value, where), None
