"""The objective, the optimizer, and a run as a whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from jaxgrpo.config.errors import require
from jaxgrpo.config.model import LoraConfig, MeshConfig, ModelConfig
from jaxgrpo.config.sampling import DataConfig, EvalConfig, RolloutConfig

LossName = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo"]
Objective = Literal["grpo", "sft"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True)
class GrpoConfig:
    """The objective. Formulas: `grpo/loss.py`, `grpo/advantages.py`."""

    loss: LossName = "dapo"
    prompts_per_step: int = 16
    group_size: int = 8
    """Completions per prompt; advantages are relative to the group, so at least 2."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = (
        "sum_then_normalize"
    )
    """How several rewards become one advantage: their weighted sum is normalised, or each of them
    in its group before the weighted sum, which is then normalised over the batch (GDPO,
    arXiv:2601.05242)."""
    clip_eps_low: float = 0.2
    clip_eps_high: float | None = None
    """Default: clip_eps_low. For cispo it is the cap on the ratio itself."""
    delta: float | None = None
    """Upper bound of the ratio in the unclipped term (two-sided clipping)."""
    kl_coef: float = 0.0
    """Weight of the k3 estimate of KL(policy || what training starts from): the base model, with
    the adapter that lora.adapter names if there is one."""
    num_iterations: int = 1
    """Optimizer updates per rollout (mu)."""
    mask_truncated_completions: bool = False
    importance_correction: Correction = "token_truncate"
    """How trainer/sampler log-prob differences are corrected for."""
    importance_cap: float = 3.0
    micro_batches: int = 1
    """A step whose completions all reach the cap is computed in about this many parts, one after
    another; a shorter one takes fewer of the same size."""
    logprob_chunk_tokens: int = 1024
    """Logits are made for this many tokens of each device's rows at a time; the head's table is
    read once for each of these chunks."""

    def __post_init__(self) -> None:
        require(
            self.group_size >= 2,
            f"grpo.group_size must be at least 2 (a group of one has no relative advantage), "
            f"got {self.group_size}",
        )
        for name in (
            "prompts_per_step",
            "num_iterations",
            "micro_batches",
            "logprob_chunk_tokens",
        ):
            value = getattr(self, name)
            require(value >= 1, f"grpo.{name} must be at least 1, got {value}")
        require(self.clip_eps_low >= 0, "grpo.clip_eps_low must be >= 0")
        require(
            self.clip_eps_high is None or self.clip_eps_high > 0, "grpo.clip_eps_high must be > 0"
        )
        require(
            self.loss != "cispo" or self.clip_eps_high is not None,
            "grpo.loss=cispo needs grpo.clip_eps_high: it caps the ratio itself, 5.0 for example",
        )
        require(
            self.scale_rewards == "group"
            or self.multi_objective_aggregation == "sum_then_normalize",
            f"grpo.scale_rewards={self.scale_rewards} has no effect with "
            "grpo.multi_objective_aggregation=normalize_then_sum, which scales by group and then "
            "by batch; leave it at group",
        )
        require(self.delta is None or self.delta > 0, "grpo.delta must be positive")
        require(
            math.isfinite(self.kl_coef) and self.kl_coef >= 0,
            f"grpo.kl_coef must be a number >= 0, got {self.kl_coef}",
        )
        require(self.importance_cap > 0, "grpo.importance_cap must be positive")
        require(
            self.micro_batches <= self.rows_per_step,
            f"grpo.micro_batches={self.micro_batches} is more than the {self.rows_per_step} rows "
            f"of a step (prompts_per_step x group_size)",
        )

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step * self.group_size


@dataclass(frozen=True)
class OptimConfig:
    """AdamW on the adapters."""

    learning_rate: float = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Global-norm clipping; 0 switches it off."""

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.learning_rate) and self.learning_rate >= 0,
            f"optim.learning_rate must be a number >= 0, got {self.learning_rate}",
        )
        require(self.warmup_steps >= 0, "optim.warmup_steps must be >= 0")
        require(0 <= self.b1 < 1 and 0 <= self.b2 < 1, "optim.b1 and optim.b2 must lie in [0, 1)")
        require(math.isfinite(self.eps) and self.eps > 0, "optim.eps must be a positive number")
        require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "optim.weight_decay must be a number >= 0",
        )
        require(self.max_grad_norm >= 0, "optim.max_grad_norm must be >= 0 (0 = off)")


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    run_dir: str = "runs/embedded"
    seed: int = 0
    steps: int = 80
    checkpoint_every_steps: int = 20
    keep_checkpoints: int = 2
    log_completions_every_steps: int = 10
    """How often the completions table is printed, and TensorBoard gets heat maps of the norms and
    some completions; every completion and every norm is always on disk."""
    wandb_project: str | None = None
    """Also log to this project of Weights & Biases: needs the extra `wandb`, and a key unless
    WANDB_MODE=offline."""
    objective: Objective = "grpo"
    """sft: supervised steps on the gold answers, grpo.rows_per_step of them a step."""
    weight_grad_norms: bool = False
    """Also measure ||dL/dW||_F of the frozen weights, the view of importance that no rank enters;
    about a third more work, and memory for one float32 copy of the adapted weights."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    reward_timeout_s: float = 120.0
    """What a reward function may take for the completions of a step; 0: no limit."""
    rewards: dict[str, float] = field(default_factory=lambda: {"gsm8k_answer": 1.0})
    """Reward (a name, or `module:function`) -> weight."""

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "run_dir is empty")
        require(0 <= self.seed < 2**31, f"seed must lie in [0, 2^31), got {self.seed}")
        for name in ("steps", "checkpoint_every_steps", "keep_checkpoints"):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1, got {value}")
        require(self.log_completions_every_steps >= 0, "log_completions_every_steps must be >= 0")
        require(
            math.isfinite(self.reward_timeout_s) and self.reward_timeout_s >= 0,
            f"reward_timeout_s must be a number >= 0 (0 = off), got {self.reward_timeout_s}",
        )
        require(bool(self.rewards), "rewards is empty: name at least one, e.g. gsm8k_answer: 1.0")
        for name, weight in self.rewards.items():
            require(math.isfinite(weight), f"rewards.{name} must be a finite weight")
        require(
            self.rollout.temperature > 0,
            "rollout.temperature must be > 0 in training: greedy groups have no spread",
        )

    @property
    def eval_max_completion_tokens(self) -> int:
        return self.eval.max_completion_tokens or self.rollout.max_completion_tokens
