"""One layer's weights as the sampler wants them: few, large products where each has few rows."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgrpo.model.gated_product import (
    gated_product,
    make_tiles,
    padded_width,
    tile_width,
    use_tiles,
)
from jaxgrpo.types import Tree

JOINED = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}
"""Projections of one input, and the name of their common matrix in the sampler's weights."""


class GateTiles(nn.Module):
    """silu(gate) * up by `gated_product`."""

    in_features: int
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        half = tile_width(self.features)
        shape = (padded_width(self.features) // half, 2, half, self.in_features)
        return gated_product(
            x, self.param("tiles", nn.initializers.normal(0.02), shape, self.dtype)
        )


def split_product(x: Float[Array, "B i"], kernel: Float[Array, "i o"]) -> Float[Array, "B o"]:
    """x @ kernel with the inner axis in a few parts that the card computes side by side, where
    rows and columns alone are too few to keep it busy; XLA adds them up with what comes next."""
    inner, width = kernel.shape
    parts = next(parts for parts in (5, 4, 6, 3, 2, 1) if inner % (8 * parts) == 0)
    x = x.reshape(len(x), parts, inner // parts)
    kernel = kernel.reshape(parts, inner // parts, width)
    products = jnp.einsum("bpi,pio->pbo", x, kernel, preferred_element_type=jnp.float32)
    return jnp.sum(products, axis=0).astype(x.dtype)


def join_kernels(layer: Tree) -> Tree:
    """The same layer with projections of one input as one matrix (JOINED): fewer, larger products
    where each has few rows. Gate and up go into tiles where `gated_product` has a kernel."""
    joined = dict(layer)
    if use_tiles(layer["down_proj"]["kernel"].dtype):
        gate, up = (joined.pop(name)["kernel"] for name in JOINED["gate_up"])
        joined["gate_up"] = {"tiles": make_tiles(gate, up)}
        down = joined["down_proj"]["kernel"]
        missing = padded_width(gate.shape[-1]) - gate.shape[-1]
        down = jnp.pad(down, ((0, missing), (0, 0)))
        joined["down_proj"] = {**joined["down_proj"], "kernel": down}
    for name, parts in JOINED.items():
        if name in joined:
            continue
        pieces = [joined.pop(part) for part in parts]
        joined[name] = {
            leaf: jnp.concatenate([piece[leaf] for piece in pieces], axis=-1) for leaf in pieces[0]
        }
    return joined
