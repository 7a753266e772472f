"""What a study was run with, in words: what a reader needs to judge its numbers. No jax."""

from __future__ import annotations

import json

from jaxgrpo.study.config import StudyConfig, StudyFiles


def study_settings(config: StudyConfig, files: StudyFiles) -> dict[str, str]:
    """Name -> value, in the order to print."""
    path = files.profile("grpo") / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    size = f", {summary['model']['parameters']:,} parameters" if summary else ""
    low, high = config.bounds(config.lora.rank)
    allocation, grpo, optim = config.study.allocation, config.grpo, config.optim
    clip = f"{grpo.clip_eps_low:g} to {grpo.clip_eps_high or grpo.clip_eps_low:g}"
    return {
        "model": f"{config.model.path}{size}",
        "data": f"{config.data.path}, trained on {config.data.train_split}, evaluated on "
        f"{config.data.eval_split}",
        "prompt": _prompt(config),
        "outcome": f"{config.decodings[0]}, right by {_answer(config)}; margin "
        f"{100 * config.study.margin:g} points",
        "decoding": _decoding(config),
        "rewards": ", ".join(f"{name} x {weight:g}" for name, weight in config.rewards.items()),
        "steps": f"{config.steps} per arm, {config.study.profile.steps} per profile and probe",
        "batch": f"{grpo.prompts_per_step} prompts x {grpo.group_size} completions, at most "
        f"{config.rollout.max_completion_tokens} tokens at temperature "
        f"{config.rollout.temperature:g}",
        "loss": f"{grpo.loss}, clipped at {clip}, KL coefficient {grpo.kl_coef:g}, "
        f"{grpo.num_iterations} updates per rollout, advantages scaled by {grpo.scale_rewards}"
        + (", each reward by itself" * (grpo.multi_objective_aggregation == "normalize_then_sum")),
        "learning rate": f"{optim.learning_rate:g}, {optim.schedule}, {optim.warmup_steps} warm-up "
        f"steps, gradients clipped at {optim.max_grad_norm:g}",
        "budget": f"mean rank {', '.join(map(str, config.mean_ranks))}, ranks {low} to {high}, "
        f"counted in {allocation.unit}, one rank per {allocation.granularity}",
        "importance": f"{allocation.view} norms of the profile under "
        + (allocation.objective or "the arm's own objective"),
        "scale": f"every rule gives {config.lora.alpha / config.lora.rank:g} at rank "
        f"{config.lora.rank}",
        "probes": _probes(config),
        "adapted": ", ".join(config.lora.target_modules),
        **_runs(config),
    }


def _probes(config: StudyConfig) -> str:
    probe, rank = config.study.probe, config.lora.rank
    if not probe.scale_rules:
        return "none"
    return (
        f"{probe.draws} draws of a rank for every adapter and {probe.layer_draws} for every layer, "
        f"of rank {rank} a quarter, half, all or twice as much, under "
        f"{', '.join(probe.scale_rules)}; each beside a uniform run of its seed"
    )


def _runs(config: StudyConfig) -> dict[str, str]:
    design = config.study.design
    if design is None:
        return {
            "seeds": ", ".join(map(str, config.study.arms.seeds)),
            "scope": "one profile, so one plan per method, and one learning rate: the claim is "
            "about these plans",
        }
    return {
        "blocks": f"seed {config.seed} + block, learning rate x "
        f"{', '.join(f'{rate:g}' for rate in design.learning_rates)} in turn; looks at "
        f"{', '.join(map(str, design.looks))} blocks",
        "scope": "one profile, so one plan, averaged over these learning rates",
    }


def _prompt(config: StudyConfig) -> str:
    parts = [
        f"{name} {text!r}"
        for name, text in (
            ("system", config.data.system_prompt),
            ("suffix", config.data.prompt_suffix),
            ("told", config.data.chat_template_kwargs),
        )
        if text
    ]
    return "; ".join(["the question through the chat template", *parts])


def _answer(config: StudyConfig) -> str:
    answer = config.study.outcome.answer
    return config.eval.reward if answer == "reward" else f"lm-eval's {answer} rule"


def _decoding(config: StudyConfig) -> str:
    problems = config.eval.problems
    items = "the whole split" if problems is None else f"the first {problems} problems"
    how = (
        f"{config.eval.samples} completions a problem at temperature {config.eval.temperature:g}"
        if config.eval.temperature > 0
        else "greedy"
    )
    return f"{how}, at most {config.eval_max_completion_tokens} tokens, on {items}"
