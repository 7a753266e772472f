"""RMS norm and an adapter's first product side by side, [h | h a], as one Triton kernel.

In decoding, the product with a thin matrix and the copy that puts its result beside its input cost
more in starts and memory than in arithmetic. One program takes a few rows and a few of the inner
columns; it makes the rows' norm anew, which is cheaper than to hand it over.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

ROWS = 16
"""Rows of a program: the tensor cores' smallest tile."""

INNER = 16
"""The kernel's inner widths are multiples of it."""

_COLUMNS = 128


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], epsilon: float
) -> Float[Array, "... D"]:
    """x / rms(x) * scale; the mean square in float32, the rest in scale's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + epsilon)
    scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
    return (x32.astype(scale.dtype) * scale).astype(scale.dtype)


def norm_product(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    a: Float[Array, "D r"],
    epsilon: float,
    *,
    kernel: bool,
    interpret: bool = False,
) -> Float[Array, "... n"]:
    """[h | h @ a] for h = rms_norm(x), n = D + r.

    Args:
        kernel: whether the Triton kernel may serve; it takes rows in sixteens.
        interpret: run it without a GPU, for tests.
    """
    fits = x.ndim == 2 and len(x) % ROWS == 0 and x.shape[1] % _COLUMNS == 0
    if not (kernel and fits and a.shape[1] % INNER == 0):
        h = rms_norm(x, scale, epsilon)
        return jnp.concatenate([h, h @ a], axis=-1)
    features, inner = a.shape
    width = next(width for width in (32, INNER) if inner % width == 0)
    return pl.pallas_call(
        functools.partial(_kernel, features=features, width=width, epsilon=epsilon),
        grid=(len(x) // ROWS, inner // width),
        in_specs=[
            pl.BlockSpec((ROWS, features), lambda i, j: (i, 0)),
            pl.BlockSpec((features,), lambda i, j: (0,)),
            pl.BlockSpec((features, width), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((ROWS, features + inner), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((len(x), features + inner), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="norm_product",
    )(x, scale, a)


def _kernel(
    x_ref: Any,
    scale_ref: Any,
    a_ref: Any,
    out_ref: Any,
    *,
    features: int,
    width: int,
    epsilon: float,
) -> None:
    part = pl.program_id(1)
    rows, f32 = pl.ds(0, ROWS), jnp.float32

    def square(i: jax.Array, total: jax.Array) -> jax.Array:
        chunk = x_ref[rows, pl.ds(i * _COLUMNS, _COLUMNS)].astype(f32)
        return total + jnp.sum(chunk * chunk, axis=1)

    total = jax.lax.fori_loop(0, features // _COLUMNS, square, jnp.zeros((ROWS,), f32))
    inverse = jax.lax.rsqrt(total / features + epsilon)[:, None]

    def step(i: jax.Array, inner: jax.Array) -> jax.Array:
        columns = pl.ds(i * _COLUMNS, _COLUMNS)
        h = (x_ref[rows, columns].astype(f32) * inverse).astype(x_ref.dtype)
        h = h * scale_ref[columns][None, :]

        @pl.when(part == 0)
        def _() -> None:
            out_ref[rows, columns] = h

        return inner + plgpu.dot(h, a_ref[columns, pl.ds(0, width)])

    inner = jax.lax.fori_loop(0, features // _COLUMNS, step, jnp.zeros((ROWS, width), f32))
    out_ref[rows, pl.ds(features + part * width, width)] = inner.astype(out_ref.dtype)
