"""Problems -> prompts: a deterministic order, padding, rows for training.

Which problems a step sees follows from (seed, step) alone: epoch e is a permutation drawn from
(seed, e), and step k takes its next slice. Resuming therefore needs no iterator state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgrpo.config import Config, ConfigError, DataConfig
from jaxgrpo.records.run_directory import hash_inputs
from jaxgrpo.tasks.data_sets import Problem, answered_problems, load_problems
from jaxgrpo.tasks.texts import tokenize_prompts
from jaxgrpo.types import PromptBatch


class PromptSource:
    """The prompts of one split, tokenized once, in a deterministic order.

    Attributes:
        slots: how wide its batches are.
        dropped: how many problems were left out because their prompt is too long.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        tokenizer: Any,
        config: DataConfig,
        left_out: Sequence[str] = (),
    ) -> None:
        """Renders and tokenizes every question.

        Args:
            left_out: lines on problems that were left out before.
        """
        self._config = config
        self._left_out = left_out
        questions = [problem.question for problem in problems]
        texts, ids = tokenize_prompts(questions, tokenizer, config)
        kept = [i for i, tokens in enumerate(ids) if len(tokens) <= config.max_prompt_tokens]
        if not kept:
            shortest = min(len(tokens) for tokens in ids)
            raise ConfigError(
                f"every prompt is longer than data.max_prompt_tokens={config.max_prompt_tokens}; "
                f"the shortest has {shortest} tokens"
            )
        self.dropped = len(ids) - len(kept)
        self._problems = [problems[i] for i in kept]
        self._texts = [texts[i] for i in kept]
        self._tokens = [ids[i] for i in kept]
        # One width for all batches of the split, so that no later one needs another program.
        self.slots = config.padded(max(len(tokens) for tokens in self._tokens))

    def __len__(self) -> int:
        return len(self._problems)

    def sha256(self, count: int | None = None) -> str:
        """A hash of the first `count` prompts as the model sees them, and of their answers."""
        rows = zip(self._texts[:count], self._problems[:count], strict=True)
        return hash_inputs([(text, problem.answer) for text, problem in rows])

    @property
    def left_out(self) -> list[str]:
        """A line for each reason for which problems were left out."""
        if not self.dropped:
            return [*self._left_out]
        return [
            *self._left_out,
            f"{self.dropped} of {self.dropped + len(self)} prompts are longer than "
            f"data.max_prompt_tokens={self._config.max_prompt_tokens} and were left out",
        ]

    def batch(self, seed: int, step: int, count: int) -> PromptBatch:
        """The `count` prompts of `step`. A batch may span epochs; within one nothing repeats."""
        positions = np.arange(step * count, (step + 1) * count)
        epochs, places = np.divmod(positions, len(self))
        orders = {epoch: self._order(seed, int(epoch)) for epoch in np.unique(epochs)}
        return self._pad([int(orders[e][i]) for e, i in zip(epochs, places, strict=True)])

    def sequential(self, start: int, count: int, total: int) -> tuple[PromptBatch, int]:
        """Prompts start..start+count of the first `total`, for evaluation.

        The last batch is filled up with prompts from the front, so that every batch has one shape.

        Returns:
            The batch, and how many of its prompts count.
        """
        real = min(count, total - start)
        rows = [*range(start, start + real), *(i % total for i in range(count - real))]
        return self._pad(rows), real

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def _pad(self, rows: Sequence[int]) -> PromptBatch:
        slots = self.slots
        tokens = np.zeros((len(rows), slots), np.int32)
        mask = np.zeros((len(rows), slots), bool)
        for i, row in enumerate(rows):
            ids = self._tokens[row]
            tokens[i, slots - len(ids) :] = ids
            mask[i, slots - len(ids) :] = True
        return PromptBatch(
            tokens=tokens,
            mask=mask,
            texts=[self._texts[row] for row in rows],
            answers=[self._problems[row].answer for row in rows],
            indices=[self._problems[row].index for row in rows],
        )


def read_prompts(config: Config, tokenizer: Any) -> tuple[PromptSource, PromptSource]:
    """Of the training split and of the evaluation split, without what their rewards cannot judge.

    Raises:
        ConfigError: as `load_problems`, `answered_problems` and `PromptSource`, in this order.
    """
    judges = list(config.rewards) if config.objective == "grpo" else []
    train, test = (
        answered_problems(load_problems(config.data, split), split, names, config.data)
        for split, names in (
            (config.data.train_split, judges),
            (config.data.eval_split, [config.eval.reward]),
        )
    )
    return (
        PromptSource(train[0], tokenizer, config.data, train[1]),
        PromptSource(test[0], tokenizer, config.data, test[1]),
    )


def train_rows(
    prompts: PromptBatch, completion_tokens: Any, lengths: Any, group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [B, S + C] of prompt, completion and padding without gaps, and prompt lengths [B]."""
    rows, width = completion_tokens.shape
    slots = prompts.tokens.shape[1]
    tokens = np.zeros((rows, slots + width), np.int32)
    prompt_lengths = np.repeat(prompts.mask.sum(axis=1), group_size).astype(np.int32)
    for row in range(rows):
        start, length = int(prompt_lengths[row]), int(lengths[row])
        tokens[row, :start] = prompts.tokens[row // group_size, slots - start :]
        tokens[row, start : start + length] = completion_tokens[row, :length]
    return tokens, prompt_lengths
