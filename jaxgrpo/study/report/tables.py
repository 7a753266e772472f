"""The report's tables, the same for report.html and report.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxgrpo.study.report.facts import (
    NONE,
    NOT_MEASURED,
    count,
    decimal,
    distinct_allocations,
    duration,
    known,
    objective_name,
    p_value,
    percent,
    signed,
    small,
    span,
    times,
    view_name,
)


@dataclass(frozen=True)
class Table:
    """Rows of finished text.

    Attributes:
        texts: how many of the first columns are words, hence set to the left.
    """

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    texts: int = 1


def accuracy_table(results: dict) -> Table:
    headings = ("arm", "accuracy", "95 % interval, %", "single seeds, %", "difference, points")
    headings += ("95 % interval, points", "p", "p (Holm)", "ranks", "parameters")
    rows = []
    for arm in results["arms"]:
        versus = arm["versus"] or {}
        seeds = ", ".join(f"{100 * value:.1f}" for value in arm["per_seed"]) or NONE
        low, high = times(versus.get("low"), 100), times(versus.get("high"), 100)
        difference = signed(times(versus.get("difference"), 100), places=1)
        if arm["plan"] == "uniform" and not versus and arm["accuracy"] is not None:
            difference = "reference"
        rows.append(
            (
                arm["name"],
                percent(arm["accuracy"]),
                span(times(arm["low"], 100), times(arm["high"], 100)),
                seeds,
                difference,
                span(low, high, sign=True),
                p_value(versus.get("p")),
                p_value(versus.get("p_holm")),
                _rank_range(arm),
                count(arm["trainable_parameters"], NONE),
            )
        )
    base = results["base"]
    if base:
        interval = span(times(base["low"], 100), times(base["high"], 100))
        blank = (NONE,) * (len(headings) - 4)
        rows.append(("base model, untrained", percent(base["accuracy"]), interval, NONE, *blank))
    return Table(headings, rows)


def slope_table(results: dict) -> Table:
    headings = ("view", "scale rule", "slope", "95 % interval", "predicted", "prediction lies")
    rows = []
    for entry in results["amplification"]:
        inside = entry["low"] <= entry["predicted"] <= entry["high"]
        rows.append(
            (
                view_name(entry["view"]),
                entry["scale_rule"],
                signed(entry["slope"]),
                span(entry["low"], entry["high"], 2, sign=True),
                signed(entry["predicted"], places=1),
                "inside the interval" if inside else "outside the interval",
            )
        )
    return Table(headings, rows, texts=2)


def concentration_table(results: dict) -> Table:
    """How unevenly the gradient is spread over layers, per profile and view."""
    headings = ("profile", "view", "largest / smallest share", "95 % interval")
    headings += ("top layers hold", "95 % interval, %", "early/late correlation")
    rows = []
    for profile in results["profiles"]:
        for view, found in profile["views"].items():
            ratio, top = found["max_min"], found["top_share"]
            rows.append(
                (
                    objective_name(profile["objective"]),
                    view_name(view),
                    decimal(ratio["value"], "infinite"),
                    span(ratio["low"], ratio["high"], 2),
                    f"{percent(top['value'])} ({top['layers']} of {profile['layers']})",
                    span(times(top["low"], 100), times(top["high"], 100)),
                    decimal(found["early_late_correlation"], "not defined", 3),
                )
            )
    return Table(headings, rows, texts=2)


def share_table(results: dict) -> Table:
    """Each layer's share in per cent with its interval; a column per profile and view."""
    columns = [
        (f"{objective_name(profile['objective'])}, {view_name(view)}", found)
        for profile in results["profiles"]
        for view, found in profile["views"].items()
    ]
    layers = max((profile["layers"] for profile in results["profiles"]), default=0)
    rows = []
    for layer in range(layers):
        cells = []
        for _, found in columns:
            low, high = (times(found[side][layer], 100) for side in ("low", "high"))
            share = decimal(times(found["share"][layer], 100), NONE)
            cells.append(f"{share} ({span(low, high, 2)})")
        rows.append((str(layer), *cells))
    return Table(("layer", *(f"{name}, %" for name, _ in columns)), rows)


def allocation_table(results: dict) -> Table:
    rows = []
    for entry in distinct_allocations(results):
        ranks = " ".join(f"{rank:.1f}".removesuffix(".0") for rank in entry["layer_ranks"])
        rows.append((entry["plan"], ranks, entry["note"] or NONE))
    return Table(("plan", "mean rank of layers 0, 1, 2, ...", "note"), rows, texts=3)


def training_table(results: dict) -> Table:
    """Where the curves begin and end: means of the first and last tenth of the steps."""
    headings = ("arm", "steps", "reward, first tenth", "reward, last tenth", "drift, last tenth")
    rows = []
    for arm in results["arms"]:
        reward, drift = arm["reward"]["mean"], arm["drift"]["mean"]
        tenth = max(1, len(reward) // 10)
        rows.append(
            (
                arm["name"],
                count(len(reward)) if reward else NOT_MEASURED,
                decimal(_mean(reward[:tenth]), NONE, 3),
                decimal(_mean(reward[-tenth:]), NONE, 3),
                small(_mean(drift[-tenth:]), NONE),
            )
        )
    return Table(headings, rows)


def _mean(values: list[float]) -> float | None:
    usable = [value for value in values if known(value)]
    return sum(usable) / len(usable) if usable else None


def cost_table(results: dict) -> Table:
    headings = ("arm", "seeds", "parameters", "sum of ranks", "training time", "tokens", "tokens/s")
    rows = [
        (
            arm["name"],
            str(len(arm["seeds"])),
            count(arm["trainable_parameters"]),
            count(arm["total_rank"]),
            duration(arm["seconds"]),
            count(arm["tokens"]),
            count(arm["tokens_per_s"]),
        )
        for arm in results["arms"]
    ]
    return Table(headings, rows)


def paper_table(results: dict) -> Table:
    rows = [
        (row["quantity"], row["paper"], row["ours"], row["note"] or NONE)
        for row in results["paper"]
    ]
    return Table(("quantity", "the paper", "here", "note"), rows, texts=4)


def pair_table(pairs: dict[str, Any], heading: str) -> Table:
    return Table((heading, "value"), [(key, str(value)) for key, value in pairs.items()], texts=2)


def _rank_range(arm: dict) -> str:
    low, high = arm["rank_min"], arm["rank_max"]
    if low is None or high is None:
        return NONE
    return f"{low}" if low == high else f"{low} to {high}"
