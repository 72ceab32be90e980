"""What a day of refitting 1e5 deployments and summarising 1e12 requests would cost, from the measured rates.

Run `python experiments/09_speed/on_paper.py`: it computes from log_scale.json, request_table.json and
fleet.json beside it, and writes the tables between the markers of docs/at-scale.md. Nothing of that size was
run: these are products of what was measured on one small machine, and say where it would stop.
"""

import json
import math
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "at-scale.md"
START, END = "<!-- computed by experiments/09_speed/on_paper.py -->", "<!-- end of what is computed -->"
DAY = 86_400.0
REQUESTS, DEPLOYMENTS = 1e12, 1e5


def measured() -> dict[str, Any]:
    """The reports that the numbers come from."""
    names = ("log_scale", "fleet")
    return {name: json.loads((HERE / f"{name}.json").read_text(encoding="utf-8")) for name in names}


def costs(reports: dict[str, Any], requests: float = REQUESTS, deployments: float = DEPLOYMENTS) -> dict[str, float]:
    """Cores, memory [B] and network [B] for a day of both, everything in proportion to what was measured."""
    scale, fit = reports["log_scale"], reports["fleet"]["fits"][-1]  # with as many processes as cores
    dask, partition = scale["dask"], scale["partition"]
    tasks = 2 * requests / partition["rows"]
    sent = requests / partition["rows"] * (partition["extents_bytes"] + partition["windows_bytes"])
    log_cores = requests / dask["rows_per_cpu_s"] / DAY
    return {
        "log_cores": log_cores,
        "log_memory": math.ceil(log_cores) * dask["peak_memory_gb"] * 1e9 / 2,  # two workers, and the process that asks
        "stored": requests * scale["bytes_per_row"],
        "read": 2 * requests * scale["bytes_per_row"],
        "sent": sent,
        "tasks": tasks,
        "scheduler_s": tasks * scale["task_overhead_s"],
        "fit_cores": deployments * fit["median_fit"] / DAY,
        "fit_s": fit["median_fit"],
        "fit_first_s": max(fit["first_fits"]),
        "fit_processes": fit["processes"],
    }


def _bytes(size: float) -> str:
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} kB"


def computed(reports: dict[str, Any]) -> str:
    """The text between the markers."""
    cost, scale = costs(reports), reports["log_scale"]
    dask, process, partition = scale["dask"], scale["process"], scale["partition"]
    log = [
        ("measured", f"{dask['rows']:.0e} rows, {dask['seconds']:.0f} s, {dask['peak_memory_gb']:.2f} GB", "log_scale"),
        (
            "load average at its end, other work included",
            f"{scale['load_average_between'][0]:.1f} on 2 cores",
            "log_scale",
        ),
        ("rows a second of CPU time", f"{dask['rows_per_cpu_s']:.3g}", "log_scale"),
        ("cores for 1e12 requests a day", f"{cost['log_cores']:.0f}", "1e12 / rate / 86,400 s"),
        ("memory of the workers", _bytes(cost["log_memory"]), "half of the measured peak a core"),
        ("storage", _bytes(cost["stored"]), f"{scale['bytes_per_row']:.1f} B a row"),
        (
            "network from storage",
            f"{_bytes(cost['read'])}, {_bytes(cost['read'] / DAY)}/s",
            "two readings; a third where files overlap in time",
        ),
        (
            "network to the process that asks",
            f"{_bytes(cost['sent'])}, {_bytes(cost['sent'] / DAY)}/s",
            f"{_bytes(partition['windows_bytes'])} for {partition['rows']:.0e} rows",
        ),
        (
            "one scheduler",
            f"{cost['tasks']:.2g} tasks, {cost['scheduler_s'] / 3600:.1f} h",
            f"{1e3 * scale['task_overhead_s']:.1f} ms a task that does nothing",
        ),
    ]
    fit = [
        (
            "measured",
            f"{cost['fit_s']:.1f} s a fit of 27 rows in each of {cost['fit_processes']} processes on as many cores",
            "fleet",
        ),
        ("the first fit of a process", f"{cost['fit_first_s']:.0f} s", "programs are compiled, or read from disk"),
        ("cores for 1e5 fits a day", f"{cost['fit_cores']:.1f}", "one process a core, started once"),
        ("memory", _bytes(cost["fit_cores"] * 1e9), "about 1 GB a process, assumed"),
    ]
    ratio = (
        f"Beside one process: {process['rows']:.0e} rows in {process['seconds']:.0f} s, "
        f"{process['peak_memory_gb']:.2f} GB; two workers read {scale['ratio']:.2f} times as many rows a second."
    )
    return "\n".join(
        [
            START,
            "",
            *_table(("1e12 logged requests", "", "from"), log),
            "",
            ratio,
            "",
            *_table(("1e5 deployments refitted", "", "from"), fit),
            "",
            END,
        ]
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, str, str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def page(text: str, reports: dict[str, Any]) -> str:
    """The page with what is computed between its markers."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + computed(reports) + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), measured()), encoding="utf-8")
