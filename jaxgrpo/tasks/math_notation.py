r"""One spelling for what mathematicians write in several, before math-verify compares two answers.

math-verify reads LaTeX. What people and models also write (``3√13``, ``7 3/4``, ``12\,000``,
``118 dollars``, ``5.``) it misreads or cannot read. Floor 0: no jax.
"""

from __future__ import annotations

import re
import string
from fractions import Fraction

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_VULGAR = {
    char: rf"\frac{{{over}}}{{{under}}}"
    for char, over, under in zip(
        "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234151357", "233445555668888", strict=True
    )
}
_CHARACTERS = str.maketrans(
    _VULGAR
    | dict.fromkeys("\u2010\u2011\u2212\ufe63\uff0d", "-")
    | dict.fromkeys("\u00a0\u2009\u202f\u2007\u3000", " ")
    | dict.fromkeys("\u200b\u2061\ufeff", "")
    | dict.fromkeys("⋅·∙", r"\cdot ")
    | {"×": r"\times ", "÷": r"\div ", "±": r"\pm ", "°": r"^\circ ", "′": "'", "⁄": "/"}
    | {"∞": r"\infty ", "π": r"\pi ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∈": r"\in "}
    | {"∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "％": r"\%"}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)
_TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|it|rm|sf|tt)|mbox|boldsymbol|bm)\s*\{"
_NUMBER = r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_SCALE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE |= {"k": 3, "m": 6, "b": 9, "bn": 9, "t": 12}
_SPACE = r"(?:\\[,:;! ]|[~ ])*"

_SUPERSCRIPT = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_SUBSCRIPT = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_ROOT = re.compile(r"([√∛∜])\s*(?:\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z])?)")
_DEGREE = {"√": "", "∛": "[3]", "∜": "[4]"}
_GROUPED = re.compile(
    r"(?<![0-9.,])([1-9][0-9]{0,2})((?:(?:\\[,:;! ]|[~ ]|\{,\}|,\\!)[0-9]{3})+)(?![0-9])"
)
_COMMAS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_MIXED = re.compile(
    r"(?<![0-9.,^_{})A-Za-z\\])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9.,]*[0-9]|\s*[/^])"
)
_REPEATING = re.compile(r"(?<![0-9])([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*\{([0-9]+)\}")
_ORDINAL = re.compile(
    rf"(?<=[0-9])(?:\s*\^\s*\{{?\s*(?:{_TEXT})?\s*(?:st|nd|rd|th)\b\s*\}}{{0,2}}|(?:st|nd|rd|th)\b)",
    re.IGNORECASE,
)
# An en dash between two numbers is a range, elsewhere a minus.
_MINUS = re.compile(r"(?<![0-9])\u2013|\u2013(?![0-9])")
_HALF_OF_DAY = re.compile(r"(?<![A-Za-z])([ap])\.?\s?m\b", re.IGNORECASE)
_SCALE_WORD = re.compile(
    rf"(?<![0-9.])({_NUMBER}){_SPACE}({_TEXT})?{_SPACE}(hundred|thousand|million|billion|trillion)s?\b"
)
_MONEY = re.compile(rf"\\?\$\s*({_NUMBER})\s?({_TEXT})?\s*([kKmMbBtT]|bn)(?![A-Za-z])(?(2)\}})")
_NUMBER_IN_TEXT = re.compile(rf"{_TEXT}\s*\(?\s*(-?(?:{_NUMBER}))\s*\)?\s*\}}")
_END = re.compile(r"(?:(?<!\.)[.]|[,;:]|(?<!\\)\\[,;:! ]|~|\s)+$")
_IN_TEXT = re.compile(rf"{_TEXT}([^{{}}]*)\}}")
_END_IN_TEXT = re.compile(rf"({_TEXT}[^{{}}.]*)\.\s*\}}$")
# Plain words after a number, a root or a fraction; "3 or 5" and "2 sin x" are no quantity.
_WORDS = re.compile(
    r"(?<=[0-9})%])\s*((?:(?:per|an?)\s+)?[A-Za-z]+(?:[ /-]+[A-Za-z]+){0,4})\.?"
    r"\s*(?:\^\s*\{?\s*[1-9]\s*\}?)?$"
)
_split = str.split
_UNITS = frozenset(
    _split(
        "mm cm dm m km in ft yd mi kg g mg lb lbs oz s sec min h hr hrs mph kph ml l sq cu am pm"
    )
    + _split("per a an each of to")
)
_MATHS = frozenset(
    _split("or and mod sin cos tan cot sec csc log ln exp sqrt pi max min gcd lcm lim if for when")
    + _split("where is are infinity inf theta alpha beta none all real")
)
# "2 hours 30 minutes", not "3 or 5": math-verify would read the first number alone.
_BETWEEN = re.compile(rf"(?<=[0-9}}])\s*(?:{_TEXT}([^{{}}]*)\}}|([A-Za-z][A-Za-z ]*))\s*(?=[0-9])")
_CHOICE = re.compile(rf"(?:{_TEXT}\s*)?(?:\(([A-J])\)|([A-J])[.)])\s*\}}?{_SPACE}(.*)", re.DOTALL)
_LETTER = re.compile(rf"(?:{_TEXT}\s*)?\(?([A-J])\)?[.:]?\s*\}}?")


def comparisons(gold: str, answer: str) -> list[tuple[str, str]]:
    r"""The pairs of LaTeX of which one must be equal for the answer to be right; none: it is wrong.

    Beside the two as they are in `plain_math`: a percent sign may be missing on one side, and where
    one side is a lettered choice with its value (``\textbf{(C)}\ 12``) the other may be either.
    Both letters and both values must agree where both sides have them. "2 hours 30 minutes" equals
    nothing but itself.
    """
    originals = gold, answer
    gold, answer = plain_math(gold), plain_math(answer)
    if _same_text(gold, answer):
        return [(gold, gold)]
    if _is_compound(gold) or _is_compound(answer):
        return []
    halves = {half[1].lower() for text in originals if (half := _HALF_OF_DAY.search(text))}
    if len(halves) == 2:
        return []
    pairs = [(gold, answer)]
    if "%" in gold + answer:
        pairs.append((_without_percent(gold), _without_percent(answer)))
    (gold_letter, gold_value), (letter, value) = _choice(gold), _choice(answer)
    if (gold_letter and gold_value) or (letter and value):
        if gold_letter and letter and gold_letter != letter:
            return []
        if gold_value and value:
            return [(plain_math(gold_value), plain_math(value))]
        if gold_letter and letter:
            return [(gold_letter, letter)]
    return pairs


def _same_text(one: str, other: str) -> bool:
    """Whether the two differ in white space and in what is marked as text alone."""
    return _bare_text(one) == _bare_text(other)


def _bare_text(text: str) -> str:
    return "".join(_IN_TEXT.sub(r"\1", text).replace("\\ ", "").split())


def _without_percent(text: str) -> str:
    return text.replace(r"\%", "").replace("%", "")


def _choice(text: str) -> tuple[str, str]:
    """The letter and the value of a choice; what is no choice is a value."""
    if letter := _LETTER.fullmatch(text):
        return letter[1], ""
    choice = _CHOICE.fullmatch(text)
    return (choice[1] or choice[2], choice[3]) if choice else ("", text)


def _is_compound(text: str) -> bool:
    """Whether two numbers stand in a row, each with a unit."""
    for match in _BETWEEN.finditer(text):
        names = [name for name in re.findall("[A-Za-z]+", match[1] or match[2]) if name != "and"]
        if names and all(map(_is_unit, names)):
            return True
    return False


def plain_math(answer: str) -> str:
    r"""The answer as LaTeX in one spelling; what is spelled so already comes back as it is.

    Units are left out, and a unit's power with them; scale words multiply, ordinals are their
    number, digits are not grouped, mixed numbers and repeating decimals are fractions.
    """
    text = answer.translate(_CHARACTERS)
    text = _MINUS.sub("-", text)
    text = _SUPERSCRIPT.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m[0]) + "}", text)
    text = _SUBSCRIPT.sub(lambda m: "_{" + "".join(_SUBSCRIPTS[c] for c in m[0]) + "}", text)
    text = _ROOT.sub(_root, text)
    text = _END.sub("", _END_IN_TEXT.sub(r"\1}", text.strip()))
    text = text.replace("{:}", ":").removeprefix("=").lstrip()
    text = _GROUPED.sub(lambda m: m[1] + "".join(re.findall("[0-9]{3}", m[2])), text)
    text = _outside_brackets(_COMMAS, text)
    text = _MIXED.sub(_mixed, text)
    text = _REPEATING.sub(_repeating, text)
    text = _ORDINAL.sub("", text)
    text = _SCALE_WORD.sub(lambda m: _scaled(m[1], m[3]) + (m[2] or ""), text)
    text = _MONEY.sub(lambda m: _scaled(m[1], m[3]), text)
    if number := _NUMBER_IN_TEXT.fullmatch(text):
        text = number[1]
    return _without_unit(text)


