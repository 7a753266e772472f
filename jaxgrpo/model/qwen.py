"""Qwen2 and Qwen3 in Flax Linen, their layers scanned: what training runs.

Follows transformers' (RMSNorm, rotary embedding, grouped-query attention with QKV bias or with
normalised queries and keys, SwiGLU). Norms, rotary tables, softmax and logits are float32; the rest
in the config's dtype.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxgrpo.mesh import check_device, constrain
from jaxgrpo.model.attention import Rope, apply_rotary, causal_attention, rotary_tables
from jaxgrpo.model.bins import bins_from_rows, row_lengths, rows_from_bins
from jaxgrpo.model.lora import (
    Joined,
    LoRADense,
    join_layers,
    project,
    project_joined,
)
from jaxgrpo.model.presets import QwenConfig
from jaxgrpo.model.remat import checkpoint_policy, unroll_layers
from jaxgrpo.model.rms_norm import rms_norm
from jaxgrpo.types import Adapters, Packing, Tree, unstack_layers


@jax.custom_vjp
def swiglu(both: Float[Array, "... FF"]) -> Float[Array, "... F"]:
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
        return rms_norm(x, scale, self.epsilon)


def join_adapters(config: QwenConfig, base: Tree, adapters: Adapters, remat: str) -> Adapters:
    """The adapters with each layer's matrices for `fused_product`: made once a step, where every
    micro-batch would write them anew in either direction. Stacked, or a tuple of one tree per layer
    where `remat` writes layers out; none where adapters are not fused."""
    if not config.device.single_gpu:
        return adapters
    groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",))
    stacked = {
        _name_of(modules): join_layers(base["layers"], adapters, modules)
        for modules in groups
        if any(module in adapters.lora for module in modules)
    }
    unroll = unroll_layers(config, remat)
    joined = unstack_layers(stacked, config.num_layers) if unroll else stacked
    return dataclasses.replace(adapters, joined=joined)


def _name_of(modules: tuple[str, ...]) -> str:
    return "+".join(modules)


class Block(nn.Module):
    """One layer as training runs it; `sampler.py` has the sampler's."""

    config: QwenConfig

    def setup(self) -> None:
        config, dtype = self.config, self.config.compute_dtype
        self.input_layernorm = RMSNorm(config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.rms_norm_eps, dtype)
        for module, (in_features, features) in config.module_shapes.items():
            use_bias = config.qkv_bias and module in ("q_proj", "k_proj", "v_proj")
            setattr(self, module, LoRADense(in_features, features, use_bias, dtype))
        if config.qk_norm:
            self.q_norm = RMSNorm(config.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(config.rms_norm_eps, dtype)

    def _project(self, x: jax.Array, *modules: str) -> list[jax.Array]:
        """Outputs of projections that share the input."""
        dense = [getattr(self, module) for module in modules]
        for module in dense:
            module.watch(x)
        weights = [module.weights() for module in dense]
        fused = self.config.device.single_gpu
        return project(x, weights, fused=fused, joined=self._matrix_of(modules))

    def _matrix_of(self, modules: tuple[str, ...]) -> Joined | None:
        """`join_adapters`' matrix, if it was made."""
        return self.get_variable("joined", _name_of(modules))

    def _qkv(self, x: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        h = checkpoint_name(self.input_layernorm(x), "normed")
        heads = (*x.shape[:-1], -1, self.config.head_dim)
        q, k, v = (y.reshape(heads) for y in self._project(h, "q_proj", "k_proj", "v_proj"))
        v = checkpoint_name(v, "v")
        if self.config.qk_norm:
            # A norm's gradient wants what went in: kept after it, the product would run again.
            q, k = checkpoint_name(q, "q"), checkpoint_name(k, "k")
            return apply_rotary(self.q_norm(q), rope), apply_rotary(self.k_norm(k), rope), v
        q, k = apply_rotary(q, rope), apply_rotary(k, rope)
        return checkpoint_name(q, "q"), checkpoint_name(k, "k"), v

    def _finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        (update,) = self._project(attended.reshape(*x.shape[:-1], -1), "o_proj")
        x = checkpoint_name(x + update, "residual")
        h = checkpoint_name(self.post_attention_layernorm(x), "normed")
        (update,) = self._project(checkpoint_name(self._gated(h), "gated"), "down_proj")
        return x + update

    def _gated(self, h: jax.Array) -> jax.Array:
        """silu(gate) * up."""
        modules = ("gate_proj", "up_proj")
        if self.config.device.single_gpu:
            weights = [getattr(self, module).weights() for module in modules]
            both = project_joined(h, weights, self._matrix_of(modules))
            return swiglu(checkpoint_name(both, "gate_up"))
        gate, up = self._project(h, *modules)
        return nn.silu(checkpoint_name(gate, "gate_up")) * checkpoint_name(up, "gate_up")

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        mask: Bool[Array, "B T"] | None,
        packing: Packing | None,
    ) -> tuple[Float[Array, "B T D"], None]:
        """Whole rows, or with a packing bins of tokens; the shape that nn.scan wants."""
        q, k, v = self._qkv(x, rope)
        if packing is not None:
            q, k, v = (rows_from_bins(y, packing) for y in (q, k, v))
        q = constrain(q, "act_batch", "act_length", "act_heads", "head_dim")
        if packing is None:
            attended = causal_attention(q, k, v, mask, None, self.config.device)
        else:
            attended = causal_attention(q, k, v, None, row_lengths(packing), self.config.device)
            attended = bins_from_rows(attended, packing)
        x = self._finish(x, checkpoint_name(attended, "attended"))
        return constrain(x, "act_batch", "act_length", "act_embed"), None


class Qwen(nn.Module):
    """Embedding, scanned layers, final norm. Returns hidden states; the head is `api.logits`."""

    config: QwenConfig
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
        check_device(config.device)
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
        if unroll_layers(config, self.remat) and not self.is_mutable_collection("moments"):
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

        def run(layer: Tree, x: jax.Array, *rows: Any) -> jax.Array:
            return block.apply(layer, x, *rows)[0]  # type: ignore[index]

        if self.remat != "none":
            run = jax.checkpoint(run, policy=checkpoint_policy(self.remat))
        # Under a jit of their own, so that all layers are traced, differentiated and lowered once.
        run = jax.jit(run)
        stacked = {
            kind: leaves["layers"]
            for kind, leaves in self.variables.items()
            if "layers" in leaves and kind != "joined"
        }
        joined = self.variables.get("joined")
        for i, layer in enumerate(unstack_layers(stacked, self.config.num_layers)):
            own = {} if joined is None else {"joined": joined["layers"][i]}
            x = run(layer | own, x, rope, mask, packing)
        return x


def rematerialised(block: type[Block], remat: str) -> type[Block]:
    """`block` under the named policy: keep everything, what `remat.PRODUCTS` names, or nothing."""
    if remat == "none":
        return block
    # Inside a loop the compiler cannot merge the recomputation away.
    return nn.remat(block, policy=checkpoint_policy(remat), prevent_cse=False)
