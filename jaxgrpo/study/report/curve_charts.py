"""Curves of training: reward, and drift between sampler and trainer.

Each takes the results and a width in pixels and returns one SVG, or "" where nothing is measured.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from jaxgrpo.study.report.panel import Grid, Panel
from jaxgrpo.study.report.plot import (
    CHARACTER,
    NARROW,
    area,
    finite,
    nice_ticks,
    polyline,
    rule_style,
    svg,
    text,
)

MOST_POINTS = 120
"""Of one curve; longer runs are averaged."""


def reward_chart(results: dict, width: int) -> str:
    return _curves(results, width, "reward", "mean reward per completion")


def drift_chart(results: dict, width: int) -> str:
    return _curves(results, width, "drift", "mean |Δ log-prob| per token, nats")


def _curves(results: dict, width: int, name: str, y_label: str) -> str:
    """One panel per plan and mean rank; behind each stands uniform of the same mean rank."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for arm in results["arms"]:
        if finite(arm[name]["mean"]):
            groups.setdefault((arm["plan"], arm["mean_rank"]), []).append(arm)
    if not groups:
        return ""
    several = len({rank for _, rank in groups}) > 1
    binned = {key: [_binned(arm[name]) for arm in arms] for key, arms in groups.items()}
    curves = [curve for found in binned.values() for curve in found]
    narrow = width < NARROW
    sides = ("mean", "low", "high")
    y_ticks = nice_ticks((v for c in curves for side in sides for v in c.get(side, ())), 4)
    steps = [step for key in groups for arm in groups[key] for step in arm[name]["steps"]]
    x_ticks = nice_ticks([0, max(steps)], 3 if narrow else 4)
    columns = min(len(groups), 2 if narrow else 3)
    left = 12 + max(len(tick) for tick in y_ticks.labels) * CHARACTER
    gap = 22 if narrow else 26
    grid = Grid(width, columns, len(groups), 110 if narrow else 150, left, gap, 30, 46, False)
    uniform = {rank: found[0] for (plan, rank), found in binned.items() if plan == "uniform"}
    out = [text(0, 12, y_label, cls="label")]
    for place, ((plan, rank), arms) in enumerate(groups.items()):
        cell_left, top, inner = grid.place(place)
        panel = Panel(cell_left, top + 18, inner, grid.cell_height, x_ticks, y_ticks)
        title = f"{plan}, rank {rank}" if several else plan
        label = "optimizer step" if place + columns >= len(groups) else ""
        out += panel.frame(title, x_label=label, show_y=place % columns == 0)
        behind = uniform.get(rank)
        if behind is not None and plan != "uniform":
            out.append(polyline(panel.place(behind["steps"], behind["mean"]), "behind"))
        for arm, curve in zip(arms, binned[plan, rank], strict=True):
            out += _curve(curve, panel, rule_style(arm["scale_rule"])[0])
    names = ", ".join(f"{plan} rank {rank}" for plan, rank in groups)
    return svg(width, grid.height + 18, f"{y_label} over training, one panel each: {names}", out)


def _curve(curve: dict[str, list[float]], panel: Panel, colour: str) -> list[str]:
    out = []
    if "low" in curve:
        upper = panel.place(curve["steps"], curve["high"])
        lower = panel.place(curve["steps"], curve["low"])
        out.append(area(upper, lower, f"band {colour}"))
    out.append(polyline(panel.place(curve["steps"], curve["mean"]), f"curve {colour}"))
    return out


def steps_per_point(steps: int) -> int:
    """About how many steps one drawn point averages."""
    return max(1, round(steps / MOST_POINTS))


def _binned(curve: dict[str, list]) -> dict[str, list[float]]:
    """The curve in at most MOST_POINTS means over equal stretches."""
    size = len(curve["steps"])
    ends = np.linspace(0, size, min(size, MOST_POINTS) + 1).round().astype(int).tolist()
    return {
        side: [
            sum(known) / len(known) if (known := finite(values[start:end])) else math.nan
            for start, end in pairwise(ends)
        ]
        for side, values in curve.items()
    }
