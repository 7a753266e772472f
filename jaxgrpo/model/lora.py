"""Masked variable-rank LoRA: adapters stacked at one width, ranks chosen by a mask.

y = W x + scale * ((x a) * mask) b, with a [in, R], b [R, out]. Masks and scales are arguments, so
that every rank plan runs in one compiled program. Hu et al. 2021 (arXiv 2106.09685); initialisation
as in PEFT: A uniform in ±1/sqrt(in_features) (Kaiming with a = sqrt 5), B zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxgrpo.config import MODULES
from jaxgrpo.model.presets import QwenConfig
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.types import Adapters, LoraPlan, Tree

Adapter = tuple[jax.Array, jax.Array]
"""a [in, R] under its mask and b [R, out] under its scale, float32."""


class Projection(NamedTuple):
    """One frozen projection as arrays, with its adapter if it has one."""

    kernel: Float[Array, "i o"]
    bias: Float[Array, " o"] | None
    adapter: Adapter | None


class Joined(NamedTuple):
    """Projections of one input and their adapters as the one matrix of `fused_product`.

    Attributes:
        matrix: [W; b], or [W | a] where the input is the wider side; W is all kernels side by side.
        a, b: all adapters'.
    """

    matrix: Float[Array, "m n"]
    a: Float[Array, "i r"]
    b: Float[Array, "r o"]


class LoRADense(nn.Module):
    """A frozen projection and, if the `lora` collection holds one for it, its adapter.

    Block reads it with `weights` and multiplies projections of one input together.
    """

    in_features: int
    features: int
    use_bias: bool
    dtype: jnp.dtype

    def setup(self) -> None:
        shape = (self.in_features, self.features)
        self.kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.dtype)
        if self.use_bias:
            self.bias = self.param(
                "bias", nn.initializers.zeros_init(), (self.features,), self.dtype
            )

    def weights(self) -> Projection:
        adapter = None
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            mask, scale = self.get_variable("plan", "mask"), self.get_variable("plan", "scale")
            adapter = scaled(a, b, mask, scale)
        return Projection(self.kernel, self.bias if self.use_bias else None, adapter)

    def watch(self, x: Float[Array, "*rows i"]) -> None:
        """For EVA: sums over real tokens of the input and of its outer product."""
        if self.has_variable("rows", "mask"):
            rows = jnp.where(self.get_variable("rows", "mask")[..., None], x, 0).astype(jnp.float32)
            self.sow("moments", "sum", rows.sum(axis=(0, 1)))
            self.sow("moments", "outer", jnp.einsum("bti,btj->ij", rows, rows))


def scaled(a: jax.Array, b: jax.Array, mask: jax.Array, scale: jax.Array) -> Adapter:
    """One layer's adapter under its plan."""
    # Mask and scale go on the small factors: the activations are the larger arrays.
    return a * mask[None, :], b * scale


def project(
    x: Float[Array, "... i"],
    projections: Sequence[Projection],
    *,
    fused: bool,
    joined: Joined | None = None,
) -> list[Float[Array, "... _"]]:
    """Outputs of several projections of one input; `fused` as in `project_joined`."""
    if fused and any(p.adapter is not None for p in projections):
        widths = np.cumsum([p.kernel.shape[1] for p in projections])
        return jnp.split(project_joined(x, projections, joined), widths[:-1], axis=-1)
    outputs = []
    for p in projections:
        y = x @ p.kernel
        if p.adapter is not None:
            a, b = (matrix.astype(x.dtype) for matrix in p.adapter)
            y = y + (x @ a) @ b
        outputs.append(y if p.bias is None else y + _row(p.bias, y.ndim))
    return outputs


def project_joined(
    x: Float[Array, "... i"], projections: Sequence[Projection], joined: Joined | None = None
) -> Float[Array, "... n"]:
    """Outputs of several projections of one input side by side, from one matrix product.

    Not on a mesh of several devices: kernels are split there along what joins them. `joined` is
    made here unless it is at hand.
    """
    kernels = tuple(p.kernel for p in projections)
    adapters = tuple(p.adapter for p in projections)
    if any(adapter is not None for adapter in adapters):
        joined = join(kernels, adapters) if joined is None else joined
        y = fused_product(x.reshape(-1, x.shape[-1]), kernels, adapters, joined)
        y = y.reshape(*x.shape[:-1], -1)
    else:
        y = x @ _join(kernels)
    biases = [p.bias for p in projections if p.bias is not None]
    assert len(biases) in (0, len(projections)), "all of them have a bias, or none"
    return y + _row(jnp.concatenate(biases), y.ndim) if biases else y


def _row(bias: jax.Array, ndim: int) -> jax.Array:
    return bias.reshape((1,) * (ndim - 1) + (-1,))


@jax.custom_vjp
def fused_product(
    x: Float[Array, "T i"],
    kernels: tuple[Float[Array, "i _"], ...],
    adapters: tuple[Adapter | None, ...],
    joined: Joined,
) -> Float[Array, "T n"]:
    """x @ [W_1 | W_2 ...] with every adapter inside the same matrix product.

    Adding (x a) b to the output afterwards would read and write the output once more, which at
    small ranks costs more than the adapter's arithmetic. Where the output is the wider side, x a
    joins the input: [x | x a] @ [W; b]. Where the input is, a joins the kernel: x @ [W | a].

    `joined` is `join` of the same kernels and adapters; no gradient goes by it.
    """
    return _fused_forward(x, kernels, adapters, joined)[0]


