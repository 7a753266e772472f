"""What `study:` holds, section by section, and the names of plans. No jax."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from jaxgrpo.config import ConfigError, Objective, ScaleRule, check_choice
from jaxgrpo.study.design import DesignConfig
from jaxgrpo.study.result_types import Answer

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
MEASURED = ("adalora",)
"""Plans that go by AdaLoRA's statistics, which their training keeps."""
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


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class ProfileConfig:
    """Steps at uniform rank whose gradient norms say which layers matter."""

    objectives: tuple[Objective, ...] = ("grpo", "sft")
    steps: int = 20
    calibration_batches: int = 8
    """Batches, without an update, for what fim, gora and eva measure."""

    def __post_init__(self) -> None:
        require(self.steps >= 4, "study.profile.steps must be at least 4, to compare halves")
        require(self.calibration_batches >= 1, "study.profile.calibration_batches must be >= 1")
        require("grpo" in self.objectives, "study.profile.objectives must hold grpo")
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
        require(self.min_rank >= 0, "study.allocation.min_rank must be >= 0")
        require(
            self.max_rank is None or self.max_rank >= max(1, self.min_rank),
            f"study.allocation.max_rank must be at least min_rank={self.min_rank}",
        )
        require(
            0 < self.reduced_fraction < 1, "study.allocation.reduced_fraction must lie in (0, 1)"
        )
        for plan, pair in self.bounds.items():
            check_choice(plan, BOUNDED, "study.allocation.bounds")
            require(
                len(pair) == 2 and 0 <= pair[0] <= pair[1] and pair[1] >= 1,
                f"study.allocation.bounds.{plan} must be a smallest and a largest rank, as in "
                f"[16, 48], got {list(pair)}",
            )
        require(self.top_layers >= 1, "study.allocation.top_layers must be at least 1")
        require(
            self.adaptive_every_steps >= 1, "study.allocation.adaptive_every_steps must be >= 1"
        )


@dataclass(frozen=True)
class ProbeConfig:
    """Short runs at drawn ranks: how a share of the gradient depends on rank.

    A draw is a run per scale rule and one at uniform ranks, all of one seed. Over draws an adapter
    goes through the levels r/4, r/2, r and 2r of r = lora.rank, a Latin square of adapters and
    draws, so that it is its own control.
    """

    scale_rules: tuple[ScaleRule, ...] = SCALE_RULES
    draws: int = 4
    """Those in which every adapter has a level of its own."""
    layer_draws: int = 2
    """Further ones, in which the adapters of a layer share theirs."""

    @property
    def runs(self) -> int:
        """Per scale rule."""
        return self.draws + self.layer_draws

    @property
    def asked(self) -> range:
        """The draws that are run: none without a scale rule."""
        return range(self.runs if self.scale_rules else 0)

    def __post_init__(self) -> None:
        require(
            self.draws >= 2,
            "study.probe.draws must be at least 2, so that an adapter has two ranks to compare, "
            f"got {self.draws}; a study made with fewer goes on with study.probe.draws=4",
        )
        require(self.layer_draws >= 0, "study.probe.layer_draws must be >= 0")
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
            require(
                len(set(values)) == len(values), f"study.arms.{name} holds a value twice: {values}"
            )
            require(bool(values) or name == "mean_ranks", f"study.arms.{name} is empty")
        for plan in self.plans:
            check_choice(plan, PLANS, "study.arms.plans")
        for rule in self.scale_rules:
            check_choice(rule, SCALE_RULES, "study.arms.scale_rules")
        require("uniform" in self.plans, "study.arms.plans must hold uniform, the reference")
        require(min(self.seeds) >= 0, "study.arms.seeds must be >= 0")
        require(all(r >= 1 for r in self.mean_ranks), "study.arms.mean_ranks must be >= 1")


@dataclass(frozen=True)
class CutsConfig:
    """PARA on every finished uniform arm: its adapter is cut and evaluated, nothing is trained."""

    energy: tuple[float, ...] = ()
    """Shares of the squared singular values of all adapters together to keep."""
    parameters: tuple[float, ...] = ()
    """Shares of the parameters to keep."""

    def __post_init__(self) -> None:
        for criterion, share in self.amounts:
            require(0 < share < 1, f"study.cuts.{criterion} must lie in (0, 1), got {share:g}")

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
    margin: float = 0.015
    """A difference in accuracy within this either way counts as none: a point and a half. "No plan
    beats uniform" is said of differences that are shown to be smaller."""
    outcome: OutcomeConfig = field(default_factory=OutcomeConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    arms: ArmsConfig = field(default_factory=ArmsConfig)
    cuts: CutsConfig = field(default_factory=CutsConfig)
    design: DesignConfig | None = None
    """A factorial in blocks, in place of `arms`."""
    together: int | None = None
    """So many arms are trained side by side in the same programs, of those that differ in seed,
    plan, scale rule and learning rate alone, at most. Default: as many as memory allows on an
    accelerator, one on a CPU; a sweep first gives every worker some. It changes how long a study
    takes, and nothing else."""
    only: tuple[str, ...] = ()
    """Runs these parts and ends: `prepare` (profile, plans), and after it, side by side, `probes`,
    an arm's name or that of its group, or s3 for every arm of seed or block 3; `cuts` those of
    uniform arms that have ended; `report` writes what a design's last look tells, or arms that have
    all ended, and trains nothing. Default: all."""

    def __post_init__(self) -> None:
        require(
            self.design is None or self.arms == ArmsConfig(),
            "study.design makes its own arms: leave study.arms out",
        )
        require(
            self.design is None or not self.cuts.amounts,
            "study.cuts cuts the uniform arms of study.arms, and a design has none: leave it out",
        )
        require(
            self.together is None or self.together >= 1,
            f"study.together must be at least 1, got {self.together}",
        )
        require(0 < self.margin < 1, f"study.margin must lie in (0, 1), got {self.margin}")
