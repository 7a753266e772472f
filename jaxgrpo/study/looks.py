"""Bounds for looking at a study more than once: O'Brien-Fleming spending (Lan and DeMets 1983,
Biometrika 70), by the recursion of Armitage, McPherson and Rowe (1969, JRSS A 132). No jax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

_POINTS = 2001
_FAR = 8.0
"""Standard deviations beyond which there is no density to speak of."""


def nominal_levels(looks: Sequence[int], sides: int, alpha: float = 0.05) -> list[float]:
    """The p at or below which each look rejects, so that all of them together err with `alpha`.

    By look k the share 2 (1 - Phi(z_(1 - alpha/2) / sqrt(t_k))) of errors is spent, t_k being the
    part of the information that is in; p has as many `sides`.
    """
    times = np.asarray(looks, float) / looks[-1]
    spent = 2 * ndtr(-ndtri(1 - alpha / 2) / np.sqrt(times))
    levels: list[float] = []
    grid, density = np.zeros(1), np.ones(1)  # of the score process, before the first look at 0
    weights, before, used = np.ones(1), 0.0, 0.0
    for time, total in zip(times, spent, strict=True):
        step = np.sqrt(time - before)

        def crossing(bound: float, grid=grid, mass=density * weights, step=step) -> float:
            above = float(mass @ ndtr((grid - bound) / step))
            return above + (float(mass @ ndtr((-bound - grid) / step)) if sides == 2 else 0.0)

        target = float(total - used)
        root: Any = brentq(lambda b, c=crossing, t=target: c(b) - t, 0.0, _FAR)
        bound = float(root)
        levels.append(float(sides * ndtr(-bound / np.sqrt(time))))
        lowest = -bound if sides == 2 else -_FAR
        new = np.linspace(lowest, bound, _POINTS)
        gaps = (new[:, None] - grid) / step
        density = np.exp(-(gaps**2) / 2) @ (density * weights) / (step * np.sqrt(2 * np.pi))
        grid, before, used = new, time, float(total)
        weights = np.full(_POINTS, new[1] - new[0])
        weights[[0, -1]] /= 2
    return levels
