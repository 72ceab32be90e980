"""A Hugging Face ``config.json`` becomes a :class:`diffspec.architecture.transformer.Transformer`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffspec.architecture.transformer import Transformer
from diffspec.results import InputError

CHECKED = (
    *("apertus", "deepseek_v2", "deepseek_v3", "gemma2", "gpt_oss", "kimi_k2", "llama", "mistral", "mixtral", "phi3"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
)
"""Model types known to be read rightly; any other that has the same keys is read as they are, with a note."""
_TWO_MATRICES = ("apertus", "gpt_neox", "nemotron", "phi", "starcoder2")
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text")
_BITS = {"float32": (32.0, "fp32"), "float16": (16.0, "bf16"), "bfloat16": (16.0, "bf16")}


def read_architecture(config: Mapping[str, Any] | str | os.PathLike[str]) -> Transformer:
    """Dimensions from a Hugging Face configuration: a mapping, the path of a ``config.json``, or of a folder with one.

    Errors: :class:`InputError` when the file cannot be read, a needed key is missing, or the architecture has parts
    whose cost is not known here (linear attention, state-space layers, encoders, unknown quantisation).
    """
    if isinstance(config, Mapping):
        return _from_config(config, str(config.get("_name_or_path") or config.get("model_type") or "model"))
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the config.json of a Hugging Face model") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a Hugging Face config.json: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: not a Hugging Face config.json: got a {type(data).__name__}, allowed: an object")
    stem = path.parent.name if path.name == "config.json" and path.parent.name else path.stem
    try:
        return _from_config(data, str(data.get("_name_or_path") or stem))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _from_config(config: Mapping[str, Any], name: str) -> Transformer:
    outer = config
    if isinstance(config.get("text_config"), Mapping):
        config = {**{k: v for k, v in outer.items() if k != "text_config"}, **config["text_config"]}
    model_type = str(config.get("model_type", "unknown"))
    _refuse_unknown_parts(config, model_type)
    layers = _number(config, "num_hidden_layers")
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    moe_layers = _moe_layers(config, layers)
    expert = _number(config, "moe_intermediate_size", "intermediate_size") if moe_layers else 0
    needed = moe_layers < layers
    bits = _weight_bits(outer.get("quantization_config") or config.get("quantization_config"), config)
    sliding = _sliding_layers(config, model_type, layers)
    notes = () if model_type in CHECKED else (f"model_type {model_type!r} is not one of the checked ones",)
    return Transformer(
        name=name,
        layers=layers,
        hidden=hidden,
        vocab=_number(config, "vocab_size"),
        heads=heads,
        kv_heads=_number(config, "num_key_value_heads", default=heads),
        head_dim=_number(config, "head_dim", default=max(hidden // heads, 1)),
        intermediate=_number(config, "intermediate_size") if needed else 0,
        gated=model_type not in _TWO_MATRICES,
        tied=bool(config.get("tie_word_embeddings", model_type in _TIED_BY_DEFAULT)),
        moe_layers=moe_layers,
        num_experts=_number(config, *_EXPERT_COUNTS) if moe_layers else 0,
        experts_per_token=_number(config, "num_experts_per_tok", "experts_per_token") if moe_layers else 0,
        expert_intermediate=expert,
        shared_intermediate=_shared_width(config, expert) if moe_layers else 0,
        q_lora_rank=_number(config, "q_lora_rank", default=0),
        kv_lora_rank=_number(config, "kv_lora_rank", default=0),
        rope_head_dim=_number(config, "qk_rope_head_dim", default=0),
        nope_head_dim=_number(config, "qk_nope_head_dim", default=0),
        v_head_dim=_number(config, "v_head_dim", default=0),
        sliding_layers=sliding,
        sliding_window=_number(config, "sliding_window") if sliding else 0,
        notes=notes,
        **bits,
    )


_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _number(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """The first of the keys that the configuration has, as a whole number of at least 0."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
            raise InputError(f"{key}: got {value!r}; allowed: a whole number")
        return int(value)
    if default is None:
        raise InputError(
            f"model_type {config.get('model_type')!r}: no {' or '.join(keys)}; supported: {', '.join(CHECKED)} "
            "and others with the same keys"
        )
    return default


