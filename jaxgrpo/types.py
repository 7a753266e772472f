"""The nouns of the data flow, and the one dimension legend.

P prompts, G group size, B = P*G rows (row p*G+g is completion g of prompt p), T tokens of a row
(prompt and completion), S prompt slots, C completion slots, D embed, F mlp, N query heads,
K key/value heads, H head dim, V vocab, L layers, R max rank, M micro-batches.

Padding, said once: in a PromptBatch prompts are LEFT-padded to S; completions are RIGHT-padded to
C; in a TrainBatch each row is prompt, completion, padding without gaps, so that causal attention
alone keeps padding from being seen and positions are 0..T-1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Tree = dict
"""A pytree of nested dicts with arrays as leaves."""

FINISH_LENGTH, FINISH_STOP_TOKEN, FINISH_STOP_STRING = 0, 1, 2
FINISH_REASONS = ("length", "stop_token", "stop_string")

_pytree = jax.tree_util.register_dataclass


@dataclass(frozen=True)
class PromptBatch:
    """P prompts as host arrays, with what the rewards need.

    Attributes:
        tokens: int32 [P, S], left-padded.
        mask: bool [P, S], True on prompt tokens.
        texts: the rendered prompts.
        answers: the gold answers.
        indices: each problem's row in its data set.
    """

    tokens: np.ndarray
    mask: np.ndarray
    texts: list[str]
    answers: list[str]
    indices: list[int]

    def part(self, which: slice) -> PromptBatch:
        """Some of the prompts."""
        return PromptBatch(
            self.tokens[which],
            self.mask[which],
            self.texts[which],
            self.answers[which],
            self.indices[which],
        )


@_pytree
@dataclass(frozen=True)
class LoraPlan:
    """A RankPlan on the device: arguments of the compiled step, so a new plan never recompiles.

    Attributes:
        masks: module -> [L, R], 1 on ranks in use.
        scales: module -> [L].
    """

    masks: dict[str, Float[Array, "L R"]]
    scales: dict[str, Float[Array, " L"]]


@_pytree
@dataclass(frozen=True)
class Rollout:
    """B = P*G completions.

    Attributes:
        tokens: right-padded; includes the stop token.
        mask: True on tokens the policy sampled, the stop token included (`completion_mask`).
        logprobs: the sampler's log-probs, float32, under the sampling temperature over the whole
            vocabulary; 0 off the mask.
        lengths: sampled tokens per row.
        finish_reasons: index into FINISH_REASONS.
    """

    tokens: Int[Array, "B C"]
    mask: Bool[Array, "B C"]
    logprobs: Float[Array, "B C"]
    lengths: Int[Array, " B"]
    finish_reasons: Int[Array, " B"]


@_pytree
@dataclass(frozen=True)
class Packing:
    """The same rows without padding and with each group's prompt once (see `model/pack_rows.py`).

    Z bins of N tokens, one per micro-batch and batch shard; n completion tokens of a bin are
    scored. A map holds flat places within the bin, in its rows [B/Z, T] or [B/Z, C]; -1: none.

    Attributes:
        tokens, positions: of each place of a bin; 0 where it is padding.
        shared: the token belongs to a prompt, whose group uses it.
        source: bin -> the token in the row that owns it (the group's first row for prompts).
        rows: row -> bin; 0 off the row.
        owned: row -> bin, where this row owns the token.
        scored: scored token -> the token before it, in its row.
        targets: the scored tokens.
        predicts: row -> the scored token that comes next.
        place: scored token -> its place among the completions.
        slot: completion -> scored token.
        group_size: rows that share a prompt.
    """

    tokens: Int[Array, "Z N"]
    positions: Int[Array, "Z N"]
    shared: Bool[Array, "Z N"]
    source: Int[Array, "Z N"]
    rows: Int[Array, "B T"]
    owned: Int[Array, "B T"]
    scored: Int[Array, "Z n"]
    targets: Int[Array, "Z n"]
    predicts: Int[Array, "B T"]
    place: Int[Array, "Z n"]
    slot: Int[Array, "B C"]
    group_size: int = field(metadata={"static": True})


@_pytree
@dataclass(frozen=True)
class TrainBatch:
    """What one optimizer step sees.

    Attributes:
        tokens: each row prompt + completion, right-padded, without gaps.
        prompt_lengths: where each row's completion begins.
        completion_tokens: the same completion tokens, right-padded.
        loss_mask: completion mask after filters (truncated rows may be taken out).
        advantages: one per row.
        sampler_logprobs: from the rollout, 0 off the completion.
        old_logprobs: the trainer's at the time of sampling; None: this update is the first after
            sampling, so the current log-probs (gradient stopped) serve.
        ref_logprobs: of the base model; None when kl_coef is 0.
        packing: the same tokens for computing; None: compute on whole rows, padding and all.
    """

    tokens: Int[Array, "B T"]
    prompt_lengths: Int[Array, " B"]
    completion_tokens: Int[Array, "B C"]
    loss_mask: Float[Array, "B C"]
    advantages: Float[Array, " B"]
    sampler_logprobs: Float[Array, "B C"]
    old_logprobs: Float[Array, "B C"] | None = None
    ref_logprobs: Float[Array, "B C"] | None = None
    packing: Packing | None = None


@_pytree
@dataclass(frozen=True)
class TrainState:
    """What training changes.

    Attributes:
        lora: module -> {"a": [L, in, R], "b": [L, R, out]}, float32.
        opt_state: optax's.
        step: optimizer updates applied.
        skipped: updates skipped because a gradient or the loss was not finite.
        sensitivity: None, or AdaLoRA's running statistics of every adapter entry (see
            grpo/sensitivity.py): {"mean", "uncertainty"}, each like `lora` with {"e": [L, R]}.
    """

    lora: Tree
    opt_state: Any
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    sensitivity: Tree | None = None


@_pytree
@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step reports.

    Attributes:
        scalars: metric name -> float32 scalar.
        layer_grad_norms: view ("l2", "rms", "rank_free") -> module -> "a" | "b" -> [L], and if
            asked for "weight" -> module -> "w" -> [L]; of the gradient before clipping (see
            grpo/layer_grad_norms.py).
    """

    scalars: dict[str, Float[Array, ""]]
    layer_grad_norms: dict[str, dict[str, dict[str, Float[Array, " L"]]]]


def check_rollout(rollout: Rollout) -> None:
    """Asserts that a rollout's arrays share B and C."""
    shape = rollout.tokens.shape
    assert rollout.mask.shape == rollout.logprobs.shape == shape, (
        rollout.mask.shape,
        rollout.logprobs.shape,
        shape,
    )
    assert rollout.lengths.shape == rollout.finish_reasons.shape == shape[:1]


def check_train_batch(batch: TrainBatch) -> None:
    """Asserts that a training batch's arrays share B, T and C."""
    rows, width = batch.completion_tokens.shape
    assert batch.tokens.shape[0] == rows and batch.tokens.shape[1] >= width
    assert batch.loss_mask.shape == batch.sampler_logprobs.shape == (rows, width)
    assert batch.prompt_lengths.shape == batch.advantages.shape == (rows,)
    for optional in (batch.old_logprobs, batch.ref_logprobs):
        assert optional is None or optional.shape == (rows, width), optional.shape
