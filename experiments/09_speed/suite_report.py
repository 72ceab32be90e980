"""suite.json as Markdown tables, and its scaling curves as a picture."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def seconds(value: float | None) -> str:
    """Three digits with a unit."""
    if value is None:
        return ""
    if value == 0.0:
        return "0"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def count(value: float) -> str:
    return f"{value:,.0f}" if value < 1e5 else f"{value:.0e}".replace("e+0", "e")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def origin(part: dict[str, Any]) -> str:
    before, after = part["load_average"]
    return (
        f"*{part['when']}, commit {part['commit']}, {part['seconds']:.0f} s; load average {before:.1f} before, "
        f"{after:.1f} after.*"
    )


def configuration(part: dict[str, Any]) -> list[str]:
    rows = []
    for row in part["rows"]:
        ratio, peak = row.get("gradient_over_value"), row.get("peak_memory_gb")
        rows.append(
            (
                row["of"],
                row["kind"] + (f" ({ratio:.2f} x)" if ratio else ""),
                count(row["batch"]),
                *(seconds(row[name]) for name in ("compile_s", "first_call_s", "min_s", "median_s")),
                seconds(row["s_per_configuration"]),
                f"{row['program_memory_gb']:.2g}",
                f"{peak:.2g}" if peak else "",
            )
        )
    head = ("of", "what", "batch", "compile", "first call", "least", "median", "each", "program, GB", "peak, GB")
    text = (
        "*equilibrium*: eight inputs of a roofline server, solved for the batch; *prediction*: ten inputs, "
        "speculation, a cap of 64, the wait for a place. Compile: tracing and lowering too. *(x)*: the gradient by all "
        "inputs over the value alone, in turns. *program*: arguments, answers and temporaries; "
        "*peak*: all that the process had held."
    )
    return ["## One configuration, and many side by side", "", text, "", *table(head, rows)]


def verbs(parts: dict[str, Any]) -> list[str]:
    rows = []
    for name in ("fit", "joint", "policy", "log"):
        for row in parts.get(name, {"rows": []})["rows"]:
            rate = f", {row['rows_per_s']:.3g} rows/s" if "rows_per_s" in row else ""
            timed = (seconds(row.get(key)) for key in ("first_call_s", "compile_s", "min_s", "median_s", "cpu_s"))
            rows.append((row["of"], row["what"] + rate, str(row["programs"]), *timed, str(row["programs_later"])))
    head = ("verb", "what", "programs", "first call", "of it compile", "least", "median", "CPU", "compiled later")
    text = (
        "In a process that has compiled nothing, without a compilation cache; then again. *Compile*: XLA alone. *CPU*: "
        "of all threads, the least of the repeats. *Compiled later*: programs in all the repeats together."
    )
    return ["## Verbs", "", text, "", *table(head, rows)] if rows else []


def simulation(parts: dict[str, Any]) -> list[str]:
    own = parts.get("simulation")
    if own is None:
        return []
    (row,) = own["rows"]
    lines = ["## Simulator, and general ones on the same queues", ""]
    lines += [
        f"{row['sequence_steps_per_second']:.3g} sequence-steps per second of CPU time at a mean batch of "
        f"{row['mean_batch']:.1f}, {row['microseconds_per_request']:.3g} us a request. The same questions asked of "
        "others (CPU time; means as information): M/M/4 at load 0.9, which is 51 steps a customer here and one event "
        "there; and an engine whose steps all sequences share.",
        "",
    ]
    asked = {"diffspec": own} | parts.get("peers_queues", {"peers": {}})["peers"]
    rows = []
    for name, told in asked.items():
        if "error" in told:
            rows.append((name, told["error"], "", "", "", ""))
            continue
        cells = [f"{name} {told['version']}" if "version" in told else name]
        for queue in ("mm4", "batch_server"):
            one = told.get(queue)
            cells += [seconds(one["s_each"]), f"{one['mean']:.4g} s"] if one else ["none", ""]
        ratio = told["mm4"]["s_each"] / own["mm4"]["s_each"]
        rows.append((*cells, f"{ratio:.2g}"))
    head = ("simulator", "M/M/4, a customer", "mean wait", "sequence-step", "mean latency", "M/M/4 over ours")
    return [*lines, *table(head, rows)]


def scaling(part: dict[str, Any]) -> list[str]:
    rows = []
    for curve in part["curves"]:
        first, last = curve["points"][0], curve["points"][-1]
        span = f"{count(first['size'])} to {count(last['size'])} {curve['unit']}"
        times = f"{seconds(first['min_s'])} to {seconds(last['min_s'])}"
        slope = f"{curve['exponent']:.2f} ± {curve['standard_error']:.2f}"
        rows.append((curve["what"], span, times, slope, str(curve["points_fitted"]), curve["at_most_linear"]))
    head = ("what", "from, to", "least seconds", "exponent", "points", "at most linear")
    text = (
        "Exponent of seconds by size, by least squares of the logarithms over the largest sizes (*points*), ± its "
        "standard error. At most linear: *yes* where two standard errors above it are at most 1.1, *no* where two "
        "below it are above 1. The whole points of a joint decision are draft lengths to the power of classes: the "
        "mathematics does not allow less for those, which is why the relaxed problem is what grows here. "
        "[Curves](suite.png)"
    )
    return ["## Scaling", "", text, "", *table(head, rows)]


def commands(part: dict[str, Any]) -> list[str]:
    rows = []
    for row in part["rows"]:
        top = ", ".join(f"{name} {value:.2f}" for name, value in list(row["top_imports_s"].items())[:5])
        times = [f"{row[f'{kind}_s']:.2f} ({row[f'{kind}_cpu_s']:.2f})" for kind in ("cold", "warm")]
        times.append(f"{row['imports_s']:.2f}")
        rows.append((f"`{row['command']}`", *times, f"{row['imports_share']:.0%}", top))
    head = (
        "command",
        "cold, s (CPU)",
        "warm, s (CPU)",
        "imports, s",
        "share",
        "largest, own time of their modules [s]",
    )
    text = (
        "A fresh process each, Python's start included. *Cold*: no compiled program is there; *warm*: those of the "
        "cold run are; *imports*: own times of all modules in the warm run (`python -X importtime`), and their share "
        "of it."
    )
    return ["## Commands", "", text, "", *table(head, rows)]


def latency(part: dict[str, Any]) -> list[str]:
    rows = []
    for name, told in part["peers"].items():
        if "error" in told:
            rows.append((name, told["error"], "", "", "", ""))
            continue
        many = told["batched"]
        best = min(many, key=lambda entry: entry["s_per_configuration"]) if many else None
        batched = f"{seconds(best['s_per_configuration'])} of {count(best['count'])}" if best else "none"
        times = (seconds(told[key]) for key in ("cold_s", "first_call_s"))
        warm = (seconds(told["warm"]["min_s"]), seconds(told["warm"]["median_s"]))
        version = "" if name.startswith("roofline") else f" {told['version']}"
        rows.append((name + version, *times, *warm, batched))
        kept = told.get("session")
        if kept:
            if "error" in kept:
                rows.append((f"{name}, session kept", kept["error"], "", "", "", ""))
            else:
                rows.append(
                    (f"{name}, session kept", "", "", seconds(kept["min_s"]), seconds(kept["median_s"]), "none")
                )
    lines = ["## Peers: one decode step", ""]
    lines += [
        f"{part['question']['model']}, one {part['question']['hardware']}, batches of 1 to 64, 512 to 4,096 cached "
        "tokens a sequence. *Cold*: from the start of the process to the first answer; *least, median*: of one call; "
        "*batched*: each of so many evaluated together, where a tool can. Peers that have an efficiency got 1.",
        "",
        *table(("tool", "cold", "first call", "least", "median", "batched, each"), rows),
    ]
    own = part["peers"].get("diffspec", {})
    if "under_load" in own:
        rows = [
            (kind, seconds(told["min_s"]), seconds(told["s_per_configuration_of_10000"]))
            for kind, told in own["under_load"].items()
        ]
        text = (
            "What none of them answers: the same server with a 1B drafter under load, equilibrium and wait included, "
            "and its gradient by every cost."
        )
        lines += [text, "", *table(("diffspec, a whole prediction", "one call", "each of 10,000 together"), rows)]
    return lines + answers(part)


def answers(part: dict[str, Any]) -> list[str]:
    """The answers side by side: information, not a comparison of accuracy."""
    asked, rows = part["question"], []
    columns = {name: told for name, told in part["peers"].items() if "error" not in told}
    priors = columns.get("diffspec", {}).get("at_priors")
    if priors:
        columns["diffspec, usual efficiency"] = priors
    shown = [at for at in range(len(asked["decode"])) if asked["decode"][at][0] in (1, 32, 64)]
    for at in shown:
        batch, context = asked["decode"][at]
        cells = (f"{1e3 * told['decode_s'][at]:.2f}" for told in columns.values())
        rows.append((f"decode, {batch} x {context}", *cells))
    for at, prompt in enumerate(asked["prefill"]):
        cells = (f"{1e3 * told['prefill_s'][at]:.2f}" for told in columns.values())
        rows.append((f"prefill, {prompt}", *cells))
    text = "Their answers side by side [ms], as information: no measurement judges them here."
    return [text, "", *table(("step", *columns), rows)]


def inprocess(part: dict[str, Any]) -> list[str]:
    lines = ["## Peers in one process, on the same code", ""]
    if "error" in part:
        return [*lines, part["error"], ""]
    versions = ", ".join(f"{name} {value}" for name, value in part["versions"].items())
    rows = []
    for name, told in part["equilibrium"]["solvers"].items():
        value, both = told["value"], told.get("value and gradient")
        right = (
            (f"{told['unsuccessful']}", f"{told['largest_error']:.1e}", f"{told['largest_elasticity_difference']:.1e}")
            if "unsuccessful" in told
            else ("", "reference", "")
        )
        times = (seconds(value.get("compile_s")), seconds(value["min_s"]), seconds(both["min_s"]) if both else "none")
        rows.append((name, *times, *right))
    head = ("solver", "compile", "each", "with gradient", "unsuccessful", "error to brentq", "elasticities off ours")
    lines += [
        f"{versions}. The equilibrium of {part['equilibrium']['systems']:,} random roofline servers (the same "
        "residence time for all; optimistix by `root_find` in log B from the batch of a server alone, vmapped and "
        "jitted), least of the turns. diffspec's also tells capacity, saturation and the residual.",
        "",
        *table(head, rows),
    ]
    rows = [
        (name, seconds(told["min_s"]), str(told["evaluations"]), f"{told['above_best']:.1e}")
        for name, told in part["decision"]["solvers"].items()
    ]
    lines += [
        f"A relaxed joint decision of {part['decision']['variables']} variables (four classes of requests and a cap), "
        "the same compiled objective for all, which are compiled before. *Above best*: log cost over the best of all. "
        "With 209 variables: [search_scale.md](../07_optimise/search_scale.md).",
        "",
        *table(("solver", "least", "evaluations", "above best"), rows),
    ]
    return lines


def stored(part: dict[str, Any]) -> list[str]:
    rows = [
        (
            f"[{name}]({name}.json)",
            row["told"],
            "just now" if row["date"] == "now" else f"{row['date']} {row['commit']}",
        )
        for name, row in part["rows"].items()
    ]
    text = "Longer scripts, with the figures they stored (`--all` runs limit, fleet, log_scale and request_table anew)."
    return ["## Stored", "", text, "", *table(("script", "figures", "stored"), rows)]


def report(suite: dict[str, Any]) -> str:
    parts = suite["parts"]
    quick = " Quick: smaller sizes, fewer repeats." if suite["quick"] else ""
    lines = [
        "# The benchmark suite",
        "",
        f"`python experiments/09_speed/run.py`, {suite['machine']}.{quick} Least of the repeats unless said; other "
        "work ran on the machine, so that medians tell its noise. When and under which load each part was measured is "
        "at the end.",
        "",
    ]
    if "configuration" in parts:
        lines += configuration(parts["configuration"])
    lines += verbs(parts)
    lines += simulation(parts)
    for name, show in {
        "scaling": scaling,
        "commands": commands,
        "peers_latency": latency,
        "peers_inprocess": inprocess,
        "stored": stored,
    }.items():
        if name in parts:
            lines += show(parts[name])
    lines += ["## When", "", *(f"* {name}: {origin(part)}" for name, part in parts.items())]
    return "\n".join(lines) + "\n"


def draw(suite: dict[str, Any], path: Path) -> None:
    """Seconds by size, each curve with the straight line of its exponent."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for curve in suite["parts"]["scaling"]["curves"]:
        size = np.asarray([point["size"] for point in curve["points"]], dtype=float)
        time = np.asarray([point["min_s"] for point in curve["points"]])
        label = f"{curve['what']}: {curve['exponent']:.2f} ± {curve['standard_error']:.2f}"
        (line,) = axes.plot(size, time, "o", ms=4, label=label)
        upper = size[-curve["points_fitted"] :]
        middle = np.exp(np.mean(np.log(time[-curve["points_fitted"] :])) - curve["exponent"] * np.mean(np.log(upper)))
        axes.plot(upper, middle * upper ** curve["exponent"], color=line.get_color(), lw=1)
    axes.set(xscale="log", yscale="log", xlabel="size (rows, configurations, deployments, variables, loads)")
    axes.set_ylabel("seconds, least of the repeats")
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
