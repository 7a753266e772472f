"""Slopes of a layer's gradient share over its rank, and which explanation of them survives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from jaxgrpo.stats import Interval

# ln(raw L2 share) per ln(rank) with no feedback at all: at initialisation ||dL/dB|| ~ scale sqrt(r)
# (the variance of A's entries is free of r), and under Adam ||B||, so ||dL/dA||, grows alike.
MECHANICAL_SLOPES: Mapping[str, float] = {"constant": 0.5, "rslora": 0.0, "alpha_over_r": -0.5}
SLOPE_MARGIN = 0.1
"""A slope within this either way counts as none, for "follows rank" and for "does not". arXiv
2605.07366 shows max/min shares of 2.17 and 3.00 over a factor 2 in rank, a slope of 0.47: a fifth
of it."""


@dataclass(frozen=True)
class Fit:
    """A slope with two 95 % intervals.

    Attributes:
        low, high: by inverting the randomisation test; infinite where it excludes nothing.
        cr1_low, cr1_high: by the cluster-robust variance CR1, t with clusters - 1 df.
    """

    value: float
    low: float
    high: float
    cr1_low: float
    cr1_high: float

    @property
    def interval(self) -> Interval:
        return Interval(self.value, self.low, self.high)

    def verdict(self) -> Literal["follows", "does not", "open"]:
        """follows: beyond the margin; does not: wholly within it."""
        if self.low > SLOPE_MARGIN:
            return "follows"
        within = self.low > -SLOPE_MARGIN and self.high < SLOPE_MARGIN
        return "does not" if within else "open"


def fit_slope(
    log_rank: np.ndarray,
    log_ratio: np.ndarray,
    blocks: np.ndarray,
    clusters: np.ndarray,
    *,
    seed: int = 0,
    draws: int = 1999,
) -> Fit:
    """Least-squares slope of log_ratio [n] on log_rank [n], with an intercept for every block.

    log_ratio is ln(a layer's gradient / that under the reference plan): gradient ~ rank^slope.

    The ranks were drawn by us, every arrangement over a block's layers as likely as any other
    (a block is one draw and one module). So under slope b the ranks might as well have stood in
    another order, and |sum of rank x (log_ratio - b log_rank)| is compared with that of `draws`
    such orders; the b that are not rejected at 5 % are the interval (Rosenbaum 2002, Observational
    Studies, section 2.6). It needs no model of how adapters of a run depend on each other.

    The reference must come from another run than the one the ranks were made from. Else a layer
    that looked hot by noise has both more rank and a smaller ratio, which lowers the slope.

    Args:
        clusters: [n], layers, for the second interval (Cameron and Miller 2015, J. Hum. Resour.).

    Raises:
        ValueError: fewer than two clusters, ranks that are all equal, or a value not finite.
    """
    x, y = np.asarray(log_rank, np.float64), np.asarray(log_ratio, np.float64)
    if not (x.ndim == 1 and x.shape == y.shape == np.shape(blocks) == np.shape(clusters)):
        raise ValueError(f"one shape [n] each, not {x.shape}, {y.shape}, {np.shape(clusters)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a logarithm is not finite: leave out layers of rank 0 or share 0")
    names, cluster = np.unique(clusters, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"a slope with an interval needs two clusters or more, not {len(names)}")
    rows = [np.flatnonzero(np.asarray(blocks) == block) for block in np.unique(blocks)]
    for row in rows:
        x[row], y[row] = x[row] - x[row].mean(), y[row] - y[row].mean()
    square = float(x @ x)
    if square <= 1e-12:
        raise ValueError("every rank is the same, so a slope over rank is not defined")
    value = float(x @ y) / square
    scores = np.bincount(cluster, weights=x * (y - value * x))
    count, parameters = len(names), len(rows) + 1
    correction = count / (count - 1) * (len(x) - 1) / max(len(x) - parameters, 1)
    error = math.sqrt(correction * float(scores @ scores)) / square
    half = float(stdtrit(count - 1, 0.975)) * error
    rng = np.random.default_rng(seed)
    with_y, with_x = np.zeros(draws), np.zeros(draws)
    for row in rows:
        orders = np.argsort(rng.random((draws, len(row))), axis=1)
        moved = x[row][orders]
        with_y += moved @ y[row]
        with_x += moved @ x[row]
    # An order is at least as extreme as ours for the b between two roots, one on each side.
    gap_less, gap_more = square - with_x, square + with_x
    unit = 1e-9 * square
    one = np.where(gap_less > unit, (square * value - with_y) / np.maximum(gap_less, unit), np.nan)
    two = np.where(gap_more > unit, (square * value + with_y) / np.maximum(gap_more, unit), np.nan)
    lows, highs = np.fmin(one, two), np.fmax(one, two)
    # Our own order, and those equal to it up to a sign, are as extreme whatever b is.
    always = np.isnan(one) | np.isnan(two)
    lows, highs = np.where(always, -np.inf, lows), np.where(always, np.inf, highs)
    rank = math.floor(0.05 * (draws + 1))
    low, high = float(np.sort(lows)[rank - 1]), float(np.sort(highs)[::-1][rank - 1])
    return Fit(value, low, high, value - half, value + half)


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
    prediction if its whole interval is within `SLOPE_MARGIN` of it and contradicts it if the
    interval is wholly outside; rslora's prediction of 0 can only contradict, being also what no
    effect at all gives.
    """
    unknown = set(slope_by_rule) - set(MECHANICAL_SLOPES)
    if unknown:
        raise ValueError(f"no prediction for {sorted(unknown)}, only {sorted(MECHANICAL_SLOPES)}")
    feedback = None
    if rank_free is not None:
        positive = rank_free.low > SLOPE_MARGIN
        bounded = rank_free.low > -SLOPE_MARGIN and rank_free.high < SLOPE_MARGIN
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
    words = {
        "mechanical": "The layers' raw gradient shares follow rank as the LoRA parameterisation "
        "alone predicts, and rank draws no gradient to a layer beyond that",
        "feedback": "More rank draws gradient to a layer, and the raw shares do not "
        "follow the scale rule as the parameterisation predicts",
        "both": "The scale rule moves the raw shares as the parameterisation predicts, and on top "
        "of that more rank draws gradient to a layer",
        "neither": "The shares follow neither the scale rule's prediction nor a feedback: rank "
        "draws no gradient to a layer, and the raw shares have another cause",
    }[label]
    return label, f"{words}. {numbers}"


def _fits(slope: Interval, prediction: float) -> bool | None:
    below, above = prediction - SLOPE_MARGIN, prediction + SLOPE_MARGIN
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
