"""The nouns of the data flow, and the one dimension legend.

P prompts, G group size, B = P*G rows (row p*G+g is completion g of prompt p), T tokens of a row
(prompt and completion), S prompt slots, C completion slots, D embed, F mlp, N query heads,
K key/value heads, H head dim, V vocab, L layers, R max rank, M micro-batches. Of a packing:
W batch shards, Z bins, N places of a bin, R rows of a bin.

Padding, said once: in a PromptBatch prompts are LEFT-padded to S; completions are RIGHT-padded to
C; for attention in training each row is prompt, completion, padding without gaps, so that causality
alone keeps padding from being seen and positions are 0..T-1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Tree = dict
"""A pytree of nested dicts with arrays as leaves."""

FINISH_LENGTH, FINISH_STOP_TOKEN, FINISH_STOP_STRING = 0, 1, 2
FINISH_REASONS = ("length", "stop_token", "stop_string")

_pytree = jax.tree_util.register_dataclass


def stack_arms(arms: tuple) -> tuple:
    """Trees in tuples, one for each arm -> trees with a leading axis; None stays None."""
    return tuple(
        None if of_arms is None else jax.tree.map(lambda *x: jnp.stack(x), *of_arms)
        for of_arms in arms
    )


def unstack_arms(stacked: Any, arms: int) -> tuple:
    """The inverse, of one tree."""
    return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(arms))


def unstack_layers(stacked: Any, layers: int, axis: int = 0) -> tuple:
    """A tree of arrays that hold so many layers along `axis` -> a tree for each layer.

    Each array's parts are taken under a jit of their own, so that arrays of one shape are traced,
    differentiated and lowered once: one by one, hundreds of parts take a second of a start.
    """
    leaves, form = jax.tree.flatten(stacked)
    parts = [_unstack(leaf, layers, axis) for leaf in leaves]
    return tuple(form.unflatten([of_leaf[i] for of_leaf in parts]) for i in range(layers))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _unstack(x: jax.Array, count: int, axis: int) -> list[jax.Array]:
    return [jax.lax.index_in_dim(x, i, axis, keepdims=False) for i in range(count)]


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
class Adapters:
    """The adapters of a policy under their plan; None in their place is the base model.

    Attributes:
        lora: module -> {"a": [L, in, R], "b": [L, R, out]}, float32.
        plan: of the same modules.
        joined: what `model.api.join_adapters` made of them and the frozen weights, if it did.
    """

    lora: Tree
    plan: LoraPlan
    joined: Tree | tuple[Tree, ...] | None = None


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
    """Rows laid out for computing without padding (see `model/pack_rows.py`).

    Each of W batch shards has Z bins of N places, of which the compiled step runs the first
    `count`: one program whatever lengths come. A bin holds up to R whole rows. Rows of one group
    share the tokens of its prompt but the last; a row's own places begin with that last one, so
    that each of them predicts one token of the completion, and its last token is never fed.

    Attributes:
        count: bins in use, the same for all shards.
        tokens, positions: of each place, the position within its row; 0 where it is padding.
        targets: the token that comes next; means something on own places only.
        row: the bin's row that a place belongs to, the first of those that share it; -1: padding.
        shared: the place belongs to a prompt; then it is among the first `shared_places`.
        member: which of the shard's rows each row is; -1: none.
        prompt, prompt_tokens: where a row's shared places begin, and how many there are.
        first, length: where its own places begin, and how many there are.
        sharers: rows that share this row's prompt places, if it is the first of them; else 0.
        row_places: T, the longest that a row with its prompt can be.
        shared_places: no later place of a bin is shared.
        group_size: no more rows share a prompt.
    """

    count: Int[Array, ""]
    tokens: Int[Array, "W Z N"]
    positions: Int[Array, "W Z N"]
    targets: Int[Array, "W Z N"]
    row: Int[Array, "W Z N"]
    shared: Bool[Array, "W Z N"]
    member: Int[Array, "W Z R"]
    prompt: Int[Array, "W Z R"]
    prompt_tokens: Int[Array, "W Z R"]
    first: Int[Array, "W Z R"]
    length: Int[Array, "W Z R"]
    sharers: Int[Array, "W Z R"]
    row_places: int = field(metadata={"static": True})
    shared_places: int = field(metadata={"static": True})
    group_size: int = field(metadata={"static": True})


@_pytree
@dataclass(frozen=True)
class TrainBatch:
    """What one optimizer step sees.

    Attributes:
        loss_mask: completion mask after filters (truncated rows may be taken out).
        advantages: one per row.
        sampler_logprobs: from the rollout, 0 off the completion.
        trained: rows that are computed; what the others add to the gradient is exactly 0.
        packing: the tokens of the rows that are computed.
        old_logprobs: the trainer's at the time of sampling; None: this update is the first after
            sampling, so the current log-probs (gradient stopped) serve.
        ref_logprobs: of what training starts from; None when kl_coef is 0.
    """

    loss_mask: Float[Array, "B C"]
    advantages: Float[Array, " B"]
    sampler_logprobs: Float[Array, "B C"]
    trained: Bool[Array, " B"]
    packing: Packing
    old_logprobs: Float[Array, "B C"] | None = None
    ref_logprobs: Float[Array, "B C"] | None = None


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
    """Asserts that a training batch's arrays share B and C, and its packing's W, Z, N and R."""
    rows, width = batch.loss_mask.shape
    assert batch.sampler_logprobs.shape == (rows, width), batch.sampler_logprobs.shape
    assert batch.advantages.shape == batch.trained.shape == (rows,)
    for optional in (batch.old_logprobs, batch.ref_logprobs):
        assert optional is None or optional.shape == (rows, width), optional.shape
    packing = batch.packing
    assert rows % packing.tokens.shape[0] == 0, (rows, packing.tokens.shape)
    for places in (packing.positions, packing.targets, packing.row, packing.shared):
        assert places.shape == packing.tokens.shape, (places.shape, packing.tokens.shape)
    for per_row in (packing.prompt, packing.prompt_tokens, packing.first, packing.length):
        assert per_row.shape == packing.member.shape, (per_row.shape, packing.member.shape)
