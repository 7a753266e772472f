"""How answers are judged: docs/own_tasks.md's tables, and completions kept from real runs."""

import json
import random
import re
import time
import warnings
from fractions import Fraction

import pytest

from jaxgrpo.tasks.answers import extract_answer, gold_answer
from jaxgrpo.tasks.math_boxed import gold_math_answer, math_boxed_reward
from jaxgrpo.tasks.math_notation import comparisons, plain_math
from jaxgrpo.tasks.rewards import REWARDS, gsm8k_answer_reward
from tests.test_layout import ROOT

JUDGED = ROOT / "tests" / "data" / "judged_completions.jsonl"
"""Completions of real models, each judged by a person: reward, completion, answer, right."""


def documented(header: str) -> list[list[str]]:
    """The rows of the table in docs/own_tasks.md whose header line begins so, as plain text."""
    lines = (ROOT / "docs" / "own_tasks.md").read_text("utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(header))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


READ = documented("| completion | number |")
COMPARED = documented("| gold | in the completion's box |")


@pytest.mark.parametrize(("completion", "number"), [row[:2] for row in READ])
def test_documented_readings(completion: str, number: str):
    text = re.sub(" ?⏎ ?", "\n", completion)
    assert extract_answer(text) == (None if number == "–" else Fraction(number))


def verdicts(pairs: list[tuple[str, str]]) -> list[bool]:
    golds, given = zip(*pairs, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of these takes three seconds
        rewards = math_boxed_reward([rf"So it is \boxed{{{text}}}." for text in given], golds)
    return [reward == 1.0 for reward in rewards]


def test_documented_comparisons():
    pytest.importorskip("math_verify")
    found = verdicts([(gold, answer) for gold, answer, *_ in COMPARED])
    wrong = [row for row, right in zip(COMPARED, found, strict=True) if right != bool(int(row[2]))]
    assert wrong == []
    assert len(COMPARED) > 30


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # labels
        ("Let me restate.\nQuestion: how many?\nShe has 9 * 2.\n#### 18", "18"),
        ("The answer to part 1 is 100.\nQ1: 100\nQ2: 200\n#### 300", "300"),
        ("The answer is 18.\n\nQuestion: Bob has 3 eggs and eats 2\n#### 1", "18"),
        ("18\nQuestion: how many?\n#### 7", "18"),
        ("#### 18\n\nHuman: and now please add three to it\n#### 21", "18"),
        ("#### 18\nQ:\nBob has 3 eggs. How many?\n#### 3", "18"),
        (r"\boxed{\text{Monday}}" + "\nQuestion: and the date?\n#### 7", None),
        # units, scales, powers, ordinals
        ("#### 12 m\u00b2", "12"),
        ("#### 12 cm3", "12"),
        (r"\boxed{15\,\mathrm{m}^{3}}", "15"),
        ("#### 3ab^2", None),
        ("#### $5m", "5000000"),
        ("#### $5m$", "5"),
        ("#### $1.2bn", "1200000000"),
        ("#### $5 M&Ms", "5"),
        ("#### 2**8", "256"),
        (r"\boxed{10^{-2}}", "1/100"),
        (r"\boxed{-2^2}", "-4"),
        (r"\boxed{1/2^3}", None),
        (r"\boxed{2^x}", None),
        (r"\boxed{2^{3^2}}", None),
        (r"\boxed{0^{-1}}", None),
        (r"\boxed{9^{999}}", None),
        ("#### 1^{st}", "1"),
        (r"\boxed{1~000}", "1000"),
        ("#### ~18", "18"),
        # shares and unmarked prose
        ("The answer is 1/2 of 30.", None),
        ("The answer is 20% of his income.", "20"),
        ("The answer is 3 of the 5 eggs", "3"),
        ("A: 20% of 30 is 6. She has 24 left.", None),
        ("20% of 30 is 6", None),
        ("about $18 per day.", "18"),
    ],
)
def test_readings(text: str, value: str | None):
    assert extract_answer(text) == (None if value is None else Fraction(value))


