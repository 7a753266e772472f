"""Which differences a study tests, in which family, and what is said of each. No jax.

One primary contrast is tested at the full level. The others form a second family under Holm, as
large as it was planned, whatever has finished: an arm that is missing counts as p = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxgrpo.stats import RunContrast, RunLayout, holm, holm_levels, sign_flip_exact
from jaxgrpo.study.config import Arm, StudyConfig, list_arms
from jaxgrpo.study.evals import Answers
from jaxgrpo.study.result_types import Contrast, Detectable, Family, Verdict

ALPHA = 0.05


@dataclass(frozen=True)
class Planned:
    """A contrast that the study set out to test.

    Attributes:
        weights: group of arms -> weight.
        reference: what the first side is held against, in words.
        about: the group whose `versus` it is, if it is one arm's.
    """

    name: str
    reference: str
    weights: Mapping[str, float]
    family: Family
    margin: float
    about: str | None = None


@dataclass(frozen=True)
class Compared:
    """What was planned and what came of it.

    Attributes:
        answers: group of arms -> its answers, in the layout's order; those that have finished.
        layout: None before any has.
        contrasts: name of a planned one -> what was found.
    """

    planned: Sequence[Planned]
    answers: Mapping[str, Answers]
    layout: RunLayout | None
    contrasts: Mapping[str, Contrast]


def planned_contrasts(config: StudyConfig, labels: Mapping[str, str]) -> list[Planned]:
    """Every plan against the uniform arm of its mean rank, and uniform arms against the widest.

    The primary one is proportional - uniform under the first scale rule at lora.rank, or what comes
    nearest to it: the first plan that is there.
    """
    arms = {arm.group: arm for arm in list_arms(config)}
    pairs = [
        (group, reference)
        for group, arm in arms.items()
        if (reference := reference_of(arm, arms, config)) is not None
    ]
    if not pairs:
        return []

    def distance(pair: tuple[str, str]) -> tuple:
        arm = arms[pair[0]]
        rule = arm.scale_rule or config.study.arms.scale_rules[0]
        return (
            arm.objective != config.study.arms.objectives[0],
            arm.plan == "uniform",
            arm.plan != "proportional",
            rule != config.study.arms.scale_rules[0],
            arm.mean_rank != config.lora.rank,
        )

    primary = min(pairs, key=distance)  # the first of equals
    return [
        Planned(
            name=f"{labels[group]} - {labels[reference]}",
            reference=labels[reference],
            weights={group: 1.0, reference: -1.0},
            family="primary" if (group, reference) == primary else "second",
            margin=config.study.margin,
            about=group,
        )
        for group, reference in sorted(pairs, key=lambda pair: pair != primary)
    ]


def reference_of(arm: Arm, arms: Mapping[str, Arm], config: StudyConfig) -> str | None:
    """The group that an arm is held against; None for a reference."""
    rules = (arm.scale_rule or config.study.arms.scale_rules[0], None)
    uniform = {
        other.mean_rank: group
        for group, other in arms.items()
        # A uniform arm at lora.rank is the same under every rule, and stands for all of them.
        if other.plan == "uniform"
        and other.objective == arm.objective
        and other.scale_rule in rules
    }
    if arm.plan != "uniform":
        return uniform.get(arm.mean_rank)
    widest = max(uniform)
    return None if arm.mean_rank == widest else uniform[widest]


def compare(
    planned: Sequence[Planned],
    answers: Mapping[str, Answers],
    layout: RunLayout,
    differs_at: float = ALPHA,
    equivalent_at: float = ALPHA,
) -> dict[str, Contrast]:
    """name -> what was found, of the contrasts whose arms have finished.

    Args:
        answers: group -> its answers, in the layout's order of arms.
        differs_at, equivalent_at: the levels of this look; without looks, both 5 %.
    """
    groups = list(answers)
    found: dict[str, tuple[Planned, RunContrast]] = {}
    for one in planned:
        if set(one.weights) <= set(groups):
            weights = [one.weights.get(group, 0.0) for group in groups]
            found[one.name] = (one, layout.contrast(weights))
    tested = layout.residual is not None
    results: dict[str, Contrast] = {}
    for family in ("primary", "second"):
        names = [one.name for one in planned if one.family == family]
        p = [found[name][1].p if tested and name in found else 1.0 for name in names]
        levels = holm_levels(p, differs_at)
        for name, level, adjusted in zip(names, levels, holm(p), strict=True):
            if name in found:
                one, contrast = found[name]
                first = differs_at / len(names)
                share = level / differs_at
                entry = _entry(one, contrast, level, first, _fixed_p(one, answers))
                if tested:
                    entry["p_holm"] = adjusted
                    entry["p_equivalent"] = contrast.p_equivalent(one.margin)
                    entry["equivalent_at"] = equivalent_at * share
                    entry["verdict"] = _verdict(entry, adjusted <= differs_at)
                results[name] = entry
    return results


def _entry(
    one: Planned, contrast: RunContrast, level: float, first_level: float, fixed_p: float
) -> Contrast:
    tested = contrast.run_df > 0
    interval = contrast.interval(1 - level) if tested else None
    return {
        "name": one.name,
        "arm": one.reference,
        "family": one.family,
        "difference": contrast.difference,
        "standard_error": contrast.standard_error if tested else None,
        "df": contrast.df if tested else None,
        "confidence": 1 - level,
        "low": interval and interval.low,
        "high": interval and interval.high,
        "p": contrast.p if tested else None,
        "p_holm": None,
        "p_equivalent": None,
        "equivalent_at": None,
        "margin": one.margin,
        "verdict": "open",
        "detectable": contrast.detectable(first_level) if tested else None,
        "per_seed": contrast.per_seed.tolist(),
        "fixed_models": {"p": fixed_p, "low": contrast.fixed.low, "high": contrast.fixed.high},
    }


def _verdict(found: Contrast, differs: bool) -> Verdict:
    if differs and found["difference"] != 0:
        return "better" if found["difference"] > 0 else "worse"
    p, level = found["p_equivalent"], found["equivalent_at"]
    return "equivalent" if p is not None and level is not None and p <= level else "open"


def _fixed_p(one: Planned, answers: Mapping[str, Answers]) -> float:
    """Items' right answers summed over seeds and samples are whole, and so are their sums."""
    # The weights are whole or halves.
    sums = [round(2 * w) * answers[group].counts.sum(axis=0) for group, w in one.weights.items()]
    return sign_flip_exact(np.sum(sums, axis=0))


def detectable(
    planned: Sequence[Planned], answers: Mapping[str, Answers], layout: RunLayout
) -> Detectable | None:
    """Of the primary contrast; its range is that of the residual sd's own 95 % interval."""
    primary = next((one for one in planned if one.family == "primary"), None)
    residual = layout.residual
    if primary is None or residual is None or not set(primary.weights) <= set(answers):
        return None
    contrast = layout.contrast([primary.weights.get(group, 0.0) for group in answers])
    # Runs that are all alike say nothing of how far their sd may be off.
    low, high = (
        contrast.detectable(ALPHA, factor=end / residual.sd if residual.sd else 1.0)
        for end in (residual.low, residual.high)
    )
    return {"value": contrast.detectable(ALPHA), "low": low, "high": high}
