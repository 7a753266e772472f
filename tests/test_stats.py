"""Statistics: published and hand-made answers, exact tests against enumeration, scipy's own t, and
what intervals and p-values promise (type I error, coverage), checked by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgrpo import stats
from jaxgrpo.stats import RunLayout
from jaxgrpo.study.comparisons import Planned, compare
from jaxgrpo.study.evals import Answers
from jaxgrpo.study.verdict import verdict


def covered(intervals, truth):
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


# ---- one proportion


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


# ---- exact tests on the items


@given(st.lists(st.integers(-3, 3), max_size=9))
def test_sign_flips_are_all_counted(values):
    patterns = list(itertools.product((1, -1), repeat=len(values)))
    seen = abs(sum(values))
    sums = [abs(sum(s * v for s, v in zip(p, values, strict=True))) for p in patterns]
    by_hand = sum(total >= seen for total in sums) / len(patterns)
    assert stats.sign_flip_exact(np.array(values, int)) == pytest.approx(by_hand, abs=1e-12)


def test_sign_flips_of_a_common_multiple_are_the_same():
    values = np.array([3, -1, 2, 2, 0, -4, 1])
    assert stats.sign_flip_exact(6 * values) == stats.sign_flip_exact(values)


def test_the_sign_flip_of_ones_is_the_binomial_test():
    from scipy.stats import binomtest

    for a, b in ((0, 5), (1, 7), (8, 2), (150, 190)):
        expected = binomtest(a, a + b).pvalue
        assert stats.sign_flip_exact(np.repeat([1, -1], [a, b])) == pytest.approx(expected)


def test_sign_flips_take_whole_numbers():
    with pytest.raises(ValueError, match="float64"):
        stats.sign_flip_exact(np.array([0.5, -0.5]))


# ---- runs as the unit of inference

# Two runs of one model disagree on 10.5 % of GSM8K's 1,319 items at 70 % accuracy: the items' rates
# are Beta(0.7 / 3, 0.3 / 3). An arm that redraws 6.56 % of them has an arm x item variance of 0.02.
ITEMS, REDRAWN = 1319, 0.0656


def simulated(rng, arms, seeds, run_sd, redrawn=0.0, gap=0.0, items=ITEMS):
    """Answers [A, S, N] of equal arms; the second is better by `gap`."""
    rate = np.broadcast_to(rng.beta(0.7 / 3, 0.3 / 3, items), (arms, 1, items))
    if redrawn:
        own = rng.beta(0.7 / 3, 0.3 / 3, (arms, 1, items))
        rate = np.where(rng.random((arms, 1, items)) < redrawn, own, rate)
    move = rng.normal(0, run_sd, (arms, seeds, 1)) if run_sd else np.zeros((arms, seeds, 1))
    move[1] += gap
    # By mean `move`, and never outside [0, 1].
    return rng.random((arms, seeds, items)) < rate + np.where(
        move > 0, move / 0.3 * (1 - rate), move / 0.7 * rate
    )


def error_and_coverage(seeds, run_sd, redrawn, studies, seed, gap=0.0):
    """Shares of studies of four arms with p < 0.05, and whose 95 % interval holds the gap."""
    rng = np.random.default_rng(seed)
    found = [
        RunLayout(simulated(rng, 4, seeds, run_sd, redrawn, gap)).contrast([-1, 1, 0, 0])
        for _ in range(studies)
    ]
    intervals = [one.interval() for one in found]
    holds = [interval.low <= gap <= interval.high for interval in intervals]
    return np.mean([one.p < 0.05 for one in found]), np.mean(holds)


@pytest.mark.parametrize(
    ("seeds", "run_sd", "redrawn"), [(2, 0.01, 0.0), (3, 0.01, REDRAWN), (2, 0.0, 0.0)]
)
def test_equal_plans_differ_as_often_as_p_says_though_runs_move(seeds, run_sd, redrawn):
    """By the items alone 29 % of such studies had p < 0.05. 400 studies: standard error 1.1 %."""
    error, _ = error_and_coverage(seeds, run_sd, redrawn, 400, seed=1)
    assert 0.02 <= error <= 0.085


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
@pytest.mark.parametrize("run_sd", [0.0, 0.005, 0.01, 0.02])
@pytest.mark.parametrize("redrawn", [0.0, REDRAWN])
def test_error_and_coverage_of_a_comparison(seeds, run_sd, redrawn, record_property):
    """4,000 studies: the standard error of both shares is 0.0034, and the bands have two of it.

    Errors measured with 6,000 studies a cell: 4.1 to 6.0 % at 2 seeds, 4.6 to 5.3 % at 3, 4.6 to
    5.8 % at 5, 4.7 to 5.3 % at 8. Most is erred at 2 seeds where arms have items of their own:
    30,000 studies gave 5.9, 6.0 and 5.7 % at a run sd of 1, 1.5 and 2 points, and 6.5, 6.3 and
    5.9 % without the answers' noise in the df.
    """
    error, covers = error_and_coverage(seeds, run_sd, redrawn, 4000, seed=seeds, gap=0.0)
    record_property("p < 0.05", error)
    print(f"S={seeds} sd={run_sd} redrawn={redrawn}: p < .05 {error:.4f}, covers {covers:.4f}")
    assert 0.035 - 0.007 <= error <= 0.06 + 0.007
    assert 0.94 - 0.007 <= covers <= 0.965 + 0.007


def says_no(rng, seeds, run_sd, redrawn, margin):
    """Whether a study of three plans, one of them better by exactly the margin and two worse by
    3.5 points, says that none is better by it."""
    cells = simulated(rng, 4, seeds, run_sd, redrawn, gap=margin)
    worse = rng.random(cells[2:].shape) < 0.05
    cells[2:] &= ~worse
    plans = ("uniform", "inverse", "proportional", "random")
    planned = [
        Planned(plan, "uniform", {plan: 1.0, "uniform": -1.0}, family, margin, plan)
        for plan, family in zip(plans[1:], ("primary", "second", "second"), strict=True)
    ]
    answers = {plan: Answers(one.astype(int), 1) for plan, one in zip(plans, cells, strict=True)}
    layout = RunLayout(cells)
    found = compare(planned, answers, layout)
    arms = [{"plan": plan, "versus": found[plan]} for plan in plans[1:]]
    residual = {"sd": 0.0, "df": 1, "low": 0.0, "high": 0.0}
    return verdict(arms, [*found.values()], residual, None, None)[0].startswith("No plan")


def test_no_is_seldom_said_where_one_plan_is_better_by_the_margin():
    """200 studies of 5 seeds; it may be said in 2.5 %."""
    rng = np.random.default_rng(9)
    assert np.mean([says_no(rng, 5, 0.005, 0.0, 0.015) for _ in range(200)]) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
@pytest.mark.parametrize("run_sd", [0.0, 0.005, 0.01, 0.02])
@pytest.mark.parametrize("redrawn", [0.0, REDRAWN])
def test_how_often_no_is_said_where_one_plan_is_better_by_the_margin(seeds, run_sd, redrawn):
    """+1.5 points, the margin of a study that sets none. At a margin of 2 points "none is better by
    2 points" is true of +1.5, and said in up to 10.3 % of studies. 2,000 studies a cell; measured
    0.7 to 3.3 %."""
    rng = np.random.default_rng(seeds)
    share = np.mean([says_no(rng, seeds, run_sd, redrawn, 0.015) for _ in range(2000)])
    print(f"S={seeds} sd={run_sd} redrawn={redrawn}: no {share:.4f}")
    assert share <= 0.05


def test_the_layout_is_the_two_way_analysis_of_variance():
    """README's four arms and two seeds of study_embedded: p = 0.020 with 4 df where the residual is
    pooled over arms without seeds; with the seed as a block, 3 df, by hand."""
    right = np.array([[434, 442], [417, 423], [436, 443], [436, 442]])
    cells = np.arange(512) < right[..., None]
    layout = RunLayout(cells)
    accuracy = right / 512
    rest = accuracy - accuracy.mean(1, keepdims=True) - accuracy.mean(0) + accuracy.mean()
    assert layout.residual.df == 3
    assert layout.residual.sd == pytest.approx(math.sqrt((rest**2).sum() / 3))
    contrast = layout.contrast([-1, 1, 0, 0])
    assert contrast.difference == pytest.approx(-18 / 512)
    assert contrast.run_variance == pytest.approx(layout.residual.sd**2)  # 2 sd^2 / S, S = 2
    np.testing.assert_allclose(contrast.per_seed, [-17 / 512, -19 / 512])


def test_p_and_interval_come_from_scipys_t():
    from scipy import stats as scipy_stats

    rng = np.random.default_rng(2)
    for redrawn in (0.0, 0.3):
        contrast = RunLayout(simulated(rng, 3, 4, 0.01, redrawn, items=300)).contrast([1, 0, -1])
        t = contrast.difference / contrast.standard_error
        assert contrast.p == pytest.approx(2 * scipy_stats.t.sf(abs(t), contrast.df))
        interval = contrast.interval(0.9)
        expected = scipy_stats.t.interval(
            0.9, contrast.df, contrast.difference, contrast.standard_error
        )
        assert (interval.low, interval.high) == pytest.approx(expected)
        # An interval of confidence 1 - p ends at 0.
        edge = contrast.interval(1 - contrast.p)
        assert min(abs(edge.low), abs(edge.high)) == pytest.approx(0, abs=1e-9)
        power = contrast.detectable(0.05, 0.8) / contrast.standard_error
        assert power == pytest.approx(
            scipy_stats.t.ppf(0.975, contrast.df) + scipy_stats.t.ppf(0.8, contrast.df)
        )


def test_two_arms_and_no_item_of_their_own_is_the_paired_t_test():
    """Every answer right with the run's own rate, so items carry nothing but noise."""
    from scipy import stats as scipy_stats

    right = np.array([[60, 66, 58, 71], [52, 64, 55, 60]])
    cells = np.stack([[np.arange(100) < count for count in row] for row in right])
    contrast = RunLayout(cells).contrast([1, -1])
    by_run = scipy_stats.ttest_rel(right[0] / 100, right[1] / 100)
    run_only = contrast.difference / math.sqrt(contrast.run_variance)
    assert run_only == pytest.approx(by_run.statistic)
    assert contrast.run_df == by_run.df == 3


