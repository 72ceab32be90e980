"""Mergeable sketches side by side: error of percentiles, whether the order of merging matters, time, and size.

Run `python experiments/09_speed/sketches.py` where diffspec[scale], `datasketches` and `crick` are installed (the last
two are no dependencies). Fifty parts of twenty thousand *synthetic* latencies (gamma) are sketched apart and merged in
order and in reverse; the truth is that of all of them.
"""

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crick
import datasketches
import numpy as np

from diffspec.traces.sketch import LatencySketch

HERE = Path(__file__).resolve().parent
SHARES = [0.5, 0.9, 0.95, 0.99]
PARTS, SIZE = 50, 20_000


def filled(sketch: Any, add: str = "update") -> Callable[[np.ndarray], Any]:
    """Makes a sketch of a part."""

    def make(values: np.ndarray) -> Any:
        made = sketch()
        getattr(made, add)(values)
        return made

    return make


KINDS: dict[str, tuple[Callable[[np.ndarray], Any], Callable[[Any], list[float]], Callable[[Any], bytes]]] = {
    "DDSketch 0.2 % (ddsketch, filled by bin)": (
        filled(LatencySketch, "add"),
        lambda sketch: sketch.percentiles(SHARES),
        pickle.dumps,
    ),
    "t-digest 200 (datasketches)": (
        filled(lambda: datasketches.tdigest_double(200)),
        lambda sketch: [sketch.get_quantile(share) for share in SHARES],
        lambda sketch: sketch.serialize(),
    ),
    "KLL 800 (datasketches)": (
        filled(lambda: datasketches.kll_doubles_sketch(800)),
        lambda sketch: [sketch.get_quantile(share) for share in SHARES],
        lambda sketch: sketch.serialize(),
    ),
    "t-digest 100 (crick)": (
        filled(crick.TDigest),
        lambda sketch: [sketch.quantile(share) for share in SHARES],
        pickle.dumps,
    ),
}


def main() -> None:
    random = np.random.default_rng(0)
    parts = [random.gamma(4.0, 0.5, SIZE) for _ in range(PARTS)]
    truth = np.quantile(np.concatenate(parts), SHARES)
    report: dict[str, Any] = {}
    for name, (make, percentiles, as_bytes) in KINDS.items():
        found = []
        for order in (parts, parts[::-1]):
            start = time.perf_counter()
            made = [make(part) for part in order]
            sizes = [len(as_bytes(sketch)) for sketch in made]  # a sketch of ours counts what it holds when it is sent
            seconds = (time.perf_counter() - start) / PARTS
            for other in made[1:]:
                made[0].merge(other)
            found.append(np.array(percentiles(made[0])))
        report[name] = {
            "largest_error": float(np.abs(found[0] / truth - 1).max()),
            "change_with_order": float(np.abs(found[1] / found[0] - 1).max()),
            "milliseconds_a_part": 1e3 * seconds,
            "bytes_a_part": sizes[0],
        }
        print(name, report[name])
    (HERE / "sketches.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
