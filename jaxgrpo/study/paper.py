"""The paper's published figures beside a study's own. No jax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxgrpo.config import EMBEDDED
from jaxgrpo.study.config import Arm, StudyConfig
from jaxgrpo.study.gradient_types import Landscape, Profile, Spread
from jaxgrpo.study.result_types import ArmResult, PaperRow

# arXiv 2605.07366, as published; accuracies are of 200 test items and one seed.
PAPER = {
    "uniform": 0.745,
    "proportional": 0.70,
    "random": 0.675,
    "reduced": 0.65,
    "base": 0.66,
    "max_min_uniform": 2.17,
    "max_min_proportional": 3.00,
    "top_share": 0.357,
    "early_late": 0.962,
}


def paper_rows(
    config: StudyConfig,
    groups: Mapping[str, Sequence[Arm]],
    arms: Sequence[ArmResult],
    profiles: Sequence[Profile],
    spread: Sequence[Spread],
    landscape: Sequence[Landscape],
) -> list[PaperRow]:
    """The paper's figures beside ours; other models and data are another question, and say so."""
    same = "" if config.model.path != EMBEDDED else "another model and task: not a replication"
    rows = []
    for plan in ("uniform", "proportional", "random", "reduced"):
        entry = next((a for a in arms if a["plan"] == plan and a["accuracy"] is not None), None)
        ours = "not measured" if entry is None else f"{entry['accuracy']:.1%}"
        rows.append(_row(f"accuracy, {plan}", f"{PAPER[plan]:.1%} (n = 200, 1 seed)", ours, same))
    first: dict[str, str] = {}
    for name, runs in groups.items():
        if runs[0].objective == "grpo":
            first.setdefault(runs[0].plan, name)
    uniform = next((one for one in landscape if one["run"] == first.get("uniform")), None)
    other = next((one for one in spread if one["run"] == first.get("proportional")), None)
    for plan, found, ratios, note in (
        ("uniform", uniform, uniform and uniform["max_min"], "raw L2, over the whole run"),
        ("proportional", other, other and other["own"], "2.17 x sqrt(40/20) = 3.07"),
    ):
        ours = "not measured"
        if found and ratios and ratios[-1]["value"] is not None:
            whole, seeds = ratios[-1], found["seeds"]
            over = f"{whole['low']:.2f} to {whole['high']:.2f} over {seeds} seeds"
            ours = f"{whole['value']:.2f}" + f" ({over})" * (seeds > 1)
        quantity = f"max/min layer share, {plan} run"
        rows.append(_row(quantity, f"{PAPER[f'max_min_{plan}']:.2f}", ours, note))
    grpo = next((p["views"].get("l2") for p in profiles if p["objective"] == "grpo"), None)
    if grpo:
        top, correlation = grpo["top_share"], grpo["early_late_correlation"]
        rows.append(
            _row(
                "share of the top 30 % of layers",
                f"{PAPER['top_share']:.1%}",
                f"{top['value']:.1%} ({top['layers']} layers)",
                "GRPO profile",
            )
        )
        ours = "not measured" if correlation is None else f"{correlation:.3f}"
        rows.append(_row("early/late correlation", f"{PAPER['early_late']}", ours, "GRPO profile"))
    return rows


def _row(quantity: str, paper: str, ours: str, note: str) -> PaperRow:
    return {"quantity": quantity, "paper": paper, "ours": ours, "note": note}
