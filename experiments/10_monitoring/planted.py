"""Scrapes of /metrics of a simulated server with planted faults: what a monitor should and should not tell is known.

The server is the discrete-event simulation of a planted model (synthetic); the monitored model is that model, with a
stated misfit. Every segment of a scenario starts empty and is as long as asked; counters go on over segments.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffspec.acceptance import MeasuredAcceptance
from diffspec.fitting.deployment import FittedDeployment
from diffspec.fitting.forms import Scales, build_form
from diffspec.fitting.uncertainty import Uncertainty
from diffspec.simulating import Engine, Lane, draw_requests, run_lanes
from diffspec.workload import Workload

K, ACCEPTANCE, PROMPT, OUTPUT = 4, 0.75, 64, 64
MISFIT = 0.03
START = 1_790_000_000.0


def server(misfit: float = MISFIT) -> FittedDeployment:
    """The planted model, which says of itself that it misses ``misfit`` [log units] of each latency."""
    serving = build_form("affine", Scales(0.02, 0.08, 96.0, 64.0)).template
    # A prompt waits for half of the step under way, and for the one that it shares: as this simulated engine has it.
    serving = eqx.tree_at(lambda s: s.first_token_steps, serving, 1.5)
    columns = ("ttft_mean", "itl_mean", "e2e_mean")
    known = Uncertainty(
        method="laplace",
        paths=("step_time.verify_base",),
        covariance=np.full((1, 1), 1e-8),
        prior=np.ones(1),
        misfit=dict.fromkeys(columns, misfit),
        request_spread={"ttft_mean": 0.5, "itl_mean": 0.15, "e2e_mean": 0.2},
        degrees_of_freedom=30.0,
        inflation=dict.fromkeys(columns, 1.0),
    )
    spans = {
        "draft_lengths": [0, 2, K],
        "arrival_rate": [0.5, 8.0],
        "concurrency": [1.0, 16.0],
        "prompt_length": [PROMPT, PROMPT],
        "output_length": [OUTPUT, OUTPUT],
        "tokens_per_step": [2.0, 4.0],
    }
    return FittedDeployment(
        name="planted",
        form="affine",
        serving=serving,
        acceptance=MeasuredAcceptance((2, K), jnp.full((2, 32), ACCEPTANCE)),
        defaults={"max_batch_size": 64.0, "method": "draft_model", "drafter": "tiny"},
        measured=spans,
        quality={"rows": 9, "set_aside": {}, "metrics": {}, "forms": {}},
        uncertainty=known,
    )


@dataclass(frozen=True)
class Segment:
    """``seconds`` of load at ``rate`` [req/s] on a server whose steps last ``slow`` times as long as planted, with
    ``acceptance`` a draft position; ``draft_length`` 0: no speculation."""

    seconds: float
    rate: float = 3.0
    slow: float = 1.0
    acceptance: float = ACCEPTANCE
    draft_length: int = K


def lives(deployment: FittedDeployment, runs: list[list[Segment]], seed: int) -> list[dict[str, np.ndarray]]:
    """The requests of each of ``runs``, by event, with times from its start; segments of one slowness side by side."""
    random = np.random.default_rng(seed)
    places = [(run, number, segment) for run, segments in enumerate(runs) for number, segment in enumerate(segments)]
    found: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for slow in sorted({segment.slow for _, _, segment in places}):
        chosen = [place for place in places if place[2].slow == slow]
        step_time = jax.tree.map(lambda leaf: leaf, deployment.serving.step_time)
        if slow != 1.0:
            step_time = slowed(step_time, slow)
        lanes = []
        for _, _, segment in chosen:
            load = Workload(prompt_length=PROMPT, output_length=OUTPUT, arrival_rate=segment.rate)
            requests = draw_requests(load, max(int(1.2 * segment.rate * segment.seconds), 20), random)
            engine = Engine(
                segment.draft_length,
                (segment.acceptance,) * segment.draft_length,
                max_batch_size=64,
                request_overhead=float(deployment.serving.request_overhead),
            )
            lanes.append(Lane(requests, engine, seed=int(random.integers(2**31))))
        for (run, number, segment), result in zip(chosen, run_lanes(step_time, lanes), strict=True):
            kept = result.events["arrival_time"] < segment.seconds
            found[run, number] = {name: values[kept] for name, values in result.events.items()}
    told = []
    for run, segments in enumerate(runs):
        offset, parts = 0.0, []
        for number, segment in enumerate(segments):
            part = found[run, number]
            parts.append({name: v + offset if name.endswith("_time") else v for name, v in part.items()})
            offset += segment.seconds
        told.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return told


def slowed(step_time, factor: float):
    """A step time with every cost multiplied by ``factor``: all fields of the affine form are linear in its steps."""
    costs = {"verify_base", "verify_sequence", "verify_query", "verify_kv", "prefill_token"}
    names = [name for name in costs if hasattr(step_time, name)]
    grown = eqx.tree_at(
        lambda s: [getattr(s, name) for name in names], step_time, [factor * getattr(step_time, name) for name in names]
    )
    draft = jax.tree.map(lambda leaf: factor * leaf, step_time.draft)
    return eqx.tree_at(lambda s: s.draft, grown, draft)


def scrape_text(events: dict[str, np.ndarray], moment: float) -> str:
    """What /metrics of vLLM would say of these requests at ``moment`` [s from the start]."""
    arrived, scheduled = events["arrival_time"] <= moment, events["schedule_time"] <= moment
    first, done = events["first_token_time"] <= moment, events["completion_time"] <= moment
    label = '{engine="0",model_name="planted"}'
    ttft = (events["first_token_time"] - events["arrival_time"])[first]
    e2e = (events["completion_time"] - events["arrival_time"])[done]
    decode = (events["completion_time"] - events["first_token_time"])[done]
    steps = events["steps"][done]
    lines = [
        f"vllm:num_requests_running{label} {int((scheduled & ~done).sum())}",
        f"vllm:num_requests_waiting{label} {int((arrived & ~scheduled).sum())}",
        f'vllm:request_success_total{{engine="0",finished_reason="length",model_name="planted"}} {int(done.sum())}',
        f"vllm:generation_tokens_total{label} {int(events['output_tokens'][done].sum())}",
        f"vllm:prompt_tokens_total{label} {int(events['prompt_tokens'][done].sum())}",
    ]
    if events["drafted_tokens"].any():
        lines += [
            f"vllm:spec_decode_num_drafts_total{label} {int(steps.sum())}",
            f"vllm:spec_decode_num_draft_tokens_total{label} {int(steps.sum()) * K}",
            f"vllm:spec_decode_num_accepted_tokens_total{label} {int(events['accepted_tokens'][done].sum())}",
        ]
    for name, values, count in (
        ("time_to_first_token_seconds", ttft, ttft.size),
        ("e2e_request_latency_seconds", e2e, e2e.size),
        ("inter_token_latency_seconds", decode, int(steps.sum())),
        ("request_prompt_tokens", events["prompt_tokens"][done], int(done.sum())),
        ("request_generation_tokens", events["output_tokens"][done], int(done.sum())),
    ):
        lines += [f"vllm:{name}_sum{label} {float(values.sum())!r}", f"vllm:{name}_count{label} {count}"]
    return "\n".join(lines) + "\n"


def recording(events: dict[str, np.ndarray], every: float, until: float) -> str:
    """Scrapes ``every`` so many seconds, as one recording."""
    moments = np.arange(0.0, until + 1e-9, every)
    return "".join(f"# scrape {START + moment:.3f}\n{scrape_text(events, moment)}" for moment in moments)
