"""The model as pure functions over pytrees: what every other folder imports.

base: {"embed_tokens": [V, D], "layers": {module: {"kernel": [L, in, out], "bias": [L, out]},
"input_layernorm": {"scale": [L, D]}, "post_attention_layernorm": ..., "q_norm": {"scale": [L, H]},
"k_norm": ...}, "norm": {"scale": [D]}, "lm_head": [V, D]}, of bias, q_norm, k_norm and lm_head what
the config has. lora: {module: {"a": [L, in, R], "b": [L, R, out]}}, float32.
The decode form has the same leaves with `layers` a tuple of one tree per layer, because slicing
stacked weights inside the decode loop would copy every one of them at every token.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxgrpo.config import MODULES
from jaxgrpo.mesh import check_device, on_own_arms, rollout_bytes, sharding, to_rollout_layout
from jaxgrpo.model.attention import DecodePosition, rotary_tables
from jaxgrpo.model.head import token_logprobs
from jaxgrpo.model.kv_cache import LayerCache, PromptCache, cache_slots, init_completion_cache
from jaxgrpo.model.lora import device_plan, init_lora, plan_collection
from jaxgrpo.model.presets import PRESETS, QwenConfig
from jaxgrpo.model.qwen import Qwen, join_adapters
from jaxgrpo.model.remat import remat_of_batch
from jaxgrpo.model.rms_norm import rms_norm
from jaxgrpo.model.sampler import Linear, decode_layer, prefill_layer, sampler_layer
from jaxgrpo.types import Adapters, Packing, Tree, unstack_layers

__all__ = [
    "PRESETS",
    "PromptCache",
    "QwenConfig",
    "base_logical_axes",
    "bin_logprobs",
    "cache_slots",
    "decode_step",
    "describe_base",
    "device_plan",
    "hidden_states",
    "init_base",
    "init_completion_cache",
    "init_lora",
    "input_moments",
    "join_adapters",
    "logits",
    "lora_logical_axes",
    "make_decode_weights",
    "prefill",
    "remat_of_batch",
    "resharded_bytes",
]


def init_base(config: QwenConfig, key: jax.Array) -> Tree:
    """Random weights (normal, 0.02), for tests and benchmarks."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Qwen(config, "full").init(key, tokens, tokens, None)["params"]  # type: ignore[return-value]


def base_logical_axes(config: QwenConfig) -> Tree:
    """Logical axis names of every leaf of `base`."""
    ins_outs = _module_axes()
    layers: Tree = {}
    for module, (in_axis, out_axis) in ins_outs.items():
        layers[module] = {"kernel": ("layers", in_axis, out_axis)}
        if config.qkv_bias and module in ("q_proj", "k_proj", "v_proj"):
            layers[module]["bias"] = ("layers", out_axis)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        layers[norm] = {"scale": ("layers", "norm")}
    for norm in ("q_norm", "k_norm") if config.qk_norm else ():
        layers[norm] = {"scale": ("layers", "head_dim")}
    axes: Tree = {
        "embed_tokens": ("vocab", "embed"),
        "layers": layers,
        "norm": {"scale": ("norm",)},
    }
    if not config.tie_word_embeddings:
        axes["lm_head"] = ("vocab", "embed")
    return axes


def describe_base(config: QwenConfig, mesh: Mesh) -> Tree:
    """The frozen weights' shapes, and where `load_model` puts them on a mesh."""
    return jax.tree.map(
        lambda names, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, names)),
        base_logical_axes(config),
        jax.eval_shape(lambda: init_base(config, jax.random.key(0))),
        is_leaf=_axes,
    )


def lora_logical_axes(modules: tuple[str, ...]) -> Tree:
    """Logical axis names of every leaf of `lora`."""
    ins_outs = _module_axes()
    return {
        module: {
            "a": ("layers", ins_outs[module][0], "rank"),
            "b": ("layers", "rank", ins_outs[module][1]),
        }
        for module in modules
    }


def _module_axes() -> dict[str, tuple[str, str]]:
    axes = dict.fromkeys(MODULES, ("embed", "mlp"))
    axes |= {"q_proj": ("embed", "q_heads"), "o_proj": ("q_heads", "embed")}
    axes |= {"k_proj": ("embed", "kv_heads"), "v_proj": ("embed", "kv_heads")}
    return axes | {"down_proj": ("mlp", "embed")}


