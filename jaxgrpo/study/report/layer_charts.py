"""Charts over layers: heat maps of gradient norms, shares, allocations, importance against rank.

Each takes the results and a width in pixels and returns one SVG, or "" where nothing is measured.
"""

from __future__ import annotations

import math
from itertools import groupby

import numpy as np

from jaxgrpo.study.report import facts
from jaxgrpo.study.report.panel import Grid, Panel
from jaxgrpo.study.report.plot import (
    NARROW,
    dots,
    finite,
    fitted,
    index_ticks,
    line,
    marker,
    nice_ticks,
    number,
    profile_style,
    rect,
    svg,
    text,
)

LEVELS = 11
"""Colours of a heat map, from far below to far above an even share; the middle one is even."""
RATIOS = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)
"""What the outermost colours may stand for."""
MOST_PANELS = 30


def colour_ratio(results: dict) -> float:
    """The ratio to an even share at which the heat maps' colours end: holds 98 % of all cells."""
    logs = [
        np.abs(_log_ratios(np.asarray(found["heatmap"], np.float64)))
        for profile in results["profiles"]
        for found in profile["views"].values()
    ]
    cells = np.concatenate([x[np.isfinite(x)] for x in logs]) if logs else np.zeros(0)
    if not cells.size:
        return RATIOS[0]
    reach = float(np.quantile(cells, 0.98))
    return next((ratio for ratio in RATIOS if math.log2(ratio) >= reach), RATIOS[-1])


def _log_ratios(norms: np.ndarray) -> np.ndarray:
    """log2 of each layer's norm over the step's mean [L, T]; nan in steps without gradient."""
    norms = np.where(np.isfinite(norms), norms, 0.0)
    mean = norms.mean(axis=0, keepdims=True)
    ratio = np.where(mean > 0, norms / np.where(mean > 0, mean, 1.0), np.nan)
    return np.log2(np.maximum(ratio, 2.0**-20))


def heat_maps(results: dict, width: int) -> str:
    """Rows are views, columns are profiles; each step is divided by its mean over layers."""
    profiles = results["profiles"]
    views = facts.profile_views(results)
    if not views:
        return ""
    narrow = width < NARROW
    ratio = colour_ratio(results)
    layers = max(profile["layers"] for profile in profiles)
    tall = min(max(layers * (5 if narrow else 6.5), 70), 220)
    grid = Grid(
        width,
        columns=len(profiles),
        cells=len(profiles) * len(views),
        cell_height=tall,
        left=36,
        gap=14 if narrow else 26,
        above=42,
        below=30,
        left_of_all=False,
    )
    out = []
    for row, view in enumerate(views):
        for column, profile in enumerate(profiles):
            left, top, inner = grid.place(row * len(profiles) + column)
            name = fitted(facts.objective_name(profile["objective"]), inner)
            out.append(text(left, top - 7, name, cls="label"))
            if column == 0:
                out.append(text(0, top - 25, facts.view_name(view), cls="panel-title"))
                out.append(text(0, top - 7, "layer", cls="tick"))
            found = profile["views"].get(view)
            if found is None:
                out.append(rect(left, top, inner, tall, "plot"))
                note = facts.NOT_MEASURED
                out.append(text(left + inner / 2, top + tall / 2, note, "middle", "tick"))
                continue
            norms = np.asarray(found["heatmap"], np.float64)
            most = 60 if narrow else 100
            out.append(_heat(norms, left, top, inner, tall, ratio, most))
            out += _heat_axes(norms.shape, left, top, inner, tall, column == 0)
            if row == len(views) - 1:
                middle = left + inner / 2
                out.append(text(middle, grid.height + 10, "optimizer step", "middle", "label"))
    names = ", ".join(facts.view_name(view) for view in views)
    label = f"Heat maps, layer by step, of the gradient norm over the step's mean: {names}"
    return svg(width, grid.height + 20, label, out)


