"""Fitted parameters: declared once with unit and range, moved between physical values and unconstrained reals.

On paper a parameter lives on (0, inf) or on an interval; in code an optimiser wants the whole real line.

| range        | value -> coordinate              | coordinate -> value          |
|--------------|----------------------------------|------------------------------|
| (0, inf)     | log(value)                       | exp(coordinate)              |
| (low, high)  | logit((value-low)/(high-low))    | low + (high-low)*sigmoid(c)  |

A parameter whose value is exactly at the low end is *switched off*: it stays there and is not fitted.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping

if TYPE_CHECKING:
    Scalar = Any  # a number or a scalar array; checkers know no numeric tower that holds both
else:
    Scalar = jaxtyping.ScalarLike


class ParameterInfo(NamedTuple):
    """What is known of one declared parameter: name, unit, range and meaning."""

    name: str
    unit: str
    low: float
    high: float
    meaning: str


def parameter(default: Any = dataclasses.MISSING, *, unit: str, meaning: str, low: float = 0.0, high: float = math.inf):
    """Declare a fitted field of an equinox module with its unit, open range (low, high) and meaning."""
    metadata = {"parameter": ParameterInfo("", unit, low, high, meaning)}
    if default is dataclasses.MISSING:
        return eqx.field(metadata=metadata)
    return eqx.field(default=default, metadata=metadata)


def parameter_infos(module: eqx.Module) -> dict[str, ParameterInfo]:
    """The declared parameters of ``module``, its nested modules included, by dotted path, in declaration order."""
    found: dict[str, ParameterInfo] = {}
    for field in dataclasses.fields(module):  # type: ignore[arg-type]
        value = getattr(module, field.name)
        if "parameter" in field.metadata:
            found[field.name] = field.metadata["parameter"]._replace(name=field.name)
        elif isinstance(value, eqx.Module):
            found |= {f"{field.name}.{path}": info for path, info in parameter_infos(value).items()}
    return found


def get_parameters(module: eqx.Module) -> dict[str, Any]:
    """Values of the declared parameters by dotted path."""
    return {path: _get(module, path) for path in parameter_infos(module)}


def set_parameters(module, values: dict[str, Any]):
    """A copy of ``module`` with the named parameters replaced."""
    paths = list(values)
    if not paths:
        return module
    return eqx.tree_at(lambda m: [_get(m, path) for path in paths], module, [values[path] for path in paths])


def _get(module, path: str):
    for part in path.split("."):
        module = getattr(module, part)
    return module


def to_unconstrained(value, info: ParameterInfo):
    """Coordinate on the real line of a value inside (low, high); see the table of the module."""
    value = jnp.asarray(value, dtype=float)
    if math.isinf(info.high):
        return jnp.log(value - info.low)
    share = (value - info.low) / (info.high - info.low)
    return jnp.log(share) - jnp.log1p(-share)


def to_constrained(coordinate, info: ParameterInfo):
    """Value inside (low, high) of a coordinate on the real line; the inverse of :func:`to_unconstrained`."""
    if math.isinf(info.high):
        return info.low + jnp.exp(coordinate)
    return info.low + (info.high - info.low) * jax.nn.sigmoid(coordinate)
