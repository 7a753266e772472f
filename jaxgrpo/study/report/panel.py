"""A plotting area with axes, and how several of them share a page's width."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from jaxgrpo.study.report.plot import CHARACTER, Scale, Ticks, fitted, line, rect, text


@dataclass(frozen=True)
class Panel:
    """A plotting area with its two scales; pixels grow downwards, data upwards."""

    left: float
    top: float
    width: float
    height: float
    x_ticks: Ticks
    y_ticks: Ticks
    x_pad: float = 0.0
    """Room at both ends of the x axis, in data units (half a bar, say)."""
    y_pad: float = 0.0

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height

    @property
    def x(self) -> Scale:
        low, high = self.x_ticks.low - self.x_pad, self.x_ticks.high + self.x_pad
        return Scale(low, high, self.left, self.right)

    @property
    def y(self) -> Scale:
        low, high = self.y_ticks.low - self.y_pad, self.y_ticks.high + self.y_pad
        return Scale(low, high, self.bottom, self.top)

    def place(self, xs: Iterable[float], ys: Iterable[float | None]) -> list[tuple[float, float]]:
        """Pixels of the points that can be drawn."""
        x, y = self.x, self.y
        pairs = zip(xs, ys, strict=False)
        return [(x(a), y(b)) for a, b in pairs if b is not None and math.isfinite(b)]

    def frame(
        self,
        title: str = "",
        note: str = "",
        x_label: str = "",
        y_label: str = "",
        show_x: bool = True,
        show_y: bool = True,
    ) -> list[str]:
        """Grid, tick labels, axis labels (y above the axis, so that nothing stands upright).

        The note stands at the other end of the title's line.
        """
        out = [rect(self.left, self.top, self.width, self.height, "plot")]
        for value, label in zip(self.y_ticks.values, self.y_ticks.labels, strict=True):
            y = self.y(value)
            out.append(line(self.left, y, self.right, y, "grid"))
            if show_y:
                out.append(text(self.left - 6, y + 4, label, "end", "tick"))
        for value, label in zip(self.x_ticks.values, self.x_ticks.labels, strict=True):
            x = self.x(value)
            out.append(line(x, self.bottom, x, self.bottom + 4, "axis"))
            if show_x:
                # Under the axis, not beyond it, where the next panel or the page's edge is.
                x = min(x, self.right + 8 - len(label) * CHARACTER / 2)
                out.append(text(x, self.bottom + 17, label, "middle", "tick"))
        out.append(line(self.left, self.bottom, self.right, self.bottom, "axis"))
        above = self.top - (24 if y_label else 8)
        if title:
            room = self.width + 8 - (len(note) + 1) * CHARACTER * (note != "")
            # Titles are bold, hence wider.
            out.append(text(self.left, above, fitted(title, 0.85 * room), cls="panel-title"))
        if note:
            out.append(text(self.right, above, note, "end", "row-note"))
        if y_label:
            out.append(text(self.left, self.top - 8, y_label, cls="label"))
        if x_label:
            middle = (self.left + self.right) / 2
            out.append(text(middle, self.bottom + 34, x_label, "middle", "label"))
        return out


@dataclass(frozen=True)
class Grid:
    """Equal cells in rows, for small multiples; every cell has room for a title and tick labels."""

    width: float
    columns: int
    cells: int
    cell_height: float
    left: float = 38.0
    """Room for tick labels before every cell that shows its y axis."""
    gap: float = 24.0
    above: float = 44.0
    below: float = 44.0
    left_of_all: bool = True
    """Whether every column has room for tick labels, or the first alone."""

    @property
    def rows(self) -> int:
        return math.ceil(self.cells / self.columns)

    @property
    def height(self) -> float:
        return self.rows * (self.above + self.cell_height + self.below)

    def place(self, index: int) -> tuple[float, float, float]:
        """(left, top, width) of a cell's plotting area."""
        row, column = divmod(index, self.columns)
        inside = self.width - self.gap * (self.columns - 1) - 8
        lefts = self.columns if self.left_of_all else 1
        each = (inside - self.left * lefts) / self.columns
        start = self.left * (column + 1 if self.left_of_all else 1) + column * (each + self.gap)
        top = self.above + row * (self.above + self.cell_height + self.below)
        return start, top, each
