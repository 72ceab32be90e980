"""Parameter counts, bytes and FLOP of published models from their public configurations."""

import json
import re

import pytest

from diffspec.architecture import Transformer, eagle_head, read_architecture
from diffspec.results import InputError

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
QWEN3_8B = {
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_1B7 = QWEN3_8B | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "tie_word_embeddings": True,
}
QWEN25_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
QWEN3_235B_A22B = QWEN3_30B_A3B | {
    "hidden_size": 4096,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_hidden_layers": 94,
}
QWEN15_MOE = {
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MIXTRAL_8X7B = MISTRAL_7B | {
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "sliding_window": None,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
GPT_OSS_120B = GPT_OSS_20B | {
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "num_hidden_layers": 36,
    "num_local_experts": 128,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "tie_word_embeddings": False,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
APERTUS_8B = {
    "model_type": "apertus",
    "hidden_act": "xielu",
    "hidden_size": 4096,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "vocab_size": 131072,
}

MISTRAL_SMALL_31 = {  # multimodal: the language model is nested
    "model_type": "mistral3",
    "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24},
    "text_config": {
        "model_type": "mistral",
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "vocab_size": 131072,
    },
}
GEMMA3_4B = {  # what is the default of its class is not written
    "model_type": "gemma3",
    "vision_config": {"hidden_size": 1152},
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    },
}
GEMMA3_12B = GEMMA3_4B | {
    "text_config": GEMMA3_4B["text_config"]
    | {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
    }
}
COMMAND_R = {
    "model_type": "cohere",
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_attention_heads": 64,
    "num_hidden_layers": 40,
    "num_key_value_heads": 64,
    "vocab_size": 256000,
}
EAGLE3_LLAMA_8B = LLAMA_8B | {"num_hidden_layers": 1, "draft_vocab_size": 32000, "torch_dtype": "float16"}

# configuration, total and active parameters as published (model cards, technical reports), in 10^9
PUBLISHED = {
    "Llama-3.1-8B": (LLAMA_8B, 8.03, None),
    "Llama-3.1-70B": (LLAMA_70B, 70.6, None),
    "Llama-3.2-1B": (LLAMA_1B, 1.236, None),
    "Qwen3-8B": (QWEN3_8B, 8.19, None),
    "Qwen3-1.7B": (QWEN3_1B7, 1.72, None),
    "Qwen2.5-7B": (QWEN25_7B, 7.61, None),
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, 30.5, 3.35),
    "Qwen3-235B-A22B": (QWEN3_235B_A22B, 235.1, 22.2),
    "Qwen1.5-MoE-A2.7B": (QWEN15_MOE, 14.3, 2.69),
    "Mistral-7B-v0.1": (MISTRAL_7B, 7.24, None),
    "Mixtral-8x7B": (MIXTRAL_8X7B, 46.7, 12.9),
    "gpt-oss-20b": (GPT_OSS_20B, 20.91, None),
    "gpt-oss-120b": (GPT_OSS_120B, 116.83, None),
    "DeepSeek-V3": (DEEPSEEK_V3, 671.0, None),
    "DeepSeek-V2-Lite": (DEEPSEEK_V2_LITE, 15.7, None),
    "Apertus-8B": (APERTUS_8B, 8.05, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    config, total, active = PUBLISHED[name]
    model = read_architecture(config)
    assert model.parameters / 1e9 == pytest.approx(total, rel=0.01)
    if active is None:
        assert model.is_moe or model.active_parameters == model.parameters
    else:
        assert model.active_parameters / 1e9 == pytest.approx(active, rel=0.01)
    assert model.notes == ()


@pytest.mark.parametrize(
    ("config", "total", "window_layers"),
    [
        (MISTRAL_SMALL_31, 23.57, 0),
        (GEMMA3_4B, 3.88, 29),
        (GEMMA3_12B, 11.77, 40),
        (COMMAND_R, 34.98, 0),
        (EAGLE3_LLAMA_8B, 0.425, 0),  # 850 MB in fp16
    ],
)
def test_configurations_that_leave_much_to_their_class(config, total, window_layers):
    model = read_architecture(config)
    assert model.parameters / 1e9 == pytest.approx(total, rel=2e-3)
    assert model.sliding_layers == window_layers
    assert any("vision_config left out" in note for note in model.notes) == ("vision_config" in config)


def test_llama_is_exact():
    assert read_architecture(LLAMA_8B).parameters == 8_030_261_248  # its safetensors index
    assert read_architecture(LLAMA_70B).parameters == 70_553_706_496
    assert read_architecture(LLAMA_1B).parameters == 1_235_814_400


@pytest.mark.parametrize(
    ("config", "active", "printed"), [(GPT_OSS_20B, 3.61, 0.005), (GPT_OSS_120B, 5.13, 0.005), (DEEPSEEK_V3, 37.0, 0.5)]
)
def test_active_parameters_of_cards_that_leave_the_embedding_out(config, active, printed):
    model = read_architecture(config)
    without = (model.active_parameters - model.embedding_weights) / 1e9
    assert without == pytest.approx(active, abs=printed + 0.005)  # to the digits that the card prints


def test_kv_bytes_by_hand():
    assert read_architecture(LLAMA_8B).kv_bytes_per_token() == 2 * 32 * 8 * 128 * 2 == 131072
    assert read_architecture(QWEN3_1B7).kv_bytes_per_token() == 2 * 28 * 8 * 128 * 2
    assert read_architecture(DEEPSEEK_V3).kv_bytes_per_token() == 61 * (512 + 64) * 2  # 70 KB (DeepSeek-V3 report)
    oss = read_architecture(GPT_OSS_20B)
    assert oss.kv_bytes_per_token() == 24 * 2 * 8 * 64 * 2
    assert oss.kv_bytes_per_token(1280) == (12 + 12 * 0.1) * 2 * 8 * 64 * 2  # windows of 128 of 1280 tokens
    assert oss.kv_bytes_per_token(100) == oss.kv_bytes_per_token()
    assert read_architecture(MISTRAL_7B).kv_bytes_per_token(8192) == 131072 / 2
    quantised = LLAMA_8B | {"quantization_config": {"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8}}}
    assert read_architecture(quantised).kv_bytes_per_token() == 65536


def test_weight_bytes_by_hand():
    llama = read_architecture(LLAMA_8B)
    assert llama.weight_bytes == 2 * llama.parameters
    assert llama.read_bytes == 2 * (llama.parameters - 128256 * 4096)  # of the embedding only rows are read
    tied = read_architecture(LLAMA_1B)
    assert tied.read_bytes == tied.weight_bytes == 2 * tied.parameters
    # checkpoints: gpt-oss-20b 12.8 GiB (model card), gpt-oss-120b 60.8 GiB, DeepSeek-V3 in fp8 about 671 GB
    assert read_architecture(GPT_OSS_20B).weight_bytes / 2**30 == pytest.approx(12.8, rel=0.01)
    assert read_architecture(GPT_OSS_120B).weight_bytes / 2**30 == pytest.approx(60.8, rel=0.01)
    assert read_architecture(DEEPSEEK_V3).weight_bytes == pytest.approx(673e9, rel=0.01)


@pytest.mark.parametrize(
    ("quantisation", "bits", "number_format"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + 20 / 128, "bf16"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8.0, "bf16"),
        ({"quant_method": "fp8"}, 8.0, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5, "fp4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5, "bf16"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}, "input_activations": {}}},
            },
            8.0,
            "bf16",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 8, "type": "float"}, "input_activations": {"num_bits": 8}}
                },
            },
            8.0,
            "fp8",
        ),
    ],
)
def test_quantisation(quantisation, bits, number_format):
    model = read_architecture(LLAMA_8B | {"quantization_config": quantisation})
    assert (model.weight_bits, model.weight_format, model.head_bits) == (bits, number_format, 16.0)
    linear = model.parameters - 2 * model.embedding_weights
    assert model.weight_bytes == linear * bits / 8 + 4 * model.embedding_weights


