"""The published latency forms beside diffspec, in sample and held out, on measured runs.

    python experiments/01_reproduce_published_form/run.py

writes results.json and the tables of README.md into this folder (``--out``: another). The public GPU measurements are
read from ``--shared``, by default the folder ``shared`` beside the repository; where they are absent their tables are
left out. ``--quick`` runs a small part. ``--auto`` chooses the form anew in every fold too (slow).
"""

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

import diffspec  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import baselines  # noqa: E402
import shared_traces  # noqa: E402
import tables  # noqa: E402

DENSE = ("Eq 1", "Eq 3", "linear step")
DENSE_LENGTHS = ("Eq 1", "Eq 3", "Eq 3 lengths", "linear step")
EXPERTS = ("Eq 1", "Eq 3", "Eq 4", "linear step")
LATENCIES = ("ttft_", "itl_", "tpot_", "e2e_", "throughput", "effective_batch_size")
DIGITALOCEAN = {
    "short chats": "phase0/20260224-185458",
    "conversations": "phase1-baseline-rerun",
    "conversations, larger batches allowed": "phase1-aggressive",
}
CLOCK = time.monotonic()


class Plan(NamedTuple):
    """One table: its title, rows, what is scored, the splits, the published forms, diffspec's forms, whether `auto` is
    one of them, and whether in every fold."""

    title: str
    trace: diffspec.Trace
    metric: str
    splits: dict[str, list["Fold"]]
    forms: tuple[str, ...]
    ours: tuple[str, ...]
    auto: bool = False
    folded_auto: bool = False


class Fold(NamedTuple):
    """Which rows are fitted and which are scored."""

    label: str
    train: np.ndarray
    test: np.ndarray


def tell(text: str) -> None:
    print(f"[{time.monotonic() - CLOCK:5.0f} s] {text}", file=sys.stderr, flush=True)


def only(trace: diffspec.Trace, mask: np.ndarray) -> diffspec.Trace:
    """The trace with the measured latencies of the other rows taken away. The rows themselves stay, with nothing to
    fit or to score in them, so that all folds have one shape and compile once."""
    frame = trace.frame.copy()
    columns = [name for name in frame.columns if name.startswith(LATENCIES)]
    frame.loc[~mask, columns] = np.nan
    return replace(trace, frame=frame)


def stationary(trace: diffspec.Trace) -> diffspec.Trace:
    """The rows that diffspec does not set aside."""
    kept = np.asarray(diffspec.check(trace).stationary)
    return replace(trace, frame=trace.frame[kept].reset_index(drop=True))


def everything(trace: diffspec.Trace) -> list[Fold]:
    rows = np.ones(len(trace), dtype=bool)
    return [Fold("all", rows, rows)]


def leave_out(values: Iterable, name: str) -> list[Fold]:
    """One fold for each value: its rows are scored, the others fitted. Missing values are never held out."""
    values = list(values)
    levels = sorted({value for value in values if value == value and value is not None})
    tests = [np.asarray([value == level for value in values]) for level in levels]
    return [Fold(f"{name} {level}", ~test, test) for level, test in zip(levels, tests, strict=True) if not test.all()]


def by_rate(trace):
    return leave_out(trace.frame["arrival_rate"].tolist(), "arrival_rate")


def by_concurrency(trace):
    return leave_out(trace.frame["concurrency"].tolist(), "concurrency")


def by_draft_length(trace):
    return leave_out(trace.frame["draft_length"].tolist(), "draft_length")


def by_lengths(trace):
    pairs = zip(trace.frame["prompt_length"], trace.frame["output_length"], strict=True)
    return leave_out([f"{prompt:g}+{output:g}" for prompt, output in pairs], "lengths")


def by_acceptance(trace):
    drafted = trace.frame["draft_length"].to_numpy() > 0
    groups = baselines.rows_of(trace.frame).group
    return leave_out([str(group) if k else None for group, k in zip(groups, drafted, strict=True)], "acceptance")


