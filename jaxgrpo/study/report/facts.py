"""The report's numbers as words, the same for report.html and report.md."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

NOT_MEASURED = "not measured"
NONE = "–"
VIEWS = {
    "l2": "raw L2",
    "rank_free": "rank-free",
    "weight": "full weight",
    "rms": "per parameter",
}
OBJECTIVES = {"grpo": "GRPO", "sft": "SFT"}


def in_order(names: Iterable[str], order: Collection[str]) -> list[str]:
    """Each name once, in that order; those that it does not hold come last."""
    distinct = dict.fromkeys(names)
    return [name for name in order if name in distinct] + [
        name for name in distinct if name not in order
    ]


def known(value: Any) -> bool:
    """Neither missing, nor nan, nor infinite."""
    return value is not None and math.isfinite(value)


def percent(value: float | None, missing: str = NOT_MEASURED, decimals: int = 1) -> str:
    return f"{100 * value:.{decimals}f} %" if value is not None and known(value) else missing


def decimal(value: float | None, missing: str = NOT_MEASURED, places: int = 2) -> str:
    return f"{value:.{places}f}" if value is not None and known(value) else missing


def signed(value: float | None, missing: str = NONE, places: int = 2) -> str:
    if value is None or not known(value):
        return missing
    rounded = round(value, places) or 0.0
    return f"{rounded:{'+' if rounded else ''}.{places}f}".replace("-", "−")


def count(value: float | None, missing: str = NOT_MEASURED) -> str:
    return f"{value:,.0f}" if value is not None and known(value) else missing


def p_value(p: float | None) -> str:
    if p is None or not known(p):
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def small(value: float | None, missing: str = NOT_MEASURED) -> str:
    """Three digits, whatever the size."""
    return f"{value:.3g}".replace("-", "−") if value is not None and known(value) else missing


def span(low: float | None, high: float | None, places: int = 1, sign: bool = False) -> str:
    if low is None or high is None or not (known(low) and known(high)):
        return NONE
    write = signed if sign else decimal
    return f"{write(low, NONE, places)} to {write(high, NONE, places)}"


def duration(seconds: float | None) -> str:
    if seconds is None or not known(seconds):
        return NOT_MEASURED
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def times(values: Any, factor: float) -> float | None:
    return None if values is None else factor * values


def view_name(view: str) -> str:
    return VIEWS.get(view, view)


def profile_views(results: dict) -> list[str]:
    """Views that any profile has measured, raw first."""
    return in_order((v for profile in results["profiles"] for v in profile["views"]), VIEWS)


def objective_name(objective: str) -> str:
    return OBJECTIVES.get(objective, objective)


def distinct_allocations(results: dict) -> list[dict]:
    """Plans with the same layer ranks are one: most do not depend on the scale rule."""
    found: dict[tuple[float, ...], list[dict]] = {}
    for entry in results["allocations"]:
        found.setdefault(tuple(entry["layer_ranks"]), []).append(entry)
    merged = []
    for ranks, entries in found.items():
        name = entries[0]["plan"]
        if len(entries) > 1:
            # All of a kind, whose names differ after the first comma: "proportional ×3".
            short = {entry["plan"].split(",")[0] for entry in entries}
            name = f"{', '.join(sorted(short))} ×{len(entries)}"
        merged.append({"plan": name, "layer_ranks": list(ranks), "note": entries[0]["note"]})
    return merged


def answers(results: dict) -> list[tuple[str, list[str]]]:
    """The two questions' answers: (topic, sentences), the first sentence being the answer."""
    accuracy, about_rank = (
        [part for sentence in results[key] for part in _sentences(sentence)]
        for key in ("verdict", "amplification_verdict")
    )
    if not about_rank:
        about_rank = ["Whether a layer's rank draws gradient to it is not measured yet."]
    return [("Accuracy", accuracy), ("Gradient amplification", about_rank)]


def _sentences(text: str) -> list[str]:
    """The answer, and the numbers behind it where they are in the same string."""
    head, stop, tail = text.partition(". ")
    return [head + stop.strip(), tail] if tail else [text]


def progress(results: dict) -> str:
    done = sum(arm["accuracy"] is not None for arm in results["arms"])
    return f"{done} of {len(results['arms'])} arms finished"


def key_figures(results: dict) -> list[tuple[str, str]]:
    """What a hurried reader takes along, name and value."""
    arms = results["arms"]
    uniform = next((arm for arm in arms if arm["plan"] == "uniform"), None)
    figures = []
    if results["base"]:
        figures.append(("base model", percent(results["base"]["accuracy"])))
    if uniform is not None:
        figures.append(("uniform ranks", percent(uniform["accuracy"])))
    compared = [arm for arm in arms if arm["versus"] and known(arm["versus"]["difference"])]
    if compared:
        best = max(compared, key=lambda arm: arm["versus"]["difference"])
        points = signed(100 * best["versus"]["difference"], places=1)
        figures.append((f"best other plan, {best['name']}", f"{points} points"))
    detectable = results["minimum_detectable_effect"]
    if detectable is not None:
        figures.append(("smallest detectable difference", f"{100 * detectable:.1f} points"))
    done = sum(arm["accuracy"] is not None for arm in arms)
    figures.append(("arms finished", f"{done} of {len(arms)}"))
    return figures
