"""Slopes of a gradient share over rank: exact ones, what their intervals cover, what they say."""

from __future__ import annotations

import numpy as np
import pytest

from jaxgrpo.stats import Interval
from jaxgrpo.study import slopes as slopes_
from tests.study.test_importance import PROPORTIONAL, UNIFORM

TRIALS = 500
COVERS = (0.92, 0.98)


def covered(intervals, truth):
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


def test_a_power_law_gives_its_exponent_exactly():
    log_rank = np.log([4.0, 8, 16, 32, 64])
    slope = slopes_.log_log_slope(log_rank, 0.5 * log_rank - 3.0)
    assert (slope.value, slope.low, slope.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-12)


def test_the_papers_amplification_is_nearly_a_square_root():
    """Ranks inferred from the uniform shares, clipped to the 20-40 that the paper reports."""
    log_rank = np.log(np.clip(896 * UNIFORM / 100, 20, 40))
    slope = slopes_.log_log_slope(log_rank, np.log(PROPORTIONAL / UNIFORM))
    assert slope.value == pytest.approx(0.48, abs=0.01)
    assert slope.low < 0.5 < slope.high


def test_a_slope_does_not_lose_digits_far_from_zero():
    x = 1e7 + np.array([0.1, 1.3, 2.7, 3.9])
    assert slopes_.log_log_slope(x, 0.5 * x).value == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("clustered", [False, True])
def test_the_slope_covers(clustered):
    """28 layers in three arms, with or without a noise that an arm's layers share across arms."""
    rng = np.random.default_rng(14)
    layers = np.tile(np.arange(28), 3)
    intervals, alone = [], []
    for i in range(TRIALS):
        own = rng.normal(0, 0.3, 28)[layers] if clustered else 0.0
        base = rng.choice([-1.0, 0.0, 1.0], 28)[layers] if clustered else 0.0
        x = base + rng.normal(0, 0.3, 84)
        y = 0.5 * x + own + rng.normal(0, 0.1, 84)
        intervals.append(slopes_.log_log_slope(x, y, layers, seed=i, resamples=500))
        if clustered and i < 100:
            alone.append(slopes_.log_log_slope(x, y, seed=i, resamples=500))
    low = 0.90 if clustered else COVERS[0] - 0.01  # 28 clusters: a little short of 0.95
    assert low <= covered(intervals, 0.5) <= COVERS[1]
    if clustered:
        assert covered(alone, 0.5) < 0.85


def test_a_slope_needs_ranks_that_differ():
    with pytest.raises(ValueError, match="every rank is the same"):
        slopes_.log_log_slope(np.full(5, np.log(32)), np.arange(5.0))
    with pytest.raises(ValueError, match="two clusters"):
        slopes_.log_log_slope(np.arange(3.0), np.arange(3.0), np.zeros(3))
    with pytest.raises(ValueError, match="leave out layers of rank 0"):
        slopes_.log_log_slope(np.array([0.0, -np.inf]), np.zeros(2))
    with pytest.raises(ValueError, match="one shape"):
        slopes_.log_log_slope(np.arange(3.0), np.arange(4.0))


def test_resamples_of_equal_ranks_are_left_out():
    """One layer at another rank is missing from a third of the resamples."""
    x = np.array([0.0, 0, 0, 1])
    slope = slopes_.log_log_slope(x, 0.5 * x)
    assert (slope.low, slope.high) == pytest.approx((0.5, 0.5))


# ---- which explanation survives


def around(value, half=0.06):
    return Interval(value, value - half, value + half)


def rules(constant, rslora, alpha_over_r):
    values = {"constant": constant, "rslora": rslora, "alpha_over_r": alpha_over_r}
    return {rule: around(value) for rule, value in values.items()}


@pytest.mark.parametrize(
    ("slopes", "rank_free", "label"),
    [
        (rules(0.48, 0.03, -0.52), around(0.01), "mechanical"),
        ({"constant": around(0.5)}, around(-0.02), "mechanical"),
        (rules(0.8, 0.3, -0.2), around(0.3), "both"),
        (rules(0.55, 0.1, -0.45), around(0.1), "both"),
        (rules(0.6, 0.6, 0.6), around(0.6), "feedback"),
        (rules(0.0, 0.0, 0.0), around(0.0), "neither"),
        ({"constant": around(1.4)}, around(0.0), "neither"),
        # rslora alone predicts what no effect at all gives.
        ({"rslora": around(0.0)}, around(0.0), "undecided"),
        (rules(0.5, 0.0, 0.5), around(0.0), "undecided"),
        ({"constant": around(0.4, 0.4)}, around(0.0), "undecided"),
        (rules(0.5, 0.0, -0.5), around(0.1, 0.3), "undecided"),
        (rules(0.5, 0.0, -0.5), None, "undecided"),
        ({}, None, "undecided"),
    ],
)
def test_which_explanation_survives(slopes, rank_free, label):
    found, sentence = slopes_.explanation(slopes, rank_free)
    assert found == label
    for interval in slopes.values():
        value, low, high = map(slopes_.signed, (interval.value, interval.low, interval.high))
        assert f"{value} [{low}, {high}]" in sentence
    if rank_free is None:
        assert "full-weight gradient not measured" in sentence
    assert sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "+0.50"), (-0.126, "-0.13"), (0.004, "0.00"), (-0.004, "0.00")]
)
def test_a_number_has_its_sign_unless_it_is_zero(value, text):
    assert slopes_.signed(value) == text


def test_a_weak_feedback_is_called_so():
    weak = slopes_.explanation(rules(0.55, 0.1, -0.45), around(0.1))[1]
    strong = slopes_.explanation(rules(0.8, 0.3, -0.2), around(0.3))[1]
    assert "a little gradient" in weak and "a little" not in strong


def test_only_known_scale_rules_have_a_prediction():
    with pytest.raises(ValueError, match="alpha"):
        slopes_.explanation({"alpha": around(0.5)}, None)
