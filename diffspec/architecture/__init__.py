"""Dimensions of verifier and drafter: from a Hugging Face configuration to bytes and FLOP."""

from diffspec.architecture.huggingface import CHECKED, read_architecture
from diffspec.architecture.transformer import Transformer, eagle_head

__all__ = ["CHECKED", "Transformer", "eagle_head", "read_architecture"]
