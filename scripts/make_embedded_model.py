r"""Trains the embedded model: a small Qwen2 that gives quickstart and tests something to improve.

The model in `jaxgrpo/assets/embedded` is a normal Hugging Face directory: Qwen2 with byte-level
BPE, trained from scratch on the train split of `jaxgrpo.tasks.problems` and on nothing else. It is
not Qwen2.5 and says nothing about how well Qwen2.5 learns; it exists so that a whole GRPO run fits
in two minutes on two CPU cores, without a download.

It is made to leave GRPO room on purpose, and this is how. Each demonstration answers in one of two
styles: most are *hasty* (the bare answer, ``#### 24``, no working) and the others *careful* (the
worked steps, then the answer). The model cannot work out two or three steps in one go reliably, so
its hasty answers are often wrong and its careful ones mostly right. Greedy decoding mostly takes
the more common hasty style and scores about half; sampling at temperature 1 shows both styles, and
GRPO learns from the rewards alone that working things out pays. That is a small picture of a
pretrained model before reinforcement learning, whose better answers are already in reach of
sampling. Expect most of the gain to be that one change of habit, and only some of it better
arithmetic.

Accuracy of the model as shipped on 1,024 test problems: greedy 51.1 % (60 % of the answers hasty),
sampled 44.0 %; held to the hasty style 31.7 %, to the careful one 78.2 % (both greedy). Sixty GRPO
steps of 16 prompts by 8 completions at LoRA rank 8 (`python -m jaxgrpo.run` with its defaults) took
greedy from 52.7 to 84.2 % on 512 test problems.

Training stops at whichever comes first, the step limit or a greedy accuracy of `--target` (on
validation problems from the train split, none of them trained on): with more training the hasty
answers improve too, and there would be too little left to learn. The model that is then written,
rounded to bfloat16, is scored again on test problems, and nothing is written when its greedy
accuracy there falls outside `--window`.

Run with the `test` extra installed (torch, transformers, tokenizers):

    python scripts/make_embedded_model.py --device cpu

This is how the shipped model was made, by its 1,000 steps: 16 minutes on two CPU cores. The same
seed gives the same data in the same order; the weights also depend on the device and on PyTorch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxgrpo.tasks.problems import make_problems
from jaxgrpo.tasks.rewards import extract_answer, gold_answer

DEFAULT_OUT = Path(__file__).resolve().parents[1] / "jaxgrpo" / "assets" / "embedded"
MAX_COMPLETION_TOKENS = 64
MAX_BYTES = 8_000_000

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ANSWER_MARK = "####"
# Qwen2's own split: every digit is a token of its own.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# ChatML as in Qwen2.5, but without its default system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Seeds of make_problems, apart from each other so that no training problem is scored.
_VALIDATION_SEED, _TEST_SEED, _TRAIN_SEED = 1, 2, 1000


@dataclass(frozen=True)
class Example:
    """One problem as token ids: the rendered prompt and its two completions."""

    prompt: list[int]
    careful: list[int]
    hasty: list[int]


# -------------------------------------------------------------------------------------------------
# Tokenizer, model and data


def train_tokenizer(problems: Sequence[dict[str, str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE, split as Qwen2 splits, on the problems' text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[ENDOFTEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The roles are prompt text too; without them each would cost several tokens.
    roles = ["system\n", "user\n", "assistant\n"] * len(problems)
    texts = (text for problem in problems for text in (problem["question"], problem["answer"]))
    tokenizer.train_from_iterator(itertools.chain(roles, texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=ENDOFTEXT,
        additional_special_tokens=[IM_START, IM_END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_model(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> Qwen2ForCausalLM:
    """A freshly initialised Qwen2 of the size that the arguments say."""
    config = Qwen2Config(
        # A multiple of 64 suits every accelerator; the rows above the vocabulary stay unused.
        vocab_size=64 * math.ceil(len(tokenizer) / 64),
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=512,
        # What readers that do not know the key `rope_parameters` fall back to: all agree.
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        # Wider than Qwen2's 0.02, which starts so narrow a model off too close to zero.
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(IM_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(ENDOFTEXT),
    )
    return Qwen2ForCausalLM(config)


def _render(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(tokenizer: PreTrainedTokenizerBase, problems: Sequence[dict[str, str]]) -> list[Example]:
    """Token ids of every problem's prompt and of both completions, ended by ``<|im_end|>``."""
    answers = [problem["answer"] for problem in problems]
    columns = (
        [_render(tokenizer, problem["question"]) for problem in problems],
        [answer + IM_END for answer in answers],
        [answer[answer.index(ANSWER_MARK) :] + IM_END for answer in answers],
    )
    ids = [tokenizer(column, add_special_tokens=False)["input_ids"] for column in columns]
    return [Example(*row) for row in zip(*ids, strict=True)]


