"""Statistics of a study: intervals, paired tests, layer shares, and how shares follow rank.

numpy only. Every random number comes from a `seed`, so a report is the same each time it is made.
A caller's mistake (an empty array, a share of nothing) raises ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np

# ln(raw L2 share) per ln(rank) with no feedback at all: at initialisation ||dL/dB|| ~ scale sqrt(r)
# (the variance of A's entries is free of r), and under Adam ||B||, so ||dL/dA||, grows alike.
MECHANICAL_SLOPES: Mapping[str, float] = {"constant": 0.5, "rslora": 0.0, "alpha_over_r": -0.5}
# Half the distance between two of those: an interval inside it fits one prediction alone.
SLOPE_TOLERANCE = 0.25


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Plain floats; what is not finite (a ratio over an idle layer) becomes null."""
        return {k: float(v) if math.isfinite(v) else None for k, v in asdict(self).items()}


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927, JASA 22).

    The rates p with |successes/n - p| <= z sqrt(p (1 - p) / n). Unlike the Wald interval it stays
    inside [0, 1] and has a width at 0 and at n. `successes` may be fractional (means of samples).
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a proportion needs 0 <= successes <= n, n >= 1, not {successes} of {n}")
    rate, z = successes / n, _z(confidence)
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # At 0 and n the score equation has the rate itself as a root; rounding must not miss it.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(rate, low, high)


