"""Settings of a study: an ordinary run's configuration, and what to compare. No jax."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from jaxgrpo.config import Config, ConfigError, Objective, ScaleRule, check_choice
from jaxgrpo.study.design import CELL_RULES, DesignConfig
from jaxgrpo.study.result_types import Answer, Decoding

View = Literal["l2", "rms", "rank_free", "weight"]
SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
FROM_PROFILE = (
    "proportional",
    "proportional_module",
    "inverse",
    "reduced",
    "top_k",
    "equalised",
)
FROM_CALIBRATION = ("fim", "gora", "eva")
BY_MODULE = ("proportional_module", *FROM_CALIBRATION)
"""Plans that rank single adapters, whatever study.allocation.granularity is."""
WIDE = ("adalora", "para", "uniform_cut")
"""Plans that start at more ranks than they end with."""
DYNAMIC = ("adaptive", *WIDE)
"""Plans that change during training, or, para and uniform_cut, once at its end."""
PLANS = ("uniform", "random", *FROM_PROFILE, *FROM_CALIBRATION, *DYNAMIC)
BOUNDED = ("random", *FROM_PROFILE, *FROM_CALIBRATION, "adaptive")
"""Plans whose ranks keep to bounds; the others start from one rank and may cut an adapter away."""
PLAN_LABELS = {
    "proportional_module": "proportional (one rank per module)",
    "fim": "FIM-LoRA (ranks only)",
    "gora": "GoRA (ranks only)",
    "eva": "EVA (ranks only)",
    "adalora": "AdaLoRA (ranks only)",
    "para": "PARA",
    "uniform_cut": "uniform, trained wide, cut per adapter",
}
"""What tables call a plan, where not by its name. Ranks only: the method's rule for ranks, without
its initialisation, its scale and whatever else belongs to it."""


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
    objective: Objective | None = None
    """Whose profile gives the importance. Default: the objective that the arm trains with."""
    unit: Literal["ranks", "parameters"] = "parameters"
    """What all arms have as much of, those that move or are cut in the end."""
    granularity: Literal["layer", "module"] = "layer"
    """One rank for all modules of a layer, or one each; proportional_module, fim, gora and eva
    always rank modules."""
    min_rank: int = 1
    max_rank: int | None = None
    """Bounds at lora.rank, scaled with the mean rank in a sweep. Default: twice lora.rank."""
    bounds: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Plan -> its own smallest and largest rank at lora.rank, in place of min_rank and max_rank.
    Those of reduced default to reduced_fraction times the others'."""
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
        for plan, pair in self.bounds.items():
            check_choice(plan, BOUNDED, "study.allocation.bounds")
            _require(
                len(pair) == 2 and 0 <= pair[0] <= pair[1] and pair[1] >= 1,
                f"study.allocation.bounds.{plan} must be a smallest and a largest rank, as in "
                f"[16, 48], got {list(pair)}",
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
    """Which plans are trained to the end and compared: objectives x mean ranks x plans x scale
    rules x seeds. Arms of different objectives are not compared with each other."""

    plans: tuple[str, ...] = ("uniform", "proportional", "inverse", "random")
    scale_rules: tuple[ScaleRule, ...] = ("constant",)
    seeds: tuple[int, ...] = (0, 1)
    mean_ranks: tuple[int, ...] = ()
    """Default: lora.rank alone."""
    objectives: tuple[Objective, ...] = ("grpo",)

    def __post_init__(self) -> None:
        for name in ("plans", "scale_rules", "seeds", "mean_ranks", "objectives"):
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
class CutsConfig:
    """PARA on every finished uniform arm: its adapter is cut and evaluated, nothing is trained."""

    energy: tuple[float, ...] = ()
    """Shares of the squared singular values of all adapters together to keep."""
    parameters: tuple[float, ...] = ()
    """Shares of the parameters to keep."""

    def __post_init__(self) -> None:
        for criterion, share in self.amounts:
            _require(0 < share < 1, f"study.cuts.{criterion} must lie in (0, 1), got {share:g}")

    @property
    def amounts(self) -> list[tuple[str, float]]:
        return [("energy", x) for x in self.energy] + [("parameters", x) for x in self.parameters]


@dataclass(frozen=True)
class OutcomeConfig:
    """Which accuracy the study is about, where runs are measured in several ways."""

    decoding: Literal["auto", "greedy", "sampled"] = "auto"
    """auto: sampled if eval.temperature is above 0, otherwise greedy."""
    answer: Answer = "reward"
    """Which rule says right: that of eval.reward, or lm-eval's strict or flexible one for GSM8K."""


@dataclass(frozen=True)
class StudySettings:
    """What `study:` holds."""

    title: str = "Does this rank allocation help under GRPO?"
    margin: float = 0.02
    """A difference in accuracy within this either way counts as none: two points."""
    outcome: OutcomeConfig = field(default_factory=OutcomeConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    arms: ArmsConfig = field(default_factory=ArmsConfig)
    cuts: CutsConfig = field(default_factory=CutsConfig)
    design: DesignConfig | None = None
    """A factorial in blocks, in place of `arms`."""
    only: tuple[str, ...] = ()
    """Runs these parts and ends: `prepare` (profile, plans, probes), an arm's name or that of its
    group, or s3 for every arm of seed or block 3. Parts may run side by side. Default: all."""

    def __post_init__(self) -> None:
        _require(
            self.design is None or self.arms == ArmsConfig(),
            "study.design makes its own arms: leave study.arms out",
        )
        _require(
            self.design is None or not self.cuts.amounts,
            "study.cuts cuts the uniform arms of study.arms, and a design has none: leave it out",
        )
        _require(0 < self.margin < 1, f"study.margin must lie in (0, 1), got {self.margin}")


@dataclass(frozen=True)
class StudyConfig(Config):
    """An ordinary configuration, which every arm trains with, and the study."""

    study: StudySettings = field(default_factory=StudySettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.lora.plan is None, "a study makes its own plans: leave lora.plan out")
        _require(
            self.lora.adapter is None,
            "a study makes its own plans, and an adapter has its own ranks: leave lora.adapter out",
        )
        _require(self.lora.max_rank is None, "a study sets lora.max_rank: leave it out")
        _require(
            self.objective == "grpo",
            "a study trains its arms with study.arms.objectives: leave objective out",
        )
        given = self.study.allocation.objective
        for needed in (given,) if given else self.study.arms.objectives:
            _require(
                needed in self.study.profile.objectives,
                f"the arms' importance is measured under {needed}, which is not profiled: add it "
                "to study.profile.objectives",
            )
        _require(
            "equalised" not in self.study.arms.plans or "rslora" not in self.study.arms.scale_rules,
            "study.arms.plans holds equalised, but under rslora a gradient's share does not depend "
            "on rank, so no plan equalises it: take rslora out of study.arms.scale_rules",
        )
        decoding = self.study.outcome.decoding
        _require(
            decoding in ("auto", *self.decodings),
            f"study.outcome.decoding={decoding}, but eval.temperature={self.eval.temperature:g} "
            f"gives {' and '.join(self.decodings)} completions",
        )
        _require(
            self.study.design is None or self.lora.scale_rule == "constant",
            "study.design has the scale rules of its cells; lora.scale_rule, that of uniform and "
            f"proportional ranks, must be constant, got {self.lora.scale_rule}",
        )
        _require(
            self.study.outcome.answer == "reward" or self.eval.reward == "gsm8k_answer",
            f"study.outcome.answer={self.study.outcome.answer} is a rule for GSM8K's answers; "
            f"with eval.reward={self.eval.reward} it must be reward",
        )
        self._check_bounds()

    def _check_bounds(self) -> None:
        """Refuses bounds that no ranks of the mean that a plan has can keep."""
        allocation, rank = self.study.allocation, self.lora.rank
        high = allocation.max_rank or 2 * rank
        _require(
            allocation.min_rank <= rank <= high,
            f"lora.rank={rank} lies outside study.allocation's bounds, "
            f"min_rank={allocation.min_rank} to max_rank={high}",
        )
        for plan, (low, high) in allocation.bounds.items():
            mean = rank * (allocation.reduced_fraction if plan == "reduced" else 1)
            _require(
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
        """Ranks that every arm's adapters are stacked to: one program, and one draw of A, for all.

        It does not depend on which plans are compared, so that arms can be added to a study.
        """
        plans = (None, *self.study.allocation.bounds)
        return max(self.bounds(mean_rank, plan)[1] for plan in plans)

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
        "max_rank": config.width(mean_rank),
    }


class StudyFiles:
    """Where a study keeps what it makes."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.results = self.root / "results.json"
        self.plans = self.root / "plans"
        self.html = self.root / "report.html"
        self.design = self.root / "design.json"

    def calibration(self, objective: str) -> Path:
        return self.root / f"calibration{'' if objective == 'grpo' else f'-{objective}'}.json"

    def profile(self, objective: str) -> Path:
        return self.root / "profiles" / objective

    def probe(self, rule: str, draw: int) -> Path:
        return self.root / "probes" / f"{rule}-{draw}"

    def arm(self, arm: Arm) -> Path:
        return self.root / "arms" / arm.name

    def cut(self, arm: Arm, criterion: str, share: float) -> Path:
        return self.root / "cuts" / f"{arm.name}-{criterion}-{share:g}"

    def plan(self, name: str) -> Path:
        return self.plans / f"{name}.json"
