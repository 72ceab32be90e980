"""A step time before any measurement: bytes over bandwidth, FLOP over peak, and what engines usually reach of both.

    weight_read   = bytes read by every step / (devices * bandwidth * memory)          [s]
    kv_read       = bytes of a cached token / (devices * bandwidth * kv)               [s/tok]
    token_compute = FLOP of a token / (devices * peak * compute) + its all-reduces     [s/tok]
    step_overhead = step_overhead + layers * (layer_overhead + 2*all_reduce if devices > 1)

An all-reduce of a token moves 2*(N-1)/N * hidden * 2 B over each device's link, twice a layer (ring, Megatron-style
tensor parallelism). Key/value heads are split over at most kv_heads devices; latent (MLA) caches are on every device.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffspec.architecture import Transformer, eagle_head
from diffspec.drafters import AbstractDrafter, OverlappedDrafter, RemoteDrafter, WindowedDrafter
from diffspec.experts import ExpertRouting
from diffspec.hardware import Accelerator, accelerator
from diffspec.parameters import Scalar, parameter, parameter_infos, set_parameters, to_constrained, to_unconstrained
from diffspec.results import InputError
from diffspec.step_time import DraftCost, ExpertCost, RooflineStepTime
from diffspec.workload import check_range

DRAFTER_KINDS = ("model", "head", "block", "ngram")
"""A draft model (k passes), an EAGLE-like head (k passes of one layer), a block drafter (one pass), a table lookup."""
ALSO_CALLED = {"eagle": "head", "mtp": "head", "suffix": "ngram", "none": ""}
"""Other names of these kinds. MTP modules that run serially are heads; those that run once a step, blocks."""


class Efficiency(eqx.Module):
    """What an engine reaches of a data sheet. The defaults are the centres of priors, :data:`SPREAD` their widths.

    They hold two public step-cost fits on one H100 with CUDA graphs (vLLM): Llama-3.1-8B, 5.9 ms + 21 us/token + 39 ns
    per cached token (memory 0.8, compute 0.7, kv 1.0), and Qwen3-1.7B, 1.9 ms + 6.8 us/token + 36 ns per cached token.
    """

    memory: Scalar = parameter(0.75, unit="1", high=1.0, meaning="share of peak bandwidth while weights are read")
    kv: Scalar = parameter(0.85, unit="1", high=1.0, meaning="share of peak bandwidth while cached tokens are read")
    compute: Scalar = parameter(0.5, unit="1", high=1.0, meaning="share of the dense peak")
    layer_overhead: Scalar = parameter(1.5e-5, unit="s", meaning="launches and small kernels of one layer")
    step_overhead: Scalar = parameter(1e-3, unit="s", meaning="scheduling and sampling of one step")
    sequence_overhead: Scalar = parameter(5e-6, unit="s/req", meaning="the same, for each sequence")
    draft_overhead: Scalar = parameter(2e-4, unit="s", meaning="launch and sampling of one draft pass")
    link: Scalar = parameter(0.7, unit="1", high=1.0, meaning="share of link bandwidth reached by an all-reduce")
    all_reduce: Scalar = parameter(1e-5, unit="s", meaning="latency of one all-reduce")
    sharpness: Scalar = parameter(2.0, unit="1", low=1.0, high=12.0, meaning="roofline corner: 1 sum, large maximum")
    token_share: Scalar = parameter(
        0.8, unit="1", low=0.0, high=1.0, meaning="independent tokens that one more token of a sequence counts as"
    )
    request_overhead: Scalar = parameter(8e-3, unit="s", meaning="per request, outside the engine step (HTTP, tokens)")

    def __check_init__(self):
        for name, info in parameter_infos(self).items():
            divides = name in ("memory", "kv", "compute", "link")
            high = min(info.high, 1e6)
            check_range(name, getattr(self, name), info.low, high, low_open=divides, unit=f"({info.meaning})")


SPREAD = {
    "memory": 0.5,
    "kv": 0.7,
    "compute": 0.6,
    "layer_overhead": 0.6,
    "step_overhead": 0.7,
    "sequence_overhead": 0.8,
    "draft_overhead": 1.0,
    "link": 0.5,
    "all_reduce": 0.5,
    "sharpness": 0.8,
    "token_share": 0.7,
    "request_overhead": 0.8,
}
"""Standard deviation of each prior in unconstrained coordinates (log, or logit for shares): judgement, not a fit."""

IDEAL = Efficiency(
    memory=1.0,
    kv=1.0,
    compute=1.0,
    layer_overhead=0.0,
    step_overhead=0.0,
    sequence_overhead=0.0,
    draft_overhead=0.0,
    link=1.0,
    all_reduce=0.0,
    request_overhead=0.0,
)
"""The data sheet itself: every peak reached, no overhead."""


def draws(module: eqx.Module, spread: dict[str, float], count: int, seed: int = 0):
    """``count`` modules with log-normal (logit-normal for bounded ranges) parameters around those of ``module``: one
    module with a leading axis, by Latin hypercube with a fixed seed. ``spread`` maps dotted paths to standard
    deviations in unconstrained coordinates; a parameter at its low end stays there."""
    infos = parameter_infos(module)
    random = np.random.default_rng(seed)
    values = {}
    for path, deviation in spread.items():
        centre = jnp.asarray(float(np.asarray(_at(module, path))))
        z = jax.scipy.special.ndtri(jnp.asarray((random.permutation(count) + 0.5) / count, dtype=float))
        if float(centre) <= infos[path].low:
            values[path] = jnp.full(count, centre)
        else:
            values[path] = to_constrained(to_unconstrained(centre, infos[path]) + deviation * z, infos[path])
    whole = jax.tree.map(
        lambda leaf: jnp.broadcast_to(jnp.asarray(leaf, dtype=float), (count, *np.shape(leaf))), module
    )
    return set_parameters(whole, values)


def _at(module, path: str):
    for part in path.split("."):
        module = getattr(module, part)
    return module


@dataclass(frozen=True)
class FirstPrinciples:
    """Verifier, drafter and hardware: what a step time needs before a trace exists.

    * ``drafter_kind``: one of :data:`DRAFTER_KINDS`, or "" without a drafter. A head or block without dimensions of its
      own gets those of :func:`diffspec.architecture.eagle_head`
    * ``tensor_parallel``: devices that share every matrix, the drafter's too
    * ``prompt_length``, ``output_length`` [tok]: set the mean context of sliding windows and of prompts' attention;
      may be traced
    * ``draft_probability`` [1]: share of steps that are drafted for; below 1 for lookups, which abstain
    * ``drafter_window`` [tok]: cached tokens of a sequence that the drafter attends to, None: all (``WindowedDrafter``)
    * ``draft_overlap`` [1]: share of drafts made while the verifier verifies (``OverlappedDrafter``)
    * ``drafter_hardware``, ``transfer_latency`` [s]: one device of the drafter's own, and the round trip to it a step
      (``RemoteDrafter``)

    Errors: :class:`InputError` for a model drafter without dimensions, an unknown kind, tensor_parallel < 1, or a
    number out of its range.
    """

    verifier: Transformer
    hardware: Accelerator
    drafter: Transformer | None = None
    drafter_kind: str = ""
    tensor_parallel: int = 1
    prompt_length: Scalar = 1024.0
    output_length: Scalar = 256.0
    draft_probability: float = 1.0
    drafter_window: float | None = None
    draft_overlap: float = 0.0
    drafter_hardware: Accelerator | None = None
    transfer_latency: float = 0.0

    def __post_init__(self):
        for name, model in (("verifier", self.verifier), ("drafter", self.drafter)):
            if not isinstance(model, Transformer) and not (model is None and name == "drafter"):
                raise InputError(f"{name}: got {model!r}; allowed: a Transformer, such as read_architecture makes")
        for name, device in (("hardware", self.hardware), ("drafter_hardware", self.drafter_hardware)):
            if not isinstance(device, Accelerator) and not (device is None and name == "drafter_hardware"):
                raise InputError(f"{name}: got {device!r}; allowed: an Accelerator, such as accelerator('h100') makes")
        kind = self.drafter_kind or ("model" if self.drafter is not None else "")
        if kind and kind not in (*DRAFTER_KINDS, *ALSO_CALLED):
            raise InputError(f"drafter_kind: got {kind!r}; allowed: {', '.join((*DRAFTER_KINDS, *ALSO_CALLED))}")
        if kind == "none" and self.drafter is not None:
            raise InputError("drafter_kind 'none' has no weights: leave the drafter's config.json out")
        kind = ALSO_CALLED.get(kind, kind)
        if kind == "model" and self.drafter is None:
            raise InputError("drafter_kind 'model' needs the drafter's config.json (--drafter)")
        if kind == "ngram" and self.drafter is not None:
            raise InputError("drafter_kind 'ngram' has no weights: leave the drafter's config.json out")
        if not isinstance(self.tensor_parallel, int) or not 1 <= self.tensor_parallel <= 1024:
            raise InputError(f"tensor_parallel: got {self.tensor_parallel!r}; allowed: 1 to 1024 devices")
        object.__setattr__(self, "drafter_kind", kind)
        if kind in ("head", "block") and self.drafter is None:
            object.__setattr__(self, "drafter", eagle_head(self.verifier))
        check_range("prompt_length", self.prompt_length, 0, 1e8, low_open=True, unit="tok")
        check_range("output_length", self.output_length, 0, 1e8, low_open=True, unit="tok")
        check_range("draft_probability", self.draft_probability, 0, 1, low_open=False, unit="(share of steps)")
        check_range("drafter_window", self.drafter_window, 1, 1e9, low_open=False, unit="tok")
        check_range("draft_overlap", self.draft_overlap, 0, 1, low_open=False, unit="(share of drafts)")
        check_range("transfer_latency", self.transfer_latency, 0, 1e3, low_open=False, unit="s")
        self._check_drafter()

    def _check_drafter(self) -> None:
        asked = {
            "draft_probability": self.draft_probability != 1.0,
            "draft_overlap": self.draft_overlap > 0,
            "drafter_window": self.drafter_window is not None,
            "drafter_hardware": self.drafter_hardware is not None,
            "transfer_latency": self.transfer_latency > 0,
        }
        for name, given in asked.items():
            if given and not self.drafter_kind:
                raise InputError(f"{name} needs a drafter: give its config.json, or a drafter_kind")
            if given and self.drafter is None and name in ("drafter_window", "drafter_hardware"):
                raise InputError(f"{name}: a lookup has no weights and no cache; leave it out")
        if self.transfer_latency > 0 and self.drafter_hardware is None:
            raise InputError("transfer_latency needs a drafter_hardware: between which devices?")

    @property
    def name(self) -> str:
        """Verifier, drafter and hardware in a few words."""
        drafter = f" + {self.drafter.name if self.drafter else self.drafter_kind}" if self.drafter_kind else ""
        devices = f"{self.tensor_parallel}x " if self.tensor_parallel > 1 else ""
        aside = f", drafter on {self.drafter_hardware.name}" if self.drafter_hardware else ""
        return f"{self.verifier.name}{drafter} on {devices}{self.hardware.name}{aside}"

    @property
    def context(self) -> Scalar:
        """Mean cached tokens of a sequence in service: prompt + output/2 [tok]."""
        return self.prompt_length + 0.5 * self.output_length

    def kv_bytes(self, model: Transformer) -> Scalar:
        """Bytes of one cached token of ``model`` on each device [B]."""
        split = 1 if model.kv_lora_rank else min(self.tensor_parallel, model.kv_heads)
        return model.kv_bytes_per_token(self.context) / split

    def step_time(self, efficiency: Efficiency | None = None) -> RooflineStepTime:
        """Roofline step time at this efficiency; see the equations of the module."""
        e = Efficiency() if efficiency is None else efficiency
        bandwidth = self.hardware.memory_bandwidth
        experts = None
        if self.verifier.is_moe:
            routing = ExpertRouting.uniform(self.verifier.num_experts, self.verifier.experts_per_token)
            read = self.verifier.expert_bytes / self.tensor_parallel / (bandwidth * e.memory)
            experts = ExpertCost(routing, weight_read=read, token_share=e.token_share)
        return RooflineStepTime(
            weight_read=self.verifier.read_bytes / self.tensor_parallel / (bandwidth * e.memory),
            token_compute=self._token_time(self.verifier, e),
            kv_read=self.kv_bytes(self.verifier) / (bandwidth * e.kv),
            sharpness=e.sharpness,
            step_overhead=e.step_overhead + self._launches(self.verifier, e),
            sequence_overhead=e.sequence_overhead,
            prefill_token=self._prefill_time(self.verifier, e),
            draft=self._draft(e),
            experts=experts,
        )

    def request_overhead(self, efficiency: Efficiency | None = None):
        """What a request costs outside decode steps and prompt computation [s]: the front end, and the step that
        carries the prompt, with its weight read."""
        e = Efficiency() if efficiency is None else efficiency
        step = self.step_time(e)
        read = step.weight_read
        if step.experts is not None:
            read = read + step.experts.weight_read * step.experts.routing.coverage(self.prompt_length)
        return e.request_overhead + step.step_overhead + read

    def drafter_host(self) -> "FirstPrinciples":
        """The pair as the drafter sees it: on its own device where it has one."""
        if self.drafter_hardware is None:
            return self
        return replace(
            self, hardware=self.drafter_hardware, tensor_parallel=1, drafter_hardware=None, transfer_latency=0.0
        )

    def _draft(self, e: Efficiency) -> AbstractDrafter:
        drafter: AbstractDrafter = self.drafter_host()._draft_cost(e)
        if self.drafter_window is not None:
            drafter = WindowedDrafter(drafter, float(self.drafter_window))
        if self.drafter_hardware is not None:
            drafter = RemoteDrafter(drafter, float(self.transfer_latency))
        return OverlappedDrafter(drafter, float(self.draft_overlap)) if self.draft_overlap > 0 else drafter

    def _draft_cost(self, e: Efficiency) -> DraftCost:
        if not self.drafter_kind:
            return DraftCost()
        if self.drafter is None:  # a lookup in the prompt
            return DraftCost(block_base=e.draft_overhead, block_sequence=e.sequence_overhead)
        bandwidth = self.hardware.memory_bandwidth
        routed = self.drafter.expert_bytes * self.drafter.experts_per_token / max(self.drafter.num_experts, 1)
        read = (self.drafter.read_bytes + routed) / self.tensor_parallel / (bandwidth * e.memory)
        base = read + e.draft_overhead + self._launches(self.drafter, e)
        each = self._token_time(self.drafter, e)
        prefill = self._prefill_time(self.drafter, e)
        if self.drafter_kind == "block":
            return DraftCost(block_base=base, block_sequence=each, prefill_token=prefill)
        kv = self.kv_bytes(self.drafter) / (bandwidth * e.kv)
        return DraftCost(pass_base=base, pass_sequence=each, pass_kv=kv, prefill_token=prefill)

    def _launches(self, model: Transformer, e: Efficiency):
        return model.layers * (e.layer_overhead + (2.0 * e.all_reduce if self.tensor_parallel > 1 else 0.0))

    def _compute_time(self, flops: Mapping[str, Scalar], e: Efficiency):
        at_peak = sum(value / self.hardware.flops(number_format) for number_format, value in flops.items())
        return at_peak / self.tensor_parallel / e.compute

    def _token_time(self, model: Transformer, e: Efficiency, *, head: bool = True):
        devices = self.tensor_parallel
        moved = 2.0 * model.layers * 2.0 * (devices - 1) / devices * model.hidden * 2.0
        time = self._compute_time(model.flops_per_token(head=head), e)
        return time + moved / (self.hardware.link_bandwidth * e.link)

    def _prefill_time(self, model: Transformer, e: Efficiency):
        attention = self._compute_time({"bf16": model.attention_flops(0.5 * self.prompt_length)}, e)
        return self._token_time(model, e, head=False) + attention

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the inverse of :meth:`from_dict`."""
        return {
            "verifier": asdict(self.verifier),
            "drafter": None if self.drafter is None else asdict(self.drafter),
            "drafter_kind": self.drafter_kind,
            "hardware": self.hardware.name,
            "tensor_parallel": self.tensor_parallel,
            "prompt_length": self.prompt_length,
            "output_length": self.output_length,
            "draft_probability": self.draft_probability,
            "drafter_window": self.drafter_window,
            "draft_overlap": self.draft_overlap,
            "drafter_hardware": None if self.drafter_hardware is None else self.drafter_hardware.name,
            "transfer_latency": self.transfer_latency,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "FirstPrinciples":
        """Rebuild from :meth:`to_dict`'s plain data; the hardware must be a preset."""

        def model(fields):
            return None if fields is None else Transformer(**{**fields, "notes": tuple(fields["notes"])})

        verifier = model(data["verifier"])
        assert verifier is not None
        aside = data.get("drafter_hardware")
        runs = {
            name: data[name]
            for name in ("draft_probability", "drafter_window", "draft_overlap", "transfer_latency")
            if name in data
        }
        return cls(
            verifier=verifier,
            hardware=accelerator(data["hardware"]),
            drafter=model(data["drafter"]),
            drafter_kind=data["drafter_kind"],
            tensor_parallel=data["tensor_parallel"],
            prompt_length=data["prompt_length"],
            output_length=data["output_length"],
            drafter_hardware=None if aside is None else accelerator(aside),
            **runs,
        )


def step_time_from(
    verifier: Transformer,
    hardware: Accelerator,
    drafter: Transformer | None = None,
    *,
    drafter_kind: str = "",
    tensor_parallel: int = 1,
    prompt_length: float = 1024.0,
    output_length: float = 256.0,
    efficiency: Efficiency | None = None,
) -> RooflineStepTime:
    """Step time of a verifier, and of a drafter where there is one, on a device; see :class:`FirstPrinciples`.

    >>> from diffspec.hardware import accelerator
    >>> model = Transformer("8B", 32, 4096, 128256, 32, 8, 128, 14336)
    >>> round(step_time_from(model, accelerator("h200"), efficiency=IDEAL).weight_read * 1e3, 3)  # 15 GB / 4.8 TB/s
    3.127
    """
    pair = FirstPrinciples(
        verifier, hardware, drafter, drafter_kind, tensor_parallel, float(prompt_length), float(output_length)
    )
    return pair.step_time(efficiency)
