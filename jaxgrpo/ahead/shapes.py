"""The sizes of a run's largest step: prompts as long as `data` allows, completions to the cap."""

from __future__ import annotations

import dataclasses

from jaxgrpo.config import Config
from jaxgrpo.devices import Device
from jaxgrpo.model.pack_rows import BinShape, bin_shape
from jaxgrpo.model.presets import QwenConfig
from jaxgrpo.model.remat import resolve_remat


def row_slots(config: Config) -> tuple[int, int]:
    """Slots of a row: of the longest prompt, padded, and of a completion."""
    prompt = config.data.padded(config.data.max_prompt_tokens)
    return prompt, config.rollout.max_completion_tokens


def full_bins(config: Config, device: Device) -> BinShape:
    """The bins that each batch shard of a mesh of such devices computes, one after another; those
    of one of several arms on `Device.of_arms`."""
    grpo, (prompt, width) = config.grpo, row_slots(config)
    prompts, group = (
        (grpo.rows_per_step, 1)
        if config.objective == "sft"
        else (grpo.prompts_per_step, grpo.group_size)
    )
    shape = bin_shape(
        prompts // device.batch_shards,
        group,
        prompt,
        width,
        grpo.micro_batches,
        device.platform,
    )
    return dataclasses.replace(shape, bins=min(shape.bins, grpo.micro_batches))


def remat_of_run(config: Config, model: QwenConfig, arms: int = 1) -> str:
    """What model.remat comes to in the largest step of a run, or of each of so many arms, on
    `model.device`."""
    model = model.of_arms(arms)
    shape = full_bins(config, model.device)
    return resolve_remat(
        model.of_rows,
        config.model.remat,
        tokens=shape.places,
        attended=shape.rows * shape.row_places,
        chunk_tokens=config.grpo.logprob_chunk_tokens,
    )
