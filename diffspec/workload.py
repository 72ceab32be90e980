"""The load a server is under: an open or a closed loop, and the lengths of its requests."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from diffspec.parameters import Scalar
from diffspec.results import InputError


def check_range(
    name: str, value, low: float | int, high: float | int, *, low_open: bool, unit: str, advice: str = ""
) -> None:
    """Raise :class:`InputError` when a concrete number is outside its range, or is none; traced values, arrays of many
    numbers and None (not given) pass unseen."""
    if value is None or isinstance(value, Tracer) or np.ndim(value):
        return
    if not isinstance(value, (int, float)):
        if not hasattr(value, "dtype"):
            raise InputError(f"{name}: got {value!r}; allowed: a number {unit}".rstrip())
        value = float(value)
    inside = (value > low if low_open else value >= low) and value <= high and not math.isnan(value)
    if not inside:
        left = "(" if low_open else "["
        hint = f"; {advice}" if advice else ""
        raise InputError(f"{name}: got {value!r}; allowed: {left}{low:g}, {high:g}] {unit}{hint}")


def as_numbers(name: str, values: Any) -> Float[np.ndarray, "..."]:
    """``values`` as an array of reals; :class:`InputError` where they are none."""
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        raise InputError(f"{name}: got {values!r}; allowed: numbers") from None


def batched(make: Callable, **columns):
    """``make(**row)`` over all rows of equally long columns: one module with a leading axis, for `jax.vmap`."""
    return jax.vmap(lambda row: make(**row))(columns)


def held_tokens(prompt_length, output_length, output_scv):
    """Mean cached tokens [tok] of a request in service, of a ``prompt_length`` and an ``output_length`` [tok] whose
    squared coefficient of variation is ``output_scv`` [1]: long requests are in service for longer.

        held = prompt_length + output_length*(1 + output_scv)/2

    >>> held_tokens(300.0, 200.0, 0.5)
    450.0
    """
    return prompt_length + 0.5 * output_length * (1.0 + output_scv)


class Workload(eqx.Module):
    """Mean load on one deployment, either open loop (``arrival_rate``) or closed loop (``concurrency``).

    * ``prompt_length``, ``output_length``: mean tokens in and out [tok], output_length >= 1.
    * ``arrival_rate``: mean arrivals per second [req/s] of an open loop; ``concurrency``: requests kept in flight
      [req] in a closed loop. Exactly one of the two.
    * ``arrival_scv``: squared coefficient of variation of the gaps between arrivals; 1 for Poisson, 0 for constant.
    * ``output_scv``: the same of output lengths; 0 when every request emits output_length tokens.
    * ``prefix_hit_rate``: share of every prompt that the prefix cache answers, 0 to 1: it is read, not prefilled [1].
    * ``n_requests``: requests of a finite benchmark run that starts empty and drains [req]; None for a steady state.

    Errors: :class:`InputError` when both or neither load is given or a number is out of range.

    >>> Workload(prompt_length=64, output_length=64, arrival_rate=2.0).is_open
    True
    """

    prompt_length: Scalar
    output_length: Scalar
    arrival_rate: Scalar | None = None
    concurrency: Scalar | None = None
    arrival_scv: Scalar = 1.0
    output_scv: Scalar = 0.0
    n_requests: Scalar | None = None
    prefix_hit_rate: Scalar = 0.0

    def __check_init__(self):
        if (self.arrival_rate is None) == (self.concurrency is None):
            got = "neither" if self.arrival_rate is None else "both"
            raise InputError(
                f"a workload needs exactly one of arrival_rate (open loop) and concurrency (closed loop): got {got}"
            )
        check_range("prompt_length", self.prompt_length, 0, 1e8, low_open=True, unit="tok")
        check_range("output_length", self.output_length, 1, 1e8, low_open=False, unit="tok")
        check_range("arrival_rate", self.arrival_rate, 0, 1e9, low_open=True, unit="req/s")
        check_range("concurrency", self.concurrency, 1, 1e9, low_open=False, unit="req")
        check_range("arrival_scv", self.arrival_scv, 0, 1e6, low_open=False, unit="(squared coefficient of variation)")
        check_range("output_scv", self.output_scv, 0, 1e6, low_open=False, unit="(squared coefficient of variation)")
        check_range("prefix_hit_rate", self.prefix_hit_rate, 0, 1, low_open=False, unit="(share of the prompt)")
        check_range("n_requests", self.n_requests, 1, 1e12, low_open=False, unit="req")

    @property
    def held_tokens(self):
        """Mean cached tokens [tok] of a request in service (:func:`held_tokens`)."""
        return held_tokens(self.prompt_length, self.output_length, self.output_scv)

    @property
    def is_open(self) -> bool:
        """True for an open loop (arrival_rate given), False for a closed one (concurrency given)."""
        return self.arrival_rate is not None
