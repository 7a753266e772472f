"""What `problems.py` makes problems of: templates, and the words that they are filled with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
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


# Each with its pronoun.
NAMES = (
    *(("Tom", "He"), ("Mia", "She"), ("Sam", "He"), ("Ana", "She"), ("Ben", "He"), ("Eva", "She")),
    *(("Leo", "He"), ("Zoe", "She"), ("Max", "He"), ("Ivy", "She"), ("Dan", "He"), ("Amy", "She")),
    *(("Raj", "He"), ("Nora", "She"), ("Omar", "He"), ("Lily", "She"), ("Jack", "He")),
    *(("Rosa", "She"), ("Paul", "He"), ("Emma", "She"), ("Hugo", "He"), ("Sara", "She")),
)
THINGS = (
    *("apples", "pears", "plums", "lemons", "peaches", "eggs", "nuts", "cookies", "muffins"),
    *("books", "pens", "cards", "coins", "shells", "stamps", "beads", "cups", "toys", "balls"),
    *("roses", "buttons", "marbles", "stickers", "candles"),
)
# One, and several.
CONTAINERS = (
    *(("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("jar", "jars")),
    *(("crate", "crates"), ("tray", "trays")),
)

_FEW, _SOME, _MANY = (2, 9), (2, 20), (10, 60)

TEMPLATES = (
    # Two steps: sums and differences
    Template(
        "{name} has {a} {things}. {He} [buys|finds|gets] {b} more and [gives|sells] {c} {things} "
        "to {friend}. How many {things} does {name} have [now|left]?",
        {"a": _MANY, "b": _SOME, "c": _SOME},
        (("d=a+b", "{name} has {d} {things}."), ("e=d-c", "{name} has {e} {things} left.")),
    ),
    Template(
        "{friend} has {a} {things}. {name} has {b} more {things} than {friend}. How many {things} "
        "do they have [together|in total|in all]?",
        {"a": _SOME, "b": _SOME},
        (("c=a+b", "{name} has {c} {things}."), ("d=a+c", "Together they have {d} {things}.")),
    ),
    Template(
        "{friend} has {a} {things}. {name} has {b} fewer {things} than {friend}. How many {things} "
        "do they have [together|in total|in all]?",
        {"a": _MANY, "b": _SOME},
        (("c=a-b", "{name} has {c} {things}."), ("d=a+c", "Together they have {d} {things}.")),
    ),
    Template(
        "There are {a} people on a [bus|train|boat]. At the first stop {b} people get off and {c} "
        "people get on. How many people are on [it|board] now?",
        {"a": _MANY, "b": _SOME, "c": _SOME},
        (("d=a-b", "There are {d} people."), ("e=d+c", "There are {e} people now.")),
    ),
    Template(
        "{name} is {a} years old. {friend} is {b} years older than {name}. How old will {friend} "
        "be in {c} years?",
        {"a": (5, 40), "b": _SOME, "c": _SOME},
        (("d=a+b", "{friend} is {d} years old."), ("e=d+c", "{friend} will be {e} years old.")),
    ),
    Template(
        "{name} has {a} {things}. {friend} has {b} more than {name}. {other} has {c} fewer than "
        "{friend}. How many {things} does {other} have?",
        {"a": _MANY, "b": _SOME, "c": _SOME},
        (("d=a+b", "{friend} has {d} {things}."), ("e=d-c", "{other} has {e} {things}.")),
    ),
    Template(
        "A shop has {a} {things}. It sells {b} of them in the morning and {c} in "
        "the afternoon. How many {things} are left?",
        {"a": (40, 99), "b": _SOME, "c": _SOME},
        (("d=b+c", "The shop sells {d} {things}."), ("e=a-d", "There are {e} {things} left.")),
    ),
    # Two steps with a product
    Template(
        "{name} has {a} {boxes} with {b} {things} in each {box}. {He} [gives|sells] {c} {things} "
        "to {friend}. How many {things} does {name} have left?",
        {"a": _FEW, "b": _FEW, "c": _SOME},
        (("d=a*b", "{name} has {d} {things}."), ("e=d-c", "{name} has {e} {things} left.")),
    ),
    Template(
        "{name} [fills|packs] {a} {boxes} with {b} {things} each. {He} has {c} {things} left over. "
        "How many {things} did {name} have at first?",
        {"a": _FEW, "b": _FEW, "c": _SOME},
        (("d=a*b", "The {boxes} hold {d} {things}."), ("e=d+c", "{name} had {e} {things}.")),
    ),
    Template(
        "{name} buys {a} {things} for ${b} each. {He} pays with ${m}. How [much change|many "
        "dollars] does {name} get back?",
        {"a": _FEW, "b": _FEW, "m": (30, 99)},
        (("d=a*b", "The {things} cost {d} dollars."), ("e=m-d", "{name} gets {e} dollars back.")),
    ),
    Template(
        "{name} buys {a} {things} for ${b} each. A coupon takes ${c} off the price. How [much|many "
        "dollars] does {name} pay?",
        {"a": _FEW, "b": _FEW, "c": _SOME},
        (("d=a*b", "The {things} cost {d} dollars."), ("e=d-c", "{name} pays {e} dollars.")),
    ),
    Template(
        "A book has {m} pages. {name} reads {a} pages [a|each|every] day for {b} days. How many "
        "pages are left?",
        {"m": (40, 99), "a": _FEW, "b": _FEW},
        (("d=a*b", "{name} reads {d} pages."), ("e=m-d", "There are {e} pages left.")),
    ),
    Template(
        "{friend} has {a} {things}. {name} has {k} times as many {things} as {friend}. How many "
        "{things} do they have [together|in total|in all]?",
        {"a": (3, 15), "k": (2, 5)},
        (("d=k*a", "{name} has {d} {things}."), ("e=a+d", "Together they have {e} {things}.")),
    ),
    Template(
        "{friend} has {a} {things}. {name} has {k} times as many. How many more {things} does "
        "{name} have than {friend}?",
        {"a": (3, 15), "k": (2, 5)},
        (("d=k*a", "{name} has {d} {things}."), ("e=d-a", "{name} has {e} more {things}.")),
    ),
    Template(
        "{name} [plants|grows] {a} rows of {b} [roses|trees|beans]. {c} of the plants die. How "
        "many plants are left?",
        {"a": _FEW, "b": _FEW, "c": _SOME},
        (("d=a*b", "{name} has {d} plants."), ("e=d-c", "There are {e} plants left.")),
    ),
    Template(
        "{name} works {a} hours for ${b} an hour and gets ${c} [in tips|as a gift|as a bonus]. How "
        "[much money|many dollars] does {name} have?",
        {"a": _FEW, "b": _FEW, "c": _SOME},
        (("d=a*b", "{name} earns {d} dollars."), ("e=d+c", "{name} has {e} dollars.")),
    ),
    Template(
        "{name} [runs|walks|swims] {a} miles a day for {b} days and {c} miles on Sunday. How many "
        "miles is that in [all|total]?",
        {"a": _FEW, "b": (2, 6), "c": _SOME},
        (("d=a*b", "In {b} days that is {d} miles."), ("e=d+c", "In all it is {e} miles.")),
    ),
    Template(
        "{name} has {a} {things} and {friend} has {b}. They [share|split] all of them equally "
        "among {c} children. How many {things} does each child get?",
        {"a": (5, 40), "b": (5, 40), "c": (2, 6)},
        (("d=a+b", "They have {d} {things}."), ("e=d/c", "Each child gets {e} {things}.")),
    ),
    # Three steps
    Template(
        "{name} buys {a} {things} for ${b} each and {c} {goods} for ${d} each. How [much|many "
        "dollars] does {name} [pay|spend]?",
        {"a": _FEW, "b": _FEW, "c": _FEW, "d": _FEW},
        (
            ("e=a*b", "The {things} cost {e} dollars."),
            ("f=c*d", "The {goods} cost {f} dollars."),
            ("g=e+f", "In total {name} pays {g} dollars."),
        ),
    ),
    Template(
        "{name} has {a} {boxes} of {b} {things} and {friend} has {c} {boxes} of {d}. How many "
        "{things} do they have [together|in total|in all]?",
        {"a": _FEW, "b": _FEW, "c": _FEW, "d": _FEW},
        (
            ("e=a*b", "{name} has {e} {things}."),
            ("f=c*d", "{friend} has {f} {things}."),
            ("g=e+f", "Together they have {g} {things}."),
        ),
    ),
    Template(
        "{name} has {a} {boxes} of {b} {things} and {friend} has {c} {boxes} of {d}. How many more "
        "{things} does {name} have?",
        {"a": _FEW, "b": _FEW, "c": _FEW, "d": _FEW},
        (
            ("e=a*b", "{name} has {e} {things}."),
            ("f=c*d", "{friend} has {f} {things}."),
            ("g=e-f", "{name} has {g} more {things}."),
        ),
    ),
    Template(
        "{name} has ${c} and saves ${a} a week for {b} weeks. Then {he} spends ${d} on {things}. "
        "How [much money|many dollars] does {name} have left?",
        {"a": _FEW, "b": _FEW, "c": _SOME, "d": _SOME},
        (
            ("e=a*b", "{name} saves {e} dollars."),
            ("f=e+c", "{name} has {f} dollars."),
            ("g=f-d", "{name} has {g} dollars left."),
        ),
    ),
    Template(
        "{name} bakes {a} trays of {b} [cookies|muffins|rolls]. {He} eats {c} and puts the rest in "
        "bags of {d}. How many bags does {name} need?",
        {"a": _FEW, "b": _FEW, "c": _SOME, "d": (2, 6)},
        (
            ("e=a*b", "{name} bakes {e}."),
            ("f=e-c", "There are {f} left."),
            ("g=f/d", "{name} needs {g} bags."),
        ),
    ),
    Template(
        "A farm has {a} cows and {b} hens. A cow has 4 legs and a hen has 2 legs. How many legs "
        "do the animals have in [all|total]?",
        {"a": (2, 15), "b": _SOME},
        (
            ("c=a*4", "The cows have {c} legs."),
            ("d=b*2", "The hens have {d} legs."),
            ("e=c+d", "In all there are {e} legs."),
        ),
    ),
    Template(
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
