"""Attention of one new token per row, as one Triton kernel: no scores in memory, no idle slots.

One program per row and key/value head. It reads the row's prompt, from the cache that its group
shares (so that the group's other rows find it in the card's L2), from the first real token on;
then the row's own slots up to the current one. The cost follows the real length, whatever the
caches' size.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

BLOCK = 32
"""Cache slots per pass of the loop: caches of this kernel are multiples of it."""

PADDED_HEADS = 16
"""The tensor cores' smallest tile: query heads sharing a key/value head are padded to it."""

State = tuple[jax.Array, jax.Array, jax.Array]
"""Running output, maximum and sum of an online softmax."""


def decode_attention(
    q: Float[Array, "B N H"],
    prompt: dict[str, jax.Array],
    prompt_start: Int[Array, " P"],
    completion: dict[str, jax.Array],
    slot: Int[Array, ""],
    *,
    block: int = BLOCK,
    num_warps: int = 2,
    num_stages: int = 3,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """One query per row over its prompt's slots from `prompt_start` and its own up to `slot`.

    Args:
        prompt: {"k", "v"} [P, K, S, H], S a multiple of `block`.
        completion: {"k", "v"} [B, K, C, H], C a multiple of `block`.
        interpret: run without a GPU, for tests.
    """
    rows, heads, head_dim = q.shape
    prompts, kv_heads, prompt_slots, _ = prompt["k"].shape
    slots = completion["k"].shape[2]
    group, shared = rows // prompts, heads // kv_heads
    assert prompt_slots % block == 0 and slots % block == 0, (prompt_slots, slots, block)
    assert shared <= PADDED_HEADS, f"{shared} query heads share a key/value head"
    kernel = functools.partial(
        _kernel, shared=shared, prompt_slots=prompt_slots, block=block, scale=head_dim**-0.5
    )
    of_row = pl.BlockSpec((None, None, PADDED_HEADS, head_dim), lambda b, k: (b, k, 0, 0))
    of_prompt = pl.BlockSpec(
        (None, None, prompt_slots, head_dim), lambda b, k: (b // group, k, 0, 0)
    )
    own = pl.BlockSpec((None, None, slots, head_dim), lambda b, k: (b, k, 0, 0))
    out = pl.pallas_call(
        kernel,
        # Rows vary fastest, so that the rows of a group run side by side.
        grid=(rows, kv_heads),
        in_specs=[
            of_row,
            of_prompt,
            of_prompt,
            pl.BlockSpec((None,), lambda b, k: (b // group,)),
            own,
            own,
            pl.BlockSpec((), lambda b, k: ()),
        ],
        out_specs=of_row,
        out_shape=jax.ShapeDtypeStruct((rows, kv_heads, shared, head_dim), q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name="decode_attention",
    )(
        q.reshape(rows, kv_heads, shared, head_dim),
        prompt["k"],
        prompt["v"],
        prompt_start,
        completion["k"],
        completion["v"],
        slot,
    )
    return out.reshape(rows, heads, head_dim)


def _kernel(
    q_ref: Any,
    prompt_k: Any,
    prompt_v: Any,
    start_ref: Any,
    own_k: Any,
    own_v: Any,
    slot_ref: Any,
    out_ref: Any,
    *,
    shared: int,
    prompt_slots: int,
    block: int,
    scale: float,
) -> None:
    heads = jnp.arange(PADDED_HEADS) < shared
    tile = pl.ds(0, PADDED_HEADS)
    q = plgpu.load(q_ref.at[tile, :], mask=heads[:, None], other=0.0)
    head_dim = q.shape[1]
    # Base 2 throughout: exp2 is the card's own instruction.
    factor = scale * math.log2(math.e)

    def attend(k_ref: Any, v_ref: Any, first: jax.Array, end: jax.Array, state: State) -> State:
        def step(i: jax.Array, state: State) -> State:
            out, top, total = state
            places = pl.ds(i * block, block)
            scores = plgpu.dot(q, k_ref[places, :].T) * factor
            index = i * block + jnp.arange(block)
            seen = (index >= first) & (index < end)
            scores = jnp.where(seen[None, :], scores, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1))
            shrink = jnp.exp2(top - new_top)
            weights = jnp.exp2(scores - new_top[:, None])
            total = total * shrink + jnp.sum(weights, axis=1)
            out = out * shrink[:, None] + plgpu.dot(weights.astype(v_ref.dtype), v_ref[places, :])
            return out, new_top, total

        return jax.lax.fori_loop(first // block, pl.cdiv(end, block), step, state)

    # A finite start: a block whose slots are all hidden must not make -inf - -inf.
    state = (
        jnp.zeros((PADDED_HEADS, head_dim), jnp.float32),
        jnp.full((PADDED_HEADS,), -1e30, jnp.float32),
        jnp.zeros((PADDED_HEADS,), jnp.float32),
    )
    state = attend(prompt_k, prompt_v, start_ref[...], jnp.int32(prompt_slots), state)
    out, _, total = attend(own_k, own_v, jnp.int32(0), slot_ref[...] + 1, state)
    out = (out / total[:, None]).astype(out_ref.dtype)
    plgpu.store(out_ref.at[tile, :], out, mask=heads[:, None])
