"""Norms of the LoRA gradient per layer, module and matrix, made inside the step before clipping.

Views of the same gradient (design: a layer's raw share grows with its own scale and rank, so
allocating ranks by it favours the layers that already have them):

- `l2`: the Frobenius norm. The sum of squares over everything is the global norm squared.
- `rms`: per parameter in use: l2 / sqrt(rank x features).
- `rank_free`: l2 / (scale * sqrt(rank)). Under y = Wx + s B A x, dL/dA = s B^T (dL/dW) and
  dL/dB = s (dL/dW) A^T: both carry the factor s and sum over r rows.
- `weight`, if asked for: ||dL/dW||_F of the frozen weight, X^T G from the layer's inputs and output
  gradients, summed over the whole step; no rank or scale enters it.

Layers of rank 0 have no parameters and read 0 in the first three views.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgrpo.types import LoraPlan, Tree

VIEWS = ("l2", "rms", "rank_free")
"""Those of the adapters' own gradient, always measured."""


def layer_grad_norms(
    grads: Tree, plan: LoraPlan, kernel_grads: Tree | None = None
) -> dict[str, dict[str, dict[str, Float[Array, " L"]]]]:
    """view -> module -> "a" | "b" -> [L], from the gradient of module -> {"a", "b"}; for `weight`
    module -> "w" -> [L], from module -> [L, in, out]."""
    views: dict[str, dict] = {view: {} for view in VIEWS}
    if kernel_grads is not None:
        views["weight"] = {
            module: {"w": jnp.sqrt(jnp.sum(jnp.square(grad), axis=(1, 2)))}
            for module, grad in kernel_grads.items()
        }
    for module, matrices in grads.items():
        ranks = jnp.sum(plan.masks[module], axis=1)
        scales = plan.scales[module]
        features = {"a": matrices["a"].shape[1], "b": matrices["b"].shape[2]}
        l2 = {
            side: jnp.sqrt(jnp.sum(jnp.square(matrix.astype(jnp.float32)), axis=(1, 2)))
            for side, matrix in matrices.items()
        }
        views["l2"][module] = l2
        views["rms"][module] = {
            side: _divide(norm, jnp.sqrt(ranks * features[side])) for side, norm in l2.items()
        }
        views["rank_free"][module] = {
            side: _divide(norm, scales * jnp.sqrt(ranks)) for side, norm in l2.items()
        }
    return views


def _divide(norm: Float[Array, " L"], by: Float[Array, " L"]) -> Float[Array, " L"]:
    """norm / by, and 0 where `by` is 0 (rank 0)."""
    return jnp.where(by > 0, norm / jnp.where(by > 0, by, 1.0), 0.0)