def test_flops_are_twice_the_active_weights():
    llama = read_architecture(LLAMA_8B)
    assert llama.flops_per_token() == {"bf16": 2.0 * (llama.parameters - llama.embedding_weights)}
    assert llama.flops_per_token(head=False) == {"bf16": 2.0 * (llama.parameters - 2 * llama.embedding_weights)}
    deepseek = read_architecture(DEEPSEEK_V3).flops_per_token()
    assert set(deepseek) == {"fp8", "bf16"} and deepseek["bf16"] == 2.0 * 129280 * 7168
    assert llama.attention_flops(1000) == 4 * 4096 * 32 * 1000  # q.k and p.v over every head


def test_an_eagle_head_has_one_layer():
    llama = read_architecture(LLAMA_8B)
    head = eagle_head(llama)
    layer = (llama.shared_weights - 4096) / 32
    assert head.shared_weights == layer + 4096 + 2 * 4096**2  # one layer, one norm, the projection at the entry
    assert head.kv_bytes_per_token() == 131072 / 32
    assert not eagle_head(read_architecture(MIXTRAL_8X7B)).is_moe
    latent = read_architecture(DEEPSEEK_V3)
    assert eagle_head(latent).kv_bytes_per_token() == latent.kv_bytes_per_token() / 61  # its attention is theirs
    assert eagle_head(latent).attention_weights == latent.attention_weights


