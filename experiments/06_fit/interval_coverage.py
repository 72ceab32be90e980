"""How often 90 % intervals hold values that were not fitted, pooled over every measured table.

    python experiments/06_fit/interval_coverage.py

reads the folds of experiments/01_reproduce_published_form/results.json (run that first), where each group of rows was
left out, the rest fitted with the defaults, and the group's values predicted with intervals. Writes
interval_coverage.json and interval_coverage.md. The interval of a coverage is a bootstrap over folds: values of one
fold share a fit and stand together.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
FOLDS = HERE.parent / "01_reproduce_published_form" / "results.json"
OBSERVABLES = ("ttft_mean", "itl_mean", "e2e_mean", "ttft_p50", "tpot_p50", "throughput")
"""Scored where measured; tpot and itl of one run are the same to a few per cent, so only one of them counts."""
RESAMPLES = 4000


class Held(NamedTuple):
    """One observable of one fold: values held out, how many were inside, mean width log(high/low) and interval score
    (in log units, too)."""

    table: str
    split: str
    fold: int
    observable: str
    rows: int
    inside: float
    width: float
    score: float


def held_out(studies: dict) -> Iterator[Held]:
    """Every held-out observable of `auto`, or of `roofline` where no form was chosen in the folds; tables with the rows
    that are set aside are left out."""
    for title, entries in studies.items():
        if title.endswith("set aside"):
            continue
        for entry in entries:
            if entry["split"] == "in sample":
                continue
            for number, fold in enumerate(entry["folds"]):
                scores = fold["scores"].get("auto", fold["scores"]["roofline"])
                for name in OBSERVABLES:
                    told = scores.get(name, {})
                    if told.get("coverage") is not None and not (name == "tpot_p50" and "itl_mean" in scores):
                        rows = told["rows"]
                        numbers = (rows, told["coverage"] * rows, told["interval_width"], told["interval_score"])
                        yield Held(title, entry["split"], number, name, *numbers)


def pooled(held: Iterable[Held], seed: int = 0) -> dict:
    """Coverage over all values with its 90 % bootstrap interval, mean width and mean interval score."""
    folds: dict[tuple, list[Held]] = {}
    for each in held:
        folds.setdefault((each.table, each.split, each.fold), []).append(each)
    counts = np.asarray(
        [[sum(each.rows for each in fold), sum(each.inside for each in fold)] for fold in folds.values()]
    )
    chosen = np.random.default_rng(seed).integers(len(counts), size=(RESAMPLES, len(counts)))
    resampled = counts[chosen].sum(axis=1)
    low, high = np.quantile(resampled[:, 1] / resampled[:, 0], (0.05, 0.95))
    every = [each for fold in folds.values() for each in fold]
    weights = [each.rows for each in every]
    return {
        "values": int(counts[:, 0].sum()),
        "folds": len(counts),
        "coverage": float(counts[:, 1].sum() / counts[:, 0].sum()),
        "low": float(low),
        "high": float(high),
        "width": float(np.average([each.width for each in every], weights=weights)),
        "score": float(np.average([each.score for each in every], weights=weights)),
    }


def study(studies: dict) -> dict:
    every = list(held_out(studies))
    groups = {"all": every}
    for name, of in (("table", "table"), ("held out", "split"), ("observable", "observable")):
        for value in dict.fromkeys(getattr(each, of) for each in every):
            groups[f"{name}: {value}"] = [each for each in every if getattr(each, of) == value]
    return {name: pooled(group) for name, group in groups.items()}


def report(results: dict) -> str:
    lines = [
        "# Coverage of 90 % intervals on rows that were not fitted",
        "",
        "`python experiments/06_fit/interval_coverage.py`, from the folds of experiment 01. In brackets the 90 % "
        "bootstrap interval over folds. Width: mean of log(high/low); interval score: the width plus 20 times the "
        "miss, in log units. A row stands in several splits of its table.",
        "",
        "| | values | folds | coverage | width | interval score |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        inside = f"{100 * row['coverage']:.0f} % ({100 * row['low']:.0f} to {100 * row['high']:.0f})"
        numbers = (f"{row[key]:.2f}" for key in ("width", "score"))
        lines.append(f"| {name} | {row['values']} | {row['folds']} | {inside} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    results = study(json.loads(FOLDS.read_text(encoding="utf-8"))["studies"])
    (HERE / "interval_coverage.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (HERE / "interval_coverage.md").write_text(report(results), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
