"""One iteration: prompts, rollout, rewards, advantages, optimizer updates, and their metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrpo.evaluate import score_completions
from jaxgrpo.grpo.advantages import compared_rewards, compute_advantages, reward_metrics
from jaxgrpo.grpo.optimizer import Schedule
from jaxgrpo.mesh import Purpose, fold_key, shard_rows, to_host
from jaxgrpo.processes import gather_parts, own_part
from jaxgrpo.programs import Programs
from jaxgrpo.session import Session
from jaxgrpo.step_records import (
    Clock,
    StepResult,
    completion_records,
    mean_report,
    step_metrics,
)
from jaxgrpo.tasks.texts import completion_texts
from jaxgrpo.train_batches import gold_rollout, pack_batch, with_other_policies
from jaxgrpo.types import (
    PromptBatch,
    Rollout,
    StepMetrics,
    TrainBatch,
    TrainState,
    Tree,
    check_rollout,
)

Watch = Callable[[str], None]
"""Called with the name of a phase of a step, `rollout`, `reward` or `train`, when it begins."""


@dataclass(frozen=True)
class ArmStep:
    """A step that one arm is about to take.

    Attributes:
        state: is used up, unless the step fails.
        step: from 0; it decides the prompts and the noise.
    """

    session: Session
    state: TrainState
    step: int
    watch: Watch = lambda phase: None


Outcome = tuple[TrainState, StepResult] | Exception
"""What a step of an arm comes to; an exception is the arm's own, and its state is as it was."""


def run_step(
    session: Session,
    programs: Programs,
    state: TrainState,
    step: int,
    watch: Watch = lambda phase: None,
) -> tuple[TrainState, StepResult]:
    """One batch and its optimizer updates."""
    (outcome,) = run_steps([ArmStep(session, state, step, watch)], programs)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def run_steps(arms: Sequence[ArmStep], programs: Programs) -> list[Outcome]:
    """One batch of every arm and its optimizer updates, together.

    Args:
        arms: at most `programs.arms`, of sessions that differ in seed, plan, scale rule and
            learning rate alone.
    """
    clock = Clock()
    watch_all(arms, "rollout")
    supervised = arms[0].session.config.objective == "sft"
    sampled = (
        [gold_rollout(arm.session, arm.step) for arm in arms]
        if supervised
        else sample_rollouts([(arm.session, arm.state.lora, arm.step) for arm in arms], programs)
    )
    clock.lap("rollout")
    judged: list[Judged | Exception]
    if supervised:
        judged = [Judged.gold(prompts, rollout) for prompts, rollout in sampled]
    else:
        watch_all(arms, "reward")
        judged = [judge(arm.session, *found) for arm, found in zip(arms, sampled, strict=True)]
        clock.lap("reward")
    watch_all(arms, "train")
    going = [
        (arm, found)
        for arm, found in zip(arms, judged, strict=True)
        if not isinstance(found, Exception)
    ]
    updated = iter(update(going, programs) if going else [])
    clock.lap("train")
    return [
        found if isinstance(found, Exception) else found.outcome(*next(updated), clock)
        for found in judged
    ]


def watch_all(arms: Sequence[ArmStep], phase: str) -> None:
    for arm in arms:
        arm.watch(phase)


@dataclass(frozen=True)
class Judged:
    """An arm's completions with what they are worth, on the host."""

    prompts: PromptBatch
    rollout: Rollout
    advantages: np.ndarray
    metrics: dict[str, float]
    completions: list[dict]

    @classmethod
    def gold(cls, prompts: PromptBatch, rollout: Rollout) -> Judged:
        """Of a supervised step: every answer counts the same."""
        return cls(prompts, rollout, np.ones(len(rollout.lengths), np.float32), {}, [])

    def outcome(
        self, state: TrainState, batch: TrainBatch, reports: list[StepMetrics], clock: Clock
    ) -> Outcome:
        """With what the updates gave."""
        scalars, norms = mean_report(reports)
        metrics = scalars | self.metrics | step_metrics(self.prompts, self.rollout, clock)
        return state, StepResult(metrics, norms, self.completions, batch)


def judge(session: Session, prompts: PromptBatch, rollout: Rollout) -> Judged | Exception:
    """Rewards and advantages; what a reward raised concerns this arm alone.

    Raises:
        Exception: what it raised, in a job of several processes: the others wait for its rewards.
    """
    config = session.config
    texts = completion_texts(session.tokenizer, rollout, config.rollout.stop_strings)
    try:
        rewards, by_function = score(session, prompts, texts, rollout)
    except Exception as error:
        if jax.process_count() > 1:
            raise
        return error
    weights, scale = list(config.rewards.values()), config.grpo.scale_rewards
    compared, group = compared_rewards(config.grpo, rewards, by_function, weights)
    advantages = compute_advantages(compared, group, scale)
    return Judged(
        prompts,
        rollout,
        advantages,
        reward_metrics(rewards, group, scale, by_function, compared),
        completion_records(prompts, texts, rollout, rewards, by_function, advantages),
    )


