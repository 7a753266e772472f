"""Charts of several panels: curves of training, slopes by phase, norms and ranks over layers."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxgrpo.study.report import canvas, facts
from jaxgrpo.study.report.canvas import C1, C2, C3, INK, RULES, SOFT, legend, panels
from jaxgrpo.study.result_types import ArmResult, Curve, Results

MOST_POINTS = 120
"""Of one curve, and columns of a heat map; longer runs are averaged."""
PHASES = ("first third", "middle third", "last third")
_MATRICES = {"A": (C1, "o"), "B": (C2, "s"), "W": (C3, "^")}


def reward_chart(results: Results, narrow: bool) -> Figure | None:
    return _curves(results, narrow, "reward", "mean reward per completion")


def drift_chart(results: Results, narrow: bool) -> Figure | None:
    return _curves(results, narrow, "drift", "mean |Δ log-prob|, nats")


def _curves(
    results: Results, narrow: bool, name: Literal["reward", "drift"], label: str
) -> Figure | None:
    """A panel per plan and mean rank; behind each stands uniform of the same mean rank."""
    arms = [arm for arm in results["arms"] if facts.finite(arm[name].get("mean", []))]
    several = len({arm["mean_rank"] for arm in results["arms"]}) > 1
    groups: dict[str, list[ArmResult]] = {}
    for arm in arms:
        rank = f", rank {arm['mean_rank']}" if several else ""
        groups.setdefault(arm["plan"] + rank, []).append(arm)
    if not groups:
        return None
    columns = min(len(groups), 2 if narrow else 4)
    height = 130 if narrow else 180
    figure, every = panels(narrow, list(groups), columns, height, "optimizer step", label)
    for axes, (first, *others) in zip(every, groups.values(), strict=True):
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_formatter("{x:g}")  # or a common power of ten stands in the title
        uniform = (
            a for a in arms if a["plan"] == "uniform" and a["mean_rank"] == first["mean_rank"]
        )
        behind = None if first["plan"] == "uniform" else next(uniform, None)
        if behind is not None:
            _curve(axes, behind[name], SOFT, "uniform, for comparison", alpha=0.55)
        for arm in (first, *others):
            colour, _ = RULES.get(arm["scale_rule"], RULES["any"])
            curve = _curve(axes, arm[name], colour, facts.named(arm["scale_rule"]))
            if "low" in curve and len(arm["seeds"]) > 1:
                low, high = curve["low"], curve["high"]
                axes.fill_between(curve["steps"], low, high, color=colour, alpha=0.16, linewidth=0)
    legend(figure, narrow)
    return figure


def _curve(axes: Axes, curve: Curve, colour: str, label: str, alpha: float = 1.0) -> dict:
    """Draws the mean; returns the curve in at most MOST_POINTS means over equal stretches."""
    binned = {side: _binned(np.array([values], float))[0] for side, values in curve.items()}
    axes.plot(binned["steps"], binned["mean"], color=colour, label=label, alpha=alpha)
    return binned


def _binned(values: np.ndarray) -> np.ndarray:
    """[rows, steps] averaged to [rows, at most MOST_POINTS]; NaN where nothing is known."""
    parts = np.array_split(values, min(values.shape[1], MOST_POINTS), axis=1)
    counts = np.stack([np.isfinite(part).sum(axis=1) for part in parts], axis=1)
    sums = np.stack([np.where(np.isfinite(part), part, 0).sum(axis=1) for part in parts], axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def phase_chart(results: Results, narrow: bool) -> Figure | None:
    """Slopes by third of the run and by matrix, a panel per scale rule."""
    found = [entry for entry in results["amplification"] if entry["parts"]]
    rules = facts.in_order((entry["scale_rule"] for entry in found), RULES)
    if not rules:
        return None
    columns, height = (1, 170) if narrow else (len(rules), 230)
    figure, every = panels(narrow, rules, columns, height, "", "slope of ln share on ln rank")
    margin = max(entry["margin"] for entry in found)
    for axes, rule in zip(every, rules, strict=True):
        axes.axhspan(-margin, margin, color=canvas.BAND, linewidth=0, label=f"margin, ±{margin:g}")
        for entry in (entry for entry in found if entry["scale_rule"] == rule):
            if entry["view"] == "l2":
                style = {"color": INK, "linestyle": "--", "linewidth": 1.2}
                axes.axhline(entry["predicted"], label="predicted for A and B", **style)
            for shift, (matrix, (colour, marker)) in enumerate(_MATRICES.items()):
                parts = [
                    p for p in entry["parts"] if p["matrix"] == matrix and p["phase"] in PHASES
                ]
                if not parts:
                    continue
                x = [PHASES.index(part["phase"]) + 0.16 * (shift - 1) for part in parts]
                axes.vlines(x, [p["low"] for p in parts], [p["high"] for p in parts], color=colour)
                name = f"gradient of {facts.named(matrix)}"
                axes.plot(x, [p["slope"] for p in parts], marker, color=colour, label=name)
        axes.set_xticks(range(3), PHASES)
        axes.set_xlim(-0.5, 2.5)
    legend(figure, narrow)
    return figure


def cut_chart(results: Results, narrow: bool) -> Figure | None:
    """A panel per criterion: accuracy by the share that a cut keeps, a line per uniform arm."""
    kinds = facts.in_order((cut["criterion"] for cut in results["cuts"]), ("energy", "parameters"))
    if not kinds:
        return None
    shape = (len(kinds), 1) if narrow else (1, len(kinds))
    figure = canvas.new_figure(narrow, 190 * shape[0] + 80)
    every = figure.subplots(*shape, sharey=True, squeeze=False).ravel()
    figure.supylabel("held-out accuracy, %", color=SOFT)
    names = facts.in_order((cut["arm"] for cut in results["cuts"]), ())
    for axes, kind in zip(every, kinds, strict=True):
        axes.set_xlabel(f"{kind} kept, %")
        for name, colour in zip(names, itertools.cycle((C1, C2, C3))):
            mine = [c for c in results["cuts"] if (c["criterion"], c["arm"]) == (kind, name)]
            if not mine:
                continue
            mine.sort(key=lambda cut: cut["share"])
            right = [np.array(cut["accuracy"]) for cut in mine]
            right += [np.subtract(cut["accuracy"], cut["difference"]) for cut in mine[:1]]
            kept = 100 * np.array([cut["share"] for cut in mine] + [1.0])
            axes.plot(kept, 100 * np.mean(right, axis=1), "o-", color=colour, label=name)
            axes.plot(kept, 100 * np.array(right), "_", color=colour, alpha=0.6)
    legend(figure, narrow)
    return figure


def heat_maps(results: Results, narrow: bool) -> Figure | None:
    """Rows are views, columns are profiles; each step is divided by its mean over layers."""
    profiles = results["profiles"]
    views = facts.in_order((v for profile in profiles for v in profile["views"]), facts.VIEWS)
    if not views:
        return None
    figure = canvas.new_figure(narrow, (120 if narrow else 150) * len(views) + 70)
    grid = figure.subplots(len(views), len(profiles), sharex="col", sharey=True, squeeze=False)
    figure.supxlabel("optimizer step", color=SOFT)
    images = []
    for (row, column), axes in np.ndenumerate(grid):
        profile, view = profiles[column], views[row]
        axes.grid(False)
        if not row:
            axes.set_title(facts.named(profile["objective"]))
        if not column:
            axes.set_ylabel(facts.named(view))
        if view in profile["views"]:
            norms = _binned(np.array(profile["views"][view]["heatmap"], float))
            mean = np.nan_to_num(norms).mean(axis=0)
            ratio = np.where((mean > 0) & (norms > 0), norms / np.where(mean > 0, mean, 1), np.nan)
            extent = (0, profile["steps"], profile["layers"] - 0.5, -0.5)
            images.append(axes.imshow(ratio, aspect="auto", extent=extent))
    ratios = np.concatenate([np.ma.compressed(image.get_array()) for image in images])
    # A power of two beyond which hardly a cell lies.
    reach = 2.0 ** np.ceil(np.quantile([1.0, *np.abs(np.log2(ratios))], 0.98))
    for image in images:
        image.set_norm(LogNorm(1 / reach, reach))
    bar = figure.colorbar(images[0], ax=grid, location="top", aspect=40, shrink=0.9)
    bar.minorticks_off()
    bar.set_ticks([1 / reach, 1, reach], labels=[f"1/{reach:g}", "1", f"{reach:g}"])
    bar.set_label("norm of a layer ÷ mean over layers")
    return figure


def share_chart(results: Results, narrow: bool) -> Figure | None:
    """One panel per view; profiles side by side in it, and an even share as a line."""
    profiles = results["profiles"]
    views = facts.in_order((v for profile in profiles for v in profile["views"]), facts.VIEWS)
    if not views:
        return None
    names = [facts.named(view) for view in views]
    columns, height = (1, 150) if narrow else (2, 200)
    figure, every = panels(narrow, names, columns, height, "layer", "share of the norm, %")
    for axes, view in zip(every, views, strict=True):
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        for profile, colour in zip(profiles, (C1, C2), strict=False):
            if view not in profile["views"]:
                continue
            found = profile["views"][view]
            low, high = (100 * np.array(found[side], float) for side in ("low", "high"))
            layers, share = range(len(low)), 100 * np.array(found["share"], float)
            name = facts.named(profile["objective"])
            axes.plot(layers, share, "o-", color=colour, markersize=3.5, linewidth=1, label=name)
            axes.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)
        even = 100 / max(profile["layers"] for profile in profiles)
        axes.axhline(even, color=SOFT, linestyle="--", linewidth=1.2, label="even share")
    every[0].set_ylim(bottom=0)  # of all; before the last of them it would cut that one off
    legend(figure, narrow)
    return figure


def allocation_chart(results: Results, narrow: bool) -> Figure | None:
    """Every distinct plan's ranks over layers."""
    plans = facts.distinct_allocations(results)
    if not plans:
        return None
    titles = [plan["plan"] + ("*" if plan["note"] else "") for plan in plans]
    columns = min(len(titles), 2 if narrow else 4)
    height = 105 if narrow else 140
    figure, every = panels(narrow, titles, columns, height, "layer", "rank, mean over modules")
    for axes, plan in zip(every, plans, strict=True):
        ranks = plan["layer_ranks"]
        axes.stairs(ranks, np.arange(len(ranks) + 1) - 0.5, fill=True, color=C1, alpha=0.6)
        axes.axhline(float(np.mean(ranks)), color=canvas.C0, linestyle="--", linewidth=1.2)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(False, axis="x")
    return figure
