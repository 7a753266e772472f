"""A layer's attention for one new token per row, as one Triton kernel.

It rotates queries and new keys, writes key and value into each row's cache, and attends. Two kinds
of programs run side by side: one per prompt and key/value head attends the prompt for all rows of
its group at once, so that a prompt is read once and not once a row; one per row and key/value head
attends the row's own tokens and the new one. The two parts of a row are one softmax, put together
afterwards from their maxima and sums. The cost follows the real lengths, whatever the caches' size.
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
"""Cache slots per pass of the loops: caches of this kernel are multiples of it."""

ROW_QUERIES = 16
"""The tensor cores' smallest tile: query heads sharing a key/value head are padded to it."""

GROUP_QUERIES = 64
"""Queries per program of the first kind: as many rows of a group as fit."""

State = tuple[jax.Array, jax.Array, jax.Array]
"""Running output, maximum and sum of an online softmax."""


def decode_attention(
    qkv: Float[Array, "B heads H"],
    rope: tuple[Float[Array, "B half"], Float[Array, "B half"]],
    prompt: dict[str, jax.Array],
    prompt_start: Int[Array, " P"],
    rows_from: Int[Array, " P1"],
    completion: dict[str, jax.Array],
    slot: Int[Array, ""],
    *,
    group_size: int,
    block: int = BLOCK,
    num_warps: int = 4,
    num_stages: int = 3,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], dict[str, jax.Array]]:
    """One query per row over its prompt's slots from `prompt_start` and its own up to `slot`.

    Args:
        qkv: queries (N heads), keys (K) and values (K) of the new tokens, not yet rotated.
        rope: cosine and sine at each row's position (`qwen2.rotary_tables`), float32.
        prompt: {"k", "v"} [P, K, S, H], S a multiple of `block`.
        rows_from: [P + 1]; rows rows_from[p] to rows_from[p + 1] continue prompt p, at most
            `group_size` of them.
        completion: {"k", "v"} [B, K, C, H], C a multiple of `block`; updated in place.
        interpret: run without a GPU, for tests.

    Returns:
        What was attended, and `completion` with the new keys and values in `slot`.
    """
    rows, all_heads, head_dim = qkv.shape
    prompts, kv_heads, prompt_slots = prompt["k"].shape[:3]
    slots = completion["k"].shape[2]
    heads = all_heads - 2 * kv_heads
    shared = heads // kv_heads
    assert prompt_slots % block == 0 and slots % block == 0, (prompt_slots, slots, block)
    assert shared <= ROW_QUERIES, f"{shared} query heads share a key/value head"
    tile = GROUP_QUERIES // shared
    tiles = pl.cdiv(group_size, tile)
    of_prompts = prompts * tiles
    kernel = functools.partial(
        _kernel, heads=heads, shared=shared, tile=tile, tiles=tiles, block=block
    )

    def whole(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda item, kv: (0,) * len(x.shape))

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    # First axis: the prompt's part and the row's own.
    found = (
        shape(2, rows, heads, head_dim),
        shape(2, rows, heads),
        shape(2, rows, heads),
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (completion["k"], completion["v"])),
    )
    given = (
        qkv,
        *rope,
        prompt["k"],
        prompt["v"],
        prompt_start,
        rows_from,
        slot[None],
        completion["k"],
        completion["v"],
    )
    out, top, total, keys, values = pl.pallas_call(
        kernel,
        # The longer programs first; rows vary fastest, so that a group's run side by side.
        grid=(of_prompts + rows, kv_heads),
        in_specs=[whole(x) for x in given],
        out_specs=[whole(x) for x in found],
        out_shape=found,
        input_output_aliases={8: 3, 9: 4},
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name="decode_attention",
    )(*given)
    weight = jnp.exp2(top - jnp.max(top, axis=0, keepdims=True))
    out = jnp.sum(out * weight[..., None], axis=0) / jnp.sum(total * weight, axis=0)[..., None]
    return out.astype(qkv.dtype), {"k": keys, "v": values}


