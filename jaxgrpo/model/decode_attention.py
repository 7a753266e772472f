"""A layer's attention for one new token per row, as one Triton kernel.

One program per key/value head and row, or two rows of one group where their queries fit one tile of
the tensor cores. It rotates queries and new keys, writes keys and values into the rows' caches, and
attends: the prompt, from the cache that the group shares (so that the group's other rows find it in
the card's L2), from the first real token on; each row's own earlier tokens; and the new one, which
it still holds. The cost follows the real length, whatever the caches' size, and nothing between the
projections goes through memory but the caches.
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
    qkv: Float[Array, "B heads H"],
    rope: tuple[Float[Array, "B half"], Float[Array, "B half"]],
    prompt: dict[str, jax.Array],
    prompt_start: Int[Array, " P"],
    prompt_of: Int[Array, " B"],
    completion: dict[str, jax.Array],
    slot: Int[Array, ""],
    *,
    together: int = 1,
    block: int = BLOCK,
    num_warps: int = 1,
    num_stages: int = 3,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], dict[str, jax.Array]]:
    """One query per row over its prompt's slots from `prompt_start` and its own up to `slot`.

    Args:
        qkv: queries (N heads), keys (K) and values (K) of the new tokens, not yet rotated.
        rope: cosine and sine at each row's position (`qwen2.rotary_tables`), float32.
        prompt: {"k", "v"} [P, K, S, H], S a multiple of `block`.
        prompt_of: which prompt a row continues.
        completion: {"k", "v"} [B, K, C, H], C a multiple of `block`; updated in place.
        together: neighbouring rows that one program takes; they continue the same prompt and stand
            at the same position.
        interpret: run without a GPU, for tests.

    Returns:
        What was attended, and `completion` with the new keys and values in `slot`.
    """
    rows, all_heads, head_dim = qkv.shape
    kv_heads, prompt_slots = prompt["k"].shape[1:3]
    slots = completion["k"].shape[2]
    heads = all_heads - 2 * kv_heads
    shared = heads // kv_heads
    assert prompt_slots % block == 0 and slots % block == 0, (prompt_slots, slots, block)
    assert rows % together == 0 and together * shared <= PADDED_HEADS, (rows, together, shared)
    kernel = functools.partial(
        _kernel,
        together=together,
        heads=heads,
        shared=shared,
        prompt_slots=prompt_slots,
        block=block,
    )
    whole_prompts = pl.BlockSpec(prompt["k"].shape, lambda b, k: (0, 0, 0, 0))
    own = pl.BlockSpec((together, None, slots, head_dim), lambda b, k: (b, k, 0, 0))
    of_row = pl.BlockSpec((None, head_dim // 2), lambda b, k: (b * together, 0))
    cache = jax.ShapeDtypeStruct(completion["k"].shape, completion["k"].dtype)
    attended, keys, values = pl.pallas_call(
        kernel,
        # Rows vary fastest, so that the rows of a group run side by side.
        grid=(rows // together, kv_heads),
        in_specs=[
            pl.BlockSpec((together, all_heads, head_dim), lambda b, k: (b, 0, 0)),
            of_row,
            of_row,
            whole_prompts,
            whole_prompts,
            pl.BlockSpec(prompt_start.shape, lambda b, k: (0,)),
            pl.BlockSpec((None,), lambda b, k: (b * together,)),
            pl.BlockSpec((), lambda b, k: ()),
            own,
            own,
        ],
        out_specs=(
            pl.BlockSpec((together, None, shared, head_dim), lambda b, k: (b, k, 0, 0)),
            own,
            own,
        ),
        out_shape=(
            jax.ShapeDtypeStruct((rows, kv_heads, shared, head_dim), qkv.dtype),
            cache,
            cache,
        ),
        input_output_aliases={8: 1, 9: 2},
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name="decode_attention",
    )(
        qkv,
        *rope,
        prompt["k"],
        prompt["v"],
        prompt_start,
        prompt_of,
        slot,
        completion["k"],
        completion["v"],
    )
    return attended.reshape(rows, heads, head_dim), {"k": keys, "v": values}


def _kernel(
    qkv_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    prompt_k: Any,
    prompt_v: Any,
    start_ref: Any,
    prompt_of_ref: Any,
    slot_ref: Any,
    own_k: Any,
    own_v: Any,
    out_ref: Any,
    new_k: Any,
    new_v: Any,
    *,
    together: int,
    heads: int,
    shared: int,
    prompt_slots: int,
    block: int,
) -> None:
    kv = pl.program_id(1)
    kv_heads = prompt_k.shape[1]
    head_dim = qkv_ref.shape[-1]
    half = head_dim // 2
    low, high, all_ = pl.ds(0, half), pl.ds(half, half), pl.ds(0, head_dim)
    dtype = new_k.dtype
    slot, prompt = slot_ref[...], prompt_of_ref[...]
    cos, sin = cos_ref[...][None, :], sin_ref[...][None, :]
    # Base 2 throughout: exp2 is the card's own instruction.
    factor = head_dim**-0.5 * math.log2(math.e)

    def rotate(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, second = first.astype(jnp.float32), second.astype(jnp.float32)
        rotated = first * cos - second * sin, second * cos + first * sin
        return rotated[0].astype(dtype), rotated[1].astype(dtype)

    # Queries of all rows under each other, row by row; what pads the tile repeats the last one.
    # A rotation mixes the two halves of a head, so keys and queries are held as halves.
    place = jnp.arange(PADDED_HEADS)
    real = (place < together * shared)[:, None]
    row = jnp.minimum(place // shared, together - 1)
    head = place - row * shared
    query = jnp.minimum(kv * shared + head, heads - 1)[:, None]
    column = jnp.arange(half)[None, :]
    q_low = plgpu.load(qkv_ref.at[row[:, None], query, column], mask=real, other=0.0)
    q_high = plgpu.load(qkv_ref.at[row[:, None], query, half + column], mask=real, other=0.0)
    q_low, q_high = rotate(q_low, q_high)

    f32 = jnp.float32
    score = jnp.zeros((PADDED_HEADS,), f32)
    out = jnp.zeros((PADDED_HEADS, head_dim), f32)
    for r in range(together):
        new, value_of = pl.ds(heads + kv, 1), pl.ds(heads + kv_heads + kv, 1)
        k_low, k_high = rotate(qkv_ref[r, new, low], qkv_ref[r, new, high])
        value = qkv_ref[r, value_of, all_]
        new_k[r, pl.ds(slot, 1), low] = k_low
        new_k[r, pl.ds(slot, 1), high] = k_high
        new_v[r, pl.ds(slot, 1), all_] = value
        # The new token first: from then on the maximum is finite, whatever a block hides.
        own_score = jnp.sum(q_low.astype(f32) * k_low.astype(f32), axis=1)
        own_score += jnp.sum(q_high.astype(f32) * k_high.astype(f32), axis=1)
        mine = row == r
        score = jnp.where(mine, own_score * factor, score)
        out = jnp.where(mine[:, None], value.astype(f32), out)

    def attend(
        i: jax.Array, state: State, first: jax.Array, end: jax.Array, places: list[tuple]
    ) -> State:
        """One block of slots: of the prompt, or of every row's own."""
        out, top, total = state
        span = pl.ds(i * block, block)
        index = i * block + jnp.arange(block)
        seen = ((index >= first) & (index < end))[None, :]
        scores = jnp.full((PADDED_HEADS, block), -jnp.inf, f32)
        for r, (k_ref, _, where) in enumerate(places):
            found = plgpu.dot(q_low, k_ref[*where, span, low].T)
            found = (found + plgpu.dot(q_high, k_ref[*where, span, high].T)) * factor
            scores = jnp.where(seen & _rows_of(row, r, places), found, scores)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - new_top[:, None])
        total = total * shrink + jnp.sum(weights, axis=1)
        out = out * shrink[:, None]
        for r, (_, v_ref, where) in enumerate(places):
            of_row = jnp.where(_rows_of(row, r, places), weights, 0.0).astype(dtype)
            out = out + plgpu.dot(of_row, v_ref[*where, span, all_])
        return out, new_top, total

    def over(first: jax.Array, end: jax.Array, places: list[tuple], state: State) -> State:
        def step(i: jax.Array, state: State) -> State:
            return attend(i, state, first, end, places)

        return jax.lax.fori_loop(first // block, pl.cdiv(end, block), step, state)

    state = (out, score, jnp.ones((PADDED_HEADS,), f32))
    shared_cache = [(prompt_k, prompt_v, (prompt, kv))]
    state = over(start_ref[prompt], jnp.int32(prompt_slots), shared_cache, state)
    own = [(own_k, own_v, (r,)) for r in range(together)]
    out, _, total = over(jnp.int32(0), slot, own, state)
    out = (out / total[:, None]).astype(out_ref.dtype)
    column = jnp.arange(head_dim)[None, :]
    plgpu.store(out_ref.at[row[:, None], head[:, None], column], out, mask=real)


def _rows_of(row: jax.Array, r: int, places: list[tuple]) -> jax.Array:
    """Which queries attend to place `r`: all of them if there is one, else row r's."""
    return (row == r)[:, None] if len(places) > 1 else (row >= 0)[:, None]
