"""What a map can be drawn over: the axes, their units, scales and ranges, and how they are written.

A point of an axis has a coordinate between 0 (its first value) and 1 (its last), linear in the value or in its
logarithm: contours are traced in these coordinates.
"""

import difflib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diffspec.acceptance import MAX_DRAFT_LENGTH
from diffspec.hardware import accelerator
from diffspec.results import InputError

MOST_VALUES = 200
POINTS = 13
"""Values of an axis that is written as a range without a step."""


class Kind(NamedTuple):
    """One kind of axis: its unit, whether it is logarithmic, the range allowed, and the usual one."""

    unit: str
    logarithmic: bool
    low: float
    high: float
    default: tuple[float, float] | None


KINDS = {
    "arrival_rate": Kind("req/s", True, 1e-9, 1e9, None),
    "concurrency": Kind("req", True, 1.0, 1e9, (1.0, 256.0)),
    "acceptance_rate": Kind("1", False, 0.0, 1.0, (0.3, 0.95)),
    "prompt_length": Kind("tok", True, 1.0, 1e8, (128.0, 32768.0)),
    "output_length": Kind("tok", True, 1.0, 1e8, (32.0, 2048.0)),
    "draft_length": Kind("tok", False, 1.0, float(MAX_DRAFT_LENGTH), (1.0, 8.0)),
    "drafter_scale": Kind("1", True, 1e-6, 1e6, (0.25, 4.0)),
    "max_batch_size": Kind("req", True, 1.0, 1e9, (1.0, 256.0)),
}
"""Axes of numbers; ``hardware`` is one of names."""
HARDWARE = "hardware"
NAMES = (*KINDS, HARDWARE)


@dataclass(frozen=True)
class Axis:
    """One axis of a map: ``values`` increase, or are names of hardware.

    >>> axis = make_axis("prompt_length", [1024, 4096, 16384])
    >>> [round(float(place), 9) for place in axis.nodes], round(float(axis.value(0.25)), 3)
    ([0.0, 0.5, 1.0], 2048.0)
    """

    name: str
    values: tuple[float, ...] | tuple[str, ...]

    @property
    def categorical(self) -> bool:
        """True for names, along which nothing is traced."""
        return self.name == HARDWARE

    @property
    def unit(self) -> str:
        """Unit of its values, empty for names."""
        return "" if self.categorical else KINDS[self.name].unit

    @property
    def logarithmic(self) -> bool:
        """Whether its coordinate is linear in the logarithm."""
        return not self.categorical and KINDS[self.name].logarithmic

    @property
    def nodes(self) -> Float[np.ndarray, "n"]:
        """Coordinates of the values; of names their numbers 0, 1, ..."""
        if self.categorical:
            return np.arange(len(self.values), dtype=float)
        values = self._scaled(np.asarray(self.values, dtype=float))
        return (values - values[0]) / (values[-1] - values[0])

    def value(self, coordinate) -> np.ndarray:
        """Values at coordinates (clipped to [0, 1]); the number itself of a name."""
        if self.categorical:
            return np.asarray(coordinate, dtype=float)
        first, last = self._scaled(np.asarray([self.values[0], self.values[-1]], dtype=float))
        scaled = first + np.clip(coordinate, 0.0, 1.0) * (last - first)
        return np.asarray(np.exp(scaled) if self.logarithmic else scaled)

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        return np.log(values) if self.logarithmic else values


def make_axis(name: str, values: Sequence) -> Axis:
    """The axis of this name over these values. Errors: :class:`InputError` for an unknown name, fewer than two values,
    too many, values that do not increase, or one out of range."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"axis: got {name!r}; allowed: {', '.join(NAMES)}{hint}")
    if not 2 <= len(values) <= MOST_VALUES:
        raise InputError(f"axis {name}: got {len(values)} values; allowed: 2 to {MOST_VALUES}")
    if name == HARDWARE:
        names = tuple(accelerator(str(value)).name for value in values)
        if len(set(names)) != len(names):
            raise InputError(f"axis hardware: got {', '.join(names)}; allowed: each once")
        return Axis(name, names)
    kind = KINDS[name]
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise InputError(f"axis {name}: got {list(values)!r}; allowed: numbers") from None
    for number in numbers:
        if not kind.low <= number <= kind.high:
            raise InputError(f"axis {name}: got {number:g}; allowed: {kind.low:g} to {kind.high:g} {kind.unit}")
    if any(later <= earlier for earlier, later in itertools.pairwise(numbers)):
        raise InputError(
            f"axis {name}: got {', '.join(f'{number:g}' for number in numbers)}; allowed: increasing values"
        )
    return Axis(name, numbers)


def spaced(name: str, first: float, last: float, points: int = POINTS) -> Axis:
    """``points`` values from first to last, even in the axis's own coordinate."""
    if name not in KINDS or not first < last or not points >= 2:
        make_axis(name, [first, last])
        raise InputError(
            f"axis {name}: got {first:g}:{last:g} with {points} points; allowed: first < last, 2 points or more"
        )
    make_axis(name, [first, last])
    inner = Axis(name, (first, last)).value(np.linspace(0.0, 1.0, points))[1:-1]
    return make_axis(name, [first, *(float(f"{value:.6g}") for value in inner), last])


def parse_axis(text: str, points: int = POINTS) -> tuple[str, Axis | None]:
    """(name, axis) from ``name=first:last`` (``points`` values), ``name=first:last:step``, ``name=a,b,c`` or ``name``,
    the usual range, None where that is not known before the deployment is (arrival_rate). Hyphens are underscores.

    >>> parse_axis("acceptance-rate=0.5:0.9:0.2")[1].values, parse_axis("hardware=h100,l4")[1].values
    ((0.5, 0.7, 0.9), ('h100', 'l4'))
    """
    name, _, told = text.partition("=")
    name, told = name.strip().replace("-", "_"), told.strip()
    if name == HARDWARE:
        return name, make_axis(name, [part.strip() for part in told.split(",")])
    if not told:
        if name not in NAMES:
            make_axis(name, ())
        default = KINDS[name].default
        return name, None if default is None else spaced(name, *default, points=points)
    numbers = []
    for part in told.replace(",", ":").split(":"):
        try:
            numbers.append(float(part))
        except ValueError:
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            raise InputError(f"axis {name}: got {part.strip()!r}; allowed: NAME=first:last, first:last:step or a,b,c")
    if ":" not in told:
        return name, make_axis(name, numbers)
    if "," in told or len(numbers) not in (2, 3):
        raise InputError(f"axis {name}: got {told!r}; allowed: NAME=first:last, first:last:step or a,b,c")
    if len(numbers) == 2:
        return name, spaced(name, *numbers, points=points)
    first, last, step = numbers
    if not (step > 0 and last > first and (last - first) / step < MOST_VALUES):
        raise InputError(
            f"axis {name}: got {told!r}; allowed: first:last:step with first < last and up to {MOST_VALUES} values"
        )
    count = math.floor((last - first) / step + 1e-9) + 1
    return name, make_axis(name, [round(first + index * step, 12) for index in range(count)])