def test_the_arms_own_items_count_where_seeds_cannot_show_them():
    """Two arms right on different halves, runs alike: the residual is 0, the error is not."""
    first = np.arange(400) % 2 == 0
    cells = np.stack([np.stack([first] * 3), np.stack([~first] * 3)])
    contrast = RunLayout(cells).contrast([1, -1])
    assert contrast.run_variance == pytest.approx(0) and contrast.item_variance > 0
    assert contrast.standard_error == pytest.approx(1 / math.sqrt(399))
    assert contrast.df == pytest.approx(399)


def test_a_residual_that_is_small_by_chance_is_not_taken_for_certainty():
    """Runs of one arm right on different items, and all arms equally often: the residual of 1 df
    says 0, and the items, which have many df, would be all there is."""
    rng = np.random.default_rng(8)
    cells = np.array([[rng.permutation(200) < 120 for _ in range(2)] for _ in range(2)])
    contrast = RunLayout(cells).contrast([1, -1])
    assert contrast.run_variance == pytest.approx(0) and contrast.answer_variance > 0
    assert contrast.df < 20 and contrast.item_df == 199


def test_an_arm_against_itself_and_runs_without_noise():
    cells = np.broadcast_to(np.arange(40) % 3 == 0, (2, 2, 40))
    contrast = RunLayout(cells).contrast([1, -1])
    assert (contrast.difference, contrast.p) == (0, 1)
    assert contrast.p_equivalent(0.02) == 0
    better = RunLayout(np.stack([np.ones((2, 40)), np.zeros((2, 40))])).contrast([1, -1])
    assert better.p == 0 and better.p_equivalent(0.02) == 1


