"""Real work from process start: a run on your model and data, and a peer's on the same, in turn.

    python scripts/bench_real.py MODEL DATA [--steps N] [--peer trl|trl-vllm] [--rows ROWS]
        [--config FILE] [--out FILE] [key=value ...]

MODEL and DATA are model.path and data.path. Trains N steps of FILE's settings (default:
configs/gsm8k_1.5b.yaml), without evaluations, in a process of its own, and prints what a user waits
for: seconds from the process' start to the end of the first step, the steps after it and their
parts, programs compiled, sampled tokens/s, seconds until the mean reward of ten steps passes
--passes (0.7), peak memory. With --peer, TRL's GRPOTrainer runs next on the same device with the
same problems, prompts, rewards, rank, scale, batch, cap, loss and learning rate: trl samples with
transformers' generate, trl-vllm with vLLM in the same process. TRL trains ROWS rows at a time
(default 32). Every figure but the memory comes from the lines that each process writes when a step
ends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxgrpo.config import Config, ConfigError
from jaxgrpo.config_files import dump_config, load_config

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 10
"""Steps whose mean reward has to pass the bar."""

NO_EVALUATION = ("eval.before_training=false", "eval.after_training=false", "eval.every_steps=0")

PHASES = {
    "imports": "imports and settings",
    "devices": "devices",
    "prompts": "tokenizer and prompts, read beside",
    "weights": "weights, while programs compile",
    "sampler": "sampler, compiled or read",
    "train_step": "train step, compiled or read",
}
"""Of a start, as summary.json has them."""

ROWS = {
    "first_step_s": "seconds from process start to the first step's end",
    **{f"start_{name}_s": f"  to the end of: {what}" for name, what in PHASES.items()},
    "mean_step_s": "mean step after it, s",
    "median_step_s": "median step after it, s",
    "rollout_s": "median rollout, s",
    "train_s": "median train, s",
    "tokens_per_s": "sampled tokens/s after the first step",
    "mean_length": "mean completion length",
    "programs": "programs compiled",
    "programs_from_disk": "  of them from the disk",
    "programs_after_first": "  of them after the first step",
    "compile_s": "seconds compiling (or reading programs from the disk)",
    "passes_s": "seconds from process start until the reward passes",
    "passes_step": "  step",
    "last_reward": f"mean reward of the last {WINDOW} steps",
    "largest_drift": "largest |log-prob difference| of a step, over that of step 1",
    "peak_memory_gib": "peak memory, GiB",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--peer", choices=("trl", "trl-vllm"))
    parser.add_argument("--rows", type=int, default=32, help="rows that TRL trains at a time")
    parser.add_argument("--passes", type=float, default=0.7, help="the reward that is waited for")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "gsm8k_1.5b.yaml")
    parser.add_argument(
        "--out", type=Path, help="also write the figures, and each step's, to this file as JSON"
    )
    parser.add_argument("--run-peer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    words = [f"model.path={args.model}", f"data.path={args.data}", f"steps={args.steps}"]
    words += [*NO_EVALUATION, *args.settings]
    try:
        config = load_config([args.config], words)
        if args.run_peer is not None:
            run_trl(config, args.run_peer, args.rows, vllm=args.peer == "trl-vllm")
            return 0
        found = {}
        for peer in (None, *([args.peer] if args.peer else [])):
            found[peer or "jaxgrpo"] = run(config, peer, args)
            # Each as soon as it is there: the next one may fail.
            show(found, args.passes)
            if args.out is not None:
                args.out.write_text(json.dumps(found, indent=2) + "\n")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(config: Config, peer: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """One process from its start to its end, and the figures of what it wrote."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        if peer is None:
            settings = root / "settings.yaml"
            settings.write_text(dump_config(config))
            words = ["-m", "jaxgrpo.run", "train", str(settings), f"run_dir={root / 'run'}"]
        else:
            words = [__file__, args.model, args.data, "--run-peer", str(root / "run")]
            words += ["--peer", peer, "--rows", str(args.rows), "--config", str(args.config)]
            words += ["--steps", str(args.steps), *args.settings]
        (root / "run").mkdir()
        started = time.time()
        done = subprocess.run([sys.executable, *words], check=False)
        if done.returncode:
            raise ConfigError(f"{peer or 'jaxgrpo'} ended with exit code {done.returncode}")
        lines = (root / "run" / "metrics.jsonl").read_text().splitlines()
        summary = json.loads((root / "run" / "summary.json").read_text())
    steps = [json.loads(line) for line in lines]
    steps = [step for step in steps if "reward" in step]
    found = figures(steps, config.grpo.rows_per_step, started, args.passes)
    peak = summary["peak_memory_bytes"]
    return found | {
        "peak_memory_gib": peak / 2**30 if peak else None,
        "versions": summary["versions"],
        "longest_to_compile": summary.get("compiled", {}).get("longest"),
        **start_figures(summary.get("start", {}), started),
    }


