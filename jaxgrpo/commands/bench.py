"""`bench`: speed on this machine, beside the least time that its memory and arithmetic allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxgrpo.bench.settings import PHASES, BenchConfig
from jaxgrpo.commands.command import EMBEDDED_CONFIG, Command
from jaxgrpo.config import ConfigError


def run(config: BenchConfig, console: Console) -> int:
    from jaxgrpo.bench.measure import run_bench

    figures = run_bench(config)
    table = Table(title=f"bench {config.phase}", title_justify="left", box=None, pad_edge=False)
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        if name != "kernels":
            table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    if "kernels" in figures:
        table = Table(title="kernels", title_justify="left", box=None, pad_edge=False)
        for heading in ("ms", "calls", "us each", "name"):
            table.add_column(heading, justify="left" if heading == "name" else "right")
        for name, calls, seconds in figures["kernels"]:
            table.add_row(
                f"{1e3 * seconds:,.2f}", str(calls), f"{1e6 * seconds / calls:,.1f}", name
            )
        console.print(table)
    if config.bench.out is not None:
        console.print(f"wrote {config.bench.out}", highlight=False)
    return 0


def take_phase(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The words without the one that says what to measure."""
    named = [word for word in words if word in PHASES]
    if len(named) > 1:
        raise ConfigError(f"bench measures one phase at a time, got {' and '.join(named)}")
    for word in words:
        setting = "=" in word or word.startswith("-")
        if not (setting or word in PHASES or Path(word).exists()):
            raise ConfigError(f"bench: '{word}' is no file and none of {', '.join(PHASES)}")
    return [w for w in words if w not in PHASES], {"phase": named[0]} if named else {}


BENCH = Command(
    run,
    "measure the sampler, the train step or both on random weights",
    "One word says what: rollout (prefill and decoding), train (forward, backward,\n"
    "update) or step (both, and the host's part; the default).\n\n"
    "  bench.preset=qwen2.5-7b bench.num_layers=8 bench.prompt_tokens=128\n"
    "  bench.lengths=lognormal bench.mean_tokens=99 rollout.max_completion_tokens=512\n"
    "  bench.breakdown=true    also the parts of a step, each by itself\n"
    "  bench.profile=DIR       also what each kernel took (GPU)\n"
    "  bench.out=figures.json\n\n"
    "Without a CONFIG: 1.5B shapes, 32 prompts of 128 tokens x 8 completions of 256.\n"
    "The floor is bytes over bandwidth or operations over rate, the larger, by layer.",
    "bench step bench.preset=embedded bench.repeats=2",
    BenchConfig,
    default=EMBEDDED_CONFIG.with_name("bench.yaml"),
    collects=take_phase,
    # Random weights and prompts, on one device.
    ignores=(
        *("data", "eval", "rewards", "reward_timeout_s", "run_dir", "steps", "objective"),
        *("model.path", "model.revision", "lora.adapter", "wandb_project"),
        *("rollout.stop_token_ids", "rollout.stop_strings"),
        *("checkpoint_every_steps", "keep_checkpoints", "log_completions_every_steps"),
    ),
)
