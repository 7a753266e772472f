"""The runs of a study as ordinary configurations, and whether they are done. No jax."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgrpo.config import Config, ConfigError, LoraConfig, Objective, ScaleRule
from jaxgrpo.config_files import read_yaml
from jaxgrpo.identity import decode_recorded, first_difference, identity, read_recorded
from jaxgrpo.records.run_directory import RunDirectory, atomic_write_json
from jaxgrpo.study.config import (
    Arm,
    Interrupted,
    StudyConfig,
    StudyFiles,
    list_arms,
    scaled_lora,
)
from jaxgrpo.study.sections import MEASURED


def has_plan_file(arm: Arm) -> bool:
    """Uniform ranks need none, and `adaptive` starts from them."""
    return arm.plan not in ("uniform", "adaptive")


def plan_name(config: StudyConfig, arm: Arm) -> str:
    """Arms share a plan where what it is made from is the same: a random one is drawn for every
    seed, equalised ranks depend on the scale rule, measured ones on whose gradient it was."""
    # Cell N of a design has the ranks of P, and another scale rule.
    plan = "proportional" if arm.plan == "ranks_only" else arm.plan
    name = f"{plan}-r{arm.mean_rank}"
    if arm.plan == "random":
        name += f"-s{arm.seed}"
    if arm.plan == "equalised":
        name += f"-{arm.scale_rule}"
    if (objective := config.importance_objective(arm.objective)) != "grpo":
        name += f"-{objective}"
    return name


def write_plan(
    files: StudyFiles,
    name: str,
    ranks: Mapping[str, np.ndarray],
    speed: Mapping[str, float],
    scales: Mapping[str, np.ndarray] | None = None,
) -> None:
    """A plan for `lora.plan`, with its first-order speed under every scale rule."""
    lists = {module: np.asarray(values).tolist() for module, values in ranks.items()}
    plan: dict[str, Any] = {"ranks": lists, "speed": dict(speed)}
    if scales is not None:
        plan["scales"] = {module: np.asarray(values).tolist() for module, values in scales.items()}
    atomic_write_json(files.plan(name), plan)


def profile_config(config: StudyConfig, objective: Objective) -> Config:
    """A short run at uniform rank that measures all four views and evaluates nothing."""
    return _short(config, str(StudyFiles(config.run_dir).profile(objective)), None, objective)


def probe_config(config: StudyConfig, rule: ScaleRule | None, draw: int) -> Config:
    """The GRPO profile again with a draw's own seed, at its ranks; without a rule at uniform ones.

    The first draw has the profile's seed, so that the profile is its uniform run.
    """
    files = StudyFiles(config.run_dir)
    where = files.uniform(draw) if rule is None else files.probe(rule, draw)
    short = _short(config, str(where), rule, "grpo")
    short = dataclasses.replace(short, seed=config.seed + draw)
    if rule is None:
        return short
    plan = str(files.plan(f"probe-{draw}"))
    return dataclasses.replace(short, lora=dataclasses.replace(short.lora, plan=plan))


def _short(
    config: StudyConfig, run_dir: str, rule: ScaleRule | None, objective: Objective
) -> Config:
    lora = dataclasses.replace(config.lora, **scaled_lora(config, rule, config.lora.rank))
    quiet = dataclasses.replace(
        config.eval, before_training=False, after_training=False, every_steps=0
    )
    return dataclasses.replace(
        config.plain(),
        run_dir=run_dir,
        steps=config.study.profile.steps,
        objective=objective,
        weight_grad_norms=True,
        lora=lora,
        eval=quiet,
    )


def arm_config(config: StudyConfig, arm: Arm, first: bool) -> Config:
    """What an arm trains with; the first one also evaluates the base model."""
    files = StudyFiles(config.run_dir)
    settings = scaled_lora(config, arm.scale_rule, arm.mean_rank)
    if has_plan_file(arm):
        settings["plan"] = str(files.plan(plan_name(config, arm)))
    return dataclasses.replace(
        config.plain(),
        run_dir=str(files.arm(arm)),
        objective=arm.objective,
        seed=config.seed + arm.seed,
        lora=dataclasses.replace(config.lora, **settings),
        optim=dataclasses.replace(
            config.optim, learning_rate=arm.rate * config.optim.learning_rate
        ),
        eval=dataclasses.replace(config.eval, before_training=first),
    )


def share_programs(one: Config, other: Config) -> bool:
    """Whether two arms differ only in what several arms of the same programs may: seed, ranks of
    the same width, scales, learning rate."""

    def shared(config: Config) -> Config:
        width = config.lora.max_rank or config.lora.rank
        return dataclasses.replace(
            config,
            run_dir=other.run_dir,
            seed=0,
            lora=LoraConfig(rank=width, max_rank=width, target_modules=config.lora.target_modules),
            optim=dataclasses.replace(config.optim, learning_rate=1.0),
            eval=dataclasses.replace(config.eval, before_training=False),
        )

    return shared(one) == shared(other)


def stages(config: StudyConfig) -> list[list[int]]:
    """`list_arms` as numbers, in the parts after each of which a design is looked at."""
    arms, design = list_arms(config), config.study.design
    if design is None:
        return [list(range(len(arms)))]
    starts = (0, *design.looks)
    return [
        [n for n, arm in enumerate(arms) if start < arm.seed <= end]
        for start, end in itertools.pairwise(starts)
    ]


def alike_runs(configs: Sequence[Config]) -> list[list[int]]:
    """Positions of these, those that may be trained side by side in one list."""
    found: list[list[int]] = []
    for place, config in enumerate(configs):
        for alike in found:
            if share_programs(config, configs[alike[0]]):
                alike.append(place)
                break
        else:
            found.append([place])
    return found


def alike_arms(config: StudyConfig, numbers: Sequence[int]) -> list[list[int]]:
    """These of `list_arms`, those that may be trained side by side in one list."""
    arms, configs = list_arms(config), arm_configs(config)
    found: list[list[int]] = []
    # Statistics are part of the state that a program takes.
    for measured in (False, True):
        kind = [n for n in numbers if (arms[n].plan in MEASURED) == measured]
        found += [
            [kind[place] for place in alike] for alike in alike_runs([configs[n] for n in kind])
        ]
    return found


class Round(NamedTuple):
    """Arms that are trained side by side, or one by itself.

    Attributes:
        numbers: of `list_arms`, or of other runs the positions.
        slots: how many its programs have room for.
    """

    numbers: list[int]
    slots: int


def split_rounds(alike: Sequence[int], most: int) -> list[Round]:
    """As few rounds as there can be, as even as there can be, so that they share programs."""
    parts = np.array_split(np.asarray(alike), -(-len(alike) // most))
    return [Round(part.tolist(), len(parts[0])) for part in parts]


def cut_config(config: StudyConfig, arm: Arm, criterion: str, share: float) -> Config:
    """What a cut of a uniform arm is evaluated with: the arm's own settings, elsewhere."""
    where = StudyFiles(config.run_dir).cut(arm, criterion, share)
    return dataclasses.replace(arm_config(config, arm, first=False), run_dir=str(where))


