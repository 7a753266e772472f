"""Rematerialisation: what training keeps of the forward pass, and which policy `auto` comes to."""

from __future__ import annotations

from typing import Any

import jax

from jaxgrpo.model.presets import QwenConfig
from jaxgrpo.types import Packing

PRODUCTS = ("normed", "q", "k", "v", "attended", "residual", "gate_up", "gated", "down")
"""What goes into matrix products and comes out of them, by the names that `qwen` gives. `down` is
an adapter's inner value. Inputs are kept too: they exist in memory for the product anyway."""


def checkpoint_policy(remat: str) -> Any:
    """What `jax.checkpoint` keeps under the named policy; None: nothing."""
    return _keep_products if remat == "products" else None


_keep_named = jax.checkpoint_policies.save_only_these_names(*PRODUCTS)


def _keep_products(primitive: Any, *args: Any, **params: Any) -> Any:
    """What PRODUCTS names and, where cuDNN attends, what its own backward pass wants: output and
    log-sum-exp. They have no names, and without them the forward pass would run twice."""
    if primitive.name.startswith("dot_product_attention_fwd"):
        return True
    return _keep_named(primitive, *args, **params)


def unroll_layers(config: QwenConfig, remat: str) -> bool:
    """Whether training writes its layers out one after another.

    A loop stacks what it keeps for the backward pass, which on GPU costs two more copies of every
    kept value. With nothing kept the loop is as fast and compiles in a fraction of the time.
    """
    return remat in ("none", "products") and config.device.single_gpu


def kept_bytes_per_token(config: QwenConfig) -> int:
    """What `products` keeps of one token, all layers together (adapters' inner values aside)."""
    shapes = config.module_shapes
    features = sum(shapes[m][1] for m in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    features += shapes["o_proj"][0] + shapes["down_proj"][0] + 3 * config.hidden_size
    return config.num_layers * features * config.compute_dtype.itemsize


def head_bytes(config: QwenConfig, chunk_tokens: int) -> int:
    """A chunk of the head: scores and probabilities in float32, and those in the weights' dtype."""
    return chunk_tokens * config.vocab_size * (8 + config.compute_dtype.itemsize)


def resolve_remat(
    config: QwenConfig, remat: str, *, tokens: int, attended: int, chunk_tokens: int
) -> str:
    """`ModelConfig.remat` with `auto` resolved for a micro-batch: `products` if what it keeps fits,
    otherwise `full`. A device that does not tell its memory gets `full`.

    `products` may take half of the memory, and on one GPU, where it was measured, all that is left
    beside weights (frozen, joined with the adapters, and the sampler's), a chunk of the head and a
    reserve.

    Args:
        tokens: of the micro-batch on each device.
        attended: what attention makes of them there: places of rows, with their padding.
        chunk_tokens: `GrpoConfig.logprob_chunk_tokens`.
    """
    if remat != "auto":
        return remat
    memory, size = config.device.memory or 0, config.compute_dtype.itemsize
    kept = tokens * kept_bytes_per_token(config)
    if config.device.platform == "gpu":
        # cuDNN's attention keeps its output row by row.
        kept += attended * config.num_layers * config.module_shapes["o_proj"][0] * size
    room = 0.5 * memory
    if config.device.single_gpu:
        beside = 3 * config.num_parameters * size + head_bytes(config, chunk_tokens)
        room = max(room, 0.9 * memory - beside)
    return "products" if kept < room else "full"


def remat_of_batch(config: QwenConfig, remat: str, packing: Packing, chunk_tokens: int) -> str:
    """`resolve_remat` for one bin of each batch shard at a time."""
    shards, _, places = packing.tokens.shape
    held = shards // config.device.batch_shards
    return resolve_remat(
        config,
        remat,
        tokens=held * places,
        attended=held * packing.member.shape[2] * packing.row_places,
        chunk_tokens=chunk_tokens,
    )
