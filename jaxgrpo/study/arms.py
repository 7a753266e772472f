"""The study's stages in order: profiles, calibration, plans, probes, arms, results, report.

Every stage is its own run directory or file, skipped when it is there, so that a stopped study goes
on and a finished one only rebuilds its report, without jax.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxgrpo.config import Config, ConfigError, check_choice
from jaxgrpo.config_files import dump_config
from jaxgrpo.rank_plan import make_rank_plan
from jaxgrpo.records.run_directory import (
    DivergedError,
    RunDirectory,
    atomic_write_json,
    atomic_write_text,
)
from jaxgrpo.study.allocate import spent
from jaxgrpo.study.config import (
    Arm,
    StudyConfig,
    StudyFiles,
    list_arms,
)
from jaxgrpo.study.factorial import DIVERGED, analyse, write_design
from jaxgrpo.study.history import note_report
from jaxgrpo.study.norms import no_gradient
from jaxgrpo.study.planner import Planner
from jaxgrpo.study.printing import print_verdict
from jaxgrpo.study.report import write_report
from jaxgrpo.study.result_types import Results
from jaxgrpo.study.results import collect_results
from jaxgrpo.study.runs import (
    arm_configs,
    check_same_study,
    cut_config,
    has_plan_file,
    is_done,
    plan_name,
    probe_config,
    profile_config,
    write_plan,
)
from jaxgrpo.study.sections import DYNAMIC, FROM_CALIBRATION


def run_study(config: StudyConfig, console: Console) -> Results | None:
    """Runs what is missing, then the report; returns the results, or None of `study.only`.

    Raises:
        ConfigError: a configuration that cannot run, or a directory of another study.
        Interrupted: stopped early and saved; the same call goes on.
    """
    study = RunDirectory(StudyFiles(config.run_dir).root)
    check_same_study(config)
    runner = Runner(config, console)
    if config.study.only:
        runner.part()
        return None
    study.root.mkdir(parents=True, exist_ok=True)
    with study.lock():
        atomic_write_text(study.config, dump_config(config))
        runner.prepare()
        runner.arms()
        runner.cuts()
        note_report(config)
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
        self.planner = Planner(config)
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
        """All that comes before the arms."""
        self.lay_out()
        self.probes()

    def lay_out(self) -> None:
        """What arms and probes build on: profiles, plans, the design."""
        self.planner.check()
        self.profiles()
        self.plans()
        for objective in self.config.study.profile.objectives:
            if cause := no_gradient(self.files.profile(objective)):
                self._console.print(f"[yellow]warning:[/] {cause}", highlight=False, soft_wrap=True)
        if self.config.study.design is not None:
            write_design(self.config)

    def part(self) -> None:
        """What `study.only` names. Its runs hold no lock but their own, so parts run side by side.

        Raises:
            ConfigError: a name that the study does not have, or runs before `prepare`.
        """
        study, only = RunDirectory(self.files.root), self.config.study.only
        arms = list_arms(self.config)
        names = {"prepare", "probes", *(x for a in arms for x in (a.name, a.group, f"s{a.seed}"))}
        for name in only:
            check_choice(name, sorted(names), "study.only")
        if "prepare" in only:
            study.root.mkdir(parents=True, exist_ok=True)
            with study.lock():
                whole = dataclasses.replace(
                    self.config, study=dataclasses.replace(self.config.study, only=())
                )
                atomic_write_text(study.config, dump_config(whole))
                self.lay_out()
        wanted = [i for i, a in enumerate(arms) if {a.name, a.group, f"s{a.seed}"} & set(only)]
        missing = [arms[i] for i in wanted if has_plan_file(arms[i])]
        plans = [plan_name(self.config, arm) for arm in missing]
        if "probes" in only:
            plans += [f"probe-{draw}" for draw in range(self.config.study.probe.runs)]
        missing = [name for name in plans if not self.files.plan(name).is_file()]
        if missing or (set(only) != {"prepare"} and not study.config.is_file()):
            raise ConfigError(
                f"{study.root} is not prepared: run the same study with study.only=[prepare] first"
            )
        if wanted and self.config.study.design is not None:
            write_design(self.config)
        if "probes" in only:
            self.probes()
        for number in wanted:
            self._check_open(arms[number])
            self.arm(number)

    def _check_open(self, arm: Arm) -> None:
        """Refuses an arm of a block that comes after the look at which the study was decided."""
        if self.config.study.design is None:
            return
        analysis = analyse(self.config)
        look = analysis.design["look"]
        if analysis.decided and look is not None and arm.seed > look:
            raise ConfigError(
                f"the study was decided at its look at {look} blocks; {arm.name} is not part of it"
            )

    def profiles(self) -> None:
        for objective in self.config.study.profile.objectives:
            config = profile_config(self.config, objective)
            if not is_done(config):
                self.lab.run(f"profile: {objective}, uniform rank", config)

    def plans(self) -> None:
        """Writes the plan of every arm and probe; a pure function of profiles and calibration."""
        self.calibrations()
        self.files.plans.mkdir(exist_ok=True)
        for arm in list_arms(self.config):
            if not has_plan_file(arm):
                continue
            importance = self.planner.importance(arm)
            ranks = self.planner.allocate(arm, importance)
            scales = self.planner.scales(arm, importance)
            speeds = self.planner.speeds(arm, ranks, scales)
            write_plan(self.files, plan_name(self.config, arm), ranks, speeds, scales)
        for draw, ranks in enumerate(self.planner.probes()):
            write_plan(self.files, f"probe-{draw}", ranks, {})

    def calibrations(self) -> None:
        """What fim, gora and eva measure, once per objective that an arm's importance is of."""
        for arm in list_arms(self.config):
            objective = self.config.importance_objective(arm.objective)
            path = self.files.calibration(objective)
            if arm.plan not in FROM_CALIBRATION or path.exists():
                continue
            title = f"calibration: gradients and inputs at step 0, {objective}"
            self._console.rule(f"[bold]{title}", align="left")
            from jaxgrpo.study.calibrate import calibrate

            batches = self.config.study.profile.calibration_batches
            width = max(self.config.width(rank) for rank in self.config.mean_ranks)
            atomic_write_json(path, calibrate(self.lab, batches, width, objective))

    def probes(self) -> None:
        probe = self.config.study.probe
        for draw in range(probe.runs if probe.scale_rules else 0):
            for rule in (None, *probe.scale_rules):
                config = probe_config(self.config, rule, draw)
                if not is_done(config):
                    what = "uniform ranks" if rule is None else f"drawn ranks, {rule}"
                    self.lab.run(f"probe {draw + 1} of {probe.runs}: {what}", config)

    def arms(self) -> None:
        arms = list_arms(self.config)
        self.check_budgets(arms, arm_configs(self.config))
        design = self.config.study.design
        for end in (math.inf,) if design is None else design.looks:
            for number, arm in enumerate(arms):
                if design is None or arm.seed <= end:
                    self.arm(number)
            if design is not None and analyse(self.config).decided:
                break
        self.check_spent(arms)

    def arm(self, number: int) -> None:
        """Trains one of `list_arms`, unless it is done."""
        arms = list_arms(self.config)
        arm, config = arms[number], arm_configs(self.config)[number]
        if is_done(config):
            return
        title = f"arm {number + 1} of {len(arms)}: {arm.name}"
        if arm.plan in DYNAMIC:
            from jaxgrpo.study.dynamic import make_replan

            replan = make_replan(self.config, arm, config, self.planner.shapes)
            sensitivity = arm.plan == "adalora"
            self.lab.run(title, config, replan=replan, track_sensitivity=sensitivity)
        elif self.config.study.design is None:
            self.lab.run(title, config)
        elif not (self.files.arm(arm) / DIVERGED).is_file():
            try:
                self.lab.run(title, config)
            except DivergedError as error:
                # A design leaves no run out: this one counts as the base model.
                atomic_write_json(self.files.arm(arm) / DIVERGED, {"reason": str(error)})

    def cuts(self) -> None:
        """Cuts and evaluates the adapter of every uniform arm, as study.cuts says."""
        for arm in list_arms(self.config):
            for criterion, share in self.config.study.cuts.amounts if arm.plan == "uniform" else ():
                config = cut_config(self.config, arm, criterion, share)
                if not is_done(config):
                    title = f"cut: {arm.name} to {share:g} of its {criterion}"
                    self.lab.cut(title, config, self.files.arm(arm), {criterion: share})

    def check_budgets(self, arms: list[Arm], configs: list[Config]) -> None:
        """Prints the realised ranks and asserts that arms of one mean rank cost the same.

        Those of `reduced` are spent differently by design, those of plans that move in the end.
        """
        table = Table(title="arms: realised ranks", title_justify="left")
        table.add_column("arm", no_wrap=True)
        for heading in ("ranks", "smallest", "largest", "parameters"):
            table.add_column(heading, justify="right")
        shapes = self.planner.shapes
        for arm, config in zip(arms, configs, strict=True):
            plan = make_rank_plan(config.lora, self.planner.layers)
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
            budget = self.planner.budget(arm.mean_rank, "module")
            cost = spent(plan.ranks, shapes, budget.unit)
            assert cost == budget.total, f"arm {arm.name} costs {cost}, not {budget.total}"
        self._console.print(table)

    def check_spent(self, arms: list[Arm]) -> None:
        """Says which of the plans that move or are cut did not end at what the others cost."""
        for arm in arms:
            if arm.plan not in DYNAMIC:
                continue
            budget = self.planner.budget(arm.mean_rank, "module")
            summary = RunDirectory(self.files.arm(arm)).summary
            ranks = json.loads(summary.read_text(encoding="utf-8"))["plan"]["ranks"]
            ended = {module: np.asarray(values) for module, values in ranks.items()}
            cost = spent(ended, self.planner.shapes, budget.unit)
            if cost != budget.total:
                self._console.print(
                    f"[yellow]warning:[/] {arm.name} ended at {cost:,} {budget.unit}, the others "
                    f"have {budget.total:,}"
                )