def _heat(
    norms: np.ndarray, left: float, top: float, width: float, height: float, ratio: float, most: int
) -> str:
    """The cells of [L, T] as one path per colour, in a drawing of one unit per cell."""
    layers, steps = norms.shape
    parts = np.array_split(norms, min(steps, most), axis=1)
    logs = _log_ratios(np.stack([np.nansum(part, axis=1) for part in parts], axis=1))
    half = LEVELS // 2
    levels = np.clip(np.rint(logs / math.log2(ratio) * half), -half, half) + half
    paths: dict[int, list[str]] = {}
    for layer in range(layers):
        place = 0
        for level, run in groupby(levels[layer]):
            length = len(list(run))
            if math.isfinite(level):
                paths.setdefault(int(level), []).append(f"M{place} {layer}h{length}v1h-{length}z")
            place += length
    box = f'viewBox="0 0 {len(parts)} {layers}" preserveAspectRatio="none"'
    where = f'x="{number(left)}" y="{number(top)}" width="{number(width)}"'
    cells = "".join(
        f'<path class="d{level}" d="{"".join(steps)}"/>' for level, steps in sorted(paths.items())
    )
    back = rect(0, 0, len(parts), layers, "no-data")
    return f'<svg {where} height="{number(height)}" {box} class="heat">{back}{cells}</svg>'


def _heat_axes(
    shape: tuple[int, ...], left: float, top: float, width: float, height: float, show_y: bool
) -> list[str]:
    layers, steps = shape
    out = []
    if show_y:
        for layer, name in index_ticks(layers, 7).pairs:
            y = top + (layer + 0.5) / layers * height
            out.append(text(left - 6, y + 4, name, "end", "tick"))
    for step, name in index_ticks(steps, 5).pairs:
        x = left + (step + 0.5) / steps * width
        out.append(line(x, top + height, x, top + height + 4, "axis"))
        out.append(text(x, top + height + 17, name, "middle", "tick"))
    return out


def share_chart(results: dict, width: int) -> str:
    """One panel per view; profiles side by side in it, and an even share as a line."""
    profiles = results["profiles"]
    views = facts.profile_views(results)
    if not views:
        return ""
    narrow = width < NARROW
    layers = max(profile["layers"] for profile in profiles)
    known = [
        100 * value
        for profile in profiles
        for found in profile["views"].values()
        for value in finite([*found["low"], *found["high"], *found["share"]])
    ]
    y_ticks = nice_ticks([0, *known], 5)
    grid = Grid(width, 1 if narrow else 2, len(views), 170 if narrow else 210, gap=30)
    out = []
    for place, view in enumerate(views):
        left, top, inner = grid.place(place)
        x_ticks = index_ticks(layers, 10)
        panel = Panel(left, top, inner, grid.cell_height, x_ticks, y_ticks, x_pad=0.6)
        title = facts.view_name(view)
        out += panel.frame(title, x_label="layer", y_label="share of the gradient norm, %")
        even = panel.y(100 / layers)
        out.append(line(left, even, panel.right, even, "reference"))
        for number_, profile in enumerate(profiles):
            found = profile["views"].get(view)
            if found is not None:
                out += _shares(found, panel, number_, len(profiles))
    names = " and ".join(facts.objective_name(p["objective"]) for p in profiles)
    label = f"Share of the gradient norm per layer with 95 % intervals, {names}"
    return svg(width, grid.height, label, out)


def _shares(found: dict, panel: Panel, place: int, of: int) -> list[str]:
    colour, shape = profile_style(place)
    apart = 0.0 if of < 2 else (place / (of - 1) - 0.5) * 0.36
    size = min(4.0, max(2.2, panel.width / len(found["share"]) / 4.2))
    out = []
    for layer, (share, low, high) in enumerate(
        zip(found["share"], found["low"], found["high"], strict=True)
    ):
        if not finite([share]):
            continue
        x = panel.x(layer + apart)
        if len(finite([low, high])) == 2:
            out.append(line(x, panel.y(100 * low), x, panel.y(100 * high), f"whisker {colour}"))
        out.append(marker(shape, x, panel.y(100 * share), f"mark {colour}", size))
    return out


