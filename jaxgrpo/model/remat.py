"""Rematerialisation: what training keeps of the forward pass, and which policy `auto` comes to."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Int

from jaxgrpo.mesh import batch_parts, on_one_device
from jaxgrpo.model.presets import Qwen2Config
from jaxgrpo.types import Packing

PRODUCTS = ("normed", "q", "k", "v", "attended", "residual", "gate_up", "gated", "down")
"""What goes into matrix products and comes out of them, by the names that `qwen2` gives. `down` is
an adapter's inner value. Inputs are kept too: they exist in memory for the product anyway."""

HEAD_BYTES = 10 * 4096
"""A chunk of the head per vocabulary entry: scores, their copy, probabilities of 4,096 tokens."""


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


def fuse_adapters() -> bool:
    """Whether adapters are worth their place inside the frozen products (`lora.fused_product`)."""
    return on_one_device() and jax.default_backend() == "gpu"


def resolve_remat(
    config: Qwen2Config,
    remat: str,
    tokens: Int[Array, "B T"],
    packing: Packing | None,
    micro_batches: int = 1,
) -> str:
    """`ModelConfig.remat` with `auto` resolved for these rows in so many parts."""
    if packing is None:
        return choose_remat(config, remat, tokens.size // micro_batches)
    # cuDNN's attention keeps its output row by row.
    attended = packing.rows.size if jax.default_backend() == "gpu" else 0
    size = packing.tokens.size
    return choose_remat(config, remat, size // micro_batches, attended // micro_batches)


def unroll_layers(remat: str) -> bool:
    """Whether training writes its layers out one after another.

    A loop stacks what it keeps for the backward pass, which on GPU costs two more copies of every
    kept value. With nothing kept the loop is as fast and compiles in a fraction of the time.
    """
    return remat in ("none", "products") and on_one_device() and jax.default_backend() == "gpu"


def kept_bytes_per_token(config: Qwen2Config) -> int:
    """What `products` keeps of one token, all layers together (adapters' inner values aside)."""
    shapes = config.module_shapes
    features = sum(shapes[m][1] for m in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    features += shapes["o_proj"][0] + shapes["down_proj"][0] + 3 * config.hidden_size
    return config.num_layers * features * config.compute_dtype.itemsize


def choose_remat(config: Qwen2Config, remat: str, tokens: int, attended: int = 0) -> str:
    """`auto` resolved for a micro-batch of `tokens` tokens, of which attention makes `attended`
    rows and padding: `products` if that fits, otherwise `full`. Devices that do not tell their
    memory get `full`."""
    if remat != "auto":
        return remat
    stats = jax.local_devices()[0].memory_stats() or {}
    parts = batch_parts()
    return remat_that_fits(config, tokens // parts, stats.get("bytes_limit", 0), attended // parts)


def remat_that_fits(config: Qwen2Config, tokens: int, memory: int, attended: int = 0) -> str:
    """What `auto` is for so many tokens on one device of `memory` bytes; 0: not known.

    `products` may take half of the memory, and on one GPU, where it was measured, all that is left
    beside weights (frozen, joined with the adapters, and the sampler's), a chunk of the head and a
    reserve.
    """
    size = config.compute_dtype.itemsize
    kept = tokens * kept_bytes_per_token(config)
    kept += attended * config.num_layers * config.module_shapes["o_proj"][0] * size
    room = 0.5 * memory
    if fuse_adapters():
        beside = 3 * config.num_parameters * size + HEAD_BYTES * config.vocab_size
        room = max(room, 0.9 * memory - beside)
    return "products" if kept < room else "full"