def score(measured, predicted, saturated) -> dict:
    """rows, mape, max_ape and bias as fractions; a saturated prediction counts as an error of 1.0."""
    known = np.isfinite(measured) & np.isfinite(predicted)
    if not known.any():
        return {"rows": 0}
    relative = predicted[known] / measured[known] - 1.0
    error = np.where(saturated[known], 1.0, np.abs(relative))
    fine = relative[~saturated[known]]
    return {
        "rows": int(known.sum()),
        "mape": float(error.mean()),
        "max_ape": float(error.max()),
        "bias": float(fine.mean()) if len(fine) else None,
    }


def score_baseline(fitted: baselines.Fitted, trace: diffspec.Trace, test: np.ndarray) -> dict[str, dict]:
    frame = trace.frame[test]
    rows = baselines.rows_of(frame)
    latency, saturated = fitted.predict(rows)
    return {
        "e2e_mean": score(frame["e2e_mean"].to_numpy(float), latency, saturated),
        "throughput": score(frame["throughput"].to_numpy(float), rows.users / latency, saturated),
    }


def study(title, trace, metric, splits, forms, ours, auto=False, folded_auto=False) -> list[dict]:
    """Scores of every method on every split of one deployment's rows: entries for `tables.error_table`."""
    models: dict[tuple, object] = {}

    def fitted(method, train):
        key = (method, train.tobytes())
        if key not in models:
            part = only(trace, train)
            if method in ours:
                models[key] = diffspec.fit(part, step_time=method, all_rows=True)
            else:
                models[key] = baselines.fit_form(method, baselines.rows_of(trace.frame[train]))
        return models[key]

    def scores_of(method, fold):
        model = fitted(method, fold.train)
        if method not in ours:
            return score_baseline(model, trace, fold.test)
        return diffspec.evaluate(model, only(trace, fold.test), all_rows=True)["metrics"]

    entries = []
    for split, folds in splits.items():
        start, methods = time.monotonic(), [*forms, *ours]
        if not auto or (split != "in sample" and not folded_auto):
            methods = [name for name in methods if name != "auto"]
        found = {name: [scores_of(name, fold) for fold in folds] for name in methods}
        values = trace.frame[metric].to_numpy(float)
        counted = np.isfinite(values) & ((metric != "throughput") | trace.frame["concurrency"].notna().to_numpy())
        entry = {
            "data": title,
            "split": split,
            "metric": metric,
            "rows": int(sum((fold.test & counted).sum() for fold in folds)),
            "scores": {n: tables.pool([part.get(metric, {"rows": 0}) for part in found[n]]) for n in methods},
            "folds": [
                {
                    "held_out": fold.label,
                    "scores": {n: {k: v for k, v in found[n][i].items() if v.get("rows")} for n in methods},
                }
                for i, fold in enumerate(folds)
            ],
        }
        if "auto" in methods:
            entry["auto_chose"] = [
                next(iter(fitted("auto", fold.train).deployments.values())).form  # type: ignore[attr-defined]
                for fold in folds
            ]
        entries.append(entry)
        tell(f"{title}: {split}, {len(folds)} folds in {time.monotonic() - start:.0f} s")
    return entries


def cpu_plans(data: Path, options) -> Iterator[Plan]:
    """The project's own measurements."""
    ours = ("affine", "roofline", "auto")
    quiet = stationary(diffspec.read_trace(data / "vllm_cpu_quiet.csv"))
    if options.quick:
        splits = {"in sample": everything(quiet), "draft length": by_draft_length(quiet)}
        yield Plan("vllm_cpu_quiet", quiet, "e2e_mean", splits, DENSE, ("affine",), False)
        return
    splits = {
        "in sample": everything(quiet),
        "arrival rate": by_rate(quiet),
        "concurrency": by_concurrency(quiet),
        "draft length and acceptance": by_draft_length(quiet),
    }
    yield Plan("vllm_cpu_quiet", quiet, "e2e_mean", splits, DENSE, ours, True, True)
    noisy = diffspec.read_trace(data / "vllm_cpu_noisy.csv")
    dense, experts = (noisy.where(f"deployment == {name}") for name in ("vllm-cpu/llama-29m", "vllm-cpu/qwen3-moe-66m"))
    for title, trace, forms in (
        ("vllm_cpu_noisy, dense", dense, DENSE_LENGTHS),
        ("vllm_cpu_noisy, mixture of experts", experts, EXPERTS),
    ):
        for suffix, rows in (("", stationary(trace)), (", with rows set aside", trace)):
            splits = {"in sample": everything(rows), "arrival rate": by_rate(rows)}
            if rows is not trace or trace is experts:
                splits |= {"concurrency": by_concurrency(rows)}
            splits |= {"draft length": by_draft_length(rows)} if trace is dense else {}
            if trace is dense and rows is not trace:
                splits |= {"lengths": by_lengths(rows), "acceptance": by_acceptance(rows)}
            yield Plan(title + suffix, rows, "e2e_mean", splits, forms, ours, not suffix, options.auto)


