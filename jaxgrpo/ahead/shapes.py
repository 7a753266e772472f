"""The sizes of a run's largest step: prompts as long as `data` allows, completions to the cap."""

from __future__ import annotations

from typing import NamedTuple

from jaxgrpo.config import Config
from jaxgrpo.model.pack_rows import bin_capacity
from jaxgrpo.model.presets import Qwen2Config
from jaxgrpo.model.remat import resolve_remat


class MicroBatch(NamedTuple):
    """What each device computes of a micro-batch.

    Attributes:
        rows: completions.
        tokens: of all rows, a prompt once a group if whole groups are packed.
        scored: completion tokens, of which log-probs are taken.
        packed: whether they are.
    """

    rows: int
    tokens: int
    scored: int
    packed: bool


def row_slots(config: Config) -> tuple[int, int]:
    """Slots of a row: of the longest prompt, padded, and of a completion."""
    prompt = config.data.padded(config.data.max_prompt_tokens)
    return prompt, config.rollout.max_completion_tokens


def micro_batch(config: Config, shards: int) -> MicroBatch:
    """Of a batch that a mesh splits into so many parts; rounded up where it does not divide."""
    grpo, (prompt, width) = config.grpo, row_slots(config)
    bins = grpo.micro_batches * shards
    rows = -(-grpo.rows_per_step // bins)
    if grpo.prompts_per_step % bins:
        return MicroBatch(rows, rows * (prompt + width), rows * width, False)
    tokens, scored = bin_capacity(grpo.prompts_per_step // bins, grpo.group_size, prompt, width)
    return MicroBatch(rows, tokens, scored, True)


def remat_of_run(config: Config, model: Qwen2Config) -> str:
    """What model.remat comes to in the largest step, on `model.device`."""
    batch = micro_batch(config, model.device.batch_shards)
    return resolve_remat(
        model,
        config.model.remat,
        tokens=batch.tokens,
        attended=batch.rows * sum(row_slots(config)) if batch.packed else 0,
        chunk_tokens=config.grpo.logprob_chunk_tokens,
    )
