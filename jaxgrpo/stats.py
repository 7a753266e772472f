"""Intervals and tests: of one accuracy, of differences between runs, of many p-values together.

No jax. The unit of inference is the run: what an arm's accuracies over seeds leave unexplained is
what another run of the same arm would move by. Accuracies are fractions in [0, 1]; answers may be
fractions too (the mean of several samples). A caller's mistake raises ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtri, ndtri, stdtr, stdtrit


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927, JASA 22).

    The rates p with |successes/n - p| <= z sqrt(p (1 - p) / n). Unlike the Wald interval it stays
    inside [0, 1] and has a width at 0 and at n. `successes` may be fractional (means of samples).
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a proportion needs 0 <= successes <= n, n >= 1, not {successes} of {n}")
    rate, z = successes / n, float(ndtri(tails(confidence)[1]))
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # At 0 and n the score equation has the rate itself as a root; rounding must not miss it.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(rate, low, high)


def sign_flip_exact(differences: np.ndarray) -> float:
    """Two-sided exact p of the sign-flip permutation test (Fisher 1935) on whole numbers [N].

    Under "no difference" each item's difference keeps its size and has either sign with probability
    1/2; p is the share of the 2^N sign patterns with |sum| at least the one seen. Equal sizes make
    a binomial each, so the whole distribution is a convolution and nothing is sampled. With sizes
    of 0 and 1 it is McNemar's exact test.
    """
    values = np.asarray(differences)
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"the sign-flip test takes whole numbers, not {values.dtype}")
    values = values // max(int(np.gcd.reduce(values, initial=0)), 1)
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


def holm_levels(p_values: Sequence[float], alpha: float = 0.05) -> list[float]:
    """The level at which Holm's procedure tests each p, in the given order.

    alpha / (m - i) for the i-th smallest (from 0) until the first that fails, and that one's level
    for all after it. An interval of confidence 1 - level excludes 0 exactly where the adjusted p is
    at most alpha. The intervals of those that fail are simultaneous (Guilbaud 2008, Biometrical
    Journal 50); of those that pass, the sign is, while each width is of its own step.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    levels = np.empty_like(p)
    failed = None
    for place, index in enumerate(order):
        level = failed if failed is not None else alpha / (len(p) - place)
        levels[index] = level
        if p[index] > level:
            failed = level
    return levels.tolist()


def tails(confidence: float) -> tuple[float, float]:
    """The two quantiles of a central interval."""
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence must be between 0 and 1, not {confidence}")
    return (1 - confidence) / 2, (1 + confidence) / 2


@dataclass(frozen=True)
class Residual:
    """How much a run moves by itself: what arm and seed leave of the accuracies.

    Attributes:
        sd: residual standard deviation of a run, with `df` degrees of freedom.
        low, high: its 95 % interval (chi-squared).
    """

    sd: float
    df: int
    low: float
    high: float


@dataclass(frozen=True)
class RunContrast:
    """A weighted sum of arms' mean accuracies, with the run as its unit.

    Attributes:
        difference: the estimate.
        run_variance: from the residual of the two-way layout, with `run_df` degrees of freedom.
        item_variance: what the arms' own easy and hard items add, which no seed shows; with
            `item_df`.
        answer_variance: the part of run_variance that single answers' noise must give, known from
            the items.
        per_seed: the same sum within each seed, [S].
        fixed: the difference over other items, were these trained models all there are.
    """

    difference: float
    run_variance: float
    run_df: int
    item_variance: float
    item_df: int
    answer_variance: float
    per_seed: np.ndarray
    fixed: Interval

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.run_variance + self.item_variance)

    @property
    def df(self) -> float:
        """Of the two variances together (Satterthwaite 1946, Biometrics Bulletin 2).

        A residual of few df that is smaller by chance than its answers' noise would leave the
        items' share, and with it the df, too large: that noise is the least that is counted.
        """
        run, item = max(self.run_variance, self.answer_variance), self.item_variance
        parts = run**2 / self.run_df + item**2 / self.item_df
        return (run + item) ** 2 / parts if parts else float(self.run_df)

    @property
    def p(self) -> float:
        """Two-sided, of no difference."""
        return min(1.0, 2 * self._upper(abs(self.difference)))

    def p_equivalent(self, margin: float) -> float:
        """The larger of the two one-sided p of a difference outside (-margin, margin)
        (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15)."""
        return max(self._upper(margin - self.difference), self._upper(margin + self.difference))

    def interval(self, confidence: float = 0.95) -> Interval:
        """From the same t as `p`; excludes 0 exactly where p < 1 - confidence."""
        half = self.standard_error * float(stdtrit(self.df, tails(confidence)[1]))
        return Interval(self.difference, self.difference - half, self.difference + half)

    def detectable(self, alpha: float = 0.05, power: float = 0.8, factor: float = 1.0) -> float:
        """The true difference that is found with this power at this two-sided level.

        (t_(1 - alpha/2) + t_power) standard errors. `factor` multiplies the residual sd.
        """
        error = math.sqrt(self.run_variance * factor**2 + self.item_variance)
        return error * float(stdtrit(self.df, 1 - alpha / 2) + stdtrit(self.df, power))

    def _upper(self, distance: float) -> float:
        """P[T > distance / standard error]."""
        if self.standard_error == 0:
            return 1.0 if distance < 0 else 0.5 if distance == 0 else 0.0
        return float(stdtr(self.df, -distance / self.standard_error))