def h200_plans(data: Path) -> Iterator[Plan]:
    """The project's measurements of an H200: an engine, and a serving loop. A short window of Poisson arrivals sees
    another rate than the one asked for: all methods get the rate that came."""
    for name, load in (("vllm_h200", r"_r(\d+)$"), ("instrument_h200", r"_f(\d+)$")):
        trace = stationary(diffspec.read_trace(data / f"{name}.csv"))
        loads = trace.frame["run"].str.extract(load)[0].tolist()
        trace = replace(trace, frame=trace.frame.assign(arrival_rate=trace.frame["offered_rate"]))
        splits = {
            "in sample": everything(trace),
            "load": leave_out(loads, "load"),
            "draft length": by_draft_length(trace),
        }
        yield Plan(name, trace, "e2e_mean", splits, DENSE, ("affine", "roofline", "auto"), True, True)


def apertus_plan(shared: Path, drafter: str, workloads: tuple[str, ...]) -> Plan:
    """Throughput at draft lengths and concurrencies that were not fitted."""
    rows = [row for row in shared_traces.apertus_rows(shared, drafter) if row["workload"] in workloads]
    with tempfile.TemporaryDirectory() as folder:
        trace = diffspec.read_trace(shared_traces.write_table(rows, Path(folder) / "apertus.csv"))
    k, users = (trace.frame[name].to_numpy(float) for name in ("draft_length", "concurrency"))
    known_k, known_users = np.isin(k, (0, 1, 3, 7)), np.isin(users, (1, 8, 64, 256))
    train = known_k & known_users
    folds = {
        "in sample": Fold("k in {0, 1, 3, 7}, C in {1, 8, 64, 256}", train, train),
        "unseen draft length": Fold("k in {2, 5}", train, np.isin(k, (2, 5)) & known_users),
        "unseen concurrency": Fold("C in {32, 128}", train, np.isin(users, (32, 128)) & known_k),
    }
    splits = {name: [fold] for name, fold in folds.items() if fold.test.any()}
    title = f"Apertus-8B, {drafter}, {' + '.join(workloads)}"
    ours = ("affine", "roofline", "auto")
    return Plan(title, trace, "throughput", splits, DENSE_LENGTHS, ours, True, True)


def digitalocean_plans(shared: Path) -> Iterator[Plan]:
    """Open loops without speculation; rates held out within one server setting, where the unknown share of prompts
    that the prefix cache answers is the same for all rates."""
    rows = shared_traces.digitalocean_rows(shared)
    for what, wanted in DIGITALOCEAN.items():
        chosen = [row for row in rows if wanted in row["deployment"]]
        with tempfile.TemporaryDirectory() as folder:
            trace = stationary(diffspec.read_trace(shared_traces.write_table(chosen, Path(folder) / "do.csv")))
        title = f"Llama-3.3-70B, {what}"
        splits = {"in sample": everything(trace), "arrival rate": by_rate(trace)}
        yield Plan(title, trace, "e2e_mean", splits, ("Eq 1",), ("affine", "roofline"), False)


def all_plans(options, with_shared: bool) -> Iterator[Plan]:
    """Every table, one after the other."""
    if options.only != "cpu" and not options.quick:
        yield from h200_plans(options.data)
    if options.only == "h200":
        return
    if with_shared and options.only is None:
        for drafter in ("dspark", "eagle"):
            for workloads in (("chat", "summarization"), ("chat", "summarization", "opb")):
                yield apertus_plan(options.shared, drafter, workloads)
        yield from digitalocean_plans(options.shared)
    yield from cpu_plans(options.data, options)


