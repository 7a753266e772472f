"""matplotlib's figures as SVG in the page's colours, which follow light and dark.

What is drawn in a colour of `_NAMES` takes the style sheet's variable of that name.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable
from html import escape

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDE, NARROW = 940, 350
"""Of the two drawings of every chart, in CSS pixels: for a desktop and for a phone."""
_NAMES = ("ink", "soft", "faint", "band", "c0", "c1", "c2", "c3")
INK, SOFT, FAINT, BAND, C0, C1, C2, C3 = (f"#fe{place:02x}01" for place in range(len(_NAMES)))
RULES = {"constant": (C1, "o"), "rslora": (C2, "s"), "alpha_over_r": (C3, "^"), "any": (C0, "D")}
"""Colour and marker of a scale rule."""
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxgrpo",
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "grid.color": FAINT,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.columnspacing": 1.4,
    "axes.titley": 1.0,  # or matplotlib looks for room among all labels, slowly
    # A cell of a heat map is one pixel of its picture, which the browser enlarges.
    "image.interpolation": "none",
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.7,
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **dict.fromkeys(("axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), SOFT),
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "figure.labelsize"), 12),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 11.5),
    **dict.fromkeys(("xtick.bottom", "ytick.left", "legend.frameon"), False),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    # Names come from configurations: a dollar sign in one is no formula.
    "text.parse_math": False,
}


def to_svg(draw: Callable[[bool], Figure | None], narrow: bool, name: str, label: str) -> str:
    """One drawing, or "" where there is nothing to draw.

    Args:
        draw: narrow -> figure, or None.
        name: what the ids inside begin with; a page needs them to differ.
        label: what a screen reader says.
    """
    with matplotlib.style.context(["default", _STYLE]):
        figure = draw(narrow)
        if figure is None:
            return ""
        written = io.StringIO()
        dropped = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(written, metadata=dropped)
        width, height = (round(72 * side) for side in figure.get_size_inches())
    body = _page_colours(written.getvalue().partition("</defs>")[2], name)
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}"'
    return f"{head}>{body}"


def _page_colours(body: str, name: str) -> str:
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    body = body.replace("xlink:href=", "href=").replace("font-family: 'DejaVu Sans'; ", "")
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(r"#fe(0\d)01", lambda found: f"var(--{_NAMES[int(found[1], 16)]})", body)
    # A hundredth of a pixel is enough; only attributes with coordinates are touched.
    body = re.sub(r' (?:d|x|y)="[^"]*"', lambda found: _shortened(found[0]), body)
    return re.sub(r">\s+<", "><", body).strip()


def _shortened(coordinates: str) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"\s+(?!$)", " ", coordinates))


def new_figure(narrow: bool, height: float) -> Figure:
    """An empty one; height in CSS pixels."""
    return Figure(((NARROW if narrow else WIDE) / 72, height / 72), 72, layout="constrained")


def panels(
    narrow: bool, titles: list[str], columns: int, height: float, x_label: str, y_label: str
) -> tuple[Figure, list[Axes]]:
    """A figure of small charts with the same axes, one per title, labelled at left and below."""
    rows = -(-len(titles) // columns)
    figure = new_figure(narrow, rows * height + 70)
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    figure.supxlabel(x_label, color=SOFT)
    figure.supylabel(y_label, color=SOFT)
    for spare in grid[len(titles) :]:
        spare.set_axis_off()
    for place, (axes, title) in enumerate(zip(grid, titles, strict=False)):
        axes.set_title(textwrap.fill(title, (NARROW if narrow else WIDE) // columns // 9))
        axes.tick_params(labelbottom=place + columns >= len(titles))
    return figure, grid[: len(titles)]


def legend(figure: Figure, narrow: bool) -> None:
    """Every labelled thing once, above all axes."""
    found = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        columns = 1 if narrow else 5
        figure.legend([*found.values()], [*found], loc="outside upper left", ncols=columns)