def two_proportion_test(a_successes: float, a_n: int, b_successes: float, b_n: int) -> float:
    """Two-sided p of the unpaired z test with the pooled rate p (standard under "no difference").

    z = (a/n_a - b/n_b) / sqrt(p (1 - p) (1/n_a + 1/n_b)). For published accuracies only: ours share
    their items, so `paired_difference` is the sharper test.
    """
    for successes, n in ((a_successes, a_n), (b_successes, b_n)):
        if n < 1 or not 0 <= successes <= n:
            raise ValueError(f"a proportion needs 0 <= successes <= n, not {successes} of {n}")
    pooled = (a_successes + b_successes) / (a_n + b_n)
    variance = pooled * (1 - pooled) * (1 / a_n + 1 / b_n)
    if variance <= 0:
        return 1.0
    z = (a_successes / a_n - b_successes / b_n) / math.sqrt(variance)
    return math.erfc(abs(z) / math.sqrt(2))


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact p of McNemar's test (McNemar 1947): are discordant items a fair coin?

    p = min(1, 2 P[Binomial(only_a + only_b, 1/2) <= min(only_a, only_b)]), summed in integers, so
    exact at any count. 1 where no item is discordant.
    """
    n, k = only_a + only_b, min(only_a, only_b)
    if k < 0:
        raise ValueError(f"counts cannot be negative, as in {only_a} and {only_b}")
    term, tail = 1, 1
    for i in range(k):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def sign_flip_exact(differences: np.ndarray) -> float:
    """Two-sided exact p of the sign-flip permutation test (Fisher 1935) on whole numbers [N].

    Under "no difference" each item's difference keeps its size and has either sign with probability
    1/2; p is the share of the 2^N sign patterns with |sum| at least the one seen. Equal sizes make
    a binomial each, so the whole distribution is a convolution and nothing is sampled. With sizes
    of 0 and 1 it is `mcnemar_exact`.
    """
    values = np.asarray(differences)
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"the sign-flip test takes whole numbers, not {values.dtype}")
    sizes, counts = np.unique(np.abs(values[values != 0]), return_counts=True)
    distribution = np.ones(1)  # of the sum of the positive differences
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        spread = np.zeros(size * count + 1)
        spread[::size] = _fair_binomial(count)
        distribution = np.convolve(distribution, spread)
    total = len(distribution) - 1
    extreme = np.abs(2 * np.arange(total + 1) - total) >= abs(int(values.sum()))
    return min(1.0, float(distribution[extreme].sum()))


def _fair_binomial(n: int) -> np.ndarray:
    """P[Binomial(n, 1/2) = k] for k = 0..n, in log space, so that large n does not overflow."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    return np.exp(log_factorial[n] - log_factorial - log_factorial[::-1] - n * math.log(2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the given order (Holm 1979, Scand. J. Stat. 6).

    The i-th smallest of m (i from 0) becomes max over j <= i of min(1, (m - j) p_j).
    """
    p = np.asarray(p_values, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values must lie in [0, 1]")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    factors = np.arange(len(p), 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, factors * p[order]))
    return adjusted.tolist()


def minimum_detectable_effect(
    n: int,
    rate: float,
    discordance: float | None = None,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float:
    """The smallest true accuracy difference that a paired comparison of n items resolves.

    Connor (1987, Biometrics 43): n d^2 = (z_(alpha/2) sqrt(q) + z_power sqrt(q - d^2))^2, solved
    for d, with q the discordant share. Without one, q = 2 rate (1 - rate): arms that agree no more
    often than by chance, the worst case unless they oppose each other. A difference of d makes at
    least d of the items discordant, so q is never taken below d.
    The spread of seeds is not in it and comes on top.
    """
    if n < 1 or not 0 <= rate <= 1:
        raise ValueError(f"needs n >= 1 and a rate in [0, 1], not {n} and {rate}")
    if discordance is not None and not 0 <= discordance <= 1:
        raise ValueError(f"the discordant share must be in [0, 1], not {discordance}")
    q = 2 * rate * (1 - rate) if discordance is None else discordance
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    root = math.sqrt(max(0.0, n + z_power**2 - z_alpha**2))
    per_root_q = (math.sqrt(n) * z_alpha + z_power * root) / (n + z_power**2)
    # d = k sqrt(q), and with q = d that is d = k^2.
    return min(1.0, per_root_q * max(math.sqrt(q), per_root_q))


def bootstrap_interval(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    *,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
    block: int = 1,
) -> Interval:
    """Percentile bootstrap over the first axis (Efron 1979) of `statistic(values [N, ...])`.

    `block` > 1 is the moving-block bootstrap (Künsch 1989): runs of that many neighbours are drawn,
    which keeps the correlation of successive training steps. About N^(1/3) is usual.

    Raises:
        ValueError: no values, a block longer than them, or a statistic that is not finite.
    """
    values = np.asarray(values)
    rng = np.random.default_rng(seed)
    indices = _block_indices(len(values), block, resamples, rng)
    samples = np.array([statistic(values[rows]) for rows in indices], np.float64)
    value = float(statistic(values))
    if not (math.isfinite(value) and np.isfinite(samples).all()):
        raise ValueError("the statistic is not finite on these values or on a resample of them")
    return _percentile(value, samples, confidence)


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
    low, high = np.quantile(samples, _tails(confidence), method=method)
    return Interval(value, float(low), float(high))


def _tails(confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence must be between 0 and 1, not {confidence}")
    return (1 - confidence) / 2, (1 + confidence) / 2


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(_tails(confidence)[1])


def accuracy_interval(
    correct: np.ndarray, *, seed: int = 0, resamples: int = 2000, confidence: float = 0.95
) -> Interval:
    """Mean accuracy of `correct` [S, N] over seeds and items; interval by a two-way bootstrap.

    Seeds and items are crossed: each resample draws items and, independently, seeds (see
    `_two_way_means`). With S = 1 only items are drawn, so the interval speaks of that one trained
    model and says nothing about other seeds. With 2 or 3 seeds their spread is estimated without
    bias but from almost nothing: where seeds do differ the interval covers less than it claims.
    If all answers are right, or all wrong, Wilson's interval for N items takes its place.
    """
    cells = _cells(correct)
    value = float(cells.mean())
    if value in (0.0, 1.0):
        return wilson_interval(value * cells.shape[1], cells.shape[1], confidence)
    means = _two_way_means(cells, np.random.default_rng(seed), resamples)
    return _percentile(value, np.clip(means, 0, 1), confidence)


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of a minus accuracy of b on the same items.

    Attributes:
        difference: mean over seeds and items.
        low, high: its two-way bootstrap interval; seeds count as a sample of seeds.
        p: exact sign-flip p over items; the one to report. It is about these trained models.
        p_mcnemar: exact McNemar p of the counts below; with S > 1 it takes an item's S answers for
            S independent items, which they are not.
        only_a, only_b: (seed, item) pairs that only a, or only b, has right.
        discordance: mean over items of (mean over seeds of a - b)^2; with S = 1 the discordant
            share. What `minimum_detectable_effect` takes.
    """

    difference: float
    low: float
    high: float
    p: float
    p_mcnemar: float
    only_a: int
    only_b: int
    discordance: float

    def to_json(self) -> dict[str, float | int]:
        return asdict(self)


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> PairedDifference:
    """Compares two arms, bool [S, N] each: the same items, seeds paired by their index.

    The interval is `accuracy_interval`'s two-way bootstrap on a - b; p flips the sign of an item's
    whole difference (`sign_flip_exact`), so that its S answers stand or fall together. The two can
    disagree when seeds differ much: then believe the interval, since p holds the seeds fixed.
    """
    a, b = _cells(a), _cells(b)
    if a.shape != b.shape:
        raise ValueError(f"paired arms need one shape [S, N], not {a.shape} and {b.shape}")
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError("a paired comparison needs right or wrong, not a score between")
    cells = a - b
    means = _two_way_means(cells, np.random.default_rng(seed), resamples)
    interval = _percentile(float(cells.mean()), np.clip(means, -1, 1), confidence)
    only_a, only_b = int((cells > 0).sum()), int((cells < 0).sum())
    return PairedDifference(
        difference=interval.value,
        low=interval.low,
        high=interval.high,
        p=sign_flip_exact(cells.sum(0).astype(np.int64)),
        p_mcnemar=mcnemar_exact(only_a, only_b),
        only_a=only_a,
        only_b=only_b,
        discordance=float((cells.mean(0) ** 2).mean()),
    )


