"""The README.md of an exported adapter or model: base, data, plan, scores, command. No jax."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jaxgrpo.config import EMBEDDED, Config
from jaxgrpo.config_files import encode_config
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.records.run_directory import atomic_write_text

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_USE = {
    "peft": """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, {here!r})""",
    "merged": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({here!r})
tokenizer = AutoTokenizer.from_pretrained({here!r})""",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card tells; what is not known is left out.

    Attributes:
        kind: "peft" (an adapter) or "merged" (a whole model).
        command: what wrote the directory.
        config: the run's resolved settings.
        scores: name -> text.
        notes: sentences on what was done to the adapter after training.
    """

    kind: str
    base_model: str
    command: str
    config: Mapping[str, Any] | None = None
    step: int | None = None
    plan: RankPlan | None = None
    parameters: int | None = None
    scores: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def write_card(directory: Path, facts: CardFacts) -> None:
    """Writes README.md."""
    atomic_write_text(directory / "README.md", model_card(facts, directory.name))


def model_card(facts: CardFacts, name: str) -> str:
    """The card as Markdown with the hub's metadata on top."""
    head: dict[str, Any] = {
        "library_name": "peft" if facts.kind == "peft" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "grpo", "jaxgrpo"],
    }
    if _HUB_ID.fullmatch(facts.base_model):
        head = {"base_model": facts.base_model} | head
    what = "LoRA adapter" if facts.kind == "peft" else "model with its LoRA adapter merged in"
    blocks = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---", f"# {name}"]
    after = f" after {facts.step} steps" if facts.step is not None else ""
    blocks.append(f"A {what} for `{facts.base_model or 'an unnamed base model'}`{after}.")
    blocks += facts.notes
    if facts.config is not None:
        blocks.append(_training(facts.config))
    if facts.plan is not None:
        blocks.append(_plan(facts.plan, facts.parameters))
    elif facts.parameters is not None:
        blocks.append(f"{facts.parameters:,} parameters.")
    if facts.scores:
        rows = "\n".join(f"| {key} | {value} |" for key, value in facts.scores.items())
        blocks.append(f"## Scores\n\n| | |\n|---|---|\n{rows}")
    embedded = facts.base_model == EMBEDDED  # it ships with this package, no hub has it
    base = "EMBEDDED_DIR" if embedded else repr(facts.base_model)
    use = _USE[facts.kind].format(base=base, here=name)
    if embedded and facts.kind == "peft":
        use = f"from jaxgrpo.model.weights import EMBEDDED_DIR\n{use}"
    blocks.append(f"## Use\n\n```python\n{use}\n```")
    blocks.append(f"## How it was made\n\n```bash\n{facts.command}\n```")
    if facts.config is not None:
        settings = yaml.safe_dump(changed_settings(facts.config), sort_keys=False)
        blocks.append(
            "The settings that differ from the defaults, a configuration for "
            f"`python -m jaxgrpo.run train`:\n\n```yaml\n{settings}```"
        )
    return "\n\n".join(blocks) + "\n"


def scores_of(evaluations: Mapping[str, Mapping[str, float] | None]) -> dict[str, str]:
    """Accuracy "before" and "after" with intervals, from `eval/...` metrics."""
    scores = {}
    for when, found in evaluations.items():
        if found:
            accuracy, low, high = (found[f"eval/accuracy{end}"] for end in ("", "_low", "_high"))
            scores[f"accuracy {when}"] = (
                f"{accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}, "
                f"{found['eval/problems']:.0f} problems)"
            )
    return scores


def changed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the defaults, nested as in a file."""
    return _changes(config, encode_config(Config()))


def _changes(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    changes = {}
    for key, value in config.items():
        default = defaults.get(key)
        if isinstance(value, tuple | list):
            value, default = list(value), list(default or ())
        if isinstance(value, Mapping) and isinstance(default, Mapping) and key != "rewards":
            value, default = _changes(value, default), {}
        if value != default:
            changes[key] = value
    return changes


def _training(config: Mapping[str, Any]) -> str:
    data, grpo, optim = config["data"], config["grpo"], config["optim"]
    objective = config["objective"]
    rewards = ", ".join(f"`{name}` x {weight:g}" for name, weight in config["rewards"].items())
    lines = [
        f"- data: `{data['path']}`, split {data['train_split']}; "
        f"scores on split {data['eval_split']}",
        f"- objective: {objective}"
        + (f", loss {grpo['loss']}, rewards {rewards}" if objective == "grpo" else ""),
        f"- a step: {grpo['prompts_per_step']} prompts x {grpo['group_size']} completions of up to "
        f"{config['rollout']['max_completion_tokens']} tokens",
        *_prompts(data),
        f"- AdamW, learning rate {optim['learning_rate']:g} ({optim['schedule']}), "
        f"seed {config['seed']}",
    ]
    return "## Training\n\n" + "\n".join(lines)


def _prompts(data: Mapping[str, Any]) -> list[str]:
    """What a prompt must be told to be like those of training."""
    told = data.get("chat_template_kwargs")
    if not told:
        return []
    said = ", ".join(f"{name}={value!r}" for name, value in told.items())
    return [f"- prompts: `apply_chat_template(..., {said})`"]


def _plan(plan: RankPlan, parameters: int | None) -> str:
    size = "" if parameters is None else f", {parameters:,} parameters"
    text = (
        f"## Ranks\n\nScale rule `{plan.scale_rule}`, alpha {plan.alpha:g}, {plan.total_rank} "
        f"ranks in all{size}.\n\n"
    )
    rows = [f"| layer | {' | '.join(plan.modules)} |", "|---" * (len(plan.modules) + 1) + "|"]
    for layer in range(plan.layers):
        ranks = " | ".join(str(int(plan.ranks[module][layer])) for module in plan.modules)
        rows.append(f"| {layer} | {ranks} |")
    return text + "\n".join(rows)
