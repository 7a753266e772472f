"""How gradient norm is spread over layers: shares, their ratios, and intervals over steps.

numpy only. Every random number comes from a `seed`, so a report is the same each time it is made.
A caller's mistake (an empty array, a share of nothing) raises ValueError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jaxgrpo.stats import Interval, tails
from jaxgrpo.study.gradient_types import Range, TopShare, View


def shares(norms: np.ndarray) -> np.ndarray:
    """Each layer's share of the run's total [L], from its norms at every step [T, L].

    share_l = sum_t norms[t, l] / sum_(t, l) norms[t, l]: the importance of arXiv 2605.07366.
    """
    norms = np.asarray(norms, np.float64)
    if norms.ndim != 2 or not norms.size or not (np.isfinite(norms) & (norms >= 0)).all():
        raise ValueError(f"norms must be finite, not negative, [steps, layers]; got {norms.shape}")
    # Scaled first, so that no sum overflows.
    totals = (norms / max(norms.max(), np.finfo(np.float64).tiny)).sum(0)
    if totals.sum() <= 0:
        raise ValueError("every norm is 0: there is no total to share")
    return totals / totals.sum()


def max_min_ratio(shares: np.ndarray) -> float:
    """Largest over smallest share of [L]; infinite where a layer has none."""
    return float(_max_min(np.asarray(shares, np.float64)))


def _max_min(shares: np.ndarray) -> np.ndarray:
    low = shares.min(-1)
    return np.where(low > 0, shares.max(-1) / np.where(low > 0, low, 1), np.inf)


def top_count(layers: int, fraction: float) -> int:
    """max(1, floor(fraction L)) layers: 30 % of 28 are 8, as in arXiv 2605.07366."""
    if not 0 < fraction <= 1:
        raise ValueError(f"a fraction of the layers must be in (0, 1], not {fraction}")
    # 0.29 * 100 is 28.999999999999996.
    return max(1, math.floor(fraction * layers + 1e-9))


def top_share(shares: np.ndarray, fraction: float = 0.3) -> float:
    """What the `top_count` largest of the shares [L] hold together."""
    return float(_top(np.asarray(shares, np.float64), top_count(len(shares), fraction)))


def _top(shares: np.ndarray, count: int) -> np.ndarray:
    return np.sort(shares, axis=-1)[..., -count:].sum(-1)


def early_late_correlation(norms: np.ndarray) -> float | None:
    """Pearson correlation over layers of the first and second half's shares; norms [T, L].

    The middle step of an odd T is late. None where undefined: one step, equal shares, or a half
    whose norms are all 0.
    """
    half = len(norms) // 2
    if half < 1:
        return None
    early, late = (np.asarray(part, np.float64) for part in (norms[:half], norms[half:]))
    value = float(_correlation(early.sum(0), late.sum(0)))
    return value if math.isfinite(value) else None


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson over the last axis; NaN where a side is constant up to rounding."""
    a, b = _deviations(a), _deviations(b)
    spread_a, spread_b = (np.sqrt((side**2).sum(-1)) for side in (a, b))
    defined = (spread_a > 1e-12) & (spread_b > 1e-12)
    product = np.where(defined, spread_a * spread_b, 1)
    return np.where(defined, (a * b).sum(-1) / product, np.nan)


def _deviations(totals: np.ndarray) -> np.ndarray:
    """From their mean over the last axis, in units of it; 0 where all are 0."""
    mean = totals.mean(-1, keepdims=True)
    return totals / np.where(mean > 0, mean, 1) - (mean > 0)