def update(
    arms: Sequence[tuple[ArmStep, Judged]], programs: Programs
) -> list[tuple[TrainState, TrainBatch, list[StepMetrics]]]:
    """The optimizer updates of a step: new states, the batches, and reports on the host."""
    steps = [arm for arm, _ in arms]
    session = steps[0].session
    batches = [
        pack_batch(
            session.mesh,
            session.config.grpo,
            found.prompts,
            found.rollout,
            found.advantages,
            session.config.objective,
            whole=session.model_config.device.arm_shards(programs.arms) > 1,
        )
        for _, found in arms
    ]
    sessions, states = [arm.session for arm in steps], [arm.state for arm in steps]
    batches = with_other_policies(sessions, [x.lora for x in states], programs, batches)
    reports = []
    for _ in range(session.config.grpo.num_iterations):
        states, report = train_together(steps, programs, states, batches)
        reports.append(report)
    reports = to_host(reports)
    of_arms = [
        [
            report if programs.arms == 1 else jax.tree.map(lambda x, i=i: x[i], report)
            for report in reports
        ]
        for i in range(len(arms))
    ]
    return list(zip(states, batches, of_arms, strict=True))


def train_together(
    arms: Sequence[ArmStep],
    programs: Programs,
    states: Sequence[TrainState],
    batches: Sequence[TrainBatch],
) -> tuple[list[TrainState], StepMetrics]:
    """One update of every arm; of several the metrics have a leading axis."""
    session = arms[0].session
    plans = [arm.session.device_plan for arm in arms]
    schedules = [Schedule.of(arm.session.config) for arm in arms]
    if programs.arms == 1:
        state, report = programs.train_step(
            states[0], session.base, plans[0], batches[0], schedules[0]
        )
        return [state], report
    # Nobody is there: no bin runs, and a state of zeros is used up.
    free = programs.arms - len(arms)
    nothing = dataclasses.replace(
        batches[0].packing, count=jnp.zeros_like(batches[0].packing.count)
    )
    empty = dataclasses.replace(batches[0], packing=nothing)
    unused = [jax.tree.map(jnp.zeros_like, states[0]) for _ in range(free)]
    new_states, reports = programs.train_step(
        (*states, *unused),
        session.base,
        programs.filled(plans),
        (*batches, *[empty] * free),
        programs.filled(schedules),
    )
    return list(new_states[: len(arms)]), reports


def sample_rollout(
    session: Session, programs: Programs, lora: Tree, step: int
) -> tuple[PromptBatch, Rollout]:
    """The prompts of a step and the policy's completions, on the host."""
    return sample_rollouts([(session, lora, step)], programs)[0]


def sample_rollouts(
    arms: Sequence[tuple[Session, Tree, int]], programs: Programs
) -> list[tuple[PromptBatch, Rollout]]:
    """`sample_rollout` of several arms (session, adapters, step) together."""
    session, config = arms[0][0], arms[0][0].config
    found = [
        (
            arm.train_prompts.batch(arm.config.seed, step, config.grpo.prompts_per_step),
            arm.adapters(lora),
            fold_key(arm.config.seed, step, Purpose.ROLLOUT),
        )
        for arm, lora, step in arms
    ]
    rows, width = config.grpo.rows_per_step, config.rollout.max_completion_tokens
    if programs.arms == 1:
        (prompts, adapters, key), caps = found[0], ()
        tokens, mask = shard_rows(session.mesh, (prompts.tokens, prompts.mask))
    else:
        # Rows of arms that are not there end at once.
        slots = programs.filled(found)
        adapters = tuple(of_arm for _, of_arm, _ in slots)
        key = jnp.stack([of_arm for *_, of_arm in slots])
        limits = np.repeat(np.where(np.arange(programs.arms) < len(arms), width, 0), rows)
        tokens, mask, *caps = shard_rows(
            session.mesh,
            (
                np.concatenate([prompts.tokens for prompts, *_ in slots]),
                np.concatenate([prompts.mask for prompts, *_ in slots]),
                limits.astype(np.int32),
            ),
        )
    rollout = programs.generate(
        programs.decode_weights(session.base, adapters), tokens, mask, key, *caps
    )
    check_rollout(rollout)
    host = to_host(rollout)
    return [
        (prompts, jax.tree.map(lambda x, i=i: x[i * rows : (i + 1) * rows], host))
        for i, (prompts, *_) in enumerate(found)
    ]


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