def _root(match: re.Match[str]) -> str:
    inside = match[2] if match[2] is not None else match[3]
    root = rf"\sqrt{_DEGREE[match[1]]}"
    return f"{root} " if inside is None else f"{root}{{{inside}}}"


def _mixed(match: re.Match[str]) -> str:
    whole, over, under = match.groups()
    if int(over) >= int(under):
        return match[0]
    return rf"{whole}\frac{{{over}}}{{{under}}}"


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, repeated = match.groups()
    nines = int("9" * len(repeated) + "0" * len(fixed))
    value = int((whole or "0") + fixed + repeated) - int((whole or "0") + fixed)
    fraction = Fraction(value, nines)
    return rf"\frac{{{fraction.numerator}}}{{{fraction.denominator}}}"


def _scaled(number: str, word: str) -> str:
    whole, _, decimals = number.partition(".")
    zeros = _SCALE[word.lower()]
    digits = whole + decimals[:zeros].ljust(zeros, "0")
    return digits + (f".{decimals[zeros:]}" if decimals[zeros:] else "")


def _outside_brackets(pattern: re.Pattern[str], text: str) -> str:
    """Takes the commas out of what matches, but where a comma may separate: in (1,234)."""
    pieces, end = [], 0
    for match in pattern.finditer(text):
        before = text[: match.start()]
        if sum(before.count(b) for b in "([") > sum(before.count(b) for b in ")]"):
            continue
        if before.count(r"\{") > before.count(r"\}"):
            continue
        pieces += [text[end : match.start()], match[0].replace(",", "")]
        end = match.end()
    return "".join([*pieces, text[end:]])


def _without_unit(text: str) -> str:
    words = _WORDS.search(text)
    if words is None or _is_compound(text):
        return text
    names = re.findall("[A-Za-z]+", words[1])
    return text[: words.start()] if all(map(_is_unit, names)) else text


def _is_unit(word: str) -> bool:
    """Whether letters are a word and no product of variables."""
    word = word.lower()
    if word in _UNITS:
        return True
    named = word in _MATHS or word in string.ascii_lowercase
    return len(word) >= 3 and not named and bool(set(word) & set("aeiou"))
