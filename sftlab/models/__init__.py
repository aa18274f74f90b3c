"""Load a model: precision, quantization, LoRA, attention, the loss (notebooks 05 and 06)."""

from sftlab.models.load import TINY_BASE, build_config, build_random, load_model, load_tokenizer, locate, lora_config

__all__ = ["TINY_BASE", "build_config", "build_random", "load_model", "load_tokenizer", "locate", "lora_config"]
