"""Group advantages: their invariants, and what NaN rewards do. Parity: parity/test_trl.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxgrpo.config import ConfigError, GrpoConfig
from jaxgrpo.grpo.advantages import (
    STD_EPS,
    compared_rewards,
    compute_advantages,
    reward_metrics,
)


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


APART = GrpoConfig(
    multi_objective_aggregation="normalize_then_sum", group_size=2, prompts_per_step=2
)


def test_normalize_then_sum_by_hand():
    by_function = {"a": np.array([0.0, 1.0, 5.0, 5.0]), "b": np.array([0.0, 0.01, 0.02, 0.0])}
    total = 2 * by_function["a"] + by_function["b"]
    compared, group = compared_rewards(APART, total, by_function, [2.0, 1.0])
    a = 0.5 / (np.sqrt(0.5) + STD_EPS)
    b, c = 0.005 / (0.01 * np.sqrt(0.5) + STD_EPS), 0.01 / (0.02 * np.sqrt(0.5) + STD_EPS)
    expected = np.array([-2 * a - b, 2 * a + b, c, -c])
    np.testing.assert_allclose(compared, expected, rtol=1e-12)
    np.testing.assert_allclose(
        compute_advantages(compared, group),
        expected / (expected.std(ddof=1) + STD_EPS),
        rtol=1e-6,  # float32
    )
    metrics = reward_metrics(total, group, "group", by_function, compared)
    assert metrics["reward"] == pytest.approx(total.mean())
    assert metrics["reward_std"] == pytest.approx(total.std(ddof=1))
    assert metrics["frac_reward_zero_std"] == 0.0


def test_normalize_then_sum_ignores_the_units_of_each_reward():
    rng = np.random.default_rng(2)
    small = rng.normal(size=(3, 16))
    config = dataclasses.replace(APART, group_size=8)

    def advantages(factor):
        values = dict(zip("abc", small * np.array([[1.0], [factor], [1.0]]), strict=True))
        compared, group = compared_rewards(config, small.sum(axis=0), values, [1.0, 0.5, 2.0])
        return compute_advantages(compared, group)

    # STD_EPS is not scaled with the rewards: at a deviation of 1 it is one in 10,000.
    np.testing.assert_allclose(advantages(100.0), advantages(1.0), atol=1e-3)


def test_one_reward_summed_or_normalised_first_points_the_same_way():
    rewards = np.random.default_rng(3).normal(size=16)
    config = dataclasses.replace(APART, group_size=8)
    compared, group = compared_rewards(config, 2 * rewards, {"a": rewards}, [2.0])
    apart, summed = compute_advantages(compared, group), compute_advantages(2 * rewards, 8)
    assert np.corrcoef(apart, summed)[0, 1] == pytest.approx(1.0, abs=1e-6)


def test_equal_rewards_give_exactly_zero_whatever_rounding_does():
    tenths = np.array([0.1] * 3 + [0.1, 0.2, 0.3] + [0.7] * 3)
    assert np.mean([0.1] * 3) != 0.1  # so that something is tested
    equal = np.array([True] * 3 + [False] * 3 + [True] * 3)
    for scale in ("group", "none"):
        np.testing.assert_array_equal(compute_advantages(tenths, 3, scale)[equal], 0.0)
    config = dataclasses.replace(APART, group_size=3)
    compared, group = compared_rewards(config, tenths, {"a": tenths, "b": tenths**2}, [1.0, 0.3])
    np.testing.assert_array_equal(compute_advantages(compared, group)[equal], 0.0)


def test_normalize_then_sum_refuses_a_scale_without_effect():
    with pytest.raises(ConfigError, match=r"grpo\.scale_rewards=none has no effect"):
        dataclasses.replace(APART, scale_rewards="none")


def test_reward_metrics_by_hand():
    rewards = np.array([0.0, 1.0, 1.0, 1.0])
    metrics = reward_metrics(rewards, 2, by_function={"format": np.array([1.0, np.nan, 0.0, 0.5])})
    assert metrics["reward"] == 0.75
    assert metrics["reward_std"] == pytest.approx(0.5)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["rewards/format/mean"] == 0.5
    assert metrics["rewards/format/std"] == pytest.approx(0.5)
