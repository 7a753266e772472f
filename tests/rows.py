"""Rows as the plain model takes them, what it gives for them, and the same rows packed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrpo.model.api import QwenConfig, head_table, hidden_states
from jaxgrpo.model.head import token_logprobs
from jaxgrpo.model.pack_rows import pack_rows
from jaxgrpo.tasks.data import train_rows
from jaxgrpo.types import Adapters, PromptBatch, TrainBatch, Tree


@dataclasses.dataclass(frozen=True)
class Rows:
    """Completions [B, C] (0 beyond their lengths) of P prompts, `group_size` each."""

    prompts: PromptBatch
    completions: np.ndarray
    lengths: np.ndarray
    group_size: int

    @property
    def mask(self) -> np.ndarray:
        """float32 [B, C], 1 on the completions' tokens."""
        width = self.completions.shape[1]
        return (np.arange(width) < self.lengths[:, None]).astype(np.float32)

    @property
    def whole(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [B, T] without gaps, prompt lengths [B], completions [B, C]."""
        tokens, starts = train_rows(self.prompts, self.completions, self.lengths, self.group_size)
        return tokens, starts, self.completions


def make_rows(prompts: list, completions: Any, lengths: Any, group_size: int, slots: int) -> Rows:
    """Prompts of any lengths, left-padded to `slots`."""
    tokens, mask = np.zeros((2, len(prompts), slots), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, slots - len(prompt) :] = prompt
        mask[row, slots - len(prompt) :] = 1
    nothing = [""] * len(prompts)
    batch = PromptBatch(tokens, mask > 0, nothing, nothing, list(range(len(prompts))))
    lengths = np.asarray(lengths, np.int32)
    completions = np.asarray(completions, np.int32)
    inside = np.arange(completions.shape[1]) < lengths[:, None]
    return Rows(batch, completions * inside, lengths, group_size)


def random_rows(
    rng: np.random.Generator, vocab: int, prompts: int, group_size: int, slots: int, width: int
) -> Rows:
    """Uniform lengths from 1 to `slots` and `width`."""
    asked = [rng.integers(0, vocab, rng.integers(1, slots + 1)) for _ in range(prompts)]
    lengths = rng.integers(1, width + 1, prompts * group_size)
    completions = rng.integers(0, vocab, (prompts * group_size, width))
    return make_rows(asked, completions, lengths, group_size, slots)


def train_batch(
    rows: Rows,
    *,
    micro_batches: int = 1,
    shards: int = 1,
    platform: str = "cpu",
    trained: Any = None,
    **by_row: Any,
) -> TrainBatch:
    """The rows packed by `pack_rows`, on the host; of one shard they keep their order.

    Args:
        by_row: the batch's other arrays: advantages, and if they are not the rows' mask and 0,
            loss_mask and sampler_logprobs.
    """
    trained = np.ones(len(rows.lengths), bool) if trained is None else np.asarray(trained)
    order, packing = pack_rows(
        rows.prompts, rows.completions, rows.lengths, trained,
        micro_batches=micro_batches, shards=shards, platform=platform,
    )  # fmt: skip
    given = {"loss_mask": rows.mask, "sampler_logprobs": np.zeros_like(rows.mask)} | by_row
    arrays = {name: np.asarray(values)[order] for name, values in given.items()}
    return TrainBatch(**arrays, trained=trained[order], packing=packing)  # type: ignore[arg-type]


def random_batch(rows: Rows, **options: Any) -> TrainBatch:
    """`train_batch` of random advantages and sampler log-probs, unless `options` say other ones."""
    rng = np.random.default_rng(1)
    given = {
        "advantages": rng.normal(size=len(rows.lengths)).astype(np.float32),
        "sampler_logprobs": -rng.exponential(3.0, rows.mask.shape).astype(np.float32) * rows.mask,
    }
    return train_batch(rows, **(given | options))


def on_device(batch: TrainBatch) -> TrainBatch:
    return jax.tree.map(jnp.asarray, batch)


def completion_logprobs(
    config: QwenConfig,
    base: Tree,
    adapters: Adapters | None,
    tokens: Any,
    prompt_lengths: Any,
    completions: Any,
    temperature: float,
    chunk_tokens: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies [B, C] from whole rows [B, T], each with its prompt: the reference
    for what is packed. Off a row's completion they mean nothing and are finite."""
    tokens, completions = jnp.asarray(tokens), jnp.asarray(completions)
    hidden = hidden_states(config, base, adapters, tokens)
    # The hidden state before a token predicts it.
    index = jnp.asarray(prompt_lengths)[:, None] - 1 + jnp.arange(completions.shape[1])[None, :]
    index = jnp.minimum(index, tokens.shape[1] - 1)
    hidden = jnp.take_along_axis(hidden, index[:, :, None], axis=1)
    table = head_table(config, base)
    return token_logprobs(table, hidden, completions, temperature, chunk_tokens, config.device)  # type: ignore[return-value]
