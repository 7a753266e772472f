"""Slopes of a gradient share over rank: exact ones, what their intervals cover, what they say."""

from __future__ import annotations

import numpy as np
import pytest

from jaxgrpo.stats import Interval
from jaxgrpo.study import slopes as slopes_
from jaxgrpo.study.slopes import Fit, fit_slope
from tests.study.test_importance import PROPORTIONAL, UNIFORM


def fit(x, y, blocks=None, clusters=None, **options):
    blocks = np.zeros(len(x)) if blocks is None else blocks
    clusters = np.arange(len(x)) if clusters is None else clusters
    return fit_slope(np.asarray(x), np.asarray(y), blocks, clusters, **options)


def test_a_power_law_gives_its_exponent_exactly():
    log_rank = np.log([4.0, 8, 16, 32, 64, 2, 3, 12])
    found = fit(log_rank, 0.5 * log_rank - 3.0)
    assert found.value == pytest.approx(0.5, abs=1e-12)
    assert found.low == pytest.approx(0.5) == found.high
    assert (found.cr1_low, found.cr1_high) == pytest.approx((0.5, 0.5))


def test_the_papers_shares_fit_a_square_root():
    """Ranks inferred from the uniform shares, clipped to the 20-40 that the paper reports. They are
    a function of the same shares, which lowers the slope: a check of size, no evidence."""
    log_rank = np.log(np.clip(896 * UNIFORM / 100, 20, 40))
    assert fit(log_rank, np.log(PROPORTIONAL / UNIFORM)).value == pytest.approx(0.48, abs=0.01)


def test_a_slope_does_not_lose_digits_far_from_zero():
    x = 1e7 + np.array([0.1, 1.3, 2.7, 3.9])
    assert fit(x, 0.5 * x).value == pytest.approx(0.5, abs=1e-6)


def test_every_block_has_its_own_intercept():
    """A module whose gradients are larger, and given more rank, makes no slope."""
    x = np.log([2.0, 4, 8, 16, 20, 40, 80, 160])
    blocks = np.repeat([0, 1], 4)
    found = fit(x, 0.3 * x + 5.0 * blocks, blocks, np.tile(np.arange(4), 2))
    assert found.value == pytest.approx(0.3)


def test_the_second_interval_is_the_textbooks_cluster_robust_one():
    """CR1 by matrices: (X'X)^-1 sum over clusters of (X_g' e_g)(X_g' e_g)' (X'X)^-1, corrected."""
    from scipy import stats as scipy_stats

    rng = np.random.default_rng(0)
    layers, blocks = np.tile(np.arange(6), 3), np.repeat(np.arange(3), 6)
    x, y = rng.normal(size=18), rng.normal(size=18)
    design = np.column_stack([x, *(blocks == b for b in range(3))])
    inverse = np.linalg.inv(design.T @ design)
    beta = inverse @ design.T @ y
    rest = y - design @ beta
    meat = sum(
        np.outer(u, u) for g in range(6) for u in [design[layers == g].T @ rest[layers == g]]
    )
    variance = (inverse @ meat @ inverse)[0, 0] * 6 / 5 * 17 / 14
    half = scipy_stats.t.ppf(0.975, 5) * variance**0.5
    found = fit(x, y, blocks, layers)
    assert found.value == pytest.approx(beta[0])
    assert (found.cr1_low, found.cr1_high) == pytest.approx((beta[0] - half, beta[0] + half))


def test_the_interval_holds_what_the_randomisation_test_does_not_reject():
    """By hand over the same orders, on both sides of each end."""
    rng = np.random.default_rng(1)
    x, draws = np.log(rng.permutation([2.0, 4, 8, 16, 3, 6, 12, 24])), 499
    y = 0.4 * x + rng.normal(0, 0.2, 8)
    found = fit(x, y, seed=3, draws=draws)
    x, y = x - x.mean(), y - y.mean()
    orders = np.argsort(np.random.default_rng(3).random((draws, 8)), axis=1)

    def p(slope):
        seen = abs(x @ (y - slope * x))
        return (1 + (np.abs(x[orders] @ (y - slope * x)) >= seen - 1e-12).sum()) / (draws + 1)

    width = found.high - found.low
    for end, inwards in ((found.low, width / 100), (found.high, -width / 100)):
        assert p(end + inwards) > 0.05 >= p(end - inwards)


