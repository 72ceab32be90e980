"""`diffspec collect` and `vllm bench serve` against one server, in turns: do their means agree?

    python compare_clients.py MODELS             (with vLLM's Python; --diffspec names the command if not on the path)

Each round runs both clients at each load, the order changing from round to round. A client's mean over the rounds has a
95 % confidence interval from the spread of its rounds (Student's t); the clients agree where the interval of the
difference of paired rounds holds zero. Arrivals of the open loop are evenly spaced, since two clients draw two
Poisson streams, and the rate a short stream really offers differs from its nominal one by several per cent.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from campaign import FALLING, USUAL, Arm
from run import on_front_core
from serve import running_server

T_95 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}
LOADS = {
    "8 in flight": {"concurrency": 8, "requests": 160},
    "4 req/s": {"arrival_rate": 4.0, "requests": 160, "arrival_process": "constant"},
}
METRICS = ("ttft", "itl", "tpot", "e2e")


def with_collect(url: str, load: dict, seed: int, diffspec: str, folder: Path) -> dict[str, float]:
    """Means [s] of one run of `diffspec collect`."""
    plan = {
        "limits": {"max_rate": 20, "max_requests": 2000},
        "measure": {"warmup_requests": 8, "seed": seed},
        "prompts": {"vocabulary": 4000},
        "grid": [load | {"prompt_length": 64, "output_length": 64}],
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    out = folder / "out"
    command = [diffspec, "collect", str(folder / "plan.yaml"), "--url", url, "--out", str(out), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, preexec_fn=on_front_core)
    cell = json.loads(done.stdout)["cells"][0]
    shutil.rmtree(out)
    return {metric: cell[f"{metric}_mean"] for metric in METRICS}


def with_vllm(url: str, load: dict, seed: int, verifier: Path, folder: Path) -> dict[str, float]:
    """Means [s] of one run of `vllm bench serve`."""
    port = url.rsplit(":", 1)[1]
    command = [str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--port", port, "--seed", str(seed)]
    command += ["--model", verifier.name, "--tokenizer", str(verifier), "--dataset-name", "random"]
    command += ["--random-input-len", "64", "--random-output-len", "64", "--random-range-ratio", "0", "--ignore-eos"]
    command += ["--temperature", "0", "--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm"]
    command += ["--num-prompts", str(load["requests"] + 8), "--save-result", "--result-dir", str(folder)]
    command += ["--result-filename", "bench.json"]
    if "concurrency" in load:
        command += ["--max-concurrency", str(load["concurrency"])]
    else:
        command += ["--request-rate", str(load["arrival_rate"]), "--burstiness", "1e6"]  # gaps as good as constant
    subprocess.run(command, check=True, capture_output=True, preexec_fn=on_front_core)
    found = json.loads((folder / "bench.json").read_text())
    return {metric: found[f"mean_{'e2el' if metric == 'e2e' else metric}_ms"] / 1000 for metric in METRICS}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval."""
    half = T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path)
    parser.add_argument("--diffspec", default="diffspec")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    options = parser.parse_args()
    arm = Arm("k4", "small", [], USUAL, 4, FALLING)
    verifier = options.models / arm.verifier
    runs: dict[str, dict[str, list[dict[str, float]]]] = {name: {"collect": [], "vllm": []} for name in LOADS}
    with (
        tempfile.TemporaryDirectory() as name,
        running_server(
            verifier, options.models / USUAL, 4, arm.marginal(), port=options.port, log=Path(name) / "server.log"
        ) as url,
    ):
        folder = Path(name)
        for turn in range(options.rounds):
            for load_name, load in LOADS.items():
                for client in ("collect", "vllm") if turn % 2 == 0 else ("vllm", "collect"):
                    if client == "collect":
                        means = with_collect(url, load, turn, options.diffspec, folder)
                    else:
                        means = with_vllm(url, load, turn, verifier, folder)
                    runs[load_name][client].append(means)
    report = {}
    for load_name, clients in runs.items():
        for metric in METRICS:
            ours, theirs = ([means[metric] for means in clients[client]] for client in ("collect", "vllm"))
            (a, da), (b, db) = interval(ours), interval(theirs)
            difference, dd = interval([x - y for x, y in zip(ours, theirs, strict=True)])
            report[f"{load_name}, {metric}"] = {"collect": [a, da], "vllm": [b, db], "difference": [difference, dd]}
            verdict = "agree" if abs(difference) <= dd else "DIFFER"
            print(
                f"{load_name:12s} {metric:5s} collect {1e3 * a:8.1f} ± {1e3 * da:6.1f} ms   vllm {1e3 * b:8.1f} ± "
                f"{1e3 * db:6.1f} ms   difference {difference / b:+.1%} ± {dd / b:.1%}  {verdict}"
            )
    (options.out / "compare_clients.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
