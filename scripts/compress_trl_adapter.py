"""A PEFT adapter made and trained with TRL, compressed here to a quarter: what does it cost?

    python scripts/compress_trl_adapter.py OUT [--steps 50] [--parameters 0.25]

TRL's SFTTrainer trains rank-16 LoRA adapters of every projection of the embedded model on worked
answers; `jaxgrpo compress` cuts them, and `jaxgrpo eval` measures base, trained and compressed
adapter on the same held-out problems. Needs the extra `test` (torch, PEFT, TRL).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jaxgrpo.config import MODULES
from jaxgrpo.model.peft_files import read_peft
from jaxgrpo.model.weights import EMBEDDED_DIR
from jaxgrpo.run import main as jaxgrpo
from jaxgrpo.tasks.problems import make_problems

PROBLEMS = 8192


def train(out: Path, steps: int) -> None:
    """Writes the adapter that TRL trains to `out`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_DIR)
    rows = [
        {
            "prompt": tokenizer.apply_chat_template(
                [{"role": "user", "content": problem["question"]}],
                tokenize=False,
                add_generation_prompt=True,
            ),
            "completion": problem["answer"] + tokenizer.eos_token,
        }
        for problem in make_problems("train", PROBLEMS)
    ]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(EMBEDDED_DIR, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(out / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=25,
            completion_only_loss=True,
            max_length=128,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            seed=0,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=list(MODULES)),
    )
    trainer.train()
    trainer.save_model(str(out))


def accuracy(run_dir: Path, *settings: str) -> float:
    """Of a policy on the held-out problems, all of them."""
    code = jaxgrpo(["eval", f"run_dir={run_dir}", *settings])
    if code:
        raise SystemExit(code)
    written = run_dir.glob("evaluations/*/step_000000.json")
    newest = max(written, key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text())["eval/accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--parameters", type=float, default=0.25)
    args = parser.parse_args()
    whole, small = args.out / "trained", args.out / "compressed"
    train(whole, args.steps)
    code = jaxgrpo(["compress", str(whole), f"out={small}", f"parameters={args.parameters}"])
    if code:
        raise SystemExit(code)
    scores = {"base model": accuracy(args.out / "base")}
    for name, path in (("trained with TRL", whole), ("compressed", small)):
        scores[name] = accuracy(args.out / f"eval_{path.name}", f"lora.adapter={path}")
    before, after = (read_peft(path).parameters for path in (whole, small))
    print(f"parameters {before:,} -> {after:,} ({1 - after / before:.1%} fewer)")
    for name, score in scores.items():
        print(f"accuracy {name}: {score:.1%}")


if __name__ == "__main__":
    main()
