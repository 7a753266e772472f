"""What is asked of the model, how it answers, and how answers are evaluated."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from jaxgrpo.config.errors import require
from jaxgrpo.config.model import EMBEDDED

DEV_SPLIT = "dev"
"""The `data.eval_split` that is held out of the training split."""


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
            require(getattr(self, name) >= 1, f"data.{name} must be at least 1")
        require(self.dev_problems >= 0, "data.dev_problems must be >= 0")
        require(
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
        require(self.max_completion_tokens >= 1, "rollout.max_completion_tokens must be >= 1")
        require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"rollout.temperature must be a number >= 0, got {self.temperature}",
        )
        require(self.top_k >= 0, f"rollout.top_k must be >= 0 (0 = off), got {self.top_k}")
        require(0 < self.top_p <= 1, f"rollout.top_p must lie in (0, 1], got {self.top_p}")
        require(0 <= self.min_p < 1, f"rollout.min_p must lie in [0, 1), got {self.min_p}")
        require(all(self.stop_strings), "rollout.stop_strings holds an empty string")

    def biases_ratios(self) -> bool:
        """Whether truncated sampling makes the sampler's distribution differ from the policy's."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


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
        require(bool(self.reward), "eval.reward is empty; name a reward, e.g. gsm8k_answer")
        require(self.every_steps >= 0, "eval.every_steps must be >= 0")
        require(self.problems is None or self.problems >= 1, "eval.problems must be at least 1")
        require(self.batch_prompts >= 1, "eval.batch_prompts must be at least 1")
        require(self.samples >= 1, "eval.samples must be at least 1")
        require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"eval.temperature must be a number >= 0, got {self.temperature}",
        )
        require(
            self.max_completion_tokens is None or self.max_completion_tokens >= 1,
            f"eval.max_completion_tokens must be at least 1, got {self.max_completion_tokens}",
        )
        require(
            self.temperature > 0 or self.samples == 1,
            f"eval.samples={self.samples} needs eval.temperature > 0: greedy completions of one "
            "prompt are all the same",
        )
        require(
            self.temperature > 0 or not self.also_greedy,
            "eval.also_greedy is for eval.temperature > 0: at 0 every completion is greedy",
        )
