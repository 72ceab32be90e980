"""Checks between the cells of a row, and between the rows of a table: load, percentiles, speculation, units.

A wrong unit rarely leaves the plausible range of one column, but it breaks an identity that every measurement obeys:

* ``e2e_mean = ttft_mean + tpot_mean*(output_length - 1)``, and ttft is part of e2e;
* itl is one engine step and tpot a token of it: ``itl/tpot`` lies near the tokens per step;
* in a closed loop ``throughput*e2e_mean = concurrency``; in any run ``e2e_mean`` cannot far exceed the whole duration
  ``n_requests/throughput``.

A quotient beyond 30 (100 for itl/tpot) that a factor of 1000 on one column mends is reported as that column's unit.
"""

import math

import numpy as np

from .problems import Problem
from .schema import METRICS, OBSERVABLES, PERCENTILES, column
from .sheet import Sheet

MILLISECONDS = "perhaps milliseconds: divide by 1000"
FITTING = "seconds that fit the other columns"
# A table in which every gap between tokens is longer than this [s] is taken for one in milliseconds, unless Little's
# law in a closed loop shows that it is not.
LONG_GAP = 1.0
SHORTEST = 1e-9  # [s] below this a quotient says nothing


@np.errstate(all="ignore")  # bad cells take part and are masked afterwards
def check_rows(sheet: Sheet) -> None:
    """Add the problems of single rows to `sheet`."""
    _load(sheet)
    _shape(sheet)
    _speculation(sheet)
    _percentiles(sheet)
    _observed(sheet)
    _times(sheet)
    _little(sheet)


def _load(sheet: Sheet) -> None:
    rate, users = sheet.given["arrival_rate"], sheet.given["concurrency"]
    sheet.flag(
        rate & users & ~sheet.bad["arrival_rate"],
        "arrival_rate",
        "both arrival_rate and concurrency are set",
        "exactly one of them",
        "keep arrival_rate for an open loop, concurrency for a closed one",
    )
    sheet.flag(
        ~rate & ~users,
        "arrival_rate",
        "neither arrival_rate nor concurrency is set",
        "exactly one of them",
        "arrival_rate [req/s] for an open loop, concurrency [req] for a closed one",
    )
    process = np.array([text or "" for text in sheet.texts["arrival_process"]], dtype=object)
    scv = sheet.numbers["arrival_scv"]
    for name, value in (("poisson", 1.0), ("constant", 0.0)):
        wrong = (process == name) & sheet.usable("arrival_scv") & (np.abs(scv - value) > 1e-6)
        sheet.flag(wrong, "arrival_scv", f"does not fit {name} arrivals", f"{value:g}", "or call the process gamma")
    routed = sheet.usable("num_experts", "experts_per_token")
    routed &= sheet.numbers["experts_per_token"] > sheet.numbers["num_experts"]
    sheet.flag(routed, "experts_per_token", allowed="at most num_experts")


def _shape(sheet: Sheet) -> None:
    for name in ("prompt_length", "output_length"):
        sheet.flag(~sheet.given[name], name, "the value is missing", column(name).allowed)


def _speculation(sheet: Sheet) -> None:
    length, method = sheet.numbers["draft_length"], sheet.texts["method"]
    sheet.flag(
        ~sheet.given["draft_length"],
        "draft_length",
        "the value is missing",
        "tokens drafted per step, 0 for none",
        "give it by a column or 'diffspec import --set draft_length=K'",
    )
    none = np.array([text == "none" for text in method], bool)
    sheet.flag(
        none & sheet.usable("draft_length") & (length > 0), "draft_length", "tokens are drafted by method 'none'", "0"
    )
    known = sheet.usable("draft_length", "tokens_per_step")
    for index in np.flatnonzero(known & (sheet.numbers["tokens_per_step"] > (length + 1) * (1 + 1e-9))):
        got, most = sheet.numbers["tokens_per_step"][index], length[index] + 1
        advice = "it cannot exceed draft_length + 1" if most > 1 else "without drafting it is 1: set draft_length"
        sheet.flag_one(int(index), "tokens_per_step", "", float(got), f"1 to {most:g}", advice)
    for index in np.flatnonzero(sheet.usable("draft_length", "position_acceptance")):
        positions, drafted = len(sheet.lists["position_acceptance"][index] or ()), length[index]
        if positions > drafted or (positions < drafted and method[index] != "tree"):
            message, allowed = f"{positions} positions for draft_length {drafted:g}", f"{drafted:g} numbers"
            sheet.flag_one(int(index), "position_acceptance", message, allowed=allowed)


