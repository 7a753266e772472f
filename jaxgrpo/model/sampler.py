"""A layer as the sampler runs it: plain functions over weights laid out for decoding.

Adapters are carried along in the trainer's arithmetic, x W + (x a) b in the model's dtype, never
added to the weights: in bfloat16 a sum W + s a b rounds small updates away, by a share that depends
on s, rank and |b|, which are what rank plans and scale rules vary. On one device projections of one
input are one matrix, with the adapters inside it: each token step has few rows, and every further
product costs its start.

Rows of several arms, each with adapters of its own, are sampled together: all arms' inner axes lie
side by side, and a row keeps the inner values of its own arm alone. What is read is every adapter
once, which is what sampling with all of them has to read. Where arms are spread over devices a
device has the adapters of its own alone (`mesh.on_own_arms`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgrpo.mesh import constrain
from jaxgrpo.model.attention import DecodePosition, Rope, apply_rotary, causal_attention
from jaxgrpo.model.decode_attention import decode_attention
from jaxgrpo.model.gated_product import (
    STEP,
    gated_product,
    make_tiles,
    padded_width,
    use_tiles,
)
from jaxgrpo.model.kv_cache import LayerCache, plain_attention, use_kernel, write_slot
from jaxgrpo.model.lora import Adapter, scaled, side_by_side
from jaxgrpo.model.presets import QwenConfig
from jaxgrpo.model.qwen import swiglu
from jaxgrpo.model.rms_norm import rms_norm
from jaxgrpo.types import Tree

TOGETHER = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}
"""Projections of one input, and the name of their common matrix in the sampler's weights."""


INNER = 16
"""On a GPU adapters' inner widths are filled up to a multiple of it: what tensor cores take."""


Rows = Int[Array, " rows"] | None
"""Which arm each row belongs to; None: there is one arm."""


class Linear(NamedTuple):
    """One projection, or several of one input, and their adapters.

    Where an adapter is follows from what is there. a alone: b lies under the kernel, [W; b], and
    x @ a joins the input. b alone: a lies beside the kernel, [W | a], and its output goes through
    b. Both: they are applied apart. Neither: there is no adapter.

    Attributes:
        kernel: [i, o] with what lies under or beside it, or tiles [n, 2, half, i] for
            `gated_product`.
        arm_of: whose inner value each is; None: there is one arm.
    """

    kernel: jax.Array
    bias: Float[Array, " o"] | None = None
    a: Float[Array, "i r"] | None = None
    b: Float[Array, "r o"] | None = None
    arm_of: Int[Array, " r"] | None = None


def sampler_layer(config: QwenConfig, layer: Tree, lora: Tree, plan: Tree) -> Tree:
    """One layer's weights, kernels [i, o] and adapters a [A, i, R], b [A, R, o] of A arms, as the
    sampler wants them; module -> Linear, and the norms' scales."""
    adapters = {
        module: arms_side_by_side(ab["a"], ab["b"], plan[module]["mask"], plan[module]["scale"])
        for module, ab in lora.items()
    }
    arms, _, rank = next((ab["a"].shape for ab in lora.values()), (1, 0, 0))
    inner_arms = jnp.repeat(jnp.arange(arms), rank) if arms > 1 else None
    norms = {name: leaves["scale"] for name, leaves in layer.items() if "scale" in leaves}
    if config.device.count > 1:
        # Kernels are split along what would join them.
        found = {m: _apart(layer[m], adapters.get(m)) for m in config.module_shapes}
        return norms | {m: _told_apart(linear, inner_arms, 1) for m, linear in found.items()}
    cores = config.device.cores
    inner = INNER if use_kernel(config) else 1
    down, tiled = layer["down_proj"]["kernel"], use_tiles(config)
    missing = 0
    if tiled:
        features = config.intermediate_size
        missing = padded_width(features, cores) - features
        down = jnp.pad(down, ((0, missing), (0, 0)))
    found = {
        "qkv": under(layer, adapters, TOGETHER["qkv"], inner),
        "gate_up": tiles(layer, adapters, cores)
        if tiled
        else under(layer, adapters, TOGETHER["gate_up"], inner),
        "o_proj": beside(layer["o_proj"]["kernel"], adapters.get("o_proj")),
        "down_proj": beside(down, adapters.get("down_proj"), missing),
    }
    modules = {name: sum(m in adapters for m in TOGETHER.get(name, (name,))) for name in found}
    return norms | {m: _told_apart(linear, inner_arms, modules[m]) for m, linear in found.items()}


