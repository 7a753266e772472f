"""The model, its adapters and the devices they are on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxgrpo.config.errors import check_choice, require

EMBEDDED = "embedded"
"""The `model.path` and `data.path` value that means: what ships with the package."""

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven projections of a layer, by their Hugging Face names."""

MAX_RANK = 2**16
"""No projection of a known model is wide enough for a larger rank."""

ScaleRule = Literal["constant", "rslora", "alpha_over_r"]


@dataclass(frozen=True)
class ModelConfig:
    """Which model, of a family that `model/hf_config.py` knows, and how it computes."""

    path: str = EMBEDDED
    """`embedded`, a local Hugging Face directory, or a hub id (Qwen/Qwen2.5-1.5B-Instruct,
    Qwen/Qwen3-0.6B)."""
    revision: str | None = None
    """Branch, tag or commit, for a hub id only."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute and storage type of the frozen weights; norms, softmax and log-probs are float32.
    auto: float32 on CPU, bfloat16 on GPU and TPU."""
    remat: Literal["auto", "none", "products", "full"] = "auto"
    """What the backward pass recomputes: nothing, all but matrix products and attention, or every
    layer. auto: `products` where a micro-batch fits so, otherwise `full` (and on CPU)."""


@dataclass(frozen=True)
class LoraConfig:
    """The adapters: which projections, which rank in which layer, which scale."""

    rank: int = 16
    """Rank of every adapter when `plan` is not given; the reference rank of `constant` scaling."""
    plan: str | None = None
    """A rank plan (JSON, see `rank_plan.py`): rank per layer, or per module and layer."""
    adapter: str | None = None
    """A directory with a PEFT LoRA adapter to start from: its ranks are the plan, and its update of
    the weights is kept whatever `alpha` and `scale_rule` say from there on."""
    max_rank: int | None = None
    """Width of the stacked arrays; default: the largest rank of the plan."""
    rank_budget: int | None = None
    """If given, the plan's ranks summed over all adapters must not exceed it."""
    alpha: float = 32.0
    scale_rule: ScaleRule = "constant"
    """constant: alpha/rank everywhere; rslora: alpha/sqrt(r_i); alpha_over_r: alpha/r_i (PEFT)."""
    target_modules: tuple[str, ...] = MODULES

    def __post_init__(self) -> None:
        require(1 <= self.rank <= MAX_RANK, f"lora.rank must lie in 1..{MAX_RANK}, got {self.rank}")
        require(
            math.isfinite(self.alpha) and self.alpha > 0,
            f"lora.alpha must be a positive number, got {self.alpha}",
        )
        require(
            self.plan is None or self.adapter is None,
            "lora.plan and lora.adapter both say what the ranks are; give one of them",
        )
        require(len(self.target_modules) > 0, "lora.target_modules is empty")
        for module in self.target_modules:
            check_choice(module, MODULES, "lora.target_modules")
        require(
            len(set(self.target_modules)) == len(self.target_modules),
            "lora.target_modules names a projection twice",
        )
        require(
            self.max_rank is None or 1 <= self.max_rank <= MAX_RANK,
            f"lora.max_rank must lie in 1..{MAX_RANK}, got {self.max_rank}",
        )
        require(
            self.rank_budget is None or self.rank_budget >= 1,
            f"lora.rank_budget must be at least 1, got {self.rank_budget}",
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1 for "the rest"."""

    data: int = -1
    fsdp: int = 1
    model: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.model)
        require(
            all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh sizes must be positive, at most one of them -1, got {sizes}",
        )
