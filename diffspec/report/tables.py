"""Answers as tables for a terminal: plain dicts in, rich renderables out. Times are told in milliseconds."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from diffspec.report.numbers import NONE, metric_value, milliseconds, percent, quantity, significant, span

STAGES = ("waiting", "prefill", "draft", "verify", "overhead")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Table:
    """A table whose first ``left`` columns are texts and whose others are numbers."""
    made = Table(title=Text(title, style="bold"), title_justify="left")
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def errors(parts: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Errors per observable; ``parts`` maps a name such as "in sample" to the metrics of an evaluation."""
    names = list(dict.fromkeys(name for metrics in parts.values() for name in metrics))
    rows = []
    for name in names:
        for part, metrics in parts.items():
            if name not in metrics:
                continue
            score = metrics[name]
            shown = [percent(score[key]) for key in ("mape", "max_ape", "bias")]
            r2 = NONE if score["r2"] is None else f"{score['r2']:.3f}"
            rows.append((name, part, str(score["rows"]), *shown, r2, percent(score.get("coverage"))))
    columns = ("observable", "on", "rows", "mean error", "worst", "bias", "R2", "inside 90 %")
    return table(title, columns, rows, left=2)


def parameters(deployment: Mapping[str, Any]) -> Table:
    """Fitted parameters of one deployment (as in model.json) with unit and meaning."""
    rows = []
    for path, entry in deployment["parameters"].items():
        unit, known = entry["unit"], "told" in entry
        inside = f"{significant(entry['low'])} to {significant(entry['high'])}" if known else NONE
        told = percent(entry["told"]) if known else NONE
        shown = (quantity(entry["value"], unit), inside, told)
        rows.append((path.removeprefix("step_time."), entry["meaning"], *shown))
    title = f"{deployment['deployment']}: {deployment['step_time']} step time"
    return table(title, ("parameter", "meaning", "value", "90 % interval", "told by the trace"), rows, left=2)


