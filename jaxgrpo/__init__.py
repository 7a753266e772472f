"""GRPO on masked variable-rank LoRA for Qwen2.5 and Qwen3, in JAX."""

__version__ = "0.1.0"
