"""Starts one vLLM server on two CPU cores, with or without speculative decoding.

    python serve.py --verifier models/small --drafter models/imposed_4m -k 4 --acceptance 0.95,0.81,0.57,0.34

serves until interrupted; `running_server` is the same as a context manager. The worker that computes the models has one
core to itself; the API server and the scheduler, and the client if its caller puts it there, share the other.
"""

import argparse
import ctypes.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
FRONT_CORE, WORKER_CORE = 0, 1
READY_LIMIT = 300.0  # seconds
KV_CACHE_GIB = 2


def speculative_config(drafter: Path, draft_length: int, acceptance: Sequence[float] | None) -> dict[str, object]:
    """vLLM's --speculative-config; `acceptance`, if given, is imposed: P(first i draft tokens accepted), i = 1..k."""
    config: dict[str, object] = {"method": "draft_model", "model": str(drafter), "num_speculative_tokens": draft_length}
    if acceptance is not None:
        config |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": list(acceptance)}
    return config


def serve_command(
    verifier: Path,
    drafter: Path | None,
    draft_length: int,
    acceptance: Sequence[float] | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    port: int,
    seed: int,
) -> list[str]:
    """`vllm serve` with what this experiment fixes: float32, eager, no prefix cache, per-request metrics."""
    beside_python = Path(sys.executable).with_name("vllm")
    command = [str(beside_python) if beside_python.exists() else "vllm", "serve", str(verifier)]
    command += ["--served-model-name", verifier.name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching", "--enable-per-request-metrics"]
    command += ["--max-num-seqs", str(max_num_seqs), "--max-num-batched-tokens", str(max_num_batched_tokens)]
    command += ["--max-model-len", str(max_model_len), "--no-enable-log-requests", "--seed", str(seed)]
    if drafter is not None and draft_length > 0:
        command += ["--speculative-config", json.dumps(speculative_config(drafter, draft_length, acceptance))]
        command += ["--per-request-spec-decode-metrics", "detailed"]
    return command


def serve_environment(plugin_folder: Path) -> dict[str, str]:
    """The environment of the server: where its worker computes, no look at a hub, faster malloc and OpenMP if there."""
    openmp = Path(sys.prefix, "lib", "libiomp5.so")
    preload = [ctypes.util.find_library("tcmalloc_minimal"), str(openmp) if openmp.exists() else None]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(plugin_folder), os.environ.get("PYTHONPATH")])),
        "LD_PRELOAD": ":".join(filter(None, [*preload, os.environ.get("LD_PRELOAD")])),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": str(WORKER_CORE),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def announce_plugin(folder: Path) -> None:
    """Put imposed_acceptance.py into the folder as a plugin that every process of vLLM finds there."""
    shutil.copy(HERE / "imposed_acceptance.py", folder)
    metadata = folder / "imposed_acceptance-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: imposed-acceptance\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nimposed_acceptance = imposed_acceptance:register\n"
    )


def wait_until_ready(server: subprocess.Popen, port: int, log: Path) -> None:
    """Return once /health answers; raise with the log's end if the server stops first or takes too long."""
    deadline = time.monotonic() + READY_LIMIT
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    reason = "did not answer in time" if server.poll() is None else f"stopped with status {server.returncode}"
    raise RuntimeError(f"vLLM {reason}; the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-30:]))


def processes_of_session(session: int) -> Iterator[Path]:
    """/proc folders of the processes that were started by the leader of this session."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # gone meanwhile
        if int(fields[3]) == session:
            yield folder


def keep_front_off_the_worker(session: int) -> None:
    """Put every thread of the server's processes on its core: the worker's on one, all others' on the other.

    vLLM binds the worker's computing threads only; without this the scheduler and the API server take turns there too.
    """
    for folder in processes_of_session(session):
        title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        core = WORKER_CORE if "Worker" in title else FRONT_CORE
        for thread in (folder / "task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


@contextmanager
def running_server(
    verifier: Path,
    drafter: Path | None = None,
    draft_length: int = 0,
    acceptance: Sequence[float] | None = None,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 2048,
    max_model_len: int = 2048,
    port: int = 8000,
    log: Path = Path("vllm.log"),
    seed: int = 0,
) -> Iterator[str]:
    """Serve while the block runs; gives the server's address.

    `acceptance` imposes P(first i draft tokens accepted) for i = 1..draft_length, not increasing; None with a drafter
    means standard, lossless rejection. `seed` decides the draws of imposed acceptance: servers of one draft length and
    one seed take the very same draws, so their acceptance errs alike; another seed errs independently.
    """
    with tempfile.TemporaryDirectory() as plugin_folder, log.open("w") as output:
        announce_plugin(Path(plugin_folder))
        server = subprocess.Popen(
            serve_command(
                verifier,
                drafter,
                draft_length,
                acceptance,
                max_num_seqs,
                max_num_batched_tokens,
                max_model_len,
                port,
                seed,
            ),
            env=serve_environment(Path(plugin_folder)),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_until_ready(server, port, log)
            keep_front_off_the_worker(server.pid)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(server)


def stop(server: subprocess.Popen, patience: float = 20.0) -> None:
    """End the server and all processes it started: politely, then by force."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, sign)
            server.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def rates(text: str) -> list[float]:
    """Comma-separated numbers."""
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Start one vLLM server on two CPU cores and serve until interrupted.")
    parser.add_argument("--verifier", type=Path, required=True)
    parser.add_argument("--drafter", type=Path)
    parser.add_argument("-k", "--draft-length", type=int, default=0)
    parser.add_argument("--acceptance", type=rates, help="imposed P(first i draft tokens accepted), such as .9,.8,.7")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--log", type=Path, default=Path("vllm.log"))
    parser.add_argument("--seed", type=int, default=0, help="of the draws of imposed acceptance")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill, too, stops the server
    start = time.monotonic()
    try:
        with running_server(**vars(arguments)) as address:
            print(f"{address} ready after {time.monotonic() - start:.0f} s", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass
