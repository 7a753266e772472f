"""Worded arithmetic problems in GSM8K's answer format, made from a seed: data without a download.

Floor 0: the standard library only. A problem is drawn from one of the templates below: names,
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
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

Split = Literal["train", "test"]

# One question in five is a test question.
_TEST_SHARE = 5
# What an intermediate or final result may be: at least 2, so that plurals stay right.
_SMALLEST, _LARGEST = 2, 150

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Template:
    """One kind of problem.

    Attributes:
        question: the text; ``[a|b]`` is one of the alternatives, ``{x}`` a word or a number.
        numbers: the range, both ends included, of each number that the question gives.
        steps: (``"c=a*b"``, sentence) in order; ``{c}`` in the sentence becomes the worked
            equation, as in "4*6=24". The last result is the answer.
    """

    question: str
    numbers: dict[str, tuple[int, int]]
    steps: tuple[tuple[str, str], ...]


_NAMES = (
    *(("Tom", "He"), ("Mia", "She"), ("Sam", "He"), ("Ana", "She"), ("Ben", "He"), ("Eva", "She")),
    *(("Leo", "He"), ("Zoe", "She"), ("Max", "He"), ("Ivy", "She"), ("Dan", "He"), ("Amy", "She")),
    *(("Raj", "He"), ("Nora", "She"), ("Omar", "He"), ("Lily", "She"), ("Jack", "He")),
    *(("Rosa", "She"), ("Paul", "He"), ("Emma", "She"), ("Hugo", "He"), ("Sara", "She")),
)
_THINGS = (
    *("apples", "pears", "plums", "lemons", "peaches", "eggs", "nuts", "cookies", "muffins"),
    *("books", "pens", "cards", "coins", "shells", "stamps", "beads", "cups", "toys", "balls"),
    *("roses", "buttons", "marbles", "stickers", "candles"),
)
_CONTAINERS = (
    *(("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("jar", "jars")),
    *(("crate", "crates"), ("tray", "trays")),
)

_FEW, _SOME, _MANY = (2, 9), (2, 20), (10, 60)

_TEMPLATES = (
    # Two steps: sums and differences
    _Template(
        "{name} has {a} {things}. {He} [buys|finds|gets] {b} more and [gives|sells] {c} {things} "
        "to {friend}. How many {things} does {name} have [now|left]?",
        {"a": _MANY, "b": _SOME, "c": _SOME},
        (("d=a+b", "{name} has {d} {things}."), ("e=d-c", "{name} has {e} {things} left.")),
    ),
    _Template(
        "{friend} has {a} {things}. {name} has {b} more {things} than {friend}. How many {things} "
        "do they have [together|in total|in all]?",
        {"a": _SOME, "b": _SOME},
        (("c=a+b", "{name} has {c} {things}."), ("d=a+c", "Together they have {d} {things}.")),
    ),
    _Template(
        "{friend} has {a} {things}. {name} has {b} fewer {things} than {friend}. How many {things} "
        "do they have [together|in total|in all]?",
        {"a": _MANY, "b": _SOME},
        (("c=a-b", "{name} has {c} {things}."), ("d=a+c", "Together they have {d} {things}.")),
    ),
    _Template(
        "There are {a} people on a [bus|train|boat]. At the first stop {b} people get off and {c} "
        "people get on. How many people are on [it|board] now?",
        {"a": _MANY, "b": _SOME, "c": _SOME},
        (("d=a-b", "There are {d} people."), ("e=d+c", "There are {e} people now.")),
    ),
    _Template(
        "{name} is {a} years old. {friend} is {b} years older than {name}. How old will {friend} "
        "be in {c} years?",
        {"a": (5, 40), "b": _SOME, "c": _SOME},
        (("d=a+b", "{friend} is {d} years old."), ("e=d+c", "{friend} will be {e} years old.")),
    ),
    _Template(
        "{name} has {a} {things}. {friend} has {b} more than {name}. {other} has {c} fewer than "
        "{friend}. How many {things} does {other} have?",
        {"a": _MANY, "b": _SOME, "c": _SOME},
        (("d=a+b", "{friend} has {d} {things}."), ("e=d-c", "{other} has {e} {things}.")),
    ),
    _Template(
        "A shop has {a} {things}. It sells {b} of them in the morning and {c} in "
        "the afternoon. How many {things} are left?",
        {"a": (40, 99), "b": _SOME, "c": _SOME},
        (("d=b+c", "The shop sells {d} {things}."), ("e=a-d", "There are {e} {things} left.")),
    ),
    # Two steps with a product
    _Template(
        "{name} has {a} {boxes} with {b} {things} in each {box}. {He} [gives|sells] {c} {things} "
        "to {friend}. How many {things} does {name} have left?",
        {"a": _FEW, "b": _FEW, "c": _SOME},
        (("d=a*b", "{name} has {d} {things}."), ("e=d-c", "{name} has {e} {things} left.")),
    ),
    _Template(
        "{name} [fills|packs] {a} {boxes} with {b} {things} each. {He} has {c} {things} left over. "
        "How many {things} did {name} have at first?",
        {"a": _FEW, "b": _FEW, "c": _SOME},
        (("d=a*b", "The {boxes} hold {d} {things}."), ("e=d+c", "{name} had {e} {things}.")),
    ),
    _Template(
        "{name} buys {a} {things} for ${b} each. {He} pays with ${m}. How [much change|many "
        "dollars] does {name} get back?",
        {"a": _FEW, "b": _FEW, "m": (30, 99)},
        (("d=a*b", "The {things} cost {d} dollars."), ("e=m-d", "{name} gets {e} dollars back.")),
    ),
    _Template(
        "{name} buys {a} {things} for ${b} each. A coupon takes ${c} off the price. How [much|many "
        "dollars] does {name} pay?",
        {"a": _FEW, "b": _FEW, "c": _SOME},
        (("d=a*b", "The {things} cost {d} dollars."), ("e=d-c", "{name} pays {e} dollars.")),
    ),
    _Template(
        "A book has {m} pages. {name} reads {a} pages [a|each|every] day for {b} days. How many "
        "pages are left?",
        {"m": (40, 99), "a": _FEW, "b": _FEW},
        (("d=a*b", "{name} reads {d} pages."), ("e=m-d", "There are {e} pages left.")),
    ),
    _Template(
        "{friend} has {a} {things}. {name} has {k} times as many {things} as {friend}. How many "
        "{things} do they have [together|in total|in all]?",
        {"a": (3, 15), "k": (2, 5)},
        (("d=k*a", "{name} has {d} {things}."), ("e=a+d", "Together they have {e} {things}.")),
    ),
    _Template(
        "{friend} has {a} {things}. {name} has {k} times as many. How many more {things} does "
        "{name} have than {friend}?",
        {"a": (3, 15), "k": (2, 5)},
        (("d=k*a", "{name} has {d} {things}."), ("e=d-a", "{name} has {e} more {things}.")),
    ),
    _Template(
        "{name} [plants|grows] {a} rows of {b} [roses|trees|beans]. {c} of the plants die. How "
        "many plants are left?",
        {"a": _FEW, "b": _FEW, "c": _SOME},
        (("d=a*b", "{name} has {d} plants."), ("e=d-c", "There are {e} plants left.")),
    ),
    _Template(
        "{name} works {a} hours for ${b} an hour and gets ${c} [in tips|as a gift|as a bonus]. How "
        "[much money|many dollars] does {name} have?",
        {"a": _FEW, "b": _FEW, "c": _SOME},
        (("d=a*b", "{name} earns {d} dollars."), ("e=d+c", "{name} has {e} dollars.")),
    ),
    _Template(
        "{name} [runs|walks|swims] {a} miles a day for {b} days and {c} miles on Sunday. How many "
        "miles is that in [all|total]?",
        {"a": _FEW, "b": (2, 6), "c": _SOME},
        (("d=a*b", "In {b} days that is {d} miles."), ("e=d+c", "In all it is {e} miles.")),
    ),
    _Template(
        "{name} has {a} {things} and {friend} has {b}. They [share|split] all of them equally "
        "among {c} children. How many {things} does each child get?",
        {"a": (5, 40), "b": (5, 40), "c": (2, 6)},
        (("d=a+b", "They have {d} {things}."), ("e=d/c", "Each child gets {e} {things}.")),
    ),
    # Three steps
    _Template(
        "{name} buys {a} {things} for ${b} each and {c} {goods} for ${d} each. How [much|many "
        "dollars] does {name} [pay|spend]?",
        {"a": _FEW, "b": _FEW, "c": _FEW, "d": _FEW},
        (
            ("e=a*b", "The {things} cost {e} dollars."),
            ("f=c*d", "The {goods} cost {f} dollars."),
            ("g=e+f", "In total {name} pays {g} dollars."),
        ),
    ),
    _Template(
        "{name} has {a} {boxes} of {b} {things} and {friend} has {c} {boxes} of {d}. How many "
        "{things} do they have [together|in total|in all]?",
        {"a": _FEW, "b": _FEW, "c": _FEW, "d": _FEW},
        (
            ("e=a*b", "{name} has {e} {things}."),
            ("f=c*d", "{friend} has {f} {things}."),
            ("g=e+f", "Together they have {g} {things}."),
        ),
    ),
    _Template(
        "{name} has {a} {boxes} of {b} {things} and {friend} has {c} {boxes} of {d}. How many more "
        "{things} does {name} have?",
        {"a": _FEW, "b": _FEW, "c": _FEW, "d": _FEW},
        (
            ("e=a*b", "{name} has {e} {things}."),
            ("f=c*d", "{friend} has {f} {things}."),
            ("g=e-f", "{name} has {g} more {things}."),
        ),
    ),
    _Template(
        "{name} has ${c} and saves ${a} a week for {b} weeks. Then {he} spends ${d} on {things}. "
        "How [much money|many dollars] does {name} have left?",
        {"a": _FEW, "b": _FEW, "c": _SOME, "d": _SOME},
        (
            ("e=a*b", "{name} saves {e} dollars."),
            ("f=e+c", "{name} has {f} dollars."),
            ("g=f-d", "{name} has {g} dollars left."),
        ),
    ),
    _Template(
        "{name} bakes {a} trays of {b} [cookies|muffins|rolls]. {He} eats {c} and puts the rest in "
        "bags of {d}. How many bags does {name} need?",
        {"a": _FEW, "b": _FEW, "c": _SOME, "d": (2, 6)},
        (
            ("e=a*b", "{name} bakes {e}."),
            ("f=e-c", "There are {f} left."),
            ("g=f/d", "{name} needs {g} bags."),
        ),
    ),
    _Template(
        "A farm has {a} cows and {b} hens. A cow has 4 legs and a hen has 2 legs. How many legs "
        "do the animals have in [all|total]?",
        {"a": (2, 15), "b": _SOME},
        (
            ("c=a*4", "The cows have {c} legs."),
            ("d=b*2", "The hens have {d} legs."),
            ("e=c+d", "In all there are {e} legs."),
        ),
    ),
    _Template(
        "In a game {name} [makes|scores] {a} shots worth 2 points and {b} shots worth 3 points. "
        "How many points does {name} score in [all|total]?",
        {"a": (2, 15), "b": (2, 15)},
        (
            ("c=a*2", "The first shots give {c} points."),
            ("d=b*3", "The others give {d} points."),
            ("e=c+d", "In all {name} scores {e} points."),
        ),
    ),
)

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


def _work_out(template: _Template, draw: _Draw) -> tuple[dict[str, int], dict[str, str], int]:
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
    template = draw.choice(_TEMPLATES)
    (name, pronoun), (friend, _), (other, _) = draw.distinct(_NAMES, 3)
    things, goods = draw.distinct(_THINGS, 2)
    box, boxes = draw.choice(_CONTAINERS)
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
