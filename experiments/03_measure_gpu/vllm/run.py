"""Drives a real vLLM on a GPU over draft lengths and acceptances with `diffspec collect`; no weights, no network.

    python run.py --out measured --hardware "1 my accelerator" --dry-run

Each pair (draft length, acceptance) is one server, started with dummy weights and imposed acceptance, measured over
six open-loop rates, and stopped. A pair that is complete is not measured again: run the same command to go on.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import make_models  # noqa: E402

START_SECONDS, READY_LIMIT = 120.0, 900.0  # expected, and at most
PROMPT, OUTPUT, WARM_UP = 256, 128, 20


class Server(NamedTuple):
    """One server: drafted tokens per step and P(next accepted | all before were), the same at every position."""

    draft_length: int
    acceptance: float

    @property
    def name(self) -> str:
        return f"k{self.draft_length}_a{100 * self.acceptance:.0f}" if self.draft_length else "k0"

    @property
    def marginal(self) -> list[float]:
        """P(first i drafted tokens accepted), i = 1..k: what vLLM calls synthetic_acceptance_rates."""
        return [round(self.acceptance**position, 6) for position in range(1, self.draft_length + 1)]


def servers(draft_lengths: Sequence[int], acceptances: Sequence[float]) -> list[Server]:
    """No speculation first, then from the middle draft length outwards, so that an early stop leaves a design."""
    middle = sorted((k for k in draft_lengths if k), key=lambda k: (abs(k - 4), k))
    plain = [Server(0, 0.0)] if 0 in draft_lengths else []
    return plain + [Server(k, acceptance) for k in middle for acceptance in acceptances]


def serve_command(server: Server, models: Path, options: argparse.Namespace) -> list[str]:
    command = [options.vllm, "serve", str(models / "verifier"), "--served-model-name", "verifier"]
    command += ["--host", "127.0.0.1", "--port", str(options.port), "--load-format", "dummy", "--dtype", "bfloat16"]
    command += ["--max-model-len", "4096", "--max-num-seqs", str(options.max_batch_size)]
    command += ["--max-num-batched-tokens", str(options.max_batched_tokens), "--no-enable-prefix-caching"]
    if server.draft_length:
        speculation = {
            "method": "draft_model",
            "model": str(models / "drafter"),
            "num_speculative_tokens": server.draft_length,
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": server.marginal,
        }
        command += ["--speculative-config", json.dumps(speculation)]
    return command


def plan(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """What `diffspec collect` measures on this server."""
    verifier, drafter = (make_models.COMMON | make_models.MODELS[name] for name in ("verifier", "drafter"))
    identity: dict[str, Any] = {
        "deployment": "vllm-dummy/llama-8b+1b",
        "run": server.name,
        "engine": options.engine,
        "hardware": options.hardware,
        "verifier": "Llama-8B class, random weights",
        "workload": "random tokens",
        "verifier_params": make_models.parameters(verifier),
        "kv_bytes_per_token": make_models.kv_bytes_per_token(verifier),
        "max_batch_size": options.max_batch_size,
        "max_batched_tokens": options.max_batched_tokens,
        "method": "draft_model" if server.draft_length else "none",
        "draft_length": server.draft_length,
        "rejection": "synthetic" if server.draft_length else "none",
    }
    if server.draft_length:
        identity |= {"drafter": "Llama-1B class, random weights", "drafter_params": make_models.parameters(drafter)}
        identity["drafter_layers"] = drafter["num_hidden_layers"]
    grid = [
        {"arrival_rate": rate, "prompt_length": PROMPT, "output_length": OUTPUT, "requests": requests(rate, options)}
        for rate in options.rates
    ]
    return {
        "identity": identity,
        "server": {"url": f"http://127.0.0.1:{options.port}", "model": "verifier", "metrics": True},
        "limits": {
            "max_rate": max(options.rates),
            "max_requests": 2 * sum(entry["requests"] + WARM_UP for entry in grid),  # warm-ups grow with latency
            "max_concurrency": 4 * options.max_batch_size,
        },
        "measure": {"warmup_requests": WARM_UP, "most_seconds": 3.0 * options.seconds, "seed": options.seed},
        "prompts": {"kind": "token_ids", "vocabulary": make_models.VOCABULARY - 1000},
        "grid": grid,
    }


def requests(rate: float, options: argparse.Namespace) -> int:
    """Requests of about `seconds` of arrivals, at least 100."""
    return max(100, round(rate * options.seconds))


def collect_command(folder: Path, options: argparse.Namespace, written: dict[str, Any]) -> list[str]:
    limits = written["limits"]
    command = [options.diffspec, "collect", str(folder / "plan.yaml"), "--url", written["server"]["url"]]
    command += ["--out", str(folder), "--max-rate", f"{limits['max_rate']:g}"]
    return [*command, "--max-requests", str(limits["max_requests"])]


def expected_seconds(options: argparse.Namespace) -> float:
    """Start of a server, and its cells: arrivals, warm-up and drain."""
    return START_SECONDS + sum((requests(rate, options) + WARM_UP) / rate + 10.0 for rate in options.rates)


@contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """The server while the block runs; its whole process group is stopped afterwards."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(
            command, env=os.environ | offline, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_until_ready(server, port, log)
            yield
        finally:
            stop(server)


