"""Charts that compare arms and probes: accuracy, differences, slopes of share on rank.

Each takes the results and a width in pixels and returns one SVG, or "" where nothing is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxgrpo.study.report import facts
from jaxgrpo.study.report.panel import Grid, Panel
from jaxgrpo.study.report.plot import (
    CHARACTER,
    NARROW,
    RULES,
    Ticks,
    area,
    dots,
    finite,
    fitted,
    line,
    log_ticks,
    marker,
    nice_ticks,
    polyline,
    rect,
    rule_style,
    svg,
    text,
    whisker,
)


@dataclass(frozen=True)
class Row:
    """A value with its interval; `ticks` are small marks on the same line (single seeds)."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    note: str
    rule: str
    ticks: Sequence[float] = ()
    target: float | None = None


def accuracy_chart(results: dict, width: int) -> str:
    rows = [
        Row(
            arm["name"],
            facts.times(arm["accuracy"], 100),
            facts.times(arm["low"], 100),
            facts.times(arm["high"], 100),
            facts.percent(arm["accuracy"]),
            arm["scale_rule"],
            [100 * value for value in arm["per_seed"]],
        )
        for arm in results["arms"]
    ]
    if not any(row.value is not None for row in rows):
        return ""
    lines = [
        (100 * value, cls)
        for value, cls in zip(reference_accuracies(results), ("reference", "base"), strict=True)
        if value is not None
    ]
    label = "Held-out accuracy per arm with 95 % intervals: " + _spoken(rows)
    return interval_chart(rows, width, "held-out accuracy, %", label, lines)


def reference_accuracies(results: dict) -> tuple[float | None, float | None]:
    """(uniform, base) as lines; the base is left out where it would squeeze all arms together."""
    arms = results["arms"]
    uniform = next((arm["accuracy"] for arm in arms if arm["plan"] == "uniform"), None)
    base = results["base"]["accuracy"] if results["base"] else None
    ends = finite([arm[side] for arm in arms for side in ("low", "high")])
    if base is not None and ends and min(ends) - base > max(ends) - min(ends):
        base = None
    return uniform, base


def difference_chart(results: dict, width: int) -> str:
    rows = []
    for arm in results["arms"]:
        versus = arm["versus"] or {}
        if arm["plan"] == "uniform" and not versus:
            continue
        value, low, high = (
            facts.times(versus.get(key), 100) for key in ("difference", "low", "high")
        )
        note = facts.NOT_MEASURED
        if value is not None:
            p = facts.p_value(versus["p_holm"])
            note = f"{facts.signed(value, places=1)}, p {p if p[0] == '<' else '= ' + p}"
        rows.append(Row(arm["name"], value, low, high, note, arm["scale_rule"]))
    if not any(row.value is not None for row in rows):
        return ""
    detectable = facts.times(results["minimum_detectable_effect"], 100)
    label = "Difference of each arm to uniform ranks with 95 % intervals: " + _spoken(rows)
    axis = "difference to uniform, percentage points"
    return interval_chart(rows, width, axis, label, [(0, "reference")], detectable, signed=True)


def slope_chart(results: dict, width: int) -> str:
    rows = [
        Row(
            f"{facts.view_name(entry['view'])}, {entry['scale_rule']}",
            entry["slope"],
            entry["low"],
            entry["high"],
            facts.signed(entry["slope"]),
            entry["scale_rule"],
            target=entry["predicted"],
        )
        for entry in results["amplification"]
    ]
    if not rows:
        return ""
    label = "Slope of ln share on ln rank with 95 % intervals: " + _spoken(rows)
    axis = "slope: change of ln share per unit of ln rank"
    return interval_chart(rows, width, axis, label, [(0, "reference")], signed=True)


def _spoken(rows: Sequence[Row]) -> str:
    return "; ".join(f"{row.label} {row.note}" for row in rows)


def interval_chart(
    rows: Sequence[Row],
    width: int,
    axis: str,
    label: str,
    lines: Sequence[tuple[float, str]] = (),
    band: float | None = None,
    signed: bool = False,
) -> str:
    """Dots and whiskers, one row each; labels stand beside them, or on a phone above them."""
    narrow = width < NARROW
    values = [v for row in rows for v in (row.value, row.low, row.high, row.target, *row.ticks)]
    values += [value for value, _ in lines] + ([] if band is None else [band, -band])
    ticks = nice_ticks(values, 4 if narrow else 7, signed)
    step, left, right = (42, 18, 18) if narrow else (27, 0, 0)
    if not narrow:
        left = min(max(len(row.label) for row in rows) * CHARACTER + 16, 0.34 * width)
        right = max(len(row.note) for row in rows) * CHARACTER + 14
    height = step * len(rows)
    panel = Panel(left, 6, width - left - right, height, ticks, Ticks((), (), 0.0, 1.0))
    x = panel.x
    out = [text(x(v), panel.bottom + 18, name, "middle", "tick") for v, name in ticks.pairs]
    # Beside labels what stands for a value runs through; under labels it stops at each of them.
    stretches = [(6.0, panel.bottom)]
    if narrow:
        stretches = [(6 + step * i + 18, 6 + step * i + step) for i in range(len(rows))]
    for top, end in stretches:
        if band is not None:
            out.append(rect(x(-band), top, x(band) - x(-band), end - top, "unseen"))
        out += [line(x(value), top, x(value), end, "grid") for value in ticks.values]
        out += [line(x(value), top, x(value), end, cls) for value, cls in lines]
    for place, row in enumerate(rows):
        y = 6 + step * place + (28 if narrow else step / 2)
        if narrow:
            room = width - len(row.note) * CHARACTER - 20
            out.append(text(0, y - 16, fitted(row.label, room), cls="row-label"))
            out.append(text(width, y - 16, row.note, "end", "row-note"))
        else:
            out.append(text(left - 12, y + 4, fitted(row.label, left - 12), "end", "row-label"))
            out.append(text(panel.right + 10, y + 4, row.note, cls="row-note"))
        out += _interval(row, panel, y)
    out.append(line(left, panel.bottom, panel.right, panel.bottom, "axis"))
    middle = panel.left + panel.width / 2
    out.append(text(middle, panel.bottom + 37, axis, "middle", "label"))
    return svg(width, height + 52, label, out)


