"""Between bins of tokens and rows (`pack_rows.py`), with transposes that are gathers.

Autodiff's transpose of a gather adds into memory, on GPU by atomics in no fixed order. Where a
place lies in its row follows from a few numbers per row both ways, so the way back is a gather as
well: fast, and the same bits every time. Here a packing is one bin of each shard: [W, N], [W, R].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgrpo.types import Packing

T = TypeVar("T")


def take_bin(packing: Packing, number: Int[Array, ""]) -> Packing:
    """One bin of each shard: [W, Z, ...] -> [W, ...]."""
    count = packing.count

    def one(x: jax.Array) -> jax.Array:
        return x if x is count else jax.lax.dynamic_index_in_dim(x, number, 1, keepdims=False)

    return jax.tree.map(one, packing)


def over_bins(packing: Packing, body: Callable[[Array, T], T], start: T) -> T:
    """body(number, carried) for each bin in use: [W, Z, ...] packings only."""
    bins = packing.tokens.shape[1]

    def unfinished(state: tuple[Array, T]) -> Bool[Array, ""]:
        # The second bound never ends it; it tells who reads the program how long it can run.
        return (state[0] < packing.count) & (state[0] < bins)

    def run(state: tuple[Array, T]) -> tuple[Array, T]:
        return state[0] + 1, body(*state)

    return jax.lax.while_loop(unfinished, run, (jnp.zeros((), jnp.int32), start))[1]


def rows_of_bin(tree: T, packing: Packing) -> T:
    """The batch's rows [B, ...] that a bin holds: [W R, ...]; any row where it holds none."""

    def rows(x: jax.Array) -> jax.Array:
        shards, count = packing.member.shape
        taken = _take(x.reshape(shards, -1, *x.shape[1:]), jnp.maximum(packing.member, 0))
        return taken.reshape(shards * count, *x.shape[1:])

    return jax.tree.map(rows, tree)


def holds_row(packing: Packing) -> Bool[Array, " WR"]:
    """Which of a bin's rows are there."""
    return packing.member.reshape(-1) >= 0


