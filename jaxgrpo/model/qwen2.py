"""Qwen2 in Flax Linen: the layers scanned for training, one by one for decoding.

Follows transformers' Qwen2 (RMSNorm, rotary embedding, grouped-query attention with QKV bias,
SwiGLU). Norms, rotary tables, softmax and logits are float32; the rest in the config's dtype.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxgrpo.mesh import batch_parts, constrain, on_one_device
from jaxgrpo.model.bins import bins_from_rows, row_lengths, rows_from_bins
from jaxgrpo.model.decode_attention import decode_attention
from jaxgrpo.model.gated_product import (
    gated_product,
    make_tiles,
    padded_width,
    tile_width,
    use_tiles,
)
from jaxgrpo.model.kv_cache import LayerCache, plain_attention, use_kernel, write_slot
from jaxgrpo.model.lora import (
    Joined,
    LoRADense,
    join_layers,
    project,
    project_joined,
)
from jaxgrpo.model.presets import Qwen2Config
from jaxgrpo.types import LoraPlan, Packing, Tree

Rope = tuple[jax.Array, jax.Array]
"""cos, sin: float32 [..., H/2]."""

JOINED = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}
"""Projections of one input, and the name of their common matrix in the sampler's weights."""

PRODUCTS = ("normed", "q", "k", "v", "attended", "residual", "gate_up", "gated", "down")
"""What goes into matrix products and comes out of them, by the names given below; `down` is an
adapter's inner value. Inputs are kept too: they exist in memory for the product anyway."""

HEAD_BYTES = 10 * 4096
"""A chunk of the head per vocabulary entry: scores, their copy, probabilities of 4,096 tokens."""


def rotary_tables(config: Qwen2Config, positions: Int[Array, "..."]) -> Rope:
    """cos and sin of position * theta^(-2i/H), in float32."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    angles = positions[..., None].astype(jnp.float32) * frequencies.reshape(
        (1,) * positions.ndim + (-1,)
    )
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x: Float[Array, "... heads H"], rope: Rope) -> Float[Array, "... heads H"]:
    """Rotates the two halves of each head (the "rotate_half" layout), in float32."""
    cos, sin = (table[..., None, :] for table in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Bool[Array, "B T"] | None,
    lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query causal attention.

    Args:
        mask: hides padding keys (needed for left padding only).
        lengths: of right-padded rows, for programs that can leave out the rest, which then means
            nothing, in the gradient as well.
    """
    # cuDNN's kernel has no float32 form and wants no explicit mask; plain XLA takes everything.
    if mask is None and q.dtype == jnp.bfloat16 and jax.default_backend() == "gpu":
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
    rows, length, heads, head_dim = q.shape
    groups = k.shape[2]
    # Queries that share a key head stand under each other, so that each product is one plain
    # matrix product per row and key head: on CPU three times as fast as one over five axes.
    q = q.reshape(rows, length, groups, heads // groups, head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(rows, groups, -1, head_dim)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    seen = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if mask is not None:
        seen = seen & mask[:, None, None, :]
    seen = jnp.tile(seen, (1, 1, heads // groups, 1))
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1).astype(v.dtype)
    attended = jnp.matmul(weights, v).reshape(rows, groups, heads // groups, length, head_dim)
    return attended.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, head_dim)


@jax.custom_vjp
def swiglu(both: Float[Array, "... 2F"]) -> Float[Array, "... F"]:
    """silu(gate) * up of [gate | up]; the gradient comes back side by side too, where autodiff
    would write its halves first and join them afterwards."""
    gate, up = jnp.split(both, 2, axis=-1)
    return nn.silu(gate) * up


def _swiglu_forward(both: jax.Array) -> tuple[jax.Array, jax.Array]:
    return swiglu(both), both


def _swiglu_backward(both: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    gate, up = jnp.split(both, 2, axis=-1)
    gate, up, dy = (x.astype(jnp.float32) for x in (gate, up, dy))
    open_ = jax.nn.sigmoid(gate)
    halves = dy * up * open_ * (1.0 + gate * (1.0 - open_)), dy * gate * open_
    return (jnp.concatenate(halves, axis=-1).astype(both.dtype),)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), self.dtype)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.epsilon)
        scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32.astype(self.dtype) * scale).astype(self.dtype)


