# ruff: noqa: E402
"""The benchmark suite: everything that diffspec does, timed, beside its peers. One command:

    python experiments/09_speed/run.py [--only NAME,...] [--quick] [--all] [--peers FOLDER] [--out FOLDER]

prints a table and writes suite.json, suite.md and suite.png beside this file. Parts: configuration, fit, joint, policy,
simulation, log, scaling, commands, peers_latency, peers_queues, peers_inprocess, stored. With --only, the other parts
of suite.json stay what they are; --quick (smaller sizes, fewer repeats) writes to a temporary folder. Peers get
environments of their own in FOLDER (default: temporary; installing them takes minutes and about 2 GB), a peer that does
not install or answer keeps its row with the last line of its error. The long scripts (a hundred million rows, fleets of
fits, the limit of this machine) are listed with the figures they stored; --all runs them first.

Compile time is XLA's alone and counted apart, the first call holds tracing too, later calls are least and median of
repeats; comparisons run in turns. Every part runs in a process of its own and keeps the load of the machine before and
after.
"""

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
import peer_runs
from measure import last_change, machine
from suite_report import draw, report

OWN = ("configuration", "fit", "joint", "policy", "simulation", "log", "scaling")
PARTS = (*OWN, "commands", *peer_runs.PARTS, "stored")
STORED = ("steady_state", "limit", "simulator", "request_table", "log_scale", "engines", "sketches", "fleet")
LONG = {
    "limit": ["limit.py"],
    "fleet": ["fleet.py", "--traces", "4", "--rounds", "1"],
    "log_scale": ["log_scale.py"],
    "request_table": ["request_table.py"],
}
Say = Callable[[str, float], None]


def child(script: str, arguments: list[str], say: Say) -> dict[str, Any]:
    """What a script prints, in a process of its own; its lines PROGRESS move the bar."""
    command = [sys.executable, str(HERE / script), *arguments]
    given = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    ran = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given)
    assert ran.stderr is not None and ran.stdout is not None
    told = ""
    for line in ran.stderr:
        if line.startswith("PROGRESS "):
            _, share, label = line.rstrip().split(" ", 2)
            say(label, float(share))
        else:
            told = line.rstrip() or told
    answer = ran.stdout.read()
    if ran.wait():
        raise SystemExit(f"{script} {' '.join(arguments)}: exit code {ran.returncode}: {told}")
    return json.loads(answer.strip().splitlines()[-1])


def stored(say: Say, run_all: bool) -> dict[str, Any]:
    """The figures of the long scripts: stored with their date and commit, or fresh."""
    if run_all:
        for number, arguments in enumerate(LONG.values()):
            say(arguments[0], number / len(LONG))
            subprocess.run([sys.executable, str(HERE / arguments[0]), *arguments[1:]], check=True, capture_output=True)
    told = {name: json.loads((HERE / f"{name}.json").read_text(encoding="utf-8")) for name in STORED}
    rows = {}
    for name, text in key_figures(told).items():
        origin = {"date": "now", "commit": ""} if run_all and name in LONG else last_change(HERE / f"{name}.json")
        rows[name] = {"told": text} | origin
    return {"rows": rows}


