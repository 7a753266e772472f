"""One allocation as arrays: importances of all modules together, and the ranks to choose from.
numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from jaxgrpo.config import MODULES, ConfigError, suggestion
from jaxgrpo.study.budget import Budget, Slots, apportion

Combine = Literal["root_sum_square", "sum"]


@dataclass(frozen=True)
class Problem:
    """One allocation: importances stacked in the model's module order, and what may be chosen.

    Attributes:
        values: [M, L], or [M, L, R] for explained variance ratios.
        slots: what gets a rank: the L layers, or the M * L adapters, module by module.
        sizes: parameters of one rank of each slot, whatever the budget counts.
    """

    modules: tuple[str, ...]
    values: np.ndarray
    slots: Slots
    sizes: np.ndarray
    budget: Budget

    def by_layer(self, combine: Combine) -> np.ndarray:
        """Importance of a layer, [L], from its modules'."""
        if combine not in get_args(Combine):
            raise ConfigError(
                f"unknown combine '{combine}'; {suggestion(str(combine), get_args(Combine))}"
            )
        largest = self.values.max() or 1.0
        values = self.values / largest
        # hypot, because a square underflows where its root would not.
        return values.sum(0) if combine == "sum" else np.hypot.reduce(values, axis=0)

    def by_slot(self, combine: Combine) -> np.ndarray:
        """Importance of each slot, [n], over the power of two above the largest: that
        division rounds nothing, so different importances stay different."""
        by_layer = self.by_layer(combine)
        values = by_layer if self.budget.granularity == "layer" else self.values.ravel()
        if not values.max() > 0:
            raise ConfigError("allocation: every importance is 0, there is nothing to rank by")
        return np.ldexp(values, -np.frexp(values.max())[1])

    def by_module(self, ranks: np.ndarray) -> dict[str, np.ndarray]:
        """Ranks of the slots as module -> int array [L]."""
        table = np.broadcast_to(ranks.reshape(-1, self.values.shape[1]), self.values.shape[:2])
        return {module: table[i].astype(np.int64) for i, module in enumerate(self.modules)}

    def solve(
        self, ratios: np.ndarray, order: np.ndarray, slots: Slots | None = None
    ) -> np.ndarray:
        return apportion(ratios, order, slots or self.slots, self.budget.total, self.budget.unit)


def make_problem(
    importance: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, int]],
    budget: Budget,
    dimensions: int,
) -> Problem:
    """Stacks the importances and finds what may be chosen.

    Raises:
        ConfigError: importances of the wrong shape, of no known module, negative or not finite.
    """
    if not importance:
        raise ConfigError("allocation: no module has an importance")
    for module in importance:
        if module not in MODULES:
            raise ConfigError(
                f"allocation: unknown module '{module}'; {suggestion(module, MODULES)}"
            )
        if module not in shapes:
            raise ConfigError(f"allocation: module '{module}' has no shape (in, out)")
    modules = tuple(module for module in MODULES if module in importance)
    arrays = [np.asarray(importance[module], np.float64) for module in modules]
    wanted = "[layers, components]" if dimensions == 2 else "[layers]"
    for module, array in zip(modules, arrays, strict=True):
        if array.ndim != dimensions or array.size == 0:
            raise ConfigError(
                f"allocation: the importance of {module} has shape {array.shape}, not {wanted}"
            )
        if array.shape != arrays[0].shape:
            raise ConfigError(
                f"allocation: the importance of {module} has shape {array.shape}, that of "
                f"{modules[0]} {arrays[0].shape}"
            )
        if not (np.isfinite(array) & (array >= 0)).all():
            raise ConfigError(
                f"allocation: the importance of {module} must be finite and not negative"
            )
    values = np.stack(arrays)
    slots, sizes = _slots([shapes[module] for module in modules], values.shape[1], budget)
    return Problem(modules, values, slots, sizes, budget)


def _slots(shapes: list[tuple[int, int]], layers: int, budget: Budget) -> tuple[Slots, np.ndarray]:
    """What gets a rank, and the parameters of one rank of each."""
    sizes = np.array([sum(shape) for shape in shapes], np.int64)
    costs = sizes if budget.unit == "parameters" else np.ones_like(sizes)
    high = np.array([min(s) for s in shapes], np.int64)
    if budget.max_rank is not None:
        high = np.minimum(high, budget.max_rank)
    if budget.granularity == "layer":
        costs, sizes = costs.sum(keepdims=True), sizes.sum(keepdims=True)
        high = high.min(keepdims=True)
    costs, sizes, high = (np.repeat(x, layers) for x in (costs, sizes, high))
    name = "layers" if budget.granularity == "layer" else "adapters"
    return Slots(costs, np.full(len(costs), budget.min_rank), high, name), sizes
