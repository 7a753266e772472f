"""Compression of a trained adapter by one global cut of its singular values (PARA, 2604.27796).

Train at a generous rank, then keep the largest singular values of all updates together: data-free,
no training after. Computed in float64 from QR factors, the full update is never formed. numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxgrpo.config import ConfigError, check_choice
from jaxgrpo.study.budget import largest_within

CRITERIA = ("energy", "rank_budget", "parameters", "parameter_budget", "per_adapter")
"""What says how much `compress` keeps."""


@dataclass(frozen=True)
class Compressed:
    """A truncated adapter, stacked as wide as the one it came from.

    Attributes:
        ranks: module -> int [L]; 0 where nothing was kept.
        a: module -> float64 [L, in, R]; columns from `ranks` on are zero.
        b: module -> float64 [L, R, out]; rows from `ranks` on are zero.
        energy: squared singular values kept, as a share of all.
        threshold: the smallest singular value kept, scale included.
    """

    ranks: dict[str, np.ndarray]
    a: dict[str, np.ndarray]
    b: dict[str, np.ndarray]
    energy: float
    threshold: float


@dataclass(frozen=True)
class _Factors:
    """One adapter's A B = left diag(values) right, without its scale."""

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray


def compress(
    a: Mapping[str, np.ndarray],
    b: Mapping[str, np.ndarray],
    ranks: Mapping[str, np.ndarray],
    scales: Mapping[str, np.ndarray],
    **amount: float,
) -> Compressed:
    """Keeps the largest singular values of all updates scale * A B, and refactors what is left.

    Of the result, scale * a @ b with the *old* scale is the truncated update. Under scale rules
    that read the rank a new plan has other scales: see `fold_scales`.

    Args:
        a, b: module -> [L, in, R] and [L, R, out].
        ranks: module -> [L] ranks in use, or [L, R] masks.
        scales: module -> [L].
        amount: exactly one of CRITERIA.
            energy: keep the fewest values whose squares reach this share of all, in (0, 1].
            rank_budget: keep this many values. Ties go to the first module of `a`, then layer.
            parameters: keep as many of the largest values as fit into this share, in (0, 1], of
                the parameters that the ranks in use have.
            parameter_budget: keep the largest values that have exactly so many parameters, or the
                most below that whole ranks can have (`largest_within`).
            per_adapter: keep this many of every adapter's own largest: no global cut, the control.

    Raises:
        ConfigError: not one criterion, one out of range, modules or shapes that do not agree, or
            updates that are not finite or all zero.
    """
    _check(a, b, ranks, scales, amount)
    factors, strengths, costs = [], [], []
    for module in a:
        masks = _masks(ranks[module], a[module].shape[2])
        for layer, scale in enumerate(np.asarray(scales[module], np.float64)):
            used = masks[layer]
            adapter = _factor(a[module][layer][:, used], b[module][layer][used])
            factors.append(adapter)
            # A negative scale turns the update around; how much of it there is stays the same.
            strengths.append(np.abs(scale) * adapter.values)
            costs.append(np.full(len(adapter.values), a[module].shape[1] + b[module].shape[2]))
    pooled = np.concatenate(strengths)
    if not (pooled > 0).any():
        raise ConfigError("compress: every update is zero, there is nothing to keep")
    places = np.concatenate([np.arange(len(s)) for s in strengths])
    ((criterion, value),) = amount.items()
    kept = _cut(pooled, np.concatenate(costs), places, criterion, value)
    owners = np.repeat(np.arange(len(strengths)), [len(s) for s in strengths])
    counts = np.bincount(owners[kept], minlength=len(strengths))
    new_ranks, new_a, new_b, start = {}, {}, {}, 0
    for module in a:
        layers = len(a[module])
        new_ranks[module] = counts[start : start + layers].astype(np.int64)
        new_a[module] = np.zeros(a[module].shape)
        new_b[module] = np.zeros(b[module].shape)
        for layer in range(layers):
            adapter, rank = factors[start + layer], counts[start + layer]
            root = np.sqrt(adapter.values[:rank])
            new_a[module][layer][:, :rank] = adapter.left[:, :rank] * root
            new_b[module][layer][:rank] = root[:, None] * adapter.right[:rank]
        start += layers
    squares = pooled / pooled.max()
    squares = squares * squares
    share = float(squares[kept].sum() / squares.sum())
    return Compressed(new_ranks, new_a, new_b, share, float(pooled[kept].min()))