def key_figures(told: dict[str, Any]) -> dict[str, str]:
    """The figures of each stored script in a few words."""
    limit = {(row["program"], row["dtype"]): row for row in told["limit"]["programs"]}
    value, both = limit["value", "float64"], limit["value and gradient", "float64"]
    fleet, engines, table, log = (told[name] for name in ("fleet", "engines", "request_table", "log_scale"))
    sketch = next(figures for name, figures in told["sketches"].items() if name.startswith("DDSketch"))
    return {
        "steady_state": f"{told['steady_state']['value']['solves_per_s']:.3g} solves/s, "
        f"{told['steady_state']['speedup_over_brentq']:.3g} times a brentq loop",
        "limit": f"{value['devices']['times_the_limit']:.3g} times the limit of this machine, with gradients "
        f"{both['devices']['times_the_limit']:.3g}; whole {value['whole']['times_the_limit']:.3g} and "
        f"{both['whole']['times_the_limit']:.3g}",
        "simulator": f"{told['simulator']['sequence_steps'][1]['sequence_steps_per_second']:.3g} sequence-steps/s",
        "request_table": f"{table['log']['rows_per_s']:.3g} rows/s of {table['rows']:.0e}, "
        f"{table['log']['peak_memory_gb']:.2g} GB",
        "log_scale": f"{log['dask']['rows_per_s']:.3g} rows/s of {log['rows']:.0e} on two workers, "
        f"{log['dask']['peak_memory_gb']:.2g} GB",
        "engines": f"four million rows: Dask {engines['dask']['all_s']:.3g} s, Ray tasks "
        f"{engines['ray tasks']['all_s']:.3g} s, Ray Data {engines['ray data']['all_s']:.3g} s",
        "sketches": f"DDSketch, largest error of a percentile: {sketch['largest_error']:.2g}",
        "fleet": f"{fleet['fits'][-1]['fits_per_hour']:.3g} fits/hour with {fleet['fits'][-1]['processes']} processes; "
        f"{fleet['optimised'][-1]['deployments']:,} deployments optimised in {fleet['optimised'][-1]['seconds']:.3g} s",
    }


def measured(name: str, work: Path, peers: Path, quick: bool, run_all: bool, say: Say) -> dict[str, Any]:
    """One part, with when and under which load it was measured."""
    before, start = os.getloadavg(), time.perf_counter()
    flags = [str(work), *(["--quick"] if quick else [])]
    if name in OWN:
        found = child("parts.py", [name, *flags], say)
    elif name == "commands":
        if not (work / "model.json").exists():
            child("parts.py", ["fit", str(work), "--quick"], say)
        found = child("commands.py", flags, say)
    elif name == "stored":
        found = stored(say, run_all)
    else:
        found = peer_runs.PARTS[name](peers, quick, say)
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    told = {"when": when, "commit": last_change()["commit"], "seconds": time.perf_counter() - start}
    return told | {"load_average": [before[0], os.getloadavg()[0]]} | found


@contextlib.contextmanager
def bar() -> Iterator[Say]:
    """A bar on standard error over all parts; plain lines where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda label, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as shown:
        task = shown.add_task("suite", total=1.0)
        yield lambda label, share: shown.update(task, description=label, completed=share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME,...", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--peers", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep the fitted model there, for another --only")
    asked = parser.parse_args()
    chosen = PARTS if asked.only is None else tuple(asked.only.split(","))
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        parser.error(f"--only: got {', '.join(unknown)}; allowed: {', '.join(PARTS)}")
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        work, peers = asked.work or temporary / "work", asked.peers or temporary / "peers"
        work.mkdir(parents=True, exist_ok=True)
        peers.mkdir(parents=True, exist_ok=True)
        out = asked.out or (Path(tempfile.mkdtemp(prefix="suite-")) if asked.quick else HERE)
        out.mkdir(parents=True, exist_ok=True)
        target = out / "suite.json"
        before = json.loads(target.read_text(encoding="utf-8")) if target.exists() and asked.only else {"parts": {}}
        parts = before["parts"]
        say = stack.enter_context(bar())
        for number, name in enumerate(chosen):

            def share(label: str, part: float, number=number, name=name) -> None:
                say(f"{name}: {label}", (number + part) / len(chosen))

            share("", 0.0)
            parts[name] = measured(name, work, peers.resolve(), asked.quick, asked.all, share)
            if not sys.stderr.isatty():
                print(f"{name}: {parts[name]['seconds']:.0f} s", file=sys.stderr, flush=True)
            suite = {"machine": machine(), "quick": asked.quick}
            suite["parts"] = {name: parts[name] for name in PARTS if name in parts}
            target.write_text(json.dumps(suite, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (out / "suite.md").write_text(report(suite), encoding="utf-8")
        if "scaling" in parts:
            draw(suite, out / "suite.png")
    print(report(suite))
    print(f"wrote {', '.join(str(path) for path in sorted(out.glob('suite.*')))}", file=sys.stderr)


if __name__ == "__main__":
    main()
