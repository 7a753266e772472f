"""Settings of a study: an ordinary run's configuration, and what to compare. No jax."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from jaxgrpo.config import Config, ConfigError, Objective, ScaleRule, check_choice

View = Literal["l2", "rms", "rank_free", "weight"]
SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
FROM_PROFILE = ("proportional", "inverse", "reduced", "top_k", "equalised")
FROM_CALIBRATION = ("fim", "gora", "eva")
DYNAMIC = ("adalora", "adaptive", "para")
"""Plans that change during training, or, para, once at its end."""
PLANS = ("uniform", "random", *FROM_PROFILE, *FROM_CALIBRATION, *DYNAMIC)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


class Interrupted(Exception):
    """The user or the machine asked the study to stop; what was running is saved."""


@dataclass(frozen=True)
class ProfileConfig:
    """Steps at uniform rank whose gradient norms say which layers matter."""

    objectives: tuple[Objective, ...] = ("grpo", "sft")
    steps: int = 20
    calibration_batches: int = 8
    """Batches, without an update, for what fim, gora and eva measure."""

    def __post_init__(self) -> None:
        _require(self.steps >= 4, "study.profile.steps must be at least 4, to compare halves")
        _require(self.calibration_batches >= 1, "study.profile.calibration_batches must be >= 1")
        _require("grpo" in self.objectives, "study.profile.objectives must hold grpo")
        for objective in self.objectives:
            check_choice(objective, get_args(Objective), "study.profile.objectives")


@dataclass(frozen=True)
class AllocationConfig:
    """How importance becomes ranks. The budget is lora.rank (or a mean rank of the sweep)
    everywhere."""

    view: View = "l2"
    """The importance: raw norms (the paper), per parameter, rank-free, or of the frozen weight."""
    objective: Objective = "grpo"
    """Whose profile gives the importance."""
    unit: Literal["ranks", "parameters"] = "parameters"
    """What arms have in common; eva always counts ranks, whose prices differ between modules."""
    granularity: Literal["layer", "module"] = "layer"
    """One rank for all modules of a layer, or one each; fim, gora and eva always rank modules."""
    min_rank: int = 1
    max_rank: int | None = None
    """Bounds at lora.rank, scaled with the mean rank in a sweep. Default: twice lora.rank."""
    reduced_fraction: float = 0.7
    top_layers: int = 4
    adaptive_every_steps: int = 20

    def __post_init__(self) -> None:
        _require(self.min_rank >= 0, "study.allocation.min_rank must be >= 0")
        _require(
            self.max_rank is None or self.max_rank >= max(1, self.min_rank),
            f"study.allocation.max_rank must be at least min_rank={self.min_rank}",
        )
        _require(
            0 < self.reduced_fraction < 1, "study.allocation.reduced_fraction must lie in (0, 1)"
        )
        _require(self.top_layers >= 1, "study.allocation.top_layers must be at least 1")
        _require(
            self.adaptive_every_steps >= 1, "study.allocation.adaptive_every_steps must be >= 1"
        )


@dataclass(frozen=True)
class ProbeConfig:
    """Short runs at randomised ranks: how a share of the gradient depends on rank."""

    scale_rules: tuple[ScaleRule, ...] = SCALE_RULES
    draws: int = 1
    """Random plans per scale rule; a rank is drawn for every adapter."""

    def __post_init__(self) -> None:
        _require(self.draws >= 1, "study.probe.draws must be at least 1")
        for rule in self.scale_rules:
            check_choice(rule, SCALE_RULES, "study.probe.scale_rules")


@dataclass(frozen=True)
class ArmsConfig:
    """Which plans are trained to the end and compared: plans x scale rules x mean ranks x seeds."""

    plans: tuple[str, ...] = ("uniform", "proportional", "inverse", "random")
    scale_rules: tuple[ScaleRule, ...] = ("constant",)
    seeds: tuple[int, ...] = (0, 1)
    mean_ranks: tuple[int, ...] = ()
    """Default: lora.rank alone."""

    def __post_init__(self) -> None:
        for name in ("plans", "scale_rules", "seeds", "mean_ranks"):
            values = getattr(self, name)
            _require(
                len(set(values)) == len(values), f"study.arms.{name} holds a value twice: {values}"
            )
            _require(bool(values) or name == "mean_ranks", f"study.arms.{name} is empty")
        for plan in self.plans:
            check_choice(plan, PLANS, "study.arms.plans")
        for rule in self.scale_rules:
            check_choice(rule, SCALE_RULES, "study.arms.scale_rules")
        _require("uniform" in self.plans, "study.arms.plans must hold uniform, the reference")
        _require(min(self.seeds) >= 0, "study.arms.seeds must be >= 0")
        _require(all(r >= 1 for r in self.mean_ranks), "study.arms.mean_ranks must be >= 1")


@dataclass(frozen=True)
class StudySettings:
    """What `study:` holds."""

    title: str = "Does this rank allocation help under GRPO?"
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    arms: ArmsConfig = field(default_factory=ArmsConfig)


@dataclass(frozen=True)
class StudyConfig(Config):
    """An ordinary configuration, which every arm trains with, and the study."""

    study: StudySettings = field(default_factory=StudySettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.lora.plan is None, "a study makes its own plans: leave lora.plan out")
        _require(self.lora.max_rank is None, "a study sets lora.max_rank: leave it out")
        _require(self.objective == "grpo", "a study trains its arms with objective grpo")
        _require(
            self.study.allocation.objective in self.study.profile.objectives,
            f"study.allocation.objective={self.study.allocation.objective} is not profiled: add it "
            "to study.profile.objectives",
        )
        _require(
            "equalised" not in self.study.arms.plans or "rslora" not in self.study.arms.scale_rules,
            "study.arms.plans holds equalised, but under rslora a gradient's share does not depend "
            "on rank, so no plan equalises it: take rslora out of study.arms.scale_rules",
        )
        low, high = self.study.allocation.min_rank, self.study.allocation.max_rank
        _require(
            low <= self.lora.rank and (high is None or self.lora.rank <= high),
            f"lora.rank={self.lora.rank} lies outside study.allocation's bounds, min_rank={low} to "
            f"max_rank={high or 2 * self.lora.rank}",
        )

    @property
    def mean_ranks(self) -> tuple[int, ...]:
        return self.study.arms.mean_ranks or (self.lora.rank,)

    def bounds(self, mean_rank: int) -> tuple[int, int]:
        """Smallest and largest rank of a plan of this mean rank."""
        allocation, rank = self.study.allocation, self.lora.rank
        high = allocation.max_rank or 2 * rank
        low = min(allocation.min_rank * mean_rank // rank, mean_rank)
        return low, max(-(-high * mean_rank // rank), mean_rank)

    def plain(self) -> Config:
        """The configuration without the study."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(Config)}
        return Config(**values)


