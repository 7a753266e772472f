"""Held-out accuracy: greedy, or sampled with pass@k, over a whole split, with records on disk.

`eval/accuracy` is what `eval.reward` says: by default our GSM8K rule (`answers.extract_answer`,
exact rationals), and then lm-evaluation-harness' strict and flexible rules are separate metrics, so
that numbers compare with published ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from jaxgrpo.config import Config, ConfigError
from jaxgrpo.mesh import Purpose, fold_key, shard_rows, to_host
from jaxgrpo.records.progress import Stage
from jaxgrpo.records.run_directory import atomic_write_json, atomic_write_text, read_jsonl
from jaxgrpo.stats import wilson_interval
from jaxgrpo.tasks.answers import (
    extract_answer,
    gold_answer,
    match_lm_eval_flexible,
    match_lm_eval_strict,
)
from jaxgrpo.tasks.data import PromptSource
from jaxgrpo.tasks.rewards import RewardFunction, combine_rewards, gsm8k_answer_reward
from jaxgrpo.tasks.texts import completion_texts
from jaxgrpo.types import FINISH_LENGTH, FINISH_REASONS, PromptBatch, Rollout, Tree


class StoppedError(Exception):
    """The process was asked to stop during an evaluation."""


@dataclass(frozen=True)
class EvalResult:
    """One evaluation.

    Attributes:
        metrics: `eval/...` name -> value.
        records: one per problem, with its completions and verdicts.
        made_with: what it is a result of, from `evaluation_inputs`; None: it was not recorded.
    """

    metrics: dict[str, float]
    records: list[dict]
    made_with: dict[str, Any] | None = None

    def describe(self) -> str:
        """Accuracy with its 95 % interval, for a person."""
        m = self.metrics
        low, high = m["eval/accuracy_low"], m["eval/accuracy_high"]
        return (
            f"{m['eval/accuracy']:.1%}  (95 % interval {low:.1%} to {high:.1%}, "
            f"{len(self.records)} problems)"
        )


def evaluation_inputs(config: Config, prompts: PromptSource, policy: str) -> dict[str, Any]:
    """What an evaluation is a result of, as JSON: two of them compare if all but `policy` and
    `seed` are the same."""
    rollout, sampled = config.rollout, config.eval.temperature > 0
    found: dict[str, Any] = {
        "policy": policy,
        "model": {"path": config.model.path, "revision": config.model.revision},
        "data": {"path": config.data.path, "split": config.data.eval_split},
        "prompts": prompts.sha256(config.eval.problems),
        "reward": config.eval.reward,
        "decoding": {
            "temperature": config.eval.temperature,
            "samples": config.eval.samples,
            "max_completion_tokens": config.eval_max_completion_tokens,
            "stop_token_ids": list(rollout.stop_token_ids),
            "stop_strings": list(rollout.stop_strings),
        },
    }
    if sampled:
        names = ("top_k", "top_p", "min_p")
        found["decoding"] |= {name: getattr(rollout, name) for name in names}
        # The noise follows the place in a batch.
        found["decoding"]["batch_prompts"] = config.eval.batch_prompts
        found["seed"] = config.seed
    return found


def comparable(one: EvalResult, other: EvalResult) -> bool:
    """Whether two results differ by the policy alone, as far as was recorded."""
    if one.made_with is None or other.made_with is None:
        return one.made_with is other.made_with
    differ = {
        k for k in one.made_with | other.made_with if one.made_with.get(k) != other.made_with.get(k)
    }
    return differ <= {"policy", "seed"}


@dataclass(frozen=True)
class EvalTask:
    """What is asked of a policy, and what says which completions are right.

    Attributes:
        reward: what `eval.reward` names.
    """

    config: Config
    prompts: PromptSource
    tokenizer: Any
    reward: RewardFunction
    mesh: Mesh


@dataclass(frozen=True)
class EvalPlace:
    """Where an evaluation is kept, DIRECTORY/NAME_XXXXXX.jsonl and .json, and whose it is.

    Attributes:
        policy: whose weights are evaluated, for the record.
        step: XXXXXX, of training.
    """

    directory: Path
    policy: str
    step: int
    name: str = "step"

    @property
    def metrics(self) -> Path:
        return self.directory / f"{self.name}_{self.step:06d}.json"

    @property
    def records(self) -> Path:
        return self.metrics.with_suffix(".jsonl")


def evaluate(
    generate: Callable[..., Rollout],
    weights: Tree,
    task: EvalTask,
    place: EvalPlace,
    console: Console,
    stopping: Callable[[], bool] = lambda: False,
) -> EvalResult:
    """Completes every problem and judges it; writes what it found.

    Every evaluation of a run draws the same noise for the same problem (its key has no step), so
    that two of them differ by the policy alone.

    Raises:
        StoppedError: `stopping` said so between two batches; nothing was written.
        ConfigError: the reward failed; it names the completion.
    """
    config, prompts = task.config, task.prompts
    total = min(len(prompts), config.eval.problems or len(prompts))
    count = config.eval.batch_prompts
    records: list[dict] = []
    starts = range(0, total, count)
    tokens_done = 0
    with Stage("evaluating", total, console) as stage:
        for start in starts:
            if stopping():
                raise StoppedError
            # Which of the two takes how long depends on the programs kept on disk.
            stage.say("" if start else "compiling and sampling the first batch")
            batch, real = prompts.sequential(start, count, total)
            tokens, mask = shard_rows(task.mesh, (batch.tokens, batch.mask))
            key = fold_key(config.seed, start, Purpose.EVAL)
            rollout = to_host(generate(weights, tokens, mask, key))
            texts = completion_texts(task.tokenizer, rollout, config.rollout.stop_strings)
            if task.reward is gsm8k_answer_reward:
                records += judge_gsm8k(batch, real, texts, rollout, config.eval.samples)
            else:
                records += judge(batch, real, texts, rollout, task.reward, config)
            tokens_done += int(rollout.lengths[: real * config.eval.samples].sum())
            speed = tokens_done / max(stage.elapsed_s, 1e-9)
            stage.update(min(start + count, total), f"{speed:,.0f} tok/s")
    result = EvalResult(
        metrics=eval_metrics(records, config.eval.samples),
        records=records,
        made_with=evaluation_inputs(config, prompts, place.policy),
    )
    if jax.process_index() == 0:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        atomic_write_text(place.records, lines.encode("utf-8", "backslashreplace").decode())
        atomic_write_json(place.metrics, result.metrics | {"made_with": result.made_with})
    return result


def read_eval(directory: Path, step: int) -> EvalResult | None:
    """What `evaluate` wrote after `step`, or None."""
    path = directory / f"step_{step:06d}.json"
    if not path.is_file() or not path.with_suffix(".jsonl").is_file():
        return None
    metrics = json.loads(path.read_text(encoding="utf-8"))
    made_with = metrics.pop("made_with", None)
    return EvalResult(metrics, read_jsonl(path.with_suffix(".jsonl")), made_with)


def score_completions(
    functions: Mapping[str, RewardFunction],
    weights: list[float],
    prompts: PromptBatch,
    texts: list[str],
    rollout: Rollout,
    max_completion_tokens: int,
    timeout_s: float,
) -> tuple[list[float], dict[str, list[float | None]]]:
    """`combine_rewards` of a rollout's completions, as many a prompt as there are.

    Raises:
        ConfigError: a reward failed; it names the completion.
    """
    group = len(texts) // len(prompts.texts)
    try:
        return combine_rewards(
            functions,
            weights,
            texts,
            [answer for answer in prompts.answers for _ in range(group)],
            timeout_s=timeout_s,
            prompts=[text for text in prompts.texts for _ in range(group)],
            completion_lengths=rollout.lengths.tolist(),
            max_completion_tokens=max_completion_tokens,
            finish_reasons=[FINISH_REASONS[i] for i in rollout.finish_reasons],
        )
    except ValueError as error:
        raise ConfigError(f"rewards: {error}") from None


def judge(
    batch: PromptBatch,
    real: int,
    texts: list[str],
    rollout: Rollout,
    reward: RewardFunction,
    config: Config,
) -> list[dict]:
    """One record per real prompt of the batch; lists in it run over the samples."""
    samples = config.eval.samples
    values, _ = score_completions(
        {config.eval.reward: reward},
        [1.0],
        batch,
        texts,
        rollout,
        config.eval_max_completion_tokens,
        config.reward_timeout_s,
    )
    records = []
    for p in range(real):
        rows = slice(p * samples, (p + 1) * samples)
        records.append(
            {
                "index": batch.indices[p],
                "prompt": batch.texts[p],
                "answer": batch.answers[p],
                "completions": texts[rows],
                # No value is not right either, and has no place in JSON.
                "rewards": [None if math.isnan(value) else value for value in values[rows]],
                "correct": [value >= 1 for value in values[rows]],
                "tokens": rollout.lengths[rows].tolist(),
                "finish_reasons": [FINISH_REASONS[i] for i in rollout.finish_reasons[rows]],
            }
        )
    return records


def judge_gsm8k(
    batch: PromptBatch, real: int, texts: list[str], rollout: Rollout, samples: int
) -> list[dict]:
    """`judge` for answers that are numbers: also what was extracted, and lm-eval's verdicts."""
    records = []
    for p in range(real):
        rows = slice(p * samples, (p + 1) * samples)
        answer, completions = batch.answers[p], texts[rows]
        extracted = [extract_answer(text) for text in completions]
        gold = gold_answer(answer)
        records.append(
            {
                "index": batch.indices[p],
                "prompt": batch.texts[p],
                "answer": answer,
                "completions": completions,
                "extracted": [None if value is None else str(value) for value in extracted],
                "correct": [value == gold for value in extracted],
                "lm_eval_strict": [match_lm_eval_strict(t, answer) for t in completions],
                "lm_eval_flexible": [match_lm_eval_flexible(t, answer) for t in completions],
                "tokens": rollout.lengths[rows].tolist(),
                "finish_reasons": [FINISH_REASONS[i] for i in rollout.finish_reasons[rows]],
            }
        )
    return records


