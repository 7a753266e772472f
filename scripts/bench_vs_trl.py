"""The same GRPO step by this package and by TRL's GRPOTrainer, one after the other on one device.

    python scripts/bench_vs_trl.py [--rows ROWS] [--out FILE] [key=value ...]

Settings are those of `python -m jaxgrpo.run bench step`: model shapes (random weights), prompts,
group, completion length, LoRA rank. TRL samples with transformers' generate, trains ROWS rows at a
time (default 32; pick what suits it), keeps activations and uses sdpa attention. Each runs in a
process of its own, so that neither finds memory taken by the other. The ratio is that of median
step times after the first step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxgrpo.bench.settings import BenchConfig
from jaxgrpo.commands.bench import BENCH
from jaxgrpo.commands.command import parse_settings

PAD, STOP, WORDS = 0, 1, 2
"""Token ids: padding, end of text, and the first of the prompts' words."""

PROMPT_WORDS = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32, help="rows that TRL trains at a time")
    parser.add_argument("--out", type=Path, help="also write the figures to this file, as JSON")
    parser.add_argument("--run", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if args.run is not None:
        config = parse_settings("bench", BENCH, args.settings)
        figures = run_ours(config) if args.run == "ours" else run_trl(config, args.rows)
        args.out.write_text(json.dumps(figures))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in ("ours", "trl"):
            out = Path(directory) / name
            words = [__file__, "--run", name, "--rows", str(args.rows), "--out", str(out)]
            subprocess.run([sys.executable, *words, *args.settings], check=True)
            found[name] = json.loads(out.read_text())
    found["ratio"] = found["trl"]["step_s"] / found["ours"]["step_s"]
    for name in ("ours", "trl"):
        print(name, ", ".join(f"{key} {value}" for key, value in found[name].items()))
    print(f"TRL takes {found['ratio']:.2f} times as long")
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2))


def run_ours(config: BenchConfig) -> dict[str, Any]:
    from jaxgrpo.bench.measure import run_bench

    return run_bench(config)


def run_trl(config: BenchConfig, rows: int) -> dict[str, Any]:
    """TRL's trainer on the same shapes; rewards are random, as nobody learns here."""
    import datasets
    import peft
    import torch
    import transformers
    import trl
    from transformers import TrainerCallback

    cuda = torch.cuda.is_available()
    steps = config.bench.repeats + 1
    rows = min(rows, config.grpo.rows_per_step)
    words = [f"w{i}" for i in range(PROMPT_WORDS)]
    count = config.grpo.prompts_per_step * steps
    prompts = [
        {"prompt": " ".join(random.choices(words, k=config.bench.prompt_tokens))}
        for _ in range(count)
    ]
    started: list[float] = []
    seconds: list[float] = []

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Stopwatch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            started.append(now())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(now() - started[-1])

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [random.random() for _ in completions]

    with tempfile.TemporaryDirectory() as directory:
        arguments = trl.GRPOConfig(
            output_dir=directory,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=config.grpo.rows_per_step // rows,
            num_generations=config.grpo.group_size,
            max_completion_length=config.rollout.max_completion_tokens,
            max_steps=steps,
            bf16=cuda,
            use_cpu=not cuda,
            gradient_checkpointing=False,
            report_to=[],
            beta=config.grpo.kl_coef,
            temperature=config.rollout.temperature,
            save_strategy="no",
            logging_steps=steps,
            disable_tqdm=True,
        )
        adapter = peft.LoraConfig(
            r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules="all-linear"
        )
        trainer = trl.GRPOTrainer(
            model=torch_model(config, "cuda" if cuda else "cpu"),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(prompts),
            processing_class=word_tokenizer(words),
            reward_funcs=reward,
            peft_config=adapter,
            callbacks=[Stopwatch()],
        )
        trainer.train()
    found = {
        "step_s": statistics.median(seconds[1:]),
        "first_step_s": seconds[0],
        "trl": trl.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    if cuda:
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def torch_model(config: BenchConfig, device: str) -> Any:
    """The same shapes with random weights, in bfloat16 on a GPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from jaxgrpo.bench.measure import bench_model
    from jaxgrpo.devices import ONE_CPU
    from jaxgrpo.model.hf_config import config_fields

    shapes = AutoConfig.for_model(
        **config_fields(bench_model(config, ONE_CPU)),
        max_position_embeddings=32768,
        pad_token_id=PAD,
        eos_token_id=STOP,
        bos_token_id=STOP,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(shapes, dtype=dtype)
    made.generation_config = GenerationConfig(
        eos_token_id=STOP, pad_token_id=PAD, bos_token_id=STOP
    )
    return made


def word_tokenizer(words: list[str]) -> Any:
    """One token a word, so that prompts have the length asked for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"<pad>": PAD, "<stop>": STOP} | {word: WORDS + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<stop>", pad_token="<pad>", padding_side="left"
    )


if __name__ == "__main__":
    main()