def noise_floor(data: Path) -> dict:
    """What repeats of one operating point tell: the project's own check, and the changes between k0 and k0_rep."""
    trace = diffspec.read_trace(data / "vllm_cpu_noisy.csv")
    repeats = next(finding for finding in diffspec.check(trace).findings if finding.check == "repeats")
    latency = dict(zip(trace.frame["run"], trace.frame["e2e_mean"], strict=True))
    changes = {
        run: float(again / latency[run.replace("k0_rep", "k0")] - 1)
        for run, again in latency.items()
        if run.startswith("k0_rep")
    }
    return {
        "median_half_spread": repeats.value,
        "changes": changes,
        "mean_change": float(np.mean(np.abs(list(changes.values())))),
    }


def report(results: dict) -> list[str]:
    """The generated part of the README."""
    noise, about = results["noise"], results["about"]
    lines = [
        f"Written by `{about['command']}` on {about['date']} in {about['minutes']:.0f} min (fitting on a CPU): "
        + ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        + (f"; since then `{about['since'].replace(' on ', '` on ')}" if "since" in about else "")
        + ".",
        "",
        "Mean absolute error in percent, over all held-out rows of a split; a saturated prediction counts as 100 %. "
        "In brackets: rows that the form can predict, where they are fewer; bold: the best of those that predict all.",
        "",
        f"**Noise floor** (seven repeated cells of the noisy table, `e2e_mean`): {100 * noise['mean_change']:.1f} % "
        f"mean change between two runs; {100 * noise['median_half_spread']:.1f} % median half spread, as "
        "`diffspec check` reports it. The quiet table has no repeats.",
    ]
    for title, entries in results["studies"].items():
        methods = list(dict.fromkeys(name for entry in entries for name in entry["scores"]))
        lines += ["", f"### {title}: `{entries[0]['metric']}`", "", *tables.error_table(entries, methods)]
        chosen = {form for entry in entries for form in entry.get("auto_chose", [])}
        if chosen:
            lines += ["", f"`auto` chose {' or '.join(sorted(chosen))}."]
    if not results["with_shared"]:
        lines += ["", "Run without the public GPU measurements: their tables are left out."]
    return lines


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "data")
    parser.add_argument("--shared", type=Path, default=HERE.parents[2] / "shared")
    parser.add_argument("--quick", action="store_true", help="affine only, on the quiet table")
    parser.add_argument("--auto", action="store_true", help="choose the form anew in every fold of every table")
    parser.add_argument("--only", choices=("h200", "cpu"), help="these tables, beside the others of results.json")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    with_shared = (options.shared / "traces").is_dir() and not options.quick
    if not with_shared and not options.quick:
        tell("no public GPU measurements: their tables are left out")
    flags = [f"--{name}" for name in ("quick", "auto") if getattr(options, name)]
    flags += [f"--only {options.only}"] if options.only else []
    results = {
        "about": {
            "command": " ".join(["python experiments/01_reproduce_published_form/run.py", *flags]),
            "date": datetime.date.today().isoformat(),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("jax", "numpy", "scipy")}
            | {"diffspec": _version()},
        },
        "noise": noise_floor(options.data),
        "with_shared": with_shared,
        "studies": {},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only:  # into the results that are there
        results = json.loads((options.out / "results.json").read_text(encoding="utf-8")) | {"noise": results["noise"]}
        results["about"]["since"] = f"{flags[-1]} on {datetime.date.today().isoformat()}"
    for plan in all_plans(options, with_shared):
        entries = study(*plan)
        results["studies"][entries[0]["data"]] = entries
        if not options.only:
            results["about"]["minutes"] = round((time.monotonic() - start) / 60, 1)
        (options.out / "results.json").write_text(json.dumps(_rounded(results), indent=1) + "\n")
        tables.rewrite(options.out / "README.md", report(results))
    tell(f"wrote results.json and README.md, {results['about']['minutes']} min")
    return results


def _version() -> str:
    try:
        return version("diffspec")
    except ModuleNotFoundError:
        return "from the source tree"


def _rounded(value):
    """Five significant digits: small changes of the last digits do not change the file."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
