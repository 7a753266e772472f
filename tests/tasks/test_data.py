"""Data: every source, errors that say where, an order made of (seed, step) alone, padding."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxgrpo.config import ConfigError, DataConfig
from jaxgrpo.model.weights import EMBEDDED_DIR
from jaxgrpo.tasks.data import PromptSource, train_rows
from jaxgrpo.tasks.data_sets import Problem, answered_problems, load_problems
from jaxgrpo.tasks.problems import make_problems
from jaxgrpo.tasks.texts import load_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
QWEN_TOKENIZER = Path(os.environ.get("JAXGRPO_QWEN_TOKENIZER", SHARED / "qwen2.5-tokenizer"))
GSM8K = Path(os.environ.get("JAXGRPO_GSM8K", SHARED / "gsm8k"))
ROWS = make_problems("train", 5)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED_DIR)


def source(tokenizer, lengths, **settings):
    """Prompts of as many distinct questions, question i repeating a word lengths[i] times."""
    problems = [Problem(f"{i}" + " is" * n, f"#### {i}", i) for i, n in enumerate(lengths)]
    return PromptSource(problems, tokenizer, DataConfig(**settings))


def test_the_order_follows_from_seed_and_step_alone(tokenizer):
    prompts, again = source(tokenizer, [1] * 20), source(tokenizer, [1] * 20)
    late = again.batch(0, 17, 3)
    for step in range(17):
        prompts.batch(0, step, 3)
    assert prompts.batch(0, 17, 3).indices == late.indices
    np.testing.assert_array_equal(prompts.batch(0, 17, 3).tokens, late.tokens)
    orders = {tuple(prompts.batch(seed, 0, 20).indices) for seed in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("count", [1, 3, 7, 10, 16])
def test_every_problem_comes_once_per_epoch_whatever_the_batch(tokenizer, count):
    prompts = source(tokenizer, [1] * 10)
    seen = [i for step in range(10) for i in prompts.batch(4, step, count).indices]
    epochs = [seen[start : start + 10] for start in range(0, 10 * count, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    # The order of problems is that of a batch of one, cut elsewhere.
    assert seen[:10] == [prompts.batch(4, step, 1).indices[0] for step in range(10)]


def test_prompts_are_padded_on_the_left_to_whole_buckets(tokenizer):
    prompts = source(tokenizer, [1, 30, 2, 12], prompt_bucket_tokens=16)
    batch = prompts.batch(0, 0, 4)
    lengths = batch.mask.sum(axis=1)
    width = batch.tokens.shape[1]
    assert width % 16 == 0 and width - 16 < lengths.max() <= width
    assert len(set(lengths.tolist())) > 1
    for row, length in enumerate(lengths):
        assert batch.mask[row].tolist() == [False] * (width - length) + [True] * length
        assert not batch.tokens[row, : width - length].any()
        text = tokenizer.decode(batch.tokens[row, width - length :])
        assert text == batch.texts[row]
        assert f"user\n{batch.indices[row]} is" in text
        assert batch.answers[row] == f"#### {batch.indices[row]}"


def test_all_batches_of_a_split_are_as_wide_as_its_longest_prompt(tokenizer):
    """Or a later batch would need programs of its own."""
    lengths = range(1, 40)
    prompts = source(tokenizer, lengths, prompt_bucket_tokens=32)
    batches = [prompts.batch(0, step, 1) for step in range(len(lengths))]
    longest = max(batch.mask.sum() for batch in batches)
    assert {batch.tokens.shape for batch in batches} == {(1, -(-longest // 32) * 32)}
    assert prompts.sequential(0, 4, 4)[0].tokens.shape[1] == batches[0].tokens.shape[1]


def test_prompts_that_are_too_long_are_dropped_and_counted(tokenizer):
    prompts = source(tokenizer, [1, 50, 2, 60, 3], max_prompt_tokens=30)
    assert (len(prompts), prompts.dropped) == (3, 2)
    [line] = prompts.left_out
    assert line.startswith("2 of 5 prompts are longer than")
    assert Counter(prompts.batch(0, 0, 3).indices) == Counter([0, 2, 4])
    with pytest.raises(ConfigError, match=r"every prompt is longer .*=3; the shortest has"):
        source(tokenizer, [1, 2], max_prompt_tokens=3)


def test_a_prompt_of_exactly_the_limit_is_kept(tokenizer):
    length = int(source(tokenizer, [9]).batch(0, 0, 1).mask.sum())
    assert source(tokenizer, [9], max_prompt_tokens=length).dropped == 0
    assert source(tokenizer, [1, 9], max_prompt_tokens=length - 1).dropped == 1


def test_sequential_goes_through_the_front_and_fills_the_last_batch(tokenizer):
    prompts = source(tokenizer, [1] * 12)
    batches = [prompts.sequential(start, 4, 10) for start in range(0, 10, 4)]
    assert [real for _, real in batches] == [4, 4, 2]
    assert {batch.tokens.shape[0] for batch, _ in batches} == {4}
    assert [i for batch, real in batches for i in batch.indices[:real]] == list(range(10))
    assert batches[-1][0].indices == [8, 9, 0, 1]
    tiny, real = prompts.sequential(0, 8, 3)
    assert (tiny.indices, real) == ([0, 1, 2, 0, 1, 2, 0, 1], 3)


def test_train_rows_hold_prompt_and_completion_without_gaps(tokenizer):
    group, width = 2, 5
    batch = source(tokenizer, [1, 9, 4], prompt_bucket_tokens=16).batch(0, 0, 3)
    completions = np.arange(1, 6 * width + 1, dtype=np.int32).reshape(6, width) + 100
    lengths = np.array([5, 1, 3, 2, 0, 4])
    tokens, prompt_lengths = train_rows(batch, completions, lengths, group)
    assert tokens.shape == (6, batch.tokens.shape[1] + width) and tokens.dtype == np.int32
    for row in range(6):
        prompt = batch.tokens[row // group][batch.mask[row // group]].tolist()
        assert prompt_lengths[row] == len(prompt)
        whole = [*prompt, *completions[row, : lengths[row]].tolist()]
        assert tokens[row].tolist() == whole + [0] * (tokens.shape[1] - len(whole))


@pytest.mark.skipif(
    not (QWEN_TOKENIZER.is_dir() and GSM8K.is_dir()),
    reason="needs Qwen2.5's tokenizer (JAXGRPO_QWEN_TOKENIZER) and GSM8K (JAXGRPO_GSM8K)",
)
def test_gsm8k_through_the_tokenizer_of_qwen():
    tokenizer = load_tokenizer(QWEN_TOKENIZER)
    config = DataConfig(path=str(GSM8K), system_prompt="Reason, then answer.", prompt_suffix="\n!")
    train, test = load_problems(config, "train"), load_problems(config, "test")
    assert (len(train), len(test)) == (7473, 1319)
    assert answered_problems([*train, *test], "all", ["gsm8k_answer"], config)[1] == []
    prompts = PromptSource(test, tokenizer, config)
    assert prompts.dropped == 0
    batch, real = prompts.sequential(0, 2, 2)
    assert real == 2 and batch.answers[0].endswith("#### 18")
    assert batch.texts[0] == (
        "<|im_start|>system\nReason, then answer.<|im_end|>\n"
        f"<|im_start|>user\n{test[0].question}\n!<|im_end|>\n<|im_start|>assistant\n"
    )
    row = batch.tokens[0][batch.mask[0]]
    assert tokenizer.decode(row) == batch.texts[0]
    assert row[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
