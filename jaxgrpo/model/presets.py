"""Qwen2 shapes: read from a config.json, or one of the published Qwen2.5 sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxgrpo.config import ConfigError


@dataclass(frozen=True)
class Qwen2Config:
    """Shapes and constants of a Qwen2 model, named as in its config.json.

    `dtype` is what weights are stored and multiplied in: "float32" or "bfloat16".
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


def qwen2_config(raw: Mapping[str, Any], dtype: str, where: str) -> Qwen2Config:
    """Reads a Hugging Face config.json.

    Raises:
        ConfigError: another architecture, a missing key, or a feature this model does not have.
    """
    if raw.get("model_type") != "qwen2":
        raise ConfigError(
            f"{where}: model_type is {raw.get('model_type')!r}; only 'qwen2' (Qwen2 and Qwen2.5) "
            "is supported"
        )
    rope, old_rope = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    if not isinstance(rope, dict) or not isinstance(old_rope, dict):
        raise ConfigError(f"{where}: rope_parameters and rope_scaling must be mappings")
    scaling = old_rope.get("type") or rope.get("rope_type", "default")
    if scaling != "default":
        raise ConfigError(f"{where}: rope scaling {scaling!r:.40} is not supported")
    if raw.get("use_sliding_window"):
        raise ConfigError(f"{where}: use_sliding_window is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"{where}: hidden_act {raw['hidden_act']!r:.40} is not supported, only silu"
        )

    def whole(key: str, most: int, default: Any = None) -> int:
        value = raw.get(key) or default
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            known = "is missing" if value is None else f"is {value!r:.40}"
            raise ConfigError(f"{where}: the key '{key}' {known}; a whole number up to {most:,}")
        return value

    def positive(key: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < 1e12:
            raise ConfigError(f"{where}: the key '{key}' is {value!r:.40}, no positive number")
        return float(value)

    heads = whole("num_attention_heads", 1024)
    config = Qwen2Config(
        vocab_size=whole("vocab_size", 2**24),
        hidden_size=whole("hidden_size", 2**20),
        intermediate_size=whole("intermediate_size", 2**22),
        num_layers=whole("num_hidden_layers", 1024),
        num_heads=heads,
        num_kv_heads=whole("num_key_value_heads", 1024, heads),
        # transformers 5 moved the base into rope_parameters; older files have it on top.
        rope_theta=positive("rope_theta", rope.get("rope_theta") or raw.get("rope_theta") or 1e4),
        rms_norm_eps=positive("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        dtype=dtype,
    )
    if config.hidden_size % config.num_heads or config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"{where}: {config.num_heads} query heads must divide hidden_size "
            f"{config.hidden_size} and be a multiple of {config.num_kv_heads} kv heads"
        )
    return config
