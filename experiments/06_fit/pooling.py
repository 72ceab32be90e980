"""Held-out errors of small deployments with and without what their siblings know, on a measured vLLM on a CPU.

Run `python experiments/06_fit/pooling.py` (a few minutes). Of every deployment of data/vllm_cpu_steady.csv with 2 to 6
usable rows each row is held out once, the others are fitted, and its ttft and itl are predicted: from the other rows
alone (possible from 4 fitted rows on), from the closest large deployment as it is (0 rows: same verifier), and with the
deployments of 4 rows or more but this one as siblings, by verifier and by hardware. Errors are means of
|log(predicted/measured)|.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from diffspec.cli.prepare import prepare_jax

prepare_jax()

from diffspec import fit, read_trace  # noqa: E402
from diffspec.fitting.deployment import FittedModel  # noqa: E402
from diffspec.fitting.evaluate import predict_trace  # noqa: E402
from diffspec.results import InputError  # noqa: E402

HERE = Path(__file__).resolve().parent
TABLE = HERE.parents[1] / "data" / "vllm_cpu_steady.csv"
COLUMNS = ("ttft_mean", "itl_mean")
MOST, LEAST = 6, 4
WAYS = ("alone", "sibling as it is", "pool verifier", "pool hardware")


def errors_of(deployment, frame) -> list[float]:
    """|log(predicted/measured)| of the rows, ttft and itl."""
    scored = predict_trace(deployment, frame, with_intervals=False)
    return [float(abs(np.log(scored.predicted[name][0] / scored.measured[name][0]))) for name in COLUMNS]


def fitted_or_none(trace, **options):
    """A fit, or None where it has too few rows or no sibling."""
    try:
        return fit(trace, uncertainty="laplace", **options).deployment()
    except InputError:
        return None


def held_out(trace, name: str, known: FittedModel, step_time: str) -> dict[str, list[list[float]]]:
    """Errors of every row of one deployment, by way."""
    rows = trace.where(f"deployment == '{name}'")
    verifier = rows.frame["verifier"].iloc[0]
    others = {key: sibling for key, sibling in known.deployments.items() if key != name}
    prior = FittedModel(others, "", {})
    same = [sibling for sibling in others.values() if sibling.defaults.get("verifier") == verifier]
    largest = max(same, key=lambda sibling: sibling.quality["rows"], default=None)
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for row in range(len(rows)):
        kept = rows.frame.index != row
        few = type(rows)(rows.frame[kept].reset_index(drop=True))
        one = rows.frame[~kept].reset_index(drop=True)
        ways = {"alone": fitted_or_none(few, step_time=step_time) if len(few) >= LEAST else None}
        ways["sibling as it is"] = largest
        for pool in ("verifier", "hardware"):
            ways[f"pool {pool}"] = fitted_or_none(few, step_time=step_time, prior=prior, pool=pool)
        for way, deployment in ways.items():
            if deployment is not None:
                found[way].append(errors_of(deployment, one))
    return found


def told(results: dict) -> str:
    """The table in Markdown."""
    lines = ["| deployment | rows | " + " | ".join(f"{way}: ttft, itl" for way in WAYS) + " |", "|---" * 6 + "|"]
    for name, entry in results.items():
        cells = [
            "-" if entry[way] is None else ", ".join(f"{100 * value:.1f} %" for value in entry[way]) for way in WAYS
        ]
        lines.append(f"| {name} | {entry['rows']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--step-time", default="affine")
    options = parser.parse_args()
    started, trace = time.time(), read_trace(TABLE)
    counts = trace.frame["deployment"].value_counts()
    large = [str(name) for name, count in counts.items() if count >= LEAST]
    known = fit(trace.where(" or ".join(f"deployment == '{name}'" for name in large)), step_time=options.step_time,
                uncertainty="laplace")  # fmt: skip
    print(f"siblings fitted: {', '.join(known.deployments)} ({time.time() - started:.0f} s)", flush=True)
    results, all_errors = {}, {way: [] for way in WAYS}
    for name in sorted(str(name) for name, count in counts.items() if 2 <= count <= MOST):
        found = held_out(trace, name, known, options.step_time)
        means = {way: np.mean(part, axis=0).tolist() if part else None for way, part in found.items()}
        results[name] = {"rows": int(counts[name])} | means
        for way, part in found.items():
            all_errors[way] += part
        print(name, means, flush=True)
    rows = max(len(part) for part in all_errors.values())
    results["all"] = {"rows": rows} | {
        way: np.mean(part, axis=0).tolist() if len(part) == rows else None for way, part in all_errors.items()
    }
    (options.out / "pooling.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.out / "pooling.md").write_text(
        f"# Held-out errors with and without pooling\n\n`python experiments/06_fit/pooling.py`, step time "
        f"{options.step_time}; mean |log(predicted/measured)| of rows left out one by one.\n\n{told(results)}\n",
        encoding="utf-8",
    )
    print(told(results), f"\n{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
