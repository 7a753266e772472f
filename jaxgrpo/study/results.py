"""From a study's run directories to numbers: everything the report says. numpy only, no jax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrpo import stats
from jaxgrpo.config import EMBEDDED
from jaxgrpo.records.run_directory import read_jsonl
from jaxgrpo.study.amplification import amplification, amplification_verdict
from jaxgrpo.study.config import DYNAMIC, Arm, StudyConfig, StudyFiles, arm_label, list_arms
from jaxgrpo.study.norms import layer_norms, read_norms
from jaxgrpo.study.verdict import question, verdict

VIEWS = ("l2", "weight", "rank_free", "rms")
# arXiv 2605.07366, as published; accuracies are of 200 test items and one seed.
PAPER = {
    "uniform": 0.745,
    "proportional": 0.70,
    "random": 0.675,
    "reduced": 0.65,
    "base": 0.66,
    "max_min_uniform": 2.17,
    "max_min_proportional": 3.00,
    "top_share": 0.357,
    "early_late": 0.962,
}


def collect_results(config: StudyConfig) -> dict[str, Any]:
    """The `results` dict that report.py renders; what has not run yet is null or left out."""
    files = StudyFiles(config.run_dir)
    arms = _arms(config, files)
    profiles = [
        profile
        for objective in config.study.profile.objectives
        if (profile := _profile(files, objective)) is not None
    ]
    slopes = amplification(config, files)
    n_items = next((arm["n_items"] for arm in arms if arm["n_items"]), 0)
    detectable = _detectable(arms, n_items, len(config.study.arms.seeds))
    return {
        "title": config.study.title,
        "question": question(config),
        "verdict": verdict(arms, detectable),
        "settings": _settings(config, files),
        "versions": _versions(files, config),
        "base": _base(config, files),
        "arms": arms,
        "minimum_detectable_effect": detectable,
        "detectable_note": (
            f"smallest true difference that a paired comparison on {n_items} items finds with "
            "80 % power at p < 0.05, at the discordance seen here; more seeds only sharpen it"
        ),
        "profiles": profiles,
        "importance": {
            "objective": config.importance_objective(config.study.arms.objectives[0]),
            "view": config.study.allocation.view,
        },
        "amplification": slopes,
        "amplification_verdict": amplification_verdict(slopes),
        "paper": _paper(config, files, arms, profiles),
        "allocations": _allocations(config, files),
    }


def _arms(config: StudyConfig, files: StudyFiles) -> list[dict]:
    groups: dict[str, list[Arm]] = {}
    for arm in list_arms(config):
        groups.setdefault(arm.group, []).append(arm)
    correct = {group: _correct(config, files, arms) for group, arms in groups.items()}
    found = []
    for group, arms in groups.items():
        found.append(_arm(files, arms, correct[group], config))
    _compare(found, groups, correct, config)
    return found


def _correct(config: StudyConfig, files: StudyFiles, arms: list[Arm]) -> np.ndarray | None:
    """[S, N] of the seeds that are finished, in the arms' order; None if one is missing."""
    rows = []
    for arm in arms:
        path = files.arm(arm) / "eval" / f"step_{config.steps:06d}.jsonl"
        if not (files.arm(arm) / "summary.json").is_file() or not path.is_file():
            return None
        records = sorted(read_jsonl(path), key=lambda record: record["index"])
        rows.append([float(np.mean(record["correct"])) for record in records])
    return np.array(rows)


def _arm(
    files: StudyFiles, arms: list[Arm], correct: np.ndarray | None, config: StudyConfig
) -> dict:
    first = arms[0]
    summary = _read(files.arm(first) / "summary.json")
    plan = summary["plan"]["ranks"] if summary else {}
    every = [r for ranks in plan.values() for r in ranks]
    metrics = [_metrics(files.arm(arm) / "metrics.jsonl") for arm in arms]
    accuracy = None if correct is None else stats.accuracy_interval(correct)
    seconds = sum(r["step_time"] for run in metrics for r in run)
    tokens = int(sum(r["num_tokens"] for run in metrics for r in run))
    sizes = {_read(files.arm(arm) / "summary.json").get("trainable_parameters") for arm in arms}
    return {
        "name": arm_label(first, config),
        "plan": first.plan,
        "scale_rule": first.scale_rule or "any",
        "mean_rank": first.mean_rank,
        "seeds": [arm.seed for arm in arms],
        "accuracy": accuracy and accuracy.value,
        "low": accuracy and accuracy.low,
        "high": accuracy and accuracy.high,
        "per_seed": [] if correct is None else correct.mean(axis=1).tolist(),
        "n_items": 0 if correct is None else correct.shape[1],
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
        "versus": None,
    }


