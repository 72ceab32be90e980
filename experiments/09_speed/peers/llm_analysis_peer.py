# ruff: noqa: E402
"""llm-analysis: `LLMAnalysis.inference`, which answers prefill and decode in one call."""

import logging
import time

start = time.perf_counter()
from importlib.metadata import version

import question
from llm_analysis.analysis import LLMAnalysis
from llm_analysis.config import ModelConfig, get_dtype_config_by_name, get_gpu_config_by_name
from llm_analysis.logger import logger

imported = time.perf_counter() - start
logger.setLevel(logging.ERROR)
m = question.MODEL
MODEL = ModelConfig(
    name="llama-3.1-8b",
    num_layers=m["layers"],
    n_head=m["heads"],
    hidden_dim=m["hidden"],
    vocab_size=m["vocabulary"],
    max_seq_len=131072,
    num_key_value_heads=m["kv_heads"],
    ffn_embed_dim=m["ffn"],
    expansion_ratio=m["ffn"] / m["hidden"],
    model_type="llama",
)
HARDWARE = get_gpu_config_by_name("h100-sxm-80gb"), get_dtype_config_by_name("w16a16e16")
ANALYSIS = LLMAnalysis(MODEL, *HARDWARE, flops_efficiency=1.0, hbm_memory_efficiency=1.0)


def asked(batch: int, context: int) -> dict:
    return ANALYSIS.inference(batch_size_per_gpu=batch, seq_len=context, num_tokens_to_generate=2)


def decode(batch: int, context: int) -> float:
    return float(asked(batch, context)["decode_latency"])


def prefill(prompt: int) -> float:
    return float(asked(1, prompt)["prefill_latency"])


if __name__ == "__main__":
    question.tell(version("llm-analysis"), imported, decode, prefill)
