"""Key/value caches for decoding: one for the prompts, shared by each group, one per completion.

A prompt's keys and values are stored once and attended by the G rows of its group; completions
have slots of their own. Heads come before slots, so that the batched products need no transpose.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgrpo.model.decode_attention import BLOCK
from jaxgrpo.model.presets import QwenConfig

LayerCache = dict[str, jax.Array]
"""{"k": [rows, K, slots, H], "v": the same}."""


class PromptCache(NamedTuple):
    """What is kept of left-padded prompts while their completions are sampled.

    Attributes:
        layers: of P prompts with S slots.
        mask: True on prompt tokens.
        arm: which arm a prompt belongs to; None: there is one.
    """

    layers: tuple[LayerCache, ...]
    mask: Bool[Array, "P S"]
    arm: Int[Array, " P"] | None = None


def init_completion_cache(config: QwenConfig, rows: int, slots: int) -> tuple[LayerCache, ...]:
    """Empty caches, one per layer."""
    slots = cache_slots(config, slots)
    shape = (rows, config.num_kv_heads, slots, config.head_dim)
    return tuple(
        {name: jnp.zeros(shape, config.compute_dtype) for name in ("k", "v")}
        for _ in range(config.num_layers)
    )


def write_slot(cache: LayerCache, k: jax.Array, v: jax.Array, slot: jax.Array) -> LayerCache:
    """Puts k, v [B, K, H] into `slot` of every row."""
    start = (0, 0, slot, 0)
    return {
        "k": jax.lax.dynamic_update_slice(cache["k"], k[:, :, None, :], start),
        "v": jax.lax.dynamic_update_slice(cache["v"], v[:, :, None, :], start),
    }


def use_kernel(config: QwenConfig) -> bool:
    """Whether `decode_attention` serves: it has no float32 form and knows one device."""
    return config.compute_dtype == jnp.bfloat16 and config.device.single_gpu


def cache_slots(config: QwenConfig, slots: int) -> int:
    """`slots`, or what the kernel's blocks need."""
    return -(-slots // BLOCK) * BLOCK if use_kernel(config) else slots


def plain_attention(
    q: Float[Array, "B N H"],
    prompt: LayerCache,
    prompt_mask: Bool[Array, "P S"],
    completion: LayerCache,
    slot: Int[Array, ""],
) -> Float[Array, "B N H"]:
    """One query per row over its prompt's cache and its own slots up to `slot`, as one softmax;
    row p*G+g continues prompt p."""
    rows, heads, head_dim = q.shape
    prompts, kv_heads = prompt["k"].shape[:2]
    group = rows // prompts
    per_kv = heads // kv_heads
    # Query heads n = k * per_kv + j share key/value head k.
    q = q * jnp.asarray(head_dim**-0.5, q.dtype)
    q_prompt = q.reshape(prompts, group, kv_heads, per_kv, head_dim)
    q_prompt = q_prompt.transpose(0, 2, 1, 3, 4).reshape(prompts, kv_heads, -1, head_dim)
    q_row = q.reshape(rows, kv_heads, per_kv, head_dim)
    f32 = jnp.float32
    on_prompt = jnp.einsum("pkqh,pksh->pkqs", q_prompt, prompt["k"], preferred_element_type=f32)
    on_prompt = jnp.where(prompt_mask[:, None, None, :], on_prompt, -jnp.inf)
    on_prompt = on_prompt.reshape(prompts, kv_heads, group, per_kv, -1)
    on_prompt = on_prompt.transpose(0, 2, 1, 3, 4).reshape(rows, kv_heads, per_kv, -1)
    on_own = jnp.einsum("bkjh,bksh->bkjs", q_row, completion["k"], preferred_element_type=f32)
    slots = jnp.arange(completion["k"].shape[2])
    on_own = jnp.where(slots[None, None, None, :] <= slot, on_own, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([on_prompt, on_own], axis=-1), axis=-1)
    weights = weights.astype(q.dtype)
    prompt_slots = prompt["k"].shape[2]
    w_prompt = weights[..., :prompt_slots].reshape(prompts, group, kv_heads, per_kv, -1)
    w_prompt = w_prompt.transpose(0, 2, 1, 3, 4).reshape(prompts, kv_heads, -1, prompt_slots)
    from_prompt = jnp.einsum("pkqs,pksh->pkqh", w_prompt, prompt["v"], preferred_element_type=f32)
    from_prompt = from_prompt.reshape(prompts, kv_heads, group, per_kv, head_dim)
    from_prompt = from_prompt.transpose(0, 2, 1, 3, 4).reshape(rows, heads, head_dim)
    from_own = jnp.einsum(
        "bkjs,bksh->bkjh",
        weights[..., prompt_slots:],
        completion["v"],
        preferred_element_type=f32,
    )
    return (from_prompt + from_own.reshape(rows, heads, head_dim)).astype(q.dtype)
