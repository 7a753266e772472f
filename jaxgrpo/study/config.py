"""Settings of a study: an ordinary run's configuration, and what to compare. No jax."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

from jaxgrpo.config import Config, Objective, ScaleRule
from jaxgrpo.study.design import CELL_RULES
from jaxgrpo.study.result_types import Decoding
from jaxgrpo.study.sections import PLAN_LABELS, StudySettings, require


class Interrupted(Exception):
    """The user or the machine asked the study to stop; what was running is saved."""


@dataclass(frozen=True)
class StudyConfig(Config):
    """An ordinary configuration, which every arm trains with, and the study."""

    study: StudySettings = field(default_factory=StudySettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lora.plan is None, "a study makes its own plans: leave lora.plan out")
        require(
            self.lora.adapter is None,
            "a study makes its own plans, and an adapter has its own ranks: leave lora.adapter out",
        )
        require(self.lora.max_rank is None, "a study sets lora.max_rank: leave it out")
        require(
            self.objective == "grpo",
            "a study trains its arms with study.arms.objectives: leave objective out",
        )
        given = self.study.allocation.objective
        for needed in (given,) if given else self.study.arms.objectives:
            require(
                needed in self.study.profile.objectives,
                f"the arms' importance is measured under {needed}, which is not profiled: add it "
                "to study.profile.objectives",
            )
        require(
            "equalised" not in self.study.arms.plans or "rslora" not in self.study.arms.scale_rules,
            "study.arms.plans holds equalised, but under rslora a gradient's share does not depend "
            "on rank, so no plan equalises it: take rslora out of study.arms.scale_rules",
        )
        decoding = self.study.outcome.decoding
        require(
            decoding in ("auto", *self.decodings),
            f"study.outcome.decoding={decoding}, but eval.temperature={self.eval.temperature:g} "
            f"gives {' and '.join(self.decodings)} completions",
        )
        require(
            self.study.design is None or self.lora.scale_rule == "constant",
            "study.design has the scale rules of its cells; lora.scale_rule, that of uniform and "
            f"proportional ranks, must be constant, got {self.lora.scale_rule}",
        )
        require(
            self.study.outcome.answer == "reward" or self.eval.reward == "gsm8k_answer",
            f"study.outcome.answer={self.study.outcome.answer} is a rule for GSM8K's answers; "
            f"with eval.reward={self.eval.reward} it must be reward",
        )
        self._check_bounds()

    def _check_bounds(self) -> None:
        """Refuses bounds that no ranks of the mean that a plan has can keep."""
        allocation, rank = self.study.allocation, self.lora.rank
        high = allocation.max_rank or 2 * rank
        require(
            allocation.min_rank <= rank <= high,
            f"lora.rank={rank} lies outside study.allocation's bounds, "
            f"min_rank={allocation.min_rank} to max_rank={high}",
        )
        require(
            self.width(rank) > 1 or not self.study.probe.scale_rules,
            f"study.probe needs ranks that differ, and at lora.rank={rank} with max_rank={high} "
            "there are none: set study.probe.scale_rules=[]",
        )
        for plan, (low, high) in allocation.bounds.items():
            mean = rank * (allocation.reduced_fraction if plan == "reduced" else 1)
            require(
                low <= mean <= high,
                f"the mean rank {mean:g} of {plan} lies outside study.allocation.bounds.{plan}: "
                f"{low} to {high}",
            )

    @property
    def decodings(self) -> tuple[Decoding, ...]:
        """Which evaluations a run makes, the one that the study is about first."""
        made: tuple[Decoding, ...] = ("sampled",) if self.eval.temperature > 0 else ("greedy",)
        if self.eval.also_greedy:
            made = ("sampled", "greedy")
        return made[::-1] if self.study.outcome.decoding == made[-1] else made

    @property
    def mean_ranks(self) -> tuple[int, ...]:
        return self.study.arms.mean_ranks or (self.lora.rank,)

    def bounds(self, mean_rank: int, plan: str | None = None) -> tuple[int, int]:
        """Smallest and largest rank of a plan of this mean rank; without a plan, of most."""
        allocation, rank = self.study.allocation, self.lora.rank
        low, high = allocation.min_rank, allocation.max_rank or 2 * rank
        mean, part = float(mean_rank), mean_rank / rank
        if plan == "reduced":
            mean *= allocation.reduced_fraction
        if plan in allocation.bounds:
            low, high = allocation.bounds[plan]
        elif plan == "reduced":
            part *= allocation.reduced_fraction
        # 0.7 * 20 is 14 to whoever wrote it, whatever float64 makes of it.
        low = min(math.floor(low * part + 1e-9), math.floor(mean))
        return low, max(math.ceil(high * part - 1e-9), math.ceil(mean))

    def width(self, mean_rank: int) -> int:
        """The largest rank that an adapter of this mean rank may have.

        It does not depend on which plans are compared, so that arms can be added to a study.
        """
        plans = (None, *self.study.allocation.bounds)
        return max(self.bounds(mean_rank, plan)[1] for plan in plans)

    @property
    def widest(self) -> int:
        """Ranks that every arm's adapters are stacked to: one program, and one draw of A, for all
        plans and mean ranks."""
        return max(map(self.width, self.mean_ranks))

    def importance_objective(self, objective: Objective) -> Objective:
        """Whose gradient ranks the layers of an arm that trains with `objective`."""
        return self.study.allocation.objective or objective

    def plain(self) -> Config:
        """The configuration without the study."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(Config)}
        return Config(**values)