def fold_scales(
    b: Mapping[str, np.ndarray],
    old: Mapping[str, np.ndarray],
    new: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """B times old / new scale per layer, so that new * A B' is old * A B; 0 where `new` is 0."""
    folded = {}
    for module, array in b.items():
        before, after = (np.asarray(scales[module], np.float64) for scales in (old, new))
        ratio = np.divide(before, after, out=np.zeros_like(before), where=after != 0)
        folded[module] = array * ratio[:, None, None]
    return folded


def _factor(a: np.ndarray, b: np.ndarray) -> _Factors:
    """The SVD of a [in, r] @ b [r, out] by QR of both and an SVD of the r x r core."""
    left, left_core = np.linalg.qr(a.astype(np.float64))
    right, right_core = np.linalg.qr(b.astype(np.float64).T)
    u, values, v = np.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return _Factors(left @ u, values, v @ right.T)


def _cut(
    pooled: np.ndarray,
    costs: np.ndarray,
    places: np.ndarray,
    criterion: str,
    value: float,
) -> np.ndarray:
    """Indices of the values kept. Values fall within an adapter, so it keeps its first ones."""
    if criterion == "per_adapter":
        return np.flatnonzero(places < value)
    order = np.argsort(-pooled, kind="stable")
    if criterion == "parameters":
        # One threshold for all, as ever: the first value that does not fit ends it.
        fitting = np.searchsorted(np.cumsum(costs[order]), value * costs.sum(), side="right")
        if fitting == 0:
            raise ConfigError(
                f"compress: not one rank fits into {value:g} of the {costs.sum():,} parameters"
            )
        return order[:fitting]
    if criterion == "parameter_budget":
        if not costs.min() <= value <= costs.sum():
            raise ConfigError(
                f"compress: parameter_budget {value:,} is not in {costs.min():,}.."
                f"{costs.sum():,}: one rank, and all there are"
            )
        return np.flatnonzero(largest_within(pooled, costs, int(value)))
    if criterion == "rank_budget":
        if not 1 <= value <= len(pooled):
            raise ConfigError(
                f"compress: rank_budget {value} is not in 1..{len(pooled)}, the singular "
                "values there are"
            )
        return order[: int(value)]
    # Relative to the largest, so that squares of small updates do not underflow.
    squares = (pooled[order] / pooled.max()) ** 2
    sums = np.cumsum(squares)
    return order[: int(np.searchsorted(sums, value * sums[-1])) + 1]


def _masks(ranks: np.ndarray, width: int) -> np.ndarray:
    """bool [L, R] from ranks [L] or masks [L, R]."""
    ranks = np.asarray(ranks)
    return ranks.astype(bool) if ranks.ndim == 2 else np.arange(width) < ranks[:, None]


def _check(
    a: Mapping[str, np.ndarray],
    b: Mapping[str, np.ndarray],
    ranks: Mapping[str, np.ndarray],
    scales: Mapping[str, np.ndarray],
    amount: Mapping[str, float],
) -> None:
    if len(amount) != 1:
        raise ConfigError(f"compress: give one of {', '.join(CRITERIA[:-1])} and {CRITERIA[-1]}")
    ((name, value),) = amount.items()
    check_choice(name, CRITERIA, "the criterion of compress")
    if name in ("energy", "parameters") and not 0 < value <= 1:
        raise ConfigError(f"compress: {name} must lie in (0, 1], got {value}")
    if name == "per_adapter" and value < 1:
        raise ConfigError(f"compress: per_adapter must be at least 1, got {value}")
    if not a:
        raise ConfigError("compress: there is no adapter")
    for name, other in (("b", b), ("ranks", ranks), ("scales", scales)):
        if set(other) != set(a):
            raise ConfigError(
                f"compress: a has the modules {', '.join(a)}, {name} {', '.join(other) or 'none'}"
            )
    for module, array in a.items():
        layers, _, width = array.shape
        given, scale = np.asarray(ranks[module]), np.asarray(scales[module])
        alike = b[module].shape[:2] == (layers, width) and scale.shape == (layers,)
        if not alike or given.shape not in ((layers,), (layers, width)):
            raise ConfigError(
                f"compress: {module} has a of shape {array.shape} but b, scales and ranks of "
                f"{b[module].shape}, {scale.shape} and {given.shape}"
            )
        if given.ndim == 1 and ((given < 0) | (given > width)).any():
            raise ConfigError(f"compress: {module} has ranks outside 0..{width}, the width of a")
        if not all(np.isfinite(x).all() for x in (array, b[module], scale)):
            raise ConfigError(f"compress: {module} has entries that are not finite")