def _compare(
    found: list[dict],
    groups: dict[str, list[Arm]],
    correct: dict[str, np.ndarray | None],
    config: StudyConfig,
) -> None:
    """Fills `versus`: each arm against the uniform one of its mean rank and, if any, its rule."""
    names = list(groups)
    compared = []
    for entry, group in zip(found, names, strict=True):
        arm = groups[group][0]
        if arm.plan == "uniform":
            continue
        rule = None if arm.mean_rank == config.lora.rank else arm.scale_rule
        reference = Arm("uniform", rule, arm.mean_rank, arm.seed, arm.objective).group
        mine, other = correct[group], correct.get(reference)
        if mine is None or other is None:
            continue
        paired = stats.paired_difference(mine, other)
        entry["versus"] = {
            "arm": arm_label(groups[reference][0], config),
            "difference": paired.difference,
            "low": paired.low,
            "high": paired.high,
            "p": paired.p,
            "only_this": paired.only_a,
            "only_other": paired.only_b,
        }
        compared.append(entry)
    adjusted = stats.holm([entry["versus"]["p"] for entry in compared])
    for entry, p in zip(compared, adjusted, strict=True):
        entry["versus"]["p_holm"] = float(p)


def _detectable(arms: list[dict], n_items: int, seeds: int) -> float | None:
    reference = next((arm for arm in arms if arm["plan"] == "uniform"), None)
    if not n_items or reference is None or reference["accuracy"] is None:
        return None
    discordant = [
        (v["only_this"] + v["only_other"]) / (n_items * seeds)
        for arm in arms
        if (v := arm["versus"]) is not None
    ]
    share = max(discordant) if discordant else None
    return float(stats.minimum_detectable_effect(n_items, reference["accuracy"], share or None))


def _profile(files: StudyFiles, objective: str) -> dict | None:
    views = {}
    steps = layers = 0
    modules: list[str] = []
    for view in VIEWS:
        norms = read_norms(files.profile(objective), view)
        if norms is None:
            continue
        by_layer = layer_norms(norms)
        steps, layers, modules = *by_layer.shape, list(norms)
        found = stats.importance(by_layer)
        views[view] = found.to_json() | {"heatmap": by_layer.T.tolist()}
    if not views:
        return None
    return {
        "objective": objective,
        "steps": steps,
        "layers": layers,
        "modules": modules,
        "views": views,
    }


def _base(config: StudyConfig, files: StudyFiles) -> dict | None:
    metrics = _read(files.arm(list_arms(config)[0]) / "eval" / "step_000000.json")
    if not metrics:
        return None
    return {
        "accuracy": metrics["eval/accuracy"],
        "low": metrics["eval/accuracy_low"],
        "high": metrics["eval/accuracy_high"],
        "n": int(metrics["eval/problems"]),
    }


def _paper(
    config: StudyConfig, files: StudyFiles, arms: list[dict], profiles: list[dict]
) -> list[dict]:
    """The paper's figures beside ours; other models and data are another question, and say so."""
    same = "" if config.model.path != EMBEDDED else "another model and task: not a replication"
    rows = []
    for plan in ("uniform", "proportional", "random", "reduced"):
        entry = next((a for a in arms if a["plan"] == plan and a["accuracy"] is not None), None)
        ours = "not measured" if entry is None else f"{entry['accuracy']:.1%}"
        rows.append(_row(f"accuracy, {plan}", f"{PAPER[plan]:.1%} (n = 200, 1 seed)", ours, same))
    for plan in ("uniform", "proportional"):
        ratio = _arm_max_min(config, files, plan)
        ours = "not measured" if ratio is None else f"{ratio:.2f}"
        note = "raw L2, over the whole run" if plan == "uniform" else "2.17 x sqrt(40/20) = 3.07"
        quantity = f"max/min layer share, {plan} run"
        rows.append(_row(quantity, f"{PAPER[f'max_min_{plan}']:.2f}", ours, note))
    grpo = next((p["views"].get("l2") for p in profiles if p["objective"] == "grpo"), None)
    if grpo:
        top, correlation = grpo["top_share"], grpo["early_late_correlation"]
        rows.append(
            _row(
                "share of the top 30 % of layers",
                f"{PAPER['top_share']:.1%}",
                f"{top['value']:.1%} ({top['layers']} layers)",
                "GRPO profile",
            )
        )
        ours = "not measured" if correlation is None else f"{correlation:.3f}"
        rows.append(_row("early/late correlation", f"{PAPER['early_late']}", ours, "GRPO profile"))
    return rows


