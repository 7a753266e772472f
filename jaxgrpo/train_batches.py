"""From completions on the host to what the train step takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgrpo.config import GrpoConfig, Objective
from jaxgrpo.mesh import batch_shards, replicate, shard_rows
from jaxgrpo.model.pack_rows import pack_rows
from jaxgrpo.programs import Programs
from jaxgrpo.session import Session
from jaxgrpo.tasks.texts import gold_completions
from jaxgrpo.types import FINISH_LENGTH, Adapters, PromptBatch, Rollout, TrainBatch, Tree


def gold_rollout(session: Session, step: int) -> tuple[PromptBatch, Rollout]:
    """The prompts of a supervised step with their gold answers in a rollout's place."""
    config = session.config
    prompts = session.train_prompts.batch(config.seed, step, config.grpo.rows_per_step)
    rollout = gold_completions(
        session.tokenizer, prompts.answers, config.rollout.max_completion_tokens
    )
    return prompts, rollout


def make_train_batch(
    session: Session,
    programs: Programs,
    lora: Tree,
    prompts: PromptBatch,
    rollout: Rollout,
    advantages: np.ndarray,
) -> TrainBatch:
    """Rows on the devices, packed, with old and reference log-probs where the objective needs them.

    Packing may reorder the rows; nothing that follows depends on their order.
    """
    config = session.config
    batch = pack_batch(session.mesh, config.grpo, prompts, rollout, advantages, config.objective)
    return with_other_policies([session], [lora], programs, [batch])[0]


def with_other_policies(
    sessions: Sequence[Session],
    loras: Sequence[Tree],
    programs: Programs,
    batches: Sequence[TrainBatch],
) -> list[TrainBatch]:
    """Every arm's batch with the log-probs of the old policy and of the reference, where the
    objective needs them."""
    config, base = sessions[0].config, sessions[0].base
    found = list(batches)
    if config.objective == "sft":
        return found
    if config.grpo.num_iterations > 1:
        current = [of_arm.adapters(lora) for of_arm, lora in zip(sessions, loras, strict=True)]
        for i, old in enumerate(logprobs_of(base, current, programs, batches)):
            found[i] = dataclasses.replace(found[i], old_logprobs=old)
    if config.grpo.kl_coef > 0:
        start = [of_arm.reference for of_arm in sessions]
        for i, ref in enumerate(logprobs_of(base, start, programs, batches)):
            found[i] = dataclasses.replace(found[i], ref_logprobs=ref)
    return found


def logprobs_of(
    base: Tree,
    policies: Sequence[Adapters | None],
    programs: Programs,
    batches: Sequence[TrainBatch],
) -> list[jax.Array]:
    """What every arm's policy says of its batch."""
    if programs.arms == 1:
        return [programs.logprobs(base, policies[0], batches[0])]
    of_arms = None if policies[0] is None else programs.filled(policies)
    found = programs.logprobs(base, of_arms, programs.filled(batches))
    return list(found[: len(batches)])


def pack_batch(
    mesh: Mesh,
    grpo: GrpoConfig,
    prompts: PromptBatch,
    rollout: Rollout,
    advantages: np.ndarray,
    objective: Objective = "grpo",
    *,
    whole: bool = False,
) -> TrainBatch:
    """A rollout on the host as what the train step takes, split over the mesh; or, of an arm that
    one of its devices trains by itself (`Device.arm_shards`), for one and whole on all.

    A row whose advantage is 0, or whose tokens are all masked, adds exactly 0 to the gradient of
    the policy term: it is left out of the bins, unless a KL term looks at it too.
    """
    mask = np.asarray(rollout.mask, np.float32)
    if grpo.mask_truncated_completions:
        mask = mask * (np.asarray(rollout.finish_reasons) != FINISH_LENGTH)[:, None]
    trained = np.ones(len(advantages), bool)
    if objective == "grpo" and grpo.kl_coef == 0:
        trained = (np.asarray(advantages) != 0) & (mask.sum(axis=1) > 0)
    order, packing = pack_rows(
        prompts,
        np.asarray(rollout.tokens),
        np.asarray(rollout.lengths),
        trained,
        micro_batches=grpo.micro_batches,
        shards=1 if whole else batch_shards(mesh),
        platform=mesh.devices.flat[0].platform,
    )
    rows: dict[str, Any] = {
        "loss_mask": mask,
        "advantages": np.asarray(advantages, np.float32),
        "sampler_logprobs": rollout.logprobs,
        "trained": trained,
    }
    rows = {name: np.asarray(values)[order] for name, values in rows.items()}
    batch = TrainBatch(**rows, packing=packing)
    return replicate(mesh, batch) if whole else shard_batch(mesh, batch)


def shard_batch(mesh: Mesh, batch: TrainBatch) -> TrainBatch:
    """Host arrays -> the mesh: rows and bins split over its shards, their count on all."""
    bins = dataclasses.replace(batch.packing, count=None)  # type: ignore[arg-type]
    placed = shard_rows(mesh, dataclasses.replace(batch, packing=bins))
    count = replicate(mesh, batch.packing.count)
    return dataclasses.replace(placed, packing=dataclasses.replace(placed.packing, count=count))
