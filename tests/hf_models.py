"""Tiny checkpoints made with transformers, for tests against the real library."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def make_hf_model(
    path: Path,
    family: str = "qwen2",
    *,
    tie: bool,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 128,
    seed: int = 0,
    std: float = 0.2,
) -> PreTrainedModel:
    """Writes a float32 model directory and returns the model. Without `head_dim` the heads make up
    the hidden size in Qwen2, and twice the hidden size in Qwen3.

    Weights are wider than a fresh model's and biases are not zero, so that a wrong norm, bias or
    rotation shows in the logits.
    """
    config_class, model_class = FAMILIES[family]
    if head_dim is None and family == "qwen3":
        head_dim = 2 * hidden // heads
    config = config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        initializer_range=std,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **({} if head_dim is None else {"head_dim": head_dim}),
    )
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, std)
            elif "norm" in name:
                parameter.normal_(1.0, 0.2)
    model.save_pretrained(path)
    return model
