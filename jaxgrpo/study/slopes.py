"""Slopes of a layer's gradient share over its rank, and which explanation of them survives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
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

    def verdict(self) -> Literal["follows", "against", "does not", "open"]:
        """follows: beyond the margin; against: below it; does not: wholly within it."""
        if self.low > SLOPE_MARGIN:
            return "follows"
        if self.high < -SLOPE_MARGIN:
            return "against"
        within = self.low > -SLOPE_MARGIN and self.high < SLOPE_MARGIN
        return "does not" if within else "open"


class RankDesign:
    """Ranks as they were drawn, and as they might have been, to fit slopes over."""

    def __init__(
        self, log_rank: np.ndarray, by_layer: np.ndarray, seed: int = 0, orders: int = 1999
    ) -> None:
        """Args:
        log_rank: [D, M, L], the draws' ranks of every module and layer.
        by_layer: bool [D]: the modules of a layer had one rank, so that they are moved together.
        orders: how many other orders of the layers are drawn.
        """
        self._log_rank = np.asarray(log_rank, np.float64)
        self._by_layer = np.asarray(by_layer, bool)
        if self._log_rank.ndim != 3 or self._by_layer.shape != self._log_rank.shape[:1]:
            raise ValueError(f"[D, M, L] and [D], not {np.shape(log_rank)}, {np.shape(by_layer)}")
        self._seed, self._orders = seed, orders

    def fit(self, log_ratio: np.ndarray) -> Fit | None:
        """Least-squares slope of log_ratio on log_rank, every adapter being its own control.

        log_ratio is ln(a layer's gradient / that of the uniform run of the same seed): gradient ~
        rank^slope. An intercept for every adapter, and one for every draw and module, are taken
        out.

        The ranks were given to layers in an order drawn by us, every other as likely. So under
        slope b the layers might as well have stood in another order, and |sum of rank x (log_ratio
        - b log_rank)| over the root of the ranks' own sum of squares is compared with that of such
        orders; the b that are not rejected at 5 % are the interval (Rosenbaum 2002, Observational
        Studies, section 2.6). It needs no model of how adapters of a run depend on each other. It
        is exact where all layers have one slope; where they differ it is about the mean of these
        layers, and wider than it need be, since every adapter goes through the same ranks.

        Args:
            log_ratio: [S, D, M, L], measured under S scale rules; not finite where it was not.
                A draw in which nothing was measured is left out, and then an adapter that was not
                measured in every draw; None, if fewer than two draws or two layers are left.

        Raises:
            ValueError: another shape, or ranks that are all equal.
        """
        x, y = self._log_rank, np.asarray(log_ratio, np.float64)
        if y.shape[1:] != x.shape:
            raise ValueError(f"needs [S, {', '.join(map(str, x.shape))}], not {y.shape}")
        there = np.isfinite(y).any(axis=(2, 3)).all(axis=0)
        if not there.all():
            part = RankDesign(x[there], self._by_layer[there], self._seed, self._orders)
            return part.fit(y[:, there])
        keep = np.asarray(np.isfinite(y).all(axis=1))  # [S, M, L]
        layers = int(keep.any(axis=(0, 1)).sum())
        if len(x) < 2 or layers < 2:
            return None
        own, rest = _within(x[None], keep), _within(np.where(keep[:, None], y, 0.0), keep)
        square = float((own * own).sum())
        if square <= 1e-12:
            raise ValueError("every rank is the same, so a slope over rank is not defined")
        value = float((own * rest).sum()) / square
        half = _cr1_error(own, rest - value * own, keep) * float(stdtrit(layers - 1, 0.975))
        if keep.all():  # then the ranks are the same under every rule
            moved, length = self._moved
            own, rest = (one.sum(axis=0, keepdims=True) for one in (own, rest))
            length = length * math.sqrt(len(y))
        else:
            moved, length = self._others(keep)
        with_y, with_x = (
            math.sqrt(square) / length * np.tensordot(moved, one, 4) for one in (rest, own)
        )
        low, high = _not_rejected(value, square, with_y, with_x)
        return Fit(value, low, high, value - half, value + half)

    @cached_property
    def _moved(self) -> tuple[np.ndarray, np.ndarray]:
        return self._others(np.ones((1, *self._log_rank.shape[1:]), bool))

    def _others(self, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ranks [K, S, D, M, L], had the layers stood in other orders, without intercepts; and
        the root of their sum of squares, [K].

        A module has one order for the draws that give adapters ranks of their own; all modules
        have one for those that give them to layers.
        """
        rng = np.random.default_rng(self._seed)
        _, modules, layers = self._log_rank.shape
        apart = rng.random((self._orders, 1, modules, layers)).argsort(axis=-1)
        one = rng.random((self._orders, 1, 1, layers)).argsort(axis=-1)
        orders = np.where(self._by_layer[:, None, None], one, apart)
        moved = np.take_along_axis(self._log_rank[None], orders, axis=-1)
        moved = _within(moved[:, None], keep)
        return moved, np.sqrt(np.einsum("ksdml,ksdml->k", moved, moved))


def _within(values: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """[..., S, D, M, L] less the means of its adapters and of its draws' modules; 0 off `keep`."""
    mask = keep[:, None]
    count = np.maximum(mask.sum(axis=-1, keepdims=True), 1)
    values = (values - values.mean(axis=-3, keepdims=True)) * mask
    return (values - values.sum(axis=-1, keepdims=True) / count) * mask


def _cr1_error(own: np.ndarray, rest: np.ndarray, keep: np.ndarray) -> float:
    """The slope's standard error by CR1 over layers (Cameron and Miller 2015, J. Hum. Resour.).

    Intercepts of adapters lie within layers and cost no degrees of freedom.
    """
    scores = (own * rest).sum(axis=(0, 1, 2))
    draws = own.shape[1]
    layers, values = int(keep.any(axis=(0, 1)).sum()), draws * int(keep.sum())
    parameters = draws * int(keep.any(axis=2).sum()) + 1
    correction = layers / (layers - 1) * (values - 1) / max(values - parameters, 1)
    return math.sqrt(correction * float(scores @ scores)) / float((own * own).sum())


def _not_rejected(
    value: float, square: float, with_y: np.ndarray, with_x: np.ndarray
) -> tuple[float, float]:
    """The slopes that at least 5 % of the orders, ours among them, are as extreme under."""
    # An order is at least as extreme as ours for the b between two roots, one on each side.
    gap_less, gap_more = square - with_x, square + with_x
    unit = 1e-9 * square
    one = np.where(gap_less > unit, (square * value - with_y) / np.maximum(gap_less, unit), np.nan)
    two = np.where(gap_more > unit, (square * value + with_y) / np.maximum(gap_more, unit), np.nan)
    lows, highs = np.fmin(one, two), np.fmax(one, two)
    # Our own order, and those equal to it up to a sign, are as extreme whatever b is.
    always = np.isnan(one) | np.isnan(two)
    lows, highs = np.where(always, -np.inf, lows), np.where(always, np.inf, highs)
    rank = math.floor(0.05 * (len(with_y) + 1))
    return float(np.sort(lows)[rank - 1]), float(np.sort(highs)[::-1][rank - 1])


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
        "alone predicts, and rank draws no gradient to a layer beyond that (slopes within "
        f"{SLOPE_MARGIN:g})",
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
