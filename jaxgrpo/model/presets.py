"""A model's shapes, and those of the published Qwen2.5 and Qwen3 sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp

from jaxgrpo.devices import ONE_CPU, Device


@dataclass(frozen=True)
class QwenConfig:
    """Shapes and constants of a Qwen2 or dense Qwen3 model, named as in its config.json.

    The two differ in their values alone: Qwen2's projections of queries, keys and values have a
    bias, and its heads share the hidden size; Qwen3 has no bias, normalises every query and key,
    and has heads of a size of their own.

    Attributes:
        head_dim: of queries, keys and values; num_heads of them need not make up hidden_size.
        qkv_bias: whether the projections of queries, keys and values have one.
        qk_norm: whether each head's queries and keys are normalised before they are rotated.
        dtype: what weights are stored and multiplied in: "float32" or "bfloat16".
        device: what its programs are compiled for.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = True
    qk_norm: bool = False
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    dtype: str = "float32"
    device: Device = ONE_CPU

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def of_shard(self) -> QwenConfig:
        """For a program that each device runs on its own part of the batch."""
        return replace(self, device=self.device.of_shard)

    @property
    def of_rows(self) -> QwenConfig:
        """For a gradient that each device computes of its own rows."""
        return replace(self, device=self.device.of_rows)

    def of_arms(self, arms: int) -> QwenConfig:
        """For the part of a program that trains one of so many arms."""
        return replace(self, device=self.device.of_arms(arms))

    @property
    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """module -> (in_features, out_features)."""
        embed, mlp = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (embed, q),
            "k_proj": (embed, kv),
            "v_proj": (embed, kv),
            "o_proj": (q, embed),
            "gate_proj": (embed, mlp),
            "up_proj": (embed, mlp),
            "down_proj": (mlp, embed),
        }

    @property
    def num_parameters(self) -> int:
        """Parameters of the frozen model."""
        per_layer = sum(i * o for i, o in self.module_shapes.values()) + 2 * self.hidden_size
        if self.qkv_bias:
            per_layer += (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        if self.qk_norm:
            per_layer += 2 * self.head_dim
        tables = 1 if self.tie_word_embeddings else 2
        embeddings = tables * self.vocab_size * self.hidden_size
        return self.num_layers * per_layer + embeddings + self.hidden_size


def _qwen3(*shape: int, tie_word_embeddings: bool = True) -> QwenConfig:
    return QwenConfig(
        151936,
        *shape,
        num_kv_heads=8,
        head_dim=128,
        qkv_bias=False,
        qk_norm=True,
        tie_word_embeddings=tie_word_embeddings,
    )


PRESETS = {
    "qwen2.5-0.5b": QwenConfig(151936, 896, 4864, 24, 14, 2, 64),
    "qwen2.5-1.5b": QwenConfig(151936, 1536, 8960, 28, 12, 2, 128),
    "qwen2.5-3b": QwenConfig(151936, 2048, 11008, 36, 16, 2, 128),
    "qwen2.5-7b": QwenConfig(152064, 3584, 18944, 28, 28, 4, 128, tie_word_embeddings=False),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, tie_word_embeddings=False),
}
"""The published shapes, for benchmarks and ahead-of-time checks that need no weights."""