class RunLayout:
    """Arms x seeds, every seed once in every arm, all judged on the same items.

    Accuracy = arm + seed + run (a two-way layout). The residual is pooled over all arms.

    Attributes:
        accuracy: [A, S].
        residual: None with one seed or one arm, which leave none.
    """

    def __init__(self, cells: np.ndarray) -> None:
        """Args: cells: [A, S, N], each answer's score in [0, 1]."""
        cells = np.asarray(cells, np.float64)
        if cells.ndim != 3 or not cells.size or not np.isfinite(cells).all():
            raise ValueError(f"needs [arms, seeds, items] without gaps, not {cells.shape}")
        self._cells = cells
        self.accuracy = cells.mean(axis=2)
        arms, seeds, _ = cells.shape
        rest = self.accuracy - self.accuracy.mean(axis=1, keepdims=True)
        self._seed_square = float((rest.mean(axis=0) ** 2).sum()) * arms
        rest = rest - rest.mean(axis=0)
        df = (arms - 1) * (seeds - 1)
        self.residual = None
        if df:
            square = float((rest**2).sum())
            low, high = (math.sqrt(square / float(chdtri(df, tail))) for tail in (0.025, 0.975))
            self.residual = Residual(math.sqrt(square / df), df, low, high)

    def contrast(self, weights: Sequence[float]) -> RunContrast:
        """The sum of weights [A] times the arms' accuracies.

        variance = sum(w^2) sd^2 / S + what arm x item adds: the items' own variance of the sum,
        less the share of single answers' noise, which the residual holds already. Taking the
        larger of the residual's and the items' variance instead would err too often where runs
        differ *and* arms have items of their own.

        With one seed only `difference`, `per_seed` and `fixed` mean anything.
        """
        w = np.asarray(weights, np.float64)
        arms, seeds, items = self._cells.shape
        if w.shape != (arms,):
            raise ValueError(f"needs a weight for each of {arms} arms, not {w.shape}")
        per_seed = w @ self.accuracy
        by_item = np.tensordot(w, self._cells.mean(axis=1), 1)
        over_items = float(by_item.var(ddof=1)) / items if items > 1 else 0.0
        half = float(ndtri(0.975)) * math.sqrt(over_items)
        value = float(per_seed.mean())
        fixed = Interval(value, max(-1.0, value - half), min(1.0, value + half))
        df = self.residual.df if self.residual else 0
        run = float((w**2).sum()) * self.residual.sd**2 / seeds if self.residual else math.nan
        noise = float(w**2 @ self._answer_noise())
        own = max(0.0, over_items - noise) if df else math.nan
        return RunContrast(value, run, df, own, max(items - 1, 1), noise, per_seed, fixed)

    def _answer_noise(self) -> np.ndarray:
        """[A]: variance of an arm's mean that comes from single answers, given item and run."""
        _, seeds, items = self._cells.shape
        if seeds == 1 or items == 1:
            return np.zeros(len(self._cells))
        rest = self._cells - self._cells.mean(axis=1, keepdims=True)
        rest = rest - rest.mean(axis=2, keepdims=True)
        return (rest**2).sum(axis=(1, 2)) / ((seeds - 1) * (items - 1)) / (seeds * items)

    def arm_interval(self, arm: int, confidence: float = 0.95) -> Interval:
        """One arm's accuracy, were it run again with other seeds and asked other items.

        The variance of a run, seeds' own share included, is pooled over arms; to it comes that of
        the items. With one seed it speaks of that one trained model. Where every answer is the same
        there is no variance, and Wilson's interval for the items takes its place.
        """
        cells = self._cells[arm]
        seeds, items = cells.shape
        value = float(cells.mean())
        if value in (0.0, 1.0):
            return wilson_interval(value * items, items, confidence)
        over_items = float(cells.mean(axis=0).var(ddof=1)) / items if items > 1 else 0.0
        run, df = 0.0, math.inf
        if seeds > 1:
            arms = len(self._cells)
            from_seeds = self._seed_square / (seeds - 1) / arms
            rest = (arms - 1) * self.residual.sd**2 / arms if self.residual else 0.0
            parts = from_seeds**2 / (seeds - 1) + (
                rest**2 / self.residual.df if self.residual else 0.0
            )
            run = (from_seeds + rest) / seeds
            df = (from_seeds + rest) ** 2 / parts if parts else math.inf
            over_items = max(0.0, over_items - float(self._answer_noise()[arm]))
        total = run + over_items
        both = run**2 / df + over_items**2 / max(items - 1, 1)
        half = math.sqrt(total) * float(
            stdtrit(total**2 / both, tails(confidence)[1]) if both else 0.0
        )
        return Interval(value, max(0.0, value - half), min(1.0, value + half))