def test_files_folders_and_nested_configurations(tmp_path):
    expected = read_architecture(LLAMA_8B)
    folder = tmp_path / "my-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "vlm", "text_config": LLAMA_8B}))
    for path in (folder, folder / "config.json"):
        read = read_architecture(path)
        assert (read.parameters, read.name) == (expected.parameters, "my-llama")
    odd = read_architecture(LLAMA_8B | {"model_type": "brand_new"})
    assert odd.parameters == expected.parameters and "'brand_new' is not one of the checked ones" in odd.notes[0]


def test_dense_layers_of_a_mixture():
    model = read_architecture(QWEN3_30B_A3B | {"decoder_sparse_step": 2, "mlp_only_layers": [1, 3]})
    assert model.moe_layers == 22  # layers 5, 7, ..., 47


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_size": None}, "no hidden_size; supported: apertus"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers: got '32'; allowed: a whole number"),
        ({"num_hidden_layers": 0}, "layers: got 0"),
        ({"num_attention_heads": 0}, "heads: got 0"),
        ({"num_hidden_layers": 1e30}, "num_hidden_layers: got 1e+30; allowed: a whole number, up to"),
        ({"num_hidden_layers": 20_000}, "num_hidden_layers: got 20000; allowed: 1 to 10000"),
        ({"hidden_size": 10**400}, "hidden_size: got about 1e+08...; allowed"),
        ({"vocab_size": float("nan")}, "vocab_size: got nan; allowed"),
        ({"hidden_size": float("inf")}, "hidden_size: got inf; allowed"),
        ({"layer_types": 3}, "layer_types: got 3; allowed: a list"),
        ({"sliding_window": "x"}, "sliding_window: got 'x'; allowed: a whole number"),
        ({"quantization_config": "fp8"}, "quantization_config: got 'fp8'; allowed: an object"),
        ({"quantization_config": {"quant_method": "awq", "bits": "x"}}, "bits: got 'x'; allowed: a number of bits"),
        ({"quantization_config": {"quant_method": "fp8", "kv_cache_scheme": "auto"}}, "kv_cache_scheme: got 'auto'"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": 3}}}, "g: got 3"),
        ({"full_attention_interval": 4, "linear_num_key_heads": 16}, "has full_attention_interval, linear_num_key"),
        ({"attn_type_list": [0, 0, 1]}, "linear attention (attn_type_list)"),
        ({"linear_attn_config": {"kda_layers": [1]}}, "has linear_attn_config"),
        ({"full_attn_idxs": [2]}, "has full_attn_idxs"),
        ({"block_configs": [{}]}, "has block_configs"),
        ({"model_type": "bert"}, "an encoder"),
        ({"num_local_experts": 8}, "no num_experts_per_tok or experts_per_token"),
        ({"num_local_experts": 8, "num_experts_per_tok": 9}, "experts_per_token: got 9; allowed: 1 to 8"),
        ({"layer_types": ["linear_attention"]}, "layers of type linear_attention"),
        ({"is_encoder_decoder": True}, "an encoder"),
        ({"torch_dtype": "float64"}, "torch_dtype: got 'float64'"),
        ({"quantization_config": {"quant_method": "novel"}}, "got quant_method 'novel'; allowed: fp8"),
    ],
)
def test_what_cannot_be_read_is_said(change, told):
    with pytest.raises(InputError, match=re.escape(told)):
        read_architecture(LLAMA_8B | change)


@pytest.mark.parametrize(("text", "told"), [("[1]", "got a list"), ("{", "not a Hugging Face"), (None, "no such file")])
def test_bad_files_are_named(tmp_path, text, told):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=told) as caught:
        read_architecture(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"intermediate": -16}, "intermediate: got -16"),
        ({"kv_bits": float("nan")}, "kv_bits: got nan"),
        ({"kv_bits": 0.0}, "kv_bits: got 0.0; allowed: a positive number"),
        ({"sliding_layers": 3}, "sliding_layers: got 3; allowed: 0 to 2"),
    ],
)
def test_dimensions_are_checked(change, told):
    fine = {"layers": 2, "hidden": 8, "vocab": 32, "heads": 2, "kv_heads": 1, "head_dim": 4, "intermediate": 16}
    with pytest.raises(InputError, match=re.escape(told)):
        Transformer("x", **(fine | change))


def test_no_dimension_is_negative():
    with pytest.raises(InputError, match="moe_layers"):
        Transformer("x", 2, 8, 32, 2, 1, 4, 16, moe_layers=3, num_experts=4)