def _cells(correct: np.ndarray) -> np.ndarray:
    cells = np.asarray(correct, np.float64)
    if cells.ndim != 2 or not cells.size or not np.isfinite(cells).all():
        raise ValueError(f"needs [seeds, items] without gaps, not the shape {cells.shape}")
    return cells


def _two_way_means(cells: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Bootstrap means [resamples] of cells [S, N] whose rows and columns are both samples.

    Model: cell = mean + seed effect + item effect + rest. Drawing rows and columns of the table
    outright (the pigeonhole bootstrap, Owen 2007) counts the variance of the rest up to three
    times. Here item means are drawn, which carry the rest once, and to them is added a draw of the
    seeds' effects, scaled to the moment estimate of their own variance, without the share of the
    rest and with the S / (S - 1) that S values lack (Davison and Hinkley 1997, section 3.8).
    """
    seeds, items = cells.shape
    means = _resampled_means(cells.sum(0), rng, resamples) / seeds
    if seeds == 1:
        return means
    effects = cells.mean(1) - cells.mean()
    rest = cells - cells.mean(0) - effects[:, None]
    observed = (effects**2).sum() / (seeds - 1)
    noise = (rest**2).sum() / ((seeds - 1) * max(items - 1, 1)) / items
    if observed <= noise:
        return means
    factor = math.sqrt((1 - noise / observed) * seeds / (seeds - 1))
    return means + factor * _resampled_means(effects, rng, resamples)


def _resampled_means(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    # Answers take few distinct values: drawing how often each occurs is the same and far cheaper.
    distinct, counts = np.unique(values, return_counts=True)
    draws = rng.multinomial(len(values), counts / len(values), size=resamples)
    return draws @ distinct / len(values)


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

    def to_json(self) -> dict:
        """One view of a profile, as the report reads it."""
        early_late = self.early_late_correlation
        top = {"fraction": self.fraction, "layers": self.top_layers}
        return {
            "share": self.share.tolist(),
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "max_min": self.max_min.to_json(),
            "top_share": top | self.top_share.to_json(),
            "early_late_correlation": None if early_late is None else early_late.value,
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
    low, high = np.quantile(drawn, _tails(confidence), axis=0)
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


def log_log_slope(
    log_rank: np.ndarray,
    log_ratio: np.ndarray,
    clusters: np.ndarray | None = None,
    *,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Least-squares slope, with intercept, of log_ratio [n] on log_rank [n].

    log_ratio is ln(a layer's share / its share under the reference plan): share ~ rank^slope. The
    interval is a percentile cluster bootstrap (Cameron, Gelbach and Miller 2008): whole clusters
    [n] (layers, say) are drawn, as their points are not independent; without them each point is
    its own. Resamples in which all ranks are equal have no slope and are left out.

    The reference shares must come from another run than the one the ranks were made from. Else a
    layer that looked hot by noise has both more rank and a smaller ratio, which lowers the slope.

    Raises:
        ValueError: fewer than two clusters, ranks that are all equal, or a value not finite.
    """
    x, y = np.asarray(log_rank, np.float64), np.asarray(log_ratio, np.float64)
    labels = np.arange(len(x)) if clusters is None else np.asarray(clusters)
    if not (x.ndim == 1 and x.shape == y.shape == labels.shape):
        raise ValueError(f"one shape [n] each, not {x.shape}, {y.shape} and {labels.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a logarithm is not finite: leave out layers of rank 0 or share 0")
    names, cluster = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"a slope with an interval needs two clusters or more, not {len(names)}")
    if np.ptp(x) <= 1e-12:
        raise ValueError("every rank is the same, so a slope over rank is not defined")
    x, y = x - x.mean(), y - y.mean()
    sums = np.zeros((len(names), 5))
    np.add.at(sums, cluster, np.stack([np.ones_like(x), x, y, x * x, x * y], axis=1))
    rng = np.random.default_rng(seed)
    drawn = _counts(_block_indices(len(names), 1, resamples, rng)) @ sums
    slopes = _slope(drawn)
    slopes = slopes[np.isfinite(slopes)]
    return _percentile(float(_slope(sums.sum(0))), slopes, confidence)


