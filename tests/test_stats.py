"""Statistics: published and hand-made answers, exact tests against enumeration, and what the
intervals and p-values promise (coverage, type I error, power), checked by simulation."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgrpo import stats
from jaxgrpo.stats import Interval

# Layer shares 0-27 in per cent, read off a figure of arXiv 2605.07366 (uniform and proportional
# run). They add up to 99.9, so what the paper says of them holds before they are made to sum to 1.
UNIFORM = np.array(
    [
        [3.53, 3.09, 3.37, 3.19, 3.02, 3.49, 3.11, 3.37, 3.61, 3.78, 3.94, 4.29, 4.00, 4.22],
        [4.25, 4.68, 4.65, 4.60, 4.53, 4.17, 3.42, 3.11, 2.65, 2.72, 2.23, 2.30, 2.15, 4.47],
    ]
).ravel()
PROPORTIONAL = np.array(
    [
        [3.55, 3.04, 3.33, 2.91, 2.72, 3.41, 2.95, 3.40, 3.38, 3.66, 4.08, 4.56, 4.22, 4.29],
        [4.67, 4.89, 5.12, 5.00, 5.12, 4.47, 3.40, 2.93, 2.27, 2.31, 1.70, 1.82, 1.71, 5.02],
    ]
).ravel()
# Simulated coverage of a 95 % interval; 500 of them have a standard error of 0.0097.
TRIALS = 500
COVERS = (0.92, 0.98)


def covered(intervals, truth):
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


def two_arms(rng, seeds, items, gap=0.0, seed_spread=0.0):
    """Answers of two arms to the same items, whose difficulties differ: bool [S, N] twice."""
    rate = rng.beta(3, 2, items) * (1 - abs(gap))
    arms = []
    for shift in (max(gap, 0.0), max(-gap, 0.0)):
        chance = rate + shift + rng.normal(0, seed_spread, (seeds, 1))
        arms.append(rng.random((seeds, items)) < chance)
    return arms


# ---- one and two proportions


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (the score interval).
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes, n, low, high):
    interval = stats.wilson_interval(successes, n)
    assert interval.value == successes / n
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
@pytest.mark.parametrize(("successes", "n"), [(3, 10), (987.5, 1319), (1, 1), (0, 7), (199, 200)])
def test_wilson_ends_are_roots_of_the_score_equation(successes, n, confidence):
    interval = stats.wilson_interval(successes, n, confidence)
    rate = successes / n
    assert interval.low <= rate <= interval.high

    def outside(p):
        """Two-sided normal p of the observed rate if the true one were p, less 1 - confidence."""
        z = abs(rate - p) / math.sqrt(p * (1 - p) / n)
        return math.erfc(z / math.sqrt(2)) < 1 - confidence

    for end, far in ((interval.low, 0.0), (interval.high, 1.0)):
        if end == rate:
            continue
        near, away = rate, far
        for _ in range(100):
            middle = (near + away) / 2
            if middle in (near, away):
                break
            near, away = (near, middle) if outside(middle) else (middle, away)
        assert end == pytest.approx(near, abs=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(-1, 10), (11, 10), (0, 0), (float("nan"), 3)])
def test_wilson_refuses_what_is_no_proportion(successes, n):
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        stats.wilson_interval(successes, n)


def test_wilson_covers():
    rng = np.random.default_rng(0)
    for rate in (0.1, 0.5, 0.745):
        drawn = rng.binomial(200, rate, 4000)
        assert 0.935 <= covered([stats.wilson_interval(x, 200) for x in drawn], rate) <= 0.965


def test_the_papers_gap_is_within_noise():
    """74.5 % against 70.0 % on 200 items each (arXiv 2605.07366)."""
    assert stats.two_proportion_test(149, 200, 140, 200) == pytest.approx(0.31, abs=5e-3)
    # Against the other two rows of its table, and on all 1319 items.
    assert stats.two_proportion_test(149, 200, 135, 200) == pytest.approx(0.12, abs=5e-3)
    assert stats.two_proportion_test(149, 200, 132, 200) == pytest.approx(0.06, abs=5e-3)
    assert stats.two_proportion_test(0.745 * 1319, 1319, 0.7 * 1319, 1319) < 0.011


def test_two_proportions_by_hand():
    # Pooled rate 1/2, standard error 1/10, so z is 2.
    assert stats.two_proportion_test(30, 50, 20, 50) == pytest.approx(0.0455, abs=1e-4)
    assert stats.two_proportion_test(20, 50, 30, 50) == stats.two_proportion_test(30, 50, 20, 50)
    assert stats.two_proportion_test(5, 5, 9, 9) == stats.two_proportion_test(0, 5, 0, 9) == 1.0
    with pytest.raises(ValueError, match="6 of 5"):
        stats.two_proportion_test(6, 5, 1, 5)


# ---- exact paired tests


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 5, 2 / 32),
        (1, 7, 2 * (1 + 8) / 256),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (4, 4, 1.0),
    ],
)
def test_mcnemar_by_hand(only_a, only_b, p):
    assert stats.mcnemar_exact(only_a, only_b) == stats.mcnemar_exact(only_b, only_a) == p


def test_mcnemar_is_exact_at_large_counts():
    tail = sum(math.comb(4100, k) for k in range(1951))
    assert stats.mcnemar_exact(1950, 2150) == float(Fraction(2 * tail, 2**4100))
    assert stats.mcnemar_exact(0, 1000) == 2.0**-999
    # The normal approximation with continuity correction is good here, and overflows nowhere.
    z = (10200 - 10000 - 1) / math.sqrt(20200)
    assert stats.mcnemar_exact(10000, 10200) == pytest.approx(math.erfc(z / 2**0.5), rel=1e-3)
    with pytest.raises(ValueError, match="negative"):
        stats.mcnemar_exact(-1, 3)


@given(st.lists(st.integers(-3, 3), max_size=9))
def test_sign_flips_are_all_counted(values):
    patterns = list(itertools.product((1, -1), repeat=len(values)))
    seen = abs(sum(values))
    sums = [abs(sum(s * v for s, v in zip(p, values, strict=True))) for p in patterns]
    by_hand = sum(total >= seen for total in sums) / len(patterns)
    assert stats.sign_flip_exact(np.array(values, int)) == pytest.approx(by_hand, abs=1e-12)


@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 9))
def test_with_one_seed_the_sign_flip_is_mcnemar(only_a, only_b, same):
    values = np.repeat([1, -1, 0], [only_a, only_b, same])
    expected = stats.mcnemar_exact(only_a, only_b)
    assert stats.sign_flip_exact(values) == pytest.approx(expected, rel=1e-9)


def test_sign_flips_take_whole_numbers():
    with pytest.raises(ValueError, match="float64"):
        stats.sign_flip_exact(np.array([0.5, -0.5]))


# ---- bootstraps


def test_the_bootstrap_of_a_mean_covers_and_repeats():
    rng = np.random.default_rng(1)
    samples = rng.exponential(size=(TRIALS, 60))
    intervals = [stats.bootstrap_interval(x, np.mean, seed=i) for i, x in enumerate(samples[:200])]
    assert 0.88 <= covered(intervals, 1.0) <= 0.98  # skewed and small: known to fall short
    assert intervals[3] == stats.bootstrap_interval(samples[3], np.mean, seed=3)
    assert intervals[3] != stats.bootstrap_interval(samples[3], np.mean, seed=4)
    assert intervals[3].value == samples[3].mean()


def test_the_bootstrap_draws_rows_whole():
    values = np.arange(20.0)[:, None] * [1, 10]
    interval = stats.bootstrap_interval(values, lambda v: (v[:, 1] / 10 - v[:, 0]).max())
    assert (interval.value, interval.low, interval.high) == (0, 0, 0)


def test_blocks_keep_the_correlation_of_steps():
    """An autoregressive series: drawn one by one its interval is far too narrow."""
    rng = np.random.default_rng(2)
    steps, trials = 400, 120
    series = np.zeros((trials, steps))
    series[:, 0] = rng.normal(0, 1 / math.sqrt(1 - 0.8**2), trials)
    for t in range(1, steps):
        series[:, t] = 0.8 * series[:, t - 1] + rng.normal(size=trials)

    def coverage(block):
        return covered(
            [stats.bootstrap_interval(x, np.mean, resamples=400, block=block) for x in series], 0.0
        )

    assert coverage(1) < 0.7
    assert coverage(30) > 0.85


@pytest.mark.parametrize("block", [0, 6])
def test_a_block_must_fit(block):
    with pytest.raises(ValueError, match=f"blocks of {block}"):
        stats.bootstrap_interval(np.arange(5.0), np.mean, block=block)


def test_bootstrap_refuses_nothing_and_what_is_not_finite():
    with pytest.raises(ValueError, match="0 values"):
        stats.bootstrap_interval(np.zeros(0), np.mean)
    with pytest.raises(ValueError, match="not finite"):
        stats.bootstrap_interval(np.array([1.0, np.inf]), np.mean)
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.bootstrap_interval(np.arange(5.0), np.mean, confidence=95)


# ---- accuracy over seeds and items


@pytest.mark.parametrize(
    ("seeds", "seed_spread", "covers"),
    [(1, 0.0, COVERS), (3, 0.0, COVERS), (3, 0.01, COVERS), (2, 0.05, (0.5, 0.9))],
)
def test_accuracy_covers_unless_few_seeds_differ_much(seeds, seed_spread, covers):
    rng = np.random.default_rng(3)
    intervals = [
        stats.accuracy_interval(two_arms(rng, seeds, 300, seed_spread=seed_spread)[0], seed=i)
        for i in range(TRIALS)
    ]
    assert covers[0] <= covered(intervals, 0.6) <= covers[1]


def test_with_one_seed_accuracy_is_about_items_alone():
    correct = np.random.default_rng(4).random((1, 1319)) < 0.7
    interval = stats.accuracy_interval(correct)
    wilson = stats.wilson_interval(correct.sum(), 1319)
    assert interval.value == correct.mean()
    assert (interval.low, interval.high) == pytest.approx((wilson.low, wilson.high), abs=2e-3)
    # The same answers again are no news about items.
    again = stats.accuracy_interval(np.repeat(correct, 3, axis=0))
    assert (again.low, again.high) == pytest.approx((interval.low, interval.high), abs=2e-3)


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(5)
    alike = rng.random((3, 1000)) < 0.6
    apart = rng.random((3, 1000)) < np.array([[0.4], [0.6], [0.8]])
    narrow, wide = stats.accuracy_interval(alike), stats.accuracy_interval(apart)
    assert wide.high - wide.low > 4 * (narrow.high - narrow.low)


@pytest.mark.parametrize("seed_spread", [0.0, 0.04])
def test_the_noise_of_single_answers_is_counted_once(seed_spread):
    """A paired difference varies mostly by single answers. Drawing rows and columns of the table
    outright would count that twice and more; a seed effect must be counted all the same.
    """
    rng = np.random.default_rng(15)
    results = [
        stats.paired_difference(*two_arms(rng, 3, 300, seed_spread=seed_spread), seed=i)
        for i in range(TRIALS)
    ]
    true_variance = np.var([result.difference for result in results])
    claimed = np.mean([((r.high - r.low) / (2 * 1.959964)) ** 2 for r in results])
    # Seeds alike: an estimate of their variance that cannot be negative adds about a third.
    assert 0.8 <= claimed / true_variance <= 1.5


def test_all_right_or_all_wrong_still_has_a_width():
    assert stats.accuracy_interval(np.ones((2, 50), bool)) == stats.wilson_interval(50, 50)
    assert stats.accuracy_interval(np.zeros((1, 50), bool)) == stats.wilson_interval(0, 50)


@pytest.mark.parametrize("correct", [np.ones(5), np.ones((0, 5)), [[1.0, np.nan]]])
def test_accuracy_needs_a_table_without_gaps(correct):
    with pytest.raises(ValueError, match=r"\[seeds, items\]"):
        stats.accuracy_interval(correct)


# ---- paired differences


def test_a_paired_difference_by_hand():
    a = np.array([[1, 1, 1, 0, 0, 1, 1, 1]], bool)
    b = np.array([[1, 0, 0, 0, 1, 0, 0, 0]], bool)
    result = stats.paired_difference(a, b)
    assert (result.only_a, result.only_b) == (5, 1)
    assert result.difference == 0.5
    assert result.discordance == 6 / 8
    assert result.p == pytest.approx(2 * 7 / 64)
    assert result.p_mcnemar == pytest.approx(2 * 7 / 64)
    mirrored = stats.paired_difference(b, a)
    assert (mirrored.difference, mirrored.p) == (-0.5, result.p)
    assert json.loads(json.dumps(result.to_json()))["only_a"] == 5


def test_repeating_a_seed_adds_no_evidence():
    """McNemar on the summed counts takes one item for three; the reported p does not."""
    rng = np.random.default_rng(6)
    a, b = two_arms(rng, 1, 400, gap=0.06)
    once = stats.paired_difference(a, b)
    thrice = stats.paired_difference(np.repeat(a, 3, 0), np.repeat(b, 3, 0))
    assert thrice.p == pytest.approx(once.p, rel=1e-9)
    assert thrice.discordance == pytest.approx(once.discordance)
    assert thrice.p_mcnemar < once.p_mcnemar
    assert thrice.only_a == 3 * once.only_a


def test_the_same_answers_do_not_differ():
    a = np.random.default_rng(7).random((2, 30)) < 0.5
    result = stats.paired_difference(a, a)
    assert (result.difference, result.low, result.high, result.p) == (0, 0, 0, 1)


@pytest.mark.parametrize(("seeds", "seed_spread"), [(1, 0.0), (3, 0.0), (3, 0.01)])
@pytest.mark.parametrize("gap", [0.0, -0.05])
def test_a_paired_difference_covers(seeds, seed_spread, gap):
    rng = np.random.default_rng(8)
    results = [
        stats.paired_difference(*two_arms(rng, seeds, 300, gap, seed_spread), seed=i)
        for i in range(TRIALS)
    ]
    assert COVERS[0] <= covered(results, gap) <= COVERS[1]


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_paired_p_errs_as_often_as_it_says(seeds):
    """Equal arms with items of different difficulty; 1000 trials, standard error 0.007."""
    rng = np.random.default_rng(9)
    p = [
        stats.paired_difference(*two_arms(rng, seeds, 300), resamples=1).p
        for _ in range(2 * TRIALS)
    ]
    # An exact test of whole numbers errs a little less often than its level, never more.
    assert 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.065
    assert 0.14 <= np.mean(np.array(p) <= 0.2) <= 0.225


@pytest.mark.parametrize("wrong", [np.ones((2, 4)), np.ones((1, 3)), np.full((1, 4), 0.5)])
def test_paired_arms_must_match_and_be_right_or_wrong(wrong):
    with pytest.raises(ValueError, match="paired"):
        stats.paired_difference(np.ones((1, 4)), wrong)


# ---- what can be detected


def test_minimum_detectable_effect_solves_connors_equation():
    for n, q in ((200, 0.42), (1319, 0.42), (1319, 0.12)):
        d = stats.minimum_detectable_effect(n, 0.7, q)
        needed = (1.959964 * math.sqrt(q) + 0.841621 * math.sqrt(q - d * d)) ** 2 / d**2
        assert needed == pytest.approx(n, rel=1e-5)
    assert stats.minimum_detectable_effect(1319, 0.7) == pytest.approx(
        stats.minimum_detectable_effect(1319, 0.5, 0.42)
    )
    # The paper's 4.5 points are out of reach with its 200 items.
    assert stats.minimum_detectable_effect(200, 0.7) > 0.1
    assert stats.minimum_detectable_effect(1319, 0.7, 0.15) < 0.045


def test_an_effect_makes_items_discordant_by_itself():
    # 0 discordance: about (1.96 + 0.84)^2 = 7.8 items must go one way.
    assert stats.minimum_detectable_effect(1000, 0.7, 0.0) == pytest.approx(7.8e-3, rel=0.02)
    assert stats.minimum_detectable_effect(1, 0.5) == 1.0
    with pytest.raises(ValueError, match="discordant share"):
        stats.minimum_detectable_effect(100, 0.5, 1.5)
    with pytest.raises(ValueError, match="n >= 1"):
        stats.minimum_detectable_effect(0, 0.5)


@pytest.mark.parametrize(("n", "discordance"), [(400, 0.3), (1319, 0.15)])
def test_the_minimum_detectable_effect_has_its_power(n, discordance):
    effect = stats.minimum_detectable_effect(n, 0.7, discordance)
    rng = np.random.default_rng(10)
    up, down = (discordance + effect) / 2, (discordance - effect) / 2
    counts = rng.multinomial(n, [up, down, 1 - up - down], size=2000)
    p = np.array([stats.mcnemar_exact(int(a), int(b)) for a, b, _ in counts])
    # 0.8 by the normal approximation; the exact test is a little more careful.
    assert 0.75 <= np.mean(p <= 0.05) <= 0.83


def test_power_over_seeds_takes_the_discordance_of_a_comparison():
    """`PairedDifference.discordance` carries what several seeds average away."""
    rng = np.random.default_rng(11)
    pilot = stats.paired_difference(*two_arms(rng, 3, 20_000, 0.05), resamples=1)
    effect = stats.minimum_detectable_effect(300, 0.6, pilot.discordance)
    p = [
        stats.paired_difference(*two_arms(rng, 3, 300, effect), resamples=1).p
        for _ in range(TRIALS)
    ]
    assert 0.73 <= np.mean(np.array(p) <= 0.05) <= 0.87


# ---- many comparisons


def test_holm_by_hand():
    # Smallest of four times 4, next times 3, then 2, then 1, never below an earlier one.
    adjusted = stats.holm([0.01, 0.04, 0.03, 0.005])
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


@pytest.mark.parametrize("p", [[0.1, 1.2], [-0.1], [float("nan")]])
def test_holm_refuses_what_is_no_p_value(p):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        stats.holm(p)


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(p):
    adjusted = stats.holm(p)
    assert all(x <= y <= min(1.0, len(p) * x) for x, y in zip(p, adjusted, strict=True))
    by_p = [y for _, y in sorted(zip(p, adjusted, strict=True))]
    assert by_p == sorted(by_p)


# ---- shares of the gradient norm


def test_the_papers_layer_shares():
    assert stats.top_count(28, 0.3) == 8
    assert stats.max_min_ratio(UNIFORM) == pytest.approx(2.17, abs=0.01)
    assert stats.max_min_ratio(PROPORTIONAL) == pytest.approx(3.00, abs=0.02)
    assert stats.top_share(UNIFORM / 100, 0.3) == pytest.approx(0.3569, abs=1e-6)


def test_shares_by_hand():
    norms = np.array([[1.0, 2, 1], [3, 0, 1]])
    np.testing.assert_allclose(stats.shares(norms), [0.5, 0.25, 0.25])
    assert stats.max_min_ratio(stats.shares(norms)) == 2
    assert stats.top_share(stats.shares(norms), 0.7) == pytest.approx(0.75)
    assert stats.max_min_ratio(np.array([1.0, 0.0])) == math.inf
    assert Interval(math.inf, 2.0, math.inf).to_json() == {"value": None, "low": 2.0, "high": None}


@pytest.mark.parametrize(
    ("layers", "fraction", "count"), [(28, 0.3, 8), (2, 0.3, 1), (100, 0.29, 29), (4, 1.0, 4)]
)
def test_how_many_layers_a_fraction_is(layers, fraction, count):
    assert stats.top_count(layers, fraction) == count


@pytest.mark.parametrize("norms", [np.zeros((2, 3)), -np.ones((2, 3)), np.full((1, 2), np.nan)])
def test_shares_need_a_total(norms):
    with pytest.raises(ValueError, match="norm"):
        stats.shares(norms)


positive = st.floats(1e-6, 1e6)


@given(st.integers(2, 6).flatmap(lambda n: st.lists(st.lists(positive, min_size=n, max_size=n))))
def test_shares_sum_to_one_whatever_the_unit(rows):
    if not rows:
        return
    norms = np.array(rows)
    shares = stats.shares(norms)
    assert shares.sum() == pytest.approx(1) and (shares > 0).all()
    np.testing.assert_allclose(stats.shares(1e200 * norms), shares)
    assert stats.max_min_ratio(shares) >= 1
    assert stats.top_share(shares, 1.0) == pytest.approx(1)
    assert stats.top_share(shares, 0.5) >= stats.top_count(len(shares), 0.5) / len(shares) - 1e-12


def test_early_and_late_shares_are_correlated_over_layers():
    rng = np.random.default_rng(12)
    norms = UNIFORM * rng.lognormal(0, 0.2, (101, 28))
    early, late = norms[:50].mean(0), norms[50:].mean(0)
    expected = np.corrcoef(early, late)[0, 1]
    assert stats.early_late_correlation(norms) == pytest.approx(expected, abs=1e-12)
    assert stats.early_late_correlation(np.array([[1.0, 2], [2, 1]])) == pytest.approx(-1)
    assert stats.early_late_correlation(norms[:1]) is None
    assert stats.early_late_correlation(np.ones((6, 4))) is None
    assert stats.early_late_correlation(np.array([[0.0, 0], [2, 1]])) is None


def test_importance_holds_each_layers_share():
    """Layers' norms with a common trend over steps and noise of their own."""
    rng = np.random.default_rng(13)
    truth = UNIFORM / UNIFORM.sum()
    trend = np.linspace(3, 1, 300)[:, None]
    inside, top = [], []
    for i in range(60):
        norms = trend * truth * rng.gamma(20, 1 / 20, (300, 28))
        result = stats.importance(norms, seed=i, resamples=500)
        np.testing.assert_array_equal(result.share, stats.shares(norms))
        inside.append((result.low <= truth) & (truth <= result.high))
        top.append(result.top_share.value)
    assert 0.90 <= np.mean(inside) <= 0.98
    assert np.mean(top) == pytest.approx(0.357, abs=2e-3)
    assert result.block == 7 and result.top_layers == 8
    assert result.max_min.low <= 2.2 <= result.max_min.high
    assert result.early_late_correlation.value > 0.95
    view = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert view["top_share"].keys() == {"fraction", "layers", "value", "low", "high"}
    assert len(view["share"]) == len(view["low"]) == len(view["high"]) == 28