def start_figures(start: dict[str, float], started: float) -> dict[str, float]:
    """The phases of a start, from what summary.json has of it.

    Args:
        started: when the process was started, in unix time.
    """
    known = [name for name in PHASES if name in start]
    return {f"start_{name}_s": start["began"] + start[name] - started for name in known}


def figures(
    steps: Sequence[dict[str, Any]], rows: int, started: float, passes: float
) -> dict[str, Any]:
    """What is printed, from the steps' lines; what a peer does not write is left out.

    Args:
        rows: completions a step.
        started: when the process was started, in the seconds of the lines' `time`.
        passes: the reward that is waited for.
    """
    ends = [step["time"] - started for step in steps]
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    rewards = [step["reward"] for step in steps]
    means = [statistics.fmean(rewards[i - WINDOW : i]) for i in range(WINDOW, len(rewards) + 1)]
    passed = next((i + WINDOW for i, mean in enumerate(means) if mean > passes), None)
    found: dict[str, Any] = {
        "steps": len(steps),
        "first_step_s": ends[0],
        "mean_length": statistics.fmean(step["completions/mean_length"] for step in steps),
        "passes_s": None if passed is None else ends[passed - 1],
        "passes_step": passed,
        "last_reward": statistics.fmean(rewards[-WINDOW:]),
    }
    later = steps[1:]
    if later:
        found |= {"mean_step_s": statistics.fmean(seconds)}
        found |= {"median_step_s": statistics.median(seconds)}
        sampled = rows * sum(step["completions/mean_length"] for step in later)
        found["tokens_per_s"] = sampled / sum(seconds)
        for name in ("rollout_s", "train_s"):
            if f"time/{name}" in later[0]:
                found[name] = statistics.median(step[f"time/{name}"] for step in later)
    if "time/programs_compiled" in steps[0]:
        counts = [step["time/programs_compiled"] for step in steps]
        found["programs"], found["programs_after_first"] = sum(counts), sum(counts[1:])
        found["programs_from_disk"] = sum(step["time/programs_from_disk"] for step in steps)
        found["compile_s"] = sum(step["time/compile_s"] for step in steps)
    drift = [step.get("sampling/sampling_logp_difference/mean") for step in steps]
    found["series"] = {"end_s": ends, "reward": rewards}
    if drift[0]:
        found["largest_drift"] = max(value for value in drift if value is not None) / drift[0]
        found["series"]["drift"] = drift
    return found