def coverage(layers, draws, studies, seed):
    """Slopes of 0.2 on average that differ between layers and keep through all draws; neighbours'
    noise goes together. The randomisation is about the mean of these layers, CR1 about 0.2."""
    rng = np.random.default_rng(seed)
    ranks = np.log(np.resize([2, 4, 8, 16], layers))
    blocks = np.repeat(np.arange(7 * draws), layers)
    clusters = np.tile(np.arange(layers), 7 * draws)
    inside = []
    for study in range(studies):
        slope = 0.2 + rng.normal(0, 0.05, layers)
        x = np.concatenate([rng.permutation(ranks) for _ in range(7 * draws)])
        own = rng.normal(0, 0.05, (draws, layers))
        own = np.repeat(own + 0.5 * np.roll(own, 1, axis=1), 7, axis=0).ravel()
        y = np.tile(slope, 7 * draws) * x + own + rng.normal(0, 0.05, len(x))
        found = fit(x, y, blocks, clusters, seed=study, draws=399)
        mean = slope.mean()
        inside.append((found.low <= mean <= found.high, found.cr1_low <= 0.2 <= found.cr1_high))
    return np.mean(inside, axis=0)


def test_both_intervals_cover():
    """150 studies: standard error 1.8 %."""
    assert (coverage(8, 1, 150, 4) >= 0.95 - 0.055).all()


@pytest.mark.slow
@pytest.mark.parametrize("layers", [8, 28])
@pytest.mark.parametrize("draws", [1, 4])
def test_the_coverage_of_both_intervals(layers, draws):
    """3,000 studies, standard error 0.4 %, and two of them beyond the bounds: 94 to 96.5 % for the
    interval that is printed first. CR1 stands beside it and falls short with few clusters (93.2 %
    with 8 layers and one draw), the reason why it is not the first."""
    by_randomisation, by_clusters = coverage(layers, draws, 3000, layers + draws)
    print(layers, draws, by_randomisation, by_clusters)
    assert 0.94 - 0.008 <= by_randomisation <= 0.965 + 0.008
    assert 0.92 <= by_clusters <= 0.98


def test_a_slope_needs_ranks_that_differ():
    with pytest.raises(ValueError, match="every rank is the same"):
        fit(np.full(5, np.log(32)), np.arange(5.0))
    with pytest.raises(ValueError, match="two clusters"):
        fit(np.arange(3.0), np.arange(3.0), clusters=np.zeros(3))
    with pytest.raises(ValueError, match="leave out layers of rank 0"):
        fit(np.array([0.0, -np.inf]), np.zeros(2))
    with pytest.raises(ValueError, match="one shape"):
        fit(np.arange(3.0), np.arange(4.0))


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.11, 0.2, "follows"), (0.02, 0.09, "does not"), (0.02, 0.2, "open"), (-0.2, 0.0, "open")],
)
def test_one_margin_says_follows_and_does_not(low, high, said):
    """A third decimal above 0 is no feedback, and 0.09 is not far from it."""
    assert Fit((low + high) / 2, low, high, low, high).verdict() == said


# ---- which explanation survives


def around(value, half=0.04):
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
        (rules(0.65, 0.15, -0.35), around(0.15), "both"),
        (rules(0.6, 0.6, 0.6), around(0.6), "feedback"),
        (rules(0.0, 0.0, 0.0), around(0.0), "neither"),
        ({"constant": around(1.4)}, around(0.0), "neither"),
        # rslora alone predicts what no effect at all gives.
        ({"rslora": around(0.0)}, around(0.0), "undecided"),
        (rules(0.5, 0.0, 0.5), around(0.0), "undecided"),
        ({"constant": around(0.4, 0.4)}, around(0.0), "undecided"),
        (rules(0.5, 0.0, -0.5), around(0.1, 0.3), "undecided"),
        # 0.00 [0.00, 0.01] was called a feedback when its low end was above 0.
        (rules(0.5, 0.0, -0.5), Interval(0.004, 0.001, 0.01), "mechanical"),
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


def test_only_known_scale_rules_have_a_prediction():
    with pytest.raises(ValueError, match="alpha"):
        slopes_.explanation({"alpha": around(0.5)}, None)