def arms_side_by_side(
    a: Float[Array, "A i R"],
    b: Float[Array, "A R o"],
    mask: Float[Array, "A R"],
    scale: Float[Array, " A"],
) -> Adapter:
    """One module's adapters of all arms as one: a [i, A*R] and b [A*R, o], arm by arm."""
    a, b = jax.vmap(scaled)(a, b, mask, scale)
    return jnp.concatenate(tuple(a), axis=1), jnp.concatenate(tuple(b), axis=0)


def _told_apart(weights: Linear, arms: Int[Array, " r"] | None, modules: int) -> Linear:
    """With whose inner value each is; `arms` says it for one of so many modules."""
    found = weights.b if weights.a is None else weights.a
    if arms is None or found is None:
        return weights
    width = found.shape[0] if weights.a is None else found.shape[1]
    whose = jnp.tile(arms, modules)
    # What fills the inner axis up belongs to nobody, and is 0 anyway.
    return weights._replace(arm_of=jnp.pad(whose, (0, width - len(whose)), constant_values=-1))


def _apart(dense: Tree, adapter: Adapter | None) -> Linear:
    dtype = dense["kernel"].dtype
    a, b = (None, None) if adapter is None else (matrix.astype(dtype) for matrix in adapter)
    return Linear(dense["kernel"], dense.get("bias"), a, b)


def _together(
    layer: Tree, adapters: dict[str, Adapter], modules: tuple[str, ...], multiple: int
) -> tuple[list[jax.Array], Adapter | None]:
    """The modules' kernels, and their common adapter, whose inner width is filled up so that input
    and inner values together are a multiple."""
    kernels = [layer[module]["kernel"] for module in modules]
    if not any(module in adapters for module in modules):
        return kernels, None
    a, b = side_by_side(kernels, [adapters.get(m) for m in modules], kernels[0].dtype)
    missing = -(len(a) + a.shape[1]) % multiple
    a, b = jnp.pad(a, ((0, 0), (0, missing))), jnp.pad(b, ((0, missing), (0, 0)))
    return kernels, (a, b)


def under(
    layer: Tree, adapters: dict[str, Adapter], modules: tuple[str, ...], multiple: int
) -> Linear:
    """[W; b] for `modules`, and a."""
    kernels, adapter = _together(layer, adapters, modules, multiple)
    bias = None
    if "bias" in layer[modules[0]]:
        bias = jnp.concatenate([layer[module]["bias"] for module in modules])
    kernel = jnp.concatenate(kernels, axis=1)
    if adapter is None:
        return Linear(kernel, bias)
    return Linear(jnp.concatenate([kernel, adapter[1]], axis=0), bias, a=adapter[0])


def tiles(layer: Tree, adapters: dict[str, Adapter], cores: int) -> Linear:
    """Gate and up in `gated_product`'s layout, b under them as in `under`."""
    modules = TOGETHER["gate_up"]
    kernels, adapter = _together(layer, adapters, modules, STEP)
    if adapter is None:
        return Linear(make_tiles(kernels[0], kernels[1], cores))
    a, b = adapter
    width = kernels[0].shape[1]
    gate, up = (
        jnp.concatenate([kernel, part], axis=0)
        for kernel, part in zip(kernels, (b[:, :width], b[:, width:]), strict=True)
    )
    return Linear(make_tiles(gate, up, cores), a=a)


def beside(kernel: jax.Array, adapter: Adapter | None, missing: int = 0) -> Linear:
    """[W | a], with so many rows of zeros under a, and b."""
    if adapter is None:
        return Linear(kernel)
    a, b = (matrix.astype(kernel.dtype) for matrix in adapter)
    a = jnp.pad(a, ((0, missing), (0, 0)))
    return Linear(jnp.concatenate([kernel, a], axis=1), b=b)