def eval_metrics(records: list[dict], samples: int) -> dict[str, float]:
    """Means over problems, and over samples within one; pass@k for k = 1, 2, 4, ... samples."""
    correct = np.array([record["correct"] for record in records], float)
    successes, trials = int(correct.sum()), correct.size
    # Samples of one problem are not independent, so the interval counts problems, not samples.
    interval = wilson_interval(correct.mean() * len(records), len(records))
    metrics = {
        "eval/accuracy": successes / trials,
        "eval/accuracy_low": interval.low,
        "eval/accuracy_high": interval.high,
        "eval/problems": float(len(records)),
    }
    for name in ("lm_eval_strict", "lm_eval_flexible"):
        if name in records[0]:
            metrics[f"eval/{name}"] = float(np.mean([record[name] for record in records]))
    metrics["eval/mean_length"] = float(np.mean([record["tokens"] for record in records]))
    cut = [[r == FINISH_REASONS[FINISH_LENGTH] for r in x["finish_reasons"]] for x in records]
    metrics["eval/clipped_ratio"] = float(np.mean(cut))
    k = 1
    while samples > 1 and k <= samples:
        per_problem = [pass_at_k(samples, int(row.sum()), k) for row in correct]
        metrics[f"eval/pass@{k}"] = float(np.mean(per_problem))
        k *= 2
    return metrics


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of "one of k samples is right" from c right of n (Chen et al. 2021,
    arXiv 2107.03374, eq. 1): 1 - C(n-c, k) / C(n, k)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
