"""Writes a Hugging Face directory of a preset's shapes with random weights and a real tokenizer.

For speed and memory measurements at full size where the trained weights are not at hand:

    python scripts/make_random_model.py OUT --preset qwen2.5-1.5b --tokenizer DIR
    python -m jaxgrpo.run train configs/gsm8k_1.5b.yaml model.path=OUT ...
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from jaxgrpo.model.hf_config import config_fields
from jaxgrpo.model.presets import PRESETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="qwen2.5-1.5b")
    parser.add_argument("--tokenizer", required=True, help="a tokenizer's directory or hub id")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has")
    parser.add_argument("--hidden", type=int, help="a smaller hidden size, a multiple of 64")
    parser.add_argument("--mlp", type=int, help="a smaller mlp size")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    preset = PRESETS[args.preset]
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    hidden = args.hidden or preset.hidden_size
    heads, head_dim = preset.num_heads, preset.head_dim
    if hidden != preset.hidden_size and not preset.qk_norm:  # Qwen2's heads make up the hidden size
        heads = max(2, hidden // 64)
        head_dim = hidden // heads
    shapes = dataclasses.replace(
        preset,
        hidden_size=hidden,
        intermediate_size=args.mlp or preset.intermediate_size,
        num_layers=args.layers or preset.num_layers,
        num_heads=heads,
        head_dim=head_dim,
    )
    config = AutoConfig.for_model(
        **config_fields(shapes),
        max_position_embeddings=32768,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.cpu().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
