"""Rewards: the answer a careful reader would see, lm-eval's rules, and clear errors."""

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgrpo.tasks import answers, rewards

RAMBLE = "#### 18\n\nQuestion: How many?\nAnswer: 3 + 4 = 7\n#### 7"


def gsm8k_file(name: str) -> Path:
    """The file `name` of a GSM8K directory (JAXGRPO_GSM8K, else beside the checkout), or a skip."""
    beside = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
    path = Path(os.environ.get("JAXGRPO_GSM8K", beside)) / name
    if not path.is_file():
        pytest.skip(f"needs GSM8K's {name}: set JAXGRPO_GSM8K to a directory that holds it")
    return path


@pytest.mark.parametrize(
    ("text", "strict", "flexible", "ours"),
    [
        ("#### 18.", "18.", "18.", "18"),
        ("#### 18.0", "18.0", "18.0", "18"),
        ("#### $18", "[invalid]", "$18", "18"),
        ("#### **18**", "[invalid]", "18", "18"),
        ("####18", "[invalid]", "18", "18"),
        ("#### 1,234", "1,234", "1,234", "1234"),
        ("#### 1 234", "1", "234", "1234"),
        ("#### -$5", "[invalid]", "-$5", "-5"),
        ("#### \u22125", "[invalid]", "5", "-5"),
        ("1/2", "[invalid]", "2", "1/2"),
        ("1e3", "[invalid]", "3", "1000"),
        ("50%", "[invalid]", "50", "50"),
        ("#### 1/2", "1", "2", "1/2"),
        ("#### 1e3", "1", "3", "1000"),
        ("#### 50%", "50", "50", "50"),
        ("#### 18\nWait, that is wrong.\n#### 7", "18", "7", "7"),
        (RAMBLE, "18", "18", "18"),
        (r"\boxed{\$18}", "[invalid]", "$18", "18"),
        ("#### 18...", "18...", "18...", "18"),
        ("The answer is 18 ...", "[invalid]", "...", "18"),
    ],
)
def test_published_table_of_readings(text: str, strict: str, flexible: str, ours: str):
    assert answers.lm_eval_strict(text) == strict
    assert answers.lm_eval_flexible(text) == flexible
    assert answers.extract_answer(text) == Fraction(ours)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # which marker
        ("#### 9\nso \\boxed{18}", "18"),
        ("<reasoning>\\boxed{9} #### 7</reasoning>\n<answer>\n$18\n</answer>", "18"),
        ("<ANSWER>18</ANSWER>", "18"),
        ("<answer>she makes $18 a day</answer>", "18"),
        ("<answer>#### 18</answer>", "18"),
        ("\\boxed{\\boxed{18}}", "18"),
        ("\\boxed{9} then \\boxed{18", "9"),
        ("The answer is 9. No, the answer is 18.", "18"),
        ("**Final Answer:** $18 per day", "18"),
        ("**Answer:**\n18 dollars", "18"),
        ("The answer is:\n- 18", "18"),
        ("The answer (in dollars) is: $18", "18"),
        ("so the answer would be 18 dollars for 9 eggs", "18"),
        ("The answer is therefore 3.", "3"),
        ("The answer is <<8=8>>8.", "8"),
        ("the final answer is 15 gallons * 8 pints / gallon = <<15*8=120>>120 pints", "120"),
        ("She sells 9.\nA: 18", "18"),
        ("A: 18\nB: 7", None),
        ("#### Step 2: add 3 and 4\nThe answer is 18", "18"),
        ("#### 1. Add the eggs\n9\n#### 2. Sell them\n\\boxed{18}", "18"),
        ("#### 1. Add the eggs\n9 eggs", None),
        ("#### 18. Janet makes $18 a day", "18"),
        ("####\n18", "18"),
        ("#### Final Answer\n**18**", "18"),
        ("Therefore she makes $\\boxed{18}$ dollars a day, 3 times what Bob makes.", "18"),
        ("The answer is $\\$18$.", "18"),
        ("The answer is \\(18\\).", "18"),
        ("\\boxed{18 \\text{ km/h}}", "18"),
        ("\\boxed{2 \\text{ hours } 30 \\text{ minutes}}", None),
        ("\\boxed{\\text{Monday}}", None),
        ("\\boxed{3:2}", None),
        ("She makes 18 dollars.\nThat is all.", None),
        # where the text ends
        ("#### 18<|im_end|>\n#### 7", "18"),
        ("#### 18</s>#### 7", "18"),
        ("A: 18\n\nQ: And then?\nA: 7", "18"),
        ("#### 18\n**Question 2:** and then?\n#### 7", "18"),
        ("Question: how many?\n#### 18", "18"),
        # notation
        (r"\boxed{\frac{1}{2}}", "1/2"),
        (r"\boxed{\frac12}", "1/2"),
        (r"\boxed{-\dfrac{3}{4}}", "-3/4"),
        (r"\boxed{1\frac{1}{2}}", "3/2"),
        (r"$$\boxed{1{,}234}$$", "1234"),
        (r"\boxed{1\,234}", "1234"),
        (r"\boxed{1,\!234}", "1234"),
        (r"\boxed{18\text{ dollars}}", "18"),
        (r"\boxed{\text{\$18}}", "18"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{x = 18}", "18"),
        (r"\boxed{1.5 \times 10^{3}}", "1500"),
        (r"\boxed{18^\circ}", "18"),
        ("#### \u20ac1,234.50", "2469/2"),
        ("#### 1,234,567.8", "6172839/5"),
        ("#### 1,00,000", "100000"),
        ("#### 1\u202f234\u00a0567", "1234567"),
        ("#### \uff11\uff18", "18"),
        ("#### \u00bd", "1/2"),
        ("#### 1\u00bd cups", "3/2"),
        ("#### 1 1/2 cups", "3/2"),
        ("#### -1 1/2", "-3/2"),
        ("#### 3 / 4", "3/4"),
        ("#### .5", "1/2"),
        ("#### -.5", "-1/2"),
        ("#### +5", "5"),
        ("#### $-5", "-5"),
        ("#### - $5", "-5"),
        ("#### -0", "0"),
        ("#### 007", "7"),
        ("#### 18.00", "18"),
        ("#### 1.5e-3", "3/2000"),
        ("#### 2.5 million", "2500000"),
        ("#### $18k", "18000"),
        ("#### 5 km", "5"),
        ("#### 50 percent", "50"),
        ("#### 18/day", "18"),
        ("#### 18 miles/hour", "18"),
        ("#### 18-inch", "18"),
        ("#### (18)", "18"),
        ('#### "18"', "18"),
        ("#### `18`", "18"),
        ("#### 18</answer>", "18"),
        ("#### about 18", "18"),
        ("#### 9 * 2 = $18", "18"),
        ("#### \u2248 18", "18"),
        ("#### 18 dollars (9 eggs at $2)", "18"),
        ("#### 18! She did it 3 times.", "18"),
        ("The answer is 18. Check: 3 * 6 = 18, 4 + 5 = 9.", "18"),
        ("The answer is 18 because 3 * 6 = 18 and 4 + 5 = 9", "18"),
        ("The answer is (9*2) = 18", "18"),
        ("18 eggs", "18"),
        ("The answer is 18. " + "So it is. " * 100, "18"),
        # no answer, or not one answer
        ("", None),
        ("   \n", None),
        ("####", None),
        ("#### \n", None),
        ("\\boxed{}", None),
        ("<answer></answer>", None),
        ("the answer is", None),
        ("The answer is not 18.", None),
        ("The answer is unclear. There are 18 eggs.", None),
        ("#### 18 or 7", None),
        ("#### 18 (or 7)", None),
        ("#### 18 eggs, not 7", None),
        ("<answer>18 or 19</answer>", None),
        ("<answer>18\n234</answer>", None),
        ("<answer>She makes\n  18\na day</answer>", "18"),
        ("<answer>18; 19; 20</answer>", None),
        (r"\boxed{1,2,3,18}", None),
        ("#### 18-20", None),
        ("#### 5 feet 6 inches", None),
        ("#### 3:30", None),
        ("#### 9*2", None),
        ("#### 10+John's age", None),
        ("#### 2x", None),
        ("#### x > 18", None),
        (r"\boxed{18\pi}", None),
        (r"\boxed{\sqrt{18}}", None),
        ("#### 1,23", None),
        ("#### 123,45", None),
        ("#### 1.234.567", None),
        ("#### 1/0", None),
        ("#### 1/2/3", None),
        ("#### 1e999999999", None),
        ("#### " + "9" * 5000, None),
        ("\\boxed{" + "9" * 300 + "}", None),
    ],
)
def test_extract_answer(text: str, value: str | None):
    assert answers.extract_answer(text) == (None if value is None else Fraction(value))


MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def test_verdicts_of_openai_on_their_models_solutions():
    checked = 0
    for line in gsm8k_file("example_model_solutions.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        for model in MODELS:
            [reward] = rewards.gsm8k_answer_reward([row[model]["solution"]], [row["ground_truth"]])
            assert bool(reward) == row[model]["is_correct"], row[model]["solution"][-200:]
            checked += 1
    assert checked == 5276


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gsm8k_answer_reads_as_its_number(split: str):
    for line in gsm8k_file(f"{split}.jsonl").read_text("utf-8").splitlines():
        answer = json.loads(line)["answer"]
        number = answer.split("#### ")[1].replace(",", "")
        assert answers.extract_answer(answer) == answers.gold_answer(answer) == int(number)
        assert answers.match_lm_eval_strict(answer, answer)
        assert answers.match_lm_eval_flexible(f"so {number} eggs", answer)


@pytest.mark.parametrize(
    ("completion", "gold", "strict", "flexible"),
    [
        ("#### 1,234", "x\n#### 1234", True, True),
        ("#### 18.", "18", True, True),
        ("#### 18.0", "18", False, False),
        ("she has 18", "#### 18", False, True),
        ("-$5", "#### -5", False, True),
        (RAMBLE, "#### 18", True, True),
        ("#### 18 and 7", "18", True, False),
        ("no number", "#### 18", False, False),
        ("#### 18</s>#### 7", "18", True, True),
        ("#### 18<|im_end|>7", "18", True, True),
        # a quirk kept: a full stop after a space is a match of its own
        ("#### 18 ..", "18", True, False),
    ],
)
def test_lm_eval_matches(completion: str, gold: str, strict: bool, flexible: bool):
    assert answers.match_lm_eval_strict(completion, gold) is strict
    assert answers.match_lm_eval_flexible(completion, gold) is flexible


words = str.split
PIECES = [
    *words(
        r"#### \boxed{ } <answer> </answer> A: Question: \frac{ { $ - 1 234 , . / % e * = << >>"
    ),
    *words("^ x 10 ( ) or \u2212 \u0130 \u0661 \u00b2"),
    *("\n", " ", "answer is "),
]
TEXTS = st.text() | st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_no_text_makes_a_reader_raise(text: str):
    value = answers.extract_answer(text)
    assert value is None or isinstance(value, Fraction)
    answers.parse_number(text, any_prefix=True)
    answers.match_lm_eval_strict(text, "#### 18")
    answers.match_lm_eval_flexible(text, "#### 18")
    assert rewards.gsm8k_answer_reward([text], ["18"])[0] in (0.0, 1.0)
    assert rewards.format_reward([text], ["18"])[0] in (0.0, 1.0)


@given(st.integers(-(10**12), 10**12), st.integers(0, 3))
def test_a_number_reads_the_same_however_it_is_written(number: int, zeros: int):
    decimals = "." + "0" * zeros if zeros else ""
    for written in (f"{number}", f"{number:,}", f"{number:,}".replace(",", " "), f"**{number}**"):
        for form in ("#### {}", "\\boxed{{{}}}", "The answer is ${}.", "<answer>{}</answer>"):
            text = form.format(written.replace("**", "") + decimals if zeros else written)
            assert answers.extract_answer(text) == number, text


HOSTILE = [
    *words(r"# #### \boxed{ \boxed{1} <answer> </answer> <answer>1 << <<1 { } \frac{ ( 1 1, ,234"),
    *words(r"1/ . 1. - * = Question: A: <reasoning> </reasoning><answer> ;1 ; \text{ 1e a="),
    *(" ", "\n", "\t\n", "1 ", "1 234 ", "- ", "\\ ", "#### ", "#### 1\n", "answer "),
    *(
        "\nQ1: 1",
        "#### 1\nQ1: a b c",
        "answer is 1\nQ: 1",
        "2^9",
        "$1m",
        "m^2",
        "ab ^2",
        "~",
        "% of 1",
    ),
    *("answer is ", "answer is 1 ", "\nQuestion:", "\n\nQ", "\nA: ", "a. ", "1 (a) "),
]


def _judged_in(text: str) -> float:
    """Processor seconds that this thread needs to judge `text`, the least of three."""
    spent = []
    for _ in range(3):
        start = time.thread_time()
        answers.extract_answer(text)
        rewards.format_reward([text], ["1"])
        answers.lm_eval_strict(text)
        answers.lm_eval_flexible(text)
        spent.append(time.thread_time() - start)
    return min(spent)


@pytest.mark.parametrize("piece", HOSTILE)
def test_hundred_kilobytes_of_anything_stay_cheap(piece: str):
    # A pattern that starts over at every place takes the square of the length: sixteen times as
    # long for four times the text, on any machine. Linear ones take four times.
    for before, after in (("", ""), ("#### ", ""), ("\\boxed{", "}"), ("answer is ", "x")):
        short, long = (before + (piece * n)[:n] + after for n in (25_000, 100_000))
        grown = (_judged_in(long) / (_judged_in(short) + 1e-3) for _ in range(3))
        assert any(times < 9 for times in grown), (before, piece)


@pytest.mark.parametrize("gold", ["", "no number", "#### ", "text 18\n#### none"])
def test_a_gold_answer_without_a_number_is_an_error(gold: str):
    with pytest.raises(ValueError, match="gold answer holds no number"):
        rewards.gsm8k_answer_reward(["#### 18"], [gold])


def test_answer_reward_compares_exact_values():
    completions = ["#### 18.00", "\\boxed{36/2}", "#### 18.0000001", "", "#### 0.1"]
    golds = ["9*2 = 18\n#### 18", "18", "18", "#### 0", "1/10"]
    assert rewards.gsm8k_answer_reward(completions, golds) == [1.0, 1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<reasoning>9 * 2</reasoning><answer>18</answer>", 1.0),
        ("\n<reasoning>\n9 * 2\n</reasoning>\n\n<answer>\n18\n</answer>\n<|im_end|>", 1.0),
        ("Sure! <reasoning>9</reasoning><answer>18</answer>", 0.0),
        ("<reasoning>9</reasoning><answer>18</answer> Bye", 0.0),
        ("<reasoning>9</reasoning> so <answer>18</answer>", 0.0),
        ("<reasoning>9</reasoning><answer>18</answer><answer>18</answer>", 0.0),
        ("<reasoning><answer>9</answer></reasoning><answer>18</answer>", 0.0),
        ("<answer>18</answer><reasoning>9</reasoning>", 0.0),
        ("<reasoning> </reasoning><answer>18</answer>", 0.0),
        ("<reasoning>9</reasoning><answer>\n</answer>", 0.0),
        ("<reasoning>9</reasoning><answer>18", 0.0),
        ("", 0.0),
    ],
)
def test_format_reward(text: str, reward: float):
    assert rewards.format_reward([text], ["18"]) == [reward]