def test_one_seed_leaves_nothing_to_test_with():
    layout = RunLayout(simulated(np.random.default_rng(3), 3, 1, 0.01))
    assert layout.residual is None
    contrast = layout.contrast([-1, 1, 0])
    assert contrast.run_df == 0 and contrast.fixed.low < contrast.difference < contrast.fixed.high


def test_fractions_are_answers_too():
    """The mean of four samples is one cell."""
    samples = simulated(np.random.default_rng(4), 2, 12, 0.0)
    cells = samples.reshape(2, 3, 4, ITEMS).mean(axis=2)
    contrast = RunLayout(cells).contrast([-1, 1])
    single = RunLayout(samples[:, ::4]).contrast([-1, 1])
    assert 0 <= contrast.p <= 1 and contrast.fixed.high - contrast.fixed.low < (
        single.fixed.high - single.fixed.low
    )


@pytest.mark.parametrize("margin", [0.01, 0.03])
def test_equivalence_is_two_one_sided_tests(margin):
    """p <= 0.05 exactly where the 90 % interval lies within the margin."""
    rng = np.random.default_rng(5)
    seen = set()
    for _ in range(40):
        contrast = RunLayout(simulated(rng, 3, 3, 0.008)).contrast([-1, 1, 0])
        interval = contrast.interval(0.9)
        inside = -margin < interval.low and interval.high < margin
        assert (contrast.p_equivalent(margin) <= 0.05) == inside
        seen.add(inside)
    assert False in seen


