"""Accelerators: what a data sheet promises. Bytes, bytes per second, floating-point operations per second, watts.

Peaks are those of dense matrices; data sheets often print twice as much, for 2:4 sparsity. What a server reaches of
them is a matter of :class:`diffspec.first_principles.Efficiency`, not of this table. Memory is the sheet's size in 10^9
bytes; HBM cards report up to 7 % more (80 GB are 80 GiB there), so a memory plan errs on the safe side.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from diffspec.results import InputError

FORMATS = ("fp4", "fp8", "int8", "bf16", "fp32")
"""Number formats of peaks; fp16 counts as bf16."""
_WIDER = {"fp4": ("fp8", "bf16"), "fp8": ("bf16",), "int8": ("bf16",), "bf16": ("fp32",), "fp32": ()}


@dataclass(frozen=True)
class Accelerator:
    """One device: a GPU, or a CPU socket.

    * ``memory_bytes`` [B], ``memory_bandwidth`` [B/s]
    * ``peak_flops`` [FLOP/s]: dense peak by number format (``fp4``, ``fp8``, ``int8``, ``bf16``, ``fp32``)
    * ``power_limit`` [W]: of the whole board or module; ``idle_power`` [W]: drawn while nothing runs; no sheet tells
      it, the presets guess a tenth of the limit for data-centre cards and 16 to 30 W for others
    * ``link_bandwidth`` [B/s]: to its peers, in one direction (half of what sheets print as bidirectional)
    * ``source``: the data sheet the numbers are from

    Errors: :class:`InputError` when a number is not positive, a format is unknown or no peak is given.

    >>> accelerator("H200").memory_bandwidth, accelerator("h200").flops("fp4") == accelerator("h200").flops("bf16")
    (4800000000000.0, True)
    """

    name: str
    memory_bytes: float
    memory_bandwidth: float
    peak_flops: Mapping[str, float]
    power_limit: float
    link_bandwidth: float
    source: str
    idle_power: float

    def __post_init__(self):
        numbers = {
            "memory_bytes": self.memory_bytes,
            "memory_bandwidth": self.memory_bandwidth,
            "power_limit": self.power_limit,
            "link_bandwidth": self.link_bandwidth,
            "idle_power": self.idle_power,
        } | {f"peak_flops[{name!r}]": value for name, value in self.peak_flops.items()}
        for name, value in numbers.items():
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InputError(f"{self.name}: {name}: got {value!r}; allowed: a positive number")
        if self.idle_power > self.power_limit:
            allowed = f"at most power_limit, {self.power_limit:g} W"
            raise InputError(f"{self.name}: idle_power: got {self.idle_power:g} W; allowed: {allowed}")
        unknown = set(self.peak_flops) - set(FORMATS)
        if unknown or not self.peak_flops:
            raise InputError(
                f"{self.name}: peak_flops: got {sorted(unknown)}; allowed: at least one of {', '.join(FORMATS)}"
            )

    def supports(self, number_format: str) -> bool:
        """True when matrices of this format are multiplied as they are."""
        return number_format in self.peak_flops

    def flops(self, number_format: str) -> float:
        """Dense peak [FLOP/s] at which weights of this format are multiplied: its own where the device has one, else
        the next wider format's (fp4 weights on an H100 are unpacked and multiplied in bf16: Marlin kernels)."""
        if number_format not in FORMATS:
            raise InputError(f"number format: got {number_format!r}; allowed: {', '.join(FORMATS)}")
        weight_only = number_format == "fp4" and "fp4" not in self.peak_flops
        for name in (number_format, *(("bf16", "fp32") if weight_only else _WIDER[number_format]), "fp32", "bf16"):
            if name in self.peak_flops:
                return self.peak_flops[name]
        raise InputError(f"{self.name}: no peak for {number_format}; it has {', '.join(self.peak_flops)}")


def accelerator(name: str) -> Accelerator:
    """The preset of this name, whatever its case, hyphens, underscores and spaces.

    Errors: :class:`InputError` that lists them.

    >>> accelerator("RTX 4090").power_limit
    450.0
    """
    key = "".join(letter for letter in str(name).lower() if letter.isalnum())
    presets = {"".join(letter for letter in preset if letter.isalnum()): preset for preset in PRESETS}
    if key in presets:
        return PRESETS[presets[key]]
    near = difflib.get_close_matches(key, presets, n=1, cutoff=0.6)
    meant = f"; did you mean {presets[near[0]]}?" if near else ""
    raise InputError(f"hardware: got {name!r}; allowed: {', '.join(PRESETS)}{meant}")