def _percentiles(sheet: Sheet) -> None:
    for metric in METRICS:
        last = np.full(sheet.size, -math.inf)
        last_name = np.full(sheet.size, "", dtype=object)
        for percentile in PERCENTILES:
            name = f"{metric}_{percentile}"
            values, usable = sheet.numbers[name], sheet.usable(name)
            for index in np.flatnonzero(usable & (values < last * (1 - 1e-9))):
                allowed = f"at least {last_name[index]} = {last[index]:g}"
                advice = MILLISECONDS if last[index] > 100 * values[index] else "percentiles must not decrease"
                sheet.flag_one(int(index), name, "percentiles out of order", float(values[index]), allowed, advice)
            last, last_name = np.where(usable, values, last), np.where(usable, name, last_name)
            _markov(sheet, metric, name)


def _markov(sheet: Sheet, metric: str, name: str) -> None:
    """A share 1-q of all values is at least the percentile, so the percentile is at most mean/(1-q)."""
    mean, values = sheet.numbers[f"{metric}_mean"], sheet.numbers[name]
    most = mean / (1 - int(name[-2:]) / 100)
    usable = sheet.usable(f"{metric}_mean", name)
    for index in np.flatnonzero(usable & (values > 1.05 * most)):
        allowed = f"at most {most[index]:.4g} with this {metric}_mean"
        sheet.flag_one(int(index), name, "", float(values[index]), allowed, MILLISECONDS)
    if name.endswith("p99"):
        for index in np.flatnonzero(usable & (mean > 100 * values) & (values > 0)):
            _blame(sheet, int(index), metric, f"over 100 times {name}")


def _observed(sheet: Sheet) -> None:
    seen = np.zeros(sheet.size, bool)
    for name in OBSERVABLES:
        seen |= sheet.given[name]
    for index in np.flatnonzero(~seen & sheet.live):
        allowed = "one of ttft_*, itl_*, tpot_*, e2e_* [s] or throughput [req/s]"
        place = sheet.files[index], int(sheet.rows[index])
        sheet.problems.append(Problem("nothing observed in this row", *place, None, None, allowed))


def _blame(sheet: Sheet, index: int, metric: str, message: str) -> None:
    name = f"{metric}_mean" if sheet.given[f"{metric}_mean"][index] else f"{metric}_p50"
    if not sheet.bad[name][index]:
        sheet.flag_one(index, name, message, float(sheet.numbers[name][index]), FITTING, MILLISECONDS)


def _times(sheet: Sheet) -> None:
    """Name the latency whose unit differs from the others' in one row."""
    ttft, tpot, itl, e2e = (sheet.typical(metric)[0] for metric in ("ttft", "tpot", "itl", "e2e"))
    more = np.where(sheet.bad["output_length"], math.nan, sheet.numbers["output_length"]) - 1
    emitted = np.where(sheet.usable("tokens_per_step"), sheet.numbers["tokens_per_step"], math.nan)
    emitted = np.where(np.isnan(emitted), np.sqrt(np.maximum(sheet.numbers["draft_length"], 0) + 1), emitted)
    for index in map(int, np.flatnonzero(sheet.live)):
        first, token, gap, whole = (
            float(value) if value > SHORTEST else math.nan
            for value in (ttft[index], tpot[index], itl[index], e2e[index])
        )
        count = float(more[index])
        if first > 0 and token > 0 and whole > 0 and count > 0:
            _blame_part(sheet, index, first, token * count, whole)
        elif first > 0 and whole > 0 and first > 30 * whole:
            _blame(sheet, index, "ttft", "longer than the whole request (e2e)")
        if gap > 0 and token > 0:
            quotient = gap / (token * float(emitted[index]))
            if quotient > 100:
                _blame(sheet, index, "itl", f"{quotient:.0f} times what tpot allows")
            elif quotient < 0.01:
                _blame(sheet, index, "tpot", f"{1 / quotient:.0f} times what itl allows")


