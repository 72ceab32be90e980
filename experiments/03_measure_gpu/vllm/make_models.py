"""Makes model folders without weights for `vllm serve --load-format dummy`: `python make_models.py FOLDER`.

`FOLDER/verifier` has the dimensions of Llama-3.1-8B, `FOLDER/drafter` those of Llama-3.2-1B, `FOLDER/eagle` those of an
EAGLE head for the former, with one vocabulary and one tokenizer of made-up words. A few megabytes, written with the
standard library alone, no download.
"""

import argparse
import json
from pathlib import Path
from typing import Any

VOCABULARY = 128_256
MAX_CONTEXT = 8192
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")

COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500_000.0,
    "max_position_embeddings": MAX_CONTEXT,
    "vocab_size": VOCABULARY,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
MODELS: dict[str, dict[str, Any]] = {
    "verifier": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "drafter": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "eagle": {  # a head on the verifier's last hidden state; embedding and vocabulary projection are the verifier's
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 1,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}


def parameters(config: dict[str, Any]) -> int:
    """Parameters of a Llama with this config, norms left out. A head's own are its layer and the projection of (token,
    hidden state) in front of it."""
    hidden, size = config["hidden_size"], config["head_dim"]
    attention = 2 * hidden * size * (config["num_attention_heads"] + config["num_key_value_heads"])
    layer = attention + 3 * hidden * config["intermediate_size"]
    if config == COMMON | MODELS["eagle"]:
        return layer + 2 * hidden * hidden
    embeddings = (1 if config["tie_word_embeddings"] else 2) * config["vocab_size"] * hidden
    return embeddings + config["num_hidden_layers"] * layer


def kv_bytes_per_token(config: dict[str, Any], value_bytes: int = 2) -> int:
    """KV-cache bytes of one token of context."""
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * value_bytes


def tokenizer() -> dict[str, Any]:
    """A word-level tokenizer with as many words as the models have tokens, so that every token drawn has a text."""
    words = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), VOCABULARY))]
    added = [
        {"id": number, "content": word, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, word in enumerate(SPECIAL)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: n for n, word in enumerate(words)}, "unk_token": "<unk>"},
    }


def make(folder: Path) -> dict[str, Path]:
    """Write both model folders; returns {name: folder}."""
    tokens = json.dumps(tokenizer())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_CONTEXT}
    settings |= dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    for name, sizes in MODELS.items():
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(COMMON | sizes, indent=2), encoding="utf-8")
        (place / "tokenizer.json").write_text(tokens, encoding="utf-8")
        (place / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return {name: folder / name for name in MODELS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for made in make(parser.parse_args().folder).values():
        print(made)
