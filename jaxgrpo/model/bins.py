"""Between flat bins of tokens and rows (`pack_rows.py`), with transposes that are gathers.

Autodiff's transpose of a gather adds into memory, on GPU by atomics in no fixed order. The maps are
known both ways, so the way back is a gather as well: fast, and the same bits every time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgrpo.types import Packing


def rows_from_bins(x: Float[Array, "Z N ..."], packing: Packing) -> Float[Array, "B T ..."]:
    """Each row's tokens; a shared prompt's in all rows of the group. Off the row: any finite."""
    return _rows_from_bins(x, packing)


@jax.custom_vjp
def _rows_from_bins(x: jax.Array, packing: Packing) -> jax.Array:
    bins = x.shape[0]
    rows, length = packing.rows.shape
    taken = _take(x, packing.rows.reshape(bins, -1))
    return taken.reshape(rows, length, *x.shape[2:])


def _rows_forward(x: jax.Array, packing: Packing) -> tuple[jax.Array, Packing]:
    return _rows_from_bins(x, packing), packing


def _rows_backward(packing: Packing, dy: jax.Array) -> tuple[jax.Array, None]:
    bins, group = packing.tokens.shape[0], packing.group_size
    length = packing.rows.shape[1]
    rest = dy.shape[2:]
    source = jnp.maximum(packing.source, 0)
    own = _take(dy.reshape(bins, -1, *rest), source)
    if group > 1:
        # Shared prompts are used in every row of the group; they end before the completion's width.
        prompt_slots = length - packing.slot.shape[1]
        heads = dy[:, :prompt_slots].reshape(bins, -1, group, prompt_slots, *rest)
        heads = jnp.sum(heads, axis=2, dtype=jnp.float32).astype(dy.dtype)
        prompt, column = source // (length * group), source % length
        index = prompt * prompt_slots + jnp.minimum(column, prompt_slots - 1)
        summed = _take(heads.reshape(bins, -1, *rest), index)
        own = jnp.where(_wide(packing.shared, own), summed, own)
    # Or what comes next fuses with the gathers, and finds each place once for every value it takes.
    own = jax.lax.optimization_barrier(own)
    return jnp.where(_wide(packing.source >= 0, own), own, 0), None


_rows_from_bins.defvjp(_rows_forward, _rows_backward)


def row_lengths(packing: Packing) -> Int[Array, " B"]:
    """Tokens of each row, at least 1."""
    # A row's places after its first token's are never the bin's first place, which is 0.
    columns = jnp.arange(1, packing.rows.shape[1] + 1, dtype=jnp.int32)
    return jnp.maximum(jnp.max(jnp.where(packing.rows > 0, columns[None, :], 0), axis=1), 1)


def bins_from_rows(x: Float[Array, "B T ..."], packing: Packing) -> Float[Array, "Z N ..."]:
    """Each token's value in the row that owns it."""
    return _regroup(x, packing.source, packing.owned)


def scored_from_rows(x: Float[Array, "B T ..."], packing: Packing) -> Float[Array, "Z n ..."]:
    """The value at the token before each completion token."""
    return _regroup(x, packing.scored, packing.predicts)


def completions_from_scored(x: Float[Array, "Z n"], packing: Packing) -> Float[Array, "B C"]:
    """Values of completion tokens by row, 0 where a row has none."""
    return _regroup(x, packing.slot, packing.place)


def _regroup(x: jax.Array, there: Int[Array, "..."], back: Int[Array, "..."]) -> jax.Array:
    """y[place] = x[there[place]]; `back` is the inverse map, shaped as x is. 0 where there is none.

    The first axis of x, there and back splits into as many bins as the shorter of them has.
    """
    return _moved(x, there, back)


@jax.custom_vjp
def _moved(x: jax.Array, there: jax.Array, back: jax.Array) -> jax.Array:
    bins = min(there.shape[0], back.shape[0])
    rest = x.shape[2:]
    index = there.reshape(bins, -1)
    taken = _take(x.reshape(bins, -1, *rest), jnp.maximum(index, 0))
    taken = jnp.where(_wide(index >= 0, taken), taken, 0)
    return taken.reshape(*there.shape, *rest)


def _moved_forward(x: jax.Array, there: jax.Array, back: jax.Array) -> tuple:
    return _moved(x, there, back), (there, back)


def _moved_backward(maps: tuple, dy: jax.Array) -> tuple[jax.Array, None, None]:
    there, back = maps
    return _moved(dy, back, there), None, None


_moved.defvjp(_moved_forward, _moved_backward)


@functools.partial(jax.vmap, in_axes=(0, 0))
def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds")


def _wide(mask: jax.Array, like: jax.Array) -> jax.Array:
    return mask.reshape(*mask.shape, *(1,) * (like.ndim - mask.ndim))