def allocation_chart(results: dict, width: int) -> str:
    """Bars of every distinct plan's ranks over layers, all with the same axes."""
    plans = facts.distinct_allocations(results)[:MOST_PANELS]
    if not plans:
        return ""
    narrow = width < NARROW
    y_ticks = nice_ticks([0, *(r for plan in plans for r in plan["layer_ranks"])], 4)
    layers = max(len(plan["layer_ranks"]) for plan in plans)
    columns = 2 if narrow else 3
    grid = Grid(
        width, columns, len(plans), 84 if narrow else 110, 30, 16 if narrow else 26, 34, 34, False
    )
    x_ticks = index_ticks(layers, 5 if narrow else 8)
    out = [text(0, 12, "rank, mean over modules", cls="label")]
    for place, plan in enumerate(plans):
        left, top, inner = grid.place(place)
        panel = Panel(left, top + 14, inner, grid.cell_height, x_ticks, y_ticks, x_pad=0.6)
        last = place + columns >= len(plans)
        title = plan["plan"] + ("*" if plan["note"] else "")
        out += panel.frame(title, x_label="layer" if last else "", show_y=place % columns == 0)
        each = panel.width / (layers + 0.2)
        for layer, rank in enumerate(plan["layer_ranks"]):
            x, y = panel.x(layer) - 0.38 * each, panel.y(rank)
            out.append(rect(x, y, 0.76 * each, panel.bottom - y, "bar"))
        mean = panel.y(float(np.mean(plan["layer_ranks"])))
        out.append(line(left, mean, panel.right, mean, "reference"))
    names = ", ".join(plan["plan"] for plan in plans)
    return svg(width, grid.height + 20, f"Rank of every layer, one panel per plan: {names}", out)


def importance(results: dict) -> list[float]:
    """Share per layer [L] in the profile and view that the plans were made from."""
    wanted = results["importance"]
    for profile in results["profiles"]:
        if profile["objective"] == wanted["objective"] and wanted["view"] in profile["views"]:
            return profile["views"][wanted["view"]]["share"]
    return []


def importance_chart(results: dict, width: int) -> str:
    """A panel per plan with differing ranks: the importance of a layer and the rank it got."""
    share = importance(results)
    plans = [
        plan
        for plan in facts.distinct_allocations(results)
        if len(plan["layer_ranks"]) == len(share) and np.ptp(plan["layer_ranks"]) > 1e-9
    ][:MOST_PANELS]
    if not plans or len(finite(share)) != len(share):
        return ""
    narrow = width < NARROW
    shares = [100 * value for value in share]
    x_ticks = nice_ticks(shares, 3 if narrow else 4)
    y_ticks = nice_ticks([0, *(r for plan in plans for r in plan["layer_ranks"])], 4)
    columns = 2 if narrow else 3
    grid = Grid(
        width, columns, len(plans), 120 if narrow else 150, 30, 16 if narrow else 26, 34, 34, False
    )
    out = [text(0, 12, "rank, mean over modules", cls="label")]
    view = facts.VIEWS[results["importance"]["view"]]
    for place, plan in enumerate(plans):
        left, top, inner = grid.place(place)
        panel = Panel(left, top + 14, inner, grid.cell_height, x_ticks, y_ticks)
        last = place + columns >= len(plans)
        x_label = ("importance, %" if narrow else f"importance: share of {view}, %") if last else ""
        r = np.corrcoef(share, plan["layer_ranks"])[0, 1] if np.ptp(share) > 0 else math.nan
        note = facts.signed(float(r))
        title = plan["plan"].partition(" ×")[0]
        out += panel.frame(title, note, x_label, show_y=place % columns == 0)
        out.append(dots(panel.place(shares, plan["layer_ranks"]), "c1 large"))
    names = ", ".join(plan["plan"] for plan in plans)
    return svg(width, grid.height + 20, f"Importance of a layer against its rank: {names}", out)
