"""Drives a real vLLM on a GPU over draft lengths and acceptances with `diffspec collect`; no weights, no network.

    python run.py --out measured --hardware "1 my accelerator" --dry-run

Each (method, draft length, acceptance) is one server, started with dummy weights and imposed acceptance, measured over
six open-loop rates, and stopped. A server that is complete is not measured again: run the same command to go on.
`--together` starts all servers at once, since starting takes longer than measuring, and measures one after the other
while the rest idle; the device must hold them all.
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import make_models  # noqa: E402

START_SECONDS = 120.0  # expected
WARM_UP = 20
DRAFTERS = {
    "draft_model": ("drafter", "Llama-1B class, random weights"),
    "eagle": ("eagle", "EAGLE head of one layer, random weights"),
}


class Server(NamedTuple):
    """One server: drafted tokens per step, P(next accepted | all before were), the same at every position, and who
    drafts."""

    draft_length: int
    acceptance: float
    method: str = "draft_model"

    @property
    def name(self) -> str:
        return f"{self.method}_k{self.draft_length}_a{100 * self.acceptance:.0f}" if self.draft_length else "k0"

    @property
    def marginal(self) -> list[float]:
        """P(first i drafted tokens accepted), i = 1..k: what vLLM calls synthetic_acceptance_rates."""
        return [round(self.acceptance**position, 6) for position in range(1, self.draft_length + 1)]


def parse_server(text: str) -> Server:
    """`none`, or METHOD:DRAFT_LENGTH:ACCEPTANCE such as eagle:3:0.8."""
    if text == "none":
        return Server(0, 0.0, "none")
    method, draft_length, acceptance = text.split(":")
    if method not in DRAFTERS:
        raise ValueError(f"{method}: one of {', '.join(DRAFTERS)}")
    return Server(int(draft_length), float(acceptance), method)


def servers(options: argparse.Namespace) -> list[Server]:
    """No speculation first, then from the middle draft length outwards, so that an early stop leaves a design."""
    if options.servers:
        return options.servers
    middle = sorted((k for k in options.draft_lengths if k), key=lambda k: (abs(k - 4), k))
    plain = [Server(0, 0.0, "none")] if 0 in options.draft_lengths else []
    return plain + [Server(k, acceptance, options.method) for k in middle for acceptance in options.acceptances]


def serve_command(server: Server, models: Path, options: argparse.Namespace, port: int) -> list[str]:
    command = [options.vllm, "serve", str(models / "verifier"), "--served-model-name", "verifier"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--load-format", "dummy", "--dtype", "bfloat16"]
    command += ["--max-model-len", "4096", "--max-num-seqs", str(options.max_batch_size)]
    command += ["--max-num-batched-tokens", str(options.max_batched_tokens), "--no-enable-prefix-caching"]
    if options.together:  # no server may take all of the memory
        tokens = options.max_batch_size * (options.prompt + options.output + 64)
        caches = [make_models.kv_bytes_per_token(config) for config in configs(server)]
        command += ["--kv-cache-memory-bytes", str(tokens * sum(caches)), "--gpu-memory-utilization", "0.1"]
    if server.draft_length:
        speculation = {
            "method": server.method,
            "model": str(models / DRAFTERS[server.method][0]),
            "num_speculative_tokens": server.draft_length,
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": server.marginal,
        }
        command += ["--speculative-config", json.dumps(speculation)]
    return command


def configs(server: Server) -> list[dict[str, Any]]:
    """Of the verifier and, where there is one, the drafter."""
    names = ["verifier", *([DRAFTERS[server.method][0]] if server.draft_length else [])]
    return [make_models.COMMON | make_models.MODELS[name] for name in names]


def plan(server: Server, options: argparse.Namespace, port: int) -> dict[str, Any]:
    """What `diffspec collect` measures on this server."""
    verifier, *drafters = configs(server)
    identity: dict[str, Any] = {
        "deployment": "vllm-dummy/llama-8b",
        "run": server.name,
        "engine": options.engine,
        "hardware": options.hardware,
        "verifier": "Llama-8B class, random weights",
        "workload": "random tokens",
        "verifier_params": make_models.parameters(verifier),
        "kv_bytes_per_token": make_models.kv_bytes_per_token(verifier),
        "max_batch_size": options.max_batch_size,
        "max_batched_tokens": options.max_batched_tokens,
        "method": server.method,
        "draft_length": server.draft_length,
        "rejection": "synthetic" if server.draft_length else "none",
    }
    for drafter in drafters:
        identity |= {"drafter": DRAFTERS[server.method][1], "drafter_params": make_models.parameters(drafter)}
        identity["drafter_layers"] = drafter["num_hidden_layers"]
    grid = [
        {
            "arrival_rate": rate,
            "prompt_length": options.prompt,
            "output_length": options.output,
            "requests": requests(rate, options),
        }
        for rate in options.rates
    ]
    return {
        "identity": identity,
        "server": {"url": f"http://127.0.0.1:{port}", "model": "verifier", "metrics": True},
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
    """Requests of about `seconds` of arrivals, at least `least_requests`."""
    return max(options.least_requests, round(rate * options.seconds))


def collect_command(folder: Path, options: argparse.Namespace, written: dict[str, Any]) -> list[str]:
    limits = written["limits"]
    command = [options.diffspec, "collect", str(folder / "plan.yaml"), "--url", written["server"]["url"]]
    command += ["--out", str(folder / "trace"), "--max-rate", f"{limits['max_rate']:g}"]
    return [*command, "--max-requests", str(limits["max_requests"])]


def measuring_seconds(options: argparse.Namespace) -> float:
    """The cells of a server: arrivals, warm-up and drain."""
    return sum((requests(rate, options) + WARM_UP) / rate + 3.0 for rate in options.rates)


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """The server while the block runs; its whole process group is stopped afterwards."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(
            command, env=os.environ | offline, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield server
        finally:
            stop(server)