def fit_summary(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `diffspec fit` says: parameters and errors of each deployment."""
    for deployment in answer["deployments"]:
        quality = deployment["quality"]
        yield parameters(deployment)
        parts = {"fitted rows": quality["metrics"]}
        holdout = quality.get("holdout")
        if holdout and holdout["metrics"]:
            parts["held out"] = holdout["metrics"]
        title = f"{deployment['deployment']}: errors on {quality['rows']} fitted rows"
        if holdout:
            title += f", {holdout['rows']} rows held out ({holdout['expression']})"
        yield errors(parts, title)
        told = deployment["defaults"].get("first_principles", {}).get("efficiency", {})
        if told:
            shares = ", ".join(f"{name} {percent(share)}" for name, share in told.items())
            yield Text(f"of the data sheet ({deployment['defaults']['hardware']}) the fit reaches: {shares}")
        compared = {name: form.get("held_out_by_fold", {}) for name, form in quality["forms"].items()}
        folds = list(dict.fromkeys(fold for found in compared.values() for fold in found))
        if len(compared) > 1 and folds:
            rows = [(fold, *(percent(found.get(fold)) for found in compared.values())) for fold in folds]
            overall = (percent(form["held_out_error"]) for form in quality["forms"].values())
            yield table("mean error where held out", ("held out", *compared), [*rows, ("all", *overall)])
            yield Text(f"step time: {quality['chosen']}")
        if quality.get("untold"):
            yield Text(
                f"{deployment['deployment']}: what the trace does not tell, and stays near its prior", style="bold"
            )
        for entry in quality.get("untold", ()):
            yield Text(f"  {entry['words']}")
        if quality.get("profiles"):
            units = {path: entry["unit"] for path, entry in deployment["parameters"].items()}
            rows = [
                (path.removeprefix("step_time."), *_bounds(profile, units[path]))
                for path, profile in quality["profiles"].items()
            ]
            yield table("profile likelihood, 90 %", ("parameter", "at least", "best", "at most"), rows)


def _bounds(profile: Mapping[str, Any], unit: str) -> tuple[str, str, str]:
    best = profile["values"][profile["loss_rise"].index(0.0)]
    low, high = ("no bound" if value is None else quantity(value, unit) for value in (profile["low"], profile["high"]))
    return low, quantity(best, unit), high


def evaluation(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `diffspec evaluate` says."""
    yield errors(
        {"given rows": answer["metrics"]}, f"errors on {answer['rows']} rows of {', '.join(answer['deployments'])}"
    )
    for reason, count in answer["set_aside"].items():
        yield Text(f"{count} rows set aside: {reason}")
    if answer["saturated_rows"]:
        yield Text(f"{answer['saturated_rows']} rows are predicted to saturate (each counts as an error of 100 %)")
    if answer.get("outside_rows"):
        yield Text(f"{answer['outside_rows']} of {answer['rows']} rows lie outside what was measured for the fit")
    if answer["not_predicted"]:
        yield Text(f"not predicted yet: {', '.join(answer['not_predicted'])}")


def check_summary(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `diffspec check` says: each deployment, then each check."""
    for entry in answer["deployments"]:
        rows = [
            ("rows", f"{entry['rows']}, of which {entry['set_aside']} set aside"),
            ("arrival rate", span(entry["arrival_rate"], "req/s")),
            ("concurrency", span(entry["concurrency"], "req")),
            ("prompt, output length", f"{span(entry['prompt_length'])}, {span(entry['output_length'], 'tok')}"),
            ("draft lengths", ", ".join(map(str, entry["draft_lengths"])) + f" ({', '.join(entry['methods'])})"),
            ("tokens per step", span(_rounded(entry["tokens_per_step"]))),
            ("acceptance", span(_rounded(entry["acceptance"]))),
            ("means", ", ".join(entry["metrics"]) or NONE),
        ]
        yield table(entry["deployment"], ("measured", "range"), rows, left=2)
    marks = {"ok": "ok", "warning": "WARNING", "unchecked": "-"}
    rows = [
        (finding["check"], marks[finding["severity"]], significant(finding["value"]), finding["message"])
        for finding in answer["findings"]
    ]
    yield table("checks", ("check", "result", "value", "what was found"), rows, left=4)


def _rounded(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [float(f"{value:.3g}") for value in values]


def prediction(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `diffspec predict` says."""
    rows = [
        ("ttft", "time to first token (ttft)", milliseconds(answer["ttft"])),
        ("itl", "gap between stream events (itl)", milliseconds(answer["itl"])),
        ("tpot", "time per output token (tpot)", milliseconds(answer["tpot"])),
        ("e2e_latency", "end-to-end latency (e2e)", milliseconds(answer["e2e_latency"])),
        ("throughput", "throughput", quantity(answer["throughput"], "req/s")),
        ("capacity", "capacity", quantity(answer["capacity"], "req/s")),
        ("utilization", "utilization", percent(answer["utilization"])),
        ("effective_batch_size", "effective batch size", quantity(answer["effective_batch_size"], "req")),
        ("", "tokens per step", quantity(answer["tokens_per_step"], "tok")),
    ]
    speedup = answer["speedup_reason"] or f"{significant(answer['speedup'])} x"
    rows.append(("" if answer["speedup_reason"] else "speedup", "speedup over no speculation", speedup))
    if answer.get("breakeven_rate") is not None:
        rows.append(("breakeven_rate", "break-even arrival rate", quantity(answer["breakeven_rate"], "req/s")))
    elif answer.get("breakeven_reason") not in (None, answer["speedup_reason"]):
        rows.append(("", "break-even arrival rate", f"none: {answer['breakeven_reason']}"))
    title = f"{answer['deployment']}, draft length {answer['draft_length']:g}: {answer['outcome']}"
    told = answer.get("intervals")
    if answer["outcome"] != "does_not_fit":
        yield from _with_intervals(answer, title, rows)
    yield from assumed(answer, title if told is None else "")
    if answer.get("percentiles"):
        yield percentile_table(answer["percentiles"], told and told.get("percentiles"))
    if answer["outcome"] == "does_not_fit":
        return
    if answer["outcome"] == "saturated":
        yield Text(f"saturated: {quantity(answer['shortfall'], 'req/s')} more than the capacity is asked for")
    else:
        yield decomposition(answer["decomposition"])


def _with_intervals(
    answer: Mapping[str, Any], title: str, rows: Sequence[tuple[str, str, str]]
) -> Iterator[RenderableType]:
    """Means with their intervals where the answer has them, what these hold, and whether anything like it was
    measured; ``rows`` are name, label and value."""
    told = answer.get("intervals")
    if told is None:
        yield table(title, ("mean", "predicted"), [row[1:] for row in rows])
    else:
        shown = [(*row[1:], _interval(row[0], told["metrics"].get(row[0]))) for row in rows]
        if energy := answer.get("energy_per_token"):
            power = quantity(energy["power"], "W")
            shown.append((f"energy per output token, at {power}", quantity(energy["joules"], "J"), NONE))
        yield table(title, ("mean", "predicted", f"{told['level']:.0%} interval"), shown)
        if told["saturated_share"]:
            yield Text(f"{percent(told['saturated_share'])} of the draws saturate")
        if "misfit" in told["includes"]:
            yield Text(
                f"intervals: of what a long benchmark would measure, by {told['draws']} draws of what the fit leaves "
                "open and what it misses; acceptance is as given, in no interval"
            )
    yield from measured(answer)


def measured(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Why there are no intervals, and what of the question was not measured."""
    if answer.get("intervals_reason"):
        yield Text(f"no intervals: {answer['intervals_reason']}")
    if "inside_measured" not in answer:
        return
    fields = list(dict.fromkeys(entry["field"] for entry in answer["outside_measured"]))
    if "deployment" in fields:
        return  # nothing was: the assumptions tell
    yield Text(f"outside what was measured: {', '.join(fields)}" if fields else "inside what was measured")


def percentile_table(found: Mapping[str, Any], told: Mapping[str, Any] | None = None) -> RenderableType:
    """Percentiles of ttft, tpot, itl and e2e, each above its interval where ``told``; the title says how many requests
    wait for a place in the batch."""
    metrics = [metric for metric in ("ttft", "tpot", "itl", "e2e") if metric in found]
    names = list(found[metrics[0]])
    rows = []
    for metric in metrics:
        rows.append((metric, *(milliseconds(found[metric][name]) for name in names)))
        if told:
            rows.append(("  interval", *(_interval(metric, told[metric][name]) for name in names)))
    waits = percent(found["waiting_probability"])
    return table(f"percentiles; {waits} of the requests wait for a place in the batch", ("", *names), rows)


def simulation(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `diffspec simulate` says: the simulated numbers with their intervals, and the model's beside them."""
    rows = []
    for metric, statistics in answer["metrics"].items():
        for name, entry in statistics.items():
            predicted = (answer["predicted"].get(metric) or {}).get(name)
            rows.append((f"{metric} {name}", milliseconds(entry["value"]), _half(entry), milliseconds(predicted)))
    title = f"{answer['requests']} requests in {answer['replications']} replications"
    yield table(title, ("", "simulated", "± 95 %", "model"), rows)
    served = [
        (name.replace("_", " "), quantity(answer[name]["value"], unit), _half(answer[name]))
        for name, unit in (("throughput", "req/s"), ("effective_batch_size", "req"), ("requests_in_system", "req"))
    ]
    yield table("", ("", "simulated", "± 95 %"), [*served, ("preemptions", str(answer["preemptions"]), "")])
    if answer["saturated"]:
        yield Text("saturated: requests wait longer and longer; the numbers depend on how long it ran")


def _half(entry: Mapping[str, Any]) -> str:
    value, half = entry["value"], entry["half_width"]
    return NONE if half is None or not value else percent(half / abs(value))


def assumed(answer: Mapping[str, Any], title: str = "") -> Iterator[RenderableType]:
    """The memory plan and what was assumed, where an answer has them."""
    if answer.get("memory"):
        yield _memory(answer["memory"], title or "memory of each device")
        yield table("assumed", ("what",), [(line,) for line in answer["assumptions"]])


def _interval(name: str, edges: Mapping[str, float | None] | None) -> str:
    if edges is None or (edges["median"] is None and edges["low"] is None):
        return NONE
    units = dict.fromkeys(("throughput", "capacity", "breakeven_rate"), "req/s")
    units |= {"effective_batch_size": "req", "speedup": "1"}
    if name == "utilization":
        low, high = percent(edges["low"]), percent(edges["high"])
    else:
        low, high = (quantity(edges[edge], units.get(name, "s")) for edge in ("low", "high"))
    return f"{low} to {'unbounded' if edges['high'] is None else high}"


def _memory(plan: Mapping[str, Any], title: str) -> Table:
    """What fits into the memory of each device."""
    gigabytes = [
        ("memory, of which usable", "memory_bytes", "usable_bytes"),
        ("verifier, drafter", "verifier_bytes", "drafter_bytes"),
        ("activations, runtime", "activation_bytes", "reserve_bytes"),
    ]
    rows = [(name, ", ".join(f"{significant(plan[key] / 1e9)} GB" for key in keys)) for name, *keys in gigabytes]
    if not plan["fits"]:
        rows.append(("does not fit: missing", f"{significant(plan['missing_bytes'] / 1e9)} GB"))
    rows += [
        ("left for the KV cache", f"{significant(plan['free_bytes'] / 1e9)} GB"),
        ("KV cache", f"{plan['kv_capacity_tokens']:.0f} tok"),
        ("requests at their longest", significant(plan["sequences"])),
    ]
    return table(title, ("memory", "size"), rows)


def decomposition(stages: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Where the end-to-end latency goes, alone on the server and by load."""
    keys = ("load_independent", "load_dependent")
    rows, sums = [], [0.0, 0.0]
    for stage in STAGES:
        parts = [stages[stage][key] or 0.0 for key in keys]
        sums = [total + part for total, part in zip(sums, parts, strict=True)]
        rows.append((stage, *(milliseconds(part) for part in parts), milliseconds(sum(parts))))
    rows.append(("sum", *(milliseconds(total) for total in sums), milliseconds(sum(sums))))
    return table("where the time goes", ("stage", "alone", "added by load", "sum"), rows)


def policy(answer: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `diffspec optimize` says: the policy by load, the schedule by batch size, and engine flags."""
    names = list(dict.fromkeys(name for entry in answer["policy"] for name in entry["metrics"]))
    asked = {answer["objective"], *(re.split("[<>]", limit)[0] for limit in answer.get("limits") or ())}
    usual = {"ttft_mean", "tpot_mean", "e2e_mean", "throughput"}
    shown = [name for name in names if name in (asked | {"e2e_mean"} if asked - usual else usual)]
    rows = []
    for entry in answer["policy"]:
        low, high, length = (entry[name] for name in ("load_from", "load_to", "draft_length"))
        rows.append(
            (
                f"{low:g}" if low == high else f"{low:g} to {high:g}",
                "none will do" if length is None else f"{length:g}",
                *(metric_value(name, entry["metrics"].get(name)) for name in shown),
                significant(entry["speedup"]),
                percent(entry["headroom"]),
                percent(entry.get("chosen_probability")),
            )
        )
    if answer["outcome"] == "does_not_fit":
        yield from assumed(answer, f"{answer['deployment']}: does_not_fit")
        return
    columns = ("load", "draft length", *shown, "speedup", "headroom", "probability best")
    best = "largest" if answer["objective"] in ("throughput", "goodput") else "smallest"
    yield table(f"draft length by load, {best} {answer['objective']}: {answer['outcome']}", columns, rows)
    yield Text("metrics, speedup, headroom and probability are those at the upper end of each range")
    for entry in answer["policy"]:
        yield from _violations(entry)
    if answer.get("schedule"):
        told = "; ".join(f"{first:g} to {last:g}: {length:g}" for first, last, length in answer["schedule"])
        yield Text(f"draft length by batch size: {told}")
        yield from _schedule_against_policy(answer.get("schedule_vs_static") or [])
    for name, flag in (answer.get("flags") or {}).items():
        if flag:
            yield Text(f"{name}: {flag}")
    if answer.get("optimality_gap") is not None:
        yield Text(f"the relaxation, rounded, is within {percent(answer['optimality_gap'])} of exhaustive search")
    if answer.get("intervals"):
        yield _draft_lengths(answer["intervals"])
    yield from measured(answer)
    yield from assumed(answer)


def _draft_lengths(told: Mapping[str, Any]) -> Table:
    """How likely each draft length is the best over draws of what is not known, and what the chosen one gains."""
    rows = []
    for entry in told["loads"]:
        likely = sorted(entry["probability_best"].items(), key=lambda item: (-item[1], int(item[0])))
        shares = ", ".join(f"{length}: {percent(share)}" for length, share in likely if share > 0)
        gain = _interval("speedup", entry["speedup"])
        shown = (percent(entry[name]) for name in ("expected_regret", "chosen_feasible_share"))
        rows.append((f"{entry['load']:g}", shares or "none will do", gain, *shown))
    level = f"{told['level']:.0%}"
    columns = ("load", "best in", f"speedup of the chosen, {level}", "its expected regret", "keeps the limits in")
    return table(f"best draft length over {told['draws']} draws of what is not known", columns, rows, left=2)


def _schedule_against_policy(entries: list[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """How much slower (or faster) the schedule over the batch is than the policy, at its worst load."""
    both = [entry for entry in entries if entry["e2e_schedule"] and entry["e2e_policy"]]
    if both:
        worst = max(both, key=lambda entry: entry["e2e_schedule"] / entry["e2e_policy"])
        change = worst["e2e_schedule"] / worst["e2e_policy"] - 1.0
        told = f"{percent(abs(change))} {'slower' if change > 0 else 'faster'}"
        yield Text(f"under that schedule e2e_mean is at worst {told} than the policy's, at load {worst['load']:g}")


def _violations(entry: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Which limit no draft length keeps, and by how much the nearest one misses it."""
    load = f"{entry['load_from']:g} to {entry['load_to']:g}"
    for limit, missed in (entry.get("violations") or {}).items():
        if limit == "capacity":
            told = f"saturated: capacity is {quantity(missed['value'], 'req/s')}"
        else:
            metric = limit.split("<")[0].split(">")[0]
            told = f"{limit} fails: the best is {metric_value(metric, missed['value'])}"
            if missed["value"] and missed["bound"]:
                told += f", off by {percent(abs(missed['value'] / missed['bound'] - 1.0))}"
        yield Text(f"load {load}: no draft length will do; at load {entry['load_to']:g} {told}")
