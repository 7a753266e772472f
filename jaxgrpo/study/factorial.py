"""A factorial study's plan on paper, and what its looks decide. No jax."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

from jaxgrpo.config import Config, ConfigError
from jaxgrpo.config_files import flat_settings
from jaxgrpo.identity import COST, PLACE, WATCHING, first_difference, is_of
from jaxgrpo.records.run_directory import atomic_write_json, hash_inputs
from jaxgrpo.stats import RunLayout
from jaxgrpo.study.comparisons import Compared, Planned, compare
from jaxgrpo.study.config import Arm, StudyConfig, StudyFiles, list_arms
from jaxgrpo.study.design import CELLS, EFFECTS, DesignConfig
from jaxgrpo.study.evals import Answers, Questions, read_answers
from jaxgrpo.study.looks import nominal_levels
from jaxgrpo.study.result_types import Contrast, DesignResult, Interaction, LookResult
from jaxgrpo.study.runs import is_done

DIVERGED = "diverged.json"
"""Left by a run whose loss did not stay finite."""


def design_document(config: StudyConfig) -> dict[str, Any]:
    """All that is decided before the first arm, with the plans that the profile gave."""
    design, files = _design(config), StudyFiles(config.run_dir)
    free = (*PLACE, *WATCHING, *COST, "study.only", "study.together", "study.title")
    settings = {k: v for k, v in flat_settings(config).items() if not is_of(k, free)}
    primary, *others = EFFECTS
    return {
        "settings": settings,  # first, as what a refusal names
        "cells": CELLS,
        "blocks": [
            {
                "block": block,
                "seed": config.seed + block,
                "learning_rate": design.rate(block) * config.optim.learning_rate,
                "order": design.order(block),
            }
            for block in range(1, design.blocks + 1)
        ],
        "looks": [
            {"blocks": look, "differs_at": differs, "equivalent_at": equivalent}
            for look, differs, equivalent in _levels(design)
        ],
        "contrasts": EFFECTS,
        "analysis": f"accuracy = cell + block, t on the pooled residual; {primary} at the look's "
        f"level, then {' and '.join(others)} under Holm; no run is left out, and one that did not "
        "stay finite counts as the base model",
        "stop": f"when {primary} and the rank effect each differ or are equivalent, or after "
        f"{design.blocks} blocks",
        "margins": {name: _margin(config, name) for name in EFFECTS},
        "plans": {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(files.plans.glob("*.json"))
        },
    }


def write_design(config: StudyConfig) -> None:
    """Writes design.json with its hash, or holds the study to the one that is there.

    Raises:
        ConfigError: the design, a setting or an arm that is there is not what was written down.
    """
    files = StudyFiles(config.run_dir)
    document = json.loads(json.dumps(design_document(config)))
    known = {arm.name for arm in list_arms(config)}
    arms = sorted(p.name for p in (files.root / "arms").glob("*") if p.name not in known)
    if arms:
        raise ConfigError(
            f"{files.root / 'arms'} holds {arms[0]}, an arm that the design does not have; "
            "move it elsewhere: nothing may be added to a design"
        )
    if not files.design.is_file():
        atomic_write_json(files.design, document | {"sha256": hash_inputs(document)})
        return
    written = json.loads(files.design.read_text(encoding="utf-8"))
    recorded = written.pop("sha256", None)
    if recorded != hash_inputs(written):
        raise ConfigError(f"{files.design} was changed after it was written: its sha256 differs")
    if written != document:
        raise ConfigError(
            f"{files.design} is of another study: {first_difference(written, document)}; a design "
            "cannot change once it is written: choose another run_dir"
        )


def _design(config: StudyConfig) -> DesignConfig:
    assert config.study.design is not None, "only of a study with a design"
    return config.study.design


def _margin(config: StudyConfig, name: str) -> float:
    primary = next(iter(EFFECTS))
    return config.study.margin if name == primary else _design(config).effects_margin


def _levels(design: DesignConfig) -> list[tuple[int, float, float]]:
    looks = design.looks
    return list(zip(looks, nominal_levels(looks, 2), nominal_levels(looks, 1), strict=True))


@dataclass(frozen=True)
class Analysis:
    """What a factorial study says at its latest complete look; cells are its groups of arms."""

    design: DesignResult
    compared: Compared

    @property
    def decided(self) -> bool:
        """Whether the study ends here."""
        return any(look["decided"] for look in self.design["looks"])


def has_ended(config: StudyConfig, arm: Arm, run: Config) -> bool:
    """Whether an arm is done, or has diverged in a design, which counts it so."""
    diverged = config.study.design is not None and (
        (StudyFiles(config.run_dir).arm(arm) / DIVERGED).is_file()
    )
    return diverged or is_done(run)


def analyse(config: StudyConfig) -> Analysis:
    """Looks in turn, each on its own blocks, until one decides or its runs are not all there."""
    design, files = _design(config), StudyFiles(config.run_dir)
    looks: list[LookResult] = []
    found: dict[str, Contrast] = {}
    used, answers, layout, going = None, {}, None, True
    questions = Questions()
    for blocks, differs_at, equivalent_at in _levels(design):
        there = _answers(config, blocks, questions) if going else None
        decided = None
        if there is not None:
            used, answers = blocks, there
            layout = RunLayout(np.array([one.cells for one in answers.values()]))
            found = compare(_planned(config), answers, layout, differs_at, equivalent_at)
            primary = next(iter(EFFECTS))
            decided = all(found[n]["verdict"] != "open" for n in (primary, "rank effect"))
        going = decided is False
        looks.append(
            {
                "blocks": blocks,
                "finished": sum(
                    _block(config, block, questions) is not None for block in range(1, blocks + 1)
                ),
                "differs_at": differs_at,
                "equivalent_at": equivalent_at,
                "decided": decided,
            }
        )
    recorded = {}
    if files.design.is_file():
        recorded = json.loads(files.design.read_text(encoding="utf-8"))
    result: DesignResult = {
        "sha256": recorded.get("sha256", ""),
        "looks": looks,
        "look": used,
        "cells": CELLS,
        "interactions": [] if layout is None else _interactions(design, layout, list(answers)),
    }
    return Analysis(result, Compared(_planned(config), answers, layout, found))


def _planned(config: StudyConfig) -> list[Planned]:
    return [
        Planned(
            name=name,
            reference="uniform" if place == 0 else "the other two cells",
            weights=weights,
            family="primary" if place == 0 else "second",
            margin=_margin(config, name),
            about="proportional" if place == 0 else None,
        )
        for place, (name, weights) in enumerate(EFFECTS.items())
    ]


def _answers(config: StudyConfig, blocks: int, questions: Questions) -> dict[str, Answers] | None:
    """Cell -> answers of the first blocks; None if a run is missing."""
    found = [_block(config, block, questions) for block in range(1, blocks + 1)]
    rows = [one for one in found if one is not None]
    if len(rows) < blocks:
        return None
    return {
        cell: Answers(np.concatenate([row[cell].counts for row in rows]), rows[0][cell].samples)
        for cell in CELLS
    }


def _block(config: StudyConfig, block: int, questions: Questions) -> dict[str, Answers] | None:
    """Cell -> answers of one block; a run that did not stay finite answers as the base model."""
    files = StudyFiles(config.run_dir)
    found: dict[str, Answers] = {}
    for arm in list_arms(config):
        if arm.seed == block:
            one = read_answers([files.arm(arm)], config.steps, config, questions)
            if one is None and (files.arm(arm) / DIVERGED).is_file():
                one = read_answers([files.arm(list_arms(config)[0])], 0, config, questions)
            if one is not None:
                found[arm.plan] = one
    return found if len(found) == len(CELLS) else None


def _interactions(
    design: DesignConfig, layout: RunLayout, cells: Sequence[str]
) -> list[Interaction]:
    """Each contrast's slope on log2 of the learning rate: accuracy = cell + block + cell x rate.

    A slope for every cell takes cells - 1 degrees of freedom from the residual.
    """
    arms, blocks = layout.accuracy.shape
    x = np.array([math.log2(design.rate(block)) for block in range(1, blocks + 1)])
    x = x - x.mean()
    square, df = float(x @ x), (arms - 1) * (blocks - 2)
    if square == 0 or df < 1:
        return []
    rest = layout.accuracy - layout.accuracy.mean(axis=1, keepdims=True)
    rest = rest - rest.mean(axis=0)
    slopes = rest @ x / square
    variance = float(((rest - np.outer(slopes, x)) ** 2).sum()) / df
    found: list[Interaction] = []
    for name, weights in EFFECTS.items():
        w = np.array([weights.get(cell, 0.0) for cell in cells])
        slope, error = float(w @ slopes), math.sqrt(variance * float(w @ w) / square)
        half = error * float(stdtrit(df, 0.975))
        p = 2 * float(stdtr(df, -abs(slope) / error)) if error else float(slope == 0)
        found.append(
            {
                "name": name,
                "slope": slope,
                "low": slope - half,
                "high": slope + half,
                "p": p,
                "df": float(df),
            }
        )
    return found