def run_trl(config: Config, root: Path, rows: int, *, vllm: bool) -> None:
    """TRL's trainer on the settings of `config`; metrics.jsonl and summary.json go to `root`."""
    import datasets
    import peft
    import torch
    import transformers
    import trl
    from transformers import TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from jaxgrpo.tasks.data_sets import load_problems
    from jaxgrpo.tasks.rewards import load_reward

    grpo, optim, lora = config.grpo, config.optim, config.lora
    cuda = torch.cuda.is_available()
    rows = min(rows, grpo.rows_per_step)
    log = (root / "metrics.jsonl").open("w", buffering=1)
    ended: list[float] = []

    def messages(question: str) -> list[dict[str, str]]:
        turns = [{"role": "user", "content": question + config.data.prompt_suffix}]
        if config.data.system_prompt is None:
            return turns
        return [{"role": "system", "content": config.data.system_prompt}, *turns]

    def as_trl(name: str) -> Any:
        function = load_reward(name)

        def reward(completions: list[Any], answer: list[str], **_: Any) -> Any:
            return function([turns[0]["content"] for turns in completions], answer)

        reward.__name__ = name
        return reward

    class Record(TrainerCallback):
        """The end of a step, and then its line with what TRL logs of it."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            ended.append(time.time())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "reward" in logs:
                names = ("reward", "completions/mean_length", "step_time")
                names = (*names, "sampling/sampling_logp_difference/mean")
                line = {name: float(logs[name]) for name in names if name in logs}
                line |= {"step": state.global_step, "time": ended[-1]}
                log.write(json.dumps(line) + "\n")

    problems = load_problems(config.data, config.data.train_split)
    table = [{"prompt": messages(p.question), "answer": p.answer} for p in problems]
    arguments = GRPOConfig(
        output_dir=str(root / "trl"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=grpo.rows_per_step // rows,
        num_generations=grpo.group_size,
        max_completion_length=config.rollout.max_completion_tokens,
        chat_template_kwargs=config.data.chat_template_kwargs or None,
        max_steps=config.steps,
        learning_rate=optim.learning_rate,
        lr_scheduler_type=optim.schedule,
        warmup_steps=optim.warmup_steps,
        adam_beta1=optim.b1,
        adam_beta2=optim.b2,
        adam_epsilon=optim.eps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        loss_type=grpo.loss,
        scale_rewards=grpo.scale_rewards,
        epsilon=grpo.clip_eps_low,
        epsilon_high=grpo.clip_eps_high,
        delta=grpo.delta,
        beta=grpo.kl_coef,
        num_iterations=grpo.num_iterations,
        mask_truncated_completions=grpo.mask_truncated_completions,
        reward_weights=list(config.rewards.values()),
        temperature=config.rollout.temperature,
        seed=config.seed,
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "bfloat16" if cuda else "float32"},
        **({"use_vllm": True, "vllm_gpu_memory_utilization": 0.4} if vllm else {}),
    )
    adapter = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.scale_rule == "rslora",
        target_modules=list(lora.target_modules),
    )
    trainer = GRPOTrainer(
        model=config.model.path,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(table),
        reward_funcs=[as_trl(name) for name in config.rewards],
        peft_config=adapter,
        callbacks=[Record()],
    )
    trainer.train()
    log.close()
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    versions |= {"torch": torch.__version__, "peft": peft.__version__}
    if vllm:
        from importlib.metadata import version

        versions["vllm"] = version("vllm")
    peak = torch.cuda.max_memory_allocated() if cuda else None
    summary = {"peak_memory_bytes": peak, "versions": versions}
    (root / "summary.json").write_text(json.dumps(summary))


def show(found: dict[str, dict[str, Any]], passes: float) -> None:
    """The figures side by side, and how many times as long the peer takes."""
    table = Table(title=f"{found['jaxgrpo']['steps']} steps from process start", min_width=60)
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    for key, words in ROWS.items():
        values = [figure.get(key) for figure in found.values()]
        if any(value is not None for value in values):
            label = f"{words} {passes:g}" if key == "passes_s" else words
            table.add_row(label, *("" if v is None else _number(v) for v in values))
    console = Console()
    console.print(table)
    for name, figure in found.items():
        versions = ", ".join(f"{what} {value}" for what, value in figure["versions"].items())
        console.print(f"{name}: {versions}", highlight=False, soft_wrap=True)
    ours, *peers = found.values()
    for name, peer in zip(list(found)[1:], peers, strict=True):
        for key in ("mean_step_s", "passes_s"):
            if ours.get(key) and peer.get(key):
                times = peer[key] / ours[key]
                console.print(f"{name} takes {times:.2f} times as long: {ROWS[key]}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
