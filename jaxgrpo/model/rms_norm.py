"""Root-mean-square normalisation, as Qwen2 and Qwen3 have it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], epsilon: float
) -> Float[Array, "... D"]:
    """x / rms(x) * scale; the mean square in float32, the product in scale's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + epsilon)
    scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
    return (x32.astype(scale.dtype) * scale).astype(scale.dtype)
