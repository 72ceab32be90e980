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
_TIED_BY_DEFAULT = ("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "starcoder2")
_ENCODERS = ("albert", "bert", "deberta-v2", "distilbert", "electra", "modernbert", "roberta", "xlm-roberta")
_LEFT_OUT = {  # what multimodal configurations of these types do not write: the defaults of their classes
    "gemma3_text": {
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window_pattern": 6,
        "vocab_size": 262208,
    }
}
_HYBRID = (
    *("attn_layer_period", "block_configs", "block_types", "full_attention_interval", "full_attn_idxs"),
    *("hybrid_override_pattern", "linear_attn_config", "linear_num_key_heads", "mamba_d_state", "ssm_cfg"),
)
"""Keys of models whose layers differ in kind: linear attention, convolutions, state spaces, layers of many widths."""
_LANGUAGE = ("text_config", "llm_config", "language_config")
_MOST_LAYERS, _LARGEST = 10_000, 10**9
_BITS = {"float32": (32.0, "fp32"), "float16": (16.0, "bf16"), "bfloat16": (16.0, "bf16")}


def read_architecture(config: Mapping[str, Any] | str | os.PathLike[str]) -> Transformer:
    """Dimensions from a Hugging Face configuration: a mapping, the path of a ``config.json``, or of a folder with one.

    Errors: :class:`InputError` when the file cannot be read, a needed key is missing, or the architecture has parts
    whose cost is not known here (linear attention, state-space layers, encoders, unknown quantisation).
    """
    if isinstance(config, Mapping):
        return _from_config(config, str(config.get("_name_or_path") or config.get("model_type") or "model"))
    if not isinstance(config, str | os.PathLike):
        raise InputError(f"config: got {config!r}; allowed: a mapping, or the path of a config.json or its folder")
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
    for key in _LANGUAGE:
        if isinstance(outer.get(key), Mapping):
            config = {**{k: v for k, v in outer.items() if k != key}, **outer[key]}
    model_type = str(config.get("model_type", "unknown"))
    config = _LEFT_OUT.get(model_type, {}) | {key: value for key, value in config.items() if value is not None}
    _refuse_unknown_parts(config, model_type)
    layers = _number(config, "num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise InputError(f"num_hidden_layers: got {layers}; allowed: 1 to {_MOST_LAYERS}")
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    moe_layers = _moe_layers(config, layers)
    expert = _number(config, "moe_intermediate_size", "intermediate_size") if moe_layers else 0
    needed = moe_layers < layers
    kv_heads = _number(config, "num_key_value_heads", default=heads)
    head_dim = _number(config, "head_dim", default=max(hidden // max(heads, 1), 1))
    own_head = _number(config, "draft_vocab_size", default=0)  # EAGLE-3: fewer words, the verifier's embedding
    entry = hidden * (3 * hidden + head_dim * (heads + 2 * kv_heads)) if own_head else 0
    of_all = outer if outer.get("quantization_config") is not None else config
    bits = _weight_bits(_mapping(of_all, "quantization_config"), config)
    sliding = _sliding_layers(config, model_type, layers)
    return Transformer(
        name=name,
        layers=layers,
        hidden=hidden,
        vocab=own_head or _number(config, "vocab_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=_number(config, "intermediate_size") if needed else 0,
        gated=model_type not in _TWO_MATRICES,
        tied=bool(own_head or config.get("tie_word_embeddings", model_type in _TIED_BY_DEFAULT)),
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
        extra_weights=entry,
        notes=_notes(outer, config, model_type),
        **bits,
    )


def _notes(outer: Mapping[str, Any], config: Mapping[str, Any], model_type: str) -> tuple[str, ...]:
    """What the dimensions leave out, or may read wrongly."""
    notes = [] if model_type in CHECKED else [f"model_type {model_type!r} is not one of the checked ones"]
    towers = [key for key in ("vision_config", "audio_config") if outer.get(key)]
    if towers:
        notes.append(f"the language model alone: {' and '.join(towers)} left out")
    if config.get("index_topk"):
        notes.append("sparse attention (index_topk) is taken for full attention: long contexts read too slow")
    return tuple(notes)


_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _number(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """The first of the keys that the configuration has, as a whole number of at least 0."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        known = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LARGEST
        if not known or value != int(value):
            raise InputError(f"{key}: got {_shown(value)}; allowed: a whole number, up to {_LARGEST}")
        return int(value)
    if default is None:
        raise InputError(
            f"model_type {config.get('model_type')!r}: no {' or '.join(keys)}; supported: {', '.join(CHECKED)} "
            "and others with the same keys"
        )
    return default


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else f"about {float(str(value)[:9]):g}..."
    return text if len(text) <= 60 else f"{text[:60]}..."


def _list(config: Mapping[str, Any], key: str) -> list:
    """The list under this key, empty without one."""
    value = config.get(key)
    if value is None or isinstance(value, list | tuple):
        return list(value or ())
    raise InputError(f"{key}: got {_shown(value)}; allowed: a list")


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under this key, empty without one."""
    value = config.get(key)
    if value is None or isinstance(value, Mapping):
        return value or {}
    raise InputError(f"{key}: got {_shown(value)}; allowed: an object")


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    """Bits of a number under this key."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 64:
        raise InputError(f"quantization_config: {key}: got {_shown(value)}; allowed: a number of bits, (0, 64]")
    return float(value)


def _refuse_unknown_parts(config: Mapping[str, Any], model_type: str) -> None:
    kinds = {str(kind) for kind in _list(config, "layer_types")} - {"full_attention", "sliding_attention"}
    parts = [f"layers of type {kind}" for kind in sorted(kinds)]
    parts += [key for key in _HYBRID if config.get(key)]
    parts += ["linear attention (attn_type_list)"] if not all(_list(config, "attn_type_list")) else []
    parts += ["an encoder"] if config.get("is_encoder_decoder") or model_type in _ENCODERS else []
    parts += ["interleaved mixture-of-experts layers"] if config.get("interleave_moe_layer_step") else []
    if parts:
        raise InputError(f"model_type {model_type!r} has {', '.join(parts)}; supported: {', '.join(CHECKED)}")


def _moe_layers(config: Mapping[str, Any], layers: int) -> int:
    """How many layers route to experts: from first_k_dense_replace, moe_layer_freq, decoder_sparse_step and
    mlp_only_layers."""
    if _number(config, *_EXPERT_COUNTS, default=0) <= 1:
        return 0
    if isinstance(config.get("moe_layer_freq"), list):
        return sum(bool(entry) for entry in config["moe_layer_freq"][:layers])
    first = _number(config, "first_k_dense_replace", default=0)
    step = max(_number(config, "decoder_sparse_step", default=1), 1)
    dense = _list(config, "mlp_only_layers")
    every = max(_number(config, "moe_layer_freq", default=1), 1)
    return sum(i >= first and i % every == 0 and (i + 1) % step == 0 and i not in dense for i in range(layers))


def _shared_width(config: Mapping[str, Any], expert: int) -> int:
    return _number(
        config, "shared_expert_intermediate_size", default=expert * _number(config, "n_shared_experts", default=0)
    )


def _sliding_layers(config: Mapping[str, Any], model_type: str, layers: int) -> int:
    if not _number(config, "sliding_window", default=0) or config.get("use_sliding_window") is False:
        return 0
    kinds = _list(config, "layer_types")
    if kinds:
        return sum(kind == "sliding_attention" for kind in kinds[:layers])
    if model_type in ("gpt_oss", "gemma2"):
        return (layers + 1) // 2
    pattern = _number(config, "sliding_window_pattern", default=0)
    if pattern:
        return layers - layers // pattern
    if model_type.startswith("qwen"):
        return max(layers - _number(config, "max_window_layers", default=layers), 0)
    return layers


def _weight_bits(quantisation: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
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
        made["kv_bits"] = _positive(_mapping(quantisation, "kv_cache_scheme"), "num_bits", 8.0)
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
        bits, group = _positive(quantisation, "bits", 4.0), _group_size(quantisation, 128)
        return bits + ((16.0 + bits) / group if group > 0 else 0.0), plain
    if method == "bitsandbytes":
        return (4.5 if quantisation.get("load_in_4bit") else 8.0), plain
    if method == "compressed-tensors":
        groups = _mapping(quantisation, "config_groups")
        for group in (_mapping(groups, name) for name in groups):
            weights = _mapping(group, "weights")
            bits, size = _positive(weights, "num_bits", 16.0), _group_size(weights, 0)
            family = "fp" if weights.get("type") == "float" else "int"
            number_format = f"{family}{bits:g}" if group.get("input_activations") else plain
            return bits + (16.0 / size if size > 0 else 0.0), "int8" if number_format == "int4" else number_format
    raise InputError(
        f"quantization_config: got quant_method {quantisation.get('quant_method')!r}; allowed: fp8, fbgemm_fp8, "
        "modelopt, mxfp4, awq, gptq, bitsandbytes, compressed-tensors"
    )


def _group_size(config: Mapping[str, Any], default: int) -> int:
    """Weights that share a scale; 0 where a whole channel does (group_size -1 or none)."""
    return 0 if config.get("group_size") == -1 else _number(config, "group_size", default=default)
