"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors. numpy only.

Written so that PEFT and servers which ignore rank_pattern and alpha_pattern (vLLM) see the same
weights: r is the largest rank, every module's scale equals lora_alpha / r (where it had another
scale, the quotient is folded into B), and both patterns are written with exact, escaped names. A
module of rank 0 is left out, because PEFT has no such thing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from jaxgrpo.config import MAX_RANK, ConfigError
from jaxgrpo.model.safe_files import (
    contained,
    open_safetensors,
    read_json_object,
    read_tensor,
    refuse_pickles,
)
from jaxgrpo.records.run_directory import atomic_write_bytes, atomic_write_text

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# What another kind of adapter sets, and why a plain LoRA cannot stand for it.
_UNSUPPORTED = {
    "use_dora": "DoRA has a magnitude vector per module",
    "modules_to_save": "whole modules are saved beside the LoRA",
    "lora_bias": "its B has a bias",
    "fan_in_fan_out": "its weights are transposed",
    "use_qalora": "QALoRA pools the inputs",
    "use_bdlora": "BD-LoRA is block diagonal",
    "layer_replication": "it changes the model's layers",
    "trainable_token_indices": "it trains embeddings",
    "target_parameters": "it adapts bare parameters",
    "alora_invocation_tokens": "aLoRA is active in a part of the sequence only",
    "arrow_config": "Arrow mixes several adapters",
    "kasa_config": "KaSA has a singular-value vector",
    "velora_config": "VeLoRA changes the backward pass",
    "monteclora_config": "MonteCLoRA samples its weights",
    "megatron_config": "its layers are Megatron's",
}
# These initialisations change the base weights too, so that A and B are not the whole update.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraModule:
    """One adapted projection: y += scale * B A x, with A [r, in] and B [out, r], float32."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self) -> np.ndarray:
        """The change of the weight, float32 [out, in]."""
        return np.float32(self.scale) * (self.b @ self.a)


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter of any model.

    Attributes:
        base_model: what adapter_config.json names as its base.
        modules: the module's name in the model ("model.layers.0.self_attn.q_proj") -> its LoRA.
    """

    base_model: str
    modules: Mapping[str, LoraModule]

    @property
    def parameters(self) -> int:
        return sum(module.a.size + module.b.size for module in self.modules.values())

    @property
    def max_rank(self) -> int:
        return max((module.rank for module in self.modules.values()), default=0)


