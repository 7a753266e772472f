"""Tiny Qwen2 checkpoints made with transformers, for tests against the real library."""

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


def make_hf_model(
    path: Path,
    *,
    tie: bool,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 128,
    seed: int = 0,
    std: float = 0.2,
) -> Qwen2ForCausalLM:
    """Writes a float32 model directory and returns the model.

    Weights are wider than a fresh model's and biases are not zero, so that a wrong norm, bias or
    rotation shows in the logits.
    """
    config = Qwen2Config(
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
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, std)
            elif "norm" in name:
                parameter.normal_(1.0, 0.2)
    model.save_pretrained(path)
    return model
