"""A layer's attention for one new token per row, as one Triton kernel.

One program per row and key/value head. It rotates the row's queries and its new key, writes key
and value into the row's cache, and attends: the prompt, from the cache that its group shares (so
that the group's other rows find it in the card's L2), from the first real token on; the row's own
earlier tokens; and the new one, which it still holds. The cost follows the real length, whatever
the caches' size, and nothing between the projections goes through memory but the caches.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from jaxgrpo.model.attention import DecodePosition

BLOCK = 32
"""Cache slots per pass of the loop: caches of this kernel are multiples of it."""

PADDED_HEADS = 16
"""The tensor cores' smallest tile: query heads sharing a key/value head are padded to it."""

State = tuple[jax.Array, jax.Array, jax.Array]
"""Running output, maximum and sum of an online softmax."""


class _Queries(NamedTuple):
    """Rotated queries that share a key/value head, as halves [PADDED_HEADS, H/2].

    Attributes:
        factor: of their scores; it makes them powers of 2.
    """

    low: jax.Array
    high: jax.Array
    factor: float


def decode_attention(
    qkv: Float[Array, "B heads H"],
    at: DecodePosition,
    prompt: dict[str, jax.Array],
    completion: dict[str, jax.Array],
    *,
    block: int = BLOCK,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], dict[str, jax.Array]]:
    """One query per row over its prompt's real slots and its own up to the position's.

    Args:
        qkv: queries (N heads), keys (K) and values (K) of the new tokens, not yet rotated.
        prompt: [P, K, S, H] of left-padded prompts, S a multiple of `block`.
        completion: [B, K, C, H], C a multiple of `block`; updated in place.
        interpret: run without a GPU, for tests.

    Returns:
        What was attended, and `completion` with the new keys and values in its slot.
    """
    rows, all_heads, head_dim = qkv.shape
    kv_heads, prompt_slots = prompt["k"].shape[1:3]
    slots = completion["k"].shape[2]
    heads = all_heads - 2 * kv_heads
    shared = heads // kv_heads
    assert prompt_slots % block == 0 and slots % block == 0, (prompt_slots, slots, block)
    assert shared <= PADDED_HEADS, f"{shared} query heads share a key/value head"
    start = prompt_slots - jnp.sum(at.prompt_mask, axis=1, dtype=jnp.int32)
    prompt_of = jnp.arange(rows) // (rows // len(start)) if at.prompt_of is None else at.prompt_of
    whole_prompts = pl.BlockSpec(prompt["k"].shape, lambda b, k: (0, 0, 0, 0))
    own = pl.BlockSpec((None, None, slots, head_dim), lambda b, k: (b, k, 0, 0))
    of_row = pl.BlockSpec((None, head_dim // 2), lambda b, k: (b, 0))
    cache = jax.ShapeDtypeStruct(completion["k"].shape, completion["k"].dtype)
    run = pl.pallas_call(
        functools.partial(
            _kernel, heads=heads, shared=shared, prompt_slots=prompt_slots, block=block
        ),
        # Rows vary fastest, so that the rows of a group run side by side.
        grid=(rows, kv_heads),
        in_specs=[
            pl.BlockSpec((None, all_heads, head_dim), lambda b, k: (b, 0, 0)),
            *(of_row, of_row),
            *(whole_prompts, whole_prompts),
            pl.BlockSpec(start.shape, lambda b, k: (0,)),
            pl.BlockSpec((None,), lambda b, k: (b,)),
            pl.BlockSpec((), lambda b, k: ()),
            *(own, own),
        ],
        out_specs=(
            pl.BlockSpec((None, None, shared, head_dim), lambda b, k: (b, k, 0, 0)),
            *(own, own),
        ),
        out_shape=(
            jax.ShapeDtypeStruct((rows, kv_heads, shared, head_dim), qkv.dtype),
            *(cache, cache),
        ),
        input_output_aliases={8: 1, 9: 2},
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=3),
        interpret=interpret,
        name="decode_attention",
    )
    prompts, own_slots = (prompt["k"], prompt["v"]), (completion["k"], completion["v"])
    attended, keys, values = run(qkv, *at.rope, *prompts, start, prompt_of, at.slot, *own_slots)
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

    # A rotation mixes the two halves of a head, so keys and queries are held as halves.
    real = (jnp.arange(PADDED_HEADS) < shared)[:, None]
    head = jnp.minimum(kv * shared + jnp.arange(PADDED_HEADS), heads - 1)[:, None]
    column = jnp.arange(half)[None, :]
    q_low = plgpu.load(qkv_ref.at[head, column], mask=real, other=0.0)
    q_high = plgpu.load(qkv_ref.at[head, half + column], mask=real, other=0.0)
    q_low, q_high = rotate(q_low, q_high)
    key = pl.ds(heads + kv, 1)
    k_low, k_high = rotate(qkv_ref[key, low], qkv_ref[key, high])
    value = qkv_ref[pl.ds(heads + kv_heads + kv, 1), all_]
    new_k[pl.ds(slot, 1), low] = k_low
    new_k[pl.ds(slot, 1), high] = k_high
    new_v[pl.ds(slot, 1), all_] = value

    # The new token first: from then on the maximum is finite, whatever a block hides.
    f32 = jnp.float32
    score = jnp.sum(q_low.astype(f32) * k_low.astype(f32), axis=1)
    score += jnp.sum(q_high.astype(f32) * k_high.astype(f32), axis=1)
    out = jnp.broadcast_to(value.astype(f32), (PADDED_HEADS, head_dim))
    state = (out, score * factor, jnp.ones((PADDED_HEADS,), f32))
    attend = functools.partial(_attend, _Queries(q_low, q_high, factor), block)
    of_prompt = (prompt_k, prompt_v, (prompt, kv))
    state = attend(state, of_prompt, start_ref[prompt], jnp.int32(prompt_slots))
    out, _, total = attend(state, (own_k, own_v, ()), jnp.int32(0), slot)
    out = (out / total[:, None]).astype(out_ref.dtype)
    plgpu.store(out_ref.at[pl.ds(0, PADDED_HEADS), all_], out, mask=real)


def _attend(
    queries: _Queries,
    block: int,
    state: State,
    cache: tuple[Any, Any, tuple],
    first: jax.Array,
    end: jax.Array,
) -> State:
    """Goes on over the slots from `first` to before `end`.

    Args:
        cache: keys, values, and where in them the slots of this program are.
    """
    k_ref, v_ref, where = cache
    head_dim = k_ref.shape[-1]
    half = head_dim // 2
    low, high, all_ = pl.ds(0, half), pl.ds(half, half), pl.ds(0, head_dim)

    def step(i: jax.Array, state: State) -> State:
        out, top, total = state
        places = pl.ds(i * block, block)
        scores = plgpu.dot(queries.low, k_ref[*where, places, low].T)
        scores = scores + plgpu.dot(queries.high, k_ref[*where, places, high].T)
        scores = scores * queries.factor
        index = i * block + jnp.arange(block)
        seen = (index >= first) & (index < end)
        scores = jnp.where(seen[None, :], scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - new_top[:, None])
        total = total * shrink + jnp.sum(weights, axis=1)
        values = v_ref[*where, places, all_]
        out = out * shrink[:, None] + plgpu.dot(weights.astype(v_ref.dtype), values)
        return out, new_top, total

    return jax.lax.fori_loop(first // block, pl.cdiv(end, block), step, state)
