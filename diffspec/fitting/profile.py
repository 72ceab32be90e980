"""Profile likelihoods: how well the rows would do with one parameter held elsewhere, all others fitted again.

    rise(v) = min over the others of loss(parameter = v), less its smallest value     [nats]

The parameter's own prior is left out; those of the others stay. Values with a rise below 1.353 (half the 0.9 quantile
of chi-squared with one degree of freedom) are the 90 % likelihood interval. A side on which the rise never gets there
is open: the rows set the parameter no bound. Unlike a standard deviation it shows that rows bound a cost from above
long before they bound it from below. (Pawitan 2001, *In All Likelihood*, sections 2.6 and 3.4.)
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffspec.fitting.objective import Objective
from diffspec.fitting.solve import LANES, Solution, minimise
from diffspec.parameters import get_parameters, parameter_infos, set_parameters, to_constrained, to_unconstrained
from diffspec.results import InputError

RISE = 1.353
"""Half the 0.9 quantile of chi-squared, one degree of freedom [nats]."""
POINTS = 13
WIDEST = 3.0
"""How far from the fitted value the profile goes [prior standard deviations]."""


def profiled_paths(names: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Dotted paths of the parameters asked for, with or without ``step_time.``; ``all`` is every one.

    Errors: :class:`InputError` for an unknown name.
    """
    short = {path.removeprefix("step_time."): path for path in paths}
    chosen = []
    for name in names:
        if name == "all":
            return list(paths)
        path = short.get(name.removeprefix("step_time."))
        if path is None:
            raise InputError(f"profile: got {name!r}; allowed: all, {', '.join(short)}")
        chosen.append(path)
    return chosen


def profile(
    objective: Objective,
    solution: Solution,
    weights: np.ndarray,
    path: str,
    report: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """The profile of one parameter: ``values`` (its unit), ``loss_rise`` [nats] of each (None: no finite fit), and
    the 90 % likelihood interval ``low`` to ``high``, None on an open side.

    The grid is even in the unconstrained coordinate (log or logit), out to WIDEST prior standard deviations, and once
    more between the ends of the interval found, so that sharp parameters are resolved.
    """
    form = objective.form
    index, best = form.paths.index(path), solution.vector[solution.best]
    info = parameter_infos(form.template)[path]
    centre, spread = to_unconstrained(get_parameters(form.template)[path], info), form.spread[index]
    fitted = float(centre + spread * best[index])
    held = dataclasses.replace(form, spread=form.spread.at[index].set(0.0))
    known: dict[float, float] = {}

    def at(place: float, start: np.ndarray) -> np.ndarray:
        """The vector of the best fit with the parameter held at ``place``."""
        template = set_parameters(form.template, {path: to_constrained(jnp.asarray(place), info)})
        there = dataclasses.replace(objective, form=dataclasses.replace(held, template=template))
        start = np.where(np.arange(objective.size) == index, 0.0, start)
        found = minimise(there, np.tile(start, (LANES, 1)), np.tile(weights, (LANES, 1, 1)), 60)
        known[place] = float(found.loss[found.best])
        return found.vector[found.best]

    def walk(places: np.ndarray) -> None:
        """Outwards from the fitted value, each fit from its neighbour's."""
        for side in (places[places >= fitted], places[places < fitted][::-1]):
            vector = best
            for place in side:
                vector = at(float(place), vector)
                if report is not None:
                    report(min(1.0, len(known) / (2 * POINTS)))

    width = WIDEST * float(spread)
    walk(np.linspace(fitted - width, fitted + width, POINTS))
    places, rises = _sorted(known)
    inside = places[rises < RISE]
    step = 2 * width / (POINTS - 1)
    walk(np.linspace(inside[0] - step, inside[-1] + step, POINTS + 2)[1:-1])
    places, rises = _sorted(known)
    low, high = (_crossing(places[::way], rises[::way]) for way in (1, -1))

    def value(place: float | None) -> float | None:
        return None if place is None else float(to_constrained(jnp.asarray(place), info))

    return {
        "values": [value(float(place)) for place in places],
        "loss_rise": [float(rise) if np.isfinite(rise) else None for rise in rises],
        "low": value(low),
        "high": value(high),
    }


def _sorted(known: dict[float, float]) -> tuple[np.ndarray, np.ndarray]:
    places = np.asarray(sorted(known))
    losses = np.asarray([known[place] for place in places])
    return places, np.where(np.isfinite(losses), losses, np.inf) - np.nanmin(losses)


def _crossing(places: np.ndarray, rises: np.ndarray) -> float | None:
    """Where the rise first falls below RISE, coming from outside, between two places by a line; None where it starts
    below. A place without a finite fit is beyond any bound.

    >>> _crossing(np.array([0.0, 1.0, 2.0]), np.array([2.706, 0.0, 3.0]))
    0.5
    >>> _crossing(np.array([0.0, 1.0, 2.0]), np.array([np.inf, 0.0, 3.0]))
    1.0
    """
    first = int(np.argmax(rises < RISE))
    if first == 0:
        return None
    above, below = rises[first - 1], rises[first]
    share = (above - RISE) / (above - below) if np.isfinite(above) else 1.0
    return float(places[first - 1] + share * (places[first] - places[first - 1]))
