"""What a report is made of: report.html and report.md hold the same parts in the same order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from jaxgrpo.study.result_types import Results


@dataclass(frozen=True)
class Table:
    """Rows of finished text; the first `texts` columns hold words, and `wraps` lets them break."""

    caption: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    texts: int = 1
    wraps: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure: `draw` takes (results, narrow) and returns None where there is nothing to draw.

    `numbers` is what it shows as a table, folded below it.
    """

    id: str
    title: str
    caption: str
    draw: Callable[[Results, bool], Figure | None]
    numbers: Table | None = None


Part = str | Table | Chart  # a string is a paragraph