@dataclass(frozen=True)
class Arm:
    """One training run of a study.

    Attributes:
        scale_rule: None for uniform ranks at lora.rank, where all rules give the same scale.
        seed: of a design, its block, counted from 1.
        rate: factor on optim.learning_rate.
    """

    plan: str
    scale_rule: ScaleRule | None
    mean_rank: int
    seed: int
    objective: Objective = "grpo"
    rate: float = 1.0

    @property
    def group(self) -> str:
        """What the arms of all seeds share."""
        rule = "" if self.scale_rule is None else f"-{self.scale_rule}"
        objective = "" if self.objective == "grpo" else f"-{self.objective}"
        return f"{self.plan}{rule}-r{self.mean_rank}{objective}"

    @property
    def name(self) -> str:
        return f"{self.group}-s{self.seed}"


def list_arms(config: StudyConfig) -> list[Arm]:
    """Every arm: the reference first, or, of a design, block by block in its order."""
    arms, design = config.study.arms, config.study.design
    if design is not None:
        return [
            Arm(cell, CELL_RULES[cell], config.lora.rank, block, rate=design.rate(block))
            for block in range(1, design.blocks + 1)
            for cell in design.order(block)
        ]
    found = []
    for objective, rank, plan in itertools.product(arms.objectives, config.mean_ranks, arms.plans):
        same = plan == "uniform" and rank == config.lora.rank
        for rule in (None,) if same else arms.scale_rules:
            found += [Arm(plan, rule, rank, seed, objective) for seed in arms.seeds]
    return found


def arm_label(arm: Arm, config: StudyConfig) -> str:
    """What tables call the arms of a group: as much as tells them apart."""
    arms, parts = config.study.arms, [PLAN_LABELS.get(arm.plan, arm.plan)]
    if arm.scale_rule is not None and len(arms.scale_rules) > 1:
        parts.append(arm.scale_rule)
    if len(config.mean_ranks) > 1:
        parts.append(f"rank {arm.mean_rank}")
    if len(arms.objectives) > 1:
        parts.append(arm.objective.upper())
    return ", ".join(parts)


def scaled_lora(config: StudyConfig, rule: ScaleRule | None, mean_rank: int) -> dict:
    """The LoRA settings of an arm: every rule gives scale alpha / rank at lora.rank.

    That one anchor makes uniform arms the same under every rule and compares rules at one learning
    rate; away from it a rank r has alpha/rank (constant), alpha/rank * sqrt(rank/r) (rslora) or
    alpha/r (alpha_over_r).
    """
    anchor, scale = config.lora.rank, config.lora.alpha / config.lora.rank
    alpha = {
        None: scale * mean_rank,
        "constant": scale * mean_rank,
        "rslora": scale * anchor**0.5,
        "alpha_over_r": scale * anchor,
    }[rule]
    return {
        "rank": mean_rank,
        "alpha": alpha,
        "scale_rule": rule or "constant",
        "max_rank": config.widest,
    }


class StudyFiles:
    """Where a study keeps what it makes."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.results = self.root / "results.json"
        self.plans = self.root / "plans"
        self.html = self.root / "report.html"
        self.design = self.root / "design.json"
        self.reports = self.root / "reports.json"
        self.rounds = self.root / "rounds.json"

    def calibration(self, objective: str) -> Path:
        return self.root / f"calibration{'' if objective == 'grpo' else f'-{objective}'}.json"

    def profile(self, objective: str) -> Path:
        return self.root / "profiles" / objective

    def probe(self, rule: str, draw: int) -> Path:
        return self.root / "probes" / f"{draw}-{rule}"

    def uniform(self, draw: int) -> Path:
        """The run at uniform ranks with the seed of a draw; of the first it is the profile."""
        return self.probe("uniform", draw) if draw else self.profile("grpo")

    def arm(self, arm: Arm) -> Path:
        return self.root / "arms" / arm.name

    def cut(self, arm: Arm, criterion: str, share: float) -> Path:
        return self.root / "cuts" / f"{arm.name}-{criterion}-{share:g}"

    def plan(self, name: str) -> Path:
        return self.plans / f"{name}.json"
