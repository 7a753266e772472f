"""silu(x @ gate) * (x @ up) as one kernel for Hopper GPUs, and the layout of weights it wants.

In decoding, gate and up are the largest product of a layer: 256 rows of Qwen2.5-1.5B are 14 GFLOP
over 55 MB of weights, at the limit of both. cuBLAS' tiles do not divide over the card's
multiprocessors and its result goes through memory once more for silu. Here each thread block takes
256 rows and a tile of `half` gate and the same `half` up columns, with `half` chosen so that the
tiles fill the card in whole waves, and writes only silu(gate) * up. Weights are kept as the tiles
follow each other, each [2 half, D]: gate's columns, then up's. The last tile is filled up with
zeros, so the result has zeros at its end, which the next projection's kernel must be padded for.

The kernel is Pallas' Mosaic GPU: loads by the tensor memory accelerator into a ring of stages, two
warpgroups that multiply (wgmma), one that loads.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mosaic
from jaxlib.mlir import ir
from jaxtyping import Array, Float

from jaxgrpo.model.presets import QwenConfig

ROWS = 256
"""Rows of a tile. Other batches go through cuBLAS, which was as fast with 128 and with 512."""

_WIDTHS = range(32, 73, 8)
"""What `half` may be: more columns do not fit with four stages into shared memory."""

STEP = 64
"""Columns of x that a stage holds; x and the tiles have a multiple of it."""

_STAGES, _STORED = 4, 64
"""Stages; rows that a warpgroup writes at a time."""


_DUMP_NAME = "mosaic_gpu.dump_basename"


def _leave_counts_out(name_dumps: Any) -> Any:
    """jaxlib's function that names a kernel's dumps, without its count of the kernels that this
    process lowered before. It stands in the kernel, and so in the key of programs kept on disk: a
    program was compiled anew whenever another with a kernel had been lowered first."""

    def name_alike(module: Any) -> Any:
        attributes = module.operation.attributes
        if _DUMP_NAME not in attributes:
            attributes[_DUMP_NAME] = ir.StringAttr.get("kernel", context=module.context)
        return name_dumps(module)

    return name_alike


_DIALECT: Any = mosaic.dialect  # type: ignore[attr-defined]
if hasattr(_DIALECT, "get_or_set_dump_options"):  # not before jaxlib 0.11.1
    _DIALECT.get_or_set_dump_options = _leave_counts_out(_DIALECT.get_or_set_dump_options)


def use_tiles(config: QwenConfig) -> bool:
    """Whether the sampler's weights are laid out for the kernel."""
    device = config.device
    return config.compute_dtype == jnp.bfloat16 and device.single_gpu and device.capability == "9.0"


def tile_width(features: int, cores: int) -> int:
    """The `half` that takes least time on so many multiprocessors: waves of tiles, each as long as
    its width and a start."""

    def cost(half: int) -> int:
        tiles = -(-features // half)
        return -(-tiles // cores) * (half + 16)

    return min(_WIDTHS, key=cost)


def padded_width(features: int, cores: int) -> int:
    """Columns of the kernel's result for `features` gate columns."""
    half = tile_width(features, cores)
    return -(-features // half) * half


def make_tiles(
    gate: Float[Array, "D F"], up: Float[Array, "D F"], cores: int
) -> Float[Array, "n 2 half D"]:
    """Both in the kernel's layout, for a card of so many multiprocessors."""
    features, half = gate.shape[1], tile_width(gate.shape[1], cores)
    missing = padded_width(features, cores) - features
    cut = (jnp.pad(x, ((0, 0), (0, missing))).reshape(len(x), -1, half) for x in (gate, up))
    return jnp.stack(list(cut), axis=2).transpose(1, 2, 3, 0)


def gated_product(
    x: Float[Array, "... D"], tiles: Float[Array, "n 2 half D"]
) -> Float[Array, "... F"]:
    """silu(x @ gate) * (x @ up), zeros where the last tile is padded."""
    if x.ndim == 2 and x.shape[0] == ROWS and x.shape[1] % STEP == 0:
        return _by_kernel(x, tiles)
    both = jnp.einsum("...d,nshd->...nsh", x, tiles)
    gated = jax.nn.silu(both[..., 0, :]) * both[..., 1, :]
    return gated.reshape(*x.shape[:-1], -1)


def _by_kernel(x: jax.Array, tiles: jax.Array) -> jax.Array:
    count, _, half, features = tiles.shape
    return plgpu.kernel(
        functools.partial(_kernel, half=half, steps=features // STEP),
        out_type=jax.ShapeDtypeStruct((len(x), count * half), x.dtype),
        scratch_types=(plgpu.SMEM((2, _STORED, half), x.dtype),),
        grid=(count,),
        grid_names=("tile",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(x, tiles.reshape(count * 2 * half, features))


def _kernel(
    x_gmem: Any, tiles_gmem: Any, out_gmem: Any, stored_smem: Any, *, half: int, steps: int
) -> None:
    tile, warpgroup = jax.lax.axis_index("tile"), jax.lax.axis_index("warpgroup")
    rows = ROWS // 2
    mine = pl.ds(warpgroup * rows, rows)
    swizzled = (plgpu.TilingTransform((8, STEP)), plgpu.SwizzleTransform(128))

    def compute(multiply: Any) -> None:
        @functools.partial(pl.run_scoped, acc_ref=plgpu.ACC((rows, 2 * half), jnp.float32))  # type: ignore[attr-defined]
        def _(acc_ref: Any) -> None:
            multiply(acc_ref)
            acc = acc_ref[...]
            gate, up = acc[:, :half], acc[:, half:]
            # The card's own reciprocal square root; a division costs ten times as much.
            root = jax.lax.rsqrt(1.0 + jnp.exp(-gate))
            gated = (gate * up * (root * root)).astype(out_gmem.dtype)
            place, stored = out_gmem.at[mine, pl.ds(tile * half, half)], stored_smem.at[warpgroup]
            for first in range(0, rows, _STORED):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                stored[...] = gated[first : first + _STORED]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(stored, place.at[first : first + _STORED])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def step(_: Any, x_smem: Any, tiles_smem: Any, acc_ref: Any) -> Any:
        plgpu.wgmma(acc_ref, x_smem.at[mine], tiles_smem.transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return acc_ref

    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        memory_registers=40,
        in_specs=[
            plgpu.BlockSpec(
                (size, STEP), lambda i: (0, i), transforms=swizzled, memory_space=plgpu.SMEM
            )
            for size in (ROWS, 2 * half)
        ],
        wg_axis="warpgroup",
        num_compute_wgs=2,
        max_concurrent_steps=_STAGES,
        compute_context=compute,
    )(x_gmem, tiles_gmem.at[pl.ds(tile * 2 * half, 2 * half), :])
