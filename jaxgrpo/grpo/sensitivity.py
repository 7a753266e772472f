"""AdaLoRA's running importance of every adapter entry (Zhang et al. 2023, arXiv 2303.10512).

I = |w * dL/dw| (eq. 8); mean = EMA of I (eq. 9); uncertainty = EMA of |I - mean| (eq. 10). An
entry's score is their product (eq. 11); `study/adalora.py` turns scores into ranks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgrpo.types import Tree

BETA1 = BETA2 = 0.85
"""The decay of the two averages; the values of the paper and of PEFT."""


def init_sensitivity(lora: Tree) -> Tree:
    """Nothing seen yet."""
    zeros = jax.tree.map(jnp.zeros_like, lora)
    return {"mean": zeros, "uncertainty": jax.tree.map(jnp.zeros_like, lora)}


def update_sensitivity(sensitivity: Tree, lora: Tree, grads: Tree) -> Tree:
    """The averages after one more gradient; `lora` is what the gradient was taken at."""
    seen = jax.tree.map(lambda w, g: jnp.abs(w * g), lora, grads)
    mean = jax.tree.map(lambda m, i: BETA1 * m + (1 - BETA1) * i, sensitivity["mean"], seen)
    uncertainty = jax.tree.map(
        lambda u, i, m: BETA2 * u + (1 - BETA2) * jnp.abs(i - m),
        sensitivity["uncertainty"],
        seen,
        mean,
    )
    return {"mean": mean, "uncertainty": uncertainty}