def test_importance_of_idle_and_of_equal_layers():
    idle = stats.importance(np.array([[1.0, 0.0]] * 4))
    assert idle.max_min.value == math.inf
    view = json.loads(json.dumps(idle.to_json(), allow_nan=False))
    assert view["max_min"] == {"value": None, "low": None, "high": None}
    equal = stats.importance(np.ones((9, 3)))
    assert equal.early_late_correlation is None
    assert equal.max_min == Interval(1, 1, 1)
    late_only = stats.importance(np.array([[0.0, 0], [0, 0], [1, 2], [2, 1]]), block=1)
    assert late_only.early_late_correlation is None
    with pytest.raises(ValueError, match="two steps"):
        stats.importance(np.ones((1, 3)))


# ---- how shares follow rank


def test_a_power_law_gives_its_exponent_exactly():
    log_rank = np.log([4.0, 8, 16, 32, 64])
    slope = stats.log_log_slope(log_rank, 0.5 * log_rank - 3.0)
    assert (slope.value, slope.low, slope.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-12)


def test_the_papers_amplification_is_nearly_a_square_root():
    """Ranks inferred from the uniform shares, clipped to the 20-40 that the paper reports."""
    log_rank = np.log(np.clip(896 * UNIFORM / 100, 20, 40))
    slope = stats.log_log_slope(log_rank, np.log(PROPORTIONAL / UNIFORM))
    assert slope.value == pytest.approx(0.48, abs=0.01)
    assert slope.low < 0.5 < slope.high