def linear(
    config: QwenConfig, x: Float[Array, "... i"], weights: Linear, arm: Rows = None
) -> Float[Array, "... o"]:
    """x W + (x a) b + bias; of tiles silu(gate) * up."""
    kernel, bias, a, b, _ = weights
    if kernel.ndim == 4:
        return gated_product(x if a is None else _beside_inner(config, x, weights, arm), kernel)
    if a is not None and b is not None:
        y = x @ kernel + own_arm(x @ a, weights, arm) @ b
    elif a is not None:
        y = _beside_inner(config, x, weights, arm) @ kernel
    elif b is not None:
        y, inner = jnp.split(x @ kernel, [b.shape[1]], axis=-1)
        # Left to what comes next: put into the product, the other summand had to be copied first.
        y = y + jax.lax.optimization_barrier(own_arm(inner, weights, arm) @ b)
    else:
        y = x @ kernel
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def own_arm(inner: Float[Array, "... r"], weights: Linear, arm: Rows) -> Float[Array, "... r"]:
    """0 where an inner value is another arm's than the row's."""
    assert (weights.arm_of is None) == (arm is None), "rows of arms need the weights of arms"
    if weights.arm_of is None or arm is None:
        return inner
    own = arm[:, None] == weights.arm_of[None, :]
    return jnp.where(own.reshape(len(arm), *(1,) * (inner.ndim - 2), -1), inner, 0)


def _beside_inner(config: QwenConfig, x: jax.Array, weights: Linear, arm: Rows) -> jax.Array:
    """[x | x a]. For few rows the inner axis is cut into parts that the card computes side by
    side: the thin product by itself keeps a handful of its multiprocessors busy."""
    a = weights.a
    assert a is not None
    if x.ndim != 2 or not use_kernel(config):
        return jnp.concatenate([x, own_arm(x @ a, weights, arm)], axis=-1)
    parts = next(parts for parts in (12, 8, 7, 6, 4, 2, 1) if len(a) % (16 * parts) == 0)
    inner = _product_in_parts(x, a, parts).astype(x.dtype)
    return jnp.concatenate([x, own_arm(inner, weights, arm)], axis=-1)


