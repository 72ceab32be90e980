# ruff: noqa: E402
"""aiconfigurator: `cli_estimate`, its public estimate, in its static modes (one phase, no scheduling), and `run_static`
of a session that is kept, which is what its own sweeps call. vLLM on an H100 SXM, its own measured tables."""

import logging
import time

start = time.perf_counter()
import warnings
from importlib.metadata import version

import question

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
from aiconfigurator.cli.api import cli_estimate

imported = time.perf_counter() - start
MODEL, SYSTEM, BACKEND = "meta-llama/Meta-Llama-3.1-8B", "h100_sxm", "vllm"


def estimate(mode: str, batch: int, tokens: int):
    return cli_estimate(MODEL, SYSTEM, mode=mode, backend_name=BACKEND, isl=tokens, osl=2, batch_size=batch)


def decode(batch: int, context: int) -> float:
    return estimate("static_gen", batch, context).tpot / 1e3


def prefill(prompt: int) -> float:
    return estimate("static_ctx", 1, prompt).ttft / 1e3


def kept_session():
    """A session as `cli_estimate` builds it, for many runs."""
    from aiconfigurator.sdk.backends.factory import get_backend
    from aiconfigurator.sdk.config import ModelConfig, RuntimeConfig
    from aiconfigurator.sdk.inference_session import InferenceSession
    from aiconfigurator.sdk.models import get_model
    from aiconfigurator.sdk.perf_database import get_database_view, get_latest_database_version

    latest = get_latest_database_version(system=SYSTEM, backend=BACKEND)
    database = get_database_view(SYSTEM, BACKEND, latest, allow_missing_data=False, database_mode="SILICON")
    session = InferenceSession(get_model(MODEL, ModelConfig(), BACKEND), database, get_backend(BACKEND))

    def run(batch: int, context: int) -> float:
        asked = RuntimeConfig(batch_size=batch, isl=context, osl=2)
        return float(session.run_static(runtime_config=asked, mode="static_gen", stride=32).get_result_dict()["tpot"])

    return run


def session_told() -> dict:
    """Seconds of one run of a kept session, or why there is none."""
    try:
        run = kept_session()
        run(*question.DECODE[0])
        return question.calls(run, 1.0) | {"decode_s": [run(*at) / 1e3 for at in question.DECODE]}
    except Exception as error:  # an interface that is not public: told, not hidden
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    question.tell(version("aiconfigurator"), imported, decode, prefill, seconds=0.0, session=session_told)