def join(kernels: tuple[jax.Array, ...], adapters: tuple[Adapter | None, ...]) -> Joined:
    """What `fused_product` multiplies by."""
    kernel = _join(kernels)
    a, b = side_by_side(kernels, adapters, kernel.dtype)
    wide_input = kernel.shape[0] > kernel.shape[1]
    matrix = jnp.concatenate([kernel, a if wide_input else b], axis=1 if wide_input else 0)
    return Joined(matrix, a, b)


def join_layers(layers: Tree, adapters: Adapters, modules: tuple[str, ...]) -> Joined:
    """`join` of every layer's `modules`, stacked."""

    def one(kernels: tuple, stored: tuple) -> Joined:
        return join(kernels, tuple(a if a is None else scaled(*a) for a in stored))

    kernels = tuple(layers[module]["kernel"] for module in modules)
    lora, plan = adapters.lora, adapters.plan
    stored = tuple(
        (lora[m]["a"], lora[m]["b"], plan.masks[m], plan.scales[m]) if m in lora else None
        for m in modules
    )
    return jax.vmap(one)(kernels, stored)


def _fused_forward(
    x: jax.Array, kernels: tuple, adapters: tuple, joined: Joined
) -> tuple[jax.Array, tuple]:
    matrix, a, b = joined
    if matrix.shape[0] == x.shape[1]:
        y, down = jnp.split(x @ matrix, [matrix.shape[1] - a.shape[1]], axis=1)
        down = checkpoint_name(down, "down")
        y = y + _apart(down @ b)
    else:
        down = checkpoint_name(x @ a, "down")
        y = jnp.concatenate([x, down], axis=1) @ matrix
    return y, (x, down, kernels, adapters, joined)


def _fused_backward(saved: tuple, dy: jax.Array) -> tuple:
    x, down, kernels, adapters, (matrix, a, b) = saved
    features = x.shape[1]
    if matrix.shape[0] == features:
        d_down = dy @ b.T
        dx = jnp.concatenate([dy, d_down], axis=1) @ matrix.T
    else:
        both = dy @ matrix.T
        dx, d_down = both[:, :features], both[:, features:]
        dx = dx + _apart(d_down @ a.T)
    f32 = jnp.float32
    da = jnp.matmul(x.T, d_down, preferred_element_type=f32)
    db = jnp.matmul(down.T, dy, preferred_element_type=f32)
    d_kernels, d_adapters, rank, column = [], [], 0, 0
    for w, adapter in zip(kernels, adapters, strict=True):
        width = w.shape[1]
        # Nobody asks for it unless the frozen weights' gradient is measured; then XLA drops it.
        d_kernels.append(x.T @ dy[:, column : column + width])
        if adapter is None:
            d_adapters.append(None)
        else:
            r = adapter[0].shape[1]
            own = db[rank : rank + r, column : column + width]
            d_adapters.append((da[:, rank : rank + r], own))
            rank += r
        column += width
    return dx, tuple(d_kernels), tuple(d_adapters), None


def _apart(small: jax.Array) -> jax.Array:
    """Leaves the sum with a small product to what comes next. XLA would put it into the product,
    for which the other summand, a part of a larger product, has to be copied out first."""
    return jax.lax.optimization_barrier(small)


fused_product.defvjp(_fused_forward, _fused_backward)


def _join(kernels: tuple[jax.Array, ...]) -> jax.Array:
    return kernels[0] if len(kernels) == 1 else jnp.concatenate(kernels, axis=1)


def side_by_side(
    kernels: Sequence[jax.Array], adapters: Sequence[Adapter | None], dtype: jnp.dtype
) -> Adapter:
    """All a's side by side, all b's on the diagonal of one matrix."""
    width = sum(w.shape[1] for w in kernels)
    ins, outs, column = [], [], 0
    for w, adapter in zip(kernels, adapters, strict=True):
        if adapter is not None:
            after = width - column - w.shape[1]
            ins.append(adapter[0].astype(dtype))
            outs.append(jnp.pad(adapter[1].astype(dtype), ((0, 0), (column, after))))
        column += w.shape[1]
    return jnp.concatenate(ins, axis=1), jnp.concatenate(outs, axis=0)


def init_lora(config: QwenConfig, plan: RankPlan, key: jax.Array) -> Tree:
    """module -> {"a": [L, in, R], "b": [L, R, out]}, float32; B is zero.

    Rank r of an adapter gets the same values whatever `max_rank` is, so that arms of a study which
    differ in width still start from the same A.
    """
    lora = {}
    for module in plan.modules:
        in_features, out_features = config.module_shapes[module]
        module_key = jax.random.fold_in(key, MODULES.index(module))
        bound = in_features**-0.5
        # Rank first, because the generator fills an array in order: a larger R only adds values.
        a = jax.random.uniform(
            module_key,
            (plan.max_rank, config.num_layers, in_features),
            jnp.float32,
            -bound,
            bound,
        )
        lora[module] = {
            "a": a.transpose(1, 2, 0),
            "b": jnp.zeros((config.num_layers, plan.max_rank, out_features), jnp.float32),
        }
    return lora


def device_plan(plan: RankPlan) -> LoraPlan:
    """The plan's masks and scales as arrays."""
    return LoraPlan(
        masks={module: jnp.asarray(mask) for module, mask in plan.masks().items()},
        scales={module: jnp.asarray(scale) for module, scale in plan.scales().items()},
    )


def plan_collection(plan: LoraPlan) -> Tree:
    """The plan as the `plan` variable collection that LoRADense reads."""
    return {m: {"mask": plan.masks[m], "scale": plan.scales[m]} for m in plan.masks}
