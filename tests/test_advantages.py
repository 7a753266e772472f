"""Group advantages: their invariants, and what NaN rewards do. Parity: parity/test_trl.py."""

from __future__ import annotations

import numpy as np
import pytest

from jaxgrpo.grpo.advantages import STD_EPS, compute_advantages, reward_metrics


def test_two_groups_by_hand():
    rewards = np.array([0.0, 1.0, 3.0, 3.0])
    std = np.sqrt(0.5)
    expected = np.array([-0.5, 0.5, 0.0, 0.0]) / (std + STD_EPS)
    np.testing.assert_allclose(compute_advantages(rewards, 2), expected, rtol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_sum_to_zero_in_each_group(scale):
    rewards = np.random.default_rng(0).normal(size=24)
    advantages = compute_advantages(rewards, 6, scale)
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages.reshape(4, 6).sum(axis=1), 0.0, atol=1e-5)


def test_group_scale_ignores_shift_and_factor_of_a_group():
    rewards = np.random.default_rng(1).normal(size=8)
    moved = rewards * np.repeat([1.0, 50.0], 4) + np.repeat([3.0, -7.0], 4)
    np.testing.assert_allclose(
        compute_advantages(moved, 4), compute_advantages(rewards, 4), rtol=1e-3
    )


def test_scale_none_only_centres():
    rewards = np.array([1.0, 0.0, 5.0, 1.0])
    np.testing.assert_array_equal(compute_advantages(rewards, 2, "none"), [0.5, -0.5, 2.0, -2.0])


def test_batch_scale_divides_every_group_by_one_deviation():
    rewards = np.array([1.0, 0.0, 5.0, 1.0])
    ratio = compute_advantages(rewards, 2, "none") / compute_advantages(rewards, 2, "batch")
    np.testing.assert_allclose(ratio, rewards.std(ddof=1) + STD_EPS, rtol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_unjudged_completion_gets_zero_and_does_not_move_the_others(scale):
    rewards = np.array([0.0, 1.0, np.nan, 1.0, 0.0, 1.0])
    advantages = compute_advantages(rewards, 3, scale)
    assert advantages[2] == 0.0
    judged = compute_advantages(np.array([0.0, 1.0]), 2, "none")
    np.testing.assert_allclose(advantages[:2] / abs(advantages[0]), judged / 0.5, rtol=1e-6)


@pytest.mark.parametrize("rewards", [[np.nan] * 4, [2.0, np.nan, np.nan, np.nan], [1.0] * 4])
def test_groups_without_a_comparison_get_zero(rewards):
    for scale in ("group", "batch", "none"):
        np.testing.assert_array_equal(compute_advantages(np.array(rewards), 4, scale), 0.0)


def test_reward_metrics_by_hand():
    rewards = np.array([0.0, 1.0, 1.0, 1.0])
    metrics = reward_metrics(rewards, 2, by_function={"format": np.array([1.0, np.nan, 0.0, 0.5])})
    assert metrics["reward"] == 0.75
    assert metrics["reward_std"] == pytest.approx(0.5)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["rewards/format/mean"] == 0.5
    assert metrics["rewards/format/std"] == pytest.approx(0.5)
