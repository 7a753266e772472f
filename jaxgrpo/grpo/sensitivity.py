"""AdaLoRA's running importance of every adapter entry (Zhang et al. 2023, arXiv 2303.10512).

I = |w * dL/dw| (eq. 8); mean = EMA of I (eq. 9); uncertainty = EMA of |I - mean| (eq. 10). An
entry's score is their product (eq. 11); `study/adalora.py` turns scores into ranks.

AdaLoRA trains P diag(E) Q. Plain LoRA has no E, but it has its sensitivity: with a factor e_i = 1
between column a_i of A and row b_i of B, dL/de_i = <a_i, dL/da_i> = <b_i, dL/db_i>. That sum is
coherent where the entries' own scores are means, so it outweighs them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgrpo.types import Tree

BETA1 = BETA2 = 0.85
"""The decay of the two averages; the values of the paper and of PEFT."""


def init_sensitivity(lora: Tree) -> Tree:
    """Nothing seen yet: "mean" and "uncertainty", each module -> a, b (like `lora`), e [L, R]."""
    zeros = {
        module: {
            "a": jnp.zeros_like(pair["a"]),
            "b": jnp.zeros_like(pair["b"]),
            "e": jnp.zeros_like(pair["a"][:, 0]),
        }
        for module, pair in lora.items()
    }
    return {"mean": zeros, "uncertainty": jax.tree.map(jnp.zeros_like, zeros)}


def update_sensitivity(sensitivity: Tree, lora: Tree, grads: Tree) -> Tree:
    """The averages after one more gradient; `lora` is what the gradient was taken at."""
    seen = {}
    for module, pair in lora.items():
        products = {side: pair[side] * grads[module][side] for side in ("a", "b")}
        products["e"] = products["a"].sum(axis=1)
        seen[module] = {name: jnp.abs(product) for name, product in products.items()}
    mean = jax.tree.map(lambda m, i: BETA1 * m + (1 - BETA1) * i, sensitivity["mean"], seen)
    uncertainty = jax.tree.map(
        lambda u, i, m: BETA2 * u + (1 - BETA2) * jnp.abs(i - m),
        sensitivity["uncertainty"],
        seen,
        mean,
    )
    return {"mean": mean, "uncertainty": uncertainty}
