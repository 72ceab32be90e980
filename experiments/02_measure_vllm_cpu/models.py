"""Makes the models of this experiment locally, with random weights: `python models.py FOLDER`.

What a model costs does not depend on the values of its weights, so random ones measure latency as well as trained
ones. Acceptance does depend on them, and comes in two ways:

* **imposed**: any drafter here with the server's synthetic rejection (see imposed_acceptance.py); the drafters
  `imposed_*` differ only in size.
* **natural**: `VERIFIER_first_N` is the verifier's own first N layers with its final norm and head. The layers after
  the first write into the residual stream through output projections scaled by LATER_LAYER_SCALE, so the drafter
  often but not always agrees, the more often the more layers it has. Standard lossless rejection then has something
  to accept.

All models share one made-up vocabulary of 4,096 words and one shape of attention head, so every drafter fits every
verifier. Each folder has a `diffspec.yaml` with the numbers that the latency model wants to know.
"""

import argparse
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY_SIZE = 4096
MAX_CONTEXT = 2048
KV_HEADS, HEAD_SIZE = 4, 64
BYTES_PER_VALUE = 4  # float32
LATER_LAYER_SCALE, SCALE_DECAY = 0.1, 0.6  # of the second layer's output, and from there layer to layer
NATURAL_DRAFTER_LAYERS = (1, 2, 4)
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class Size:
    """Dimensions of one model; `experts` is (how many, how many a token uses), None for a dense model."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    experts: tuple[int, int] | None = None
    seed: int = field(default=0, kw_only=True)


VERIFIERS = {
    "small": Size(512, 8, 8, 1536, seed=1),  # 29 M parameters
    "large": Size(768, 12, 12, 2048, seed=2),  # 82 M
    "moe": Size(512, 6, 8, 384, experts=(16, 2), seed=3),  # 66 M, of which 16 M at work on one token
}
IMPOSED_DRAFTERS = {
    "imposed_1m": Size(128, 1, 4, 384, seed=11),
    "imposed_4m": Size(256, 2, 4, 768, seed=12),
    "imposed_17m": Size(512, 4, 8, 1536, seed=13),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of made-up words of two syllables: one word is one token, both ways."""
    syllables = ["".join(pair) for pair in product("bdfgklmnprstvz", "aeiou")]
    words = ["".join(word) for word in islice(product(syllables, repeat=2), VOCABULARY_SIZE - len(SPECIAL_TOKENS))]
    vocabulary = {word: index for index, word in enumerate([*SPECIAL_TOKENS.values(), *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_CONTEXT, **SPECIAL_TOKENS)


def make_model(size: Size) -> PreTrainedModel:
    """A Llama, or a Qwen3-MoE where the size has experts, with seeded random weights and an untied head."""
    common: dict[str, Any] = dict(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    torch.manual_seed(size.seed)
    if size.experts is None:
        return LlamaForCausalLM(LlamaConfig(intermediate_size=size.feed_forward, **common)).float()
    experts, experts_per_token = size.experts
    config = Qwen3MoeConfig(
        intermediate_size=size.feed_forward,
        moe_intermediate_size=size.feed_forward,
        num_experts=experts,
        num_experts_per_tok=experts_per_token,
        norm_topk_prob=True,
        **common,
    )
    return Qwen3MoeForCausalLM(config).float()


def soften_later_layers(model: PreTrainedModel, scale: float = LATER_LAYER_SCALE) -> None:
    """Scale, in place, what the layers after the first add to the residual stream: scale, scale * decay, ..."""
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers[1:]):
            layer.self_attn.o_proj.weight.mul_(scale * SCALE_DECAY**index)
            layer.mlp.down_proj.weight.mul_(scale * SCALE_DECAY**index)


def first_layers(verifier: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The verifier cut after its first layers: same embedding, final norm and head."""
    config = verifier.config.__class__.from_dict({**verifier.config.to_dict(), "num_hidden_layers": layers})
    drafter = verifier.__class__(config).float()
    drafter.load_state_dict({name: verifier.state_dict()[name] for name in drafter.state_dict()})
    return drafter


def architecture(model: PreTrainedModel) -> dict[str, int]:
    """What the latency model wants to know: parameters, layers, experts, key-value bytes a token of context."""
    config = model.config
    numbers = {
        "parameters": sum(weights.numel() for weights in model.parameters()),
        "layers": config.num_hidden_layers,
        "kv_bytes_per_token": 2 * config.num_hidden_layers * KV_HEADS * HEAD_SIZE * BYTES_PER_VALUE,
    }
    if isinstance(config, Qwen3MoeConfig):
        numbers |= {"num_experts": config.num_experts, "experts_per_token": config.num_experts_per_tok}
    return numbers


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights, configuration, tokenizer and diffspec.yaml into the folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    numbers = architecture(model)
    (folder / "diffspec.yaml").write_text(yaml.safe_dump(numbers, sort_keys=False))
    print(f"{folder.name:>16}: {numbers['parameters'] / 1e6:6.2f} M parameters, {numbers['layers']} layers")


def make_all(folder: Path) -> None:
    """Make every model of the experiment; the same weights each time."""
    tokenizer = make_tokenizer()
    for name, size in (VERIFIERS | IMPOSED_DRAFTERS).items():
        model = make_model(size)
        if name in ("small", "large"):
            soften_later_layers(model)
            for layers in NATURAL_DRAFTER_LAYERS:
                save(first_layers(model, layers), tokenizer, folder / f"{name}_first_{layers}")
        save(model, tokenizer, folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the models of this experiment, with random weights.")
    parser.add_argument("folder", type=Path)
    make_all(parser.parse_args().folder)
