"""One iteration: prompts, rollout, rewards, advantages, optimizer updates, and their metrics."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxgrpo.config import GrpoConfig, Objective
from jaxgrpo.evaluate import score_completions
from jaxgrpo.grpo.advantages import compared_rewards, compute_advantages, reward_metrics
from jaxgrpo.grpo.optimizer import make_optimizer
from jaxgrpo.grpo.step import StepSettings, make_logprobs, make_train_step
from jaxgrpo.mesh import Purpose, batch_shards, fold_key, replicate, shard_rows, to_host
from jaxgrpo.model.api import make_decode_weights
from jaxgrpo.model.pack_rows import pack_rows
from jaxgrpo.processes import gather_parts, own_part
from jaxgrpo.session import Session
from jaxgrpo.tasks.texts import completion_texts, gold_completions
from jaxgrpo.types import (
    FINISH_LENGTH,
    FINISH_REASONS,
    PromptBatch,
    Rollout,
    StepMetrics,
    TrainBatch,
    TrainState,
    Tree,
    check_rollout,
)


@dataclass(frozen=True)
class Programs:
    """The compiled programs of a run; each takes the plan as an argument.

    Attributes:
        decode_weights: (base, adapters) -> the sampler's weights.
    """

    decode_weights: Callable[..., Tree]
    generate: Callable[..., Rollout]
    generate_eval: Callable[..., Rollout]
    generate_greedy: Callable[..., Rollout]
    logprobs: Callable[..., jax.Array]
    train_step: Callable[..., Any]
    optimizer: optax.GradientTransformation


@dataclass(frozen=True)
class StepResult:
    """What one step leaves on the host."""

    metrics: dict[str, float]
    layer_grad_norms: dict
    completions: list[dict]
    batch: TrainBatch


def make_programs(session: Session) -> Programs:
    config = session.config
    optimizer = make_optimizer(config.optim, config.steps * config.grpo.num_iterations)
    return Programs(
        decode_weights=functools.partial(make_decode_weights, session.model_config),
        generate=session.make_generate(evaluation=False),
        generate_eval=session.make_generate(evaluation=True),
        generate_greedy=session.make_generate(evaluation=True, greedy=True),
        logprobs=make_logprobs(
            session.model_config,
            config.rollout.temperature,
            config.grpo.logprob_chunk_tokens,
            "none",
        ),
        train_step=make_train_step(session.model_config, StepSettings.of(config), optimizer),
        optimizer=optimizer,
    )


Watch = Callable[[str], None]
"""Called with the name of a phase of a step, `rollout`, `reward` or `train`, when it begins."""


def run_step(
    session: Session,
    programs: Programs,
    state: TrainState,
    step: int,
    watch: Watch = lambda phase: None,
) -> tuple[TrainState, StepResult]:
    """One batch and its optimizer updates."""
    run = grpo_step if session.config.objective == "grpo" else sft_step
    return run(session, programs, state, step, watch)


def grpo_step(
    session: Session, programs: Programs, state: TrainState, step: int, watch: Watch
) -> tuple[TrainState, StepResult]:
    """One rollout and its optimizer updates."""
    config = session.config
    clock = Clock()
    watch("rollout")
    prompts, host = sample_rollout(session, programs, state.lora, step)
    clock.lap("rollout")
    watch("reward")
    texts = completion_texts(session.tokenizer, host, config.rollout.stop_strings)
    rewards, by_function = score(session, prompts, texts, host)
    weights, scale = list(config.rewards.values()), config.grpo.scale_rewards
    compared, group = compared_rewards(config.grpo, rewards, by_function, weights)
    advantages = compute_advantages(compared, group, scale)
    clock.lap("reward")
    watch("train")
    batch = make_train_batch(session, programs, state.lora, prompts, host, advantages)
    reports = []
    for _ in range(config.grpo.num_iterations):
        state, report = programs.train_step(state, session.base, session.device_plan, batch)
        reports.append(report)
    scalars, norms = mean_report(to_host(reports))
    clock.lap("train")
    metrics = scalars | reward_metrics(rewards, group, scale, by_function, compared)
    metrics |= step_metrics(prompts, host, clock)
    return state, StepResult(
        metrics,
        norms,
        completion_records(prompts, texts, host, rewards, by_function, advantages),
        batch,
    )


def sft_step(
    session: Session, programs: Programs, state: TrainState, step: int, watch: Watch
) -> tuple[TrainState, StepResult]:
    """One supervised update on gold answers: as many rows as a GRPO step has."""
    clock = Clock()
    prompts, gold = gold_rollout(session, step)
    clock.lap("rollout")
    watch("train")
    ones = np.ones(len(gold.lengths), np.float32)
    batch = make_train_batch(session, programs, state.lora, prompts, gold, ones)
    state, report = programs.train_step(state, session.base, session.device_plan, batch)
    scalars, norms = mean_report([to_host(report)])
    clock.lap("train")
    return state, StepResult(scalars | step_metrics(prompts, gold, clock), norms, [], batch)


def gold_rollout(session: Session, step: int) -> tuple[PromptBatch, Rollout]:
    """The prompts of a supervised step with their gold answers in a rollout's place."""
    config = session.config
    prompts = session.train_prompts.batch(config.seed, step, config.grpo.rows_per_step)
    rollout = gold_completions(
        session.tokenizer, prompts.answers, config.rollout.max_completion_tokens
    )
    return prompts, rollout


