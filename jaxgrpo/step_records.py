"""What a step leaves on the host: its metrics, its completions, its seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass

import jax
import numpy as np

from jaxgrpo.types import (
    FINISH_LENGTH,
    FINISH_REASONS,
    PromptBatch,
    Rollout,
    StepMetrics,
    TrainBatch,
)


@dataclass(frozen=True)
class StepResult:
    """What one step leaves on the host."""

    metrics: dict[str, float]
    layer_grad_norms: dict
    completions: list[dict]
    batch: TrainBatch


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