def test_length_reward_is_dapos_soft_overlong_punishment():
    lengths = [0, 80, 81, 90, 99, 100, 130]
    values = rewards.length_reward(
        ["x"] * 7, ["1"] * 7, completion_lengths=lengths, max_completion_tokens=100
    )
    assert values == pytest.approx([0, 0, -0.05, -0.5, -0.95, -1, -1])
    assert rewards.soft_overlong_penalty(16384, 20480, 4096) == 0.0
    assert rewards.soft_overlong_penalty(18432, 20480, 4096) == -0.5
    assert rewards.soft_overlong_penalty(5, 5, 0) == 0.0
    assert rewards.soft_overlong_penalty(6, 5, 0) == -1.0


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "rewards_of_a_user"
    (tmp_path / f"{name}.py").write_text(
        "limit = 3\ndef brevity(completions, answers, **context):\n"
        "    return [float(len(text) < limit) for text in completions]\n"
    )
    (tmp_path / f"{name}_broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / f"{name}_typo.py").write_text("def oops(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def test_load_reward(user_module: str):
    for name, function in rewards.REWARDS.items():
        assert rewards.load_reward(name) is function
    assert rewards.load_reward(f"{user_module}:brevity")(["ab", "abcd"], ["", ""]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gsm8k_anser", "unknown reward 'gsm8k_anser'; did you mean 'gsm8k_answer'?"),
        ("", "unknown reward"),
        ("module.function", "or module:function"),
        ("no_such_module_here:f", "no module 'no_such_module_here'"),
        ("USER:brevty", "has no 'brevty'; did you mean 'brevity'?"),
        ("USER:", "has no ''"),
        ("USER:limit", "'limit' is a int, not a function"),
        ("USER_broken:f", "failed: No module named 'nothing_of_that_name'"),
        ("USER_typo:f", "failed: SyntaxError"),
        (":f", "importing '' failed"),
        (".relative:f", "importing '.relative' failed"),
    ],
)
def test_load_reward_errors_are_one_clear_line(user_module: str, spec: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        rewards.load_reward(spec.replace("USER", user_module))
    assert "\n" not in str(error.value)


def constant(*values: Any) -> rewards.RewardFunction:
    return lambda completions, answers, **context: list(values)


def test_combine_rewards_weighs_and_skips_none():
    totals, by_name = rewards.combine_rewards(
        {"a": constant(1, None, None), "b": constant(0.5, 2.0, None)},
        [2.0, -1.0],
        ["x", "y", "z"],
        ["1", "2", "3"],
    )
    assert totals[:2] == [1.5, -2.0]
    assert math.isnan(totals[2])
    assert by_name == {"a": [1.0, None, None], "b": [0.5, 2.0, None]}


def test_combine_rewards_hands_the_context_on():
    context = {"prompts": ["p"], "completion_lengths": [95], "max_completion_tokens": 100}
    functions = {name: rewards.REWARDS[name] for name in ("gsm8k_answer", "format", "length")}
    totals, by_name = rewards.combine_rewards(
        functions, [1.0, 0.5, 1.0], ["#### 18"], ["18"], finish_reasons=["stop"], **context
    )
    assert totals == pytest.approx([0.25])
    assert by_name == {"gsm8k_answer": [1.0], "format": [0.0], "length": [-0.75]}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (constant(1.0), "reward 'mine' returned 1 values for 2 completions"),
        (constant(1.0, math.nan), "reward 'mine' returned nan for completion 1"),
        (constant(-math.inf, 1.0), "reward 'mine' returned -inf for completion 0"),
        (constant(1.0, "good"), "reward 'mine' returned 'good' for completion 1"),
        (lambda *_, **__: 1.0, "reward 'mine' returned a float, not a list"),
        (lambda *_, **__: None, "reward 'mine' returned a NoneType, not a list"),
    ],
)
def test_combine_rewards_names_the_function_at_fault(function, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        rewards.combine_rewards({"mine": function}, [1.0], ["x", "y"], ["1", "2"])


def test_combine_rewards_refuses_counts_that_differ():
    with pytest.raises(ValueError, match="1 reward functions but 2 weights"):
        rewards.combine_rewards({"a": constant(1.0)}, [1.0, 2.0], ["x"], ["1"])
    with pytest.raises(ValueError, match="1 completions but 2 answers"):
        rewards.combine_rewards({"a": constant(1.0)}, [1.0], ["x"], ["1", "2"])


def test_thoughts_are_text_like_any_other():
    """docs/own_tasks.md on `<think>`: read where an answer is marked, and no structure."""
    asked = "<think>\n#### 5? No.\n</think>\n\n"
    texts = [f"{asked}#### 18", "<think>\nSo #### 18", f"{asked}<reasoning>r</reasoning>"]
    texts[2] += "<answer>18</answer>"
    assert rewards.gsm8k_answer_reward(texts, ["18"] * 3) == [1.0, 1.0, 1.0]
    assert rewards.format_reward(texts, ["18"] * 3) == [0.0, 0.0, 0.0]
