"""The report's figures: what each shows, in words, beside the function that draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from jaxgrpo.study.report import arm_charts, curve_charts, facts, layer_charts, tables
from jaxgrpo.study.report.plot import (
    RULES,
    dots,
    finite,
    line,
    marker,
    profile_style,
    rect,
    rule_style,
)
from jaxgrpo.study.report.tables import Table


@dataclass(frozen=True)
class Key:
    """One entry of a legend: a small drawing and its name."""

    shape: str
    cls: str
    name: str


@dataclass(frozen=True)
class Figure:
    """A chart with its words.

    Attributes:
        draw: results and width in pixels -> SVG, or "" where nothing is measured.
        numbers: what the chart shows as a table, folded below it.
        scale: whether the legend is the heat maps' colour scale.
    """

    id: str
    title: str
    caption: str
    draw: Callable[[dict, int], str]
    legend: tuple[Key, ...] = ()
    numbers: Table | None = None
    scale: bool = False


def accuracy_figure(results: dict) -> Figure:
    uniform, base = arm_charts.reference_accuracies(results)
    legend = [*_rule_keys(results), Key("seed", "c0", "single seeds")]
    if uniform is not None:
        name = next(arm["name"] for arm in results["arms"] if arm["plan"] == "uniform")
        legend.append(Key("line", "reference", f"level of {name}, {facts.percent(uniform)}"))
    measured = results["base"]
    if base is not None:
        legend.append(Key("line", "base", f"base model, {facts.percent(base)}"))
    outside = ""
    if measured and base is None:
        outside = (
            f" The base model, at {facts.percent(measured['accuracy'])}, lies left of the scale."
        )
    others = [a for a in results["arms"] if a["plan"] != "uniform" and a["low"] is not None]
    seen = "Accuracy of each arm and its 95 % interval."
    if uniform is not None and others:
        inside = sum(a["low"] <= uniform <= a["high"] for a in others)
        seen = (
            f"Mean over seeds and its 95 % interval; {inside} of {len(others)} intervals reach "
            "across the line of uniform ranks."
        )
    return Figure(
        "accuracy",
        "Held-out accuracy per arm",
        seen + outside,
        arm_charts.accuracy_chart,
        tuple(legend),
    )


def difference_figure(results: dict) -> Figure:
    compared = [arm["versus"] for arm in results["arms"] if arm["versus"]]
    detectable = results["minimum_detectable_effect"]
    legend = [*_rule_keys(results, any_rule=False), Key("line", "reference", "no difference")]
    seen = "Difference to uniform ranks, paired by item, with 95 % intervals."
    if detectable is not None:
        legend.append(Key("band", "unseen", f"below ±{100 * detectable:.1f}: too small to detect"))
    if compared:
        sure = sum((versus["p_holm"] or 1) < 0.05 for versus in compared)
        seen = (
            f"Paired by item: {sure} of {len(compared)} differences remain below p = 0.05 after "
            "Holm's correction; a true difference inside the shaded band would mostly go unseen."
        )
    return Figure(
        "differences",
        "Difference to uniform ranks",
        seen if detectable is not None else seen.split(";")[0].rstrip(".") + ".",
        arm_charts.difference_chart,
        tuple(legend),
    )


def slope_figure(results: dict) -> Figure:
    legend = (
        *_probe_keys(results),
        Key("tick", "predicted", "predicted without feedback"),
        Key("line", "reference", "share independent of rank"),
    )
    return Figure(
        "slopes",
        "How a layer's share of the gradient depends on its rank",
        "If raw L2 sits on the predicted marks while the full weight sits on zero, LoRA's own "
        "parameterisation explains what looks like amplification.",
        arm_charts.slope_chart,
        legend,
        tables.slope_table(results),
    )


def amplification_figure(results: dict) -> Figure:
    legend = (
        *(Key("dots", key.cls, key.name) for key in _probe_keys(results)),
        Key("line", "fit", "fitted, with its 95 % interval"),
        Key("line", "predicted", "predicted without feedback"),
    )
    return Figure(
        "amplification",
        "Share ratio against rank, one dot per adapter",
        "Both axes are logarithmic, so the number above each panel is the slope of ln share ratio "
        "on ln rank; where solid and dashed lines coincide, the prediction suffices.",
        arm_charts.amplification_chart,
        legend,
    )


def heat_figure(results: dict) -> Figure:
    return Figure(
        "heat-maps",
        "Gradient norm by layer and step",
        "Every column is divided by its mean over layers: horizontal stripes mean that the same "
        "layers stay hot throughout, speckle means noise.",
        layer_charts.heat_maps,
        scale=True,
    )


def share_figure(results: dict) -> Figure:
    legend = []
    for place, profile in enumerate(results["profiles"]):
        colour, shape = profile_style(place)
        legend.append(Key(shape, colour, facts.objective_name(profile["objective"])))
    legend.append(Key("line", "reference", "even share"))
    parts = []
    for profile in results["profiles"]:
        found = profile["views"].get("l2")
        if found is not None:
            ratio = facts.decimal(found["max_min"]["value"], "infinite", 1)
            name = facts.objective_name(profile["objective"])
            parts.append(f"{ratio} times the smallest under {name}")
    seen = "Share of each layer in the whole run's gradient norm, with 95 % intervals over steps."
    if parts:
        seen = f"In raw L2 the largest share is {' and '.join(parts)}."
    return Figure(
        "shares",
        "Importance: share of the gradient norm per layer",
        seen,
        layer_charts.share_chart,
        tuple(legend),
        tables.share_table(results) if results["profiles"] else None,
    )


def importance_figure(results: dict) -> Figure:
    return Figure(
        "importance-rank",
        "Importance of a layer against the rank it was given",
        "Rising dots: important layers got more rank; falling dots: less; the number above each "
        "panel is the correlation r.",
        layer_charts.importance_chart,
        (Key("dots", "c1 large", "one layer"),),
    )


def allocation_figure(results: dict) -> Figure:
    found = len(facts.distinct_allocations(results))
    more = found - layer_charts.MOST_PANELS
    rest = f" {more} more plans are in the table below." if more > 0 else ""
    if found < len(results["allocations"]):
        rest = f" ×3 stands for three arms with the same ranks.{rest}"
    notes = {entry["note"] for entry in results["allocations"] if entry["note"]}
    if notes:
        rest = f" An asterisk: {', '.join(sorted(notes))}.{rest}"
    return Figure(
        "allocations",
        "Where each plan puts its ranks",
        f"The dashed line is a plan's own mean; equal means are equal budgets in ranks.{rest}",
        layer_charts.allocation_chart,
        (Key("bar", "bar", "rank of a layer"), Key("line", "reference", "mean over layers")),
        tables.allocation_table(results) if found else None,
    )


def reward_figure(results: dict) -> Figure:
    return Figure(
        "reward",
        "Reward during training",
        "Where a curve hides the grey one, its plan learns as fast as uniform ranks do."
        + _averaged(results, "reward"),
        curve_charts.reward_chart,
        (
            *_curve_keys(results),
            Key("band", "band c0", "range of seeds"),
            Key("line", "behind", "uniform, for comparison"),
        ),
        tables.training_table(results),
    )


def drift_figure(results: dict) -> Figure:
    return Figure(
        "drift",
        "Drift between sampler and trainer",
        "How far the trainer's log-probabilities of sampled tokens are from the sampler's own: it "
        "should stay small, whatever the plan." + _averaged(results, "drift"),
        curve_charts.drift_chart,
        (*_curve_keys(results), Key("line", "behind", "uniform, for comparison")),
    )


def _averaged(results: dict, curve: str) -> str:
    longest = max((len(arm[curve]["steps"]) for arm in results["arms"]), default=0)
    each = curve_charts.steps_per_point(longest)
    return f" Each point averages about {each} steps." if each > 1 else ""


def _rule_keys(results: dict, any_rule: bool = True) -> list[Key]:
    used = (arm["scale_rule"] for arm in results["arms"])
    return [key for rule, key in _keys(used) if any_rule or rule != "any"]


def _curve_keys(results: dict) -> list[Key]:
    return [Key("plain", key.cls, key.name) for key in _rule_keys(results)]


def _probe_keys(results: dict) -> list[Key]:
    return [key for _, key in _keys(entry["scale_rule"] for entry in results["amplification"])]


def _keys(rules: Iterable[str]) -> list[tuple[str, Key]]:
    found = []
    for rule in facts.in_order(rules, RULES):
        colour, shape = rule_style(rule)
        found.append((rule, Key(shape, colour, _rule_name(rule))))
    return found


def _rule_name(rule: str) -> str:
    return {
        "any": "uniform ranks, under any rule",
        "constant": "constant: alpha/r kept",
        "rslora": "rslora: alpha/√r",
        "alpha_over_r": "alpha_over_r: alpha kept",
    }.get(rule, rule)


def swatch(shape: str, cls: str) -> str:
    """The small drawing of a legend's entry."""
    if shape == "line":
        body = line(1, 7, 23, 7, cls)
    elif shape in ("band", "bar"):
        body = rect(1, 2, 22, 10, cls)
    elif shape == "tick":
        body = line(12, 1, 12, 13, cls)
    elif shape == "seed":
        body = "".join(line(x, 4, x, 10, f"seed {cls}") for x in (8, 12, 18))
    elif shape == "dots":
        body = dots([(6, 8), (12, 5), (18, 8)], cls)
    elif shape == "plain":
        body = line(1, 7, 23, 7, f"curve {cls}")
    else:
        body = line(1, 7, 23, 7, f"whisker {cls}") + marker(shape, 12, 7, f"mark {cls}")
    return f'<svg width="24" height="14" viewBox="0 0 24 14" aria-hidden="true">{body}</svg>'


def scale_ends(results: dict) -> tuple[str, str]:
    """What the outermost colours of the heat maps stand for."""
    ratio = f"{layer_charts.colour_ratio(results):g}"
    return f"1/{ratio} of the step's mean or less", f"{ratio} times or more"


def zero_steps(results: dict) -> int:
    """Steps of the profiles in which no layer had any gradient."""
    return max(
        (
            int((np.nansum(np.asarray(found["heatmap"], float), axis=0) <= 0).sum())
            for profile in results["profiles"]
            for found in profile["views"].values()
            if finite([value for row in found["heatmap"] for value in row])
        ),
        default=0,
    )
