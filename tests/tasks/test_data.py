"""Data: every source, errors that say where, an order made of (seed, step) alone, padding."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxgrpo.config import ConfigError, DataConfig
from jaxgrpo.model.weights import EMBEDDED_DIR
from jaxgrpo.tasks.data import (
    EMBEDDED_EVAL_PROBLEMS,
    Problem,
    PromptSource,
    check_gold_answers,
    load_problems,
    train_rows,
)
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


def write(path, rows):
    """The rows in the form that the file's suffix names."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path, **settings):
    return load_problems(DataConfig(path=str(path), **settings), "train")


def test_embedded_problems_are_generated_and_the_splits_are_disjoint():
    config = DataConfig(embedded_problems=50)
    train, test = load_problems(config, "train"), load_problems(config, "test")
    assert (len(train), len(test)) == (50, EMBEDDED_EVAL_PROBLEMS)
    assert [problem.index for problem in train] == list(range(50))
    assert not {problem.question for problem in train} & {problem.question for problem in test}
    check_gold_answers([*train, *test], "embedded", "gsm8k_answer")
    with pytest.raises(ConfigError, match="splits train and test, not 'dev'"):
        load_problems(config, "dev")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_kind_of_file_gives_the_same_problems(tmp_path, suffix):
    expected = [Problem(row["question"], row["answer"], i) for i, row in enumerate(ROWS)]
    assert load(write(tmp_path / f"problems{suffix}", ROWS)) == expected
    write(tmp_path / f"train{suffix}", ROWS)
    assert load(tmp_path) == expected


def test_a_directory_is_searched_for_the_split(tmp_path):
    write(tmp_path / "train.jsonl", ROWS[:2])
    write(tmp_path / "test.json", ROWS[2:])
    config = DataConfig(path=str(tmp_path))
    assert [len(load_problems(config, split)) for split in ("train", "test")] == [2, 3]
    with pytest.raises(ConfigError, match=r"holds no dev\.jsonl, dev\.json or dev\.parquet"):
        load_problems(config, "dev")


def test_columns_are_named_and_numbers_become_text(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"q": "1+1?", "a": 2}, {"q": "1/2?", "a": 0.5}])
    problems = load(path, prompt_column="q", answer_column="a")
    assert problems == [Problem("1+1?", "2", 0), Problem("1/2?", "0.5", 1)]


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_a_number_in_a_column_of_any_precision_is_the_number_that_was_written(tmp_path, kind):
    import pyarrow
    import pyarrow.parquet

    written = [0.1, 2.5, 3.0, 1234.0, -0.7]
    columns = {"question": ["q"] * 5, "answer": pyarrow.array(np.array(written, kind))}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "d.parquet")
    assert [problem.answer for problem in load(tmp_path / "d.parquet")] == [str(x) for x in written]


def test_a_missing_number_is_no_answer(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for answers in ([1.0, float("nan")], [1.0, None]):
        columns = {"question": ["q"] * 2, "answer": pyarrow.array(answers, "float32")}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "d.parquet")
        with pytest.raises(ConfigError, match="row 1 has no answer in 'answer'"):
            load(tmp_path / "d.parquet")


def test_blank_lines_are_passed_over_and_line_separators_in_text_are_not_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    row = json.dumps({"question": "a\u2028b\x85c", "answer": "1"}, ensure_ascii=False)
    path.write_text(f"\n{row}\n\n{row}\n", encoding="utf-8")
    assert [problem.question for problem in load(path)] == ["a\u2028b\x85c"] * 2


GOOD = '{"question": "a", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", GOOD + "\n{broken\n", r"d\.jsonl:3 is not JSON"),
        ("d.jsonl", GOOD + "[1]\n", r"d\.jsonl: record 2 is not an object"),
        ("d.jsonl", '{"questoin": "a", "answer": "1"}', "no column 'question'; did you mean 'ques"),
        ("d.jsonl", '{"question": "a", "anwser": "1"}', "no column 'answer'; did you mean 'anws"),
        ("d.jsonl", GOOD + '{"question": " ", "answer": "1"}', "row 1 has no text in 'question'"),
        ("d.jsonl", GOOD + '{"question": 7, "answer": "1"}', "row 1 has no text in 'question'"),
        ("d.jsonl", GOOD + '{"question": "a"}', "row 1 has no answer in 'answer'"),
        ("d.jsonl", GOOD + '{"question": "a", "answer": [1]}', "row 1 has no answer"),
        ("d.jsonl", "", "is empty"),
        ("d.jsonl", b"\xff\xfe", r"d\.jsonl is unreadable"),
        ("d.json", "{", r"d\.json is not JSON"),
        ("d.json", "{}", "must hold a list of objects"),
        ("d.json", "[1]", "record 1 is not an object"),
        ("d.parquet", "PAR1", r"d\.parquet is unreadable"),
        ("d.csv", "question,answer", r"d\.csv is none of \.jsonl, \.json, \.parquet"),
    ],
)
def test_bad_data_is_told_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "problems.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"does not exist; did you mean .*problems\.jsonl"):
        load(tmp_path / "problem.jsonl")


def test_a_gold_answer_without_a_number_is_refused_with_its_row():
    problems = [Problem("a", "#### 1", 0), Problem("b", "#### unknown", 1)]
    with pytest.raises(ConfigError, match=r"^here: row 1: "):
        check_gold_answers(problems, "here", "gsm8k_answer")


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
    assert prompts.dropped_message.startswith("2 of 5 prompts are longer than")
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
    check_gold_answers([*train, *test], "gsm8k", "gsm8k_answer")
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
