# ruff: noqa: E402
"""Peers in environments of their own: made from the package index, asked the same question, in turns.

A peer that does not install, or does not answer, keeps its row, with the last line of its error.
"""

import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))
from question import DECODE, PREFILL

REPOSITORY = HERE.parents[1]
ROUNDS, INSTALL_TIMEOUT, RUN_TIMEOUT = 2, 900, 400


class Peer(NamedTuple):
    """``program`` in peers/, and what to install for it (none: it runs here)."""

    program: str
    packages: tuple[str, ...] = ()


LATENCY = {
    "diffspec": Peer("diffspec_peer.py"),
    "roofline loop in numpy (LLM-Viewer-like)": Peer("roofline_peer.py"),
    "llm-analysis": Peer("llm_analysis_peer.py", ("llm-analysis==0.2.2",)),
    "genz-llm": Peer("genz_peer.py", ("genz-llm==0.0.16",)),
    "aiconfigurator": Peer("aiconfigurator_peer.py", ("aiconfigurator==0.12.0",)),
}
QUEUES = {
    "simpy": Peer("simpy_peer.py", ("simpy==4.1.2",)),
    "ciw": Peer("ciw_peer.py", ("ciw==3.2.7",)),
}
INPROCESS = Peer("inprocess_peer.py", ("optimistix==0.1.0", "optuna==5.0.0"))


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def environment(name: str, packages: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """The Python of a virtual environment with ``packages``, made where it is not there yet; else why not."""
    if not packages:
        return {"python": sys.executable}
    place = folder / name
    python, done = place / "bin" / "python", place / "installed.json"
    asked = list(packages)
    if done.exists() and json.loads(done.read_text())["packages"] == asked:
        return {"python": str(python)} | json.loads(done.read_text())
    start = time.perf_counter()
    try:
        subprocess.run(
            [sys.executable, "-m", "venv", "--clear", str(place)], check=True, capture_output=True, text=True
        )
        command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *asked]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT)
        if ran.returncode:
            return {"error": f"not installed: {last_line(ran.stderr)}"}
    except (subprocess.SubprocessError, OSError) as error:
        return {"error": f"not installed: {last_line(str(error))}"}
    told = {"packages": asked, "install_s": time.perf_counter() - start}
    done.write_text(json.dumps(told))
    return {"python": str(python)} | told


def answer(peer: Peer, found: dict[str, Any]) -> dict[str, Any]:
    """What the program of a peer prints, or the last line of its error."""
    if "error" in found:
        return {"error": found["error"]}
    given = {"STARTED": str(time.time()), "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    command = [found["python"], str(HERE / "peers" / peer.program)]
    try:
        ran = subprocess.run(command, env=os.environ | given, capture_output=True, text=True, timeout=RUN_TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {RUN_TIMEOUT} s"}
    if ran.returncode:
        return {"error": last_line(ran.stderr)}
    return json.loads(ran.stdout.strip().splitlines()[-1])


def least(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The least times of the rounds that answered; the error where none did."""
    good = [one for one in rounds if "error" not in one]
    if not good:
        return rounds[-1]
    best = dict(good[-1])
    for name in ("cold_s", "import_s", "first_call_s"):
        best[name] = min(one[name] for one in good)
    best["warm"] = min((one["warm"] for one in good), key=lambda warm: warm["min_s"])
    if best["batched"]:
        for number, entry in enumerate(best["batched"]):
            entry["s_per_configuration"] = min(one["batched"][number]["s_per_configuration"] for one in good)
    return best | {"rounds": len(good)}


Say = Callable[[str, float], None]


def latency(folder: Path, quick: bool, say: Say) -> dict[str, Any]:
    """Time per evaluated configuration, and the answers side by side, as information."""
    places = {}
    for number, (name, peer) in enumerate(LATENCY.items()):
        say(f"environment of {name}", 0.4 * number / len(LATENCY))
        places[name] = environment(name, peer.packages, folder)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in LATENCY}
    turns = 1 if quick else ROUNDS
    for turn in range(turns):
        for number, (name, peer) in enumerate(LATENCY.items()):
            say(name, 0.4 + 0.6 * (turn + number / len(LATENCY)) / turns)
            rounds[name].append(answer(peer, places[name]))
    told = {name: least(answers) | install_time(places[name]) for name, answers in rounds.items()}
    asked = {"model": "Llama-3.1-8B, bf16", "hardware": "H100 SXM", "decode": DECODE, "prefill": PREFILL}
    return {"peers": told, "question": asked}


def install_time(place: dict[str, Any]) -> dict[str, Any]:
    return {"install_s": place["install_s"]} if "install_s" in place else {}


def queues(folder: Path, quick: bool, say: Say) -> dict[str, Any]:
    """CPU time of general simulators on the same queues."""
    told = {}
    for number, (name, peer) in enumerate(QUEUES.items()):
        say(name, number / len(QUEUES))
        place = environment(name, peer.packages, folder)
        told[name] = answer(peer, place) | install_time(place)
    return {"peers": told}


def inprocess(folder: Path, quick: bool, say: Say) -> dict[str, Any]:
    """scipy, optimistix and Optuna in one process with diffspec, on the same code."""
    say("environment with optimistix and Optuna", 0.0)
    own = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    place = environment("inprocess", (*own, *INPROCESS.packages), folder)
    say("scipy, optimistix, Optuna", 0.3)
    return answer(INPROCESS, place) | install_time(place)


PARTS = {"peers_latency": latency, "peers_queues": queues, "peers_inprocess": inprocess}
