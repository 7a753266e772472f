"""Charts of values with intervals, a row each: accuracies, differences, slopes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from jaxgrpo.study.report import facts
from jaxgrpo.study.report.canvas import BAND, INK, RULES, SOFT, legend, new_figure
from jaxgrpo.study.result_types import Results


@dataclass(frozen=True)
class Row:
    """A value with its interval; `margin` is a band about 0, `seeds` are small marks below."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    note: str
    rule: str
    margin: float | None = None
    seeds: Sequence[float] = ()
    target: float | None = None


def _chart(
    rows: list[Row],
    narrow: bool,
    axis: str,
    lines: dict[str, float],
    factor: float = 1.0,
) -> Figure | None:
    """Labels and notes stand beside the rows, or on a phone above them."""
    rows = [row for row in rows if facts.known(row.value)]
    if not rows:
        return None
    figure = new_figure(narrow, (54 if narrow else 28) * len(rows) + (120 if narrow else 75))
    axes = figure.subplots()
    axes.set(ylim=(len(rows) - 0.4, -0.75 if narrow else -0.6), xlabel=axis)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    for (name, value), dash in zip(lines.items(), ("--", ":"), strict=False):
        axes.axvline(factor * value, color=SOFT, linestyle=dash, linewidth=1.2, label=name)
    across = axes.get_yaxis_transform()
    several = len({row.rule for row in rows} - {"any"}) > 1
    for y, row in enumerate(rows):
        colour, marker = RULES.get(row.rule, RULES["any"])
        value, low, high = factor * np.array([row.value, row.low, row.high], float)
        label = facts.named(row.rule) if several else None
        axes.plot([low, high], [y, y], color=colour)
        axes.plot([value], [y], marker, color=colour, label=label)
        if row.margin is not None:
            end = factor * row.margin
            axes.barh(y, 2 * end, 1.0, -end, color=BAND, label=f"margin, ±{end:g}", zorder=0)
        if row.seeds:
            seeds = factor * np.array(row.seeds)
            below = y + (0.22 if narrow else 0.3)
            axes.plot(seeds, [below] * len(seeds), "|", color=colour, label="single seeds")
        if row.target is not None:
            axes.plot([row.target], [y], "|", color=INK, markersize=18, label="predicted")
        if narrow:
            # Nearer to its own row than to the marks of the one above.
            axes.text(0, y - 0.36, row.label, transform=across, va="center")
            axes.text(1, y - 0.36, row.note, transform=across, va="center", ha="right", color=SOFT)
        else:
            axes.text(1.01, y, row.note, transform=across, va="center", color=SOFT)
    axes.set_yticks([] if narrow else range(len(rows)), [] if narrow else [r.label for r in rows])
    axes.tick_params(axis="y", labelcolor=INK)
    legend(figure, narrow)
    return figure


def accuracy_chart(results: Results, narrow: bool) -> Figure | None:
    rows, lines = [], {}
    for arm in results["arms"]:
        ends = (arm["accuracy"], arm["low"], arm["high"], facts.percent(arm["accuracy"]))
        rows.append(Row(arm["name"], *ends, arm["scale_rule"], seeds=arm["per_seed"]))
        if arm["plan"] == "uniform" and arm["accuracy"] is not None and not lines:
            lines[f"level of {arm['name']}"] = arm["accuracy"]
    low, high = (facts.finite(arm[side] for arm in results["arms"]) for side in ("low", "high"))
    base = results["base"]
    # Left out where it would squeeze all arms together.
    if base and low and min(low) - base["accuracy"] < max(high) - min(low):
        lines["base model"] = base["accuracy"]
    return _chart(rows, narrow, "held-out accuracy, %", lines, factor=100)


def difference_chart(results: Results, narrow: bool) -> Figure | None:
    rules = {arm["versus"]["name"]: arm["scale_rule"] for arm in results["arms"] if arm["versus"]}
    rows = []
    for found in results["contrasts"]:
        name, note = found["name"], f"{facts.points(found['difference'])}, {found['verdict']}"
        ends = (found["difference"], found["low"], found["high"], note)
        rule = rules.get(name, "any")
        rows.append(Row(name, *ends, rule, found["margin"], found["per_seed"]))
    lines = {"no difference": 0.0}
    return _chart(rows, narrow, "difference, percentage points", lines, 100)


def slope_chart(results: Results, narrow: bool) -> Figure | None:
    rows = []
    for entry in results["amplification"]:
        rule, note = entry["scale_rule"], facts.signed(entry["slope"])
        name = f"{facts.named(entry['view'])}, {rule}"
        ends = (entry["slope"], entry["low"], entry["high"], note)
        rows.append(Row(name, *ends, rule, entry["margin"], target=entry["predicted"]))
    return _chart(rows, narrow, "slope of ln share on ln rank", {"no effect": 0.0})