def _kernel(
    qkv: Any,
    cos: Any,
    sin: Any,
    prompt_k: Any,
    prompt_v: Any,
    prompt_start: Any,
    rows_from: Any,
    slot_ref: Any,
    own_k: Any,
    own_v: Any,
    out_ref: Any,
    top_ref: Any,
    total_ref: Any,
    new_k: Any,
    new_v: Any,
    *,
    heads: int,
    shared: int,
    tile: int,
    tiles: int,
    block: int,
) -> None:
    item, kv = pl.program_id(0), pl.program_id(1)
    kv_heads, prompt_slots, head_dim = prompt_k.shape[1:]
    half, dtype = head_dim // 2, new_k.dtype
    f32 = jnp.float32
    column, all_ = jnp.arange(half)[None, :], pl.ds(0, head_dim)
    # Base 2 throughout: exp2 is the card's own instruction.
    factor = head_dim**-0.5 * math.log2(math.e)
    of_prompts = prompt_k.shape[0] * tiles

    def rotated(row: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Heads of rows ([n] each) as halves, since a rotation mixes the two."""
        row, head = row[:, None], head[:, None]
        first, second = (
            qkv[row, head, column].astype(f32),
            qkv[row, head, half + column].astype(f32),
        )
        c, s = cos[row, column], sin[row, column]
        return (first * c - second * s).astype(dtype), (second * c + first * s).astype(dtype)

    def attend(
        q: tuple[jax.Array, jax.Array],
        k_ref: Any,
        v_ref: Any,
        where: tuple[jax.Array, jax.Array],
        first: jax.Array,
        end: jax.Array,
        state: State,
    ) -> State:
        """Over the slots from `first` to `end` of the row and key/value head `where`."""

        def step(i: jax.Array, state: State) -> State:
            out, top, total = state
            places = pl.ds(i * block, block)
            scores = plgpu.dot(q[0], k_ref[*where, places, pl.ds(0, half)].T)
            scores = (scores + plgpu.dot(q[1], k_ref[*where, places, pl.ds(half, half)].T)) * factor
            index = i * block + jnp.arange(block)
            seen = (index >= first) & (index < end)
            scores = jnp.where(seen[None, :], scores, -jnp.inf)
            # Finite, or a first block that is hidden from a row would be -inf - -inf.
            new_top = jnp.maximum(jnp.maximum(top, jnp.max(scores, axis=1)), -1e30)
            shrink = jnp.exp2(top - new_top)
            weights = jnp.exp2(scores - new_top[:, None])
            total = total * shrink + jnp.sum(weights, axis=1)
            out = out * shrink[:, None] + plgpu.dot(
                weights.astype(dtype), v_ref[*where, places, all_]
            )
            return out, new_top, total

        return jax.lax.fori_loop(first // block, pl.cdiv(end, block), step, state)

    def store(part: int, row: jax.Array, head: jax.Array, state: State) -> None:
        out, top, total = state
        part = jnp.full_like(row, part)
        out_ref[part[:, None], row[:, None], head[:, None], jnp.arange(head_dim)[None, :]] = out
        top_ref[part, row, head] = top
        total_ref[part, row, head] = total

    # A tile that has fewer queries than places repeats its last one, which then writes the same
    # values to the same place: nothing needs a mask.
    prompt = jnp.minimum(item // tiles, prompt_k.shape[0] - 1)
    first_row = rows_from[prompt] + (item % tiles) * tile
    left = rows_from[prompt + 1] - first_row

    @pl.when((item < of_prompts) & (left > 0))
    def _() -> None:
        query = jnp.minimum(jnp.arange(GROUP_QUERIES), jnp.minimum(left, tile) * shared - 1)
        row, head = first_row + query // shared, kv * shared + query % shared
        state = (
            jnp.zeros((GROUP_QUERIES, head_dim), f32),
            jnp.full((GROUP_QUERIES,), -1e30, f32),
            jnp.zeros((GROUP_QUERIES,), f32),
        )
        q, where = rotated(row, head), (prompt, kv)
        start, end = prompt_start[prompt], jnp.int32(prompt_slots)
        store(0, row, head, attend(q, prompt_k, prompt_v, where, start, end, state))

    @pl.when(item >= of_prompts)
    def _() -> None:
        number, slot = item - of_prompts, slot_ref[0]
        query = jnp.minimum(jnp.arange(ROW_QUERIES), shared - 1)
        row, head = jnp.full_like(query, number), kv * shared + query
        q = rotated(row, head)
        k = rotated(jnp.full((1,), number), jnp.full((1,), heads + kv))
        value = qkv[pl.ds(number, 1), heads + kv_heads + kv, all_]
        place = pl.ds(slot, 1)
        new_k[number, kv, place, pl.ds(0, half)] = k[0]
        new_k[number, kv, place, pl.ds(half, half)] = k[1]
        new_v[number, kv, place, all_] = value
        # The new token first: its value is still in hand.
        score = jnp.sum(q[0].astype(f32) * k[0].astype(f32), axis=1)
        score += jnp.sum(q[1].astype(f32) * k[1].astype(f32), axis=1)
        state = (
            jnp.broadcast_to(value.astype(f32), (ROW_QUERIES, head_dim)),
            score * factor,
            jnp.ones((ROW_QUERIES,), f32),
        )
        where = (number, kv)
        store(1, row, head, attend(q, own_k, own_v, where, jnp.int32(0), slot, state))
