"""The factorial design: where ranks are x where learning speed is, in blocks, with planned looks.

A block is one seed (data order, initial A, sampling keys) and one learning rate, taken in turn from
a cycle; its four cells run in an order drawn at random. No jax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jaxgrpo.config import ConfigError, ScaleRule

CELLS: dict[str, str] = {
    "uniform": "U: rank r and scale s everywhere",
    "ranks_only": "N: proportional ranks r_i, scales s r / r_i: every layer's first-order speed is "
    "that of U",
    "speeds_only": "D: rank r everywhere, scales s r_i / r: the speeds of P, and no rank moves",
    "proportional": "P: proportional ranks r_i, scale s",
}
CELL_RULES: dict[str, ScaleRule | None] = {
    "uniform": None,
    "ranks_only": "alpha_over_r",
    "speeds_only": "constant",
    "proportional": "constant",
}
EFFECTS: dict[str, dict[str, float]] = {
    "proportional - uniform": {"proportional": 1.0, "uniform": -1.0},
    "rank effect": {
        "ranks_only": 0.5,
        "proportional": 0.5,
        "uniform": -0.5,
        "speeds_only": -0.5,
    },
    "speed effect": {
        "speeds_only": 0.5,
        "proportional": 0.5,
        "uniform": -0.5,
        "ranks_only": -0.5,
    },
}
"""Contrast -> cell -> weight; the first is the primary one, the others are the second family."""


@dataclass(frozen=True)
class DesignConfig:
    """What `study.design` holds; without it a study compares `study.arms`."""

    looks: tuple[int, ...] = (3, 5, 8)
    """After how many blocks results are analysed; there is no other look."""
    learning_rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Factors on optim.learning_rate, which blocks take in turn."""
    order_seed: int = 0
    """Of the random order of cells in a block."""
    effects_margin: float = 0.015
    """study.margin for the rank and the speed effect."""

    def __post_init__(self) -> None:
        ascending = list(self.looks) == sorted(set(self.looks))
        if not self.looks or not ascending or self.looks[0] < 2:
            raise ConfigError(
                "study.design.looks must be growing numbers of blocks, the first at least 2, got "
                f"{list(self.looks)}"
            )
        if not self.learning_rates or not all(
            math.isfinite(rate) and rate > 0 for rate in self.learning_rates
        ):
            raise ConfigError("study.design.learning_rates must be positive factors")
        if not 0 < self.effects_margin < 1:
            raise ConfigError("study.design.effects_margin must lie in (0, 1)")

    @property
    def blocks(self) -> int:
        return self.looks[-1]

    def rate(self, block: int) -> float:
        """The factor of block 1, 2, ..."""
        return self.learning_rates[(block - 1) % len(self.learning_rates)]

    def order(self, block: int) -> list[str]:
        """The cells of a block in the order in which they run."""
        shuffled = np.random.default_rng([self.order_seed, block]).permutation(len(CELLS))
        return [list(CELLS)[place] for place in shuffled]
