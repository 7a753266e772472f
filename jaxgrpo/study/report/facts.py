"""The report's numbers as words, the same for report.html and report.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import TypeGuard

from jaxgrpo.study.result_types import Allocation, Results

NOT_MEASURED = "not measured"
NONE = "–"
VIEWS = ("l2", "rank_free", "weight", "rms")
_NAMES = {
    "l2": "raw L2",
    "rank_free": "rank-free",
    "weight": "full weight",
    "rms": "per parameter",
    "any": "uniform ranks",
    "constant": "constant: alpha/r kept",
    "rslora": "rslora: alpha/√r",
    "alpha_over_r": "alpha_over_r: alpha kept",
    "both": "A and B",
    "W": "the frozen weight",
    "grpo": "GRPO",
    "sft": "SFT",
}


def named(key: str) -> str:
    """A view, scale rule, matrix or objective in words."""
    return _NAMES.get(key, key)


def in_order(names: Iterable[str], order: Collection[str]) -> list[str]:
    """Each name once, in that order; those that it does not hold come last."""
    distinct = dict.fromkeys(names)
    rest = [name for name in distinct if name not in order]
    return [name for name in order if name in distinct] + rest


def known(value: float | None) -> TypeGuard[float]:
    """Neither missing, nor nan, nor infinite."""
    return value is not None and math.isfinite(value)


def finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if known(value)]


def mean(values: Iterable[float | None]) -> float | None:
    usable = finite(values)
    return sum(usable) / len(usable) if usable else None


def decimal(value: float | None, places: int = 2, missing: str = NONE) -> str:
    return f"{value:.{places}f}" if known(value) else missing


def small(value: float | None) -> str:
    """Three digits, whatever the size."""
    return f"{value:.3g}" if known(value) else NONE


def percent(value: float | None, missing: str = NOT_MEASURED) -> str:
    return f"{100 * value:.1f} %" if known(value) else missing


def signed(value: float | None, places: int = 2) -> str:
    if not known(value):
        return NONE
    rounded = round(value, places) or 0.0
    return f"{rounded:{'+' if rounded else ''}.{places}f}".replace("-", "−")


def points(difference: float | None) -> str:
    """A fraction in percentage points, with its sign."""
    return signed(100 * difference, 1) if known(difference) else NONE


def count(value: float | None) -> str:
    return f"{value:,.0f}" if known(value) else NONE


def p_value(p: float | None) -> str:
    return NONE if not known(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def hundred(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def span(low: float | None, high: float | None, write: Callable[[float], str] = decimal) -> str:
    return f"{write(low)} to {write(high)}" if known(low) and known(high) else NONE


def distinct_allocations(results: Results) -> list[Allocation]:
    """Plans with the same layer ranks are one: most do not depend on the scale rule."""
    found: dict[tuple[float, ...], list[Allocation]] = {}
    for entry in results["allocations"]:
        found.setdefault(tuple(entry["layer_ranks"]), []).append(entry)
    merged: list[Allocation] = []
    for entries in found.values():
        # All of a kind, whose names differ after the first comma: "proportional ×3".
        short = ", ".join(sorted({entry["plan"].split(",")[0] for entry in entries}))
        name = entries[0]["plan"] if len(entries) == 1 else f"{short} ×{len(entries)}"
        merged.append({**entries[0], "plan": name})
    return merged


def answer(said: list[str]) -> tuple[str, str]:
    """The first sentence, and the rest; both empty where nothing is said."""
    head, stop, rest = " ".join(said).partition(". ")
    return head + stop.strip(), rest


def key_figures(results: Results) -> list[tuple[str, str]]:
    """What a hurried reader takes along, name and value."""
    base, residual, smallest = results["base"], results["residual"], results["detectable"]
    figures = [("base model", percent(base["accuracy"]))] if base else []
    for arm in results["arms"][:1]:
        figures.append((arm["name"], percent(arm["accuracy"])))
    if residual is not None:
        spread = f"{100 * residual['sd']:.1f} points, {residual['df']} df"
        figures.append(("sd of a run by itself", spread))
    if smallest is not None:
        figures.append(("smallest detectable difference", f"{100 * smallest['value']:.1f} points"))
    for one in results["contrasts"][:1]:
        figures.append(("margin", f"±{100 * one['margin']:g} points"))
    done = sum(arm["accuracy"] is not None for arm in results["arms"])
    return [*figures, ("finished", f"{done} of {len(results['arms'])} arms")]