def sample_rollout(
    session: Session, programs: Programs, lora: Tree, step: int
) -> tuple[PromptBatch, Rollout]:
    """The prompts of a step and the policy's completions, on the host."""
    config = session.config
    prompts = session.train_prompts.batch(config.seed, step, config.grpo.prompts_per_step)
    weights = programs.decode_weights(session.base, session.adapters(lora))
    tokens, mask = shard_rows(session.mesh, (prompts.tokens, prompts.mask))
    key = fold_key(config.seed, step, Purpose.ROLLOUT)
    rollout = programs.generate(weights, tokens, mask, key)
    check_rollout(rollout)
    return prompts, to_host(rollout)


def step_metrics(prompts: PromptBatch, rollout: Rollout, clock: Clock) -> dict[str, float]:
    """Lengths, times and throughput of a step."""
    metrics = completion_metrics(rollout) | clock.metrics()
    group = len(rollout.lengths) // len(prompts.texts)
    sampled = int(rollout.lengths.sum())
    seen = int(prompts.mask.sum()) * group + sampled
    metrics["num_tokens"] = float(seen)
    metrics["throughput/rollout_tokens_per_s"] = sampled / max(clock.laps["rollout"], 1e-9)
    metrics["throughput/train_tokens_per_s"] = seen / max(clock.laps["train"], 1e-9)
    metrics["throughput/tokens_per_s"] = sampled / max(clock.total, 1e-9)
    return metrics


def mean_report(reports: list[StepMetrics]) -> tuple[dict[str, float], dict]:
    """Scalars and layer norms of a step, averaged over its inner iterations."""
    mean = jax.tree.map(lambda *values: np.mean(values, axis=0), *reports)
    scalars = {name: float(value) for name, value in mean.scalars.items()}
    # A running count, not a measurement of one update.
    scalars["grpo/skipped_updates"] = float(reports[-1].scalars["grpo/skipped_updates"])
    return scalars, mean.layer_grad_norms


