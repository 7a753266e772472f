"""Maximum and sum of exponentials of every block of the vocabulary.

From these follow a row's log-sum-exp, its entropy and the block in which a random draw falls. XLA
reads the logits twice for them, once for the row's maximum and once under it; the Triton kernel
reads each block once and takes it under the block's own maximum.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from jaxgrpo.devices import Device

BLOCK = 128
"""Vocabulary entries per block of the two-level search; it divides the published vocabularies."""

_TILE = 8
"""Blocks per program of the kernel."""


def block_statistics(
    logits: Float[Array, "B V"], temperature: float, device: Device
) -> tuple[Float[Array, " B"], Float[Array, "B n"]]:
    """Each row's largest score, and exp(score - largest) summed by block; score is
    logit / temperature."""
    if _use_kernel(logits.shape[1], device):
        top, sums, _ = kernel_statistics(logits, temperature, entropy=False)
        return top, sums
    scores = logits / temperature
    top = jnp.max(scores, axis=-1)
    return top, block_sums(scores, top)


def row_statistics(
    logits: Float[Array, "... V"], temperature: float, device: Device
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Each row's largest score, the sum of w = exp(score - largest), and that of
    w * (score - largest); score is logit / temperature."""
    if _use_kernel(logits.shape[-1], device):
        rows = logits.reshape(-1, logits.shape[-1])
        top, sums, moments = kernel_statistics(rows, temperature, entropy=True)
        assert moments is not None
        found = top, jnp.sum(sums, axis=-1), jnp.sum(moments, axis=-1)
        return tuple(x.reshape(logits.shape[:-1]) for x in found)  # type: ignore[return-value]
    scores = logits / temperature
    top = jnp.max(scores, axis=-1)
    shifted = scores - top[..., None]
    weights = jnp.exp(shifted)
    return top, jnp.sum(weights, axis=-1), jnp.sum(weights * shifted, axis=-1)


def _use_kernel(vocab: int, device: Device) -> bool:
    return vocab % BLOCK == 0 and device.single_gpu


def block_sums(scores: Float[Array, "B V"], top: Float[Array, " B"]) -> Float[Array, "B n"]:
    """exp(scores - top) summed by block."""
    rows, vocab = scores.shape
    weights = jnp.exp(scores - top[:, None])
    weights = jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK)))
    sums = jnp.sum(weights.reshape(rows, -1, BLOCK), axis=-1)
    # Or XLA makes their total by a second pass over the vocabulary.
    return jax.lax.optimization_barrier(sums)


def kernel_statistics(
    logits: Float[Array, "B V"], temperature: float, *, entropy: bool, interpret: bool = False
) -> tuple[Float[Array, " B"], Float[Array, "B n"], Float[Array, "B n"] | None]:
    """`block_statistics` by the kernel and, with `entropy`, w * (score - largest) summed by block
    as well; `interpret` runs it without a GPU, for tests."""
    rows, vocab = logits.shape
    blocks = vocab // BLOCK
    of_row = pl.BlockSpec((None, _TILE), lambda b, i: (b, i))
    outputs = 3 if entropy else 2
    tops, sums, *moments = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, temperature=temperature),
        grid=(rows, pl.cdiv(blocks, _TILE)),
        in_specs=[pl.BlockSpec((None, _TILE, BLOCK), lambda b, i: (b, i, 0))],
        out_specs=(of_row,) * outputs,
        out_shape=(jax.ShapeDtypeStruct((rows, blocks), jnp.float32),) * outputs,
        compiler_params=plgpu.CompilerParams(num_warps=1),
        interpret=interpret,
        name="block_statistics",
    )(logits.reshape(rows, blocks, BLOCK))
    top = jnp.max(tops, axis=-1)
    shift = tops - top[:, None]
    scale = jnp.exp(shift)
    return top, sums * scale, scale * (moments[0] + shift * sums) if entropy else None


def _kernel(
    logits_ref: Any,
    tops_ref: Any,
    sums_ref: Any,
    *moments_ref: Any,
    blocks: int,
    temperature: float,
) -> None:
    inside = pl.program_id(1) * _TILE + jnp.arange(_TILE) < blocks
    tile, entries = pl.ds(0, _TILE), pl.ds(0, BLOCK)
    scores = plgpu.load(logits_ref.at[tile, entries], mask=inside[:, None], other=0.0)
    scores = scores / temperature
    # Finite, or a block without a finite score would be -inf - -inf.
    top = jnp.maximum(jnp.max(scores, axis=1), -1e30)
    shifted = scores - top[:, None]
    weights = jnp.exp(shifted)
    plgpu.store(tops_ref.at[tile], top, mask=inside)
    plgpu.store(sums_ref.at[tile], jnp.sum(weights, axis=1), mask=inside)
    for ref in moments_ref:
        plgpu.store(ref.at[tile], jnp.sum(weights * shifted, axis=1), mask=inside)