def write_peft(directory: Path, adapter: PeftAdapter, *, uniform_rank: bool = False) -> None:
    """Writes the adapter.

    Args:
        uniform_rank: pad every module, those of rank 0 too, with zeros to the largest rank, for
            servers that know one rank only; no patterns are written then.

    Raises:
        OSError: naming the file that could not be written.
        ConfigError: every rank is 0.
    """
    rank = adapter.max_rank
    if rank == 0:
        raise ConfigError("the adapter has no module of rank 1 or more: there is nothing to export")
    directory.mkdir(parents=True, exist_ok=True)
    # As float32, so that an adapter read and written again keeps its scale to the bit.
    scale = float(np.float32(max(abs(m.scale) for m in adapter.modules.values() if m.rank)))
    scale = scale or 1.0
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for name in sorted(adapter.modules, key=_natural_order):
        module = adapter.modules[name]
        if module.rank == 0 and not uniform_rank:
            continue
        a, b = module.a, module.b * np.float32(module.scale / scale)
        if uniform_rank:
            pad = rank - module.rank
            a, b = np.pad(a, ((0, pad), (0, 0))), np.pad(b, ((0, 0), (0, pad)))
        ranks[name] = a.shape[0]
        for side, array in (("A", a), ("B", b)):
            key = f"{_PREFIX}{name}.lora_{side}.weight"
            tensors[key] = np.ascontiguousarray(array, np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": rank,
        "lora_alpha": scale * rank,
        # Exact names: a suffix would also reach the layers whose rank is 0.
        "target_modules": list(ranks),
        "rank_pattern": {} if uniform_rank else {re.escape(n): r for n, r in ranks.items()},
        "alpha_pattern": {}
        if uniform_rank
        else {re.escape(n): scale * r for n, r in ranks.items()},
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    atomic_write_bytes(directory / WEIGHTS_FILE, save(tensors, {"format": "pt"}))
    atomic_write_text(directory / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def _natural_order(name: str) -> list[str]:
    """Layer 2 before layer 10."""
    return [part.zfill(6) if part.isdecimal() else part for part in name.split(".")]


def read_peft(directory: Path) -> PeftAdapter:
    """Reads a LoRA adapter that PEFT, or anything that writes its format, has saved.

    Raises:
        ConfigError: no adapter, a damaged one, or one that is more than a plain LoRA, with the
            reason.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory; an adapter is one with {CONFIG_FILE}")
    config = read_json_object(contained(directory, CONFIG_FILE))
    _check_plain_lora(config, directory)
    path = contained(directory, WEIGHTS_FILE)
    if not path.is_file():
        raise ConfigError(f"{directory} holds no {WEIGHTS_FILE}{refuse_pickles(directory)}")
    reader = open_safetensors(path)
    sides: dict[str, dict[str, np.ndarray]] = {}
    for key in reader.keys():  # noqa: SIM118  (a safetensors reader is no mapping)
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ConfigError(f"{path}: {key!r:.120} is not the A or B of a LoRA of a linear layer")
        sides.setdefault(match[1], {})[match[2]] = _matrix(reader, key, path)
    if not sides:
        raise ConfigError(f"{path} holds no adapter")
    rank_of = _Pattern(config.get("rank_pattern"), config.get("r"), "rank_pattern", directory)
    alpha_of = _Pattern(
        config.get("alpha_pattern"), config.get("lora_alpha"), "alpha_pattern", directory
    )
    modules = {}
    for name, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise ConfigError(f"{path}: {name!r:.120} has one of lora_A and lora_B only")
        rank, alpha = rank_of(name), alpha_of(name)
        a, b = pair["A"], pair["B"]
        if a.shape[0] != rank or b.shape[1] != rank:
            raise ConfigError(
                f"{path}: {name!r:.120} has A and B of shapes {a.shape} and {b.shape}, but its "
                f"rank is {rank:g} by {CONFIG_FILE}"
            )
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        modules[name] = LoraModule(a, b, scale)
    return PeftAdapter(str(config.get("base_model_name_or_path") or ""), modules)


def _check_plain_lora(config: Mapping[str, Any], directory: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{directory}: peft_type is {kind!r:.40}; only LORA adapters are read")
    if config.get("bias", "none") != "none":
        raise ConfigError(f"{directory}: bias={config['bias']!r:.40}: biases are trained too")
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise ConfigError(f"{directory}: {key} is set, not a plain LoRA: {reason}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ConfigError(
            f"{directory}: init_lora_weights={start!r:.40} changed the base weights too; convert "
            "it with PEFT's path_initial_model_for_weight_conversion"
        )


def _matrix(reader: Any, key: str, path: Path) -> np.ndarray:
    tensor = read_tensor(reader, key, path)
    if tensor.ndim != 2 or 0 in tensor.shape or min(tensor.shape) > MAX_RANK:
        raise ConfigError(f"{path}: {key!r:.120} has shape {tensor.shape}, not that of a matrix")
    if tensor.dtype.kind not in "f" and tensor.dtype.name != "bfloat16":
        raise ConfigError(f"{path}: {key!r:.120} holds {tensor.dtype}, not floating-point numbers")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is refused
        tensor = tensor.astype(np.float32)
    if not np.isfinite(tensor).all():
        raise ConfigError(f"{path}: {key!r:.120} has entries that are not finite")
    return tensor


class _Pattern:
    """PEFT's rule for rank_pattern and alpha_pattern: name -> value of the first key whose regular
    expression ends the name, or the default."""

    def __init__(self, raw: Any, default: Any, what: str, directory: Path) -> None:
        self._where = f"{directory}: {what}"
        if raw is not None and not isinstance(raw, dict):
            raise ConfigError(f"{self._where} must be a mapping")
        self._default = default
        self._rules = [(self._compile(key), value) for key, value in (raw or {}).items()]

    def _compile(self, key: str) -> re.Pattern[str]:
        # A key from a downloaded file could otherwise take for ever to match.
        plain = re.sub(r"\\.", "", key)
        if len(key) > 512 or len(re.findall(r"[*+?{]", plain)) > 2 or re.search(r"\)[*+{]", plain):
            raise ConfigError(f"{self._where}: the key {key!r:.80} is too complex an expression")
        try:
            return re.compile(rf"(?:.*\.)?(?:{key})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{self._where}: {key!r:.80} is no expression: {error}") from None

    def __call__(self, name: str) -> int | float:
        value = next((v for rule, v in self._rules if rule.match(name)), self._default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= 1e9:
            raise ConfigError(f"{self._where} gives {name!r:.120} the value {value!r:.40}")
        return value
