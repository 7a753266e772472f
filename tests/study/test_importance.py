"""Importance: shares of the gradient norm, published ones and by hand, and their intervals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgrpo.stats import Interval
from jaxgrpo.study import importance as measured

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


def test_the_papers_layer_shares():
    assert measured.top_count(28, 0.3) == 8
    assert measured.max_min_ratio(UNIFORM) == pytest.approx(2.17, abs=0.01)
    assert measured.max_min_ratio(PROPORTIONAL) == pytest.approx(3.00, abs=0.02)
    assert measured.top_share(UNIFORM / 100, 0.3) == pytest.approx(0.3569, abs=1e-6)


def test_shares_by_hand():
    norms = np.array([[1.0, 2, 1], [3, 0, 1]])
    np.testing.assert_allclose(measured.shares(norms), [0.5, 0.25, 0.25])
    assert measured.max_min_ratio(measured.shares(norms)) == 2
    assert measured.top_share(measured.shares(norms), 0.7) == pytest.approx(0.75)
    assert measured.max_min_ratio(np.array([1.0, 0.0])) == math.inf


@pytest.mark.parametrize(
    ("layers", "fraction", "count"), [(28, 0.3, 8), (2, 0.3, 1), (100, 0.29, 29), (4, 1.0, 4)]
)
def test_how_many_layers_a_fraction_is(layers, fraction, count):
    assert measured.top_count(layers, fraction) == count


@pytest.mark.parametrize("norms", [np.zeros((2, 3)), -np.ones((2, 3)), np.full((1, 2), np.nan)])
def test_shares_need_a_total(norms):
    with pytest.raises(ValueError, match="norm"):
        measured.shares(norms)


positive = st.floats(1e-6, 1e6)


@given(st.integers(2, 6).flatmap(lambda n: st.lists(st.lists(positive, min_size=n, max_size=n))))
def test_shares_sum_to_one_whatever_the_unit(rows):
    if not rows:
        return
    norms = np.array(rows)
    shares = measured.shares(norms)
    assert shares.sum() == pytest.approx(1) and (shares > 0).all()
    np.testing.assert_allclose(measured.shares(1e200 * norms), shares)
    assert measured.max_min_ratio(shares) >= 1
    assert measured.top_share(shares, 1.0) == pytest.approx(1)
    assert (
        measured.top_share(shares, 0.5)
        >= measured.top_count(len(shares), 0.5) / len(shares) - 1e-12
    )


def test_early_and_late_shares_are_correlated_over_layers():
    rng = np.random.default_rng(12)
    norms = UNIFORM * rng.lognormal(0, 0.2, (101, 28))
    early, late = norms[:50].mean(0), norms[50:].mean(0)
    expected = np.corrcoef(early, late)[0, 1]
    assert measured.early_late_correlation(norms) == pytest.approx(expected, abs=1e-12)
    assert measured.early_late_correlation(np.array([[1.0, 2], [2, 1]])) == pytest.approx(-1)
    assert measured.early_late_correlation(norms[:1]) is None
    assert measured.early_late_correlation(np.ones((6, 4))) is None
    assert measured.early_late_correlation(np.array([[0.0, 0], [2, 1]])) is None


def test_importance_holds_each_layers_share():
    """Layers' norms with a common trend over steps and noise of their own."""
    rng = np.random.default_rng(13)
    truth = UNIFORM / UNIFORM.sum()
    trend = np.linspace(3, 1, 300)[:, None]
    inside, top = [], []
    for i in range(60):
        norms = trend * truth * rng.gamma(20, 1 / 20, (300, 28))
        result = measured.importance(norms, seed=i, resamples=500)
        np.testing.assert_array_equal(result.share, measured.shares(norms))
        inside.append((result.low <= truth) & (truth <= result.high))
        top.append(result.top_share.value)
    assert 0.90 <= np.mean(inside) <= 0.98
    assert np.mean(top) == pytest.approx(0.357, abs=2e-3)
    assert result.block == 7 and result.top_layers == 8
    assert result.max_min.low <= 2.2 <= result.max_min.high
    assert result.early_late_correlation.value > 0.95
    view = json.loads(json.dumps(result.to_json(norms.T), allow_nan=False))
    assert view["top_share"].keys() == {"fraction", "layers", "value", "low", "high"}
    assert len(view["share"]) == len(view["low"]) == len(view["high"]) == 28


def test_importance_of_idle_and_of_equal_layers():
    idle = measured.importance(np.array([[1.0, 0.0]] * 4))
    assert idle.max_min.value == math.inf
    view = json.loads(json.dumps(idle.to_json(np.ones((2, 4))), allow_nan=False))
    assert view["max_min"] == {"value": None, "low": None, "high": None}
    equal = measured.importance(np.ones((9, 3)))
    assert equal.early_late_correlation is None
    assert equal.max_min == Interval(1, 1, 1)
    late_only = measured.importance(np.array([[0.0, 0], [0, 0], [1, 2], [2, 1]]), block=1)
    assert late_only.early_late_correlation is None
    with pytest.raises(ValueError, match="two steps"):
        measured.importance(np.ones((1, 3)))