@dataclass(frozen=True)
class Importance:
    """How gradient norm is spread over layers, with intervals over steps.

    Attributes:
        share, low, high: [L], each layer's share of the run's total and its interval.
        max_min: largest over smallest share.
        fraction, top_layers, top_share: that fraction of the layers, how many, what they hold.
        early_late_correlation: of the two halves' shares; None where undefined.
        block: steps drawn together.
    """

    share: np.ndarray
    low: np.ndarray
    high: np.ndarray
    max_min: Interval
    fraction: float
    top_layers: int
    top_share: Interval
    early_late_correlation: Interval | None
    block: int

    def to_json(self, heatmap: np.ndarray) -> View:
        """One view of a profile, as the report reads it; `heatmap` are the norms [L, T], of which
        a picture shows no more than four digits."""
        early_late = self.early_late_correlation
        top: TopShare = {
            "fraction": self.fraction,
            "layers": self.top_layers,
            "value": self.top_share.value,
            "low": self.top_share.low,
            "high": self.top_share.high,
        }
        return {
            "share": self.share.tolist(),
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "max_min": _range(self.max_min),
            "top_share": top,
            "early_late_correlation": None if early_late is None else early_late.value,
            "heatmap": [[float(f"{norm:.4g}") for norm in layer] for layer in heatmap],
        }


def importance(
    norms: np.ndarray,
    *,
    fraction: float = 0.3,
    block: int | None = None,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Importance:
    """Shares of norms [T, L] and their summaries, with moving-block intervals over steps.

    Blocks (`block` steps, by default about T^(1/3)) are drawn inside each half of the run, so that
    a trend is no noise and the halves can be compared. The intervals are about this run's sampling
    noise, not about other seeds. Noise spreads shares and lowers correlations, so the interval of a
    ratio leans high and of a correlation low; with few noisy steps it may not even hold the value.
    """
    norms = np.asarray(norms, np.float64)
    share = shares(norms)
    steps, layers = norms.shape
    half = steps // 2
    if half < 1:
        raise ValueError("intervals over steps need at least two steps")
    # At least two blocks a half, or every resample would be the half itself.
    length = max(1, min(half // 2, round(steps ** (1 / 3)))) if block is None else block
    rng = np.random.default_rng(seed)
    scaled = norms / norms.max()
    early = _resampled_sums(scaled[:half], length, resamples, rng)
    late = _resampled_sums(scaled[half:], length, resamples, rng)
    totals = early + late
    drawn = totals / np.maximum(totals.sum(1, keepdims=True), np.finfo(np.float64).tiny)
    low, high = np.quantile(drawn, tails(confidence), axis=0)
    count = top_count(layers, fraction)
    correlation = early_late_correlation(norms)
    correlations = _correlation(early, late)
    correlations = correlations[np.isfinite(correlations)]
    return Importance(
        share=share,
        low=low,
        high=high,
        max_min=_percentile(max_min_ratio(share), _max_min(drawn), confidence),
        fraction=fraction,
        top_layers=count,
        top_share=_percentile(top_share(share, fraction), _top(drawn, count), confidence),
        early_late_correlation=None
        if correlation is None or not len(correlations)
        else _percentile(correlation, correlations, confidence),
        block=length,
    )


def _resampled_sums(
    norms: np.ndarray, block: int, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    return _counts(_block_indices(len(norms), block, resamples, rng)) @ norms


def _block_indices(
    n: int, block: int, resamples: int, rng: np.random.Generator
) -> np.ndarray:  # [resamples, n]
    if not 1 <= block <= n or resamples < 1:
        raise ValueError(f"cannot draw {resamples} resamples of {n} values in blocks of {block}")
    starts = rng.integers(0, n - block + 1, (resamples, -(-n // block), 1))
    return (starts + np.arange(block)).reshape(resamples, -1)[:, :n]


def _counts(indices: np.ndarray) -> np.ndarray:
    """How often each of the n values is drawn, [resamples, n], from indices of that shape."""
    resamples, n = indices.shape
    flat = (indices + n * np.arange(resamples)[:, None]).ravel()
    return np.bincount(flat, minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def _percentile(value: float, samples: np.ndarray, confidence: float) -> Interval:
    # "nearest" ranks, because between an infinite ratio and another lies no number.
    method = "linear" if np.isfinite(samples).all() else "nearest"
    low, high = np.quantile(samples, tails(confidence), method=method)
    return Interval(value, float(low), float(high))


def _range(interval: Interval) -> Range:
    """What is not finite (a ratio over an idle layer) becomes null."""
    low, value, high = (
        x if math.isfinite(x) else None for x in (interval.low, interval.value, interval.high)
    )
    return {"value": value, "low": low, "high": high}
