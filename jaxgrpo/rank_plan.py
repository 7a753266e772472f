"""Rank plans: how many LoRA ranks each layer's projection gets, and the budget they add up to.

A plan is data, not shape: the model's adapters are stacked at `max_rank` and a plan only masks
them, so any plan that fits runs in the same compiled program. numpy only, no jax.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrpo.config import (
    MAX_RANK,
    MODULES,
    ConfigError,
    LoraConfig,
    ScaleRule,
    check_choice,
    suggestion,
)


@dataclass(frozen=True)
class RankPlan:
    """Ranks per module and layer, with the rule that turns a rank into a scale.

    Attributes:
        ranks: module name -> int array [L]; 0 switches that adapter off.
        max_rank: width R of the stacked adapters; every rank is at most this.
        alpha: LoRA alpha.
        scale_rule: constant (alpha / reference_rank), rslora (alpha / sqrt(r)) or
            alpha_over_r (alpha / r, PEFT's rule when only rank_pattern is given).
        reference_rank: the rank at which alpha is quoted under `constant`.
        scale_factors: module -> [L], what the rule's scale is multiplied by; None: by 1.
    """

    ranks: Mapping[str, np.ndarray]
    max_rank: int
    alpha: float
    scale_rule: ScaleRule
    reference_rank: int
    scale_factors: Mapping[str, np.ndarray] | None = None

    def __post_init__(self) -> None:
        if not self.ranks:
            raise ConfigError("a rank plan needs at least one module")
        lengths = {len(ranks) for ranks in self.ranks.values()}
        if len(lengths) != 1:
            raise ConfigError(f"rank plan: modules have different layer counts {sorted(lengths)}")
        if lengths == {0}:
            raise ConfigError("a rank plan needs at least one layer")
        for module, ranks in self.ranks.items():
            if module not in MODULES:
                raise ConfigError(
                    f"rank plan: unknown module '{module}'; {suggestion(module, MODULES)}"
                )
            if ranks.min() < 0:
                raise ConfigError(f"rank plan: {module} has the negative rank {ranks.min()}")
            if ranks.max() > self.max_rank:
                layer = int(ranks.argmax())
                raise ConfigError(
                    f"rank plan: {module} in layer {layer} has rank {ranks.max()}, more than "
                    f"max_rank {self.max_rank}; raise lora.max_rank to {ranks.max()}"
                )
        for module, factors in (self.scale_factors or {}).items():
            if module not in self.ranks or len(factors) != self.layers:
                raise ConfigError(
                    f"rank plan: {module} has {len(factors)} scales; a plan needs one for each of "
                    f"the {self.layers} layers of {', '.join(self.ranks)}"
                )
            if not (np.isfinite(factors) & (factors > 0)).all():
                raise ConfigError(f"rank plan: the scales of {module} must be positive numbers")
        if self.total_rank == 0:
            raise ConfigError("rank plan: every rank is 0, there is nothing to train")

    @property
    def layers(self) -> int:
        return len(next(iter(self.ranks.values())))

    @property
    def modules(self) -> tuple[str, ...]:
        """The adapted projections in the model's own order."""
        return tuple(module for module in MODULES if module in self.ranks)

    @property
    def total_rank(self) -> int:
        """Ranks summed over every adapter (layers x modules)."""
        return int(sum(ranks.sum() for ranks in self.ranks.values()))

    @property
    def num_adapters(self) -> int:
        """How many adapters there are (layers x modules), those of rank 0 included."""
        return self.layers * len(self.ranks)

    def masks(self) -> dict[str, np.ndarray]:
        """module -> float32 [L, R]: 1 for the ranks in use, 0 for the padding."""
        columns = np.arange(self.max_rank)
        return {
            module: (columns < self.ranks[module][:, None]).astype(np.float32)
            for module in self.modules
        }

    def scales(self) -> dict[str, np.ndarray]:
        """module -> float32 [L]: the factor on B·A; 0 where the rank is 0."""
        return {module: self._scale(module) for module in self.modules}

    def _scale(self, module: str) -> np.ndarray:
        ranks = self.ranks[module]
        safe = np.maximum(ranks, 1).astype(np.float64)
        if self.scale_rule == "constant":
            scale = np.full(len(ranks), self.alpha / self.reference_rank)
        elif self.scale_rule == "rslora":
            scale = self.alpha / np.sqrt(safe)
        else:
            scale = self.alpha / safe
        if self.scale_factors is not None:
            scale = scale * self.scale_factors.get(module, 1.0)
        return np.where(ranks > 0, scale, 0.0).astype(np.float32)

    def trainable_parameters(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """Parameters in use, from module -> (in_features, out_features)."""
        return int(sum(ranks.sum() * sum(shapes[module]) for module, ranks in self.ranks.items()))

    def to_json(self) -> dict:
        scales = self.scale_factors
        factors = {} if scales is None else {"scales": {m: scales[m].tolist() for m in scales}}
        return factors | {
            "ranks": {module: self.ranks[module].tolist() for module in self.modules},
            "max_rank": self.max_rank,
            "alpha": self.alpha,
            "scale_rule": self.scale_rule,
            "reference_rank": self.reference_rank,
        }

    @classmethod
    def from_json(cls, raw: Mapping) -> RankPlan:
        ranks = {module: np.asarray(values, np.int64) for module, values in raw["ranks"].items()}
        rest = {key: value for key, value in raw.items() if key not in ("ranks", "scales")}
        factors = {m: np.asarray(v, np.float64) for m, v in raw.get("scales", {}).items()}
        return cls(ranks=ranks, scale_factors=factors or None, **rest)


def make_rank_plan(
    config: LoraConfig, layers: int, ranks: Mapping[str, np.ndarray] | None = None
) -> RankPlan:
    """The plan that a configuration asks for, for a model of `layers` layers.

    Without `lora.plan`: rank `lora.rank` everywhere. With it, a JSON file whose "ranks" is either a
    list (one rank per layer, used for every target module) or a mapping module -> list. Its
    "scales", in the same form, are factors on the scale that lora.scale_rule gives; default: 1.

    Args:
        ranks: module -> [L], in place of both.

    Raises:
        ConfigError: a malformed plan, a wrong layer count, an unknown module, a rank above
            `max_rank`, or more ranks than `rank_budget`.
    """
    factors = None
    if ranks is not None:
        for module in ranks:
            check_choice(module, config.target_modules, "lora.target_modules")
    elif config.plan is None:
        ranks = {m: np.full(layers, config.rank, np.int64) for m in config.target_modules}
    else:
        ranks, factors = _read_plan(Path(config.plan), config.target_modules, layers)
    largest = max(int(r.max()) for r in ranks.values())
    plan = RankPlan(
        ranks=ranks,
        max_rank=config.max_rank or max(largest, 1),
        alpha=config.alpha,
        scale_rule=config.scale_rule,
        reference_rank=config.rank,
        scale_factors=factors,
    )
    if config.rank_budget is not None and plan.total_rank > config.rank_budget:
        raise ConfigError(
            f"the rank plan spends {plan.total_rank} ranks over {layers} layers x "
            f"{len(ranks)} modules, more than lora.rank_budget={config.rank_budget}"
        )
    return plan


def _read_plan(
    path: Path, targets: Sequence[str], layers: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """Ranks and, if the file has them, factors on the scales."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"lora.plan: {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"lora.plan: {path} is not readable JSON: {error}") from None
    found = raw if isinstance(raw, dict) else {"ranks": raw}
    ranks = _by_module(found.get("ranks"), "ranks", path, targets, layers)
    for module, values in ranks.items():
        if not all(type(v) is int for v in values):
            raise ConfigError(f"lora.plan: {path}: the ranks of {module} must be whole numbers")
        if any(abs(v) > MAX_RANK for v in values):
            raise ConfigError(f"lora.plan: {path}: {module} has a rank beyond any model's size")
    # A target module the plan leaves out has rank 0, said here once rather than assumed below.
    zeros = [0] * layers
    by_target = {m: np.asarray(ranks.get(m, zeros), np.int64) for m in targets}
    if "scales" not in found:
        return by_target, None
    scales = _by_module(found["scales"], "scales", path, targets, layers)
    for module, values in scales.items():
        if not all(type(v) in (int, float) for v in values):
            raise ConfigError(f"lora.plan: {path}: the scales of {module} must be numbers")
    return by_target, {m: np.asarray(v, np.float64) for m, v in scales.items()}


def _by_module(
    values: Any, key: str, path: Path, targets: Sequence[str], layers: int
) -> dict[str, list]:
    """One list for every target module, or a mapping module -> list, as the latter."""
    if isinstance(values, list):
        values = dict.fromkeys(targets, values)
    if not isinstance(values, dict) or not values:
        raise ConfigError(f'lora.plan: {path} needs "{key}": a list, or a mapping module -> list')
    for module, listed in values.items():
        if module not in targets:
            raise ConfigError(
                f"lora.plan: {path} {key} the module '{module}', which lora.target_modules does "
                f"not hold; {suggestion(module, list(targets))}"
            )
        if not isinstance(listed, list):
            raise ConfigError(f"lora.plan: {path}: the {key} of {module} must be a list of numbers")
        if len(listed) != layers:
            raise ConfigError(
                f"lora.plan: {path} gives {module} {len(listed)} {key}; the model has "
                f"{layers} layers"
            )
    return values
