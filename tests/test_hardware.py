"""Accelerator presets against their data sheets, and how they are found."""

import pytest

from diffspec.hardware import FORMATS, PRESETS, Accelerator, accelerator
from diffspec.results import InputError

# GB, GB/s, dense bf16 TFLOP/s, W, as printed (sparse figures halved)
SHEETS = {
    "a100": (80, 2039, 312, 400),
    "h100": (80, 3350, 1979 / 2, 700),
    "h200": (141, 4800, 1979 / 2, 700),
    "b200": (180, 7700, 4500 / 2, 1000),
    "gh200": (96, 4000, 1979 / 2, 1000),
    "mi300x": (192, 5300, 1307.4, 750),
    "l4": (24, 300, 242 / 2, 72),
    "a10g": (24, 600, 140 / 2, 300),
    "rtx-3090": (24, 936, 142 / 2, 350),
    "rtx-4090": (24, 1008, 330.3 / 2, 450),
    "rtx-5090": (32, 1792, 419 / 2, 575),
}


@pytest.mark.parametrize("name", SHEETS)
def test_presets_are_the_data_sheets(name):
    memory, bandwidth, peak, power = SHEETS[name]
    preset = PRESETS[name]
    assert (preset.memory_bytes, preset.memory_bandwidth) == (memory * 1e9, bandwidth * 1e9)
    assert preset.flops("bf16") == pytest.approx(peak * 1e12, rel=1e-3)
    assert preset.power_limit == power and 0 < preset.idle_power < 0.25 * power


def test_every_preset_has_a_source_and_plausible_peaks():
    for name, preset in PRESETS.items():
        assert preset.name == name and len(preset.source) > 10
        peaks = [preset.flops(number_format) for number_format in FORMATS]
        assert peaks[3] >= peaks[4] > 0, name  # bf16 at least as fast as fp32
        assert preset.flops("fp8") in (preset.flops("bf16"), pytest.approx(2 * preset.flops("bf16"), rel=1e-3)), name
        assert preset.memory_bandwidth / preset.link_bandwidth > 1, name
    # the stated CPU: 32 cores, two 16-lane fused multiply-adds a cycle, 2.5 GHz; 8 channels of 8 B at 4.8 GT/s
    assert PRESETS["cpu"].flops("fp32") == pytest.approx(32 * 2 * 16 * 2 * 2.5e9)
    assert PRESETS["cpu"].memory_bandwidth == pytest.approx(8 * 8 * 4.8e9)


@pytest.mark.parametrize(
    ("number_format", "device", "peak"),
    [
        ("fp8", "a100", 312e12),  # unpacked to bf16
        ("fp8", "h100", 1978.9e12),
        ("fp4", "h100", 989.4e12),  # weights only: unpacked and multiplied in bf16
        ("fp4", "b200", 9000e12),
        ("int8", "a100", 624e12),
        ("fp32", "mi300x", 163.4e12),
    ],
)
def test_a_format_that_is_missing_is_widened(number_format, device, peak):
    assert accelerator(device).flops(number_format) == peak


@pytest.mark.parametrize("name", ["H200", "rtx_4090", "RTX 4090", "GH200-144GB", "MI300X", "Cpu"])
def test_names_are_forgiving(name):
    plain = name.lower().replace("_", "-").replace(" ", "-")
    assert accelerator(name).name == plain


def test_an_unknown_name_lists_the_presets():
    with pytest.raises(InputError, match=r"got 'h2000'; allowed: a100, .*, cpu; did you mean h200\?"):
        accelerator("h2000")
    with pytest.raises(InputError, match=r"got '\?'; allowed: a100") as caught:
        accelerator("?")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"memory_bandwidth": 0.0}, "memory_bandwidth: got 0.0; allowed: a positive number"),
        ({"power_limit": float("nan")}, "power_limit: got nan"),
        ({"peak_flops": {"bf16": -1.0}}, r"peak_flops\['bf16'\]: got -1.0"),
        ({"peak_flops": {"fp6": 1.0}}, r"got \['fp6'\]; allowed: at least one of fp4"),
        ({"peak_flops": {}}, "at least one of"),
        ({"memory_bytes": float("inf")}, "memory_bytes: got inf"),
        ({"idle_power": 100.0}, "idle_power: got 100 W; allowed: at most power_limit, 72 W"),
    ],
)
def test_a_device_of_ones_own_is_checked(change, told):
    fields = {name: getattr(PRESETS["l4"], name) for name in PRESETS["l4"].__dataclass_fields__}
    with pytest.raises(InputError, match=told):
        Accelerator(**fields | change)
    with pytest.raises(InputError, match="number format: got 'fp6'"):
        PRESETS["l4"].flops("fp6")
