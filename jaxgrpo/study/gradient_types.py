"""What results.json holds about gradients, as types."""

from __future__ import annotations

from typing import Literal, TypedDict


class Range(TypedDict):
    """An estimate with its interval; null where a number is not finite."""

    value: float | None
    low: float | None
    high: float | None


class SlopePart(TypedDict):
    """One slope of ln share on ln rank."""

    phase: Literal["all", "first third", "middle third", "last third"]
    draws: Literal["all", "by layer"]
    """by layer: those in which the modules of a layer share a rank."""
    matrix: Literal["both", "A", "B", "W"]
    """W: the frozen weight's own gradient, which no rank enters."""
    slope: float
    low: float
    high: float
    """95 % by inverting the randomisation test: the ranks were drawn, and are drawn again."""
    cr1_low: float
    cr1_high: float
    """95 % by cluster-robust variance (CR1) over layers, t with layers - 1 df."""
    verdict: Literal["follows", "against", "does not", "open"]
    """follows: the slope exceeds the margin; against: it is below the margin's negative; does not:
    its interval lies within it."""


class Amplification(TypedDict):
    """How an adapter's share of the gradient depends on the rank level it was given."""

    scale_rule: str
    view: str
    predicted: float
    slope: float
    low: float
    high: float
    margin: float
    parts: list[SlopePart]
    words: str


class Spread(TypedDict):
    """Largest over smallest layer share of a plan's runs, and of the uniform runs of their seeds:
    geometric mean and range over seeds."""

    run: str
    seeds: int
    uniform: list[Range]
    """By thirds of the steps, then over all of them."""
    own: list[Range]
    foretold: Range | None
    """Over all steps, what ranks and scales alone make of the uniform runs; null where ranks
    moved."""


class Landscape(TypedDict):
    """How uniform runs spread the gradient over layers, means and ranges over seeds."""

    run: str
    objective: str
    seeds: int
    steps: int
    max_min: list[Range]
    """Largest over smallest layer share, by thirds of the steps, then over all of them: geometric
    means."""
    top_layers: int
    top_share: Range
    """What the top 30 % of the layers hold of all steps' norms."""
    early_late: Range
    """Correlation over layers of the first and the second half's shares."""


class TopShare(TypedDict):
    """What the given fraction of the layers, the largest, hold together."""

    fraction: float
    layers: int
    value: float
    low: float
    high: float


class View(TypedDict):
    share: list[float]
    low: list[float]
    high: list[float]
    max_min: Range
    top_share: TopShare
    early_late_correlation: float | None
    heatmap: list[list[float]]


class Profile(TypedDict):
    objective: str
    steps: int
    layers: int
    modules: list[str]
    views: dict[str, View]