RIGHT = [
    (r"\text{Tuesday}", "Tuesday."),
    (r"\text{Tuesday}", r"\text{Tuesday.}"),
    (r"\text{June 20}", "June 20"),
    (r"3\sqrt{13}", "3√(13)"),
    (r"\frac{\sqrt{13}}{2}", "√13/2"),
    (r"\sqrt[3]{5}", "∛5"),
    ("x^2", "x²"),
    ("10^{-3}", "10⁻³"),
    ("x_1", "x₁"),
    ("(-1, 2)", "(–1, 2)"),
    (r"\frac{3}{2}", "1½"),
    (r"17.5\%", "17.5 percent"),
    (r"33\frac13\%", r"33\frac13"),
    ("12000", "12~000"),
    ("1234567.5", "1,234,567.5"),
    (r"(1\,000, 2)", "(1000, 2)"),
    (r"-\frac{31}{4}", "-7 3/4"),
    ("118", "118 square feet."),
    ("118", "118 cm^2"),
    ("118", "A = 118 miles per hour"),
    ("2abc", "2 abc"),
    ("1500000", r"\$1.5 \text{ million}"),
    ("5000000", "5 million dollars"),
    ("21", "21^{st}"),
    ("12", "12th grade"),
    (r"\textbf{(073)}", "073"),
    ("1000", r"\text{1,000}"),
    ("12", r"\textbf{(C) } 12"),
    ("C", "C. 12"),
    (r"5 \text{ ft } 6 \text{ in}", "5 ft 6 in"),
    (r"2:30 \text{ p.m.}", "2:30 PM"),
    (r"\frac{7}{12}", r"0.58\overline{3}"),
    ("5!", "120"),
]
WRONG = [
    ("12", r"12\,000"),
    (r"\frac{3}{4}", "x = 7 3/4"),
    (r"50\%", "5"),
    ("5", "5!"),
    ("2", "2 abc"),
    ("2", r"2 \sin x"),
    ("3", "3 and 5"),
    ("5", "5 ft 6 in"),
    (r"\textbf{(C)}\ 12", r"\textbf{(C)}\ 13"),
    (r"\textbf{(C)}\ 12", "B"),
    (r"\text{June 20}", "June 21"),
]


def test_spellings_of_one_answer_are_equal_and_of_two_are_not():
    pytest.importorskip("math_verify")
    assert [pair for pair, right in zip(RIGHT, verdicts(RIGHT), strict=True) if not right] == []
    assert [pair for pair, right in zip(WRONG, verdicts(WRONG), strict=True) if right] == []


@pytest.mark.parametrize(
    "latex",
    [r"\frac{1}{2}", "x^2+1", "(1,2)", r"\begin{pmatrix} 1\\ 200 \end{pmatrix}", "2 abc", r"3\pi"],
)
def test_what_is_latex_already_stays_as_it_is(latex: str):
    assert plain_math(latex) == latex


PIECES = [
    *str.split(
        r"1 1, 1,000 .5 ( ) { } \text{ \text{a} \boxed{ ^ ^{ √ √( ½ ² ° \$ % \% - – + a abc"
    ),
    *str.split(r"\, {,} ~ \overline{3} 1/ dollars million th A) (A) . : p.m. \\ \textbf{(B)} x="),
    *(
        " ",
        "1 ",
        "1 2/3 ",
        "1 000",
        "9 ft ",
        "ft 9 in ",
        "\\text{ ft } 9 ",
        "\n",
        "\t",
        "٣",
        "\ud800",
    ),
]


def test_anything_in_a_box_is_spelled_out_in_a_moment():
    rng = random.Random(0)
    texts = [(piece * 400)[:400] for piece in PIECES]
    texts += ["".join(rng.choices(PIECES, k=rng.randint(1, 60)))[:400] for _ in range(1000)]
    for text in texts:
        start = time.thread_time()
        for gold, answer in comparisons(text, "12 dollars") + comparisons("5", text):
            assert isinstance(gold, str) and isinstance(answer, str)
        assert time.thread_time() - start < 0.1, text


def test_gold_answers_are_never_cut():
    labelled = "Sales: the answer is 100\nQuestion 2: how many in all?\n"
    assert gold_math_answer(labelled + r"Then \boxed{5}. Question: why? \boxed{300}.") == "300"
    assert gold_math_answer("P = \\boxed{(0,0)}\nQ: what is it then?\n\\boxed{30}") == "30"
    assert gold_answer(labelled + "#### 300") == 300
    assert gold_math_answer(r"so it is $\boxed 7$ indeed") == "7"
    assert gold_math_answer(r"so it is $\fbox{7}$") == "7"


def test_completions_kept_from_a_real_model_are_judged_as_a_person_judged_them():
    """200 of Qwen2.5-Coder-1.5B-Instruct on GSM8K, before and after training; `right` is what a
    person found without seeing the reward, and `not_read` why the rules do not read a right one."""
    rows = [json.loads(line) for line in JUDGED.read_text("utf-8").splitlines()]
    assert len(rows) == 200 and sum(row["right"] for row in rows) == 127
    for row in rows:
        [reward] = REWARDS[row["reward"]]([row["completion"]], [row["answer"]])
        read = "not_read" not in row
        assert (reward == 1.0) == (row["right"] and read), row["completion"][-300:]
    assert sum("not_read" in row for row in rows) == 6


def test_a_reading_is_exact():
    assert gsm8k_answer_reward(["#### 0.333333"], ["1/3"]) == [0.0]