def test_the_detectable_effect_has_its_power():
    """True gap at what a typical study calls detectable; 300 studies, standard error 0.023."""
    rng = np.random.default_rng(6)
    layouts = [RunLayout(simulated(rng, 4, 3, 0.01)) for _ in range(100)]
    # The sd that is estimated varies; the gap is taken at its root mean square.
    variance = np.mean([one.contrast([-1, 1, 0, 0]).run_variance for one in layouts])
    typical = layouts[0].contrast([-1, 1, 0, 0])
    gap = typical.detectable(factor=math.sqrt(variance / typical.run_variance))
    p = [
        RunLayout(simulated(rng, 4, 3, 0.01, gap=gap)).contrast([-1, 1, 0, 0]).p for _ in range(300)
    ]
    assert 0.72 <= np.mean(np.array(p) < 0.05) <= 0.88


@pytest.mark.parametrize(("seeds", "run_sd"), [(1, 0.0), (3, 0.01), (2, 0.02)])
def test_an_arms_accuracy_covers(seeds, run_sd):
    """Of runs of other seeds on other items; with one seed runs must not move. 400 studies."""
    rng = np.random.default_rng(7)
    intervals = [RunLayout(simulated(rng, 4, seeds, run_sd)).arm_interval(0) for _ in range(400)]
    assert 0.915 <= covered(intervals, 0.7) <= 0.985


def test_all_right_or_all_wrong_still_has_a_width():
    layout = RunLayout(np.stack([np.ones((2, 50)), np.zeros((2, 50))]))
    assert layout.arm_interval(0) == stats.wilson_interval(50, 50)
    assert layout.arm_interval(1) == stats.wilson_interval(0, 50)


@pytest.mark.parametrize("cells", [np.ones((2, 5)), np.ones((0, 1, 5)), [[[1.0, np.nan]]]])
def test_a_layout_has_no_gaps(cells):
    with pytest.raises(ValueError, match=r"\[arms, seeds, items\]"):
        RunLayout(cells)


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


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_an_interval_at_holms_level_agrees_with_holms_p(p):
    """Where p is at most its level, and nowhere else, the adjusted p is at most 5 %."""
    levels, adjusted = stats.holm_levels(p, 0.05), stats.holm(p)
    for value, level, full in zip(p, levels, adjusted, strict=True):
        assert 0.05 / len(p) - 1e-15 <= level <= 0.05 + 1e-15
        if abs(full - 0.05) > 1e-9:
            assert (value <= level) == (full <= 0.05)


def test_holms_levels_by_hand():
    assert stats.holm_levels([0.001, 0.04, 0.02]) == pytest.approx([0.05 / 3, 0.05, 0.025])
    # The second smallest fails at 0.025, and so does the largest, at the same level.
    assert stats.holm_levels([0.001, 0.04, 0.03]) == pytest.approx([0.05 / 3, 0.025, 0.025])