def _row(quantity: str, paper: str, ours: str, note: str) -> dict:
    return {"quantity": quantity, "paper": paper, "ours": ours, "note": note}


def _arm_max_min(config: StudyConfig, files: StudyFiles, plan: str) -> float | None:
    """max/min layer share of the first seed's run, raw L2, as the paper measured it."""
    arm = next((a for a in list_arms(config) if a.plan == plan), None)
    norms = None if arm is None else read_norms(files.arm(arm), "l2")
    return None if norms is None else float(stats.max_min_ratio(stats.shares(layer_norms(norms))))


def _allocations(config: StudyConfig, files: StudyFiles) -> list[dict]:
    found = []
    for arm in list_arms(config):
        if arm.seed != config.study.arms.seeds[0] and arm.plan != "random":
            continue
        summary = _read(files.arm(arm) / "summary.json")
        if not summary:
            continue
        ranks = list(summary["plan"]["ranks"].values())
        note = "as it ended" if arm.plan in DYNAMIC else ""
        name = f"{arm_label(arm, config)}" + (f", seed {arm.seed}" if arm.plan == "random" else "")
        found.append({"plan": name, "layer_ranks": np.mean(ranks, axis=0).tolist(), "note": note})
    return found


def _settings(config: StudyConfig, files: StudyFiles) -> dict[str, str]:
    summary = _read(files.profile("grpo") / "summary.json")
    size = f", {summary['model']['parameters']:,} parameters" if summary else ""
    low, high = config.bounds(config.lora.rank)
    allocation = config.study.allocation
    return {
        "model": f"{config.model.path}{size}",
        "data": config.data.path,
        "steps": f"{config.steps} per arm, {config.study.profile.steps} per profile and probe",
        "batch": f"{config.grpo.prompts_per_step} prompts x {config.grpo.group_size} completions",
        "loss": config.grpo.loss,
        "learning rate": f"{config.optim.learning_rate:g}, {config.optim.schedule}",
        "budget": f"mean rank {', '.join(map(str, config.mean_ranks))}, ranks {low} to {high}, "
        f"counted in {allocation.unit}, one rank per {allocation.granularity}",
        "importance": f"{allocation.view} norms of the profile under "
        + (allocation.objective or "the arm's own objective"),
        "scale": f"every rule gives {config.lora.alpha / config.lora.rank:g} at rank "
        f"{config.lora.rank}",
        "adapted": ", ".join(config.lora.target_modules),
        "seeds": ", ".join(map(str, config.study.arms.seeds)),
    }


def _versions(files: StudyFiles, config: StudyConfig) -> dict[str, str]:
    return _read(files.profile("grpo") / "summary.json").get("versions", {})


def _metrics(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    return [record for record in read_jsonl(path) if "step_time" in record]


def _curve(runs: list[list[dict]], name: str, spread: bool = False) -> dict:
    runs = [run for run in runs if run and name in run[0]]
    length = min((len(run) for run in runs), default=0)
    values = np.array([[r[name] for r in run[:length]] for run in runs], float)
    curve: dict[str, list] = {"steps": [r["step"] for r in runs[0][:length]] if runs else []}
    curve["mean"] = values.mean(axis=0).tolist() if runs else []
    if spread:
        curve["low"] = values.min(axis=0).tolist() if runs else []
        curve["high"] = values.max(axis=0).tolist() if runs else []
    return curve


def _read(path: Path) -> dict:
    """A JSON object, or an empty one where there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
