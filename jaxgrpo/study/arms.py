"""The study's stages in order: profiles, calibration, plans, probes, arms, results, report.

Every stage is its own run directory or file, skipped when it is there, so that a stopped study goes
on and a finished one only rebuilds its report, without jax.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxgrpo.config import Config, ConfigError
from jaxgrpo.config_files import dump_config
from jaxgrpo.rank_plan import make_rank_plan
from jaxgrpo.records.run_directory import RunDirectory, atomic_write_json, atomic_write_text
from jaxgrpo.study.allocate import allocate
from jaxgrpo.study.budget import Budget, Granularity, Unit
from jaxgrpo.study.config import (
    DYNAMIC,
    FROM_CALIBRATION,
    FROM_PROFILE,
    AllocationConfig,
    Arm,
    StudyConfig,
    StudyFiles,
    list_arms,
)
from jaxgrpo.study.norms import importance, read_norms
from jaxgrpo.study.report import write_report
from jaxgrpo.study.results import collect_results
from jaxgrpo.study.runs import (
    arm_configs,
    check_same_study,
    has_plan_file,
    is_done,
    plan_name,
    probe_config,
    profile_config,
    read_profile_model,
    write_plan,
)

PROBE_SEED = 1000
"""Random plans of probes are drawn from here on, those of arms from 0 on."""


def run_study(config: StudyConfig, console: Console) -> dict:
    """Runs what is missing, then the report; returns the results.

    Raises:
        ConfigError: a configuration that cannot run, or a directory of another study.
        Interrupted: stopped early and saved; the same call goes on.
    """
    study = RunDirectory(StudyFiles(config.run_dir).root)
    check_same_study(config)
    study.root.mkdir(parents=True, exist_ok=True)
    with study.lock():
        atomic_write_text(study.config, dump_config(config))
        runner = Runner(config, console)
        runner.prepare()
        runner.arms()
        results = collect_results(config)
        files = StudyFiles(config.run_dir)
        atomic_write_json(files.results, results)
        write_report(results, files.root)
    print_verdict(results, console)
    console.print(f"report {files.html}", highlight=False)
    return results


class Runner:
    """Knows which runs a study consists of and starts those that are not done."""

    def __init__(self, config: StudyConfig, console: Console) -> None:
        self.config = config
        self.files = StudyFiles(config.run_dir)
        self._console = console
        self._lab: Any = None

    @property
    def lab(self) -> Any:
        """The device side, opened when something has to run."""
        if self._lab is None:
            from jaxgrpo.study.lab import Lab

            self._lab = Lab(self.config.plain(), self._console)
        return self._lab

    def prepare(self) -> None:
        """All that the arms build on."""
        self.profiles()
        self.plans()
        self.probes()

    def profiles(self) -> None:
        for objective in self.config.study.profile.objectives:
            config = profile_config(self.config, objective)
            if not is_done(config):
                self.lab.run(f"profile: {objective}, uniform rank", config)

    def plans(self) -> None:
        """Writes the plan of every arm and probe; a pure function of profiles and calibration."""
        settings = self.config.study
        if set(settings.arms.plans) & set(FROM_CALIBRATION) and not self.files.calibration.exists():
            self._console.rule("[bold]calibration: gradients and inputs at step 0", align="left")
            from jaxgrpo.study.calibrate import calibrate

            batches = settings.profile.calibration_batches
            width = max(self.config.bounds(rank)[1] for rank in self.config.mean_ranks)
            found = calibrate(self.lab, batches, width)
            atomic_write_json(self.files.calibration, found)
        self.files.plans.mkdir(exist_ok=True)
        shapes = self.shapes()
        for arm in list_arms(self.config):
            if not has_plan_file(arm):
                continue
            name = plan_name(arm.plan, arm.mean_rank, arm.seed)
            ranks = self.allocate(arm, shapes)
            write_plan(self.files, name, ranks)
        for draw in range(settings.probe.draws):
            unit = settings.allocation.unit
            budget = self.budget(self.config.lora.rank, shapes, unit, "module")
            ones = {m: np.ones(self.layers()) for m in self.config.lora.target_modules}
            ranks = allocate("random", ones, shapes, budget, seed=PROBE_SEED + draw)
            write_plan(self.files, f"probe-{draw}", ranks)

    def probes(self) -> None:
        probe = self.config.study.probe
        for rule in probe.scale_rules:
            for draw in range(probe.draws):
                config = probe_config(self.config, rule, draw)
                if not is_done(config):
                    self.lab.run(f"probe: random ranks, {rule}", config)

    def arms(self) -> None:
        arms = list_arms(self.config)
        self.check_budgets(arms, arm_configs(self.config))
        for number in range(len(arms)):
            self.arm(number)

    def arm(self, number: int) -> None:
        """Trains one of `list_arms`, unless it is done."""
        arms = list_arms(self.config)
        arm, config = arms[number], arm_configs(self.config)[number]
        if is_done(config):
            return
        title = f"arm {number + 1} of {len(arms)}: {arm.name}"
        if arm.plan in DYNAMIC:
            from jaxgrpo.study.dynamic import make_replan

            replan = make_replan(self.config, arm, config, self.shapes())
            sensitivity = arm.plan == "adalora"
            self.lab.run(title, config, replan=replan, track_sensitivity=sensitivity)
        else:
            self.lab.run(title, config)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """module -> (in, out), as the profile's run recorded them."""
        model = read_profile_model(self.config)
        return {m: tuple(s) for m, s in model["module_shapes"].items()}  # type: ignore[misc]

    def layers(self) -> int:
        return read_profile_model(self.config)["layers"]

    def budget(
        self,
        mean_rank: int,
        shapes: Mapping[str, tuple[int, int]],
        unit: Unit,
        granularity: Granularity,
    ) -> Budget:
        """What mean_rank everywhere costs."""
        low, high = self.config.bounds(mean_rank)
        modules = self.config.lora.target_modules
        each = [sum(shapes[m]) if unit == "parameters" else 1 for m in modules]
        return Budget(
            total=mean_rank * self.layers() * sum(each),
            unit=unit,
            min_rank=low,
            max_rank=high,
            granularity=granularity,
        )

    def allocate(self, arm: Arm, shapes: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
        """Ranks of one arm."""
        settings, plan = self.config.study.allocation, arm.plan
        budget = self.budget(arm.mean_rank, shapes, settings.unit, settings.granularity)
        options: dict[str, Any] = {}
        if plan in ("adalora", "para"):
            # Both start above their budget: para as wide as ranks may be, adalora by the ratio of
            # PEFT's defaults, 12 to 8.
            high = self.config.bounds(arm.mean_rank)[1]
            start = high if plan == "para" else min(-(-3 * arm.mean_rank // 2), high)
            return {m: np.full(self.layers(), start) for m in self.config.lora.target_modules}
        if plan in FROM_CALIBRATION:
            raw = json.loads(self.files.calibration.read_text(encoding="utf-8"))[plan]
            values = {module: np.asarray(v) for module, v in raw.items()}
            budget = self.budget(arm.mean_rank, shapes, unit_of(plan, settings), "module")
        elif plan in FROM_PROFILE:
            view = "weight" if plan == "equalised" else settings.view
            norms = read_norms(self.files.profile(settings.objective), view)
            assert norms is not None, f"the profile has no view {view}"
            values = importance(norms)
            if plan == "top_k":
                options["k"] = settings.top_layers
            elif plan == "reduced":
                options["fraction"] = settings.reduced_fraction
                # The smallest rank goes down with the budget, as the paper's does (20 to 12).
                low = int(budget.min_rank * settings.reduced_fraction)
                budget = dataclasses.replace(budget, min_rank=low)
            elif plan == "equalised":
                options["scale_rule"] = arm.scale_rule
        else:
            values = {m: np.ones(self.layers()) for m in self.config.lora.target_modules}
        try:
            return allocate(plan, values, shapes, budget, seed=arm.seed, **options)
        except ConfigError as error:
            raise ConfigError(f"plan {plan} at mean rank {arm.mean_rank}: {error}") from None

    def check_budgets(self, arms: list[Arm], configs: list[Config]) -> None:
        """Prints the realised ranks and asserts that arms of one mean rank cost the same.

        Those of `reduced` and of plans that move are spent differently by design.
        """
        table = Table(title="arms: realised ranks", title_justify="left")
        table.add_column("arm", no_wrap=True)
        for heading in ("ranks", "smallest", "largest", "parameters"):
            table.add_column(heading, justify="right")
        shapes = self.shapes()
        spent: dict[tuple[int, Unit], int] = {}
        for arm, config in zip(arms, configs, strict=True):
            plan = make_rank_plan(config.lora, self.layers())
            parameters = plan.trainable_parameters(shapes)
            every = np.concatenate(list(plan.ranks.values()))
            table.add_row(
                arm.name,
                str(plan.total_rank),
                str(every.min()),
                str(every.max()),
                f"{parameters:,}",
            )
            if arm.plan in DYNAMIC or arm.plan == "reduced":
                continue
            unit = unit_of(arm.plan, self.config.study.allocation)
            cost = parameters if unit == "parameters" else plan.total_rank
            first = spent.setdefault((arm.mean_rank, unit), cost)
            assert cost == first, f"arm {arm.name} costs {cost} {unit}, the others {first}"
        self._console.print(table)


def unit_of(plan: str, allocation: AllocationConfig) -> Unit:
    """What a plan's budget counts: eva's principal components are worth a rank each."""
    return "ranks" if plan == "eva" else allocation.unit


def print_verdict(results: dict, console: Console) -> None:
    """The answer, and accuracy per arm."""
    table = Table(title="held-out accuracy", title_justify="left")
    for heading in ("arm", "accuracy", "95 % interval", "versus uniform", "p (Holm)"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in results["arms"]:
        versus = arm["versus"]
        table.add_row(
            arm["name"],
            _percent(arm["accuracy"]),
            f"{_percent(arm['low'])} to {_percent(arm['high'])}",
            "" if versus is None else f"{100 * versus['difference']:+.1f} points",
            "" if versus is None else f"{versus['p_holm']:.2g}",
        )
    console.print(table)
    for sentence in (
        *results["verdict"],
        *results["amplification_verdict"],
        *map(_importance_line, results["profiles"]),
    ):
        console.print(sentence, highlight=False)


def _importance_line(profile: dict) -> str:
    found = profile["views"]["l2"]
    ratio, top = found["max_min"], found["top_share"]
    return (
        f"{profile['objective'].upper()} profile, raw L2: largest over smallest layer share "
        f"{_number(ratio['value'])} ({_number(ratio['low'])} to {_number(ratio['high'])}), the top "
        f"{top['layers']} of {profile['layers']} layers hold {top['value']:.1%}."
    )


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}"