def score(
    session: Session, prompts: PromptBatch, texts: list[str], rollout: Rollout
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The weighted reward of every row, and each function's own."""
    config = session.config
    group = config.grpo.group_size
    # Every process scores some of the groups, and all of them get all rewards.
    mine = own_part(len(prompts.texts))
    rows = slice(mine.start * group, mine.stop * group)
    total, by_function = score_completions(
        session.rewards,
        list(config.rewards.values()),
        prompts.part(mine),
        texts[rows],
        jax.tree.map(lambda x: x[rows], rollout),
        config.rollout.max_completion_tokens,
        config.reward_timeout_s,
    )
    table = np.full((1 + len(by_function), len(prompts.texts), group), np.nan)
    for row, values in zip(table, (total, *by_function.values()), strict=True):
        row[mine] = np.array([np.nan if v is None else v for v in values]).reshape(-1, group)
    found = gather_parts(table.transpose(0, 2, 1)).transpose(0, 2, 1).reshape(len(table), -1)
    return found[0], dict(zip(by_function, found[1:], strict=True))


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
    if config.objective == "sft":
        return batch
    if config.grpo.num_iterations > 1:
        old = programs.logprobs(session.base, session.adapters(lora), batch)
        batch = dataclasses.replace(batch, old_logprobs=old)
    if config.grpo.kl_coef > 0:
        ref = programs.logprobs(session.base, session.reference, batch)
        batch = dataclasses.replace(batch, ref_logprobs=ref)
    return batch


def pack_batch(
    mesh: Mesh,
    grpo: GrpoConfig,
    prompts: PromptBatch,
    rollout: Rollout,
    advantages: np.ndarray,
    objective: Objective = "grpo",
) -> TrainBatch:
    """A rollout on the host as what the train step takes.

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
        shards=batch_shards(mesh),
        platform=mesh.devices.flat[0].platform,
    )
    rows: dict[str, Any] = {
        "loss_mask": mask,
        "advantages": np.asarray(advantages, np.float32),
        "sampler_logprobs": rollout.logprobs,
        "trained": trained,
    }
    rows = {name: np.asarray(values)[order] for name, values in rows.items()}
    return shard_batch(mesh, TrainBatch(**rows, packing=packing))


def shard_batch(mesh: Mesh, batch: TrainBatch) -> TrainBatch:
    """Host arrays -> the mesh: rows and bins split over its shards, their count on all."""
    bins = dataclasses.replace(batch.packing, count=None)  # type: ignore[arg-type]
    placed = shard_rows(mesh, dataclasses.replace(batch, packing=bins))
    count = replicate(mesh, batch.packing.count)
    return dataclasses.replace(placed, packing=dataclasses.replace(placed.packing, count=count))


def completion_metrics(rollout: Rollout) -> dict[str, float]:
    """TRL's `completions/` metrics; `terminated` are those that ended by themselves."""
    lengths = np.asarray(rollout.lengths)
    ended = lengths[np.asarray(rollout.finish_reasons) != FINISH_LENGTH]
    metrics = {"completions/clipped_ratio": 1.0 - len(ended) / len(lengths)}
    for name, values in (("", lengths), ("terminated_", ended if len(ended) else np.zeros(1))):
        for statistic in ("mean", "min", "max"):
            metrics[f"completions/{statistic}_{name}length"] = float(getattr(values, statistic)())
    return metrics


def completion_records(
    prompts: PromptBatch,
    texts: list[str],
    rollout: Rollout,
    rewards: np.ndarray,
    by_function: dict[str, np.ndarray],
    advantages: np.ndarray,
) -> list[dict]:
    """One record per completion, for the table and for completions/ on disk."""
    group = len(texts) // len(prompts.texts)
    return [
        {
            "prompt": prompts.texts[row // group],
            "problem": prompts.indices[row // group],
            "completion": text,
            "answer": prompts.answers[row // group],
            "reward": float(rewards[row]),
            "rewards": {name: float(values[row]) for name, values in by_function.items()},
            "advantage": float(advantages[row]),
            "tokens": int(rollout.lengths[row]),
            "finish_reason": FINISH_REASONS[int(rollout.finish_reasons[row])],
        }
        for row, text in enumerate(texts)
    ]


class Clock:
    """Seconds per phase of a step."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return self._last - self._start

    def metrics(self) -> dict[str, float]:
        """Under `time/`, and the whole as TRL's `step_time`."""
        return {f"time/{name}_s": s for name, s in self.laps.items()} | {"step_time": self.total}
