"""config.json and generation_config.json of a Hugging Face directory.

Every field that changes what a model of a known family computes is honoured as transformers does or
refused by name; where two fields say the same thing differently, neither is chosen. Fields that
transformers' classes of that family do not read either have no say here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxgrpo.config import ConfigError
from jaxgrpo.model.presets import QwenConfig

DEFAULT_ROPE_THETA = 10_000.0
"""transformers' own, for files that name no base."""

ABSENT = object()


class Family(NamedTuple):
    """What a model_type stands for.

    Attributes:
        published: the models that say it.
        architecture: transformers' class.
        head_dim: of a config.json that names none; None: hidden_size over the query heads.
    """

    published: str
    architecture: str
    qkv_bias: bool
    qk_norm: bool
    head_dim: int | None


FAMILIES = {
    "qwen2": Family("Qwen2 and Qwen2.5", "Qwen2ForCausalLM", True, False, None),
    "qwen3": Family("dense Qwen3", "Qwen3ForCausalLM", False, True, 128),
}
"""model_type -> the family."""


def qwen_config(raw: Mapping[str, Any], dtype: str, where: str) -> QwenConfig:
    """Reads a Hugging Face config.json.

    Raises:
        ConfigError: another architecture, a missing key, a feature this model does not have, or two
            keys that contradict each other.
    """
    kind = raw.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        known = " or ".join(f"{name!r} ({one.published})" for name, one in FAMILIES.items())
        raise ConfigError(f"{where}: model_type is {kind!r:.40}; it may be {known}")

    def whole(key: str, most: int, value: Any = ABSENT) -> int:
        value = raw.get(key, None) if value is ABSENT else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            known = "is missing" if value is None else f"is {value!r:.40}"
            raise ConfigError(f"{where}: the key '{key}' {known}; a whole number up to {most:,}")
        return value

    heads = whole("num_attention_heads", 1024)
    # An absent key is transformers' default, an empty one means as many as there are queries.
    kv_heads = raw.get("num_key_value_heads", 32)
    hidden = whole("hidden_size", 2**20)
    config = QwenConfig(
        vocab_size=whole("vocab_size", 2**24),
        hidden_size=hidden,
        intermediate_size=whole("intermediate_size", 2**22),
        num_layers=whole("num_hidden_layers", 1024),
        num_heads=heads,
        num_kv_heads=whole("num_key_value_heads", 1024, heads if kv_heads is None else kv_heads),
        head_dim=whole("head_dim", 2**16, _head_dim(raw, family, hidden, heads, where)),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_theta=_rope_theta(raw, where),
        rms_norm_eps=_positive("rms_norm_eps", raw.get("rms_norm_eps", 1e-6), where),
        tie_word_embeddings=_truth("tie_word_embeddings", raw, where),
        dtype=dtype,
    )
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"{where}: {config.num_heads} query heads must be a multiple of {config.num_kv_heads} "
            "kv heads"
        )
    if config.head_dim % 2:
        raise ConfigError(f"{where}: heads of {config.head_dim} dimensions cannot be rotated")
    _check_features(raw, config, family, where)
    return config


