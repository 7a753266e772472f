"""Completions that mean harm: every reward gives a number in time, whatever it is given."""

import math
import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgrpo.tasks import answers, rewards
from jaxgrpo.tasks.math_boxed import (
    VERIFY_TIMEOUT_S,
    WAIT_FACTOR,
    gold_math_answer,
    math_boxed_reward,
)
from tests.fuzz.amounts import FULL, amount, fuzz

BATCH = 20
words = str.split
PIECES = [
    *words(r"#### \boxed{ \fbox{ } { <answer> </answer> <reasoning> </reasoning> A: Question:"),
    *words(r"\frac{ \frac12 \sqrt{ \text{ \left( \right) \int_0^1 \sum_{n=1}^{99} \infty \pi"),
    *words(r"\begin{pmatrix} \end{pmatrix} \\ \times \cdot ^{ ^9 _ ! !! = < > \leq \cup \in"),
    *words(r"\% \$ & | ; : 1 0 -1 234 1,234 1/0 0/0 .5 5. 1e999999999 10^10^10 9^{9^{9^9}}"),
    *words("99999! 1_000 0x1f 007 ٣ ² Ⅷ ½ 〇 − × ∞ １２３ 𝟗 ۴۵ é İ (a+)+$ x+y or"),
    *("\n", " ", "\t", "\r\n", "\u202e", "\u200b", "\ufeff", "\x00", "\ud800"),
    *("answer is ", "The answer is: ", "<|im_end|>", "</s>"),
]
REPEATED = st.builds(
    lambda piece, count: (piece * count)[:20_000],
    st.sampled_from(PIECES),
    st.sampled_from([2, 30, 400, 5000]),
)
HUGE = st.integers().map(str) | st.sampled_from(["9" * 5000, "-" + "1" * 4301, "1" + "0" * 400])
BODY = st.lists(st.sampled_from(PIECES) | REPEATED | HUGE | st.text(max_size=12), max_size=25).map(
    "".join
)
FORMS = st.sampled_from(
    ["{}", "#### {}", r"\boxed{{{}}}", "<answer>{}</answer>", "the answer is {}.", "A: {}"]
)
COMPLETIONS = st.builds(str.format, FORMS, BODY)
# As a model would: everything in one box, short enough to be read, and mathematics for the most.
MATHEMATICS = st.lists(
    st.sampled_from(
        words(r"1 2 9 10 x y ( ) [ ] { } , + - * / ^ ^{ _ = < \frac{1}{2} \frac{ } \sqrt{ \sqrt2 !")
        + words(r"\pi e i \infty \int_0^1 \sum_{n=1}^{\infty} \lim_{x\to0} \sin( \log 99999999")
        + words(r"10^{99} \cdot \cup \{1,2\} \begin{pmatrix}1&2\end{pmatrix} \text{no} \% 0.1 dx")
        + words(r"\ge |x| \circ \binom{9}{3}")
    ),
    max_size=14,
).map("".join)
GOLDS = st.sampled_from(words(r"5 \frac{1}{2} x^2+1 (1,\infty) \{1,2\} \text{no} 50\%"))


def numbers(values):
    return all(value is not None and math.isfinite(value) for value in values)


def test_text_rewards_take_a_moment_each():
    @given(st.lists(COMPLETIONS, min_size=BATCH, max_size=BATCH))
    def run(texts):
        for text in texts:
            start = time.thread_time()  # other processes and threads may have the processor
            for name in ("gsm8k_answer", "format"):
                assert rewards.REWARDS[name]([text], ["#### 5"])[0] in (0.0, 1.0)
            answers.match_lm_eval_strict(text, "#### 5")
            answers.match_lm_eval_flexible(text, "#### 5")
            answers.boxed_answer(text)
            assert time.thread_time() - start < 1.0, text[:200]

    fuzz(run, 10_000 // BATCH, deadline_s=BATCH)


def test_lengths_of_every_kind():
    whole = st.integers(0, 10**6)

    @given(st.lists(whole, min_size=1, max_size=20), st.integers(1, 10**6))
    def run(lengths, cap):
        context = {"completion_lengths": lengths, "max_completion_tokens": cap}
        values = rewards.length_reward(["x"] * len(lengths), ["1"] * len(lengths), **context)
        assert numbers(values) and all(-1 <= value <= 0 for value in values)

    fuzz(run, 1000)


def test_gold_answers_are_read_or_refused_in_one_line():
    @given(COMPLETIONS)
    def run(text):
        for read in (answers.gold_answer, gold_math_answer):
            try:
                read(text)
            except ValueError as error:
                lines = str(error).splitlines()
                assert len(lines) == 1, lines

    fuzz(run, 1000)


def test_mathematics_ends_in_time():
    """In full 10,000 completions; those that hang cost their own three seconds each."""
    pytest.importorskip("math_verify")
    judged = [0, 0.0]

    @given(
        st.lists(MATHEMATICS | BODY.map(lambda t: t[:300]), min_size=BATCH, max_size=BATCH), GOLDS
    )
    def run(bodies, gold):
        texts = [rf"so it is \boxed{{{body}}}." for body in bodies]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those that hang are named
            values = math_boxed_reward(texts, [gold] * BATCH)
        assert all(value in (0.0, 1.0) for value in values)
        judged[0] += BATCH
        judged[1] += sum(value or 0.0 for value in values)

    # Without FULL a few seconds' worth.
    fuzz(run, 10_000 // BATCH if FULL else 25, deadline_s=WAIT_FACTOR * VERIFY_TIMEOUT_S * BATCH)
    assert judged[0] >= BATCH * amount(25)
