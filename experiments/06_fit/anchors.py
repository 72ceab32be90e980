"""Held-out errors of diffspec beside its anchors: the published forms, a line for each configuration, a linear step
model, and gradient-boosted trees as the black box.

    python experiments/06_fit/anchors.py

needs scikit-learn (``pip install scikit-learn``). Fits the trees to the folds of experiment 01 (a minute); the other
methods are read from its results.json (run that first). Writes anchors.json and anchors.md.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
FIRST = HERE.parent / "01_reproduce_published_form"
ANCHORS = {
    "lines": ("Eq 1",),
    "Eq 3": ("Eq 3",),
    "Eq 3 lengths or Eq 4": ("Eq 3 lengths", "Eq 4"),
    "linear step": ("linear step",),
    "boosted trees": ("boosted trees",),
}
"""Column -> methods of experiment 01, whichever the table has."""
RESAMPLES = 4000


def load_first():
    """The script of experiment 01."""
    spec = importlib.util.spec_from_file_location("experiment_01_run", FIRST / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def features(frame) -> np.ndarray:
    """What a black box may know of a row: kind and log of the load, draft length, tokens per step, lengths."""
    rate, users = (frame[name].to_numpy(float) for name in ("arrival_rate", "concurrency"))
    length = frame["draft_length"].to_numpy(float)
    emitted = np.where(length > 0, frame["tokens_per_step"].to_numpy(float), 1.0)
    lengths = (frame[name].to_numpy(float) for name in ("prompt_length", "output_length"))
    return np.column_stack([np.isnan(rate), np.log(np.where(np.isnan(rate), users, rate)), length, emitted, *lengths])


def trees_error(frame, metric: str, train: np.ndarray, test: np.ndarray) -> tuple[float, int]:
    """(mean |predicted/measured - 1|, rows) of boosted trees on log(metric), scikit-learn's defaults, five seeds."""
    from sklearn.ensemble import GradientBoostingRegressor

    inputs, measured = features(frame), np.log(frame[metric].to_numpy(float))
    known = np.isfinite(measured) & ((metric != "throughput") | frame["concurrency"].notna().to_numpy())
    fitted, scored = train & known, test & known
    errors = []
    for seed in range(5):
        trees = GradientBoostingRegressor(random_state=seed, subsample=0.8).fit(inputs[fitted], measured[fitted])
        errors.append(np.abs(np.exp(trees.predict(inputs[scored]) - measured[scored]) - 1.0))
    return float(np.mean(errors)), int(scored.sum())


def study(first, shared: Path) -> list[dict]:
    """Per table and split, the folds' errors by column; `diffspec`: `auto`, or `roofline` where no form was chosen."""
    results = json.loads((FIRST / "results.json").read_text(encoding="utf-8"))["studies"]
    options = argparse.Namespace(data=HERE.parents[1] / "data", shared=shared, quick=False, auto=False, only=None)
    entries = []
    for plan in first.all_plans(options, (shared / "traces").is_dir()):
        if plan.title.endswith("set aside"):
            continue
        told = {entry["split"]: entry for entry in results[plan.title]}
        for split, folds in plan.splits.items():
            if split == "in sample":
                continue
            found: dict[str, list] = {}
            for fold, scored in zip(folds, told[split]["folds"], strict=True):
                assert fold.label == scored["held_out"]
                scores = scored["scores"]
                for column, methods in ANCHORS.items():
                    one = next(
                        (scores[name][plan.metric] for name in methods if plan.metric in scores.get(name, {})), None
                    )
                    found.setdefault(column, []).append((one["mape"], one["rows"]) if one else None)
                ours = scores.get("auto", scores["roofline"])[plan.metric]
                found.setdefault("diffspec", []).append((ours["mape"], ours["rows"]))
                found["boosted trees"][-1] = trees_error(plan.trace.frame, plan.metric, fold.train, fold.test)
            entries.append({"table": plan.title, "metric": plan.metric, "split": split, "folds": found})
    return entries


def comparisons(entries: list[dict], seed: int = 0) -> dict[str, dict]:
    """Over all folds that an anchor predicts in full: mean error of the anchor and of diffspec, and their ratio with
    its 90 % bootstrap interval over folds."""
    random, found = np.random.default_rng(seed), {}
    for column in ANCHORS:
        pairs = [
            (theirs[0], ours[0], ours[1])
            for entry in entries
            for theirs, ours in zip(entry["folds"][column], entry["folds"]["diffspec"], strict=True)
            if theirs is not None and theirs[1] == ours[1]
        ]
        theirs, ours, rows = np.asarray(pairs).T
        chosen = random.integers(len(pairs), size=(RESAMPLES, len(pairs)))
        ratios = (ours * rows)[chosen].sum(axis=1) / (theirs * rows)[chosen].sum(axis=1)
        low, high = np.quantile(ratios, (0.05, 0.95))
        found[column] = {
            "folds": len(pairs),
            "values": int(rows.sum()),
            "anchor": float(np.average(theirs, weights=rows)),
            "diffspec": float(np.average(ours, weights=rows)),
            "ratio": float((ours * rows).sum() / (theirs * rows).sum()),
            "low": float(low),
            "high": float(high),
        }
    return found


def pooled(folds: list, rows: int) -> str:
    """Mean error over the rows of all folds, or a dash where the anchor does not predict them all."""
    known = [fold for fold in folds if fold is not None]
    if sum(count for _, count in known) < rows:
        return "-"
    return f"{100 * np.average([error for error, _ in known], weights=[count for _, count in known]):.1f}"


def report(results: dict) -> str:
    columns = [*ANCHORS, "diffspec"]
    lines = [
        "# Held-out errors beside the anchors",
        "",
        "`python experiments/06_fit/anchors.py`, on the folds of experiment 01: mean absolute error in percent over "
        "the rows held out; `-`: the anchor does not predict all of them. `lines`: Eq 1, a line for each "
        "configuration. Boosted trees: scikit-learn's GradientBoostingRegressor, its defaults but for subsample 0.8, "
        "mean of five seeds.",
        "",
        f"| table | held out | rows | {' | '.join(columns)} |",
        f"|{'---|' * (len(columns) + 3)}",
    ]
    for entry in results["entries"]:
        rows = sum(count for _, count in entry["folds"]["diffspec"])
        numbers = [pooled(entry["folds"][column], rows) for column in columns]
        lines.append(f"| {entry['table']} | {entry['split']} | {rows} | {' | '.join(numbers)} |")
    lines += [
        "",
        "Over all folds that the anchor predicts in full:",
        "",
        "| anchor | folds | values | its error | diffspec's | ratio (90 % bootstrap interval over folds) |",
        "|---|---|---|---|---|---|",
    ]
    for column, row in results["comparisons"].items():
        ratio = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        errors = f"{100 * row['anchor']:.1f} % | {100 * row['diffspec']:.1f} %"
        lines.append(f"| {column} | {row['folds']} | {row['values']} | {errors} | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=HERE.parents[2] / "shared")
    entries = study(load_first(), parser.parse_args().shared)
    results = {"entries": entries, "comparisons": comparisons(entries)}
    (HERE / "anchors.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (HERE / "anchors.md").write_text(report(results), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