def _product_in_parts(x: jax.Array, kernel: jax.Array, parts: int) -> Float[Array, "B o"]:
    """x @ kernel in float32, its inner axis in so many parts."""
    inner, width = kernel.shape
    products = jnp.einsum(
        "bpi,pio->pbo",
        x.reshape(len(x), parts, inner // parts),
        kernel.reshape(parts, inner // parts, width),
        preferred_element_type=jnp.float32,
    )
    return jnp.sum(products, axis=0)


def _norm(config: QwenConfig, x: jax.Array, scale: jax.Array) -> jax.Array:
    h = rms_norm(x, scale, config.rms_norm_eps)
    # Or XLA makes the norm again while it copies it beside the adapters' inner values.
    return jax.lax.optimization_barrier(h) if use_kernel(config) else h


def _qkv(config: QwenConfig, layer: Tree, x: jax.Array, arm: Rows) -> Float[Array, "... heads H"]:
    """Queries, keys and values of all heads, not yet rotated.

    Queries and keys are normalised here for `decode_attention` too: by training's own `rms_norm`,
    and in the place of the pass over the same array that adds a bias where there is one.
    """
    h = _norm(config, x, layer["input_layernorm"])
    parts = ["qkv"] if "qkv" in layer else TOGETHER["qkv"]
    found = [linear(config, h, layer[part], arm) for part in parts]
    heads = [y.reshape(*x.shape[:-1], -1, config.head_dim) for y in found]
    qkv = heads[0] if len(heads) == 1 else jnp.concatenate(heads, axis=-2)
    if not config.qk_norm:
        return qkv
    q, k, v = _heads(config, qkv)
    q = rms_norm(q, layer["q_norm"], config.rms_norm_eps)
    k = rms_norm(k, layer["k_norm"], config.rms_norm_eps)
    return jnp.concatenate([q, k, v], axis=-2)


def _heads(config: QwenConfig, qkv: jax.Array) -> list[jax.Array]:
    return jnp.split(qkv, [config.num_heads, config.num_heads + config.num_kv_heads], axis=-2)


def _rotated(
    config: QwenConfig, qkv: jax.Array, rope: Rope
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = _heads(config, qkv)
    return apply_rotary(q, rope), apply_rotary(k, rope), v


def _gated(config: QwenConfig, layer: Tree, x: jax.Array, arm: Rows) -> jax.Array:
    """silu(gate) * up."""
    h = _norm(config, x, layer["post_attention_layernorm"])
    if "gate_up" not in layer:
        gate, up = (linear(config, h, layer[module], arm) for module in TOGETHER["gate_up"])
        return jax.nn.silu(gate) * up
    both = linear(config, h, layer["gate_up"], arm)
    return both if layer["gate_up"].kernel.ndim == 4 else swiglu(both)


def prefill_layer(
    config: QwenConfig,
    layer: Tree,
    x: Float[Array, "P S D"],
    rope: Rope,
    mask: Bool[Array, "P S"],
    arm: Rows,
) -> tuple[Float[Array, "P S D"], LayerCache]:
    """Whole prompts, and their keys and values for decoding."""
    q, k, v = _rotated(config, _qkv(config, layer, x, arm), rope)
    q = constrain(q, "act_batch", "act_length", "act_heads", "head_dim")
    attended = causal_attention(q, k, v, mask, None, config.device)
    x = x + linear(config, attended.reshape(*x.shape[:-1], -1), layer["o_proj"], arm)
    x = x + linear(config, _gated(config, layer, x, arm), layer["down_proj"], arm)
    x = constrain(x, "act_batch", "act_length", "act_embed")
    return x, {"k": k.transpose(0, 2, 1, 3), "v": v.transpose(0, 2, 1, 3)}


def decode_layer(
    config: QwenConfig,
    layer: Tree,
    x: Float[Array, "B D"],
    at: DecodePosition,
    prompt: LayerCache,
    completion: LayerCache,
) -> tuple[Float[Array, "B D"], LayerCache]:
    """One token per row: kernels on one GPU, plain XLA everywhere else."""
    qkv = _qkv(config, layer, x, at.arm)
    if use_kernel(config):
        attended, completion = decode_attention(qkv, at, prompt, completion)
    else:
        mask = at.prompt_mask
        if at.prompt_of is not None:
            prompt, mask = jax.tree.map(lambda x: x[at.prompt_of], (prompt, mask))
        q, k, v = _rotated(config, qkv, at.rope)
        completion = write_slot(completion, k, v, at.slot)
        attended = plain_attention(q, prompt, mask, completion, at.slot)
    x = x + linear(config, attended.reshape(len(x), -1), layer["o_proj"], at.arm)
    gated = _gated(config, layer, x, at.arm)
    if use_kernel(config):
        x = x + split_product(gated, layer["down_proj"], at.arm)
    else:
        x = x + linear(config, gated, layer["down_proj"], at.arm)
    return constrain(x, "act_batch", "act_embed"), completion


def split_product(x: Float[Array, "B i"], weights: Linear, arm: Rows = None) -> Float[Array, "B o"]:
    """`linear` with the inner axis in a few parts that the card computes side by side, where rows
    and columns alone are too few to keep it busy; XLA adds them up with what comes next."""
    kernel, b = weights.kernel, weights.b
    parts = next(parts for parts in (5, 4, 6, 3, 2, 1) if len(kernel) % (8 * parts) == 0)
    y = _product_in_parts(x, kernel, parts)
    if b is None:
        return y.astype(x.dtype)
    y, inner = (part.astype(x.dtype) for part in jnp.split(y, [b.shape[1]], axis=1))
    return y + jax.lax.optimization_barrier(own_arm(inner, weights, arm) @ b)