@dataclass(frozen=True)
class Arm:
    """One training run of a study.

    Attributes:
        scale_rule: None for uniform ranks at lora.rank, where all rules give the same scale.
    """

    plan: str
    scale_rule: ScaleRule | None
    mean_rank: int
    seed: int

    @property
    def group(self) -> str:
        """What the arms of all seeds share."""
        rule = "" if self.scale_rule is None else f"-{self.scale_rule}"
        return f"{self.plan}{rule}-r{self.mean_rank}"

    @property
    def name(self) -> str:
        return f"{self.group}-s{self.seed}"


def list_arms(config: StudyConfig) -> list[Arm]:
    """Every arm, reference first."""
    arms = config.study.arms
    found = []
    for rank in config.mean_ranks:
        for plan in arms.plans:
            same = plan == "uniform" and rank == config.lora.rank
            for rule in (None,) if same else arms.scale_rules:
                found += [Arm(plan, rule, rank, seed) for seed in arms.seeds]
    return found


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
        "max_rank": config.bounds(mean_rank)[1],
    }


class StudyFiles:
    """Where a study keeps what it makes."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.results = self.root / "results.json"
        self.plans = self.root / "plans"
        self.calibration = self.root / "calibration.json"
        self.html = self.root / "report.html"

    def profile(self, objective: str) -> Path:
        return self.root / "profiles" / objective

    def probe(self, rule: str, draw: int) -> Path:
        return self.root / "probes" / f"{rule}-{draw}"

    def arm(self, arm: Arm) -> Path:
        return self.root / "arms" / arm.name

    def plan(self, name: str) -> Path:
        return self.plans / f"{name}.json"