def _preset(name, gigabytes, gigabytes_per_second, watts, idle, link, source, **teraflops) -> Accelerator:
    return Accelerator(
        name=name,
        memory_bytes=gigabytes * 1e9,
        memory_bandwidth=gigabytes_per_second * 1e9,
        peak_flops={number_format: value * 1e12 for number_format, value in teraflops.items()},
        power_limit=float(watts),
        link_bandwidth=link * 1e9,
        source=source,
        idle_power=float(idle),
    )


_HOPPER = "NVIDIA H100 Tensor Core GPU data sheet"
_ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A"
_PCIE4, _PCIE5 = 32, 64
# name: memory [GB], bandwidth [GB/s], board power [W], idle power [W], link to peers in one direction [GB/s], source,
# dense peaks [TFLOP/s]. RTX peaks accumulate in fp32.
PRESETS: dict[str, Accelerator] = {
    preset.name: preset
    for preset in (
        _preset("a100", 80, 2039, 400, 40, 300, "NVIDIA A100 data sheet, 80 GB SXM", bf16=312, int8=624, fp32=19.5),
        _preset(
            "a100-40gb", 40, 1555, 400, 40, 300, "NVIDIA A100 data sheet, 40 GB SXM", bf16=312, int8=624, fp32=19.5
        ),
        _preset("h100", 80, 3350, 700, 70, 450, f"{_HOPPER}, SXM5", bf16=989.4, fp8=1978.9, int8=1978.9, fp32=67),
        _preset("h100-pcie", 80, 2000, 350, 35, _PCIE5, f"{_HOPPER}, PCIe", bf16=756, fp8=1513, int8=1513, fp32=51),
        _preset(
            *("h200", 141, 4800, 700, 75, 450, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
            **{"bf16": 989.4, "fp8": 1978.9, "int8": 1978.9, "fp32": 67},
        ),
        _preset(
            *("b200", 180, 7700, 1000, 100, 900, "NVIDIA HGX B200 data sheet, one of eight GPUs"),
            **{"bf16": 2250, "fp8": 4500, "int8": 4500, "fp4": 9000, "fp32": 75},
        ),
        _preset(
            *("gh200", 96, 4000, 1000, 100, 450, "NVIDIA GH200 Grace Hopper Superchip data sheet, 96 GB HBM3"),
            **{"bf16": 989.4, "fp8": 1978.9, "int8": 1978.9, "fp32": 67},
        ),
        _preset(
            *("gh200-144gb", 144, 4900, 1000, 100, 450, "NVIDIA GH200 Grace Hopper Superchip data sheet, 144 GB HBM3e"),
            **{"bf16": 989.4, "fp8": 1978.9, "int8": 1978.9, "fp32": 67},
        ),
        _preset(
            *("mi300x", 192, 5300, 750, 75, 448, "AMD Instinct MI300X data sheet; 7 links of 64 GB/s each way"),
            **{"bf16": 1307.4, "fp8": 2614.9, "int8": 2614.9, "fp32": 163.4},
        ),
        _preset("l4", 24, 300, 72, 16, _PCIE4, "NVIDIA L4 data sheet", bf16=121, fp8=242, int8=242, fp32=30.3),
        _preset("a10g", 24, 600, 300, 30, _PCIE4, "NVIDIA A10G data sheet (AWS G5)", bf16=70, int8=140, fp32=35),
        _preset(
            *("rtx-3090", 24, 936, 350, 25, _PCIE4, "NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A"),
            **{"bf16": 71, "int8": 284, "fp32": 35.6},
        ),
        _preset("rtx-4090", 24, 1008, 450, 25, _PCIE4, _ADA, bf16=165.2, fp8=330.3, int8=660.6, fp32=82.6),
        _preset(
            *("rtx-5090", 32, 1792, 575, 30, _PCIE5, "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A"),
            **{"bf16": 209.5, "fp8": 419, "int8": 838, "fp4": 1676, "fp32": 104.8},
        ),
        _preset(
            *("cpu", 256, 307.2, 270, 60, 32),
            "no product: one socket with 32 cores at 2.5 GHz, two AVX-512 units each, and 8 channels of DDR5-4800",
            bf16=5.12,
            fp32=5.12,
        ),
    )
}
"""Sourced presets by name; see each one's ``source``."""