def config_fields(config: QwenConfig) -> dict[str, Any]:
    """The config.json that `qwen_config` reads as this model, and transformers as well."""
    kind = next(
        name
        for name, family in FAMILIES.items()
        if (family.qkv_bias, family.qk_norm) == (config.qkv_bias, config.qk_norm)
    )
    return {
        "model_type": kind,
        "architectures": [FAMILIES[kind].architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _head_dim(
    raw: Mapping[str, Any], family: Family, hidden_size: int, heads: int, where: str
) -> Any:
    """What `head_dim` says or, where it says nothing, what the family's heads have."""
    found = raw.get("head_dim", family.head_dim)
    if found is not None or family.head_dim is not None:
        return found
    if hidden_size % heads:
        raise ConfigError(f"{where}: {heads} query heads must divide hidden_size {hidden_size}")
    return hidden_size // heads


def _check_features(raw: Mapping[str, Any], config: QwenConfig, family: Family, where: str) -> None:
    """Raises ConfigError on the first field that asks for what this model does not compute."""
    plain: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"),
        "attention_dropout": (0,),
        "use_sliding_window": (False,),
        "partial_rotary_factor": (None, 1),
        "is_causal": (True,),
        "per_layer_config": (None, {}),
        "quantization_config": (None,),
        "compression_config": (None,),
        "architectures": (None, [family.architecture]),
    }
    if not family.qkv_bias:  # transformers' Qwen2 does not read it
        plain["attention_bias"] = (False,)
    for key, taken in plain.items():
        value = raw.get(key, taken[0])
        # In Python True == 1, in a config.json it is not.
        if not any(isinstance(value, bool) == isinstance(t, bool) and value == t for t in taken):
            only = " or ".join(repr(one) for one in taken if one is not None) or "none"
            raise ConfigError(f"{where}: {key} {value!r:.60} is not supported, only {only:.60}")
    kinds = raw.get("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != config.num_layers:
        raise ConfigError(f"{where}: layer_types does not name {config.num_layers} layers")
    for kind in kinds:
        if kind != "full_attention":
            raise ConfigError(f"{where}: layer_types: {kind!r:.60} is not supported")


def _rope_theta(raw: Mapping[str, Any], where: str) -> float:
    """The base of the rotary embedding: in rope_parameters, which transformers 5 writes, in
    rope_scaling, its older name, or on top, as the oldest files have it."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key)
        if rope is not None and not isinstance(rope, dict):
            raise ConfigError(f"{where}: {key} must be a mapping, not {rope!r:.40}")
        if rope:
            found.append((key, rope))
    thetas: dict[float, str] = {}
    for key, rope in found:
        for name, value in rope.items():
            if name in ("type", "rope_type"):
                if value != "default":
                    raise ConfigError(
                        f"{where}: rope scaling {value!r:.40} ({key}.{name}) is not supported"
                    )
            elif name == "rope_theta":
                thetas[_positive(f"{key}.rope_theta", value, where)] = f"{key}.rope_theta"
            elif value is not None and not (name == "partial_rotary_factor" and value == 1):
                raise ConfigError(
                    f"{where}: {key}.{name} {value!r:.60} is not supported; only one rotary "
                    "embedding for all layers, without scaling"
                )
    if len(found) > 1 and found[0][1] != found[1][1]:
        raise ConfigError(f"{where}: rope_parameters and rope_scaling contradict each other")
    if "rope_theta" in raw:
        thetas[_positive("rope_theta", raw["rope_theta"], where)] = "rope_theta"
    if len(thetas) > 1:
        said = " and ".join(f"{name} {theta:g}" for theta, name in thetas.items())
        raise ConfigError(f"{where}: {said} contradict each other")
    return next(iter(thetas), DEFAULT_ROPE_THETA)


def _positive(key: str, value: Any, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < 1e12:
        raise ConfigError(f"{where}: the key '{key}' is {value!r:.40}, no positive number")
    return float(value)


def _truth(key: str, raw: Mapping[str, Any], where: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: the key '{key}' is {value!r:.40}, neither true nor false")
    return value


def eos_token_ids(raw: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """`eos_token_id` of a config.json or generation_config.json: one id, several, or none.

    Raises:
        ConfigError: anything else.
    """
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for one in ids:
        if not isinstance(one, int) or isinstance(one, bool):
            raise ConfigError(
                f"{where}: eos_token_id is {value!r:.60}; a token id or a list of token ids"
            )
    return tuple(ids)


NEUTRAL = {
    **dict.fromkeys(("num_beams", "guidance_scale", "encoder_repetition_penalty"), 1),
    **dict.fromkeys(("bad_words_ids", "begin_suppress_tokens", "exponential_decay_length_penalty")),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "force_words_ids", "forced_bos_token_id")),
    **dict.fromkeys(("forced_eos_token_id", "min_length", "min_new_tokens", "penalty_alpha")),
    **dict.fromkeys(("no_repeat_ngram_size", "sequence_bias", "stop_strings", "suppress_tokens")),
    **dict.fromkeys(("token_healing", "watermarking_config")),
}
"""What generation_config.json can ask for and no setting of a run replaces -> what asks nothing."""


def check_generation_config(raw: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError on what a run would have to do while sampling and does not.

    Temperature, the cuts, repetition_penalty and lengths are a chat's defaults there: as in TRL, a
    run's own settings stand in their place.
    """
    for key, neutral in NEUTRAL.items():
        value = raw.get(key)
        if value and value != neutral:
            hint = "give rollout.stop_strings" if key == "stop_strings" else "take it out"
            raise ConfigError(f"{where}: {key} {value!r:.60} is not supported; {hint}")
