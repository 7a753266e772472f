"""Rotary positions and causal attention over whole rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgrpo.devices import Device
from jaxgrpo.mesh import constrain
from jaxgrpo.model.presets import QwenConfig

Rope = tuple[jax.Array, jax.Array]
"""cos, sin: float32 [..., H/2]."""


class DecodePosition(NamedTuple):
    """Where the next token of every row stands, the same in all layers.

    Attributes:
        rope: of its position in the row.
        prompt_mask: True on prompt tokens.
        prompt_of: which prompt a row continues; None: row p*G+g continues prompt p.
        slot: of the completion's cache.
        arm: which arm a row belongs to; None: there is one.
    """

    rope: Rope
    prompt_mask: Bool[Array, "P S"]
    prompt_of: Int[Array, " B"] | None
    slot: Int[Array, ""]
    arm: Int[Array, " B"] | None = None


def rotary_tables(config: QwenConfig, positions: Int[Array, "..."]) -> Rope:
    """cos and sin of position * theta^(-2i/H), in float32."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    angles = positions[..., None].astype(jnp.float32) * frequencies.reshape(
        (1,) * positions.ndim + (-1,)
    )
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x: Float[Array, "... heads H"], rope: Rope) -> Float[Array, "... heads H"]:
    """Rotates the two halves of each head (the "rotate_half" layout), in float32."""
    cos, sin = (table[..., None, :] for table in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Bool[Array, "B T"] | None,
    lengths: Int[Array, " B"] | None,
    device: Device,
) -> Float[Array, "B T N H"]:
    """Grouped-query causal attention.

    Args:
        mask: hides padding keys (needed for left padding only).
        lengths: of right-padded rows, for programs that can leave out the rest, which then means
            nothing, in the gradient as well.
    """
    # cuDNN's kernel has no float32 form and wants no explicit mask; plain XLA takes everything.
    if mask is None and q.dtype == jnp.bfloat16 and device.platform == "gpu":
        parts = device.count // device.batch_shards
        return jax.nn.dot_product_attention(
            q,
            split_like_queries(k, parts),
            split_like_queries(v, parts),
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
    rows, length, heads, head_dim = q.shape
    groups = k.shape[2]
    # Queries that share a key head stand under each other, so that each product is one plain
    # matrix product per row and key head: on CPU three times as fast as one over five axes.
    q = q.reshape(rows, length, groups, heads // groups, head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(rows, groups, -1, head_dim)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    seen = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if mask is not None:
        seen = seen & mask[:, None, None, :]
    seen = jnp.tile(seen, (1, 1, heads // groups, 1))
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1).astype(v.dtype)
    attended = jnp.matmul(weights, v).reshape(rows, groups, heads // groups, length, head_dim)
    return attended.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, head_dim)


def split_like_queries(x: Float[Array, "B T K H"], parts: int) -> Float[Array, "B T M H"]:
    """Keys or values as cuDNN's kernel wants them where the model axis splits the queries' heads
    into so many parts: split in the same way. A head that several parts need is there as often."""
    if parts == 1:
        return x
    heads = x.shape[2]
    x = jnp.repeat(x, math.lcm(heads, parts) // heads, axis=2)
    return constrain(x, "act_batch", "act_length", "act_heads", "head_dim")
