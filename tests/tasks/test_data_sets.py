"""Data sets: every kind of file, what is wrong with one, and rows without an answer."""

import json

import numpy as np
import pytest

from jaxgrpo.config import ConfigError, DataConfig
from jaxgrpo.model.weights import EMBEDDED_DIR
from jaxgrpo.tasks.data import PromptSource
from jaxgrpo.tasks.data_sets import (
    EMBEDDED_EVAL_PROBLEMS,
    Problem,
    answered_problems,
    load_problems,
)
from jaxgrpo.tasks.problems import make_problems
from jaxgrpo.tasks.texts import load_tokenizer

ROWS = make_problems("train", 5)


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
    assert answered_problems([*train, *test], "all", ["gsm8k_answer"], config)[1] == []
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
    with pytest.raises(ConfigError, match=r"^test: row 1: .*drop_rows_without_answer=true leaves"):
        answered_problems(problems, "test", ["format", "gsm8k_answer"], DataConfig())


def test_rows_without_an_answer_are_left_out_and_counted_where_the_user_says_so(tmp_path):
    rows = [
        {"question": "a", "answer": "so \\boxed{1}"},
        {"question": "b", "answer": "it is\nunknown"},
        {"question": "c"},
        {"question": "d", "answer": "P: \\boxed{(0,0)}\nQ: where is it then?\n\\boxed{30}"},
        {"question": "e", "answer": " "},
    ]
    config = DataConfig(path=str(write(tmp_path / "d.jsonl", rows)), drop_rows_without_answer=True)
    problems = load_problems(config, "train")
    kept, [line] = answered_problems(problems, "train", ["math_boxed"], config)
    assert [problem.index for problem in kept] == [0, 3]
    assert line.startswith("train: 3 of 5 rows have no gold answer") and line.endswith(": 1, 2, 4")
    assert PromptSource(kept, load_tokenizer(EMBEDDED_DIR), config, [line]).left_out == [line]
    kept, _ = answered_problems(problems, "train", ["sums:last_word"], config)
    assert [problem.index for problem in kept] == [0, 1, 3]
    with pytest.raises(ConfigError, match=r"^train: no row's 'answer' holds an answer"):
        answered_problems(problems[1:3], "train", ["math_boxed"], config)


@pytest.mark.parametrize("name", ["name", "revision"])
def test_what_only_a_hub_has_is_refused_beside_local_problems(tmp_path, name):
    rows = tmp_path / "train.jsonl"
    rows.write_text(json.dumps({"question": "a", "answer": "#### 1"}) + "\n")
    for path, why in ((rows, "is local"), (tmp_path, "is local"), ("embedded", "are generated")):
        config = DataConfig(path=str(path), **{name: "main"})
        with pytest.raises(ConfigError, match=f"data.{name}=main needs a hub id.*{why}"):
            load_problems(config, "train")