def wait_until_ready(server: subprocess.Popen, port: int, log: Path, limit: float) -> None:
    deadline = time.monotonic() + limit
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                break
            time.sleep(1.0)
    reason = "did not answer in time" if server.poll() is None else f"stopped with status {server.returncode}"
    raise RuntimeError(f"vLLM {reason}; the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-20:]))


def stop(server: subprocess.Popen, patience: float = 15.0) -> None:
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
    parser.add_argument(
        "--servers", type=parse_server, nargs="+", help="none and METHOD:DRAFT_LENGTH:ACCEPTANCE, instead of the next"
    )
    parser.add_argument("--method", choices=tuple(DRAFTERS), default="draft_model")
    parser.add_argument("--draft-lengths", type=numbers(int), default=list(range(8)))
    parser.add_argument("--acceptances", type=numbers(float), default=[0.8, 0.6, 0.9], help="conditional, per position")
    parser.add_argument("--rates", type=numbers(float), default=[2.0, 8.0, 16.0, 24.0, 32.0, 40.0], help="[req/s]")
    parser.add_argument("--seconds", type=float, default=30.0, help="arrivals measured at each rate [s]")
    parser.add_argument("--least-requests", type=int, default=100, help="measured at every rate, at least")
    parser.add_argument("--prompt", type=int, default=256, help="prompt length [tok]")
    parser.add_argument("--output", type=int, default=128, help="output length [tok]")
    parser.add_argument("--together", action="store_true", help="start all servers at once, measure one by one")
    parser.add_argument("--max-batch-size", type=int, default=128)
    parser.add_argument("--max-batched-tokens", type=int, default=2048)
    parser.add_argument("--port", type=int, default=8011)
    parser.add_argument("--ready-seconds", type=float, default=900.0, help="longest start of a server")
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

    def tell(text: str) -> None:
        print(f"[{time.monotonic() - begun:6.0f} s] {text}", file=sys.stderr, flush=True)

    def left() -> float:
        return options.budget_seconds - (time.monotonic() - begun)

    with ExitStack() as stack:
        started: dict[Server, tuple[subprocess.Popen, ExitStack, float]] = {}

        def start(server: Server, serve: list[str]) -> None:
            own = stack.enter_context(ExitStack())
            process = own.enter_context(running(serve, options.out / server.name / "vllm.log"))
            started[server] = process, own, time.monotonic()

        def ready(server: Server, port: int) -> None:
            process, _, since = started[server]
            limit = min(options.ready_seconds - (time.monotonic() - since), left())
            wait_until_ready(process, port, options.out / server.name / "vllm.log", limit)

        todo = []
        for number, server in enumerate(servers(options)):
            folder, port = options.out / server.name, options.port + (number if options.together else 0)
            folder.mkdir(exist_ok=True)
            written = plan(server, options, port)
            (folder / "plan.yaml").write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
            serve = serve_command(server, models, options, port)
            collect = collect_command(folder, options, written)
            if options.dry_run:
                print(f"{shlex.join(serve)}\n{shlex.join(collect)}")
            elif not (folder / "done").exists():
                todo.append((server, port, serve, collect))
        if options.together:
            for server, _, serve, _ in todo:
                start(server, serve)
        for server, port, serve, collect in todo:
            expected = measuring_seconds(options) + (0.0 if options.together else START_SECONDS)
            if expected > left():
                tell(f"budget spent before {server.name}: run the same command again")
                break
            if server not in started:
                start(server, serve)
            try:
                ready(server, port)
                for other, other_port, _, _ in todo if options.together else []:
                    with suppress(RuntimeError):  # one that still starts would disturb the measurement
                        ready(other, other_port)
                tell(f"{server.name} is measured")
                subprocess.run(collect, check=True, timeout=max(left(), 1.0) if left() < float("inf") else None)
                (options.out / server.name / "done").touch()
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                failed.append(server.name)
                tell(f"{server.name} failed: {error}")
            if not options.together:  # idle ones are stopped at the end
                started[server][1].close()
    if options.dry_run:
        count, each = len(servers(options)), START_SECONDS + measuring_seconds(options)
        print(f"# {count} servers, about {each:.0f} s each, {count * each / 3600:.1f} h in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