def arm_configs(config: StudyConfig) -> list[Config]:
    """Those of `list_arms`, in its order."""
    arms = list_arms(config)
    return [arm_config(config, arm, first=arm == arms[0]) for arm in arms]


def is_done(config: Config) -> bool:
    """Whether this very run has finished; read without jax, so that a report is quick.

    It is known by its settings, those of its evaluation included, and by its ranks, wherever the
    study lies and whichever run evaluated the base model.
    """
    run = RunDirectory(config.run_dir)  # type: ignore[arg-type]
    if not run.summary.is_file():
        return False
    recorded = read_recorded(run.config)
    free = ("lora.plan", "eval.before_training")
    if recorded is None or identity(recorded, *free) != identity(config, *free):
        return False
    start = json.loads(run.summary.read_text(encoding="utf-8")).get("start_ranks")
    if start is None or config.lora.plan is None:
        return True
    return start == json.loads(Path(config.lora.plan).read_text(encoding="utf-8"))["ranks"]


def raise_first(ended: Mapping[str, Any]) -> None:
    """Raises what the first failed with of runs that were trained side by side, all of which have
    ended; name -> what `train_arms` gave of it.

    Raises:
        Interrupted: it was stopped early.
    """
    for name, result in ended.items():
        if isinstance(result, Exception):
            raise result
        if result.interrupted:
            raise Interrupted(name)


def read_profile_model(config: StudyConfig) -> dict | None:
    """Layers and module shapes of the model, from the GRPO profile's summary; None without one."""
    run = RunDirectory(StudyFiles(config.run_dir).profile("grpo"))
    if not run.summary.is_file():
        return None
    return json.loads(run.summary.read_text(encoding="utf-8"))["model"]


def check_same_study(config: StudyConfig) -> None:
    """Raises ConfigError if run_dir holds a study whose runs differ from this one's.

    Arms may be added (plans, rules, seeds); what all runs share may not change.
    """
    path = RunDirectory(StudyFiles(config.run_dir).root).config
    if not path.is_file():
        return
    # Of another version, too, whose `study` may have held what this one does not know.
    settings = {k: v for k, v in read_yaml(path, StudyConfig).items() if k != "study"}
    recorded = decode_recorded(settings, path)
    difference = first_difference(identity(recorded), identity(config.plain()))
    if difference:
        raise ConfigError(
            f"{path.parent} holds another study: {difference}; "
            "choose another run_dir, or remove this one to start over"
        )
