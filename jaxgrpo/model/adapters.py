"""Between the stacked, masked adapters of this package and PEFT's per-module ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxgrpo.config import MODULES, ConfigError
from jaxgrpo.model.peft_files import LoraModule, PeftAdapter, write_peft
from jaxgrpo.model.presets import QwenConfig
from jaxgrpo.model.weights import hf_module
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.types import Tree

_MODULE_NAME = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,3})\.(?:self_attn|mlp)\.([a-z]+_proj)")


def save_adapter(directory: Path, lora: Tree, plan: RankPlan, base_model: str) -> None:
    """Writes the adapter in PEFT's format; `base_model` is what adapter_config.json names.

    Raises:
        OSError: naming the file that could not be written.
    """
    write_peft(directory, adapter_from_lora(lora, plan, base_model))


def adapter_from_lora(lora: Tree, plan: RankPlan, base_model: str) -> PeftAdapter:
    """The ranks in use of every module and layer, those of rank 0 included as empty matrices."""
    lora = jax.tree.map(np.asarray, lora)
    scales = plan.scales()
    modules = {}
    for module in plan.modules:
        for layer in range(plan.layers):
            r = int(plan.ranks[module][layer])
            modules[f"model.layers.{layer}.{hf_module(module)}"] = LoraModule(
                a=np.asarray(lora[module]["a"][layer][:, :r].T, np.float32),
                b=np.asarray(lora[module]["b"][layer][:r].T, np.float32),
                scale=float(scales[module][layer]),
            )
    return PeftAdapter(base_model, modules)


@dataclass(frozen=True)
class StackedAdapter:
    """An adapter of a model, stacked over its layers.

    Attributes:
        ranks: module -> int [L]; modules without any adapter are absent.
        scales: module -> float64 [L]; 0 where the rank is 0.
        a, b: module -> float32 [L, in, R] and [L, R, out], zero off the ranks.
    """

    ranks: Mapping[str, np.ndarray]
    scales: Mapping[str, np.ndarray]
    a: Mapping[str, np.ndarray]
    b: Mapping[str, np.ndarray]

    def sha256(self) -> str:
        """A hash of its weights, wherever they were read from."""
        digest = hashlib.sha256()
        for part in (self.ranks, self.scales, self.a, self.b):
            for module, values in part.items():
                digest.update(f"{module} {values.dtype} {values.shape} ".encode())
                digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def start(self, lora: Tree, plan: RankPlan) -> Tree:
        """`lora` with this adapter in its first columns.

        The scales of `plan` hold from here on; where the adapter had another, the quotient goes
        into B, so that the update of the weights is the same.
        """
        new = plan.scales()
        started = {}
        for module, leaves in lora.items():
            width = self.a[module].shape[2]
            new_scale = new[module].astype(np.float64)
            ratio = np.divide(
                self.scales[module],
                new_scale,
                out=np.zeros_like(new_scale),
                where=new_scale != 0,
            )
            a, b = np.array(leaves["a"]), np.zeros(leaves["b"].shape, np.float32)
            used = np.arange(width) < self.ranks[module][:, None]
            a[:, :, :width] = np.where(used[:, None, :], self.a[module], a[:, :, :width])
            b[:, :width] = self.b[module] * ratio[:, None, None].astype(np.float32)
            started[module] = {"a": a, "b": b}
        return started


def stack_adapter(adapter: PeftAdapter, config: QwenConfig, where: str) -> StackedAdapter:
    """The adapter as this model's arrays.

    Raises:
        ConfigError: a module that is not one of this model's seven projections, a layer that it
            does not have, or a shape that is not its.
    """
    found: dict[str, dict[int, LoraModule]] = {}
    for name, lora in adapter.modules.items():
        match = _MODULE_NAME.fullmatch(name)
        if match is None or match[2] not in MODULES or not name.endswith(hf_module(match[2])):
            raise ConfigError(
                f"{where}: the module {name!r:.120} is none of a layer's {', '.join(MODULES)}"
            )
        layer, module = int(match[1]), match[2]
        if layer >= config.num_layers:
            raise ConfigError(
                f"{where}: adapts layer {layer}, the model has {config.num_layers} layers"
            )
        shape = (lora.a.shape[1], lora.b.shape[0])
        if shape != config.module_shapes[module]:
            raise ConfigError(
                f"{where}: {name} maps {shape[0]} to {shape[1]} features, the model's maps "
                f"{config.module_shapes[module][0]} to {config.module_shapes[module][1]}"
            )
        found.setdefault(module, {})[layer] = lora
    width, layers = adapter.max_rank, config.num_layers
    ranks, scales, a, b = {}, {}, {}, {}
    for module in (m for m in MODULES if m in found):
        ins, outs = config.module_shapes[module]
        ranks[module], scales[module] = np.zeros(layers, np.int64), np.zeros(layers)
        a[module] = np.zeros((layers, ins, width), np.float32)
        b[module] = np.zeros((layers, width, outs), np.float32)
        for layer, lora in found[module].items():
            ranks[module][layer], scales[module][layer] = lora.rank, lora.scale
            a[module][layer, :, : lora.rank] = lora.a.T
            b[module][layer, : lora.rank] = lora.b.T
    return StackedAdapter(ranks, scales, a, b)
