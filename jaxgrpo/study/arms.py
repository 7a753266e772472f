"""The study's stages in order: profiles, calibration, plans, probes, arms, results, report.

Every stage is its own run directory or file, skipped when it is there, so that a stopped study goes
on and a finished one only rebuilds its report, without jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from jaxgrpo.config import Config, ConfigError, check_choice
from jaxgrpo.config_files import dump_config
from jaxgrpo.records.run_directory import (
    DivergedError,
    RunDirectory,
    atomic_write_json,
    atomic_write_text,
)
from jaxgrpo.study.config import (
    Arm,
    StudyConfig,
    StudyFiles,
    list_arms,
)
from jaxgrpo.study.factorial import DIVERGED, analyse, has_ended, write_design
from jaxgrpo.study.history import note_report
from jaxgrpo.study.norms import no_gradient
from jaxgrpo.study.planner import Planner
from jaxgrpo.study.printing import print_verdict
from jaxgrpo.study.report import write_report
from jaxgrpo.study.result_types import Results
from jaxgrpo.study.results import collect_results
from jaxgrpo.study.runs import (
    Round,
    alike_arms,
    alike_runs,
    arm_configs,
    check_same_study,
    cut_config,
    has_plan_file,
    is_done,
    plan_name,
    probe_config,
    profile_config,
    raise_first,
    split_rounds,
    stages,
    write_plan,
)
from jaxgrpo.study.sections import DYNAMIC, FROM_CALIBRATION, MEASURED
from jaxgrpo.study.spending import check_budgets, check_spent


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
        return runner.report()


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
        names = {x for a in arms for x in (a.name, a.group, f"s{a.seed}")}
        probe = self.config.study.probe
        draws = {f"probe{draw + 1}": draw for draw in probe.asked}
        names |= {"prepare", "probes", "report", *draws}
        names |= {"cuts"} if self.config.study.cuts.amounts else set()
        for name in only:
            check_choice(name, sorted(names), "study.only")
        wanted = [i for i, a in enumerate(arms) if {a.name, a.group, f"s{a.seed}"} & set(only)]
        if "report" in only and self.config.study.design is None:
            left = self._left([i for i in range(len(arms)) if i not in wanted])
            if left:
                raise ConfigError(
                    f"study.only=[report]: {len(left)} of {len(arms)} arms have not ended, and "
                    "only a study.design has looks before"
                )
        if "prepare" in only:
            study.root.mkdir(parents=True, exist_ok=True)
            with study.lock():
                whole = dataclasses.replace(
                    self.config, study=dataclasses.replace(self.config.study, only=())
                )
                atomic_write_text(study.config, dump_config(whole))
                self.lay_out()
        missing = [arms[i] for i in wanted if has_plan_file(arms[i])]
        plans = [plan_name(self.config, arm) for arm in missing]
        drawn = [draw for name, draw in draws.items() if {"probes", name} & set(only)]
        plans += [f"probe-{draw}" for draw in drawn]
        missing = [name for name in plans if not self.files.plan(name).is_file()]
        if missing or (set(only) != {"prepare"} and not study.config.is_file()):
            raise ConfigError(
                f"{study.root} is not prepared: run the same study with study.only=[prepare] first"
            )
        if wanted and self.config.study.design is not None:
            write_design(self.config)
        self.probes(drawn)
        for number in wanted:
            self._check_open(arms[number])
        self.train(wanted)
        if "cuts" in only:
            self.cuts()
        if "report" in only:
            with study.lock():
                self.report()

    def report(self) -> Results:
        """Writes and prints what the runs that are there tell."""
        note_report(self.config)
        results = collect_results(self.config)
        atomic_write_json(self.files.results, results)
        write_report(results, self.files.root)
        print_verdict(results, self._console)
        self._console.print(f"report {self.files.html}", highlight=False)
        return results

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
            found = calibrate(self.lab, batches, self.config.widest, objective)
            atomic_write_json(path, found)

    def probes(self, draws: Sequence[int] | None = None) -> None:
        """The runs of these draws, by default of all: side by side where they can be."""
        probe = self.config.study.probe
        found: dict[str, Config] = {}
        for draw in probe.asked if draws is None else draws:
            for rule in (None, *probe.scale_rules):
                config = probe_config(self.config, rule, draw)
                if not is_done(config):
                    what = "uniform ranks" if rule is None else f"drawn ranks, {rule}"
                    found[f"probe {draw + 1} of {probe.runs}: {what}"] = config
        titles, configs = list(found), list(found.values())
        for numbers, slots in self._split(configs, alike_runs(configs)):
            names = [titles[n] for n in numbers]
            if len(names) == 1:
                self.lab.run(names[0], configs[numbers[0]])
                continue
            title = f"{len(names)} side by side: {'; '.join(names)}"
            results = self.lab.run_arms(title, [configs[n] for n in numbers], slots)
            raise_first(dict(zip(names, results, strict=True)))

    def arms(self) -> None:
        arms = list_arms(self.config)
        check_budgets(arms, arm_configs(self.config), self.planner, self._console)
        for numbers in stages(self.config):
            self.train(numbers)
            if self.config.study.design is not None and analyse(self.config).decided:
                break
        check_spent(arms, self.files, self.planner, self._console)

    def train(self, numbers: Sequence[int]) -> None:
        """Trains these of `list_arms`, unless they are done: side by side where they can be."""
        for group in self.rounds(numbers):
            if len(group.numbers) > 1:
                self.side_by_side(group)
            else:
                self.arm(group.numbers[0])

    def rounds(self, numbers: Sequence[int], places: int = 1) -> list[Round]:
        """These of `list_arms` that are not done, as they are trained.

        Args:
            places: how many rounds are trained at the same time elsewhere; without
                `study.together`, alike arms are spread over all of them.
        """
        alike = alike_arms(self.config, self._left(numbers))
        found = self._split(arm_configs(self.config), alike, places)
        return sorted(found, key=lambda group: group.numbers[0])

    def _left(self, numbers: Sequence[int]) -> list[int]:
        """These of `list_arms` that have not ended."""
        arms, configs = list_arms(self.config), arm_configs(self.config)
        return [n for n in numbers if not has_ended(self.config, arms[n], configs[n])]

    def _split(
        self, configs: Sequence[Config], groups: Sequence[Sequence[int]], places: int = 1
    ) -> list[Round]:
        """Runs that are alike, by their numbers in `configs`, as they are trained."""
        found: list[Round] = []
        for alike in groups:
            most = self._together(configs[alike[0]], -(-len(alike) // places))
            found += split_rounds(alike, most)
        return found

    def _together(self, config: Config, most: int) -> int:
        """How many runs like this one, if there are so many, are trained side by side at most."""
        if self.config.study.together or most == 1:
            return self.config.study.together or 1
        return self.lab.together(config, most)

    def side_by_side(self, group: Round) -> None:
        """Trains arms in the same programs; each ends as it would alone."""
        arms, configs = list_arms(self.config), arm_configs(self.config)
        names = ", ".join(arms[n].name for n in group.numbers)
        title = f"{len(group.numbers)} of {len(arms)} arms side by side: {names}"
        results = self.lab.run_arms(
            title,
            [configs[n] for n in group.numbers],
            group.slots,
            replans=[self._replan(arms[n], configs[n]) for n in group.numbers],
            track_sensitivity=arms[group.numbers[0]].plan in MEASURED,
        )
        ended: dict[str, Any] = {}
        for number, result in zip(group.numbers, results, strict=True):
            name = arms[number].name
            if isinstance(result, DivergedError) and self.config.study.design is not None:
                self._note_diverged(arms[number], result)
                continue
            ended[name] = result
            if not isinstance(result, Exception) and result.after is not None:
                self._console.print(f"{name}: accuracy {result.after.describe()}", highlight=False)
        raise_first(ended)

    def _note_diverged(self, arm: Arm, error: DivergedError) -> None:
        # A design leaves no run out: this one counts as the base model.
        atomic_write_json(self.files.arm(arm) / DIVERGED, {"reason": str(error)})

    def arm(self, number: int) -> None:
        """Trains one of `list_arms` by itself."""
        arms = list_arms(self.config)
        arm, config = arms[number], arm_configs(self.config)[number]
        title = f"arm {number + 1} of {len(arms)}: {arm.name}"
        replan, measured = self._replan(arm, config), arm.plan in MEASURED
        try:
            self.lab.run(title, config, replan=replan, track_sensitivity=measured)
        except DivergedError as error:
            if self.config.study.design is None:
                raise
            self._note_diverged(arm, error)

    def _replan(self, arm: Arm, run: Config) -> Any:
        """What moves an arm's ranks; None of a plan that stays."""
        if arm.plan not in DYNAMIC:
            return None
        from jaxgrpo.study.dynamic import make_replan

        return make_replan(self.config, arm, run, self.planner.shapes)

    def cuts(self) -> None:
        """Cuts and evaluates the adapter of every uniform arm, as study.cuts says."""
        for arm in list_arms(self.config):
            for criterion, share in self.config.study.cuts.amounts if arm.plan == "uniform" else ():
                config = cut_config(self.config, arm, criterion, share)
                if not is_done(config):
                    title = f"cut: {arm.name} to {share:g} of its {criterion}"
                    self.lab.cut(title, config, self.files.arm(arm), {criterion: share})