def put_rows(
    into: Float[Array, "B C"], rows: Float[Array, "WR C"], packing: Packing
) -> Float[Array, "B C"]:
    """Writes a bin's rows to their places in the batch."""
    shards, count = packing.member.shape
    of_shard = into.reshape(shards, -1, into.shape[1])
    # One beyond the end is dropped.
    index = jnp.where(packing.member >= 0, packing.member, of_shard.shape[1])

    def put(x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
        return x.at[index].set(values, mode="drop", unique_indices=True)

    put_all = jax.vmap(put)(of_shard, index, rows.reshape(shards, count, -1))
    return put_all.reshape(into.shape)


def row_lengths(packing: Packing) -> Int[Array, " WR"]:
    """Tokens of each row with its prompt, at least 1."""
    return jnp.maximum(packing.prompt_tokens + packing.length, 1).reshape(-1)


def rows_from_bins(x: Float[Array, "W N ..."], packing: Packing) -> Float[Array, "WR T ..."]:
    """Each row's tokens, shared ones in all rows that share them. Off the row: any finite."""
    return _rows_from_bins(x, packing)


def _bin_places(packing: Packing) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[W, R, T]: where a row's tokens lie in the bin; whether there is one; whether it is its
    first place among rows."""
    column = jnp.arange(packing.row_places)[None, None, :]
    prompt, first, shared, length, sharers = (
        values[..., None]
        for values in (
            packing.prompt,
            packing.first,
            packing.prompt_tokens,
            packing.length,
            packing.sharers,
        )
    )
    inside = column < shared + length
    place = jnp.where(column < shared, prompt + column, first + column - shared)
    return jnp.where(inside, place, 0), inside, inside & ((column >= shared) | (sharers > 0))


def _row_place(packing: Packing, ahead: int = 0) -> Int[Array, "W N"]:
    """Where a bin's places lie among rows [R, T], flat; `ahead` rows further on."""
    rows = packing.member.shape[1]
    return jnp.clip(packing.row + ahead, 0, rows - 1) * packing.row_places + packing.positions


@jax.custom_vjp
def _rows_from_bins(x: jax.Array, packing: Packing) -> jax.Array:
    place, _, _ = _bin_places(packing)
    shards, rows, length = place.shape
    taken = _take(x, place.reshape(shards, -1))
    return taken.reshape(shards * rows, length, *x.shape[2:])


def _rows_forward(x: jax.Array, packing: Packing) -> tuple[jax.Array, Packing]:
    return _rows_from_bins(x, packing), packing


def _rows_backward(packing: Packing, dy: jax.Array) -> tuple[jax.Array, None]:
    shards, size = packing.tokens.shape
    rest = dy.shape[2:]
    dy = dy.reshape(shards, -1, *rest)
    own = _take(dy, _row_place(packing))
    front = min(packing.shared_places, size)
    if packing.group_size > 1 and front:
        # A shared place is used in every row that shares it, and these follow each other.
        sharers = jnp.take_along_axis(packing.sharers, jnp.maximum(packing.row, 0), axis=1)
        total = jnp.zeros((shards, front, *rest), jnp.float32)
        for ahead in range(packing.group_size):
            used = _take(dy, _row_place(packing, ahead)[:, :front])
            counts = (ahead < sharers[:, :front]) & packing.shared[:, :front]
            total = total + jnp.where(_wide(counts, used), used, 0).astype(jnp.float32)
        summed = jnp.where(
            _wide(packing.shared[:, :front], total), total.astype(dy.dtype), own[:, :front]
        )
        own = jnp.concatenate([summed, own[:, front:]], axis=1)
    # Or what comes next fuses with the gathers, and finds each place once for every value it takes.
    own = jax.lax.optimization_barrier(own)
    return jnp.where(_wide(packing.row >= 0, own), own, 0), None


_rows_from_bins.defvjp(_rows_forward, _rows_backward)


def bins_from_rows(x: Float[Array, "WR T ..."], packing: Packing) -> Float[Array, "W N ..."]:
    """Each place's value in its first row; 0 where there is none."""
    return _bins_from_rows(x, packing)


@jax.custom_vjp
def _bins_from_rows(x: jax.Array, packing: Packing) -> jax.Array:
    shards = packing.tokens.shape[0]
    taken = _take(x.reshape(shards, -1, *x.shape[2:]), _row_place(packing))
    return jnp.where(_wide(packing.row >= 0, taken), taken, 0)


def _bins_forward(x: jax.Array, packing: Packing) -> tuple[jax.Array, Packing]:
    return _bins_from_rows(x, packing), packing


def _bins_backward(packing: Packing, dy: jax.Array) -> tuple[jax.Array, None]:
    place, _, owned = _bin_places(packing)
    shards, rows, length = place.shape
    taken = _take(dy, place.reshape(shards, -1)).reshape(*place.shape, *dy.shape[2:])
    taken = jnp.where(_wide(owned, taken), taken, 0)
    return taken.reshape(shards * rows, length, *dy.shape[2:]), None


_bins_from_rows.defvjp(_bins_forward, _bins_backward)


def completions_from_bins(
    x: Float[Array, "W N"], packing: Packing, width: int
) -> Float[Array, "WR C"]:
    """Own places by row: one value for each token of the completion, 0 where there is none."""
    return _completions(x, packing, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _completions(x: jax.Array, packing: Packing, width: int) -> jax.Array:
    column = jnp.arange(width)[None, None, :]
    inside = column < packing.length[..., None]
    place = jnp.where(inside, packing.first[..., None] + column, 0)
    shards, rows, _ = place.shape
    taken = _take(x, place.reshape(shards, -1)).reshape(place.shape)
    return jnp.where(inside, taken, 0).reshape(shards * rows, width)


def _completions_forward(x: jax.Array, packing: Packing, width: int) -> tuple[jax.Array, Packing]:
    return _completions(x, packing, width), packing


def _completions_backward(width: int, packing: Packing, dy: jax.Array) -> tuple[jax.Array, None]:
    row = jnp.maximum(packing.row, 0)
    column = packing.positions - jnp.take_along_axis(packing.prompt_tokens, row, axis=1)
    own = (packing.row >= 0) & ~packing.shared
    dy = dy.reshape(packing.tokens.shape[0], -1)
    taken = _take(dy, jnp.where(own, row * width + column, 0))
    return jnp.where(own, taken, 0), None


_completions.defvjp(_completions_forward, _completions_backward)


@functools.partial(jax.vmap, in_axes=(0, 0))
def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds")


def _wide(mask: jax.Array, like: jax.Array) -> jax.Array:
    return mask.reshape(*mask.shape, *(1,) * (like.ndim - mask.ndim))
