"""What one arm's runs did, over its seeds: accuracy, training, ranks. numpy only, no jax."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxgrpo.records.run_directory import read_jsonl
from jaxgrpo.stats import Interval, RunLayout
from jaxgrpo.study.config import Arm, StudyConfig, StudyFiles, arm_label
from jaxgrpo.study.evals import Answers, Questions, measures, read_answers
from jaxgrpo.study.result_types import ArmResult, Contrast, Curve, CutResult
from jaxgrpo.study.runs import has_plan_file, plan_name


@dataclass(frozen=True)
class Accuracy:
    """An arm's accuracy over its seeds, of so many items."""

    interval: Interval
    per_seed: list[float]
    items: int


def accuracy_of(
    group: str, answers: Mapping[str, Answers], layout: RunLayout | None
) -> Accuracy | None:
    if layout is None or group not in answers:
        return None
    place = list(answers).index(group)
    items = answers[group].counts.shape[1]
    return Accuracy(layout.arm_interval(place), layout.accuracy[place].tolist(), items)


def arm_result(
    files: StudyFiles,
    arms: list[Arm],
    accuracy: Accuracy | None,
    versus: Contrast | None,
    config: StudyConfig,
) -> ArmResult:
    first = arms[0]
    summary = read_json(files.arm(first) / "summary.json")
    plan = summary["plan"]["ranks"] if summary else {}
    every = [r for ranks in plan.values() for r in ranks]
    runs = [files.arm(arm) for arm in arms]
    metrics = [_metrics(run / "metrics.jsonl") for run in runs]
    seconds = sum(r["step_time"] for run in metrics for r in run)
    tokens = int(sum(r["num_tokens"] for run in metrics for r in run))
    sizes = {read_json(run / "summary.json").get("trainable_parameters") for run in runs}
    done = accuracy is not None
    longest = config.optim.max_grad_norm or math.inf
    return {
        "name": arm_label(first, config),
        "plan": first.plan,
        "scale_rule": first.scale_rule or "any",
        "mean_rank": first.mean_rank,
        "seeds": [arm.seed for arm in arms],
        "accuracy": accuracy and accuracy.interval.value,
        "low": accuracy and accuracy.interval.low,
        "high": accuracy and accuracy.interval.high,
        "per_seed": accuracy.per_seed if accuracy else [],
        "n_items": accuracy.items if accuracy else 0,
        "learning_rates": [arm.rate * config.optim.learning_rate for arm in arms],
        "measures": measures(runs, config.steps, config) if done else [],
        "reward_last_quarter": _last_quarter(metrics, "reward") if done else [],
        "reward_difference": None,
        "kl_last_quarter": _last_quarter(metrics, "kl") if done else [],
        "gradient_clipped": [
            float(np.mean([r["grad_norm"] > longest for r in run]))
            for run in metrics
            if done and run and "grad_norm" in run[0]
        ],
        "speed": _speed(first, files, config),
        "trainable_parameters": sizes.pop() if len(sizes) == 1 else None,
        "total_rank": sum(every) if every else None,
        "rank_min": min(every, default=None),
        "rank_max": max(every, default=None),
        "ranks": plan,
        "layer_ranks": np.mean(list(plan.values()), axis=0).tolist() if plan else [],
        "reward": _curve(metrics, "reward", spread=True),
        "drift": _curve(metrics, "sampling/sampling_logp_difference/mean"),
        "seconds": seconds or None,
        "tokens": tokens or None,
        "tokens_per_s": tokens / seconds if seconds else None,
        "versus": versus,
    }


def _speed(arm: Arm, files: StudyFiles, config: StudyConfig) -> float | None:
    if arm.plan == "uniform":
        return 1.0
    plan = read_json(files.plan(plan_name(config, arm))) if has_plan_file(arm) else {}
    return plan.get("speed", {}).get(arm.scale_rule)


def _last_quarter(runs: list[list[dict]], name: str) -> list[float]:
    """Mean over the last quarter of the steps, per run that measured it."""
    runs = [run for run in runs if run and name in run[-1]]
    return [float(np.mean([r[name] for r in run[-max(1, len(run) // 4) :]])) for run in runs]


def compare_rewards(arms: Sequence[ArmResult]) -> None:
    """Fills in each arm's reward_difference."""
    rewards = [arm["reward_last_quarter"] for arm in arms]
    measured = [place for place, values in enumerate(rewards) if values]
    if len(measured) < 2 or len({len(rewards[place]) for place in measured}) > 1:
        return
    layout = RunLayout(np.array([rewards[place] for place in measured])[:, :, None])
    if layout.residual is None:
        return
    for row, place in enumerate(measured[1:], start=1):
        weights = np.zeros(len(measured))
        weights[[0, row]] = -1.0, 1.0
        found = layout.contrast(weights.tolist()).interval()
        arms[place]["reward_difference"] = {
            "value": found.value,
            "low": found.low,
            "high": found.high,
        }


def cut_results(
    config: StudyConfig, files: StudyFiles, groups: Mapping[str, list[Arm]]
) -> list[CutResult]:
    """Every cut of the uniform arms whose seeds have all been cut and evaluated."""
    found: list[CutResult] = []
    questions = Questions()
    for arms in groups.values():
        if arms[0].plan != "uniform":
            continue
        for criterion, share in config.study.cuts.amounts:
            runs = [files.cut(arm, criterion, share) for arm in arms]
            cut = read_answers(runs, config.steps, config, questions)
            uncut = [files.arm(arm) for arm in arms]
            whole = read_answers(uncut, config.steps, config, questions)
            if cut is None or whole is None:
                continue
            after, before = (answers.cells.mean(axis=1) for answers in (cut, whole))
            found.append(
                {
                    "name": f"{arm_label(arms[0], config)}, {share:.4g} of its {criterion}",
                    "arm": arm_label(arms[0], config),
                    "criterion": criterion,
                    "share": share,
                    "accuracy": after.tolist(),
                    "difference": (after - before).tolist(),
                    "parameters": [
                        read_json(run / "summary.json")["trainable_parameters"] for run in runs
                    ],
                }
            )
    return found


def _metrics(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    return [record for record in read_jsonl(path) if "step_time" in record]


def _curve(runs: list[list[dict]], name: str, spread: bool = False) -> Curve:
    runs = [run for run in runs if run and name in run[0]]
    length = min((len(run) for run in runs), default=0)
    values = np.array([[r[name] for r in run[:length]] for run in runs], float)
    curve: Curve = {"steps": [r["step"] for r in runs[0][:length]] if runs else []}
    curve["mean"] = values.mean(axis=0).tolist() if runs else []
    if spread:
        curve["low"] = values.min(axis=0).tolist() if runs else []
        curve["high"] = values.max(axis=0).tolist() if runs else []
    return curve


def read_json(path: Path) -> dict:
    """A JSON object, or an empty one where there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