def training_problems(count: int, seed: int, held_out: Sequence[dict[str, str]]) -> list[dict]:
    """Train-split problems, made in parallel, less the held-out ones and repeats."""
    parts = 8
    seeds = [_TRAIN_SEED * (seed + 1) + part for part in range(parts)]
    with ProcessPoolExecutor() as pool:
        made = pool.map(make_problems, ["train"] * parts, [math.ceil(count / parts)] * parts, seeds)
        unique = {problem["question"]: problem for part in made for problem in part}
    for problem in held_out:
        unique.pop(problem["question"], None)
    return list(unique.values())


def batches(
    examples: Sequence[Example], batch: int, hasty_share: float, seed: int
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Endless batches of (prompt, completion); every pass draws order and styles anew."""
    order = list(range(len(examples)))
    draw = random.Random(seed)
    while True:
        draw.shuffle(order)
        for start in range(0, len(order) - batch + 1, batch):
            rows = [examples[index] for index in order[start : start + batch]]
            yield [
                (row.prompt, row.hasty if draw.random() < hasty_share else row.careful)
                for row in rows
            ]


# -------------------------------------------------------------------------------------------------
# Training


def _padded(rows: Sequence[tuple[list[int], list[int]]], pad: int, device: torch.device):
    """Right-padded inputs and their targets; -100, which the loss skips, on prompt and padding."""
    # Few different widths, so that the allocator can reuse its blocks.
    width = 8 * math.ceil((max(len(prompt) + len(done) for prompt, done in rows) - 1) / 8)
    inputs = torch.full((len(rows), width), pad)
    targets = torch.full((len(rows), width), -100)
    for row, (prompt, completion) in enumerate(rows):
        ids = torch.tensor(prompt + completion)
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def train_step(
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[tuple[list[int], list[int]]],
    micro_batch: int,
) -> torch.Tensor:
    """One update on the mean loss of all completion tokens of the batch.

    The rows go through in micro-batches of similar length, the short hasty ones apart from the
    careful ones: about a third less padding to compute, and small buffers, which a CPU needs.
    """
    by_length = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    count = sum(len(completion) for _, completion in rows)
    total = torch.zeros((), device=model.device)
    for start in range(0, len(rows), micro_batch):
        chunk = by_length[start : start + micro_batch]
        inputs, targets = _padded(chunk, model.config.pad_token_id, model.device)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        )
        (loss / count).backward()
        total += loss.detach() / count
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    progress = min(1.0, step / steps)
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * cosine * min(1.0, (step + 1) / warmup)


# -------------------------------------------------------------------------------------------------
# Scoring


@torch.no_grad()
def complete(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[dict[str, str]],
    style: str = "free",
    sample: bool = False,
    batch: int = 512,
) -> list[str]:
    """Completions of the problems: as the model likes ("free"), or held to one style.

    Hasty writes the answer mark for the model, careful forbids it as the first token.
    """
    (mark,) = tokenizer.encode(ANSWER_MARK, add_special_tokens=False)
    prefix = ANSWER_MARK if style == "hasty" else ""
    # Without top_k=0 some versions keep the 50 likeliest tokens only.
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
    settings = GenerationConfig(
        max_new_tokens=MAX_COMPLETION_TOKENS,
        do_sample=sample,
        **sampling,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        begin_suppress_tokens=[mark] if style == "careful" else None,
    )
    texts: list[str] = []
    for start in range(0, len(problems), batch):
        prompts = [_render(tokenizer, p["question"]) + prefix for p in problems[start:][:batch]]
        inputs = tokenizer(
            prompts,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
            return_token_type_ids=False,
        ).to(model.device)
        tokens = model.generate(**inputs, generation_config=settings)
        ends = tokens[:, inputs["input_ids"].shape[1] :]
        texts += [prefix + text for text in tokenizer.batch_decode(ends, skip_special_tokens=True)]
    return texts


def accuracy(completions: Sequence[str], problems: Sequence[dict[str, str]]) -> float:
    """The share of completions whose final answer is right."""
    right = [
        extract_answer(completion) == gold_answer(problem["answer"])
        for completion, problem in zip(completions, problems, strict=True)
    ]
    return sum(right) / len(right)


def score(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[dict[str, str]],
    sampled: bool,
) -> dict[str, float]:
    """Accuracies in percent, overall and per style, greedy and, where asked for, sampled."""
    model.eval()
    scores = {}
    for how in ("greedy", "sampled")[: 2 if sampled else 1]:
        for style in ("free", "hasty", "careful"):
            done = complete(model, tokenizer, problems, style, sample=how == "sampled")
            scores[f"{how}_{style}"] = round(100 * accuracy(done, problems), 1)
            if style == "free":
                hasty = sum(text.startswith(ANSWER_MARK) for text in done)
                scores[f"{how}_hasty_share"] = round(100 * hasty / len(done), 1)
    model.train()
    return scores


def token_lengths(examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """Median, 99th percentile and longest of the prompts and of both kinds of completion."""
    lengths = {}
    for field in ("prompt", "careful", "hasty"):
        sizes = sorted(len(getattr(example, field)) for example in examples)
        last = len(sizes) - 1
        lengths[field] = {"p50": sizes[last // 2], "p99": sizes[last * 99 // 100]}
        lengths[field]["max"] = sizes[last]
    return lengths


# -------------------------------------------------------------------------------------------------


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Writes the Hugging Face directory, weights in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Transformers 5 writes names that transformers 4 cannot read; both read these.
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = [IM_START, IM_END]
    for key in ("extra_special_tokens", "backend"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # The weights come out readable by their owner alone.
    (out / "model.safetensors").chmod(0o644)


def reload(out: Path, device: torch.device) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
    """What a user of the directory gets, computing in float32 as jaxgrpo's own reader does."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    return model.to(device), AutoTokenizer.from_pretrained(out)


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    validation: Sequence[dict[str, str]],
    args: argparse.Namespace,
) -> None:
    """Trains until the greedy accuracy reaches the target or the steps are used up."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05
    )
    started, losses = time.monotonic(), []
    data = batches(examples, args.batch, args.hasty_share, args.seed)
    for step, rows in zip(range(args.steps), data, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        losses.append(train_step(model, optimizer, rows, args.micro_batch))
        if (step + 1) % args.evaluate_every and step + 1 < args.steps:
            continue
        scores = score(model, tokenizer, validation, sampled=False)
        loss = torch.stack(losses).mean().item()
        losses.clear()
        seconds = time.monotonic() - started
        print(f"step {step + 1}  loss {loss:.4f}  {seconds:.0f} s  {scores}", flush=True)
        if scores["greedy_free"] >= args.target:
            print(f"greedy accuracy reached the target of {args.target} %", flush=True)
            return


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; its defaults are how the embedded model was made."""
    parser = argparse.ArgumentParser(
        description="Trains the embedded model and writes it as a Hugging Face directory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where to write")
    parser.add_argument("--steps", type=int, default=1600, help="updates at most")
    parser.add_argument("--batch", type=int, default=128, help="demonstrations per update")
    parser.add_argument("--micro-batch", type=int, default=32, help="of these at once in memory")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--problems", type=int, default=200_000, help="training problems")
    parser.add_argument("--hasty-share", type=float, default=0.65, help="share of bare answers")
    parser.add_argument("--target", type=float, default=52.0, help="greedy accuracy to stop at, %%")
    parser.add_argument("--window", type=float, nargs=2, default=(35.0, 65.0), help="accepted, %%")
    parser.add_argument("--evaluate-every", type=int, default=200, help="updates between scores")
    parser.add_argument("--evaluate-problems", type=int, default=256, help="held-out problems")
    parser.add_argument("--vocab", type=int, default=640, help="vocabulary at most")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--mlp", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="cpu or cuda")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, scores and writes the model; returns 1 when it is not fit to be written."""
    args = parse_args(argv)
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    validation = make_problems("train", args.evaluate_problems, seed=_VALIDATION_SEED)
    test = make_problems("test", args.evaluate_problems, seed=_TEST_SEED)

    problems = training_problems(args.problems, args.seed, validation)
    tokenizer = train_tokenizer(problems[:20_000], args.vocab)
    examples = encode(tokenizer, problems)
    model = build_model(tokenizer, args).to(device)
    print(f"{len(examples)} problems, {len(tokenizer)} tokens, {model.num_parameters()} parameters")
    print(f"token lengths: {json.dumps(token_lengths(examples))}", flush=True)
    train(model, tokenizer, examples, validation, args)

    # Scored as written and read back, since the rounding to bfloat16 costs accuracy too.
    draft = args.out.with_name(args.out.name + ".draft")
    save(model, tokenizer, draft)
    torch.manual_seed(args.seed)
    scores = score(*reload(draft, device), test, sampled=True)
    print(f"test: {json.dumps(scores)}")
    size = sum(path.stat().st_size for path in draft.iterdir())
    low, high = args.window
    if not low <= scores["greedy_free"] <= high or size > MAX_BYTES:
        shutil.rmtree(draft)
        print(
            f"not written: greedy accuracy {scores['greedy_free']} % must lie in {low}-{high} % "
            f"and the size, {size} bytes, within {MAX_BYTES}",
            file=sys.stderr,
        )
        return 1
    shutil.rmtree(args.out, ignore_errors=True)
    draft.rename(args.out)
    print(f"wrote {args.out} ({size} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