def test_a_slope_does_not_lose_digits_far_from_zero():
    x = 1e7 + np.array([0.1, 1.3, 2.7, 3.9])
    assert stats.log_log_slope(x, 0.5 * x).value == pytest.approx(0.5, abs=1e-6)


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
        intervals.append(stats.log_log_slope(x, y, layers, seed=i, resamples=500))
        if clustered and i < 100:
            alone.append(stats.log_log_slope(x, y, seed=i, resamples=500))
    low = 0.90 if clustered else COVERS[0] - 0.01  # 28 clusters: a little short of 0.95
    assert low <= covered(intervals, 0.5) <= COVERS[1]
    if clustered:
        assert covered(alone, 0.5) < 0.85


def test_a_slope_needs_ranks_that_differ():
    with pytest.raises(ValueError, match="every rank is the same"):
        stats.log_log_slope(np.full(5, np.log(32)), np.arange(5.0))
    with pytest.raises(ValueError, match="two clusters"):
        stats.log_log_slope(np.arange(3.0), np.arange(3.0), np.zeros(3))
    with pytest.raises(ValueError, match="leave out layers of rank 0"):
        stats.log_log_slope(np.array([0.0, -np.inf]), np.zeros(2))
    with pytest.raises(ValueError, match="one shape"):
        stats.log_log_slope(np.arange(3.0), np.arange(4.0))


def test_resamples_of_equal_ranks_are_left_out():
    """One layer at another rank is missing from a third of the resamples."""
    x = np.array([0.0, 0, 0, 1])
    slope = stats.log_log_slope(x, 0.5 * x)
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
    found, sentence = stats.explanation(slopes, rank_free)
    assert found == label
    for interval in slopes.values():
        value, low, high = map(stats.signed, (interval.value, interval.low, interval.high))
        assert f"{value} [{low}, {high}]" in sentence
    if rank_free is None:
        assert "full-weight gradient not measured" in sentence
    assert sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "+0.50"), (-0.126, "-0.13"), (0.004, "0.00"), (-0.004, "0.00")]
)
def test_a_number_has_its_sign_unless_it_is_zero(value, text):
    assert stats.signed(value) == text


def test_a_weak_feedback_is_called_so():
    weak = stats.explanation(rules(0.55, 0.1, -0.45), around(0.1))[1]
    strong = stats.explanation(rules(0.8, 0.3, -0.2), around(0.3))[1]
    assert "a little gradient" in weak and "a little" not in strong


def test_only_known_scale_rules_have_a_prediction():
    with pytest.raises(ValueError, match="alpha"):
        stats.explanation({"alpha": around(0.5)}, None)