def join_adapters(base: Tree, lora: Tree, plan: LoraPlan, remat: str) -> Tree | None:
    """Each layer's matrices for `fused_product`: made once a step, where every micro-batch would
    write them anew in either direction. Stacked, or a tuple of one tree per layer where `remat`
    writes layers out; None where adapters are not fused."""
    if not fuse_adapters():
        return None
    groups = (*JOINED.values(), ("o_proj",), ("down_proj",))
    stacked = {
        _name_of(modules): join_layers(base["layers"], lora, plan, modules)
        for modules in groups
        if any(module in lora for module in modules)
    }
    if not unroll_layers(remat):
        return stacked
    layers = len(next(iter(stacked.values())).a)
    return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(layers))  # type: ignore[return-value]


def _name_of(modules: tuple[str, ...]) -> str:
    return "+".join(modules)


def fuse_adapters() -> bool:
    """Whether adapters are worth their place inside the frozen products (`lora.fused_product`)."""
    return on_one_device() and jax.default_backend() == "gpu"


class Block(nn.Module):
    """One layer. Its three methods differ only in where keys and values come from.

    Attributes:
        joined: the weights are the sampler's (`join_kernels`): one matrix for q, k and v, one for
            gate and up.
        tiled: gate and up are laid out for their kernel (`gated_product`).
    """

    config: Qwen2Config
    joined: bool = False
    tiled: bool = False

    def setup(self) -> None:
        config, dtype = self.config, self.config.compute_dtype
        self.input_layernorm = RMSNorm(config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.rms_norm_eps, dtype)
        shapes = self._shapes()
        if self.tiled:
            in_features, features = shapes.pop("gate_up")
            self.gate_up = GateTiles(in_features, features // 2, dtype)
            shapes["down_proj"] = (padded_width(features // 2), in_features)
        for module, (in_features, features) in shapes.items():
            use_bias = module in ("qkv", "q_proj", "k_proj", "v_proj")
            setattr(self, module, LoRADense(in_features, features, use_bias, dtype))

    def _shapes(self) -> dict[str, tuple[int, int]]:
        shapes = dict(self.config.module_shapes)
        if self.joined:
            for name, parts in JOINED.items():
                in_features = shapes[parts[0]][0]
                shapes[name] = (in_features, sum(shapes.pop(part)[1] for part in parts))
        return shapes

    def _project(self, x: jax.Array, *modules: str) -> list[jax.Array]:
        """Outputs of projections that share the input."""
        if self.joined and len(modules) > 1:
            widths = np.cumsum([self.config.module_shapes[module][1] for module in modules])
            return jnp.split(self._project_joined(x, *modules), widths[:-1], axis=-1)
        dense = [getattr(self, module) for module in modules]
        for module in dense:
            module.watch(x)
        weights = [module.weights() for module in dense]
        return project(x, weights, fused=fuse_adapters(), joined=self._matrix_of(modules))

    def _project_joined(self, x: jax.Array, *modules: str) -> jax.Array:
        """The same side by side."""
        if self.joined:
            modules = tuple(name for name, parts in JOINED.items() if parts == modules)
        weights = [getattr(self, module).weights() for module in modules]
        return project_joined(x, weights, self._matrix_of(modules))

    def _matrix_of(self, modules: tuple[str, ...]) -> Joined | None:
        """`join_adapters`' matrix, if it was made."""
        return self.get_variable("joined", _name_of(modules))

    def _qkv(self, x: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        h = checkpoint_name(self.input_layernorm(x), "normed")
        heads = (*x.shape[:-1], -1, self.config.head_dim)
        q, k, v = (y.reshape(heads) for y in self._project(h, "q_proj", "k_proj", "v_proj"))
        q, k = apply_rotary(q, rope), apply_rotary(k, rope)
        return checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")

    def _finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        (update,) = self._project(attended.reshape(*x.shape[:-1], -1), "o_proj")
        x = checkpoint_name(x + update, "residual")
        h = checkpoint_name(self.post_attention_layernorm(x), "normed")
        gated = checkpoint_name(self._gated(h), "gated")
        if x.ndim == 2 and self.joined and use_kernel(x.dtype):
            return x + split_product(gated, self.down_proj.weights().kernel)
        (update,) = self._project(gated, "down_proj")
        return x + update

    def _gated(self, h: jax.Array) -> jax.Array:
        """silu(gate) * up."""
        if self.tiled:
            return self.gate_up(h)
        if self.joined or fuse_adapters():
            both = self._project_joined(h, "gate_proj", "up_proj")
            return swiglu(checkpoint_name(both, "gate_up"))
        gate, up = self._project(h, "gate_proj", "up_proj")
        return nn.silu(checkpoint_name(gate, "gate_up")) * checkpoint_name(up, "gate_up")

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        mask: Bool[Array, "B T"] | None,
        packing: Packing | None,
    ) -> tuple[Float[Array, "B T D"], None]:
        """Whole rows, or with a packing bins of tokens; the shape that nn.scan wants."""
        if packing is None:
            x, _ = self.with_cache(x, rope, mask)
            return x, None
        q, k, v = (rows_from_bins(y, packing) for y in self._qkv(x, rope))
        q = constrain(q, "act_batch", "act_length", "act_heads", "head_dim")
        attended = causal_attention(q, k, v, None, row_lengths(packing))
        attended = bins_from_rows(attended, packing)
        x = self._finish(x, checkpoint_name(attended, "attended"))
        return constrain(x, "act_batch", "act_length", "act_embed"), None

    def with_cache(
        self, x: Float[Array, "B T D"], rope: Rope, mask: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Whole rows, and their keys and values for decoding."""
        q, k, v = self._qkv(x, rope)
        q = constrain(q, "act_batch", "act_length", "act_heads", "head_dim")
        attended = checkpoint_name(causal_attention(q, k, v, mask), "attended")
        x = self._finish(x, attended)
        x = constrain(x, "act_batch", "act_length", "act_embed")
        return x, {"k": k.transpose(0, 2, 1, 3), "v": v.transpose(0, 2, 1, 3)}

    def decode(
        self,
        x: Float[Array, "B D"],
        rope: Rope,
        prompt: LayerCache,
        prompt_mask: Bool[Array, "P S"],
        prompt_of: Int[Array, " B"] | None,
        completion: LayerCache,
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "B D"], LayerCache]:
        """One token per row: a kernel on one GPU, plain XLA everywhere else."""
        if not use_kernel(x.dtype):
            if prompt_of is not None:
                prompt = jax.tree.map(lambda cache: cache[prompt_of], prompt)
                prompt_mask = prompt_mask[prompt_of]
            q, k, v = self._qkv(x, rope)
            completion = write_slot(completion, k, v, slot)
            attended = plain_attention(q, prompt, prompt_mask, completion, slot)
        else:
            qkv = self._project_joined(self.input_layernorm(x), "q_proj", "k_proj", "v_proj")
            heads = qkv.reshape(len(x), -1, self.config.head_dim)
            start = prompt_mask.shape[1] - jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)
            if prompt_of is None:
                prompt_of = jnp.arange(len(x)) // (len(x) // len(start))
            attended, completion = decode_attention(
                heads, rope, prompt, start, prompt_of, completion, slot
            )
        return constrain(self._finish(x, attended), "act_batch", "act_embed"), completion


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


class Qwen2(nn.Module):
    """Embedding, scanned layers, final norm. Returns hidden states; the head is `api.logits`."""

    config: Qwen2Config
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None,
        packing: Packing | None = None,
    ) -> Float[Array, "B T D"]:
        config = self.config
        dtype = config.compute_dtype
        table = self.param(
            "embed_tokens",
            nn.initializers.normal(0.02),
            (config.vocab_size, config.hidden_size),
            dtype,
        )
        if not config.tie_word_embeddings:
            shape = (config.vocab_size, config.hidden_size)
            self.param("lm_head", nn.initializers.normal(0.02), shape, dtype)
        x = constrain(jnp.take(table, tokens, axis=0), "act_batch", "act_length", "act_embed")
        rope = rotary_tables(config, positions)
        if unroll_layers(self.remat) and not self.is_mutable_collection("moments"):
            x = self._written_out(x, rope, mask, packing)
            return RMSNorm(config.rms_norm_eps, dtype, name="norm")(x)
        layers = nn.scan(
            rematerialised(Block, self.remat),
            variable_axes={"params": 0, "lora": 0, "plan": 0, "joined": 0, "moments": 0},
            variable_broadcast="rows",
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # type: ignore[arg-type]
            length=config.num_layers,
        )(config, name="layers")
        x, _ = layers(x, rope, mask, packing)
        return RMSNorm(config.rms_norm_eps, dtype, name="norm")(x)

    def _written_out(
        self, x: jax.Array, rope: Rope, mask: jax.Array | None, packing: Packing | None
    ) -> jax.Array:
        """The layers one after another (`unroll_layers`), from the same variables."""
        block = Block(self.config, parent=None)

        def run(layer: Tree, x: jax.Array) -> jax.Array:
            return block.apply(layer, x, rope, mask, packing)[0]  # type: ignore[index]

        if self.remat != "none":
            run = jax.checkpoint(run, policy=_policy(self.remat))
        stacked = {
            kind: leaves["layers"]
            for kind, leaves in self.variables.items()
            if "layers" in leaves and kind != "joined"
        }
        joined = self.variables.get("joined")
        for i in range(self.config.num_layers):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
            if joined is not None:
                layer["joined"] = joined["layers"][i]
            x = run(layer, x)
        return x


def rematerialised(block: type[Block], remat: str) -> type[Block]:
    """`block` under the named policy: keep everything, what PRODUCTS names, or nothing."""
    if remat == "none":
        return block
    # Inside a loop the compiler cannot merge the recomputation away.
    return nn.remat(block, policy=_policy(remat), prevent_cse=False)


def _policy(remat: str) -> Any:
    return _keep_products if remat == "products" else None


_keep_named = jax.checkpoint_policies.save_only_these_names(*PRODUCTS)


def _keep_products(primitive: Any, *args: Any, **params: Any) -> Any:
    """What PRODUCTS names and, where cuDNN attends, what its own backward pass wants: output and
    log-sum-exp. They have no names, and without them the forward pass would run twice."""
    if primitive.name.startswith("dot_product_attention_fwd"):
        return True
    return _keep_named(primitive, *args, **params)


def unroll_layers(remat: str) -> bool:
    """Whether training writes its layers out one after another.

    A loop stacks what it keeps for the backward pass, which on GPU costs two more copies of every
    kept value. With nothing kept the loop is as fast and compiles in a fraction of the time.
    """
    return remat in ("none", "products") and on_one_device() and jax.default_backend() == "gpu"


def kept_bytes_per_token(config: Qwen2Config) -> int:
    """What `products` keeps of one token, all layers together (adapters' inner values aside)."""
    shapes = config.module_shapes
    features = sum(shapes[m][1] for m in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    features += shapes["o_proj"][0] + shapes["down_proj"][0] + 3 * config.hidden_size
    return config.num_layers * features * config.compute_dtype.itemsize


def choose_remat(config: Qwen2Config, remat: str, tokens: int, attended: int = 0) -> str:
    """`auto` resolved for a micro-batch of `tokens` tokens, of which attention makes `attended`
    rows and padding: `products` if that fits, otherwise `full`. Devices that do not tell their
    memory get `full`."""
    if remat != "auto":
        return remat
    stats = jax.local_devices()[0].memory_stats() or {}
    parts = batch_parts()
    return remat_that_fits(config, tokens // parts, stats.get("bytes_limit", 0), attended // parts)


def remat_that_fits(config: Qwen2Config, tokens: int, memory: int, attended: int = 0) -> str:
    """What `auto` is for so many tokens on one device of `memory` bytes; 0: not known.

    `products` may take half of the memory, and on one GPU, where it was measured, all that is left
    beside weights (frozen, joined with the adapters, and the sampler's), a chunk of the head and a
    reserve.
    """
    size = config.compute_dtype.itemsize
    kept = tokens * kept_bytes_per_token(config)
    kept += attended * config.num_layers * config.module_shapes["o_proj"][0] * size
    room = 0.5 * memory
    if fuse_adapters():
        beside = 3 * config.num_parameters * size + HEAD_BYTES * config.vocab_size
        room = max(room, 0.9 * memory - beside)
    return "products" if kept < room else "full"
