"""What holds a server back, in words with their numbers: its largest stage, and what halving each cost would save.

A saving is the metric at half the parameter, the whole equilibrium solved again: not the elasticity, which holds only
for small changes.
"""

from typing import Any

import numpy as np

from diffspec.analysis.inputs import Point
from diffspec.analysis.intervals import spread
from diffspec.analysis.metrics import values_at
from diffspec.analysis.plain import finite
from diffspec.analysis.sensitivity import Slopes, each_point
from diffspec.prediction import STAGES
from diffspec.results import RESULTS
from diffspec.serving import ServingModel

STAGE_WORDS = {
    "waiting": "waiting for a place",
    "prefill": "prefill",
    "draft": "drafting",
    "verify": "verification",
    "overhead": "overhead",
}
FACTORS = tuple(float(f) for f in 2.0 ** np.linspace(-1.0, 1.0, 9))
SAID = 3


def halved(slopes: Slopes, models: ServingModel | None = None) -> list[dict[str, Any]]:
    """The metric at half of each parameter above 0, largest change first: ``[{"name", "value", "change",
    "interval"}]``, change = value/now - 1 (None where either has none); ``interval``: that of the change over a batch
    of ``models``, each halved from where it stands (None without, and for percentiles and roots, which take their
    time)."""
    places = np.array(
        [i for i, kind in enumerate(slopes.inputs.kinds) if kind == "parameter" and slopes.at[i] > 0], int
    )

    def changes(point: Point) -> tuple[np.ndarray, np.ndarray]:
        lanes = np.tile(slopes.inputs.values(point), (len(places) + 1, 1))
        lanes[np.arange(len(places)), places] *= 0.5
        found, _ = values_at(slopes.metric, slopes.inputs, point, lanes)
        there = np.isfinite(found) & (np.abs(found) < 1e12)
        with np.errstate(all="ignore"):
            return found[:-1], np.where(there[:-1] & there[-1] & (found[-1] > 0), found[:-1] / found[-1] - 1.0, np.nan)

    values, now = changes(slopes.point)
    drawn = None
    if models is not None and slopes.metric.family == "means":
        drawn = np.array([changes(point)[1] for point in each_point(models, slopes)])
    rows = [
        {
            "name": slopes.inputs.names[place],
            "value": finite(value),
            "change": finite(change),
            "interval": None if drawn is None else spread(drawn[:, column]),
        }
        for column, (place, value, change) in enumerate(zip(places, values, now, strict=True))
    ]
    rows.sort(key=lambda row: -abs(row["change"] or 0.0))
    return rows


def spider(slopes: Slopes, most: int = 6) -> dict[str, Any]:
    """The metric with each of the ``most`` parameters of largest elasticity scaled by ``factors`` from 0.5 to 2:
    ``{"factors", "lines": [{"name", "values"}]}``; None where a value lies outside its range or the metric is not
    there, and for latencies where the server saturates."""
    size = np.nan_to_num(np.abs(slopes.elasticities))
    places = [i for i in np.argsort(-size) if slopes.inputs.kinds[i] == "parameter" and size[i] > 0][:most]
    lanes = np.tile(slopes.at, (len(places) * len(FACTORS), 1))
    low, high = slopes.inputs.allowed(slopes.point)
    outside = np.zeros(len(lanes), dtype=bool)
    for number, place in enumerate(places):
        rows = slice(number * len(FACTORS), (number + 1) * len(FACTORS))
        lanes[rows, place] *= FACTORS
        outside[rows] = (lanes[rows, place] < low[place]) | (lanes[rows, place] > high[place])
    lines = []
    if places:
        asked = (slopes.metric, slopes.inputs, slopes.point)
        found, used = values_at(*asked, lanes)
        if slopes.metric.family in ("means", "percentiles") and slopes.metric.name not in ("capacity", "utilization"):
            outside |= used >= 1.0
        values = np.where(outside, np.nan, found).reshape(len(places), len(FACTORS))
        for place, line in zip(places, values, strict=True):
            lines.append({"name": slopes.inputs.names[place], "values": [finite(value) for value in line]})
    return {"factors": list(FACTORS), "lines": lines}


def explanation(slopes: Slopes, savings: list[dict[str, Any]]) -> list[str]:
    """Sentences computed from the numbers: where the latency goes, how full the server is, what halving costs saves,
    and which field of the workload or configuration matters most."""
    prediction, workload = slopes.prediction, slopes.point.workload
    rate, in_flight = workload.arrival_rate, workload.concurrency
    load = f"{float(np.asarray(in_flight)):g} in flight" if rate is None else f"{float(rate):g} req/s"
    if bool(prediction.result == RESULTS.saturated):
        return [f"at {load} the server is saturated: it sustains {float(prediction.capacity):.3g} req/s"]
    parts = {
        (stage, kind): float(getattr(prediction.decomposition[stage], f"load_{kind}"))
        for stage in STAGES
        for kind in ("dependent", "independent")
    }
    whole = float(prediction.e2e_latency)
    (stage, kind), largest = max(parts.items(), key=lambda item: item[1])
    dependent = sum(value for (_, of), value in parts.items() if of == "dependent")
    said = [
        f"at {load} {_percent(largest / whole)} of end-to-end latency ({1000 * whole:.0f} ms) is load-{kind} "
        f"{STAGE_WORDS[stage]}; {_percent(dependent / whole)} in all comes from load"
    ]
    if finite(prediction.capacity) is not None:
        used, sustained = _percent(float(prediction.utilization)), float(prediction.capacity)
        said.append(f"{used} of what it sustains, {sustained:.3g} req/s, is used")
    if not slopes.moves:
        return said
    name = slopes.metric.name
    for row in [row for row in savings if row["change"] is not None and abs(row["change"]) >= 5e-3][:SAID]:
        verb = "lowers" if row["change"] < 0 else "raises"
        said.append(f"halving {row['name']} {verb} {name} by {_percent(abs(row['change']))}{_between(row)}")
    fields = [i for i, kind in enumerate(slopes.inputs.kinds) if kind != "parameter"]
    sizes = np.nan_to_num(np.abs(slopes.elasticities))[fields]
    if sizes.size and sizes.max() > 0:
        place = fields[int(np.argmax(sizes))]
        slope = slopes.elasticities[place]
        more = "more" if slope > 0 else "less"
        said.append(f"1 % more {slopes.inputs.names[place]} gives {abs(slope):.2g} % {more} {name}")
    return said


def _between(row: dict[str, Any]) -> str:
    edges = row.get("interval")
    if edges is None or edges["low"] is None or edges["high"] is None:
        return ""
    ends = (edges["low"], edges["high"])
    if ends[0] * ends[1] < 0:
        return f" ({_percent(ends[0])} to {_percent(ends[1])} over the draws)"
    low, high = sorted(map(abs, ends))
    return f" ({_percent(low)} to {_percent(high)} over the draws)"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
