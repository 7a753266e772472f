"""Worded arithmetic problems in GSM8K's answer format, made from a seed: data without a download.

Floor 0: the standard library only. A problem is drawn from one of `problem_templates.py`: names,
things and numbers are filled in, the steps are computed, and the worked solution is written line
by line with ``#### N`` last, as in GSM8K. Numbers stay small, so that a model of a million
parameters can learn to work them out. The embedded model (`scripts/make_embedded_model.py`) was
trained on the train split; the quickstart and the tests run on both.

Train and test never share a question: a question belongs to the split that the SHA-256 of its text
says, whatever the seed.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

from jaxgrpo.tasks.problem_templates import CONTAINERS, NAMES, TEMPLATES, THINGS, Template

Split = Literal["train", "test"]

# One question in five is a test question.
_TEST_SHARE = 5
# What an intermediate or final result may be: at least 2, so that plurals stay right.
_SMALLEST, _LARGEST = 2, 150

_T = TypeVar("_T")

_ALTERNATIVES = re.compile(r"\[([^]]*)\]")
_STEP = re.compile(r"(\w)=(\w+)([-+*/])(\w+)")


class _Draw:
    """Seeded choices made of `Random.random` alone.

    Of all its methods only that one promises the same sequence in every Python version.
    """

    def __init__(self, seed: int) -> None:
        self._uniform = random.Random(seed).random

    def integer(self, low: int, high: int) -> int:
        return low + int(self._uniform() * (high - low + 1))

    def choice(self, options: Sequence[_T]) -> _T:
        return options[self.integer(0, len(options) - 1)]

    def distinct(self, options: Sequence[_T], count: int) -> list[_T]:
        left = list(options)
        return [left.pop(self.integer(0, len(left) - 1)) for _ in range(count)]


def _apply(left: int, operator: str, right: int) -> int | None:
    """The result of one step, or None where it is not a whole number in the allowed range."""
    if operator == "/":
        result = left // right if left % right == 0 else 0
    else:
        result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return result if _SMALLEST <= result <= _LARGEST else None


def _work_out(template: Template, draw: _Draw) -> tuple[dict[str, int], dict[str, str], int]:
    """Draws numbers until every step is allowed.

    Returns:
        The numbers of the question, each result's worked equation, and the answer.
    """
    while True:
        given = {name: draw.integer(*ends) for name, ends in template.numbers.items()}
        values, equations, answer = dict(given), {}, 0
        for step, _ in template.steps:
            match = _STEP.fullmatch(step)
            assert match is not None, step
            left, right = (int(x) if x.isdigit() else values[x] for x in (match[2], match[4]))
            result = _apply(left, match[3], right)
            if result is None:
                break
            values[match[1]] = answer = result
            equations[match[1]] = f"{left}{match[3]}{right}={result}"
        else:
            return given, equations, answer


def _problem(draw: _Draw) -> dict[str, str]:
    template = draw.choice(TEMPLATES)
    (name, pronoun), (friend, _), (other, _) = draw.distinct(NAMES, 3)
    things, goods = draw.distinct(THINGS, 2)
    box, boxes = draw.choice(CONTAINERS)
    words = {"name": name, "friend": friend, "other": other, "He": pronoun, "he": pronoun.lower()}
    words |= {"things": things, "goods": goods, "box": box, "boxes": boxes}
    given, equations, answer = _work_out(template, draw)
    text = _ALTERNATIVES.sub(lambda match: draw.choice(match[1].split("|")), template.question)
    lines = [sentence.format(**words, **given | equations) for _, sentence in template.steps]
    return {
        "question": text.format(**words, **given),
        "answer": "\n".join([*lines, f"#### {answer}"]),
    }


def split_of(question: str) -> Split:
    """The split a question belongs to, by the SHA-256 of its text."""
    first_bytes = hashlib.sha256(question.encode()).digest()[:4]
    return "test" if int.from_bytes(first_bytes, "big") % _TEST_SHARE == 0 else "train"


def make_problems(split: Split, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Makes `count` different problems of a split.

    The same arguments give the same problems everywhere, and a larger count only appends.

    Args:
        split: "train" or "test"; no question is ever in both.
        count: how many; the templates hold millions.
        seed: another seed, other problems of the same split.

    Returns:
        Dicts with `question` and `answer`, the answer as in GSM8K: worked lines, then ``#### N``.

    Raises:
        ValueError: no such split, or a negative count.
    """
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; valid: {', '.join(get_args(Split))}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    draw = _Draw(seed)
    problems: dict[str, dict[str, str]] = {}
    while len(problems) < count:
        problem = _problem(draw)
        if split_of(problem["question"]) == split:
            problems.setdefault(problem["question"], problem)
    return list(problems.values())
