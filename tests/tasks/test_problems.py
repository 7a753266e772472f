"""The problem generator: the same everywhere, splits apart, answers that work out."""

from __future__ import annotations

import hashlib
import re

import pytest

from jaxgrpo.tasks.problems import make_problems, split_of
from jaxgrpo.tasks.rewards import extract_answer, gold_answer

_EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


@pytest.fixture(scope="module")
def train():
    return make_problems("train", 3000)


@pytest.fixture(scope="module")
def test():
    return make_problems("test", 1500)


def test_the_same_arguments_give_the_same_problems(train):
    assert make_problems("train", 300) == train[:300]
    assert make_problems("train", 300, seed=1) != train[:300]


def test_problems_never_change():
    # Published accuracies name these problems; a change here makes them incomparable.
    problems = make_problems("train", 100, seed=3) + make_problems("test", 100, seed=3)
    text = "\n\n".join(f"{p['question']}\n{p['answer']}" for p in problems)
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "4e068963c3fc19b2f37aed470f6bced9a45221753f12c5aaccaeb9568105a41d"
    )


def test_splits_share_no_question(train, test):
    trained = {problem["question"] for problem in train}
    # The same seed draws the same candidates, the hardest case for keeping splits apart.
    assert not trained & {problem["question"] for problem in test}
    assert all(split_of(problem["question"]) == "train" for problem in train)
    assert all(split_of(problem["question"]) == "test" for problem in test)


def test_questions_do_not_repeat(train):
    assert len({problem["question"] for problem in train}) == len(train)


def test_worked_steps_are_right_and_lead_to_the_answer(train, test):
    for problem in train + test:
        *lines, last = problem["answer"].split("\n")
        assert 2 <= len(lines) <= 3
        result = None
        for line in lines:
            (equation,) = _EQUATION.findall(line)
            left, operator, right, result = equation
            left, right, result = int(left), int(right), int(result)
            expected = {
                "+": left + right,
                "-": left - right,
                "*": left * right,
                "/": left / right,
            }[operator]
            assert expected == result, line
            assert 2 <= result <= 150
        assert last == f"#### {result}"


def test_numbers_of_the_first_step_come_from_the_question(train):
    for problem in train[:500]:
        left, _, right, _ = _EQUATION.findall(problem["answer"])[0]
        given = set(re.findall(r"\d+", problem["question"]))
        assert {left, right} <= given, problem


def test_no_placeholder_is_left(train):
    for problem in train:
        assert set(problem) == {"question", "answer"}
        assert not re.search(r"[][{}|]", problem["question"] + problem["answer"])
        assert problem["question"].endswith("?")


def test_rewards_read_the_answer(train):
    for problem in train[:200]:
        assert extract_answer(problem["answer"]) == gold_answer(problem["answer"])


def test_problems_are_varied(train):
    skeletons = {re.sub(r"\d+", "0", problem["question"]) for problem in train}
    operators = set(re.findall(r"[-+*/](?=\d)", "".join(p["answer"] for p in train)))
    assert len(skeletons) > 2000
    assert operators == set("+-*/")


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        make_problems("dev", 1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="-1"):
        make_problems("test", -1)
    assert make_problems("test", 0) == []
