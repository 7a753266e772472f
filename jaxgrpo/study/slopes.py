"""Slopes of a layer's gradient share over its rank, and which explanation of them survives."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxgrpo.stats import Interval
from jaxgrpo.study.importance import _block_indices, _counts, _percentile

# ln(raw L2 share) per ln(rank) with no feedback at all: at initialisation ||dL/dB|| ~ scale sqrt(r)
# (the variance of A's entries is free of r), and under Adam ||B||, so ||dL/dA||, grows alike.
MECHANICAL_SLOPES: Mapping[str, float] = {"constant": 0.5, "rslora": 0.0, "alpha_over_r": -0.5}
# Half the distance between two of those: an interval inside it fits one prediction alone.
SLOPE_TOLERANCE = 0.25


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