def _interval(row: Row, panel: Panel, y: float) -> list[str]:
    x, (colour, shape) = panel.x, rule_style(row.rule)
    out = []
    if row.target is not None:
        out.append(line(x(row.target), y - 9, x(row.target), y + 9, "predicted"))
    if row.low is not None and row.high is not None and finite([row.low, row.high]):
        out.append(whisker(x(row.low), x(row.high), y, f"whisker {colour}"))
    for value in finite(row.ticks):
        out.append(line(x(value), y + 5, x(value), y + 11, f"seed {colour}"))
    if row.value is not None and math.isfinite(row.value):
        out.append(marker(shape, x(row.value), y, f"mark {colour}"))
    return out


def amplification_chart(results: dict, width: int) -> str:
    """One panel per view (row) and scale rule (column), all with the same axes."""
    entries = {(entry["view"], entry["scale_rule"]): entry for entry in results["amplification"]}
    rules = facts.in_order((rule for _, rule in entries), RULES)
    views = facts.in_order((view for view, _ in entries), facts.VIEWS)
    if not entries:
        return ""
    narrow = width < NARROW
    points = [point for entry in entries.values() for point in entry["points"]]
    x_ticks = log_ticks((p["log_rank"] for p in points), 4 if narrow else 6, whole=True)
    y_ticks = log_ticks(p["log_share"] for p in points)
    grid = Grid(
        width,
        columns=len(rules),
        cells=len(rules) * len(views),
        cell_height=120 if narrow else 180,
        gap=10 if narrow else 20,
        above=58 if narrow else 42,
        below=22,
        left_of_all=False,
    )
    out = [text(0, 12, "share ÷ share at uniform rank, log scale", cls="label")]
    for row, view in enumerate(views):
        for column, rule in enumerate(rules):
            entry = entries.get((view, rule))
            left, top, inner = grid.place(row * len(rules) + column)
            panel = Panel(left, top + 24, inner, grid.cell_height, x_ticks, y_ticks)
            out += panel.frame(show_x=row == len(views) - 1, show_y=column == 0)
            if column == 0:
                up = 38 if narrow else 24
                out.append(text(0, panel.top - up, facts.view_name(view), cls="panel-title"))
            # On a phone the slope has a line of its own.
            up, side, anchor = (22, left, "start") if narrow else (7, panel.right, "end")
            colour = rule_style(rule)[0]
            out.append(text(left, panel.top - up, fitted(rule, inner), cls=f"rule {colour}"))
            if entry is not None:
                note = facts.signed(entry["slope"])
                out.append(text(side, panel.top - 7, note, anchor, "row-note"))
                out += _fit(entry, panel)
    below = grid.height + 42
    out.append(text(width / 2, below, "rank of the adapter, log scale", "middle", "label"))
    label = "Share ratio against rank: " + "; ".join(
        f"{facts.view_name(view)}, {rule}: slope {facts.signed(entry['slope'])}, predicted "
        f"{facts.signed(entry['predicted'], places=1)}"
        for (view, rule), entry in entries.items()
    )
    return svg(width, grid.height + 52, label, out)


def _fit(entry: dict, panel: Panel) -> list[str]:
    """Points, the fitted line with its interval, the predicted line; all through the centre."""
    colour, _ = rule_style(entry["scale_rule"])
    xs = np.array([p["log_rank"] for p in entry["points"]])
    ys = np.array([p["log_share"] for p in entry["points"]])
    x0, y0 = float(xs.mean()), float(ys.mean())
    ends = [float(xs.min()), x0, float(xs.max())]

    def through(slope: float) -> list[tuple[float, float]]:
        return [(panel.x(x), panel.y.clip(y0 + slope * (x - x0))) for x in ends]

    out = [dots(panel.place(xs.tolist(), ys.tolist()), colour)]
    if finite([entry["low"], entry["high"]]):
        out.append(area(through(entry["high"]), through(entry["low"]), f"band {colour}"))
    out.append(polyline(through(entry["predicted"]), "predicted"))
    out.append(polyline(through(entry["slope"]), "fit"))
    return out
