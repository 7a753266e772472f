"""Group-relative advantages and the reward metrics that go with them.

Rewards are host data (they come from text), so this is numpy in float64; one float32 array goes to
the device. GRPO: Shao et al. 2024, arXiv:2402.03300, eq. 4 in its outcome form; GDPO, for several
rewards: arXiv:2601.05242. The constants are TRL's, so that its published settings carry over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from jaxgrpo.config import GrpoConfig

RewardScale = Literal["group", "batch", "none"]

STD_EPS = 1e-4
"""Added to the standard deviation, so that a group of equal rewards gives 0 and not 0/0."""

ROUNDING = 1e-12
"""Relative to the largest reward of a group: float64 rounds at 1e-16, rewards differ by more."""


def compared_rewards(
    config: GrpoConfig,
    rewards: Float[np.ndarray, " B"],
    by_function: Mapping[str, Float[np.ndarray, " B"]],
    weights: Sequence[float],
) -> tuple[Float[np.ndarray, " B"], int]:
    """What advantages compare under `multi_objective_aggregation`, and among how many rows.

    `sum_then_normalize` compares the weighted sum within its group. `normalize_then_sum` compares,
    within the whole batch, the weighted sum of rewards that are normalised each in its group, so
    that a reward of small spread counts as much as its weight says. A reward that is NaN or the
    only one of its function in its group adds nothing; where all of them are NaN the sum is.

    Args:
        rewards: the weighted sum, one per row.
        by_function: reward function name -> its own unweighted rewards.
        weights: in the order of `by_function`.
    """
    if config.multi_objective_aggregation == "sum_then_normalize":
        return rewards, config.group_size
    total = np.zeros(len(rewards))
    judged = np.zeros(len(rewards), bool)
    for weight, values in zip(weights, by_function.values(), strict=True):
        groups = _groups(values, config.group_size)
        normalised = _centred(groups) / (_std(groups) + STD_EPS)
        total += weight * np.nan_to_num(normalised.reshape(-1), nan=0.0)
        judged |= ~np.isnan(values)
    return np.where(judged, total, np.nan), len(rewards)


def compute_advantages(
    rewards: Float[np.ndarray, " B"], group_size: int, scale: RewardScale = "group"
) -> Float[np.ndarray, " B"]:
    """Reward minus its group's mean, over a standard deviation.

    A NaN reward means that no reward function could judge the completion: it is left out of every
    mean and deviation and gets advantage 0, and so does the only judged completion of its group.

    Args:
        rewards: row p*G+g is completion g of prompt p.
        group_size: G.
        scale: which standard deviation (ddof=1) divides: the group's, the whole batch's, or none
            (Dr. GRPO, arXiv:2503.20783).
    """
    groups = _groups(rewards, group_size)
    advantages = _centred(groups)
    if scale != "none":
        advantages = advantages / (_scale_std(groups, scale) + STD_EPS)
    return np.where(np.isnan(advantages), 0.0, advantages).reshape(-1).astype(np.float32)


def reward_metrics(
    rewards: Float[np.ndarray, " B"],
    group_size: int,
    scale: RewardScale = "group",
    by_function: Mapping[str, Float[np.ndarray, " B"]] | None = None,
    compared: Float[np.ndarray, " B"] | None = None,
) -> dict[str, float]:
    """TRL's reward metrics of one step.

    `frac_reward_zero_std` is the share of rows that are compared with equal ones only and hence
    have no gradient: by their group, or under `batch` and `normalize_then_sum` by their batch.
    `reward` and `reward_std` are over the whole batch whatever the scale.

    Args:
        rewards: the weighted sum, one per row; NaN where there is none.
        group_size: G, or what `compared_rewards` says.
        scale: as in `compute_advantages`.
        by_function: reward function name -> its own unweighted rewards.
        compared: what advantages compare where that is not `rewards`.
    """
    everything = _groups(rewards, len(rewards))
    groups = _groups(rewards if compared is None else compared, group_size)
    metrics = {
        "reward": float(_mean(everything).item()),
        "reward_std": float(_std(everything).item()),
        "frac_reward_zero_std": float(np.isclose(_scale_std(groups, scale), 0.0).mean()),
    }
    for name, values in (by_function or {}).items():
        row = np.asarray(values, np.float64).reshape(1, -1)
        metrics[f"rewards/{name}/mean"] = float(_mean(row).item())
        metrics[f"rewards/{name}/std"] = float(_std(row).item())
    return metrics


def _groups(rewards: np.ndarray, group_size: int) -> np.ndarray:
    rewards = np.asarray(rewards, np.float64)
    assert rewards.ndim == 1, rewards.shape
    assert rewards.size % group_size == 0, (rewards.size, group_size)
    return rewards.reshape(-1, group_size)


def _centred(rows: np.ndarray) -> np.ndarray:
    """Each row minus its mean. What rounding alone leaves is 0: a completion whose advantage is
    exactly 0 need not be trained on."""
    centred = rows - _mean(rows)
    largest = np.nan_to_num(np.abs(rows)).max(axis=1, keepdims=True)
    return np.where(np.abs(centred) <= ROUNDING * largest, 0.0, centred)


def _scale_std(groups: np.ndarray, scale: RewardScale) -> np.ndarray:
    """[P, 1]; `none` reports the group's, which then serves the metrics only."""
    if scale == "batch":
        return np.broadcast_to(_std(groups.reshape(1, -1)), (len(groups), 1))
    return _std(groups)


def _mean(rows: np.ndarray) -> np.ndarray:
    """Mean of each row's numbers, NaN if it has none; numpy's nanmean would warn about those."""
    count = np.sum(~np.isnan(rows), axis=1, keepdims=True)
    total = np.nansum(rows, axis=1, keepdims=True)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _std(rows: np.ndarray) -> np.ndarray:
    """Standard deviation of each row's numbers with ddof=1, NaN if it has fewer than two."""
    count = np.sum(~np.isnan(rows), axis=1, keepdims=True)
    squares = np.nansum((rows - _mean(rows)) ** 2, axis=1, keepdims=True)
    return np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), np.nan)
