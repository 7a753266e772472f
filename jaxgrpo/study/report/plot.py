"""Drawing primitives of the report's charts: scales, ticks and marks as SVG text.

Colours are classes that the page's style sheet resolves, so that one drawing serves light and dark.
Sizes are CSS pixels: each chart is drawn once per page width and never scaled much, hence its text
stays readable on a phone.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

CHARACTER = 7.0
"""Pixels that a character of a label takes at most on average, over the common system fonts."""
SHAPES = ("circle", "square", "triangle")
NARROW = 520
"""Below this width there is no room for labels beside a chart."""
RULES = ("any", "constant", "rslora", "alpha_over_r")


def rule_style(rule: str) -> tuple[str, str]:
    """(colour class, shape) of a scale rule; `any` is the uniform reference."""
    place = RULES.index(rule) if rule in RULES else 0
    return f"c{place}", ("diamond", *SHAPES)[place]


def profile_style(place: int) -> tuple[str, str]:
    """(colour class, shape) of the profile at that place."""
    return f"c{place % 3 + 1}", SHAPES[place % 3]


def escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def number(value: float) -> str:
    """A coordinate: a tenth of a pixel is enough."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Scale:
    """A linear map from data to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)

    def clip(self, value: float) -> float:
        return self(min(max(value, self.low), self.high))


@dataclass(frozen=True)
class Ticks:
    """An axis: the stretch of data it shows, round values on it, and how they read."""

    values: tuple[float, ...]
    labels: tuple[str, ...]
    low: float
    high: float

    @property
    def pairs(self) -> Iterable[tuple[float, str]]:
        return zip(self.values, self.labels, strict=True)


def finite(values: Iterable[float | None]) -> list[float]:
    """What can be drawn: neither missing, nor nan, nor infinite."""
    return [float(v) for v in values if v is not None and math.isfinite(v)]


def _stretch(values: Iterable[float | None]) -> tuple[float, float]:
    """From below the smallest to above the largest value; an end at 0 stays there."""
    known = finite(values)
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    pad = 0.05 * (high - low)
    return low - (pad if low else 0.0), high + (pad if high else 0.0)


def nice_ticks(values: Iterable[float | None], count: int = 5, signed: bool = False) -> Ticks:
    """About `count` round values on an axis that holds all finite ones."""
    low, high = _stretch(values)
    # A little finer than asked for, since the first and last round value lie inside.
    raw = 0.6 * (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999), 10 * power)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    places = [i * step for i in range(first, last + 1)]
    labels = tuple(_tick_label(value, step, signed) for value in places)
    return Ticks(tuple(places), labels, low, high)


def _tick_label(value: float, step: float, signed: bool) -> str:
    if abs(value) < step * 1e-6:
        return "0"
    if step >= 1e6 or step < 1e-4:
        return f"{value:.3g}".replace("-", "−")
    decimals = next((d for d in range(7) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 6)
    text = f"{value:+,.{decimals}f}" if signed else f"{value:,.{decimals}f}"
    return text.replace("-", "−")


def log_ticks(logs: Iterable[float | None], most: int = 6, whole: bool = False) -> Ticks:
    """An axis of natural logarithms that is labelled with what they are the logarithms of.

    Args:
        whole: whether the values are whole numbers, as ranks are.
    """
    low, high = _stretch(logs)
    places: list[float] = []
    for places in _ladders(math.exp(low), math.exp(high), whole):
        if len(places) <= most:
            break
    labels = tuple(f"{place:,.3g}" for place in places)
    return Ticks(tuple(map(math.log, places)), labels, low, high)


def _ladders(low: float, high: float, whole: bool) -> Iterator[list[float]]:
    """Values from low to high at ever larger ratios."""
    if whole and high < 1000:
        yield [float(value) for value in range(math.ceil(low), math.floor(high) + 1)]
    for steps in ((1.1,), (1.25,), (1.5, 4 / 3), (2.0,), (4.0,), (10.0,), (1e3,), (1e9,)):
        if whole and steps[0] < 1.5:
            continue
        # Up and down from 1, by these steps in turn: 1, 1.5, 2, 3, 4, 6, 8 for the third.
        up, down = [1.0], [1.0]
        while up[-1] <= high:
            up.append(up[-1] * steps[(len(up) - 1) % len(steps)])
        while down[-1] >= low:
            down.append(down[-1] / steps[-1 - (len(down) - 1) % len(steps)])
        places = [x for x in (*reversed(down), *up[1:]) if low <= x <= high]
        yield [x for x in places if not whole or abs(x - round(x)) < 1e-6]


def index_ticks(size: int, most: int = 8) -> Ticks:
    """Positions 0 .. size - 1 at a round distance, for layers and steps."""
    last = max(size - 1, 0)
    steps = (m * 10**k for k in range(10) for m in ((1, 2, 4, 5) if k == 0 else (1, 2, 5)))
    step = next(step for step in steps if last / step < most)
    places = list(range(0, last + 1, step))
    labels = tuple(f"{place:,}" for place in places)
    return Ticks(tuple(map(float, places)), labels, 0.0, float(last))


def text(x: float, y: float, content: object, anchor: str = "start", cls: str = "") -> str:
    kind = f' class="{cls}"' if cls else ""
    where = f'x="{number(x)}" y="{number(y)}"'
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f"<text {where}{side}{kind}>{escape(content)}</text>"


def fitted(content: str, room: float) -> str:
    """The text, or as much of it as the room in pixels holds and an ellipsis."""
    most = max(int(room / CHARACTER), 4)
    return content if len(content) <= most else content[: most - 1].rstrip() + "…"


def line(x1: float, y1: float, x2: float, y2: float, cls: str) -> str:
    ends = f'x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"'
    return f'<line {ends} class="{cls}"/>'


def rect(x: float, y: float, width: float, height: float, cls: str) -> str:
    size = f'width="{number(max(width, 0))}" height="{number(max(height, 0))}"'
    return f'<rect x="{number(x)}" y="{number(y)}" {size} class="{cls}"/>'


def polyline(points: Sequence[tuple[float, float]], cls: str) -> str:
    steps = "L".join(f"{number(x)} {number(y)}" for x, y in points)
    return f'<path d="M{steps}" class="{cls}"/>' if points else ""


def area(
    upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]], cls: str
) -> str:
    """The surface between two curves, or with one of them a polygon."""
    steps = "L".join(f"{number(x)} {number(y)}" for x, y in [*upper, *reversed(lower)])
    return f'<path d="M{steps}Z" class="{cls}"/>' if upper else ""


def dots(points: Iterable[tuple[float, float]], cls: str) -> str:
    """Many round dots as one path of zero-length strokes: a fifth of the bytes of circles."""
    steps = "".join(f"M{number(x)} {number(y)}h0" for x, y in points)
    return f'<path d="{steps}" class="dots {cls}"/>' if steps else ""


def marker(shape: str, x: float, y: float, cls: str, size: float = 4.5) -> str:
    """A mark that differs in shape too, for those who see its colour differently."""
    if shape == "circle":
        at = f'cx="{number(x)}" cy="{number(y)}" r="{number(size)}"'
        return f'<circle {at} class="{cls}"/>'
    if shape == "square":
        half = size * 0.88
        return rect(x - half, y - half, 2 * half, 2 * half, cls)
    s = size * 1.2
    corners = {
        "triangle": [(x, y - s), (x + s, y + s * 0.8), (x - s, y + s * 0.8)],
        "diamond": [(x, y - s), (x + s, y), (x, y + s), (x - s, y)],
    }[shape]
    return area(corners, [], cls)


def whisker(x1: float, x2: float, y: float, cls: str, cap: float = 4) -> str:
    """A horizontal interval with caps."""
    a, b, top, low = number(x1), number(x2), number(y - cap), number(y + cap)
    return f'<path d="M{a} {top}V{low}M{a} {number(y)}H{b}M{b} {top}V{low}" class="{cls}"/>'


def svg(width: float, height: float, label: str, body: Iterable[str]) -> str:
    """One drawing; `label` says to a screen reader what it shows."""
    box = f'viewBox="0 0 {number(width)} {number(height)}"'
    return f'<svg {box} role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'
