"""From a study's run directories to numbers: everything the report says. numpy only, no jax."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import cache

import numpy as np

from jaxgrpo.stats import RunLayout
from jaxgrpo.study.amplification import Probes, amplification_verdict
from jaxgrpo.study.arm_results import (
    accuracy_of,
    arm_result,
    compare_rewards,
    cut_results,
    read_json,
)
from jaxgrpo.study.comparisons import Compared, compare, detectable, planned_contrasts
from jaxgrpo.study.config import Arm, StudyConfig, StudyFiles, arm_label, list_arms
from jaxgrpo.study.design import CELLS
from jaxgrpo.study.evals import Answers, Questions, read_answers
from jaxgrpo.study.factorial import analyse
from jaxgrpo.study.gradient_types import Profile, View
from jaxgrpo.study.history import later_arms
from jaxgrpo.study.importance import importance
from jaxgrpo.study.layer_spread import finished_norms, landscapes, layer_spread
from jaxgrpo.study.norms import layer_norms, read_norms
from jaxgrpo.study.paper import paper_rows
from jaxgrpo.study.result_types import (
    RESULTS_FORMAT,
    Allocation,
    Base,
    DesignResult,
    Residual,
    Results,
    Trend,
)
from jaxgrpo.study.sections import DYNAMIC
from jaxgrpo.study.settings import study_settings
from jaxgrpo.study.verdict import (
    after_a_look,
    convergence,
    design_verdict,
    how_sure,
    question,
    verdict,
)

VIEWS = ("l2", "weight", "rank_free", "rms")


def collect_results(config: StudyConfig) -> Results:
    """What results.json holds; what has not run yet is null or left out.

    Raises:
        ConfigError: two arms were not asked the same questions in the same way.
    """
    files = StudyFiles(config.run_dir)
    groups, compared, design = _runs(config, files)
    planned, answers, layout, contrasts = (
        compared.planned,
        compared.answers,
        compared.layout,
        compared.contrasts,
    )
    about = {one.about: contrasts[one.name] for one in planned if one.name in contrasts}
    arms = [
        arm_result(files, runs, accuracy_of(group, answers, layout), about.get(group), config)
        for group, runs in groups.items()
    ]
    compare_rewards(arms)
    profiles = [
        profile
        for objective in config.study.profile.objectives
        if (profile := _profile(files, objective)) is not None
    ]
    probes, norms = Probes(config, files), cache(finished_norms)
    slopes = probes.slopes()
    spread, landscape = layer_spread(groups, files, norms), landscapes(groups, files, norms)
    smallest = None if layout is None else detectable(planned, answers, layout)
    trend = _rank_trend(config, groups, answers, layout)
    residual = None if layout is None else _residual(layout)
    later, listed = later_arms(config), list(contrasts.values())
    said = (
        after_a_look(later) + verdict(arms, listed, residual, smallest, trend)
        if design is None
        else design_verdict(design, listed) + how_sure(residual, smallest)
    )
    return {
        "format": RESULTS_FORMAT,
        "title": config.study.title,
        "question": question(config),
        "verdict": said,
        "convergence": convergence(arms),
        "settings": study_settings(config, files),
        "versions": _versions(files, config),
        "base": _base(config, files),
        "arms": arms,
        "cuts": cut_results(config, files, groups),
        "contrasts": listed,
        "residual": residual,
        "detectable": smallest,
        "rank_trend": trend,
        "later": later,
        "design": design,
        "profiles": profiles,
        "amplification": slopes,
        "amplification_verdict": amplification_verdict(slopes, probes.of_weights(), probes.drawn),
        "spread": spread,
        "landscape": landscape,
        "paper": paper_rows(config, groups, arms, profiles, spread, landscape),
        "allocations": _allocations(config, files, groups),
    }


def _runs(
    config: StudyConfig, files: StudyFiles
) -> tuple[dict[str, list[Arm]], Compared, DesignResult | None]:
    """Groups of arms, what their comparison gave, and, of a factorial, its design."""
    groups: dict[str, list[Arm]] = {}
    for arm in list_arms(config):
        groups.setdefault(arm.group, []).append(arm)
    if config.study.design is None:
        return groups, _compared(config, files, groups), None
    analysis = analyse(config)
    done = analysis.design["look"] or 0
    cells = {
        arms[0].plan: [arm for arm in arms if arm.seed <= max(done, 1)]
        for arms in sorted(groups.values(), key=lambda arms: list(CELLS).index(arms[0].plan))
    }
    return cells, analysis.compared, analysis.design


def _residual(layout: RunLayout) -> Residual | None:
    found = layout.residual
    if found is None:
        return None
    return {"sd": found.sd, "df": found.df, "low": found.low, "high": found.high}


def _compared(config: StudyConfig, files: StudyFiles, groups: dict[str, list[Arm]]) -> Compared:
    """The plans of `study.arms`, those whose seeds have all finished."""
    answers, questions = {}, Questions()
    for group, arms in groups.items():
        found = read_answers([files.arm(arm) for arm in arms], config.steps, config, questions)
        if found is not None:
            answers[group] = found
    labels = {group: arm_label(arms[0], config) for group, arms in groups.items()}
    planned = planned_contrasts(config, labels)
    layout = RunLayout(np.array([one.cells for one in answers.values()])) if answers else None
    contrasts = {} if layout is None else compare(planned, answers, layout)
    return Compared(planned, answers, layout, contrasts)


def _rank_trend(
    config: StudyConfig,
    groups: dict[str, list[Arm]],
    answers: Mapping[str, Answers],
    layout: RunLayout | None,
) -> Trend | None:
    """Slope of the uniform arms' accuracy on log2 of their rank, under the first scale rule."""
    rules = (config.study.arms.scale_rules[0], None)
    ranks = {
        group: arms[0].mean_rank
        for group, arms in groups.items()
        if arms[0].plan == "uniform" and arms[0].scale_rule in rules
    }
    if (
        layout is None
        or layout.residual is None
        or len(ranks) < 2
        or not set(ranks) <= set(answers)
    ):
        return None
    logs = {group: math.log2(rank) for group, rank in ranks.items()}
    mean = sum(logs.values()) / len(logs)
    square = sum((x - mean) ** 2 for x in logs.values())
    # A least-squares slope is a contrast: its error and df are those of every other one.
    found = layout.contrast([(logs[g] - mean) / square if g in logs else 0.0 for g in answers])
    interval = found.interval()
    return {
        "slope": found.difference,
        "low": interval.low,
        "high": interval.high,
        "p": found.p,
        "df": found.df,
    }


