"""Qwen2 shapes, and those of the published Qwen2.5 sizes."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from jaxgrpo.mesh import ONE_CPU, Device


@dataclass(frozen=True)
class Qwen2Config:
    """Shapes and constants of a Qwen2 model, named as in its config.json.

    Attributes:
        dtype: what weights are stored and multiplied in: "float32" or "bfloat16".
        device: what its programs are compiled for.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    dtype: str = "float32"
    device: Device = ONE_CPU

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

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
        heads = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        per_layer = sum(i * o for i, o in self.module_shapes.values())
        per_layer += heads + 2 * self.hidden_size
        tables = 1 if self.tie_word_embeddings else 2
        embeddings = tables * self.vocab_size * self.hidden_size
        return self.num_layers * per_layer + embeddings + self.hidden_size


PRESETS = {
    "qwen2.5-0.5b": Qwen2Config(151936, 896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": Qwen2Config(151936, 1536, 8960, 28, 12, 2),
    "qwen2.5-3b": Qwen2Config(151936, 2048, 11008, 36, 16, 2),
    "qwen2.5-7b": Qwen2Config(152064, 3584, 18944, 28, 28, 4, tie_word_embeddings=False),
}
"""The published Qwen2.5 shapes, for benchmarks and ahead-of-time checks that need no weights."""