def _refuse_unknown_parts(config: Mapping[str, Any], model_type: str) -> None:
    kinds = {str(kind) for kind in config.get("layer_types") or ()} - {"full_attention", "sliding_attention"}
    parts = [f"layers of type {kind}" for kind in sorted(kinds)]
    parts += [key for key in ("ssm_cfg", "mamba_d_state", "hybrid_override_pattern", "block_types") if config.get(key)]
    parts += ["an encoder"] if config.get("is_encoder_decoder") else []
    parts += ["interleaved mixture-of-experts layers"] if config.get("interleave_moe_layer_step") else []
    if parts:
        raise InputError(f"model_type {model_type!r} has {', '.join(parts)}; supported: {', '.join(CHECKED)}")


def _moe_layers(config: Mapping[str, Any], layers: int) -> int:
    """How many layers route to experts: from first_k_dense_replace, moe_layer_freq, decoder_sparse_step and
    mlp_only_layers."""
    if _number(config, *_EXPERT_COUNTS, default=0) <= 1:
        return 0
    frequency = config.get("moe_layer_freq", 1)
    if isinstance(frequency, list):
        return sum(bool(entry) for entry in frequency[:layers])
    first = _number(config, "first_k_dense_replace", default=0)
    step = max(_number(config, "decoder_sparse_step", default=1), 1)
    dense = set(config.get("mlp_only_layers") or ())
    every = max(int(frequency or 1), 1)
    return sum(i >= first and i % every == 0 and (i + 1) % step == 0 and i not in dense for i in range(layers))


def _shared_width(config: Mapping[str, Any], expert: int) -> int:
    return _number(
        config, "shared_expert_intermediate_size", default=expert * _number(config, "n_shared_experts", default=0)
    )


def _sliding_layers(config: Mapping[str, Any], model_type: str, layers: int) -> int:
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return 0
    kinds = config.get("layer_types")
    if kinds:
        return sum(kind == "sliding_attention" for kind in kinds)
    if model_type in ("gpt_oss", "gemma2"):
        return (layers + 1) // 2
    pattern = _number(config, "sliding_window_pattern", default=0)
    if pattern:
        return layers - layers // pattern
    if model_type.startswith("qwen"):
        return max(layers - _number(config, "max_window_layers", default=layers), 0)
    return layers


def _weight_bits(quantisation: Mapping[str, Any] | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Bits and number formats from torch_dtype (or dtype) and quantization_config."""
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in _BITS:
        raise InputError(f"torch_dtype: got {dtype!r}; allowed: {', '.join(_BITS)}")
    plain, number_format = _BITS[dtype]
    made = {
        "head_bits": plain,
        "kv_bits": plain,
        "weight_bits": plain,
        "expert_bits": plain,
        "weight_format": number_format,
        "expert_format": number_format,
    }
    if not quantisation:
        return made
    if quantisation.get("kv_cache_scheme"):
        made["kv_bits"] = float(quantisation["kv_cache_scheme"].get("num_bits", 8))
    if quantisation.get("quant_method") == "mxfp4":  # the experts only
        return made | {"expert_bits": 4.25, "expert_format": "fp4"}
    bits, number_format = _quantised(quantisation, number_format)
    return (
        made
        | {"weight_bits": bits, "expert_bits": bits, "weight_format": number_format}
        | {"expert_format": number_format}
    )


def _quantised(quantisation: Mapping[str, Any], plain: str) -> tuple[float, str]:
    """(bits of a weight with its group's scale, format of the products) of a whole-model quantisation."""
    method = str(quantisation.get("quant_method", "")).lower()
    algorithm = str(quantisation.get("quant_algo", "")).upper()
    if method in ("fp8", "fbgemm_fp8") or algorithm.startswith("FP8"):
        return 8.0, "fp8"
    if algorithm.startswith("NVFP4"):
        return 4.5, "fp4"
    if method in ("awq", "gptq", "auto-round"):
        bits = float(quantisation.get("bits", 4))
        group = float(quantisation.get("group_size", 128))
        return bits + ((16.0 + bits) / group if group > 0 else 0.0), plain
    if method == "bitsandbytes":
        return (4.5 if quantisation.get("load_in_4bit") else 8.0), plain
    if method == "compressed-tensors":
        for group in (quantisation.get("config_groups") or {}).values():
            weights = group.get("weights") or {}
            bits, size = float(weights.get("num_bits", 16)), weights.get("group_size") or 0
            family = "fp" if weights.get("type") == "float" else "int"
            number_format = f"{family}{bits:g}" if group.get("input_activations") else plain
            return bits + (16.0 / size if size > 0 else 0.0), "int8" if number_format == "int4" else number_format
    raise InputError(
        f"quantization_config: got quant_method {quantisation.get('quant_method')!r}; allowed: fp8, fbgemm_fp8, "
        "modelopt, mxfp4, awq, gptq, bitsandbytes, compressed-tensors"
    )