def _profile(files: StudyFiles, objective: str) -> Profile | None:
    views: dict[str, View] = {}
    steps = layers = 0
    modules: list[str] = []
    for view in VIEWS:
        norms = read_norms(files.profile(objective), view)
        if norms is None:
            continue
        by_layer = layer_norms(norms)
        if not by_layer.any():
            continue  # no gradient, no shares
        steps, layers, modules = *by_layer.shape, list(norms)
        found = importance(by_layer)
        views[view] = found.to_json(by_layer.T)
    if not views:
        return None
    return {
        "objective": objective,
        "steps": steps,
        "layers": layers,
        "modules": modules,
        "views": views,
    }


def _base(config: StudyConfig, files: StudyFiles) -> Base | None:
    paths = (files.arm(arm) / "eval" / "step_000000.json" for arm in list_arms(config))
    metrics = next(filter(None, map(read_json, paths)), None)
    if metrics is None:
        return None
    return {
        "accuracy": metrics["eval/accuracy"],
        "low": metrics["eval/accuracy_low"],
        "high": metrics["eval/accuracy_high"],
        "n": int(metrics["eval/problems"]),
    }


def _allocations(
    config: StudyConfig, files: StudyFiles, groups: Mapping[str, list[Arm]]
) -> list[Allocation]:
    """Of every group the plan of its first run that has ended; of random ones each seed's."""
    found: list[Allocation] = []
    for arms in groups.values():
        for arm in arms:
            summary = read_json(files.arm(arm) / "summary.json")
            if not summary:
                continue
            ranks = list(summary["plan"]["ranks"].values())
            note = "as it ended" if arm.plan in DYNAMIC else ""
            name = arm_label(arm, config) + f", seed {arm.seed}" * (arm.plan == "random")
            layer_ranks = np.mean(ranks, axis=0).tolist()
            found.append({"plan": name, "layer_ranks": layer_ranks, "note": note})
            if arm.plan != "random":
                break
    return found


def _versions(files: StudyFiles, config: StudyConfig) -> dict[str, str]:
    """What the profile and the arms ran on; where they differ, how many on which."""
    roots = [files.profile("grpo"), *map(files.arm, list_arms(config))]
    found = [read_json(root / "summary.json").get("versions", {}) for root in roots]
    counts = {name: Counter(x[name] for x in found if name in x) for one in found for name in one}
    return {
        name: next(iter(values))
        if len(values) == 1
        else ", ".join(f"{value} ({runs} of the runs)" for value, runs in values.items())
        for name, values in counts.items()
    }