def _slope(sums: np.ndarray) -> np.ndarray:
    """Least-squares slope from (n, sum x, sum y, sum xx, sum xy) on the last axis, or NaN."""
    n, x, y, xx, xy = np.moveaxis(sums, -1, 0)
    variance = xx - x * x / n
    return np.where(
        variance > 1e-12, (xy - x * y / n) / np.where(variance > 1e-12, variance, 1), np.nan
    )


def explanation(
    slope_by_rule: Mapping[str, Interval], rank_free: Interval | None
) -> tuple[str, str]:
    """Which explanation of a share that follows rank survives: (label, sentence).

    Args:
        slope_by_rule: scale rule -> slope of the raw L2 share over rank. Parameterisation alone
            predicts `MECHANICAL_SLOPES`; with feedback of slope f it predicts those plus f.
        rank_free: slope of the share of ||dL/dW||, which no rank or scale enters: 0 without
            feedback, positive if rank really draws gradient. None if not measured.

    The label is "mechanical", "feedback", "both", "neither" or "undecided". A slope fits a
    prediction if its whole interval is within `SLOPE_TOLERANCE` of it and contradicts it if the
    interval is wholly outside; rslora's prediction of 0 can only contradict, being also what no
    effect at all gives.
    """
    unknown = set(slope_by_rule) - set(MECHANICAL_SLOPES)
    if unknown:
        raise ValueError(f"no prediction for {sorted(unknown)}, only {sorted(MECHANICAL_SLOPES)}")
    feedback = None
    if rank_free is not None:
        positive, bounded = rank_free.low > 0, rank_free.high < SLOPE_TOLERANCE
        feedback = True if positive else False if bounded else None
    offset = rank_free.value if rank_free is not None and feedback else 0.0
    fits = {
        rule: _fits(slope, MECHANICAL_SLOPES[rule] + offset)
        for rule, slope in slope_by_rule.items()
    }
    mechanical = _verdict(fits)
    numbers = _numbers(slope_by_rule, rank_free)
    if mechanical is None or feedback is None:
        return "undecided", f"The data do not decide: {_open(mechanical, feedback)}. {numbers}"
    label = {
        (True, False): "mechanical",
        (False, True): "feedback",
        (True, True): "both",
        (False, False): "neither",
    }[mechanical, feedback]
    weakly = " a little" if rank_free is not None and rank_free.high < SLOPE_TOLERANCE else ""
    words = {
        "mechanical": "The layers' raw gradient shares follow rank as the LoRA parameterisation "
        "alone predicts, and rank draws no gradient to a layer beyond that",
        "feedback": f"More rank draws{weakly} gradient to a layer, and the raw shares do not "
        "follow the scale rule as the parameterisation predicts",
        "both": "The scale rule moves the raw shares as the parameterisation predicts, and on top "
        f"of that more rank draws{weakly} gradient to a layer",
        "neither": "The shares follow neither the scale rule's prediction nor a feedback: rank "
        "draws no gradient to a layer, and the raw shares have another cause",
    }[label]
    return label, f"{words}. {numbers}"


def _fits(slope: Interval, prediction: float) -> bool | None:
    below, above = prediction - SLOPE_TOLERANCE, prediction + SLOPE_TOLERANCE
    if below <= slope.low and slope.high <= above:
        return True
    return False if slope.high < below or slope.low > above else None


def _verdict(fits: Mapping[str, bool | None]) -> bool | None:
    telling = [fit for rule, fit in fits.items() if MECHANICAL_SLOPES[rule] != 0]
    if telling and all(fit is True for fit in fits.values()):
        return True
    return False if False in fits.values() and True not in telling else None


def _open(mechanical: bool | None, feedback: bool | None) -> str:
    missing = []
    if mechanical is None:
        missing.append("the raw shares' slopes fit no single prediction for every scale rule")
    if feedback is None:
        missing.append("the slope of the full-weight gradient is too uncertain or not measured")
    return "; ".join(missing)


def _numbers(slope_by_rule: Mapping[str, Interval], rank_free: Interval | None) -> str:
    parts = [
        f"{_quote(slope_by_rule[rule])} under {rule} (predicted {predicted:+g})"
        for rule, predicted in MECHANICAL_SLOPES.items()
        if rule in slope_by_rule
    ]
    raw = ", ".join(parts) if parts else "not measured"
    free = "not measured" if rank_free is None else f"{_quote(rank_free)} (0 without feedback)"
    return f"Slope of ln share over ln rank: raw L2 {raw}; full-weight gradient {free}."


def _quote(interval: Interval) -> str:
    value, low, high = (signed(x) for x in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def signed(value: float) -> str:
    """Two decimals with a sign, except of a zero."""
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text