def _blame_part(sheet: Sheet, index: int, first: float, decode: float, whole: float) -> None:
    def miss(a: float, b: float, c: float) -> float:
        return abs(math.log(c / (a + b)))

    if miss(first, decode, whole) < math.log(30) and first <= 3 * whole:
        return
    mended = {
        "e2e": miss(first, decode, whole / 1000),
        "ttft": miss(first / 1000, decode, whole),
        "tpot": miss(first, decode / 1000, whole),
    }
    metric = min(mended, key=lambda name: mended[name])
    if mended[metric] < math.log(2):
        _blame(sheet, index, metric, "does not fit e2e = ttft + tpot*(output_length - 1)")


def _little(sheet: Sheet) -> None:
    """Little's law and the duration of the run, where a factor of 1000 or tokens for requests shows."""
    throughput, users = sheet.numbers["throughput"], sheet.numbers["concurrency"]
    e2e, from_median = sheet.typical("e2e")
    e2e = np.where(from_median & sheet.bad["e2e_mean"], math.nan, e2e)
    length, count = sheet.numbers["output_length"], sheet.numbers["n_requests"]
    rate = np.where(sheet.bad["arrival_rate"], math.nan, sheet.numbers["arrival_rate"])
    held = np.where(sheet.usable("throughput", "concurrency"), throughput * e2e / users, math.nan)
    served = np.where(sheet.usable("throughput", "arrival_rate"), throughput / rate, math.nan)
    span = np.where(sheet.usable("throughput", "n_requests"), throughput * e2e / count, math.nan)
    tokens = (np.abs(np.log(held / length)) < 0.4) & (length > 8) & (held > 5)
    tokens |= (np.abs(np.log(served / length)) < 0.4) & (length > 8) & (served > 5)
    # The whole duration, n_requests/throughput, holds every request; 10 allows for short windows.
    slow = ((held > 100) & (held < 3000)) | ((span > 10) & np.isnan(held))
    tokens &= ~((held > 500) & (length > 500))
    sheet.flag(tokens, "throughput", "more than the load can give", "requests per second", "perhaps tokens per second")
    for index in np.flatnonzero(slow & ~tokens & sheet.live):
        _blame(sheet, int(index), "e2e", "far longer than throughput allows (Little's law)")


@np.errstate(all="ignore")
def check_units_of_table(sheet: Sheet, file: str | None) -> list[Problem]:
    """A table that is in milliseconds throughout: every gap between tokens above 1 s, every row too slow."""
    gaps = {name: sheet.numbers[f"{name}_mean"] for name in ("itl", "tpot")}
    gaps = {name: np.where(np.isnan(mean), sheet.numbers[f"{name}_p50"], mean) for name, mean in gaps.items()}
    slow = np.fmin(gaps["itl"], gaps["tpot"])
    seen = ~np.isnan(slow) & sheet.live
    if not seen.any() or not (slow[seen] > LONG_GAP).all():
        return []
    e2e = sheet.numbers["e2e_mean"]
    held = sheet.numbers["throughput"] * e2e / sheet.numbers["concurrency"]
    if ((held > 0.3) & (held < 3))[seen].any():
        return []
    name = "itl_mean" if not np.isnan(gaps["itl"][seen]).all() else "tpot_mean"
    least = float(slow[seen].min())
    allowed = f"seconds; a table whose every gap between tokens is above {LONG_GAP:g} s is not believed"
    return [Problem("every gap between tokens is very long", file, None, name, least, allowed, MILLISECONDS)]