def hidden_states(
    config: QwenConfig,
    base: Tree,
    adapters: Adapters | None,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Final-norm hidden states of whole rows.

    Args:
        mask: True on real tokens, needed for left padding only: then it hides padding keys and
            positions count real tokens. Right padding needs none, causality hides it.
    """
    if mask is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    else:
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return Qwen(config).apply(_variables(base, adapters), tokens, positions, mask)  # type: ignore[return-value]


def input_moments(
    config: QwenConfig, base: Tree, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Tree:
    """What goes into each projection of the base model: module -> {"sum": [L, in],
    "outer": [L, in, in]}, summed over the real tokens of right-padded rows."""
    rows = {"layers": {module: {"mask": mask} for module in MODULES}}
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    _, found = Qwen(config).apply(
        {"params": base, "rows": rows}, tokens, positions, None, mutable=["moments"]
    )  # type: ignore[misc]
    layers = found["moments"]["layers"]
    return {module: {name: x[0] for name, x in layers[module].items()} for module in MODULES}


def head_table(config: QwenConfig, weights: Tree) -> Float[Array, "V D"]:
    return weights["embed_tokens" if config.tie_word_embeddings else "lm_head"]


def logits(config: QwenConfig, weights: Tree, hidden: Float[Array, "... D"]) -> jax.Array:
    """float32 [..., V]; `weights` in either form."""
    table = head_table(config, weights)
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def bin_logprobs(
    config: QwenConfig,
    base: Tree,
    adapters: Adapters | None,
    packing: Packing,
    *,
    temperature: float,
    chunk_tokens: int,
    remat: str,
) -> tuple[Float[Array, "W N"], Float[Array, "W N"]]:
    """Log-prob of the token that each own place of a bin predicts, and the entropy of its
    distribution, both float32; elsewhere they mean nothing and are finite.

    The distribution is softmax(logits / temperature). Logits exist for about `chunk_tokens` tokens
    per device at a time: those of a whole bin never do.

    Args:
        packing: one bin of each batch shard (`bins.take_bin`).
    """
    variables = _variables(base, adapters)
    hidden = Qwen(config, remat).apply(variables, packing.tokens, packing.positions, None, packing)
    # What is split over fsdp is gathered here, once, and not in every chunk.
    table = to_rollout_layout(head_table(config, base), ("vocab", "embed"))
    chunk_tokens *= config.device.batch_shards
    return token_logprobs(
        table,
        hidden,  # type: ignore[arg-type]
        packing.targets,
        temperature,
        chunk_tokens,
        config.device,
    )


def _variables(base: Tree, adapters: Adapters | None) -> Tree:
    """Flax's collections."""
    variables: Tree = {"params": base}
    if adapters is not None:
        variables["lora"] = {"layers": adapters.lora}
        variables["plan"] = {"layers": plan_collection(adapters.plan)}
        if adapters.joined is not None:
            variables["joined"] = {"layers": adapters.joined}
    return variables


@functools.partial(jax.jit, static_argnums=0)
def make_decode_weights(
    config: QwenConfig, base: Tree, adapters: Adapters | tuple[Adapters, ...] | None
) -> Tree:
    """The sampler's copy of the weights: layers unstacked, the adapters carried along.

    Args:
        adapters: one policy's, or in a tuple those of several arms. Of arms that are spread over
            devices (`on_own_arms`) every device has its own in its part, along the first axis, of
            each of the layers' arrays.
    """
    check_device(config.device)
    arms = adapters if isinstance(adapters, tuple) else (adapters,) if adapters else ()

    def sampler_layers(stored: Tree, arms: tuple[Tree, ...]) -> tuple[Tree, ...]:
        of_layers = unstack_layers(stored, config.num_layers)
        of_arms = unstack_layers(arms or ({}, {}), config.num_layers, axis=1)
        return tuple(
            _sampler_layer(config.of_shard, layer, *adapters)
            for layer, adapters in zip(of_layers, of_arms, strict=True)
        )

    of_arms = tuple(zip(*((arm.lora, plan_collection(arm.plan)) for arm in arms), strict=True))
    layers = (
        on_own_arms(sampler_layers, config.device, gathered=False)(base["layers"], of_arms)
        if arms
        else sampler_layers(base["layers"], ())
    )
    weights = {**base, "layers": layers}
    if config.of_shard.device.count == 1:
        return jax.tree.map(lambda x: to_rollout_layout(x, None), weights)
    adapted = tuple(arms[0].lora) if arms else ()
    axes = _decode_axes(config, adapted, arms=len(arms) > 1)
    # The axes stand in for leaves on the left, which is why they come first.
    return jax.tree.map(lambda names, x: to_rollout_layout(x, names), axes, weights, is_leaf=_axes)


def resharded_bytes(config: QwenConfig, mesh: Mesh) -> int:
    """What each device receives in `make_decode_weights`, once per iteration (adapters aside)."""
    shapes = jax.eval_shape(lambda: init_base(config, jax.random.key(0)))
    size = config.compute_dtype.itemsize
    moved = jax.tree.map(
        lambda names, x: rollout_bytes(mesh, x.shape, size, names),
        base_logical_axes(config),
        shapes,
        is_leaf=_axes,
    )
    return sum(jax.tree.leaves(moved))


def _decode_axes(config: QwenConfig, adapted: tuple[str, ...], *, arms: bool) -> Tree:
    """Logical axes of the sampler's weights on a mesh."""
    axes, lora = base_logical_axes(config), lora_logical_axes(adapted)
    layer: Tree = {}
    for name, leaves in axes["layers"].items():
        one = {leaf: names[1:] for leaf, names in leaves.items()}
        if "kernel" not in one:
            layer[name] = one["scale"]
            continue
        a, b = (lora[name][side][1:] if name in lora else None for side in ("a", "b"))
        arm_of: Any = ("rank",) if arms and name in lora else None
        layer[name] = Linear(one["kernel"], one.get("bias"), a, b, arm_of)
    return {**axes, "layers": (layer,) * config.num_layers}


def _axes(x: object) -> bool:
    return type(x) is tuple and all(isinstance(name, str) for name in x)


def prefill(
    config: QwenConfig,
    weights: Tree,
    tokens: Int[Array, "P S"],
    mask: Bool[Array, "P S"],
    arm: Int[Array, " P"] | None = None,
) -> tuple[Float[Array, "P D"], PromptCache]:
    """Runs left-padded prompts; returns the hidden state of the last token and the caches.

    Args:
        arm: which arm a prompt belongs to; None: the weights are one arm's.
    """
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    rope = rotary_tables(config, positions)
    x = jnp.take(weights["embed_tokens"], tokens, axis=0)
    caches = []
    for layer in weights["layers"]:
        x, cache = _prefill_layer(config, layer, x, rope, mask, arm)
        caches.append(cache)
    return _final_norm(config, weights, x[:, -1]), PromptCache(tuple(caches), mask, arm)


def decode_step(
    config: QwenConfig,
    weights: Tree,
    prompts: PromptCache,
    cache: tuple[LayerCache, ...],
    tokens: Int[Array, " B"],
    t: Int[Array, ""],
    prompt_of: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B D"], tuple[LayerCache, ...]]:
    """Feeds the completion token with index `t` of every row.

    Args:
        prompt_of: which prompt a row continues; None: row p*G+g continues prompt p.
    """
    group = tokens.shape[0] // len(prompts.mask)

    def of_row(of_prompt: jax.Array) -> jax.Array:
        return jnp.repeat(of_prompt, group) if prompt_of is None else of_prompt[prompt_of]

    positions = of_row(jnp.sum(prompts.mask, axis=1)) + t
    arm = None if prompts.arm is None else of_row(prompts.arm)
    at = DecodePosition(rotary_tables(config, positions), prompts.mask, prompt_of, t, arm)
    x = jnp.take(weights["embed_tokens"], tokens, axis=0)
    new_cache = []
    for layer, prompt, completion in zip(weights["layers"], prompts.layers, cache, strict=True):
        x, completion = _decode_layer(config, layer, x, at, prompt, completion)
        new_cache.append(completion)
    return _final_norm(config, weights, x), tuple(new_cache)


# Under jit of their own, so that all layers are traced and lowered once: written out, 28 of them
# would take longer than compiling them.
_prefill_layer = jax.jit(prefill_layer, static_argnums=0)
_decode_layer = jax.jit(decode_layer, static_argnums=0)
_sampler_layer = jax.jit(sampler_layer, static_argnums=0)


def _final_norm(config: QwenConfig, weights: Tree, x: jax.Array) -> jax.Array:
    return rms_norm(x, weights["norm"]["scale"], config.rms_norm_eps)
