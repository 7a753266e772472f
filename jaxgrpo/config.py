"""Run configuration as frozen dataclasses, each checking its own values.

Defaults live here only; a YAML file states differences (`config_files.py` reads it). No jax.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

EMBEDDED = "embedded"
"""The `model.path` and `data.path` value that means: what ships with the package."""

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven projections of a Qwen2 layer, by their Hugging Face names."""

MAX_RANK = 2**16
"""No projection of a Qwen2 model is wide enough for a larger rank."""

DEV_SPLIT = "dev"
"""The `data.eval_split` that is held out of the training split."""

ScaleRule = Literal["constant", "rslora", "alpha_over_r"]
LossName = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo"]
Objective = Literal["grpo", "sft"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class ConfigError(Exception):
    """A user's mistake, told in one line: what is wrong, where, the nearest valid choice."""

    def __init__(self, message: str) -> None:
        # What it quotes, a key or another library's message, may have lines or no end.
        line = " ".join(message.splitlines())
        super().__init__(line if len(line) <= 600 else f"{line[:599]}…")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class ModelConfig:
    """Which Qwen2-architecture model, and how it computes."""

    path: str = EMBEDDED
    """`embedded`, a local Hugging Face directory, or a hub id (Qwen/Qwen2.5-1.5B-Instruct)."""
    revision: str | None = None
    """Branch, tag or commit, for a hub id only."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute and storage type of the frozen weights; norms, softmax and log-probs are float32.
    auto: float32 on CPU, bfloat16 on GPU and TPU."""
    remat: Literal["auto", "none", "products", "full"] = "auto"
    """What the backward pass recomputes: nothing, all but matrix products and attention, or every
    layer. auto: `products` where a micro-batch fits so, otherwise `full` (and on CPU)."""


@dataclass(frozen=True)
class LoraConfig:
    """The adapters: which projections, which rank in which layer, which scale."""

    rank: int = 16
    """Rank of every adapter when `plan` is not given; the reference rank of `constant` scaling."""
    plan: str | None = None
    """A rank plan (JSON, see `rank_plan.py`): rank per layer, or per module and layer."""
    adapter: str | None = None
    """A directory with a PEFT LoRA adapter to start from: its ranks are the plan, and its update of
    the weights is kept whatever `alpha` and `scale_rule` say from there on."""
    max_rank: int | None = None
    """Width of the stacked arrays; default: the largest rank of the plan."""
    rank_budget: int | None = None
    """If given, the plan's ranks summed over all adapters must not exceed it."""
    alpha: float = 32.0
    scale_rule: ScaleRule = "constant"
    """constant: alpha/rank everywhere; rslora: alpha/sqrt(r_i); alpha_over_r: alpha/r_i (PEFT)."""
    target_modules: tuple[str, ...] = MODULES

    def __post_init__(self) -> None:
        _require(
            1 <= self.rank <= MAX_RANK, f"lora.rank must lie in 1..{MAX_RANK}, got {self.rank}"
        )
        _require(
            math.isfinite(self.alpha) and self.alpha > 0,
            f"lora.alpha must be a positive number, got {self.alpha}",
        )
        _require(
            self.plan is None or self.adapter is None,
            "lora.plan and lora.adapter both say what the ranks are; give one of them",
        )
        _require(len(self.target_modules) > 0, "lora.target_modules is empty")
        for module in self.target_modules:
            check_choice(module, MODULES, "lora.target_modules")
        _require(
            len(set(self.target_modules)) == len(self.target_modules),
            "lora.target_modules names a projection twice",
        )
        _require(
            self.max_rank is None or 1 <= self.max_rank <= MAX_RANK,
            f"lora.max_rank must lie in 1..{MAX_RANK}, got {self.max_rank}",
        )
        _require(
            self.rank_budget is None or self.rank_budget >= 1,
            f"lora.rank_budget must be at least 1, got {self.rank_budget}",
        )


@dataclass(frozen=True)
class DataConfig:
    """Where the problems come from and how they become prompts."""

    path: str = EMBEDDED
    """`embedded`, a hub id, a directory, or a .jsonl, .json or .parquet file."""
    name: str | None = None
    """The subset of a hub data set ("main" for openai/gsm8k), for a hub id only."""
    revision: str | None = None
    """Branch, tag or commit, for a hub id only."""
    train_split: str = "train"
    eval_split: str = "test"
    """`dev`: the problems that dev_problems holds out."""
    dev_problems: int = 0
    """So many problems of train_split, drawn once for all runs, are not trained on; they are what
    eval_split=dev evaluates."""
    prompt_column: str = "question"
    answer_column: str = "answer"
    system_prompt: str | None = None
    """null: none, or the chat template's own if it has one. No text is a prompt of nothing."""
    prompt_suffix: str = ""
    """Appended to every question before the chat template is applied."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the chat template is told besides the messages (enable_thinking, of Qwen3's); a name
    that it does not read is refused. Default: what the template does by itself."""
    drop_rows_without_answer: bool = False
    """Rows whose gold answer holds nothing to compare with are dropped, counted and reported; they
    are refused otherwise."""
    max_prompt_tokens: int = 256
    """Longer prompts are dropped, counted and reported."""
    prompt_bucket_tokens: int = 64
    """Prompts are left-padded to the next multiple of this that holds the split's longest."""
    embedded_problems: int = 4096
    """How many training problems the embedded generator makes."""

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "prompt_bucket_tokens", "embedded_problems"):
            _require(getattr(self, name) >= 1, f"data.{name} must be at least 1")
        _require(self.dev_problems >= 0, "data.dev_problems must be >= 0")
        _require(
            self.eval_split != DEV_SPLIT or self.dev_problems > 0,
            "data.eval_split=dev needs data.dev_problems, how many training problems it holds out",
        )

    def padded(self, tokens: int) -> int:
        """Slots that prompts take of which the longest has so many tokens."""
        return -(-tokens // self.prompt_bucket_tokens) * self.prompt_bucket_tokens


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    max_completion_tokens: int = 256
    temperature: float = 1.0
    """0 means greedy."""
    top_k: int = 0
    """0 keeps every token."""
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    """Ends a completion, besides the ends that tokenizer, chat template and model declare."""
    stop_strings: tuple[str, ...] = ()
    """Ends a completion, whose text ends with the string (docs/own_tasks.md)."""

    def __post_init__(self) -> None:
        _require(self.max_completion_tokens >= 1, "rollout.max_completion_tokens must be >= 1")
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"rollout.temperature must be a number >= 0, got {self.temperature}",
        )
        _require(self.top_k >= 0, f"rollout.top_k must be >= 0 (0 = off), got {self.top_k}")
        _require(0 < self.top_p <= 1, f"rollout.top_p must lie in (0, 1], got {self.top_p}")
        _require(0 <= self.min_p < 1, f"rollout.min_p must lie in [0, 1), got {self.min_p}")
        _require(all(self.stop_strings), "rollout.stop_strings holds an empty string")

    def biases_ratios(self) -> bool:
        """Whether truncated sampling makes the sampler's distribution differ from the policy's."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


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
        _require(
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
            _require(value >= 1, f"grpo.{name} must be at least 1, got {value}")
        _require(self.clip_eps_low >= 0, "grpo.clip_eps_low must be >= 0")
        _require(
            self.clip_eps_high is None or self.clip_eps_high > 0, "grpo.clip_eps_high must be > 0"
        )
        _require(
            self.loss != "cispo" or self.clip_eps_high is not None,
            "grpo.loss=cispo needs grpo.clip_eps_high: it caps the ratio itself, 5.0 for example",
        )
        _require(
            self.scale_rewards == "group"
            or self.multi_objective_aggregation == "sum_then_normalize",
            f"grpo.scale_rewards={self.scale_rewards} has no effect with "
            "grpo.multi_objective_aggregation=normalize_then_sum, which scales by group and then "
            "by batch; leave it at group",
        )
        _require(self.delta is None or self.delta > 0, "grpo.delta must be positive")
        _require(
            math.isfinite(self.kl_coef) and self.kl_coef >= 0,
            f"grpo.kl_coef must be a number >= 0, got {self.kl_coef}",
        )
        _require(self.importance_cap > 0, "grpo.importance_cap must be positive")
        _require(
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
        _require(
            math.isfinite(self.learning_rate) and self.learning_rate >= 0,
            f"optim.learning_rate must be a number >= 0, got {self.learning_rate}",
        )
        _require(self.warmup_steps >= 0, "optim.warmup_steps must be >= 0")
        _require(0 <= self.b1 < 1 and 0 <= self.b2 < 1, "optim.b1 and optim.b2 must lie in [0, 1)")
        _require(math.isfinite(self.eps) and self.eps > 0, "optim.eps must be a positive number")
        _require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "optim.weight_decay must be a number >= 0",
        )
        _require(self.max_grad_norm >= 0, "optim.max_grad_norm must be >= 0 (0 = off)")


@dataclass(frozen=True)
class EvalConfig:
    """Held-out accuracy."""

    reward: str = "gsm8k_answer"
    """The reward, by name or as `module:function`, that says which completions are right: those
    that it gives 1 or more."""
    every_steps: int = 0
    """Also evaluate every so many steps; 0: before the first and after the last step only."""
    problems: int | None = None
    """How many problems of the split, from its start; default: all of it."""
    batch_prompts: int = 64
    samples: int = 1
    """Completions per problem: 1 gives accuracy, k > 1 gives pass@1 and pass@k."""
    temperature: float = 0.0
    """0 means greedy, and then `samples` must be 1."""
    also_greedy: bool = False
    """Beside the sampled completions, also one greedy completion of every problem."""
    max_completion_tokens: int | None = None
    """Default: rollout.max_completion_tokens."""
    before_training: bool = True
    after_training: bool = True

    def __post_init__(self) -> None:
        _require(bool(self.reward), "eval.reward is empty; name a reward, e.g. gsm8k_answer")
        _require(self.every_steps >= 0, "eval.every_steps must be >= 0")
        _require(self.problems is None or self.problems >= 1, "eval.problems must be at least 1")
        _require(self.batch_prompts >= 1, "eval.batch_prompts must be at least 1")
        _require(self.samples >= 1, "eval.samples must be at least 1")
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"eval.temperature must be a number >= 0, got {self.temperature}",
        )
        _require(
            self.max_completion_tokens is None or self.max_completion_tokens >= 1,
            f"eval.max_completion_tokens must be at least 1, got {self.max_completion_tokens}",
        )
        _require(
            self.temperature > 0 or self.samples == 1,
            f"eval.samples={self.samples} needs eval.temperature > 0: greedy completions of one "
            "prompt are all the same",
        )
        _require(
            self.temperature > 0 or not self.also_greedy,
            "eval.also_greedy is for eval.temperature > 0: at 0 every completion is greedy",
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1 for "the rest"."""

    data: int = -1
    fsdp: int = 1
    model: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.model)
        _require(
            all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh sizes must be positive, at most one of them -1, got {sizes}",
        )


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
        _require(bool(self.run_dir), "run_dir is empty")
        _require(0 <= self.seed < 2**31, f"seed must lie in [0, 2^31), got {self.seed}")
        for name in ("steps", "checkpoint_every_steps", "keep_checkpoints"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, got {value}")
        _require(self.log_completions_every_steps >= 0, "log_completions_every_steps must be >= 0")
        _require(
            math.isfinite(self.reward_timeout_s) and self.reward_timeout_s >= 0,
            f"reward_timeout_s must be a number >= 0 (0 = off), got {self.reward_timeout_s}",
        )
        _require(bool(self.rewards), "rewards is empty: name at least one, e.g. gsm8k_answer: 1.0")
        for name, weight in self.rewards.items():
            _require(math.isfinite(weight), f"rewards.{name} must be a finite weight")
        _require(
            self.rollout.temperature > 0,
            "rollout.temperature must be > 0 in training: greedy groups have no spread",
        )

    @property
    def eval_max_completion_tokens(self) -> int:
        return self.eval.max_completion_tokens or self.rollout.max_completion_tokens


def check_choice(value: str, choices: Sequence[str], where: str) -> None:
    """Raises ConfigError naming the nearest of `choices` unless `value` is one of them."""
    if value not in choices:
        raise ConfigError(f"{where}: unknown name '{value}'; {suggestion(value, choices)}")


def suggestion(value: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else "valid: " + ", ".join(choices)
