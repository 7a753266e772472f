"""A study's question and its answer, in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxgrpo.study.config import StudyConfig
from jaxgrpo.study.result_types import (
    ArmResult,
    Contrast,
    DesignResult,
    Detectable,
    Later,
    Residual,
    Trend,
)


def question(config: StudyConfig) -> str:
    if config.study.design is not None:
        return (
            f"At {config.lora.rank} ranks per adapter on average: do ranks proportional to the "
            "gradient change accuracy, and is it the ranks or the learning speed that they bring?"
        )
    plans = [p for p in config.study.arms.plans if p != "uniform"]
    ranks = ", ".join(map(str, config.mean_ranks))
    budget = f"a mean rank of {ranks}" if len(config.mean_ranks) == 1 else f"mean ranks of {ranks}"
    asked = []
    if plans:
        asked.append(
            f"does giving layers different ranks ({', '.join(plans)}) beat the same rank everywhere"
        )
    if len(config.mean_ranks) > 1:
        asked.append("does accuracy depend on the rank at all")
    if len(config.study.profile.objectives) > 1:
        asked.append("does GRPO spread its gradient over layers as SFT does")
    if config.study.probe.scale_rules:
        asked.append("does a layer's rank draw gradient to it")
    *others, last = asked or ["how is the gradient spread over layers"]
    return f"At {budget} per adapter: {', '.join(others)}{', and ' if others else ''}{last}?"


def verdict(
    arms: Sequence[ArmResult],
    contrasts: Sequence[Contrast],
    residual: Residual | None,
    detectable: Detectable | None,
    trend: Trend | None,
) -> list[str]:
    """What can be said, the most important first: an answer, each arm, and how sure.

    "No" needs every arm to be worse or its interval to end below the margin; what is neither shown
    to differ nor to be equivalent is called open.
    """
    if {arm["plan"] for arm in arms} == {"uniform"} and len(
        {arm["mean_rank"] for arm in arms}
    ) == 1:
        return ["Nothing is compared: every arm has the same rank everywhere."]
    if not contrasts:
        return ["No arm is finished together with its uniform reference yet."]
    if residual is None:
        shown = contrasts if len(contrasts) <= 4 else contrasts[:1]
        return [
            "One run per arm says nothing of another run, so nothing is tested. Between these "
            f"trained models: {'; '.join(map(_untested, shown))}."
        ]
    plans = [arm["versus"] for arm in arms if arm["versus"] and arm["plan"] != "uniform"]
    sentences = [_headline(plans)] if plans else []
    if trend is not None:
        sentences.append(
            f"Accuracy changes by {100 * trend['slope']:+.1f} points per doubling of the rank "
            f"({100 * trend['low']:+.1f} to {100 * trend['high']:+.1f}, p = {trend['p']:.2g}, "
            f"{trend['df']:.3g} df)."
        )
    primary = next((c for c in contrasts if c["family"] == "primary"), None)
    if primary is not None:
        within = ""
        if primary["verdict"] == "equivalent":
            within = f" within {_points(primary['margin'])} points"
        sentences.append(f"Primary: {_tested(primary)}, {primary['verdict']}{within}.")
    for word in ("better", "worse", "equivalent", "open"):
        rest = [c for c in contrasts if c["verdict"] == word and c is not primary]
        if rest:
            sentences.append(f"{word.capitalize()}: {_listed(rest)}.")
    return sentences + how_sure(residual, detectable)


def after_a_look(later: Later | None) -> list[str]:
    """Which runs were added or left out after a report, and what a p is worth then."""
    if later is None:
        return []
    sentences = []
    if later["seeds"]:
        seeds, looks = ", ".join(map(str, later["seeds"])), later["reports"]
        sentences += [
            f"Exploratory: seeds {seeds} were added after a first report.",
            "Whoever adds seeds until the result pleases finds a difference where there is none "
            f"more often than in 5 %: with {looks} looks in up to {5 * looks} %, which no p below "
            "counts. A study of its own seeds, as many as planned, would confirm it.",
        ]
    if later["arms"]:
        sentences.append(
            f"Exploratory: {', '.join(later['arms'])} came after a first report, chosen with its "
            "results in sight; Holm's correction counts the arms that are listed, not those that "
            "might have been added."
        )
    if later["left_out"]:
        sentences.append(
            f"Left out here, though an earlier report had them: {', '.join(later['left_out'])}."
        )
    return sentences


def convergence(arms: Sequence[ArmResult]) -> str:
    """Whether the reward had stopped rising when training ended, in a sentence.

    The last quarter of the steps against the quarter before, steps taken as independent.
    """
    rises = []
    for arm in arms:
        values = np.array(arm["reward"].get("mean", []), float)
        quarter = len(values) // 4
        if quarter >= 2 and np.isfinite(values[-2 * quarter :]).all():
            before, last = values[-2 * quarter : -quarter], values[-quarter:]
            error = math.sqrt((last.var(ddof=1) + before.var(ddof=1)) / quarter)
            rises.append((float(last.mean() - before.mean()), error))
    if not rises:
        return ""
    rising = sum(gain > 2 * error for gain, error in rises)
    gains = [gain for gain, _ in rises]
    change = f"{min(gains):+.3f} to {max(gains):+.3f}"
    basis = (
        f"(last quarter of the steps less the quarter before: {change} over {len(rises)} arms; "
        "counted as a rise above two standard errors over steps)"
    )
    if not rising:
        unseen = f"{max(2 * error for _, error in rises):.3f}"
        return (
            f"No arm's reward is seen to rise at the end {basis}; below {unseen} it would not be."
        )
    return (
        f"Training has not converged: the reward still rises in {rising} of {len(rises)} arms "
        f"{basis}. Arms are compared by how fast they learn, not by where they would end."
    )


def how_sure(residual: Residual | None, detectable: Detectable | None) -> list[str]:
    """How much a run moves, and what a study of this size can find."""
    sentences = []
    if residual is not None:
        sentences.append(
            f"A run moves by an sd of {_points(residual['sd'])} points by itself "
            f"({_points(residual['low'])} to {_points(residual['high'])}, {residual['df']} df)."
        )
    if detectable is not None:
        ends = (_points(detectable["low"]), _points(detectable["high"]))
        over = f" ({' to '.join(ends)} over the interval of that sd)" if ends[0] != ends[1] else ""
        sentences.append(
            f"At this size the primary contrast finds a true difference of "
            f"{_points(detectable['value'])} points with 80 % power{over}."
        )
    return sentences


def design_verdict(design: DesignResult, contrasts: Sequence[Contrast]) -> list[str]:
    """What a factorial study says at its latest look, and whether it goes on."""
    look = next((one for one in design["looks"] if one["blocks"] == design["look"]), None)
    if look is None:
        first = design["looks"][0]
        return [
            f"{first['finished']} of the {first['blocks']} blocks of the first look have finished; "
            "nothing is analysed before."
        ]
    last = design["looks"][-1]["blocks"]
    after = f"after {look['blocks']} of {last} blocks"
    head = (
        f"Decided {after}: proportional ranks are {_than_uniform(contrasts[0])}."
        if look["decided"]
        else f"Ended {after}, with what is open left open."
        if look["blocks"] == last
        else f"Not decided {after}: the study goes on to its next look."
    )
    sentences = [
        head,
        f"At this look a contrast differs at p <= {look['differs_at']:.4f} and is equivalent at "
        f"p <= {look['equivalent_at']:.4f}.",
    ]
    return sentences + [f"{c['verdict'].capitalize()}: {_tested(c)}." for c in contrasts]


def _than_uniform(primary: Contrast) -> str:
    if primary["verdict"] == "equivalent":
        return f"equivalent to uniform ones within {100 * primary['margin']:g} points"
    return f"{primary['verdict']} than uniform ones"


def _headline(plans: Sequence[Contrast]) -> str:
    better = [c for c in plans if c["verdict"] == "better"]
    if better:
        return f"Yes, here it helps: {_listed(better)}."
    below = all(
        c["verdict"] == "worse" or (c["high"] is not None and c["high"] < c["margin"])
        for c in plans
    )
    if below:
        margin = _points(max(c["margin"] for c in plans))
        return (
            f"No plan beats uniform ranks by {margin} points: each is worse or bounded below that."
        )
    if all(c["verdict"] == "open" for c in plans):
        return "Open: no plan is shown to be better, worse or equivalent."
    shown = []
    for word in ("worse", "equivalent", "open"):
        if names := [c["name"].split(" - ")[0] for c in plans if c["verdict"] == word]:
            shown.append(f"{' and '.join(names) if len(names) <= 4 else len(names)} {word}")
    return f"Open: no plan is shown to be better; {', '.join(shown)}."


def _listed(contrasts: Sequence[Contrast]) -> str:
    """Each difference, or of many only the range: the table has the rest."""
    if len(contrasts) <= 4:
        return "; ".join(map(_tested, contrasts))
    ordered = sorted(contrasts, key=lambda c: c["difference"])
    return f"{len(ordered)} contrasts, from {_tested(ordered[0])} to {_tested(ordered[-1])}"


def _tested(c: Contrast) -> str:
    assert c["low"] is not None and c["high"] is not None and c["p_holm"] is not None
    level = f" at {100 * c['confidence']:.4g} %" * (c["confidence"] != 0.95)
    within = ""
    if c["verdict"] == "equivalent":
        # Two one-sided tests ask less than that the interval lie within the margin.
        within = f"; of {100 * c['margin']:g} or more either way, p = {c['p_equivalent']:.2g}"
    return (
        f"{c['name']} is {100 * c['difference']:+.1f} points ({100 * c['low']:+.1f} to "
        f"{100 * c['high']:+.1f}{level}, p = {c['p_holm']:.2g}{within}, "
        f"{len(c['per_seed'])} seeds, {c['df']:.3g} df)"
    )


def _untested(c: Contrast) -> str:
    fixed = c["fixed_models"]
    return (
        f"{c['name']} is {100 * c['difference']:+.1f} points over these items "
        f"({100 * fixed['low']:+.1f} to {100 * fixed['high']:+.1f} over others like them)"
    )


def _points(value: float) -> str:
    return f"{100 * value:.1f}"