def wait_until_ready(server: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + READY_LIMIT
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1.0)
    reason = "did not answer in time" if server.poll() is None else f"stopped with status {server.returncode}"
    raise RuntimeError(f"vLLM {reason}; the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-20:]))


def stop(server: subprocess.Popen, patience: float = 30.0) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, sign)
            server.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def numbers(kind: type) -> Any:
    """A parser of comma-separated numbers."""
    return lambda text: [kind(part) for part in text.split(",")]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of models, plans, logs and traces")
    parser.add_argument("--hardware", default="1 GPU", help="what the tables say about the machine")
    parser.add_argument("--engine", default="vLLM", help="name and version for the tables")
    parser.add_argument("--draft-lengths", type=numbers(int), default=list(range(8)))
    parser.add_argument("--acceptances", type=numbers(float), default=[0.8, 0.6, 0.9], help="conditional, per position")
    parser.add_argument("--rates", type=numbers(float), default=[2.0, 8.0, 16.0, 24.0, 32.0, 40.0], help="[req/s]")
    parser.add_argument("--seconds", type=float, default=30.0, help="arrivals measured at each rate [s]")
    parser.add_argument("--max-batch-size", type=int, default=128)
    parser.add_argument("--max-batched-tokens", type=int, default=2048)
    parser.add_argument("--port", type=int, default=8011)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no server that may end later")
    parser.add_argument("--vllm", default="vllm", help="the vllm command")
    parser.add_argument("--diffspec", default="diffspec", help="the diffspec command")
    parser.add_argument(
        "--dry-run", action="store_true", help="write models and plans, print the commands, run nothing"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    options.out = options.out.resolve()
    models, begun, failed = options.out / "models", time.monotonic(), []
    make_models.make(models)
    for server in servers(options.draft_lengths, options.acceptances):
        folder = options.out / server.name
        folder.mkdir(exist_ok=True)
        written = plan(server, options)
        (folder / "plan.yaml").write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
        serve, collect = serve_command(server, models, options), collect_command(folder, options, written)
        done = folder / "done"
        if options.dry_run:
            print(f"{shlex.join(serve)}\n{shlex.join(collect)}")
            continue
        if done.exists():
            continue
        if time.monotonic() - begun + expected_seconds(options) > options.budget_seconds:
            print(f"budget spent before {server.name}: run the same command again", file=sys.stderr)
            break
        print(f"[{time.monotonic() - begun:6.0f} s] {server.name}", file=sys.stderr, flush=True)
        try:
            with running(serve, options.port, folder / "vllm.log"):
                subprocess.run(collect, check=True)
            done.touch()
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            failed.append(server.name)
            print(f"{server.name} failed: {error}", file=sys.stderr)
    if options.dry_run:
        count, each = len(servers(options.draft_lengths, options.acceptances)), expected_seconds(options)
        print(f"# {count} servers, about {each:.0f} s each, {count * each / 3600:.1f} h in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
